"""A mask of one bit a token, put to a row of logits: ``minipaged/sampling/masks.py`` in compiled passes.

Where few tokens may follow, only their words of 64 bits are taken apart and only their logits are read; else a row
is copied, masked and searched for its largest in one go, 16 bits at a time as the lanes of a selection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from minipaged.ops.sampling import few

from .calls import buffer, callable_of
from .compile_cache import c_function
from .emit import F32, I32, I64, Emitter, kernel, vector
from .logits import first_of_largest
from .memory import floats, ints64, unsigned8

_LANES = 16
_USUAL = 512  # room for the tokens of most masks
_BIT, _I8, _I16 = ir.IntType(1), ir.IntType(8), ir.IntType(16)


@kernel(5)
def _mask(e: Emitter, row, bits, count, out, index_at):
    """Copy ``count`` float32, minus infinity for those without a bit; the index of the largest (the first) goes
    to ``index_at`` as int32."""
    b = e.builder

    def chunk(width: int, first, best, best_index):
        values, indices = vector(F32, width), vector(I32, width)
        lanes = ir.Constant(indices, list(range(width)))
        nothing = e.constant(values, float("-inf"))

        def allowed(at):
            byte = e.add(bits, b.lshr(at, e.const(3)))
            if width == _LANES:
                return e.bitcast(e.load(byte, _I16), vector(_BIT, width))
            shifted = b.lshr(e.load(byte, _I8), b.trunc(b.and_(at, e.const(7)), _I8))
            return e.broadcast(b.trunc(shifted, _BIT), width)

        def step(i, state):
            at = e.add(first, e.mul(i, width))
            found = b.select(allowed(at), e.load(e.add(row, e.mul(at, 4)), values), nothing)
            e.store(found, e.add(out, e.mul(at, 4)))
            index = b.add(lanes, e.broadcast(b.trunc(at, I32), width))
            is_larger = b.fcmp_ordered(">", found, state[0])
            return [b.select(is_larger, found, state[0]), b.select(is_larger, index, state[1])]

        return step, [e.broadcast(part, width) for part in (best, best_index)]

    whole = e.div(count, _LANES)
    zero, lowest = ir.Constant(I32, 0), ir.Constant(F32, float("-inf"))
    step, state = chunk(_LANES, e.const(0), lowest, zero)
    best, index = e.loop(whole, state, step)
    largest, index = first_of_largest(e, best, index)
    step, state = chunk(1, e.mul(whole, _LANES), largest, index)
    rest = b.and_(count, e.const(_LANES - 1))
    _, index = (b.extract_element(part, zero) for part in e.loop(rest, state, step))
    e.store(index, index_at)


@cache
def mask_function() -> CFunc:
    """Compile ``mask(row, bits, count, out, index)``: addresses and a count."""

    @c_function("void(int64, int64, int64, int64, int64)", "mask-row")
    def mask(row, bits, count, out, index_at):
        _mask(row, bits, count, out, index_at)

    return mask


@cache
def _call(function: Callable[[], CFunc], signature: str) -> Callable:
    """What calls it from Python; made once."""
    return callable_of(function(), signature)


def mask_row(row: np.ndarray, bits: np.ndarray, out: np.ndarray) -> int:
    """As :func:`minipaged.sampling.masks.mask_row`; values of ``row`` and ``out`` must be neighbours in memory."""
    index = np.empty(1, np.int32)
    _call(mask_function, "void(*)(void *, void *, int64_t, void *, void *)")(
        buffer(row), buffer(bits), len(row), buffer(out), buffer(index)
    )
    return int(index[0])


@intrinsic
def _word(typing_context, address):
    """The 8 bytes at ``address``, of any alignment, as int64."""

    def codegen(context, builder, signature, arguments):
        word = builder.load(builder.inttoptr(arguments[0], I64.as_pointer()))
        word.align = 1
        return word

    return types.int64(types.int64), codegen


@intrinsic
def _count_bits(typing_context, word):
    return types.int64(types.int64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic
def _lowest_bit(typing_context, word):
    """The number of the lowest bit that is set; ``word`` is not 0."""
    no = ir.Constant(_BIT, 1)
    return types.int64(types.int64), lambda context, builder, signature, arguments: builder.cttz(arguments[0], no)


@cache
def few_function() -> CFunc:
    """Compile ``few(row, bits, count, limit, ids, logits)``: addresses, a count, and how many are no longer few.

    Returns how many bits are set; only if they are fewer than ``limit``, ids and logits are written.
    """

    @c_function("int64(int64, int64, int64, int64, int64, int64)", "few-allowed")
    def few_allowed(row, bits, count, limit, ids_at, logits_at):
        words = count // 64
        bytes_ = unsigned8(bits, (count + 7) // 8)
        total = 0
        for i in range(words):
            total += _count_bits(_word(bits + 8 * i))
        for at in range(64 * words, count):
            total += (bytes_[at >> 3] >> (at & 7)) & 1
        if total >= limit:
            return total
        source, ids, logits = floats(row, count), ints64(ids_at, limit), floats(logits_at, limit)
        found = 0
        for i in range(words):
            word = _word(bits + 8 * i)
            while word != 0:
                at = 64 * i + _lowest_bit(word)
                ids[found] = at
                logits[found] = source[at]
                found += 1
                word &= word - 1
        for at in range(64 * words, count):
            if (bytes_[at >> 3] >> (at & 7)) & 1:
                ids[found] = at
                logits[found] = source[at]
                found += 1
        return total

    return few_allowed


def few_allowed(row: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """As :func:`minipaged.sampling.masks.few_allowed`; values of ``row`` must be neighbours in memory."""
    count, limit = len(row), len(row) // 4
    for room in (min(limit, _USUAL), limit):
        ids, logits = np.empty(room, np.int64), np.empty(room, np.float32)
        found = _call(few_function, "int64_t(*)(void *, void *, int64_t, int64_t, void *, void *)")(
            buffer(row), buffer(bits), count, room, buffer(ids), buffer(logits)
        )
        if not few(found, count):
            return None
        if found < room:
            return ids[:found], logits[:found]
    raise AssertionError(f"{found} of {count} bits are few, but not fewer than {limit}")


@cache
def likeliest_allowed_function() -> CFunc:
    """Compile ``likeliest_allowed(row, bits, count)``: addresses and a count; returns an index, or -1."""

    @c_function("int64(int64, int64, int64)", "likeliest-allowed")
    def likeliest_allowed(row, bits, count):
        words = count // 64
        source, bytes_ = floats(row, count), unsigned8(bits, (count + 7) // 8)
        best, largest = -1, np.float32(0)
        for i in range(words):
            word = _word(bits + 8 * i)
            while word != 0:
                at = 64 * i + _lowest_bit(word)
                word &= word - 1
                if best < 0 or source[at] > largest:
                    best, largest = at, source[at]
        for at in range(64 * words, count):
            if (bytes_[at >> 3] >> (at & 7)) & 1 and (best < 0 or source[at] > largest):
                best, largest = at, source[at]
        return best

    return likeliest_allowed


def likeliest_allowed(row: np.ndarray, bits: np.ndarray) -> int:
    """As :func:`minipaged.sampling.masks.likeliest_allowed`; values of ``row`` must be neighbours in memory."""
    return _call(likeliest_allowed_function, "int64_t(*)(void *, void *, int64_t)")(buffer(row), buffer(bits), len(row))
