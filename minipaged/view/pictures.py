"""The README's pictures, drawn from the live state of an engine: ``python -m minipaged.view.pictures [FOLDER]``.

Nothing in them depends on the machine's speed, and of the model only that it generates something.
"""

from __future__ import annotations

import sys
from pathlib import Path

from minipaged.view.blocks import draw_blocks
from minipaged.view.svg import Picture
from minipaged.view.timeline import draw_timeline

FOLDER = "docs/pictures"
SYSTEM = "Here the players speak, and in few words: "


def record():
    """A trace in which prompts are shared, copied before they are written, evicted and preempted."""
    from minipaged import LLM, SamplingParams

    limits = dict(num_blocks=32, block_size=4, max_model_len=96, max_num_seqs=8, max_num_batched_tokens=24)
    with LLM("tiny", device="reference", **limits) as llm:
        llm.start_trace()
        for prompts, samples, max_tokens in (
            ([SYSTEM + "First Citizen: What is the city?"], [1], 8),
            ([SYSTEM + "ROMEO: O,", SYSTEM + "JULIET: Ay me,", "KING: Now"], [1, 3, 1], 22),
        ):
            params = [
                SamplingParams(temperature=0.9, seed=number, n=n, max_tokens=max_tokens, ignore_eos=True)
                for number, n in enumerate(samples)
            ]
            llm.generate(prompts, params, use_tqdm=False)
        return llm.stop_trace()


def make() -> dict[str, Picture]:
    """The pictures by file name."""
    trace = record()
    sharing = next(step for step in trace.steps if step.copies)
    return {
        "paging.svg": draw_blocks(sharing, "What paging does, in one look"),
        "timeline.svg": draw_timeline(trace, "Who computes how many tokens, step by step"),
    }


def main(arguments: list[str]) -> int:
    """Write the pictures into a folder (``docs/pictures``)."""
    folder = Path(arguments[0] if arguments else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in make().items():
        picture.save(folder / name)
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
