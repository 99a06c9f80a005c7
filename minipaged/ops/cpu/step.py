"""A whole forward pass in one compiled function, which every thread of the team runs.

Work alternates between *rows* (each thread takes some tokens: norms, rope, activations) and *panels*
(each takes some outputs of a product, for all tokens), with a barrier wherever the cut changes. Every
value is a function of its own sequence: the cut decides who computes it, never how.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba

from . import elementwise, moe
from .attention import build_attend
from .compile_cache import keep
from .embedding import embed
from .kv import ITEM_BYTES, TOKENS, build_write
from .linear import multiply, prepare_row, share
from .memory import compiled, ints32, ints64
from .tables import LAYER, LINEAR, MODEL
from .team import PARKED, STOP, barrier, fetch_add, wait_for_step


@compiled
def _norm(model, x, weight, bias, out, count):
    if model.layer_norm:
        elementwise.layer_norm(x, weight, bias, out, count, model.norm_eps)
    else:
        elementwise.rms_norm(x, weight, out, count, model.norm_eps)


@compiled
def _embed_rows(model, thread, num_threads):
    first, last = share(model.num_tokens, thread, num_threads)
    ids, positions = ints32(model.input_ids, last), ints32(model.positions, last)
    size = model.hidden_size
    for row in range(first, last):
        hidden = model.hidden + row * model.hidden_stride
        embed(model.embedding_format, model.embedding, model.embedding_scales, ids[row], hidden, size)
        if model.embedding_scale != 1:
            elementwise.scale(hidden, model.embedding_scale, size)
        if model.position_embedding:
            elementwise.add(hidden, model.position_embedding + 4 * positions[row] * size, size)


@compiled
def _norm_rows(model, weight, bias, linear, num_rows, thread, num_threads):
    """``normed = norm(hidden)``, prepared as the input of ``linear``."""
    first, last = share(num_rows, thread, num_threads)
    for row in range(first, last):
        normed = model.normed + row * model.hidden_stride
        _norm(model, model.hidden + row * model.hidden_stride, weight, bias, normed, model.hidden_size)
        prepare_row(linear, normed, row, model.prepared, model.prepared_scale)


@compiled
def _residual_rows(model, linear_bias, norm, norm_bias, num_rows, thread, num_threads):
    """``hidden += norm(output + bias)``, as far as the model has these."""
    first, last = share(num_rows, thread, num_threads)
    for row in range(first, last):
        output = model.output + row * model.hidden_stride
        if linear_bias:
            elementwise.add(output, linear_bias, model.hidden_size)
        if model.post_norms:
            _norm(model, output, norm, norm_bias, output, model.hidden_size)
        elementwise.add(model.hidden + row * model.hidden_stride, output, model.hidden_size)


@compiled
def _finish_heads(model, layer, bias, num_outputs, row):
    """Biases, norms and rope of one token's q, k and v."""
    qkv = model.qkv + row * model.qkv_stride
    if bias:
        elementwise.add(qkv, bias, num_outputs)
    position = ints32(model.positions, row + 1)[row]
    rotation = 4 * position * layer.rotary_half
    for head in range(model.num_heads + model.num_kv_heads):
        x = qkv + 4 * head * model.head_dim
        if model.qk_norm:
            if head < model.num_heads:
                _norm(model, x, layer.q_norm, layer.q_norm_bias, x, model.head_dim)
            else:
                _norm(model, x, layer.k_norm, layer.k_norm_bias, x, model.head_dim)
        if layer.rotary_half:
            elementwise.rope(x, layer.cos + rotation, layer.sin + rotation, layer.rotary_half)


@compiled
def _keep_wanted_rows(model):
    """Move the rows whose logits are wanted to the front; their order is ascending, so none is lost."""
    wanted = ints32(model.logits_indices, model.num_logits)
    for i in range(model.num_logits):
        if wanted[i] != i:
            for buffer, stride in (
                (model.hidden, model.hidden_stride),
                (model.attended, model.attended_stride),
            ):
                elementwise.copy(buffer + wanted[i] * stride, buffer + i * stride, stride // 4)


@compiled
def _feed_forward(model, layer, linears, num_rows, thread, num_threads):
    """``output = down(activation(gate_up(normed)))``."""
    gate_up, down = linears[layer.gate_up], linears[layer.down]
    multiply(
        gate_up, model.normed, model.hidden_stride, model.prepared, model.prepared_scale, num_rows,
        model.inner, model.inner_stride, thread, num_threads,
    )  # fmt: skip
    barrier(model.barrier, num_threads)
    first, last = share(num_rows, thread, num_threads)
    for row in range(first, last):
        inner = model.inner + row * model.inner_stride
        if gate_up.bias:
            elementwise.add(inner, gate_up.bias, gate_up.num_outputs)
        elementwise.activate(model.activation, model.gated, inner, down.num_inputs)
        prepare_row(down, inner, row, model.prepared, model.prepared_scale)
    barrier(model.barrier, num_threads)
    multiply(
        down, model.inner, model.inner_stride, model.prepared, model.prepared_scale, num_rows,
        model.output, model.hidden_stride, thread, num_threads,
    )  # fmt: skip
    barrier(model.barrier, num_threads)


@cache
def step_function(kv_dtype: str) -> Callable:
    """Compile the step for a KV format, or load it from the cache.

    Returns ``work(model, layers, linears, thread, num_threads, mailbox, seen)``: arrays of the records
    in :mod:`~minipaged.ops.cpu.tables`, then what :class:`~minipaged.ops.cpu.team.Team` passes.
    """
    item_bytes = ITEM_BYTES[kv_dtype]
    write, attend = build_write(kv_dtype), build_attend(kv_dtype, item_bytes)

    @compiled
    def write_rows(model, layer, linear, thread, num_threads):
        """Finish q, k and v of this thread's tokens and store k and v."""
        first, last = share(model.num_tokens, thread, num_threads)
        slots = ints64(model.slot_mapping, last)
        dim, size = model.head_dim, model.block_size
        for row in range(first, last):
            _finish_heads(model, layer, linear.bias, linear.num_outputs, row)
            block = layer.cache + slots[row] // size * model.block_bytes
            k = model.qkv + row * model.qkv_stride + 4 * model.num_heads * dim
            for head in range(model.num_kv_heads):
                k_part = block + head * model.k_bytes
                v_part = block + model.num_kv_heads * model.k_bytes + head * model.v_bytes
                write(
                    k + 4 * head * dim,
                    k + 4 * (model.num_kv_heads + head) * dim,
                    dim,
                    k_part,
                    v_part,
                    slots[row] % size,
                    min(size, TOKENS),
                    model.padded_dim,
                    k_part + size * dim * item_bytes,
                    v_part + size * model.padded_dim * item_bytes,
                )

    @compiled
    def attend_items(model, layer, counter, thread):
        """Items of the layer's attention, whichever is next, until none is left."""
        scratch = model.scratch + thread * model.scratch_bytes
        num_items = model.num_tiles * model.num_kv_heads
        item = fetch_add(counter, 1)
        while item < num_items:
            tile, head = item // model.num_kv_heads, item % model.num_kv_heads
            attend(model, layer.cache, layer.window, tile, head, scratch)
            item = fetch_add(counter, 1)

    @compiled
    def forward(model, layers, linears, thread, num_threads):
        _embed_rows(model, thread, num_threads)
        num_rows = model.num_tokens
        for index in range(model.num_layers):
            layer = layers[index]
            qkv, o = linears[layer.qkv], linears[layer.o]
            _norm_rows(model, layer.input_norm, layer.input_norm_bias, qkv, num_rows, thread, num_threads)
            barrier(model.barrier, num_threads)
            multiply(
                qkv, model.normed, model.hidden_stride, model.prepared, model.prepared_scale, num_rows,
                model.qkv, model.qkv_stride, thread, num_threads,
            )  # fmt: skip
            barrier(model.barrier, num_threads)
            write_rows(model, layer, qkv, thread, num_threads)
            barrier(model.barrier, num_threads)
            attend_items(model, layer, model.counters + 8 * index, thread)
            barrier(model.barrier, num_threads)
            if index == model.num_layers - 1 and model.num_logits < num_rows:
                # K and V are written: from here on only rows whose logits are wanted matter.
                if thread == 0:
                    _keep_wanted_rows(model)
                num_rows = model.num_logits
                barrier(model.barrier, num_threads)
            first, last = share(num_rows, thread, num_threads)
            for row in range(first, last):
                prepare_row(
                    o, model.attended + row * model.attended_stride, row, model.prepared, model.prepared_scale
                )
            barrier(model.barrier, num_threads)
            multiply(
                o, model.attended, model.attended_stride, model.prepared, model.prepared_scale, num_rows,
                model.output, model.hidden_stride, thread, num_threads,
            )  # fmt: skip
            barrier(model.barrier, num_threads)
            _residual_rows(
                model, o.bias, layer.post_attention_norm, layer.post_attention_norm_bias, num_rows, thread, num_threads
            )
            _norm_rows(
                model, layer.mlp_norm, layer.mlp_norm_bias, linears[layer.gate_up], num_rows, thread, num_threads
            )
            barrier(model.barrier, num_threads)
            if layer.router:
                moe.feed_forward(model, layer, linears, num_rows, thread, num_threads)
            else:
                _feed_forward(model, layer, linears, num_rows, thread, num_threads)
            _residual_rows(
                model, linears[layer.down].bias, layer.post_mlp_norm, layer.post_mlp_norm_bias, num_rows, thread,
                num_threads,
            )  # fmt: skip

        lm_head = linears[model.lm_head]
        _norm_rows(model, model.final_norm, model.final_norm_bias, lm_head, num_rows, thread, num_threads)
        barrier(model.barrier, num_threads)
        multiply(
            lm_head, model.normed, model.hidden_stride, model.prepared, model.prepared_scale, num_rows,
            model.logits, model.logits_stride, thread, num_threads,
        )  # fmt: skip
        barrier(model.barrier, num_threads)
        if model.final_soft_cap > 0:
            first, last = share(num_rows, thread, num_threads)
            for row in range(first, last):
                elementwise.soft_cap(model.logits + row * model.logits_stride, model.final_soft_cap, model.vocab_size)
            barrier(model.barrier, num_threads)

    def work(models, layers, linears, thread, num_threads, mailbox, seen):
        while True:
            if thread:
                number = wait_for_step(mailbox, seen)
                if number == PARKED:
                    return seen
                if number == STOP:
                    return STOP
                seen = number
            forward(models[0], layers, linears, thread, num_threads)
            if thread == 0:
                return 0

    function = compiled(work)
    keep(function, f"step-{kv_dtype}")
    records = [numba.from_dtype(dtype)[::1] for dtype in (MODEL, LAYER, LINEAR)]
    function.compile(numba.int64(*records, *[numba.int64] * 4))
    return function
