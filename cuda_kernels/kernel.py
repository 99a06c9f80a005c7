"""What a kernel is: a Python function over flat pointers, its types, and the resources it may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from numba import types

float32 = types.float32
float64 = types.float64
float16 = types.float16
int8 = types.int8
uint8 = types.uint8
uint16 = types.uint16
int32 = types.int32
uint32 = types.uint32
int64 = types.int64
uint64 = types.uint64


def pointer(dtype) -> types.CPointer:
    """The type of an argument that points to elements of ``dtype`` in global memory."""
    return types.CPointer(dtype)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One variant of one kernel, ready to be compiled for a compute capability.

    ``body`` is a plain Python function whose arguments are flat pointers and scalars, ``signature`` their
    Numba types in the same order. ``variant`` holds the compile-time choices that ``body`` closes over
    (element types, tile sizes); they are part of :attr:`entry`, so that two variants never share a name.
    ``block`` is the number of threads of a block, ``shared_bytes`` the dynamic shared memory a launch must ask
    for. ``registers_at_most`` and ``blocks_per_sm`` state the occupancy the kernel was written for; the SASS
    report holds it to them.
    """

    name: str
    body: Callable
    signature: tuple
    variant: Mapping[str, object] = field(default_factory=dict)
    min_cc: tuple[int, int] = (7, 5)
    block: int = 128
    shared_bytes: int = 0
    registers_at_most: int = 255
    blocks_per_sm: int = 1

    def __post_init__(self) -> None:
        parameters = self.body.__code__.co_argcount
        if parameters != len(self.signature):
            raise TypeError(f"{self.name}: the body has {parameters} parameters, its signature {len(self.signature)}")

    @property
    def entry(self) -> str:
        """The kernel's symbol in PTX: its name and its variant, in letters, digits and underscores."""
        words = [self.name] + [f"{key}_{value}" for key, value in sorted(self.variant.items())]
        return "".join(letter if letter.isalnum() else "_" for letter in "__".join(words))

    @property
    def doc(self) -> str:
        """The docstring of the file that the kernel comes from: its shape table and its drawing."""
        return self.body.__globals__.get("__doc__") or ""
