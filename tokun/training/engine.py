"""Engines: the generator's forward, backward, step, save and load, under accelerate (DDP) or under DeepSpeed ZeRO.

Also starts and ends the process group. Knows no data and no losses.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokun.config import TrainConfig
from tokun.inference.checkpoint_folder import quiet_deepspeed
from tokun.models.feature_alignment import HEAD, without_head
from tokun.models.partitioned_parameters import collected, collective_device, own_share
from tokun.training import optim
from tokun.training.zero import MOMENTS, ZeroOptimizer, skip_inference_kernel
from tokun.utils import checkpoint, launcher, shipped_configs
from tokun.utils.errors import UserError
from tokun.utils.memory import keep_memory
from tokun.utils.optional_packages import need


def start_processes() -> bool:
    """Join the process group of a launcher (deepspeed, torchrun, accelerate, srun); without one, do nothing.

    Returns whether a launcher started this process. Warns prominently if GPUs of this machine will be idle; one line if it has none.
    """
    keep_memory()
    os.environ.update(slurm_processes(os.environ))
    launched, world = "WORLD_SIZE" in os.environ, int(os.environ.get("WORLD_SIZE", 1))
    if warning := idle_gpus(
        os.environ, gpus=len(list(Path("/dev").glob("nvidia[0-9]*"))), visible=torch.cuda.device_count(), typed=launcher.environment()
    ):
        frame = "" if warning.startswith("one process") else "!" * 100
        print("\n".join(line for line in (frame, f"tokun: {warning}", frame) if line), file=sys.stderr, flush=True)
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))
    return launched


def slurm_processes(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables derived from those of `srun`; {} if another launcher has set them, and without an `srun` of several tasks.

    Otherwise `srun --ntasks=16 python train.py …` would be sixteen runs of one process in one folder.
    """
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in env or tasks == "1":
        return {}
    found = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": tasks, "LOCAL_RANK": env["SLURM_LOCALID"]}
    if "MASTER_ADDR" not in env:
        found["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" not in env:
        found["MASTER_PORT"] = str(20000 + int(env["SLURM_JOB_ID"]) % 20000)
    return found


def first_host(nodes: str) -> str:
    """`node[07-09,12],other` -> `node07`: the first host of Slurm's node list."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no host; set MASTER_ADDR and MASTER_PORT yourself")
    return "".join(part or "" for part in match.groups())


def idle_gpus(env: Mapping[str, str], *, gpus: int, visible: int, typed: Mapping[str, str] | None = None) -> str:
    """The warning when fewer processes were started than there are GPUs for this job.

    "one process …" if the machine has no GPU, "" if all is well.

    gpus: those of the machine (or container)
    visible: those that torch sees
    typed: the environment in which the command was typed (`given_gpus`); not `env`, as the deepspeed launcher sets CUDA_VISIBLE_DEVICES
    """
    world, launched = int(env.get("WORLD_SIZE", 1)), "WORLD_SIZE" in env
    hidden = f" (CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']})" if "CUDA_VISIBLE_DEVICES" in env else ""
    if gpus and not visible:
        return (
            f"this machine has {gpus} GPU(s), but torch {torch.__version__} sees none{hidden}: "
            "a CPU build, an incompatible driver, or all hidden. This run is on the CPU"
        )
    there = max(gpus, visible)
    given = given_gpus(typed or {}, there)
    if launched and world == 1 and given > 1:
        where = (
            f"on a machine of {there} GPUs{hidden}" if given == there else f"and this job was given {given} of the machine's {there} GPUs"
        )
        asked = f" (or --num_gpus {given})" if given == there else ""  # --num_gpus disregards CUDA_VISIBLE_DEVICES
        return (
            f"1 process was started, {where}: the others are idle. To use them all: `deepspeed train.py …`{asked}, "
            f"`torchrun --nproc_per_node={given} train.py …`"
        )
    if world == 1 and int(env.get("SLURM_NTASKS", 1)) > 1:
        return f"Slurm has given this job {env['SLURM_NTASKS']} tasks, but 1 process was started: start the command with srun"
    if launched and world == 1 and not gpus:
        return "one process, on the CPU: there is no GPU here (several: `deepspeed --num_gpus 2 train.py …`)"
    return ""


def given_gpus(typed: Mapping[str, str], gpus: int) -> int:
    """How many of a machine's GPUs a job may use: those that CUDA_VISIBLE_DEVICES or Slurm gave it, else all."""
    counts = [gpus]
    if "CUDA_VISIBLE_DEVICES" in typed:
        counts.append(sum(bool(one.strip()) for one in typed["CUDA_VISIBLE_DEVICES"].split(",")))
    if typed.get("SLURM_GPUS_ON_NODE", "").isdigit():
        counts.append(int(typed["SLURM_GPUS_ON_NODE"]))
    return min(counts)


def wait_for_processes() -> None:
    if dist.is_initialized():
        dist.barrier()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def summed(values: Tensor, world: int) -> Tensor:
    """The sum over all processes. A collective call."""
    if world == 1:
        return values
    out = values.to(collective_device(), copy=True)
    dist.all_reduce(out)
    return out.to(values.device)


def end_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def make_accelerator(precision: str) -> Any:
    """A new accelerate.Accelerator. Stages differ in precision and engine, so its shared state is reset."""
    accelerate = need("accelerate", extra="train")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    # accelerate does not recognise a group of CPU processes by itself, and would take a Mac's GPU; the rest of a training is on the CPU
    on_cpu = not torch.cuda.is_available() or (dist.is_initialized() and dist.get_backend() == "gloo")
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=on_cpu)
    if on_cpu:
        accelerator.state.device = torch.device("cpu")  # it is cpu:0, which torch.load does not know
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1)), accelerator.state
    return accelerator


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
        """Context for forward passes of `model`, the engine's own."""
        return self.accelerator.autocast()

    def autocast_bare(self) -> Any:
        """Context for forward passes of unwrapped modules, including `plain`: they compute as `model` does in training."""
        return self.autocast()

    def set_lr(self, lr: float) -> None:
        optim.set_lr(self.optimizer, lr)

    def micro_batch(self, *, last: bool) -> Any:
        """Context for forward and backward: gradients are synchronised once, with the last micro batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def norm(self) -> float:
        """Clip the gradients, as `torch.nn.utils.clip_grad_norm_` does, but leave them untouched if the norm is small enough.

        Returns the norm before clipping.
        """
        gradients = [p.grad for p in self.plain.parameters() if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = float(total)
        if norm + 1e-6 > self.train.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.plain.parameters(), self.train.max_grad_norm, total)
        return norm

    def step(self) -> None:
        """Update the weights and clear the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        """Call it after parameters were overwritten from outside (optim.Ema.copy_to)."""

    def whole_model(self) -> nn.Module | None:
        """The model with its current whole weights, under ZeRO-3 a copy. A collective call; only the first process gets it."""
        return self.plain if rank() == 0 else None

    def state(self) -> dict[str, Any]:
        """The contents of `engine.pt`: whole tensors by name (`model`) and torch's own optimizer state (`optimizer`).

        They do not depend on the engine and the number of processes, so that any other can resume from them. The tensors are copies on the
        CPU, which later steps do not change. A collective call; only rank 0 gets the state.
        """
        if rank() > 0:
            return {}
        weights, frozen = self.plain.state_dict(), any(not p.requires_grad for p in self.plain.parameters())
        if frozen:  # frozen weights are not saved
            weights = {name: p for name, p in self.plain.named_parameters() if p.requires_grad}
        return checkpoint.snapshot({"model": weights, "optimizer": self.optimizer.state_dict()})

    def load(self, folder: Path) -> None:
        state = read_state(folder, map_location=self.device)
        missing, unexpected = self.plain.load_state_dict(state["model"], strict=False)
        trained = {name for name, p in self.plain.named_parameters() if p.requires_grad}
        if unexpected or trained & set(missing):
            raise UserError(
                f"{folder} holds the weights of another model ({sorted({*unexpected, *(trained & set(missing))})[:3]}): "
                "delete it, or choose another out="
            )
        self.optimizer.load_state_dict(state["optimizer"])


def read_state(folder: Path, **options: Any) -> dict[str, Any]:
    """Read the `engine.pt` of a trainer state. Options are torch.load's. Raises FileNotFoundError with the way out if it is missing."""
    path = folder / "engine.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: this node does not see the folder in which the run was saved, "
            "or an earlier tokun saved it with DeepSpeed. "
            f"Choose the folder with out=, or delete {folder} to resume from the previous state"
        )
    return checkpoint.read_part(path, **options)


class DeepSpeedEngine(Engine):
    """The same interface over a DeepSpeed ZeRO engine, configured by `train.deepspeed`.

    Trainer states are those of `Engine.state`, not DeepSpeed's, which are tied to one ZeRO stage and number of processes.
    """

    def __init__(self, train: TrainConfig, model: nn.Module, micro: int, accumulation: int):
        quiet_deepspeed()
        deepspeed = need("deepspeed", extra="train")
        self.train, self.plain, self.accumulation = train, model, accumulation
        self.settings = deepspeed_settings(train, micro=micro, accumulation=accumulation)
        self.stage = self.settings["zero_optimization"].get("stage", 0)
        optimizer = optim.make_optimizer(train.optimizer, model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
        self._keep_names(model, optimizer)
        skip_inference_kernel()
        self.model, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.settings)
        self.zero = ZeroOptimizer(self.optimizer, self.stage) if self.stage > 0 else None
        self.device = torch.device(self.model.device)

    def _keep_names(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Record the parameters in the order of torch's optimizer state, before ZeRO flattens them, and all their names.

        Tied parameters have two.
        """
        self.groups = optimizer.state_dict().get("param_groups", [])
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)

    def __str__(self) -> str:
        zero = self.settings["zero_optimization"]
        moved = [part for part in ("optimizer", "param") if zero.get(f"offload_{part}", {}).get("device", "none") != "none"]
        offload = f" ({' and '.join(moved)} in the CPU's memory)" if moved else ""
        return f"DeepSpeed ZeRO-{self.stage}{offload}, precision {self.train.precision}, on {self.device}"

    def micro_batch(self, *, last: bool) -> Any:
        return contextlib.nullcontext()  # the engine counts its micro batches itself

    def autocast(self) -> Any:
        return contextlib.nullcontext()  # the engine casts according to its settings

    def autocast_bare(self) -> Any:
        casts = self.model.torch_autocast_enabled()
        dtype = self.model.torch_autocast_dtype() if casts else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=casts or self.settings.get("bf16", {}).get("enabled", False))

    def backward(self, loss: Tensor) -> None:
        # the engine divides by the accumulation steps, but the loss is already a share of the whole
        self.model.backward(loss * self.accumulation)
        if not self.model.is_gradient_accumulation_boundary():
            self.model.step()  # counts the micro batch; the last one waits for `step` or `skip`

    def norm(self) -> float:
        """The norm of the gradients; `step` clips them."""
        if self.zero is None:
            return float(nn.utils.get_total_norm([p.grad for p in self.plain.parameters() if p.grad is not None]))
        return self.zero.norm()

    def step(self) -> None:
        self.model.step()

    def skip(self) -> None:
        """Clear the gradients. ZeRO does so itself if their norm is not finite, so it is given such a norm."""
        if self.zero is None:
            self.model.zero_grad()
            self.model.micro_steps += 1
        else:
            with self.zero.non_finite_norm(self.device):
                self.model.step()

    def refresh(self) -> None:
        if self.zero is not None:
            self.zero.drop_gathered()

    @torch.no_grad()
    def whole_model(self) -> nn.Module | None:
        if self.stage < 3:
            return super().whole_model()
        parameters = dict(self.plain.named_parameters())
        weights = collected({name: own_share(p) for name, p in parameters.items()}, parameters)
        if dist.get_rank() > 0:
            return None
        model = type(self.plain)(self.plain.config)
        tied = {name: weights[names[0]] for names in self.names.values() for name in names}
        model.load_state_dict(
            without_head(self.plain).state_dict() | {name: tied[name] for name in tied if not name.startswith(f"{HEAD}.")}
        )
        return model.to(self.device)

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        if self.zero is None:
            return super().state()
        self.zero.link_moments()
        step = self.zero.step_count()
        model: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self.parameters):  # gathered in every process, one parameter at a time
            whole = self.zero.read(parameter)
            if rank() == 0:
                weight, *rest = (tensor.to("cpu", copy=True) for tensor in whole)
                model |= dict.fromkeys(self.names[id(parameter)], weight)
                moments[number] = {"step": step.clone(), **dict(zip(MOMENTS, rest))}
        return {"model": model, "optimizer": {"state": moments, "param_groups": self.groups}} if rank() == 0 else {}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        if self.zero is None:
            super().load(folder)
            return
        state = read_state(folder, map_location="cpu", mmap=True)  # each process reads only what it keeps
        self.zero.make_moments(state["optimizer"]["state"][0]["step"])
        for number, parameter in enumerate(self.parameters):
            self.zero.write(parameter, state["model"][self.names[id(parameter)][0]])
            for name in MOMENTS:
                self.zero.write(parameter, state["optimizer"]["state"][number][name], name)
        self.zero.publish_weights()


def deepspeed_settings(train: TrainConfig, *, micro: int, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed JSON named in the config, completed with the config's own settings.

    Raises FileNotFoundError for a missing file, UserError for a contradictory one.
    """
    path = shipped_configs.find(train.deepspeed, ".json")
    if not path.is_file():
        there = ", ".join(f"configs/{name}.json" for name in shipped_configs.names(".json"))
        raise FileNotFoundError(f"train.deepspeed {path} does not exist; there are {there}")
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"train.deepspeed {path} is not JSON: {error}") from error
    own = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation, "gradient_clipping": train.max_grad_norm}
    for key, value in own.items():
        if settings.setdefault(key, value) not in (value, "auto"):
            raise UserError(f"{path} sets {key} to {settings[key]}, the config to {value}; leave it out of the JSON, the config sets it")
        settings[key] = value
    settings.setdefault("zero_optimization", {"stage": 1})
    refuse_untested(path, settings)
    if train.optimizer == "muon" and settings["zero_optimization"].get("stage", 0) > 0:
        raise UserError(
            f"{path} asks for ZeRO stage {settings['zero_optimization']['stage']}, "
            "which partitions the matrices that train.optimizer muon needs whole; "
            "use configs/deepspeed/zero0.json, or train.optimizer adamw"
        )
    settings["zero_allow_untested_optimizer"] = True  # torch's own AdamW, as without DeepSpeed
    settings["zero_force_ds_cpu_optimizer"] = False  # also with states offloaded to the CPU: nothing to compile
    settings.setdefault("steps_per_print", 10**9)
    if train.precision == "bf16" and "bf16" not in settings:
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}  # float32 weights, as without DeepSpeed
    return settings


def refuse_untested(path: Path, settings: dict[str, Any]) -> None:
    """Raise UserError for DeepSpeed settings that tokun's trainer states and skipped steps do not support."""
    zero = settings["zero_optimization"]
    if settings.get("fp16", {}).get("enabled"):
        raise UserError(f"{path} asks for fp16, whose loss scaling skips steps itself; use train.precision bf16 or no")
    if settings.get("bf16", {}).get("enabled") and zero.get("stage", 0) == 0:
        raise UserError(f"{path} asks for bf16 weights without ZeRO; leave bf16 out (train.precision casts), or use stage 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if (device := zero.get(part, {}).get("device", "none")) not in ("none", "cpu"):
            raise UserError(f'{path} sets {part} to {device}; only offloading to the CPU is supported: "device": "cpu"')
