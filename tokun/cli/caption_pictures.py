"""Words for many pictures, by `sample.py --image` with a folder or several files.

    out/words.jsonl    one record per text: image, text, register or "" for an answer, confidence
    out/captions.csv   file_name, caption and confidence of each picture, to correct by hand; `prepare --captions` reads it
    out/page-001.png   the pictures beside their captions, ON_PAGE on each

Killed, it loses one picture: the same command goes on.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from tokun.inference.image_to_codes import open_picture
from tokun.render.grids import captioned_grid, save_page
from tokun.utils import checkpoint
from tokun.utils.csv_rows import read_rows
from tokun.utils.errors import BadSample, UserError

if TYPE_CHECKING:
    from tokun.inference.conditional_generation import Words

LISTED, TABLE, UNFINISHED = "words.jsonl", "captions.csv", ".words.jsonl"
COLUMNS = ("file_name", "caption", "confidence")
ON_PAGE, CELL = 24, 224  # pictures on a page, and their longest side in pixels
SHOWN = 10  # pictures whose words are printed


def is_one(paths: Sequence[Path]) -> bool:
    return len(paths) == 1 and not paths[0].is_dir()


def pictures_of(paths: Sequence[Path], out: Path) -> dict[str, Path]:
    """{name: file} of the pictures among `paths`: files, and folders with all below them, by their suffixes, without what lies in `out`.
    Names count from the folder, if it is the only one, as `prepare` counts them. Raises UserError for a path that does not exist, and if
    there is no picture."""
    suffixes = readable_suffixes()
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"--image {path} does not exist: name pictures, or a folder of them")
        if not path.is_dir():
            found[shown(path)] = path
            continue
        if path.resolve() == out.resolve():
            raise UserError(f"--out {out} is the folder of the pictures: name another one")
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(one for one in subfolders if Path(folder, one).resolve() != out.resolve())
            inside = [Path(folder, name) for name in sorted(names) if Path(name).suffix.lower() in suffixes and not name.startswith(".")]
            found.update({shown(one.relative_to(path) if len(paths) == 1 else one): one for one in inside})
    if not found:
        raise UserError(f"--image {paths[0]} holds no picture ({', '.join(sorted(suffixes)[:8])} …)")
    return found


def shown(path: Path) -> str:
    """A path as valid UTF-8 text, as in prepare's tables: other bytes of a name become \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def readable_suffixes() -> set[str]:
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in ("PDF", "EPS")}


def caption_pictures(
    say: Callable[[Image.Image], list[Words]], channels: int, pictures: dict[str, Path], out: Path, asked: dict[str, Any]
) -> None:
    """Write the words that `say` finds for each picture. `channels`: of the model's pictures. `asked`: what decides the words; those of an
    earlier start with the same are kept, and so are the rows of a table that is there: somebody may have corrected them. Raises UserError
    if it is another table."""
    part, kept = out / UNFINISHED, rows_of(out / TABLE)
    asked = json.loads(json.dumps(asked))
    done = {name: texts for name, texts in earlier(part, asked).items() if name in pictures}
    unread: dict[str, str] = {}
    records = [{"asked": asked}, *({"image": name, "words": texts} for name, texts in done.items())]
    checkpoint.write_text(part, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    with open(part, "a", encoding="utf-8") as file:
        for name, path in tqdm(pictures.items(), desc="words", unit="picture"):
            if name in done:
                continue
            try:
                image = open_picture(path, channels)
            except (BadSample, OSError, UserError) as error:
                unread[name] = str(error)
                continue
            done[name] = [asdict(one) | {"confidence": round(one.confidence, 4)} for one in say(image)]
            file.write(json.dumps({"image": name, "words": done[name]}, ensure_ascii=False) + "\n")
            file.flush()
    texts = [{"image": name, **one} for name in pictures for one in done.get(name, ())]
    checkpoint.write_text(out / LISTED, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in texts))
    if any(words[0]["register"] for words in done.values()):
        drafts = {name: (name, words[0]["text"], str(words[0]["confidence"])) for name, words in done.items()}
        table = drafts | kept
        write_table(list(table.values()), out / TABLE)
        write_pages({name: table[name][1] for name in drafts}, pictures, out)
    tell(done, unread, out, len(kept))
    part.unlink()


def rows_of(table: Path) -> dict[str, tuple[str, ...]]:
    """{picture: its row} of a table of an earlier start. Raises UserError if it has other columns."""
    if not table.is_file():
        return {}
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error}): save it as CSV UTF-8, name another --out, or move it away") from error
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)  # as spreadsheets of all countries write them
    head, *rows = [cells for _, cells in read_rows(io.StringIO(text, newline=""), table, separator=separator)] or [[]]
    if tuple(head[: len(COLUMNS)]) != COLUMNS or any(len(row) < 2 for row in rows if row):
        raise UserError(f"{table} is another table (its first line is {first.strip()!r:.80}): name another --out, or move it away")
    return {row[0]: tuple(row[: len(COLUMNS)]) for row in rows if row}


def write_table(rows: Sequence[tuple[str, ...]], table: Path) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *rows])
    checkpoint.write_text(table, "\ufeff" + text.getvalue())  # without the mark, Excel takes it for another encoding


def earlier(part: Path, asked: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{picture: its words} of an earlier start that asked the same."""
    if not part.is_file():
        return {}
    records = []
    for line in part.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:  # the end, or killed while it was written
            break
    if not records or records[0] != {"asked": asked}:
        return {}
    return {record["image"]: record["words"] for record in records[1:]}


def write_pages(captions: dict[str, str], pictures: dict[str, Path], out: Path) -> None:
    """Pages of the pictures with their names and captions, to correct the table by."""
    names = list(captions)
    for number, start in enumerate(tqdm(range(0, len(names), ON_PAGE), desc="pages", unit="page"), 1):
        part = names[start : start + ON_PAGE]
        images = [open_picture(pictures[name], 1) for name in part]
        for image in images:
            image.thumbnail((CELL, CELL))
        page = captioned_grid(images, [(name, captions[name]) for name in part], columns=6, cell=CELL, font_size=14)
        save_page(page, out / f"page-{number:03d}.png")


def tell(done: dict[str, list[dict[str, Any]]], unread: dict[str, str], out: Path, kept: int) -> None:
    print("confidence, picture, words:")
    for name, words in list(done.items())[:SHOWN]:
        print(f"{words[0]['confidence']:.2f}  {name}: {words[0]['text']}")
    if len(done) > SHOWN:
        print(f"… and {len(done) - SHOWN:,} more")
    for name, why in list(unread.items())[:SHOWN]:
        print(f"left out: {name}: {why}")
    if len(unread) > SHOWN:
        print(f"… and {len(unread) - SHOWN:,} more are left out")
    print(f"All are in {out / LISTED}.")
    if any(words[0]["register"] for words in done.values()):
        there = f" ({kept:,} rows that were there are kept as they are)" if kept else ""
        print(
            f"Correct {out / TABLE}{there}; {out / 'page-001.png'} and so on show the pictures. "
            f"Then: tokun prepare … --captions {out / TABLE}"
        )
