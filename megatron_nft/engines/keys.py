"""The key of a run: who listens beyond loopback answers only those who send it.

It is made anew for each run and is never in a command line or a log: servers get it in their environment, ranks from
rank 0, other programs of the same user from a file that only the owner can read.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import httpx

from megatron_nft.engines import guard
from megatron_nft.engines.engine import EngineError
from megatron_nft.engines.reasons import reason
from megatron_nft.files import replacing

FOLDER = Path(guard.__file__).parent
"""Modules that check the key inside the engines' own processes."""
VARIABLE = "NFT_SERVER_KEY"
FILE = "key"
"""Name of the file, beside the servers' logs or announcements."""


def new_key() -> str:
    """256 random bits."""
    return secrets.token_hex(32)


def headers(key: str | None) -> dict[str, str]:
    """What a client sends; nothing where the server has no key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def environment(key: str | None) -> dict[str, str]:
    """What a server is given."""
    return {} if key is None else {VARIABLE: key}


def write_key(path: Path, key: str) -> None:
    """Write a key that only the owner can read, in place of one that an earlier run left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(f"{key}\n".encode())


def read_key(path: Path) -> str:
    """The key in a file. EngineError where it cannot be read or holds none."""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise EngineError(f"the key of the servers cannot be read from {path}: {e}") from None
    if not key:
        raise EngineError(f"{path} holds no key")
    return key


def common_key(path: Path) -> str:
    """The key in a file that several processes share; whoever comes first makes it. EngineError, OSError."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
        write_key(own, new_key())
        try:
            os.link(own, path)  # in one step, and only for the first
        except FileExistsError:
            pass
        finally:
            own.unlink()
    return read_key(path)


def check_closed(url: str) -> None:
    """EngineError where a server answers a request that has no key, whatever its arguments have made of it."""
    try:
        answer = httpx.get(f"{url}/v1/models", timeout=30.0, trust_env=False)
    except httpx.TransportError as e:
        raise EngineError(f"the server at {url} does not answer: {reason(e)}") from None
    if answer.status_code != 401:
        raise EngineError(
            f"the server at {url} answers requests without the key of the run (HTTP {answer.status_code}, wanted 401); "
            "see whether rollout.server.extra_args starts further processes that listen, such as --tokenizer-worker-num"
        )
