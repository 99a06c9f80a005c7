"""What lets others see an engine at work: observers of its steps, and pictures (:mod:`minipaged.view`)."""

from __future__ import annotations


class Observed:
    """Base of :class:`~minipaged.engine.Engine`; ``minipaged.view`` is imported when it is asked for.

    Attributes:
        observers: told of each step; what they are: :mod:`minipaged.view.recording`.
    """

    def __init__(self):
        self.observers: list = []

    def start_trace(self, max_steps: int | None = None) -> None:
        """Record every step from now on, or ``max_steps``. Raises :class:`TraceError` if that goes on already."""
        from minipaged.view import recording

        recording.start(self, max_steps)

    def stop_trace(self):
        """The :class:`~minipaged.view.Trace` since :meth:`start_trace`, without which :class:`TraceError` is raised."""
        from minipaged.view import recording

        return recording.stop(self)

    def snapshot(self):
        """Block tables and pool at this moment: a :class:`~minipaged.view.Snapshot`."""
        from minipaged.view import snapshot

        return snapshot(self.scheduler)
