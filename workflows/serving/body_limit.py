"""Limits on a request body: its length, and the seconds in which it must arrive."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workflows.serving.errors import ApiError

BODY_SECONDS = 30.0
"""A client must have sent its body within this time, or it would hold a connection for nothing."""


DISCARDED = 4
"""A body of up to so many times the limit is read to its end, though not kept: closed in the middle of it, a client
finds the connection reset and not the 413."""


class BodyLimit:
    """ASGI middleware: 413 for a body above `limit` bytes, 408 for one that does not come."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(scope, receive)
        except TimeoutError:
            return await self._refuse(ApiError(408, "the request body did not arrive in time"), scope, send)
        except ApiError as error:
            return await self._refuse(error, scope, send)
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > DISCARDED * self.limit:
            raise self._too_long()
        parts, size, more = [], 0, True
        while more and size <= DISCARDED * self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            part = message.get("body", b"")
            size += len(part)
            more = message.get("more_body", False)
            if size <= self.limit:
                parts.append(part)
        if size > self.limit:
            raise self._too_long()
        return b"".join(parts)

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the request body is above {self.limit} bytes", "body_too_large")

    async def _refuse(self, error: ApiError, scope: Scope, send: Send) -> None:
        # The rest of the body is not read, so the connection cannot be used again.
        response = JSONResponse(error.body(), error.status, headers={"Connection": "close"})
        await response(scope, _nothing, send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body once, and afterwards what the server says (the disconnect)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
