"""Train the matching head of a checkpoint: it says how well a caption fits a picture, and so chooses the best of several candidates.

    tokun match --checkpoint runs/mine --train 'shards/train-*.tar' --val 'shards/val-*.tar' --out runs/mine-matched

The generator reads every training picture once, as it reads its own, and stays as it is. A small head then learns which caption belongs to
which picture (contrastively, as CLIP does; Radford et al. 2021). The new checkpoint is the old one with the head beside it.
Resumable: what a killed command has read is kept, and the same command goes on. One process.

A generator that went on from another one (`start=bundled`) can take that one's head with it (--start bundled), and needs fewer pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tokun import data
from tokun.data.shards import stamp_of
from tokun.evaluate import figures
from tokun.evaluate.held_out_pairs import read_pairs
from tokun.evaluate.recognition import CANDIDATES, firsts
from tokun.inference import bulk
from tokun.inference.folders import MATCHING, TEXT_TOKENIZER, resolve
from tokun.inference.load import load
from tokun.inference.matching import layers_of, picture_states
from tokun.inference.model import Tokun
from tokun.models.generator import depth_of
from tokun.models.kernels import has_bfloat16
from tokun.models.matching import MatchingConfig, MatchingHead
from tokun.tokenizers.text import text_tokenizer_at
from tokun.training import optim
from tokun.utils import checkpoint, console
from tokun.utils.console import home_path
from tokun.utils.errors import UserError
from tokun.utils.files import whole_file
from tokun.utils.lock import alone_in

LEAST = 200  # pairs that a head can be trained on
STEPS = 100  # at least
FURTHER = 0.3  # of the learning rate, for a head that goes on from another one
LIMITS = {"epochs": (1, math.inf), "batch_size": (2, math.inf), "lr": (1e-9, 1.0), "weight_decay": (0, math.inf), "dropout": (0, 1)}
READ = "read.json"  # the record of what was read


@dataclass(frozen=True)
class Recipe:
    epochs: int = 8  # at least: of few pictures as many as make a hundred steps
    batch_size: int = 512  # pairs that are told apart, at most: of few pictures a 32nd
    lr: float = 1e-3
    weight_decay: float = 1.0
    dropout: float = 0.6
    seed: int = 0


@dataclass(frozen=True)
class Read:
    """What the generator has read: states float32 (n, S), and the pictures' captions."""

    states: Tensor
    captions: list[list[int]]


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.align.matching", __doc__)
    add = parser.add_argument
    add("--checkpoint", default=None, help="a folder or a Hub id; default: the bundled model")
    add(
        "--start",
        default="",
        help=f"begin with the head of the checkpoint that --checkpoint went on from (bundled, a folder or a Hub id), at {FURTHER} of --lr",
    )
    add("--train", required=True, help="the image shards that it was trained on, as in data.train")
    add("--val", default="", help="held-out image shards: how often the own caption is the first of sixteen there")
    add("--out", type=home_path, required=True, help="folder of the new checkpoint")
    add("--caption-key", default="caption", help="the field with the caption in the shards' JSON (data.caption_key)")
    add("--device", default=None, help="cpu, cuda …; default: a GPU if there is one")
    for field in dataclasses.fields(Recipe):
        add(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default, help="%(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    for name, (least, below) in LIMITS.items():
        if not least <= (value := getattr(recipe, name)) < below:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least:g} and less than {below:g}")
    add_head(
        args.checkpoint, args.train, args.out, recipe,
        start=args.start, val=args.val, caption_key=args.caption_key, device=args.device,
    )  # fmt: skip


def add_head(
    source: str | Path | None,
    train: str,
    out: Path,
    recipe: Recipe,
    *,
    start: str | Path = "",
    val: str = "",
    caption_key: str = "caption",
    device: str | None = None,
) -> Path:
    """Train a head for the checkpoint `source` on image shards -> the checkpoint `out`, otherwise unchanged. It begins as the head of the
    checkpoint `start`, if one is named.

    Raises UserError for too few pairs or a `start` that does not fit, or whatever `tokun.load` raises.
    """
    folder, state = resolve(source), out.with_name(out.name + "-state")
    with alone_in(state, option="--out"):
        if out.exists():
            raise UserError(f"{out} already exists; name a new folder, or remove it")
        for shards in filter(None, (train, val)):
            data.expand_shards(shards)  # a pattern without shards is told at once
        model = load(folder, device=device, compile=False)
        first = head_to_start_with(start, model) if start else None
        asked = {**fingerprint(model), "layers": list(layers_of(depth_of(model.generator))), "caption_key": caption_key}
        if (there := checkpoint.read_record(state / READ)) is not None:
            checkpoint.require_same(state, there, asked, option="--out")
        checkpoint.write_record(state / READ, asked)
        seen = read(model, train, state, caption_key)
        if len(seen.captions) < LEAST:
            raise UserError(f"--train {train} holds {len(seen.captions)} usable pairs; a matching head needs at least {LEAST}")
        held_out = read(model, val, state, caption_key) if val else None
        if held_out and (different := len(set(map(tuple, held_out.captions)))) < CANDIDATES:
            raise UserError(f"--val {val} of {len(held_out.captions)} pictures has {different} different captions; {CANDIDATES} are needed")
        head = trained(model, seen, recipe, first)
        if held_out:
            tell(head, held_out)
        with checkpoint.whole_directory(out) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MATCHING))
            head.save(new / MATCHING)
        shutil.rmtree(state, ignore_errors=True)
    print(f"checkpoint with a matching head: {out}")
    return out


def head_to_start_with(start: str | Path, model: Tokun) -> MatchingHead:
    """The head of the checkpoint `start`, for a model that went on from it. Raises UserError if it has none, or reads other states or
    pieces than this model has."""
    folder = resolve(start)
    if not (folder / MATCHING).is_dir():
        raise UserError(f"--start {start} has no matching head: leave --start out, and the head learns from nothing")
    head, own = MatchingHead.load(folder / MATCHING), config_for(model)
    if head.config != own:
        raise UserError(f"--start {start}: its head reads {head.config}, this checkpoint needs {own}. Leave --start out")
    if text_tokenizer_at(folder / TEXT_TOKENIZER).fingerprint() != model.text_tokenizer.fingerprint():
        raise UserError(f"--start {start} cuts captions into other pieces than this checkpoint. Leave --start out")
    return head


def fingerprint(model: Tokun) -> dict[str, Any]:
    """What determines the states besides the pictures."""
    found = bulk.identity(model)
    return {name: found[name] for name in ("generator", "image_tokenizer")}


def read(model: Tokun, shards: str, folder: Path, caption_key: str = "caption") -> Read:
    """Every usable pair of image shards, read by the generator; each shard's states are kept in `folder`."""
    states, captions = [], []
    paths = data.expand_shards(shards)
    for path in tqdm(paths, desc="reading pictures", unit="shard", dynamic_ncols=True):
        kept = folder / f"{hashlib.sha256(stamp_of([path])).hexdigest()[:32]}.safetensors"
        if not kept.is_file():
            with whole_file(kept) as aside:
                save_file(_read_shard(model, path, caption_key), aside)
        found = load_file(kept)
        states.append(found["states"])
        captions += [ids.tolist() for ids in found["captions"].split(found["lengths"].tolist())]
    return Read(torch.cat(states), captions)


def _read_shard(model: Tokun, path: Path, caption_key: str) -> dict[str, Tensor]:
    """States float32 (n, S), all captions' pieces and their numbers, of the shard's usable pairs."""
    layers = layers_of(depth_of(model.generator))
    try:
        pairs = read_pairs(model, str(path), caption_key=caption_key)
    except UserError:  # no pair of it can be used
        width = 2 * len(layers) * model.generator.config.get_text_config().hidden_size
        return {"states": torch.zeros(0, width), "captions": torch.zeros(0, dtype=torch.long), "lengths": torch.zeros(0, dtype=torch.long)}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16(model.device)):  # a candidate's are read in full precision
        states = picture_states(model.generator, model.vocabulary, layers, [pair.codes for pair in pairs], [pair.tags for pair in pairs])
    ids = [torch.tensor(pair.caption_ids) for pair in pairs]
    if states.shape[1] != (width := 2 * len(layers) * config_for(model).width):
        raise UserError(f"the generator's layers {layers} give {states.shape[1]} numbers, not {width}: a head reads layers of one width")
    if not states.isfinite().all():
        raise UserError(f"{path}: the generator's hidden states are not finite numbers; its weights may be damaged, or need another dtype")
    return {"states": states, "captions": torch.cat(ids), "lengths": torch.tensor(list(map(len, ids)))}


def config_for(model: Tokun) -> MatchingConfig:
    """That of a new head."""
    width = model.generator.config.get_text_config().hidden_size
    return MatchingConfig(layers_of(depth_of(model.generator)), width, model.vocabulary.text_size)


def trained(model: Tokun, seen: Read, recipe: Recipe, start: MatchingHead | None = None) -> MatchingHead:
    """A head that tells the captions of these pictures apart, and begins as `start`."""
    torch.manual_seed(recipe.seed)
    n = len(seen.captions)
    head, lr = MatchingHead(config_for(model), recipe.dropout).to(model.device), recipe.lr
    if start is None:
        head.rarity.copy_(rarity_of(seen.captions, model.vocabulary.text_size))
    else:
        head.load_state_dict(start.state_dict())
        lr *= FURTHER
    head.mean.copy_(seen.states.mean(0))
    head.spread.copy_(seen.states.std(0) + 1e-6)
    batch = min(recipe.batch_size, max(32, n // 32), n)
    per_epoch = n // batch
    epochs = max(recipe.epochs, math.ceil(STEPS / per_epoch))
    steps, step = epochs * per_epoch, 0
    warmup = min(30, steps // 10)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=recipe.weight_decay)
    head.train()
    with tqdm(total=steps, desc="matching head", unit="step", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            for some in torch.randperm(n)[: per_epoch * batch].split(batch):
                optim.set_lr(optimizer, lr * min(1.0, (step + 1) / warmup) * (1 - step / steps))
                loss = head.loss(seen.states[some].to(model.device), head.bags([seen.captions[i] for i in some.tolist()]))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                bar.update(1)
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return head.eval()


def rarity_of(captions: Sequence[Sequence[int]], size: int) -> Tensor:
    """(size,): the log of how many captions there are for each with this piece; 0 for a piece of none."""
    counts = Counter(piece for ids in captions for piece in set(ids))
    return torch.tensor([np.log(len(captions) / counts[piece]) if counts[piece] else 0.0 for piece in range(size)], dtype=torch.float32)


def tell(head: MatchingHead, seen: Read) -> None:
    """Print how often the head puts the own caption of held-out pairs first of sixteen."""
    with torch.inference_mode():
        fit = head.fit(seen.states.to(head.mean.device), seen.captions).cpu().numpy()
    share = firsts(fit, [" ".join(map(str, ids)) for ids in seen.captions])
    told = figures.mean("", share)
    print(
        f"held out: the own caption is the first of {CANDIDATES} for {told.value:.1%} ({told.low:.1%} to {told.high:.1%}) of "
        f"{len(share)} pictures; chance {1 / CANDIDATES:.1%}"
    )


if __name__ == "__main__":
    console.run("tokun.align.matching", main)
