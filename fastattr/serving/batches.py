"""Batches: requests that wait are answered together; what one of them does is its own affair."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import HTTPException
from PIL import Image

from fastattr.attributor.attribution import Attribution
from fastattr.attributor.attributor import FastAttributor
from fastattr.core.errors import InputError, NonFiniteError

logger = logging.getLogger(__name__)


def busy(why: str) -> HTTPException:
    """The answer to those who come when there is no room."""
    return HTTPException(503, f"{why}; try again later", {"Retry-After": "1"})


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request in the queue."""

    query: Image.Image | np.ndarray
    prompt: str
    k: int
    where: dict[str, str | list[str]] | None
    answer: asyncio.Future[Attribution]


class Room:
    """A place for so many decoded pixels at once; who does not find room waits."""

    def __init__(self, pixels: int) -> None:
        self._free, self._changed = pixels, asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self, pixels: int) -> AsyncIterator[None]:
        """Hold room for so many pixels."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            async with self._changed:
                self._free += pixels
                self._changed.notify_all()


class Batcher:
    """Answers requests that wait together, in one thread of their own, one batch after the other."""

    def __init__(self, attributor: FastAttributor, *, max_batch: int, max_waiting: int, timeout: float) -> None:
        self._attributor, self._max_batch, self._timeout = attributor, max_batch, timeout
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue(max_waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attribute")
        self._task: asyncio.Task[None] | None = None
        self.batches = 0

    def start(self) -> None:
        """Begin to answer."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Answer what waits, then end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), self._timeout)
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown()

    async def ask(self, query: Image.Image | np.ndarray, prompt: str, k: int, where: Any = None) -> Attribution:
        """The answer, once its batch is done; 503 if too many wait, or it takes too long; else as `attribute`."""
        waiting = Waiting(query, prompt, k, where, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(waiting)
            return await asyncio.wait_for(waiting.answer, self._timeout)
        except asyncio.QueueFull:
            raise busy("too many requests wait") from None
        except TimeoutError:
            raise busy(f"no answer within {self._timeout:g} s") from None

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            wanted = [each for each in batch if not each.answer.done()]  # not those that gave up
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, answer, self._attributor, wanted)
            for each, found in zip(wanted, answers, strict=True):
                if isinstance(found, Exception) and not each.answer.done():
                    each.answer.set_exception(found)
                elif not isinstance(found, Exception) and not each.answer.done():
                    each.answer.set_result(found)
            self.batches += 1
            for _ in batch:
                self._queue.task_done()


def answer(attributor: FastAttributor, batch: Sequence[Waiting]) -> list[Attribution | Exception]:
    """The answer to each, or the error that it alone gets; queries of one kind go through the network together."""
    answers: dict[Waiting, Attribution | Exception] = {}
    groups: dict[str, list[Waiting]] = {}
    for each in batch:
        groups.setdefault(f"{type(each.query) is np.ndarray} {each.where!r}", []).append(each)
    todo = list(groups.values())
    for group in todo:
        try:
            answers.update(zip(group, _together(attributor, group), strict=True))
        except Exception as error:  # the process must live; the cause goes to who asked, and to the log
            if len(group) > 1:  # it is of one of them: each for itself, then
                todo += [[each] for each in group]
                continue
            answers[group[0]] = error
            if not isinstance(error, InputError | NonFiniteError):
                logger.exception("a request failed")
    return [answers[each] for each in batch]


def _together(attributor: FastAttributor, batch: Sequence[Waiting]) -> list[Attribution]:
    queries: list[Any] = [each.query for each in batch]
    prompts = [each.prompt for each in batch]
    k, where = max(each.k for each in batch), batch[0].where
    found: Any
    if isinstance(queries[0], np.ndarray):
        found = attributor.attribute_features(np.stack(queries), prompts, k, where=where)
    else:
        found = attributor.attribute(queries, prompts, k, where=where)
    return [one.first(each.k) for one, each in zip(found, batch, strict=True)]
