"""Where the packages lie in the source tree and what is compiled; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

# pip does not run this file from a path that holds its neighbours.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_extensions import BuildExtensions, CpuExtension, CudaExtension

# kernels/ stands beside reattn/ in the tree but is installed inside it: the name `kernels` belongs to no one.
setup(
    packages=[*find_packages(include=["reattn", "reattn.*"]), "reattn.kernels"],
    package_dir={"reattn": "reattn", "reattn.kernels": "kernels"},
    package_data={"reattn": ["py.typed"]},
    ext_modules=[CpuExtension(), CudaExtension()],
    cmdclass={"build_ext": BuildExtensions},
)
