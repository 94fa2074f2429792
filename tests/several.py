"""Several runs of train.py in the processes of one launch, which take longer to start than what they do:

deepspeed --num_gpus 2 --module tests.several RUNS.json          a list of [config, a.b=c, …]

The last one is run as the script that one types.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

from tests.small_runs import ROOT
from tokun.cli import train
from tokun.config import load_config
from tokun.training import engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--local_rank", type=int)  # given by the launcher
    args = parser.parse_args()
    launched, (*several, last) = engine.start_processes(), json.loads(args.runs.read_text())
    for config, *overrides in several:
        train.train(load_config(config, overrides), launched)
    engine.wait_for_processes()
    sys.argv = ["train.py", f"--local_rank={args.local_rank}", "--config", *last]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
