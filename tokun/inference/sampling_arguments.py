"""The options of sampling as keyword arguments that editors, type checkers and `help` can list. `config.SamplingOptions` explains them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from tokun.config import SamplingOptions

Method = TypeVar("Method", bound=Callable[..., Any])


class SamplingArguments(TypedDict, total=False):
    """For type checkers: the fields of `SamplingOptions`, which has their defaults."""

    style: str
    subject: str
    thing: str
    register: str
    aspect: str
    prompt: str | None
    temperature: float | None
    text_temperature: float | None
    top_k: int | None
    top_p: float | None
    guidance_scale: float | None
    text_guidance_scale: float | None
    no_repeats: bool | None
    batch_size: int


def with_sampling_options(method: Method) -> Method:
    """The method, with a signature that names the options which it takes as **options. Calls do not change."""
    own = inspect.signature(method)
    named = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(SamplingOptions)
    ]
    method.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return method
