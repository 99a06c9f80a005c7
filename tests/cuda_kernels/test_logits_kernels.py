"""Processing of logits and log-probabilities on the GPU against the host's, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import logprobs, processors
from cuda_kernels.toolchain.interpreter import run
from minipaged.config import SamplingParams
from minipaged.ops.cuda.asks import pack
from minipaged.ops.sampling import Ask, Draw, Edits
from minipaged.sampling.logprobs import token_logprobs
from minipaged.sampling.processors import LogitsProcessor
from minipaged.sampling.state import SamplingState

VOCAB_SIZE = 700
EOS = 3


@pytest.mark.parametrize("cc", [(7, 5), (8, 0)])
def test_processors_do_what_the_host_does(cc):
    rng = np.random.default_rng(40)
    prompt, output = rng.integers(0, VOCAB_SIZE, 30).tolist(), rng.integers(0, VOCAB_SIZE, 40).tolist()
    output[5:9] = output[:4]  # some more than once
    params = [
        SamplingParams(allowed_token_ids=[1, 5, 650], logit_bias={5: 2.5}),
        SamplingParams(min_tokens=100, max_tokens=200, logit_bias={7: -3.25, EOS: 5.0}),
        SamplingParams(presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.3),
        SamplingParams(repetition_penalty=0.8, logit_bias={prompt[0]: 9.0}),
        SamplingParams(frequency_penalty=-0.4, min_tokens=50, max_tokens=200),
    ]
    rows = [4, 0, 2, 2, 1]
    raw = rng.standard_normal((5, VOCAB_SIZE)).astype(np.float32)
    asks, want = [Ask(3)], []
    for row, each in zip(rows, params, strict=True):
        state = SamplingState(each, prompt, vocab_size=VOCAB_SIZE, seed=1, eos_token_ids=[EOS])
        state.processors.append(LastDigit(4))
        for token in output:
            state.append(token)
        want.append(raw[row].copy())
        edits = Edits()
        for processor in state.processors:
            processor.apply(want[-1], state.output_token_ids)
            assert processor.describe(edits, state.output_token_ids)
        asks.append(Ask(row, Draw(edits=edits)))
    packed = pack(asks, 0, 7, 9000)  # the last slot stays empty
    words = np.zeros(9000, np.int32)
    words[9000 - len(packed.words) :] = packed.words
    assert len(packed.words) <= sum(ask.draw.edits.num_words for ask in asks[1:])
    names = ("rows", "starts", "masks", "penalties")
    lists = (*(packed.fields[name] for name in names), words, words.view(np.float32))
    processed = np.full((7, VOCAB_SIZE), 7, np.float32)
    run(processors.build(), processors.launch_dims(7)[0], (raw, processed, *lists, VOCAB_SIZE), cc=cc)
    for found, expected in zip(processed[1:], want, strict=False):
        np.testing.assert_array_equal(found, expected)
    assert (processed[[0, 6]] == 7).all()


@pytest.mark.parametrize("ended", [False, True])
def test_a_bit_for_each_token(ended):
    rng = np.random.default_rng(42)
    raw = rng.standard_normal((1, 77)).astype(np.float32)
    may_follow = rng.random(77) < 0.4
    bits = np.packbits(may_follow, bitorder="little")
    packed = pack([Ask(0, Draw(edits=Edits(bits=bits, ended=ended)))], 0, 1, 3)
    processed = np.zeros_like(raw)
    names = ("rows", "starts", "masks", "penalties")
    lists = (*(packed.fields[name] for name in names), packed.words, packed.words.view(np.float32))
    run(processors.build(), processors.launch_dims(1)[0], (raw, processed, *lists, 77))
    np.testing.assert_array_equal(processed, np.where(may_follow, 0 * raw if ended else raw, -np.inf))


class LastDigit(LogitsProcessor):
    """Lets only tokens follow whose number ends with a digit up to ``highest``: what a grammar does, without one."""

    def __init__(self, highest):
        self._may_follow = np.arange(VOCAB_SIZE) % 10 <= highest

    def apply(self, row, output_token_ids):
        row[~self._may_follow] = -np.inf

    def describe(self, edits, output_token_ids):
        edits.bits = np.packbits(self._may_follow, bitorder="little")
        return True


@pytest.mark.parametrize("vocab_size, k, cc", [(5, 5, (7, 5)), (1300, 4, (8, 0)), (600, 0, (8, 0))])
def test_logprobs_ranks_and_the_likeliest(vocab_size, k, cc):
    rng = np.random.default_rng(41)
    logits = rng.integers(-40, 40, (4, vocab_size)).astype(np.float32) / 8  # many are equal
    rows, tokens = [2, 0, 3], [0, int(logits[0].argmax()), vocab_size - 1]
    token = np.full((5, 2), -9, np.int32)
    token[2, 0] = tokens[2]  # drawn; the others are given
    facts = np.full((5, 4), -1, np.int32)
    facts[:3] = [[2, tokens[0], k, 0], [0, tokens[1], k, k], [3, -1, k, 2 * k]]
    facts[4] = 1, 0, 0, 0
    logits[1, 4] = -np.inf
    logprob, rank, top = np.zeros(5), np.full(5, -9, np.int32), np.zeros((max(1, 3 * k), 2))
    run(logprobs.build(), logprobs.launch_dims(5)[0], (logits, facts, token, logprob, rank, top, vocab_size), cc=cc)
    for r, row in enumerate(rows):
        want = token_logprobs(logits[row], tokens[r], k)
        assert rank[r] == want.rank
        assert logprob[r] == pytest.approx(want.logprob, abs=1e-6)
        assert top[r * k : r * k + k, 0].tolist() == want.top[0]
        assert top[r * k : r * k + k, 1].tolist() == pytest.approx(want.top[1], abs=1e-6)
    assert rank[3:].tolist() == [-9, 0], "nobody asked; not finite"
