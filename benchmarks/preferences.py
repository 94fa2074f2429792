"""Preferences from a model's own samples: what fits its words is preferred to what does not, by two measures that share no weights.

    python -m benchmarks.preferences draw --seed 20 --judge report/recognition.npz --descriptions 'train-*.tar' --out runs/c/20.jsonl
    python -m benchmarks.preferences draw --seed 31 --n 2048 --prompted …
    python -m benchmarks.preferences pair runs/c/*.jsonl --held-out 128 --out runs/preferred
    deepspeed train.py --config configs/dpo.yaml start=bundled dpo.pairs=runs/preferred/train.jsonl dpo.val=runs/preferred/held-out.jsonl …

`draw` samples a --checkpoint and scores each pair: `pmi_both` by --scorer, which stays the same from round to round, and how well an
ImageNet network recognises the own caption in the picture, among 2,000 descriptions (`--judge`, which `tokun evaluate --recognition
efficientnet-lite0 --train-shards …` leaves in its report's folder). The same command goes on where it was stopped.
`pair` adds the two scores, each divided by its standard deviation. Of the samples with one subject and grid the best third is preferred to
the worst, one to one; of the samples of one prompt, the best to the worst.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import tokun
from tokun.align import image_rewards, rollouts
from tokun.evaluate.features import LITE0, last_layer
from tokun.evaluate.held_out_pairs import read_captions
from tokun.evaluate.recognition import Judge
from tokun.inference import bulk, candidates, latents
from tokun.utils import checkpoint, console
from tokun.utils.errors import UserError

ROWS = 64  # drawn and scored together
POOL = 2000  # descriptions that the own caption is compared with
SCORES = ("pmi_both", "recognition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawn, paired = commands.add_parser("draw"), commands.add_parser("pair")
    drawn.add_argument("--checkpoint", default="bundled")
    drawn.add_argument("--scorer", default="bundled")
    drawn.add_argument("--judge", type=Path, required=True)
    drawn.add_argument("--network", default=LITE0, help="of the judge")
    drawn.add_argument("--descriptions", required=True, help="image shards: what is compared with, and the prompts of --prompted")
    drawn.add_argument("--prompted", action="store_true", help="draw descriptions, --each samples of each")
    drawn.add_argument("--each", type=int, default=4)
    drawn.add_argument("--seed", type=int, default=20)
    drawn.add_argument("--n", type=int, default=1536, help="samples")
    drawn.add_argument("--out", type=Path, required=True)
    paired.add_argument("files", type=Path, nargs="+")
    paired.add_argument("--held-out", type=int, default=128)
    paired.add_argument("--seed", type=int, default=0)
    paired.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(args) if args.command == "draw" else pair(args)


def draw(args: argparse.Namespace) -> None:
    if not 2 <= args.each <= ROWS or args.n < 1:
        raise UserError(f"--each is {args.each} and --n is {args.n}; --each must be from 2 to {ROWS}, --n at least 1")
    model, scorer = tokun.load(args.checkpoint, device="cpu"), tokun.load(args.scorer, device="cpu")
    with np.load(args.judge) as kept:
        judge, network = Judge.from_arrays(kept), last_layer(args.network, model.device, max(128, model.image_tokenizer.config.image_size))
    texts = np.random.default_rng(0).permutation(list(dict.fromkeys(read_captions(args.descriptions)))).tolist()
    short = [text for text in texts if len(model.text_tokenizer.encode(text)) <= model.vocabulary.max_text]
    each, how = args.each if args.prompted else 1, model.plan().how
    rows = ROWS // each * each  # whole groups
    asked = {"seed": args.seed, "each": each, "prompted": args.prompted, "network": network.name, **bulk.identity(model)}
    asked |= {"scorer": bulk.identity(scorer)["generator"], "judge": checkpoint.files_fingerprint([args.judge]), "descriptions": len(texts)}
    record = args.out.with_suffix(".json")
    if (there := checkpoint.read_record(record)) is not None:
        checkpoint.require_same(args.out, there, asked)
    elif args.out.is_file() and args.out.stat().st_size:
        raise UserError(f"{args.out} holds something else, since {record} is not there; name another file with --out, or delete it")
    written = args.out.read_text(encoding="utf-8").splitlines(keepends=True) if there is not None and args.out.is_file() else []
    whole = len([line for line in written if line.endswith("\n")])
    done = whole if whole >= args.n else whole // rows * rows  # scores depend on their batch, so a broken one is drawn again
    checkpoint.write_text(args.out, "".join(written[:done]))
    checkpoint.write_record(record, asked)
    with args.out.open("a", encoding="utf-8") as file, tqdm(total=args.n, initial=done, unit="sample", dynamic_ncols=True) as bar:
        for first in range(done, args.n, rows):
            indices = range(first, min(args.n, first + rows))
            u = model.uniforms(args.seed, indices)
            latents.share_tags(u, each)
            prompts = [short[i // each % len(short)] if args.prompted else None for i in indices]
            pairs = rollouts.pairs_of(model, u, args.seed, indices, prompts, how)
            recognised = recognition(judge, image_rewards.vectors(network, pairs), [pair.caption for pair in pairs], texts[:POOL])
            for one, both, own in zip(pairs, candidates.pmi_both(scorer, pairs), recognised.tolist(), strict=True):
                file.write(json.dumps({"sample": one.record(), "pmi_both": both, "recognition": own}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(pairs))


def recognition(judge: Judge, vectors: np.ndarray, captions: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """(n,): the judge's score of each picture (n, d) and its caption, in standard deviations above the mean of its scores of `texts`."""
    others = judge.scores(vectors, texts)
    own = np.concatenate([np.diag(judge.scores(vectors[i : i + ROWS], captions[i : i + ROWS])) for i in range(0, len(captions), ROWS)])
    return (own - others.mean(1)) / others.std(1)


def pair(args: argparse.Namespace) -> None:
    rng, lines = np.random.default_rng(args.seed), []
    for path in args.files:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not found:
            raise UserError(f"{path} holds no samples; leave it out, or draw some")
        scores = {name: np.array([one[name] for one in found]) for name in SCORES}
        total = sum(each / max(each.std(), 1e-9) for each in scores.values())
        groups = defaultdict(list)
        for i in np.argsort(total):
            groups[alike(found[i]["sample"])].append(found[i]["sample"])
        made = [chosen for key, group in sorted(groups.items()) for chosen in preferred(group, 1 if key[0] else len(group) // 3, rng)]
        measured = ", ".join(f"{name} {each.mean():.2f} ± {each.std():.2f}" for name, each in scores.items())
        print(f"{path}: {len(made)} preferences of {len(found)} samples; {measured}")
        lines += [json.dumps({"chosen": better, "rejected": worse}, ensure_ascii=False) + "\n" for better, worse in made]
    if not 0 <= args.held_out < len(lines):
        raise UserError(f"--held-out is {args.held_out} of {len(lines)} preferences; hold out fewer, or draw more samples")
    lines = [lines[i] for i in rng.permutation(len(lines))]
    checkpoint.write_text(args.out / "held-out.jsonl", "".join(lines[: args.held_out]))
    checkpoint.write_text(args.out / "train.jsonl", "".join(lines[args.held_out :]))
    print(f"{len(lines)} preferences in {args.out}, {args.held_out} of them held out")


def alike(sample: dict[str, Any]) -> tuple[str, str]:
    """What is compared: samples of one prompt, or without a prompt, of one subject and grid."""
    tags = sample["tags"]
    return (sample["caption"], "") if sample.get("prompted") else ("", f"{tags.get('subject')} {tags.get('grid')}")


def preferred(ranked: Sequence[Any], count: int, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    """The `count` last of `ranked`, each with one of the first, in random order."""
    if 0 < count <= len(ranked) // 2:
        yield from zip((ranked[-count:][i] for i in rng.permutation(count)), (ranked[i] for i in rng.permutation(count)))


if __name__ == "__main__":
    console.run("benchmarks/preferences.py", main)
