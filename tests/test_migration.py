"""The code of docs/migration.md, and the models it starts from, with other people's libraries."""

import pathlib
import re

import pytest
import torch
from libraries import library
from torch import nn

from reattn.checkpoints import from_vit_pytorch, load_checkpoint, to_official, to_vit_pytorch
from reattn.models import create_model

DOCUMENT = (pathlib.Path(__file__).parent.parent / "docs" / "migration.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL))
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LIBRARIES = {"vit-pytorch": "vit_pytorch", "timm's CaiT": "timm", "x-transformers": "x_transformers"}
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
    blocks = CODE.findall(DOCUMENT[: DOCUMENT.index("\n## ")]) + CODE.findall(SECTIONS[section])
    assert len(blocks) >= 2
    names = {}
    if section == "The official code":
        source = create_model("deepvit_s", **SMALL)
        torch.save({"state_dict_ema": to_official(source.state_dict()), "epoch": 1}, "DViT_82_16b.pth.tar")
        sizes = ", ".join(f"{name}={size}" for name, size in SMALL.items())
        blocks = [block.replace('("deepvit_s")', f'("deepvit_s", {sizes})') for block in blocks]
    for block in blocks:
        exec(block, names)
    if section == "The official code":
        assert names["report"].source == "state_dict_ema"
        back = torch.load("deepvit_S.pth")
        assert all(torch.equal(back[key], tensor) for key, tensor in to_official(source.state_dict()).items())


def test_where_users_come_from():
    assert list(SECTIONS) == [
        "The official code", "vit-pytorch", "timm's CaiT", "x-transformers", "An attention of your own",
    ]  # fmt: skip


@pytest.mark.libraries
@pytest.mark.parametrize("channels, dim_head, mlp_dim", [(3, 16, 96), (1, 7, 53)])
def test_model_of_vit_pytorch(channels, dim_head, mlp_dim):
    """There and back, with weights far from their initialisation."""
    deepvit = library("vit_pytorch.deepvit")
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 49, "depth": 2, "heads": 3}
    shape |= {"mlp_dim": mlp_dim, "dim_head": dim_head, "channels": channels}
    theirs, again = (deepvit.DeepViT(**shape).double().eval() for _ in range(2))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    images = torch.randn(2, channels, 32, 32, dtype=torch.float64)
    model = from_vit_pytorch(theirs.state_dict(), in_chans=channels).eval()
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-11, atol=1e-11)
    again.load_state_dict(to_vit_pytorch(model))
    assert torch.equal(again(images), theirs(images))


@pytest.mark.libraries
def test_mean_pooling_of_vit_pytorch_is_refused():
    """It is not the average that DeepViT takes, which would load without a word."""
    deepvit = library("vit_pytorch.deepvit")
    shape = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 1, "heads": 3, "mlp_dim": 96}
    theirs = deepvit.DeepViT(**shape, pool="mean")
    with pytest.raises(ValueError, match="pool must be \"cls\", got 'mean'"):
        from_vit_pytorch(theirs.state_dict(), pool=theirs.pool)
    averaging = from_vit_pytorch(theirs.state_dict())
    averaging.reset_classifier(5, "avg")
    with pytest.raises(RuntimeError, match="global_pool=\"token\" .*, got 'avg'"):
        load_checkpoint(averaging, theirs.state_dict())
