"""Whole checkpoints of the official code and of vit_pytorch, from independent re-implementations of both."""

import argparse
import logging
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import einsum, nn

from reattn.checkpoints import load_checkpoint, read_checkpoint, select_state_dict, to_official
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
    def __init__(self, dim_head: int = 8, hidden: int = 40, revision: str = "inner norms"):
        super().__init__()
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
        return self.mlp_head(x[:, 0])


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


@pytest.mark.parametrize("entry", ["state_dict_ema", "model_ema", "state_dict", "model"])
@pytest.mark.parametrize("prefer_ema", [True, False])
def test_the_only_entry_is_taken(official, entry, prefer_ema):
    source, state_dict = select_state_dict({"epoch": 1, entry: official.state_dict()}, prefer_ema)
    assert source == entry and state_dict.keys() == official.state_dict().keys()


@pytest.mark.slow
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
        select_state_dict({"head.bias": torch.zeros(1), "module.head.bias": torch.zeros(1)})
