"""Routing, sorting, grouped products and their sum against the reference operator, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import moe, product_plain
from cuda_kernels.toolchain.interpreter import run
from minipaged.ops.reference.moe import moe as reference_moe
from minipaged.ops.reference.moe import route

NONE = np.zeros(1, np.float32)
NOTHING = np.zeros(1, np.int32)


def experts(x, router, gate_up, down, per_token, normalize, activation, tokens=2, cc=(8, 0)):
    """The whole chain with the readable product; returns the sum and what the router chose."""
    (num_tokens, hidden), (num_experts, inner) = x.shape, (len(router), down.shape[2])
    logits = np.zeros((num_tokens, num_experts), np.float32)
    grid, _ = product_plain.launch_dims(num_tokens, num_experts, tokens)
    kernel = product_plain.build(tokens=tokens)
    run(kernel, grid, (x, router, NONE, NONE, NOTHING, NOTHING, logits, num_tokens, num_experts, hidden), cc=cc)

    ids, weights = np.zeros((num_tokens, per_token), np.int32), np.zeros((num_tokens, per_token), np.float32)
    kernel = moe.build_route(num_experts, per_token, normalize)
    run(kernel, moe.route_dims(num_tokens)[0], (logits, ids, weights, num_tokens), cc=cc)
    starts, slots = np.zeros(num_experts + 1, np.int32), np.zeros(ids.shape, np.int32)
    rows = np.zeros(ids.size, np.int32)
    run(moe.build_sort(num_experts, per_token), moe.sort_dims()[0], (ids, starts, slots, rows, num_tokens), cc=cc)

    middle = np.zeros((ids.size, inner), np.float32)
    kernel = product_plain.build(tokens=tokens, activation=activation, gated=True, experts="gather")
    grid, _ = product_plain.launch_dims(num_tokens, inner, tokens, num_experts)
    run(kernel, grid, (x, gate_up, NONE, NONE, starts, rows, middle, num_tokens, inner, hidden), cc=cc)
    y = np.zeros((ids.size, hidden), np.float32)
    kernel = product_plain.build(tokens=tokens, experts="slots")
    grid, _ = product_plain.launch_dims(num_tokens, hidden, tokens, num_experts)
    run(kernel, grid, (middle, down, NONE, NONE, starts, rows, y, num_tokens, hidden, inner), cc=cc)
    out = np.zeros((num_tokens, hidden), np.float32)
    run(
        moe.build_combine(per_token, add=False),
        moe.combine_dims(num_tokens)[0],
        (y, slots, weights, out, hidden),
        cc=cc,
    )
    return out, ids, weights, starts, slots, rows


def random_experts(rng, num_tokens, num_experts, hidden, inner):
    shapes = (num_tokens, hidden), (num_experts, hidden), (num_experts, 2 * inner, hidden), (num_experts, hidden, inner)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    "num_tokens, num_experts, per_token, normalize, cc",
    [(1, 4, 1, False, (7, 5)), (7, 40, 8, True, (8, 0)), (3, 3, 3, False, (7, 5))],
)
def test_agrees_with_the_reference(num_tokens, num_experts, per_token, normalize, cc):
    arrays = random_experts(np.random.default_rng(5), num_tokens, num_experts, 24, 10)
    out, ids, weights, *_ = experts(*arrays, per_token, normalize, "silu", cc=cc)
    chosen, shares = route(arrays[0], arrays[1], per_token, normalize)
    order = np.argsort(chosen, axis=-1)
    np.testing.assert_array_equal(ids, np.take_along_axis(chosen, order, -1))
    np.testing.assert_allclose(weights, np.take_along_axis(shares, order, -1), rtol=1e-5)
    want = reference_moe(*arrays, per_token, normalize, "silu")
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_slots_hold_each_assignment_once_by_expert():
    arrays = random_experts(np.random.default_rng(6), 45, 40, 8, 4)
    _, ids, _, starts, slots, rows = experts(*arrays, 8, True, "silu")
    assert sorted(slots.ravel().tolist()) == list(range(ids.size))
    for expert in range(40):
        tokens, choices = np.nonzero(ids == expert)
        np.testing.assert_array_equal(slots[tokens, choices], np.arange(starts[expert], starts[expert + 1]))
        np.testing.assert_array_equal(rows[starts[expert] : starts[expert + 1]], tokens)


def test_the_lower_expert_wins_a_tie():
    logits = np.zeros((2, 6), np.float32)
    logits[1, 3:] = 1
    ids, weights = np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)
    run(moe.build_route(6, 2, True), moe.route_dims(2)[0], (logits, ids, weights, 2))
    np.testing.assert_array_equal(ids, [[0, 1], [3, 4]])
    np.testing.assert_array_equal(weights, np.full((2, 2), 0.5, np.float32))


def test_a_token_has_the_same_bits_in_any_company():
    x, *weights = random_experts(np.random.default_rng(7), 6, 40, 16, 6)
    together = experts(x, *weights, 8, True, "silu")[0]
    for i in range(len(x)):
        np.testing.assert_array_equal(experts(x[i : i + 1], *weights, 8, True, "silu")[0], together[i : i + 1])
