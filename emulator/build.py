"""``python emulator/build.py``: compiles the emulator, and the host part of csrc/cuda whose launches it executes, into
the folder of its sources."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pybind11

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
import build_extensions as build  # noqa: E402

OBJECTS = FOLDER.parent / "out" / "emulator"
# What rounds once on the device shall round once here. It runs where it is compiled, so that it may use all of this CPU.
FLAGS = (
    "-std=c++17 -O3 -march=native -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
WARNINGS = "-Wall -Wextra"
CUDA_FLAGS = "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -DREATTN_EMULATED"


def build_ninja(folder: Path, libraries: dict[str, str]) -> str:
    """The text of the build.ninja in ``folder`` that links both modules to the files named."""
    root = str(FOLDER.parent).replace("$", "$$")
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    machine = [f"emulator/{name}" for name in ("program", "machine", "bindings")]
    host = ["emulator/cuda_host", *(f"csrc/cuda/{name}" for name in build.CudaExtension.host)]
    folders = [f"-I{FOLDER.parent / path}" for path in ("csrc/cuda", "emulator")]
    return "\n".join(
        [
            f"compiler = {build.in_ninja(*build.CpuExtension().find_compiler(folder))}",
            f"flags = {build.in_ninja(*FLAGS.split(), *WARNINGS.split(), *includes)}",
            f"cuda_flags = {build.in_ninja(*CUDA_FLAGS.split(), *WARNINGS.split(), *includes, *folders)}",
            "rule compile",
            "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler -shared $in -o $out",
            "  description = $out",
            *(f"build {name}.o: compile {root}/{name}.cpp" for name in machine),
            *(f"build {name}.o: compile {root}/{name}.cpp\n  flags = $cuda_flags" for name in host),
            *(
                f"build {libraries[module]}: link {' '.join(f'{name}.o' for name in names)}"
                for module, names in (("_machine", machine), ("_cuda", host))
            ),
            "",
        ]
    )


if __name__ == "__main__":
    OBJECTS.mkdir(parents=True, exist_ok=True)
    libraries = {module: f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}" for module in ("_machine", "_cuda")}
    (OBJECTS / "build.ninja").write_text(build_ninja(OBJECTS, libraries))
    build.run_ninja(OBJECTS, "--quiet")
    for library in libraries.values():
        shutil.copy2(OBJECTS / library, FOLDER / library)
