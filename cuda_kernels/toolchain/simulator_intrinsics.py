"""Twins of ``intrinsics.py`` in plain Python, for the simulator."""

from __future__ import annotations

import numpy as np
from greenlet import getcurrent

from cuda_kernels.toolchain.interpreter.conversions import from_bfloat16, to_bfloat16
from cuda_kernels.toolchain.simulator import warp_operation

FULL = 0xFFFFFFFF


def _load(count: int):
    def load(pointer, index):
        words = pointer.words(index, count)
        return words[0] if count == 1 else tuple(words.copy())

    return load


def _store(pointer, index, *words) -> None:
    pointer.words(index, len(words))[:] = words


def _bits(value) -> np.uint32:
    return np.float32(value).view(np.uint32)


def _float(word) -> np.float32:
    return np.uint32(word).view(np.float32)


def _half(value) -> np.uint16:
    return np.float32(value).astype(np.float16).view(np.uint16)


def _from_half(bits) -> np.float32:
    return np.uint16(bits).view(np.float16).astype(np.float32)


def _bf16(value) -> np.uint16:
    return to_bfloat16(np.array([value], np.float32))[0]


def _from_bf16(bits) -> np.float32:
    return from_bfloat16(np.array([bits], np.uint16))[0]


def _pack(encode):
    return lambda low, high: np.uint32(int(encode(high)) << 16 | int(encode(low)))


def _unpack(decode):
    return lambda word: (decode(int(word) & 0xFFFF), decode(int(word) >> 16))


def _halves(function):
    """An operation on both float16 of its words, rounded once."""

    def operate(*words):
        columns = [[np.float64(value) for value in _unpack(_from_half)(word)] for word in words]
        low, high = (function(*column) for column in zip(*columns, strict=True))
        return np.uint32(int(np.float16(high).view(np.uint16)) << 16 | int(np.float16(low).view(np.uint16)))

    return operate


def _byte_permute(a, b, selector):
    pool = (int(b) << 32 | int(a)).to_bytes(8, "little")
    chosen = [(int(selector) >> 4 * number) & 15 for number in range(4)]
    return np.uint32(int.from_bytes(
        [(255 if pool[n & 7] & 128 else 0) if n & 8 else pool[n] for n in chosen], "little"
    ))  # fmt: skip


# Tensor cores


def _mma(depth: int, decode):
    def operation(lane, values):
        if len(values) != 32:
            raise RuntimeError("mma without its whole warp")
        group, pair = lane >> 2, 2 * (lane & 3)

        def a(row, column):
            word = values[(row % 8) * 4 + column % 8 // 2][(row // 8) + 2 * (column // 8)]
            return float(_unpack(decode)(word)[column & 1])

        def b(row, column):
            word = values[column * 4 + row % 8 // 2][depth // 4 + row // 8]
            return float(_unpack(decode)(word)[row & 1])

        start = depth // 4 + depth // 8
        return tuple(
            np.float32(
                values[lane][start + number]
                + sum(a(group + 8 * (number >> 1), k) * b(k, pair + (number & 1)) for k in range(depth))
            )
            for number in range(4)
        )

    return lambda *registers: warp_operation(operation, FULL, registers)


def _ldmatrix(count: int, transposed: bool):
    def operation(lane, values):
        def half(matrix, row, column):
            return int(values[8 * matrix + row][column // 2]) >> 16 * (column & 1) & 0xFFFF

        group, pair = lane >> 2, 2 * (lane & 3)
        words = []
        for matrix in range(count):
            places = [(pair + e, group) if transposed else (group, pair + e) for e in (0, 1)]
            low, high = (half(matrix, *place) for place in places)
            words.append(np.uint32(high << 16 | low))
        return words[0] if count == 1 else tuple(words)

    def load(pointer, index):
        row = pointer.words(index, 4).copy() if getcurrent().lane < 8 * count else None
        return warp_operation(operation, FULL, row)

    return load


# Asynchronous copies: the bytes arrive at the wait


def _cp_async(shared, shared_index, pointer, index, num_bytes: int, source_bytes=None) -> None:
    size = num_bytes if source_bytes is None else int(source_bytes)
    data = np.zeros(num_bytes, np.uint8)
    start = int(index) * pointer.dtype.itemsize
    source = pointer.array.view(np.uint8)
    if size and not 0 <= start <= source.size - size:
        raise IndexError(f"{size} bytes from byte {start} of {pointer.name}, which has {source.size}")
    data[:size] = source[start : start + size]
    getcurrent().copies[-1].append((shared.words(shared_index, num_bytes // 4), data.view(np.uint32)))


def _commit() -> None:
    getcurrent().copies.append([])


def _wait(newest: int):
    def wait():
        groups = getcurrent().copies
        while len(groups) - 1 > newest:
            for target, data in groups.pop(0):
                target[:] = data

    return wait


TWINS = {
    **{f"ldg{32 * n}": _load(n) for n in (1, 2, 4)},
    **{f"lds{32 * n}": _load(n) for n in (1, 2, 4)},
    **{f"stg{32 * n}": _store for n in (1, 2, 4)},
    **{f"sts{32 * n}": _store for n in (1, 2, 4)},
    "flat": lambda array: array,
    "reinterpret": lambda pointer, index, dtype: pointer.reinterpret(index, dtype),
    "mma_m16n8k16_f16": _mma(16, _from_half),
    "mma_m16n8k16_bf16": _mma(16, _from_bf16),
    "mma_m16n8k8_f16": _mma(8, _from_half),
    **{f"ldmatrix_x{n}": _ldmatrix(n, False) for n in (1, 2, 4)},
    **{f"ldmatrix_x{n}_trans": _ldmatrix(n, True) for n in (1, 2, 4)},
    **{f"cp_async{n}": lambda s, i, p, j, n=n: _cp_async(s, i, p, j, n) for n in (4, 8, 16)},
    "cp_async16_zfill": lambda s, i, p, j, size: _cp_async(s, i, p, j, 16, size),
    "cp_async_commit": _commit,
    **{f"cp_async_wait{n}": _wait(n) for n in range(4)},
    "bits_to_f32": _float,
    "f32_to_bits": _bits,
    "half_to_f32": _from_half,
    "f32_to_half": _half,
    "pack_half2": _pack(_half),
    "unpack_half2": _unpack(_from_half),
    "bf16_to_f32": _from_bf16,
    "f32_to_bf16": _bf16,
    "pack_bf16x2": _pack(_bf16),
    "unpack_bf16x2": _unpack(_from_bf16),
    "mulhi_u32": lambda a, b: np.uint32(int(a) * int(b) >> 32),
    "mullo_u32": lambda a, b: np.uint32(int(a) * int(b) & FULL),
    "exp2_approx": lambda x: np.float32(np.exp2(np.float64(x))),
    "fma_f32": lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)),
    "mul_f32": lambda a, b: np.float32(a) * np.float32(b),
    "add_f32": lambda a, b: np.float32(a) + np.float32(b),
    "byte_permute": _byte_permute,
    "fma_half2": _halves(lambda a, b, c: a * b + c),
    "sub_half2": _halves(lambda a, b: a - b),
}
