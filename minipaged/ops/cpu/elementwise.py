"""Everything a layer does to one row at a time: norms, rope, activations, soft-caps, additions.

Rows are float32 at an address; each result depends on its own row alone. Plain loops where LLVM
vectorises them, emitted kernels where an exponential is in the way. The kernels work on groups of 16
values and may touch up to 15 values beyond the last: rows have that much room.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

from . import vector_math
from .emit import F32, I32, Emitter, kernel, vector
from .memory import compiled, float_bits, floats

GROUP = 16  # values of an emitted kernel's step; LLVM cuts them into the vectors that the CPU has
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

# A sum may be split over the lanes of a vector: that order is a function of the row's length alone.
_SUM = {"fastmath": {"reassoc", "nsz"}}


def float_argument(e: Emitter, bits: ir.Value) -> ir.Value:
    """The float32 that came as :func:`~minipaged.ops.cpu.memory.float_bits`, in all lanes of a group."""
    return e.broadcast(e.bitcast(e.builder.trunc(bits, I32), F32), GROUP)


@compiled(**_SUM)
def sum_of_squares(x):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return total


@compiled(**_SUM)
def sum_of(x):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total


@compiled
def rms_norm(x_address, weight_address, out_address, count, eps):
    """``x / sqrt(mean(x²) + eps) * weight`` (Zhang and Sennrich, 2019); ``out`` may be ``x``."""
    x, weight, out = floats(x_address, count), floats(weight_address, count), floats(out_address, count)
    factor = np.float32(1) / np.float32(math.sqrt(sum_of_squares(x) / np.float32(count) + eps))
    for i in range(count):
        out[i] = x[i] * factor * weight[i]


@compiled
def layer_norm(x_address, weight_address, bias_address, out_address, count, eps):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al., 2016); ``out`` may be ``x``; bias 0: none."""
    x, weight, out = floats(x_address, count), floats(weight_address, count), floats(out_address, count)
    mean = sum_of(x) / np.float32(count)
    for i in range(count):
        out[i] = x[i] - mean
    factor = np.float32(1) / np.float32(math.sqrt(sum_of_squares(out) / np.float32(count) + eps))
    for i in range(count):
        out[i] = out[i] * factor * weight[i]
    if bias_address:
        add(out_address, bias_address, count)


@compiled
def add(x_address, y_address, count):
    """``x += y``."""
    x, y = floats(x_address, count), floats(y_address, count)
    for i in range(count):
        x[i] += y[i]


@compiled
def scale(x_address, factor, count):
    """``x *= factor``."""
    x = floats(x_address, count)
    for i in range(count):
        x[i] *= factor


@compiled
def copy(x_address, out_address, count):
    """``out = x``."""
    x, out = floats(x_address, count), floats(out_address, count)
    for i in range(count):
        out[i] = x[i]


@compiled
def rope(x_address, cos_address, sin_address, half):
    """Rotate the pairs ``(x[i], x[i + half])`` by the angles with these cosines and sines (Su et al., 2021)."""
    first, second = floats(x_address, half), floats(x_address + 4 * half, half)
    cos, sin = floats(cos_address, half), floats(sin_address, half)
    for i in range(half):
        a, b = first[i], second[i]
        first[i] = a * cos[i] - b * sin[i]
        second[i] = b * cos[i] + a * sin[i]


@kernel(4)
def _activate(e, case, x, up, groups):
    """``x = activation(x)``, times ``up`` in the cases from 3 on."""
    values = vector(F32, GROUP)

    def body(function, gated):
        def group(i, state):
            offset = e.mul(i, 4 * GROUP)
            y = function(e, e.load(e.add(x, offset), values))
            if gated:
                y = e.fmul(y, e.load(e.add(up, offset), values))
            e.store(y, e.add(x, offset))
            return []

        return lambda: e.loop(groups, [], group)

    functions = [getattr(vector_math, name) for name in ACTIVATIONS]
    e.switch(case, {i + 3 * gated: body(f, gated) for i, f in enumerate(functions) for gated in (0, 1)})


@compiled
def activate(activation, gated, x_address, count):
    """``x[:count] = activation(x[:count])``, times ``x[count:2 * count]`` if ``gated`` (which is lost)."""
    _activate(activation + 3 * gated, x_address, x_address + 4 * count, (count + GROUP - 1) // GROUP)


@kernel(3)
def _soft_cap(e, x, cap_bits, groups):
    values = vector(F32, GROUP)
    cap = float_argument(e, cap_bits)

    def group(i, state):
        address = e.add(x, e.mul(i, 4 * GROUP))
        capped = vector_math.tanh(e, e.builder.fdiv(e.load(address, values), cap))
        e.store(e.fmul(capped, cap), address)
        return []

    e.loop(groups, [], group)


@compiled
def soft_cap(x_address, cap, count):
    """``x = cap * tanh(x / cap)``."""
    _soft_cap(x_address, float_bits(cap), (count + GROUP - 1) // GROUP)
