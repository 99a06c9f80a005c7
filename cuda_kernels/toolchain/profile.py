"""A kernel's example as a report: what it moves, what it executes, and what that would cost on three cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cuda_kernels.toolchain.compile import compile_ptx
from cuda_kernels.toolchain.examples import EXAMPLES, SMALL, SMOLLM2, Example, Sizes, example
from cuda_kernels.toolchain.interpreter import Counters
from cuda_kernels.toolchain.interpreter.counters import SECTOR_BYTES
from cuda_kernels.toolchain.memory import Allocation

#: GB/s of memory bandwidth by the makers' data sheets (T4 16 GB; A100 SXM 40 GB; H100 SXM 80 GB).
BANDWIDTH = {"T4": 320, "A100": 1555, "H100": 3350}
#: The share of it that a plain copy reaches in practice; what we assume, not what we measured.
ACHIEVABLE = 0.85
LAUNCH_SECONDS = 2e-6  # of one kernel in a CUDA graph; assumed


@dataclass(frozen=True)
class Profile:
    """One run of an example in the interpreter."""

    name: str
    cc: tuple[int, int]
    subject: Example
    counters: Counters
    from_memory: int  # bytes in whole sectors, each sector once for its loads and once for its stores

    @property
    def requested(self) -> int:
        """Bytes that warps ask L2 for, in whole sectors: what several blocks read counts for each of them."""
        return self.counters.load.sector_bytes + self.counters.store.sector_bytes

    @property
    def surplus(self) -> float | None:
        """Bytes that memory moves over bytes that must move."""
        return self.from_memory / self.subject.must_move if self.subject.must_move else None


class _Touched:
    """Told of every access, the sectors of global memory that loads and stores have touched so far."""

    def __init__(self) -> None:
        self._sectors: dict[tuple[int, bool], np.ndarray] = {}

    def __call__(self, accessor, access) -> None:
        if isinstance(access.memory, Allocation):
            key = access.memory.number, accessor.writes
            if key not in self._sectors:
                self._sectors[key] = np.zeros(access.memory.data.size // SECTOR_BYTES + 1, bool)
            self._sectors[key][access.offsets // SECTOR_BYTES] = True

    @property
    def num_bytes(self) -> int:
        return SECTOR_BYTES * sum(int(np.count_nonzero(sectors)) for sectors in self._sectors.values())


def profile(name: str, cc: tuple[int, int] = (8, 0), sizes: Sizes = SMOLLM2) -> Profile:
    subject, touched = example(name, sizes, cc), _Touched()
    counters = subject.run(cc, on_access=touched)
    return Profile(name, cc, subject, counters, touched.num_bytes)


def predicted_seconds(num_bytes: int, card: str) -> float:
    """The time of a kernel that only waits for memory: a prediction, never a measurement."""
    return LAUNCH_SECONDS + num_bytes / (BANDWIDTH[card] * 1e9 * ACHIEVABLE)


def _bytes(count: int) -> str:
    return f"{count:,} B"


def report_text(result: Profile) -> str:
    """The report that ``python -m cuda_kernels profile`` prints."""
    counters, subject = result.counters, result.subject
    load, store = counters.load, counters.store
    grid = " x ".join(str(size) for size in subject.grid)
    lines = [
        f"{subject.kernel.entry} on sm_{result.cc[0]}{result.cc[1]}, interpreted: nothing here was measured on a card",
        f"grid {grid}, {subject.kernel.block} threads a block",
        "",
        "global memory            requests    bytes asked for   in 32-byte sectors   asked / moved",
    ]
    for label, traffic in (("loads", load), ("stores", store)):
        sectors = f"{traffic.sectors:,} = {_bytes(traffic.sector_bytes)}"
        asked = f"{traffic.requests:>10,} {_bytes(traffic.bytes):>18}"
        lines.append(f"  {label:<20} {asked} {sectors:>27} {traffic.efficiency:>9.0%}")
    if subject.must_move:
        lines.append(
            f"  must move {_bytes(subject.must_move)}; memory moves {result.surplus:.2f} times that, each sector once"
        )
    lines += [
        "",
        f"shared memory: {int(counters.wavefronts.sum()):,} wavefronts, {counters.bank_conflicts:,} for bank conflicts",
        "",
        f"{counters.instructions:,} instructions (by warps)",
    ]
    total = counters.instructions
    lines += [f"  {kind:<24} {count:>12,} {count / total:>6.1%}" for kind, count in counters.by_kind.items()]
    worst = _worst(counters)
    if worst:
        lines += ["", "where sectors and wavefronts are wasted:"] + worst
    lines += ["", "predicted time if memory alone decided (bandwidth of the data sheet, 85% of it; no measurement):"]
    lines += [f"  {card:<5} {1e6 * predicted_seconds(result.from_memory, card):8.1f} us" for card in BANDWIDTH]
    return "\n".join(lines)


def _worst(counters: Counters, count: int = 5) -> list[str]:
    """The PTX instructions that move most beyond what their threads asked for, or meet most bank conflicts."""
    found = []
    for instruction in counters.program.instructions:
        at = instruction.index
        waste = int(32 * counters.sectors[at] - counters.bytes[at]) if counters.sectors[at] else 0
        conflicts = int(counters.wavefronts[at] - counters.ideal_wavefronts[at])
        if waste > 0:
            found.append((waste, f"  {_bytes(waste):>14} unasked for   {instruction.text}"))
        if conflicts > 0:
            found.append((32 * conflicts, f"  {conflicts:>12,} conflicts     {instruction.text}"))
    return [text for _, text in sorted(found, key=lambda item: -item[0])[:count]]


def draw(result: Profile, path: str) -> None:
    """The report as a drawing (SVG, or what the path's ending says): instructions, bytes, shared memory."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    counters = result.counters
    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(9, 8), height_ratios=(3, 2, 1), layout="constrained")
    figure.suptitle(f"{result.subject.kernel.entry} on sm_{result.cc[0]}{result.cc[1]} (interpreted, not measured)")
    kinds = list(counters.by_kind.items())[:10][::-1]
    top.barh([kind for kind, _ in kinds], [count for _, count in kinds], color="tab:blue")
    top.set_title("instructions, by warps")
    rows = {"loads moved": counters.load.sector_bytes, "loads asked for": counters.load.bytes}
    rows |= {"stores moved": counters.store.sector_bytes, "stores asked for": counters.store.bytes}
    if result.subject.must_move:
        rows = {"must move": result.subject.must_move} | rows
    colors = ["tab:green" if label == "must move" else "tab:orange" for label in rows]
    middle.barh(list(rows), list(rows.values()), color=colors)
    middle.set_title("global memory, bytes")
    ideal = int(counters.ideal_wavefronts.sum())
    bottom.barh(["shared memory"], [ideal], color="tab:green", label="wavefronts without conflicts")
    bottom.barh(["shared memory"], [counters.bank_conflicts], left=[ideal], color="tab:red", label="for conflicts")
    bottom.legend()
    figure.savefig(path)
    pyplot.close(figure)


def prediction_table(names=tuple(EXAMPLES), sizes: Sizes = SMOLLM2, cc: tuple[int, int] = (8, 0)) -> Iterator[str]:
    """For each kernel that memory bounds, bytes and predicted microseconds: one decode step of ``sizes``.

    ``memory``: bytes of whole sectors, each once; ``L2``: with those that several blocks read.
    """
    cards = " ".join(f"{card + ' us':>8}" for card in BANDWIDTH)
    yield "predicted, not measured: bytes from memory over 85% of the data sheet's bandwidth, and 2 us a launch"
    yield f"{'kernel':<24} {'must move':>14} {'memory':>14} {'/ must':>6} {'L2 / must':>9}  {cards}"
    for name in names:
        if example(name, SMALL).must_move is not None:
            result = profile(name, cc, sizes)
            must = result.subject.must_move
            times = " ".join(f"{1e6 * predicted_seconds(result.from_memory, card):>8.1f}" for card in BANDWIDTH)
            ratios = f"{result.surplus:>6.3f} {result.requested / must:>9.3f}"
            yield f"{name:<24} {_bytes(must):>14} {_bytes(result.from_memory):>14} {ratios}  {times}"


def ptx_of(name: str, cc: tuple[int, int], sizes: Sizes = SMOLLM2) -> str:
    return compile_ptx(example(name, sizes, cc).kernel, cc)
