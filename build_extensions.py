"""How the CPU extension is built: by a build.ninja, and left out where it cannot be."""

from __future__ import annotations

import importlib.util
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
    " -Wno-maybe-uninitialized -Wno-uninitialized -Wno-unknown-warning-option"
)
# Ascending: where two objects hold the same inline function the linker keeps the first, which then runs everywhere.
X86_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}

PROBE = """
#include <cstddef>
typedef float lanes __attribute__((vector_size(32)));
static_assert(sizeof(lanes) == 32);
void twice(lanes& x) { x += x; }
"""
# As GCC, Clang and linkers write them.
ERROR = re.compile(r"\b(?:error|fatal)(?: [A-Z]+\d+)? *: |undefined reference|cannot find -l")


class NotBuilt(Exception):
    """Why an extension is not built, in one line."""


def say(line: str) -> None:
    print(f"reattn: {line}", file=sys.stderr, flush=True)


def in_ninja(*words: str) -> str:
    """Words of a command line as the value of a variable in a build.ninja."""
    return shlex.join(words).replace("$", "$$")


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
            flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
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

    def build(self, extension: CpuExtension, library: Path) -> None:
        """Writes the extension's build.ninja, runs it, and puts the result where it belongs."""
        folder = Path(self.build_temp, extension.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(extension.build_ninja(folder, library.name))
        run_ninja(folder)
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / library.name, library)
