"""Samples against held-out pictures: the distance of the two sets, the variety of the samples, and whether they look like engravings.

`real` are further real pictures (training ones), if given: they provide the reference, the distance of two sets of real pictures of the
same size, and train the classifier. Otherwise one half of the held-out pictures is compared with the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from tokun.evaluate import style
from tokun.evaluate.distances import FEWEST, frechet, jackknife, kid, manifold, spread
from tokun.evaluate.doctor import reconstructed
from tokun.evaluate.features import NEEDED, Features
from tokun.evaluate.figures import Figure, share, skipped
from tokun.evaluate.held_out_pairs import RealPair
from tokun.inference.model import Pair, Tokun


def measure(
    model: Tokun, held_out: Sequence[RealPair], samples: Sequence[Pair], *, seed: int = 0, features: Features | None = None,
    real: Sequence[Image.Image] = (), others: str = "",
) -> list[Figure]:  # fmt: skip
    """Figures of the samples. `others`: a folder of pictures that are not engravings."""
    if features is None:
        return [skipped("all", NEEDED)]
    known = [pair.image for pair in held_out]
    vectors, made = features(known, what="images: held-out"), features([pair.image for pair in samples], what="images: samples")
    further = features(real, what="images: training") if real else vectors[:0]
    return [
        *distances(vectors, made, further, features.name, seed),
        *manifold(vectors, made, f"{features.name} features"),
        jackknife("diversity", [made, vectors], lambda a, b: spread(a) / spread(b), better="more", seed=seed,
                  note=f"mean distance of two samples over that of two held-out pictures, {features.name} features: 1 is as varied"),
        *consistency(model, held_out, vectors, made, list(real), further, features, others, seed),
    ]  # fmt: skip


def distances(held_out: Tensor, made: Tensor, further: Tensor, network: str, seed: int) -> list[Figure]:
    """Fréchet distance and KID, each with the distance of two sets of real pictures as a reference."""
    note = f"to {len(held_out)} held-out pictures, {network} features"
    if len(further) >= FEWEST:
        sets = [_some(further, len(made), seed), held_out]
        against = f"{min(len(further), len(made))} training pictures against {len(held_out)} held-out ones"
    else:
        sets = list(_some(held_out, len(held_out), seed).tensor_split(2))
        against = f"one half of the held-out pictures against the other ({', '.join(str(len(s)) for s in sets)})"
    found = []
    for name, statistic in (("Fréchet distance", frechet), ("KID", kid)):
        found.append(jackknife(name, [made, held_out], statistic, better="less", note=note, seed=seed))
        found.append(jackknife(f"{name}, reference", sets, statistic, note=f"{against}, {network} features", seed=seed))
    return found


def _some(vectors: Tensor, n: int, seed: int) -> Tensor:
    return vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:n]]


def consistency(
    model: Tokun, held_out: Sequence[RealPair], vectors: Tensor, made: Tensor, real: list[Image.Image], further: Tensor, features: Features,
    others: str, seed: int,
) -> list[Figure]:  # fmt: skip
    """The share of samples classified as engravings, the classifier's accuracy, and the same for reconstructions."""
    known, test = [pair.image for pair in held_out], vectors
    copies = features(reconstructed(model, held_out))
    if not real:  # train on the first half, test on the second
        half = len(known) // 2
        real, further, known, test, copies = known[:half], vectors[:half], known[half:], vectors[half:], copies[half:]
    if (few := min(len(real), len(known))) < (least := len(style.KINDS)):
        return [skipped("style", f"{few} engravings to train and test the classifier; at least {least} of each are needed")]
    config = model.image_tokenizer.config
    shape = {"grids": model.grids, "downsample": config.downsample}
    shown = style.from_folder(others, config.image_size, config.image_channels, seed, **shape) if others else ([], [])
    taught, examined = (style.generated_others(pictures, seed + i) for i, pictures in enumerate((real, known)))
    judge = style.fit(further, features([*taught[0], *shown[0]]))
    said = [not verdict for verdict in judge(features(examined[0]))]
    missed = Counter(kind for kind, right in zip(examined[1], said) if not right)
    weakest = f"; most often mistaken: {missed.most_common(1)[0][0]}" if missed else ""
    kinds = ", ".join([*style.KINDS, *(["pictures of a folder"] if others else [])])
    trained = f"logistic regression on {features.name} features, {len(real)} engravings against {len(taught[0]) + len(shown[0])}: {kinds}"
    own, tested = judge(test), f"held-out engravings, and other kinds made of them{weakest}"
    found = [
        share("style: samples taken for engravings", judge(made), better="more", note=trained),
        share("style: held-out engravings taken for engravings", own, note="as they are"),
        share("style: reconstructions taken for engravings", judge(copies), note="held-out, through the codes: what a sample can reach"),
        share("style: the classifier's own accuracy", [*own, *said], better="more", note=tested),
    ]
    if shown[1]:
        told = [not verdict for verdict in judge(features(shown[1]))]
        found.append(share("style: the folder's pictures told from engravings", told, better="more", note="those that taught nothing"))
    return found
