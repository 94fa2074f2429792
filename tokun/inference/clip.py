"""CLIP: how well words fit a picture, according to an open_clip model. Torch is imported when a model is loaded.

score = Clip("ViT-B-32:laion2b_s34b_b79k").fit
model.best_of(42, 4, 8, score=score)            # the best of eight candidates, four times
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from PIL import Image

from tokun.utils import network_access
from tokun.utils.errors import UserError, first_line
from tokun.utils.optional_packages import need

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tokun.inference.model import Pair

BATCH = 64


class Clip:
    """Cosine similarity of pictures and texts according to an open_clip model.

    `name` is 'hf-hub:ORG/NAME', a folder, or ARCHITECTURE:WEIGHTS with an open_clip tag or a file (ViT-B-32:laion2b_s34b_b79k).
    """

    def __init__(self, name: str, *, device: str = "auto", option: str = "--clip"):
        """Raises UserError, naming `option`, for a model that cannot be loaded."""
        open_clip = need("open_clip", extra="clip")
        self.name, self.device = name, choose_device(device)
        model, weights = split_clip_name(name, option)
        try:
            with network_access.fetched(weights or model.partition(":")[2], option):
                self.model, self.transform = open_clip.create_model_from_pretrained(model, pretrained=weights, device=self.device)
                self.tokenizer = open_clip.get_tokenizer(model)
        except network_access.NotFetched:
            raise
        except (RuntimeError, ValueError, OSError, KeyError, AssertionError, UnpicklingError, EOFError) as error:
            reason = "its file holds no weights" if isinstance(error, (UnpicklingError, EOFError)) else first_line(error)
            raise UserError(
                f"{option} {name} cannot be loaded by open_clip: {reason}. "
                "Give ViT-B-32:laion2b_s34b_b79k, hf-hub:ORG/NAME, a folder, or ARCHITECTURE:WEIGHTS-FILE"
            ) from error
        self.model.eval()

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, D) float32 of length 1, on the CPU."""
        import torch

        with torch.inference_mode():
            parts = [torch.stack([self.transform(image) for image in images[i : i + BATCH]]) for i in range(0, len(images), BATCH)]
            return torch.cat([self.model.encode_image(part.to(self.device), normalize=True).float().cpu() for part in parts])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32 of length 1, on the CPU."""
        import torch

        with torch.inference_mode():
            parts = self.tokenizer(list(texts)).split(BATCH)
            return torch.cat([self.model.encode_text(part.to(self.device), normalize=True).float().cpu() for part in parts])

    def similarities(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """(images, texts) cosines."""
        return (self.features(images) @ self.text_features(texts).T).numpy()

    def score(self, pairs: Sequence[tuple[Image.Image, Sequence[str]]]) -> list[list[float]]:
        """For each picture, the similarity of each of its texts, in [-1, 1]."""
        images, texts = self.features([image for image, _ in pairs]), self.text_features([text for _, texts in pairs for text in texts])
        each = texts.split([len(own) for _, own in pairs])
        return [(found @ image).tolist() for found, image in zip(each, images)]

    def fit(self, pairs: Sequence[Pair]) -> list[float]:
        """How well each picture's own caption fits it, in [-1, 1]: the `score` of `Tokun.best_of`."""
        return [row[0] for row in self.score([(pair.image, [pair.caption]) for pair in pairs])]


def choose_device(device: str) -> str:
    """'auto' is the GPU of this process's LOCAL_RANK, if any. Raises UserError for a missing GPU."""
    import torch

    if device == "auto":
        gpus = torch.cuda.device_count()
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch finds no GPU: leave it out, or give cpu")
    return device


def split_clip_name(name: str, option: str = "--clip") -> tuple[str, str | None]:
    """'ViT-B-32:tag' -> (architecture, weights); a name that includes its weights -> (name, None)."""
    if Path(name).is_dir():
        return f"local-dir:{name}", None
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    model, colon, weights = name.partition(":")
    if not colon or not weights:
        raise UserError(f"{option} {name} names no weights: give ViT-B-32:laion2b_s34b_b79k, hf-hub:ORG/NAME or a folder")
    return model, weights
