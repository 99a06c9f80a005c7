"""Comparisons with engines that are a few lines of Python, so that every number is known."""

import json
import random
import sys

import pytest

from minipaged.bench.compare import floors, peers, trace
from minipaged.bench.compare.floors import Rates
from minipaged.bench.compare.measure import measure
from minipaged.bench.compare.trace import Timing
from minipaged.bench.report import compare_text
from minipaged.cli.main import main
from minipaged.errors import BackendUnavailableError, BenchmarkError, ConfigError

FACTS = {
    "version": "1",
    "vocab_size": 64,
    "weights": "float32",
    "bytes_per_step": 1000,
    "kv_bytes_per_token": 10.0,
    "layer_parameters": 200,
    "head_parameters": 50,
    "attention_width": 4,
}
RUNNER = """\
import json
from serve import RunnerError, serve, take_options

class Runner:
    def __init__(self, model, limits, options):
        print("a library that prints to stdout")
        take_options(options, {{"mode": ""}})
        if model == "crash":
            raise SystemExit(3)
        if model == "missing":
            import a_package_that_is_not_there
        if model == "wrong":
            raise ValueError("bad magic")
        self.limits, self.model = limits, model

    def about(self):
        return {facts}

    def run(self, requests):
        generated = sum(r["max_tokens"] for r in requests)
        assert len(requests) <= self.limits["max_num_seqs"]
        assert generated + sum(len(r["prompt"]) for r in requests) <= self.limits["kv_tokens"]
        assert all(0 <= token < 64 for r in requests for token in r["prompt"])
        return {seconds}, {seconds} / 2, generated - (self.model == "short")

serve(Runner)
"""
LIMITS = {"num_threads": 1, "max_num_seqs": 32, "max_model_len": 1024, "kv_tokens": 100_000}


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """``spec(name, seconds=..., model=...)``: an engine whose every run takes so long, on paper."""
    (tmp_path / "serve.py").write_bytes((peers.RUNNERS / "serve.py").read_bytes())
    monkeypatch.setattr(peers, "RUNNERS", tmp_path)
    monkeypatch.setattr("minipaged.bench.compare.measure.PAUSE", 0)

    def make(name, seconds=1.0, model="good", **options):
        (tmp_path / f"run_{name}.py").write_text(RUNNER.format(facts=FACTS, seconds=seconds), encoding="utf-8")
        monkeypatch.setitem(peers.SCRIPTS, name, f"run_{name}.py")
        return peers.PeerSpec(name, name, sys.executable, model, options)

    return make


@pytest.fixture
def known_rates(monkeypatch):
    rates = Rates(bytes=1e4, operations=1e5, attention_operations=1e5)
    monkeypatch.setattr("minipaged.bench.compare.measure.measure_rates", lambda format, threads: rates)


def test_ratios_floors_and_losing_rows(spec, known_rates):
    ours, slow, fast = spec("ours", 2.0), spec("slow", 4.0), spec("fast", 1.0)
    result = measure([ours], [slow, fast], rounds=3, num_threads=1)
    assert result["engines"]["ours"]["metrics"]["ttft"]["values"] == [2000, 2000, 2000]
    assert result["engines"]["ours"]["metrics"]["decode"]["median"] == pytest.approx(64 / 1.0)
    assert result["engines"]["slow"]["peak_rss"] is None or result["engines"]["slow"]["peak_rss"] > 1 << 20
    rows = {(row["metric"], row["peer"]): row for row in result["ratios"]}
    assert len(rows) == 4 * 2
    for metric in ("ttft", "decode", "prefill", "users"):
        assert rows[metric, "slow"]["ratio"] == pytest.approx(2)
        assert rows[metric, "fast"]["rounds"] == pytest.approx([0.5] * 3)
        floor, row = result["floors"]["ours"][metric], rows[metric, "fast"]
        share = floor / row["value"] if metric == "ttft" else row["value"] / floor
        assert row["share_of_floor"] == pytest.approx(share)
        assert row["ratio_at_floor"] == pytest.approx(row["ratio"] / row["share_of_floor"])
    text = compare_text(result)
    assert text.count("lost") == 4
    json.dumps(result)


def test_no_round_begins_after_the_time_that_is_given(spec, known_rates):
    result = measure([spec("ours")], [spec("peer")], rounds=3, num_threads=1, max_seconds=0)
    assert result["rounds"] == 1
    assert [len(row["rounds"]) for row in result["ratios"]] == [1] * 4
    assert "medians of 1 rounds" in compare_text(result)


def test_the_floor_of_a_step_is_bytes_or_operations():
    slow_memory = Rates(bytes=1e3, operations=1e9, attention_operations=1e9)
    slow_arithmetic = Rates(bytes=1e12, operations=1e3, attention_operations=2e3)
    lengths = [(10, 3), (4, 2)]
    # Prompts: the weights. Then contexts of 11 and 5 tokens, then one of 12.
    by_bytes = (1000 + (1000 + 16 * 10) + (1000 + 12 * 10)) / 1e3
    assert floors.run_floor(lengths, FACTS, slow_memory) == pytest.approx(by_bytes)
    decoding = floors.run_floor(lengths, FACTS, slow_memory, prompts=False)
    assert decoding == pytest.approx(by_bytes - 1)
    products = 2 * (14 * 200 + 2 * 50) + 2 * 2 * 250 + 2 * 250
    attention = 4 * 4 * (55 + 10 + 16 + 12)
    expected = products / 1e3 + attention / 2e3
    assert floors.run_floor(lengths, FACTS, slow_arithmetic) == pytest.approx(expected)


def test_no_prompt_is_repeated_and_lengths_are():
    users = trace.METRICS[-1]
    lengths = trace.draw_lengths(users, seed=0)
    assert lengths == trace.draw_lengths(users, seed=0) != trace.draw_lengths(users, seed=1)
    assert len(lengths) == 32
    assert all(16 <= length <= 256 for pair in lengths for length in pair)
    rng = random.Random(0)
    prompts = [tuple(r["prompt"]) for _ in range(5) for r in trace.draw_requests(lengths, 49152, rng)]
    assert len(set(prompts)) == 5 * 32
    assert trace.limits([[(3, 4), (5, 6)], [(1, 20)]], 2) == {
        "num_threads": 2,
        "max_num_seqs": 2,
        "max_model_len": 21,
        "kv_tokens": 21,
    }


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("missing", "cannot load: No module named 'a_package_that_is_not_there'"),
        ("wrong", "ValueError: bad magic"),
        ("crash", "ended with status 3"),
    ],
)
def test_a_peer_that_lacks_something_says_what(spec, model, words):
    with pytest.raises(BackendUnavailableError, match=words):
        peers.Peer(spec("peer", model=model), LIMITS, timeout=30)


def test_unknown_options_of_a_peer_are_refused(spec):
    with pytest.raises(BackendUnavailableError, match="unknown option 'speed'"):
        peers.Peer(spec("peer", speed="11"), LIMITS, timeout=30)


def test_a_peer_that_does_less_work_is_no_comparison(spec):
    request = {"prompt": [1, 2], "max_tokens": 5}
    with peers.Peer(spec("peer", model="short"), LIMITS, timeout=30) as peer:
        with pytest.raises(BenchmarkError, match="generated 4 tokens where 5"):
            peer.run([request])
    with peers.Peer(spec("peer"), LIMITS, timeout=30) as peer:
        assert peer.run([request]) == Timing(1.0, 0.5, 5)
    assert peer._process.poll() == 0


def test_a_silent_peer_is_given_up(spec, tmp_path):
    peer = spec("peer")
    (tmp_path / "run_peer.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    with pytest.raises(BackendUnavailableError, match="raise --timeout"):
        peers.Peer(peer, LIMITS, timeout=0.2)


def test_peers_on_the_command_line():
    spec = peers.parse_peer(f"openvino={sys.executable}:/models/ov,name=int8,PERFORMANCE_HINT=LATENCY", "tiny")
    assert spec == peers.PeerSpec("int8", "openvino", sys.executable, "/models/ov", {"PERFORMANCE_HINT": "LATENCY"})
    assert peers.parse_peer(f"transformers={sys.executable}", "tiny").model == "tiny"
    for text, words in [
        ("openvino", "no known engine"),
        (f"fastest={sys.executable}", "openvino"),
        ("openvino=/no/python", "not a program"),
        (f"openvino={sys.executable},fast", "OPTION=VALUE"),
    ]:
        with pytest.raises(ConfigError, match=words):
            peers.parse_peer(text, "tiny")


def test_engines_need_names_of_their_own(spec):
    ours = spec("ours")
    with pytest.raises(ConfigError, match="name="):
        measure([ours], [ours], rounds=1, num_threads=1)


def test_our_runner_does_the_work_that_is_asked_for():
    limits = trace.limits([[(5, 4), (9, 2)]], 1)
    with peers.Peer(peers.own_spec("tiny-draft", "reference"), limits, timeout=60) as ours:
        timing = ours.run([{"prompt": [1, 2, 3, 4, 5], "max_tokens": 4}, {"prompt": [7] * 9, "max_tokens": 2}])
        about = ours.about
    assert timing.generated == 6
    assert 0 < timing.first < timing.wall
    parameters = about["layer_parameters"] + about["head_parameters"]
    norms = (2 * 2 + 1) * 64
    assert parameters + norms == 188_736
    assert about["bytes_per_step"] == 4 * 188_736


def test_the_command_without_peers(tmp_path, capsys, known_rates, monkeypatch):
    monkeypatch.setattr("minipaged.bench.compare.measure.PAUSE", 0)
    path = tmp_path / "result.json"
    arguments = ("--model", "tiny-draft", "--mode", "reference", "--metric", "ttft", "--rounds", "1")
    assert main(["bench", "compare", *arguments, "--num-threads", "1", "--json", str(path)]) == 0
    assert "TTFT at 128 tokens" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["engines"]["minipaged reference"]["metrics"]["ttft"]["median"] > 0
    assert result["ratios"] == []
