"""Compiles the kernels ahead of time, as they would be for each GPU, and reports what they cost.

``python -m benchmarks.compile_report`` prints a table of the Triton kernels and one of the CUDA kernels, and fails if a
default configuration spills registers or does not fit the card. Needs triton for the one, NVRTC for the other, and no
GPU: registers come from ``cuobjdump -res-usage``, spills and tensor-core instructions from ``nvdisasm``.
The Triton release is the one that is imported: ``make aot`` does it for each that the tests do.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import sass
from reattn.backends import cuda_compile
from reattn.backends.cuda_compile import Code, Kernel
from reattn.backends.cuda_plan import SHARED_LIMIT

TRITON_ARCHS = (80, 86, 89, 90, 100)
# Local-memory instructions inside loops that are let through, as a share of the loops' instructions: a tile half as
# large needs none, and moves more through shared memory. Most kernels have none at all.
FEW_SPILLS = 1 / 80
# The same with EXTRAS: the forward pass at head_dim 64 has them, as it keeps its tile.
SPILLS_WITH_EXTRAS = 1 / 16
# As a number, for float32 and more than 16 heads: tiles small enough to need none run longer. Most have
# grad_maps with 32 heads and batch statistics, of which a lane holds five vectors of eight heads (90), and by Triton
# 3.6 grad_query in float32 at head_dim 128 (153).
RARE_SPILLS = 160
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# "batch" in training.
NORMS = ("layer", "batch", "batch-eval", "none")
DROPOUT = {"without": False, "with": True}
# A mask of keys, boolean; causal; a mask by query, boolean; a bias by head and query that is differentiated; mixing
# before the softmax.
EXTRAS = ("padding", "causal", "rows", "bias", "pre_theta")


class Case(NamedTuple):
    """A problem to compile for: an architecture, a dtype, a shape, one of NORMS, whether with dropout, "none" or one of
    EXTRAS."""

    arch: int
    dtype: str
    heads: int
    head_dim: int
    norm: str
    dropout: bool = False
    extra: str = "none"


class Cost(NamedTuple):
    """What a compiled kernel needs: a row of the table."""

    case: Case
    kernel: str
    tile: tuple[int, ...]
    registers: int
    spills: int
    spills_in_loops: int
    loops: int
    shared: int
    hmma: int

    @property
    def faults(self) -> list[str]:
        """Why this configuration may not be a default; empty when it may."""

        from reattn.kernels import configs

        faults = []
        few = (FEW_SPILLS if self.case.extra == "none" else SPILLS_WITH_EXTRAS) * self.loops
        common = self.case.dtype != "float32" and self.case.heads <= 16
        if self.spills_in_loops > (few if common else max(few, RARE_SPILLS)):
            faults.append(f"{self.spills_in_loops} local-memory instructions inside loops")
        if self.shared > SHARED_LIMIT[self.case.arch]:
            faults.append(f"shared memory over {SHARED_LIMIT[self.case.arch]}")
        multiplies = self.kernel.removesuffix("_kernel") in configs.TABLE
        if self.case.dtype != "float32" and not self.hmma and multiplies:
            faults.append("no tensor-core instruction")
        return faults


def compile_case(case: Case, tiles: dict[str, Any] | None = None, kernels: tuple[str, ...] | None = None) -> list[Cost]:
    """Every kernel a forward and backward pass launches, compiled; ``tiles`` replaces the table's by kernel name."""
    from reattn.kernels import configs

    launches = [launch for launch in recorded_launches(case, tiles) if not kernels or launch[0].__name__ in kernels]
    compiled = [compile_launch(*launch, case.arch) for launch in launches]
    listings = disassemble([each.asm["cubin"] for each in compiled], case.arch)
    costs = []
    for (kernel, _, _, tile), each, listing in zip(launches, compiled, listings, strict=True):
        assert isinstance(tile, configs.Tile)
        (text,) = listing.values()
        costs.append(Cost(case, kernel.__name__, tuple(tile), *read_cubin(each, text)))
    return costs


def recorded_launches(case: Case, tiles: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """(kernel, arguments, constants, tile) of every launch of Triton's in a training step."""
    from reattn.backends import triton as backend

    launches: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def record(kernel: Any, grid: tuple[int, ...], tile: Any, *args: Any, **constants: Any) -> None:
        launches.setdefault((kernel.__name__, *constants.items()), (kernel, args, constants, tile))

    choose = backend.configs.tile
    with (
        mock.patch.object(backend, "_run", record),
        mock.patch.object(backend, "_arch", lambda device: case.arch),
        mock.patch.object(
            backend.configs, "tile", lambda kernel, *key: (tiles or {}).get(kernel) or choose(kernel, *key)
        ),
    ):
        train_step(case, backend, batch=2)
    return list(launches.values())


def train_step(case: Case, backend: Any, batch: int) -> None:
    """On tensors without storage; with batch norm in training, a step whose statistics are synchronised as well."""
    from reattn.backends import common
    from reattn.backends.contract import Inputs
    from reattn.problem import Problem

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    heads, dtype = case.heads, DTYPES[case.dtype]
    qkv = empty(batch, 197, 3, heads, case.head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    inputs = Inputs(*qkv.unbind(0), empty(heads, heads), empty(heads))
    if case.norm != "none":
        inputs = inputs._replace(norm_weight=empty(heads), norm_bias=empty(heads))
    if case.norm.startswith("batch"):
        running = empty(heads), empty(heads), empty(1, dtype=torch.int64)[0]
        inputs = inputs._replace(running_mean=running[0], running_var=running[1], num_batches_tracked=running[2])
    if case.dropout:
        inputs = inputs._replace(seed=empty(1, dtype=torch.int64))
    masks = {
        "padding": empty(batch, 1, 1, 197, dtype=torch.bool),
        "rows": empty(1, 1, 197, 197, dtype=torch.bool),
        "bias": empty(1, heads, 197, 197, dtype=dtype),
    }
    mask = masks.get(case.extra)
    inputs = inputs._replace(attn_mask=mask, pre_theta=empty(heads, heads) if case.extra == "pre_theta" else None)
    for synchronised in (False, True)[: 1 + (case.norm == "batch")]:
        problem = Problem.of(
            inputs.query,
            norm=None if case.norm == "none" else case.norm.removesuffix("-eval"),
            training=case.norm == "batch",
            synchronised=synchronised,
            scale=0.125,
            dropout_p=0.1 if case.dropout else 0.0,
            mask=None if mask is None else "float" if mask.is_floating_point() else "bool",
            mask_gradient=case.extra == "bias",
            is_causal=case.extra == "causal",
            pre_mixed=case.extra == "pre_theta",
        )
        outputs = backend.forward(problem, inputs)
        if synchronised:
            backend.finish(problem, inputs, outputs)
        grad = common.empty_heads_last(inputs.query)
        sums = backend.grad_sums(problem, grad, outputs) if synchronised else None
        backend.backward(problem, grad, inputs, outputs, sums)


def compile_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], tile: Any, arch: int) -> Any:
    """What the JIT would compile for these arguments: pointers and sizes specialised on 1 and on multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            members = [describe(member, (*path, i)) for i, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
            fixed[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + _POINTEE[value.dtype]
        return "i32" if abs(value) < 2**31 else "i64"

    plain = {param.name for param in kernel.params if param.do_not_specialize}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[(index,)] = "constexpr", constants[name]
        elif name in plain:
            signature[name] = "i32"
        else:
            signature[name] = describe(values[name], (index,))
    source = ASTSource(kernel, signature, fixed, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


_POINTEE = {
    torch.uint8: "u8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}


def read_cubin(compiled: Any, listing: str) -> tuple[int, int, int, int, int, int]:
    """Registers a thread; local-memory instructions, in all and inside loops; all instructions inside loops; shared
    memory in bytes; HMMA instructions."""
    usage = resource_usage(compiled.asm["cubin"])
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return int(registers[1]), *local_memory(listing), compiled.metadata.shared, hmma_of(listing)


def hmma_of(listing: str) -> int:
    return len(re.findall(r"\bHMMA\b", listing))


def resource_usage(image: bytes) -> str:
    """What the kernels of a cubin use."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(image)
        return subprocess.run(
            [sass.tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout


def disassemble(images: Sequence[bytes], arch: int) -> list[dict[str, str]]:
    """The instructions of each cubin's kernels, by name. All at once: a disassembler takes longer to start than for a
    kernel. Addresses are those behind each other."""
    kernels = [dict(machine_code(image)) for image in images]
    with tempfile.TemporaryDirectory() as folder:
        code = pathlib.Path(folder) / "code"
        code.write_bytes(b"".join(text for each in kernels for text in each.values()))
        command = [sass.tool("nvdisasm"), "--binary", f"SM{arch}", code]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = iter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S.*?;", listing))

    def take(text: bytes) -> str:
        found = list(itertools.islice(lines, len(text) // 16))
        assert len(found) == len(text) // 16, "an instruction has 16 bytes"
        return "\n".join(found)

    taken = [{name: take(text) for name, text in each.items()} for each in kernels]
    assert next(lines, None) is None, "an instruction has 16 bytes"
    return taken


def machine_code(image: bytes) -> Iterator[tuple[str, bytes]]:
    """The kernels of a cubin, which is an ELF file: (name, code)."""
    (headers,) = struct.unpack_from("<Q", image, 40)
    size, number, names = struct.unpack_from("<HHH", image, 58)
    # Of a section: its name's place among the names, three numbers, its place, its bytes.
    sections = [struct.unpack_from("<2I4Q", image, headers + size * i) for i in range(number)]
    for name, _, _, _, place, length in sections:
        begin = sections[names][4] + name
        text = image[begin : image.index(b"\0", begin)].decode()
        if text.startswith(".text."):
            yield text.removeprefix(".text."), image[place : place + length]


def local_memory(listing: str, innermost: bool = False) -> tuple[int, int, int]:
    """Local-memory instructions, in all and inside loops: a register put away before a loop and fetched after it is
    cheap; and all instructions inside loops. ``innermost``: of loops that hold no other; what is around them, as one
    over groups of rows is, runs seldom."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?);", listing)]
    jumps = [(at, re.search(r"\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", text)) for at, text in instructions]
    loops = [(int(target[1], 16), at) for at, target in jumps if target and int(target[1], 16) < at]
    if innermost:
        loops = [
            (start, end)
            for start, end in loops
            if not any(start <= first and last <= end for first, last in loops if (first, last) != (start, end))
        ]
    local = {at for at, text in instructions if re.search(r"\b(?:LDL|STL)\b", text)}
    inside = {at for at, _ in instructions if any(start <= at <= end for start, end in loops)}
    return len(local), len(local & inside), len(inside)


def table(costs: list[Cost]) -> Iterator[str]:
    """The costs as lines of text."""
    layout = "{:>6} {:9}{:>5}{:>5} {:11}{:8}{:10}{:15}{:15}{:>5}{:>6}{:>8}{:>7}{:>8}{:>6}"
    titles = ["arch", "dtype", "heads", "dim", "norm", "dropout", "with", "kernel", "tile", "regs", "spill"]
    yield layout.format(*titles, "in loop", "of", "shared", "HMMA")
    for cost in costs:
        arch, dtype, heads, head_dim, norm, dropout, extra = cost.case
        kernel, tile = cost.kernel.removesuffix("_kernel"), "x".join(map(str, cost.tile))
        usage = (cost.registers, cost.spills, cost.spills_in_loops, cost.loops, cost.shared, cost.hmma)
        with_dropout = "with" if dropout else "without"
        row = layout.format(f"sm_{arch}", dtype, heads, head_dim, norm, with_dropout, extra, kernel, tile, *usage)
        yield row + ("  FAULT: " + ", ".join(cost.faults) if cost.faults else "")


def cases(
    archs: list[int], quick: bool, norms: Sequence[str] = NORMS, dropout: Sequence[str] = tuple(DROPOUT)
) -> list[Case]:
    """Problems that together meet every row of the tile table; ``quick``: every other one of those of the official
    models, in bfloat16."""
    if quick:
        problems = [("bfloat16", 12, head_dim) for head_dim in (32, 48, 64)]
    else:
        heads = (4, 8, 12, 32)
        problems = [("bfloat16", h, d) for h, d in itertools.product(heads, (32, 48, 64, 128))]
        problems += [("float32", h, d) for h, d in itertools.product(heads, (64, 128))]
    found = []
    for arch, (number, problem), norm, name in itertools.product(archs, enumerate(problems), norms, dropout):
        turn = TRITON_ARCHS.index(arch) + number + NORMS.index(norm) + DROPOUT[name]
        if not quick or turn % 2 == 0:
            found.append(Case(arch, *problem, norm, DROPOUT[name]))
    # EXTRAS with every architecture and norms in turn; ``quick``: with problems in turn as well.
    for (place, arch), (turn, extra) in itertools.product(enumerate(archs), enumerate(EXTRAS)):
        for number, problem in enumerate(problems):
            if not quick or number == (place + turn) % len(problems):
                norm = norms[(place + number + turn) % len(norms)]
                found.append(Case(arch, *problem, norm, False, extra))
    return found


def cuda_cases(archs: list[int], quick: bool, norms: Sequence[str], dropout: Sequence[str]) -> list[Case]:
    """All of the default shapes, in 16 bits, and of others every fourth; ``quick``: every eighth of the defaults."""
    defaults = [(dtype, 12, head_dim) for dtype in ("bfloat16", "float16") for head_dim in (32, 33, 35, 64)]
    others = [case[1:4] for case in cases([90], False, ["none"], ["without"])]
    others = [other for other in dict.fromkeys(others) if other not in defaults]
    found = []
    for problems, every in ((defaults, 8 if quick else 1), ([] if quick else others, 4)):
        choices = itertools.product(archs, enumerate(problems), norms, dropout)
        for arch, (number, problem), norm, name in choices:
            turn = list(SHARED_LIMIT).index(arch) + number + NORMS.index(norm) + every // 2 * DROPOUT[name]
            if turn % every == 0:
                found.append(Case(arch, *problem, norm, DROPOUT[name]))
    return found


class CudaCost(NamedTuple):
    """What a CUDA kernel needs: a row of the table. Stack and shared memory in bytes, the latter what the kernel
    declares itself and the most that one of the problems asks for; spills are instructions."""

    arch: int
    kernel: Kernel
    registers: int
    stack: int
    spills: int
    spills_in_loops: int
    static_shared: int
    dynamic_shared: int
    hmma: int

    @property
    def faults(self) -> list[str]:
        """Why this kernel may not be shipped; empty when it may."""
        faults = []
        if self.dynamic_shared > SHARED_LIMIT[self.arch]:
            faults.append(f"shared memory over {SHARED_LIMIT[self.arch]}")
        if self.static_shared:  # launches may ask for all there is
            faults.append("shared memory of its own")
        if not re.search(r"\bfloat\b", name_of(self.kernel)):
            # What is put away before a loop and fetched after it is shown; on 9.0, which it is made for, nothing is.
            if self.spills_in_loops or (self.arch == 90 and self.spills):
                faults.append("local memory")
            if not self.hmma and self.kernel.source != "sums":
                faults.append("no tensor-core instruction")
        return faults


def name_of(kernel: Kernel) -> str:
    """As the table has it."""
    constants = " ".join(f"{macro.removeprefix('REATTN_')}={value}" for macro, value in kernel.constants)
    return f"{kernel.name.replace('reattn::', '')} {constants}".strip()


def recorded_kernels(case: Case) -> dict[Kernel, int]:
    """The CUDA kernels that a training step of 128 samples launches, each with its dynamic shared memory; none where
    the card has too little of that."""
    from reattn.backends import cuda as backend
    from reattn.backends import cuda_driver

    asked: dict[Kernel, int] = {}

    def record(loaded: cuda_driver.Loaded, grid: tuple[int, int], threads: int, shared_bytes: int, *_: Any) -> None:
        asked[loaded.kernel] = max(shared_bytes, asked.get(loaded.kernel, 0))

    cuda_driver.forget()
    with (
        mock.patch.object(cuda_driver, "kernels", lambda specs, device: [cuda_driver.Loaded(s, None) for s in specs]),
        mock.patch.object(cuda_driver, "launch", record),
        mock.patch.object(backend, "_describe", lambda device: (SHARED_LIMIT[case.arch], 132)),
    ):
        if not backend._too_large(0, DTYPES[case.dtype].itemsize, case.heads, case.head_dim):
            train_step(case, backend, batch=128)
    cuda_driver.forget()
    return asked


def compile_cuda(problems: list[Case], sources: list[str] | None, jobs: int) -> Iterator[CudaCost]:
    """What every CUDA kernel of these problems costs; ``sources``: of those in csrc/cuda alone. What has been compiled
    before is taken from where the backend keeps it."""
    asked: dict[tuple[int, Kernel], int] = {}
    for case in problems:
        for kernel, shared in recorded_kernels(case).items():
            if not sources or kernel.source in sources:
                asked[case.arch, kernel] = max(shared, asked.get((case.arch, kernel), 0))

    # NVRTC compiles all kernels of a source at once.
    together: dict[tuple[Any, ...], list[Kernel]] = {}
    for arch, kernel in asked:
        together.setdefault((arch, kernel.source, kernel.constants), []).append(kernel)
    groups = [(key[0], kernels) for key, kernels in together.items()]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda group: cuda_compile.compiled(group[1], f"sm_{group[0]}"), groups)
        codes = {
            (arch, kernel): code
            for (arch, kernels), each in zip(groups, found, strict=True)
            for kernel, code in zip(kernels, each, strict=True)
        }
    for arch in sorted({arch for arch, _ in asked}):
        kernels = sorted((key[1] for key in asked if key[0] == arch), key=lambda kernel: _natural(name_of(kernel)))
        # Those of a source share an image.
        images = list(dict.fromkeys(codes[arch, kernel].image for kernel in kernels))
        listings = dict(zip(images, disassemble(images, arch), strict=True))
        for kernel in kernels:
            code = codes[arch, kernel]
            listing = listings[code.image][code.entry]
            yield CudaCost(arch, kernel, *read_cuda_cubin(arch, code, listing, asked[arch, kernel]))


def _natural(text: str) -> list[Any]:
    """Numbers and what stands between them, in turn."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def read_cuda_cubin(
    arch: int, code: Code, listing: str, dynamic_shared: int
) -> tuple[int, int, int, int, int, int, int]:
    """What :class:`CudaCost` has of a kernel; its cubin has all of the source."""
    usage = resource_usage(code.image).split(f"Function {code.entry}")[1].split("Function ")[0]
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    # From 9.0 on it counts the KB that the driver takes for itself, which is in none of the limits.
    static = max(0, numbers["SHARED"] - 1024 * (arch >= 90))
    memory = local_memory(listing, innermost=True)[:2]
    return numbers["REG"], numbers["STACK"], *memory, static, dynamic_shared, hmma_of(listing)


def cuda_table(costs: Iterable[CudaCost]) -> Iterator[str]:
    """The costs as lines of text."""
    layout = "{:>6} {:60}" + "{:>5}{:>6}{:>6}{:>8}{:>7}{:>8}{:>6}"
    yield layout.format("arch", "kernel", "regs", "stack", "spill", "in loop", "static", "dynamic", "HMMA")
    for cost in costs:
        row = layout.format(f"sm_{cost.arch}", name_of(cost.kernel), *cost[2:])
        yield row + ("  FAULT: " + ", ".join(cost.faults) if cost.faults else "")


def main() -> int:
    """The tables on standard output; 1 if any configuration may not be a default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED_LIMIT), help="without, all")
    parser.add_argument("--backend", choices=("triton", "cuda"), nargs="+", help="whose kernels; without, both")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Triton: half of the official models' problems in bfloat16; CUDA, where it is said: an eighth of the "
        "default shapes' problems",
    )
    parser.add_argument("--norm", nargs="+", choices=NORMS, default=NORMS, help="without, all")
    parser.add_argument("--dropout", nargs="+", choices=list(DROPOUT), default=list(DROPOUT), help="as well")
    parser.add_argument("--source", nargs="+", help="sources in csrc/cuda, as forward; without, all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    args = parser.parse_args()
    faults = 0
    backends = args.backend or (["triton"] if args.quick else ["triton", "cuda"])
    if "triton" in backends:
        faults += report_triton(cases(args.arch or list(TRITON_ARCHS), args.quick, args.norm, args.dropout), args.jobs)
    if "cuda" in backends:
        faults += report_cuda(args, required=args.backend is not None)
    return int(faults > 0)


def report_triton(problems: list[Case], jobs: int) -> int:
    """Prints the Triton kernels' table; how many configurations may not be a default."""
    import triton

    faults = 0
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for i, costs in enumerate(pool.map(compile_case, problems)):
            lines = list(table(costs))
            print("\n".join(lines if i == 0 else lines[1:]), flush=True)
            faults += sum(bool(cost.faults) for cost in costs)
    archs = ", ".join(f"sm_{arch}" for arch in sorted({case.arch for case in problems}))
    print(f"{len(problems)} problems compiled for {archs} by triton {triton.__version__}; {faults} faults")
    return faults


def report_cuda(args: argparse.Namespace, required: bool) -> int:
    """Prints the CUDA kernels' table; how many may not be shipped. To have no NVRTC is a fault only where the table is
    required."""
    try:
        known = cuda_compile.known_archs()
    except Exception as error:  # not installed, or broken
        print(f"CUDA kernels not compiled: {error}".partition("\n")[0])
        return int(required)
    archs = args.arch or [arch for arch in SHARED_LIMIT if arch in known]
    if unknown := [f"sm_{arch}" for arch in archs if arch not in known]:
        print(f"CUDA kernels not compiled: NVRTC knows nothing of {', '.join(unknown)}")
        return 1
    problems = cuda_cases(archs, args.quick, args.norm, args.dropout)
    costs = list(compile_cuda(problems, args.source, args.jobs))
    print("\n".join(cuda_table(costs)))
    faults = sum(bool(cost.faults) for cost in costs)
    compiled_for, version = ", ".join(f"sm_{arch}" for arch in archs), ".".join(map(str, cuda_compile.version()))
    print(f"{len(costs)} CUDA kernels compiled for {compiled_for} by NVRTC {version}; {faults} faults")
    return faults


if __name__ == "__main__":
    sys.exit(main())
