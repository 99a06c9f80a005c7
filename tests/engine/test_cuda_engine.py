"""The cuda backend behind the engine, on the emulated device: golden tokens, errors, what auto does with it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.cuda_devices import make_device

# isort: split

from minipaged import LLM, SamplingParams, backends
from minipaged.bench import kernels
from minipaged.errors import BackendUnavailableError, ConfigError, DownloadError, OutOfDeviceMemoryError
from minipaged.model import catalog
from minipaged.ops.cuda import available, emulated
from tests.support.engines import assert_all_blocks_back, generate, make_engine, run_to_end

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "fixtures" / "tiny_golden.json").read_text())


@pytest.fixture
def emulate(monkeypatch):
    monkeypatch.setenv(available.VARIABLE, "emulate")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def cuda_engine(model: str, **options):
    return make_engine(model, device="cuda", **{"dtype": "float32", "max_num_batched_tokens": 64, **options})


def test_golden_tokens_of_the_draft(emulate):
    """The first tokens of the smallest model, its prompt in chunks (all tokens of both: -m slow)."""
    case = GOLDEN["prompts"][1]
    engine = cuda_engine("tiny-draft", block_size=8, max_num_batched_tokens=8, max_num_seqs=2)
    output = generate(engine, case["prompt_ids"], greedy(4))
    assert output.outputs[0].token_ids == case["draft"]["greedy_ids"][:4]
    assert engine.stats().device == "cuda" and engine.stats().weight_bytes > 0
    assert_all_blocks_back(engine)
    engine.close()
    engine.close()


def golden_tokens(engine, max_tokens: int) -> None:
    """All prompts together; each has its golden tokens."""
    ids = [engine.add_request(case["prompt_ids"], greedy(max_tokens)) for case in GOLDEN["prompts"]]
    outputs = run_to_end(engine)
    for request_id, case in zip(ids, GOLDEN["prompts"], strict=True):
        assert outputs[request_id].outputs[0].token_ids == case["target"]["greedy_ids"][:max_tokens]


@pytest.mark.slow
def test_golden_tokens_preempted(emulate):
    """``tiny`` in float32, all golden tokens: prompts together, in chunks, in small blocks, with too few of them."""
    engine = cuda_engine("tiny", block_size=4, num_blocks=36, max_num_batched_tokens=24, max_num_seqs=4)
    golden_tokens(engine, 32)
    assert engine.stats().num_preemptions > 0
    assert_all_blocks_back(engine)


@pytest.mark.slow
def test_golden_tokens_from_the_prefix_cache(emulate):
    engine = cuda_engine("tiny", block_size=4, num_blocks=36, max_num_batched_tokens=24, max_num_seqs=4)
    golden_tokens(engine, 1)
    golden_tokens(engine, 4)
    stats = engine.stats()
    assert stats.num_prompt_tokens_cached > 0
    assert_all_blocks_back(engine)


@pytest.mark.slow
@pytest.mark.real_model
def test_launches_of_smollm2(emulate):
    """Of one decode step: 8 a layer, 9 where blocks share a long context, and 4 around the layers."""
    try:
        path = catalog.resolve("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"the model is not in the cache and cannot be pulled: {error}")
    engine = cuda_engine(str(path), dtype="float16", block_size=16, num_blocks=64, max_num_seqs=1)
    assert engine.runner.decoder.config.num_layers == 30
    for context, per_layer in ((512, 8), (513, 9)):
        calls = engine.runner.decoder.plan_step(kernels._batch(engine, 1, 1, context))
        names = Counter(call.kernel.name for call in calls)
        assert len(calls) == 30 * per_layer + 4, names
        assert names["embedding"] == names["sample"] == 1 and names["rms_norm"] == 2 * 30 + 1
        assert names["attention_reduce"] == 30 * (per_layer - 8)
    engine.close()


def test_emulation_is_loud_and_never_chosen_unasked(emulate, caplog):
    with caplog.at_level(logging.WARNING, "minipaged"):
        with LLM("tiny-draft", device="cuda", dtype="float32", max_num_batched_tokens=64) as llm:
            assert llm.stats().device == "cuda"
    assert any("PTX interpreter" in record.message for record in caplog.records)
    with LLM("tiny-draft") as llm:
        assert llm.stats().device != "cuda"


def test_no_card_no_cuda(monkeypatch):
    monkeypatch.delenv(available.VARIABLE, raising=False)
    if available.examine().problem is None:
        pytest.skip("there is a card")
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot be used: .*Usable here: 'cpu', 'reference'"):
        make_engine("tiny-draft", device="cuda")


def test_a_card_is_taken_unasked_if_the_packages_are_there(monkeypatch):
    card = {"name": "Imaginary card", "compute_capability": "8.0"}
    monkeypatch.delenv(available.VARIABLE, raising=False)
    monkeypatch.setattr(available, "driver_facts", lambda: {"driver": "13.9", "devices": [card], "problem": None})
    assert backends.choose("auto").name == backends.choose("cuda").name == "cuda"
    monkeypatch.setattr(available, "_importable", lambda module: module != "cuda.bindings")
    assert backends.choose("auto").name == "cpu"
    missing = "Imaginary card .* is there, but not the packages cuda-bindings: pip install 'minipaged.cuda.'"
    with pytest.raises(BackendUnavailableError, match=missing):
        backends.choose("cuda")


def test_a_setting_that_means_nothing(monkeypatch):
    monkeypatch.setenv(available.VARIABLE, "1")
    with pytest.raises(BackendUnavailableError, match="MINIPAGED_CUDA is '1'; it may be 'emulate'"):
        make_engine("tiny-draft", device="cuda")
    monkeypatch.setenv(available.VARIABLE, "emulate")
    monkeypatch.setenv(available.CAPABILITY_VARIABLE, "7.0")
    with pytest.raises(BackendUnavailableError, match="MINIPAGED_CUDA_CAPABILITY is '7.0'"):
        make_engine("tiny-draft", device="cuda")


def test_a_model_that_does_not_fit(emulate, monkeypatch):
    monkeypatch.setattr(emulated, "MEMORY_BYTES", 1 << 20)
    with pytest.raises(OutOfDeviceMemoryError, match="LlamaForCausalLM in float32 takes .* quantization='int8'"):
        cuda_engine("tiny-draft", num_blocks=None)


def test_a_pool_that_does_not_fit(emulate, monkeypatch):
    monkeypatch.setattr(emulated, "MEMORY_BYTES", 32 << 20)
    with pytest.raises(ConfigError, match="num_blocks is 100000: .* bytes of KV cache, but only"):
        cuda_engine("tiny-draft", num_blocks=100000)


def test_the_pool_takes_what_is_left(emulate, monkeypatch):
    monkeypatch.setattr(emulated, "MEMORY_BYTES", 8 << 20)
    engine = cuda_engine("tiny-draft", num_blocks=None, max_num_seqs=64)
    free, total = engine.runner.decoder.device.memory()
    assert 0 < free < total / 5 and total == 8 << 20


def test_a_draft_model_takes_its_share(emulate, monkeypatch):
    monkeypatch.setattr(emulated, "MEMORY_BYTES", 4 << 20)
    cuda_engine("tiny-draft", num_blocks=4).close()
    with pytest.raises(OutOfDeviceMemoryError, match="LlamaForCausalLM .* and LlamaForCausalLM in float32 takes"):
        cuda_engine("tiny-draft", num_blocks=4, speculative_model="tiny-draft")


def test_asking_for_the_device_imports_nothing():
    code = (
        "import sys; from minipaged import backends; backends.examine('cuda');"
        "print([name for name in ('numba', 'cuda_kernels', 'cuda.bindings.driver') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"quantization": "int8", "dtype": "auto"}]
)
def test_golden_tokens_on_the_card(options):
    make_device("card").close()  # skips where there is none
    engine = cuda_engine("tiny", max_num_batched_tokens=1024, **options)
    for case in GOLDEN["prompts"]:
        tokens = generate(engine, case["prompt_ids"], greedy(32)).outputs[0].token_ids
        if not options:
            assert tokens == case["target"]["greedy_ids"]
        assert tokens[0] == case["target"]["greedy_ids"][0]
    engine.close()
