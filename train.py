"""Train a tokun model: `tokun train`, as a script for launchers. `python train.py --help` says the rest.

deepspeed train.py --config configs/engraving.yaml
"""

from tokun.cli.train import draw_toy_pictures, main, parse, train
from tokun.utils import console

__all__ = ["draw_toy_pictures", "main", "parse", "train"]

if __name__ == "__main__":
    console.run("train.py", main)
