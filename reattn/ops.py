"""The operator as torch ops and an autograd Function.

``forward`` and ``backward`` are one op each: they take what the user gave and return its gradients, and are opaque to
``torch.compile`` and ``torch.export``. ``backward_into`` writes the gradients of query, key and value where it is told.
``finish`` and ``grad_sums`` are for batch statistics of several ranks alone. The Function saves query, key, value, the
output where batch statistics need it, and the LSE: never a map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from reattn import sharded
from reattn.backends import FUSED
from reattn.backends.common import empty_heads_last, empty_outputs
from reattn.backends.contract import Gradients, Inputs, Outputs
from reattn.problem import Problem

_library = torch.library.Library("reattn", "DEF")
_INPUTS = len(Inputs._fields)
_COUNT = Inputs._fields.index("num_batches_tracked")
_RUNNING = slice(Inputs._fields.index("running_mean"), _COUNT)
# What is no subclass of torch's tensors, as DTensor is.
_PLAIN = frozenset({Tensor, nn.Parameter, type(None)})

_PARAMETERS = "Tensor theta, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
_STATISTICS = "Tensor? running_mean, Tensor? running_var, Tensor? num_batches_tracked, "
_UPDATED = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
_MAPS = "Tensor query, Tensor key, Tensor value, "
# Defaults are those of Problem. Each option that is given costs a call of an op almost a microsecond.
_OPTIONS = (
    "*, str backend, str? norm=None, bool training=False, bool synchronised=False, str? mask=None, "
    "bool mask_gradient=False, bool is_causal=False, float scale=1.0, float output_scale=1.0, float eps=1e-5, "
    "float dropout_p=0.0, float? momentum=0.1"
)
_MASKS = "Tensor? seed, Tensor? attn_mask, Tensor? pre_theta, "
_library.define(f"forward({_MAPS}{_PARAMETERS}{_UPDATED}{_MASKS}{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"finish({_MAPS}{_PARAMETERS}{_UPDATED}{_MASKS}Tensor(d!) out, Tensor lse, Tensor statistics, "
    f"Tensor(e!) value_sum, {_OPTIONS}) -> Tensor"
)
_library.define(
    f"grad_sums(Tensor grad, Tensor out, Tensor lse, Tensor statistics, Tensor value_sum, {_OPTIONS}) -> Tensor"
)
_library.define(
    f"backward(Tensor grad, Tensor? grad_sums, {_MAPS}{_PARAMETERS}{_STATISTICS}{_MASKS}Tensor out, Tensor lse, "
    f"Tensor statistics, Tensor value_sum, {_OPTIONS}) -> ({', '.join(['Tensor'] * len(Gradients._fields))})"
)
_library.define(
    f"backward_into(Tensor grad, Tensor? grad_sums, {_MAPS}{_PARAMETERS}{_STATISTICS}{_MASKS}Tensor out, "
    f"Tensor lse, Tensor statistics, Tensor value_sum, Tensor(a!) grad_query, Tensor(b!) grad_key, "
    f"Tensor(c!) grad_value, {_OPTIONS}) -> ({', '.join(['Tensor'] * (len(Gradients._fields) - 3))})"
)


def recomputes() -> bool:
    """Whether a backward pass runs. What it calls forward has run before: that is activation checkpointing, of
    whichever kind, and would count a batch twice in the running statistics."""
    return torch._C._current_graph_task_id() != -1


def throw_away(statistics: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Copies, to be updated in the place of the running statistics."""
    with _disable_current_modes():  # selective checkpointing compares the operations of both passes
        return [None if tensor is None else tensor.clone() for tensor in statistics]


def _to_update(problem: Problem, inputs: Inputs) -> Inputs:
    if problem.training and recomputes():
        mean, var, count = throw_away((inputs.running_mean, inputs.running_var, inputs.num_batches_tracked))
        return inputs._replace(running_mean=mean, running_var=var, num_batches_tracked=count)
    return inputs


def _problem(inputs: Inputs, options: dict[str, Any]) -> Problem:
    query, heads_out, pre_mixed = inputs.query, inputs.theta.shape[1], inputs.pre_theta is not None
    _, heads, _, head_dim = query.shape
    return Problem(query.device, query.dtype, heads, head_dim, heads_out=heads_out, pre_mixed=pre_mixed, **options)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward(*tensors: Any, backend: str, **options: Any) -> Any:
    problem = _problem(inputs := Inputs(*tensors), options)
    inputs = _to_update(problem, inputs)
    outputs = FUSED[backend].forward(problem, inputs)
    if problem.training and not problem.synchronised:
        _note_update(inputs)
    return outputs


@torch.library.impl(_library, "finish", "CompositeExplicitAutograd")
def _finish(*tensors: Any, backend: str, **options: Any) -> Any:
    inputs, outputs = Inputs(*tensors[:_INPUTS]), Outputs(*tensors[_INPUTS:])
    problem = _problem(inputs, options)
    inputs = _to_update(problem, inputs)
    statistics = FUSED[backend].finish(problem, inputs, outputs)
    _note_update(inputs)
    return statistics


def _note_update(inputs: Inputs) -> None:
    """Tells autograd that the running statistics have changed: what was saved of them in eval is no longer valid."""
    for tensor in (inputs.running_mean, inputs.running_var, inputs.num_batches_tracked):
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


@torch.library.impl(_library, "grad_sums", "CompositeExplicitAutograd")
def _grad_sums(grad: Tensor, *tensors: Any, backend: str, **options: Any) -> Any:
    return FUSED[backend].grad_sums(Problem.of(grad, **options), grad, Outputs(*tensors))


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, grad_sums: Tensor | None, *tensors: Any, backend: str, **options: Any) -> Any:
    inputs, outputs = Inputs(*tensors[:_INPUTS]), Outputs(*tensors[_INPUTS:])
    return FUSED[backend].backward(_problem(inputs, options), grad, inputs, outputs, grad_sums)


@torch.library.impl(_library, "backward_into", "CompositeExplicitAutograd")
def _backward_into(grad: Tensor, grad_sums: Tensor | None, *tensors: Any, backend: str, **options: Any) -> Any:
    inputs, outputs, into = Inputs(*tensors[:_INPUTS]), Outputs(*tensors[_INPUTS:-3]), tensors[-3:]
    problem = _problem(inputs, options)
    return tuple(FUSED[backend].backward(problem, grad, inputs, outputs, grad_sums, into)[3:])


@torch.library.register_fake("reattn::forward", lib=_library)
def _(*tensors: Any, backend: str, **options: Any) -> Any:
    inputs = Inputs(*tensors)
    return tuple(empty_outputs(_problem(inputs, options), inputs))


@torch.library.register_fake("reattn::finish", lib=_library)
def _(*tensors: Any, backend: str, **options: Any) -> Any:
    return torch.empty_like(Outputs(*tensors[_INPUTS:]).statistics)


@torch.library.register_fake("reattn::grad_sums", lib=_library)
def _(grad: Tensor, *tensors: Any, backend: str, **options: Any) -> Any:
    return grad.new_empty(2, grad.shape[1], dtype=torch.float64)


@torch.library.register_fake("reattn::backward", lib=_library)
def _(grad: Tensor, grad_sums: Tensor | None, *tensors: Any, backend: str, **options: Any) -> Any:
    inputs = Inputs(*tensors[:_INPUTS])
    return *(empty_heads_last(tensor) for tensor in inputs[:3]), *_empty_like_parameters(grad, inputs, **options)


@torch.library.register_fake("reattn::backward_into", lib=_library)
def _(grad: Tensor, grad_sums: Tensor | None, *tensors: Any, backend: str, **options: Any) -> Any:
    return _empty_like_parameters(grad, Inputs(*tensors[:_INPUTS]), **options)


def _empty_like_parameters(grad: Tensor, inputs: Inputs, mask_gradient: bool = False, **_: Any) -> tuple[Tensor, ...]:
    given = (*inputs[3:7], inputs.attn_mask if mask_gradient else None, inputs.pre_theta)
    return tuple(grad.new_empty(0, dtype=torch.float32) if t is None else t.new_empty(t.shape) for t in given)


def _one_by_one(op: Any) -> Any:
    """``torch.vmap`` of an op: called once for each element of the mapped dimension, so that every norm and every
    gradient of a parameter is that element's own."""

    def call(info: Any, in_dims: tuple[int | None, ...], *tensors: Any, **options: Any) -> Any:
        # What an op changes cannot be changed once for each element.
        names = [argument.name for argument in op._schema.arguments]
        for name, tensor, dim in zip(names, tensors, in_dims, strict=False):
            updated = name.startswith("running_") or name == "num_batches_tracked"
            if updated and tensor is not None and dim is None and options.get("training"):
                raise RuntimeError(f"{name} cannot be updated inside torch.vmap: give None, or training=False")
        results = [
            op(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)), **options)
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return call


for _name in ("forward", "backward"):
    _op = getattr(torch.ops.reattn, _name).default
    torch.library.register_vmap(f"reattn::{_name}", _one_by_one(_op), lib=_library)


def _count_flops() -> None:
    """Tells torch's FlopCounterMode of the products in the definition, which are those of the reference: query and key,
    both mixings, maps and value; two for each in the backward pass. As for torch's own attention, masks save nothing.

    What a fused backend computes again in its backward pass is not counted: it is no part of the definition.
    """
    try:
        from torch.utils import flop_counter
    except Exception:  # it imports Triton, and a broken one raises anything; nobody counts with it then
        return

    def forward(*shapes: Any, **_: Any) -> int:
        inputs = Inputs(*shapes[:_INPUTS])
        batch, heads, seqlen, head_dim = inputs.query
        heads_out = inputs.theta[1]
        mixing = heads * (heads_out + (heads if inputs.pre_theta is not None else 0))
        return 2 * batch * seqlen * inputs.key[2] * ((heads + heads_out) * head_dim + mixing)

    def backward(grad: torch.Size, grad_sums: torch.Size | None, *shapes: Any, **_: Any) -> int:
        return 2 * forward(*shapes)

    packets = torch.ops.reattn.forward, torch.ops.reattn.backward, torch.ops.reattn.backward_into
    formulas: tuple[Any, ...] = forward, backward, backward
    for packet, formula in zip(packets, formulas, strict=True):
        flop_counter.register_flop_formula(packet)(formula)
    # A counter knows what was registered when it was made: one that counts already, as reattn is imported, is told too.
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(counter := getattr(mode, "counter", None), flop_counter.FlopCounterMode):
            counter.flop_registry |= {packet: flop_counter.flop_registry[packet] for packet in packets}


_count_flops()


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device, which need not know of it."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator, on the device: no synchronisation, and replayed with the RNG state."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def re_attention(
    backend: str, problem: Problem, inputs: Inputs, group: dist.ProcessGroup | None, packed: Tensor | None = None
) -> Tensor:
    """The operator on a fused backend, differentiable once in query, key, value and the parameters.

    ``packed (batch, seqlen, 3, heads, head_dim)``: of which query, key and value are views; it is what has a gradient
    then.
    """
    compiling = torch.compiler.is_compiling()
    if (compiling or not _PLAIN.issuperset(map(type, inputs))) and sharded.is_sharded(*inputs):
        return sharded.re_attention(partial(re_attention, backend), problem, inputs, group, packed)
    if problem.dropout_p > 0.0 and inputs.seed is None:
        inputs = inputs._replace(seed=draw_seed(problem.device))
    options = _options(backend, problem)
    if not compiling:
        _refuse_tangents(inputs)
    # A compiled call with tangents is left to the Function, which refuses them.
    tangents = compiling and forward_ad._current_level >= 0
    if not tangents and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
        # The Function would cost as much as a small problem, and torch.compile cannot call it without a gradient.
        return _run_forward(inputs, options, group).out
    function: type[torch.autograd.Function] = ReAttentionFunction
    if not compiling:
        function = TransformedFunction if torch._C._are_functorch_transforms_active() else EagerFunction
    maps = inputs[:3] if packed is None else (None, None, None)
    return function.apply(packed, *maps, *inputs[3:], options, group)[0]


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value ``(batch, heads, seqlen, head_dim)``, views of ``(batch, seqlen, 3, heads, head_dim)``."""
    if type(packed) is not Tensor and sharded.is_sharded(packed):
        packed = sharded.by_sample(packed)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def identity(query: Tensor) -> Tensor:
    """Theta that mixes nothing, ``(heads, heads)``, in float32."""
    theta = torch.eye(query.shape[1], device=query.device)
    return sharded.replicated_like(theta, query) if sharded.is_sharded(query) else theta


_DEFAULTS = Problem._field_defaults


def _options(backend: str, problem: Problem) -> dict[str, Any]:
    """What the ops take beside tensors, but for what has its default."""
    options = {
        "norm": problem.norm,
        "training": problem.batch_statistics,
        "synchronised": problem.synchronised and problem.batch_statistics,
        "mask": problem.mask,
        "mask_gradient": problem.mask_gradient,
        "is_causal": problem.is_causal,
        "scale": problem.scale,
        "output_scale": problem.output_scale,
        "eps": problem.eps,
        "dropout_p": problem.dropout_p,
        "momentum": problem.momentum,
    }
    return {"backend": backend} | {name: option for name, option in options.items() if option != _DEFAULTS[name]}


_ONCE = 'a fused backend of reattn is differentiable once, in reverse mode: use backend="reference"'


def _refuse_tangents(tensors: Iterable[Tensor | None]) -> None:
    """Forward-mode differentiation would lose its tangents in silence."""
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise RuntimeError(_ONCE)


def _is_batched(grad: Tensor) -> bool:
    """Whether this stands for many gradients at once, as with ``is_grads_batched``."""
    return not torch._C._has_storage(grad)


def _inputs_of(packed: Tensor | None, tensors: Sequence[Any]) -> Inputs:
    return Inputs(*tensors) if packed is None else Inputs(*unpack(packed), *tensors[3:])


def _of_others(inputs: Inputs, gradients: Sequence[Tensor], options: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """What the Function returns beside the gradients of query, key and value: the others, in the order of its
    arguments."""
    parameters = [None if given is None else grad for given, grad in zip(inputs[3:7], gradients[:4], strict=True)]
    of_mask = gradients[4] if options.get("mask_gradient") else None
    return *parameters, *(None,) * 4, of_mask, None if inputs.pre_theta is None else gradients[5], None, None


def _run_forward(inputs: Inputs, options: dict[str, Any], group: dist.ProcessGroup | None) -> Outputs:
    outputs = Outputs(*torch.ops.reattn.forward(*inputs, **options))
    if options.get("synchronised"):
        dist.all_reduce(outputs.statistics, group=group)
        outputs = outputs._replace(statistics=torch.ops.reattn.finish(*inputs, *outputs, **options))
    return outputs


def _run_backward(
    grad: Tensor,
    inputs: Inputs,
    outputs: Outputs,
    options: dict[str, Any],
    group: dist.ProcessGroup | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """All gradients; with ``into``, to which those of query, key and value are written, the others."""
    sums = None
    if options.get("synchronised"):
        sums = torch.ops.reattn.grad_sums(grad, *outputs, **options)
        dist.all_reduce(sums, group=group)
    if into is not None:
        return torch.ops.reattn.backward_into(grad, sums, *inputs, *outputs, *into, **options)
    return torch.ops.reattn.backward(grad, sums, *inputs, *outputs, **options)


class ReAttentionFunction(torch.autograd.Function):
    """The ops as one differentiable function: of ``packed`` or, where that is None, of query, key and value, and of the
    rest of :class:`Inputs`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(packed: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        *tensors, options, group = args
        return tuple(_run_forward(_inputs_of(packed, tensors), options, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        packed, *tensors, ctx.options, ctx.group = inputs
        outputs = Outputs(*output)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        # num_batches_tracked plays no part in the backward pass, and changes.
        tensors[_COUNT] = None
        if ctx.options.get("training"):
            # Nor do the running statistics.
            tensors[_RUNNING] = None, None
        else:
            # The output is needed for batch statistics alone.
            outputs = outputs._replace(out=outputs.statistics)
        ctx.save_for_backward(packed, *tensors, *outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * (_INPUTS + 3)
        if not torch.compiler.is_compiling():
            _refuse_tangents(grads[:1])
        packed, *tensors = ctx.saved_tensors
        inputs, outputs = _inputs_of(packed, tensors[:_INPUTS]), Outputs(*tensors[_INPUTS:])
        gradients: tuple[Tensor, ...]
        if torch.is_grad_enabled():
            # Through a Function, so that what is differentiated a second time says that it cannot be.
            function = ReAttentionBackward if torch.compiler.is_compiling() else EagerBackward
            gradients = function.apply(grads[0], *inputs, *outputs, ctx.options, ctx.group)
        elif packed is None or torch.compiler.is_compiling() or _is_batched(grads[0]):
            # The compiler joins the parts itself; batched gradients cannot be written into one tensor.
            gradients = _run_backward(grads[0], inputs, outputs, ctx.options, ctx.group)
        else:
            whole = torch.empty_like(packed, memory_format=torch.contiguous_format)
            gradients = _run_backward(grads[0], inputs, outputs, ctx.options, ctx.group, unpack(whole))
            return whole, *(None,) * 3, *_of_others(inputs, gradients, ctx.options)
        of_packed = None if packed is None else torch.stack(gradients[:3]).permute(1, 3, 0, 2, 4)
        maps = gradients[:3] if packed is None else (None,) * 3
        return of_packed, *maps, *_of_others(inputs, gradients[3:], ctx.options)


class ReAttentionBackward(torch.autograd.Function):
    """The gradients as a function of the output's gradient and what the forward pass saved; not differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *tensors, options, group = args
        inputs, outputs = Inputs(*tensors[:_INPUTS]), Outputs(*tensors[_INPUTS:])
        return _run_backward(grad, inputs, outputs, options, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_ONCE)


class _NoTangents:
    """Says what forward-mode differentiation meets; torch.compile takes no Function that has ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_ONCE)


class TransformedFunction(_NoTangents, ReAttentionFunction):
    """:class:`ReAttentionFunction` in the transforms of ``torch.func``, outside the compiler."""


class EagerFunction(_NoTangents, torch.autograd.Function):
    """:class:`ReAttentionFunction` outside both: of a Function that has ``setup_context`` torch binds the arguments to
    their names in every call, which takes longer than a small problem."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = ReAttentionFunction.forward(*args)
        ReAttentionFunction.setup_context(ctx, args, output)
        return output

    backward = staticmethod(ReAttentionFunction.backward)


class EagerBackward(_NoTangents, ReAttentionBackward):
    """:class:`ReAttentionBackward` outside the compiler."""
