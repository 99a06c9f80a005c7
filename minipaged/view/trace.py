"""``Trace``: what an engine did, step by step, as plain data that can be saved, loaded and drawn.

The file is JSON. Of each step it has what changed (short keys, ``after`` for what came of the step):

    {"format": "minipaged-trace", "version": 1,
     "about": {"block_size": 16, "num_blocks": 64, ...},
     "sequences": [["request-0", prompt tokens, tokens known, number of the parent of a fork], ...],
     "start": {the state in which recording began},
     "steps": [{"t": microseconds since the beginning, "us": [planning, computing, the rest],
                "run": [[number, tokens, tokens there before, guesses], ...],   left out: as before, 1 token each
                "new", "preempt", "finish", "abort": [numbers],
                "admit": [[number, tokens known], ...],
                "tables": [[number, blocks kept, [block ids that follow]], ...],
                "blocks": {"allocate" | "share" | "free" | "publish" | "evict": [block ids]},
                "copies": [[source, destination], ...], "swap_out", "swap_in": [[from, to], ...],
                "after": {"new", "finish", "abort", "tables", "blocks", "accepted": [[number, guesses], ...]}}],
     "end": {what changed after the last step}}

Sequences are named by the number of their arrival, because an id can be used again.
"""

from __future__ import annotations

import json
from pathlib import Path

from minipaged.errors import TraceError
from minipaged.view.replay import Steps
from minipaged.view.state import Snapshot, Step
from minipaged.view.svg import write_text

FORMAT, VERSION = "minipaged-trace", 1
MAX_FILE_BYTES = 1 << 30


class Trace:
    """Steps of an engine. ``LLM.stop_trace()``, ``Recorder.stop()`` and :meth:`load` make one.

    Attributes:
        about: facts of the engine: ``block_size``, ``num_blocks``, ``max_num_seqs``, ``max_num_batched_tokens``,
            ``policy``; of an engine with a model also ``model`` and ``device``.
        sequences, start, records, end_record: as in the file (see the module).
        steps: a sequence of :class:`~minipaged.view.state.Step`.
    """

    def __init__(self, about: dict, sequences: list[list], start: dict, records: list[dict], end_record: dict):
        self.about = about
        self.sequences = sequences
        self.start = start
        self.records = records
        self.end_record = end_record
        self.steps = Steps(self)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} steps, {len(self.sequences)} sequences>"

    def at(self, index: int) -> Step:
        """Step ``index``; the same as ``steps[index]``."""
        return self.steps[index]

    @property
    def end(self) -> Snapshot:
        """The state after the last step."""
        return self.steps.end()

    # -- files ----------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The text of the file."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "about": self.about,
            "sequences": self.sequences,
            "start": self.start,
            "steps": self.records,
            "end": self.end_record,
        }
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

    def save(self, path) -> None:
        """Write the trace into a file. Raises :class:`InvalidParameterError` where that is impossible."""
        write_text(path, self.to_json() + "\n")

    def to_html(self, path, title: str | None = None) -> None:
        """Write a self-contained page with a slider over the steps. Raises as :meth:`save`."""
        from minipaged.view import html

        write_text(path, html.to_html(self, title))

    def to_chrome(self, path) -> None:
        """Write a file that Perfetto (https://ui.perfetto.dev) and chrome://tracing open. Raises as :meth:`save`."""
        from minipaged.view import chrome

        write_text(path, chrome.to_chrome(self) + "\n")

    @classmethod
    def load(cls, path) -> Trace:
        """Read a trace, and check it.

        Raises:
            TraceError: there is no such file, it is no trace, or it is damaged; the text says where.
        """
        name = str(path)
        try:
            size = Path(path).stat().st_size
            if size > MAX_FILE_BYTES:
                raise TraceError(f"{name} has {size:,} bytes; a trace has at most {MAX_FILE_BYTES:,}.")
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise TraceError(f"cannot read the trace {name}: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise TraceError(f"{name} is no trace: byte {error.start} is not UTF-8.") from None
        return cls.from_json(text, name)

    @classmethod
    def from_json(cls, text: str, name: str = "the text") -> Trace:
        """A trace from the text of its file, checked; ``name`` is for errors, which are those of :meth:`load`."""
        from minipaged.view.trace_check import check

        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{name} is no trace: not JSON ({error}).") from None
        check(data, name)
        return cls(data["about"], data["sequences"], data["start"], data["steps"], data["end"])
