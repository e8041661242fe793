"""What is asked of a GPU, in the order of what decides first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.pool import Job

BACKENDS = ("triton", "cuda")
# As tests/parity.py names them, and the norms of benchmarks/peers.py.
MODES = ("layer", "batch-training", "none", "batch-eval")
MODE_OF = {"layer": "layer", "batch": "batch-training", "none": "none", "batch-eval": "batch-eval"}
TIMED_NORMS = ("layer", "batch")
DIRECTIONS = ("forward", "forward+backward")
DROPOUT_P = 0.1
# What a call may have beside the ordinary (worker.FORMS), with the backends that take it.
FORMS = {
    "pre_theta": BACKENDS,
    "padding": BACKENDS,
    "causal": BACKENDS,
    "bias": BACKENDS,
    "pre_theta padding": BACKENDS,
    "pre_theta bias": BACKENDS,
    "heads_out": ("triton",),
}


class Sizes(NamedTuple):
    """Of a run: ``heads_and_dims`` of what is held to float64 at ``seqlen`` tokens, the first by single launches as
    well; ``timed``: batch, heads, tokens, head_dim; ``compiler``: torch.compile's backend; ``model``: and its batch;
    ``small``: a model cut short; ``profiled``: what hardware counters are read of; ``scaling``: numbers of tokens of
    one sample, with heads and head_dim of what is timed first."""

    heads_and_dims: tuple[tuple[int, int], ...]
    seqlen: int
    timed: tuple[tuple[int, int, int, int], ...]
    compiler: str
    model: tuple[str, int]
    small: bool
    profiled: tuple[int, int, int, int]
    scaling: tuple[int, ...]
    seconds: float

    @property
    def grown(self) -> list[tuple[int, int, int, int]]:
        _, heads, _, head_dim = self.timed[0]
        return [(1, heads, seqlen, head_dim) for seqlen in self.scaling]


CARD = Sizes(
    heads_and_dims=((12, 64), (12, 32), (12, 33), (3, 16), (8, 32)),
    seqlen=197,
    timed=((128, 12, 197, 64), (128, 12, 197, 32), (32, 12, 577, 32), (1, 12, 197, 64)),
    compiler="inductor",
    model=("deepvit_16b", 128),
    small=False,
    profiled=(128, 12, 197, 64),
    scaling=(256, 512, 1024, 2048, 4096),
    seconds=0.3,
)
# For the flow of stages alone, where kernels are emulated.
EMULATED = Sizes(((3, 16),), 17, ((1, 3, 17, 16),), "aot_eager", ("deepvit_16b", 1), True, (1, 3, 17, 16), (32,), 0.0)
# What compute-sanitizer watches.
WATCHED = [
    {"mode": mode, "heads": 3, "head_dim": 32, "seqlen": 50, "dtype": dtype}
    for mode, dtype in (("layer", "bfloat16"), ("batch-training", "bfloat16"), ("layer", "float32"))
]


def name_of(shape: Any) -> str:
    return "x".join(map(str, shape))


def kernel_jobs(sizes: Sizes) -> list[Job]:
    """Every launch by itself, in a process of its own."""
    heads, head_dim = sizes.heads_and_dims[0]
    problem = {"heads": heads, "head_dim": head_dim, "seqlen": sizes.seqlen, "dtype": "bfloat16"}
    return [
        Job(
            f"{backend} kernels, {mode}",
            {"kind": "kernels", "backend": backend, "mode": mode, **problem},
            own_process=True,
        )
        for backend, mode in itertools.product(BACKENDS, MODES[:3])
    ]


def parity_jobs(sizes: Sizes) -> list[list[Job]]:
    """Every problem against float64: those in bfloat16, of other forms, with dropout, in float16, in float32."""
    kinds = (("bfloat16", 0.0), ("bfloat16", DROPOUT_P), ("float16", 0.0), ("float32", 0.0))
    in_bfloat16, *others = (list(_parity_jobs(sizes, dtype, dropout_p)) for dtype, dropout_p in kinds)
    return [in_bfloat16, list(_form_jobs(sizes)), *others]


def _form_jobs(sizes: Sizes) -> Iterator[Job]:
    heads, head_dim = sizes.heads_and_dims[0]
    problem = {"heads": heads, "head_dim": head_dim, "seqlen": sizes.seqlen, "dtype": "bfloat16"}
    for (form, backends), mode in itertools.product(FORMS.items(), MODES[:3]):
        for backend in reversed(backends):
            request = {"kind": "parity", "backend": backend, "mode": mode, **problem, "form": form}
            yield Job(f"{backend} {heads}x{head_dim} {mode} bfloat16, {form}", request)


def _parity_jobs(sizes: Sizes, dtype: str, dropout_p: float) -> Iterator[Job]:
    for (heads, head_dim), mode, backend in itertools.product(sizes.heads_and_dims, MODES, reversed(BACKENDS)):
        problem = {"mode": mode, "heads": heads, "head_dim": head_dim, "seqlen": sizes.seqlen, "dtype": dtype}
        name = f"{backend} {heads}x{head_dim} {mode} {dtype}{' dropout' if dropout_p else ''}"
        request = {"kind": "parity", "backend": backend, **problem, "dropout_p": dropout_p}
        yield Job(name, request)


def warm_jobs(sizes: Sizes) -> list[Job]:
    """Compilation of what will be timed: our kernels, then what torch.compile makes of the eager forms."""
    problems = [{"shape": shape, "norm": norm} for shape in sizes.timed for norm in TIMED_NORMS]
    more = [{"shape": shape, "norm": "none"} for shape in sizes.timed]
    more += [{"shape": shape, "norm": "layer"} for shape in sizes.grown]
    jobs = [Job(f"warm {name_of(p['shape'])} {p['norm']}", {"kind": "warm", **p}) for p in problems + more]
    for problem, direction in itertools.product(problems, DIRECTIONS):
        name = f"compile {name_of(problem['shape'])} {problem['norm']} {direction}"
        how = {"backward": direction != "forward", "compiler": sizes.compiler}
        jobs.append(Job(name, {"kind": "warm_compiled", **problem, **how}))
    return jobs


def timing_jobs(sizes: Sizes, able: tuple[str, ...]) -> list[Job]:
    """Comparisons, one at a time; ``able``: our backends."""
    jobs = []
    for index, shape in enumerate(sizes.timed):
        for norm in TIMED_NORMS:
            name, problem = f"{name_of(shape)} {norm}", {"shape": shape, "norm": norm, "seconds": sizes.seconds}
            jobs.append(Job(f"kernels {name}", {"kind": "kernel_times", **problem, "backends": able}))
            for direction in DIRECTIONS:
                contenders = (*able, "eager", "compiled", "sdpa")
                request = {"kind": "operator", **problem, "direction": direction, "contenders": contenders}
                jobs.append(Job(f"{name} {direction}", {**request, "compiler": sizes.compiler}))
        if index == 0:
            request = dict(zip(("model", "batch"), sizes.model, strict=True))
            request |= {"contenders": (*able, "eager", "plain ViT"), "small": sizes.small, "seconds": sizes.seconds}
            name = f"{sizes.model[0]}, batch {sizes.model[1]}, training"
            jobs.append(Job(name, {"kind": "model", **request}))
    for shape, direction in itertools.product(sizes.grown, DIRECTIONS):
        request = {"kind": "operator", "of": "scaling", "shape": shape, "norm": "layer", "direction": direction}
        request |= {"contenders": (*able, "eager", "sdpa"), "compiler": sizes.compiler, "seconds": sizes.seconds}
        jobs.append(Job(f"scaling {name_of(shape)} layer {direction}", request))
    for shape in sizes.timed:
        request = {"kind": "kernel_times", "shape": shape, "norm": "none", "seconds": sizes.seconds, "backends": able}
        jobs.append(Job(f"kernels {name_of(shape)} none", request))
    return jobs


def stream_problems(sizes: Sizes) -> list[dict[str, Any]]:
    heads, head_dim = sizes.heads_and_dims[0]
    problem = {"heads": heads, "head_dim": head_dim, "seqlen": sizes.seqlen, "dtype": "bfloat16"}
    return [
        {"backend": backend, "mode": mode, **problem}
        for mode, backend in itertools.product(("layer", "batch-training"), BACKENDS)
    ]


def stream_jobs(sizes: Sizes) -> list[Job]:
    return [
        Job(f"{problem['backend']} {kind}, {problem['mode']}", {"kind": kind, **problem})
        for kind, problem in itertools.product(("stream", "graph"), stream_problems(sizes))
    ]


def profile_warm_jobs(sizes: Sizes) -> list[Job]:
    """Compilation of all that PART=profile runs, what takes longest first."""
    shape = {"shape": sizes.profiled, "norm": "layer"}
    jobs = [Job(f"warm {backend}, profiled", {"kind": "warm", **shape, "backends": [backend]}) for backend in BACKENDS]
    problems = [*stream_problems(sizes), *({"backend": "cuda", **watched} for watched in WATCHED)]
    names = "{backend} {heads}x{head_dim} {mode} {dtype}"
    return jobs + [Job(f"warm {names.format(**each)}", {"kind": "warm_step", **each}) for each in problems]
