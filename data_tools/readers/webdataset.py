"""WebDataset: tar files of KEY.jpg with KEY.txt or KEY.json beside it, read in place."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.files import MAX_TEXT_BYTES, PICTURE_SUFFIXES, as_path, find_files, why_not_open
from data_tools.readers.listing import Found, Listing, Options, Remote, Span, Words
from data_tools.readers.words import COLUMNS, group_of, json_object, normal, style_of, words_from
from data_tools.text.captions import plain_text
from data_tools.text.encoding import decode_text

TAR_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TARS = (".tar", *TAR_PACKED)
Place = Callable[[int, int], Span | Remote]


def read_webdataset(source: Path, options: Options) -> Listing:
    """Tar files of KEY.jpg with KEY.txt or KEY.json beside it: one file, or all in a folder. They are read in place."""
    base = source if source.is_dir() else source.parent
    found, words = DiskList(), DiskDict()
    for path in sorted(find_files(base, options.leave_out, TARS)) if source.is_dir() else [source.name]:
        if problem := why_not_open(base / path, base.resolve()):
            found.append(Found(path, problem))
            continue
        try:
            with open(base / path, "rb") as file:
                read_tar(file, path, lambda start, size, path=path: Span(path, start, size), found, words)
        except OSError:
            found.append(Found(path, "cannot be read"))
    return Listing(base, found, words)


class Sample:
    """Members of one key: its pictures, and what is said of them."""

    __slots__ = ("caption", "extensions", "pictures", "record")

    def __init__(self) -> None:
        self.pictures: list[Found] = []
        self.record: dict[str, Any] = {}
        self.caption = ""
        self.extensions: set[str] = set()


def read_tar(file: BinaryIO, tar_path: str, place: Place, found: DiskList, words: DiskDict) -> None:
    """Add the pictures of one open tar file, in its order, and their words. Damage is listed under the tar's own path."""
    samples: list[Sample] = []
    latest: dict[str, Sample] = {}
    damage = "compressed tar: unpack it to .tar first" if tar_path.lower().endswith(TAR_PACKED) else ""
    try:
        for tar, member in () if damage else tar_members(file):
            folder, name = posixpath.split(member.name)
            stem, _, extension = name.partition(".")
            key, extension = posixpath.join(folder, stem), extension.lower()
            if key not in latest or extension in latest[key].extensions:  # a key that comes again is another sample
                latest[key] = Sample()
                samples.append(latest[key])
            add_member(tar, member, extension, latest[key], f"{tar_path}/{as_path(member.name).removeprefix('./')}", place)
    except OSError:
        damage = "cannot be read"
    except (tarfile.TarError, ValueError, EOFError):
        damage = "damaged tar file"
    for sample in samples:
        for one in sample.pictures:
            path = one.path if one.path not in words else f"{one.path}+{len(words)}"  # the same name once more
            words[path] = Words(caption=sample.caption).or_else(words_from(sample.record))
            found.append(replace(one, path=path, group=group_of(sample.record) or "", style=style_of(sample.record)))
    if damage:
        found.append(Found(tar_path, damage))


def tar_members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar, one at a time."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        last = -1
        while (member := tar.next()) is not None:
            if member.size < 0 or member.offset <= last:
                raise tarfile.ReadError("a member before the one before")  # it would go round for ever
            last = member.offset
            tar.members.clear()  # else it remembers every one
            yield tar, member


def add_member(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: Sample, path: str, place: Place) -> None:
    """Note one member of a tar: a picture's place, or words."""
    sample.extensions.add(extension)
    if posixpath.splitext(member.name)[1].lower() in PICTURE_SUFFIXES:
        problem = "" if member.isreg() and not member.issparse() else "not a regular file"
        if member.name.startswith("/") or ".." in member.name.split("/"):
            problem = "path leaves the source"
        sample.pictures.append(Found(path, problem, where=place(member.offset_data, member.size), beside=False))
    elif member.isreg() and member.size <= MAX_TEXT_BYTES and extension in ("json", "txt", "caption", "text"):
        data = tar.extractfile(member)
        text = decode_text(data.read()) if data else ""
        if extension != "json":
            sample.caption = sample.caption or plain_text(text)
            return
        try:
            record = normal(json_object(text, where=member.name))
            sample.record = {name: value for name, value in record.items() if name in COLUMNS}
        except ValueError:  # a sample's broken JSON: its picture is then one without a caption
            return
