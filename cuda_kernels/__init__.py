"""CUDA kernels of minipaged, one idea a file, and the toolchain that tests them without a GPU.

Every kernel is a plain Python function over flat pointers in numba-cuda's dialect, wrapped in a
:class:`~cuda_kernels.kernel.Kernel`. ``toolchain/`` compiles it offline to PTX, runs that PTX in an
interpreter with checks and counters, and reads the machine code back. ``python -m cuda_kernels`` shows
what a kernel moves and executes.
"""
