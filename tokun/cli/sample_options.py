"""Checkpoint and seed in, pairs out: pictures and the captions that describe them.

    tokun sample --seed 42 --n 16                                       the bundled engraving model
    tokun sample --checkpoint runs/tiny --seed 7 --n 4                  a model of your own (folder or Hub id)
    tokun sample --adapter runs/mine-lora --n 4                         the bundled model with an adapter (configs/lora.yaml)
    tokun sample --prompt "A ship in a storm" --n 4 --guidance-scale 3
    tokun sample --thing moth --aspect 4:3 --n 4                        by tags and shape, for a model that knows them
    tokun sample --image plate.png --registers plain,poetic             captions of a picture; with --question "…", an answer
    tokun sample --image scans/ --out drafts                            drafts for a folder: drafts/captions.csv, for prepare --captions
    tokun sample --rewrite "A ship." --register poetic                  a caption in another register
    tokun sample --complete torn.png --keep top --n 4                   complete a part of a picture
    tokun sample --interpolate 42 43 --steps 12 --video                 from one seed to another: a strip, a GIF and an MP4
    tokun sample --invert plate.png --caption "A ship." --vary 0.3      variations of a picture
    tokun sample --seed 42 --n 100000 --shard-size 1000 --out drawn/    WebDataset shards and a table; torchrun shares the work
    tokun sample --svg --max-bytes 10000                                vector drawings too
    tokun sample --n 4 --scale 4                                        pictures of four times the side; --scale-by nearest, lanczos or svg
    tokun sample --best-of 16 --n 4                                     of sixteen the one that fits its words best (1: single draws)
    tokun sample --best-of 8 --n 200 --pairs pairs.jsonl                best and worst of each eight, for training (configs/dpo.yaml)
    tokun sample --prompt "A ship" --svg --best-of 8 --reward svg       the one whose drawing is most like its picture
    tokun sample --best-of 8 --clip ViT-B-32:laion2b_s34b_b79k          by CLIP score instead (any open_clip model, or a folder)

Writes grid.png, one PNG per sample and samples.jsonl into --out (words.jsonl if only words are requested); with --complete and
--invert also sheet.png, the original beside what was made from it, with the cut between them. Pair k of seed s is
the same for every --n and --batch-size. Stopped or killed, it loses one batch; the same command goes on and ends with the same files.
"""

# the options of `tokun sample`, and which direction reads which; `--help` must be quick, so nothing here imports torch

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from tokun.config import SamplingOptions
from tokun.render.scale import METHODS
from tokun.render.svg import LEAST_BYTES
from tokun.utils import console, task_engine
from tokun.utils.console import home_path
from tokun.utils.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python sample.py", __doc__)
    for group in (add_places, add_wishes, add_forms, add_directions):
        group(parser)
    task_engine.add_options(parser, "a shard", "--checkpoint and --out")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked arguments. An option without effect is an error. With --help, the tags that the checkpoint knows are told, too."""
    parser = make_parser()
    arguments = sys.argv[1:] if argv is None else argv
    if "-h" in arguments or "--help" in arguments:
        parser.epilog = known_to(arguments)
    unset, defaults = object(), vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    given = [name for name in sorted(defaults) if getattr(args, name) is not unset]
    args = argparse.Namespace(**{**defaults, **{name: getattr(args, name) for name in given}})
    if mistake := mistake_in(args, given):
        parser.error(mistake)
    if args.n is None:
        args.n = 1 if args.image is not None or args.rewrite is not None else 16
    if shards_wanted(args) and (args.svg or args.wandb or args.scale > 1):
        parser.error(
            f"--{'svg' if args.svg else 'wandb' if args.wandb else 'scale'} has no effect on shards: "
            "leave it out, or leave out --shard-size"
        )
    return args


def known_to(arguments: Sequence[str]) -> str:
    """The tags, grids and tasks of the checkpoint among these arguments, for --help; why not, where it cannot be read.
    Nothing is downloaded."""
    from tokun.inference import description, folders

    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--checkpoint", default=None)
    places.add_argument("--adapter", default=None)
    named = places.parse_known_args(arguments)[0]
    asked = named.adapter or named.checkpoint
    try:
        if asked and not folders.is_local(asked):
            return f"tags, tasks and defaults of {asked}: tokun info {asked}"
        found = description.describe(asked)
    except (UserError, OSError) as error:
        return f"tags of {asked}: {error}"
    return "\n".join([f"{found.name} knows:", *(f"  {line}" for line in found.known())])


def mistake_in(args: argparse.Namespace, given: list[str]) -> str:
    """What is wrong with the arguments, "" if nothing. `given`: the names of those on the command line."""
    mode = mode_of(args)
    idle = [name for name in given if name not in READ[mode] | EVERYWHERE]
    shared = next((name for name in given if name in SHARED), "").replace("_", "-")
    chooses = next((name for name in CHOOSES if getattr(args, name)), "")
    small = f"--max-bytes {args.max_bytes} is too small: a picture takes at least {LEAST_BYTES} bytes"
    between = "--interpolate A B gives the seeds, --steps the number of pairs: leave out --seed and --n"
    mistakes = [
        (args.question is not None and args.image is None, "--question is about a picture: name it with --image"),
        (args.invert is not None and not args.caption.strip(), "--invert needs --caption: the latent decides picture and words"),
        (chooses and args.shard_size, f"--{chooses} needs several candidates, and shards hold single draws: leave out --shard-size"),
        *((getattr(args, name) and args.best_of == 1, told) for name, told in CHOOSES.items()),
        (args.reward and args.clip, "--clip MODEL is the same as --reward clip=MODEL: give one of them"),
        (args.video and not args.interpolate, "--video shows an interpolation: name its seeds with --interpolate"),
        (idle, f"--{''.join(idle[:1]).replace('_', '-')} has no effect {where_of(mode)}: leave it out"),
        (shared and args.shard_size is None, f"--{shared} shares shards among processes: add --shard-size 1000"),
        ("max_bytes" in given and not args.svg and not args.reward, "--max-bytes is the limit of an SVG: add --svg"),
        ("scale_by" in given and args.scale == 1, "--scale-by says how pictures are enlarged: say how much with --scale"),
        (args.svg and args.max_bytes < LEAST_BYTES, small),
        ("registers" in given and "register" in given, "--registers already names all registers: leave out --register"),
        (mode == "interpolate" and ("seed" in given or "n" in given), between),
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
    add("--batch-size", type=_positive, default=16, help="samples, or candidates, that are drawn at a time (%(default)s)")
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
        help="on a CPU: compute steps with a C++ program, built once per machine (default: if there is a compiler). Without it, an "
        "occasional sample differs",
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
    add(
        "--guidance-scale",
        type=float,
        default=None,
        help="how closely pictures follow their prompt or tags, also tags drawn by the seed; 1 is off",
    )
    add("--text-guidance-scale", type=float, default=None, help="how closely the words follow their picture; 1 is off")
    add(
        "--no-repeats",
        action="store_const",
        const=True,
        default=None,
        help="no word or short phrase twice in a row, nor a word repeated that training captions rarely repeat",
    )


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
    add(
        "--best-of",
        type=_positive,
        default=None,
        metavar="K",
        help="for each pair, the best of K candidates by the checkpoint's matching head (without one, or in a register other than "
        "plain: by PMI in both directions); 1: single draws. Default: what the checkpoint asks for (its best_of); for shards 1",
    )
    add(
        "--pairs",
        type=home_path,
        metavar="FILE",
        help="write the best and the worst of each pair's candidates, which then share their tags, as preferences (configs/dpo.yaml)",
    )
    add(
        "--reward",
        default="",
        metavar="KIND",
        help="choose by another score than the matching head (a checkpoint without one: pmi_both): pmi (words that only this picture "
        "explains), likelihood (what the model is sure of), mmi (midway between the two), svg (at --max-bytes), clip=MODEL, "
        "module:function … (tokun/align/rewards.py)",
    )
    add("--clip", metavar="MODEL", help="choose by CLIP score: hf-hub:ORG/NAME, a folder, or ARCHITECTURE:WEIGHTS of open_clip")
    add("--svg", action="store_true", help="also write each picture as SVG")
    add("--max-bytes", type=_positive, default=10_000, help="size limit of an SVG (%(default)s)")
    add(
        "--scale",
        type=_positive,
        default=1,
        metavar="N",
        help="N times the width and height of each picture, in files and grids (%(default)s)",
    )
    add(
        "--scale-by",
        choices=METHODS,
        default="lanczos",
        help="nearest: each pixel a square; lanczos: smooth; svg: drawn again from the traced drawing (%(default)s)",
    )
    add("--wandb", action="store_true", help="log the grid to Weights & Biases (offline without a key)")


def add_directions(parser: argparse.ArgumentParser) -> None:
    """Options for the other directions."""
    add = parser.add_argument
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--image", type=home_path, nargs="+", metavar="FILE", help="caption a picture, several, or those of a folder")
    one.add_argument("--rewrite", metavar="TEXT", help="rewrite a caption in the --register")
    one.add_argument("--complete", type=home_path, metavar="FILE", help="complete the part of a picture given by --keep")
    one.add_argument("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="from seed A's first single draw to seed B's in --steps")
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


CHOOSES = {
    "pairs": "--pairs writes the best and the worst of several candidates: say how many with --best-of, at least 2",
    **{name: f"--{name} chooses among several candidates: say how many with --best-of, at least 2" for name in ("clip", "reward")},
}  # options that need several candidates
MANY = 1000  # captions that are printed, and pairs that the other directions draw at a time
OPTIONS = {option.name for option in fields(SamplingOptions)}  # of `Tokun.sample`
EVERYWHERE = {"checkpoint", "adapter", "seed", "n", "out", "device", "dtype", "compile"}
DRAWN = {"style", "subject", "thing", "register", "temperature", "svg", "max_bytes", "scale", "scale_by", "wandb"}
PLAIN = DRAWN | OPTIONS
WORDS = {"text_temperature", "top_p"}
SHARED = {"workers", "engine", "ray_address", "gpus_per_task"}
READ = {  # the options that each direction reads
    "plain": PLAIN | SHARED | {"shard_size", "best_of", "clip", "reward", "pairs"},
    "best_of": PLAIN | {"best_of", "clip", "reward", "pairs"},
    "interpolate": PLAIN | {"interpolate", "steps", "video"},
    "complete": DRAWN | {"complete", "max_megapixels", "keep", "top_p"},
    "invert": DRAWN | {"invert", "max_megapixels", "caption", "vary"},
    "image": WORDS | {"image", "max_megapixels", "registers", "register", "style", "subject", "thing", "text_guidance_scale"},
    "question": WORDS | {"image", "max_megapixels", "question"},
    "rewrite": WORDS | {"rewrite", "register"},
}


def mode_of(args: argparse.Namespace) -> str:
    """The direction: a name in READ."""
    if args.question is not None:
        return "question"
    named = next((name for name in ("image", "rewrite", "complete", "interpolate", "invert") if getattr(args, name) is not None), "")
    return named or ("best_of" if (args.best_of or 1) > 1 else "plain")


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


def shards_wanted(args: argparse.Namespace) -> bool:
    return mode_of(args) == "plain" and args.shard_size is not None
