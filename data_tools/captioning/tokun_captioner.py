"""A tokun checkpoint as a captioner: it needs no download and runs on any CPU. Its captions are drafts, as good as its training.

Knows pictures, not shards or registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import tokun
from data_tools.captioning.local_models import Generation, device_and_dtype, folder_digest
from tokun.inference.folders import is_bundled, resolve


class TokunCaptioner:
    """`bundled`, or the folder of a checkpoint or of a run. One picture at a time: pictures of one shape are seldom many."""

    shape, fixed_prompt = "caption", ""

    def __init__(self, model: str, generation: Generation) -> None:
        device, dtype = device_and_dtype(generation)
        folder = resolve(model)
        self.model = tokun.load(folder, device=device, dtype=dtype)
        self.name = "tokun bundled" if is_bundled(model) else Path(model).resolve().name
        self.revision = folder_digest(sorted(folder.rglob("*")), folder)

    def write(self, images: Sequence[Image.Image | None], prompts: list[str], *, seed: int = 0, temperature: float = 0.0) -> list[str]:
        """A plain caption for each picture. Temperature 0 chooses the most likely pieces."""
        with torch.inference_mode():
            return [self.model.caption(image, seed=seed, temperature=temperature)[0].text for image in images if image is not None]
