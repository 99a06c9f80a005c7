"""Loading never needs more memory than the weights as they are kept, the file, and 64 MiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from minipaged.model.gguf_names import LAYER_TENSORS, MODEL_TENSORS
from tests.support.gguf_files import letters_vocabulary, write_gguf
from tests.support.model_file_fuzzer import CONFIG, sound_tokenizer

ROOT = Path(__file__).parents[2]
HIDDEN, INNER, LAYERS, VOCAB = 512, 8192, 3, 1024
ALLOWANCE = 64 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")

MEASURE = """
import sys
from minipaged.model.architectures import load_weights
from minipaged.model.loader import load_model
import minipaged.model.gguf, minipaged.model.safetensors_file

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak()
model = load_model(sys.argv[1])
weights = load_weights(model.config, model.source)
print(peak() - before)
"""

MEASURE_ENGINE = """
import gc
import sys
from minipaged.config import EngineConfig
from minipaged.engine import Engine

def status(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

first = Engine(EngineConfig("tiny", device="cpu", quantization="int8", num_blocks=32))  # all is imported and compiled
first.close()
del first
gc.collect()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # the peak begins anew
before = status("VmRSS")
engine = Engine(EngineConfig(sys.argv[1], device="cpu", quantization="int8"))
print(engine.stats().weight_bytes, engine.stats().kv_cache_bytes, status("VmHWM") - before)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Llama's tensors under GGUF's names."""
    layer = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    layer |= {name: (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    layer |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    found = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    return found | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def values(shape) -> np.ndarray:
    return np.resize(np.linspace(-1, 1, 4096, dtype=np.float32), shape)


def write_gguf_file(directory: Path) -> Path:
    metadata = {
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    } | letters_vocabulary(VOCAB)
    eight_bit = gguf.GGMLQuantizationType.Q8_0
    tensors = {
        f"{name}.weight": (eight_bit, values(shape)) if len(shape) == 2 else values(shape)
        for name, shape in shapes().items()
    }
    return write_gguf(directory / "model.gguf", "llama", metadata, tensors)


def write_safetensors(directory: Path) -> Path:
    """The same tensors in bfloat16, under Hugging Face's names."""
    header, end = {}, 0
    for name, shape in shapes().items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[f"{hf_name(name)}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes().values():
            file.write((values(shape).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    sound_tokenizer().save(str(directory / "tokenizer.json"))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    config = CONFIG | sizes | {"num_attention_heads": 8, "num_key_value_heads": 8}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def hf_name(name: str) -> str:
    if not name.startswith("blk."):
        return MODEL_TENSORS[name]
    _, layer, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}"


@pytest.mark.parametrize("write", [write_gguf_file, write_safetensors])
def test_peak_memory_of_loading(tmp_path, write):
    path = write(tmp_path)
    in_float32 = 4 * sum(int(np.prod(shape)) for shape in shapes().values())
    file_size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert in_float32 > 150 << 20 and file_size > 40 << 20
    (peak,) = measure(MEASURE, path)
    print(f"{peak >> 20} MiB for {in_float32 >> 20} MiB of float32 and a file of {file_size >> 20} MiB")
    assert in_float32 <= peak <= in_float32 + file_size + ALLOWANCE


@pytest.mark.parametrize("write", [write_gguf_file, write_safetensors])
def test_peak_memory_of_an_engine_with_packed_weights(tmp_path, write):
    """No copy of a weight in float32, no tensor of the file that was read already, no KV block that nobody uses."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel cannot begin the peak of memory anew")
    packed, kv_cache, peak = measure(MEASURE_ENGINE, write(tmp_path))
    in_float32 = 4 * sum(int(np.prod(shape)) for shape in shapes().values())
    print(f"{peak >> 20} MiB for {packed >> 20} MiB of weights, in float32 {in_float32 >> 20}")
    assert 35 << 20 < packed < in_float32 // 3 and kv_cache > 5 << 20
    assert packed <= peak <= packed + (32 << 20)


def measure(program: str, path: Path) -> list[int]:
    """The numbers that a program prints which is given the path of a model, in a process of its own."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]
