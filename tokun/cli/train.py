"""Train a tokun model: pictures with captions in, a checkpoint out.

    tokun train --config tiny                                             one process; a config that comes with tokun, or a file
    tokun train --config finetune start=bundled data.train='shards/train-*.tar' data.val='shards/val-*.tar' out=runs/mine
    deepspeed --module tokun.cli.train --config engraving                 every GPU of this machine; in a clone also: deepspeed train.py …
    deepspeed --num_gpus 2 train.py --config configs/tiny.yaml            two processes (gloo on a machine without GPUs)
    torchrun --nproc_per_node 8 -m tokun.cli.train --config engraving     or srun; several machines: docs/tutorials/cluster.md

    tokun train --config grpo start=runs/mine out=runs/mine-grpo          train a checkpoint on rewards

    tokun train --config ladder/350m --plan --gpu H100 --gpus 8

Four stages: text tokenizer, image tokenizer, code shards, generator. Each is skipped when its result exists and
matches; the same command resumes a killed run.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tokun import planner
from tokun.cli.commands import data_tool
from tokun.config import Config, load_config
from tokun.training import engine
from tokun.training.codes import encode_shards, require_some_captions
from tokun.training.health import CTRL_C, Preempted
from tokun.training.run import Run, lock_out, open_run, write_config
from tokun.training.stages import stages_of
from tokun.utils import checkpoint, console, lock
from tokun.utils.errors import UserError


def main(argv: list[str] | None = None) -> int:
    config, args = parse(argv)
    if args.plan:
        planner.main_plan(config, args)
        return 0
    launched = engine.start_processes()
    held = lock_out(config)
    try:
        stopped = train(config, launched)
    finally:
        if held is not None:
            lock.release(held)
    engine.end_processes()
    if stopped:
        console.end(f"train: asked to stop ({stopped}). Everything is saved: the same command goes on from here")
    return 130 if stopped == CTRL_C else 0


def train(config: Config, launched: bool) -> str:
    """Run all stages. `launched`: whether a process launcher started this process. Returns what asked the run to stop, "" if it is done."""
    draw_toy_pictures(config)
    convert_tables(config)
    run = open_run(config, deepspeed=launched)
    try:
        stages = stages_of(config) if not config.grpo.rewards else (train_on_rewards,)
        if encode_shards in stages:
            require_some_captions(run)
        for stage in stages:
            stage(run)
            run.stop_if_asked()
        if run.rank == 0:
            write_config(run.out, config)
    except Preempted:
        run.close()
        return run.stop.by
    except BaseException:
        run.stop.close()  # Ctrl-C has its usual meaning again
        raise
    run.close()
    return ""


def train_on_rewards(run: Run) -> Path:
    from tokun.align.grpo import train_grpo  # tokun.align is above tokun.training

    return train_grpo(run)


def draw_toy_pictures(config: Config) -> None:
    """With `data.toy: N`, draw the training set by code, once, into the run's folder."""
    if not config.data.toy:
        return
    if config.data.train:
        raise UserError(
            f"data.toy is {config.data.toy} and data.train is {config.data.train}: pictures drawn by code and shards of your own are "
            "not mixed. For your own pictures add data.toy=0; for the drawn ones leave out data.train"
        )
    toy = data_tool("toy")
    folder, side = Path(config.out) / "toy", config.image_tokenizer.image_size
    if int(os.environ.get("RANK", 0)) == 0:
        toy.write_shards(folder, config.data.toy, config.data.toy_seed, side, "train")
        toy.write_shards(folder, max(64, config.data.toy // 16), config.data.toy_seed + 1, side, "val")
    engine.wait_for_processes()
    config.data.train, config.data.val = str(folder / "train-*.tar"), str(folder / "val-*.tar")
    config.data.toy = 0  # they are in shards now, so the run's config.yaml can be reused unchanged


def convert_tables(config: Config) -> None:
    """Convert the tables of `words` (CSV, TSV, Parquet) to JSONL in the run's folder."""
    for split in ("train", "val"):
        table = getattr(config.words, split)
        if not table or table.endswith(".jsonl"):
            continue
        target = Path(config.out) / "words" / f"{split}.jsonl"
        if int(os.environ.get("RANK", 0)) == 0:
            rows = (json.dumps(row.values, ensure_ascii=False, default=str) for row in data_tool("readers.table_files").read_table(table))
            checkpoint.write_text(target, "".join(f"{row}\n" for row in rows))
        setattr(config.words, split, str(target))
    engine.wait_for_processes()


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python train.py", __doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one that comes with tokun, for example tiny")
    parser.add_argument("--plan", action="store_true", help="print memory, operations and hours of this config, and train nothing")
    planner.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file's, for example train.lr=3e-4")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def parse(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    args = make_parser().parse_args(argv)
    return load_config(args.config, args.overrides), args


if __name__ == "__main__":
    console.run("tokun train", main)
