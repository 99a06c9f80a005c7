"""Instructions of the PTX interpreter against Python's own integers and floats, and its counters."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the kernels' package needs numba-cuda (pip install minipaged[cuda])")

from cuda_kernels.toolchain.interpreter import launch  # noqa: E402
from cuda_kernels.toolchain.memory import DeviceMemory  # noqa: E402

THREADS = 64
MASK = 0xFFFFFFFF
HEAD = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 out)
{
.shared .align 16 .b8 tile[8192];
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<32>;
.reg .f32 %f<16>;
.reg .f64 %d<8>;
.reg .b64 %rd<32>;
ld.param.u64 %rd1, [a];
ld.param.u64 %rd2, [b];
ld.param.u64 %rd3, [c];
ld.param.u64 %rd4, [out];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd6, %rd1, %rd5;
add.s64 %rd7, %rd2, %rd5;
add.s64 %rd8, %rd3, %rd5;
shl.b64 %rd9, %rd5, 1;
add.s64 %rd10, %rd4, %rd9;
ld.global.u32 %r2, [%rd6];
ld.global.u32 %r3, [%rd7];
ld.global.u32 %r4, [%rd8];
mov.b32 %f2, %r2;
mov.b32 %f3, %r3;
mov.b32 %f4, %r4;
mov.b64 %rd12, {%r2, %r3};
mov.b64 %rd13, {%r3, %r4};
"""
_random = np.random.default_rng(5)
EDGES = np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFF, 0x10000], np.uint32)


def integers():
    values = _random.integers(0, 1 << 32, THREADS, np.uint32)
    values[:12] = _random.permutation(EDGES)
    return values


def floats():
    values = (_random.standard_normal(THREADS) * 10.0 ** _random.integers(-5, 6, THREADS)).astype(np.float32)
    values[:8] = _random.permutation(np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 65504], np.float32))
    return values


def execute(body, *inputs, threads=THREADS, memory_bytes=None):
    """Each thread's 64 bits of ``out``; ``inputs`` are 32-bit arrays for a, b and c. And the counters."""
    memory = DeviceMemory()
    given = [*inputs, *[np.ones(threads, np.uint32)] * (3 - len(inputs))]
    pointers = [memory.upload(array) for array in given]
    out = memory.upload(np.zeros(threads * 16, np.uint32))
    counters = launch(HEAD + body + "\nret;\n}", "kernel", 1, threads, [*pointers, out], memory=memory)
    return memory.read(out, (threads,), np.uint64), counters


def signed(value, bits=32):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def quotient(a, b):
    return MASK if b == 0 else int(Fraction(a, b))  # towards zero


def bit_field(value, position, length, is_signed):
    position, length = position & 255, length & 255
    value = signed(value) if is_signed else value
    field = value >> position & (1 << length) - 1
    return field - (1 << length) if is_signed and length and field >> (length - 1) else field


INTEGER = {
    "add.s32": lambda a, b, c: a + b,
    "sub.s32": lambda a, b, c: a - b,
    "mul.lo.s32": lambda a, b, c: a * b,
    "mul.hi.u32": lambda a, b, c: a * b >> 32,
    "mul.hi.s32": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mad.hi.u32": lambda a, b, c: (a * b >> 32) + c,
    "div.u32": lambda a, b, c: quotient(a, b),
    "div.s32": lambda a, b, c: quotient(signed(a), signed(b)),
    "rem.u32": lambda a, b, c: a - quotient(a, b) * b,
    "rem.s32": lambda a, b, c: signed(a) - quotient(signed(a), signed(b)) * signed(b),
    "min.s32": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32": lambda a, b, c: max(a, b),
    "and.b32": lambda a, b, c: a & b,
    "or.b32": lambda a, b, c: a | b,
    "xor.b32": lambda a, b, c: a ^ b,
    "not.b32": lambda a, b, c: ~a,
    "neg.s32": lambda a, b, c: -a,
    "abs.s32": lambda a, b, c: abs(signed(a)),
    "shl.b32": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32": lambda a, b, c: bit_field(a, b, c, False),
    "popc.b32": lambda a, b, c: a.bit_count(),
    "clz.b32": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32": lambda a, b, c: a.bit_length() - 1,
    "brev.b32": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
}
UNARY = {"not", "neg", "abs", "popc", "clz", "bfind", "brev"}
TERNARY = {"mad", "shf", "bfe"}


@pytest.mark.parametrize("name", INTEGER)
def test_integers(name):
    a, b, c = integers(), integers(), integers()
    opcode = name.split(".")[0]
    operands = "%r2" if opcode in UNARY else "%r2, %r3, %r4" if opcode in TERNARY else "%r2, %r3"
    if opcode == "bfe":
        b, c = b % 32, c % 33
    if opcode in ("shl", "shr"):
        b[::2] %= 40
    out, _ = execute(f"{name} %r10, {operands};\nst.global.u32 [%rd10], %r10;", a, b, c)
    expected = [INTEGER[name](*map(int, each)) & MASK for each in zip(a, b, c, strict=True)]
    skip = b == 0 if opcode in ("div", "rem") else np.zeros(THREADS, bool)
    np.testing.assert_array_equal(out[~skip], np.array(expected, np.uint64)[~skip])


def test_wide_and_64_bit_integers():
    a, b, c = integers(), integers(), integers()
    x, y = ([int(q) << 32 | int(p) for p, q in zip(*each, strict=True)] for each in ((a, b), (b, c)))
    for text, reference in {
        "mul.wide.s32 %rd14, %r2, %r3": lambda i: signed(int(a[i])) * signed(int(b[i])),
        "mad.wide.u32 %rd14, %r2, %r3, %rd13": lambda i: int(a[i]) * int(b[i]) + y[i],
        "mul.hi.u64 %rd14, %rd12, %rd13": lambda i: x[i] * y[i] >> 64,
        "mul.hi.s64 %rd14, %rd12, %rd13": lambda i: signed(x[i], 64) * signed(y[i], 64) >> 64,
        "shr.s64 %rd14, %rd12, 5": lambda i: signed(x[i], 64) >> 5,
        "sub.s64 %rd14, %rd12, %rd13": lambda i: x[i] - y[i],
        "cvt.s64.s32 %rd14, %r2": lambda i: signed(int(a[i])),
        "cvt.u64.u32 %rd14, %r2": lambda i: int(a[i]),
    }.items():
        out, _ = execute(f"{text};\nst.global.u64 [%rd10], %rd14;", a, b, c)
        expected = [reference(i) & ((1 << 64) - 1) for i in range(THREADS)]
        assert out.tolist() == expected, text


def test_carry_chain_adds_64_bits():
    a, b, c = integers(), integers(), integers()
    body = "add.cc.u32 %r10, %r2, %r3;\naddc.u32 %r11, %r4, %r2;\nmov.b64 %rd14, {%r10, %r11};\n"
    out, _ = execute(body + "st.global.u64 [%rd10], %rd14;", a, b, c)
    for i in range(THREADS):
        x, y = int(c[i]) << 32 | int(a[i]), int(a[i]) << 32 | int(b[i])
        assert int(out[i]) == (x + y) % (1 << 64)


def test_signed_bit_field():
    a, b, c = integers(), integers() % 32, integers() % 33
    out, _ = execute("bfe.s32 %r10, %r2, %r3, %r4;\nst.global.u32 [%rd10], %r10;", a, b, c)
    for i in range(THREADS):
        length = min(int(c[i]), 32 - int(b[i]))
        expected = bit_field(int(a[i]), int(b[i]), int(c[i]) if length == int(c[i]) else 64, True)
        assert int(out[i]) == expected & MASK


def test_bytes_and_lop3():
    a, b = integers(), integers()
    out, _ = execute("prmt.b32 %r10, %r2, %r3, 0x8714;\nst.global.u32 [%rd10], %r10;", a, b)
    for i in range(THREADS):
        pool = [*struct.pack("<II", int(a[i]), int(b[i]))]
        sign = 255 if pool[0] & 128 else 0
        assert int(out[i]) == int.from_bytes([pool[4], pool[1], pool[7], sign], "little")
    out, _ = execute("lop3.b32 %r10, %r2, %r3, %r4, 0xCA;\nst.global.u32 [%rd10], %r10;", a, b, b ^ 7)
    np.testing.assert_array_equal(out, (a & b) | (~a & (b ^ 7)))


def exact_fma(a, b, c):
    """Rounded once, from exact fractions."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    guess = np.float32(float(exact))
    candidates = [guess, np.nextafter(guess, np.float32(-np.inf)), np.nextafter(guess, np.float32(np.inf))]
    return min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), int(np.float32(x).view(np.uint32)) & 1))


def test_fused_multiply_add_is_rounded_once():
    a, b, c = (np.abs(floats()[8:]) + np.float32(1) for _ in range(3))
    # 1 + 2^-12 squared lies half way; c below it decides, far beyond float64's reach.
    a[:3] = b[:3] = np.float32(1 + 2.0**-12)
    c[:3] = np.float32(2.0**-60), np.float32(-(2.0**-60)), np.float32(0)
    pad = np.ones(8, np.float32)
    a, b, c = (np.concatenate([x, pad]) for x in (a, b, c))
    out, _ = execute(
        "fma.rn.f32 %f10, %f2, %f3, %f4;\nst.global.f32 [%rd10], %f10;", *(x.view(np.uint32) for x in (a, b, c))
    )
    found = out.astype(np.uint32).view(np.float32)
    expected = [exact_fma(*map(float, each)) for each in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    assert found[0] != found[1]


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_float_comparisons_know_nan(compare):
    a, b = floats(), floats()
    b[::3] = a[::3]
    body = f"setp.{compare}.f32 %p1|%p2, %f2, %f3;\nselp.u32 %r10, 1, 0, %p1;\nselp.u32 %r11, 2, 0, %p2;\n"
    out, _ = execute(
        body + "or.b32 %r10, %r10, %r11;\nst.global.u32 [%rd10], %r10;", a.view(np.uint32), b.view(np.uint32)
    )
    operators = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    unordered = np.isnan(a) | np.isnan(b)
    if compare in ("num", "nan"):
        expected = unordered if compare == "nan" else ~unordered
    else:
        expected = operators[compare[:2]] & ~unordered | (unordered if compare.endswith("u") else False)
    np.testing.assert_array_equal(out, np.where(expected, 1, 2))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("cvt.rzi.s32.f32 %r10, %f2", lambda x: np.clip(np.trunc(np.nan_to_num(x)), -(2**31), 2**31 - 1)),
        ("cvt.rni.s32.f32 %r10, %f2", lambda x: np.clip(np.rint(np.nan_to_num(x)), -(2**31), 2**31 - 1)),
        ("cvt.rzi.u32.f32 %r10, %f2", lambda x: np.clip(np.trunc(np.nan_to_num(x)), 0, 2**32 - 1)),
    ],
)
def test_floats_become_integers_within_range(text, reference):
    a = np.nan_to_num(floats(), nan=0, posinf=1e30, neginf=-1e30)
    out, _ = execute(f"{text};\nst.global.u32 [%rd10], %r10;", a.view(np.uint32))
    expected = reference(a.astype(np.float64)).astype(np.int64).astype(np.uint32)
    np.testing.assert_array_equal(out, expected)


def test_half_precision():
    a, b = floats(), floats()
    with np.errstate(over="ignore"):
        halves = a.astype(np.float16), b.astype(np.float16)
    body = "cvt.rn.f16.f32 %h1, %f2;\ncvt.rn.f16.f32 %h2, %f3;\nmov.b32 %r10, {%h1, %h2};\n"
    out, _ = execute(body + "st.global.u32 [%rd10], %r10;", a.view(np.uint32), b.view(np.uint32))
    np.testing.assert_array_equal(out.astype("<u4").view(np.float16).reshape(-1, 2), np.stack(halves, 1))
    back = "mov.b32 {%h1, %h2}, %r10;\ncvt.f32.f16 %f10, %h2;\nst.global.f32 [%rd10], %f10;"
    out, _ = execute(body + back, a.view(np.uint32), b.view(np.uint32))
    np.testing.assert_array_equal(out.astype("<u4").view(np.float32), halves[1].astype(np.float32))


@pytest.mark.parametrize(
    ("mode", "by", "source"),
    [
        ("bfly", 5, lambda lane: lane ^ 5),
        ("down", 3, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("up", 3, lambda lane: lane - 3 if lane >= 3 else lane),
        ("idx", 9, lambda lane: 9),
    ],
)
def test_shuffles(mode, by, source):
    clamp = 0 if mode == "up" else 31
    out, _ = execute(f"shfl.sync.{mode}.b32 %r10|%p1, %r1, {by}, {clamp}, -1;\nst.global.u32 [%rd10], %r10;")
    assert out.tolist() == [thread // 32 * 32 + source(thread % 32) for thread in range(THREADS)]


def test_votes():
    body = "and.b32 %r10, %r1, 3;\nsetp.eq.u32 %p1, %r10, 1;\nvote.sync.ballot.b32 %r11, %p1, -1;\n"
    out, _ = execute(body + "st.global.u32 [%rd10], %r11;")
    assert set(out.tolist()) == {sum(1 << lane for lane in range(1, 32, 4))}
    out, _ = execute(body + "match.any.sync.b32 %r11, %r10, -1;\nst.global.u32 [%rd10], %r11;")
    assert out[2] == sum(1 << lane for lane in range(2, 32, 4))


def test_block_wide_count():
    body = "setp.lt.u32 %p1, %r1, 37;\nbarrier.red.popc.u32 %r10, 0, %p1;\nst.global.u32 [%rd10], %r10;"
    out, _ = execute(body.replace("barrier.", "bar."))
    assert set(out.tolist()) == {37}


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_then_mma_multiplies(transposed):
    """A [16, 16] by B [16, 8] through shared memory, as a kernel does it; B with or without .trans."""
    a = _random.integers(-4, 5, (16, 16)).astype(np.float16)
    b = _random.integers(-4, 5, (16, 8)).astype(np.float16)
    stored_b = b if transposed else np.ascontiguousarray(b.T)  # rows of 8 columns, or columns of 16 rows
    words = np.concatenate([a.reshape(-1), stored_b.reshape(-1)]).view(np.uint32)  # 128 + 64
    x = [np.zeros(64, np.uint32) for _ in range(3)]
    x[0], x[1], x[2] = words[:64], words[64:128], words[128:]
    fill = "mov.u64 %rd14, tile;\nadd.s64 %rd15, %rd14, %rd5;\nst.shared.u32 [%rd15], %r2;\n"
    fill += "st.shared.u32 [%rd15+256], %r3;\nst.shared.u32 [%rd15+512], %r4;\nbar.sync 0;\n"
    address = "and.b32 %r5, %r1, 15;\nshl.b32 %r6, %r5, 5;\nshr.u32 %r7, %r1, 4;\nand.b32 %r7, %r7, 1;\n"
    address += "shl.b32 %r7, %r7, 4;\ncvt.u32.u64 %r9, %rd14;\nadd.u32 %r6, %r6, %r7;\nadd.u32 %r6, %r6, %r9;\n"
    if transposed:
        address += "shl.b32 %r8, %r5, 4;\n"
    else:  # lane & 7 is the column, lane / 8 % 2 the half of it
        address += "and.b32 %r8, %r1, 7;\nshl.b32 %r8, %r8, 5;\nand.b32 %r10, %r1, 8;\nshl.b32 %r10, %r10, 1;\n"
        address += "add.u32 %r8, %r8, %r10;\n"
    address += "add.u32 %r8, %r8, %r9;\nadd.u32 %r8, %r8, 512;\n"
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r6];\n"
    load += f"ldmatrix.sync.aligned.m8n8.x2{'.trans' if transposed else ''}.shared.b16 {{%r24, %r25}}, [%r8];\n"
    product = "mov.f32 %f10, 0f3F800000;\nmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f11, %f12, %f13, %f14}, "
    product += "{%r20, %r21, %r22, %r23}, {%r24, %r25}, {%f10, %f10, %f10, %f10};\n"
    store = "st.global.v4.f32 [%rd16], {%f11, %f12, %f13, %f14};"
    body = fill + address + load + product + "mul.wide.u32 %rd16, %r1, 16;\nadd.s64 %rd16, %rd4, %rd16;\n" + store
    memory = DeviceMemory()
    pointers = [memory.upload(array) for array in x]
    out = memory.upload(np.zeros(256, np.uint32))
    launch(HEAD + body + "\nret;\n}", "kernel", 1, THREADS, [*pointers, out], memory=memory)
    found = memory.read(out, (2, 32, 4), np.float32)[0]
    expected = a.astype(np.float32) @ b.astype(np.float32) + 1
    for lane in range(32):
        row, column = lane >> 2, 2 * (lane & 3)
        assert found[lane].tolist() == [*expected[row, column : column + 2], *expected[row + 8, column : column + 2]]


def test_divergent_paths_join():
    """Collatz: each thread loops its own number of times."""
    body = """
mov.u32 %r10, 0;
add.u32 %r11, %r1, 1;
$LOOP:
setp.eq.u32 %p1, %r11, 1;
@%p1 bra $END;
and.b32 %r12, %r11, 1;
setp.eq.u32 %p2, %r12, 0;
@%p2 bra $EVEN;
mad.lo.u32 %r11, %r11, 3, 1;
bra $NEXT;
$EVEN:
shr.u32 %r11, %r11, 1;
$NEXT:
add.u32 %r10, %r10, 1;
bra $LOOP;
$END:
bar.warp.sync -1;
st.global.u32 [%rd10], %r10;
"""

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    out, _ = execute(body)
    assert out.tolist() == [steps(thread + 1) for thread in range(THREADS)]


# Counters


def index_of(counters, text):
    return next(each.index for each in counters.program.instructions if text in each.text)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1), (2, 2)])
def test_sectors_of_a_warp(stride, sectors):
    body = f"mul.wide.u32 %rd14, %r1, {stride};\nadd.s64 %rd15, %rd4, %rd14;\n"
    kind = "u16" if stride == 2 else "u32"
    body += f"ld.global.{kind} {'%h1' if stride == 2 else '%r10'}, [%rd15];"
    _, counters = execute(body, threads=32)
    at = index_of(counters, "[%rd15]")
    assert counters.sectors[at] == sectors
    assert counters.bytes[at] == 32 * (2 if stride == 2 else 4)
    assert counters.warps[at] == 1 and counters.threads[at] == 32


@pytest.mark.parametrize(
    ("stride", "vector", "wavefronts", "ideal"),
    [
        *[(4, 1, 1, 1), (8, 1, 2, 1), (128, 1, 32, 1), (0, 1, 1, 1), (132, 1, 1, 1)],
        *[(16, 4, 4, 4), (32, 4, 8, 4), (8, 2, 2, 2)],
    ],
)
def test_bank_conflicts_of_a_warp(stride, vector, wavefronts, ideal):
    registers = ", ".join(f"%r{10 + i}" for i in range(vector))
    target, suffix = ("{" + registers + "}", f".v{vector}") if vector > 1 else (registers, "")
    fill = "".join(f"st.shared.u32 [%rd15+{128 * i}], %r1;\n" for i in range(48))
    body = "mov.u64 %rd14, tile;\nadd.s64 %rd15, %rd14, %rd5;\n" + fill + "bar.sync 0;\n"
    body += f"mul.wide.u32 %rd16, %r1, {stride};\nadd.s64 %rd16, %rd14, %rd16;\n"
    body += f"ld.shared{suffix}.u32 {target}, [%rd16];"
    _, counters = execute(body, threads=32)
    at = index_of(counters, "[%rd16]")
    assert (counters.wavefronts[at], counters.ideal_wavefronts[at]) == (wavefronts, ideal)
    assert counters.bank_conflicts == wavefronts - ideal


def test_instructions_by_kind():
    _, counters = execute("fma.rn.f32 %f10, %f2, %f3, %f4;\nbar.sync 0;\nst.global.f32 [%rd10], %f10;")
    assert counters.by_kind["float arithmetic"] == 2  # two warps
    assert counters.by_kind["barrier"] == 2 and counters.by_kind["load global"] == 6
    assert counters.load.bytes == 3 * 4 * THREADS and counters.load.sectors == 3 * 8
    assert math.isclose(counters.load.efficiency, 1.0)
    assert counters.store.sectors == 16  # every second word
    assert counters.instructions == sum(counters.by_kind.values())
