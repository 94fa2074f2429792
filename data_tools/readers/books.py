"""Books in Project Gutenberg's layout: a page *-h.htm and its folder of images (book_page.py reads the page)."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.book_page import BOOK_PAGE, Page, book_facts, illustrations
from data_tools.readers.files import MAX_PAGE_BYTES, PICTURE_SUFFIXES, as_path, why_not_open
from data_tools.readers.folder import read_folder
from data_tools.readers.folder_scan import LONE_PAGE, NO_PAGE
from data_tools.readers.listing import CaptionError, Found, Listing, Options, Words
from data_tools.text.captions import plain_text
from data_tools.text.encoding import decode_text

BESIDE_PAGE = "not read: the book's page says what its pictures show"


def read_gutenberg(source: Path, options: Options) -> Listing:
    """Illustrated books in Project Gutenberg's layout: a page *-h.htm and its images folder, one book or many.

    If a picture on the page links to a larger version, the larger one is listed with the words, and the one on the page
    as a thumbnail. Pictures outside any book are read as in a plain folder.
    """
    base = source if source.is_dir() else source.parent
    listing = read_folder(base, options)
    books: dict[str, list[str]] = {}
    for page in book_pages(base, listing) if source.is_dir() else [source.name]:
        books.setdefault(posixpath.dirname(page), []).append(page)
    if not books:
        raise FileNotFoundError(f"no books in {source}: their pages must be named NUMBER-h.htm or NUMBER-h.html")
    scanned, found = (DiskDict((one.path, one) for one in listing.found) for _ in range(2))
    words, unread = DiskDict(listing.words), DiskDict(listing.unread)
    for book, pages in sorted(books.items()):
        inside = {path: one for path, one in scanned.pairs(f"{book}/" if book else "") if book_around(path, books) == book}
        for one, own in read_book(base, sorted(pages), inside):
            if one.path in inside or one.path not in found:
                found[one.path], words[one.path] = one, own
        for page in pages:
            unread.pop(page, None)
        for one in inside.values():
            unread.update({posixpath.join(posixpath.dirname(one.path), name): BESIDE_PAGE for name in one.sidecars or ()})
    return replace(listing, found=DiskList(found.ordered()), words=words, unread=unread)


def book_pages(base: Path, listing: Listing) -> list[str]:
    """The book pages in a listing; if none is named like one, all pages beside an images folder."""
    pages = [path for path, reason in listing.unread.items() if reason in (LONE_PAGE, NO_PAGE)]
    books = [page for page in pages if BOOK_PAGE.search(posixpath.basename(page))]
    return books or [page for page in pages if (base / page).parent.joinpath("images").is_dir()]


def book_around(path: str, books: dict[str, list[str]]) -> str | None:
    """The folder of the book that a picture belongs to: the nearest enclosing one."""
    folder = posixpath.dirname(path)
    while folder not in books:
        if not folder:
            return None
        folder = posixpath.dirname(folder)
    return folder


def read_book(base: Path, pages: list[str], inside: dict[str, Found]) -> list[tuple[Found, Words]]:
    """The pictures of one book, shown or not, with their words. `inside`: the pictures in its folder."""
    words_of: dict[str, Words] = {}
    thumbnails: dict[str, str] = {}
    ornaments: set[str] = set()
    group, unread = f"book/{posixpath.dirname(pages[0])}", ""
    lower = {path.lower(): path for path in inside}
    for name in pages:
        try:
            page = read_page(base / name, base.resolve())
        except CaptionError as error:
            unread = f"book page: {error}"
            continue
        facts = book_facts(page, name)
        group = f"book/{facts['gutenberg_id']}" if facts["gutenberg_id"] else group
        ornaments.update(picture_path(name, address, inside, lower) for address in page.ornaments)
        for path, large, words in pictures_on(page, name, inside, lower, facts):
            if large:
                thumbnails.setdefault(path, large)
            words_of[large or path] = words_of[large or path].or_else(words) if (large or path) in words_of else words
    entries = []
    for path in sorted(inside.keys() | words_of.keys()):
        one = inside.get(path, Found(path, "missing file"))
        problem = one.problem
        if not problem and path not in words_of:
            problem = unread or ("ornament of the style sheet" if path in ornaments else "not shown in the book")
            problem = f"thumbnail of {thumbnails[path]}" if path in thumbnails else problem
        entries.append((replace(one, problem=problem, group=group, beside=False), words_of.get(path, Words())))
    return entries


def read_page(path: Path, root: Path) -> Page:
    """A book's page. Raises CaptionError if it cannot be read."""
    if problem := why_not_open(path, root):
        raise CaptionError(problem)
    try:
        if path.stat().st_size > MAX_PAGE_BYTES:
            raise CaptionError("too large")
        return Page(decode_text(path.read_bytes()))
    except OSError as error:
        raise CaptionError("cannot be read") from error


def pictures_on(
    page: Page, name: str, inside: dict[str, Found], lower: dict[str, str], facts: dict[str, str]
) -> Iterator[tuple[str, str, Words]]:
    """(path, path of its larger version or "", words) of each picture on a page, then of pictures that it only links to."""
    number = facts["gutenberg_id"]
    book = Words(
        source_url=f"https://www.gutenberg.org/ebooks/{number}" if number else "",
        license=plain_text(page.meta.get("dcterms.rights", "")),
        more={fact: text for fact, text in facts.items() if text},
    )
    shown_here = set()
    for one in illustrations(page, facts["title"]):
        path = picture_path(name, one.src, inside, lower)
        if not path or (one.is_link and (path not in inside or path in shown_here)):
            continue
        large = picture_path(name, one.link, inside, lower)
        large = large if large != path and large in inside and not inside[large].problem else ""
        shown_here.update((path, large))
        more = {**book.more, "context": one.context, "caption_origin": one.caption_source}
        yield path, large, replace(book, caption=one.caption, more=more, words_from=name)


def picture_path(page: str, address: str, inside: dict[str, Found], lower: dict[str, str]) -> str:
    """An address on a page -> the picture's path; "" for anything else or outside the book."""
    address = as_path(unquote(address.split("#")[0].split("?")[0]))
    if not address or posixpath.splitext(address)[1].lower() not in PICTURE_SUFFIXES or re.match(r"[a-z][a-z0-9+.-]*:|/", address, re.I):
        return ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), address))
    if path.startswith("../"):
        return ""
    return path if path in inside else lower.get(path.lower(), path)  # some books were made on a case-insensitive file system
