"""Integer, float, comparing and choosing instructions on the registers of all threads.

A binder looks up its operands once and returns a function of the mask; most are a NumPy ufunc that writes into
the destination register directly. Results are those that the PTX ISA defines; ``.approx`` instructions return
the correctly rounded result, which a card may miss by an ulp or two.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.toolchain.interpreter.program import Instruction, PTXError


def assign(machine, instruction: Instruction, function, type_: str | None = None):
    """``destination = function()`` where the mask says so."""
    target = machine.destination(instruction.operands[0], type_ or instruction.type)
    saturate = instruction.has("sat") and (type_ or instruction.type)[0] == "f"

    def execute(mask):
        value = function()
        if saturate:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
        np.copyto(target, value, where=mask, casting="unsafe")

    return execute


def _ufunc(operation, count: int = 2):
    """A binder of an instruction that is one NumPy ufunc of ``count`` operands."""

    def bind(machine, instruction):
        operands = machine.sources(instruction, *range(1, count + 1))
        if instruction.has("sat"):
            return assign(machine, instruction, lambda: operation(*operands))
        target = machine.destination(instruction.operands[0], instruction.type)
        return lambda mask: operation(*operands, out=target, where=mask)

    return bind


def _predicate_logic(operation, bind_integers):
    """``and``, ``or``, ``xor`` and ``not``, which work on predicates as well."""

    def bind(machine, instruction):
        if instruction.type != "pred":
            return bind_integers(machine, instruction)
        operands = [machine.predicate(operand) for operand in instruction.operands[1:]]
        return assign(machine, instruction, lambda: operation(*(operand() for operand in operands)))

    return bind


# Addition with carry, products


def bind_add(machine, instruction: Instruction):
    carry_in, carry_out = instruction.opcode == "addc", instruction.has("cc")
    if not carry_in and not carry_out:
        return _ufunc(np.add)(machine, instruction)
    unsigned = instruction.type.replace("s", "u")
    a, b = (machine.source(operand, unsigned) for operand in instruction.operands[1:3])
    return _add_with_carry(machine, instruction, lambda: (a, b), carry_in, carry_out)


def _add_with_carry(machine, instruction: Instruction, operands, carry_in: bool, carry_out: bool):
    """``destination = a + b (+ carry)`` in unsigned integers, keeping the carry if asked to."""
    target = machine.destination(instruction.operands[0], instruction.type.replace("s", "u"))

    def execute(mask):
        a, b = operands()
        total = a + b
        overflow = total < a
        if carry_in:
            total = total + machine.carry.astype(total.dtype)
            overflow = overflow | (machine.carry & (total == 0))
        np.copyto(target, total, where=mask)
        if carry_out:
            np.copyto(machine.carry, overflow, where=mask)

    return execute


def _wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(dtype.kind + str(2 * dtype.itemsize))


def _high_half(a, b) -> np.ndarray:
    """The upper half of the product of two integers of the same type."""
    if a.dtype.itemsize < 8:
        wide = _wide(a.dtype)
        return (a.astype(wide) * b.astype(wide) >> 8 * a.dtype.itemsize).astype(a.dtype)
    low, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & mask, x >> low, y & mask, y >> low
    middle = x1 * y0 + (x0 * y0 >> low)
    high = x1 * y1 + (middle >> low) + ((middle & mask) + x0 * y1 >> low)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def _product(instruction: Instruction, a, b):
    """The part of ``a * b`` that the modifiers name."""
    if instruction.has("wide"):
        wide = _wide(a.dtype)
        return a.astype(wide) * b.astype(wide)
    return _high_half(a, b) if instruction.has("hi") else a * b


def _result_type(instruction: Instruction) -> str:
    kind, bits = instruction.type[0], int(instruction.type[1:])
    return f"{kind}{2 * bits}" if instruction.has("wide") else instruction.type


def bind_mul(machine, instruction: Instruction):
    if instruction.type[0] == "f" or instruction.has("lo"):
        return _ufunc(np.multiply)(machine, instruction)
    a, b = machine.sources(instruction, 1, 2)
    return assign(machine, instruction, lambda: _product(instruction, a, b), _result_type(instruction))


def bind_mad(machine, instruction: Instruction):
    if instruction.type[0] == "f":
        return bind_fma(machine, instruction)
    a, b = machine.sources(instruction, 1, 2)
    type_ = _result_type(instruction)
    carry_in, carry_out = instruction.opcode == "madc", instruction.has("cc")
    if carry_in or carry_out:
        c = machine.source(instruction.operands[3], instruction.type.replace("s", "u"))
        operands = lambda: (_product(instruction, a, b).view(c.dtype), c)  # noqa: E731
        return _add_with_carry(machine, instruction, operands, carry_in, carry_out)
    c = machine.source(instruction.operands[3], type_)
    return assign(machine, instruction, lambda: _product(instruction, a, b) + c, type_)


def _fused(a, b, c) -> np.ndarray:
    """``a * b + c`` of float32, rounded once.

    The product is exact in float64, its sum with c is rounded there, and rounding again to float32 goes wrong only
    where that sum lies half way between two float32. There the sum's own error decides (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = np.atleast_1d(product + c)
    bits = total.view(np.int64)
    half_way = bits & 0x1FFFFFFF == 0x10000000
    tiny = (np.abs(total) < 2.0**-125) & (total != 0)  # float32 subnormals have their half ways elsewhere
    if half_way.any() or tiny.any():
        back = total - product  # the error of the sum, exactly (Knuth's TwoSum)
        error = (product - (total - back)) + (c - back)
        to_odd = (error != 0) & (bits & 1 == 0) & np.isfinite(total) & (half_way | tiny)
        bits[to_odd] += np.where((error > 0) == (total > 0), 1, -1)[to_odd]
    return total.astype(np.float32)


def bind_fma(machine, instruction: Instruction):
    if instruction.type not in ("f32", "f64") or not instruction.has("rn"):
        if instruction.type != "f32" or not {"rm", "rp", "rz"} & set(instruction.modifiers):
            raise PTXError(f"the interpreter does not know: {instruction.text}")
    a, b, c = machine.sources(instruction, 1, 2, 3)
    if instruction.type == "f64":
        wide = np.longdouble
        return assign(
            machine, instruction, lambda: (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float64)
        )
    if instruction.has("rn"):
        return assign(machine, instruction, lambda: _fused(a, b, c))
    return assign(machine, instruction, lambda: _directed(instruction, a, b, c))


def _directed(instruction: Instruction, a, b, c) -> np.ndarray:
    """A float32 fused multiply-add rounded down, up or towards zero."""
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    value = exact.astype(np.float32)
    if instruction.has("rm"):
        return np.where(value > exact, np.nextafter(value, np.float32(-np.inf)), value)
    if instruction.has("rp"):
        return np.where(value < exact, np.nextafter(value, np.float32(np.inf)), value)
    return np.where(np.abs(value) > np.abs(exact), np.nextafter(value, np.float32(0)), value)


# Quotients


def _truncated_quotient(a, b):
    """Integer division towards zero; by zero it gives what shows: all ones."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * divisor != a))
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def bind_div(machine, instruction: Instruction):
    if instruction.type[0] == "f":
        return _ufunc(np.divide)(machine, instruction)
    a, b = machine.sources(instruction, 1, 2)
    return assign(machine, instruction, lambda: _truncated_quotient(a, b))


def bind_rem(machine, instruction: Instruction):
    a, b = machine.sources(instruction, 1, 2)
    return assign(machine, instruction, lambda: a - _truncated_quotient(a, b) * b)


# Floats


def _float_function(function):
    """A unary float instruction, computed in float64 and rounded to its own type."""

    def bind(machine, instruction):
        (a,) = machine.sources(instruction, 1)
        flush = instruction.has("ftz")
        tiny = np.float32(2.0**-126)

        def evaluate():
            x = a.astype(np.float64)
            if flush:
                x = np.where(np.abs(x) < tiny, np.copysign(0.0, x), x)
            result = function(x).astype(a.dtype)
            return np.where(np.abs(result) < tiny, np.copysign(a.dtype.type(0), result), result) if flush else result

        return assign(machine, instruction, evaluate)

    return bind


def _minimum_or_maximum(integers, floats, floats_with_nan):
    """Of a number and a NaN, floats give the number, or with ``.NaN`` the NaN."""

    def bind(machine, instruction):
        if instruction.type[0] != "f":
            return _ufunc(integers)(machine, instruction)
        return _ufunc(floats_with_nan if instruction.has("NaN") else floats)(machine, instruction)

    return bind


def bind_test_property(machine, instruction: Instruction):
    (a,) = machine.sources(instruction, 1)
    tests = {"infinite": np.isinf, "finite": np.isfinite, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    test = tests[instruction.modifiers[0]]
    return assign(machine, instruction, lambda: test(a), "pred")


def bind_copy_sign(machine, instruction: Instruction):
    sign, value = machine.sources(instruction, 1, 2)
    return assign(machine, instruction, lambda: np.copysign(value, sign))


# Comparisons and choices

_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def _comparison(name: str, type_: str):
    """The function of two operands; of floats, a name that ends in u is true for NaN as well."""
    if type_[0] != "f":
        return _COMPARISONS[_UNSIGNED_NAMES.get(name, name)]
    if name in ("num", "nan"):
        unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name == "equ":
        return lambda a, b: ~((a < b) | (a > b))
    if name == "neu":
        return np.not_equal
    if name.endswith("u"):
        opposite = _COMPARISONS[_OPPOSITE[name[:-1]]]
        return lambda a, b: ~opposite(a, b)
    return _COMPARISONS[name]


def bind_set_predicate(machine, instruction: Instruction):
    """``setp.compare(.and|.or|.xor).type p|q, a, b(, c)``: q is the comparison's opposite, combined alike."""
    a, b = machine.sources(instruction, 1, 2)
    compare = _comparison(instruction.modifiers[0], instruction.type)
    names = instruction.operands[0].split("|")
    targets = [machine.destination(name.strip(), "pred") for name in names]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(instruction.modifiers[1])
    other = machine.predicate(instruction.operands[3]) if combine else None

    def execute(mask):
        result = compare(a, b)
        for target, value in zip(targets, (result, ~result), strict=False):
            np.copyto(target, combine(value, other()) if combine else value, where=mask)

    return execute


def bind_select(machine, instruction: Instruction):
    a, b = machine.sources(instruction, 1, 2)
    condition = machine.predicate(instruction.operands[3])

    def select():
        chosen = condition()
        machine.counters.taken[instruction.index] += np.count_nonzero(chosen & machine.active)
        return np.where(chosen, a, b)

    return assign(machine, instruction, select)


def bind_select_by_sign(machine, instruction: Instruction):
    type_ = instruction.modifiers[-2]
    a, b = (machine.source(operand, type_) for operand in instruction.operands[1:3])
    (sign,) = machine.sources(instruction, 3)
    return assign(machine, instruction, lambda: np.where(sign >= 0, a, b), type_)


BINDERS = {
    "add": bind_add,
    "addc": bind_add,
    "sub": _ufunc(np.subtract),
    "mul": bind_mul,
    "mad": bind_mad,
    "madc": bind_mad,
    "fma": bind_fma,
    "div": bind_div,
    "rem": bind_rem,
    "min": _minimum_or_maximum(np.minimum, np.fmin, np.minimum),
    "max": _minimum_or_maximum(np.maximum, np.fmax, np.maximum),
    "neg": _ufunc(np.negative, 1),
    "abs": _ufunc(np.absolute, 1),
    "and": _predicate_logic(np.logical_and, _ufunc(np.bitwise_and)),
    "or": _predicate_logic(np.logical_or, _ufunc(np.bitwise_or)),
    "xor": _predicate_logic(np.logical_xor, _ufunc(np.bitwise_xor)),
    "not": _predicate_logic(np.logical_not, _ufunc(np.invert, 1)),
    "ex2": _float_function(np.exp2),
    "lg2": _float_function(np.log2),
    "rcp": _float_function(lambda x: 1 / x),
    "sqrt": _float_function(np.sqrt),
    "rsqrt": _float_function(lambda x: 1 / np.sqrt(x)),
    "sin": _float_function(np.sin),
    "cos": _float_function(np.cos),
    "tanh": _float_function(np.tanh),
    "testp": bind_test_property,
    "copysign": bind_copy_sign,
    "setp": bind_set_predicate,
    "selp": bind_select,
    "slct": bind_select_by_sign,
}
