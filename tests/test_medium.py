"""Promises of data_tools/images/medium.py, with a real open_clip model of random weights."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_tools.images import medium
from data_tools.pipeline import chunks
from data_tools.pipeline.storage_backends import Store
from data_tools.readers import Found, Words
from tests.test_clip import tiny_clip


def test_a_medium_is_doubted_only_when_another_is_sure_to_be_seen():
    others = list(medium.OTHERS)
    assert medium.doubt([5.0] + [1.0] * 6) == "" and medium.doubt([1.0, 1.1] + [1.0] * 5) == ""
    assert medium.doubt([1.0] * 3 + [9.0] + [1.0] * 3) == f"CLIP sees: {others[2]}"
    assert medium.own_words("wood-engraving") == "a wood engraving" and medium.own_words("etching") == "an etching"


def test_the_verdict_is_the_softmax_of_the_models_own_similarities(tmp_path):
    name = tiny_clip(tmp_path / "clip")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)) for _ in range(5)]
    clip, words = medium.Clip(name), ["a woodcut", *medium.OTHERS.values()]
    scale = clip.model.logit_scale.exp().item()
    slow = []
    for image in images:
        logits = scale * np.array(clip.score([(image.convert("RGB"), words)])[0])
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        kind = int(shares.argmax())
        slow.append(f"CLIP sees: {list(medium.OTHERS)[kind - 1]}" if kind and shares[kind] >= medium.SURE else "")
    assert medium.doubts(images, ["woodcut"] * 5, name) == slow


def test_prepare_marks_what_clip_doubts_as_ambiguous(tmp_path, monkeypatch):
    monkeypatch.setattr(medium, "SURE", 0.0)  # a model of random weights is sure of nothing
    name = tiny_clip(tmp_path / "clip")
    rng, entries = np.random.default_rng(1), []
    for index in range(12):
        tiles = Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8)).resize((96, 80), Image.Resampling.NEAREST)
        tiles.save(tmp_path / f"{index}.png")
        entries.append((Found(f"{index}.png"), Words(caption="A wolf")))
    settings = chunks.Settings(style="engraving", clean=False, clip=name)
    chunk = chunks.Chunk(0, str(tmp_path), entries, settings, Store(str(tmp_path / "out")))
    counts = chunks.measure_chunk(chunk)
    rows = chunks.read_rows(chunk.store, chunks.rows_name(0))
    expected = medium.doubts([Image.open(tmp_path / f"{index}.png").resize((144, 120)) for index in range(12)], ["engraving"] * 12, name)
    assert sum(counts.values()) == 12 and any(row.status == "ambiguous" for row in rows)
    assert [bool(row.reason) for row in rows] == [bool(reason) for reason in expected]
    assert {row.reason for row in rows} <= {"", *(f"CLIP sees: {kind}" for kind in medium.OTHERS)}


def test_a_model_that_cannot_be_loaded_is_named():
    with pytest.raises(ValueError, match="names no weights"):
        medium.load("ViT-B-32")
