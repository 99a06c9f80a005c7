"""Draws from all tokens until one may follow: the law of a draw under the mask, and the definition, written plainly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.model.loader import load_model
from minipaged.ops.cpu import masks as cpu_masks
from minipaged.ops.cpu.draws import RowDrawer
from minipaged.ops.sampling import few
from minipaged.sampling import grammar
from minipaged.sampling.draw import draw
from minipaged.sampling.logprobs import token_logprobs
from minipaged.sampling.philox import uniform
from minipaged.sampling.processors import LogitsProcessor
from minipaged.sampling.rejection import TRIES, place
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState
from tests.sampling.test_draw import chi_square_limit
from tests.support.schemas import schemas

CPU = {name: getattr(cpu_masks, name) for name in ("mask_row", "few_allowed", "likeliest_allowed")}
CPU["draw_row"] = RowDrawer(5000)


class Judge(LogitsProcessor):
    """Masks the tokens without a bit, and says of each whether it has one; counts the masks."""

    judges = True

    def __init__(self, allowed: np.ndarray):
        self.allowed, self.num_masks = allowed, 0

    def apply(self, row, output_token_ids):
        self.num_masks += 1
        row[~self.allowed] = -np.inf

    def allows(self, token_id):
        return bool(self.allowed[token_id])


def state_of(processors, params, seed=0, prompt=(1, 2), vocab_size=24, **options) -> SamplingState:
    state = SamplingState(params, list(prompt), vocab_size=vocab_size, seed=seed, **options)
    state.processors += processors
    return state


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("likeliest_is_allowed", [True, False])
def test_the_law_is_that_of_a_draw_under_the_mask(temperature, likeliest_is_allowed):
    rng = np.random.default_rng(3)
    row = (rng.standard_normal(24) * 0.7).astype(np.float32)
    allowed = rng.random(24) < 0.4
    allowed[row.argmax()] = likeliest_is_allowed
    weights = np.exp(row.astype(np.float64) / temperature)
    share = weights[allowed].sum() / weights.sum()
    assert 0.03 < share < 0.75, "every way to a token should be met often"
    judge, params = Judge(allowed), SamplingParams(temperature=temperature)
    counts, num_draws, sampler = np.zeros(24), 20_000, Sampler(24)
    for first in range(0, num_draws, 1000):
        states = [state_of([judge], params, seed) for seed in range(first, first + 1000)]
        for token in sampler.sample(np.repeat(row[None], 1000, axis=0), states):
            counts[token.token_id] += 1
    assert not counts[~allowed].any()
    expected = weights[allowed] / weights[allowed].sum() * num_draws
    assert ((counts[allowed] - expected) ** 2 / expected).sum() < chi_square_limit(allowed.sum() - 1)
    masked = (1 - share) ** TRIES if likeliest_is_allowed else 1
    assert judge.num_masks == pytest.approx(masked * num_draws, abs=4 * np.sqrt(num_draws))


def plain_sample(raw, params, seed, position, allowed, likeliest_suffices):
    """The token by the definition; ``allowed`` is the mask. ``likeliest_suffices``: a greedy draw takes it."""
    likeliest = int(raw.argmax())
    if params.greedy:
        return likeliest if likeliest_suffices else int(np.where(allowed, raw, -np.inf).argmax())
    numbers = [uniform([seed], [place(position, i)])[0] for i in range(TRIES + 1)]

    def drawn(ids, number):
        exponents = (raw[ids].astype(np.float64) - np.float64(raw[ids].max())) / params.temperature
        return int(ids[draw(np.exp(exponents), number)])

    if allowed[likeliest]:
        for number in numbers[:TRIES]:
            token_id = drawn(np.arange(len(raw)), number)
            if allowed[token_id]:
                return token_id
    ids = np.flatnonzero(allowed)
    if few(len(ids), len(raw)):
        return drawn(ids, numbers[TRIES])
    weights = np.exp((raw.astype(np.float64) - raw[allowed].max()) / params.temperature) * allowed
    return draw(weights, numbers[TRIES])


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.mark.parametrize("passes", [{}, CPU], ids=["numpy", "cpu"])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
def test_tokens_are_those_of_the_mask_of_every_step(model, passes, temperature):
    """Through whole texts of several schemas, beside each other; every mask is made for the expectation."""
    pytest.importorskip("llguidance")
    size, eos = model.config.vocab_size, model.config.eos_token_ids
    compiler = grammar.GrammarCompiler(model.tokenizer, size, eos)
    params = SamplingParams(temperature=temperature, logprobs=2)
    rng, sampler, ways = np.random.default_rng(5), Sampler(size, **passes), set()
    states = [
        SamplingState(params, [1], vocab_size=size, seed=i, grammar=compiler.compile({"json": json.dumps(schema)}))
        for i, (_, schema) in enumerate(schemas()[:12])
    ]
    witnesses = [state.processors[0].fork() for state in states]
    for _ in range(40):
        logits = (rng.standard_normal((len(states), size)) * 3).astype(np.float32)
        going_on = [not witness._ended() for witness in witnesses]
        for row, witness in zip(logits, witnesses, strict=True):
            bits = None if witness._ended() else witness.allowed_bits()
            if bits is not None and rng.random() < 0.7:  # else the likeliest may hardly ever follow
                allowed = np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little"))
                row[rng.choice(allowed)] += rng.uniform(4, 12)
        for i, token in enumerate(sampler.sample(logits, states)):
            if not going_on[i]:
                assert token.token_id in eos
                continue
            witness, seed, position = witnesses[i], states[i].seed, states[i].position
            allowed = np.unpackbits(witness.allowed_bits(), count=size, bitorder="little").view(bool)
            likeliest = int(logits[i].argmax())
            suffices = bool(witness._matcher.deep_copy().validate_tokens([likeliest]))
            assert suffices == allowed[likeliest] or witness.forced() is not None
            expected = plain_sample(logits[i], params, seed, position, allowed, suffices)
            assert token.token_id == expected
            ways.add((bool(allowed[likeliest]), expected == likeliest))
            facts = token_logprobs(logits[i], expected, 2)
            assert (token.logprob, token.rank, token.top) == (facts.logprob, facts.rank, facts.top)
            for told in (states[i], witness):
                told.append(expected)
    assert ways == {(True, True), (False, False)} | ({(True, False)} if temperature else set())


def test_what_looks_at_other_tokens_makes_the_mask():
    """top_k, top_p and min_p, and processors that change logits; the number of the draw is the first."""
    row = np.linspace(0, 2, 24).astype(np.float32)
    allowed = np.arange(24) % 2 == 1
    filtered = {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}
    for options in (*filtered, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.2}):
        params = SamplingParams(temperature=1.0, **options)
        state = state_of([Judge(allowed)], params, seed=7)
        assert not state.rejects
        masked = row.copy()
        for processor in state.processors:
            processor.apply(masked, [])
        filters = {name: value for name, value in options.items() if name in ("top_k", "top_p", "min_p")}
        other = state_of([], SamplingParams(temperature=1.0, **filters), seed=7)
        expected = Sampler(24).sample(np.maximum(masked, -1e30)[None], [other])[0].token_id
        assert Sampler(24).sample(row[None], [state])[0].token_id == expected
    assert state_of([Judge(allowed)], SamplingParams(temperature=1.0)).rejects
    assert not state_of([Judge(allowed)], SamplingParams(temperature=0)).rejects
    assert not state_of([], SamplingParams(temperature=1.0)).rejects


def test_margins_tell_every_draw():
    """A disturbance below the margin leaves the token, whichever way it came about."""
    rng, sampler, near = np.random.default_rng(11), Sampler(24), 0
    for seed in range(300):
        row = rng.standard_normal((1, 24)).astype(np.float32)
        state = state_of([Judge(rng.random(24) < 0.5)], SamplingParams(temperature=0.8), seed)
        state.processors[0].allowed[3] = True
        token = sampler.sample(row, [state], with_margins=True)[0]
        amount = min(token.margin, 1e-2) / 8
        near += token.margin < 1e-2
        disturbed = row + rng.uniform(-amount, amount, (1, 24)).astype(np.float32)
        assert token.token_id == sampler.sample(row, [state])[0].token_id
        assert token.token_id == sampler.sample(disturbed, [state])[0].token_id
    assert near > 20


def test_draws_at_a_position_have_their_own_numbers():
    places = [place(position, number) for position in range(100) for number in range(TRIES + 1)]
    numbers = uniform([9] * len(places), places).reshape(100, TRIES + 1)
    assert len(np.unique(numbers)) == numbers.size
    assert (numbers[:, 0] == uniform([9] * 100, range(100))).all(), "the first is that of any draw"
    assert np.abs(np.corrcoef(numbers.T)[np.triu_indices(TRIES + 1, 1)]).max() < 0.35
