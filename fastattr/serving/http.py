"""Serve: an attributor for machines over HTTP: an image and prompt, or features, come in; the receipt goes out.

POST /attribute            multipart form: image (PNG, JPEG, WebP, GIF or BMP), prompt, k
POST /attribute/features   JSON: {"features": [...], "prompt": "...", "k": 20, "where": {"creator": "..."}}
GET  /health, /metrics (Prometheus text), /info

An upload is refused before it is read if it is too large, and before it is decoded if it has too many pixels or is of another
type; what does not get its turn in time gets 503. No answer is kept, so none can outlive a removal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from fastattr.attributor.attributor import FastAttributor
from fastattr.core.errors import InputError, MissingExtraError, NonFiniteError
from fastattr.corpus.reservations import OptOuts

try:
    import uvicorn
    from fastapi import FastAPI, File, Form, Request, Response, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, FiniteFloat

    from fastattr.serving.batches import Batcher, Guard, PatientProtocol, Room, busy, pixels_of, read_upload
except ImportError as failure:
    raise MissingExtraError(f"the server lacks a package ({failure}); run: pip install 'fastattr[serve]'") from failure

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
LONGEST_PROMPT = 4000
LONGEST_K = 1000
PATHS = frozenset({"/attribute", "/attribute/features", "/health", "/metrics", "/info"})
DECODERS = 2  # uploads that are decoded at once; each takes some 16 bytes a pixel meanwhile


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits of the server."""

    max_bytes: int = 10_000_000  # of one request
    max_pixels: int = 20_000_000  # of one image; it is not decoded if it has more
    max_waiting_pixels: int = 100_000_000  # of all images that are decoded and wait; others stay encoded
    max_batch: int = 32  # requests that are answered together
    max_waiting: int = 256  # requests that may wait; more get 503 at once
    timeout: float = 30.0  # seconds from a request's arrival to its answer
    token: str = ""  # bearer token that requests must carry; '' asks for none


def _encodable(text: str) -> str:
    text.encode()  # UnicodeEncodeError is a ValueError, which makes the request malformed
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Texts = Annotated[list[Text], Field(max_length=1000)]


class FeaturesRequest(BaseModel):
    """Features computed elsewhere."""

    model_config = ConfigDict(extra="forbid", strict=True)

    features: Annotated[list[FiniteFloat], FailFast(), Field(max_length=65_536)]
    prompt: Text = Field(min_length=1, max_length=LONGEST_PROMPT)
    k: int = Field(default=20, ge=1, le=LONGEST_K)
    where: dict[Text, Text | Texts] | None = Field(default=None, max_length=16)


def create_app(attributor: FastAttributor, config: ServeConfig | None = None) -> FastAPI:
    """The server as an ASGI application."""
    settings = config or ServeConfig()
    batcher = Batcher(attributor, max_batch=settings.max_batch, max_waiting=settings.max_waiting, timeout=settings.timeout)
    room, registry = Room(max(settings.max_waiting_pixels, settings.max_pixels)), CollectorRegistry()
    requests = Counter("fastattr_requests", "Requests answered.", ["path", "status"], registry=registry)
    seconds = Histogram("fastattr_request_seconds", "From a complete request to its answer.", registry=registry)
    Gauge("fastattr_batches_total", "Batches answered.", registry=registry).set_function(lambda: batcher.batches)
    Gauge("fastattr_images", "Images in the catalogue.", registry=registry).set_function(lambda: len(attributor))
    version = Gauge("fastattr_catalog_version", "Version of the catalogue.", registry=registry)
    version.set_function(lambda: attributor.versions()["catalog_version"])
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
    bearer = HTTPBearer(auto_error=False)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()
        decoders.shutdown()

    app = FastAPI(title="fastattr", lifespan=lifespan, docs_url=None, redoc_url=None)

    async def refuse(request: Request) -> JSONResponse | None:
        if not settings.token or request.url.path == "/health":
            return None
        given = await bearer(request)
        if given is not None and hmac.compare_digest(given.credentials.encode(), settings.token.encode()):
            return None
        return JSONResponse({"detail": "a bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"})

    def report(path: str, status: int) -> None:
        requests.labels(path if path in PATHS else "other", str(status)).inc()

    app.add_middleware(Guard, max_bytes=settings.max_bytes, seconds=2 * settings.timeout, refuse=refuse, report=report)

    @app.exception_handler(InputError)
    @app.exception_handler(NonFiniteError)
    async def unusable(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input, which may be long, or hold what UTF-8 can't say.
        wrong = [f"{'.'.join(map(str, each['loc'][:3]))}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"detail": wrong}, 422)

    @app.post("/attribute")
    async def attribute(
        image: UploadFile = File(),  # noqa: B008
        prompt: str = Form(min_length=1, max_length=LONGEST_PROMPT),
        k: int = Form(20, ge=1, le=LONGEST_K),
    ) -> Response:
        data = await image.read()
        with seconds.time():
            async with contextlib.AsyncExitStack() as stack:
                try:
                    wanted = await asyncio.to_thread(pixels_of, data, settings.max_pixels)
                    await asyncio.wait_for(stack.enter_async_context(room.take(wanted)), settings.timeout)
                except TimeoutError:
                    raise busy("too many images wait") from None
                opened = await asyncio.get_running_loop().run_in_executor(decoders, read_upload, data)
                found = await batcher.ask(opened, prompt, k)
                return Response(found.to_json(), media_type="application/json")

    @app.post("/attribute/features")
    async def attribute_features(query: FeaturesRequest) -> Response:
        with seconds.time(), np.errstate(over="ignore"):  # what overflows is refused as not finite
            features = np.array(query.features, dtype=np.float32)
            found = await batcher.ask(features, query.prompt, query.k, query.where)
            return Response(found.to_json(), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "images": len(attributor), "versions": attributor.versions()}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/info")
    async def info() -> Response:
        return JSONResponse(await asyncio.to_thread(attributor.info))

    return app


def run(
    model: str, *, host: str = "127.0.0.1", port: int = 8000, config: ServeConfig | None = None, opt_out: Path | None = None
) -> None:
    """Serve an attributor until the process is told to end; what is being answered then is answered.

    What an opt-out list names is removed first. Raises InputError if other machines could reach it and no token is set.
    """
    settings = config or ServeConfig(token=os.environ.get("FASTATTR_TOKEN", ""))
    if host not in LOCAL and not settings.token:
        raise InputError(f"{host} can be reached by others: set FASTATTR_TOKEN to a secret that requests must carry.")
    # In torch, which takes longer to import than the encoders' NumPy form, and less for a batch.
    attributor = FastAttributor.from_pretrained(model, thumbnails=opt_out is not None, backend="torch")
    if opt_out and (listed := OptOuts(opt_out).listed_in(attributor.catalog)):
        attributor.remove(listed, reason=f"opt-out list {opt_out.name}")
    app = create_app(attributor, settings)
    limits: dict[str, Any] = {"limit_concurrency": 2 * settings.max_waiting, "h11_max_incomplete_event_size": 64 * 1024}
    limits |= {"timeout_graceful_shutdown": int(settings.timeout) + 1, "timeout_keep_alive": 30}
    uvicorn.run(app, host=host, port=port, http=PatientProtocol, log_level="warning", **limits)
