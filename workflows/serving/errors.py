"""Errors as OpenAI's clients expect them."""

from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 409: "conflict_error",
         429: "rate_limit_error"}
"""HTTP status -> `error.type`; any other 4xx is `invalid_request_error`, everything else `server_error`."""


class ApiError(Exception):
    """An answer that is an error: HTTP `status`, one clear line, OpenAI's `code` and `param`.

    `retry_after`: seconds after which the client may try again (429 and 503).
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None,
                 retry_after: int | None = None):
        # All five as `args`, so that the error survives the way from a replica to the ingress.
        super().__init__(status, message, code, param, retry_after)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def replica_lost() -> ApiError:
    """What was answering is gone; another takes its place."""
    return ApiError(503, "the replica that answered was lost; try again", "replica_lost", retry_after=1)


def draining() -> ApiError:
    return ApiError(503, "the service is shutting down", "draining", retry_after=5)
