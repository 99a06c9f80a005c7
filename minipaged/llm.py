"""``LLM``: the engine for ordinary, blocking programs."""

from __future__ import annotations

import contextlib
import numbers
import queue
import sys
import weakref
from collections.abc import Iterator

from minipaged import session_cache
from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.engine_thread import EngineThread
from minipaged.errors import EngineClosedError, InvalidParameterError, RequestError, TokenizerError
from minipaged.outputs import EngineStats, RequestOutput
from minipaged.sequence_group import SequenceGroup


class LLM:
    """A model that generates text.

    >>> with LLM("tiny") as llm:
    ...     print(llm.generate("ROMEO:", SamplingParams(temperature=0))[0].outputs[0].text)

    ``options`` are the fields of :class:`~minipaged.config.EngineConfig`. Several threads may call
    at once: their requests are batched together on the engine's own thread.
    """

    def __init__(self, model: str = "smollm2-135m", **options):
        self.config = EngineConfig(model=str(model), **options)
        self._engine: Engine | None = Engine(self.config)
        self._thread = EngineThread(self._engine)
        # Also ends the thread of an LLM that is dropped without close(), and at exit.
        self._finalizer = weakref.finalize(self, self._thread.close)

    # -- generating -------------------------------------------------------------------------------

    def generate(
        self,
        prompts,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | list[int] = 0,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many; results come in the prompts' order, each with the ``n``
        continuations asked for, the likeliest first.

        Args:
            prompts: text, token ids, ``{"prompt_token_ids": [...]}``, or a list of these.
            sampling_params: one for all, one each, or ``None`` for the model's defaults.
            use_tqdm: show a progress bar; ``None``: for several prompts on a terminal.
            priority: one for all or one each; lower runs first under ``policy="priority"``.
            cache_salt: prefixes are shared only between requests with the same salt.

        Raises:
            RequestError, InvalidParameterError: a request can never run. All are checked before
                any is queued: if one is refused, none runs.
        """
        engine = self._open()
        prompts = _as_list(prompts)
        params = _one_each(sampling_params, len(prompts), "sampling_params", SamplingParams)
        priorities = _one_each(priority, len(prompts), "priority", int)
        prepared = [
            engine.prepare(prompt, p, priority=rank, cache_salt=cache_salt)
            for prompt, p, rank in zip(prompts, params, priorities, strict=True)
        ]
        results: dict[str, RequestOutput] = {}
        with _progress_bar(len(prepared), use_tqdm) as bar:
            for output in self._run(prepared):
                results[output.request_id] = output
                bar.update()
        return [results[p.request_id] for p in prepared]

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: list[dict] | None = None,
        **options,
    ) -> list[RequestOutput]:
        """As :meth:`generate`, for one conversation or a list of conversations.

        ``messages`` is a list of ``{"role": ..., "content": ...}``; the model's own chat template
        renders it. Raises :class:`~minipaged.errors.TokenizerError` if the model has none.
        """
        many = isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], (list, tuple))
        conversations = messages if many else [messages]
        prompts = [self.chat_prompt(c, add_generation_prompt=add_generation_prompt, tools=tools) for c in conversations]
        return self.generate(prompts, sampling_params, **options)

    def stream(
        self,
        prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Continue one prompt, yielding an output for each new token.

        ``outputs[i].text`` is the text so far and ``outputs[i].delta`` what is new in it. Beam search,
        and ``best_of`` above ``n``, have something to say only at the end: one output. Leaving
        the loop early aborts the request. The request is checked, and refused, by the call itself,
        before the first ``next``.
        """
        prepared = self._open().prepare(
            prompt, sampling_params, priority=priority, cache_salt=cache_salt, stream=True
        )
        return self._run([prepared])

    def beam_search(
        self,
        prompts,
        *,
        beam_width: int = 4,
        n: int | None = None,
        max_tokens: int | None = 16,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        **options,
    ) -> list[RequestOutput]:
        """The likeliest continuations of one prompt or many, found with ``beam_width`` beams.

        Each result has ``n`` outputs (default: ``beam_width``), best ``beam_score`` first. ``options``
        are further fields of :class:`~minipaged.config.SamplingParams`, such as ``stop``. The same as
        :meth:`generate` with ``SamplingParams(use_beam_search=True, ...)``; raises as it does.
        """
        params = SamplingParams(
            n=beam_width if n is None else n,
            use_beam_search=True,
            beam_width=beam_width,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            **options,
        )
        return self.generate(prompts, params)

    def chat_prompt(
        self, messages: list[dict], *, add_generation_prompt: bool = True, tools: list[dict] | None = None
    ) -> dict:
        """The prompt (text and token ids) that the model's chat template makes of a conversation."""
        model = self._open().model
        if model.chat_template is None:
            raise TokenizerError(f"{model.name} has no chat template; use generate() with plain text.")
        text = model.chat_template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        # The template writes the special tokens itself.
        return {"prompt": text, "prompt_token_ids": model.tokenizer.encode(text, add_special_tokens=False)}

    # -- prefixes on disk -------------------------------------------------------------------------

    def save_prefix(self, prompt, path, *, cache_salt: str | None = None) -> int:
        """Compute a prompt's KV, unless it is cached, and save its full blocks; returns how many tokens they hold.

        :meth:`load_prefix` of another process, with the same model and settings, then need not compute
        them. ``cache_salt`` is not saved.

        Raises:
            RequestError: the prompt cannot run, or does not fill a block.
            SavedPrefixError: other requests took the place of its blocks meanwhile.
            ConfigError: there is no prefix cache, or the file cannot be written.
        """
        engine = self._open()
        session_cache.check_usable(engine)
        prepared = engine.prepare(prompt, SamplingParams(temperature=0, max_tokens=1), cache_salt=cache_salt)
        token_ids = prepared.prompt_token_ids
        for _ in self._run([prepared]):
            pass
        prefix = self._thread.call(lambda: session_cache.export(engine, token_ids, cache_salt))
        session_cache.write(path, prefix, engine)
        return len(prefix.token_ids)

    def load_prefix(self, path, *, cache_salt: str | None = None) -> int:
        """Put a saved prefix into the prefix cache; returns how many tokens it holds.

        Requests with the same ``cache_salt`` whose prompts begin with it find it, until other requests need
        its blocks.

        Raises:
            SavedPrefixError: there is no such file, it is damaged, or it was made by another model or with
                other settings.
            PoolTooSmallError: it does not fit into the free blocks.
        """
        engine = self._open()
        session_cache.check_usable(engine)
        prefix = session_cache.read(path, engine)
        self._thread.call(lambda: session_cache.insert(engine, prefix, cache_salt))
        return len(prefix.token_ids)

    # -- facts ------------------------------------------------------------------------------------

    @property
    def tokenizer(self):
        """The model's :class:`~minipaged.model.tokenizer.Tokenizer`."""
        return self._open().model.tokenizer

    @property
    def model_config(self):
        """The model's :class:`~minipaged.model.config.ModelConfig`."""
        return self._open().model.config

    @property
    def chat_template(self):
        """The model's :class:`~minipaged.model.chat.ChatTemplate`, or ``None`` if it has none."""
        return self._open().model.chat_template

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output of a request may have together."""
        return self._open().max_model_len

    def default_sampling_params(self) -> SamplingParams:
        """The sampling parameters that the model recommends."""
        return self._open().default_sampling_params()

    def stats(self) -> EngineStats:
        """Counters since the engine was made, and gauges of this moment."""
        return self._thread.call(self._open().stats)

    # -- pictures: minipaged.view ---------------------------------------------------------------------

    def start_trace(self, max_steps: int | None = None) -> None:
        """Record what the engine does in every step from now on, or in the next ``max_steps``.

        Raises :class:`~minipaged.errors.TraceError` if that goes on already.
        """
        engine = self._open()
        self._thread.call(lambda: engine.start_trace(max_steps))

    def stop_trace(self):
        """The :class:`~minipaged.view.Trace` of the steps since :meth:`start_trace`.

        Raises :class:`~minipaged.errors.TraceError` if none was started.
        """
        return self._thread.call(self._open().stop_trace)

    def snapshot(self):
        """Block tables and pool at this moment: a :class:`~minipaged.view.Snapshot`, which ``draw_blocks`` draws."""
        return self._thread.call(self._open().snapshot)

    def add_observer(self, make):
        """Tell the observer ``make(engine)`` of each step from now on, and return it.

        What an observer is: see :mod:`minipaged.view.recording`.
        """
        engine = self._open()

        def add():
            observer = make(engine)
            engine.observers.append(observer)
            return observer

        return self._thread.call(add)

    def remove_observer(self, observer) -> None:
        """Undo :meth:`add_observer`."""
        engine = self._open()
        self._thread.call(lambda: engine.observers.remove(observer))

    # -- life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Abort what is unfinished and let go of the model's memory. Closing twice is harmless."""
        self._finalizer()
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # -- helpers ----------------------------------------------------------------------------------

    def _open(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise EngineClosedError("this LLM was closed; make a new one.")
        return engine

    def _run(self, prepared: list[SequenceGroup]) -> Iterator[RequestOutput]:
        """Submit requests and yield their outputs until all are finished; abort the rest if the
        caller leaves early (an error, Ctrl-C, a loop that breaks)."""
        inbox: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        pending = {p.request_id for p in prepared}
        try:
            for p in prepared:
                self._thread.submit(p, inbox.put)
            while pending:
                item = inbox.get()
                if isinstance(item, Exception):
                    raise item
                if item.finished:
                    pending.discard(item.request_id)
                yield item
        finally:
            for request_id in pending:
                self._thread.abort_quietly(request_id)


def _as_list(prompts) -> list:
    """One prompt or many, as a list of prompts."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    try:
        if isinstance(prompts, (bytes, bytearray)):  # iterable, but not as token ids
            raise TypeError
        prompts = list(prompts)
    except TypeError:
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; it must be text, a list of token ids, "
            "{'prompt_token_ids': [...]}, or a list of these."
        ) from None
    if prompts and isinstance(prompts[0], numbers.Number):
        return [prompts]  # token ids of one prompt
    return prompts


def _one_each(value, count: int, name: str, kind: type) -> list:
    if value is None or isinstance(value, kind):
        return [value] * count
    if not isinstance(value, (list, tuple)):
        raise InvalidParameterError(f"{name} is {value!r}; it must be of type {kind.__name__}, or a list of these.")
    if len(value) != count:
        raise RequestError(f"{len(value)} {name} were given for {count} prompts; give one, or one each.")
    return list(value)


def _progress_bar(total: int, use_tqdm: bool | None):
    """A bar on standard error, or something that takes updates and shows nothing."""
    show = total > 1 and sys.stderr.isatty() if use_tqdm is None else use_tqdm
    if not show:
        return contextlib.nullcontext(_NoBar())
    from tqdm import tqdm

    return tqdm(total=total, desc="Prompts", unit="prompt", dynamic_ncols=True)


class _NoBar:
    def update(self) -> None:
        pass
