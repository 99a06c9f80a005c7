"""``prompt_logprobs`` say the same whatever is in the prefix cache, in whatever chunks, in any order."""

import numpy as np
import pytest

from minipaged import SamplingParams
from tests.support.engines import generate, make_engine, run_to_end

PROMPT = [(7 * i) % 1000 + 4 for i in range(70)]
PARAMS = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, ignore_eos=True)


def values(output):
    """Log-probabilities of the prompt's own tokens; the first has none."""
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return np.array([entry[token_id].logprob for entry, token_id in pairs])


@pytest.fixture(scope="module")
def alone():
    return values(generate(make_engine(enable_prefix_caching=False), PROMPT, PARAMS))


def test_they_are_the_models_log_softmax(alone):
    engine = make_engine()
    wanted = []
    for end in range(1, len(PROMPT)):  # what one token of lookahead gives for each prefix
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=1024)
        entry = generate(engine, PROMPT[:end], params).outputs[0].logprobs[0]
        wanted.append(entry[PROMPT[end]].logprob)
    np.testing.assert_allclose(alone, wanted, atol=1e-4)


def test_after_a_full_prefix_hit(alone):
    engine = make_engine()
    plain = PARAMS.clone(prompt_logprobs=None)
    generate(engine, PROMPT, plain)
    output = generate(engine, PROMPT, PARAMS)
    assert output.num_cached_tokens == 0  # every position was computed for its logits
    np.testing.assert_allclose(values(output), alone, atol=1e-4)
    assert generate(engine, PROMPT, plain).num_cached_tokens == 64  # and what it computed is found again


@pytest.mark.parametrize("chunk", [1, 3, 16, 69])
def test_in_chunks(alone, chunk):
    engine = make_engine(max_num_batched_tokens=chunk, max_num_seqs=1)
    np.testing.assert_allclose(values(generate(engine, PROMPT, PARAMS)), alone, atol=1e-4)


def test_preempted_and_in_company(alone):
    """A pool for little more than one request: two compete, are preempted, and report each position once."""
    engine = make_engine(num_blocks=20, block_size=8, max_num_batched_tokens=40, max_num_seqs=4)
    params = PARAMS.clone(max_tokens=40)
    ids = [engine.add_request(PROMPT, params) for _ in range(3)]
    outputs = run_to_end(engine)
    assert engine.stats().num_preemptions > 0
    for request_id in ids:
        np.testing.assert_allclose(values(outputs[request_id]), alone, atol=1e-4)
