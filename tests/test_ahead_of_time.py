"""The kernels compile for real GPUs, though none is here; registers and spills are ptxas's."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norms", "archs"),
    [(("layer", "batch"), (80, 86, 90, 100)), (("batch-eval", "none"), (90,))],
    ids=["layer and batch", "the others"],
)
def test_default_configurations_compile_without_faults(norms: tuple[str, ...], archs: tuple[int, ...]) -> None:
    # A process of its own: here the kernels may be interpreted, which leaves nothing to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--quick", "--jobs", "1"]
    command += ["--arch", *map(str, archs), "--norm", *norms]
    report = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(report.stdout)
    assert report.returncode == 0, report.stdout + report.stderr
    problems = len(archs) * 3 * len(norms)
    for kernel in ("forward", "backward_query", "backward_key", "unfold"):
        assert report.stdout.count(f" {kernel} ") == problems
    # Statistics of one rank, and of several.
    for kernel, times in (("finish", 2), ("grad_sums", 1), ("add_up", 2)):
        assert report.stdout.count(f" {kernel} ") == times * len(archs) * 3 * ("batch" in norms)
    assert "FAULT" not in report.stdout
    assert "0 faults" in report.stdout
