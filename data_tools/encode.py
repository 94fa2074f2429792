"""Image shards -> code shards, with a trained image tokenizer: the third stage of train.py on its own.

    tokun encode --config configs/engraving.yaml data.train='shards/train-*.tar' out=runs/mine
    accelerate launch -m data_tools.encode --config …                                    one process per GPU
    tokun encode --config … --engine ray --ray-address HEAD:6379 --gpus-per-task 1

Reads out/image_tokenizer and writes out/codes, one task per shard. A restarted run resumes after the last complete shard, and
the bytes do not depend on the engine.
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from tokun.config import load_config
from tokun.training.codes import codes_tasks, encode_shards, run_codes_task
from tokun.training.engine import end_processes, start_processes
from tokun.training.health import CTRL_C, Preempted
from tokun.training.run import Run, open_run
from tokun.utils import console
from tokun.utils.errors import UserError
from tokun.utils.task_engine import ENGINES, open_engine


def make_parser() -> argparse.ArgumentParser:
    parser = console.make_parser("python -m data_tools.encode", __doc__)
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode shards in parallel (%(default)s)")
    parser.add_argument("--engine", default="local", metavar="NAME", help=f"{' or '.join(ENGINES)} (%(default)s)")
    parser.add_argument("--ray-address", default="", metavar="HOST:PORT", help="of a Ray cluster whose nodes can reach the shards and out")
    parser.add_argument("--gpus-per-task", type=float, default=0, metavar="N", help="GPUs of a Ray cluster for each shard (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file's")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_intermixed_args(argv)
    start_processes()
    run = open_run(load_config(args.config, [*args.overrides, "tracking.kind=none"]))
    try:
        if args.engine != "local" or args.workers != 1:
            encode_elsewhere(run, args)
        encode_shards(run)
        stopped = ""
    except Preempted:
        stopped = run.stop.by
    run.close()
    end_processes()
    if stopped:
        console.end(f"data_tools.encode: asked to stop ({stopped}). Finished shards are kept: the same command goes on from here")
    return 130 if stopped == CTRL_C else 0


def encode_elsewhere(run: Run, args: argparse.Namespace) -> None:
    """Run the tasks on several processes or machines; `encode_shards` then finds all shards done."""
    if run.world > 1:
        raise UserError(f"--engine {args.engine} --workers {args.workers}: leave these out under a process launcher such as accelerate")
    tasks = codes_tasks(run)
    with open_engine(args.engine, workers=args.workers, address=args.ray_address, gpus=args.gpus_per_task) as engine:
        for number, skipped in tqdm(engine.run(run_codes_task, tasks), total=len(tasks), desc="codes", unit="shard"):
            if skipped:
                tqdm.write(f"codes: {tasks[number].source.name}: skipped {skipped}")
            run.stop_if_asked()


if __name__ == "__main__":
    console.run("data_tools.encode", main)
