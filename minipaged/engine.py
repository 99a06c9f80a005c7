"""The engine: ``step()`` schedules, executes, samples and updates; everything else is a face of it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

from minipaged import backends, speculation
from minipaged.beam_group import BeamGroup
from minipaged.config import EngineConfig, SamplingParams
from minipaged.core.factory import make_scheduler
from minipaged.core.request import Request
from minipaged.core.scheduler import SchedulerConfig, SchedulerOutput
from minipaged.draws import Draws
from minipaged.errors import (
    InvalidParameterError,
    NumericalError,
    RequestError,
    TraceError,
    UnknownRequestError,
)
from minipaged.live_sequences import LiveSequences
from minipaged.model.loader import LoadedModel, load_model
from minipaged.model.sampling_defaults import default_sampling_params
from minipaged.observed import Observed
from minipaged.output_builder import OutputBuilder
from minipaged.outputs import EngineStats, RequestOutput
from minipaged.prompt import tokenize
from minipaged.runner import Runner
from minipaged.sampling.grammar import Grammar, GrammarCompiler
from minipaged.sampling.sampler import SampledToken
from minipaged.sampling.seeds import derived_seed
from minipaged.sampling.state import SamplingState
from minipaged.sampling.step_logits import PromptOrder, StepLogits
from minipaged.sequence_group import Sequence, SequenceGroup
from minipaged.sizing import resolve_max_model_len, resolve_num_blocks, resolve_num_host_blocks


class Engine(Observed):
    """One model on one device, with its KV blocks and its requests.

    Not thread-safe: one thread calls :meth:`submit`, :meth:`abort` and :meth:`step`
    (:class:`~minipaged.llm.LLM` and :class:`~minipaged.async_llm.AsyncLLM` see to that).
    :meth:`prepare` only reads, and may be called from any thread.
    """

    def __init__(self, config: EngineConfig):
        super().__init__()
        self.config = config
        self.backend = backends.choose(config.device)
        backends.check_options(self.backend, config)
        with backends.importing_ahead(self.backend):
            weight_format = backends.packed_format(self.backend, config)
            self.model: LoadedModel = load_model(config.model, weight_format=weight_format)
        self.max_model_len = resolve_max_model_len(config, self.model.config)
        self.formats = backends.choose_formats(self.backend, config, self.model.packed_as)
        block_bytes = backends.kv_block_bytes(self.formats, self.backend, self.model.config, config.block_size)
        num_host_blocks = resolve_num_host_blocks(config, block_bytes)  # a draft's KV is computed again
        draft = speculation.load_draft_model(config, self.backend, self.model)
        models = [(self.model.config, self.formats)]
        if draft is not None:
            block_bytes += draft.block_bytes
            models.append((draft.model.config, draft.formats))
        device_memory = backends.memory_for_kv_cache(self.backend, models, config, self.max_model_len)
        num_blocks = resolve_num_blocks(config, self.max_model_len, block_bytes, device_memory)
        self._use(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_model_len=self.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                enable_prefix_caching=config.enable_prefix_caching,
                policy=config.policy,
                num_host_blocks=num_host_blocks,
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
            num_host_blocks=num_host_blocks,
        )
        vocab_size, eos_token_ids = self.model.config.vocab_size, self.model.config.eos_token_ids
        self.sampler = self.runner.sampler
        self.speculator = speculation.make_speculator(
            config,
            self.backend,
            draft,
            self.runner,
            num_blocks=num_blocks,
            max_model_len=self.max_model_len,
        )
        self._grammars = GrammarCompiler(self.model.tokenizer, vocab_size, eos_token_ids)
        self._groups: dict[str, SequenceGroup] = {}
        self._numbers = itertools.count()
        self._num_requests_finished = 0
        self._step_seconds = 0.0

    def use_policy(self, policy: str, enable_prefix_caching: bool | None = None) -> None:
        """Give an idle engine, of which no trace is recorded, a fresh scheduler (an empty pool and prefix cache)."""
        if self.observers:
            raise TraceError("a trace is being recorded; call stop_trace() before the scheduler is replaced.")
        # "static" switches prefix caching off in its own copy of the limits, so take that from the options.
        caching = self.config.enable_prefix_caching if enable_prefix_caching is None else enable_prefix_caching
        self._use(dataclasses.replace(self.scheduler.config, policy=policy, enable_prefix_caching=caching))

    def _use(self, limits: SchedulerConfig) -> None:
        self.scheduler = make_scheduler(limits)
        self._live = LiveSequences(self.scheduler)

    # -- requests ---------------------------------------------------------------------------------

    def add_request(self, prompt, params: SamplingParams | None = None, **options) -> str:
        """Check a request, queue it and return its id (options and errors: :meth:`prepare`)."""
        group = self.prepare(prompt, params, **options)
        self.submit(group)
        return group.request_id

    def prepare(
        self,
        prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        stream: bool = False,
        live: bool = False,
    ) -> SequenceGroup:
        """Tokenise and check a request without touching the engine's state.

        Args:
            prompt: text, a list of token ids, or ``{"prompt_token_ids": [...]}`` / ``{"prompt": text}``.
            params: ``None`` takes the model's defaults.
            request_id: chosen by the engine if ``None``.
            priority: lower runs first under ``policy="priority"``.
            cache_salt: requests share cached prefixes only with the same salt.
            stream: :meth:`step` returns an output for each new token, not only the last.
            live: these outputs are read at once and not kept, so their lists need not be copies.

        Raises:
            RequestError: the prompt is empty, has an impossible token id, is too long for the model
                or needs more blocks than the pool has; the text carries the numbers.
            InvalidParameterError: ``params`` (a malformed grammar, say), ``priority`` or ``cache_salt`` is not usable.
        """
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidParameterError(f"sampling_params is {params!r}; it must be a SamplingParams.")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidParameterError(f"priority is {priority!r}; it must be an integer.")
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise InvalidParameterError(f"cache_salt is {cache_salt!r}; it must be a string or None.")
        vocab_size, eos_token_ids = self.model.config.vocab_size, self.model.config.eos_token_ids
        text, token_ids = tokenize(prompt, self.model.tokenizer, vocab_size)
        room = self.max_model_len - len(token_ids)
        max_tokens = max(room, 1) if params.max_tokens is None else params.max_tokens
        params = params.clone(max_tokens=max_tokens)
        self.scheduler.check_admissible(len(token_ids), params)
        number = next(self._numbers)
        request_id = f"request-{number}" if request_id is None else request_id
        make_group = BeamGroup if params.use_beam_search else SequenceGroup
        return make_group(
            Request(request_id, token_ids, params, priority, cache_salt),
            SamplingState(
                params,
                token_ids,
                vocab_size=vocab_size,
                eos_token_ids=eos_token_ids,
                seed=self._seed_of(params, number),
                tokenizer=self.model.tokenizer,
                grammar=self._grammar_of(params),
            ),
            OutputBuilder(params, token_ids, self.model.tokenizer, eos_token_ids),
            prompt=text,
            stream=stream,
            live=live,
        )

    def submit(self, group: SequenceGroup) -> None:
        """Queue a prepared request. Raises :class:`RequestError` if its id is in use."""
        if group.request_id in self._groups:
            raise RequestError(f"request id {group.request_id!r} is in use by an unfinished request; choose another.")
        self._live.add(group.sequences[0])
        self._groups[group.request_id] = group

    def abort(self, request_id: str) -> RequestOutput:
        """End a request now, give its blocks back and return what it had so far.

        Raises :class:`UnknownRequestError` if no unfinished request has this id.
        """
        if request_id not in self._groups:
            raise UnknownRequestError(f"no unfinished request has the id {request_id!r}.")
        group = self._groups.pop(request_id)
        group.abort(self._live)
        output = group.build()
        group.let_go()
        return output

    def abort_if_unfinished(self, request_id: str) -> RequestOutput | None:
        """As :meth:`abort`, but a request that is finished already is left alone."""
        return self.abort(request_id) if request_id in self._groups else None

    def has_unfinished(self) -> bool:
        """Whether :meth:`step` has work to do."""
        return bool(self._groups)

    # -- the step ---------------------------------------------------------------------------------

    def step(self, deliver: Callable[[RequestOutput], None] | None = None) -> list[RequestOutput]:
        """One iteration: plan, compute, sample, update. Returns what is new for the callers.

        ``deliver``, if given, takes each output as soon as it is made, before those of other requests,
        and the returned list is empty. It must not raise.
        """
        outputs: list[RequestOutput] = []
        self._step(deliver or outputs.append)
        return outputs

    def _step(self, deliver: Callable[[RequestOutput], None]) -> None:
        started = time.monotonic()
        drafts = self.speculator.guess(self.scheduler.running, self._sampling_of) if self.speculator else {}
        guessed = time.monotonic()
        plan = self.scheduler.schedule(drafts)
        for observer in self.observers:
            observer.scheduled(plan, started)
        self._swap(plan)
        if not plan.scheduled:
            return
        began = time.monotonic()
        sequences = self._live.of(plan.scheduled)
        draws = Draws(plan, sequences)
        logits = self.runner.execute(plan, self._prompt_orders(sequences), draws.orders)
        computed = time.monotonic()
        if self.scheduler.swap.num_blocks:
            self.scheduler.swap.note_computed(plan.num_tokens, computed - began)
        failed = self._take_prompt_logprobs(logits) if logits.prompt_rows else {}
        drawn = draws.take(logits)
        sampled = time.monotonic()
        failed |= {sequence_id: tokens[0].error for sequence_id, tokens in drawn.items() if tokens[0].error}
        for sequence_id in failed:
            self.scheduler.abort(sequence_id)  # before the update, which would publish its KV for others
        num_accepted = self.speculator.verify(plan, logits, drawn) if drafts else {}
        self.scheduler.update(plan, num_accepted=num_accepted)
        self._process(plan, sequences, drawn, failed, started, sampled, deliver)
        if self.config.check_integrity:
            self.scheduler.check()
        ended = time.monotonic()
        if self.speculator:
            self.speculator.observe(plan, ended - guessed)
        self._step_seconds += ended - started
        for observer in self.observers:
            observer.updated(began, computed, ended)

    def _sampling_of(self, request: Request) -> SamplingState | None:
        """How a sequence goes on, if that depends on nothing but itself: it is no beam, and forked already."""
        if request.params.use_beam_search or request.num_tokens == request.num_prompt_tokens:
            return None
        return self._live[request.request_id].sampling

    def _swap(self, plan: SchedulerOutput) -> None:
        num_blocks = len(plan.swap_out) + len(plan.swap_in)
        if num_blocks:
            began = time.monotonic()
            self.runner.swap(plan)
            self.scheduler.swap.note_copies(num_blocks, time.monotonic() - began)

    def _process(
        self,
        plan: SchedulerOutput,
        sequences: list[Sequence],
        drawn: dict[str, list[SampledToken]],
        failed: dict[str, str],
        started: float,
        sampled: float,
        deliver: Callable[[RequestOutput], None],
    ) -> None:
        """Hand tokens to their groups, and to the callers what they should see of each group.

        Groups are told one after the other as they are complete, not when the last one's text is made.
        """
        last = {sequence.group: index for index, sequence in enumerate(sequences)}
        touched: set[SequenceGroup] = set()
        for index, (scheduled, sequence) in enumerate(zip(plan.scheduled, sequences, strict=True)):
            group = sequence.group
            if group.metrics.first_scheduled_time is None:
                group.note_scheduled(started)
            tokens = drawn.get(scheduled.request_id)
            if scheduled.request_id in failed:
                group.fail(sequence, failed[scheduled.request_id], self._live)
                touched.add(group)
            elif tokens is not None:
                group.note_sampled(sampled)
                if scheduled.num_lookahead_tokens:
                    self._take_verified(sequence, tokens)
                else:
                    group.take(sequence, tokens, self._live)
                touched.add(group)
            # else a chunk of its prompt was computed; there is nothing to tell yet
            if last[group] == index and group in touched:
                self._tell(group, deliver)

    def _tell(self, group: SequenceGroup, deliver: Callable[[RequestOutput], None]) -> None:
        """Let a group's caller know what is new, and forget the group if that was all."""
        if not group.finished:
            if group.stream:
                deliver(group.build())
            return
        del self._groups[group.request_id]
        self._num_requests_finished += group.error is None
        deliver(group.build())
        group.let_go()

    def _take_verified(self, sequence: Sequence, tokens: list[SampledToken]) -> None:
        """Hand a sequence its right guesses and the token behind them, one after another as far as it goes."""
        for token in tokens:
            if not sequence.output.finished:  # what was verified beyond a stop string is not wanted
                sequence.group.take(sequence, [token], self._live)

    @staticmethod
    def _prompt_orders(sequences: list[Sequence]) -> dict[str, PromptOrder]:
        groups = {each.request.request_id: each.group for each in sequences if each.group.prompt_logprobs is not None}
        return {sequence_id: group.prompt_order() for sequence_id, group in groups.items()}

    def _take_prompt_logprobs(self, logits: StepLogits) -> dict[str, str]:
        """Keep this step's; returns by sequence id what went wrong."""
        failed = {}
        for sequence_id, (first, rows) in logits.prompt_rows.items():
            try:
                self._live[sequence_id].group.take_prompt_logprobs(logits, first, rows, self.model.tokenizer)
            except NumericalError as error:
                failed[sequence_id] = str(error)
        return failed

    def close(self) -> None:
        """End the backend's threads; no step can follow. Closing twice is harmless."""
        self.runner.close()
        if self.speculator:
            self.speculator.close()

    # -- facts ------------------------------------------------------------------------------------

    def default_sampling_params(self) -> SamplingParams:
        """What the model's ``generation_config.json`` recommends; greedy if it does not sample."""
        return default_sampling_params(self.model)

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment (a copy)."""
        num_running = len({self._live[request.request_id].group for request in self.scheduler.running})
        requests = {  # not sequences, which the scheduler counts
            "num_requests_waiting": len(self._groups) - num_running,
            "num_requests_running": num_running,
            "num_requests_finished": self._num_requests_finished,
        }
        return EngineStats(
            device=self.backend.name,
            kv_cache_bytes=self.runner.kv_cache.nbytes,
            weight_bytes=self.runner.weight_bytes,
            step_seconds=self._step_seconds,
            num_logits_rows_on_host=self.runner.num_logits_rows_on_host,
            **(self.scheduler.stats() | requests),
            **(self.speculator.stats() if self.speculator else {}),
        )

    # -- helpers ----------------------------------------------------------------------------------

    def _grammar_of(self, params: SamplingParams) -> Grammar | None:
        if params.structured_outputs is None:
            return None
        return self._grammars.compile(params.structured_outputs)

    def _seed_of(self, params: SamplingParams, number: int) -> int:
        """A request without a seed gets one from the engine's seed and its number of arrival."""
        return derived_seed(self.config.seed, number) if params.seed is None else params.seed
