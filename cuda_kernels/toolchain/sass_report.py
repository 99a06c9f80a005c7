"""What the assembler made of a kernel: registers, spills, occupancy, and whether it uses what the card offers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from cuda_kernels.kernel import Kernel
from cuda_kernels.toolchain.compile import Assembled, assemble, compile_ptx, sass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor (CUDA C++ Programming Guide, "Technical Specifications")."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_per_block: int  # bytes of shared memory that the driver takes
    registers: int = 65536


MULTIPROCESSORS = {
    (7, 5): Multiprocessor(1024, 16, 64 << 10, 0),
    (8, 0): Multiprocessor(2048, 32, 164 << 10, 1024),
    (8, 6): Multiprocessor(1536, 16, 100 << 10, 1024),
    (8, 9): Multiprocessor(1536, 24, 100 << 10, 1024),
    (9, 0): Multiprocessor(2048, 32, 228 << 10, 1024),
}

#: A feature of the machine code, and the pattern that shows it.
FEATURES = {
    "HMMA m16n8k16": r"\bHMMA\.16816\.F32",
    "HMMA m16n8k8": r"\bHMMA\.1688\.F32",
    "LDSM": r"\bLDSM\.",
    "LDGSTS": r"\bLDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128\b",
    "128-bit loads": r"\bLDG\.E\.(\w+\.)*128\b",
    "128-bit stores": r"\bSTG\.E\.(\w+\.)*128\b",
    "local memory": r"\b(LDL|STL)\b",
}


@dataclass(frozen=True)
class Report:
    """``opcodes``: how often each occurs; ``features``: those of :data:`FEATURES` that are there."""

    kernel: Kernel
    cc: tuple[int, int]
    assembled: Assembled
    opcodes: Counter
    features: frozenset[str]

    @property
    def shared_bytes(self) -> int:
        """Static and dynamic, of one block."""
        static = self.assembled.shared_bytes
        if self.cc >= (9, 0) and static >= 1024:
            static -= 1024  # here the assembler's figure holds what the driver takes
        return static + self.kernel.shared_bytes

    @property
    def spills(self) -> int:
        """Bytes that a thread writes to and reads from memory for want of registers."""
        return self.assembled.spill_store_bytes + self.assembled.spill_load_bytes

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit on a multiprocessor at once."""
        limits, warps = MULTIPROCESSORS[self.cc], -(-self.kernel.block // 32)
        registers = -(-self.assembled.registers * 32 // 256) * 256 * warps  # handed out by 256 to a warp
        fits = [limits.threads // (32 * warps), limits.blocks, limits.registers // registers]
        shared = self.shared_bytes + limits.reserved_per_block
        if shared:
            fits.append(limits.shared_bytes // shared)
        return min(fits)

    def complaints(self, wanted: frozenset[str] = frozenset()) -> list[str]:
        """What is worse than the kernel states, and the ``wanted`` features that are missing."""
        found, kernel = [], self.kernel
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.assembled.registers > kernel.registers_at_most:
            found.append(f"uses {self.assembled.registers} registers, states {kernel.registers_at_most}")
        stated = min(kernel.blocks_per_sm, MULTIPROCESSORS[self.cc].threads // kernel.block)
        if self.blocks_per_sm < stated:
            found.append(f"{self.blocks_per_sm} blocks fit on a multiprocessor, {stated} are stated")
        found += [f"has no {feature}" for feature in sorted(wanted - self.features)]
        return found


def report(kernel: Kernel, cc: tuple[int, int]) -> Report:
    """Compiles, assembles and disassembles ``kernel`` for ``cc``, one of :data:`MULTIPROCESSORS`."""
    assembled = assemble(compile_ptx(kernel, cc), cc)
    text = sass(assembled.cubin)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    opcodes = Counter(each.split(".")[0] for each in instructions)
    features = frozenset(name for name, pattern in FEATURES.items() if re.search(pattern, text))
    return Report(kernel, cc, assembled, opcodes, features)


def wanted_features(kernel: Kernel, cc: tuple[int, int]) -> frozenset[str]:
    """What the machine code of ``kernel`` must use on ``cc``.

    Products take x through shared memory (``cp.async`` where there is one, ``ldmatrix``). Attention takes its
    operands from global memory to registers, so it has neither; int8's are 64 bits wide, 16-bit ones 128.
    """
    tensor_cores = "HMMA m16n8k16" if cc >= (8, 0) else "HMMA m16n8k8"
    if kernel.name == "product":
        return frozenset({tensor_cores, "LDSM", "128-bit loads"} | ({"LDGSTS"} if cc >= (8, 0) else set()))
    if kernel.name in ("attention_prefill", "attention_decode"):
        wide = kernel.variant["kv_dtype"] != "int8" and kernel.variant["head_dim"] % 32 == 0
        return frozenset({tensor_cores} | ({"128-bit loads"} if wide else set()))
    return frozenset({"128-bit loads", "128-bit stores"} if kernel.name == "copy_blocks" else ())
