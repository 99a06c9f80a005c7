"""The cpu backend behind the engine: golden tokens, formats, options, two engines at once, forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minipaged import LLM, SamplingParams
from minipaged.errors import BackendUnavailableError, ConfigError, EngineClosedError
from tests.support.engines import generate, make_engine

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures" / "tiny_golden.json").read_text())
GREEDY = SamplingParams(temperature=0, max_tokens=GOLDEN["max_new_tokens"], ignore_eos=True)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "num_threads": 1, "block_size": 8, "max_num_batched_tokens": 64},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "kv_cache_dtype": "float32"},
        {"quantization": "int8"},
        {"quantization": "int8", "kv_cache_dtype": "int8"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_golden_tokens(options):
    engine = make_engine("tiny", device="cpu", **options)
    for case in GOLDEN["prompts"]:
        assert generate(engine, case["prompt_ids"], GREEDY).outputs[0].token_ids == case["target"]["greedy_ids"]
    engine.close()


def test_int4_differs_little():
    engine = make_engine("tiny", device="cpu", quantization="int4")
    for case in GOLDEN["prompts"]:
        tokens = generate(engine, case["prompt_ids"], GREEDY).outputs[0].token_ids
        assert tokens[0] == case["target"]["greedy_ids"][0]


def test_auto_is_the_cpu_backend():
    with LLM("tiny-draft") as llm:
        assert llm.stats().device == "cpu"


def test_two_engines_at_once():
    results: dict[str, list] = {}

    def run(name: str, **options):
        with LLM("tiny", device="cpu", **options) as llm:
            outputs = llm.generate([case["prompt_ids"] for case in GOLDEN["prompts"]], GREEDY)
            results[name] = [output.outputs[0].token_ids for output in outputs]

    threads = [
        threading.Thread(target=run, args=("a",), kwargs={"dtype": "float32"}),
        threading.Thread(target=run, args=("b",), kwargs={"dtype": "bfloat16"}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    golden = [case["target"]["greedy_ids"] for case in GOLDEN["prompts"]]
    assert results == {"a": golden, "b": golden}


def test_close_ends_the_threads_of_the_backend():
    before = {thread.name for thread in threading.enumerate()}
    llm = LLM("tiny-draft", device="cpu", num_threads=3)
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
    llm.close()
    assert {thread.name for thread in threading.enumerate()} <= before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_fork_is_refused(device):
    with LLM("tiny-draft", device=device) as llm:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
            except EngineClosedError as error:
                status = 0 if "fork" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"kv_cache_dtype": "float16"}, {"swap_space": 1}])
def test_options_that_are_not_offered(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_engine(device="cpu", **options)


def test_why_the_backend_is_not_available():
    code = "from minipaged import LLM\nLLM('tiny-draft', device='cpu')"
    environment = os.environ | {"MINIPAGED_CPU_LEVEL": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert BackendUnavailableError.__name__ in done.stderr and "mmx" in done.stderr


def test_the_reference_backend_does_without_numba():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from minipaged import LLM, SamplingParams\n"
        "with LLM('tiny-draft', device='reference') as llm:\n"
        "    llm.generate([1, 2, 3], SamplingParams(max_tokens=2))\n"
        "print('minipaged.ops.cpu' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
