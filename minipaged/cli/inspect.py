"""Show what a model is made of, without reading its weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter

from minipaged.cli.terminal import fields, human_bytes, human_count, table, write

SUMMARY = "show what a model is made of"
EPILOG = """\
examples:
  minipaged inspect tiny
  minipaged inspect --tensors model.gguf
  minipaged inspect --json smollm2-135m
"""
# Features that are only worth a line where a model has them; the others are always shown.
USUAL = {
    "attention_soft_cap": None,
    "final_soft_cap": None,
    "embedding_scale": 1.0,
    "qk_norm": False,
    "post_norms": False,
    "learned_positions": False,
    "tie_word_embeddings": False,
    "num_experts": 0,
}
FLOAT32_BYTES = 4


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name, a directory in Hugging Face layout, or a GGUF file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and dtype")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> None:
    from minipaged.model.loader import load_model

    found = examine(load_model(args.model))
    if args.json:
        if not args.tensors:
            del found["tensors"]
        write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return
    write(_text(found) + "\n")
    if args.tensors:
        rows = [
            [t["name"], "x".join(map(str, t["shape"])), t["dtype"], human_bytes(t["bytes"])] for t in found["tensors"]
        ]
        write("\n" + table(["tensor", "shape", "dtype", "size"], rows, right=(3,)) + "\n")


def examine(model) -> dict:
    """Everything that the headers of a :class:`~minipaged.model.loader.LoadedModel` tell, as plain data.

    Sizes are bytes; tensors have the names and shapes of Hugging Face's checkpoints, and the dtypes
    of the file.
    """
    from minipaged.sizing import kv_block_bytes

    config, tokenizer = model.config, model.tokenizer
    tensors = []
    for name in model.source.names():
        dtype, nbytes = model.source.stored_as(name)
        tensors.append({"name": name, "shape": list(model.source.shape(name)), "dtype": dtype, "bytes": nbytes})
    return {
        "model": model.name,
        "path": str(model.path),
        "config": dataclasses.asdict(config),
        "num_parameters": sum(math.prod(t["shape"]) for t in tensors),
        "num_tensors": len(tensors),
        "dtypes": dict(Counter(t["dtype"] for t in tensors)),
        "tensor_bytes": sum(t["bytes"] for t in tensors),
        "kv_bytes_per_token": kv_block_bytes(config, block_size=1, bytes_per_value=FLOAT32_BYTES),
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "kind": "byte-level BPE" if tokenizer.byte_level else "pieces of text",
            "bos_token": _token(tokenizer, tokenizer.bos_token_id),
            "eos_tokens": [_token(tokenizer, token_id) for token_id in config.eos_token_ids],
        },
        "chat_template": None if model.chat_template is None else model.chat_template.templates,
        "generation_config": model.generation_config,
        "tensors": tensors,
    }


def _token(tokenizer, token_id: int | None) -> dict | None:
    return None if token_id is None else {"id": token_id, "text": tokenizer.backend.id_to_token(token_id)}


def _text(found: dict) -> str:
    config, tokenizer = found["config"], found["tokenizer"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    kv_bytes = found["kv_bytes_per_token"]
    context = config["max_position_embeddings"]
    templates = found["chat_template"]
    eos = ", ".join(_token_text(token) for token in tokenizer["eos_tokens"])
    lines = [
        ("model", found["model"]),
        ("path", found["path"]),
        ("architecture", config["architecture"]),
        ("parameters", f"{human_count(found['num_parameters'])} ({found['num_parameters']:,})"),
        ("tensors", f"{found['num_tensors']} ({dtypes}), {human_bytes(found['tensor_bytes'])}"),
        ("layers", f"{config['num_layers']}{_sliding(config['layers'])}"),
        ("hidden size", f"{config['hidden_size']}, feed-forward {config['intermediate_size']}"),
        (
            "attention",
            f"{config['num_heads']} heads of {config['head_dim']}, {config['num_kv_heads']} KV heads",
        ),
        ("positions", _positions(config["layers"])),
        ("norm", f"{config['norm']}, eps {config['norm_eps']:g}"),
        ("activation", config["activation"] + (", gated" if config["gated"] else "")),
        ("context", f"{context} tokens"),
        (
            "KV cache",
            f"{human_bytes(kv_bytes)} a token in float32, {human_bytes(kv_bytes * context)} for the whole context",
        ),
        ("tokenizer", f"{tokenizer['vocab_size']} tokens, {tokenizer['kind']}"),
        ("begin, end", f"{_token_text(tokenizer['bos_token'])}; {eos or 'none'}"),
        ("chat template", "none" if templates is None else ", ".join(templates)),
    ]
    unusual = [f"{name} {config[name]}" for name, usual in USUAL.items() if config[name] != usual]
    if unusual:
        lines.insert(11, ("also", ", ".join(unusual)))
    return fields(lines)


def _token_text(token: dict | None) -> str:
    return "none" if token is None else f"{token['text']} ({token['id']})"


def _sliding(layers: tuple[dict, ...]) -> str:
    windows = Counter(layer["sliding_window"] for layer in layers if layer["sliding_window"] is not None)
    return "".join(f", {count} with a sliding window of {window} tokens" for window, count in windows.items())


def _positions(layers: tuple[dict, ...]) -> str:
    ropes = {json.dumps(layer["rope"], sort_keys=True): layer["rope"] for layer in layers}
    shown = []
    for rope in ropes.values():
        if rope is None:
            shown.append("none in the layers")
        else:
            scaling = "" if rope["scaling"] == "none" else f", {rope['scaling']} scaling"
            shown.append(f"rope of {rope['rotary_dim']}, theta {rope['theta']:g}{scaling}")
    return "; ".join(shown)
