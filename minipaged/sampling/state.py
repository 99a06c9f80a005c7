"""What the sampler remembers of one request between steps."""

from __future__ import annotations

import copy

from minipaged.config import SamplingParams
from minipaged.errors import InvalidParameterError
from minipaged.sampling.bad_words import tokenize_bad_words
from minipaged.sampling.penalties import Penalties
from minipaged.sampling.processors import AllowedTokens, BadWords, LogitBias, LogitsProcessor, MinTokens


class SamplingState:
    """Parameters, seed, generated tokens and logits processors of one sequence.

    The sampler only reads it; whoever accepts a sampled token calls :meth:`append`.

    Args:
        params: checked sampling parameters.
        prompt_token_ids: token ids from 0 to ``vocab_size - 1``.
        vocab_size: number of logits in a row.
        eos_token_ids: the model's end-of-sequence tokens, masked until ``min_tokens``.
        seed: key of the random numbers, 0 to 2**64 - 1; the caller derives one where
            ``params.seed`` is ``None``.
        tokenizer: has ``encode(text, add_special_tokens=False)``; needed for ``bad_words``.
        grammar: what ``params.structured_outputs`` was compiled to.

    Raises:
        InvalidParameterError: a token id of ``params`` lies outside the vocabulary, or a bad word
            cannot be tokenised.
    """

    __slots__ = (
        "params",
        "seed",
        "vocab_size",
        "num_logprobs",
        "num_prompt_tokens",
        "output_token_ids",
        "processors",
        "_takes_likeliest",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: list[int],
        *,
        vocab_size: int,
        seed: int,
        eos_token_ids=(),
        tokenizer=None,
        grammar: LogitsProcessor | None = None,
    ):
        if params.max_token_id() >= vocab_size:
            raise InvalidParameterError(
                f"the sampling parameters name token id {params.max_token_id()}, "
                f"but the model has ids 0 to {vocab_size - 1}."
            )
        self.seed = seed
        self.vocab_size = vocab_size
        self.num_prompt_tokens = len(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.processors = _processors(params, prompt_token_ids, vocab_size, eos_token_ids, tokenizer)
        if grammar is not None:
            self.processors.append(grammar)
        self._follow(params)

    def _follow(self, params: SamplingParams) -> None:
        self.params = params
        # Several samples are ranked by log-probability, asked for or not (beam search has its own).
        ranked = params.num_sequences > 1 and not params.use_beam_search
        self.num_logprobs = 0 if ranked and params.logprobs is None else params.logprobs
        self._takes_likeliest = self.num_logprobs is None and params.greedy

    @property
    def memoryless(self) -> bool:
        """Whether the next token depends on its logits alone, and is all that is asked for."""
        return self._takes_likeliest and not self.processors

    @property
    def position(self) -> int:
        """Index in the sequence (prompt included) of the token that is sampled next."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def rejects(self) -> bool:
        """Whether tokens are drawn from all, and again if they may not follow (``rejection.py``)."""
        params = self.params
        if params.greedy or not self.processors or params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
            return False
        return all(processor.judges for processor in self.processors)

    def allows(self, token_id: int) -> bool:
        """Whether no processor would mask a token; of a state that rejects."""
        return all([processor.allows(token_id) for processor in self.processors])

    def append(self, token_id: int) -> None:
        """Take one generated token."""
        for processor in self.processors:
            processor.append(token_id)
        self.output_token_ids.append(token_id)

    def truncate(self, num_output_tokens: int) -> None:
        """Keep the first ``num_output_tokens`` generated tokens; take the others back."""
        while len(self.output_token_ids) > num_output_tokens:
            token_id = self.output_token_ids.pop()
            for processor in self.processors:
                processor.undo(token_id)

    def fork(self, seed: int, params: SamplingParams | None = None) -> SamplingState:
        """A copy with the same past, its own future and its own random numbers; ``params`` may ask for other
        log-probabilities."""
        twin = copy.copy(self)
        twin.seed = seed
        if params is not None:
            twin._follow(params)
        twin.output_token_ids = self.output_token_ids.copy()
        twin.processors = [processor.fork() for processor in self.processors]
        return twin


def _processors(params, prompt_token_ids, vocab_size, eos_token_ids, tokenizer) -> list[LogitsProcessor]:
    """The processors that ``params`` ask for, in vLLM's order."""
    processors: list[LogitsProcessor] = []
    if params.allowed_token_ids is not None:
        processors.append(AllowedTokens(params.allowed_token_ids))
    if params.bad_words:
        processors.append(BadWords(tokenize_bad_words(params.bad_words, tokenizer)))
    if params.min_tokens > 0:
        # A model's configuration may name end-of-sequence tokens that its vocabulary lacks.
        eos = [token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size]
        processors.append(MinTokens(params.min_tokens, [*eos, *params.stop_token_ids]))
    if params.logit_bias:
        processors.append(LogitBias(params.logit_bias))
    if Penalties.wanted(params):
        processors.append(Penalties(params, prompt_token_ids))
    return processors
