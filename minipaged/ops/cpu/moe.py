"""A mixture of experts as in Mixtral (Jiang et al., 2024) and Qwen3-MoE.

A token and one of its experts are an *assignment*. The assignments of all tokens are sorted by expert
into *slots*, so that each expert multiplies its tokens as neighbouring rows, and reads its weights
once. A token's results are added in the order of the experts' indices, whoever its company is.
"""

from __future__ import annotations

import math

import numpy as np

from .elementwise import activate, copy
from .linear import multiply, prepare_row, share
from .memory import compiled, floats, ints32
from .team import barrier


@compiled(fastmath={"reassoc", "nsz"})
def _dot(x, y):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@compiled
def route(x_address, router, hidden_size, num_experts, experts_per_token, normalize, ids, weights, work):
    """A token's likeliest experts, in the order of their indices, and their weights.

    Probabilities are a softmax over all experts; the lower index wins a tie. ``work`` holds
    ``num_experts`` floats.
    """
    x = floats(x_address, hidden_size)
    largest = np.float32(-np.inf)
    for expert in range(num_experts):
        work[expert] = _dot(x, floats(router + 4 * expert * hidden_size, hidden_size))
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
def feed_forward(model, layer, linears, num_rows, thread, num_threads):
    """``output = sum of weight * expert(normed)`` for this thread's rows; all threads take part."""
    per_token, hidden_size = model.experts_per_token, model.hidden_size
    first, last = share(num_rows, thread, num_threads)
    for row in range(first, last):
        route(
            model.normed + row * model.hidden_stride,
            layer.router,
            hidden_size,
            model.num_experts,
            per_token,
            model.normalize_experts,
            ints32(model.expert_ids + 4 * row * per_token, per_token),
            floats(model.expert_weights + 4 * row * per_token, per_token),
            floats(model.scratch + thread * model.scratch_bytes, model.num_experts),
        )
    barrier(model.barrier, num_threads)
    if thread == 0:
        _sort_by_expert(model, num_rows)
    barrier(model.barrier, num_threads)

    num_slots = num_rows * per_token
    rows, starts = ints32(model.expert_rows, num_slots), ints32(model.expert_starts, model.num_experts + 1)
    first_slot, last_slot = share(num_slots, thread, num_threads)
    for slot in range(first_slot, last_slot):
        x, target = model.normed + rows[slot] * model.hidden_stride, model.expert_input + slot * model.hidden_stride
        if linears[layer.gate_up].prepare:
            prepare_row(linears[layer.gate_up], x, slot, model.prepared, model.prepared_scale)
        else:
            copy(x, target, hidden_size)
    barrier(model.barrier, num_threads)
    for expert in range(model.num_experts):
        _multiply_slots(
            model, linears[layer.gate_up + expert], model.expert_input, model.hidden_stride,
            starts[expert], starts[expert + 1], model.inner, model.inner_stride, thread, num_threads,
        )  # fmt: skip
    barrier(model.barrier, num_threads)
    for slot in range(first_slot, last_slot):
        inner = model.inner + slot * model.inner_stride
        activate(model.activation, 1, inner, linears[layer.down].num_inputs)
        prepare_row(linears[layer.down], inner, slot, model.prepared, model.prepared_scale)
    barrier(model.barrier, num_threads)
    for expert in range(model.num_experts):
        _multiply_slots(
            model, linears[layer.down + expert], model.inner, model.inner_stride,
            starts[expert], starts[expert + 1], model.expert_input, model.hidden_stride, thread, num_threads,
        )  # fmt: skip
    barrier(model.barrier, num_threads)

    slots = ints32(model.expert_slots, num_slots)
    weights = floats(model.expert_weights, num_slots)
    for row in range(first, last):
        total = floats(model.output + row * model.hidden_stride, hidden_size)
        total[:] = 0
        for assignment in range(row * per_token, (row + 1) * per_token):
            y = floats(model.expert_input + slots[assignment] * model.hidden_stride, hidden_size)
            for i in range(hidden_size):
                total[i] += weights[assignment] * y[i]


@compiled
def _multiply_slots(model, linear, x, x_stride, first, last, out, out_stride, thread, num_threads):
    """One expert's product with the rows in its slots."""
    if first < last:
        multiply(
            linear,
            x + first * x_stride,
            x_stride,
            model.prepared + first * linear.row_bytes,
            model.prepared_scale + 4 * first,
            last - first,
            out + first * out_stride,
            out_stride,
            thread,
            num_threads,
        )
