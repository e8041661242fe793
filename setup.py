"""Where the packages lie in the source tree and what is compiled; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

# pip does not run this file from a path that holds its neighbours.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_extensions import BuildExtensions, CpuExtension

# kernels/ and csrc/ stand beside reattn/ in the tree but are installed inside it: their names belong to no one. The
# kernels of csrc/cuda are compiled where they run.
setup(
    packages=[*find_packages(include=["reattn", "reattn.*"]), "reattn.kernels", "reattn.csrc"],
    package_dir={"reattn": "reattn", "reattn.kernels": "kernels", "reattn.csrc": "csrc"},
    include_package_data=False,  # which would take csrc/cpu along
    package_data={"reattn": ["py.typed"], "reattn.csrc": ["*.h", "cuda/*"]},
    ext_modules=[CpuExtension()],
    cmdclass={"build_ext": BuildExtensions},
)
