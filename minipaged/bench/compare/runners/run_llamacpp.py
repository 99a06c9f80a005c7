"""llama.cpp, by the C API that the package llama-cpp-python wraps; the model is a GGUF file.

Continuous batching as llama.cpp's own server does it: each call of ``llama_decode`` gets one token of
every sequence that generates, then prompt tokens of the others up to the batch size. Options:
``batch_size``, ``ubatch_size`` (tokens of one call, and of one piece of it), ``flash_attention`` (1 or
0), ``kv_unified`` (1: one cache for all sequences). There is no prefix cache to switch off.
"""

import time

from serve import RunnerError, serve, take_options

DEFAULTS = {"batch_size": "512", "ubatch_size": "512", "flash_attention": "0", "kv_unified": "0"}


class Runner:
    def __init__(self, model, limits, options):
        import llama_cpp
        import numpy as np

        self.llama, self.np = llama_cpp, np
        options = {name: int(value) for name, value in take_options(options, DEFAULTS).items()}
        llama_cpp.llama_backend_init()
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, None)
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RunnerError(f"llama.cpp cannot load {model}; it reads GGUF files")
        sequences = limits["max_num_seqs"]
        settings = llama_cpp.llama_context_default_params()
        # Without a unified cache every sequence has an equal part of the cells.
        per_sequence = -(-limits["max_model_len"] // 256) * 256
        settings.n_ctx = limits["kv_tokens"] if options["kv_unified"] else sequences * per_sequence
        settings.n_batch, settings.n_ubatch = options["batch_size"], options["ubatch_size"]
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = limits["num_threads"]
        settings.kv_unified = bool(options["kv_unified"])
        if hasattr(settings, "flash_attn_type"):
            settings.flash_attn_type = options["flash_attention"]
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RunnerError(f"llama.cpp cannot make a context of {settings.n_ctx} tokens")
        self.batch_size = options["batch_size"]
        self.batch = llama_cpp.llama_batch_init(self.batch_size, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def about(self):
        return {"version": f"llama-cpp-python {self.llama.__version__}"}

    def run(self, requests):
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), False)
        pending = [list(request["prompt"]) for request in requests]  # tokens to compute, of each sequence
        positions = [0] * len(requests)
        left = [request["max_tokens"] for request in requests]
        first, generated = None, 0
        started = time.perf_counter()
        while any(left):
            rows = self._fill_batch(pending, positions, left)
            status = self.llama.llama_decode(self.context, self.batch)
            if status:
                raise RunnerError(f"llama_decode returned {status}")
            for row, sequence in rows:
                logits = self.np.ctypeslib.as_array(
                    self.llama.llama_get_logits_ith(self.context, row), shape=(self.vocab_size,)
                )
                token = int(logits.argmax())
                generated += 1
                left[sequence] -= 1
                if left[sequence]:
                    pending[sequence] = [token]
            if rows and first is None:
                first = time.perf_counter() - started
        return time.perf_counter() - started, first, generated

    def _fill_batch(self, pending, positions, left):
        """Tokens of the next call; returns ``(row, sequence)`` for each token whose logits are wanted."""
        batch, count, rows = self.batch, 0, []
        # Those that generate have one token pending: shortest first puts them before the prompts.
        for sequence in sorted((i for i, n in enumerate(left) if n), key=lambda i: len(pending[i])):
            tokens = pending[sequence][: self.batch_size - count]
            for i, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = positions[sequence] + i
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = False
                count += 1
            positions[sequence] += len(tokens)
            del pending[sequence][: len(tokens)]
            if tokens and not pending[sequence]:
                batch.logits[count - 1] = True
                rows.append((count - 1, sequence))
        batch.n_tokens = count
        return rows

    def close(self):
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


if __name__ == "__main__":
    serve(Runner)
