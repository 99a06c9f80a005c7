"""What speculation gains: the same requests with and without it, in turn, on one engine.

Three modes: ``off``; ``adaptive``, which guesses as far ahead as it sees to pay; ``fixed``, which always
guesses ``num_speculative_tokens`` ahead. The rounds are interleaved, so that a slow moment of the
machine touches all, and each begins with an empty pool and nothing learned. The outputs must be equal.
"""

from __future__ import annotations

import random
import time

from minipaged.bench.summary import median
from minipaged.cli.terminal import table
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.errors import IntegrityError, InvalidParameterError
from minipaged.sampling.speculative.adaptive import LengthController
from minipaged.sampling.speculative.cost import LinearCost
from minipaged.sampling.speculative.speculator import Speculator

MODES = ("off", "adaptive", "fixed")
PHRASE_LEN = 24  # tokens of the phrase that a repetitive prompt repeats


def repetitive_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of ``length`` random token ids that repeat every ``PHRASE_LEN``."""
    rng = random.Random(f"repetitive/{seed}")
    phrases = [rng.choices(range(vocab_size), k=PHRASE_LEN) for _ in range(count)]
    return [(phrase * (length // PHRASE_LEN + 1))[:length] for phrase in phrases]


def text_prompts(token_ids: list[int], count: int, length: int, seed: int) -> list[list[int]]:
    """Windows of ``length`` tokens cut from a text at random.

    Raises :class:`InvalidParameterError` if the text is shorter than one.
    """
    if len(token_ids) < length:
        raise InvalidParameterError(f"the text has {len(token_ids)} tokens, fewer than a prompt ({length}).")
    rng = random.Random(f"windows/{seed}")
    starts = [rng.randrange(len(token_ids) - length + 1) for _ in range(count)]
    return [token_ids[start : start + length] for start in starts]


def measure(
    engine: Engine,
    prompts: list[list[int]],
    *,
    output_len: int,
    temperature: float = 0.0,
    rounds: int = 5,
    progress=None,
) -> dict:
    """Run the prompts ``rounds`` times in each mode, after one round that is not counted.

    Args:
        engine: made with ``speculative_model``; idle.
        output_len: tokens generated for each prompt.
        progress: called as ``progress(mode, round, run)``.

    Returns ``{"modes": {mode: {"runs": [...], "median": {...}}}, "speed_up": {mode: {"rounds", "median"}}}``;
    speed-ups are over ``off`` in the same round. See :func:`run` for the numbers of a run.
    """
    runs: dict[str, list[dict]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        outputs = None
        for mode in MODES:
            result, produced = run(engine, prompts, mode, output_len, temperature)
            if outputs is not None and produced != outputs:
                raise IntegrityError(f"speculation ({mode}) changed the output. This is a bug in minipaged.")
            outputs = produced
            if number:
                runs[mode].append(result)
                if progress:
                    progress(mode, number, result)
    return {
        "speculative_model": engine.config.speculative_model,
        "num_speculative_tokens": engine.config.num_speculative_tokens,
        "num_prompts": len(prompts),
        "prompt_len": len(prompts[0]),
        "output_len": output_len,
        "temperature": temperature,
        "rounds": rounds,
        "modes": {
            mode: {"runs": found, "median": {key: median([r[key] for r in found]) for key in found[0]}}
            for mode, found in runs.items()
        },
        "speed_up": {mode: _speed_up(runs["off"], runs[mode]) for mode in MODES[1:]},
    }


def run(
    engine: Engine, prompts: list[list[int]], mode: str, output_len: int, temperature: float
) -> tuple[dict, list[list[int]]]:
    """Run all prompts once; returns numbers and the generated token ids.

    ``wall``: seconds; ``per_second``: generated tokens; ``tokens_per_step``: gained by a sequence from a
    step that gives it any; ``guessed``: draft tokens verified, and ``acceptance_rate``, the share that was right.
    """
    engine.use_policy(engine.config.policy)
    speculator = engine.speculator
    fresh = _renewed(speculator, engine.config.num_speculative_tokens, mode)
    engine.speculator = fresh
    try:
        started = time.monotonic()
        for number, prompt in enumerate(prompts):
            params = SamplingParams(temperature=temperature, seed=number, ignore_eos=True, max_tokens=output_len)
            engine.add_request(prompt, params, request_id=f"{mode}-{number}")
        finished = []
        while engine.has_unfinished():
            finished += engine.step()
        wall = time.monotonic() - started
    finally:
        engine.speculator = speculator
    stats = engine.scheduler.stats()
    finished.sort(key=lambda output: int(output.request_id.rpartition("-")[2]))
    generated = stats["num_generated_tokens"]
    guessed, accepted = (fresh.num_guessed, fresh.num_right) if fresh else (0, 0)
    return {
        "wall": wall,
        "per_second": generated / wall,
        "steps": stats["num_steps"],
        "tokens_per_step": generated / (generated - accepted),
        "guessed": guessed,
        "acceptance_rate": accepted / guessed if guessed else 0.0,
    }, [output.outputs[0].token_ids for output in finished]


def _renewed(speculator: Speculator, num_tokens: int, mode: str) -> Speculator | None:
    """A speculator for ``mode`` over the same proposer, which forgets what it knows."""
    proposer = speculator.proposer
    proposer.retain(())
    proposer.cost = LinearCost()
    if mode == "off":
        return None
    return Speculator(proposer, num_tokens, LengthController(proposer) if mode == "adaptive" else None)


def _speed_up(off: list[dict], on: list[dict]) -> dict:
    ratios = [a["per_second"] / b["per_second"] for a, b in zip(on, off, strict=True)]
    return {"rounds": ratios, "median": median(ratios)}


def text(result: dict) -> str:
    """The table of a result of :func:`measure`: one column a mode."""
    medians = [result["modes"][mode]["median"] for mode in MODES]
    lines = [
        ("generated tokens/s", lambda m: f"{m['per_second']:.1f}"),
        ("steps", lambda m: f"{m['steps']:.0f}"),
        ("tokens a sequence and step", lambda m: f"{m['tokens_per_step']:.2f}"),
        ("tokens guessed", lambda m: f"{m['guessed']:.0f}"),
        ("of them right", lambda m: f"{m['acceptance_rate']:.0%}"),
    ]
    rows = [[name, *(show(m) for m in medians)] for name, show in lines]
    head = (
        f"{result['num_prompts']} prompt(s) of {result['prompt_len']} tokens, {result['output_len']} generated at "
        f"temperature {result['temperature']:g}; speculative_model {result['speculative_model']}, "
        f"at most {result['num_speculative_tokens']} tokens ahead; median of {result['rounds']} round(s)\n\n"
    )
    speed_ups = [
        f"{mode}: {found['median']:.2f}x the tokens/s of off (per round: "
        f"{', '.join(f'{ratio:.2f}' for ratio in found['rounds'])})"
        for mode, found in result["speed_up"].items()
    ]
    return head + table(["", *MODES], rows, right=(1, 2, 3)) + "\n\n" + "\n".join(speed_ups)
