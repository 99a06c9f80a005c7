"""The draft model follows its target: right tokens, right KV, exact block counts, its own limits."""

import numpy as np
import pytest

from minipaged.config import SamplingParams
from minipaged.core.request import Request
from minipaged.sampling.sampler import Sampler
from minipaged.sampling.speculative.draft_model import DraftModelProposer
from minipaged.sampling.speculative.proposer import DraftWish
from minipaged.sampling.state import SamplingState

VOCAB, BLOCK_SIZE = 50, 4


class Toy:
    """A runner whose logits are a function of all tokens before, as it finds them in its blocks."""

    def __init__(self):
        self.slots = {}
        self.passes = []

    def execute(self, plan, prompts, draws):
        rows = []
        self.passes.append(plan.num_tokens)
        for s in plan.scheduled:
            for i, token_id in enumerate(s.token_ids, s.num_computed_tokens):
                self.slots[s.block_ids[i // BLOCK_SIZE], i % BLOCK_SIZE] = token_id
            end = s.num_computed_tokens + len(s.token_ids)
            if s.samples:
                rows.append(logits([self.slots[s.block_ids[i // BLOCK_SIZE], i % BLOCK_SIZE] for i in range(end)]))
        self.logits = np.array(rows, np.float32).reshape(-1, VOCAB)
        return self

    @property
    def sample_rows(self):
        return list(range(len(self.logits)))

    def draw(self, rows, states):
        return Sampler(VOCAB).sample(self.logits[rows], states)

    def close(self):
        self.closed = True


def logits(token_ids):
    return np.random.default_rng(np.array(token_ids)).normal(0, 2, VOCAB).astype(np.float32)


def wish(token_ids, num_tokens, num_prompt_tokens=None, **options):
    """A request with these tokens, the prompt's and those generated."""
    num_prompt_tokens = num_prompt_tokens or len(token_ids)
    params = SamplingParams(max_tokens=100, **options)
    request = Request("r", token_ids[:num_prompt_tokens], params)
    state = SamplingState(params, token_ids[:num_prompt_tokens], vocab_size=VOCAB, seed=3)
    w = DraftWish(request, state, num_tokens)
    extend(w, token_ids[num_prompt_tokens:])
    return w


def extend(w, token_ids):
    w.request.token_ids += token_ids
    for token_id in token_ids:
        w.sampling.append(token_id)


def alone(w, num_tokens):
    """What the toy says when sampled plainly."""
    sampling, text, sampler = w.sampling.fork(w.sampling.seed), list(w.request.token_ids), Sampler(VOCAB)
    for _ in range(num_tokens):
        (token,) = sampler.sample(logits(text)[None], [sampling])
        sampling.append(token.token_id)
        text.append(token.token_id)
    return text[len(w.request.token_ids) :]


def make(num_blocks=64, max_model_len=200, max_num_tokens=64):
    return DraftModelProposer(
        Toy(),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_tokens=max_num_tokens,
    )


OPTIONS = [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.4, "logprobs": 3}]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_samples_as_the_target_would(options):
    proposer, w = make(), wish([1, 2, 3, 4, 5], 6, 3, **options)
    assert proposer.propose([w]) == [alone(w, 6)]
    assert w.sampling.output_token_ids == [4, 5]  # the target's own state is not touched


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_right", range(5))
def test_it_goes_on_from_what_the_target_kept(options, num_right):
    proposer, w = make(), wish(list(range(1, 10)), 4, 5, **options)
    for _ in range(6):
        (draft,) = proposer.propose([w])
        assert draft == alone(w, 4)
        extend(w, [*draft[:num_right], 7])  # the 7 may or may not be what the draft said
        proposer.check()
        assert proposer.backlog(w.request) <= 2 + 4 - num_right
    assert max(proposer.runner.passes[4:]) <= 2  # only the last tokens were computed again


def test_several_at_once_in_as_many_passes_as_the_longest():
    proposer = make()
    wishes = [wish(list(range(i, i + 5)), i, temperature=0) for i in (1, 2, 3)]
    assert proposer.propose(wishes) == [alone(w, w.num_tokens) for w in wishes]
    assert proposer.runner.passes == [15, 2, 1]


def test_a_long_backlog_takes_several_steps():
    proposer, w = make(max_num_tokens=10), wish(list(range(25)), 2, temperature=0)
    assert proposer.backlog(w.request) == 25
    assert [proposer.propose([w]) for _ in range(2)] == [[[]], [[]]]
    assert proposer.backlog(w.request) == 5
    assert proposer.propose([w]) == [alone(w, 2)]
    assert proposer.runner.passes == [10, 10, 5, 1]


def test_a_prefix_is_computed_once():
    proposer = make()
    first, second = wish(list(range(20)) + [30], 2, temperature=0), wish(list(range(20)) + [31, 32], 2, temperature=0)
    proposer.propose([first])
    extend(first, [5])
    proposer.propose([first])  # the guesses before were verified, so its blocks are known
    proposer.runner.passes.clear()
    assert proposer.propose([second]) == [alone(second, 2)]
    assert proposer.runner.passes == [2, 1]
    proposer.check()


def test_without_blocks_there_is_no_draft_and_nothing_leaks():
    proposer = make(num_blocks=3)
    a, b = wish(list(range(8)), 2, temperature=0), wish(list(range(20, 28)), 2, temperature=0)
    assert proposer.propose([a, b]) == [alone(a, 2), []]
    proposer.check()
    proposer.retain({b.request})
    assert proposer.pool.num_free == 3
    assert proposer.propose([b]) == [alone(b, 2)]
    proposer.close()
    assert proposer.pool.num_free == 3 and proposer.runner.closed


def test_no_draft_reaches_beyond_the_draft_models_positions():
    proposer, w = make(max_model_len=10), wish(list(range(8)), 5, temperature=0)
    assert proposer.propose([w]) == [alone(w, 3)]  # positions 8 and 9 are computed, and give the last
    extend(w, [1, 2, 3, 4])
    assert proposer.propose([w]) == [[]]


def test_damaged_logits_give_no_guess(monkeypatch):
    proposer, w = make(), wish([1, 2, 3], 3, temperature=0)
    whole = Toy.execute

    def damaged(self, *order):
        result = whole(self, *order)
        if len(self.passes) == 2:
            result.logits[:] = np.nan
        return result

    monkeypatch.setattr(Toy, "execute", damaged)
    assert proposer.propose([w]) == [alone(w, 1)]
    extend(w, [9])
    assert proposer.propose([w]) == [alone(w, 3)]
