"""The arithmetic behind the reports, on cases done by hand."""

import numpy as np
import pytest

from minipaged.bench import bandwidth, latency, machine, throughput
from minipaged.bench.summary import median, percentile, summary
from minipaged.bench.workload import Workload, WorkloadRequest
from minipaged.config import EngineConfig
from minipaged.engine import Engine
from minipaged.errors import ConfigError


@pytest.fixture
def engine():
    options = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Engine(EngineConfig("tiny-draft", device="reference", **options))


def test_percentiles_agree_with_numpy():
    values = list(np.random.default_rng(0).normal(size=31))
    for percent in (0, 1, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert summary([5.0])["p99"] == 5.0


def test_a_run_counts_tokens_steps_and_blocks(engine):
    """Prompts of 4 tokens, 4 outputs each: one step for both, then 3; KV of 7 tokens in one block each."""
    workload = Workload("by hand", [WorkloadRequest([1, 2, 3, 4], 4), WorkloadRequest([5, 6, 7, 8], 4)])
    run = throughput.run_trace(engine, workload, "fcfs")
    assert (run["prompt_tokens"], run["generated_tokens"], run["steps"]) == (8, 8, 4)
    assert run["block_use_peak"] == 2 / 64
    assert run["generated_per_second"] == pytest.approx(8 / run["wall"])
    assert run["tokens_per_second"] == pytest.approx(16 / run["wall"])
    assert 0 < run["ttft"]["median"] <= run["wall"]


def test_every_run_starts_with_an_empty_cache(engine):
    workload = Workload("by hand", [WorkloadRequest(list(range(40)), 2)])
    for policy in ("fcfs", "static", "fcfs"):
        assert throughput.run_trace(engine, workload, policy)["cached_prompt_tokens"] == 0
    assert engine.scheduler.config.enable_prefix_caching  # not left as "static" had it


def test_the_ratio_is_that_of_each_round(engine):
    workload = Workload("by hand", [WorkloadRequest([1, 2, 3], 2)])
    result = throughput.measure(engine, workload, ["fcfs", "static"], rounds=3)
    rates = [[run["generated_per_second"] for run in result["policies"][p]["runs"]] for p in ("fcfs", "static")]
    expected = [a / b for a, b in zip(*rates, strict=True)]
    assert result["ratio"]["rounds"] == pytest.approx(expected)
    assert result["ratio"]["median"] == pytest.approx(median(expected))


def test_bytes_of_a_decode_step(engine):
    kv_bytes_per_token = 2 * 2 * 1 * 32 * 4  # K and V, layers, KV heads, head_dim, bytes
    weight_bytes = 188_736 * 4
    assert latency._bytes_per_step(engine, 3, 50) == weight_bytes + 3 * 50 * kv_bytes_per_token


def test_latency_times_pure_decode_steps(engine, monkeypatch):
    """Prompts come in chunks beside sequences that decode already; the timed steps hold decodes only."""
    monkeypatch.setattr(latency, "read_bandwidth", lambda num_threads: 1e9)
    plans = []
    execute = engine.runner.execute
    monkeypatch.setattr(engine.runner, "execute", lambda plan, *rest: plans.append(plan) or execute(plan, *rest))
    latency.measure(engine, prompt_len=40, num_steps=3, batch_sizes=[8], repetitions=1, num_threads=1)
    assert all(sequence.samples and len(sequence.token_ids) == 1 for s in plans[-3:] for sequence in s.scheduled)
    assert [len(plan.scheduled) for plan in plans[-3:]] == [8, 8, 8]
    assert not engine.has_unfinished()


def test_choices_of_a_prompt_cost_one_prefill(engine, monkeypatch):
    monkeypatch.setattr(latency, "read_bandwidth", lambda num_threads: 1e9)
    tokens = []
    execute = engine.runner.execute
    monkeypatch.setattr(
        engine.runner, "execute", lambda plan, *rest: tokens.append(plan.num_tokens) or execute(plan, *rest)
    )
    sizes = {"prompt_len": 40, "num_steps": 1, "batch_sizes": [1], "num_threads": 1}
    result = latency.measure(engine, repetitions=2, num_choices=4, **sizes)
    assert tokens[:6] == [40] * 6  # one and four choices in turn, a warm-up and two repetitions: a step each
    assert result["num_choices"] == 4 and result["ttft_of_choices"]["median"] > 0
    assert latency.measure(engine, repetitions=1, **sizes)["ttft_of_choices"] is None


def test_a_batch_that_does_not_fit_is_refused(engine):
    with pytest.raises(ConfigError, match="more than max_num_seqs"):
        latency.measure(engine, prompt_len=4, num_steps=1, batch_sizes=[9], repetitions=1, num_threads=1)
    with pytest.raises(ConfigError, match="the pool has 64"):
        latency.measure(engine, prompt_len=200, num_steps=1, batch_sizes=[8], repetitions=1, num_threads=1)


def test_bandwidth_is_a_plausible_number():
    assert 1e8 < bandwidth.read_bandwidth(2, array_bytes=1 << 24, passes=2) < 1e13


def test_machine_facts():
    cores = machine.cores()
    assert 1 <= cores["usable"] <= cores["machine"]
    assert machine.packages()["numpy"] == np.__version__
    assert machine.package_version("no-such-package") is None
    assert machine.blas()["name"]
