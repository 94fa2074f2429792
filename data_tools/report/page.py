"""Page: what was counted -> the lines of report.html."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import unicodedata
from collections.abc import Iterator

from data_tools.report.counting import MAX_NAME, Histogram, Opener, Summary, thumbnail
from data_tools.report.reasons import EXPLANATIONS, KEEP_AMBIGUOUS, KEEP_REJECTED, UNKNOWN

REASON_SHEETS = 20  # further reasons are counted, without pictures


def text(value: object, limit: int = MAX_NAME) -> str:
    """Any text for the page: short, escaped, with control characters and turned writing made visible."""
    words = str(value)
    words = words if len(words) <= limit else words[: limit - 1] + "…"
    words = "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in words)
    return html.escape(words, quote=True)


def with_code(words: str) -> str:
    """Our own words for the page, their --options set as code."""
    return re.sub(r"--[a-z-]+", r"<code>\g<0></code>", html.escape(words))


def share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "–"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


STYLE = """
:root { --ink: #26221e; --soft: #6d655c; --line: #ded8cf; --paper: #fbf9f5; --kept: #3f6b52; --ambiguous: #c08a2d; --rejected: #a8483a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 Georgia, "Times New Roman", serif; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.35rem; margin: 2.6rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 2rem 0 .2rem; } p { margin: .3rem 0 .7rem; max-width: 46rem; } a { color: inherit; }
code { white-space: nowrap; } .soft { color: var(--soft); } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.share { display: flex; height: 1.5rem; margin: 1rem 0 .4rem; border-radius: 4px; overflow: hidden; background: var(--line); }
.kept { background: var(--kept); } .ambiguous { background: var(--ambiguous); } .rejected { background: var(--rejected); }
.dot { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin-right: .35rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .95rem; } th, td { text-align: left; padding: .35rem .7rem .35rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: normal; color: var(--soft); } th.number { text-align: right; }
.charts { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; } figure { margin: 0; } svg { max-width: 100%; height: auto; } svg text { font: 11px Georgia, serif; fill: var(--soft); }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem .9rem; margin: .8rem 0; }
.tile { width: 160px; font-size: .78rem; line-height: 1.3; overflow-wrap: anywhere; }
.frame { height: 150px; display: flex; align-items: center; justify-content: center; background: #fff; border: 1px solid var(--line); margin-bottom: .3rem; padding: 2px; text-align: center; color: var(--soft); }
.frame img { max-width: 100%; max-height: 144px; }
"""


def bar_chart(histogram: Histogram, *, both: bool) -> str:
    """Inline SVG: one bar for each stretch between edges, kept below and left out above."""
    width, height, base, step = 520, 172, 150, 520 / len(histogram.labels)
    most = max([1, *(histogram.kept[i] + histogram.others[i] for i in range(len(histogram.labels)))])
    parts = []
    for index, label in enumerate(histogram.labels):
        left, bottom = index * step + 2, float(base)
        for counts, colour in ((histogram.kept, "#3f6b52"), (histogram.others, "#cfc6b8")):
            tall = counts[index] / most * 125
            bottom -= tall
            parts.append(f'<rect x="{left:.1f}" y="{bottom:.1f}" width="{step - 4:.1f}" height="{tall:.1f}" fill="{colour}"/>')
        count = histogram.kept[index] + histogram.others[index]
        if count:
            parts.append(f'<text x="{left + step / 2 - 2:.1f}" y="{bottom - 4:.1f}" text-anchor="middle">{short(count)}</text>')
        parts.append(f'<text x="{left + step / 2 - 2:.1f}" y="{base + 15}" text-anchor="middle">{html.escape(label)}</text>')
    legend = " Green: kept. Gray: left out." if both else ""
    return (
        f'<figure><figcaption>{html.escape(histogram.title)}<span class="soft">.{legend} Each bar runs from its number to the next.</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-size="11" role="img" aria-label="{html.escape(histogram.title)}">'
        f'<line x1="0" y1="{base}" x2="{width}" y2="{base}" stroke="#ded8cf"/>{"".join(parts)}</svg></figure>'
    )


def short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"


def tile(picture: bytes, words: str, details: str = "", *, missing: str) -> str:
    """One picture with the words beneath it; a note in its place where it cannot be shown. Takes HTML."""
    if picture:
        inside = f'<img src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}" alt="{words}">'
    else:
        inside = missing
    return f'<div class="tile"><div class="frame">{inside}</div><bdi>{words}</bdi>{details}</div>'


def overview(summary: Summary) -> list[str]:
    total = summary.total
    parts, legend = [], []
    for status in sorted(summary.statuses, key=lambda status: ("kept", "ambiguous", "rejected", status).index(status)):
        name = status if status in ("kept", "ambiguous", "rejected") else "rejected"
        parts.append(f'<div class="{name}" style="width:{100 * summary.statuses[status] / max(1, total):.2f}%"></div>')
        words = f"{text(status)} {summary.statuses[status]:,} ({share(summary.statuses[status], total)})"
        legend.append(f'<span class="dot {name}"></span>{words}&emsp;')
    kept = summary.kept.seen
    splits = ", ".join(f"{count:,} for {'training' if name == 'train' else text(name)}" for name, count in sorted(summary.pairs.items()))
    lines = [
        "<h1>What became of the pictures</h1>",
        f"<p>Of {plural(total, 'file')}, <b>{plural(kept, 'picture')}</b> ({share(kept, total)}) became pairs of a picture and its caption. "
        "Every other file is accounted for below, with the reason, some examples, and what can be done about it.</p>",
        f'<div class="share">{"".join(parts)}</div><p>{"".join(legend)}</p>',
    ]
    if splits:
        lines.append(f'<p class="soft">The shards hold {splits}; {summary.bytes / 1e6:,.1f} MB in all.</p>')
    if summary.damaged:
        names = ", ".join(text(name) for name in summary.damaged[:10])
        lines.append(f"<p><b>{plural(len(summary.damaged), 'shard')} could not be read to the end:</b> {names}. Run prepare again.</p>")
    return lines


STATUS_WORDS = {
    "rejected": "left out",
    "ambiguous": "unclear, left out by default",
    "kept": "kept, with a doubt",
}


def ordered_reasons(summary: Summary) -> list[tuple[tuple[str, str], int]]:
    return sorted(summary.reasons.items(), key=lambda item: (-item[1], item[0]))


def anchor(status: str, reason: str) -> str:
    return "r" + hashlib.sha256(f"{status}/{reason}".encode("utf-8", "replace")).hexdigest()[:10]


def reason_table(summary: Summary) -> list[str]:
    if not summary.reasons:
        return ["<h2>Left out</h2><p>Nothing was left out.</p>"]
    lines = [
        "<h2>Left out, by reason</h2>",
        '<table><tr><th>reason</th><th class="number">files</th><th class="number">share</th><th>what it means</th></tr>',
    ]
    for (status, reason), count in ordered_reasons(summary):
        name = status if status in ("ambiguous", "kept") else "rejected"
        meaning = EXPLANATIONS.get(reason, UNKNOWN)[0]
        lines.append(
            f'<tr><td><span class="dot {name}"></span><a href="#{anchor(status, reason)}">{text(reason)}</a><br>'
            f'<span class="soft">{text(STATUS_WORDS.get(status, status))}</span></td><td class="number">{count:,}</td>'
            f'<td class="number">{share(count, summary.total)}</td><td>{html.escape(meaning)}</td></tr>'
        )
    return [*lines, "</table>"]


def charts(summary: Summary) -> list[str]:
    return [
        "<h2>Sizes, shapes and captions</h2>",
        f'<div class="charts">{bar_chart(summary.size, both=True)}{bar_chart(summary.aspect, both=True)}{bar_chart(summary.length, both=False)}</div>',
        '<p class="soft">Sizes are those of the files as found. Files that could not be opened have none and are not drawn.</p>',
    ]


def kept_sheet(summary: Summary) -> list[str]:
    items = summary.kept.items()
    if not items:
        return ["<h2>Kept</h2><p>No picture was kept.</p>"]
    few = len(items) < summary.kept.seen
    some = f"{plural(len(items), 'picture')} drawn by lot from all that were kept," if few else "All that were kept,"
    lines = [
        f"<h2>Kept{': a look at some of them' if few else ''}</h2>",
        f"<p>{some} each with its caption. Does each caption fit its picture? Are there pictures that do not belong to the collection?</p>",
        '<div class="sheet">',
    ]
    for _, place in items:
        picture, caption = summary.tiles.get(place, (b"", ""))
        lines.append(tile(picture, text(caption or "(no caption)"), missing="not found in the shards"))
    return [*lines, "</div>"]


def reason_sheets(summary: Summary, opener: Opener | None) -> Iterator[str]:
    for index, ((status, reason), count) in enumerate(ordered_reasons(summary)):
        meaning, advice = EXPLANATIONS.get(reason, UNKNOWN)
        if status == "rejected":  # --keep-ambiguous would not bring these back
            advice = advice.replace(KEEP_AMBIGUOUS, KEEP_REJECTED)
        yield f'<h3 id="{anchor(status, reason)}">{text(reason)} <span class="soft">– {plural(count, "file")}, {text(STATUS_WORDS.get(status, status))}</span></h3>'
        yield f"<p>{html.escape(meaning)} <b>What to do:</b> {with_code(advice)}</p>"
        if index >= REASON_SHEETS:
            continue
        items = summary.samples[(status, reason)].items()
        if count > len(items):
            yield f'<p class="soft">{len(items)} of them, drawn by lot:</p>'
        yield '<div class="sheet">'
        for name, details in items:
            picture = thumbnail(opener(name)) if opener else b""
            missing = "cannot be shown" if opener else "original not at hand"
            yield tile(picture, text(name), "".join(f'<br><bdi class="soft">{text(one)}</bdi>' for one in details if one), missing=missing)
        yield "</div>"


def settings_table(summary: Summary) -> list[str]:
    if not summary.settings:
        return []
    rows = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in sorted(summary.settings.items()))
    return ["<h2>How it was made</h2>", "<p>The settings of <code>python -m data_tools.prepare</code>:</p>", f"<table>{rows}</table>"]


def page(summary: Summary, opener: Opener | None) -> Iterator[str]:
    """The lines of the whole page."""
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>What became of the pictures</title>'
    yield f"<style>{STYLE}</style>\n</head>\n<body>"
    yield from overview(summary)
    yield from reason_table(summary)
    yield from kept_sheet(summary)
    yield from charts(summary)
    if summary.reasons:
        yield "<h2>Left out: examples of each reason</h2>"
        if opener is None:
            yield (
                '<p class="soft">The originals were not at hand when this page was written. To see them here, run '
                "<code>python -m data_tools.report SHARDS --source FOLDER</code>.</p>"
            )
    yield from reason_sheets(summary, opener)
    yield from settings_table(summary)
    yield "</body>\n</html>"
