"""Matrix products ``out = x @ weight.T`` over packed weights: the interface.

A :class:`ProductKernel` is two C functions, compiled on first use and cached. Compiled code calls them
by address, so one compiled step serves every weight format, even several in one model::

    kernel = product_kernel("int8")                       # in Python, when the tables are built
    ...
    call_prepare(kernel.prepare, x, x_stride, K, first_row, last_row, prepared, prepared_stride)
    call_product(kernel.product, prepared, prepared_stride, w,
                 K, panel0, panel1, M, out, out_stride, accumulate)           # both in @njit code

All arguments are int64: addresses and strides in bytes, or counts.

``prepare`` turns float32 rows ``first_row .. last_row-1`` of ``x`` into what ``product`` reads:
rows of ``kernel.row_bytes(K)`` bytes, their scales included. Rows are independent, so threads may share
them out. Formats that read float32 rows as they are have ``prepare == 0`` and ``row_bytes(K) == 0``: pass
``x`` itself.

``product`` computes panels ``panel0 .. panel1-1`` of the packed weight for all ``M`` rows, so threads
share out panels. Panel ``p`` is columns ``48p .. 48p+47`` of ``out``, whose *address is that of row 0,
column 0* whatever ``panel0`` is. ``accumulate`` is 0, or 1 to add the product to what ``out`` holds.
Rows of ``out`` must have room for whole panels: ``out_stride >= 4 * padded_rows(N)`` bytes; columns
beyond N receive zeros (or keep their value, if accumulating).

A row of the result is a function of that row of ``x`` and of the weight alone: not of M, the panel
range or the number of threads, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minipaged.errors import ConfigError

FORMATS = ("float32", "bfloat16", "int8", "int4")

PRODUCT_SIGNATURE = f"void({', '.join(['int64'] * 10)})"
PREPARE_SIGNATURE = f"void({', '.join(['int64'] * 7)})"


@dataclass(frozen=True)
class ProductKernel:
    """The compiled product of one weight format on this CPU."""

    format: str
    product: int  # address, for call_product
    prepare: int  # address, for call_prepare; 0 if rows are read as they are
    row_bytes: Callable[[int], int]  # K -> bytes of a prepared row (0 if there is no prepare)
    functions: tuple = field(default=(), repr=False, compare=False)  # own the machine code


@cache
def product_kernel(format: str) -> ProductKernel:
    """Compile the product of ``format`` (one of ``FORMATS``), or load it from the cache.

    Raises:
        ConfigError: no such format.
    """
    if format not in FORMATS:
        raise ConfigError(f"no weight format {format!r}; the CPU backend has {', '.join(FORMATS)}.")
    module = {"float32": "products_float", "bfloat16": "products_float"}.get(format, f"products_{format}")
    return import_module(f"{__package__}.{module}").build(format)


def _calls_address(num_arguments: int):
    """An intrinsic that calls the C function at an address with ``num_arguments`` int64."""

    def codegen(context, builder, signature, arguments):
        target = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * num_arguments)
        builder.call(builder.inttoptr(arguments[0], target.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (num_arguments + 1)), codegen


@intrinsic
def call_product(
    typing_context,
    address,
    x,
    x_stride,
    w,
    K,
    panel0,
    panel1,
    M,
    out,
    out_stride,
    accumulate,
):
    """Call a ``ProductKernel.product`` from ``@njit`` code; see the module's docstring."""
    return _calls_address(10)


@intrinsic
def call_prepare(typing_context, address, x, x_stride, K, first_row, last_row, prepared, prepared_stride):
    """Call a ``ProductKernel.prepare`` from ``@njit`` code; see the module's docstring."""
    return _calls_address(7)
