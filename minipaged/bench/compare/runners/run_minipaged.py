"""minipaged itself, under the same protocol and in a process of its own like the others."""

import time

from serve import RunnerError, serve

from minipaged import __version__
from minipaged.bench.modes import parse_mode
from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.errors import MinipagedError


class Runner:
    def __init__(self, model, limits, options):
        blocks = limits["kv_tokens"] // 16 + limits["max_num_seqs"]  # a partly filled block a request
        config = EngineConfig(
            model=model,
            **parse_mode(options["mode"]),
            block_size=16,
            num_blocks=blocks,
            max_model_len=limits["max_model_len"],
            max_num_seqs=limits["max_num_seqs"],
            num_threads=limits["num_threads"],
            enable_prefix_caching=False,
        )
        try:
            self.engine = Engine(config)
        except MinipagedError as error:
            raise RunnerError(str(error)) from error

    def about(self):
        engine, config = self.engine, self.engine.model.config
        stats = engine.stats()
        layer_parameters = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
        mlp = (3 if config.gated else 2) * config.hidden_size
        parameters = 0
        for layer in config.layers:
            width = config.num_experts_per_tok * config.moe_intermediate_size if layer.moe else config.intermediate_size
            parameters += layer_parameters + mlp * width
        return {
            "version": __version__,
            "vocab_size": config.vocab_size,
            "device": engine.backend.name,
            "weights": engine.formats.weights,
            "kv_cache": engine.formats.kv_cache,
            "bytes_per_step": stats.weight_bytes - engine.runner.embedding_bytes,
            "kv_bytes_per_token": stats.kv_cache_bytes / (stats.num_blocks_total * stats.block_size),
            "layer_parameters": parameters,
            "head_parameters": config.vocab_size * config.hidden_size,
            "attention_width": config.num_layers * config.num_heads * config.head_dim,
        }

    def run(self, requests):
        engine, first, outputs = self.engine, None, []
        before = engine.stats().num_generated_tokens
        started = time.perf_counter()
        for request in requests:
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=request["max_tokens"])
            engine.add_request(request["prompt"], params)
        while engine.has_unfinished():
            outputs += engine.step()
            if first is None and engine.stats().num_generated_tokens > before:
                first = time.perf_counter() - started
        wall = time.perf_counter() - started
        return wall, first, sum(len(output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    serve(Runner)
