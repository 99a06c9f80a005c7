"""Checks of step 02."""

from __future__ import annotations


def examine_allocator(allocator_class) -> None:
    """Blocks of 4 tokens, 4 of them: two sequences in turn, a refusal, a sequence that ends."""
    allocator = allocator_class(num_blocks=4, block_size=4)
    allocator.grow("a", 3)
    _holds(allocator, "a", 1, 3)
    allocator.grow("b", 4)
    allocator.grow("a", 6)
    _holds(allocator, "a", 2, 6)
    _holds(allocator, "b", 1, 4)
    allocator.grow("a", 7)
    _holds(allocator, "a", 2, 7)
    held = [id for ids in allocator.block_ids.values() for id in ids]
    assert len(set(held)) == len(held), f"a block is held twice: {allocator.block_ids}."

    before = {name: list(ids) for name, ids in allocator.block_ids.items()}
    _refuses(allocator, "c", 100)
    free = len(allocator.free_ids)
    assert free == 1, f"growing to 100 tokens was refused; 1 block was free before, now {free} blocks are free."
    for name, ids in before.items():
        held = allocator.block_ids[name]
        assert held == ids, f"after a refusal {name!r} holds {held}, not {ids}."

    block_id = before["a"][1]
    found = allocator.locate("a", 5)
    assert tuple(found) == (block_id, 1), f"token 5 of 'a' lies in block {block_id}, offset 1; locate says {found}."

    allocator.free("a")
    assert "a" not in allocator.block_ids, "after free('a') block_ids still knows 'a'."
    ids = sorted(allocator.free_ids)
    expected = sorted(set(range(4)) - set(before["b"]))
    assert ids == expected, f"after free('a') the free ids are {ids}; they must be {expected}."


def _holds(allocator, name: str, count: int, num_tokens: int) -> None:
    found = len(allocator.block_ids.get(name, []))
    assert found == count, f"sequence {name!r} of {num_tokens} tokens needs {count} blocks of 4; it has {found}."


def _refuses(allocator, name: str, num_tokens: int) -> None:
    try:
        allocator.grow(name, num_tokens)
    except MemoryError:
        return
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(
            f"when too few blocks are free, grow must raise MemoryError; it raised {type(error).__name__}."
        ) from None
    raise AssertionError("grow to 100 tokens must raise MemoryError: only 1 block of 4 tokens is free.")
