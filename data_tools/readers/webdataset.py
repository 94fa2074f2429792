"""WebDataset: tar files with KEY.jpg and KEY.txt or KEY.json, read in place.

A sample holds one picture. Its masks, depth maps and thumbnails are listed but not read. If it is unclear which words
belong to which picture, none are used.
"""

from __future__ import annotations

import posixpath
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.files import MAX_TEXT_BYTES, PICTURE_SUFFIXES, as_path, why_not_open
from data_tools.readers.folder_scan import SECOND_WORDS, TAR_PACKED, kind_of, why_unknown
from data_tools.readers.listing import Found, Listing, Options, Remote, Span, Words
from data_tools.readers.table_files import CAPTION_COLUMNS, caption_of, column_name
from data_tools.readers.words import COLUMNS, ODD_CAPTION, group_of, json_object, normal, odd_caption, style_of, words_from
from data_tools.text.captions import plain_text, raw_of
from data_tools.text.encoding import decode_text
from tokun.data.shards import SEVERAL, TWICE, key_and_suffix
from tokun.data.tars import FILLING
from tokun.utils.errors import BadSample

Place = Callable[[int, int], Span | Remote]
OF_ANOTHER = "not read: beside the picture of its sample (a mask, a depth map, a thumbnail)"
OTHER_NAME = "not read: words under another name than their picture's"
NO_PICTURE = "not read: words without a picture of their key"
TABLE_IN_TAR = "not read: a table in a tar: unpack the tar to use it"
PICTURE_NAMES = frozenset(
    {"", "color", "colour", "full", "image", "img", "input", "main", "orig", "original", "photo", "pic", "picture", "rgb"}
)
"""The part between the key and the suffix of a sample's main picture: KEY.jpg, KEY.image.jpg."""


def read_webdataset(source: Path, options: Options) -> Listing:
    """One tar file."""
    tars = Tars(options)
    tars.read(source.parent, source.name)
    return Listing(source.parent, tars.found, tars.words, unread=tars.unread, notes=tars.notes)


@dataclass
class MemberWords:
    """The words in the members with the same name."""

    member: str
    caption: str = ""
    raw: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why there is no caption, if the member cannot be read."""


@dataclass
class Sample:
    """The members of one key. "KEY.mask.png" has the name "mask", "KEY.png" none."""

    pictures: list[tuple[str, str, Found]] = field(default_factory=list)
    """(name, extension, picture)."""
    texts: dict[str, MemberWords] = field(default_factory=dict)
    """Words by name."""
    others: list[str] = field(default_factory=list)
    """Paths of members that are neither."""
    extensions: dict[str, None] = field(default_factory=dict)

    def matched(self) -> Iterator[tuple[Found, MemberWords | None, str]]:
        """(picture, its words, why it is not read, or "") of each picture.

        If no picture has the bare key but each has words under its own name, the key contains a dot: map.1.jpg, map.1.txt,
        map.2.jpg, map.2.txt.
        """
        plain = [one for name, _, one in self.pictures if not name]
        if not plain and self.pictures and all(name in self.texts for name, _, _ in self.pictures):
            yield from ((one, self.texts[name], "") for name, _, one in self.pictures)
            return
        own = plain or [one for name, _, one in self.pictures if name in PICTURE_NAMES or len(self.pictures) == 1]
        own = own or [one for _, _, one in self.pictures]
        for name, extension, one in self.pictures:
            words = next((self.texts[own] for own in ("", extension, name, *CAPTION_COLUMNS) if own in self.texts), None)
            yield one, words, OF_ANOTHER if one not in own else SEVERAL if len(own) > 1 else ""


class Tars:
    """The pictures in tar files, in order, with their words."""

    def __init__(
        self, options: Options, found: DiskList | None = None, words: DiskDict | None = None, unread: DiskDict | None = None
    ) -> None:
        self.caption_column = options.caption_column
        self.found = DiskList() if found is None else found
        self.words = DiskDict() if words is None else words
        self.unread = DiskDict() if unread is None else unread
        self.beside: Counter[str] = Counter()  # members beside a picture that are not read, by extension

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the members that are not read."""
        if not self.beside:
            return ()
        return (
            "Members of the tars beside pictures that are not read: "
            f"{', '.join(f'{n:,} × .{name}' for name, n in self.beside.most_common(8))}.",
        )

    def read(self, base: Path, path: str) -> None:
        """Add a tar file on disk."""
        if problem := why_not_open(base / path, base.resolve()):
            self.found.append(Found(path, problem))
            return
        try:
            with open(base / path, "rb") as file:
                self.read_open(file, path, lambda start, size: Span(path, start, size))
        except OSError:
            self.found.append(Found(path, "cannot be read"))

    def read_open(self, file: BinaryIO, tar_path: str, place: Place) -> None:
        """Add an open tar file. Damage is listed under the tar's own path."""
        keys: dict[str, list[Sample]] = {}
        damage = "compressed tar: unpack it to .tar first" if tar_path.lower().endswith(TAR_PACKED) else ""
        try:
            for tar, member in () if damage else tar_members(file):
                key, extension = key_and_suffix(member.name)
                samples = keys.setdefault(unicodedata.normalize("NFC", key), [])
                if not samples or extension in samples[-1].extensions:  # a repeated key is another sample
                    samples.append(Sample())
                self.add_member(tar, member, extension, samples[-1], f"{tar_path}/{as_path(member.name).removeprefix('./')}", place)
        except OSError:
            damage = "cannot be read"
        except (tarfile.TarError, ValueError, EOFError):
            damage = "damaged tar file"
        for samples in keys.values():
            self.add_samples(samples, tar_path)
        if damage:
            self.found.append(Found(tar_path, damage))

    def add_member(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: Sample, path: str, place: Place) -> None:
        """Record one member of a tar: a picture's location, or words."""
        sample.extensions[extension] = None
        name, kind = extension.rpartition(".")[0], posixpath.splitext(member.name)[1].lower()
        if kind in PICTURE_SUFFIXES:
            problem = "" if member.isreg() and not member.issparse() else "not a regular file"
            if member.name.startswith("/") or ".." in member.name.split("/"):
                problem = "path leaves the source"
            sample.pictures.append((name, extension, Found(path, problem, where=place(member.offset_data, member.size), beside=False)))
        elif member.isreg() and member.size <= MAX_TEXT_BYTES and kind in (".json", ".txt", ".caption", ".text"):
            data = tar.extractfile(member)
            text = decode_text(data.read()) if data else ""
            texts = sample.texts.setdefault(name, MemberWords(as_path(member.name).removeprefix("./")))
            if kind != ".json":
                if not texts.caption:
                    texts.caption, texts.raw = plain_text(caption_of(text) or ""), raw_of(text)
                else:
                    self.unread[path] = SECOND_WORDS
                return
            try:
                record = normal(json_object(text, where="caption file"))
            except BadSample as error:
                texts.problem = str(error)
                return
            wanted = {*COLUMNS, column_name(self.caption_column)}
            texts.record = {name: value for name, value in record.items() if name in wanted}
            if odd := odd_caption(record, self.caption_column):
                texts.problem = ODD_CAPTION.format(odd)
        elif not member.isdir():
            sample.others.append(path)

    def add_samples(self, samples: list[Sample], tar_path: str) -> None:
        """Add the samples of one key. Samples with the same key count as different ones if all are complete and have the same members."""
        twice = len(samples) > 1 and any(sample.extensions.keys() != samples[0].extensions.keys() for sample in samples)
        for sample in samples:
            read: list[MemberWords] = []
            for one, texts, why_not in sample.matched():
                read += [texts] if texts else []
                words = (
                    Words(caption=texts.caption, raw=texts.raw).or_else(words_from(texts.record, self.caption_column)) if texts else Words()
                )
                words = replace(words, words_from=f"{tar_path}/{texts.member}") if texts and words.caption else words
                problem = one.problem or (TWICE if twice else "") or why_not
                of_words = problem == SEVERAL
                if texts and not problem and not words.caption and not words.captions:
                    problem, of_words = texts.problem, True
                path = one.path if one.path not in self.words else f"{one.path}+{len(self.words)}"  # the same name again
                self.words[path] = words if not problem else Words()
                group, style = (group_of(texts.record) or "", style_of(texts.record)) if texts else ("", "")
                self.found.append(replace(one, path=path, problem=problem, of_words=of_words, group=group, style=style))
            spare = f"not read: {TWICE}" if twice else SECOND_WORDS if read else OTHER_NAME if sample.pictures else NO_PICTURE
            self.unread.update({f"{tar_path}/{texts.member}": spare for texts in sample.texts.values() if texts not in read})
            if sample.pictures:
                self.beside.update(posixpath.basename(path).partition(".")[2] for path in sample.others)
            else:
                self.unread.update(
                    {
                        path: TABLE_IN_TAR if "table" in kind_of(posixpath.basename(path)) else why_unknown(posixpath.basename(path))
                        for path in sample.others
                    }
                )


def tar_members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar, one at a time."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        last = -1
        while (member := tar.next()) is not None:
            if member.size < 0 or member.offset <= last:
                raise tarfile.ReadError("a member starts before the previous one")  # it would loop forever
            last = member.offset
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # unknown to typeshed; else it keeps every member in memory
            yield tar, member
        # tarfile takes an unreadable header for the end, does not check for the end mark, and does not see a concatenated tar
        file.seek(tar.offset)
        rest = file.read(FILLING)
        if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
            raise tarfile.ReadError("no end mark, or data after it")
