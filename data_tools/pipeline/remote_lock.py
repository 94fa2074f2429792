"""The lock of an output folder, on disk (tokun/utils/lock.py) or in object storage: an object OUT/.lock that names its holder.

No kernel releases an object when its holder is killed, so it counts only while it is fresh. The holder renews it every RENEW seconds. It
is taken over if it has not been renewed for STALE seconds, or if its holder ran on this machine and is gone. If two begin at once, a
storage that can create an object exclusively (S3, Google Cloud Storage and others) refuses one of them; elsewhere each waits SETTLE
seconds and reads whose the object is. The clocks of the machines must agree within a minute or two.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.pipeline.storage_backends import RemoteStore, Store
from data_tools.readers.storage import storage_errors
from tokun.utils import lock

RENEW, STALE, SETTLE = 30.0, 300.0, 2.0


@contextmanager
def alone_in(store: Store, *, option: str = "--out") -> Iterator[Callable[[], None]]:
    """Lock the folder within the block, and hand out a function that raises InUse if another process has taken it over meanwhile.

    Raises InUse (a UserError) naming the holder if another process has it.
    """
    if not isinstance(store, RemoteStore):
        with lock.alone_in(Path(store.place), option=option):
            yield lambda: None
        return
    own = {**lock.this_process(), "id": uuid.uuid4().hex}
    acquire(store, own, option)
    over, taken = threading.Event(), list[dict[str, Any]]()
    thread = threading.Thread(target=renew, args=(store, own, over, taken), daemon=True)
    thread.start()

    def still_ours() -> None:
        there = read(store)
        if taken or there.get("id") != own["id"]:  # also none: whoever took it over may have ended since
            raise lock.InUse(f"the lock of {store} was taken over: {lock.in_use(store, (taken or [there])[0], option)}")

    try:
        yield still_ours
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(*storage_errors()):
            if read(store).get("id") == own["id"]:
                store.remove(lock.NAME)


def acquire(store: RemoteStore, own: dict[str, Any], option: str) -> None:
    """Write this process into the lock. Raises InUse if another holds it."""
    there = read(store)
    if there and not is_stale(there):
        raise lock.InUse(refusal(store, there, option))
    if not create(store, stamped(own), over=bool(there)):
        time.sleep(SETTLE)
    there = read(store)
    if there.get("id") != own["id"]:
        raise lock.InUse(refusal(store, there, option))


def create(store: RemoteStore, record: bytes, *, over: bool) -> bool:
    """Write the lock, if possible only where there is none; `over`: replace a stale one. Returns whether the
    storage itself decides who is first, so that there is nothing to wait for."""
    if over:
        store.write(lock.NAME, record)
        return False
    files, url = store.files(), store.url(lock.NAME)
    files.makedirs(store.place, exist_ok=True)
    try:
        files.pipe_file(url, record, mode="create")
    except FileExistsError:
        return True
    except (TypeError, NotImplementedError):
        store.write(lock.NAME, record)
        return False
    return True


def renew(store: RemoteStore, own: dict[str, Any], over: threading.Event, taken: list[dict[str, Any]]) -> None:
    """Renew the lock until it is over, or taken by another process."""
    while not over.wait(RENEW):
        with contextlib.suppress(*storage_errors()):  # a network that fails for a moment: again at the next turn
            there = read(store)
            if there.get("id") != own["id"]:
                taken.append(there)
                return
            store.write(lock.NAME, stamped(own))


def read(store: RemoteStore) -> dict[str, Any]:
    """The holder in the lock; {} if there is none, or it is unreadable."""
    store.files().invalidate_cache()
    try:
        found = json.loads(store.read(lock.NAME))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stamped(own: dict[str, Any]) -> bytes:
    return json.dumps({**own, "renewed": time.time()}).encode()


def is_stale(holder: dict[str, Any]) -> bool:
    """Whether a lock may be taken over: its holder is gone, or has not renewed it for STALE seconds."""
    renewed = holder.get("renewed")
    return lock.is_gone(holder) or not isinstance(renewed, (int, float)) or time.time() - renewed > STALE


def refusal(store: RemoteStore, holder: dict[str, Any], option: str) -> str:
    return (
        f"{lock.in_use(store, holder, option)}. If that process no longer runs, its lock ends {STALE / 60:g} minutes "
        f"after its last renewal; or delete {store.url(lock.NAME)}"
    )
