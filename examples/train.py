r"""Trains a DeepViT or a plain ViT on handwritten digits or a folder of images, on one process or many.

There is no engine here, only torch's own pieces: torchrun, DistributedDataParallel or FSDP2, autocast, GradScaler,
gradient checkpointing, torch.compile, AveragedModel. A run that is killed at any moment goes on with --resume, and ends
with the numbers of one that was not. --batch-size is the batch of all processes together, so that a run gives the same
result, up to rounding, on any number of them.

One process; two on one machine; two machines of eight GPUs each, the command being the same on both:

    python examples/train.py
    torchrun --standalone --nproc-per-node 2 examples/train.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 examples/train.py \
        --data IMAGENET --model deepvit_s --epochs 300 --batch-size 1024 --lr 1e-3 --drop-path 0.2 \
        --label-smoothing 0.1 --amp bf16 --ema-decay 0.9999 --workers 8 --out SHARED_FOLDER --resume

--out receives checkpoint.pt, log.csv, results.json and, where TensorBoard is installed, its files.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import reattn
from reattn import ReAttention, reference
from reattn.backends import choose
from reattn.losses import map_similarity
from reattn.models import DeepViT, create_model, list_models
from reattn.problem import Problem

# The model of examples/digits.py.
SMALL = {"embed_dim": 64, "depth": 8, "num_heads": 8, "conv_stem": True}
DIGIT_SIZE = 8
BACKGROUND = -1.0
AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Arguments that a resumed run may change: they leave the result as it is, up to rounding.
FREE = {"out", "resume", "workers", "threads", "checkpoint_every", "device", "backend", "fsdp", "compile"}
FREE |= {"grad_checkpointing"}


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, and the device it has; torchrun says so in the environment."""

    rank: int
    world: int
    device: torch.device


@dataclass
class Run:
    """All that a checkpoint holds. ``engine`` is what training calls: ``model`` itself, or what wraps it."""

    model: DeepViT
    engine: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    loss: Tensor  # sum over this process's images of the epoch so far
    epoch: int = 0
    step: int = 0  # within the epoch
    history: list[dict[str, Any]] = field(default_factory=list)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, or a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    add("--image-size", type=int, help="side of a folder's images in pixels; else as the model has it")
    add("--model", default="small", help=f"small, the model of digits.py, or one of {', '.join(list_models())}")
    add("--dim", type=int, help="channels of a token, in place of the model's")
    add("--depth", type=int, help="blocks, in place of the model's")
    add("--heads", type=int, help="heads, in place of the model's; dim must divide by them")
    add("--patch-size", type=int, help="side of a patch, in place of the model's (small: 2, for a folder 16)")
    add("--attention", default="re", choices=("re", "self"), help="self: the plain ViT of the same shape")
    add("--norm", default="batch", choices=("batch", "layer", "none"), help="norm of the mixed maps")
    add("--backend", default="auto", help="of re-attention; REATTN_BACKEND replaces auto")
    add("--epochs", type=int, default=25, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="images of a step, of all processes together")
    add("--lr", type=float, default=1.5e-3, help="highest learning rate of AdamW")
    add("--adam-eps", type=float, default=1e-8, help="eps of AdamW")
    add("--weight-decay", type=float, default=0.05, help="of matrices; biases, norms and positions have none")
    add("--warmup", type=float, default=0.1, help="share of all steps in which the rate rises, before its cosine decay")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end of the cosine decay")
    add("--cooldown", type=float, default=0.0, help="share of all steps, at the end, with --min-lr")
    add("--label-smoothing", type=float, default=0.05, help="of the training loss")
    add("--aa", help="AutoAugment policy of timm for a folder's images, such as rand-m9-mstd0.5-inc1; needs timm")
    add("--reprob", type=float, default=0.0, help="share of a folder's images with a random part erased; needs timm")
    add("--mixup", type=float, default=0.0, help="alpha of MixUp, 0 for none; beside --cutmix each step draws one")
    add("--cutmix", type=float, default=0.0, help="alpha of CutMix, 0 for none; both need torchvision")
    add("--similarity", type=float, default=0.0, help="weight of the cosine of adjacent blocks' maps in the loss")
    add("--similarity-pairs", type=int, help="pairs of blocks that --similarity compares, from the first on; else all")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of the last block")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 leaves it")
    add("--ema-decay", type=float, default=0.99, help="of the averaged model, less in the first steps; 0 for none")
    add("--amp", default="off", choices=tuple(AMP_DTYPES), help="autocast to 16 bits; fp16 with a GradScaler")
    add("--grad-checkpointing", action="store_true", help="recompute blocks in the backward pass, to save memory")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--fsdp", action="store_true", help="shard by FSDP2 instead of DistributedDataParallel; needs torchrun")
    add("--seed", type=int, default=0, help="of weights, batches and augmentation")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is one, else cpu")
    add("--threads", type=int, default=1, help="of torch on the CPU, in each process")
    add("--workers", type=int, default=0, help="processes that load images, for each process that trains")
    add("--out", type=Path, default=Path("out/train"), help="folder for what is written, the same for all processes")
    add("--checkpoint-every", type=int, default=100, help="steps; at the end of an epoch there is always one")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    args = parser.parse_args(arguments)
    check_arguments(args, parser)
    return args


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Whatever is wrong with the arguments is said before anything runs."""
    counts = ("epochs", "batch_size", "threads", "checkpoint_every")
    for name in (*counts, "image_size", "dim", "depth", "heads", "patch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name, low, high in (
        *((name, 0.0, math.inf) for name in ("weight_decay", "clip", "workers", "mixup", "cutmix", "similarity")),
        *((name, 0.0, 1.0) for name in ("warmup", "cooldown", "label_smoothing", "reprob", "drop_path", "ema_decay")),
    ):
        # Written so that nan is refused, too.
        if not low <= getattr(args, name) < high:
            parser.error(f"--{name.replace('_', '-')} must lie in [{low:g}, {high:g}), got {getattr(args, name)}")
    for name in ("lr", "adam_eps"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if not 0 <= args.min_lr <= args.lr:
        parser.error(f"--min-lr must lie in [0, {args.lr:g}], the range of --lr, got {args.min_lr}")
    if args.warmup + args.cooldown >= 1:
        parser.error(f"--warmup and --cooldown must leave steps between them, got {args.warmup} and {args.cooldown}")
    if args.similarity_pairs is not None and not args.similarity:
        parser.error(f"--similarity-pairs is for --similarity, which is 0, got {args.similarity_pairs}")
    if args.similarity and (args.compile or args.fsdp):
        parser.error("--similarity computes maps beside the forward pass: not with --compile or --fsdp")
    if args.model != "small" and args.model not in list_models():
        parser.error(f"--model must be small or one of {', '.join(list_models())}, got {args.model!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp shards over processes: start it by torchrun")
    if args.data == "digits":
        if args.image_size is not None:
            parser.error(f"--image-size is for folders: digits have {DIGIT_SIZE} pixels a side, got {args.image_size}")
        if args.aa is not None or args.reprob:
            parser.error("--aa and --reprob are for folders of images, got --data digits")
        if importlib.util.find_spec("sklearn") is None:
            parser.error("--data digits needs scikit-learn, which is not installed")
    else:
        for part in ("train", "val"):
            if not Path(args.data, part).is_dir():
                parser.error(f"--data must be digits or a folder with train/ and val/, got {args.data}: no {part}/")
        if importlib.util.find_spec("torchvision") is None:
            parser.error("--data with a folder of images needs torchvision, which is not installed")
        if (args.aa is not None or args.reprob) and importlib.util.find_spec("timm") is None:
            parser.error("--aa and --reprob need timm, which is not installed")
    if (args.mixup or args.cutmix) and importlib.util.find_spec("torchvision") is None:
        parser.error("--mixup and --cutmix need torchvision, which is not installed")
    if not args.resume and checkpoint_path(args).exists():
        parser.error(f"--out holds {checkpoint_path(args)}: --resume goes on from it; else choose another folder")
    try:
        # On the meta device: what the model says of its arguments, without its weights.
        with torch.device("meta"):
            model = build_model(args, classes=2)
            chosen_backend(model, args)
            if args.similarity:
                with map_similarity(model, args.similarity_pairs):
                    pass
    except (ValueError, RuntimeError) as error:
        parser.error(f"no such model can be trained: {error}")


def checkpoint_path(args: argparse.Namespace) -> Path:
    return args.out / "checkpoint.pt"


def device_kind(args: argparse.Namespace) -> str:
    return args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def chosen_backend(model: DeepViT, args: argparse.Namespace) -> str | None:
    """What every call of re-attention will choose; raises, with the reasons, when the backend asked for cannot run."""
    attention = next((module for module in model.modules() if isinstance(module, ReAttention)), None)
    if attention is None:
        return None
    # The context of the meta device must not decide where the backend is to run.
    device = torch.device(device_kind(args))
    problem = Problem(device, AMP_DTYPES[args.amp], attention.num_heads, attention.head_dim)
    return choose(args.backend, problem, f"{problem.heads} heads, head_dim {problem.head_dim}")


def join(args: argparse.Namespace) -> Place:
    """This process's place; under torchrun it meets the others here."""
    kind, local_rank = device_kind(args), int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if "RANK" not in os.environ:
        return Place(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Place(dist.get_rank(), dist.get_world_size(), device)


# Data. What is random is a function of the seed, the epoch and the image, never of the process that has the image.


def derived_seed(*parts: int) -> int:
    # By way of a string, which Python's own generator hashes the same way in every release and process.
    return random.Random(repr(parts)).getrandbits(63)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Every generator that augmentation draws from, the GPUs' excepted; afterwards they are as they were."""
    seed, state, numpy_state = derived_seed(*parts), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            # Not torch.manual_seed, which would seed the GPUs as well.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


class SeededDataset(Dataset):
    """Images under keys ``(index, epoch)``, from which the randomness of ``transform`` follows."""

    def __init__(self, source: Sequence[tuple[Any, int]], transform: Callable[[Any], Tensor], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, epoch = key
        image, label = self.source[index]
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


def random_shift(image: Tensor) -> Tensor:
    """Moves an image by -1, 0 or 1 pixels along either axis; what comes in is background."""
    row, column = torch.randint(3, (2,)).tolist()
    padded = F.pad(image, (1, 1, 1, 1), value=BACKGROUND)
    return padded[:, row : row + DIGIT_SIZE, column : column + DIGIT_SIZE]


def load_digit_data(args: argparse.Namespace) -> tuple[SeededDataset, SeededDataset, int]:
    """Training and test images, split as in digits.py, and the number of classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = digits.target.tolist()
    split = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, test = ([(images[index], labels[index]) for index in part.tolist()] for part in split)
    return SeededDataset(train, random_shift, args.seed), SeededDataset(test, nn.Identity(), args.seed), 10


def load_folder_data(args: argparse.Namespace) -> tuple[SeededDataset, SeededDataset, int]:
    from torchvision import datasets, transforms

    with torch.device("meta"):
        config = build_model(args, classes=2).default_cfg
    size, bicubic = config["input_size"][1], transforms.InterpolationMode.BICUBIC
    to_tensor = [transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])]
    crop = [transforms.RandomResizedCrop(size, interpolation=bicubic), transforms.RandomHorizontalFlip()]
    augment = transforms.Compose(crop + to_tensor)
    if args.aa is not None or args.reprob:
        from timm.data import create_transform

        augment = create_transform(
            size,
            is_training=True,
            auto_augment=args.aa,
            color_jitter=None,
            re_prob=args.reprob,
            re_mode="pixel",
            interpolation="random",
            mean=config["mean"],
            std=config["std"],
        )
    centre = [transforms.Resize(int(size / config["crop_pct"]), interpolation=bicubic), transforms.CenterCrop(size)]
    train, test = (datasets.ImageFolder(str(Path(args.data, part))) for part in ("train", "val"))
    if train.classes != test.classes:
        raise SystemExit(f"--data: train/ and val/ must hold the same classes, got {args.data}")
    return (
        SeededDataset(train, augment, args.seed),
        SeededDataset(test, transforms.Compose(centre + to_tensor), args.seed),
        len(train.classes),
    )


def split_batches(count: int, args: argparse.Namespace, place: Place, epoch: int | None) -> list[list[tuple[int, int]]]:
    """This process's share of every batch of an epoch, in keys of SeededDataset; epoch None keeps the order.

    Each process takes every so many-th image of a batch. Where the processes do not divide it, as often in the last
    one, some have an image less than others, or none at all: the loss is weighed by images, so nothing is lost.
    """
    order = torch.arange(count)
    if epoch is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(args.seed, epoch)))
    parts = [batch[place.rank :: place.world].tolist() for batch in order.split(args.batch_size)]
    return [[(index, epoch or 0) for index in part] for part in parts]


def collate(examples: list[tuple[Tensor, int]], shape: tuple[int, ...]) -> Any:
    return default_collate(examples) if examples else [torch.empty(0, *shape), torch.empty(0, dtype=torch.long)]


def make_loader(dataset: SeededDataset, batches: list[Any], run: Run, args: argparse.Namespace) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=functools.partial(collate, shape=(run.model.in_chans, *run.model.img_size)),
        num_workers=args.workers,
        pin_memory=run.loss.device.type == "cuda",
        # A loader draws a seed for its workers. Drawn from the global generator, it would shift drop path in a run that
        # resumes, which makes one loader more.
        generator=torch.Generator(),
    )


# The model and what goes with it.


def build_model(args: argparse.Namespace, classes: int) -> DeepViT:
    digits = args.data == "digits"
    sizes = {"embed_dim": args.dim, "depth": args.depth, "num_heads": args.heads, "patch_size": args.patch_size}
    overrides: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if digits:
        overrides |= {"img_size": DIGIT_SIZE, "in_chans": 1}
    elif args.image_size is not None:
        overrides["img_size"] = args.image_size
    overrides |= {"num_classes": classes, "attention": args.attention, "backend": args.backend}
    overrides |= {"norm": None if args.norm == "none" else args.norm, "drop_path_rate": args.drop_path}
    if args.model == "small":
        return DeepViT(**{**SMALL, "patch_size": 2 if digits else 16, **overrides})
    return create_model(args.model, **overrides)


class CpuSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm for the convolutional stem on a CPU, where its own forward refuses to run. Those in ReAttention
    stay as they are: re-attention synchronises its statistics itself, on any device."""

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training:
            return super().forward(maps)
        self.num_batches_tracked.add_(1)
        return reference.batch_norm(
            maps.float(),  # under autocast too, as every batch norm
            (self.running_mean, self.running_var),
            (self.weight, self.bias),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
            group=dist.group.WORLD,
        )


def synchronise_norms(model: nn.Module, device: torch.device) -> None:
    """Batch statistics over all processes from now on; parameters and buffers stay the same tensors."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if device.type == "cpu":
        fused = {module.head_norm for module in model.modules() if isinstance(module, ReAttention)}
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm) and module not in fused:
                module.__class__ = CpuSyncBatchNorm


def shard(model: DeepViT, place: Place) -> None:
    mesh = init_device_mesh(place.device.type, (place.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # By default the outermost parameters would stay whole after an evaluation, where no backward pass follows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def distribute(model: DeepViT, ema: AveragedModel | None, args: argparse.Namespace, place: Place) -> nn.Module:
    """What training is to call."""
    if args.fsdp:
        synchronise_norms(model, place.device)
        shard(model, place)
        if ema is not None:
            shard(ema.module, place)
        return model
    if place.world == 1:
        return model
    engine = DistributedDataParallel(model, device_ids=[place.device] if place.device.type == "cuda" else None)
    # Only now: DistributedDataParallel would refuse a SyncBatchNorm on a CPU for the sake of the forward replaced here.
    synchronise_norms(model, place.device)
    return engine


def build_run(args: argparse.Namespace, classes: int, steps_of_epoch: int, place: Place) -> Run:
    torch.manual_seed(args.seed)
    model = build_model(args, classes).to(place.device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    # With its buffers: running statistics belong to the weights that they were taken with.
    ema = AveragedModel(model, use_buffers=True).eval() if args.ema_decay else None
    # The weights were the same everywhere; drop path is not to be.
    torch.manual_seed(derived_seed(args.seed, place.rank))
    engine = distribute(model, ema, args, place)
    if args.compile:
        engine.compile()
    by_decay: dict[float, list[Tensor]] = {args.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name in model.no_weight_decay()
        by_decay[0.0 if exempt else args.weight_decay].append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=args.adam_eps)
    steps = args.epochs * steps_of_epoch
    warmup, end, least = max(1, round(args.warmup * steps)), steps - round(args.cooldown * steps), args.min_lr / args.lr

    def learning_rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        cosine = math.cos(math.pi * (min(step, end) - warmup) / max(1, end - warmup))
        return least + (1 - least) * (0.5 + 0.5 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    scaler = torch.amp.GradScaler(place.device.type, enabled=args.amp == "fp16")
    loss = torch.zeros((), dtype=torch.float64, device=place.device)
    return Run(model, engine, ema, optimizer, schedule, scaler, loss)


# Training.


def autocast(args: argparse.Namespace, place: Place) -> torch.autocast:
    return torch.autocast(place.device.type, AMP_DTYPES[args.amp], enabled=args.amp != "off")


def mix(run: Run, images: Tensor, labels: Tensor, args: argparse.Namespace, place: Place) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix of this process's images with one another; labels become shares of classes."""
    from torchvision.transforms import v2

    both = ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
    classes = run.model.num_classes
    ways = [way(alpha=alpha, num_classes=classes) for way, alpha in both if alpha]
    with seeded(args.seed, run.epoch, run.step, place.rank):
        return v2.RandomChoice(ways)(images, labels) if len(images) else (images, F.one_hot(labels, classes).float())


def forward(run: Run, images: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor | float]:
    """Logits, and what is added to the loss of each image."""
    if not args.similarity:
        return run.engine(images), 0.0
    with map_similarity(run.model, args.similarity_pairs) as similarity:
        logits = run.engine(images)
    return logits, args.similarity * similarity()


def train_step(run: Run, images: Tensor, labels: Tensor, size: int, args: argparse.Namespace, place: Place) -> None:
    """One step on this process's share of a batch of ``size`` images."""
    with autocast(args, place):
        logits, added = forward(run, images, args)
    losses = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing, reduction="sum")
    losses = losses + len(images) * added
    run.loss += losses.detach()
    run.optimizer.zero_grad()
    # Gradients are averaged over the processes: this makes them those of the mean over all images of the batch.
    run.scaler.scale(losses * (place.world / size)).backward()
    if args.clip:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule.step()
    if run.ema is not None:
        # The first weights are random: the average forgets them faster than its decay would in a short run.
        steps = run.schedule.last_epoch
        run.ema.avg_fn = functools.partial(average, decay=min(args.ema_decay, (1 + steps) / (10 + steps)))
        run.ema.update_parameters(run.model)


def average(averaged: Tensor, current: Tensor, _: Tensor, decay: float) -> Tensor:
    return averaged.lerp(current, 1 - decay) if averaged.is_floating_point() else current


def reduced(values: Tensor, place: Place) -> list[float]:
    """The sums over all processes."""
    if place.world > 1:
        dist.all_reduce(values)
    return values.tolist()


@torch.no_grad()
def evaluate(model: nn.Module, dataset: SeededDataset, run: Run, args: argparse.Namespace, place: Place) -> list[float]:
    """Mean loss and accuracy over the images of all processes."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=place.device)
    for images, labels in make_loader(dataset, split_batches(len(dataset), args, place, None), run, args):
        labels = labels.to(place.device)
        with autocast(args, place):
            logits = model(images.to(place.device)).float()
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(dim=1) == labels).sum()
    return [value / len(dataset) for value in reduced(sums, place)]


def train_epoch(run: Run, dataset: SeededDataset, args: argparse.Namespace, place: Place) -> None:
    """The rest of the epoch, from ``run.step`` on."""
    batches = split_batches(len(dataset), args, place, run.epoch)
    run.engine.train()
    # disable=None: a bar on a terminal, nothing in a log.
    title, hidden = f"epoch {run.epoch + 1}/{args.epochs}", None if place.rank == 0 else True
    with tqdm(total=len(batches), initial=run.step, desc=title, unit="step", disable=hidden) as progress:
        for images, labels in make_loader(dataset, batches[run.step :], run, args):
            size = min(args.batch_size, len(dataset) - run.step * args.batch_size)
            images, labels = (tensor.to(place.device, non_blocking=True) for tensor in (images, labels))
            if args.mixup or args.cutmix:
                images, labels = mix(run, images, labels, args, place)
            train_step(run, images, labels, size, args, place)
            run.step += 1
            progress.update()
            # The end of an epoch gets its checkpoint after its evaluation.
            if run.schedule.last_epoch % args.checkpoint_every == 0 and run.step < len(batches):
                save_checkpoint(run, args, place)


def finish_epoch(run: Run, train: SeededDataset, test: SeededDataset, args: argparse.Namespace, place: Place) -> None:
    """A line of the log, and the run at the start of the next epoch."""
    (loss,) = reduced(run.loss.reshape(1).clone(), place)
    test_loss, accuracy = evaluate(run.model, test, run, args, place)
    ema_loss, ema_accuracy = (None, None) if run.ema is None else evaluate(run.ema, test, run, args, place)
    row = {
        "epoch": run.epoch + 1,
        "steps": run.schedule.last_epoch,
        "learning_rate": run.schedule.get_last_lr()[0],
        "train_loss": loss / len(train),
        "test_loss": test_loss,
        "test_accuracy": accuracy,
        "ema_test_loss": ema_loss,
        "ema_test_accuracy": ema_accuracy,
    }
    run.history.append(row)
    run.epoch, run.step = run.epoch + 1, 0
    run.loss.zero_()


# What is written.


def write_atomically(path: Path, content: bytes) -> None:
    """Whoever opens ``path``, whenever, finds all of the old content or all of the new."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        # Otherwise a machine that loses power may keep the new name and not what it names.
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def save_checkpoint(run: Run, args: argparse.Namespace, place: Place) -> None:
    own = {"generator": torch.get_rng_state(), "loss": run.loss.cpu()}
    if place.device.type == "cuda":
        own["cuda_generator"] = torch.cuda.get_rng_state(place.device)
    ranks: list[Any] = [own]
    if place.world > 1:
        ranks = [None] * place.world
        dist.all_gather_object(ranks, own)
    # Collected whole on rank 0, so that any number of processes can go on from it, sharded or not.
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {
        "arguments": arguments_of(args),
        "model": states.get_model_state_dict(run.model, options=whole),
        "ema": None if run.ema is None else states.get_model_state_dict(run.ema, options=whole),
        "optimizer": states.get_optimizer_state_dict(run.model, run.optimizer, options=whole),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "history": run.history,
        "ranks": ranks,
    }
    if place.rank == 0:
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(checkpoint_path(args), content.getbuffer())


def load_checkpoint(run: Run, args: argparse.Namespace, place: Place) -> None:
    """Puts the run where the checkpoint left it, where there is one."""
    path = checkpoint_path(args)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    found = None if state is None else (state["epoch"], state["step"])
    if place.world > 1:
        everywhere: list[Any] = [None] * place.world
        dist.all_gather_object(everywhere, found)
        if len(set(everywhere)) > 1:
            raise SystemExit(f"--out must be one folder for all processes, but {path} holds (epoch, step) {everywhere}")
    if state is None:
        return
    for name, value in arguments_of(args).items():
        if name not in FREE and state["arguments"].get(name) != value:
            option, before = f"--{name.replace('_', '-')}", state["arguments"].get(name)
            raise SystemExit(f"{option} is {value!r}, but {path} was trained with {before!r}")
    whole = states.StateDictOptions(full_state_dict=True)
    states.set_model_state_dict(run.model, state["model"], options=whole)
    if run.ema is not None:
        states.set_model_state_dict(run.ema, state["ema"], options=whole)
    states.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=whole)
    run.schedule.load_state_dict(state["schedule"])
    run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
    ranks = state["ranks"]
    if len(ranks) == place.world:
        own = ranks[place.rank]
        run.loss.copy_(own["loss"])
        torch.set_rng_state(own["generator"])
        if "cuda_generator" in own and place.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_generator"], place.device)
    elif place.rank == 0:
        # Drop path goes on from new seeds; everything else is as it would have been.
        run.loss.copy_(sum(own["loss"] for own in ranks))


def write_log(run: Run, args: argparse.Namespace, place: Place) -> None:
    """log.csv from all that happened, not line by line: after a kill no line is missing or there twice."""
    if place.rank == 0 and run.history:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(run.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.history)
        write_atomically(args.out / "log.csv", text.getvalue().encode())


def open_tensorboard(run: Run, args: argparse.Namespace, place: Place) -> Any:
    """A writer, or None where TensorBoard is not installed."""
    if place.rank != 0 or importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run wrote after its last checkpoint is written again.
    return SummaryWriter(str(args.out / "tensorboard"), purge_step=run.epoch + 1)


def write_results(run: Run, images: dict[str, int], args: argparse.Namespace, place: Place) -> None:
    if place.rank == 0:
        record = {
            **{name: value for name, value in run.history[-1].items() if name != "learning_rate"},
            "arguments": arguments_of(args),
            "backend": chosen_backend(run.model, args),
            "processes": place.world,
            "device": place.device.type,
            "versions": {module.__name__: str(module.__version__) for module in (reattn, torch)},
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "images": images,
        }
        write_atomically(args.out / "results.json", (json.dumps(record, indent=2) + "\n").encode())
        averaged = "" if run.ema is None else f", of the averaged model {record['ema_test_accuracy']:.1%}"
        print(f"test accuracy {record['test_accuracy']:.1%}{averaged}\nWrote {args.out / 'results.json'}")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    place = join(args)
    train, test, classes = load_digit_data(args) if args.data == "digits" else load_folder_data(args)
    run = build_run(args, classes, math.ceil(len(train) / args.batch_size), place)
    args.out.mkdir(parents=True, exist_ok=True)
    load_checkpoint(run, args, place)
    board = open_tensorboard(run, args, place)
    if place.rank == 0:
        where = f"epoch {run.epoch + 1}, step {run.step + 1}"
        print(
            f"{place.world} x {place.device.type}, backend {chosen_backend(run.model, args)}, from {where}", flush=True
        )
    while run.epoch < args.epochs:
        train_epoch(run, train, args, place)
        finish_epoch(run, train, test, args, place)
        save_checkpoint(run, args, place)
        write_log(run, args, place)
        if board is not None:
            for name, value in run.history[-1].items():
                if value is not None:
                    board.add_scalar(name, value, run.epoch)
            board.flush()
    # Once more, for a run that was killed between its last checkpoint and this.
    write_log(run, args, place)
    write_results(run, {"train": len(train), "test": len(test)}, args, place)


if __name__ == "__main__":
    try:
        main()
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
