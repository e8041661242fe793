import email
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import reattn

ROOT = Path(__file__).parents[1]
SETUPTOOLS = 77  # the build requirement of pyproject.toml, which a build without isolation has to find installed

pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree"),
    pytest.mark.skipif(
        importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < SETUPTOOLS,
        reason=f"needs setuptools {SETUPTOOLS} or newer",
    ),
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip"),
]


def run_python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def is_clutter(folder, names):
    """Whatever a fresh clone does not have: hidden folders, earlier builds, results."""
    built = {"build", "dist", "out", "__pycache__"}
    return [name for name in names if name in built or name.endswith(".egg-info") or name.startswith(".")]


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    """The environment of a machine on which importing torch fails."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    environment = {"PYTHONPATH": str(folder)}
    assert "the build imported torch" in run_python("-c", "import torch", cwd=folder, **environment).stderr
    return environment


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, poison):
    """The source distribution of a copy of the tree, built without network and without torch."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=is_clutter)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    finished = run_python("-c", build, folder, cwd=tree, **poison)
    assert finished.returncode == 0, finished.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, poison, sdist):
    """The wheel as pip builds it from nothing but the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    finished = run_python("-m", "pip", "wheel", *options, "--wheel-dir", folder, sdist, cwd=folder, **poison)
    assert finished.returncode == 0, finished.stderr
    (archive,) = folder.glob("*.whl")
    return archive


def python_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_sdist_holds_what_a_checkout_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for room in ("reattn", "kernels", "tests", "benchmarks", "examples"):
        assert {f"{room}/{name}" for name in python_files(ROOT / room)} <= names
    assert {"Makefile", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"} <= names
    assert "docs/architecture.md" in names
    assert not [name for name in names if name.endswith(".pyc")]


def test_wheel_holds_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    sources = {f"reattn/{name}" for name in python_files(ROOT / "reattn")}
    kernels = {f"reattn/kernels/{name}" for name in python_files(ROOT / "kernels")}
    assert "reattn/kernels/__init__.py" in kernels
    assert packaged == sources | kernels | {"reattn/py.typed"}
    assert {name.partition("/")[0] for name in names - packaged} == {f"reattn-{reattn.__version__}.dist-info"}


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"reattn-{reattn.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert metadata["Version"] == reattn.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert sorted(requirement.replace("'", '"') for requirement in needed) == [
        "torch>=2.10",
        'triton>=3.6; platform_system == "Linux"',
    ]


def test_wheel_imports_from_anywhere(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import importlib.util, reattn\n"
        "print(reattn.__file__)\n"
        "print(importlib.util.find_spec('reattn.kernels').origin)\n"
        "print(importlib.util.find_spec('kernels'))"
    )
    finished = run_python("-c", code, cwd=elsewhere, PYTHONPATH=str(site))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [
        str(site / "reattn" / "__init__.py"),
        str(site / "reattn" / "kernels" / "__init__.py"),
        "None",
    ]
