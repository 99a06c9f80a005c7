"""Everything a layer does to one row at a time: norms, rope, activations, soft-caps, additions.

A row is ``count`` float32 at an address; no function touches anything beyond it. All are emitted
kernels (see :mod:`~minipaged.ops.cpu.emit`) that take 16 values at a time, then the rest one by one:
LLVM would vectorise plain loops as well, but takes ten times as long to compile them. A sum has 16
lanes and then the rest, an order that depends on ``count`` alone. Floats are passed as their bits
(:func:`~minipaged.ops.cpu.memory.float_bits`).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from . import vector_math
from .emit import F32, I32, Emitter, kernel, vector
from .memory import compiled, float_bits

GROUP = 16  # values of a step; LLVM cuts them into the vectors that the CPU has
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def float_argument(e: Emitter, bits: ir.Value) -> ir.Value:
    """The float32 whose bits came as an int64."""
    return e.bitcast(e.builder.trunc(bits, I32), F32)


def for_values(e: Emitter, count: ir.Value, body: Callable[[ir.Value, ir.Type], None]) -> None:
    """Emit ``body(offset in bytes, type)`` for all values of a row: vectors of 16, then single ones."""

    def run(first, how_many, width):
        def step(i, state):
            body(e.mul(e.add(first, e.mul(i, width)), 4), vector(F32, width))
            return []

        e.loop(how_many, [], step)

    groups = e.div(count, GROUP)
    run(e.const(0), groups, GROUP)
    run(e.mul(groups, GROUP), e.builder.and_(count, e.const(GROUP - 1)), 1)


def total(e: Emitter, count: ir.Value, value: Callable[[ir.Value, ir.Type, ir.Value], ir.Value]) -> ir.Value:
    """The scalar sum over a row; ``value(offset, type, sum)`` returns the sum with these values added."""
    groups = e.div(count, GROUP)
    wide, single = vector(F32, GROUP), vector(F32, 1)
    sums = e.loop(groups, [e.constant(wide, 0.0)], lambda i, state: [value(e.mul(i, 4 * GROUP), wide, state[0])])
    first = e.mul(groups, GROUP)
    rest = e.loop(
        e.builder.and_(count, e.const(GROUP - 1)),
        [e.broadcast(e.reduce(sums[0], e.fadd), 1)],
        lambda i, state: [value(e.mul(e.add(first, i), 4), single, state[0])],
    )
    return e.builder.extract_element(rest[0], ir.Constant(I32, 0))


def _scale_by_norm(e: Emitter, x, weight, out, count, eps) -> None:
    """``out = x / sqrt(mean(x²) + eps) * weight``."""
    b = e.builder

    def squares(offset, type_, sums):
        values = e.load(e.add(x, offset), type_)
        return e.fma(values, values, sums)

    mean = b.fdiv(total(e, count, squares), b.sitofp(count, F32))
    root = e.call_vector("llvm.sqrt", b.fadd(mean, float_argument(e, eps)))
    factor = b.fdiv(ir.Constant(F32, 1.0), root)

    def scale_values(offset, type_):
        values = e.fmul(e.load(e.add(x, offset), type_), e.broadcast(factor, type_.count))
        e.store(e.fmul(values, e.load(e.add(weight, offset), type_)), e.add(out, offset))

    for_values(e, count, scale_values)


@kernel(5)
def rms_norm(e, x, weight, out, count, eps):
    """``out = x / sqrt(mean(x²) + eps) * weight`` (Zhang and Sennrich, 2019); ``out`` may be ``x``."""
    _scale_by_norm(e, x, weight, out, count, eps)


@kernel(5)
def layer_norm(e, x, weight, out, count, eps):
    """``out = (x - mean) / sqrt(var + eps) * weight`` (Ba et al., 2016); ``out`` may be ``x``."""
    b = e.builder
    sum_ = total(e, count, lambda offset, type_, sums: e.fadd(sums, e.load(e.add(x, offset), type_)))
    mean = b.fdiv(sum_, b.sitofp(count, F32))

    def centre(offset, type_):
        e.store(b.fsub(e.load(e.add(x, offset), type_), e.broadcast(mean, type_.count)), e.add(out, offset))

    for_values(e, count, centre)
    _scale_by_norm(e, out, weight, out, count, eps)


@compiled
def norm(model, x, weight, bias, out, count):
    """The norm of the model's kind; ``bias`` 0: none."""
    if model.layer_norm:
        layer_norm(x, weight, out, count, float_bits(model.norm_eps))
        if bias:
            add(out, bias, count)
    else:
        rms_norm(x, weight, out, count, float_bits(model.norm_eps))


@kernel(3)
def add(e, x, y, count):
    """``x += y``."""

    def body(offset, type_):
        e.store(e.fadd(e.load(e.add(x, offset), type_), e.load(e.add(y, offset), type_)), e.add(x, offset))

    for_values(e, count, body)


@kernel(4)
def scale(e, x, factor, out, count):
    """``out = x * factor``."""
    scalar = float_argument(e, factor)

    def body(offset, type_):
        e.store(e.fmul(e.load(e.add(x, offset), type_), e.broadcast(scalar, type_.count)), e.add(out, offset))

    for_values(e, count, body)


@kernel(4)
def divide(e, x, divisor, out, count):
    """``out = x / divisor``."""
    scalar = float_argument(e, divisor)

    def body(offset, type_):
        values = e.builder.fdiv(e.load(e.add(x, offset), type_), e.broadcast(scalar, type_.count))
        e.store(values, e.add(out, offset))

    for_values(e, count, body)


@kernel(5)
def blend(e, x, x_factor, y, y_factor, count):
    """``x = x * x_factor + y * y_factor``."""
    a, b = float_argument(e, x_factor), float_argument(e, y_factor)

    def body(offset, type_):
        first = e.fmul(e.load(e.add(x, offset), type_), e.broadcast(a, type_.count))
        second = e.load(e.add(y, offset), type_)
        e.store(e.fma(second, e.broadcast(b, type_.count), first), e.add(x, offset))

    for_values(e, count, body)


@kernel(3)
def copy(e, x, out, count):
    """``out = x``."""
    for_values(e, count, lambda offset, type_: e.store(e.load(e.add(x, offset), type_), e.add(out, offset)))


@kernel(2)
def clear(e, x, count):
    """``x = 0``."""
    for_values(e, count, lambda offset, type_: e.store(e.constant(type_, 0.0), e.add(x, offset)))


@kernel(4)
def rope(e, x, cos, sin, half):
    """Rotate the pairs ``(x[i], x[i + half])`` by angles with these cosines and sines (Su et al., 2021)."""
    b = e.builder
    upper = e.add(x, e.mul(half, 4))

    def body(offset, type_):
        first, second = e.load(e.add(x, offset), type_), e.load(e.add(upper, offset), type_)
        c, s = e.load(e.add(cos, offset), type_), e.load(e.add(sin, offset), type_)
        e.store(b.fsub(b.fmul(first, c), b.fmul(second, s)), e.add(x, offset))
        e.store(b.fadd(b.fmul(second, c), b.fmul(first, s)), e.add(upper, offset))

    for_values(e, half, body)


@kernel(4)
def activate(e, case, x, up, count):
    """``x = activation(x)``, in the cases from 3 on times ``up`` (cases: ``ACTIVATIONS``, plus 3 if gated)."""

    def row(function, gated):
        def body(offset, type_):
            y = function(e, e.load(e.add(x, offset), type_))
            e.store(e.fmul(y, e.load(e.add(up, offset), type_)) if gated else y, e.add(x, offset))

        return lambda: for_values(e, count, body)

    functions = {case: getattr(vector_math, name) for name, case in ACTIVATIONS.items()}
    e.switch(case, {case + 3 * gated: row(f, gated) for case, f in functions.items() for gated in (0, 1)})


@kernel(3)
def soft_cap(e, x, cap, count):
    """``x = cap * tanh(x / cap)``."""
    scalar = float_argument(e, cap)

    def body(offset, type_):
        limit = e.broadcast(scalar, type_.count)
        capped = vector_math.tanh(e, e.builder.fdiv(e.load(e.add(x, offset), type_), limit))
        e.store(e.fmul(capped, limit), e.add(x, offset))

    for_values(e, count, body)
