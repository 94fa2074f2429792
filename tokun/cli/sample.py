"""`tokun sample`: checkpoint and seed in, pairs out. What is written, and in which direction; the options are in sample_options.py."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import tokun
from tokun.cli.sample_options import OPTIONS, parse, shards_wanted, vars_of
from tokun.data import image_files
from tokun.inference import bulk, conditional_generation, preferences
from tokun.inference.clip import Clip
from tokun.render import video
from tokun.render.grids import captioned_grid, gif, strip
from tokun.render.svg import to_svg
from tokun.training import tracking
from tokun.utils import checkpoint, console
from tokun.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from tokun.inference.conditional_generation import Words
    from tokun.inference.model import Pair, Tokun


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.max_megapixels is not None:
        image_files.max_pixels(args.max_megapixels)
        os.environ[image_files.LIMIT] = f"{args.max_megapixels:.17g}"
    if args.video:
        video.require_ffmpeg()
    checkpoint.require_writable(args.out, option="--out")
    if args.pairs:
        require_file(args.pairs, "--pairs")
    rank = int(os.environ.get("RANK", 0))
    if rank > 0 and not shards_wanted(args):
        return  # one process is enough: only shards are divided among processes
    device = args.device or (f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None)
    model = tokun.load(args.checkpoint, device=device, dtype=getattr(torch, args.dtype), compile=args.compile, adapter=args.adapter)
    if args.image is not None or args.rewrite is not None:
        tell(say(model, args), args.out)
    elif shards_wanted(args):
        write_shards(model, args, rank=rank, world=int(os.environ.get("WORLD_SIZE", 1)))
    else:
        if args.aspect and (grid := model.plan(**options_of(args)).wanted.grid):
            rows, columns = grid
            known = ", ".join(f"{height}x{width}" for height, width in model.grids)
            print(f"--aspect {args.aspect}: grid {rows}x{columns} (rows x columns of codes), of {known}")
        write_pairs(draw(model, args), args)


def require_file(path: Path, option: str) -> None:
    """Raise UserError unless a file can be written there."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it, such as {path / 'pairs.jsonl'}")
    checkpoint.require_writable(path.parent, option=option)


def write_shards(model: Tokun, args: argparse.Namespace, *, rank: int, world: int) -> None:
    """Draw this process's share of very many pairs, as shards."""
    size = args.shard_size or 1000
    if rank == 0 and args.shard_size is None:
        print(
            f"--n {args.n} is more than {bulk.FROM:,}: written as shards of {size:,} pairs, not as single PNGs. An interruption loses only the current batch"
        )
    bulk.generate(model, args.seed, args.n, args.out, options_of(args), shard_size=size, rank=rank, world=world)
    if rank == 0:
        table = f", {bulk.TABLE}" if (args.out / bulk.TABLE).is_file() else "; the table follows when the other processes are done"
        print(f"{args.n} pairs in {args.out}: {bulk.RECORD}, shards{table}")


def write_pairs(pairs: list[Pair], args: argparse.Namespace) -> None:
    """Write pictures, samples.jsonl, the grid and anything else requested into --out."""
    remove_earlier(args.out)
    names = [name_of(pair, args) for pair in pairs]
    images, captions = [pair.image for pair in pairs], [pair.caption for pair in pairs]
    for image, name in zip(images, names):
        image.save(args.out / f"{name}.png")
        if args.svg:
            checkpoint.write_text(args.out / f"{name}.svg", to_svg(image, args.max_bytes))
    lines = [json.dumps({**pair.record(), "file_name": f"{name}.png"}, ensure_ascii=False) for pair, name in zip(pairs, names)]
    checkpoint.write_text(args.out / LISTED, "\n".join(lines) + "\n")
    grid = captioned_grid(images[:64], captions[:64])
    grid.save(args.out / "grid.png")
    if args.interpolate:
        save_interpolation(images, args.out)
    if args.video:
        video.write_mp4(images, args.out / "interpolation.mp4")
    for pair in pairs:
        print(f"{pair.seed}-{pair.index:02d}  {pair.caption}")
    written = ["grid.png", f"{names[0]}.png …" if len(names) > 1 else f"{names[0]}.png", *(["an SVG of each"] if args.svg else []), LISTED]
    written += ["strip.png", "interpolation.gif"] if args.interpolate else []
    print(f"{len(pairs)} pairs in {args.out}: {', '.join([*written, *(['interpolation.mp4'] if args.video else [])])}")
    if args.wandb:
        log_to_wandb(pairs, grid, args)


def log_to_wandb(pairs: list[Pair], grid: Image.Image, args: argparse.Namespace) -> None:
    folder = args.out / "tracking" / f"seed-{args.seed}"
    tracker = tracking.make_tracker("wandb", project="tokun", name=f"sample-{args.seed}", directory=folder, config=vars_of(args))
    tracker.log_grid("samples", grid, [pair.image for pair in pairs], [pair.caption for pair in pairs], step=0)
    tracker.log({"samples/pmi": sum(pair.pmi for pair in pairs) / len(pairs)}, step=0)
    tracker.finish()


LISTED = "samples.jsonl"
OURS = re.compile(r"(steps-\d+-|completed-|varied-)?\d{6,}-\d{2,}\.png")


def name_of(pair: Pair, args: argparse.Namespace) -> str:
    """The name of a pair's files, without suffix: SEED-INDEX only for sample INDEX of a seed, not for interpolation steps or variations."""
    if args.interpolate:
        first, last = args.interpolate
        return f"steps-{first}-{last:06d}-{pair.index:02d}"
    what = "completed-" if args.complete is not None else "varied-" if args.invert is not None else ""
    return f"{what}{pair.seed:06d}-{pair.index:02d}"


def remove_earlier(out: Path) -> None:
    """Remove only the files listed in the previous run's samples.jsonl, which would otherwise be mistaken for the new run's."""
    try:
        records = [json.loads(line) for line in (out / LISTED).read_text(encoding="utf-8").splitlines() if line.strip()]
        names = [str(one.get("file_name") or f"{one['seed']:06d}-{one['index']:02d}.png") for one in records]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name in filter(OURS.fullmatch, names):
        for path in (out / name, (out / name).with_suffix(".svg")):
            path.unlink(missing_ok=True)
    if any(name.startswith("steps-") for name in names):
        for name in ("strip.png", "interpolation.gif", "interpolation.mp4"):
            (out / name).unlink(missing_ok=True)


def draw(model: Tokun, args: argparse.Namespace) -> list[Pair]:
    """The requested pairs."""
    tags = {"style": args.style, "subject": args.subject, "thing": args.thing}
    if args.complete is not None:
        found = {"register": args.register, "temperature": args.temperature, "top_p": args.top_p, **tags}
        print(
            f"--keep {args.keep if isinstance(args.keep, str) else ','.join(f'{share:g}' for share in args.keep)}: {conditional_generation.kept(model, args.complete, args.keep)}"
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
    if args.best_of > 1:
        score = score_of(model, args)
        if args.pairs:
            found = model.best_and_worst(args.seed, args.n, args.best_of, score=score, **options)
            if not found:
                raise UserError(
                    f"all candidates of each of the {args.n} samples score the same, so there are no preferences to write to {args.pairs}: "
                    "ask for more with --best-of or --n, or use another --reward"
                )
            checkpoint.write_text(args.pairs, preferences.lines(found))
            print(f"{len(found)} preferences in {args.pairs}")
            return [best for best, _ in found]
        return model.best_of(args.seed, args.n, args.best_of, score=score, **options)
    pairs = []
    for first in tqdm(range(0, args.n, args.batch_size), desc="sampling", unit="batch", disable=args.n <= args.batch_size):
        pairs += model.sample(args.seed, indices=range(first, min(args.n, first + args.batch_size)), **options)
    return pairs


def score_of(model: Tokun, args: argparse.Namespace) -> Callable[[list[Pair]], list[float]] | None:
    """The score for --best-of; None: PMI."""
    if not args.reward:
        return Clip(args.clip, device=str(model.device)).fit if args.clip else None
    from tokun.align import rewards

    asked = replace(rewards.parse(args.reward), max_bytes=args.max_bytes)
    return rewards.Mixed(rewards.make([asked], model, "--reward")).total


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `Tokun.sample`."""
    return {name: getattr(args, name) for name in OPTIONS}


def say(model: Tokun, args: argparse.Namespace) -> list[Words]:
    """The requested words, --n of each (default 1)."""
    common = {"seed": args.seed, "n": args.n, "temperature": args.text_temperature, "top_p": args.top_p}
    if args.rewrite is not None:
        return model.rewrite(args.rewrite, args.register or model.vocabulary.default_register, **common)
    if args.question is not None:
        return model.ask(args.image, args.question, **common)
    named = args.registers or args.register or model.vocabulary.default_register
    registers = [name.strip() for name in named.split(",") if name.strip()]
    return model.caption(
        args.image,
        registers,
        style=args.style,
        subject=args.subject,
        thing=args.thing,
        text_guidance_scale=args.text_guidance_scale,
        **common,
    )


def tell(found: list[Words], out: Path) -> None:
    lines = [json.dumps({**asdict(words), "confidence": round(words.confidence, 4)}, ensure_ascii=False) for words in found]
    checkpoint.write_text(out / "words.jsonl", "\n".join(lines) + "\n")
    for words in found:
        print(f"{words.register or 'answer':<8} {words.confidence:.2f}  {words.text}")
    print(f"confidence, words; details are in {out / 'words.jsonl'}")


def save_interpolation(images: list[Image.Image], out: Path) -> None:
    """Write a strip of all steps, and a GIF that goes there and back."""
    strip(images).save(out / "strip.png")
    (out / "interpolation.gif").write_bytes(gif(images))


if __name__ == "__main__":
    console.run("tokun sample", main)
