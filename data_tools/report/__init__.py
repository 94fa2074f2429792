"""Report: one page that shows what was kept, what was left out and why, for readers who do not program.

    tokun report shards/ --source my-pictures/

Writes `report.html` beside the shards, from their manifest, and `README.md`, by which `datasets` and the Hub read them. The page is
self-contained, pictures included. It needs no network and no scripts, and stays below a few megabytes for a collection of any size. Equal
input gives equal bytes. Memory does not grow with the collection: tables are read in pieces, and samples are drawn by a hash of the path.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.report.counting import MANIFEST, Opener, Summary, count_manifest, folder_opener, manifest_rows, read_shards, settings_of
from data_tools.report.dataset_card import write_card
from data_tools.report.page import page
from data_tools.report.reasons import family
from tokun.utils import console
from tokun.utils.console import home_path
from tokun.utils.files import whole_file

__all__ = ["NAME", "family", "folder_opener", "main", "manifest_rows", "write_report"]

NAME = "report.html"


def write_report(out: Path, *, source: Path | None = None, opener: Opener | None = None) -> Path:
    """Write `report.html` and the dataset card (`dataset_card`) into `out`, the folder of the shards and the manifest.

    Returns the report's path.
    Pictures that were left out are read from the folder `source`, or by `opener`, which maps a path in the manifest to the bytes
    of a picture file or None. Without either, or for missing files, only their names are shown. Raises FileNotFoundError or
    UserError, with the way out, if there is no readable manifest.
    """
    summary = Summary(settings=settings_of(out))
    count_manifest(summary, out / MANIFEST)
    read_shards(summary, out)
    if opener is None and source is not None and source.is_dir():
        opener = folder_opener(source)
    with whole_file(out / NAME) as aside, open(aside, "w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(page(summary, opener))
    write_card(out, summary)
    return out / NAME


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m data_tools.report", "Write report.html beside prepared shards.")
    parser.add_argument("shards", type=home_path, metavar="SHARDS", help="the folder that prepare wrote")
    parser.add_argument("--source", type=home_path, metavar="FOLDER", help="the folder of the original pictures, to show what was left out")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)

    def report() -> None:
        if args.source is not None and not args.source.is_dir():
            raise FileNotFoundError(f"--source {args.source} is not a folder: name the one given to prepare, or leave it out")
        path = write_report(args.shards, source=args.source)
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")

    return console.status("report", report)
