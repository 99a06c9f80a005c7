"""Which entries of a row reach a threshold, as lists; and histograms, by which thresholds are found."""

from __future__ import annotations

from llvmlite import ir

from .emit import F32, F64, I32, I64, Emitter, kernel, vector
from .weights import CHUNK

_WORD = 64  # logits that are compared at once


@kernel(3)
def group_maxima(e: Emitter, logits, chunks, maxima):
    """The largest of every 16 logits of a chunk that lie 16 apart: 16 float32 for each of ``chunks``."""

    def body(i):
        first = e.add(logits, e.mul(i, 4 * CHUNK))
        rows = [e.load(e.add(first, 64 * j), vector(F32, 16)) for j in range(CHUNK // 16)]
        while len(rows) > 1:
            rows = [e.fmax(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        e.store(rows[0], e.add(maxima, e.mul(i, 64)))

    e.repeat(chunks, body)


@kernel(6)
def list_reaching(e: Emitter, logits, count, threshold_at, ids, listed, found_at):
    """List the logits that are at least a float32: int32 ids, ascending, and float32 ``listed``; how many: int64."""
    b = e.builder
    threshold, no = e.load(threshold_at, F32), ir.Constant(ir.IntType(1), 0)

    def take(at, found):
        e.store(b.trunc(at, I32), e.add(ids, e.mul(found, 4)))
        e.store(e.load(e.add(logits, e.mul(at, 4)), F32), e.add(listed, e.mul(found, 4)))

    def word(i, state):
        first, found = e.mul(i, _WORD), state[0]
        values = e.load(e.add(logits, e.mul(first, 4)), vector(F32, _WORD))
        bits = e.bitcast(b.fcmp_ordered(">=", values, e.broadcast(threshold, _WORD)), I64)

        def lowest(_, state):
            bits, found = state
            take(e.add(first, b.cttz(bits, no)), found)
            return [b.and_(bits, e.add(bits, -1)), e.add(found, 1)]

        with b.if_else(b.icmp_signed("==", bits, e.const(-1))) as (all_reach, some_reach):
            with all_reach:
                numbers = ir.Constant(vector(I32, _WORD), list(range(_WORD)))
                e.store(b.add(numbers, e.broadcast(b.trunc(first, I32), _WORD)), e.add(ids, e.mul(found, 4)))
                e.store(values, e.add(listed, e.mul(found, 4)))
            with some_reach:
                e.loop(b.ctpop(bits), [bits, found], lowest)
        return [e.add(found, b.ctpop(bits))]

    def single(i, state):
        at = e.add(first, i)
        take(at, state[0])
        reaches = b.fcmp_ordered(">=", e.load(e.add(logits, e.mul(at, 4)), F32), threshold)
        return [b.add(state[0], b.zext(reaches, I64))]

    words = e.div(count, _WORD)
    first = e.mul(words, _WORD)
    state = e.loop(words, [e.const(0)], word)
    e.store(e.loop(b.and_(count, e.const(_WORD - 1)), state, single)[0], found_at)


def _bucket(e: Emitter, weights, i, low, shift):
    weight = e.load(e.add(weights, e.mul(i, 8)), F64)
    return weight, e.builder.lshr(e.builder.sub(e.bitcast(weight, I64), low), shift)


@kernel(5)
def sum_buckets(e: Emitter, weights, count, low, shift, sums):
    """Add each of ``count`` float64, none negative, to the float64 of its bucket: ``(bits - low) >> shift``."""

    def body(i):
        weight, bucket = _bucket(e, weights, i, low, shift)
        at = e.add(sums, e.mul(bucket, 8))
        e.store(e.builder.fadd(e.load(at, F64), weight), at)

    e.repeat(count, body)


@kernel(6)
def list_bucket(e: Emitter, weights, count, low, shift, listed, found_at):
    """List the weights of bucket 0: float64 ``listed``, which may be ``weights``; how many: int64."""

    def step(i, state):
        weight, bucket = _bucket(e, weights, i, low, shift)
        e.store(weight, e.add(listed, e.mul(state[0], 8)))
        is_first = e.builder.icmp_unsigned("==", bucket, e.const(0))
        return [e.builder.add(state[0], e.builder.zext(is_first, I64))]

    e.store(e.loop(count, [e.const(0)], step)[0], found_at)
