"""What the fused backends share: limits, and what they do to tensors alike."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from reattn.backends.contract import Gradients, Inputs, Maps, Outputs
from reattn.problem import Problem

P = ParamSpec("P")
R = TypeVar("R")

# In the order of csrc.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = (None, "layer", "batch")
MAX_HEADS = 32
MAX_HEAD_DIM = 128


def on_its_device(function: Callable[Concatenate[Problem, P], R]) -> Callable[Concatenate[Problem, P], R]:
    """Kernels are launched on the current device: the one of the call's tensors.

    torch's guard makes it current, and touches no other: a context takes some hundred MB on each device that has one.
    To ask for the current one costs less.
    """

    @functools.wraps(function)
    def call(problem: Problem, /, *args: P.args, **kwargs: P.kwargs) -> R:
        device = problem.device
        if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
            return function(problem, *args, **kwargs)
        with torch.cuda.device(device):
            return function(problem, *args, **kwargs)

    return call


# What build_extensions.py leaves beside the extension where it did not build it: its name, and why.
NOT_BUILT = pathlib.Path(__file__).parents[1] / "not_built.txt"


def why_not_imported(name: str, error: ImportError) -> str:
    """Why an extension, "reattn._cpu" as an example, cannot be imported: what its build had to say, or the error."""
    label = name.removeprefix("reattn._").upper()
    if isinstance(error, ModuleNotFoundError) and NOT_BUILT.is_file():
        for line in NOT_BUILT.read_text(encoding="utf-8").splitlines():
            extension, _, reason = line.partition(": ")
            if extension == name:
                return f"the {label} extension was not built: {reason}"
    return f"the {label} extension cannot be imported ({error})"


def beyond_limits(problem: Problem) -> list[str]:
    """Every reason why no fused backend can serve a call, on whatever device."""
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, float16 or bfloat16, got {problem.dtype}")
    if problem.heads > MAX_HEADS:
        reasons.append(f"takes at most {MAX_HEADS} heads, got {problem.heads}")
    if problem.heads_out not in (None, problem.heads) and problem.heads_out > MAX_HEADS:
        reasons.append(f"takes at most {MAX_HEADS} heads after mixing, got {problem.heads_out}")
    if problem.head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes head_dim up to {MAX_HEAD_DIM}, got {problem.head_dim}")
    if problem.called is not None:
        reasons.append(f"stores no maps to call {problem.called} on")
    return reasons


def empty_heads_last(like: Tensor, heads: int | None = None) -> Tensor:
    """Uninitialised ``(batch, heads, seqlen, head_dim)`` in ``(batch, seqlen, heads, head_dim)`` memory order, in the
    dtype of ``like``, which has as many heads unless they are given."""
    batch, own_heads, seqlen, head_dim = like.shape
    heads = own_heads if heads is None else heads
    row = heads * head_dim
    # In one operation: at batch 1 every one of them shows.
    return like.new_empty_strided((batch, heads, seqlen, head_dim), (seqlen * row, head_dim, row, 1))


def empty_outputs(problem: Problem, inputs: Inputs) -> Outputs:
    """Uninitialised."""
    query, heads_out = inputs.query, inputs.theta.shape[1]
    batch, heads, seqlen, head_dim = query.shape
    rows = seqlen if hides_by_row(problem, inputs.attn_mask) else 1
    sums, values = ((3, heads_out), (batch, heads_out, rows, head_dim)) if problem.batch_statistics else (0, 0)
    return Outputs(
        empty_heads_last(query, heads_out),
        query.new_empty(batch, heads, seqlen, dtype=torch.float32),  # numbers: a torch.Size takes twice as long
        query.new_empty(sums, dtype=torch.float64),
        query.new_empty(values, dtype=torch.float32),
    )


def hides_by_row(problem: Problem, attn_mask: Tensor | None) -> bool:
    """Whether the keys that are hidden differ between queries."""
    return problem.is_causal or (attn_mask is not None and attn_mask.shape[2] > 1)


def _empty_gradient(like: Tensor, parameter: Tensor | None) -> Tensor:
    if parameter is None:
        return like.new_empty(0, dtype=torch.float32)
    return torch.empty_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)


def empty_gradients(problem: Problem, inputs: Inputs, into: Maps | None) -> Gradients:
    """Uninitialised: of query, key and value the tensors given or new ones; of all others in float32."""
    if into is None:
        query, key, value = inputs[:3]
        of_key = empty_heads_last(key)
        of_value = torch.empty_like(of_key) if value.shape == key.shape else empty_heads_last(value)
        into = empty_heads_last(query), of_key, of_value
    others = (*inputs[3:7], inputs.attn_mask if problem.mask_gradient else None, inputs.pre_theta)
    return Gradients(*into, *[_empty_gradient(inputs.theta, tensor) for tensor in others])


def zeroed(gradients: Gradients) -> Gradients:
    """The same tensors, of a call without queries."""
    return Gradients(*(gradient.zero_() for gradient in gradients))


def as_inputs(gradients: Gradients, inputs: Inputs) -> Gradients:
    """The gradients of parameters in the dtypes of these; as a rule they are, and nothing is copied. Those of query,
    key and value are."""
    pairs = zip(gradients[3:], (*inputs[3:7], *inputs[-2:]), strict=True)
    of_others = [
        gradient if given is None or given.dtype is gradient.dtype or not gradient.numel() else gradient.to(given.dtype)
        for gradient, given in pairs
    ]
    return Gradients(*gradients[:3], *of_others)


def as_float32(tensor: Tensor | None) -> Tensor | None:
    """What the kernels read of a parameter: contiguous float32. As a rule it is, and nothing is copied."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def store_running(inputs: Inputs, running: tuple[Tensor | None, ...]) -> None:
    """Running statistics that a kernel has updated, into the user's, where :func:`as_float32` made copies of them."""
    for given, updated in zip((inputs.running_mean, inputs.running_var), running, strict=False):
        if given is not None and updated is not None and updated is not given:
            given.copy_(updated)


def unit_scale(problem: Problem, key: Tensor) -> float:
    """A factor of what batch norm in training leaves of maps and values before their statistics are known, so that
    float16 holds it. Maps of N keys are about 1 / N, but may be 1; statistics then make sqrt(N) of it at most. So a
    power of two, some eighth of sqrt(N)."""
    return float(2 ** max(0, key.shape[2].bit_length() // 2 - 3)) if problem.dtype == torch.float16 else 1.0


def splits(shape: torch.Size, processors: int) -> int:
    """Blocks that share the rows of a sample and head, so that every multiprocessor has some."""
    batch, heads, seqlen, _ = shape
    return max(1, min(-(-4 * processors // max(batch * heads, 1)), -(-seqlen // 64)))


def address(tensor: Tensor | None) -> int:
    """Of the first element, as the kernels take it; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


# Bytes of the maps that one kernel of a backward pass leaves to others, unless a block for each multiprocessor leaves
# more. What fits an L2 cache was slower on an H200, since more parts end in waves that fill less of the card.
WORKSPACE_BYTES = 192 << 20


class Part(NamedTuple):
    """Rows of some samples whose gradients are computed together."""

    first_sample: int
    samples: int
    first_row: int
    rows: int


def add_mask_gradient(grad_mask: Tensor, grad_scores: Tensor, part: Part, heads: int, seqlen_k: int) -> None:
    """Adds to the gradient of a mask, over what it shares, those of the scores of a part, which lie in the workspace:
    (samples, heads, rows, keys in whole sixteens). Before the first part it sets the gradient to zero."""
    shape = (part.samples, heads, part.rows, -(-seqlen_k // 16) * 16)
    scores = grad_scores.flatten()[: math.prod(shape)].view(shape)[..., :seqlen_k]
    if part.first_sample == part.first_row == 0:
        grad_mask.zero_()
    for dim, first, size in ((0, part.first_sample, part.samples), (2, part.first_row, part.rows)):
        grad_mask = grad_mask.narrow(dim, first, size) if grad_mask.shape[dim] > 1 else grad_mask
    shared = [dim for dim in range(4) if grad_mask.shape[dim] == 1]
    grad_mask += scores.sum(shared, keepdim=True, dtype=torch.float32) if shared else scores


def cut_workspace(
    row_bytes: int,
    batch: int,
    seqlen: int,
    block_rows: int,
    multiprocessors: int,
    multiple: int,
    most_samples: int = 1 << 31,
) -> tuple[Part, ...]:
    """Cuts a backward pass into parts whose maps fit the workspace: WORKSPACE_BYTES, or what a block of rows for each
    multiprocessor takes if that is more, whatever the batch. ``row_bytes``: of the maps of a query row, all heads.

    The first part is the largest, and has ``most_samples`` at most. A sample that comes in several parts is cut at
    multiples of ``multiple`` rows, which may add so many rows to a part.
    """
    blocks = -(-seqlen // block_rows)
    # In whole waves of the card.
    waves = WORKSPACE_BYTES // (row_bytes * block_rows * multiprocessors)
    most = max(1, waves) * multiprocessors
    samples = max(1, min(batch, most_samples, most // blocks))
    step = -(-blocks // -(-blocks // most)) * block_rows  # of the rows of a sample: all, or alike many
    step = min(-(-step // multiple) * multiple, seqlen)
    return tuple(
        Part(sample, min(samples, batch - sample), row, min(step, seqlen - row))
        for sample in range(0, batch, samples)
        for row in range(0, seqlen, step)
    )
