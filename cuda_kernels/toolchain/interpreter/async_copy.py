"""``cp.async``: copies from global to shared memory whose bytes arrive only when their group is waited for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuda_kernels.toolchain.interpreter.memory_access import Accessor, lanes_and_addresses
from cuda_kernels.toolchain.interpreter.program import Instruction, PTXError


@dataclass
class _Copy:
    """A ``cp.async`` that is under way: the bytes arrive when its group is waited for."""

    lanes: np.ndarray
    group: np.ndarray
    offsets: np.ndarray
    data: np.ndarray  # uint8 [lanes, bytes]


def bind_copy(machine, instruction: Instruction):
    """``cp.async``: its bytes arrive only at the wait, so that what a kernel forgot to wait for stays missing."""
    if instruction.has("commit_group"):
        return _bind_commit(machine)
    if instruction.has("wait_group") or instruction.has("wait_all"):
        return _bind_wait(machine, instruction)
    if not instruction.has("async") or instruction.has("bulk"):
        raise PTXError(f"the interpreter does not know: {instruction.text}")
    num_bytes = instruction.access_bytes
    destination = machine.address(instruction.operands[0])
    source = machine.address(instruction.operands[1])
    asked = machine.broadcast(instruction.operands[3] if len(instruction.operands) > 3 else str(num_bytes), "u32")
    writer = Accessor(machine, instruction, "shared", num_bytes, writes=True)
    readers = {size: Accessor(machine, instruction, "global", size, writes=False) for size in range(1, num_bytes + 1)}

    def copy(mask):
        lanes, targets = lanes_and_addresses(machine, mask, destination)
        addresses, sizes = source()[lanes], asked[lanes]
        data = np.zeros((machine.num_threads, num_bytes), np.uint8)
        for size in np.unique(sizes).tolist():
            if size > num_bytes:
                lane = lanes[np.flatnonzero(sizes == size)[0]]
                raise readers[num_bytes].fault("out of bounds", lane, f"with {size} bytes asked for")
            if size:
                _read_bytes(readers[size], lanes[sizes == size], addresses[sizes == size], num_bytes, data)
        (access,) = writer.accesses(lanes, targets)
        if machine.checks:
            machine.counters.bytes[instruction.index] -= lanes.size * num_bytes  # counted as read already
        if machine.shared.shadow is not None:
            machine.shared.shadow.copy_under_way[machine.shared.shadow.granules(access.offsets, num_bytes)[0]] = True
        machine.shared.copies.append(_Copy(lanes, machine.copy_group[lanes], access.offsets, data[lanes]))

    return copy


def _read_bytes(reader: Accessor, lanes, addresses, num_bytes: int, data: np.ndarray) -> None:
    """The first bytes of a copy, which may be fewer than those whose alignment counts."""
    if (addresses & (num_bytes - 1)).any():
        at = np.flatnonzero(addresses & (num_bytes - 1))[0]
        raise reader.fault("misaligned", lanes[at], f"at {hex(addresses[at])}, for a copy of {num_bytes}")
    size = reader.num_bytes
    aligned = size & -size  # the largest power of two that divides the size: its pieces are aligned
    reader.num_bytes = aligned
    try:
        for start in range(0, size, aligned):
            for access in reader.accesses(lanes, addresses + start):
                for byte in range(aligned):
                    data[access.lanes, start + byte] = access.memory.data[access.offsets + byte]
    finally:
        reader.num_bytes = size


def _bind_commit(machine):
    def commit(mask):
        machine.copy_group[machine.lanes(mask)] += 1

    return commit


def _bind_wait(machine, instruction: Instruction):
    newest = int(instruction.operands[0]) if instruction.has("wait_group") else -1

    def wait(mask):
        waits = machine.all_of(mask)
        shared, still = machine.shared, []
        for copy in shared.copies:
            arrived = waits[copy.lanes] & (copy.group < machine.copy_group[copy.lanes] - newest)
            if arrived.any():
                _arrive(machine, copy, arrived)
            if not arrived.all():
                left = ~arrived
                still.append(_Copy(copy.lanes[left], copy.group[left], copy.offsets[left], copy.data[left]))
        shared.copies = still

    return wait


def _arrive(machine, copy: _Copy, arrived: np.ndarray) -> None:
    shared, offsets, lanes = machine.shared, copy.offsets[arrived], copy.lanes[arrived]
    num_bytes = copy.data.shape[1]
    for byte in range(num_bytes):
        shared.data[offsets + byte] = copy.data[arrived, byte]
    if shared.shadow is not None:
        at, count = shared.shadow.granules(offsets, num_bytes)
        shared.shadow.copy_under_way[at] = False
        shared.shadow.write(machine.clock, np.repeat(lanes, count), at)  # it counts as written now


BINDERS = {"cp": bind_copy}
