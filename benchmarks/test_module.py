"""``pytest benchmarks/ --benchmark-only``: the module with its projections, in two forms.

The second form: ``ReAttention`` on the fused backends against itself in eager PyTorch (the reference backend), against
vit-pytorch's own attention with the same weights, where that is installed, and against plain attention of the same
size. On CUDA under autocast to bfloat16, and against the eager one compiled.

CaiT's talking heads: ``ReAttention`` on the backend that "auto" chooses for it against the same in PyTorch as timm has
it, eager and compiled.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import pathlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import measure, peers
from benchmarks.compare import CUDA, DEVICE, FLOORS, OURS, Comparison, label, played_back
from benchmarks.machine import memory_limit
from benchmarks.measure import Call, Problem, WrongResult
from reattn import ReAttention
from reattn.backends import choose
from reattn.models.deepvit import SelfAttention
from reattn.problem import Problem as OperatorProblem

DIRECTIONS = ("forward", "forward+backward")

# In the place of a norm: none, and the scores are mixed as well.
TALKING_HEADS = "talking-heads"

pytestmark = played_back


class ModuleProblem(Problem):
    """The operator between its projections: four products of ``seqlen x dim`` with ``dim x dim``."""

    @property
    def _dim(self) -> int:
        return self.heads * self.head_dim

    def flops(self, backward: bool) -> int:
        projections = 8 * self.batch * self.seqlen * self._dim**2
        maps = self.batch * self.heads * self.seqlen**2
        mixing_before = 2 * self.heads * maps if self.norm == TALKING_HEADS else 0
        return super().flops(backward) + (projections + mixing_before) * (3 if backward else 1)

    def traffic(self, backward: bool) -> int:
        """Input, output and weights once; a backward pass reads the first and last again, and writes two gradients."""
        rows, weights = self.batch * self.seqlen * self._dim, 4 * self._dim**2
        return self.dtype.itemsize * ((5 * rows + 3 * weights) if backward else (2 * rows + weights))


BATCH, DTYPE = (128, torch.bfloat16) if CUDA else (8, torch.float32)
# Of DeepViT, and of cait_s24.
PROBLEMS = (
    ModuleProblem(BATCH, 12, 197, 32, "layer", DTYPE),
    ModuleProblem(BATCH, 8, 196, 48, TALKING_HEADS, DTYPE),
)
QUICK = ModuleProblem(2, 4, 50, 8, "layer", torch.float32)


def vit_pytorch_attention() -> type[nn.Module]:
    """Its ``deepvit.Attention``, from the file: the whole package imports torchvision, which this does not need."""
    package = importlib.util.find_spec("vit_pytorch")
    assert package is not None and package.submodule_search_locations
    path = pathlib.Path(package.submodule_search_locations[0]) / "deepvit.py"
    spec = importlib.util.spec_from_file_location("vit_pytorch_deepvit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Attention


def make_eager(problem: Problem, device: torch.device | None = None) -> tuple[ReAttention, nn.Module]:
    """Ours on the reference backend, and the same in PyTorch: itself, or CaiT's with its weights."""
    dim, options = problem.heads * problem.head_dim, {"backend": "reference", "device": device}
    if problem.norm != TALKING_HEADS:
        module = ReAttention(dim, problem.heads, norm=problem.norm, pre_norm=True, theta_init="normal", **options)
        return module, module
    eager = peers.TalkingHeads(dim, problem.heads).to(device)
    module = ReAttention(dim, problem.heads, qkv_bias=True, norm=None, pre_mix=True, **options)
    module.load_state_dict(eager.state_dict())
    return module, eager


def build(name: str, problem: Problem, reference: ReAttention, eager: nn.Module) -> nn.Module:
    """A contender with the weights of ``reference``, which takes vit-pytorch's; plain attention has its own."""
    dim = problem.heads * problem.head_dim
    if name == "sdpa":
        plain = SelfAttention(dim, problem.heads)
        return plain if problem.norm == TALKING_HEADS else nn.Sequential(nn.LayerNorm(dim), plain)
    if name == "vit-pytorch":
        module = vit_pytorch_attention()(dim, problem.heads, problem.head_dim)
        reference.load_state_dict(module.state_dict())
        return module
    if name in OURS:
        module = copy.deepcopy(reference)
        module.backend = name
        return module
    module = copy.deepcopy(eager)
    return torch.compile(module, dynamic=False) if name == "compiled" else module


def run(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype == torch.bfloat16):
        return module(x)


def results(module: nn.Module, x: Tensor, grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every parameter, by name."""
    x = x.detach().requires_grad_()
    named = dict(module.named_parameters())
    output = run(module, x, dtype)
    grads = torch.autograd.grad(output, [x, *named.values()], grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(("input gradient", *named), grads, strict=True))}


class Oracle:
    """Float64 results of a module; allowed is twice the error of the module itself, plus rounding."""

    def __init__(self, module: ReAttention, x: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
        self.arguments = x, grad, dtype
        self.exact = results(copy.deepcopy(module).double(), x.double(), grad.double(), torch.float64)
        rounding = 8 * torch.finfo(dtype).eps
        eager = results(module, *self.arguments)
        self.allowed = {what: 2 * self._error(what, tensor) + rounding for what, tensor in eager.items()}

    def check(self, name: str, module: nn.Module) -> None:
        """The gradients of parameters by ours alone."""
        found = results(module, *self.arguments)
        for what in self.exact if name in OURS else ("output", "input gradient"):
            error, allowed = self._error(what, found[what]), self.allowed[what]
            if not error <= allowed:
                raise WrongResult(f"{name}: the error of the {what} is {error:.3g}, allowed is {allowed:.3g}")

    def _error(self, what: str, tensor: Tensor) -> float:
        exact = self.exact[what]
        return float(torch.linalg.vector_norm(tensor - exact) / torch.linalg.vector_norm(exact))


def make_call(module: nn.Module, x: Tensor, grad: Tensor, direction: str, dtype: torch.dtype) -> Call:
    if direction == "forward":
        return torch.no_grad()(lambda: run(module, x, dtype))
    x, grad = x.detach().requires_grad_(), grad.to(dtype)
    wanted = [x, *module.parameters()]
    return lambda: torch.autograd.grad(run(module, x, dtype), wanted, grad)


@functools.lru_cache(maxsize=1)
def compare(
    problem: ModuleProblem, direction: str, names: tuple[str, ...], device: torch.device, quick: bool
) -> Comparison:
    torch.manual_seed(0)
    dim = problem.heads * problem.head_dim
    reference, eager = make_eager(problem, device)
    x, grad = (torch.randn(problem.batch, problem.seqlen, dim, device=device) for _ in range(2))
    calls, faults = {}, {}
    # The one whose weights the others get comes first.
    order = sorted(names, key=lambda name: name != "vit-pytorch")
    built = {name: measure.attempt(functools.partial(build, name, problem, reference, eager)) for name in order}
    oracle = Oracle(reference, x, grad, problem.dtype)
    for name, (module, status) in built.items():
        if module is not None and name not in FLOORS:
            with memory_limit(device):
                _, status = measure.attempt(functools.partial(oracle.check, name, module.to(device)))
        if module is None or status != "ok":
            faults[name] = status
            continue
        calls[name] = [make_call(module.to(device), x, grad, direction, problem.dtype)]
    return Comparison(calls, faults, device, *((0.0, 1) if quick else (2.0, 3)))


def contenders(problem: Problem) -> tuple[str, ...]:
    if problem.norm == TALKING_HEADS:
        sizes = problem.heads, problem.head_dim
        ours = choose("auto", OperatorProblem(DEVICE, problem.dtype, *sizes, pre_mixed=True), problem.norm)
        return ours, "eager", "compiled", "sdpa"
    peer = ("vit-pytorch",) if importlib.util.find_spec("vit_pytorch") else ()
    return (*measure.fused_backends(DEVICE), "eager", *(("compiled",) if CUDA else ()), *peer, "sdpa")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = (QUICK, replace(QUICK, norm=TALKING_HEADS))
    problems = quick if metafunc.config.getoption("--quick") else PROBLEMS
    cases = []
    for problem, direction in itertools.product(problems, DIRECTIONS):
        names = contenders(problem)
        cases += [
            pytest.param(problem, direction, names, name, id=f"{label(problem, direction)}-{name}") for name in names
        ]
    metafunc.parametrize(("problem", "direction", "names", "contender"), cases)


def test_module(benchmark, device, quick, problem, direction, names, contender):
    comparison = compare(problem, direction, names, device, quick)
    comparison.report_problem(benchmark, "module", contender, problem, direction, device)
