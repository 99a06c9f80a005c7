"""Weights ``exp((logit - largest) / temperature)`` of logits, in float64, a vector at a time.

As ``2**t = 2**n * 2**f`` with an integer n and f in [-1/2, 1/2]. They are within 1e-12 of NumPy's, relatively
(:data:`WEIGHT_ERROR`), not equal to them: whoever decides by them must look whether it was a near thing.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import F32, F64, I64, Emitter, kernel, vector
from .vector_math import polynomial

CHUNK = 256
"""Logits whose weights are summed together by :func:`weigh_chunks`."""
WEIGHT_ERROR = 1e-12
"""The polynomial is within 4e-14 of its function. ``t`` is within three roundings of what it should be, and so is
NumPy's: at -1000, where it ends, that makes 7e-13."""
_LOG2_E = 1.4426950408889634
_EXP2 = (  # 2**f on [-1/2, 1/2]: through the Chebyshev nodes of (2**f - 1) / f
    1.0203121063391729e-07,
    1.3255224878668817e-06,
    1.525268684626772e-05,
    0.00015403455852453838,
    0.0013333558179043112,
    0.009618129159402558,
    0.055504108664760424,
    0.2402265069581299,
    0.6931471805599453,
    1.0,
)
_LEAST = -1000.0  # 2**-1000 stands for all that is less, and for the 0 of minus infinity; it is a normal number
_ROUNDER = 1.5 * 2**52  # a sum with it has no room for a fraction, and the integer in its lowest bits


def _weights(e: Emitter, logits: ir.Value, largest: ir.Value, temperature: ir.Value) -> ir.Value:
    """float64 lanes for float32 ones; ``largest`` and ``temperature`` are scalars, float64."""
    b, width = e.builder, logits.type.count
    wide, integers = vector(F64, width), vector(I64, width)
    scale = b.fdiv(ir.Constant(F64, _LOG2_E), temperature)
    t = b.fmul(b.fsub(b.fpext(logits, wide), e.broadcast(largest, width)), e.broadcast(scale, width))
    t = e.fmax(t, e.constant(wide, _LEAST))
    rounded = b.fadd(t, e.constant(wide, _ROUNDER))
    f = b.fsub(t, b.fsub(rounded, e.constant(wide, _ROUNDER)))
    power = e.bitcast(polynomial(e, f, _EXP2), integers)
    exponent = b.shl(e.bitcast(rounded, integers), e.constant(integers, 52))
    return e.bitcast(b.add(power, exponent), wide)


def _sum_weights(e: Emitter, logits, count, settings, weights=None) -> ir.Value:
    """The sum of the weights of ``count`` logits, which are also stored at ``weights``, if it is given."""
    b = e.builder
    largest, temperature = e.load(settings, F64), e.load(e.add(settings, 8), F64)

    def over(width: int, first, times, total):
        def step(i, state):
            at = e.add(first, e.mul(i, width))
            found = _weights(e, e.load(e.add(logits, e.mul(at, 4)), vector(F32, width)), largest, temperature)
            if weights is not None:
                e.store(found, e.add(weights, e.mul(at, 8)))
            return [b.fadd(state[0], found)]

        (sums,) = e.loop(times, [total], step)
        return e.reduce(sums, b.fadd)

    whole = e.div(count, e.lanes)
    total = over(e.lanes, e.const(0), whole, e.constant(vector(F64, e.lanes), 0.0))
    if isinstance(count, ir.Constant):  # a multiple of the width
        return total
    rest = b.and_(count, e.const(e.lanes - 1))
    return over(1, e.mul(whole, e.lanes), rest, e.broadcast(total, 1))


@kernel(5)
def weigh(e: Emitter, logits, count, settings, weights, total_at):
    """float64 weights of ``count`` float32 logits, and their sum. ``settings``: largest and temperature, float64."""
    e.store(_sum_weights(e, logits, count, settings, weights), total_at)


@kernel(4)
def weigh_chunks(e: Emitter, logits, count, settings, sums):
    """Only the sum of each whole chunk's weights, and of those of the rest (0 if there is none)."""
    chunks = e.div(count, CHUNK)
    rest = e.builder.and_(count, e.const(CHUNK - 1))

    def body(i):
        first = e.add(logits, e.mul(i, 4 * CHUNK))
        e.store(_sum_weights(e, first, e.const(CHUNK), settings), e.add(sums, e.mul(i, 8)))

    e.repeat(chunks, body)
    last = e.add(logits, e.mul(chunks, 4 * CHUNK))
    e.store(_sum_weights(e, last, rest, settings), e.add(sums, e.mul(chunks, 8)))


@kernel(4)
def sum_reaching(e: Emitter, weights, count, least_at, sums):
    """The sum of each whole chunk's weights that are at least a float64, and of the rest's (0 if there is none)."""
    b = e.builder
    least = e.load(least_at, F64)

    def over(width: int, first, times, total):
        wide = vector(F64, width)

        def step(i, state):
            found = e.load(e.add(first, e.mul(i, 8 * width)), wide)
            reaches = b.fcmp_ordered(">=", found, e.broadcast(least, width))
            return [b.fadd(state[0], b.select(reaches, found, e.constant(wide, 0.0)))]

        (sums,) = e.loop(times, [total], step)
        return e.reduce(sums, b.fadd)

    def body(i):
        first, nothing = e.add(weights, e.mul(i, 8 * CHUNK)), e.constant(vector(F64, e.lanes), 0.0)
        e.store(over(e.lanes, first, e.const(CHUNK // e.lanes), nothing), e.add(sums, e.mul(i, 8)))

    chunks = e.div(count, CHUNK)
    e.repeat(chunks, body)
    rest = over(
        1, e.add(weights, e.mul(chunks, 8 * CHUNK)), b.and_(count, e.const(CHUNK - 1)), e.constant(vector(F64, 1), 0.0)
    )
    e.store(rest, e.add(sums, e.mul(chunks, 8)))
