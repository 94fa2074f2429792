"""Engines: the generator's forward, backward, step, save and load, under accelerate (DDP) or under DeepSpeed ZeRO.

Also how processes meet and part. This file knows no data and no losses.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokun import optim
from tokun.config import TrainConfig
from tokun.extras import need


def start_processes(launched_by_deepspeed: bool) -> None:
    """Join the processes that a launcher (deepspeed, torchrun, accelerate) started; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))
    if launched_by_deepspeed and int(os.environ.get("WORLD_SIZE", 1)) == 1 and torch.cuda.device_count() > 1:
        print(f"tokun: deepspeed started 1 process, but this machine has {torch.cuda.device_count()} GPUs; see --num_gpus and --include")


def wait_for_processes() -> None:
    if dist.is_initialized():
        dist.barrier()


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def make_accelerator(precision: str, **kwargs: Any) -> Any:
    """A fresh accelerate.Accelerator; stages differ in precision and engine, so the shared state is made anew."""
    accelerate = need("accelerate", extra="train")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    return accelerate.Accelerator(mixed_precision=precision, **kwargs)


class Engine:
    """The generator under accelerate: forward, backward, step, save, load. DDP here, DeepSpeed in the subclass."""

    @staticmethod
    def make(train: TrainConfig, model: nn.Module, *, deepspeed: bool, micro: int, accumulation: int) -> Engine:
        kind = DeepSpeedEngine if deepspeed else Engine
        return kind(train, model, micro, accumulation)

    def __init__(self, train: TrainConfig, model: nn.Module, micro: int, accumulation: int):
        self.train, self.plain, self.accumulation = train, model, accumulation
        self.accelerator = make_accelerator(train.precision)
        self.device = self.accelerator.device
        model.to(self.device)
        optimizer = optim.make_optimizer(train.optimizer, model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def __str__(self) -> str:
        return f"accelerate, precision {self.train.precision}, on {self.device}"

    def autocast(self) -> Any:
        return self.accelerator.autocast()

    def set_lr(self, lr: float) -> None:
        optim.set_lr(self.optimizer, lr)

    def micro_batch(self, *, last: bool) -> Any:
        """Around forward and backward: gradients are exchanged once, with the last micro batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def norm(self) -> float:
        """Clip the gradients. Returns their norm before."""
        return float(self.accelerator.clip_grad_norm_(self.plain.parameters(), self.train.max_grad_norm))

    def step(self) -> None:
        """Update the weights, forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            torch.save({"model": self.plain.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        path = folder / "engine.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: this trainer state was saved under DeepSpeed. Go on with the deepspeed launcher, or delete {folder}"
            )
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """The same calls over a DeepSpeed ZeRO engine, configured by `train.deepspeed`."""

    def __init__(self, train: TrainConfig, model: nn.Module, micro: int, accumulation: int):
        need("deepspeed", extra="train")
        from accelerate.utils import DeepSpeedPlugin

        self.train, self.plain, self.accumulation = train, model, accumulation
        self.settings = deepspeed_settings(train, micro=micro, accumulation=accumulation)
        plugin = DeepSpeedPlugin(hf_ds_config=self.settings)
        self.accelerator = make_accelerator("no", deepspeed_plugin=plugin)
        self.device = self.accelerator.device
        optimizer = optim.make_optimizer(train.optimizer, model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def __str__(self) -> str:
        return f"DeepSpeed ZeRO-{self.settings['zero_optimization']['stage']}, precision {self.train.precision}, on {self.device}"

    def micro_batch(self, *, last: bool) -> Any:
        return contextlib.nullcontext()  # the engine counts its micro batches itself

    def autocast(self) -> Any:
        return contextlib.nullcontext()  # the engine casts as its settings say

    def backward(self, loss: Tensor) -> None:
        # the engine divides by the accumulation steps; the sums are over all of them already
        self.model.backward(loss * self.accumulation)
        self.model.step()

    def norm(self) -> float:
        norm = self.model.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def step(self) -> None:
        """The engine has stepped already, in `backward`."""

    def skip(self) -> None:
        """Too late: the engine has stepped, with clipped gradients. The spike is counted, and not averaged."""

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path) -> None:
        if not (folder / "engine").is_dir():
            raise FileNotFoundError(
                f"{folder / 'engine'} is missing: this trainer state was not saved under DeepSpeed. Go on with plain python, or delete {folder}"
            )
        world = json.loads((folder / "state.json").read_text())["world"]
        if world != self.accelerator.num_processes:
            raise ValueError(
                f"{folder} was saved by {world} DeepSpeed processes, this run has {self.accelerator.num_processes}: "
                f"start as many (--num_gpus {world}), or delete {folder}"
            )
        self.model.load_checkpoint(str(folder), tag="engine")


def deepspeed_settings(train: TrainConfig, *, micro: int, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed JSON named in the config, completed with what the config says already.

    Raises FileNotFoundError / ValueError for a missing or contradicting file.
    """
    path = Path(train.deepspeed)
    if not path.is_file():
        raise FileNotFoundError(f"train.deepspeed {path} does not exist; configs/deepspeed/ holds zero1.json and others")
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"train.deepspeed {path} is not JSON: {error}") from error
    own = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation, "gradient_clipping": train.max_grad_norm}
    for key, value in own.items():
        if settings.setdefault(key, value) not in (value, "auto"):
            raise ValueError(f"{path} sets {key} to {settings[key]}, the config to {value}; leave it out of the JSON, the config decides")
        settings[key] = value
    settings.setdefault("zero_optimization", {"stage": 1})
    if settings["zero_optimization"].get("stage", 0) > 2:
        raise ValueError(
            f"{path} asks for ZeRO stage {settings['zero_optimization']['stage']}; stages 0, 1 and 2 are supported, since the averaged weights need whole parameters"
        )
    if train.optimizer == "muon" and settings["zero_optimization"].get("stage", 0) > 0:
        raise ValueError(
            f"{path} asks for ZeRO stage {settings['zero_optimization']['stage']}, which cuts the matrices that train.optimizer muon needs whole; "
            "take configs/deepspeed/zero0.json, or train.optimizer adamw"
        )
    settings["zero_allow_untested_optimizer"] = True  # torch's own AdamW, as without DeepSpeed
    settings.setdefault("steps_per_print", 10**9)
    if train.precision == "bf16" and "bf16" not in settings:
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}  # float32 weights, as without DeepSpeed
    return settings
