"""Reasons for dropping a conversation that are not those of a filter."""

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"
ERROR = "error: "
"""The reason of a conversation that raised begins with this; the error follows."""


def error_reason(error: Exception) -> str:
    """The reason of a conversation that raised `error`, in one line."""
    line = " ".join(str(error).split())[:200]
    return f"{ERROR}{type(error).__name__}: {line}"


def reason_name(reason: str) -> str:
    """`reason` as it is counted: "error" for every error, otherwise unchanged."""
    return "error" if reason.startswith(ERROR) else reason
