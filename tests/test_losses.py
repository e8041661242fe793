"""``reattn.losses`` against code written from the definition, and what it holds at a time."""

import copy
import weakref

import documents
import pytest
import torch
import torch.nn.functional as F
from libraries import library
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from reattn import ReAttention
from reattn.losses import map_similarity
from reattn.models import DeepViT

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


def make_model(depth=4, dtype=torch.float64, **options):
    """With weights large enough for maps that differ by block."""
    torch.manual_seed(0)
    model = DeepViT(**SIZES, depth=depth, **options).to(dtype)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)
    return model


def images(dtype=torch.float64):
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


def naive_maps(attn, x):
    """The maps of an attention of DeepViT, from the formula."""
    batch, seqlen, _ = x.shape
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias).reshape(batch, seqlen, 3, attn.num_heads, -1)
    query, key = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    maps = (torch.einsum("bhid,bhjd->bhij", query, key) * attn.head_dim**-0.5).softmax(-1)
    if not isinstance(attn, ReAttention):
        return maps
    maps = torch.einsum("hg,bhij->bgij", attn.theta, maps)
    if attn.theta_bias is not None:
        maps = maps + attn.theta_bias[:, None, None]
    norm, maps = attn.head_norm, maps.to(torch.promote_types(maps.dtype, torch.float32))
    if isinstance(norm, nn.BatchNorm2d):
        # Without its running statistics.
        mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), unbiased=False, keepdim=True)
        maps = (maps - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    elif isinstance(norm, nn.LayerNorm):
        mean, var = maps.mean(1, keepdim=True), maps.var(1, unbiased=False, keepdim=True)
        maps = (maps - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    return maps * attn.output_scale


def naive(model, batch, pairs, dim):
    """Logits and similarity, all maps kept."""
    maps = []
    hooks = [
        block.norm1.register_forward_hook(lambda _, args, x, attn=block.attn: maps.append(naive_maps(attn, x)))
        for block in model.blocks
    ]
    logits = model(batch)
    for hook in hooks:
        hook.remove()
    cosines = []
    for first, second in zip(maps[:pairs], maps[1:], strict=False):
        cosines.append((first * second).sum(dim) / (first.norm(dim=dim) * second.norm(dim=dim)))
    return logits, torch.stack(cosines).mean()


def watched(model, batch, pairs=None, dim=1):
    with map_similarity(model, pairs, dim) as similarity:
        logits = model(batch)
    return logits, similarity()


def step(function, model, batch, *arguments):
    """What one step of training leaves: loss, gradients and buffers."""
    batch = batch.clone().requires_grad_()
    logits, similarity = function(model, batch, *arguments)
    # Large enough to stand out.
    (F.cross_entropy(logits.float(), torch.arange(4)) + 3 * similarity).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"similarity": similarity.detach(), "images": batch.grad, **gradients, **dict(model.named_buffers())}


def assert_same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = tensor.double().abs().max().item()
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance * max(size, 1e-3), check_dtype=False, msg=f"{name} differs"
        )


MODELS = {
    "batch": {},
    "plain blocks first": {"re_attention_blocks": 2, "output_scale": 0.3, "residual_scale": 0.5},
    "layer": {"norm": "layer"},
    "no norm": {"norm": None},
    "plain": {"attention": "self"},
}


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("pairs", [1, 2, None])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_equals_the_definition(options, pairs, dim):
    """Value, gradients of every parameter and of the images, and the batch counted once."""
    model = make_model(**options)
    found = step(watched, copy.deepcopy(model), images(), pairs, dim)
    expected = step(naive, model, images(), pairs, dim)
    assert_same(found, expected)
    tracked = [int(tensor) for name, tensor in found.items() if name.endswith("num_batches_tracked")]
    assert all(count == 1 for count in tracked)


def test_reaches_what_makes_the_maps():
    """Gradients of the similarity alone: in the last pair's block, theta, the norm and query and key, not value."""
    model = make_model(depth=3)
    _, similarity = watched(model, images(), pairs=1)
    similarity.backward()
    attn = model.blocks[1].attn
    assert attn.theta.grad.abs().max() > 1e-4 and attn.head_norm.weight.grad.abs().max() > 1e-4
    query, key, value = attn.qkv.weight.grad.chunk(3)
    assert query.abs().max() > 1e-6 and key.abs().max() > 1e-6 and value.abs().max() == 0
    assert model.blocks[1].attn.proj.weight.grad is None and model.blocks[2].norm1.weight.grad is None
    assert model.cls_token.grad.abs().max() > 1e-6


def test_the_official_loss():
    """SoftTargetCrossEntropyCosReg(n_comn=2): cosines over dimension 1 added up, mean, over n_comn."""
    model = make_model()
    cosine = nn.CosineSimilarity(dim=1)
    maps = []
    hooks = [block.attn.head_norm.register_forward_hook(lambda *args: maps.append(args[2])) for block in model.blocks]
    model(images())
    for hook in hooks:
        hook.remove()
    expected = sum(cosine(maps[i], maps[i + 1]) for i in range(2)).mean() / 2
    torch.testing.assert_close(watched(model, images(), pairs=2)[1], expected, rtol=1e-12, atol=0)


def test_checkpointing():
    """This package's and torch's own: gradients and running statistics of a step without it."""
    model = make_model()
    expected = step(naive, copy.deepcopy(model), images(), 3, 1)
    ours = copy.deepcopy(model)
    ours.set_grad_checkpointing()
    assert_same(step(watched, ours, images(), 3, 1), expected)

    def of_torch(model, batch):
        with map_similarity(model) as similarity:
            return checkpoint(model, batch, use_reentrant=False), similarity()

    assert_same(step(of_torch, model, images()), expected)


def test_gradients_that_were_disabled():
    """By activation checkpointing of the reentrant kind the maps would have no gradients."""
    model = make_model()
    batch = images().requires_grad_()
    with map_similarity(model) as similarity:
        checkpoint(model, batch, use_reentrant=True)
        with pytest.raises(RuntimeError, match="blocks.0.attn ran without gradients; .* use_reentrant=False"):
            similarity()
    with torch.no_grad():
        assert not watched(model, images())[1].requires_grad
    with torch.inference_mode():
        assert watched(model, images())[1].isfinite()


class LiveMaps(TorchDispatchMode):
    """The most elements that tensors of seqlen x seqlen have held at a time."""

    def __init__(self, seqlen):
        super().__init__()
        self.seqlen, self.live, self.peak, self.known = seqlen, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else [results]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (self.seqlen, self.seqlen):
                self.count(tensor.untyped_storage())
        return results

    def count(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address, size):
        self.known.discard(address)
        self.live -= size


def peak_of(depth, function, norm):
    """Stored maps (batch, heads, seqlen, seqlen): at the forward pass's peak, after it, and at the backward pass's."""
    model = make_model(depth, torch.float32, norm=norm, backend="cpu")
    one = images().shape[0] * 3 * 17 * 17 * 4
    with LiveMaps(17) as live:
        logits, similarity = function(model, images(torch.float32), depth - 1, 1)
        forward, held = live.peak / one, live.live / one
        live.peak = 0
        (logits.sum() + similarity).backward()
    return forward, held, live.peak / one


@pytest.mark.extension
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_two_blocks_maps_at_a_time(norm):
    """The same at any depth, in both passes, and none between them; the definition's grow with it."""
    forward, held, backward = peak_of(7, watched, norm)
    assert (forward, held, backward) == peak_of(3, watched, norm) and held == 0
    # A block's own steps, softmax to norm, and its neighbour's maps; on the way back both blocks' and gradients.
    assert forward <= 6 and backward <= 15
    assert peak_of(7, naive, norm)[1] >= peak_of(3, naive, norm)[1] + 3 * 4


def test_autocast():
    """The maps have the dtype of the forward pass, wherever the similarity is asked for."""
    batch = images(torch.float32)

    def inside(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return watched(model, batch)

    def outside(model, batch):
        with map_similarity(model) as similarity, torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        return logits, similarity()

    def eager(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return naive(model, batch, 3, 1)

    ways = (inside, outside, eager)
    found, same, expected = (step(way, make_model(dtype=torch.float32), batch) for way in ways)
    assert_same(found, same, 0)
    assert found["similarity"].dtype == torch.float32
    exact = step(naive, make_model(), images(), 3, 1)
    for name in ("similarity", "blocks.1.attn.theta", "blocks.0.attn.qkv.weight", "blocks.3.norm1.weight", "pos_embed"):
        # Nearer to eager code's roundings, whose order differs, than those are to the exact value.
        size = expected[name].norm()
        assert (found[name] - expected[name]).norm() < 0.05 * size < (expected[name] - exact[name]).norm(), name


def test_masks_and_their_gradients():
    """A learned bias of the scores gets the gradient of every block's maps."""
    model = make_model(attention="self")
    found, expected = (torch.zeros(1, 3, 17, 17, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        found[..., 5] = expected[..., 5] = float("-inf")
    with map_similarity(model, dim=2) as similarity:
        model(images(), attn_mask=found)
    similarity().backward()
    x, maps = model._embed(images())[0], []
    for block in model.blocks:
        query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        maps.append((query @ key.mT * 8**-0.5 + expected).softmax(-1))
        x = block(x, attn_mask=expected)
    cosines = [F.cosine_similarity(*neighbours, dim=2).mean() for neighbours in zip(maps, maps[1:], strict=False)]
    (sum(cosines) / 3).backward()
    assert expected.grad.abs().max() > 1e-4
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_multihead_attention():
    """torch's own layers, called with the same tensor three times."""
    layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    with map_similarity(model) as similarity:
        model(x)
    similarity().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    tokens, maps = x, []
    for block in model.layers:
        maps.append(block.self_attn(tokens, tokens, tokens, average_attn_weights=False)[1])
        tokens = block(tokens)
    (sum(F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(maps, maps[1:], strict=False)) / 2).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        if parameter.grad is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_parts_that_are_frozen():
    """The first blocks frozen: the others' gradients are as they were."""
    model = make_model()
    expected = step(watched, copy.deepcopy(model), images())
    for block in model.blocks[:2]:
        block.requires_grad_(False)
    found = step(watched, model, images())
    frozen = [name for name, gradient in found.items() if gradient is None]
    assert frozen and all(name.startswith(("blocks.0.", "blocks.1.")) for name in frozen)
    assert_same({n: g for n, g in found.items() if n not in frozen}, {n: expected[n] for n in found if n not in frozen})
    model.requires_grad_(False)
    assert not watched(model, images())[1].requires_grad


def test_a_batch_of_no_images():
    model = make_model(norm="layer")
    _, similarity = watched(model, images()[:0])
    similarity.backward()
    assert similarity == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_an_attention_that_runs_twice():
    """It has the gradients of both."""
    model = make_model()
    model.blocks[2].attn = model.blocks[0].attn
    assert_same(step(watched, copy.deepcopy(model), images()), step(naive, model, images(), 3, 1))


def test_micro_batches_in_one_context():
    model = make_model(norm="layer")
    with map_similarity(model) as similarity:
        values = []
        for part in images().split(2):
            model(part)
            values.append(similarity())
    torch.testing.assert_close(sum(values) / 2, watched(model, images())[1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_compiled():
    """What is compiled around attentions is refused by name; what is beside them is not."""
    model = make_model(depth=2, attention="self")
    expected = watched(model, images())[1]
    with pytest.raises(
        ValueError, match="model must not be compiled around attentions, got .*OptimizedModule at model"
    ):
        watched(torch.compile(model, backend="eager"), images())
    in_part = copy.deepcopy(model)
    in_part.blocks[1].mlp.compile(backend="eager")
    torch.testing.assert_close(watched(in_part, images())[1], expected)
    in_part.blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"got reattn.models.deepvit.Block at blocks.1"):
        watched(in_part, images())
    # Where it cannot be seen: it runs without hooks.
    forward = torch.compile(lambda batch: model(batch), backend="eager")
    forward(images())
    with map_similarity(model) as similarity:
        forward(images())
        with pytest.raises(RuntimeError, match="in which 2 attentions ran, got 0"):
            similarity()


@pytest.mark.parametrize(
    ("error", "message", "use"),
    [
        (TypeError, "model must be a torch.nn.Module, got list", lambda: watched([], images())),
        (ValueError, "model must hold modules with a method", lambda: watched(nn.Linear(2, 2), images())),
        (ValueError, "model must hold at least two attentions", lambda: watched(make_model(1), images())),
        (ValueError, r"pairs must lie in \[1, 3\] for 4 attentions, got 4", lambda: watched(make_model(), images(), 4)),
        (ValueError, r"pairs must lie in \[1, 3\] for 4 attentions, got 0", lambda: watched(make_model(), images(), 0)),
        (TypeError, "pairs must be None or an int, got bool", lambda: watched(make_model(), images(), True)),
        (ValueError, "dim must be 1, over the heads, or 2, .*, got -2", lambda: watched(make_model(), images(), 1, -2)),
        (ValueError, "got .*DataParallel at model", lambda: watched(nn.DataParallel(make_model()), images())),
    ],
)
def test_errors_name_the_argument(error, message, use):
    with pytest.raises(error, match=message):
        use()


def test_misuse_is_refused():
    model = make_model()
    with map_similarity(model) as similarity:
        with pytest.raises(RuntimeError, match="in which 4 attentions ran, got 0"):
            similarity()
        model(images())
        with pytest.raises(RuntimeError, match="got a second one first"):
            model(images())
        similarity()
        with pytest.raises(RuntimeError, match="called once after a forward pass"):
            similarity()
        kept = []
        model.blocks[1].norm1.register_forward_hook(lambda _, args, output: kept.append(output))
        model(images())
        with torch.no_grad():
            kept[0].add_(1)
        with pytest.raises(RuntimeError, match="inputs, parameters and mode of blocks.1.attn must stay"):
            similarity()
    changed = [
        lambda model: model.blocks[0].attn.theta.add_(1),
        lambda model: model.blocks[3].eval(),
        lambda model: setattr(model.blocks[2].attn, "theta", nn.Parameter(torch.eye(3).double())),
    ]
    for change in changed:
        model = make_model()
        _, value = watched(model, images())
        with map_similarity(model) as similarity:
            model(images())
        with torch.no_grad():
            change(model)
        for call in (similarity, value.backward):
            with pytest.raises(RuntimeError, match="parameters and mode of blocks\\.[023]\\.attn must stay"):
                call()
    with map_similarity(model) as similarity:
        torch.func.functional_call(model, {"blocks.1.attn.theta": torch.eye(3).double()}, images())
        with pytest.raises(RuntimeError, match="blocks.1.attn must stay"):
            similarity()
    other = make_model()
    other.blocks[2].attn = ReAttention(24, 2).double()
    with pytest.raises(ValueError, match=r"\(4, 3, 17, 17\) in blocks.1.attn and \(4, 2, 17, 17\) in blocks.2.attn"):
        watched(other, images())
    _, value = watched(model, images())
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(value, model.cls_token, create_graph=True)


@pytest.mark.libraries
def test_vit_of_timm():
    timm = library("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=4).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = watched(model, x)[1]
    found.backward()
    gradient = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    maps, tokens = [], model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks:
        query, key, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
        maps.append((query @ key.mT / 8).softmax(-1))
        tokens = block(tokens)
    expected = sum(F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(maps, maps[1:], strict=False)) / 2
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, model.blocks[0].attn.qkv.weight.grad, rtol=1e-9, atol=1e-12)


def test_the_loop_in_the_documents():
    """The code of docs/training.md, with a smaller model."""
    blocks = documents.blocks("docs/training.md", "The similarity of maps as a loss")
    batch = [(images(torch.float32), torch.arange(4))] * 2
    model = make_model(depth=3, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    documents.run(blocks, {"pairs=12": "pairs=2"}, batches=batch, model=model, optimizer=optimizer)
    assert not torch.equal(model.blocks[0].attn.theta, before["blocks.0.attn.theta"])
