"""Exponential and its relatives on whole vectors, as emitters (see :mod:`~minipaged.ops.cpu.emit`).

Every function maps lane by lane, so a value never depends on its neighbours. NaN stays NaN.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import Emitter

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; the first has few bits: n * it is exact
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_SHORT = (4.127772e-2, 0.16753516, 0.50005116)  # least relative error for three: 5.4e-6
# erf as x * P(x²) / Q(x²) on |x| <= 3.8325, where float32 has reached ±1; the coefficients are Eigen's.
_ERF_LIMIT = 3.832506856900711
_ERF_P = (2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-7,
    2.3547966471313185e-5,
    1.0179625278914885e-3,
    1.4070470171167667e-2,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)


def clamp(e: Emitter, x: ir.Value, low: float, high: float) -> ir.Value:
    """``x`` within ``[low, high]``; NaN passes."""
    return e.fmin(e.constant(x.type, high), e.fmax(e.constant(x.type, low), x))


def polynomial(e: Emitter, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    """Horner's scheme, the highest power's coefficient first."""
    y = e.constant(x.type, coefficients[0])
    for c in coefficients[1:]:
        y = e.fma(y, x, e.constant(x.type, c))
    return y


def exp(e: Emitter, x: ir.Value) -> ir.Value:
    """``e**x`` within 2 units in the last place for ``x`` in [-87, 88]; beyond, the value at the limit.

    x = n ln 2 + r with an integer n; a polynomial in r (Cephes' ``expf``) is scaled by 2**n. ``exp(0)`` is exactly 1.
    """
    return _exp(e, clamp(e, x, -87.0, 88.0), _EXP)


def short_exp(e: Emitter, x: ir.Value) -> ir.Value:
    """``e**x`` within 6e-6 of it for ``x`` in [-87, 0], and at -87 below: for results that become bfloat16."""
    return _exp(e, e.fmax(e.constant(x.type, -87.0), x), _EXP_SHORT)


def _exp(e: Emitter, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    b = e.builder
    n = e.round_to_integer(b.fmul(x, e.constant(x.type, _LOG2_E)))
    r = e.fma(n, e.constant(x.type, -_LN2_HIGH), x)
    r = e.fma(n, e.constant(x.type, -_LN2_LOW), r)
    y = polynomial(e, r, coefficients)
    y = b.fadd(e.fma(y, b.fmul(r, r), r), e.constant(x.type, 1.0))
    return e.scale_by_power_of_two(y, n)


def tanh(e: Emitter, x: ir.Value) -> ir.Value:
    """``1 - 2 / (exp(2 x) + 1)``, within 2e-7."""
    b = e.builder
    one, two = e.constant(x.type, 1.0), e.constant(x.type, 2.0)
    return b.fsub(one, b.fdiv(two, b.fadd(exp(e, b.fmul(x, two)), one)))


def silu(e: Emitter, x: ir.Value) -> ir.Value:
    """``x / (1 + exp(-x))``."""
    b = e.builder
    return b.fdiv(x, b.fadd(e.constant(x.type, 1.0), exp(e, b.fsub(e.constant(x.type, 0.0), x))))


def gelu(e: Emitter, x: ir.Value) -> ir.Value:
    """``x / 2 * (1 + erf(x / sqrt 2))``."""
    b = e.builder
    z = clamp(e, b.fmul(x, e.constant(x.type, 0.7071067811865476)), -_ERF_LIMIT, _ERF_LIMIT)
    square = b.fmul(z, z)
    erf = b.fdiv(b.fmul(z, polynomial(e, square, _ERF_P)), polynomial(e, square, _ERF_Q))
    return b.fmul(b.fmul(x, e.constant(x.type, 0.5)), b.fadd(e.constant(x.type, 1.0), erf))


def gelu_tanh(e: Emitter, x: ir.Value) -> ir.Value:
    """The tanh approximation of gelu, which GPT-2 and Gemma were trained with."""
    b = e.builder
    cube = b.fmul(b.fmul(x, x), x)
    inner = b.fmul(e.fma(cube, e.constant(x.type, 0.044715), x), e.constant(x.type, 0.7978845608028654))
    return b.fmul(b.fmul(x, e.constant(x.type, 0.5)), b.fadd(e.constant(x.type, 1.0), tanh(e, inner)))
