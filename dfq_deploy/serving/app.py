"""The HTTP side: which address answers what. Bodies are read under limits, and every error is the protocol's JSON.

A request takes its place in the queue before its body is read, so that a crowd is turned away at the door. Reading and
decoding are done in threads, beside the engine.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from calibrators.errors import DeployError
from dfq_deploy.runtime import Runner
from dfq_deploy.serving.batching import Batcher, BatchingOptions, FullError
from dfq_deploy.serving.decoding import model_input
from dfq_deploy.serving.metrics import CONTENT_TYPE, Meters
from dfq_deploy.serving.options import ServeOptions, gathers, name_for
from dfq_deploy.serving.protocol import HEADER_LENGTH, Asked, RequestError, Served, parse, render

__all__ = ["Service", "make_app"]

_EXTENSIONS = ("binary_tensor_data", "classification")
_VERSION = version_of("dfq-deploy")
_GONE = 499  # nginx's number for a client that did not wait


class Service:
    """A runner with its queue, its limits and its counters.

    Attributes:
        models: What is served, by name: the model itself, and the one that takes image files.
        meters: What was counted.
        batcher: The queue.
    """

    def __init__(self, runner: Runner, options: ServeOptions) -> None:
        manifest = runner.manifest
        name, image, largest = name_for(options, manifest), manifest.preprocess.shape, manifest.engine.options.batch[2]
        platform = "onnxruntime_onnx" if manifest.backend == "ort" else "tensorrt_plan"
        facts = (image, manifest.model.classes, runner.classes, largest)
        both = [Served(name, platform, False, *facts), Served(f"{name}_encoded", "ensemble", True, *facts)]
        self.models = {served.name: served for served in both}
        self._runner, self._options = runner, options
        batching = BatchingOptions(largest, gathers(options, manifest), options.delay_ms / 1000, options.queue)
        self.meters = Meters(lambda: self.batcher.inside)
        self.batcher = Batcher(runner, batching, self.meters)
        usual = 4 * largest * int(np.prod(image)) + 2**20
        self.most_bytes = usual if options.max_mb is None else options.max_mb * 2**20

    async def infer(self, served: Served, request: Request) -> Response:
        """The answer to an inference request."""
        with self.meters.request(served.name) as told:
            try:
                with self.batcher.place():
                    response = await self._answer(served, request)
            except FullError as full:
                await self.discard(request)
                response = _refusal(503, full, {"Retry-After": str(full.again_s)})
            except RequestError as error:
                if error.status in (413, 415):
                    await self.discard(request)
                response = _refusal(error.status, error)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            told.status = response.status_code
            return response

    def warm_up(self) -> None:
        """Call the engine with one image and with the most that it gets."""
        for n in sorted({1, next(iter(self.models.values())).largest}):
            self._runner(np.zeros((n, *self._runner.manifest.preprocess.shape), np.float32))

    async def discard(self, request: Request) -> None:
        """Take in what is still on its way, up to the limit: a client that is not read does not read its answer."""
        left = self.most_bytes
        try:
            async with asyncio.timeout(self._options.read_s):
                async for part in request.stream():
                    left -= len(part)
                    if left < 0:
                        return
        except (ClientDisconnect, RuntimeError, TimeoutError):  # RuntimeError: it was read to its end already
            return

    async def _answer(self, served: Served, request: Request) -> Response:
        try:
            async with asyncio.timeout(self._options.read_s):
                body = await self._body(request)
        except TimeoutError as cause:
            what, why = "the request did not arrive whole.", f"it took more than {self._options.read_s:g} s."
            raise RequestError(408, what=what, why=why, fix="send it again.") from cause
        encoding, length = request.headers.get("content-encoding", ""), request.headers.get(HEADER_LENGTH)
        asked, images = await asyncio.to_thread(self._images, served, body, encoding, length)
        logits = await self.batcher(images)
        content, headers = render(asked, logits, served)
        return Response(content, headers=headers)

    def _images(
        self, served: Served, body: bytes, encoding: str, header_length: str | None
    ) -> tuple[Asked, np.ndarray]:
        asked = parse(_expanded(body, encoding, self.most_bytes), header_length, served)
        if isinstance(asked.images, np.ndarray):
            return asked, asked.images
        return asked, model_input(asked.images, self._runner.manifest.preprocess, max_pixels=self._options.max_pixels)

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        declared = request.headers.get("content-length", "0")
        async for part in request.stream():
            size += len(part)
            if max(size, int(declared) if declared.isdigit() else 0) > self.most_bytes:
                raise _too_large(self.most_bytes)
            parts.append(part)
        return b"".join(parts)


def make_app(runner: Runner, options: ServeOptions) -> tuple[FastAPI, Service]:
    """The application that serves `runner`, and its service."""
    service = Service(runner, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.close()

    title = next(iter(service.models))
    app = FastAPI(title=title, version=_VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DeployError, _our_error)
    app.add_exception_handler(Exception, _unforeseen)
    _add_health(app, service)
    _add_models(app, service)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.meters.text(), media_type=CONTENT_TYPE)

    return app, service


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "dfq-deploy", "version": _VERSION, "extensions": _EXTENSIONS}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", response_model=None)
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.batcher.open}, 200 if service.batcher.open else 503)


def _add_models(app: FastAPI, service: Service) -> None:
    def found(name: str, version: str = "1") -> Served:
        if name not in service.models or version != "1":
            what = f"there is no model `{name}` in version {version}."
            why = f"here are {' and '.join(service.models)}, in version 1."
            raise RequestError(404, what=what, why=why, fix="ask for one of those.")
        return service.models[name]

    @app.get("/v2/models/{name}/ready", response_model=None)
    @app.get("/v2/models/{name}/versions/{version}/ready", response_model=None)
    async def model_ready(name: str, version: str = "1") -> JSONResponse:
        found(name, version)
        return JSONResponse({"name": name, "ready": service.batcher.open}, 200 if service.batcher.open else 503)

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str = "1") -> dict[str, Any]:
        return found(name, version).metadata()

    @app.post("/v2/models/{name}/infer", response_class=Response)
    @app.post("/v2/models/{name}/versions/{version}/infer", response_class=Response)
    async def infer(request: Request, name: str, version: str = "1") -> Response:
        try:
            served = found(name, version)
        except RequestError:
            await service.discard(request)
            raise
        return await service.infer(served, request)


def _expanded(body: bytes, encoding: str, most: int) -> bytes:
    """`body` without its compression, which may not hide more than `most` bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        what = f"Content-Encoding `{encoding}` cannot be read."
        raise RequestError(415, what=what, why="gzip and deflate can.", fix="send one of them, or none.")
    expander = zlib.decompressobj(wbits=47)  # tells gzip from deflate by itself
    try:
        found = expander.decompress(body, most)
    except zlib.error as cause:
        raise RequestError(what=f"the body is not in {encoding}.", why=f"{cause}.", fix="send it again.") from cause
    if expander.unconsumed_tail:
        raise _too_large(most)
    if not expander.eof or expander.unused_data:
        what, why = f"the body is not whole in {encoding}.", "its end is missing, or something follows it."
        raise RequestError(what=what, why=why, fix="send it again.")
    return found


def _too_large(most: int) -> RequestError:
    what, why = "the request is too large.", f"{most} bytes are allowed."
    return RequestError(413, what=what, why=why, fix="send fewer images, as a binary tensor or as files.")


def _refusal(status: int, error: DeployError, headers: dict[str, str] | None = None) -> JSONResponse:
    text = "; ".join(part.removesuffix(".") for part in (error.what, error.why, error.fix))
    return JSONResponse({"error": f"{text}."}, status, headers)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    status, text = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    return JSONResponse({"error": text}, status)


async def _our_error(_: Request, error: Exception) -> JSONResponse:
    status = error.status if isinstance(error, RequestError) else 500
    assert isinstance(error, DeployError)
    return _refusal(status, error)


async def _unforeseen(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"error": "the server failed; its log says how."}, 500)
