"""One writer for a folder: `hold_folder` fails where another process, on this host or another, holds it.

The lock is flock on FOLDER/.lock, which the kernel gives back however its holder ends. Some shared file systems have no
flock (Lustre without `-o flock`, some FUSE ones). There the holder keeps FOLDER/.lease and renews it every few seconds;
one that is not renewed any more, because its holder is gone, is taken over. Renewal is seen, not computed from clocks,
which differ between hosts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Literal, Self

RENEW_S = 5.0
GIVEN_UP_S = 4 * RENEW_S  # a lease that is not renewed for so long has no holder
NO_FLOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


class FolderInUseError(ValueError):
    """Another process holds the folder."""


class HeldFolder:
    """A folder that this process holds until `close`, or until it ends."""

    def __init__(self, kind: Literal["flock", "lease"], descriptor: int = -1, lease: Path | None = None) -> None:
        self.kind = kind
        self._descriptor, self._lease = descriptor, lease
        self._closed = threading.Event()
        if lease is not None:
            self._text = lease.read_text(encoding="ascii")
            threading.Thread(target=self._renew, name="folder-lease", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back. May be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._lease is None:
            os.close(self._descriptor)
        elif _read(self._lease)[0] == self._text:
            self._lease.unlink(missing_ok=True)

    def _renew(self) -> None:
        assert self._lease is not None
        while not self._closed.wait(RENEW_S):
            try:
                os.utime(self._lease)
            except OSError:  # taken from us while we slept, or the file system is away for a moment
                continue


def hold_folder(folder: Path) -> HeldFolder:
    """Hold `folder`, which exists, for this process alone. FolderInUseError where another has it; OSError.

    Where flock is missing, it takes GIVEN_UP_S to take over what a killed process has left.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FolderInUseError(f"{folder} is in use by another process") from None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in NO_FLOCK:
            raise
        return _take_lease(folder / ".lease")
    return HeldFolder("flock", descriptor)


def _take_lease(path: Path) -> HeldFolder:
    text = f"{os.uname().nodename} {os.getpid()} {uuid.uuid4().hex}\n"
    deadline = None
    seen = _read(path)
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            now = _read(path)
            deadline = deadline or time.monotonic() + GIVEN_UP_S
            if now != seen and now[0]:
                raise FolderInUseError(f"{path.parent} is in use by {_holder(now[0])}") from None
            if time.monotonic() > deadline:
                path.unlink(missing_ok=True)
            else:
                time.sleep(min(0.2, RENEW_S / 10))
            continue
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        time.sleep(min(0.5, RENEW_S / 10))  # of two who found the same dead lease, the second to remove it has it
        if _read(path)[0] != text:
            raise FolderInUseError(f"{path.parent} is in use by another process")
        return HeldFolder("lease", lease=path)


def _read(path: Path) -> tuple[str, int]:
    """(text, time of the last renewal) of a lease; opening it asks the file server, not the cache of this host."""
    try:
        with path.open(encoding="ascii") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return "", 0


def _holder(text: str) -> str:
    host, pid, *_ = text.split()
    return f"process {pid} of {host}"
