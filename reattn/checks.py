"""What the arguments of the operator may be, and every message that says otherwise."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

NORMS = ("batch", "layer", None)
# To whom converts what is no longer plain.
CONVERT_FIRST = "convert first, then wrap, adapt, distribute or quantise, or undo that (peft: merge_and_unload)"


def class_name(value: object) -> str:
    """Of what class a value is, in full: there is more than one Linear, and more than one Tensor."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens beside ``forward`` where a module is called."""
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
    )


def unlike_linear(part: object) -> str | None:
    """What makes of a module more than the weight and bias of a Linear, which are all that is taken of it: None, if it
    is one and nothing else."""
    if type(part) is not nn.Linear:
        return class_name(part)
    if has_hooks(part):
        return "one with hooks"
    foreign = [name for name, _ in part.named_parameters() if name not in ("weight", "bias")]
    if foreign:
        return f"one with parameters {', '.join(foreign)}"
    return None if type(part.weight) is nn.Parameter else f"one whose weight is a {class_name(part.weight)}"


def check_tokens(x: object, dim: int | None) -> None:
    """``x (batch, seqlen, dim)``, floating and dense; dim None: any. Proxies of ``torch.fx`` are not looked at."""
    if isinstance(x, Tensor):
        if x.is_nested or x.layout is not torch.strided:
            which = f"a nested Tensor of {x.size(0)}" if x.is_nested else f"one with layout {x.layout}"
            how = "pad it, and hide the padding by attn_mask" if x.is_nested else "x.to_dense()"
            raise ValueError(f"x must be a dense Tensor (batch, seqlen, dim), got {which}: {how}")
        # Not by `in`, which torch.compile takes to differ from a size that it does not know.
        if x.ndim != 3 or (dim is not None and x.shape[2] != dim):
            raise ValueError(f"x must have shape (batch, seqlen, {dim or 'dim'}), got {_told(x, dim)}")
        if not x.is_floating_point():
            raise TypeError(f"x must have a floating dtype, got {x.dtype}")
        if x.shape[1] < 1:
            raise ValueError(f"x must hold at least one token, got {tuple(x.shape)}")
    elif not isinstance(x, torch.fx.Proxy):
        raise TypeError(f"x must be a Tensor (batch, seqlen, dim), got {class_name(x)}")


def _told(x: Tensor, dim: int | None) -> str:
    """The shape of what is no ``(batch, seqlen, dim)``, and what makes it one."""
    shape = tuple(x.shape)
    how = None
    if x.ndim == 2:
        how = "x[None] is a batch of one"
    elif x.ndim == 4 and (dim is None or dim == shape[3]):
        how = "x.flatten(1, 2) makes one sequence of rows and columns"
    elif x.ndim == 4 and dim == shape[1]:
        how = "x.flatten(2).mT makes one sequence of rows and columns"
    elif x.ndim == 3 and dim == shape[1]:
        how = "x.mT has the channels last"
    return f"{shape}: {how}" if how else f"{shape}"


def _check_not_nested(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise ValueError(
            f"{name} must be a dense Tensor, got a nested one of {tensor.size(0)}: pad it, and hide the padding by "
            "attn_mask"
        )


def check_packed(packed: Tensor) -> None:
    """Query, key and value packed: ``(batch, seqlen, 3, heads, head_dim)``."""
    _check_not_nested("query", packed)
    if packed.ndim != 5 or packed.shape[2] != 3:
        raise ValueError(
            "query must have shape (batch, seqlen, 3, heads, head_dim) where key and value are None, got "
            f"{tuple(packed.shape)}"
        )


def heads_after(query: Tensor, theta: object) -> int:
    """Heads after mixing by theta: those of query where there is none, or where it does not fit."""
    heads = query.shape[1]
    if isinstance(theta, Tensor) and theta.ndim == 2 and theta.shape[0] == heads and theta.shape[1]:
        return theta.shape[1]
    return heads


def check_maps(query: Tensor, key: Tensor | None, value: Tensor | None, theta: object) -> None:
    """Query ``(batch, heads, seqlen, head_dim)``; key ``(batch, heads, seqlen_k, head_dim)``; value alike, but with the
    heads that theta makes."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {class_name(tensor)}")
        _check_not_nested(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, seqlen, head_dim), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device}, as query is, got {tensor.dtype} on {tensor.device}"
            )
    assert key is not None and value is not None
    batch, heads, _, head_dim = query.shape
    if heads < 1 or head_dim < 1:
        raise ValueError(f"query must have at least one head and head_dim 1, got {tuple(query.shape)}")
    heads_out = heads_after(query, theta)
    for name, tensor, count in (("key", key, heads), ("value", value, heads_out)):
        like_key = (batch, count, key.shape[2], head_dim)
        if tuple(tensor.shape) != like_key:
            whom = "query and key" if count == heads else "query, key and theta"
            raise ValueError(f"{name} must have shape {like_key} to match {whom}, got {tuple(tensor.shape)}")
    if key.shape[2] < 1:
        raise ValueError(f"key must hold at least one position, got {tuple(key.shape)}")


def check_heads(query: Tensor, value: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """``pre_theta (heads, heads)``, ``pre_bias (heads,)``, ``theta (heads, value's heads)``, the others ``(value's
    heads,)``, each or None, on the query's device. Statistics are no leaves."""
    heads, heads_out = query.shape[1], value.shape[1]
    shapes: dict[str, tuple[int, ...]] = {
        "theta": (heads, heads_out),
        "pre_theta": (heads, heads),
        "pre_bias": (heads,),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        expected = shapes.get(name, (heads_out,))
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {class_name(tensor)}")
        if tuple(tensor.shape) != expected:
            before = name.startswith("pre_") or heads == heads_out
            whom = f"query's {heads} heads" if before else f"value's {heads_out} heads"
            raise ValueError(f"{name} must have shape {expected} to match {whom}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, as query is, got {tensor.device}")
        if tensor.requires_grad and name.startswith("running_"):
            raise ValueError(f"{name} must not require a gradient: the operator has none for it")
    if tensors["pre_bias"] is not None and tensors["pre_theta"] is None:
        raise ValueError("pre_bias must come with pre_theta, got pre_bias alone")


def check_mask(query: Tensor, key: Tensor, value: Tensor, attn_mask: object, is_causal: object) -> None:
    """``attn_mask`` None, boolean or floating, on the query's device, and broadcastable to the maps before and after
    mixing; ``is_causal`` a bool."""
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {class_name(is_causal)}")
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a Tensor, got {class_name(attn_mask)}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must have dtype bool or a floating one, got {attn_mask.dtype}")
    maps = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(attn_mask.shape), reversed(maps), strict=False)
    if attn_mask.ndim > 4 or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(
            f"attn_mask must broadcast to (batch, heads, seqlen, seqlen_k) = {maps}, got {tuple(attn_mask.shape)}"
        )
    heads, heads_out = query.shape[1], value.shape[1]
    if heads != heads_out and attn_mask.ndim > 2 and attn_mask.shape[-3] != 1:
        raise ValueError(
            f"attn_mask must be one for all heads where theta makes {heads_out} of {heads}, "
            f"got {tuple(attn_mask.shape)}"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on {query.device}, as query is, got {attn_mask.device}")


def check_numbers(**options: object) -> None:
    """Plain numbers: a tensor in their place would never get its gradient."""
    for name, option in options.items():
        # The first test is the fast one.
        if type(option) is not float and not isinstance(option, (numbers.Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name} must be a number, got {class_name(option)}")


def check_factor(name: str, factor: object) -> None:
    """A number, or a tensor of one floating element, which is differentiated."""
    if not isinstance(factor, Tensor):
        check_numbers(**{name: factor})
    elif factor.numel() != 1 or not factor.is_floating_point():
        raise TypeError(
            f"{name} must be a number or a floating Tensor of one element, got {factor.dtype} {tuple(factor.shape)}"
        )


def check_called(name: str, function: object, **instead: object) -> None:
    """A function that is called on the maps, and None for what it stands in for."""
    if not callable(function):
        raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    for other, option in instead.items():
        if option is not None:
            raise ValueError(f"{other} must not be given where {name} is called on the maps, a {class_name(function)}")


def check_norm(
    query: Tensor,
    key: Tensor,
    norm: str | None,
    *,
    statistics: tuple[Tensor | None, Tensor | None],
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    process_group: dist.ProcessGroup | None,
) -> None:
    """The norm's name, and what batch norm needs beside it."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    running_mean, running_var = statistics
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, got one of them")
    if num_batches_tracked is not None:
        if not isinstance(num_batches_tracked, Tensor):
            raise TypeError(f"num_batches_tracked must be a Tensor, got {class_name(num_batches_tracked)}")
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.numel() != 1:
            raise TypeError(
                "num_batches_tracked must be one int64, got "
                f"{num_batches_tracked.dtype} {tuple(num_batches_tracked.shape)}"
            )
        if num_batches_tracked.device != query.device:
            raise ValueError(
                f"num_batches_tracked must be on {query.device}, as query is, got {num_batches_tracked.device}"
            )
    if norm != "batch":
        return
    if not training:
        if running_mean is None:
            raise ValueError(
                "running_mean and running_var must be given for norm='batch' with training=False, got None"
            )
        return
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be None or in [0, 1], got {momentum}")
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("num_batches_tracked must be given with momentum=None, got None")
    positions = query.shape[0] * query.shape[2] * key.shape[2]
    if positions == 1 and process_group is None:
        raise ValueError(
            "query and key must span more than one position for norm='batch' with training=True, got "
            f"batch {query.shape[0]}, seqlen {query.shape[2]}, seqlen_k {key.shape[2]}"
        )
