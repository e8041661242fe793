"""What of a kernel's machine code runs how often: SASS, and what executing the PTX that it is made of counted.

ptxas notes for each instruction the line of PTX that it is made from. A basic block of SASS runs as often as those
lines do; all of its instructions are issued then, those that a predicate switches off as well.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import networkx

# What stays where PTX has it: one in PTX is one in SASS, and it is not moved out of loops.
ANCHORS = {"HMMA", "LDSM", "STSM", "LDS", "STS", "LDG", "STG", "LDGSTS", "SHFL", "BAR", "ATOMG", "RED"}
ENDS = {"BRA", "EXIT", "RET", "BRX", "JMP", "KILL"}


class Instruction(NamedTuple):
    """Of a listing: the line of PTX that it is made from, its predicate (empty for none), its opcode with modifiers,
    what stands behind."""

    line: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


class Kernel(NamedTuple):
    """Basic blocks by label, numbers where they have none, the first being the entry; and which follow on which."""

    blocks: dict[str, list[Instruction]]
    flow: networkx.DiGraph


def tool(name: str) -> str:
    """A program of the CUDA toolkit: the one that triton ships, or else one on the path.

    Raises FileNotFoundError where there is none.
    """
    try:
        import triton.backends.nvidia

        found = Path(triton.backends.nvidia.__file__).parent / "bin" / name
        if found.exists():
            return str(found)
    except ImportError:
        pass
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"needs {name}, which triton ships, or one on the path")


def assemble(ptx: str, ptxas: str = "ptxas") -> bytes:
    """The cubin of a PTX module for the architecture that it names, with the lines that its instructions are made from.

    Raises FileNotFoundError without ``ptxas``, RuntimeError with what it says of the module.
    """
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [tool(ptxas), "-lineinfo", f"--gpu-name={target[1] if target else 'sm_90'}", source, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{ptxas}: {done.stderr.strip()}")
        return cubin.read_bytes()


def disassemble(cubin: bytes) -> dict[str, Kernel]:
    """The kernels of a cubin that :func:`assemble` or Triton made."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "--print-code", "--print-line-info-ptx", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def registers(cubin: bytes) -> dict[str, int]:
    """Of a thread, by kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage.stdout)}


def parse(listing: str) -> dict[str, Kernel]:
    """The kernels of what ``nvdisasm --print-line-info-ptx`` prints."""
    _, *sections = re.split(r"^\s*\.section\s+\.text\.([^\s,]+).*$", listing, flags=re.MULTILINE)
    return {name: _parse_kernel(text) for name, text in zip(sections[::2], sections[1::2], strict=True)}


def _parse_kernel(text: str) -> Kernel:
    blocks: dict[str, list[Instruction]] = {}
    flow = networkx.DiGraph()
    line, label, falls = 0, "", None

    def begin(name: str) -> None:
        nonlocal label, falls
        label = name
        blocks[name] = []
        flow.add_node(name)
        if falls is not None:
            flow.add_edge(falls, name)
        falls = name

    for row in text.splitlines():
        if found := re.search(r'nv_debug_ptx_txt", line (\d+)', row):
            line = int(found[1])
        elif found := re.match(r"(\.L_\w+):", row):
            begin(found[1])
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", row):
            if not label:
                begin(str(len(blocks)))
            blocks[label].append(Instruction(line, found[1] or "", found[2], found[3]))
            last = blocks[label][-1]
            if last.name in ENDS:
                if target := re.search(r"`\((\.L_\w+)\)", last.operands):
                    flow.add_edge(label, target[1])
                # A second predicate stands among the operands.
                conditional = last.predicate or re.match(r"!?U?P\d", last.operands)
                label, falls = "", label if conditional else None
    return Kernel(blocks, flow)


def runs(kernel: Kernel, lines: Mapping[int, int]) -> dict[str, float]:
    """How often each block runs, given how often each line of PTX did.

    As often as the anchor that did most: ptxas turns short branches into predicates, so that others of the block are
    switched off. What moves out of loops is no anchor; without any, most of what has no predicate says it. Where ptxas
    unrolled a loop of its own accord, copies share what their line says.
    """
    entry = next(iter(kernel.blocks))
    reached = {entry} | networkx.descendants(kernel.flow, entry)
    copies = Counter((each.line, each.name) for label in reached for each in kernel.blocks[label])

    def times(each: Instruction) -> float:
        return lines.get(each.line, 0) / copies[each.line, each.name]

    found = dict.fromkeys(kernel.blocks, 0.0)
    for label in reached:
        block = kernel.blocks[label]
        if anchors := [each for each in block if each.name in ANCHORS and each.predicate != "@!PT"]:
            found[label] = max(map(times, anchors))
        elif block:
            found[label] = mode(map(times, [each for each in block if not each.predicate] or block))
    return found


def executed(kernel: Kernel, lines: Mapping[int, int]) -> Counter[str]:
    """Warp instructions by opcode, modifiers included, that ``lines`` come to."""
    total: Counter[str] = Counter()
    for label, times in runs(kernel, lines).items():
        for each in kernel.blocks[label]:
            total[each.opcode] += times
    return +total
