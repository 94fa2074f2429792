"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from tokun.utils.errors import MissingPackage


def need(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra provides it.

    Raises MissingPackage (an ImportError) naming the package and the pip command. Other import failures inside the package propagate.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        # "tokun" on PyPI is another project, so the command installs this folder
        raise MissingPackage(
            f"{module} is not installed. It comes with the extra '{extra}': in tokun's own folder, pip install -e '.[{extra}]'"
        ) from error
