"""What the sampler asks of every row of logits, in one pass over them while the step still has them at hand."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from .emit import F32, I32, Emitter, kernel, vector

_LANES = 16
_EXPONENT, _MAGNITUDE = 0x7F800000, 0x7FFFFFFF


def first_of_largest(e: Emitter, values: ir.Value, indices: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The largest of float32 lanes, and the least of the int32 ``indices`` of those that equal it; scalars."""
    b = e.builder
    largest = e.reduce(values, e.fmax)
    is_largest = b.fcmp_ordered("==", values, e.broadcast(largest, values.type.count))
    indices = b.select(is_largest, indices, e.constant(indices.type, 0x7FFFFFFF))
    return largest, e.reduce(indices, lambda x, y: b.select(b.icmp_signed("<", x, y), x, y))


@kernel(4)
def examine_row(e: Emitter, row, count, index_at, largest_at):
    """Index of the largest of ``count`` float32 (the first, if several are), and the bits of the largest magnitude.

    Floats without their signs are ordered like their bits, and NaN and infinity stand above all others.
    """
    b = e.builder

    def chunk(width: int, first, best, best_index, magnitude):
        values, indices = vector(F32, width), vector(I32, width)
        lanes = ir.Constant(indices, list(range(width)))

        def step(i, state):
            at = e.add(first, e.mul(i, width))
            found = e.load(e.add(row, e.mul(at, 4)), values)
            index = b.add(lanes, e.broadcast(b.trunc(at, I32), width))
            is_larger = b.fcmp_ordered(">", found, state[0])
            bits = b.and_(e.bitcast(found, indices), e.constant(indices, _MAGNITUDE))
            return [
                b.select(is_larger, found, state[0]),
                b.select(is_larger, index, state[1]),
                b.select(b.icmp_signed(">", bits, state[2]), bits, state[2]),
            ]

        return step, [e.broadcast(part, width) for part in (best, best_index, magnitude)]

    whole = e.div(count, _LANES)
    zero, lowest = ir.Constant(I32, 0), ir.Constant(F32, float("-inf"))
    step, state = chunk(_LANES, e.const(0), lowest, zero, zero)
    best, index, magnitude = e.loop(whole, state, step)
    largest, index = first_of_largest(e, best, index)
    magnitude = e.reduce(magnitude, lambda x, y: b.select(b.icmp_signed(">", x, y), x, y))
    step, state = chunk(1, e.mul(whole, _LANES), largest, index, magnitude)
    rest = b.and_(count, e.const(_LANES - 1))
    _, index, magnitude = (b.extract_element(part, zero) for part in e.loop(rest, state, step))
    e.store(index, index_at)
    e.store(magnitude, largest_at)


def findings(found: np.ndarray) -> tuple[list[int], list[bool]]:
    """What :func:`examine_row` left for each row, as :func:`minipaged.sampling.sampler.examine` tells it.

    ``found``, int32 ``[2, rows]``: the indices, and the largest magnitudes.
    """
    likeliest, magnitudes = found.tolist()
    return likeliest, [magnitude >= _EXPONENT for magnitude in magnitudes]
