"""What ``speculative_model`` asks for, put together: a proposer, its lengths, and a draft model's own runner."""

from __future__ import annotations

from dataclasses import dataclass

from minipaged import backends
from minipaged.backends import Backend, Formats
from minipaged.config import NGRAM, EngineConfig
from minipaged.errors import ConfigError
from minipaged.model.loader import LoadedModel, load_model
from minipaged.runner import Runner
from minipaged.sampling.speculative.adaptive import LengthController
from minipaged.sampling.speculative.draft_model import DraftModelProposer
from minipaged.sampling.speculative.ngram import NgramProposer
from minipaged.sampling.speculative.proposer import Proposer
from minipaged.sampling.speculative.speculator import Speculator

ONE_THREAD_HIDDEN_SIZE = 256
"""On the cpu backend, a draft model no wider than this gets one thread: its products are too small to share."""


@dataclass
class DraftModel:
    """A draft model that was checked against its target, and how the backend keeps it."""

    model: LoadedModel
    formats: Formats
    block_bytes: int


def load_draft_model(config: EngineConfig, backend: Backend, target: LoadedModel) -> DraftModel | None:
    """The draft model that the options name, if they do.

    Raises :class:`ConfigError` if its vocabulary is not the target's.
    """
    if config.speculative_model in (None, NGRAM):
        return None
    model = load_model(config.speculative_model, weight_format=backends.packed_format(backend, config))
    check_vocabulary(model, target)
    formats = backends.choose_formats(backend, config, model.packed_as)
    return DraftModel(model, formats, backends.kv_block_bytes(formats, backend, model.config, config.block_size))


def check_vocabulary(draft: LoadedModel, target: LoadedModel) -> None:
    """Refuse a draft model whose token ids mean something else to the target, with :class:`ConfigError`."""
    names = f"speculative_model {draft.name!r} and model {target.name!r}"
    remedy = f"Choose a draft model of the same family, or speculative_model={NGRAM!r}, which needs none."
    sizes = draft.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{names} have vocabularies of {sizes[0]} and {sizes[1]} tokens. {remedy}")
    texts = [_tokens(model) for model in (draft, target)]
    different = [token_id for token_id in range(sizes[0]) if texts[0].get(token_id) != texts[1].get(token_id)]
    if different:
        first = different[0]
        raise ConfigError(
            f"{names} have {sizes[0]} tokens each, but {len(different)} of them differ, the first is {first}: "
            f"{texts[0].get(first)!r} and {texts[1].get(first)!r}. {remedy}"
        )


def _tokens(model: LoadedModel) -> dict[int, str]:
    return {token_id: text for text, token_id in model.tokenizer.backend.get_vocab().items()}


def make_speculator(
    config: EngineConfig,
    backend: Backend,
    draft: DraftModel | None,
    target: Runner,
    *,
    num_blocks: int,
    max_model_len: int,
) -> Speculator | None:
    """The speculator that the options ask for, or ``None``. A draft model gets as many blocks as the target."""
    if config.speculative_model is None:
        return None
    proposer: Proposer = NgramProposer()
    if draft is not None:
        limits = {
            "num_blocks": num_blocks,
            "block_size": config.block_size,
            "max_model_len": min(max_model_len, draft.model.config.max_position_embeddings),
        }
        small = backend.name == "cpu" and draft.model.config.hidden_size <= ONE_THREAD_HIDDEN_SIZE
        num_threads = 1 if small else config.num_threads
        max_num_tokens = config.max_num_batched_tokens
        runner = Runner(
            draft.model, backend, draft.formats, max_num_tokens=max_num_tokens, num_threads=num_threads, **limits
        )
        share = runner.weight_bytes / target.weight_bytes
        proposer = DraftModelProposer(runner, max_num_tokens=max_num_tokens, cost_share=share, **limits)
    controller = LengthController(proposer) if config.adaptive_speculation else None
    return Speculator(proposer, config.num_speculative_tokens, controller)
