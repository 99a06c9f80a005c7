"""What a decoder is made of: one set of features that describes every supported architecture.

``minipaged/model/architectures.py`` fills these from ``config.json`` or GGUF metadata; the decoder
and the backends read nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of a layer; tables are computed by ``minipaged/model/rope.py``.

    ``rotary_dim`` values of each head are rotated (the rest pass through), in the half-split layout
    (value ``i`` pairs with ``i + rotary_dim / 2``). ``scaling`` is ``"none"``, ``"linear"``,
    ``"dynamic"``, ``"llama3"``, ``"yarn"`` or ``"longrope"``; ``parameters`` holds its numbers under
    the names that Hugging Face gives them (``factor``, ``original_max_position_embeddings``, ...).
    """

    theta: float
    rotary_dim: int
    scaling: str = "none"
    parameters: dict = field(default_factory=dict)


@dataclass(frozen=True)
class LayerConfig:
    """What may differ between the layers of one model.

    ``sliding_window``: a token sees itself and the ``sliding_window - 1`` tokens before it;
    ``None``: all before it. ``rope``: ``None`` for models with learned positions. ``moe``: the
    feed-forward part is a mixture of experts.
    """

    sliding_window: int | None = None
    rope: RopeConfig | None = None
    moe: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The features of a decoder-only transformer.

    Attributes:
        architecture: the name in ``config.json``, such as ``"LlamaForCausalLM"``.
        vocab_size: rows of the embedding and of the logits.
        max_position_embeddings: tokens a sequence may have.
        norm: ``"rms"`` or ``"layer"``; RMSNorm weights have any "+1" already folded in.
        activation: ``"silu"``, ``"gelu"`` (exact, erf) or ``"gelu_tanh"``.
        gated: the feed-forward part is ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``.
        attention_scale: multiplies q·k (usually ``head_dim ** -0.5``).
        attention_soft_cap, final_soft_cap: ``cap * tanh(x / cap)`` on scores, on logits; ``None``: none.
        embedding_scale: multiplies the token embedding (Gemma: sqrt(hidden_size)).
        qk_norm: RMSNorm over ``head_dim`` on each head of q and k, before rope.
        post_norms: a norm on the output of attention and of the feed-forward part, before the
            residual addition (Gemma 2 and 3).
        qkv_bias, o_bias, mlp_bias: biases on the projections to q, k and v, on the one out of
            attention, and on those of the feed-forward part.
        learned_positions: a table of position embeddings is added to the token embedding (GPT-2).
        num_experts, num_experts_per_tok, moe_intermediate_size, norm_topk_prob: mixture of experts;
            router probabilities are a softmax over all experts, the best are kept, and with
            ``norm_topk_prob`` made to sum to one.
        layers: one :class:`LayerConfig` each.
        eos_token_ids: token ids that end a text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True
    attention_scale: float = 1.0
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    learned_positions: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
