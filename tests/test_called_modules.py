"""Modules in the place of ``head_norm`` and ``attn_drop``, subclasses and hooks: called, as in any model."""

import copy
import logging

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import reattn.backends
from reattn import ReAttention, re_attention
from reattn.models import DeepViT, SelfAttention

DIM, HEADS, SEQLEN = 32, 4, 9


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it: buffers alone, and no mode."""

    def __init__(self, heads):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(heads) + 0.5)

    def forward(self, x):
        weight, bias, mean, var = (
            b[:, None, None] for b in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        return (x - mean) * (var + 1e-5).rsqrt() * weight + bias


class SplitBatchNorm2d(nn.BatchNorm2d):
    """As timm has it: in training each half of the batch has statistics of its own."""

    def __init__(self, heads):
        super().__init__(heads)
        self.second = nn.BatchNorm2d(heads)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.second(second)])


class Wrapped(nn.Module):
    """As FSDP and peft wrap a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class LayerNorm(nn.LayerNorm):
    """As timm's, which has a ``forward`` of its own."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """As timm's, over the channels."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def stop_tracking(norm):
    norm.track_running_stats = False
    return norm


class OnHeads(nn.Module):
    """What eager code does with a norm over the heads: they go last, and back."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, maps):
        return self.norm(maps.movedim(1, -1)).movedim(-1, 1)


# The norm that the module is made with, what is put in its place, and what eager code would write for that.
REPLACED = {
    "frozen": ("batch", lambda: FrozenBatchNorm2d(HEADS), None),
    "split": ("batch", lambda: SplitBatchNorm2d(HEADS), None),
    "group": ("batch", lambda: nn.GroupNorm(2, HEADS), None),
    "instance": ("batch", lambda: nn.InstanceNorm2d(HEADS, affine=True, track_running_stats=True), None),
    "wrapped": ("batch", lambda: Wrapped(nn.BatchNorm2d(HEADS)), None),
    "none-to-batch": (None, lambda: nn.BatchNorm2d(HEADS), None),
    "batch-to-none": ("batch", nn.Identity, None),
    "batch-to-layer": ("batch", lambda: nn.LayerNorm(HEADS), OnHeads),
    "over-keys": ("batch", lambda: nn.LayerNorm(SEQLEN), None),
    "layer-to-rms": ("layer", lambda: nn.RMSNorm(HEADS, eps=1e-5), OnHeads),
    "layer-to-batch": ("layer", lambda: nn.BatchNorm2d(HEADS), None),
    "layer-to-group": ("layer", lambda: nn.GroupNorm(2, HEADS), None),
    "wrapped-layer": ("layer", lambda: Wrapped(nn.LayerNorm(HEADS)), OnHeads),
    "batch-to-own-layer": ("batch", lambda: LayerNorm(HEADS), OnHeads),
    "batch-to-layer-2d": ("batch", lambda: LayerNorm2d(HEADS), None),
    "batch-to-wrapped-layer": ("batch", lambda: Wrapped(nn.LayerNorm(HEADS)), OnHeads),
    "layer-to-wrapped-batch": ("layer", lambda: Wrapped(nn.BatchNorm2d(HEADS)), None),
    "stops-tracking": ("batch", lambda: stop_tracking(nn.BatchNorm2d(HEADS)), None),
}


def tokens(batch=4, dtype=torch.float32):
    return torch.randn(batch, SEQLEN, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


def attention(norm="batch", head_norm=None, **options):
    torch.manual_seed(0)
    module = ReAttention(DIM, HEADS, norm=norm, output_scale=0.5, **options)
    if head_norm is not None:
        module.head_norm = head_norm
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4 + 0.1)
    return module


def eager(module, x, head_norm=None):
    """Written out, with whatever is in the places of norm and dropout."""
    query, key, value = module.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    maps = module.attn_drop((query * module.scale @ key.mT).softmax(-1))
    maps = torch.einsum("bhij,hg->bgij", maps, module.theta)
    if module.theta_bias is not None:
        maps = maps + module.theta_bias[:, None, None]
    maps = (head_norm or module.head_norm)(maps) * module.output_scale
    return module.proj((maps @ value).transpose(1, 2).flatten(2))


def result(module, function, x):
    """Output, gradients, and the buffers after it."""
    x = x.clone().requires_grad_()
    out = function(x)
    (out.square().sum() / 100).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out, "x": x.grad, **gradients, **dict(module.named_buffers())}


def assert_near(found, expected):
    """Within 1e-4 of the largest element: layer norm divides by deviations of a hundredth of the maps."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    # A gradient may be what is left of larger terms: that of a bias before a batch norm is.
    size = max([1.0, *(tensor.abs().max().item() for tensor in expected.values() if tensor is not None)])
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None, name
            continue
        torch.testing.assert_close(
            found[name].to(tensor.dtype), tensor, rtol=0, atol=1e-4 * size, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("seqlen", [SEQLEN, HEADS])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", REPLACED)
def test_a_module_in_the_place_of_the_norm_is_called(name, training, seqlen):
    """At as many tokens as heads, too, where the axes look alike."""
    norm, build, around = REPLACED[name]
    if name == "over-keys" and seqlen != SEQLEN:
        pytest.skip("a LayerNorm of as many elements as there are heads is one over the heads")
    module = attention(norm, build()).train(training)
    if name == "wrapped-layer":
        assert module.head_norm(torch.ones(2, HEADS)).shape == (2, HEADS)
    same = copy.deepcopy(module).double()
    written_out = None if around is None else around(same.head_norm)
    assert_alike(
        result(module, module, tokens()[:, :seqlen]),
        result(same, lambda x: eager(same, x, written_out), tokens(dtype=torch.float64)[:, :seqlen]),
    )


def test_frozen_norm_is_the_same_in_training():
    """``timm.utils.freeze``."""
    module = attention(head_norm=FrozenBatchNorm2d(HEADS))
    torch.testing.assert_close(module.train()(tokens()), module.eval()(tokens()), rtol=0, atol=0)


@pytest.mark.parametrize("part", ["head_norm", "attn_drop"])
def test_a_forward_of_the_instance_is_called(part):
    """accelerate's hooks replace ``forward`` on the instance."""
    module = attention().eval()
    plain = module(tokens())
    inner = getattr(module, part)
    forward = inner.forward
    inner.forward = lambda maps: forward(2 * maps)
    expected = eager(copy.deepcopy(module), tokens())
    assert_near(module(tokens()), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)


@pytest.mark.extension
def test_what_stays_fused(caplog):
    """Parametrised vectors and each norm as the constructor makes it: a fused backend takes them when told to."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = attention(backend="cpu")
    plain = copy.deepcopy(module)
    parametrize.register_parametrization(module.head_norm, "weight", Doubled())
    with torch.no_grad():
        plain.head_norm.weight.mul_(2)
    torch.testing.assert_close(module(tokens()), plain(tokens()))
    for norm in ("layer", None):
        attention(norm, backend="cpu")(tokens())
    for drop in (nn.Identity(), nn.Dropout(0.5)):
        module.attn_drop = drop
        module(tokens())
    module.head_norm = nn.SyncBatchNorm(HEADS)
    module(tokens())
    assert not caplog.records


@pytest.mark.extension
def test_a_fused_backend_that_is_named_raises():
    module = attention(head_norm=nn.GroupNorm(2, HEADS), backend="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run .* norm \(head_norm of ReAttention: GroupNorm\)"):
        module(tokens())
    module = attention(backend="cpu")
    module.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"stores no maps to call attn_drop \(Dropout with hooks\) on"):
        module(tokens())


def test_one_line_in_the_log(caplog):
    reattn.backends._log_fallback.cache_clear()
    module = attention(head_norm=nn.GroupNorm(2, HEADS))
    with caplog.at_level(logging.WARNING, "reattn"):
        module(tokens())
        module(tokens())
    assert len(caplog.records) == 1 and "GroupNorm" in caplog.text


@pytest.mark.parametrize("norm", ["batch", "layer", None])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_hooks_get_the_maps_of_the_output(norm, training):
    """Those on ``attn_drop`` and ``head_norm``: the maps, their gradients, and a say in them."""
    module = attention(norm).train(training)
    plain = copy.deepcopy(module)
    expected = plain(tokens())
    softmax_maps, mixed_maps = plain.attention_maps(tokens())
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = output
            output.retain_grad()

        return hook

    handles = [getattr(module, name).register_forward_hook(keep(name)) for name in ("attn_drop", "head_norm")]
    out = module(tokens())
    assert_near(out, expected)
    assert_alike(dict(module.named_buffers()), dict(plain.named_buffers()))
    mixed = seen["head_norm"].movedim(-1, 1) if norm == "layer" else seen["head_norm"]
    assert_near(seen["attn_drop"], softmax_maps)
    assert_near(mixed * module.output_scale, mixed_maps)
    # The output is linear in the last maps: their gradient times them is what it is made of, but for the bias.
    (out - module.proj.bias).sum().backward()
    rolled = (seen["head_norm"].grad * seen["head_norm"]).sum()
    torch.testing.assert_close(rolled, (out - module.proj.bias).sum(), rtol=1e-4, atol=1e-4)
    assert seen["attn_drop"].grad.abs().max() > 0
    module.attn_drop.register_forward_hook(lambda module, args, output: output.flip(-1))
    assert not torch.allclose(module(tokens()), expected, atol=1e-3)
    for handle in handles:
        handle.remove()


def test_backward_hooks():
    module, seen = attention(), []
    module.head_norm.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    module(tokens().requires_grad_()).sum().backward()
    assert seen == [(4, HEADS, SEQLEN, SEQLEN)]


@pytest.mark.parametrize("kind", [ReAttention, SelfAttention])
def test_dropout_has_a_mode_of_its_own(kind):
    """As Monte Carlo dropout sets it: everything in eval mode but the dropouts."""
    torch.manual_seed(0)
    module = kind(DIM, HEADS, attn_drop=0.5).eval()
    module.attn_drop.train()
    assert not torch.equal(module(tokens()), module(tokens()))
    module.train()
    module.attn_drop.eval()
    torch.testing.assert_close(module(tokens()), module(tokens()), rtol=0, atol=0)
    module.attn_drop.train().p = 1.0
    torch.testing.assert_close(module(tokens())[0, 0], module(2 * tokens())[0, 0])


@pytest.mark.parametrize("kind", [ReAttention, SelfAttention])
def test_a_module_in_the_place_of_dropout_is_called(kind):
    class Sharpened(nn.Module):
        def forward(self, maps):
            assert maps.shape == (4, HEADS, SEQLEN, SEQLEN)
            return maps.square()

    torch.manual_seed(0)
    module = kind(DIM, HEADS).eval()
    module.attn_drop = Sharpened()
    x = tokens()
    if kind is ReAttention:
        expected = eager(module, x)
    else:
        query, key, value = module._split_heads(x)
        maps = (query * module.head_dim**-0.5 @ key.mT).softmax(-1).square()
        expected = module.proj((maps @ value).transpose(1, 2).flatten(2))
    assert_near(module(x), expected)


def test_masks_with_norms_that_are_called():
    """What works at each position takes them; torch's norms that would count what is hidden do not."""
    module = attention(head_norm=FrozenBatchNorm2d(HEADS))
    plain = attention().eval()
    plain.load_state_dict(module.state_dict(), strict=False)
    mask = torch.arange(SEQLEN) < 6
    assert_near(module(tokens(), mask), plain(tokens(), mask))
    hooked = attention()
    hooked.head_norm.register_forward_hook(lambda *_: None)
    refused = [nn.GroupNorm(2, HEADS), Wrapped(nn.BatchNorm2d(HEADS)), nn.LayerNorm((HEADS, SEQLEN, SEQLEN))]
    for module in (*(attention(head_norm=norm) for norm in refused), hooked):
        for masks in ({"attn_mask": mask}, {"is_causal": True}):
            with pytest.raises(
                ValueError, match="attn_mask must be None, and is_causal False, where head_norm is called"
            ):
                module(tokens(), **masks)
    for masks in ({"attn_mask": mask}, {"is_causal": True}):
        expected = attention().eval()(tokens(), **masks)
        assert_near(hooked.eval()(tokens(), **masks), expected)


def test_attention_maps_call_the_norm():
    """Without a trace in statistics, those of a norm inside it included."""
    module = attention(head_norm=SplitBatchNorm2d(HEADS))
    before = copy.deepcopy(module.state_dict())
    softmax_maps, mixed_maps = module.attention_maps(tokens())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    maps = torch.einsum("bhij,hg->bgij", softmax_maps, module.theta) + module.theta_bias[:, None, None]
    torch.testing.assert_close(mixed_maps, module.head_norm(maps) * 0.5)
    assert mixed_maps.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["group", "frozen", "wrapped-layer"])
def test_other_dtypes(name, dtype):
    norm, build, _ = REPLACED[name]
    module = attention(norm, build())
    expected = module(tokens())
    module = module.to(dtype)
    found = module(tokens(dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_looking_on_changes_nothing(dtype):
    """In 16 bits, too: maps are alike to the third digit, and a norm of them would show what rounding left."""
    module = attention().to(dtype)
    exact = copy.deepcopy(module).double()(tokens(dtype=torch.float64))
    module.attn_drop.register_forward_hook(lambda *_: None)
    found = module(tokens(dtype=dtype))
    assert found.dtype == dtype
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_dropout_with_parameters_under_autocast():
    module = attention(None)
    module.attn_drop = nn.Conv2d(HEADS, HEADS, 1)
    expected = module(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        found = module(tokens())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    module = module.bfloat16()
    assert module(tokens(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast():
    module = attention(head_norm=nn.GroupNorm(2, HEADS))
    expected = module(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        found = module(tokens())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["group", "frozen", "layer-to-rms"])
def test_compiled(name):
    norm, build, _ = REPLACED[name]
    module = attention(norm, build())
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), module(tokens()))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_hooks():
    module, seen = attention().eval(), []
    module.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.compile(module, backend="eager")(tokens())
    assert seen == [(4, HEADS, SEQLEN, SEQLEN)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_traced_by_fx(norm, training):
    """Into what the definition says, so that its nodes can be taken out; or as a leaf, which is the fused operator."""
    module = attention(norm).train(training)
    expected = result(module, module, tokens())
    for leaf in (False, True):
        module = attention(norm).train(training)
        holder = nn.Sequential(module)

        class Tracer(fx.Tracer):
            def is_leaf_module(self, m, name, leaf=leaf):
                return super().is_leaf_module(m, name) or (leaf and isinstance(m, ReAttention))

        graph = Tracer().trace(holder)
        targets = {str(node.target) for node in graph.nodes}
        wanted = {"0"} if leaf else {"softmax", "0.attn_drop"} | ({"0.head_norm"} if norm else set())
        assert wanted <= targets and ("softmax" in targets) != leaf
        assert_alike(result(module, fx.GraphModule(holder, graph), tokens()), expected)


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_masks_that_a_traced_model_makes(norm):
    """Batch norm is a node of the graph, and would count what is hidden, in training if not now."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention(norm)

        def forward(self, x):
            return self.attention(x, is_causal=True)

    model = Decoder().eval()
    if norm == "batch":
        with pytest.raises(ValueError, match="in what torch.fx traced into: trace with ReAttention as a leaf"):
            fx.symbolic_trace(model)
    else:
        assert_near(fx.symbolic_trace(model)(tokens()), model(tokens()))


def test_a_fused_backend_is_not_traced_into():
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run what torch.fx traced into"):
        fx.symbolic_trace(attention(backend="cpu"))


def test_masks_in_a_traced_graph():
    module = attention(None)
    traced = fx.symbolic_trace(module)
    assert_near(traced(tokens()), module(tokens()))
    with pytest.raises(ValueError, match="attn_mask must be None, and is_causal False, in what torch.fx traced"):
        traced(tokens(), torch.ones(SEQLEN, dtype=torch.bool))


def test_hooks_in_a_model():
    """The usual way to collect attention maps, by name."""
    model = DeepViT(img_size=16, patch_size=4, embed_dim=DIM, depth=3, num_heads=HEADS, re_attention_blocks=2).eval()
    maps = []
    for name, module in model.named_modules():
        if name.endswith("attn_drop"):
            module.register_forward_hook(lambda module, args, output: maps.append(output))
    model(torch.randn(2, 3, 16, 16))
    assert len(maps) == 3
    for of_block in maps:
        torch.testing.assert_close(of_block.sum(-1), torch.ones(2, HEADS, 17))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_drop": 0.1}, TypeError, "attn_drop must be callable, got float"),
        ({"attn_drop": nn.Identity(), "dropout_p": 0.1}, ValueError, "dropout_p must not be given where attn_drop is"),
        (
            {"norm": nn.Identity(), "norm_weight": torch.ones(2)},
            ValueError,
            "norm_weight must not be given where norm is",
        ),
        ({"norm": lambda maps: maps[:, :1]}, ValueError, r"norm must return maps of shape \(1, 2, 3, 3\)"),
        ({"attn_drop": lambda maps: None}, ValueError, "attn_drop must return maps of shape .* got NoneType"),
    ],
)
def test_errors(options, error, message):
    qkv = torch.randn(3, 1, 2, 3, 4)
    with pytest.raises(error, match=message):
        re_attention(*qkv, torch.eye(2), **options)


def test_functions():
    """The operator takes functions of the maps as well."""
    query, key, value = torch.randn(3, 1, 2, 3, 4)
    theta = torch.randn(2, 2)
    out = re_attention(query, key, value, theta, norm=torch.tanh, attn_drop=torch.square, scale=0.5)
    maps = torch.einsum("bhij,hg->bgij", (query @ key.mT * 0.5).softmax(-1).square(), theta).tanh()
    torch.testing.assert_close(out, maps @ value)


def test_every_module_of_a_model_is_called():
    """But for those that the fused operator stands in for: whoever hooks or wraps one finds it in use."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": DIM, "depth": 2, "num_heads": HEADS}
    for options in ({"patch_norm": True, "qk_norm": True}, {"conv_stem": True}, {"attention": "self"}):
        model = DeepViT(**sizes, **options).eval()
        every = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
        called = set()
        for name, module in model.named_modules():
            if not name.endswith(("attn_drop", "head_norm")):
                module.register_forward_hook(lambda *_, name=name, called=called: called.add(name))
        model(torch.randn(2, 3, 16, 16))
        missing = every - called
        assert {name.rsplit(".", 1)[-1] for name in missing} <= {"attn_drop", "head_norm"}, missing


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_traced_model(training):
    """Plain blocks as those with re-attention: the softmax of each is a node."""
    torch.manual_seed(0)
    model = DeepViT(img_size=16, patch_size=4, embed_dim=DIM, depth=3, num_heads=HEADS, re_attention_blocks=2)
    traced = fx.symbolic_trace(copy.deepcopy(model.train(training)))
    assert sum(node.target == "softmax" for node in traced.graph.nodes) == 3
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(ValueError, match="attn_mask must be None, and is_causal False, in what torch.fx traced"):
        traced(x, torch.ones(17, dtype=torch.bool))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_a_norm_that_is_called(use_reentrant):
    module = attention(head_norm=SplitBatchNorm2d(HEADS))
    plain = copy.deepcopy(module)
    found = result(module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant), tokens())
    assert_alike(found, result(plain, plain, tokens()))
    assert found["head_norm.num_batches_tracked"] == 1


def test_statistics_of_any_norm_are_left_alone():
    """``attention_maps``: a norm that is none of torch's keeps its buffers."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, maps):
            self.calls += 1
            return maps / self.calls

    module = attention(head_norm=Counting())
    module(tokens())
    first = module.attention_maps(tokens())[1]
    torch.testing.assert_close(module.attention_maps(tokens())[1], first)
    assert module.head_norm.calls == 1


@pytest.mark.parametrize("masks", ["none", "boolean", "lowest", "causal", "both"])
def test_hooks_on_plain_attention_change_nothing(masks):
    """Masks mean there what they do in scaled_dot_product_attention."""
    module = SelfAttention(DIM, HEADS).eval()
    bias = torch.zeros(4, 1, SEQLEN, SEQLEN)
    bias[0, :, 3] = torch.finfo(torch.float32).min
    boolean = (torch.arange(SEQLEN) < 6).expand(SEQLEN, SEQLEN)
    given = {
        "none": {},
        "boolean": {"attn_mask": boolean},
        "lowest": {"attn_mask": bias},
        "causal": {"is_causal": True},
        "both": {"attn_mask": boolean, "is_causal": True},
    }[masks]
    expected, seen = module(tokens(), **given), []
    module.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_near(module(tokens(), **given), expected)
    assert len(seen) == 1


def test_no_module_at_all():
    module = attention(None)
    expected = module(tokens())
    module.head_norm = module.attn_drop = None
    torch.testing.assert_close(module(tokens()), expected)
    module.attention_maps(tokens())
