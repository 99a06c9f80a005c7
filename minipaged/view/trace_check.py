"""Whether what a file holds is a trace: its form, and that its steps lead from one sound state to the next."""

from __future__ import annotations

from minipaged.errors import TraceError

_PHASE = {
    "new": 1, "preempt": 1, "finish": 1, "abort": 1, "admit": 2, "accepted": 2,
    "copies": 2, "swap_out": 2, "swap_in": 2, "ref_cnts": 2, "computed": 2, "cached": 1, "us": 1,
}  # fmt: skip
"""Depth of nesting of the lists of integers in a record."""
_KINDS = ("allocate", "share", "free", "publish", "evict")


def check(data, name: str) -> None:
    """Refuse what :class:`~minipaged.view.trace.Trace` could not go through.

    Raises:
        TraceError: what is wrong, and in which step.
    """
    from minipaged.view.trace import FORMAT, VERSION

    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise TraceError(f'{name} is no trace of minipaged: it lacks "format": "{FORMAT}".')
    if data.get("version") != VERSION:
        raise TraceError(
            f"{name} is a trace of version {data.get('version')!r}; this minipaged reads version {VERSION}. "
            "Record it again, or use the minipaged that wrote it."
        )
    where = "its head"
    try:
        _check_head(data)
        where = "its start"
        replay = _start(data)
        for index, record in enumerate(data["steps"]):
            where = f"step {index}"
            _check_record(record, is_step=True)
            replay.skip(record)
            _check_state(replay)
        where = "its end"
        _check_record(data["end"])
        replay.apply(data["end"])
        _check_state(replay)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        kind = "missing " if isinstance(error, KeyError) else ""
        raise TraceError(f"{name} is damaged in {where}: {kind}{error}.") from None


def _start(data: dict):
    from minipaged.view.replay import Replay

    _check_record(data["start"])
    replay = Replay(data["about"], data["sequences"], data["start"])
    _check_state(replay)
    return replay


def _check_head(data: dict) -> None:
    about = data["about"]
    for key in ("block_size", "num_blocks"):
        if type(about[key]) is not int or not 0 < about[key] <= 1 << 24:
            raise ValueError(f"{key} is {about[key]!r}")
    for number, entry in enumerate(data["sequences"]):
        if not isinstance(entry[0], str) or not all(type(value) is int and value >= 0 for value in entry[1:]):
            raise ValueError(f"sequence {number} is {entry!r}")
        if not 3 <= len(entry) <= 4 or (len(entry) == 4 and entry[3] >= number):
            raise ValueError(f"sequence {number} is {entry!r}")
    if not isinstance(data["steps"], list):
        raise TypeError("the steps are no list")


def _check_record(record, is_step: bool = False) -> None:
    if not isinstance(record, dict):
        raise TypeError(f"{str(record)[:40]!r} instead of a record")
    for key, value in record.items():
        if key in _PHASE:
            _check_integers(value, _PHASE[key])
            if _PHASE[key] == 2 and any(len(pair) != 2 for pair in value):
                raise ValueError(f"{key} are not pairs")
        elif key == "run":
            for entry in value:
                _check_integers(entry, 1)
                if not 3 <= len(entry) <= 4:
                    raise ValueError(f"a run of {entry!r}")
        elif key == "tables":
            for number, keep, block_ids in value:
                _check_integers([number, keep, *block_ids], 1)
        elif key == "blocks":
            for kind, block_ids in value.items():
                if kind not in _KINDS:
                    raise ValueError(f"unknown event {kind!r}")
                _check_integers(block_ids, 1)
        elif key == "after" and is_step:
            _check_record(value)
        elif key == "t" and is_step:
            _check_integers([value], 1)
        else:
            raise ValueError(f"unknown entry {key!r}")
    if is_step and ("t" not in record or len(record["us"]) != 3):
        raise ValueError("its times are missing")


def _check_integers(value, depth: int) -> None:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} instead of a list")
    for item in value:
        if depth > 1:
            _check_integers(item, depth - 1)
        elif type(item) is not int or item < 0:
            raise ValueError(f"{str(item)[:40]!r} instead of a number")


def _check_state(replay) -> None:
    """Every table's entry is a reference, and there are no others."""
    held = sum(map(len, replay.tables.values()))
    if held != replay.num_references:
        raise ValueError(f"tables hold {held} blocks, but blocks are held {replay.num_references} times")
