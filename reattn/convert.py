"""Turn a trained vision transformer into one with re-attention that starts out computing the same.

:func:`to_re_attention` swaps the attention layers, :func:`calibrate` makes batch norm's statistics those of data. Both
know layers by their parts, not by their class, so timm, transformers and others need not be installed.
"""

from __future__ import annotations

import inspect
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reattn import multihead, reference, transformers, x_transformers
from reattn.checks import CONVERT_FIRST, class_name, has_hooks, unlike_linear
from reattn.foreign import argument_names, is_linear, iterate_batches, keep_hooks, refuse_others
from reattn.models.deepvit import select_blocks
from reattn.module import ReAttention

# What makes a module an attention layer: a number of heads, and one of these.
_PROJECTIONS = ("qkv", "q", "qk", "q_proj", "query", "in_proj_weight")
# What the class of an attention layer that pools tokens, into a class token as an example, has in its name.
_POOLING = ("Pool", "ClassAtt")
# The parts that have a place in ReAttention. The first two must be there.
_PARTS = ("qkv", "proj", "q_norm", "k_norm", "norm", "gate", "attn_drop", "proj_drop")
# CaiT's linear layers over the heads, before and after the softmax.
_TALKING_HEADS = ("proj_l", "proj_w")
# The same of the official DeepViT code, with its norm; known to the analysis alone.
_OFFICIAL = ("reatten_matrix", "var_norm")
_FORWARD_ARGUMENTS = ("attn_mask", "is_causal")
# Layers that are called in another way: each is replaced by a module of its own.
_LIBRARIES: tuple[Any, ...] = (x_transformers, transformers, multihead)
# The layers whose weights are copied, and not called.
_COPIED: dict[Any, tuple[str, ...]] = {None: _TALKING_HEADS, x_transformers: ("to_q", "to_k", "to_v", "attend")}
# Wrappers that know the parameters of what they wrapped, and would leave out new ones.
_WRAPPERS = {"DistributedDataParallel", "DDP", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_WRAPPERS |= {"GradSampleModule"}
# Agreement on a probe, relative to the largest output: rounding, against another formula altogether.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}
_COARSE = 5e-2  # of bfloat16, and of whatever is quantised
# The second is longer than what layers commonly attend to where that is not all.
_PROBES = ((2, 7), (1, 260))
# The layers, with their settings, that gave on a probe what their parts say.
_agreed: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_MAP_ELEMENTS = 2**25


def to_re_attention(
    model: nn.Module,
    blocks: int | Sequence[int] | None = None,
    norm: str | None = "batch",
    *,
    norm_eps: float = 1e-5,
    norm_momentum: float | None = 0.1,
    backend: str = "auto",
) -> nn.Module:
    """Replace attention layers by :class:`reattn.ReAttention`, in place, without changing what the model computes.

    Equivalent to ``layer = ReAttention(...)`` for each, with the projections, query and key norms, gate and dropouts of
    the old layer (the modules themselves, not copies), theta the identity and its bias 0. The talking heads of CaiT mix
    already: ``proj_l`` becomes ``pre_theta`` and ``pre_bias``, ``proj_w`` theta and its bias. So do those of
    x-transformers. Its layers, those of transformers and ``torch.nn.MultiheadAttention`` are replaced by modules that
    hold a ReAttention and are called as they are, hooks included:
    :class:`reattn.x_transformers.XTransformersAttention`, :class:`reattn.transformers.TransformersAttention` and
    :class:`reattn.multihead.MultiheadReAttention`.

    ============== =============== =================================================================================
    norm           in eval mode    in training mode, right after the conversion
    ============== =============== =================================================================================
    ``None``       unchanged       unchanged
    ``"batch"``    unchanged       changed, until :func:`calibrate` is called: batch norm then divides the maps by
                                   the deviation of the batch, and nothing that is known beforehand multiplies them
                                   by it. Statistics start as mean 0, variance ``1 - eps``: the identity.
    ``"layer"``    not possible    LayerNorm over the heads takes away their mean and their scale at every position
                                   of the map, and no weight brings back what it no longer knows; refused.
    ============== =============== =================================================================================

    "Unchanged" is up to rounding in the model's dtype.

    Args:
        model: any module that holds attention layers of the form of timm's ViT ``Attention``: ``qkv`` and ``proj``
            (Linear, or called like one: with LoRA's adapters, quantised), ``num_heads``, and, where there are any,
            ``q_norm``, ``k_norm``, ``norm``, ``gate``, ``attn_drop``, ``proj_drop``, ``proj_l``, ``proj_w``,
            ``scale``; ``forward(x)``, ``x (batch, seqlen, dim)``, with ``attn_mask`` and ``is_causal`` at most. Any
            floating dtype and device, both kept, and so are the training mode and ``requires_grad`` of what is moved.
            :class:`reattn.models.DeepViT` with ``attention="self"`` is one. Or a model of x-transformers (1.39 and
            later) whose layers are plain attention, causal or not, with talking heads, masks and biases of the scores
            or without: no rotary embeddings, no cache. Or one of transformers (ViT, DeiT, DINOv2, CLIP, SigLIP, BEiT),
            of torchvision (``VisionTransformer``), or of ``torch.nn.TransformerEncoderLayer``.
        blocks: which layers, counted in the order of the model, so that i is block i of a ViT: None for all, an int for
            the last so many, or a sequence of indices, negative ones from the end. Layers that are ReAttention already
            stay as they are. Attention that pools tokens (timm's ``AttentionPool...``, CaiT's class attention) is not
            counted.
        norm: the norm of the mixed maps, see above.
        norm_eps, norm_momentum: of batch norm, as in :class:`reattn.ReAttention`.
        backend: as in :func:`reattn.re_attention`.

    Returns:
        ``model``. Keys of its state dict stay, with ``theta``, ``theta_bias`` and ``head_norm.*`` added to each layer;
        those of talking heads, and all in a layer of the other libraries, become ReAttention's. A state dict that was
        saved before is still loaded, but for what was added: with ``strict=True`` where ``norm=None`` and every layer
        has talking heads after the softmax.
        An optimizer made before knows nothing of the new parameters: make it afterwards.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``norm`` or ``blocks`` does not fit, there is no layer to convert, ``model`` is wrapped by what
            would not know the new parameters (DistributedDataParallel, FSDP, ...), or a layer has no equivalent
            (relative positions, rotary embeddings, cross-attention, dropout after the talking heads or by other means
            than ``attn_drop`` and ``proj_drop``, ``forward`` replaced on the instance, ...): the message gives the path
            and the reason for each. The model is then as it was.

    Source: DeepViT (arXiv 2103.11886), section 4, for the layer; the way in is this package's own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {class_name(model)}")
    if norm == "layer":
        raise ValueError(
            "norm must be 'batch' or None, got 'layer': LayerNorm over the heads removes their mean and scale at every "
            "position of the maps, so no setting of it leaves a trained model unchanged"
        )
    if norm not in ("batch", None):
        raise ValueError(f"norm must be 'batch' or None, got {norm!r}")
    if is_attention(model):
        raise ValueError(f"model must hold attention layers to replace, got one itself ({class_name(model)})")
    layers = find_layers(model)
    if not layers:
        raise ValueError(
            f"model must hold attention layers with num_heads and one of {', '.join(_PROJECTIONS)}, "
            f"got {class_name(model)} without any{left_out(model)}"
        )
    paths = [list(layers)[index] for index in select_blocks(blocks, len(layers), "blocks")]
    paths = [path for path in paths if not isinstance(layers[path], ReAttention)]
    _refuse_wrappers(model, paths)

    reasons: dict[tuple[str, str], list[str]] = {}
    replacements: dict[int, nn.Module] = {}
    crossing = {id(part.multihead_attn) for part in model.modules() if isinstance(part, nn.TransformerDecoderLayer)}
    uses = Counter(id(u) for m in model.modules() for u in (*m._parameters.values(), *m._modules.values()))
    for path in paths:
        layer, library = layers[path], _library(layers[path])
        tied = [name for name, part in layer.named_children() if _is_tied(part, uses)]
        reason = _not_convertible(layer)
        if id(layer) in crossing:
            reason = (
                "it attends from one sequence to another: convert the other layers alone, by "
                "to_re_attention(model, blocks=...)"
            )
        elif read := [name for name in tied if name in _COPIED.get(library, ())]:
            reason = reason or f"weights of its {', '.join(read)} are shared, and would no longer be"
        if not reason:
            converted = _converted(_parts(layer, copy=not tied), norm, norm_eps, norm_momentum)
            replacement = library.in_its_place(layer, converted) if library else converted
            converted.backend = "reference"
            reason = _disagreement(layer, replacement)
            converted.backend = backend
            replacements[id(layer)] = replacement
        if reason:
            reasons.setdefault((class_name(layer), reason), []).append(path)
    if reasons:
        raise ValueError("model holds attention layers that have no equivalent in re-attention: " + listed(reasons))
    for library in {_library(layers[path]) for path in paths} - {None}:
        library.prepare(model)
    for path in paths:
        if has_hooks(layers[path]):
            keep_hooks(layers[path], replacements[id(layers[path])])
    # By identity: a layer that is used in two places becomes one layer used in two places.
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    return model


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor | Iterable[Any]) -> nn.Module:
    """Make batch norm's statistics in every :class:`reattn.ReAttention` those of ``images``, in place, changing its
    weight and bias along with them so that the model computes what it did.

    Equivalent to ``weight *= sqrt((var + eps) / (running_var + eps))``, ``bias += weight * (mean - running_mean) /
    sqrt(running_var + eps)`` with the old values on the right, then ``running_mean, running_var = mean, var``, of the
    mixed maps over batch and positions (the variance without Bessel's correction). After :func:`to_re_attention` that
    is ``weight = sqrt(var + eps)``, ``bias = mean``.

    The output stays what it was in eval mode for any images. In training mode, where it is the batch that gives the
    statistics, it is that of eval mode on ``images`` as one batch, without dropout, and close to it on batches that
    resemble them; so calibrate on images prepared as for training, and on more of them than a batch.

    Args:
        model: holds at least one ReAttention with ``norm="batch"``; run in eval mode, its modes are put back.
        images: one batch as ``model`` takes it, or an iterable of batches, each a tensor, a tuple or list that begins
            with one, or a mapping with one under ``"pixel_values"``. In the model's dtype. Under
            DistributedDataParallel, calibrate before wrapping, on the same images in every process.

    Returns:
        ``model``.

    Raises:
        ValueError: no layer to calibrate, a batch norm without weight, bias or running statistics, or no images, or
            what is none; the message names the layer.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ReAttention) and isinstance(module.head_norm, _BatchNorm)
    }
    if not layers:
        raise ValueError(f"model must hold a ReAttention with norm='batch', got {class_name(model)} without any")
    for path, layer in layers.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer.head_norm, part) is None:
                raise ValueError(f"head_norm of {path or 'model'} must have a {part} to be calibrated, got None")

    moments = {path: _Moments() for path in layers}
    hooks = [
        layer.register_forward_pre_hook(_observer(moments[path]), with_kwargs=True) for path, layer in layers.items()
    ]
    try:
        with _in_mode(model, False):
            for batch in iterate_batches(images, model, "images"):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()

    unused = [path for path in layers if not moments[path].count.any()]
    if unused:
        raise ValueError(f"images must reach every layer to be calibrated, got none for {', '.join(unused)}")
    for path, layer in layers.items():
        norm: Any = layer.head_norm
        mean, var = moments[path].mean, moments[path].var
        old_scale = (norm.running_var.to(var) + norm.eps).rsqrt()
        gain = norm.weight.to(var) * old_scale
        norm.bias.copy_(norm.bias.to(var) + gain * (mean - norm.running_mean.to(var)))
        norm.weight.copy_(gain * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return model


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a model by their paths, whether they can be converted or not, but for what pools
    tokens."""
    pools = [path for path, module in model.named_modules() if pools_tokens(module)]
    return {
        path: module
        for path, module in model.named_modules()
        if is_attention(module) and not any(path.startswith(f"{pool}.") for pool in pools)
    }


def is_attention(module: nn.Module) -> bool:
    """Whether a module has a number of heads and a projection to attend by, and does not pool tokens."""
    if isinstance(module, torch.jit.ScriptModule):
        return False  # its class has no forward pass to look at
    if _library(module) is not None:
        return True
    if any(name in type(module).__name__ for name in _POOLING):
        return False
    # The second is there to be named: what has other names is not known.
    if isinstance(getattr(module, "num_heads", None), int):
        return any(hasattr(module, name) for name in _PROJECTIONS)
    return isinstance(getattr(module, "heads", None), int) and any(hasattr(module, n) for n in ("qkv", "to_qkv"))


def left_out(model: nn.Module) -> str:
    """What an error says of the modules that :func:`pools_tokens` is true of."""
    pools = [
        f"{path} ({class_name(module)})" for path, module in model.named_modules() if path and pools_tokens(module)
    ]
    return f"; left out, as what pools tokens by the name of its class: {', '.join(pools)}" if pools else ""


def pools_tokens(module: nn.Module) -> bool:
    """Whether a module is named after attention that pools tokens, as timm's AttentionPoolLatent and SigLIP's head."""
    return "AttentionPool" in type(module).__name__


def _library(layer: nn.Module) -> Any:
    """Whose layer it is, None for those of timm's form."""
    return next((library for library in _LIBRARIES if library.is_attention(layer)), None)


def _not_convertible(layer: nn.Module) -> str | None:
    """Why ``layer`` cannot be ReAttention, by its parts; None if they all have a place there."""
    library = _library(layer)
    if "forward" in vars(layer):
        return "its forward was replaced on the instance, which would be lost"
    if has_hooks(layer) and library in (None, x_transformers):
        return "it has hooks, which would be lost"
    if library:
        return library.not_convertible(layer)
    if any(is_attention(part) for part in layer.modules() if part is not layer):
        return f"it wraps another attention layer: {CONVERT_FIRST}"
    if hasattr(layer, _OFFICIAL[0]):
        return (
            "it is re-attention already: reattn.checkpoints.load_checkpoint loads the official code's weights into a "
            "model of reattn.models"
        )
    foreign = [name for name in argument_names(type(layer).forward)[1:] if name not in _FORWARD_ARGUMENTS]
    if foreign:
        return f"its forward takes {', '.join(foreign)}"
    if reason := _foreign_parts(layer):
        return reason
    drop = getattr(layer, "attn_drop", None)
    for name, child in layer.named_children():
        if isinstance(child, nn.Identity) and has_hooks(child) and (child is drop or name not in _PARTS):
            return f"its {name}, an Identity, has hooks, which would be lost"
    if hasattr(layer, "proj_w") and getattr(drop, "p", 0.0) > 0.0:
        return "its attn_drop drops after mixing, and ReAttention before: set attn_drop.p to 0"
    return None


def _foreign_parts(layer: Any) -> str | None:
    """What a layer of timm's form has that ReAttention has no place for, or lacks."""
    if not isinstance(getattr(layer, "num_heads", None), int):
        return f"it has no num_heads, and may name other parts in another way than {', '.join(_PARTS[:2])}, too"
    own = {name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))}
    own |= {name for name, child in layer.named_children() if not isinstance(child, nn.Identity)}
    foreign = sorted(own - {*_PARTS, *_TALKING_HEADS, *_OFFICIAL})
    if foreign:
        return f"it holds {', '.join(foreign)}"
    for name in ("qkv", "proj"):
        # ReAttention does nothing but call them.
        if not is_linear(part := getattr(layer, name, None)):
            return (
                f"{name} must be a torch.nn.Linear, or have in_features and out_features like one, "
                f"got {class_name(part)}: {CONVERT_FIRST}"
            )
    for parameter, tensor in layer.named_parameters():
        if "DTensor" in class_name(tensor):
            return f"{parameter} must be no {class_name(tensor)} yet: {CONVERT_FIRST}"
    qkv, proj, heads = (getattr(layer, name) for name in ("qkv", "proj", "num_heads"))
    if qkv.out_features != 3 * proj.in_features or proj.in_features % heads:
        return (
            f"qkv must put out three times what proj takes in, for {heads} heads, "
            f"not {qkv.out_features} and {proj.in_features}"
        )
    drop = getattr(layer, "attn_drop", None)
    if not isinstance(drop, (nn.Dropout, nn.Identity, type(None))):
        return f"attn_drop must be a torch.nn.Dropout, got {class_name(drop)}"
    for name in _TALKING_HEADS:
        part = getattr(layer, name, None)
        if part is None:
            continue
        if unlike := unlike_linear(part):
            return (
                f"{name} must be a plain torch.nn.Linear from {heads} heads to as many, got {unlike}: {CONVERT_FIRST}"
            )
        if part.weight.shape != (heads, heads):
            return f"{name} must be a torch.nn.Linear from {heads} heads to as many, got {part}"
    mixing, norm = (getattr(layer, name, None) for name in _OFFICIAL)
    if mixing is not None and (not isinstance(norm, nn.Module) or mixing.weight.shape != (heads, heads, 1, 1)):
        return f"reatten_matrix must be a torch.nn.Conv2d of size 1 from {heads} heads to as many, got {mixing}"
    return None


def unlike_attention(layer: nn.Module) -> str | None:
    """Why the maps of ``layer`` cannot be told from its parts; None if :func:`stand_in` computes them."""
    if library := _library(layer):
        reason = library.not_convertible(layer)
    elif any(is_attention(part) for part in layer.modules() if part is not layer):
        reason = "it wraps another attention layer"
    elif not argument_names(type(layer).forward):
        reason = "its forward does not name what it takes"
    else:
        reason = _foreign_parts(layer)
    if reason or "forward" in vars(layer):
        return reason or _disagreement(layer, None)
    # Nothing that refers to the layer, which would then never be forgotten.
    kinds = (bool, int, float, str)
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, kinds) and k != "training"} for m in layer.modules()]
    settings = type(layer).forward, numbers, {parameter.device for parameter in layer.parameters()}
    if _agreed.get(layer) != settings:
        if reason := _disagreement(layer, None):
            return reason
        _agreed[layer] = settings
    return None


def stand_in(layer: nn.Module) -> ReAttention:
    """A ReAttention of the parts of ``layer``, to look at its maps: nothing is copied but the weights that mix heads;
    where none are mixed, there is no theta."""
    parts = _parts(layer, copy=False)
    converted = _converted(parts, None, 0.0, None)
    if all(getattr(parts, name, None) is None for name in (_TALKING_HEADS[1], _OFFICIAL[0])):
        converted.theta = converted.theta_bias = None
    converted.backend = "reference"
    return converted


def tokens_and_mask(
    layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, bool]:
    """The arguments of a layer's forward pass as those of its :func:`stand_in`.

    Raises:
        ValueError: one is given that has an effect which is not known.
    """
    names = argument_names(type(layer).forward)
    arguments = dict(zip(names, args, strict=False)) | kwargs
    if library := _library(layer):
        return library.tokens_and_mask(layer, arguments)
    arguments |= {f"argument {i + 1} by position": args[i] for i in range(len(names), len(args))}
    x, known = arguments.pop(names[0]), {n: arguments.pop(n) for n in _FORWARD_ARGUMENTS if n in arguments}
    if any(value is not None and value is not False for value in arguments.values()):
        with torch.no_grad(), _probed(layer):
            outputs = layer.forward(*args, **kwargs), layer.forward(x, **known)
        got, expected = (output[0] if isinstance(output, tuple) else output for output in outputs)
        if not _is_same(got, expected, layer):
            refuse_others(arguments, f"a {class_name(layer)} whose maps are measured")
    return x, known.get("attn_mask"), known.get("is_causal", False)


def _parts(layer: nn.Module, copy: bool) -> nn.Module:
    """The parts of a layer by the names of timm's Attention."""
    library = _library(layer)
    if library is None:
        return layer
    return library.parts(layer, copy)


def _converted(layer: Any, norm: str | None, norm_eps: float, norm_momentum: float | None) -> ReAttention:
    """A ReAttention of the parts of ``layer``, which keeps them too."""
    qkv, heads = layer.qkv, layer.num_heads
    factory = _factory(layer)
    converted = ReAttention(
        qkv.in_features,
        heads,
        norm=norm,
        attn_head_dim=qkv.out_features // (3 * heads),
        theta_init="identity",
        device="meta",
    )
    converted.scale = float(getattr(layer, "scale", None) or converted.scale)
    before, after = (getattr(layer, name, None) for name in _TALKING_HEADS)
    converted.theta = nn.Parameter(torch.eye(heads, **factory)) if after is None else _transposed(after.weight)
    converted.theta_bias = getattr(after, "bias", None)
    # A state dict that was saved before has none either.
    if converted.theta_bias is None and (after is None or norm is not None):
        converted.theta_bias = nn.Parameter(torch.zeros(heads, **factory))
    if before is not None:
        converted.pre_theta, converted.pre_bias = _transposed(before.weight), before.bias
    mixing, official_norm = (getattr(layer, name, None) for name in _OFFICIAL)
    if mixing is not None:
        converted.theta, converted.theta_bias = _transposed(mixing.weight.flatten(1)), mixing.bias
        converted.output_scale = float(getattr(layer, "reatten_scale", 1.0))
    if norm == "batch":
        head_norm = nn.BatchNorm2d(heads, eps=norm_eps, momentum=norm_momentum, **factory)
        assert head_norm.running_var is not None
        head_norm.running_var.fill_(1.0 - norm_eps)
        converted.head_norm = head_norm
    # Before the parts are there: their own modes stay as they are.
    converted.train(layer.training)
    for name in _PARTS:
        part = getattr(layer, name, None)
        if part is None and name != "gate":
            part = nn.Identity()
        if name == "attn_drop" and not isinstance(part, nn.Dropout):
            part = nn.Dropout(0.0).train(layer.training)
        setattr(converted, name, part)
    if official_norm is not None:
        converted.head_norm = official_norm
    return converted


def _factory(layer: Any) -> dict[str, Any]:
    """Device and dtype of the new parameters of a layer: those of the floating tensors that it has, the projection's
    first. What is quantised may have none."""
    tensors = [tensor for part in (layer.qkv, layer) for tensor in (*part.parameters(), *part.buffers())]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.get_default_dtype()
    return {"device": (floating or tensors or [torch.empty(0)])[0].device, "dtype": dtype}


def _is_quantised(part: nn.Module) -> bool:
    """Whether the input of a projection is rounded, or may be: it has no plain floating parameter."""
    return not any(type(p) is nn.Parameter and p.is_floating_point() for p in part.parameters())


def _transposed(weight: Tensor) -> nn.Parameter:
    """A linear layer's weight over the heads, ``(out, in)``, as theta."""
    return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)


@torch.no_grad()
def _disagreement(layer: nn.Module, replacement: nn.Module | None) -> str | None:
    """Why ``layer`` is no softmax attention, whatever its parts look like; None if it and its replacement, or else its
    :func:`stand_in`, give the same on a probe."""
    inside = stand_in(layer)
    factory = _factory(inside)
    if factory["device"].type == "meta":
        return None
    library = _library(layer)
    run = library.output if library else lambda module, x: module.forward(x)
    runs = [(shape, False) for shape in _PROBES]
    if replacement and not library:
        runs.append((_PROBES[0], True))
    for (batch, seqlen), training in runs:
        shape = (batch, seqlen, inside.qkv.in_features)
        probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**factory)
        try:
            with _probed(layer, training):
                expected = run(layer, probe)
        except Exception as error:  # whatever a foreign layer may raise
            return f"it does not take an input of shape {shape}: {error}"
        if isinstance(expected, tuple) and expected:
            if replacement is not None:
                return (
                    "its forward returns a tuple, and ReAttention, which stores no maps, the output alone: have it and "
                    "the code that calls it do so too; reattn.analysis computes the maps"
                )
            expected = expected[0]
        # In training mode the replacement's batch norm would change the maps.
        other = inside if training or not replacement else replacement
        with _probed(other, training):
            got = inside(*tokens_and_mask(layer, (probe,), {})) if other is inside else run(other, probe)
        if not isinstance(expected, Tensor) or expected.shape != got.shape:
            return f"it does not give an output of shape {tuple(got.shape)} for an input of shape {shape}"
        if not _is_same(got, expected, inside):
            if training:
                return "in training mode it does more than attn_drop and proj_drop"
            return f"its output for an input of shape {shape} is not that of softmax attention"
    return None


def _is_same(got: Tensor, expected: Tensor, layer: Any) -> bool:
    """Whether two outputs of a layer differ by rounding at most."""
    tolerance = _TOLERANCES.get(_factory(layer)["dtype"], _COARSE)
    if _is_quantised(layer.qkv) or _is_quantised(layer.proj):
        # The least difference in what they are given may round it to another number.
        tolerance = _COARSE
    largest = expected.abs().max().item()
    return got.shape == expected.shape and (got - expected).abs().max().item() <= tolerance * largest


def _is_tied(part: nn.Module, uses: Counter[int]) -> bool:
    """Whether other modules hold ``part``, or something in it that has parameters, too."""
    modules = (module for module in part.modules() if any(True for _ in module.parameters()))
    return any(uses[id(each)] > 1 for each in (*modules, *part.parameters()))


def _refuse_wrappers(model: nn.Module, paths: Iterable[str]) -> None:
    """``ValueError`` where a layer lies in, or holds, a wrapper that would not know its new parameters."""
    for at, module in model.named_modules():
        if _WRAPPERS.isdisjoint(kind.__name__ for kind in type(module).__mro__):
            continue
        for path in paths:
            if not at or at == path or path.startswith(f"{at}.") or at.startswith(f"{path}."):
                found = f"{class_name(module)} at {at or 'model'}"
                raise ValueError(
                    f"model must not be wrapped yet, got {found}, which would leave out the new parameters of {path}: "
                    f"{CONVERT_FIRST}"
                )


def listed(reasons: dict[tuple[str, str], list[str]]) -> str:
    return "; ".join(
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} ({kind}): {reason}"
        for (kind, reason), paths in reasons.items()
    )


class _Moments:
    """Mean and variance of each head's maps over what is visible in all batches seen, in float64 where the device has
    it."""

    def __init__(self) -> None:
        self.count = self.mean = self.var = torch.zeros(())

    def add(self, maps: Tensor, visible: Tensor | None) -> None:
        dtype, over = torch.float32 if maps.device.type == "mps" else torch.float64, (0, 2, 3)
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        taken = torch.ones_like(maps) if visible is None else visible.to(maps.dtype).expand(maps.shape)
        count = taken.sum(over, dtype=dtype)
        mean = (maps * taken).sum(over, dtype=dtype) / count.clamp(min=1)
        centred = (maps - mean.to(maps.dtype)[:, None, None]) * taken
        var = centred.square().sum(over, dtype=dtype) / count.clamp(min=1)
        self.count, self.mean, self.var = (t.to(count) for t in (self.count, self.mean, self.var))
        share = count / (self.count + count).clamp(min=1)
        gap = mean - self.mean
        self.mean = self.mean + share * gap
        self.var = (1 - share) * self.var + share * var + share * (1 - share) * gap.square()
        self.count = self.count + count


def _observer(moments: _Moments) -> Any:
    """A forward pre-hook that adds the mixed maps, before their norm, of a ReAttention's input."""

    def observe(layer: ReAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        mask: Tensor | None = bound.get("attn_mask")
        is_causal = bound.get("is_causal", False)
        shared = mask is None or mask.ndim < 4 or mask.shape[0] == 1
        query, key, _ = layer.project(layer.pre_norm(bound["x"]))
        step = max(1, _MAP_ELEMENTS // max(1, query.shape[1] * query.shape[2] * key.shape[2]))
        for start in range(0, len(query), step):
            images = slice(start, start + step)
            queries, keys = query[images], key[images]
            hides = mask if mask is None or shared else mask[images]
            _, mixed = reference.re_attention_maps(
                queries, keys, **layer.mixing(), scale=layer.scale, attn_mask=hides, is_causal=is_causal
            )
            moments.add(mixed, reference.visible_keys(hides, is_causal, queries, keys))

    return observe


@contextmanager
def _probed(module: nn.Module, training: bool = False) -> Iterator[None]:
    """A context to call ``module.forward`` in and leave no trace: without the forward hooks inside, and in training
    mode without ``attn_drop`` and ``proj_drop``."""
    with ExitStack() as stack:
        stack.enter_context(_in_mode(module, training))
        for part in module.modules():
            # Hooks that run before may be a part of it, as weight norm is.
            if part._forward_hooks:
                stack.callback(setattr, part, "_forward_hooks", part._forward_hooks)
                part._forward_hooks = OrderedDict()
            for name, buffer in part._buffers.items() if training else ():
                if buffer is not None:
                    stack.callback(part._buffers.__setitem__, name, buffer)
                    stack.callback(buffer.copy_, buffer.clone())
        if training:
            stack.enter_context(torch.random.fork_rng({p.device for p in module.parameters() if p.is_cuda}))
            for drop in (getattr(module, name, None) for name in ("attn_drop", "proj_drop")):
                if isinstance(drop, nn.Dropout):
                    stack.callback(setattr, drop, "p", drop.p)
                    drop.p = 0.0
        yield


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
