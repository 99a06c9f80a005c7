"""What a step costs, learned while running: seconds as a straight line over rows."""

from __future__ import annotations

DECAY = 0.98  # a step counts half after 34 others
OUTLIER = 1.5  # a step that took longer than this many times the expected was disturbed from outside
EARLY_STEPS = 3  # among so many, the first ones, the quickest shows which were disturbed
PRIOR_WEIGHT = 0.1  # of the first guess at the slope, in units of the variance of rows
PRIOR_ROWS = 16  # first guess: the fixed part of a step costs as much as this many rows


class LinearCost:
    """``fixed + per_row * rows``, fitted by least squares to recent steps, older ones counting less.

    While all steps seen had the same number of rows their slope is unknown; a guess stands in, which
    the first other step outweighs.
    """

    def __init__(self) -> None:
        self.num_observed = 0
        self._start()

    def _start(self) -> None:
        """Know of no step."""
        self.fixed = 0.0
        self.per_row = 0.0
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was observed yet."""
        return self.num_observed > 0

    def __call__(self, rows: float) -> float:
        """Seconds that a step of ``rows`` rows is expected to take; 0 before any was observed."""
        return self.fixed + self.per_row * rows

    def observe(self, rows: int, seconds: float) -> float:
        """A step of ``rows`` rows took ``seconds``; returns how many of them are believed to be its own."""
        if self.num_observed < EARLY_STEPS and OUTLIER * seconds < self(rows):
            self._start()  # those before were disturbed: nothing told so, and they would count for long
        elif self.known:
            seconds = min(seconds, OUTLIER * self(rows))
        self.num_observed += 1
        self._weight = self._weight * DECAY + 1
        self._rows = self._rows * DECAY + rows
        self._seconds = self._seconds * DECAY + seconds
        self._rows_rows = self._rows_rows * DECAY + rows * rows
        self._rows_seconds = self._rows_seconds * DECAY + rows * seconds
        self._fit()
        return seconds

    def _fit(self) -> None:
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = max(self._rows_rows / self._weight - mean_rows**2, 0.0)
        covariance = self._rows_seconds / self._weight - mean_rows * mean_seconds
        guess = mean_seconds / (mean_rows + PRIOR_ROWS)
        slope = (covariance + PRIOR_WEIGHT * guess) / (variance + PRIOR_WEIGHT)
        self.per_row = min(max(slope, 0.0), mean_seconds / mean_rows)  # neither part can be negative
        self.fixed = mean_seconds - self.per_row * mean_rows
