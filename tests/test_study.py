"""``examples/collapse_study.py``: its runs, that none is done twice, and its report, on models of two blocks."""

import importlib
import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from reattn.analysis import visit_attention_maps
from reattn.models import DeepViT

for library in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("collapse_study")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def chosen(study):
    """The forms at two depths, one of them with a second seed."""
    forms = [study.Setting(form, depth, 0, dim=16, heads=2, epochs=1) for form in study.FORMS for depth in (4, 5)]
    return [*forms, replace(forms[0], seed=1)]


@pytest.fixture(scope="module")
def run_all(study):
    """In processes of their own, which take the backend of this machine."""

    def run(chosen, folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("REATTN_BACKEND", raising=False)
            study.run_all(chosen, folder, workers=1)

    return run


@pytest.fixture(scope="module")
def finished(run_all, chosen, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    run_all(chosen, out / "runs")
    return out


def test_settings(study):
    """Each once, every form at every depth with every seed, and the two remedies at one depth."""
    chosen = study.settings(study.DEPTHS, 3, 15)
    assert len(chosen) == len(set(chosen)) == 4 * 3 * 3 + 2 * 3 + 2 * 3
    assert len({setting.name for setting in chosen}) == len(chosen)
    assert {(s.form, s.depth) for s in chosen} == {(form, depth) for form in study.FORMS for depth in study.DEPTHS}
    assert {s.dim for s in chosen} == set(study.WIDTHS) and {s.last for s in chosen} == {None, *study.LAST_BLOCKS}


def test_records(study, chosen, finished):
    records = study.load_runs(chosen, finished / "runs")
    assert len(records) == len(chosen)
    for setting, record in zip(chosen, records, strict=True):
        assert study.Setting(**record["setting"]) == setting
        assert len(record["loss"]) == len(record["test_accuracy"]) == 1 and 0 <= record["test_accuracy"][0] <= 1
        assert len(record["evenness"]) == len(record["token_similarity"]) == setting.depth
        for kind in study.KINDS:
            assert [len(record["similarity"][kind][str(k)]) for k in (1, 2, 3)] == [
                setting.depth - k for k in (1, 2, 3)
            ]
            assert len(record["pattern_similarity"][kind]) == setting.depth - 1
            assert len(record["head_similarity"][kind]) == setting.heads
    plain = study.select(records, form="ViT")
    assert all(record["similarity"]["re_attention"] == record["similarity"]["softmax"] for record in plain)
    assert study.select(records, form="ViT", depth=4, seed=0)[0]["loss"] != study.select(records, seed=1)[0]["loss"]


@pytest.mark.slow
def test_what_is_there_is_not_run_again(run_all, chosen, finished):
    """An interrupted study goes on; a file that was being written when it stopped does not count."""
    paths = {path: path.stat().st_mtime_ns for path in (finished / "runs").glob("*.json")}
    lost = finished / "runs" / f"{chosen[0].name}.json"
    lost.rename(lost.with_suffix(".partial"))
    run_all(chosen, finished / "runs")
    assert {path for path, before in paths.items() if path.stat().st_mtime_ns != before} == {lost}


def test_pattern_similarity_and_evenness(study):
    """Against numpy's correlation and the definition of entropy."""
    torch.manual_seed(0)
    model = DeepViT(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=3, num_heads=2).double().eval()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    maps = []
    for kind in study.KINDS:
        maps = []
        visit_attention_maps(model, images, lambda block: maps.append(block.numpy()), kind)  # noqa: B023
        for block, similarity in enumerate(study.pattern_similarity(model, images, kind)):
            columns = [m.swapaxes(-2, -1).reshape(-1, m.shape[-2]) for m in maps[block : block + 2]]
            assert similarity == pytest.approx(
                statistics.mean(numpy.corrcoef(p, q)[0, 1] for p, q in zip(*columns, strict=True))
            )
    assert study.evenness(model, images) == pytest.approx(
        [float(-(m * numpy.log(m)).sum(-1).mean() / numpy.log(m.shape[-1])) for m in maps]
    )


def test_report(study, chosen, finished, monkeypatch, capsys):
    monkeypatch.setattr(study, "WHOLE", {"dim": 16, "last": None})
    records = study.load_runs(chosen, finished / "runs")
    study.report(records, finished)
    text = (finished / "study.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    (row,) = [line for line in text.splitlines() if line.startswith("| ViT, 4 blocks |")]
    accuracies = [100 * r["test_accuracy"][-1] for r in study.select(records, form="ViT", depth=4)]
    spread = f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f}"
    assert row.split(" | ")[1:3] == ["2", spread]
    assert json.loads((finished / "study.json").read_text()) == records
    for name in ("similarity_by_depth", "similar_blocks", "similar_heads", "feature_maps", "by_block", "training"):
        assert (finished / f"{name}.png").stat().st_size > 5000 and (finished / f"{name}.svg").is_file()


def test_committed_study(study):
    """The page shows the tables of the runs beside it, all of them, and its pictures are there."""
    docs = EXAMPLES.parent / "docs"
    records = json.loads((docs / "study" / "study.json").read_text())
    assert {r["setting"]["seed"] for r in records} == {0, 1, 2}
    assert [study.Setting(**r["setting"]) for r in records] == study.settings(study.DEPTHS, 3, 15)
    text = (docs / "study.md").read_text()
    page = text.splitlines()
    assert [line for line in study.tables(records) if line.startswith("| ")] == [
        line for line in page if line.startswith("| ") and line.count("|") > 5
    ]
    pictures = re.findall(r"\]\((study/[a-z_]+\.png)\)", text)
    assert {Path(picture).stem for picture in pictures} == set(study.figures(records))
    assert all((docs / picture).is_file() for picture in pictures)
