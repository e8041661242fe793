"""How the compiled parts of the package are built: each by a build.ninja of its own, each left out where it cannot be.

An extension is a class with a label for messages, the environment variable that switches it, the folder of its sources
and `build_ninja`, which knows its compiler. Everything else is the same for all of them.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent

# No errno and no traps: vectorised loops need neither. Contraction is asked for by name since Clang's default differs.
CPU_FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -fno-semantic-interposition -Wall -Wextra -pthread"
)
# GCC takes the undefined registers within its own intrinsics for the caller's oversight.
AVX512 = (
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
    " -Wno-maybe-uninitialized -Wno-unknown-warning-option"
)
# Ascending: where two objects hold the same inline function the linker keeps the first, which then runs everywhere.
X86_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}

# Those that take the longest first.
CUDA_KERNELS = ("backward_key", "backward_query", "forward", "sums")
# The types that each of them is compiled for, in the sources' names.
CUDA_ELEMENTS = ("Half", "BFloat16", "float")
# What REATTN_CUDA_ARCHS replaces. Machine code runs on later minor versions too: that of 8.0 on 8.6 and 8.9, of 10.0 on
# 10.3, of 12.0 on 12.1. The driver compiles the PTX for everything else.
CUDA_ARCHS = "80+PTX;86;89;90;100;120"
OLDEST_CUDA_ARCH = 75
# Shared memory a block may have, bytes, by compute capability (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# The sources tell apart no architectures from this one on: the compiler's first half runs once for all of them.
CUDA_PTX_ARCH = 80
CUDA_FOLDER = Path("/usr/local/cuda")
CUDA_FLAGS = "-O3 -std=c++17 -DNDEBUG --expt-relaxed-constexpr -Wno-deprecated-gpu-targets -Xfatbin -compress-all"
if sys.platform == "win32":
    CUDA_FLAGS += " -Xcompiler /EHsc,/MD"
    CUDA_LINK_FLAGS = "-shared -cudart static"
else:
    CUDA_FLAGS += " -Xcompiler -fPIC,-fvisibility=hidden"
    # The runtime stays this library's own, whichever other one torch has loaded.
    CUDA_LINK_FLAGS = "-shared -cudart static -Xlinker --exclude-libs,ALL"

PROBE = """
#include <cstddef>
typedef float lanes __attribute__((vector_size(32)));
static_assert(sizeof(lanes) == 32);
void twice(lanes& x) { x += x; }
"""
CUDA_PROBE = """
__global__ void twice(float* x) { *x += *x; }
int launch(float* x) {
  twice<<<1, 1>>>(x);
  return cudaGetLastError();
}
"""
# As GCC, Clang, MSVC, nvcc, its ptxas and linkers write them.
ERROR = re.compile(r"\b(?:error|fatal)(?: [A-Z]+\d+)? *: |undefined reference|cannot find -l")


class NotBuilt(Exception):
    """Why an extension is not built, in one line."""


def say(line: str) -> None:
    print(f"reattn: {line}", file=sys.stderr, flush=True)


def in_ninja(*words: str) -> str:
    """Words of a command line as the value of a variable in a build.ninja."""
    line = subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
    return line.replace("$", "$$")


def first_error(output: str) -> str | None:
    """The line of a compiler's output that says what is wrong."""
    return next((line.strip() for line in output.splitlines() if ERROR.search(line)), None)


def run_ninja(folder: Path, *options: str) -> None:
    """Brings what the folder's build.ninja describes up to date, showing what ninja prints."""
    # The module before the program: a virtual environment need not be on the path.
    if importlib.util.find_spec("ninja"):
        ninja = [sys.executable, "-m", "ninja"]
    elif found := shutil.which("ninja"):
        ninja = [found]
    else:
        raise NotBuilt("ninja is not installed")
    english = os.environ | {"LC_ALL": "C"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    error = None
    with subprocess.Popen([*ninja, *options], cwd=folder, env=english, **pipes) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            error = error or first_error(line)
    if process.returncode:
        raise NotBuilt(error or f"ninja ended with {process.returncode}")


def compiles(command: list[str], folder: Path) -> bool:
    """Whether a compiler, with flags of its own perhaps, compiles a small file as the extension's are compiled."""
    probe = folder / "probe.cpp"
    probe.write_text(PROBE)
    try:
        command = [*command, *CPU_FLAGS.split(), "-c", str(probe), "-o", str(folder / "probe.o")]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


class CpuExtension(Extension):
    """`reattn._cpu`: a source of kernels compiled once for each instruction set, and what chooses between them."""

    label = "CPU extension"
    switch = "REATTN_BUILD_CPU"
    folder = "csrc/cpu"
    baseline = ("bindings", "driver", "dispatch", "parallel")

    def __init__(self) -> None:
        super().__init__("reattn._cpu", [f"{self.folder}/{name}.cpp" for name in (*self.baseline, "kernels")])

    def build_ninja(self, folder: Path, library: str) -> str:
        """The text of the build.ninja in ``folder`` that links ``library``, for the compiler that this machine has."""
        if sys.platform == "win32":
            raise NotBuilt("it needs GCC or Clang, and has no build for Windows")
        compiler = self.find_compiler(folder)
        try:
            import pybind11
        except ImportError:
            raise NotBuilt("pybind11 is not installed") from None
        sets = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"portable": ""}
        built = [name for name, flags in sets.items() if compiles([*compiler, *flags.split()], folder)]
        if len(built) < len(sets):
            missing = ", ".join(name for name in sets if name not in built)
            say(f"{self.label} without {missing}: {shlex.join(compiler)} does not know these instructions")

        includes = (pybind11.get_include(), sysconfig.get_path("include"))
        flags = [*CPU_FLAGS.split(), *(f"-isystem{include}" for include in includes)]
        link_flags = shlex.split("-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared")
        if sanitizers := os.environ.get("REATTN_CPU_SANITIZE"):
            flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
            flags.append(f"-fsanitize={sanitizers}")
            link_flags.append(f"-fsanitize={sanitizers}")
        else:
            flags += ["-O3", "-DNDEBUG"]
        macros = [f"-DREATTN_BUILT_{name.upper()}=1" for name in built]

        lines = [
            f"source = {str(ROOT / self.folder).replace('$', '$$')}",
            f"compiler = {in_ninja(*compiler)}",
            f"flags = {in_ninja(*flags, *shlex.split(os.environ.get('CXXFLAGS', '')))}",
            f"link_flags = {in_ninja(*link_flags, '-pthread', *shlex.split(os.environ.get('LDFLAGS', '')))}",
            "rule compile",
            "  command = $compiler -MMD -MF $out.d $own_flags $flags -c $in -o $out",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler $in $link_flags -o $out",
            "  description = $out",
        ]
        objects = []
        sources = [(name, name, macros) for name in self.baseline]
        sources += [("kernels", f"kernels_{name}", [f"-DREATTN_ISA={name}", *sets[name].split()]) for name in built]
        for source, name, own_flags in sources:
            lines += [f"build {name}.o: compile $source/{source}.cpp", f"  own_flags = {in_ninja(*own_flags)}"]
            objects.append(f"{name}.o")
        lines += [f"build {library}: link {' '.join(objects)}", ""]
        return "\n".join(lines)

    def find_compiler(self, folder: Path) -> list[str]:
        """The command of CXX or, where that is not set, the first of the usual ones that works."""
        named = os.environ.get("CXX")
        candidates = [named] if named else [sysconfig.get_config_var("CXX") or "c++", "g++", "clang++"]
        for candidate in dict.fromkeys(candidates):
            if compiles(shlex.split(candidate), folder):
                return shlex.split(candidate)
        raise NotBuilt(f"no working GCC or Clang (tried {', '.join(dict.fromkeys(candidates))}; CXX names another)")


def parse_archs(text: str) -> dict[int, bool]:
    """Compute capabilities as REATTN_CUDA_ARCHS lists them, 90 for 9.0, and whether PTX of each is embedded too."""
    archs: dict[int, bool] = {}
    for word in re.split(r"[;,\s]+", text.strip(" \t\n;,")):
        named = re.fullmatch(r"(?:(\d{1,2})\.(\d)|(\d{2,3}))(\+ptx)?", word, re.IGNORECASE)
        if not named:
            raise OptionError(f"REATTN_CUDA_ARCHS lists architectures as '80;90' or '8.0,9.0+PTX' do, not {text!r}")
        arch = int(named[3] or named[1] + named[2])
        if arch < OLDEST_CUDA_ARCH:
            raise OptionError(f"REATTN_CUDA_ARCHS: sm_{arch} is older than the oldest possible, sm_{OLDEST_CUDA_ARCH}")
        archs[arch] = archs.get(arch, False) or bool(named[4])
    return dict(sorted(archs.items()))


def find_nvcc() -> str:
    """The CUDA compiler of CUDA_HOME, or else the first in the usual places, packages installed by pip the last."""
    program = "nvcc.exe" if sys.platform == "win32" else "nvcc"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if found := shutil.which(program, path=str(Path(home, "bin"))):
                return found
            raise NotBuilt(f"no nvcc in {Path(home, 'bin')}, where {variable} has it")
    if found := shutil.which(program) or shutil.which(program, path=str(CUDA_FOLDER / "bin")):
        return found
    # pip hides what is installed from an isolated build's imports; a compiler serves it all the same.
    spec = importlib.util.find_spec("nvidia")
    folders = [*(spec.submodule_search_locations or () if spec else ()), Path(sysconfig.get_path("purelib"), "nvidia")]
    for folder in folders:
        # Whole only from CUDA 13 on: the packages for CUDA 12 hold no nvcc.
        toolkits = [toolkit for toolkit in Path(folder).glob("cu*") if re.fullmatch(r"cu\d+", toolkit.name)]
        for toolkit in sorted(toolkits, key=lambda toolkit: int(toolkit.name[2:]), reverse=True):
            if found := shutil.which(program, path=str(toolkit / "bin")):
                return found
    raise NotBuilt("no nvcc found (CUDA_HOME names the folder of a CUDA toolkit)")


def run_nvcc(nvcc: list[str], *arguments: str) -> str:
    """What the compiler prints."""
    english = os.environ | {"LC_ALL": "C"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        finished = subprocess.run([*nvcc, *arguments], env=english, **pipes)
    except OSError as error:
        raise NotBuilt(f"{nvcc[0]} does not run ({error.strerror})") from None
    if finished.returncode:
        reason = first_error(finished.stdout) or f"it ended with {finished.returncode}"
        raise NotBuilt(f"{shlex.join(nvcc)} does not work: {reason}")
    return finished.stdout


def gencode(arch: int, ptx: bool = False) -> list[str]:
    """The flags that ask for machine code of a compute capability, and for the PTX that it is made from."""
    made_from = min(arch, CUDA_PTX_ARCH)
    codes = [f"sm_{arch}", *([f"compute_{made_from}"] if ptx else [])]
    return [f"-gencode=arch=compute_{made_from},code={code}" for code in codes]


def known_archs(nvcc: list[str]) -> list[int]:
    """The compute capabilities that a CUDA compiler has machine code for."""
    return [int(arch) for arch in re.findall(r"^sm_(\d+)\s*$", run_nvcc(nvcc, "--list-gpu-code"), re.MULTILINE)]


class CudaExtension(Extension):
    """`reattn._cuda`: each source of kernels compiled once for each type, for several architectures at a time."""

    label = "CUDA extension"
    switch = "REATTN_BUILD_CUDA"
    folder = "csrc/cuda"
    host = ("bindings", "plan")

    def __init__(self) -> None:
        sources = [*(f"{name}.cpp" for name in self.host), *(f"{name}.cu" for name in CUDA_KERNELS)]
        super().__init__("reattn._cuda", [f"{self.folder}/{source}" for source in sources])

    def build_ninja(self, folder: Path, library: str) -> str:
        """The text of the build.ninja in ``folder`` that links ``library``, for the compiler that this machine has."""
        archs = parse_archs(os.environ.get("REATTN_CUDA_ARCHS", "").strip() or CUDA_ARCHS)
        nvcc = self.find_compiler(folder)
        try:
            import pybind11
        except ImportError:
            raise NotBuilt("pybind11 is not installed") from None
        known = known_archs(nvcc)
        missing = ", ".join(f"sm_{arch}" for arch in archs if arch not in known)
        archs = {arch: ptx for arch, ptx in archs.items() if arch in known}
        if not archs:
            raise NotBuilt(f"{shlex.join(nvcc)} knows nothing of {missing}")
        if missing:
            say(f"{self.label} without {missing}: {shlex.join(nvcc)} does not know these architectures")

        targets = dict.fromkeys(flag for arch, ptx in archs.items() for flag in gencode(arch, ptx))
        headers = [f"-isystem={path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        link_flags = CUDA_LINK_FLAGS.split()
        if sys.platform == "win32":
            link_flags.append(f"-L{Path(sys.base_prefix, 'libs')}")

        lines = [
            *self.rules(nvcc, "$nvcc -MD -MF $out.d $own_flags $flags -c $in -o $out"),
            f"targets = {in_ninja(*targets)}",
            f"link_flags = {in_ninja(*link_flags)}",
            "rule link",
            "  command = $nvcc $targets $in $link_flags -o $out",
            "  description = $out",
        ]
        objects = []
        for name in self.host:
            objects.append(f"{name}.o")
            lines += [f"build {objects[-1]}: compile $source/{name}.cpp", f"  own_flags = {in_ninja(*headers)}"]
        for kernel, element in itertools.product(CUDA_KERNELS, CUDA_ELEMENTS):
            objects.append(f"{kernel}_{element}.o")
            lines += [
                f"build {objects[-1]}: compile $source/{kernel}.cu",
                f"  own_flags = $targets -DREATTN_ELEMENT={element}",
            ]
        lines += [f"build {library}: link {' '.join(objects)}", ""]
        return "\n".join(lines)

    def rules(self, nvcc: list[str], command: str) -> list[str]:
        """The head of a build.ninja with one rule, which compiles."""
        return [
            f"source = {str(ROOT / self.folder).replace('$', '$$')}",
            f"nvcc = {in_ninja(*nvcc)}",
            f"flags = {in_ninja(*CUDA_FLAGS.split())}",
            "rule compile",
            f"  command = {command}",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def find_compiler(self, folder: Path) -> list[str]:
        """The command of nvcc with CXX as its C++ compiler, tried on a small file; NVCC_CCBIN names another to nvcc."""
        nvcc = [find_nvcc()]
        if (named := os.environ.get("CXX")) and not os.environ.get("NVCC_CCBIN") and sys.platform != "win32":
            words = shlex.split(named)
            # The last of several programs: those before it, as ccache, start it.
            nvcc += ["-ccbin", [word for word in words if not word.startswith("-")][-1]]
            nvcc += [f"-Xcompiler={word}" for word in words if word.startswith("-")]
        # pip's nvcc looks for libraries in lib64, and pip's packages have them in lib.
        toolkit = Path(nvcc[0]).resolve().parents[1]
        if not (toolkit / "lib64").exists() and (toolkit / "lib" / "libcudart_static.a").is_file():
            nvcc.append(f"-L{toolkit / 'lib'}")
        probe = folder / "probe.cu"
        probe.write_text(CUDA_PROBE)
        run_nvcc(nvcc, *CUDA_FLAGS.split(), *CUDA_LINK_FLAGS.split(), str(probe), "-o", str(folder / "probe_cuda"))
        return nvcc


class BuildExtensions(build_ext):
    """Builds the extensions that this machine can build; the package works without the others."""

    def run(self) -> None:
        built, left_out = [], {}
        self.keep({})  # those of an earlier build, should this one fail
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name))
            wish = os.environ.get(extension.switch, "")
            if wish not in ("", "0", "1"):
                raise OptionError(f"{extension.switch} is 0, 1 or not set, not {wish!r}")
            if wish == "0" and self.inplace and library.exists():
                say(f"{extension.label} left as it is: {extension.switch}=0")
                continue
            library.unlink(missing_ok=True)  # one of an earlier build must not pass for this one's
            try:
                if wish == "0":
                    raise NotBuilt(f"{extension.switch}=0")
                self.build(extension, library)
                built.append(extension)
            except NotBuilt as reason:
                if wish == "1":
                    raise CompileError(f"{extension.label} not built, though {extension.switch}=1: {reason}") from None
                say(f"{extension.label} not built: {reason}")
                left_out[extension.name] = reason
        self.keep(left_out)
        self.extensions = self.distribution.ext_modules = built
        # The command that packs a wheel decided before the build whether its contents depend on the machine.
        if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
            wheel.root_is_pure = not built

    def keep(self, reasons: dict[str, NotBuilt]) -> None:
        """Leaves in the package why extensions were not built: pip hides what a build says."""
        path = Path(self.get_ext_fullpath(self.extensions[0].name)).with_name("not_built.txt")
        path.unlink(missing_ok=True)
        if reasons:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{name}: {reason}\n" for name, reason in reasons.items()]
            path.write_text("".join(lines), encoding="utf-8")

    def build(self, extension: CpuExtension | CudaExtension, library: Path) -> None:
        """Writes the extension's build.ninja, runs it, and puts the result where it belongs."""
        folder = Path(self.build_temp, extension.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(extension.build_ninja(folder, library.name))
        run_ninja(folder)
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / library.name, library)
