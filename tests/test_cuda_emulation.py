"""What runs the CUDA kernels on the host, tests/cuda/emulated.h: it reports what a kernel does wrong, and only that."""

import os
import pathlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")

SHARED, DEVICE = "of shared memory", "of device memory"
RACE, IN_FLIGHT = "races with the {} by warp", "is in flight"
# What is reported of every kernel of tests/cuda/faults.cpp; where the order of lanes and warps decides, either of two.
FAULTS = {
    "outside": [f"read {SHARED}: 4 bytes at byte 4096, outside its 4096 bytes"],
    "negative": [f"write {SHARED}: 4 bytes at byte -4, outside"],
    "straddling": [f"write {SHARED}: 16 bytes at byte 4088, outside"],
    "misaligned": [f"read {SHARED}: 8 bytes at byte 4, misaligned"],
    "misaligned_row": [f"read {SHARED}: 16 bytes at byte 8, misaligned"],
    "misaligned_copy": [f"copy {SHARED}: 16 bytes at byte 8, misaligned"],
    "nothing_wrote": ["block (1, 0)", f"read {SHARED} at byte 256, which nothing wrote"],
    "read_after_write": [f"read {SHARED}", RACE.format("write")],
    "row_after_write": [f"read {SHARED}", RACE.format("write")],
    "write_after_read": [f"{SHARED} at byte", "races with the (read|write) by warp"],
    "write_after_many_reads": [f"{SHARED} at byte 0 races with the (read|write) by warp"],
    "write_after_write": [f"write {SHARED} at byte 0", RACE.format("write")],
    "other_warp": [f"warp 1, lane [0-9]+: read {SHARED}", f"{RACE.format('write')} 0|which nothing wrote"],
    "early_copy": [f"read {SHARED}", IN_FLIGHT],
    "early_group": [f"read {SHARED} at byte", IN_FLIGHT],
    "open_group": [f"read {SHARED}", IN_FLIGHT],
    "overwritten_copy": [f"write {SHARED}", IN_FLIGHT],
    "synced_too_early": [f"read {SHARED}", f"{IN_FLIGHT}|{RACE.format('write')}"],
    "copy_of_other_warp": [f"warp 1, lane [0-9]+: read {SHARED}", f"{RACE.format('write')} 0|which nothing wrote"],
    "copy_over_read": [SHARED, f"{RACE.format('read')} 0|{IN_FLIGHT}"],
    "missed_barrier": ["finished while others of its block wait in sync_block|sync_block, but .* has finished"],
    "missed_by_lane": ["finished while others of its warp wait in sync_block|sync_block, but .* has finished"],
    "exited_lane": ["finished while others of its warp wait in shuffle|shuffle, but .* lane 3 has finished"],
    "diverged": ["diverged: (sync_warp|shuffle), but lane [0-9]+ waits in (sync_warp|shuffle)"],
    "diverged_barrier": ["diverged: (sync_warp|sync_block), but lane [0-9]+ waits in (sync_warp|sync_block)"],
    "device_outside": [f"read {DEVICE}: 4 bytes at byte 65536 of a tensor of 65536 bytes, outside every tensor"],
    "device_before": [f"write {DEVICE}: 4 bytes", "outside every tensor"],
    "device_race": [f"write {DEVICE} races with the write by warp"],
    "device_misaligned": [f"read {DEVICE}", "misaligned for 16 bytes"],
    "copied_from_outside": [f"copy {DEVICE}: 16 bytes at byte 65536 of a tensor of 65536 bytes"],
    "undeclared": [f"write {DEVICE}: 4 bytes at byte", "outside every tensor"],
    "too_much": ["too_much: cudaErrorInvalidValue"],
}
RIGHT = [
    *(f"{dtype}_product{of}" for dtype in ("half", "bfloat16") for of in ("", "_of_columns")),
    *("pipeline", "reduction", "exchange"),
]
ORDERS = ["0", "1", "2", "3"]

pytestmark = [
    pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """tests/cuda/faults.cpp, and the same with UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("cuda_emulation")
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",
        "-DREATTN_EMULATED",
    ]
    flags += [f"-I{SOURCES}", f"-I{ROOT / 'tests' / 'cuda'}", str(ROOT / "tests" / "cuda" / "faults.cpp")]
    kinds = {"plain": ["-O2"], "sanitized": ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"]}

    def build(kind):
        command = [COMPILER, *kinds[kind], *flags, "-o", str(folder / kind)]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-4000:]
        return folder / kind

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(kinds, pool.map(build, kinds), strict=True))


def run(program, name, order="0"):
    environment = os.environ | {"REATTN_EMULATED_ORDER": order}
    finished = subprocess.run([program, name], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout.strip()


def convert(program, name, values):
    finished = subprocess.run([program, name], input=values.numpy().tobytes(), capture_output=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return bytearray(finished.stdout)


def matches(text, patterns):
    return all(re.search(pattern, text) for pattern in patterns)


@pytest.mark.parametrize("name", FAULTS)
def test_faults(programs, name):
    patterns = [pattern.replace("(1, 0)", r"\(1, 0\)") for pattern in FAULTS[name]]
    for order in ORDERS:
        reported = run(programs["plain"], name, order)
        assert matches(reported, patterns), f"order {order}: {reported}"
        assert "\n" not in reported and name in reported


def test_every_fault(programs):
    finished = subprocess.run([programs["plain"]], capture_output=True, text=True)
    assert sorted(finished.stdout.split()) == sorted(FAULTS)


@pytest.mark.parametrize("name", RIGHT)
def test_right(programs, name):
    for order in ORDERS:
        assert run(programs["plain"], name, order) == "right", f"order {order}"


def test_sanitized(programs):
    """Undefined behaviour would end the program."""
    for name in [*FAULTS, *RIGHT]:
        assert run(programs["sanitized"], name), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_conversions(programs, dtype, request):
    name = request.node.callspec.id
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    floats = torch.frombuffer(convert(programs["plain"], f"{name}_to_float", every), dtype=torch.float32)
    expected = every.view(dtype).float()
    torch.testing.assert_close(floats, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(floats.signbit(), expected.signbit())
    # Every number there is, what lies halfway to its neighbour, what lies next to both, and any bits.
    generator = torch.Generator().manual_seed(0)
    bits = expected.view(torch.int32)
    step = {torch.float16: 1 << 12, torch.bfloat16: 1 << 15}[dtype]
    near = [expected.view(torch.int32) + offset for offset in (-step - 1, -step, -step + 1, -1, 0, 1, step, step + 1)]
    halfway = ((expected[:-1].double() + expected[1:].double()) / 2).float().view(torch.int32)
    near += [halfway - 1, halfway, halfway + 1]
    near += [torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).int()]
    bits = torch.cat(near).view(torch.float32)
    rounded = torch.frombuffer(convert(programs["plain"], f"float_to_{name}", bits), dtype=torch.int16).view(dtype)
    both = bits.to(dtype).repeat_interleave(2)
    torch.testing.assert_close(rounded, both, rtol=0, atol=0, equal_nan=True)
    known = ~both.isnan()
    assert torch.equal(rounded.signbit()[known], both.signbit()[known])
