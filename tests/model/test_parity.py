"""Every architecture against Hugging Face transformers: the files, the features, the paged forward pass.

The fixtures are made by tests/fixtures/make_parity.py, whose docstring says what they hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minipaged.kv_cache import KVCache
from minipaged.model.architectures import ARCHITECTURES, config_from_hf, load_weights
from minipaged.model.cpu_decoder import CpuDecoder
from minipaged.model.decoder import Decoder
from minipaged.model.safetensors_file import SafetensorsSource
from minipaged.model.weight_packer import WeightPacker
from minipaged.ops.cpu.kv import CpuKVCache, KVLayout
from minipaged.ops.interface import Batch
from minipaged.ops.reference import ReferenceOps

FOLDER = Path(__file__).parent.parent / "fixtures" / "parity"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
BLOCK_SIZE = 4
NUM_BLOCKS = 40
PROMPT, STEPS = 24, 20
TOLERANCE = 1e-4  # of the largest absolute logit


class Case:
    """A fixture, loaded through our own path, and a paged sequence to feed it to."""

    def __init__(self, name: str, device: str = "reference"):
        folder = FOLDER / name
        self.hf_config = json.loads((folder / "config.json").read_text())
        expected = np.load(folder / "expected.npz")
        self.token_ids, self.logits = expected["token_ids"], expected["logits"]
        config = config_from_hf(self.hf_config)
        pack = WeightPacker("float32") if device == "cpu" else None
        self.weights = load_weights(config, SafetensorsSource(folder), pack)
        self.use(config, int(expected["max_model_len"]), device)

    def use(self, c, max_model_len: int, device: str = "reference") -> None:
        """Make a decoder of these features, and a cache full of NaN."""
        if device == "cpu":
            layout = KVLayout("float32", BLOCK_SIZE, c.num_kv_heads, c.head_dim)
            self.cache = CpuKVCache(c.num_layers, NUM_BLOCKS, layout)
            self.cache.data.view(np.float32)[...] = np.nan
            self.decoder = CpuDecoder(
                c, self.weights, self.cache, max_model_len=max_model_len, max_num_tokens=PROMPT, num_threads=2
            )
        else:
            self.cache = KVCache(c.num_layers, NUM_BLOCKS, BLOCK_SIZE, c.num_kv_heads, c.head_dim)
            self.cache.k[...] = self.cache.v[...] = np.nan
            self.decoder = Decoder(c, self.weights, ReferenceOps(), max_model_len)

    def run(self, chunks: list[int], seed: int = 0) -> np.ndarray:
        """Logits of every position, with the prompt prefilled in ``chunks`` and then token by token.

        The sequence's blocks lie anywhere in the pool.
        """
        table = np.random.default_rng(seed).permutation(NUM_BLOCKS)[: -(-len(self.token_ids) // BLOCK_SIZE)]
        rows, start = [], 0
        for size in chunks + [1] * STEPS:
            positions = np.arange(start, start + size, dtype=np.int32)
            start += size
            batch = Batch(
                input_ids=self.token_ids[positions],
                positions=positions,
                slot_mapping=table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
                query_start_loc=np.array([0, size], np.int32),
                context_lens=np.array([start], np.int32),
                block_tables=table[None].astype(np.int32),
                logits_indices=np.arange(size, dtype=np.int32),
            )
            rows.append(self.decoder.forward(batch, self.cache))
        return np.concatenate(rows)

    def error(self, logits: np.ndarray) -> float:
        return float(np.abs(logits - self.logits).max() / np.abs(self.logits).max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_logits_equal_transformers(name, device):
    case = Case(name, device)
    assert len(case.token_ids) == len(case.logits) == PROMPT + STEPS
    for seed, chunks in enumerate(([PROMPT], [5, 1, 11, 7])):
        error = case.error(case.run(chunks, seed))
        print(f"{name:28} chunks {chunks}: {error:.1e}")
        assert error < TOLERANCE


def test_every_architecture_has_two_fixtures():
    made_of = [json.loads((FOLDER / name / "config.json").read_text())["architectures"][0] for name in CASES]
    for architecture in ARCHITECTURES:
        assert made_of.count(architecture) >= 2, architecture


def test_both_spellings_of_config_are_among_the_fixtures():
    keys = [json.loads((FOLDER / name / "config.json").read_text()).keys() for name in CASES]
    assert sum("rope_parameters" in k for k in keys) >= 8
    assert sum("rope_scaling" in k and "torch_dtype" in k for k in keys) >= 8


@pytest.mark.parametrize(
    "name, change",
    [
        ("mistral_window", {"sliding_window": None}),
        ("qwen2_max_window_layers", {"max_window_layers": 2}),
        ("gemma2_soft_caps", {"attn_logit_softcapping": None}),
        ("gemma2_soft_caps", {"final_logit_softcapping": None}),
        ("gemma3_pattern", {"rope_local_base_freq": 600.0}),
        ("gemma3_pattern", {"sliding_window": 6}),
        ("llama_llama3", {"rope_scaling": None}),
        ("llama_yarn", {"rope_scaling": None}),
        ("llama_linear", {"rope_scaling": None}),
        ("phi3_longrope_long", {"original_max_position_embeddings": 64}),
        ("qwen3_moe_dense_layer", {"norm_topk_prob": True}),
        ("gpt2_untied_erf", {"activation_function": "gelu_new"}),
    ],
)
def test_fixtures_are_sensitive_to_each_feature(name, change):
    """Each feature matters in these models: without it, the fixture would fail."""
    case = Case(name)
    config = config_from_hf({**case.hf_config, **change})
    case.use(config, 64)
    assert case.error(case.run([PROMPT])) > TOLERANCE
