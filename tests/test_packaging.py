import email
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from filelock import FileLock

import reattn
from reattn.backends import common

ROOT = Path(__file__).parents[1]
SETUPTOOLS = 77  # the build requirement of pyproject.toml, which a build without isolation has to find installed
EXTENSION = f"reattn/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
COMPILER = shutil.which("g++") or shutil.which("clang++")
CLANG = shutil.which("clang++") or shutil.which("clang++-14")
COMPILES = bool(COMPILER and importlib.util.find_spec("pybind11") and importlib.util.find_spec("ninja"))

pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree"),
    pytest.mark.skipif(
        importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < SETUPTOOLS,
        reason=f"needs setuptools {SETUPTOOLS} or newer",
    ),
    # Not find_spec: setuptools would take that for pip running in this process, and put distutils away.
    pytest.mark.skipif(not [*distributions(name="pip")], reason="needs pip"),
]

compiles = pytest.mark.skipif(not COMPILES, reason="needs pybind11, ninja and GCC or Clang")
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86-64's instruction sets")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's wheels")

# What every Linux has. The extension finds torch's OpenMP where torch is, and links none.
SYSTEM_LIBRARIES = re.compile(r"(ld-linux[\w-]*|libc|libdl|libgcc_s|libm|libpthread|libstdc\+\+)\.so\.\d+")

# Without what an editable install would find in the source tree.
INFO = (
    "import runpy, sys\n"
    "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    "runpy.run_module('reattn.info', run_name='__main__')"
)

# Stand-ins for csrc/cpu that compile in no time: the module tells for each instruction set what it was compiled with.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
KERNELS = """
#define JOIN(name, set) name##_##set
#define NAME(name, set) JOIN(name, set)
const char* NAME(kernels, REATTN_ISA)() {
#if defined(__AMX_BF16__)
  return "amx";
#elif defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}
"""
BINDINGS = """
#include <Python.h>
{declarations}
PyMODINIT_FUNC PyInit__cpu() {{
  static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "_cpu", 0, -1, 0, 0, 0, 0, 0}};
  PyObject* module = PyModule_Create(&definition);
{additions}
  return module;
}}
"""
ADDITION = """
#ifdef REATTN_BUILT_{upper}
  PyModule_AddStringConstant(module, "{name}", kernels_{name}());
#endif
"""


def run_python(*arguments, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("REATTN_")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


def pip_wheel(source, folder, *options, **environment):
    options = [*options, "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    return run_python("-m", "pip", "wheel", *options, "--wheel-dir", folder, source, cwd=folder, **environment)


def is_clutter(folder, names):
    """Whatever a fresh clone does not have: hidden folders, earlier builds, results."""
    built = {"build", "dist", "out", "__pycache__"}
    return [name for name in names if name in built or name.endswith((".egg-info", ".so")) or name.startswith(".")]


def said(output):
    """What the build has to say of the extension, among all that setuptools and pip say."""
    lines = [line.strip() for line in output.splitlines()]
    return [line.removeprefix("reattn: ") for line in lines if line.startswith("reattn: CPU extension ")]


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
    """The wheel as pip builds it from nothing but the source distribution.

    To save time the kernels are not optimised, and pytest's processes share one wheel.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "wheel"
    folder.mkdir(exist_ok=True)
    with FileLock(shared / "wheel.lock"):
        if not list(folder.glob("*.whl")):
            settings = {"REATTN_BUILD_CPU": "1" if COMPILES else "0", "CXXFLAGS": "-O0"}
            finished = pip_wheel(sdist, folder, "--quiet", **poison, **settings)
            assert finished.returncode == 0, finished.stderr
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture
def stub_tree(tmp_path):
    """A copy of the tree with stand-ins for the sources in csrc/cpu, in a folder whose name holds a space."""
    tree = shutil.copytree(ROOT, tmp_path / "a tree", ignore=is_clutter)
    sources = tree / "csrc" / "cpu"
    shutil.rmtree(sources)
    sources.mkdir()
    for name in ("driver", "dispatch", "parallel"):
        (sources / f"{name}.cpp").touch()
    (sources / "kernels.cpp").write_text(KERNELS)
    declarations = "\n".join(f"const char* kernels_{name}();" for name in INSTRUCTION_SETS)
    additions = "".join(ADDITION.format(name=name, upper=name.upper()) for name in INSTRUCTION_SETS)
    (sources / "bindings.cpp").write_text(BINDINGS.format(declarations=declarations, additions=additions))
    return tree


def build_in_place(tree, **environment):
    return run_python("setup.py", "--quiet", "build_ext", "--inplace", cwd=tree, **environment)


def built_sets(tree):
    """The instruction sets that the stand-in was built for, each with the one that its compiler's flags ask for."""
    code = (
        "import json, sys, importlib.util as util\n"
        "spec = util.spec_from_file_location('_cpu', sys.argv[1])\n"
        "module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(json.dumps({name: value for name, value in vars(module).items() if not name.startswith('_')}))"
    )
    finished = run_python("-c", code, tree / EXTENSION, cwd=tree)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def python_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_sdist_holds_what_a_checkout_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for room in ("reattn", "kernels", "emulator", "tests", "benchmarks", "examples"):
        assert {f"{room}/{name}" for name in python_files(ROOT / room)} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")} <= names
    assert {
        "Makefile",
        "constraints.txt",
        "constraints-libraries.txt",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
    } <= names
    assert "build_extensions.py" in names
    assert "docs/architecture.md" in names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_wheel_holds_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    sources = {f"reattn/{name}" for name in python_files(ROOT / "reattn")}
    kernels = {f"reattn/kernels/{name}" for name in python_files(ROOT / "kernels")}
    assert "reattn/kernels/__init__.py" in kernels
    cuda = {f"reattn/csrc/cuda/{path.name}" for path in (ROOT / "csrc" / "cuda").iterdir()}
    cuda |= {"reattn/csrc/__init__.py", "reattn/csrc/fold.h"}
    assert {f"reattn/csrc/cuda/{name}" for name in ("forward.cu", "tiles.cuh", "params.h")} <= cuda
    other = {EXTENSION} if COMPILES else {"reattn/not_built.txt"}
    assert packaged == sources | kernels | cuda | {"reattn/py.typed"} | other
    assert {name.partition("/")[0] for name in names - packaged} == {f"reattn-{reattn.__version__}.dist-info"}


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"reattn-{reattn.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert wheel.name.endswith("-py3-none-any.whl") != COMPILES
    assert metadata["Version"] == reattn.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert sorted(requirement.replace("'", '"') for requirement in needed) == [
        "torch>=2.10",
        'triton>=3.6; platform_system == "Linux"',
    ]


def test_build_requirements_are_pinned():
    tomllib = pytest.importorskip("tomllib")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    required = {requirement.partition(">=")[0] for requirement in requires}
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert required == {"ninja", "pybind11", "setuptools"}
    assert required <= pinned
    assert f"setuptools>={SETUPTOOLS}" in requires


def test_wheel_imports_from_anywhere(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import importlib.util, reattn\n"
        "print(reattn.__file__)\n"
        "print(importlib.util.find_spec('reattn.kernels').origin)\n"
        "from reattn.backends import cuda_compile\n"
        "print(*sorted(name for name in cuda_compile.sources() if name.endswith('.cu')))\n"
        "print(importlib.util.find_spec('kernels'))"
    )
    if COMPILES:
        code += "\nimport reattn._cpu\nprint(reattn._cpu.__file__)"
    finished = run_python("-c", code, cwd=elsewhere, PYTHONPATH=str(site))
    assert finished.returncode == 0 and "RuntimeWarning" not in finished.stderr, finished.stderr
    assert finished.stdout.splitlines() == [
        str(site / "reattn" / "__init__.py"),
        str(site / "reattn" / "kernels" / "__init__.py"),
        " ".join(sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))),
        "None",
        *([str(site / EXTENSION)] if COMPILES else []),
    ]


def test_source_tree_that_is_imported_uninstalled_says_so(tmp_path):
    """What Python finds after a plain ``pip install .`` where it is started in the clone."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "reattn", tree / "reattn", ignore=lambda *a: {*is_clutter(*a), "kernels", "csrc"} & {*a[1]})
    code = (
        "import sys, warnings\n"
        # An editable install of this tree maps the kernels of any.
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    import reattn\n"
        "print(reattn.__file__, *(warning.message for warning in caught if 'reattn' in str(warning)), sep='\\n')"
    )
    bare = run_python("-c", code, cwd=tree)
    assert bare.returncode == 0, bare.stderr
    file, warning = bare.stdout.splitlines()
    assert file == str(tree / "reattn" / "__init__.py")
    assert warning.startswith(f"reattn is imported from the source tree {tree / 'reattn'}, which holds no kernels")
    assert "pip install -e ." in warning


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param(
            {"CXX": "/nonexistent/g++", "PATH": "/nonexistent"},
            "no working GCC or Clang (tried /nonexistent/g++; ",
            id="no compiler",
        ),
        pytest.param({"REATTN_BUILD_CPU": "0"}, "REATTN_BUILD_CPU=0", id="switched off", marks=pytest.mark.slow),
    ],
)
def test_wheel_without_the_extension(settings, reason, sdist, poison, tmp_path):
    """It is for every machine, it works, and tells in one line why it has no extension: so does `pip --verbose`."""
    finished = pip_wheel(sdist, tmp_path, "--verbose", **poison, **settings)
    assert finished.returncode == 0, finished.stderr
    output = finished.stdout + finished.stderr
    (line,) = said(output)
    assert line.startswith(f"CPU extension not built: {reason}")
    (archive,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(tmp_path / "site")
    assert not list((tmp_path / "site").rglob("*.so"))
    code = (
        "import torch, reattn\n"
        "query = torch.randn(1, 2, 3, 4)\n"
        "print(reattn.re_attention(query, query, query, torch.eye(2)).shape, reattn.__file__)"
    )
    finished = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert finished.stdout.split("]) ") == [
        "torch.Size([1, 2, 3, 4",
        f"{tmp_path / 'site' / 'reattn' / '__init__.py'}\n",
    ]
    finished = run_python("-c", INFO, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    (line,) = (line for line in finished.stdout.splitlines() if line.startswith("backend cpu "))
    assert f"the CPU extension was not built: {reason}" in line


@pytest.mark.parametrize(
    ("system", "reason"),
    [("win32", "it needs GCC or Clang, and has no build for Windows"), ("darwin", "no working GCC or Clang (tried ")],
    ids=["Windows", "macOS"],
)
def test_wheel_on_other_systems(system, reason, sdist, poison, tmp_path, monkeypatch):
    """The name is pretended, and that there is no compiler: a wheel for every machine, which says what it lacks."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    code = (
        "import sys, sysconfig\n"
        "from setuptools import build_meta\n"
        "sysconfig.get_config_vars()\n"  # read once, from a file that the system's name is part of
        "sys.platform = sys.argv[1]\n"
        "build_meta.build_wheel(sys.argv[2])"
    )
    finished = run_python("-c", code, system, tmp_path, cwd=tree, **poison, PATH="/nonexistent", CXX="")
    assert finished.returncode == 0, finished.stderr
    (archive,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(archive) as wheel:
        not_built = Path(wheel.extract("reattn/not_built.txt", tmp_path))
    monkeypatch.setattr(common, "NOT_BUILT", not_built)
    told = common.why_not_imported("reattn._cpu", ModuleNotFoundError())
    assert told.startswith(f"the CPU extension was not built: {reason}")


@compiles
@on_linux
def test_wheel_for_any_linux(wheel, tmp_path):
    """auditwheel has nothing to add but the tag; installed by pip, the wheel's CPU backend is there."""
    pytest.importorskip("auditwheel")
    from elftools.elf.elffile import ELFFile

    options = ["--patcher", "none", "--wheel-dir", tmp_path / "dist"]
    finished = run_python("-m", "auditwheel", "repair", *options, wheel, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    assert re.search(r"-cp3\d+-cp3\d+-(many|musl)linux_\d+_\d+_\w+\.whl$", archive.name)
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(archive) as after:
        assert {name for name in after.namelist() if not name.endswith("/")} == set(before.namelist())

    site = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", site]
    finished = run_python("-m", "pip", "install", *options, archive, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    with (site / EXTENSION).open("rb") as file:
        tags = [*ELFFile(file).get_section_by_name(".dynamic").iter_tags()]
    assert not [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    needed = [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
    assert needed and [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)] == []
    for folder in (tempfile.gettempdir(), ROOT):  # pip builds in the first
        assert os.fsencode(folder) not in (site / EXTENSION).read_bytes()

    code = f"{INFO}\nimport reattn._cpu\nprint(reattn._cpu.__file__)"
    finished = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert finished.returncode == 0, finished.stderr
    *report, file = finished.stdout.splitlines()
    assert file == str(site / EXTENSION)
    assert [line.split() for line in report if line.startswith("backend cpu ")] == [["backend", "cpu", "available"]]


@compiles
@on_linux
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_wheel(stub_tree):
    pytest.importorskip("auditwheel")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "REATTN_"))}
    command = ["make", "wheel", f"PY={sys.executable}", "STAMP="]
    build_lib = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for made_before in (build_lib, "out/wheel/lib", "out/dist"):
        removed = stub_tree / made_before / "reattn" / "removed.py"
        removed.parent.mkdir(parents=True)
        removed.touch()

    no_compiler = environment | {"CXX": "/nonexistent/g++"}
    finished = subprocess.run(command, cwd=stub_tree, env=no_compiler, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "CPU extension not built, though REATTN_BUILD_CPU=1: no working GCC or Clang" in finished.stderr
    assert not list((stub_tree / "out").rglob("*.whl"))

    finished = subprocess.run(command, cwd=stub_tree, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (archive,) = (stub_tree / "out" / "dist").iterdir()
    assert "linux_" in archive.name and "-linux_" not in archive.name
    with zipfile.ZipFile(archive) as wheel:
        names = wheel.namelist()
    assert {EXTENSION, "reattn/py.typed", "reattn/csrc/fold.h", "reattn/kernels/fold.py"} <= {*names}
    assert "reattn/removed.py" not in names


def test_extension_that_is_asked_for(stub_tree):
    finished = build_in_place(stub_tree, REATTN_BUILD_CPU="1", CXX="/nonexistent/g++")
    assert finished.returncode != 0
    assert "CPU extension not built, though REATTN_BUILD_CPU=1: no working GCC or Clang" in finished.stderr
    finished = build_in_place(stub_tree, REATTN_BUILD_CPU="yes")
    assert finished.returncode != 0
    assert "REATTN_BUILD_CPU is 0, 1 or not set, not 'yes'" in finished.stderr


@compiles
def test_build_in_place(stub_tree):
    """Each instruction set's kernels are compiled for it, and a second build has nothing to do."""
    finished = build_in_place(stub_tree, REATTN_BUILD_CPU="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    sets = built_sets(stub_tree)
    assert "portable" in sets
    assert all(name == compiled_for for name, compiled_for in sets.items())
    again = build_in_place(stub_tree)
    assert "no work to do" in again.stdout
    assert built_sets(stub_tree) == sets


@compiles
@on_x86
def test_instruction_sets_unknown_to_the_compiler(stub_tree, tmp_path):
    old = tmp_path / "g++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1;; esac\nexec {COMPILER} "$@"\n')
    old.chmod(0o755)
    finished = build_in_place(stub_tree, CXX=str(old))
    assert said(finished.stderr) == [f"CPU extension without avx512_bf16, amx: {old} does not know these instructions"]
    assert list(built_sets(stub_tree)) == ["portable", "avx2", "avx512"]


@compiles
def test_sources_that_do_not_compile(stub_tree):
    """One line tells of it, and the library of an earlier build does not stay."""
    (stub_tree / "csrc" / "cpu" / "driver.cpp").write_text("#error unfinished\n")
    (stub_tree / EXTENSION).touch()
    finished = build_in_place(stub_tree)
    assert finished.returncode == 0, finished.stderr
    (line,) = said(finished.stderr)
    assert line.startswith("CPU extension not built: ")
    assert "driver.cpp:1:2: error: " in line
    assert not (stub_tree / EXTENSION).exists()
    finished = build_in_place(stub_tree, REATTN_BUILD_CPU="1")
    assert finished.returncode != 0
    assert "driver.cpp:1:2: error: " in finished.stderr


@compiles
def test_build_for_a_sanitizer(stub_tree):
    """The sanitizer's library may be missing here, so only how it is built is looked at."""
    build_in_place(stub_tree, REATTN_CPU_SANITIZE="address,undefined")
    (path,) = stub_tree.glob("build/*/reattn._cpu/build.ninja")
    variables = dict(line.split(" = ", 1) for line in path.read_text().splitlines() if "flags = " in line)
    for name in ("flags", "link_flags"):
        assert "-fsanitize=address,undefined" in variables[name].split()
    assert "-O1" in variables["flags"].split()
    assert "-O3" not in variables["flags"].split()


@pytest.fixture(scope="module")
def aarch64_compiler():
    for command in (["aarch64-linux-gnu-g++"], ["clang++", "--target=aarch64-linux-gnu"]):
        probe = [*command, "-std=c++17", "-fsyntax-only", "-xc++", "-"]
        if shutil.which(command[0]):
            finished = subprocess.run(probe, input="#include <thread>", capture_output=True, text=True)
            if finished.returncode == 0:
                return command
    pytest.skip("needs a cross compiler for AArch64")


@pytest.mark.parametrize("name", ["kernels", "driver", "dispatch", "parallel"])
def test_sources_compile_for_aarch64(name, aarch64_compiler):
    """All but the bindings, which need Python's headers too."""
    options = ["-std=c++17", "-fsyntax-only", "-DREATTN_ISA=portable", "-DREATTN_BUILT_PORTABLE=1"]
    source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
    finished = subprocess.run([*aarch64_compiler, *options, source], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@on_x86
@pytest.mark.skipif(not CLANG, reason="needs Clang")
@pytest.mark.parametrize("name", ["kernels", "driver", "dispatch", "parallel"])
def test_sources_compile_with_clang(name):
    """Without a warning; what GCC alone takes would leave those who have Clang without the extension."""
    sets = [f"-DREATTN_BUILT_{name.upper()}=1" for name in INSTRUCTION_SETS]
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DREATTN_ISA=portable", *sets]
    source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
    finished = subprocess.run([CLANG, *options, source], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
