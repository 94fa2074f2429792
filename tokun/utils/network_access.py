"""Is the Hugging Face Hub reachable? Checked once and quickly, before a library tries for a minute. Knows no model.

    with fetched("name/model", "--checkpoint"):
        path = huggingface_hub.snapshot_download("name/model")

If the Hub does not answer within SECONDS, its libraries use their cache alone, and whatever is missing there gives one clear error.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SECONDS = 5.0
SHOWN = 6  # names of a folder's content in a message
MISSING = re.compile(r"[Cc]an't load|couldn't (?:connect|find|reach)|does not appear to have|not cached")  # in transformers' OSErrors
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
OFFLINE = "HF_HUB_OFFLINE"  # the libraries' own switch, read when they are imported
SWITCHES = (("huggingface_hub.constants", OFFLINE), ("datasets.config", OFFLINE), ("datasets.config", "HF_DATASETS_OFFLINE"))
_answered: set[str] = set()


class NotFetched(FileNotFoundError):
    """Something is not on this machine, and the server to fetch it from is unreachable."""


def out_of_reach(address: str) -> str:
    """Why a server does not answer; "" if it does, with any status. Uses the environment's proxies, as the libraries do.

    A server that has answered is not asked again.
    """
    if address in _answered:
        return ""
    found = ["it did not answer"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
            found[0] = ""
        except urllib.error.HTTPError as error:  # reachable, but it refuses
            error.close()
            found[0] = ""
        except (OSError, ValueError) as error:
            reason: Any = getattr(error, "reason", error)
            # the libraries have certificates of their own
            found[0] = "" if isinstance(reason, ssl.SSLError) else str(reason) or type(reason).__name__

    asking = threading.Thread(target=ask, daemon=True)  # name resolution has no timeout of its own
    asking.start()
    asking.join(SECONDS + 0.5)
    if not found[0]:
        _answered.add(address)
    return found[0]


@contextlib.contextmanager
def fetched(name: str | Path, option: str, *, repo_type: str = "model") -> Iterator[None]:
    """Within the block, libraries fetch `name` (not a local folder) from the Hub, or from their cache if the Hub is unreachable.

    `option` is the option that named it. Raises NotFetched (a FileNotFoundError) if it is in neither (`is_missing`). Other errors
    propagate.
    """
    if Path(name).exists() or not HUB_ID.fullmatch(str(name)):
        yield
        return
    from huggingface_hub import constants

    why = f"{OFFLINE} is set" if constants.HF_HUB_OFFLINE else out_of_reach(constants.ENDPOINT)
    if not why:
        yield
        return
    with offline():
        try:
            yield
        except Exception as error:
            if not is_missing(error):
                raise
            raise NotFetched(
                f"{option} {name}{near(name)} is neither a local folder nor in the cache, and the Hub ({constants.ENDPOINT}) is "
                f"unreachable: {why}. To work offline, "
                f"fetch it on a machine with a network (hf download {name}{'' if repo_type == 'model' else f' --repo-type {repo_type}'} "
                "--local-dir FOLDER), copy the folder here and give its path"
            ) from error


def near(name: str | Path, known: Sequence[str] = ()) -> str:
    """ " (did you mean runs/mine?)" if a name in `known`, or something in the folder that should hold `name`, is similar; what that folder
    holds if it is there and nothing is; else ""."""
    folder, last = Path(name).parent, Path(name).name
    held = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []
    here = {name: str(folder / name) for name in held} | {name: name for name in known}
    found = difflib.get_close_matches(str(name), known, 1) or difflib.get_close_matches(last, list(here), 1)
    if found:
        return f" (did you mean {here[found[0]]}?)"
    if folder == Path(".") or not folder.is_dir():
        return ""
    more = ", …" if len(held) > SHOWN else ""
    return f" ({folder} holds {', '.join(held[:SHOWN]) or 'nothing'}{more})"


def is_missing(error: BaseException | None) -> bool:
    """Whether an error, its cause or its context says that something is not in the cache and cannot be fetched.

    huggingface_hub's LocalEntryNotFoundError is a FileNotFoundError, its OfflineModeIsEnabled a ConnectionError; transformers only says so
    in its message.
    """
    while error is not None:
        if isinstance(error, (FileNotFoundError, ConnectionError)) or (isinstance(error, OSError) and MISSING.search(str(error))):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def downloaded(name: str, what: str, known: Sequence[str] = ()) -> Path:
    """The local folder of a Hub model repository ("owner/name"), from the cache or the network. `what` names it in messages: "checkpoint";
    `known` are names that could have been given.

    Raises FileNotFoundError if `name` is not such an id, or can be neither found in the cache nor downloaded.
    """
    if "/" not in name or not HUB_ID.fullmatch(name):
        there = f". Known here: {', '.join(known)}" if known else ""
        raise FileNotFoundError(
            f"{what} {name!r}{near(name, known)} is neither a local folder nor a Hugging Face Hub id such as 'owner/name'{there}"
        )
    import huggingface_hub

    try:
        with fetched(name, f"the {what}"):
            return Path(huggingface_hub.snapshot_download(name))
    except NotFetched:
        raise
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(f"{what} {name!r} is not a local folder and could not be downloaded from the Hub: {error}") from error


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within the block, the Hub's libraries use no network, whether already imported or imported later."""
    before = os.environ.get(OFFLINE)
    switches = [
        (sys.modules[module], switch) for module, switch in SWITCHES if module in sys.modules and hasattr(sys.modules[module], switch)
    ]
    values = [getattr(module, switch) for module, switch in switches]
    os.environ[OFFLINE] = "1"
    for module, switch in switches:
        setattr(module, switch, True)
    try:
        yield
    finally:
        for (module, switch), value in zip(switches, values):
            setattr(module, switch, value)
        if before is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = before
