"""Sampling speed: ours, Hugging Face's `generate` and the machine's bound, in turns in one run.

    python benchmarks/sample.py                                     the bundled model, and shapes of 120M and 350M parameters
    python benchmarks/sample.py --shapes bundled --batch 16 --rounds 5 --no-compile
    python benchmarks/sample.py --device cuda --batch 1 16 64 --dtypes bfloat16

Both make complete pairs: the picture's codes, then words until each row ends. Both choose among the same legal ids (ours in its loop,
`generate` through a logits processor with the same table), at the same temperature and top_p. Counted are the generated ids, without the
prompt and the padding. The models of 120M and 350M parameters have random weights and 16x16 codes (configs/ladder). `static`: with
`generate`'s static cache.

The bound is a lower limit on the time of any loop over single ids on this machine: for the prompt and every later step, the larger of
(bytes of the weights and of the cache so far) over the measured bandwidth, and operations over the measured rate of a large matrix product,
in our dtype and number of rows. Both are measured again in every round, the best of ten tries each, since the speed of a shared machine
varies. The bandwidth is that of reading 512 MiB; weights that stay in a processor's last-level cache, as a small model's may, can beat the
bound.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokun
from tokun.config import load_config
from tokun.inference import decoder, latents, sampling
from tokun.inference.token_choice import Choice, Constraints, DecodingSettings
from tokun.models.generator import make_generator
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags, Vocabulary
from tokun.utils import console
from tokun.utils.memory import keep_memory

LADDER = Path(__file__).resolve().parent.parent / "configs" / "ladder"
CHOICE = Choice(1.0, 0, 0.95)
REPEATS = 5  # repetitions of ours in each round, as it takes a small part of its time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["bundled", "120m", "350m"], choices=["bundled", "120m", "350m"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codes", type=int, default=0, help="codes per picture of the random models, if 256 take too long")
    parser.add_argument("--words", type=int, default=0, help="longest caption of the random models, in pieces")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ours with the C++ program, on a CPU; its build time is reported separately and not included in the rates",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep_memory()
    device, lines = torch.device(args.device), []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
    for dtype in args.dtypes:
        for shape in args.shapes:
            model, vocabulary = models(shape, args.codes, args.words)
            model = model.to(device, getattr(torch, dtype)).eval()
            start, used = time.perf_counter(), processor_seconds()
            if decoder.compile_steps(model, args.compile):
                print(
                    f"{shape:>8} {dtype:>9} compiled in {time.perf_counter() - start:.0f} s, "
                    f"{processor_seconds() - used:.0f} s of processor time",
                    flush=True,
                )
            for batch in args.batch:
                lines.append(
                    {
                        "shape": shape,
                        "dtype": dtype,
                        "batch": batch,
                        "compiled": decoder.is_compiled(model),
                        **compare(model, vocabulary, batch, args.rounds),
                    }
                )
                print(row(lines[-1]), flush=True)
            del model
            gc.collect()
    if args.out:
        args.out.write_text(json.dumps(lines, indent=1) + "\n")


def processor_seconds() -> float:
    """Processor time of this process and its finished children (the compiler)."""
    return sum(getattr(os.times(), name) for name in ("user", "system", "children_user", "children_system"))


def models(shape: str, codes: int, words: int) -> tuple[Any, Vocabulary]:
    """The bundled generator, or one of the ladder's size with random weights."""
    if shape == "bundled":
        model = tokun.load()
        return model.generator, model.vocabulary
    config = load_config(LADDER / f"{shape}.yaml", [])
    side = int((codes or 256) ** 0.5)
    vocabulary = Vocabulary(
        text_size=config.text_tokenizer.vocab_size, codebook_size=config.image_tokenizer.codebook_size,
        styles=("engraving",), subjects=("scenery",), grids=((side, side),), max_text=words or 64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = make_generator(
        config.generator,
        vocab_size=vocabulary.size,
        max_length=1024,
        pad=vocabulary.id("<pad>"),
        bos=vocabulary.id("<bos>"),
        eos=vocabulary.id("<eos>"),
    )
    return model, vocabulary


def compare(model: Any, vocabulary: Vocabulary, batch: int, rounds: int) -> dict[str, float]:
    """Ids per second of each way, medians over rounds in turns."""
    ways: dict[str, Callable[[int], Tensor]] = {
        "ours": lambda seed: ours(model, vocabulary, batch, seed),
        "dynamic": lambda seed: theirs(model, vocabulary, batch, seed, None),
        "static": lambda seed: theirs(model, vocabulary, batch, seed, "static"),
    }
    for way in ways.values():
        way(10_000)  # warm up
    rates: dict[str, list[float]] = {name: [] for name in ways}
    shares, limits = [], []
    for seed in range(rounds):
        limits.append(machine(model.device, model.dtype))
        for name, way in ways.items():
            found = []
            for again in range(REPEATS if name == "ours" else 1):
                start = time.perf_counter()
                ids = way(seed * REPEATS + again)
                if ids.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                found.append((int((ids != vocabulary.id("<pad>")).sum()) - batch * prompt(vocabulary, batch).shape[1]) / seconds)
                if name == "ours":
                    shares.append(least_seconds(model, vocabulary, ids, limits[-1]) / seconds)
            rates[name].append(statistics.median(found))
    best = [max(a, b) for a, b in zip(rates["dynamic"], rates["static"])]
    return {
        **{name: statistics.median(found) for name, found in rates.items()},
        "times": statistics.median(a / b for a, b in zip(rates["ours"], best)),
        "bound": statistics.median(shares),
        **{name: statistics.median(found[name] for found in limits) for name in limits[0]},
    }


def shape_of(vocabulary: Vocabulary) -> tuple[int, int]:
    """The grid of what is drawn: of several, the middle one by its number of codes."""
    return sorted(vocabulary.grids, key=math.prod)[len(vocabulary.grids) // 2]


def prompt(vocabulary: Vocabulary, batch: int) -> Tensor:
    style = vocabulary.styles[0]
    ids = sequences.image_prompt(vocabulary, Tags(style, "", "plain", shape_of(vocabulary)))
    return torch.tensor([ids] * batch)


def ours(model: Any, vocabulary: Vocabulary, batch: int, seed: int) -> Tensor:
    rows, columns = shape_of(vocabulary)
    slots = latents.Slots(rows * columns, vocabulary.max_text)
    u = latents.uniform(latents.draw(seed, range(batch), slots.size)).to(model.device)
    rules = sampling.Rules(vocabulary, slots, DecodingSettings(CHOICE, CHOICE), Constraints((vocabulary.id("<boq>"),)))
    return sampling.generate(model, rules, prompt(vocabulary, batch).to(model.device), u).ids


@torch.inference_mode()
def theirs(model: Any, vocabulary: Vocabulary, batch: int, seed: int, cache: str | None) -> Tensor:
    """`generate` with the same legal ids, until all rows have ended."""
    torch.manual_seed(seed)
    rows, columns = shape_of(vocabulary)
    given = prompt(vocabulary, batch).to(model.device)
    settings = {} if cache is None else {"cache_implementation": cache}
    return model.generate(
        given, do_sample=True, temperature=CHOICE.temperature, top_k=0, top_p=CHOICE.top_p, logits_processor=[Legal(vocabulary, given)],
        max_new_tokens=rows * columns + vocabulary.max_text + 4, pad_token_id=vocabulary.id("<pad>"), eos_token_id=vocabulary.id("<eos>"),
        **settings,
    )  # fmt: skip


class Legal:
    """A logits processor that allows the grammar's legal ids, from the same table as our loop."""

    def __init__(self, vocabulary: Vocabulary, given: Tensor):
        rows, columns = shape_of(vocabulary)
        self.size, self.n_codes, self.read = vocabulary.size, rows * columns, 0
        self.grammar = vocabulary.grammar.on(given.device)
        self.table = self.grammar.chosen_from((vocabulary.id("<boq>"),), (), vocabulary.size)[1]
        self.states = torch.zeros(len(given), dtype=torch.long, device=given.device)
        self.lengths = torch.zeros_like(self.states)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for ids in input_ids.T[self.read :]:
            self.states, self.lengths = self.grammar.advance(self.states, self.lengths, ids)
        self.read = input_ids.shape[1]
        case = self.grammar.case(self.states, self.lengths, self.grammar.limit(self.states, self.n_codes))
        return scores[:, : self.size].masked_fill(~self.table[case], -torch.inf)


# --- the machine's bound --------------------------------------------------------------------------------------------


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best of several tries: bytes per second read from memory, and operations per second of a large matrix product."""
    many = torch.ones(2**27, dtype=torch.float32, device=device)  # 512 MiB, more than any cache
    a = torch.randn(2048, 2048, device=device).to(dtype)
    product = decoder.Matrix(a)
    return {"bandwidth": many.numel() * 4 / best(lambda: many.sum(), device), "rate": 2 * 2048**3 / best(lambda: product(a), device)}


def best(work: Callable[[], Any], device: torch.device, tries: int = 10) -> float:
    found = []
    with torch.inference_mode():
        for _ in range(tries):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
    return min(found)


def least_seconds(model: Any, vocabulary: Vocabulary, ids: Tensor, limits: dict[str, float]) -> float:
    """The bound for generating these ids: finished rows cost nothing, and the head only the logits that are used."""
    config, size = model.config, next(model.parameters()).element_size()
    inner = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    lengths = (ids != vocabulary.id("<pad>")).sum(1)
    rows, columns = shape_of(vocabulary)
    first = prompt(vocabulary, 1).shape[1]
    total = max(inner * size / limits["bandwidth"], 2 * inner * (first - 1) * len(ids) / limits["rate"])  # the prompt without its last id
    for t in range(first, int(lengths.max())):
        alive = int((lengths > t).sum())
        heads = vocabulary.codebook_size if t < first + rows * columns else vocabulary.code_offset
        weights = inner + heads * config.hidden_size
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * t * alive
        work = 2 * weights * alive + 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * t * alive
        total += max((weights + cache) * size / limits["bandwidth"], work / limits["rate"])
    return total


def row(line: dict[str, Any]) -> str:
    return (
        f"{line['shape']:>8} {line['dtype']:>9} batch {line['batch']:>3}: "
        f"ours {line['ours']:8.0f} ids/s, generate {line['dynamic']:7.0f} (dynamic) "
        f"{line['static']:7.0f} (static), {line['times']:.1f} times the better; {100 * line['bound']:.0f} % of the bound "
        f"({line['bandwidth'] / 1e9:.0f} GB/s read, {line['rate'] / 1e9:.0f} GFLOP/s in large products)"
    )


if __name__ == "__main__":
    console.run("benchmarks/sample.py", main)
