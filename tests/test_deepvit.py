"""The DeepViT family: official sizes, the block's arithmetic, and what a user of a ViT expects of a model."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reattn import ReAttention, use_backend
from reattn.models import DeepViT, SelfAttention, create_model, deepvit_l_384, list_models, resample_pos_embed
from reattn.models.deepvit import Block, DropPath

# name: (dim, depth, blocks with re-attention, conv stem, tokens, millions of parameters as published)
OFFICIAL = {
    "deepvit_16b": (384, 16, 16, False, 197, "24.43"),
    "deepvit_24b": (384, 24, 24, False, 197, "36.26"),
    "deepvit_32b": (384, 32, 32, False, 197, "48.10"),
    "deepvit_s": (396, 16, 5, True, 197, "27.31"),
    "deepvit_l": (420, 32, 12, True, 197, "58.88"),
    "deepvit_l_384": (420, 32, 12, True, 577, "59.04"),
}
ATTENTIONS = [
    pytest.param({"norm": "batch"}, id="batch"),
    pytest.param({"norm": "layer"}, id="layer"),
    pytest.param({"norm": None}, id="none"),
    pytest.param({"attention": "self"}, id="self"),
]


def tiny(**overrides) -> DeepViT:
    torch.manual_seed(0)
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    return DeepViT(**{**config, **overrides})


def images(height: int = 32, width: int = 32, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def randomize(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a value that shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                random = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(0.5 + random if name.endswith("var") else random)
    return model


def official_parameters(dim: int, depth: int, re_attention_depth: int, conv_stem: bool, tokens: int) -> int:
    """The count by hand, from the official definitions: 12 heads, MLP ratio 3, patch 16, 1000 classes."""
    heads, hidden = 12, 3 * dim
    layer_norm = 2 * dim
    qkv_and_proj = (dim * 3 * dim + 3 * dim) + (dim * dim + dim)
    mlp = (dim * hidden + hidden) + (hidden * dim + dim)
    mixing = (heads * heads + heads) + 2 * heads
    if conv_stem:
        patch_embed = (3 * 64 * 7 * 7 + 2 * 64) + (64 * 64 * 3 * 3 + 2 * 64) + (64 * dim * 8 * 8 + dim)
    else:
        patch_embed = 3 * dim * 16 * 16 + dim
    class_token_and_positions = dim + tokens * dim
    head = dim * 1000 + 1000
    blocks = depth * (2 * layer_norm + qkv_and_proj + mlp) + re_attention_depth * mixing
    return patch_embed + class_token_and_positions + blocks + layer_norm + head


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configuration(name):
    dim, depth, re_attention_depth, conv_stem, tokens, published = OFFICIAL[name]
    model = create_model(name, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == official_parameters(dim, depth, re_attention_depth, conv_stem, tokens)
    assert f"{count / 1e6:.2f}" == published
    kinds = [type(block.attn) for block in model.blocks]
    assert kinds == [SelfAttention] * (depth - re_attention_depth) + [ReAttention] * re_attention_depth
    assert model.blocks[-1].attn.head_dim == dim // 12
    assert model.blocks[-1].attn.output_scale == (33**-0.5 if name == "deepvit_s" else 1.0)
    assert {block.residual_scale for block in model.blocks} == {0.5 if conv_stem else 1.0}
    assert {block.norm1.eps for block in model.blocks} == {1e-6}
    assert model.default_cfg["crop_pct"] == (1.0 if name.endswith("384") else 0.9)
    assert model.default_cfg["mean"] == model.default_cfg["std"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", OFFICIAL)
def test_plain_vit_of_the_same_shape_differs_by_the_mixing_alone(name):
    dim, depth, _, conv_stem, tokens, _ = OFFICIAL[name]
    model = create_model(name, attention="self", device="meta")
    assert sum(p.numel() for p in model.parameters()) == official_parameters(dim, depth, 0, conv_stem, tokens)


def test_state_dict_keys_are_the_official_ones_outside_the_attention():
    model = tiny(depth=1, conv_stem=True)
    outside = {key for key in model.state_dict() if ".attn." not in key}
    norms = {f"{norm}.{kind}" for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm") for kind in ("weight", "bias")}
    linears = {
        f"{linear}.{kind}"
        for linear in ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head", "patch_embed.proj")
        for kind in ("weight", "bias")
    }
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    stem = {f"patch_embed.{norm}.{kind}" for norm in ("bn1", "bn2") for kind in statistics}
    stem |= {"patch_embed.conv1.weight", "patch_embed.conv2.weight"}
    assert outside == {"cls_token", "pos_embed"} | norms | linears | stem


@pytest.mark.parametrize("options", ATTENTIONS)
@pytest.mark.parametrize("conv_stem", [False, True], ids=["patch", "stem"])
@pytest.mark.parametrize("residual_scale", [1.0, 0.5], ids=["s=1", "s=0.5"])
def test_forward_is_the_definition(options, conv_stem, residual_scale):
    model = randomize(tiny(conv_stem=conv_stem, residual_scale=residual_scale, **options).double()).eval()
    x = images(dtype=torch.float64)
    embed = model.patch_embed
    if conv_stem:
        maps = torch.relu(embed.bn1(F.conv2d(x, embed.conv1.weight, stride=2, padding=3)))
        maps = torch.relu(embed.bn2(F.conv2d(maps, embed.conv2.weight, padding=1)))
        maps = F.conv2d(maps, embed.proj.weight, embed.proj.bias, stride=4)
    else:
        maps = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=8)
    tokens = torch.cat([model.cls_token.expand(2, 1, 24), maps.flatten(2).mT], dim=1) + model.pos_embed
    for block in model.blocks:
        tokens = tokens + block.attn(block.norm1(tokens * residual_scale)) / residual_scale
        hidden = F.gelu(block.mlp.fc1(block.norm2(tokens * residual_scale)))
        tokens = tokens + block.mlp.fc2(hidden) / residual_scale
    logits = model.head(model.norm(tokens)[:, 0])
    torch.testing.assert_close(model(x), logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ATTENTIONS)
def test_every_parameter_learns(options):
    model = tiny(conv_stem=True, **options).train()
    F.cross_entropy(model(images()), torch.tensor([1, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Batch statistics cancel the mixing bias in training.
        assert parameter.grad.abs().sum() > 0 or name.endswith("theta_bias"), name


@pytest.mark.parametrize(
    "selected, expected",
    [(None, [0, 1, 2, 3]), (0, []), (2, [2, 3]), ([1], [1]), ([0, -1], [0, 3]), ((), [])],
    ids=["all", "none", "last two", "one", "negative", "empty"],
)
def test_re_attention_blocks(selected, expected):
    model = tiny(depth=4, re_attention_blocks=selected, device="meta")
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.attn, ReAttention)] == expected


def test_options_reach_every_attention():
    model = tiny(
        norm="layer",
        output_scale=0.25,
        backend="reference",
        attn_drop_rate=0.1,
        proj_drop_rate=0.2,
        qkv_bias=False,
        attn_head_dim=5,
        qk_norm=True,
        re_attention_blocks=2,
    )
    for block in model.blocks:
        assert block.attn.head_dim == 5 and block.attn.qkv.bias is None
        assert block.attn.attn_drop.p == 0.1 and block.attn.proj_drop.p == 0.2 and block.mlp.drop.p == 0.2
        assert isinstance(block.attn.q_norm, nn.LayerNorm)
    for block in model.blocks[1:]:
        assert isinstance(block.attn.head_norm, nn.LayerNorm)
        assert block.attn.output_scale == 0.25 and block.attn.backend == "reference"
    assert model(images()).shape == (2, 5)


def test_mixing_before_the_softmax():
    model = tiny(norm="layer", pre_mix=True, num_heads_out=8, re_attention_blocks=[0, 1])
    assert [getattr(block.attn, "num_heads_out", None) for block in model.blocks][:2] == [8, 8]
    logits = model(images())
    logits.sum().backward()
    assert all(block.attn.pre_theta.grad.abs().max() > 0 for block in model.blocks[:2])
    assert all(block.attn.theta is None for block in tiny(post_mix=False).blocks)
    # As every theta, it keeps what its layer draws.
    assert model.blocks[0].attn.pre_theta.std() > 0.1


def test_initialisation():
    model = DeepViT(img_size=64, embed_dim=192, depth=2, num_heads=12, conv_stem=True)
    tables = [model.cls_token, model.pos_embed]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            tables.append(module.weight)
            assert not module.bias.any()
    for table in tables:
        assert abs(table.std().item() - 0.02) < 0.15 * 0.02
    for block in model.blocks:
        bound = 12**-0.5
        assert block.attn.theta.abs().max() <= bound and block.attn.theta_bias.abs().max() <= bound
        assert abs(block.attn.theta.std().item() - bound / 3**0.5) < 0.15 * bound


def test_reset_parameters_after_to_empty():
    model = tiny(conv_stem=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 9)
    model.reset_parameters()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    assert not model.head.bias.any() and model.head.weight.std() < 0.03
    assert model.patch_embed.bn1.num_batches_tracked == 0


def test_drop_path():
    drop_path = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    dropped = drop_path(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert abs(dropped.mean().item() - 1.0) < 0.03
    assert drop_path.eval()(x) is x
    with pytest.raises(ValueError, match=r"drop_prob must lie in \[0, 1\), got 1.0"):
        DropPath(1.0)


def test_drop_path_rises_linearly_and_drops_whole_branches():
    rates = [block.drop_path.drop_prob for block in tiny(depth=5, drop_path_rate=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert tiny(depth=1, drop_path_rate=0.2).blocks[0].drop_path.drop_prob == 0.0

    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    block = Block(nn.Identity(), 24, 48, residual_scale=0.5)
    block.drop_path = Zero()
    x = torch.randn(2, 3, 24)
    assert torch.equal(block(x), x)


def test_dropout_acts_in_training_only():
    model = tiny(
        drop_rate=0.5, pos_drop_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2, norm="layer"
    )
    x = images()
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_self_attention_is_the_definition():
    torch.manual_seed(0)
    attn = SelfAttention(24, 3, qkv_bias=True).double()
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    query, key, value = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=-1))
    maps = (query @ key.mT / 8**0.5).softmax(-1)
    merged = (maps @ value).transpose(1, 2).reshape(2, 17, 24)
    torch.testing.assert_close(attn(x), attn.proj(merged), rtol=1e-12, atol=1e-12)
    softmax_maps, same_maps = attn.attention_maps(x)
    torch.testing.assert_close(softmax_maps, maps, rtol=1e-12, atol=1e-12)
    assert same_maps is softmax_maps
    causal = torch.ones(17, 17, dtype=torch.bool).tril()
    torch.testing.assert_close(attn(x, attn_mask=causal), attn(x, is_causal=True))


@pytest.mark.parametrize("options", ATTENTIONS)
def test_attention_maps_of_every_block(options):
    model = tiny(**options).eval()
    tokens = torch.randn(2, 17, 24)
    for block in model.blocks:
        for maps in block.attn.attention_maps(tokens):
            assert maps.shape == (2, 3, 17, 17)


def test_patch_norm_normalises_pixels_and_embedding():
    model = randomize(tiny(patch_norm=True).double())
    embed, x = model.patch_embed, images(32, 32, dtype=torch.float64)
    pixels = F.unfold(x, 8, stride=8).mT
    normalised = F.layer_norm(pixels, (192,), embed.pre_norm.weight, embed.pre_norm.bias)
    embedding = F.linear(normalised, embed.proj.weight.flatten(1), embed.proj.bias)
    expected = F.layer_norm(embedding, (24,), embed.norm.weight, embed.norm.bias)
    torch.testing.assert_close(embed(x).flatten(2).mT, expected, rtol=1e-12, atol=1e-12)


def test_resample_pos_embed():
    pos_embed = torch.randn(1, 1 + 14 * 14, 6)
    resampled = resample_pos_embed(pos_embed, (24, 24))
    grid = pos_embed[:, 1:].reshape(1, 14, 14, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (24, 24), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(resampled[:, 1:], expected)
    assert torch.equal(resampled[:, :1], pos_embed[:, :1])
    assert resample_pos_embed(pos_embed, (14, 14)) is pos_embed
    # Antialiasing makes every new position a weighted mean of the old ones: constants stay constant.
    constant = resample_pos_embed(torch.full((1, 1 + 12, 6), 0.7, dtype=torch.float16), (2, 5), old_grid=(3, 4))
    assert constant.shape == (1, 1 + 10, 6) and constant.dtype == torch.float16
    torch.testing.assert_close(constant, torch.full_like(constant, 0.7))
    with pytest.raises(ValueError, match="pos_embed holds 12 patch positions.* 3 x 3"):
        resample_pos_embed(torch.zeros(1, 13, 6), (2, 2))


def test_another_image_size():
    model = tiny(conv_stem=True).eval()
    dynamic = tiny(conv_stem=True, dynamic_img_size=True).eval()
    x = images(48, 24)
    with pytest.raises(ValueError, match=r"x must be images of shape \(batch, 3, 32, 32\), got \(2, 3, 48, 24\)"):
        model(x)
    with pytest.raises(ValueError, match=r"divisible by patch_size=8, got \(2, 3, 48, 25\)"):
        dynamic(images(48, 25))
    with pytest.raises(ValueError, match=r"x must be images of shape \(batch, 3, .*got \(2, 1, 32, 32\)"):
        dynamic(images()[:, :1])
    assert torch.equal(dynamic(images()), model(images()))

    model.pos_embed.requires_grad_(False)
    model.set_input_size((48, 24))
    assert model.grid_size == (6, 3) and model.default_cfg["input_size"] == (3, 48, 24)
    assert model.pos_embed.shape == (1, 19, 24) and not model.pos_embed.requires_grad
    torch.testing.assert_close(model(x), dynamic(x))
    dynamic(x).sum().backward()
    assert dynamic.pos_embed.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"img_size must be divisible by patch_size=8, got \(30, 30\)"):
        model.set_input_size(30)


def test_gradient_checkpointing_keeps_the_backend():
    """Of the context that the forward pass ran in: another would draw another mask, and save other tensors."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny(attn_drop_rate=0.3).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        with use_backend("reference"):
            loss = model(images()).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "options",
    [pytest.param(*each.values, id=each.id, marks=[pytest.mark.slow] * (each.id != "batch")) for each in ATTENTIONS],
)
def test_gradient_checkpointing_changes_nothing(options):
    config = {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1, "conv_stem": True, **options}
    plain = tiny(**config).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    calls = []
    checkpointed.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        for step in range(2):
            logits = model(images() * (1 + step))
            F.cross_entropy(logits, torch.tensor([1, 3])).backward()
        outputs.append(logits)
    assert len(calls) == 4
    assert torch.equal(*outputs)
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad), name
    for (name, expected), actual in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(actual, expected), name
    if options.get("norm") == "batch":
        assert checkpointed.blocks[0].attn.head_norm.num_batches_tracked == 2
    checkpointed.set_grad_checkpointing(False)
    calls.clear()
    checkpointed(images()).sum().backward()
    assert len(calls) == 1


def test_gradient_checkpointing_restores_the_statistics_when_the_recomputation_fails():
    model = tiny(depth=1).train()
    model.set_grad_checkpointing()
    loss = model(images()).sum()
    statistics = model.blocks[0].attn.head_norm.running_var
    kept = statistics.clone()

    def fail(*_):
        raise RuntimeError("interrupted")

    model.blocks[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        loss.backward()
    assert model.blocks[0].attn.head_norm.running_var is statistics and torch.equal(statistics, kept)


@pytest.mark.parametrize("grad_checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_compile(grad_checkpointing):
    torch.compiler.reset()
    model = tiny(depth=2, residual_scale=0.5).train()
    model.set_grad_checkpointing(grad_checkpointing)
    compiled = copy.deepcopy(model)
    for step in (model, torch.compile(compiled, fullgraph=True, backend="aot_eager")):
        step(images()).square().sum().backward()
    for (name, expected), actual in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)
    for (name, expected), actual in zip(model.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_export():
    model = tiny(conv_stem=True).eval()
    exported = torch.export.export(model, (images(),))
    torch.testing.assert_close(exported.module()(images()), model(images()))


def test_autocast():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    logits.float().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_dtype_and_device():
    model = tiny(dtype=torch.float64, conv_stem=True)
    assert {p.dtype for p in model.state_dict().values() if p.is_floating_point()} == {torch.float64}
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64
    assert {p.device.type for p in tiny(device="meta", conv_stem=True).state_dict().values()} == {"meta"}


def test_sync_batch_norm_conversion_reaches_stem_and_attention():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny(conv_stem=True))
    assert isinstance(model.patch_embed.bn1, nn.SyncBatchNorm)
    assert isinstance(model.blocks[0].attn.head_norm, nn.SyncBatchNorm)


def test_heads():
    model = tiny(drop_rate=0.5).eval()
    x = images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17, 24)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert torch.equal(model(x), model.get_classifier()(tokens[:, 0]))

    model.reset_classifier(7, global_pool="avg")
    assert model.num_classes == model.default_cfg["num_classes"] == 7 and not model.head.bias.any()
    torch.testing.assert_close(model(x), model.head(tokens[:, 1:].mean(1)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), tokens[:, 1:].mean(1))
    assert tiny(num_classes=0)(x).shape == (2, 24)


def test_forward_intermediates():
    model = tiny(depth=4, img_size=(32, 24)).eval()
    x = images(32, 24)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    final, intermediates = model.forward_intermediates(x)
    assert len(outputs) == 4 and len(intermediates) == 4
    assert torch.equal(final, model.norm(outputs[3]))
    for tokens, maps in zip(outputs, intermediates, strict=True):
        assert maps.shape == (2, 24, 4, 3)
        assert torch.equal(maps, tokens[:, 1:].mT.reshape(2, 24, 4, 3))

    blocks = outputs[:4]
    (second, last) = model.forward_intermediates(
        x, [-1, 1], norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for (patches, prefix), tokens in ((second, blocks[1]), (last, blocks[3])):
        assert torch.equal(torch.cat([prefix, patches], 1), model.norm(tokens))

    outputs.clear()
    final, (maps,) = model.forward_intermediates(x, [1], stop_early=True)
    assert len(outputs) == 2 and torch.equal(final, model.norm(blocks[1]))
    assert len(model.forward_intermediates(x, 3, intermediates_only=True)) == 3
    with pytest.raises(ValueError, match=r"indices must lie in \[-4, 4\) for 4 blocks, got \[4\]"):
        model.forward_intermediates(x, [4])
    with pytest.raises(ValueError, match='output_fmt must be "NCHW" or "NLC", got \'NHWC\''):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_pooling():
    """Class token and two registers, then sixteen patches."""
    model = tiny(reg_tokens=2, num_classes=0).eval()
    tokens = model.forward_features(images())
    assert model.num_prefix_tokens == 3 and tokens.shape == (2, 19, 24)
    patches = tokens[:, 3:]
    pooled = {
        "token": tokens[:, 0],
        "avg": patches.mean(1),
        "max": patches.max(1)[0],
        "avgmax": (patches.mean(1) + patches.max(1)[0]) / 2,
        "": tokens,
    }
    for global_pool, expected in pooled.items():
        model.reset_classifier(0, global_pool)
        torch.testing.assert_close(model(images()), expected)
    after = tiny(reg_tokens=2, num_classes=0, fc_norm=True, pool_include_prefix=True, global_pool="avg").eval()
    renamed = {f"fc_{key}" if key.startswith("norm.") else key: value for key, value in model.state_dict().items()}
    after.load_state_dict(renamed)
    ((patches, prefix),) = model.forward_intermediates(
        images(), 1, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    expected = model.norm(torch.cat([prefix, patches], 1).mean(1))
    torch.testing.assert_close(after(images()), expected)


def test_patches_are_dropped_in_training():
    model = tiny(reg_tokens=1, patch_drop_rate=0.5, global_pool="avg")
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.patch_drop.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(images())
    every, kept = seen
    assert kept.shape == (2, 2 + 8, 24) and torch.equal(kept[:, :2], every[:, :2])
    chosen = []
    for sample, whole in zip(kept[:, 2:], every[:, 2:], strict=True):
        chosen.append([(whole == token).all(-1).nonzero().item() for token in sample])
        assert chosen[-1] == sorted(set(chosen[-1]))
    assert chosen[0] != chosen[1]
    with pytest.raises(ValueError, match="attn_mask must be None while patch_drop_rate=0.5 drops patches in training"):
        model(images(), torch.ones(18, dtype=torch.bool))
    with pytest.raises(ValueError, match='output_fmt must be "NLC" while patch_drop_rate=0.5 drops patches'):
        model.forward_intermediates(images())
    model.eval()
    assert torch.equal(model(images(), torch.ones(18, dtype=torch.bool)), model(images()))


def test_pruned():
    model = tiny(depth=4).eval()
    every = model.forward_intermediates(images(), intermediates_only=True)
    assert model.prune_intermediate_layers([2, 0], prune_norm=True) == [0, 2]
    assert len(model.blocks) == len(model.feature_info) == 3 and not model.training
    for found, expected in zip(model.forward_intermediates(images(), [0, 2])[1], every[::2], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(model(images())[:, 1:].mT.unflatten(2, (4, 4)), every[2])
    with pytest.raises(ValueError, match=r"indices must name a block at least, got \[\]"):
        model.prune_intermediate_layers([])


def test_other_layers():
    model = tiny(norm_layer=torch.nn.RMSNorm, act_layer=torch.nn.SiLU, init_values=0.25, qk_norm=True)
    norms = {type(module) for name, module in model.named_modules() if re.search(r"norm\d?$", name)}
    assert norms == {
        torch.nn.RMSNorm,
        torch.nn.Identity,
        torch.nn.BatchNorm2d,
    }  # fc_norm and the attention's; head_norm
    block = model.blocks[0].eval()
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        block.ls1.gamma.normal_()
        between = x + block.ls1.gamma * block.attn(block.norm1(x))
        hidden = torch.nn.functional.silu(block.mlp.fc1(block.norm2(between)))
        expected = between + 0.25 * block.mlp.fc2(hidden)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("conv_stem", [False, True], ids=["patch", "stem"])
def test_metadata_names_what_is_there(conv_stem):
    model = tiny(conv_stem=conv_stem)
    parameters = dict(model.named_parameters())
    assert model.no_weight_decay() == {"cls_token", "pos_embed"} <= parameters.keys()
    config = model.pretrained_cfg
    assert config == model.default_cfg and config["input_size"] == (3, 32, 32) and config["interpolation"] == "bicubic"
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert [info["module"] for info in model.feature_info] == ["blocks.0", "blocks.1", "blocks.2"]
    matcher = model.group_matcher()
    patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
    groups = {name: [p for p in patterns if re.match(p, name)] for name in parameters if not name.startswith("head")}
    assert {len(matching) for matching in groups.values()} == {1}


def test_registry():
    assert list_models() == sorted(OFFICIAL)
    assert list_models("*_l*") == ["deepvit_l", "deepvit_l_384"]
    model = create_model("deepvit_s", img_size=32, depth=6, num_classes=3)
    assert isinstance(model, DeepViT) and model(images()).shape == (2, 3)
    assert [type(block.attn) for block in model.blocks] == [SelfAttention] + [ReAttention] * 5
    assert deepvit_l_384(img_size=224, device="meta").grid_size == (14, 14)
    with pytest.raises(ValueError, match="name must be one of deepvit_16b, .*, got 'deepvit_xl'"):
        create_model("deepvit_xl")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"attention": "linear"}, 'attention must be "re" or "self", got \'linear\''),
        ({"global_pool": "map"}, r"global_pool must be one of \('token', 'avg', 'max', 'avgmax', ''\), got 'map'"),
        ({"class_token": False}, 'global_pool must not be "token" with class_token=False'),
        ({"act_layer": "gelu"}, "act_layer must be a class or function that makes a module, got 'gelu'"),
        ({"re_attention_blocks": "1"}, "re_attention_blocks must be None, an int, or a sequence of ints, got '1'"),
        ({"re_attention_blocks": 1.5}, "re_attention_blocks must be None, an int, or a sequence of ints, got 1.5"),
        ({"reg_tokens": -1}, "reg_tokens must be 0 or more, got -1"),
        ({"patch_drop_rate": 1.0}, r"patch_drop_rate must lie in \[0, 1\), got 1.0"),
        ({"norm_layer": torch.nn.RMSNorm, "layer_norm_eps": 1e-5}, "layer_norm_eps must be left out with norm_layer"),
        ({"norm": "group"}, "norm must be one of"),
        ({"img_size": 33}, r"img_size must be divisible by patch_size=8, got \(33, 33\)"),
        ({"img_size": (32, 32, 3)}, r"img_size must be a positive int or a pair"),
        ({"residual_scale": 0.0}, "residual_scale must not be 0"),
        ({"conv_stem": True, "patch_norm": True}, "patch_norm must be False with conv_stem=True"),
        ({"conv_stem": True, "patch_size": 5, "img_size": 20}, "patch_size must be even .* got 5"),
        ({"re_attention_blocks": 4}, "re_attention_blocks must be between 0 and the depth of 3 blocks, got 4"),
        ({"re_attention_blocks": [0, 3]}, r"re_attention_blocks must lie in \[-3, 3\) for 3 blocks, got \[3\]"),
        ({"attention": "self", "num_heads": 5}, "dim must be divisible by num_heads, got dim=24 and num_heads=5"),
        ({"drop_path_rate": 1.0}, r"drop_prob must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


@pytest.mark.parametrize("re_attention_blocks", [0, 1, 2])
def test_masks_reach_every_block(re_attention_blocks):
    """Causal, the class token, which is the first, sees nothing of an image; masked, a patch reaches no other token."""
    torch.manual_seed(0)
    model = tiny(re_attention_blocks=re_attention_blocks).eval()
    images, others = torch.randn(2, 2, 3, 32, 32)
    torch.testing.assert_close(model(images, is_causal=True), model(others, is_causal=True))
    assert not torch.allclose(model(images), model(others))
    seqlen = model.pos_embed.shape[1]
    mask = (torch.arange(seqlen) < seqlen - 1)[None, None, None]
    changed = images.clone()
    changed[..., -model.patch_size :, -model.patch_size :] += 1
    found, expected = (model.forward_features(x, mask)[:, :-1] for x in (changed, images))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(model.forward_features(changed)[:, :-1], model.forward_features(images)[:, :-1])
    final, intermediates = model.forward_intermediates(images, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(final, model.forward_features(images, mask, is_causal=True))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_features(images, mask, True), final)
    maps = model.blocks[0].attn.attention_maps(torch.randn(1, seqlen, model.embed_dim), mask, True)
    assert all(not each.triu(1).any() and not each[..., -1].any() for each in maps)
