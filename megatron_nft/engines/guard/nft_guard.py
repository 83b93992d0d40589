"""Runs inside engine servers: a request without the run's key gets no answer. Standard library alone.

The key is in the variable NFT_SERVER_KEY, which only the owner of a process can read. The one thing that stays open is
/health, which routers and probes ask without a key.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY = os.environ.get("NFT_SERVER_KEY", "")
OPEN_PATHS = frozenset({"/health"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class KeyCheck:
    """ASGI middleware: 401 for every path but those of OPEN_PATHS, unless `Authorization: Bearer KEY` is sent."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        """RuntimeError where there is no key: the server must then not start."""
        if not KEY:
            raise RuntimeError("NFT_SERVER_KEY is not set, so this server would be open to everyone")
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or _has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "the key of the run is missing"}'})


def _has_key(scope: Message) -> bool:
    """sglang-router sends its client's header and its own for the server; all that are sent have to be right."""
    given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    return bool(given) and all(secrets.compare_digest(value, b"Bearer " + KEY.encode()) for value in given)


def keep_key_out_of_logs() -> None:
    """From here on no log record of this process holds the key: SGLang logs all of its arguments when it starts."""
    make = logging.getLogRecordFactory()

    def without_key(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if KEY and KEY in (text := record.getMessage()):
            record.msg, record.args = text.replace(KEY, "***"), ()
        return record

    logging.setLogRecordFactory(without_key)
