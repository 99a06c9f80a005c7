"""Savings by sharing: against a case by hand, and the paper's range for parallel sampling."""

import pytest

from minipaged.bench import sharing
from minipaged.bench.workload import Workload, WorkloadRequest, make_workload
from tests.support.engines import make_engine


def test_two_samples_by_hand():
    """A prompt of 5 and 4 tokens each, in blocks of 4. Blocks of the two tables after each step, while one of
    them is shared: prompt 2 + 2 (both shared); then 2 + 2, 2 + 2 with a tail of its own for each."""
    workload = Workload("by hand", [WorkloadRequest([9] * 5, 4)])
    result = sharing._sample(workload, 2, block_size=4)
    assert result["steps"] == 4
    assert result["mean_blocks_unshared"] == pytest.approx(4)
    assert result["mean_blocks"] == pytest.approx((2 + 3 + 3 + 3) / 4)


def test_parallel_samples_save_what_the_paper_says():
    workload = make_workload("instruction", 256, 0, vocab_size=100, max_model_len=2048)
    savings = [sharing._sample(workload, width, 16)["saved"] for width in (2, 4)]
    for saving, paper in zip(savings, sharing.PAPER["instruction", "parallel"], strict=False):
        assert saving == pytest.approx(paper / 100, abs=0.03)
    assert savings == sorted(savings)


def test_every_row_is_measured(monkeypatch):
    monkeypatch.setattr(sharing, "WIDTHS", (2, 3))
    monkeypatch.setattr(sharing, "PAPER", {key: value[:2] for key, value in sharing.PAPER.items()})
    engine = make_engine("tiny-draft", num_blocks=64, block_size=16, max_model_len=256)
    result = sharing.measure(engine, num_requests=2, num_sampled=4)
    assert len(result["rows"]) == 8 and all(0 <= row["saved"] < 1 for row in result["rows"])
    beams = [row["saved"] for row in result["rows"] if row["method"] == "beam"]
    assert min(beams) > 0.1, "beams share at least what they descended from"
    assert result["prefix"]["hit_rate"] > 0.5 and result["prefix"]["saved"] > 0.5
