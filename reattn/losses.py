"""A loss beside that of the task: how alike the attention maps of adjacent blocks are, in a bounded amount of memory.

Source: the official code of DeepViT (``loss/cross_entropy.py`` of dvit_repo), which trains its model of 32 blocks with
0.1 times this for the first 12 pairs of blocks; with ``dim=2`` the similarity of the paper (arXiv 2103.11886, section
3) measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from reattn.analysis.attentions import attention_functions
from reattn.analysis.collect import find_attentions
from reattn.checks import class_name
from reattn.module import ReAttention
from reattn.ops import recomputes

__all__ = ["map_similarity"]

# Parameters are not whole, or not the ones to be trained, when maps are computed after the forward pass.
_WRAPPERS = {"FullyShardedDataParallel", "FSDPModule", "DataParallel"}


@contextmanager
def map_similarity(model: nn.Module, pairs: int | None = None, dim: int = 1) -> Iterator[Callable[[], Tensor]]:
    """Measure the mean cosine between the attention maps of adjacent blocks in a forward pass, to be added to a loss.

    A context, in which ``model`` is to run. It yields a function, to be called once after each forward pass, whose
    result is equivalent to, with the maps ``(batch, heads, seqlen, seqlen_k)`` that each block multiplies the values
    with::

        torch.stack([F.cosine_similarity(maps[p], maps[p + 1], dim=dim) for p in range(pairs)]).mean()

    The maps of two blocks exist at a time, in either pass, whatever the depth: they are computed in plain PyTorch from
    what the attentions were called with, once for the value and once more for the gradient; hooks on what makes the
    maps, as ``qkv``, fire each time. They are without dropout of the maps, and leave running statistics as they are;
    batch norm in training takes the statistics of the batch, SyncBatchNorm those of all ranks. Cosines are computed in
    float32 or better. Positions that a mask hides count as 0, and so does a batch of no images.

    Args:
        model: holds at least two attentions that :func:`reattn.analysis.find_attentions` knows: those of this package
            and of timm's ViTs, ``torch.nn.MultiheadAttention``, or what was given to
            :func:`reattn.analysis.register_attention`. DistributedDataParallel may wrap it or be it.
        pairs: how many pairs of adjacent blocks, from the first block on; None: all. ``cos_reg_component: 12`` of the
            official configuration is ``pairs=12``.
        dim: 1: cosines over the heads, one for each query and key, as in the official code. 2: over the queries, one
            for each head and key, the paper's M.

    Yields:
        ``similarity()``: a scalar in [-1, 1], float32 (float64 for float64 maps), differentiable once in what the
        attentions were called with and in their parameters. It may be called in the context or after it, under autocast
        or not: the maps have the autocast dtype of the forward pass. DistributedDataParallel wants it in the same
        backward pass as the output.

    Raises:
        TypeError, ValueError: an argument is not as described; ``model`` is compiled, sharded by FSDP or a
            DataParallel; from ``similarity()``: two blocks' maps differ in shape.
        RuntimeError: from ``similarity()``: it is not called once after each forward pass; gradients were disabled in
            the pass and are not now, as by activation checkpointing with ``use_reentrant=True``; inputs, parameters or
            mode of an attention have changed since, as by ``optimizer.step()`` or ``torch.func.functional_call``.
    """
    attentions = _checked_attentions(model)
    if isinstance(pairs, bool) or not isinstance(pairs, int | None):
        raise TypeError(f"pairs must be None or an int, got {class_name(pairs)}")
    wanted = len(attentions) if pairs is None else pairs + 1
    if not 2 <= wanted <= len(attentions):
        raise ValueError(f"pairs must lie in [1, {len(attentions) - 1}] for {len(attentions)} attentions, got {pairs}")
    if dim not in (1, 2):
        raise ValueError(f"dim must be 1, over the heads, or 2, over the queries, got {dim!r}")
    visits: list[_Visit] = []

    def restart(module: nn.Module, args: tuple[Any, ...]) -> None:
        if visits and not recomputes():
            raise RuntimeError("similarity() must be called after each forward pass of model, got a second one first")

    def hook_for(path: str, function: Callable[..., Any]) -> Callable[..., None]:
        def visit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                raise RuntimeError("map_similarity must not be used in what torch.compile compiles")
            # An attention that runs twice counts twice.
            if (pairs is None or len(visits) < wanted) and not recomputes():
                visits.append(_Visit(path, module, function, args, kwargs))

        return visit

    def similarity() -> Tensor:
        found = visits.copy()
        visits.clear()
        if len(found) < wanted:
            raise RuntimeError(
                f"similarity() must be called once after a forward pass of model in which {wanted} attentions ran, "
                f"got {len(found)}: it runs in the context, and nothing that was compiled runs it"
            )
        for visited in found:
            visited.check()
            visited.check_gradients()
        tensors = [tensor for visited in found for tensor in visited.tensors]
        parameters = {id(parameter): parameter for visited in found for parameter in visited.parameters}
        return _MeanSimilarity.apply(found, dim, len(tensors), *tensors, *parameters.values())

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(restart).remove)
        for path, attention in attentions.items():
            functions = attention_functions(attention)
            assert functions is not None
            hook = hook_for(path, functions.maps)
            stack.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield similarity


def _checked_attentions(model: object) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {class_name(model)}")
    attentions = find_attentions(model)
    if len(attentions) < 2:
        raise ValueError(f"model must hold at least two attentions, whose maps are compared, got {len(attentions)}")
    for path, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if not _WRAPPERS.isdisjoint(kinds):
            raise ValueError(
                f"model must not be sharded or replicated, got {class_name(module)} at {path or 'model'}: maps are "
                "computed after the forward pass, from parameters that it would have taken away; use "
                "DistributedDataParallel"
            )
        compiled = "OptimizedModule" in kinds or module._compiled_call_impl is not None
        if compiled and any(not path or f"{attention}.".startswith(f"{path}.") for attention in attentions):
            raise ValueError(
                f"model must not be compiled around attentions, got {class_name(module)} at {path or 'model'}, which "
                "is: its graph would run without hooks; other parts, as blocks[0].mlp, may be compiled"
            )
    return attentions


class _Visit:
    """An attention that is about to run, and what it is called with."""

    def __init__(
        self, path: str, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.path, self.module, self.function = path, module, function
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.state = self._state()
        self.has_graph = torch.is_grad_enabled()
        self.autocast: Any = nullcontext()
        kind = self.tensors[0].device.type
        if torch.amp.is_autocast_available(kind):
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            # Its cache would keep weights that were cast without a graph, for others to use.
            self.autocast = torch.autocast(kind, dtype, enabled, cache_enabled=False)

    def _state(self) -> list[Any]:
        """What the maps depend on, buffers aside, in a form that shows whether it has changed."""
        tensors = [*self.tensors, *self.module.parameters()]
        versions = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        return [versions, [module.training for module in self.module.modules()]]

    def check(self) -> None:
        """``RuntimeError`` where the maps would no longer be those of the forward pass."""
        if self._state() != self.state:
            raise RuntimeError(
                f"inputs, parameters and mode of {self.path} must stay as they are from the forward pass of model to "
                "the backward pass of similarity(), got others: call optimizer.step(), eval() and the like later, and "
                "functional_call not at all"
            )

    def check_gradients(self) -> None:
        wanted = self.parameters or any(tensor.requires_grad for tensor in self.tensors)
        if torch.is_grad_enabled() and not self.has_graph and wanted:
            raise RuntimeError(
                f"similarity() must be called under torch.no_grad(), as {self.path} ran without gradients; activation "
                "checkpointing needs use_reentrant=False"
            )

    def maps(self, tensors: Sequence[Tensor]) -> Tensor:
        """The maps for ``tensors`` in the place of the recorded ones, in float32 or better."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        if isinstance(self.module, ReAttention):
            kwargs["synchronised"] = True
        with self.autocast:
            found = self.function(self.module, *args, **kwargs)
        maps: Tensor = found if isinstance(found, Tensor) else found[1]
        return maps.to(torch.promote_types(maps.dtype, torch.float32))


class _MeanSimilarity(torch.autograd.Function):
    """One node of the graph: the blocks in order, in either pass, so that only neighbours' maps exist together."""

    @staticmethod
    def forward(ctx: Any, visits: list[_Visit], dim: int, count: int, *tensors: Tensor) -> Tensor:
        ctx.visits, ctx.dim, ctx.parameters = visits, dim, tensors[count:]
        ctx.save_for_backward(*tensors[:count])
        cosines = []
        before: tuple[str, Tensor] | None = None
        for visit in visits:
            maps = visit.maps(visit.tensors)
            if before is not None:
                if maps.ndim != 4 or maps.shape != before[1].shape:
                    raise ValueError(
                        "model must have maps (batch, heads, seqlen, seqlen_k) of one shape in adjacent blocks, got "
                        f"{tuple(before[1].shape)} in {before[0]} and {tuple(maps.shape)} in {visit.path}"
                    )
                cosines.append(_mean_cosine(before[1], maps, dim))
            before = visit.path, maps
        return torch.stack(cosines).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph must be False for map_similarity, which is differentiable once, got True")
        tensors: list[Tensor] = [*ctx.saved_tensors]
        gradients: list[Tensor | None] = [None] * (len(tensors) + len(ctx.parameters))
        place_of = {id(parameter): len(tensors) + index for index, parameter in enumerate(ctx.parameters)}

        def send_back(sources: list[tuple[int, Tensor]], maps: Tensor, leaf: Tensor) -> None:
            found = torch.autograd.grad(maps, [tensor for _, tensor in sources], leaf.grad, allow_unused=True)
            for (place, _), gradient in zip(sources, found, strict=True):
                if gradient is not None:
                    known = gradients[place]
                    # A module that runs twice has two.
                    gradients[place] = gradient if known is None else known + gradient

        before: Any = None
        first = 0
        for visit in ctx.visits:
            visit.check()
            places = range(first, first := first + len(visit.tensors))
            with torch.enable_grad():
                inputs = [tensors[place].detach().requires_grad_(ctx.needs_input_grad[3 + place]) for place in places]
                maps = visit.maps(inputs)
            sources = [(place, tensor) for place, tensor in zip(places, inputs, strict=True) if tensor.requires_grad]
            sources += [(place_of[id(parameter)], parameter) for parameter in visit.parameters]
            here = (sources, maps, maps.detach().requires_grad_()) if maps.requires_grad else ([], maps, maps)
            if before is not None:
                if before[2].requires_grad or here[2].requires_grad:
                    with torch.enable_grad():
                        cosine = _mean_cosine(before[2], here[2], ctx.dim)
                    # Into .grad of the two: a block has two neighbours.
                    cosine.backward(grad.to(cosine.dtype) / (len(ctx.visits) - 1))
                if before[2].requires_grad:
                    send_back(*before)
            before = here
        if before[2].requires_grad:
            send_back(*before)
        return None, None, None, *gradients


def _mean_cosine(maps_p: Tensor, maps_q: Tensor, dim: int) -> Tensor:
    cosines = F.cosine_similarity(maps_p, maps_q, dim=dim)
    return cosines.sum() / max(1, cosines.numel())
