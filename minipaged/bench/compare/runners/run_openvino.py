"""OpenVINO GenAI's ``ContinuousBatchingPipeline`` on the CPU; the model is a directory of its own format.

``optimum-cli export openvino --model DIR --weight-format int8 OUT`` (package optimum-intel) makes one.
Options: ``cache_gb``, and any property of the CPU plugin in capitals (``INFERENCE_PRECISION_HINT=f32``).
"""

import time
from pathlib import Path

from serve import RunnerError, serve


class Runner:
    def __init__(self, model, limits, options):
        import openvino
        import openvino_genai

        if not (Path(model) / "openvino_model.xml").exists():
            raise RunnerError(
                f"{model} has no openvino_model.xml; make a directory with "
                "`optimum-cli export openvino --model MODEL --weight-format int8 OUT` and name it after the Python"
            )
        properties = {name: value for name, value in options.items() if name.isupper()}
        for name in options.keys() - properties.keys() - {"cache_gb"}:
            raise RunnerError(f"unknown option {name!r}; this engine takes cache_gb, or CPU properties in capitals")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = int(options.get("cache_gb", 1))
        scheduler.max_num_seqs = limits["max_num_seqs"]
        scheduler.enable_prefix_caching = False
        properties.setdefault("INFERENCE_NUM_THREADS", str(limits["num_threads"]))
        self.openvino, self.genai = openvino, openvino_genai
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self.next_id = 0

    def about(self):
        return {"version": self.genai.__version__}

    def run(self, requests):
        import numpy as np

        handles, first, generated = [], None, 0
        started = time.perf_counter()
        for request in requests:
            config = self.genai.GenerationConfig()
            config.max_new_tokens = request["max_tokens"]
            config.ignore_eos = True
            config.do_sample = False
            ids = self.openvino.Tensor(np.array([request["prompt"]], np.int64))
            handles.append(self.pipeline.add_request(self.next_id, ids, config))
            self.next_id += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if first is None and any(handle.can_read() for handle in handles):
                first = time.perf_counter() - started
        wall = time.perf_counter() - started
        for handle in handles:
            generated += sum(len(output.generated_ids) for output in handle.read_all())
        return wall, first, generated


if __name__ == "__main__":
    serve(Runner)
