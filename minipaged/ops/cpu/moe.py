"""A mixture of experts as in Mixtral (Jiang et al., 2024) and Qwen3-MoE.

A token and one of its experts are an *assignment*. The assignments of all tokens are sorted by expert
into *slots*, so that each expert multiplies its tokens as neighbouring rows, and reads its weights
once. A token's results are added in the order of the experts' indices, whoever its company is.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba.core.ccallback import CFunc

from .compile_cache import c_function
from .elementwise import activate, blend, clear, copy
from .elementwise import total as row_total
from .emit import kernel
from .linear import multiply, prepare_row, share
from .memory import compiled, float_bits, floats, ints32
from .phases import PHASE_SIGNATURE, layer_at, linear_at, model_at
from .team import barrier


@kernel(4)
def _dot(e, x, y, count, out):
    """``out[0] = x · y``."""

    def products(offset, type_, sums):
        return e.fma(e.load(e.add(x, offset), type_), e.load(e.add(y, offset), type_), sums)

    e.store(row_total(e, count, products), out)


@compiled
def _route(x, router, hidden_size, num_experts, experts_per_token, normalize, ids, weights, scratch):
    """A token's likeliest experts, in the order of their indices, and their weights.

    Probabilities are a softmax over all experts; the lower index wins a tie. ``scratch`` has room for
    ``num_experts`` floats.
    """
    work = floats(scratch, num_experts)
    largest = np.float32(-np.inf)
    for expert in range(num_experts):
        _dot(x, router + 4 * expert * hidden_size, hidden_size, scratch + 4 * expert)
        largest = max(largest, work[expert])
    total = np.float32(0)
    for expert in range(num_experts):
        work[expert] = math.exp(work[expert] - largest)
        total += work[expert]
    for j in range(experts_per_token):
        best = 0
        for expert in range(1, num_experts):
            if work[expert] > work[best]:
                best = expert
        weight, work[best] = work[best] / total, np.float32(-1)
        place = j  # insert by index
        while place > 0 and ids[place - 1] > best:
            ids[place], weights[place] = ids[place - 1], weights[place - 1]
            place -= 1
        ids[place], weights[place] = best, weight
    if normalize:
        total = np.float32(0)
        for j in range(experts_per_token):
            total += weights[j]
        for j in range(experts_per_token):
            weights[j] /= total


@compiled
def _sort_by_expert(model, num_rows):
    """Fill ``expert_starts`` (slots of each expert), ``expert_slots`` (of each assignment) and ``expert_rows``."""
    count = num_rows * model.experts_per_token
    ids = ints32(model.expert_ids, count)
    slots, rows = ints32(model.expert_slots, count), ints32(model.expert_rows, count)
    starts = ints32(model.expert_starts, model.num_experts + 1)
    starts[:] = 0
    for assignment in range(count):
        starts[ids[assignment] + 1] += 1
    for expert in range(model.num_experts):
        starts[expert + 1] += starts[expert]
    for assignment in range(count):  # starts[e] counts up to the end of expert e ...
        expert = ids[assignment]
        slot = starts[expert]
        slots[assignment], rows[slot] = slot, assignment // model.experts_per_token
        starts[expert] += 1
    for expert in range(model.num_experts, 0, -1):  # ... which is the start of e + 1
        starts[expert] = starts[expert - 1]
    starts[0] = 0


@compiled
def _multiply_slots(model, linears, first_linear, starts, x, x_stride, out, out_stride, thread, num_threads):
    """Every expert's product with the rows in its slots."""
    for expert in range(model.num_experts):
        linear = linear_at(linears, first_linear + expert)
        first, last = starts[expert], starts[expert + 1]
        if first < last:
            multiply(
                linear,
                x + first * x_stride,
                x_stride,
                model.prepared + first * linear.row_bytes,
                last - first,
                out + first * out_stride,
                out_stride,
                thread,
                num_threads,
            )
    barrier(model.barrier, num_threads)


@cache
def experts_phase() -> CFunc:
    """The phase that computes ``output = sum of weight * expert(normed)`` for ``index`` rows.

    All threads take part; each leaves the ``output`` of its own share of the rows.
    """

    @c_function(PHASE_SIGNATURE, "experts")
    def feed_forward(model_address, layer_address, linears, num_rows, thread, num_threads):
        model, layer = model_at(model_address), layer_at(layer_address)
        per_token, hidden_size = model.experts_per_token, model.hidden_size
        first, last = share(num_rows, thread, num_threads)
        for row in range(first, last):
            _route(
                model.normed + row * model.hidden_stride,
                layer.router,
                hidden_size,
                model.num_experts,
                per_token,
                model.normalize_experts,
                ints32(model.expert_ids + 4 * row * per_token, per_token),
                floats(model.expert_weights + 4 * row * per_token, per_token),
                model.scratch + thread * model.scratch_bytes,
            )
        barrier(model.barrier, num_threads)
        if thread == 0:
            _sort_by_expert(model, num_rows)
        barrier(model.barrier, num_threads)

        num_slots = num_rows * per_token
        rows, starts = ints32(model.expert_rows, num_slots), ints32(model.expert_starts, model.num_experts + 1)
        first_slot, last_slot = share(num_slots, thread, num_threads)
        gate_up, down = linear_at(linears, layer.gate_up), linear_at(linears, layer.down)
        for slot in range(first_slot, last_slot):
            target = model.expert_input + slot * model.hidden_stride
            copy(model.normed + rows[slot] * model.hidden_stride, target, hidden_size)
            prepare_row(gate_up, target, slot, model.prepared)
        barrier(model.barrier, num_threads)
        _multiply_slots(
            model, linears, layer.gate_up, starts, model.expert_input, model.hidden_stride,
            model.inner, model.inner_stride, thread, num_threads,
        )  # fmt: skip
        for slot in range(first_slot, last_slot):
            inner = model.inner + slot * model.inner_stride
            activate(model.activation + 3, inner, inner + 4 * down.num_inputs, down.num_inputs)
            prepare_row(down, inner, slot, model.prepared)
        barrier(model.barrier, num_threads)
        _multiply_slots(
            model, linears, layer.down, starts, model.inner, model.inner_stride,
            model.expert_input, model.hidden_stride, thread, num_threads,
        )  # fmt: skip

        slots, weights = ints32(model.expert_slots, num_slots), floats(model.expert_weights, num_slots)
        for row in range(first, last):
            output = model.output + row * model.hidden_stride
            clear(output, hidden_size)
            for assignment in range(row * per_token, (row + 1) * per_token):
                y = model.expert_input + slots[assignment] * model.hidden_stride
                blend(output, float_bits(np.float32(1)), y, float_bits(weights[assignment]), hidden_size)

    return feed_forward
