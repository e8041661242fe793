"""``examples/train.py``: runs killed and resumed, runs on two processes, and what else it promises.

Each run is a fresh process, or two, forked from one that has imported everything: imports take longer than these runs.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("sklearn", "tqdm"):
    pytest.importorskip(name)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from libraries import library  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"

pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
two_processes = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch built with gloo")

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "REATTN_BACKEND"}
# Two threads in the process that forks would be one too many.
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# Reads jobs, a line each, and answers with the exit statuses of their processes.
SERVER = """
import json, os, signal, socket, sys

sys.path.insert(0, sys.argv[1])
import sklearn.datasets, sklearn.model_selection
import torch, train


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name, number):
    # The process kills itself at the number-th call of what is named.
    calls = 0
    owner = {"step": torch.optim.AdamW, "fsync": os, "replace": os}[name]
    original = getattr(owner, name)

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == number:
            if name == "fsync":  # as if half of the file had arrived
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            die()
        return original(*arguments, **keywords)

    setattr(owner, name, counted)


def run(job, rank, port):
    out = os.open(job["log"] + f".{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if job["world"] > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(job["world"])}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if job["double"]:  # whatever the script holds in float32
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    if job["kill"] and rank == 0:
        arm(*job["kill"])
    try:
        train.main(job["arguments"])
        status = 0
    except SystemExit as exit:
        print(exit, file=sys.stderr)
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    job = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["world"]):
        child = os.fork()
        if child == 0:
            run(job, rank, port)
        children.append(child)
    statuses = {}
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child]:  # as torchrun does it
            for other in children:
                if other not in statuses:
                    os.kill(other, signal.SIGKILL)
    print(json.dumps([statuses[child] for child in children]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(SCRIPT.parent)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def launch(server, tmp_path_factory):
    """Runs train.py on a tiny model; returns what each process printed."""
    log = str(tmp_path_factory.mktemp("logs") / "log")

    def launch(*arguments, out, world=1, kill=None, double=False, status=0):
        tiny = ["--dim", 16, "--depth", 2, "--heads", 2, "--device", "cpu", "--out", out, *arguments]
        job = {"arguments": list(map(str, tiny)), "world": world, "kill": kill, "double": double, "log": log}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        printed = [Path(f"{log}.{rank}").read_text() for rank in range(world)]
        assert statuses[0] == (-signal.SIGKILL if kill else status), "\n".join(printed)
        return printed

    return launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def results(out):
    return json.loads((out / "results.json").read_text())


def assert_same(first, second, where=""):
    """Bit for bit, in whatever is nested."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where} {key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where} {index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def assert_same_run(first, second):
    """Two folders whose runs ended alike: weights, averages, optimizer, generators, and every line of the log."""
    states = [checkpoint(out) for out in (first, second)]
    for state in states:
        del state["arguments"]
    assert_same(*states)
    assert (first / "log.csv").read_bytes() == (second / "log.csv").read_bytes()


def assert_close_run(first, second, tolerance):
    """Two folders whose runs differ by rounding."""
    for name in ("model", "ema"):
        states = [checkpoint(out)[name] for out in (first, second)]
        torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)
    records = [results(out) for out in (first, second)]
    for name in ("train_loss", "test_loss", "ema_test_loss"):
        assert records[0][name] == pytest.approx(records[1][name], rel=tolerance)


# 12 steps in an epoch, the last one smaller; checkpoints after 7, 12, 14, 21 and 24.
CHAIN = ("--epochs", 2, "--batch-size", 128, "--checkpoint-every", 7, "--drop-path", 0.3)

# Without the convolutional stem: 16-bit convolutions take long on a CPU.
PLAIN = ("--model", "deepvit_16b", "--patch-size", 2)


def test_killed_and_resumed(launch, tmp_path):
    """SIGKILL in the middle of an epoch, in the middle of writing, before and after the new file takes its place."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(*CHAIN, out=whole)
    launch(*CHAIN, out=parts, kill=("step", 10))
    assert (checkpoint(parts)["epoch"], checkpoint(parts)["step"]) == (0, 7)
    # The ends of files and folders are synchronised: of the checkpoint after 12, of the log, then of the next one.
    launch(*CHAIN, "--resume", out=parts, kill=("fsync", 5))
    assert (checkpoint(parts)["epoch"], checkpoint(parts)["step"]) == (1, 0)
    partial = parts / "checkpoint.pt.partial"
    assert 0 < partial.stat().st_size < (parts / "checkpoint.pt").stat().st_size
    launch(*CHAIN, "--resume", out=parts, kill=("replace", 3))
    assert (checkpoint(parts)["epoch"], checkpoint(parts)["step"]) == (1, 9)
    assert len((parts / "log.csv").read_text().splitlines()) == 2
    launch(*CHAIN, "--resume", out=parts, kill=("replace", 2))
    assert checkpoint(parts)["epoch"] == 2
    assert len((parts / "log.csv").read_text().splitlines()) == 2 and not (parts / "results.json").exists()
    launch(*CHAIN, "--resume", out=parts)
    assert_same_run(whole, parts)
    assert not list(parts.glob("*.partial"))


def test_scaler_is_resumed(launch, tmp_path):
    """With layer norm, and in float16, whose scaler has a state of its own."""
    options = (*PLAIN, "--epochs", 1, "--batch-size", 128, "--checkpoint-every", 2, "--norm", "layer", "--amp", "fp16")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(*options, out=whole)
    assert checkpoint(whole)["scaler"]["scale"] > 1
    launch(*options, out=parts, kill=("step", 6))
    launch(*options, "--resume", out=parts)
    assert_same_run(whole, parts)


@two_processes
@pytest.mark.slow
def test_two_processes_killed_and_resumed(launch, tmp_path):
    """Each has its own generator for drop path, which goes on where it was."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(*CHAIN, out=whole, world=2)
    first, second = (rank["generator"] for rank in checkpoint(whole)["ranks"])
    assert not torch.equal(first, second)
    launch(*CHAIN, out=parts, world=2, kill=("step", 19))
    assert (checkpoint(parts)["epoch"], checkpoint(parts)["step"]) == (1, 2)
    launch(*CHAIN, "--resume", out=parts, world=2)
    assert_same_run(whole, parts)


# Three steps in an epoch: of 718 images, and of one, of which the second process has none. With the eps of AdamW far
# above rounding, what has no gradient but rounding, as a bias of all keys, stays where it is instead of drifting.
EXACT = ("--epochs", 2, "--batch-size", 718, "--adam-eps", 1e-3, "--lr", 0.02, "--backend", "reference")
# What differs by rounding alone: in float64, where anything else would stand out; and in float32 after few steps.
CLOSE, ROUNDED = 1e-9, 1e-4


@pytest.fixture(scope="module")
def alone(launch, folder):
    """The folder of a run on one process in float64, by its norm."""
    done = {}

    def alone(norm):
        if norm not in done:
            done[norm] = folder / norm
            launch(*EXACT, "--norm", norm, out=done[norm], double=True)
        return done[norm]

    return alone


@two_processes
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_two_processes_equal_one(norm, alone, launch, tmp_path):
    printed = launch(*EXACT, "--norm", norm, out=tmp_path, world=2, double=True)
    assert_close_run(alone(norm), tmp_path, CLOSE)
    assert results(tmp_path)["processes"] == 2
    assert "test accuracy" in printed[0] and "test accuracy" not in printed[1]


@two_processes
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_other_number_of_processes_goes_on(world, alone, launch, tmp_path):
    """Killed in the second epoch, on two processes or one, and resumed on one or two."""
    launch(*EXACT, "--checkpoint-every", 1, out=tmp_path, world=world, kill=("step", 6), double=True)
    assert checkpoint(tmp_path)["step"] == 2
    launch(*EXACT, "--resume", out=tmp_path, world=3 - world, double=True)
    assert_close_run(alone("batch"), tmp_path, CLOSE)


@two_processes
@pytest.mark.slow
def test_fsdp(alone, launch, tmp_path):
    """Sharded over two processes, killed and resumed, and its checkpoint: as one process without."""
    launch(*EXACT, "--fsdp", "--checkpoint-every", 2, out=tmp_path, world=2, kill=("step", 6), double=True)
    launch(*EXACT, "--fsdp", "--resume", out=tmp_path, world=2, double=True)
    assert_close_run(alone("batch"), tmp_path, CLOSE)


@two_processes
@pytest.mark.slow
def test_torchrun(launch, tmp_path):
    """The command of the file's docstring, in float32."""
    short = (*EXACT, "--epochs", 1, "--lr", 1e-3)
    launch(*short, out=tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    tiny = ["--dim", 16, "--depth", 2, "--heads", 2, "--device", "cpu", "--out", tmp_path / "two"]
    done = subprocess.run(
        list(map(str, [*command, *tiny, *short])), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert_close_run(tmp_path / "one", tmp_path / "two", ROUNDED)


def test_gradient_checkpointing(launch, alone, tmp_path):
    launch(*EXACT, "--grad-checkpointing", out=tmp_path, double=True)
    assert_close_run(alone("batch"), tmp_path, CLOSE)


def test_bfloat16(launch, tmp_path):
    options = (*PLAIN, "--epochs", 1, "--batch-size", 128)
    launch(*options, out=tmp_path / "float32")
    launch(*options, "--amp", "bf16", out=tmp_path / "bfloat16")
    expected, found = (results(tmp_path / name)["train_loss"] for name in ("float32", "bfloat16"))
    assert found != expected and found == pytest.approx(expected, rel=0.01)


def test_results(alone):
    record = results(alone("batch"))
    assert record["images"] == {"train": 1437, "test": 360}
    assert (record["epoch"], record["steps"], record["processes"], record["device"]) == (2, 6, 1, "cpu")
    assert record["versions"]["torch"] == torch.__version__
    assert record["arguments"]["norm"] == "batch" and record["arguments"]["batch_size"] == 718
    for name in ("test_accuracy", "ema_test_accuracy"):
        right = record[name] * 360
        assert right == pytest.approx(round(right)) and 0 < right <= 360


def test_plain_vit_without_average(launch, tmp_path):
    launch("--attention", "self", "--epochs", 3, "--batch-size", 64, "--ema-decay", 0, "--lr", 5e-3, out=tmp_path)
    record = results(tmp_path)
    assert record["backend"] is None and record["ema_test_accuracy"] is None
    assert record["test_accuracy"] > 0.3
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    assert header.startswith("epoch,steps,learning_rate,train_loss") and len(rows) == 3


@two_processes
def test_similarity_of_maps(launch, tmp_path):
    """In the loss: on one process as on two, which have unequal shares and recompute blocks.

    With layer norm, for batch norm leaves pairs of heads near 0, whose cosine multiplies rounding.
    """
    options = (*EXACT, "--epochs", 1, "--norm", "layer", "--heads", 4, "--depth", 3, "--similarity", 20)
    launch(*options, "--similarity-pairs", 1, out=tmp_path / "one", double=True)
    launch(*options, "--similarity-pairs", 1, "--grad-checkpointing", out=tmp_path / "two", world=2, double=True)
    assert_close_run(tmp_path / "one", tmp_path / "two", CLOSE)
    # Ten classes alike are log(10) = 2.3, which three steps change little; the rest is the cosine.
    assert results(tmp_path / "one")["train_loss"] < 2.1


@pytest.fixture
def images(tmp_path):
    """A folder of images; and torchvision, which reads it."""
    library("torchvision")
    from PIL import Image

    images = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 5), ("val", 2)):
        for name in ("left", "right"):
            (images / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(images / part / name / f"{number}.png")
    return images


FOLDER = ("--image-size", 32, "--patch-size", 8, "--epochs", 2, "--batch-size", 7, "--adam-eps", 1e-3)


@pytest.mark.libraries
def test_folder_of_images(images, launch, tmp_path):
    """Crops follow from seed, epoch and image: neither processes that train nor processes that load change them."""
    options = ("--data", images, *FOLDER)
    launch(*options, out=tmp_path / "plain")
    assert results(tmp_path / "plain")["images"] == {"train": 10, "test": 4}
    launch(*options, "--workers", 2, out=tmp_path / "loaders")
    assert_same_run(tmp_path / "plain", tmp_path / "loaders")
    if dist.is_gloo_available():
        launch(*options, out=tmp_path / "two", world=2)
        assert_close_run(tmp_path / "plain", tmp_path / "two", ROUNDED)


@pytest.mark.libraries
def test_the_official_recipe(images, launch, tmp_path):
    """The command of examples/README.md, in small: augmentation and mixing are those of an uninterrupted run."""
    library("timm")
    text = (SCRIPT.parent / "README.md").read_text()
    section = text[text.index("The official recipe") :]
    command = section[section.index("--data IMAGENET") : section.index("--workers")].replace("\\\n", " ").split()
    command[1] = images
    small = ("--depth", 14, *FOLDER, "--checkpoint-every", 1)
    launch(*command, "--workers", 2, *small, out=tmp_path / "whole")
    launch(*command, *small, out=tmp_path / "parts", kill=("step", 4))
    launch(*command, *small, "--resume", out=tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    record = results(tmp_path / "whole")
    assert record["arguments"]["similarity_pairs"] == 12 and record["arguments"]["mixup"] == 0.1
    launch(*command, *small, "--cutmix", 1, out=tmp_path / "cut")
    assert results(tmp_path / "cut")["train_loss"] != record["train_loss"]


def test_resumed_with_other_arguments(alone, launch):
    (printed,) = launch(*EXACT, "--resume", "--label-smoothing", 0.2, out=alone("batch"), status=1)
    assert "--label-smoothing is 0.2, but" in printed and "was trained with 0.05" in printed


def test_checkpoint_is_not_overwritten(alone, launch):
    (printed,) = launch(*EXACT, out=alone("batch"), status=2)
    assert "--resume goes on from it" in printed


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules["train_example"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_example"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--batch-size -3", "--batch-size must be at least 1, got -3"),
        ("--lr 0", "--lr must be positive, got 0.0"),
        ("--warmup 1.5", "--warmup must lie in [0, 1), got 1.5"),
        ("--drop-path nan", "--drop-path must lie in [0, 1), got nan"),
        ("--clip -1", "--clip must lie in [0, inf), got -1"),
        ("--model resnet", "--model must be small or one of deepvit_16b"),
        ("--model deepvit_16b", "img_size must be divisible by patch_size=16, got (8, 8)"),
        ("--dim 10 --heads 4", "dim must be a multiple of num_heads=4"),
        ("--backend magic", "backend must be one of"),
        ("--backend triton --device cpu", "backend 'triton' cannot run this"),
        ("--image-size 32", "--image-size is for folders"),
        ("--data /no/such/folder", "no train/"),
        ("--fsdp", "--fsdp shards over processes: start it by torchrun"),
        ("--min-lr 1", "--min-lr must lie in [0, 0.0015], the range of --lr, got 1.0"),
        ("--warmup 0.5 --cooldown 0.5", "--warmup and --cooldown must leave steps between them, got 0.5 and 0.5"),
        ("--similarity 0.1 --similarity-pairs 8", "pairs must lie in [1, 7] for 8 attentions, got 8"),
        ("--similarity-pairs 2", "--similarity-pairs is for --similarity, which is 0, got 2"),
        ("--similarity 0.1 --compile", "not with --compile or --fsdp"),
        ("--aa rand-m9", "--aa and --reprob are for folders of images, got --data digits"),
    ],
)
def test_bad_arguments(arguments, message, script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("reattn.backends.triton.EMULATED", False)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as raised:
        script.parse_arguments([*arguments.split(), "--out", str(tmp_path)])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_norms_on_several_cpus_stay_fused(script):
    """Those of the stem are called, those of re-attention are read by its kernels."""
    model = script.DeepViT(img_size=8, patch_size=2, depth=1, embed_dim=16, num_heads=2, conv_stem=True)
    script.synchronise_norms(model, torch.device("cpu"))
    assert type(model.blocks[0].attn.head_norm) is torch.nn.SyncBatchNorm
    assert type(model.patch_embed.bn1) is script.CpuSyncBatchNorm


def test_learning_rate(script):
    """10 steps up, a cosine from the highest to the least, and 20 steps at that."""
    options = (
        "--lr 1e-3 --min-lr 1e-4 --warmup 0.1 --cooldown 0.2 --epochs 10 --dim 16 --depth 1 --heads 2 --device cpu"
    )
    args = script.parse_arguments([*options.split(), "--out", "/no/such/folder"])
    run = script.build_run(args, 10, 10, script.Place(0, 1, torch.device("cpu")))
    rates = []
    for _ in range(100):
        rates.append(run.schedule.get_last_lr()[0])
        run.optimizer.step()
        run.schedule.step()
    assert rates[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert (rates[10], rates[45]) == pytest.approx((1e-3, 5.5e-4)) and rates[80:] == pytest.approx([1e-4] * 20)


def test_shares_of_a_batch(script):
    """Of every batch each process has its part, none an image twice, and the order is another in every epoch."""
    args = script.parse_arguments(["--batch-size", "5", "--out", "/no/such/folder"])
    shares = [script.split_batches(11, args, script.Place(rank, 3, torch.device("cpu")), epoch=4) for rank in range(3)]
    batches = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    assert [len(batch) for batch in batches] == [5, 5, 1]
    assert sorted(sum(batches, [])) == [(index, 4) for index in range(11)]
    assert [len(parts[2]) for parts in shares] == [1, 0, 0]
    (whole,) = ([sorted(b) for b in script.split_batches(11, args, script.Place(0, 1, torch.device("cpu")), epoch=4)],)
    assert whole == batches
    other = script.split_batches(11, args, script.Place(0, 1, torch.device("cpu")), epoch=5)
    assert [[index for index, _ in sorted(batch)] for batch in other] != [[i for i, _ in batch] for batch in batches]


def test_random_shift(script):
    image = torch.rand(1, 8, 8)
    padded = torch.full((10, 10), script.BACKGROUND)
    padded[1:9, 1:9] = image[0]
    data = script.SeededDataset([(image, 3)] * 200, script.random_shift, seed=0)
    state = torch.get_rng_state()
    places = set()
    for index in range(200):
        shifted, label = data[index, 1]
        assert label == 3 and torch.equal(data[index, 1][0], shifted)
        fits = [(r, c) for r in range(3) for c in range(3) if torch.equal(padded[r : r + 8, c : c + 8], shifted[0])]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) == 9
    assert any(not torch.equal(data[index, 1][0], data[index, 2][0]) for index in range(9))
    # Nothing of it is seen outside.
    assert torch.equal(torch.get_rng_state(), state)
