"""Learning from preferences (`config.dpo`): direct preference optimisation, Rafailov et al. 2023.

    loss = -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))

p is the model, q the model at the start (with an adapter: the base). q is computed once before the first step, so that no second model
is kept. Why not trl's DPOTrainer: it renders text with a chat template and a tokenizer, sums over whole completions (no choice between
codes and words), and uses the Trainer's loop, whose resume, averages and ZeRO states differ from those of the other stages here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokun import data
from tokun.data.tokens import collate
from tokun.inference import preferences
from tokun.inference.model import Tokun
from tokun.models import losses
from tokun.models.generator import uncompiled
from tokun.tokenizers import sequences
from tokun.tokenizers.sequences import Packed
from tokun.tokenizers.vocabulary import Vocabulary
from tokun.training.engine import summed
from tokun.training.fine_tuning import TuningStage, run_stage, settings_of
from tokun.training.run import Run
from tokun.utils import checkpoint
from tokun.utils.errors import UserError


def train_preferences(run: Run) -> Path:
    """Learn from `dpo.pairs` -> `out/adapter`, or without an adapter `out/checkpoint`. Raises UserError for settings out of range."""
    d = run.config.dpo
    if d.beta <= 0:
        raise UserError(f"dpo.beta is {d.beta}; it must be above 0: the larger, the closer the model stays to the start")
    if not 0 <= d.label_smoothing < 0.5:
        raise UserError(f"dpo.label_smoothing is {d.label_smoothing}; it must be at least 0 and below 0.5")
    files = checkpoint.files_fingerprint([path for part in (d.pairs, d.val) if part for path in data.expand_shards(part)])
    how = {"beta": d.beta, "over": d.over, "label_smoothing": d.label_smoothing, "pairs": files}
    base = run.take_start()
    settings = settings_of(run.config, base, dpo=how)
    what = {"both": "codes and words", "image": "codes", "text": "words"}[d.over]
    return run_stage(
        run, PreferenceStage.name, settings, lambda: PreferenceStage(run, base, settings),
        lambda stage: f"Learned from {len(stage.items)} preferences (DPO over {what}, beta {d.beta:g}).",
    )  # fmt: skip


@dataclass(frozen=True)
class PairBatch:
    """B preferences: ids and labels (2, B, T), chosen first; reference (2, B) log-likelihoods under the start."""

    input_ids: Tensor
    labels: Tensor
    reference: Tensor
    share: float  # weight of one preference in the global batch's mean


class PreferenceStage(TuningStage):
    """Trains on chosen and rejected sequences."""

    name, what = "preferences", "preferences"
    sums: ClassVar[tuple[str, ...]] = ("count", "loss", "right", "margin", "chosen", "rejected")

    def __init__(self, run: Run, base: Tokun, settings: dict[str, Any]) -> None:
        d, v = run.config.dpo, base.vocabulary
        encode = base.text_tokenizer.encode
        self.items = preferences.read(d.pairs, v, encode)
        held = preferences.read(d.val, v, encode) if d.val else []
        self.is_image = v.is_image
        super().__init__(run, base, v, settings, held=len(held))
        if other := sum(not pair.same for pair in self.items):
            run.say(f"preferences: {other} of {len(self.items)} compare samples with different tags: each is scored given its own")
        everything = [*self.items, *held]
        reference = self._reference(everything)
        self.reference = reference[:, : len(self.items)]
        self.held_out = [
            self._batch(held[i : i + 16], reference[:, len(self.items) + i : len(self.items) + i + 16], share=1.0)
            for i in range(0, len(held), 16)
        ]

    def pack(self, items: Sequence[int], positions: Sequence[int]) -> PairBatch:
        return self._batch([self.items[i] for i in items], self.reference[:, list(items)], share=1 / self.train.batch_size)

    def _batch(self, pairs: Sequence[preferences.Preference], reference: Tensor, *, share: float) -> PairBatch:
        made = collate([*(p.chosen for p in pairs), *(p.rejected for p in pairs)], self.vocabulary.id("<pad>"))
        labels = scored(made.labels, [*(p.chosen for p in pairs), *(p.rejected for p in pairs)], self.vocabulary, self.config.dpo.over)
        shape = (2, len(pairs), -1)
        return PairBatch(made.input_ids.view(shape), labels.view(shape), reference, share)

    def measure_start(self) -> str:
        """Nothing: before the first step the model is its own reference, and every figure is a constant."""
        return ""

    def likelihoods(self, batch: PairBatch, rows: slice, *, trained: bool) -> Tensor:
        """Log-likelihoods (nats) of the scored parts of these rows' sequences: (2, B). `trained`: through the engine, for gradients."""
        device = self.engine.device
        ids, labels = (part[:, rows].flatten(0, 1).to(device) for part in (batch.input_ids, batch.labels))
        with self.engine.autocast() if trained else self.engine.autocast_bare():
            logits = (self.engine.model if trained else self.model)(input_ids=ids, use_cache=False).logits
        keep = labels != losses.IGNORE
        logits = logits[..., : self.vocabulary.size].float()
        nats = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        return torch.where(keep, nats, 0.0).sum(-1).view(2, -1)

    def loss(self, batch: PairBatch, rows: slice) -> tuple[Tensor, Tensor]:
        d = self.config.dpo
        gained = self.likelihoods(batch, rows, trained=torch.is_grad_enabled()) - batch.reference[:, rows].to(self.engine.device)
        margin = d.beta * (gained[0] - gained[1])
        each = -(1 - d.label_smoothing) * F.logsigmoid(margin) - d.label_smoothing * F.logsigmoid(-margin)
        with torch.no_grad():
            sums = torch.stack([torch.ones_like(margin), each, (margin > 0).float(), margin, gained[0], gained[1]]).sum(1)
        return each.sum() * batch.share, sums

    def figures_of(self, sums: dict[str, float]) -> dict[str, float]:
        """loss; accuracy: share of pairs whose chosen sample gained more; margin: beta x the difference; nats gained by each side."""
        count = max(1.0, sums["count"])
        return {"loss": sums["loss"] / count, "accuracy": sums["right"] / count, "margin": sums["margin"] / count,
                "chosen_gained": sums["chosen"] / count, "rejected_gained": sums["rejected"] / count}  # fmt: skip

    @torch.no_grad()
    def _reference(self, pairs: Sequence[preferences.Preference], size: int = 16) -> Tensor:
        """(2, n) log-likelihoods under the current model. The processes divide the batches and make the same number of passes."""
        self.model.eval()
        starts = list(range(0, len(pairs), size))
        found, world = torch.zeros(2, len(pairs), device=self.engine.device), self.run.world
        for turn in range(-(-len(starts) // world)):
            number = turn * world + self.run.rank
            i = starts[min(number, len(starts) - 1)]
            batch = self._batch(pairs[i : i + size], torch.zeros(2, len(pairs[i : i + size])), share=1.0)
            with uncompiled(self.model):
                nats = self.likelihoods(batch, slice(None), trained=False)
            if number < len(starts):
                found[:, i : i + size] = nats
        return summed(found, world).cpu()


def scored(labels: Tensor, packed: Sequence[Packed], v: Vocabulary, over: str) -> Tensor:
    """labels (B, T) of `collate`, set to -100 except for codes ("image"), generated captions and their ends ("text"), or both.

    Raises UserError if nothing of a sequence is left: the words of a prompted picture were not generated.
    """
    image = v.is_image[labels.clamp_min(0)] & (labels != losses.IGNORE)
    text = torch.zeros_like(image)
    for row, sequence in enumerate(packed):
        if caption := sequences.written_caption(v, sequence.input_ids):  # None: it was the prompt, and not generated
            text[row, caption.start - 1 : caption.stop - 1] = True  # label t belongs to id t + 1
    kept = {"image": image, "text": text, "both": image | text}[over]
    if not kept.any(1).all():
        raise UserError(
            "dpo.over is text, but some pairs were drawn from a prompt, so their words are not the model's: "
            "remove them, or set dpo.over=image"
        )
    return torch.where(kept, labels, losses.IGNORE)
