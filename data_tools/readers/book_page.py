"""Gutenberg: the page of an illustrated book -> its pictures in reading order and the words about each.

Pure functions on the HTML of one page, valid or not: `Page(decode_text(data))`, then `illustrations` and `book_facts`.
A caption is taken from the most reliable place: figcaption, an element with a caption class, the alt or title text, the list
of illustrations, the text in the figure, a heading or centred line directly below, a heading directly above. Reads no files.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_tools.text.captions import clean_caption, plain_text
from tokun.utils.optional_packages import need

BLOCK_TAGS = frozenset({
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "li", "main", "nav", "ol",
    "p", "pre", "section", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
})  # fmt: skip
NO_TEXT = frozenset({"script", "style", "template"})
HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
CAPTION_CLASSES = frozenset({"cap", "capt", "capcenter", "figcap", "illcap", "imgcap", "legend"})
FIGURE_CLASS = re.compile(r"fig|illus|image|img|pict|plate|photo", re.I)
HIDDEN_CLASS = re.compile(r"page-?n|pagenum|pgnum|pageno|folio|pagebreak", re.I)  # page numbers
CENTRED = re.compile(r"cent(?:er|re)|\bctr|\bc\b|text-align:center", re.I)
PLATES_HEADING = re.compile(r"illustrations|plates|engravings|pictures|woodcuts", re.I)
NO_CAPTION = re.compile(
    r"(the )?(end|contents|table of contents|list of .*|introduction|introductory.*|preface|foreword|index|notes?|footnotes|appendix.*|"
    r"advertisements?|dedication|illustrations|(chapter|part|book|volume|vol\.?|section|canto) [\divxlc]+|(illustrated |written )?by .*|"
    r".*(rights reserved|copyright|publish|& co\b|& company|limited|\bltd).*)[.:\])]*",
    re.I,
)
LARGER = re.compile(r"\b(click|larger|enlarged?|hi(gh)?[- ]?res\w*|full[- ]?(size|res)\w*)\b", re.I)
MAX_DEPTH = 400  # of open elements: a deeper page is broken, and its inner elements do not separate text
MAX_HEAD = 20_000  # characters before the start of the book that are searched for title and author
MAX_FIGURE_TEXT = 2_000  # characters of a figure's text that are examined
LONGEST_CAPTION = 300  # characters of unmarked text in a figure that can be its caption
LONGEST_LINE = 120  # characters of a line outside the figure that can be its caption
LONGEST_CONTEXT = 300
HEADING_ABOVE = "heading above"  # origin of a caption; cleaning doubts these

# ---------------------------------------------------------------------------------------------------------------------
# the page, read once from top to bottom


class Box:
    """A block element: its text is separate from the text before and after. `up` is the enclosing box."""

    __slots__ = ("caption", "classes", "tag", "up")

    def __init__(self, tag: str, classes: str, up: Box | None) -> None:
        self.tag, self.classes, self.up = tag, classes, up
        self.caption = tag == "figcaption" or is_caption_class(classes)

    def chain(self) -> Iterator[Box]:
        """This box and all enclosing ones, from the inside out."""
        box: Box | None = self
        while box is not None:
            yield box
            box = box.up


def is_caption_class(classes: str) -> bool:
    return any("caption" in name or name in CAPTION_CLASSES for name in classes.lower().split())


@dataclass(frozen=True, eq=False)
class Run:
    """Text of one block, in one line."""

    text: str
    box: Box

    @property
    def heading(self) -> bool:
        return any(box.tag in HEADINGS for box in self.box.chain())

    @property
    def caption(self) -> bool:
        return any(box.caption for box in self.box.chain())


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture on the page, with the attributes of its tag and the enclosing tags."""

    src: str
    link: str
    alt: str
    title: str
    anchors: tuple[str, ...]
    box: Box

    def figure(self) -> Box | None:
        """The element that holds the picture and its text: the outermost one with a figure class."""
        chain = [box for box, _ in zip(self.box.chain(), range(5)) if box.tag != "body"]
        figures = [box for box in chain if box.tag in ("figure", "center") or FIGURE_CLASS.search(box.classes)]
        return figures[-1] if figures else next(iter(chain), None)


@dataclass(frozen=True)
class Element:
    """An open tag: its box, if any, whether its text is hidden, and its link target."""

    box: Box | None
    hidden: bool
    href: str


class Page:
    """The page of a book as a sequence of runs, pictures and rules (None), in reading order.

    Selectolax parses even broken HTML as a browser would. Raises ImportError without selectolax.
    """

    def __init__(self, text: str) -> None:
        self.line: list[Run | Picture | None] = []
        self.links: dict[str, str] = {}  # linked file -> the link's text
        self.plates: dict[str, str] = {}  # anchor -> caption, from a list of illustrations
        self.ornaments: list[str] = re.findall(r"url\(\s*[\"']?([^\"')<>]{1,500})", text)  # pictures in the style sheet
        self.meta: dict[str, str] = {}
        self.title = ""
        self.head: list[str] = []  # text up to the mark of the book's start
        self._stack: list[Element] = []
        self._box = Box("body", "", None)
        self._text: list[str] = []
        self._anchors: list[str] = []
        self._hidden = 0
        self._link_text: list[str] = []
        self._plate_links: list[tuple[str, str, int]] = []
        self._in_plates = False
        self._started = self._ended = False
        self._read(text)
        self._flush()
        self._settle_plates()

    def _read(self, text: str) -> None:
        """Walk through the tree of the page."""
        node = need("selectolax.lexbor", extra="data").LexborHTMLParser(text.encode("utf-8", "replace")).root
        depth = 0
        while node is not None:
            if self._enter(node) and node.first_child is not None:
                node, depth = node.first_child, depth + 1
                continue
            self._leave(node)
            while depth and node.next is None:
                node, depth = node.parent, depth - 1
                self._leave(node)
            node = node.next if depth else None

    def _enter(self, node: Any) -> bool:
        """Process a node of the tree. Returns whether to process its children."""
        if node.is_text_node:
            self._add(node.text_content)
        if not node.is_element_node:
            return False
        tag, values = node.tag, {name: value or "" for name, value in node.attributes.items()}
        self._anchors += [values[name] for name in ("id", "name") if values.get(name) and tag != "meta"]
        if tag == "img":
            self._picture(values)
        elif tag == "hr":
            self._flush()
            self.line.append(None)
        elif tag == "br":
            self._add("\n")
        elif tag == "meta":
            self.meta.setdefault((values.get("name") or values.get("property") or "").lower(), values.get("content", ""))
        elif tag == "title":
            self.title = self.title or node.text()[: 10 * LONGEST_CONTEXT]
        self._open(tag, values)
        return tag != "title" and tag not in NO_TEXT

    def _add(self, data: str) -> None:
        if not self._started:
            self.head.append(data)
        if self._hidden:
            return
        self._text.append(data)
        self._link_text.append(data)
        if data.strip():
            self._anchors.clear()

    def _open(self, tag: str, values: dict[str, str]) -> None:
        style = values.get("style", "").replace(" ", "").lower()
        classes = f"{values.get('class', '')} {values.get('align', '')} {style}"
        box = None
        if (tag in BLOCK_TAGS or is_caption_class(values.get("class", ""))) and len(self._stack) < MAX_DEPTH:
            self._flush()
            box = self._box = Box(tag, classes if tag != "body" else "", self._box)
            if not self._started:
                self.head.append("\n")
        hidden = bool(HIDDEN_CLASS.search(values.get("class", ""))) or "display:none" in style
        self._hidden += hidden
        href = values.get("href", "") if tag == "a" else ""
        if href:
            self._link_text = []
        self._stack.append(Element(box, hidden, href))

    def _leave(self, node: Any) -> None:
        """Handle the end of an element."""
        if not node.is_element_node:
            return
        one = self._stack.pop()
        if one.box is not None:
            self._flush()
            assert one.box.up is not None
            self._box = one.box.up
        self._hidden -= one.hidden
        if one.href:
            text = squeeze("".join(self._link_text))
            self.links.setdefault(one.href, text)
            if text and not names_picture(text):
                self._link_to_larger(one.href)
            if self._in_plates and one.href.startswith("#"):
                self._plate_links.append((one.href[1:], text, len(self.line)))

    def _flush(self) -> None:
        text = squeeze("".join(self._text))
        self._text.clear()
        if not text or self._ended:
            return
        if "*** START OF" in text and not self._started:
            self._started = True
            self.line = [one for one in self.line if isinstance(one, Picture)]
            return
        self._ended = "*** END OF" in text or text.startswith("End of the Project Gutenberg")
        if self._ended:
            return
        run = Run(text, self._box)
        if run.heading:
            self._in_plates = bool(PLATES_HEADING.search(text))
        self.line.append(run)

    def _picture(self, values: dict[str, str]) -> None:
        anchors = tuple(self._anchors)
        self._flush()
        self._anchors.clear()
        link = next((one.href for one in reversed(self._stack) if one.href), "")
        alt, title = (squeeze(values.get(name, "")) for name in ("alt", "title"))
        self.line.append(Picture(values.get("src", ""), link, alt, title, anchors, self._box))

    def _link_to_larger(self, href: str) -> None:
        """Treat a link like "[Larger]" in a picture's figure as a link around the picture."""
        for place in range(len(self.line) - 1, max(-1, len(self.line) - 4), -1):
            picture = self.line[place]
            if isinstance(picture, Picture):
                if not picture.link and (figure := picture.figure()) is not None and figure in self._box.chain():
                    self.line[place] = replace(picture, link=href)
                return

    def _settle_plates(self) -> None:
        alone = Counter(index for _, _, index in self._plate_links)
        for anchor, text, index in self._plate_links:
            if alone[index] == 1 and index < len(self.line) and isinstance(run := self.line[index], Run):
                text = run.text  # the whole entry: the link may be only the page number
            text = re.sub(r"^\d+\W+", "", re.split(r"(?:\s?\.){3,}", text)[0])
            if names_something(text):
                self.plates.setdefault(anchor, text)


def squeeze(text: str) -> str:
    return " ".join(text.split())


def names_something(text: str) -> bool:
    """Whether anything is left of a caption after cleaning: nothing is left of "Fig. 12", "Frontispiece", "i042.jpg"."""
    return bool(clean_caption(text).text)


def names_picture(link_text: str) -> bool:
    """Whether a link's text names the picture, rather than saying that it is larger."""
    return names_something(link_text) and not LARGER.search(link_text)


# ---------------------------------------------------------------------------------------------------------------------
# the pictures


@dataclass(frozen=True)
class Illustration:
    """A picture of a book: its address on the page, its link target, its words and where they were found."""

    src: str
    link: str
    caption: str
    caption_source: str
    context: str
    is_link: bool = False
    """Whether the page only links to it; it may then be any file."""


def illustrations(page: Page, title: str = "") -> Iterator[Illustration]:
    """The pictures on the page in order, then the files it only links to. `title` is the book's title, which is not a caption."""
    for at, picture in enumerate(page.line):
        if isinstance(picture, Picture):
            caption, origin = caption_of(page, at)
            if origin in ("neighbouring text", HEADING_ABOVE) and letters(caption) in letters(title):  # a title page
                caption, origin = "", ""
            yield Illustration(picture.src, picture.link, caption, origin, context_of(page, at))
    for href, text in page.links.items():
        caption = plain_text(text[:MAX_FIGURE_TEXT]) if names_picture(text) else ""
        yield Illustration(href, "", caption, "link" if caption else "", "", is_link=True)


def caption_of(page: Page, at: int) -> tuple[str, str]:
    """(caption, where it was found) of the picture at position `at`; ("", "") if nothing says what it shows.

    Text that only numbers a picture or names a part of the book ("Fig. 12", "Frontispiece") is skipped. A picture of a
    single letter is an initial, and the text beside it belongs to the story.
    """
    picture = page.line[at]
    assert isinstance(picture, Picture)
    below, above, after = figure_runs(page, at)
    beside = page.line[after : after + 1]
    marked = [run for run in (*below, *beside) if isinstance(run, Run) and run.caption] or [run for run in above if run.caption]
    in_figcaption = [run for run in marked if is_in(run, "figcaption")]
    text = joined(below) or joined(above)
    text = text if len(text) <= LONGEST_CAPTION else ""
    candidates = [("figcaption", joined(in_figcaption)), ("caption class", joined(marked))]
    if sum(c.isalnum() for c in picture.alt) != 1:  # not an initial
        candidates += [
            ("alt", as_printed(picture.alt, text)),
            ("title", picture.title),
            *(("list of illustrations", page.plates.get(anchor, "")) for anchor in picture.anchors),
            ("figure text", text),
            ("neighbouring text", line_below(page, after)),
            (HEADING_ABOVE, heading_above(page, at, after)),
        ]
    return next(((plain_text(text), name) for name, text in candidates if names_something(text)), ("", ""))


def figure_runs(page: Page, at: int) -> tuple[list[Run], list[Run], int]:
    """(text below, text above, position after the figure) of the picture at position `at`, within its figure.

    Text above counts only if no other picture of the figure precedes it.
    """
    picture = page.line[at]
    assert isinstance(picture, Picture)
    figure = picture.figure()
    sides: list[list[Run]] = []
    ends: list[int] = []
    for step in (1, -1):
        runs, place = [], at + step
        while 0 <= place < len(page.line) and isinstance(run := page.line[place], Run) and figure is not None and figure in run.box.chain():
            runs.append(run)
            place += step
        sides.append(runs[::step])
        ends.append(place)
    before = page.line[ends[1]] if ends[1] >= 0 else None
    shared = isinstance(before, Picture) and figure is not None and figure in before.box.chain()
    return sides[0], [] if shared else sides[1], ends[0]


def joined(runs: Iterable[Run]) -> str:
    return plain_text(" ".join(run.text[:MAX_FIGURE_TEXT] for run, _ in zip(runs, range(20)))[:MAX_FIGURE_TEXT])


def as_printed(alt: str, text: str) -> str:
    """The figure's text if it equals or continues the alt text, which loses the case of small capitals."""
    return text if letters(alt) and letters(text).startswith(letters(alt)) and text != text.lower() else alt


def letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def line_below(page: Page, after: int) -> str:
    """A heading or a centred line directly below the picture, but no chapter number or front matter."""
    below = page.line[after] if after < len(page.line) else None
    return below.text if isinstance(below, Run) and (below.heading or is_centred(below)) and is_line(below) else ""


def heading_above(page: Page, at: int, after: int) -> str:
    """The heading directly above the picture. It names the text that follows, which the picture may or may not show."""
    below, above = (page.line[place] if 0 <= place < len(page.line) else None for place in (after, at - 1))
    others = at > 1 and isinstance(page.line[at - 2], Picture)  # then the heading belongs to that picture
    if others or (isinstance(below, Run) and is_in(below, "h1")):  # the book's title: the picture belongs to the title page
        return ""
    return above.text if isinstance(above, Run) and above.heading and is_line(above) else ""


def is_line(run: Run) -> bool:
    return len(run.text) <= LONGEST_LINE and not is_in(run, "h1") and not NO_CAPTION.fullmatch(run.text)


def is_in(run: Run, tag: str) -> bool:
    return any(box.tag == tag for box in run.box.chain())


def is_centred(run: Run) -> bool:
    return run.box.tag == "center" or bool(CENTRED.search(run.box.classes))


def context_of(page: Page, at: int) -> str:
    """Up to LONGEST_CONTEXT characters of the story around a picture: the end of the text before, the start of the text after."""
    _, above, after = figure_runs(page, at)
    first = at - len(above)
    follows = prose(page.line[after : after + 40])
    precedes = prose(page.line[max(0, first - 40) : first][::-1], backwards=True)
    room = max(LONGEST_CONTEXT // 2, LONGEST_CONTEXT - len(precedes) - 1)
    follows = follows if len(follows) <= room else follows[: room + 1].rpartition(" ")[0]
    room = LONGEST_CONTEXT - len(follows) - 1
    precedes = precedes if len(precedes) <= room else precedes[-room - 1 :].partition(" ")[2]
    return f"{precedes} {follows}".strip()


def prose(line: Iterable[Run | Picture | None], *, backwards: bool = False) -> str:
    """The text of runs that are neither headings nor captions, until there is enough."""
    texts: list[str] = []
    for run in line:
        if isinstance(run, Run) and not run.heading and not run.caption:
            texts.append(run.text[-MAX_FIGURE_TEXT:] if backwards else run.text[:MAX_FIGURE_TEXT])
        if sum(map(len, texts)) >= LONGEST_CONTEXT:
            break
    return plain_text(" ".join(texts[::-1] if backwards else texts))


# ---------------------------------------------------------------------------------------------------------------------
# the book

BOOK_PAGE = re.compile(r"-h\.html?$|^pg\d+-images\.html?(\.utf8)?$", re.I)
META_NAMES = {
    "title": ("dc.title", "dcterms.title", "og:title", "title"),
    "author": ("dc.creator", "dcterms.creator", "author", "marcrel.aut"),
    "illustrator": ("marcrel.ill", "dc.contributor.illustrator", "illustrator"),
}
TITLE_TAG = re.compile(r"(?:the )?project gutenberg(?:'s|’s)? e-?(?:book|text)(?: of)?,? (?P<title>.+?)(?:,? by (?P<author>.+?))?\.?", re.I)
ILLUSTRATED_BY = re.compile(r"(?:^|\W)(?:illustrated|illustrations|engravings|pictures) by ((?:[^\W\d_][\w.'’-]* ?){2,4})$", re.I)


def book_facts(page: Page, name: str) -> dict[str, str]:
    """Title, author, illustrator and gutenberg_id: from the page's meta elements, opening block and title, and from its file name."""
    head = "".join(page.head[:MAX_HEAD])[:MAX_HEAD].split("*** START OF")[0].replace("\r", "")
    tag = TITLE_TAG.fullmatch(squeeze(page.title)[:LONGEST_CONTEXT].removesuffix("| Project Gutenberg").strip())
    facts = {}
    for fact, names in META_NAMES.items():
        line = re.search(rf"^[ \t]*{fact}s?[ \t]*:[ \t]*(.+(?:\n[ \t]+\S.*)*)", head, re.I | re.M)
        texts = [page.meta.get(meta, "") for meta in names]
        texts += [line[1] if line else "", (tag.groupdict().get(fact) or "") if tag else ""]
        facts[fact] = next((plain for text in texts if (plain := plain_text(text[:LONGEST_CONTEXT]))), "")
    facts["title"] = facts["title"] or plain_text(page.title[:LONGEST_CONTEXT])
    facts["illustrator"] = facts["illustrator"] or illustrator_on_title_page(page)
    number = re.search(r"(?:pg)?(\d{2,})-(?:h|images)\.", posixpath.basename(name)) or re.search(r"(?:eBook|Etext) #(\d+)", head, re.I)
    facts["gutenberg_id"] = number[1] if number else ""
    return facts


def illustrator_on_title_page(page: Page) -> str:
    for run in [one for one in page.line if isinstance(one, Run)][:60]:
        if named := ILLUSTRATED_BY.search(run.text[:LONGEST_CONTEXT]):
            return named[1].title() if named[1].isupper() else named[1]
    return ""
