"""Every architecture on a CUDA device against Hugging Face transformers: all kernels of a step together.

The fixtures are those of tests/model/test_parity.py. Each of them, token by token, takes minutes in the
interpreter (``-m slow``) and no time on a card (``-m gpu``).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.cuda_devices import make_device

# isort: split

from cuda_kernels import packing
from minipaged.kv_cache import KVCache
from minipaged.model.architectures import load_weights
from minipaged.model.decoder import Decoder
from minipaged.model.safetensors_file import SafetensorsSource
from minipaged.ops.interface import Batch
from minipaged.ops.reference import ReferenceOps
from tests.support.cuda_cases import decode
from tests.support.cuda_machine import FIXTURES, Machine

CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
QUICK = ("gemma2_soft_caps", "gpt2_tied", "llama_gqa", "mistral_window", "mixtral_top2", "qwen3_moe_dense_layer")
SLOW_DEVICES = [pytest.param("emulated", marks=pytest.mark.slow), pytest.param("card", marks=pytest.mark.gpu)]
PROMPT = 24
TOLERANCE = 1e-5  # of the largest absolute logit, float32


def error(name: str, device, chunks: list[int]) -> float:
    """The largest error of the logits of the first tokens, taken in ``chunks``, relative to the largest one."""
    expected = np.load(FIXTURES / name / "expected.npz")
    machine = Machine(device, name, max_model_len=int(expected["max_model_len"]), max_num_tokens=PROMPT)
    logits = machine.run(expected["token_ids"][: sum(chunks)], chunks)
    machine.decoder.close()
    found = np.abs(logits - expected["logits"][: sum(chunks)]).max() / np.abs(expected["logits"]).max()
    return float(found)


@pytest.mark.parametrize("name", QUICK)
def test_logits_equal_transformers(name):
    assert error(name, make_device("emulated"), [17, 1]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", SLOW_DEVICES)
def test_every_position_equals_transformers(kind, name):
    for chunks in ([PROMPT] + [1] * 20, [5, 1, 11, 7]):
        assert error(name, make_device(kind), chunks) < TOLERANCE


class RoundTrip:
    """Packs nothing: gives back the float32 matrix that a device's copy in ``form`` stands for."""

    stacks = True

    def __init__(self, form: str, activation: str):
        self.form, self.activation = form, activation

    def __call__(self, matrix: np.ndarray, role: str) -> np.ndarray:
        form = self.activation if role == "embedding" else self.form
        packed = packing.pack_rows("int8" if (form, role) == ("int4", "lm_head") else form, matrix)
        if packed.format == "int8":
            return packed.data * packed.scales[:, None]
        if packed.format == "int4":
            q = np.stack([packed.data & 15, packed.data >> 4], axis=-1).reshape(len(matrix), -1, 32)
            values = (q.astype(np.float32) - 8) * packed.scales.view(np.float16)[..., None].astype(np.float32)
            return values.reshape(len(matrix), -1)[:, : matrix.shape[1]]
        return decode(packed.data, packed.format)

    def start(self, *arguments) -> None:
        pass


@pytest.mark.parametrize(
    "capability, weights, activations, kv",
    [
        pytest.param((7, 5), "float16", "float16", "float16", marks=pytest.mark.slow),
        ((8, 0), "bfloat16", "bfloat16", "bfloat16"),
        pytest.param((7, 5), "int8", "float16", "int8", marks=pytest.mark.slow),
        pytest.param((8, 0), "int4", "bfloat16", "float16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_smaller_formats_are_those_numbers(capability, weights, activations, kv):
    """The reference decoder with the weights that the packed ones stand for; what is left is rounding."""
    name, count = "llama_llama3", 10
    device = make_device("emulated", capability)
    machine = Machine(device, name, weights=weights, activations=activations, kv=kv)
    ids = np.load(FIXTURES / name / "expected.npz")["token_ids"][:count]
    found = machine.run(ids, [count - 1, 1])

    config = machine.config
    assert not config.tie_word_embeddings
    rounded = load_weights(config, SafetensorsSource(FIXTURES / name), RoundTrip(weights, activations))
    cache = KVCache(config.num_layers, 4, 4, config.num_kv_heads, config.head_dim)
    decoder = Decoder(config, rounded, ReferenceOps(), 64)
    batch = Batch(
        input_ids=ids,
        positions=np.arange(count, dtype=np.int32),
        slot_mapping=np.arange(count),
        query_start_loc=np.array([0, count], np.int32),
        context_lens=np.array([count], np.int32),
        block_tables=np.arange(4, dtype=np.int32)[None],
        logits_indices=np.arange(count, dtype=np.int32),
    )
    expected = decoder.forward(batch, cache)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < {"float16": 3e-3, "bfloat16": 3e-2}[activations] * (10 if kv == "int8" else 1)
