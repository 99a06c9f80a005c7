"""Paged attention: causal, grouped heads, sliding windows, soft-caps; KV in float32, bfloat16 or int8.

The work is cut into *items*: one KV head of one *tile*, which is a few consecutive queries of one
sequence (one when decoding). All query heads that share the KV head go through together, so K and V
are read once for the ``rows`` = queries x heads of an item. The context is walked in chunks of 256
positions, counted from position 0 (Rabe and Staats, 2021; Dao et al., 2022)::

    for each chunk:   scores = q · K      16 keys side by side: a multiply-add of 16 scores per component
                      p = exp(scores - max), 0 where a row does not see; sum
                      part = p · V        the tokens in order
                      rows = rows and part, each scaled to the larger maximum

While a chunk is computed, the next one, of this item or of the thread's next item, comes from memory: the
loops (see :mod:`~minipaged.ops.cpu.attention_kernels`) get two lists, of the pieces to read and of those to fetch.

Why a row's result does not depend on its company, bit for bit: a score is one chain of multiply-adds
over the components, whatever the tile or the block size; sums run over lanes ``position % 16``; tokens
that a row does not see add exact zeros; chunks are fixed by position and combined in order.
"""

from __future__ import annotations

import math
from functools import cache

from numba.core.ccallback import CFunc

from .attention_formats import QUERY_TAIL, factor_bytes
from .attention_kernels import (
    CHUNK,
    ENTRY,
    LINE,
    RESULT,
    fetch_kernel,
    query_kernel,
    score_kernel,
    softmax_kernel,
    tallest,
    weigh_kernel,
)
from .compile_cache import c_function
from .elementwise import GROUP, blend, clear, copy, divide, soft_cap
from .kv import ITEM_BYTES, TERMS, TOKENS, bytes_of_key
from .linear import share
from .memory import compiled, float_bits, floats, ints32, ints64, part_of_caller
from .phases import PHASE_SIGNATURE, layer_at, model_at
from .team import LINE as COUNTER_BYTES
from .team import fetch_add

ROWS = 48  # rows that a tile should have: enough that reading K and V costs little
_LIST_BYTES = ENTRY * (CHUNK + 8)  # of a chunk, in blocks of one token, and what completes the words at its ends


def queries_per_tile(heads_per_kv_head: int) -> int:
    """Consecutive queries of a sequence that one tile takes."""
    return max(1, ROWS // heads_per_kv_head)


def scratch_bytes(heads_per_kv_head: int, padded_dim: int) -> int:
    """Working memory of a thread."""
    rows = queries_per_tile(heads_per_kv_head) * heads_per_kv_head
    per_row = 4 * (CHUNK + 3 * padded_dim) + QUERY_TAIL + 2 * RESULT
    return rows * per_row + 2 * _LIST_BYTES + 4 * (CHUNK + padded_dim) + 4096


@part_of_caller
def _combine(rows, padded_dim, part, part_result, total, total_result):
    """Fold a chunk's weighted values into those of the chunks before it."""
    for row in range(rows):
        new, old = floats(part_result + RESULT * row, 2), floats(total_result + RESULT * row, 2)
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
def _height(rows_left, most):
    """Rows of the next kernel call: an even division into calls of at most ``most``."""
    calls = (rows_left + most - 1) // most
    return (rows_left + calls - 1) // calls


@compiled
def _range_of(model, layer, item):
    """The positions ``[begin, end)`` that an item sees some of."""
    tile = ints32(model.tiles + 16 * (item // model.num_kv_heads), 4)
    first_position, num_queries = tile[3], tile[2]
    begin = max(0, first_position - layer.window + 1) if layer.window else 0
    return begin, first_position + num_queries


@compiled
def _list_pieces(model, layer, item, chunk, entries, zeros, item_bytes, terms):
    """``(number, first position)`` of the pieces of K and V, listed at ``entries``, that an item sees of a chunk.

    Where a block has fewer tokens than a word has values (``terms``), ``zeros`` stand for the tokens that would
    complete the first and the last word. (One function for all formats: compiled functions that a cache keeps must
    not share a name and differ.)
    """
    begin, end = _range_of(model, layer, item)
    begin, end = max(begin, chunk * CHUNK), min(end, (chunk + 1) * CHUNK)
    tile, kv_head = ints32(model.tiles + 16 * (item // model.num_kv_heads), 4), item % model.num_kv_heads
    block_table = ints32(model.block_tables + tile[0] * model.block_table_stride, end)
    size = model.block_size
    width = min(size, TOKENS)
    k_head, v_head = kv_head * model.k_bytes, model.num_kv_heads * model.k_bytes + kv_head * model.v_bytes
    key_bytes = bytes_of_key(model.head_dim, terms, item_bytes)
    value_bytes = model.padded_dim * item_bytes
    step = max(width, terms)
    first = begin // step * step
    number = 0
    for position in range(first, (end + step - 1) // step * step, width):
        entry = ints64(entries + ENTRY * number, 4)
        number += 1
        if position + width <= begin or position >= end:
            entry[0], entry[1], entry[2], entry[3] = zeros, zeros, zeros, zeros
            continue
        block = layer.cache + block_table[position // size] * model.block_bytes
        token = position % size
        entry[0] = block + k_head + token * key_bytes
        entry[1] = block + k_head + size * key_bytes + 4 * token
        entry[2] = block + v_head + token * value_bytes
        entry[3] = block + v_head + size * value_bytes + 4 * token
    return number, first


@compiled
def _claim(counters, num_items, thread, num_threads):
    """The next item of this thread's share, then of the others'; ``num_items`` if none is left."""
    for distance in range(num_threads):
        owner = (thread + distance) % num_threads
        first, last = share(num_items, owner, num_threads)
        item = first + fetch_add(counters + COUNTER_BYTES * owner, 1)
        if item < last:
            return item
    return num_items


@cache
def attention_phase(dtype: str) -> CFunc:
    """The phase that computes attention. ``index``: the address of the layer's counters, one for each thread.

    Item ``i`` is KV head ``i % num_kv_heads`` of tile ``i // num_kv_heads``. A thread has a share of the items, for
    the most part those whose queries it wrote itself, and then helps the others.
    """
    item_bytes, terms = ITEM_BYTES[dtype], TERMS[dtype]
    score, weigh, softmax, fetch = (make(dtype) for make in (score_kernel, weigh_kernel, softmax_kernel, fetch_kernel))
    prepare_query = query_kernel(dtype)
    most = tallest()
    has_scales = dtype == "int8"
    weight_bytes = factor_bytes(dtype)

    @c_function(PHASE_SIGNATURE, f"attention-{dtype}")
    def attend(model_address, layer_address, linears, index, thread, num_threads):
        model, layer = model_at(model_address), layer_at(layer_address)
        dim, padded_dim, width = model.head_dim, model.padded_dim, min(model.block_size, TOKENS)
        heads = model.num_heads // model.num_kv_heads
        num_items = model.num_tiles * model.num_kv_heads
        q_stride = weight_bytes * padded_dim + QUERY_TAIL
        key_bytes = width * bytes_of_key(dim, terms, item_bytes)
        value_bytes = width * padded_dim * item_bytes

        # Working memory: two lists, zeros, the scales of a chunk's values, queries, scores, the chunk's weighted values
        # and all so far, the results of both.
        entries = model.scratch + thread * model.scratch_bytes
        ahead = entries + _LIST_BYTES
        zeros = ahead + _LIST_BYTES
        scales = zeros + 4 * padded_dim
        q = scales + 4 * CHUNK
        clear(zeros, padded_dim)

        fetched, count, first = 0, 0, 0
        first_own, last_own = share(num_items, thread, num_threads)
        following = _claim(index, num_items, thread, num_threads)
        is_listed = False
        while following < num_items:
            item = following
            tile = ints32(model.tiles + 16 * (item // model.num_kv_heads), 4)
            kv_head, first_row, num_queries, first_position = item % model.num_kv_heads, tile[1], tile[2], tile[3]
            rows = num_queries * heads
            scores = q + rows * q_stride
            part = scores + 4 * rows * CHUNK
            total = part + 4 * rows * padded_dim
            part_result = total + 4 * rows * padded_dim
            total_result = part_result + RESULT * rows
            begin, end = _range_of(model, layer, item)
            first_chunk, last_chunk = begin // CHUNK, (end - 1) // CHUNK
            if not is_listed:
                count, first = _list_pieces(model, layer, item, first_chunk, entries, zeros, item_bytes, terms)
                fetched = 0
            for query in range(num_queries):
                source = model.qkv + (first_row + query) * model.qkv_stride + 4 * kv_head * heads * dim
                for head in range(heads):
                    target = q + (query * heads + head) * q_stride
                    prepare_query(source + 4 * head * dim, float_bits(model.attention_scale), target, dim)
            clear(total_result, RESULT // 4 * rows)
            for chunk in range(first_chunk, last_chunk + 1):
                # What comes after this chunk. The last items of a share are not claimed early: others may be idle.
                next_count, next_first = 0, 0
                if chunk < last_chunk:
                    next_count, next_first = _list_pieces(
                        model, layer, item, chunk + 1, ahead, zeros, item_bytes, terms
                    )
                elif first_own <= item < last_own - num_threads:
                    following = first_own + fetch_add(index + COUNTER_BYTES * thread, 1)
                    if following >= last_own:
                        following = item
                    else:
                        begin_of_next, _ = _range_of(model, layer, following)
                        next_count, next_first = _list_pieces(
                            model, layer, following, begin_of_next // CHUNK, ahead, zeros, item_bytes, terms
                        )
                origin = chunk * CHUNK
                last = min(origin + CHUNK, end)
                if fetched < count:
                    fetch(entries, fetched, count, key_bytes, value_bytes)
                ahead_list, last_ahead = (ahead, next_count - 1) if next_count else (entries, count - 1)
                row = 0
                while row < rows:
                    height = _height(rows - row, most) if width == TOKENS else 1
                    score(
                        16 * width + height,
                        q + row * q_stride,
                        q_stride,
                        dim,
                        entries,
                        count,
                        ahead_list if row == 0 else entries,
                        last_ahead if row == 0 else count - 1,
                        scores + 4 * (row * CHUNK + first - origin),
                    )
                    row += height

                if has_scales:
                    for number in range(count):
                        piece = floats(ints64(entries + ENTRY * number, 4)[3], width)
                        target = floats(scales + 4 * (first - origin + number * width), width)
                        for token in range(width):
                            target[token] = piece[token]
                first_group, last_group = (first - origin) // GROUP, (last - origin + GROUP - 1) // GROUP
                # The softmax of the first rows asks for the values, each for a part of every piece.
                asking_rows = min(rows, 8)
                lines_of_row = (value_bytes // LINE + asking_rows - 1) // asking_rows
                for row in range(rows):
                    position = first_position + row // heads
                    low = max(0, position - layer.window + 1) if layer.window else 0
                    row_scores = scores + 4 * row * CHUNK
                    if model.attention_soft_cap > 0:
                        soft_cap(
                            row_scores + 4 * GROUP * first_group,
                            float_bits(model.attention_soft_cap),
                            GROUP * (last_group - first_group),
                        )
                    softmax(
                        row_scores,
                        first_group,
                        last_group,
                        low - origin,
                        position + 1 - origin,
                        part_result + RESULT * row,
                        scales,
                        entries,
                        count - 1,
                        lines_of_row * LINE * row,
                        lines_of_row if row < asking_rows else 0,
                    )

                is_narrow = width < terms
                tokens = count * width if is_narrow else last - first
                row = 0
                while row < rows:
                    height = 1 if is_narrow else _height(rows - row, most)
                    weigh(
                        -width if is_narrow else height,
                        scores + 4 * row * CHUNK + weight_bytes * (first - origin),
                        entries,
                        width,
                        tokens,
                        ahead_list if row == 0 else entries,
                        last_ahead if row == 0 else count - 1,
                        part + 4 * row * padded_dim,
                        padded_dim // GROUP,
                        part_result + RESULT * row,
                    )
                    row += height
                _combine(rows, padded_dim, part, part_result, total, total_result)
                fetched = min(count, next_count)
                entries, ahead = ahead, entries
                count, first = next_count, next_first

            for row in range(rows):
                query, head = row // heads, kv_head * heads + row % heads
                target = model.attended + (first_row + query) * model.attended_stride + 4 * head * dim
                divisor = floats(total_result + RESULT * row, 2)[1]
                divide(total + 4 * row * padded_dim, float_bits(divisor), target, dim)
            is_listed = count > 0
            if following == item:
                following = _claim(index, num_items, thread, num_threads)

    return attend
