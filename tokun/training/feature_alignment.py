"""The targets of `models.feature_alignment`: features of the training pictures, `out/features`, found again by their codes.

Each view of each code shard is decoded and given to SqueezeNet 1.1 (Iandola et al. 2016). The principal components of the network's last
layer describe it:

    basis.safetensors      means, deviations and components of some pictures
    train-00000/keys.npy   uint64 (n,) hash of each view's codes
    .../whole.npy          float16 (n, WHOLE)
    .../places.npy         float16 (cells, PLACE): a cell for every 2 x 2 codes, view after view
    .../starts.npy         int64 (n,) first cell of each view
    .../grids.npy          int64 (n, 2) rows and columns of its codes
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tokun import data
from tokun.models.feature_alignment import PLACE, WHOLE
from tokun.models.kernels import has_bfloat16
from tokun.models.losses import SqueezeNetDistance
from tokun.tokenizers.image import ImageTokenizer
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training.run import Run
from tokun.utils import checkpoint, files

ROWS = 32  # pictures decoded together
SAMPLED = 3000  # pictures that determine the components


class Targets:
    """Finds the features of pictures by their codes."""

    def __init__(self, folders: Sequence[Path], vocabulary: Vocabulary):
        self.v = vocabulary
        keys = [np.load(folder / "keys.npy") for folder in folders]
        self.whole, self.places, self.starts, self.grids = (
            [np.load(folder / f"{name}.npy", mmap_mode="r") for folder in folders] for name in ("whole", "places", "starts", "grids")
        )
        every = np.concatenate(keys)
        self.order = every.argsort(kind="stable")
        self.keys = every[self.order]
        self.firsts = np.cumsum([0, *map(len, keys)])  # of each folder

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64 (B, T) -> positions (N,) of all codes in the flattened ids, and their targets, float32 (N, WHOLE) and (N, PLACE)."""
        v, rows = self.v, ids.numpy()
        positions, whole, places = [], [], []
        for row, own in enumerate(rows):
            at = np.flatnonzero(v.is_code(own))
            if not len(at):
                continue
            folder, number = self.find(v.codes_of_ids(own[at]).astype(np.uint16))
            positions.append(at + row * ids.shape[1])
            whole.append(np.broadcast_to(self.whole[folder][number], (len(at), WHOLE)))
            places.append(self.places[folder][self.starts[folder][number] + _cell_of_code(*self.grids[folder][number])])
        if not positions:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, WHOLE), torch.zeros(0, PLACE)
        return torch.from_numpy(np.concatenate(positions)), _floats(whole), _floats(places)

    def count(self, ids: Tensor) -> int:
        """The number of codes in ids."""
        return int(self.v.is_code(ids).sum())

    def find(self, codes: np.ndarray) -> tuple[int, int]:
        """(folder, number in it) of the view with these codes."""
        key = _key(codes)
        place = int(self.keys.searchsorted(key))
        assert place < len(self.keys) and self.keys[place] == key, "the features are those of other codes"
        number = int(self.order[place])
        folder = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return folder, number - int(self.firsts[folder])


def targets(run: Run, tokenizer: ImageTokenizer, codes: str, vocabulary: Vocabulary) -> Targets:
    """The features of the run's training pictures. Missing ones are computed, shard by shard.

    codes: the fingerprint of the code shards.
    """
    folder, weights = run.out / "features", run.config.train.align_features
    paths = sorted((run.out / "codes").glob("train-*.tar"))
    asked = {"codes": codes, "shards": checkpoint.files_fingerprint(paths), "network": _digest(weights)}
    record = folder / "features.json"
    if (found := checkpoint.read_record(record)) is not None:
        checkpoint.require_same(folder, found, asked)
    elif run.rank == 0:
        checkpoint.write_record(record, asked)
    run.wait()
    folders = [folder / path.stem for path in paths]
    if not all(map(Path.is_dir, folders)):
        device = torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
        extractor = FeatureExtractor(tokenizer.to(device), weights, device)
        if run.rank == 0 and not (folder / "basis.safetensors").is_file():
            run.say(f"generator: computing the features of {SAMPLED:,} pictures for train.align_weight …")
            extractor.write_basis(paths, folder / "basis.safetensors")
        run.wait()
        extractor.read_basis(folder / "basis.safetensors")
        for path, target in tqdm(list(zip(paths, folders))[run.rank :: run.world], desc="features", unit="shard", disable=run.rank != 0):
            if run.world == 1:  # several processes wait for each other after the last shard
                run.stop_if_asked()
            if not target.is_dir():
                extractor.write_shard(path, target)
        run.wait()
    return Targets(folders, vocabulary)


class FeatureExtractor:
    """Decodes codes and describes each picture by its features in the network."""

    def __init__(self, tokenizer: ImageTokenizer, weights: str, device: torch.device):
        self.tokenizer, self.device = tokenizer, device
        self.network = SqueezeNetDistance(weights).to(device)
        self.half = has_bfloat16(device)
        self.basis: dict[str, Tensor] = {}

    @torch.inference_mode()
    def features(self, codes: np.ndarray, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """codes uint16 (B, N) of one grid -> the last layer's channels, float32 (B, 512) of the whole and (B, cells, 512) of its places."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            pictures = self.tokenizer.decode(torch.from_numpy(codes.astype(np.int64)).to(self.device), grid)
            maps = self.network.taps(pictures)[-1].float().cpu()
        places = F.interpolate(maps, _cell_grid(grid), mode="area")
        return maps.mean((2, 3)), places.flatten(2).transpose(1, 2)

    def write_basis(self, paths: Sequence[Path], target: Path) -> None:
        samples = data.CodeSamples(paths)
        some = range(0, len(samples), max(1, len(samples) // SAMPLED))
        wholes, places = [], []
        for codes, grid in _batches((record.codes[:1], record.grid) for record in map(samples.whole_record, some)):
            whole, own = self.features(codes, grid)
            wholes.append(whole)
            places.append(own[:, :: max(1, own.shape[1] // 4)].flatten(0, 1))
        basis = _components("whole", torch.cat(wholes), WHOLE) | _components("place", torch.cat(places), PLACE)
        with files.whole_file(target) as aside:
            save_file(basis, aside)

    def read_basis(self, path: Path) -> None:
        self.basis = load_file(path)

    def write_shard(self, path: Path, target: Path) -> None:
        samples = data.CodeSamples([path])
        keys, wholes, places, sizes, grids = [], [], [], [], []
        for codes, grid in _batches((record.codes, record.grid) for record in map(samples.whole_record, range(len(samples)))):
            whole, own = self.features(codes, grid)
            keys += map(_key, codes)
            wholes.append(self.described("whole", whole))
            places.append(self.described("place", own).reshape(-1, PLACE))
            sizes += [own.shape[1]] * len(codes)
            grids += [grid] * len(codes)
        with checkpoint.whole_directory(target) as folder:
            np.save(folder / "keys.npy", np.array(keys, np.uint64))
            np.save(folder / "whole.npy", np.concatenate([np.zeros((0, WHOLE), np.float16), *wholes]))
            np.save(folder / "places.npy", np.concatenate([np.zeros((0, PLACE), np.float16), *places]))
            np.save(folder / "starts.npy", np.cumsum([0, *sizes])[:-1])
            np.save(folder / "grids.npy", np.array(grids, np.int64).reshape(-1, 2))

    def described(self, what: str, channels: Tensor) -> np.ndarray:
        """(…, 512) -> float16 (…, WHOLE or PLACE)."""
        scaled = (channels - self.basis[f"{what}_mean"]) / self.basis[f"{what}_spread"]
        return (scaled @ self.basis[f"{what}_components"]).half().numpy()


def _floats(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _components(what: str, channels: Tensor, size: int) -> dict[str, Tensor]:
    mean, spread = channels.mean(0), channels.std(0, correction=0) + 1e-3
    scaled = ((channels - mean) / spread).double()
    vectors = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -size:].flip(1)
    return {f"{what}_mean": mean, f"{what}_spread": spread, f"{what}_components": vectors.float().contiguous()}


def _batches(views: Iterator[tuple[np.ndarray, tuple[int, int]]]) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """(codes (views, N), grid) of samples -> batches of codes (B, N) of one grid."""
    waiting: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for codes, grid in views:
        waiting[grid] += list(codes)
        while len(waiting[grid]) >= ROWS:
            yield np.stack(waiting[grid][:ROWS]), grid
            del waiting[grid][:ROWS]
    for grid, rest in waiting.items():
        if rest:
            yield np.stack(rest), grid


def _cell_grid(grid: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // 2), -(-grid[1] // 2)


@functools.lru_cache(maxsize=64)
def _cell_of_code(height: int, width: int) -> np.ndarray:
    """(height * width,) the cell of each code, in raster order."""
    rows, columns = np.indices((height, width))
    return (rows // 2 * _cell_grid((height, width))[1] + columns // 2).ravel()


def _key(codes: np.ndarray) -> np.uint64:
    digest = hashlib.blake2b(np.ascontiguousarray(codes, "<u2").tobytes(), digest_size=8).digest()
    return np.frombuffer(digest, "<u8")[0]


def _digest(weights: str) -> str:
    """The digest of the file of weights; without a file, the name of torchvision's weights."""
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:16] if weights else "squeezenet1_1"
