"""A step as a list of launches: one method an operator, which chooses the kernel and binds its arguments.

Shapes and the meaning of arguments are those of the kernels' files in ``cuda_kernels/``. One layer of a
Llama-like decoder is eight launches::

    norm       hidden                     -> normed
    product    normed, qkv                -> qkv        (+ bias)
    rope_kv    qkv                        -> q, cache   (q/k norm, rope, quantisation)
    attention  q, cache                   -> attended
    product    attended, o                -> hidden     (added to what is there)
    norm       hidden                     -> normed
    product    normed, gate_up            -> inner      (activation, gate)
    product    inner, down                -> hidden     (added)

Where a norm stands behind attention or the feed-forward part (Gemma), the product writes to ``output``, and
the next norm adds it to ``hidden`` on its way.
"""

from __future__ import annotations

from cuda_kernels import (
    activation,
    attention_decode,
    attention_plain,
    attention_prefill,
    attention_reduce,
    embedding,
    layer_norm,
    logprobs,
    moe,
    processors,
    product,
    product_plain,
    rms_norm,
    rope_kv,
    row_gather,
    sample,
)
from cuda_kernels.attention_plain import NO_WINDOW
from cuda_kernels.kernel import Kernel

from .attention import PLAIN, TILES_AT_ONCE, AttentionShape
from .device import Call, Device, DeviceArray, bind
from .inputs import StepInputs
from .weights import DeviceWeight

PRODUCT_TOKENS = (1, 2, 4, 8)  # rows that share a load of the weight, in the plain product


class Plan:
    """Launches in their order, on ``num_rows`` rows unless a method says otherwise.

    ``activation``: dtype of what products read: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """

    def __init__(self, device: Device, activation: str, num_rows: int, attention_shape: AttentionShape = PLAIN):
        self.device, self.activation, self.num_rows = device, activation, num_rows
        self.attention_shape = attention_shape
        self.calls: list[Call] = []

    def _add(self, kernel: Kernel, grid: tuple[int, ...], **arguments) -> None:
        self.calls.append(bind(self.device, kernel, grid, **arguments))

    def embedding(self, inputs: StepInputs, weight: DeviceWeight, positions: DeviceArray | None, hidden, scale: float):
        """``hidden = table[input_ids] * scale (+ positions[position])``."""
        learned = {}
        if positions is not None:
            learned = {"positions": inputs.positions, "position_table": positions}
        self._add(
            embedding.build(self.activation, learned_positions=positions is not None),
            embedding.launch_dims(self.num_rows)[0],
            ids=inputs.input_ids,
            table=weight.table,
            hidden=hidden,
            width=weight.width,
            scale=scale,
            **learned,
        )

    def norm(self, hidden, norm, out, eps: float, width: int, branch=None, branch_norm=None) -> None:
        """``hidden += branch_norm(branch)``, where there is a branch (and its norm); ``out = norm(hidden)``.

        ``norm``: ``weight`` and, for LayerNorm, ``bias``.
        """
        residual = "none" if branch is None else "add" if branch_norm is None else "norm_add"
        arguments = {"hidden": hidden, "weight": norm.weight, "out": out, "width": width, "eps": eps}
        if branch is not None:
            arguments["branch"] = branch
        if branch_norm is not None:
            arguments["branch_weight"] = branch_norm.weight
        kernels = rms_norm
        if norm.bias is not None:
            kernels, arguments["bias"] = layer_norm, norm.bias
        self._add(kernels.build(self.activation, residual), kernels.launch_dims(self.num_rows)[0], **arguments)

    def product(
        self,
        x,
        weight: DeviceWeight,
        out,
        *,
        bias: DeviceArray | None = None,
        out_dtype: str = "float32",
        add: bool = False,
        act: str | None = None,
        gated: bool = False,
        experts: str | None = None,
        expert_starts: DeviceArray | None = None,
        rows: DeviceArray | None = None,
    ) -> None:
        """``out = x weight^T + bias``, then as :mod:`cuda_kernels.product_plain` says: activation, gate, addition."""
        num_outputs = weight.num_outputs // (2 if gated else 1)
        variant = {"bias": bias is not None, "add": add, "activation": act, "gated": gated, "experts": experts}
        if weight.fragments:
            tiles = product.choose_tiles(self.num_rows, num_outputs, weight.format)
            kernel = product.build(
                self.activation,
                weight.format,
                out_dtype,
                cc=self.device.compute_capability,
                row_tiles=tiles[0],
                token_tiles=tiles[1],
                **variant,
            )
            dims = product.launch_dims(self.num_rows, num_outputs, tiles, weight.num_experts, gated)
        else:
            tokens = min((t for t in PRODUCT_TOKENS if t >= self.num_rows), default=PRODUCT_TOKENS[-1])
            kernel = product_plain.build(self.activation, weight.format, out_dtype, tokens=tokens, **variant)
            dims = product_plain.launch_dims(self.num_rows, num_outputs, tokens, weight.num_experts)
        self._add(
            kernel,
            dims[0],
            x=x,
            weight=weight.data,
            scales=weight.scales,
            bias=bias,
            expert_starts=expert_starts,
            out=out,
            num_tokens=self.num_rows,
            num_outputs=num_outputs,
            width=weight.width,
            **{"rows_of_x" if weight.fragments else "rows": rows},
        )

    def rope_kv(self, config, layout, inputs: StepInputs, qkv, rope, norms, q, cache: dict, eps: float) -> None:
        """Normalise and rotate q and k, and store k and v; ``rope``: tables cos and sin ``[positions, R / 2]``
        or ``None``; ``norms``: of q and k, or ``None``."""
        cos, sin = rope or (None, None)
        q_norm, k_norm = norms or (None, None)
        self._add(
            rope_kv.build(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                layout.block_size,
                rotary_dim=2 * cos.shape[1] if rope else 0,
                qk_norm=norms is not None,
                dtype=self.activation,
                kv_dtype=layout.dtype,
            ),
            rope_kv.launch_dims(self.num_rows, config.num_heads, config.num_kv_heads)[0],
            qkv=qkv,
            positions=inputs.positions,
            cos=cos,
            sin=sin,
            q_weight=q_norm and q_norm.weight,
            k_weight=k_norm and k_norm.weight,
            slot_mapping=inputs.slot_mapping,
            q=q,
            eps=eps,
            **cache,
        )

    def attention(self, config, layout, inputs: StepInputs, q, cache: dict, out, workspace, window: int | None) -> None:
        """Every row over the keys that it sees: the ``window`` last ones of its sequence, or all."""
        shape = self.attention_shape
        sizes = (config.num_heads, config.num_kv_heads, config.head_dim, layout.block_size, config.attention_soft_cap)
        formats = {"dtype": self.activation, "kv_dtype": layout.dtype}
        arguments = {
            "q": q,
            "block_tables": inputs.block_tables,
            "out": out,
            "max_blocks": inputs.max_blocks,
            "window": window or NO_WINDOW,
            "scale": config.attention_scale,
            **cache,
        }
        if shape.kind == "plain":
            grid = attention_plain.launch_dims(self.num_rows, config.num_heads)[0]
            arguments |= {"sequences": inputs.sequences, "positions": inputs.positions}
            self._add(attention_plain.build(*sizes, **formats), grid, **arguments)
            return
        formats["cc"] = self.device.compute_capability
        arguments |= {
            "query_start_loc": inputs.query_start_loc,
            "context_lens": inputs.context_lens,
            "workspace": workspace,
        }
        if shape.kind == "prefill":
            for first in range(0, shape.num_tiles, TILES_AT_ONCE):
                count = min(TILES_AT_ONCE, shape.num_tiles - first)
                grid_sizes = (count, config.num_kv_heads, config.head_dim, layout.dtype, formats["cc"])
                grid = attention_prefill.launch_dims(*grid_sizes)[0]
                tiles = inputs.tiles + 8 * first
                self._add(attention_prefill.build(*sizes, **formats), grid, tiles=tiles, **arguments)
            return
        kernel = attention_decode.build(*sizes, **formats, split=shape.num_chunks > 0)
        grid = attention_decode.launch_dims(shape.num_tiles, config.num_kv_heads, max(shape.num_chunks, 1))[0]
        self._add(kernel, grid, tiles=inputs.tiles, **arguments)
        if shape.num_chunks:
            self._add(
                attention_reduce.build(*sizes[:3], dtype=self.activation),
                attention_reduce.launch_dims(shape.num_tiles, config.num_kv_heads)[0],
                workspace=workspace,
                query_start_loc=inputs.query_start_loc,
                context_lens=inputs.context_lens,
                tiles=inputs.tiles,
                out=out,
                num_chunks=shape.num_chunks,
                window=arguments["window"],
            )

    def moe(self, config, experts, x, buffers, out, add: bool) -> None:
        """A mixture of experts: ``out (+)= sum over a token's experts of weight * expert(x)``."""
        count, per_token, width = config.num_experts, config.num_experts_per_tok, config.hidden_size
        b = buffers
        self.product(x, experts.router, b.router_logits)
        self._add(
            moe.build_route(count, per_token, config.norm_topk_prob),
            moe.route_dims(self.num_rows)[0],
            router_logits=b.router_logits,
            expert_ids=b.expert_ids,
            expert_weights=b.expert_weights,
            num_tokens=self.num_rows,
        )
        self._add(
            moe.build_sort(count, per_token),
            moe.sort_dims()[0],
            expert_ids=b.expert_ids,
            expert_starts=b.expert_starts,
            slots=b.slots,
            rows=b.slot_rows,
            num_tokens=self.num_rows,
        )
        grouped = {"expert_starts": b.expert_starts, "rows": b.slot_rows}
        self.product(
            x,
            experts.gate_up,
            b.inner,
            out_dtype=self.activation,
            act=config.activation,
            gated=True,
            experts="gather",
            **grouped,
        )
        self.product(b.inner, experts.down, b.expert_output, experts="slots", **grouped)
        self._add(
            moe.build_combine(per_token, add),
            moe.combine_dims(self.num_rows)[0],
            y=b.expert_output,
            slots=b.slots,
            expert_weights=b.expert_weights,
            out=out,
            width=width,
        )

    def gather(self, x, indices, out, width: int, num_rows: int) -> None:
        """``out = x[indices]``, ``num_rows`` rows of float32."""
        self._add(row_gather.build(), row_gather.launch_dims(num_rows)[0], x=x, indices=indices, out=out, width=width)

    def soft_cap(self, x, width: int, cap: float) -> None:
        """``x = cap * tanh(x / cap)``."""
        grid = activation.launch_dims(self.num_rows, width)[0]
        self._add(activation.build_soft_cap(), grid, x=x, width=width, cap=cap)

    def process_logits(self, inputs: StepInputs, raw, processed, vocab_size: int) -> None:
        """Rows of ``processed`` for the asks that edit their logits."""
        self._add(
            processors.build(),
            processors.launch_dims(self.num_rows)[0],
            raw=raw,
            processed=processed,
            rows=inputs.rows,
            starts=inputs.starts,
            masks=inputs.masks,
            penalties=inputs.penalties,
            words=inputs.words,
            floats=inputs.words,
            vocab_size=vocab_size,
        )

    def sample(self, inputs: StepInputs, buffers, token: int, vocab_size: int) -> None:
        """A token for each ask that draws one."""
        self._add(
            sample.build(),
            sample.launch_dims(self.num_rows, buffers.list_ids.shape[0])[0],
            raw=buffers.logits,
            processed=buffers.processed,
            reals=inputs.reals,
            integers=inputs.integers,
            ids=buffers.list_ids,
            weights=buffers.list_weights,
            token=token,
            num_draws=self.num_rows,
            vocab_size=vocab_size,
        )

    def logprobs(self, inputs: StepInputs, logits, token: int, logprob: int, rank: int, top: int, vocab_size: int):
        """Log-probabilities for the asks that want some."""
        self._add(
            logprobs.build(),
            logprobs.launch_dims(self.num_rows)[0],
            logits=logits,
            facts=inputs.facts,
            token=token,
            logprob=logprob,
            rank=rank,
            top=top,
            vocab_size=vocab_size,
        )
