"""The scheduler that a policy names."""

from __future__ import annotations

from collections.abc import Callable

from minipaged.core.scheduler import Scheduler, SchedulerConfig
from minipaged.core.static_scheduler import StaticScheduler


def make_scheduler(config: SchedulerConfig, on_event: Callable[[str, int], None] | None = None) -> Scheduler:
    """A :class:`Scheduler` (``fcfs``, ``priority``) or :class:`StaticScheduler` (``static``)."""
    return (StaticScheduler if config.policy == "static" else Scheduler)(config, on_event)
