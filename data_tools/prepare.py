"""Prepare: raw pictures -> clean, captioned image shards, and a manifest that accounts for every file.

    tokun prepare my-pictures/ --style engraving --out shards/

SOURCE is a folder of pictures, of classes, of books or of tar files, a table of paths, a data set, or the address of one of
these in object storage: see readers/. The work is two lists of independent tasks (pipeline/chunks.py). Each task of the first
list measures, cleans and encodes some hundred files. The whole collection is then settled: which pictures are duplicates, which
are kept, and their split and shard. Each task of the second list writes one shard. Every task writes to a temporary file and
renames it, so a killed run resumes, and the bytes depend only on the files and the settings, not on the number of workers or
on interruptions.

Nothing is dropped silently: each input file has a row in `manifest.parquet` with the reason, and `report.html` shows them.
The parts are in pipeline/: tasks, chunks, selection, manifest, output. Runs without torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import report
from data_tools.images.image_ops import OF_OPENCV, opencv
from data_tools.pipeline.chunks import KEPT, Settings, measure_chunk, rows_name
from data_tools.pipeline.disk import DiskDict
from data_tools.pipeline.manifest import MANIFEST, manifest
from data_tools.pipeline.next_steps import captions_warning, misspelt, several_captions, steps, write_captions_to_fill
from data_tools.pipeline.output import GIVEN, PARTIAL, PUBLISH, RECORD, begin, publish, refuse_guessed_column, refuse_other_shards
from data_tools.pipeline.refusal import record_refusal
from data_tools.pipeline.remote_lock import alone_in
from data_tools.pipeline.selection import Columns, Settled, settle, shards_to_write
from data_tools.pipeline.shard_writer import Shard, write_pieces
from data_tools.pipeline.storage_backends import Store, is_url, open_store
from data_tools.pipeline.styles import OwnStyles, own_styles
from data_tools.pipeline.tasks import Progress, Tasks
from data_tools.pipeline.unread_tables import unread_tables
from data_tools.readers import READERS, Listing, Options, PictureError, choose_reader, read_picture, shown
from data_tools.readers.caption_tables import with_captions
from data_tools.readers.folder_scan import RECOGNISED
from data_tools.readers.listing import Guess
from data_tools.readers.table_files import TableError
from tokun.utils import console
from tokun.utils.console import home_path, home_text
from tokun.utils.errors import UserError
from tokun.utils.memory import keep_memory
from tokun.utils.optional_packages import need
from tokun.utils.task_engine import ENGINES, TaskEngine, open_engine


@dataclass(frozen=True)
class PrepareReport:
    """The result: files by (status, reason), pairs by shard, rows of caption tables without a picture."""

    counts: Counter[tuple[str, str]]
    shards: Counter[str]
    unmatched_rows: int
    notes: tuple[str, ...] = ()
    """The reader's notes."""
    captions: Mapping[str, int] = field(default_factory=dict)
    """Counts of pictures without a caption (missing), kept, and kept without a caption (empty); of distinct captions (distinct), and of the
    most frequent one (most)."""
    guesses: tuple[Guess, ...] = ()
    """Caption columns that nobody named."""
    tables: tuple[str, ...] = ()
    """Tables in the source that are not read, the first few."""
    techniques: int = 0
    """Kept pictures with a technique."""
    styles: Mapping[str, int] = field(default_factory=dict)
    """The pictures' own styles, each with its number of pictures before cleaning; empty if one is given for all."""

    @property
    def kept(self) -> int:
        return sum(self.shards.values())

    def pairs(self, split: str) -> int:
        return sum(count for name, count in self.shards.items() if name.startswith(f"{split}-"))

    def table(self) -> str:
        """The counts as text, the most frequent reason first."""
        total = sum(self.counts.values())
        lines = [f"{'files':<46} {total:>9,}", f"{'pairs written':<46} {self.kept:>9,} {self.kept / total:>7.1%}"]
        for (status, reason), count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            if status != KEPT:
                what = reason if reason.startswith("not read: ") else f"{status}: {reason}"
                lines.append(f"  {what:<44} {count:>9,} {count / total:>7.1%}")
        for split in ("train", "val"):
            shards = sum(name.startswith(f"{split}-") for name in self.shards)
            lines.append(f"{split + ' pairs':<46} {self.pairs(split):>9,} in {shards} shard{'' if shards == 1 else 's'}")
        if self.unmatched_rows:
            lines.append(f"{'rows of captions without a picture':<46} {self.unmatched_rows:>9,}")
        lines += self.notes
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """How caption tables are read."""

    encoding: str = "utf-8"
    """The encoding of text tables."""
    quoting: str = "auto"
    """The quoting of text tables: auto, none or csv."""
    captions: Path | None = None
    """A table of captions by path in SOURCE; it takes precedence over all other captions."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done. Nothing here changes the resulting bytes."""

    workers: int = 1
    engine: str = "local"
    ray_address: str = ""
    progress: bool = False


def prepare(
    source: Path | str,
    out: Path | str,
    settings: Settings,
    *,
    reader: str = "auto",
    root: Path | None = None,
    tables: Tables | None = None,
    work: Work | None = None,
    overwrite: bool = False,
) -> PrepareReport:
    """Turn the pictures of `source` into shards, a manifest and a report in `out`.

    `reader` is a name in READERS, or "auto"; `root` is the folder that paths in a table are relative to; `tables` says how tables are read.
    Raises FileNotFoundError or UserError, with the way out, if the source is missing or has no picture, if a caption table cannot be read,
    or if `out` holds something else; WorkerDied if a worker was killed. Running it again resumes.
    """
    source, work = source if is_url(source) else Path(source), work or Work()
    leave_out = None if is_url(out) else Path(out)
    reader = choose_reader(source, reader, leave_out=leave_out)
    check_folders(source, out)
    for package in ("pyarrow", "jinja2"):
        need(package, extra="data")  # fail before hours of work, not after
    if settings.filter in OF_OPENCV:
        opencv()
    settings = replace(settings, source=settings.source or name_of(source))
    store = open_store(out)
    # tasks may run in another folder than this one; messages name `out` as it was typed
    aside = open_store(f"{str(out if is_url(out) else Path(out).resolve()).rstrip('/')}/{PARTIAL}")
    table = tables.captions if tables else None
    own = {name: value for name, value in asdict(settings).items() if (name, value) != ("val_by", "group")}  # as before it was a setting
    record = {**own, "folder": source_id(source, root), "reader": reader, GIVEN: table.name if table else ""}
    refuse_other_shards(store, record, overwrite=overwrite)

    options = reader_options(settings, root, leave_out, tables or Tables())
    listing = with_captions(READERS[reader](source, options), options)
    check_listing(listing, source)
    refuse_guessed_column(store, record, listing.guesses)
    own = OwnStyles() if settings.style else own_styles(listing, settings, source, classes=reader == "classes", progress=work.progress)
    if work.progress and (warning := captions_warning(listing, from_names=settings.captions_from_names)):
        tqdm.write(f"prepare: {warning}", file=sys.stderr)
    with alone_in(store) as require_lock:
        refuse_other_shards(store, record, overwrite=overwrite)  # again: another process may have written meanwhile
        begin(aside, record, listing)
        if not aside.exists(PUBLISH):
            with open_engine(work.engine, workers=work.workers, address=work.ray_address) as engine:
                make(aside, listing, settings, engine, record, progress=work.progress)
        require_lock()
        names = json.loads(aside.read(PUBLISH))
        publish(store, names["files"])
        made = json.loads(store.read(RECORD))
        counts = Counter({(status, reason): count for status, reason, count in names["counts"]})
        notes, tags = listing.notes, names.get("tags", {})
        if own.styles:
            notes = (*notes, own.line())
        if replaced := tags.get("own_style"):
            kept = sum(made["shards"].values())
            note = f"--style {settings.style} replaces the style that {replaced:,} of the {kept:,} pictures kept have of their own"
            notes = (*notes, f"{note}; without --style each keeps its own, if all have one.")
        if several := tags.get("several"):
            notes = (*notes, several_captions(str(out), several))
        if leave_out is not None:
            problem = write_captions_to_fill(store, report.manifest_rows(leave_out / MANIFEST), given=table)
            notes = (*notes, problem) if problem else notes
            report.write_report(leave_out, opener=opener(listing))
    return PrepareReport(
        counts, Counter(made["shards"]), listing.unmatched, notes, names.get("captions", {}),
        guesses=listing.guesses, tables=unread_tables(listing.unread), techniques=tags.get("technique", 0), styles=own.styles,
    )  # fmt: skip


def reader_options(settings: Settings, root: Path | None, leave_out: Path | None, tables: Tables) -> Options:
    return Options(
        style=settings.style, root=root, leave_out=leave_out, caption_column=settings.caption_column,
        captions_needed=not settings.allow_missing_captions and tables.captions is None, **vars(tables),
    )  # fmt: skip


def check_folders(source: Path | str, out: Path | str) -> None:
    if is_url(out) or is_url(source):
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if Path(out).resolve() == Path(source).resolve():
        raise UserError(f"--out {out} is SOURCE itself: name another folder")


def check_listing(listing: Listing, source: Path | str) -> None:
    if not listing.found:
        there = "".join(f"; {count:,} {reason}" for reason, count in Counter(listing.unread.values()).most_common(3))
        raise FileNotFoundError(f"no pictures found in {source}: see --reader for the supported sources{there}")


def make(aside: Store, listing: Listing, settings: Settings, engine: TaskEngine, record: dict[str, Any], *, progress: bool) -> None:
    """Write everything to publish into `aside`, and the list of it last."""
    tasks, there = Tasks(len(listing.found)), set(aside.list())
    with Progress("measure", "file", tasks.files, progress) as bar:
        todo = [number for number in range(tasks.count) if rows_name(number) not in there]
        bar.update(tasks.files - sum(len(tasks.range(number)) for number in todo))
        for turn, counts in engine.run(measure_chunk, (tasks.chunk(number, listing, settings, aside) for number in todo)):
            bar.update(len(tasks.range(todo[turn])), counts)

    settled, pairs = settle_and_write(aside, tasks, listing, settings, engine, there, progress=progress)
    counts, captions, tags = manifest(aside, tasks, settled, listing)
    record = {"settings": record, "files": tasks.files, "kept": sum(pairs.values()), "shards": pairs}
    aside.write(RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    names = {
        "files": [*pairs, MANIFEST, RECORD],
        "counts": [[*name, count] for name, count in sorted(counts.items())],
        "captions": captions.as_json(),
        "tags": tags,
    }
    aside.write(PUBLISH, json.dumps(names).encode())


def settle_and_write(
    aside: Store, tasks: Tasks, listing: Listing, settings: Settings, engine: TaskEngine, there: set[str], *, progress: bool
) -> tuple[Settled, dict[str, int]]:
    """Settle the collection and write the missing shards. Returns the settled plan and {shard: pairs}."""
    columns = Columns.read(aside, tasks)
    settled = settle(columns, listing.found, settings)
    pairs: dict[str, int] = {}
    with Progress("write", "pair", sum(map(len, settled.order.values())), progress) as bar:

        def to_write() -> Iterator[Shard]:
            for shard in shards_to_write(columns, settled, settings, aside):
                pairs[shard.name] = len(shard.pieces)
                if shard.name in there:
                    bar.update(len(shard.pieces))
                else:
                    yield shard

        for _, count in engine.run(write_pieces, to_write()):
            bar.update(count)
    return settled, pairs


def opener(listing: Listing) -> Callable[[str], bytes | None]:
    """A function that opens the original of a path in the manifest, for the report; None if it cannot be read."""
    places = DiskDict((shown(one.path), one) for one in listing.found if not one.problem)
    # a file that the reader set aside is within the source; anything else is not opened
    aside = report.folder_opener(Path(listing.base)) if not is_url(listing.base) else lambda path: None

    def open_picture(path: str) -> bytes | None:
        try:
            return read_picture(Path(listing.base), places[path]) if path in places else aside(path)
        except PictureError:
            return None

    return open_picture


def name_of(source: Path | str) -> str:
    """The name of a collection: its folder's name, or its file's name without the extension."""
    if isinstance(source, str):
        return source.rstrip("/").rpartition("/")[2]
    return source.stem if source.is_file() else source.resolve().name


def source_id(source: Path | str, root: Path | None) -> str:
    """An identifier of the source that contains no absolute path."""
    first = source.encode() if isinstance(source, str) else os.fsencode(source.resolve())
    paths = [first] + ([os.fsencode(root.resolve())] if root is not None else [])
    return hashlib.sha256(b"\0".join(paths)).hexdigest()[:16]


def make_parser() -> argparse.ArgumentParser:
    default = Settings(style="any")
    parser = console.make_parser(
        "python -m data_tools.prepare",
        "Raw pictures -> clean, captioned image shards.",
        epilog=f"{RECOGNISED}. A file beside a picture takes precedence over a table. Files that were not read are listed in the manifest. "
        "The same command resumes a killed run.",
    )
    add = parser.add_argument
    add(
        "source", type=home_text, metavar="SOURCE",
        help="a folder of pictures, classes, books or tars; a table; a data set's id; an address like s3://…",
    )  # fmt: skip
    add(
        "--style", default="",
        help="the style tag of all pictures, such as engraving or etching; not needed where the JSON, the table row or the folder of each "
        "picture gives its own; where folders are styles (--reader classes), the one to take",
    )  # fmt: skip
    add("--out", type=home_text, required=True, help="the folder (or address) for the shards, the manifest and the report")
    add("--reader", default="auto", metavar="NAME", help=f"how to read SOURCE: auto, {', '.join(READERS)} (%(default)s)")
    add("--root", type=home_path, metavar="DIR", help="the pictures' folder, from which paths in a table are counted (the table's own)")
    add(
        "--captions", type=home_path, metavar="TABLE",
        help="captions by path in SOURCE (columns file_name, caption), which override all others: the captions.csv of an earlier run",
    )  # fmt: skip
    add(
        "--caption-column", default="", metavar="NAME",
        help="the table column or JSON field with the captions, in quotes if its name has spaces: 'what is seen' (caption, text, prompt …)",
    )  # fmt: skip
    add("--captions-from-names", action="store_true", help="for a picture without a caption, use its file name if it reads like words")
    add("--encoding", default="utf-8", help="of text tables: cp1252, utf-16 … (%(default)s)")
    add("--quoting", default="auto", help="of text tables: auto, none (fields are taken literally) or csv (%(default)s)")
    add(
        "--side", type=int, default=default.side,
        help="pixels of the short side; training wants the config's image_size times its upper crop_scale, 360 for 256 px (%(default)s)",
    )  # fmt: skip
    add("--val", type=float, default=default.val, help="share of validation data, split by whole folders or books (%(default)s)")
    add(
        "--val-by",
        default=default.val_by,
        help="what stays whole in one split: group (a book, a folder …), or picture, so that any may be held out (%(default)s)",
    )
    add("--seed", type=int, default=default.seed, help="of the split and the order (%(default)s)")
    add("--shard-size", type=int, default=default.shard_size, help="pairs per shard (%(default)s)")
    add("--min-side", type=int, default=default.min_side, help="reject pictures with a shorter side, in pixels (%(default)s)")
    add("--max-aspect", type=float, default=default.max_aspect, help="reject a greater ratio of long to short side (%(default)s)")
    add(
        "--max-megapixels", type=float, default=default.max_megapixels, metavar="N",
        help="reject pictures with more million pixels (%(default)g, or the environment variable TOKUN_MAX_MEGAPIXELS)",
    )  # fmt: skip
    add("--no-clean", action="store_false", dest="clean", help="check only size, blanks and duplicates; otherwise change nothing")
    add(
        "--duplicates",
        default=default.duplicates,
        help="duplicates to leave out beside the best copy: alike (pictures that look the same) "
        "or exact (identical files only) (%(default)s)",
    )
    add("--keep-ambiguous", action="store_true", help="keep doubtful pictures, labelled in their JSON")
    add("--clip", default="", metavar="NAME", help="check the medium with open_clip: ViT-B-32:laion2b_s34b_b79k, hf-hub:ID, a folder")
    add("--register", default=default.register, help="the register of the captions (%(default)s)")
    add("--license", default="", metavar="TEXT", help="licence for pictures without one of their own")
    add("--source", default="", metavar="NAME", dest="name", help="the collection's name (the folder's)")
    add("--format", default=default.format, help="of the pictures: webp, jpg (quicker, larger) or png (lossless) (%(default)s)")
    add(
        "--filter",
        default=default.filter,
        help="for downscaling: lanczos (sharpest), hamming (softer, half the time), area (OpenCV, as in img2dataset) "
        "or linear (OpenCV, fastest) (%(default)s)",
    )
    add("--allow-missing-captions", action="store_true", help="keep pictures without a caption")
    add("--workers", type=int, default=None, help="processes (as many as there are CPUs); the output does not depend on it")
    add("--engine", default="local", metavar="NAME", help=f"{' or '.join(ENGINES)} (%(default)s): where the tasks run")
    add("--ray-address", default="", metavar="HOST:PORT", help="of a Ray cluster; its nodes must reach SOURCE and --out")
    add("--overwrite", action="store_true", help="replace shards made with other settings in --out")
    return parser


def main(argv: list[str] | None = None) -> int:
    command = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(argv)
    keep_memory()
    return console.status("prepare", lambda: run(args, command))


def run(args: argparse.Namespace, command: list[str]) -> int:
    options = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__ and name != "source"}
    work = Work(
        workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
        engine=args.engine,
        ray_address=args.ray_address,
        progress=True,
    )
    settings = Settings(source=args.name, **options)
    tables = Tables(encoding=args.encoding, quoting=args.quoting, captions=args.captions)
    try:
        made = prepare(
            args.source, args.out, settings, reader=args.reader, root=args.root, tables=tables, work=work, overwrite=args.overwrite
        )
    except TableError as error:
        where = record_refusal(args.source, args.out, error)
        raise TableError(f"{error}. {where}" if where else str(error)) from error
    print(made.table())
    out = args.out.rstrip("/")
    if not made.kept:
        print(f"prepare: no picture was kept; {out}/{MANIFEST if is_url(out) else report.NAME} shows the reason for each", file=sys.stderr)
    if made.kept or made.captions.get("missing"):
        doubtful = 0 if args.keep_ambiguous else sum(count for (status, _), count in made.counts.items() if status == "ambiguous")
        print(
            steps(
                out, command, made.captions, report=report.NAME, val=made.pairs("val"), doubtful=doubtful, guesses=made.guesses,
                source=args.source, tables=made.tables, techniques=made.techniques, side=args.side,
            )
        )  # fmt: skip
    if question := misspelt(args.style, made.styles, command):
        print(f"\n{question}")
    return 0 if made.kept else 1


if __name__ == "__main__":
    sys.exit(main())
