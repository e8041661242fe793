"""Similarity of attention maps: against a loop over numpy columns, and that measuring a model leaves no trace."""

import copy
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from reattn.analysis import block_similarity, column_similarity, similar_blocks, visit_attention_maps
from reattn.models import DeepViT

MODELS = [
    pytest.param({"norm": "batch"}, id="batch"),
    pytest.param({"norm": "layer"}, id="layer"),
    pytest.param({"norm": None}, id="none"),
    pytest.param({"re_attention_blocks": 2}, id="last-two-blocks"),
    pytest.param({"attention": "self"}, id="self"),
]


def build(**overrides) -> DeepViT:
    """A small DeepViT, in train mode, whose maps are far from uniform and whose running statistics are its own."""
    torch.manual_seed(0)
    config = {"img_size": 12, "patch_size": 4, "embed_dim": 12, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = DeepViT(**{**config, "backend": "reference", "dtype": torch.float64, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model(random_images(dtype=next(model.parameters()).dtype) + 0.5)
    return model


def random_images(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=dtype)


def collect_maps(model: nn.Module, images: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """Every block's maps, kept, from the outputs of the norms that feed the attentions."""
    model = copy.deepcopy(model).eval()
    inputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda module, args, output: inputs.append(output))
    with torch.no_grad():
        model(images)
    choice = ("softmax", "re_attention").index(kind)
    with torch.no_grad():
        return [block.attn.attention_maps(x)[choice] for block, x in zip(model.blocks, inputs, strict=True)]


def slow_similarity(maps_p: torch.Tensor, maps_q: torch.Tensor) -> float:
    p, q = maps_p.double().numpy(), maps_q.double().numpy()
    batch, heads, _, tokens = p.shape
    cosines = []
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                x, y = p[b, h, :, t], q[b, h, :, t]
                cosines.append((x @ y) / np.sqrt((x @ x) * (y @ y)))
    return float(np.mean(cosines))


class FixedMaps(nn.Module):
    """An attention that changes nothing and has the maps it was given."""

    def __init__(self, softmax_maps, re_attention_maps):
        super().__init__()
        self.maps = softmax_maps, re_attention_maps

    def forward(self, x):
        return x

    def attention_maps(self, x):
        return self.maps


@pytest.mark.parametrize("kind", ["re_attention", "softmax"])
@pytest.mark.parametrize("overrides", MODELS)
def test_against_loop(overrides, kind):
    model, images = build(**overrides), random_images()
    maps = collect_maps(model, images, kind)
    similarities = block_similarity(model, images, distances=(1, 3, 2), kind=kind)
    assert list(similarities) == [1, 3, 2]
    for distance, similarity in similarities.items():
        expected = [slow_similarity(maps[p], maps[p + distance]) for p in range(4 - distance)]
        assert similarity.dtype == torch.float64
        np.testing.assert_allclose(similarity.numpy(), expected, rtol=1e-12)


def test_default_is_what_multiplies_the_values():
    model, images = build(), random_images()
    default = block_similarity(model, images)
    assert list(default) == [1]
    assert torch.equal(default[1], block_similarity(model, images, kind="re_attention")[1])
    assert not torch.allclose(default[1], block_similarity(model, images, kind="softmax")[1])


def test_visits_blocks_in_order_with_their_maps():
    model, images = build(), random_images()
    visited: list[torch.Tensor] = []
    visit_attention_maps(model, images, visited.append)
    expected = collect_maps(model, images, "re_attention")
    assert len(visited) == len(expected)
    for maps, wanted in zip(visited, expected, strict=True):
        torch.testing.assert_close(maps, wanted)
        assert not maps.requires_grad


@pytest.mark.parametrize("overrides", MODELS)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_leaves_no_trace(overrides, fails):
    model = build(attn_drop_rate=0.1, drop_path_rate=0.1, **overrides)
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()

    def visit(maps):
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            visit_attention_maps(model, random_images(), visit)
    else:
        visit_attention_maps(model, random_images(), visit)

    assert [module.training for module in model.modules()] == modes
    assert True in modes and False in modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_measures_in_eval_mode():
    model, images = build(attn_drop_rate=0.5), random_images()
    assert torch.equal(block_similarity(model, images)[1], block_similarity(copy.deepcopy(model).eval(), images)[1])


def test_compiled_model():
    model, images = build(), random_images()
    expected = block_similarity(model, images)[1]
    compiled = torch.compile(model.eval(), backend="eager")
    # What is compiled here could serve the measuring forward too, and knows nothing of hooks.
    with torch.no_grad():
        compiled(images)
    assert torch.equal(block_similarity(compiled, images)[1], expected)


@pytest.mark.parametrize("distance", [1, 3])
def test_holds_no_more_maps_than_the_distance_needs(distance):
    alive: weakref.WeakSet = weakref.WeakSet()
    held = []

    class Counting(FixedMaps):
        def attention_maps(self, x):
            held.append(len(alive))
            maps = torch.rand(2, 3, 5, 5)
            alive.add(maps)
            return maps, maps

    model = nn.Sequential(*[Counting(None, None) for _ in range(9)])
    block_similarity(model, torch.zeros(1), distances=(distance,))
    assert held == [min(block, distance) for block in range(9)]
    assert not alive


def test_identical_maps_give_one():
    maps = torch.rand(2, 3, 7, 7).softmax(-1)
    model = nn.Sequential(*[FixedMaps(torch.rand(2, 3, 7, 7), maps) for _ in range(3)])
    for similarity in block_similarity(model, torch.zeros(1), distances=(1, 2)).values():
        torch.testing.assert_close(similarity, torch.ones_like(similarity))


def test_orthogonal_columns_give_zero():
    first, second = torch.zeros(2, 1, 2, 4, 6)
    first[..., :2, :] = torch.rand(1, 2, 2, 6)
    second[..., 2:, :] = torch.rand(1, 2, 2, 6)
    model = nn.Sequential(FixedMaps(second, first), FixedMaps(second, second))
    assert block_similarity(model, torch.zeros(1))[1].tolist() == [0.0]
    torch.testing.assert_close(block_similarity(model, torch.zeros(1), kind="softmax")[1], torch.ones(1))


def test_columns_not_rows():
    maps_p = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    maps_q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert column_similarity(maps_p, maps_q).tolist() == [1.0, 0.0]
    assert column_similarity(-maps_p, maps_q).tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    maps_p, maps_q = (20 * torch.rand(2, 1, 2, 50, 40)).softmax(-1).to(dtype)
    similarity = column_similarity(maps_p, maps_q)
    assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert similarity.shape == (1, 2, 40)
    torch.testing.assert_close(
        similarity.double(), column_similarity(maps_p.double(), maps_q.double()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("factor", [1e-18, 1e-12, 1e12])
def test_cosine_does_not_depend_on_magnitude(factor):
    maps_p, maps_q = torch.rand(2, 2, 3, 9, 9)
    torch.testing.assert_close(column_similarity(factor * maps_p, maps_q), column_similarity(maps_p, maps_q))


@pytest.mark.parametrize("smallest", [0.0, 1e-30, 1e-45])
def test_columns_without_weight_give_zero(smallest):
    maps = torch.rand(4, 3)
    maps[:, 1] = smallest
    similarity = column_similarity(maps, maps)
    torch.testing.assert_close(similarity, torch.tensor([1.0, 0.0, 1.0]))


def test_similar_blocks():
    similarities = {1: torch.tensor([0.9, 0.8, 0.81, 0.1]), 2: torch.tensor([0.5, 0.2, 0.85])}
    threshold = float(similarities[1][1])
    assert similar_blocks(similarities, threshold) == {1: (2, 2 / 5), 2: (1, 1 / 5)}
    assert similar_blocks(similarities, 0.95) == {1: (0, 0.0), 2: (0, 0.0)}
    assert similar_blocks(similarities, threshold=-1.0) == {1: (4, 4 / 5), 2: (3, 3 / 5)}
    assert similar_blocks({3: torch.tensor([0.79])}) == {3: (0, 0.0)}
    assert similar_blocks({3: torch.tensor([0.81])}) == {3: (1, 1 / 4)}


@pytest.mark.parametrize(
    "call, message",
    [
        pytest.param(
            lambda: column_similarity(torch.rand(2, 3), torch.rand(1, 3)),
            r"maps_p and maps_q must have one shape .*, got \(2, 3\) and \(1, 3\)",
            id="shapes",
        ),
        pytest.param(
            lambda: column_similarity(torch.rand(3), torch.rand(3)), r"got \(3,\) and \(3,\)", id="no-matrices"
        ),
        pytest.param(
            lambda: block_similarity(build(), random_images(), distances=(1, 4)),
            r"distances must be smaller than the number of attention blocks, got \(1, 4\)",
            id="too-far",
        ),
        pytest.param(
            lambda: block_similarity(build(), random_images(), distances=(0, 1)),
            r"distances must be positive ints, at least one, got \(0, 1\)",
            id="distance-zero",
        ),
        pytest.param(
            lambda: block_similarity(build(), random_images(), distances=()),
            r"distances must be positive ints, at least one, got \(\)",
            id="no-distance",
        ),
        pytest.param(
            lambda: block_similarity(build(), random_images(), kind="mixed"),
            r"kind must be one of \('re_attention', 'softmax'\), got 'mixed'",
            id="kind",
        ),
        pytest.param(
            lambda: block_similarity(nn.Linear(3, 3), torch.rand(3)),
            r"model must hold modules with a method attention_maps, .*, got none in Linear",
            id="no-attention",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_needs_no_plotting_library():
    code = "import sys; sys.modules['matplotlib'] = sys.modules['sklearn'] = None; import reattn.analysis"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
