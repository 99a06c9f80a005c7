"""How many KV blocks sharing saves: several samples of a prompt, beams, and a system prompt that all begin with.

Each request is run with 2, 4 and 6 continuations, and after every step the blocks in use are counted and the
entries of all block tables, which is how many blocks there would be if nobody shared. The saving is
``1 - blocks / entries``, both summed over all steps: what Kwon et al. 2023, "Efficient Memory Management for
Large Language Model Serving with PagedAttention", shows in figure 15, on lengths like theirs (see
``workload.py``).

What samples share is their prompt, whatever the model: only the scheduler runs for them. How much beams share
depends on the model, on how soon they descend from one parent: the engine searches. The prefix cache is off
for both, so that nothing is shared by mere chance.
"""

from __future__ import annotations

from minipaged.bench.workload import Workload, make_workload
from minipaged.config import SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import Scheduler, SchedulerConfig
from minipaged.engine import Engine

DISTRIBUTIONS = ("instruction", "conversation")
WIDTHS = (2, 4, 6)
# Percent of blocks saved with 2, 4 and 6 continuations by OPT-13B on Alpaca and ShareGPT. The paper gives all
# numbers for Alpaca, and for ShareGPT the least and the greatest.
PAPER = {
    ("instruction", "parallel"): (6.09, 8.53, 9.79),
    ("instruction", "beam"): (37.56, 53.13, 55.16),
    ("conversation", "parallel"): (16.2, None, 30.5),
    ("conversation", "beam"): (44.3, None, 66.3),
}
MAX_SAMPLED_LEN = 2048
MAX_SAMPLED_SEQS = 96
NUM_FOLLOWERS = 16
FOLLOWER_TOKENS = 16


def measure(engine: Engine, *, num_requests: int, num_sampled: int, seed: int = 0, progress=None) -> dict:
    """Savings of each distribution, method and width, and of a shared system prompt.

    Args:
        num_requests: searched with beams, by the engine; all of a distribution at once.
        num_sampled: with several samples, by a scheduler alone.
        progress: called with a line of text after each.

    Returns ``{"rows": [...], "prefix": {...}}``.

    Raises:
        MinipagedError: lengths or continuations do not fit the engine's limits.
    """
    report = progress or (lambda line: None)
    limits = engine.scheduler.config
    # Every beam might need blocks of its own for everything.
    longest = min(engine.max_model_len, limits.num_blocks // max(WIDTHS) * limits.block_size)
    vocab_size = engine.model.config.vocab_size
    rows = []
    for distribution in DISTRIBUTIONS:
        sampled = make_workload(distribution, num_sampled, seed, vocab_size=vocab_size, max_model_len=MAX_SAMPLED_LEN)
        searched = make_workload(distribution, num_requests, seed, vocab_size=vocab_size, max_model_len=longest)
        for method, workload in (("parallel", sampled), ("beam", searched)):
            for width, paper in zip(WIDTHS, PAPER[distribution, method], strict=True):
                if method == "parallel":
                    saving = _sample(workload, width, limits.block_size)
                else:
                    saving = _search(engine, workload, width)
                count = len(workload.requests)
                row = {
                    "distribution": distribution,
                    "method": method,
                    "width": width,
                    "num_requests": count,
                    "mean_prompt_len": sum(len(request.prompt) for request in workload.requests) / count,
                    "mean_output_len": sum(request.max_tokens for request in workload.requests) / count,
                    "paper": None if paper is None else paper / 100,
                    **saving,
                }
                rows.append(row)
                report(f"{distribution}, {method} {width}: {row['saved']:.1%} of the blocks saved")
    return {"seed": seed, "rows": rows, "prefix": _shared_prefix(engine, seed)}


class _Count:
    """Sums over steps of the blocks in use and of the entries of block tables."""

    def __init__(self):
        self.blocks = self.entries = self.steps = 0

    def add(self, scheduler: Scheduler) -> None:
        stats = scheduler.stats()
        self.blocks += stats["num_blocks_used"]
        self.entries += stats["num_block_references"]
        self.steps += 1

    def result(self) -> dict:
        return {
            "saved": 1 - self.blocks / self.entries,
            "steps": self.steps,
            "mean_blocks": self.blocks / self.steps,
            "mean_blocks_unshared": self.entries / self.steps,
        }


def _sample(workload: Workload, width: int, block_size: int) -> dict:
    """A scheduler serves the requests, each with ``width`` samples; sample ``i`` of a request is all ``i``."""
    scheduler = make_scheduler(
        SchedulerConfig(
            num_blocks=2 * MAX_SAMPLED_SEQS * -(-MAX_SAMPLED_LEN // block_size),
            block_size=block_size,
            max_model_len=MAX_SAMPLED_LEN,
            max_num_seqs=MAX_SAMPLED_SEQS,
            max_num_batched_tokens=MAX_SAMPLED_LEN,
            enable_prefix_caching=False,
        )
    )
    for number, request in enumerate(workload.requests):
        params = SamplingParams(n=width, max_tokens=request.max_tokens, ignore_eos=True)
        scheduler.add(Request(str(number), request.prompt, params))
    sample_of: dict[str, int] = {}
    count = _Count()
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        scheduler.update(plan)
        for sequence in plan.scheduled:
            if not sequence.samples:
                continue
            request = scheduler.requests[sequence.request_id]
            ids = [request.request_id]
            if request.request_id not in sample_of:
                ids += [f"{request.request_id}#{sample}" for sample in range(1, width)]
                for sample, child_id in enumerate(ids):
                    sample_of[child_id] = sample
                    if sample:
                        scheduler.fork(request.request_id, child_id, request.params)
            for child_id in ids:
                scheduler.append(child_id, [sample_of[child_id]])
        count.add(scheduler)
        for request in [r for r in scheduler.running if r.num_tokens == r.max_total_tokens]:
            scheduler.finish(request.request_id)
    return count.result()


def _search(engine: Engine, workload: Workload, width: int) -> dict:
    """The engine serves the requests with beam search."""
    engine.use_policy(engine.config.policy, enable_prefix_caching=False)
    for request in workload.requests:
        params = SamplingParams(use_beam_search=True, beam_width=width, max_tokens=request.max_tokens, ignore_eos=True)
        engine.add_request(request.prompt, params)
    count = _Count()
    while engine.has_unfinished():
        engine.step()
        count.add(engine.scheduler)
    return count.result()


def _shared_prefix(engine: Engine, seed: int) -> dict:
    """Requests that begin with one system prompt of half of ``max_model_len``, at most 512 tokens."""
    length = min(512, engine.max_model_len // 2)
    workload = make_workload(
        "fixed",
        1 + NUM_FOLLOWERS,
        seed,
        vocab_size=engine.model.config.vocab_size,
        max_model_len=engine.max_model_len,
        input_len=length,
        output_len=FOLLOWER_TOKENS,
    )
    system, *questions = (request.prompt for request in workload.requests)
    engine.use_policy(engine.config.policy, enable_prefix_caching=True)
    count = _Count()
    for question in questions:
        params = SamplingParams(temperature=0, max_tokens=FOLLOWER_TOKENS, ignore_eos=True)
        engine.add_request(system + question[:FOLLOWER_TOKENS], params)
    while engine.has_unfinished():
        engine.step()
        count.add(engine.scheduler)
    stats = engine.scheduler.stats()
    computed, cached = stats["num_prompt_tokens_computed"], stats["num_prompt_tokens_cached"]
    return {
        "num_requests": NUM_FOLLOWERS,
        "prefix_len": length,
        "hit_rate": cached / (cached + computed),
        **count.result(),
    }
