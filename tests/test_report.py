"""Promises of data_tools/report.py, on small folders made on the spot."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import tarfile
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.images.judge import CAPTION_HINTS
from data_tools.report import counting as tool
from data_tools.report import family, main, write_report
from data_tools.report.counting import Sample
from data_tools.report.reasons import EXPLANATIONS
from data_tools.text.captions import DOUBTS
from tokun.data.shards import IMAGE_SUFFIXES, ShardIndex

pa = pytest.importorskip("pyarrow", reason="the report reads Parquet: pip install -e '.[data]'")
pq = pytest.importorskip("pyarrow.parquet", reason="the report reads Parquet: pip install -e '.[data]'")

SCHEMA = pa.schema(
    [
        (name, pa.int32() if name in ("width", "height") else pa.string())
        for name in ("path", "sha256", "dhash", "width", "height", "status", "reason", "shard", "key", "caption")
    ]
)
EVIL = '<script>alert("1")</script>&\u202e\n.jpg'


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiles = np.random.default_rng(seed).integers(0, 256, (5, 6), dtype=np.uint8)
    Image.fromarray(tiles).resize((96, 80), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


def kept(index: int, caption: str = "") -> tuple[dict, str]:
    row = {"path": f"a/{index:03d}.jpg", "width": 300, "height": 200, "status": "kept", "reason": ""}
    return row | {"shard": "train-00000.tar", "key": f"train-{index:06d}"}, caption or f"Wolf number {index}"


def left_out(path: str, reason: str, status: str = "rejected") -> dict:
    return {"path": path, "width": 90, "height": 80, "status": status, "reason": reason}


def write(folder: Path, pairs: list[tuple[dict, str]], rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for index, (row, caption) in enumerate(pairs):
            for name, data in ((f"{row['key']}.jpg", jpeg(index)), (f"{row['key']}.json", json.dumps({"caption": caption}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist([row for row, _ in pairs] + rows, schema=SCHEMA), folder / "manifest.parquet")
    (folder / "prepare.json").write_text(json.dumps({"settings": {"style": "engraving", "source": EVIL}}))
    return folder


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element that is opened is closed."""

    EMPTY = frozenset({"meta", "img", "br", "rect", "line"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def images(self) -> list[str]:
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_counts_and_shares_by_reason_and_a_picture_of_each(tmp_path):
    source = tmp_path / "source"
    rows = [left_out(f"b/{i}.jpg", "colour plate") for i in range(3)] + [left_out("c.jpg", "map", "ambiguous")]
    for i, row in enumerate(rows):
        (source / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        (source / row["path"]).write_bytes(jpeg(100 + i))
    out = write(tmp_path / "shards", [kept(i) for i in range(6)], rows)
    assert main([str(out), "--source", str(source)]) == 0
    page = read(out)
    for words in (
        "10 files",
        "6 pictures",
        "60.0%",
        "colour plate",
        "30.0%",
        "10.0%",
        "map",
        "Wolf number 3",
        "b/2.jpg",
        "c.jpg",
        "training",
    ):
        assert words in page.words
    assert len(page.images()) == 10
    for image in page.images():
        Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/jpeg;base64,")))).load()


def test_what_was_left_out_has_its_caption_and_the_picture_it_resembles(tmp_path):
    row = left_out("small.jpg", "thumbnail of large.jpg") | {"caption": "A fox <in> the snow"}
    write_report(write(tmp_path, [kept(0)], [row]))
    assert "small.jpgthumbnail of large.jpgA fox <in> the snow" in read(tmp_path).words


def test_doubtful_pictures_that_were_kept_count_as_pairs(tmp_path):
    row, caption = kept(1)
    write_report(write(tmp_path, [kept(0), (row | {"status": "ambiguous", "reason": "map"}, caption)], [left_out("a", "blank")]))
    page = read(tmp_path)
    assert "2 pictures (66.7%)" in page.words and len(page.images()) == 2 and "All kept pictures" in page.words


def test_what_to_do_about_a_reason_fits_the_verdict(tmp_path):
    write_report(write(tmp_path, [], [left_out("a", "text page"), left_out("b", "diagram", "ambiguous")]))
    words = re.split("examples of each reason", read(tmp_path).words)[1]
    diagram, page = words.index("diagram –"), words.index("text page –")
    assert diagram < words.index("--keep-ambiguous") < page < words.index("--no-clean")
    assert words.count("--keep-ambiguous") == words.count("--no-clean") == 1


def test_every_reason_of_cleaning_has_words_of_its_own():
    judged = (
        {reason for reason, *_ in CAPTION_HINTS}
        | set(DOUBTS)
        | {"too small", "too long", "blank", "nearly blank", "colour plate", "photograph"}
    )
    assert judged | {"no caption", "caption is only a label", "caption too short"} <= EXPLANATIONS.keys()


def test_nothing_on_the_page_runs_or_comes_from_elsewhere(tmp_path):
    out = write(
        tmp_path,
        [kept(0, EVIL)],
        [left_out(EVIL, "truncated or damaged") | {"caption": EVIL}, left_out("x", EVIL), left_out("y", "map", EVIL)],
    )
    write_report(out)
    page = read(out)
    assert not {"script", "iframe", "object", "link", "form"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("href", "#").startswith("#") and attrs.get("src", "data:image/jpeg").startswith("data:image/jpeg")
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in text and "\\x202e" in text
    assert html.escape('<script>alert("1")</script>') in text


def test_every_link_leads_somewhere(tmp_path):
    write_report(
        write(tmp_path, [kept(0)], [left_out("a", "map"), left_out("b", "map", "ambiguous"), left_out("c", "a reason of no page")])
    )
    page = read(tmp_path)
    links = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    assert len(links) == 3 and set(links) <= {attrs.get("id") for _, attrs in page.tags}


def test_without_the_originals_their_names_stand_alone(tmp_path):
    out = write(tmp_path, [kept(0)], [left_out("gone.jpg", "map")])
    write_report(out)
    page = read(out)
    assert len(page.images()) == 1 and "gone.jpg" in page.words and "original not available" in page.words


def test_files_outside_the_source_are_never_shown(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    source = tmp_path / "source"
    source.mkdir()
    (source / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "zero\0byte.jpg", "", "."]
    out = write(tmp_path / "shards", [], [left_out(name, "map") for name in names])
    write_report(out, source=source)
    assert read(out).images() == []


def test_broken_pictures_and_shards_are_said_and_do_not_stop_the_page(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "half.jpg").write_bytes(jpeg(1)[:300])
    out = write(tmp_path / "shards", [kept(0)], [left_out("half.jpg", "truncated or damaged")])
    (out / "train-00001.tar").write_bytes(b"no tar at all" * 100)
    (out / "prepare.json").write_text("{")
    write_report(out, source=source)
    page = read(out)
    assert "cannot be shown" in page.words and "train-00001.tar" in page.words and len(page.images()) == 1


def test_pairs_whose_keys_have_a_folder_with_a_dot_are_counted_and_shown(tmp_path):
    rows = [(row | {"key": f"set.v1/{row['key']}"}, caption) for row, caption in (kept(0), kept(1))]
    out = write(tmp_path, rows, [])
    assert len(ShardIndex([out / "train-00000.tar"], one_of=IMAGE_SUFFIXES)) == 2
    write_report(out)
    page = read(out)
    assert "The shards hold 2 for training" in page.words and "Wolf number 1" in page.words and len(page.images()) == 2
    assert "num_examples: 2" in (out / "README.md").read_text()


def test_an_opener_may_stand_in_for_the_folder(tmp_path):
    out = write(tmp_path, [], [left_out("inside/another.tar", "map")])
    write_report(out, opener=lambda path: jpeg(3) if path == "inside/another.tar" else None)
    assert len(read(out).images()) == 1


def test_the_same_input_gives_the_same_bytes_in_any_order_of_rows(tmp_path):
    pairs, rows = [kept(i) for i in range(70)], [left_out(f"{i}.jpg", "map") for i in range(60)]
    pages = []
    for name, order in (("one", rows), ("two", rows[::-1])):
        out = write(tmp_path / name, pairs, order)
        write_report(out)
        pages.append((out / "report.html").read_bytes())
        write_report(out)
        assert (out / "report.html").read_bytes() == pages[-1]
    assert pages[0] == pages[1]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "README.md",
        "manifest.parquet",
        "prepare.json",
        "report.html",
        "train-00000.tar",
    ]


def test_contact_sheets_are_samples_of_bounded_size(tmp_path):
    out = write(tmp_path, [kept(i) for i in range(60)], [left_out(f"{i}.jpg", "map") for i in range(60)])
    write_report(out, opener=lambda path: jpeg(int(path.split(".")[0])))
    page = read(out)
    assert len(page.images()) == tool.KEPT_TILES + tool.REASON_TILES
    assert "24 of them, drawn at random" in page.words


def test_page_and_memory_stay_small_for_a_large_manifest(tmp_path):
    """Twenty thousand files with many reasons, ten times as many as two thousand: no more memory, and no larger a page."""

    def cost(count: int) -> tuple[int, int]:
        folder = tmp_path / str(count)
        write(folder, [], [left_out(f"folder/{i}.jpg", f"reason {i % 500}") for i in range(count)])
        tracemalloc.start()
        write_report(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, (folder / "report.html").stat().st_size

    small, large = cost(5_000), cost(20_000)
    assert large[0] < 1.5 * small[0] + 1_000_000
    assert large[1] < 500_000


def test_a_sample_is_the_same_in_any_order_and_fair():
    names = [str(i) for i in range(1000)]
    one, two = Sample(100, "seed"), Sample(100, "seed")
    for name in names:
        one.add(name)
    for name in reversed(names):
        two.add(name)
    assert one.items() == two.items() and len(one.items()) == 100
    assert 30 <= sum(int(name) < 500 for name, _ in one.items()) <= 70


def test_histograms_count_every_value_in_its_stretch():
    histogram = tool.size_histogram()
    for value in (1, 31, 32, 255, 256, 4096, 100_000):
        histogram.add(value, kept=value != 255)
    labels = {histogram.labels[index]: count for index, count in (histogram.kept + histogram.others).items()}
    assert labels == {"<32": 2, "32": 1, "192": 1, "256": 1, "4k": 2}
    for make in (tool.size_histogram, tool.aspect_histogram, tool.length_histogram):
        assert len(make().labels) == len(make().edges) + 1


@pytest.mark.parametrize(
    "reason, name",
    [("thumbnail of a/b (1).jpg", "thumbnail"), ("near duplicate of x\n.jpg", "near duplicate"),
     ("colours cannot be read (mode CMYK)", "colours cannot be read"),
     ("too like a.jpg in the training split", "too like a picture for training"), ("CLIP sees: a photograph", "another medium"),
     ("caption file: broken symlink", "caption file cannot be read"), ("no caption", "no caption")],
)  # fmt: skip
def test_reasons_with_names_in_them_count_as_one(reason, name):
    assert family(reason) == name and name in EXPLANATIONS


def test_an_empty_collection_has_a_page_too(tmp_path):
    write_report(write(tmp_path, [], []))
    assert "No picture was kept" in read(tmp_path).words


@pytest.mark.parametrize("content", [None, b"no parquet", pa.table({"name": ["a"]})])
def test_a_missing_or_broken_manifest_is_refused_with_the_way_out(tmp_path, capsys, content):
    if isinstance(content, bytes):
        (tmp_path / "manifest.parquet").write_bytes(content)
    elif content is not None:
        pq.write_table(content, tmp_path / "manifest.parquet")
    assert main([str(tmp_path)]) == 2
    assert re.search("tokun prepare", capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def test_a_source_that_is_no_folder_is_refused(tmp_path, capsys):
    assert main([str(write(tmp_path, [], [])), "--source", str(tmp_path / "nowhere")]) == 2
    assert "--source" in capsys.readouterr().err
