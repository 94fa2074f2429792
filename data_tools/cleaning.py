"""Cleaning: is this picture a print worth keeping, and is this text a caption?

Pure functions on one decoded picture (PIL, "L" or "RGB", upright) and on one text. `look` measures a picture, `reasons`
judges what was measured, `trim` cuts a plain margin off, `clean_caption` makes one line of plain words and says what is
wrong with it. What is not clear is called ambiguous, with the reason, and never rejected. Knows no files, no shards and
no model. The limits below were set by eye on illustrated books of the nineteenth century.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image

REJECT, AMBIGUOUS = "reject", "ambiguous"


@dataclass(frozen=True)
class Verdict:
    """One objection: its kind, REJECT or AMBIGUOUS, and its reason in words that stay the same."""

    kind: str
    reason: str


def decide(verdicts: Iterable[Verdict]) -> tuple[str, str]:
    """(status, reason) for the manifest: ("kept", ""), or the first reject, or else the first ambiguous one."""
    verdicts = list(verdicts)
    for kind, status in ((REJECT, "rejected"), (AMBIGUOUS, "ambiguous")):
        for verdict in verdicts:
            if verdict.kind == kind:
                return status, verdict.reason
    return "kept", ""


# ---------------------------------------------------------------------------------------------------------------------
# measuring a picture

BLANK = 0.005  # of the points differ from the usual tone: fewer are an empty page
WORK = 512  # pixels of the long side of the copy that is measured, at most
TEXTURE = 448  # pixels of the side of the part, at full size, whose grain is measured
STRIPS = 4  # in which lines of text are looked for: columns and pictures beside the text


@dataclass(frozen=True)
class Look:
    """What one picture looks like, in numbers. Shares are of the picture's area, 0 to 1."""

    width: int
    height: int
    paper: int
    """Tone of the paper, 0 to 255."""
    ink: int
    """Tone of the darkest parts."""
    white: float
    """Share as light as the paper."""
    middle: float
    """Share of tones in between."""
    dark: float
    """Share near the darkest tone: the ink's coverage."""
    levels: int
    """Gray tones that occur often: a drawing in flat tones has few, a photograph nearly all."""
    plain: float
    """Share that differs from the usual tone, at once 1 for a busy picture and 0 for an empty page."""
    colour: float
    """Share whose colour is neither the paper's nor the ink's: a yellowed or sepia page has none."""
    smooth: float
    """Share of middle tones without lines or grain at full size, as continuous tone has them."""
    text: float
    """Share of the dark points that stand in low, separate rows, as letters do."""
    text_lines: float
    """How many such rows there are in a strip of the picture."""
    staves: int
    """Groups of five long lines at equal distances."""

    @property
    def short(self) -> int:
        return min(self.width, self.height)

    @property
    def long(self) -> int:
        return max(self.width, self.height)

    @property
    def aspect(self) -> float:
        """Long side over short side, 1 or more."""
        return self.long / self.short


def look(image: Image.Image) -> Look:
    """Measure a picture of at least one pixel. Deterministic; a few milliseconds whatever the size."""
    gray = image if image.mode == "L" else image.convert("L")
    gray_HW = np.asarray(reduced(gray, WORK))
    paper, ink = paper_and_ink(gray_HW)
    contrast = max(64, paper - ink)  # so that the grain of an empty page counts as paper
    tone_HW = 1 - (paper - gray_HW.astype(np.float32)) / contrast  # 1: paper, 0: ink
    counts = np.bincount(gray_HW.ravel(), minlength=256)
    text, text_lines = text_rows(gray_HW < paper - 0.4 * contrast)
    return Look(
        width=image.width,
        height=image.height,
        paper=paper,
        ink=ink,
        white=float((tone_HW > 0.85).mean()),
        middle=float(((tone_HW > 0.25) & (tone_HW < 0.75)).mean()),
        dark=float((tone_HW < 0.25).mean()),
        levels=int((counts > gray_HW.size / 2000).sum()),
        plain=plain_share(counts.tolist()),
        colour=coloured_share(image),
        smooth=smooth_share(gray, paper, contrast),
        text=text,
        text_lines=text_lines,
        staves=count_staves((tone_HW < 0.8).mean(1)),
    )


def plain_share(counts: Sequence[int]) -> float:
    """`Look.plain` of a histogram of 256 tones: the share of points that differ clearly from the usual, middle one."""
    sums = list(accumulate(counts))
    usual = bisect_left(sums, sums[255] / 2)
    near = sums[min(255, usual + 12)] - (sums[usual - 13] if usual > 12 else 0)
    return (sums[255] - near) / sums[255]


def reduced(image: Image.Image, long_side: int) -> Image.Image:
    """The picture scaled down by a whole number so that no side is above `long_side`."""
    factor = math.ceil(max(image.size) / long_side)
    return image.reduce(factor) if factor > 1 else image


def paper_and_ink(gray_HW: np.ndarray) -> tuple[int, int]:
    """The tones of the paper and of the ink: nearly the lightest and the darkest that occur."""
    shares = np.cumsum(np.bincount(gray_HW.ravel(), minlength=256)) / gray_HW.size
    return int(np.searchsorted(shares, 0.97)), int(np.searchsorted(shares, 0.01))


def coloured_share(image: Image.Image) -> float:
    """Share of points whose colour does not follow from their lightness.

    Two colour differences are fitted as parabolas of the lightness: ink on tinted paper lies on the curve, a red coat
    beside a green tree does not.
    """
    if image.mode != "RGB":
        return 0.0
    rgb_N3 = np.asarray(reduced(image, 128)).reshape(-1, 3).astype(np.float32)
    light_N = rgb_N3.mean(1) / 255
    basis_N3 = np.stack([np.ones_like(light_N), light_N, light_N**2], 1)
    chroma_N2 = np.stack([rgb_N3[:, 0] - rgb_N3[:, 1], rgb_N3[:, :2].mean(1) - rgb_N3[:, 2]], 1)
    fit_32 = np.linalg.lstsq(basis_N3, chroma_N2, rcond=None)[0]
    rest_N2 = chroma_N2 - basis_N3 @ fit_32
    return float((np.hypot(rest_N2[:, 0], rest_N2[:, 1]) > 20).mean())


def smooth_share(gray: Image.Image, paper: int, contrast: int) -> float:
    """Share of the middle, at full size, that has a middle tone and hardly varies within 3 x 3 points."""
    left, top = max(0, (gray.width - TEXTURE) // 2), max(0, (gray.height - TEXTURE) // 2)
    part_HW = np.asarray(gray.crop((left, top, min(gray.width, left + TEXTURE), min(gray.height, top + TEXTURE))))
    if min(part_HW.shape) < 8:
        return 0.0
    depth_HW = (paper - part_HW[1:-1, 1:-1].astype(np.float32)) / contrast
    middle_HW = (depth_HW > 0.15) & (depth_HW < 0.85)
    range_HW = over_3x3(np.maximum, part_HW) - over_3x3(np.minimum, part_HW)
    return float((middle_HW & (range_HW < 0.08 * contrast)).mean())


def over_3x3(function: Callable[[np.ndarray, np.ndarray], np.ndarray], values_HW: np.ndarray) -> np.ndarray:
    """(H, W) -> (H-2, W-2): the function over each point and its eight neighbours."""
    rows = function(function(values_HW[:-2], values_HW[1:-1]), values_HW[2:])
    return function(function(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def text_rows(dark_HW: np.ndarray) -> tuple[float, float]:
    """(share of the dark points in rows of letters, number of rows in the middling strip)."""
    total = int(dark_HW.sum())
    tallest = max(12, round(0.08 * max(dark_HW.shape)))
    inside, numbers = 0, []
    for strip_HW in np.array_split(dark_HW, min(STRIPS, dark_HW.shape[1]), axis=1):
        rows_H = strip_HW.sum(1)
        starts, ends = runs(rows_H >= 0.006 * strip_HW.shape[1])
        low = [(a, b) for a, b in zip(starts, ends) if 3 <= b - a <= tallest]
        inside += sum(int(rows_H[a:b].sum()) for a, b in low)
        numbers.append(len(low))
    return inside / max(1, total), float(np.median(numbers))


def runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends (exclusive) of the stretches of true values."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return changes[0::2], changes[1::2]


def count_staves(rows_H: np.ndarray) -> int:
    """Groups of exactly five sharp peaks at equal distances, in the share of each row that is not paper."""
    peaks = [
        y
        for y in range(1, len(rows_H) - 1)
        if rows_H[y] > 0.55
        and rows_H[y] >= rows_H[y - 1]
        and rows_H[y] > rows_H[y + 1]
        and rows_H[y] - rows_H[max(0, y - 2) : y + 3].min() > 0.25
    ]
    staves = start = 0
    while start + 5 <= len(peaks):
        gaps = np.diff(peaks[start : start + 5])
        step = float(gaps.mean())
        even = step >= 2.5 and float(np.abs(gaps - step).max()) <= max(1.01, 0.25 * step)
        alone = start == 0 or peaks[start] - peaks[start - 1] > 1.5 * step
        alone = alone and (start + 5 == len(peaks) or peaks[start + 5] - peaks[start + 4] > 1.5 * step)
        staves += even and alone
        start += 5 if even and alone else 1
    return staves


# ---------------------------------------------------------------------------------------------------------------------
# judging a picture


def reasons(look: Look, caption: str = "", *, min_side: int = 64, max_aspect: float = 3.2, prints: bool = True) -> list[Verdict]:
    """All that speaks against a picture, the gravest kind of each reason only, in a fixed order; [] is a good print.

    `caption` may be as found or cleaned: it helps to tell maps, music and initials. `prints=False` leaves colour and
    continuous tone alone, for paintings and photographs.
    """
    found = [*of_size(look, min_side, max_aspect), *of_emptiness(look)]
    if prints:
        found += of_process(look)
    found += of_kind(look)
    found += of_size_and_caption(look, caption)
    found += of_caption(caption)
    graver = {verdict.reason for verdict in found if verdict.kind == REJECT}
    return list(dict.fromkeys(one for one in found if one.kind == REJECT or one.reason not in graver))


def graded(value: float, reason: str, *, ambiguous: float, reject: float) -> list[Verdict]:
    """A verdict by two limits: nothing below the first, a reject from the second on."""
    if value < ambiguous:
        return []
    return [Verdict(REJECT if value >= reject else AMBIGUOUS, reason)]


def of_size(look: Look, min_side: int, max_aspect: float) -> list[Verdict]:
    small = [Verdict(REJECT, "too small")] if look.short < min_side else []
    return small + ([Verdict(REJECT, "too long")] if look.aspect > max_aspect else [])


def of_emptiness(look: Look) -> list[Verdict]:
    if look.plain < BLANK:
        return [Verdict(REJECT, "blank")]
    return graded(max(look.white, look.dark), "nearly blank", ambiguous=0.945, reject=0.985)


def of_process(look: Look) -> list[Verdict]:
    """Colour plates and photographs. Half-tones after paintings are as smooth as photographs, so most are ambiguous."""
    of_inked = look.colour / max(0.05, 1 - look.white)
    colour = graded(look.colour, "colour plate", ambiguous=0.025, reject=0.25 if of_inked < 0.3 else 0.1)
    continuous = look.smooth if look.levels >= 64 else 0.0
    return colour + graded(continuous, "photograph", ambiguous=0.2, reject=0.6)


def of_kind(look: Look) -> list[Verdict]:
    if look.white < 0.5:
        return []
    if look.staves:
        return graded(look.staves, "music", ambiguous=1, reject=2)
    if look.text >= 0.6 and look.text_lines >= 6 and look.white >= 0.6:
        return [Verdict(REJECT, "text page")]
    lettering = (look.text >= 0.3 and look.text_lines >= 3) or (look.text >= 0.2 and look.text_lines >= 2 and look.white >= 0.75)
    return [Verdict(AMBIGUOUS, "text page")] if lettering else []


def of_size_and_caption(look: Look, caption: str) -> list[Verdict]:
    """Small line blocks on white: an initial, unless words say what it shows."""
    words = bool(clean_caption(caption).text)
    if look.white < 0.33 or look.short > 200 or look.long > 400:
        return []
    if look.long <= 128:
        return [Verdict(AMBIGUOUS if words else REJECT, "ornament or initial")]
    return [Verdict(AMBIGUOUS, "ornament or initial")] if not words and look.white >= 0.5 else []


# What captions say of pictures that are no prints of a scene: a pattern for the start that rejects, one that doubts.
CAPTION_HINTS = (
    (
        "ornament or initial",
        r"(?:(?:decorated|decorative|ornamental|historiated|illuminated)\s+)?initials?(?:\s+(?:letter\s+)?\W?[a-z])?\W*$"
        r"|(?:(?:decorated|decorative|ornamental|drop)[- ])?(?:capital|letter|cap)\s+(?:letter\s+)?\W?[a-z]\W*$"
        r"|(?:tail|head)[- ]?pieces?\W*$|colophon\W*$|decorative (?:border|image|line|break|divider)\b|printer's (?:device|mark)\b",
        r"^(?:tail|head)[- ]?piece\b|\bornamental (?:letter|initial|border)\b|\bprinter's (?:device|mark)\b"
        r"|^(?:decorations?|ornaments?|fleurons?)\W*$|^(?:banner|masthead|logo)(?:$|:)"
        # columns of periodicals, whose headpieces carry their names
        r"|^questions and answers\W*$|^(?:our |the )?(?:letter|post-?office|puzzle|question|riddle)[- ]box\W*$"
        r"|^(?:our |the )?editor's (?:drawer|easy chair|note-?book|pocket-?book|scrap-?book|table)\b",
    ),
    (
        "map",
        r"(?:sketch |outline |general |small |large )?(?:map|chart)s?(?:\W*$| (?:of|to|showing|illustrating)\b)",
        r"\b(?:maps?|charts?|ground[- ]?plan|plan of)\b|^position of\b|^plan\W*$",
    ),
    (
        "diagram",
        r"(?:diagrams?|schem(?:a|e)s?|(?:cross|longitudinal|transverse|vertical)[- ]sections?)(?:\W*$| (?:of|to|showing|illustrating)\b)",
        r"\bdiagrams?\b|\b(?:cross|longitudinal|transverse|vertical|microscopic(?:al)?)[- ](?:sections?|details?|structure)\b|\b(?:acrostic|rebus)\b"
        r"|(?-i:(?:(?:^|[\s;.(])(?:[a-z]|[A-Z][a-z]{0,4}\.)[,.]\s[^,;.]{3,40}[,;.]){3})",  # a key of letters: "a. lung; b. heart; c. liver."
    ),
    ("music", r"sheet music\b", r"^(?:printed )?music\b(?:\W*$|\s*[-:—]|\s+(?:to|for)\b)|\bmusical (?:notation|score)\b"),
    (
        "text page",
        r"(?:table of contents|contents|list of illustrations|index|advertisements?)\W*$",
        r"\bfac-?simile of (?:\S+ ){0,4}(?:pages?|letters?|journal|manuscript|writing|signatures?|lines|bible|entry)\b|\btitle[- ]?page\b|\bhandwriting\b|^(?:(?:front |back )?cover|half[- ]?title|spine)\W*$",
    ),
)
CAPTION_HINTS_COMPILED = tuple((reason, re.compile(sure, re.I), re.compile(maybe, re.I)) for reason, sure, maybe in CAPTION_HINTS)


def of_caption(caption: str) -> list[Verdict]:
    plain = unmarked(caption)
    texts = [text.strip("\"' ") for text in (plain, without_labels(plain))]
    for reason, sure, maybe in CAPTION_HINTS_COMPILED:
        if any(sure.match(text) for text in texts):
            return [Verdict(REJECT, reason)]
        if any(maybe.search(text) for text in texts):
            return [Verdict(AMBIGUOUS, reason)]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# trimming

Box = tuple[int, int, int, int]


def trim(image: Image.Image) -> tuple[Image.Image, Box]:
    """The picture without its plain light margin, and the (left, top, right, bottom) that was kept.

    The margin may be yellowed and hold specks of a few points. Whatever is joined to the picture or larger than a speck
    stays: frame lines, a spire's tip, a printed caption. A picture on dark ground, or without a margin, comes back as is.
    """
    whole = (0, 0, image.width, image.height)
    gray_HW = np.asarray(image if image.mode == "L" else image.convert("L"))
    edge = max(1, min(gray_HW.shape) // 100)
    ring = np.concatenate([part.ravel() for part in (gray_HW[:edge], gray_HW[-edge:], gray_HW[:, :edge], gray_HW[:, -edge:])])
    quarter, paper = np.percentile(ring, (25, 80))
    if paper < 160:
        return image, whole
    mark_HW = gray_HW < paper - np.clip(2 * (paper - quarter), 24, 48)
    speck = max(3, mark_HW.size // 100_000)
    left, top, right, bottom = whole
    for _ in range(2):  # once more, since a margin without the corners' specks may be clean
        for axis in (1, 0):
            marks = line_sums(mark_HW[top:bottom, left:right].view(np.uint8), axis)
            tones = line_sums(gray_HW[top:bottom, left:right], axis) / (right - left if axis else bottom - top)
            toned = tones < paper - 10  # a light sky, line by line, is no margin
            a, b = without_specks(np.where(toned, marks + speck + 1, marks), speck)
            if axis:
                top, bottom = top + a, top + b
            else:
                left, right = left + a, left + b
            if a == b:  # nothing but paper and specks
                return image, whole
    box = (max(0, left - 1), max(0, top - 1), min(image.width, right + 1), min(image.height, bottom + 1))
    return (image, whole) if box == whole else (image.crop(box), box)


def line_sums(values_HW: np.ndarray, axis: int) -> np.ndarray:
    """Sums of bytes along an axis, int64; in 32 bits, which is quicker and enough for 16 million bytes."""
    return values_HW.sum(axis, dtype=np.uint32).astype(np.int64)


def without_specks(counts: np.ndarray, speck: int) -> tuple[int, int]:
    """The stretch (start, end) of lines from the first to the last mark, without specks that stand apart."""
    starts, ends = runs(counts > 0)
    gap, first, last = max(2, len(counts) // 100), 0, len(starts)

    def is_speck(index: int, distance: int) -> bool:
        return int(counts[starts[index] : ends[index]].sum()) <= speck and distance >= gap

    while first < last - 1 and is_speck(first, starts[first + 1] - ends[first]):
        first += 1
    while last - 1 > first and is_speck(last - 1, starts[last - 1] - ends[last - 2]):
        last -= 1
    if first == last:
        return 0, 0
    return int(starts[first]), int(ends[last - 1])


# ---------------------------------------------------------------------------------------------------------------------
# captions


DOUBTS = ("caption is a list", "caption is a heading", "caption is a fragment", "caption too long")


@dataclass(frozen=True)
class Caption:
    """A cleaned caption: one line, "" where there is none; what is wrong with it, or ""; and its language's tag."""

    text: str
    reason: str = ""
    language: str = "und"

    @property
    def verdicts(self) -> list[Verdict]:
        """The objection as verdicts, for `decide`: words that may be no caption are ambiguous, missing captions rejected."""
        kind = AMBIGUOUS if self.reason in DOUBTS else REJECT
        return [Verdict(kind, self.reason)] if self.reason else []


def clean_caption(text: str, *, min_characters: int = 3, max_characters: int = 300) -> Caption:
    """Any text found beside a picture -> its caption. Never raises; cleaning what is clean changes nothing.

    Markup, transcriber's marks, page references, footnote anchors, invitations to click, credits and leading figure
    numbers go; capitals become title case; a text above `max_characters` ends at its last whole sentence.
    """
    text = plain_text(text[:MAX_RAW])
    if not text:
        return Caption("", "no caption")
    reason = doubt_of(text)
    text = settled(lambda line: title_cased(without_labels(unmarked(line))), text)
    if is_label(text):
        return Caption("", "caption is only a label")
    if len(text) < min_characters:
        return Caption("", "caption too short")
    if len(text) > max_characters:
        text, whole = shortened(text, max_characters)
        reason = reason or ("" if whole else "caption too long")
    return Caption(text, reason, language(text))


MAX_RAW = 4_000  # characters of a text that are looked at


def settled(change: Callable[[str], str], text: str, rounds: int = 20) -> str:
    """The text after as many rounds of a change as still do something."""
    for _ in range(rounds):
        before, text = text, change(text)
        if text == before:
            break
    return text


# Known tags only, so that "2 < 3 and 5 > 4" stays. Tags inside a line leave nothing behind; the others part words.
INLINE_NAMES = "a|abbr|acronym|b|bdo|big|cite|code|del|dfn|em|font|i|ins|kbd|label|mark|q|s|samp|small|span|strike|strong|sub|sup|tt|u|var"
BLOCK_NAMES = (
    "address|area|article|aside|base|basefont|blockquote|body|button|canvas|caption|center|col|colgroup|dd|div|dl|dt|embed|fieldset|figcaption|"
    "figure|footer|form|frame|frameset|h[1-6]|head|header|hr|br|html|iframe|img|input|legend|li|link|map|meta|nav|noscript|object|ol|option|p|param|"
    "picture|pre|script|section|select|source|style|svg|table|tbody|td|textarea|tfoot|th|thead|title|tr|ul|video"
)
INLINE_TAG = re.compile(rf"</?(?:{INLINE_NAMES})\b[^<>]*>", re.I)
BLOCK_TAG = re.compile(rf"<!--(?:(?!<!--).)*?-->|<(script|style)\b(?:(?!<\1).)*?</\1\s*>|</?(?:{BLOCK_NAMES})\b[^<>]*>", re.I | re.S)
BROKEN_TAG = re.compile(rf"<!--.*$|<(?:/\s*)?(?:{INLINE_NAMES}|{BLOCK_NAMES})(?:\s+[\w-]+\s*=[^<>]*|\s*/?)$", re.I | re.S)


def strip_tags(text: str) -> str:
    return BLOCK_TAG.sub(" ", INLINE_TAG.sub("", text))


QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "′": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "″": '"'})
INVISIBLE = frozenset("\ufeff\u00ad\u200b\u200c\u200d\u2060")


def plain_text(text: str) -> str:
    """One line of plain text: no tags, entities, control characters or surplus spaces; NFC; straight quotes."""
    if text.isascii() and text.isprintable() and not any(mark in text for mark in ("<", "&", "`", "''", "--")):
        return " ".join(text.split())  # most texts: nothing that the rounds below would change
    return settled(plain_once, text)


def plain_once(text: str) -> str:
    text = BROKEN_TAG.sub("", strip_tags(html.unescape(strip_tags(text))))
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair, as JSON can hold it
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text if not is_invisible(c))
    text = unicodedata.normalize("NFC", text).translate(QUOTES)
    text = re.sub(r"``|''", '"', text).replace("`", "'")
    text = re.sub(r"(?<=[^\s-])\s?--\s?(?=[^\s-])", "—", text)
    return " ".join(text.split())


def is_invisible(character: str) -> bool:
    return character in INVISIBLE or "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"


NUMBER = r"(?:\d{1,4}(?:[.-]\d{1,3})?[a-z]?|[ivxlc]{1,7}|(?-i:[A-Z]))"
NUMBERS = rf"{NUMBER}\b\.?(?:\s*(?:,|&|and|to|or|[-–—])?\s*(?:,\s*)?(?:and\s+)?\b{NUMBER}\b(?![ ]?\w)\.?)*"
PAGE = r"(?:pp?|pgs?|pages?)\b\.?\s*(?:\d{1,4}|[ivxlc]{1,7}\b)(?:\s*[-–—,]\s*\d{1,4})*"
VERSION = r"(?:image|version|picture|view|illustration|map|scan|size|print|plate|copy|file|photo(?:graph)?)"
LARGER = r"(?:larger|enlarged|full[- ]?(?:sized?|resolution)|high(?:er)?[- ]?res(?:olution)?|bigger|large)"
MARKS = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        r"\[\s*(?:illustration|image|picture|fig(?:ure)?)\s*\]",
        r"\[\s*(?:image|picture|illustration)s?\s+(?:is\s+)?(?:un|not\s+)available[^\[\]]*\]",
        r"\[\s*(?:transcriber'?s?'?\s+notes?|tn|footnotes?|sidenote|editor's note)\b[^\[\]]*\]?",
        r"\[\s*sic\.?\s*\]",
        rf"[\[({{]\s*(?:see\s+)?(?:{PAGE})\s*\.?[\])}}]",
        r"\{\s*[\divxlc]{1,7}\s*\}",
        r"\[\s*(?:\d{1,4}|[a-z]|[*†‡§]+)\s*\]",
        rf"[\[(]\s*(?:(?:see|view|open|show|link to|go to|click|tap|here|for|to|an?|the)\s+)*(?:{LARGER}(?:\s+{VERSION})?|enlarge|thumbnail)\s*\.?[\])]",
        r"[\[(]?\s*\b(?:click|tap)\s+(?:here|on|to|for|image|the|this|map|picture)\b[^.\[\]()]{0,80}[\])]?\.?",
        rf"[\[(]?\s*\b(?:see|view|open|show|link to)\s+(?:(?:an?|the|this|in)\s+)?{LARGER}\s+{VERSION}\b\s*\.?[\])]?",
        rf"^(?:{LARGER}\s+{VERSION}|enlarge|thumbnail)\W*$",
        rf"[\[(]?\s*\b(?:to\s+)?fac(?:e|es|ing)\s+{PAGE}\.?\s*[\])]?",
        rf"(?<![\s,;:.—–-])[\s,;:.—–-]*[\[(]?\bsee\s+(?:also\s+)?{PAGE}\.?\s*[\])]?$",
        r"\)\s*:\s*\($",
        rf"(?<![\s,;:—–-])[\s,;:—–-]+{PAGE}\.?$",
        rf"^{PAGE}\s*[.:—–-]*(?=\s|$)",
        r"(?:\s*\.){4,}\s*(?:\d{1,4}|[ivxlc]{1,7})?\s*$",
    )
)
ILLUSTRATION = re.compile(r"\[\s*illustrations?\s*[:.—–-]\s*([^\[\]]*)\]?", re.I)
WORK_OF_ART = r"(?:photograph|photo|drawing|painting|sketch|picture|engraving|print|daguerreotype|portrait|original|water-?colou?r|etching|lithograph|woodcut|design)"
NAME = r"(?-i:[A-ZÀ-Þ])"
CREDITS = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        rf"(?<=[.!?\"'])\s*from\s+an?\s+(?:photograph|photo|painting|drawing|sketch)\.?\s+by\s+(?:{NAME}\.\s*){{0,3}}{NAME}\w+\.(?=\s)",
        rf"\s*[\[(]\s*(?:from|after)\s+(?:an?|the)\s+(?:\w+\s+){{0,3}}{WORK_OF_ART}s?\b[^()\[\]]{{0,90}}[\])]?\.?",
        rf"(?<=[.!?;,:\"'—–-])\s*(?:from|after)\s+(?:an?|the)\s+(?:\w+\s+){{0,2}}{WORK_OF_ART}s?\b[^!?;]{{0,90}}$",
        r"^photo(?:graph)?(?:\s+by)?\s*:\s*[^.]{1,60}\.\s+(?=\S)",
        rf"\s+from\s+(?:an?\s+)?photo(?:graph)?s?\s+by\s+{NAME}[^!?;]{{0,80}}$",
        rf"^from\s+(?:an?|the)\s+(?:\w+\s+){{0,2}}{WORK_OF_ART}s?\b(?:\s+(?:by|of|taken)\s[^!?;]{{0,50}})?$",
        rf"(?:(?<=[.!?\"'—–])\s*|\s*[\[(]\s*)(?:drawn|engraved|etched|painted|sketched|photographed|designed|photo(?:graph)?)\s+(?:(?:and|&)\s+\w+\s+)?by\s+{NAME}[^()\[\]!?;]{{0,70}}[\])]?$",
        r"\s*[\[(]\s*(?:reproduced|reprinted|by (?:kind )?permission|courtesy|copyright)\b[^()\[\]]{0,160}[\])]?\.?",
        r"(?<=[.!?\"'])\s*(?:reproduced|by (?:kind )?permission of|copyright(?:ed)?,?\s+(?:\d|by)|©)[^!?;]{0,120}$",
    )
)  # fmt: skip


def unmarked(text: str) -> str:
    """Plain text without transcriber's marks, page references, footnote anchors, invitations to click, and credits."""
    text = re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", plain_text(text[:MAX_RAW]))  # _italics_ of a plain text edition
    for pattern in MARKS:
        text = pattern.sub(" ", text)
    text = plain_text(ILLUSTRATION.sub(r" \1 ", text))
    for pattern in CREDITS:
        text = pattern.sub(" ", text)
    text = ends_stripped(re.sub(r"\s+(?=[,;.!?](?:\s|$))", "", plain_text(text)))
    text = re.sub(r"([.!?][\"']?)\s?\.$", r"\1", text) if not text.endswith("...") else text  # '"Rest." (See page 3).'
    return text + ")" if text.rfind("(") > text.rfind(")") else text  # a credit was cut off inside


def ends_stripped(text: str) -> str:
    """Without punctuation that joins nothing: at the start, and all but stops and closing marks at the end."""
    text = re.sub(r"^(?:[\s.,;:!*·•|_~=+/\\—–-]|[)\]}])+(?=\S|$)", "", text) if not text.startswith("...") else text
    return re.sub(r"[\s,;:*·•|_~=+/\\—–\[({-]+$", "", text).strip()


COUNTED = r"(?:figs?|figures?|plates?|pl|plate no|illus|illustrations?|ill|cuts?|diagrams?|images?|pictures?|vignettes?)"
LABELS = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        rf"^[\"'(\[]?{COUNTED}\b\.?\s*{NUMBERS}[)\]]?(?=$|[\s.:;,—–-])\s*[.:;,—–-]*\s*",
        rf"^[\"'(\[]?nos?\b\.?\s*{NUMBERS}[)\]]?\s*(?:$|[.:;,—–-]+\s*)",
        r"^(?:frontispiece|illustration|tail-?piece|head-?piece|vignette|image|picture|caption|photo|plate|figure|fig)s?\b\s*(?:[.:—–]+|\s-\s|$)\s*",
        r"^(?!\(?1\b.*\b2[.)])\(?\d{1,3}[a-z]?(?:[.):]|[.]?[—–])\s+(?=\S)",
        r"^\(?\d{1,3}[.]?[—–](?=\S)",
        r"^[IVXLC]{1,7}\.\s*[—–]+\s*(?=\S)",
        r"\s*[\[(]\s*frontispiece\.?\s*[\])]$|(?<=[.!?—–])\s*\bfrontispiece\.?$",
        rf"(?<=[.,—–])\s*(?:figs?|plate|pl)\b\.?\s*{NUMBERS}$",
    )
)


def without_labels(text: str) -> str:
    """Without the number or kind of illustration that leads: "Fig. 12.", "Plate IV.", "Frontispiece:"."""
    for pattern in LABELS:
        text = pattern.sub("", text).strip()
    return ends_stripped(text)


LABEL_WORDS = frozenset({
    "advertisement", "back", "border", "caption", "chapter", "colophon", "contents", "cover", "cut", "decoration", "decorative", "divider", "drop",
    "cap", "endpaper", "endpapers", "fig", "figs", "figure", "figures", "finis", "front", "frontis", "frontispiece", "half", "head", "headpiece",
    "i", "icon", "ill", "illus", "illustrated", "illustration", "illustrations", "image", "images", "initial", "initials", "letter", "line", "list",
    "logo", "no", "nos", "number", "of", "ornament", "ornamental", "page", "photo", "photograph", "picture", "piece", "pl", "plate", "plates", "scan",
    "spine", "tail", "tailpiece", "the", "title", "titlepage", "thumbnail", "unnamed", "untitled", "vignette", "blank", "none", "na", "and", "to",
})  # fmt: skip
FILE_NAME = re.compile(r"\S+\.(?:jpe?g|png|gif|tiff?|webp|bmp|svg)|[a-z]{0,12}[_-]?\d+[a-z]{0,3}(?:[_-]\w{1,8})?", re.I)


def is_label(text: str) -> bool:
    """Whether no word says what the picture shows: numbers, single letters, kinds of illustration, file names."""
    if FILE_NAME.fullmatch(text):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    return all((len(word) == 1 and word.isascii()) or word in LABEL_WORDS or re.fullmatch("[ivxlc]{1,7}", word) for word in words)


# Chapters by number: "Chapter IV. A Caucus-Race", "IV—The Rabbit". One letter before a dash is more often a stammer: "I—I".
HEADING = re.compile(r"(?:chap(?:ter|\.)|canto|book|part|act|scene)\s+(?:[ivxlc]+|\d+)\b|(?-i:[IVXLC]{2,})\s?[—–]", re.I)
FRAGMENT = re.compile(r"of\s|.*[^\s,]\s(?:the|of|and|an?|or)$|(?:.*\s)?explanation of (?:the )?(?:cuts?|figures?|plates?)\W*$", re.I)


def doubt_of(text: str) -> str:
    """Why the text may be no caption, or ""."""
    if looks_like_a_list(text):
        return "caption is a list"
    text = unmarked(text)
    if HEADING.match(text):
        return "caption is a heading"
    return "caption is a fragment" if FRAGMENT.match(text) else ""


def looks_like_a_list(text: str) -> bool:
    """A table of contents, a list of plates or an index instead of one caption."""
    if re.match(r"(?:list of (?:illustrations|plates|figures|maps)|table of contents|contents|index)\b", text, re.I) and len(text) > 30:
        return True
    if re.search(r"\b(?:feet|foot|inch(?:es)?|ft|size|metres|cm|diameter)\b\.?", text, re.I) and "...." not in text:
        return False  # measures, not pages
    leaders = len(re.findall(r"(?:\.\s*){4,}\s*\d{1,4}|\b(?:to )?fac(?:e|ing) (?:p\.|page)", text, re.I))
    pages = len(re.findall(r"[^\W\d]\W{0,3},?\s(?:pp?\.\s*)?\d{1,3}(?=\s+[^\W\d_]|[,;.]?$|\s*;)", text))
    references = len(re.findall(r",\s\d{1,3}(?=\s*[,;]|$)", text))
    return leaders >= 2 or references >= 4 or (pages >= 4 and 12 * pages >= len(text.split()))


SMALL_WORDS = frozenset({
    "a", "an", "and", "as", "at", "but", "by", "for", "from", "in", "into", "nor", "of", "on", "or", "over", "the", "to", "upon", "with",
    "au", "aux", "de", "des", "du", "en", "et", "la", "le", "les", "sur", "un", "une",
    "auf", "das", "dem", "den", "der", "im", "mit", "und", "von", "zu", "zum", "zur",
    "al", "del", "della", "di", "e", "el", "il", "y",
})  # fmt: skip


def title_cased(text: str) -> str:
    """A text wholly in capitals -> Title Case, with small words small and numerals like XIV as they are."""
    letters = [c for c in text if c.isalpha()]
    if len(letters) < 4 or any(c.islower() for c in letters) or not any(c.isupper() for c in letters):
        return text
    parts, first = [], True
    for part in re.split("([ —–])", text):
        if part.strip(" —–"):
            parts.append(word_cased(part, first=first))
            first = bool(re.search(r"[.!?:][\"')\]]*$", part)) and not re.fullmatch(r"\W*(?:[A-Z]|[IVX]+)\.?", part)
        else:
            parts.append(part)
            first = first or part in ("—", "–")
    return "".join(parts)


def word_cased(word: str, *, first: bool) -> str:
    bare = word.strip("\"'()[].,;:!?—–-")
    if re.fullmatch(r"[IVX]+(?:'S)?", bare):
        return word.replace("'S", "'s")
    if re.search(r"\w\.\w", word) or (len(bare) == 1 and "." in word):  # H.M.S., W.
        return word
    if not first and bare.lower() in SMALL_WORDS and word[:1].isalpha():
        return word.lower()
    lower = re.sub(r"(?:^|(?<=[—–\"(\[/-]))([^\W\d_])", lambda found: found[1].upper(), word.lower())
    lower = re.sub(r"^([\W_]*)([^\W\d_])", lambda found: found[1] + found[2].upper(), lower)
    return re.sub(r"\b([OoDdLl]')(?=[^\W\d_]{3})([^\W\d_])", lambda found: found[1].capitalize() + found[2].upper(), lower)


def shortened(text: str, limit: int) -> tuple[str, bool]:
    """At most `limit` characters: to the last whole sentence if that is a good part (True), else to a word (False)."""
    ends = [found.end() for found in re.finditer(r"[^\s.][^\s.][.!?][\"')\]]*(?=\s+[^\Wa-z])", text) if found.end() <= limit]
    if ends and ends[-1] >= limit // 4:
        return text[: ends[-1]], True
    cut = text[:limit]
    return ends_stripped(cut.rpartition(" ")[0] or cut), False


# ---------------------------------------------------------------------------------------------------------------------
# language

# The commonest words of each, and a few that captions begin with.
STOP_WORDS = {
    "en": "a an and are as at be before but by for from had has have he her his how in into is it its me my not of on or our out she that the their them "
    "they this to up upon was we were when which who with you your",
    "fr": "vue ville rue église à au aux avec ce ces cette chez d dans de des du elle en est et il ils je l la le les leur mais ne nous on ou où par pas pour qu que qui sa se ses son "
    "sous sur un une vous",
    "de": "ansicht stadt am an auf aus bei das dem den der des die ein eine einem einen einer eines er es für hat ich im in ist mit nach nicht sein sich sie sind über um und "
    "unter vom von vor war wie wird zu zum zur",
    "es": "vista ciudad iglesia a al con de del el en entre es está la las lo los más muy para pero por que se sin sobre su sus un una y",
    "it": "veduta città chiesa a ai al alla che con da dal dalla degli dei del della delle di e gli i il in la le lo nel nella non per più sono su sul sulla un una uno è",
    "la": "ab ad atque cum de ejus eius est et ex hic hoc in inter non per pro quae quam qui quod sed sive sub sunt super ut vel",
}
LANGUAGES = {tag: frozenset(words.split()) for tag, words in STOP_WORDS.items()}


def language(text: str) -> str:
    """en, fr, de, es, it or la by the stop words of a text; "und" where they are too few or do not decide."""
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", text) if not re.fullmatch("[B-Z]", word)]
    scores = {tag: sum(word in stops for word in words) for tag, stops in LANGUAGES.items()}
    best, second, *_ = sorted(scores, key=lambda tag: -scores[tag])
    if scores[best] == scores[second] or 12 * scores[best] < len(words):
        return "und"
    return best
