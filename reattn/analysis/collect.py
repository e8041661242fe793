"""Attention maps, block by block, while a model runs: hooks that are gone afterwards, and nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reattn import convert
from reattn.analysis.attentions import (
    AttentionFunctions,
    MapKind,
    Maps,
    attention_functions,
    check_kind,
    registered_functions,
)

Batches = Tensor | Iterable[Any]


class AttentionBlock:
    """An attention about to run: what :func:`attention_hooks` hands to its visitor.

    Computes when asked and remembers no longer than the visit: later the inputs may have changed.

    Attributes:
        index: its place in the order in which the model's attentions run, from 0.
        name: its path in the model, as in ``named_modules``.
        module: the attention.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        functions: AttentionFunctions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.index = index
        self.name = name
        self.module = module
        self._functions = functions
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self._maps: Maps | None = None

    @torch.no_grad()
    def maps(self, kind: MapKind = "re_attention") -> Tensor:
        """The block's maps, ``(batch, heads, seqlen, seqlen_k)``, without dropout.

        Args:
            kind: ``"re_attention"``: the maps that the values are multiplied with, mixed and normalised in
                re-attention, the softmax in plain attention. ``"softmax"``: the maps before mixing.

        Raises:
            ValueError: ``kind`` is unknown, or the class computes something other than maps.
            RuntimeError: the visit is over.
        """
        check_kind(kind)
        if self._maps is None:
            maps = self._call(self._functions.maps)
            # Two images make a tensor that would unpack into two.
            softmax_maps, re_attention_maps = (maps, maps) if isinstance(maps, Tensor) else maps
            for tensor in (softmax_maps, re_attention_maps):
                if tensor.ndim != 4:
                    raise ValueError(
                        f"the maps of {self.name or 'the model'} ({type(self.module).__name__}) must have shape "
                        f"(batch, heads, seqlen, seqlen_k), got {tuple(tensor.shape)}"
                    )
            self._maps = softmax_maps, re_attention_maps
        return self._maps[0 if kind == "softmax" else 1]

    @property
    def mixes(self) -> bool:
        """Whether the values are multiplied with other maps than the softmax."""
        return self.maps("softmax") is not self.maps("re_attention")

    @torch.no_grad()
    def values(self) -> Tensor:
        """What the maps are multiplied with: ``(batch, heads, seqlen_k, head_dim)``.

        Raises:
            ValueError: it is not known how this class computes them.
            RuntimeError: the visit is over.
        """
        if self._functions.values is None:
            raise ValueError(
                f"the values of {self.name or 'the model'} ({type(self.module).__name__}) are not known: "
                "register_attention must be given a function for them"
            )
        return self._call(self._functions.values)

    def close(self) -> None:
        """Ends the visit."""
        self._arguments = self._maps = None

    def _call(self, function: Callable[..., Any]) -> Any:
        if self._arguments is None:
            raise RuntimeError(f"block {self.index} must be asked for its maps while it is visited, not later")
        args, kwargs = self._arguments
        return function(self.module, *args, **kwargs)


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions of ``model`` whose maps can be computed: path -> module, in the order of ``named_modules``.

    What a known attention holds inside is its own affair and not listed, nor is what pools tokens, by "AttentionPool"
    in the name of its class, unless that is registered. The model itself counts where nothing inside it does: a whole
    transformer may well have a method ``attention_maps``.

    Raises:
        ValueError: there is none; the message names those that are not known.
    """
    return {path: module for path, (module, _) in _known_attentions(model).items()}


def _known_attentions(model: nn.Module) -> dict[str, tuple[nn.Module, AttentionFunctions]]:
    found: dict[str, tuple[nn.Module, AttentionFunctions]] = {}

    def search(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if any(child is known for known, _ in found.values()):
                continue
            pools = convert.pools_tokens(child)
            functions = registered_functions(child) if pools else attention_functions(child)
            if functions is not None:
                found[child_path] = child, functions
            elif not pools:
                search(child, child_path)

    search(model, "")
    functions = None if found else attention_functions(model)
    if functions is not None:
        found[""] = model, functions
    if not found:
        unknown = unknown_attentions(model, ())
        raise ValueError(
            "model must hold modules with a method attention_maps, torch.nn.MultiheadAttention, attention layers like "
            "those of timm, transformers or x-transformers, or of a class given to register_attention, got none in "
            + type(model).__name__
            + (f": {unknown}" if unknown else "")
            + convert.left_out(model)
        )
    return found


def unknown_attentions(model: nn.Module, known: Iterable[str]) -> str:
    """The attention layers of ``model`` that are neither at a path in ``known``, nor around or inside one that is: in
    words, with path, class and reason; empty where there is none."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for path, layer in convert.find_layers(model).items():
        if not any(f"{path}.".startswith(f"{each}.") or each.startswith(f"{path}.") for each in known):
            reason = convert.unlike_attention(layer) or "it is not known"
            reasons.setdefault((type(layer).__name__, reason), []).append(path or "model")
    return convert.listed(reasons)


@contextmanager
def attention_hooks(model: nn.Module, visit: Callable[[AttentionBlock], None]) -> Iterator[None]:
    """A context in which every forward pass of ``model`` hands each attention to ``visit`` before it runs.

    Modes and gradients are the caller's. Hooks are gone afterwards, whatever was raised; graphs of ``torch.compile``,
    which know nothing of hooks, and PyTorch's fused transformer layers are not used meanwhile.

    Args:
        model: holds known attentions, see :func:`find_attentions`.
        visit: called in the order in which they run; the index starts at 0 with every forward pass of ``model``. An
            attention that runs twice is visited twice.

    Raises:
        ValueError: ``model`` holds no known attention.
    """
    ran = 0

    def restart(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal ran
        ran = 0

    def hook_for(name: str, functions: AttentionFunctions) -> Callable[..., None]:
        def visit_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal ran
            block = AttentionBlock(ran, name, module, functions, args, kwargs)
            ran += 1
            try:
                with torch.no_grad():
                    visit(block)
            finally:
                block.close()

        return visit_block

    attentions = _known_attentions(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(restart).remove)
        for name, (attention, functions) in attentions.items():
            hook = attention.register_forward_pre_hook(hook_for(name, functions), with_kwargs=True)
            stack.callback(hook.remove)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        # A graph compiled before the hooks were there would run without them.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """A context with ``model`` in eval mode and without gradients; every submodule's mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        # One by one, because parts of a model may be frozen in eval mode.
        for module, training in modes:
            module.training = training


def visit_blocks(model: nn.Module, images: Tensor, visit: Callable[[AttentionBlock], None]) -> None:
    """Runs ``model(images)`` in eval mode, without gradients, and hands each attention to ``visit`` on the way.

    On one of several ranks it waits for none, but where parameters are sharded, as by FSDP.

    Maps are computed when the visitor asks for them and not kept, so memory does not grow with depth. Parameters,
    running statistics, hooks and the train/eval mode of every submodule are afterwards what they were.

    Args:
        model: holds known attentions, see :func:`find_attentions`.
        images: the model's input, on its device.
        visit: called once for each attention, in the order they run.

    Raises:
        ValueError: ``model`` holds no known attention.
    """
    # DistributedDataParallel would send buffers to other ranks, in eval mode too.
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    with attention_hooks(model, visit), evaluation(model), ExitStack() as stack:
        for wrapper in wrappers:
            stack.callback(setattr, wrapper, "require_forward_param_sync", wrapper.require_forward_param_sync)
            wrapper.require_forward_param_sync = False
        model(images)


def visit_attention_maps(
    model: nn.Module, images: Tensor, visit: Callable[[Tensor], None], kind: MapKind = "re_attention"
) -> None:
    """Runs ``model(images)`` in eval mode, without gradients, and hands each block's maps to ``visit`` on the way.

    As :func:`visit_blocks`, for who needs one kind of maps and nothing else.

    Args:
        model, images: as in :func:`visit_blocks`.
        visit: called once for each block, in the order they run, with ``(batch, heads, seqlen, seqlen_k)``.
        kind: ``"re_attention"``: the maps that the values are multiplied with, which is what the paper compares: mixed
            and normalised in re-attention, the softmax in plain attention. ``"softmax"``: the maps before mixing.

    Raises:
        ValueError: ``kind`` is unknown, or ``model`` holds no known attention.
    """
    check_kind(kind)
    visit_blocks(model, images, lambda block: visit(block.maps(kind)))
