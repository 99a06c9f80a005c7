"""onnxruntime-genai on the CPU; the model is a directory of its own format.

``python -m onnxruntime_genai.models.builder -m DIR -o OUT -p int4 -e cpu`` makes one. Requests of a run
are served one after the other: its ``Generator`` batches only prompts of one length.
"""

import json
import time
from pathlib import Path

from serve import RunnerError, serve, take_options


class Runner:
    def __init__(self, model, limits, options):
        import onnxruntime_genai

        take_options(options, {})
        if not (Path(model) / "genai_config.json").exists():
            raise RunnerError(
                f"{model} has no genai_config.json; make a directory with "
                "`python -m onnxruntime_genai.models.builder` and name it after the Python"
            )
        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model))
        threads = {"intra_op_num_threads": limits["num_threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self.model = onnxruntime_genai.Model(config)

    def about(self):
        return {"version": f"onnxruntime-genai {self.genai.__version__}"}

    def run(self, requests):
        first, generated = None, 0
        started = time.perf_counter()
        for request in requests:
            length = len(request["prompt"]) + request["max_tokens"]
            params = self.genai.GeneratorParams(self.model)
            params.set_search_options(max_length=length, min_length=length, do_sample=False)  # no end before that
            generator = self.genai.Generator(self.model, params)
            generator.append_tokens(request["prompt"])
            for _ in range(request["max_tokens"]):
                generator.generate_next_token()
                generated += 1
                if first is None:
                    first = time.perf_counter() - started
        return time.perf_counter() - started, first, generated


if __name__ == "__main__":
    serve(Runner)
