"""Conversion of trained ViTs to re-attention: nothing changes at first, and what cannot be converted is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from libraries import library
from talking_heads import Attend, CaitAttention, ClassAttn, SeparateAttention
from torch import nn

from reattn import ReAttention
from reattn.convert import calibrate, to_re_attention
from reattn.models import DeepViT

NORMS = [None, "batch"]
DIM, HEADS = 24, 3


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Kernels are other tests' business."""
    monkeypatch.setenv("REATTN_BACKEND", "reference")


class Attention(nn.Module):
    """No subclass of anything, with the parts of timm's Attention."""

    def __init__(self, dim=DIM, num_heads=HEADS, qkv_bias=True, qk_norm=False, scale_norm=False, gated=False, drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = False
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(drop)
        self.norm = nn.LayerNorm(dim) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim) if gated else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop / 2)

    def forward(self, x, attn_mask=None, is_causal=False):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (self.q_norm(query) * self.scale) @ self.k_norm(key).mT
        if attn_mask is not None:
            scores = scores + attn_mask
        out = self.norm((self.attn_drop(scores.softmax(-1)) @ value).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if self.gate is None else out * self.gate(x).sigmoid()))


class Older(nn.Module):
    """As timm's Attention was: no norms, no gate, no masks."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = attn

    def forward(self, x):
        return x + self.attn(self.norm1(x))


def vit(build=Attention, depth=3, **options) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(build(**options)) for _ in range(depth)))
    for block in model:  # maps far from uniform
        nn.init.normal_(block.attn.qkv.weight, std=0.25)
    return model.eval()


def tokens(batch=4, seqlen=10, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, seqlen, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def layers(model):
    return [module for module in model.modules() if isinstance(module, ReAttention)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"scale_norm": True},
        {"gated": True},
        {"drop": 0.2},
        {"build": Older},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_output_is_unchanged(norm, options):
    model = vit(**options)
    expected, keys = model(tokens()), set(model.state_dict())
    assert to_re_attention(model, norm=norm) is model
    assert len(layers(model)) == 3 and not any(type(block.attn).__name__ == "Attention" for block in model)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-6)
    added = {"theta", "theta_bias"} | ({"head_norm"} if norm else set())
    assert {key.split(".")[2] for key in set(model.state_dict()) - keys} == added and keys <= set(model.state_dict())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_kept(norm, dtype):
    model = vit().to(dtype)
    expected = model(tokens(dtype=dtype))
    to_re_attention(model, norm=norm)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {dtype}
    tolerance = {torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(model(tokens(dtype=dtype)), expected, rtol=0, atol=tolerance)


def test_parts_are_moved_and_settings_kept():
    model = vit(drop=0.2, qk_norm=True, gated=True)
    model.train()
    model[1].attn.qkv.weight.requires_grad_(False)
    model[2].attn.scale = 0.5
    old = [block.attn for block in model]
    to_re_attention(model)
    for block, before in zip(model, old, strict=True):
        for part in ("qkv", "q_norm", "k_norm", "gate", "attn_drop", "proj", "proj_drop"):
            assert getattr(block.attn, part) is getattr(before, part), part
        assert block.attn.training and block.attn.head_norm.training
        assert block.attn.attn_drop.p == 0.2 and block.attn.proj_drop.p == 0.1
        assert torch.equal(block.attn.theta, torch.eye(HEADS)) and not block.attn.theta_bias.any()
    assert not model[1].attn.qkv.weight.requires_grad
    assert model[2].attn.scale == 0.5


def test_a_mask_is_passed_on():
    attn = vit(depth=1)
    mask = torch.zeros(10, 10).masked_fill(torch.ones(10, 10).triu(1).bool(), float("-inf"))
    expected = attn[0].attn(tokens(), attn_mask=mask)
    to_re_attention(attn)
    torch.testing.assert_close(attn[0].attn(tokens(), attn_mask=mask), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attn[0].attn(tokens(), is_causal=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("blocks", "expected"), [(None, [0, 1, 2]), (2, [1, 2]), ([0, -1], [0, 2]), ([], []), (0, [])])
def test_chosen_blocks(blocks, expected):
    model = vit()
    to_re_attention(model, blocks)
    assert [index for index, block in enumerate(model) if isinstance(block.attn, ReAttention)] == expected
    first = layers(model)
    to_re_attention(model)
    assert len(layers(model)) == 3 and all(layer in layers(model) for layer in first)


def test_a_layer_used_twice_stays_one_layer():
    model = vit()
    model[2].attn = model[0].attn
    to_re_attention(model)
    assert model[2].attn is model[0].attn and len(layers(model)) == 2


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_reach_theta(norm):
    model = to_re_attention(vit(), norm=norm).train()
    if norm:
        calibrate(model, tokens())
    model(tokens()).square().sum().backward()
    for layer in layers(model):
        assert layer.theta.grad.abs().min() > 0 and layer.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm", NORMS)
def test_talking_heads_of_cait(norm):
    """Unchanged, old checkpoints still fit, both mixings learn; class attention stays as it is."""
    model = vit(CaitAttention)
    model.append(Block(ClassAttn()))
    with torch.no_grad():
        for block in model[:3]:
            for part in (block.attn.proj_l, block.attn.proj_w):
                part.weight.add_(torch.eye(HEADS))
    model[0].attn.proj_l.weight.requires_grad_(False)
    expected, original = model(tokens()), copy.deepcopy(model.state_dict())
    to_re_attention(model, norm=norm)
    assert len(layers(model)) == 3 and type(model[3].attn) is ClassAttn
    assert not model[0].attn.pre_theta.requires_grad and model[1].attn.pre_theta.requires_grad
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-6)
    if norm:
        calibrate(model, tokens())
        torch.testing.assert_close(model.train()(tokens()), expected, rtol=1e-4, atol=1e-5)
    model.train()(tokens()).square().sum().backward()
    for layer in layers(model)[1:]:
        assert layer.pre_theta.grad.abs().min() > 0 and layer.theta.grad.abs().min() > 0
        with torch.no_grad():
            layer.pre_theta.zero_()
    result = model.load_state_dict(original, strict=False)
    assert not result.unexpected_keys and all("head_norm" in key for key in result.missing_keys)
    if not norm:
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-6)


def test_talking_heads_that_have_no_equivalent():
    with pytest.raises(
        ValueError, match=r"0.attn and 2 more \(talking_heads.CaitAttention\): its attn_drop drops after mixing"
    ):
        to_re_attention(vit(CaitAttention, drop=0.1))
    model = vit(CaitAttention)
    model[1].attn.proj_w = nn.Linear(HEADS, 5)
    with pytest.raises(ValueError, match=r"1.attn \(\S+CaitAttention\): proj_w must be a torch.nn.Linear from 3 heads"):
        to_re_attention(model)


CALLS = {
    "alone": {},
    "padded": {"mask": torch.arange(10) < torch.tensor([10, 6, 3, 8])[:, None]},
    "by-row": {"attn_mask": torch.eye(10, dtype=torch.bool) | (torch.arange(100).reshape(10, 10) % 3 > 0)},
    "biased": {"rel_pos": lambda i, j: -(torch.arange(i)[:, None] - torch.arange(j)).abs() * torch.ones(3, 1, 1)},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mixing", [(True, True), (True, False), (False, True)], ids=str)
def test_talking_heads_of_x_transformers(mixing, causal):
    """Called as before, with the same results and gradients; the old state dict is loaded."""
    options = dict(zip(("pre_talking_heads", "post_talking_heads"), mixing, strict=True))
    model = vit_of_separate(causal=causal, **options)
    before = copy.deepcopy(model)
    model[0].to_k.weight.requires_grad_(False)
    model[0].to_v.weight.requires_grad_(False)
    model[0].to_q.weight.requires_grad_(False)
    assert to_re_attention(model, norm=None) is model and len(layers(model)) == 2
    assert not model[0].attention.qkv.weight.requires_grad and model[1].attention.qkv.weight.requires_grad
    for loaded in (False, True):
        if loaded:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
                for layer in layers(model):
                    layer.theta.copy_(torch.eye(HEADS))
            # Without talking heads after the softmax, theta and its bias are new.
            missing, unexpected = model.load_state_dict(before.state_dict(), strict=mixing[1])
            assert not unexpected and len(missing) == (0 if mixing[1] else 4)
        for first, second in ({"mask": CALLS["padded"]["mask"]}, CALLS["biased"]), *((c, c) for c in CALLS.values()):
            expected = before[1](before[0](tokens(), **first), **second)
            found = model[1](model[0](tokens(), **first), **second)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    both = tokens(), None, CALLS["padded"]["mask"], None, CALLS["by-row"]["attn_mask"], CALLS["biased"]["rel_pos"]
    torch.testing.assert_close(model[0](*both), before[0](*both), rtol=1e-5, atol=1e-5)
    assert model[0](tokens(), return_intermediates=True)[1] is None
    model[1](tokens()).square().sum().backward()
    before[1](tokens()).square().sum().backward()
    found = model[1].attention.qkv.weight.grad.chunk(3)
    for grad, part in zip(found, (before[1].to_q, before[1].to_k, before[1].to_v), strict=True):
        # Sums of float32 terms as large as the largest of them, in another order.
        largest = part.weight.grad.abs().max().item()
        torch.testing.assert_close(grad, part.weight.grad, rtol=0, atol=1e-5 * largest)
    with pytest.raises(ValueError, match="converted takes masks alone, got context, rotary_pos_emb"):
        model[0](tokens(), tokens(), rotary_pos_emb=1)
    with pytest.raises(ValueError, match=r"attn_mask must be alike for all heads, got \(3, 10, 10\)"):
        model[0](tokens(), attn_mask=torch.ones(3, 10, 10, dtype=torch.bool))


def vit_of_separate(build=SeparateAttention, **options):
    torch.manual_seed(0)
    model = nn.Sequential(build(**options), build(**options)).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "talking" in name else 0.25)
    return model


def test_layers_of_x_transformers_that_are_not_plain(monkeypatch):
    model = vit_of_separate(max_attend_past=4, dropout=0.1)
    reason = "it is no plain attention with talking heads by its max_attend_past"
    with pytest.raises(ValueError, match=rf"0 and 1 more \(talking_heads.SeparateAttention\): {reason}"):
        to_re_attention(model)
    model = vit_of_separate()
    model[1].to_v_gate, model[1].attend.attn_fn = nn.Linear(DIM, DIM), F.relu
    with pytest.raises(ValueError, match="by its to_v_gate, to_v_gate.bias, to_v_gate.weight, attn_fn"):
        to_re_attention(model)
    model = vit_of_separate()
    model[1].to_out = nn.Identity()
    with pytest.raises(
        ValueError, match="1 .*to_out must be a plain torch.nn.Linear, got torch.nn.modules.linear.Identity"
    ):
        to_re_attention(model)
    model = vit_of_separate()
    nn.utils.parametrizations.weight_norm(model[1].to_q)
    with pytest.raises(
        ValueError, match="1 .*to_q must be a plain .* got torch.nn.utils.parametrize.ParametrizedLinear"
    ):
        to_re_attention(model)
    model = vit_of_separate()
    model[1].attend.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="1 .*attend has hooks, which would be lost"):
        to_re_attention(model)
    # Before 1.39 the scores were replaced.
    model = vit_of_separate()
    monkeypatch.setattr(Attend, "residual", False)
    with pytest.raises(ValueError, match="its output .* is not that of softmax attention"):
        to_re_attention(model)


@pytest.mark.libraries
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_models_of_x_transformers(kind):
    package = library("x_transformers")
    torch.manual_seed(0)
    layers_of = getattr(package, kind)(
        dim=32, depth=2, heads=4, attn_pre_talking_heads=True, attn_post_talking_heads=True, alibi_pos_bias=True
    )
    model = package.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers_of).eval()
    for name, parameter in model.named_parameters():
        if "talking_heads" in name:
            nn.init.normal_(parameter, std=0.5)
    ids, mask = torch.randint(0, 20, (2, 11)), torch.arange(11) < torch.tensor([[11], [6]])
    expected = model(ids, mask=mask)[mask]
    to_re_attention(model, norm=None)
    assert len(layers(model)) == 2
    torch.testing.assert_close(model(ids, mask=mask)[mask], expected, rtol=1e-5, atol=1e-5)
    model.train()(ids, mask=mask).square().mean().backward()
    assert all(layer.pre_theta.grad.abs().max() > 0 for layer in layers(model))


def test_plain_deepvit():
    torch.manual_seed(0)
    config = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 3, "num_heads": HEADS, "num_classes": 5}
    model = DeepViT(attention="self", **config).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    torch.testing.assert_close(to_re_attention(model)(images), expected, rtol=1e-5, atol=1e-6)
    DeepViT(**config).load_state_dict(model.state_dict())


def test_meta_device():
    with torch.device("meta"):
        model = vit()
    to_re_attention(model)
    assert len(layers(model)) == 3 and all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("as_batches", [False, True])
def test_calibration_keeps_the_output_in_both_modes(as_batches):
    model = to_re_attention(vit())
    expected = model(tokens(8))
    modes = [module.training for module in model.train().modules()]
    assert calibrate(model, [(half, None) for half in tokens(8).split([3, 5])] if as_batches else tokens(8)) is model
    assert [module.training for module in model.modules()] == modes
    # Eval first: training moves the running statistics.
    torch.testing.assert_close(model.eval()(tokens(8)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.train()(tokens(8)), expected, rtol=1e-4, atol=1e-5)
    # Without the data, batch norm would have changed it.
    assert (to_re_attention(vit()).train()(tokens(8)) - expected).abs().max() > 0.1


def test_calibration_finds_the_statistics_of_the_maps():
    model = calibrate(to_re_attention(vit(depth=1)), tokens())
    attn = model[0].attn
    maps, _ = attn.attention_maps(model[0].norm1(tokens()))
    var, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
    norm = attn.head_norm
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    torch.testing.assert_close(norm.weight, (var + norm.eps).sqrt())
    torch.testing.assert_close(norm.bias, mean)


def test_calibration_takes_batches_of_transformers():
    found, expected = to_re_attention(vit()), to_re_attention(vit())
    calibrate(found, [{"pixel_values": tokens(), "labels": torch.zeros(4)}])
    calibrate(expected, tokens())
    torch.testing.assert_close(found.state_dict(), expected.state_dict())
    with pytest.raises(ValueError, match="images must be a tensor, or an iterable .* got a batch of type dict"):
        calibrate(found, [{"input_ids": tokens()}])


def test_calibration_counts_what_is_visible():
    """The same statistics from padded sequences as from each without its padding."""
    masks = torch.arange(10) < torch.tensor([10, 6, 3, 8])[:, None, None, None]
    padded = to_re_attention(vit(depth=1))
    padded.forward = lambda x: padded[0].attn(x, attn_mask=masks)
    calibrate(padded, tokens())
    maps = [padded[0].attn.attention_maps(x[None], attn_mask=m)[0] for x, m in zip(tokens(), masks, strict=True)]
    seen = torch.cat([m[..., :length].flatten(2) for m, length in zip(maps, [10, 6, 3, 8], strict=True)], -1)
    norm = padded[0].attn.head_norm
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2), correction=0))


def test_calibration_of_a_trained_model_moves_statistics_only():
    torch.manual_seed(0)
    model = nn.Sequential(Block(ReAttention(DIM, HEADS)), Block(ReAttention(DIM, HEADS, norm=None)))
    with torch.no_grad():
        norm = model[0].attn.head_norm
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    expected = model.eval()(tokens())
    calibrate(model, tokens(seqlen=7))
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-5)


def test_calibration_errors():
    with pytest.raises(
        ValueError, match="model must hold a ReAttention with norm='batch', got .*Sequential without any"
    ):
        calibrate(to_re_attention(vit(), norm=None), tokens())
    with pytest.raises(ValueError, match="images must reach every layer to be calibrated, got none for 0.attn, 1.attn"):
        calibrate(to_re_attention(vit()), [])
    model = to_re_attention(vit())
    model[1].attn.head_norm = nn.BatchNorm2d(HEADS, affine=False)
    with pytest.raises(ValueError, match="head_norm of 1.attn must have a weight"):
        calibrate(model, tokens())


class Biased(Attention):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, HEADS))


class Rotary(Attention):
    def forward(self, x, rope=None, attn_mask=None):
        return super().forward(x, attn_mask)


class OverChannels(Attention):
    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj((value @ (query.mT @ key).softmax(-1)).transpose(1, 2).flatten(2))


class Windows(Attention):
    def forward(self, x):
        batch, windows, seqlen, dim = x.shape
        return super().forward(x.flatten(0, 1)).view(x.shape)


class Pointwise(Attention):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv1d(DIM, DIM, 1)


class Grouped(Attention):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 2 * DIM)


class NamedAlike(Attention):
    class Linear(nn.Module):
        pass

    def __init__(self):
        super().__init__()
        self.qkv = self.Linear()


class DropsItsOwn(Attention):
    class Dropout(nn.Module):
        def forward(self, maps):
            return maps

    def __init__(self):
        super().__init__()
        self.attn_drop = self.Dropout()


class Hooked(Attention):
    def __init__(self):
        super().__init__()
        self.attn_drop = nn.Identity()
        self.attn_drop.register_forward_hook(lambda *_: None)


class HookedElsewhere(Attention):
    def __init__(self):
        super().__init__()
        self.maps = nn.Identity()
        self.maps.register_forward_hook(lambda *_: None)


class Compiled(nn.Module):
    """As torch.compile and peft wrap a module: what it holds can be read from it."""

    def __init__(self):
        super().__init__()
        self.wrapped = Attention()

    num_heads = property(lambda self: self.wrapped.num_heads)
    qkv = property(lambda self: self.wrapped.qkv)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Biased, "it holds relative_position_bias_table"),
        (Rotary, "its forward takes rope"),
        (OverChannels, r"its output for an input of shape \(2, 7, 24\) is not that of softmax attention"),
        (Windows, r"it does not take an input of shape \(2, 7, 24\): not enough values"),
        (Pointwise, "proj must be a torch.nn.Linear, or have in_features .* got torch.nn.modules.conv.Conv1d: convert"),
        (
            NamedAlike,
            "qkv must be a torch.nn.Linear, or have .* got test_convert.NamedAlike.Linear: convert first, then",
        ),
        (DropsItsOwn, "attn_drop must be a torch.nn.Dropout, got test_convert.DropsItsOwn.Dropout"),
        (Hooked, "its attn_drop, an Identity, has hooks"),
        (HookedElsewhere, "its maps, an Identity, has hooks"),
        (Compiled, "it wraps another attention layer: convert first"),
        (Grouped, "qkv must put out three times what proj takes in, for 3 heads, not 48 and 24"),
    ],
)
def test_what_has_no_equivalent_is_named_and_nothing_changed(kind, reason):
    model = vit(depth=4)
    model[1].attn, model[3].attn = kind(), kind()
    before = list(model.modules())
    message = rf"no equivalent in re-attention: 1.attn and 1 more \(test_convert.{kind.__name__}\): {reason}"
    with pytest.raises(ValueError, match=message):
        to_re_attention(model)
    assert list(model.modules()) == before
    to_re_attention(model, blocks=[0, 2])
    assert len(layers(model)) == 2


class Adapted(nn.Module):
    """A Linear with an adapter of rank 2, as in LoRA."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = linear, linear.in_features, linear.out_features
        self.down, self.up = nn.Linear(self.in_features, 2, bias=False), nn.Linear(2, self.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Quantised(nn.Module):
    """A Linear of whole numbers, its weight a method, as in torch.ao.nn.quantized.dynamic."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", (linear.weight.detach() * 100).round().to(torch.int8))

    def weight(self):
        return self.packed / 100

    def forward(self, x):
        step = x.abs().amax() / 127
        return F.linear((x / step).round() * step, self.weight())


class FourBits(nn.Linear):
    """A Linear whose weight is bytes, as in bitsandbytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        whole = (linear.weight.detach() * 20).round().clamp(-8, 7) + 8
        self.weight = nn.Parameter(whole.to(torch.uint8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, (self.weight - 8.0) / 20, self.bias)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrap", [Adapted, Quantised, FourBits, nn.utils.parametrizations.weight_norm])
def test_projections_that_are_linear_but_for_the_name(wrap, norm):
    """They are called and nothing else, so whatever they do stays."""
    model = vit()
    for block in model:
        block.attn.qkv, block.attn.proj = wrap(block.attn.qkv), wrap(block.attn.proj)
    projections = [block.attn.qkv for block in model]
    expected = model(tokens())
    to_re_attention(model, norm=norm)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-2 if wrap is Quantised else 1e-5)
    assert [block.attn.qkv for block in model] == projections
    assert all(layer.theta.dtype == torch.float32 for layer in layers(model))


@pytest.mark.libraries
def test_adapters_of_peft():
    peft = library("peft")
    model = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False)).eval()
    expected = model(tokens())
    to_re_attention(model, norm=None)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(tokens()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"])
@pytest.mark.parametrize("where", ["model", "1", "1.attn.qkv"])
def test_wrappers_that_would_not_know_the_new_parameters_are_refused(where, wrapper):
    """Their gradients would stay those of one process, and nobody would say so."""

    class Wrapped(type(wrapper, (nn.Module,), {})):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = nn.Sequential(*vit())
    if where == "model":
        model = Wrapped(model)
    else:
        model.set_submodule(where, Wrapped(model.get_submodule(where)))
    with pytest.raises(
        ValueError, match=rf"model must not be wrapped yet, got test_convert.*Wrapped at {where}, which"
    ):
        to_re_attention(model)
    if where != "model":
        to_re_attention(model, blocks=[0, 2])
        assert len(layers(model)) == 2


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            nn.utils.parametrizations.weight_norm,
            "a plain .* got torch.nn.utils.parametrize.ParametrizedLinear: convert",
        ),
        (Adapted, "a plain .* got test_convert.Adapted: convert"),
        (lambda linear: linear.register_forward_hook(lambda *_: None), "a plain .* got one with hooks: convert"),
        (
            lambda linear: linear.register_parameter("extra", nn.Parameter(linear.bias.detach())),
            "a plain .* with parameters extra: conv",
        ),
        (lambda linear: nn.Linear(HEADS, HEADS + 1), r"a torch.nn.Linear from 3 heads to as many, got Linear\(in_f"),
    ],
)
def test_weights_that_are_read_must_be_all_there_is(change, found):
    """Of the talking heads' layers the weights are taken: an adapter or a parametrisation would be lost."""
    model = vit(CaitAttention)
    for part in ("proj_l", "proj_w"):
        changed = change(getattr(model[1].attn, part))
        if isinstance(changed, nn.Module):
            setattr(model[1].attn, part, changed)
    with pytest.raises(ValueError, match=rf"1.attn \(talking_heads.CaitAttention\): proj_l must be {found}"):
        to_re_attention(model)


def test_shared_weights_that_are_read_are_refused():
    model = vit(CaitAttention)
    model[1].attn.proj_l.weight = model[0].attn.proj_l.weight
    with pytest.raises(
        ValueError, match=r"0.attn and 1 more .*: weights of its proj_l are shared, and would no longer"
    ):
        to_re_attention(model)
    assert len(layers(to_re_attention(model, [2]))) == 1
    model = vit_of_separate()
    model[1].to_q = model[0].to_q
    with pytest.raises(ValueError, match=r"0 and 1 more .*: weights of its to_q are shared, and would no longer be"):
        to_re_attention(model)


def test_hooks_and_other_attention_are_refused():
    model = vit()
    model[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"1.attn \(test_convert.Attention\): it has hooks"):
        to_re_attention(model)
    layer = nn.TransformerEncoderLayer(DIM, HEADS)
    layer.self_attn = nn.MultiheadAttention(DIM, HEADS, add_zero_attn=True)
    with pytest.raises(
        ValueError, match=r"self_attn \(torch.nn.modules.activation.MultiheadAttention\): it was made with add_zero_a"
    ):
        to_re_attention(layer)


def test_argument_errors():
    with pytest.raises(ValueError, match="norm must be 'batch' or None, got 'layer': LayerNorm over the heads removes"):
        to_re_attention(vit(), norm="layer")
    with pytest.raises(ValueError, match="norm must be 'batch' or None, got 'group'"):
        to_re_attention(vit(), norm="group")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        to_re_attention(3)
    with pytest.raises(
        ValueError, match="model must hold attention layers .* got torch.nn.modules.linear.Linear without any"
    ):
        to_re_attention(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"model must hold attention layers to replace, got one itself \(test_convert.Attention\)"
    ):
        to_re_attention(Attention())
    with pytest.raises(ValueError, match=r"blocks must lie in \[-3, 3\) for 3 blocks, got \[3\]"):
        to_re_attention(vit(), [0, 3])


@pytest.mark.libraries
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "init_values": 0.1}),
        ("vit_small_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("vit_base_patch16_siglip_224", {"embed_dim": 48, "num_heads": 3}),
    ],
    ids=["tiny", "deit", "qk_norm", "registers", "dynamic", "attention_pool"],
)
def test_models_of_timm(name, options, norm):
    timm = library("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, depth=3, num_classes=10, **options).eval()
    images = torch.randn(2, 3, 96 if "dynamic_img_size" in options else 64, 64)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.2)
    expected, original = model(images), copy.deepcopy(model.state_dict())
    to_re_attention(model, norm=norm)
    assert len(layers(model)) == 3
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert not model.load_state_dict(original, strict=False).unexpected_keys
    if norm:
        calibrate(model, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.train()(images), expected, rtol=1e-3, atol=1e-4)
    model.train()(images).sum().backward()
    assert all(layer.theta.grad.abs().max() > 0 for layer in layers(model))


@pytest.mark.libraries
def test_cait_of_timm():
    """The same logits, and a step of training."""
    torch.manual_seed(0)
    model = library("timm").create_model("cait_xxs24_224", img_size=64, depth=3, num_classes=10, init_values=0.5).eval()
    for block in model.blocks:  # far from uniform, and from each other
        nn.init.normal_(block.attn.qkv.weight, std=0.2)
        for part in (block.attn.proj_l, block.attn.proj_w):
            nn.init.normal_(part.weight, std=0.5)
            nn.init.normal_(part.bias)
    images = torch.randn(2, 3, 64, 64)
    expected, original = model(images), copy.deepcopy(model.state_dict())
    to_re_attention(model, norm=None)
    assert len(layers(model)) == 3
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    model.load_state_dict(original)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(images), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(layer.pre_theta.grad.abs().max() > 0 for layer in layers(model))


@pytest.mark.libraries
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eva02_tiny_patch14_224", r"blocks.0.attn and 11 more \(\S+\.EvaAttention\): its forward takes rope"),
        ("xcit_nano_12_p16_224", r"blocks.0.attn and 11 more \(\S+\.XCA\): it holds temperature"),
        ("beit_base_patch16_224", r"\(\S+\.Attention\): its forward takes shared_rel_pos_bias"),
        ("vit_relpos_small_patch16_224", r"\(\S+\.RelPosAttention\): its forward takes shared_rel_pos"),
        ("davit_tiny", r"\(\S+\.ChannelAttention\): its output .* is not that of softmax attention"),
        ("resnet18", "got timm.models.resnet.ResNet without any"),
    ],
)
def test_other_models_of_timm_are_refused(name, message):
    model = library("timm").create_model(name)
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        to_re_attention(model)
    assert list(model.modules()) == before
