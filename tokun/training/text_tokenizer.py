"""The first stage: trains sentencepiece on the captions, writes `out/text_tokenizer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokun import data
from tokun.config import Config
from tokun.data import captions
from tokun.data.sample_record import captions_by_register, plain_of, questions_of, text_in
from tokun.inference.folders import TEXT_TOKENIZER
from tokun.tokenizers.text import PretrainedTextTokenizer, TextTokenizer, normalize
from tokun.training.initial_checkpoint import starting_model
from tokun.training.resume_settings import started_from
from tokun.training.run import Run
from tokun.utils import checkpoint
from tokun.utils.errors import BadSample


def train_text_tokenizer(run: Run) -> Path:
    """Train sentencepiece on the training captions (or use the tokenizer of `start` or the pretrained LM) -> `out/text_tokenizer`."""
    config, target = run.config, run.out / "text_tokenizer"
    paths = data.expand_shards(config.data.train)
    asked = {
        "text_tokenizer": dataclasses.asdict(config.text_tokenizer), "pretrained": config.generator.pretrained,
        "caption_key": config.data.caption_key, "shards": checkpoint.files_fingerprint(paths), **started_from(config),
    }  # fmt: skip
    run.recover(target)
    record = checkpoint.read_record(target / "stage.json")
    if record is not None:
        checkpoint.require_same(target, record["settings"], asked)
        run.say(f"text tokenizer: {target} already exists and matches")
    elif run.rank == 0:
        taken = config.start or config.generator.pretrained
        shards = f"{len(paths)} shard{'' if len(paths) == 1 else 's'} …"
        run.say(
            f"text tokenizer: that of {taken}; looking at the captions of {shards}"
            if taken
            else f"text tokenizer: learning from the captions of {shards}"
        )
        index = data.ShardIndex(paths).usable()
        if taken:
            captions.tell(run.say, index, caption_key=config.data.caption_key, from_nothing=False)
        tokenizer: TextTokenizer | PretrainedTextTokenizer
        if config.start:
            tokenizer = starting_model(config).text_tokenizer
        elif config.generator.pretrained:
            tokenizer = PretrainedTextTokenizer.from_pretrained(config.generator.pretrained)
        else:
            tokenizer = TextTokenizer.train(_texts(run, index), vocab_size=config.text_tokenizer.vocab_size)
        with checkpoint.whole_directory(target) as folder:
            tokenizer.save(folder / TEXT_TOKENIZER)
            checkpoint.write_record(
                folder / "stage.json", {"settings": asked, "size": tokenizer.size, "fingerprint": tokenizer.fingerprint()}
            )
        run.say(f"text tokenizer: {tokenizer.size} pieces")
    run.wait()
    return target


def load_text_tokenizer(run: Run) -> TextTokenizer | PretrainedTextTokenizer:
    path = run.out / "text_tokenizer" / TEXT_TOKENIZER
    return PretrainedTextTokenizer.load(path) if path.is_dir() else TextTokenizer.load(path)


def _texts(run: Run, index: data.ShardIndex) -> Iterator[str]:
    """Every text for the generator: captions in all registers, questions and answers. Then prints the warnings about the captions."""
    config, seen = run.config, captions.Seen(run.config.data.caption_key)
    for i in range(len(index)):
        try:
            tree = index.read_json(i)
        except (OSError, BadSample):
            seen.broken += 1  # counted by its reason where the sample is encoded
            continue
        seen.add(tree)
        try:
            texts = [*captions_of(tree, config).values(), *(text_in(text) for pair in questions_of(tree) for text in pair)]
        except BadSample:
            continue
        yield from texts
    captions.warn(run.say, seen.doubts())


def captions_of(tree: dict[str, Any], config: Config) -> dict[str, str]:
    """register -> normalised caption of a sample's JSON, without empty ones. Raises BadSample if `captions` is not a mapping."""
    found = {**captions_by_register(tree), "plain": plain_of(tree, config.data.caption_key)}
    return {register: text for register, raw in found.items() if (text := normalize(text_in(raw)))}
