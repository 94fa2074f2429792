"""Page: the counts -> the text of report.html. The layout is in templates/."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from data_tools.report.counting import MAX_NAME, Opener, Summary, thumbnail
from data_tools.report.reasons import EXPLANATIONS, KEEP_AMBIGUOUS, KEEP_REJECTED, UNKNOWN
from tokun.utils.optional_packages import need

REASON_SHEETS = 20  # reasons shown with pictures; others are only counted
COLOURS = ("kept", "ambiguous", "rejected")
STATUS_WORDS = {"rejected": "left out", "ambiguous": "unclear, left out by default", "kept": "kept, but doubtful"}


def page(summary: Summary, opener: Opener | None) -> Iterator[str]:
    """The text of the whole page, in pieces. Raises ImportError without jinja2."""
    ordered = sorted(summary.statuses.items(), key=lambda item: ((*COLOURS, item[0]).index(item[0]), item[0]))
    yield from (
        environment()
        .get_template("report.html")
        .generate(
            original=lambda name: thumbnail(opener(name)) if opener else b"",
            summary=summary,
            total=summary.total,
            statuses=[(status, colour(status), count) for status, count in ordered],
            reasons=[
                described(summary, *group, count) for group, count in sorted(summary.reasons.items(), key=lambda item: (-item[1], item[0]))
            ],
            kept=[summary.tiles.get(place, (b"", "")) for _, place in summary.kept.items()],
            originals=opener is not None,
            REASON_SHEETS=REASON_SHEETS,
        )
    )


@functools.cache
def environment() -> Any:
    """The templates, each compiled once."""
    jinja2 = need("jinja2", extra="data")
    made = jinja2.Environment(loader=jinja2.PackageLoader("data_tools.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {
        "shown": shown, "options_as_code": options_as_code, "share": share, "plural": plural, "short": short,
        "base64": lambda data: base64.b64encode(data).decode(),
    }  # fmt: skip
    return made


def described(summary: Summary, status: str, reason: str, count: int) -> dict[str, Any]:
    """What the page says about one reason."""
    meaning, advice = EXPLANATIONS.get(reason, UNKNOWN)
    if status == "rejected":  # --keep-ambiguous would not keep these
        advice = advice.replace(KEEP_AMBIGUOUS, KEEP_REJECTED)
    elif status == "kept":
        advice = ""
    digest = hashlib.sha256(f"{status}/{reason}".encode("utf-8", "replace")).hexdigest()
    return {
        "reason": reason, "status": STATUS_WORDS.get(status, status), "colour": colour(status), "count": count, "meaning": meaning,
        "advice": advice, "anchor": f"r{digest[:10]}", "examples": summary.samples[(status, reason)].items(),
    }  # fmt: skip


def colour(status: str) -> str:
    """The CSS class of a status."""
    return status if status in COLOURS else "rejected"


def shown(value: object) -> Any:
    """Any text as Markup: shortened, escaped, with control and direction characters made visible."""
    words = str(value)
    words = words if len(words) <= MAX_NAME else words[: MAX_NAME - 1] + "…"
    words = "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in words)
    return need("markupsafe", extra="data").Markup(html.escape(words))


def options_as_code(words: str) -> Any:
    """Our own text as Markup, with --options set as code."""
    return need("markupsafe", extra="data").Markup(re.sub(r"--[a-z-]+", r"<code>\g<0></code>", html.escape(words)))


def share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "–"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"
