"""The host side of the CUDA backend: a device, its memory, and the launches of a step.

The kernels are in ``cuda_kernels/``. :mod:`~minipaged.ops.cuda.device` states what a device can do;
``hardware.py`` does it with a card through ``cuda.bindings``, ``emulated.py`` with the PTX interpreter, and
everything above (buffers, plan, graphs) cannot tell them apart.
"""
