"""Checkpoint and seed in, pairs out: pictures and the captions that describe them.

    python sample.py --seed 42 --n 16                              the bundled engraving model
    python sample.py --checkpoint runs/tiny --seed 7 --n 4         a model of your own (folder or Hub id)
    python sample.py --prompt "A ship in a storm" --n 4 --guidance-scale 3

Writes grid.png, one PNG a sample and samples.jsonl into --out. Sample k of seed s is the same for every --n and
--batch-size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tokun import checkpoint, tracking
from tokun.grids import captioned_grid


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import torch  # after the arguments: --help and a typing error answer at once
    from tqdm import tqdm

    import tokun

    args.out.mkdir(parents=True, exist_ok=True)
    model = tokun.load(args.checkpoint, device=args.device, dtype=getattr(torch, args.dtype))
    pairs = []
    for first in tqdm(range(0, args.n, args.batch_size), desc="sampling", unit="batch", disable=args.n <= args.batch_size):
        pairs += model.sample(
            args.seed, indices=range(first, min(args.n, first + args.batch_size)), style=args.style, subject=args.subject,
            register=args.register, prompt=args.prompt, temperature=args.temperature, text_temperature=args.text_temperature,
            top_k=args.top_k, top_p=args.top_p, guidance_scale=args.guidance_scale, batch_size=args.batch_size,
        )  # fmt: skip
    for pair in pairs:
        pair.image.save(args.out / f"{pair.seed:06d}-{pair.index:02d}.png")
    lines = [json.dumps(pair.record(), ensure_ascii=False) for pair in pairs]
    checkpoint.write_text(args.out / "samples.jsonl", "\n".join(lines) + "\n")
    captions = [pair.caption for pair in pairs]
    grid = captioned_grid([pair.image for pair in pairs[:64]], captions[:64])
    grid.save(args.out / "grid.png")
    for pair in pairs:
        print(f"{pair.seed}-{pair.index:02d}  {pair.caption}")
    print(f"{len(pairs)} pairs in {args.out}: grid.png, PNGs, samples.jsonl")
    if args.wandb:
        tracker = tracking.make_tracker(
            "wandb",
            project="tokun",
            name=f"sample-{args.seed}",
            directory=args.out / "tracking" / f"seed-{args.seed}",
            config=vars_of(args),
        )
        tracker.log_grid("samples", grid, [pair.image for pair in pairs], captions, step=0)
        tracker.log({"samples/pmi": sum(pair.pmi for pair in pairs) / len(pairs)}, step=0)
        tracker.finish()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=None, help="a folder or a Hugging Face Hub id; default: the bundled engraving model")
    add("--seed", type=int, default=42)
    add("--n", type=_positive, default=16, help="how many samples of the seed")
    add("--out", type=Path, default=Path("outputs"))
    add("--batch-size", type=_positive, default=16)
    add("--device", default=None, help="cpu, cuda, cuda:1 …; default: a GPU if there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the generator; float32 is exactly reproducible on CPU",
    )
    add("--style", default="", help="a style tag, for example engraving")
    add("--subject", default="", help="a subject tag, for example architecture")
    add("--register", default="", help="the caption's register: plain, poetic, era, social, alt")
    add("--prompt", default="", help="a caption to draw")
    add("--temperature", type=float, default=None)
    add("--text-temperature", type=float, default=None)
    add("--top-k", type=int, default=None, help="for codes; 0 is off")
    add("--top-p", type=float, default=None)
    add("--guidance-scale", type=float, default=None, help="1 is off; needs a prompt or tags to be guided by")
    add("--wandb", action="store_true", help="log the grid to Weights & Biases (offline without a key)")
    return parser.parse_args(argv)


def vars_of(args: argparse.Namespace) -> dict[str, object]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TOKUN_TRACEBACK"):
            raise
        sys.exit(f"sample.py: {error}")
