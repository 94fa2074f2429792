"""Captions: one line of plain text, and what is wrong with it.

`clean_caption` removes markup, labels, credits and page references, and judges whether the rest is a caption. Unclear cases
are ambiguous, with the reason, and never rejected. The limits were set on illustrated books of the nineteenth century.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from data_tools.pipeline.verdicts import AMBIGUOUS, REJECT, Verdict
from data_tools.text.language import language

DOUBTS = ("caption is a list", "caption is a heading", "caption is a fragment", "caption too long")


@dataclass(frozen=True)
class Caption:
    """A cleaned caption: one line, "" if there is none; what is wrong with it, or ""; and its language tag."""

    text: str
    reason: str = ""
    language: str = "und"

    @property
    def verdicts(self) -> list[Verdict]:
        """The objection as verdicts for `decide`: text that may not be a caption is ambiguous, a missing caption is rejected."""
        kind = AMBIGUOUS if self.reason in DOUBTS else REJECT
        return [Verdict(kind, self.reason)] if self.reason else []


@lru_cache(maxsize=64)  # for itself, and where its picture is judged: files are processed in groups
def clean_caption(text: str, *, min_characters: int = 3, max_characters: int = 300) -> Caption:
    """Any text found beside a picture -> its caption. Never raises; cleaning is idempotent.

    Markup, transcriber's marks, page references, footnote anchors, invitations to click, credits and leading figure
    numbers are removed; capitals become title case; a text above `max_characters` is cut after its last whole sentence.
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


MAX_RAW = 4_000  # characters of a text that are examined


def settled(change: Callable[[str], str], text: str, rounds: int = 20) -> str:
    """The text after repeating a change until it has no effect."""
    for _ in range(rounds):
        before, text = text, change(text)
        if text == before:
            break
    return text


# Known tags only, so that "2 < 3 and 5 > 4" stays. Inline tags are deleted; the others become spaces.
INLINE_NAMES = "a|abbr|acronym|b|bdo|big|cite|code|del|dfn|em|font|i|ins|kbd|label|mark|q|s|samp|small|span|strike|strong|sub|sup|tt|u|var"
BLOCK_NAMES = (
    "address|area|article|aside|base|basefont|blockquote|body|button|canvas|caption|center|col|colgroup|dd|div|dl|dt|embed|fieldset|"
    "figcaption|figure|footer|form|frame|frameset|h[1-6]|head|header|hr|br|html|iframe|img|input|legend|li|link|map|meta|nav|noscript|"
    "object|ol|option|p|param|picture|pre|script|section|select|source|style|svg|table|tbody|td|textarea|tfoot|th|thead|title|tr|ul|video"
)
INLINE_TAG = re.compile(rf"</?(?:{INLINE_NAMES})\b[^<>]*>", re.I)
BLOCK_TAG = re.compile(rf"<!--(?:(?!<!--).)*?-->|<(script|style)\b(?:(?!<\1).)*?</\1\s*>|</?(?:{BLOCK_NAMES})\b[^<>]*>", re.I | re.S)
BROKEN_TAG = re.compile(rf"<!--.*$|<(?:/\s*)?(?:{INLINE_NAMES}|{BLOCK_NAMES})(?:\s+[\w-]+\s*=[^<>]*|\s*/?)$", re.I | re.S)


def strip_tags(text: str) -> str:
    return BLOCK_TAG.sub(" ", INLINE_TAG.sub("", text))


QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "′": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "″": '"', "\u2581": "_"})
INVISIBLE = re.compile("[\ufeff\u00ad\u200b\u2060\u202a-\u202e\u2066-\u2069]")
JOINERS = re.compile("[\u200c\u200d]+")
PLAIN_SCRIPTS = re.compile("[\0-\u058f]")  # Latin, Greek, Cyrillic, Armenian: a joiner between their letters is an error


def plain_text(text: str) -> str:
    """One line of plain text: no tags, entities, control characters or surplus spaces; NFC; straight quotes."""
    if text.isascii() and text.isprintable() and not any(mark in text for mark in ("<", "&", "`", "''", "--")):
        return " ".join(text.split())  # most texts: the rounds below would change nothing
    return settled(plain_once, text)


def raw_of(text: str) -> str:
    """The text itself if `plain_text` changes more than its spaces; else ""."""
    return text.strip()[:MAX_RAW] if plain_text(text) != " ".join(text.split()) else ""


def plain_once(text: str) -> str:
    text = BROKEN_TAG.sub("", strip_tags(html.unescape(strip_tags(text))))
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates, which JSON can hold
    text = JOINERS.sub(lambda found: found[0][0] if is_spelling(text, *found.span()) else "", text)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in INVISIBLE.sub("", text))
    text = unicodedata.normalize("NFC", text).translate(QUOTES)
    text = re.sub(r"``|''", '"', text).replace("`", "'")
    text = re.sub(r"(?<=[^\s-])\s?--\s?(?=[^\s-])", "—", text)
    return " ".join(text.split())


def is_spelling(text: str, start: int, end: int) -> bool:
    """Whether a zero-width joiner belongs to a word's spelling or to a composed emoji.

    Then a letter, mark or symbol outside the plain scripts is next to it. It may end a word (Malayalam), begin one (an isolated Arabic
    form), or follow a Latin one (the Persian plural of PDF).
    """
    beside = text[max(0, start - 1) : start] + text[end : end + 1]
    return any(unicodedata.category(c)[0] in "LMS" and not PLAIN_SCRIPTS.match(c) for c in beside)


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
        r"[\[(]\s*(?:(?:see|view|open|show|link to|go to|click|tap|here|for|to|an?|the)\s+)*"
        rf"(?:{LARGER}(?:\s+{VERSION})?|enlarge|thumbnail)\s*\.?[\])]",
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
WORK_OF_ART = (
    r"(?:photograph|photo|drawing|painting|sketch|picture|engraving|print|daguerreotype|portrait|original|water-?colou?r|etching|"
    r"lithograph|woodcut|design)"
)
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
        r"(?:(?<=[.!?\"'—–])\s*|\s*[\[(]\s*)(?:drawn|engraved|etched|painted|sketched|photographed|designed|photo(?:graph)?)\s+"
        rf"(?:(?:and|&)\s+\w+\s+)?by\s+{NAME}[^()\[\]!?;]{{0,70}}[\])]?$",
        r"\s*[\[(]\s*(?:reproduced|reprinted|by (?:kind )?permission|courtesy|copyright)\b[^()\[\]]{0,160}[\])]?\.?",
        r"(?<=[.!?\"'])\s*(?:reproduced|by (?:kind )?permission of|copyright(?:ed)?,?\s+(?:\d|by)|©)[^!?;]{0,120}$",
    )
)  # fmt: skip


def unmarked(text: str) -> str:
    """Plain text without transcriber's marks, page references, footnote anchors, invitations to click and credits."""
    text = re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", plain_text(text[:MAX_RAW]))  # _italics_ of a plain text edition
    for pattern in MARKS:
        text = pattern.sub(" ", text)
    text = plain_text(ILLUSTRATION.sub(r" \1 ", text))
    for pattern in CREDITS:
        text = pattern.sub(" ", text)
    text = ends_stripped(re.sub(r"\s+(?=[,;.!?](?:\s|$))", "", plain_text(text)))
    text = re.sub(r"([.!?][\"']?)\s?\.$", r"\1", text) if not text.endswith("...") else text  # '"Rest." (See page 3).'
    return text + ")" if text.rfind("(") > text.rfind(")") else text  # a credit was removed from inside the parentheses


def ends_stripped(text: str) -> str:
    """The text without stray punctuation at the start, and at the end without any but stops and closing marks."""
    text = re.sub(r"^(?:[\s.,;:!*·•|_~=+/\\—–-]|[)\]}])+(?=\S|$)", "", text) if not text.startswith("...") else text
    return re.sub(r"[\s,;:*·•|_~=+/\\—–\[({-]+$", "", text).strip()


COUNTED = r"(?:figs?|figures?|plates?|pl|plate no|illus|illustrations?|ill|cuts?|diagrams?|images?|pictures?|vignettes?)"
LABELS = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        rf"^[\"'(\[]?{COUNTED}\b\.?\s*{NUMBERS}[)\]]?(?=$|[\s.:;,—–-])\s*[.:;,—–-]*\s*",
        rf"^[\"'(\[]?nos?\b\.?\s*{NUMBERS}[)\]]?\s*(?:$|[.:;,—–-]+\s*)",
        r"^(?:frontispiece|illustration|tail-?piece|head-?piece|vignette|image|picture|caption|photo|plate|figure|fig)s?\b"
        r"\s*(?:[.:—–]+|\s-\s|$)\s*",
        r"^(?!\(?1\b.*\b2[.)])\(?\d{1,3}[a-z]?(?:[.):]|[.]?[—–])\s+(?=\S)",
        r"^\(?\d{1,3}[.]?[—–](?=\S)",
        r"^[IVXLC]{1,7}\.\s*[—–]+\s*(?=\S)",
        r"\s*[\[(]\s*frontispiece\.?\s*[\])]$|(?<=[.!?—–])\s*\bfrontispiece\.?$",
        rf"(?<=[.,—–])\s*(?:figs?|plate|pl)\b\.?\s*{NUMBERS}$",
    )
)


def without_labels(text: str) -> str:
    """The text without a leading number or kind of illustration: "Fig. 12.", "Plate IV.", "Frontispiece:"."""
    for pattern in LABELS:
        text = pattern.sub("", text).strip()
    return ends_stripped(text)


LABEL_WORDS = frozenset({
    "advertisement", "back", "border", "caption", "chapter", "colophon", "contents", "cover", "cut", "decoration", "decorative", "divider",
    "drop", "cap", "endpaper", "endpapers", "fig", "figs", "figure", "figures", "finis", "front", "frontis", "frontispiece", "half",
    "head", "headpiece", "i", "icon", "ill", "illus", "illustrated", "illustration", "illustrations", "image", "images", "initial",
    "initials", "letter", "line", "list", "logo", "no", "nos", "number", "of", "ornament", "ornamental", "page", "photo", "photograph",
    "picture", "piece", "pl", "plate", "plates", "scan", "spine", "tail", "tailpiece", "the", "title", "titlepage", "thumbnail", "unnamed",
    "untitled", "vignette", "blank", "none", "na", "and", "to",
})  # fmt: skip
FILE_NAME = re.compile(r"\S+\.(?:jpe?g|png|gif|tiff?|webp|bmp|svg)|[a-z]{0,12}[_-]?\d+[a-z]{0,3}(?:[_-]\w{1,8})?", re.I)


def is_label(text: str) -> bool:
    """Whether no word says what the picture shows: only numbers, single letters, kinds of illustration, file names."""
    if FILE_NAME.fullmatch(text):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    return all((len(word) == 1 and word.isascii()) or word in LABEL_WORDS or re.fullmatch("[ivxlc]{1,7}", word) for word in words)


# Numbered chapters: "Chapter IV. A Caucus-Race", "IV—The Rabbit". One letter before a dash is more often a stammer: "I—I".
HEADING = re.compile(r"(?:chap(?:ter|\.)|canto|book|part|act|scene)\s+(?:[ivxlc]+|\d+)\b|(?-i:[IVXLC]{2,})\s?[—–]", re.I)
FRAGMENT = re.compile(r"of\s|.*[^\s,]\s(?:the|of|and|an?|or)$|(?:.*\s)?explanation of (?:the )?(?:cuts?|figures?|plates?)\W*$", re.I)


def doubt_of(text: str) -> str:
    """Why the text may not be a caption, or ""."""
    if looks_like_a_list(text):
        return "caption is a list"
    text = unmarked(text)
    if HEADING.match(text):
        return "caption is a heading"
    return "caption is a fragment" if FRAGMENT.match(text) else ""


def looks_like_a_list(text: str) -> bool:
    """Whether it is a table of contents, a list of plates or an index instead of one caption."""
    if re.match(r"(?:list of (?:illustrations|plates|figures|maps)|table of contents|contents|index)\b", text, re.I) and len(text) > 30:
        return True
    if re.search(r"\b(?:feet|foot|inch(?:es)?|ft|size|metres|cm|diameter)\b\.?", text, re.I) and "...." not in text:
        return False  # measurements, not pages
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
    """A text all in capitals -> Title Case, with small words in lower case and numerals like XIV unchanged."""
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
    """At most `limit` characters: cut after the last whole sentence if enough is left (True), else after a word (False)."""
    ends = [found.end() for found in re.finditer(r"[^\s.][^\s.][.!?][\"')\]]*(?=\s+[^\Wa-z])", text) if found.end() <= limit]
    if ends and ends[-1] >= limit // 4:
        return text[: ends[-1]], True
    cut = text[:limit]
    return ends_stripped(cut.rpartition(" ")[0] or cut), False
