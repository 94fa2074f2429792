"""Sequence layouts that the package does not have, for comparison with its own: `train.py` with a few functions replaced.

    python benchmarks/variants.py pictures --config configs/engraving-cpu.yaml train.text_weight=0 … out=runs/pictures

    pictures    a subject and its picture, no words, in raster order: class-conditional as LlamaGen (Sun et al. 2024)

For training and likelihoods only, not for sampling. benchmarks/ablations.py calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from tokun import data
from tokun.tokenizers import sequences
from tokun.tokenizers.sequences import Packed
from tokun.utils import console

Replaced = list[tuple[Any, str, Callable[..., Any]]]  # owner, attribute, replacement


def pictures() -> Replaced:
    """`<bos> [subject] <boi> codes <eoi>`: sequences end with their picture, so no time is spent on words."""
    pack = data.TokenBatches.pack

    def cut(self: data.TokenBatches, record: data.Record, rng: np.random.Generator) -> Packed:
        whole = pack(self, record, rng)
        return dataclasses.replace(whole, input_ids=sequences.without_words(self.vocabulary, whole.input_ids, ["subject"]))

    return [(data.TokenBatches, "pack", cut)]


VARIANTS: dict[str, Callable[[], Replaced]] = {"pictures": pictures}


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """The package with this variant's functions; '' changes nothing."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in VARIANTS[name]() if name else []:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield


def main() -> None:
    import train

    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"variants.py: the first argument must be one of {', '.join(VARIANTS)}, followed by the arguments of train.py")
    with applied(sys.argv[1]):
        train.main(sys.argv[2:])


if __name__ == "__main__":
    console.run("variants.py", main)
