"""How attention multiplies each format of the KV cache: the steps of its two products, as emitters.

In both products a vector of 16 values of K or V meets one factor of each row, a component of its query or the
weight of a token. A word of 32 bits holds ``terms`` values (see :mod:`~minipaged.ops.cpu.kv`), so a *step* takes
16 words and ``terms`` factors of each row::

    float32             1 value    fused multiply-add
    bfloat16            2 values   vdpbf16ps, the factors rounded to bfloat16 as well
    int8                4 values   vpdpbusd twice, the factors being integers of 16 bits: 256 * high + low
    bfloat16 and int8   widened to float32 where the CPU has no such instruction

Integers: a query is ``scale * (256 * high + low)`` with the largest component at 127 * 256; ``vpdpbusd`` takes
unsigned bytes by signed ones, and K is stored with 128 added, so the sums begin at -128 times those of the query.
The weights of a row, each times the scale of its token's V, are ``factor * (256 * high + low)``, unsigned.
16 bits keep small weights beside large ones, which 8 bits would round to 0. Sums are exact in 32 bits.
"""

from __future__ import annotations

from llvmlite import ir

from . import features
from .elementwise import GROUP
from .emit import F32, I8, I16, I32, Emitter, vector
from .kv import TERMS

WORDS = vector(I32, GROUP)
FLOATS = vector(F32, GROUP)
QUERY_TAIL = 16  # bytes after a query's factors: of integers -128 * sum(high), -128 * sum(low), scale
_LARGEST_QUERY, _LARGEST_WEIGHT = 127 * 256, 65535


def multiplies_integers(dtype: str) -> bool:
    """Whether int8 K and V meet integer factors."""
    return dtype == "int8" and features.current().has_vnni


def multiplies_pairs(dtype: str) -> bool:
    """Whether bfloat16 K and V meet bfloat16 factors."""
    return dtype == "bfloat16" and features.current().has_bf16_dot


def factor_bytes(dtype: str) -> int:
    """Bytes of a factor in memory."""
    return 2 if multiplies_integers(dtype) or multiplies_pairs(dtype) else 4


def format_of(e: Emitter, dtype: str) -> Widened:
    """The steps of a format, on this CPU."""
    if multiplies_integers(dtype):
        return Integers(e, dtype)
    return Pairs(e, dtype) if multiplies_pairs(dtype) else Widened(e, dtype)


class Widened:
    """Values become float32 and meet float32 factors, one term after the other."""

    num_sums = 1  # vectors that a row's sum needs

    def __init__(self, e: Emitter, dtype: str):
        self.e, self.dtype, self.terms = e, dtype, TERMS[dtype]
        self.step_bytes = self.terms * factor_bytes(dtype)  # of a row's factors

    # ---- both products

    def values(self, words) -> list:
        """The words of a step as they are multiplied."""
        e, b = self.e, self.e.builder
        floats = vector(F32, words.type.count)
        if self.dtype == "float32":
            return [e.bitcast(words, floats)]
        if self.dtype == "bfloat16":  # the upper half of a float32
            upper = b.and_(words, e.constant(words.type, -65536))
            return [e.bitcast(b.shl(words, e.constant(words.type, 16)), floats), e.bitcast(upper, floats)]
        shifted = [b.shl(words, e.constant(words.type, 24 - 8 * term)) for term in range(4)]
        return [e.to_float(b.ashr(term, e.constant(words.type, 24))) for term in shifted]

    def keys(self, words) -> list:
        """As :meth:`values`."""
        if self.dtype == "int8":  # stored with 128 added
            words = self.e.builder.xor(words, self.e.constant(words.type, -0x7F7F7F80))
        return self.values(words)

    def factors(self, address) -> list:
        """A row's factors of a step, as scalars."""
        return [self.e.load(self.e.add(address, 4 * term), F32) for term in range(self.terms)]

    def multiply_add(self, sums: list, values: list, factors: list) -> list:
        """The sums of a row, with a step added."""
        (total,) = sums
        for value, factor in zip(values, factors, strict=True):
            total = self.e.fma(self.e.broadcast(factor, value.type.count), value, total)
        return [total]

    # ---- queries and scores

    def store_query(self, x, scale, out, count) -> None:
        """The query of a head times ``scale`` as factors, at ``out``; zeros up to a multiple of 16."""

        def store(i, values, state):
            self._store_factors(values, out, i)

        self._for_groups(x, scale, count, store)

    def _for_groups(self, x, scale, count, body, state=()) -> list:
        """``state = body(group, values * scale, state)``, with zeros beyond ``count``; returns the last state."""
        e, b = self.e, self.e.builder
        lanes = ir.Constant(WORDS, list(range(GROUP)))

        def group(i, state):
            left = e.broadcast(b.trunc(b.sub(count, e.mul(i, GROUP)), I32), GROUP)
            values = e.fmul(e.load(e.add(x, e.mul(i, 4 * GROUP)), FLOATS), e.broadcast(scale, GROUP))
            values = b.select(b.icmp_signed("<", lanes, left), values, e.constant(FLOATS, 0.0))
            return body(i, values, state) or state

        return e.loop(e.div(e.add(count, GROUP - 1), GROUP), list(state), group)

    def _store_factors(self, values, out, group):
        """Store 16 factors; returns them as they are rounded."""
        self.e.store(values, self.e.add(out, self.e.mul(group, 4 * GROUP)))
        return values

    def first_sums(self, query_tail, lanes: int) -> list:
        """The sums of a row's scores before the first step."""
        return [self.e.constant(vector(F32, lanes), 0.0)]

    def score(self, sums: list, query_tail, key_scales):
        """The scores of a row; ``key_scales`` is the address of the tokens' (int8 only)."""
        (total,) = sums
        return self.e.fmul(total, self.e.load(key_scales, total.type)) if self.dtype == "int8" else total

    # ---- weights and weighted values

    def store_weights(self, weights, inverse, out, group):
        """Store the weights of 16 tokens as factors; returns them as they are rounded."""
        return self._store_factors(weights, out, group)

    def weight_factor(self, largest_scale):
        """What the weights are divided by before they are rounded, and its inverse; scalars."""
        return ir.Constant(F32, 1.0), ir.Constant(F32, 1.0)

    def no_sums(self) -> list:
        """The sums of weighted values before the first step."""
        return [self.e.constant(FLOATS, 0.0)]

    def weighted(self, sums: list, factor):
        """The weighted values of a row; ``factor`` is the address of the scalar that :meth:`weight_factor` gave."""
        return sums[0]


class Pairs(Widened):
    """bfloat16 by bfloat16."""

    def values(self, words) -> list:
        return [words]

    def factors(self, address) -> list:
        return [self.e.load(address, I32)]

    def multiply_add(self, sums: list, values: list, factors: list) -> list:
        e = self.e
        lanes = values[0].type.count
        words, total = (self._lanes(vector_, GROUP) for vector_ in (values[0], sums[0]))
        return [self._lanes(e.dot_accumulate_bf16(total, words, e.broadcast(factors[0], GROUP)), lanes)]

    def _lanes(self, value, count: int):
        """The first ``count`` lanes; those that ``value`` lacks repeat the last."""
        have = value.type.count
        if have == count:
            return value
        chosen = ir.Constant(vector(I32, count), [min(lane, have - 1) for lane in range(count)])
        return self.e.builder.shuffle_vector(value, value, chosen)

    def _store_factors(self, values, out, group):
        """Rounded to the nearest, ties away from 0; NaN stays NaN as long as its lower bits are not all set,
        which no operation makes of other numbers."""
        e, b = self.e, self.e.builder
        bits = b.add(e.bitcast(values, WORDS), e.constant(WORDS, 0x8000))
        halves = b.trunc(b.lshr(bits, e.constant(WORDS, 16)), vector(I16, GROUP))
        e.store(halves, e.add(out, e.mul(group, 2 * GROUP)))
        return e.bitcast(b.and_(bits, e.constant(WORDS, -65536)), FLOATS)


class Integers(Pairs):
    """int8 by integers of 16 bits, whose two bytes have a sum each."""

    num_sums = 2

    def __init__(self, e: Emitter, dtype: str):
        super().__init__(e, dtype)
        self.step_bytes = 8  # four high bytes, four low ones

    def keys(self, words) -> list:
        return [words]

    def factors(self, address) -> list:
        return [self.e.load(self.e.add(address, 4 * part), I32) for part in (0, 1)]

    def multiply_add(self, sums: list, values: list, factors: list) -> list:
        """Of V: weights are unsigned, values signed."""
        return self._multiply_add(sums, values, factors, lambda word, factor: (factor, word))

    def multiply_add_keys(self, sums: list, values: list, factors: list) -> list:
        """Of K: keys are unsigned, queries signed."""
        return self._multiply_add(sums, values, factors, lambda word, factor: (word, factor))

    def _multiply_add(self, sums, values, factors, order) -> list:
        e, lanes = self.e, values[0].type.count
        word = self._lanes(values[0], GROUP)
        result = []
        for total, factor in zip(sums, factors, strict=True):
            total = self._lanes(total, GROUP)
            operands = order(word, e.broadcast(factor, GROUP))
            result.append(self._lanes(e.dot_accumulate_u8_i8(total, *operands), lanes))
        return result

    def _store_integers(self, integers, high, out, group) -> None:
        """Four words of ``high`` bytes and the words of the low bytes, taking turns."""
        e, b = self.e, self.e.builder
        words = []
        for part in (high, integers):
            words.append(e.bitcast(b.trunc(part, vector(I8, GROUP)), vector(I32, 4)))
        turns = ir.Constant(vector(I32, 8), [0, 4, 1, 5, 2, 6, 3, 7])
        e.store(b.shuffle_vector(*words, turns), e.add(out, e.mul(group, 2 * GROUP)))

    def store_query(self, x, scale, out, count) -> None:
        e, b = self.e, self.e.builder
        magnitude = e.constant(WORDS, 0x7FFFFFFF)

        def larger(_, values, state):
            bits = b.and_(e.bitcast(values, WORDS), magnitude)  # magnitudes are ordered like their bits
            return [b.select(b.icmp_signed(">", bits, state[0]), bits, state[0])]

        bits = self._for_groups(x, scale, count, larger, [e.constant(WORDS, 0)])[0]
        bits = e.reduce(bits, lambda a, c: b.select(b.icmp_signed(">", a, c), a, c))
        largest, most = e.bitcast(bits, F32), ir.Constant(F32, float(_LARGEST_QUERY))
        is_finite = b.icmp_signed("<", bits, ir.Constant(I32, 0x7F800000))
        step = b.select(is_finite, b.fdiv(largest, most), ir.Constant(F32, float("nan")))
        is_large = b.and_(is_finite, b.fcmp_ordered(">", largest, ir.Constant(F32, 1e-30)))
        inverse = e.broadcast(b.select(is_large, b.fdiv(most, largest), ir.Constant(F32, 0.0)), GROUP)

        def store(i, values, state):
            finite = b.select(b.fcmp_ordered("ord", values, values), values, e.constant(FLOATS, 0.0))
            integers = b.fptosi(e.round_to_integer(e.fmul(finite, inverse)), WORDS)
            high = b.ashr(b.add(integers, e.constant(WORDS, 128)), e.constant(WORDS, 8))
            low = b.sub(integers, b.shl(high, e.constant(WORDS, 8)))
            self._store_integers(low, high, out, i)
            return [b.add(total, part) for total, part in zip(state, (high, low), strict=True)]

        sums = self._for_groups(x, scale, count, store, [e.constant(WORDS, 0)] * 2)
        tail = e.add(out, e.mul(e.div(e.add(count, GROUP - 1), GROUP), 2 * GROUP))
        for part, total in enumerate(sums):
            e.store(b.mul(e.reduce(total, b.add), ir.Constant(I32, -128)), e.add(tail, 4 * part))
        e.store(step, e.add(tail, 8))

    def first_sums(self, query_tail, lanes: int) -> list:
        return [self.e.broadcast(self.e.load(self.e.add(query_tail, 4 * part), I32), lanes) for part in (0, 1)]

    def _combined(self, sums: list):
        """float32 of ``256 * high + low``."""
        high, low = sums
        eight = self.e.constant(high.type, 8)
        return self.e.to_float(self.e.builder.add(self.e.builder.shl(high, eight), low))

    def score(self, sums: list, query_tail, key_scales):
        e, total = self.e, self._combined(sums)
        step = e.broadcast(e.load(e.add(query_tail, 8), F32), total.type.count)
        return e.fmul(total, e.fmul(e.load(key_scales, total.type), step))

    def weight_factor(self, largest_scale):
        b = self.e.builder
        most = ir.Constant(F32, float(_LARGEST_WEIGHT))
        is_positive = b.fcmp_ordered(">", largest_scale, ir.Constant(F32, 1e-30))
        inverse = b.select(is_positive, b.fdiv(most, largest_scale), ir.Constant(F32, 0.0))
        return b.fdiv(largest_scale, most), inverse

    def store_weights(self, weights, inverse, out, group):
        e, b = self.e, self.e.builder
        scaled = e.fmul(weights, e.broadcast(inverse, GROUP))
        finite = b.select(b.fcmp_ordered("ord", scaled, scaled), scaled, e.constant(FLOATS, 0.0))
        integers = b.fptosi(e.round_to_integer(finite), WORDS)
        self._store_integers(integers, b.lshr(integers, e.constant(WORDS, 8)), out, group)
        return weights

    def no_sums(self) -> list:
        return [self.e.constant(WORDS, 0)] * 2

    def weighted(self, sums: list, factor):
        return self.e.fmul(self._combined(sums), self.e.broadcast(self.e.load(factor, F32), GROUP))
