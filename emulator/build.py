"""``python emulator/build.py``: compiles the emulator into the folder of its sources."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pybind11

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
import build_extensions as build  # noqa: E402

OBJECTS = FOLDER.parent / "out" / "emulator"
# What rounds once on the device shall round once here. It runs where it is compiled: all of this CPU may be used.
FLAGS = (
    "-std=c++17 -O3 -march=native -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
WARNINGS = "-Wall -Wextra"


def build_ninja(folder: Path, library: str) -> str:
    """The text of the build.ninja in ``folder`` that links ``library``."""
    root = str(FOLDER.parent).replace("$", "$$")
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    names = ("program", "machine", "bindings")
    return "\n".join(
        [
            f"compiler = {build.in_ninja(*build.CpuExtension().find_compiler(folder))}",
            f"flags = {build.in_ninja(*FLAGS.split(), *WARNINGS.split(), *includes)}",
            "rule compile",
            "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler -shared $in -o $out",
            "  description = $out",
            *(f"build {name}.o: compile {root}/emulator/{name}.cpp" for name in names),
            f"build {library}: link {' '.join(f'{name}.o' for name in names)}",
            "",
        ]
    )


if __name__ == "__main__":
    OBJECTS.mkdir(parents=True, exist_ok=True)
    library = f"_machine{sysconfig.get_config_var('EXT_SUFFIX')}"
    (OBJECTS / "build.ninja").write_text(build_ninja(OBJECTS, library))
    build.run_ninja(OBJECTS, "--quiet")
    (FOLDER / library).unlink(missing_ok=True)  # a process that has it loaded keeps it
    shutil.copy2(OBJECTS / library, FOLDER / library)
