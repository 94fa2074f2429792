"""COCO caption files: images (id, file_name) and annotations (image_id, caption)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.pipeline.disk import DiskDict, DiskList
from data_tools.readers.files import Misplaced, as_path, listed
from data_tools.readers.listing import Listing, Options
from data_tools.readers.words import join_words, words_from
from tokun.utils.errors import UserError


def read_coco(source: Path, options: Options) -> Listing:
    """A COCO captions file. An image's first caption is its caption; if it has several, `captions_all` lists all."""
    data = coco_object(source)
    images = list(coco_records(data))
    base = options.root or coco_folder(source, [image["file_name"] for image in images[:100]])
    root = base.resolve()
    found, words, misplaced = DiskDict(), DiskDict(), Misplaced(source.name, base, options.root)
    for image in images:
        one = replace(listed(base, root, image["file_name"]), group="")
        if one.path not in found:
            misplaced.add(one, as_path(image["file_name"]))
        words[one.path] = join_words(words.get(one.path), replace(words_from(image), words_from=source.name))
        found.setdefault(one.path, one)
    used = {str(image.get("id")) for image in records(data["images"]) if isinstance(image.get("file_name"), str)}
    missing = sum(isinstance(one.get("caption"), str) and str(one.get("image_id")) not in used for one in records(data["annotations"]))
    return Listing(base, DiskList(found.ordered()), words, missing, notes=tuple(misplaced.notes()))


def coco_records(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One record for each image with a file name in a COCO object, with all its captions. A repeated id gets them once."""
    captions: dict[str, list[str]] = {}
    for one in records(data["annotations"]):
        if isinstance(one.get("caption"), str):
            captions.setdefault(str(one.get("image_id")), []).append(one["caption"])
    licenses = {str(one.get("id")): str(one.get("name", "")) for one in records(data.get("licenses"))}
    for image in records(data["images"]):
        if isinstance(image.get("file_name"), str):
            own = captions.pop(str(image.get("id")), [])
            url = next((image[name] for name in ("flickr_url", "coco_url") if isinstance(image.get(name), str)), "")
            license = licenses.get(str(image.get("license")), "")
            yield {"file_name": image["file_name"], "caption": own, "source_url": url, "license": license}


def records(value: Any) -> Iterable[dict[Any, Any]]:
    """The objects in a JSON list; empty if it is not a list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def coco_object(source: Path) -> dict[str, Any]:
    """The JSON of a COCO captions file. Raises UserError that says what the file holds instead."""
    way_out = "Give a captions_*.json with images (id, file_name) and annotations (image_id, caption), or a table as .csv or .jsonl"
    try:
        data = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not a COCO file: it is not valid JSON. {way_out}") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in ("images", "annotations")):
        there = f"the keys {sorted(map(str, data))[:12]}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise UserError(f"{source} is not a COCO file: it holds {there}, not lists named images and annotations. {way_out}")
    if data["annotations"] and not any("caption" in one for one in records(data["annotations"])):
        raise UserError(f"{source} is a COCO file without captions: none of its annotations has one. {way_out}")
    return data


def coco_folder(source: Path, names: list[str]) -> Path:
    """The folder of a COCO file's pictures: beside it or in the usual layout, whichever holds most of them."""
    split = source.stem.split("_")[-1]  # captions_val2017.json -> val2017
    here = source.parent
    folders = [start / folder for start in (here, here.parent) for folder in (".", "images", split, f"images/{split}")]
    return max(folders, key=lambda folder: sum(os.path.lexists(folder / as_path(name)) for name in names))
