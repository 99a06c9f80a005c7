"""Draws by compiled passes against the definition in ``minipaged/sampling``: the same token, or none where near."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.ops.cpu import features
from minipaged.ops.cpu.draws import RowDrawer
from minipaged.sampling.sampler import Sampler, draw_row
from minipaged.sampling.state import SamplingState

SIZES = [1, 2, 3, 40, 63, 64, 65, 255, 256, 257, 1000, 5003]
KINDS = {
    "flat": lambda rng, n: np.zeros(n),
    "ties": lambda rng, n: rng.integers(-24, 24, n) / 4,
    "two values": lambda rng, n: rng.integers(0, 2, n) * rng.choice([1e-3, 1.0, 20.0]),
    "bell": lambda rng, n: rng.standard_normal(n) * rng.choice([0.1, 1.0, 3.0, 30.0]),
    "tail": lambda rng, n: -rng.exponential(size=n) * rng.choice([1e-6, 1.0, 5.0]),
    "peak": lambda rng, n: np.where(np.arange(n) == n // 2, rng.choice([5.0, 20.0, 1e30]), rng.standard_normal(n)),
    "masked": lambda rng, n: np.where(rng.random(n) < rng.choice([0.1, 0.5, 0.95]), -np.inf, rng.standard_normal(n)),
    "signed zeros": lambda rng, n: np.where(rng.random(n) < 0.5, -0.0, 0.0),
}
FILTERS = {
    "top_p": st.sampled_from([1e-9, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999999, 1 - 2**-53]),
    "top_k": st.sampled_from([1, 2, 5, 50, 500, 5002, 5003, 100_000]),
    "min_p": st.sampled_from([1e-9, 0.001, 0.05, 0.5, 1.0]),
}
TEMPERATURES = st.sampled_from([5e-324, 1e-6, 0.1, 0.8, 1.0, 1.5, 1000.0])


def row_of(kind: str, size: int, seed: int) -> np.ndarray:
    row = KINDS[kind](np.random.default_rng(seed), size).astype(np.float32)
    row[seed % size] = max(row[seed % size], 0)  # at least one is not masked
    return row


def check(drawer: RowDrawer, row: np.ndarray, params: SamplingParams, numbers) -> int:
    """Compare; returns how many draws were not decided."""
    largest, undecided = float(row.max()), 0
    with np.errstate(all="ignore"):
        for number in numbers:
            found = drawer(row, largest, params, number)
            undecided += found == -1
            if found != -1:
                masked = bool((row == -np.inf).any())
                assert found == draw_row(row, largest, params, number, masked), (params, number)
    return undecided


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(SIZES),
    st.fixed_dictionaries({"temperature": TEMPERATURES}, optional=FILTERS),
    st.integers(0, 2**32 - 1),
)
def test_tokens_are_those_of_the_definition_or_none(kind, size, options, seed):
    numbers = [0.0, 1 - 2**-53, 0.5, *np.random.default_rng(seed + 1).random(4)]
    check(RowDrawer(5003), row_of(kind, size, seed), SamplingParams(**options), numbers)


OPTIONS = [
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ordinary_rows_are_decided(options):
    rng, drawer = np.random.default_rng(0), RowDrawer(49_153)
    for spread in (0.5, 2.0, 5.0):
        for size in (40, 49_152, 49_153):
            row = (rng.standard_normal(size) * spread).astype(np.float32)
            assert check(drawer, row, SamplingParams(**options), rng.random(8)) == 0


def test_a_near_decision_is_left_to_the_definition():
    row, drawer = np.zeros(4, np.float32), RowDrawer(4)
    params = SamplingParams(temperature=1)
    assert drawer(row, 0.0, params, 0.5) == -1  # between the second and the third
    assert drawer(row, 0.0, params, 0.5 + 1e-9) == 2
    assert drawer(row, 0.0, SamplingParams(top_p=0.5), 0.7) == -1  # reached by the second exactly
    assert drawer(row, 0.0, SamplingParams(top_p=0.501), 0.7) == 2
    weight = float(np.exp(np.float64(np.float32(-0.3))))
    row[1:] = -0.3, -0.6, -0.9
    assert drawer(row, 0.0, SamplingParams(min_p=weight), 0.9) == -1
    assert drawer(row, 0.0, SamplingParams(min_p=weight - 1e-9), 0.9) == 1


def test_the_sampler_follows_the_definition_where_nothing_is_decided():
    logits, params = np.zeros((1, 40), np.float32), SamplingParams(top_p=0.5)  # half of them: always near
    states = [SamplingState(params, [1], vocab_size=40, seed=seed) for seed in range(30)]
    plain, drawer = Sampler(40), RowDrawer(40)
    fast = Sampler(40, draw_row=drawer)
    assert all(drawer(logits[0], 0.0, params, number) == -1 for number in np.random.default_rng(0).random(9))
    assert [fast.sample(logits, [state]) for state in states] == [plain.sample(logits, [state]) for state in states]


def test_a_row_beyond_the_room_is_refused():
    with pytest.raises(ValueError, match="41 logits; there is room for 40"):
        RowDrawer(40)(np.zeros(41, np.float32), 0.0, SamplingParams(), 0.5)


LEVEL_CHECK = """
import numpy as np
from tests.ops.cpu.test_draws_cpu import KINDS, OPTIONS, RowDrawer, SamplingParams, check, row_of
drawer, undecided = RowDrawer(5003), 0
for options in OPTIONS:
    for kind in KINDS:
        for seed in range(4):
            row = row_of(kind, 5003 - seed, seed)
            undecided += check(drawer, row, SamplingParams(**options), np.random.default_rng(seed).random(4))
print(undecided)
"""


@pytest.mark.parametrize("level", ["generic", "avx2"])
def test_lower_levels_draw_the_same(level, tmp_path):
    if not features.REQUIRED_FEATURES[level] <= features.host_features():
        pytest.skip(f"this CPU lacks {level}")
    environment = os.environ | {"MINIPAGED_CPU_LEVEL": level, "MINIPAGED_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LEVEL_CHECK]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 40, "of 768 draws; those from equal weights with an exact top_p are near"
