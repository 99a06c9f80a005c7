"""Instructions that Numba has no name for, as functions that kernels call.

Everything that ties a kernel to the compiler stands here: vector loads and stores, tensor-core products,
``ldmatrix``, ``cp.async``, conversions between number formats, and bit casts. Each function has a twin in
plain Python for the simulator (``toolchain/simulator_intrinsics.py``).

``pointer`` below is a flat pointer or a one-dimensional array, and ``index`` counts its elements, whatever
their type; an access of N bytes must be aligned to N bytes, for which a shared array needs ``alignment=16``.
16-bit floats travel as ``uint16``, pairs of them as ``uint32`` with the first one in the low half.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

f32, u16, u32, i64 = types.float32, types.uint16, types.uint32, types.int64
_IR = {f32: ir.FloatType(), u16: ir.IntType(16), u32: ir.IntType(32), i64: ir.IntType(64)}
_CONSTRAINT = {f32: "f", u16: "h", u32: "r", i64: "l"}
_VOID = ir.VoidType()


def _element_address(context, builder, pointer_type, pointer, index) -> ir.Value:
    """The address of element ``index``, as 64 bits."""
    if isinstance(pointer_type, types.Array):
        pointer = context.make_array(pointer_type)(context, builder, value=pointer).data
    return builder.ptrtoint(builder.gep(pointer, [index]), ir.IntType(64))


def _shared_address(context, builder, pointer_type, pointer, index) -> ir.Value:
    """The 32-bit address of element ``index`` inside the window of shared memory."""
    if isinstance(pointer_type, types.Array):
        pointer = context.make_array(pointer_type)(context, builder, value=pointer).data
    element = builder.gep(pointer, [index])
    if element.type.addrspace != 3:
        element = builder.addrspacecast(element, ir.PointerType(element.type.pointee, 3))
    return builder.ptrtoint(element, ir.IntType(32))


def _assembly(context, builder, text, results, operands, constraints, pure=False):
    """One inline-assembly statement; ``$0``.. are its results, then its operands.

    Returns what Numba expects for no, one or several results. Without ``pure`` the statement keeps its place
    among the accesses to memory.
    """
    result_types = [_IR[kind] for kind in results]
    if len(results) > 1:
        return_type = ir.LiteralStructType(result_types)
    else:
        return_type = result_types[0] if results else _VOID
    parts = ["=" + _CONSTRAINT[kind] for kind in results] + list(constraints)
    if not pure:
        parts.append("~{memory}")
    function_type = ir.FunctionType(return_type, [operand.type for operand in operands])
    value = builder.call(ir.InlineAsm(function_type, text, ",".join(parts), side_effect=not pure), operands)
    if not results:
        return context.get_dummy_value()
    if len(results) == 1:
        return value
    fields = [builder.extract_value(value, i) for i in range(len(results))]
    return context.make_tuple(builder, _result_type(results), fields)


def _result_type(results):
    if not results:
        return types.void
    return results[0] if len(results) == 1 else types.UniTuple(results[0], len(results))


def _registers(text: str, results: tuple, operands: tuple):
    """An intrinsic on registers only: ``operands`` in, ``results`` out."""

    def make(typing_context, *arguments):
        def codegen(context, builder, signature, values):
            constraints = [_CONSTRAINT[kind] for kind in operands]
            return _assembly(context, builder, text, results, values, constraints, pure=True)

        return _result_type(results)(*operands), codegen

    return intrinsic(_with_arity(make, len(operands)))


def _with_arity(make, count: int):
    """``make`` with ``count`` named parameters, since Numba reads the arity off the signature."""
    names = ", ".join(f"x{i}" for i in range(count))
    namespace = {"make": make}
    exec(f"def typed(typing_context, {names}):\n    return make(typing_context, {names})", namespace)
    return namespace["typed"]


# Vector loads and stores


def _load(space: str, count: int):
    address_of, constraint = (_element_address, "l") if space == "global" else (_shared_address, "r")
    results = (u32,) * count
    registers = ", ".join(f"${i}" for i in range(count))
    destination, vector = ("{" + registers + "}", f".v{count}") if count > 1 else (registers, "")
    text = f"ld.{space}{vector}.u32 {destination}, [${count}];"

    def load(typing_context, pointer, index):
        def codegen(context, builder, signature, values):
            address = address_of(context, builder, signature.args[0], *values)
            return _assembly(context, builder, text, results, [address], [constraint])

        return _result_type(results)(pointer, i64), codegen

    return intrinsic(load)


def _store(space: str, count: int):
    address_of, constraint = (_element_address, "l") if space == "global" else (_shared_address, "r")
    registers = ", ".join(f"${i}" for i in range(1, count + 1))
    source, vector = ("{" + registers + "}", f".v{count}") if count > 1 else (registers, "")
    text = f"st.{space}{vector}.u32 [$0], {source};"

    def make(typing_context, pointer, index, *words):
        def codegen(context, builder, signature, values):
            address = address_of(context, builder, signature.args[0], *values[:2])
            operands = [address, *values[2:]]
            return _assembly(context, builder, text, (), operands, [constraint] + ["r"] * count)

        return types.void(pointer, i64, *[u32] * count), codegen

    return intrinsic(_with_arity(make, count + 2))


#: ``ldg128(pointer, index) -> (u32, u32, u32, u32)``: 16 bytes of global memory in one instruction.
ldg32, ldg64, ldg128 = (_load("global", count) for count in (1, 2, 4))
#: ``stg128(pointer, index, a, b, c, d)``: 16 bytes to global memory in one instruction.
stg32, stg64, stg128 = (_store("global", count) for count in (1, 2, 4))
#: The same for shared memory.
lds32, lds64, lds128 = (_load("shared", count) for count in (1, 2, 4))
sts32, sts64, sts128 = (_store("shared", count) for count in (1, 2, 4))


# Pointers


@intrinsic
def flat(typing_context, array):
    """A flat pointer to the first element of ``array`` (of shared memory): no index of it wraps around."""

    def codegen(context, builder, signature, values):
        data = context.make_array(signature.args[0])(context, builder, value=values[0]).data
        return builder.addrspacecast(data, data.type.pointee.as_pointer()) if data.type.addrspace else data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def reinterpret(typing_context, pointer, index, dtype):
    """A pointer to elements of ``dtype`` (a Numba type) that begins at element ``index`` of ``pointer``."""

    def codegen(context, builder, signature, values):
        address = builder.gep(values[0], [values[1]])
        return builder.bitcast(address, context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(pointer, i64, dtype), codegen


# Tensor cores


def _mma(shape: str, kind: str, a_count: int, b_count: int):
    registers = [f"${i}" for i in range(12 + a_count + b_count)]
    groups, start = [], 0
    for count in (4, a_count, b_count, 4):
        groups.append("{" + ", ".join(registers[start : start + count]) + "}")
        start += count
    text = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {', '.join(groups)};"
    return _registers(text, (f32,) * 4, (u32,) * (a_count + b_count) + (f32,) * 4)


#: ``mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3) -> (d0, d1, d2, d3)``: D = A B + C by one warp.
#: With g = lane / 4 and t = lane % 4: A [16, 16] holds rows g (a0, a2) and g + 8 (a1, a3), columns 2t, 2t + 1
#: (a0, a1) and 2t + 8, 2t + 9 (a2, a3); B [16, 8] holds column g, rows 2t, 2t + 1 (b0) and 2t + 8, 2t + 9 (b1);
#: C and D [16, 8] hold rows g (c0, c1) and g + 8 (c2, c3), columns 2t and 2t + 1. sm_80 and newer.
mma_m16n8k16_f16 = _mma("m16n8k16", "f16", 4, 2)
mma_m16n8k16_bf16 = _mma("m16n8k16", "bf16", 4, 2)
#: ``mma(a0, a1, b0, c0, c1, c2, c3) -> (d0, d1, d2, d3)``: the half of it that sm_75 has, A [16, 8], B [8, 8].
mma_m16n8k8_f16 = _mma("m16n8k8", "f16", 2, 1)


def _ldmatrix(count: int, transposed: bool):
    results = (u32,) * count
    registers = ", ".join(f"${i}" for i in range(count))
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [${count}];"

    def load(typing_context, shared, index):
        def codegen(context, builder, signature, values):
            address = _shared_address(context, builder, signature.args[0], *values)
            return _assembly(context, builder, text, results, [address], ["r"])

        return _result_type(results)(shared, i64), codegen

    return intrinsic(load)


#: ``ldmatrix_x4(shared, index)``: four 8 x 8 matrices of 16-bit elements; lane 8m + r gives the address of row r
#: of matrix m; of each matrix a lane receives row lane / 4, columns 2 (lane % 4) and the next (``_trans``: the
#: transposed matrix's).
ldmatrix_x1, ldmatrix_x2, ldmatrix_x4 = (_ldmatrix(count, False) for count in (1, 2, 4))
ldmatrix_x1_trans, ldmatrix_x2_trans, ldmatrix_x4_trans = (_ldmatrix(count, True) for count in (1, 2, 4))


# Asynchronous copies from global to shared memory: sm_80 and newer


def _cp_async(bytes_: int, zero_fill: bool):
    cache = "cg" if bytes_ == 16 else "ca"  # 16 bytes go past L1
    text = f"cp.async.{cache}.shared.global [$0], [$1], {bytes_}{', $2' if zero_fill else ''};"

    def make(typing_context, shared, shared_index, pointer, index, *source_bytes):
        def codegen(context, builder, signature, values):
            to = _shared_address(context, builder, signature.args[0], *values[:2])
            source = _element_address(context, builder, signature.args[2], *values[2:4])
            constraints = ["r", "l"] + ["r"] * len(source_bytes)
            return _assembly(context, builder, text, (), [to, source, *values[4:]], constraints)

        return types.void(shared, i64, pointer, i64, *[u32] * len(source_bytes)), codegen

    return intrinsic(_with_arity(make, 5 if zero_fill else 4))


#: ``cp_async16(shared, shared_index, pointer, index)``: starts copying 16 bytes.
cp_async4, cp_async8, cp_async16 = (_cp_async(bytes_, False) for bytes_ in (4, 8, 16))
#: ``cp_async16_zfill(..., source_bytes)``: reads only ``source_bytes`` (0 to 16), the rest becomes zero.
cp_async16_zfill = _cp_async(16, True)


def _statement(text: str):
    def statement(typing_context):
        def codegen(context, builder, signature, values):
            return _assembly(context, builder, text, (), [], [])

        return types.void(), codegen

    return intrinsic(statement)


cp_async_commit = _statement("cp.async.commit_group;")
#: ``cp_async_wait2()``: waits until at most 2 of this thread's newest groups are still under way.
cp_async_wait0, cp_async_wait1, cp_async_wait2, cp_async_wait3 = (
    _statement(f"cp.async.wait_group {count};") for count in range(4)
)


# Number formats

bits_to_f32 = _registers("mov.b32 $0, $1;", (f32,), (u32,))
f32_to_bits = _registers("mov.b32 $0, $1;", (u32,), (f32,))
half_to_f32 = _registers("cvt.f32.f16 $0, $1;", (f32,), (u16,))
f32_to_half = _registers("cvt.rn.f16.f32 $0, $1;", (u16,), (f32,))
unpack_half2 = _registers(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }", (f32, f32), (u32,)
)
pack_half2 = _registers(
    "{ .reg .b16 low, high; cvt.rn.f16.f32 low, $1; cvt.rn.f16.f32 high, $2; mov.b32 $0, {low, high}; }",
    (u32,),
    (f32, f32),
)


def _as_float(builder, word):
    return builder.bitcast(word, ir.FloatType())


def _bf16_bits(builder, value):
    """The 16 bits, in the low half of 32, of ``value`` rounded to bfloat16: nearest, ties to even, NaN stays NaN."""
    i32 = ir.IntType(32)
    word = builder.bitcast(value, i32)
    last_kept = builder.and_(builder.lshr(word, i32(16)), i32(1))
    rounded = builder.lshr(builder.add(word, builder.add(last_kept, i32(0x7FFF))), i32(16))
    return builder.select(builder.fcmp_unordered("uno", value, value), i32(0x7FFF), rounded)


@intrinsic
def bf16_to_f32(typing_context, word):
    """float32 of a bfloat16 given as uint16."""

    def codegen(context, builder, signature, values):
        i32 = ir.IntType(32)
        return _as_float(builder, builder.shl(builder.zext(values[0], i32), i32(16)))

    return f32(u16), codegen


@intrinsic
def f32_to_bf16(typing_context, value):
    """bfloat16, as uint16, of a float32: by integer arithmetic, so every card rounds alike."""

    def codegen(context, builder, signature, values):
        return builder.trunc(_bf16_bits(builder, values[0]), ir.IntType(16))

    return u16(f32), codegen


@intrinsic
def unpack_bf16x2(typing_context, word):
    """Both bfloat16 of a word, as two float32, the low half first."""

    def codegen(context, builder, signature, values):
        i32 = ir.IntType(32)
        low = _as_float(builder, builder.shl(values[0], i32(16)))
        high = _as_float(builder, builder.and_(values[0], i32(0xFFFF0000)))
        return context.make_tuple(builder, signature.return_type, [low, high])

    return types.UniTuple(f32, 2)(u32), codegen


@intrinsic
def pack_bf16x2(typing_context, low, high):
    """Two float32 rounded to bfloat16 in one word, ``low`` in its low half."""

    def codegen(context, builder, signature, values):
        low, high = (_bf16_bits(builder, value) for value in values)
        return builder.or_(low, builder.shl(high, ir.IntType(32)(16)))

    return u32(f32, f32), codegen


# Arithmetic

#: The high 32 bits of a 32 x 32-bit product: what Philox multiplies with.
mulhi_u32 = _registers("mul.hi.u32 $0, $1, $2;", (u32,), (u32, u32))
#: The low 32 bits; in Numba ``uint32 * uint32`` would be a uint64.
mullo_u32 = _registers("mul.lo.u32 $0, $1, $2;", (u32,), (u32, u32))
#: 2 to the power of x, with the special-function unit's accuracy (2 ulp); subnormal results become 0.
exp2_approx = _registers("ex2.approx.ftz.f32 $0, $1;", (f32,), (f32,))
#: A fused multiply-add, rounded once: the compiler may neither split nor make one by itself.
fma_f32 = _registers("fma.rn.f32 $0, $1, $2, $3;", (f32,), (f32, f32, f32))
mul_f32 = _registers("mul.rn.f32 $0, $1, $2;", (f32,), (f32, f32))
add_f32 = _registers("add.rn.f32 $0, $1, $2;", (f32,), (f32, f32))
#: Four bytes chosen from the eight of (a, b) by the four nibbles of ``selector``.
byte_permute = _registers("prmt.b32 $0, $1, $2, $3;", (u32,), (u32, u32, u32))
#: Two float16 fused multiply-adds in one instruction: a * b + c in each half.
fma_half2 = _registers("fma.rn.f16x2 $0, $1, $2, $3;", (u32,), (u32, u32, u32))
sub_half2 = _registers("sub.rn.f16x2 $0, $1, $2;", (u32,), (u32, u32))
