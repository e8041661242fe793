"""Where the packages lie in the source tree; everything else about the package is in pyproject.toml."""

from setuptools import find_packages, setup

# kernels/ stands beside reattn/ in the tree but is installed inside it: the name `kernels` belongs to no one.
setup(
    packages=[*find_packages(include=["reattn", "reattn.*"]), "reattn.kernels"],
    package_dir={"reattn": "reattn", "reattn.kernels": "kernels"},
    package_data={"reattn": ["py.typed"]},
)
