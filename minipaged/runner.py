"""From a plan in integers to logits: builds the arrays of a step and runs the decoder on them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from minipaged.backends import Backend, Formats, set_num_threads
from minipaged.core.scheduler import ScheduledSequence, SchedulerOutput
from minipaged.model.architectures import load_weights
from minipaged.model.loader import LoadedModel
from minipaged.model.weights import ModelWeights, digest
from minipaged.ops.interface import Batch
from minipaged.sampling.device_sampler import DeviceLogits, DeviceSampler
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.step_logits import DrawOrder, HostLogits, PromptOrder, StepLogits


class Runner:
    """Owns a model's weights and KV cache on one backend, and computes plans with them."""

    def __init__(
        self,
        model: LoadedModel,
        backend: Backend,
        formats: Formats,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_tokens: int,
        num_threads: int | None = None,
        num_host_blocks: int = 0,
    ):
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_model_len": max_model_len}
        if backend.name == "cpu":
            parts = _build_cpu(model, formats, max_num_tokens=max_num_tokens, num_threads=num_threads, **sizes)
        elif backend.name == "cuda":
            parts = _build_cuda(model, formats, max_num_tokens=max_num_tokens, **sizes)
        else:
            parts = _build_reference(model, num_threads=num_threads, **sizes)
        self.decoder, self.kv_cache, self.weight_bytes, self.embedding_bytes = parts
        self.block_size = block_size
        self._memory = BatchMemory(-(-max_model_len // block_size), max_num_tokens)
        passes = self.decoder.passes_over_logits() if backend.name == "cpu" else {}
        self.sampler = Sampler(model.config.vocab_size, **passes)
        self.device_sampler = DeviceSampler(self.sampler) if backend.name == "cuda" else None
        # The operating system provides the memory page by page as blocks are first swapped out.
        if num_host_blocks and backend.name == "cuda":
            self.kv_cache.prepare_staging()
        self._host_blocks = np.empty((num_host_blocks, self.kv_cache.block_bytes if num_host_blocks else 0), np.uint8)

    @cached_property
    def weights_digest(self) -> str:
        """sha256 of the weights as the backend keeps them; all are read for it, once."""
        return digest(self.decoder.weights)

    @property
    def num_logits_rows_on_host(self) -> int:
        """Rows of logits that a device which samples by itself has sent to the host."""
        return self.device_sampler.num_rows_on_host if self.device_sampler else 0

    def close(self) -> None:
        """End the threads of the backend. Closing twice is harmless."""
        self.decoder.close()

    def swap(self, plan: SchedulerOutput) -> None:
        """Carry out the plan's swaps, before :meth:`execute`, whether anything is scheduled or not."""
        if plan.swap_out:
            block_ids, host_ids = map(list, zip(*plan.swap_out, strict=True))
            self._host_blocks[host_ids] = self.kv_cache.read_blocks(block_ids)
        if plan.swap_in:
            host_ids, block_ids = map(list, zip(*plan.swap_in, strict=True))
            self.kv_cache.write_blocks(block_ids, self._host_blocks[host_ids])

    def execute(
        self,
        plan: SchedulerOutput,
        prompts: dict[str, PromptOrder] | None = None,
        draws: list[DrawOrder] | None = None,
    ) -> StepLogits:
        """Carry out the plan's block copies, then its forward pass.

        Args:
            prompts: by request id, whose prompt positions' logits are wanted too.
            draws: what is wanted of each sequence that samples, in the plan's order: a device then samples by
                itself, and nothing else can be had of its logits. ``None``: the logits come to the host.
        """
        prompts = prompts or {}
        rows, sample_rows, prompt_rows = _wanted_rows(plan.scheduled, prompts, self._memory.counting)
        batch = build_batch(plan.scheduled, rows, self.block_size, self._memory)
        if self.device_sampler is not None and draws is not None:
            prepared = self.device_sampler.prepare(sample_rows, draws, prompt_rows, prompts)
            answers = self.decoder.sample(batch, self.kv_cache, prepared.asks, plan.copies)
            return DeviceLogits(self.sampler, prepared, answers, sample_rows, prompt_rows)
        if plan.copies:
            self.kv_cache.copy_blocks(plan.copies)
        logits = self.decoder.forward(batch, self.kv_cache)
        return HostLogits(self.sampler, logits, sample_rows, prompt_rows, self.decoder.examined)


class BatchMemory:
    """What the arrays of a step share with those of other steps: most of the block tables, and counting.

    Args:
        max_blocks: length of a block table, at most.
        max_num_tokens: tokens of a step, at most.
    """

    def __init__(self, max_blocks: int, max_num_tokens: int):
        self.counting = np.arange(max_num_tokens + 1, dtype=np.int32)  #: 0, 1, 2, ...; not to be written
        self._rows = self._tables = np.zeros((0, max_blocks), np.int32)
        self._written: list[list[int]] = []  # the lists that the rows were made from; a list never changes

    def block_tables(self, scheduled: list[ScheduledSequence]) -> np.ndarray:
        """int32 ``[S, max_blocks]``, padded with 0, until the next call, which writes only what is new. The same array
        for as many sequences, most often."""
        if len(scheduled) > len(self._rows):
            self._rows = self._tables = np.zeros((2 * len(scheduled), self._rows.shape[1]), np.int32)
            self._written = [[]] * len(self._rows)
        for i, (sequence, written) in enumerate(zip(scheduled, self._written, strict=False)):
            block_ids = sequence.block_ids
            if block_ids is not written:
                self._rows[i, : len(block_ids)] = block_ids
                self._rows[i, len(block_ids) : len(written)] = 0
                self._written[i] = block_ids
        if len(self._tables) != len(scheduled):
            self._tables = self._rows[: len(scheduled)]
        return self._tables


def build_batch(
    scheduled: list[ScheduledSequence], rows: np.ndarray, block_size: int, memory: BatchMemory | None = None
) -> Batch:
    """The arrays of a step: tokens of all sequences one after the other (shapes: :class:`Batch`).

    Args:
        rows: whose logits are wanted.
        memory: the same in all steps, if there are several.
    """
    memory = memory or BatchMemory(max(len(sequence.block_ids) for sequence in scheduled), len(scheduled))
    if len(scheduled[-1].token_ids) == 1:  # sequences with more tokens than one come last
        return _decode_batch(scheduled, rows, block_size, memory)
    lengths = np.array([len(s.token_ids) for s in scheduled], dtype=np.int64)
    starts = np.array([s.num_computed_tokens for s in scheduled], dtype=np.int64)
    query_start_loc = np.zeros(len(scheduled) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start_loc[1:])

    block_tables = memory.block_tables(scheduled)
    sequence_of_token = np.repeat(np.arange(len(scheduled)), lengths)
    positions = np.arange(query_start_loc[-1]) + (starts - query_start_loc[:-1])[sequence_of_token]
    blocks = block_tables[sequence_of_token, positions // block_size].astype(np.int64)
    return Batch(
        input_ids=np.array([t for s in scheduled for t in s.token_ids], dtype=np.int32),
        positions=positions.astype(np.int32),
        slot_mapping=blocks * block_size + positions % block_size,
        query_start_loc=query_start_loc,
        context_lens=(starts + lengths).astype(np.int32),
        block_tables=block_tables,
        logits_indices=rows,
    )


def _decode_batch(
    scheduled: list[ScheduledSequence], rows: np.ndarray, block_size: int, memory: BatchMemory
) -> Batch:
    """The same for a step of one token each, with few and always the same calls into NumPy: after a forward pass
    the caches hold weights, and the first call of each kind waits for memory, which a single user waits for."""
    starts = [s.num_computed_tokens for s in scheduled]
    slots = [
        s.block_ids[start // block_size] * block_size + start % block_size
        for s, start in zip(scheduled, starts, strict=True)
    ]
    return Batch(
        input_ids=np.array([s.token_ids[0] for s in scheduled], dtype=np.int32),
        positions=np.array(starts, dtype=np.int32),
        slot_mapping=np.array(slots, dtype=np.int64),
        query_start_loc=memory.counting[: len(scheduled) + 1],
        context_lens=np.array([start + 1 for start in starts], dtype=np.int32),
        block_tables=memory.block_tables(scheduled),
        logits_indices=rows,
    )


def _wanted_rows(
    scheduled: list[ScheduledSequence], prompts: dict[str, PromptOrder], counting: np.ndarray
) -> tuple[np.ndarray, list[int], dict[str, tuple[int, slice]]]:
    """Which tokens of the step need logits, and where those logits will be found.

    ``counting``: that of :class:`BatchMemory`.
    """
    if not prompts and len(scheduled[-1].token_ids) == 1:  # sequences with more tokens than one come last
        wanted = [row for row, sequence in enumerate(scheduled) if sequence.samples]
        sample_rows = list(range(len(wanted)))
        return counting[: len(wanted)] if wanted == sample_rows else np.array(wanted, np.int32), sample_rows, {}
    rows: list[int] = []
    sample_rows: list[int] = []
    prompt_rows: dict[str, tuple[int, slice]] = {}
    first = 0
    for sequence in scheduled:
        count = len(sequence.token_ids)
        prompt = prompts.get(sequence.request_id)
        if prompt is not None:
            # The logits at a position speak about the next token, so the last prompt position's
            # belong to the first generated token.
            wanted = min(count, max(len(prompt.token_ids) - 1 - sequence.num_computed_tokens, 0))
            prompt_rows[sequence.request_id] = (sequence.num_computed_tokens, slice(len(rows), len(rows) + wanted))
            rows.extend(range(first, first + wanted))
        if sequence.samples:
            sample_rows.append(len(rows))
            rows.extend(range(first + count - 1 - sequence.num_lookahead_tokens, first + count))
        first += count
    return np.array(rows, dtype=np.int32), sample_rows, prompt_rows


def _build_reference(
    model: LoadedModel, *, num_threads: int | None, num_blocks: int, block_size: int, max_model_len: int
) -> tuple:
    """Decoder, KV cache, bytes of the weights and of an embedding that is not the lm_head."""
    from minipaged.kv_cache import KVCache
    from minipaged.model.decoder import Decoder
    from minipaged.ops.reference import ReferenceOps

    set_num_threads(num_threads)
    config = model.config
    weights = load_weights(config, model.source)
    kv_cache = KVCache(config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
    decoder = Decoder(config, weights, ReferenceOps(), max_model_len)
    return decoder, kv_cache, _num_bytes(weights), _embedding_bytes(weights)


def _build_cpu(
    model: LoadedModel,
    formats: Formats,
    *,
    max_num_tokens: int,
    num_threads: int | None,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
) -> tuple:
    """As :func:`_build_reference`; compiles the kernels if this machine has not yet."""
    from minipaged.model.cpu_decoder import CpuDecoder
    from minipaged.model.weight_packer import WeightPacker
    from minipaged.ops.cpu.kv import CpuKVCache, KVLayout
    from minipaged.ops.cpu.team import default_num_threads

    config = model.config
    if model.packed_as:
        weights = model.source.weights()
    else:
        weights = load_weights(config, model.source, WeightPacker(formats.weights))
    layout = KVLayout(formats.kv_cache, block_size, config.num_kv_heads, config.head_dim)
    kv_cache = CpuKVCache(config.num_layers, num_blocks, layout)
    decoder = CpuDecoder(
        config,
        weights,
        kv_cache,
        max_model_len=max_model_len,
        max_num_tokens=max_num_tokens,
        num_threads=num_threads or default_num_threads(),
    )
    return decoder, kv_cache, _num_bytes(weights), _embedding_bytes(weights)


def _build_cuda(
    model: LoadedModel, formats: Formats, *, max_num_tokens: int, num_blocks: int, block_size: int, max_model_len: int
) -> tuple:
    """As :func:`_build_reference`, in the memory of the device, which the decoder closes."""
    from minipaged.model.cuda_decoder import CudaDecoder
    from minipaged.ops.cuda.available import open_device
    from minipaged.ops.cuda.kv import CudaKVCache, CudaKVLayout
    from minipaged.ops.cuda.weights import DevicePacker

    config, device = model.config, open_device()
    try:
        packer = DevicePacker(device, formats.weights, formats.activations, tied=config.tie_word_embeddings)
        weights = load_weights(config, model.source, packer)
        embedding_bytes = 0 if weights.embedding is weights.lm_head else weights.embedding.nbytes
        layout = CudaKVLayout(formats.kv_cache, block_size, config.num_kv_heads, config.head_dim)
        kv_cache = CudaKVCache(device, config.num_layers, num_blocks, layout)
        decoder = CudaDecoder(
            device,
            config,
            weights,
            kv_cache,
            activation=formats.activations,
            max_model_len=max_model_len,
            max_num_tokens=max_num_tokens,
        )
    except BaseException:
        device.close()
        raise
    return decoder, kv_cache, decoder.weight_bytes, embedding_bytes


def _embedding_bytes(weights: ModelWeights) -> int:
    """Bytes of an embedding of its own, of which a step reads only its tokens' rows."""
    return 0 if weights.embedding is weights.lm_head else weights.embedding.nbytes


def _num_bytes(weights: ModelWeights) -> int:
    """Bytes of all weight arrays, each counted once (a tied ``lm_head`` is the embedding)."""
    return sum({id(array): array.nbytes for array in _arrays(weights)}.values())


def _arrays(value) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _arrays(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _arrays(getattr(value, name))
