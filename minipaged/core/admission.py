"""Which requests could never finish, whatever else runs; they are refused with the numbers."""

from __future__ import annotations

from minipaged.config import SamplingParams
from minipaged.core.scheduler_output import SchedulerConfig
from minipaged.errors import InvalidParameterError, PoolTooSmallError, PromptTooLongError, RequestError


def check_admissible(config: SchedulerConfig, num_prompt_tokens: int, params: SamplingParams) -> None:
    """Refuse a request that could never finish. ``params.max_tokens`` is a number.

    Sampled continuations of one prompt may run one after the other if blocks are short. Beams
    advance together, so the pool must hold them all: the full blocks of the prompt once, and the
    rest for each.

    Raises:
        RequestError: there is no prompt token.
        InvalidParameterError: more sequences than ``max_num_seqs``.
        PromptTooLongError: prompt and output exceed ``max_model_len``.
        PoolTooSmallError: their KV exceeds the whole pool.
    """
    if num_prompt_tokens < 1:
        raise RequestError("the prompt has no tokens; at least one is needed to continue from.")
    max_tokens, num_seqs = params.max_tokens, params.num_sequences
    if num_seqs > config.max_num_seqs:
        name = "beam_width" if params.use_beam_search else "n or best_of"
        raise InvalidParameterError(
            f"{name} asks for {num_seqs} sequences at once, more than max_num_seqs ({config.max_num_seqs}). "
            "Lower the first or raise the second."
        )
    total = num_prompt_tokens + max_tokens
    if total > config.max_model_len:
        remedy = " or lower max_tokens" if num_prompt_tokens < config.max_model_len else ""
        raise PromptTooLongError(
            f"prompt ({num_prompt_tokens} tokens) plus max_tokens ({max_tokens}) is {total}, more than "
            f"max_model_len ({config.max_model_len}). Shorten the prompt{remedy}."
        )
    needed = -(-(total - 1) // config.block_size)  # the last token is returned, never fed back
    if needed > config.num_blocks:
        raise PoolTooSmallError(
            f"prompt ({num_prompt_tokens} tokens) plus max_tokens ({max_tokens}) needs {needed} KV blocks of "
            f"{config.block_size} tokens, the pool has {config.num_blocks}. Raise num_blocks, "
            "shorten the prompt or lower max_tokens."
        )
    if params.use_beam_search:
        _check_beams(config, num_prompt_tokens, needed, params)


def _check_beams(config: SchedulerConfig, num_prompt_tokens: int, blocks_each: int, params: SamplingParams) -> None:
    if config.policy == "static":
        raise InvalidParameterError(
            "use_beam_search does not work with policy 'static', under which no request joins a batch that "
            "runs; choose 'fcfs' or 'priority'."
        )
    width = params.num_sequences
    shared = min(num_prompt_tokens // config.block_size, blocks_each)
    needed = shared + width * (blocks_each - shared)
    if needed > config.num_blocks:
        raise PoolTooSmallError(
            f"{width} beams of prompt ({num_prompt_tokens} tokens) plus max_tokens ({params.max_tokens}) may need "
            f"{needed} KV blocks of {config.block_size} tokens: {shared} shared, {blocks_each - shared} for each beam; "
            f"the pool has {config.num_blocks}. Raise num_blocks, or lower beam_width or max_tokens."
        )
