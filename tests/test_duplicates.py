"""Promises of data_tools/images/duplicates.py: every likeness is found, and in nearly linear time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_tools.images.duplicates import DISTANCE, alike_pairs, bit_counts, clusters
from data_tools.images.image_ops import dhash
from data_tools.pipeline.chunks import fine_hash


def hashes(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = rng.integers(0, 2**64, (count, 5), dtype=np.uint64)
    return numbers[:, 0].copy(), numbers[:, 1:].copy()


def flipped(rng: np.random.Generator, value: np.uint64, bits: int) -> np.uint64:
    return value ^ np.uint64(sum(1 << int(bit) for bit in rng.choice(64, bits, replace=False)))


def test_bit_counts_are_those_of_python():
    rng = np.random.default_rng(0)
    words_NM = rng.integers(0, 2**64, (20, 4), dtype=np.uint64)
    assert bit_counts(words_NM).tolist() == [sum(int(word).bit_count() for word in row) for row in words_NM]
    assert bit_counts(np.empty((0, 4), dtype=np.uint64)).tolist() == []


def test_all_pairs_within_the_distance_are_found_and_no_others():
    rng = np.random.default_rng(1)
    coarse_N, fine_N4 = hashes(rng, 600)
    for index in range(300):
        coarse_N[300 + index] = flipped(rng, coarse_N[index], index % 8)
        fine_N4[300 + index] = fine_N4[index]
    pairs = {tuple(pair) for pair in alike_pairs(coarse_N, fine_N4).tolist()}
    slow = {(a, b) for a in range(600) for b in range(a + 1, 600) if int(coarse_N[a] ^ coarse_N[b]).bit_count() <= DISTANCE}
    assert pairs == slow and len(slow) >= 180


def test_the_fine_hash_has_the_last_word():
    coarse_N, fine_N4 = np.zeros(2, np.uint64), np.zeros((2, 4), np.uint64)
    assert alike_pairs(coarse_N, fine_N4).tolist() == [[0, 1]]
    fine_N4[1] = np.uint64(2**16 - 1)  # 64 bits of 256
    assert alike_pairs(coarse_N, fine_N4).tolist() == []
    assert alike_pairs(coarse_N[:0], fine_N4[:0]).shape == (0, 2) and alike_pairs(coarse_N[:1], fine_N4[:1]).shape == (0, 2)


def test_many_equal_hashes_are_one_cluster_and_no_quadratic_time():
    coarse_N, fine_N4 = np.full(20_000, 7, np.uint64), np.zeros((20_000, 4), np.uint64)
    start = time.process_time()  # a busy machine is no quadratic time
    cluster = clusters(20_000, alike_pairs(coarse_N, fine_N4))
    assert set(cluster.tolist()) == {0} and time.process_time() - start < 10


def test_clusters_join_chains():
    assert clusters(6, np.array([[4, 5], [0, 2], [2, 4]])).tolist() == [0, 1, 0, 3, 0, 0]


def made(count: int) -> list[Image.Image]:
    """Pictures of broad light and shade under fine lines, as prints are."""
    rng = np.random.default_rng(5)
    shades = (Image.fromarray(rng.integers(60, 256, (7, 6), np.uint8)).resize((192, 224), Image.Resampling.BICUBIC) for _ in range(count))
    lines = np.where(np.add.outer(np.arange(224), np.arange(192)) % 5 < 2, 40, 0)
    return [Image.fromarray(np.clip(np.asarray(shade, int) - lines, 0, 255).astype(np.uint8)) for shade in shades]


@pytest.mark.parametrize("kind", ["real", "made"])
def test_a_scan_a_thumbnail_and_a_trimmed_copy_of_an_engraving_are_alike_and_others_are_not(kind, request):
    pictures = made(24) if kind == "made" else request.getfixturevalue("engravings")(24)
    originals = [image.convert("L") for image in pictures]
    copies = [
        copy
        for image in originals
        for copy in (
            image.resize((image.width // 3, image.height // 3), Image.Resampling.BICUBIC),
            ImageOps.autocontrast(image.point(lambda tone: 20 + tone * 0.8)),
            image.crop((1, 1, image.width - 1, image.height - 1)),
        )
    ]
    everything = originals + copies
    coarse_N = np.array([dhash(image) for image in everything], dtype=np.uint64)
    fine_N4 = np.array([fine_hash(image) for image in everything], dtype=np.uint64)
    cluster = clusters(len(everything), alike_pairs(coarse_N, fine_N4))
    of = [*range(24), *(index // 3 for index in range(72))]
    assert [index for index in range(len(everything)) if cluster[index] != cluster[of[index]]] == []
    assert len(set(cluster.tolist())) == 24


def test_pairs_among_some_are_those_of_all_that_are_among_them():
    rng = np.random.default_rng(3)
    coarse_N, fine_N4 = hashes(rng, 300)
    coarse_N[100:200], fine_N4[100:200] = coarse_N[:100], fine_N4[:100]
    among = np.flatnonzero(rng.random(300) < 0.7)
    some = set(among.tolist())
    wanted = [pair for pair in alike_pairs(coarse_N, fine_N4).tolist() if some.issuperset(pair)]
    assert len(wanted) > 20 and alike_pairs(coarse_N, fine_N4, among=among).tolist() == wanted
