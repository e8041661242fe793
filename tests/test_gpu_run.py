"""`make gpu` ends in time with whatever hangs or crashes named, and everything else done; without a GPU."""

import io
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import time

import parity
import pytest
import torch

from benchmarks import measure, report
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, check, install, pool, profile, run, suite, table, worker
from benchmarks.gpu.pool import Clock, Job, Pool
from reattn.backends import common, cuda, cuda_plan, triton

ROOT = pathlib.Path(__file__).parent.parent
FAKE = [sys.executable, str(ROOT / "tests" / "gpu_worker.py")]
HANG = {"where": {"backend": "triton", "mode": "layer"}, "step": "backward", "do": "hang"}
CRASH = {"where": {"backend": "cuda", "mode": "batch-training"}, "step": "grad_sums", "do": "crash"}
WRONG = {"where": {"backend": "cuda", "heads": 3, "dtype": "float32"}, "step": "running", "do": "wrong"}

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX")


@pytest.fixture
def make_gpu(tmp_path, monkeypatch, capsys):
    """Runs a part on a card that is not there, and returns status, JSON, what was printed, and seconds."""

    def call(*arguments, faults=(), seconds=60.0, job_seconds=0.0):
        monkeypatch.setenv("GPU_FAULTS", json.dumps(faults))
        monkeypatch.setenv("GPU_SECONDS", str(job_seconds))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setattr(run, "find_card", lambda: install.Card("NVIDIA Fake", "9.0"))
        monkeypatch.setattr(run, "install", lambda clock, log: {"status": "ok"})
        begin = time.monotonic()
        options = [*arguments, "--out", str(tmp_path), "--seconds", str(seconds), "--workers", "3"]
        status = gpu.main(options, FAKE)
        took = time.monotonic() - begin
        part = arguments[0] if arguments else "check"
        return status, json.loads((tmp_path / f"{part}.json").read_text()), capsys.readouterr().out, took

    return call


def by_name(found):
    return {job["name"]: job for job in found["gpu"]["jobs"]}


def test_whatever_hangs_or_crashes_is_named_and_the_rest_is_done(make_gpu, tmp_path):
    status, found, printed, took = make_gpu(faults=[HANG, CRASH, WRONG], seconds=60)
    assert status == 1 and took < 60
    jobs = by_name(found)
    hung, crashed = jobs["triton kernels, layer"], jobs["cuda kernels, batch-training"]
    # Each launch but the lost one was tried in another process.
    assert hung["status"] == "ok" and hung["lost"].keys() == {"backward"}
    assert re.fullmatch(r"hang: killed after \d+ s", hung["lost"]["backward"])
    assert hung["kernels"] == dict.fromkeys(("forward", "products", "unfold"), "ran")
    assert crashed["lost"] == {"grad_sums": "crash: the process ended with SIGABRT"}
    wrong = {name for name, job in jobs.items() if job["status"] == "wrong"}
    assert wrong == {f"cuda 3x16 {mode} float32" for mode in cases.MODES}
    others = {name: job for name, job in jobs.items() if name not in wrong}
    assert {job["status"] for job in others.values()} == {"ok"}
    # What may hang is not timed; the rest is, once.
    assert found["gpu"]["not_timed"] == [["cuda", "batch-training"], ["triton", "layer"]]
    assert jobs["128x12x197x64 layer forward"]["ms"].keys() == {"cuda", "eager", "compiled", "sdpa"}
    assert jobs["128x12x197x64 batch forward"]["ms"].keys() == {"triton", "eager", "compiled", "sdpa"}

    assert "triton kernels, layer: lost in backward: hang: killed after" in printed
    assert "cuda kernels, batch-training: lost in grad_sums: crash: the process ended with SIGABRT" in printed
    assert "cuda 3x16 layer float32: wrong: output: error 1, allowed 0.1" in printed
    assert re.search(r"triton +bfloat16 +5/5 +5/5 +5/5 +5/5 +1.0e-03 +1.0e-03\n", printed)
    assert re.search(r"cuda +float32 +4/5 +4/5 +4/5 +4/5 +1.0e-03 +1.0e-03\n", printed)
    # benchmarks/report.py reads the same file.
    read = report.load(tmp_path / "check.json")
    assert read.machine["device"] == "NVIDIA Fake" and {entry.contender for entry in read.entries} >= {"triton", "cuda"}
    rendered = "\n".join(report.render(report.by_device([read])))
    assert "### Operator, bfloat16, forward\n" in rendered and "### Without the host\n" in rendered
    assert "### Scaling, forward+backward, batch 1, 12 heads, head dim 64, norm layer, bfloat16\n" in rendered
    assert rendered.count("Milliseconds of a replayed CUDA graph:") == 2
    assert "| 128x12x197x64 | batch | 200 x7 |" in rendered
    assert not list(tmp_path.glob("*.partial"))


def test_what_does_not_fit_is_listed(make_gpu):
    """Jobs that take so long that a few fit: it ends in time, and says of every other that it was not run."""
    status, found, printed, took = make_gpu(seconds=8, job_seconds=0.5)
    assert took < 9 and status == 0
    jobs = by_name(found)
    expected = [job.name for job in (*cases.kernel_jobs(cases.CARD), *cases.timing_jobs(cases.CARD, cases.BACKENDS))]
    expected += [job.name for each in cases.parity_jobs(cases.CARD) for job in each]
    assert not set(expected) - jobs.keys()
    left = [job for job in jobs.values() if job["status"] == "not run"]
    assert len(left) > 100 and all(job["error"].startswith("no time") for job in left)
    assert any(job["status"] == "ok" for job in jobs.values())
    assert re.search(r"\nNot run\n(.+\n)*no time \(\d+\): .+; and \d+ more\n", printed)
    assert found["gpu"]["seconds"] <= 8.5 and found["gpu"]["budget"] == 8


def test_measured_stands_beside_forecast(make_gpu):
    _, found, printed, _ = make_gpu()
    row = next(row for row in found["gpu"]["kernels"] if "forecast_us" in row)
    told = {"backend": "triton", "kernel": "forward", "shape": "128x12x197x64", "norm": "layer"}
    told |= {"us": 200.0, "launches": 7, "by_host": False}
    assert row == {**told, "forecast_us": pytest.approx(100.0), "binding": "issue"}
    assert re.search(r"triton 128x12x197x64 layer +200 \(2\.00 issue\) x7\n", printed)
    assert re.search(r"cuda 32x12x577x32 batch +200 x7\n", printed)
    assert re.search(r"scaling 1x12x4096x64 layer forward .+ 0\.25 0\.25 0\.25 0\.25 +30 30 30 30\n", printed)
    assert len(printed) < 12000
    assert table.kernel_cell({"us": 3.0, "launches": 1, "by_host": True}) == "3 by host"


def test_a_contender_that_hangs_while_it_is_timed_costs_no_other(make_gpu):
    where = {"shape": [128, 12, 197, 64], "norm": "layer", "direction": "forward"}
    status, found, printed, _ = make_gpu(faults=[{"where": where, "step": "cuda", "do": "hang"}])
    assert status == 1
    job = by_name(found)["128x12x197x64 layer forward"]
    assert job["status"] == "ok" and job["lost"].keys() == {"cuda"}
    assert job["ms"].keys() == {"triton", "eager", "compiled", "sdpa"}
    assert "128x12x197x64 layer forward: lost in cuda: hang: killed after" in printed


def test_no_card(tmp_path, monkeypatch, capsys):
    def none():
        raise RuntimeError("needs a CUDA device, and neither nvidia-smi nor torch finds one (no such file)")

    monkeypatch.setattr(run, "find_card", none)
    assert gpu.main(["--out", str(tmp_path)], FAKE) == 1
    assert "make gpu: needs a CUDA device" in capsys.readouterr().err
    assert "needs a CUDA device" in json.loads((tmp_path / "check.json").read_text())["gpu"]["error"]


def test_ended_from_outside_it_leaves_no_process_and_what_it_knew(tmp_path):
    script = (
        "import sys; from benchmarks.gpu import __main__ as gpu, run, install\n"
        "sys.exit(gpu.main(['--emulated', '--out', sys.argv[1], '--workers', '2'], sys.argv[2:]))"
    )
    processes = tmp_path / "processes"
    processes.mkdir()
    environment = os.environ | {"GPU_SECONDS": "0.5", "PYTHONPATH": str(ROOT), "GPU_PROCESSES": str(processes)}
    popen = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), *FAKE], env=environment, cwd=ROOT)
    path = tmp_path / "check.json"
    deadline = time.monotonic() + 60
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(20) == 143
    assert json.loads(path.read_text())["gpu"]["jobs"]
    started = [int(path.name) for path in processes.iterdir()]
    assert started
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_shares_of_the_budget_leave_time_to_write():
    assert 0 < check.CORRECT_UNTIL < check.TIMED_UNTIL < 1 and gpu.BUDGET <= 280
    # Ended by its own clock: what a run waits for ends before the limit of a command, 300 s.
    assert gpu.parse([]).seconds == gpu.BUDGET


def test_a_stage_whose_time_is_over_begins_nothing(tmp_path):
    now = [0.0]
    clock = Clock(280, lambda: now[0])
    assert (clock.left(), clock.left(100)) == (280, 100)
    now[0] = 98.0
    assert clock.left(100) == 2 and clock.left() == 182
    jobs = [Job("a", {"kind": "x"}), Job("b", {"kind": "x"})]
    with (tmp_path / "log").open("w") as log:
        idle = Pool(["/nothing/to/start"], 2, clock, log)
        idle.run(jobs, 100)
    assert [job.result["error"] for job in jobs] == ["no time", "no time"]
    now[0] = 300.0
    assert clock.left() == 0


def test_a_job_that_is_cut_off_is_not_called_a_hang(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_FAULTS", "[]")
    monkeypatch.setenv("GPU_SECONDS", "0.6")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = [Job(mode, {"kind": "kernels", "mode": mode}) for mode in ("layer", "batch-training")]
    with (tmp_path / "log").open("w") as log:
        two = Pool(FAKE, 2, Clock(100), log)
        two.run(jobs, 4.0)
        two.close()
    assert jobs[0].result["status"] == "ok"
    assert re.fullmatch(r"no time: cut off after \d s", jobs[1].result["error"])
    assert isinstance(two._inbox, queue.Queue) and not pool.LIVE


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"url": ROOT.as_uri(), "dir_info": {"editable": True}}, True),
        ({"url": ROOT.as_uri(), "dir_info": {}}, False),
        ({"url": (ROOT / "elsewhere").as_uri(), "dir_info": {"editable": True}}, False),
        (None, False),
    ],
)
def test_installed_is_what_is_editable_from_here(told, expected, tmp_path, monkeypatch):
    info = tmp_path / "reattn-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reattn\nVersion: 0\n")
    if told:
        (info / "direct_url.json").write_text(json.dumps(told))
    monkeypatch.syspath_prepend(tmp_path)
    assert install.is_installed(ROOT) == expected


NCU = """\
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","smsp__inst_issued.sum",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","launch__registers_per_thread"
"","","","ns","inst","inst","inst","register/thread"
"0","7","forward_kernel","296000","146,000,000","1.5","2.25","168"
"1","7","reattn::backward(reattn::Params)","9e5","3e8","0.5","","255"
==PROF== Disconnected
"""


def test_counters_are_read():
    found = profile.read_ncu(NCU)
    assert found.keys() == {"forward", "backward"}
    assert profile.shown(found["forward"]) == {"us": 296.0, "M instructions": 146.0, "registers": 168.0}
    assert profile.stalls(found["forward"]) == {"barrier": 2.25, "wait": 1.5}
    assert profile.read_ncu("==ERROR== Failed to find metric") == {}
    lines = table.counters([{"name": "triton forward", "shown": profile.shown(found["forward"])}])
    assert lines[0].split() == ["kernel", "us", "M", "instructions", "registers"] and "296" in lines[1]


def test_clocks_are_left_alone():
    command = profile.ncu_command({"kind": "launches"}, pathlib.Path("log"))
    assert command[command.index("--clock-control") + 1] == "none"


def test_sanitizers_are_read():
    memcheck = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read\n========= ERROR SUMMARY: 2 errors\n"
    racecheck = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert profile.read_sanitizer(memcheck)[0] == 2 and profile.read_sanitizer(racecheck)[0] == 0
    assert profile.read_sanitizer("killed")[0] is None


def test_tests_that_begin_and_do_not_end_are_told_from_others():
    lines = [
        {"test": "a", "outcome": "begun", "said": ""},
        {"test": "b", "outcome": "begun", "said": ""},
        {"test": "b", "outcome": "failed", "said": "boom"},
        {"test": "b", "outcome": "passed", "said": ""},
    ]
    found = suite.read_lines("\n".join(map(json.dumps, lines)) + '\n{"test": "c", "out')
    assert {name: each["outcome"] for name, each in found.items()} == {"a": "begun", "b": "failed"}


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


def test_profile(make_gpu, tmp_path, monkeypatch):
    """Programs in the place of ncu and compute-sanitizer: one knows nothing of the metrics, the other finds a race."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(
        folder,
        "ncu",
        "import pathlib, sys\nlog = pathlib.Path(sys.argv[sys.argv.index('--log-file') + 1])\n"
        "if '--metrics' in sys.argv: log.write_text('==ERROR== Failed to find metric x'), sys.exit(1)\n"
        f"log.write_text({NCU!r})\n",
    )
    program(
        folder,
        "compute-sanitizer",
        "import pathlib, sys, time\nracecheck = 'racecheck' in sys.argv\n"
        # All are there at once.
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / (sys.argv[sys.argv.index('--tool') + 1] + '.begun')).touch()\n"
        "while len(list(folder.glob('*.begun'))) < 3: time.sleep(0.05)\n"
        "print('========= COMPUTE-SANITIZER')\n"
        "if racecheck: print('========= Error: Race reported between a and b')\n"
        "print('=========', 'RACECHECK SUMMARY: 1 hazard' if racecheck else 'ERROR SUMMARY: 0 errors')\n"
        "sys.exit(9 * racecheck)\n",
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    status, found, printed, _ = make_gpu("profile")
    assert status == 1
    jobs = by_name(found)
    assert jobs["ncu triton"]["status"] == "ok" and jobs["ncu triton"]["metrics"].keys() == {
        "forward",
        "backward",
    }
    assert jobs["cuda forward"]["shown"]["M instructions"] == 146.0
    assert jobs["compute-sanitizer memcheck"]["status"] == jobs["compute-sanitizer initcheck"]["status"] == "ok"
    assert jobs["compute-sanitizer racecheck"]["status"] == "wrong"
    assert "Race reported between a and b" in printed and "cuda backward: wait 0.50" in printed
    assert jobs["warm cuda, profiled"]["status"] == jobs["warm cuda 3x32 layer float32"]["status"] == "ok"
    assert jobs["cuda graph, layer"]["status"] == jobs["triton stream, batch-training"]["status"] == "ok"


def test_a_sanitizer_that_is_cut_off_is_not_called_a_hang(make_gpu, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "compute-sanitizer", "import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    status, found, _, took = make_gpu("profile", seconds=12)
    assert status == 0 and took < 12
    told = [by_name(found)[f"compute-sanitizer {tool}"]["error"] for tool in profile.TOOLS]
    assert all(re.fullmatch(r"no time: cut off after \d s", each) for each in told)


def test_without_the_programs_that_watch(make_gpu, monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    status, found, printed, _ = make_gpu("profile")
    assert status == 0 and "ncu is not installed (2): ncu triton; ncu cuda" in printed


def test_a_suite_that_hangs_is_cut_off(make_gpu, tmp_path, monkeypatch):
    """What had begun is named, and what failed before is known."""
    (tmp_path / "test_it.py").write_text(
        "import time, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_hangs(): time.sleep(600)\n"
        "def test_after(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-q", "-p", "benchmarks.gpu.pytest_lines"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull]
    monkeypatch.setattr(suite, "pytest_command", lambda run: command)
    monkeypatch.setattr(suite, "HANG_SECONDS", 1.0)
    status, found, printed, took = make_gpu("tests", seconds=12)
    assert status == 1 and took < 12
    counts = {"passed": 1, "failed": 1, "skipped": 0, "had not ended": 1, "not run": 1}
    assert found["gpu"]["tests"] == {**counts, "cut off": True}
    told = {name.partition("::")[2]: job for name, job in by_name(found).items()}
    assert {name: job["status"] for name, job in told.items()} == {
        "test_wrong": "failed",
        "test_hangs": "hang",
        "test_after": "not run",
    }
    assert "1 passed, 1 failed, 0 skipped, 1 had not ended, 1 not run" in printed
    assert re.search(r"::test_hangs: hang: had not ended", printed)


def test_tests_are_guarded_with_what_is_there(make_gpu, tmp_path, monkeypatch, capsys):
    options = gpu.parse(["tests", "--out", str(tmp_path), "--workers", "5"])
    one = run.Run(options, FAKE, time.monotonic)
    there = {"xdist", "pytest_timeout"}
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: name if name in there else None)
    assert suite.pytest_command(one)[-8:] == [
        *("-n", "5", "--dist", "worksteal"),
        *("--timeout", "60", "--timeout-method", "thread"),
    ]
    there.clear()
    assert suite.pytest_command(one)[-2:] == ["-o", "faulthandler_timeout=60"]
    assert "pytest-timeout is not installed" in capsys.readouterr().out
    one.log.close()


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_launches_of_every_part_are_timed_and_the_first_is_profiled(backend, device, monkeypatch, forget_plans):
    monkeypatch.setattr(common, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(cuda, "_cut", lambda size, shared_bytes, _: cuda_plan.cut_backward(size, shared_bytes, 4))
    monkeypatch.setattr(triton, "_processors", lambda tensor: 4)
    forget_plans()
    problem = worker.as_problem((5, 3, 17, 16), "layer")
    given = measure.make_inputs(problem, device), measure.make_parameters(problem, device)
    launches, _ = worker.recorded(backend, problem, *given)
    counts = {name: len(each) for name, each in launches.items()}
    sweep = {"triton": "grad_maps", "cuda": "backward"}[backend]
    assert counts["forward"] == counts["unfold"] == 1 and counts[sweep] > 1

    told = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: told.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: told.append("stop"))
    with worker.hooked(backend, lambda name, launch: told.append(name)):
        worker.launches(worker.Answers(io.StringIO()), backend, problem.shape, "layer")
    profiled = [name for name, before in zip(told[1:], told, strict=False) if before == "start"]
    assert sorted(profiled) == sorted(counts) and told.count("stop") == len(counts)


def test_what_is_held_to_float64_in_float16_is_what_eager_arithmetic_can_do():
    problem = worker.make_problem("batch-eval", heads=12, head_dim=64, seqlen=197, dtype="float16")
    assert all(result.isfinite().all() for result in parity.compute(problem, "reference").values())


@pytest.mark.slow
@pytest.mark.cuda
def test_the_flow_of_stages_with_what_stands_for_a_gpu(tmp_path):
    """Every kind of job, by the workers that a card's would be; on a slow machine not all of them."""
    pytest.importorskip("emulator", exc_type=ImportError)
    options = ["--emulated", "--out", str(tmp_path), "--workers", "2", "--seconds", "90"]
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert {job["status"] for job in found["gpu"]["jobs"]} <= {"ok", "not run"}
    kinds = {job["kind"] for job in found["gpu"]["jobs"] if job["status"] == "ok"}
    assert kinds >= {"kernels", "parity", "machine", "kernel_times", "operator"}
