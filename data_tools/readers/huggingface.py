"""Hugging Face data sets, by id or in a local folder, through `datasets`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.images.pictures import PictureError
from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.files import checked, read_file
from data_tools.readers.listing import Found, Listing, Options, Row
from data_tools.readers.words import COLUMNS, column_name, group_of, normal, style_of, words_from
from tokun.extras import need

PICTURES = "__picture__"  # the column of pictures, whatever it was called


@lru_cache(maxsize=1)
def open_splits(source: str) -> dict[str, Any]:
    """{split: data set} of a folder written by save_to_disk, a folder of Parquet files, or an id; pictures undecoded."""
    datasets = need("datasets", extra="data")
    folder = Path(source)
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            splits = datasets.load_from_disk(source)
        elif folder.is_file():
            splits = datasets.load_dataset("parquet", data_files={"train": source})
        else:
            splits = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(f"SOURCE {source} is no data set that `datasets` can open: {error}") from error
    splits = dict(splits) if isinstance(splits, dict) else {"all": splits}
    undecoded = {}
    for name, data in splits.items():
        column = picture_column(datasets, data, source)
        undecoded[name] = data.cast_column(column, datasets.Image(decode=False)).rename_column(column, PICTURES)
    return undecoded


def picture_column(datasets: Any, data: Any, source: str) -> str:
    """The name of the column that holds pictures. Raises ValueError naming the columns there are."""
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            return name
    for name in ("image", "img", "picture", "jpg", "png", "webp"):
        feature = data.features.get(name)
        if getattr(feature, "dtype", "") in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature):
            return name
    raise ValueError(f"{source} has no column of pictures: its columns are {sorted(data.features)}. Name the one with the bytes: image")


def read_huggingface(source: Path, options: Options) -> Listing:
    """A data set by its id (owner/name) or in a local folder, through `datasets`. Its splits are not taken over."""
    found, words = DiskList(), DiskDict()
    for split, data in sorted(open_splits(source.as_posix()).items()):
        columns = [name for name in data.features if column_name(name) in COLUMNS]
        classes = {column_name(name): data.features[name].names for name in columns if hasattr(data.features[name], "names")}
        rows = iter(data.select_columns(columns)) if columns else ({} for _ in range(len(data)))
        for index, row in enumerate(rows):
            record = normal(row)
            for name, names in classes.items():
                if isinstance(record[name], int) and 0 <= record[name] < len(names):
                    record[name] = names[record[name]]
            path = f"{split}/{index:08d}"
            found.append(Found(path, where=Row(split, index), group=group_of(record) or "", style=style_of(record), beside=False))
            words[path] = words_from(record)
    return Listing(source, found, words)


def read_row(base: Path, row: Row) -> bytes:
    """The bytes of a picture in a row, or of the file that the row names within the data set. Raises PictureError."""
    value = open_splits(base.as_posix())[row.split][row.index][PICTURES] or {}
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
    """Where the files that rows name may lie: in a local data set's folder, and in the folders of what was downloaded."""
    datasets, hub = need("datasets", extra="data"), need("huggingface_hub.constants", extra="data")
    downloads = [Path(datasets.config.HF_DATASETS_CACHE).resolve(), Path(hub.HF_HUB_CACHE).resolve()]
    return [local.resolve(), *downloads] if local else downloads
