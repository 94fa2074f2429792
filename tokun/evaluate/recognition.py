"""What is still recognised in a reconstruction? A judge fitted on described originals looks for each picture's own description.

`fit`: a ridge regression from the last layer of an ImageNet network to the words of the description (the most frequent ones with at least
three letters, weighted by rarity). It shares nothing with a tokun model. `firsts`: how often a picture ranks its own description first of
16, that is, above 15 others drawn from those that read differently; the hypergeometric share over all draws is computed exactly. `kept`:
the share for reconstructions divided by the share for originals.

Knows vectors and words, not shards or tokenizers; `features.last_layer` makes the vectors. A fitted judge is stored in an .npz file.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tokun.evaluate import figures
from tokun.evaluate.features import Features
from tokun.evaluate.figures import Figure
from tokun.utils.errors import UserError
from tokun.utils.files import whole_file

WORDS = 3000
SEEN = 5  # fewest descriptions with a word for it to count
CANDIDATES = 16
PENALTIES = (1e2, 1e3, 1e4, 1e5, 1e6)
CHUNK = 512  # pictures in memory at once


@dataclass(frozen=True)
class Judge:
    """The result of `fit`: vectors (n, d) -> words above or below their means."""

    rarity: dict[str, float]
    mean: np.ndarray  # (d,)
    spread: np.ndarray  # (d,)
    matrix: np.ndarray  # (d, words)
    n: int
    """Number of described originals it was fitted on."""
    penalty: float
    left_out: float
    """Share with the own description first of 16, for a tenth of them, fitted on the rest."""

    def scores(self, vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """(n, d) of pictures, m texts -> float32 (n, m): how well each text fits each picture."""
        x = ((vectors - self.mean) / self.spread).astype(np.float32)
        return (x @ self.matrix) @ bags(texts, self.rarity).T

    def firsts(self, vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """(n, d) of pictures and their own texts -> (n,) shares, see `firsts`."""
        return firsts(self.scores(vectors, texts), texts)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays for np.savez, which `from_arrays` reads."""
        about = {"rarity": self.rarity, "n": self.n, "penalty": self.penalty, "left_out": self.left_out}
        return {"mean": self.mean, "spread": self.spread, "matrix": self.matrix, "about": np.array(json.dumps(about))}

    @classmethod
    def from_arrays(cls, kept: Any) -> Judge:
        return cls(mean=kept["mean"], spread=kept["spread"], matrix=kept["matrix"], **json.loads(str(kept["about"])))


# --- fitting --------------------------------------------------------------------------------------------------------


def look(pictures: Iterable[tuple[str, Image.Image, str]], network: Features, what: str) -> tuple[np.ndarray, list[str]]:
    """Keys, pictures and texts (see `held_out_pairs.described`) -> float32 (n, d) and the n texts. Raises UserError if there are none."""
    rows, texts, rest = [], [], iter(pictures)
    with tqdm(desc=what, unit="picture", leave=False) as bar:
        while chunk := list(islice(rest, CHUNK)):
            rows.append(network([picture for _, picture, _ in chunk]).float().numpy())
            texts += [text for _, _, text in chunk]
            bar.update(len(chunk))
    if not rows:
        raise UserError(f"{what}: no picture with a description")
    return np.concatenate(rows), texts


def fit(vectors: np.ndarray, texts: Sequence[str], *, seed: int = 0, penalties: Sequence[float] = PENALTIES) -> Judge:
    """Fit on vectors (n, d) of originals and their descriptions. The penalty is the best on a tenth, drawn by the seed.

    Raises UserError if the descriptions are too few or too different to learn any word.
    """
    rarity = rarities(texts)
    if len(texts) < 10 * CANDIDATES or not rarity:
        raise UserError(
            f"{len(texts)} described pictures share {len(rarity)} words; the recognition judge needs at least {10 * CANDIDATES} pictures "
            f"and words that occur in {SEEN} descriptions"
        )
    mean, spread = vectors.mean(0), vectors.std(0) + 1e-6
    x, y = ((vectors - mean) / spread).astype(np.float32), bags(texts, rarity)
    order = np.random.default_rng(seed).permutation(len(x))
    tenth, rest = order[: len(x) // 10], order[len(x) // 10 :]
    own = [texts[int(i)] for i in tenth]
    share = {
        penalty: float(firsts((x[tenth] @ matrix) @ y[tenth].T, own).mean())
        for penalty, matrix in zip(penalties, ridge(x[rest], y[rest], penalties))
    }
    best = max(share, key=lambda penalty: share[penalty])
    (matrix,) = ridge(x, y, [best])
    return Judge(rarity, mean.astype(np.float32), spread.astype(np.float32), matrix, len(x), best, share[best])


def ridge(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
    """x (n, d), y (n, k) -> for each penalty the weights (d, k)."""
    square, product = x.T @ x, x.T @ (y - y.mean(0))
    return [np.linalg.solve(square + penalty * np.eye(len(square), dtype=x.dtype), product) for penalty in penalties]


# --- words ----------------------------------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{3,}", text.lower()))


def rarities(texts: Sequence[str]) -> dict[str, float]:
    """The most frequent words, with their rarity."""
    counts = Counter(word for text in texts for word in sorted(words(text)))
    return {word: math.log(len(texts) / count) for word, count in counts.most_common(WORDS) if count >= SEEN}


def bags(texts: Sequence[str], rarity: dict[str, float]) -> np.ndarray:
    """float32 (n, words), rows of length 1, or 0 if no word is known."""
    columns = {word: i for i, word in enumerate(rarity)}
    bag = np.zeros((len(texts), len(columns)), np.float32)
    for row, text in enumerate(texts):
        for word in words(text) & columns.keys():
            bag[row, columns[word]] = rarity[word]
    return bag / np.maximum(np.linalg.norm(bag, axis=1, keepdims=True), 1e-6)


# --- figures --------------------------------------------------------------------------------------------------------


def firsts(scores: np.ndarray, texts: Sequence[str], candidates: int = CANDIDATES) -> np.ndarray:
    """scores (n, n), pictures x texts -> (n,): the share of all draws of rivals in which the own text is the best.

    Rivals are drawn without replacement from the texts that read differently; a rival wins a tie.
    Raises UserError if a picture has too few rivals.
    """
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    same = np.array([numbers[text] for text in texts])
    other = same[:, None] != same[None]
    m, k = other.sum(1), candidates - 1
    if m.min(initial=k) < k or not len(texts):
        raise UserError(f"{len(texts)} pictures; at least {candidates} with different descriptions are needed")
    worse = (other & (scores < np.diag(scores)[:, None])).sum(1)
    share = np.ones(len(texts))
    for i in range(k):  # C(worse, k) / C(m, k)
        share *= np.maximum(worse - i, 0) / (m - i)
    return share


def kept(originals: np.ndarray, copies: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(n,) shares of originals, (n,) of their reconstructions -> the ratio kept and its 95 % interval (paired bootstrap over pictures)."""

    def ratio(pairs: np.ndarray) -> float:
        return float(pairs[:, 1].mean() / max(pairs[:, 0].mean(), 1e-9))

    both = np.stack([originals, copies], 1)
    return (ratio(both), *figures.bootstrap(both, ratio, seed=seed))


def measure(
    judge: Judge, texts: Sequence[str], originals: np.ndarray, copies: np.ndarray, *, what: str = "", note: str = "", seed: int = 0
) -> list[Figure]:
    """Vectors (n, d) of held-out originals and of their reconstructions -> three figures. `what` is appended to their names."""
    shares = [judge.firsts(vectors, texts) for vectors in (originals, copies)]
    about = (
        f"own description first of {CANDIDATES}, over all draws of rivals; chance {1 / CANDIDATES:.1%}; "
        f"judge of {judge.n} described originals{note and ', '}{note}"
    )
    value, low, high = kept(*shares, seed=seed)
    what = what and f", {what}"
    return [
        figures.mean(f"recognition of originals{what}", shares[0].tolist(), better="more", note=about, seed=seed),
        figures.mean(f"recognition of reconstructions{what}", shares[1].tolist(), better="more", note=about, seed=seed),
        Figure(
            f"recognition kept{what}",
            value,
            len(texts),
            low,
            high,
            "more",
            "reconstructions over originals; paired bootstrap over pictures",
        ),
    ]


# --- files ----------------------------------------------------------------------------------------------------------


def save(path: Path, judge: Judge, settings: str, **further: np.ndarray) -> None:
    """Write the judge, its settings and any further arrays to an .npz file, atomically."""
    arrays: dict[str, Any] = {**judge.arrays(), "settings": np.array(settings), **further}
    with whole_file(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def fitted(path: Path, settings: str, learn: Callable[[], Judge]) -> Judge:
    """The judge in `path` if it has the same settings; otherwise the one made by `learn`, stored there."""
    if path.is_file():
        try:
            with np.load(path) as kept:
                if str(kept["settings"]) == settings:
                    return Judge.from_arrays(kept)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # damaged, or another file
            pass
    judge = learn()
    save(path, judge, settings)
    return judge
