"""``python -m reattn.analysis``: numbers and figures of attention collapse for a model and a folder of images."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reattn
from reattn.analysis import plots
from reattn.analysis.attentions import MapKind
from reattn.analysis.collect import visit_attention_maps
from reattn.analysis.features import FeatureMaps, feature_maps, query_maps
from reattn.analysis.grid import TokenGrid, token_grid
from reattn.analysis.images import Preprocessing, UnreadableImageError, check_images, find_images, image_batches
from reattn.analysis.load import FORMS, Source, build_model, load_weights, parse_arguments
from reattn.analysis.measure import BlockInfo, Measurements, describe_blocks, measure_attention
from reattn.analysis.output import write_json
from reattn.analysis.rollout import attention_rollout
from reattn.analysis.similarity import at_distances, similar_blocks, similar_heads

BLOCK_THRESHOLD = 0.8
HEAD_THRESHOLD = 0.5
DISTANCES = (1, 2, 3)
SAMPLES = 4
RESULT = "analysis.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reattn.analysis", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help=f"a name of reattn.models.list_models(), or {FORMS}")
    parser.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the model other than its configuration's, such as img_size=384 norm=layer",
    )
    parser.add_argument("--checkpoint", type=Path, help="file with its weights; without one they are random")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, searched with its subfolders")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for the figures and {RESULT}")
    parser.add_argument("--device", default="auto", help="auto: cuda where there is one, else cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time")
    parser.add_argument("--limit", type=int, default=64, help="most images to read, evenly spread over the folder")
    parser.add_argument(
        "--blocks",
        type=int,
        nargs="+",
        help="blocks drawn one by one, negative ones counted from the end; heads are drawn for the last of them. "
        "Without it four, evenly spread. The numbers are always those of all blocks",
    )
    parser.add_argument(
        "--query", type=int, help="token whose maps are drawn; without it the class token, or else the middle patch"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help=f"{RESULT} of other models, drawn beside this one by depth",
    )
    return parser


class Run:
    """The arguments, checked, with what they stand for; anything that does not fit ends in ``parser.error``."""

    def __init__(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        self.args = args
        for name in ("batch_size", "limit"):
            if getattr(args, name) < 1:
                parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        if args.out.exists() and not args.out.is_dir():
            parser.error(f"--out must be a folder or not exist yet, got {args.out}")
        if args.checkpoint is not None and not args.checkpoint.is_file():
            parser.error(f"--checkpoint must be a file, got {args.checkpoint}")
        try:
            plots.new_figure(1, 1)
            import tqdm  # noqa: F401
        except ImportError as error:
            parser.error(f"{error}; everything it needs: pip install 'reattn[analysis]'")
        self.device = _device(parser, args.device)
        self.others = [_read_other(parser, path) for path in args.compare]
        try:
            self.paths = find_images(args.images, args.limit)
            check_images(self.paths)
        except (ImportError, ValueError) as error:
            parser.error(f"--images: {error}")
        source = self._source(parser)
        self.model, self.weights = source.model, str(args.checkpoint or source.weights or "random")
        try:
            self.preprocessing = source.preprocessing or Preprocessing.of(self.model)
            has_own = any(getattr(self.model, name, None) for name in ("pretrained_cfg", "default_cfg"))
            self.preprocessing_is_assumed = source.preprocessing is None and not has_own
            self.blocks, self.grid = self._try_out()
        except (ValueError, RuntimeError, AssertionError) as error:
            parser.error(f"--model: {args.model}: {error}")
        self.kinds: tuple[MapKind, ...] = ("softmax",)
        if any(block.mixes for block in self.blocks):
            self.kinds = ("re_attention", "softmax")
        self.selected = self._select_blocks(parser)
        self.query = args.query
        if self.query is None:
            middle = (self.grid.height // 2) * self.grid.width + self.grid.width // 2
            self.query = 0 if self.grid.num_prefix_tokens else middle
        if not 0 <= self.query < self.blocks[0].seqlen:
            parser.error(f"--query must be a token, at least 0 and below {self.blocks[0].seqlen}, got {self.query}")
        # Last, so that bad arguments leave no folder behind; a folder that cannot be written is known before measuring.
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.out):
                pass
        except OSError as error:
            parser.error(f"--out must be a folder that can be written, got {args.out}: {error}")

    def _source(self, parser: argparse.ArgumentParser) -> Source:
        args = self.args
        try:
            self.model_args = parse_arguments(args.model_args)
        except ValueError as error:
            parser.error(f"--model-args {error}")
        if args.checkpoint is not None and args.model.startswith("hf:"):
            parser.error("--checkpoint must not be given with --model hf:FOLDER: put the weights into the folder")
        torch.manual_seed(0)
        try:
            source = build_model(args.model, self.model_args)
        except (ImportError, ValueError, TypeError, RuntimeError, AssertionError) as error:
            if self.model_args:
                parser.error(f"--model and --model-args: {error}")
            parser.error(f"--model: {error}")
        if args.checkpoint is not None:
            try:
                load_weights(source.model, args.checkpoint)
            # What a damaged file raises depends on its format.
            except Exception as error:
                parser.error(f"--checkpoint: {args.checkpoint}: {error}")
        source.model.to(self.device).eval()
        return source

    def _try_out(self) -> tuple[list[BlockInfo], TokenGrid]:
        """The model's blocks, from forward passes with a random image."""
        size = self.preprocessing.height, self.preprocessing.width
        image = torch.randn(1, self.preprocessing.channels, *size, device=self.device)
        blocks = describe_blocks(self.model, image)
        first, second = self._last_rows(image), self._last_rows(image)
        if len(first) != len(second) or any(
            a.shape != b.shape or (a - b).abs().max() > 1e-3 * a.abs().max() for a, b in zip(first, second, strict=True)
        ):
            raise ValueError(
                "must see an image the same way each time, but draws at random in eval mode, as ViTMAE's masks do. "
                "Of ViTMAE a function def vit(): return transformers.ViTModel.from_pretrained(FOLDER), given as "
                "--model MODULE:vit, works"
            )
        shapes = {(block.heads, block.seqlen) for block in blocks}
        if len(blocks) < 2 or len(shapes) > 1:
            raise ValueError(
                "must have two attention blocks or more, all with as many heads and tokens, "
                f"got {len(blocks)} with (heads, tokens) {sorted(shapes)}"
            )
        return blocks, token_grid(self.model, blocks[0].seqlen, input_size=size)

    def _last_rows(self, image: Tensor) -> list[Tensor]:
        """The last token's row of each block's maps: another one where tokens are shuffled or masked."""
        rows: list[Tensor] = []
        visit_attention_maps(self.model, image, lambda maps: rows.append(maps[:, :, -1].clone()))
        return rows

    def _select_blocks(self, parser: argparse.ArgumentParser) -> list[int]:
        depth = len(self.blocks)
        if self.args.blocks is None:
            count = min(4, depth)
            return sorted({(depth - 1) * index // max(count - 1, 1) for index in range(count)})
        outside = [index for index in self.args.blocks if not -depth <= index < depth]
        if outside:
            parser.error(f"--blocks must lie in [{-depth}, {depth}) for {depth} blocks, got {outside}")
        return sorted({index % depth for index in self.args.blocks})


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # What a device that is not there raises depends on the build of torch.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device must be one that torch can use here, got {name!r}: {str(error).splitlines()[0]}")
    return device


def _read_other(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _count_points(record)
        _headline(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"--compare must be an {RESULT} of this command, got {path}: {type(error).__name__}: {error}")
    return record


def _count_points(record: dict[str, Any]) -> dict[str, tuple[int, int, float]]:
    """A model's points in the figure by depth: kind of attention -> (depth, number, share)."""
    points = {}
    for kind, numbers in record["maps"].items():
        similar = numbers["similar_blocks"]["1"]
        label = _label(kind, mixes="re_attention" in record["maps"])
        points[label] = (len(record["blocks"]), similar["number"], similar["share"])
    return points


def _label(kind: str, mixes: bool) -> str:
    if not mixes:
        return "plain attention"
    return "re-attention" if kind == "re_attention" else "before mixing"


def measure(run: Run) -> Measurements:
    from tqdm import tqdm

    batches = image_batches(run.paths, run.preprocessing, run.args.batch_size)
    # disable=None: a bar on a terminal, nothing in a log.
    with tqdm(total=len(run.paths), desc="images", unit="image", disable=None) as progress:
        return measure_attention(run.model, batches, run.kinds, progress=progress.update)


def summarize(measured: Measurements) -> dict[str, dict[str, Any]]:
    """The numbers of each kind of maps, as they stand in the JSON."""
    maps: dict[str, dict[str, Any]] = {}
    for kind, matrix in measured.blocks.items():
        similarities = at_distances(matrix, [distance for distance in DISTANCES if distance < len(matrix)])
        counts = similar_blocks(similarities, BLOCK_THRESHOLD)
        heads = [similar_heads(similarity, HEAD_THRESHOLD) for similarity in measured.heads[kind]]
        maps[kind] = {
            "block_similarity": {str(k): similarity for k, similarity in similarities.items()},
            "similar_blocks": {str(k): {"number": number, "share": share} for k, (number, share) in counts.items()},
            "similarity_matrix": matrix,
            "head_similarity": measured.heads[kind],
            "similar_heads": [{"number": number, "share": share} for number, share in heads],
            "token_similarity": measured.tokens[kind],
        }
    return maps


def look_at_samples(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first images' features, query maps and rollouts: the arguments of the figures, and numbers for the JSON."""
    paths = spread_over_folders(run.paths, SAMPLES)
    names = [_shown(path.relative_to(run.args.images)) for path in paths]
    images = next(image_batches(paths, run.preprocessing, SAMPLES)).to(run.device)
    shown = run.preprocessing.to_display(images).cpu()
    first, kind = images[:1], run.kinds[0]
    features: dict[int, FeatureMaps] = feature_maps(run.model, first, run.selected)
    rows = query_maps(run.model, first, run.query, run.selected, kind)
    rollouts: dict[str, Tensor] = {
        name: run.grid.to_image(attention_rollout(run.model, images, name)[:, run.query]) for name in run.kinds
    }
    mixes = len(run.kinds) > 1
    drawn = {
        "features": (shown[0], features),
        "query": (shown[0], rows, "", 0, run.grid.place(run.query)),
        "rollout": (
            shown,
            {_label(name, mixes): maps for name, maps in rollouts.items()},
            names,
            run.grid.place(run.query),
        ),
        "titles": {
            "feature_maps": f"Features of {names[0]}, maps times values",
            "query_maps": f"What {_token(run)} attends to in {names[0]}, {_label(kind, mixes)}",
            "similar_blocks": f"compared with {'; '.join(map(_headline, run.others))}" if run.others else "",
            "rollout": f"Where the attention of {_token(run)} comes from, through all blocks",
        },
    }
    numbers = {
        "files": [str(path) for path in paths],
        "query": run.query,
        "query_maps": {"maps": kind, "blocks": {index: maps[0] for index, maps in rows.items()}},
        "feature_strength": {
            index: {name: plots.feature_strength(getattr(maps, name))[0] for name in run.kinds}
            for index, maps in features.items()
        },
        "rollout": {"negative": "abs", "maps": rollouts},
    }
    return drawn, numbers


def draw(run: Run, measured: Measurements, record: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """The figures, by the names of their files."""
    mixes = len(run.kinds) > 1
    labels = {kind: _label(kind, mixes) for kind in run.kinds}
    points: dict[str, list[tuple[int, int, float]]] = {}
    models: dict[str, list[str]] = {}
    for other in (record, *run.others):
        for label, point in _count_points(other).items():
            points.setdefault(label, []).append(point)
            models.setdefault(label, []).append(_model_name(other))
    if run.others:
        points = {f"{label}: {_listed(models[label])}": each for label, each in points.items()}
    last = run.selected[-1]
    figures = {
        "similarity": plots.plot_similarity(
            {label: record["maps"][kind]["block_similarity"] for kind, label in labels.items()}, BLOCK_THRESHOLD
        ),
        "similar_blocks": plots.plot_similar_blocks(points, BLOCK_THRESHOLD),
        "similarity_matrix": plots.plot_similarity_matrix(
            {label: measured.blocks[kind] for kind, label in labels.items()}
        ),
        "head_similarity": plots.plot_head_similarity(
            {f"block {last}, {label}": measured.heads[kind][last] for kind, label in labels.items()}, HEAD_THRESHOLD
        ),
        "feature_maps": plots.plot_feature_maps(*drawn["features"]),
        "query_maps": plots.plot_query_maps(*drawn["query"]),
        "rollout": plots.plot_rollout(*drawn["rollout"]),
    }
    for name, figure in figures.items():
        of_samples = name in ("feature_maps", "query_maps", "rollout")
        plots.name_figure(figure, _headline(record, not of_samples), drawn["titles"].get(name, ""))
    return figures


def spread_over_folders(paths: Sequence[Path], count: int) -> list[Path]:
    """At most ``count`` of the paths, from as many folders as there are, such as one for each class."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    groups = list(folders.values())
    if len(groups) > count:
        groups = [groups[index * len(groups) // count] for index in range(count)]
    turns = [path for turn in zip_longest(*groups) for path in turn if path is not None]
    return turns[:count]


def _headline(record: dict[str, Any], all_images: bool = True) -> str:
    """What a figure is of: the model, its weights, how many images."""
    weights = ["random weights"] if record["weights"] == "random" else []
    number = [plots.counted(record["images"]["number"], "image")] if all_images else []
    return ", ".join([_model_name(record), *weights, *number])


def _model_name(record: dict[str, Any]) -> str:
    """A model's name in figures: of a folder the last part, and the arguments that it was built with."""
    form, colon, name = str(record.get("model", "unknown model")).partition(":")
    name = f"{form}:{Path(name).name}" if form == "hf" else f"{form}{colon}{name}"
    arguments = [f"{key}={value}" for key, value in record.get("model_args", {}).items()]
    return f"{name} ({', '.join(arguments)})" if arguments else name


def _listed(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")


def _shown(path: Path) -> str:
    """The end of a path that fits above a picture."""
    text = path.as_posix()
    return text if len(text) <= 28 else f"…{text[-27:]}"


def _token(run: Run) -> str:
    if run.query == 0 and run.grid.num_prefix_tokens:
        return "the class token"
    place = run.grid.place(run.query)
    return f"the patch in row {place[0]}, column {place[1]}" if place else f"token {run.query}"


def describe(run: Run, measured: Measurements) -> dict[str, Any]:
    """The JSON but for the samples."""
    args = run.args
    return {
        "reattn": reattn.__version__,
        "torch": str(torch.__version__),
        "model": args.model,
        "model_args": run.model_args,
        "weights": run.weights,
        "device": run.device.type,
        "images": {
            "folder": str(args.images),
            "number": measured.images,
            "files": [str(path.relative_to(args.images)) for path in run.paths],
            "preprocessing": asdict(run.preprocessing),
        },
        "thresholds": {"blocks": BLOCK_THRESHOLD, "heads": HEAD_THRESHOLD},
        "grid": asdict(run.grid),
        "blocks": [{"index": index, **asdict(block)} for index, block in enumerate(run.blocks)],
        "maps": summarize(measured),
    }


def print_summary(record: dict[str, Any]) -> None:
    images = plots.counted(record["images"]["number"], "image")
    print(f"{record['model']}, {plots.counted(len(record['blocks']), 'block')}, {images}")
    for kind, numbers in record["maps"].items():
        label = _label(kind, mixes="re_attention" in record["maps"])
        neighbours = numbers["block_similarity"]["1"].mean().item()
        similar = numbers["similar_blocks"]["1"]
        print(
            f"{label:16} similarity to the next block {neighbours:.3f} on average, "
            f"{plots.counted(similar['number'], 'block')} ({similar['share']:.0%}) above {BLOCK_THRESHOLD}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    run = Run(parser, parser.parse_args(argv))
    if run.weights == "random":
        print("No --checkpoint: the weights are random, and the numbers those of an untrained model.", file=sys.stderr)
    if run.preprocessing_is_assumed:
        print(f"How to prepare images is not known: {run.preprocessing}.", file=sys.stderr)
    try:
        measured = measure(run)
        drawn, samples = look_at_samples(run)
    except UnreadableImageError as error:
        # Its header was good and its pixels are not.
        parser.error(f"--images: {error}")
    record = describe(run, measured)
    figures = draw(run, measured, record, drawn)
    record["samples"] = samples
    record["figures"] = [
        path.name for name, figure in figures.items() for path in plots.save_figure(figure, run.args.out, name)
    ]
    # Last, so that it only ever speaks of figures that are there.
    write_json(record, run.args.out / RESULT)
    print_summary(record)
    print(f"Wrote {run.args.out / RESULT} and {len(record['figures'])} pictures beside it")


if __name__ == "__main__":
    main()
