"""The kernels compile for real GPUs, though none is here; the interpreter cannot tell."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_default_configurations_compile_without_faults() -> None:
    # A process of its own: here the kernels may be interpreted, which leaves nothing to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.compile_report",
            "--quick",
            "--jobs",
            "1",
            "--arch",
            "80",
            "86",
            "90",
            "100",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(report.stdout)
    assert report.returncode == 0, report.stdout + report.stderr
    assert report.stdout.count("backward_key") == 4 * 3 * 2
    assert "FAULT" not in report.stdout
    assert "0 faults" in report.stdout
