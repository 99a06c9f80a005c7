"""A whole forward pass in one compiled function, which every thread of the team runs.

Work alternates between *rows* (each thread takes some tokens: norms, rope, activations) and *panels*
(each takes some outputs of a product, for all tokens), with a barrier wherever the cut changes. Every
value is a function of its own sequence: the cut decides who computes it, never how.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba

from .compile_cache import keep
from .elementwise import activate, add, copy, norm, scale, soft_cap
from .embedding import embed
from .linear import keeps_rows, multiply, multiply_rows, prepare_row, share
from .logits import examine_row
from .memory import compiled, float_bits, ints32, part_of_caller
from .phases import call_phase
from .tables import LAYER, LINEAR, MODEL
from .team import LINE, PARKED, STOP, barrier, wait_for_step

LAYER_BYTES = LAYER.itemsize
ROWS_AT_ONCE = 64  # of the feed-forward part, where threads keep their rows: its inner values stay in the L2 cache


@part_of_caller
def _embed_rows(model, thread, num_threads):
    first, last = share(model.num_tokens, thread, num_threads)
    ids, positions = ints32(model.input_ids, last), ints32(model.positions, last)
    size = model.hidden_size
    for row in range(first, last):
        hidden = model.hidden + row * model.hidden_stride
        embed(model.embedding_format, model.embedding, ids[row], hidden, size)
        if model.embedding_scale != 1:
            scale(hidden, float_bits(model.embedding_scale), hidden, size)
        if model.position_embedding:
            add(hidden, model.position_embedding + 4 * positions[row] * size, size)


@compiled
def _norm_rows(model, weight, bias, linear, num_rows, thread, num_threads):
    """``normed = norm(hidden)``, prepared as the input of ``linear``."""
    first, last = share(num_rows, thread, num_threads)
    for row in range(first, last):
        normed = model.normed + row * model.hidden_stride
        norm(model, model.hidden + row * model.hidden_stride, weight, bias, normed, model.hidden_size)
        prepare_row(linear, normed, row, model.prepared)


@compiled
def _residual_rows(model, linear_bias, weight, bias, num_rows, thread, num_threads):
    """``hidden += norm(output + bias)``, as far as the model has these."""
    first, last = share(num_rows, thread, num_threads)
    for row in range(first, last):
        output = model.output + row * model.hidden_stride
        if linear_bias:
            add(output, linear_bias, model.hidden_size)
        if model.post_norms:
            norm(model, output, weight, bias, output, model.hidden_size)
        add(model.hidden + row * model.hidden_stride, output, model.hidden_size)


@part_of_caller
def _keep_wanted_rows(model):
    """Move the rows whose logits are wanted to the front; their order is ascending, so none is lost."""
    wanted = ints32(model.logits_indices, model.num_logits)
    for i in range(model.num_logits):
        if wanted[i] != i:
            for buffer, stride in (
                (model.hidden, model.hidden_stride),
                (model.attended, model.attended_stride),
            ):
                copy(buffer + wanted[i] * stride, buffer + i * stride, stride // 4)


@compiled
def _hand_over(model, num_rows, num_threads):
    """What follows reads rows that other threads wrote, unless each keeps its own."""
    if not keeps_rows(num_rows, num_threads):
        barrier(model.barrier, num_threads)


@compiled
def _activate_rows(model, gate_up, down, first, last):
    for row in range(first, last):
        inner = model.inner + row * model.inner_stride
        if gate_up.bias:
            add(inner, gate_up.bias, gate_up.num_outputs)
        activate(model.activation + 3 * model.gated, inner, inner + 4 * down.num_inputs, down.num_inputs)
        prepare_row(down, inner, row, model.prepared)


@part_of_caller
def _feed_forward(model, layer, linears, num_rows, thread, num_threads):
    """``output = down(activation(gate_up(normed)))``."""
    gate_up, down = linears[layer.gate_up], linears[layer.down]
    first, last = share(num_rows, thread, num_threads)
    if keeps_rows(num_rows, num_threads):
        for begin in range(first, last, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, last)
            multiply_rows(
                gate_up, model.normed, model.hidden_stride, model.prepared, begin, end, model.inner, model.inner_stride
            )
            _activate_rows(model, gate_up, down, begin, end)
            multiply_rows(
                down, model.inner, model.inner_stride, model.prepared, begin, end, model.output, model.hidden_stride
            )
        return
    multiply(
        gate_up, model.normed, model.hidden_stride, model.prepared, num_rows,
        model.inner, model.inner_stride, thread, num_threads,
    )  # fmt: skip
    barrier(model.barrier, num_threads)
    _activate_rows(model, gate_up, down, first, last)
    barrier(model.barrier, num_threads)
    multiply(
        down, model.inner, model.inner_stride, model.prepared, num_rows,
        model.output, model.hidden_stride, thread, num_threads,
    )  # fmt: skip
    barrier(model.barrier, num_threads)


@cache
def step_function() -> Callable:
    """Compile the step, or load it from the cache.

    Returns ``work(model, layers, linears, thread, num_threads, mailbox, seen)``: arrays of the records
    in :mod:`~minipaged.ops.cpu.tables`, then what :class:`~minipaged.ops.cpu.team.Team` passes.
    """

    def work(models, layers, linears, thread, num_threads, mailbox, seen):
        model = models[0]
        while True:
            if thread:
                number = wait_for_step(mailbox, seen)
                if number == PARKED:
                    return seen
                if number == STOP:
                    return STOP
                seen = number
            _embed_rows(model, thread, num_threads)
            num_rows = model.num_tokens
            for index in range(model.num_layers):
                layer = layers[index]
                table = model.linear_table
                address = model.layer_table + index * LAYER_BYTES
                qkv, o = linears[layer.qkv], linears[layer.o]
                _norm_rows(model, layer.input_norm, layer.input_norm_bias, qkv, num_rows, thread, num_threads)
                _hand_over(model, num_rows, num_threads)
                multiply(
                    qkv, model.normed, model.hidden_stride, model.prepared, num_rows,
                    model.qkv, model.qkv_stride, thread, num_threads,
                )  # fmt: skip
                _hand_over(model, num_rows, num_threads)
                first, last = share(num_rows, thread, num_threads)
                for row in range(first, last):
                    call_phase(model.write_phase, model.address, address, table, row, thread, num_threads)
                barrier(model.barrier, num_threads)
                counters = model.counters + index * num_threads * LINE
                call_phase(model.attention_phase, model.address, address, table, counters, thread, num_threads)
                barrier(model.barrier, num_threads)
                if index == model.num_layers - 1 and model.num_logits < num_rows:
                    # K and V are written: from here on only rows whose logits are wanted matter.
                    if thread == 0:
                        _keep_wanted_rows(model)
                    num_rows = model.num_logits
                    barrier(model.barrier, num_threads)
                first, last = share(num_rows, thread, num_threads)
                for row in range(first, last):
                    attended = model.attended + row * model.attended_stride
                    prepare_row(o, attended, row, model.prepared)
                _hand_over(model, num_rows, num_threads)
                multiply(
                    o, model.attended, model.attended_stride, model.prepared, num_rows,
                    model.output, model.hidden_stride, thread, num_threads,
                )  # fmt: skip
                _hand_over(model, num_rows, num_threads)
                _residual_rows(
                    model, o.bias, layer.post_attention_norm, layer.post_attention_norm_bias, num_rows, thread,
                    num_threads,
                )  # fmt: skip
                gate_up = linears[layer.gate_up]
                _norm_rows(model, layer.mlp_norm, layer.mlp_norm_bias, gate_up, num_rows, thread, num_threads)
                _hand_over(model, num_rows, num_threads)
                if layer.router:
                    call_phase(model.experts_phase, model.address, address, table, num_rows, thread, num_threads)
                else:
                    _feed_forward(model, layer, linears, num_rows, thread, num_threads)
                _residual_rows(
                    model, linears[layer.down].bias, layer.post_mlp_norm, layer.post_mlp_norm_bias, num_rows, thread,
                    num_threads,
                )  # fmt: skip

            lm_head = linears[model.lm_head]
            _norm_rows(model, model.final_norm, model.final_norm_bias, lm_head, num_rows, thread, num_threads)
            _hand_over(model, num_rows, num_threads)
            multiply(
                lm_head, model.normed, model.hidden_stride, model.prepared, num_rows,
                model.logits, model.logits_stride, thread, num_threads,
            )  # fmt: skip
            barrier(model.barrier, num_threads)
            first, last = share(num_rows, thread, num_threads)
            for row in range(first, last):
                logits = model.logits + row * model.logits_stride
                if model.final_soft_cap > 0:
                    soft_cap(logits, float_bits(model.final_soft_cap), model.vocab_size)
                examine_row(logits, model.vocab_size, model.likeliest + 4 * row, model.magnitudes + 4 * row)
            barrier(model.barrier, num_threads)
            if thread == 0:
                return 0

    function = numba.njit(work, error_model="numpy", nogil=True)
    keep(function, "step")
    records = [numba.from_dtype(dtype)[::1] for dtype in (MODEL, LAYER, LINEAR)]
    function.compile(numba.int64(*records, *[numba.int64] * 4))
    return function
