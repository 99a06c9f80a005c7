"""Small engines and ways to drive them, shared by the tests."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np

from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.outputs import RequestOutput


def make_engine(model: str = "tiny-draft", **options) -> Engine:
    """An engine on the reference backend that checks the laws of its block pool after every step."""
    options = {"device": "reference", "check_integrity": True, "num_blocks": 256} | options
    return Engine(EngineConfig(model=model, **options))


def run_to_end(engine: Engine, max_steps: int = 10_000) -> dict[str, RequestOutput]:
    """Step until nothing is unfinished; the finished outputs by request id."""
    finished: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished():
            return finished
        for output in engine.step():
            if output.finished:
                assert output.request_id not in finished, f"{output.request_id} ended twice"
                finished[output.request_id] = output
    raise AssertionError(f"still unfinished after {max_steps} steps")


def generate(engine: Engine, prompt, params: SamplingParams | None = None, **options) -> RequestOutput:
    """Run one request alone."""
    request_id = engine.add_request(prompt, params, **options)
    return run_to_end(engine)[request_id]


@contextlib.contextmanager
def nan_logits(engine: Engine, row: int, call: int):
    """The ``call``-th forward pass from here on returns a NaN in ``row``."""
    forward, calls = engine.runner.decoder.forward, itertools.count(1)

    def poisoned(batch, kv_cache):
        logits = forward(batch, kv_cache)
        if next(calls) == call:
            logits[row, 5] = np.nan
            engine.runner.decoder.examined = None  # of other logits
        return logits

    engine.runner.decoder.forward = poisoned
    try:
        yield
    finally:
        engine.runner.decoder.forward = forward


def assert_all_blocks_back(engine: Engine) -> None:
    """No request holds a block any more."""
    engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
