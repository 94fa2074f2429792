"""Promises of pictures of several shapes: how they are framed, batched, encoded and counted."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tokun
from data_tools import toy
from tests import small_runs
from tests.fixtures import TINY
from tokun import data
from tokun.config import ImageTokenizerConfig, from_dict, load_config
from tokun.data import cropping, image_files
from tokun.tokenizers import sequences
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.vocabulary import REGISTERS
from tokun.training.codes import encode_shards
from tokun.training.generator import build_vocabulary
from tokun.training.image_tokenizer import train_image_tokenizer
from tokun.training.loop import batches_keys
from tokun.training.reconstruction import inspect_image_tokenizer
from tokun.training.run import open_run

GRIDS = ((4, 4), (3, 5), (5, 3))
NAMES = ["4x4", "3x5", "5x3"]


def noise(width: int, height: int, seed: int = 0, channels: int = 1) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 200, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def thing(width: int, height: int) -> Image.Image:
    """A dark thing on white ground, which it touches nowhere."""
    image = Image.new("L", (width, height), 255)
    image.paste(20, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return image


# --- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (["16"], "'16'"),
        (["0x4"], "'0x4'"),
        (["4x-4"], "'4x-4'"),
        (["4x4", "4x4"], "twice"),
        (["4x4", "8x8"], r"4x4 \(16 codes\) and 8x8 \(64 codes\)"),
    ],
)
def test_grids_that_cannot_be_are_refused_before_anything_runs(grids, said):
    with pytest.raises(ValueError, match=said):
        from_dict({"data": {"grids": grids}})


def test_a_fit_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"data\.fit is 'stretch'"):
        from_dict({"data": {"fit": "stretch"}})
    with pytest.raises(ValueError, match="stretch"):
        cropping.frame(noise(8, 8), (1, 1), 8, "stretch")


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_nearest_grid_loses_least_by_cropping(width, height):
    lost = [cropping.lost(width, height, cropping.crop_box(width, height, grid)) for grid in GRIDS]
    assert lost[cropping.nearest_grid(width, height, GRIDS)] == pytest.approx(min(lost))


# --- cropping --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(GRIDS), st.sampled_from(cropping.FITS), st.sampled_from([1, 3]))
def test_every_picture_fits_every_grid(width, height, grid, fit, channels):
    pixels, (left, top, w, h) = cropping.frame(noise(width, height, channels=channels), grid, 8, fit)
    assert pixels.shape == (channels, grid[0] * 8, grid[1] * 8) and pixels.dtype == np.uint8
    assert w / h == pytest.approx(grid[1] / grid[0])
    if fit == "crop":
        assert left >= 0 and top >= 0 and left + w <= width + 1e-6 and top + h <= height + 1e-6
    if fit == "pad":
        assert left <= 1e-6 and top <= 1e-6 and left + w >= width - 1e-6 and top + h >= height - 1e-6


def test_padding_keeps_the_whole_picture_and_lays_its_paper_around():
    image = Image.new("L", (40, 20), 180)
    image.paste(0, (15, 5, 25, 15))
    pixels, box = cropping.frame(image, (4, 4), 8, "pad")
    assert box == (0, -10, 40, 40) and pixels.shape == (1, 32, 32)
    assert (pixels[0, :8] == 180).all() and (pixels[0, -8:] == 180).all(), "its own paper"
    assert pixels[0, 16, 16] == 0 and (pixels < 90).mean() == pytest.approx(100 / 1600, abs=0.02)
    print_, _ = cropping.frame(thing(40, 20), (4, 4), 8, "pad")
    assert (print_[0, :8] == 255).all(), "the paper of prints is white"


def test_what_is_cut_off_is_the_overhang_half_on_each_side():
    image = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (32, 1)))
    pixels, box = cropping.frame(image, (4, 4), 8, "crop")
    assert box == (24, 0, 32, 32) and (pixels[0] == np.arange(24, 56)).all()


def test_auto_keeps_a_thing_on_blank_ground_whole_and_cuts_a_scene_a_little():
    for width, height in ((80, 68), (68, 80)):
        assert cropping.fit_to(thing(width, height), (4, 4), 8, "auto").padded
        scene = cropping.fit_to(noise(width, height), (4, 4), 8, "auto")
        assert not scene.padded and cropping.lost(width, height, scene.box) == pytest.approx(0.15)
    assert cropping.fit_to(noise(200, 50), (3, 5), 8, "auto").padded, "far outside every grid's shape"
    assert not cropping.fit_to(thing(81, 80), (4, 4), 8, "auto").padded, "nothing to speak of is lost"


def test_very_small_pictures_are_enlarged_no_more_than_twice_on_their_paper():
    image = Image.new("L", (8, 4), 0)
    pixels, _ = cropping.frame(image, (4, 4), 8, "pad")
    image.putpixel((0, 0), 0)
    assert cropping.pad_box(8, 4, (4, 4), 8) == (-4, -6, 16, 16) and pixels.shape == (1, 32, 32)
    white = Image.new("L", (40, 40), 255)
    white.paste(image, (16, 18))
    assert (cropping.frame(white.crop((16, 18, 24, 22)), (4, 4), 8, "pad")[0] == pixels).all()


@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from(GRIDS), st.booleans(), st.booleans(), st.integers(0, 99))
def test_zooms_keep_the_aspect_and_stay_where_they_may(width, height, grid, padded, anywhere, seed):
    frame = cropping.pad_box(width, height, grid, 8) if padded else cropping.crop_box(width, height, grid)
    left, _, w, h = cropping.zoomed(frame, (1.0, 1.4), np.random.default_rng(seed), (width, height) if anywhere else None)
    assert w / h == pytest.approx(grid[1] / grid[0]) and 1 - 1e-6 <= frame[2] / w <= 1.4 + 1e-6
    low = min(0, frame[0]) if anywhere else frame[0]
    high = max(width, frame[0] + frame[2]) if anywhere else frame[0] + frame[2]
    assert low - 1e-6 <= left and left + w <= high + 1e-6


def test_a_reduced_picture_shows_the_same_of_it():
    for image in (noise(400, 300), thing(400, 310)):
        whole = cropping.fit_to(image, (4, 4), 8, "auto")
        small = cropping.reduced(whole, 8, 1.5)
        assert small.padded == whole.padded and small.box[3] == pytest.approx(48, abs=1)
        one, two = (cropping.cut(f.image, f.box, (32, 32), f.paper).astype(int) for f in (whole, small))
        assert abs(one - two).mean() < 8


def test_pictures_of_a_user_come_back_in_groups_of_one_grid():
    images = [noise(40, 40), noise(50, 30), noise(41, 40), noise(30, 50)]
    groups = list(cropping.encode_ready(images, GRIDS, downsample=8))
    assert [(g.grid, g.places) for g in groups] == [((4, 4), [0, 2]), ((3, 5), [1]), ((5, 3), [3])]
    assert [g.pixels.shape for g in groups] == [(2, 1, 32, 32), (1, 1, 24, 40), (1, 1, 40, 24)]
    (asked,) = cropping.encode_ready(images, GRIDS, downsample=8, grid=(3, 5))
    assert asked.places == [0, 1, 2, 3] and asked.pixels.shape == (4, 1, 24, 40)
    (square,) = cropping.encode_ready([thing(60, 40)], ((4, 4),), downsample=8)
    assert (square.pixels[0] == data.crop(thing(60, 40), data.centre_box(60, 40), 32)).all(), "as models of squares were trained"


# --- shards and batches ---------------------------------------------------------------------------------------------

SIZES = [(40, 40)] * 7 + [(60, 36)] * 12 + [(36, 60)] * 4 + [(44, 42)]


def write(folder, split: str = "train", sizes=SIZES, things=(), broken=(), shard_size: int = 16) -> None:
    def samples(numbers):
        for i in numbers:
            width, height = sizes[i]
            buffer = io.BytesIO()
            picture = Image.fromarray(np.array(toy.draw(3, i, 64)[0])).convert("L").resize((width, height))
            picture.save(buffer, "PNG")
            tree = toy.draw(3, i, 64)[1] | {"width": width, "height": height}
            if things:
                tree["thing"] = things[i % len(things)]
            yield {
                "__key__": f"{split}-{i:04d}",
                "png": b"no picture" if i in broken else buffer.getvalue(),
                "json": json.dumps(tree).encode(),
            }

    for number, start in enumerate(range(0, len(sizes), shard_size)):
        data.write_shard(folder / f"{split}-{number:05d}.tar", samples(range(start, min(start + shard_size, len(sizes)))))


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """A folder of shards with pictures of three shapes."""
    folder = tmp_path_factory.mktemp("shaped")
    write(folder)
    write(folder, "val", SIZES[::3])
    return folder


def opened(folder, **options) -> data.ImageSamples:
    return data.ImageSamples.open(str(folder / "train-*.tar"), image_size=32, channels=1, grids=GRIDS, downsample=8, **options)


def batches(samples, **options) -> data.ImageBatches:
    return data.ImageBatches(samples, **({"batch_size": 4, "scale": (1.0, 1.4), "seed": 5} | options))


def test_every_batch_has_one_shape_and_every_picture_comes_equally_often(shaped):
    samples = opened(shaped)
    assert np.bincount(samples.shapes).tolist() == [8, 12, 4]
    made = batches(samples)
    assert {tuple(made(step).shape) for step in range(12)} == {(4, 1, 32, 32), (4, 1, 24, 40), (4, 1, 40, 24)}
    for size in (4, 5, 7):
        order = data.BucketOrder(samples.shapes, 5, size)
        steps = 10 * 24 * size // size
        seen = np.bincount([order[p] for p in range(steps * size)], minlength=24)
        for shape in range(3):
            own = seen[samples.shapes == shape]
            assert own.max() - own.min() <= 1 + 1e-9, "of one shape"
        assert seen.max() - seen.min() <= 2 + size // 4, "and over all"
        for step in range(steps):
            assert len({samples.shapes[order[step * size + row]] for row in range(size)}) == 1


def test_the_order_is_a_function_of_the_position_alone(shaped):
    samples = opened(shaped)
    forth = data.BucketOrder(samples.shapes, 5, 4)
    read = [forth[p] for p in range(400)]
    back = data.BucketOrder(samples.shapes, 5, 4)
    assert [back[p] for p in reversed(range(400))] == read[::-1]
    assert [data.BucketOrder(samples.shapes, 5, 4)[p] for p in (399, 0, 250)] == [read[399], read[0], read[250]], "so a run goes on exactly"
    assert [data.BucketOrder(samples.shapes, 6, 4)[p] for p in range(400)] != read
    epochs = [read[start : start + 24] for start in range(0, 240, 24)]
    assert len({tuple(e) for e in epochs}) == len(epochs)


def test_two_processes_see_the_global_batches_of_one(shaped):
    whole = batches(opened(shaped))
    halves = [batches(opened(shaped), rank=rank, world=2, threads=rank) for rank in range(2)]
    for step in (0, 1, 2, 9, 31):
        assert torch.equal(whole(step), torch.cat([half(step) for half in halves]))
    assert batches_keys(whole, 9) == [key for half in halves for key in batches_keys(half, 9)]


def test_a_broken_picture_is_stood_in_for_by_one_of_its_shape(tmp_path):
    write(tmp_path, broken=(0, 8))
    samples = opened(tmp_path)
    assert samples.shapes[[0, 8]].tolist() == [-1, -1], "none whose header cannot be read is asked for"
    assert {samples.index.key(i) for p in range(200) for i in [batches(samples).order[p]]} == {
        f"train-{i:04d}" for i in range(24) if i not in (0, 8)
    }
    blob = (tmp_path / "train-00000.tar").read_bytes()
    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        member = tar.getmember("train-0009.png")
    (tmp_path / "train-00000.tar").write_bytes(
        blob[: member.offset_data + 60] + bytes(member.size - 60) + blob[member.offset_data + member.size :]
    )
    samples = opened(tmp_path)
    assert samples.whole(9).grid == (3, 5) and samples.index.skipped["broken picture"] == 1


def test_sizes_are_read_once_and_kept_until_a_shard_changes(tmp_path, monkeypatch):
    write(tmp_path)
    kept, reads = tmp_path / "cache" / "images.index", []
    real = image_files.size_of
    monkeypatch.setattr(image_files, "size_of", lambda content: reads.append(1) or real(content))
    first = opened(tmp_path, cache_file=kept).shapes
    assert len(reads) == 24 and (tmp_path / "cache" / "images.index.sizes").is_file()
    assert (opened(tmp_path, cache_file=kept).shapes == first).all() and len(reads) == 24
    write(tmp_path, sizes=[(36, 60)] * 24)
    assert set(opened(tmp_path, cache_file=kept).shapes.tolist()) == {2} and len(reads) == 48


def test_the_cache_changes_no_picture(shaped):
    plain, cached = batches(opened(shaped)), batches(opened(shaped, cache_gb=1.0))
    for step in (0, 3, 0, 12):
        assert torch.equal(plain(step), cached(step))


# --- stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, shaped):
    config = small_runs.write_config(tmp_path_factory.mktemp("shaped-run"), shaped, data__grids=NAMES, data__fit="auto")
    tree = yaml.safe_load(config.read_text())
    tree["image_tokenizer"] |= {"attention": True}
    config.write_text(yaml.safe_dump(tree))
    return config


def image_tokenizer_of(config, *overrides):
    run = open_run(load_config(config, overrides))
    train_image_tokenizer(run)
    return run


def test_an_image_tokenizer_trains_on_mixed_shapes_and_resumes_exactly(config_file, tmp_path, monkeypatch):
    whole = image_tokenizer_of(config_file, f"out={tmp_path / 'whole'}")
    record = json.loads((whole.out / "image_tokenizer" / "stage.json").read_text())
    assert record["settings"]["grids"] == NAMES and record["figures"]["codes_seen"] == sum(
        {(40, 40): 16, (44, 42): 16}.get(s, 15) for s in SIZES[::3]
    )
    real = data.ImageBatches.__call__

    def stops(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(data, "prefetch", lambda make, start, **_: Steps(make, start))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.ImageBatches, "__call__", stops)
        image_tokenizer_of(config_file, f"out={tmp_path / 'cut'}")
    image_tokenizer_of(config_file, f"out={tmp_path / 'cut'}")
    one, two = (ImageTokenizer.load(tmp_path / name / "image_tokenizer") for name in ("whole", "cut"))
    assert one.fingerprint() == two.fingerprint()
    assert ImageTokenizerConfig(**json.loads((whole.out / "image_tokenizer" / "config.json").read_text())) == one.config, (
        "shapes are no part of it"
    )
    with pytest.raises(ValueError, match="grids"):
        image_tokenizer_of(config_file, f"out={tmp_path / 'cut'}", "data.grids=[4x4,5x3]")


class Steps:
    def __init__(self, make, step):
        self.make, self.step = make, step

    def __next__(self):
        self.step += 1
        return self.make(self.step - 1)

    def close(self):
        pass


def encoded(tmp_path, tokenizer, folder, **codes):
    config = from_dict({"data": {"train": str(folder / "train-*.tar"), "grids": NAMES}, "codes": codes,
                        "out": str(tmp_path / "run"), "threads": 1, "image_tokenizer": {**TINY}, "tracking": {"kind": "none"}})  # fmt: skip
    (tmp_path / "run").mkdir(parents=True, exist_ok=True)
    tokenizer.save(tmp_path / "run" / "image_tokenizer")
    run = open_run(config)
    encode_shards(run)
    return (
        config,
        data.CodeSamples(sorted((run.out / "codes").glob("train-*.tar"))),
        json.loads((run.out / "codes" / "codes.json").read_text()),
    )


def test_each_sample_has_the_codes_of_its_own_grid(tmp_path, shaped, tiny_image_tokenizer):
    _, codes, record = encoded(tmp_path, tiny_image_tokenizer, shaped, views=3, crop_scale=[1.0, 1.2], mirror=True, batch_size=7)
    assert (
        record["grids"] == [[4, 4], [3, 5], [5, 3]]
        and record["grid"] == [4, 4]
        and record["grid_counts"] == {"4x4": 8, "3x5": 12, "5x3": 4}
    )
    samples = opened(shaped)
    for i in range(len(codes)):
        one, tree = codes.record(i), codes.index.read_json(i)
        grid = GRIDS[samples.shapes[i]]
        assert one.grid == grid and one.codes.shape == (3, grid[0] * grid[1]) and len(tree["boxes"]) == 3
        image = data.decode_image(samples.read(i), 1)
        whole, box = cropping.frame(image, grid, 8, "auto")
        assert (tiny_image_tokenizer.encode(data.to_float(np.stack([whole])), rows=16)[0].numpy() == one.codes[0]).all(), (
            "view 0 is the picture as framed"
        )
        assert tree["boxes"][0] == pytest.approx(box, abs=0.01) and tree["boxes_of"] == list(image.size)
        for left, top, w, h in tree["boxes"][1:]:
            assert (
                box[0] - 0.01 <= left
                and left + abs(w) <= box[0] + box[2] + 0.01
                and box[1] - 0.01 <= top
                and top + h <= box[1] + box[3] + 0.01
            )


def test_codes_count_tags_things_and_grids(tmp_path, tiny_image_tokenizer, text_tokenizer, monkeypatch):
    write(tmp_path, things=("Moth", "Moth", "Fish (dried)", "shield"))
    monkeypatch.setattr("tokun.training.codes.LEAST_OF_THING", 6)
    monkeypatch.setattr("tokun.training.codes.MOST_THINGS", 2)
    config, codes, record = encoded(tmp_path, tiny_image_tokenizer, tmp_path, views=1)
    assert codes.record(2).thing == "fish-dried"
    assert record["unrepeated_words"] == [], "of two dozen captions nothing is said"
    rows = record["tag_counts"]
    assert all(len(row) == 5 for row in rows) and sum(row[-1] for row in rows) == 24
    assert {row[3] for row in rows} == set(NAMES) and {row[2] for row in rows} == {"", "moth", "fish-dried"}, "the two most frequent"
    vocabulary = build_vocabulary(config, text_tokenizer, record | {"tag_counts": [[*r[:2], "", *r[3:]] for r in rows]})
    assert vocabulary.grids == GRIDS
    held = {register for i in range(24) for register in codes.record(i).captions}
    assert vocabulary.registers == tuple(r for r in REGISTERS if r in held) and set(record["register_counts"]) == held


def test_registers_that_no_training_caption_has_are_no_tags_and_old_codes_have_all(text_tokenizer):
    codes = {"tag_counts": [["engraving", "sea", 9], ["etching", "", 2]], "codebook_size": 64, "grid": [4, 4]}
    old = build_vocabulary(from_dict({}), text_tokenizer, codes)
    assert old.registers == REGISTERS and old.grids == ((4, 4),) and old.styles == ("engraving", "etching") and old.subjects == ("sea",)
    new = build_vocabulary(from_dict({}), text_tokenizer, codes | {"register_counts": {"plain": 11, "social": 2, "limerick": 3}})
    assert new.registers == ("plain", "social")


def test_an_inspection_of_several_shapes_is_that_of_each(tiny_image_tokenizer, shaped):
    groups = data.first_frames(opened(shaped), 24)
    assert [tuple(g.shape) for g in groups] == [(8, 1, 32, 32), (12, 1, 24, 40), (4, 1, 40, 24)]
    figures, sheet = inspect_image_tokenizer(tiny_image_tokenizer, groups, torch.device("cpu"))
    each = [inspect_image_tokenizer(tiny_image_tokenizer, g, torch.device("cpu"))[0] for g in groups]
    assert figures["psnr"] == pytest.approx(sum(f["psnr"] * len(g) for f, g in zip(each, groups)) / 24, rel=1e-5)
    assert figures["codes_seen"] == sum(f["codes_seen"] for f in each) and sheet.size[0] > 300


def test_a_run_over_several_shapes_and_things_ends_in_a_checkpoint_that_draws_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tokun.training.codes.LEAST_OF_THING", 3)
    write(tmp_path / "shards", things=("moth", "fish", "shield"))
    write(tmp_path / "shards", "val", SIZES[::3], things=("moth", "fish", "shield"))
    config = small_runs.write_config(tmp_path, tmp_path / "shards", data__grids=NAMES, train__save_every=2)
    out = small_runs.run_stages(config)
    model = tokun.load(out / "checkpoint", device="cpu")
    assert model.vocabulary.grids == GRIDS and model.vocabulary.things == ("fish", "moth", "shield")
    drawn = {pair.tags.grid: pair.image.size for pair in model.sample(1, 12)}
    assert len(drawn) > 1 and all(size == (grid[1] * 8, grid[0] * 8) for grid, size in drawn.items())
    samples = data.CodeSamples(sorted((out / "codes").glob("train-*.tar")))
    asked = dict(batch_size=8, seed=3, task_mix={"joint": 0.5, "text_to_image": 0.5}, tag_dropout=0.1, sort_window=16)
    whole, *halves = (
        data.TokenBatches(samples, model.vocabulary, model.text_tokenizer.encode, rank=r, world=w, **asked)
        for r, w in ((0, 1), (0, 2), (1, 2))
    )
    for step in (0, 3, 9):
        rows = [row for half in halves for row in half(step).input_ids.tolist()]
        pad = model.vocabulary.id("<pad>")
        assert [[i for i in row if i != pad] for row in whole(step).input_ids.tolist()] == [[i for i in row if i != pad] for row in rows]


def test_things_are_dropped_like_other_tags_and_grids_never(tiny_vocabulary, text_tokenizer, tmp_path):
    v = dataclasses.replace(tiny_vocabulary, things=("fish", "moth"))
    record = data.Record("k", np.zeros((1, 12), np.uint16), (2, 6), "a fish", {"plain": "a fish"}, "engraving", "shapes", [], "moth")
    data.write_shard(tmp_path / "a.tar", iter([{"__key__": "k", "json": b"{}", "codes.npy": b""}]))
    batches = data.TokenBatches(
        data.CodeSamples([tmp_path / "a.tar"]), v, text_tokenizer.encode, batch_size=1, seed=0, task_mix={"joint": 1.0}, tag_dropout=0.1
    )
    tags = [sequences.unpack(v, batches.pack(record, data.rng_for(0, p)).input_ids).tags for p in range(3000)]
    assert {tag.grid for tag in tags} == {(2, 6)}
    assert sum(tag.thing == "moth" for tag in tags) / 3000 == pytest.approx(0.81, abs=0.03)
    both = sum(bool(tag.thing) and bool(tag.style) for tag in tags) / 3000
    assert both == pytest.approx(0.9**3, abs=0.03), "each on its own, beside all together"
    rare = [
        sequences.unpack(v, batches.pack(dataclasses.replace(record, thing="comet"), data.rng_for(0, p)).input_ids).tags.thing
        for p in range(20)
    ]
    assert set(rare) == {""}
