"""Paged attention: causal, grouped heads, sliding windows, soft-caps; KV in float32, bfloat16 or int8.

The work is cut into *items*: one KV head of one *tile*, which is a few consecutive queries of one
sequence (one when decoding). All query heads that share the KV head go through together, so K and V
are read once for the ``rows`` = queries x heads of an item. The context is walked in chunks of 256
positions, counted from position 0 (Rabe and Staats, 2021; Dao et al., 2022)::

    for each chunk:   scores = q · K      16 keys side by side: a multiply-add of 16 scores per component
                      p = exp(scores - max), 0 where a row does not see; sum
                      part = p · V        the tokens in order
                      rows = rows and part, each scaled to the larger maximum

Why a row's result does not depend on its company, bit for bit: a score is one chain of multiply-adds
over the components, whatever the tile or the block size; sums run over lanes ``position % 16``; tokens
that a row does not see add exact zeros; chunks are fixed by position and combined in order.
"""

from __future__ import annotations

import math
from functools import cache

from llvmlite import ir
from numba.core.ccallback import CFunc

from . import vector_math
from .compile_cache import c_function
from .elementwise import GROUP, blend, clear, copy, divide, scale, soft_cap
from .emit import F32, I8, I16, I32, I64, Emitter, kernel, vector
from .kv import ITEM_BYTES, TOKENS
from .memory import compiled, float_bits, floats, ints32, part_of_caller
from .phases import PHASE_SIGNATURE, layer_at, model_at

CHUNK = 256  # positions; a whole number of blocks, whose size is a power of two up to 256
TALLEST = 6  # rows of a kernel: 6 x 16 scores fill 12 vectors of AVX2
ROWS = 48  # rows that a tile should have: enough that reading K and V costs little


def queries_per_tile(heads_per_kv_head: int) -> int:
    """Consecutive queries of a sequence that one tile takes."""
    return max(1, ROWS // heads_per_kv_head)


def scratch_bytes(heads_per_kv_head: int, head_dim: int, padded_dim: int) -> int:
    """Working memory of a thread."""
    rows = queries_per_tile(heads_per_kv_head) * heads_per_kv_head
    return 4 * rows * (head_dim + CHUNK + 2 * padded_dim + 4) + 4096


def load_values(e: Emitter, dtype: str, address: ir.Value, count: int) -> ir.Value:
    """``count`` stored values as float32 (of ``int8`` without the scale)."""
    if dtype == "float32":
        return e.load(address, vector(F32, count))
    wide = vector(I32, count)
    if dtype == "bfloat16":  # the upper half of a float32
        bits = e.builder.zext(e.load(address, vector(I16, count)), wide)
        return e.bitcast(e.builder.shl(bits, e.constant(wide, 16)), vector(F32, count))
    return e.to_float(e.builder.sext(e.load(address, vector(I8, count)), wide))


def _score_kernel(dtype: str, item_bytes: int):
    """``score(case, q, q_stride, keys, dim, scales, scores, next_keys, values)``.

    ``case`` is ``8 * width + height``: scores of ``height`` rows with ``width`` keys. Meanwhile the
    memory at ``next_keys`` and ``values``, as much as the keys take, is fetched into the L2 cache.
    """

    def emit(e: Emitter, height, width, q, q_stride, keys, dim, scales, scores, next_keys, values):
        def component(i, totals):
            key = load_values(e, dtype, e.add(keys, e.mul(i, width * item_bytes)), width)
            offset = e.mul(i, 4)
            factors = [e.load(e.add(e.add(q, e.mul(q_stride, row)), offset), F32) for row in range(height)]
            return [e.fma(e.broadcast(f, width), key, t) for f, t in zip(factors, totals, strict=True)]

        def four(i, totals):
            if width == TOKENS:
                for ahead in (next_keys, values):
                    start = e.add(ahead, e.mul(i, 4 * width * item_bytes))
                    for line in range(0, 4 * width * item_bytes, 64):
                        e.prefetch(e.add(start, line), 2)
            for j in range(4):
                totals = component(e.add(e.mul(i, 4), j), totals)
            return totals

        fours = e.div(dim, 4)
        totals = e.loop(fours, [e.constant(vector(F32, width), 0.0)] * height, four)
        rest = e.builder.and_(dim, e.const(3))
        totals = e.loop(rest, totals, lambda i, state: component(e.add(e.mul(fours, 4), i), state))
        for row, total in enumerate(totals):
            if dtype == "int8":
                total = e.fmul(total, e.load(scales, vector(F32, width)))
            e.store(total, e.add(scores, 4 * CHUNK * row))

    shapes = [(height, TOKENS) for height in range(1, TALLEST + 1)] + [(1, width) for width in (1, 2, 4, 8)]

    @kernel(9)
    def score(e, case, *arguments):
        e.switch(case, {8 * w + h: lambda h=h, w=w: emit(e, h, w, *arguments) for h, w in shapes})

    return score


def _weigh_kernel(dtype: str, item_bytes: int):
    """``weigh(height, p, values, count, scales, out, groups, ahead)``: ``out += p[:count] · V`` for ``height`` rows.

    ``out`` has rows of ``groups`` x 16 values, as V has; ``p`` rows of ``CHUNK``. Meanwhile as much memory
    as the values take is fetched into the L2 cache from ``ahead``.
    """

    def emit(e: Emitter, height, p, values, count, scales, out, groups, ahead):
        stride = e.mul(groups, GROUP * item_bytes)

        def group(g, state):
            column = e.add(values, e.mul(g, GROUP * item_bytes))
            fetched = e.add(ahead, e.builder.mul(e.mul(g, GROUP * item_bytes), count))
            places = [
                e.add(e.add(out, e.mul(g, 4 * GROUP)), e.mul(groups, 4 * GROUP * row)) for row in range(height)
            ]

            def token(t, totals):
                e.prefetch(e.add(fetched, e.mul(t, GROUP * item_bytes)), 2)
                value = load_values(e, dtype, e.add(column, e.builder.mul(t, stride)), GROUP)
                offset = e.mul(t, 4)
                result = []
                for row, total in enumerate(totals):
                    weight = e.load(e.add(e.add(p, 4 * CHUNK * row), offset), F32)
                    if dtype == "int8":
                        weight = e.fmul(weight, e.load(e.add(scales, offset), F32))
                    result.append(e.fma(e.broadcast(weight, GROUP), value, total))
                return result

            totals = e.loop(count, [e.load(place, vector(F32, GROUP)) for place in places], token)
            for total, place in zip(totals, places, strict=True):
                e.store(total, place)
            return []

        e.loop(groups, [], group)

    @kernel(8)
    def weigh(e, height, *arguments):
        e.switch(height, {h: lambda h=h: emit(e, h, *arguments) for h in range(1, TALLEST + 1)})

    return weigh


@kernel(6)
def _softmax(e, scores, first_group, last_group, low, high, result):
    """``exp(score - max)`` in place for the indices ``[low, high)`` of a row, 0 for the others in the groups.

    The maximum and the sum go to ``result``; -inf and 0 if no index is visible.
    """
    b = e.builder
    values, indices = vector(F32, GROUP), vector(I64, GROUP)
    lanes = ir.Constant(indices, list(range(GROUP)))
    low, high = e.broadcast(low, GROUP), e.broadcast(high, GROUP)
    hidden_score = e.constant(values, float("-inf"))
    count = b.sub(last_group, first_group)

    def at(i):
        group = b.add(first_group, i)
        index = b.add(lanes, e.broadcast(e.mul(group, GROUP), GROUP))
        visible = b.and_(b.icmp_signed(">=", index, low), b.icmp_signed("<", index, high))
        return e.add(scores, e.mul(group, 4 * GROUP)), visible

    def largest(i, state):
        address, visible = at(i)
        return [e.fmax(state[0], b.select(visible, e.load(address, values), hidden_score))]

    maxima = e.loop(count, [hidden_score], largest)[0]
    maximum = e.reduce(maxima, e.fmax)
    maximum_of_all = e.broadcast(maximum, GROUP)

    def exponentials(i, state):
        address, visible = at(i)
        weight = vector_math.exp(e, b.fsub(e.load(address, values), maximum_of_all))
        weight = b.select(visible, weight, e.constant(values, 0.0))
        e.store(weight, address)
        return [e.fadd(state[0], weight)]

    sums = e.loop(count, [e.constant(values, 0.0)], exponentials)[0]
    e.store(maximum, result)
    e.store(e.reduce(sums, e.fadd), e.add(result, 4))


@part_of_caller
def _combine(rows, padded_dim, part, part_result, total, total_result):
    """Fold a chunk's weighted values into those of the chunks before it."""
    for row in range(rows):
        new, old = floats(part_result + 8 * row, 2), floats(total_result + 8 * row, 2)
        x, y = total + 4 * padded_dim * row, part + 4 * padded_dim * row
        if new[1] == 0:  # the row sees nothing of this chunk
            continue
        if old[1] == 0:
            old[0], old[1] = new[0], new[1]
            copy(y, x, padded_dim)
            continue
        maximum = max(old[0], new[0])
        old_factor, new_factor = math.exp(old[0] - maximum), math.exp(new[0] - maximum)
        blend(x, float_bits(old_factor), y, float_bits(new_factor), padded_dim)
        old[0], old[1] = maximum, old[1] * old_factor + new[1] * new_factor


@compiled
def _height(rows_left):
    """Rows of the next kernel call: an even division into kernels of at most TALLEST."""
    calls = (rows_left + TALLEST - 1) // TALLEST
    return (rows_left + calls - 1) // calls


@cache
def attention_phase(dtype: str) -> CFunc:
    """The phase that computes item ``index``: KV head ``index % num_kv_heads`` of tile ``index // num_kv_heads``."""
    item_bytes = ITEM_BYTES[dtype]
    score, weigh = _score_kernel(dtype, item_bytes), _weigh_kernel(dtype, item_bytes)

    @c_function(PHASE_SIGNATURE, f"attention-{dtype}")
    def attend(model_address, layer_address, linears, index, thread, num_threads):
        model, layer = model_at(model_address), layer_at(layer_address)
        dim, padded_dim, block_size = model.head_dim, model.padded_dim, model.block_size
        heads = model.num_heads // model.num_kv_heads
        kv_head = index % model.num_kv_heads
        entry = ints32(model.tiles + 16 * (index // model.num_kv_heads), 4)
        sequence, first_row, num_queries, first_position = entry[0], entry[1], entry[2], entry[3]
        rows = num_queries * heads
        # Working memory: queries, scores, a chunk's weighted values and theirs so far, (max, sum) of both.
        q = model.scratch + thread * model.scratch_bytes
        scores = q + 4 * rows * dim
        part = scores + 4 * rows * CHUNK
        total = part + 4 * rows * padded_dim
        part_result = total + 4 * rows * padded_dim
        total_result = part_result + 8 * rows
        for query in range(num_queries):
            source = model.qkv + (first_row + query) * model.qkv_stride + 4 * kv_head * heads * dim
            scale(source, float_bits(model.attention_scale), q + 4 * query * heads * dim, heads * dim)
        clear(total_result, 2 * rows)

        window = layer.window
        end = first_position + num_queries
        begin = max(0, first_position - window + 1) if window else 0
        block_table = ints32(model.block_tables + sequence * model.block_table_stride, end)
        k_head, v_head = kv_head * model.k_bytes, model.num_kv_heads * model.k_bytes + kv_head * model.v_bytes
        width = min(block_size, TOKENS)
        coming = min(index + num_threads, model.num_tiles * model.num_kv_heads - 1)  # probably this thread's next item
        coming_head = coming % model.num_kv_heads * model.k_bytes
        coming_entry = ints32(model.tiles + 16 * (coming // model.num_kv_heads), 4)
        coming_end = coming_entry[3] + coming_entry[2]
        coming_begin = max(0, coming_entry[3] - window + 1) if window else 0
        coming_blocks = ints32(model.block_tables + coming_entry[0] * model.block_table_stride, coming_end)
        for chunk in range(begin // CHUNK, (end - 1) // CHUNK + 1):
            origin = chunk * CHUNK
            first_block = max(origin, begin) // block_size
            last = min(origin + CHUNK, end)
            last_block = (last + block_size - 1) // block_size
            for number in range(first_block, last_block):
                block = layer.cache + block_table[number] * model.block_bytes
                following = layer.cache + block_table[min(number + 1, last_block - 1)] * model.block_bytes
                position = number * block_size
                for token in range(0, min(block_size, last - position), width):
                    keys = block + k_head + token * dim * item_bytes
                    next_keys = keys + width * dim * item_bytes if token + width < block_size else following + k_head
                    row = 0
                    while row < rows:
                        height = _height(rows - row) if width == TOKENS else 1
                        score(
                            8 * width + height,
                            q + 4 * row * dim,
                            4 * dim,
                            keys,
                            dim,
                            block + k_head + block_size * dim * item_bytes + 4 * token,
                            scores + 4 * (row * CHUNK + position + token - origin),
                            next_keys,
                            block + v_head + token * padded_dim * item_bytes,
                        )
                        row += height

            first_group = (first_block * block_size - origin) // GROUP
            last_group = (last - origin + GROUP - 1) // GROUP
            for row in range(rows):
                position = first_position + row // heads
                low = max(0, position - window + 1) if window else 0
                row_scores = scores + 4 * row * CHUNK
                if model.attention_soft_cap > 0:
                    soft_cap(
                        row_scores + 4 * GROUP * first_group,
                        float_bits(model.attention_soft_cap),
                        GROUP * (last_group - first_group),
                    )
                _softmax(
                    row_scores, first_group, last_group, low - origin, position + 1 - origin, part_result + 8 * row
                )

            clear(part, rows * padded_dim)
            for number in range(first_block, last_block):
                values = layer.cache + block_table[number] * model.block_bytes + v_head
                position = number * block_size
                if last < end:  # the keys of the next chunk, or item, come while the values of this one are read
                    ahead_number = min(number + CHUNK // block_size, (end - 1) // block_size)
                    ahead = layer.cache + block_table[ahead_number] * model.block_bytes + k_head
                else:
                    ahead_number = coming_begin // block_size + number - first_block
                    ahead_number = min(ahead_number, (coming_end - 1) // block_size)
                    ahead = layer.cache + coming_blocks[ahead_number] * model.block_bytes + coming_head
                row = 0
                while row < rows:
                    height = _height(rows - row)
                    weigh(
                        height,
                        scores + 4 * (row * CHUNK + position - origin),
                        values,
                        min(block_size, last - position),
                        values + block_size * padded_dim * item_bytes,
                        part + 4 * row * padded_dim,
                        padded_dim // GROUP,
                        ahead if row == 0 else values,
                    )
                    row += height
            _combine(rows, padded_dim, part, part_result, total, total_result)

        for row in range(rows):
            query, head = row // heads, kv_head * heads + row % heads
            target = model.attended + (first_row + query) * model.attended_stride + 4 * head * dim
            divisor = floats(total_result + 8 * row, 2)[1]
            divide(total + 4 * row * padded_dim, float_bits(divisor), target, dim)

    return attend
