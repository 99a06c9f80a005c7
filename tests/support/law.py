"""The equivalence law: what a request gives alone, and how to compare what it gave in company."""

from __future__ import annotations

from dataclasses import dataclass, field

from minipaged.config import SamplingParams
from minipaged.engine import Engine
from tests.support.engines import generate

EXCUSED_MARGIN = 1e-4
"""The products of the reference backend are BLAS's, whose rounding depends on the batch. Where the
decision of the run alone hung on less than this, company may tip it."""


@dataclass
class Expected:
    """A request run alone: its tokens, and how near each decision was to another one."""

    prompt: list[int]
    params: SamplingParams
    token_ids: list[int]
    text: str
    finish_reason: str
    margins: list[float]


def record_margins(engine: Engine) -> dict[str, list[float]]:
    """Make an engine's sampler note its margins: request id -> one for each generated token; of
    continuation ``i`` above 0, under ``"<request id>/<i>"``."""
    margins: dict[str, list[float]] = {}
    sample = engine.sampler.sample

    def sample_with_margins(logits, states, examined=None):
        tokens = sample(logits, states, examined=examined, with_margins=True)
        owners = {
            id(sequence.sampling): f"{request_id}/{index}" if index else request_id
            for request_id, group in engine._groups.items()
            for index, sequence in enumerate(group.sequences)
        }
        for state, token in zip(states, tokens, strict=True):
            margins.setdefault(owners[id(state)], []).append(token.margin)
        return tokens

    engine.sampler.sample = sample_with_margins
    return margins


def run_alone(engine: Engine, prompt: list[int], params: SamplingParams, margins: dict) -> Expected:
    """One request through an engine that has nothing else to do (margins: :func:`record_margins`)."""
    output = generate(engine, prompt, params)
    completion = output.outputs[0]
    return Expected(
        prompt, params, completion.token_ids, completion.text, completion.finish_reason, margins[output.request_id]
    )


@dataclass
class Comparison:
    """Counts of a whole test: requests compared, and those excused by a margin under the limit."""

    requests: int = 0
    excused: list[str] = field(default_factory=list)

    def compare(self, expected: Expected, completion, where: str) -> None:
        """Raise unless ``completion`` is what the request gives alone, up to an excused near-tie.

        An aborted completion must be a prefix of it.
        """
        self.requests += 1
        got = completion.token_ids
        for index, token_id in enumerate(got):
            wanted = expected.token_ids[index] if index < len(expected.token_ids) else None
            if token_id == wanted:
                continue
            margin = expected.margins[index] if index < len(expected.margins) else float("inf")
            assert margin < EXCUSED_MARGIN, (
                f"{where}: token {index} is {token_id}, alone it is {wanted} (margin {margin:.2e})\n"
                f"  in company: {got}\n  alone:      {expected.token_ids}"
            )
            self.excused.append(f"{where}: token {index}, margin {margin:.2e}")
            return
        if completion.finish_reason == "abort":
            return
        assert got == expected.token_ids, f"{where}: {got} is not {expected.token_ids}"
        assert completion.text == expected.text, f"{where}: {completion.text!r} is not {expected.text!r}"
        assert completion.finish_reason == expected.finish_reason, where

    def check_excuses(self, exact: bool = False) -> None:
        """Print the excused cases; fewer than 1 in 1000 requests, one at least, may be among them.

        None may if the backend's logits are ``exact``.
        """
        print(f"{self.requests} requests compared, {len(self.excused)} excused by a near-tie")
        for line in self.excused:
            print(" ", line)
        assert len(self.excused) <= (0 if exact else max(1, self.requests // 1000))
