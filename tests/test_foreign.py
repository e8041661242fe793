"""Attention of other libraries, known by its parts: maps, values, and conversion that changes nothing."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from libraries import library
from torch import nn

from reattn import ReAttention
from reattn.analysis import (
    attention_hooks,
    attention_rollout,
    attentions,
    describe_blocks,
    find_attentions,
    measure_attention,
    register_attention,
    timm_maps,
    timm_values,
    token_grid,
    visit_blocks,
)
from reattn.convert import calibrate, to_re_attention
from reattn.foreign import JoinedLinear

DIM, HEADS = 24, 3
# Rounding of float32 in a map, or an output, relative to its size.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Kernels are other tests' business."""
    monkeypatch.setenv("REATTN_BACKEND", "reference")


def far_from_uniform(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def visited(model, *args, **kwargs):
    """Maps, values and paths of every block, in the model's own mode."""
    found = []
    with torch.no_grad(), attention_hooks(model, lambda b: found.append((b.maps(), b.values(), b.name))):
        model(*args, **kwargs)
    return [list(each) for each in zip(*found, strict=True)]


def close(found, expected):
    torch.testing.assert_close(list(found), list(expected), **CLOSE)


# Copies of timm's older Attention.


class Copied(nn.Module):
    """As in MAE and DeiT: no norms of query and key, no fused_attn, no masks."""

    def __init__(self, dim=DIM, num_heads=HEADS):
        super().__init__()
        self.num_heads = num_heads
        self.scale = 0.7 * (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def maps(self, q, k):
        return (q @ k.transpose(-2, -1) * self.scale).softmax(-1)

    def attend(self, x):
        batch, seqlen, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, seqlen, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        self.seen = attn = self.maps(q, k)
        return self.proj_drop(self.proj((self.attn_drop(attn) @ v).transpose(1, 2).reshape(batch, seqlen, dim))), attn

    def forward(self, x):
        return self.attend(x)[0]


class Dino(Copied):
    """As in DINO: the maps are returned too."""

    def forward(self, x):
        return self.attend(x)


class Official(Copied):
    """As in DeepViT's own code without re-attention: the last block's maps are taken, and nothing is done with them."""

    def forward(self, x, atten=None):
        return self.attend(x)


class OfficialReAttention(Official):
    def __init__(self):
        super().__init__()
        self.reatten_matrix = nn.Conv2d(HEADS, HEADS, 1, 1)
        self.var_norm = nn.BatchNorm2d(HEADS)
        self.reatten_scale = 0.6

    def maps(self, q, k):
        return self.var_norm(self.reatten_matrix(super().maps(q, k))) * self.reatten_scale


class Residual(Copied):
    """What it takes from the last block is added to its maps."""

    def forward(self, x, atten=None):
        out, attn = self.attend(x)
        return (out if atten is None else out + atten.mean()), attn


class Sigmoid(Copied):
    """Has the parts of softmax attention, and is none."""

    def maps(self, q, k):
        return (q @ k.transpose(-2, -1) * self.scale).sigmoid()


class Blocks(nn.Module):
    def __init__(self, kind, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x):
        last = None
        for block in self.blocks:
            out = block(x, last) if isinstance(block, Official | Residual) else block(x)
            out, last = out if isinstance(out, tuple) else (out, None)
            x = x + out
        return x


@pytest.mark.parametrize("kind", [Copied, Dino, Official, OfficialReAttention])
@pytest.mark.parametrize("training", [False, True])
def test_maps_of_copies(kind, training):
    model = far_from_uniform(Blocks(kind)).double().train(training)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    maps, values, names = visited(model, random(2, 10, DIM).double())
    close(maps, [block.seen for block in model.blocks])
    assert names == ["blocks.0", "blocks.1", "blocks.2"]
    for found, value in zip(maps, values, strict=True):
        assert found.shape == (2, HEADS, 10, 10) and value.shape == (2, HEADS, 10, DIM // HEADS)
    if not training:
        torch.testing.assert_close(dict(model.named_buffers()), buffers)


def test_values_of_copies():
    layer = far_from_uniform(Copied())
    x = random(2, 10, DIM)
    (maps,), (values,), _ = visited(nn.Sequential(layer), x)
    close([layer.proj((maps @ values).transpose(1, 2).flatten(2))], [layer(x)])


def test_measures_of_copies():
    model = far_from_uniform(Blocks(OfficialReAttention))
    x = random(2, 10, DIM)
    assert [block.mixes for block in describe_blocks(model, x)] == [True] * 3
    assert measure_attention(model, x).blocks["softmax"].shape == (3, 3)
    model = far_from_uniform(Blocks(Dino))
    assert [block.mixes for block in describe_blocks(model, x)] == [False] * 3
    rollout = torch.eye(10)
    for maps in visited(model, x)[0]:
        rollout = (0.5 * torch.eye(10) + 0.5 * maps.mean(1)) @ rollout
    close([attention_rollout(model, x)], [rollout])


class Halves(nn.Module):
    """Each half of the tokens attends to itself."""

    def __init__(self):
        super().__init__()
        self.inner = Copied()

    def forward(self, x):
        return self.inner(x.unflatten(1, (2, -1)).flatten(0, 1)).view(x.shape)


def test_a_rollout_leaves_nothing_out():
    x = random(2, 10, DIM)
    with pytest.raises(
        ValueError, match=r"that the rollout would leave out, got 1 \(Sigmoid\): its output for an input"
    ):
        attention_rollout(nn.Sequential(Copied(), Sigmoid()), x)
    with pytest.raises(
        ValueError, match="one map for each of 2 images, got 4 in block 0: there is no rollout of windows"
    ):
        attention_rollout(nn.Sequential(Halves()), x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Sigmoid, "its output for an input of shape .* is not that of softmax attention"),
        (lambda: nn.ModuleDict({"attn": NamedInAnotherWay()}), "it has no num_heads, and may name other parts"),
        (lambda: nn.ModuleDict({"attn": Nameless()}), "its forward does not name what it takes"),
        (lambda: nn.ModuleDict({"attn": Biased()}), "it holds relative_position_bias_table"),
    ],
)
def test_what_is_not_known_is_named(kind, reason):
    with pytest.raises(ValueError, match=rf"got none in Sequential: 0\S* and 1 more \(\w+\): {reason}"):
        find_attentions(nn.Sequential(kind(), kind()))


class Nameless(Copied):
    def forward(self, *inputs):
        return self.attend(*inputs)


class NamedInAnotherWay(Copied):
    def __init__(self):
        super().__init__()
        self.heads = self.num_heads
        del self.num_heads


class Biased(Copied):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3))


def test_an_argument_that_changes_the_maps_is_refused():
    """One that is never read does not: :func:`test_maps_of_copies`."""
    model = far_from_uniform(Blocks(Residual))
    with pytest.raises(ValueError, match=r"atten must not be given to a test_foreign.Residual whose maps are measured"):
        visited(model, random(2, 10, DIM))


class Decorated(Copied):
    """Its forward pass reads nothing, what is around it does."""

    def around(forward):
        @functools.wraps(forward)
        def call(self, x, *args, **kwargs):
            return forward(self, x + sum(value for value in (*args, *kwargs.values()) if value is not None))

        return call

    @around
    def forward(self, x, atten=None):
        return self.attend(x)[0]


class ByNames(Copied):
    def inner(self, x, atten=None):
        return self.attend(x if atten is None else x + atten)[0]

    def forward(self, x, atten=None):
        return self.inner(**{name: value for name, value in locals().items() if name in ("x", "atten")})


class ByPosition(Copied):
    def forward(self, x, *others):
        return self.attend(sum(others, x))[0]


@pytest.mark.parametrize("kind", [Decorated, ByNames, ByPosition])
def test_arguments_are_tried(kind):
    """What is read cannot be told by looking at a function."""
    layer, x = far_from_uniform(Wrapper(kind())), random(2, 10, DIM)
    layer.forward = lambda *args, **kwargs: layer.layer(*args, **kwargs)
    close(visited(layer, x, *([] if kind is ByPosition else [None]))[0], [layer.layer.seen])
    name = "argument 2 by position" if kind is ByPosition else "atten"
    with pytest.raises(ValueError, match=f"{name} must not be given to a test_foreign.{kind.__name__} whose maps are"):
        visited(layer, x, random(2, 10, DIM, seed=2))


class Local(Copied):
    """Attends to neighbours alone: to all of a few tokens."""

    def maps(self, q, k):
        scores, at = q @ k.transpose(-2, -1) * self.scale, torch.arange(q.shape[2])
        return scores.masked_fill((at[:, None] - at).abs() > 8, float("-inf")).softmax(-1)


def test_local_attention_is_told_from_full_attention():
    for call in (find_attentions, to_re_attention):
        with pytest.raises(ValueError, match=r"for an input of shape \(1, 260, 24\) is not that of softmax attention"):
            call(nn.Sequential(Local()))


def test_a_layer_is_probed_once():
    lengths = []

    class Counted(Copied):
        def forward(self, x):
            lengths.append(x.shape[1])
            return self.attend(x)[0]

    model, x = nn.Sequential(Counted()), random(2, 10, DIM)
    visited(model, x)
    assert lengths == [7, 260, 10]
    visited(model, x)
    assert lengths == [7, 260, 10, 10]
    model[0].scale = 1.0
    visited(model, x)
    assert lengths == [7, 260, 10, 10, 7, 260, 10]
    forgotten = weakref.ref(model[0])
    del model
    gc.collect()
    assert forgotten() is None


class FloatDropout(Copied):
    def __init__(self):
        super().__init__()
        self.dropout = 0.5

    def maps(self, q, k):
        return nn.functional.dropout(super().maps(q, k), self.dropout, self.training)


class DropKey(Copied):
    def maps(self, q, k):
        scores = q @ k.transpose(-2, -1) * self.scale
        return (scores - 1e9 * torch.bernoulli(torch.full_like(scores, 0.3 * self.training))).softmax(-1)


class Normalised(Copied):
    """Its parts have statistics, and draw numbers; so has what takes its place."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.attn_drop, self.proj_drop = Statistics(), nn.Dropout(0.3), nn.Dropout(0.4)

    def maps(self, q, k):
        return super().maps(self.q_norm(q), k)


class Statistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(DIM // HEADS), nn.Dropout(0.1)

    def forward(self, q):
        return self.drop(self.norm(q.flatten(0, 2)).view(q.shape))


@pytest.mark.parametrize("training", [False, True])
def test_what_is_random_in_training_mode_is_kept_or_refused(training):
    for kind in (FloatDropout, DropKey):
        message = rf"0 \(test_foreign.{kind.__name__}\): in training mode it does more than attn_drop and proj_drop"
        with pytest.raises(ValueError, match=message):
            to_re_attention(nn.Sequential(kind()).train(training))
    model = nn.Sequential(Normalised()).train(training)
    model[0].q_norm.norm.eval()
    buffers, state = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    norm = model[0].q_norm.norm
    to_re_attention(model, norm=None)
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model[0].attn_drop.p, model[0].proj_drop.p, model[0].training, norm.training) == (0.3, 0.4, training, False)


def test_hooks_do_not_see_the_probe():
    model, x, seen = far_from_uniform(nn.Sequential(Copied())), random(2, 10, DIM), []
    model[0].attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = model(x)
    visited(model, x)
    to_re_attention(model, norm=None)
    assert [maps.shape for maps in seen] == [(2, HEADS, 10, 10)] * 2
    close([model(x)], [expected])
    close(seen[2:], seen[:1])


def replaced(layer, factor):
    """``layer`` with another forward pass on the instance: on ``factor`` times its query."""
    forward = layer.forward
    layer.forward = lambda x, *args, **kwargs: forward(factor * x, *args, **kwargs)
    return layer


@pytest.mark.parametrize("kind", ["Copied", "Layer", "Multihead", "timm"])
def test_a_forward_of_the_instance(kind, monkeypatch):
    """As accelerate has it: seen by the analysis, refused by the conversion."""
    if kind == "timm":
        owner = f"{__name__}", "Copied"
        monkeypatch.setattr(attentions, "_TIMM_ATTENTIONS", {owner})

    def build():
        return far_from_uniform({"Layer": Layer, "Multihead": Multihead}.get(kind, Copied)())

    x = random(2, 10, DIM)
    plain = nn.ModuleList([build()])
    expected = visited_layer(plain, x)
    close(visited_layer(nn.ModuleList([replaced(build(), 1)]), x), expected)
    with pytest.raises(ValueError, match="its output for an input of shape .* is not that of softmax attention"):
        find_attentions(nn.ModuleList([replaced(build(), 2)]))
    with pytest.raises(ValueError, match="its forward was replaced on the instance, which would be lost"):
        to_re_attention(nn.ModuleList([replaced(build(), 1)]))


def Multihead():
    return nn.MultiheadAttention(DIM, HEADS, batch_first=True)


def visited_layer(model, x):
    found = []
    with torch.no_grad(), attention_hooks(model, lambda block: found.append(block.maps())):
        model[0](*[x] * (3 if isinstance(model[0], nn.MultiheadAttention) else 1))
    assert len(found) == 1
    return found


class AttentionPoolOfMine(Copied):
    pass


def test_what_is_left_out_as_pooling_is_named(monkeypatch):
    model = nn.Sequential(AttentionPoolOfMine())
    for call in (find_attentions, to_re_attention):
        message = r"; left out, as what pools tokens by the name of its class: 0 \(test_foreign.AttentionPoolOfMine\)"
        with pytest.raises(ValueError, match=message):
            call(model)
    monkeypatch.setattr(attentions, "_registered", {})
    register_attention(AttentionPoolOfMine, timm_maps, timm_values)
    assert list(find_attentions(model)) == ["0"]


def test_conversion_of_copies():
    x = random(2, 10, DIM)
    model = far_from_uniform(Blocks(Copied))
    expected = model(x)
    scale = expected.abs().max()
    close([to_re_attention(model, norm=None)(x) / scale], [expected / scale])
    for kind, reason in (
        (Dino, "its forward returns a tuple, and ReAttention, which stores no maps, the output alone: have it"),
        (Official, "its forward takes atten"),
        (OfficialReAttention, "it is re-attention already: reattn.checkpoints.load_checkpoint loads"),
    ):
        model = Blocks(kind)
        with pytest.raises(ValueError, match=rf"blocks.0 and 2 more \(test_foreign.{kind.__name__}\): {reason}"):
            to_re_attention(model)
        assert all(type(block) is kind for block in model.blocks)


# torch.nn.MultiheadAttention.


def encoder(batch_first, heads=HEADS, **options):
    layer = nn.TransformerEncoderLayer(DIM, heads, 16, batch_first=batch_first, dropout=0.0)
    return far_from_uniform(nn.TransformerEncoder(layer, 2, **options))


PADDING = torch.arange(6) >= torch.tensor([[6], [4]])
CALLS = {
    "plain": {},
    "mask": {"mask": random(6, 6)},
    "hidden": {"mask": torch.ones(6, 6, dtype=torch.bool).triu(2)},
    "by head": {"mask": random(2 * HEADS, 6, 6)},
    "padding": {"src_key_padding_mask": PADDING},
    "both": {"mask": random(6, 6), "src_key_padding_mask": torch.zeros(2, 6).masked_fill(PADDING, float("-inf"))},
    "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_is_unchanged(batch_first, call):
    x = random(2, 6, DIM) if batch_first else random(6, 2, DIM)
    model = encoder(batch_first, enable_nested_tensor=False)
    expected = model(x, **CALLS[call])
    to_re_attention(model, norm=None)
    close([model(x, **CALLS[call])], [expected])
    # PyTorch's own kernels would take its place without gradients.
    with torch.no_grad():
        close([model(x, **CALLS[call])], [expected.detach()])


def test_multihead_in_an_encoder_that_would_make_nested_tensors():
    x = random(2, 6, DIM)
    model = encoder(True, heads=4)
    assert model.use_nested_tensor
    expected = model(x, src_key_padding_mask=PADDING)
    to_re_attention(model, norm=None)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=PADDING)
    close([found[~PADDING]], [expected[~PADDING].detach()])


def test_converted_multihead():
    layer = far_from_uniform(nn.MultiheadAttention(DIM, HEADS, dropout=0.1, batch_first=True))
    x, model = random(2, 6, DIM), nn.ModuleList([layer])
    out, averaged = layer(x, x, x)
    _, maps = layer(x, x, x, average_attn_weights=False)
    weight, saved = layer.in_proj_weight, copy.deepcopy(model.state_dict())
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    to_re_attention(model, norm=None)
    converted = model[0]
    # The very parameters, for an optimizer that has them, the dropout, and hooks.
    assert converted.attention.qkv.weight is weight and converted.attention.attn_drop.p == 0.1
    close([*converted(x, x, x)], [out, averaged])
    close([converted(x, x, x, average_attn_weights=False)[1]], [maps])
    assert converted(x, x, x, need_weights=False)[1] is None and len(calls) == 3
    nn.init.zeros_(weight)
    model.load_state_dict(saved, strict=False)
    close([*converted(x, x, x)], [out, averaged])
    converted._forward_hooks.clear()  # which cannot be pickled
    close([*pickle.loads(pickle.dumps(converted))(x, x, x)], [out, averaged])
    with pytest.raises(ValueError, match="query, key and value must be one tensor .* got several: convert the other"):
        converted(x, x + 1, x)
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True, got None"):
        converted(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 5}, "key and value must be as wide as query"),
        ({"add_bias_kv": True}, "it was made with add_bias_kv=True"),
        ({"add_zero_attn": True}, "it was made with add_zero_attn=True"),
    ],
)
def test_multihead_that_has_no_equivalent(options, reason):
    model = nn.ModuleList([nn.MultiheadAttention(DIM, HEADS, **options)])
    with pytest.raises(ValueError, match=rf"0 \(torch.nn.modules.activation.MultiheadAttention\): {reason}"):
        to_re_attention(model)


def test_cross_attention_is_refused():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, 16, 0.0, batch_first=True), 2)
    x, memory = random(2, 6, DIM), random(2, 5, DIM)
    message = (
        r"equivalent in re-attention: layers.0.multihead_attn and 1 more \(torch.nn.modules.activation.Multihead"
        r"Attention\): it attends from one sequence to another: convert the other layers alone, by to_re_attention"
    )
    with pytest.raises(ValueError, match=message):
        to_re_attention(model)
    expected = far_from_uniform(model)(x, memory)
    close([to_re_attention(model, blocks=[0, 2], norm=None)(x, memory)], [expected])


def test_multihead_that_pools_is_not_counted():
    class AttentionPooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(DIM, HEADS)

    model = nn.ModuleList([nn.MultiheadAttention(DIM, HEADS), AttentionPooling()])
    assert list(find_attentions(model)) == ["0"]
    to_re_attention(model)
    assert type(model[1].attention) is nn.MultiheadAttention


@pytest.mark.libraries
def test_torchvision():
    models = library("torchvision").models
    model = models.VisionTransformer(16, 4, num_layers=3, num_heads=HEADS, hidden_dim=DIM, mlp_dim=16, num_classes=5)
    nn.init.normal_(far_from_uniform(model).heads.head.weight)
    images = random(2, 3, 16, 16)
    expected, saved = model(images), copy.deepcopy(model.state_dict())
    grid = token_grid(model, 17)
    assert (grid.num_prefix_tokens, grid.height, grid.width) == (1, 4, 4)
    maps, values, _ = visited(model, images)
    to_re_attention(model)
    close([model(images)], [expected])
    converted_maps, converted_values, _ = visited(model, images)
    close(converted_maps + converted_values, maps + values)
    assert not model.load_state_dict(saved, strict=False).unexpected_keys
    calibrate(model, images)
    close([model(images), model.train()(images)], [expected] * 2)
    model(images).sum().backward()
    thetas = [module.theta for module in model.modules() if isinstance(module, ReAttention)]
    assert len(thetas) == 3 and all(theta.grad.abs().max() > 0 for theta in thetas)


@pytest.mark.libraries
@pytest.mark.parametrize("talking", [False, True])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_maps_of_x_transformers(kind, talking):
    """A decoder is causal; talking heads mix before the softmax and after it."""
    x_transformers = library("x_transformers")
    heads = {"attn_pre_talking_heads": talking, "attn_post_talking_heads": talking}
    model = getattr(x_transformers, kind)(dim=DIM, depth=2, heads=HEADS, attn_dim_head=8, **heads)
    x, expected = random(2, 10, DIM), []
    for layer in find_attentions(far_from_uniform(model)).values():
        layer.register_forward_hook(lambda module, args, output: expected.append(output[1].post_softmax_attn))
    maps = []
    with attention_hooks(model, lambda block: maps.append((block.maps("softmax"), block.values()))):
        model(x, return_hiddens=True)
    # What it calls so is not mixed yet.
    close([softmax for softmax, _ in maps], expected)
    assert maps[0][1].shape == (2, HEADS, 10, 8)
    assert [block.mixes for block in describe_blocks(model, x)] == [talking] * 2


# Attention of transformers.


class Layer(nn.Module):
    """With the parts of transformers' attention."""

    def __init__(self, names=("q_proj", "k_proj", "v_proj", "o_proj"), implementation="sdpa"):
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": implementation})()
        self.num_attention_heads, self.scaling, self.attention_dropout, self.is_causal = HEADS, 0.2, 0.1, False
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(DIM, DIM, bias=name != "k_proj"))

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        query, key, value = (
            getattr(self, name)(hidden_states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in self.names[:3]
        )
        scores = query @ key.mT * self.scaling
        if attention_mask is not None:
            is_boolean = attention_mask.dtype == torch.bool
            scores = scores.masked_fill(~attention_mask, float("-inf")) if is_boolean else scores + attention_mask
        self.seen = scores.softmax(-1)
        out = (self.seen @ value).transpose(1, 2).flatten(2)
        return (getattr(self, self.names[3])(out) if len(self.names) > 3 else out), None


class Rotary(Layer):
    def forward(self, hidden_states, position_embeddings, attention_mask=None):
        return hidden_states, None


class Normed(Layer):
    def __init__(self):
        super().__init__()
        self.q_norm = nn.LayerNorm(DIM // HEADS)


class Grouped(Layer):
    def __init__(self):
        super().__init__()
        self.k_proj = self.v_proj = nn.Linear(DIM, DIM // HEADS)


class NotDropped(Layer):
    def __init__(self):
        super().__init__()
        del self.attention_dropout


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *args, **kwargs):
        return self.layer(x, *args, **kwargs)[0]


@pytest.mark.parametrize(
    "names",
    [("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"), ("query", "key", "value")],
)
@pytest.mark.parametrize("mask", [None, random(2, HEADS, 10, 10), random(2, 1, 10, 10) > -1], ids=["", "bias", "hides"])
def test_layers_like_those_of_transformers(names, mask):
    layer = far_from_uniform(Layer(names))
    model, x = Wrapper(layer), random(2, 10, DIM)
    expected, saved = model(x, mask), copy.deepcopy(model.state_dict())
    (maps,), (values,), _ = visited(model, x, attention_mask=mask, output_attentions=True, position_ids=None)
    close([maps], [layer.seen])
    out = (maps @ values).transpose(1, 2).flatten(2)
    close([getattr(layer, names[3])(out) if len(names) > 3 else out], [expected])
    to_re_attention(model, norm=None)
    close([model(x, mask)], [expected])
    for parameter in model.parameters():
        parameter.data.zero_()
    model.layer.attention.theta.data = torch.eye(HEADS)
    assert not model.load_state_dict(saved, strict=False).unexpected_keys
    close([model(x, attention_mask=mask)], [expected])


def test_projections_of_transformers_that_are_called():
    """Frozen in part, or with hooks: three layers stay three."""
    for change in (
        lambda layer: layer.q_proj.requires_grad_(False),
        lambda layer: layer.v_proj.register_forward_hook(lambda module, args, output: 2 * output),
    ):
        model, x = Wrapper(far_from_uniform(Layer())), random(2, 10, DIM)
        change(model.layer)
        expected, saved = model(x), copy.deepcopy(model.state_dict())
        close(visited(model, x)[0], [model.layer.seen])
        to_re_attention(model, norm=None)
        assert isinstance(model.layer.attention.qkv, JoinedLinear)
        close([model(x)], [expected])
        nn.init.zeros_(model.layer.attention.qkv.layers[2].weight)
        assert not model.load_state_dict(saved, strict=False).unexpected_keys
        close([model(x)], [expected])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Rotary, "its forward takes position_embeddings"),
        (Normed, "it holds q_norm"),
        (Grouped, r"q_proj, k_proj, v_proj must put out as much each, for 3 heads, got \[24, 8, 8\]"),
        (NotDropped, "how it drops maps must be told by one of attention_dropout, dropout, dropout_prob, got none"),
    ],
)
def test_layers_of_transformers_that_are_not_plain(kind, reason):
    model = nn.ModuleList([kind()])
    with pytest.raises(ValueError, match=rf"0 \(test_foreign.{kind.__name__}\): {reason}"):
        to_re_attention(model)
    with pytest.raises(ValueError, match=rf"got none in ModuleList: 0 \({kind.__name__}\): {reason}"):
        find_attentions(model)


@pytest.mark.parametrize("converted", [False, True])
def test_arguments_of_transformers_that_are_refused(converted):
    model, x = Wrapper(far_from_uniform(Layer())), random(2, 10, DIM)
    if converted:
        to_re_attention(model)
    for given, message in (
        ({"head_mask": torch.ones(HEADS)}, "head_mask must not be given to an attention of transformers"),
        (
            {"attention_mask": torch.ones(2, 10)},
            r"attention_mask must have shape .* got \(2, 10\) of attn_implementation",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            visited(model, x, **given)


def weights(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


def test_tied_projections_stay_tied():
    """Within a layer, between layers, and with what is no layer."""
    x = random(2, 10, DIM)
    for tie in (
        lambda first, second: setattr(first.k_proj, "weight", first.q_proj.weight),
        lambda first, second: setattr(first, "k_proj", first.q_proj),
        lambda first, second: setattr(first, "v_proj", second.v_proj),
        lambda first, second: setattr(first.o_proj, "weight", second.v_proj.weight),
    ):
        model = far_from_uniform(nn.Sequential(Wrapper(Layer()), Wrapper(Layer())))
        tie(model[0].layer, model[1].layer)
        expected, count = model(x), weights(model)
        to_re_attention(model, norm=None)
        close([model(x)], [expected])
        assert weights(model) == count + 2 * HEADS**2
    once = Wrapper(far_from_uniform(Layer()))
    to_re_attention(nn.ModuleList([once, once]))
    assert type(once.layer.attention.qkv) is nn.Linear


def test_part_of_a_state_dict_of_transformers():
    model, x = Wrapper(far_from_uniform(Layer())), random(2, 10, DIM)
    saved = model.state_dict()
    to_re_attention(model, norm=None)
    expected = model(x)
    del saved["layer.k_proj.weight"]
    found = model.load_state_dict(saved, strict=False)
    assert "layer.attention.qkv.weight" in found.missing_keys and "layer.q_proj.weight" in found.unexpected_keys
    close([model(x)], [expected])
    with pytest.raises(TypeError, match="forward takes 2 arguments by position, got 3"):
        model(x, None, random(2, 10, DIM))


SIZES = {"hidden_size": DIM, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 16}
VIT = {**SIZES, "image_size": 16, "patch_size": 4}
# Model, its configuration's arguments, tokens in front of the patches.
FAMILIES = {
    "ViT": ("ViTModel", "ViTConfig", VIT, 1),
    "ViT with a head": ("ViTForImageClassification", "ViTConfig", VIT, 1),
    "DeiT": ("DeiTModel", "DeiTConfig", VIT, 2),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {**VIT, "layerscale_value": 0.5}, 1),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", VIT, 5),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", VIT, 1),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", VIT, 0),
    "BEiT": ("BeitModel", "BeitConfig", {**VIT, "use_relative_position_bias": True, "drop_path_rate": 0.0}, 1),
    "shared": ("BeitModel", "BeitConfig", {**VIT, "use_shared_relative_position_bias": True, "drop_path_rate": 0.0}, 1),
    "YOLOS": ("YolosModel", "YolosConfig", {**VIT, "image_size": [16, 16], "num_detection_tokens": 2}, None),
    "CLIP text": ("CLIPTextModel", "CLIPTextConfig", {**SIZES, "vocab_size": 50, "max_position_embeddings": 20}, None),
}


def build(family, implementation="sdpa"):
    transformers = library("transformers")
    model, config, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**options, attn_implementation=implementation))
    assert model.config._attn_implementation == implementation
    return far_from_uniform(model)


def inputs(family):
    if family != "CLIP text":
        return {"pixel_values": random(2, 3, 16, 16)}
    tokens = torch.randint(1, 49, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": (torch.arange(7) < torch.tensor([[7], [5]])).long()}


@pytest.mark.libraries
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_transformers(family):
    """Those that it returns itself, which the faster implementation does not."""
    batch, eager = inputs(family), build(family, "eager")
    expected = eager(**batch, output_attentions=True)
    same = build(family)
    same.load_state_dict(eager.state_dict())
    for model in (eager, same):
        maps, values, _ = visited(model, **batch)
        close(maps, expected.attentions)
        assert [value.shape for value in values] == [(2, HEADS, maps[0].shape[-1], DIM // HEADS)] * 3
    if (prefix := FAMILIES[family][3]) is not None:
        grid = token_grid(same, maps[0].shape[-1])
        assert (grid.num_prefix_tokens, grid.height, grid.width) == (prefix, 4, 4)
        assert measure_attention(same, batch).images == 2
        assert attention_rollout(same, batch["pixel_values"]).shape == maps[0][:, 0].shape


@pytest.mark.libraries
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_are_unchanged(family):
    """Output, maps that are asked for, gradients, and what was saved before."""
    batch = inputs(family)
    for implementation, called_before in (("sdpa", False), ("eager", True), ("eager", False)):
        model = build(family, implementation)
        before = model(**batch, output_attentions=called_before)
        expected, saved = before[0].detach(), copy.deepcopy(model.state_dict())
        # What adds to the scores, and what adds to the tokens.
        of = [p for n, p in model.named_parameters() if "bias_table" in n or "position_embedding" in n]
        expected_gradients = torch.autograd.grad(before[0][..., 0].sum(), of)
        to_re_attention(model, norm=None)
        after = model(**batch, output_attentions=implementation == "eager")
        scale = expected.abs().max()
        close([after[0] / scale], [expected / scale])
        if implementation == "eager":
            close(after.attentions, build(family, "eager")(**batch, output_attentions=True).attentions)
            assert len(after.attentions) == 3
        for found, wanted in zip(torch.autograd.grad(after[0][..., 0].sum(), of), expected_gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
        for module in model.modules():
            if isinstance(module, ReAttention):
                nn.init.zeros_(module.qkv.weight)
        assert not model.load_state_dict(saved, strict=False).unexpected_keys
        close([copy.deepcopy(model)(**batch)[0] / scale], [expected / scale])
    if family != "CLIP text":
        calibrate(to_re_attention(fresh := build(family)), batch["pixel_values"])
        close([fresh(**batch)[0] / scale, fresh.train()(**batch)[0] / scale], [expected / scale] * 2)


@pytest.mark.libraries
@pytest.mark.parametrize(
    ("model", "config", "options", "reason"),
    [
        ("DINOv3ViTModel", "DINOv3ViTConfig", VIT, r"\(\S*DINOv3ViTAttention\): its forward takes position_embeddings"),
        ("Data2VecVisionModel", "Data2VecVisionConfig", VIT, r"its forward takes relative_position_bias, interpolate"),
        (
            "SwinModel",
            "SwinConfig",
            {"image_size": 32, "embed_dim": DIM, "depths": [1, 1], "num_heads": [3, 3], "window_size": 4},
            r"encoder.layers.0.blocks.0.attention and 1 more \(\S*SwinAttention\): it holds relative_position_bias",
        ),
    ],
)
def test_other_models_of_transformers_are_refused(model, config, options, reason):
    transformers = library("transformers")
    model = getattr(transformers, model)(getattr(transformers, config)(**options))
    for call in (to_re_attention, find_attentions):
        with pytest.raises(ValueError, match=reason):
            call(model)


@pytest.mark.libraries
def test_saving_a_converted_model_of_transformers(tmp_path):
    """Its state dict is loaded after conversion alone: transformers would build the plain model."""
    model, images = to_re_attention(build("ViT")), random(2, 3, 16, 16)
    calibrate(model, images)
    expected = model(images)[0]
    torch.save(model.state_dict(), tmp_path / "converted.pth")
    fresh = to_re_attention(build("ViT"))
    fresh.load_state_dict(torch.load(tmp_path / "converted.pth"))
    close([fresh(images)[0]], [expected])
    close([copy.deepcopy(model)(images)[0]], [expected])
    with pytest.raises((AttributeError, pickle.PicklingError), match="capturing_hook"):
        torch.save(model, tmp_path / "pickled.pth")
    model.save_pretrained(tmp_path)
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {key for key in report["missing_keys"] if "attention" in key}


@pytest.mark.libraries
def test_adapters_of_peft_in_transformers():
    peft, images = library("peft"), random(2, 3, 16, 16)
    model = build("ViT")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted.eval()
    expected = adapted(images)[0]
    model.set_attn_implementation("eager")
    wanted = adapted(images, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    maps = []
    visit_blocks(adapted, images, lambda block: maps.append(block.maps()))
    close(maps, wanted)
    close([to_re_attention(model, norm=None)(images)[0]], [expected])
