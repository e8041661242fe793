"""Trains a small DeepViT and the plain ViT of the same shape on handwritten digits, and compares their attention maps.

The images are real, 8x8 pixels, and come with scikit-learn. Prints the test accuracy of both models and how alike the
attention maps of neighbouring blocks are (DeepViT, arXiv 2103.11886, section 3); writes the curves to digits.png and
all numbers to digits.json. Two runs with the same arguments on one CPU give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import sklearn
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

import reattn
from reattn.analysis import block_similarity, similar_blocks
from reattn.backends import choose
from reattn.models import DeepViT
from reattn.problem import Problem

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

IMAGE_SIZE = 8
BACKGROUND = -1.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25, help="passes over the training images")
    parser.add_argument("--depth", type=int, default=8, help="blocks, at least 2")
    parser.add_argument("--dim", type=int, default=64, help="channels of a token")
    parser.add_argument("--heads", type=int, default=8, help="heads; dim must divide by them")
    parser.add_argument("--patch-size", type=int, default=2, choices=(2, 4), help="side of a patch in pixels")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and shifts; the split never changes")
    parser.add_argument("--device", default="auto", help="auto: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU; more only help on an idle machine")
    parser.add_argument("--norm", default="batch", choices=("batch", "layer", "none"), help="norm of the mixed maps")
    parser.add_argument("--backend", default="auto", help="of re-attention; REATTN_BACKEND replaces auto")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for digits.png and digits.json")
    parser.add_argument("--quick", action="store_true", help="2 epochs with 2 blocks, to see that everything runs")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.depth = 2, 2
    for name, least in (("epochs", 1), ("depth", 2), ("batch_size", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.backend == "auto":
        args.backend = os.environ.get("REATTN_BACKEND", "auto")
    return args


def load_images(device: str) -> list[Tensor]:
    """Training images, their labels, test images, their labels: images ``(batch, 1, 8, 8)`` in [-1, 1]."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target)
    splits = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return [tensor[split].to(device) for split in splits for tensor in (images, labels)]


def random_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image by -1, 0 or 1 pixels along either axis; what comes in is background."""
    shift = torch.randint(3, (2, len(images), 1), generator=generator)
    rows, columns = (shift + torch.arange(IMAGE_SIZE)).to(images.device)
    padded = F.pad(images.squeeze(1), (1, 1, 1, 1), value=BACKGROUND)
    index = torch.arange(len(images), device=images.device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def build_model(attention: str, args: argparse.Namespace) -> DeepViT:
    torch.manual_seed(args.seed)
    model = DeepViT(
        img_size=IMAGE_SIZE,
        patch_size=args.patch_size,
        in_chans=1,
        num_classes=10,
        embed_dim=args.dim,
        depth=args.depth,
        num_heads=args.heads,
        attention=attention,
        norm=None if args.norm == "none" else args.norm,
        # With 1437 images to learn from, plain patches take several times as many epochs.
        conv_stem=True,
        backend=args.backend,
    )
    return model.to(args.device)


def train(
    name: str,
    model: DeepViT,
    images: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
    after_epoch: Callable[[], None] = lambda: None,
) -> list[float]:
    """AdamW, warm-up and cosine decay; returns the mean training loss of every epoch."""
    generator = torch.Generator().manual_seed(args.seed)
    by_decay: dict[float, list[Tensor]] = {0.05: [], 0.0: []}
    for key, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or key in model.no_weight_decay()
        by_decay[0.0 if exempt else 0.05].append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps = args.epochs * math.ceil(len(labels) / args.batch_size)
    warmup = max(1, steps // 10)

    def learning_rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    losses = []
    # disable=None: a bar on a terminal, nothing in a log.
    with tqdm(total=steps, desc=name, unit="step", disable=None) as progress:
        for _ in range(args.epochs):
            total = 0.0
            model.train()
            for batch in torch.randperm(len(labels), generator=generator).to(images.device).split(args.batch_size):
                logits = model(random_shift(images[batch], generator))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(batch)
                progress.update()
            losses.append(total / len(labels))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            after_epoch()
    return losses


@torch.no_grad()
def accuracy(model: DeepViT, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(dim=1) == labels).double().mean().item()


def train_and_measure(name: str, attention: str, data: list[Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """What digits.json says of one model."""
    train_images, train_labels, test_images, test_labels = data
    model = build_model(attention, args)
    start = time.perf_counter()
    losses = train(name, model, train_images, train_labels, args)
    seconds = time.perf_counter() - start
    similarities = block_similarity(model, test_images)
    number, share = similar_blocks(similarities)[1]
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": seconds,
        "loss": losses,
        "test_accuracy": accuracy(model, test_images, test_labels),
        "similarity": similarities[1].tolist(),
        "similarity_before_mixing": block_similarity(model, test_images, kind="softmax")[1].tolist(),
        "similar_blocks": {"number": number, "share": share},
    }


def backend_in_use(args: argparse.Namespace) -> str:
    """What every call of re-attention will choose; raises, with the reasons, when the backend asked for cannot run."""
    device = torch.empty(0, device=args.device).device
    head_dim = args.dim // args.heads
    problem = Problem(device, torch.float32, args.heads, head_dim)
    return choose(args.backend, problem, f"{args.heads} heads, head_dim {head_dim}")


def print_run(backend: str, args: argparse.Namespace) -> None:
    where = args.device
    if where == "cpu":
        where += f", threads: {torch.get_num_threads()}"
    elif where.startswith("cuda"):
        where += f", {torch.cuda.get_device_name(where)}"
    reasons = [f"{name}: {', '.join(why)}" for name, why in reattn.available_backends().items() if why]
    print(f"device   {where}")
    print(f"backend  {backend} (asked for: {args.backend})" + "".join(f"; not {reason}" for reason in reasons))


def print_results(models: dict[str, dict[str, Any]], test_images: int) -> None:
    deepvit, vit = models["deepvit"], models["vit"]
    print(f"\n{'':12}{'test accuracy':>15}{'last loss':>12}{'parameters':>13}{'training':>12}")
    for model in (deepvit, vit):
        print(
            f"{model['name']:12}{model['test_accuracy']:>15.1%}{model['loss'][-1]:>12.3f}"
            f"{model['parameters']:>13,}{model['training_seconds']:>10.1f} s"
        )
    print(f"\nSimilarity of neighbouring blocks' attention maps: mean cosine of columns, {test_images} test images")
    print(f"{'blocks':12}{'DeepViT':>15}{'plain ViT':>12}{'DeepViT before mixing':>24}")
    columns = (deepvit["similarity"], vit["similarity"], deepvit["similarity_before_mixing"])
    rows = [(f"{first}, {first + 1}", row) for first, row in enumerate(zip(*columns, strict=True), start=1)]
    rows.append(("mean", tuple(sum(column) / len(column) for column in columns)))
    for label, (re_attention, plain, before) in rows:
        print(f"{label:12}{re_attention:>15.3f}{plain:>12.3f}{before:>24.3f}")
    counts = [f"{model['similar_blocks']['number']} in the {model['name']}" for model in (deepvit, vit)]
    print(f"Of {len(deepvit['similarity']) + 1} blocks, similar to the next (above 0.8): {', '.join(counts)}")


def plot(models: dict[str, dict[str, Any]], path: Path) -> None:
    deepvit, vit = models["deepvit"], models["vit"]
    styles = {
        "DeepViT": {"color": "#0b3c7d", "linestyle": "-", "marker": "o"},
        "plain ViT": {"color": "#e07b00", "linestyle": "--", "marker": "s"},
        "DeepViT, before mixing": {"color": "#6f6f6f", "linestyle": ":", "marker": "^"},
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for model in (deepvit, vit):
        label = f"{model['name']} ({model['test_accuracy']:.1%} test accuracy)"
        epochs = range(1, len(model["loss"]) + 1)
        left.plot(epochs, model["loss"], label=label, markevery=max(1, len(epochs) // 12), **styles[model["name"]])
    left.set(xlabel="epoch", ylabel="training loss", title="Training on handwritten digits")
    left.set_ylim(bottom=0)

    curves = {
        "DeepViT": deepvit["similarity"],
        "plain ViT": vit["similarity"],
        "DeepViT, before mixing": deepvit["similarity_before_mixing"],
    }
    for label, similarity in curves.items():
        right.plot(range(1, len(similarity) + 1), similarity, label=label, **styles[label])
    right.axhline(0.8, color="0.5", linewidth=0.8, zorder=0, label="similar above 0.8")
    right.set(xlabel="block", ylabel="mean cosine of columns", title="Attention maps: similarity to the next block's")
    right.set_ylim(min(-0.25, *deepvit["similarity"]) - 0.05, 1.05)
    right.set_xticks(range(1, len(vit["similarity"]) + 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    args = parse_arguments()
    # A second thread makes steps this small a third faster on an idle machine; where another process has its core, each
    # operator waits for it, and training takes many times as long.
    torch.set_num_threads(args.threads)
    backend = backend_in_use(args)
    print_run(backend, args)
    data = load_images(args.device)
    models = {
        key: train_and_measure(name, attention, data, args)
        for key, name, attention in (("deepvit", "DeepViT", "re"), ("vit", "plain ViT", "self"))
    }
    print_results(models, test_images=len(data[3]))
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "backend": backend,
        "device": args.device,
        "versions": {module.__name__: str(module.__version__) for module in (reattn, torch, sklearn)},
        "images": {"train": len(data[1]), "test": len(data[3])},
        "models": models,
    }
    (args.out / "digits.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(models, args.out / "digits.png")
    print(f"\nWrote {args.out / 'digits.png'} and {args.out / 'digits.json'}")


if __name__ == "__main__":
    main()
