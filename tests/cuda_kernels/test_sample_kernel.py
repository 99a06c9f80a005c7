"""The sampling kernel against the host's sampler, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import sample
from cuda_kernels.toolchain.interpreter import run
from minipaged.config import SamplingParams
from minipaged.sampling.processors import LogitsProcessor
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState


def tokens_of_kernel(raw, states, processed=None, num_lists=16, cc=(8, 0)):
    """What the kernel samples; rows of ``processed`` that are not NaN replace the raw ones."""
    num_rows, vocab_size = raw.shape
    reals = np.array([[s.params.temperature, s.params.top_p, s.params.min_p] for s in states], np.float64)
    integers = np.zeros((num_rows, 5), np.int64)
    for row, state in enumerate(states):
        seed = np.uint64(state.seed).astype(np.int64)
        integers[row, :4] = seed, state.position, max(0, state.params.top_k), row
    if processed is None:
        processed = np.full_like(raw, np.nan)
    integers[:, 4] = ~np.isnan(processed[:, 0])
    grid, _ = sample.launch_dims(num_rows, num_lists)
    ids, weights = np.zeros((num_lists, vocab_size), np.int32), np.zeros((num_lists, vocab_size))
    token = np.full((num_rows, 2), -9, np.int32)
    run(sample.build(), grid, (raw, processed, reals, integers, ids, weights, token, num_rows, vocab_size), cc=cc)
    finite = np.isfinite(raw).all(axis=1)
    np.testing.assert_array_equal(token[finite, 1], raw[finite].argmax(axis=1))
    return token[:, 0]


def states_of(params, vocab_size, rng):
    return [
        SamplingState(
            SamplingParams(**each),
            [1] * int(rng.integers(1, 9)),
            vocab_size=vocab_size,
            seed=int(rng.integers(2**63)) * 2 + 1,
        )
        for each in params
    ]


PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_k": 700},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.3, "top_k": 50, "min_p": 0.01},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 40.0, "top_p": 0.5},
]


@pytest.mark.parametrize(
    "vocab_size, cc", [pytest.param(1, (8, 0), marks=pytest.mark.slow), (37, (7, 5)), (1500, (8, 0))]
)
def test_draws_what_the_host_draws(vocab_size, cc):
    rng = np.random.default_rng(30)
    params = [each | {"seed": None} for each in PARAMS] * 2
    states = states_of(params, vocab_size, rng)
    logits = (3 * rng.standard_normal((len(states), vocab_size))).astype(np.float32)
    logits[len(PARAMS) :] = np.round(logits[len(PARAMS) :])  # many are equal
    want = [each.token_id for each in Sampler(vocab_size).sample(logits, states)]
    np.testing.assert_array_equal(tokens_of_kernel(logits, states, cc=cc), want)


def test_masked_tokens_are_never_drawn():
    rng = np.random.default_rng(31)
    states = states_of(
        [{"temperature": 1.0}, {"temperature": 5.0, "top_p": 0.99}, {"temperature": 1.0, "top_k": 600}], 900, rng
    )
    raw = rng.standard_normal((3, 900)).astype(np.float32)
    processed = raw.copy()
    processed[:, 5:] = -np.inf
    token = tokens_of_kernel(raw, states, processed)
    assert (token < 5).all()
    for row, state in enumerate(states):
        state.processors = [_Replace(processed[row])]
    np.testing.assert_array_equal(token, [each.token_id for each in Sampler(900).sample(raw, states)])


class _Replace(LogitsProcessor):
    def __init__(self, row):
        self._row = row

    def apply(self, row, output_token_ids):
        row[:] = self._row


def test_a_row_without_an_answer_says_why_and_the_others_do_not_notice():
    rng = np.random.default_rng(32)
    states = states_of([{"temperature": 1.0}] * 4, 600, rng)
    raw = rng.standard_normal((4, 600)).astype(np.float32)
    processed = raw.copy()
    raw[0, 3] = np.nan
    processed[1] = -np.inf
    processed[2, 9] = np.inf
    want = Sampler(600).sample(raw[3:], states[3:])[0].token_id
    token = tokens_of_kernel(raw, states, processed)
    np.testing.assert_array_equal(token, [sample.NOT_FINITE, sample.ALL_MASKED, sample.OVERFLOWED, want])


def test_several_draws_from_one_row_and_slots_without_any():
    rng = np.random.default_rng(33)
    states = states_of([{"temperature": 1.0}] * 3, 300, rng)
    raw = rng.standard_normal((2, 300)).astype(np.float32)
    rows = [1, 1, 0]
    integers = np.array([[s.seed - (1 << 64 if s.seed >> 63 else 0), s.position, 0, 0, 0] for s in states] * 2)
    integers[:, 3] = *rows, -1, -1, -1
    reals, token = np.tile([1.0, 1.0, 0.0], (6, 1)), np.full((6, 2), -9, np.int32)
    room = np.zeros((2, 300), np.int32), np.zeros((2, 300))
    run(sample.build(), sample.launch_dims(6, 2)[0], (raw, raw, reals, integers, *room, token, 6, 300))
    want = [each.token_id for each in Sampler(300).sample(raw[rows], states)]
    assert token[:, 0].tolist() == [*want, -9, -9, -9]
