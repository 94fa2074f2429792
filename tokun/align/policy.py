"""The policy: the generator trained by rewards (all weights or an adapter), its whole weights for sampling, and its frozen start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tokun.config import Config
from tokun.inference import adapters as loras
from tokun.inference import decoder
from tokun.inference.model import Tokun
from tokun.models.generator import count_parameters, tune_for
from tokun.models.partitioned_parameters import gathered, is_partitioned, own_share
from tokun.training import adapters
from tokun.training.engine import Engine, rank


class Policy:
    """`before` is the frozen model (with its tokenizers); `model` is trained by an engine."""

    def __init__(self, config: Config, before: Tokun):
        """An adapter's initial weights come from torch's global generator: seed it before the call."""
        self.config, self.before = config, before
        self.model: Any = copy.deepcopy(before.generator)
        self.tuned = None
        if config.adapter.rank:
            trainee = copy.copy(before)
            trainee.generator = self.model
            self.tuned = adapters.attach(config, trainee, before.vocabulary)
            self.model = self.tuned.generator
        if config.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        tune_for(self.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.train(config.train.gradient_checkpointing)  # no dropout, so that the first ratio is 1
        self.parameters = count_parameters(self.model)
        self.trained = self.tuned.size if self.tuned else self.parameters
        self._copy: nn.Module | None = None
        self._sampler: Tokun | None = None

    def attach_engine(self, engine: Engine) -> None:
        """Set the engine that trains the policy. Moves the frozen model to the engine's device."""
        self.engine = engine
        self.before.to(engine.device)
        self.before.generator.requires_grad_(False)

    def sampler(self) -> Tokun:
        """The current model for sampling, in every process. Call `release` before its weights change."""
        if self.tuned:
            generator = loras.merged(self.before.generator, self._adapter()).eval()
        elif any(map(is_partitioned, self.model.parameters())):
            generator = self._gathered()
        else:
            generator = self.model
        if self._sampler is None:  # its id tables are made once
            self._sampler = copy.copy(self.before)
        self._sampler.generator = generator
        return self._sampler

    def release(self) -> None:
        """Drop the sampler's cached weights: torch's fused optimizer changes weights undetected, so the next pairs would use stale ones."""
        if self._sampler is not None:
            decoder.forget(self._sampler.generator)

    def whole(self) -> Tokun | None:
        """The model as users load it. A collective call; only the first process gets it."""
        if self.tuned:
            adapter = self._adapter()
            return self.tuned.model(adapter, self.before) if rank() == 0 else None
        generator = self.engine.whole_model()
        if generator is None:
            return None
        made = copy.copy(self.before)
        made.generator, made.defaults = generator, self.config.sampling
        made.matching = None  # it is of the weights before
        if generator.dtype != torch.float32:  # of an engine that trains on: its own weights stay as they are
            made.generator = copy.deepcopy(self.before.generator).float()
            made.generator.load_state_dict(generator.state_dict())
        return made

    def write(self, whole: Tokun, folder: Path, card: str) -> None:
        """Write the checkpoint or adapter to a folder."""
        if self.tuned:
            self.tuned.write(whole, folder, card)
        else:
            whole.save(folder, card=card)

    @torch.no_grad()
    def _adapter(self) -> loras.Adapter:
        """The trained adapter, in every process."""
        assert self.tuned is not None
        tensors = self.tuned.tensors()
        if dist.is_initialized() and any(map(is_partitioned, self.model.parameters())):  # only the first process has them
            box = [tensors]
            dist.broadcast_object_list(box, 0)
            tensors = box[0]
        return self.tuned.adapter(tensors, tag_counts=self.before.tag_counts, tasks=self.before.tasks)

    @torch.no_grad()
    def _gathered(self) -> nn.Module:
        """A copy with whole weights, gathered from parameters partitioned by ZeRO-3."""
        if self._copy is None:
            made: nn.Module = copy.deepcopy(self.before.generator)
            self._copy = made
        for (_, there), (_, parameter) in zip(self._copy.named_parameters(), self.model.named_parameters(), strict=True):
            there.copy_(gathered(own_share(parameter), parameter))
        return self._copy
