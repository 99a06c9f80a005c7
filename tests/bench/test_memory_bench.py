"""KV waste: the measurement against a hand-made case, and the claim that paging exists for."""

import pytest

from minipaged.bench import memory


def test_one_request_by_hand():
    """A prompt of 3 and 3 outputs in blocks of 4: KV of 3, 4 and 5 tokens in 4, 4 and 8 slots."""
    result = memory.measure(
        distribution="fixed",
        num_requests=1,
        input_len=3,
        output_len=3,
        block_size=4,
        num_blocks=8,
        max_model_len=16,
        max_num_seqs=1,
        max_num_batched_tokens=16,
    )
    assert result["paged"]["steps"] == 3
    assert result["paged"]["waste"] == pytest.approx(1 - 12 / 16)
    assert result["paged"]["waste_later"] == pytest.approx(1 / 16)
    assert result["contiguous"]["waste"] == pytest.approx(1 - 12 / 48)
    assert result["contiguous"]["waste_later"] == pytest.approx((2 + 1) / 48)
    assert result["contiguous"]["waste_never"] == pytest.approx(3 * 11 / 48)


def test_paging_wastes_little_on_conversations():
    result = memory.measure(num_requests=128, max_num_seqs=32)
    assert result["paged"]["waste"] < 0.04
    assert 0.6 < result["contiguous"]["waste"] < 0.9
    for name in ("paged", "contiguous"):
        parts = result[name]["waste_later"] + result[name]["waste_never"]
        assert parts == pytest.approx(result[name]["waste"])
    assert result["paged"]["mean_running"] > 2 * result["contiguous"]["mean_running"]


def test_a_block_of_one_token_wastes_nothing():
    result = memory.measure(num_requests=16, block_size=1, num_blocks=8192, max_num_batched_tokens=8192)
    assert result["paged"]["waste"] == 0
