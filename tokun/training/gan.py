"""The image tokenizer's adversary: a patch discriminator with its own optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokun import config as configs
from tokun.models import losses
from tokun.training import optim


class Gan:
    """A discriminator with its own optimizer."""

    def __init__(self, discriminator: nn.Module, train: configs.ImageTokenizerTrainConfig, accelerator: Any):
        self.train, self.accelerator, self.module = train, accelerator, discriminator
        self.optimizer = torch.optim.AdamW(discriminator.parameters(), lr=train.gan_lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
        self.wrapped, self.optimizer = accelerator.prepare(discriminator, self.optimizer)

    def active(self, step: int) -> bool:
        """Whether the decoder's loss has an adversarial term at this step."""
        return step >= self.train.gan_start

    def decoder_loss(self, base: Tensor, fake: Tensor, last: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The adversarial term for reconstructions `fake` (B, C, H, W), and its figures.

        base: the other losses; last: the decoder's last weight
        """
        self.module.requires_grad_(False)  # no gradients in the discriminator from the decoder's step
        adversarial = losses.adversarial_loss(self.module(fake.float()))
        weight = losses.adaptive_weight(base, adversarial, last)
        self.module.requires_grad_(True)
        return self.train.gan_weight * weight * adversarial, {"adversarial": adversarial, "adaptive_weight": weight}

    def train_step(self, step: int, real: Tensor, fake: Tensor, lr_factor: float) -> dict[str, Tensor]:
        """A step of the discriminator on pictures and reconstructions (B, C, H, W). Returns its loss, by name."""
        if step < self.train.gan_start - 500:  # the discriminator starts a little before it is used
            return {}
        optim.set_lr(self.optimizer, self.train.gan_lr * lr_factor)
        with self.accelerator.autocast():
            both = self.wrapped(torch.cat([real, fake.float()]))
            loss = losses.discriminator_loss(*both.chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.optimizer.step()
        return {"discriminator": loss}

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
