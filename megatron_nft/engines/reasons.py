"""Why a call to a server failed, in words for an error message."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """The text of an error; where the system refused something below it, what that was.

    httpx says "All connection attempts failed" for a connection that was refused, one that nobody answered and a
    network that is unreachable alike.
    """
    text = str(error) or type(error).__name__
    refused = _system_error(error)
    return text if refused is None or refused in text else f"{text} ({refused})"


def _system_error(error: BaseException | None) -> str | None:
    """The innermost error of the system among the causes of `error`."""
    found = None
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            found = str(error)
        group = error if isinstance(error, BaseExceptionGroup) else None  # of one host's several addresses
        error = group.exceptions[-1] if group else error.__cause__ or error.__context__
    return found
