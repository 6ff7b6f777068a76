"""Limits: what a client may send, counted while it arrives, whatever its headers say."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastattr.core.errors import InputError
from fastattr.corpus.images import to_rgb

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
