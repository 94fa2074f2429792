"""Pictures of image shards and the image tokenizer's batches of crops. cropping.py decides which part of a picture is used."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokun.data import cropping, image_files
from tokun.data.sample_order import BucketOrder, Order, check_batch, positions_of, rng_for
from tokun.data.shards import IMAGE_SUFFIXES, ShardIndex, expand_shards, load_arrays, save_arrays
from tokun.utils.errors import BadSample, UserError

Box = tuple[float, float, float]  # left, top, side of a square crop, in pixels of the picture; a negative side means mirrored
ONE_SQUARE: tuple[cropping.Grid, ...] = ((1, 1),)  # without grids: pictures of image_size by image_size, treated as one code


def centre_box(width: int, height: int) -> Box:
    return cropping.crop_box(width, height, ONE_SQUARE[0])[:3]


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Cut a square box and resize it: uint8 (C, size, size); mirrored where its side is negative."""
    return cropping.cut(image, (*box, abs(box[2])), (size, size))


decode_image = image_files.decode_as


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape."""
    return torch.as_tensor(np.asarray(images)).float() / 127.5 - 1


@dataclass
class ImageSamples:
    """Pictures of image shards, decoded on demand; a broken one is counted and replaced by the next.

    Without `grids`, each is a square of image_size. With them, it is fitted (`fit`) to the grid nearest to its shape, at `downsample`
    pixels a code.
    """

    index: ShardIndex
    image_size: int
    channels: int
    cache_bytes: int = 0
    max_scale: float = 1.4
    grids: tuple[cropping.Grid, ...] = ()
    downsample: int = 0
    fit: str = "auto"
    cache_file: Path | None = None  # cache file of the pictures' sizes
    _cache: dict[int, cropping.Framed] = field(default_factory=dict)
    _cached_bytes: int = 0
    _broken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        assert not self.grids or self.downsample > 0
        if not self.grids:
            self.grids, self.downsample, self.fit = ONE_SQUARE, self.image_size, "crop"

    @classmethod
    def open(
        cls, pattern: str, *, image_size: int, channels: int, cache_gb: float = 0.0, max_scale: float = 1.4, cache_file: Path | None = None,
        grids: tuple[cropping.Grid, ...] = (), downsample: int = 0, fit: str = "auto",
    ) -> ImageSamples:  # fmt: skip
        index = ShardIndex(expand_shards(pattern), need=(), one_of=IMAGE_SUFFIXES, cache_file=cache_file).usable()
        sizes = cache_file.with_name(cache_file.name + ".sizes") if cache_file else None
        return cls(index, image_size, channels, int(cache_gb * 2**30), max_scale, grids, downsample, fit, sizes)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> bytes:
        return self.index.read(i, self.index.image_suffix(i))

    def framed(self, i: int, shape: int | None = None) -> cropping.Framed:
        """Sample i framed for its nearest grid (or grid number `shape`), reduced to at most max_scale times the grid's pixels.

        Raises OSError or BadSample if it is broken.
        """
        if i in self._cache and shape is None:
            return self._cache[i]
        image = self.picture(i)
        grid = self.grids[cropping.nearest_grid(*image.size, self.grids) if shape is None else shape]
        framed = cropping.reduced(cropping.fit_to(image, grid, self.downsample, self.fit), self.downsample, self.max_scale)
        size = framed.image.width * framed.image.height * self.channels
        if shape is None and self._cached_bytes + size <= self.cache_bytes:
            self._cache[i] = framed
            self._cached_bytes += size
        return framed

    def picture(self, i: int) -> Image.Image:
        """Sample i, upright and in full size. Raises OSError or BadSample if it is broken."""
        return image_files.decode_as(self.read(i), self.channels)

    def whole(self, i: int) -> cropping.Framed:
        """Like `framed`, but a broken sample is counted and replaced by the next intact one, of the same grid if possible."""
        several = len(self.grids) > 1
        for j in (j % len(self) for j in range(i, i + len(self))):
            if j in self._broken or (several and j != i and self.shapes[j] != self.shapes[i]):  # for i itself no sizes are needed
                continue
            try:
                return self.framed(j)
            except (OSError, BadSample):
                self._broken.add(j)
                self.index.skipped["broken picture"] = len(self._broken)
        for j in range(len(self) if several else 0):  # no sample of its grid is intact
            with contextlib.suppress(OSError, BadSample):
                return self.framed(j, max(0, int(self.shapes[i])))
        raise UserError(f"no picture of {self.index.paths[0]} and its sibling shards can be decoded")

    def cut(self, framed: cropping.Framed, box: cropping.Box) -> np.ndarray:
        """A box cropped and resized to the grid's pixels: uint8 (C, H, W)."""
        rows, columns = framed.grid
        return cropping.cut(framed.image, box, (columns * self.downsample, rows * self.downsample), framed.paper)

    @cached_property
    def shapes(self) -> np.ndarray:
        """(n,) int16: the index of each picture's grid; -1 if its header cannot be read."""
        sizes = self.sizes
        known = {(w, h): cropping.nearest_grid(w, h, self.grids) if w else -1 for w, h in np.unique(sizes, axis=0).tolist()}
        return np.fromiter((known[w, h] for w, h in sizes.tolist()), np.int16, len(sizes))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n, 2) int32: width and height of each picture, from its header; 0, 0 if it cannot be read.
        Cached beside the index: headers are read once."""
        stamp = self.index.stamp() + b" upright"  # caches without "upright" hold sizes before EXIF rotation
        if self.cache_file is not None and (known := load_arrays(self.cache_file, stamp, 1)) is not None:
            return known[0]
        sizes = np.zeros((len(self), 2), np.int32)
        for i in tqdm(range(len(self)), desc="sizes of pictures", unit="picture", dynamic_ncols=True, leave=False, delay=2):
            with contextlib.suppress(OSError, BadSample):
                sizes[i] = image_files.size_of(self.read(i))
        if self.cache_file is not None:
            with contextlib.suppress(OSError):  # as with the index
                save_arrays(self.cache_file, stamp, [sizes])
        return sizes


class ImageBatches:
    """Random crops for the image tokenizer: step -> float (batch_size / world, C, H, W), all of one grid's size."""

    def __init__(
        self, samples: ImageSamples, *, batch_size: int, scale: Sequence[float], seed: int, rank: int = 0, world: int = 1, threads: int = 0
    ):
        check_batch(batch_size, world)
        self.samples, self.batch_size, self.scale, self.seed = samples, batch_size, scale, seed
        self.rank, self.world = rank, world
        self.order = Order(len(samples), seed) if len(samples.grids) == 1 else BucketOrder(samples.shapes, seed, batch_size)
        self.pool = ThreadPoolExecutor(threads) if threads > 0 else None

    def __call__(self, step: int) -> Tensor:
        items = [(position, self.order[position]) for position in self.positions(step)]
        crops = list(self.pool.map(self._item, items) if self.pool else map(self._item, items))
        return to_float(np.stack(crops))

    def positions(self, step: int) -> Sequence[int]:
        """Stream positions of this process's rows at `step`."""
        return positions_of(step, self.batch_size, self.rank, self.world)

    def _item(self, item: tuple[int, int]) -> np.ndarray:
        position, i = item
        framed = self.samples.whole(i)
        return self.samples.cut(framed, cropping.zoomed(framed.box, self.scale, rng_for(self.seed, position), framed.image.size))


def first_frames(samples: ImageSamples, n: int) -> list[Tensor]:
    """The first n pictures framed for their grids: float (k, C, H, W) for each grid in use."""
    found: dict[cropping.Grid, list[np.ndarray]] = {}
    for i in range(min(n, len(samples))):
        framed = samples.whole(i)
        found.setdefault(framed.grid, []).append(samples.cut(framed, framed.box))
    return [to_float(np.stack(found[grid])) for grid in samples.grids if grid in found]


def centre_crops(samples: ImageSamples, n: int) -> Tensor:
    """The centres of the first n pictures, float (n, C, S, S); for samples without grids."""
    (one,) = first_frames(samples, n)
    return one
