"""Beam search inside the engine: company, tiny pools, preemption, aborts, penalties, refusals."""

import random

import pytest

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidParameterError, PoolTooSmallError
from tests.support.engines import assert_all_blocks_back, generate, make_engine, nan_logits, run_to_end

BEAMS = SamplingParams(n=3, use_beam_search=True, max_tokens=10, ignore_eos=True)
PROMPT = list(range(20, 50))


@pytest.fixture(scope="module")
def engine():
    return make_engine(block_size=4)


def facts(output):
    return [(c.token_ids, c.text, c.finish_reason, pytest.approx(c.beam_score, abs=1e-4)) for c in output.outputs]


def test_scores_follow_from_logprobs(engine):
    output = generate(engine, PROMPT, BEAMS.clone(logprobs=2, length_penalty=0.7))
    assert [c.index for c in output.outputs] == [0, 1, 2]
    for completion in output.outputs:
        chosen = [entry[t].logprob for entry, t in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-6)
        assert completion.beam_score == pytest.approx(sum(chosen) / len(chosen) ** 0.7, abs=1e-5)
    scores = [c.beam_score for c in output.outputs]
    assert scores == sorted(scores, reverse=True)


def test_one_beam_is_greedy(engine):
    greedy = generate(engine, PROMPT, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)).outputs[0]
    beam = generate(engine, PROMPT, BEAMS.clone(n=1)).outputs[0]
    assert (beam.token_ids, beam.text) == (greedy.token_ids, greedy.text)


def test_width_defaults_to_n_and_may_be_more(engine):
    wide = generate(engine, PROMPT, BEAMS.clone(n=5))
    some = generate(engine, PROMPT, BEAMS.clone(n=2, beam_width=5))
    assert facts(some) == facts(wide)[:2]


def test_temperature_and_what_goes_with_it_is_ignored(engine):
    plain = generate(engine, PROMPT, BEAMS)
    for options in ({"temperature": 0}, {"temperature": 2.0, "top_k": 1, "top_p": 0.1, "seed": 3, "min_p": 0.5}):
        assert facts(generate(engine, PROMPT, BEAMS.clone(**options))) == facts(plain)


def test_a_stream_has_one_output(engine):
    engine.add_request(PROMPT, BEAMS, stream=True)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [o.finished for o in outputs] == [True]
    assert outputs[0].outputs[0].delta == outputs[0].outputs[0].text


def test_stop_strings_end_beams(engine):
    free = generate(engine, PROMPT, BEAMS)
    stop = free.outputs[0].text[3:6]
    output = generate(engine, PROMPT, BEAMS.clone(stop=stop))
    stopped = [c for c in output.outputs if c.finish_reason == "stop"]
    assert stopped and all(c.stop_reason == stop and stop not in c.text for c in stopped)


def test_masks_and_penalties_steer_the_beams(engine):
    allowed = PROMPT[:10]  # all of them repetitions
    output = generate(engine, PROMPT, BEAMS.clone(allowed_token_ids=allowed, repetition_penalty=1.5, logprobs=0))
    for completion in output.outputs:
        assert set(completion.token_ids) <= set(allowed)
        assert completion.beam_score < completion.cumulative_logprob / len(completion.token_ids)
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_where_there_are_fewer_continuations_fewer_come_back(engine):
    output = generate(engine, PROMPT, BEAMS.clone(allowed_token_ids=[77]))
    assert [c.token_ids for c in output.outputs] == [[77] * 10]


def test_many_beam_requests_in_company_of_ordinary_ones(engine):
    """Twelve requests of every kind at once, in a pool that is too small for them: each as it is alone."""
    rng = random.Random(5)
    requests = []
    for number in range(12):
        prompt = PROMPT[: rng.randint(1, 30)] + [rng.randrange(4, 1000) for _ in range(rng.randint(0, 9))]
        ordinary = SamplingParams(temperature=0.8, seed=number, max_tokens=14, n=rng.choice([1, 2]), ignore_eos=True)
        beams = BEAMS.clone(n=rng.choice([2, 4]), early_stopping=rng.choice([True, False, "never"]), ignore_eos=False)
        requests.append((prompt, beams if number % 2 else ordinary))
    alone = [generate(engine, prompt, params) for prompt, params in requests]
    for caching in (True, False):
        small = make_engine(
            block_size=4,
            num_blocks=22,
            max_num_seqs=6,
            max_num_batched_tokens=11,
            enable_prefix_caching=caching,
        )
        ids = [small.add_request(prompt, params) for prompt, params in requests]
        finished = run_to_end(small)
        for request_id, output, (_, params) in zip(ids, alone, requests, strict=True):
            if params.use_beam_search:
                assert facts(finished[request_id]) == facts(output)
            else:
                assert {tuple(c.token_ids) for c in finished[request_id].outputs} == {
                    tuple(c.token_ids) for c in output.outputs
                }
        assert small.stats().num_preemptions > 0
        assert_all_blocks_back(small)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_groups_that_preempt_one_another_never_wait_for_ever(engine, policy, caching):
    """Several beam searches, each of which needs nearly the whole pool, arriving in turn."""
    params = BEAMS.clone(n=4, max_tokens=16)
    alone = facts(generate(engine, PROMPT, params))
    # 30 + 16 tokens: 7 shared blocks of 4, and 5 more for each of 4 beams.
    small = make_engine(block_size=4, num_blocks=27, max_num_seqs=8, policy=policy, enable_prefix_caching=caching)
    finished = {}
    for number in range(5):
        small.add_request(PROMPT, params, priority=-number)
        for _ in range(6):
            finished |= {o.request_id: o for o in small.step() if o.finished}
    finished |= run_to_end(small, max_steps=1000)
    assert len(finished) == 5
    assert all(facts(output) == alone for output in finished.values())
    if policy == "priority":
        assert small.stats().num_preemptions > 0
    assert_all_blocks_back(small)


def test_aborts_at_every_step(engine):
    steps = 0
    while True:
        request_id = engine.add_request(PROMPT, BEAMS)
        other = engine.add_request(PROMPT[:9], BEAMS.clone(n=2))
        for _ in range(steps):
            engine.step()
        if request_id not in engine._groups:
            break
        output = engine.abort(request_id)
        assert {c.finish_reason for c in output.outputs} == {"abort"} and output.finished
        assert {len(c.token_ids) for c in output.outputs} == {steps}
        engine.scheduler.check()
        engine.abort(other)
        assert_all_blocks_back(engine)
        steps += 1
    run_to_end(engine)
    assert steps == 10


def test_nan_logits_end_their_own_search_only(engine):
    alone = facts(generate(engine, PROMPT, BEAMS))
    good = engine.add_request(PROMPT, BEAMS)
    bad = engine.add_request(PROMPT[:5], BEAMS)
    with nan_logits(engine, row=-2, call=3):
        outputs = run_to_end(engine)
    assert {c.finish_reason for c in outputs[bad].outputs} == {"error"} and "NaN" in outputs[bad].error
    assert facts(outputs[good]) == alone
    assert_all_blocks_back(engine)


def test_beams_share_the_prompt():
    engine = make_engine(block_size=4, enable_prefix_caching=False)
    engine.add_request(PROMPT, BEAMS.clone(n=8))
    used, references = [], []
    while engine.has_unfinished():
        engine.step()
        stats = engine.stats()
        used.append(stats.num_blocks_used)
        references.append(stats.num_block_references)
    assert stats.num_prompt_tokens_computed == len(PROMPT)
    assert max(used) <= 7 + 8 * 3  # 7 full blocks of prompt once, what follows at most for each
    assert max(references) == 8 * 10


def test_a_width_that_the_pool_cannot_hold_is_refused_with_the_numbers():
    engine = make_engine(block_size=4, num_blocks=26, max_num_seqs=8)
    params = BEAMS.clone(n=4, max_tokens=16)
    with pytest.raises(PoolTooSmallError) as caught:
        engine.add_request(PROMPT, params)
    for word in ("4 beams", "27 KV blocks", "7 shared", "5 for each beam", "the pool has 26"):
        assert word in str(caught.value)
    with pytest.raises(InvalidParameterError, match=r"9 sequences.*max_num_seqs \(8\)"):
        engine.add_request(PROMPT, BEAMS.clone(n=1, beam_width=9))
    static = make_engine(policy="static", max_model_len=64)
    with pytest.raises(InvalidParameterError, match="static"):
        static.add_request(PROMPT, params)
    assert not engine.has_unfinished()


def test_beam_search_of_llm():
    with LLM("tiny-draft", device="reference", num_blocks=64) as llm:
        outputs = llm.beam_search(["ROMEO:", "JULIET:"], beam_width=3, max_tokens=6)
        assert [len(o.outputs) for o in outputs] == [3, 3]
        one = llm.beam_search("ROMEO:", beam_width=3, n=1, max_tokens=6, length_penalty=0.5, early_stopping=True)[0]
        assert len(one.outputs) == 1 and one.outputs[0].beam_score is not None
