"""The kernels of every instruction set against the portable ones, under sanitizers; what this CPU lacks is emulated."""

import os
import pathlib
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


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/cpu/compare_instruction_sets.cpp with AddressSanitizer and UndefinedBehaviorSanitizer."""
    # In a process of its own: importing setuptools after distutils is refused.
    code = "from build_extensions import CPU_FLAGS; print(CPU_FLAGS)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path_factory.mktemp("instruction_sets")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-O1", *sanitizers, *finished.stdout.split(), "-Wno-psabi", f"-I{SOURCES}", f"-I{ROOT / 'tests' / 'cpu'}"]
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


def test_emulated_instruction_sets(program):
    """Products of bfloat16 by AVX-512's dot products and by AMX's tiles, and vectors of 16 floats."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    finished = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    for name in ("emulated bf16", "emulated amx"):
        assert finished.stdout.count(name) == 14
    assert "42 comparisons, 0 wrong" in finished.stdout
