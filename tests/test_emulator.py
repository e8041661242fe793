"""The emulator on PTX: what instructions compute, what is counted, and faults planted in compiled Triton kernels.

``test_emulator_cuda.py`` has kernels in CUDA C++ with a fault each.
"""

import math
import re
import struct

import numpy as np
import pytest
import torch
from parity import assert_parity, compute, make_problem

pytest.importorskip("emulator", exc_type=ImportError)
triton = pytest.importorskip("triton", reason="compiles Triton kernels")
if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU", allow_module_level=True)

import emulator  # noqa: E402
from emulator import Fault, Program, triton_driver  # noqa: E402
from reattn.kernels import backward, forward, sums  # noqa: E402

# Lane l has a, b, c[l] in %r1 to %r3 and %f1 to %f3, and leaves %r9; %r4 is its number, %r5 shared memory's address.
KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry snippet(.param .u64 snippet_param_0)
{{
  .reg .pred %p<10>;
  .reg .b16 %rs<10>;
  .reg .b32 %r<40>;
  .reg .f32 %f<10>;
  .reg .b64 %rd<10>;
  .reg .f64 %fd<10>;
  ld.param.u64 %rd1, [snippet_param_0];
  mov.u32 %r4, %tid.x;
  mul.wide.u32 %rd2, %r4, 16;
  add.s64 %rd3, %rd1, %rd2;
  ld.global.v4.u32 {{%r1, %r2, %r3, %r9}}, [%rd3];
  mov.b32 %f1, %r1;
  mov.b32 %f2, %r2;
  mov.b32 %f3, %r3;
  mov.u32 %r5, memory;
  {snippet}
  st.global.u32 [%rd3+12], %r9;
  ret;
}}
"""


LANES = np.arange(32)
NAN, INF = float("nan"), float("inf")


def run(snippet, a=0, b=0, c=0, *, threads=32, shared_bytes=4096, blocks=1, contract=True, **options):
    """What each lane leaves, as unsigned numbers of 32 bits; and the report."""
    numbers = np.zeros((threads, 4), np.uint32)
    for column, values in enumerate((a, b, c)):
        values = np.broadcast_to(np.asarray(values), threads)
        floats = values.dtype.kind == "f"
        numbers[:, column] = (
            values.astype(np.float32).view(np.uint32) if floats else values.astype(np.int64) & 0xFFFFFFFF
        )
    report = Program(KERNEL.format(snippet=snippet), "snippet", contract).run(
        grid=(blocks, 1, 1),
        threads=threads,
        shared_bytes=shared_bytes,
        arguments=struct.pack("Q", numbers.ctypes.data),
        memory=[(numbers.ctypes.data, numbers.nbytes)],
        **options,
    )
    return numbers[:, 3], report


def floats(snippet, *values, **options):
    return run(snippet + " mov.b32 %r9, %f9;", *(np.float32(value) for value in values), **options)[0].view(np.float32)


@pytest.mark.parametrize(
    ("instruction", "a", "b", "c", "expected"),
    [
        ("add.s32 %r9, %r1, %r2;", 0xFFFFFFFF, 2, 0, 1),
        ("sub.s32 %r9, %r1, %r2;", 1, 2, 0, -1),
        ("mul.lo.s32 %r9, %r1, %r2;", -3, 5, 0, -15),
        ("mul.hi.u32 %r9, %r1, %r2;", 0xFFFFFFFF, 0xFFFFFFFF, 0, 0xFFFFFFFE),
        ("mul.hi.s32 %r9, %r1, %r2;", -1, 5, 0, -1),
        ("mad.lo.s32 %r9, %r1, %r2, %r3;", -3, 5, 20, 5),
        ("mul.wide.s32 %rd4, %r1, %r2; shr.u64 %rd5, %rd4, 32; cvt.u32.u64 %r9, %rd5;", -1, 5, 0, -1),
        ("mul.wide.u32 %rd4, %r1, %r2; shr.u64 %rd5, %rd4, 32; cvt.u32.u64 %r9, %rd5;", -1, 5, 0, 4),
        ("div.s32 %r9, %r1, %r2;", -7, 2, 0, -3),
        ("rem.s32 %r9, %r1, %r2;", -7, 2, 0, -1),
        ("div.u32 %r9, %r1, %r2;", -7, 2, 0, 0x7FFFFFFC),
        ("min.s32 %r9, %r1, %r2;", -7, 2, 0, -7),
        ("max.u32 %r9, %r1, %r2;", -7, 2, 0, -7),
        ("shl.b32 %r9, %r1, %r2;", 3, 31, 0, 0x80000000),
        ("shl.b32 %r9, %r1, %r2;", 3, 32, 0, 0),
        ("shr.s32 %r9, %r1, %r2;", -8, 40, 0, -1),
        ("shr.u32 %r9, %r1, %r2;", -8, 28, 0, 15),
        ("bfe.u32 %r9, %r1, 8, 4;", 0xABC, 0, 0, 0xA),
        ("bfe.s32 %r9, %r1, 8, 4;", 0xABC, 0, 0, -6),
        ("mov.b64 %rd4, {%r1, %r2}; bfe.u64 %rd5, %rd4, 24, 16; cvt.u32.u64 %r9, %rd5;", 0x12000000, 0x34, 0, 0x3412),
        ("mov.b64 %rd4, {%r1, %r2}; bfe.s64 %rd5, %rd4, 56, 8; cvt.u32.u64 %r9, %rd5;", 0, -2 << 24, 0, -2),
        ("bfi.b32 %r9, %r1, %r2, 4, 8;", 0xAB, 0xFFFF, 0, 0xFABF),
        ("prmt.b32 %r9, %r1, %r2, %r3;", 0x33221100, 0x77665544, 0x7610, 0x77661100),
        ("prmt.b32 %r9, %r1, %r2, %r3;", 0x80, 0, 0x8888, 0xFFFFFFFF),
        ("lop3.b32 %r9, %r1, %r2, %r3, 150;", 0xF0, 0xCC, 0xAA, 0xF0 ^ 0xCC ^ 0xAA),
        ("shf.l.wrap.b32 %r9, %r1, %r2, 8;", 0x11000000, 0x22, 0, 0x2211),
        ("not.b32 %r9, %r1;", 5, 0, 0, -6),
        ("popc.b32 %r9, %r1;", 0xF0F, 0, 0, 8),
        ("clz.b32 %r9, %r1;", 1, 0, 0, 31),
        ("brev.b32 %r9, %r1;", 1, 0, 0, 0x80000000),
        ("cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r9, %rs1;", 0x1FFFF, 0, 0, -1),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};", 0x12345678, 0, 0, 0x56781234),
        ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 7, 8, %p1;", -1, 1, 0, 7),
        ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, 7, 8, %p1;", -1, 1, 0, 8),
        ("cvt.rn.f32.s32 %f9, %r1; mov.b32 %r9, %f9;", 16777217, 0, 0, 0x4B800000),
        ("cvt.rni.s32.f32 %r9, %f1;", 2.5, 0, 0, 2),
        ("cvt.rzi.s16.f32 %rs1, %f1; cvt.s32.s16 %r9, %rs1;", 1e6, 0, 0, 0x7FFF),
        ("cvt.rzi.u32.f32 %r9, %f1;", -5.0, 0, 0, 0),
        ("cvt.rzi.s32.f32 %r9, %f1;", NAN, 0, 0, 0),
        ("cvt.s8.s32 %r9, %r1;", 0x80, 0, 0, -128),
        ("cvt.rna.tf32.f32 %r9, %f1;", 1 + 2**-11, 0, 0, 0x3F802000),
        ("cvt.rzi.s32.f32 %r9, %f1;", -2.5, 0, 0, -2),
        ("cvt.rn.bf16x2.f32 %r9, %f1, %f2;", 1.00390625, -2.0, 0, 0x3F80C000),
        ("cvt.rn.f16x2.f32 %r9, %f1, %f2;", 1.5, 65536.0, 0, 0x3E007C00),
        ("add.s16x2 %r9, %r1, %r2;", 0x0001FFFF, 0x00010001, 0, 0x00020000),
    ],
)
def test_integers_and_bits(instruction, a, b, c, expected):
    assert set(run(instruction, a, b, c)[0]) == {expected & 0xFFFFFFFF}


@pytest.mark.parametrize(
    ("compare", "expected"),
    [("lt", 0), ("ltu", 1), ("ge", 0), ("ne", 0), ("neu", 1), ("equ", 1), ("num", 0), ("nan", 1)],
)
def test_comparisons_with_nan(compare, expected):
    snippet = f"setp.{compare}.f32 %p1, %f1, %f2; selp.b32 %r9, 1, 0, %p1;"
    assert set(run(snippet, NAN, 1.0)[0]) == {expected}


def test_arithmetic_in_float32():
    x, y, z = (np.random.default_rng(seed).normal(size=32).astype(np.float32) for seed in range(3))
    exact = x.astype(np.float64) * y + z
    np.testing.assert_array_equal(floats("fma.rn.f32 %f9, %f1, %f2, %f3;", x, y, z), exact.astype(np.float32))
    np.testing.assert_array_equal(floats("div.rn.f32 %f9, %f1, %f2;", x, y), x / y)
    np.testing.assert_array_equal(floats("max.f32 %f9, %f1, %f2;", x, NAN), x)
    assert np.isnan(floats("max.NaN.f32 %f9, %f1, %f2;", x, NAN)).all()
    np.testing.assert_array_equal(floats("mul.ftz.f32 %f9, %f1, %f2;", 1e-30, 1e-10), 0)
    for name, function in {"ex2": np.exp2, "lg2": np.log2, "rsqrt": lambda v: v**-0.5, "rcp": lambda v: 1 / v}.items():
        found, right = floats(f"{name}.approx.ftz.f32 %f9, %f1;", abs(x)), function(abs(x).astype(np.float64))
        error = abs(found - right) / np.maximum(abs(right), 1)
        assert 0 < error.max() < 2**-21  # off, as they are on the device, and no more
    np.testing.assert_array_equal(
        floats("ex2.approx.ftz.f32 %f9, %f1;", np.float32([-INF] * 16 + [3] * 16))[::16], [0, 8]
    )


def test_arithmetic_in_float64():
    snippet = (
        "cvt.f64.f32 %fd1, %f1; cvt.f64.f32 %fd2, %f2; div.rn.f64 %fd3, %fd1, %fd2; fma.rn.f64 %fd4, %fd3, %fd2, %fd1;"
    )
    found = floats(snippet + " sqrt.rn.f64 %fd5, %fd4; cvt.rn.f32.f64 %f9, %fd5;", 3.0, 7.0)
    assert set(found) == {np.float32(math.sqrt(6.0))}


def test_products_and_sums_are_contracted_as_ptxas_may():
    """a b + c where the product alone would round to -c; what says how it is rounded stays as it is."""
    a = b = 1 + 2**-12
    c = -(1 + 2**-11)
    fused, apart = np.float32(2**-24), np.float32(0)
    assert set(floats("mul.f32 %f4, %f1, %f2; add.f32 %f9, %f4, %f3;", a, b, c)) == {fused}
    assert set(floats("mul.f32 %f4, %f1, %f2; sub.f32 %f9, %f4, %f3;", a, b, -c)) == {fused}
    assert set(floats("mul.f32 %f4, %f1, %f2; sub.f32 %f9, %f3, %f4;", a, b, -c)) == {-fused}
    assert set(floats("mul.rn.f32 %f4, %f1, %f2; add.f32 %f9, %f4, %f3;", a, b, c)) == {apart}
    assert set(floats("mul.f32 %f4, %f1, %f2; add.rn.f32 %f9, %f4, %f3;", a, b, c)) == {apart}
    assert set(floats("mul.f32 %f4, %f1, %f2; add.f32 %f9, %f4, %f3;", a, b, c, contract=False)) == {apart}


def test_lanes_go_their_own_ways():
    """A loop that each lane runs through as often as its number says, with a branch in it."""
    snippet = """
      mov.u32 %r9, 0;
      mov.u32 %r6, 0;
    $LOOP:
      setp.ge.s32 %p1, %r6, %r4;
      @%p1 bra $DONE;
      and.b32 %r7, %r6, 1;
      setp.eq.s32 %p2, %r7, 0;
      @%p2 bra $EVEN;
      add.s32 %r9, %r9, 100;
    $EVEN:
      add.s32 %r9, %r9, 1;
      add.s32 %r6, %r6, 1;
      bra.uni $LOOP;
    $DONE:
      shfl.sync.bfly.b32 %r8, %r9, 1, 31, -1;
      add.s32 %r9, %r9, %r8;
    """
    counts = LANES + 100 * (LANES // 2)
    assert (run(snippet)[0] == counts + counts[LANES ^ 1]).all()


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", 5, 31, LANES ^ 5),
        ("idx", 7, 31, np.full(32, 7)),
        ("up", 3, 0, np.where(LANES >= 3, LANES - 3, LANES)),
        ("down", 3, 31, np.where(LANES < 29, LANES + 3, LANES)),
        ("down", 3, 0x181F, np.where(LANES % 8 < 5, LANES + 3, LANES)),
        ("idx", 2, 0x181F, LANES // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, by, clamp, source):
    found, _ = run(f"shfl.sync.{mode}.b32 %r9|%p1, %r1, {by}, {clamp}, -1;", LANES * 3)
    assert (found == source * 3).all()


def test_votes_and_reductions():
    assert set(run("setp.gt.s32 %p1, %r1, 5; vote.sync.ballot.b32 %r9, %p1, -1;", LANES)[0]) == {0xFFFFFFC0}
    assert set(run("redux.sync.min.s32 %r9, %r1, -1;", LANES - 7)[0]) == {0xFFFFFFF9}
    assert set(run("redux.sync.add.u32 %r9, %r1, -1;", LANES)[0]) == {496}


STORE_ROW = "shl.b32 %r6, %r4, 2; add.s32 %r6, %r5, %r6; st.shared.u32 [%r6], %r1; bar.warp.sync -1;"


def test_matrices():
    """Eight rows of eight, as lanes hold them, and turned."""
    elements = np.arange(64, dtype=np.uint32).reshape(8, 8)
    words = (elements[:, ::2] | elements[:, 1::2] << 16).reshape(-1)
    turned = (elements.T[:, ::2] | elements.T[:, 1::2] << 16).reshape(-1)
    rows = STORE_ROW + " and.b32 %r7, %r4, 7; shl.b32 %r7, %r7, 4; add.s32 %r7, %r5, %r7; "
    for trans, expected in (("", words), (".trans", turned)):
        load = f"ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r9}}, [%r7];"
        assert (run(rows + load, words)[0] == expected).all()
        store = f"bar.warp.sync -1; stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r7], {{%r1}}; bar.warp.sync -1;"
        assert (run(rows + store + " ld.shared.u32 %r9, [%r6];", words)[0] == expected).all()
    assert (run("movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r1;", words)[0] == turned).all()


def test_products_of_tf32():
    """m16n8k8: the first of the four numbers that a lane gets; the digits that tf32 lacks do not count."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(16, 8)).astype(np.float32), generator.normal(size=(8, 8)).astype(np.float32)
    g, t = LANES // 4, LANES % 4
    snippet = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f4, %f5, %f6, %f7}, {%r1, %r1, %r3, %r3}, {%r2, %r2},"
        " {0f00000000, 0f00000000, 0f00000000, 0f00000000}; mov.b32 %r9, %f4;"
    )
    found = run(snippet, a[g, t], b[t, g], a[g, t + 4])[0].view(np.float32)
    kept = [(x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64) for x in (a, b)]
    rows = kept[0].copy()
    columns = np.concatenate([kept[1][:4], kept[1][:4]])  # both halves of b are given the same
    np.testing.assert_allclose(found, (rows @ columns)[g, 2 * t], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("access", "stride", "wavefronts", "without"),
    [
        ("u32", 4, 1, 1),
        ("u32", 8, 2, 1),
        ("u32", 128, 32, 1),
        ("u32", 0, 1, 1),
        ("v4.u32", 16, 4, 4),
        ("v4.u32", 128, 32, 4),
    ],
)
def test_wavefronts(access, stride, wavefronts, without):
    registers = "{%r10, %r11, %r12, %r13}" if access.startswith("v4") else "%r10"
    snippet = f"mul.lo.s32 %r6, %r4, {stride}; add.s32 %r6, %r5, %r6; st.shared.{access} [%r6], {registers};"
    _, report = run(snippet, count_wavefronts=True, check_races=False)
    assert [entry[2:] for entry in report.shared] == [(1, wavefronts, without)]


def test_what_is_unknown_is_said():
    with pytest.raises(Fault, match=r"snippet: line \d+: unknown to the emulator: tanh.approx.f32 %f9, %f1"):
        run("tanh.approx.f32 %f9, %f1;")
    with pytest.raises(Fault, match="no kernel named other"):
        Program(KERNEL.format(snippet=""), "other")


@pytest.mark.parametrize(
    "snippet",
    [
        "add.sat.s32 %r9, %r1, %r2;",
        "bar.sync 1;",
        "min.f32 %f9, %f1, %f2, %f3;",
        "cvt.rn.tf32.f32 %r9, %f1;",
        "cvt.rn.bf16.f64 %rs1, %fd1;",
        "cp.async.cg.shared.global [%r5], [%rd1], 8;",
        "$TWICE: add.s32 %r9, %r1, %r2; $TWICE: sub.s32 %r9, %r1, %r2;",
    ],
)
def test_what_would_be_wrong_is_refused(snippet):
    with pytest.raises(Fault, match="unknown to the emulator|not as many operands|not a size that can be copied"):
        run(snippet)


def test_a_launch_that_does_not_fit_the_kernel():
    program = Program(KERNEL.format(snippet="").replace(")\n{", ")\n.reqntid 64\n{"), "snippet")
    assert program.threads == 64
    with pytest.raises(Fault, match="128 threads in a block of a kernel for 64"):
        program.run(grid=(1, 1, 1), threads=128, shared_bytes=0, arguments=bytes(8), memory=[])
    with pytest.raises(Fault, match="4 bytes of arguments, not 8"):
        program.run(grid=(1, 1, 1), threads=64, shared_bytes=0, arguments=bytes(4), memory=[])


@pytest.mark.parametrize(
    ("snippet", "fault"),
    [
        ("setp.eq.s32 %p1, %r4, 0; @%p1 shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;", "lane 1, .* a shuffle that not all"),
        ("setp.eq.s32 %p1, %r4, 0; @%p1 bar.sync 0;", "lane 1, .* a barrier that not all lanes"),
        (
            STORE_ROW.replace("bar.warp.sync -1;", "ld.shared.u32 %r9, [%r5];"),
            "lane 1, .*: a race: it reads what thread 0",
        ),
        ("ld.shared.u32 %r9, [%r5+8];", "shared memory at 8 that nothing has written"),
        ("ld.shared.u32 %r9, [%r5+4096];", "shared memory from 4096 to 4100, of 4096 bytes"),
        ("ld.shared.u32 %r9, [%r5+2];", "shared memory at 2, no multiple of 4"),
        ("ld.global.u32 %r9, [%rd1+512];", "4 bytes of device memory 0 bytes behind a tensor's end"),
        ("ld.global.u32 %r9, [%rd1+-4];", "4 bytes of device memory"),
        ("ld.global.u32 %r9, [%rd1+2];", "no multiple of 4"),
        ("st.global.u32 [%rd1+16], %r4;", "lane 0, .*: a race: it writes what thread 1 reads"),
    ],
)
def test_faults(snippet, fault):
    with pytest.raises(Fault, match=fault) as raised:
        run(snippet)
    assert re.match(r"snippet: block 0, warp 0, lane \d+, line \d+ ", str(raised.value))


# Threads 0, 1 and 32 as predicates; block 1.
WHO = (
    "setp.eq.s32 %p1, %r4, 0; setp.eq.s32 %p2, %r4, 1; setp.eq.s32 %p3, %r4, 32; mov.u32 %r20, %ctaid.x;"
    " setp.eq.s32 %p4, %r20, 1; setp.lt.s32 %p5, %r4, 32; mov.u32 %r21, 1; mov.u32 %r22, 2; add.s64 %rd4, %rd1, 12; "
)


@pytest.mark.parametrize(
    "accesses",
    [
        pytest.param("@%p1 st.shared.u32 [%r5], %r21; @%p3 st.shared.u32 [%r5], %r22;", id="two numbers"),
        pytest.param(
            "@%p1 st.shared.u32 [%r5], %r21; @%p1 ld.shared.u32 %r6, [%r5]; @%p1 st.shared.u32 [%r5], %r22;"
            " @%p3 st.shared.u32 [%r5], %r22;",
            id="the same number, after another",
        ),
        pytest.param(
            "@%p1 st.shared.u32 [%r5], %r21; bar.sync 0; @%p1 ld.shared.u32 %r6, [%r5]; @%p1 st.shared.u32 [%r5], %r22;"
            " @%p3 st.shared.u32 [%r5], %r22;",
            id="the same number, after a read",
        ),
        pytest.param(
            "@%p1 st.shared.u32 [%r5], %r21; bar.sync 0; @%p1 st.shared.u32 [%r5], %r21;"
            " @%p3 st.shared.u32 [%r5], %r22;",
            id="what is there already, and another number",
        ),
        pytest.param(
            "st.shared.u32 [%r5], %r4; bar.sync 0; @%p1 ld.shared.u32 %r6, [%r5]; @%p5 st.shared.u32 [%r5], %r4;",
            id="lanes together, after a read",
        ),
        pytest.param("@%p5 st.shared.u32 [%r5], %r4; @%p1 ld.shared.u32 %r6, [%r5];", id="lanes together, and a read"),
        pytest.param(
            "shl.b32 %r6, %r4, 2; add.s32 %r6, %r5, %r6; st.shared.u32 [%r6], %r4;"
            " setp.lt.s32 %p6, %r4, 16; @%p6 bra $HALF; bra.uni $REST; $HALF: bar.warp.sync 0xffff;"
            " ld.shared.u32 %r7, [%r5+124]; $REST:",
            id="half a warp's barrier",
        ),
        pytest.param(
            "shl.b32 %r6, %r4, 4; add.s32 %r6, %r5, %r6; st.shared.v4.u32 [%r6], {%r4, %r4, %r4, %r4};"
            " ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r6];",
            id="a matrix of what lanes wrote",
        ),
        pytest.param("@%p1 st.global.u32 [%rd4], %r21; @%p3 st.global.u32 [%rd4], %r22;", id="device: two numbers"),
        pytest.param(
            "@%p1 st.global.u32 [%rd4], %r21; @%p1 ld.global.u32 %r6, [%rd4]; @%p1 st.global.u32 [%rd4], %r22;"
            " @%p3 st.global.u32 [%rd4], %r22;",
            id="device: the same number, after another",
        ),
    ],
)
def test_races(accesses):
    with pytest.raises(Fault, match="a race"):
        run(WHO + accesses, threads=64)


@pytest.mark.parametrize(
    "accesses",
    [
        "@%p1 st.global.u32 [%rd4], %r20;",
        "@%p1 st.global.u32 [%rd4], %r21; @%p4 st.global.u32 [%rd4], %r22;",
        "@%p1 st.global.u32 [%rd4], %r22; @!%p4 st.global.u32 [%rd4], %r21;",
        "@%p1 ld.global.u32 %r6, [%rd4]; @%p1 st.global.u32 [%rd4], %r21;",
        "@%p1 st.global.u32 [%rd4], %r21; @%p1 st.global.u32 [%rd4], %r22;",
    ],
    ids=["two numbers", "another, then", "another, first", "after a read", "twice"],
)
def test_races_of_blocks(accesses):
    with pytest.raises(Fault, match="block 1, .*a race"):
        # Nothing else of the rows is touched: both blocks have the same.
        snippet = accesses.replace("@%p1 ", "@%p7 ").replace("@%p4 ", "@%p8 ").replace("@!%p4 ", "@%p9 ")
        first = "and.pred %p7, %p1, %p5; and.pred %p8, %p1, %p4; not.pred %p6, %p4; and.pred %p9, %p1, %p6; "
        program = Program(KERNEL.format(snippet=WHO + first + snippet + " ret;"), "snippet")
        numbers = np.zeros((32, 4), np.uint32)
        program.run(
            grid=(2, 1, 1), threads=32, shared_bytes=64, arguments=struct.pack("Q", numbers.ctypes.data),
            memory=[(numbers.ctypes.data, numbers.nbytes)],
        )  # fmt: skip


def test_accesses_that_are_in_order():
    for accesses in (
        "@%p1 st.shared.u32 [%r5], %r21; @%p3 st.shared.u32 [%r5], %r21; bar.sync 0; ld.shared.u32 %r6, [%r5];",
        "st.shared.u32 [%r5], %r21; bar.sync 0; ld.shared.u32 %r6, [%r5]; bar.sync 0; @%p3 st.shared.u32 [%r5], %r22;",
        "@%p5 st.shared.u32 [%r5], %r21; @%p5 bar.warp.sync -1; @%p5 ld.shared.u32 %r6, [%r5]; @%p5 bar.warp.sync -1;"
        " @%p1 ld.shared.u32 %r6, [%r5]; @%p1 st.shared.u32 [%r5], %r22;",
        "@%p1 st.global.u32 [%rd4], %r21; bar.sync 0; ld.global.u32 %r6, [%rd4]; bar.sync 0;",
    ):
        run(WHO + accesses, threads=64)


@pytest.fixture
def planted(monkeypatch):
    """Changes the PTX of Triton's kernels before they are executed: ``plant(kernel, change)``."""
    kernels = [f for module in (forward, backward, sums) for f in vars(module).values() if hasattr(f, "device_caches")]
    changes = {}

    def load_binary(self, name, kernel, shared, device):
        text = kernel.decode()
        if name in changes:
            changed = changes[name](text)
            assert changed != text
            text = changed
        return None, emulator.Program(text, name), 0, 0, 1024

    def forget():
        for kernel in kernels:
            kernel.device_caches.clear()

    monkeypatch.setattr(triton_driver.Driver, "load_binary", load_binary)
    triton.runtime.driver.active.utils.load_binary = triton.runtime.driver.active.load_binary
    forget()
    yield changes.__setitem__
    forget()
    monkeypatch.undo()
    triton.runtime.driver.active.utils.load_binary = triton.runtime.driver.active.load_binary


def without(pattern, which=0):
    """Takes the given one of the lines away that match."""

    def change(text):
        match = list(re.finditer(rf"^.*{pattern}.*\n", text, re.MULTILINE))[which]
        return text[: match.start()] + text[match.end() :]

    return change


def swapped(text):
    """The two registers of every second operand of a product are swapped."""
    return re.sub(r"(mma\.sync[^;]*\{[^}]*\}, \{[^}]*\}, \{ *)(%r\d+)( *, *)(%r\d+)", r"\1\4\3\2", text)


PROBLEM = {"heads": 12, "head_dim": 32, "seqlen": 33, "batch": 1, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("kernel", "which"),
    [("forward_kernel", 0), ("grad_maps_kernel", 0), ("grad_query_kernel", 0), ("grad_key_kernel", 1)],
)
def test_a_barrier_less(kernel, which, planted):
    """A race, or what a shared load finds has not been written."""
    planted(kernel, without(r"bar\.sync", which))
    with pytest.raises(Fault, match=f"^{kernel}: .*(a race|has not waited for|nothing has written)"):
        compute(make_problem("layer", **PROBLEM), "triton")


def test_a_wait_less(planted):
    planted("forward_kernel", without(r"cp\.async\.wait_group"))
    with pytest.raises(Fault, match="copies to and has not waited for"):
        compute(make_problem("layer", **PROBLEM), "triton")


@pytest.mark.parametrize("kernel", ["forward_kernel", "grad_maps_kernel", "grad_query_kernel", "grad_key_kernel"])
def test_a_wrong_fragment(kernel, planted):
    planted(kernel, swapped)
    with pytest.raises(AssertionError, match="error"):
        assert_parity(make_problem("layer", **PROBLEM), "triton")


def test_a_tensor_that_is_too_short(monkeypatch):
    extent = emulator.extent
    monkeypatch.setattr(emulator, "extent", lambda tensor: max(extent(tensor) - 2, 0))
    with pytest.raises(Fault, match="bytes of device memory .*(behind|over) a tensor's end"):
        compute(make_problem("layer", **PROBLEM), "triton")
