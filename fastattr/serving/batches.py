"""Batches: what a client may send, counted while it arrives; requests that wait are then answered together."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastattr.attributor.attribution import Attribution
from fastattr.attributor.attributor import FastAttributor
from fastattr.core.errors import InputError, NonFiniteError
from fastattr.corpus.images import to_rgb

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


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
HEADER_SECONDS = 10.0  # a request's headers have to arrive within so many seconds of its first byte, or of the connection


Refuse = Callable[[Request], Awaitable[JSONResponse | None]]  # gives a response to what is refused by its headers alone


class PatientProtocol(H11Protocol):
    """Uvicorn's HTTP, which alone would wait for the end of half-sent headers for ever."""

    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and note whether they end a request's headers."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


class Guard:
    """ASGI middleware: refuses requests that are too long, take too long or come without the token, and reports all."""

    def __init__(self, app: Any, *, max_bytes: int, seconds: float, refuse: Refuse, report: Callable[[str, int], None]) -> None:
        """Guard an application: bytes of a body, seconds for a whole request; `report` is told path and status of each."""
        self._app, self._max_bytes, self._seconds, self._refuse, self._report = app, max_bytes, seconds, refuse, report

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, size = 0, 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise HTTPException(413, f"a request may have {self._max_bytes:,} bytes")
            return message

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            async with asyncio.timeout(self._seconds):  # also for those who send a byte now and then
                refused = self._too_long(scope) or await self._refuse(Request(scope))
                await (refused or self._app)(scope, counted, noted)
        except TimeoutError:
            if not status:
                await JSONResponse({"detail": "the request did not arrive in time"}, 408)(scope, receive, noted)
        finally:
            self._report(scope["path"], status or 500)

    def _too_long(self, scope: Any) -> JSONResponse | None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or (b"transfer-encoding" in headers and b"content-length" in headers):
            return JSONResponse({"detail": "the request says its length in two ways, or not as a number"}, 400)
        if int(length) > self._max_bytes:
            return JSONResponse({"detail": f"a request may have {self._max_bytes:,} bytes"}, 413)
        return None


def pixels_of(data: bytes, max_pixels: int) -> int:
    """How many pixels an upload says it has; nothing is decoded; errors as `read_upload`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"the image has too many pixels, at most {max_pixels:,} are taken") from error
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        raise _not_an_image() from error
    if width * height > max_pixels:
        raise HTTPException(413, f"the image has {width} x {height} pixels, at most {max_pixels:,} are taken")
    return int(width * height)


def read_upload(data: bytes) -> Image.Image:
    """A decoded upload, upright, in 8-bit RGB; 415 for what is no image of `FORMATS`, 413 for too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return to_rgb(image)
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    except Exception as error:
        raise _not_an_image() from error


def _not_an_image() -> HTTPException:
    return HTTPException(415, f"the upload is no image in one of the formats {', '.join(FORMATS)}")
