"""The code of docs/migration.md, and the models it starts from, with other people's libraries."""

import documents
import pytest
import torch
from libraries import library
from torch import nn

from reattn.checkpoints import from_vit_pytorch, load_checkpoint, to_official, to_vit_pytorch
from reattn.models import DeepViT, create_model

DOCUMENT = "docs/migration.md"
SECTIONS = documents.sections(DOCUMENT)
LIBRARIES = {"vit-pytorch": "vit_pytorch", "timm's ViT": "timm", "timm's CaiT": "timm"}
LIBRARIES |= {"x-transformers": "x_transformers"}
SMALL = {"depth": 6, "embed_dim": 48, "num_heads": 4}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Kernels are other tests' business."""
    monkeypatch.setenv("REATTN_BACKEND", "reference")


@pytest.mark.parametrize(
    "section", [pytest.param(n, marks=pytest.mark.libraries if n in LIBRARIES else ()) for n in SECTIONS]
)
def test_code_of_the_documents(section, tmp_path, monkeypatch):
    if section in LIBRARIES:
        library(LIBRARIES[section])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = documents.blocks(DOCUMENT, section)
    assert len(blocks) >= 2
    changes = {}
    if section == "The official code":
        source = create_model("deepvit_s", **SMALL)
        torch.save({"state_dict_ema": to_official(source.state_dict()), "epoch": 1}, "DViT_82_16b.pth.tar")
        sizes = ", ".join(f"{name}={size}" for name, size in SMALL.items())
        changes = {'("deepvit_s")': f'("deepvit_s", {sizes})'}
    names = documents.run(blocks, changes)
    if section == "The official code":
        assert names["report"].source == "state_dict_ema"
        back = torch.load("deepvit_S.pth")
        assert all(torch.equal(back[key], tensor) for key, tensor in to_official(source.state_dict()).items())


def test_where_users_come_from():
    assert list(SECTIONS) == [
        "The official code", "vit-pytorch", "timm's ViT", "timm's CaiT", "x-transformers", "An attention of your own",
    ]  # fmt: skip


@pytest.mark.libraries
@pytest.mark.parametrize(
    "channels, dim_head, mlp_dim, pool", [(3, 16, 96, "cls"), (1, 7, 53, "cls"), (3, 16, 96, "mean")]
)
def test_model_of_vit_pytorch(channels, dim_head, mlp_dim, pool):
    """There and back, with weights far from their initialisation."""
    deepvit = library("vit_pytorch.deepvit")
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 49, "depth": 2, "heads": 3}
    shape |= {"mlp_dim": mlp_dim, "dim_head": dim_head, "channels": channels, "pool": pool}
    theirs, again = (deepvit.DeepViT(**shape).double().eval() for _ in range(2))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    images = torch.randn(2, channels, 32, 32, dtype=torch.float64)
    model = from_vit_pytorch(theirs.state_dict(), in_chans=channels, pool=pool).eval()
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-11, atol=1e-11)
    again.load_state_dict(to_vit_pytorch(model))
    assert torch.equal(again(images), theirs(images))


@pytest.mark.libraries
@pytest.mark.parametrize("img_size", [32, 48])
@pytest.mark.parametrize(
    "parts",
    [
        {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True},
        {"reg_tokens": 4, "no_embed_class": True, "global_pool": "max", "fc_norm": True},
        {"class_token": False, "global_pool": "avg", "fc_norm": True, "pool_include_prefix": True},
        {"class_token": False, "reg_tokens": 3, "no_embed_class": True, "global_pool": "avgmax", "fc_norm": False},
    ],
    ids=lambda parts: "+".join(parts),
)
def test_checkpoints_of_timm(parts, img_size):
    """Into a model for their images, and one for larger ones, which timm makes of its own."""
    timm = library("timm")
    torch.manual_seed(0)
    size = {"patch_size": 8, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    theirs = timm.models.VisionTransformer(img_size=32, **size, **parts).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    state_dict = {f"model.{key}": tensor.clone() for key, tensor in theirs.state_dict().items()}
    theirs.set_input_size(img_size)
    parts = {name: value for name, value in parts.items() if name != "no_embed_class"}
    model = DeepViT(img_size, **size, **parts, attention="self", dtype=torch.float64).eval()
    report = load_checkpoint(model, state_dict)
    assert report.prefix == "model." and report.resampled_pos_embed == (None if img_size == 32 else ((4, 4), (6, 6)))
    images = torch.randn(2, 3, img_size, img_size, dtype=torch.float64)
    # Positions are resampled in float32 by both.
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-11, atol=1e-11 if img_size == 32 else 1e-5)
