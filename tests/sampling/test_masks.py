"""A row's tokens under a mask of bits: the ones of the plain way, by which a mask becomes infinities in a whole row."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.model.loader import load_model
from minipaged.ops.cpu import masks as cpu_masks
from minipaged.ops.cpu.draws import RowDrawer
from minipaged.ops.sampling import few
from minipaged.sampling import grammar, masks
from minipaged.sampling.draw import draw
from minipaged.sampling.philox import uniform
from minipaged.sampling.processors import LogitsProcessor
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.state import SamplingState


class Bits(LogitsProcessor):
    """Masks the tokens without a bit; says so in bits or, if ``plain``, only does it."""

    def __init__(self, allowed: np.ndarray, plain: bool = False):
        self._allowed, self._plain = allowed, plain

    def apply(self, row, output_token_ids):
        row[~self._allowed] = -np.inf

    def allowed_bits(self):
        return None if self._plain else np.packbits(self._allowed, bitorder="little")


def plain_candidates(row, largest, params):
    """As filters.candidates was before it avoided exp's slow cases; without top_k, top_p and min_p."""
    ids = None
    if np.count_nonzero(row > -np.inf) < len(row) // 4:
        ids = np.flatnonzero(row > -np.inf)
        row = row[ids]
    weights = np.subtract(row, largest, dtype=np.float64)
    weights /= params.temperature
    return ids, np.exp(weights)


CPU = {name: getattr(cpu_masks, name) for name in ("mask_row", "few_allowed")} | {"draw_row": RowDrawer(5000)}


def drawn(sampler, logits, allowed, params, seeds, plain):
    """A token a seed, or why there is none."""
    states = [SamplingState(params, [1], vocab_size=len(allowed), seed=seed) for seed in seeds]
    for state in states:
        state.processors = [Bits(allowed, plain)]
    found = sampler.sample(np.repeat(logits[None], len(seeds), axis=0), states)
    return [token.error or (token.token_id, token.logprob) for token in found]


@pytest.mark.parametrize("passes", [{}, CPU], ids=["numpy", "cpu"])
@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([7, 8, 33, 257, 1024, 5000]),
    st.sampled_from([0.0, 0.001, 0.02, 0.2, 0.25, 0.3, 0.7, 0.999, 1.0]),
    st.sampled_from([0.0, 1e-30, 0.05, 0.8, 1.0, 50.0]),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 600, "top_p": 0.5}, {"logprobs": 2}]),
    st.integers(0, 2**32 - 1),
)
def test_tokens_under_a_random_mask_are_those_of_the_plain_way(passes, vocab_size, share, temperature, filters, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-200, 200, vocab_size) / 8).astype(np.float32)  # eighths tie often
    allowed = rng.random(vocab_size) < share
    params = SamplingParams(temperature=temperature, **filters)
    sampler = Sampler(vocab_size, **passes)
    found = drawn(sampler, logits, allowed, params, range(20), plain=False)
    assert found == drawn(sampler, logits, allowed, params, range(20), plain=True)
    if not allowed.any():
        assert all("every token is masked" in error for error in found)
    elif not filters and temperature:
        row = np.where(allowed, logits, np.float32(-np.inf))
        with np.errstate(over="ignore"):
            ids, weights = plain_candidates(row, float(row.max()), params)
        indices = [draw(weights, number) for number in uniform(range(20), [1] * 20)]
        assert [token_id for token_id, _ in found] == [index if ids is None else ids[index] for index in indices]


@pytest.mark.parametrize("backend", [masks, cpu_masks], ids=["numpy", "cpu"])
@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_what_few_bits_and_many_bits_leave(backend, vocab_size, share, seed):
    rng = np.random.default_rng(seed)
    row = rng.standard_normal(vocab_size).astype(np.float32)
    bits = np.packbits(rng.random(-(-vocab_size // 8) * 8) < share, bitorder="little")  # also beyond the vocabulary
    allowed = np.unpackbits(bits, count=vocab_size, bitorder="little").astype(bool)
    found = backend.few_allowed(row, bits)
    assert (found is not None) == few(np.count_nonzero(allowed), vocab_size)
    if found is not None:
        assert found[0].tolist() == np.flatnonzero(allowed).tolist() and (found[1] == row[allowed]).all()
    out = np.empty_like(row)
    likeliest = backend.mask_row(row, bits, out)
    assert (out == np.where(allowed, row, -np.inf)).all()
    assert likeliest == (out.argmax() if allowed.any() else 0)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 17},
        "text": {"type": "string"},
        "key": {"type": "string", "pattern": "^[a-z]{1,13}-[0-9]+$"},
        "kind": {"enum": ["long enough to be forced", "short"]},
        "sizes": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
    },
    "required": ["name", "text", "key", "kind", "sizes"],
    "additionalProperties": False,
}


def test_masks_are_those_without_slices_and_forced_tokens_those_of_masks():
    llguidance = pytest.importorskip("llguidance")
    model = load_model("tiny")
    size, eos = model.config.vocab_size, model.config.eos_token_ids
    text = grammar._json_schema(llguidance.LLMatcher, json.dumps(SCHEMA))
    compiler = grammar.GrammarCompiler(model.tokenizer, size, eos)
    plain = llguidance.LLTokenizer(model.tokenizer.backend.to_str(), n_vocab=size, eos_token=list(eos), slices=[])
    rng, sizes, num_forced = np.random.default_rng(0), set(), 0
    for _ in range(12):
        ours = compiler.compile({"json": SCHEMA})
        other = llguidance.LLMatcher(plain, text, log_level=0)
        for _ in range(60):
            forced, bits = ours.forced(), ours.allowed_bits()
            if bits is None:
                assert forced is None
                break
            assert bits.tobytes() == other.compute_bitmask()[: len(bits)]
            allowed = np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little"))
            sizes.add(len(allowed))
            num_forced += forced is not None
            assert forced is None or allowed.tolist() == [forced]
            token_id = int(rng.choice(allowed))
            ours.append(token_id)
            assert other.consume_token(token_id)
    assert min(sizes) == 1 and max(sizes) > size // 2 and num_forced > 100
