"""A request that is answered by beam search: its beams advance together, one token at a time.

    step k       beam 0     beam 1     beam 2          (sequences with block tables of their own)
                   │          ├──────────┐  ✗          a beam without successor is dropped first,
    step k + 1   beam 0     beam 1     beam 2          then forks share every block of their parent

Each beam is an ordinary sequence to the scheduler: it shares steps with other requests, is chunked,
preempted and resumed like any. A beam whose logits were read awaits its token until all its
siblings are as far; then :class:`~minipaged.sampling.beam.BeamSelection` says who goes on.
"""

from __future__ import annotations

from minipaged.live_sequences import LiveSequences
from minipaged.output_builder import OutputBuilder
from minipaged.outputs import RequestOutput
from minipaged.sampling.beam import BeamSelection, Candidate, Continuation
from minipaged.sampling.step_logits import DrawOrder
from minipaged.sequence_group import Sequence, SequenceGroup


class BeamGroup(SequenceGroup):
    """As :class:`SequenceGroup`. ``sequences`` are the present beams, best first; once the search
    is over, what it returns. There is one output, at the end."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stream = False
        root = self.sequences[0]
        self._selection = BeamSelection(self.params, root.output.num_end_tokens)
        self._scores = {root: 0.0}  # cumulative; of results, as beam_score reports it
        self._found: dict[Sequence, list[Continuation]] = {}

    def _add_siblings(self) -> None:
        pass  # beams are forked as they are found

    def order(self, sequence: Sequence) -> DrawOrder:
        return DrawOrder([sequence.sampling], num_candidates=self._selection.num_candidates)

    def take(self, sequence: Sequence, tokens: list[Continuation], live: LiveSequences) -> None:
        if self.finished:
            return  # a sibling failed in this very step
        self._found[sequence] = tokens
        if len(self._found) == len(self.sequences):
            self._advance(live)

    def fail(self, sequence: Sequence, error: str, live: LiveSequences) -> None:
        if not self.finished:
            self.error = error
            self._end("error", live)

    def abort(self, live: LiveSequences) -> None:
        self._end("abort", live)

    # -- the search -------------------------------------------------------------------------------

    def _advance(self, live: LiveSequences) -> None:
        """All beams have their continuations: choose the next beams, or end."""
        candidates = [
            Candidate(beam, token, self._scores[beam] + token.log_weight)
            for beam in self.sequences
            for token in self._found[beam]
        ]
        self._found.clear()
        chosen = self._selection.select(candidates, _extend)
        if self._selection.done:
            self._conclude(self._selection.hypotheses, live)
        else:
            self._follow(chosen, live)

    def _follow(self, chosen: list[tuple[Candidate, OutputBuilder]], live: LiveSequences) -> None:
        """Make the chosen candidates the present beams."""
        parents = {candidate.beam for candidate, _ in chosen}
        for beam in self.sequences:
            if beam not in parents:
                live.drop(beam)
        beams = []
        for candidate, output in chosen:
            parent = candidate.beam
            if parent in parents:
                parents.remove(parent)  # its first successor takes its place, the others are forks
                beams.append(Sequence(self, None, parent.sampling, output))
                live.replace(parent, beams[-1])
            else:
                beams.append(Sequence(self, None, parent.sampling.fork(parent.sampling.seed), output))
                live.fork(parent, beams[-1])
        for beam, (candidate, _) in zip(beams, chosen, strict=True):  # every fork was made
            live.append(beam, candidate.token.token_id)
            beam.sampling.append(candidate.token.token_id)
        self.sequences = beams
        self._scores = {beam: candidate.score for beam, (candidate, _) in zip(beams, chosen, strict=True)}

    def _end(self, reason: str, live: LiveSequences) -> None:
        """End early: the best of the hypotheses and of the beams as they are."""
        results = list(self._selection.hypotheses)
        for beam in self.sequences:
            beam.output.end(reason)
            score = self._selection.normalised(self._scores[beam]) if beam.output.token_ids else 0.0
            results.append((score, beam.output))
        self._conclude(sorted(results, key=lambda result: -result[0]), live)

    def _conclude(self, results: list[tuple[float, OutputBuilder]], live: LiveSequences) -> None:
        sampling = self.sequences[0].sampling
        for beam in self.sequences:
            live.drop(beam)
        self.sequences = [Sequence(self, None, sampling, output) for _, output in results]
        self._scores = {beam: score for beam, (score, _) in zip(self.sequences, results, strict=True)}
        self._note_end()

    def build(self) -> RequestOutput:
        outputs = []
        for index, beam in enumerate(self.sequences[: self.params.n]):
            outputs.append(beam.output.build(index))
            outputs[-1].beam_score = self._scores[beam]
        return self._result(outputs)


def _extend(candidate: Candidate) -> OutputBuilder:
    output = candidate.beam.output.fork()
    output.append(candidate.token)
    return output
