"""The subcommands of `tokun`: a name, the module that runs it, and a line for --help. Imports none of them.

The data tools stand above the package, which imports none of them: they are named here alone, and imported when one is typed.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple


class Command(NamedTuple):
    module: str
    """Where `make_parser()` and `main(argv)` are."""
    about: str
    """One line for --help."""
    parser: str = ""
    """The module of `make_parser`, where it is another one, quicker to import."""


COMMANDS = {
    "sample": Command(
        "tokun.cli.sample", "draw pairs from a seed or a prompt; caption, complete, vary a picture", "tokun.cli.sample_options"
    ),
    "info": Command("tokun.cli.info", "what a checkpoint is: sizes, shapes, tags, tasks, defaults, figures"),
    "app": Command("tokun.app.page", "the demo, in a browser"),
    "serve": Command("tokun.serving.__main__", "draw very many pairs through vLLM"),
    "prepare": Command("data_tools.prepare", "pictures as they come -> clean shards, a manifest, a report"),
    "caption": Command("data_tools.caption", "write captions for shards, by a model, a server or from a table"),
    "questions": Command("data_tools.questions", "add questions and answers to captioned shards"),
    "inspect": Command("data_tools.inspect", "what is in these shards, and is any of it damaged?"),
    "report": Command("data_tools.report", "a page that shows what prepare kept and left out"),
    "toy": Command("data_tools.toy", "draw a small training set by code"),
    "train": Command("tokun.cli.train", "train a model on shards, or go on from a checkpoint"),
    "plan": Command("tokun.planner.command", "memory, operations and hours of a config, before it runs"),
    "encode": Command("data_tools.encode", "image shards -> code shards, by several processes or on Ray"),
    "sharpen": Command("tokun.sharpen", "fine-tune a checkpoint's image decoder alone, for finer lines"),
    "match": Command("tokun.align.matching", "train the head that says how well a caption fits a picture, and chooses the best"),
    "adapters": Command("tokun.adapters", "describe an adapter, or merge it into its base"),
    "evaluate": Command("tokun.evaluate.__main__", "every figure of a checkpoint, in one table"),
    "drawings": Command("tokun.align.drawings", "score vector drawings of descriptions under a limit of bytes"),
    "completion": Command("tokun.cli.completion", "print the completion script of a shell"),
}


def data_tool(name: str) -> ModuleType:
    """The module `name` of the data tools, such as "toy"."""
    return import_module(f"data_tools.{name}")
