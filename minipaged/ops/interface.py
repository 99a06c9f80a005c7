"""The operators that a backend implements, and the arrays that describe one step.

The decoder is written once against :class:`Ops`; ``reference/`` implements it in NumPy. Shapes are
stated here and nowhere else:

    T  tokens of the step, all sequences one after the other      S  sequences of the step
    L  rows of T whose logits are wanted                          H  hidden_size
    Nq, Nkv  num_heads, num_kv_heads (Nq a multiple of Nkv)       D  head_dim

A cache is one layer's K or V, ``[num_blocks, block_size, Nkv, D]``; slot ``s`` of it is block
``s // block_size``, offset ``s % block_size``. Memory that no token was written to may hold
anything, NaN included, and must not reach a result, not even multiplied by zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass
class Batch:
    """One step: for each sequence the tokens to compute, and where its K and V lie.

    Sequence ``i`` has the rows ``query_start_loc[i]`` to ``query_start_loc[i + 1]`` of the
    token arrays; they are the last of its ``context_lens[i]`` tokens, in order. A sequence has at
    least one row.
    """

    input_ids: np.ndarray  #: int32 [T]
    positions: np.ndarray  #: int32 [T], of each token in its sequence, from 0
    slot_mapping: np.ndarray  #: int64 [T], distinct slots that receive the tokens' K and V
    query_start_loc: np.ndarray  #: int32 [S + 1], from 0 to T
    context_lens: np.ndarray  #: int32 [S], tokens in the KV cache after this step, the new ones included
    block_tables: np.ndarray  #: int32 [S, max_blocks], padded with 0
    logits_indices: np.ndarray  #: int32 [L], rows in ascending order, each once


class Ops(Protocol):
    """Everything the decoder computes. Arrays are float32; a result may share no memory with an input."""

    def embedding(self, ids: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Rows ``ids [n]`` of ``table [rows, width]``, as a new array ``[n, width]``."""
        ...

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """``x / sqrt(mean(x²) + eps) * weight`` over the last axis; ``x [..., W]``, ``weight [W]``."""
        ...

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
        """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis; ``x [..., W]``."""
        ...

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """``x [n, in] @ weight[out, in].T + bias[out]`` -> ``[n, out]``."""
        ...

    def rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
        """Rotate ``x [T, heads, D]`` in place, each token by its row of ``cos``, ``sin [T, R / 2]``.

        Value ``i`` of a head pairs with value ``i + R / 2``, for ``i < R / 2``; those from ``R`` on
        stay as they are.
        """
        ...

    def write_kv(
        self, k: np.ndarray, v: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, slot_mapping: np.ndarray
    ) -> None:
        """Store ``k``, ``v [T, Nkv, D]`` at the slots ``slot_mapping [T]``."""
        ...

    def plan_attention(self, batch: Batch, block_size: int, sliding_window: int | None) -> Any:
        """What :meth:`paged_attention` needs to know of a step; made once, used by all equal layers.

        With ``sliding_window`` a token sees itself and the ``sliding_window - 1`` tokens before it.
        """
        ...

    def paged_attention(
        self,
        q: np.ndarray,
        k_cache: np.ndarray,
        v_cache: np.ndarray,
        plan: Any,
        scale: float,
        soft_cap: float | None = None,
    ) -> np.ndarray:
        """Causal attention of ``q [T, Nq, D]`` over the sequences' own K and V -> ``[T, Nq, D]``.

        Query head ``h`` uses KV head ``h // (Nq / Nkv)``. Scores are ``scale * q·k``, then, if
        given, ``soft_cap * tanh(score / soft_cap)``; a softmax over the visible tokens weighs V.
        The step's own K and V have been written before. NaN or infinity in a sequence's K or V may
        reach any of its own rows in the step, and never another sequence's.
        """
        ...

    def activation(self, name: str, x: np.ndarray) -> np.ndarray:
        """``"silu"``, ``"gelu"`` (exact) or ``"gelu_tanh"`` of each value."""
        ...

    def gated_activation(self, name: str, gate_up: np.ndarray) -> np.ndarray:
        """``activation(gate) * up`` for ``gate_up [n, 2 I]``, the gate's half first -> ``[n, I]``."""
        ...

    def soft_cap(self, x: np.ndarray, cap: float) -> np.ndarray:
        """``cap * tanh(x / cap)`` of each value."""
        ...

    def moe(
        self,
        x: np.ndarray,
        router: np.ndarray,
        gate_up: np.ndarray,
        down: np.ndarray,
        experts_per_token: int,
        normalize: bool,
        activation: str,
    ) -> np.ndarray:
        """A mixture of E gated feed-forward experts: ``x [n, H]`` -> ``[n, H]``.

        ``router [E, H]``, ``gate_up [E, 2 I, H]``, ``down [E, H, I]``. A token goes to its
        ``experts_per_token`` likeliest experts (softmax of the router over all E; the lower index
        wins a tie), weighted by these probabilities, which ``normalize`` makes sum to one.
        """
        ...
