"""The operator on DTensors: samples may lie on different ranks, all else is gathered.

Mixing couples all heads, and every query sees every key, so nothing but the batch is computed in parts. What comes out,
gradients included, is that of the whole tensors, as DTensors have it: batch statistics are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reattn.backends.contract import Inputs
from reattn.checks import class_name
from reattn.problem import Problem

if dist.is_available():
    from torch.distributed._functional_collectives import broadcast
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

_MAPS = ("query", "key", "value")
_UPDATED = ("running_mean", "running_var", "num_batches_tracked")


def is_sharded(*tensors: Any) -> bool:
    """Whether any of them is a DTensor."""
    return dist.is_available() and any(isinstance(tensor, DTensor) for tensor in tensors)


def by_sample(tensor: Any) -> Any:
    """The same DTensor, sharded over its first dimension where it is, and nowhere else."""
    placements = [placement if placement == Shard(0) else Replicate() for placement in tensor.placements]
    return tensor.redistribute(tensor.device_mesh, placements)


def with_all_heads(projected: Any, width: int) -> Any:
    """What a projection puts out, all heads of it on each rank; ``ValueError`` where it is not ``width`` wide."""
    if not isinstance(projected, Tensor):
        return projected  # a proxy of torch.fx
    if type(projected) is not Tensor and is_sharded(projected):
        projected = by_sample(projected)
    if projected.shape[-1] != width:
        message = f"qkv must put out {width} features, got {projected.shape[-1]}"
        if dist.is_available() and dist.is_initialized() and width % max(projected.shape[-1], 1) == 0:
            message += (
                ": heads cannot lie on several ranks, for mixing couples them; in a plan of parallelize_module, take "
                "ColwiseParallel(output_layouts=Replicate()) for qkv and RowwiseParallel(input_layouts=Replicate()) "
                "for proj"
            )
        raise ValueError(message)
    return projected


def replicated_like(tensor: Tensor, like: Any) -> Any:
    """A tensor that is the same on all ranks, as a DTensor on the mesh of another."""
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def re_attention(
    call: Callable[[Problem, Inputs, dist.ProcessGroup | None, Tensor | None], Tensor],
    problem: Problem,
    inputs: Inputs,
    group: dist.ProcessGroup | None,
    packed: Tensor | None,
) -> Tensor:
    """``call(problem, inputs, group, packed)``, of DTensors. ``ValueError`` where some are none, or on another mesh.

    Where query is sharded over the batch, so is everything that has one; of parameters every rank then has a part of
    the gradient, which DTensor adds up where it is needed.
    """
    _check(inputs, group)
    first: Any = inputs.query if packed is None else packed
    mesh = first.device_mesh
    placements = [p if p == Shard(0) else Replicate() for p in first.placements]
    split = [dim for dim, placement in enumerate(placements) if placement == Shard(0)]
    if problem.batch_statistics and split:
        # An all-reduce is over one dimension of the mesh.
        for dim in split[1:]:
            placements[dim] = Replicate()
        split = split[:1]
        group = mesh.get_group(split[0])
        problem = problem._replace(synchronised=True)
    whole = [Replicate()] * mesh.ndim
    parts = [Partial() if dim in split else Replicate() for dim in range(mesh.ndim)]
    batch, _, seqlen, head_dim = inputs.query.shape

    def local(name: str, tensor: Any) -> Any:
        if tensor is None:
            return None
        if name in _UPDATED:
            return tensor.to_local()
        by_sample = name in _MAPS or (name == "attn_mask" and tensor.shape[0] == batch > 1)
        tensor = tensor.redistribute(mesh, placements if by_sample else whole)
        return tensor.to_local(grad_placements=placements if by_sample else parts)

    shape = torch.Size((batch, inputs.value.shape[1], seqlen, head_dim))
    if packed is None:
        inputs = Inputs(*(local(name, tensor) for name, tensor in zip(Inputs._fields, inputs, strict=True)))
    else:
        packed = local("query", packed)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        others = (local(name, tensor) for name, tensor in zip(Inputs._fields[3:], inputs[3:], strict=True))
        inputs = Inputs(query, key, value, *others)
    if problem.dropout_p > 0.0:
        inputs = inputs._replace(seed=_seed(mesh, split, problem.device))
    out = call(problem, inputs, group, packed)
    heads = shape[1]
    stride = (seqlen * heads * head_dim, head_dim, heads * head_dim, 1)
    return DTensor.from_local(out, mesh, placements, run_check=False, shape=shape, stride=stride)


def _check(inputs: Inputs, group: dist.ProcessGroup | None) -> None:
    query: Any = inputs.query
    tensor: Any
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        if tensor is None or tensor is query:
            continue
        if isinstance(query, DTensor) != isinstance(tensor, DTensor):
            other = "query" if isinstance(tensor, DTensor) else name
            like = name if isinstance(tensor, DTensor) else "query"
            hint = (
                f"; with fully_shard, leave the module that holds {name} in the unit of its attention, which calls it"
                if isinstance(tensor, DTensor)
                else ""
            )
            raise ValueError(
                f"{other} must be a DTensor, as {like} is, got {class_name(query if other == 'query' else tensor)}: "
                f"distribute both (distribute_module, distribute_tensor), or make {like} local (full_tensor){hint}"
            )
        if isinstance(tensor, DTensor) and tensor.device_mesh != query.device_mesh:
            raise ValueError(f"{name} must be on the mesh of query, {query.device_mesh}, got {tensor.device_mesh}")
        if name in _UPDATED and any(placement != Replicate() for placement in tensor.placements):
            raise ValueError(f"{name} must be replicated, got {tensor.placements}")
    if group is not None:
        raise ValueError(
            "process_group must be None for DTensors, whose batch statistics are those of the whole batch: keep "
            "BatchNorm2d, not SyncBatchNorm"
        )


def _seed(mesh: Any, split: list[int], device: torch.device) -> Tensor:
    """One seed for all ranks that hold the same samples, others for those that hold others."""
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    index = 0
    for dim in range(mesh.ndim):
        seed = broadcast(seed, 0, (mesh, dim))
        if dim in split:
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return seed + index
