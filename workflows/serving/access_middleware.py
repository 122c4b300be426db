"""Middleware of the HTTP service: authenticates the caller, and writes a line of the audit log for each request."""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cartridges.errors import UserError
from workflows.serving.access import NOBODY, Authenticator
from workflows.serving.errors import ApiError

log = logging.getLogger(__name__)

OPEN = ("/", "/healthz", "/favicon.ico")
OPEN_FOLDER = "/web/"
"""Paths that need no key: health, and the web page's own files."""


class AuditLog:
    """JSON lines, one a request: who, what, how much and with what result; never a prompt or an answer.

    Opened for every line, so that it can be rotated by renaming. Raises `UserError` where it cannot be opened at
    first; a line that cannot be written later is lost, said in the service's log and counted (`lost`).
    """

    def __init__(self, path: str, lost: Callable[[], None]):
        self.path, self._lost = path, lost
        try:
            self._append(b"")
        except OSError as error:
            raise UserError(f"serve.audit_log {path} cannot be opened: {error.strerror}") from None

    def write(self, line: dict[str, Any]) -> None:
        try:
            self._append((json.dumps(line) + "\n").encode())
        except OSError:
            log.exception("a line of the audit log is lost")
            self._lost()

    def _append(self, data: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, data)
        finally:
            os.close(file)


class AccessMiddleware:
    """ASGI middleware. Puts the `Caller` into `request.state.caller`, and into `request.state.note` a
    dictionary whose entries go into the audit log."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, audit: AuditLog | None):
        self.app, self.authenticator, self.audit = app, authenticator, audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] in OPEN or scope["path"].startswith(OPEN_FOLDER):
            return await self.app(_with_state(scope, caller=NOBODY, note={}), receive, send)
        note, status, began = {}, 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        peer = (scope.get("client") or ("",))[0]
        try:
            try:
                headers = Headers(scope=scope)
                caller = self.authenticator.admit(peer, headers.get("authorization"), headers.get("host", ""))
            except ApiError as error:
                # The body is not read, so the connection cannot be used again.
                refusal = JSONResponse(error.body(), error.status, headers=error.headers | {"Connection": "close"})
                return await refusal(scope, receive, watched)
            note |= {"key": caller.key_id, "tenant": caller.tenant} if caller.key_id else {}
            await self.app(_with_state(scope, caller=caller, note=note), receive, watched)
        except Exception:  # It is answered further out.
            status = 500
            raise
        except asyncio.CancelledError:  # The client has left; a stream's status was sent before.
            status = status or 499
            raise
        finally:
            if self.audit is not None:
                self.audit.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "peer": peer,
                                  "method": scope["method"], "path": scope["path"][:200], "status": status,
                                  "seconds": round(time.monotonic() - began, 4), **note})


def _with_state(scope: Scope, **values: Any) -> Scope:
    return {**scope, "state": {**scope.get("state", {}), **values}}
