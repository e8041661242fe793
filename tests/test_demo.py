"""``examples/digits.py``: a short run of it in fresh interpreters."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for library in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(library)

import torch  # noqa: E402

from reattn.backends import cpu  # noqa: E402

# What "auto" takes on a CPU.
BACKEND = "reference" if cpu._import_error else "cpu"
DEMO = Path(__file__).parents[1] / "examples" / "digits.py"

pytestmark = pytest.mark.skipif(not DEMO.is_file(), reason="needs the source tree")


def start(*arguments):
    kept = {key: value for key, value in os.environ.items() if key != "REATTN_BACKEND"}
    return subprocess.Popen(
        [sys.executable, DEMO, "--quick", "--device", "cpu", *map(str, arguments)],
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the same thing, side by side: what each printed, and the folder it wrote."""
    folders = [tmp_path_factory.mktemp("digits") / "new" / "folder" for _ in range(2)]
    processes = [start("--dim", 32, "--heads", 4, "--out", folder) for folder in folders]
    return [(finish(process), folder) for process, folder in zip(processes, folders, strict=True)]


@pytest.fixture(scope="module")
def record(runs):
    return json.loads((runs[0][1] / "digits.json").read_text())


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("digits_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_record(record):
    assert set(record) == {"arguments", "backend", "device", "versions", "images", "models"}
    assert (record["backend"], record["device"]) == (BACKEND, "cpu")
    assert record["images"] == {"train": 1437, "test": 360}
    assert record["arguments"]["seed"] == 0
    assert set(record["models"]) == {"deepvit", "vit"}
    depth = record["arguments"]["depth"]
    for model in record["models"].values():
        assert len(model["loss"]) == record["arguments"]["epochs"]
        assert len(model["similarity"]) == len(model["similarity_before_mixing"]) == depth - 1
        assert all(-1.0001 <= value <= 1.0001 for value in model["similarity"] + model["similarity_before_mixing"])
        similar = sum(value > 0.8 for value in model["similarity"])
        assert model["similar_blocks"] == {"number": similar, "share": similar / depth}
    # Plain attention does not mix.
    assert record["models"]["vit"]["similarity"] == record["models"]["vit"]["similarity_before_mixing"]
    assert record["models"]["deepvit"]["similarity"] != record["models"]["deepvit"]["similarity_before_mixing"]
    # In each of two blocks, theta (4 x 4), its bias, and the batch norm's weight and bias.
    counts = {name: model["parameters"] for name, model in record["models"].items()}
    assert counts["deepvit"] - counts["vit"] == 2 * (16 + 4 + 4 + 4)


def test_it_learns(record):
    for model in record["models"].values():
        assert model["loss"][-1] < 0.95 * model["loss"][0]
        # After so few steps the running variances are still far above those of the maps: no accuracy to hold it to.
        right = model["test_accuracy"] * record["images"]["test"]
        assert right == pytest.approx(round(right)) and 0 < right <= record["images"]["test"]


def test_it_says_what_ran(runs, record):
    output, folder = runs[0]
    assert f"backend  {BACKEND} (asked for: auto)" in output
    assert "device   cpu, threads: 1" in output
    for name, model in (("DeepViT", record["models"]["deepvit"]), ("plain ViT", record["models"]["vit"])):
        (row,) = [line for line in output.splitlines() if line.startswith(name) and "%" in line]
        assert f"{model['test_accuracy']:.1%}" in row
    for first, similarities in enumerate(
        zip(*(model["similarity"] for model in record["models"].values()), strict=True)
    ):
        (row,) = [line for line in output.splitlines() if line.startswith(f"{first + 1}, {first + 2}")]
        assert [f"{similarity:.3f}" for similarity in similarities] == row.split()[2:4]
    assert str(folder / "digits.png") in output


def test_figure(runs):
    from matplotlib.image import imread

    image = imread(runs[0][1] / "digits.png")
    assert image.ndim == 3 and min(image.shape[:2]) >= 500
    # Both panels have something drawn in them.
    middle = image.shape[1] // 2
    assert all(panel[..., :3].std() > 0.02 for panel in (image[:, :middle], image[:, middle:]))


def test_two_runs_agree(runs):
    records = []
    for _, folder in runs:
        record = json.loads((folder / "digits.json").read_text())
        del record["arguments"]["out"]
        for model in record["models"].values():
            assert model.pop("training_seconds") > 0
        records.append(record)
    assert records[0] == records[1]


@pytest.mark.parametrize("asked", ["argument", "variable"])
def test_backend_is_the_one_asked_for(demo, monkeypatch, asked):
    """A backend that cannot run here is refused before anything is trained, whichever way it was asked for."""
    monkeypatch.setenv("REATTN_BACKEND", "reference" if asked == "argument" else "triton")
    monkeypatch.setattr(sys, "argv", [str(DEMO), "--device", "cpu"])
    if asked == "argument":
        sys.argv += ["--backend", "triton"]
    monkeypatch.setattr("reattn.backends.triton.EMULATED", False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this"):
        demo.backend_in_use(demo.parse_arguments())
    monkeypatch.setattr(sys, "argv", [str(DEMO), "--device", "cpu", "--backend", "reference"])
    assert demo.backend_in_use(demo.parse_arguments()) == "reference"


def test_random_shift(demo):
    images = torch.rand(200, 1, 8, 8)
    shifted = demo.random_shift(images, torch.Generator().manual_seed(0))
    assert shifted.shape == images.shape
    padded = torch.full((200, 10, 10), demo.BACKGROUND)
    padded[:, 1:9, 1:9] = images[:, 0]
    seen = set()
    for image, around in zip(shifted[:, 0], padded, strict=True):
        places = [(r, c) for r in range(3) for c in range(3) if torch.equal(around[r : r + 8, c : c + 8], image)]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 9


def test_split(demo):
    train_images, train_labels, test_images, test_labels = demo.load_images("cpu")
    assert train_images.shape == (1437, 1, 8, 8) and test_images.shape == (360, 1, 8, 8)
    for images in (train_images, test_images):
        assert images.dtype == torch.float32 and images.min() == -1.0 and images.max() == 1.0
    counts = torch.bincount(train_labels) + torch.bincount(test_labels)
    torch.testing.assert_close(torch.bincount(test_labels) / counts, torch.full((10,), 0.2), atol=0.005, rtol=0)


@pytest.mark.parametrize(
    "option, value", [("--epochs", "0"), ("--depth", "1"), ("--batch-size", "-1"), ("--threads", "0")]
)
def test_bad_arguments(demo, monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", [str(DEMO), option, value])
    with pytest.raises(SystemExit):
        demo.parse_arguments()
    assert f"{option} must be at least" in capsys.readouterr().err
