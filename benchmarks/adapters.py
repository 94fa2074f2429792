"""What an adapter learns, forgets and costs compared with training all weights: on one book's pictures, a table of words, and preferences.

    python -m benchmarks.adapters book --shards 'described/val-*.tar' --book 41219 --rest 'described/val-*.tar' --minutes 10 --out runs/book
    python -m benchmarks.adapters pooled runs/book-0 runs/book-1
    python -m benchmarks.adapters words --descriptions descriptions.tsv --keys 'val-*' 'pval-*' --register social --out runs/words
    python -m benchmarks.adapters preferences --n 200 --best-of 4 --reward '{kind: pmi}' --judge '{kind: …}' --out runs/preferred

All but `pooled` take --checkpoint (default: the bundled model). `book` trains on 100 pictures of a book that the checkpoint has not seen,
with LoRA and with all weights at several learning rates, each for the same time; `--rest` are pictures of other books, to measure
forgetting. `pooled` puts several finished `book` runs (other seeds, other books) together. `words` compares with the base's own register of
that name, and with the new one before it is trained; name rows that the base has not seen. `preferences` learns from the best and worst of
several samples by a reward, and measures new samples by it and by judges (entries as in grpo.rewards). Each prints a Markdown table.
Finished trainings are reused.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import os
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
from tokun.align import rewards
from tokun.config import RewardConfig, load_config, to_dict
from tokun.data.codes import CodeSamples, Record
from tokun.evaluate.captions import agreement
from tokun.evaluate.figures import bootstrap
from tokun.inference import conditional_generation, preferences
from tokun.inference.model import Tokun
from tokun.tokenizers import sequences
from tokun.tokenizers.sequences import Packed
from tokun.tokenizers.vocabulary import Tags, tag_word
from tokun.training import adapters as tuning
from tokun.training.codes import encode_shard
from tokun.training.text_only import pack_rows
from tokun.utils import console, typed_tree
from tokun.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TAGS = ("data.style_key=technique", "data.subject_key=subject", "data.thing_key=thing")  # as the bundled model was trained


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
    book.add_argument("--eval-every", type=int, default=50, help="steps between held-out losses; the lowest of them is measured, too")
    book.add_argument("--full-lr", type=float, nargs="*", default=[1e-4], help="learning rates for training all weights")
    book.add_argument("--full-set", nargs="*", default=[], metavar="a.b=c", help="settings of the training of all weights")
    words.add_argument("--descriptions", type=Path, required=True)
    words.add_argument("--register", default="social")
    words.add_argument("--keys", nargs="*", default=["*"], help="patterns of the keys of rows to use")
    words.add_argument("--rows", type=int, default=121)
    words.add_argument("--held-out", type=int, default=200)
    pooled = commands.add_parser("pooled")
    pooled.add_argument("runs", nargs="+", type=Path, help="the --out of finished `book` runs")
    preferred.add_argument("--n", type=int, default=200)
    preferred.add_argument("--best-of", type=int, default=4)
    preferred.add_argument("--reward", default="{kind: pmi}", help="what chooses, as in grpo.rewards")
    preferred.add_argument("--judge", action="append", default=[], help="measures new samples; may be repeated")
    preferred.add_argument("--eval-n", type=int, default=96, help="new samples that are measured")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    {"book": on_a_book, "pooled": on_several_books, "words": on_words, "preferences": on_preferences}[args.command](args)


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
    shards, known = book_shards(args)
    given = [start_of(args), f"data.train={shards}/train.tar", f"data.val={shards}/val.tar", f"seed={args.seed}",
             f"train.max_minutes={args.minutes}", f"train.steps={args.steps}", "train.passes=0",
             "train.save_every=100000", "train.sample_every=100000",
             f"train.eval_every={args.eval_every}", "train.keep_best=1", "sampling.n=0", *TAGS]  # fmt: skip
    lora = ROOT / "configs" / "lora.yaml"
    records = {"LoRA": train(lora, args.out / "lora", *given, *args.set)}
    whole = full_config(lora, [*given, *args.set], args.out / "full.yaml")
    for lr in args.full_lr:
        for part in ("text_tokenizer", "image_tokenizer", "codes"):
            if not (args.out / f"full-{lr:g}" / part).is_dir():
                shutil.copytree(args.out / "lora" / part, args.out / f"full-{lr:g}" / part)
        records[f"all weights, lr {lr:g}"] = train(whole, args.out / f"full-{lr:g}", f"train.lr={lr}", *args.full_set)
    held = {"book": samples_of(args.out / "lora" / "codes", "val-*.tar"), "rest": rest_of(args, shards)}
    base = scores(base_of(args), held, known)
    rows, kept = [["base", "", "", "", "", "", *told(base, base)]], {"base": base}
    for name, record in records.items():
        folder = args.out / ("lora" if name == "LoRA" else f"full-{name.rpartition(' ')[2]}")
        figures, best = record["train"], record["best"][0]["step"] if record["best"] else record["steps"]
        speed, memory = f"{figures['train/tokens_per_second']:.0f}", f"{figures['train/peak_memory_gb']:.2f}"
        cost = [f"{record['trained']:,}", f"{record['seconds']}", speed, memory]
        for when, place, step in (("at the end", folder, record["steps"]), ("lowest", folder / "best" / f"step-{best:08d}", best)):
            if step == record["steps"] and when == "lowest":
                continue
            model = base_of(args, adapter=place) if name == "LoRA" else tokun.load(place, device="cpu")
            kept[f"{name}, {when}"] = mine = scores(model, held, known)
            rows.append([f"{name}, {when}", f"{step}", *cost, *told(mine, base)])
            cost = [""] * len(cost)
        kept.setdefault(f"{name}, lowest", kept[f"{name}, at the end"])
    keys = {f"{part} keys": np.array([record.key for record in records]) for part, records in held.items()}
    np.savez(args.out / "scores.npz", **keys, **{f"{name}/{what}": values for name, own in kept.items() for what, values in own.items()})
    table(["training", "step", "trained", "seconds", "tokens/s", "peak_GB", *base], rows)
    began = time.perf_counter()
    model = base_of(args)
    loaded = time.perf_counter()
    model.use_adapter(model.add_adapter(args.out / "lora"))
    size = sum(path.stat().st_size for path in (args.out / "lora" / "adapter").iterdir())
    print(
        f"adapter: {size / 1e6:.2f} MB in all files; loaded and in use in {time.perf_counter() - loaded:.2f} s, the base before it in "
        f"{loaded - began:.2f} s"
    )


def on_several_books(args: argparse.Namespace) -> None:
    """Print the changes of several `book` runs together: a picture that was held out in several runs counts once, by its mean, and the
    intervals are over pictures. Below, picture by picture, LoRA's lowest minus that of all weights."""
    runs = []
    for folder in args.runs:
        if not (folder / "scores.npz").is_file():
            raise UserError(f"{folder} has no scores.npz; name the --out folders of `book` runs that have finished")
        runs.append(np.load(folder / "scores.npz"))
    names = [name for name in dict.fromkeys(key.split("/")[0] for run in runs for key in run.files if "/" in key) if name != "base"]
    parts = [f"{part} {kind}" for part in ("book", "rest") for kind in ("image", "text", "both")]

    def change(name: str, than: str, part: str) -> np.ndarray:
        found: dict[str, list[float]] = {}
        for run in runs:
            if f"{name}/{part}" in run and f"{than}/{part}" in run:
                for key, value in zip(run[f"{part.split()[0]} keys"].tolist(), run[f"{name}/{part}"] - run[f"{than}/{part}"]):
                    found.setdefault(key, []).append(value)
        return np.array([np.mean(values) for values in found.values()])

    lora = "LoRA, lowest"
    against = [(name, "base") for name in names] + [(lora, name) for name in names if name != lora and name.endswith("lowest")]
    rows = []
    for name, than in against:
        cells = []
        for part in parts:
            values = change(name, than, part)
            low, high = bootstrap(values[:, None], lambda cases: float(cases.mean()), seed=0)
            cells.append(f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f}), {len(values)}")
        rows.append([f"{name} minus {than}", *cells])
    table(["difference, pictures", *parts], rows)


def book_shards(args: argparse.Namespace) -> tuple[Path, str]:
    """Write train.tar with --pictures pictures of the book, val.tar with its others, and rest.tar with --rest-pictures of other books. The
    book is a style of its own, unknown to the base. Returns the folder and the style that the pictures had."""
    folder, style = args.out / "shards", f"book-{args.book}"
    index = data.ShardIndex(data.expand_shards(args.shards), one_of=data.IMAGE_SUFFIXES).usable()
    others = data.ShardIndex(data.expand_shards(args.rest), one_of=data.IMAGE_SUFFIXES).usable()
    mine = [i for i in range(len(index)) if str(index.read_json(i).get("gutenberg_id")) == args.book]
    if len(mine) <= args.pictures:
        raise UserError(f"book {args.book} has {len(mine)} pictures in {args.shards}: more than --pictures {args.pictures} are needed")
    rng = np.random.default_rng(args.seed)
    order, rest = rng.permutation(mine), rng.permutation(len(others))
    rest = [i for i in rest if str(others.read_json(i).get("gutenberg_id")) != args.book][: args.rest_pictures]
    for name, source, chosen in (("train", index, order[: args.pictures]), ("val", index, order[args.pictures :]), ("rest", others, rest)):

        def made(source: data.ShardIndex = source, chosen: Sequence[int] = chosen, name: str = name) -> Any:
            for i in chosen:
                suffix = source.image_suffix(i)
                tree = source.read_json(i) | ({"technique": style} if name != "rest" else {})
                yield {"__key__": source.key(i), suffix: source.read(i, suffix), "json": json.dumps(tree).encode()}

        if not (folder / f"{name}.tar").is_file():
            data.write_shard(folder / f"{name}.tar", made())
    return folder, tag_word(str(index.read_json(mine[0]).get("technique", "")))


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


def rest_of(args: argparse.Namespace, shards: Path) -> list[Record]:
    folder, base = args.out / "rest", base_of(args)
    config = load_config(ROOT / "configs" / "lora.yaml", [start_of(args), "codes.views=1", *TAGS])
    tuning.take_shape(config)
    if not (folder / "val-00000.tar").is_file():
        encode_shard(shards / "rest.tar", folder / "val-00000.tar", base.image_tokenizer, config, torch.device("cpu"))
    return samples_of(folder, "val-*.tar")


def scores(model: Tokun, held: dict[str, list[Record]], style: str) -> dict[str, np.ndarray]:
    """Nats per token of each picture's codes and of its caption, and of all its tokens, given the tags that the model knows, and `style`
    where it does not know the picture's: "book image" … -> (pictures,)."""
    v, found = model.vocabulary, {}
    style = style if style in v.styles else ""  # all weights know only the tags of their own pictures
    for name, records in held.items():
        tags = [
            Tags(r.style if r.style in v.styles else style, r.subject if r.subject in v.subjects else "", v.default_register, r.grid,
                r.thing if r.thing in v.things else "")
            for r in records
        ]  # fmt: skip
        codes = [r.codes[0].tolist() for r in records]
        captions = [model.text_tokenizer.encode(r.caption)[: v.max_text] for r in records]
        image, text = (np.array(nats) for nats in (model.image_nll(tags, codes), model.caption_nll(tags, captions, codes)))
        pieces, words = np.array([len(c) for c in codes]), np.array([len(c) + 1 for c in captions])
        found[f"{name} image"], found[f"{name} text"], found[f"{name} both"] = (
            image / pieces,
            text / words,
            (image + text) / (pieces + words),
        )
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
    found = [row for row in found if any(fnmatch.fnmatchcase(row["key"], pattern) for pattern in args.keys)]
    order = np.random.default_rng(args.seed).permutation(len(found))[: args.rows + args.held_out]
    pairs = [(found[i]["description"], found[i][args.register]) for i in order]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs[: args.rows]), ("val", pairs[args.rows :])):
        lines = [json.dumps({"description": description, "caption": caption}, ensure_ascii=False) + "\n" for description, caption in part]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    register = f"studio-{args.register}"  # a tag unknown to the base
    given = [f"words.{split}={(args.out / f'{split}.jsonl').resolve()}" for split in ("train", "val")]
    record = train(ROOT / "configs" / "words.yaml", args.out / "lora", start_of(args), *given, f"words.register={register}", *args.set)
    base = base_of(args)
    models = [("the base's own register", base, args.register)] if args.register in base.vocabulary.registers else []
    models += [("new register, not trained", untrained(args, register), register)]
    models += [("new register, trained", base_of(args, adapter=args.out / "lora"), register)]
    held = pairs[args.rows :]
    said = {name: rewritten(model, held, own, args.out / f"{name}.tsv") for name, model, own in models}
    rows = [[name, *rewriting_figures(model, own, held, said[name])] for name, model, own in models]
    table(["register", "nats_a_token", "BLEU-1", "of_others", "BLEU-4", "of_others", "CIDEr", "of_others"], rows)
    for i, (description, caption) in enumerate(held[:4]):
        print("\n".join([f"{description} ({caption})", *(f"    {name}: {texts[i]}" for name, texts in said.items())]))
    print(f"{args.rows} rows, {record['steps']} steps, {record['seconds']} s; {len(held)} held out")


def rewritten(model: Tokun, held: Sequence[tuple[str, str]], register: str, path: Path, rows: int = 64) -> list[str]:
    """The likeliest caption of each description, written to a table beside the wanted one. A finished table is reused."""
    if path.is_file():
        return [line.split("\t")[2] for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    v = model.vocabulary
    prompts = [
        sequences.rewrite_prompt(v, v.bare(), model.text_tokenizer.encode(description)[: v.max_text], register) for description, _ in held
    ]
    said: dict[int, str] = {}
    for width in dict.fromkeys(map(len, prompts)):  # rows of a batch have prompts of one length
        mine = [i for i, prompt in enumerate(prompts) if len(prompt) == width]
        for part in (mine[first : first + rows] for first in range(0, len(mine), rows)):
            u = model.uniforms(0, range(len(part)))
            made = conditional_generation.write(model, [prompts[i] for i in part], u, model.text_choice(0.0, None)).ids.tolist()
            said |= {i: model.text_tokenizer.decode(sequences.unpack(v, ids).rewritten or []) for i, ids in zip(part, made)}
    texts = [said[i] for i in range(len(held))]
    path.write_text("".join("\t".join([*pair, text]) + "\n" for pair, text in zip(held, texts)), encoding="utf-8")
    return texts


def rewriting_figures(model: Tokun, register: str, held: Sequence[tuple[str, str]], said: Sequence[str]) -> list[str]:
    """Nats a token, BLEU and CIDEr with 95 % intervals over rows, and the latter of the same captions against other rows' captions."""
    nats = rewriting_nats(model, held, register)
    low, high = bootstrap(nats, lambda cases: float(cases[:, 0].sum() / cases[:, 1].sum()), seed=0)
    marks = {figure.name: figure for figure in agreement(said, [caption for _, caption in held], seed=0)}
    cells = [f"{nats[:, 0].sum() / nats[:, 1].sum():.3f} ({low:.3f} to {high:.3f})"]
    for name in ("BLEU-1", "BLEU-4", "CIDEr"):
        own = marks[name]
        cells += [f"{own.value:.3f} ({own.low:.3f} to {own.high:.3f})", f"{marks[f'{name}, chance'].value:.3f}"]
    return cells


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
    base = base_of(args)
    reward, *judges = (
        typed_tree.build(RewardConfig, yaml.safe_load(text), where="--reward or --judge") for text in (args.reward, *args.judge)
    )
    (chosen,) = rewards.make([reward], base, "--reward")
    for split, seed, n in (("train", 1, args.n), ("val", 2, max(32, args.n // 4))):
        if not (args.out / f"{split}.jsonl").is_file():
            (args.out / f"{split}.jsonl").write_text(
                preferences.lines(base.best_and_worst(seed, n, args.best_of, chosen)), encoding="utf-8"
            )
    given = [f"dpo.{name}={(args.out / f'{split}.jsonl').resolve()}" for name, split in (("pairs", "train"), ("val", "val"))]
    record = train(ROOT / "configs" / "dpo.yaml", args.out / "lora", start_of(args), *given, *args.set)
    measures = [chosen, *rewards.make(judges, base, "--judge")]
    found, rows = [], []
    for name, model in (("base", base), ("DPO", base_of(args, adapter=args.out / "lora"))):
        pairs = model.sample(1000, args.eval_n)
        (args.out / f"{name}.txt").write_text("".join(f"{pair.caption}\n" for pair in pairs), encoding="utf-8")
        found.append({f"{i}": np.array(measure(pairs)) for i, measure in enumerate(measures)})  # two may have one name
        different = len({tuple(pair.caption_ids) for pair in pairs})
        rows.append(
            [name, *told(found[-1], found[0]), f"{np.mean([len(p.caption_ids) for p in pairs]):.1f}", f"{different} of {len(pairs)}"]
        )
    table(["model", f"{chosen.name}_that_chose", *(judge.name for judge in measures[1:]), "pieces_a_caption", "different_captions"], rows)
    print(
        f"{args.n} preferences of best and worst of {args.best_of}; "
        f"{record['steps']} steps, {record['seconds']} s; held out {record['val']}"
    )


if __name__ == "__main__":
    console.run("benchmarks/adapters.py", main)
