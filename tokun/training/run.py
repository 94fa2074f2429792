"""A run: its settings, folder, tracker and rank; and the checks before its first stage."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from tokun import config as configs
from tokun import data
from tokun.config import Config
from tokun.inference.model import Tokun
from tokun.models.generator import intermediate_size
from tokun.models.partitioned_parameters import collective_device
from tokun.training import adapters, health, optim
from tokun.training.downloads import require_weights
from tokun.training.engine import deepspeed_settings
from tokun.training.initial_checkpoint import starting_model
from tokun.training.start_report import opening_line
from tokun.training.tracking import Tracker, make_tracker
from tokun.utils import checkpoint, lock
from tokun.utils.errors import UserError


@dataclass
class Run:
    """One training run: its settings, folder, tracker and rank."""

    config: Config
    out: Path
    tracker: Tracker
    rank: int
    world: int
    deepspeed: bool  # the generator runs under a DeepSpeed engine
    stop: health.StopRequest
    writer: checkpoint.Writer
    release: Callable[[], object] = lambda: None  # releases the lock on the run's folder
    start: Tokun | None = None  # the checkpoint that `config.start` names, where it is loaded already

    def take_start(self) -> Tokun:
        """The checkpoint that `config.start` names, loaded once for the check of the settings and the stage. The caller may change it."""
        model, self.start = self.start, None
        return model or starting_model(self.config)

    def largest(self, value: int) -> int:
        """The largest value of any process. A collective call."""
        if self.world == 1:
            return value
        found = torch.tensor(float(value), device=collective_device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process. A collective call."""
        return bool(self.largest(flag))

    def stop_if_asked(self, save: Callable[[], object] = lambda: None) -> None:
        """Save and raise Preempted when any process was asked to stop; `stop.by` is then the same in all of them."""
        if self.stop.agree(self.largest):
            save()
            self.writer.wait()
            raise health.Preempted

    def close(self) -> None:
        self.writer.close()
        self.tracker.finish(stopped=self.stop.asked)
        self.stop.close()
        self.release()

    def wait(self) -> None:
        """Wait until every process gets here."""
        if self.world > 1:
            dist.barrier()

    def recover(self, target: Path) -> None:
        """Restore a folder that a kill between two renames left under its hidden name.

        A collective call, before reading a stage's record.
        """
        if self.rank == 0:
            checkpoint.recover_directory(target)
        self.wait()

    def say(self, message: str) -> None:
        if self.rank == 0:
            tqdm.write(message)

    def index(self, shards: str) -> Path:
        """The cache file for the index of these shards. Safe to delete."""
        return self.out / "cache" / f"{shards}.index"

    def states(self, stage: str) -> checkpoint.TrainerStates:
        if self.rank == 0:
            checkpoint.remove_partial(self.out / "state" / stage)
        return checkpoint.TrainerStates(self.out / "state" / stage, keep=self.config.train.keep_last)

    def remove_states(self, stage: str) -> None:
        """Remove the trainer states of a finished stage: they take gigabytes, and a killed run may have left some."""
        if self.rank == 0:
            self.states(stage).clear()


def open_run(config: Config, *, deepspeed: bool = False) -> Run:
    """Check the settings of all stages, create the run's folder and start its tracker. A collective call.

    Raises UserError for a folder locked by another run, and for settings that a later stage would refuse, before the first one spends an
    hour.
    """
    out = Path(config.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = deepspeed and bool(config.train.deepspeed)
    start = adapters.take_shape(config)
    check_settings(config, world, deepspeed)
    if config.threads:
        torch.set_num_threads(config.threads)
    held = lock_out(config)
    if rank == 0:
        tqdm.write(opening_line(config, going_on=(out / "config.yaml").exists()))
    if rank == 0 and not (out / "config.yaml").exists():  # an earlier run's config stays until every stage has accepted this one
        write_config(out, config)
    t, tree = config.tracking, configs.to_dict(config)
    tracker = make_tracker(
        t.kind, project=t.project, name=t.name or out.name, directory=out / "tracking", config=tree, main_process=rank == 0
    )
    run = Run(config, out, tracker, rank, world, deepspeed, health.StopRequest(), checkpoint.Writer(tqdm.write))
    if not adapters.is_on_pictures(config):  # the first stage trains it; other stages come before an adapter's
        run.start = start
    if held is not None:
        run.release = weakref.finalize(run, lock.release, held)  # also if it is never closed
    run.wait()
    require_shared_folder(out)
    return run


def lock_out(config: Config) -> Path | None:
    """In the first process, create the run's folder and lock it until the run ends, for all processes.

    Raises UserError if another run holds it.
    """
    if int(os.environ.get("RANK", 0)):
        return None
    if os.fsencode(config.out).decode("utf-8", "replace") != config.out:
        raise UserError(f"out={config.out!r} is not UTF-8, so safetensors can write no weights there: choose another folder with out=…")
    checkpoint.require_writable(Path(config.out))
    return lock.hold(Path(config.out), option="out=…")


def require_shared_folder(out: Path, *, seconds: float = 30.0) -> None:
    """Raise UserError if this process does not see the first one's files; network folders may take a while."""
    end = time.monotonic() + seconds
    while not (out / "config.yaml").is_file():
        if time.monotonic() > end:
            raise UserError(
                f"out={out} on {socket.gethostname()} does not contain the config.yaml that the first process wrote: all nodes must share "
                "this folder (docs/tutorials/cluster.md); only data may be copied to each node"
            )
        if out.is_dir():
            os.listdir(out)  # makes a network folder refresh
        time.sleep(0.5)


def write_config(out: Path, config: Config) -> None:
    checkpoint.write_text(out / "config.yaml", yaml.safe_dump(configs.to_dict(config), sort_keys=False))


def require_shards(config: Config) -> None:
    """Raise FileNotFoundError, naming the setting, if the shards of a training on pictures do not exist."""
    none = ", or hold nothing out with data.val= (empty)"
    for name, pattern in (("train", config.data.train), ("val", config.data.val)):
        if pattern or name == "train":
            try:
                data.expand_shards(pattern)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error}; name them with data.{name}, for example data.{name}='shards/{name}-*.tar'{none if name == 'val' else ''}"
                ) from error


def check_settings(config: Config, world: int, deepspeed: bool) -> None:
    """Raise UserError if any stage cannot train with these settings. Creates nothing."""
    train = config.train
    data.check_batch(config.image_tokenizer_train.batch_size, world, "image_tokenizer_train.batch_size")
    data.check_batch(train.batch_size, world, "train.batch_size")
    micro = micro_batch(train, world)
    data.check_task_mix(train.task_mix)
    optim.require(train.optimizer)
    shares = {f"train.{name}": getattr(train, name) for name in ("word_dropout", "tag_dropout", "untagged_share", "plain_share")}
    below_one = {
        "generator.dropout": config.generator.dropout, "train.lr_hold": train.lr_hold,
        "image_tokenizer_train.lr_hold": config.image_tokenizer_train.lr_hold,
    }  # fmt: skip
    for name, value in (shares | below_one).items():
        if not 0 <= value <= 1 or (value == 1 and name in below_one):
            raise UserError(f"{name} is {value}; it must be a share between 0 and 1")
    if deepspeed:
        settings = deepspeed_settings(train, micro=micro, accumulation=train.batch_size // world // micro)
        adapters.check(config, zero_stage=settings["zero_optimization"].get("stage", 0))
    # later stages do not need it
    if (
        config.start
        and not adapters.starts_from_base(config)
        and not any((Path(config.out) / part).is_dir() for part in ("checkpoint", "state/generator"))
    ):
        _check_start(config)
    _check_alignment(config)
    if train.ema_every < 1:
        raise UserError(f"train.ema_every is {train.ema_every}; it must be a number of steps, 1 or more")
    if adapters.is_on_pictures(config):
        require_shards(config)
    weights = config.image_tokenizer_train.perceptual_weights
    if weights and config.image_tokenizer_train.perceptual_weight > 0 and not Path(weights).is_file():
        raise FileNotFoundError(
            f"image_tokenizer_train.perceptual_weights {weights} does not exist; "
            "name a SqueezeNet file, or set image_tokenizer_train.perceptual=none"
        )
    require_weights(config)


def _check_alignment(config: Config) -> None:
    """Raise UserError if the alignment cannot be trained with these settings."""
    train = config.train
    if train.align_weight < 0:
        raise UserError(f"train.align_weight is {train.align_weight}; it must be 0 (off) or more")
    if not train.align_weight:
        return
    others = {
        "adapter.rank": config.adapter.rank,
        "train.gradient_checkpointing": train.gradient_checkpointing,
        "generator.pretrained": config.generator.pretrained,
    }
    if clash := [name for name, value in others.items() if value]:
        raise UserError(
            f"train.align_weight is {train.align_weight:g}, which does not go together with {' and '.join(clash)}: "
            "set train.align_weight=0, or leave the other at its default"
        )
    if train.align_features and not Path(train.align_features).is_file():
        raise FileNotFoundError(
            f"train.align_features {train.align_features} does not exist; name a SqueezeNet file, or set train.align_weight=0"
        )
    if not 0 <= train.align_layer <= config.generator.num_layers:
        raise UserError(
            f"train.align_layer is {train.align_layer}; it must be from 1 to {config.generator.num_layers} (generator.num_layers), "
            "or 0 for the middle"
        )


def _check_start(config: Config) -> None:
    """Raise UserError if the starting checkpoint cannot be read, or has another shape than the config."""
    if config.generator.pretrained:
        raise UserError(
            f"start {config.start} and generator.pretrained {config.generator.pretrained} exclude each other: set only one of them"
        )
    model = starting_model(config)
    asked, found = config.generator, model.generator.config.to_dict()  # some are None for other architectures
    shape = {
        f"image_tokenizer.{k}": (v, getattr(model.image_tokenizer.config, k)) for k, v in dataclasses.asdict(config.image_tokenizer).items()
    }
    for name, its in adapters.SHAPE.items():
        mine = intermediate_size(asked) if name == "intermediate_size" else getattr(asked, name)
        if name == "num_layers" and mine > (found.get(its) or mine):
            continue  # it grows
        shape[f"generator.{name}"] = mine, found.get(its)
    other = [f"{name} is {mine}, the checkpoint's {its}" for name, (mine, its) in shape.items() if mine != its]
    if other:
        raise UserError(
            f"start {config.start} has another shape than this config: {'; '.join(other)}. "
            "Set the same values (generator.num_layers may be larger), or use the config it was trained with"
        )


def micro_batch(train: configs.TrainConfig, world: int) -> int:
    """Samples per process and forward pass."""
    share = train.batch_size // world
    micro = train.micro_batch_size or share
    if micro < 1 or train.batch_size % world or share % micro:
        raise UserError(
            f"train.batch_size {train.batch_size} is not processes ({world}) x micro_batch_size ({micro}) "
            "x a whole number of accumulation steps"
        )
    return micro


def states_on_disk(config: Config) -> int:
    """How many trainer states are on disk at once, including the one being written."""
    return config.train.keep_last + 1
