"""Mutated model files, loaded one after the other in a process with little memory to spare.

    python -m tests.support.model_file_fuzzer KIND FIRST_SEED COUNT DIRECTORY

writes a small sound model into DIRECTORY, then loads COUNT mutants of one of its files. A mutant
must load, or be refused with a ``MinipagedError``. The process ends with an error at the first one
that does anything else: another exception, more than 64 MiB of memory, or 20 seconds.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import random
import resource
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from minipaged.errors import MinipagedError
from minipaged.model.architectures import load_weights
from minipaged.model.loader import load_model
from minipaged.model.safetensors_file import INDEX_FILE, SINGLE_FILE
from tests.support.gguf_files import Type, write_gguf

KINDS = ("safetensors", "index", "gguf", "config", "tokenizer")
EXTRA_MEMORY = 64 << 20
SECONDS = 20
MARGIN = 512  # bytes around a header's ends, where most of what can go wrong is

INTEGERS = [0, 1, -1, 2, 3, 7, 8, 31, 32, 33, 255, 256, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40]
INTEGERS += [2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1, 2**64, 10**30]
STRANGE = [None, True, False, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "F32", "F16", "BF16", "I64", "../x"]
STRANGE += ["\ud800", "\0", "é" * 1000, [], {}, [[]], [0], [2**40, 2**40], {"a": {}}, ["x"] * 50]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": [1],
    "hidden_act": "silu",
}


def sound_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|begin|>": 0, "<|im_end|>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o"), ("Ġ", "w")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|begin|>", "<|im_end|>")])
    return tokenizer


def write_model(directory: Path, sharded: bool) -> None:
    """A Llama of one layer in Hugging Face's layout."""
    rng, tokenizer = np.random.default_rng(0), sound_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    shapes = {f"self_attn.{p}_proj": s for p, s in zip("qkvo", [(8, 8), (4, 8), (4, 8), (8, 8)], strict=True)}
    shapes |= {"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
    shapes |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    tensors = {f"model.layers.0.{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    tensors |= {"model.embed_tokens.weight": rng.normal(size=(vocab_size, 8)), "model.norm.weight": np.ones(8)}
    tensors = {name: np.float16(values) for name, values in tensors.items()}
    if sharded:
        names = sorted(tensors)
        weight_map = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
        for shard in set(weight_map.values()):
            save_file({name: tensors[name] for name in names if weight_map[name] == shard}, directory / shard)
        (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab_size}))


def write_gguf_model(path: Path) -> None:
    """The same model in GGUF, its tensors of several types."""
    rng, tokenizer = np.random.default_rng(0), sound_tokenizer()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    metadata = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["H e", "l l", "He ll", "Hell o", "Ġ w"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    types = [Type.F32, Type.F16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0, Type.BF16]
    tensors = {
        f"blk.0.{name}.weight": (type_, rng.normal(size=shape))
        for (name, shape), type_ in zip(shapes.items(), types, strict=True)
    }
    tensors |= {f"blk.0.{name}_norm.weight": np.ones(32) for name in ("attn", "ffn")}
    tensors |= {"token_embd.weight": (Type.Q8_0, rng.normal(size=(len(tokens), 32))), "output_norm.weight": np.ones(32)}
    tensors["rope_freqs.weight"] = np.linspace(1, 4, 4)
    write_gguf(path, "llama", metadata, tensors)


def mutate_bytes(rng: random.Random, data: bytes, hot: list[int]) -> bytes:
    """A few changes of bytes; half of them near the ``hot`` offsets."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) or 1)
        if hot and rng.random() < 0.5:
            at = min(max(rng.choice(hot) + rng.randrange(-MARGIN, MARGIN), 0), max(len(data) - 1, 0))
        change = rng.randrange(7)
        if change == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1 and data:
            data[at] = rng.choice([0, 1, 0x20, 0x22, 0x2C, 0x5B, 0x7B, 0x7F, 0x80, 0xFF])
        elif change == 2:
            data[at : at + 8] = struct.pack("<Q", rng.choice(INTEGERS) % 2**64)
        elif change == 3:
            data[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) % 2**32)
        elif change == 4:
            del data[at : at + rng.choice([1, 4, 8, 100, len(data)])]
        elif change == 5:
            data[at:at] = data[at : at + rng.choice([1, 4, 8, 100])]
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 8, 100]))
    return bytes(data)


def mutate_json(rng: random.Random, value):
    """A copy of a JSON value with one or a few of its parts replaced, removed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        parent, key = None, None
        node = value
        while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
            parent = node
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = parent[key]
        if parent is None:
            return rng.choice(STRANGE)
        change = rng.randrange(6)
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(node, int):
            parent[key] = node + rng.choice([-1, 1, 8, -8, 2**32])
        elif change == 2:
            parent[key] = rng.choice(STRANGE)
        elif change == 3 and isinstance(parent, dict):
            parent[rng.choice(["x", "", "model.norm.weight", "dtype", "lm_head.weight", "rope_parameters"])] = node
        elif change == 4:
            parent[key] = copy.deepcopy(value if rng.random() < 0.2 else rng.choice(list(value.values())))
        else:
            parent[key] = rng.choice(INTEGERS)
    return value


def mutate_json_text(rng: random.Random, text: bytes) -> bytes:
    choice = rng.random()
    if choice < 0.6:
        return json.dumps(mutate_json(rng, json.loads(text))).encode()
    if choice < 0.65:
        depth = rng.choice([100, 10_000, 100_000])
        return b'{"a":' * depth + b"1" + b"}" * rng.choice([0, depth])
    if choice < 0.7:
        return text[:-1] + b"," + text[1:]  # every key twice
    return mutate_bytes(rng, text, [])


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, [0, 8, 8 + length])
    text = mutate_json_text(rng, data[8 : 8 + length])
    size = len(text) if rng.random() < 0.9 else rng.choice(INTEGERS) % 2**64
    return struct.pack("<Q", size) + text + data[8 + length :]


def prepare(kind: str, directory: Path):
    """Write the sound model; returns what to load, the file to change and how."""
    if kind == "gguf":
        path = directory / "model.gguf"
        write_gguf_model(path)
        table = path.read_bytes().find(b"blk.0.attn_q")  # where the tensors' records begin
        return path, path, lambda rng, data: mutate_bytes(rng, data, [0, 12, 500, table, table + 200, table + 400])
    write_model(directory, sharded=kind == "index")
    names = {"safetensors": SINGLE_FILE, "index": INDEX_FILE}
    mutate = mutate_safetensors if kind == "safetensors" else mutate_json_text
    return directory, directory / names.get(kind, f"{kind}.json"), mutate


def load(path: Path) -> str:
    """Load everything; the name of the error, or ``"loaded"``."""
    try:
        model = load_model(str(path))
        weights = load_weights(model.config, model.source)
        ids = model.tokenizer.encode("Hello wörld<|im_end|>")
        model.tokenizer.decode(ids)
        if model.chat_template is not None:
            model.chat_template.render([{"role": "user", "content": "Hello"}])
    except MinipagedError as error:
        assert len(str(error)) < 20_000, "an error of this length is no explanation"
        return type(error).__name__
    assert weights.embedding.shape == (model.config.vocab_size, model.config.hidden_size)
    assert np.isfinite(weights.embedding).all() and len(weights.layers) == model.config.num_layers
    return "loaded"


def main() -> None:
    kind, first, count, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    path, file, mutate = prepare(kind, directory)
    sound = file.read_bytes()
    assert load(path) == "loaded"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    results = Counter()
    for seed in range(first, first + count):
        print(f"seed {seed}", file=sys.stderr, flush=True)  # the last line tells where it ended
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        file.write_bytes(mutate(random.Random(seed), sound))
        results[load(path)] += 1
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
