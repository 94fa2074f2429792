"""Caption: image shards -> the same shards with more captions, side by side, in several registers.

    tokun caption shards/ --model Salesforce/blip2-opt-2.7b --registers plain,poetic,era
    tokun caption shards/ --endpoint http://localhost:8000/v1 --endpoint-model Qwen/Qwen2.5-VL-7B-Instruct
    tokun caption shards/ --from captions.tsv --out described/
    accelerate launch -m data_tools.caption shards/ --model Qwen/Qwen2.5-VL-7B-Instruct --registers plain,social

Captions come from a captioner that sees the picture (--model), a language model (--rewriter) or a server (--endpoint). Without
any of these, a template puts the metadata into words, and the record says so. To look first, --preview 16 draws a sheet. Captions
written by people are merged from a table (--from, captioning/from_table.py).

KEY.json stores each new caption under `captions` and its origin under `caption_sources`: model, revision, prompt hash,
seed, scores. The source text, `caption`, stays unchanged. A killed run resumes (captioning/journals.py), and every row ends with
captions or with a counted reason. Batches do not depend on earlier progress or on the number of processes, so the
captions are the same for the same --batch-size, as long as memory suffices and the server, if any, answers the same.
This module is the command; its parts are in captioning/.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from data_tools import captioning as captioners
from data_tools.captioning import from_table, registers
from data_tools.captioning.caption_results import RECORD
from data_tools.captioning.run import PREVIEW, caption, preview
from data_tools.captioning.settings import Settings, Work
from data_tools.pipeline.next_steps import after_captions, shell
from data_tools.readers.table_files import QUOTING
from tokun.utils import console
from tokun.utils.console import home_path, typed_path
from tokun.utils.errors import UserError
from tokun.utils.task_engine import add_options, engine_of, is_elsewhere


def make_parser() -> argparse.ArgumentParser:
    words = Settings()
    parser = console.make_parser(
        "python -m data_tools.caption",
        "Image shards -> the same shards with captions in several registers.",
        epilog="The same command resumes a stopped run. Several GPUs: accelerate launch -m data_tools.caption … divides the shards.",
    )
    add = parser.add_argument
    add("shards", type=home_path, nargs="+", metavar="SHARDS", help="folders of image shards, or .tar files")
    add("--out", type=home_path, help="the folder for the new shards (SHARDS-captioned)")
    add("--registers", default=",".join(words.registers), help=f"any of {','.join(registers.REGISTERS)} (%(default)s)")
    add("--hashtags", action=argparse.BooleanOptionalAction, default=words.hashtags, help="add them to social captions (yes)")
    add("--hints", default=",".join(words.hints), help="metadata to put into prompts, or none (%(default)s)")
    for group in (add_writers, add_table, add_rows):
        group(parser)
    add_options(parser, "a shard", "SHARDS, --out and --endpoint")
    return parser


def add_writers(parser: argparse.ArgumentParser) -> None:
    """Options for the captioner."""
    words = Settings()
    who = parser.add_argument_group("the captioner").add_argument
    who("--model", default="", type=os.path.expanduser, help=f"a captioner, Hub id or folder: {captioners.EXAMPLES}")
    who("--revision", default="", help="its commit or tag on the Hub")
    who("--shape", default=words.shape, help="auto, caption, task or chat (%(default)s: from the model's type)")
    who("--task", default="", help="the prompt of a task model, such as '<CAPTION>' or 'caption en'")
    who("--rewriter", default="", type=os.path.expanduser, help="a language model that writes the other registers, Hub id or folder")
    who("--endpoint", default="", metavar="URL", help="an OpenAI-compatible server: sees the pictures, or rewrites --model's captions")
    who("--endpoint-model", default="", help="the model's name on the server")
    pictures = argparse.BooleanOptionalAction
    who("--send-pictures", action=pictures, default=words.send_pictures, help="send pictures to the server; not for a language model (yes)")
    who("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="the environment variable with the key (%(default)s)")


def add_table(parser: argparse.ArgumentParser) -> None:
    """Options for captions that people wrote."""
    merged = from_table.Options()
    table = parser.add_argument_group("captions from a table, instead of a model").add_argument
    table(
        "--from", dest="table", type=home_path, metavar="TABLE",
        help="merge this .csv, .tsv, .jsonl or .parquet: rows by key or path, one column for each register",
    )  # fmt: skip
    table(
        "--caption-column", default="", metavar="NAME",
        help="the column of the plain caption, in quotes if its name has spaces: 'what is seen' "
        "(the first of caption, text, description, prompt, title …)",
    )  # fmt: skip
    table("--encoding", default=merged.encoding, help="of a text table (%(default)s)")
    table(
        "--quoting", default=merged.quoting, choices=QUOTING,
        help="of fields (%(default)s: CSV is quoted, TSV only if its text shows it)",
    )  # fmt: skip
    table("--keep-undescribed", action="store_true", help="keep pictures without a row unchanged instead of leaving them out")
    table(
        "--min-things", type=int, default=merged.min_things, metavar="N",
        help="fewest pictures for a main noun to become a thing (%(default)s)",
    )  # fmt: skip
    table(
        "--shard-size", type=int, default=merged.shard_size, metavar="N",
        help="pictures per shard when several folders are mixed by --seed (%(default)s)",
    )  # fmt: skip


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Options for how the work is done and on which rows."""
    words, work = Settings(), Work()
    how = parser.add_argument_group("how").add_argument
    how("--seed", type=int, default=words.seed, help="of wordings and draws (%(default)s)")
    how("--temperature", type=float, default=words.temperature, help="0: the most likely words (%(default)s)")
    how("--max-new-tokens", type=int, default=words.max_new_tokens, help="per caption (%(default)s)")
    how("--dtype", default=words.dtype, choices=("auto", "float32", "bfloat16", "float16"), help="of the models (%(default)s)")
    how("--image-side", type=int, default=words.image_side, help="longer side of the pictures shown, in pixels (%(default)s)")
    how("--device", default=work.device, help="auto, cpu, cuda, cuda:1 (%(default)s)")
    how("--batch-size", type=int, default=work.batch_size, help="halved when memory runs out (%(default)s)")
    how("--concurrency", type=int, default=work.concurrency, help="requests at a time (%(default)s)")
    how("--timeout", type=float, default=work.timeout, help="seconds to wait for an answer (%(default)s)")
    how("--tries", type=int, default=work.tries, help="most requests for one answer (%(default)s)")
    how("--price", default="", metavar="IN,OUT", help="per million tokens of prompts and of answers, to estimate the cost")
    what = parser.add_argument_group("which rows").add_argument
    what("--preview", type=int, default=0, metavar="N", help=f"caption N pictures into {PREVIEW} and stop")
    what("--limit", type=int, default=0, metavar="N", help="only the first N rows; a later run without it does the rest")
    what("--retry-failed", action="store_true", help="retry failed rows with another wording")
    what(
        "--clip", default="", type=os.path.expanduser, metavar="MODEL",
        help="score captions by open_clip: ViT-B-32:laion2b_s34b_b79k, hf-hub:…, a folder",
    )  # fmt: skip
    what("--keep-best", default="100%", metavar="SHARE", help="share to keep, by score, such as 90%% (%(default)s)")


def parse_share(text: str) -> float:
    """'90%' or '0.9' -> 0.9."""
    try:
        return float(text.rstrip("% ")) / 100 if text.rstrip().endswith("%") else float(text)
    except ValueError as error:
        raise UserError(f"--keep-best {text!r} is not a share: give 90%") from error


def parse_prices(text: str) -> tuple[float, float]:
    try:
        prices = [float(part) for part in text.split(",")] if text else [0.0, 0.0]
    except ValueError as error:
        raise UserError(f"--price {text!r} is not a pair of numbers: give one like 0.15,0.60") from error
    if len(prices) != 2 or min(prices) < 0:
        raise UserError(f"--price {text!r} is not a pair of prices: give one like 0.15,0.60")
    return prices[0], prices[1]


def settings_from(args: argparse.Namespace) -> Settings:
    given = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    given["registers"] = registers.parse_registers(args.registers)
    given["hints"] = tuple(name.strip() for name in args.hints.split(",") if name.strip() and args.hints.strip() != "none")
    return Settings(**given)


def work_from(args: argparse.Namespace) -> Work:
    given = {name: value for name, value in vars(args).items() if name in Work.__dataclass_fields__}
    given.update(keep_best=parse_share(args.keep_best), prices=parse_prices(args.price), api_key=os.environ.get(args.api_key_env, ""))
    return Work(**given)


def default_out(shards: Path) -> Path:
    """The default --out: a folder beside the shards' folder."""
    folder = (shards if shards.is_dir() else shards.parent).absolute()
    return folder.with_name(f"{folder.name}-captioned")


def main_from_table(args: argparse.Namespace, out: Path) -> int:
    options = from_table.Options(**{name: value for name, value in vars(args).items() if name in from_table.Options.__dataclass_fields__})
    report = from_table.merge(args.shards, args.table, out, options, progress=True)
    print(report.text(out))
    print(after_captions(str(out)))
    asked = shell("questions", typed_path(out), "--out", typed_path(out.with_name(f"{out.name}-asked")))
    print(f"Questions and answers on the pictures, by rule, for a training of all weights on the new folder:\n  {asked}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return console.status("caption", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    out = args.out or default_out(args.shards[0])
    if (args.table or args.preview) and is_elsewhere(args):
        raise UserError(f"--engine and --workers have no effect with --{'from' if args.table else 'preview'}: leave them out")
    if args.table:
        return main_from_table(args, out)
    settings, work = settings_from(args), work_from(args)
    if args.preview:
        path, counts = preview(args.shards, out, settings, work, args.preview)
        print(" · ".join(f"{name} {count:,}" for name, count in counts.most_common()))
        print(f"preview      {path}: look at it, then run the same command without --preview")
        return 0
    with engine_of(args) if is_elsewhere(args) else nullcontext() as engine:
        report = caption(args.shards, out, settings, work, progress=True, engine=engine)
    if report is None:
        print("caption: this process's shards are done; other processes are still working")
        return 0
    print(report.table())
    if not report.captions:
        print(f"caption: no caption was written; {out / RECORD} counts the reasons", file=sys.stderr)
        return 1
    for doubt in report.doubts():
        print(f"caption: WARNING: {doubt}", file=sys.stderr)
    if report.is_useless():
        return 1
    print(after_captions(str(out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
