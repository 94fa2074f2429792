"""Several runs of train.py in the processes of one launch, which take longer to start than what they do:

deepspeed --num_gpus 2 --module tests.several RUNS.json          a list of [config, a.b=c, …]
"""

import argparse
import json
from pathlib import Path

from tokun.cli import train
from tokun.config import load_config
from tokun.training import engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--local_rank", type=int)  # given by the launcher
    launched = engine.start_processes()
    for config, *overrides in json.loads(parser.parse_args().runs.read_text()):
        train.train(load_config(config, overrides), launched)
    engine.wait_for_processes()
    engine.end_processes()


if __name__ == "__main__":
    main()
