"""``AsyncLLM``: the engine for asyncio programs."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncIterator

from minipaged import session_cache
from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.engine_thread import EngineThread
from minipaged.outputs import EngineStats, RequestOutput


class AsyncLLM:
    """A model for asyncio programs: requests of any number of tasks are batched together.

    >>> async with AsyncLLM("tiny") as llm:
    ...     async for output in llm.generate("ROMEO:", SamplingParams(temperature=0)):
    ...         print(output.outputs[0].delta, end="")
    """

    def __init__(self, model: str = "smollm2-135m", **options):
        self.config = EngineConfig(model=str(model), **options)
        self._thread = EngineThread(Engine(self.config))
        # Also ends the thread of an AsyncLLM that is dropped without close(), and at exit.
        self._finalizer = weakref.finalize(self, self._thread.close)

    async def generate(
        self,
        prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Continue one prompt, yielding an output for each new token (as :meth:`LLM.stream`), each with
        the state of all ``n`` continuations; beam search yields one, at the end.

        Cancelling the task, or leaving the loop and closing the iterator, aborts the request.
        Raises as :meth:`~minipaged.engine.Engine.prepare`, at the first iteration.
        """
        prepared = self._thread.open_engine().prepare(
            prompt, sampling_params, request_id=request_id, priority=priority, cache_salt=cache_salt, stream=True
        )
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

        def sink(item: RequestOutput | Exception) -> None:
            try:
                loop.call_soon_threadsafe(outputs.put_nowait, item)
            except RuntimeError:  # the loop was closed with the request still running
                pass

        self._thread.submit(prepared, sink)
        finished = False
        try:
            while not finished:
                item = await outputs.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._thread.abort_quietly(prepared.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator yields a last output with ``finish_reason="abort"``."""
        self._thread.abort(request_id)

    async def save_prefix(self, prompt, path, *, cache_salt: str | None = None) -> int:
        """As :meth:`LLM.save_prefix`."""
        engine = self._thread.open_engine()
        session_cache.check_usable(engine)
        params = SamplingParams(temperature=0, max_tokens=1)
        async for output in self.generate(prompt, params, cache_salt=cache_salt):
            token_ids = output.prompt_token_ids
        export = functools.partial(session_cache.export, engine, token_ids, cache_salt)
        prefix = await asyncio.to_thread(self._thread.call, export)
        await asyncio.to_thread(session_cache.write, path, prefix, engine)
        return len(prefix.token_ids)

    async def load_prefix(self, path, *, cache_salt: str | None = None) -> int:
        """As :meth:`LLM.load_prefix`."""
        engine = self._thread.open_engine()
        session_cache.check_usable(engine)
        prefix = await asyncio.to_thread(session_cache.read, path, engine)
        insert = functools.partial(session_cache.insert, engine, prefix, cache_salt)
        await asyncio.to_thread(self._thread.call, insert)
        return len(prefix.token_ids)

    async def stats(self) -> EngineStats:
        """Counters since the engine was made, and gauges of this moment."""
        return await asyncio.to_thread(self._thread.call, self._thread.open_engine().stats)

    async def start_trace(self, max_steps: int | None = None) -> None:
        """As :meth:`LLM.start_trace`."""
        start = functools.partial(self._thread.open_engine().start_trace, max_steps)
        await asyncio.to_thread(self._thread.call, start)

    async def stop_trace(self):
        """As :meth:`LLM.stop_trace`."""
        return await asyncio.to_thread(self._thread.call, self._thread.open_engine().stop_trace)

    async def snapshot(self):
        """As :meth:`LLM.snapshot`."""
        return await asyncio.to_thread(self._thread.call, self._thread.open_engine().snapshot)

    @property
    def tokenizer(self):
        """The model's :class:`~minipaged.model.tokenizer.Tokenizer`."""
        return self._thread.open_engine().model.tokenizer

    def close(self) -> None:
        """Abort what is unfinished and let go of the model's memory. Closing twice is harmless."""
        self._finalizer()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc) -> None:
        await asyncio.to_thread(self.close)
