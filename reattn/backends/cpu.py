"""The native CPU backend: hands a call to the extension of csrc/cpu, tensors as addresses and strides."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

import torch
from torch import Tensor

from reattn.backends import common
from reattn.backends.common import address, as_float32
from reattn.backends.contract import Gradients, Inputs, Maps, Outputs
from reattn.problem import Problem

try:
    import reattn._cpu as _cpu

    # (name, whether this CPU runs it, whether it pays), the best last; here, where no graph is being traced.
    INSTRUCTION_SETS = _cpu.instruction_sets()
    _import_error = ""
except ImportError as error:
    _import_error = common.why_not_imported("reattn._cpu", error)

DEVICE = "cpu"


def unavailable(device: torch.device) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    reasons = []
    if _import_error:
        reasons.append(_import_error)
    else:
        try:
            instruction_set()
        except ValueError as error:
            reasons.append(str(error))
    if device.type != "cpu":
        reasons.append(f"needs a CPU tensor, got {device.type}")
    return reasons


def not_supported(problem: Problem) -> list[str]:
    """See :class:`reattn.backends.contract.Backend`."""
    return unavailable(problem.device) + common.beyond_limits(problem)


def instruction_set() -> str:
    """The one in use: the best that was built and this CPU runs well, or the one that ``REATTN_CPU_ISA`` names.

    Raises ``ValueError`` where that one is unknown, was not built, or does not run here.
    """
    return INSTRUCTION_SETS[_choose_isa()][0]


def _choose_isa() -> int:
    """Position among the extension's instruction sets."""
    return _find_isa(os.environ.get("REATTN_CPU_ISA") or None)


@functools.cache
def _find_isa(forced: str | None) -> int:
    usable = {name: i for i, (name, runs, _) in enumerate(INSTRUCTION_SETS) if runs}
    if forced is None:
        return max(i for i, (_, runs, pays) in enumerate(INSTRUCTION_SETS) if runs and pays)
    if forced not in usable:
        raise ValueError(f"REATTN_CPU_ISA must be one of {list(usable)} on this machine, got {forced!r}")
    return usable[forced]


def empty_cache() -> None:
    """Gives back the memory, up to 128 MB or 32 for each thread, that calls leave for the next ones."""
    _cpu.empty_cache()


def threads_from() -> str:
    """Whose threads the work is done on."""
    return "torch's OpenMP threads" if _use_torch_threads() else "own threads"


@functools.cache
def _use_torch_threads() -> bool:
    libraries = (pathlib.Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
    return any(_cpu.use_openmp_of(str(library)) for library in libraries)


def forward(problem: Problem, inputs: Inputs) -> Outputs:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    outputs = common.empty_outputs(problem, inputs)
    call, kept, running = _call(problem, inputs, outputs, update=not problem.synchronised)
    call.query, call.key, call.value = map(_argument, inputs[:3])
    _cpu.forward(call)
    if problem.batch_statistics:
        common.store_running(inputs, running)
    return outputs


def finish(problem: Problem, inputs: Inputs, unfinished: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    outputs = unfinished._replace(statistics=unfinished.statistics.clone())
    call, kept, running = _call(problem, inputs, outputs, update=True)
    _cpu.finish(call)
    common.store_running(inputs, running)
    return outputs.statistics


def grad_sums(problem: Problem, grad: Tensor, outputs: Outputs) -> Tensor:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    sums = grad.new_empty(2, grad.shape[1], dtype=torch.float64)
    call = _sized_call(problem, grad, 1)
    call.grad, call.out = _argument(grad), _argument(outputs.out)
    call.value_sum, call.value_rows = address(outputs.value_sum), outputs.value_sum.shape[2]
    call.grad_sums = address(sums)
    _cpu.grad_sums(call)
    return sums


def backward(
    problem: Problem,
    grad: Tensor,
    inputs: Inputs,
    outputs: Outputs,
    sums: Tensor | None,
    into: Maps | None = None,
) -> Gradients:
    """See :class:`reattn.backends.contract.FusedBackend`."""
    gradients = common.empty_gradients(problem, inputs, into)
    if not inputs.query.numel():
        return common.as_inputs(common.zeroed(gradients), inputs)
    outputs = outputs._replace(lse=outputs.lse.contiguous())
    call, kept, _ = _call(problem, inputs, outputs, update=False)
    call.query, call.key, call.value, call.grad = *map(_argument, inputs[:3]), _argument(grad)
    call.grad_sums = address(sums)
    call.grad_query, call.grad_key, call.grad_value = map(_argument, gradients[:3])
    call.grad_theta = address(gradients.theta)
    for name in ("bias", "norm_weight", "norm_bias"):
        if getattr(inputs, name) is not None:
            setattr(call, f"grad_{name}", address(getattr(gradients, name)))
    if problem.pre_mixed:
        call.grad_pre_theta = address(gradients.pre_theta)
    if problem.mask_gradient:
        call.grad_mask = address(gradients.attn_mask.zero_())
    _cpu.backward(call)
    return common.as_inputs(gradients, inputs)


def _sized_call(problem: Problem, query: Tensor, seqlen_k: int) -> Any:
    """A call with nothing but instruction set, threads and sizes."""
    _use_torch_threads()
    batch, heads, seqlen, head_dim = query.shape
    return _cpu.Call(
        _choose_isa(),
        torch.get_num_threads(),
        common.DTYPES.index(query.dtype),
        common.NORMS.index(problem.norm),
        (batch, heads, seqlen, seqlen_k, head_dim),
    )


def _call(
    problem: Problem, inputs: Inputs, outputs: Outputs, update: bool
) -> tuple[Any, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """A call with what both directions need; what has to live until it is over; the running statistics that it reads
    or, with ``update``, changes."""
    call = _sized_call(problem, inputs.query, inputs.key.shape[2])
    call.scale, call.eps, call.output_scale = problem.scale, problem.eps, problem.output_scale
    call.heads_out = inputs.theta.shape[1]
    kept = [as_float32(tensor) for tensor in (*inputs[3:7], inputs.pre_theta)]
    call.theta, call.bias, call.norm_weight, call.norm_bias, call.pre_theta = map(address, kept)
    if inputs.seed is not None:
        call.dropout_p, call.seed = problem.dropout_p, inputs.seed.data_ptr()
    call.is_causal = problem.is_causal
    if (mask := inputs.attn_mask) is not None:
        call.attn_mask = problem.mask == "float", mask.data_ptr(), mask.shape, mask.stride()
    call.lse = outputs.lse.data_ptr()
    if outputs.out.ndim == 4:
        call.out = _argument(outputs.out)
    running: tuple[Tensor | None, ...] = ()
    if problem.norm == "batch":
        call.training, call.synchronised = problem.training, problem.synchronised
        if problem.training:
            call.statistics, call.value_sum = outputs.statistics.data_ptr(), outputs.value_sum.data_ptr()
            call.value_rows = outputs.value_sum.shape[2]
            call.unit_scale = common.unit_scale(problem, inputs.key)
        if update or not problem.training:
            running = (as_float32(inputs.running_mean), as_float32(inputs.running_var))
            call.running_mean, call.running_var = map(address, running)
        if update and problem.training:
            call.momentum = -1.0 if problem.momentum is None else problem.momentum
            call.num_batches_tracked = address(inputs.num_batches_tracked)
    return call, (*kept, *running), running


def _argument(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()
