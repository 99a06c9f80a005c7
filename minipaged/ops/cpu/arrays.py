"""The arrays of a batch where the compiled step finds them: their addresses stay, a step writes values only.

After a forward pass the caches hold weights, and Python begins in cold memory. So what counts here is how
little is touched, and in how few different ways.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np

from minipaged.ops.interface import Batch

from . import logits


class StepArrays:
    """Memory for the batch fields of a MODEL record (:data:`~minipaged.ops.cpu.tables.BATCH_FIELDS`).

    Args:
        model: the record, ``[1]``.
        max_num_tokens: tokens of a step, at most.
        queries_per_tile: queries that attention takes together.
        row_length: of a row of logits, in float32.
        num_threads: among which rows are shared out.
    """

    def __init__(
        self, model: np.ndarray, max_num_tokens: int, queries_per_tile: int, row_length: int, num_threads: int
    ):
        self._queries_per_tile, self._num_threads = queries_per_tile, num_threads
        self._input_ids, self._positions, self._logits_indices = np.zeros((3, max_num_tokens), np.int32)
        self._slot_mapping = np.zeros(max_num_tokens, np.int64)
        self._tiles = np.zeros((max_num_tokens, 4), np.int32)
        self._found = np.zeros((2, max_num_tokens), np.int32)
        self._num_decoded = 0  # sequences of the last step, if it was one of decoding, and their order in the tiles
        self._order: np.ndarray | slice = slice(None)
        for name in ("input_ids", "positions", "logits_indices", "slot_mapping", "tiles"):
            model[name] = getattr(self, f"_{name}").ctypes.data
        model["likeliest"], model["magnitudes"] = (row.ctypes.data for row in self._found)
        self._logits = np.zeros((0, row_length), np.float32)
        self._row_length = row_length
        model["logits_stride"] = 4 * row_length
        self._tables = np.zeros((0, 0), np.int32)
        names = "num_tokens num_tiles num_logits block_tables block_table_stride logits".split()
        self._fields = {name: model[name] for name in names}

    def fill(self, batch: Batch) -> np.ndarray:
        """Write a step; returns where its logits will be, float32 ``[L, row_length]``."""
        num_tokens, num_logits, fields = len(batch.input_ids), len(batch.logits_indices), self._fields
        self._input_ids[:num_tokens] = batch.input_ids
        self._positions[:num_tokens] = batch.positions
        self._slot_mapping[:num_tokens] = batch.slot_mapping
        self._logits_indices[:num_logits] = batch.logits_indices
        if batch.block_tables is not self._tables:
            self._tables = np.ascontiguousarray(batch.block_tables, np.int32)
            fields["block_tables"][0] = self._tables.ctypes.data
            fields["block_table_stride"][0] = self._tables.strides[0]
        fields["num_tokens"][0] = num_tokens
        fields["num_tiles"][0] = self._fill_tiles(batch)
        fields["num_logits"][0] = num_logits
        return self._logits_memory(num_logits, keep=num_logits <= len(batch.context_lens))

    def _logits_memory(self, num_logits: int, keep: bool) -> np.ndarray:
        """float32 ``[num_logits, row_length]``: that of the last step's logits, if it has the shape and nobody else
        holds it; ``keep`` it for the next step (a whole prompt's is too large)."""
        memory = self._logits
        if len(memory) != num_logits or sys.getrefcount(memory) > 3:  # self, memory and the call
            memory = np.empty((num_logits, self._row_length), np.float32)
            self._fields["logits"][0] = memory.ctypes.data
            self._logits = memory if keep else memory[:0].copy()
        return memory

    def findings(self, num_logits: int) -> tuple[list[int], list[bool]]:
        """What :func:`minipaged.sampling.sampler.examine` says of the logits of the step that was computed."""
        return logits.findings(self._found[:, :num_logits])

    def _fill_tiles(self, batch: Batch) -> int:
        """Rows of (sequence, first row, queries, first position): the queries that share K and V. Returns how many.

        The longest context first, so that the threads end together.
        """
        if len(batch.positions) == len(batch.context_lens):  # one token of each sequence
            return self._fill_decode_tiles(batch.positions)
        size = self._queries_per_tile
        lengths = np.diff(batch.query_start_loc)
        counts = -(-lengths // size)
        sequence = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
        first_row = batch.query_start_loc[sequence] + number * size
        queries = np.minimum(size, batch.query_start_loc[sequence + 1] - first_row)
        tiles = np.stack([sequence, first_row, queries, batch.positions[first_row]], axis=1)
        self._tiles[: len(tiles)] = tiles[np.argsort(tiles[:, 3])[::-1]]
        self._num_decoded = 0
        return len(tiles)

    def _fill_decode_tiles(self, positions: np.ndarray) -> int:
        """As :meth:`_fill_tiles`, in the order of rows but for those of one thread, which has their queries in its
        caches. Sequences that decode together keep their order: they grow alike."""
        count = len(positions)
        tiles = self._tiles[:count]
        if self._num_decoded != count:
            cuts = [count * thread // self._num_threads for thread in range(self._num_threads + 1)]
            shares = [first + np.argsort(-positions[first:last], kind="stable") for first, last in pairwise(cuts)]
            order = np.concatenate(shares)
            tiles[:, 0] = tiles[:, 1] = order
            tiles[:, 2] = 1
            self._num_decoded = count
            self._order = slice(None) if (np.diff(order) == 1).all() else order
        tiles[:, 3] = positions[self._order]
        return count
