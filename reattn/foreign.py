"""What the attention layers of other libraries have in common, seen by their parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reattn.checks import unlike_linear

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class JoinedLinear(nn.Module):
    """Linear layers of one input, or what is called like them, with their outputs side by side."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        sizes = [(int(layer.in_features), int(layer.out_features)) for layer in layers]  # type: ignore[arg-type]
        self.in_features, self.out_features = sizes[0][0], sum(size for _, size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def merged_linear(layers: Sequence[Any]) -> nn.Linear:
    """One linear layer for several of the same input, with copies of their weights."""
    weight, bias = merged([layer.weight for layer in layers], [layer.bias for layer in layers])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    trains = any(p.requires_grad for layer in layers for p in layer.parameters())
    linear.weight = nn.Parameter(weight, requires_grad=trains)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trains)
    return linear


def merged(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Weights of several linear layers as those of one; a bias that only some have is 0 in the others."""
    if any(bias is not None for bias in biases):
        filled = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
        return torch.cat([weight.detach() for weight in weights]), torch.cat(filled)
    return torch.cat([weight.detach() for weight in weights]), None


def joined(layers: Sequence[nn.Module], copy: bool) -> nn.Module:
    """Several linear layers of the same input as one: a single one where ``copy`` allows it and their weights are all
    there is to them, else a :class:`JoinedLinear` that calls them."""
    alike = len({p.requires_grad for layer in layers for p in layer.parameters()}) == 1
    if copy and alike and not any(unlike_linear(layer) for layer in layers):
        return merged_linear(layers)
    return JoinedLinear(layers)


def is_linear(part: object) -> bool:
    """Whether ``part`` is a Linear, or says how wide it is like one."""
    sizes = (getattr(part, size, None) for size in ("in_features", "out_features"))
    return isinstance(part, nn.Module) and all(isinstance(size, int) for size in sizes)


def argument_names(function: Callable[..., Any]) -> list[str]:
    """The names of a method's arguments but for the first, ``*args`` and ``**kwargs``."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.kind not in kinds]


def iterate_batches(batches: Tensor | Iterable[Any], model: nn.Module, name: str = "batches") -> Iterator[Tensor]:
    """The images of each batch, on the device of the model's first parameter.

    Args:
        batches: images, one batch; or an iterable of batches, such as a DataLoader, each a tensor, or a tuple or list
            whose first entry is one, or, as transformers has it, a mapping with one under ``"pixel_values"``. It is
            iterated once and never held.
        name: what errors call them.

    Raises:
        ValueError: a batch is anything else, or holds no image.
    """
    parameter = next(model.parameters(), None)
    for batch in [batches] if isinstance(batches, Tensor | Mapping) else batches:
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if isinstance(batch, Mapping):
            images = batch.get("pixel_values")
        if not isinstance(images, Tensor):
            raise ValueError(
                f"{name} must be a tensor, or an iterable of tensors, of tuples that begin with one or of mappings "
                "with one under 'pixel_values', "
                f"got a batch of type {type(batch).__name__}"
            )
        if not len(images):
            raise ValueError(f"{name} must hold at least one image each, got a batch of shape {tuple(images.shape)}")
        yield images if parameter is None else images.to(parameter.device)


def refuse_others(given: dict[str, Any], what: str) -> None:
    """``ValueError`` naming what is given, neither None nor False, and has no meaning to ``what``."""
    names = sorted(name for name, value in given.items() if value is not None and value is not False)
    if names:
        raise ValueError(f"{', '.join(names)} must not be given to {what}")


def keep_hooks(layer: nn.Module, replacement: nn.Module) -> None:
    """Hooks of a layer, their handles included, for what is called as it is and returns what it does."""
    for name in _HOOKS:
        setattr(replacement, name, getattr(layer, name))
