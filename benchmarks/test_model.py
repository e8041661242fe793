"""``pytest benchmarks/ --benchmark-only``: whole DeepViTs, images a second in inference and in a training step.

On the fused backends against the same model with the official form in eager PyTorch, and the plain ViT of its shape,
whose attention is torch's own: what is fast alone may fight for threads with the rest of a model. On CUDA under
autocast to bfloat16, and against the eager one compiled.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.compare import CUDA, DEVICE, FLOORS, OURS, Comparison, played_back
from benchmarks.measure import Call, WrongResult
from benchmarks.peers import Parameters, official, official_eval
from reattn import ReAttention
from reattn.models import create_model

DTYPE = "bfloat16" if CUDA else "float32"
# model, batch, direction; one image for latency
CASES = [
    ("deepvit_16b", 64 if CUDA else 8, "inference"),
    ("deepvit_16b", 64 if CUDA else 8, "training"),
    ("deepvit_16b", 1, "inference"),
    ("deepvit_s", 64 if CUDA else 8, "inference"),
    # On a CPU it would take a sixth of the whole run.
    *([("deepvit_s", 64, "training")] if CUDA else []),
]
QUICK = [("deepvit_16b", 2, "inference"), ("deepvit_16b", 2, "training")]

pytestmark = played_back


class EagerAttention(nn.Module):
    """A :class:`ReAttention` with batch norm, computed by the official form."""

    def __init__(self, module: ReAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        batch, seqlen, _ = x.shape
        qkv = module.qkv(x).view(batch, seqlen, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        norm = module.head_norm
        parameters = Parameters(
            module.theta, module.theta_bias, norm.weight, norm.bias, norm.running_mean, norm.running_var
        )
        form = official if self.training else official_eval
        output = form(*qkv.unbind(0), parameters) * module.output_scale
        return module.proj(output.transpose(1, 2).flatten(2))


def build(name: str, model: str, device: torch.device, quick: bool) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depth": 2, "img_size": 64} if quick else {}
    built = create_model(model, attention="self" if name == "plain ViT" else "re", device=device, **sizes)
    set_backend(built, name if name in OURS else "reference")
    if name in ("eager", "compiled"):
        for block in built.blocks:
            if isinstance(block.attn, ReAttention):
                block.attn = EagerAttention(block.attn)
    return torch.compile(built, dynamic=False) if name == "compiled" else built


def set_backend(model: nn.Module, backend: str) -> None:
    for module in model.modules():
        if isinstance(module, ReAttention):
            module.backend = backend


def forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
        return model(images)


class Oracle:
    """Float64 logits of a model in eval mode; allowed is twice the error of its reference backend, plus rounding."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.images = images
        with torch.no_grad():
            self.exact = copy.deepcopy(model).double().eval()(images.double())
        yardstick = self._logits(model)
        self.allowed = 2 * self._error(yardstick) + 8 * torch.finfo(yardstick.dtype).eps

    def check(self, name: str, model: nn.Module) -> None:
        error = self._error(self._logits(model))
        if not error <= self.allowed:
            raise WrongResult(f"{name}: the error of the logits is {error:.3g}, allowed is {self.allowed:.3g}")

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        return forward(model.eval(), self.images)

    def _error(self, logits: Tensor) -> float:
        return float(torch.linalg.vector_norm(logits - self.exact) / torch.linalg.vector_norm(self.exact))


def make_call(model: nn.Module, images: Tensor, labels: Tensor, direction: str) -> Call:
    """A forward pass in eval mode, or a training step of AdamW."""
    if direction == "inference":
        model.eval()
        return torch.no_grad()(lambda: forward(model, images))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)

    def step() -> None:
        torch.nn.functional.cross_entropy(forward(model, images).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_comparison(
    model: str,
    batch: int,
    direction: str,
    names: tuple[str, ...],
    device: torch.device,
    quick: bool,
    seconds: float,
    begin: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """``begin`` is told what comes next: a contender's name, or "timing"."""
    calls, faults = {}, {}
    reference = build("reference", model, device, quick)
    images = torch.randn(batch, 3, *([64, 64] if quick else [224, 224]), device=device)
    labels = torch.randint(1000, (batch,), device=device)
    oracle = Oracle(reference, images[:2])
    for name in names:
        begin(name)
        built = build(name, model, device, quick)
        if name not in FLOORS:
            _, status = measure.attempt(functools.partial(oracle.check, name, built))
            if status != "ok":
                faults[name] = status
                continue
        calls[name] = [make_call(built, images, labels, direction)]
    begin("timing")
    return Comparison(calls, faults, device, seconds, 1 if quick else 3)


@functools.lru_cache(maxsize=1)
def compare(
    model: str, batch: int, direction: str, names: tuple[str, ...], device: torch.device, quick: bool
) -> Comparison:
    return make_comparison(model, batch, direction, names, device, quick, 0.0 if quick else 6.0)


def facts_of_model(comparison: Comparison, model: str, batch: int, direction: str, name: str) -> dict[str, Any]:
    """What the results say of a contender, beside what it was compared in."""
    described = {"model": model, "batch": batch, "dtype": DTYPE, "direction": direction}
    if name not in comparison.ms:
        return described
    return {
        **described,
        **comparison.facts(name),
        "images_per_s": 1e3 * batch / comparison.ms[name],
        "ratio_to_eager": comparison.ratio(name, "eager"),
        "ratio_to_plain_vit": comparison.ratio(name, "plain ViT"),
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ours = measure.fused_backends(DEVICE)
    names = (*ours, "eager", *(("compiled",) if CUDA else ()), "plain ViT")
    cases = QUICK if metafunc.config.getoption("--quick") else CASES
    parameters = [
        pytest.param(*case, names, name, id="-".join(map(str, (*case, name))))
        for case, name in itertools.product(cases, names)
    ]
    metafunc.parametrize(("model", "batch", "direction", "names", "contender"), parameters)


def test_model(benchmark, device, quick, model, batch, direction, names, contender):
    comparison = compare(model, batch, direction, names, device, quick)
    facts = facts_of_model(comparison, model, batch, direction, contender)
    comparison.report(benchmark, contender, f"{model}-{batch}-{direction}", {"kind": "model", **facts})
