"""Report: one page that shows what was kept, what was left out, and why, for a reader who does not program.

    python -m data_tools.report shards/ --source my-pictures/

Writes `report.html` beside the shards, from their manifest. The page holds everything in itself (pictures too), needs no
network and no scripts, and stays below a few megabytes for a collection of any size. Equal input gives equal bytes.
Memory does not grow with the collection: tables are read in pieces, samples are drawn by a hash of the path.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import hashlib
import heapq
import html
import io
import json
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from data_tools.pictures import PictureError, decode
from tokun.data import tars
from tokun.utils.extras import need

NAME = "report.html"
MANIFEST = "manifest.parquet"
RECORD = "prepare.json"

KEPT_TILES = 48
REASON_TILES = 24
REASON_SHEETS = 20  # further reasons are counted, without pictures
THUMBNAIL = 144  # pixels of the long side
MAX_BYTES = 64 * 2**20  # of a picture file that is opened for its thumbnail
MAX_NAME = 160  # characters of a file name or caption on the page

Opener = Callable[[str], "bytes | None"]


# ---------------------------------------------------------------------------------------------------------------------
# what the reasons mean

UNREADABLE = "Open the file in a picture viewer. If it is broken there too, fetch or scan it again; otherwise save it as PNG or JPEG."
NOT_OPENED = "Put the picture itself into the folder, and run again."
KEEP_AMBIGUOUS = "Look through the pictures below. If they belong to the collection, run prepare again with --keep-ambiguous."
KEEP_REJECTED = "Right for most. Pictures that are worth keeping can be prepared from a folder of their own with --no-clean."
EXPLANATIONS: dict[str, tuple[str, str]] = {
    "no caption": (
        "Nothing was found that says what the picture shows.",
        "Write one line about it into a text file of the same name beside it (wolf.jpg, wolf.txt), or into a table captions.csv.",
    ),
    "caption is only a label": (
        "The only words beside the picture are a number or a kind of picture, such as “Fig. 12” or “Frontispiece”.",
        "Write a caption that says what it shows, as a text file beside the picture or in captions.csv.",
    ),
    "caption too short": ("The words beside the picture are too few to say anything.", "Write a longer caption for it."),
    "caption too long": (
        "The words beside the picture are a passage and not a caption; they would have been cut in the middle.",
        "Shorten the caption by hand where the picture is worth it.",
    ),
    "caption is a list": (
        "The words beside the picture look like a table of contents or an index.",
        "Give the picture a caption of its own, or leave it out.",
    ),
    "caption is a heading": (
        "The words beside the picture look like the number and title of a chapter; such titles seldom say what is shown.",
        "Write a caption for the pictures that are worth it, or run prepare again with --keep-ambiguous.",
    ),
    "caption is a fragment": (
        "The words beside the picture begin or end in the middle of a sentence.",
        "Mend the caption, in a text file beside the picture or in captions.csv.",
    ),
    "caption file cannot be read": (
        "A file with the caption lies beside the picture, and it is damaged or not of a kind that is read.",
        "Open it in a text editor and save it again as plain text (UTF-8), or remove it.",
    ),
    "too small": (
        "The picture has too few pixels: most often an initial, an ornament or a thumbnail.",
        "Find a larger scan, or lower --min-side if small pictures are wanted.",
    ),
    "too long": (
        "The picture is a narrow strip: a headpiece, a banner, a panorama.",
        "Raise --max-aspect if strips are wanted; a panorama can also be cut into several pictures.",
    ),
    "blank": ("An empty page, or one even tone.", "Nothing to do, unless the scan failed."),
    "nearly blank": ("Almost all of it is empty paper, or solid black.", "Crop it to its content if there is something in it."),
    "colour plate": (
        "The picture is in colours, and the collection is to be one of prints in black.",
        "Right for most. Convert a hand-coloured print to gray by hand if its lines are good.",
    ),
    "photograph": (
        "Its tones flow without lines, as in a photograph or a half-tone reproduction of a painting.",
        "Judge by eye whether it is a print. " + KEEP_AMBIGUOUS,
    ),
    "text page": ("Lines of lettering fill much of it: a page of text, a title page, a handwriting.", KEEP_AMBIGUOUS),
    "ornament or initial": (
        "A decorated letter, a tailpiece or another ornament, by its smallness or by its caption.",
        "Right for most. Give it a caption of some words if it shows a scene.",
    ),
    "map": ("A map, a chart or a plan, mostly told by its caption.", KEEP_AMBIGUOUS),
    "music": ("Printed music: staves of five lines.", "Right for most. A ruled sky or a building can be mistaken; keep those by hand."),
    "diagram": ("A section, a scheme, a figure keyed by letters or a puzzle, as its caption says.", KEEP_AMBIGUOUS),
    "another medium": ("A model that compares pictures with words takes it for something else than the style asked for.", KEEP_AMBIGUOUS),
    "ornament of the style sheet": (
        "The page of the book uses it for its design, not as an illustration: most often an initial.",
        "Right for most. A picture worth keeping can be put into a folder of its own with a caption.",
    ),
    "not shown in the book": (
        "The file lies in the book's folder, and no page shows it.",
        "Nothing to do, or put it into a folder of its own with a caption.",
    ),
    "other style": ("The picture belongs to another class than the one asked for.", "Nothing to do, or ask for its class with --style."),
    "in no class folder": ("The picture lies outside the folders that name the classes.", "Move it into the folder of its class."),
    "exact duplicate": ("The very same file is there more than once; one copy was kept.", "Nothing to do."),
    "near duplicate": (
        "It looks the same as another picture that was kept: a second scan, another size.",
        "Nothing to do, unless two plates are truly different and alike; then remove the one you do not want.",
    ),
    "thumbnail": ("A small version of another picture in the collection; the large one is used.", "Nothing to do."),
    "too like a picture for training": (
        "It was drawn for validation, and looks so much like a training picture that it would be no fair test.",
        "Nothing to do.",
    ),
    "empty file": ("The file has no content.", "Fetch it again."),
    "not a picture that can be read": ("The file is no picture, or of a kind that is not read.", UNREADABLE),
    "truncated or damaged": ("The file breaks off, or its data are damaged.", UNREADABLE),
    "colours cannot be read": ("The picture's colours are stored in a way that could not be understood.", UNREADABLE),
    "too many pixels": ("The picture is so large that opening it could exhaust the machine.", "Save a smaller version of it."),
    "file too large": ("The file is larger than what is opened.", "Save a smaller version of it."),
    "cannot be read": ("The disk did not hand the file out.", "Check the permissions of the file and the health of the disk."),
    "folder cannot be read": ("The folder could not be entered, so nothing inside was seen.", "Check the permissions of the folder."),
    "symlink leaves the source": ("A link that points out of the folder; it is not followed, for safety.", NOT_OPENED),
    "path leaves the source": ("The list names a file outside the folder of the collection; it is not opened, for safety.", NOT_OPENED),
    "missing file": ("The list or the page names a file that is not there.", NOT_OPENED),
    "a web address, not a file": ("The list gives an address on the web; nothing is fetched from there.", NOT_OPENED),
    "symlink to a folder": ("A link to another folder; it is not followed, or pictures would come twice.", NOT_OPENED),
    "broken symlink": ("A link to something that is not there.", NOT_OPENED),
    "not a regular file": ("A device or a pipe with the name of a picture.", "Remove it from the folder."),
    "changed while being read": ("The file changed during the run.", "Run again when nothing writes into the folder."),
}
UNKNOWN = ("This page has no further words for this reason.", "Look at the pictures and file names below.")


FAMILIES = tuple(
    (re.compile(pattern, re.S), name)
    for pattern, name in (
        (r"(thumbnail|near duplicate) of ", r"\1"),
        (r"too like ", "too like a picture for training"),
        (r"CLIP sees", "another medium"),
        (r"caption file", "caption file cannot be read"),
        (r"(colours cannot be read)", r"\1"),
    )
)


def family(reason: str) -> str:
    """The reason without the names in it: `thumbnail of a/b.jpg` and `near duplicate of c.jpg` are one each."""
    for pattern, name in FAMILIES:
        if found := pattern.match(reason):
            return found.expand(name)
    return reason


# ---------------------------------------------------------------------------------------------------------------------
# counting


@dataclass
class Sample:
    """The `size` items whose hash is smallest: the same whatever the order, and in one pass."""

    size: int
    seed: str
    heap: list[tuple[int, str, Any]] = field(default_factory=list)
    seen: int = 0

    def add(self, name: str, item: Any = None) -> None:
        self.seen += 1
        digest = hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "replace")).digest()
        entry = (-int.from_bytes(digest[:8], "big"), name, item)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        elif entry[:2] > self.heap[0][:2]:
            heapq.heapreplace(self.heap, entry)

    def items(self) -> list[tuple[str, Any]]:
        """(name, item), in the order of the names."""
        return sorted(((name, item) for _, name, item in self.heap), key=lambda pair: pair[0])


@dataclass
class Histogram:
    """Counts between fixed edges, apart for what was kept and what was left out."""

    title: str
    edges: tuple[float, ...]
    labels: tuple[str, ...]
    kept: Counter[int] = field(default_factory=Counter)
    others: Counter[int] = field(default_factory=Counter)

    def add(self, value: float, *, kept: bool) -> None:
        (self.kept if kept else self.others)[bisect.bisect_right(self.edges, value)] += 1


def size_histogram() -> Histogram:
    edges = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
    return Histogram("Short side, in pixels", edges, ("<32", *(str(edge) if edge < 1000 else f"{edge / 1024:g}k" for edge in edges)))


def aspect_histogram() -> Histogram:
    edges = (0.32, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.45, 1.7, 2.0, 2.5, 3.2)
    return Histogram("Shape: width ÷ height (left: tall, right: wide)", edges, ("<0.32", *(f"{edge:g}" for edge in edges)))


def length_histogram() -> Histogram:
    edges = (1, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300)
    return Histogram("Captions kept: length in characters", edges, ("0", *map(str, edges)))


@dataclass
class Summary:
    """Everything the page tells, of bounded size."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (status, family)
    samples: dict[tuple[str, str], Sample] = field(default_factory=dict)
    kept: Sample = field(default_factory=lambda: Sample(KEPT_TILES, "kept"))  # items are (shard, key)
    size: Histogram = field(default_factory=size_histogram)
    aspect: Histogram = field(default_factory=aspect_histogram)
    length: Histogram = field(default_factory=length_histogram)
    pairs: Counter[str] = field(default_factory=Counter)  # by split
    bytes: int = 0  # of the shards
    tiles: dict[tuple[str, str], tuple[bytes, str]] = field(default_factory=dict)  # (shard, key) -> picture, caption
    damaged: list[str] = field(default_factory=list)  # shards that could not be read to their end
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.statuses.values())


COLUMNS = ("path", "status", "reason", "width", "height", "shard", "key", "caption")
MAX_FAMILIES = 200  # a manifest with a reason of its own for each file is no reason to fill the memory


def manifest_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a manifest, a thousand in memory at a time. A column that is missing is None in every row.

    Raises FileNotFoundError or ValueError with the way out.
    """
    pq = need("pyarrow.parquet", extra="data")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the folder that python -m data_tools.prepare wrote")
    try:
        with pq.ParquetFile(path) as file:
            there = [name for name in COLUMNS if name in file.schema_arrow.names]
            if missing := {"path", "status"} - set(there):
                raise ValueError(f"it has no column {' and '.join(sorted(missing))}")
            for batch in file.iter_batches(batch_size=1024, columns=there):
                for row in batch.to_pylist():
                    yield {**dict.fromkeys(COLUMNS), **row}
    except (ValueError, OSError) as error:  # pyarrow's errors are both
        raise ValueError(f"{path} is no manifest that can be read ({error}): run python -m data_tools.prepare again") from error


def count_manifest(summary: Summary, path: Path) -> None:
    for row in manifest_rows(path):
        status = str(row["status"])
        kept = status == "kept" or (bool(row["shard"]) and bool(row["key"]))
        reason = family(str(row["reason"] or ""))
        name = str(row["path"])
        summary.statuses[status] += 1
        if row["width"] and row["height"]:
            summary.size.add(min(row["width"], row["height"]), kept=kept)
            summary.aspect.add(row["width"] / row["height"], kept=kept)
        if kept:
            summary.kept.add(name, (str(row["shard"]), str(row["key"])))
        if status == "kept" and not reason:
            continue
        group = (status, reason or "no reason given")
        if group not in summary.reasons and len(summary.reasons) >= MAX_FAMILIES:
            group = (status, "other reasons")
        summary.reasons[group] += 1
        details = (str(row["reason"]) if row["reason"] != reason else "", str(row["caption"] or ""))
        summary.samples.setdefault(group, Sample(REASON_TILES, "/".join(group))).add(name, tuple(one[:MAX_NAME] for one in details))


IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")


def read_shards(summary: Summary, folder: Path) -> None:
    """Count the pairs of all shards and fetch those of the kept sample. A damaged shard is named and passed over."""
    wanted = {place for _, place in summary.kept.items()}
    for shard in sorted(folder.glob("*.tar")):
        broken: Counter[str] = Counter()
        try:
            summary.bytes += shard.stat().st_size
            read_shard(summary, shard, *tars.files(shard, broken), wanted)
        except (ValueError, OSError):
            broken["not readable"] += 1
        if broken:
            summary.damaged.append(shard.name)


def read_shard(summary: Summary, shard: Path, names: list[str], places: np.ndarray, wanted: set[tuple[str, str]]) -> None:
    split = shard.name.split("-")[0].removesuffix(".tar")
    with open(shard, "rb", buffering=0) as file:
        for name, (offset, size) in zip(names, places.tolist(), strict=True):
            key, _, suffix = name.partition(".")
            place = (shard.name, key)
            if size > MAX_BYTES:
                continue
            if suffix == "json":
                caption = caption_of(os.pread(file.fileno(), size, offset))
                summary.pairs[split] += 1
                summary.length.add(len(caption), kept=True)
                if place in wanted:
                    summary.tiles[place] = (summary.tiles.get(place, (b"", ""))[0], caption)
            elif suffix in IMAGE_SUFFIXES and place in wanted:
                summary.tiles[place] = (thumbnail(os.pread(file.fileno(), size, offset)), summary.tiles.get(place, (b"", ""))[1])


def caption_of(data: bytes) -> str:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption if isinstance(caption, str) else ""


def settings_of(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {str(name): setting for name, setting in value.items()} if isinstance(value, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def folder_opener(source: Path) -> Opener:
    """Opens pictures of a folder by their path in the manifest; None for what is not there or lies outside."""
    root = source.resolve()

    def open_picture(name: str) -> bytes | None:
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root) or not path.is_file() or path.stat().st_size > MAX_BYTES:
                return None
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # names with a zero byte, loops of links
            return None

    return open_picture


def thumbnail(data: bytes | None) -> bytes:
    """A small JPEG of a picture file, b"" where it cannot be decoded."""
    if not data:
        return b""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = decode(data)
    except PictureError:
        return b""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=58, optimize=True)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# the page


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


def write_report(out: Path, *, source: Path | None = None, opener: Opener | None = None) -> Path:
    """Write `report.html` into the folder of shards and manifest `out`; returns its path.

    Pictures that were left out come from the folder `source`, or from `opener`, which maps a path of the manifest to the
    bytes of a picture file or None; without either, or where they are gone, their names stand alone. Raises
    FileNotFoundError or ValueError with the way out when there is no manifest that can be read.
    """
    summary = Summary(settings=settings_of(out))
    count_manifest(summary, out / MANIFEST)
    read_shards(summary, out)
    if opener is None and source is not None and source.is_dir():
        opener = folder_opener(source)
    partial = out / f".{NAME}.partial"
    try:
        with open(partial, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            for line in page(summary, opener):
                file.write(line + "\n")
        os.replace(partial, out / NAME)
    finally:
        partial.unlink(missing_ok=True)
    return out / NAME


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.report", description="Write report.html beside prepared shards.")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="the folder that prepare wrote")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="the folder of the original pictures, to show what was left out")
    args = parser.parse_args(argv)
    try:
        if args.source is not None and not args.source.is_dir():
            raise FileNotFoundError(f"--source {args.source} is no folder: name the one given to prepare, or leave it out")
        path = write_report(args.shards, source=args.source)
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
