"""Static batching with contiguous reservation: how serving worked before paged attention.

    ┌──────── max_model_len ────────┬──────── max_model_len ────────┬────
    │ used │   reserved, never used │ used          │ reserved      │ …     one region a sequence
    └──────┴────────────────────────┴───────────────┴───────────────┴────

Each sequence reserves one contiguous region for the longest text it could become, and a batch is
formed only when the batch before it has ended, so everyone waits for the slowest member. Both
wastes are what the paged scheduler removes; this one stays as the baseline to measure against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from minipaged.config import SamplingParams
from minipaged.core.request import Request
from minipaged.core.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from minipaged.errors import PoolTooSmallError


class StaticScheduler(Scheduler):
    """As :class:`Scheduler`, but without sharing, preemption, or joining a batch under way."""

    def __init__(self, config: SchedulerConfig, on_event: Callable[[str, int], None] | None = None):
        super().__init__(dataclasses.replace(config, enable_prefix_caching=False), on_event)
        self.region_blocks = self._num_blocks(config.max_model_len)
        self.batch_size = min(config.max_num_seqs, config.num_blocks // self.region_blocks)

    def check_admissible(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """As :meth:`Scheduler.check_admissible`; the pool must hold one whole region besides."""
        super().check_admissible(num_prompt_tokens, params)
        if self.batch_size == 0:
            raise PoolTooSmallError(
                f"policy 'static' reserves max_model_len ({self.config.max_model_len} tokens, "
                f"{self.region_blocks} KV blocks) for each request, the pool has {self.config.num_blocks} blocks. "
                "Raise num_blocks or lower max_model_len."
            )

    def _admit_waiting(self, output: SchedulerOutput) -> None:
        if self.running:
            return  # the batch waits for its slowest member
        for _ in range(min(self.batch_size, len(self.waiting))):
            self._start(self.waiting[0], hits=[])
        self._continue_running(output)

    def _reserve(self, request: Request) -> None:
        # A batch starts with the whole pool free, so member i gets exactly the i-th region.
        first = len(self.running) * self.region_blocks
        request.block_table.extend(self.pool.allocate(self.region_blocks, after=first - 1))

    def _roll_back(self, request: Request) -> None:
        pass  # the region stays reserved

    def _may_share(self) -> bool:
        return False  # a copy would need a block of somebody's region
