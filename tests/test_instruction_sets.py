"""The kernels of every instruction set against the portable ones, under sanitizers; what this CPU lacks is emulated."""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cpu"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
EMULATED = {
    "portable": "",
    "emulated_dots": "-DREATTN_EMULATED",
    "emulated_amx": "-DREATTN_EMULATED -DREATTN_EMULATED_AMX",
}

pytestmark = [
    pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]


def compile_all(commands):
    """Runs the compiler once for each list of arguments, two at a time."""

    def compile_one(arguments):
        finished = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-4000:]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, commands))


def usual_flags():
    # In a process of its own: importing setuptools after distutils is refused.
    code = "from build_extensions import CPU_FLAGS; print(CPU_FLAGS)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return [*finished.stdout.split(), "-Wno-psabi", f"-I{SOURCES}", f"-I{ROOT / 'tests' / 'cpu'}"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/cpu/compare_instruction_sets.cpp with AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("instruction_sets")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-O1", *sanitizers, *usual_flags()]
    units = [
        (f"{isa}.o", [*defines.split(), f"-DREATTN_ISA={isa}", str(SOURCES / "kernels.cpp")])
        for isa, defines in EMULATED.items()
    ]
    units += [(f"{name}.o", [str(SOURCES / f"{name}.cpp")]) for name in ("driver", "dispatch", "parallel")]
    units.append(("main.o", ["-DREATTN_EMULATED", str(ROOT / "tests" / "cpu" / "compare_instruction_sets.cpp")]))
    compile_all([[*flags, *rest, "-c", "-o", str(folder / name)] for name, rest in units])
    target = folder / "compare_instruction_sets"
    compile_all([[*sanitizers, *(str(folder / name) for name, _ in units), "-pthread", "-ldl", "-o", str(target)]])
    return target


@pytest.mark.slow
def test_emulated_instruction_sets(program):
    """Products of bfloat16 by AVX-512's dot products and by AMX's tiles, and vectors of 16 floats."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    finished = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    for name in ("emulated bf16", "emulated amx"):
        assert finished.stdout.count(name) == 29
    assert "87 comparisons, 0 wrong" in finished.stdout


def has_bfloat16_products():
    """Whether this CPU has the instructions that are emulated; Linux says so."""
    flags = pathlib.Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and flags.exists() and "avx512_bf16" in flags.read_text()


@pytest.mark.skipif(not has_bfloat16_products(), reason="needs a CPU with AVX-512's bfloat16 instructions")
def test_emulated_instructions_are_the_cpus(tmp_path):
    """Bit for bit: random numbers of every size, subnormal ones, infinities; where one says NaN, so does the other."""
    source = str(ROOT / "tests" / "cpu" / "compare_intrinsics.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-psabi"]
    units = [
        ("emulated.o", [*flags, "-DREATTN_EMULATED"]),
        ("hardware.o", [*flags, "-mavx512f", "-mavx512bf16"]),
    ]
    compile_all([[*unit, source, "-c", "-o", str(tmp_path / name)] for name, unit in units])
    program = tmp_path / "compare_intrinsics"
    compile_all([[*(str(tmp_path / name) for name, _ in units), "-o", str(program)]])
    finished = subprocess.run([program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "4800000 numbers, 0 wrong" in finished.stdout


ARM_COMPILER, ARM_EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")


@pytest.mark.slow
@pytest.mark.skipif(
    not (ARM_COMPILER and ARM_EMULATOR), reason="needs the packages g++-aarch64-linux-gnu and qemu-user-static"
)
def test_arm(tmp_path):
    """NEON, in an emulator of the CPU, against what this one computes."""
    flags = ["-O2", "-DREATTN_ISA=portable", *usual_flags()]
    sources = [str(SOURCES / f"{name}.cpp") for name in ("kernels", "driver", "dispatch", "parallel")]
    sources.append(str(ROOT / "tests" / "cpu" / "compare_instruction_sets.cpp"))
    here, there, results = tmp_path / "here", tmp_path / "there", tmp_path / "results"
    commands = [[COMPILER, *flags, *sources, "-ldl", "-o", str(here)]]
    commands.append([ARM_COMPILER, *flags, "-static", *sources, "-ldl", "-o", str(there)])
    with ThreadPoolExecutor(2) as pool:
        for finished in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert finished.returncode == 0, finished.stderr[-4000:]
    subprocess.run([here, "save", results], check=True)
    finished = subprocess.run([ARM_EMULATOR, there, "against", results], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "29 comparisons, 0 wrong" in finished.stdout
