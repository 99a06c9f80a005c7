"""Runs a product kernel on NumPy arrays, and computes what it should give, from the layout's definition."""

from __future__ import annotations

import numpy as np

from minipaged.ops.cpu.packing import INT4_GROUP, INT8_GROUP, padded_rows, to_bfloat16


def run_product(kernel, packed, x, out=None, accumulate=False, panels=None):
    """``x @ weight.T`` with padded columns, over the given list of panel ranges (default: one)."""
    M, K = x.shape
    if out is None:
        out = np.full((M, padded_rows(packed.num_rows)), np.nan, np.float32)
    rows, stride = x, x.strides[0]
    if kernel.prepare:
        stride = kernel.row_bytes(K)
        rows = np.full((M, stride), 0xAB, np.uint8)
        kernel.functions[1].ctypes(x.ctypes.data, x.strides[0], K, 0, M, rows.ctypes.data, stride)
    for first, last in panels or [(0, packed.num_panels)]:
        kernel.functions[0].ctypes(
            rows.ctypes.data,
            stride,
            packed.address,
            K,
            first,
            last,
            M,
            out.ctypes.data,
            out.strides[0],
            int(accumulate),
        )
    return out


def quantised_rows(x, group):
    """``(q int64 [M, groups, group], scale float32 [M, groups])``: the rule of quantize.py."""
    M, K = x.shape
    groups = np.zeros((M, -(-K // group), group), np.float32)
    groups.reshape(M, -1)[:, :K] = x
    magnitude = np.abs(groups).max(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(magnitude > 1e-36, np.float32(127) / magnitude, np.float32(0))
    return np.rint(groups * inverse[:, :, None]).astype(np.int64), magnitude / np.float32(127)


def bfloat16_values(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def unpacked(packed):
    """The weight that ``packed`` stands for: float ``[N, K]``; element by element, by the drawing."""
    N, K = packed.num_rows, packed.num_columns
    weight = np.empty((N, K), np.float64)
    for row in range(N):
        panel, lane = divmod(row, 48)
        for k in range(K):
            weight[row, k] = _element(packed, panel, lane, k)
    return weight


def _element(packed, panel, lane, k):
    data = packed.data[panel]
    if packed.format == "float32":
        return data[k, lane]
    if packed.format == "bfloat16":
        return bfloat16_values(data[k // 2, lane, k % 2 : k % 2 + 1])[0]
    if packed.format == "int8":
        record, k = data[k // INT8_GROUP], k % INT8_GROUP
        return (float(record[(k // 4 * 48 + lane) * 4 + k % 4]) - 128) * _half(record, 4 * INT8_GROUP // 4 * 48, lane)
    record, k = data[k // INT4_GROUP], k % INT4_GROUP
    byte, after_words = int(record[(k // 8 * 48 + lane) * 4 + k % 4]), 4 * INT4_GROUP // 8 * 48
    nibble = byte >> 4 if k % 8 >= 4 else byte & 15
    return nibble * _half(record, after_words, lane) + _half(record, after_words + 2 * 48, lane)


def _half(record, start, lane):
    return float(record[start : start + 2 * 48].view(np.float16)[lane])


def expected(packed, x, rounds_x_to_bfloat16=False):
    """float64 ``x @ weight.T`` of the values that the packed weight and the prepared rows stand for."""
    if packed.format in ("int8", "int4"):
        q, scale = quantised_rows(x, INT8_GROUP if packed.format == "int8" else INT4_GROUP)
        x = (q * scale[:, :, None].astype(np.float64)).reshape(len(x), -1)[:, : x.shape[1]]
    elif packed.format == "bfloat16" and rounds_x_to_bfloat16:
        x = bfloat16_values(to_bfloat16(x))
    return np.asarray(x, np.float64) @ unpacked(packed).T
