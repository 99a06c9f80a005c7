"""``AsyncLLM``: many tasks, abort by cancelling, and an engine that dies loudly."""

import asyncio
import gc
import threading
import weakref

import pytest

from minipaged import AsyncLLM, SamplingParams
from minipaged.errors import EngineClosedError, TokenRangeError

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def run(test):
    """Run ``test(llm)`` in a fresh loop with a fresh engine, at most a minute."""

    async def main():
        async with AsyncLLM("tiny-draft", device="reference", num_blocks=64, check_integrity=True) as llm:
            return await asyncio.wait_for(test(llm), timeout=60)

    return asyncio.run(main())


async def collect(llm, prompt, params=GREEDY, **options):
    text, last = "", None
    async for output in llm.generate(prompt, params, **options):
        text += output.outputs[0].delta
        last = output
    assert last.finished and text == last.outputs[0].text
    return last


def test_choices_and_beams_stream_beside_one_another():
    samples = SamplingParams(n=3, temperature=0.9, seed=6, max_tokens=10)
    beams = SamplingParams(n=2, use_beam_search=True, beam_width=4, max_tokens=10)

    async def test(llm):
        alone = [await collect(llm, "KING:", params) for params in (samples, beams)]
        together = await asyncio.gather(*(collect(llm, "KING:", params) for params in (samples, beams)))
        for a, b in zip(alone, together, strict=True):
            assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
        assert [len(output.outputs) for output in together] == [3, 2]
        task = asyncio.create_task(collect(llm, "KING:", beams.clone(max_tokens=200)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while (await llm.stats()).num_requests_running:
            await asyncio.sleep(0.01)
        assert (await llm.stats()).num_blocks_used == 0

    run(test)


def test_tasks_are_batched_and_each_gets_its_own_tokens():
    async def test(llm):
        prompts = [f"SCENE {i}. A street.\n" for i in range(12)]
        alone = [(await collect(llm, p)).outputs[0].token_ids for p in prompts]
        steps = (await llm.stats()).num_steps
        together = await asyncio.gather(*(collect(llm, p) for p in prompts))
        assert [t.outputs[0].token_ids for t in together] == alone
        assert (await llm.stats()).num_steps - steps < steps / 2

    run(test)


def test_cancelling_a_task_aborts_its_request():
    async def test(llm):
        task = asyncio.create_task(collect(llm, "LONG\n", GREEDY.clone(max_tokens=400)))
        while (await llm.stats()).num_requests_running == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = await llm.stats()
        assert (stats.num_requests_running, stats.num_blocks_used) == (0, 0)
        assert len((await collect(llm, "AFTER\n")).outputs[0].token_ids) == 10

    run(test)


def test_abort_by_id_ends_the_iterator():
    async def test(llm):
        seen = []
        async for output in llm.generate("LONG\n", GREEDY.clone(max_tokens=400), request_id="mine"):
            seen.append(output)
            if len(seen) == 3:
                await llm.abort("mine")
        assert seen[-1].outputs[0].finish_reason == "abort"
        assert len(seen[-1].outputs[0].token_ids) < 400
        await llm.abort("mine")  # finished: harmless

    run(test)


def test_bad_input_raises_in_its_own_task_only():
    async def test(llm):
        good = asyncio.create_task(collect(llm, "GOOD\n"))
        with pytest.raises(TokenRangeError):
            await collect(llm, [99999])
        assert len((await good).outputs[0].token_ids) == 10

    run(test)


def test_a_dying_engine_tells_everyone():
    async def test(llm):
        def broken(deliver):
            raise RuntimeError("the machine is on fire")

        task = asyncio.create_task(collect(llm, "LONG\n", GREEDY.clone(max_tokens=400)))
        while (await llm.stats()).num_requests_running == 0:
            await asyncio.sleep(0.001)
        llm._thread.engine.step = broken
        with pytest.raises(EngineClosedError, match="on fire"):
            await task
        with pytest.raises(EngineClosedError, match="on fire"):
            await collect(llm, "LATER\n")

    run(test)


def test_closing_aborts_what_runs():
    async def main():
        llm = AsyncLLM("tiny-draft", device="reference", num_blocks=64)
        task = asyncio.create_task(collect(llm, "LONG\n", GREEDY.clone(max_tokens=400)))
        while (await llm.stats()).num_requests_running == 0:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(llm.close)
        assert (await task).outputs[0].finish_reason == "abort"
        with pytest.raises(EngineClosedError):
            await collect(llm, "LATER\n")

    asyncio.run(asyncio.wait_for(main(), timeout=60))


def test_closing_lets_the_memory_go():
    llm = AsyncLLM("tiny-draft", device="reference", num_blocks=64)
    engine = weakref.ref(llm._thread.engine)
    llm.close()
    llm.close()
    gc.collect()
    assert engine() is None
    with pytest.raises(EngineClosedError, match="closed"):
        _ = llm.tokenizer
    with pytest.raises(EngineClosedError, match="closed"):
        asyncio.run(collect(llm, "x"))
    with pytest.raises(EngineClosedError, match="closed"):
        asyncio.run(llm.stats())


def test_a_dropped_async_llm_ends_its_thread():
    before = threading.active_count()
    llm = AsyncLLM("tiny-draft", device="reference", num_blocks=64)
    assert threading.active_count() == before + 1
    del llm
    gc.collect()
    assert threading.active_count() == before
