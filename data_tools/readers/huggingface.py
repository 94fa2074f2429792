"""Hugging Face data sets, by id or in a local folder, through `datasets`."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.images.image_ops import PictureError
from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.caption_guess import MOST_ROWS, TextColumns
from data_tools.readers.caption_tables import check_caption_column, note_on
from data_tools.readers.files import checked, find_files, read_file
from data_tools.readers.listing import DatasetRow, Found, Listing, Options, shown
from data_tools.readers.table_files import PATH_COLUMNS, Table, column_name
from data_tools.readers.words import COLUMNS, group_of, normal, style_of, words_from
from tokun.utils import network_access
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

PICTURES = "__picture__"  # our name for the picture column
PICTURE_COLUMNS = (
    "image",
    "img",
    "picture",
    "photo",
    "jpg",
    "jpeg",
    "png",
    "webp",
)  # names of the picture column, the first one present is used
SPLIT = re.compile(r"(?:^|[^a-z])(train|training|validation|valid|val|dev|test|testing|eval)(?:[^a-z]|$)")  # in a file name
SPLITS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test", "eval": "test"}


@lru_cache(maxsize=1)
def open_splits(source: str) -> dict[str, Any]:
    """{split: data set} of a folder written by save_to_disk, a folder of Parquet files, or an id; pictures undecoded.

    Raises FileNotFoundError if there is no such data set, UserError if the picture column is ambiguous or missing.
    """
    datasets = need("datasets", extra="data")
    folder = Path(source)
    try:
        if is_saved(folder):
            splits = datasets.load_from_disk(os.path.abspath(source))
        elif folder.is_file():
            splits = datasets.load_dataset("parquet", data_files={"train": literal(folder)})
        elif folder.is_dir() and (files := data_files(folder)):
            splits = datasets.load_dataset(
                "parquet", data_files={split: [literal(folder / path) for path in paths] for split, paths in files.items()}
            )
        else:
            with network_access.fetched(source, "SOURCE", repo_type="dataset"):
                splits = datasets.load_dataset(source)
    except network_access.NotFetched:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        rename = "; it reads no path with :: or with bytes that are not UTF-8: rename the folder" if is_odd(source) else ""
        raise FileNotFoundError(f"SOURCE {shown(source)} is not a data set that `datasets` can open: {error}{rename}") from error
    splits = dict(splits) if isinstance(splits, dict) else {"all": splits}
    undecoded = {}
    for name, data in splits.items():
        column = picture_column(datasets, data, source)
        undecoded[name] = data.cast_column(column, datasets.Image(decode=False)).rename_column(column, PICTURES)
    return undecoded


def is_odd(path: str) -> bool:
    return "::" in path or shown(path) != path


def literal(path: Path) -> str:
    """A path that `datasets`, which takes names for patterns, reads as this one file."""
    return glob.escape(os.path.abspath(path))


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def data_files(folder: Path) -> dict[str, list[str]]:
    """{split: Parquet files with pictures} below a folder, as relative paths."""
    files: dict[str, list[str]] = {}
    for path in sorted(path for path in find_files(folder, None) if path.lower().endswith(".parquet")):
        if kind_of_parquet(folder / path) == "pictures":
            named = SPLIT.search(posixpath.splitext(path.lower())[0])
            files.setdefault(SPLITS.get(named[1], named[1]) if named else "train", []).append(path)
    return files


def kind_of_parquet(path: Path) -> str:
    """What a Parquet file's columns hold: pictures, paths or nothing; broken if it cannot be opened."""
    pa, pq = need("pyarrow", extra="data"), need("pyarrow.parquet", extra="data")
    try:
        with open(path, "rb") as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError, ValueError):
        return "broken"
    names = {column_name(name) for name in schema.names}
    if any(holds_pictures(pa, one.name, one.type) for one in schema):
        return "pictures"
    return "paths" if names.intersection(PATH_COLUMNS) else "nothing"


def holds_pictures(pa: Any, name: str, kind: Any) -> bool:
    struct = pa.types.is_struct(kind) and {"bytes", "path"} <= {one.name for one in kind}
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return struct or (binary and name.lower() in PICTURE_COLUMNS)


def picture_column(datasets: Any, data: Any, source: str) -> str:
    """The name of the picture column. Raises UserError that lists all columns, or the candidates."""
    features = {name.lower(): name for name in data.features}
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    known = [features[name] for name in PICTURE_COLUMNS if features.get(name) in found]
    if known or len(found) == 1:
        return (known or found)[0]
    if found:
        raise UserError(
            f"{source} has several picture columns, {', '.join(found)}, and none is named image: rename the one to use to image"
        )
    for name in PICTURE_COLUMNS:
        feature = data.features.get(name)
        if getattr(feature, "dtype", "") in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature):
            return name
    urls = "url" in features or "image_url" in features
    way_out = "Download the pictures at its addresses first (img2dataset does)" if urls else "Rename the one with the bytes to image"
    raise UserError(f"{source} has no picture column: its columns are {sorted(data.features)}. {way_out}")


def read_huggingface(source: Path, options: Options) -> Listing:
    """A data set by its id (owner/name) or in a local folder, through `datasets`. Its splits are ignored.

    Raises UserError if captions are needed and no column has a known name for them.
    """
    found, words = DiskList(), DiskDict()
    notes: dict[str, None] = {}
    texts = TextColumns()
    wanted = {*COLUMNS, column_name(options.caption_column)}
    for split, data in sorted(open_splits(source.as_posix()).items()):
        notes.update(dict.fromkeys(check_captions(source, tuple(map(column_name, data.features)), options)))
        for row in islice(data.select_columns(written), MOST_ROWS) if (written := text_columns(data)) else ():
            texts.add(normal(row))
        columns = [name for name, kind in data.features.items() if column_name(name) in wanted and type(kind).__name__ != "Image"]
        classes = {column_name(name): data.features[name].names for name in columns if hasattr(data.features[name], "names")}
        rows = iter(data.select_columns(columns)) if columns else ({} for _ in range(len(data)))
        for index, row in enumerate(rows):
            record = normal(row)
            for name, names in classes.items():
                if isinstance(record[name], int) and 0 <= record[name] < len(names):
                    record[name] = names[record[name]]
            path = f"{split}/{index:08d}"
            found.append(Found(path, where=DatasetRow(split, index), group=group_of(record) or "", style=style_of(record), beside=False))
            words[path] = words_from(record, options.caption_column)
    guess = None if options.caption_column else texts.guess(source.name)
    return Listing(source, found, words, notes=(*notes, str(guess)) if guess else tuple(notes), guesses=(guess,) if guess else ())


def text_columns(data: Any) -> list[str]:
    return [name for name, kind in data.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]


def check_captions(source: Path, columns: tuple[str, ...], options: Options) -> list[str]:
    """Notes on the caption column. Raises TableError if captions are needed and there is none."""
    table = Table(str(source), tuple(name for name in columns if name != PICTURES), 0, "", lambda: iter(()))
    if options.caption_column or (options.captions_needed and table.columns):  # of pictures alone: as a folder without captions
        check_caption_column(table, options)
    return [note for note in (note_on(table, options),) if note]


def read_row(base: Path, row: DatasetRow) -> bytes:
    """The bytes of a picture in a row, or of the file within the data set that the row names. Raises PictureError."""
    data = open_splits(base.as_posix())[row.split].select_columns([PICTURES])  # other columns might be decoded
    value = data[row.index][PICTURES] or {}
    if value.get("bytes") is not None:
        return checked(value["bytes"], None)
    if not value.get("path"):
        raise PictureError("missing file")
    local = base if base.is_dir() else base.parent if base.is_file() else None
    path = ((local or base) / value["path"]).resolve()
    if not any(path.is_relative_to(start) for start in row_folders(local)):
        raise PictureError("path leaves the source")
    return read_file(path.parent, Found(path.name))


def row_folders(local: Path | None) -> list[Path]:
    """Where files named by rows may be: in a local data set's folder and in the download folders."""
    datasets, hub = need("datasets", extra="data"), need("huggingface_hub.constants", extra="data")
    downloads = [Path(datasets.config.HF_DATASETS_CACHE).resolve(), Path(hub.HF_HUB_CACHE).resolve()]
    return [local.resolve(), *downloads] if local else downloads
