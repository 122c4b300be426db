"""The HTTP application over a `CartridgeService`. Nothing of Ray here: any ASGI server runs it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from cartridges.engines.base import TokenEvent
from cartridges.errors import UserError
from cartridges.serve_config import ReplicaSettings
from workflows.serving.access import Authenticator, Caller
from workflows.serving.access_middleware import AccessMiddleware, AuditLog
from workflows.serving.api import ChatRequest, CompletionRequest, Generation, LoadRequest, UpdateRequest
from workflows.serving.body_limit import BodyLimit
from workflows.serving.catalog import AUTO
from workflows.serving.errors import ApiError, draining
from workflows.serving.formats import Answer
from workflows.serving.page import add_page
from workflows.serving.plans import Plan
from workflows.serving.service import CartridgeService, Events

log = logging.getLogger(__name__)
T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to read the answer."""


def create_app(service: CartridgeService) -> FastAPI:
    """All routes of the service. Errors are OpenAI-shaped whatever raised them."""
    app = FastAPI(title="cartridges", docs_url=None, redoc_url=None)
    settings = service.settings
    lost = partial(service.metrics.add, "cartridges_audit_lost_total")
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    # Added last, so it stands first: who may not come in sends no body.
    app.add_middleware(AccessMiddleware, authenticator=Authenticator(settings.keys_file, settings.open_to_network),
                       audit=AuditLog(settings.audit_log, lost) if settings.audit_log else None)
    _add_errors(app, service)
    _add_generation(app, service)
    _add_cartridges(app, service)
    _add_state(app, service)
    add_page(app)
    return app


def _caller(request: Request) -> Caller:
    return request.state.caller


CallerIs = Annotated[Caller, Depends(_caller)]


def _add_generation(app: FastAPI, service: CartridgeService) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        return await _answer(service, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await _answer(service, body, request)


def _add_cartridges(app: FastAPI, service: CartridgeService) -> None:
    @app.get("/v1/cartridges")
    async def list_cartridges(caller: CallerIs):
        return {"object": "list", "data": await service.describe(caller)}

    @app.post("/v1/cartridges", status_code=201)
    async def load_cartridge(body: LoadRequest, caller: CallerIs):
        return await service.hold(body.name, body.pin, body.ttl_s, caller)

    @app.get("/v1/cartridges/{name}")
    async def get_cartridge(name: str, caller: CallerIs):
        return await service.find(name, caller)

    @app.patch("/v1/cartridges/{name}")
    async def update_cartridge(name: str, body: UpdateRequest, caller: CallerIs):
        return await service.hold(name, body.pin, body.ttl_s, caller)

    @app.delete("/v1/cartridges/{name}")
    async def unload_cartridge(name: str, caller: CallerIs):
        return await service.release(name, caller)

    @app.put("/v1/cartridges/{name}/replicas", status_code=202)
    async def give_replicas(name: str, body: ReplicaSettings, caller: CallerIs):
        return await service.dedicate(name, body, caller)

    @app.delete("/v1/cartridges/{name}/replicas", status_code=202)
    async def take_replicas(name: str, caller: CallerIs):
        return await service.share(name, caller)


def _add_state(app: FastAPI, service: CartridgeService) -> None:
    def model(name: str, aliases: list[str], created: int = 0) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "cartridges",
                "aliases": aliases}

    @app.get("/v1/models")
    async def list_models(caller: CallerIs):
        data = [model(service.identity.name, ["base"])]
        for cartridge in await service.describe(caller):
            data.append(model(cartridge["id"], cartridge["aliases"]) | {"parent": service.identity.name})
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str, caller: CallerIs):
        if name == AUTO:
            return model(AUTO, [])
        target = await asyncio.to_thread(service.catalog.resolve, name, (), caller.may_use)
        aliases = sorted({alias for entry in target.entries for alias in entry.aliases})
        return model(name, aliases if target.entries else ["base"])

    @app.get("/healthz")
    async def healthz():
        if service.draining:
            raise draining()
        return {"status": "ok", "model": service.identity.name, "in_flight": service.in_flight}

    @app.get("/metrics")
    async def metrics(caller: CallerIs):
        caller.check_manage()
        return Response(await service.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI, service: CartridgeService) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError):
        return await api_error(request, ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        return await api_error(request, _explain(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        return await api_error(request, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(ClientLeft)
    async def client_left(request: Request, error: ClientLeft):
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception):
        # What went wrong inside is for the log, not for the client.
        return await api_error(request, ApiError(500, "internal error; the service's log has the cause"))


def _explain(error: RequestValidationError) -> ApiError:
    told = [(_place(found, error.body), found) for found in error.errors()]
    # Of the ways in which a value may be written (a text, or a list of parts), the one that went furthest was meant.
    where, first = max((pair for pair in told if pair[0][:1] == told[0][0][:1]), key=lambda pair: len(pair[0]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', message)}")
    if first["type"] == "extra_forbidden":
        message = "this field is not known here; leave it out"
    param = where[0] if where else None
    text = f"{'.'.join(where)}: {message}" if where else message
    return ApiError(400, text.encode(errors="replace").decode()[:500], param=param)


def _place(found: dict[str, Any], body: Any) -> list[str]:
    """Where in the body it is, without pydantic's own names for the ways in which a value may be written."""
    where, here = [], body
    for part in found["loc"][1:]:  # The first is "body".
        if isinstance(here, list) and isinstance(part, int):
            here = here[part]
        elif isinstance(here, dict) and (part in here or found["type"] == "missing"):
            here = here.get(part)
        else:
            continue
        where.append(str(part))
    return where


async def _answer(service: CartridgeService, body: Generation, request: Request):
    """Admit and plan, wait for the first token (so that a refusal has its status), then stream or collect."""
    label, status, note = "", 500, request.state.note
    try:
        note["asked"] = "+".join([body.model, *body.cartridges])[:200]
        plan, events = await _while_connected(request, service.start(body, request.state.caller))
        label = plan.label
        answer = Answer(body, plan, service.template.tokenizer, note)
        if body.stream:
            first = await _while_connected(request, events.__anext__())
            status = 200
            return EventStream(_stream(answer, first, events, service, plan), media_type="text/event-stream",
                               headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        await _while_connected(request, _collect(answer, events))
        status = 200
        return JSONResponse(answer.whole())
    except (ApiError, UserError) as error:
        status = error.status if isinstance(error, ApiError) else 400
        raise
    except (ClientLeft, asyncio.CancelledError):  # Ray Serve cancels the request of a client that has left.
        status = 499
        service.metrics.add("cartridges_disconnects_total", model=label)
        raise
    finally:
        if status != 200 or not body.stream:
            service.metrics.add("cartridges_requests_total", model=label, status=str(status))


async def _collect(answer: Answer, events: Events) -> None:
    async with aclosing(events):
        async for index, event in events:
            answer.add(index, event)


async def _stream(answer: Answer, first: tuple[int, TokenEvent], events: Events, service: CartridgeService,
                  plan: Plan) -> AsyncIterator[str]:
    """Server-sent events. An error after the first token is an event, as the status is sent already."""
    status = "499"
    try:
        async with aclosing(events):
            for chunk in [*answer.openings(), answer.piece(*first)]:
                if chunk is not None:
                    yield _event(chunk)
            async for index, event in events:
                chunk = answer.piece(index, event)
                if chunk is not None:
                    yield _event(chunk)
        if answer.body.stream_options.include_usage:
            yield _event(answer.usage_chunk())
        status = "200"
        yield "data: [DONE]\n\n"
    except (ApiError, UserError) as error:
        status = "500"
        wrapped = error if isinstance(error, ApiError) else ApiError(400, str(error))
        yield _event(wrapped.body())
    except Exception:
        status = "500"
        log.exception("a stream ended with an error")
        yield _event(ApiError(500, "internal error; the service's log has the cause").body())
    finally:
        if status == "499":
            service.metrics.add("cartridges_disconnects_total", model=plan.label)
        service.metrics.add("cartridges_requests_total", model=plan.label, status=status)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """A streaming response that closes its generator at once when the client leaves.

    Left to the garbage collector, a generator that waits at a `yield` would keep its slot.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result. Cancels it and raises `ClientLeft` when the client disconnects first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for started in (task, gone):
            started.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
