"""The kernels compile for real GPUs, though none is here, by each Triton release; registers and spills are ptxas's."""

import os
import pathlib
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

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
    [("installed", group) for group in GROUPS] + [("older", group) for group in GROUPS if group != "other norms"],
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
    problems = len(archs) * 3 * len(norms) * len(dropout)
    for kernel in ("forward", "backward_query", "backward_key", "unfold"):
        assert report.stdout.count(f" {kernel} ") == problems
    # Statistics of one rank, and of several.
    for kernel, times in (("finish", 2), ("grad_sums", 1), ("add_up", 2)):
        assert report.stdout.count(f" {kernel} ") == times * len(archs) * 3 * len(dropout) * ("batch" in norms)
    assert "FAULT" not in report.stdout
    expected = OLDER_RELEASE if release == "older" else version("triton")
    assert report.stdout.endswith(f" by triton {expected}; 0 faults\n")
