"""The models in timm's registry, what timm's scripts ask of them, and timm's own tests of models."""

import argparse
import importlib
import inspect
import json
import os
import pathlib
import re
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
# timm's source distribution, which `make test-libraries` unpacks.
TIMMS_TESTS = TESTS.parent / "out" / "libraries" / "timm" / "tests" / "test_models.py"
CONVERTED = "vit_tiny_patch16_224_reattn"
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
    names = importlib.import_module("reattn.timm").__all__
    assert sorted(names) == sorted(list_models() + timm.list_models("*_reattn"))
    for name in (CONVERTED, "deit3_small_patch16_224_reattn", "cait_xxs24_224_reattn"):
        assert name in names
    assert f"{CONVERTED}.augreg_in21k" in timm.list_models("vit_tiny*", pretrained=True)


# What each of them is called with beside the name of a model.
TIMMS_OWN = {
    "test_model_forward": {"batch_size": 1},
    "test_model_backward": {"batch_size": 2},
    "test_model_default_cfgs_non_std": {"batch_size": 1, "cfg_device": "meta"},
    "test_model_forward_torchscript": {"batch_size": 1},
    "test_model_forward_features": {"batch_size": 1},
    "test_model_forward_intermediates_features": {"batch_size": 1},
    "test_model_forward_intermediates": {"batch_size": 1},
    "test_model_forward_fx": {"batch_size": 1},
    "test_model_backward_fx": {"batch_size": 2},
    "test_model_forward_fx_torchscript": {"batch_size": 1},
    "test_features_only_feature_cls_class": {},
    "test_prune_intermediate_layers_params_used": {},
    "test_prune_intermediate_layers_contract": {},
    "test_relpos_non_square_checkpoint_reload": {"kwargs": {"depth": 2}},
    "test_relpos_non_square_set_input_size": {"kwargs": {"depth": 2}},
    "test_relpos_family_set_input_size": {"kwargs": {"depth": 2}, "img_size": 224, "new_size": 160},
}


@pytest.fixture(scope="module")
def timms_tests(timm, request):
    if not TIMMS_TESTS.is_file():
        if os.environ.get("REATTN_TEST_NO_SKIPS") == "1":
            pytest.fail(f"needs {TIMMS_TESTS}")
        pytest.skip(f"needs {TIMMS_TESTS}, which `make test-libraries` unpacks")
    for marker in set(re.findall(r"pytest\.mark\.(\w+)", TIMMS_TESTS.read_text())):
        request.config.addinivalue_line("markers", f"{marker}: of timm's tests")
    spec = importlib.util.spec_from_file_location("timms_tests", TIMMS_TESTS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    create = module.create_model
    module.create_model = lambda name, **options: create(name, **{"depth": 4, **options})
    return module


@pytest.mark.parametrize("test", TIMMS_OWN)
@pytest.mark.parametrize("name", ["deepvit_s", CONVERTED])
def test_timms_own_tests(timms_tests, name, test):
    """All that pass for vit_tiny_patch16_224, but that one of them wants AssertionError where ValueError is raised."""
    if (name, test) == ("deepvit_s", "test_model_forward_fx"):
        pytest.skip("compares to the bit; plain attention is traced as softmax and products")
    function = getattr(timms_tests, test)
    arguments = {"model_name": name, **TIMMS_OWN[test]}
    assert inspect.signature(function).parameters.keys() == arguments.keys()
    function(**arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.3},
        {"reg_tokens": 2, "global_pool": "avg", "fc_norm": True},
        {"class_token": False, "global_pool": "avgmax", "fc_norm": True},
        {"class_token": False, "reg_tokens": 1, "global_pool": "max", "pool_include_prefix": True, "fc_norm": True},
        {"global_pool": "", "qk_norm": True, "act_layer": "silu", "norm_layer": "rmsnorm"},
    ],
    ids=lambda options: "-".join(options),
)
def test_keywords_mean_what_they_mean_in_timm(timm, options):
    """The plain model takes timm's state dict as it is, and computes the same."""
    shape = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", **shape, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = timm.create_model("deepvit_16b", attention="self", mlp_ratio=4, **shape, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    images, _ = batch()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert (ours.num_prefix_tokens, ours.head_hidden_size) == (theirs.num_prefix_tokens, theirs.head_hidden_size)
    for format in ("NCHW", "NLC"):
        found, expected = (
            model.forward_intermediates(
                images, [0, 1], output_fmt=format, return_prefix_tokens=True, norm=True, output_dict=True
            )
            for model in (ours, theirs)
        )
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found, expected = (model.get_intermediate_layers(images, 1, reshape=True) for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_features_only(timm):
    model = timm.create_model("deepvit_16b", features_only=True, out_indices=[0, 2], **SMALL)
    images, _ = batch()
    features = model(images)
    assert [tuple(maps.shape) for maps in features] == [(4, 384, 2, 2)] * 2
    assert model.feature_info.channels() == [384, 384] and model.feature_info.reduction() == [16, 16]
    shallow = timm.create_model("deepvit_16b", features_only=True, out_indices=[0], **SMALL)
    assert len(shallow.model.blocks) == 1 and isinstance(shallow.model.head, nn.Identity)


@pytest.mark.parametrize("opt", ["muon", "adamuon"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_muon_leaves_theta_alone(timm, opt, layer_decay):
    for model in (
        timm.create_model("deepvit_16b", pre_mix=True, **SMALL),
        timm.create_model(CONVERTED, img_size=32, depth=2, num_classes=10),
    ):
        optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=1e-3, weight_decay=0.1, layer_decay=layer_decay)
        images, labels = batch()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        orthogonal = {name for name, p in model.named_parameters() if optimizer.state[p]["use_muon"]}
        assert "blocks.1.attn.qkv.weight" in orthogonal
        assert not any("theta" in name for name in orthogonal)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert not any(group.get("use_fallback") for group in timm.optim.create_optimizer_v2(plain, opt=opt).param_groups)


def test_converted_by_name(timm, tmp_path):
    """The same function as the ViT of that name and its weights; trained, saved, and built from what was saved."""
    shape = {"img_size": 32, "depth": 3, "num_classes": 10}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth"), "num_classes": 10}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, **shape}
    images, labels = batch()
    model = timm.create_model(CONVERTED, re_attention_blocks=2, **options).eval()
    torch.testing.assert_close(model(images), vit(images), rtol=1e-5, atol=1e-5)
    assert [isinstance(block.attn, ReAttention) for block in model.blocks] == [False, True, True]
    features = timm.create_model(CONVERTED, features_only=True, **options)
    assert features(images)[-1].shape == (4, 192, 2, 2)

    model = timm.create_model(CONVERTED, norm="batch", **options)
    nn.functional.cross_entropy(model.train()(images), labels).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.blocks[0].attn.theta, torch.eye(3))
    folder = tmp_path / "saved"
    timm.models.save_for_hf(model.eval(), folder)
    same = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(same(images), model(images))
    with pytest.raises(ValueError, match=f"features_only must be False for saved weights of {CONVERTED}"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    larger = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=64, num_classes=3)
    assert larger(batch(64)[0]).shape == (4, 3) and torch.equal(larger.blocks[0].attn.theta, model.blocks[0].attn.theta)
    # From a plain file: loaded after the conversion.
    torch.save({"state_dict": model.state_dict()}, tmp_path / "trained.pth")
    overlay = {"file": str(tmp_path / "trained.pth"), "num_classes": 10}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, **shape}
    assert torch.equal(timm.create_model(CONVERTED, norm="batch", **options).eval()(images), model(images))
    with pytest.raises(ValueError, match="norm must be 'batch' or None, got 'layer'"):
        timm.create_model(CONVERTED, norm="layer", **shape)
    with pytest.raises(ValueError, match=f"feature_cls must be 'getter' or 'hook' for {CONVERTED}, got 'fx'"):
        timm.create_model(CONVERTED, features_only=True, feature_cls="fx", **shape)


def test_no_norm(timm):
    """timm leaves out keywords that are None."""
    for norm, expected in (("none", None), ("layer", "layer")):
        model = timm.create_model("deepvit_16b", norm=norm, **SMALL)
        assert {block.attn.norm_type for block in model.blocks[1:]} == {expected}
    with pytest.raises(ValueError, match="norm_layer must be known to timm, got 'foo'"):
        timm.create_model("deepvit_16b", norm_layer="foo", **SMALL)


def test_model_of_this_package_saved_for_the_hub(timm, tmp_path):
    """Built without timm, of the size that it has now."""
    model = create_model("deepvit_s", norm="layer", **SMALL).eval()
    model.set_input_size(48)
    timm.models.save_for_hf(model, tmp_path)
    same = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images, _ = batch(48)
    assert torch.equal(same(images), model(images))


def test_saved_for_the_hub(timm, tmp_path):
    """After a change of the image size, and taken up again with other classes and another size."""
    model = timm.create_model("deepvit_s", norm="layer", act_layer="silu", **SMALL).eval()
    model.set_input_size(48)
    timm.models.save_for_hf(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "deepvit_s" and config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    same = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images, _ = batch(48)
    assert torch.equal(same(images), model(images))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=64)
    assert other(batch(64)[0]).shape == (4, 3)
    assert torch.equal(other.blocks[-1].attn.theta, model.blocks[-1].attn.theta)


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
