"""Assembling the decoder's arrays out of a checkpoint's tensors, checked before anything is allocated.

An adapter describes a model's arrays by calling a :class:`TensorReader`. It is run twice: first
with a reader that only compares names and shapes with the file, then with one that allocates each
array at its final size and has every tensor read straight into its place. So a file that lies costs
no memory, and a good one is never in memory twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from minipaged.errors import ModelFormatError
from minipaged.model.weights import ModelWeights, Pack, TensorSource

# Buffers that old versions of transformers stored beside the weights; computed from the configuration.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias)$")
_SHOWN = 5  # problems named in one error
_ENOUGH = 1000  # problems after which no more are looked for


def read_weights(
    source: TensorSource,
    assemble: Callable[[TensorReader], ModelWeights],
    ignored: str = "",
    pack: Pack | None = None,
) -> ModelWeights:
    """What ``assemble`` builds from ``source``.

    ``ignored`` is a regular expression of further tensor names that carry nothing. ``pack`` converts
    each matrix as soon as it has been read, so that no more than one is in memory in float32. Raises
    :class:`~minipaged.errors.ModelFormatError` for missing, misshaped or unexpected tensors.
    """
    check = TensorReader(source, dry_run=True)
    assemble(check)
    check.refuse_problems(re.compile(ignored) if ignored else None)
    return assemble(TensorReader(source, dry_run=False, pack=pack))


class TensorReader:
    """Arrays by the names of their parts; with ``dry_run`` they are placeholders that occupy no memory."""

    def __init__(self, source: TensorSource, dry_run: bool, pack: Pack | None = None):
        self.source = source
        self.dry_run = dry_run
        self.pack = pack
        self.stored = set(source.names())
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshaped: list[str] = []

    def has(self, name: str) -> bool:
        return name in self.stored

    def array(self, shape: tuple[int, ...], parts: list[tuple[str, tuple]], transposed: bool = False) -> np.ndarray:
        """A float32 array of ``shape``; each part is a tensor's name and the index it fills.

        ``transposed``: the file holds every part with its axes reversed.
        """
        out = np.broadcast_to(np.float32(0), shape) if self.dry_run else self._allocate(shape)
        for name, index in parts:
            place = out[index].T if transposed else out[index]
            if self.dry_run:
                self._check(name, place.shape)
            else:
                self.source.read(name, out=place)
        return out

    def vector(self, name: str, size: int, plus: float = 0.0) -> np.ndarray:
        """``[size]``, with ``plus`` added (Gemma stores norm weights less one)."""
        out = self.array((size,), [(name, ())])
        if plus and not self.dry_run:
            out += np.float32(plus)
        return out

    def rows(self, parts: list[tuple[str, int]], *columns: int, transposed: bool = False) -> np.ndarray:
        """``[sum of rows, *columns]``: tensors of ``[rows, *columns]`` stacked in order."""
        places, start = [], 0
        for name, count in parts:
            places.append((name, (slice(start, start + count),)))
            start += count
        return self.array((start, *columns), places, transposed)

    def matrix(
        self, parts: list[tuple[str, int]], columns: int, transposed: bool = False, role: str = "linear"
    ) -> Any:
        """As :meth:`rows`, in the form that the backend multiplies with."""
        if self.pack is not None and not self.dry_run and not transposed:
            target = self.pack.start(sum(count for _, count in parts), columns, role)
            if target is not None:
                start = 0
                for name, count in parts:
                    self.source.read(name, out=target.part(start, count))
                    start += count
                return target.packed
        return self.packed(self.rows(parts, columns, transposed=transposed), role)

    def packed(self, matrix: np.ndarray, role: str = "linear") -> Any:
        """``matrix`` in the form that the backend multiplies with (roles: :data:`~minipaged.model.weights.Pack`)."""
        return matrix if self.pack is None or self.dry_run else self.pack(matrix, role)

    def shared(self, name: str, copy: str, *shape: int) -> np.ndarray:
        """``name``, of which the file also stores ``copy``; both must hold the same numbers.

        The two are read into the same memory one after the other and compared by digest.
        """
        if self.dry_run:
            self.array(shape, [(copy, ())])
            return self.array(shape, [(name, ())])
        out, digests = self._allocate(shape), []
        for each in (copy, name):
            self.source.read(each, out=out)
            digests.append(hashlib.blake2b(out.ravel("K").data).digest())
        if len(set(digests)) == 2:
            raise ModelFormatError(
                f"tie_word_embeddings is true, but the file stores {copy} and {name} with different numbers. "
                "Set tie_word_embeddings to false, or remove the tensor that is wrong."
            )
        return out

    def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """Memory for float32 values; column by column for a matrix with at least as many outputs as inputs.

        BLAS multiplies a few tokens by such a matrix a tenth to a quarter faster in this order; one with
        more inputs than outputs is faster row by row. What will be packed stays row by row.
        """
        by_columns = self.pack is None and len(shape) == 2 and shape[0] >= shape[1]
        return np.empty(shape, dtype=np.float32, order="F" if by_columns else "C")

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        self.used.add(name)
        if name not in self.stored:
            self.missing.append(name)
        elif tuple(self.source.shape(name)) != shape:
            self.misshaped.append(f"{name} has {tuple(self.source.shape(name))}, needed {shape}")
        if len(self.missing) + len(self.misshaped) >= _ENOUGH:
            self.refuse_problems(None)

    def refuse_problems(self, ignored: re.Pattern | None) -> None:
        """Raise for what the dry run found: tensors missing, of another shape, or left over."""
        extra = [
            name
            for name in sorted(self.stored - self.used)
            if not _BUFFERS.search(name) and not (ignored and ignored.search(name))
        ]
        for problems, what, remedy in (
            (self.missing, "tensors missing from the file", "Is a shard missing? Is config.json another model's?"),
            (self.misshaped, "tensors of another shape than config.json asks for", "Do the two belong together?"),
            (extra, "tensors unknown to this architecture", "Leaving them out would change the result."),
        ):
            if problems:
                shown = "; ".join(problem[:160] for problem in problems[:_SHOWN])
                more = ", and more" if len(problems) > _SHOWN else ""
                raise ModelFormatError(f"{what} ({len(problems)}): {shown}{more}. {remedy}")
