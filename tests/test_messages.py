"""What messages name exists: keys of the config, options of commands. Nobody is sent to a setting that is not there."""

import ast
import dataclasses
import functools
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from docs import _site
from tokun.config import Config
from tokun.inference.model import Tokun
from tokun.tokenizers.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for pattern in ("tokun/**/*.py", "data_tools/**/*.py", "train.py", "sample.py", "space/*.py") for path in ROOT.glob(pattern)
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
SECTIONS = {
    field.name: {key.name for key in dataclasses.fields(field.default_factory)}
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(field.default_factory)
}
TOP = {field.name for field in dataclasses.fields(Config)}
KEY = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]+)\b(?!\.|/|\()")
SET = re.compile(r"(?<![\w.])(?:set|with|change|lower|raise) ([a-z_]+)=")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z_-]*[a-z])\b")
FILES = {"py", "json", "jsonl", "npy", "tar", "index", "yaml", "md", "css", "html", "log", "png", "model"}  # train.py, codes.json, …
OTHERS = {
    "nproc_per_node", "nnodes", "num_gpus", "hostfile", "master_addr", "master_port", "no_ssh", "node_rank",  # of torchrun and deepspeed
    # of srun and sbatch
    "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "gpu-bind", "requeue", "signal", "open-mode", "mem", "time",
    "index-url", "install",  # of pip, xcode-select
    # of vllm serve, hf, ray, tensorboard
    "logits-processors", "no-async-scheduling", "enforce-eager", "max-num-seqs", "local-dir", "repo-type", "head", "logdir",
}  # fmt: skip
MADE = {"gan-weight", "gan-lr", "code-noise", "options"}  # sharpen's, from the names of its settings; the report's word for any option


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def literals(path):
    """(line, text) of every string in a module that is no docstring; of an f-string the parts that stand there, with {} between them."""
    tree, found = parsed(path), []
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append((node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            found.append((node.lineno, node.value))
    return found


def texts(pages):
    for path in SOURCES:
        for line, text in literals(path):
            yield f"{path.relative_to(ROOT)}:{line}", text
    for path in pages:
        written = _site.MARKED.sub(
            lambda made: "\n" * made[0].count("\n"), path.read_text(encoding="utf-8")
        )  # the parsers' own words are in SOURCES
        for line, text in enumerate(written.splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{line}", text


def options():
    """Every option that a parser of the project knows."""
    known = set()
    for path in [*SOURCES, *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                known |= {
                    arg.value[2:]
                    for arg in node.args
                    if isinstance(arg, ast.Constant) and isinstance(arg.value, str) and re.fullmatch(r"--[\w-]+", arg.value)
                }
    return known | {f"no-{name}" for name in known} | {"help"}


def test_every_key_that_is_named_exists():
    """`set perceptual=none` was said of image_tokenizer_train.perceptual: the config refused it."""
    found = [
        f"{where}: {section}.{key}"
        for where, text in texts(PAGES)
        for section, key in KEY.findall(text)
        if key not in SECTIONS[section] | FILES
    ]
    found += [
        f"{where}: {key}="
        for where, text in texts(PAGES)
        for key in SET.findall(text)
        if key not in TOP and where.startswith(("tokun", "train"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text, bad", [("set perceptual=none", True), ("set start=bundled", False), ("set image_tokenizer_train.perceptual=none", False)]
)
def test_the_test_finds_such_a_key(text, bad):
    assert bool([key for key in SET.findall(text) if key not in TOP]) is bad


def test_every_option_that_is_named_exists():
    known = options() | OTHERS | MADE
    found = [
        f"{where}: --{name}"
        for where, text in texts(PAGES)
        for name in OPTION.findall(text)
        if name not in known and name.replace("_", "-") not in known
    ]
    assert not found, "\n".join(found)


# --- code on the pages ------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"```python\n(.*?)```|python - <<'EOF'\n(.*?)\nEOF", re.DOTALL)
HELD = {"model": Tokun, "v": Vocabulary}  # what these names stand for on every page


def unknown_names(code):
    """What a page's code imports, or takes of a module, of a `model` and its vocabulary `v`, and is not there."""
    tree, bound, missing = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            try:
                exec(compile(ast.Module([node], []), "page", "exec"), bound)
            except (ImportError, AttributeError) as error:
                missing.append(str(error))
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts, node = [node.attr, *parts], node.value
        if not parts or not isinstance(node, ast.Name):
            continue
        if node.id in HELD:
            held = HELD[node.id]
            known = {*dir(held), *(field.name for field in dataclasses.fields(held))}
            missing += [] if parts[0] in known else [f"{node.id}.{parts[0]}"]
            continue
        found, told = bound.get(node.id), node.id
        while parts and isinstance(found, ModuleType):
            name, parts = parts[0], parts[1:]
            told += f".{name}"
            found = getattr(found, name, missing)
            if found is missing:
                missing.append(told)
    return missing


def blocks():
    return [
        pytest.param(one or other, id=f"{path.relative_to(ROOT)}-{number}")
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        for number, (one, other) in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("code", blocks())
def test_every_name_in_the_pages_python_exists(code):
    """docs/guides/serving.md called v.prefix and docs/guides/scaling.md planner.best_interval when both had moved."""
    assert not unknown_names(code)


def test_the_test_finds_a_name_that_has_moved():
    code = (
        "from tokun import planner, nothing\nimport tokun\nplanner.best_interval(1, 2)\nv.prefix()\nmodel.sample(v.codes_of)\ntokun.load()"
    )
    assert unknown_names(code) == [
        "cannot import name 'nothing' from 'tokun' (" + inspect.getfile(__import__("tokun")) + ")",
        "planner.best_interval",
        "v.prefix",
    ]
