"""A finished run -> the checkpoint that ships with the package (bfloat16 generator, model card).

    python benchmarks/bundle.py runs/engraving-cpu --sources ../data/sources.tsv ../data/sources-128.tsv
    python benchmarks/bundle.py runs/engraving-cpu --sharpened runs/sharp --table report/table.md …

Refuses more than 48 MB of weights. `--sources`: tables with gutenberg_id, title and author, for the card. `--sharpened`: what tokun.sharpen made
of the run. `--table`: what tokun.evaluate measured of it. `--sheets`: the folders of tokun.evaluate whose sheets lie beside the card; without a run
they are laid beside the card that is there:

    python benchmarks/bundle.py --sheets report/doctor report
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokun
from tokun.config import from_dict
from tokun.inference.model import BUNDLED
from tokun.inference.model_card import model_card
from tokun.training.reconstruction import inspect_image_tokenizer
from tokun.training.shapes import held_out_pictures
from tokun.utils import checkpoint, console

LIMIT = 48 * 2**20
HEADING = "\n## Sheets"
ABOUT = (
    "The model that ships with tokun: engravings at 64 px with captions. From one seed it samples the picture's 8x8 codes and then the "
    "words for it, in one sequence. It was trained on two shared CPU cores to show the whole path on real data, not to win prizes."
)
SHARPENED = "Then the decoder alone, encoder and codebook standing still, {steps} steps of {recipe[batch_size]} pictures against a discriminator (tokun.sharpen)."
BEFORE = (
    "Its first weights were those of the bundled model before it: 3,773 steps of 32 sequences without word dropout, peak learning rate 0.0015, on 5 views of each picture; the decoder alone then 1,695 steps of "
    "32 pictures against a discriminator (tokun.sharpen). Both tokenizers are that model's."
)
LIMITS = """- A small, young model: some {hours} hours of training on shared CPU cores. Its pictures have grounds, masses, skylines and the texture of hatching, seldom a thing one can name.
- Words are drawn with text_guidance_scale 3, which keeps them closer to what the model sees in its picture, and with no_repeats: no word and no short phrase twice in a row.
- Its captions have the manner of the books' captions, and seldom describe what a person sees: of held-out pictures it finds the own caption among sixteen only about twice as often as chance
  would (the table's PMI lines). Captions of the training set it knows far better than others: the texts are half learnt by heart. Prompts steer little.
- 64 pixels and 64 codes a picture: fine lines are lost in the codes already.
- The books are of their time (sixteenth to early twentieth century): depictions and words that are demeaning by present standards,
  war and execution occur in the data and may show in samples.
- English captions only. Subject tags come from the subject of the book and are a rough guide."""
SHEETS = {  # of tokun.evaluate, and what they show
    "samples": "The first 64 of 256 samples of seed 1000, as they come, each with the caption of its own sequence",
    "nearest": "The samples that are nearest to a training picture (by SqueezeNet features), and what they are nearest to",
    "doctor": "Held-out pictures and their reconstructions: the best and the worst by PSNR",
}
EARLIER_SECONDS = 60 * (24 + 103 + 27)  # image tokenizer, generator, sharpening of the model before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--sources", type=Path, nargs="*", default=[])
    parser.add_argument("--sharpened", type=Path, help="a checkpoint of the run whose decoder has gone on")
    parser.add_argument("--table", type=Path, help="Markdown for the card")
    parser.add_argument("--sheets", type=Path, nargs="*", default=[], help="folders of tokun.evaluate")
    args = parser.parse_args()
    if args.run is None:
        if not args.sheets:
            parser.error("neither a run nor --sheets: there is nothing to bundle")
        return lay_sheets(args.sheets)
    model = tokun.load(args.sharpened or args.run, device="cpu")
    config = from_dict(yaml.safe_load((args.run / "config.yaml").read_text()))
    config.start = ""  # the recipe says it
    config.data.train, config.tracking.name = "engravings and engravings-128, train split", "tokun: engravings, 64 px"
    config.data.style, config.card.license = "engraving", "apache-2.0"
    record = checkpoint.read_record(args.run / "checkpoint" / "training.json")
    assert record is not None
    record["image_tokenizer"] |= inspect_image_tokenizer(
        model.image_tokenizer,
        held_out_pictures(from_dict(yaml.safe_load((args.run / "config.yaml").read_text()))),
        torch.device("cpu"),
    )[0]
    texts = {
        "about": ABOUT,
        "data": data_text(args.sources),
        "limits": LIMITS.format(hours=round((record["seconds"] + EARLIER_SECONDS) / 3600)),
        "recipe": BEFORE,
        "table": args.table.read_text() if args.table else "",
    }
    if args.sharpened:
        texts["recipe"] = SHARPENED.format(**json.loads((args.sharpened / "sharpened.json").read_text()))
    with checkpoint.whole_directory(BUNDLED) as folder:
        model.save(folder, dtype=torch.bfloat16, card=model_card(config, record, **texts))
        size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        if size > LIMIT:
            raise SystemExit(f"bundle.py: {size / 2**20:.1f} MB of weights; at most {LIMIT / 2**20:.0f} MB are bundled")
    lay_sheets(args.sheets)
    print(f"{BUNDLED}: {size / 2**20:.1f} MB of weights")


def lay_sheets(folders: list[Path]) -> None:
    """The sheets that these folders hold, in 16 greys, beside the card; the card's last section shows them."""
    shown = []
    for name, what in SHEETS.items():
        for source in (folder / f"{name}.png" for folder in folders if (folder / f"{name}.png").is_file()):
            (BUNDLED / "sheets").mkdir(exist_ok=True)
            Image.open(source).convert("L").quantize(16).save(BUNDLED / "sheets" / f"{name}.png", optimize=True)
            shown.append(f"{what}:\n\n![{name}](sheets/{name}.png)\n")
    card = (BUNDLED / "README.md").read_text(encoding="utf-8").partition(HEADING)[0].rstrip("\n") + "\n"
    (BUNDLED / "README.md").write_text(card + (HEADING + "\n\n" + "\n".join(shown) if shown else ""), encoding="utf-8")


def data_text(tables: list[Path]) -> str:
    books: dict[int, str] = {}
    for table in tables:
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                if row.get("split", "train") == "train":
                    books[int(row["gutenberg_id"])] = row["title"]
    text = (
        "17,568 engravings with their printed captions, out of illustrated books and magazines of the sixteenth to the early twentieth century "
        "as published by Project Gutenberg (public domain in the United States); nearly all are wood engravings of the nineteenth century. "
        "385 pairs from 16 other books were held out: the figures below are measured on them. "
        '"Project Gutenberg" is a registered trademark and is used only to name the source.'
    )
    if books:
        numbers = ", ".join(map(str, sorted(books)))
        text += f"\n\nThe {len(books)} training books by their Gutenberg numbers: {numbers}."
    return text


if __name__ == "__main__":
    console.run("benchmarks/bundle.py", main)
