"""How much of the reserved KV memory holds no token, paged and with contiguous reservation.

Only the scheduler runs; a counter stands in for the model. A paged sequence takes a block when it
needs one, so it wastes part of its last block only; a contiguous one reserves ``max_model_len`` slots
when it starts. The terms are those of Kwon et al. 2023 (figure 2): ``later`` is what they call
reservation, ``never`` internal fragmentation. There is no external fragmentation here: all contiguous
regions are equally long.
"""

from __future__ import annotations

from minipaged.bench.workload import draw_lengths
from minipaged.config import SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import Scheduler, SchedulerConfig

DEFINITION = """\
waste: 1 - held / reserved, both summed over all steps and all unfinished sequences that have blocks
  reserved: slots of their blocks; held: slots with the KV of a token
  later: reserved slots that their sequence will still write; never: those that it never will"""
POLICY_OF = {"paged": "fcfs", "contiguous": "static"}


def measure(
    *,
    distribution: str = "conversation",
    num_requests: int = 256,
    seed: int = 0,
    block_size: int = 16,
    num_blocks: int = 2048,
    max_model_len: int = 2048,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 1024,
    input_len: int = 128,
    output_len: int = 128,
) -> dict:
    """Waste of both ways to reserve, on the same requests and the same pool."""
    lengths = draw_lengths(distribution, num_requests, seed, max_model_len, input_len, output_len)
    result = {}
    for name, policy in POLICY_OF.items():
        config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=False,
            policy=policy,
        )
        result[name] = _run(make_scheduler(config), lengths)
    return {
        "distribution": distribution,
        "num_requests": num_requests,
        "seed": seed,
        "mean_prompt_len": sum(prompt for prompt, _ in lengths) / num_requests,
        "mean_output_len": sum(output for _, output in lengths) / num_requests,
        "block_size": block_size,
        "num_blocks": num_blocks,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        **result,
    }


def _run(scheduler: Scheduler, lengths: list[tuple[int, int]]) -> dict:
    """Serve requests of these lengths; every token generated is 0."""
    for number, (prompt_len, output_len) in enumerate(lengths):
        scheduler.add(Request(str(number), [0] * prompt_len, SamplingParams(max_tokens=output_len, ignore_eos=True)))
    reserved = held = later = steps = sequences = peak = 0
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        scheduler.update(plan, {s.request_id: [0] for s in plan.scheduled if s.samples})
        steps += 1
        sequences += len(scheduler.running)
        peak = max(peak, len(scheduler.running))
        for request in scheduler.running:
            slots = request.block_table.capacity
            reserved += slots
            held += request.num_computed_tokens
            # The last token of an output is returned and its KV never written.
            later += min(slots, request.max_total_tokens - 1) - request.num_computed_tokens
        for request in [r for r in scheduler.running if r.num_tokens == r.max_total_tokens]:
            scheduler.finish(request.request_id)
    return {
        "steps": steps,
        "mean_running": sequences / steps,
        "peak_running": peak,
        "mean_reserved_slots": reserved / steps,
        "mean_held_slots": held / steps,
        "waste": 1 - held / reserved,
        "waste_later": later / reserved,
        "waste_never": (reserved - held - later) / reserved,
        "preemptions": scheduler.num_preemptions,
    }
