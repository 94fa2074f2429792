"""Optional packages, imported where they are used. Knows which extra of tokun brings which package."""

from __future__ import annotations

import importlib
from types import ModuleType

from tokun.utils.errors import MissingPackage


def need(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises MissingPackage (an ImportError) naming the package and the pip command; any other import failure inside the package passes through.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        # the name on PyPI is another project's, so it is this folder that is installed
        raise MissingPackage(
            f"{module} is not installed. It comes with the extra '{extra}': in tokun's own folder, pip install -e '.[{extra}]'"
        ) from error
