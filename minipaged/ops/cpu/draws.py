"""A token drawn from a row of logits, as :mod:`minipaged.sampling.filters` and ``draw.py`` there define it, or none.

The definition weighs all tokens with NumPy's exp, sorts, and sums in a certain order. Here weights differ from
those by 1e-12, and sums by their order, by as much as rounding may do; so every decision (does a weight reach min_p,
which entry makes the nucleus reach top_p, between which sums does the draw lie) is looked at: where it would be
another one within that much, nothing is decided, and the caller has to follow the definition. That is one draw in a
million from a flat row, and fewer from others. So the tokens are those of the definition, whichever way they come.

    no filter      sums of weights over chunks of 256 logits; then the weights of the chunk that is hit
    top_k, min_p   list the logits above a threshold, weigh these
    top_p          sums over chunks for the total; lower a threshold until what is listed holds enough of it

The nucleus of a list ends in one bucket of a histogram over the bits of the weights, of which only that is sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import exp, log

import numpy as np
from numba.core.ccallback import CFunc

from minipaged.config import SamplingParams

from . import selection, weights
from .calls import address, callable_of
from .compile_cache import c_function
from .weights import CHUNK, WEIGHT_ERROR

_SUM_ERROR = 2.0**-51
"""For each number that is summed: twice the 2**-53 of a sum, in either of two orders."""
_MARGIN = 0.01
"""Thresholds are put lower by this much (of the temperature), so that rounding cannot hide what reaches them."""
_FIRST_OCTAVES, _MORE_OCTAVES = 5.0, 4.0
"""How far below the likeliest, in powers of two, the threshold for a nucleus begins (lower by those that 1 - top_p is
below 1), and how much lower every next one is."""
_BUCKETS = 256
_SORTED = 2048  # weights that are sorted rather than put into buckets
_LEAST_FLOAT = float(np.finfo(np.float32).min)
_TEMPERATURES = 1e-300, 1e300  #: beyond, the scale of logits, or its inverse, is not a normal number


class _Near(Exception):
    """A decision would be another one within what rounding may do."""


def _clear(is_clear) -> None:
    if not is_clear:
        raise _Near


@cache
def passes_function() -> CFunc:
    """Compile ``passes(which, a, b, c, d, e, f)``: the number of a pass below, and its arguments. They are one function
    because most of the time that a small one takes to compile has nothing to do with what it does."""

    @c_function("void(int64, int64, int64, int64, int64, int64, int64)", "draw-passes")
    def passes(which, a, b, c, d, e, f):
        if which == _WEIGH:
            weights.weigh(a, b, c, d, e)
        elif which == _WEIGH_CHUNKS:
            weights.weigh_chunks(a, b, c, d)
        elif which == _SUM_REACHING:
            weights.sum_reaching(a, b, c, d)
        elif which == _GROUP_MAXIMA:
            selection.group_maxima(a, b, c)
        elif which == _LIST_REACHING:
            selection.list_reaching(a, b, c, d, e, f)
        elif which == _SUM_BUCKETS:
            selection.sum_buckets(a, b, c, d, e)
        elif which == _LIST_BUCKET:
            selection.list_bucket(a, b, c, d, e, f)

    return passes


_WEIGH, _WEIGH_CHUNKS, _SUM_REACHING, _GROUP_MAXIMA, _LIST_REACHING, _SUM_BUCKETS, _LIST_BUCKET = range(7)


@cache
def _passes() -> Callable:
    """What calls it from Python, without the GIL; made once."""
    return callable_of(passes_function(), f"void(*)({', '.join(['int64_t'] * 7)})")


class RowDrawer:
    """Draws from rows of up to ``vocab_size`` float32 logits; one thread at a time."""

    def __init__(self, vocab_size: int):
        self._ids, self._logits = np.empty(vocab_size, np.int32), np.empty(vocab_size, np.float32)
        self._weights, self._band = np.empty(vocab_size), np.empty(vocab_size)
        self._sums, self._buckets = np.empty(vocab_size // CHUNK + 1), np.empty(_BUCKETS)
        self._settings, self._threshold = np.empty(2), np.empty(1, np.float32)
        self._total, self._found = np.empty(1), np.empty(1, np.int64)
        self._at = {name[1:]: array.ctypes.data for name, array in vars(self).items()}

    def __call__(self, row: np.ndarray, largest: float, params: SamplingParams, number: float) -> int:
        """The index that :func:`minipaged.sampling.draw.draw` would find among what
        :func:`minipaged.sampling.filters.candidates` leave of ``row``; -1: not known, a decision is a near one.

        Args:
            row: float32 ``[n]``, n from 1 to ``vocab_size``, neighbours in memory; ``-inf`` for masked ones.
            largest: the largest of them, finite.
            params: ``temperature`` is above 0.
            number: random, from [0, 1).
        """
        count, temperature = len(row), params.temperature
        if count > len(self._weights):
            raise ValueError(f"a row of {count} logits; there is room for {len(self._weights)}.")
        if not _TEMPERATURES[0] <= temperature <= _TEMPERATURES[1]:
            return -1
        self._settings[0], self._settings[1] = largest, temperature
        row_at = address(row)
        error = WEIGHT_ERROR + count * _SUM_ERROR
        top_k = params.top_k if params.top_k < count else 0
        try:
            if top_k <= 0 and params.min_p <= 0 and params.top_p >= 1:
                return self._draw_from_all(row_at, count, number, error)
            if top_k <= 0 and params.min_p <= 0:
                found, least = self._list_nucleus(row_at, count, params, error)
            else:
                found, least = self._list_top(row_at, count, top_k, params, error)
            return self._draw_from_list(found, least, number, error)
        except _Near:
            return -1

    def _draw_from_all(self, row_at: int, count: int, number: float, error: float) -> int:
        sums = self._chunk_sums(row_at, count)
        cdf = sums.cumsum()
        target, slack = number * cdf[-1], error * cdf[-1]
        chunk = _place(cdf, target)
        first = CHUNK * chunk
        inside = self._weigh(row_at + 4 * first, min(CHUNK, count - first))
        return first + _entry(inside, cdf[chunk - 1] if chunk else 0.0, target, slack)

    def _draw_from_list(self, found: int, least: float, number: float, error: float) -> int:
        """From the first ``found`` of the list that weigh ``least``."""
        sums = self._sums[: found // CHUNK + 1]
        self._total[0] = least
        _passes()(_SUM_REACHING, self._at["weights"], found, self._at["total"], self._at["sums"], 0, 0)
        cdf = sums.cumsum()
        target, slack = number * cdf[-1], error * cdf[-1]
        chunk = _place(cdf, target)
        first = CHUNK * chunk
        inside = self._weights[first : min(first + CHUNK, found)]
        inside = np.where(inside >= least, inside, 0.0)
        return int(self._ids[first + _entry(inside, cdf[chunk - 1] if chunk else 0.0, target, slack)])

    def _list_top(self, row_at: int, count: int, top_k: int, params: SamplingParams, error: float) -> tuple[int, float]:
        """List what ``top_k`` and ``min_p`` may leave; returns how many, and the weight of those that are left."""
        floor = -np.inf
        if params.min_p > 0:
            floor = self._settings[0] + params.temperature * (log(params.min_p) - _MARGIN)
        chunks = count // CHUNK
        if 0 < top_k <= 16 * chunks:  # the k-th largest of groups' maxima is one that k logits reach, and few more
            _passes()(_GROUP_MAXIMA, row_at, chunks, self._at["logits"], 0, 0, 0)
            floor = max(floor, _floor_of_kth_largest(self._logits[: 16 * chunks], top_k))
        found = self._list(row_at, count, floor)
        if 0 < top_k < found:
            kth = _kth_largest(self._logits[:found], top_k)
            kept = np.flatnonzero(self._logits[:found] >= kth)
            if len(kept) < found:
                found = len(kept)
                self._ids[:found], self._logits[:found] = self._ids[kept], self._logits[kept]
        listed, least = self._weigh(self._at["logits"], found), 0.0
        if params.min_p > 0:
            likeliest = self._logits[:found] == np.float32(self._settings[0])  # weigh 1, whatever is rounded
            _clear((likeliest | (np.abs(listed - params.min_p) > error * params.min_p)).all())
            kept = np.flatnonzero(listed >= params.min_p)
            found = len(kept)
            self._ids[:found], listed[:found] = self._ids[kept], listed[kept]
        if params.top_p < 1:
            total = float(listed[:found].sum())
            least = self._nucleus(found, params.top_p * total, error * total, error)
        return found, least

    def _list_nucleus(self, row_at: int, count: int, params: SamplingParams, error: float) -> tuple[int, float]:
        """List entries that hold the nucleus of all; returns how many, and the weight of the least of the nucleus."""
        total = float(self._chunk_sums(row_at, count).sum())
        goal, slack, largest = params.top_p * total, error * total, float(self._settings[0])
        # All entries below their even share of what the nucleus may leave out weigh less than that.
        last = 1 + log(count / ((1 - params.top_p) * total), 2)
        octaves = _FIRST_OCTAVES - log(1 - params.top_p, 2)
        while True:
            octaves = min(octaves, last)
            floor = largest - params.temperature * (octaves * log(2) + _MARGIN)
            found = self._list(row_at, count, floor)
            self._weigh(self._at["logits"], found)
            lowest = exp((float(self._threshold[0]) - largest) / params.temperature) * (1 - _MARGIN)
            if self._total[0] > goal + slack:
                try:
                    return found, self._nucleus(found, goal, slack, error, 2**-octaves, lowest)
                except _Near:
                    pass
            _clear(octaves < last)
            octaves += _MORE_OCTAVES

    def _nucleus(
        self, found: int, goal: float, slack: float, error: float, least: float = 0.0, lowest: float = 0.0
    ) -> float:
        """The least weight of the nucleus of a weighed list, which lacks nothing that weighs more than ``least``, and
        holds nothing that weighs less than ``lowest``; of equal ones, those that are not in it get the weight 0."""
        band, above, low, high = self._edge_band(found, goal, lowest)
        order = np.sort(band)
        cdf = above + order[::-1].cumsum()
        at = int(cdf.searchsorted(goal))
        _clear(at < len(cdf) and cdf[at] - goal > slack)
        before = cdf[at - 1] if at else above
        _clear(before == 0 or goal - before > slack)
        edge = float(order[::-1][at])
        first, end = order.searchsorted([edge * (1 - error), edge * (1 + error)])
        _clear(edge > least * (1 + error) and order[first] == edge == order[end - 1])
        _clear(low * (1 + error) < edge < high * (1 - error))  # no near one outside of the band
        unwanted = len(order) - 1 - at - first
        if unwanted:
            ties = np.flatnonzero(self._weights[:found] == edge)
            self._weights[ties[len(ties) - unwanted :]] = 0
        return edge

    def _edge_band(self, found: int, goal: float, lowest: float) -> tuple[np.ndarray, float, float, float]:
        """Of a weighed list, none of which weighs less than ``lowest``, the weights from ``low`` up to ``high``, among
        which the sum of the heaviest reaches ``goal``; returns them, the sum of those above, ``low`` and ``high``."""
        band, at, above, low, high = self._weights[:found], self._at["weights"], 0.0, 0.0, np.inf
        while len(band) > _SORTED:
            # Weights are ordered like their bits. That all lie between two numbers is sooner said than found.
            if lowest > 0 and at == self._at["weights"]:
                bits = np.array([lowest, 1.0]).view(np.int64)
            else:
                bits = band.view(np.int64)
            least = int(bits.min())
            differ = int(bits.max()) - least
            if not differ:
                break
            shift = max(differ.bit_length() - _BUCKETS.bit_length() + 1, 0)
            self._buckets.fill(0)
            _passes()(_SUM_BUCKETS, at, len(band), least, shift, self._at["buckets"], 0)
            cdf = above + self._buckets[: (differ >> shift) + 1][::-1].cumsum()
            place = min(int(cdf.searchsorted(goal)), len(cdf) - 1)
            above = float(cdf[place - 1]) if place else above
            bucket = len(cdf) - 1 - place
            least += bucket << shift
            _passes()(_LIST_BUCKET, at, len(band), least, shift, self._at["band"], self._at["found"])
            band, at = self._band[: self._found[0]], self._at["band"]
            borders = np.array([least, least + (1 << shift)]).view(np.float64)
            low, high = float(borders[0]) if bucket else low, float(borders[1]) if place else high
        return band, above, low, high

    def _chunk_sums(self, row_at: int, count: int) -> np.ndarray:
        _passes()(_WEIGH_CHUNKS, row_at, count, self._at["settings"], self._at["sums"], 0, 0)
        return self._sums[: count // CHUNK + 1]

    def _weigh(self, logits_at: int, count: int) -> np.ndarray:
        _passes()(_WEIGH, logits_at, count, self._at["settings"], self._at["weights"], self._at["total"], 0)
        return self._weights[:count]

    def _list(self, row_at: int, count: int, floor: float) -> int:
        """List the logits that are at least ``floor`` and finite; returns how many."""
        self._threshold[0] = max(floor, _LEAST_FLOAT)
        at = self._at
        _passes()(_LIST_REACHING, row_at, count, at["threshold"], at["ids"], at["logits"], at["found"])
        return int(self._found[0])


def _floor_of_kth_largest(values: np.ndarray, k: int) -> float:
    """What at least k of ``values`` reach."""
    folds = len(values) // (16 * k)  # more groups than that make the floor little higher
    if folds > 1:
        values = values[: len(values) // folds * folds].reshape(folds, -1).max(axis=0)
    return _kth_largest(values, k)


def _kth_largest(values: np.ndarray, k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])


def _place(cdf: np.ndarray, target: float) -> int:
    return min(int(cdf.searchsorted(target, "right")), len(cdf) - 1)


def _entry(weights: np.ndarray, before: float, target: float, slack: float) -> int:
    """The first entry at which ``before`` and the weights' sum exceed ``target``."""
    cdf = before + weights.cumsum()
    at = int(cdf.searchsorted(target, "right"))
    _clear(at < len(cdf) and cdf[at] - target > slack and target - (cdf[at - 1] if at else before) > slack)
    return at
