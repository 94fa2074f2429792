"""Checkpoint and seed in, pairs out, with vLLM.

    tokun serve --checkpoint runs/engraving --seed 42 --n 10000 --out outputs/

Writes KEY.png, samples.jsonl and grid.png, each batch of 256 as it is drawn: after a kill, run the same command again to resume.
Sample k of seed s has the same noise as in `sample.py`. Its tokens are the same unless rounding differences between vLLM's kernels and
ours change a choice, so use sample.py if every token counts. No guidance, no likelihoods.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from tokun.inference import bulk, picture_files
from tokun.inference.folders import GENERATOR, resolve
from tokun.inference.load import load
from tokun.inference.model import Pair, SamplingPlan, Tokun
from tokun.tokenizers import sequences
from tokun.utils import console
from tokun.utils.console import home_path
from tokun.utils.lock import alone_in
from tokun.utils.optional_packages import need

PROCESSOR = "tokun.serving.processor:SpanProcessor"
BATCH = 256  # samples passed to vLLM at once; vLLM batches them as its memory allows
LIKELIHOODS = ("image_nll", "caption_nll", "pmi")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    model = load(args.checkpoint, device="cpu")  # for tokenizers and tags; vLLM loads the generator itself
    if model.defaults.text_guidance_scale != 1:
        print(
            "serving: the checkpoint's text_guidance_scale is ignored, because it needs two streams per request; "
            "captions of sample.py fit their pictures better",
            file=sys.stderr,
        )
    engine = open_engine(resolve(args.checkpoint) / GENERATOR, args.dtype)
    plan = model.plan(style=args.style, subject=args.subject, thing=args.thing, register=args.register, aspect=args.aspect)
    wishes = {name: getattr(args, name) for name in ("seed", "style", "subject", "thing", "register", "aspect", "dtype")}
    several = bulk.identity(model) if args.n > BATCH else {}  # one batch is never resumed
    with alone_in(args.out, option="--out"):
        asked = {"engine": "vllm", **wishes, **several}
        picture_files.write(lambda numbers: draw(model, engine, args.seed, numbers, plan), args.n, args.out, asked, batch_size=BATCH)
    print(f"{args.n} pairs in {args.out}: PNGs, samples.jsonl, grid.png")


def open_engine(generator: Path, dtype: str) -> Any:
    """vLLM's LLM with our processor, which needs the V1 model runner. Each step waits for the ids of the previous one."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    vllm = need("vllm", extra="serve")
    return vllm.LLM(model=str(generator), dtype=dtype, logits_processors=[PROCESSOR], async_scheduling=False)


class Drawn(Pair):
    """A pair without likelihoods, which vLLM does not compute."""

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in super().record().items() if name not in LIKELIHOODS}


def draw(model: Tokun, engine: Any, seed: int, numbers: range, plan: SamplingPlan) -> list[Pair]:
    """The samples of the seed with these numbers."""
    vllm, v = need("vllm", extra="serve"), model.vocabulary
    tags = model.tags_of(model.uniforms(seed, numbers), plan)
    prompts = [{"prompt_token_ids": sequences.image_prompt(v, t)} for t in tags]
    how = {"temperature": 1.0, "max_tokens": sequences.longest_from(v, 0, v.max_codes), "detokenize": False}
    asked = [vllm.SamplingParams(**how, extra_args={"tokun_seed": seed, "tokun_index": k}) for k in numbers]
    pairs: list[Pair] = []
    for k, t, prompt, done in zip(numbers, tags, prompts, engine.generate(prompts, asked)):
        codes, caption = sequences.unpack_pair(v, [*prompt["prompt_token_ids"], *done.outputs[0].token_ids])
        image, unknown = model.decode_images([codes], [t.grid or v.default_grid])[0], dict.fromkeys(LIKELIHOODS, math.nan)
        pairs.append(Drawn(image, model.text_tokenizer.decode(caption), seed, k, t, codes, caption, **unknown))
    return pairs


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m tokun.serving", __doc__)
    add = parser.add_argument
    add("--checkpoint", default=None, help="a folder or a Hugging Face Hub id; default: the bundled engraving model")
    add("--seed", type=int, default=42, help="seed of the latents")
    add("--n", type=int, default=16, help="number of samples")
    add("--out", type=home_path, default=Path("outputs"), help="the output folder")
    add("--dtype", default="auto", help="vLLM's dtype: auto, bfloat16, float16, float32")
    add("--style", default="", help="a style tag, for example engraving")
    add("--subject", default="", help="a subject tag")
    add("--thing", default="", help="a thing tag, the main noun, for example moth")
    add("--register", default="", help="of the captions: plain, poetic, era, social, alt")
    add("--aspect", default="", help="as in sample.py: 4:3, wide, tall, square, or a grid")
    return parser


if __name__ == "__main__":
    console.run("tokun.serving", main)
