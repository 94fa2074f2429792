"""Is the Hugging Face Hub within reach? Asked once and quickly, before a library tries it for a minute. Knows no model.

    with fetched("name/model", "--checkpoint"):
        path = huggingface_hub.snapshot_download("name/model")

Where the Hub does not answer within SECONDS, its libraries are told to look into their cache alone, and what is not there is one clear error.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 5.0
MISSING = re.compile(r"[Cc]an't load|couldn't (?:connect|find|reach)|does not appear to have|not cached")  # in OSErrors of transformers
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
OFFLINE = "HF_HUB_OFFLINE"  # the libraries' own switch, read by each when it is imported
SWITCHES = (("huggingface_hub.constants", OFFLINE), ("datasets.config", OFFLINE), ("datasets.config", "HF_DATASETS_OFFLINE"))
_answered: set[str] = set()


class NotFetched(FileNotFoundError):
    """Something is not here, and the place to fetch it from is not reached."""


def out_of_reach(address: str) -> str:
    """Why a server does not answer; "" where it does, whatever it says. Goes through the proxies of the environment, as the libraries do.

    One that has answered is not asked again.
    """
    if address in _answered:
        return ""
    found = ["it did not answer"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
            found[0] = ""
        except urllib.error.HTTPError as error:  # it is there, and refuses
            error.close()
            found[0] = ""
        except (OSError, ValueError) as error:
            reason: Any = getattr(error, "reason", error)
            found[0] = (
                "" if isinstance(reason, ssl.SSLError) else str(reason) or type(reason).__name__
            )  # certificates are the libraries' own

    asking = threading.Thread(target=ask, daemon=True)  # finding an address has no time limit of its own
    asking.start()
    asking.join(SECONDS + 0.5)
    if not found[0]:
        _answered.add(address)
    return found[0]


@contextlib.contextmanager
def fetched(name: str | Path, option: str, *, repo_type: str = "model") -> Iterator[None]:
    """Within the block libraries fetch `name` (no folder here) from the Hub, or find it in their cache where the Hub is out of reach.

    `option` is what named it. Raises NotFetched (a FileNotFoundError) where it is in neither place (`is_missing`); what else is wrong is raised as it is.
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
                f"{option} {name} is no folder here and not in the cache, and the Hub ({constants.ENDPOINT}) is not reached: {why}. To work offline, "
                f"fetch it where there is a network (hf download {name}{'' if repo_type == 'model' else f' --repo-type {repo_type}'} --local-dir FOLDER), bring the folder here and give its path"
            ) from error


def is_missing(error: BaseException | None) -> bool:
    """Whether an error says that something is not in the cache and cannot be fetched: it, or one that it was raised from or during.

    huggingface_hub's LocalEntryNotFoundError is a FileNotFoundError, its OfflineModeIsEnabled a ConnectionError; transformers says it in words alone.
    """
    while error is not None:
        if isinstance(error, (FileNotFoundError, ConnectionError)) or (isinstance(error, OSError) and MISSING.search(str(error))):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def downloaded(name: str, what: str) -> Path:
    """The folder of a model repository ("owner/name") of the Hub, from the cache or the network. `what` names it in messages: "checkpoint".

    Raises FileNotFoundError where `name` is no such id, or is neither in the cache nor to be had.
    """
    if "/" not in name or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{what} {name!r} is neither a folder here nor a Hugging Face Hub id such as 'owner/name'")
    import huggingface_hub

    try:
        with fetched(name, f"the {what}"):
            return Path(huggingface_hub.snapshot_download(name))
    except NotFetched:
        raise
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(f"{what} {name!r} is not a folder here and could not be downloaded from the Hub: {error}") from error


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within the block the Hub's libraries ask nobody, those that are imported and those that will be."""
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
