"""Checkpoint and seed in, pairs out: pictures and the captions that describe them.

    python sample.py --seed 42 --n 16                              the bundled engraving model
    python sample.py --checkpoint runs/tiny --seed 7 --n 4         a model of your own (folder or Hub id)
    python sample.py --adapter runs/mine-lora --n 4                the bundled model with an adapter (configs/lora.yaml)
    python sample.py --prompt "A ship in a storm" --n 4 --guidance-scale 3
    python sample.py --thing moth --aspect 4:3 --n 4               by tags and shape, for a model that knows them
    python sample.py --image plate.png --registers plain,poetic    captions of a picture; with --question "…", an answer
    python sample.py --rewrite "A ship." --register poetic         a caption in another register
    python sample.py --complete torn.png --keep top --n 4          complete a part of a picture
    python sample.py --interpolate 42 43 --steps 12 --video        from one seed to another: a strip, a GIF and an MP4
    python sample.py --invert plate.png --caption "A ship." --vary 0.3   variations of a picture
    python sample.py --seed 42 --n 100000 --shard-size 1000 --out shards/   WebDataset shards and a table; torchrun shares the work
    python sample.py --svg --max-bytes 10000                       vector drawings too
    python sample.py --best-of 8 --n 4                             the best of eight candidates by PMI of picture and words
    python sample.py --best-of 8 --n 200 --pairs pairs.jsonl       best and worst of each eight, for training (configs/dpo.yaml)
    python sample.py --prompt "A ship" --svg --best-of 8 --reward svg   the one whose drawing is most like its picture (tokun/align/rewards.py)
    python sample.py --best-of 8 --clip ViT-B-32:laion2b_s34b_b79k by CLIP score instead (any open_clip model, or a folder)

Writes grid.png, one PNG per sample and samples.jsonl into --out (words.jsonl if only words are requested). Sample k of seed s is
the same for every --n and --batch-size. Stopped or killed, it loses one batch; the same command goes on and ends with the same files.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tokun
from tokun.config import SamplingOptions
from tokun.data import image_files
from tokun.inference import bulk, conditional_generation, picture_files, preferences
from tokun.inference.clip import Clip
from tokun.inference.picture_files import LISTED, remove_earlier
from tokun.render import video
from tokun.render.grids import captioned_grid, gif, strip
from tokun.render.svg import LEAST_BYTES, to_svg
from tokun.training import tracking
from tokun.utils import checkpoint, console
from tokun.utils.console import home_path
from tokun.utils.errors import UserError
from tokun.utils.lock import alone_in

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
        with alone_in(args.out, option="--out"):
            if args.pairs or mode_of(args) not in ("plain", "best_of"):
                write_pairs(draw(model, args), args)
            else:
                write_samples(model, args)


def require_file(path: Path, option: str) -> None:
    """Raise UserError unless a file can be written there."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it, such as {path / 'pairs.jsonl'}")
    checkpoint.require_writable(path.parent, option=option)


def write_shards(model: Tokun, args: argparse.Namespace, *, rank: int, world: int) -> None:
    """Draw this process's share of very many pairs, as shards."""
    bulk.generate(model, args.seed, args.n, args.out, options_of(args), shard_size=args.shard_size, rank=rank, world=world)
    if rank == 0:
        table = f", {bulk.TABLE}" if (args.out / bulk.TABLE).is_file() else "; the table follows when the other processes are done"
        print(f"{args.n} pairs in {args.out}: {bulk.RECORD}, shards{table}")


def write_samples(model: Tokun, args: argparse.Namespace) -> None:
    """Draw samples of the seed and write each batch as it comes."""
    if args.n > MANY or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        print(
            f"{args.n} single PNGs, by one process. --shard-size 1000 writes WebDataset shards and a table instead, by all processes of torchrun"
        )
    options, score = options_of(args), score_of(model, args) if args.best_of > 1 else None
    chosen = {"best_of": args.best_of, "reward": args.reward, "clip": args.clip}
    several = bulk.identity(model) if args.n > args.batch_size else {}  # one batch is never resumed

    def draw_batch(indices: range) -> list[Pair]:
        if args.best_of > 1:
            return model.best_of(args.seed, len(indices), args.best_of, score=score, first=indices.start, **options)
        return model.sample(args.seed, indices=indices, **options)

    asked = {**options, **chosen, **several, "seed": args.seed}
    picture_files.write(draw_batch, args.n, args.out, asked, batch_size=args.batch_size, svg_bytes=args.max_bytes if args.svg else 0)
    tell_written(args, picture_files.first_of(args.out, MANY), args.n)


def tell_written(args: argparse.Namespace, records: list[dict[str, Any]], n: int) -> None:
    """Print what was written. `records`: of the first pairs."""
    for one in records:
        print(f"{one['seed']}-{one['index']:02d}  {one['caption']}")
    if n > len(records):
        print(f"… {n - len(records)} more in {args.out / LISTED}")
    first = records[0]["file_name"]
    written = ["grid.png", f"{first} …" if n > 1 else first, *(["an SVG of each"] if args.svg else []), LISTED]
    written += ["strip.png", "interpolation.gif"] if args.interpolate else []
    print(f"{n} pairs in {args.out}: {', '.join([*written, *(['interpolation.mp4'] if args.video else [])])}")
    if args.wandb:
        log_to_wandb(records, args)


def write_pairs(pairs: list[Pair], args: argparse.Namespace) -> None:
    """Write pictures, samples.jsonl, the grid and anything else requested into --out."""
    remove_earlier(args.out)
    names = [name_of(pair, args) for pair in pairs]
    images = [pair.image for pair in pairs]
    for image, name in zip(images, names):
        image.save(args.out / f"{name}.png")
        if args.svg:
            checkpoint.write_text(args.out / f"{name}.svg", to_svg(image, args.max_bytes))
    records = [{**pair.record(), "file_name": f"{name}.png"} for pair, name in zip(pairs, names)]
    checkpoint.write_text(args.out / LISTED, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    picture_files.write_grid(args.out)
    if args.interpolate:
        save_interpolation(images, args.out)
    if args.video:
        video.write_mp4(images, args.out / "interpolation.mp4")
    tell_written(args, records, len(records))


def log_to_wandb(records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    first = records[: picture_files.ON_GRID]
    images, captions = list(picture_files.images_of(args.out, first)), [one["caption"] for one in first]
    folder = args.out / "tracking" / f"seed-{args.seed}"
    tracker = tracking.make_tracker("wandb", project="tokun", name=f"sample-{args.seed}", directory=folder, config=vars_of(args))
    tracker.log_grid("samples", captioned_grid(images, captions), images, captions, step=0)
    tracker.log({"samples/pmi": sum(one["pmi"] for one in records) / len(records)}, step=0)
    tracker.finish()


MANY = 1000  # captions that are printed, and pairs that the other directions draw at a time


def name_of(pair: Pair, args: argparse.Namespace) -> str:
    """The name of a pair's files, without suffix: SEED-INDEX only for sample INDEX of a seed, not for interpolation steps or variations."""
    if args.interpolate:
        first, last = args.interpolate
        return f"steps-{first}-{last:06d}-{pair.index:02d}"
    what = "completed-" if args.complete is not None else "varied-" if args.invert is not None else ""
    return f"{what}{pair.seed:06d}-{pair.index:02d}"


def draw(model: Tokun, args: argparse.Namespace) -> list[Pair]:
    """The requested pairs, of every direction but samples of a seed."""
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
    found = model.best_and_worst(args.seed, args.n, args.best_of, score=score_of(model, args), **options)
    if not found:
        raise UserError(
            f"all candidates of each of the {args.n} samples score the same, so there are no preferences to write to {args.pairs}: "
            "ask for more with --best-of or --n, or use another --reward"
        )
    checkpoint.write_text(args.pairs, preferences.lines(found))
    print(f"{len(found)} preferences in {args.pairs}")
    return [best for best, _ in found]


def score_of(model: Tokun, args: argparse.Namespace) -> Callable[[list[Pair]], list[float]] | None:
    """The score for --best-of; None: PMI."""
    if not args.reward:
        return Clip(args.clip, device=str(model.device)).fit if args.clip else None
    from tokun.align import rewards

    asked = replace(rewards.parse(args.reward), max_bytes=args.max_bytes)
    return rewards.Mixed(rewards.make([asked], model, "--reward")).total


def shards_wanted(args: argparse.Namespace) -> bool:
    return mode_of(args) == "plain" and args.shard_size is not None


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked arguments. An option without effect is an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in (add_places, add_wishes, add_forms, add_directions):
        group(parser)
    unset, defaults = object(), vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    given = [name for name in sorted(defaults) if getattr(args, name) is not unset]
    args = argparse.Namespace(**{**defaults, **{name: getattr(args, name) for name in given}})
    if mistake := mistake_in(args, given):
        parser.error(mistake)
    if args.n is None:
        args.n = 1 if args.image is not None or args.rewrite is not None else 16
    if shards_wanted(args) and (args.svg or args.wandb):
        parser.error(f"--{'svg' if args.svg else 'wandb'} has no effect on shards: leave it out, or leave out --shard-size")
    return args


def mistake_in(args: argparse.Namespace, given: list[str]) -> str:
    """What is wrong with the arguments, "" if nothing. `given`: the names of those on the command line."""
    mode = mode_of(args)
    idle = [name for name in given if name not in READ[mode] | EVERYWHERE]
    mistakes = [
        (args.question is not None and args.image is None, "--question is about a picture: name it with --image"),
        (args.invert is not None and not args.caption.strip(), "--invert needs --caption: the latent decides picture and words"),
        (args.pairs and args.best_of == 1, "--pairs writes the best and the worst of several candidates: say how many with --best-of"),
        (args.clip and args.best_of == 1, "--clip chooses among several candidates: say how many with --best-of"),
        (args.reward and args.best_of == 1, "--reward chooses among several candidates: say how many with --best-of"),
        (args.reward and args.clip, "--clip MODEL is the same as --reward clip=MODEL: give one of them"),
        (args.video and not args.interpolate, "--video shows an interpolation: name its seeds with --interpolate"),
        (idle, f"--{''.join(idle[:1]).replace('_', '-')} has no effect {where_of(mode)}: leave it out"),
        ("max_bytes" in given and not args.svg and not args.reward, "--max-bytes is the limit of an SVG: add --svg"),
        (args.svg and args.max_bytes < LEAST_BYTES, f"--max-bytes {args.max_bytes} is too small: a picture takes at least {LEAST_BYTES} bytes"),
        ("registers" in given and "register" in given, "--registers already names all registers: leave out --register"),
        (mode == "interpolate" and ("seed" in given or "n" in given), "--interpolate A B gives the seeds, --steps the number of pairs: leave out --seed and --n"),
        (mode not in ("plain", "best_of") and (args.n or 0) > MANY, f"--n {args.n}: {where_of(mode)} the limit is {MANY:,} at a time"),
    ]  # fmt: skip
    return next((told for wrong, told in mistakes if wrong), "")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Options for the model, the number of samples and the output."""
    add = parser.add_argument
    add("--checkpoint", default=None, help="a folder or a Hugging Face Hub id; default: the bundled engraving model")
    add("--adapter", default=None, help="an adapter (LoRA) trained on the checkpoint: its folder, its run's folder, or a Hub id")
    add("--seed", type=int, default=42, help="seed of the latents (%(default)s)")
    add("--n", type=_positive, default=None, help="number of samples of the seed (16), or of texts (1)")
    add("--out", type=home_path, default=Path("outputs"), help="the output folder (%(default)s)")
    add("--batch-size", type=_positive, default=16, help="samples per batch (%(default)s)")
    add("--device", default=None, help="cpu, cuda, cuda:1 …; default: a GPU if there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the generator; float32 is exactly reproducible on CPU",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="on a CPU: compute steps with a C++ program, built once per machine (default: if there is a compiler). Without it, an occasional sample differs",
    )


def add_wishes(parser: argparse.ArgumentParser) -> None:
    """Options for what the samples show and how they are drawn."""
    add = parser.add_argument
    add("--style", default="", help="a style tag, for example engraving")
    add("--subject", default="", help="a subject tag, for example architecture")
    add("--thing", default="", help="a thing tag, the main noun, for example moth")
    add(
        "--aspect",
        default="",
        metavar="SHAPE",
        help="4:3 (width:height), wide, tall, square, or one of the model's grids (rows x columns, 12x16): the nearest grid is used",
    )
    add("--register", default="", help="the caption's register: plain, poetic, era, social, alt")
    add("--prompt", default=None, help="a caption to draw")
    add("--temperature", type=float, default=None, help="for codes, and a factor on the text temperature; 0 is greedy")
    add("--text-temperature", type=float, default=None, help="of words")
    add("--top-k", type=int, default=None, help="for codes; 0 is off")
    add("--top-p", type=float, default=None, help="nucleus sampling: the most likely ids with this total probability; 1 is off")
    add("--guidance-scale", type=float, default=None, help="1 is off; needs a prompt or tags")
    add("--text-guidance-scale", type=float, default=None, help="how closely the words follow their picture; 1 is off")
    add("--no-repeats", action="store_const", const=True, default=None, help="no word or short phrase twice in a row")


def add_forms(parser: argparse.ArgumentParser) -> None:
    """Options for the output format and for choosing among candidates."""
    add = parser.add_argument
    add(
        "--shard-size",
        type=_positive,
        default=None,
        metavar="N",
        help="write WebDataset shards of N samples and a table instead of single pictures",
    )
    add("--best-of", type=_positive, default=1, metavar="K", help="for each sample, the best of K candidates by PMI")
    add(
        "--pairs",
        type=home_path,
        metavar="FILE",
        help="with --best-of: write the best and worst candidates, which then share their tags, as preferences (configs/dpo.yaml)",
    )
    add(
        "--reward",
        default="",
        metavar="KIND",
        help="--best-of by a reward: svg (at --max-bytes), clip=MODEL, module:function … (tokun/align/rewards.py)",
    )
    add("--clip", metavar="MODEL", help="--best-of by CLIP score: hf-hub:ORG/NAME, a folder, or ARCHITECTURE:WEIGHTS of open_clip")
    add("--svg", action="store_true", help="also write each picture as SVG")
    add("--max-bytes", type=_positive, default=10_000, help="size limit of an SVG (%(default)s)")
    add("--wandb", action="store_true", help="log the grid to Weights & Biases (offline without a key)")


def add_directions(parser: argparse.ArgumentParser) -> None:
    """Options for the other directions."""
    add = parser.add_argument
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--image", type=home_path, metavar="FILE", help="caption a picture")
    one.add_argument("--rewrite", metavar="TEXT", help="rewrite a caption in the --register")
    one.add_argument("--complete", type=home_path, metavar="FILE", help="complete the part of a picture given by --keep")
    one.add_argument("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="from seed A to seed B in --steps")
    one.add_argument(
        "--invert", type=home_path, metavar="FILE", help="find the latent of a picture and its --caption, and vary it by --vary"
    )
    add("--registers", default="", metavar="A,B", help="registers of the captions of --image (default: --register, or plain)")
    add("--question", metavar="TEXT", help="a question about --image, for a model trained on questions")
    add(
        "--max-megapixels",
        type=float,
        default=None,
        metavar="N",
        help="read pictures of up to N million pixels (100, or the environment variable TOKUN_MAX_MEGAPIXELS)",
    )
    add("--keep", type=_part, default="top", metavar="PART", help="top, bottom, left, right (halves), or left,top,right,bottom from 0 to 1")
    add("--steps", type=_positive, default=12, help="steps of --interpolate (%(default)s)")
    add("--video", action="store_true", help="also write the interpolation as MP4")
    add("--caption", default="", metavar="TEXT", help="the caption of the picture of --invert")
    add(
        "--vary",
        type=float,
        default=0.3,
        metavar="X",
        help="share of the codes to resample. 0: the picture itself; 1: nothing left of it (0.3)",
    )


OPTIONS = {option.name for option in fields(SamplingOptions)}  # of `Tokun.sample`
EVERYWHERE = {"checkpoint", "adapter", "seed", "n", "out", "device", "dtype", "compile"}
DRAWN = {"style", "subject", "thing", "register", "temperature", "svg", "max_bytes", "wandb"}
PLAIN = DRAWN | OPTIONS
READ = {  # the options that each direction reads
    "plain": PLAIN | {"shard_size", "best_of", "clip", "reward", "pairs"},
    "best_of": PLAIN | {"best_of", "clip", "reward", "pairs"},
    "interpolate": PLAIN | {"interpolate", "steps", "video"},
    "complete": DRAWN | {"complete", "max_megapixels", "keep", "top_p"},
    "invert": DRAWN | {"invert", "max_megapixels", "caption", "vary"},
    "image": {
        "image",
        "max_megapixels",
        "registers",
        "register",
        "style",
        "subject",
        "thing",
        "text_temperature",
        "top_p",
        "text_guidance_scale",
    },
    "question": {"image", "max_megapixels", "question", "text_temperature", "top_p"},
    "rewrite": {"rewrite", "register", "text_temperature", "top_p"},
}


def mode_of(args: argparse.Namespace) -> str:
    """The direction: a name in READ."""
    if args.question is not None:
        return "question"
    named = next((name for name in ("image", "rewrite", "complete", "interpolate", "invert") if getattr(args, name) is not None), "")
    return named or ("best_of" if args.best_of > 1 else "plain")


def where_of(mode: str) -> str:
    return "here" if mode == "plain" else f"with --{mode.replace('_', '-')}"


def vars_of(args: argparse.Namespace) -> dict[str, object]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def _part(text: str) -> str | tuple[float, ...]:
    if "," not in text:
        return text
    try:
        left, top, right, bottom = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not left,top,right,bottom: four numbers from 0 to 1") from None
    return left, top, right, bottom


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    console.run("sample.py", main)
