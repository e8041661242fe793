"""``python3 -m benchmarks.cpu_stages``: where the time of the CPU kernels goes, stage by stage, against the peak; and,
from the times of the units of work, what more threads would take, memory apart, and how busy they would be.

Compiles ``cpu_stages.cpp`` with the kernels of the instruction set in use and prints the tables. Needs g++ or clang++
(``CXX``) and the built extension, which tells the instruction set.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import torch

from benchmarks.machine import machine_info

ROOT = pathlib.Path(__file__).parent.parent


def compile_program(isa: str, target: pathlib.Path) -> None:
    """The program for one instruction set, with the flags the extension is built with."""
    sys.path.insert(0, str(ROOT))
    from build_extensions import CPU_FLAGS, X86_FLAGS

    flags = ["-O3", *CPU_FLAGS.split(), *X86_FLAGS.get(isa, "").split(), f"-DREATTN_ISA={isa}", f"-I{ROOT}/csrc/cpu"]
    sources = [ROOT / "benchmarks" / "cpu_stages.cpp", ROOT / "csrc" / "cpu" / "driver.cpp"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *map(str, sources), "-o", str(target)], check=True)


def main() -> None:
    """The table, under a line that names the machine and the commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("BATCH", "HEADS", "SEQLEN", "DIM")
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 12, 197, 32), metavar=names)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--norm", choices=("layer", "batch", "none"), default="layer")
    parser.add_argument("--repetitions", type=int, default=20, help="the least time of so many counts")
    args = parser.parse_args()
    machine = machine_info(torch.device("cpu"))
    print(f"{machine['device']}, {machine['instruction_set']}, commit {machine['commit']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "cpu_stages"
        compile_program(machine["instruction_set"], program)
        subprocess.run([program, args.dtype, args.norm, *map(str, (*args.shape, args.repetitions))], check=True)


if __name__ == "__main__":
    main()
