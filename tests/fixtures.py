"""What several rooms' tests share: a tiny random Tokun, made on the spot, and a folder of toy shards."""

import io
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import toy
from tests import small_runs
from tokun import data
from tokun.config import GeneratorConfig, ImageTokenizerConfig
from tokun.data import cropping, to_float
from tokun.inference.model import Tokun
from tokun.models.generator import make_generator
from tokun.tokenizers.grammar import GRAMMAR, IMAGE_STATES, TEXT_STATES
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.text import TextTokenizer
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.utils.memory import keep_memory

keep_memory()  # as training does: the system clears no pages for memory that the next test takes again

TINY = dict(image_size=32, downsample=8, channels=[16, 16], blocks=1, attention=True, latent_dim=8, codebook_size=64, codebook_dim=4)


@pytest.fixture(scope="session")
def toy_images() -> torch.Tensor:
    """(24, 1, 32, 32) in [-1, 1]."""
    return torch.stack([to_float(np.array(toy.draw(5, i, 32)[0]))[None] for i in range(24)])


@pytest.fixture(scope="session")
def toy_captions() -> list[str]:
    return [caption for i in range(150) for caption in toy.draw(5, i, 32)[1]["captions"].values()]


@pytest.fixture(scope="session")
def text_tokenizer(toy_captions) -> TextTokenizer:
    return TextTokenizer.train(toy_captions, vocab_size=400)


@pytest.fixture(scope="session")
def tiny_image_tokenizer(toy_images) -> ImageTokenizer:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**TINY))
    tokenizer.train()(toy_images)  # the first batch places the codebook
    tokenizer.eval().reindex()
    return tokenizer


@pytest.fixture(scope="session")
def tiny_vocabulary(text_tokenizer) -> Vocabulary:
    return Vocabulary(
        text_size=text_tokenizer.size, codebook_size=64, styles=("engraving", "etching"), subjects=("scenery", "shapes"),
        grids=((4, 4), (2, 6)), max_text=24, illegal_text=text_tokenizer.illegal_ids,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tiny_image_tokenizer, text_tokenizer, tiny_vocabulary) -> Tokun:
    """Random weights; nobody may change them."""
    tags = [("engraving", "scenery", 3), ("etching", "shapes", 2), ("etching", "", 1)]
    return Tokun(tiny_image_tokenizer, text_tokenizer, tiny_vocabulary, random_generator(tiny_vocabulary), tag_counts=tags)


@pytest.fixture(scope="session")
def shaped_model(tiny_image_tokenizer, text_tokenizer, tiny_vocabulary) -> Tokun:
    """A model of things, registers and five shapes, two of 16 codes, two of 15 and one of 12. Random weights; nobody may change them."""
    v = replace(
        tiny_vocabulary, grids=((4, 4), (2, 8), (3, 5), (5, 3), (2, 6)), things=("house", "moth", "tree"), registers=("plain", "era")
    )
    tags = [
        ("engraving", "scenery", "tree", "4x4", 30), ("engraving", "scenery", "tree", "3x5", 30),
        ("engraving", "scenery", "house", "5x3", 30),
        ("etching", "shapes", "moth", "2x8", 30), ("etching", "shapes", "", "2x6", 30),
    ]  # fmt: skip
    return Tokun(tiny_image_tokenizer, text_tokenizer, v, random_generator(v), tag_counts=tags, tasks=("joint", "text_to_image"))


@pytest.fixture(scope="session")
def shaped_folder(shaped_model, tmp_path_factory) -> Path:
    """It, saved; copy it before changing it."""
    folder = tmp_path_factory.mktemp("shaped") / "checkpoint"
    shaped_model.save(folder)
    return folder


def random_generator(v: Vocabulary):
    torch.manual_seed(1)
    generator = make_generator(
        GeneratorConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=False),
        vocab_size=v.size, max_length=128, pad=v.id("<pad>"), bos=v.id("<bos>"), eos=v.id("<eos>"),
    )  # fmt: skip
    with torch.no_grad():  # wider than the initial 0.02: likely and unlikely ids, and what came before matters
        for matrix in (p for p in generator.parameters() if p.ndim == 2):
            matrix.normal_(std=0.15)
    return generator


@pytest.fixture(scope="session")
def checkpoint_folder(tiny_model, tmp_path_factory) -> Path:
    """The tiny model, saved; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    tiny_model.save(folder, card="# tiny\n")
    return folder


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory) -> Path:
    """A folder with train-00000.tar … train-00002.tar: 24 pictures of 32 px, ten a shard."""
    folder = tmp_path_factory.mktemp("shards")
    toy.write_shards(folder, 24, 5, 32, shard_size=10)
    return folder


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory) -> Path:
    """48 training and 16 held-out toy pictures of 32 px: what tests/small_runs.py trains on."""
    folder = tmp_path_factory.mktemp("small")
    toy.write_shards(folder, 48, 0, 32, "train", shard_size=32)
    toy.write_shards(folder, 16, 1, 32, "val")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_shards) -> tuple[Path, Path]:
    """(config file, output folder) of a small run that ended; nobody may change it."""
    config = small_runs.write_config(tmp_path_factory.mktemp("finished"), small_shards)
    return config, small_runs.run_stages(config)


def square_views(width: int, height: int, count: int, scale, rng, **how) -> list[data.Box]:
    """The views of a picture in a run without grids: (left, top, side) of squares."""
    frame = cropping.crop_box(width, height, data.ONE_SQUARE[0])
    return [box[:3] for box in cropping.views(frame, count, scale, rng, (width, height), **how)]


ENGRAVINGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "engravings" / "val-00000.tar"


@pytest.fixture
def engravings():
    """A function: the first so many real engravings, as PIL pictures, where they lie beside the project."""
    if not ENGRAVINGS.is_file():
        pytest.skip("the engravings are not beside the project (../shared)")

    def first(count: int) -> list[Image.Image]:
        with tarfile.open(ENGRAVINGS) as tar:
            names = [name for name in tar.getnames() if name.endswith(".webp")][:count]
            return [Image.open(io.BytesIO(tar.extractfile(name).read())) for name in names]

    return first


@pytest.fixture(autouse=True)
def signals_keep_their_meaning():
    """Runs that a test opens in this process catch SIGTERM and Ctrl-C; after the test they end the process again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def slow_next(v, state, token, spans, tags):
    """The state after an id, by GRAMMAR and the rules that grammar.py states, said again one id at a time; None where it may not stand.

    `spans` are the ids of each state so far, `tags` may hold the grid.
    """
    kind, length = v.class_of(token), len(spans.get(state, ()))
    target, (rows, columns) = dict(GRAMMAR[state]).get(kind), tags.get("grid") or v.default_grid
    if state in IMAGE_STATES:
        wrong = (kind == "code") == (length == rows * columns)
    elif state in TEXT_STATES and target != state:
        wrong = length == 0
    else:
        wrong = kind == "text" and (length >= v.max_text or token in v.illegal_text)
    return None if wrong else target
