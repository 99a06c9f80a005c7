"""Products of the step: rows prepared by whoever computed them, panels of the weight shared out to the threads."""

from __future__ import annotations

from .memory import compiled
from .products import call_prepare, call_product


@compiled
def share(count, thread, num_threads):
    """The part ``(first, last)`` of ``count`` things that a thread works on."""
    return count * thread // num_threads, count * (thread + 1) // num_threads


@compiled
def prepare_row(linear, x, row, prepared):
    """Turn float32 values at ``x`` into row ``row`` of a product's input, if the format needs that."""
    if linear.prepare:
        call_prepare(
            linear.prepare,
            x,
            0,
            linear.num_inputs,
            0,
            1,
            prepared + row * linear.row_bytes,
            linear.row_bytes,
        )


@compiled
def keeps_rows(num_rows, num_threads):
    """Whether each thread multiplies its own rows with all weights, not all rows with its part of the weights.

    With many rows that is faster: a thread finds what it just computed in its own caches, and the reading of
    all weights hides behind the arithmetic. How many rows that takes grows with the threads that read.
    """
    return num_rows >= 32 * num_threads * num_threads


@compiled
def multiply(linear, x, x_stride, prepared, num_rows, out, out_stride, thread, num_threads):
    """This thread's part of ``out = x @ weight.T``, the rows prepared before where the format needs that."""
    if keeps_rows(num_rows, num_threads):
        first, last = share(num_rows, thread, num_threads)
        multiply_rows(linear, x, x_stride, prepared, first, last, out, out_stride)
    else:
        first, last = share(linear.num_panels, thread, num_threads)
        _multiply(linear, x, x_stride, prepared, first, last, 0, num_rows, out, out_stride)


@compiled
def multiply_rows(linear, x, x_stride, prepared, first_row, last_row, out, out_stride):
    """Some rows of ``out = x @ weight.T``."""
    _multiply(linear, x, x_stride, prepared, 0, linear.num_panels, first_row, last_row, out, out_stride)


@compiled
def _multiply(linear, x, x_stride, prepared, first_panel, last_panel, first_row, last_row, out, out_stride):
    if linear.prepare:
        x, x_stride = prepared, linear.row_bytes
    call_product(
        linear.product,
        x + first_row * x_stride,
        x_stride,
        linear.weight,
        linear.num_inputs,
        first_panel,
        last_panel,
        last_row - first_row,
        out + first_row * out_stride,
        out_stride,
        0,
    )
