"""Promises of tokun/data/, on real tars."""

import contextlib
import dataclasses
import gc
import io
import itertools
import json
import os
import pickle
import tarfile
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.fixtures import square_views
from tokun import data
from tokun.data import (
    CodeSamples,
    ImageBatches,
    ImageSamples,
    Order,
    Record,
    ShardIndex,
    TokenBatches,
    collate,
    expand_shards,
    positions_of,
    prefetch,
    rng_for,
    shards,
    tars,
    write_shard,
)  # fmt: skip
from tokun.data.shards import SEVERAL, TWICE
from tokun.data.tars import JOINED, NO_FILE
from tokun.tokenizers import sequences
from tokun.tokenizers.sequences import Packed
from tokun.tokenizers.vocabulary import Tags, Vocabulary

V = Vocabulary(text_size=300, codebook_size=16, styles=("engraving",), subjects=("ships",), grids=((2, 2),), max_text=8)
SHAPES = dataclasses.replace(V, grids=((2, 2), (1, 4)))


def encode(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def as_npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def code_sample(i: int, **changes) -> dict[str, bytes]:
    tree = {
        "caption": f"p{i}", "captions": {"poetic": f"q{i}", "era": ""}, "style": "engraving", "subject": "ships", "grid": [2, 2],
        "questions": [{"question": f"w{i}", "answer": f"a{i}"}], **changes,
    }  # fmt: skip
    codes = np.array([[i % 16, 1, 2, 3], [i % 16, 4, 5, 6]], np.uint16)
    return {"__key__": f"k{i:04d}", "codes.npy": as_npy(codes), "json": json.dumps(tree).encode()}


@pytest.fixture
def code_shards(tmp_path):
    for shard, rows in enumerate((range(7), range(7, 12))):
        write_shard(tmp_path / f"train-{shard:05d}.tar", (code_sample(i) for i in rows))
    return sorted(tmp_path.glob("*.tar"))


def token_batches(paths, **options):
    options = {"batch_size": 8, "seed": 3, "task_mix": {"joint": 1.0}, "tag_dropout": 0.1, "plain_share": 0.7, **options}
    return TokenBatches(CodeSamples(paths), options.pop("vocabulary", V), encode, **options)


def test_words_are_dropped_where_they_are_read_and_not_where_they_are_written(code_shards):
    options = dict(task_mix={"joint": 0.5, "text_to_image": 0.5}, sort_window=0)
    whole, dropped = token_batches(code_shards, **options), token_batches(code_shards, word_dropout=0.5, **options)
    other = seen = 0
    for step in range(20):
        a, b = whole(step), dropped(step)
        assert torch.equal(a.labels, b.labels) and a.counts == b.counts
        words = (a.input_ids < V.text_size) & (a.labels != -100) & (a.input_ids != V.id("<pad>"))
        assert torch.equal(a.input_ids[~words], b.input_ids[~words])
        assert not np.isin(b.input_ids[words], V.illegal_text).any() and (b.input_ids[words] < V.text_size).all()
        other, seen = other + int((a.input_ids != b.input_ids).sum()), seen + int(words.sum())
    assert 0.4 < other / seen < 0.6, (other, seen)


def test_dropped_words_are_the_same_for_any_number_of_processes_and_any_order(code_shards):
    options = dict(word_dropout=0.3, batch_size=4)
    alone, halves = token_batches(code_shards, **options), [token_batches(code_shards, rank=r, world=2, **options) for r in range(2)]
    for step in (3, 0):
        rows = [row[row != V.id("<pad>")].tolist() for row in alone(step).input_ids]
        assert rows == [row[row != V.id("<pad>")].tolist() for half in halves for row in half(step).input_ids]


# --- order ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(-5, 2**63), st.integers(0, 3))
def test_every_epoch_holds_each_sample_once(n, seed, epoch):
    order = Order(n, seed)
    assert sorted(order[p] for p in range(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_epochs_and_seeds_are_shuffled_differently_and_positions_read_in_any_order():
    order = Order(50, 1)
    epochs = [[order[e * 50 + i] for i in range(50)] for e in range(3)] + [[Order(50, 2)[i] for i in range(50)]]
    assert len({tuple(e) for e in epochs}) == 4
    assert [order[p] for p in (120, 3, 77)] == [epochs[2][20], epochs[0][3], epochs[1][27]]


@given(st.integers(-(2**62), 2**62), st.integers(0, 2**40))
def test_the_generator_of_a_position_is_its_own(seed, position):
    draw = lambda *args, **kw: rng_for(*args, **kw).integers(2**62)  # noqa: E731
    here = draw(seed, position)
    assert here == draw(seed, position)
    assert here not in (draw(seed, position + 1), draw(seed + 1, position), draw(seed, position, stream=1))


@given(st.integers(-(2**62), 2**62), st.integers(0, 2**40), st.integers(0, 9))
def test_the_generator_of_a_position_is_philox_with_its_key(seed, position, stream):
    key = np.array([(seed * 256 + stream) % 2**64, position], np.uint64)
    theirs = np.random.Generator(np.random.Philox(key=key))
    assert rng_for(seed, position, stream=stream).random(3).tolist() == theirs.random(3).tolist()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_any_number_of_processes_reads_the_same_global_batches(world):
    for step in range(3):
        shares = [list(positions_of(step, 8, rank, world)) for rank in range(world)]
        assert list(itertools.chain(*shares)) == list(range(step * 8, step * 8 + 8))


def test_pictures_are_the_same_for_one_process_two_processes_and_threads(toy_shards):
    samples = ImageSamples.open(str(toy_shards), image_size=32, channels=1)
    make = lambda **kw: ImageBatches(samples, batch_size=8, scale=(1.0, 1.4), seed=1, **kw)  # noqa: E731
    whole, threaded, halves = make(), make(threads=2), [make(rank=r, world=2) for r in range(2)]
    for step in (0, 2, 5):
        assert torch.equal(whole(step), torch.cat([half(step) for half in halves]))
        assert torch.equal(whole(step), threaded(step))
    assert whole(0).shape == (8, 1, 32, 32) and whole(0).abs().max() <= 1
    threaded.pool.shutdown()


def test_sequences_are_the_same_for_one_process_two_processes_and_threads(code_shards):
    mix = {"joint": 0.4, "text_to_image": 0.2, "question": 0.2, "rewrite": 0.2}
    whole, threaded = token_batches(code_shards, task_mix=mix), token_batches(code_shards, task_mix=mix, threads=2)
    halves = [token_batches(code_shards, task_mix=mix, rank=r, world=2) for r in range(2)]
    for step in (0, 4):
        batch, parts = whole(step), [half(step) for half in halves]
        for name, pad in (("input_ids", V.id("<pad>")), ("labels", -100)):
            rows = [row for part in parts for row in getattr(part, name)]
            for row, expected in zip(rows, getattr(batch, name), strict=True):
                assert torch.equal(row, expected[: len(row)]) and (expected[len(row) :] == pad).all()
        assert torch.equal(threaded(step).input_ids, batch.input_ids)
    threaded.pool.shutdown()


def test_sorted_windows_hold_the_same_sequences_with_less_padding(code_shards):
    plain = token_batches(code_shards, batch_size=4)
    ordered = token_batches(code_shards, batch_size=4, sort_window=64)
    halves = [token_batches(code_shards, batch_size=4, sort_window=64, rank=rank, world=2) for rank in range(2)]

    def rows(batches, steps):
        return [tuple(row[row != V.id("<pad>")].tolist()) for step in steps for row in batches(step).input_ids]

    for window in (range(16), range(16, 32)):
        assert sorted(rows(plain, window)) == sorted(rows(ordered, window)) and rows(plain, window) != rows(ordered, window)
    padding = [sum((batches(step).input_ids == V.id("<pad>")).sum().item() for step in range(16)) for batches in (plain, ordered)]
    assert padding[1] < 0.4 * padding[0]
    for step in (20, 3, 31):  # in any order, as after a resume
        assert rows(ordered, [step]) == [row for half in halves for row in rows(half, [step])]
        assert rows(token_batches(code_shards, batch_size=4, sort_window=64), [step]) == rows(ordered, [step])
        keys = [sorted(batches.order[p] for p in batches.positions(step)) for batches in (ordered, *halves)]
        assert keys[0] == sorted(keys[1] + keys[2])
    widths = [ordered(step).input_ids.shape[1] for step in range(16)]
    assert widths != sorted(widths), "the batches of a window are shuffled"


def test_a_batch_that_cannot_be_shared_is_refused(code_shards):
    for batch_size, world in ((8, 3), (0, 1)):
        with pytest.raises(ValueError, match=f"batch_size {batch_size} cannot be split among {world}"):
            token_batches(code_shards, batch_size=batch_size, world=world)


# --- broken shards --------------------------------------------------------------------------------------------------


def png(i: int = 0, size=(40, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, size, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n: int) -> list[dict[str, bytes]]:
    return [{"__key__": f"k{i}", "png": png(i), "json": json.dumps({"caption": str(i)}).encode()} for i in range(n)]


def test_a_truncated_tar_gives_what_is_whole(tmp_path):
    write_shard(tmp_path / "whole.tar", iter(pictures(6)))
    content = (tmp_path / "whole.tar").read_bytes()
    whole = ShardIndex([tmp_path / "whole.tar"], one_of=("png",))
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512  # of the last member; then come zeros
    for cut in {*range(600, end, 377), *range(1024, end + 1, 512)}:  # anywhere: in headers, in data, between
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        try:
            index = ShardIndex([tmp_path / "cut.tar", tmp_path / "whole.tar"], one_of=("png",))
        except ValueError as error:
            assert "cut.tar is not a readable tar" in str(error)
            continue
        assert index.skipped["truncated shard"] == 1
        kept = len(index) - 6
        assert [index.read(i, "png") for i in range(kept)] == [whole.read(i, "png") for i in range(kept)]
        assert kept < 6 or cut > end - 512


def test_incomplete_samples_are_skipped_and_counted(tmp_path):
    samples = pictures(4)
    del samples[1]["json"], samples[2]["png"]
    write_shard(tmp_path / "a.tar", iter(samples))
    index = ShardIndex([tmp_path / "a.tar"], one_of=("png", "jpg"))
    assert [index.key(i) for i in range(len(index))] == ["k0", "k3"] and index.skipped == {"incomplete sample": 2}
    assert index.read_json(1) == {"caption": "3"} and index.image_suffix(1) == "png"


def test_a_broken_picture_is_counted_and_its_successor_stands_in(tmp_path):
    samples = pictures(4)
    samples[1]["png"] = b"not a picture"
    samples[2]["png"] = samples[2]["png"][:200]
    write_shard(tmp_path / "a.tar", iter(samples))
    images = ImageSamples.open(str(tmp_path), image_size=32, channels=1)
    assert np.array_equal(images.whole(1).image, images.whole(3).image)
    assert images.index.skipped == {"broken picture": 2}
    for _ in range(100):  # a long run meets the same broken picture in every epoch
        images.whole(1)


def test_when_no_picture_is_whole_that_is_said(tmp_path):
    write_shard(tmp_path / "a.tar", iter([{"__key__": "k", "png": b"x"}]))
    with pytest.raises(ValueError, match=r"no picture of .*can be decoded"):
        ImageSamples.open(str(tmp_path), image_size=32, channels=1).whole(0)


@pytest.mark.filterwarnings("ignore:::PIL")  # Pillow warns of corrupt metadata
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]), st.data())
def test_damaged_pictures_raise_only_what_is_caught(kind, drawn):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(drawn.draw(st.integers(0, 6))):
        content[drawn.draw(st.integers(0, len(content) - 1))] = drawn.draw(st.integers(0, 255))
    content = content[: drawn.draw(st.integers(0, len(content)))]
    with contextlib.suppress(OSError, ValueError):
        assert data.decode_image(bytes(content), 1).mode == "L"


@pytest.mark.parametrize(
    "payload",
    [
        as_npy(np.zeros((2, 4), np.int64)), as_npy(np.zeros(4, np.uint16)), as_npy(np.zeros((2, 5), np.uint16)),
        as_npy(np.zeros((0, 4), np.uint16)), as_npy(np.array([{}, []], object)), as_npy(np.zeros((2, 4), np.uint16))[:-3],
        b"", b"garbage", b"PK\x03\x04garbage",
    ],
)  # fmt: skip
def test_codes_of_another_kind_are_skipped_and_counted(tmp_path, payload):
    write_shard(tmp_path / "a.tar", iter([code_sample(0) | {"codes.npy": payload}, code_sample(1)]))
    samples = CodeSamples([tmp_path / "a.tar"])
    with pytest.raises(ValueError):
        samples.record(0)
    assert samples.whole_record(0).key == "k0001" and samples.index.skipped == {"broken sample": 1}


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b"3", b"{}", b"\xff", b'{"grid": 3, "caption": ""}', b'{"grid": [2, 2], "caption": "a", "captions": []}'],
)
def test_garbage_in_a_json_is_skipped_and_counted(tmp_path, payload):
    write_shard(tmp_path / "a.tar", iter([code_sample(0) | {"json": payload}, code_sample(1)]))
    samples = CodeSamples([tmp_path / "a.tar"])
    assert samples.whole_record(0).key == "k0001" and samples.index.skipped == {"broken sample": 1}


def test_when_no_record_is_whole_that_is_said(tmp_path):
    write_shard(tmp_path / "a.tar", iter([code_sample(0) | {"json": b"{"}]))
    with pytest.raises(ValueError, match=r"no sample of .*can be read"):
        CodeSamples([tmp_path / "a.tar"]).whole_record(0)


def test_a_shard_without_samples_says_what_a_sample_needs(tmp_path):
    write_shard(tmp_path / "a.tar", iter([]))
    with pytest.raises(ValueError, match=r"no usable sample in .*a\.tar: each needs KEY\.json"):
        ShardIndex([tmp_path / "a.tar"]).usable()
    (tmp_path / "b.tar").write_bytes(b"not a tar at all" * 99)
    with pytest.raises(ValueError, match=r"b\.tar is not a readable tar"):
        ShardIndex([tmp_path / "b.tar"])


# --- the index ------------------------------------------------------------------------------------------------------


def by_tarfile(path, need, one_of):
    """The slow twin of an index of one shard: (key, {suffix: (offset, size)}) of each usable sample, and what was skipped."""
    groups, skipped, twice = {}, Counter(), set()
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    if not info.isdir():
                        skipped[NO_FILE] += 1
                    continue
                if not 0 <= info.size <= path.stat().st_size - info.offset_data:
                    skipped["truncated shard"] += 1
                    break
                folder, slash, name = info.name.removeprefix("./").rpartition("/")
                key, suffix = folder + slash + name.partition(".")[0], name.partition(".")[2].lower()
                if suffix in groups.setdefault(key, {}) and suffix in (*need, *one_of):
                    twice.add(key)
                groups[key][suffix] = (info.offset_data, info.size)
            else:
                if tar.offset + tarfile.BLOCKSIZE > path.stat().st_size:
                    skipped["truncated shard"] += 1
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if not groups:
            return f"shard {path} is not a readable tar ({error}); make it again or remove it"
        skipped["truncated shard"] += 1
    several = {k for k, f in groups.items() if sum(s in f for s in one_of) > 1} - twice
    skipped.update({reason: len(keys) for reason, keys in ((TWICE, twice), (SEVERAL, several)) if keys})
    groups = {k: f for k, f in groups.items() if k not in twice | several}
    usable = {k: f for k, f in groups.items() if all(s in f for s in need) and (not one_of or any(s in f for s in one_of))}
    if len(usable) < len(groups):
        skipped["incomplete sample"] = len(groups) - len(usable)
    return [(k, {s: f[s] for s in (*need, *one_of) if s in f}) for k, f in usable.items()], skipped


def by_index(path, need, one_of):
    try:
        index = ShardIndex([path], need=need, one_of=one_of)
    except ValueError as error:
        return str(error)
    places = zip(index._offset.tolist(), index._size.tolist(), strict=True)
    files = [{s: place for s, *place in zip((*need, *one_of), *row, strict=True) if place[0] >= 0} for row in places]
    return [(index.key(i), {s: tuple(p) for s, p in f.items()}) for i, f in enumerate(files)], index.skipped


def assert_indexed_as_tarfile_does(path):
    for need, one_of in ((("json",), ("png", "jpg")), (("json", "codes.npy"), ()), ((), ("png",))):
        found = by_index(path, need, one_of)
        if not isinstance(found, str):
            found[1].pop(JOINED, None)  # tarfile takes a broken header for the end and says nothing
        assert found == by_tarfile(path, need, one_of)


def tar_of(path, names, form=tarfile.USTAR_FORMAT, size=300, **fields):
    """A tar whose members are named, or given as (name, kind); `fields` are set on each."""
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name if isinstance(name, str) else name[0])
            info.type = tarfile.REGTYPE if isinstance(name, str) else name[1]
            for field, value in fields.items():
                setattr(info, field, value)
            info.size = size * (number % 5) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(bytes([65 + number % 26]) * info.size))


NAMES = [f"k{i}.{suffix}" for i in range(9) for suffix in ("png", "json", "codes.npy")]
PLAIN_TARS = {  # read without tarfile
    "ours": {},
    "of GNU tar": {"form": tarfile.GNU_FORMAT, "uname": "user", "mode": 0o644, "uid": 1000, "mtime": 1700000000},
    "of webdataset": {"form": tarfile.PAX_FORMAT, "mtime": 1700000000.25, "uname": "bigdata"},
    "with ./ and folders": {"names": [("./", tarfile.DIRTYPE), ("./d/", tarfile.DIRTYPE), *(f"./d/{n}" for n in NAMES)]},
    "keys apart, in capitals, twice": {
        "names": [*(n.replace("png", "PNG") for n in sorted(NAMES, key=lambda n: n[2:])), *NAMES[:4], "x", ".", "y."]
    },
    "not ASCII": {
        "form": tarfile.GNU_FORMAT,
        "names": ["ü.png", "ü.json", "\udcff.png", "\udcff.json", "k.JSON", "k.pnG", "\u212a.json", "l.\u212a"],
    },
    "large files": {"size": 70_000},
    "empty files": {"size": 0},
    "no file": {"names": []},
}
ODD_TARS = {
    "long names": {"form": tarfile.GNU_FORMAT, "names": ["p" * 150 + n for n in NAMES]},
    "long names, pax": {"form": tarfile.PAX_FORMAT, "names": [*NAMES[:4], *("p" * 150 + n for n in NAMES)]},
    "long names, ustar": {"names": ["p" * 90 + "/" + n for n in NAMES]},
    "not ASCII, pax": {"form": tarfile.PAX_FORMAT, "names": ["ü.png", "ü.json", *NAMES]},
    "pax comments": {"form": tarfile.PAX_FORMAT, "pax_headers": {"comment": "é" * 300}},
    "pax sizes": {"form": tarfile.PAX_FORMAT, "pax_headers": {"size": "512"}},
    "links": {"names": [*NAMES[:5], ("k1.json", tarfile.SYMTYPE), ("k9.png", tarfile.LNKTYPE), *NAMES[5:]], "linkname": "k0.png"},
    "a folder of old": {"names": [*NAMES[:5], ("k.json/", tarfile.AREGTYPE), *NAMES[5:]]},
    "rare kinds": {"names": [*NAMES[:5], ("k1.json", tarfile.CONTTYPE), ("k9.png", b"Z"), ("f", tarfile.FIFOTYPE), *NAMES[5:]]},
    "large numbers": {"form": tarfile.GNU_FORMAT, "uid": 2**30, "mtime": -5},
}


@pytest.mark.parametrize("name", [*PLAIN_TARS, *ODD_TARS])
def test_any_tar_is_indexed_as_tarfile_reads_it(tmp_path, name):
    tar_of(tmp_path / "a.tar", **{"names": NAMES, **(PLAIN_TARS | ODD_TARS)[name]})
    assert_indexed_as_tarfile_does(tmp_path / "a.tar")
    with open(tmp_path / "a.tar", "rb") as file:
        assert (tars.plain_files(file.fileno()) is not None) == (name in PLAIN_TARS)


@pytest.mark.parametrize("window", [1024, 4096, 65536])
def test_a_tar_of_small_files_is_indexed_alike_whatever_is_read_at_once(tmp_path, monkeypatch, window):
    monkeypatch.setattr(tars, "WINDOW", window)
    for options in PLAIN_TARS.values():
        tar_of(tmp_path / "a.tar", **{"names": [f"{n}{name}" for n in range(3) for name in NAMES], **options})
        assert_indexed_as_tarfile_does(tmp_path / "a.tar")


def test_a_tar_in_a_tar_is_one_file(tmp_path):
    """Its headers lie where headers of the outer one could."""
    tar_of(tmp_path / "inner.tar", NAMES)
    inner = (tmp_path / "inner.tar").read_bytes()
    for content in (inner, inner[:1024], inner[:512] + bytes(1024)):
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key in "abc":
                for suffix, payload in (("json", b"{}"), ("png", content)):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        assert_indexed_as_tarfile_does(tmp_path / "a.tar")


def test_numbers_as_other_programs_write_them(tmp_path):
    """bsdtar ends a size by a space; some programs add up the header's bytes as signed ones."""
    tar_of(tmp_path / "a.tar", ["k.json", "k.png", "ü.json", "ü.png"], tarfile.GNU_FORMAT)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    for at, ends, signed in ((0, b" ", False), (1024, b"\0", True)):
        content[at + 135 : at + 136] = ends
        content[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(content[at : at + 512])[signed]
    (tmp_path / "a.tar").write_bytes(content)
    assert_indexed_as_tarfile_does(tmp_path / "a.tar")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([{}, PLAIN_TARS["of webdataset"], ODD_TARS["long names"]]), st.data())
def test_a_damaged_tar_is_indexed_as_tarfile_reads_it(tmp_path, options, drawn):
    path = tmp_path / "a.tar"
    tar_of(path, **{**options, "names": options.get("names", NAMES)[:7]})
    content = bytearray(path.read_bytes())[: 7 * 2048 + 512]
    for _ in range(drawn.draw(st.integers(0, 3))):
        block = 512 * drawn.draw(st.integers(0, len(content) // 512 - 1))
        content[block + drawn.draw(st.sampled_from([0, 99, 100, 124, 134, 135, 136, 147, 148, 153, 155, 156, 257, 329, 345, 511]))] = (
            drawn.draw(st.sampled_from([0, 32, 48, 49, 55, 56, 45, 95, 47, 103, 120, 128, 255]))
        )
        if drawn.draw(st.booleans()):  # as a program would have written it
            content[block + 148 : block + 156] = b"%06o\0 " % tarfile.calc_chksums(content[block : block + 512])[0]
    path.write_bytes(content[: drawn.draw(st.sampled_from([len(content), len(content) - 512, 3000, 4096, 511, 0]))])
    assert_indexed_as_tarfile_does(path)


def kept_index(paths, kept, **options):
    index = ShardIndex(paths, cache_file=kept, **{"need": ("json", "codes.npy"), **options})
    return [(index.key(i), index.read(i, "json")) for i in range(len(index))], index.skipped


def test_a_kept_index_is_used_while_the_shards_are_the_same_and_it_is_whole(tmp_path, code_shards, monkeypatch):
    with tarfile.open(code_shards[0], "a") as tar:
        tar.addfile(tarfile.TarInfo("lonely.json"))
    kept, scans, scan = tmp_path / "cache" / "a.index", [], shards._scan
    monkeypatch.setattr(shards, "_scan", lambda path, *rest: (scans.append(path), scan(path, *rest))[1])

    def is_scanned(**options):
        del scans[:]
        assert kept_index(code_shards, kept, **options) == kept_index(code_shards, None, **options)
        return len(scans) == 2 * len(code_shards)

    assert is_scanned() and not is_scanned() and kept_index(code_shards, kept)[1] == {"incomplete sample": 1}
    assert is_scanned(need=("json",)) and is_scanned()  # other suffixes
    os.utime(code_shards[1], ns=(0, 5))
    assert is_scanned() and not is_scanned()  # another time
    write_shard(code_shards[1], (code_sample(i) for i in range(20, 23)))
    assert is_scanned() and not is_scanned()  # another shard
    content = kept.read_bytes()
    for place in (*range(0, len(content), 97), len(content) - 1):  # damaged
        kept.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert is_scanned()
    kept.write_bytes(content[:-1])
    assert is_scanned() and not is_scanned() and kept.read_bytes() == content
    assert [path.name for path in kept.parent.iterdir()] == ["a.index"]


def test_an_index_that_cannot_be_kept_is_done_without(tmp_path, code_shards):
    (tmp_path / "file").write_text("no folder")
    assert len(kept_index(code_shards, tmp_path / "file" / "a.index")[0]) == 12


def test_an_index_takes_some_tens_of_bytes_a_sample(tmp_path):
    tar_of(tmp_path / "a.tar", [f"{i:09d}.{suffix}" for i in range(1000) for suffix in ("codes.npy", "json")])
    ShardIndex([tmp_path / "a.tar"], need=("json", "codes.npy"))
    gc.collect()
    tracemalloc.start()
    index = ShardIndex([tmp_path / "a.tar"], need=("json", "codes.npy"))
    assert tracemalloc.get_traced_memory()[0] / len(index) < 64
    tracemalloc.stop()


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_many_shards_are_read_by_threads_through_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 4)
    paths = [tmp_path / f"{shard:02d}.tar" for shard in range(12)]
    for shard, path in enumerate(paths):
        write_shard(path, (code_sample(10 * shard + i) for i in range(10)))
    before, most = open_files(), []
    index = ShardIndex(paths, need=("json", "codes.npy"))

    def read(i):
        most.append(open_files())
        return json.loads(index.read(i, "json"))["caption"] == f"p{i}"  # noqa: F821

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, np.random.default_rng(0).integers(0, 120, 2000).tolist()))
    assert before + 4 <= max(most) <= before + 1 + 4 + 2 * 4  # one for counting; a thread may hold one and open another
    del index
    assert open_files() == before


def test_other_processes_read_through_the_same_index(code_shards):
    index = ShardIndex(code_shards)
    first = index.read(0, "json")
    assert pickle.loads(pickle.dumps(index)).read(0, "json") == first
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child takes no lock
        child = os.fork()
    if not child:
        os.write(writer, index.read(0, "json") + index.read(11, "json"))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 9999) == first + index.read(11, "json")
    os.close(reader), os.close(writer)


# --- patterns -------------------------------------------------------------------------------------------------------


def test_patterns_braces_commas_globs_and_folders(tmp_path):
    for name in ("a-00000", "a-00001", "a-00002", "b-1", "sub[1]"):
        write_shard(tmp_path / f"{name}.tar", iter(pictures(1)))
    names = lambda pattern: [p.stem for p in expand_shards(pattern)]  # noqa: E731
    assert names(f"{tmp_path}/a-{{00000..00002}}.tar") == ["a-00000", "a-00001", "a-00002"]
    assert names(f"{tmp_path}/a-*.tar, {tmp_path}/b-1.tar") == ["a-00000", "a-00001", "a-00002", "b-1"]
    assert names(f"{tmp_path}/{{b-1,a-00001}}.tar") == ["b-1", "a-00001"]
    assert names(str(tmp_path)) == ["a-00000", "a-00001", "a-00002", "b-1", "sub[1]"]
    assert names(f"{tmp_path}/sub[1].tar") == ["sub[1]"]
    assert names(f"{tmp_path}/a-0000{{0,1}}.tar,{tmp_path}/b-{{1..1}}.tar") == ["a-00000", "a-00001", "b-1"]


def test_a_missing_shard_is_named(tmp_path):
    write_shard(tmp_path / "a-00000.tar", iter(pictures(1)))
    with pytest.raises(FileNotFoundError, match=r"a-00001\.tar does not exist"):
        expand_shards(f"{tmp_path}/a-{{00000..00001}}.tar")
    with pytest.raises(FileNotFoundError, match=r"b-\*\.tar does not exist.*python -m data_tools\.prepare"):
        expand_shards(f"{tmp_path}/a-*.tar,{tmp_path}/b-*.tar")
    with pytest.raises(FileNotFoundError, match="no shards are named"):
        expand_shards("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no shards \(\*\.tar\) in .*made from pictures by `python -m data_tools\.prepare"):
        expand_shards(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"gone\.tar does not exist"):
        ShardIndex([tmp_path / "gone.tar"])


# --- prefetching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burst", [1, 5])
def test_prefetching_keeps_the_order_and_stops_its_thread(burst):
    stream = prefetch(lambda step: (time.sleep(0.001 * (step % 3)), step)[1], 5, burst=burst)
    assert list(itertools.islice(stream, 12)) == list(range(5, 17))
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "tokun-prefetch"]


@pytest.mark.parametrize("burst", [1, 2, 5])
def test_an_error_in_prefetching_reaches_the_reader_in_its_place(burst):
    def make(step):
        if step == 2:
            raise OSError("the disk is gone")
        return step

    stream = prefetch(make, 0, burst=burst)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_prefetching_is_some_steps_ahead_and_no_more():
    made = []
    stream = prefetch(lambda step: made.append(step) or step, 0, depth=2, burst=3)
    assert next(stream) == 0
    for _ in range(1000):
        if len(made) >= 12:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == list(range(12))  # what is being read, two bursts that wait, and one that has no room
    stream.close()


# --- pictures -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(1, 2), st.floats(1, 2), st.integers(0, 99))
def test_crops_lie_inside_the_picture(width, height, low, high, seed):
    scale = sorted([low, high])
    for left, top, side in square_views(width, height, 4, scale, np.random.default_rng(seed)):
        assert left >= 0 and top >= 0 and 0 < side <= min(width, height)
        assert left + side <= width + 1e-6 and top + side <= height + 1e-6


@pytest.mark.parametrize("scale", [(0.9, 1.2), (1.4, 1.0)])
def test_a_crop_scale_that_does_not_fit_is_refused(scale):
    with pytest.raises(ValueError, match=r"crop_scale is \[.*\]; it takes 1 <= low <= high"):
        square_views(40, 30, 2, scale, np.random.default_rng(0))


def test_view_zero_is_the_centre_and_a_crop_of_it_is_exact():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 6))
    (box,) = square_views(6, 2, 1, (1, 1), np.random.default_rng(0))
    assert box == (2, 0, 2)
    assert data.crop(image, box, 2).tolist() == [[[2, 3], [8, 9]]]
    assert data.to_float(np.array([0, 255], np.uint8)).tolist() == [-1, 1]
    rgb = data.crop(image.convert("RGB"), box, 2)
    assert rgb.shape == (3, 2, 2)


def test_the_cache_changes_no_picture_and_keeps_its_bound(toy_shards):
    plain = ImageSamples.open(str(toy_shards), image_size=32, channels=1)
    cached = ImageSamples.open(str(toy_shards), image_size=32, channels=1, cache_gb=5 * 32 * 32 / 2**30)
    for i in (*range(24), *range(24)):
        assert np.array_equal(plain.framed(i).image, cached.framed(i).image)
    assert len(cached._cache) == 5 and not plain._cache
    assert torch.equal(data.centre_crops(plain, 3), data.centre_crops(cached, 3))


def test_large_pictures_are_kept_small_and_their_shape_stays(tmp_path):
    write_shard(tmp_path / "a.tar", iter([{"__key__": "k", "png": png(0, (400, 300))}]))
    for channels, mode in ((1, "L"), (3, "RGB")):
        image = ImageSamples.open(str(tmp_path), image_size=32, channels=channels, max_scale=1.5).framed(0).image
        assert image.size == (48, 64) and image.mode == mode


# --- sequences ------------------------------------------------------------------------------------------------------


def test_labels_are_shifted_once_and_prompts_and_padding_carry_no_loss():
    batch = collate([Packed([10, 11, 12, 13], 1), Packed([20, 21, 22, 23, 24, 25], 4)], pad=9)
    assert batch.input_ids.tolist() == [[10, 11, 12, 9, 9], [20, 21, 22, 23, 24]]
    assert batch.labels.tolist() == [[11, 12, 13, -100, -100], [-100, -100, -100, 24, 25]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.counts == (0, int((batch.labels >= 0).sum()), 8) and int((batch.input_ids != 9).sum()) == 8
    counted = collate([Packed([10, 11, 12, 13], 1), Packed([20, 21, 22, 23, 24, 25], 4)], pad=9, first_code=13).counts
    assert counted == (int((batch.labels >= 13).sum()), int(((batch.labels >= 0) & (batch.labels < 13)).sum()), 8)


def slow_batch(batches, step):
    """What a batch is, said plainly and slowly."""

    def slow_rng(position, stream):
        return np.random.Generator(np.random.Philox(key=np.array([batches.seed << 8 | stream, position], np.uint64)))

    def slow_pack(position):
        rng, n = slow_rng(position, 2), len(batches.samples)
        i = slow_rng(position // n, 1).permutation(n)[position % n]
        tree, codes = json.loads(batches.samples.index.read(i, "json")), np.load(io.BytesIO(batches.samples.index.read(i, "codes.npy")))
        captions = {"plain": tree["caption"], **{r: c for r, c in tree["captions"].items() if c}}
        task = batches.tasks[int(np.searchsorted(batches.shares, rng.random(), side="right"))]
        view = codes[rng.integers(len(codes))].tolist()
        register = "plain" if rng.random() < batches.plain_share or len(captions) == 1 else list(captions)[rng.integers(len(captions))]
        keep = (rng.random(4) >= batches.tag_dropout) & (rng.random() >= batches.tag_dropout)
        tags = Tags(
            *(kept * value for kept, value in zip(keep.tolist(), (tree["style"], tree["subject"], register))), (2, 2) if keep[3] else None
        )
        text = {r: encode(c)[: V.max_text] for r, c in captions.items()}
        if task == "question":
            (pair,) = [tree["questions"][rng.integers(1)]]
            return sequences.pack_question(V, tags, view, encode(pair["question"]), encode(pair["answer"]))
        if task == "rewrite":
            other = [r for r in captions if r != register][rng.integers(len(captions) - 1)]
            return sequences.pack_rewrite(V, tags, text[register], other, text[other])
        return getattr(sequences, f"pack_{task}")(V, tags, view, text[register])

    window, number = divmod(step, batches.window)
    first, size = window * batches.window * batches.batch_size, batches.window * batches.batch_size
    rows = sorted(
        ((p, slow_pack(p)) for p in range(first, first + size)),
        key=lambda row: (len(row[1].input_ids), row[0]) if batches.window > 1 else row[0],
    )
    number = slow_rng(window, 4).permutation(batches.window)[number]
    rows = [packed for _, packed in sorted(rows[number * batches.batch_size : (number + 1) * batches.batch_size], key=lambda row: row[0])]
    width = max(len(p.input_ids) for p in rows)
    ids = torch.tensor([p.input_ids[:-1] + [V.id("<pad>")] * (width - len(p.input_ids)) for p in rows])
    labels = torch.tensor([[-100] * p.prompt + p.input_ids[p.prompt :] + [-100] * (width - len(p.input_ids)) for p in rows])
    return ids, labels[:, 1:]


@pytest.mark.parametrize("sort_window", [0, 16])
def test_batches_are_what_a_slow_reading_gives(code_shards, sort_window):
    mix = {"joint": 0.4, "text_to_image": 0.2, "question": 0.2, "rewrite": 0.2}
    batches = token_batches(code_shards, task_mix=mix, batch_size=4, sort_window=sort_window)
    for step in range(30):
        ids, labels = slow_batch(batches, step)
        batch = batches(step)
        assert torch.equal(batch.input_ids, ids) and torch.equal(batch.labels, labels) and batch.labels.dtype == torch.int64


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["<u2", ">u2", "<i2", "<u4", "|u1"]), st.booleans(), st.integers(-9, 9))
def test_codes_are_read_as_numpy_reads_them(views, n, kind, fortran, cut):
    array = np.arange(views * n).reshape(views, n).astype(kind)
    payload = as_npy(np.asfortranarray(array) if fortran else array)
    payload = payload + bytes(cut) if cut >= 0 else payload[:cut]
    try:
        expected = np.lib.format.read_array(io.BytesIO(payload))
    except ValueError:
        with pytest.raises(ValueError):
            data.read_codes(payload)
        return
    codes = data.read_codes(payload)
    assert codes.dtype == expected.dtype and np.array_equal(codes, expected)


def packed_many(batches, n, record=None):
    record = record or batches.samples.record(0)
    return [sequences.unpack(batches.vocabulary, batches.pack(record, rng_for(0, p)).input_ids) for p in range(n)]


def test_tasks_come_as_often_as_asked(code_shards):
    mix = {"joint": 0.5, "text_to_image": 0.25, "question": 0.15, "rewrite": 0.1}
    tasks = [p.task for p in packed_many(token_batches(code_shards, task_mix=mix), 3000)]
    for task, share in mix.items():
        assert abs(tasks.count(task) / 3000 - share) < 0.03, task
    assert {p.task for p in packed_many(token_batches(code_shards, task_mix={"question": 2}), 50)} == {"question"}


def test_a_task_whose_fields_are_missing_is_joint(code_shards):
    bare = Record("k", np.zeros((1, 4), np.uint16), (2, 2), "a", {"plain": "a"}, "", "", [])
    batches = token_batches(code_shards, task_mix={"question": 1, "rewrite": 1})
    assert {p.task for p in packed_many(batches, 50, bare)} == {"joint"}


def test_tag_dropout_drops_a_tenth_of_each_and_a_tenth_of_all(code_shards):
    tags = [p.tags for p in packed_many(token_batches(code_shards), 4000)]
    share = lambda had: sum(map(had, tags)) / 4000  # noqa: E731
    for had in (lambda t: t.style, lambda t: t.subject, lambda t: t.register, lambda t: t.grid is not None):
        assert abs(share(lambda t, had=had: bool(had(t))) - 0.81) < 0.03  # 0.9 x 0.9, not 0.1
    assert abs(share(lambda t: not t.names()) - 0.1) < 0.03
    assert {len(p.tags.names()) for p in packed_many(token_batches(code_shards, tag_dropout=0.0), 20)} == {4}
    assert not any(p.tags.names() for p in packed_many(token_batches(code_shards, tag_dropout=1.0), 20))


def test_where_there_are_several_grids_it_is_always_named(code_shards):
    wide = Record("k", np.zeros((1, 4), np.uint16), (1, 4), "a", {"plain": "a"}, "", "", [])
    assert {p.tags.grid for p in packed_many(token_batches(code_shards, tag_dropout=1.0, vocabulary=SHAPES), 5, wide)} == {(1, 4)}
    square = dataclasses.replace(wide, grid=(2, 2))
    assert {p.tags.grid for p in packed_many(token_batches(code_shards, tag_dropout=1.0, vocabulary=SHAPES), 5, square)} == {(2, 2)}


def test_batches_of_several_grids_have_few_lengths_and_the_same_targets(code_shards):
    options = dict(vocabulary=SHAPES, sort_window=0)
    batches = token_batches(code_shards, **options)
    exact = token_batches(code_shards, **options)
    exact.multiple = 1
    for step in range(10):
        padded, tight = batches(step), exact(step)
        width = tight.input_ids.shape[1]
        assert padded.input_ids.shape[1] % 16 == 0 and padded.input_ids.shape[1] - width < 16 and padded.counts == tight.counts
        assert torch.equal(padded.input_ids[:, :width], tight.input_ids) and torch.equal(padded.labels[:, :width], tight.labels)
        assert (padded.input_ids[:, width:] == SHAPES.id("<pad>")).all() and (padded.labels[:, width:] == -100).all()
    assert token_batches(code_shards).multiple == 1, "those of one grid stay as they were: old runs go on exactly"


def test_views_registers_and_unknown_tags(code_shards):
    batches = token_batches(code_shards)
    parts = packed_many(batches, 1500)
    assert {tuple(p.codes) for p in parts} == {(0, 1, 2, 3), (0, 4, 5, 6)}
    poetic = sum(p.caption == encode("q0") for p in parts) / 1500
    assert abs(poetic - 0.15) < 0.03 and all(p.tags.register in ("", "poetic" if p.caption == encode("q0") else "plain") for p in parts)
    assert {tuple(p.codes) for p in packed_many(token_batches(code_shards, views=False), 50)} == {(0, 1, 2, 3)}
    odd = Record("k", np.zeros((1, 4), np.uint16), (2, 2), "a", {"plain": "a", "slang": "b"}, "cubism", "cats", [])
    for p in packed_many(batches, 100, odd):
        assert (p.tags.style, p.tags.subject, p.caption) == ("", "", encode("a"))


def test_of_one_view_nothing_is_drawn_as_numpy_draws_nothing(code_shards):
    """The shorter way leaves the stream of numbers where it was."""
    asked, spared = (np.random.Generator(np.random.Philox(key=5)) for _ in range(2))
    asked.integers(1)
    assert asked.random() == spared.random()
    one, batches = (
        Record("k", np.zeros((1, 4), np.uint16), (2, 2), "a", {"plain": "a"}, "", "", []),
        token_batches(code_shards, tag_dropout=0.5),
    )
    for seed in range(20):
        with_views, without = (
            b.pack(one, np.random.default_rng(seed)) for b in (batches, token_batches(code_shards, tag_dropout=0.5, views=False))
        )
        assert with_views == without


def test_a_text_is_encoded_once(code_shards):
    told = []
    batches = token_batches(code_shards)
    counted = TokenBatches(
        batches.samples,
        V,
        lambda text: told.append(text) or encode(text),
        batch_size=8,
        seed=3,
        task_mix={"joint": 1.0},
        tag_dropout=0.1,
        plain_share=0.7,
    )
    for step in range(6):
        assert torch.equal(counted(step).input_ids, batches(step).input_ids)
    assert len(told) == len(set(told)) > 0


def test_long_captions_are_cut_and_counted_and_empty_ones_are_a_full_stop(code_shards):
    batches = token_batches(code_shards)
    assert batches.text("x" * 20) == encode("x" * 8) and batches.text("x" * 8) == encode("x" * 8)
    assert batches.cut_captions == 1
    assert batches.text("") == encode(".")


@pytest.mark.parametrize("mix", [{}, {"joint": 0}, {"joint": -1}, {"caption": 1}])
def test_a_task_mix_that_cannot_be_is_refused(code_shards, mix):
    with pytest.raises(ValueError, match=r"task_mix is .*joint, text_to_image, question, rewrite"):
        token_batches(code_shards, task_mix=mix)


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_written_shard_is_whole_or_not_there_and_the_same_bytes_each_time(tmp_path):
    assert write_shard(tmp_path / "a.tar", iter(pictures(3))) == 3
    write_shard(tmp_path / "b.tar", iter(pictures(3)))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()

    def killed():
        yield from pictures(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "c.tar", killed())
    assert not (tmp_path / "c.tar").exists() and sorted(tmp_path.glob("*.tar")) == sorted(tmp_path.glob("[ab].tar"))


def test_the_webdataset_library_reads_our_shards(code_shards):
    wds = pytest.importorskip("webdataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        theirs = list(wds.WebDataset([str(p) for p in code_shards], shardshuffle=False, empty_check=False))
        gc.collect()
    ours = CodeSamples(code_shards)
    assert [s["__key__"] for s in theirs] == [ours.record(i).key for i in range(len(ours))]
    for i, sample in enumerate(theirs):
        assert sample["json"] == ours.index.read(i, "json") and sample["codes.npy"] == ours.index.read(i, "codes.npy")


def test_shards_that_other_programs_wrote_are_read(tmp_path):
    """./ before names, folders among the members, upper-case suffixes, pax headers."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("./d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, payload in (("./k.PNG", png()), ("./k.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(payload), {"comment": "é" * 300}
            tar.addfile(info, io.BytesIO(payload))
    index = ShardIndex([tmp_path / "a.tar"], one_of=("png",))
    assert [index.key(i) for i in range(len(index))] == ["k"] and index.read(0, "png") == png()


def test_members_are_those_of_tarfile():
    """Save for the device numbers, which some versions of Python write as zeros and some leave out."""
    members = {"000000001.jpg": b"x" * 700, "000000001.json": b"{}", "000000002.png": b"", "000000003.webp": b"y" * 512}
    members |= {f"{'a' * 60}/{'b' * 60}.png": b"z", "kér.json": b"{}"}
    theirs, ours = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            tars.write_member(ours, name, data)
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    ours, theirs = ours.getvalue(), theirs.getvalue()[: ours.tell()]
    assert ours == theirs or (set(theirs[329:345]) == set(b"0\0") and ours[:148] + ours[156:329] == theirs[:148] + theirs[156:329])
    with tarfile.open(fileobj=io.BytesIO(ours + bytes(1024))) as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == members


def test_a_share_has_no_tag_that_names_the_picture_and_questions_have_none_at_all(code_shards):
    """As a picture of an unknown kind is captioned and asked about."""
    thing = dataclasses.replace(V, things=("moth",))
    moth = dataclasses.replace(CodeSamples(code_shards).whole_record(0), thing="moth")
    tags = [p.tags for p in packed_many(token_batches(code_shards, untagged_share=0.5, vocabulary=thing), 4000, moth)]
    untagged = [t for t in tags if not (t.style or t.subject)]
    assert sum(bool(t.thing) for t in untagged) < 60 < sum(bool(t.thing) for t in tags), "a thing alone names the picture, too"
    assert abs(len(untagged) / 4000 - (0.5 + 0.5 * (0.1 + 0.9 * 0.01))) < 0.03
    assert abs(sum(bool(t.register) for t in untagged) / len(untagged) - (0.5 * 0.81 + 0.5 * 0.009 * 0.9) / 0.5545) < 0.04
    asked = packed_many(token_batches(code_shards, untagged_share=0.01, task_mix={"question": 1}), 200)
    assert {p.task for p in asked} == {"question"} and not any(name for p in asked for name in p.tags.names() if "grid" not in name)
    assert any(p.tags.subject for p in packed_many(token_batches(code_shards, task_mix={"question": 1}), 200))


def test_without_questions_a_sequence_that_falls_back_keeps_its_tags(code_shards):
    bare = dataclasses.replace(CodeSamples(code_shards).whole_record(0), questions=[])
    tags = [p.tags for p in packed_many(token_batches(code_shards, untagged_share=0.01, task_mix={"question": 1}), 200, bare)]
    assert sum(bool(t.subject) for t in tags) > 140
