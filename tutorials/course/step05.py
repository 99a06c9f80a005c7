"""Checks of step 05, and the pieces that it is given."""

from __future__ import annotations

import numpy as np

from minipaged.model.architectures import load_weights
from minipaged.model.config import ModelConfig
from minipaged.model.loader import LoadedModel, load_model
from minipaged.model.rope import rope_tables
from minipaged.model.weights import LayerWeights, ModelWeights
from minipaged.ops.reference import ReferenceOps
from tutorials.course import golden

ops = ReferenceOps()


def attention(config: ModelConfig, layer: LayerWeights, x: np.ndarray) -> np.ndarray:
    """Step 04 with the projections before and after it, ``[T, H]`` to ``[T, H]``; positions from 0."""
    num_tokens, heads, kv_heads, width = len(x), config.num_heads, config.num_kv_heads, config.head_dim
    qkv = ops.linear(x, layer.qkv.weight).reshape(num_tokens, heads + 2 * kv_heads, width)
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    rotation = rope_tables(config.layers[0].rope, num_tokens)
    ops.rope(q, *rotation)
    ops.rope(k, *rotation)
    scores = np.einsum("qhgd,khd->hgqk", q.reshape(num_tokens, kv_heads, -1, width), k) * config.attention_scale
    scores[..., np.triu(np.ones((num_tokens, num_tokens), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    attended = np.einsum("hgqk,khd->qhgd", p, v).reshape(num_tokens, heads * width)
    return ops.linear(attended.astype(np.float32), layer.o.weight)


def hidden_by_layer(config: ModelConfig, weights: ModelWeights, token_ids: list[int]) -> list[np.ndarray]:
    """The residual stream before the first layer and after each, ``[T, H]``."""
    x = weights.embedding[np.array(token_ids)]
    found = [x]
    for layer in weights.layers:
        x = x + attention(config, layer, ops.rms_norm(x, layer.input_norm.weight, config.norm_eps))
        gate_up = ops.linear(ops.rms_norm(x, layer.mlp_norm.weight, config.norm_eps), layer.gate_up.weight)
        x = x + ops.linear(ops.gated_activation("silu", gate_up), layer.down.weight)
        found.append(x)
    return found


def head(config: ModelConfig, weights: ModelWeights, x: np.ndarray) -> np.ndarray:
    return ops.linear(ops.rms_norm(x, weights.final_norm.weight, config.norm_eps), weights.lm_head)


def engine_forward(config: ModelConfig, weights: ModelWeights, token_ids: list[int]) -> np.ndarray:
    """What the exercise asks for, so that later cells do not depend on it."""
    return head(config, weights, hidden_by_layer(config, weights, token_ids)[-1][-1:])[0]


def next_words_by_layer(model: LoadedModel, weights: ModelWeights, text: str) -> tuple[list[str], dict]:
    """The tokens of a text, and what each would be followed by if the model ended after a layer."""
    token_ids = model.tokenizer.encode(text)
    layers = {}
    for number, x in enumerate(hidden_by_layer(model.config, weights, token_ids)):
        name = f"after layer {number}" if number else "embedding"
        layers[name] = [word(model, i) for i in head(model.config, weights, x).argmax(axis=1).tolist()]
    return [word(model, i) for i in token_ids], layers


def word(model: LoadedModel, token_id: int) -> str:
    """A token as text that can be seen: the space before a word as it is, a line's end as an arrow."""
    return model.tokenizer.decode([token_id]).replace("\n", "↵")


def examine_feed_forward(feed_forward) -> None:
    rng = np.random.default_rng(0)
    x, gate, up = (rng.standard_normal(shape, np.float32) for shape in ((5, 8), (12, 8), (12, 8)))
    down = rng.standard_normal((8, 12), np.float32)
    found = feed_forward(x, gate, up, down)
    assert np.shape(found) == (5, 8), f"the result has the shape {np.shape(found)}; it must be (5, 8)."

    def silu(a):
        return a / (1 + np.exp(-a))

    a, b = x @ gate.T, x @ up.T
    right = silu(a) * b
    others = {"up, not gate, passed through silu": silu(b) * a, "sigmoid was taken for silu": right / a}
    for mistake, other in others.items():
        assert not np.allclose(found, other @ down.T, atol=1e-4), f"{mistake}."
    difference = np.abs(found - right @ down.T).max()
    assert difference < 1e-4, f"the result differs by {difference:.3f}; it must be down(silu(gate(x)) * up(x))."


def examine_forward(forward) -> None:
    model = load_model("tiny")
    weights = load_weights(model.config, model.source)
    for example in golden():
        logits = np.asarray(forward(model.config, weights, example["prompt_ids"]))
        wanted = (model.config.vocab_size,)
        hint = "only the last position is wanted" if logits.ndim == 2 else "one logit a token of the vocabulary"
        assert logits.shape == wanted, f"the shape is {logits.shape}; it must be {wanted}: {hint}."
        for top in example["target"]["top5_last_prompt_position"]:
            name, expected, found = top["token"], top["logit"], logits[top["id"]]
            where = f"after {example['prompt'][-24:]!r} the logit of {name!r}"
            assert abs(found - expected) < 2e-3, f"{where} is {found:.2f}; transformers computes {expected:.2f}."
        assert logits.argmax() == example["target"]["greedy_ids"][0]
