"""Moves, conversions between number formats, and arithmetic on pairs of float16."""

from __future__ import annotations

import numpy as np

from cuda_kernels.toolchain.interpreter.program import DTYPES, Instruction, PTXError

_ROUNDED_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """The 16 bits of float32 rounded to bfloat16: nearest, ties to even, NaN to 0x7FFF."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_half(value: np.ndarray) -> np.ndarray:
    return np.asarray(value).astype(np.float16).view(np.uint16)


def _halves(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both float16 of uint32 words, the low one first."""
    pairs = np.ascontiguousarray(word).view(np.float16).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def bind_mov(machine, instruction: Instruction):
    """A copy; ``{a, b}`` on one side splits a register or joins two."""
    destination, source = instruction.operands
    type_ = instruction.type
    if destination.startswith("{"):
        names, whole = _parts(destination), machine.broadcast(source, type_)
        part = np.dtype(f"u{whole.itemsize // len(names)}")
        pieces = np.ascontiguousarray(whole)
        targets = [None if name == "_" else machine.destination(name, f"u{8 * part.itemsize}") for name in names]

        def split(mask):
            np.copyto(pieces, whole)
            columns = pieces.view(part).reshape(-1, len(names))
            for number, target in enumerate(targets):
                if target is not None:
                    np.copyto(target, columns[:, number], where=mask)

        return split
    target = machine.destination(destination, type_)
    if source.startswith("{"):
        names = _parts(source)
        parts = [machine.broadcast(name, f"u{8 * target.itemsize // len(names)}") for name in names]

        def join(mask):
            np.copyto(target, np.stack(parts, axis=1).view(target.dtype)[:, 0], where=mask)

        return join
    value = machine.source(source, type_)
    return lambda mask: np.copyto(target, value, where=mask)


def _parts(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


def bind_cvt(machine, instruction: Instruction):
    to, from_ = instruction.modifiers[-2:]
    if to in ("f16x2", "bf16x2"):
        return _bind_pack(machine, instruction, to)
    encode = {"bf16": to_bfloat16, "f16": to_half}.get(to)
    decode = {"bf16": from_bfloat16}.get(from_)
    source = machine.source(instruction.operands[1], "u16" if from_ == "bf16" else from_)
    target = machine.destination(instruction.operands[0], "u16" if encode else to)
    rounding = next((_ROUNDED_TO_INTEGER[m] for m in instruction.modifiers if m in _ROUNDED_TO_INTEGER), None)

    def convert(mask):
        value = decode(source) if decode else source
        if value.dtype.kind == "f":
            value = rounding(value) if rounding else value
            if encode:
                value = encode(value)
            elif DTYPES[to].kind == "f":
                value = _to_float(instruction, value, DTYPES[to])
            else:
                value = _float_to_integer(value, DTYPES[to])
        elif DTYPES[to].kind != "f":
            value = _integer_to_integer(value, DTYPES[to], instruction.has("sat"))
        else:
            value = value.astype(DTYPES[to])
            value = encode(value) if encode else value
        np.copyto(target, value, where=mask, casting="unsafe")

    return convert


def _to_float(instruction: Instruction, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    result = value.astype(dtype)
    if instruction.has("rz") and dtype.itemsize < value.dtype.itemsize:
        result = np.where(np.abs(result) > np.abs(value), np.nextafter(result, dtype.type(0)), result)
    if instruction.has("sat"):
        result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(dtype)
    return result


def _float_to_integer(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Clamped to the type's range; NaN gives 0."""
    limits = np.iinfo(dtype)
    value = np.asarray(value, np.float64)
    inside = np.where(np.isnan(value) | (value >= limits.max) | (value <= limits.min), 0, value).astype(dtype)
    result = np.where(value >= limits.max, dtype.type(limits.max), inside)
    return np.where(value <= limits.min, dtype.type(limits.min), result)


def _integer_to_integer(value: np.ndarray, dtype: np.dtype, saturate: bool) -> np.ndarray:
    if saturate:
        own, limits = np.iinfo(value.dtype), np.iinfo(dtype)
        value = np.clip(value, max(own.min, limits.min), min(own.max, limits.max))
    return value.astype(dtype)


def _bind_pack(machine, instruction: Instruction, to: str):
    """``cvt.rn.f16x2.f32 d, high, low``."""
    encode = to_bfloat16 if to == "bf16x2" else to_half
    high, low = (machine.broadcast(operand, "f32") for operand in instruction.operands[1:3])
    target = machine.destination(instruction.operands[0], "u32")

    def pack(mask):
        word = encode(high).astype(np.uint32) << np.uint32(16) | encode(low)
        np.copyto(target, word, where=mask)

    return pack


def bind_half_pair(machine, instruction: Instruction):
    """``add``, ``sub``, ``mul``, ``fma`` with ``.f16x2``: each half computed in float64 and rounded once."""
    operations = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }
    if instruction.opcode not in operations or instruction.type != "f16x2":
        raise PTXError(f"the interpreter does not know: {instruction.text}")
    operands = [machine.broadcast(operand, "u32") for operand in instruction.operands[1:]]
    target = machine.destination(instruction.operands[0], "u32")
    operation = operations[instruction.opcode]

    def execute(mask):
        halves = [_halves(operand) for operand in operands]
        results = [to_half(operation(*(half[i].astype(np.float64) for half in halves))) for i in (0, 1)]
        np.copyto(target, np.stack(results, axis=1).view(np.uint32)[:, 0], where=mask)

    return execute


BINDERS = {"mov": bind_mov, "cvt": bind_cvt}
PACKED_TYPES = ("f16x2", "bf16x2", "bf16")
