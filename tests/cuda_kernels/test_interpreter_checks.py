"""Every check of the PTX interpreter catches the bug that it is there for, and passes the code without it.

The kernels here are PTX by hand, so these tests need no compiler.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the kernels' package needs numba-cuda (pip install minipaged[cuda])")

from cuda_kernels.toolchain.interpreter import KernelFault, PTXError, launch  # noqa: E402
from cuda_kernels.toolchain.memory import DeviceMemory, DeviceMemoryError  # noqa: E402

HEAD = """
.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(.param .u64 x, .param .u64 y, .param .u32 n)
{
.shared .align 16 .b8 tile[1024];
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<32>;
.reg .f32 %f<16>;
.reg .b64 %rd<32>;
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [y];
ld.param.u32 %r1, [n];
cvta.to.global.u64 %rd1, %rd1;
cvta.to.global.u64 %rd2, %rd2;
mov.u32 %r2, %tid.x;
mov.u32 %r3, %ctaid.x;
mov.u32 %r4, %ntid.x;
mad.lo.s32 %r5, %r3, %r4, %r2;   // thread in the grid
mul.wide.u32 %rd3, %r5, 4;
add.s64 %rd4, %rd1, %rd3;        // x + thread
add.s64 %rd5, %rd2, %rd3;        // y + thread
mul.wide.u32 %rd6, %r2, 4;
mov.u64 %rd7, tile;
add.s64 %rd8, %rd7, %rd6;        // tile + thread in the block
xor.b32 %r6, %r2, 1;
mul.wide.u32 %rd9, %r6, 4;
add.s64 %rd10, %rd7, %rd9;       // tile + neighbour
xor.b32 %r7, %r2, 32;
mul.wide.u32 %rd11, %r7, 4;
add.s64 %rd12, %rd7, %rd11;      // tile + the same lane of the neighbouring warp
"""


def execute(body, *, threads=64, blocks=1, x=None, n=None, checks=True, shared_bytes=0, **options):
    """Run HEAD and ``body``; returns what ``y`` (as long as the grid) holds, and the counters."""
    memory = DeviceMemory()
    count = threads * blocks
    x = np.arange(count, dtype=np.uint32) if x is None else x
    pointers = memory.upload(x, "x"), memory.upload(np.zeros(count, np.uint32), "y")
    counters = launch(
        HEAD + body + "\nret;\n}",
        "kernel",
        blocks,
        threads,
        [*pointers, count if n is None else n],
        shared_bytes,
        checks,
        memory,
        **options,
    )
    return memory.read(pointers[1], (count,), np.uint32), counters


def fault(kind, body, **options):
    """The text of the fault of ``kind`` that ``body`` must end with."""
    with pytest.raises(KernelFault) as caught:
        execute(body, **options)
    assert caught.value.kind == kind
    return str(caught.value)


LOAD = "ld.global.u32 %r10, [%rd4];\n"
STORE = "st.global.u32 [%rd5], %r11;\n"


@pytest.mark.parametrize("neighbour", ["%rd10", "%rd12"])
def test_exchange_through_shared_memory_needs_a_barrier(neighbour):
    body = LOAD + "st.shared.u32 [%rd8], %r10;\n{}ld.shared.u32 %r11, [" + neighbour + "];\n" + STORE
    y, _ = execute(body.format("bar.sync 0;\n"))
    np.testing.assert_array_equal(y, np.arange(64) ^ (1 if neighbour == "%rd10" else 32))
    text = fault("race", body.format(""))
    assert "thread 0" in text and "written by thread" in text and "ld.shared.u32" in text


def test_a_warp_barrier_orders_a_warp_and_no_more():
    body = LOAD + "st.shared.u32 [%rd8], %r10;\nbar.warp.sync -1;\nld.shared.u32 %r11, [{}];\n" + STORE
    execute(body.format("%rd10"))
    fault("race", body.format("%rd12"))


def test_a_shuffle_orders_no_memory():
    body = (
        LOAD
        + "st.shared.u32 [%rd8], %r10;\nshfl.sync.bfly.b32 %r12, %r10, 1, 31, -1;\nld.shared.u32 %r11, [%rd10];\n"
        + STORE
    )
    fault("race", body)


def test_a_read_before_a_write_needs_a_barrier():
    body = (
        "st.shared.u32 [%rd8], %r2;\nbar.sync 0;\nld.shared.u32 %r11, [%rd12];\n{}st.shared.u32 [%rd8], %r11;\n" + STORE
    )
    execute(body.format("bar.sync 0;\n"))
    assert "read by thread" in fault("race", body.format(""))


def test_readers_of_the_past_are_forgotten():
    body = (
        "st.shared.u32 [%rd8], %r2;\nbar.warp.sync -1;\nld.shared.u32 %r11, [%rd10];\nbar.warp.sync -1;\n"
        "ld.shared.u32 %r12, [%rd8];\nst.shared.u32 [%rd8], %r12;\n" + STORE
    )
    execute(body)


def test_two_threads_write_one_place():
    assert "same instruction" in fault("race", "st.shared.u32 [tile], %r2;\n")
    execute("setp.eq.u32 %p1, %r2, 0;\n@%p1 st.shared.u32 [tile], %r2;\n")


@pytest.mark.parametrize("store", ["st.global.u32 [%rd2], %r2;", "st.global.u32 [%rd5], %r2;"])
def test_blocks_may_not_share_what_they_write(store):
    one_thread = "setp.eq.u32 %p1, %r2, 0;\n@!%p1 ret;\n"
    if "%rd5" in store:
        execute(one_thread + store, blocks=3)
    else:
        assert "block number" in fault("race", one_thread + store, blocks=3)
        execute(one_thread + "atom.global.add.u32 %r11, [%rd2], 1;", blocks=3)


def test_a_block_may_not_read_what_another_wrote():
    fault("race", "st.global.u32 [%rd5], %r2;\nbar.sync 0;\nld.global.u32 %r11, [%rd2];\n", blocks=2)
    # The same in chunks that run one after the other.
    fault("race", "st.global.u32 [%rd5], %r2;\nbar.sync 0;\nld.global.u32 %r11, [%rd2];\n", blocks=200)


def test_bounds_of_global_memory_are_exact():
    guarded = "setp.ge.u32 %p1, %r5, %r1;\n@%p1 bra $END;\n" + LOAD + "add.u32 %r11, %r10, 1;\n" + STORE + "$END:\n"
    short = np.arange(40, dtype=np.uint32)
    y, _ = execute(guarded, x=short, n=40)
    np.testing.assert_array_equal(y[:41], [*range(1, 41), 0])
    text = fault("out of bounds", LOAD, x=short)
    assert "offset 160 of x, which has 160" in text and "thread 40" in text
    assert "offset -4 of x" in fault("out of bounds", "ld.global.u32 %r10, [%rd4+-4];\n")
    fault("out of bounds", "st.global.u32 [%rd5+4], %r2;\n")
    fault("out of bounds", "mov.u64 %rd20, 64;\nld.global.u32 %r10, [%rd20];\n")


def test_bounds_hold_without_checks_too():
    fault("out of bounds", LOAD, x=np.arange(40, dtype=np.uint32), checks=False)


def test_bounds_of_shared_memory():
    execute("st.shared.u32 [%rd8+768], %r2;\n")
    assert "offset 1024" in fault("out of bounds", "st.shared.u32 [%rd8+772], %r2;\n")
    dynamic = "mov.u64 %rd20, dynamic;\nadd.s64 %rd21, %rd20, %rd6;\nst.shared.u32 [%rd21], %r2;\n"
    execute(dynamic, shared_bytes=256)
    fault("out of bounds", dynamic, shared_bytes=252)


def test_alignment():
    execute("ld.global.v2.u32 {%r10, %r11}, [%rd1+8];\n")
    fault("misaligned", "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1+8];\n")


def test_shared_arrays_get_no_more_alignment_than_they_ask_for():
    body = ".shared .align 2 .b8 loose[64];\nst.shared.u32 [loose], %r2;\n"
    assert "alignment=16" in fault("misaligned", body, threads=32)


def test_memory_that_nobody_wrote():
    text = fault("never written", "ld.shared.u32 %r11, [%rd8];\n")
    assert "shared memory" in text
    memory = DeviceMemory()
    pointer, y = memory.allocate(256, "fresh"), memory.upload(np.zeros(64, np.uint32))
    arguments = [pointer, y, 64]
    program = HEAD + LOAD + "mov.u32 %r11, %r10;\n" + STORE + "ret;\n}"
    memory.write(pointer, np.zeros(63, np.uint32))
    with pytest.raises(KernelFault, match="never written: block .* thread 63: .* offset 252 of fresh"):
        launch(program, "kernel", 1, 64, arguments, memory=memory)
    memory.fill(pointer + 252, 4)
    launch(program, "kernel", 1, 64, arguments, memory=memory)


def test_stores_count_as_written():
    memory = DeviceMemory()
    x, y = memory.upload(np.arange(64, dtype=np.uint32)), memory.allocate(256)
    launch(HEAD + LOAD + "mov.u32 %r11, %r10;\n" + STORE + "ret;\n}", "kernel", 1, 32, [x, y, 0], memory=memory)
    written = memory.is_written(y, 256)
    assert written[:128].all() and not written[128:].any()


COPY = "mul.wide.u32 %rd20, %r2, 16;\nadd.s64 %rd21, %rd1, %rd20;\nadd.s64 %rd22, %rd7, %rd20;\n"
COPY += "cvt.u32.u64 %r20, %rd22;\ncp.async.cg.shared.global [%r20], [%rd21], 16;\n"


@pytest.mark.parametrize("missing", [None, "commit", "wait", "barrier"])
def test_asynchronous_copies_are_waited_for(missing):
    """Each thread copies 16 bytes; then it reads the first four of them that another warp copied."""
    body = COPY
    body += "" if missing == "commit" else "cp.async.commit_group;\n"
    body += "" if missing == "wait" else "cp.async.wait_group 0;\n"
    body += "" if missing == "barrier" else "bar.sync 0;\n"
    body += "mul.wide.u32 %rd23, %r7, 16;\nadd.s64 %rd24, %rd7, %rd23;\nld.shared.u32 %r11, [%rd24];\n" + STORE
    x = np.arange(256, dtype=np.uint32)
    if missing is None:
        y, _ = execute(body, x=x)
        np.testing.assert_array_equal(y, 4 * (np.arange(64) ^ 32))
    else:
        fault({"barrier": "race"}.get(missing, "copy under way"), body, x=x)


def test_a_wait_that_leaves_one_group_under_way():
    body = COPY + "cp.async.commit_group;\n" + "cp.async.wait_group 1;\nbar.sync 0;\nld.shared.u32 %r11, [%rd8];\n"
    fault("copy under way", body, x=np.arange(256, dtype=np.uint32))


def test_a_copy_into_what_others_still_read():
    body = (
        "st.shared.u32 [%rd8], %r2;\nbar.sync 0;\nld.shared.u32 %r11, [%rd12];\n{}"
        "setp.ge.u32 %p1, %r2, 16;\n@%p1 bra $END;\n" + COPY + "cp.async.wait_all;\n$END:\n"
    )
    execute(body.format("bar.sync 0;\n"), x=np.arange(256, dtype=np.uint32))
    fault("race", body.format(""), x=np.arange(256, dtype=np.uint32))


def test_a_copy_of_fewer_bytes_fills_with_zeros():
    short = COPY.replace("[%rd21], 16;", "[%rd21], 16, %r21;")
    body = "mov.u32 %r21, 8;\n" + short + "cp.async.wait_all;\nld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd22];\n"
    body = body.replace("{{", "{").replace("}}", "}") + "or.b32 %r11, %r12, %r13;\n" + STORE
    y, _ = execute(body, x=np.arange(1, 257, dtype=np.uint32))
    assert not y.any()


def test_threads_of_a_block_meet_at_one_barrier():
    body = "setp.lt.u32 %p1, %r2, {};\n@%p1 bra $A;\nbar.sync 0;\nbra $B;\n$A:\nbar.sync 0;\n$B:\n"
    execute(body.format(64))
    assert "different barriers" in fault("divergent barrier", body.format(32))
    fault("divergent barrier", body.format(5))


def test_threads_that_ended_are_not_waited_for():
    execute("setp.lt.u32 %p1, %r2, 32;\n@%p1 ret;\nbar.sync 0;\n")


def test_a_warp_operation_without_all_the_lanes_it_names():
    shuffle = "shfl.sync.bfly.b32 %r11, %r2, 1, 31, {};\n" + STORE
    half = "setp.ge.u32 %p1, %laneid, 16;\n@%p1 bra $WAIT;\n".replace("%laneid", "%r20")
    half = "mov.u32 %r20, %laneid;\n" + half
    execute(half + shuffle.format("0xffff") + "$WAIT:\nbar.sync 0;\n")
    fault("deadlock", half + shuffle.format("-1") + "$WAIT:\nbar.sync 0;\n")
    fault("warp operation", half + shuffle.format("-1").replace(" 1, 31", " 16, 31") + "$WAIT:\n")


def test_endless_loops_end():
    fault("runaway", "$LOOP:\nbra $LOOP;\n", max_steps=1000)


def test_trap():
    fault("trap", "setp.eq.u32 %p1, %r2, 7;\n@!%p1 bra $END;\ntrap;\n$END:\n")


def test_freed_memory():
    memory = DeviceMemory()
    x, y = memory.upload(np.zeros(64, np.uint32), "old"), memory.upload(np.zeros(64, np.uint32))
    memory.free(x)
    with pytest.raises(KernelFault, match="old was freed"):
        launch(HEAD + LOAD + "ret;\n}", "kernel", 1, 64, [x, y, 0], memory=memory)
    with pytest.raises(DeviceMemoryError, match="old was freed"):
        memory.read(x, (1,), np.uint32)


@pytest.mark.parametrize(
    "body", ["wgmma.fence.sync.aligned;", "bar.sync 1;", "call.uni foo;", "tex.2d.v4.f32.f32 {%f1}, [x];"]
)
def test_what_is_not_understood_is_refused(body):
    with pytest.raises(PTXError):
        execute(body)


def test_arguments_are_counted():
    with pytest.raises(PTXError, match="3 parameters, 2 were given"):
        launch(HEAD + "ret;\n}", "kernel", 1, 32, [0, 0])
    with pytest.raises(PTXError, match="not other"):
        launch(HEAD + "ret;\n}", "other", 1, 32, [0, 0, 0])
