import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import reattn
from reattn import info as info_module
from reattn.info import info


def run_info(code="import runpy; runpy.run_module('reattn.info', run_name='__main__')", cwd=None, **environment):
    """What a fresh interpreter prints, as {left column: [right column, ...]}."""
    finished = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=cwd, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    report: dict[str, list[str]] = {}
    for line in finished.stdout.splitlines():
        name, _, value = line.partition("  ")
        report.setdefault(name, []).append(value.strip())
    return report


def test_report_agrees_with_info(tmp_path):
    settings = {"REATTN_BACKEND": "reference", "CUDA_VISIBLE_DEVICES": ""}
    report = run_info(cwd=tmp_path, **settings)
    facts = info()
    for name in ("reattn", "python", "platform", "torch", "triton", "cuda"):
        assert report[name] == [facts[name]]
    assert report["device"] == ["no CUDA device"]
    assert report["REATTN_BACKEND"] == ["reference"]
    assert report["CUDA_VISIBLE_DEVICES"] == [""]
    assert report["backend reference"] == ["available"]
    assert {name.removeprefix("backend ") for name in report if name.startswith("backend ")} == set(facts["backends"])


def test_unset_variables_are_named(monkeypatch):
    monkeypatch.delenv("REATTN_AUTOTUNE", raising=False)
    assert info()["environment"]["REATTN_AUTOTUNE"] is None
    assert "REATTN_AUTOTUNE" in info_module._report(info())


def test_without_triton():
    """Blocking the import is what a machine without triton looks like: reattn works, and says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, reattn\n"
        "query = torch.randn(1, 2, 3, 4)\n"
        "assert reattn.re_attention(query, query, query, torch.eye(2)).shape == (1, 2, 3, 4)\n"
        "import runpy; runpy.run_module('reattn.info', run_name='__main__')"
    )
    report = run_info(code, CUDA_VISIBLE_DEVICES="", REATTN_BACKEND="auto")
    assert report["triton"][0].startswith("not installed: ")
    assert "triton" in " ".join(report["backend triton"])
    assert report["backend triton"] != ["available"]
    assert report["backend reference"] == ["available"]


def test_broken_triton_is_reported(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('undefined symbol: cuLaunchKernel')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert info_module._triton_version() == "cannot be imported: OSError: undefined symbol: cuLaunchKernel"


def test_devices_and_reasons_are_listed(monkeypatch):
    devices = [
        SimpleNamespace(name="Big", major=9, minor=0, total_memory=144 * 2**30),
        SimpleNamespace(name="Small", major=7, minor=5, total_memory=15 * 2**29),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    monkeypatch.setattr(reattn, "available_backends", lambda: {"fast": ["too old", "too small"], "slow": []})
    lines = info_module._report(info()).splitlines()
    rows = [line.split(maxsplit=2) for line in lines if line.startswith(("device", "backend"))]
    assert rows == [
        ["device", "0", "Big, compute capability 9.0, 144.0 GiB"],
        ["device", "1", "Small, compute capability 7.5, 7.5 GiB"],
        ["backend", "fast", "too old"],
        ["backend", "fast", "too small"],
        ["backend", "slow", "available"],
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_real_devices():
    devices = info()["devices"]
    assert len(devices) == torch.cuda.device_count()
    assert all(torch.cuda.get_device_name(index) in device for index, device in enumerate(devices))
