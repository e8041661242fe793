"""The emulator on CUDA C++: what it reports of wrong kernels, that right ones run, and how csrc/cuda comes to it."""

import pathlib
import re
import shutil
import struct

import pytest
import torch
from parity import assert_parity, make_problem

pytest.importorskip("emulator.cuda", exc_type=ImportError)

from emulator import Fault, Program  # noqa: E402
from reattn.backends import common, cuda, cuda_compile, cuda_driver, cuda_plan  # noqa: E402
from reattn.backends.cuda_plan import SHARED_LIMIT  # noqa: E402

SOURCE = pathlib.Path(__file__).parent / "cuda" / "faults.cu"
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}
THREADS, SHARED, BYTES = 64, 4096, 65536

RACE, IN_FLIGHT = "a race", "copies to and has not waited for"
NO_WRITE = "that nothing has written"
NOT_THERE, OUTSIDE = f"{NO_WRITE}|{RACE}", f"a tensor's end|{RACE}"
# What is reported of each kernel of faults.cu that is wrong.
FAULTS = {
    "outside": "shared memory from 4096 to 4100, of 4096 bytes",
    "negative": "shared memory from 4294967292 to 4294967296, of 4096 bytes",
    "straddling": "shared memory from 4080 to 4096, of 4088 bytes",
    "misaligned": "shared memory at 4, no multiple of 8",
    "misaligned_row": "shared memory at 8, no multiple of 16",
    "misaligned_copy": "shared memory at 8, no multiple of 16",
    "nothing_wrote": "block 1, .* shared memory at 256 that nothing has written",
    "read_after_write": RACE,
    "row_after_write": RACE,
    "write_after_read": RACE,
    "write_after_many_reads": f"lane 31, .*{RACE}: it writes what another thread reads .* at 0$",
    "write_after_write": f"{RACE}: it writes what thread 0 wrote",
    "write_of_half_a_word": RACE,
    "other_lane": f"lane 16, .*{RACE}: it reads what thread 0 wrote",
    "early_copy": IN_FLIGHT,
    "early_group": f"shared memory at 16 .*{IN_FLIGHT}",
    "open_group": IN_FLIGHT,
    "overwritten_copy": f"thread 1 {IN_FLIGHT}",
    "synced_too_early": f"thread 32 {IN_FLIGHT}",
    "copy_of_other_warp": f"warp 1, .*{RACE}: it reads what thread 0 wrote",
    "copy_over_read": f"{RACE}: it writes what thread [0-9]+ reads",
    "missed_by_lane": "a barrier that not all lanes of the warp reach",
    "missed_by_warp": "a barrier that only 1 of 2 warps reach",
    "exited_lane": "a shuffle that not all of its lanes reach together",
    "lone_lane": "a shuffle that not all of its lanes reach together",
    "diverged": "a shuffle that not all of its lanes reach together|a sync",
    "diverged_rows": "ldmatrix that not all of its lanes reach together",
    "diverged_product": "a product that not all of its lanes reach together",
    "diverged_barrier": "a barrier that not all lanes of the warp reach",
    "device_outside": "4 bytes of device memory 0 bytes behind a tensor's end",
    "device_before": "4 bytes of device memory",
    "device_race": f"lane 8, .*{RACE}: it writes what thread 5 wrote",
    "race_of_blocks": f"block 1, .*{RACE}: block 0 writes the same",
    "read_of_other_block": f"block 1, .*{RACE}: block 0 writes the same",
    "device_misaligned": "device memory at an address that is no multiple of 16",
    "prefetched_outside": "1 bytes of device memory 0 bytes behind a tensor's end",
    "copied_from_outside": "16 bytes of device memory 0 bytes behind a tensor's end",
    "no_pointer": "2 bytes of device memory outside all tensors",
}
# Without instructions for asynchronous copies there is nothing to wait for.
ASYNCHRONOUS = {"early_copy", "early_group", "open_group", "overwritten_copy", "synced_too_early"}
RIGHT = {"pipeline", "reduction", "exchange", "alike", "branches"}


@pytest.fixture(scope="module", params=[75, 80], ids=lambda arch: f"sm_{arch}")
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def ptx(arch):
    return cuda_compile.compile_text(SOURCE.read_text(), "outside", f"compute_{arch}", str(SOURCE)).image.decode()


def launch(ptx, name, *, a=None, b=None, values=None, number=0, outputs=2048, blocks=2, threads=THREADS, shared=SHARED):
    """What the kernel leaves in `out`; ``values`` lie at `in`, with 64 bytes that are no part of it on either side."""
    values = torch.zeros(BYTES, dtype=torch.uint8) if values is None else values.contiguous().view(torch.uint8)
    memory = torch.cat([torch.zeros(64, dtype=torch.uint8), values, torch.zeros(64, dtype=torch.uint8)])
    assert memory.data_ptr() % 16 == 0
    out = torch.full((outputs,), float("nan"))
    matrices = [a.contiguous(), b.contiguous()] if a is not None else []
    addresses = [tensor.data_ptr() for tensor in matrices] or [0, 0]
    Program(ptx, name).run(
        grid=(blocks, 1, 1),
        threads=threads,
        shared_bytes=shared,
        arguments=struct.pack("QQQQi4x", *addresses, out.data_ptr(), memory.data_ptr() + 64, number),
        memory=[(tensor.data_ptr(), tensor.nbytes) for tensor in [out, *matrices]]
        + [(memory.data_ptr() + 64, values.nbytes)],
    )
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_faults(ptx, arch, name):
    if arch < 80 and name in ASYNCHRONOUS:
        pytest.skip("has no asynchronous copies")
    with pytest.raises(Fault) as raised:
        launch(ptx, name, shared=SHARED - 8 * (name == "straddling"))
    message = str(raised.value)
    for pattern in [f"^{name}: block ", r"(faults\.cu|instructions\.cuh):[0-9]+: ", FAULTS[name]]:
        assert re.search(pattern, message), f"{pattern}: {message}"
    test_exchange(ptx)  # what a kernel left behind does not hinder the next one


def test_every_fault_is_expected():
    kernels = set(re.findall(r"^KERNEL\((\w+)\)", SOURCE.read_text(), re.MULTILINE))
    assert {name for name in kernels - RIGHT if not re.search("^half|^bfloat16|^float_", name)} == {*FAULTS}


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_products(ptx, name, by_column):
    """Of matrices; and something else where two registers of a fragment are swapped."""
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)).to(DTYPES[name])
    expected = 1 + (a.double().mT @ b.double().mT if by_column else a.double() @ b.double())
    options = {"a": a, "b": b, "number": int(by_column), "outputs": 256, "blocks": 1, "threads": 32}
    found = launch(ptx, f"{name}_product", **options).double().view(16, 16)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    swapped = launch(ptx, f"{name}_product_swapped", **options).double().view(16, 16)
    assert (swapped - expected).abs().max() > 0.1


def test_pipeline(ptx):
    """Asynchronous copies on their way while others are summed."""
    values = (torch.arange(8 * THREADS * 4) % 251).float()
    blocks = 3
    found = launch(ptx, "pipeline", values=values, blocks=blocks, outputs=blocks * THREADS, shared=2 * THREADS * 16)
    steps = values.view(8, 4, THREADS).double()
    steps[5] = 0
    columns = [(thread ^ 32) * 7 % THREADS for thread in range(THREADS)]
    expected = steps.sum((0, 1))[columns].repeat(blocks)
    torch.testing.assert_close(found.double(), expected)


def test_reduction(ptx):
    lanes = torch.arange(2 * THREADS) % 32
    expected = 31 * 32 * 63 // 6 + (lanes + 1) % 32
    assert torch.equal(launch(ptx, "reduction", outputs=2 * THREADS), expected.float())


def test_exchange(ptx):
    threads = torch.arange(THREADS)
    values = threads.float()
    for _ in range(3):
        values = 2 * values[threads ^ 32] + values[0]
    expected = values + values[threads ^ 1]
    assert torch.equal(launch(ptx, "exchange", outputs=2 * THREADS), expected.repeat(2))


def test_alike(ptx):
    assert torch.equal(launch(ptx, "alike", outputs=2 * THREADS), torch.full((2 * THREADS,), 3.0))


def test_branches(ptx):
    """Lanes that went different ways meet again before they shuffle."""
    expected = []
    for thread in range(THREADS):
        lane = thread % 32
        value = sum(3 if lane % 2 else i for i in range(lane % 5))
        expected.append(value + (100 if lane % 3 == 0 and lane > 10 else 200 if lane % 3 == 1 else 0))
    expected = torch.tensor(expected).float()[torch.arange(THREADS) ^ 1]
    assert torch.equal(launch(ptx, "branches", outputs=2 * THREADS), expected.repeat(2))


def convert(ptx, name, words, outputs):
    return launch(ptx, name, values=words, number=len(words), outputs=outputs, blocks=-(-len(words) // THREADS))


@pytest.mark.parametrize("name", DTYPES)
def test_conversions(ptx, name):
    dtype = DTYPES[name]
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    floats = convert(ptx, f"{name}_to_float", every.view(torch.int32), 65536)
    expected = every.view(dtype).float()
    torch.testing.assert_close(floats, expected, rtol=0, atol=0, equal_nan=True)
    known = ~expected.isnan()  # NaN has no sign
    assert torch.equal(floats.signbit()[known], expected.signbit()[known])
    # Every number there is, what lies halfway to its neighbour, what lies next to both, and any bits.
    bits = expected.view(torch.int32)
    step = {torch.float16: 1 << 12, torch.bfloat16: 1 << 15}[dtype]
    near = [bits + offset for offset in (-step - 1, -step, -step + 1, -1, 0, 1, step, step + 1)]
    halfway = ((expected[:-1].double() + expected[1:].double()) / 2).float().view(torch.int32)
    near += [halfway - 1, halfway, halfway + 1]
    near += [torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0)).int()]
    bits = torch.cat(near)
    rounded = convert(ptx, f"float_to_{name}", bits, len(bits)).view(dtype)
    both = bits.view(torch.float32).to(dtype).repeat_interleave(2)
    torch.testing.assert_close(rounded, both, rtol=0, atol=0, equal_nan=True)
    known = ~both.isnan()
    assert torch.equal(rounded.signbit()[known], both.signbit()[known])


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of csrc that kernels are compiled from."""
    shutil.copytree(cuda_compile.folder(), tmp_path / "csrc")
    monkeypatch.setattr(cuda_compile, "folder", lambda: tmp_path / "csrc")
    monkeypatch.setenv("REATTN_CACHE_DIR", str(tmp_path / "cache"))

    def forget():
        cuda_compile.sources.cache_clear()
        cuda_compile._fingerprint.cache_clear()
        cuda_driver.use(cuda_driver.current)

    forget()
    yield tmp_path / "csrc"
    monkeypatch.undo()
    forget()


@pytest.mark.skipif(not cuda.EMULATED, reason="needs the emulator")
def test_card():
    """What it says of shared memory is what a block of the default architecture has."""
    assert cuda_driver.describe(0)[0] == SHARED_LIMIT[90]


# What is changed in csrc/cuda, spaces aside, and what is then reported of which kernel; without one, nothing but
# results is wrong. The problem has layer norm in float16 if it is not said otherwise.
HALF, FLOAT, BATCH = {}, {"dtype": torch.float32}, {"mode": "batch-training"}
PRE_MIXED, NOT_RESIDENT = "if constexpr (kPre", "if constexpr (!kRes"
SHUFFLE = "value += shuffle_xor(value, 1);"
CHANGES = {
    "maps not there yet": ("forward.cu", "sync_block(); MixedSums", "MixedSums", "forward", NOT_THERE, HALF),
    "rows not there yet": ("forward.cu", "sync_block(); for_each_alike", "for_each_alike", "forward", RACE, HALF),
    "sums that are not there": ("forward.cu", "store(of_row(kSums, row, head), 1.0f);", ";", "forward", NO_WRITE, HALF),
    "moments that are not there": ("forward.cu", "MixedSums::clear();", ";", "forward", NO_WRITE, BATCH),
    "maps of other lanes": ("forward.cu", "sync_warp(); Heads", "Heads", "forward", RACE, HALF),
    "moments of other lanes": ("forward.cu", "(kStatistics) { sync_warp();", "(kStatistics) {", "forward", RACE, BATCH),
    "rows behind the last": ("forward.cu", "&& first_row + row >= p.out.rows", "&& false", "forward", OUTSIDE, FLOAT),
    "rows of half a tile": (
        "forward.cu", "else if (first_row + row < p.out.rows)", "else", "forward", OUTSIDE, HALF
    ),
    "maps of half a tile": (
        "tiles.cuh", "store_two_matrices(half_", "store_two_matrices(tiles_", "forward", NOT_THERE, HALF
    ),
    "LSE too far": ("forward.cu", "(first_row + row < rows_with_lse)", "(rows_with_lse)", "forward", OUTSIDE, HALF),
    "copies of other lanes": ("tiles.cuh", "arrived<0>(); sync_warp();", "arrived<0>();", "forward", RACE, FLOAT),
    "copies not awaited": ("tiles.cuh", "copies_arrived<0>();", ";", "forward", IN_FLIGHT, FLOAT),
    "a lane alone": ("tiles.cuh", SHUFFLE, f"if (lane() != 5) {SHUFFLE}", "forward", "a shuffle that", FLOAT),
    "gradients that are not there yet": (
        "backward.cu", f"sync_block(); {PRE_MIXED}", PRE_MIXED, "backward", NOT_THERE, HALF
    ),
    "gradients still to be mixed": (
        "backward.cu", f"sync_block(); {NOT_RESIDENT}", NOT_RESIDENT, "backward", RACE, HALF
    ),
    "gradients of other lanes": ("backward.cu", "sync_warp(); store_mat", "store_mat", "backward", RACE, HALF),
    "mixed maps of other lanes": ("backward.cu", "put(mix); sync_warp();", "put(mix);", "backward", NOT_THERE, HALF),
    "sums over maps": ("backward.cu", "sync_block();  // the maps are", "// the maps are", "backward", RACE, HALF),
    "sums of other warps": ("backward.cu", "sync_block(); for (int i", "for (int i", "backward", NOT_THERE, HALF),
    "workspace behind the last row": (
        "backward.cu", "rows = smaller(kRows, p.query.rows - first_row);", "rows = kRows;", "backward", OUTSIDE, HALF
    ),
    "workspace of two blocks": (
        "backward.cu", "% p.row_blocks_of_launch * kRows", "% p.row_blocks_of_launch * 8", "backward", OUTSIDE, HALF
    ),
    "copies that are not there yet": ("products.cu", "copies_arrived<kStages - 2>();", "", "products", IN_FLIGHT, HALF),
    "copies of other threads": ("products.cu", "sync_block(); fetch", "fetch", "products", RACE, HALF),
    "too many rows": ("products.cu", "row_ < rows ? columns_of", "true ? columns_of", "products", OUTSIDE, HALF),
    "a key too many": ("products.cu", "p.key.rows - own_key)", "p.key.rows - own_key + 1)", "products", OUTSIDE, HALF),
    "stages still read": ("products.cu", "sync_block();  // all have left", "// all have left", "products", RACE, HALF),
    "keys of other lanes": ("products.cu", "sync_warp(); to +=", "to +=", "products", RACE, HALF),
    "sums of other threads": ("sums.cu", "sync_block(); double total", "double total", "unfold", NOT_THERE, HALF),
    "registers swapped": ("instructions.cuh", "{%4, %5, %6, %7}", "{%4, %6, %5, %7}", None, None, HALF),
    "scale": ("scores.cuh", "rounded_product(score, ", "rounded_product(1.01f * score, ", None, None, HALF),
    "another launch's rows": ("products.cu", "if (!p.first_rows) pair", "if (p.first_rows) pair", None, None, HALF),
}  # fmt: skip


@pytest.mark.cuda
@pytest.mark.skipif(not cuda.EMULATED, reason="needs the emulator")
@pytest.mark.parametrize("change", CHANGES)
def test_faults_of_the_kernels_themselves(change, sources, monkeypatch):
    file, old, new, kernel, reported, options = CHANGES[change]
    pattern = r"\s*".join(map(re.escape, old.split()))
    text, times = re.subn(pattern, new.replace("\\", r"\\"), (sources / "cuda" / file).read_text())
    assert times, old
    (sources / "cuda" / file).write_text(text)
    # Launches of 32 rows, which another one follows.
    monkeypatch.setattr(common, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(cuda, "_cut", lambda size, shared_bytes, _: cuda_plan.cut_backward(size, shared_bytes, 2))
    problem = {"mode": "layer", "dtype": torch.float16} | options
    error, pattern = (Fault, rf"reattn\d+{kernel}E.*: block .*({reported})") if reported else (AssertionError, None)
    with pytest.raises(error, match=pattern):
        assert_parity(make_problem(**problem, heads=5, seqlen=43, seqlen_k=70), "cuda")
