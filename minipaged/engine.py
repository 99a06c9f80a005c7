"""The engine: ``step()`` schedules, executes, samples and updates; everything else is a face of it."""

from __future__ import annotations

import hashlib
import itertools
import time
from dataclasses import dataclass

import numpy as np

from minipaged import backends
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import SchedulerConfig, SchedulerOutput
from minipaged.errors import (
    InvalidParameterError,
    MinipagedError,
    NumericalError,
    RequestError,
    TokenRangeError,
    UnknownRequestError,
)
from minipaged.model.loader import LoadedModel, load_model
from minipaged.output_builder import OutputBuilder
from minipaged.outputs import EngineStats, RequestOutput
from minipaged.runner import Runner, StepLogits
from minipaged.sampling.logprobs import prompt_logprobs
from minipaged.sampling.sampler import SampledToken, Sampler
from minipaged.sampling.state import SamplingState
from minipaged.sizing import resolve_max_model_len, resolve_num_blocks


@dataclass
class PreparedRequest:
    """A request that was checked and may be submitted; nothing of the engine has changed yet."""

    request: Request
    sampling: SamplingState
    output: OutputBuilder
    stream: bool


class Engine:
    """One model on one device, with its KV blocks and its requests.

    Not thread-safe: one thread calls :meth:`submit`, :meth:`abort` and :meth:`step`
    (:class:`~minipaged.llm.LLM` and :class:`~minipaged.async_llm.AsyncLLM` see to that).
    :meth:`prepare` only reads, and may be called from any thread.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.backend = backends.choose(config.device)
        backends.check_options(self.backend, config)
        self.model: LoadedModel = load_model(config.model, weight_format=backends.packed_format(self.backend, config))
        self.max_model_len = resolve_max_model_len(config, self.model.config)
        self.formats = backends.choose_formats(self.backend, config, self.model.packed_as)
        block_bytes = backends.kv_block_bytes(self.formats, self.backend, self.model.config, config.block_size)
        num_blocks = resolve_num_blocks(config, self.max_model_len, block_bytes)
        self.scheduler = make_scheduler(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_model_len=self.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                enable_prefix_caching=config.enable_prefix_caching,
                policy=config.policy,
            )
        )
        self.runner = Runner(
            self.model,
            self.backend,
            self.formats,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_model_len=self.max_model_len,
            max_num_tokens=config.max_num_batched_tokens,
            num_threads=config.num_threads,
        )
        self.sampler = Sampler(self.model.config.vocab_size)
        self._prepared: dict[str, PreparedRequest] = {}
        self._numbers = itertools.count()
        self._step_seconds = 0.0

    # -- requests ---------------------------------------------------------------------------------

    def add_request(self, prompt, params: SamplingParams | None = None, **options) -> str:
        """Check a request, queue it and return its id (options and errors: :meth:`prepare`)."""
        prepared = self.prepare(prompt, params, **options)
        self.submit(prepared)
        return prepared.request.request_id

    def prepare(
        self,
        prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        stream: bool = False,
    ) -> PreparedRequest:
        """Tokenise and check a request without touching the engine's state.

        Args:
            prompt: text, a list of token ids, or ``{"prompt_token_ids": [...]}`` / ``{"prompt": text}``.
            params: ``None`` takes the model's defaults.
            request_id: chosen by the engine if ``None``.
            priority: lower runs first under ``policy="priority"``.
            cache_salt: requests share cached prefixes only with the same salt.
            stream: :meth:`step` returns an output for each new token, not only the last.

        Raises:
            RequestError: the prompt is empty, has an impossible token id, is too long for the model
                or needs more blocks than the pool has; the text carries the numbers.
            InvalidParameterError: ``params``, ``priority`` or ``cache_salt`` is not usable.
        """
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidParameterError(f"sampling_params is {params!r}; it must be a SamplingParams.")
        if params.n != 1:
            raise InvalidParameterError(f"n is {params.n}; this version returns one continuation a request (n=1).")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidParameterError(f"priority is {priority!r}; it must be an integer.")
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise InvalidParameterError(f"cache_salt is {cache_salt!r}; it must be a string or None.")
        text, token_ids = self._tokenize(prompt)
        self._check_token_ids(token_ids)
        room = self.max_model_len - len(token_ids)
        max_tokens = max(room, 1) if params.max_tokens is None else params.max_tokens
        self.scheduler.check_admissible(len(token_ids), max_tokens)
        params = params.clone(max_tokens=max_tokens)
        number = next(self._numbers)
        request_id = f"request-{number}" if request_id is None else request_id
        eos_token_ids = self.model.config.eos_token_ids
        return PreparedRequest(
            request=Request(request_id, token_ids, params, priority, cache_salt),
            sampling=SamplingState(
                params,
                token_ids,
                vocab_size=self.model.config.vocab_size,
                eos_token_ids=eos_token_ids,
                seed=self._seed_of(params, number),
                tokenizer=self.model.tokenizer,
            ),
            output=OutputBuilder(request_id, text, token_ids, params, self.model.tokenizer, eos_token_ids),
            stream=stream,
        )

    def submit(self, prepared: PreparedRequest) -> None:
        """Queue a prepared request. Raises :class:`RequestError` if its id is in use."""
        request_id = prepared.request.request_id
        if request_id in self._prepared:
            raise RequestError(f"request id {request_id!r} is in use by an unfinished request; choose another.")
        self.scheduler.add(prepared.request)
        self._prepared[request_id] = prepared

    def abort(self, request_id: str) -> RequestOutput:
        """End a request now, give its blocks back and return what it had so far.

        Raises :class:`UnknownRequestError` if no unfinished request has this id.
        """
        prepared = self._prepared.pop(request_id, None)
        if prepared is None:
            raise UnknownRequestError(f"no unfinished request has the id {request_id!r}.")
        self.scheduler.abort(request_id)
        prepared.output.metrics.num_preemptions = prepared.request.num_preemptions
        prepared.output.end("abort")
        return prepared.output.build()

    def abort_if_unfinished(self, request_id: str) -> RequestOutput | None:
        """As :meth:`abort`, but a request that is finished already is left alone."""
        return self.abort(request_id) if request_id in self._prepared else None

    def has_unfinished(self) -> bool:
        """Whether :meth:`step` has work to do."""
        return bool(self._prepared)

    # -- the step ---------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """One iteration: plan, compute, sample, update. Returns what is new for the callers."""
        started = time.monotonic()
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return []
        logits = self.runner.execute(plan, self._prompt_wanted(plan))
        sampled, failed = self._read(plan, logits)
        for request_id in failed:
            self.scheduler.abort(request_id)  # before the update, which would publish its KV for others
        self.scheduler.update(plan, {request_id: [token.token_id] for request_id, token in sampled.items()})
        outputs = self._process(plan, sampled, failed, started)
        if self.config.check_integrity:
            self.scheduler.check()
        self._step_seconds += time.monotonic() - started
        return outputs

    def _read(self, plan: SchedulerOutput, logits: StepLogits) -> tuple[dict[str, SampledToken], dict[str, str]]:
        """Sampled tokens, and what went wrong, both by request id; keeps prompt log-probabilities."""
        failed: dict[str, str] = {}
        for request_id in logits.prompt_rows:
            try:
                self._add_prompt_logprobs(self._prepared[request_id], logits)
            except NumericalError as error:
                failed[request_id] = str(error)
        sampling = [s.request_id for s in plan.scheduled if s.samples]
        states = [self._prepared[request_id].sampling for request_id in sampling]
        sampled = dict(zip(sampling, self.sampler.sample(logits.to_sample(), states), strict=True))
        failed |= {request_id: token.error for request_id, token in sampled.items() if token.error}
        return {request_id: token for request_id, token in sampled.items() if request_id not in failed}, failed

    def _process(
        self, plan: SchedulerOutput, sampled: dict[str, SampledToken], failed: dict[str, str], started: float
    ) -> list[RequestOutput]:
        """Hand tokens to their requests, finish those that end, collect what callers should see."""
        outputs = []
        for sequence in plan.scheduled:
            request_id = sequence.request_id
            prepared = self._prepared[request_id]
            output = prepared.output
            if output.metrics.first_scheduled_time is None:
                output.metrics.first_scheduled_time = started
                output.num_cached_tokens = prepared.request.num_cached_tokens
            if request_id in failed:
                output.end("error", failed[request_id])
            elif request_id in sampled:
                prepared.sampling.append(sampled[request_id].token_id)
                output.append(sampled[request_id])
                if output.finished:
                    self.scheduler.finish(request_id)
            else:
                continue  # a chunk of its prompt was computed; there is nothing to tell yet
            if output.finished:
                output.metrics.num_preemptions = prepared.request.num_preemptions
                del self._prepared[request_id]
            if output.finished or prepared.stream:
                outputs.append(output.build())
        return outputs

    def _prompt_wanted(self, plan: SchedulerOutput) -> dict[str, int]:
        wanted = {}
        for sequence in plan.scheduled:
            prepared = self._prepared[sequence.request_id]
            if prepared.output.prompt_logprobs is not None:
                wanted[sequence.request_id] = prepared.request.num_prompt_tokens
        return wanted

    def _add_prompt_logprobs(self, prepared: PreparedRequest, logits: StepLogits) -> None:
        """Entries for the prompt positions of this step that are not known yet (a preempted request
        computes its prompt again, and must not report it twice)."""
        first, rows = logits.prompt_rows[prepared.request.request_id]
        output = prepared.output
        known = len(output.prompt_logprobs) - 1
        rows = range(rows.start, rows.stop)[max(known - first, 0) :]
        if rows:
            targets = prepared.request.token_ids[known + 1 : known + 1 + len(rows)]
            tokens = prompt_logprobs(logits.logits[rows.start : rows.stop], targets, output.params.prompt_logprobs)
            output.add_prompt_logprobs([output.logprob_entry(token) for token in tokens])

    def close(self) -> None:
        """End the backend's threads; no step can follow. Closing twice is harmless."""
        self.runner.close()

    # -- facts ------------------------------------------------------------------------------------

    def default_sampling_params(self) -> SamplingParams:
        """What the model's ``generation_config.json`` recommends; greedy if it does not sample."""
        given = self.model.generation_config
        options = {
            name: given[name]
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if given.get(name) is not None
        }
        if given and not given.get("do_sample", False):
            options = {k: v for k, v in options.items() if k == "repetition_penalty"} | {"temperature": 0}
        try:
            return SamplingParams(**options)
        except MinipagedError as error:
            raise InvalidParameterError(f"generation_config.json of {self.model.path}: {error}") from None

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment (a copy)."""
        return EngineStats(
            device=self.backend.name,
            kv_cache_bytes=self.runner.kv_cache.nbytes,
            weight_bytes=self.runner.weight_bytes,
            step_seconds=self._step_seconds,
            **self.scheduler.stats(),
        )

    # -- helpers ----------------------------------------------------------------------------------

    def _tokenize(self, prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, if it is known, and its token ids (not checked yet)."""
        text, token_ids = prompt, None
        if isinstance(prompt, dict):
            if not prompt or set(prompt) - {"prompt", "prompt_token_ids"}:
                raise RequestError(
                    f"a prompt given as a dict has 'prompt_token_ids' or 'prompt', not {sorted(map(str, prompt))}."
                )
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif not isinstance(prompt, str):
            text, token_ids = None, prompt
        if token_ids is None and isinstance(text, str):
            return text, self.model.tokenizer.encode(text)
        is_list = isinstance(token_ids, (list, tuple)) or (isinstance(token_ids, np.ndarray) and token_ids.ndim == 1)
        if is_list and (text is None or isinstance(text, str)):
            return text, list(token_ids)
        wrong = text if token_ids is None or is_list else token_ids
        raise RequestError(
            f"a prompt is text, a list of token ids, or {{'prompt_token_ids': [...]}}; got {type(wrong).__name__}."
        )

    def _check_token_ids(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token.")
        vocab_size = self.model.config.vocab_size
        for index, token_id in enumerate(token_ids):
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                raise TokenRangeError(f"prompt token {index} is {token_id!r}; token ids are integers.")
            if not 0 <= token_id < vocab_size:
                raise TokenRangeError(
                    f"prompt token {index} is {token_id}, but the model has ids 0 to {vocab_size - 1}."
                )
        token_ids[:] = map(int, token_ids)

    def _seed_of(self, params: SamplingParams, number: int) -> int:
        """A request without a seed gets one from the engine's seed and its number of arrival."""
        if params.seed is not None:
            return params.seed
        digest = hashlib.sha256(f"{self.config.seed}/{number}".encode()).digest()
        return int.from_bytes(digest[:8], "little")
