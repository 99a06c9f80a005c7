"""``n`` and ``best_of``: each continuation is what its seed gives alone; the prompt is computed and stored once."""

import pytest

from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidParameterError
from minipaged.sampling.seeds import choice_seed
from tests.support.engines import assert_all_blocks_back, generate, make_engine, run_to_end

PROMPT = list(range(20, 60))
PARAMS = SamplingParams(temperature=0.9, seed=11, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    return make_engine(block_size=4)


def alone(engine, index, **changes):
    return generate(engine, PROMPT, PARAMS.clone(seed=choice_seed(PARAMS.seed, index), **changes)).outputs[0]


def test_each_continuation_is_what_its_seed_gives_alone(engine):
    output = generate(engine, PROMPT, PARAMS.clone(n=4))
    assert sorted(c.index for c in output.outputs) == [0, 1, 2, 3]
    for completion in output.outputs:
        assert completion.token_ids == alone(engine, completion.index).token_ids
    assert choice_seed(PARAMS.seed, 0) == PARAMS.seed
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    assert_all_blocks_back(engine)


def test_results_are_ranked_by_cumulative_logprob(engine):
    output = generate(engine, PROMPT, PARAMS.clone(n=4))
    ranks = [c.cumulative_logprob for c in output.outputs]
    assert ranks == sorted(ranks, reverse=True)
    assert all(c.logprobs is None for c in output.outputs)  # they were not asked for
    for completion in output.outputs:
        asked = alone(engine, completion.index, logprobs=0)
        assert completion.cumulative_logprob == pytest.approx(asked.cumulative_logprob, abs=1e-4)


def test_best_of_returns_the_likeliest(engine):
    best = generate(engine, PROMPT, PARAMS.clone(n=2, best_of=6)).outputs
    all_ = generate(engine, PROMPT, PARAMS.clone(n=6)).outputs
    assert [c.token_ids for c in best] == [c.token_ids for c in all_[:2]]


@pytest.mark.parametrize("block_size", [4, 16])
def test_the_prompt_is_computed_once_and_its_full_blocks_are_shared(block_size):
    """40 tokens of prompt, n=8: what is computed is what n=1 computes, what is stored twice is the tail only."""
    engine = make_engine(block_size=block_size, enable_prefix_caching=False)
    engine.add_request(PROMPT, PARAMS.clone(n=8))
    engine.step()
    stats = engine.stats()
    assert stats.num_prompt_tokens_computed == len(PROMPT) and stats.num_steps == 1
    assert stats.num_requests_running == 1 and len(engine.scheduler.running) == 8
    whole_prompt = -(-len(PROMPT) // block_size)
    assert stats.num_blocks_used == stats.num_blocks_shared == whole_prompt
    assert stats.num_block_references == 8 * whole_prompt
    engine.step()
    stats = engine.stats()
    full = len(PROMPT) // block_size
    assert stats.num_blocks_shared == full
    assert stats.num_blocks_used == full + 8  # the tail of each: 7 copies and the original, or 8 new blocks
    assert stats.num_blocks_copied == (7 if len(PROMPT) % block_size else 0)
    run_to_end(engine)
    assert engine.stats().num_prompt_tokens_computed == len(PROMPT)
    assert_all_blocks_back(engine)


def test_streams_carry_each_choice(engine):
    request_id = engine.add_request(PROMPT, PARAMS.clone(n=3, stop_token_ids=[7]), stream=True)
    texts, last = ["", "", ""], None
    while engine.has_unfinished():
        for last in engine.step():
            assert [c.index for c in last.outputs] == [0, 1, 2]
            for completion in last.outputs:
                texts[completion.index] += completion.delta
    assert last.request_id == request_id and last.finished
    assert texts == [c.text for c in last.outputs]


def test_best_of_above_n_streams_only_the_result(engine):
    engine.add_request(PROMPT, PARAMS.clone(n=1, best_of=3), stream=True)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert len(outputs) == 1 and outputs[0].finished and len(outputs[0].outputs) == 1


def test_a_pool_for_one_sequence_runs_them_one_after_the_other():
    """40 + 9 tokens fill 12 blocks of 4; eight continuations need more than there are."""
    engine = make_engine(block_size=4, num_blocks=13)
    free = make_engine(block_size=4)
    output = generate(engine, PROMPT, PARAMS.clone(n=8))
    assert engine.stats().num_preemptions > 0
    assert output.metrics.num_preemptions == engine.stats().num_preemptions
    for completion in output.outputs:
        assert completion.token_ids == alone(free, completion.index).token_ids
    assert_all_blocks_back(engine)


def test_seats_are_kept_for_all_continuations():
    """With 4 seats and n=3 running, a second request of n=2 waits, so that no fork lacks a seat."""
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=8)
    first = engine.add_request(PROMPT, PARAMS.clone(n=3))
    second = engine.add_request(PROMPT[:5], PARAMS.clone(n=2))
    order = []
    while engine.has_unfinished():
        order += [o.request_id for o in engine.step() if o.finished]
        assert len(engine.scheduler.running) <= 4
    assert order == [first, second]
    assert engine.stats().num_preemptions == 0


def test_an_aborted_request_returns_all_its_continuations(engine):
    for steps in (0, 1, 3):
        request_id = engine.add_request(PROMPT, PARAMS.clone(n=3))
        for _ in range(steps):
            engine.step()
        output = engine.abort(request_id)
        assert [c.finish_reason for c in output.outputs] == ["abort"] * 3
        assert {len(c.token_ids) for c in output.outputs} == {steps}
        assert_all_blocks_back(engine)


def test_prompt_logprobs_come_once(engine):
    output = generate(engine, PROMPT, PARAMS.clone(n=3, prompt_logprobs=1))
    assert len(output.prompt_logprobs) == len(PROMPT) and output.prompt_logprobs[0] is None


def test_a_child_id_never_collides_with_a_callers(engine):
    """Forks are named after their request; a caller's request may have just that name."""
    theirs = engine.add_request(PROMPT, PARAMS, request_id="r#1")
    ours = engine.add_request(PROMPT, PARAMS.clone(n=3), request_id="r")
    finished = run_to_end(engine)
    assert finished[theirs].outputs[0].token_ids == alone(engine, 0).token_ids
    assert len(finished[ours].outputs) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n": 2, "temperature": 0}, ["2", "temperature 0"]),
        ({"n": 3, "best_of": 2}, ["best_of is 2", "3"]),
        ({"n": 0}, ["0"]),
        ({"n": 2000}, ["2000", "1024"]),
        ({"beam_width": 4}, ["beam_width is 4", "use_beam_search"]),
        ({"length_penalty": 0.5}, ["length_penalty is 0.5", "use_beam_search"]),
        ({"early_stopping": "never"}, ["early_stopping is 'never'", "use_beam_search"]),
        ({"use_beam_search": True, "early_stopping": "maybe"}, ["maybe", "never"]),
        ({"use_beam_search": True, "early_stopping": 1}, ["1", "never"]),
        ({"use_beam_search": True, "n": 4, "beam_width": 2}, ["beam_width is 2", "4"]),
        ({"use_beam_search": True, "best_of": 2}, ["best_of is 2", "beam_width"]),
        ({"use_beam_search": True, "length_penalty": 1000}, ["1000", "10"]),
        ({"use_beam_search": 1}, ["use_beam_search is 1"]),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(**options)
    for word in words:
        assert word in str(caught.value)


def test_more_continuations_than_seats_are_refused():
    engine = make_engine(max_num_seqs=4)
    for params in (PARAMS.clone(n=5), PARAMS.clone(n=1, best_of=5), PARAMS.clone(n=5, use_beam_search=True)):
        with pytest.raises(InvalidParameterError, match=r"5.*max_num_seqs \(4\)"):
            engine.add_request(PROMPT, params)
    assert not engine.has_unfinished()


def test_llm_returns_n_outputs_a_prompt():
    with LLM("tiny-draft", device="reference", num_blocks=64) as llm:
        outputs = llm.generate(["ROMEO:", "JULIET:"], PARAMS.clone(n=2))
        assert [len(o.outputs) for o in outputs] == [2, 2]
        deltas = ["", ""]
        for output in llm.stream("ROMEO:", PARAMS.clone(n=2)):
            for completion in output.outputs:
                deltas[completion.index] += completion.delta
        assert deltas == [c.text for c in output.outputs]


@pytest.mark.parametrize("policy", ["priority", "static"])
def test_other_policies(policy):
    engine = make_engine(policy=policy, max_model_len=64, num_blocks=16)
    output = generate(engine, PROMPT, PARAMS.clone(n=3))
    for completion in output.outputs:
        assert completion.token_ids == alone(engine, completion.index).token_ids
