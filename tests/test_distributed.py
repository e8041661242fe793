"""Synchronised batch statistics: two gloo processes with a part of the batch each, against one with all of it."""

import copy
import datetime
from dataclasses import replace

import conftest  # noqa: F401 - what it puts in a GPU's place, in the processes that are started here too
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parity import BACKENDS, STATISTICS, compute, device_of, make_problem
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from reattn import ReAttention, re_attention
from reattn.analysis import measure_attention
from reattn.backends import BACKENDS as BACKENDS_BY_NAME
from reattn.losses import map_similarity
from reattn.models import DeepViT
from reattn.models.deepvit import Block

backends = pytest.mark.parametrize("backend", BACKENDS)
# Samples of a batch of four by rank.
SPLITS = {"2+2": (2, 2), "3+1": (3, 1), "4+0": (4, 0)}
MAPS = ("query", "key", "value")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch built with gloo")


def make_batch(device, **options):
    return make_problem("batch-training", seqlen=5, seqlen_k=6, batch=4, device=device, **options)


def part_of(split, rank):
    start = sum(split[:rank])
    return slice(start, start + split[rank])


def compute_part(problem, backend, split, rank):
    part = part_of(split, rank)
    local = problem.with_tensors(**{name: problem[name][part] for name in MAPS})
    local = replace(local.with_options(process_group=dist.group.WORLD), grad=problem.grad[part])
    return compute(local, backend)


def make_attention(device, backend):
    torch.manual_seed(0)
    return ReAttention(24, 3, norm_momentum=None, backend=backend, device=device)


def make_model(device, backend):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return DeepViT(**sizes, backend=backend, device=device)


def tokens(device):
    return torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(1)).to(device)


def images(device):
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)


def step(module, x):
    """Output, and the gradients of the sum of its squares; then the output in eval mode."""
    output = module(x)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    with torch.no_grad():
        evaluated = module.eval()(x)
    return {
        "output": output.detach(),
        "evaluated": evaluated,
        "gradients": gradients,
        "buffers": dict(module.named_buffers()),
    }


def similarity_step(model, x):
    """Gradients of a loss summed over images, with the similarity of the maps of two blocks in it."""
    with map_similarity(model) as similarity:
        output = model(x)
    value = similarity()
    (output.square().sum() + 30 * len(x) * value).backward()
    return {
        "similarity": value.detach(),
        "gradients": {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()},
        "buffers": {name.removeprefix("module."): buffer for name, buffer in model.named_buffers()},
    }


def looked_at(attention, called):
    """Maps in training mode, and the running statistics after it; ``called``: a hook has the norm called."""
    if called:
        attention.head_norm.register_forward_hook(lambda *_: None)
    maps = [m.detach() for m in attention.attention_maps(tokens("cpu")[:3])]
    return maps, dict(attention.named_buffers())


SHARDED = ("fsdp1", "fsdp1-original-parameters", "fsdp2", "fsdp2-norms-apart")


def sharded(kind):
    """The model by a way of FSDP; all but "fsdp2" wrap each batch norm in a unit of its own. In float32, which leaves
    no doubt of the values."""
    model, dtype = make_model("cpu", "auto"), torch.float32
    if kind.startswith("fsdp1"):
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=kind != "fsdp1",
            mixed_precision=MixedPrecision(param_dtype=dtype),
            device_id=torch.device("cpu"),
        )
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and kind == "fsdp2-norms-apart":
            fully_shard(norm)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


# Where a DTensor lies: on all ranks, by samples, by tokens, by heads.
PLACEMENTS = {"replicated": Replicate(), "samples": Shard(0), "tokens": Shard(1), "features": Shard(2)}
NORMS = ("batch", "layer")
HEADS_ARE_GATHERED = {
    "qkv": ColwiseParallel(output_layouts=Replicate()),
    "proj": RowwiseParallel(input_layouts=Replicate()),
}


def make_with(norm):
    torch.manual_seed(0)
    return ReAttention(24, 3, norm=norm, backend="cpu")


def gathered(found):
    """Results of :func:`step`, their DTensors as the tensors that they stand for."""
    if isinstance(found, dict):
        return {name: gathered(each) for name, each in found.items()}
    return found.full_tensor().detach() if isinstance(found, DTensor) else found.detach()


def mixing_before_and_after():
    """Tensors and options of a call that mixes four heads before the softmax, and makes six of them after it."""
    draw = torch.Generator().manual_seed(2)
    shapes = {"query": (3, 4, 5, 8), "key": (3, 4, 5, 8), "value": (3, 6, 5, 8), "theta": (4, 6), "pre_theta": (4, 4)}
    tensors = {name: torch.randn(*shape, generator=draw).requires_grad_() for name, shape in shapes.items()}
    return tensors, {"norm": "batch", "training": True}


def distributed_tensors(mesh, rank):
    """Everything that two processes compute of DTensors; the CPU backend alone, for they are none of a backend's."""
    results = {}

    def replicate(tensor):
        return distribute_tensor(tensor, mesh, [Replicate()])

    for name, placement in PLACEMENTS.items():
        for norm in NORMS:
            module = distribute_module(make_with(norm), mesh)
            results["dtensor", name, norm] = gathered(step(module, distribute_tensor(tokens("cpu"), mesh, [placement])))
    compiled = torch.compile(module := distribute_module(make_with("batch"), mesh), fullgraph=True, backend="aot_eager")
    compiled(distribute_tensor(tokens("cpu"), mesh, [Shard(0)])).square().sum().backward()
    results["dtensor compiled"] = gathered({name: p.grad for name, p in module.named_parameters()})
    model = distribute_module(make_model("cpu", "cpu"), mesh)
    results["dtensor model"] = gathered(step(model, distribute_tensor(images("cpu"), mesh, [Shard(0)])))
    plan = {f"blocks.*.attn.{name}": style for name, style in HEADS_ARE_GATHERED.items()}
    plan |= {"blocks.*.mlp.fc1": ColwiseParallel(), "blocks.*.mlp.fc2": RowwiseParallel()}
    parallel = parallelize_module(make_model("cpu", "cpu"), mesh, plan)
    results["parallel model"] = gathered(step(parallel, images("cpu")))

    # Heads on several ranks, an uneven batch, and dropout by ranks whose generators are in different states.
    query = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(2))
    for placement in (Shard(0), Shard(1), Shard(3)):
        maps = distribute_tensor(query, mesh, [placement])
        results["dtensor maps", str(placement)] = re_attention(maps, maps, maps, backend="cpu").full_tensor()
        tensors, options = mixing_before_and_after()
        on_mesh = {name: replicate(tensor.detach()) for name, tensor in tensors.items()}
        on_mesh = {name: tensor.requires_grad_() for name, tensor in on_mesh.items()}
        on_mesh["query"] = maps  # which are drawn alike
        out = re_attention(**on_mesh, **options, backend="cpu")
        out.square().sum().backward()
        results["dtensor mixing", str(placement)] = gathered({"out": out, "pre_theta": on_mesh["pre_theta"].grad})
    torch.manual_seed(rank)
    for name in ("replicated", "samples"):
        maps = distribute_tensor(query[:1].expand(2, -1, -1, -1), mesh, [PLACEMENTS[name]])
        dropped = re_attention(maps, maps, maps, replicate(torch.eye(4)), dropout_p=0.5, backend="cpu")
        results["dtensor dropout", name] = dropped.full_tensor()

    mask = torch.ones(5, 5, dtype=torch.bool)
    wrong = {
        "theta": lambda: re_attention(*[replicate(query)] * 3, torch.eye(4), backend="cpu"),
        "query": lambda: re_attention(query, query, query, replicate(torch.eye(4)), backend="cpu"),
        "attn_mask": lambda: re_attention(*[replicate(query)] * 3, attn_mask=mask, backend="cpu"),
        "process_group": lambda: re_attention(
            *[replicate(query)] * 3, norm="batch", training=True, process_group=dist.group.WORLD, backend="cpu"
        ),
        "qkv": lambda: parallelize_module(make_with(None), mesh, {"qkv": ColwiseParallel()})(tokens("cpu")),
    }
    for name, call in wrong.items():
        with pytest.raises(ValueError) as caught:
            call()
        results["dtensor error", name] = str(caught.value)
    return results


def work(rank, names, folder):
    """Everything that two processes compute, saved as results-<rank>.pt."""
    torch.set_num_threads(1)
    # A rank that waits for one that never comes fails the tests, and does not hold them up.
    limit = datetime.timedelta(minutes=4)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", limit, world_size=2, rank=rank)
    # Refuses CPU modules with a SyncBatchNorm for the sake of its forward, which is never called here.
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None
    results = {}
    for backend in names:
        device = device_of(backend)
        for name, split in SPLITS.items():
            results["operator", backend, name] = compute_part(make_batch(device), backend, split, rank)
        part = part_of((3, 1), rank)
        attention = nn.SyncBatchNorm.convert_sync_batchnorm(make_attention(device, backend))
        results["attention", backend] = step(attention, tokens(device)[part])
        model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(make_model(device, backend)))
        results["model", backend] = step(model, images(device)[part])
        if backend != "reference":
            dropped = make_batch(device, dropout_p=0.3)
            results["dropout", backend] = compute_part(replace(dropped, seed=rank), backend, (2, 2), rank)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model("cpu", "reference").double())
    x = images("cpu").double()[part_of((3, 1), rank)]
    results["similarity"] = similarity_step(DistributedDataParallel(model), x)
    for kind in SHARDED:
        try:
            similarity_step(sharded(kind), images("cpu"))
        except ValueError as error:
            results["similarity", kind] = str(error)
        output = sharded(kind)(images("cpu")[part_of((2, 2), rank)]).float()
        output.square().sum().backward()
        results[kind] = output.detach()
    if "cpu" in names:
        results |= distributed_tensors(init_device_mesh("cpu", (2,)), rank)
    wrapped = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(make_model("cpu", "auto")))
    if rank == 0:
        # Alone: nobody answers if it asks.
        for name, model in {
            "itself": wrapped,
            "inside": nn.Sequential(wrapped),
            "compiled": torch.compile(wrapped),
        }.items():
            results["measured", name] = measure_attention(model, images("cpu")), wrapped.training
        results["synchronises"] = wrapped.require_forward_param_sync
        for called in (False, True):
            results["maps", called] = looked_at(
                nn.SyncBatchNorm.convert_sync_batchnorm(make_attention("cpu", "auto")), called
            )
    torch.save(results, f"{folder}/results-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    every = ("triton", "cuda", "cpu", "reference")
    names = [name for name in every if not BACKENDS_BY_NAME[name].unavailable(device_of(name))]
    torch.multiprocessing.spawn(work, args=(names, folder), nprocs=2)
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded(kind, ranks):
    """FSDP's units around or in the place of ``head_norm``: it is called."""
    for rank, results in enumerate(ranks):
        expected = make_model("cpu", "reference")(images("cpu")[part_of((2, 2), rank)])
        torch.testing.assert_close(results[kind], expected, rtol=1e-4, atol=1e-4)


def test_similarity_of_maps(ranks):
    """Under DistributedDataParallel: gradients that one process has, which go through the hooks' own pass."""
    whole = similarity_step(make_model("cpu", "reference").double(), images("cpu").double())
    parts = [results["similarity"] for results in ranks]
    mean = (3 * parts[0]["similarity"] + parts[1]["similarity"]) / 4
    torch.testing.assert_close(mean, whole["similarity"], rtol=1e-9, atol=0)
    for name, expected in whole["gradients"].items():
        # DistributedDataParallel has averaged them over two ranks.
        joined = 2 * parts[0]["gradients"][name]
        size = whole["gradients"][name.replace("theta_bias", "theta")].abs().max().item()
        torch.testing.assert_close(joined, expected, rtol=0, atol=1e-9 * size, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(parts[0]["gradients"][name], parts[1]["gradients"][name])
    for name, expected in whole["buffers"].items():
        torch.testing.assert_close(parts[1]["buffers"][name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", SHARDED)
def test_similarity_of_what_is_sharded_is_refused(kind, ranks):
    assert ranks[0]["similarity", kind].startswith("model must not be sharded or replicated, got ")


@backends
@pytest.mark.parametrize("split", SPLITS)
def test_operator(split, backend, ranks, device):
    """Outputs and gradients of query, key, value are the parts; those of the parameters add up to the whole's."""
    parts = [results["operator", backend, split] for results in ranks]
    whole = compute(make_batch(device), backend)
    for name, expected in whole.items():
        local = [part[name] for part in parts]
        if name in STATISTICS:
            for statistic in local:
                torch.testing.assert_close(statistic, expected, rtol=1e-5, atol=1e-7)
            continue
        joined = torch.cat(local) if expected.ndim == 4 else sum(local)
        # The mixing bias has no gradient: what is left is the rounding of its terms.
        size = whole["theta gradient" if name == "bias gradient" else name].abs().max().item()
        torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}")


def test_without_synchronisation_the_statistics_differ(backend, ranks, device):
    """What the test above would see if a rank kept to itself."""
    problem = make_batch(device)
    alone = compute(replace(problem.with_tensors(**{n: problem[n][:2] for n in MAPS}), grad=problem.grad[:2]), backend)
    assert not torch.allclose(alone["output"], ranks[0]["operator", backend, "2+2"]["output"], rtol=0.01)


@backends
@pytest.mark.parametrize(
    ("name", "make", "batch"),
    [
        pytest.param("attention", make_attention, tokens, id="attention"),
        pytest.param("model", make_model, images, id="model"),
    ],
)
def test_converted_module(name, make, batch, backend, ranks, device):
    """``convert_sync_batchnorm`` on one attention, and on a model that DistributedDataParallel wraps."""
    parts = [results[name, backend] for results in ranks]
    module = make(device, backend)
    whole = step(copy.deepcopy(module), batch(device))
    for key in ("output", "evaluated"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), whole[key], rtol=1e-4, atol=1e-4)
    wrapped = "module." if name == "model" else ""
    for key, expected in whole["gradients"].items():
        # DistributedDataParallel has averaged them over two ranks.
        joined = sum(part["gradients"][wrapped + key] for part in parts)
        size = whole["gradients"][key.replace("theta_bias", "theta")].abs().max().item()
        torch.testing.assert_close(joined, expected, rtol=1e-3, atol=1e-3 * size, msg=lambda m, k=key: f"{k}: {m}")
    for key, expected in whole["buffers"].items():
        for part in parts:
            torch.testing.assert_close(part["buffers"][wrapped + key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("called", [False, True])
def test_maps_are_those_of_one_rank(called, ranks):
    """A rank looks at its maps in training mode by itself: with the statistics of its own tokens, and none updated."""
    maps, buffers = ranks[0]["maps", called]
    attention = make_attention("cpu", "auto")
    expected, unchanged = looked_at(attention, False)
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffers, unchanged)
    assert abs(maps[1].mean()) < 1e-4 and maps[1].std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("where", ["itself", "inside", "compiled"])
def test_one_rank_measures_alone(where, ranks):
    """DistributedDataParallel sends buffers at every call, in eval mode too."""
    measured, training = ranks[0]["measured", where]
    expected = measure_attention(make_model("cpu", "auto"), images("cpu"))
    assert training and measured.images == 4 and ranks[0]["synchronises"]
    torch.testing.assert_close(measured.blocks, expected.blocks)


def assert_same(found, expected):
    """Results of :func:`step`: gradients up to a share of the largest."""
    for key in ("output", "evaluated"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
    assert_same_gradients(found["gradients"], expected["gradients"])
    for key, buffer in expected["buffers"].items():
        torch.testing.assert_close(found["buffers"][key], buffer, rtol=1e-4, atol=1e-6)


def assert_same_gradients(found, expected):
    for key, gradient in expected.items():
        size = expected[key.replace("theta_bias", "theta")].abs().max().item()
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-3 * size, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.extension
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_distributed_tensors(placement, norm, ranks):
    """DTensors compute what one process does, whatever they lie by; so batch statistics are those of the batch."""
    expected = gathered(step(make_with(norm), tokens("cpu")))
    for results in ranks:
        assert_same(results["dtensor", placement, norm], expected)


@pytest.mark.extension
def test_distributed_tensors_are_compiled(ranks):
    expected = gathered(step(make_with("batch"), tokens("cpu")))
    assert_same_gradients(ranks[1]["dtensor compiled"], expected["gradients"])


@pytest.mark.extension
@pytest.mark.parametrize("kind", ["dtensor model", "parallel model"])
def test_models_of_distributed_tensors(kind, ranks):
    """``distribute_module`` on all of a model, and ``parallelize_module`` with a plan in which heads are gathered."""
    assert_same(ranks[0][kind], gathered(step(make_model("cpu", "cpu"), images("cpu"))))


@pytest.mark.extension
def test_maps_of_distributed_tensors(ranks):
    query = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(2))
    expected = F.scaled_dot_product_attention(query, query, query)
    for placement in (Shard(0), Shard(1), Shard(3)):
        torch.testing.assert_close(ranks[0]["dtensor maps", str(placement)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.extension
def test_distributed_tensors_that_mix_before_the_softmax_and_make_other_heads(ranks):
    tensors, options = mixing_before_and_after()
    out = re_attention(**tensors, **options, backend="reference")
    out.square().sum().backward()
    for placement in (Shard(0), Shard(1), Shard(3)):
        found = ranks[0]["dtensor mixing", str(placement)]
        assert found["out"].shape == out.shape
        torch.testing.assert_close(found["out"], out.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["pre_theta"], tensors["pre_theta"].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.extension
def test_dropout_of_distributed_tensors(ranks):
    """Ranks that hold the same draw the same; those that hold others draw others, for samples that are alike."""
    for name in ("replicated", "samples"):
        first, second = (results["dtensor dropout", name] for results in ranks)
        assert torch.equal(first, second)
        assert not torch.allclose(first[0], first[1], rtol=0.1)


@pytest.mark.extension
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("theta", "theta must be a DTensor, as query is, got torch.Tensor: distribute both"),
        ("query", "query must be a DTensor, as theta is, got torch.Tensor: distribute both"),
        ("attn_mask", "attn_mask must be a DTensor, as query is, got torch.Tensor: distribute both"),
        ("process_group", "process_group must be None for DTensors"),
        ("qkv", "qkv must put out 72 features, got 36: heads cannot lie on several ranks"),
    ],
)
def test_distributed_tensors_that_do_not_fit(name, message, ranks):
    assert ranks[0]["dtensor error", name].startswith(message)


def test_dropout(backend, ranks):
    """Masks differ between ranks, and the statistics of the dropped maps are synchronised all the same."""
    first, second = (results["dropout", backend] for results in ranks)
    for name in STATISTICS:
        assert torch.equal(first[name], second[name])
    without = ranks[0]["operator", backend, "2+2"]
    assert not torch.allclose(first["running_var"], without["running_var"], rtol=0.01)
    assert not torch.equal(first["output"], second["output"])
    assert all(result.isfinite().all() for result in first.values())
