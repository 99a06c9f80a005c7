"""What goes into a scheduler and what comes out, as plain data: limits in, one step out."""

from __future__ import annotations

from dataclasses import dataclass, field

from minipaged.errors import ConfigError


@dataclass(frozen=True)
class SchedulerConfig:
    """The limits of a scheduler; names and meanings are those of ``EngineConfig``."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    num_host_blocks: int = 0

    def __post_init__(self):
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, fewer than max_num_seqs "
                f"({self.max_num_seqs}): running sequences would starve. Raise the first or lower the second."
            )


@dataclass(slots=True)
class ScheduledSequence:
    """What one sequence does in a step.

    Attributes:
        request_id: whose tokens these are.
        token_ids: tokens to compute, at positions ``num_computed_tokens`` and following.
        num_computed_tokens: tokens whose KV is already there, before this step.
        block_ids: the whole block table; covers all positions of this step. The same list as in the last step
            where the table is the same.
        samples: whether the last token known is among them, so that its logits give the next.
        num_lookahead_tokens: how many of the tokens, the last ones, are not known but a draft.
    """

    request_id: str
    token_ids: list[int]
    num_computed_tokens: int
    block_ids: list[int]
    samples: bool
    num_lookahead_tokens: int = 0


@dataclass(slots=True)
class SchedulerOutput:
    """One step, as plain data.

    Attributes:
        scheduled: sequences with one token first, then those with more.
        copies: ``(source, destination)`` block ids, to be copied in this order before the forward
            pass. A source may become a destination later in the list, never the other way round.
        swap_out: ``(block id, host block id)`` to be copied to host memory before all else.
        swap_in: ``(host block id, block id)`` to be copied back next, before ``copies``.
        preempted: request ids that lost their blocks in this step.
        num_tokens: tokens of all sequences together.
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    num_tokens: int = 0
