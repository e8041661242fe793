"""Do attention maps of deep ViTs grow alike, and does re-attention keep them apart? DeepViT's analysis on real images.

Trains plain ViTs and DeepViTs (batch norm, layer norm) of 8, 16, 24 and 32 blocks on scikit-learn's handwritten digits,
every model with the same recipe and several seeds, and measures what the paper (arXiv 2103.11886, section 3) measures:
the accuracy, and how many blocks have attention maps like those of the next. Also the paper's first remedy, wider
embeddings, and re-attention in the last blocks alone.

    python examples/collapse_study.py --out out/study            # 45 minutes on two cores
    python examples/collapse_study.py --out out/study --quick    # a minute: that everything runs

Every run leaves a JSON of its own in OUT/runs; what is there already is not run again, so a study that was interrupted
goes on where it stopped. At the end, or with --report alone, the tables and figures are made from all of them:
OUT/study.md, OUT/study.json and the pictures.
"""

from __future__ import annotations

import argparse
import json
import math
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
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import reattn
from reattn.analysis import (
    MapKind,
    block_similarity,
    column_similarity,
    feature_maps,
    head_similarity,
    plots,
    similar_blocks,
    token_similarity,
    visit_attention_maps,
)
from reattn.analysis.plots import feature_strength
from reattn.models import DeepViT

DEPTHS = (8, 16, 24, 32)
DISTANCES = (1, 2, 3)
# The maps that values are multiplied with, and the softmax alone, which compares re-attention with plain attention like
# with like: centring by a norm lowers a cosine by itself.
KINDS: tuple[MapKind, ...] = ("re_attention", "softmax")
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


def pattern_similarity(model: DeepViT, images: Tensor, kind: MapKind) -> list[float]:
    """Similarity of each block's maps to the next's, of what is left of a column without its mean.

    That is the columns' correlation: near 0 for maps that are spread evenly with noise on top, which the cosine
    calls alike. Unchanged by what batch norm subtracts, one constant for each head, so that those maps and softmax maps
    compare like with like; not so for layer norm over the heads.
    """
    similarities: list[float] = []
    previous: list[Tensor] = []

    def visit(maps: Tensor) -> None:
        centred = maps - maps.mean(dim=-2, keepdim=True)
        if previous:
            similarities.append(column_similarity(previous.pop(), centred).mean().item())
        previous.append(centred)

    visit_attention_maps(model, images, visit, kind)
    return similarities


def evenness(model: DeepViT, images: Tensor) -> list[float]:
    """How evenly each block's softmax maps are spread: their entropy relative to the highest, 1 for a plain average."""
    values: list[float] = []

    def visit(maps: Tensor) -> None:
        values.append(torch.special.entr(maps).sum(dim=-1).mean().item() / math.log(maps.shape[-1]))

    visit_attention_maps(model, images, visit, "softmax")
    return values


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
    accuracies: list[float] = []
    losses = digits.train(
        setting.name,
        model,
        train_images,
        train_labels,
        recipe,
        lambda: accuracies.append(digits.accuracy(model, test_images, test_labels)),
    )
    seconds = time.perf_counter() - start
    similarity = {kind: block_similarity(model, test_images, DISTANCES, kind) for kind in KINDS}
    deep = 3 * setting.depth // 4
    shown = sorted({0, setting.depth // 4, setting.depth // 2, deep, setting.depth - 1})
    features = feature_maps(model, test_images)
    record = {
        "setting": asdict(setting),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": seconds,
        "loss": losses,
        "test_accuracy": accuracies,
        "similarity": {kind: {k: s.tolist() for k, s in by.items()} for kind, by in similarity.items()},
        "pattern_similarity": {kind: pattern_similarity(model, test_images, kind) for kind in KINDS},
        "evenness": evenness(model, test_images),
        "token_similarity": [
            token_similarity(maps.re_attention.flatten(2).mT).mean().item() for maps in features.values()
        ],
        "similar_blocks": {kind: similar_blocks(by) for kind, by in similarity.items()},
        "deep_block": deep,
        "head_similarity": {kind: head_similarity(model, test_images, kind)[deep].tolist() for kind in KINDS},
        "image": test_images[0, 0].tolist(),
        "feature_strength": {
            block: [
                feature_strength(maps)[0].tolist() for maps in (features[block].re_attention, features[block].softmax)
            ]
            for block in shown
        },
        "versions": {module.__name__: str(module.__version__) for module in (reattn, torch)},
    }
    path = folder / f"{setting.name}.json"
    partial = path.with_suffix(".partial")
    rounded = json.loads(json.dumps(record), parse_float=lambda number: round(float(number), 5))
    partial.write_text(json.dumps(rounded) + "\n")
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


def mean_of(record: dict[str, Any], measure: str, kind: MapKind) -> float:
    """Over the blocks, with the next one where blocks are compared."""
    values = record[measure][kind]
    return statistics.mean(values["1"] if isinstance(values, dict) else values)


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "test accuracy, %": (".1f", lambda r: 100 * r["test_accuracy"][-1]),
    "similarity": (".3f", lambda r: mean_of(r, "similarity", "re_attention")),
    "similar blocks": (".1f", lambda r: r["similar_blocks"]["re_attention"]["1"][0]),
    "pattern similarity": (".3f", lambda r: mean_of(r, "pattern_similarity", "re_attention")),
    "softmax similarity": (".3f", lambda r: mean_of(r, "similarity", "softmax")),
    "softmax similar blocks": (".1f", lambda r: r["similar_blocks"]["softmax"]["1"][0]),
    "softmax pattern similarity": (".3f", lambda r: mean_of(r, "pattern_similarity", "softmax")),
    "softmax evenness": (".3f", lambda r: statistics.mean(r["evenness"])),
    "token similarity": (".3f", lambda r: statistics.mean(r["token_similarity"])),
}


def table(first: str, rows: dict[str, Records]) -> Iterator[str]:
    yield "| " + " | ".join((first, "seeds", *COLUMNS)) + " |"
    yield "|" + "---|" * (len(COLUMNS) + 2)
    for label, records in rows.items():
        if records:
            cells = (spread([column(r) for r in records], form) for form, column in COLUMNS.values())
            yield "| " + " | ".join((label, str(len(records)), *cells)) + " |"


def tables(records: Records) -> list[str]:
    """The study's tables as lines of Markdown."""
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
    return lines


def figures(records: Records) -> dict[str, Figure]:
    """The study's figures by name; those of single models show the deepest, of the first seed."""
    depths = sorted({r["setting"]["depth"] for r in records})
    shown = {}
    for form in FORMS:
        if found := select(records, form=form, depth=max(depths), seed=0, **WHOLE):
            shown[form] = found[0]
    similarities = {
        form: {int(k): torch.tensor(values) for k, values in record["similarity"]["re_attention"].items()}
        for form, record in shown.items()
    }
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
    strengths = {}
    for form, record in shown.items():
        for row, label in enumerate((form, f"{form},\nmaps unmixed")[: 1 if form == "ViT" else 2]):
            strengths[label] = {int(k): torch.tensor(both[row]) for k, both in record["feature_strength"].items()}
    image = (torch.tensor(next(iter(shown.values()))["image"])[None] + 1) / 2
    by_block = {
        "pattern similarity to the next": {
            form: record["pattern_similarity"]["re_attention"] for form, record in shown.items()
        },
        "evenness of the softmax": {form: record["evenness"] for form, record in shown.items()},
        "token similarity": {form: record["token_similarity"] for form, record in shown.items()},
    }
    training = {
        "training loss": {form: record["loss"] for form, record in shown.items()},
        "test accuracy": {form: record["test_accuracy"] for form, record in shown.items()},
    }
    return {
        "similarity_by_depth": plots.plot_similarity(similarities),
        "similar_blocks": plots.plot_similar_blocks({name: models for name, models in counts.items() if models}),
        "similar_heads": plots.plot_head_similarity(heads),
        "feature_maps": plots.plot_feature_strengths(image, strengths),
        "by_block": plots.plot_curves(by_block, xlabel="block", first=0),
        "training": plots.plot_curves(training),
    }


def report(records: Records, out: Path) -> None:
    """Tables, figures and one JSON of all runs."""
    lines = tables(records)
    (out / "study.md").write_text("\n".join(lines) + "\n")
    runs = ",\n".join(json.dumps(record) for record in records)
    (out / "study.json").write_text(f"[\n{runs}\n]\n")
    for name, figure in figures(records).items():
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
    records = load_runs(chosen, args.out / "runs")
    if not records:
        parser.error(f"--report needs runs, and there are none in {args.out / 'runs'}")
    report(records, args.out)


if __name__ == "__main__":
    main()
