"""``pytest benchmarks/ --benchmark-only``: a whole DeepViT, in inference and in a training step.

deepvit_16b on the fused backend against the same model on the reference backend and the plain ViT of its shape, whose
attention is torch's own: what is fast alone may fight for threads with the rest of a model.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Call
from reattn import ReAttention
from reattn.models import create_model

CUDA = torch.cuda.is_available()
BATCH = 64 if CUDA else 8
FUSED = "triton" if CUDA else "cpu"
MODELS = (FUSED, "reference", "plain ViT")


def make_call(name: str, direction: str, device: torch.device) -> Call:
    """A forward pass in eval mode, or a training step of AdamW."""
    torch.manual_seed(0)
    model = create_model("deepvit_16b", attention="self" if name == "plain ViT" else "re").to(device)
    for module in model.modules():
        if isinstance(module, ReAttention):
            module.backend = name
    images = torch.randn(BATCH, 3, 224, 224, device=device)
    labels = torch.randint(1000, (BATCH,), device=device)
    if direction == "inference":
        model.eval()
        return torch.no_grad()(lambda: model(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


@functools.lru_cache(maxsize=1)
def compare(direction: str, device: torch.device) -> tuple[dict[str, Call], dict[str, float]]:
    """Every model's call, and its milliseconds, in turns."""
    calls = {name: make_call(name, direction, device) for name in MODELS}
    if CUDA:
        return calls, {name: measure.time_cuda([call]) for name, call in calls.items()}
    return calls, measure.time_interleaved(calls, seconds=10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("direction", ["inference", "training"])
def test_model(benchmark, device, direction, name):
    if FUSED in name:
        measure.default_backend(device)  # says why it cannot run
    calls, ms = compare(direction, device)
    benchmark.group = f"deepvit_16b-{direction}"
    benchmark.extra_info.update(
        {
            "model": "deepvit_16b",
            "batch": BATCH,
            "direction": direction,
            "backend": name,
            "ms": ms[name],
            "images_per_s": 1e3 * BATCH / ms[name],
            "ratio_to_reference": ms[name] / ms["reference"],
            "ratio_to_plain_vit": ms[name] / ms["plain ViT"],
        }
    )
    benchmark.pedantic(calls[name], rounds=3, warmup_rounds=0)
