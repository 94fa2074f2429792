"""`tokun sample`: checkpoint and seed in, pairs out. What is written, and in which direction; the options are in sample_options.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tokun
from tokun.cli import caption_pictures
from tokun.cli.sample_options import CHOOSES, MANY, OPTIONS, mode_of, parse, shards_wanted, vars_of
from tokun.data import image_files
from tokun.inference import bulk, candidates, conditional_generation, picture_files, preferences, sheet
from tokun.inference.clip import Clip
from tokun.inference.picture_files import LISTED
from tokun.inference.tags import grid_of
from tokun.render import video
from tokun.render.grids import captioned_grid, gif, strip
from tokun.render.scale import Enlarge
from tokun.render.svg import to_svg
from tokun.training import tracking
from tokun.utils import checkpoint, console
from tokun.utils.errors import UserError
from tokun.utils.lock import alone_in
from tokun.utils.task_engine import absolute, engine_of, is_elsewhere

if TYPE_CHECKING:
    from PIL import Image

    from tokun.inference.conditional_generation import Words
    from tokun.inference.model import Pair, Tokun


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.max_megapixels is not None:
        image_files.max_pixels(args.max_megapixels)
        os.environ[image_files.LIMIT] = f"{args.max_megapixels:.17g}"
    enlarge = Enlarge(args.scale, args.scale_by)
    if args.video:
        video.require_ffmpeg()
    checkpoint.require_writable(args.out, option="--out")
    if args.pairs:
        require_file(args.pairs, "--pairs")
    rank = int(os.environ.get("RANK", 0))
    if rank > 0 and not shards_wanted(args):
        return  # one process is enough: only shards are divided among processes
    print("sample: loading the model …", file=sys.stderr)
    device = args.device or (f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None)
    model = tokun.load(args.checkpoint, device=device, dtype=getattr(torch, args.dtype), compile=args.compile, adapter=args.adapter)
    args.best_of = candidates_of(model, args)
    if args.image is not None and not caption_pictures.is_one(args.image):
        write_words(model, args)
    elif args.image is not None or args.rewrite is not None:
        tell(say(model, args, *(args.image or ())), args.out)
    elif shards_wanted(args):
        write_shards(model, args, rank=rank, world=int(os.environ.get("WORLD_SIZE", 1)))
    else:
        if args.aspect and (grid := grid_of(args.aspect, model.vocabulary)):
            rows, columns = grid
            known = ", ".join(f"{height}x{width}" for height, width in model.grids)
            print(f"--aspect {args.aspect}: grid {rows}x{columns} (rows x columns of codes), of {known}")
        with alone_in(args.out, option="--out"):
            if args.pairs or mode_of(args) not in ("plain", "best_of"):
                pairs = draw(model, args)
                shown = sheet_of(model, pairs, args, enlarge)  # before the pairs are written: one of them may replace the original
                write_pairs(pairs, args, enlarge)
                if shown is not None:
                    shown.save(args.out / picture_files.SHEET)
                    print(f"the original beside them: {args.out / picture_files.SHEET}")
            else:
                write_samples(model, args, enlarge)


def candidates_of(model: Tokun, args: argparse.Namespace) -> int:
    """--best-of; by default the checkpoint's for single pictures of a seed, 1 for shards and for the other directions."""
    if args.best_of is not None:
        return args.best_of
    if shards_wanted(args) or mode_of(args) != "plain":
        return 1
    if model.defaults.best_of == 1 and (named := next((name for name in CHOOSES if getattr(args, name)), "")):
        raise UserError(CHOOSES[named])
    return model.defaults.best_of


def require_file(path: Path, option: str) -> None:
    """Raise UserError unless a file can be written there."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it, such as {path / 'pairs.jsonl'}")
    checkpoint.require_writable(path.parent, option=option)


def write_shards(model: Tokun, args: argparse.Namespace, *, rank: int, world: int) -> None:
    """Draw this process's share of very many pairs, as shards."""
    if elsewhere := is_elsewhere(args):
        if world > 1:
            raise UserError(f"--engine {args.engine} --workers {args.workers}: leave these out under a process launcher such as torchrun")
        device = args.device or ("cuda" if args.gpus_per_task else None)
        loading = bulk.Loading(
            args.checkpoint and absolute(args.checkpoint), args.adapter and absolute(args.adapter), device, args.dtype, args.compile
        )
    with engine_of(args) if elsewhere else nullcontext() as engine:
        bulk.generate(
            model, args.seed, args.n, args.out, options_of(args), shard_size=args.shard_size, rank=rank, world=world,
            engine=engine, loading=loading if elsewhere else None,
        )  # fmt: skip
    if rank == 0:
        table = f", {bulk.TABLE}" if (args.out / bulk.TABLE).is_file() else "; the table follows when the other processes are done"
        print(f"{args.n} pairs in {args.out}: {bulk.RECORD}, shards{table}")


def write_samples(model: Tokun, args: argparse.Namespace, enlarge: Enlarge) -> None:
    """Draw samples of the seed and write each batch as it comes."""
    if args.n > MANY or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        print(
            f"{args.n} single PNGs, by one process. --shard-size 1000 writes WebDataset shards of single draws and a table instead, "
            "by all processes of torchrun"
        )
    options, score = options_of(args), score_of(model, args) if args.best_of > 1 else None
    plan = model.plan(**options)  # for all batches: with a prompt its tags are inferred once
    chosen = {"best_of": args.best_of, "reward": args.reward, "clip": args.clip, **({"limit": args.max_bytes} if args.reward else {})}
    if args.best_of > 1 and not args.clip:
        chosen |= candidates.chosen_by(model, args.reward, args.register)
    if args.best_of > 1:
        chosen["named_by"] = "choice"  # earlier versions named by sample: their unfinished runs are not gone on with
    together = max(1, args.batch_size // args.best_of)  # pairs of a batch, with their candidates
    several = bulk.identity(model) if args.n > together else {}  # one batch is never resumed

    def draw_batch(indices: range) -> list[Pair]:
        if args.best_of > 1:
            return candidates.best_of(model, args.seed, len(indices), args.best_of, score, first=indices.start, plan=plan)
        return model.draw(args.seed, indices, plan)

    asked = {**options, **chosen, **several, "seed": args.seed}
    svg_bytes = args.max_bytes if args.svg else 0
    picture_files.write(draw_batch, args.n, args.out, asked, batch_size=together, svg_bytes=svg_bytes, enlarge=enlarge)
    tell_written(args, picture_files.first_of(args.out, MANY), args.n)


def tell_written(args: argparse.Namespace, records: list[dict[str, Any]], n: int) -> None:
    """Print what was written. `records`: of the first pairs."""
    for one in records:
        print(f"{one['seed']}-{Path(one['file_name']).stem.rpartition('-')[2]}  {one['caption']}")
    if n > len(records):
        print(f"… {n - len(records)} more in {args.out / LISTED}")
    first = records[0]["file_name"]
    written = ["grid.png", f"{first} …" if n > 1 else first, *(["an SVG of each"] if args.svg else []), LISTED]
    written += ["strip.png", "interpolation.gif"] if args.interpolate else []
    print(f"{n} pair{'' if n == 1 else 's'} in {args.out}: {', '.join([*written, *(['interpolation.mp4'] if args.video else [])])}")
    if args.wandb:
        log_to_wandb(records, args)


def sheet_of(model: Tokun, pairs: list[Pair], args: argparse.Namespace, enlarge: Enlarge) -> Image.Image | None:
    """The original beside its completions or variations, if there is one."""
    if args.complete is None and args.invert is None:
        return None
    keep = args.keep if args.complete is not None else None
    return sheet.beside(model, args.complete or args.invert, pairs, keep=keep, enlarge=enlarge)


def write_pairs(pairs: list[Pair], args: argparse.Namespace, enlarge: Enlarge) -> None:
    """Write pictures, samples.jsonl, the grid and anything else requested into --out."""
    lines = picture_files.lines_of(pairs, [f"{name_of(pair, args)}.png" for pair in pairs], enlarge)
    picture_files.make_room(args.out, lines, len(pairs), but=args.complete or args.invert)
    images = [enlarge(pair.image) for pair in pairs]
    with picture_files.announced(args.out, lines):
        for pair, image in zip(pairs, images):
            image.save(args.out / f"{name_of(pair, args)}.png")
            if args.svg:
                checkpoint.write_text(args.out / f"{name_of(pair, args)}.svg", to_svg(pair.image, args.max_bytes))
        checkpoint.write_text(args.out / LISTED, "".join(f"{line}\n" for line in lines))
    picture_files.write_grid(args.out)
    if args.interpolate:
        strip(images).save(args.out / "strip.png")
        (args.out / "interpolation.gif").write_bytes(gif(images))  # there and back
    if args.video:
        video.write_mp4(images, args.out / "interpolation.mp4")
    tell_written(args, [json.loads(line) for line in lines], len(lines))


def log_to_wandb(records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    first = records[: picture_files.ON_GRID]
    images, captions = list(picture_files.images_of(args.out, first)), [one["caption"] for one in first]
    folder = args.out / "tracking" / f"seed-{args.seed}"
    tracker = tracking.make_tracker("wandb", project="tokun", name=f"sample-{args.seed}", directory=folder, config=vars_of(args))
    tracker.log_grid("samples", captioned_grid(images, captions), images, captions, step=0)
    tracker.log({"samples/pmi": sum(one["pmi"] for one in records) / len(records)}, step=0)
    tracker.finish()


def name_of(pair: Pair, args: argparse.Namespace) -> str:
    """The name of a pair's files, without suffix: SEED-NUMBER only for pairs of a seed, not for interpolation steps or variations."""
    if args.interpolate:
        first, last = args.interpolate
        return f"steps-{first}-{last:06d}-{pair.index:02d}"
    what = "completed-" if args.complete is not None else "varied-" if args.invert is not None else ""
    return f"{what}{pair.seed:06d}-{pair.index // args.best_of:02d}"


def draw(model: Tokun, args: argparse.Namespace) -> list[Pair]:
    """The requested pairs, of every direction but samples of a seed."""
    tags = {"style": args.style, "subject": args.subject, "thing": args.thing}
    if args.complete is not None:
        found = {"register": args.register, "temperature": args.temperature, "top_p": args.top_p, **tags}
        print(
            f"--keep {args.keep if isinstance(args.keep, str) else ','.join(f'{share:g}' for share in args.keep)}: "
            f"{conditional_generation.kept(model, args.complete, args.keep)}"
        )
        return model.complete(args.complete, args.keep, seed=args.seed, n=args.n, **found)
    if args.invert is not None:
        temperature = 1.0 if args.temperature is None else args.temperature
        inverted = model.invert(args.invert, args.caption, seed=args.seed, temperature=temperature, register=args.register, **tags)
        if inverted.missed:
            print(f"{inverted.missed} codes or pieces are too unlikely for any latent: even at --vary 0 they may come out differently")
        return model.vary(inverted, args.vary, seed=args.seed, n=args.n, temperature=temperature)
    options = options_of(args)
    if args.interpolate:
        first, last = args.interpolate
        return model.interpolate(first, last, args.steps, **options)
    found = model.best_and_worst(args.seed, args.n, args.best_of, score=score_of(model, args), **options)
    if not found:
        raise UserError(
            f"all candidates of each of the {args.n} samples score the same, so there are no preferences to write to {args.pairs}: "
            "ask for more with --best-of or --n, or use another --reward"
        )
    checkpoint.write_text(args.pairs, preferences.lines(found))
    print(f"{len(found)} preferences in {args.pairs}")
    return [best for best, _ in found]


def score_of(model: Tokun, args: argparse.Namespace) -> Callable[[list[Pair]], list[float]] | str | None:
    """The score for --best-of, as `candidates.best_of` takes it."""
    if args.clip:
        return Clip(args.clip, device=str(model.device)).fit
    if not args.reward or args.reward in candidates.OWN_SCORES:
        return args.reward or None
    from tokun.align import rewards

    asked = replace(rewards.parse(args.reward), max_bytes=args.max_bytes)
    (score,) = rewards.make([asked], model, "--reward")
    return score


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `Tokun.sample`."""
    return {name: getattr(args, name) for name in OPTIONS}


def write_words(model: Tokun, args: argparse.Namespace) -> None:
    """The requested words for each of several pictures."""
    pictures = caption_pictures.pictures_of(args.image, args.out)
    free = ("image", "out", "device")
    asked = {name: value for name, value in vars_of(args).items() if name not in free}
    with alone_in(args.out, option="--out"):
        channels = model.image_tokenizer.config.image_channels
        caption_pictures.caption_pictures(lambda picture: say(model, args, picture), channels, pictures, args.out, asked)


def say(model: Tokun, args: argparse.Namespace, picture: Path | Image.Image | None = None) -> list[Words]:
    """The requested words, --n of each (default 1)."""
    common = {"seed": args.seed, "n": args.n, "temperature": args.text_temperature, "top_p": args.top_p}
    if args.rewrite is not None:
        return model.rewrite(args.rewrite, args.register or model.vocabulary.default_register, **common)
    assert picture is not None
    if args.question is not None:
        return model.ask(picture, args.question, **common)
    named = args.registers or args.register or model.vocabulary.default_register
    registers = [name.strip() for name in named.split(",") if name.strip()]
    tags = {"style": args.style, "subject": args.subject, "thing": args.thing}
    return model.caption(picture, registers, **tags, text_guidance_scale=args.text_guidance_scale, **common)


def tell(found: list[Words], out: Path) -> None:
    lines = [json.dumps({**asdict(words), "confidence": round(words.confidence, 4)}, ensure_ascii=False) for words in found]
    checkpoint.write_text(out / "words.jsonl", "\n".join(lines) + "\n")
    for words in found:
        print(f"{words.register or 'answer':<8} {words.confidence:.2f}  {words.text}")
    print(f"confidence, words; details are in {out / 'words.jsonl'}")


if __name__ == "__main__":
    console.run("tokun sample", main)
