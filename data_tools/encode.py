"""Image shards -> code shards, with a finished image tokenizer. The same as the third stage of train.py, on its own.

    python -m data_tools.encode --config configs/engraving.yaml data.train='shards/train-*.tar' out=runs/mine

Reads out/image_tokenizer, writes out/codes. Goes on behind the last whole shard when it is started again.
"""

from __future__ import annotations

import argparse
import sys

from tokun import stages
from tokun.config import load_config


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")
    args = parser.parse_args(argv)
    stages.start_processes(launched_by_deepspeed=False)
    config = load_config(args.config, [*args.overrides, "tracking.kind=none"])
    stages.encode_shards(stages.open_run(config))
    stages.end_processes()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"data_tools.encode: {error}")
