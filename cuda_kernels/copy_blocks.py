"""Whole blocks of the KV cache, copied in every layer: copy-on-write, and gathering for a swap.

    source, destination   layers of blocks, as 16-byte or 4-byte words
    pairs                 [n, 2]   int32   (block of the source, block of the destination)

One CUDA block takes one pair of one layer, and its threads neighbouring words; ``words_per_block`` is the
size of a KV block in one layer, ``*_layer_words`` the distance from one layer to the next::

    grid (n, layers)       source  + layer * source_layer_words      + pairs[x, 0] * words_per_block + word
                        -> destination + layer * destination_layer_words + pairs[x, 1] * words_per_block + word

Copy-on-write passes the same cache twice. CUDA blocks run in any order, so within one launch no KV block may
be both a source and a destination, and no block twice a destination: the caller splits such lists. A swap
copies scattered blocks into one piece of memory (pairs (block, 0), (block, 1), ...), which then travels to the
host at once, or back the other way.
"""

from __future__ import annotations

from functools import cache

from numba import cuda

from cuda_kernels.intrinsics import ldg32, ldg128, stg32, stg128
from cuda_kernels.kernel import Kernel, int32, int64, pointer, uint32

THREADS = 128


@cache
def build(word_bytes: int = 16) -> Kernel:
    """``copy_blocks(source, destination, pairs, words_per_block, source_layer_words, destination_layer_words)``.

    ``word_bytes``: 16, or 4 where blocks or addresses are not multiples of 16 bytes.
    """

    def copy_wide(source, destination, pairs, words_per_block, source_layer_words, destination_layer_words):
        pair, layer = cuda.blockIdx.x, cuda.blockIdx.y
        first = layer * source_layer_words + pairs[2 * pair] * words_per_block
        to = layer * destination_layer_words + pairs[2 * pair + 1] * words_per_block
        word = cuda.threadIdx.x
        while word < words_per_block:
            a, b, c, d = ldg128(source, 4 * (first + word))
            stg128(destination, 4 * (to + word), a, b, c, d)
            word += THREADS

    def copy_narrow(source, destination, pairs, words_per_block, source_layer_words, destination_layer_words):
        pair, layer = cuda.blockIdx.x, cuda.blockIdx.y
        first = layer * source_layer_words + pairs[2 * pair] * words_per_block
        to = layer * destination_layer_words + pairs[2 * pair + 1] * words_per_block
        word = cuda.threadIdx.x
        while word < words_per_block:
            stg32(destination, to + word, ldg32(source, first + word))
            word += THREADS

    words = pointer(uint32)
    return Kernel(
        name="copy_blocks",
        body=copy_wide if word_bytes == 16 else copy_narrow,
        signature=(words, words, pointer(int32), int32, int64, int64),
        variant={"word_bytes": word_bytes},
        block=THREADS,
        registers_at_most=40,
        blocks_per_sm=12,
    )


def launch_dims(num_pairs: int, num_layers: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block for ``num_pairs`` blocks in each of ``num_layers`` layers."""
    return (num_pairs, num_layers, 1), (THREADS, 1, 1)
