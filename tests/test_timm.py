"""The DeepViT models in timm's registry, and what timm's scripts ask of them."""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
from libraries import library
from torch import nn

from reattn import ReAttention
from reattn.convert import to_re_attention
from reattn.models import DeepViT, SelfAttention, create_model, list_models

pytestmark = pytest.mark.libraries

TESTS = pathlib.Path(__file__).parent
SMALL = {"img_size": 32, "depth": 3, "re_attention_blocks": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def timm():
    timm = library("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a name that timm has already
        importlib.import_module("reattn.timm")
    return timm


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Kernels are other tests' business."""
    monkeypatch.setenv("REATTN_BACKEND", "reference")


def batch(size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, size, size, generator=generator), torch.randint(10, (4,), generator=generator)


def test_models_are_listed(timm):
    assert timm.list_models("deepvit*") == list_models()
    assert timm.list_models("deepvit*", pretrained=True) == []
    assert importlib.import_module("reattn.timm").__all__ == list_models()


@pytest.mark.parametrize("name", list_models())
def test_created_by_name(timm, name):
    model = timm.create_model(name, drop_path_rate=0.2, drop_block_rate=None, bn_eps=None, scriptable=False, **SMALL)
    assert isinstance(model, DeepViT) and model.num_classes == 10
    assert model.blocks[-1].drop_path.drop_prob == 0.2
    images, labels = batch()
    nn.functional.cross_entropy(model(images), labels).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    features = model.eval().forward_features(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    model.reset_classifier(7, "avg")
    assert model(images).shape == (4, 7) and model.get_classifier().out_features == 7


@pytest.mark.parametrize("name", list_models())
def test_data_configuration(timm, name):
    size, crop = (384, 1.0) if name == "deepvit_l_384" else (224, 0.9)
    expected = {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": crop,
        "crop_mode": "center",
    }
    resolve = timm.data.resolve_data_config
    assert resolve({}, model=timm.create_model(name, device="meta")) == expected
    registered = timm.models.get_pretrained_cfg(name)
    assert resolve({}, pretrained_cfg=registered.to_dict()) == expected
    assert (registered.classifier, registered.pool_size, registered.num_classes) == ("head", None, 1000)
    assert registered.fixed_input_size and not registered.has_weights
    model = create_model(name, device="meta")
    assert registered.first_conv == model.default_cfg["first_conv"] and model.get_submodule(registered.first_conv)
    assert resolve({}, model=timm.create_model(name, img_size=64, device="meta"))["input_size"] == (3, 64, 64)


def test_layer_decay(timm):
    from timm.optim import create_optimizer_v2

    model = timm.create_model("deepvit_16b", **SMALL)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    names = {parameter: name for name, parameter in model.named_parameters()}
    depths = {"patch_embed": 4, "cls_token": 4, "pos_embed": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 1}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            depth = next((depth for prefix, depth in depths.items() if name.startswith(prefix)), 0)
            assert group["lr_scale"] == pytest.approx(0.75**depth), name
            decayed = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0.05 if decayed else 0.0), name
    assert seen == set(names.values())


def test_gradient_checkpointing_changes_nothing(timm):
    images, labels = batch()
    models = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("deepvit_s", **SMALL)
        model.set_grad_checkpointing(enable=enable)
        nn.functional.cross_entropy(model(images), labels).backward()
        models.append(model)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for (name, one), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_a_step_as_train_py_makes_it(timm):
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, ParseKwargs

    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    arguments = parser.parse_args(["--model-kwargs", "norm=layer", "re_attention_blocks=1"])
    torch.manual_seed(0)
    model = timm.create_model("deepvit_16b", drop_path_rate=0.2, **SMALL | arguments.model_kwargs)
    assert [type(block.attn) for block in model.blocks] == [SelfAttention, SelfAttention, ReAttention]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=300, warmup_epochs=3, warmup_lr=1e-6)
    ema = ModelEmaV3(model, decay=0.5)
    images, labels = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)(*batch())
    before = model.blocks[2].attn.theta.detach().clone()
    for epoch in range(2):
        scheduler.step(epoch)
        loss = SoftTargetCrossEntropy()(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    assert epochs >= 300 and loss.isfinite()
    assert not torch.equal(model.blocks[2].attn.theta, before)
    assert ema.module.blocks[2].attn.theta.isfinite().all()


def test_synchronised_batch_norm_is_converted(timm):
    from timm.layers import convert_sync_batchnorm

    model = convert_sync_batchnorm(timm.create_model("deepvit_16b", **SMALL))
    assert isinstance(model.blocks[-1].attn.head_norm, nn.SyncBatchNorm)


def official(model):
    """The model's weights as the official code names them."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("attn.theta"):
            key, tensor = key.replace("theta", "reatten_matrix.weight"), tensor.t()[:, :, None, None]
        renamed[key.replace("theta_bias", "reatten_matrix.bias").replace("head_norm", "var_norm")] = tensor
    return {"state_dict": renamed}


def test_official_checkpoints(timm, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("deepvit_16b", **SMALL)
    path = tmp_path / "deepvit_16b.pth"
    torch.save(official(model), path)
    images, _ = batch()
    expected = model.eval()(images)

    same = timm.create_model("deepvit_16b", checkpoint_path=path, **SMALL).eval()
    torch.testing.assert_close(same(images), expected)
    overlay = {"file": str(path), "num_classes": -1}  # what train.py makes of --pretrained-path
    same = timm.create_model("deepvit_16b", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    torch.testing.assert_close(same(images), expected)
    options = SMALL | {"num_classes": 7, "img_size": 64}
    other = timm.create_model("deepvit_16b", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert other(batch(64)[0]).shape == (4, 7)
    assert torch.equal(other.blocks[2].attn.theta, model.blocks[2].attn.theta)


def test_weights_are_not_distributed(timm):
    with pytest.raises(ValueError, match="pretrained must be False for deepvit_s, whose weights are not distributed"):
        timm.create_model("deepvit_s", pretrained=True)
    with pytest.raises(
        ValueError, match="model_name must be deepvit_s, which has no pretrained tags, got deepvit_s.in1"
    ):
        timm.create_model("deepvit_s.in1k")


def test_running_a_script(timm, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("from libraries import library\nlibrary('timm')\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\n"
        "if __name__ == '__main__':\n"
        "    print(type(timm.create_model(sys.argv[1], depth=5)).__name__, sys.argv[0] == __file__, *sys.argv[1:])\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(TESTS), *sys.path])
    command = [sys.executable, "-W", "error::UserWarning", "-m", "reattn.timm"]
    environment = os.environ | {"PYTHONPATH": paths}
    ran = subprocess.run([*command, script, "deepvit_s", "-b", "2"], capture_output=True, text=True, env=environment)
    assert ran.stdout.split() == ["DeepViT", "True", "deepvit_s", "-b", "2"], ran.stderr
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit, match="usage: python -m reattn.timm SCRIPT"):
            importlib.import_module("reattn.timm").main(arguments)


def test_without_timm(monkeypatch):
    monkeypatch.delitem(sys.modules, "reattn.timm", raising=False)
    for name in ("timm", "timm.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"reattn.timm needs timm >= 1.0 \(pip install timm\)"):
        importlib.import_module("reattn.timm")


@pytest.mark.parametrize("method", ["fx", "hook"])
@pytest.mark.parametrize("make", ["converted", "deepvit"])
def test_attention_extract(make, method, timm):
    """timm's own way to attention maps finds them in every block."""
    if make == "deepvit":
        model = DeepViT(img_size=32, patch_size=16, embed_dim=24, depth=3, num_heads=3, re_attention_blocks=2)
    else:
        model = to_re_attention(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3), norm=None)
    extract = timm.utils.AttentionExtract(model, method=method)
    maps = extract(torch.randn(2, 3, 32, 32))
    assert len(maps) == 3
    for of_block in maps.values():
        assert of_block.shape == (2, 3, 5, 5)
        torch.testing.assert_close(of_block.sum(-1), torch.ones(2, 3, 5))
