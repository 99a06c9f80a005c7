"""Sampling on the device from a step's logits: the tokens of the host's sampler, however the asks are carried."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.support.cuda_devices import each_device  # noqa: F401

# isort: split

from minipaged.config import SamplingParams
from minipaged.errors import NumericalError
from minipaged.model import cuda_decoder
from minipaged.ops.cuda import memory
from minipaged.ops.cuda.asks import max_words, pack, turns
from minipaged.ops.cuda.inputs import MAX_COPIES
from minipaged.ops.sampling import Ask, Draw, Edits
from minipaged.sampling.device_sampler import DeviceLogits, DeviceSampler
from minipaged.sampling.processors import LogitsProcessor
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState
from minipaged.sampling.step_logits import DrawOrder, HostLogits, PromptOrder
from tests.support.cuda_machine import Machine
from tests.support.random_params import random_options

LENGTH = 20


@pytest.fixture
def machine(device):
    return Machine(device, "llama_gqa")


def state_of(machine: Machine, rng: random.Random, **options) -> SamplingState:
    """A sequence somewhere on its way, with the parameters of a trace or the ``options``."""
    vocab_size = machine.config.vocab_size
    params = options or random_options(rng, greedy=0.3)
    if not options and rng.random() < 0.3:
        params |= {"allowed_token_ids": rng.sample(range(vocab_size), 9), "logit_bias": {1: 2.5, 7: -100}}
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 30))]
    state = SamplingState(
        SamplingParams(**params), prompt, vocab_size=vocab_size, eos_token_ids=(2,), seed=rng.randrange(2**64)
    )
    for _ in range(rng.randint(0, 5)):
        state.append(rng.randrange(vocab_size))
    return state


def logits_both(machine: Machine, draws, prompts=None, prompt_rows=None, sample_rows=None):
    """The same step on host and device: ``(HostLogits, DeviceLogits, DeviceSampler)``; one row for each order."""
    prompts, prompt_rows = prompts or {}, prompt_rows or {}
    sample_rows = list(range(len(draws))) if sample_rows is None else sample_rows
    ids = np.random.default_rng(5).integers(0, machine.config.vocab_size, LENGTH).astype(np.int32)
    batch = machine.batch([(ids, machine.blocks(LENGTH), 0, LENGTH)])
    logits = machine.decoder.forward(batch, machine.cache)
    sampler = Sampler(machine.config.vocab_size)
    device_sampler = DeviceSampler(sampler)
    prepared = device_sampler.prepare(sample_rows, draws, prompt_rows, prompts)
    answers = machine.decoder.sample(batch, machine.cache, prepared.asks)
    found = DeviceLogits(sampler, prepared, answers, sample_rows, prompt_rows)
    return HostLogits(sampler, logits, sample_rows, prompt_rows), found, device_sampler


def assert_same_tokens(expected, found):
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    for a, b in zip(expected, found, strict=True):
        assert (a.rank, a.error) == (b.rank, b.error)
        assert b.logprob == pytest.approx(a.logprob, abs=1e-6)
        assert (a.top is None) == (b.top is None)
        if a.top is not None:
            assert b.top[0] == a.top[0] and b.top[1] == pytest.approx(a.top[1], abs=1e-6)


@pytest.mark.parametrize("rows_at_once", [7, pytest.param(256, marks=pytest.mark.slow)])
def test_the_tokens_are_the_hosts(device, monkeypatch, rows_at_once):
    """20 rows, some drawn from several times; with fewer rows at once, in several turns."""
    monkeypatch.setattr(memory, "MAX_LOGITS_ROWS", rows_at_once)
    machine, rng = Machine(device, "llama_gqa"), random.Random(8)
    draws = [DrawOrder([state_of(machine, rng) for _ in range(rng.choice([1, 1, 3]))]) for _ in range(LENGTH)]
    host, found, sampler = logits_both(machine, draws)
    rows = [row for row, order in enumerate(draws) for _ in order.states]
    states = [state for order in draws for state in order.states]
    assert_same_tokens(host.draw(rows, states), found.draw(rows, states))
    assert sampler.num_rows_on_host == 0 == len({row for row in rows} - set(range(LENGTH)))


def test_drafts_are_drawn_ahead(machine):
    """Behind each guess as if it were right; the state is left as it was."""
    rng = random.Random(9)
    options = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.4, "min_tokens": 2, "max_tokens": 50}
    state, guesses = state_of(machine, rng, **options), [5, 9, 5]
    before = list(state.output_token_ids)
    host, found, _ = logits_both(machine, [DrawOrder([state], draft_token_ids=guesses)], sample_rows=[4])
    assert state.output_token_ids == before
    for depth in range(4):
        assert_same_tokens(host.draw([4 + depth], [state]), found.draw([4 + depth], [state]))
        state.append([*guesses, 0][depth])


def test_prompts_and_beams(machine):
    rng = random.Random(10)
    plain = state_of(machine, rng, temperature=1, logprobs=None, use_beam_search=True, n=2)
    edited = state_of(machine, rng, temperature=1, repetition_penalty=1.5, logprobs=3, use_beam_search=True, n=2)
    targets = [rng.randrange(machine.config.vocab_size) for _ in range(12)]
    host, found, sampler = logits_both(
        machine,
        [DrawOrder([plain], num_candidates=5), DrawOrder([edited], num_candidates=5)],
        {"r": PromptOrder([0] * 3 + targets, 4, num_known=4)},
        {"r": (2, slice(1, 13))},
        [14, 15],
    )
    # Positions 2 and 3 are known, so rows 1 and 2 are not asked about.
    expected = host.prompt_logprobs(range(3, 13), targets[2:], 4)
    for a, b in zip(expected, found.prompt_logprobs(range(3, 13), targets[2:], 4), strict=True):
        assert (a.token_id, a.rank, a.top[0]) == (b.token_id, b.rank, b.top[0])
        assert [b.logprob, *b.top[1]] == pytest.approx([a.logprob, *a.top[1]], abs=1e-6)
    with pytest.raises(KeyError):
        found.prompt_logprobs(range(2, 3), targets[1:2], 4)
    for row, state in ((14, plain), (15, edited)):
        beams, theirs = host.continuations(row, state, 5), found.continuations(row, state, 5)
        assert_same_tokens(beams, theirs)
        assert [b.log_weight for b in theirs] == pytest.approx([a.log_weight for a in beams], abs=1e-6)
    assert sampler.num_rows_on_host == 1


def test_what_comes_to_the_host(machine):
    """More likeliest tokens than are found on the device, for a draw and for a prompt."""
    state = state_of(machine, random.Random(11), temperature=0.8, seed=1, logprobs=65)
    host, found, sampler = logits_both(
        machine, [DrawOrder([state])], {"r": PromptOrder([0, 1, 2], 70)}, {"r": (0, slice(0, 2))}, [7]
    )
    assert found.draw([7], [state]) == host.draw([7], [state])
    assert found.prompt_logprobs(range(0, 2), [1, 2], 70) == host.prompt_logprobs(range(0, 2), [1, 2], 70)
    assert sampler.num_rows_on_host == 3


def test_errors_are_the_hosts(machine):
    """No token left, a bias beyond all bounds; then a model that is damaged."""
    rng = random.Random(12)
    nothing = state_of(machine, rng, temperature=0, allowed_token_ids=[2], min_tokens=40, max_tokens=50)
    overflow = state_of(machine, rng, temperature=1, seed=2)
    overflow.processors = [_Infinite()]
    states = [nothing, overflow, state_of(machine, rng, temperature=1, seed=2, logprobs=1)]
    rows, draws = [0, 1, 2], [DrawOrder([state]) for state in states]
    host, found, _ = logits_both(machine, draws)
    tokens = found.draw(rows, states)
    assert [bool(token.error) for token in tokens] == [True, True, False]
    assert_same_tokens(host.draw(rows, states), tokens)

    norm = machine.decoder.weights.final_norm.weight
    norm.fill(np.full(norm.shape, np.nan))
    beam = state_of(machine, rng, temperature=1, use_beam_search=True, n=2)
    draws.append(DrawOrder([beam], num_candidates=4))
    prompts, prompt_rows = {"r": PromptOrder([3, 4], 1)}, {"r": (0, slice(9, 10))}
    host, found, _ = logits_both(machine, draws, prompts, prompt_rows)
    assert all("NaN or infinity" in token.error for token in found.draw(rows, states))
    assert found.continuations(3, beam, 4) == host.continuations(3, beam, 4)
    with pytest.raises(NumericalError, match="prompt token 4"):
        found.prompt_logprobs(range(9, 10), [4], 1)


class _Infinite(LogitsProcessor):
    """A bias that no request could have."""

    def apply(self, row, output_token_ids):
        row[3] = np.inf

    def describe(self, edits, output_token_ids):
        edits.biased, edits.bias = np.array([3]), np.array([np.inf], np.float32)
        return True


class _Even(LogitsProcessor):
    """Masks tokens that are odd."""

    judges = True

    def __init__(self, vocab_size: int):
        self._bits = np.full(-(-vocab_size // 8), 0b01010101, np.uint8)

    def apply(self, row, output_token_ids):
        row[1::2] = -np.inf

    def allows(self, token_id):
        return token_id % 2 == 0

    def describe(self, edits, output_token_ids):
        edits.bits = self._bits
        return True


def test_what_is_drawn_until_it_may_follow(machine):
    """Of 20 rows, alone and with drafts behind them: the tokens, log-probabilities and ways of the host."""
    rng = random.Random(14)
    states = [state_of(machine, rng, temperature=1.5, seed=seed, logprobs=seed % 3 or None) for seed in range(LENGTH)]
    for state in states:
        state.processors = [_Even(machine.config.vocab_size)]
        assert state.rejects
    host, found, sampler = logits_both(machine, [DrawOrder([state]) for state in states])
    expected = host.draw(list(range(LENGTH)), states)
    assert all(token.token_id % 2 == 0 for token in expected)
    tries = {host.logits[row].argmax() % 2 for row in range(LENGTH)}
    assert tries == {0, 1} and sampler.num_rows_on_host == 0
    assert_same_tokens(expected, found.draw(list(range(LENGTH)), states))


def test_graphs_sample_what_their_launches_sample(device, monkeypatch):
    """Three sequences padded to four; parameters change from step to step, and blocks move between steps."""
    results = []
    for use_graphs, moves in ((False, {}), (True, {}), (True, {6: (0, 1), 7: (1, 0)})):
        machine, rng = Machine(device, "llama_gqa", use_graphs=use_graphs), random.Random(13)
        ids, rows = np.arange(9, dtype=np.int32), [0, 1, 2]
        tables = [machine.blocks(9) for _ in rows]
        machine.step([(ids, table, 0, 5) for table in tables])
        tokens = []
        for position in range(5, 8):
            copies = []
            if position in moves:
                sequence, block = moves[position]
                (spare,) = machine.blocks(1)
                copies = [(int(tables[sequence][block]), int(spare))]
                tables[sequence][block] = spare
            # The last is one more than are sent with a step, and goes by itself.
            monkeypatch.setattr(cuda_decoder, "MAX_COPIES", 1 if position < 7 else 0)
            states = [state_of(machine, rng) for _ in tables]
            if position % 2:  # three asks for one of them
                states[1] = state_of(machine, rng, temperature=1.0, seed=position)
                states[1].processors = [_Even(machine.config.vocab_size)]
                assert states[1].rejects
            batch = machine.batch([(ids, table, position, position + 1) for table in tables])
            sampler = DeviceSampler(Sampler(machine.config.vocab_size))
            prepared = sampler.prepare(rows, [DrawOrder([state]) for state in states], {}, {})
            answers = machine.decoder.sample(batch, machine.cache, prepared.asks, copies)
            tokens += DeviceLogits(sampler.sampler, prepared, answers, rows, {}).draw(rows, states)
        assert all(token.error is None for token in tokens)
        results.append(tokens)
    assert results[0] == results[1] == results[2]
    assert {key[:2] for key in machine.decoder._graphs} == {(4, 4), (4, 8)}


def test_turns_hold_what_fits():
    edits = Edits(masked=[np.arange(10)], bits=np.zeros(9, np.uint8))
    assert edits.num_words == 13
    rows = [0, 0, 0, 1, 3, 4, 9]
    asks = [Ask(row, Draw(edits=edits)) for row in rows]
    assert [(t.begin, t.end, t.first_row, t.num_rows) for t in turns(asks, 4, 1000)] == [
        (0, 4, 0, 2),
        (4, 6, 3, 2),
        (6, 7, 9, 1),
    ]
    assert [(t.begin, t.end) for t in turns(asks, 100, 30)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert not list(turns([], 4, 10))
    packed = pack(asks[:2], 0, 2, 30)
    assert len(packed.words) == 26 and packed.fields["starts"].min() == 4, "they end where the memory does"


def test_one_request_always_fits():
    """The most that a request may ask for, of a vocabulary of any size, beside the most copies."""
    for vocab_size in (10, 1000, 200_000):
        every = np.arange(vocab_size)
        edits = Edits(every, [every, every], every, every, every, every, bits=np.zeros(-(-vocab_size // 8), np.uint8))
        assert edits.num_words + 2 * MAX_COPIES <= max_words(vocab_size)
