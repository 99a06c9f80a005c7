"""A small layer over LLVM vectors: how the SIMD kernels of this package are written.

Numba compiles scalar loops, and LLVM vectorises many of them well. It does not find a register-blocked
matrix product, nor instructions such as ``vpdpbusd``. So the inner loops are *emitted*: a Python
function receives an :class:`Emitter` and LLVM values, and calls methods that append instructions. It
runs once, while Numba compiles, and :func:`kernel` makes it callable from ``@njit`` code::

    @kernel(3)
    def add_vectors(e, a, b, out):           # three int64 addresses
        total = e.fadd(e.load(a, e.f32), e.load(b, e.f32))
        e.store(total, out)

    @njit
    def f(a, b, out):
        add_vectors(a, b, out)               # two loads, an add and a store of a whole vector

Everything is an int64 (an address in bytes, a stride in bytes or a count) or a vector. Python loops
unroll; :meth:`Emitter.loop` makes a loop at run time. Nothing here is specific to an instruction set,
except the few methods that say so; widths come from :class:`~minipaged.ops.cpu.features.InstructionSet`.
Loads and stores assume no alignment (AVX and later do not care, and a wrong promise would crash).
Intrinsics are declared as old LLVM versions know them (typed pointers, int32 for packed bytes and
bfloat16); LLVM upgrades such declarations itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import features
from .features import InstructionSet

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


def vector(element: ir.Type, count: int) -> ir.VectorType:
    """LLVM's ``<count x element>``."""
    return ir.VectorType(element, count)


class Emitter:
    """Appends instructions at the position of ``builder``, for the given instruction set."""

    def __init__(self, builder: ir.IRBuilder, isa: InstructionSet):
        self.builder = builder
        self.isa = isa
        self.lanes = isa.lanes
        self.f32 = vector(F32, isa.lanes)
        self.i32 = vector(I32, isa.lanes)
        self.i16 = vector(I16, 2 * isa.lanes)
        self.i8 = vector(I8, 4 * isa.lanes)

    # ---- integers: addresses and counts

    def const(self, value: int) -> ir.Constant:
        """An int64."""
        return ir.Constant(I64, value)

    def add(self, a: ir.Value, b: ir.Value | int) -> ir.Value:
        """``a + b`` of int64; ``b`` may be a Python int."""
        if isinstance(b, int):
            if b == 0:
                return a
            b = self.const(b)
        return self.builder.add(a, b)

    def mul(self, a: ir.Value, b: ir.Value | int) -> ir.Value:
        """``a * b`` of int64; ``b`` may be a Python int."""
        return self.builder.mul(a, self.const(b) if isinstance(b, int) else b)

    def div(self, a: ir.Value, b: ir.Value | int) -> ir.Value:
        """``a // b`` of non-negative int64; ``b`` may be a Python int."""
        return self.builder.udiv(a, self.const(b) if isinstance(b, int) else b)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller one of two int64."""
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger one of two int64."""
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    # ---- memory

    def load(self, address: ir.Value, type_: ir.Type) -> ir.Value:
        """The value of ``type_`` at ``address``; any alignment."""
        value = self.builder.load(self.builder.inttoptr(address, type_.as_pointer()))
        value.align = 1
        return value

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Write ``value`` at ``address``; any alignment."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 1

    def prefetch(self, address: ir.Value, locality: int) -> None:
        """Ask for the cache line of ``address``: 3 = into L1, 2 = L2, 1 = L3, 0 = to be used once."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        flags = [ir.Constant(I32, flag) for flag in (0, locality, 1)]  # read, locality, data
        self.call("llvm.prefetch.p0i8", ir.VoidType(), [pointer, *flags])

    # ---- vectors

    def constant(self, type_: ir.VectorType, value: float) -> ir.Constant:
        """A vector whose lanes all hold the Python number ``value``."""
        return ir.Constant(type_, [value] * type_.count)

    def broadcast(self, scalar: ir.Value, lanes: int) -> ir.Value:
        """A vector whose lanes all hold ``scalar``."""
        type_ = vector(scalar.type, lanes)
        undefined = ir.Constant(type_, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(vector(I32, lanes), [0] * lanes))

    def load_broadcast(self, address: ir.Value, type_: ir.Type = F32) -> ir.Value:
        """The scalar at ``address`` in every lane: one instruction, ``vbroadcastss`` or an operand of one."""
        return self.broadcast(self.load(address, type_), self.lanes)

    def bitcast(self, value: ir.Value, type_: ir.Type) -> ir.Value:
        """The same bits as another type."""
        return self.builder.bitcast(value, type_)

    def reduce(self, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Fold the lanes into a scalar: upper half with lower half, until one is left."""
        count = value.type.count
        while count > 1:
            count //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            low, high = (
                self.builder.shuffle_vector(
                    value, undefined, ir.Constant(vector(I32, count), list(range(start, start + count)))
                )
                for start in (0, count)
            )
            value = combine(low, high)
        return self.builder.extract_element(value, ir.Constant(I32, 0))

    # ---- float arithmetic

    def fadd(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a + b``"""
        return self.builder.fadd(a, b)

    def fmul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a * b``"""
        return self.builder.fmul(a, b)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a * b + c`` rounded once; twice where the instruction set has no such instruction.

        (``llvm.fma`` without the instruction is a call of libm for every lane.)
        """
        if self.isa.has_fma:
            return self.call_vector("llvm.fma", a, b, c)
        return self.fadd(self.fmul(a, b), c)

    def fmax(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger one, lane by lane, as one ``maxps``: if either is NaN, ``b``."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def fmin(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller one, lane by lane, as one ``minps``: if either is NaN, ``b``."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def round_to_integer(self, a: ir.Value) -> ir.Value:
        """The nearest integer, ties to even, of lanes below 2**22 in magnitude."""
        if self.isa.has_fma:
            return self.call_vector("llvm.roundeven", a)
        rounder = self.constant(a.type, 12582912.0)  # 1.5 * 2**23: adding it leaves no room for a fraction
        return self.builder.fsub(self.fadd(a, rounder), rounder)

    def scale_by_power_of_two(self, a: ir.Value, n: ir.Value) -> ir.Value:
        """``a * 2**n`` for lanes ``n`` that are integers in [-126, 127]."""
        if self.isa.vector_bytes == 64 and a.type.count == 16:  # vscalefps
            arguments = [a, n, a, ir.Constant(I16, -1), ir.Constant(I32, 4)]
            return self.call("llvm.x86.avx512.mask.scalef.ps.512", a.type, arguments)
        integers = vector(I32, a.type.count)
        exponent = self.builder.add(self.builder.fptosi(n, integers), self.constant(integers, 127))
        return self.fmul(a, self.bitcast(self.builder.shl(exponent, self.constant(integers, 23)), a.type))

    def to_float(self, a: ir.Value) -> ir.Value:
        """int32 lanes as float32."""
        return self.builder.sitofp(a, vector(F32, a.type.count))

    # ---- dot products of small integers

    def dot_i16(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """int32 lanes ``a[2i] * b[2i] + a[2i+1] * b[2i+1]`` of int16 lanes: ``pmaddwd``."""
        names = {16: "sse2.pmadd.wd", 32: "avx2.pmadd.wd", 64: "avx512.pmaddw.d.512"}
        if self.isa.has_x86:
            return self.call(f"llvm.x86.{names[self.isa.vector_bytes]}", self.i32, [a, b])
        return self.builder.add(
            *(self.builder.mul(self._widen_every_other(a, odd), self._widen_every_other(b, odd)) for odd in (0, 1))
        )

    def _widen_every_other(self, a: ir.Value, first: int) -> ir.Value:
        chosen = ir.Constant(self.i32, list(range(first, 2 * self.lanes, 2)))
        return self.builder.sext(self.builder.shuffle_vector(a, a, chosen), self.i32)

    def dot_u8_i8_saturating(self, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """int16 lanes ``u[2i] * s[2i] + u[2i+1] * s[2i+1]`` of bytes: ``pmaddubsw`` (AVX2 level only).

        It saturates, so the caller must know that the sums fit in 16 bits.
        """
        return self.call("llvm.x86.avx2.pmadd.ub.sw", self.i16, [unsigned, signed])

    def abs_i8(self, a: ir.Value) -> ir.Value:
        """Unsigned bytes ``|a|`` of signed ones: ``pabsb``; -128 becomes 128."""
        return self.call(f"llvm.abs.v{a.type.count}i8", a.type, [a, ir.Constant(ir.IntType(1), 0)])

    def sign_i8(self, a: ir.Value, sign: ir.Value) -> ir.Value:
        """Bytes ``a``, ``-a`` or 0 as ``sign`` is positive, negative or 0: ``psignb`` (AVX2 level only)."""
        return self.call("llvm.x86.avx2.psign.b", self.i8, [a, sign])

    def dot_accumulate_u8_i8(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """int32 lanes ``total + sum of u[4i+j] * s[4i+j]``, j in 0..3: ``vpdpbusd`` (needs VNNI)."""
        words = [self.bitcast(operand, self.i32) for operand in (unsigned, signed)]
        return self.call("llvm.x86.avx512.vpdpbusd.512", self.i32, [total, *words])

    def dot_accumulate_bf16(self, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """float32 lanes ``total + a[2i+1] * b[2i+1] + a[2i] * b[2i]`` of bfloat16: ``vdpbf16ps``.

        Needs AVX-512 BF16. ``a`` and ``b`` are int32 vectors: the two bfloat16 of a lane.
        """
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", self.f32, [total, a, b])

    # ---- calls and control flow

    def call(self, name: str, returns: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        """Call an LLVM intrinsic by its full name."""
        signature = ir.FunctionType(returns, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, signature, name), list(arguments))

    def call_vector(self, name: str, *arguments: ir.Value) -> ir.Value:
        """Call an intrinsic whose arguments and result all have one type: float32 or float64, vector or scalar."""
        type_ = arguments[0].type
        is_vector = isinstance(type_, ir.VectorType)
        suffix = "f64" if (type_.element if is_vector else type_) == F64 else "f32"
        suffix = f"v{type_.count}{suffix}" if is_vector else suffix
        return self.call(f"{name}.{suffix}", type_, arguments)

    def loop(
        self,
        count: ir.Value,
        state: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """``for i in range(count): state = body(i, state)``; returns the last state, kept in registers."""
        b = self.builder
        before = b.block
        head, inside, after = (b.append_basic_block(f"loop.{part}") for part in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(self.const(0), before)
        current = []
        for initial in state:
            value = b.phi(initial.type)
            value.add_incoming(initial, before)
            current.append(value)
        b.cbranch(b.icmp_signed("<", index, count), inside, after)
        b.position_at_end(inside)
        following = body(index, list(current))
        index.add_incoming(self.add(index, 1), b.block)
        for value, new in zip(current, following, strict=True):
            value.add_incoming(new, b.block)
        b.branch(head)
        b.position_at_end(after)
        return current

    def repeat(self, count: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """``for i in range(count): body(i)``"""
        self.loop(count, [], lambda i, state: body(i) or state)

    def switch(self, value: ir.Value, cases: dict[int, Callable[[], None]]) -> None:
        """Emit one body for each integer that ``value`` may equal; no other value may occur."""
        b = self.builder
        impossible, after = b.append_basic_block("switch.none"), b.append_basic_block("switch.end")
        chooser = b.switch(value, impossible)
        b.position_at_end(impossible)
        b.unreachable()
        for case, body in cases.items():
            block = b.append_basic_block(f"switch.{case}")
            chooser.add_case(self.const(case), block)
            b.position_at_end(block)
            body()
            b.branch(after)
        b.position_at_end(after)


def kernel(num_arguments: int, isa: InstructionSet | None = None) -> Callable[[Callable], Callable]:
    """Turn ``emit(e, *values)`` into an intrinsic of ``num_arguments`` int64 that ``@njit`` code calls.

    It returns nothing: results go to memory. ``isa`` defaults to the one of this process.
    """

    def decorate(emit: Callable[..., None]) -> Callable:
        def typing(typing_context, *arguments):
            def codegen(context, builder, signature, values):
                emit(Emitter(builder, isa or features.current()), *values)
                return context.get_dummy_value()

            return types.void(*[types.int64] * num_arguments), codegen

        parameter = inspect.Parameter
        typing.__signature__ = inspect.Signature(  # Numba reads the number of arguments here
            [
                parameter(name, parameter.POSITIONAL_OR_KEYWORD)
                for name in ("typing_context", *(f"a{i}" for i in range(num_arguments)))
            ]
        )
        typing.__name__ = emit.__name__
        typing.__doc__ = emit.__doc__
        return intrinsic(typing)

    return decorate
