"""The inner loops of paged attention: scores, weights, weighted values, for each format of the KV cache.

They walk a *list* of pieces of K and V: ``width`` tokens of a block each (16, or the block size below that),
wherever their block lies. An entry of the list is four addresses::

    keys | scales of the keys | values | scales of the values       (scales: int8 only)

Whoever reads a list also asks for what the *next* list names, a cache line with every few instructions, so that
arithmetic and memory cost their maximum instead of their sum. A core that has too many lines on their way drops
such a request; therefore everything is asked for twice, the second time shortly before it is read.

float32 and int8 are computed as float32. With AVX-512 BF16, queries and weights are rounded to bfloat16 as K
and V are, and ``vdpbf16ps`` multiplies two components, or two tokens, at once; without it bfloat16 is widened.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from . import features, vector_math
from .elementwise import GROUP, float_argument, for_values
from .emit import F32, I8, I16, I32, I64, Emitter, kernel, vector
from .kv import ITEM_BYTES, TERMS, TOKENS

CHUNK = 256  # positions; a whole number of blocks, whose size is a power of two up to 256
ENTRY = 32  # bytes of an entry of a list
LINE = 64  # bytes of a cache line
NEAR = 3  # entries between the second request and the reading
KEYS, KEY_SCALES, VALUES, VALUE_SCALES = range(0, ENTRY, 8)  # their places in it


def tallest() -> int:
    """Rows of a kernel call: their sums, and an operand, must fit the vector registers."""
    return 12 if features.current().vector_bytes == 64 else 6


def _columns(height: int) -> int:
    """Groups of 16 values that ``height`` rows sum at once."""
    registers = 24 if features.current().vector_bytes == 64 else 6
    return max(1, min(4, registers // height))


def rounds_factors(dtype: str) -> bool:
    """Whether queries and weights become bfloat16, to be multiplied in pairs."""
    return dtype == "bfloat16" and features.current().has_bf16_dot


def _address(e: Emitter, entries, index, field: int):
    return e.load(e.add(entries, e.add(e.mul(index, ENTRY), field)), I64)


class _Format:
    """How one format is multiplied: ``terms`` values that lie together in memory, by as many factors."""

    def __init__(self, e: Emitter, dtype: str):
        self.e, self.dtype, self.terms = e, dtype, TERMS[dtype]
        self.bytes = ITEM_BYTES[dtype] * self.terms
        self.dot = rounds_factors(dtype)
        self.factor_bytes = 4 if self.dot else 4 * self.terms

    def values(self, address, count: int, only_first: bool = False) -> list:
        """``count`` lanes of values: a vector for each term, or one of pairs."""
        e, b = self.e, self.e.builder
        if self.dtype == "float32":
            return [e.load(address, vector(F32, count))]
        if self.dtype == "int8":
            return [e.to_float(b.sext(e.load(address, vector(I8, count)), vector(I32, count)))]
        words = e.load(address, vector(I32, count))
        if only_first:  # what comes beside it was never written
            words = b.and_(words, e.constant(words.type, 0xFFFF))
        return self.unpack(words)

    def unpack(self, words) -> list:
        """Pairs of bfloat16 as this CPU multiplies them."""
        e, b = self.e, self.e.builder
        if self.dot:
            return [words]
        floats = vector(F32, words.type.count)
        upper = b.and_(words, e.constant(words.type, -65536))
        return [e.bitcast(b.shl(words, e.constant(words.type, 16)), floats), e.bitcast(upper, floats)]

    def factors(self, address) -> list:
        """The factors at ``address``, as scalars."""
        if self.dot:
            return [self.e.load(address, I32)]
        return [self.e.load(self.e.add(address, 4 * term), F32) for term in range(self.terms)]

    def multiply_add(self, total, values: list, factors: list):
        """``total + values * factors``, term by term."""
        e, lanes = self.e, values[0].type.count
        if not self.dot:
            for value, factor in zip(values, factors, strict=True):
                total = e.fma(e.broadcast(factor, lanes), value, total)
            return total
        (words,) = values
        whole = _lanes(e, words, GROUP)
        return _lanes(e, e.dot_accumulate_bf16(_lanes(e, total, GROUP), whole, e.broadcast(factors[0], GROUP)), lanes)


def _lanes(e: Emitter, value, count: int):
    """The first ``count`` lanes; those that ``value`` lacks repeat the last."""
    have = value.type.count
    if have == count:
        return value
    chosen = ir.Constant(vector(I32, count), [min(lane, have - 1) for lane in range(count)])
    return e.builder.shuffle_vector(value, value, chosen)


@cache
def score_kernel(dtype: str):
    """``score(case, q, q_stride, dim, entries, count, ahead, last_ahead, scores)``.

    ``case`` is ``16 * width + height``: the scores of ``height`` rows with the ``width`` keys of each of
    ``count`` entries. Meanwhile the keys of the entries ``ahead``, up to ``last_ahead``, are asked for.
    ``q`` has the rows that :func:`query_kernel` made.
    """

    def emit(e: Emitter, height, width, q, q_stride, dim, entries, count, ahead, last_ahead, scores):
        format = _Format(e, dtype)
        steps = e.div(e.add(dim, format.terms - 1), format.terms)
        fours, rest = e.div(steps, 4), e.builder.and_(steps, e.const(3))
        stride = width * format.bytes  # of a step

        def entry(i):
            keys = _address(e, entries, i, KEYS)
            fetched = (
                _address(e, ahead, e.smaller(i, last_ahead), KEYS),
                _address(e, entries, e.smaller(e.add(i, NEAR), e.add(count, -1)), KEYS),
            )

            def step(n, totals):
                values = format.values(e.add(keys, e.mul(n, stride)), width)
                offset = e.mul(n, format.factor_bytes)
                places = [e.add(e.add(q, e.mul(q_stride, row)), offset) for row in range(height)]
                factors = [format.factors(place) for place in places]
                return [format.multiply_add(t, values, f) for t, f in zip(totals, factors, strict=True)]

            def four(n, totals):
                if width == TOKENS:
                    for start in fetched:
                        for line in range(0, 4 * stride, LINE):
                            e.prefetch(e.add(e.add(start, e.mul(n, 4 * stride)), line), 2)
                for j in range(4):
                    totals = step(e.add(e.mul(n, 4), j), totals)
                return totals

            totals = e.loop(fours, [e.constant(vector(F32, width), 0.0)] * height, four)
            totals = e.loop(rest, totals, lambda n, totals: step(e.add(e.mul(fours, 4), n), totals))
            for row, total in enumerate(totals):
                if dtype == "int8":
                    total = e.fmul(total, e.load(_address(e, entries, i, KEY_SCALES), vector(F32, width)))
                e.store(total, e.add(e.add(scores, 4 * CHUNK * row), e.mul(i, 4 * width)))

        e.repeat(count, entry)

    shapes = [(height, TOKENS) for height in range(1, tallest() + 1)] + [(1, width) for width in (1, 2, 4, 8)]

    @kernel(9)
    def score(e, case, *arguments):
        e.switch(case, {16 * w + h: lambda h=h, w=w: emit(e, h, w, *arguments) for h, w in shapes})

    return score


@cache
def weigh_kernel(dtype: str):
    """``weigh(case, p, entries, width, tokens, ahead, last_ahead, out, groups)``: ``out = p · V``.

    ``case`` is the number of rows, or 0: one row, of bfloat16 at a width of 1. ``tokens`` values, of entries
    with ``width`` tokens: ``out`` has rows of ``groups`` x 16, ``p`` rows of ``CHUNK`` as the softmax left them.
    Meanwhile the values of the entries ``ahead``, up to ``last_ahead``, are asked for.
    """
    value_bytes = ITEM_BYTES[dtype]

    def emit(e: Emitter, height, p, entries, width, tokens, ahead, last_ahead, out, groups):
        format, b = _Format(e, dtype), e.builder
        stride = e.mul(groups, GROUP * format.bytes)  # of a step: the tokens whose factors lie together
        full, rest = e.div(tokens, width), b.urem(tokens, width)
        last = e.div(e.add(tokens, -1), width)
        steps_of_entry, steps_of_rest = e.div(width, format.terms), e.div(rest, format.terms)

        def some_columns(first, columns):
            place = e.mul(first, GROUP * format.bytes)

            def steps(totals, i, first_step, count, only_first=False):
                """``count`` steps of entry ``i``."""
                start = e.add(_address(e, entries, i, VALUES), place)
                near = e.smaller(e.add(i, NEAR), last)
                fetched = (_address(e, ahead, e.smaller(i, last_ahead), VALUES), _address(e, entries, near, VALUES))
                scales = _address(e, entries, i, VALUE_SCALES)

                def step(n, totals):
                    n = e.add(n, first_step)
                    offset = e.mul(n, stride)
                    for piece in fetched:
                        for line in range(0, columns * GROUP * format.bytes, LINE):
                            e.prefetch(e.add(e.add(piece, e.add(place, offset)), line), 2)
                    values = [
                        format.values(e.add(e.add(start, offset), c * GROUP * format.bytes), GROUP, only_first)
                        for c in range(columns)
                    ]
                    if dtype == "int8":
                        scale = e.broadcast(e.load(e.add(scales, e.mul(n, 4)), F32), GROUP)
                        values = [[e.fmul(value, scale)] for (value,) in values]
                    return multiply_add(totals, e.add(e.mul(i, steps_of_entry), n), values)

                return e.loop(count, totals, step)

            def multiply_add(totals, step, values):
                """``values[column]`` times the factors of every row."""
                offset, result = e.mul(step, format.factor_bytes), []
                for row in range(height):
                    factors = format.factors(e.add(e.add(p, 4 * CHUNK * row), offset))
                    sums = totals[row * columns : (row + 1) * columns]
                    result += [format.multiply_add(t, v, factors) for t, v in zip(sums, values, strict=True)]
                return result

            totals = [e.constant(vector(F32, GROUP), 0.0)] * (height * columns)
            totals = e.loop(full, totals, lambda i, state: steps(state, i, 0, steps_of_entry))
            totals = e.loop(e.smaller(rest, e.const(1)), totals, lambda _, state: steps(state, full, 0, steps_of_rest))
            if format.terms == 2:
                odd = b.urem(rest, e.const(2))
                totals = e.loop(odd, totals, lambda _, state: steps(state, full, steps_of_rest, odd, only_first=True))
            for row in range(height):
                row_out = e.add(out, e.mul(e.add(first, e.mul(groups, row)), 4 * GROUP))
                for c in range(columns):
                    e.store(totals[row * columns + c], e.add(row_out, 4 * GROUP * c))

        columns = _columns(height)
        whole = e.div(groups, columns)
        e.repeat(whole, lambda i: some_columns(e.mul(i, columns), columns))
        if columns > 1:
            e.repeat(b.urem(groups, e.const(columns)), lambda i: some_columns(e.add(e.mul(whole, columns), i), 1))

    def emit_singles(e: Emitter, p, entries, width, tokens, ahead, last_ahead, out, groups):
        """Two entries of one token make a pair; ``tokens`` is even."""
        format, b = _Format(e, dtype), e.builder
        words = vector(I32, GROUP)

        def some_columns(group):
            def half(n, number):
                place = _address(e, entries, e.add(e.mul(n, 2), number), VALUES)
                return b.zext(e.load(e.add(place, e.mul(group, GROUP * value_bytes)), vector(I16, GROUP)), words)

            def pair(n, totals):
                both = b.or_(half(n, 0), b.shl(half(n, 1), e.constant(words, 16)))
                factors = format.factors(e.add(p, e.mul(n, format.factor_bytes)))
                return [format.multiply_add(totals[0], format.unpack(both), factors)]

            totals = e.loop(e.div(tokens, 2), [e.constant(vector(F32, GROUP), 0.0)], pair)
            e.store(totals[0], e.add(out, e.mul(group, 4 * GROUP)))

        e.repeat(groups, some_columns)

    @kernel(9)
    def weigh(e, case, *arguments):
        cases = {height: lambda height=height: emit(e, height, *arguments) for height in range(1, tallest() + 1)}
        if TERMS[dtype] == 2:
            cases[0] = lambda: emit_singles(e, *arguments)
        e.switch(case, cases)

    return weigh


@cache
def fetch_kernel(dtype: str):
    """``fetch(entries, first, last, key_bytes, value_bytes)``: ask for what these entries name, at once."""

    @kernel(5)
    def fetch(e, entries, first, last, key_bytes, value_bytes):
        def entry(i):
            for field, nbytes in ((KEYS, key_bytes), (VALUES, value_bytes)):
                start = _address(e, entries, e.add(first, i), field)
                lines = e.div(e.add(nbytes, LINE - 1), LINE)
                e.repeat(lines, lambda n, start=start: e.prefetch(e.add(start, e.mul(n, LINE)), 2))

        e.repeat(e.builder.sub(last, first), entry)

    return fetch


@cache
def softmax_kernel(dtype: str):
    """``softmax(scores, first_group, last_group, low, high, result, entries, last_entry, offset, lines)``.

    ``exp(score - max)`` in place for the indices ``[low, high)`` of a row, 0 for the others in the groups;
    as the factors that :func:`weigh_kernel` reads. The maximum and the sum, of the weights as they are
    rounded, go to ``result``; -inf and 0 if no index is visible. Meanwhile ``lines`` cache lines of each entry's
    values, from ``offset`` on, are asked for.
    """
    rounds = rounds_factors(dtype)
    exp = vector_math.short_exp if rounds else vector_math.exp
    lane_bytes = 2 if rounds else 4

    @kernel(10)
    def softmax(e, scores, first_group, last_group, low, high, result, entries, last_entry, offset, lines):
        b = e.builder
        values, integers = vector(F32, GROUP), vector(I32, GROUP)
        lanes = ir.Constant(integers, list(range(GROUP)))
        zero, hidden_score = e.constant(values, 0.0), e.constant(values, float("-inf"))
        # Groups [inner, outer) lie in [low, high) and need no mask.
        inner = e.div(e.add(e.larger(low, e.const(0)), GROUP - 1), GROUP)
        inner = e.smaller(e.larger(inner, first_group), last_group)
        outer = e.larger(e.smaller(e.div(e.larger(high, e.const(0)), GROUP), last_group), inner)
        low, high = (e.broadcast(b.trunc(index, I32), GROUP) for index in (low, high))

        def all_groups(state, body):
            """``state = body(group, state, hide)``; ``hide`` puts a value in the lanes that a row does not see."""
            for begin, end, has_edge in ((first_group, inner, True), (inner, outer, False), (outer, last_group, True)):

                def step(i, state, begin=begin, has_edge=has_edge):
                    group = e.add(begin, i)
                    if not has_edge:
                        return body(group, state, lambda shown, hidden: shown)
                    index = b.add(lanes, e.broadcast(b.trunc(e.mul(group, GROUP), I32), GROUP))
                    visible = b.and_(b.icmp_signed(">=", index, low), b.icmp_signed("<", index, high))
                    return body(group, state, lambda shown, hidden: b.select(visible, shown, hidden))

                state = e.loop(b.sub(end, begin), state, step)
            return state[0]

        def score_of(group):
            return e.load(e.add(scores, e.mul(group, 4 * GROUP)), values)

        def largest(group, state, hide):
            return [e.fmax(state[0], hide(score_of(group), hidden_score))]

        maximum = e.reduce(all_groups([hidden_score], largest), e.fmax)
        maximum_of_all = e.broadcast(maximum, GROUP)

        def exponentials(group, state, hide):
            piece = e.add(_address(e, entries, e.smaller(b.sub(group, first_group), last_entry), VALUES), offset)
            e.repeat(lines, lambda n: e.prefetch(e.add(piece, e.mul(n, LINE)), 2))
            weight = hide(exp(e, b.fsub(score_of(group), maximum_of_all)), zero)
            stored = weight
            if rounds:
                bits = round_to_bfloat16(e, weight)
                weight, stored = e.bitcast(bits, values), upper_halves(e, bits)
            e.store(stored, e.add(scores, e.mul(group, lane_bytes * GROUP)))
            return [e.fadd(state[0], weight)]

        sums = all_groups([zero], exponentials)
        e.store(maximum, result)
        e.store(e.reduce(sums, e.fadd), e.add(result, 4))

    return softmax


def round_to_bfloat16(e: Emitter, values):
    """The bits of float32 lanes rounded to the nearest bfloat16, ties away from 0; NaN stays NaN as long as
    its lower bits are not all set, which no operation makes of other numbers."""
    integers = vector(I32, values.type.count)
    bits = e.builder.add(e.bitcast(values, integers), e.constant(integers, 0x8000))
    return e.builder.and_(bits, e.constant(integers, -65536))


def upper_halves(e: Emitter, bits):
    """int16 lanes: the upper halves of int32 ones."""
    shifted = e.builder.lshr(bits, e.constant(bits.type, 16))
    return e.builder.trunc(shifted, vector(I16, bits.type.count))


@cache
def query_kernel(dtype: str):
    """``prepare(x, scale, out, count)``: a head's query times ``scale``, as the factors that the score reads."""
    rounds = rounds_factors(dtype)

    @kernel(4)
    def prepare(e, x, scale, out, count):
        scalar = float_argument(e, scale)

        def body(offset, type_):
            values = e.fmul(e.load(e.add(x, offset), type_), e.broadcast(scalar, type_.count))
            if rounds:
                e.store(upper_halves(e, round_to_bfloat16(e, values)), e.add(out, e.div(offset, 2)))
            else:
                e.store(values, e.add(out, offset))

        for_values(e, count, body)
        zero = ir.Constant(I16 if rounds else F32, 0)
        e.store(zero, e.add(out, e.mul(count, 2 if rounds else 4)))  # the partner of an odd last component

    return prepare
