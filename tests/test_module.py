"""``ReAttention`` against independent materialising modules: results, statistics, state dicts, options."""

import copy
import io
import pickle
import re

import pytest
import torch
from parity import BACKENDS
from talking_heads import CaitAttention, SeparateAttention
from torch import einsum, nn

from reattn import ReAttention
from reattn.models.deepvit import Block, SelfAttention

DIM, HEADS, HEAD_DIM, SEQLEN = 24, 3, 8, 10
backends = pytest.mark.parametrize("backend", BACKENDS)
norms = pytest.mark.parametrize("norm", ["batch", "layer", None])


class Official(nn.Module):
    """The attention of the official DeepViT: a 1x1 convolution and a BatchNorm2d on the maps."""

    def __init__(self, output_scale=1.0, momentum=0.1):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=True)
        self.reatten_matrix = nn.Conv2d(HEADS, HEADS, 1)
        self.var_norm = nn.BatchNorm2d(HEADS, momentum=momentum)
        self.proj = nn.Linear(DIM, DIM)
        self.output_scale = output_scale

    def forward(self, x):
        batch, seqlen, _ = x.shape
        query, key, value = self.qkv(x).view(batch, seqlen, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        self.softmax_maps = (query @ key.transpose(2, 3) / HEAD_DIM**0.5).softmax(3)
        self.mixed_maps = self.var_norm(self.reatten_matrix(self.softmax_maps)) * self.output_scale
        return self.proj((self.mixed_maps @ value).transpose(1, 2).reshape(batch, seqlen, DIM))


class OverHeads(nn.Module):
    """(batch, heads, i, j) with the heads last, where a LayerNorm wants them, or back."""

    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, maps):
        return maps.permute(self.dims)


class SecondForm(nn.Module):
    """The attention of vit_pytorch's DeepViT: a LayerNorm of the input, an einsum, a LayerNorm over the heads."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.to_qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.reattn_weights = nn.Parameter(torch.randn(HEADS, HEADS))
        self.reattn_norm = nn.Sequential(OverHeads(0, 2, 3, 1), nn.LayerNorm(HEADS), OverHeads(0, 3, 1, 2))
        self.to_out = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.0))

    def forward(self, x):
        batch, seqlen, _ = x.shape
        query, key, value = (
            part.view(batch, seqlen, HEADS, HEAD_DIM).transpose(1, 2)
            for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        )
        self.softmax_maps = (einsum("bhid,bhjd->bhij", query, key) * HEAD_DIM**-0.5).softmax(-1)
        self.mixed_maps = self.reattn_norm(einsum("bhij,hg->bgij", self.softmax_maps, self.reattn_weights))
        return self.to_out(einsum("bhij,bhjd->bhid", self.mixed_maps, value).transpose(1, 2).flatten(2))


UPSTREAM = {
    "official": (Official, {"qkv_bias": True}),
    "second-form": (SecondForm, {"norm": "layer", "pre_norm": True}),
}
forms = pytest.mark.parametrize("form", UPSTREAM)


def randomize(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        for name, buffer in module.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.copy_(0.05 + 0.1 * torch.rand(buffer.shape, generator=generator))
    return module


def pair(form, device, **options):
    """An upstream attention and ours with its weights."""
    upstream_class, arguments = UPSTREAM[form]
    upstream = randomize(upstream_class()).to(device)
    ours = ReAttention(DIM, HEADS, **(arguments | options), device=device)
    ours.load_state_dict(upstream.state_dict())
    return upstream, ours


def tokens(device="cpu", batch=2, seed=0, dim=DIM, **options):
    return torch.randn(batch, SEQLEN, dim, generator=torch.Generator().manual_seed(seed)).to(device, **options)


def assert_near(found, expected, size=0.0):
    """Within 2e-4 of the largest element, or of ``size`` where the elements are what is left of larger terms."""
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * max(size, expected.abs().max().item()))


@backends
@forms
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_equals_upstream(form, training, backend, device):
    upstream, ours = pair(form, device, backend=backend)
    results = []
    for module in (upstream.train(training), ours.train(training)):
        x = tokens(device).requires_grad_()
        output = module(x)
        output.square().sum().backward()
        results.append((output, x.grad, module))
    (expected, expected_grad, _), (found, found_grad, _) = results
    assert_near(found, expected)
    assert_near(found_grad, expected_grad)
    gradients = {name: parameter.grad for name, parameter in upstream.named_parameters()}
    translated = copy.deepcopy(ours)
    translated.load_state_dict(gradients | dict(upstream.named_buffers()))
    for name, parameter in ours.named_parameters():
        # Under batch statistics the gradient of the mixing bias is a sum that vanishes.
        size = ours.theta.grad.abs().max().item() if name == "theta_bias" else 0.0
        assert_near(parameter.grad, translated.get_parameter(name).detach(), size)
    for name, buffer in ours.named_buffers():
        assert_near(buffer.float(), translated.get_buffer(name).float())


def test_output_scale(device):
    upstream, ours = pair("official", device, output_scale=0.3)
    upstream.output_scale = 0.3
    assert_near(ours(tokens(device)), upstream(tokens(device)))


@backends
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_over_several_batches(momentum, backend, device):
    upstream, ours = pair("official", device, norm_momentum=momentum, backend=backend)
    upstream.var_norm.momentum = momentum
    for module in (upstream.var_norm, ours.head_norm):
        module.reset_running_stats()
    for seed in range(3):
        upstream(tokens(device, seed=seed))
        ours(tokens(device, seed=seed))
    torch.testing.assert_close(ours.head_norm.state_dict(), upstream.var_norm.state_dict(), rtol=1e-4, atol=1e-6)
    assert ours.head_norm.num_batches_tracked == 3
    assert_near(ours.eval()(tokens(device)), upstream.eval()(tokens(device)))


@backends
def test_frozen_norm_in_a_training_module(backend, device):
    upstream, ours = pair("official", device, backend=backend)
    before = copy.deepcopy(ours.head_norm.state_dict())
    for module in (upstream.train().var_norm, ours.train().head_norm):
        module.eval()
    assert_near(ours(tokens(device)), upstream(tokens(device)))
    torch.testing.assert_close(ours.head_norm.state_dict(), before, rtol=0, atol=0)


@backends
def test_norm_without_running_statistics(backend, device):
    """The statistics are then always the batch's."""
    upstream, ours = pair("official", device, backend=backend)
    upstream.var_norm = nn.BatchNorm2d(HEADS, track_running_stats=False, device=device)
    ours.head_norm = nn.BatchNorm2d(HEADS, track_running_stats=False, device=device)
    for training in (True, False):
        assert_near(ours.train(training)(tokens(device)), upstream.train(training)(tokens(device)))


@backends
def test_norm_without_affine_parameters(backend, device):
    upstream, ours = pair("official", device, backend=backend)
    upstream.var_norm = nn.BatchNorm2d(HEADS, affine=False, device=device)
    ours.head_norm = nn.BatchNorm2d(HEADS, affine=False, device=device)
    assert_near(ours(tokens(device)), upstream(tokens(device)))


def test_synchronised_norm_without_a_process_group(device):
    """A converted module runs on its own, and in eval mode, as before."""
    _, ours = pair("official", device)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
    assert isinstance(converted.head_norm, nn.SyncBatchNorm)
    assert converted.state_dict().keys() == ours.state_dict().keys()
    for training in (True, False):
        outputs = [module.train(training)(tokens(device)) for module in (converted, ours)]
        torch.testing.assert_close(*outputs)
    torch.testing.assert_close(converted.head_norm.running_var, ours.head_norm.running_var)


@norms
def test_passes_views_of_the_projection(norm, device, monkeypatch):
    """Nothing is copied between the projections: the operator reads qkv's output and writes what proj reads."""
    module = ReAttention(DIM, HEADS, norm=norm, device=device)
    seen = {}
    operator = ReAttention.forward.__globals__["re_attention"]

    def spy(query, key, value, *args, **options):
        seen["inputs"] = query.permute(2, 0, 3, 1, 4).unbind(0) if key is None else (query, key, value)
        seen["output"] = operator(query, key, value, *args, **options)
        return seen["output"]

    monkeypatch.setitem(ReAttention.forward.__globals__, "re_attention", spy)
    module.qkv.register_forward_hook(lambda _, args, output: seen.update(qkv=output))
    module.proj.register_forward_pre_hook(lambda _, args: seen.update(merged=args[0]))
    module(tokens(device))
    element = seen["qkv"].element_size()
    for position, tensor in enumerate(seen["inputs"]):
        assert tensor.shape == (2, HEADS, SEQLEN, HEAD_DIM)
        assert tensor.data_ptr() == seen["qkv"].data_ptr() + position * DIM * element
        assert tensor.stride() == (3 * DIM * SEQLEN, HEAD_DIM, 3 * DIM, 1)
    assert seen["merged"].data_ptr() == seen["output"].data_ptr()


@forms
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_attention_maps(form, training, device):
    """The maps of the forward pass, without dropout and without a trace in the running statistics."""
    upstream, ours = pair(form, device, attn_drop=0.5)
    before = copy.deepcopy(ours.state_dict())
    upstream.train(training)(tokens(device))
    softmax_maps, mixed_maps = ours.train(training).attention_maps(tokens(device))
    assert softmax_maps.shape == mixed_maps.shape == (2, HEADS, SEQLEN, SEQLEN)
    assert_near(softmax_maps, upstream.softmax_maps)
    assert_near(mixed_maps, upstream.mixed_maps)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_attention_maps_with_a_mask(device):
    module = ReAttention(DIM, HEADS, norm=None, device=device)
    softmax_maps, _ = module.attention_maps(tokens(device), is_causal=True)
    assert not softmax_maps.triu(1).any()
    mask = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=device).tril()
    torch.testing.assert_close(module.attention_maps(tokens(device), attn_mask=mask)[0], softmax_maps)


@norms
def test_masks(norm, backend, device):
    module = ReAttention(DIM, HEADS, norm=norm, device=device, backend=backend)
    mask = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=device).tril()
    causal, masked = module(tokens(device), is_causal=True), module(tokens(device), attn_mask=mask)
    torch.testing.assert_close(causal, masked)
    assert not torch.allclose(causal, module(tokens(device)))


def test_state_dict_layout():
    keys = {
        "batch": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
        "layer": ["weight", "bias"],
        None: [],
    }
    for norm, suffixes in keys.items():
        expected = ["theta", "qkv.weight", *(f"head_norm.{suffix}" for suffix in suffixes), "proj.weight", "proj.bias"]
        found = ReAttention(DIM, HEADS, norm=norm).state_dict().keys()
        assert set(found) == {*expected, *(["theta_bias"] if norm != "layer" else [])}
    everything = ReAttention(DIM, HEADS, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, pre_norm=True)
    assert {key.split(".")[0] for key in everything.state_dict()} == {
        *("pre_norm", "qkv", "q_norm", "k_norm", "theta", "theta_bias", "head_norm", "norm", "gate", "proj")
    }


@norms
def test_own_layout_loads_strictly(norm):
    options = {"norm": norm, "qk_norm": True, "scale_norm": True, "gated": True, "pre_norm": True}
    saved = randomize(ReAttention(DIM, HEADS, **options))
    loaded = ReAttention(DIM, HEADS, **options)
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


@forms
def test_upstream_layout_loads_strictly_inside_a_parent(form):
    upstream_class, options = UPSTREAM[form]
    upstream = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"attn": upstream_class()}) for _ in range(2))})
    ours = nn.ModuleDict(
        {"blocks": nn.ModuleList(nn.ModuleDict({"attn": ReAttention(DIM, HEADS, **options)}) for _ in range(2))}
    )
    state_dict = randomize(upstream).state_dict()
    keys = list(state_dict)
    result = ours.load_state_dict(state_dict)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(state_dict) == keys, "the caller's dict must stay as it is"
    for theirs, block in zip(upstream["blocks"], ours["blocks"], strict=True):
        assert_near(block["attn"](tokens()), theirs["attn"](tokens()))


MIXING = {
    "cait": (CaitAttention, {"qkv_bias": True, "pre_mix": True}),
    "x-transformers": (
        SeparateAttention,
        {"pre_mix": True, "pre_bias": False, "theta_bias": False, "proj_bias": False},
    ),
    "x-transformers-before": (
        lambda: SeparateAttention(post_talking_heads=False),
        {"pre_mix": True, "pre_bias": False, "post_mix": False, "proj_bias": False},
    ),
}


@pytest.mark.parametrize("form", MIXING)
def test_talking_heads(form, device):
    """The same output, maps and gradients with the weights of an implementation that mixes before the softmax."""
    upstream_class, options = MIXING[form]
    upstream = randomize(upstream_class()).to(device)
    ours = ReAttention(DIM, HEADS, norm=None, **options, device=device)
    ours.load_state_dict(upstream.state_dict())
    inputs = [tokens(device).requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((upstream, ours), inputs, strict=True)]
    assert_near(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert_near(*(x.grad for x in inputs))
    assert all(parameter.grad is not None for parameter in ours.parameters())
    if form == "cait":
        assert_near(ours.pre_theta.grad, upstream.proj_l.weight.grad.t())
        assert_near(ours.theta.grad, upstream.proj_w.weight.grad.t())
        for found, expected in zip(
            ours.attention_maps(tokens(device)), (upstream.softmax_maps, upstream.mixed_maps), strict=True
        ):
            assert_near(found, expected.detach())


EXTENDED = {
    "pre": {"pre_mix": True},
    "pre-alone": {"pre_mix": True, "pre_bias": False, "post_mix": False},
    "no-mixing": {"post_mix": False, "theta_bias": True},
    "more-heads": {"pre_mix": True, "num_heads_out": 5, "gated": True, "scale_norm": True},
    "fewer-heads": {"num_heads_out": 2},
}


@norms
@pytest.mark.parametrize("extension", EXTENDED)
def test_extended_mixing(extension, norm):
    """Copied, saved and loaded, reset, under autocast, with a mask; every parameter learns."""
    options = {"norm": norm, "qk_norm": True, **EXTENDED[extension]}
    module = randomize(ReAttention(DIM, HEADS, **options)).eval()
    heads_out = EXTENDED[extension].get("num_heads_out", HEADS)
    expected = module(tokens())
    assert expected.shape == (2, SEQLEN, DIM)
    maps = module.attention_maps(tokens())
    assert [m.shape[1] for m in maps] == [HEADS, heads_out]
    values = module.project(tokens())[2]
    merged = module.norm((maps[1] @ values).transpose(1, 2).flatten(2))
    assert_near(module.proj(merged if module.gate is None else merged * module.gate(tokens()).sigmoid()), expected)

    loaded = ReAttention(DIM, HEADS, **options)
    loaded.load_state_dict(module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded.eval()):
        torch.testing.assert_close(copied(tokens()), expected, rtol=0, atol=0)
    causal = copied(tokens(), is_causal=True)
    other = torch.cat([tokens()[:, :-1], tokens(seed=1)[:, -1:]], 1)
    torch.testing.assert_close(copied(other, is_causal=True)[:, :-1], causal[:, :-1])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        copied.train()(tokens()).float().square().sum().backward()
    for name, parameter in copied.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    before = {name: tensor.clone() for name, tensor in copied.state_dict().items()}
    copied.reset_parameters()
    drawn = [name for name in before if name.startswith(("theta", "pre_"))]
    assert all(not torch.equal(copied.state_dict()[name], before[name]) for name in drawn)


@pytest.mark.usefixtures("fresh_compiler")
def test_extended_mixing_is_compiled_and_exported():
    for options in EXTENDED.values():
        module = ReAttention(DIM, HEADS, norm="layer", **options).eval()
        expected = module(tokens())
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens()), expected)
        exported = torch.export.export(module, (tokens(),)).module()
        torch.testing.assert_close(exported(tokens()), expected)


def test_upstream_layout_that_does_not_fit_is_named():
    state_dict = Official().state_dict()
    state_dict["var_norm.surplus"] = torch.zeros(1)
    del state_dict["reatten_matrix.bias"]
    with pytest.raises(RuntimeError) as error:
        ReAttention(DIM, HEADS, qkv_bias=True).load_state_dict(state_dict)
    assert 'Missing key(s) in state_dict: "theta_bias"' in str(error.value)
    assert 'Unexpected key(s) in state_dict: "head_norm.surplus"' in str(error.value)


# The arguments of timm's Attention, in its versions so far.
TIMM = {
    "num_heads": 4,
    "qkv_bias": True,
    "qk_norm": True,
    "scale_norm": True,
    "proj_bias": False,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
    "norm_layer": nn.LayerNorm,
}


def test_timm_keywords():
    module = ReAttention(32, **TIMM, norm=None, theta_init="identity")
    with torch.no_grad():
        module.theta.copy_(torch.eye(4))
        module.theta_bias.zero_()
    x = tokens(dim=32)
    query, key, value = module.qkv(x).view(2, SEQLEN, 3, 4, 8).permute(2, 0, 3, 1, 4)
    attended = nn.functional.scaled_dot_product_attention(module.q_norm(query), module.k_norm(key), value)
    assert_near(module(x), module.proj(module.norm(attended.transpose(1, 2).flatten(2))))
    assert module.proj.bias is None


def test_gate_and_other_widths():
    module = ReAttention(DIM, 5, attn_head_dim=6, dim_out=7, gated=True)
    assert (module.head_dim, module.attn_dim, module.scale) == (6, 30, 6**-0.5)
    x = tokens()
    merged = []
    module.proj.register_forward_pre_hook(lambda _, args: merged.append(args[0]))
    assert module(x).shape == (2, SEQLEN, 7)
    gate, module.gate = module.gate, None
    module(x)
    torch.testing.assert_close(merged[0], merged[1] * gate(x).sigmoid())


def test_norm_layer_is_used_for_every_feature_norm():
    class Scaled(nn.LayerNorm):
        pass

    module = ReAttention(DIM, HEADS, qk_norm=True, scale_norm=True, norm_layer=Scaled)
    assert all(isinstance(norm, Scaled) for norm in (module.q_norm, module.k_norm, module.norm))


@norms
def test_dropout_acts_in_training_only(norm, device):
    module = ReAttention(DIM, HEADS, norm=norm, attn_drop=0.5, proj_drop=0.5, device=device)
    x = tokens(device)
    for name in ("attn_drop", "proj_drop"):
        other = {"attn_drop": "proj_drop", "proj_drop": "attn_drop"}[name]
        single = copy.deepcopy(module.train())
        getattr(single, other).p = 0.0
        assert not torch.equal(single(x), single(x))
    module.eval()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


def test_theta_initialisation():
    torch.manual_seed(0)
    bound = 256**-0.5
    conv = ReAttention(256, 256)
    for tensor in (conv.theta, conv.theta_bias):
        assert tensor.abs().max() <= bound
        torch.testing.assert_close(tensor.std(), torch.tensor(bound / 3**0.5), rtol=0.1, atol=0)
    identity = ReAttention(256, 256, theta_init="identity")
    noise = identity.theta - torch.eye(256)
    torch.testing.assert_close(noise.std(), torch.tensor(0.01), rtol=0.05, atol=0)
    normal = ReAttention(256, 256, theta_init="normal")
    torch.testing.assert_close(normal.theta.std(), torch.tensor(1.0), rtol=0.05, atol=0)
    assert not identity.theta_bias.any() and not normal.theta_bias.any()
    before = ReAttention(256, 256, theta_init="identity", pre_mix=True)
    torch.testing.assert_close((before.pre_theta - torch.eye(256)).std(), torch.tensor(0.01), rtol=0.05, atol=0)
    assert not before.pre_bias.any() and not torch.equal(before.theta, before.pre_theta)
    assert ReAttention(256, 256, pre_mix=True).pre_theta.abs().max() <= bound


@pytest.mark.parametrize(("norm", "default"), [("batch", True), ("layer", False), (None, True)])
def test_theta_bias_defaults_to_upstream(norm, default):
    assert (ReAttention(DIM, HEADS, norm=norm).theta_bias is not None) == default
    for chosen in (True, False):
        assert (ReAttention(DIM, HEADS, norm=norm, theta_bias=chosen).theta_bias is not None) == chosen


@norms
def test_reset_parameters(norm):
    """Everything is drawn anew, after to_empty too: uniform within the bounds of torch's own modules, or constant."""
    options = {"norm": norm, "qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "pre_norm": True}
    module = ReAttention(256, 16, **options, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(9)
    torch.manual_seed(0)
    module.reset_parameters()
    constants = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for name, tensor in module.state_dict().items():
        module_name, _, suffix = name.rpartition(".")
        if module_name.endswith("norm"):
            constant = {"weight": 1, "bias": 0, **constants}[suffix]
            assert (tensor == constant).all(), name
        else:
            bound = (16 if name.startswith("theta") else 256) ** -0.5
            assert tensor.abs().max() <= bound, name
            assert tensor.std() > bound / 3, name


@norms
def test_copies(norm):
    """Through deepcopy, pickle and torch.save."""
    module = randomize(ReAttention(DIM, HEADS, norm=norm)).eval()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)
    for copied in copies:
        torch.testing.assert_close(copied(tokens()), module(tokens()), rtol=0, atol=0)
        assert copied.theta is not module.theta


def test_representation():
    module = ReAttention(DIM, HEADS, output_scale=0.5, backend="reference")
    expected = "num_heads=3, head_dim=8, norm='batch', output_scale=0.5, backend='reference'"
    assert module.extra_repr() == expected
    assert expected in repr(module)
    module = ReAttention(DIM, HEADS, norm=None, pre_mix=True, num_heads_out=6)
    assert module.extra_repr().endswith("output_scale=1, pre_mix=True, num_heads_out=6, backend='auto'")
    assert "post_mix=False" in ReAttention(DIM, HEADS, post_mix=False).extra_repr()


def test_device_and_dtype(device):
    module = ReAttention(DIM, HEADS, qk_norm=True, gated=True, device=device, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in module.parameters()} == {device.type}
    assert module(tokens(device, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert ReAttention(DIM, HEADS, device="meta").qkv.weight.is_meta


@backends
@norms
def test_autocast(norm, backend, device):
    module = ReAttention(DIM, HEADS, norm=norm, backend=backend, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = module(tokens(device))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, "norm must be one of ('batch', 'layer', None), got 'group'"),
        ({"theta_init": "zeros"}, "theta_init must be one of ('conv', 'identity', 'normal'), got 'zeros'"),
        ({"num_heads": 5}, "dim must be a multiple of num_heads=5 unless attn_head_dim is given, got 24"),
        ({"attn_drop": 1.0}, "attn_drop must be in [0, 1), got 1.0"),
        ({"proj_drop": -0.5}, "proj_drop must be in [0, 1), got -0.5"),
        ({"post_mix": False, "num_heads_out": 5}, "num_heads_out must be num_heads=3 with post_mix=False, got 5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ReAttention(DIM, **({"num_heads": HEADS} | options))


def nested(layout):
    return torch.nested.nested_tensor([torch.zeros(3, DIM), torch.zeros(5, DIM)], layout=layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nested(torch.jagged), "a dense Tensor (batch, seqlen, dim), got a nested Tensor of 2: pad it"),
        (lambda: nested(torch.strided), "a dense Tensor (batch, seqlen, dim), got a nested Tensor of 2: pad it"),
        (lambda: torch.zeros(2, 5, DIM).to_sparse(), "a dense Tensor (batch, seqlen, dim), got one with layout"),
        (lambda: torch.zeros(2, 3, 4, DIM), "shape (batch, seqlen, 24), got (2, 3, 4, 24): x.flatten(1, 2) makes"),
        (lambda: torch.zeros(2, DIM, 3, 4), "shape (batch, seqlen, 24), got (2, 24, 3, 4): x.flatten(2).mT makes"),
        (lambda: torch.zeros(6, DIM), "shape (batch, seqlen, 24), got (6, 24): x[None] is a batch of one"),
        (lambda: torch.zeros(2, DIM, 5), "shape (batch, seqlen, 24), got (2, 24, 5): x.mT has the channels last"),
        (lambda: torch.zeros(2, 5, 23), "shape (batch, seqlen, 24), got (2, 5, 23)"),
        (lambda: torch.zeros(DIM), "shape (batch, seqlen, 24), got (24,)"),
        (lambda: torch.zeros(2, 5, DIM, dtype=torch.int64), "a floating dtype, got torch.int64"),
        (lambda: torch.zeros(2, 0, DIM), "at least one token, got (2, 0, 24)"),
        (lambda: torch.zeros(2, 5, DIM).numpy(), "a Tensor (batch, seqlen, dim), got numpy.ndarray"),
    ],
)
def test_what_is_no_batch_of_tokens_is_named(make, message):
    """Wherever tokens come in, before any layer of torch's says something of its own."""
    x = make()
    attentions = [ReAttention(DIM, HEADS), ReAttention(DIM, HEADS, pre_norm=True), SelfAttention(DIM, HEADS)]
    blocks = [Block(attention, DIM, DIM) for attention in attentions]
    for function in (*attentions, *blocks, *(attention.attention_maps for attention in attentions)):
        with pytest.raises((TypeError, ValueError), match="^x must (have|be|hold) " + re.escape(message)):
            function(x)


@backends
def test_no_images_at_all(backend, device):
    module = ReAttention(DIM, HEADS, backend=backend, device=device).eval()
    assert module(torch.zeros(0, 5, DIM, device=device)).shape == (0, 5, DIM)


def test_unknown_backend_is_named_when_it_is_used():
    with pytest.raises(ValueError, match="backend must be one of"):
        ReAttention(DIM, HEADS, backend="cudnn")(tokens())


def test_norms_of_query_and_key_that_are_no_identity_are_called(device):
    """A subclass of Identity, and hooks on one, as on any other module."""

    class Doubled(nn.Identity):
        def forward(self, x):
            return 2 * x

    module = ReAttention(DIM, HEADS, norm=None, device=device)
    x = tokens(device)
    module.q_norm = Doubled()
    found = module(x)
    with torch.no_grad():
        module.q_norm = nn.Identity()
        plain = module(x)
        module.qkv.weight[:DIM] *= 2
    torch.testing.assert_close(found, module(x))
    assert not torch.allclose(found, plain)
    seen = []
    module.k_norm.register_forward_hook(lambda *_: seen.append("forward"))
    module.q_norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    module(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]
