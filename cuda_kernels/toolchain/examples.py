"""One representative launch of every kernel, for reports, for predictions and for the mutation sweep.

``SMALL`` has odd sizes and tails, so that every bounds check matters; ``SMOLLM2`` is one decode step of
SmolLM2-135M, ``LLAMA_8B`` of Llama 3's 8B, one request with a context of 1024 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cuda_kernels import (
    activation,
    argmax,
    attention_decode,
    attention_plain,
    attention_prefill,
    attention_reduce,
    copy_blocks,
    embedding,
    layer_norm,
    logprobs,
    moe,
    packing,
    processors,
    product,
    product_plain,
    rms_norm,
    rope_kv,
    row_gather,
    sample,
)
from cuda_kernels.kernel import Kernel
from cuda_kernels.toolchain.interpreter import Counters, run

NOTHING = np.zeros(1, np.int32)
NO_FLOATS = np.zeros(1, np.float32)


@dataclass(frozen=True)
class Sizes:
    """``queries``: tokens of each sequence in this step; ``contexts``: tokens in its cache after it."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    block_size: int
    queries: tuple[int, ...]
    contexts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.queries)


SMALL = Sizes(392, 40, 4, 2, 24, 301, 4, queries=(1, 3), contexts=(39, 70))
LONG = Sizes(392, 40, 4, 2, 24, 301, 16, queries=(1, 1), contexts=(560, 1100))
SMOLLM2 = Sizes(576, 1536, 9, 3, 64, 49152, 16, queries=(1,), contexts=(1024,))
LLAMA_8B = Sizes(4096, 14336, 32, 8, 128, 128256, 16, queries=(1,), contexts=(1024,))
MODELS = {"smollm2-135m": SMOLLM2, "llama-8b": LLAMA_8B}


@dataclass
class Example:
    """A launch: ``arguments`` in the order of the signature; ``must_move``: bytes that any such kernel must move."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple
    must_move: int | None = None

    def run(self, cc, checks: bool = True, on_access=None) -> Counters:
        """On copies of the arrays, so that an example can be run again."""
        return run(self.kernel, self.grid, self.fresh(), cc, checks, on_access=on_access)

    def fresh(self) -> list:
        return [each.copy() if isinstance(each, np.ndarray) else each for each in self.arguments]


def _normal(rng, *shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _blank(*shape) -> np.ndarray:
    """Where a kernel writes: NaN, so that what it leaves out shows."""
    return np.full(shape, np.nan, np.float32)


def _embedding(sizes: Sizes, cc, rng) -> Example:
    ids = rng.integers(0, sizes.vocab, sizes.tokens).astype(np.int32)
    table = np.zeros((sizes.vocab, sizes.hidden), np.float32)
    table[ids] = _normal(rng, sizes.tokens, sizes.hidden)  # the rest, which may be gigabytes, is never read
    out = _blank(sizes.tokens, sizes.hidden)
    grid = embedding.launch_dims(sizes.tokens)[0]
    return Example(embedding.build(), grid, (ids, table, out, sizes.hidden, np.float32(1)), 2 * out.nbytes + ids.nbytes)


def _norm(module, sizes: Sizes, rng, extra: tuple) -> Example:
    hidden, branch = (_normal(rng, sizes.tokens, sizes.hidden) for _ in range(2))
    out = np.zeros(hidden.shape, np.uint16)
    arguments = (hidden, branch, *extra, out, sizes.hidden, np.float32(1e-5))
    moved = 3 * hidden.nbytes + out.nbytes + sum(each.nbytes for each in extra)
    return Example(module.build("float16", "add"), module.launch_dims(sizes.tokens)[0], arguments, moved)


def _rms_norm(sizes: Sizes, cc, rng) -> Example:
    return _norm(rms_norm, sizes, rng, (_normal(rng, sizes.hidden),))


def _layer_norm(sizes: Sizes, cc, rng) -> Example:
    return _norm(layer_norm, sizes, rng, (_normal(rng, sizes.hidden), _normal(rng, sizes.hidden)))


def _activation(sizes: Sizes, cc, rng) -> Example:
    x = _normal(rng, sizes.tokens, 2 * sizes.inner)
    out = np.zeros((sizes.tokens, sizes.inner), np.uint16)
    grid = activation.launch_dims(sizes.tokens, sizes.inner)[0]
    return Example(activation.build("silu", True, "float16"), grid, (x, out, sizes.inner), x.nbytes + out.nbytes)


def _soft_cap(sizes: Sizes, cc, rng) -> Example:
    x = _normal(rng, sizes.tokens, sizes.inner)
    grid = activation.launch_dims(sizes.tokens, sizes.inner)[0]
    return Example(activation.build_soft_cap(), grid, (x, sizes.inner, np.float32(2)), 2 * x.nbytes)


def _row_gather(sizes: Sizes, cc, rng) -> Example:
    x = _normal(rng, sizes.tokens + 2, sizes.hidden)
    indices = rng.permutation(len(x))[: sizes.tokens].astype(np.int32)
    out = _blank(sizes.tokens, sizes.hidden)
    arguments = (x, indices, out, sizes.hidden)
    return Example(row_gather.build(), row_gather.launch_dims(sizes.tokens)[0], arguments, 2 * out.nbytes)


def _copy_blocks(sizes: Sizes, cc, rng) -> Example:
    words = sizes.kv_heads * sizes.block_size * sizes.head_dim * 2 // 16
    source = rng.integers(0, 99, (2, 6, words * 16), np.uint8)
    pairs = np.array([[0, 3], [2, 5]], np.int32)
    arguments = (source, np.zeros_like(source), pairs, words, 6 * words, 6 * words)
    return Example(copy_blocks.build(), copy_blocks.launch_dims(2, 2)[0], arguments, 8 * words * 16)


def _rope_kv(sizes: Sizes, cc, rng) -> Example:
    heads, dim, tokens = sizes.heads + 2 * sizes.kv_heads, sizes.head_dim, sizes.tokens
    qkv = _normal(rng, tokens, heads, dim)
    positions = np.arange(tokens, dtype=np.int32)
    tables = [_normal(rng, tokens, dim // 2) for _ in range(2)]
    slots = rng.permutation(4 * sizes.block_size)[:tokens].astype(np.int64)
    q = np.zeros((tokens, sizes.heads, dim), np.uint16)
    caches = [np.zeros((4, sizes.kv_heads, sizes.block_size, dim), np.uint16) for _ in range(2)]
    weights = [_normal(rng, dim) for _ in range(2)]
    kernel = rope_kv.build(
        sizes.heads, sizes.kv_heads, dim, sizes.block_size, dim, True, dtype="float16", kv_dtype="float16"
    )
    arguments = (qkv, positions, *tables, *weights, slots, q, *caches, NO_FLOATS, NO_FLOATS, np.float32(1e-5))
    moved = qkv.nbytes + qkv.nbytes // 2 + 2 * tables[0].nbytes + 2 * weights[0].nbytes
    return Example(kernel, rope_kv.launch_dims(tokens, sizes.heads, sizes.kv_heads)[0], arguments, moved)


@dataclass
class _Context:
    """Paged K and V, and the step's tables; all float16."""

    q: np.ndarray
    caches: list[np.ndarray]
    tables: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    out: np.ndarray

    @property
    def arguments(self) -> tuple:
        return (self.q, *self.caches, NO_FLOATS, NO_FLOATS, self.tables)


def _context(sizes: Sizes, rng) -> _Context:
    lengths = np.array(sizes.contexts, np.int32)
    counts = -(-lengths // sizes.block_size)
    order = rng.permutation(int(counts.sum())).astype(np.int32)
    tables = np.zeros((len(lengths), int(counts.max())), np.int32)
    for row, first in enumerate(np.cumsum(counts) - counts):
        tables[row, : counts[row]] = order[first : first + counts[row]]
    shape = (len(order), sizes.kv_heads, sizes.block_size, sizes.head_dim)
    caches = [_normal(rng, *shape).astype(np.float16).view(np.uint16) for _ in range(2)]
    q = _normal(rng, sizes.tokens, sizes.heads, sizes.head_dim).astype(np.float16).view(np.uint16)
    starts = np.concatenate([[0], np.cumsum(sizes.queries)]).astype(np.int32)
    return _Context(q, caches, tables, starts, lengths, np.zeros_like(q))


def _kv_bytes(sizes: Sizes) -> int:
    """Bytes of K and V that attention must read, of q and of what it writes; float16."""
    rows = sum(sizes.contexts) * sizes.kv_heads + sizes.tokens * sizes.heads
    return 2 * 2 * rows * sizes.head_dim


def _attention_plain(sizes: Sizes, cc, rng) -> Example:
    c = _context(sizes, rng)
    kernel = attention_plain.build(
        sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.block_size, dtype="float16", kv_dtype="float16"
    )
    sequences = np.repeat(np.arange(len(sizes.queries)), sizes.queries).astype(np.int32)
    pairs = zip(sizes.queries, sizes.contexts, strict=True)
    positions = np.concatenate([np.arange(end - n, end) for n, end in pairs]).astype(np.int32)
    tail = (c.tables.shape[1], attention_plain.NO_WINDOW, np.float32(sizes.head_dim**-0.5))
    grid = attention_plain.launch_dims(sizes.tokens, sizes.heads)[0]
    return Example(kernel, grid, (*c.arguments, sequences, positions, c.out, *tail), _kv_bytes(sizes))


def _tiles(sizes: Sizes, rows: int) -> np.ndarray:
    group = sizes.heads // sizes.kv_heads
    return np.array([(s, r) for s, n in enumerate(sizes.queries) for r in range(0, n * group, rows)], np.int32)


def _attention_on_tiles(module, sizes: Sizes, cc, rng, rows, grid_tail: tuple, workspace: int, **options) -> Example:
    c = _context(sizes, rng)
    kernel = module.build(
        sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.block_size, None, "float16", "float16", cc, **options
    )
    tiles = _tiles(sizes, rows)
    tail = (c.tables.shape[1], attention_plain.NO_WINDOW, np.float32(sizes.head_dim**-0.5))
    arguments = (*c.arguments, c.starts, c.lengths, tiles, c.out, _blank(max(1, workspace)), *tail)
    grid = module.launch_dims(len(tiles), sizes.kv_heads, *grid_tail)[0]
    return Example(kernel, grid, arguments, _kv_bytes(sizes))


def _attention_decode(sizes: Sizes, cc, rng) -> Example:
    rows = attention_decode.tile_rows(sizes.heads, sizes.kv_heads)
    return _attention_on_tiles(attention_decode, sizes, cc, rng, rows, (1,), 0)


def _split_workspace(sizes: Sizes) -> tuple[int, int]:
    chunks = -(-max(sizes.contexts) // 512)
    rows = attention_decode.tile_rows(sizes.heads, sizes.kv_heads)
    count = len(_tiles(sizes, rows))
    return chunks, attention_decode.workspace_size(count, chunks, sizes.heads, sizes.kv_heads, sizes.head_dim)


def _attention_split(sizes: Sizes, cc, rng) -> Example:
    sizes = LONG if sizes is SMALL else sizes
    chunks, workspace = _split_workspace(sizes)
    rows = attention_decode.tile_rows(sizes.heads, sizes.kv_heads)
    return _attention_on_tiles(attention_decode, sizes, cc, rng, rows, (chunks,), workspace, split=True)


def _attention_prefill(sizes: Sizes, cc, rng) -> Example:
    space = len(_tiles(sizes, 64)) * sizes.kv_heads * 64 * sizes.head_dim
    return _attention_on_tiles(attention_prefill, sizes, cc, rng, 64, (sizes.head_dim, "float16", cc), space)


def _attention_reduce(sizes: Sizes, cc, rng) -> Example:
    sizes = LONG if sizes is SMALL else sizes
    c, (chunks, workspace) = _context(sizes, rng), _split_workspace(sizes)
    tiles = _tiles(sizes, attention_decode.tile_rows(sizes.heads, sizes.kv_heads))
    kernel = attention_reduce.build(sizes.heads, sizes.kv_heads, sizes.head_dim)
    space = np.abs(_normal(rng, workspace)) + 1
    arguments = (space, c.starts, c.lengths, tiles, c.out, chunks, attention_plain.NO_WINDOW)
    return Example(kernel, attention_reduce.launch_dims(len(tiles), sizes.kv_heads)[0], arguments)


def _product(sizes: Sizes, cc, rng, weight: str, **options) -> Example:
    tokens, outputs = sizes.tokens, sizes.inner
    small = sizes.hidden == SMALL.hidden  # then several turns of the loop, the last not full, nor its last chunk
    width = 4 * sizes.hidden - 24 if small else sizes.hidden
    tiles = product.choose_tiles(SMALL.tokens if small else tokens, outputs, weight)
    x = packing.to_bits("float16", _normal(rng, tokens, width))
    packed = packing.pack_fragments(weight, _normal(rng, outputs, width))
    kernel = product.build("float16", weight, cc=cc, row_tiles=tiles[0], token_tiles=tiles[1], bias=True, **options)
    scales = packed.scales if packed.scales.size else NO_FLOATS
    out, bias = _blank(tokens, outputs), _normal(rng, outputs)
    arguments = (x, packed.data, scales, bias, NOTHING, NOTHING, out, tokens, outputs, width)
    grid = product.launch_dims(tokens, outputs, tiles)[0]
    return Example(kernel, grid, arguments, packed.nbytes + x.nbytes + bias.nbytes + out.nbytes)


def _product_plain(sizes: Sizes, cc, rng) -> Example:
    tokens, outputs, width = sizes.tokens, sizes.inner, sizes.hidden
    together = min(t for t in (1, 2, 4, 8) if t >= min(tokens, 8))
    x = _normal(rng, tokens, width)
    packed = packing.pack_rows("float32", _normal(rng, outputs, width))
    out = _blank(tokens, outputs)
    arguments = (x, packed.data, NO_FLOATS, NO_FLOATS, NOTHING, NOTHING, out, tokens, outputs, width)
    grid = product_plain.launch_dims(tokens, outputs, together)[0]
    return Example(product_plain.build(tokens=together), grid, arguments, packed.nbytes + x.nbytes + out.nbytes)


def _moe_route(sizes: Sizes, cc, rng) -> Example:
    logits = _normal(rng, sizes.tokens, 40)
    arguments = (logits, np.zeros((sizes.tokens, 4), np.int32), _blank(sizes.tokens, 4), sizes.tokens)
    return Example(moe.build_route(40, 4, True), moe.route_dims(sizes.tokens)[0], arguments)


def _moe_sort(sizes: Sizes, cc, rng) -> Example:
    ids = np.sort(rng.permuted(np.tile(np.arange(40, dtype=np.int32), (sizes.tokens, 1)), axis=1)[:, :4], axis=1)
    arguments = (ids, np.zeros(41, np.int32), np.zeros_like(ids), np.zeros(ids.size, np.int32), sizes.tokens)
    return Example(moe.build_sort(40, 4), moe.sort_dims()[0], arguments)


def _moe_combine(sizes: Sizes, cc, rng) -> Example:
    slots = rng.permutation(4 * sizes.tokens).reshape(-1, 4).astype(np.int32)
    y, weights = _normal(rng, slots.size, sizes.hidden), _normal(rng, *slots.shape)
    arguments = (y, slots, weights, _blank(sizes.tokens, sizes.hidden), sizes.hidden)
    moved = y.nbytes + y.nbytes // 4 + slots.nbytes + weights.nbytes
    return Example(moe.build_combine(4, add=False), moe.combine_dims(sizes.tokens)[0], arguments, moved)


def _argmax(sizes: Sizes, cc, rng) -> Example:
    logits = _normal(rng, sizes.tokens, sizes.vocab)
    arguments = (logits, np.zeros(sizes.tokens, np.int32), sizes.vocab)
    return Example(argmax.build(), argmax.launch_dims(sizes.tokens)[0], arguments, logits.nbytes)


def _process_logits(sizes: Sizes, cc, rng) -> Example:
    raw = _normal(rng, sizes.tokens, sizes.vocab)
    # A token in several lists falls to several threads, one after the other.
    allowed, masked, biased, seen = [21, 14, 7, 0], [0, 7, 14], [7, 14], [0, 7, 21]
    bias, counts = _normal(rng, 2), np.array([0, 1, 3], np.float32)
    starts = np.array([[0, 4, 4, 7, 7, 9, 11, 14], [-1] * 8], np.int32)
    bits = rng.integers(-(2**31), 2**31, -(-sizes.vocab // 32)).astype(np.int32) & ~np.int32(1 << 21)
    words = np.concatenate([allowed, masked, biased, bias.view("i4"), seen, counts.view("i4"), bits]).astype(np.int32)
    masks, penalties = np.array([[17, 0], [-1, 0]], np.int32), np.array([[0.5, 0.25, 1.5], [0, 0, 1]], np.float32)
    lists = np.zeros(2, np.int32), starts, masks, penalties, words, words.view(np.float32)
    processed = np.zeros((2, sizes.vocab), np.float32)
    arguments = (raw, processed, *lists, sizes.vocab)
    # Of two draws one is edited, and few of its tokens are allowed: its row is written, and hardly read.
    return Example(processors.build(), processors.launch_dims(2)[0], arguments, 4 * sizes.vocab + bits.nbytes)


def _logprobs(sizes: Sizes, cc, rng) -> Example:
    logits = _normal(rng, sizes.tokens, sizes.vocab)
    facts, token = np.array([[0, 5, 3, 0], [-1, 0, 0, 0]], np.int32), np.zeros((2, 2), np.int32)
    arguments = (logits, facts, token, np.zeros(2), np.zeros(2, np.int32), np.zeros((3, 2)), sizes.vocab)
    return Example(logprobs.build(), logprobs.launch_dims(2)[0], arguments)


def _sample(sizes: Sizes, cc, rng) -> Example:
    rows = min(sizes.tokens, 2)
    raw = 3 * _normal(rng, rows, sizes.vocab)
    reals, integers = np.tile([0.8, 0.9, 0.01], (rows, 1)), np.zeros((rows, 5), np.int64)
    integers[:, :3] = rng.integers(1, 50, (rows, 3))
    integers[::2, 2], integers[:, 3] = 0, np.arange(rows)
    work = np.zeros((rows, sizes.vocab), np.int32), np.zeros((rows, sizes.vocab))
    arguments = (raw, raw, reals, integers, *work, np.zeros((rows, 2), np.int32), rows, sizes.vocab)
    return Example(sample.build(), sample.launch_dims(rows, rows)[0], arguments)


EXAMPLES: dict[str, Callable[[Sizes, tuple[int, int], np.random.Generator], Example]] = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope_kv": _rope_kv,
    "attention_plain": _attention_plain,
    "attention_prefill": _attention_prefill,
    "attention_decode": _attention_decode,
    "attention_decode_split": _attention_split,
    "attention_reduce": _attention_reduce,
    "product_plain": _product_plain,
    "product_float16": lambda sizes, cc, rng: _product(sizes, cc, rng, "float16"),
    "product_int8": lambda sizes, cc, rng: _product(sizes, cc, rng, "int8"),
    "product_int4": lambda sizes, cc, rng: _product(sizes, cc, rng, "int4"),
    "activation": _activation,
    "soft_cap": _soft_cap,
    "moe_route": _moe_route,
    "moe_sort": _moe_sort,
    "moe_combine": _moe_combine,
    "row_gather": _row_gather,
    "argmax": _argmax,
    "process_logits": _process_logits,
    "logprobs": _logprobs,
    "sample": _sample,
    "copy_blocks": _copy_blocks,
}


def example(name: str, sizes: Sizes = SMALL, cc: tuple[int, int] = (8, 0)) -> Example:
    """The launch of kernel ``name``, the same each time it is asked for. Raises KeyError for an unknown name."""
    return EXAMPLES[name](sizes, cc, np.random.default_rng(11))
