"""What the engine gives back, in the shape that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """Log-probability (natural logarithm) of one token, its rank (1 = most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation; ``index`` numbers those of a request (of beams: best first).

    ``text`` and ``token_ids`` are all that was generated so far; ``delta`` is the text that came
    since the previous output of the same stream. ``finish_reason`` is ``None`` while running, then
    ``"stop"``, ``"length"``, ``"abort"`` or ``"error"``; ``stop_reason`` is the stop string or
    stop token id that ended it (``None`` for end-of-sequence). ``cumulative_logprob`` is the sum of
    the tokens' log-probabilities, known with ``logprobs``, several continuations or beam search;
    ``beam_score`` is what beam search ranks by: the sum of log-probabilities (after penalties and
    masks, if there are any) divided by the generated length to the power of ``length_penalty``.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    delta: str = ""
    beam_score: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Moments of a request's life, in seconds of ``time.monotonic()``; ``None`` if not reached.

    A token's moment is when it was sampled, before its text was made. The metrics of a request go on
    while it runs: an output holds them, not a copy.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step that worked on the request."""
        if self.first_scheduled_time is None:
            return None
        return self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first generated token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """The state, or the result, of one request.

    ``outputs`` has ``n`` continuations: in a stream by ``index``, else the likeliest first.

    ``num_cached_tokens`` counts the prompt tokens whose KV was found in the prefix cache instead
    of being computed. ``prompt_logprobs`` has one entry for each prompt token; the first is
    ``None`` (nothing precedes it). ``error`` holds the reason where ``finish_reason`` is
    ``"error"``.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made, and gauges of this moment (``LLM.stats()``).

    ``num_blocks_shared`` of the ``num_blocks_used`` are held by more than one running sequence;
    ``num_block_references`` is what all of them would use if none were shared.
    ``num_logits_rows_on_host`` counts the rows that a device sent because it does not sample them itself
    (:mod:`minipaged.sampling.device_sampler` says which); 0 where the model runs on the host.
    """

    device: str = ""
    num_requests_waiting: int = 0
    num_requests_running: int = 0
    num_requests_finished: int = 0
    num_steps: int = 0
    num_prompt_tokens_computed: int = 0
    num_prompt_tokens_cached: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_blocks_total: int = 0
    num_blocks_used: int = 0
    num_blocks_shared: int = 0
    num_block_references: int = 0
    num_blocks_cached: int = 0
    num_blocks_evicted: int = 0
    num_blocks_copied: int = 0
    num_host_blocks_total: int = 0
    num_host_blocks_used: int = 0
    num_blocks_swapped_out: int = 0
    num_blocks_swapped_in: int = 0
    block_size: int = 0
    kv_cache_bytes: int = 0
    weight_bytes: int = 0
    step_seconds: float = 0.0
    num_logits_rows_on_host: int = 0
    num_verifications: int = 0
    num_tokens_guessed: int = 0
    num_tokens_accepted: int = 0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share (0 to 1) of prompt tokens that were found in the prefix cache."""
        total = self.num_prompt_tokens_computed + self.num_prompt_tokens_cached
        return self.num_prompt_tokens_cached / total if total else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share (0 to 1) of the tokens guessed by speculation that the model sampled itself."""
        return self.num_tokens_accepted / self.num_tokens_guessed if self.num_tokens_guessed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a sequence gains from a step that gives it any; 1 without speculation."""
        num_steps = self.num_generated_tokens - self.num_tokens_accepted
        return self.num_generated_tokens / num_steps if num_steps > 0 else 1.0
