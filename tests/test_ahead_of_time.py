"""The kernels compile for real GPUs, though none is here, by each Triton release; registers and spills are ptxas's."""

import itertools
import math
import os
import pathlib
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version

import pytest

from benchmarks import compile_report

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
ROOT = pathlib.Path(__file__).parent.parent
# What goes with torch 2.11, beside the one that is installed.
OLDER_RELEASE = re.search(r"^OLDER_TRITON := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
OLDER = ROOT / "out" / f"triton-{OLDER_RELEASE}"

# Architectures, norms and dropout. Large tiles are for 8.0 and 9.0; the others take turns.
GROUPS = {
    "large tiles": ((80, 90), ("layer", "batch"), ("without", "with")),
    "small tiles": ((86, 100), ("layer", "batch"), ("without",)),
    "small tiles, dropout": ((86, 100), ("batch",), ("with",)),
    "other norms": ((90,), ("batch-eval", "none"), ("without",)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "group"),
    [*(("installed", group) for group in GROUPS), ("older", "large tiles"), ("older", "small tiles, dropout")],
)
def test_default_configurations_compile_without_faults(release: str, group: str) -> None:
    # A process of its own: here what is compiled is executed, and no machine code made of it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if release == "older":
        # Where nothing may be skipped, as in CI, the compilation fails.
        if not (OLDER / ".installed").exists() and os.environ.get("REATTN_TEST_NO_SKIPS") != "1":
            pytest.skip(f"needs {OLDER.relative_to(ROOT)}, which `make older-triton` installs")
        environment["PYTHONPATH"] = os.pathsep.join([str(OLDER), *filter(None, [environment.get("PYTHONPATH")])])
    archs, norms, dropout = GROUPS[group]
    command = [sys.executable, "-m", "benchmarks.compile_report", "--quick", "--jobs", "1"]
    command += ["--arch", *map(str, archs), "--norm", *norms, "--dropout", *dropout]
    report = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(report.stdout)
    assert report.returncode == 0, report.stdout + report.stderr
    kernels = [tuple(line.split()[6:8]) for line in report.stdout.splitlines() if line.lstrip().startswith("sm_")]
    plain = Counter(kernel for extra, kernel in kernels if extra == "none")
    problems = [case for case in compile_report.cases(list(archs), True, norms, dropout) if case.extra == "none"]
    assert len(problems) == len(archs) * 3 * len(norms) * len(dropout) / 2
    for kernel in ("forward", "grad_maps", "grad_query", "grad_key", "unfold"):
        assert plain[kernel] == len(problems)
    # Statistics of one rank, and of several.
    with_statistics = sum(case.norm == "batch" for case in problems)
    for kernel, times in (("finish", 2), ("grad_sums", 1), ("add_up", 2)):
        assert plain[kernel] == times * with_statistics
    for extra in compile_report.EXTRAS:
        assert kernels.count((extra, "forward")) == len(archs)
    assert kernels.count(("pre_theta", "grad_scores")) == len(archs)
    assert "FAULT" not in report.stdout
    expected = OLDER_RELEASE if release == "older" else version("triton")
    assert report.stdout.endswith(f" by triton {expected}; 0 faults\n")


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("archs", [(80, 89, 100), (86, 90, 120)], ids=str)
def test_cuda_kernels_compile_without_faults(archs) -> None:
    """Neither local memory nor a kernel without tensor cores, and shared memory that a block has: an eighth of the
    default shapes' problems, which has every shape with every norm and every architecture; `make aot` has all."""
    command = [sys.executable, "-m", "benchmarks.compile_report", "--backend", "cuda", "--quick", "--jobs", "1"]
    command += ["--arch", *map(str, archs)]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(report.stdout)
    assert report.returncode == 0, report.stdout + report.stderr
    for kernel in ("forward", "backward"):
        assert report.stdout.count(f" {kernel} ELEMENT=") == len(archs) * 8
    for kernel in ("products", "add_up", "finish", "grad_sums", "unfold"):
        assert f" {kernel} ELEMENT=" in report.stdout
    assert "FAULT" not in report.stdout
    names = ", ".join(f"sm_{arch}" for arch in archs)
    assert re.search(rf"compiled for {names} by NVRTC [\d.]+; 0 faults\n$", report.stdout)


def test_eighth_of_the_cuda_kernels() -> None:
    """An eighth, which has every two of architecture, shape, norm and dropout together."""
    archs = list(compile_report.SHARED_LIMIT)
    choices = compile_report.NORMS, list(compile_report.DROPOUT)
    eighth = compile_report.cuda_cases(archs, True, *choices)
    everything = compile_report.cuda_cases(archs, False, *choices)
    assert {*eighth} < {*everything} and len({*everything}) == len(everything)
    shapes = {case[1:4] for case in eighth}
    assert len(eighth) == len(archs) * len(shapes) * 4 * 2 / 8 == 48
    assert shapes == {(dtype, 12, head_dim) for dtype in ("bfloat16", "float16") for head_dim in (32, 33, 35, 64)}
    assert sum(case[1:4] in shapes for case in everything) == 8 * len(eighth)
    for kinds in itertools.combinations(range(4), 2):
        values = [(case.arch, case[1:4], case.norm, case.dropout) for case in eighth]
        pairs = {tuple(value[kind] for kind in kinds) for value in values}
        assert len(pairs) == math.prod(len({value[kind] for value in values}) for kind in kinds)


def test_local_memory_counts_in_loops() -> None:
    """In those that hold no other alone, where it is asked for."""
    lines = ["MOV R0, R1", "STL [R1], R2", "LDL R3, [R1]", "@P0 BRA 0x20", "LDL R2, [R1]", "BRA 0x10", "STL [R1], R4"]
    listing = "\n".join(f"/*{16 * at:04x}*/ {text} ;" for at, text in enumerate(lines))
    assert compile_report.local_memory(listing) == (4, 3, 5)
    assert compile_report.local_memory(listing, innermost=True) == (4, 1, 2)


KERNEL = compile_report.Kernel("forward", "reattn::forward", (("REATTN_ELEMENT", "Half"), ("REATTN_HEADS", 12)))
COST = compile_report.CudaCost(90, KERNEL, 128, 0, 0, 0, 0, 4096, 64)
IN_FLOAT = KERNEL._replace(constants=(("REATTN_ELEMENT", "float"), ("REATTN_HEADS", 12)))


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"stack": 8}, []),
        ({"spills": 1}, ["local memory"]),
        ({"spills": 1, "arch": 80}, []),
        ({"spills": 1, "spills_in_loops": 1, "arch": 80}, ["local memory"]),
        ({"spills": 1, "spills_in_loops": 1, "kernel": IN_FLOAT, "hmma": 0}, []),
        ({"hmma": 0}, ["no tensor-core instruction"]),
        ({"hmma": 0, "kernel": KERNEL._replace(source="sums")}, []),
        ({"static_shared": 16}, ["shared memory of its own"]),
        ({"dynamic_shared": 232448}, []),
        ({"dynamic_shared": 232449}, ["shared memory over 232448"]),
    ],
)
def test_faults_of_cuda_kernels(change, faults) -> None:
    cost = COST._replace(**change)
    assert cost.faults == faults
    line = list(compile_report.cuda_table([cost]))[1]
    assert ("FAULT" in line) == bool(faults) and "HEADS=12" in line
