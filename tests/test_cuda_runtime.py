"""How CUDA kernels are compiled, kept on disk, loaded and launched; without a GPU, by a driver that takes notes."""

import ctypes
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import launch_cost
from reattn.backends import cuda_compile, cuda_driver, cuda_plan
from reattn.backends.cuda_compile import Code, Kernel

nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

ROOT = Path(__file__).parents[1]
# What compiles soonest, for a shape.
SHAPE = (("REATTN_ELEMENT", "float"), ("REATTN_HEADS", 2), ("REATTN_HEAD_DIM", 8))
KERNEL = Kernel("sums", "reattn::add_up", SHAPE)
TARGET = "compute_80"
posix = pytest.mark.skipif(sys.platform == "win32", reason="about permissions of POSIX")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder, not there yet."""
    monkeypatch.setenv("REATTN_CACHE_DIR", str(tmp_path / "a" / "cache"))
    cuda_compile._log_uncached.cache_clear()
    return tmp_path / "a" / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """What is compiled: the kernels of a source together."""
    made = []
    compile_ = cuda_compile._compile
    monkeypatch.setattr(
        cuda_compile, "_compile", lambda kernels, target: made.append(kernels) or compile_(kernels, target)
    )
    return made


def files(cache):
    return sorted(path for path in cache.iterdir())


def test_a_kernel_is_compiled_once(cache, compilations, caplog):
    caplog.set_level(logging.INFO, "reattn")
    others = [KERNEL, Kernel("sums", "reattn::unfold", SHAPE), KERNEL]
    first = cuda_compile.compiled(others, TARGET)
    assert compilations == [others[:2]] and first[0] == first[2] != first[1]
    assert first[0].entry.encode() in first[0].image
    assert caplog.messages == [f"compiling CUDA kernels for {TARGET}, 2 of them, once: they are kept in {cache}"]
    caplog.clear()
    assert cuda_compile.compiled(others, TARGET) == first and len(compilations) == 1
    assert not caplog.messages and len(files(cache)) == 2


@posix
def test_what_is_kept_is_the_users_alone(cache):
    cuda_compile.compiled([KERNEL], TARGET)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert files(cache)[0].stat().st_mode & 0o777 == 0o600


@pytest.fixture
def forget(monkeypatch):
    """What is remembered of the sources."""

    def call():
        cuda_compile.sources.cache_clear()
        cuda_compile._fingerprint.cache_clear()

    yield call
    monkeypatch.undo()
    call()


CHANGES = ("cuda/sums.cu", "cuda/shape.cuh", "fold.h", "options", "NVRTC", "macro", "target", "headers")


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_compiled_anew(change, cache, compilations, forget, tmp_path, monkeypatch):
    cuda_compile.compiled([KERNEL], TARGET)
    kernel, target = KERNEL, TARGET
    if change == "options":
        monkeypatch.setattr(cuda_compile, "OPTIONS", (*cuda_compile.OPTIONS, "-DOTHER"))
    elif change == "NVRTC":
        monkeypatch.setattr(cuda_compile, "version", lambda: (99, 0))
    elif change == "headers":
        monkeypatch.setitem(cuda_compile.STANDARD_HEADERS, "cstring", "// another")
    elif change == "macro":
        kernel = KERNEL._replace(constants=(*SHAPE[::2], ("REATTN_HEADS", 12)))
    elif change == "target":
        target = "sm_80"
    else:
        shutil.copytree(cuda_compile.folder(), tmp_path / "csrc")
        with (tmp_path / "csrc" / change).open("a") as file:
            file.write("// changed\n")
        monkeypatch.setattr(cuda_compile, "folder", lambda: tmp_path / "csrc")
    forget()
    (code,) = cuda_compile.compiled([kernel], target)
    assert len(compilations) == 2 and len(files(cache)) == 2
    assert code.image.startswith(b"\x7fELF") == (change == "target")


def damage_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_other_kernel(path):
    cuda_compile.compiled([Kernel("sums", "reattn::unfold", SHAPE)], TARGET)
    (other,) = {*files(path.parent)} - {path}
    os.replace(other, path)


DAMAGES = {
    "a bit": damage_flipped,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "beginning alone": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "another kernel": damage_other_kernel,
    "writable": lambda path: path.chmod(0o620),
    "link": lambda path: path.symlink_to(path.rename(path.with_name("elsewhere"))),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@posix
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_left_is_not_run(damage, cache, compilations, caplog):
    """It is compiled again, and takes the other's place if that is a file."""
    cuda_compile.compiled([KERNEL], TARGET)
    (path,) = files(cache)
    DAMAGES[damage](path)
    compilations.clear()
    again = cuda_compile.compiled([KERNEL], TARGET)
    assert len(compilations) == 1 and "add_up" in again[0].entry and again[0].entry.encode() in again[0].image
    assert cuda_compile.compiled([KERNEL], TARGET)[0].entry == again[0].entry
    replaced = damage != "folder"
    assert len(compilations) == (1 if replaced else 2)
    assert bool(caplog.messages) != replaced
    assert not list(cache.glob("tmp*"))


def no_home(*_):
    raise RuntimeError("Could not determine home directory.")


def use_writable_by(mode):
    def use(cache, monkeypatch):
        cache.mkdir(parents=True)
        cache.chmod(mode)
        return f"{cache} may be written by other users"

    return use


def use_other_user(cache, monkeypatch):
    cache.mkdir(parents=True)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    return f"{cache} belongs to another user"


def use_file(cache, monkeypatch):
    cache.parent.mkdir()
    cache.touch()
    return "File exists"


def use_read_only(cache, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cuda_compile.tempfile, "NamedTemporaryFile", refuse)
    return "Permission denied"


def use_no_home(cache, monkeypatch):
    for name in ("REATTN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    return "Could not determine home directory."


FOLDERS = {
    "others may write": use_writable_by(0o777),
    "the group may write": use_writable_by(0o770),
    "another user's": use_other_user,
    "a file": use_file,
    "read-only": use_read_only,
    "no home": use_no_home,
}


@posix
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_cannot_be_used(kind, cache, compilations, caplog, monkeypatch):
    """One line says why, whatever is compiled after it; what lies there is not read, and all works."""
    reason = FOLDERS[kind](cache, monkeypatch)
    if cache.is_dir():
        key = cuda_compile._key(KERNEL, TARGET)
        code = Code("planted", b"planted")
        (cache / key).write_bytes(cuda_compile._digest(key, b"planted\0planted") + b"planted\0planted")
        assert cuda_compile._read(cache, key) == (code if kind != "another user's" else None)
    for _ in range(2):
        (code,) = cuda_compile.compiled([KERNEL], TARGET)
        assert "add_up" in code.entry
    assert len(compilations) == 2
    (line,) = caplog.messages
    assert re.fullmatch(rf"compiled CUDA kernels are not kept on disk: .*{re.escape(reason)}.*", line)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"REATTN_CACHE_DIR": "/named", "XDG_CACHE_HOME": "/xdg"}, "/named"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/reattn"),
        ({"HOME": "/home/me"}, "/home/me/.cache/reattn"),
    ],
)
@posix
def test_where_it_is(environment, expected, monkeypatch):
    for name in ("REATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cuda_compile.cache_path() == Path(expected)


def test_where_it_is_on_windows(monkeypatch):
    monkeypatch.delenv("REATTN_CACHE_DIR")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    monkeypatch.setattr(sys, "platform", "win32")
    assert cuda_compile.cache_path() == Path("/local/reattn")


def test_processes_that_compile_at_once(cache):
    """Both have the kernel, and one file is left, whole."""
    script = (
        "import sys\n"
        "from reattn.backends import cuda_compile\n"
        "print(flush=True), sys.stdin.readline()\n"
        f"(code,) = cuda_compile.compiled([cuda_compile.Kernel{tuple(KERNEL)!r}], {TARGET!r})\n"
        "print(code.entry)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["\n", "\n"]
    said = [process.communicate("\n", timeout=120)[0] for process in processes]
    (code,) = cuda_compile.compiled([KERNEL], TARGET)
    assert said == [f"{code.entry}\n"] * 2 and len(files(cache)) == 1


def test_threads_load_a_kernel_once(compilations, cache, monkeypatch):
    loaded = []

    class Driver:
        launch = None

        def target(self, device):
            return TARGET

        def load(self, device, kernel, code):
            loaded.append(kernel)
            return object()

    before = cuda_driver.use(Driver())
    try:
        found = []
        threads = [threading.Thread(target=lambda: found.append(cuda_driver.kernels((KERNEL,), 0))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert loaded == [KERNEL] and compilations == [[KERNEL]] and len(set(found)) == 1
        # Another device has its own.
        assert cuda_driver.kernels((KERNEL,), 1) not in found and len(loaded) == 2 and len(compilations) == 1
    finally:
        cuda_driver.use(before)


def test_errors_of_a_source():
    text = '#include <cstdint>\nextern "C" __global__ void wrong(float* out) { *out = missing; }\n'
    with pytest.raises(
        RuntimeError, match=r'wrong of my\.cu: .*COMPILATION\n.*my\.cu\(2\): error: identifier "missing"'
    ):
        cuda_compile.compile_text(text, "wrong", "sm_80", "my.cu")


def test_constants_are_macros():
    text = "namespace reattn { __global__ void f(int* out) { *out = REATTN_HEADS; } }\n"
    code = cuda_compile.compile_text(text, "reattn::f", TARGET, constants=(("REATTN_HEADS", 4711),))
    assert b"4711" in code.image and code.entry in code.image.decode()


@pytest.mark.parametrize(
    ("arch", "expected"),
    [(75, "sm_75"), (90, "sm_90"), (95, "compute_90"), (121, "sm_121"), (990, "compute_121"), (70, None)],
)
def test_targets(arch, expected, monkeypatch):
    """A card that NVRTC does not know takes what the driver makes of the newest PTX that is older."""
    monkeypatch.setattr(cuda_compile, "known_archs", lambda: (75, 80, 90, 100, 120, 121))
    assert cuda_compile.target(arch) == expected


def test_newest_ptx():
    """As cards that came after NVRTC have it compiled."""
    newest = cuda_compile.known_archs()[-1]
    assert cuda_compile.target(newest + 100) == f"compute_{newest}"
    code = cuda_compile.compile_text("__global__ void f() {}", "f", f"compute_{newest}")
    assert f".target sm_{newest}" in code.image.decode()


def test_structures_are_those_of_the_sources():
    """Sizes, and where each field lies."""
    lines = ['#include "params.h"', "#include <cstdint>", "using namespace reattn;"]
    structures = (cuda_plan.Tensor, cuda_plan.Parameters, cuda_plan.Fold, cuda_plan.Params)
    for structure in structures:
        name = structure.__name__
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for field, type_ in structure._fields_:
            # What NVRTC has in the place of offsetof.
            offset = f"__INTADDR__(&(({name}*)0)->{field})"
            lines.append(f"static_assert({offset} == {getattr(structure, field).offset});")
            lines.append(f"static_assert(sizeof({name}::{field}) == {ctypes.sizeof(type_)});")
    text = "\n".join([*lines, "__global__ void f() {}"])
    cuda_compile.compile_text(text, "f", TARGET)
    # And they would tell.
    wrong = text.replace("->splits) == ", "->splits) == 4 + ")
    with pytest.raises(RuntimeError, match="static assertion failed"):
        cuda_compile.compile_text(wrong, "f", TARGET)


def test_params_of_another_size_do_not_compile(monkeypatch):
    monkeypatch.setattr(cuda_compile, "OPTIONS", (*cuda_compile.OPTIONS[:-1], "-DREATTN_PARAMS_BYTES=8"))
    with pytest.raises(RuntimeError, match="cuda_plan.py has them otherwise"):
        cuda_compile._compile([KERNEL], TARGET)


# The driver


@pytest.fixture(scope="session")
def notes(tmp_path_factory):
    """Runs a script by tests/cuda/driver.cpp in the driver's place; returns what it prints and the calls."""
    if torch.cuda.is_available():
        pytest.skip("has a driver")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and GCC or Clang")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", ROOT / "tests" / "cuda" / "driver.cpp"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1"], check=True)

    def run(script, fake=""):
        log = folder / "log"
        log.unlink(missing_ok=True)
        told = {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_LOG": str(log), "FAKE_CUDA": fake}
        command = [sys.executable, "-c", PREPARED + script]
        finished = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout, log.read_text().splitlines() if log.exists() else []

    return run


PREPARED = """
import json, os, sys, types
import torch
from reattn.backends import cuda_compile, cuda_driver
from reattn.backends.cuda_compile import Kernel
from reattn.backends.cuda_plan import Params
capability = [9, 0]
torch.cuda.get_device_capability = lambda device: tuple(capability)
torch.cuda.current_device = lambda: 1
capturing = []
torch.cuda.is_current_stream_capturing = lambda: bool(capturing)
kernel = Kernel("sums", "reattn::add_up", (("REATTN_ELEMENT", "float"), ("REATTN_HEADS", 2), ("REATTN_HEAD_DIM", 8)))
def raised(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
"""

# What the driver says, and the reason that is given.
DRIVERS = {
    "": [],
    "cuDriverGetVersion:12080": [
        "needs an NVIDIA driver for CUDA {}, which NVRTC compiles for, or newer; the one installed is for CUDA 12.8"
    ],
    "cuDriverGetVersion:13000 cuDeviceGetCount:0": ["no CUDA device"],
    "cuInit=100": ["no CUDA device: CUDA_ERROR_NO_DEVICE (as the driver says)"],
    "cuInit=2": ["no CUDA device: CUDA_ERROR_OUT_OF_MEMORY (as the driver says)"],
}


def test_reasons_of_the_driver(notes):
    script = f"""
found = []
for fake in {[*DRIVERS]!r}:
    os.environ["FAKE_CUDA"] = fake
    found.append(cuda_driver.find_faults(0))
os.environ["FAKE_CUDA"] = ""
capability[:] = 7, 0
found.append(cuda_driver.find_faults(0))
cuda_compile.known_archs = lambda: (80, 90)
capability[:] = 7, 5
found.append(cuda_driver.find_faults(0))
print(json.dumps([found, cuda_compile.version()]))
"""
    found, (major, minor) = json.loads(notes(script)[0])
    older = "needs compute capability {} or higher, which NVRTC " + f"{major}.{minor}" + " compiles for, got {}"
    expected = [[reason.format(major) for reason in reasons] for reasons in DRIVERS.values()]
    assert found == [*expected, [older.format("7.5", "7.0")], [older.format("8.0", "7.5")]]


def test_what_a_launch_calls(notes):
    """The kernel is loaded once, as machine code, may have all the shared memory, and is given parameters and place."""
    script = """
(loaded,) = cuda_driver.kernels((kernel,), 1)
assert cuda_driver.kernels((kernel,), 1) == (loaded,)
params = Params(); params.query.data = 4711
for stream in (0, 5):
    cuda_driver.launch(loaded, (7, 2), 256, 4096, stream, params, ())
print(cuda_driver.describe(1))
"""
    printed, calls = notes(script)
    entry = cuda_compile.compiled([KERNEL], "sm_90")[0].entry
    assert calls == [
        "cuDeviceGet 1",
        "cuDevicePrimaryCtxRetain 1",
        "cuCtxSetCurrent 0xc1",
        "cuModuleLoadData CUBIN",
        f"cuModuleGetFunction 0x10 {entry}",
        "cuDeviceGet 1",
        "cuDeviceGetAttribute 97 1",
        "cuDeviceGetAttribute 16 1",
        "cuFuncSetAttribute 0xf0 8 232448",
        "cuLaunchKernel 0xf0 7,2,1 256 4096 (nil) 4711",
        "cuLaunchKernel 0xf0 7,2,1 256 4096 0x5 4711",
        *calls[-3:],
    ]
    assert printed == "(232448, 132)\n"


def test_a_newer_card_loads_ptx(notes):
    _, calls = notes("capability[:] = 99, 0\ncuda_driver.kernels((kernel,), 0)")
    assert "cuModuleLoadData PTX" in calls


def test_a_thread_without_a_context_takes_that_of_its_device(notes):
    """Where torch's guard has nothing to change, nothing has made one current."""
    script = """
loaded = cuda_driver.Loaded(kernel, 0xF0)
from cuda.bindings import driver
cuda_driver.launch(loaded._replace(function=driver.CUfunction(0xF0)), (1, 1), 32, 0, 0, Params(), ())
"""
    launch = "cuLaunchKernel 0xf0 1,1,1 32 0 (nil) 0"
    around = ["cuDeviceGet 1", "cuDevicePrimaryCtxRetain 1", "cuCtxSetCurrent 0xc1"]
    assert notes(script, "cuLaunchKernel!201")[1] == [launch, *around, launch]


def test_errors_name_the_kernel(notes):
    script = """
from cuda.bindings import driver
found = []
loaded = cuda_driver.Loaded(kernel, driver.CUfunction(0xF0))
os.environ["FAKE_CUDA"] = "cuLaunchKernel=1"
found.append(raised(cuda_driver.launch, loaded, (1, 1), 32, 0, 0, Params(), ()))
os.environ["FAKE_CUDA"] = "cuModuleLoadData=209"
found.append(raised(cuda_driver.kernels, (kernel,), 0))
capturing.append(True)
found.append(raised(cuda_driver.kernels, (kernel,), 0))
capturing.clear()
os.environ["FAKE_CUDA"] = ""
assert raised(cuda_driver.kernels, (kernel,), 0) is None
capturing.append(True)
assert raised(cuda_driver.kernels, (kernel,), 0) is None
print(json.dumps(found))
"""
    assert json.loads(notes(script)[0]) == [
        "reattn::add_up: CUDA_ERROR_INVALID_VALUE (invalid argument)",
        "reattn::add_up: CUDA_ERROR_NO_BINARY_FOR_GPU (as the driver says)",
        "the CUDA backend cannot load a kernel while a CUDA graph is captured: a call like this one, gradients"
        " included, has to come before",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_import_touches_nothing_of_cuda():
    """Without a driver the reason says so; without the packages, what brings them."""
    script = """
import sys
import torch
before = {*sys.modules}  # torch imports cuda.bindings itself
import reattn
assert not [name for name in {*sys.modules} - before if name.startswith("cuda")]
assert "cuda.bindings.nvrtc" not in sys.modules
from reattn.backends import cuda, cuda_compile, cuda_driver
device = torch.device("cuda")
print(*cuda.unavailable(device), sep="; ")
cuda._find_card_faults.cache_clear()
cuda_compile.sources.cache_clear()
sys.modules["reattn.csrc"] = None
print(*cuda.unavailable(device), sep="; ")
cuda._find_card_faults.cache_clear()
sys.modules["cuda.bindings.nvrtc"] = sys.modules["cuda.bindings"].nvrtc = None
print(*cuda.unavailable(device), sep="; ")
cuda._find_card_faults.cache_clear()
cuda_driver._bindings.cache_clear()
sys.modules["cuda.bindings"] = None
print(*cuda.unavailable(device), sep="; ")
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    driver, sources, library, bindings = finished.stdout.splitlines()
    assert re.fullmatch(r"no CUDA device: no NVIDIA driver can be loaded \(.+\)", driver)
    assert re.fullmatch(r"needs the kernels' sources, reattn\.csrc, which are not installed \(.+\)", sources)
    brings = r": pip install 'reattn\[cuda\]' brings it"
    assert re.fullmatch(rf"needs NVRTC, pip's nvidia-cuda-nvrtc, which cannot be loaded \(.+\){brings}", library)
    assert re.fullmatch(rf"needs pip's cuda-bindings, which cannot be imported \(.+\){brings}", bindings)


# Calls of functions in a direction at most, some 0.2 us each, and launches: see benchmarks/launch_cost.py.
COSTS = {
    "layer": {"forward": (64, 1), "backward": (100, 3), "operator": (185, 1), "gradients": (440, 4)},
    "batch": {"forward": (88, 2), "backward": (126, 5), "operator": (235, 2), "gradients": (510, 7)},
}


@pytest.mark.parametrize("norm", COSTS)
def test_what_a_call_costs_the_host(norm):
    """How many functions the backend calls is the same on every machine, unlike how long they take."""
    with launch_cost.no_driver() as driver:
        directions = launch_cost.step(norm)
        for name, (most, launches) in COSTS[norm].items():
            function = directions[name]
            function()
            driver.launches = 0
            assert most / 2 < launch_cost.count_calls(function) <= most
            assert driver.launches == launches
