"""The third stage: encodes image shards as code shards, `out/codes`. One task per shard, in any process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tokun import config as configs
from tokun import data
from tokun.config import Config
from tokun.data import cropping, mirror
from tokun.data.caption_words import RepetitionCounts
from tokun.data.question_wordings import QuestionWordings
from tokun.data.sample_record import questions_of
from tokun.inference.checkpoint_folder import read_settings
from tokun.inference.folders import SAMPLING, resolve
from tokun.inference.tags import count_tags
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.vocabulary import tag_word
from tokun.training.image_shapes import shape_options, shape_settings
from tokun.training.resume_settings import without
from tokun.training.run import Run
from tokun.training.start_report import style_of
from tokun.training.text_tokenizer import captions_of
from tokun.utils import checkpoint
from tokun.utils.errors import BadSample, UserError


@dataclass(frozen=True)
class CodesTask:
    """Encoding one image shard as one code shard, independently, in any process that can access both."""

    source: Path
    shard: Path
    tokenizer: Path
    config: Config
    prefix: str


def run_codes_task(task: CodesTask) -> dict[str, int]:
    """Encode the shard unless it exists. Returns how many samples were skipped, by reason."""
    if task.shard.is_file():
        return {}
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    return encode_shard(task.source, task.shard, _tokenizer_on(task.tokenizer, device), task.config, device, prefix=task.prefix)


@functools.lru_cache(maxsize=1)
def _tokenizer_on(folder: Path, device: torch.device) -> ImageTokenizer:
    return ImageTokenizer.load(folder).to(device)


def codes_tasks(run: Run) -> list[CodesTask]:
    """The tasks of `encode_shards`, in order. Raises UserError if the folder holds codes of other settings or another tokenizer."""
    config, target = run.config, run.out / "codes"
    sources = _codes_sources(config)
    tokenizer = ImageTokenizer.load(run.out / "image_tokenizer")
    asked = _codes_settings(config, tokenizer, sources)
    record = checkpoint.read_record(target / "codes.json")
    if record is not None:
        require_codes_of(target, tokenizer)
        checkpoint.require_same(target, record["settings"], asked)
        return []
    require_captions(config, sources)
    begun = checkpoint.read_record(target / "begun.json")
    if begun is not None:
        checkpoint.require_same(target, begun, asked)
    elif run.rank == 0:
        checkpoint.write_record(target / "begun.json", asked)
    run.wait()
    folder = target.resolve()  # a task may run in another folder than this one
    return [
        CodesTask(
            path.absolute(), folder / f"{split}-{number:05d}.tar", run.out.resolve() / "image_tokenizer", config, f"{split}{number:05d}-"
        )
        for split, paths in sources.items()
        for number, path in enumerate(paths)
    ]


def require_some_captions(run: Run) -> None:
    """Call `require_captions`, before the hours of the image tokenizer's training, unless the codes already exist."""
    if not (run.out / "codes" / "codes.json").is_file():
        require_captions(run.config, _codes_sources(run.config))


def _codes_sources(config: Config) -> dict[str, list[Path]]:
    return {"train": data.expand_shards(config.data.train), "val": data.expand_shards(config.data.val) if config.data.val else []}


def require_captions(config: Config, sources: dict[str, list[Path]]) -> None:
    """Raise UserError where no picture of a split has a caption, before hours of encoding. Reads as far as the first that has one."""
    for split, paths in sources.items():
        if not paths:
            continue
        looked_at = 0
        for index in (data.ShardIndex([path], one_of=data.IMAGE_SUFFIXES) for path in paths):
            looked_at += len(index)
            if any(_has_caption(index, i, config) for i in range(len(index))):
                break
        else:
            if not looked_at:
                data.ShardIndex(paths, one_of=data.IMAGE_SUFFIXES).usable()  # says what is missing
            raise UserError(f"{_split(config, split)}: none of the {looked_at} pictures has a caption: {_remedy(config, split)}")


def _has_caption(index: data.ShardIndex, i: int, config: Config) -> bool:
    try:
        return "plain" in captions_of(index.read_json(i), config)
    except (OSError, BadSample):
        return False


def _split(config: Config, split: str) -> str:
    return f"data.{split}={getattr(config.data, split)}"


def _remedy(config: Config, split: str) -> str:
    """The ways out where a split has no usable picture."""
    ways = f"name the field of the captions with data.caption_key, now {config.data.caption_key}; or caption them with tokun caption"
    return ways + ("; or hold nothing out with data.val= (empty)" if split == "val" else "")


def _codes_settings(config: Config, tokenizer: ImageTokenizer, sources: dict[str, list[Path]]) -> dict[str, Any]:
    d = config.data
    # crops of the only kind in older versions: their records do not name it, so new records do not either
    usual = config.codes.positions == "random" and not config.codes.mirror
    left_out = {"batch_size"} | ({"positions", "mirror"} if usual else set())
    things = [d.thing_key] if d.thing_key != configs.DataConfig.thing_key else []
    return {
        "fingerprint": tokenizer.fingerprint(), "codes": without(dataclasses.asdict(config.codes), left_out), "seed": config.seed,
        "keys": [d.style, d.style_key, d.subject_key, d.caption_key, *things],
        "shards": checkpoint.files_fingerprint([p for paths in sources.values() for p in paths]), **shape_settings(config),
    }  # fmt: skip


def encode_shards(run: Run) -> Path:
    """Image shards -> code shards `out/codes/{train,val}-*.tar` and `codes.json`. Resumes after the last complete shard."""
    config, target = run.config, run.out / "codes"
    tasks = codes_tasks(run)
    if not tasks:
        record = checkpoint.read_record(target / "codes.json")
        assert record is not None, "a task is left unless it exists"
        run.say(f"codes: {target} already exists and matches ({record['counts']})")
        return target
    run.say(f"codes: encoding the pictures of {len(tasks)} shard{'' if len(tasks) == 1 else 's'}, once …")
    for task in tqdm(tasks[run.rank :: run.world], desc="codes", unit="shard", disable=run.rank != 0, dynamic_ncols=True):
        if run.world == 1:  # one process only: several have different numbers of shards, and wait for each other after the last
            run.stop_if_asked()
        if skipped := run_codes_task(task):
            tqdm.write(f"codes: {task.source.name}: skipped {skipped}")
    tokenizer, sources = ImageTokenizer.load(run.out / "image_tokenizer"), _codes_sources(config)
    asked = _codes_settings(config, tokenizer, sources)
    run.wait()
    if run.rank == 0:
        counts: dict[str, int] = {}
        skips = {p.stem: json.loads(p.read_text()) for p in sorted(target.glob("*.skipped"))}
        grids, held = configs.parse_grids(config.data.grids) or (tokenizer.grid,), {}
        for split in sources:
            if not sources[split]:
                continue
            index = _encoded(run, target, split, skips)
            counts[split] = len(index)
            if split == "train":
                held = _count_held(map(index.read_json, range(len(index))), grids, config.start)
        checkpoint.write_record(
            target / "codes.json",
            {
                "fingerprint": asked["fingerprint"], "grid": list(grids[0]), "grids": [list(grid) for grid in grids],
                "fit": config.data.fit if config.data.grids else "crop", "codebook_size": tokenizer.codebook_size,
                "views": config.codes.views, "counts": counts, "skipped": skips, **held, "settings": asked,
            },
        )  # fmt: skip
        total = sum((Counter(s) for s in skips.values()), Counter())
        views = f", each in {config.codes.views} crops" if config.codes.views > 1 else ""
        left_out = f"; skipped: {', '.join(f'{n:,} {why}' for why, n in total.items())}" if total else ""
        run.say(f"codes: {counts['train']:,} training pictures and {counts.get('val', 0):,} held out{views}{left_out}")
    run.wait()
    return target


def _encoded(run: Run, target: Path, split: str, skips: dict[str, dict[str, int]]) -> data.ShardIndex:
    """The code shards of a split. Raises UserError, with what was skipped, where they hold no sample."""
    try:
        return data.CodeSamples(sorted(target.glob(f"{split}-*.tar")), cache_file=run.index(f"codes-{split}")).index
    except UserError as error:
        reasons = sum((Counter(counts) for shard, counts in skips.items() if shard.startswith(f"{split}-")), Counter())
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or error
        raise UserError(
            f"{_split(run.config, split)} has no usable picture: {why}. To go on, {_remedy(run.config, split)}; "
            f"then delete {target} and start again"
        ) from error


def _count_held(records: Iterable[dict[str, Any]], grids: Sequence[cropping.Grid], start: str = "") -> dict[str, Any]:
    """The counts of the training samples in codes.json: `tag_counts`, `register_counts`, `question_count` (samples that have questions),
    `question_wordings`, `grid_counts`, `unrepeated_words`.

    A row of tag_counts is [style, subject, count]; with things or several grids, it is [style, subject, thing, "HxW", count]. Things that
    are too rare for a tag (`common_things`) are left empty. Unrepeated words include those of the checkpoint `start` that these captions do
    not decide.
    """
    rows, registers, shapes, repetition, asked = [], Counter[str](), Counter[str](), RepetitionCounts(), 0
    questions = QuestionWordings()
    for tree in records:
        grid = cropping.grid_text(tree["grid"])
        rows.append((tree["style"], tree["subject"], tree.get("thing", ""), grid))
        others = {register: caption for register, caption in tree.get("captions", {}).items() if caption and register != "plain"}
        registers.update(["plain", *others])
        for caption in (tree["caption"], *others.values()):
            repetition.add(caption)
        shapes[grid] += 1
        asked += bool(tree.get("questions"))
        with contextlib.suppress(BadSample):  # of a shard from before malformed questions were left out
            for question, _ in questions_of(tree):
                questions.add(question)
    things = common_things(Counter(row[2] for row in rows if row[2]))
    rows = [(style, subject, thing if thing in things else "", grid) for style, subject, thing, grid in rows]
    wide = bool(things) or len(grids) > 1
    return {
        "tag_counts": count_tags(row if wide else row[:2] for row in rows),
        "register_counts": dict(sorted(registers.items())), "question_count": asked,
        "question_wordings": questions.wordings(),
        "grid_counts": {name: shapes[name] for name in map(cropping.grid_text, grids)},
        "unrepeated_words": repetition.unrepeated(read_settings(resolve(start) / SAMPLING).unrepeated_words if start else ()),
    }  # fmt: skip


LEAST_OF_THING, MOST_THINGS = 20, 400  # pictures of a thing that make it a tag; number of such tags


def common_things(counts: dict[str, int]) -> set[str]:
    """The things that become tags: the MOST_THINGS most frequent of those with LEAST_OF_THING pictures."""
    often = sorted((word for word, count in counts.items() if count >= LEAST_OF_THING), key=lambda word: (-counts[word], word))
    return set(often[:MOST_THINGS])


CPU_ROWS = 16


def encode_shard(
    source: Path, shard: Path, tokenizer: ImageTokenizer, config: Config, device: torch.device, prefix: str = ""
) -> dict[str, int]:
    """One image shard -> one code shard. Unusable samples are skipped; returns how many, by reason, and writes the
    counts beside the shard (`NAME.skipped`, JSON). A shard without a usable sample becomes an empty one."""
    c, m = config.codes, tokenizer.config
    index = data.ShardIndex([source], one_of=data.IMAGE_SUFFIXES)
    samples = data.ImageSamples(index, m.image_size, m.image_channels, 0, max(2.0, c.crop_scale[1]), **shape_options(config))
    skipped = samples.index.skipped
    if samples.index.named:
        tqdm.write(f"codes: {source.name}: left out {samples.index.skipped_summary()}")
    # a fixed batch size whatever is left of the shard, so that a picture's codes do not depend on its batch
    rows = c.batch_size if device.type == "cuda" else CPU_ROWS

    several = bool(config.data.grids)

    def load(i: int) -> str | _Views:
        """One sample with its views, or the reason to skip it. Runs in a thread, since decoding and resizing release the GIL."""
        try:
            tree, framed = samples.index.read_json(i), samples.framed(i)
            captions = captions_of(tree, config)
            asked = questions_of(tree)
            turn = c.mirror and mirror.may_be_mirrored(mirror.seen_of(captions, asked))
        except (OSError, BadSample):
            return "broken sample"
        if "plain" not in captions:
            return "no caption"
        d = config.data
        tree |= {
            "caption": captions["plain"], "captions": captions, "style": style_of(tree, config),
            "subject": tag_word(str(tree.get(d.subject_key) or tree.get("subject") or "")),
            "grid": list(framed.grid if several else tokenizer.grid),
        }  # fmt: skip
        if (thing := tag_word(str(tree.get(d.thing_key) or ""))) or "thing" in tree:
            tree["thing"] = thing
        rng, size = data.rng_for(config.seed, i, stream=3), framed.image.size
        boxes = cropping.views(framed.box, c.views, c.crop_scale, rng, None if several else size, positions=c.positions, mirror=turn)
        tree["boxes"] = [[round(x, 2) for x in (box if several else box[:3])] for box in boxes]
        if several:
            tree["boxes_of"] = list(size)  # the boxes are in pixels of the picture at this width and height
        return _Views(i, tree, framed.grid, [samples.cut(framed, box) for box in boxes])

    def usable() -> Iterator[_Views]:
        for loaded in _ahead(load, range(len(samples)), threads=2):
            if isinstance(loaded, str):
                skipped[loaded] += 1
            else:
                yield loaded

    def encoded() -> Iterator[dict[str, bytes]]:
        views, size = usable(), max(1, c.batch_size // c.views) * len(samples.grids)  # with several grids, enough of each for a batch
        while group := list(islice(views, size)):
            for sample, own in zip(group, _encode_views(group, tokenizer, rows=rows, device=device)):
                buffer = io.BytesIO()
                np.save(buffer, own, allow_pickle=False)
                yield {
                    "__key__": prefix + samples.index.key(sample.number), data.CODES_SUFFIX: buffer.getvalue(),
                    "json": json.dumps(sample.tree, ensure_ascii=False, sort_keys=True).encode(),
                }  # fmt: skip

    data.write_shard(shard, encoded(), beside=lambda: {".skipped": json.dumps(skipped, sort_keys=True).encode()} if skipped else {})
    return dict(skipped)


@dataclass(frozen=True)
class _Views:
    """A decoded sample, before it is encoded."""

    number: int
    tree: dict[str, Any]
    grid: cropping.Grid
    pixels: list[np.ndarray]  # uint8 (C, H, W) each


def _encode_views(group: Sequence[_Views], tokenizer: ImageTokenizer, *, rows: int, device: torch.device) -> list[np.ndarray]:
    """Codes uint16 (views, N) of each sample; samples of one grid are encoded together."""
    found: dict[int, np.ndarray] = {}
    for grid in dict.fromkeys(sample.grid for sample in group):
        own = [sample for sample in group if sample.grid == grid]
        pixels = data.to_float(np.stack([view for sample in own for view in sample.pixels])).to(device)
        codes = tokenizer.encode(pixels, rows=rows).cpu().numpy().astype(np.uint16).reshape(len(own), len(own[0].pixels), -1)
        found |= {sample.number: one for sample, one in zip(own, codes)}
    return [found[sample.number] for sample in group]


def require_codes_of(folder: Path, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """The record of `folder`. Raises UserError with both fingerprints if another tokenizer made its codes."""
    record = checkpoint.read_record(folder / "codes.json")
    if record is None:
        raise FileNotFoundError(f"{folder / 'codes.json'} is missing: the code shards are incomplete. Run the codes stage (train.py) again")
    if record["fingerprint"] != tokenizer.fingerprint():
        raise UserError(
            f"the codes in {folder} were made by image tokenizer {record['fingerprint']}, this one is {tokenizer.fingerprint()}: "
            f"its ids mean other patches. Delete {folder} to encode again, or restore the other tokenizer"
        )
    return record


def _ahead(function: Callable[[int], Any], items: Iterable[int], *, threads: int, most: int = 64) -> Iterator[Any]:
    """Results of the function, in order, prefetched in threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
