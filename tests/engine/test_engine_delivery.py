"""Outputs of a step reach their callers one by one, as they are made."""

from __future__ import annotations

import pytest

from minipaged import SamplingParams
from tests.support.engines import make_engine

PROMPTS = ["ROMEO:\n", "JULIET:\n", "NURSE:\n"]


@pytest.fixture
def engine():
    made = make_engine()
    yield made
    made.close()


def submit(engine, max_tokens: int = 6, temperature: float = 0, **options) -> list[str]:
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, **options)
    return [engine.add_request(prompt, params, stream=True) for prompt in PROMPTS]


def test_delivered_or_returned_it_is_the_same(engine):
    def texts(outputs):
        return [
            (PROMPTS[int(o.request_id[-1]) % 3], o.finished, o.outputs[0].text, o.outputs[0].delta) for o in outputs
        ]

    delivered, returned = [], []
    submit(engine)
    while engine.has_unfinished():
        assert engine.step(delivered.append) == []
    submit(engine)
    while engine.has_unfinished():
        returned += engine.step()
    assert texts(delivered) == texts(returned) and len(delivered) == 18


def test_nobody_waits_for_the_text_of_others(engine):
    """When the first of a step is told, the tokens of the others have not been looked at."""
    submit(engine)
    engine.step()
    seen = []

    def deliver(output):
        lengths = [len(group.sequences[0].output.token_ids) for group in engine._groups.values()]
        seen.append((output.request_id, lengths))

    engine.step(deliver)
    assert seen == [("request-0", [2, 1, 1]), ("request-1", [2, 2, 1]), ("request-2", [2, 2, 2])]


def test_a_request_of_several_sequences_is_told_once_a_step(engine):
    submit(engine, n=3, max_tokens=3, temperature=1)
    counts = []
    while engine.has_unfinished():
        outputs = engine.step()
        counts.append([output.request_id for output in outputs])
        assert all(len({len(choice.token_ids) for choice in output.outputs}) == 1 for output in outputs)
    assert counts == [["request-0", "request-1", "request-2"]] * 3


def test_a_tokens_moment_is_when_it_was_sampled(engine):
    outputs = []
    submit(engine, max_tokens=3)
    while engine.has_unfinished():
        outputs += engine.step()
        metrics = [output.metrics for output in outputs[-3:]]
        assert len({m.last_token_time for m in metrics}) == 1  # all of a step are sampled at once
        assert all(m.first_token_time <= m.last_token_time for m in metrics)
    assert all(m.last_token_time <= m.finished_time for m in (output.metrics for output in outputs))


def test_outputs_that_are_kept_do_not_change_and_live_ones_are_not_copied(engine):
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
    for live in (False, True):
        group = engine.prepare(PROMPTS[0], params, stream=True, live=live)
        engine.submit(group)
        outputs = [engine.step()[0].outputs[0] for _ in range(3)]
        lengths = [(len(output.token_ids), len(output.logprobs)) for output in outputs]
        assert lengths == ([(3, 3)] * 3 if live else [(1, 1), (2, 2), (3, 3)])
        assert [len(output.text) for output in outputs] == sorted({len(output.text) for output in outputs})
