"""What a step draws: ordered before its forward pass, taken from its logits afterwards."""

from __future__ import annotations

from minipaged.core.scheduler_output import SchedulerOutput
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.state import SamplingState
from minipaged.sampling.step_logits import DrawOrder, StepLogits
from minipaged.sequence_group import Sequence


class Draws:
    """The draws of the sequences that sample in a step.

    It is made before the forward pass, and keeps what it will need in few lists: afterwards the caches hold
    weights, and whatever is looked up must come from memory.

    Attributes:
        orders: what is wanted of the logits of each sequence that samples, in the plan's order.
    """

    def __init__(self, plan: SchedulerOutput, sequences: list[Sequence]):
        self.orders: list[DrawOrder] = []
        self._sequence_ids: list[str] = []  # of each order
        self._states: list[SamplingState] = []  # one for each token that is drawn
        self._owners: list[int] = []  # for each of these tokens, the index of its order
        self._beams: list[int] = []  # indices of orders that want continuations instead
        for scheduled, sequence in zip(plan.scheduled, sequences, strict=True):
            if not scheduled.samples:
                continue
            order, index = sequence.group.order(sequence), len(self.orders)
            num_drafts = scheduled.num_lookahead_tokens
            order.draft_token_ids = scheduled.token_ids[-num_drafts:] if num_drafts else ()
            self.orders.append(order)
            self._sequence_ids.append(scheduled.request_id)
            if order.num_candidates:
                self._beams.append(index)
                continue
            for state in order.states:
                self._states.append(state)
                self._owners.append(index)

    def take(self, logits: StepLogits) -> dict[str, list[SampledToken]]:
        """By sequence id, the tokens drawn for it; a beam's continuations."""
        rows, names = logits.sample_rows, self._sequence_ids
        drawn: dict[str, list[SampledToken]] = {name: [] for name in names}
        tokens = logits.draw([rows[owner] for owner in self._owners], self._states)
        for owner, token in zip(self._owners, tokens, strict=True):
            drawn[names[owner]].append(token)
        for index in self._beams:
            order = self.orders[index]
            drawn[names[index]] = logits.continuations(rows[index], order.states[0], order.num_candidates)
        return drawn
