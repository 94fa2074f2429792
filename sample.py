"""Checkpoint and seed in, pairs out: `tokun sample`, as a script. `python sample.py --help` says the rest.

python sample.py --seed 42 --n 16
"""

from tokun.cli.sample import main, parse
from tokun.utils import console

__all__ = ["main", "parse"]

if __name__ == "__main__":
    console.run("sample.py", main)
