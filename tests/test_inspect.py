"""Promises of data_tools/inspect.py, on real tar files made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import inspect as tool
from tokun.data.captions import MOST_TEXTS, alike
from tokun.data.shards import SEVERAL, TWICE


def webp(seed: int, size: tuple[int, int] = (80, 64)) -> bytes:
    tiles = np.random.default_rng(seed).integers(0, 256, (5, 6), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(tiles).resize(size).save(buffer, "WEBP")
    return buffer.getvalue()


def record(caption: str = "A wolf", **tags: str) -> bytes:
    return json.dumps({"caption": caption, "captions": {"plain": caption}, "style": "engraving", **tags}).encode()


def npy(codes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, codes)
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good(count: int) -> dict[str, bytes]:
    members = {}
    for k in range(count):
        members[f"train-{k:06d}.webp"] = webp(k)
        members[f"train-{k:06d}.json"] = record(f"A wolf, number {k}", subject="wolves" if k else "")
    return members


def damage(path: Path) -> list[str]:
    return [str(one) for one in tool.take_inventory(tool.find_shards([path]), verify=True).damaged]


def test_counts_sizes_captions_and_tags_are_those_of_the_pairs(tmp_path, capsys):
    write(tmp_path / "train-00000.tar", good(3))
    write(tmp_path / "val-00000.tar", {"val-0.png": webp(9, (100, 128)), "val-0.json": record("")})
    assert tool.main([str(tmp_path), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "2 with 4 pairs" in text and "train 3 · val 1" in text
    assert "short side  min 64" in text and "max 128" in text
    assert "3 distinct, 1 empty" in text and "max 4" in text
    assert "style       engraving 4" in text and "subject     (none) 2 · wolves 2" in text and "damaged     0" in text


def test_code_shards_have_a_histogram(tmp_path, capsys):
    codes = np.array([[1, 1, 2, 2], [5, 5, 7, 7]], np.uint16)
    write(tmp_path / "train-00000.tar", {"a.codes.npy": npy(codes), "a.json": record()})
    (tmp_path / "codes.json").write_text('{"codebook_size": 8}')
    assert tool.main([str(tmp_path), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "8 in (views x N) 2 x 4 1" in text and "4 codes used of 8, greatest 7, perplexity 4.0" in text
    (tmp_path / "codes.json").write_text('{"codebook_size": 6}')
    assert tool.main([str(tmp_path), "--verify"]) == 1
    assert "2 codes exceed" in capsys.readouterr().out
    assert tool.main([str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]) == 2


def test_shapes_and_grids_are_counted_and_codes_that_do_not_fill_theirs_are_damage(tmp_path, capsys):
    write(
        tmp_path / "pictures" / "train-00000.tar",
        {"a.webp": webp(1, (160, 50)), "a.json": record(), "b.webp": webp(2, (50, 100)), "b.json": record()},
    )
    assert tool.main([str(tmp_path / "pictures")]) == 0
    assert "width / height: min 0.50" in (text := capsys.readouterr().out) and "max 3.20" in text
    members = {}
    for key, grid in (("a", [2, 3]), ("b", [2, 3]), ("c", [3, 2]), ("d", [3, 3])):
        members |= {f"{key}.codes.npy": npy(np.ones((2, 6), np.uint16)), f"{key}.json": record(grid=grid)}
    write(tmp_path / "codes" / "train-00000.tar", members)
    assert tool.main([str(tmp_path / "codes"), "--verify"]) == 1
    text = capsys.readouterr().out
    assert "grids       2x3 2 · 3x2 1" in text and "d: 6 codes do not fill its grid [3, 3]" in text


def test_perplexity_of_equal_and_of_single_codes():
    assert tool.perplexity(np.array([3, 3, 3, 0])) == pytest.approx(3)
    assert tool.perplexity(np.array([0, 9, 0])) == pytest.approx(1)


def test_verify_lists_everything_damaged(tmp_path):
    broken = webp(1)[:-40]
    members = [
        ("a.webp", webp(0)),
        ("a.json", record()),
        ("b.webp", webp(1)),
        ("c.json", record()),
        ("d.webp", broken),
        ("d.json", record()),
        ("e.webp", webp(2)),
        ("e.json", b'{"caption": "half'),
        ("f.webp", webp(3)),
        ("f.json", b'{"title": "no caption"}'),
        ("g.codes.npy", npy(np.zeros((1, 4), np.int64))),
        ("g.json", record()),
        ("h.codes.npy", npy(np.array([{}], object))),
        ("h.json", record()),
        ("a.webp", webp(0)),
        ("a.json", record()),
        ("i.webp", webp(4)),
        ("i.webp", webp(4)),
        ("i.json", b"\xff\xfe"),
    ]
    found = damage(write(tmp_path / "x.tar", members))
    expected = [
        f"x.tar/a: {TWICE}",
        f"x.tar/i: {TWICE}",
        "x.tar/b: missing partner: no .json",
        "x.tar/c: missing partner: neither picture nor codes",
        "x.tar/d: undecodable picture",
        "x.tar/e.json: invalid JSON",
        "x.tar/f.json: invalid JSON: it has no caption",
        "x.tar/g.codes.npy: unreadable codes: they are int64",
        "x.tar/h.codes.npy: unreadable codes",
    ]
    assert len(found) == len(expected)
    assert all(one.startswith(beginning) for one, beginning in zip(found, expected)), found


def test_what_cannot_be_told_apart_is_called_ambiguous(tmp_path):
    members = [
        ("a.webp", webp(0)),
        ("a.json", record()),
        ("a.webp", webp(1)),
        ("a.json", record()),
        ("b.webp", webp(2)),
        ("b.jpg", webp(3)),
        ("b.json", record()),
    ]
    found = damage(write(tmp_path / "x.tar", [*members, ("a.webp", webp(4)), ("a.json", record())]))
    assert found == [f"x.tar/a: {TWICE}", f"x.tar/b: {SEVERAL}"]


@pytest.mark.parametrize(
    ("captions", "said", "unsaid"),
    [
        (["An engraving."] * 24, ["The 24 captions are only 1 different text:"], ["More than half"]),
        ([*["An engraving."] * 5, *[""] * 20], ["More than half have no caption"], ["different text"]),
        ([*["A wolf"] * 30, *[""] * 31], ["The 30 captions are only 1 different text:", "More than half have no caption"], []),
        ([f"A wolf, number {k}" for k in range(24)], [], ["different text", "More than half"]),
        (["An engraving."] * 19, [], ["different text"]),
    ],
)
def test_captions_that_say_nothing_are_told_with_what_to_do(tmp_path, capsys, captions, said, unsaid):
    picture = webp(0)
    write(
        tmp_path / "x.tar",
        {f"{k:03d}.{suffix}": data for k, text in enumerate(captions) for suffix, data in (("webp", picture), ("json", record(text)))},
    )
    assert tool.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in said) and not any(words in told for words in unsaid)
    assert ("tokun caption" in told) == bool(said)


@pytest.mark.parametrize(
    ("count", "source", "said"),
    [
        (3, "template", ["All 3 captions are templates", "3 pictures with captions are few"]),
        (1, "model", ["1 picture with a caption is few"]),
        (0, "model", []),
    ],
)
def test_templates_and_few_captions_are_told(tmp_path, capsys, count, source, said):
    texts = [
        {"caption": "", "captions": {"plain": f"A wolf, number {k}."}, "caption_sources": {"plain": {"source": source}}}
        for k in range(count)
    ] or [{"caption": ""}]
    write(
        tmp_path / "x.tar",
        {
            f"{k}.{suffix}": data
            for k, text in enumerate(texts)
            for suffix, data in (("webp", webp(k)), ("json", json.dumps(text).encode()))
        },
    )
    assert tool.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in said) and ("templates" in told, "few for" in told) == (source == "template", bool(count))


def test_many_captions_that_differ_are_never_called_alike():
    assert not alike({"kept": 50_000, "distinct": MOST_TEXTS}) and alike({"kept": 50_000, "distinct": MOST_TEXTS - 1})


def test_a_tar_cut_anywhere_is_damaged(tmp_path):
    whole = write(tmp_path / "whole.tar", good(3))
    data = whole.read_bytes()
    end = max(i for i in range(0, len(data), 512) if data[i : i + 512].strip(b"\0")) + 512  # of the last member
    assert damage(whole) == []
    for length in [*range(0, end, 700), end, end + 512]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        assert damage(tmp_path / "cut.tar"), length
    (tmp_path / "cut.tar").write_bytes(data[: end + 1024])
    assert damage(tmp_path / "cut.tar") == []


def test_a_broken_header_in_the_middle_is_damaged(tmp_path):
    shard = write(tmp_path / "x.tar", good(3))
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        start = tar.getmembers()[2].offset
    data[start : start + 20] = b"\xff" * 20
    shard.write_bytes(data)
    assert any("broken header" in one for one in damage(shard))


def test_shards_are_compared_with_the_record_of_prepare(tmp_path, capsys):
    write(tmp_path / "train-00000.tar", good(2))
    (tmp_path / "prepare.json").write_text('{"shards": {"train-00000.tar": 3, "train-00001.tar": 5}}')
    assert tool.main([str(tmp_path), "--verify"]) == 1
    text = capsys.readouterr().out
    assert "2 pairs; prepare.json says 3" in text and "train-00001.tar: missing shard with 5 pairs" in text
    assert tool.main([str(tmp_path)]) == 0 and "list all with --verify" in capsys.readouterr().out


def test_the_contact_sheet_shows_at_most_32_pictures(tmp_path, capsys):
    write(tmp_path / "train-00000.tar", good(40))
    assert tool.main([str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 192 and sheet.height > 4 * 100
    assert len(tool.take_inventory([tmp_path / "train-00000.tar"], sheet=tool.SHEET).sheet) == 32


def test_a_sheet_that_cannot_be_written_is_told_before_the_shards_are_read_and_damage_before_the_sheet(tmp_path, capsys, monkeypatch):
    write(tmp_path / "x.tar", {"a.webp": b"none", "a.json": record()})
    assert tool.main([str(tmp_path), "--verify", "--sheet", str(tmp_path / "sheet.png")]) == 2, "no picture for it"
    assert "undecodable picture" in capsys.readouterr().out
    monkeypatch.setattr(tool, "take_inventory", None)  # is not reached
    for name, told in (("sheet", "name it"), ("sheet.txt", "ends in .txt"), ("absent/sheet.png", "does not exist")):
        assert tool.main([str(tmp_path), "--sheet", str(tmp_path / name)]) == 2
        told_of = capsys.readouterr()
        assert told in told_of.err and "Traceback" not in told_of.err and not told_of.out


def test_mistakes_are_told_with_the_way_out(tmp_path, capsys):
    assert tool.main([str(tmp_path / "absent")]) == 2 and "does not exist" in capsys.readouterr().err
    assert tool.main([str(tmp_path)]) == 2 and "python -m data_tools.prepare PICTURES" in capsys.readouterr().err
