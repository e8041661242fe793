"""How the CUDA extension is built, mostly with a stand-in for nvcc, and what its kernels cost for real."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

from setuptools.dist import Distribution  # noqa: E402
from setuptools.errors import OptionError  # noqa: E402
from test_packaging import COMPILER, COMPILES, ROOT, is_clutter, pytestmark, run_python, said  # noqa: E402, F401

import build_extensions  # noqa: E402
from benchmarks import compile_report  # noqa: E402

NOT_BUILT = "reattn/not_built.txt"
EXTENSION = f"reattn/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
CUDA_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "CXX", "NVCC_CCBIN")

# Notes how it is called, and makes every file that it is asked for.
STAND_IN = """#!/bin/sh
echo "$@" >>"{log}"
case "$*" in *--list-gpu-code*) printf 'sm_75\\nsm_80\\nsm_90\\n'; exit;; esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : >"$2"; fi
  shift
done
"""

HEADER = """
#include <cstdint>
struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };
"""
KERNEL = """
#include "types.cuh"
template <class T, int kWidth>
__global__ void {name}_kernel(T* out) { out[threadIdx.x % kWidth] = T{}; }
#define JOIN(name, element) name##_##element
#define NAME(name, element) JOIN(name, element)
int NAME({name}, REATTN_ELEMENT)() {
  {name}_kernel<REATTN_ELEMENT, 8><<<1, 8>>>(static_cast<REATTN_ELEMENT*>(nullptr));
  return cudaGetLastError();
}
"""
BINDINGS = """
#include <pybind11/pybind11.h>
{declarations}
PYBIND11_MODULE(_cuda, module) {
{definitions}
}
"""

# The runtime, as far as launch.h knows it: a thread may be on any of two devices, and calls are counted.
RUNTIME = """
#include <atomic>
#include <cstdint>
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct dim3 { explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {} unsigned x, y; };
inline thread_local int current = 0;
inline std::atomic<int> allowed{0}, refused{0}, launched{0};
inline cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  return *value = 1000 + device, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  if (current == 7) return ++refused, cudaErrorInvalidValue;
  return bytes == 1000 + current ? (++allowed, cudaSuccess) : cudaErrorInvalidValue;
}
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, int, cudaStream_t) {
  return ++launched, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12080, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
"""
LAUNCHES = """
#include <cstdio>
#include <thread>
#include <vector>
#include "launch.h"
using namespace reattn;
void first(Params) {}
void second(Params) {}
int main() {
  std::vector<std::thread> threads;
  for (int device : {0, 1, 0, 1})
    threads.emplace_back([device] {
      current = device;
      for (int i = 0; i < 100; ++i) {
        launch(first, "first", 1, 1, 32, 500, 0, Params{});
        launch(second, "second", 1, 1, 32, 500, 0, Params{});
      }
    });
  for (auto& thread : threads) thread.join();
  current = 7;
  for (int i = 0; i < 2; ++i) try {
      launch(first, "first", 1, 1, 32, 500, 0, Params{});
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
    }
  const auto [driver, runtime] = cuda_versions();
  std::printf("%d %d %d %d %d\\n", allowed.load(), refused.load(), launched.load(), driver, runtime);
}
"""


def found(find, *missing):
    try:
        return find()
    except missing:
        return None


NVCC = found(build_extensions.find_nvcc, build_extensions.NotBuilt)
CUOBJDUMP = found(compile_report.cuobjdump, SystemExit)
needs_ninja = pytest.mark.skipif(not COMPILES, reason="needs pybind11, ninja and GCC or Clang")
needs_nvcc = pytest.mark.skipif(
    not (COMPILES and NVCC and CUOBJDUMP), reason="needs nvcc, cuobjdump, pybind11, ninja and GCC or Clang"
)


@pytest.fixture(autouse=True)
def no_toolkit_named(monkeypatch):
    for name in CUDA_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tree(tmp_path):
    """A copy of the tree with stand-ins for the sources in csrc/cuda and none in csrc/cpu."""
    tree = shutil.copytree(ROOT, tmp_path / "a tree", ignore=is_clutter)
    shutil.rmtree(tree / "csrc")
    sources = tree / "csrc" / "cuda"
    sources.mkdir(parents=True)
    (sources / "types.cuh").write_text(HEADER)
    entries = []
    for name in build_extensions.CUDA_KERNELS:
        (sources / f"{name}.cu").write_text(KERNEL.replace("{name}", name))
        entries += [f"{name}_{element}" for element in build_extensions.CUDA_ELEMENTS]
    for name in build_extensions.CudaExtension.host:
        (sources / f"{name}.cpp").touch()
    declarations = "\n".join(f"int {entry}();" for entry in entries)
    definitions = "\n".join(f'  module.def("{entry}", {entry});' for entry in entries)
    bindings = BINDINGS.replace("{declarations}", declarations).replace("{definitions}", definitions)
    (sources / "bindings.cpp").write_text(bindings)
    return tree


@pytest.fixture
def stand_in(tmp_path):
    return make_nvcc(tmp_path / "a toolkit")


def make_nvcc(toolkit, text=STAND_IN):
    """A toolkit's folder with nothing but a stand-in for nvcc, which notes its command lines in the file `log`."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(text.format(log=toolkit / "log"))
    nvcc.chmod(0o755)
    return toolkit


def build_in_place(tree, **environment):
    environment = {"REATTN_BUILD_CPU": "0"} | {name: str(value) for name, value in environment.items()}
    return run_python("setup.py", "--quiet", "build_ext", "--inplace", cwd=tree, **environment)


def compilations(toolkit):
    """The words of each command line that compiles an object."""
    return [line.split() for line in (toolkit / "log").read_text().splitlines() if " -c " in line]


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80;90", {80: False, 90: False}),
        ("90, 80", {80: False, 90: False}),
        (" 9.0", {90: False}),
        ("7.5 8.6+PTX;12.0", {75: False, 86: True, 120: False}),
        ("100+ptx", {100: True}),
        ("9.0;90+PTX;90;", {90: True}),
    ],
)
def test_architectures(text, archs):
    assert build_extensions.parse_archs(text) == archs
    assert list(build_extensions.parse_archs(text)) == list(archs)


@pytest.mark.parametrize("text", ["9", "90a", "sm_90", "Hopper", "8.0+", "+PTX", "-90", "80:90", ";"])
def test_architectures_that_are_none(text):
    with pytest.raises(OptionError, match="REATTN_CUDA_ARCHS lists architectures as '80;90'"):
        build_extensions.parse_archs(text)


def test_architectures_too_old():
    with pytest.raises(OptionError, match="sm_70 is older than the oldest possible, sm_75"):
        build_extensions.parse_archs("7.0;90")


def test_default_architectures():
    """Each family that has machine code of its own, and PTX for all others."""
    archs = build_extensions.parse_archs(build_extensions.CUDA_ARCHS)
    assert {80, 90, 100, 120} <= archs.keys()
    assert any(archs.values())


@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "PATH", "usual folder", "packages", "nowhere"])
def test_where_nvcc_is_found(place, tmp_path):
    """Each place before those that come after it, which hold one as well."""
    places = ["CUDA_HOME", "CUDA_PATH", "PATH", "usual folder", "packages", "nowhere"]
    packages = tmp_path / "packages" / "nvidia"
    packages.mkdir(parents=True)
    (packages / "__init__.py").touch()  # or one that is installed would take this one's place
    environment = {"PATH": "/nonexistent", "PYTHONPATH": str(packages.parent)}
    for later in places[places.index(place) : -1]:
        if later == "packages":
            make_nvcc(packages / "cu9")
            make_nvcc(packages / "cu13")
        else:
            make_nvcc(tmp_path / later)
            if later != "usual folder":
                environment[later] = str(tmp_path / later / ("bin" if later == "PATH" else ""))
    code = (
        "import sys, pathlib, sysconfig, build_extensions\n"
        "build_extensions.CUDA_FOLDER = pathlib.Path(sys.argv[1])\n"
        "sysconfig.get_path = lambda name: '/nonexistent'\n"
        "print(build_extensions.find_nvcc())"
    )
    finished = run_python("-c", code, tmp_path / "usual folder", cwd=ROOT, **environment)
    if place == "nowhere":
        assert "NotBuilt: no nvcc found (CUDA_HOME names the folder of a CUDA toolkit)" in finished.stderr
    else:
        folder = packages / "cu13" if place == "packages" else tmp_path / place
        assert finished.stdout.strip() == str(folder / "bin" / "nvcc"), finished.stderr


def test_without_nvcc(tree):
    """One line says so and the install goes on, unless the extension is asked for."""
    reason = "no nvcc in /nonexistent/bin, where CUDA_HOME has it"
    (tree / EXTENSION).touch()
    finished = build_in_place(tree, CUDA_HOME="/nonexistent")
    assert finished.returncode == 0, finished.stderr
    assert said(finished.stderr, "CUDA") == [f"CUDA extension not built: {reason}"]
    assert not (tree / EXTENSION).exists()
    kept = (tree / NOT_BUILT).read_text().splitlines()
    assert kept == ["reattn._cpu: REATTN_BUILD_CPU=0", f"reattn._cuda: {reason}"]
    finished = build_in_place(tree, CUDA_HOME="/nonexistent", REATTN_BUILD_CUDA="1")
    assert finished.returncode != 0
    assert f"CUDA extension not built, though REATTN_BUILD_CUDA=1: {reason}" in finished.stderr
    assert not (tree / NOT_BUILT).exists()


def test_switched_off(tree, stand_in):
    """In place a library that is there stays, and nothing is said to be missing; a wheel gets none."""
    off = {"CUDA_HOME": stand_in, "REATTN_BUILD_CUDA": "0", "REATTN_CUDA_ARCHS": "nonsense"}
    finished = build_in_place(tree, **off)
    assert finished.returncode == 0, finished.stderr
    assert said(finished.stderr, "CUDA") == ["CUDA extension not built: REATTN_BUILD_CUDA=0"]
    (tree / EXTENSION).touch()
    finished = build_in_place(tree, **off)
    assert finished.returncode == 0, finished.stderr
    assert said(finished.stderr, "CUDA") == ["CUDA extension left as it is: REATTN_BUILD_CUDA=0"]
    assert (tree / EXTENSION).exists()
    assert (tree / NOT_BUILT).read_text() == "reattn._cpu: REATTN_BUILD_CPU=0\n"
    built = tree / "build" / "lib"
    (built / EXTENSION).parent.mkdir(parents=True)
    (built / EXTENSION).touch()
    finished = run_python(
        "setup.py", "--quiet", "build_ext", f"--build-lib={built}", cwd=tree, REATTN_BUILD_CPU="0", **off
    )
    assert finished.returncode == 0, finished.stderr
    assert not (built / EXTENSION).exists()
    assert "reattn._cuda: REATTN_BUILD_CUDA=0" in (built / NOT_BUILT).read_text()
    assert not (stand_in / "log").exists()


@needs_ninja
def test_command_lines(tree, stand_in):
    """Every kernel for every type, for the architectures asked for; the library even where the CPU's failed."""
    environment = {"CUDA_HOME": stand_in, "REATTN_BUILD_CPU": "", "REATTN_CUDA_ARCHS": "8.0+PTX, 9.0+PTX"}
    finished = build_in_place(tree, **environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert said(finished.stderr, "CUDA") == []
    assert said(finished.stderr, "CPU")[-1].startswith("CPU extension not built: ")
    assert (tree / EXTENSION).exists()
    (kept,) = (tree / NOT_BUILT).read_text().splitlines()
    assert kept.startswith("reattn._cpu: ")
    kernels = {}
    for words in compilations(stand_in):
        if "-DREATTN_ELEMENT" in " ".join(words):
            kernels[words[-1]] = [word for word in words if word.startswith(("-gencode", "-DREATTN"))]
    targets = [f"-gencode=arch=compute_80,code={code}" for code in ("sm_80", "compute_80", "sm_90")]
    assert kernels == {
        f"{kernel}_{element}.o": [*targets, f"-DREATTN_ELEMENT={element}"]
        for kernel in build_extensions.CUDA_KERNELS
        for element in build_extensions.CUDA_ELEMENTS
    }
    link = (stand_in / "log").read_text().splitlines()[-1]
    assert link.endswith(f"-o {Path(EXTENSION).name}")
    assert "-cudart static" in link
    before = compilations(stand_in)
    assert "no work to do" in build_in_place(tree, **environment).stdout
    assert compilations(stand_in) == before


def test_reasons_are_of_the_last_build(tmp_path):
    command = build_extensions.BuildExtensions(Distribution({"ext_modules": [build_extensions.CudaExtension()]}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    command.keep({"reattn._cuda": build_extensions.NotBuilt("no nvcc")})
    assert (tmp_path / NOT_BUILT).read_text() == "reattn._cuda: no nvcc\n"
    command.keep({})
    assert not (tmp_path / NOT_BUILT).exists()


@pytest.mark.parametrize(
    ("folders", "named"), [(["lib"], True), (["lib", "lib64"], False), ([], False)], ids=["pip's", "NVIDIA's", "none"]
)
def test_where_the_runtime_lies(folders, named, stand_in, tmp_path, monkeypatch):
    """pip's nvcc does not know where pip put the libraries."""
    for folder in folders:
        (stand_in / folder).mkdir()
        (stand_in / folder / "libcudart_static.a").touch()
    monkeypatch.setenv("CUDA_HOME", str(stand_in))
    command = build_extensions.CudaExtension().find_compiler(tmp_path)
    assert command == [str(stand_in / "bin" / "nvcc"), *[f"-L{stand_in / 'lib'}"] * named]
    assert (f"-L{stand_in / 'lib'}" in (stand_in / "log").read_text()) == named


@needs_nvcc
@pytest.mark.slow
def test_toolkit_from_pip_links(tmp_path, monkeypatch):
    """A toolkit with its libraries where pip's packages have them."""
    said = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    real = Path(re.search("^#\\$ TOP=(.+)$", said, re.MULTILINE)[1]).resolve()
    toolkit, folder = tmp_path / "toolkit", tmp_path / "build"
    # nvcc goes by where its own file is, links followed.
    shutil.copytree(real / "bin", toolkit / "bin")
    for name in ("include", "nvvm"):
        (toolkit / name).symlink_to(real / name)
    (toolkit / "lib").symlink_to((real / "lib64").resolve())
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    folder.mkdir()
    build_extensions.CudaExtension().find_compiler(folder)
    assert (folder / "probe_cuda").is_file()


@pytest.mark.skipif(not COMPILER, reason="needs GCC or Clang")
def test_shared_memory_is_asked_for_once(tmp_path):
    """Once a kernel and device, by whichever thread; and again where it was refused."""
    (tmp_path / "cuda_runtime.h").write_text("#pragma once\n" + RUNTIME)
    (tmp_path / "launches.cpp").write_text(LAUNCHES)
    includes = [f"-I{folder}" for folder in (tmp_path, ROOT / "csrc" / "cuda", ROOT / "csrc")]
    program = tmp_path / "launches"
    command = [COMPILER, "-std=c++17", "-pthread", *includes, tmp_path / "launches.cpp", "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    *errors, counts = subprocess.run([program], capture_output=True, text=True).stdout.splitlines()
    assert errors == ["first: cudaErrorInvalidValue (invalid argument)"] * 2
    assert counts == "4 2 800 12080 13000"


@needs_ninja
def test_architectures_unknown_to_the_compiler(tree, stand_in):
    finished = build_in_place(tree, CUDA_HOME=stand_in)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    nvcc = stand_in / "bin" / "nvcc"
    (line,) = said(finished.stderr, "CUDA")
    assert line == f"CUDA extension without sm_86, sm_89, sm_100, sm_120: '{nvcc}' does not know these architectures"
    assert "sm_90" in (stand_in / "log").read_text()
    assert "sm_100" not in (stand_in / "log").read_text()
    finished = build_in_place(tree, CUDA_HOME=stand_in, REATTN_CUDA_ARCHS="99")
    assert said(finished.stderr, "CUDA") == [f"CUDA extension not built: '{nvcc}' knows nothing of sm_99"]
    finished = build_in_place(tree, CUDA_HOME=stand_in, REATTN_CUDA_ARCHS="Hopper")
    assert finished.returncode != 0
    assert "REATTN_CUDA_ARCHS lists architectures" in finished.stderr


@needs_ninja
@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({"CXX": "c++-9"}, ["-ccbin", "c++-9"]),
        ({"CXX": "launcher c++-9 -m64"}, ["-ccbin", "c++-9", "-Xcompiler=-m64"]),
        ({"CXX": "c++-9", "NVCC_CCBIN": "c++-8"}, []),
    ],
    ids=["plain", "with options", "nvcc's own variable"],
)
def test_host_compiler(environment, options, tree, stand_in):
    build_in_place(tree, CUDA_HOME=stand_in, **environment)
    commands = compilations(stand_in)
    assert commands
    for words in commands:
        assert words[: len(options) + 1] == [*options, "-MD"]


def test_host_compiler_that_nvcc_rejects(tree, tmp_path):
    rejection = "host_config.h:1:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not!"
    toolkit = make_nvcc(tmp_path / "toolkit", f"#!/bin/sh\necho In file included\necho '{rejection}'\nexit 1\n")
    finished = build_in_place(tree, CUDA_HOME=toolkit)
    assert finished.returncode == 0, finished.stderr
    (line,) = said(finished.stderr, "CUDA")
    assert line == f"CUDA extension not built: {toolkit / 'bin' / 'nvcc'} does not work: {rejection}"


@needs_nvcc
@pytest.mark.slow
def test_build_for_real(tree):
    """It is imported where there is no driver, and holds what was asked for."""
    environment = {"REATTN_BUILD_CUDA": "1", "REATTN_CUDA_ARCHS": "80;9.0+PTX", "CUDA_HOME": Path(NVCC).parents[1]}
    finished = build_in_place(tree, **environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    library = tree / EXTENSION
    code = "import sys; sys.path.insert(0, 'reattn'); import _cuda; print(type(_cuda.forward_BFloat16()).__name__)"
    finished = run_python("-c", code, cwd=tree)
    assert finished.stdout.strip() == "int", finished.stderr
    for option, archs in ("--list-elf", {"sm_80", "sm_90"}), ("--list-ptx", {"sm_80"}):
        listed = subprocess.run([CUOBJDUMP, option, library], capture_output=True, text=True)
        assert {line.split(".")[-2] for line in listed.stdout.splitlines()} == archs
    # A header that changed is noticed, in a folder whose name holds a space.
    assert "no work to do" in build_in_place(tree, **environment).stdout
    with (tree / "csrc" / "cuda" / "types.cuh").open("a") as header:
        header.write("#error unfinished\n")
    finished = build_in_place(tree, **environment | {"REATTN_BUILD_CUDA": ""})
    assert finished.returncode == 0
    (line,) = said(finished.stderr, "CUDA")
    assert "types.cuh:5:2: error: " in line
    assert not library.exists()


@needs_nvcc
@pytest.mark.slow
def test_kernels_compile_without_faults():
    """Neither local memory nor a kernel without tensor cores, in 16 bits, for every architecture."""
    command = [sys.executable, "-m", "benchmarks.compile_report", "--backend", "cuda"]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(report.stdout)
    assert report.returncode == 0, report.stdout + report.stderr
    kernels = {*build_extensions.CUDA_KERNELS, "add_up", "finish", "grad_sums", "unfold"} - {"sums"}
    for kernel in kernels:
        for element in build_extensions.CUDA_ELEMENTS:
            assert f" {kernel}_kernel<{element}" in report.stdout
    assert "FAULT" not in report.stdout
    assert "sm_80, sm_86, sm_89, sm_90, sm_100" in report.stdout and report.stdout.endswith("; 0 faults\n")


COST = compile_report.CudaCost(90, "forward", "Half", "forward_kernel<Half, 64>", 128, 0, 0, 0, 0, 0, 1024, 4096, 64)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"stack": 8}, ["local memory"]),
        ({"spill_stores": 4}, ["local memory"]),
        ({"spills": 1}, ["local memory"]),
        ({"spills": 1, "element": "float", "hmma": 0}, []),
        ({"hmma": 0}, ["no tensor-core instruction"]),
        ({"hmma": 0, "source": "sums"}, []),
        ({"static_shared": 300000, "element": "float"}, ["shared memory over 232448"]),
        ({"dynamic_shared": 232448}, ["shared memory over 232448"]),
        ({"dynamic_shared": None}, []),
        ({"dynamic_shared": 0}, ["no plan fits"]),
    ],
)
def test_faults(change, faults):
    cost = COST._replace(**change)
    assert cost.faults == faults
    assert ("FAULT" in list(compile_report.cuda_table([cost]))[1]) == bool(faults)


@pytest.mark.skipif(not (shutil.which("cu++filt") or shutil.which("c++filt")), reason="needs c++filt")
@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN6reattn14forward_kernelINS_4HalfELi64ELb1EEEvNS_6ParamsE", "forward_kernel<Half, 64, true>"),
        ("_ZN6reattn12_GLOBAL__N_16helperILi3EEEvPf", "helper<3>"),
        ("_ZN6reattn5plainEPfi", "plain"),
    ],
)
def test_names_of_kernels(symbol, name):
    assert compile_report.readable(symbol) == name
