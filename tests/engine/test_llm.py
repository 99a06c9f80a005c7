"""``LLM``: prompts in every form, order of results, streaming, threads, two engines at once."""

import gc
import threading

import numpy as np
import pytest

from minipaged import LLM, RequestOutput, SamplingParams
from minipaged.errors import InvalidParameterError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny", device="reference", num_blocks=400) as llm:
        yield llm


def test_every_form_of_a_prompt_gives_the_same(llm):
    text = "ROMEO:\nBut soft"
    ids = llm.tokenizer.encode(text)
    forms = [text, ids, {"prompt_token_ids": ids}, {"prompt": text}]
    results = [llm.generate(form, GREEDY)[0] for form in forms]
    assert len({tuple(r.outputs[0].token_ids) for r in results}) == 1
    assert [r.prompt for r in results] == [text, None, None, text]
    assert all(r.prompt_token_ids == ids for r in results)
    together = llm.generate([text, ids, {"prompt_token_ids": ids}], GREEDY)
    assert [t.outputs[0].token_ids for t in together] == [results[0].outputs[0].token_ids] * 3


def test_results_come_in_the_prompts_order_whatever_finishes_first(llm):
    lengths = [9, 1, 5, 3]
    params = [GREEDY.clone(max_tokens=n) for n in lengths]
    results = llm.generate(["KING", "QUEEN", "DUKE", "FOOL"], params)
    assert [len(r.outputs[0].token_ids) for r in results] == lengths
    assert [r.prompt for r in results] == ["KING", "QUEEN", "DUKE", "FOOL"]
    assert all(r.outputs[0].finish_reason == "length" for r in results)


def test_empty_list_of_prompts_gives_an_empty_list(llm):
    assert llm.generate([], GREEDY) == []


def test_counts_that_do_not_match_are_refused(llm):
    with pytest.raises(RequestError, match="2 sampling_params were given for 1"):
        llm.generate("x", [GREEDY, GREEDY])
    with pytest.raises(InvalidParameterError):
        llm.generate("x", {"temperature": 0})


@pytest.mark.parametrize("prompts", [None, 5, 1.5, b"bytes", bytearray(b"x"), np.array(3), [None], [b"x"], ["x", None]])
def test_what_is_no_prompt_is_refused(llm, prompts):
    with pytest.raises(RequestError):
        llm.generate(prompts, GREEDY)


def test_token_ids_may_come_from_numpy(llm):
    rows = np.array([[5, 6], [7, 8]])
    assert [o.prompt_token_ids for o in llm.generate(rows, GREEDY)] == [[5, 6], [7, 8]]
    assert llm.generate(rows[0], GREEDY)[0].prompt_token_ids == [5, 6]


@pytest.mark.parametrize("messages", [None, "hello", {"role": "user", "content": "hello"}, [], [[]], [5], [{}]])
def test_what_is_no_conversation_is_refused(llm, messages):
    with pytest.raises(InvalidParameterError):
        llm.chat(messages, GREEDY)


def test_a_stream_is_the_result_in_pieces(llm):
    whole = llm.generate("JULIET:\n", GREEDY)[0].outputs[0]
    pieces = list(llm.stream("JULIET:\n", GREEDY))
    assert all(isinstance(p, RequestOutput) for p in pieces)
    assert "".join(p.outputs[0].delta for p in pieces) == whole.text == pieces[-1].outputs[0].text
    assert [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].outputs[0].token_ids == whole.token_ids


def test_leaving_a_stream_early_gives_its_blocks_back(llm):
    stream = llm.stream("HAMLET:\n", GREEDY.clone(max_tokens=200))
    next(stream)
    assert llm.stats().num_requests_running == 1
    stream.close()
    assert llm.stats().num_requests_running == 0
    assert llm.stats().num_blocks_used == 0


def test_a_stream_refuses_bad_input_at_the_call(llm):
    with pytest.raises(RequestError):
        llm.stream("", GREEDY)


def test_streams_and_batches_share_the_engine(llm):
    """A half-read stream, a batch in the middle of it, then the rest of the stream."""
    alone = llm.generate("OTHELLO:\n", GREEDY)[0].outputs[0].text
    stream = llm.stream("OTHELLO:\n", GREEDY)
    first = next(stream).outputs[0].delta
    batch = llm.generate(["IAGO:\n", "OTHELLO:\n"], GREEDY)
    rest = "".join(p.outputs[0].delta for p in stream)
    assert first + rest == alone == batch[1].outputs[0].text


def test_threads_may_call_at_once(llm):
    prompts = [f"ACT {i}\n" for i in range(6)]
    alone = [llm.generate(p, GREEDY)[0].outputs[0].token_ids for p in prompts]
    results: dict[int, list] = {}

    def call(i):
        results[i] = [llm.generate(prompts[i], GREEDY)[0].outputs[0].token_ids for _ in range(3)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert results == {i: [alone[i]] * 3 for i in range(6)}


def test_two_engines_live_in_one_process(llm):
    with LLM("tiny-draft", device="reference", block_size=4) as other:
        mine = llm.generate("PUCK:\n", GREEDY)[0].outputs[0].token_ids
        others = other.generate("PUCK:\n", GREEDY)[0].outputs[0].token_ids
        assert mine != others
        assert llm.generate("PUCK:\n", GREEDY)[0].outputs[0].token_ids == mine


def test_a_dropped_llm_ends_its_thread():
    before = threading.active_count()
    llm = LLM("tiny-draft", device="reference")
    llm.generate("x", GREEDY)
    assert threading.active_count() == before + 1
    del llm
    gc.collect()
    assert threading.active_count() == before


def test_chat_renders_the_models_template(llm):
    messages = [{"role": "user", "content": "Where is the king?"}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40))[0]
    assert output.prompt == "<|im_start|>user\nWhere is the king?<|im_end|>\n<|im_start|>assistant\n"
    assert output.outputs[0].text == "I am a king,\nAnd I will be so, and I will not stay."
    assert output.outputs[0].finish_reason == "stop"
    both = llm.chat([messages, messages], SamplingParams(temperature=0, max_tokens=40))
    assert [b.outputs[0].text for b in both] == [output.outputs[0].text] * 2


def test_a_conversation_finds_its_history_in_the_prefix_cache(llm):
    messages = [{"role": "user", "content": "Where is the king? " * 4}]
    first = llm.chat(messages, GREEDY)[0]
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "And the queen?"},
    ]
    second = llm.chat(messages, GREEDY)[0]
    assert second.num_cached_tokens >= len(first.prompt_token_ids) // 16 * 16 - 16
    assert 0 < second.num_cached_tokens < len(second.prompt_token_ids)
    assert llm.stats().prefix_cache_hit_rate > 0


def test_defaults_come_from_generation_config(llm):
    assert llm.default_sampling_params().greedy  # do_sample is false in tiny's file


def test_metrics_and_cumulative_logprob(llm):
    output = llm.generate("LEAR:\n", GREEDY.clone(logprobs=2))[0]
    m = output.metrics
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
    completion = output.outputs[0]
    assert len(completion.logprobs) == len(completion.token_ids) == 12
    chosen = sum(entry[t].logprob for entry, t in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(chosen)
    assert all(entry[t].rank == 1 for entry, t in zip(completion.logprobs, completion.token_ids, strict=True))


def test_num_threads_limits_blas():
    from threadpoolctl import threadpool_info, threadpool_limits

    with threadpool_limits(limits=2, user_api="blas"):
        with LLM("tiny-draft", device="reference", num_threads=1):
            assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
