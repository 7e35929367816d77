"""Response lengths of requests as they come: estimated in batches, in a thread of its own, within a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from block.lengths import Reader

log = logging.getLogger(__name__)

BATCH = 64
"""Prompts that are estimated in one call at most: those that came while the call before was under way."""

TIMEOUT, FAILED, NO_TEXT = "timeout", "failed", "no_text"
"""Why a request gets no estimate: too slow, the estimator raised, or the prompt is token ids."""


class Estimator:
    """Asks `reader` for the length of one response after another.

    timeout_s: how long a request waits for its estimate. fell_back: told why a request gets none. took: told the
    seconds that one waited for its own.
    """

    def __init__(
        self, reader: Reader, timeout_s: float, fell_back: Callable[[str], None], took: Callable[[float], None]
    ) -> None:
        self._reader = reader
        self._timeout_s = timeout_s
        self._fell_back = fell_back
        self._took = took
        self._thread = ThreadPoolExecutor(1, "lengths")
        self._waiting: list[tuple[str, asyncio.Future[int]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._complained = False

    async def tokens(self, prompt: str | None) -> int | None:
        """The response tokens to expect of `prompt`; None, and that is counted, if there is no telling in time."""
        if prompt is None:
            self._fell_back(NO_TEXT)
            return None
        began = time.perf_counter()  # the loop's clock may count milliseconds
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(self._timeout_s):
                tokens = await answer
        except TimeoutError:
            self._fell_back(TIMEOUT)
            return None
        except Exception as error:  # whatever an estimator raises costs no request
            self._fell_back(FAILED)
            if not self._complained:
                log.warning("no response lengths are estimated: %s: %s", type(error).__name__, error)
            self._complained = True
            return None
        self._took(time.perf_counter() - began)
        return tokens

    async def _work(self) -> None:
        """Estimate batch after batch of the prompts that wait, until none does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [(prompt, answer) for prompt, answer in self._waiting[:BATCH] if not answer.done()]
            del self._waiting[:BATCH]
            if not batch:
                continue
            try:
                said = await loop.run_in_executor(self._thread, self._reader.predict, [prompt for prompt, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), tokens in zip(batch, said.tokens.tolist(), strict=True):
                if not answer.done():
                    answer.set_result(tokens)

    def close(self) -> None:
        """Estimate nothing more; those that wait get no answer."""
        if self._worker is not None:
            self._worker.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
