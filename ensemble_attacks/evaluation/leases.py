"""Tell who is at work on a run, on this machine and on others: a mark is a lease, which its process renews."""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ensemble_attacks.evaluation.units import canonical
from ensemble_attacks.files import alive, machine, write_whole

HEARTBEAT, LEASE = (
    15.0,
    300.0,
)  # seconds: a process at work touches its mark so often; so long without a touch, it is no more


def sealed(content: dict[str, Any]) -> bytes:
    """Return content as JSON with its own checksum, which tells damage, and not who wrote it."""
    return json.dumps(content | {"sha256": sha256(canonical(content)).hexdigest()}, indent=1).encode() + b"\n"


@contextmanager
def lease(folder: Path, name: str, content: dict[str, Any]) -> Iterator[None]:
    """Keep a mark of this process's own in a folder, and touch it every `HEARTBEAT` seconds, within the context."""
    mark = folder / f"{name}.{secrets.token_hex(8)}.json"
    here = {"host": platform.node(), "machine": machine(), "pid": os.getpid(), "parent": os.getppid()}
    write_whole(mark, sealed({**content, **here, "since": time.time()}))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(mark)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        mark.unlink(missing_ok=True)


def lives(path: Path, mark: dict[str, Any]) -> bool:
    """Tell whether the process that keeps a mark still is: it touched it not long ago and, on this machine, is there."""
    try:
        idle = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return False
    return idle < LEASE and (mark.get("machine") != machine() or alive(mark["pid"]))
