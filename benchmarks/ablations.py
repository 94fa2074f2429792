"""Ablations: one change at a time, with the same data, budget and measures, over several seeds.

    python benchmarks/ablations.py --base runs/mine --config configs/engraving-cpu.yaml --steps 600 --seeds 0 1 --out runs/ablations \
        data.train='shards/train-*.tar' data.val='shards/val-*.tar'
    python benchmarks/ablations.py … --only baseline dropout-0 adamw          a selection
    python benchmarks/ablations.py --out runs/ablations --table               the results so far

Generator ablations share the tokenizers and codes of the base run, which must have these three stages (ablations that change the codes make
their own). Tokenizer ablations train their own image tokenizer for --tokenizer-steps and are measured by reconstruction; with --through
they also train the generator. Each run is `train.py` with some settings changed, so a killed run resumes; finished results are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokun.utils import console

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))

SHARED = ("text_tokenizer", "image_tokenizer", "codes")
GENERATOR: dict[str, list[str]] = {
    "baseline": [],
    "dropout 0": ["generator.dropout=0.0"],
    "dropout 0.2": ["generator.dropout=0.2"],
    "weight decay 0.05": ["train.weight_decay=0.05"],
    "weight decay 0.8": ["train.weight_decay=0.8"],
    "no EMA": ["train.ema_decay=0.0"],
    "EMA 0.99": ["train.ema_decay=0.99"],
    "AdamW": ["train.optimizer=adamw"],
    "no tag dropout": ["train.tag_dropout=0.0"],
    "text weight 1/4": ["train.text_weight=0.25"],
    "text weight 4": ["train.text_weight=4.0"],
    "joint only": ["train.task_mix={joint: 1.0}"],
    "no codebook start": ["generator.codebook_start=false"],
    "word dropout 0.2": ["train.word_dropout=0.2"],
    "crops 1": ["codes.views=1"],
    "crops 10": ["codes.views=10"],
    "joint half": ["train.task_mix={joint: 0.5, text_to_image: 0.5}"],
    # a subject and its picture in raster order, without words; AdamW with the weight decay of its code (Sun et al. 2024)
    "LlamaGen": ["train.text_weight=0.0", "train.task_mix={joint: 1.0}", "train.optimizer=adamw", "train.weight_decay=0.05"],
}
VARIANT = {"LlamaGen": "pictures"}  # of benchmarks/variants.py
STEPS = {"LlamaGen": 1.45}  # factor on the steps, for equal processor time with its shorter sequences
TOKENIZER: dict[str, list[str]] = {
    "tokenizer baseline": [],
    "codebook 1024": ["image_tokenizer.codebook_size=1024"],
    "codebook 4096": ["image_tokenizer.codebook_size=4096"],
    "codebook 16384": ["image_tokenizer.codebook_size=16384"],
    "FSQ": ["image_tokenizer.quantizer=FSQ"],
    "LFQ": ["image_tokenizer.quantizer=LFQ"],
    "SimVQ": ["image_tokenizer.quantizer=SimVQ"],
    "f16": ["image_tokenizer.downsample=16", "image_tokenizer.stem=8"],
    "no perceptual": ["image_tokenizer_train.perceptual=none", "image_tokenizer_train.perceptual_weight=0.0"],
    "no line term": ["image_tokenizer_train.line_weight=0.0"],
    "GAN": ["image_tokenizer_train.gan_weight=0.3"],
    # Sun et al. 2024, section 2.1 and its code: no line term, no L1, no replacement of dead codes, K 16384 of 8 dimensions on the sphere,
    # commitment 0.25, hinge PatchGAN at 0.5. Different here: SqueezeNet for LPIPS, and a codebook by averages instead of gradients.
    "LlamaGen VQ": [
        "image_tokenizer.codebook_size=16384", "image_tokenizer.codebook_dim=8", "image_tokenizer.commitment_weight=0.25",
        "image_tokenizer.dead_code_threshold=0", "image_tokenizer_train.l1_weight=0.0", "image_tokenizer_train.mse_weight=1.0",
        "image_tokenizer_train.perceptual_weight=1.0", "image_tokenizer_train.line_weight=0.0", "image_tokenizer_train.gan_weight=0.5",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HOME / "configs" / "engraving-cpu.yaml")
    parser.add_argument("--base", type=Path, help="the run with the tokenizers and codes for the generator ablations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="names, with - for spaces; default: all generator ablations")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokenizer-steps", type=int, default=600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pairs", type=int, default=256, help="held-out pairs whose PMI is ranked")
    parser.add_argument("--through", action="store_true", help="tokenizer ablations also train the generator")
    parser.add_argument("--table", action="store_true", help="print the results so far and exit")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of all runs")
    args, overrides = _split_settings(parser.parse_args())
    if not args.table:
        known = {name.replace(" ", "-"): name for name in (*GENERATOR, *TOKENIZER)}
        wanted = [
            known[name] if name in known else sys.exit(f"ablations.py: {name!r} is not one of {', '.join(known)}")
            for name in args.only or map(lambda n: n.replace(" ", "-"), GENERATOR)
        ]
        for seed in args.seeds:
            for name in tqdm(wanted, desc=f"seed {seed}"):
                one(args, overrides, name, seed)
    print(table(args.out))


def _split_settings(args: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """Split the settings, which have an equals sign, from the names of --only."""
    named = args.only or []
    overrides = [*args.overrides, *(word for word in named if "=" in word)]
    args.only = [word for word in named if "=" not in word]
    return args, overrides


def one(args: argparse.Namespace, overrides: list[str], name: str, seed: int) -> None:
    """Train and measure, unless the result exists."""
    folder = args.out / f"{name.replace(' ', '-').replace('/', '_')}-{seed}"
    line = folder / "line.json"
    if line.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    is_generator = name in GENERATOR
    changed = GENERATOR[name] if is_generator else TOKENIZER[name]
    if is_generator:
        if args.base is None:
            sys.exit("ablations.py: --base is needed: the run whose tokenizers and codes are shared")
        own_codes = any(change.startswith("codes.") for change in changed)
        for part in SHARED[:2] if own_codes else SHARED:
            if not (folder / part).exists():
                shutil.copytree(args.base / part, folder / part, copy_function=os.link)
    steps = round(args.steps * STEPS.get(name, 1))
    budget = [
        f"train.steps={steps}",
        f"train.eval_every={steps}",
        f"train.sample_every={10 * steps}",
        "tracking.kind=none",
        f"out={folder}",
    ]
    budget += [f"train.seed={seed}"] if is_generator else [f"seed={seed}"]
    if not is_generator:
        budget += [f"image_tokenizer_train.{name}={value}" for name, value in _tokenizer_budget(args.tokenizer_steps).items()]
    script = ["benchmarks/variants.py", VARIANT[name]] if name in VARIANT else ["train.py"]
    command = [sys.executable, *script, "--config", str(args.config), *overrides, *budget, *changed]
    if not is_generator and not args.through:
        command = [sys.executable, "-c", TOKENIZER_ONLY, *command[2:]]
    before = os.times()
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, cwd=HOME, stdout=log, stderr=subprocess.STDOUT)
    spent = os.times()
    if done.returncode:
        print(f"ablations.py: {name!r} ended with {done.returncode}: see {folder / 'log.txt'}", file=sys.stderr)
        return
    seconds = spent.children_user + spent.children_system - before.children_user - before.children_system
    found = {"name": name, "seed": seed, "command": " ".join(command), "processor_minutes": seconds / 60}
    found |= measure(folder, args, overrides, is_generator or args.through, VARIANT.get(name, ""))
    line.write_text(json.dumps(found, indent=1) + "\n")


def _tokenizer_budget(steps: int) -> dict[str, float]:
    """Settings for a short training: the discriminator starts halfway, and a collapse counts as a result."""
    return {"steps": steps, "max_minutes": 0, "gan_start": steps // 2, "min_usage": 0, "min_perplexity": 0, "min_psnr": 0}


TOKENIZER_ONLY = (
    "import sys, train; from tokun.training.image_tokenizer import train_image_tokenizer; from tokun.training.run import open_run; config, "
    "_ = train.parse(sys.argv[1:]); train.draw_toy_pictures(config); "
    "run = open_run(config); train_image_tokenizer(run); run.close()"
)


def measure(folder: Path, args: argparse.Namespace, overrides: list[str], through: bool, variant: str = "") -> dict[str, float]:
    """Held-out figures of a finished run."""
    if not through:
        return json.loads((folder / "image_tokenizer" / "stage.json").read_text())["figures"] | reconstructions(folder, args, overrides)
    record = json.loads((folder / "checkpoint" / "training.json").read_text())
    if variant == "pictures":  # trained without words
        return {"image_loss": record["val"]["image_loss"]}
    return record["val"] | ranks(folder, args, overrides)


def reconstructions(folder: Path, args: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Reconstruction errors of held-out pictures, in lines and features."""
    import torch

    from tokun import data
    from tokun.config import load_config
    from tokun.evaluate import doctor
    from tokun.models.losses import SqueezeNetDistance
    from tokun.tokenizers.image import ImageTokenizer

    config, model = load_config(args.config, overrides), ImageTokenizer.load(folder / "image_tokenizer")
    m = model.config
    images = data.centre_crops(data.ImageSamples.open(config.data.val, image_size=m.image_size, channels=m.image_channels), args.pairs)
    with torch.inference_mode():
        made = torch.cat([model.decode(model.encode(part)) for part in images.split(64)])
        places = doctor.ssim(doctor.gradients(images), doctor.gradients(made))
        found = {"spectrum_error": float(doctor.spectrum_error(images, made).mean()), "gradients": float(places.mean())}
        if weights := config.image_tokenizer_train.perceptual_weights:
            distance = SqueezeNetDistance(weights)
            found["perceptual"] = sum(float(distance(x, y)) * len(x) for x, y in zip(images.split(64), made.split(64))) / len(images)
    return found


def ranks(folder: Path, args: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """For held-out pairs: PMI of picture and caption in nats, and how often the own caption ranks first of 16 by PMI."""
    import numpy as np

    import tokun
    from tokun.config import load_config
    from tokun.evaluate import coherence, figures
    from tokun.evaluate.held_out_pairs import read_pairs

    config = load_config(args.config, overrides)
    model = tokun.load(folder)
    keys = {name: getattr(config.data, name) for name in ("style_key", "subject_key", "caption_key")}
    pairs = read_pairs(model, config.data.val, args.pairs, **keys)
    others = coherence.rivals([tuple(pair.caption_ids) for pair in pairs], 0)[1]
    pmi = coherence.pmi_of(model, pairs, np.concatenate([np.arange(len(pairs))[:, None], others], 1))
    own = figures.mean("", pmi[:, 0])
    ahead = figures.mean("", pmi[:, 0] - pmi[:, 1:].mean(1))
    first = float((pmi[:, 0] > pmi[:, 1:].max(1)).mean())
    return {
        "pmi_first": first,
        "pmi_own": own.value,
        "pmi_low": own.low,
        "pmi_high": own.high,
        "pmi_ahead": ahead.value,
        "ahead_low": ahead.low,
        "ahead_high": ahead.high,
    }


SHOWN = {
    "psnr": "PSNR, dB", "perceptual": "perceptual", "spectrum_error": "fine lines, dB off", "gradients": "SSIM of gradients",
    "usage": "codes used", "perplexity": "perplexity",
    "image_loss": "nats an image token", "text_loss": "nats a text token", "pmi_own": "PMI, nats",
    "pmi_ahead": "PMI above others' captions", "pmi_first": "PMI first of 16",
    "processor_minutes": "processor minutes",
}  # fmt: skip


def table(out: Path) -> str:
    """A line for each change: mean over seeds, and the range if there are several."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*/line.json")):
        line = json.loads(path.read_text())
        lines.setdefault(line["name"], []).append(line)
    order = [name for name in (*GENERATOR, *TOKENIZER) if name in lines]
    keys = [key for key in SHOWN if any(key in line for name in order for line in lines[name])]
    rows = [["change", "seeds", *(SHOWN[key] for key in keys)]]
    rows += [[name, str(len(lines[name])), *(cell([line[key] for line in lines[name] if key in line]) for key in keys)] for name in order]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


if __name__ == "__main__":
    console.run("benchmarks/ablations.py", main)
