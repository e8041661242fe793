"""The emulator on CUDA C++: what it reports of wrong kernels, that right ones run, and how csrc/cuda comes to it."""

import pathlib
import re
import shutil
import struct

import pytest
import torch
from parity import assert_parity, make_problem

pytest.importorskip("emulator.cuda", exc_type=ImportError)

import emulator.cuda  # noqa: E402
from build_extensions import SHARED_LIMIT  # noqa: E402
from emulator import Fault, Program, nvrtc  # noqa: E402
from reattn.backends import cuda  # noqa: E402

SOURCE = pathlib.Path(__file__).parent / "cuda" / "faults.cu"
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}
THREADS, SHARED, BYTES = 64, 4096, 65536

RACE, IN_FLIGHT = "a race", "copies to and has not waited for"
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
    return nvrtc.compile_text(SOURCE.read_text(), "outside", arch, str(SOURCE))[0]


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


def test_errors_of_a_source():
    text = '#include <cstdint>\nextern "C" __global__ void wrong(float* out) { *out = missing; }\n'
    with pytest.raises(RuntimeError, match=r'wrong of my\.cu: .*\n.*my\.cu\(2\): error: identifier "missing"'):
        nvrtc.compile_text(text, "wrong", 80, "my.cu")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of csrc, and an empty cache."""
    shutil.copytree(nvrtc.SOURCES.parent, tmp_path / "csrc")
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path / "csrc" / "cuda")
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path / "ptx")
    for cached in (nvrtc.fingerprint, emulator.cuda.compiled):
        cached.cache_clear()
    yield tmp_path / "csrc"
    for cached in (nvrtc.fingerprint, emulator.cuda.compiled):
        cached.cache_clear()


@pytest.mark.parametrize("changed", ["cuda/sums.cu", "cuda/operands.cuh", "fold.h"])
def test_cache(changed, sources, monkeypatch):
    """A kernel is compiled once, until a source changes."""
    compiled = []
    compile_text = nvrtc.compile_text
    monkeypatch.setattr(nvrtc, "compile_text", lambda *call: compiled.append(call) or compile_text(*call))
    kernel = ("sums", "reattn::add_up_kernel<float>", 80)
    first = nvrtc.compile_kernel(*kernel)
    assert first[1] in first[0] and len(compiled) == 1
    assert nvrtc.compile_kernel(*kernel) == first and len(compiled) == 1
    with (sources / changed).open("a") as file:
        file.write("// changed\n")
    nvrtc.fingerprint.cache_clear()
    nvrtc.compile_kernel(*kernel)
    assert len(compiled) == 2
    nvrtc.compile_kernel(*kernel[:2], 90)
    assert len(compiled) == 3 and len(list(nvrtc.CACHE.iterdir())) == 3


@pytest.mark.skipif(not cuda.EMULATED, reason="needs the emulator")
def test_card():
    """What the host part says of shared memory is what a block of the default architecture has."""
    assert emulator.cuda._cuda.describe(0)[0] == SHARED_LIMIT[90]


# What is changed in csrc/cuda, and what is then reported of forward; None where nothing but its results is wrong.
CHANGES = {
    "no barrier": ("forward.cu", "sync_block();\n    Mixing", "Mixing", "nothing has written|a race"),
    "no barrier between reads and writes": ("forward.cu", "sync_block();\n    for_each", "for_each", RACE),
    "no sync of a warp": ("mixing.cuh", "sync_warp();", "", RACE),
    "no sync after copies": ("stream.cuh", "sync_warp();", "", RACE),
    "copies not awaited": ("stream.cuh", "copies_arrived<1>();", ";", IN_FLIGHT),
    "no end of the rows": ("scores.cuh", "place.first_row + row < p.query.rows", "true", f"{RACE}|a tensor's end"),
    "one lane's shuffle": ("stream.cuh", "warp(reattn::warp())", "warp(lane() ? 0 : reattn::warp())", "a shuffle that"),
    "registers swapped": ("instructions.cuh", "{%4, %5, %6, %7}", "{%4, %6, %5, %7}", None),
    "scale": ("scores.cuh", "rounded_product(product, p.scale_log2)", "product * p.scale_log2 * 1.01f", None),
}


@pytest.mark.cuda
@pytest.mark.skipif(not cuda.EMULATED, reason="needs the emulator")
@pytest.mark.parametrize("change", CHANGES)
def test_faults_of_the_kernels_themselves(change, sources):
    file, old, new, reported = CHANGES[change]
    text = (sources / "cuda" / file).read_text()
    assert old in text
    (sources / "cuda" / file).write_text(text.replace(old, new))
    error, pattern = (Fault, f"forward_kernel.*: block .*({reported})") if reported else (AssertionError, None)
    with pytest.raises(error, match=pattern):
        assert_parity(make_problem("layer", heads=5, seqlen=35, seqlen_k=40, dtype=torch.float16), "cuda")
