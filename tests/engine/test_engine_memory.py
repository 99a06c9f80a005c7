"""What has ended gives its memory back at once, and not when the garbage collector comes by."""

from __future__ import annotations

import contextlib
import gc
import importlib.util

import pytest

from minipaged import SamplingParams
from minipaged.engine_thread import EngineThread
from minipaged.errors import PromptTooLongError
from tests.support.engines import make_engine, run_to_end

HAS_GRAMMAR = importlib.util.find_spec("llguidance") is not None
KINDS = {
    "greedy": {"temperature": 0},
    "sampled": {"n": 3, "temperature": 0.9, "logprobs": 2, "prompt_logprobs": 1, "seed": 7},
    "best of": {"best_of": 3, "temperature": 0.9},
    "beams": {"use_beam_search": True, "beam_width": 3, "n": 2, "temperature": 0},
    **({"grammar": {"structured_outputs": {"choice": ["yes", "no"]}}} if HAS_GRAMMAR else {}),
}


@contextlib.contextmanager
def nothing_for_the_collector():
    """Fails if what is made and dropped inside lies in circles, which only the garbage collector can open."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        assert sorted({type(item).__qualname__ for item in gc.garbage}) == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def serve(engine, options: dict) -> None:
    """One request to its end, one that is aborted on its way and one that is refused."""
    params = SamplingParams(max_tokens=5, **options)
    engine.add_request("ROMEO:\n", params, stream=True)
    aborted = engine.add_request("JULIET:\n", params)
    engine.step()
    engine.abort(aborted)
    run_to_end(engine)
    with contextlib.suppress(PromptTooLongError):
        engine.add_request("NURSE:\n" * 1000, params)


def serve_and_close(**options) -> None:
    engine = make_engine(num_blocks=64, **options)
    for kind in KINDS.values():
        serve(engine, kind)
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_ended(kind):
    engine = make_engine()
    serve(engine, KINDS[kind])  # what is made once is made
    with nothing_for_the_collector():
        serve(engine, KINDS[kind])
    engine.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"device": "cpu"}, {"model": "tiny", "device": "cpu", "speculative_model": "tiny-draft"}],
    ids=["reference", "cpu", "speculation"],
)
def test_an_engine_that_was_closed(options):
    serve_and_close(**options)
    with nothing_for_the_collector():
        serve_and_close(**options)


def test_an_engine_thread_that_was_closed_early():
    def begin_and_close():
        engine, outputs = make_engine(), []
        thread = EngineThread(engine)
        for _ in range(4):
            prepared = engine.prepare("ROMEO:\n", SamplingParams(max_tokens=100, n=2, temperature=1))
            thread.submit(prepared, outputs.append)
        thread.close()
        assert {output.request_id for output in outputs if output.finished} == {f"request-{i}" for i in range(4)}

    begin_and_close()
    with nothing_for_the_collector():
        begin_and_close()
