"""Options of the engine and of one request: names, defaults, limits.

Both classes refuse what they do not know. Errors name the option, the value seen and the limit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minipaged.checks import check_choice, check_int, check_number, checked_grammar, refuse_unknown, show
from minipaged.errors import ConfigError, InvalidParameterError

DEVICES = ("auto", "reference", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = (None, "int8", "int4")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
EARLY_STOPPING = (True, False, "never")
POLICIES = ("fcfs", "priority", "static")
NGRAM = "ngram"  # a speculative_model that is none: prompt lookup
MAX_BLOCK_SIZE = 256
MAX_SPECULATIVE_TOKENS = 64
MAX_TOKEN_ID = 2**31 - 1
MAX_INT = 2**63 - 1  # no counter needs more than 64 bits


@refuse_unknown(ConfigError)
@dataclass(frozen=True)
class EngineConfig:
    """Everything that is fixed when an engine is made.

    Attributes:
        model: a name from the catalog, a directory in Hugging Face layout, a GGUF file, or a file
            that ``minipaged pack`` made.
        device: ``"reference"`` (NumPy), ``"cpu"``, ``"cuda"`` or ``"auto"`` (the fastest that works).
        dtype: precision of weights and activations; ``"float32"`` without ``quantization`` makes
            everything float32; ``"auto"`` is what loses no visible quality on the device: float32 on
            ``"reference"``, bfloat16 weights on ``"cpu"``, 16-bit floats on ``"cuda"``.
        quantization: ``None``, ``"int8"`` or ``"int4"``: of weights (see ``kv_cache_dtype`` for the KV cache).
        kv_cache_dtype: precision of the KV cache; ``"auto"``: float32 with ``dtype="float32"`` and on
            ``"reference"``; on ``"cpu"`` int8 beside quantised weights if the CPU multiplies bytes (AVX-512
            VNNI), else bfloat16; on ``"cuda"`` as ``dtype``.
        num_blocks: KV blocks in the pool; ``None`` sizes it from ``kv_cache_memory``.
        kv_cache_memory: bytes for the KV pool when ``num_blocks`` is ``None``; ``None`` lets the
            engine choose: room for ``max_num_seqs`` sequences of ``max_model_len`` tokens, at most
            2 GiB and a quarter of the memory that is free.
        block_size: tokens a block, a power of two from 1 to 256.
        max_model_len: prompt plus generated tokens of one request; ``None``: what the model allows.
        max_num_seqs: sequences that run in one step, at most.
        max_num_batched_tokens: tokens computed in one step, at most.
        enable_prefix_caching: find KV of equal prompt prefixes instead of computing it again.
        policy: ``"fcfs"``, ``"priority"`` (lower value first), or ``"static"``: contiguous
            max-length reservation and batches that wait for their slowest member, the baseline
            that paged attention replaced, kept for comparison.
        num_threads: compute threads; ``None``: the physical cores this process may use (on
            ``"reference"``: what BLAS chooses).
        seed: seed of requests that bring none.
        speculative_model: guess several tokens ahead and verify them in one step: a small model of the same
            vocabulary (as ``model``), or ``"ngram"``: what followed the last tokens when they occurred
            before. The output stays the same, token by token.
        num_speculative_tokens: tokens guessed ahead for a sequence, at most.
        adaptive_speculation: guess only as far ahead as was seen to pay; otherwise always
            ``num_speculative_tokens``.
        swap_space: bytes of host memory for the KV of preempted requests, which are swapped where
            that is cheaper than computing it again; 0: always compute again.
        check_integrity: verify the laws of the block pool after every step (slow; for tests).
    """

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    num_threads: int | None = None
    seed: int = 0
    speculative_model: str | None = None
    num_speculative_tokens: int = 5
    adaptive_speculation: bool = True
    swap_space: int = 0
    check_integrity: bool = False

    def __post_init__(self):
        err = ConfigError
        if not isinstance(self.model, str) or not self.model:
            raise err(f"model is {show(self.model)}; it must be a name or a path.")
        check_choice(err, "device", self.device, DEVICES)
        check_choice(err, "dtype", self.dtype, DTYPES)
        check_choice(err, "quantization", self.quantization, QUANTIZATIONS)
        check_choice(err, "kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_choice(err, "policy", self.policy, POLICIES)
        check_int(err, "num_blocks", self.num_blocks, 1, 2**31 - 1, optional=True)
        check_int(err, "kv_cache_memory", self.kv_cache_memory, 1, MAX_INT, optional=True)
        check_int(err, "block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        if self.block_size & (self.block_size - 1):
            raise err(f"block_size is {self.block_size}; it must be a power of two from 1 to {MAX_BLOCK_SIZE}.")
        check_int(err, "max_model_len", self.max_model_len, 1, MAX_INT, optional=True)
        check_int(err, "max_num_seqs", self.max_num_seqs, 1, 65536)
        check_int(err, "max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**24)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise err(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, fewer than max_num_seqs "
                f"({self.max_num_seqs}): some running sequences would get no token in a step. "
                "Raise the first or lower the second."
            )
        for name in ("enable_prefix_caching", "check_integrity", "adaptive_speculation"):
            if not isinstance(getattr(self, name), bool):
                raise err(f"{name} is {show(getattr(self, name))}; it must be True or False.")
        check_int(err, "num_threads", self.num_threads, 1, 1024, optional=True)
        check_int(err, "seed", self.seed, 0, 2**64 - 1)
        self._check_speculation()
        check_int(err, "swap_space", self.swap_space, 0, MAX_INT)
        if self.swap_space and self.policy == "static":
            raise err(
                f"swap_space is {self.swap_space}, but policy 'static' never preempts; "
                "set it to 0, or choose 'fcfs' or 'priority'."
            )

    def _check_speculation(self) -> None:
        name = self.speculative_model
        if name is not None and (not isinstance(name, str) or not name):
            raise ConfigError(f"speculative_model is {show(name)}; it must be a name, a path or {NGRAM!r}.")
        check_int(ConfigError, "num_speculative_tokens", self.num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS)
        for option in ("num_speculative_tokens", "adaptive_speculation"):
            value = getattr(self, option)
            if name is None and value != getattr(type(self), option):
                raise ConfigError(f"{option} is {show(value)}, but speculative_model is None; set that too.")


@refuse_unknown(InvalidParameterError)
@dataclass
class SamplingParams:
    """How one request is continued; the vocabulary is vLLM's.

    Attributes:
        n: continuations returned for the prompt; they share its KV, and each after the first has
            a seed derived from the request's.
        best_of: continuations generated, of which the ``n`` with the highest cumulative
            log-probability are returned; ``None``: ``n``.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.
        min_p: drop tokens less likely than ``min_p`` times the likeliest.
        presence_penalty, frequency_penalty: subtracted once, or once an occurrence, from the logit
            of each token generated so far. From -2 to 2.
        repetition_penalty: logits of tokens in prompt or output are divided by it if positive,
            multiplied if negative. Above 0; 1 does nothing.
        seed: makes the random numbers of this request a function of (seed, position) alone.
        stop: a string or strings that end the text; not part of it.
        stop_token_ids: token ids that end the text.
        include_stop_str_in_output: leave the stop string in the text.
        max_tokens: tokens generated at most; ``None``: up to ``max_model_len``.
        min_tokens: no end-of-sequence or stop token before this many.
        ignore_eos: go on after end-of-sequence.
        logprobs: log-probabilities of this many likeliest tokens at each position (and the chosen).
        prompt_logprobs: the same for the prompt's tokens.
        logit_bias: token id to number (-100 to 100) added to its logit.
        allowed_token_ids: only these tokens may be generated.
        bad_words: strings that must not be generated.
        skip_special_tokens: leave special tokens out of the text.
        use_beam_search: search for likely continuations instead of sampling; temperature, top_k,
            top_p, min_p and seed are then ignored. Needs no seed, gives one output at the end.
        beam_width: continuations kept in each step of beam search; ``None``: ``n``.
        length_penalty: a beam's score is its cumulative log-probability divided by its generated
            length to this power; above 0 favours longer ones.
        early_stopping: when a beam search ends: ``True``, as soon as ``beam_width`` continuations
            are finished; ``False``, when by their present length the others are not expected to get
            better; ``"never"``, only when no other can get better.
        structured_outputs: the text conforms to a grammar: one of ``{"json": schema}``,
            ``{"json_object": True}``, ``{"regex": pattern}``, ``{"choice": [text, ...]}`` or
            ``{"grammar": text}`` (EBNF in the notation of Lark or GGML).
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool = True
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    structured_outputs: dict | None = None

    MAX_LOGPROBS = 1024  # not a field: no annotation
    MAX_SEQUENCES = 1024

    def __post_init__(self):
        err = InvalidParameterError
        check_int(err, "n", self.n, 1, self.MAX_SEQUENCES)
        check_number(err, "temperature", self.temperature, 0, 1000)
        check_int(err, "top_k", self.top_k, -1, MAX_INT)
        check_number(err, "top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise err("top_p is 0; it must be above 0 (1 keeps every token; use temperature=0 for greedy).")
        check_number(err, "min_p", self.min_p, 0, 1)
        check_number(err, "presence_penalty", self.presence_penalty, -2, 2)
        check_number(err, "frequency_penalty", self.frequency_penalty, -2, 2)
        check_number(err, "repetition_penalty", self.repetition_penalty, 0, 1000)
        if self.repetition_penalty == 0:
            raise err("repetition_penalty is 0; it must be above 0 (1 does nothing).")
        check_int(err, "seed", self.seed, 0, 2**64 - 1, optional=True)
        self.stop = self._strings("stop", self.stop, allow_str=True)
        self.bad_words = self._strings("bad_words", self.bad_words)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "use_beam_search"):
            if not isinstance(getattr(self, name), bool):
                raise err(f"{name} is {show(getattr(self, name))}; it must be True or False.")
        check_int(err, "max_tokens", self.max_tokens, 1, MAX_INT, optional=True)
        check_int(err, "min_tokens", self.min_tokens, 0, MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise err(f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens}).")
        check_int(err, "logprobs", self.logprobs, 0, self.MAX_LOGPROBS, optional=True)
        check_int(err, "prompt_logprobs", self.prompt_logprobs, 0, self.MAX_LOGPROBS, optional=True)
        self.stop_token_ids = self._ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = self._ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise err("allowed_token_ids is empty; at least one token must be allowed (None allows all).")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise err(f"logit_bias is {show(self.logit_bias)}; it must map token ids to numbers.")
            for token_id, bias in self.logit_bias.items():
                check_int(err, "a token id in logit_bias", token_id, 0, MAX_TOKEN_ID)
                check_number(err, f"logit_bias[{token_id}]", bias, -100, 100)
        self._check_sequences()
        if self.structured_outputs is not None:
            self.structured_outputs = checked_grammar(self.structured_outputs)
            if self.ignore_eos:
                raise err("ignore_eos is True, but structured_outputs end with end-of-sequence; leave one of them out.")

    def _check_sequences(self) -> None:
        """How many continuations there are, and how they are chosen."""
        err = InvalidParameterError
        check_int(err, "best_of", self.best_of, 1, self.MAX_SEQUENCES, optional=True)
        check_int(err, "beam_width", self.beam_width, 1, self.MAX_SEQUENCES, optional=True)
        check_number(err, "length_penalty", self.length_penalty, -10, 10)
        if not isinstance(self.early_stopping, (bool, str)) or self.early_stopping not in EARLY_STOPPING:
            raise err(f"early_stopping is {show(self.early_stopping)}; it must be True, False or 'never'.")
        if self.best_of is not None and self.best_of < self.n:
            raise err(f"best_of is {self.best_of}, fewer than n ({self.n}); raise it or lower n.")
        if self.use_beam_search:
            if self.best_of is not None:
                raise err(f"best_of is {self.best_of} with use_beam_search; set beam_width instead.")
            if self.beam_width is not None and self.beam_width < self.n:
                raise err(f"beam_width is {self.beam_width}, fewer than n ({self.n}); raise it or lower n.")
            return
        for name, neutral in (("beam_width", None), ("length_penalty", 1), ("early_stopping", False)):
            if getattr(self, name) != neutral:
                raise err(f"{name} is {show(getattr(self, name))}, but use_beam_search is False; set it to True.")
        if self.num_sequences > 1 and self.greedy:
            raise err(
                f"{self.num_sequences} continuations (n or best_of) with temperature 0 would all be the same; "
                "raise the temperature, or set use_beam_search."
            )

    @staticmethod
    def _strings(name, value, allow_str=False) -> list[str]:
        if value is None:
            return []
        if isinstance(value, str) and allow_str:
            value = [value]
        if not isinstance(value, (list, tuple)) or not all(isinstance(s, str) for s in value):
            raise InvalidParameterError(f"{name} is {show(value)}; it must be a list of strings.")
        if any(not s for s in value):
            raise InvalidParameterError(f"{name} holds an empty string, which every text contains; remove it.")
        return list(value)

    @staticmethod
    def _ids(name, value) -> list[int]:
        if value is None:
            return []
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise InvalidParameterError(f"{name} is {show(value)}; it must be a list of token ids.")
        for token_id in value:
            check_int(InvalidParameterError, f"a token id in {name}", token_id, 0, MAX_TOKEN_ID)
        return list(value)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a random draw."""
        return self.temperature == 0 and not self.use_beam_search

    @property
    def num_sequences(self) -> int:
        """Continuations that are generated at once: beams, or ``best_of``, or ``n``."""
        return (self.beam_width if self.use_beam_search else self.best_of) or self.n

    def max_token_id(self) -> int:
        """The largest token id named anywhere in the parameters, or -1; checked at admission."""
        ids = [*self.stop_token_ids, *(self.allowed_token_ids or ()), *(self.logit_bias or ())]
        return max(ids, default=-1)

    def clone(self, **changes) -> SamplingParams:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
