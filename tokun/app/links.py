"""Links: the options of a print as parameters of the page's address, and back. Knows no models.

    ?seed=42&no=3&prompt=A+ship&temperature=0.8      sample 3 of seed 42
    ?seed=42&n=8                                     its samples 0 to 7
    ?seed=42&n=2&best=8                              of its samples 0 to 7 and 8 to 15 the best one each
    ?from=42&to=43&steps=8&step=3                    the third of eight steps from one seed to another

What is left out has its default. Anybody may have written a link: `demo.Studio` checks its values like those of the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

NUMBERS = ("seed", "no", "n", "best", "from", "to", "steps", "step", "temperature", "guidance")
TEXTS = ("prompt", "style", "subject", "thing", "register", "shape", "adapter")
WISHES = ("prompt", "style", "subject", "thing", "register", "shape", "temperature", "guidance", "adapter")

# the numbers' names in messages
SPOKEN = {
    "seed": "seed",
    "no": "number of the print",
    "n": "number of prints",
    "best": "number of candidates",
    "from": "first seed",
    "to": "last seed",
    "steps": "number of steps",
    "step": "step",
}


def link(values: Mapping[str, object], usual: Mapping[str, object] | None = None) -> str:
    """The parameters, without those that are None or have their `usual` value, which is "" by default."""
    usual = usual or {}
    kept = {
        name: f"{value:.15g}" if isinstance(value, float) else str(value)
        for name in (*(name for name in NUMBERS if name not in WISHES), *WISHES)
        if (value := values.get(name)) is not None and value != usual.get(name, "")
    }
    return f"?{urlencode(kept)}"


def read(parameters: Mapping[str, str]) -> dict[str, object]:
    """The options of a print in an address; empty for an address without any.
    What should be a number and is not stays text, which `Studio` refuses."""
    found: dict[str, object] = {name: parameters[name] for name in TEXTS if name in parameters}
    return {**found, **{name: _number(parameters[name]) for name in NUMBERS if name in parameters}}


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text
