"""A scheduler at work without a model: every token that it samples is 0, so only counts matter."""

from __future__ import annotations

from minipaged.config import SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import Scheduler, SchedulerConfig, SchedulerOutput


def scheduler_for(policy: str = "fcfs", **limits) -> Scheduler:
    """A scheduler with small limits; ``policy="static"`` reserves ``max_model_len`` slots in one piece."""
    defaults = {
        "num_blocks": 64,
        "block_size": 16,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": False,
    }
    return make_scheduler(SchedulerConfig(policy=policy, **(defaults | limits)))


def submit(scheduler: Scheduler, name: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
    """Queue a request that generates exactly ``num_output_tokens`` tokens."""
    params = SamplingParams(max_tokens=num_output_tokens, ignore_eos=True)
    scheduler.add(Request(name, [0] * num_prompt_tokens, params))


def one_step(scheduler: Scheduler) -> SchedulerOutput:
    """What ``Engine.step()`` does, less the model: plan, take in the tokens, end who has all of them."""
    plan = scheduler.schedule()
    scheduler.update(plan, {s.request_id: [0] for s in plan.scheduled if s.samples})
    for request in [r for r in scheduler.running if r.num_tokens == r.max_total_tokens]:
        scheduler.finish(request.request_id)
    return plan
