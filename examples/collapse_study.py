"""Do attention maps of deep ViTs grow alike, and does re-attention keep them apart? DeepViT's analysis on real images.

Trains plain ViTs and DeepViTs (batch norm, layer norm) of 8, 16, 24 and 32 blocks on scikit-learn's handwritten digits,
every model with the same recipe and several seeds, and measures what the paper (arXiv 2103.11886, section 3) measures:
the accuracy, and how many blocks have attention maps like those of the next. Also the paper's first remedy, wider
embeddings, and re-attention in the last blocks alone.

    python examples/collapse_study.py --out out/study            # about 40 minutes on two cores
    python examples/collapse_study.py --out out/study --quick    # three minutes: that everything runs

Every run leaves a JSON of its own in OUT/runs; what is there already is not run again, so a study that was interrupted
goes on where it stopped. At the end, or with --report alone, the tables and figures are made from all of them:
OUT/study.md, OUT/study.json and the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import digits
import torch
from tqdm import tqdm

import reattn
from reattn.analysis import block_similarity, head_similarity, plots, similar_blocks
from reattn.models import DeepViT

DEPTHS = (8, 16, 24, 32)
DISTANCES = (1, 2, 3)
# The maps that values are multiplied with, and the softmax alone, which compares re-attention with plain attention like
# with like: centring by a norm lowers a cosine by itself.
KINDS = ("re_attention", "softmax")
# What is compared at every depth; the plain ViT first.
FORMS = {"ViT": ("self", None), "DeepViT, batch norm": ("re", "batch"), "DeepViT, layer norm": ("re", "layer")}
WIDTHS = (32, 64, 128)
LAST_BLOCKS = (4, 8)
REMEDY_DEPTH = 16
# The settings that models of different depth are compared in.
WHOLE = {"dim": 64, "last": None}


@dataclass(frozen=True)
class Setting:
    """One training run; ``last``: so many blocks at the end have re-attention, None for all."""

    form: str
    depth: int
    seed: int
    dim: int = 64
    last: int | None = None
    heads: int = 8
    epochs: int = 15
    batch_size: int = 64
    lr: float = 1e-3

    @property
    def name(self) -> str:
        form = self.form.lower().replace(", ", "-").replace(" ", "-")
        last = "" if self.last is None else f"-last{self.last}"
        return f"{form}-depth{self.depth}-dim{self.dim}{last}-epochs{self.epochs}-seed{self.seed}"


def settings(depths: Sequence[int], seeds: int, epochs: int) -> list[Setting]:
    """Every run of the study, each once, the longest first."""
    chosen = [Setting(form, depth, seed) for form in FORMS for depth in depths for seed in range(seeds)]
    deep = min(REMEDY_DEPTH, max(depths))
    chosen += [Setting("ViT", deep, seed, dim=dim) for dim in WIDTHS for seed in range(seeds)]
    chosen += [
        Setting("DeepViT, batch norm", deep, seed, last=last)
        for last in LAST_BLOCKS
        if last < deep
        for seed in range(seeds)
    ]
    chosen = [replace(setting, epochs=epochs) for setting in dict.fromkeys(chosen)]
    return sorted(chosen, key=lambda setting: -setting.depth * setting.dim)


def run(setting: Setting, folder: Path) -> Path:
    """Trains and measures one model, and writes its JSON in one step."""
    torch.set_num_threads(1)
    attention, norm = FORMS[setting.form]
    train_images, train_labels, test_images, test_labels = digits.load_images("cpu")
    torch.manual_seed(setting.seed)
    model = DeepViT(
        img_size=digits.IMAGE_SIZE,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=setting.dim,
        depth=setting.depth,
        num_heads=setting.heads,
        attention=attention,
        norm=norm,
        re_attention_blocks=setting.last,
        conv_stem=True,
    )
    start = time.perf_counter()
    recipe = argparse.Namespace(**asdict(setting))
    losses = digits.train(setting.name, model, train_images, train_labels, recipe)
    seconds = time.perf_counter() - start
    similarity = {kind: block_similarity(model, test_images, DISTANCES, kind) for kind in KINDS}
    deep = 3 * setting.depth // 4
    record = {
        "setting": asdict(setting),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": seconds,
        "loss": losses,
        "test_accuracy": digits.accuracy(model, test_images, test_labels),
        "similarity": {kind: {k: s.tolist() for k, s in by.items()} for kind, by in similarity.items()},
        "similar_blocks": {kind: similar_blocks(by) for kind, by in similarity.items()},
        "deep_block": deep,
        "head_similarity": {kind: head_similarity(model, test_images, kind)[deep].tolist() for kind in KINDS},
        "versions": {module.__name__: str(module.__version__) for module in (reattn, torch)},
    }
    path = folder / f"{setting.name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n")
    os.replace(partial, path)
    return path


def run_all(chosen: Sequence[Setting], folder: Path, workers: int) -> None:
    """Runs what has no JSON yet, several at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [setting for setting in chosen if not (folder / f"{setting.name}.json").is_file()]
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(chosen), initial=len(chosen) - len(missing), unit="run", disable=None) as progress,
    ):
        futures = [pool.submit(run, setting, folder) for setting in missing]
        for future in as_completed(futures):
            progress.write(str(future.result()))
            progress.update()


Records = list[dict[str, Any]]


def load_runs(chosen: Iterable[Setting], folder: Path) -> Records:
    paths = [folder / f"{setting.name}.json" for setting in chosen]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def select(records: Records, **wanted: Any) -> Records:
    return [r for r in records if all(r["setting"][name] == value for name, value in wanted.items())]


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several, standard deviation over the seeds."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "test accuracy, %": lambda r: 100 * r["test_accuracy"],
    "last training loss": lambda r: r["loss"][-1],
    "similarity to the next block": lambda r: statistics.mean(r["similarity"]["re_attention"]["1"]),
    "similar blocks": lambda r: r["similar_blocks"]["re_attention"]["1"][0],
    "similarity, softmax": lambda r: statistics.mean(r["similarity"]["softmax"]["1"]),
    "similar blocks, softmax": lambda r: r["similar_blocks"]["softmax"]["1"][0],
}
FORMATS = dict(zip(COLUMNS, (".1f", ".3f", ".3f", ".1f", ".3f", ".1f"), strict=True))


def table(first: str, rows: dict[str, Records]) -> Iterator[str]:
    yield "| " + " | ".join((first, "seeds", *COLUMNS)) + " |"
    yield "|" + "---|" * (len(COLUMNS) + 2)
    for label, records in rows.items():
        if records:
            cells = (spread([column(r) for r in records], FORMATS[name]) for name, column in COLUMNS.items())
            yield "| " + " | ".join((label, str(len(records)), *cells)) + " |"


def report(chosen: Sequence[Setting], out: Path) -> None:
    """Tables, figures and one JSON of all runs."""
    records = load_runs(chosen, out / "runs")
    depths = sorted({r["setting"]["depth"] for r in records})
    deep = min(REMEDY_DEPTH, max(depths))
    by_depth = {
        f"{form}, {depth} blocks": select(records, form=form, depth=depth, **WHOLE)
        for form in FORMS
        for depth in depths
    }
    widths = {f"ViT, {dim} channels": select(records, form="ViT", depth=deep, dim=dim) for dim in WIDTHS}
    form = "DeepViT, batch norm"
    last = {f"last {n}": select(records, form=form, depth=deep, last=n) for n in LAST_BLOCKS}
    last["all"] = select(records, form=form, depth=deep, **WHOLE)
    last["none (the ViT)"] = select(records, form="ViT", depth=deep, **WHOLE)
    lines = ["## Depth", "", *table("model", by_depth)]
    lines += ["", f"## Wider embeddings, {deep} blocks", "", *table("model", widths)]
    lines += ["", f"## Re-attention in some of {deep} blocks, batch norm", "", *table("blocks", last)]
    (out / "study.md").write_text("\n".join(lines) + "\n")
    (out / "study.json").write_text(json.dumps(records) + "\n")

    def tensors(record: dict[str, Any], kind: str) -> dict[int, torch.Tensor]:
        return {int(k): torch.tensor(values) for k, values in record["similarity"][kind].items()}

    deepest = {form: select(records, form=form, depth=max(depths), seed=0, **WHOLE) for form in FORMS}
    shown = {form: found[0] for form, found in deepest.items() if found}
    panels = {form: tensors(record, "re_attention") for form, record in shown.items()}
    counts = {
        f"{form}{', softmax' * (kind == 'softmax')}": [
            (depth, *(statistics.mean(r["similar_blocks"][kind]["1"][i] for r in found) for i in range(2)))
            for depth in depths
            if (found := select(records, form=form, depth=depth, **WHOLE))
        ]
        for form in FORMS
        for kind in (KINDS if form != "ViT" else KINDS[:1])
    }
    heads = {
        f"{form}, block {record['deep_block']}": torch.tensor(record["head_similarity"]["re_attention"])
        for form, record in shown.items()
    }
    curves = {"training loss": {form: record["loss"] for form, record in shown.items()}}
    figures = {
        "similarity_by_depth": plots.plot_similarity(panels),
        "similar_blocks": plots.plot_similar_blocks({name: models for name, models in counts.items() if models}),
        "similar_heads": plots.plot_head_similarity(heads),
        "loss": plots.plot_curves(curves),
    }
    for name, figure in figures.items():
        plots.save_figure(figure, out, name)
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="folder (default out/study)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each (default 2)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every setting (default 3)")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images (default 15)")
    parser.add_argument("--quick", action="store_true", help="4 and 8 blocks, one seed, 2 epochs")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figures from what is there")
    args = parser.parse_args()
    for name in ("workers", "seeds", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    depths, seeds, epochs = ((4, 8), 1, 2) if args.quick else (DEPTHS, args.seeds, args.epochs)
    chosen = settings(depths, seeds, epochs)
    if not args.report:
        run_all(chosen, args.out / "runs", args.workers)
    if not load_runs(chosen, args.out / "runs"):
        parser.error(f"--report needs runs, and there are none in {args.out / 'runs'}")
    report(chosen, args.out)


if __name__ == "__main__":
    main()
