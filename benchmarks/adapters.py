"""What an adapter learns, forgets and costs compared with training all weights: on the pictures of one book, a table of words, and preferences.

    python -m benchmarks.adapters book --shards 'plates/val-*.tar' --book 41219 --rest 'engravings/val-*.tar' --minutes 10 --out runs/book
    python -m benchmarks.adapters words --descriptions descriptions.tsv --register social --rows 121 --held-out 200 --out runs/words
    python -m benchmarks.adapters preferences --n 200 --best-of 4 --out runs/preferred

All take --checkpoint (default: the bundled model). `book` trains on 100 pictures of a book that the checkpoint has not seen, with LoRA and with
all weights at several learning rates, each for the same time; `--rest` are pictures of other books, to measure forgetting. Each prints a Markdown
table. Finished trainings are reused.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import tokun
from tokun import data
from tokun.config import load_config, to_dict
from tokun.data.codes import CodeSamples, Record
from tokun.evaluate.captions import agreement
from tokun.evaluate.figures import bootstrap
from tokun.inference import preferences
from tokun.inference.model import Tokun
from tokun.tokenizers.sequences import Packed
from tokun.tokenizers.vocabulary import Tags
from tokun.training import adapters as tuning
from tokun.training.codes import encode_shard
from tokun.training.text_only import pack_rows
from tokun.utils import console
from tokun.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    book, words, preferred = (commands.add_parser(name) for name in ("book", "words", "preferences"))
    for command in (book, words, preferred):
        command.add_argument("--checkpoint", default="bundled")
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="settings of the adapter's training")
    book.add_argument("--shards", required=True)
    book.add_argument("--book", required=True, help="its gutenberg_id")
    book.add_argument("--pictures", type=int, default=100)
    book.add_argument("--rest", required=True)
    book.add_argument("--minutes", type=float, default=10.0)
    book.add_argument("--steps", type=int, default=100_000, help="stop after this many, even before --minutes")
    book.add_argument("--rest-pictures", type=int, default=10**6, help="use the first N of --rest")
    book.add_argument("--full-lr", type=float, nargs="*", default=[1e-3, 1e-4], help="learning rates for training all weights")
    words.add_argument("--descriptions", type=Path, required=True)
    words.add_argument("--register", default="social")
    words.add_argument("--rows", type=int, default=121)
    words.add_argument("--held-out", type=int, default=200)
    preferred.add_argument("--n", type=int, default=200)
    preferred.add_argument("--best-of", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(2)
    {"book": on_a_book, "words": on_words, "preferences": on_preferences}[args.command](args)


def train(config: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """Run train.py unless it has already finished. Returns its training.json."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), f"out={out}", "tracking.kind=none", *overrides]
    subprocess.run(command, check=True, cwd=ROOT)
    (record,) = [path for path in (out / "adapter" / "training.json", out / "checkpoint" / "training.json") if path.is_file()]
    return json.loads(record.read_text())


def base_of(args: argparse.Namespace, **options: Any) -> Tokun:
    return tokun.load(None if args.checkpoint == "bundled" else args.checkpoint, device="cpu", **options)


def start_of(args: argparse.Namespace) -> str:
    return f"start={args.checkpoint if args.checkpoint == 'bundled' else Path(args.checkpoint).resolve()}"


# --- a book -----------------------------------------------------------------------------------------------------------


def on_a_book(args: argparse.Namespace) -> None:
    shards = book_shards(args)
    given = [start_of(args), f"data.train={shards}/train.tar", f"data.val={shards}/val.tar", f"seed={args.seed}", f"train.max_minutes={args.minutes}",
             f"train.steps={args.steps}", "train.save_every=100000", "train.sample_every=100000", "train.eval_every=100000", "sampling.n=0", "data.style_key=technique"]  # fmt: skip
    lora = ROOT / "configs" / "lora.yaml"
    records = {"LoRA": train(lora, args.out / "lora", *given, *args.set)}
    whole = full_config(lora, [*given, *args.set], args.out / "full.yaml")
    for lr in args.full_lr:
        for part in ("text_tokenizer", "image_tokenizer", "codes"):
            if not (args.out / f"full-{lr:g}" / part).is_dir():
                shutil.copytree(args.out / "lora" / part, args.out / f"full-{lr:g}" / part)
        records[f"all weights, lr {lr:g}"] = train(whole, args.out / f"full-{lr:g}", f"train.lr={lr}")
    held = {"book": samples_of(args.out / "lora" / "codes", "val-*.tar"), "rest": rest_of(args)}
    base = scores(base_of(args), held)
    rows = [["base", "", "", "", "", *told(base, base)]]
    for name, record in records.items():
        folder = args.out / ("lora" if name == "LoRA" else f"full-{name.rpartition(' ')[2]}")
        model = base_of(args, adapter=folder) if name == "LoRA" else tokun.load(folder, device="cpu")
        figures = record["train"]
        cost = [
            f"{record['trained']:,}",
            f"{record['steps']}",
            f"{figures['train/tokens_per_second']:.0f}",
            f"{figures['train/peak_memory_gb']:.2f}",
        ]
        rows.append([name, *cost, *told(scores(model, held), base)])
    table(["training", "trained", "steps", "tokens/s", "peak_GB", "book_image", "book_text", "rest_image", "rest_text"], rows)
    began = time.perf_counter()
    model = base_of(args)
    loaded = time.perf_counter()
    model.use_adapter(model.add_adapter(args.out / "lora"))
    size = sum(path.stat().st_size for path in (args.out / "lora" / "adapter").iterdir())
    print(
        f"adapter: {size / 1e6:.2f} MB in all files; loaded and in use in {time.perf_counter() - loaded:.2f} s, the base before it in {loaded - began:.2f} s"
    )


def book_shards(args: argparse.Namespace) -> Path:
    """Write train.tar with --pictures pictures of the book and val.tar with the others; their subject is a tag unknown to the base."""
    folder = args.out / "shards"
    if (folder / "val.tar").is_file():
        return folder
    index = data.ShardIndex(data.expand_shards(args.shards), one_of=data.IMAGE_SUFFIXES).usable()
    mine = [i for i in range(len(index)) if str(index.read_json(i).get("gutenberg_id")) == args.book]
    if len(mine) <= args.pictures:
        raise UserError(f"book {args.book} has {len(mine)} pictures in {args.shards}: more than --pictures {args.pictures} are needed")
    order = np.random.default_rng(args.seed).permutation(mine)
    for name, chosen in (("train", order[: args.pictures]), ("val", order[args.pictures :])):

        def made(chosen: Sequence[int] = chosen) -> Any:
            for i in chosen:
                suffix = index.image_suffix(i)
                tree = index.read_json(i) | {"subject": f"book-{args.book}"}
                yield {"__key__": index.key(i), suffix: index.read(i, suffix), "json": json.dumps(tree).encode()}

        data.write_shard(folder / f"{name}.tar", made())
    return folder


def full_config(path: Path, overrides: Sequence[str], target: Path) -> Path:
    """The config for the same training of all weights: the adapter's, with the base's shapes and without the adapter."""
    config = load_config(path, overrides)
    tuning.take_shape(config)
    config.adapter.rank = 0
    target.write_text(yaml.safe_dump(to_dict(config)))
    return target


def samples_of(folder: Path, pattern: str) -> list[Record]:
    samples = CodeSamples(sorted(folder.glob(pattern)))
    return [samples.whole_record(i) for i in range(len(samples))]


def rest_of(args: argparse.Namespace) -> list[Record]:
    folder, base = args.out / "rest", base_of(args)
    config = load_config(
        ROOT / "configs" / "lora.yaml", [start_of(args), "codes.views=1", "data.style_key=technique", "data.subject_key=category"]
    )
    tuning.take_shape(config)
    for number, path in enumerate(data.expand_shards(args.rest)):
        if not (folder / f"val-{number:05d}.tar").is_file():
            encode_shard(path, folder / f"val-{number:05d}.tar", base.image_tokenizer, config, torch.device("cpu"))
    return samples_of(folder, "val-*.tar")[: args.rest_pictures]


def scores(model: Tokun, held: dict[str, list[Record]]) -> dict[str, np.ndarray]:
    """Nats per token of each picture's codes and of its caption, given the tags that the model knows: "book image" … -> (pictures,)."""
    v, found = model.vocabulary, {}
    for name, records in held.items():
        tags = [
            Tags(r.style if r.style in v.styles else "", r.subject if r.subject in v.subjects else "", v.default_register, r.grid, r.thing if r.thing in v.things else "")
            for r in records
        ]  # fmt: skip
        codes = [r.codes[0].tolist() for r in records]
        captions = [model.text_tokenizer.encode(r.caption)[: v.max_text] for r in records]
        found[f"{name} image"] = np.array(model.image_nll(tags, codes)) / [len(c) for c in codes]
        found[f"{name} text"] = np.array(model.caption_nll(tags, captions, codes)) / [len(c) + 1 for c in captions]
    return found


def told(mine: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> list[str]:
    """Means and, if it is not the base, the change with its 95 % interval over pictures."""
    cells = []
    for name, values in mine.items():
        change = values - base[name]
        low, high = bootstrap(change[:, None], lambda cases: float(cases.mean()), seed=0)
        cells.append(f"{values.mean():.3f}" + (f" ({change.mean():+.3f}, {low:+.3f} to {high:+.3f})" if change.any() else ""))
    return cells


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (list(head), ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


# --- words ------------------------------------------------------------------------------------------------------------


def on_words(args: argparse.Namespace) -> None:
    with args.descriptions.open(encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row[args.register] and row["use"] == "1"]
    order = np.random.default_rng(args.seed).permutation(len(found))[: args.rows + args.held_out]
    pairs = [(found[i]["description"], found[i][args.register]) for i in order]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs[: args.rows]), ("val", pairs[args.rows :])):
        lines = [json.dumps({"description": description, "caption": caption}, ensure_ascii=False) + "\n" for description, caption in part]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    register = f"studio-{args.register}"  # a tag unknown to the base
    given = [f"words.{split}={(args.out / f'{split}.jsonl').resolve()}" for split in ("train", "val")]
    record = train(ROOT / "configs" / "words.yaml", args.out / "lora", start_of(args), *given, f"words.register={register}", *args.set)
    held = pairs[args.rows :]
    rows = []
    for name, model in (("base", untrained(args, register)), ("LoRA", base_of(args, adapter=args.out / "lora"))):
        said = [model.rewrite(description, register, temperature=0.0)[0].text for description, _ in held]
        nats = rewriting_nats(model, held, register)
        low, high = bootstrap(nats, lambda cases: float(cases[:, 0].sum() / cases[:, 1].sum()), seed=0)
        marks = {figure.name: figure.value for figure in agreement(said, [caption for _, caption in held], seed=0)}
        cells = [
            f"{nats[:, 0].sum() / nats[:, 1].sum():.3f} ({low:.3f} to {high:.3f})",
            *(f"{marks[mark]:.3f}" for mark in ("BLEU-1", "BLEU-4", "CIDEr", "BLEU-1, chance", "CIDEr, chance")),
        ]
        rows.append([name, *cells])
        print("\n".join(f"  {description} -> {text}" for (description, _), text in zip(held[:4], said)))
    table(["model", "nats_a_token", "BLEU-1", "BLEU-4", "CIDEr", "BLEU-1_of_others", "CIDEr_of_others"], rows)
    print(f"{args.rows} rows, {record['steps']} steps, {record['seconds']} s; {len(held)} held out")


def untrained(args: argparse.Namespace, register: str) -> Tokun:
    """The base with the initial row for the new register."""
    base = base_of(args)
    vocabulary = base.vocabulary.extended(registers=[register])
    tuning.new_rows(base.generator, base.vocabulary, vocabulary)
    base.vocabulary, base.tasks = vocabulary, ()
    return base


def rewriting_nats(model: Tokun, rows: Sequence[tuple[str, str]], register: str) -> np.ndarray:
    """(rows, 2): nats of each caption and its end given the description, over legal ids, and the number of these tokens."""
    packed = pack_rows(rows, model, model.vocabulary, register)
    nats = model.span_nll([Packed(p.input_ids[:-1], p.prompt) for p in packed])
    return np.stack([nats, [len(p.input_ids) - 1 - p.prompt for p in packed]], 1)


# --- preferences ------------------------------------------------------------------------------------------------------


def on_preferences(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for split, seed, n in (("train", 1, args.n), ("val", 2, max(32, args.n // 4))):
        if not (args.out / f"{split}.jsonl").is_file():
            (args.out / f"{split}.jsonl").write_text(
                preferences.lines(base_of(args).best_and_worst(seed, n, args.best_of)), encoding="utf-8"
            )
    given = [f"dpo.{name}={(args.out / f'{split}.jsonl').resolve()}" for name, split in (("pairs", "train"), ("val", "val"))]
    record = train(ROOT / "configs" / "dpo.yaml", args.out / "lora", start_of(args), *given, *args.set)
    rows = []
    for name, model in (("base", base_of(args)), ("DPO", base_of(args, adapter=args.out / "lora"))):
        pairs = model.sample(1000, 128)
        pmi = np.array([pair.pmi for pair in pairs])
        low, high = bootstrap(pmi[:, None], lambda cases: float(cases.mean()), seed=0)
        different = len({tuple(pair.caption_ids) for pair in pairs})
        rows.append(
            [
                name,
                f"{pmi.mean():.2f} ({low:.2f} to {high:.2f})",
                f"{np.mean([len(p.caption_ids) for p in pairs]):.1f}",
                f"{different} of {len(pairs)}",
            ]
        )
    table(["model", "PMI_of_new_samples", "pieces_a_caption", "different_captions"], rows)
    print(
        f"{args.n} preferences of best and worst of {args.best_of}; {record['steps']} steps, {record['seconds']} s; held out {record['val']}"
    )


if __name__ == "__main__":
    console.run("benchmarks/adapters.py", main)
