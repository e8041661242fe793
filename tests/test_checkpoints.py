"""Whole checkpoints of the official code and of vit_pytorch, from independent re-implementations of both."""

import argparse
import contextlib
import gzip
import io
import logging
import os
import random
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import einsum, nn

from reattn import ReAttention
from reattn.checkpoints import (
    from_vit_pytorch,
    load_checkpoint,
    read_checkpoint,
    select_state_dict,
    to_official,
    to_vit_pytorch,
)
from reattn.models import DeepViT

DIM, HEADS, DEPTH, CLASSES, PATCH, SIZE = 24, 3, 3, 5, 8, 32


class OfficialAttention(nn.Module):
    """The official attention, materialised: a 1x1 convolution and a BatchNorm2d on the maps."""

    def __init__(self, mixes: bool, output_scale: float):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mixes, self.output_scale = mixes, output_scale
        if mixes:
            self.reatten_matrix = nn.Conv2d(HEADS, HEADS, 1)
            self.var_norm = nn.BatchNorm2d(HEADS)

    def forward(self, x):
        batch, seqlen, _ = x.shape
        query, key, value = self.qkv(x).view(batch, seqlen, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        maps = torch.softmax(query @ key.transpose(2, 3) / (DIM // HEADS) ** 0.5, dim=3)
        if self.mixes:
            maps = self.var_norm(self.reatten_matrix(maps)) * self.output_scale
        return self.proj((maps @ value).permute(0, 2, 1, 3).reshape(batch, seqlen, DIM))


class OfficialBlock(nn.Module):
    def __init__(self, mixes: bool, output_scale: float, residual_scale: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn = OfficialAttention(mixes, output_scale)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(DIM, 3 * DIM), "fc2": nn.Linear(3 * DIM, DIM)})
        self.s = residual_scale

    def forward(self, x):
        x = x + self.attn(self.norm1(x * self.s)) / self.s
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x * self.s)))) / self.s


class OfficialDeepViT(nn.Module):
    def __init__(self, conv_stem=False, mixing=(True,) * DEPTH, output_scale=1.0, residual_scale=1.0, classes=CLASSES):
        super().__init__()
        self.patch_embed = nn.ModuleDict()
        if conv_stem:
            self.patch_embed["conv1"] = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.patch_embed["bn1"] = nn.BatchNorm2d(64)
            self.patch_embed["conv2"] = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
            self.patch_embed["bn2"] = nn.BatchNorm2d(64)
            self.patch_embed["proj"] = nn.Conv2d(64, DIM, PATCH // 2, PATCH // 2)
        else:
            self.patch_embed["proj"] = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIZE // PATCH) ** 2, DIM))
        self.blocks = nn.Sequential(*(OfficialBlock(mixes, output_scale, residual_scale) for mixes in mixing))
        self.norm, self.head = nn.LayerNorm(DIM, eps=1e-6), nn.Linear(DIM, classes)

    def forward(self, x):
        stem = self.patch_embed
        if "conv1" in stem:
            x = stem["bn1"](stem["conv1"](x)).relu()
            x = stem["bn2"](stem["conv2"](x)).relu()
        patches = stem["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.repeat(len(x), 1, 1), patches), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class SecondFormAttention(nn.Module):
    """vit_pytorch's attention, materialised: einsum and a LayerNorm over the heads."""

    def __init__(self, dim_head: int, inner_norm: bool):
        super().__init__()
        if inner_norm:
            self.norm = nn.LayerNorm(DIM)
        self.dim_head = dim_head
        self.to_qkv = nn.Linear(DIM, 3 * HEADS * dim_head, bias=False)
        self.reattn_weights = nn.Parameter(torch.randn(HEADS, HEADS))
        self.reattn_norm = nn.Sequential(nn.Identity(), nn.LayerNorm(HEADS))
        self.to_out = nn.Sequential(nn.Linear(HEADS * dim_head, DIM))

    def forward(self, x):
        x = self.norm(x) if hasattr(self, "norm") else x
        query, key, value = (t.unflatten(2, (HEADS, self.dim_head)) for t in self.to_qkv(x).chunk(3, dim=2))
        maps = einsum("bihd,bjhd->bhij", query, key).mul(self.dim_head**-0.5).softmax(3)
        mixed = self.reattn_norm(einsum("bhij,hg->bijg", maps, self.reattn_weights))
        return self.to_out(einsum("bijg,bjgd->bigd", mixed, value).flatten(2))


class Wrapper(nn.Module):
    """``fn``, as the earlier revisions wrap it: for the key alone, or with a LayerNorm in front."""

    def __init__(self, fn: nn.Module, with_norm: bool):
        super().__init__()
        self.fn = fn
        if with_norm:
            self.norm = nn.LayerNorm(DIM)

    def forward(self, x):
        return self.fn(self.norm(x) if hasattr(self, "norm") else x)


class SecondFormDeepViT(nn.Module):
    def __init__(self, dim_head: int = 8, hidden: int = 40, revision: str = "inner norms", pool: str = "cls"):
        super().__init__()
        self.pool = pool
        inner, pixels = revision == "inner norms", 3 * PATCH**2
        linear, norms = nn.Linear(pixels, DIM), (nn.LayerNorm(pixels), nn.LayerNorm(DIM))
        embedding = (norms[0], linear, norms[1]) if inner else (linear,)
        self.to_patch_embedding = nn.Sequential(nn.Identity(), *embedding)
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1 + (SIZE // PATCH) ** 2, DIM))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList()
        for _ in range(DEPTH):
            branches = [SecondFormAttention(dim_head, inner), nn.Module()]
            feed_forward = [nn.Linear(DIM, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, DIM)]
            branches[1] = nn.ModuleDict({"net": nn.Sequential(*[nn.LayerNorm(DIM)] * inner, *feed_forward)})
            branches[1].forward = branches[1]["net"].forward
            if revision == "wrapped once":
                branches = [Wrapper(branch, True) for branch in branches]
            elif revision == "wrapped twice":
                branches = [Wrapper(Wrapper(branch, True), False) for branch in branches]
            self.transformer.layers.append(nn.ModuleList(branches))
        self.mlp_head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def forward(self, x):
        side = SIZE // PATCH
        pixels = x.reshape(len(x), 3, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = torch.cat((self.cls_token.repeat(len(x), 1, 1), self.to_patch_embedding(pixels)), 1) + self.pos_embedding
        for attention, feed_forward in self.transformer.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return self.mlp_head(x[:, 0] if self.pool == "cls" else x.mean(1))


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                random = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(0.5 + random if name.endswith("var") else random)
    return model


def ours(**overrides) -> DeepViT:
    torch.manual_seed(1)
    config = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "num_classes": CLASSES,
        "embed_dim": DIM,
        "depth": DEPTH,
        "num_heads": HEADS,
    }
    return DeepViT(**{**config, **overrides})


def images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.fixture
def official() -> OfficialDeepViT:
    return randomized(OfficialDeepViT())


PRECISIONS = [
    pytest.param(torch.float64, 1e-11, id="float64"),
    pytest.param(torch.float32, 1e-4, id="float32"),
]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("conv_stem", [False, True], ids=["patch", "stem"])
def test_official_model(conv_stem, training, dtype, tolerance):
    source = OfficialDeepViT(conv_stem, (False, True, True), output_scale=0.35, residual_scale=0.5)
    source = randomized(source).to(dtype).train(training)
    model = ours(conv_stem=conv_stem, re_attention_blocks=2, output_scale=0.35, residual_scale=0.5, dtype=dtype)
    model.train(training)
    report = load_checkpoint(model, source.state_dict())
    assert (report.source, report.layout, report.resampled_pos_embed, report.head_kept) == ("", "official", None, False)
    assert not (report.missing or report.unexpected or report.mismatched)

    x = images(dtype)
    torch.testing.assert_close(model(x), source(x), rtol=tolerance, atol=tolerance)
    statistics = to_official(model.state_dict())
    for key, expected in source.state_dict().items():
        torch.testing.assert_close(statistics[key], expected, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("revision", ["inner norms", "wrapped once", "wrapped twice"])
def test_second_form_model(revision, training, dtype, tolerance):
    source = randomized(SecondFormDeepViT(dim_head=5, hidden=40, revision=revision)).to(dtype).train(training)
    model = ours(
        norm="layer",
        qkv_bias=False,
        attn_head_dim=5,
        mlp_ratio=40 / DIM,
        layer_norm_eps=1e-5,
        patch_norm=revision == "inner norms",
        dtype=dtype,
    ).train(training)
    report = load_checkpoint(model, source.state_dict())
    assert report.layout == "vit_pytorch" and not (report.missing or report.unexpected or report.mismatched)
    torch.testing.assert_close(model(images(dtype)), source(images(dtype)), rtol=tolerance, atol=tolerance)


def test_load_state_dict_alone_takes_the_official_layout(official):
    model = ours().double()
    model.load_state_dict(official.state_dict())
    torch.testing.assert_close(model.eval()(images()), official.double().eval()(images()), rtol=1e-11, atol=1e-11)


def test_own_layout_and_to_official_round_trip(official):
    model = ours()
    load_checkpoint(model, official.state_dict())
    exported = to_official(model.state_dict())
    assert exported.keys() == official.state_dict().keys()
    official.load_state_dict(exported)
    again = ours()
    assert load_checkpoint(again, model.state_dict()).layout == "reattn"
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with pytest.raises(ValueError, match='norm="batch" only, got blocks.0.attn.head_norm.weight'):
        to_official(ours(norm="layer").state_dict())
    with pytest.raises(ValueError, match="no mixing before the softmax, got blocks.0.attn.pre_theta"):
        to_official(ours(pre_mix=True).state_dict())


def write(path, contents):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(contents, path)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=path.suffix != ".tar")


@pytest.mark.parametrize("name", ["model.pth", "legacy.pth.tar", "model.safetensors"])
@pytest.mark.parametrize("as_text", [True, False], ids=["str", "path"])
def test_files(tmp_path, official, name, as_text):
    path = tmp_path / name
    write(path, dict(official.state_dict()))
    model = ours().eval()
    load_checkpoint(model, str(path) if as_text else path)
    torch.testing.assert_close(model.double()(images()), official.double().eval()(images()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_checkpoint(tmp_path, official, prefix):
    plain = {prefix + key: torch.zeros_like(tensor) for key, tensor in official.state_dict().items()}
    average = {prefix + key: torch.ones_like(tensor) for key, tensor in official.state_dict().items()}
    optimizer = torch.optim.AdamW(official.parameters()).state_dict()
    path = tmp_path / "checkpoint.pth.tar"
    options = argparse.Namespace(model="deepvit_S", lr=5e-4)
    torch.save(
        {
            "epoch": 3,
            "arch": "deepvit_S",
            "state_dict": plain,
            "optimizer": optimizer,
            "args": options,
            "state_dict_ema": average,
            "metric": 82.3,
        },
        path,
    )
    model = ours()
    assert load_checkpoint(model, path).source == "state_dict_ema"
    assert (model.head.weight == 1).all() and (model.blocks[2].attn.theta == 1).all()
    assert load_checkpoint(model, path, prefer_ema=False).source == "state_dict"
    assert (model.head.weight == 0).all() and (model.blocks[2].attn.head_norm.running_var == 0).all()


@pytest.mark.parametrize(
    "entry",
    ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model", "model_state_dict", "module"],
)
@pytest.mark.parametrize("prefer_ema", [True, False])
def test_the_only_entry_is_taken(official, entry, prefer_ema):
    source, state_dict = select_state_dict({"epoch": 1, entry: official.state_dict()}, prefer_ema)
    assert source == entry and state_dict.keys() == official.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize(("img_size", "other"), [((32, 64), 48), ((64, 32), 32), ((224, 256), 224)])
def test_rectangular_grids_are_not_taken_for_square_ones(img_size, other):
    """Of 2 x 4 patches and a class token there are as many positions as of 3 x 3 patches without one."""
    sizes = {"patch_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 2}
    state_dict = DeepViT(img_size, **sizes).state_dict()
    with pytest.raises(RuntimeError, match="shape: pos_embed must be"):
        load_checkpoint(DeepViT(other, **sizes), state_dict)


def test_positions_of_224_in_a_model_of_384():
    torch.manual_seed(0)
    source = ours(img_size=224, patch_size=16, depth=1)
    model = ours(img_size=384, patch_size=16, depth=1)
    report = load_checkpoint(model, source.state_dict())
    assert report.resampled_pos_embed == ((14, 14), (24, 24))
    grid = source.pos_embed[:, 1:].reshape(1, 14, 14, DIM).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (24, 24), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 576, DIM)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    source.set_input_size(384)
    x = torch.randn(1, 3, 384, 384)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_positions_that_cannot_be_resampled_are_named():
    model = ours()
    state_dict = ours(img_size=(32, 24)).state_dict()
    with pytest.raises(RuntimeError, match=r"shape: pos_embed must be \(1, 17, 24\), got \(1, 13, 24\)"):
        load_checkpoint(model, state_dict)


@pytest.mark.parametrize("num_classes", [7, 0])
def test_other_class_count_leaves_the_head(official, num_classes, caplog):
    model = ours(num_classes=num_classes)
    before = {key: tensor.clone() for key, tensor in model.head.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="reattn"):
        report = load_checkpoint(model, official.state_dict())
    assert report.head_kept and not (report.missing or report.unexpected or report.mismatched)
    assert [record.getMessage() for record in caplog.records] == [
        f"the checkpoint's head counts 5 classes, the model's {num_classes}: the head is left as it was"
    ]
    for key, tensor in before.items():
        assert torch.equal(model.head.state_dict()[key], tensor)
    assert torch.equal(model.norm.weight, official.norm.weight)


def test_every_misfit_is_named_and_nothing_is_loaded(official):
    state_dict = official.state_dict()
    del state_dict["blocks.1.mlp.fc2.bias"]
    del state_dict["cls_token"]
    state_dict["dist_token"] = torch.zeros(1, 1, DIM)
    state_dict["blocks.7.attn.reatten_matrix.bias"] = torch.zeros(HEADS)
    state_dict["blocks.0.attn.reatten_matrix.weight"] = torch.zeros(12, 12, 1, 1)
    state_dict["blocks.1.attn.reatten_matrix.weight"] = torch.zeros(HEADS, HEADS)
    state_dict["norm.weight"] = torch.zeros(DIM + 1)
    model = ours()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError) as raised:
        load_checkpoint(model, state_dict)
    assert set(str(raised.value).splitlines()) == {
        "the checkpoint (official layout) does not fit the model:",
        "  missing: cls_token (1, 1, 24)",
        "  missing: blocks.1.mlp.fc2.bias (24,)",
        "  missing: blocks.1.attn.theta (3, 3)",
        "  unexpected: dist_token (1, 1, 24)",
        "  unexpected: blocks.7.attn.reatten_matrix.bias (3,)",
        "  unexpected: blocks.1.attn.reatten_matrix.weight (3, 3)",
        "  shape: blocks.0.attn.theta (from blocks.0.attn.reatten_matrix.weight) must be (3, 3), got (12, 12)",
        "  shape: norm.weight must be (24,), got (25,)",
    }
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key

    report = load_checkpoint(model, state_dict, strict=False)
    assert report.missing == ["cls_token", "blocks.1.attn.theta", "blocks.1.mlp.fc2.bias"]
    assert report.mismatched == {"blocks.0.attn.theta": ((12, 12), (3, 3)), "norm.weight": ((25,), (24,))}
    assert torch.equal(model.cls_token, before["cls_token"]) and torch.equal(model.norm.weight, before["norm.weight"])
    assert torch.equal(model.blocks[1].mlp.fc1.weight, official.blocks[1].mlp["fc1"].weight)


def test_misfits_of_the_second_form_carry_its_own_names():
    state_dict = SecondFormDeepViT().state_dict()
    model = ours(norm="layer", qkv_bias=True, mlp_ratio=40 / DIM)
    with pytest.raises(RuntimeError) as raised:
        load_checkpoint(model, state_dict)
    message = str(raised.value)
    assert "missing: blocks.0.attn.qkv.bias (72,)" in message
    assert "unexpected: to_patch_embedding.1.weight (192,)" in message
    assert "unexpected: to_patch_embedding.3.bias (24,)" in message


def test_checkpoint_without_batch_counts(official):
    state_dict = {key: tensor for key, tensor in official.state_dict().items() if "num_batches" not in key}
    report = load_checkpoint(ours(), state_dict)
    assert not report.missing


def test_half_precision_checkpoint(official):
    model = ours(dtype=torch.float64)
    load_checkpoint(model, official.half().state_dict())
    assert torch.equal(model.norm.weight, official.norm.weight.double())


# Files


def saved(contents, name, **options):
    """The bytes of a file."""
    buffer = io.BytesIO()
    if name.endswith(".safetensors"):
        buffer.write(save(contents))
    else:
        torch.save(contents, buffer, **options)
    return buffer.getvalue()


def scripted():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1)), buffer)
    return buffer.getvalue()


WEIGHTS = {"state_dict": {"head.weight": torch.arange(3000.0), "head.bias": torch.zeros(5)}, "epoch": 3}
WHOLE = {
    "zip.pth": saved(WEIGHTS, "zip.pth"),
    "old.pth": saved(WEIGHTS, "old.pth", _use_new_zipfile_serialization=False),
    "flat.safetensors": saved(WEIGHTS["state_dict"], "flat.safetensors"),
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 109263\n"
OTHER = {
    "empty.pth": (b"", "an empty file"),
    "empty.safetensors": (b"", "an empty file"),
    "page.pth": (b"\r\n<!DOCTYPE html><html>Virus scan warning</html>", "a web page"),
    "page.safetensors": (b"<html>404</html>", "a web page"),
    "pointer.pth": (POINTER, "a Git LFS pointer"),
    "pointer.safetensors": (POINTER, "a Git LFS pointer"),
    "index.safetensors": (b'{"weight_map": {"head.bias": "model-00001-of-00002.safetensors"}}', "JSON text"),
    "packed.pth": (gzip.compress(b"weights"), "a gzip archive"),
    "text.pth": (b"Access denied: quota exceeded\n", "cannot be read.* 30 bytes, beginning with b'Access denied: q'"),
    "zeros.safetensors": (bytes(5000), "cannot be read.*: 5000 bytes, beginning with b'"),
    "array.pth": (b"\x93NUMPY\x01\x00v\x00", "a NumPy array"),
    "nothing.pth": (saved({}, ".pth"), "no tensors in a mapping with the keys \\[\\]"),
    "options.pth": (saved({"epoch": 3, "args": {"lr": 1.0}}, ".pth"), "no tensors .*'epoch', 'args'"),
    "nothing.safetensors": (saved({}, ".safetensors"), "no tensors"),
    "list.pth": (saved([torch.zeros(1)], ".pth"), "must hold a mapping of names to tensors, got list"),
    "module.pth": (saved(nn.Linear(1, 1), ".pth"), "asks for torch.nn.modules.linear.Linear, .*weights_only=False"),
    "script.pth": (scripted(), "cannot be read.* zip archive .*TorchScript"),
}


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize("name", OTHER)
def test_files_of_other_kinds_are_named(tmp_path, name):
    content, found = OTHER[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(tmp_path / name))}.*{found}"):
        read_checkpoint(tmp_path / name)


def test_directories_are_named(tmp_path):
    (tmp_path / "model.pth").touch()
    with pytest.raises(
        ValueError, match=rf"{tmp_path} must be a checkpoint file, got a directory that holds model.pth"
    ):
        read_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_every_cut_is_noticed(tmp_path, name):
    """Files of which the end is missing, whose bytes are garbled here and there, and which end in something else."""
    path, whole = tmp_path / name, WHOLE[name]
    generator = random.Random(0)
    cuts = [whole[:size] for size in (1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1)]
    for content in cuts:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_checkpoint(path)
    for _ in range(100):
        garbled = bytearray(whole)
        for place in generator.sample(range(min(len(whole), 600)), 8):
            garbled[place] = generator.randrange(256)
        path.write_bytes(garbled)
        # What is left may be a file of other numbers: no format here has checksums of them.
        with contextlib.suppress(ValueError):
            read_checkpoint(path)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".pth.tar", ".bin", ""])
def test_endings_say_nothing(tmp_path, name, ending):
    path = tmp_path / f"model{ending}"
    path.write_bytes(WHOLE[name])
    _, state_dict = select_state_dict(read_checkpoint(path))
    assert torch.equal(state_dict["head.weight"], torch.arange(3000.0))


def test_missing_files_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(ours(), tmp_path / "none.pth")


# Prefixes


def under(prefix, state_dict):
    return {prefix + key: tensor for key, tensor in state_dict.items()}


def inner(part, state_dict):
    return {
        re.sub(r"^(blocks\.\d+|blocks\.0\.attn|patch_embed)\.", rf"\1.{part}.", key): t for key, t in state_dict.items()
    }


WRAPPED = {
    "module.": "",
    "_orig_mod.module.": "",
    "_module.": "",
    "_fsdp_wrapped_module._fpw_module.": "",
    "model.": "model.",
    "net.": "net.",
    "backbone.": "backbone.",
    "module.model._orig_mod.": "model.",
    "model.module.": "model.module.",
    "trainer.modules.student.": "trainer.modules.student.",
}
PARTS = [
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "module",
    "_checkpoint_wrapped_module._orig_mod",
]


@pytest.mark.parametrize("layout", ["official", "second form"])
@pytest.mark.parametrize("wrapper", [*WRAPPED, *PARTS, "averaged", "averaged in model."])
def test_wrappers_and_prefixes_go(wrapper, layout):
    second = {"norm": "layer", "qkv_bias": False, "mlp_ratio": 40 / DIM, "attn_head_dim": 8, "patch_norm": True}
    source, options = (OfficialDeepViT(), {}) if layout == "official" else (SecondFormDeepViT(), second)
    plain = randomized(source).state_dict()
    prefix = WRAPPED.get(wrapper, "")
    if "averaged" in wrapper:
        prefix = "model.module." if "model." in wrapper else ""
        averaged = torch.optim.swa_utils.AveragedModel(source).state_dict()
        state_dict = under("model." if prefix else "", averaged)
        assert any("n_averaged" in key for key in state_dict)
    else:
        state_dict = under(wrapper, plain) if wrapper in WRAPPED else inner(wrapper, plain)
        assert state_dict.keys() != plain.keys() or layout == "second form"
    model, expected = ours(**options), ours(**options)
    load_checkpoint(expected, plain)
    report = load_checkpoint(model, state_dict)
    assert report.prefix == prefix and report.outside == (
        ["model.n_averaged"] if prefix == "model.module." and "av" in wrapper else []
    )
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.parametrize("average", ["ema.", "ema_model.", "model.ema.", "net_ema.module."])
def test_what_stands_beside_the_model(official, average, caplog):
    """In a file of Lightning's: a loss, metrics, and a moving average, which is preferred as it is elsewhere."""
    zeros = {key: torch.zeros_like(tensor) for key, tensor in official.state_dict().items()}
    ones = {key: torch.ones_like(tensor) for key, tensor in zeros.items()}
    beside = {"loss.weight": torch.ones(5), "metric.module.total": torch.ones(1)}
    model = ours()
    with caplog.at_level(logging.INFO, logger="reattn"):
        report = load_checkpoint(model, {"epoch": 1, "state_dict": {**under("model.", zeros), **beside}})
    assert (report.source, report.prefix, report.outside) == ("state_dict", "model.", list(beside))
    assert "'model.': loss.weight, metric.module.total" in caplog.text
    everything = {"state_dict": {**under("model.", zeros), **under(average, ones), **beside}}
    for prefer_ema in (True, False):
        report = load_checkpoint(model, everything, prefer_ema=prefer_ema)
        assert report.prefix == (average if prefer_ema else "model.")
        assert model.head.weight.unique() == prefer_ema and model.blocks[2].attn.theta.unique() == prefer_ema
        assert len(report.outside) == len(ones) + 2


def test_several_models_are_not_chosen_from(official):
    state_dict = {**under("student.", official.state_dict()), **under("teacher.", official.state_dict())}
    with pytest.raises(ValueError, match=r"prefixes 'student.', 'teacher.': .*removeprefix\('student.'\)") as raised:
        load_checkpoint(ours(), state_dict)
    # What the message says works.
    load_checkpoint(ours(), eval(re.search(r"\{.*\}", str(raised.value))[0], {"state_dict": state_dict}))


class WithParts(DeepViT):
    """A model with parts that are called as wrappers are, one of which has a class token and positions."""

    def __init__(self, **options):
        super().__init__(SIZE, PATCH, embed_dim=DIM, depth=1, num_heads=HEADS, **options)
        self.module, self.model, self.ema = nn.Linear(2, 2), nn.ModuleDict({"module": nn.Linear(2, 2)}), nn.Module()
        self.ema.cls_token, self.ema.pos_embed = (nn.Parameter(torch.randn(2)) for _ in range(2))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.ema."])
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}], ids=["token", "no token"])
def test_parts_of_the_model_are_no_prefixes(options, prefix):
    source, model = WithParts(**options), WithParts(**options)
    report = load_checkpoint(model, under(prefix, source.state_dict()))
    assert not report.outside
    for key, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_part_called_module_is_unexpected_where_there_is_none(official):
    """It is not taken for DDP's prefix and loaded into the head."""
    state_dict = {**official.state_dict(), "module.bias": torch.zeros(CLASSES), "model.cls": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"unexpected: module.bias \(5,\)\n  unexpected: model.cls"):
        load_checkpoint(ours(), state_dict)
    _, selected = select_state_dict(state_dict)
    assert selected.keys() == state_dict.keys()


def test_misfits_say_that_a_prefix_is_in_the_way(official):
    state_dict = under("encoder.vit.", official.state_dict())
    del state_dict["encoder.vit.cls_token"], state_dict["encoder.vit.pos_embed"]
    with pytest.raises(
        RuntimeError, match="if 'encoder.vit.' is a prefix before the names of the model, give {key.rem"
    ):
        load_checkpoint(ours(), state_dict)
    head = {"head.weight": torch.zeros(CLASSES, DIM), "head.bias": torch.zeros(CLASSES)}
    state_dict = {key: t for key, t in under("backbone.", official.state_dict()).items() if ".head." not in key} | head
    with pytest.raises(RuntimeError) as raised:
        load_checkpoint(ours(), state_dict)
    assert str(raised.value).splitlines() == [
        "the checkpoint (official layout, under the prefix 'backbone.') does not fit the model:",
        f"  missing: head.weight ({CLASSES}, {DIM})",
        f"  missing: head.bias ({CLASSES},)",
        "  left out, without the prefix: head.weight, head.bias",
    ]


class Compiled(nn.Module):
    """What torch.compile makes of a block: its names, and nothing else."""

    def __init__(self, block):
        super().__init__()
        self._orig_mod = block

    def forward(self, *inputs):
        return self._orig_mod(*inputs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("saved_compiled", [True, False])
def test_compiled_blocks(official, saved_compiled, device):
    model, source, expected = ours(device=device), ours(), ours()
    load_checkpoint(expected, official.state_dict())
    load_checkpoint(source, official.state_dict())
    for compiled in (model, source) if saved_compiled else (model,):
        compiled.blocks[1] = Compiled(compiled.blocks[1])
    with pytest.raises(RuntimeError, match=r"\n  missing: blocks.1.norm1.weight \(24,\)$"):
        load_checkpoint(
            model, {k: t for k, t in source.state_dict().items() if k[:9] + k[-12:] != "blocks.1.norm1.weight"}
        )
    assert not load_checkpoint(model, source.state_dict()).left_on_meta
    assert torch.equal(model.eval()(images(torch.float32)), expected.eval()(images(torch.float32)))


def test_wrapped_models_are_refused(official):
    for model in (nn.DataParallel(ours()), torch.optim.swa_utils.AveragedModel(ours())):
        with pytest.raises(TypeError, match="model must be a DeepViT, got torch.*: load before wrapping"):
            load_checkpoint(model, official.state_dict())
    with pytest.raises(TypeError, match="checkpoint must be a path or a mapping, .* got .*OfficialDeepViT"):
        load_checkpoint(ours(), official)


# The meta device, and assign=True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["official", "second form"])
def test_model_on_the_meta_device(layout, dtype, tmp_path):
    """It computes what a model does that was built with data, and neither shares memory with the checkpoint."""
    second = {"norm": "layer", "qkv_bias": False, "mlp_ratio": 40 / DIM, "attn_head_dim": 8, "patch_norm": True}
    source, options = (OfficialDeepViT(), {}) if layout == "official" else (SecondFormDeepViT(), second)
    state_dict = randomized(source).state_dict()
    before = {key: tensor.clone() for key, tensor in state_dict.items() if "num_batches" not in key}
    state_dict = {key: tensor for key, tensor in state_dict.items() if "num_batches" not in key}
    model, expected = (ours(**options, dtype=dtype, device=device) for device in ("meta", "cpu"))
    model.cls_token.requires_grad_(False)
    parameters = [name for name, _ in model.named_parameters()]
    report = load_checkpoint(model, state_dict)
    load_checkpoint(expected, state_dict)
    assert report.left_on_meta == [] and not model.cls_token.requires_grad and model.pos_embed.requires_grad
    assert [name for name, _ in model.named_parameters()] == parameters
    for key, tensor in expected.state_dict().items():
        found = model.state_dict()[key]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype and found.is_contiguous(), key
    write(tmp_path / "model.safetensors", model.state_dict())
    x = images(dtype)
    loss = model.train()(x).square().sum()
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in before.items())


def test_nothing_stays_on_the_meta_device_silently(official, caplog):
    with torch.device("meta"):
        model = ours(num_classes=7)
    with pytest.raises(RuntimeError) as raised:
        load_checkpoint(model, official.state_dict())
    assert str(raised.value).splitlines()[1:] == [
        f"  left on the meta device: head.weight (7, {DIM})",
        "  left on the meta device: head.bias (7,)",
    ]
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    state_dict = official.state_dict()
    del state_dict["cls_token"]
    state_dict["norm.bias"] = torch.zeros(1)
    report = load_checkpoint(model, state_dict, strict=False)
    assert report.left_on_meta == ["cls_token", "norm.bias", "head.weight", "head.bias"]
    assert {key for key, tensor in model.state_dict().items() if tensor.is_meta} == set(report.left_on_meta)
    assert "left on the meta device, without data: cls_token, norm.bias, head.weight, head.bias" in caplog.text
    with pytest.raises(ValueError, match="must hold data, got tensors on the meta device: cls_token, pos_embed"):
        load_checkpoint(ours(), ours(device="meta").state_dict())


def test_a_head_with_data_beside_a_model_without(official):
    with torch.device("meta"):
        model = ours()
    model.reset_classifier(7)
    model.head = nn.Linear(DIM, 7)
    head = model.head.weight
    assert load_checkpoint(model, official.state_dict()).head_kept
    assert model.head.weight is head and model(images(torch.float32)).shape == (2, 7)


# Options of ReAttention, and the shapes of what a layout has for it.
HEAD_SHAPE, CONV, BIAS, SQUARE, TRIPLE = (HEADS, HEADS), (HEADS, HEADS, 1, 1), (HEADS,), (DIM, DIM), (3 * DIM, DIM)
TALKING = {"pre_mix": True, "norm": None, "proj_bias": False}
ATTENTION_LAYOUTS = {
    "official": (
        {"norm": None, "proj_bias": False},
        {"reatten_matrix.weight": CONV, "reatten_matrix.bias": BIAS, "qkv.weight": TRIPLE, "proj.weight": SQUARE},
    ),
    "second form": (
        {"norm": "layer"},
        {"reattn_weights": HEAD_SHAPE, "to_qkv.weight": TRIPLE, "to_out.0.weight": SQUARE, "to_out.0.bias": (DIM,)}
        | {"reattn_norm.1.weight": BIAS, "reattn_norm.1.bias": BIAS},
    ),
    "CaiT": (
        TALKING,
        {"proj_l.weight": HEAD_SHAPE, "proj_l.bias": BIAS, "proj_w.weight": HEAD_SHAPE, "proj_w.bias": BIAS}
        | {"qkv.weight": TRIPLE, "proj.weight": SQUARE},
    ),
    "x-transformers": (
        {**TALKING, "pre_bias": False, "theta_bias": False},
        {f"attend.{place}_softmax_talking_heads.weight": CONV for place in ("pre", "post")}
        | {f"to_{name}.weight": SQUARE for name in ("q", "k", "v", "out")},
    ),
}


@pytest.mark.parametrize("keep_vars", [False, True], ids=["tensors", "parameters"])
@pytest.mark.parametrize("layout", ATTENTION_LAYOUTS)
def test_assigned_layouts_are_contiguous_parameters(layout, keep_vars, tmp_path):
    options, shapes = ATTENTION_LAYOUTS[layout]
    state_dict = {key: torch.randn(shape) for key, shape in shapes.items()}
    if keep_vars:
        state_dict = {key: nn.Parameter(tensor) for key, tensor in state_dict.items()}
    copied, assigned = ReAttention(DIM, HEADS, **options), ReAttention(DIM, HEADS, **options, device="meta")
    copied.load_state_dict(state_dict)
    assigned.load_state_dict(state_dict, assign=True)
    for name, parameter in assigned.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.is_leaf and parameter.requires_grad, name
        assert parameter.is_contiguous() and torch.equal(parameter, copied.get_parameter(name)), name
    write(tmp_path / "attention.safetensors", assigned.state_dict())
    assigned(torch.randn(1, 4, DIM)).sum().backward()
    assert assigned.theta.grad is not None


# vit_pytorch


def from_second_form(source, **options):
    model = from_vit_pytorch(source.state_dict(), **options)
    return model.train(source.training)


@pytest.mark.parametrize("revision", ["inner norms", "wrapped once", "wrapped twice"])
@pytest.mark.parametrize("dim_head, hidden, pool", [(8, 40, "cls"), (5, 53, "mean")])
def test_vit_pytorch_in_one_call(revision, dim_head, hidden, pool):
    """53 / 24 * 24 is less than 53 in floating point."""
    source = randomized(SecondFormDeepViT(dim_head, hidden, revision, pool)).double().eval()
    model = from_second_form(source, pool=pool)
    assert (model.img_size, model.patch_size, len(model.blocks), model.num_classes) == (
        (SIZE, SIZE),
        PATCH,
        DEPTH,
        CLASSES,
    )
    torch.testing.assert_close(model(images()), source(images()), rtol=1e-11, atol=1e-11)
    if revision != "inner norms":
        with pytest.raises(ValueError, match="patch_norm=True.*: patch_embed.pre_norm.weight is missing"):
            to_vit_pytorch(model)
        return
    for weights in (model, model.state_dict()):
        back = to_vit_pytorch(weights)
        assert back.keys() == source.state_dict().keys()
        assert all(
            torch.equal(back[key], tensor) and back[key].is_contiguous() for key, tensor in source.state_dict().items()
        )


def test_vit_pytorch_files_and_overrides(tmp_path):
    source = randomized(SecondFormDeepViT()).half()
    torch.save({"state_dict": under("net.", source.state_dict())}, tmp_path / "lightning.ckpt")
    model = from_vit_pytorch(
        tmp_path / "lightning.ckpt", attn_drop_rate=0.25, num_classes=7, img_size=64, backend="reference"
    )
    assert model.cls_token.dtype == torch.float16 and model.training and model.blocks[0].attn.attn_drop.p == 0.25
    assert model.img_size == (64, 64) and model.head.weight.shape == (7, DIM)
    assert torch.equal(model.norm.weight, source.mlp_head[0].weight)


def test_vit_pytorch_that_has_no_equivalent():
    state_dict = SecondFormDeepViT().state_dict()
    with pytest.raises(ValueError, match='pool must be "cls" or "mean", got \'avg\''):
        from_vit_pytorch(state_dict, pool="avg")
    with pytest.raises(ValueError, match="in_chans must be that of square patches of 192 numbers, got 1"):
        from_vit_pytorch(state_dict, in_chans=1)
    with pytest.raises(ValueError, match="in_chans must be .*, got 0"):
        from_vit_pytorch(state_dict, in_chans=0)
    for other in (ours(), OfficialDeepViT()):
        with pytest.raises(
            ValueError, match="of a vit_pytorch.deepvit.DeepViT, got one without .*pos_embed.*load_checkpoint"
        ):
            from_vit_pytorch(other.state_dict())
    plain = {key: tensor for key, tensor in state_dict.items() if "reattn" not in key}  # a ViT of vit_pytorch
    with pytest.raises(ValueError, match="without its equivalent of blocks.0.attn.theta"):
        from_vit_pytorch(plain)

    second = {"norm": "layer", "qkv_bias": False, "mlp_ratio": 40 / DIM, "attn_head_dim": 8, "patch_norm": True}
    both = "fits global_pool='token' .* or global_pool='avg', fc_norm=True, pool_include_prefix=True"
    for pooling in (
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": True},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"global_pool": "max", "fc_norm": True, "pool_include_prefix": True},
        {"global_pool": ""},
    ):
        with pytest.raises(RuntimeError, match=f"{both} .*, got global_pool='{pooling['global_pool']}', fc_norm="):
            load_checkpoint(ours(**second, layer_norm_eps=1e-5, **pooling), state_dict)
        with pytest.raises(ValueError, match=f"the pooling must be .*, got global_pool='{pooling['global_pool']}'"):
            to_vit_pytorch(ours(**second, layer_norm_eps=1e-5, **pooling))
    # The norm of the class token is that of all tokens there.
    source = randomized(SecondFormDeepViT())
    after = ours(**second, layer_norm_eps=1e-5, fc_norm=True)
    load_checkpoint(after, source.state_dict())
    torch.testing.assert_close(after.eval()(images(torch.float32)), source(images(torch.float32)), rtol=1e-4, atol=1e-4)
    assert load_checkpoint(ours(**second, global_pool="avg", num_classes=0), state_dict).head_kept


@pytest.mark.parametrize(
    "options, named",
    {
        "norm": (
            {"norm": "batch"},
            "no place for blocks.0.attn.theta_bias; .*no place for blocks.0.attn.head_norm.running",
        ),
        "bias": ({"qkv_bias": True}, "no place for blocks.0.attn.qkv.bias"),
        "plain": ({"re_attention_blocks": 1}, "blocks.0.attn.theta is missing"),
        "stem": ({"patch_norm": False, "conv_stem": True}, "no place for patch_embed.conv1.weight"),
        "pre": ({"pre_mix": True}, "no place for blocks.0.attn.pre_theta"),
        "classes": ({"num_classes": 0}, "head.weight is missing"),
        "heads": ({"num_heads_out": 2}, r"theta \(3, 2\) makes another number of heads"),
        "image": ({"img_size": (32, 16)}, r"pos_embed \(1, 9, 24\) is of images that are not square"),
        "registers": ({"reg_tokens": 2}, "no place for reg_token"),
        "no class token": ({"class_token": False, "global_pool": "avg"}, "pooling must be .*; cls_token is missing"),
        "layer scale": ({"init_values": 0.1}, "no place for blocks.0.ls1.gamma; .*no place for blocks.2.ls2.gamma"),
        "activation": ({"act_layer": nn.SiLU}, "act_layer must be 'GELU', got .*SiLU"),
        "approximation": ({"act_layer": lambda: nn.GELU("tanh")}, "act_layer must be 'GELU', got .*GELU"),
        "norms": ({"norm_layer": nn.RMSNorm}, "norm_layer must be 'LayerNorm', got .*RMSNorm.*; norm.bias is missing"),
        "eps": ({"layer_norm_eps": 1e-6}, "layer_norm_eps must be 1e-05, got 1e-06"),
        "scales": (
            {"output_scale": 0.5, "residual_scale": 0.5},
            "residual_scale must be .*output_scale must be 1.0, got 0.5",
        ),
    }.values(),
)
def test_what_vit_pytorch_has_no_place_for(options, named):
    second = {"norm": "layer", "qkv_bias": False, "patch_norm": True, "layer_norm_eps": 1e-5}
    to_vit_pytorch(ours(**second))
    if "norm_layer" in options:
        del second["layer_norm_eps"]
    with pytest.raises(ValueError, match=named):
        to_vit_pytorch(ours(**{**second, **options}))


@pytest.mark.parametrize(
    "options, named",
    {
        "registers": ({"reg_tokens": 2}, "no place for reg_token$"),
        "no class token": ({"class_token": False, "global_pool": "avg"}, "only: cls_token is missing$"),
        "layer scale": ({"init_values": 0.1}, "no place for blocks.0.ls1.gamma; .*no place for blocks.2.ls2.gamma$"),
        "norm after pooling": ({"fc_norm": True}, "no place for fc_norm.weight; .*norm.weight is missing"),
        "norms": ({"norm_layer": nn.RMSNorm}, "blocks.0.norm1.bias is missing; .*norm.bias is missing$"),
        "queries": ({"qk_norm": True}, "no place for blocks.0.attn.q_norm.weight"),
        "patches": ({"patch_norm": True}, "no place for patch_embed.pre_norm.weight"),
        "no norm": ({"norm": None}, "blocks.0.attn.head_norm.weight is missing"),
        "no mixing": ({"post_mix": False}, "blocks.0.attn.theta is missing; blocks.0.attn.theta_bias is missing"),
        "heads": ({"num_heads_out": 2}, r"blocks.0.attn.theta \(3, 2\) makes another number of heads"),
    }.values(),
)
def test_what_the_official_layout_has_no_place_for(options, named):
    with pytest.raises(ValueError, match=named):
        to_official(ours(**options).state_dict())


PREFIXES_OF_TOKENS = {
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 3, "fc_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": True},
    "registers alone": {"class_token": False, "reg_tokens": 2, "global_pool": "max", "init_values": 0.1},
}


@pytest.mark.parametrize("img_size", [32, 48])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("options", PREFIXES_OF_TOKENS.values(), ids=PREFIXES_OF_TOKENS)
def test_any_number_of_tokens_before_the_patches(options, prefix, img_size):
    source = randomized(ours(**options)).eval()
    model = ours(**options, img_size=img_size).eval()
    beside = {"loss.weight": torch.ones(5)} if prefix == "model." else {}
    if not model.has_class_token and beside:
        beside["teacher.cls_token"] = torch.ones(1, 1, DIM)
    report = load_checkpoint(model, under(prefix, source.state_dict()) | beside)
    assert report.outside == list(beside)
    assert report.resampled_pos_embed == (None if img_size == SIZE else ((4, 4), (6, 6)))
    count = model.num_prefix_tokens
    assert torch.equal(model.pos_embed[:, :count], source.pos_embed[:, :count])
    grid = source.pos_embed[:, count:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, model.grid_size, mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, count:], grid.flatten(2).mT if img_size == SIZE else expected)
    source.set_input_size(img_size)
    x = torch.randn(2, 3, img_size, img_size)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("img_size", [32, 48])
@pytest.mark.parametrize("options", PREFIXES_OF_TOKENS.values(), ids=PREFIXES_OF_TOKENS)
def test_positions_of_patches_alone(options, img_size):
    """As timm's no_embed_class leaves them; but 9 are those of 3 x 3 patches, or of 2 x 2 after 5 tokens."""
    source = randomized(ours(**options, attention="self"))
    count = source.num_prefix_tokens
    with torch.no_grad():
        source.pos_embed[:, :count] = 0
    state_dict = source.state_dict()
    state_dict["pos_embed"] = state_dict["pos_embed"][:, count:]
    model = ours(**options, attention="self", img_size=img_size)
    load_checkpoint(model, state_dict)
    source.set_input_size(img_size)
    assert torch.equal(model.pos_embed, source.pos_embed)
    ambiguous = ours(reg_tokens=4, attention="self")
    state_dict = {**ambiguous.state_dict(), "pos_embed": torch.zeros(1, 9, DIM)}
    with pytest.raises(RuntimeError, match=r"shape: pos_embed must be \(1, 21, 24\), got \(1, 9, 24\)$"):
        load_checkpoint(ambiguous, state_dict)


def test_models_without_a_class_token_and_with_one():
    """The parts that only one has are named, and two models are not chosen from."""
    without, averaging = {"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}
    with pytest.raises(RuntimeError) as raised:
        load_checkpoint(ours(**without), under("net.", ours(**averaging).state_dict()))
    assert str(raised.value).splitlines()[1:] == [
        f"  unexpected: cls_token (1, 1, {DIM})",
        f"  shape: pos_embed must be (1, 16, {DIM}), got (1, 17, {DIM})",
    ]
    with pytest.raises(RuntimeError, match=r"under the prefix 'net.'\) does not fit the model:\n  missing: cls_token"):
        load_checkpoint(ours(**averaging), under("net.", ours(**without).state_dict()))
    with pytest.raises(RuntimeError, match="missing: norm.weight .*(.|\n)*unexpected: fc_norm.weight"):
        load_checkpoint(ours(**without), ours(**without, fc_norm=True).state_dict())
    two = {**under("student.", ours(**without).state_dict()), **under("teacher.", ours(**without).state_dict())}
    with pytest.raises(ValueError, match="one model, got several, under the prefixes 'student.', 'teacher.'"):
        load_checkpoint(ours(**without), two)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_malicious_pickle_is_refused(tmp_path, official, zipped):
    planted = tmp_path / "planted"
    path = tmp_path / "model.pth"
    contents = {"state_dict": official.state_dict(), "args": Malicious(str(planted))}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pth cannot be read with weights_only=True: [^$]*mkdir"):
        load_checkpoint(ours(), path)
    assert not planted.exists()


def test_safetensors_missing(tmp_path, monkeypatch):
    write(tmp_path / "model.safetensors", {"head.bias": torch.zeros(5)})
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"model\.safetensors needs the safetensors package: pip install safetensors"):
        read_checkpoint(tmp_path / "model.safetensors")


def test_contents_without_a_state_dict(tmp_path):
    with pytest.raises(ValueError, match=r"state dict or hold one under state_dict_ema.* keys \['epoch', 'args'\]"):
        load_checkpoint(ours(), {"epoch": 3, "args": {}})
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth must hold a mapping of names to tensors, got list"):
        load_checkpoint(ours(), tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds 'head.bias' more than once"):
        select_state_dict({"head.bias": torch.zeros(1), "head._orig_mod.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"there are tensors under 'student', 'teacher': .*checkpoint\['stu"):
        select_state_dict({"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.zeros(1)}})
    with pytest.raises(ValueError, match="state_dict holds a tuple under 'packed'"):
        select_state_dict({"state_dict": {"a": torch.zeros(1), "packed": (1, 2)}})
    torch.save({"weights": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other\.pth: checkpoint must be a state dict.*under 'weights'.*checkpoint\['wei"
    ):
        load_checkpoint(ours(), tmp_path / "other.pth")
    both = ours().state_dict()
    both["blocks.0.attn.reatten_matrix.weight"] = torch.zeros(HEADS, HEADS, 1, 1)
    with pytest.raises(ValueError, match="holds blocks.0.attn.theta twice, as .*theta and as .*reatten_matrix.weight"):
        load_checkpoint(ours(), both)
