"""Processing of logits and log-probabilities on the GPU against the host's, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="the CUDA compiler's packages are not installed")

from cuda_kernels import logprobs, processors
from cuda_kernels.toolchain.interpreter import run
from minipaged.config import SamplingParams
from minipaged.sampling.logprobs import token_logprobs
from minipaged.sampling.state import SamplingState

VOCAB_SIZE = 700
EOS = 3


class Lists:
    """The four lists of each row, one after the other."""

    def __init__(self):
        self.starts, self.tokens, self.values, self.in_prompt = [], [], [], []

    def add(self, tokens, values=None, in_prompt=None):
        tokens = list(tokens)
        self.starts += [len(self.tokens), len(self.tokens) + len(tokens)]
        self.tokens += tokens
        self.values += [0.0] * len(tokens) if values is None else list(values)
        self.in_prompt += [0] * len(tokens) if in_prompt is None else list(in_prompt)


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
    rows = [4, 0, 2, 5, 1]  # row 3 has no processor
    raw = rng.standard_normal((6, VOCAB_SIZE)).astype(np.float32)
    lists, penalties, want = Lists(), [], {}
    for row, each in zip(rows, params, strict=True):
        state = SamplingState(each, prompt, vocab_size=VOCAB_SIZE, seed=1, eos_token_ids=[EOS])
        for token in output:
            state.append(token)
        want[row] = raw[row].copy()
        for processor in state.processors:
            processor.apply(want[row], state.output_token_ids)
        seen = sorted({*prompt, *output})
        bias = each.logit_bias or {}
        lists.add(each.allowed_token_ids or [])
        lists.add([EOS] if len(output) < each.min_tokens else [])
        lists.add(bias, bias.values())
        lists.add(seen, [output.count(token) for token in seen], [token in prompt for token in seen])
        penalties.append([each.presence_penalty, each.frequency_penalty, each.repetition_penalty])
    processed = np.full_like(raw, 7)
    arrays = (
        np.array(rows, np.int32),
        np.array(lists.starts, np.int32),
        np.array(lists.tokens, np.int32),
        np.array(lists.values, np.float32),
        np.array(lists.in_prompt, np.int32),
        np.array(penalties, np.float32),
    )
    run(processors.build(), processors.launch_dims(len(rows))[0], (raw, processed, *arrays, VOCAB_SIZE), cc=cc)
    for row in rows:
        np.testing.assert_array_equal(processed[row], want[row])
    assert (processed[3] == 7).all()


@pytest.mark.parametrize("vocab_size, k, cc", [(5, 5, (7, 5)), (1300, 4, (8, 0)), (600, 0, (8, 0))])
def test_logprobs_ranks_and_the_likeliest(vocab_size, k, cc):
    rng = np.random.default_rng(41)
    logits = rng.integers(-40, 40, (4, vocab_size)).astype(np.float32) / 8  # many are equal
    rows = np.array([2, 0, 3], np.int32)
    tokens = np.array([0, logits[0].argmax(), vocab_size - 1], np.int32)
    logprob, rank = np.zeros(3), np.zeros(3, np.int32)
    top_tokens, top_logprobs = np.zeros((3, max(1, k)), np.int32), np.zeros((3, max(1, k)))
    arguments = (logits, rows, tokens, logprob, rank, top_tokens, top_logprobs, k, vocab_size)
    run(logprobs.build(), logprobs.launch_dims(3)[0], arguments, cc=cc)
    for r, row in enumerate(rows):
        want = token_logprobs(logits[row], int(tokens[r]), k)
        assert rank[r] == want.rank
        assert logprob[r] == pytest.approx(want.logprob, abs=1e-6)
        assert top_tokens[r, :k].tolist() == want.top[0]
        assert top_logprobs[r, :k].tolist() == pytest.approx(want.top[1], abs=1e-6)
