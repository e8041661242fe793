"""Every quantity of reattn.analysis against a plain loop, on tiny random models; nothing held, nothing left behind."""

import copy
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reattn import ReAttention
from reattn.analysis import (
    TokenGrid,
    at_distances,
    attention_hooks,
    attention_rollout,
    attentions,
    block_similarity,
    describe_blocks,
    feature_maps,
    find_attentions,
    head_similarity,
    measure_attention,
    query_maps,
    register_attention,
    similar_blocks,
    similar_heads,
    similarity,
    similarity_matrix,
    timm_maps,
    timm_values,
    token_grid,
    token_similarity,
    visit_attention_maps,
    visit_blocks,
)
from reattn.models import DeepViT, SelfAttention

try:
    import timm
    from timm.layers.attention import Attention as TimmAttention
except ImportError:
    timm = None

KINDS = ("softmax", "re_attention")
skip_without_timm = pytest.mark.skipif(timm is None, reason="needs timm")
needs_timm = [pytest.mark.libraries, skip_without_timm]


class Encoder(nn.Module):
    """A ViT of PyTorch's own transformer layers, without a class token."""

    num_prefix_tokens = 0

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, stride=4)
        layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, images):
        return self.encoder(self.embed(images).flatten(2).mT)


def build_timm():
    return timm.models.VisionTransformer(
        img_size=12, patch_size=4, embed_dim=12, depth=4, num_heads=3, num_classes=5, qk_norm=True
    )


def deepvit(**overrides):
    config = {"img_size": 12, "patch_size": 4, "embed_dim": 12, "depth": 4, "num_heads": 3, "num_classes": 5}
    return lambda: DeepViT(**{**config, "backend": "reference", **overrides})


MODELS = {
    "batch": deepvit(norm="batch"),
    "layer": deepvit(norm="layer", output_scale=0.3),
    "pre-mixed": deepvit(norm="layer", pre_mix=True),
    "last-two": deepvit(re_attention_blocks=2, residual_scale=0.5),
    "plain": deepvit(attention="self"),
    "multihead": Encoder,
    "timm": build_timm,
}


@pytest.fixture(params=[pytest.param(name, marks=needs_timm if name == "timm" else ()) for name in MODELS])
def model(request):
    """Float64, in train mode, its maps far from uniform."""
    torch.manual_seed(0)
    model = MODELS[request.param]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model(random_images() + 0.5)
    return model


def random_images(batch=2, seed=1):
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(x, weight, bias, heads):
    projected = x @ weight.T + (0 if bias is None else bias)
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def plain_attention(module, x):
    """Softmax maps, the maps that are used, values: from weights alone, by the definition."""
    if isinstance(module, nn.MultiheadAttention):
        weights, biases, heads = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), module.num_heads
    else:
        bias = module.qkv.bias
        weights, heads = module.qkv.weight.chunk(3), module.num_heads
        biases = (None,) * 3 if bias is None else bias.chunk(3)
    query, key, value = (heads_of(x, weight, bias, heads) for weight, bias in zip(weights, biases, strict=True))
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if getattr(module, "pre_theta", None) is not None:
        scores = torch.einsum("hg,bhij->bgij", module.pre_theta, scores) + module.pre_bias[:, None, None]
    softmax = scores.softmax(-1)
    if not isinstance(module, ReAttention):
        return softmax, softmax, value
    mixed = torch.einsum("hg,bhij->bgij", module.theta, softmax)
    if module.theta_bias is not None:
        mixed = mixed + module.theta_bias[:, None, None]
    if module.norm_type == "batch":
        mixed = module.head_norm(mixed)
    elif module.norm_type == "layer":
        mixed = module.head_norm(mixed.movedim(1, -1)).movedim(-1, 1)
    return softmax, mixed * module.output_scale, value


@torch.no_grad()
def collect(model, images):
    """For each block (softmax maps, maps used, values, output before the projection's dropout)."""
    model = copy.deepcopy(model).eval()
    known = (ReAttention, SelfAttention, nn.MultiheadAttention) + ((TimmAttention,) if timm else ())
    blocks = []

    def hook(module, args, output):
        blocks.append((*plain_attention(module, args[0]), output[0] if isinstance(output, tuple) else output))

    for module in model.modules():
        if isinstance(module, known):
            module.register_forward_hook(hook)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return blocks


def of_kind(blocks, kind):
    return [block[KINDS.index(kind)].numpy() for block in blocks]


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


def slow_mean_cosine(p, q):
    """Over all columns of maps ``(batch, [heads,] seqlen, seqlen_k)``."""
    p, q = (np.moveaxis(maps, -2, -1).reshape(-1, maps.shape[-2]) for maps in (p, q))
    return np.mean([cosine(x, y) for x, y in zip(p, q, strict=True)])


def test_maps_and_values(model):
    images, expected = random_images(), collect(model, random_images())
    seen = []

    def visit(block):
        softmax, used, value, output = expected[len(seen)]
        torch.testing.assert_close(block.maps("softmax"), softmax)
        torch.testing.assert_close(block.maps(), used)
        torch.testing.assert_close(block.values(), value)
        # And they are what the module computes with.
        merged = (block.maps() @ block.values()).transpose(1, 2).flatten(2)
        project = block.module.out_proj if isinstance(block.module, nn.MultiheadAttention) else block.module.proj
        torch.testing.assert_close(project(merged), output)
        assert block.mixes == isinstance(block.module, ReAttention)
        assert block.module is dict(model.named_modules())[block.name]
        seen.append(block.index)

    visit_blocks(model, images, visit)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(model, kind):
    images = random_images()
    maps = of_kind(collect(model, images), kind)
    expected = np.array([[slow_mean_cosine(p, q) for q in maps] for p in maps])
    for held_blocks in (1, 3, 8):
        matrix = similarity_matrix(model, images, kind, held_blocks)
        assert matrix.dtype == torch.float64
        np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-10, atol=1e-12)
    by_distance = block_similarity(model, images, (1, 2, 3), kind)
    for distance, diagonal in at_distances(matrix, (1, 2, 3)).items():
        np.testing.assert_allclose(by_distance[distance].numpy(), np.diagonal(expected, distance), rtol=1e-10)
        torch.testing.assert_close(diagonal, by_distance[distance])


@pytest.mark.parametrize("kind", KINDS)
def test_heads(model, kind):
    maps = of_kind(collect(model, random_images()), kind)
    similarities = head_similarity(model, random_images(), kind)
    for block, similarity_of_block in zip(maps, similarities, strict=True):
        expected = [[slow_mean_cosine(block[:, g], block[:, h]) for h in range(3)] for g in range(3)]
        np.testing.assert_allclose(similarity_of_block.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_batches_average_over_images(model):
    images = random_images(5)
    loader = DataLoader(TensorDataset(images, torch.arange(5)), batch_size=2)
    whole = measure_attention(model, images)
    for batches in (loader, (batch for batch in images.split([1, 4])), [[images[:3]], (images[3:], None)]):
        measured = measure_attention(model, batches)
        assert measured.images == 5
        torch.testing.assert_close(measured.blocks, whole.blocks)
        torch.testing.assert_close(measured.heads, whole.heads)
        torch.testing.assert_close(measured.tokens, whole.tokens)
    for kind in KINDS:
        torch.testing.assert_close(whole.blocks[kind], similarity_matrix(model, loader, kind))
        torch.testing.assert_close(whole.heads[kind], head_similarity(model, loader, kind))
    torch.testing.assert_close(block_similarity(model, loader, (2,)), block_similarity(model, images, (2,)))


def test_tokens(model):
    blocks = collect(model, random_images())
    measured = measure_attention(model, random_images())
    for kind in KINDS:
        for maps, block, value in zip(of_kind(blocks, kind), blocks, measured.tokens[kind], strict=True):
            features = (torch.from_numpy(maps) @ block[2]).transpose(1, 2).flatten(2).numpy()
            pairs = itertools.permutations(range(features.shape[1]), 2)
            expected = np.mean([cosine(image[s], image[t]) for s, t in pairs for image in features])
            np.testing.assert_allclose(value.item(), expected, rtol=1e-10)


def test_features_and_queries(model):
    blocks = collect(model, random_images())
    prefix = blocks[0][0].shape[-1] - 9
    features = feature_maps(model, random_images(), blocks=(3, 1))
    rows = {kind: query_maps(model, random_images(), 2, (1, 3), kind) for kind in KINDS}
    assert list(features) == [1, 3]
    for index, maps in features.items():
        softmax, used, value, _ = blocks[index]
        for got, weights in ((maps.softmax, softmax), (maps.re_attention, used)):
            assert got.shape == (2, 12, 3, 3)
            for (b, h, y, x), d in itertools.product(np.ndindex(2, 3, 3, 3), range(4)):
                expected = weights[b, h, prefix + 3 * y + x] @ value[b, h, :, d]
                torch.testing.assert_close(got[b, 4 * h + d, y, x], expected)
        for kind, weights in zip(KINDS, (softmax, used), strict=True):
            torch.testing.assert_close(rows[kind][index], weights[:, :, 2, prefix:].reshape(2, 3, 3, 3))
    assert list(feature_maps(model, random_images())) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative, residual", [("abs", 0.5), ("clamp", 0.25)])
def test_rollout(model, kind, negative, residual):
    maps = of_kind(collect(model, random_images()), kind)
    rollout = attention_rollout(model, random_images(), kind, negative, residual)
    for b in range(2):
        expected = np.eye(maps[0].shape[-1])
        for block in maps:
            weights = np.mean([np.abs(head) if negative == "abs" else np.maximum(head, 0) for head in block[b]], axis=0)
            for token, row in enumerate(weights):
                # Clamped maps may leave a row without anything.
                weights[token] = row / row.sum() if row.any() else np.eye(len(row))[token]
            expected = (residual * np.eye(len(weights)) + (1 - residual) * weights) @ expected
        np.testing.assert_allclose(rollout[b].numpy(), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(rollout.sum(-1), torch.ones_like(rollout[..., 0]))


class Synthetic(nn.Module):
    """An attention that changes nothing, with maps made anew each time and counted while they live."""

    def __init__(self, alive, most):
        super().__init__()
        self.alive, self.most = alive, most

    def forward(self, x):
        return x

    def attention_maps(self, x):
        maps = torch.rand(len(x), 2, 4, 4), torch.rand(len(x), 2, 4, 4)
        self.alive.update(maps)
        self.most.append(len(self.alive))
        return maps


MEASURES = {
    "distances": (lambda model, batches: block_similarity(model, batches, (1, 3)), 3),
    "matrix": (lambda model, batches: similarity_matrix(model, batches, held_blocks=3), 0),
    "heads": (head_similarity, 0),
    "queries": (lambda model, batches: [query_maps(model, batch, num_prefix_tokens=0) for batch in batches], 0),
    "rollout": (lambda model, batches: [attention_rollout(model, batch) for batch in batches], 0),
}


@pytest.mark.parametrize("depth, batches", [(5, 1), (17, 1), (5, 6)])
@pytest.mark.parametrize("measure, held", MEASURES.values(), ids=MEASURES)
def test_maps_alive_depend_on_neither_depth_nor_batches(monkeypatch, measure, held, depth, batches):
    alive, units, most, most_units = weakref.WeakSet(), weakref.WeakSet(), [], []

    def counted(maps):
        columns = original(maps)
        units.add(columns)
        most_units.append(len(units))
        return columns

    original = similarity.unit_columns
    monkeypatch.setattr(similarity, "unit_columns", counted)
    model = nn.Sequential(*[Synthetic(alive, most) for _ in range(depth)])
    measure(model, [torch.zeros(2)] * batches)
    # Two kinds from the block that is visited, one kind from those before.
    assert max(most) == 2 + held
    assert max(most_units, default=0) <= 4
    assert not alive and not units


def probe_state(model):
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    modes = [module.training for module in model.modules()]
    return hooks, modes, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()


@pytest.mark.parametrize("fails", ["visitor", "model", "nowhere"])
def test_leaves_no_trace(model, fails):
    list(model.modules())[3].eval()
    state, weights = probe_state(model), copy.deepcopy(model.state_dict())
    images = random_images()[:, :2] if fails == "model" else random_images()

    def visit(block):
        block.maps(), block.values()
        if fails == "visitor" and block.index == 2:
            raise KeyboardInterrupt

    try:
        visit_blocks(model, images, visit)
    except (KeyboardInterrupt, ValueError, RuntimeError, AssertionError):
        assert fails != "nowhere"
    else:
        assert fails == "nowhere"
    assert probe_state(model) == state
    assert state[0] == 0 and True in state[1] and False in state[1] and state[2]
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_context_leaves_mode_and_gradients_to_the_caller(model):
    indices = []
    with attention_hooks(model, lambda block: indices.append((block.index, block.maps().requires_grad))):
        for _ in range(2):
            assert model.training
            model(random_images()).sum().backward()
    assert indices == 2 * [(index, False) for index in range(4)]
    assert any(parameter.grad is not None for parameter in model.parameters())
    model(random_images())
    assert len(indices) == 8


def test_blocks_are_for_the_visit_only():
    kept = []
    visit_blocks(MODELS["batch"](), random_images().float(), kept.append)
    for ask in (kept[1].maps, kept[1].values):
        with pytest.raises(RuntimeError, match="block 1 must be asked for its maps while it is visited"):
            ask()


def test_shared_attention_is_visited_each_time():
    attention = SelfAttention(8, 2)
    model = nn.Sequential(attention, nn.ReLU(), attention)
    assert list(find_attentions(model)) == ["0"]
    assert [block.name for block in describe_blocks(model, torch.randn(2, 5, 8))] == ["0", "0"]
    assert similarity_matrix(model, torch.randn(2, 5, 8)).shape == (2, 2)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(attentions, "_registered", {})


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = SelfAttention(8, 2)

    def forward(self, x):
        return self.inner(x)


def test_register_attention(registry):
    model, x = nn.Sequential(OwnAttention(), OwnAttention()), torch.randn(2, 5, 8)
    assert list(find_attentions(model)) == ["0.inner", "1.inner"]
    register_attention(OwnAttention, lambda module, x: torch.ones(len(x), 1, 5, 5))
    assert list(find_attentions(model)) == ["0", "1"]
    # Two images, and a single tensor: not to be taken for two kinds of maps.
    assert similarity_matrix(model, x).tolist() == [[pytest.approx(1.0)] * 2] * 2
    with pytest.raises(ValueError, match=r"the values of 0 \(OwnAttention\) are not known: register_attention must"):
        feature_maps(model, x, num_prefix_tokens=1)
    register_attention(OwnAttention, lambda m, x: m.inner.attention_maps(x), lambda m, x: m.inner._split_heads(x)[2])
    assert feature_maps(model, x)[1].softmax.shape == (2, 8, 2, 2)
    register_attention(OwnAttention, lambda module, x: x)
    with pytest.raises(ValueError, match=r"the maps of 0 \(OwnAttention\) must have shape \(batch, .*got \(2, 5, 8\)"):
        similarity_matrix(model, x)
    with pytest.raises(ValueError, match="attention_class must be a subclass of torch.nn.Module, got 3"):
        register_attention(3, timm_maps)


def test_copy_of_timm_attention(registry):
    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.scale, self.qkv = 2, 0.5, nn.Linear(8, 24)
            self.q_norm = self.k_norm = nn.Identity()

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="got none in Sequential"):
        find_attentions(nn.Sequential(Copied()))
    register_attention(Copied, timm_maps, timm_values)
    assert feature_maps(nn.Sequential(Copied()), torch.randn(1, 4, 8))[0].softmax.shape == (1, 8, 2, 2)


def test_mixing_into_another_number_of_heads():
    """The maps are there; what softmax maps would write is not defined."""
    model = deepvit(norm="layer", pre_mix=True, num_heads_out=5, re_attention_blocks=2)()
    shapes = {kind: [tuple(maps.shape) for maps in maps_of(model, kind)] for kind in KINDS}
    assert shapes == {"softmax": [(2, 3, 10, 10)] * 4, "re_attention": [(2, 3, 10, 10)] * 2 + [(2, 5, 10, 10)] * 2}
    assert [block.heads for block in describe_blocks(model, random_images().float())] == [3, 3, 5, 5]
    message = r"softmax maps of blocks.2.attn must have a head for each of the values' 5, got 3"
    with pytest.raises(ValueError, match=message):
        feature_maps(model, random_images().float())


def maps_of(model, kind):
    maps = []
    visit_blocks(model, random_images().float(), lambda block: maps.append(block.maps(kind).clone()))
    return maps


def test_subclass_with_its_own_forward_is_not_known():
    class Renamed(nn.MultiheadAttention):
        pass

    class Other(nn.MultiheadAttention):
        def forward(self, x):
            return x

    assert list(find_attentions(nn.Sequential(Renamed(8, 2), Other(8, 2)))) == ["0"]


def test_a_method_of_the_whole_model_is_not_an_attention():
    class Transformer(nn.Sequential):
        def attention_maps(self, x):
            raise AssertionError

    assert list(find_attentions(Transformer(SelfAttention(8, 2)))) == ["0"]
    assert list(find_attentions(SelfAttention(8, 2))) == [""]


MULTIHEAD = {
    "plain": ({}, {}),
    "sequence-first": ({"batch_first": False}, {}),
    "other-widths": ({"kdim": 6, "vdim": 7, "bias": False}, {}),
    "extra-keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "masks": (
        {},
        {
            "key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5]),
            "attn_mask": torch.eye(3, 5, dtype=torch.bool),
        },
    ),
    "training": ({"dropout": 0.5}, {}),
}


@pytest.mark.parametrize("options, call", MULTIHEAD.values(), ids=MULTIHEAD)
def test_multihead(options, call, request):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    training = "training" in request.node.name
    module.train(training)
    shapes = (2, 3, 8), (2, 5, options.get("kdim", 8)), (2, 5, options.get("vdim", 8))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    if not module.batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    seen = []

    def visit(block):
        assert block.module.training == training
        seen.append((block.maps(), block.values()))

    with attention_hooks(nn.Sequential(module), visit):
        module(query, key, value, **call)
    assert module.training == training
    ((maps, values),) = seen
    out = module.out_proj((maps @ values).transpose(1, 2).flatten(2))
    expected = module.eval()(query, key, value, **call)[0]
    torch.testing.assert_close(out if module.batch_first else out.transpose(0, 1), expected)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


def test_multihead_unbatched():
    module = nn.MultiheadAttention(8, 2)
    seen = []
    with attention_hooks(module, lambda block: seen.append((block.maps(), block.values()))):
        out, _ = module(*torch.randn(3, 5, 8))
    ((maps, values),) = seen
    assert maps.shape == (1, 2, 5, 5)
    torch.testing.assert_close(module.out_proj((maps @ values).transpose(1, 2).flatten(2))[0], out)


@pytest.mark.libraries
@skip_without_timm
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("call", [{}, {"is_causal": True}, {"attn_mask": torch.tril(torch.ones(5, 5)).bool()}])
def test_timm_attention(fused, call):
    torch.manual_seed(0)
    module = TimmAttention(8, 2, qkv_bias=True, qk_norm=True, gated=True, scale_norm=True, norm_layer=nn.LayerNorm)
    module.fused_attn = fused
    x, seen = torch.randn(2, 5, 8), []
    with attention_hooks(nn.Sequential(module), lambda block: seen.append((block.maps(), block.values()))):
        out = module(x, **call)
    ((maps, values),) = seen
    merged = module.norm((maps @ values).transpose(1, 2).flatten(2)) * module.gate(x).sigmoid()
    torch.testing.assert_close(module.proj(merged), out)


def test_half_precision_is_measured_in_float32():
    model = nn.Sequential(SelfAttention(8, 2), SelfAttention(8, 2)).bfloat16()
    measured = measure_attention(model, torch.randn(2, 5, 8).bfloat16(), ("softmax",))
    for tensor in (measured.blocks["softmax"], *measured.heads["softmax"], *measured.tokens["softmax"]):
        assert tensor.dtype == torch.float32
    assert measured.blocks["softmax"][0, 0].item() == pytest.approx(1.0, abs=1e-6)


def test_rollout_row_of_zeros_keeps_its_token():
    class Nothing(Synthetic):
        def attention_maps(self, x):
            return torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), -1.0)

    model = nn.Sequential(Nothing(None, None), Nothing(None, None))
    for arguments in ({"kind": "softmax"}, {"negative": "clamp"}):
        assert torch.equal(attention_rollout(model, torch.zeros(1), **arguments), torch.eye(4)[None])


def test_counts():
    matrix = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.6], [0.2, 0.6, 1.0]])
    assert similar_blocks(at_distances(matrix, (1, 2))) == {1: (1, 1 / 3), 2: (0, 0.0)}
    assert similar_heads(matrix) == (2, 2 / 3)
    assert similar_heads(matrix, 0.95) == (0, 0.0)
    assert similar_heads(torch.ones(1, 1)) == (0, 0.0)


def test_token_similarity():
    features = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]], [[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]])
    torch.testing.assert_close(token_similarity(features), torch.tensor([0.0, 1.0]))


def test_token_grid():
    assert (token_grid(nn.Identity(), 17).num_prefix_tokens, token_grid(nn.Identity(), 16).num_prefix_tokens) == (1, 0)
    grid = token_grid(MODELS["batch"](), 10)
    assert (grid.num_prefix_tokens, grid.height, grid.width) == (1, 3, 3)
    # Images of another size: the model's own grid does not fit.
    assert token_grid(MODELS["batch"](), 26).height == 5
    # Images of the model's own size: tokens went missing, and no smaller square is made up.
    assert token_grid(MODELS["batch"](), 5).height == 2
    with pytest.raises(ValueError, match=r"must make 5 tokens, got \(3, 3\) and 1"):
        token_grid(MODELS["batch"](), 5, input_size=(12, 12))
    assert token_grid(MODELS["batch"](), 26, input_size=(20, 20)).height == 5
    # A class token that joins later, but not where it was counted.
    assert token_grid(MODELS["batch"](), 9) == TokenGrid(0, 3, 3)
    with pytest.raises(ValueError, match="must make 9 tokens"):
        token_grid(MODELS["batch"](), 9, (3, 3), num_prefix_tokens=1)
    grid = token_grid(nn.Identity(), 8, grid_size=(2, 3), num_prefix_tokens=2)
    assert [grid.place(token) for token in (1, 2, 6, 8)] == [None, (0, 0), (1, 1), None]
    assert grid.to_image(torch.arange(8)).tolist() == [[2, 3, 4], [5, 6, 7]]


TWO = nn.Sequential(SelfAttention(8, 2), SelfAttention(8, 4))
X = torch.randn(1, 5, 8)
ERRORS = {
    "shapes": (lambda: similarity_matrix(TWO, X), r"maps of one shape .*\(1, 2, 5, 5\) in block 0 and \(1, 4, 5, 5\)"),
    "held": (lambda: similarity_matrix(TWO, X, held_blocks=0), "held_blocks must be positive, got 0"),
    "no-batch": (lambda: similarity_matrix(TWO, []), "at least one batch, got none"),
    "no-batch-heads": (lambda: head_similarity(TWO, []), "at least one batch, got none"),
    "no-image": (lambda: head_similarity(TWO, [X[:0]]), r"at least one image each, got a batch of shape \(0, 5, 8\)"),
    "no-tensor": (lambda: head_similarity(TWO, ["a"]), "batches must be a tensor, .*, got a batch of type str"),
    "kind": (lambda: head_similarity(TWO, X, "mixed"), "kind must be one of .*, got 'mixed'"),
    "kind-rollout": (lambda: attention_rollout(TWO, X, "mixed"), "kind must be one of .*, got 'mixed'"),
    "kind-query": (lambda: query_maps(TWO, X, kind="mixed"), "kind must be one of .*, got 'mixed'"),
    "kind-visit": (lambda: visit_attention_maps(TWO, X, print, "mixed"), "kind must be one of .*, got 'mixed'"),
    "distances": (lambda: at_distances(torch.eye(3), (1, 3)), r"smaller than the 3 blocks, got \[3\]"),
    "heads": (lambda: similar_heads(torch.ones(2, 3)), r"similarity must have shape \(heads, heads\), got \(2, 3\)"),
    "tokens": (lambda: token_similarity(torch.ones(1, 3)), r"two tokens or more, got \(1, 3\)"),
    "blocks": (lambda: feature_maps(TWO, X, blocks=(0, 7)), r"blocks must be indices .*, got \[7\]"),
    "query": (lambda: query_maps(TWO, X, query=5), "query must be a token, at least 0 and below 5, got 5"),
    "grid": (lambda: token_grid(nn.Identity(), 7), "must make 7 tokens, got None and None"),
    "given-grid": (lambda: token_grid(nn.Identity(), 5, (3, 3)), r"must make 5 tokens, got \(3, 3\)"),
    "negative": (lambda: attention_rollout(TWO, X, negative="no"), "negative must be one of .*, got 'no'"),
    "residual": (lambda: attention_rollout(TWO, X, residual=2.0), r"residual must be in \[0, 1\], got 2.0"),
    "below-zero": (
        lambda: attention_rollout(nn.Sequential(ReAttention(8, 2, backend="reference")), 9 * X, negative="raise"),
        "maps must not be negative with negative='raise', got -.* in block 0",
    ),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        call()


def test_rollout_needs_square_maps_of_one_size():
    class Sized(Synthetic):
        def attention_maps(self, x):
            return (torch.ones(1, 1, *self.alive),) * 2

    with pytest.raises(ValueError, match=r"maps must be square for a rollout, got \(1, 1, 3, 4\) in block 0"):
        attention_rollout(nn.Sequential(Sized((3, 4), None)), torch.zeros(1))
    with pytest.raises(ValueError, match="every block must have as many tokens, got 3, and 4 in block 1"):
        attention_rollout(nn.Sequential(Sized((3, 3), None), Sized((4, 4), None)), torch.zeros(1))
