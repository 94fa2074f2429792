"""A judge of coherence that shares no weights with tokun's models: a small CLIP, trained here on the train split.

    python benchmarks/clip_judge.py --train 'engravings/train-*.tar' --val engravings/val-00000.tar --out runs/clip_judge --minutes 60
    … --descriptions descriptions.tsv --size 128     raw shards with a table of descriptions

Stock open_clip: a ResNet of 1.4M parameters on 64 px, two text layers of width 128 over CLIP's byte pairs (8.2M in total, 6.3M
of them embeddings). Pictures are decoded once and kept as uint8. Each batch is augmented by cropping, tone and blur, since the
pictures to judge have gone through an image tokenizer; nothing is mirrored, because of lettering. The state is written every two
minutes and at the end, and the same command resumes with the rest of --minutes. Prints how often the held-out
captions and pictures find each other, and writes a folder for open_clip ("local-dir:…") and
`python -m tokun.evaluate --judge …`.

One core of a Xeon with AMX: about 300 pairs a second of CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokun import data
from tokun.evaluate import coherence, figures, recognition
from tokun.evaluate.figures import Figure
from tokun.evaluate.held_out_pairs import Table, described, read_table, squares
from tokun.inference.clip import Clip
from tokun.utils import console
from tokun.utils.errors import UserError
from tokun.utils.optional_packages import need

SIZE = 64  # input side of the network in pixels
CROP = 8 / 9  # least side of a crop, as a share of the stored side
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
MEAN, STD = 0.7, 0.3  # roughly those of ink on paper
PREPROCESS: dict[str, Any] = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
SAVE_EVERY = 120  # seconds


def config_of(size: int) -> dict[str, Any]:
    """CONFIG for pictures of `size` px."""
    return CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": size}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="image shards: a path, a glob, or several separated by commas")
    parser.add_argument("--val", required=True, help="held-out image shards")
    parser.add_argument(
        "--descriptions", type=Path, default=None, help="a table with folder, key, description; default: the shards' plain captions"
    )
    parser.add_argument("--size", type=int, default=SIZE, help="input side of the network in pixels, a multiple of 32 (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/clip_judge"))
    parser.add_argument("--minutes", type=float, default=60.0, help="total training time over all runs in this folder (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.size < 32 or args.size % 32:
        parser.error(f"--size is {args.size}; it must be a multiple of 32")
    table = read_table(args.descriptions) if args.descriptions else None
    train(args, table)
    pictures, captions = read(args.val, args.size, table)
    for figure in retrieval(Clip(str(args.out)), pictures, captions, args.seed):
        print(f"{figure.name:44s} {figure.value:7.1%}  [{figure.low:.1%}, {figure.high:.1%}]  n {figure.n}  {figure.note}")


def read(pattern: str, size: int, table: Table | None = None) -> tuple[Tensor, list[str]]:
    """Centred squares uint8 (n, 1, size, size) and their plain captions, or those of `table`, without damaged and wordless pairs."""
    pairs = [(np.asarray(picture)[None], text) for _, picture, text in described(pattern, squares(size), table=table)]
    if not pairs:
        raise UserError(f"no pair of {pattern} can be used: pairs need a readable picture and a caption")
    return torch.from_numpy(np.stack([picture for picture, _ in pairs])), [text for _, text in pairs]


# --- training -------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, table: Table | None = None) -> None:
    """Train until --minutes are spent, and write the folder. Resumes from an existing state."""
    open_clip = need("open_clip", extra="clip")
    torch.manual_seed(args.seed)
    model = open_clip.CLIP(**config_of(args.size)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    step, spent = resume(args.out, model, optimizer)
    if spent < args.minutes * 60:
        pictures, captions = read(args.train, round(args.size / CROP), table)
        texts = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])(captions)
        print(f"{len(texts):,} pairs, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, from step {step}", flush=True)
        step, spent = fit(args, model, optimizer, pictures, texts, step, spent)
        save(args.out, model, optimizer, step, spent)


def fit(
    args: argparse.Namespace, model: Any, optimizer: torch.optim.Optimizer, pictures: Tensor, texts: Tensor, step: int, spent: float
) -> tuple[int, float]:
    """Train until the time is over; returns (steps, seconds). The learning rate decays as a cosine of the time spent."""
    loss_of, limit = need("open_clip", extra="clip").ClipLoss(), args.minutes * 60
    started, saved = time.monotonic() - spent, spent
    while spent < limit:
        step += 1
        rate = args.lr * min(1.0, step / 50) * (0.01 + 0.99 * math.cos(math.pi / 2 * spent / limit) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows, generator = batch_rows(len(texts), args.batch_size, step, args.seed)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.encode_image(augment(pictures[rows], generator, args.size), normalize=True)
            read = model.encode_text(texts[rows], normalize=True)
        loss = loss_of(seen.float(), read.float(), model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        spent = time.monotonic() - started
        if step % 20 == 0:
            print(
                f"step {step} loss {loss.item():.3f} (chance {math.log(args.batch_size):.3f}), {spent:.0f} s, "
                f"{time.process_time():.0f} s of CPU",
                flush=True,
            )
        if spent - saved >= SAVE_EVERY:
            save(args.out, model, optimizer, step, spent)
            saved = spent
    return step, spent


def batch_rows(n: int, batch_size: int, step: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """Rows of step 1, 2, …, and the batch's generator. Each epoch has its own order, determined by seed and step."""
    order, at = data.Order(n, seed), (step - 1) * batch_size
    rows = torch.tensor([order[position] for position in range(at, at + batch_size)])
    return rows, torch.Generator().manual_seed(seed * 1_000_003 + step)


def augment(pictures: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """uint8 (B, 1, S, S) -> float (B, 3, size, size), normalised like the preprocessing; each randomly cropped, toned and blurred."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pictures), 1, 1, 1, generator=generator)

    side = uniform(CROP, 1.0)  # of the crop, relative to the stored side
    shift = torch.cat([(1 - side) * uniform(-1, 1), (1 - side) * uniform(-1, 1)], 2)[..., 0]  # (B, 1, 2)
    turn = torch.eye(2) * side[:, 0]  # (B, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift.transpose(1, 2)], 2), [len(pictures), 1, size, size], align_corners=False)
    cut = F.grid_sample(pictures.float() / 255, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(cut, (1, 1, 1, 1), mode="replicate"), 3, 1)
    toned = (torch.lerp(cut, blurred, uniform(0, 1)) - 0.5) * uniform(0.8, 1.1) + 0.5 + uniform(-0.1, 0.1)
    return ((toned - MEAN) / STD).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


# --- files ----------------------------------------------------------------------------------------------------------


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, spent: float) -> None:
    """Write the folder for open_clip, and `state.pt` for resuming; each file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    size = model.visual.image_size
    config = {"model_cfg": config_of(size), "preprocess_cfg": {"size": [size, size], **PREPROCESS}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "weights.part")
    os.replace(folder / "weights.part", folder / "open_clip_model.safetensors")
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, folder / "state.part")
    os.replace(folder / "state.part", folder / "state.pt")


def resume(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load the weights and the optimizer; returns (steps, seconds) so far."""
    if not (folder / "state.pt").is_file():
        return 0, 0.0
    state = torch.load(folder / "state.pt", weights_only=True)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(f"{folder} holds a judge with another --size: name another --out") from error
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["spent"]


# --- accuracy ---------------------------------------------------------------------------------------------------------


def retrieval(clip: Clip, pictures: Tensor, captions: list[str], seed: int) -> list[Figure]:
    """How often held-out pictures and captions find each other."""
    images = [Image.fromarray(picture[0].numpy()) for picture in pictures]
    scores = clip.similarities(images, captions)
    share = recognition.firsts(scores, captions).tolist() if len(set(captions)) >= recognition.CANDIDATES + 1 else []
    note = "over all draws of rivals; chance 6.2%"
    own = [figures.mean("judge finds the own caption first of 16", share, better="more", note=note, seed=seed)] if share else []
    return own + coherence.ranking_figures("judge", "held-out", scores, captions, seed)


if __name__ == "__main__":
    console.run("benchmarks/clip_judge.py", main)
