"""Traces and pictures of a whole engine: recorded on demand, cheap, and without any effect on what it computes."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from minipaged import LLM, AsyncLLM, Engine, EngineConfig, SamplingParams
from minipaged.bench import tracing
from minipaged.errors import ConfigError, InvalidParameterError, TraceError
from minipaged.view import Trace, draw_blocks, draw_timeline

SMALL = dict(device="reference", block_size=4, num_blocks=36, max_num_seqs=8, max_num_batched_tokens=24)
PROMPTS = ["First Citizen: Before we", "First Citizen: Before all", "KING:"]
PARAMS = [
    SamplingParams(temperature=0.9, seed=1, n=3, max_tokens=16),
    SamplingParams(use_beam_search=True, beam_width=3, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=20),
]


@pytest.fixture(scope="module")
def llm():
    with LLM(
        "tiny-draft",
        **SMALL,
        swap_space=1 << 20,
        speculative_model="ngram",
        adaptive_speculation=False,
        check_integrity=True,
    ) as model:
        yield model


def tokens(outputs):
    return [[c.token_ids for c in output.outputs] for output in outputs]


def test_recording_changes_nothing(llm):
    before = tokens(llm.generate(PROMPTS, PARAMS))
    llm.start_trace()
    during = tokens(llm.generate(PROMPTS, PARAMS))
    trace = llm.stop_trace()
    assert before == during == tokens(llm.generate(PROMPTS, PARAMS))
    assert len(trace) > 15 and trace.about["model"] == "tiny-draft" and trace.about["block_size"] == 4


def test_samples_beams_and_guesses_keep_the_laws(llm):
    """Of every step the trace holds each block as often as tables have it; and what it says adds up to the answer."""
    llm.start_trace()
    outputs = llm.generate([*PROMPTS, "a b a b a b a b a b"], [*PARAMS, SamplingParams(temperature=0, max_tokens=24)])
    trace = Trace.from_json(llm.stop_trace().to_json())
    for step in trace.steps:
        holders = step.holders()
        assert [len(holders.get(b, [])) for b in range(step.num_blocks)] == step.ref_cnts
        draw_blocks(step)
    draw_timeline(trace)
    assert trace.end.num_used == 0
    work = [work for step in trace.steps for work in step.work]
    assert any(each.num_lookahead_tokens for each in work) and any(step.forked for step in trace.steps)
    last = outputs[-1]
    mine = [each for each in work if each.sequence.sequence_id == last.request_id]
    advanced = sum(each.num_tokens - each.num_lookahead_tokens + each.num_accepted_tokens for each in mine)
    again = sum(each.num_cached_tokens + each.num_swapped_tokens for each in mine)
    preempted = sum(last.request_id in step.preempted for step in trace.steps)
    if not preempted:
        assert advanced + again == len(last.prompt_token_ids) + len(last.outputs[0].token_ids) - 1


def test_a_picture_of_an_llm_and_of_an_engine(llm):
    text = str(draw_blocks(llm))
    stats = llm.stats()
    assert f"{stats.num_blocks_used} of {stats.num_blocks_total} blocks in use" in text
    assert llm.snapshot().cached and llm.snapshot().num_used == 0


def test_an_engine_by_hand(llm):
    engine = Engine(EngineConfig(model="tiny-draft", **SMALL))
    engine.start_trace(max_steps=3)
    engine.add_request("ROMEO: Speak to me", SamplingParams(temperature=0, max_tokens=9))
    engine.step()
    assert "request-0, logical block 0" in str(draw_blocks(engine))
    while engine.has_unfinished():
        engine.step()
    with pytest.raises(TraceError, match="stop_trace\\(\\) before the scheduler is replaced"):
        engine.use_policy("static")
    trace = engine.stop_trace()
    assert len(trace) == 3 and [step.num_tokens for step in trace.steps][1:] == [1, 1]
    engine.use_policy("static")
    engine.close()


def test_an_async_engine():
    async def main():
        async with AsyncLLM("tiny-draft", **SMALL) as llm:
            await llm.start_trace()
            async for _ in llm.generate("ROMEO:", SamplingParams(temperature=0, max_tokens=4)):
                state = await llm.snapshot()
            draw_blocks(state)
            with pytest.raises(InvalidParameterError, match="await llm.snapshot"):
                draw_blocks(llm)
            return await llm.stop_trace()

    assert len(asyncio.run(main())) == 4


def test_what_cannot_be_recorded(llm):
    with pytest.raises(TraceError, match="no trace is being recorded; start_trace"):
        llm.stop_trace()
    for bad in (0, -1, 1.5, True, "3"):
        with pytest.raises(InvalidParameterError, match="max_steps is"):
            llm.start_trace(bad)
    llm.start_trace()
    with pytest.raises(TraceError, match="recorded already"):
        llm.start_trace()
    assert len(llm.stop_trace()) == 0


def test_an_empty_trace(llm, tmp_path):
    llm.start_trace()
    trace = llm.stop_trace()
    trace.save(tmp_path / "trace.json")
    again = Trace.load(tmp_path / "trace.json")
    assert len(again) == 0 and again.end == trace.end
    again.to_html(tmp_path / "trace.html")
    again.to_chrome(tmp_path / "chrome.json")
    with pytest.raises(InvalidParameterError, match="the trace has steps"):
        draw_timeline(again)


# -- cost ---------------------------------------------------------------------------------------------


def calls_in_a_step(num_seqs: int) -> int:
    """Functions called, Python's and C's, to record a step in which sequences only go on."""
    from minipaged.core.factory import make_scheduler
    from minipaged.core.request import Request
    from minipaged.core.scheduler import SchedulerConfig
    from minipaged.view import Recorder

    scheduler = make_scheduler(SchedulerConfig(1024, 16, 256, num_seqs, 4096))
    for number in range(num_seqs):
        scheduler.add(Request(f"r{number}", [1] * 20, SamplingParams(max_tokens=30)))
    recorder, count = Recorder(scheduler), 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    fewest = None
    for _ in range(10):
        plan = scheduler.schedule()
        count = 0
        sys.setprofile(note)
        try:
            recorder.scheduled(plan)
            sys.setprofile(None)
            scheduler.update(plan, {s.request_id: [5] for s in plan.scheduled if s.samples})
            sys.setprofile(note)
            recorder.updated()
        finally:
            sys.setprofile(None)
        fewest = count if fewest is None else min(count, fewest)
    return fewest


def test_a_step_that_only_goes_on_costs_a_handful_of_calls():
    """However many sequences there are; measured in seconds by `minipaged bench tracing`."""
    few, many = calls_in_a_step(1), calls_in_a_step(64)
    assert few <= 40 and many <= few + 1  # a comprehension may count as a call


def test_the_cost_can_be_measured():
    engine = Engine(EngineConfig(model="tiny-draft", device="reference", max_num_seqs=8))
    result = tracing.measure(engine, prompt_len=8, num_windows=2, batch_sizes=[1, 4])
    assert [batch["batch_size"] for batch in result["batches"]] == [1, 4]
    for batch in result["batches"]:
        assert len(batch["step"]["values"]) == len(batch["traced_step"]["values"]) == 2
        assert 20 < batch["bytes_per_step"] < 400
    assert "bytes a step" in tracing.text(result)
    with pytest.raises(ConfigError, match="leave too few of max_model_len"):
        tracing.measure(engine, prompt_len=500, num_windows=2, batch_sizes=[1])


def test_importing_is_lazy():
    code = (
        "import sys, minipaged, minipaged.llm;"
        "assert not [name for name in sys.modules if name.startswith('minipaged.view')];"
        "import minipaged.view; from minipaged.view import Trace, draw_blocks, draw_timeline, draw_threads;"
        "sys.exit('numba.cuda' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
