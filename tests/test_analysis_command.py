"""``python -m reattn.analysis`` on a few generated images with a tiny model, and what it says of bad arguments."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import library

for name in ("matplotlib", "PIL", "tqdm"):
    pytest.importorskip(name)

from PIL import Image  # noqa: E402

from reattn.analysis import __main__ as command  # noqa: E402
from reattn.analysis import at_distances, measure_attention, similar_blocks  # noqa: E402
from reattn.analysis.images import (  # noqa: E402
    Preprocessing,
    UnreadableImageError,
    check_images,
    find_images,
    image_batches,
)
from reattn.analysis.load import as_transformers_says, build_model, load_weights, parse_arguments  # noqa: E402
from reattn.models import DeepViT, create_model  # noqa: E402

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 4, "num_heads": 3, "num_classes": 5}
TINY_ARGUMENTS = [f"{name}={value}" for name, value in TINY.items()]
FIGURES = (
    "similarity",
    "similar_blocks",
    "similarity_matrix",
    "head_similarity",
    "feature_maps",
    "query_maps",
    "rollout",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index, (width, height) in enumerate([(20, 30), (40, 18), (16, 16), (33, 21), (50, 50)]):
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        name = f"more/{index}.PNG" if index % 2 else f"{index}.png"
        Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())).save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = DeepViT(**TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@pytest.fixture(scope="module")
def run(images, model, tmp_path_factory):
    """The command as a user starts it, without a display, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("run")
    # Its head counts other classes.
    torch.save({"state_dict": {**model.state_dict(), "head.weight": torch.ones(7, 12)}}, folder / "model.pth")
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    arguments = ["--model", "deepvit_16b", "--model-args", *TINY_ARGUMENTS, "--checkpoint", folder / "model.pth"]
    arguments += ["--images", images, "--out", folder / "new" / "out", "--batch-size", 2, "--blocks", 1, -1]
    finished = subprocess.run(
        [sys.executable, "-m", "reattn.analysis", *map(str, arguments), "--device", "cpu"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished, folder / "new" / "out"


def test_files(run):
    finished, folder = run
    expected = {f"{name}.{extension}" for name in FIGURES for extension in ("png", "svg")} | {"analysis.json"}
    assert set(os.listdir(folder)) == expected
    assert all((folder / name).stat().st_size > 500 for name in expected)
    assert "analysis.json and 14 pictures" in finished.stdout
    assert "random" not in finished.stdout + finished.stderr


def test_numbers(run, images, model):
    record = json.loads((run[1] / "analysis.json").read_text())
    assert record["weights"].endswith("model.pth")
    assert record["images"]["number"] == 5
    assert record["images"]["files"] == ["0.png", "2.png", "4.png", "more/1.PNG", "more/3.PNG"]
    assert [block["name"] for block in record["blocks"]] == [f"blocks.{index}.attn" for index in range(4)]
    assert sorted(name for name in record["figures"] if name.endswith("png")) == sorted(f"{n}.png" for n in FIGURES)
    preprocessing = Preprocessing.of(model)
    measured = measure_attention(model, torch.cat([*image_batches(find_images(images), preprocessing, 5)]))
    assert set(record["maps"]) == {"re_attention", "softmax"}
    for kind, numbers in record["maps"].items():
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(torch.tensor(numbers["similarity_matrix"]), measured.blocks[kind], **close)
        torch.testing.assert_close(torch.tensor(numbers["head_similarity"]), torch.stack(measured.heads[kind]), **close)
        torch.testing.assert_close(
            torch.tensor(numbers["token_similarity"]), torch.stack(measured.tokens[kind]), **close
        )
        by_distance = at_distances(measured.blocks[kind])
        for distance, (number, share) in similar_blocks(by_distance).items():
            assert numbers["similar_blocks"][str(distance)] == {"number": number, "share": share}
            torch.testing.assert_close(
                torch.tensor(numbers["block_similarity"][str(distance)]), by_distance[distance], **close
            )
    samples = record["samples"]
    assert set(samples["query_maps"]["blocks"]) == set(samples["feature_strength"]) == {"1", "3"}
    assert torch.tensor(samples["rollout"]["maps"]["softmax"]).shape == (4, 4, 4)
    assert torch.tensor(samples["query_maps"]["blocks"]["3"]).shape == (3, 4, 4)


@pytest.fixture
def start(monkeypatch, images, tmp_path, capsys):
    """The command in this process, without drawing anything into files."""
    monkeypatch.setattr(command.plots, "save_figure", lambda figure, folder, name: folder.mkdir(exist_ok=True) or [])

    def start(*arguments, model="deepvit_16b", model_args=TINY_ARGUMENTS, images=images, out=tmp_path / "out"):
        given = ["--model", model, "--images", str(images), "--out", str(out), "--device", "cpu"]
        given += ["--model-args", *model_args] if model_args else []
        command.main([*given, *map(str, arguments)])
        return json.loads((out / "analysis.json").read_text()), capsys.readouterr()

    return start


def test_random_weights_of_a_plain_model(start, run):
    record, output = start(
        "--limit", 2, "--compare", run[1] / "analysis.json", model_args=[*TINY_ARGUMENTS, "attention=self", "depth=2"]
    )
    assert "No --checkpoint: the weights are random" in output.err
    assert record["weights"] == "random"
    assert record["images"]["files"] == ["0.png", "4.png"]
    # Nothing is mixed: one kind of maps, and distances that the depth allows.
    assert set(record["maps"]) == {"softmax"} and set(record["maps"]["softmax"]["block_similarity"]) == {"1"}
    assert "plain attention" in output.out


@pytest.mark.libraries
def test_timm(start, tmp_path):
    timm = library("timm")
    arguments = ["img_size=32", "patch_size=8", "embed_dim=12", "depth=3", "num_heads=3"]
    model = timm.create_model("vit_tiny_patch16_224", **{n: int(v) for n, v in (a.split("=") for a in arguments)})
    torch.save({**model.state_dict(), "head.weight": torch.ones(7, 12), "head.bias": torch.ones(7)}, tmp_path / "w.pth")
    record, _ = start(
        "--checkpoint", tmp_path / "w.pth", "--query", 3, model="timm:vit_tiny_patch16_224", model_args=arguments
    )
    assert [block["attention"] for block in record["blocks"]] == ["Attention"] * 3
    assert (record["images"]["preprocessing"]["height"], record["samples"]["query"]) == (32, 3)


@pytest.mark.libraries
def test_timm_model_with_unknown_attention(start, capsys):
    library("timm")
    for model, message in (
        ("timm:swin_tiny_patch4_window7_224", "--model: timm:swin_tiny_patch4_window7_224: model must hold modules"),
        ("timm:nothing", "--model: must be timm: and a name of timm.list_models(), got 'nothing'"),
    ):
        with pytest.raises(SystemExit):
            start(model=model, model_args=())
        assert message in " ".join(capsys.readouterr().err.split())


def test_interrupted_run_leaves_the_last_result(start, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "analysis.json").write_text("old")
    monkeypatch.setattr(command, "look_at_samples", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start("--limit", 1)
    assert os.listdir(tmp_path / "out") == ["analysis.json"]
    assert (tmp_path / "out" / "analysis.json").read_text() == "old"


def encoder():
    layer = torch.nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Vit(torch.nn.Module):
    """A model of one's own, of PyTorch's layers."""

    def __init__(self, width=12):
        super().__init__()
        self.default_cfg = {"input_size": (1, 16, 20), "mean": (0.4,)}
        self.grid_size, self.num_prefix_tokens = (4, 5), 0
        self.embed = torch.nn.Conv2d(1, width, 4, stride=4)
        self.encoder = encoder()

    def forward(self, images):
        return self.encoder(self.embed(images).flatten(2).mT)


class Shuffled(Vit):
    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        return self.encoder(tokens[:, torch.randperm(tokens.shape[1])])


def test_model_that_draws_at_random_is_refused(start, capsys):
    with pytest.raises(SystemExit):
        start(model="test_analysis_command:Shuffled", model_args=[])
    error = " ".join(capsys.readouterr().err.split())
    assert "test_analysis_command:Shuffled: must see an image the same way each time, but draws at random" in error


def vit_of_folder(folder):
    return library("transformers").ViTModel.from_pretrained(folder)


@pytest.mark.libraries
def test_masked_autoencoder(start, tmp_path, capsys):
    """Its patches are shuffled and masked at random; the same weights in a ViT see all of them in their places."""
    transformers = library("transformers")
    sizes = {f"decoder_{name}": value for name, value in HF.items() if name != "patch_size"}
    # 14 x 14 patches, of which a quarter is a square, too.
    config = transformers.ViTMAEConfig(**HF, image_size=112, **sizes)
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    for model_args in ([], ["mask_ratio=0.0"]):
        with pytest.raises(SystemExit):
            start(model=f"hf:{tmp_path}", model_args=model_args)
        error = " ".join(capsys.readouterr().err.split())
        assert "draws at random in eval mode, as ViTMAE's masks do. Of ViTMAE a function def vit()" in error
    record, _ = start("--limit", 1, model="test_analysis_command:vit_of_folder", model_args=[f"folder={tmp_path}"])
    assert record["grid"] == {"num_prefix_tokens": 1, "height": 14, "width": 14}


@pytest.mark.libraries
def test_tokens_that_join_late_or_stand_last(start, tmp_path):
    library("timm")
    arguments = ["img_size=32", "embed_dim=12", "depth=2", "num_heads=3"]
    record, _ = start("--limit", 1, model="timm:cait_xxs24_224", model_args=arguments)
    assert record["grid"] == {"num_prefix_tokens": 0, "height": 2, "width": 2}
    transformers = library("transformers")
    config = transformers.YolosConfig(**HF, image_size=[16, 32], num_detection_tokens=3)
    transformers.YolosModel(config).save_pretrained(tmp_path)
    record, _ = start("--limit", 1, "--query", 10, model=f"hf:{tmp_path}", model_args=[])
    assert record["grid"] == {"num_prefix_tokens": 1, "height": 2, "width": 4} and record["blocks"][0]["seqlen"] == 12


def test_function_that_makes_a_model(start):
    record, output = start("--limit", 2, model="test_analysis_command:Vit", model_args=["width=12"])
    assert [block["name"] for block in record["blocks"]] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert record["weights"] == "test_analysis_command:Vit" and "random" not in output.err
    assert record["images"]["preprocessing"]["width"] == 20 and record["grid"]["width"] == 5


def test_figures_name_model_images_and_what_is_compared(start, run, monkeypatch):
    figures = {}
    monkeypatch.setattr(
        command.plots, "save_figure", lambda figure, folder, name: figures.setdefault(name, figure) and []
    )
    start("--compare", run[1] / "analysis.json", "--query", 6, model="test_analysis_command:Vit", model_args=[])
    assert set(figures) == set(FIGURES)
    for name, figure in figures.items():
        # Not where some of them are drawn.
        number = "" if name in ("feature_maps", "query_maps", "rollout") else ", 5 images"
        assert figure.get_suptitle().split("\n")[0].startswith(f"test_analysis_command:Vit{number}")
        assert ("5 images" in figure.get_suptitle().split("compared")[0]) == bool(number)
    # The patch of --query, of 4 x 4 pixels, in the one image of each block and in those above the rollouts.
    images = [axes for name in ("query_maps", "rollout") for axes in figures[name].axes if axes.patches]
    assert len(images) == 2 + 4
    assert all(frame.get_bbox().bounds == (3.5, 3.5, 4, 4) for axes in images for frame in axes.patches)
    assert (
        figures["query_maps"]
        .get_suptitle()
        .endswith("the patch in row 1, column 1 attends to in 0.png, plain attention")
    )
    other = f"deepvit_16b ({', '.join(TINY_ARGUMENTS)})"
    assert f"compared with {other}, 5 images" in figures["similar_blocks"].get_suptitle().replace("\n", " ")
    assert [text.get_text() for text in figures["similar_blocks"].legends[0].get_texts()] == [
        "plain attention: test_analysis_command:Vit",
        f"re-attention: {other}",
        f"before mixing: {other}",
    ]
    # From every folder in turn.
    titles = [axes.get_title() for axes in figures["rollout"].axes[:4]]
    assert titles == ["0.png", "more/1.PNG", "2.png", "more/3.PNG"]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((5,), "a0 a1 a2 a3"), ((1, 1, 5), "a0 b0 c0 c1"), ((2,) * 8, "a0 c0 e0 g0"), ((1, 1), "a0 b0")],
)
def test_samples_are_spread_over_folders(counts, expected):
    paths = [Path(name, str(index)) for name, count in zip("abcdefgh", counts, strict=False) for index in range(count)]
    assert [f"{p.parent}{p.name}" for p in command.spread_over_folders(paths, 4)] == expected.split()


@pytest.mark.libraries
def test_torchvision(start, capsys):
    library("torchvision")
    record, output = start("--limit", 1, model="torchvision:vit_b_32", model_args=["image_size=64", "num_classes=3"])
    assert record["weights"] == "random" and "No --checkpoint: the weights are random" in output.err
    assert [block["attention"] for block in record["blocks"]] == ["MultiheadAttention"] * 12
    prepared = record["images"]["preprocessing"]
    # torchvision's own, but for the size that was asked for.
    assert prepared["mean"] == [0.485, 0.456, 0.406] and (prepared["height"], prepared["crop_pct"]) == (64, 224 / 256)
    for name in ("nothing", "swin_t"):
        with pytest.raises(SystemExit):
            start(model=f"torchvision:{name}", model_args=())
    error = " ".join(capsys.readouterr().err.split())
    assert "--model: must be torchvision: and a name of torchvision.models.list_models(), got 'nothing'" in error
    assert "features.1.0.attn and 11 more (ShiftedWindowAttention): it holds relative_position_bias_table" in error


HF = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 8, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "ViT": ("ViTForImageClassification", "ViTImageProcessor", {"size": SQUARE}),
    "DeiT": ("DeiTModel", "DeiTImageProcessor", {"size": {"height": 37, "width": 37}, "crop_size": SQUARE}),
    "Dinov2": ("Dinov2Model", "BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": SQUARE}),
    "Siglip": ("SiglipVisionModel", "SiglipImageProcessor", {"size": SQUARE}),
}


@pytest.mark.libraries
@pytest.mark.parametrize("family", PROCESSORS)
def test_transformers_folder(family, images, tmp_path):
    """The weights of the folder, and the pixels that its own processor makes."""
    transformers = library("transformers")
    model, processor, options = PROCESSORS[family]
    config = getattr(transformers, "SiglipVisionConfig" if family == "Siglip" else f"{family}Config")
    saved = getattr(transformers, model)(config(**HF, image_size=32))
    saved.save_pretrained(tmp_path)
    getattr(transformers, processor)(**options).save_pretrained(tmp_path)
    source = build_model(f"hf:{tmp_path}", {})
    assert source.weights == str(tmp_path) and type(source.model) is type(saved)
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(source.model.state_dict()[name], value)
    for path in find_images(images):
        expected = getattr(transformers, processor)(**options)(Image.open(path), return_tensors="pt")
        # Both round to whole numbers after resizing.
        torch.testing.assert_close(
            source.preprocessing.read(path), expected["pixel_values"][0], rtol=0, atol=1.01 / 255 / 0.2
        )


@pytest.mark.libraries
def test_transformers_folder_in_the_command(start, tmp_path, capsys):
    transformers = library("transformers")
    part = {**HF, "image_size": 16}
    del part["patch_size"]
    text = {**part, "vocab_size": 20}
    config = transformers.CLIPConfig(vision_config={**part, "patch_size": 4}, text_config=text)
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path / "clip")
    record, output = start("--limit", 2, model=f"hf:{tmp_path / 'clip'}", model_args=())
    # The part that sees; how images are prepared is in no file.
    assert [block["heads"] for block in record["blocks"]] == [3, 3] and record["grid"]["height"] == 4
    assert "How to prepare images is not known: Preprocessing(channels=3, height=16" in output.err
    assert "random" not in output.err
    # A processor of transformers 5 writes one file for text and images.
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    whole = transformers.CLIPProcessor(image_processor=processor, tokenizer=transformers.CLIPTokenizer())
    whole.save_pretrained(tmp_path / "clip")
    assert not (tmp_path / "clip" / "preprocessor_config.json").exists()
    prepared = build_model(f"hf:{tmp_path / 'clip'}", {}).preprocessing
    assert (prepared.height, prepared.crop_pct, prepared.mean) == (16, 0.8, tuple(processor.image_mean))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "clip" / "config.json").read_text())
    record, output = start("--limit", 2, model=f"hf:{tmp_path / 'bare'}", model_args=())
    assert record["weights"] == "random" and "the weights are random" in output.err
    # Weights that are missing would be random, and nobody told.
    (tmp_path / "vit").mkdir()
    transformers.ViTConfig(**HF, image_size=32).save_pretrained(tmp_path / "vit")
    for name in ("model.safetensors", "preprocessor_config.json"):
        (tmp_path / "vit" / name).write_bytes((tmp_path / "clip" / "model.safetensors").read_bytes())
        with pytest.raises(SystemExit):
            start(model=f"hf:{tmp_path / 'vit'}", model_args=())
        error = " ".join(capsys.readouterr().err.split())
        assert "model.safetensors must hold every weight of transformers.models.vit.modeling_vit.ViTModel" in error
    with pytest.raises(SystemExit):
        start(model=f"hf:{tmp_path / 'bare'}", model_args=("nothing=3",))
    assert "nothing must be in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": False}, "images must be cropped to one size, got shortest_edge without do_center_crop"),
        ({"crop_size": 50}, r"images must be resized to no less than the crop, got \(40, 40\) and \(50, 50\)"),
        ({"do_resize": False}, "do_resize must be true or missing, got False"),
        ({"do_resize": None}, "do_resize must be true or missing, got None"),
        ({"do_rescale": None}, "do_rescale must be true or missing, got None"),
        ({"do_flip_channel_order": True}, r"do_flip_channel_order must be false or missing, got \[True\]"),
        ({"do_grayscale": True}, "do_grayscale must be false or missing"),
        ({"do_pad": True, "pad_size": {"height": 64, "width": 64}}, "do_pad must be false or missing"),
        ({"rescale_offset": True, "crop_pct": 0.5}, r"rescale_offset, crop_pct must be .*, got \[True, 0.5\]"),
        ({"resample": None}, "'resample' is missing or unknown"),
        ({"size": None}, "'size' is missing or unknown"),
        ({"size": SQUARE, "crop_size": None}, "'crop_size' is missing or unknown"),
        ({"rescale_factor": 1 / 127.5}, "pixels must be rescaled by 1 / 255"),
        ({"resample": 5}, "5 is missing or unknown"),
        ({"image_mean": None}, "'image_mean' is missing or unknown"),
    ],
)
def test_preprocessing_that_is_not_followed(changes, message, tmp_path):
    config = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    assert as_transformers_says(path) == Preprocessing(3, 32, 32, crop_pct=0.8)
    path.write_text(json.dumps(config | {"do_grayscale": None, "do_pad": False, "do_convert_rgb": True}))
    assert as_transformers_says(path) == Preprocessing(3, 32, 32, crop_pct=0.8)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="preprocessor_config.json cannot be followed: 'list' object"):
        as_transformers_says(path)
    path.write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"preprocessor_config.json cannot be followed: .*({message})"):
        as_transformers_says(path)


@pytest.mark.libraries
def test_null_is_what_it_is_in_transformers(images, tmp_path):
    """A step that is null is not done."""
    transformers = library("transformers")
    config = transformers.ViTImageProcessor(size=SQUARE, resample=3).to_dict() | {"do_normalize": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    prepared = as_transformers_says(tmp_path / "preprocessor_config.json")
    with Image.open(images / "0.png") as opened:
        expected = transformers.ViTImageProcessor.from_pretrained(tmp_path)(opened, return_tensors="pt")
    torch.testing.assert_close(prepared.read(images / "0.png"), expected["pixel_values"][0], rtol=0, atol=1.01 / 255)


def bad_checkpoint(tmp_path):
    torch.save({"weights": 3}, tmp_path / "bad.pth")
    return ["--checkpoint", tmp_path / "bad.pth"]


def other_checkpoint(tmp_path):
    torch.save(create_model("deepvit_16b", **{**TINY, "depth": 5}).state_dict(), tmp_path / "other.pth")
    return ["--checkpoint", tmp_path / "other.pth"]


def no_json(tmp_path):
    (tmp_path / "no.json").write_text('{"maps": 3}')
    return ["--compare", tmp_path / "no.json"]


BAD = {
    "model": (
        {"model": "deepvit_17b"},
        [],
        r"--model.*: must be one of deepvit_16b, .*, or timm:NAME, hf:FOLDER, .* or MODULE:FUNCTION, got 'deepvit_17b'",
    ),
    "model-args": ({"model_args": ["depth"]}, [], r"--model-args must be NAME=VALUE, got 'depth'"),
    "unknown-arg": (
        {"model_args": ["width=3"]},
        [],
        r"--model and --model-args: .*unexpected keyword argument 'width'",
    ),
    "value-of-arg": ({"model_args": ["img_size=17"]}, [], r"--model and --model-args: img_size must be divisible by"),
    "module": ({"model": "json:load"}, [], r"--model.*: json:load raised TypeError: load\(\) missing"),
    "no-module": ({"model": "nowhere:vit"}, [], r"--model.*or MODULE:FUNCTION, got 'nowhere:vit': No module named"),
    "no-function": ({"model": "json:vit"}, [], r"--model.*got 'json:vit': module 'json' has no attribute 'vit'"),
    "no-model": (
        {"model": "os:getcwd", "model_args": []},
        [],
        r"--model: os:getcwd must return a torch.nn.Module, got st",
    ),
    "no-size": (
        {"model": "test_analysis_command:encoder", "model_args": []},
        [],
        r"--model: test_analysis_command:encoder: model must have a default_cfg or pretrained_cfg with an input_size",
    ),
    "no-hf-folder": ({"model": "hf:/nonexistent"}, [], r"--model.*must be hf: and a folder with a config.json"),
    "one-block": (
        {"model_args": [*TINY_ARGUMENTS, "depth=1"]},
        [],
        r"--model: .* must have two attention blocks or more",
    ),
    "no-folder": ({"images": "/nonexistent"}, [], r"--images: images must be a folder, got /nonexistent"),
    "no-file": ({}, ["--checkpoint", "/nonexistent"], r"--checkpoint must be a file, got /nonexistent"),
    "checkpoint-and-folder": (
        {"model": "hf:folder"},
        bad_checkpoint,
        r"--checkpoint must not be given with --model hf:FOLDER: put the weights into the folder",
    ),
    "checkpoint": ({}, bad_checkpoint, r"--checkpoint: .*bad.pth: checkpoint must be a state dict"),
    "misfit": ({}, other_checkpoint, r"--checkpoint: .*other.pth: .*unexpected: blocks.4"),
    "device": ({}, ["--device", "nothing"], r"--device must be one that torch can use here, got 'nothing'"),
    "batch-size": ({}, ["--batch-size", 0], r"--batch-size must be at least 1, got 0"),
    "limit": ({}, ["--limit", -1], r"--limit must be at least 1, got -1"),
    "blocks": ({}, ["--blocks", 4, 1, -5], r"--blocks must lie in \[-4, 4\) for 4 blocks, got \[4, -5\]"),
    "query": ({}, ["--query", 17], r"--query must be a token, at least 0 and below 17, got 17"),
    "compare": ({}, no_json, r"--compare must be an analysis.json of this command, got .*no.json"),
}


@pytest.mark.parametrize("options, arguments, message", BAD.values(), ids=BAD)
def test_bad_arguments(start, tmp_path, capsys, options, arguments, message):
    with pytest.raises(SystemExit) as ended:
        start(*(arguments(tmp_path) if callable(arguments) else arguments), **options)
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_bad_images(start, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for contents, message in (
        (None, "images must be a folder with images (.bmp"),
        (b"nothing", "a.png cannot be read as an image"),
    ):
        if contents:
            (folder / "a.png").write_bytes(contents)
        with pytest.raises(SystemExit):
            start(images=folder)
        assert f"--images: {message}" in capsys.readouterr().err.replace(f"{folder}{os.sep}", "")
    # Whole in its header, cut off after.
    Image.new("RGB", (200, 200), "red").save(folder / "a.png", compress_level=0)
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        start(images=folder)
    assert "cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "out" / "analysis.json").exists()


def test_damaged_safetensors(start, tmp_path, capsys):
    pytest.importorskip("safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        start("--checkpoint", tmp_path / "bad.safetensors")
    assert f"--checkpoint: {tmp_path / 'bad.safetensors'}: " in " ".join(capsys.readouterr().err.split())


def test_out_is_a_file(start, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        start(out=tmp_path / "file" / "below")
    assert "--out must be a folder that can be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(out=tmp_path / "file")
    assert "--out must be a folder or not exist yet" in capsys.readouterr().err


def test_preprocessing(images, tmp_path):
    preprocessing = Preprocessing.of(create_model("deepvit_16b"))
    assert (preprocessing.height, preprocessing.crop_pct, preprocessing.interpolation) == (224, 0.9, "bicubic")
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert Preprocessing.of(DeepViT(**{**TINY, "in_chans": 1})).channels == 1

    tiny = Preprocessing(3, 9, 9, crop_pct=0.9)
    with Image.open(images / "more" / "1.PNG") as opened:
        expected = opened.convert("RGB").resize((40 * 10 // 18, 10), Image.Resampling.BICUBIC)
    left, top = round((expected.width - 9) / 2), round((expected.height - 9) / 2)
    image = tiny.read(images / "more" / "1.PNG")
    assert image.shape == (3, 9, 9)
    for y in range(9):
        for x in range(9):
            pixel = torch.tensor(expected.getpixel((left + x, top + y))) / 255
            torch.testing.assert_close(image[:, y, x], (pixel - 0.5) / 0.5)
    torch.testing.assert_close(tiny.to_display(image), image / 2 + 0.5)
    # One channel, and a size that is no square, squashed or not.
    assert Preprocessing(1, 6, 12, mean=(0.0,), std=(1.0,)).read(images / "0.png").shape == (1, 6, 12)
    assert Preprocessing(3, 6, 12, crop_pct=1.0, squash=True).read(images / "0.png").shape == (3, 6, 12)
    Image.new("RGB", (30, 20), "white").save(tmp_path / "white.png")
    assert Preprocessing(3, 8, 8).read(tmp_path / "white.png").unique().tolist() == [1.0]
    with pytest.raises(ValueError, match="channels must be 1 or 3 to read image files, got 4"):
        Preprocessing(4, 8, 8)
    with pytest.raises(ValueError, match="interpolation must be one of .*, got 'random'"):
        Preprocessing(3, 8, 8, interpolation="random")
    with pytest.raises(ValueError, match="model must have a default_cfg or pretrained_cfg with an input_size"):
        Preprocessing.of(torch.nn.Linear(2, 2))


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
GREY = Image.fromarray((RAMP * 255).round().astype(np.uint8))
MODES = {
    "16 bits": ("ramp.png", Image.fromarray((RAMP * 65535).astype(np.uint16)), {}),
    "16 bits, big-endian": ("ramp.tif", Image.fromarray((RAMP * 65535).astype(">u2")), {}),
    "16 bits, widened": ("ramp.ppm", Image.fromarray((RAMP * 65535).astype(np.int32)), {}),
    "floats": ("ramp.tif", Image.fromarray(RAMP.astype(np.float32)), {}),
    "8 bits": ("ramp.png", GREY, {}),
    "opaque": ("ramp.png", GREY.convert("LA"), {}),
    "opaque palette": ("ramp.tif", GREY.convert("PA"), {}),
    "opaque table": ("ramp.png", GREY.convert("P"), {"transparency": bytes([255] * 256)}),
    "print": ("ramp.tif", GREY.convert("CMYK"), {}),
    # Tag 262 is 0: white is. Pillow inverts pixels of 8 bits as it writes them, and no others.
    "white is 0": ("ramp.tif", GREY, {"tiffinfo": {262: 0}}),
    "16 bits, white is 0": (
        "ramp.tif",
        Image.fromarray(((1 - RAMP) * 65535).astype(np.uint16)),
        {"tiffinfo": {262: 0}},
    ),
    "floats, white is 0": ("ramp.tif", Image.fromarray((1 - RAMP).astype(np.float32)), {"tiffinfo": {262: 0}}),
}
PRECISE = [mode for mode in MODES if mode.startswith(("16 bits", "floats"))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_is_kept_in_every_mode(mode, channels, tmp_path):
    """A ramp from black to white, which is as bright when half as large, in whatever a file holds it."""
    name, image, options = MODES[mode]
    image.save(tmp_path / name, **options)
    check_images([tmp_path / name])
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    pixels = Preprocessing(channels, 32, 32, crop_pct=1.0, interpolation="bilinear", mean=zeros, std=ones).read(
        tmp_path / name
    )
    # Bilinear resizing to the half weighs four pixels: what lies around the middle of two is linear but at the border.
    expected = torch.from_numpy(RAMP).float().view(32, 2, 32, 2).mean((1, 3))
    assert pixels.shape == (channels, 32, 32)
    rounding = 1e-4 if mode in PRECISE else 0.01
    torch.testing.assert_close(
        pixels[:, 1:-1, 1:-1], expected[1:-1, 1:-1].expand(channels, -1, -1), rtol=0, atol=rounding
    )


@pytest.mark.parametrize(
    ("name", "image", "options", "message"),
    [
        ("x.tif", Image.fromarray((RAMP * 9e4).astype(np.int32)), {}, "got pixels from 0 to 90000 in mode I: save it"),
        ("x.tif", Image.fromarray((RAMP * 255).astype(np.float32)), {}, "got pixels from 0 to 255 in mode F: save it"),
        ("x.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32)), {}, "got pixels from nan to nan in mode F"),
        ("x.png", Image.merge("LA", [GREY, GREY]), {}, "got transparent pixels in mode LA: lay it on a background"),
        ("x.png", GREY.convert("P"), {"transparency": 0}, "got transparent pixels in mode P"),
        ("x.png", GREY.convert("RGB"), {"transparency": (9, 9, 9)}, "got transparent pixels in mode RGB"),
        ("x.png", MODES["16 bits"][1], {"transparency": 65535}, "got transparent pixels in mode I"),
    ],
    ids=lambda value: value if isinstance(value, str) and "mode" in value else "",
)
def test_images_of_no_certain_brightness(name, image, options, message, tmp_path):
    image.save(tmp_path / name, **options)
    with pytest.raises(UnreadableImageError, match=f"{name} cannot be read as an image: .*{message}"):
        check_images([tmp_path / name])


def test_colour_that_no_pixel_has_is_not_transparent(tmp_path):
    Image.new("I;16", (8, 8), 65535).save(tmp_path / "white.png", transparency=3)
    assert Preprocessing(3, 8, 8).read(tmp_path / "white.png").unique().tolist() == [1.0]


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, -1), (8, 1)])
def test_images_are_upright(name, mode, orientation, turns, tmp_path):
    """As EXIF says that they are to be turned: once, in whatever format."""
    if mode == "I;16" and name in ("x.jpg", "x.webp"):
        pytest.skip("the format has 8 bits alone")
    image = Image.new(mode, (32, 16), 65535 if mode == "I;16" else "white")
    image.paste(0 if mode == "I;16" else "black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / name, **({"tiffinfo": {274: orientation}} if name == "x.tif" else {"exif": exif}))
    stored = torch.ones(16, 32)
    stored[:, :16] = 0
    height, width = (16, 32) if turns == 0 else (32, 16)
    prepared = Preprocessing(1, height, width, crop_pct=1.0, interpolation="nearest", mean=(0.0,), std=(1.0,))
    torch.testing.assert_close(prepared.read(tmp_path / name)[0], stored.rot90(turns), rtol=0, atol=0.05)


def test_limit_is_spread(images):
    names = [path.name for path in find_images(images)]
    assert [path.name for path in find_images(images, 2)] == [names[0], names[2]]
    assert [path.name for path in find_images(images, 9)] == names


@pytest.mark.libraries
def test_preprocessing_is_timms(images):
    library("timm")
    transforms = library("timm.data.transforms_factory")
    reference = transforms.transforms_imagenet_eval(
        img_size=20, crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    for path in find_images(images):
        with Image.open(path) as opened:
            expected = reference(opened.convert("RGB"))
        torch.testing.assert_close(Preprocessing(3, 20, 20).read(path), expected)


def test_parse_arguments():
    assert parse_arguments(["a=1", "b=layer", "c=(1, 2)", "d=None", "e=x=y"]) == {
        "a": 1,
        "b": "layer",
        "c": (1, 2),
        "d": None,
        "e": "x=y",
    }


def test_load_weights_is_strict(model, tmp_path):
    torch.save({key: value for key, value in model.state_dict().items() if "norm1" not in key}, tmp_path / "part.pth")
    with pytest.raises(RuntimeError, match="missing: blocks.0.norm1.weight"):
        load_weights(DeepViT(**TINY), tmp_path / "part.pth")
