"""Serve: an attributor for machines over HTTP: an image and prompt, or features, come in; the receipt goes out.

    fastattr serve emoji                                              # on 127.0.0.1:8000, for this machine
    FASTATTR_TOKEN=... fastattr serve org/name --host 0.0.0.0         # for others: only with a token

POST /attribute        multipart form: image (PNG, JPEG, WebP, GIF or BMP), prompt, k
POST /attribute/features   JSON: {"features": [...], "prompt": "...", "k": 20, "where": {"creator": "..."}}
GET  /health, /metrics (Prometheus text), /info

Requests that wait are answered together. An upload is refused before it is read if it is too large, and before it is decoded
if it has too many pixels or is of another type; what does not get its turn in time gets 503. No answer is kept, so none can
outlive a removal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import logging
import os
import time
import warnings
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastattr.attributor.attribution import Attribution
from fastattr.attributor.attributor import FastAttributor
from fastattr.attributor.inputs import checked_features
from fastattr.core.errors import InputError, MissingExtraError

try:
    import uvicorn
    from fastapi import FastAPI, File, Form, HTTPException, Request, Response, UploadFile
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as failure:
    raise MissingExtraError(f"the server needs fastapi ({failure}); run: pip install 'fastattr[serve]'") from failure

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
LONGEST_PROMPT = 4000
LONGEST_K = 1000
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds, of the histogram of latencies."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits of the server."""

    max_bytes: int = 10_000_000
    """Of one request."""
    max_pixels: int = 20_000_000
    """Of one image; it is not decoded if it has more."""
    max_batch: int = 32
    """Requests that are answered together."""
    max_waiting: int = 256
    """Requests that may wait; more get 503 at once."""
    timeout: float = 30.0
    """Seconds from a request's arrival to its answer."""
    token: str = ""
    """Bearer token that requests must carry; '' asks for none."""


class FeaturesRequest(BaseModel):
    """Features computed elsewhere."""

    model_config = ConfigDict(extra="forbid")

    features: list[float] = Field(max_length=65_536)
    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    k: int = Field(default=20, ge=1, le=LONGEST_K)
    where: dict[str, str | list[str]] | None = None


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request in the queue."""

    query: Image.Image | np.ndarray
    prompt: str
    k: int
    where: dict[str, str | list[str]] | None
    answer: asyncio.Future[Attribution]


class Batcher:
    """Answers requests that wait together, in one thread of their own, one batch after the other."""

    def __init__(self, attributor: FastAttributor, config: ServeConfig) -> None:
        self._attributor, self._config = attributor, config
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue(config.max_waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attribute")
        self._task: asyncio.Task[None] | None = None
        self.batches = 0

    def start(self) -> None:
        """Begin to answer."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Answer what waits, then end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), self._config.timeout)
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown()

    async def ask(self, query: Image.Image | np.ndarray, prompt: str, k: int, where: Any = None) -> Attribution:
        """The answer, once its batch is done.

        Raises:
            HTTPException: 503 if too many wait, or it takes too long.
            InputError: the query can't be answered.
        """
        waiting = Waiting(query, prompt, k, where, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests wait; try again later", {"Retry-After": "1"}) from None
        try:
            return await asyncio.wait_for(waiting.answer, self._config.timeout)
        except TimeoutError:
            raise HTTPException(503, f"no answer within {self._config.timeout:g} s; try again later") from None

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._config.max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            wanted = [each for each in batch if not each.answer.done()]  # not those that gave up
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._thread, answer, self._attributor, wanted)
            except Exception as error:  # the process must live; the cause goes to who asked, and to the log
                logger.exception("a batch failed")
                answers = [error] * len(wanted)
            for each, found in zip(wanted, answers, strict=True):
                if each.answer.done():
                    continue
                if isinstance(found, Exception):
                    each.answer.set_exception(found)
                else:
                    each.answer.set_result(found)
            self.batches += 1
            for _ in batch:
                self._queue.task_done()


def answer(attributor: FastAttributor, batch: Sequence[Waiting]) -> list[Attribution | Exception]:
    """The answer to each, or the error that it alone gets; queries of one kind go through the network together."""
    answers: list[Attribution | Exception] = [InputError("not answered")] * len(batch)
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(batch):
        kind = "image" if isinstance(each.query, Image.Image) else "features"
        groups.setdefault(f"{kind} {each.where!r}", []).append(number)
    for numbers in groups.values():
        try:
            found = _answer_together(attributor, [batch[number] for number in numbers])
        except InputError:  # of one of them: each for itself, then
            found = []
            for number in numbers:
                try:
                    found += _answer_together(attributor, [batch[number]])
                except InputError as error:
                    found.append(error)
        for number, each_answer in zip(numbers, found, strict=True):
            answers[number] = each_answer
    return answers


def _answer_together(attributor: FastAttributor, batch: Sequence[Waiting]) -> list[Attribution | Exception]:
    prompts, where = [each.prompt for each in batch], batch[0].where
    k = max(each.k for each in batch)
    if isinstance(batch[0].query, Image.Image):
        found = attributor.attribute([each.query for each in batch], prompts, k, where=where)
        assert isinstance(found, list)
    else:
        found = attributor.attribute_features(np.stack([each.query for each in batch]), prompts, k, where=where)  # type: ignore[misc]
    return [answer.first(each.k) for answer, each in zip(found, batch, strict=True)]


def read_upload(data: bytes, max_pixels: int) -> Image.Image:
    """A decoded upload.

    Raises:
        HTTPException: 415 for what is no image of `FORMATS`, 413 for too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise HTTPException(
                        413, f"the image has {image.width} x {image.height} pixels, at most {max_pixels:,} are taken"
                    )
                image.seek(0)
                image.load()
                return image.copy()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise HTTPException(413, f"the image has too many pixels, at most {max_pixels:,} are taken") from error
    except HTTPException:
        raise
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        raise HTTPException(415, f"the upload is no image in one of the formats {', '.join(FORMATS)}") from error


class Metrics:
    """Counts for Prometheus."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def count(self, path: str, status: int, seconds: float) -> None:
        """One request more."""
        self.requests[path, status] = self.requests.get((path, status), 0) + 1
        self.buckets[sum(seconds > bound for bound in BUCKETS)] += 1
        self.seconds += seconds

    def text(self, attributor: FastAttributor, batches: int) -> str:
        """In Prometheus's text format."""
        lines = ["# TYPE fastattr_requests_total counter"]
        lines += [
            f'fastattr_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        lines.append("# TYPE fastattr_request_seconds histogram")
        total = 0
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], self.buckets, strict=True):
            total += count
            lines.append(f'fastattr_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"fastattr_request_seconds_sum {self.seconds:.6f}", f"fastattr_request_seconds_count {total}"]
        lines += ["# TYPE fastattr_batches_total counter", f"fastattr_batches_total {batches}"]
        lines += ["# TYPE fastattr_images gauge", f"fastattr_images {len(attributor)}"]
        lines += [
            "# TYPE fastattr_catalog_version gauge",
            f"fastattr_catalog_version {attributor.versions()['catalog_version']}",
        ]
        return "\n".join(lines) + "\n"


def create_app(attributor: FastAttributor, config: ServeConfig | None = None) -> FastAPI:
    """The server as an ASGI application."""
    settings = config or ServeConfig()
    batcher, metrics = Batcher(attributor, settings), Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="fastattr", lifespan=lifespan, docs_url=None, redoc_url=None)
    known = {"/attribute", "/attribute/features", "/health", "/metrics", "/info"}

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(2 * settings.timeout):  # also for those who send a byte now and then
                response = _refused(request, settings) or await _limited(request, call_next, settings.max_bytes)
        except TimeoutError:
            response = JSONResponse({"detail": "the request did not arrive in time"}, 408)
        path = request.url.path if request.url.path in known else "other"
        metrics.count(path, response.status_code, time.perf_counter() - started)
        return response

    @app.exception_handler(InputError)
    async def unusable(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.post("/attribute")
    async def attribute(
        image: UploadFile = File(),  # noqa: B008
        prompt: str = Form(min_length=1, max_length=LONGEST_PROMPT),
        k: int = Form(20, ge=1, le=LONGEST_K),
    ) -> Response:
        opened = await asyncio.to_thread(read_upload, await image.read(), settings.max_pixels)
        return _receipt(await batcher.ask(opened, prompt, k))

    @app.post("/attribute/features")
    async def attribute_features(query: FeaturesRequest) -> Response:
        features = np.array(query.features, dtype=np.float32)
        checked_features(features[None], 1, attributor.config["feature_dim"])
        return _receipt(await batcher.ask(features, query.prompt, query.k, query.where))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "images": len(attributor), "versions": attributor.versions()}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(attributor, batcher.batches), media_type="text/plain; version=0.0.4")

    @app.get("/info")
    async def info() -> Response:
        return JSONResponse(await asyncio.to_thread(attributor.info))

    return app


def _receipt(found: Attribution) -> Response:
    return Response(found.to_json(), media_type="application/json")


def _refused(request: Request, settings: ServeConfig) -> Response | None:
    """A response to what is refused by its headers alone."""
    if settings.token and request.url.path != "/health":
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {settings.token}".encode()):
            return JSONResponse({"detail": "a bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
    length = request.headers.get("content-length", "0")
    if not length.isdigit():
        return JSONResponse({"detail": "the length of the request is no number"}, 400)
    if int(length) > settings.max_bytes:
        return JSONResponse({"detail": f"a request may have {settings.max_bytes:,} bytes"}, 413)
    return None


async def _limited(request: Request, call_next: Any, max_bytes: int) -> Response:
    """The response; a body that comes without a length is read, at most as far as the limit, before anything else sees it."""
    if request.method == "POST" and "content-length" not in request.headers:
        size = 0
        parts = []
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                return JSONResponse({"detail": f"a request may have {max_bytes:,} bytes"}, 413)
            parts.append(part)
        request._body = b"".join(parts)
    response: Response = await call_next(request)
    return response


def run(model: str, *, host: str = "127.0.0.1", port: int = 8000, config: ServeConfig | None = None) -> None:
    """Serve an attributor until the process is told to end; what is being answered then is answered.

    Raises:
        InputError: other machines could reach it and no token is set.
        As `FastAttributor.from_pretrained`.
    """
    settings = config or ServeConfig(token=os.environ.get("FASTATTR_TOKEN", ""))
    if host not in LOCAL and not settings.token:
        raise InputError(f"{host} can be reached by others: set FASTATTR_TOKEN to a secret that requests must carry.")

    # In torch, which takes longer to import than the encoders' NumPy form, and less for a batch.
    app = create_app(FastAttributor.from_pretrained(model, thumbnails=False, backend="torch"), settings)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=int(settings.timeout) + 1,
        timeout_keep_alive=30,
        limit_concurrency=4 * settings.max_waiting,
        h11_max_incomplete_event_size=64 * 1024,
    )
