"""A checkpoint -> the one that ships with the package (float16 generator, model card).

    python benchmarks/bundle.py runs/mine --tokenizer-steps 16000 --tokenizer-hours 4.5 --steps 60000 --hours 30 \\
        --sharpened runs/sharp --sources data/sources.tsv data/sources-128.tsv data/sources-plates.tsv \\
        --table report/table.md --sheets report/doctor report

The checkpoint is a folder, or a run's folder; what its training.json does not say, or is not there to say, is said by `--steps` and the
like. The recipe of the card and the sampling defaults are those of `--config`, whose shapes must be the checkpoint's. `--sharpened`: what
tokun.sharpen made of a checkpoint with the same codes, whose image tokenizer is taken. `--sources`: tables with gutenberg_id, title, split,
for the card. `--table`: what tokun.evaluate measured. `--sheets`: folders of tokun.evaluate whose sheets lie beside the card; without a
checkpoint they are laid beside the card that is there.
Into the package it also draws docs/grid.png and docs/chosen.png; docs/demo.png is benchmarks/screenshot.py's.

Refuses more than 48 MB of weights, and a path of this machine in any file.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokun
from tokun.config import Config, load_config
from tokun.inference.folders import resolve
from tokun.inference.model import BUNDLED, IMAGE_TOKENIZER, Tokun
from tokun.inference.model_card import model_card
from tokun.render.grids import captioned_grid
from tokun.tokenizers.image import ImageTokenizer
from tokun.utils import checkpoint, console
from tokun.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 48 * 2**20
HEADING = "\n## Sheets"
NAME = "tokun: described prints, 128 px"
PICTURES = "27,948 prints and plates with descriptions"
ABOUT = (
    "The model that ships with tokun: prints and plates in nine shapes, 128 px wide and 64 to 192 high, with descriptions of what they "
    "show. From one seed it samples the "
    "picture's {fewest} to {most} codes and then the words for it, in one sequence. It writes captions in five registers, answers "
    "questions, rewrites captions and draws from a text. "
    "It was trained on two shared CPU cores to show the whole path on real data."
)
DATA = (
    "27,948 wood engravings, etchings, woodcuts, pen drawings and plates of single things, out of illustrated books and magazines of the "
    "sixteenth to the early twentieth century "
    "as published by Project Gutenberg (public domain in the United States). 882 others (382 prints of 16 other books, 500 plates of 5 "
    "other books) were held out: the figures below are measured on them. "
    "Each picture has a description of what is seen, one sentence of 5 to 16 words written by looking (the register `plain`), its kind (29 "
    "of them: the subject tag) and its main noun (the thing tag, "
    "where enough pictures share it). The printed caption is the register `era`; `alt` is made by rule from technique and description; "
    "some 3,300 pictures have `poetic` and `social` captions. "
    "Questions and answers are made from descriptions, kinds and tones (data_tools.questions). "
    '"Project Gutenberg" is a registered trademark and is used only to name the source.'
)
TOKENIZER = (
    "The image tokenizer before it: {steps} steps of {batch} pictures in {hours:g} hours on two CPU cores, peak learning rate {lr:g}, "
    "perceptual loss by SqueezeNet features."
)
SHARPENED = (
    "Then the decoder alone, encoder and codebook frozen: {steps:,} steps of {recipe[batch_size]} pictures against a "
    "discriminator (tokun.sharpen)."
)
ALIGNED = "From step {step:,} on aligned with SqueezeNet 1.1's features of the pictures (train.align_weight 1)."
VIEWS = (
    "Each picture in {views} views: whole, and crops that leave a tenth of a side away at most, half of them mirrored where no words speak "
    "of writing (left and right change places in the words)."
)
LIMITS = """- A small model ({parameters:.1f}M parameters), trained for {hours} hours on two shared CPU cores. Its pictures \
often show the kind of a thing (a bird's head, a shield, a church, a crowd, the sea), and seldom the very thing; faces, hands and crowded \
scenes stay vague.
- Its words name kinds, poses and settings as the descriptions do. Numbers, directions, species and small things are often wrong. \
The figures above say how often words and picture fit.
- `poetic` and `social` are learnt from some 3,300 pictures, `era` from printed captions, which often do not say what is seen. \
It knows the questions that data_tools.questions asks, and no others.
- It draws little of what a text asks for beyond the kind and the layout.
- Words are drawn with text_guidance_scale {guidance:g}, which keeps them closer to what the model sees in its picture{repeats}.
{choices}- A code stands for 8x8 pixels: lettering and the finest lines are lost in the codes already.
- The books are of their time (sixteenth to early twentieth century): depictions and words that are demeaning by present standards,
  war and execution occur in the data and may show in samples.
- English only. Technique is known for whole books; of plates it is not known and says `engraving`."""
CHOICES = (
    "- Figures and sheets here are of single draws. `sample.py`, `model(seed)` and the demo draw {best_of} candidates for each pair and\n"
    "  keep the one whose picture and words fit each other best, by {score}.\n"
)
REPEATS = (
    ", and with no_repeats: no word and no short phrase twice in a row, no word\n"
    "  at all twice that training captions hardly ever have twice"
)
SHEETS = {  # of tokun.evaluate, and what they show
    "samples": "The first 64 samples of seed 1000, single draws, each with the caption of its own sequence",
    "nearest": "The samples that are nearest to a training picture (by SqueezeNet features), and what they are nearest to",
    "doctor": "Held-out pictures and their reconstructions: the best and the worst by PSNR",
}
FOLDERS = re.compile(r"(?<![\w:/.*])/(?:[^\s/'\"`|]+/)+")
MACHINE = re.compile(r"(?<![\w:/.])/(?:root|home|Users|work|tmp|mnt|data)/\w")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.checkpoint is None:
        return lay_sheets(args.sheets, args.out)
    config = load_config(args.config)
    folder = resolve(args.checkpoint)
    model = tokun.load(folder, device="cpu")
    model.defaults = config.sampling
    require_shapes(model, config)
    sharpened = take_decoder(model, args.sharpened) if args.sharpened else None
    config.data.train, config.data.val, config.tracking.name, config.card.license = PICTURES, "held out", NAME, "apache-2.0"
    record = record_of(args, folder, model)
    card = model_card(config, record, **texts(args, config, record, model, sharpened))
    with checkpoint.whole_directory(args.out) as new:
        model.save(new, dtype=torch.float16, card=card)
        size = sum(p.stat().st_size for p in new.rglob("*.safetensors"))
        if size > LIMIT:
            raise SystemExit(f"bundle.py: {size / 2**20:.1f} MB of weights; at most {LIMIT / 2**20:.0f} MB are bundled")
        if found := machine_paths(new):
            raise SystemExit(f"bundle.py: a path of this machine stands in {', '.join(found)}")
    lay_sheets(args.sheets, args.out)
    print(f"{args.out}: {size / 2**20:.1f} MB of weights")
    if args.out == BUNDLED:
        bundled = tokun.load(device="cpu")
        chosen = bundled.best_of(42, 16, bundled.defaults.best_of)
        for name, pairs, more in (("chosen", chosen, ""), ("grid", bundled.sample(42, 16), " --best-of 1")):
            captioned_grid([pair.image for pair in pairs], [pair.caption for pair in pairs]).save(ROOT / "docs" / f"{name}.png")
            print(f"docs/{name}.png: what sample.py --seed 42 --n 16{more} draws")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="a checkpoint's folder, or a run's")
    add(
        "--config",
        default=str(ROOT / "configs" / "engraving-cpu.yaml"),
        help="its recipe (engraving-cpu)",
    )
    add("--steps", type=int, help="of the generator")
    add("--hours", type=float, help="of the generator")
    add("--tokenizer-steps", type=int, help="of the image tokenizer")
    add("--aligned-from", type=int, help="the step from which train.align_weight was 1 (never)")
    add("--tokenizer-hours", type=float, help="of the image tokenizer")
    add("--sharpened", type=Path, help="a checkpoint with the same codes whose decoder has gone on")
    add("--sources", type=Path, nargs="*", default=[], help="tables of the books")
    add("--table", type=Path, help="Markdown for the card")
    add("--sheets", type=Path, nargs="*", default=[], help="folders of tokun.evaluate")
    add("--out", type=Path, default=BUNDLED, help="the folder (the package's)")
    args = parser.parse_args(argv)
    if args.checkpoint is None and not args.sheets:
        parser.error("neither a checkpoint nor --sheets: there is nothing to bundle")
    if (args.tokenizer_steps is None) != (args.tokenizer_hours is None):
        parser.error("--tokenizer-steps and --tokenizer-hours belong together")
    return args


def require_shapes(model: Tokun, config: Config) -> None:
    """Raise UserError where the recipe is another model's."""
    t, g = config.image_tokenizer, model.generator.config.get_text_config()
    own = {
        "generator": (g.hidden_size, g.num_hidden_layers, g.num_attention_heads, g.num_key_value_heads),
        "image tokenizer": (
            model.image_tokenizer.config.image_size,
            model.image_tokenizer.codebook_size,
            list(model.image_tokenizer.config.channels),
        ),
        "grids": [f"{rows}x{columns}" for rows, columns in model.grids],
        "tasks": sorted(model.tasks),
    }
    c = config.generator
    asked = {
        "generator": (c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads),
        "image tokenizer": (t.image_size, t.codebook_size, list(t.channels)),
        "grids": config.data.grids or [f"{t.image_size // t.downsample}x{t.image_size // t.downsample}"],
        "tasks": sorted(config.train.task_mix),
    }
    for name in own:
        if own[name] != asked[name]:
            raise UserError(
                f"the checkpoint's {name} is {own[name]}, the recipe's {asked[name]}: name the config of its training with --config"
            )


def take_decoder(model: Tokun, folder: Path) -> dict[str, object]:
    """Give the model the image tokenizer of what tokun.sharpen made. Returns its record. Raises UserError where its codes are others."""
    record = checkpoint.read_record(folder / "sharpened.json")
    if record is None:
        raise UserError(f"{folder / 'sharpened.json'} is not there: --sharpened names what tokun.sharpen wrote")
    sharpened = ImageTokenizer.load(folder / IMAGE_TOKENIZER).eval()
    own, others = ({k: v for k, v in t.state_dict().items() if not k.startswith("decoder.")} for t in (model.image_tokenizer, sharpened))
    if own.keys() != others.keys() or not all(torch.equal(own[k], others[k]) for k in own):
        raise UserError(f"{folder} was sharpened from another image tokenizer than the checkpoint's")
    model.image_tokenizer = sharpened
    return record


def record_of(args: argparse.Namespace, folder: Path, model: Tokun) -> dict[str, Any]:
    """training.json of the checkpoint's folder, and over it what was said on the command line."""
    record = checkpoint.read_record(folder / "training.json") or {"image_tokenizer": {}, "val": None}
    if args.steps is not None:
        record["steps"] = args.steps
    if args.hours is not None:
        record["seconds"] = 3600 * args.hours
    if missing := [name for name, key in (("--steps", "steps"), ("--hours", "seconds")) if key not in record]:
        raise UserError(f"{folder / 'training.json'} is not there to tell how long the training was: give {' and '.join(missing)}")
    return record | {"parameters": sum(p.numel() for p in model.generator.parameters()), "settings": {"counts": {}}}


def texts(
    args: argparse.Namespace, config: Config, record: dict[str, Any], model: Tokun, sharpened: dict[str, object] | None
) -> dict[str, str]:
    """What the card says in words."""
    codes, t, d = sorted(rows * columns for rows, columns in model.grids), config.image_tokenizer_train, model.defaults
    recipe = [VIEWS.format(views=config.codes.views), *([ALIGNED.format(step=args.aligned_from)] if args.aligned_from else [])]
    if args.tokenizer_steps:
        recipe.append(TOKENIZER.format(steps=f"{args.tokenizer_steps:,}", batch=t.batch_size, hours=args.tokenizer_hours, lr=t.lr))
    if sharpened:
        recipe.append(SHARPENED.format(**sharpened))
    hours = record["seconds"] / 3600 + (args.tokenizer_hours or 0) + (sharpened["seconds"] / 3600 if sharpened else 0)
    return {
        "about": ABOUT.format(fewest=codes[0], most=codes[-1]),
        "data": DATA + books_text(args.sources),
        "limits": LIMITS.format(
            parameters=record["parameters"] / 1e6,
            hours=round(hours),
            guidance=d.text_guidance_scale,
            repeats=REPEATS if d.no_repeats else "",
            choices=CHOICES.format(best_of=d.best_of, score="its matching head" if model.matching else "PMI in both directions")
            if d.best_of > 1
            else "",
        ),
        "recipe": "\n- ".join(recipe),
        "table": without_folders(args.table.read_text(encoding="utf-8")) if args.table else "",
    }


def without_folders(text: str) -> str:
    """The same with the last part alone of every absolute path: the command above a table names where things lie on this machine."""
    return FOLDERS.sub("", text)


def machine_paths(folder: Path) -> list[str]:
    """Names of the text files that hold an absolute path."""
    files = [p for p in folder.rglob("*") if p.suffix in (".json", ".md")]
    return sorted(p.name for p in files if MACHINE.search(p.read_text(encoding="utf-8")))


def lay_sheets(folders: list[Path], out: Path) -> None:
    """The sheets that these folders hold, in 16 greys, beside the card. The card's last section shows all that lie there."""
    shown = []
    for name, what in SHEETS.items():
        target = out / "sheets" / f"{name}.png"
        for source in (folder / f"{name}.png" for folder in folders if (folder / f"{name}.png").is_file()):
            target.parent.mkdir(exist_ok=True)
            Image.open(source).convert("L").quantize(16).save(target, optimize=True)
        if target.is_file():
            shown.append(f"{what}:\n\n![{name}](sheets/{name}.png)\n")
    card = (out / "README.md").read_text(encoding="utf-8").partition(HEADING)[0].rstrip("\n") + "\n"
    (out / "README.md").write_text(card + (HEADING + "\n\n" + "\n".join(shown) if shown else ""), encoding="utf-8")


def books_text(tables: list[Path]) -> str:
    """The numbers of the training books of all tables; "" without tables."""
    books: set[int] = set()
    for table in tables:
        with table.open(encoding="utf-8", newline="") as file:
            books |= {int(row["gutenberg_id"]) for row in csv.DictReader(file, delimiter="\t") if row.get("split", "train") == "train"}
    return f"\n\nThe {len(books)} training books by their Gutenberg numbers: {', '.join(map(str, sorted(books)))}." if books else ""


if __name__ == "__main__":
    console.run("benchmarks/bundle.py", main)
