"""Executed instructions of SASS: a listing written by hand, and a kernel that ptxas compiles."""

import importlib.util
import re

import pytest

from benchmarks import sass

# A loop, in it a branch that is not taken; what follows the last EXIT never runs, whatever line it is said to be of.
LISTING = """
	.section	.text.kernel,"ax",@progbits
	.align	128
kernel:
.text.kernel:
	//## File ".nv_debug_ptx_txt", line 1
        /*0000*/                   MOV R1, c[0x0][0x28] ;
	//## File ".nv_debug_ptx_txt", line 3
        /*0010*/                   IMAD R7, R7, R8, RZ ;
.L_x_1:
	//## File ".nv_debug_ptx_txt", line 2
        /*0020*/                   LDS.128 R4, [R0+UR4] ;
	//## File ".nv_debug_ptx_txt", line 3
        /*0030*/              @!P1 FADD R4, R4, R5 ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
	//## File ".nv_debug_ptx_txt", line 4
        /*0050*/                   STS [R0], R4 ;
        /*0060*/                   BRA.U UP0, `(.L_x_1) ;
	//## File ".nv_debug_ptx_txt", line 6
        /*0070*/                   EXIT ;
.L_x_2:
	//## File ".nv_debug_ptx_txt", line 5
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/                   EXIT ;
.L_x_3:
	//## File ".nv_debug_ptx_txt", line 6
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP;
"""


def test_blocks_run_as_their_lines_do():
    (kernel,) = sass.parse(LISTING).values()
    # Two warps, ten rounds.
    assert list(sass.runs(kernel, {1: 2, 2: 20, 3: 20, 4: 20, 6: 2}).values()) == [2, 20, 20, 2, 0, 0, 0]
    found = sass.executed(kernel, {1: 2, 2: 20, 3: 20, 4: 20, 6: 2})
    assert found == {"MOV": 2, "IMAD": 2, "LDS.128": 20, "FADD": 20, "BRA": 20, "STS": 20, "BRA.U": 20, "EXIT": 2}


def test_copies_share_what_their_line_says():
    """Of a loop of 12 rounds that ptxas unrolled by two, with a rest; what is made from line 2 runs 12 times in all."""
    body = "        /*0010*/                   STS [R0], R4 ;\n        /*0020*/                   FADD R4, R4, R5 ;\n"
    rows = ['	.section	.text.kernel,"ax",@progbits', '	//## File ".nv_debug_ptx_txt", line 2', ".L_x_1:"]
    rows += [body * 2 + "        /*0030*/               @P0 BRA `(.L_x_1) ;", body + "        /*0040*/  EXIT ;"]
    (kernel,) = sass.parse("\n".join(rows)).values()
    found = sass.executed(kernel, {2: 12})
    assert found["STS"] == found["FADD"] == pytest.approx(12)


PTX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 to, .param .u32 rounds)
.maxntid 128
{
  .reg .pred %p<3>;
  .reg .b32 %r<6>;
  .reg .f32 %f<4>;
  .reg .b64 %rd<4>;
  .shared .align 16 .b8 buffer[512];
  ld.param.u64 %rd1, [to];
  ld.param.u32 %r1, [rounds];
  mov.u32 %r2, %tid.x;
  shl.b32 %r3, %r2, 2;
  mov.u32 %r4, buffer;
  add.u32 %r4, %r4, %r3;
  mov.f32 %f1, 0f3F800000;
  mov.u32 %r5, 0;
  setp.lt.u32 %p2, %r1, 3;
  @%p2 bra $few;
$round:
  .pragma "nounroll";
  st.shared.f32 [%r4], %f1;
  bar.sync 0;
  ex2.approx.ftz.f32 %f1, %f1;
  add.u32 %r5, %r5, 1;
  setp.lt.u32 %p1, %r5, %r1;
  @%p1 bra $round;
  bra $end;
$few:
  bar.sync 0;
  sqrt.approx.f32 %f1, %f1;
$end:
  mul.wide.u32 %rd2, %r2, 4;
  add.u64 %rd3, %rd1, %rd2;
  st.global.f32 [%rd3], %f1;
  ret;
}
"""


needs_ptxas = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs ptxas, which triton ships")


@needs_ptxas
def test_executed_instructions_of_a_compiled_loop():
    """Four warps, nine rounds. The loop of the SASS is found by hand."""
    text = PTX.splitlines()
    begin, few, end = (text.index(f"${label}:") for label in ("round", "few", "end"))
    lines = {i + 1: 4 for i in range(11, begin)} | {i + 1: 36 for i in range(begin, few - 1)} | {few: 4}
    lines |= {i + 1: 4 for i in range(end, len(text))}
    cubin = sass.assemble(PTX)
    kernel = sass.disassemble(cubin)["kernel"]
    found = sass.executed(kernel, lines)
    assert found["MUFU.EX2"] == found["STS"] == 36 and found["MUFU.SQRT"] == found["MUFU.RSQ"] == 0
    assert found["STG.E"] == 4
    (loop,) = (block for block in kernel.blocks.values() if any(each.opcode == "MUFU.EX2" for each in block))
    names = {each.name for each in loop}
    assert {"STS", "BAR", "BRA"} <= names and len(loop) < 10
    assert sass.runs(kernel, lines)[next(label for label, block in kernel.blocks.items() if block is loop)] == 36
    outside = sum(len(block) for block in kernel.blocks.values()) - len(loop)
    assert 36 * len(loop) < found.total() < 36 * len(loop) + 4 * outside
    assert 4 < sass.registers(cubin)["kernel"] < 32


@needs_ptxas
def test_executed_instructions_where_ptxas_unrolls():
    """Where it copies the loop's body, all copies together run as often as the line."""
    ptx = PTX.replace('.pragma "nounroll";', "")
    lines = {i + 1: 36 for i, row in enumerate(ptx.splitlines()) if re.search(r"st.shared|bar.sync|ex2", row)}
    kernel = sass.disassemble(sass.assemble(ptx))["kernel"]
    assert sum(each.opcode == "MUFU.EX2" for block in kernel.blocks.values() for each in block) > 1
    assert sass.executed(kernel, lines)["STS"] == pytest.approx(36)


@needs_ptxas
def test_what_is_wrong_with_the_module_is_said():
    with pytest.raises(RuntimeError, match="line 4; .*syntax error"):
        sass.assemble(".version 8.0\n.target sm_90\n.address_size 64\nnonsense\n")
