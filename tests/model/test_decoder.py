"""The decoder: against a textbook forward pass in float64, and paged against contiguous."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.kv_cache import KVCache
from minipaged.model.config import LayerConfig, ModelConfig, RopeConfig
from minipaged.model.decoder import Decoder
from minipaged.model.rope import rope_tables
from minipaged.model.weights import Experts, LayerWeights, Linear, ModelWeights, Norm
from minipaged.ops.interface import Batch
from minipaged.ops.reference import ReferenceOps

ROPE = RopeConfig(theta=10000.0, rotary_dim=8)
LOCAL_ROPE = RopeConfig(theta=100.0, rotary_dim=8)
MAX_MODEL_LEN = 128


def model(layers: list[LayerConfig], **features) -> ModelConfig:
    base = dict(
        architecture="Test",
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_layers=len(layers),
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=MAX_MODEL_LEN,
        attention_scale=8**-0.5,
    )
    return ModelConfig(layers=tuple(layers), **{**base, **features})


LLAMA = model([LayerConfig(rope=ROPE)] * 3, tie_word_embeddings=True)
MODELS = {
    "llama": LLAMA,
    "multi_head": model([LayerConfig(rope=ROPE)] * 2, num_kv_heads=6),
    "multi_query": model([LayerConfig(rope=ROPE)] * 2, num_kv_heads=1),
    "mistral": model([LayerConfig(rope=ROPE, sliding_window=6)] * 3),
    "qwen2": model([LayerConfig(rope=ROPE)] * 2),
    "qwen3": model([LayerConfig(rope=ROPE)] * 2, qk_norm=True),
    "gemma2": model(
        [LayerConfig(rope=ROPE, sliding_window=5), LayerConfig(rope=ROPE)] * 2,
        activation="gelu_tanh",
        attention_scale=0.3,
        attention_soft_cap=2.0,
        final_soft_cap=3.0,
        embedding_scale=math.sqrt(24),
        post_norms=True,
        tie_word_embeddings=True,
    ),
    "gemma3": model(
        [LayerConfig(rope=LOCAL_ROPE, sliding_window=4)] * 2 + [LayerConfig(rope=ROPE)],
        activation="gelu_tanh",
        embedding_scale=math.sqrt(24),
        qk_norm=True,
        post_norms=True,
    ),
    "phi3": model([LayerConfig(rope=dataclasses.replace(ROPE, rotary_dim=6))] * 2),
    "gpt2": model(
        [LayerConfig()] * 2, num_kv_heads=6, norm="layer", activation="gelu", gated=False, learned_positions=True
    ),
    "mixtral": model([LayerConfig(rope=ROPE, moe=True)] * 2, num_experts=4, num_experts_per_tok=2),
    "qwen3_moe": model(
        [LayerConfig(rope=ROPE), LayerConfig(rope=ROPE, moe=True)],
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=False,
        qk_norm=True,
    ),
}


def random_weights(config: ModelConfig, seed: int = 0) -> ModelWeights:
    rng = np.random.default_rng(seed)
    biased = config.architecture == "biased" or config.norm == "layer"

    def tensor(*shape):
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(shape[-1]))

    def norm(size=config.hidden_size):
        return Norm(1 + tensor(size), tensor(size) if config.norm == "layer" else None)

    def linear(outputs, inputs):
        return Linear(tensor(outputs, inputs), tensor(outputs) if biased else None)

    def layer(features: LayerConfig) -> LayerWeights:
        hidden, width = config.hidden_size, config.intermediate_size
        expert_width = config.moe_intermediate_size or width
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        weights = LayerWeights(norm(), linear(q_size + 2 * kv_size, hidden), linear(hidden, q_size), norm())
        if features.moe:
            weights.experts = Experts(
                router=4 * tensor(config.num_experts, hidden),
                gate_up=tensor(config.num_experts, 2 * expert_width, hidden),
                down=tensor(config.num_experts, hidden, expert_width),
            )
        else:
            weights.gate_up = linear((2 if config.gated else 1) * width, hidden)
            weights.down = linear(hidden, width)
        if config.qk_norm:
            weights.q_norm, weights.k_norm = norm(config.head_dim), norm(config.head_dim)
        if config.post_norms:
            weights.post_attention_norm, weights.post_mlp_norm = norm(), norm()
        return weights

    embedding = tensor(config.vocab_size, config.hidden_size)
    return ModelWeights(
        embedding=embedding,
        lm_head=embedding if config.tie_word_embeddings else tensor(config.vocab_size, config.hidden_size),
        final_norm=norm(),
        layers=[layer(features) for features in config.layers],
        positions=tensor(MAX_MODEL_LEN, config.hidden_size) if config.learned_positions else None,
    )


def textbook_forward(config: ModelConfig, weights: ModelWeights, token_ids: list[int]) -> np.ndarray:
    """Logits of every position: no cache, no batch, float64, one token and one head at a time."""

    def norm(x, n: Norm):
        if config.norm == "rms":
            return x / np.sqrt((x**2).mean() + config.norm_eps) * n.weight
        return (x - x.mean()) / np.sqrt(x.var() + config.norm_eps) * n.weight + n.bias

    def linear(x, m: Linear):
        return m.weight.astype(np.float64) @ x + (0 if m.bias is None else m.bias)

    def cap(x, limit):
        return x if limit is None else limit * np.tanh(x / limit)

    def act(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        if config.activation == "gelu":
            return x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def rotate(x, position, rope: RopeConfig | None):
        if rope is None:
            return x
        cos, sin = (table[position].astype(np.float64) for table in rope_tables(rope, MAX_MODEL_LEN))
        half = rope.rotary_dim // 2
        a, b, rest = x[:half], x[half : 2 * half], x[2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest])

    def feed_forward(x, layer: LayerWeights):
        def gated(gate_up):
            gate, up = np.split(gate_up, 2)
            return act(gate) * up

        if layer.experts is None:
            y = linear(x, layer.gate_up)
            return linear(gated(y) if config.gated else act(y), layer.down)
        probabilities = np.exp(layer.experts.router @ x)
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[: config.num_experts_per_tok]
        total = probabilities[best].sum() if config.norm_topk_prob else 1
        experts = layer.experts
        return sum(probabilities[e] / total * (experts.down[e] @ gated(experts.gate_up[e] @ x)) for e in best)

    d, group = config.head_dim, config.num_heads // config.num_kv_heads
    hidden = [weights.embedding[t].astype(np.float64) * config.embedding_scale for t in token_ids]
    if config.learned_positions:
        hidden = [x + weights.positions[p] for p, x in enumerate(hidden)]
    for features, layer in zip(config.layers, weights.layers, strict=True):
        keys, values = [], []
        for position, x in enumerate(hidden):
            heads = linear(norm(x, layer.input_norm), layer.qkv).reshape(-1, d)
            q, k, v = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads])
            if config.qk_norm:
                q, k = [norm(head, layer.q_norm) for head in q], [norm(head, layer.k_norm) for head in k]
            keys.append([rotate(head, position, features.rope) for head in k])
            values.append(v)
            first = max(0, position - features.sliding_window + 1) if features.sliding_window else 0
            attended = []
            for h in range(config.num_heads):
                query = rotate(q[h], position, features.rope)
                scores = [config.attention_scale * query @ keys[p][h // group] for p in range(first, position + 1)]
                exp = np.exp(cap(np.array(scores), config.attention_soft_cap))
                attended.append(sum(w * values[first + i][h // group] for i, w in enumerate(exp / exp.sum())))
            y = linear(np.concatenate(attended), layer.o)
            x = x + (norm(y, layer.post_attention_norm) if config.post_norms else y)
            y = feed_forward(norm(x, layer.mlp_norm), layer)
            hidden[position] = x + (norm(y, layer.post_mlp_norm) if config.post_norms else y)
    logits = [weights.lm_head.astype(np.float64) @ norm(x, weights.final_norm) for x in hidden]
    return cap(np.array(logits), config.final_soft_cap)


class Pool:
    """A KV cache of NaN and random block tables over it."""

    def __init__(self, config: ModelConfig, lengths: list[int], block_size: int, rng):
        needed = [-(-n // block_size) for n in lengths]
        self.block_size = block_size
        self.cache = KVCache(config.num_layers, sum(needed) + 2, block_size, config.num_kv_heads, config.head_dim)
        self.cache.k[...] = np.nan
        self.cache.v[...] = np.nan
        free = rng.permutation(sum(needed) + 2).tolist()
        self.tables = [[free.pop() for _ in range(n)] for n in needed]

    def batch(self, chunks: list[tuple[int, list[int], int]], rows=None) -> Batch:
        """``chunks``: (sequence, tokens of this step, tokens before); ``rows``: all by default."""
        tables = np.zeros((len(chunks), max(len(t) for t in self.tables)), np.int32)
        tokens, positions, slots = [], [], []
        for row, (sequence, new, before) in zip(tables, chunks, strict=True):
            table = self.tables[sequence]
            row[: len(table)] = table
            for position in range(before, before + len(new)):
                positions.append(position)
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
            tokens += new
        return Batch(
            input_ids=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            slot_mapping=np.array(slots, np.int64),
            query_start_loc=np.cumsum([0, *(len(new) for _, new, _ in chunks)]).astype(np.int32),
            context_lens=np.array([before + len(new) for _, new, before in chunks], np.int32),
            block_tables=tables,
            logits_indices=np.arange(len(tokens), dtype=np.int32) if rows is None else np.array(rows, np.int32),
        )


def whole_pass(config: ModelConfig, decoder: Decoder, token_ids: list[int]) -> np.ndarray:
    """Logits of every position from one step over one block that holds everything."""
    pool = Pool(config, [len(token_ids)], MAX_MODEL_LEN, np.random.default_rng(0))
    return decoder.forward(pool.batch([(0, token_ids, 0)]), pool.cache)


def assert_same_logits(actual, expected, tolerance=1e-4):
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def make_decoder(name: str) -> tuple[ModelConfig, ModelWeights, Decoder]:
    config = dataclasses.replace(MODELS[name], architecture="biased" if name == "qwen2" else name)
    weights = random_weights(config)
    return config, weights, Decoder(config, weights, ReferenceOps(), MAX_MODEL_LEN)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_textbook(name):
    config, weights, decoder = make_decoder(name)
    token_ids = np.random.default_rng(1).integers(0, config.vocab_size, 14).tolist()
    expected = textbook_forward(config, weights, token_ids)
    assert_same_logits(whole_pass(config, decoder, token_ids), expected, 2e-5)


def run_in_random_chunks(config, decoder, sequences, block_size, rng) -> list[np.ndarray]:
    """Every sequence's logits, computed in steps that mix chunks of random lengths in random order."""
    pool = Pool(config, [len(s) for s in sequences], block_size, rng)
    done = [0] * len(sequences)
    logits = [np.zeros((len(s), config.vocab_size), np.float32) for s in sequences]
    while any(n < len(s) for n, s in zip(done, sequences, strict=True)):
        chunks = []
        for i in rng.permutation(len(sequences)).tolist():
            left = len(sequences[i]) - done[i]
            n = min(left, int(rng.choice([0, 1, 1, 3, 9])))
            if n:
                chunks.append((i, sequences[i][done[i] : done[i] + n], done[i]))
        if not chunks:
            continue
        out = iter(decoder.forward(pool.batch(chunks), pool.cache))
        for i, new, before in chunks:
            for position in range(before, before + len(new)):
                logits[i][position] = next(out)
            done[i] += len(new)
    return logits


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256]),
)
def test_chunks_and_company_do_not_matter(name, seed, lengths, block_size):
    config, _, decoder = make_decoder(name)
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    for tokens, logits in zip(
        sequences, run_in_random_chunks(config, decoder, sequences, block_size, rng), strict=True
    ):
        assert_same_logits(logits, whole_pass(config, decoder, tokens))


@pytest.mark.parametrize("rows", [[], [4], [0, 4, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_only_the_rows_asked_for(rows):
    config, _, decoder = make_decoder("llama")
    rng = np.random.default_rng(0)
    chunks = [(0, [3, 1, 4, 1, 5], 0), (1, [9, 2], 0)]
    pool = Pool(config, [6, 2], 2, rng)
    everything = decoder.forward(pool.batch(chunks), pool.cache)
    fresh = Pool(config, [6, 2], 2, rng)
    logits = decoder.forward(fresh.batch(chunks, rows), fresh.cache)
    assert logits.shape == (len(rows), config.vocab_size) and logits.dtype == np.float32
    if rows:
        assert_same_logits(logits, everything[rows])
    # K and V of every token were written all the same: the next step needs them.
    after = [decoder.forward(p.batch([(0, [2], 5)]), p.cache) for p in (pool, fresh)]
    assert_same_logits(after[1], after[0])


def test_a_sequence_of_nan_harms_no_other():
    config, weights, _ = make_decoder("llama")
    weights.embedding = weights.embedding.copy()  # lm_head keeps the clean rows
    weights.embedding[7] = np.nan
    decoder = Decoder(config, weights, ReferenceOps(), MAX_MODEL_LEN)
    pool = Pool(config, [5, 5], 4, np.random.default_rng(0))
    logits = decoder.forward(pool.batch([(0, [3, 1, 4, 1, 5], 0), (1, [3, 1, 7, 1, 5], 0)]), pool.cache)
    assert np.isfinite(logits[:5]).all() and np.isnan(logits[7:]).all()
    assert_same_logits(logits[:5], whole_pass(config, decoder, [3, 1, 4, 1, 5]))


def test_weights_are_left_as_they_are():
    config, weights, decoder = make_decoder("gemma2")
    embedding, qkv = weights.embedding.copy(), weights.layers[0].qkv.weight.copy()
    whole_pass(config, decoder, [1, 2, 3])
    assert (weights.embedding == embedding).all() and (weights.layers[0].qkv.weight == qkv).all()
