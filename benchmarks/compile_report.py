"""Compiles the kernels ahead of time, as they would be for each GPU, and reports what they cost.

``python -m benchmarks.compile_report`` prints a table of the Triton kernels and one of the CUDA kernels, and fails if a
default configuration spills registers or does not fit the card. Needs triton for the one, nvcc for the other, and no
GPU: registers come from ``cuobjdump -res-usage`` or ptxas, spills and tensor-core instructions from ``-sass``.
The Triton release is the one that is imported: ``make aot`` does it for each that the tests do.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from build_extensions import SHARED_LIMIT

TRITON_ARCHS = (80, 86, 89, 90, 100)
# Local-memory instructions inside loops that may be left, for each instruction there. Triton 3.6 leaves more: a tile
# half as large needs none, and moves more through shared memory. Of float32, or more than 16 heads, how many any may
# leave: tiles small enough to need none run longer.
FEW_SPILLS, FEW_SPILLS_OF = 1 / 1000, {"3.6": 1 / 80}
RARE_SPILLS = 64
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# "batch" in training.
NORMS = ("layer", "batch", "batch-eval", "none")
DROPOUT = {"without": False, "with": True}


class Case(NamedTuple):
    """A problem to compile for: an architecture, a dtype, a shape, one of NORMS, whether with dropout."""

    arch: int
    dtype: str
    heads: int
    head_dim: int
    norm: str
    dropout: bool = False


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
        import triton

        from reattn.kernels import configs

        faults = []
        few = FEW_SPILLS_OF.get(triton.__version__.rpartition(".")[0], FEW_SPILLS) * self.loops
        common = self.case.dtype != "float32" and self.case.heads <= 16
        if self.spills_in_loops > (few if common else RARE_SPILLS):
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

    costs = []
    for kernel, args, constants, tile in recorded_launches(case, tiles):
        if kernels and kernel.__name__ not in kernels:
            continue
        compiled = compile_launch(kernel, args, constants, tile, case.arch)
        costs.append(Cost(case, kernel.__name__, tuple(tile), *read_cubin(compiled)))
        assert isinstance(tile, configs.Tile)
    return costs


def recorded_launches(case: Case, tiles: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """(kernel, arguments, constants, tile) of every launch of a training step, on tensors without storage; with batch
    norm in training, those of a step whose statistics are synchronised as well."""
    from reattn.backends import common
    from reattn.backends import triton as backend
    from reattn.backends.contract import Inputs
    from reattn.problem import Problem

    launches: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def record(kernel: Any, grid: tuple[int, ...], tile: Any, *args: Any, **constants: Any) -> None:
        launches.setdefault((kernel.__name__, *constants.items()), (kernel, args, constants, tile))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    heads, dtype = case.heads, DTYPES[case.dtype]
    qkv = empty(2, 197, 3, heads, case.head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    inputs = Inputs(*qkv.unbind(0), empty(heads, heads), empty(heads))
    if case.norm != "none":
        inputs = inputs._replace(norm_weight=empty(heads), norm_bias=empty(heads))
    if case.norm.startswith("batch"):
        running = empty(heads), empty(heads), empty(1, dtype=torch.int64)[0]
        inputs = inputs._replace(running_mean=running[0], running_var=running[1], num_batches_tracked=running[2])
    if case.dropout:
        inputs = inputs._replace(seed=empty(1, dtype=torch.int64))
    choose = backend.configs.tile
    with (
        mock.patch.object(backend, "_run", record),
        mock.patch.object(backend, "_arch", lambda device: case.arch),
        mock.patch.object(
            backend.configs, "tile", lambda kernel, *key: (tiles or {}).get(kernel) or choose(kernel, *key)
        ),
    ):
        for synchronised in (False, True)[: 1 + (case.norm == "batch")]:
            problem = Problem.of(
                inputs.query,
                norm=None if case.norm == "none" else case.norm.removesuffix("-eval"),
                training=case.norm == "batch",
                synchronised=synchronised,
                scale=0.125,
                dropout_p=0.1 if case.dropout else 0.0,
            )
            outputs = backend.forward(problem, inputs)
            if synchronised:
                backend.finish(problem, inputs, outputs)
            grad = common.empty_heads_last(inputs.query)
            sums = backend.grad_sums(problem, grad, outputs) if synchronised else None
            backend.backward(problem, grad, inputs, outputs, sums)
    return list(launches.values())


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

    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[(index,)] = "constexpr", constants[name]
        else:
            signature[name] = describe(values[name], (index,))
    source = ASTSource(kernel, signature, fixed, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


_POINTEE = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}


def read_cubin(compiled: Any) -> tuple[int, int, int, int, int, int]:
    """Registers a thread; local-memory instructions, in all and inside loops; all instructions inside loops; shared
    memory in bytes; HMMA instructions."""
    tool = cuobjdump()
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return int(registers[1]), *local_memory(sass), compiled.metadata.shared, sass.count("HMMA")


def cuobjdump() -> str:
    """The one that triton ships, or else one on the path."""
    try:
        import triton.backends.nvidia

        return str(pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")
    except ImportError:
        if found := shutil.which("cuobjdump"):
            return found
        raise SystemExit("needs cuobjdump, which triton ships, or one on the path") from None


def local_memory(sass: str) -> tuple[int, int, int]:
    """Local-memory instructions, in all and inside loops: a register put away before a loop and fetched after it is
    cheap; and all instructions inside loops."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(\S.*?);", sass)]
    jumps = [(at, re.search(r"\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", text)) for at, text in instructions]
    loops = [(int(target[1], 16), at) for at, target in jumps if target and int(target[1], 16) < at]
    local = {at for at, text in instructions if re.search(r"\b(?:LDL|STL)\b", text)}
    inside = {at for at, _ in instructions if any(start <= at <= end for start, end in loops)}
    return len(local), len(local & inside), len(inside)


def table(costs: list[Cost]) -> Iterator[str]:
    """The costs as lines of text."""
    layout = "{:>6} {:9}{:>5}{:>5} {:11}{:8}{:15}{:15}{:>5}{:>6}{:>8}{:>7}{:>8}{:>6}"
    titles = ["arch", "dtype", "heads", "dim", "norm", "dropout", "kernel", "tile", "regs", "spill"]
    yield layout.format(*titles, "in loop", "of", "shared", "HMMA")
    for cost in costs:
        arch, dtype, heads, head_dim, norm, dropout = cost.case
        kernel, tile = cost.kernel.removesuffix("_kernel"), "x".join(map(str, cost.tile))
        usage = (cost.registers, cost.spills, cost.spills_in_loops, cost.loops, cost.shared, cost.hmma)
        with_dropout = "with" if dropout else "without"
        row = layout.format(f"sm_{arch}", dtype, heads, head_dim, norm, with_dropout, kernel, tile, *usage)
        yield row + ("  FAULT: " + ", ".join(cost.faults) if cost.faults else "")


def cases(
    archs: list[int], quick: bool, norms: Sequence[str] = NORMS, dropout: Sequence[str] = tuple(DROPOUT)
) -> list[Case]:
    """Problems that together meet every row of the tile table; ``quick``: those of the official models, in bfloat16."""
    if quick:
        problems = [("bfloat16", 12, head_dim) for head_dim in (32, 48, 64)]
    else:
        heads = (4, 8, 12, 32)
        problems = [("bfloat16", h, d) for h, d in itertools.product(heads, (32, 48, 64, 128))]
        problems += [("float32", h, d) for h, d in itertools.product(heads, (64, 128))]
    variants = [(norm, DROPOUT[name]) for norm in norms for name in dropout]
    return [Case(arch, *problem, *variant) for arch in archs for problem in problems for variant in variants]


class CudaCost(NamedTuple):
    """What an instantiation of a CUDA kernel needs: a row of the table. Stack, stores and loads as ptxas counts them, a
    thread's bytes; spills are instructions."""

    arch: int
    source: str
    element: str
    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    spills: int
    spills_in_loops: int
    static_shared: int
    dynamic_shared: int | None
    hmma: int

    @property
    def faults(self) -> list[str]:
        """Why this kernel may not be shipped; empty when it may."""
        faults = []
        if self.static_shared + (self.dynamic_shared or 0) > SHARED_LIMIT[self.arch]:
            faults.append(f"shared memory over {SHARED_LIMIT[self.arch]}")
        if self.dynamic_shared == 0:
            faults.append("no plan fits")
        if self.element != "float":
            if self.stack or self.spill_stores or self.spill_loads or self.spills:
                faults.append("local memory")
            if not self.hmma and self.source != "sums":
                faults.append("no tensor-core instruction")
        return faults


def dynamic_shared(arch: int, source: str, element: str, kernel: str) -> int | None:
    """The shared memory that this instantiation asks for at 128x12x197x64, or with 16 heads; 0 where no plan fits.

    None where that problem takes another one, or the extension that plans is not built.
    """
    from reattn.backends import cuda

    if cuda._import_error or source == "sums":
        return None
    padded, *tiles = map(int, re.findall(r", (\d+)", kernel))
    sizes = (4 if element == "float" else 2, 12 if padded == 16 else 16, 64, 128, 197, 197)
    flags = (False, "true" in kernel)  # dropout, sums of the mixed maps
    plan = cuda._cuda.make_plan(getattr(cuda._cuda.Kernel, source), sizes, *flags, SHARED_LIMIT[arch], 132)
    return None if plan.bytes and plan.own != 16 * (tiles or [1])[0] else plan.bytes


def compile_cuda(archs: list[int] | None, sources: list[str] | None, jobs: int) -> list[CudaCost]:
    """Every instantiation in the given sources of csrc/cuda, compiled for the architectures; without them for all that
    the compiler knows. What did not change since the last time is not compiled again.

    Raises ``build_extensions.NotBuilt`` where there is no compiler or it fails.
    """
    import build_extensions as build

    extension = build.CudaExtension()
    folder = build.ROOT / "build" / "compile_report"
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = extension.find_compiler(folder)
    known = build.known_archs(nvcc)
    if unknown := [f"sm_{arch}" for arch in archs or () if arch not in known]:
        raise build.NotBuilt(f"{nvcc[0]} knows nothing of {', '.join(unknown)}")
    archs = archs or [arch for arch in SHARED_LIMIT if arch in known]
    # ptxas speaks of the kernels only while it compiles them.
    command = "$nvcc -cubin -Xptxas -v -MD -MF $out.d $own_flags $flags $in -o $out >$out.txt 2>&1 || ! cat $out.txt"
    lines = extension.rules(nvcc, command)
    cubins = []
    for arch, source, element in itertools.product(archs, sources or build.CUDA_KERNELS, build.CUDA_ELEMENTS):
        cubins.append((arch, source, element, folder / f"{source}_{element}_{arch}.cubin"))
        own_flags = " ".join([*build.gencode(arch), f"-DREATTN_ELEMENT={element}"])
        lines += [f"build {cubins[-1][-1].name}: compile $source/{source}.cu", f"  own_flags = {own_flags}"]
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    with contextlib.redirect_stdout(sys.stderr):
        build.run_ninja(folder, f"-j{jobs}")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(itertools.chain.from_iterable(pool.map(lambda cubin: read_cuda_cubin(*cubin), cubins)))


def read_cuda_cubin(arch: int, source: str, element: str, cubin: pathlib.Path) -> list[CudaCost]:
    """What each kernel of a cubin costs, from what ptxas said of it and from its instructions."""
    said = pathlib.Path(f"{cubin}.txt").read_text()
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    _, *named = re.split(r"Function : (\S+)\n", sass)
    instructions = dict(zip(named[::2], named[1::2], strict=True))
    costs = []
    # What ptxas says after an entry function is about that and the functions that it calls.
    for entry in re.split(r"Compiling entry function ", said)[1:]:
        symbol = re.match(r"'(\S+)' for", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert symbol and registers, entry
        in_all = {
            what: sum(map(int, re.findall(rf"(\d+) bytes {what}", entry)))
            for what in ("stack frame", "spill stores", "spill loads", "smem")
        }
        text = instructions[symbol[1]]
        kernel = readable(symbol[1])
        costs.append(
            CudaCost(
                arch,
                source,
                element,
                kernel,
                int(registers[1]),
                in_all["stack frame"],
                in_all["spill stores"],
                in_all["spill loads"],
                *local_memory(text)[:2],
                in_all["smem"],
                dynamic_shared(arch, source, element, kernel),
                len(re.findall(r"\bHMMA\b", text)),
            )
        )
    return sorted(costs, key=lambda cost: [int(part) if part.isdigit() else part for part in _parts(cost.kernel)])


def _parts(text: str) -> list[str]:
    """Numbers and what stands between them, in turn."""
    return re.split(r"(\d+)", text)


def readable(symbol: str) -> str:
    """A kernel's name with its template arguments; as the linker knows it where there is no c++filt."""
    if not (tool := shutil.which("cu++filt") or shutil.which("c++filt")):
        return symbol
    name = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\breattn::|^void ", "", name)
    return re.sub(r"(?<=>)\(.*\)$|^(\w+)\([^<]*\)$", r"\1", name).replace(" >", ">")


def cuda_table(costs: list[CudaCost]) -> Iterator[str]:
    """The costs as lines of text."""
    width = max((len(cost.kernel) for cost in costs), default=0) + 2
    layout = f"{{:>6}} {{:9}}{{:{width}}}" + "{:>5}{:>6}{:>7}{:>6}{:>6}{:>8}{:>7}{:>8}{:>6}"
    titles = ("regs", "stack", "stores", "loads", "spill", "in loop", "static", "dynamic", "HMMA")
    yield layout.format("arch", "type", "kernel", *titles)
    for cost in costs:
        arch, _, element, kernel, *usage = cost
        row = layout.format(f"sm_{arch}", element, kernel, *("-" if number is None else number for number in usage))
        yield row + ("  FAULT: " + ", ".join(cost.faults) if cost.faults else "")


def main() -> int:
    """The tables on standard output; 1 if any configuration may not be a default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED_LIMIT), help="without, all")
    parser.add_argument("--backend", choices=("triton", "cuda"), nargs="+", help="whose kernels; without, both")
    parser.add_argument("--quick", action="store_true", help="only Triton, the official models' shapes, in bfloat16")
    parser.add_argument("--norm", nargs="+", choices=NORMS, default=NORMS, help="of the Triton kernels; without, all")
    parser.add_argument("--dropout", nargs="+", choices=list(DROPOUT), default=list(DROPOUT), help="as well")
    parser.add_argument("--source", nargs="+", help="sources in csrc/cuda, as forward; without, all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    args = parser.parse_args()
    faults = 0
    backends = args.backend or (["triton"] if args.quick else ["triton", "cuda"])
    if "triton" in backends:
        faults += report_triton(cases(args.arch or list(TRITON_ARCHS), args.quick, args.norm, args.dropout), args.jobs)
    if "cuda" in backends:
        faults += report_cuda(args.arch, args.source, args.jobs, required=args.backend is not None)
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


def report_cuda(archs: list[int] | None, sources: list[str] | None, jobs: int, required: bool) -> int:
    """Prints the CUDA kernels' table; how many kernels may not be shipped. To have no nvcc is a fault only where the
    table is required."""
    from build_extensions import NotBuilt, find_nvcc

    try:
        find_nvcc()
    except NotBuilt as reason:
        print(f"CUDA kernels not compiled: {reason}")
        return int(required)
    try:
        costs = compile_cuda(archs, sources, jobs)
    except NotBuilt as reason:
        print(f"CUDA kernels not compiled: {reason}")
        return 1
    print("\n".join(cuda_table(costs)))
    faults = sum(bool(cost.faults) for cost in costs)
    compiled_for = ", ".join(f"sm_{arch}" for arch in sorted({cost.arch for cost in costs}))
    print(f"{len(costs)} CUDA kernels compiled for {compiled_for}; {faults} faults")
    return faults


if __name__ == "__main__":
    sys.exit(main())
