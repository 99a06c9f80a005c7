"""The inner loops of paged attention: scores, softmax, weighted values.

They walk a *list* of pieces of K and V: ``width`` tokens of a block each (16, or the block size below that),
wherever their block lies. An entry of the list is four addresses::

    keys | scales of the keys | values | scales of the values       (scales: int8 only)

Whoever reads a list also asks for what the *next* list names, a cache line with every few instructions, so that
arithmetic and memory cost their maximum instead of their sum. A core that has too many lines on their way drops
such a request; therefore everything is asked for twice, the second time shortly before it is read.

What a step of the loops multiplies, and how, is a matter of the format:
:mod:`~minipaged.ops.cpu.attention_formats`.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from . import features, vector_math
from .attention_formats import FLOATS, QUERY_TAIL, WORDS, Integers, format_of, multiplies_pairs
from .elementwise import GROUP, float_argument
from .emit import I32, I64, Emitter, kernel, vector
from .kv import ITEM_BYTES, TERMS, TOKENS

CHUNK = 256  # positions; a whole number of blocks, whose size is a power of two up to 256
ENTRY = 32  # bytes of an entry of a list
LINE = 64  # bytes of a cache line
NEAR = 3  # entries between the second request and the reading
KEYS, KEY_SCALES, VALUES, VALUE_SCALES = range(0, ENTRY, 8)  # their places in it
RESULT = 16  # bytes of a row's results: maximum, sum, factor of the weights


def tallest() -> int:
    """Rows of a kernel call: their sums, and an operand, must fit the vector registers."""
    return 8 if features.current().vector_bytes == 64 else 6


def _columns(height: int, num_sums: int) -> int:
    """Groups of 16 values that ``height`` rows sum at once."""
    registers = 24 if features.current().vector_bytes == 64 else 6
    return max(1, min(4, registers // (height * num_sums)))


def _address(e: Emitter, entries, index, field: int):
    return e.load(e.add(entries, e.add(e.mul(index, ENTRY), field)), I64)


def _rows_of(sums: list, num_rows: int) -> list[list]:
    size = len(sums) // num_rows
    return [sums[size * row : size * (row + 1)] for row in range(num_rows)]


@cache
def query_kernel(dtype: str):
    """``prepare(x, scale, out, count)``: a head's query times ``scale``, as the factors that the score reads."""

    @kernel(4)
    def prepare(e, x, scale, out, count):
        format_of(e, dtype).store_query(x, float_argument(e, scale), out, count)

    return prepare


@cache
def score_kernel(dtype: str):
    """``score(case, q, q_stride, dim, entries, count, ahead, last_ahead, scores)``.

    ``case`` is ``16 * width + height``: the scores of ``height`` rows with the ``width`` keys of each of
    ``count`` entries. Meanwhile the keys of the entries ``ahead``, up to ``last_ahead``, are asked for.
    ``q`` has the rows that :func:`query_kernel` made.
    """

    def emit(e: Emitter, height, width, q, q_stride, dim, entries, count, ahead, last_ahead, scores):
        format = format_of(e, dtype)
        multiply_add = format.multiply_add_keys if isinstance(format, Integers) else format.multiply_add
        steps = e.div(e.add(dim, format.terms - 1), format.terms)
        fours, rest = e.div(steps, 4), e.builder.and_(steps, e.const(3))
        stride = 4 * width  # of a step
        tail = e.add(q_stride, -QUERY_TAIL)
        rows = [e.add(q, e.mul(q_stride, row)) for row in range(height)]

        def entry(i):
            keys = _address(e, entries, i, KEYS)
            sources = ((ahead, e.smaller(i, last_ahead)), (entries, e.smaller(e.add(i, NEAR), e.add(count, -1))))
            fetched = [_address(e, *source, KEYS) for source in sources]
            if dtype == "int8" and width == TOKENS:
                for source in sources:
                    for field in (KEY_SCALES, VALUE_SCALES):
                        e.prefetch(_address(e, *source, field), 2)

            def step(n, sums):
                values = format.keys(e.load(e.add(keys, e.mul(n, stride)), vector(I32, width)))
                offset = e.mul(n, format.step_bytes)
                result = []
                for row, total in zip(rows, _rows_of(sums, height), strict=True):
                    result += multiply_add(total, values, format.factors(e.add(row, offset)))
                return result

            def four(n, sums):
                if width == TOKENS:
                    for start in fetched:
                        for line in range(0, 4 * stride, LINE):
                            e.prefetch(e.add(e.add(start, e.mul(n, 4 * stride)), line), 2)
                for j in range(4):
                    sums = step(e.add(e.mul(n, 4), j), sums)
                return sums

            sums = [total for row in rows for total in format.first_sums(e.add(row, tail), width)]
            sums = e.loop(fours, sums, four)
            sums = e.loop(rest, sums, lambda n, sums: step(e.add(e.mul(fours, 4), n), sums))
            for number, (row, total) in enumerate(zip(rows, _rows_of(sums, height), strict=True)):
                score = format.score(total, e.add(row, tail), _address(e, entries, i, KEY_SCALES))
                e.store(score, e.add(e.add(scores, 4 * CHUNK * number), e.mul(i, 4 * width)))

        e.repeat(count, entry)

    shapes = [(height, TOKENS) for height in range(1, tallest() + 1)] + [(1, width) for width in (1, 2, 4, 8)]

    @kernel(9)
    def score(e, case, *arguments):
        e.switch(case, {16 * w + h: lambda h=h, w=w: emit(e, h, w, *arguments) for h, w in shapes})

    return score


@cache
def softmax_kernel(dtype: str):
    """``softmax(scores, first_group, last_group, low, high, result, scales, entries, last_entry, offset, lines)``.

    ``exp(score - max)`` for the indices ``[low, high)`` of a row, 0 for the others in the groups; times the
    ``scales`` of the tokens' values (int8), as factors in place of the scores. ``result`` gets the maximum, the sum
    of the weights, which is 0 if no index is visible, and the factor of the weighted values. Meanwhile ``lines``
    cache lines of each entry's values, from ``offset`` on, are asked for.
    """
    exp = vector_math.short_exp if multiplies_pairs(dtype) else vector_math.exp
    has_scales = dtype == "int8"

    @kernel(11)
    def softmax(e, scores, first_group, last_group, low, high, result, scales, entries, last_entry, offset, lines):
        b, format = e.builder, format_of(e, dtype)
        lanes = ir.Constant(WORDS, list(range(GROUP)))
        zero, hidden_score = e.constant(FLOATS, 0.0), e.constant(FLOATS, float("-inf"))
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
            return state

        def at(array, group):
            return e.load(e.add(array, e.mul(group, 4 * GROUP)), FLOATS)

        def largest(group, state, hide):
            maxima = [e.fmax(state[0], hide(at(scores, group), hidden_score))]
            if has_scales:  # the largest, and a sum that is NaN if one is not finite
                scale = hide(at(scales, group), zero)
                maxima += [e.fmax(state[1], scale), e.fma(scale, zero, state[2])]
            return maxima

        maxima = all_groups([hidden_score, zero, zero] if has_scales else [hidden_score], largest)
        maximum = e.reduce(maxima[0], e.fmax)
        maximum_of_all = e.broadcast(maximum, GROUP)
        factor, inverse = format.weight_factor(e.reduce(maxima[1], e.fmax) if has_scales else None)
        if has_scales:
            factor = b.fadd(factor, e.reduce(maxima[2], e.fadd))

        def exponentials(group, state, hide):
            piece = e.add(_address(e, entries, e.smaller(b.sub(group, first_group), last_entry), VALUES), offset)
            e.repeat(lines, lambda n: e.prefetch(e.add(piece, e.mul(n, LINE)), 2))
            weights = hide(exp(e, b.fsub(at(scores, group), maximum_of_all)), zero)
            if has_scales:
                format.store_weights(e.fmul(weights, hide(at(scales, group), zero)), inverse, scores, group)
            else:
                weights = format.store_weights(weights, inverse, scores, group)
            return [e.fadd(state[0], weights)]

        sums = all_groups([zero], exponentials)[0]
        for place, value in enumerate((maximum, e.reduce(sums, e.fadd), factor)):
            e.store(value, e.add(result, 4 * place))

    return softmax


@cache
def weigh_kernel(dtype: str):
    """``weigh(case, p, entries, width, tokens, ahead, last_ahead, out, groups, results)``: ``out = p · V``.

    ``case`` is the number of rows; or, with fewer tokens in an entry than terms in a word, ``-width`` for one row,
    and ``tokens`` is a multiple of the terms. ``tokens`` values, of entries with ``width`` tokens: ``out`` has rows
    of ``groups`` x 16, ``p`` rows of ``CHUNK`` and ``results`` the row's results as the softmax left them. Meanwhile
    the values of the entries ``ahead``, up to ``last_ahead``, are asked for.
    """
    terms = TERMS[dtype]

    def store(e, format, sums, result, place):
        e.store(format.weighted(sums, e.add(result, 8)), place)

    def emit(e: Emitter, height, p, entries, width, tokens, ahead, last_ahead, out, groups, results):
        format, b = format_of(e, dtype), e.builder
        stride = e.mul(groups, 4 * GROUP)  # of a step: the tokens whose factors lie together
        full, rest = e.div(tokens, width), b.urem(tokens, width)
        last = e.div(e.add(tokens, -1), width)
        # What was never written may be NaN in bfloat16: there a half word at the end is masked.
        masks_end = dtype == "bfloat16"
        steps_of_entry = e.div(width, terms)
        steps_of_rest = e.div(rest if masks_end else e.add(rest, terms - 1), terms)

        def some_columns(first, columns):
            place = e.mul(first, 4 * GROUP)

            def steps(sums, i, first_step, count, masks=False):
                """``count`` steps of entry ``i``."""
                start = e.add(_address(e, entries, i, VALUES), place)
                near = e.smaller(e.add(i, NEAR), last)
                fetched = (_address(e, ahead, e.smaller(i, last_ahead), VALUES), _address(e, entries, near, VALUES))

                def step(n, sums):
                    n = e.add(n, first_step)
                    offset = e.mul(n, stride)
                    for piece in fetched:
                        for column in range(columns):
                            e.prefetch(e.add(e.add(piece, e.add(place, offset)), column * LINE), 2)
                    values = []
                    for column in range(columns):
                        words = e.load(e.add(e.add(start, offset), column * 4 * GROUP), WORDS)
                        values.append(format.values(b.and_(words, e.constant(WORDS, 0xFFFF)) if masks else words))
                    return multiply_add(sums, e.add(e.mul(i, steps_of_entry), n), values)

                return e.loop(count, sums, step)

            def multiply_add(sums, step, values):
                """``values[column]`` times the factors of every row."""
                offset, result = e.mul(step, format.step_bytes), []
                for row, totals in enumerate(_rows_of(sums, height)):
                    factors = format.factors(e.add(e.add(p, 4 * CHUNK * row), offset))
                    for total, column in zip(_rows_of(totals, columns), values, strict=True):
                        result += format.multiply_add(total, column, factors)
                return result

            sums = format.no_sums() * (height * columns)
            sums = e.loop(full, sums, lambda i, state: steps(state, i, 0, steps_of_entry))
            sums = e.loop(e.smaller(rest, e.const(1)), sums, lambda _, state: steps(state, full, 0, steps_of_rest))
            if masks_end:
                odd = b.urem(rest, e.const(2))
                sums = e.loop(odd, sums, lambda _, state: steps(state, full, steps_of_rest, odd, masks=True))
            for row, totals in enumerate(_rows_of(sums, height)):
                row_out = e.add(out, e.mul(e.add(first, e.mul(groups, row)), 4 * GROUP))
                for column, total in enumerate(_rows_of(totals, columns)):
                    store(e, format, total, e.add(results, RESULT * row), e.add(row_out, 4 * GROUP * column))

        columns = _columns(height, format.num_sums)
        whole = e.div(groups, columns)
        e.repeat(whole, lambda i: some_columns(e.mul(i, columns), columns))
        if columns > 1:
            e.repeat(b.urem(groups, e.const(columns)), lambda i: some_columns(e.add(e.mul(whole, columns), i), 1))

    def emit_narrow(e: Emitter, width: int, p, entries, _, tokens, ahead, last_ahead, out, groups, results):
        """Words made of the values of several entries."""
        format, b = format_of(e, dtype), e.builder
        parts = terms // width
        bits = 8 * ITEM_BYTES[dtype] * width

        def some_columns(group):
            def word(n, sums):
                words = e.constant(WORDS, 0)
                for part in range(parts):
                    place = _address(e, entries, e.add(e.mul(n, parts), part), VALUES)
                    values = e.load(e.add(place, e.mul(group, GROUP * bits // 8)), vector(ir.IntType(bits), GROUP))
                    words = b.or_(words, b.shl(b.zext(values, WORDS), e.constant(WORDS, bits * part)))
                factors = format.factors(e.add(p, e.mul(n, format.step_bytes)))
                return format.multiply_add(sums, format.values(words), factors)

            sums = e.loop(e.div(tokens, terms), format.no_sums(), word)
            store(e, format, sums, results, e.add(out, e.mul(group, 4 * GROUP)))

        e.repeat(groups, some_columns)

    @kernel(10)
    def weigh(e, case, *arguments):
        cases = {height: lambda height=height: emit(e, height, *arguments) for height in range(1, tallest() + 1)}
        for width in (1, 2):
            if width < terms:
                cases[-width] = lambda width=width: emit_narrow(e, width, *arguments)
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
