"""README and docs: short sentences, links that lead somewhere, commands that the parsers take; the cheap ones are really run.

Whether options, config keys and names in Python exist at all is looked at by test_messages.py, on every line of the same pages.
"""

import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools import caption, prepare, toy
from data_tools.readers.stored_pairs import read_pairs
from data_tools.readers.words import MORE
from docs import _site
from tests.test_messages import ROOT, SECTIONS
from tokun.cli.commands import COMMANDS
from tokun.config import load_config
from tokun.utils.errors import UserError

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BESIDE = [
    ROOT / name
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "space/README.md", "tokun/bundled/engraving/README.md")
]
MOST_WORDS = 35
EXTRAS = set(
    re.findall(r"(?m)^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies")[2].partition("[tool")[0])
)
FENCE = re.compile(r"(?ms)^( *)```(\w*)\n(.*?)^\1```")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OURS = ("tokun", "python", "deepspeed", "torchrun", "srun", "pip", "mkdocs")  # programs whose arguments are checked
OTHERS = {
    "cd", "cp", "mkdir", "git", "source", "cat", "for", "export", "ssh", "nvidia-smi", "vllm", "hf", "ls", "ray", "tensorboard", "wandb",
    "sudo", "set", "test", "scontrol",
}  # fmt: skip
PLACEHOLDER = re.compile(r"…|\b(NAME|GPU|KEY|ANSWERS|FILE|FOLDER|BASE)\b|-gpus N\b|--measure N\b")


def prose(text):
    """The sentences of a page, without code: of paragraphs, list items and table cells."""
    text = FENCE.sub("\n\n", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for block in re.split(r"\n\s*\n|\n(?=#|- |\* |\d+\. |\|)", text):
        for cell in block.split("|") if block.startswith("|") else [block]:
            yield from re.split(r"(?<=[.!?])[*_)]*\s+|\n(?=\S.*:$)", " ".join(cell.split()))


def words_of(sentence):
    return [word for word in sentence.split() if re.search(r"\w", word)]


def test_the_readme_is_read_in_minutes():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 142]
    assert not [sentence for sentence in prose("\n".join(lines)) if len(words_of(sentence)) > MOST_WORDS]


def test_long_sentences_are_found():
    assert max(len(words_of(one)) for one in prose("# Title\n\n- " + "word " * 36 + "end. Short.\n")) == 37
    assert max(len(words_of(one)) for one in prose("| " + "word " * 20 + "| " + "word " * 20 + "|")) == 20


def test_the_set_up_commands_stand_alone_on_a_line():
    """.ci/run takes them from there."""
    lines = README.read_text(encoding="utf-8").splitlines()
    assert lines.count("pip install -e . && python sample.py --seed 42 --n 16") == 1
    assert lines.count("pip install -e '.[all]' && python -m pytest") == 1
    assert "deepspeed train.py --config configs/engraving.yaml" in README.read_text(encoding="utf-8")


def test_badges_state_what_the_repository_states():
    badges = re.findall(r"img\.shields\.io/badge/([^)]+)\)", README.read_text(encoding="utf-8"))
    assert badges == ["licence-Apache--2.0-blue", "python-3.10%20or%20newer-blue"]
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project and "Apache-2.0" in project


def test_the_table_of_extras_is_complete():
    table = re.search(r"\| extra \|.*?\n\n", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert {name for row in table.splitlines()[2:] for cell in row.split("|")[1:4:2] for name in re.findall(r"`(\w+)`", cell)} == EXTRAS


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", one).lower()).strip().replace(" ", "-") for one in headings}


def dangling(page, text):
    """Links of a page to files or anchors that are not there for a reader of the repository.

    Of a page that the site makes, that reader sees only the frame."""
    for target in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if re.match(r"https?:|mailto:", target):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert not list(dangling(page, page.read_text(encoding="utf-8")))


def test_a_dangling_link_is_found():
    assert list(dangling(README, "[a](docs/no.md) [b](#no-such) [c](docs/index.md#begin-here)")) == ["docs/no.md", "#no-such"]


def test_what_lies_beside_the_scripts_is_linked_there_and_shown_by_the_site():
    """A link to the page of the site alone would lead a reader of the repository to an empty one."""
    frames = {(ROOT / "docs" / shown).resolve() for shown in _site.SHOWN_AS.values()}
    for page in PAGES:
        links = {
            (page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        }
        assert not links & frames, page
    page = SimpleNamespace(file=SimpleNamespace(src_uri="guides/adapters.md"))
    assert _site.on_page_markdown("[a](../../benchmarks/README.md#adapters)", page=page) == "[a](../results/measurements.md#adapters)"
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results.md"))
    assert _site.on_page_markdown("[a](../tokun/bundled/engraving/README.md)", page=page) == "[a](results/model-card.md)"


def test_the_repositorys_pages_of_commands_and_config_keys_are_those_of_the_site():
    for path, text in _site.pages_in_repository().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: python docs/_site.py"


def test_every_page_is_in_the_sites_navigation():
    def files(node):
        return (
            [node]
            if isinstance(node, str)
            else [file for one in (node.values() if isinstance(node, dict) else node) for file in files(one)]
        )

    tree = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(files(tree["nav"])) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])


# --- what the site makes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["tokun", "data_tools"])
def test_every_module_stands_on_the_page_that_says_where_things_are(package):
    page = (ROOT / "docs/reference/layout.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / package).rglob("*.py") if not path.name.startswith("_")]
    assert [path.name for path in modules if f"`{path.name}`" not in page] == []


def test_every_config_key_has_a_meaning():
    keys = _site.config_keys()
    assert {name for name, _, _, _ in keys["Config"]} >= SECTIONS.keys()
    unsaid = [
        f"{kind}.{name}" for kind, rows in keys.items() for name, what, _, meaning in rows if not meaning and not what.endswith("Config")
    ]
    assert not unsaid
    page = _site.config_page()
    assert not [f"{section}.{key}" for section, names in SECTIONS.items() for key in names if f"| `{section}.{key}` |" not in page]
    assert "| `data.fit` | `auto`, `pad` or `crop` | `auto` | how a picture is fitted to its grid." in page
    assert "| `data.grids` | list of texts | `[]` | shapes of pictures, rows x columns of codes" in page


def test_every_command_is_on_its_page():
    """Found by their `__main__`, so that a new command cannot be forgotten."""
    found = {
        path
        for folder in ("tokun", "data_tools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in found}
    shown = {command.module.removesuffix(".__main__").removesuffix(".command").removesuffix(".page") for command in COMMANDS.values()}
    shown |= {name.removeprefix("python -m ") for name in _site.MORE} | {"tokun", "tokun.evaluate.viewer_pairs"}
    assert names <= shown


def test_the_page_of_commands_has_every_option():
    page = _site.commands()
    assert all(f"## `tokun {name}`" in page for name in COMMANDS)
    assert (
        "| `--seed` SEED | `42` | seed of the latents" in page
        and "### `tokun adapters merge`" in page
        and "The same as `python sample.py`." in page
    )
    for name in ("sample", "prepare", "train"):
        options = {
            option for action in _site.parser_of_tokun(name)._actions for option in action.option_strings if action.help != "==SUPPRESS=="
        }
        assert {option for option in options if f"`{option}`" not in page} <= {"-h", "--help"}


# --- commands ---------------------------------------------------------------------------------------------------------


@functools.cache
def parser(command):
    return _site.parser_of_tokun(command.split()[1]) if command.startswith("tokun ") else _site.parser_of(command)


def lines_of(code):
    """Shell lines, without here-documents, continued lines joined."""
    code = re.sub(r"<<'?(\w+)'?.*?\n\1\n", "\n", code + "\n", flags=re.DOTALL)
    return [line for line in re.sub(r"\\\n\s*", " ", code).splitlines() if line.strip()]


def commands_of(page):
    """(line number, command) of a page: lines of ```bash, code in the text that starts with a program, the README's table of options."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[2] == "bash":
            yield from ((text[: match.start()].count("\n") + 1, line) for line in lines_of(match[3]))
    rest = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(rest.splitlines(), 1):
        for code in [] if line.startswith("#") else re.findall(r"`([^`]+)`", line):  # a heading is a command's name
            if re.match(rf"(?:{'|'.join(OURS)}) ", code):
                yield number, code
        if line.startswith("| `--") and "| option |" not in text[: text.find(line)].rpartition("| ---")[0].rpartition("\n\n")[2]:
            yield from ((number, f"python sample.py {code}") for code in re.findall(r"`(--[^`]+)`", line.split(" | ")[0]))


def split(line):
    """A shell line -> its commands, as lists of words, without comments, settings of the environment and what follows a pipe."""
    for part in re.split(r"\s&&\s|\s;\s", re.split(r"(?:^|\s)#", line)[0]):
        words = [word for word in shlex.split(part.split(" | ")[0])]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


def wrong(words):
    """What is wrong with a command, "" if nothing."""
    if words[0] in OTHERS:
        return ""
    if words[0] == "pip":
        named = {extra for word in words for found in re.findall(r"\.\[([\w,]+)\]", word) for extra in found.split(",")}
        return f"no such extra: {named - EXTRAS}" if named - EXTRAS else ""
    if words[0] == "mkdocs":
        return "" if words[1] in ("serve", "build") else f"mkdocs {words[1]}"
    if words[0] in ("deepspeed", "torchrun", "srun"):
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if place is None:
            return f"{words[0]} starts no script"
        words = ["python", *words[place:]]
    if words[0] == "tokun":
        if words[1] not in COMMANDS:
            return "" if words[1].startswith("-") else f"tokun has no command {words[1]}"
        return refused(f"tokun {words[1]}", words[2:]) if words[2:] or words[1] == "info" else ""
    if words[0] != "python":
        return f"{words[0]} is no program that is known here"
    if words[1:3] in (["-m", "pytest"], ["-m", "venv"]) or words[1:2] == ["-"]:
        return ""
    if not words[3 if words[1] == "-m" else 2 :]:  # named, not called
        return "" if _site.files_of(words) else f"{shlex.join(words)} is not there"
    command = " ".join(words[: 3 if words[1] == "-m" else 2])
    return refused(command, words[len(command.split()) :])


def refused(command, arguments):
    """Why the command's own parser, config or checks refuse the arguments, "" if they do not."""
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(io.StringIO()):
            found = parser(command).parse_args(arguments)
            if command in ("python sample.py", "tokun sample"):
                import sample

                sample.parse(arguments)
        if hasattr(found, "overrides") and getattr(found, "config", None):
            # the reader's own run, which is not here, has every key
            load_config("engraving" if found.config == "runs/mine/config.yaml" else found.config, found.overrides)
    except SystemExit as ended:
        return told.getvalue().splitlines()[-1] if ended.code else ""
    except (UserError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_its_parser_takes(page):
    found = [
        f"line {number}: {shlex.join(words)}: {problem}"
        for number, line in commands_of(page)
        if not PLACEHOLDER.search(line)
        for words in split(line)
        if (problem := wrong(words))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line, told",
    [
        ("python sample.py --sed 42", "--sed"),
        ("python sample.py --image a.png --n 2 --svg", "--svg has no effect"),
        ("pip install -e '.[trian]'", "trian"),
        ("deepspeed train.py --config configs/tiny.yaml train.learning_rate=1", "train.learning_rate"),
        ("deepspeed --num_gpus 2 train.py --config configs/tiney.yaml", "tiney.yaml"),
        ("torchrun --nproc_per_node 2 -- sample.py --seeds 1 2", "--seeds"),
        ("python -m data_tools.prepare my_pictures/ --styl", "--styl"),
        ("python -m tokun.adapters mrege a b", "mrege"),
        ("OMP_NUM_THREADS=1 pyton train.py", "pyton"),
        ("tokun smaple --seed 42", "smaple"),
        ("tokun sample --sed 42", "--sed"),
        ("tokun train --config tiny train.learning_rate=1", "train.learning_rate"),
        ("python train.py --config runs/mine/config.yaml train.learning_rate=1", "train.learning_rate"),
    ],
)
def test_a_wrong_command_is_found(line, told):
    assert told in " ".join(wrong(words) for words in split(line))


def test_commands_are_found_where_they_stand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `python a.py --x`.\n\n- list\n\n    ```bash\n    A=1 deepspeed b.py \\\n        c=1  # why\n    cat > d <<'E'\nNO=1\nE\n"
        "    ```\n\n"
        "| `python sample.py …` | what |\n| --- | --- |\n| `--seed 1`; or `--n 2` | `--no` |\n\n| option | what |\n| --- | --- |\n"
        "| `--top-k` | |\n"
    )
    found = [" ".join(words) for _, line in commands_of(page) for words in split(line)]
    assert found == [
        "deepspeed b.py c=1",
        "cat > d",
        "python a.py --x",
        "python sample.py …",
        "python sample.py --seed 1",
        "python sample.py --n 2",
    ]


# --- run --------------------------------------------------------------------------------------------------------------


def run(line, folder):
    words = [sys.executable if word == "python" else word for word in shlex.split(line, comments=True)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def bash_after(page, heading):
    """The lines of the first ```bash below a heading."""
    return lines_of(re.search(rf"(?ms)^#+ {heading}.*?```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"))[1])


def test_the_page_of_formats_names_every_key_that_a_samples_json_can_hold(tmp_path):
    """`captions_all` and `earlier_captions` stood in the JSON and on no page."""
    pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[data]'")
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)).save(tmp_path / "in" / "a.png")
    said = {name: f"The {name}" for name in (*MORE, "subject", "style", "license", "source_url")}
    texts = {"caption": ["A <b>snake</b>.", "A &amp; boa."], "captions": {"era": "<i>Aboma</i>"}}
    (tmp_path / "in" / "a.json").write_text(json.dumps({**said, **texts}))
    command = ["--style", "engraving", "--keep-ambiguous", "--workers", "1", "--val", "0", "--out"]
    assert prepare.main([str(tmp_path / "in"), *command, str(tmp_path / "out")]) == 0
    (tmp_path / "t.csv").write_text("file_name,plain,era,poetic\na.png,A long snake.,Boa.,Coiled.\n")
    assert caption.main([str(tmp_path / "out"), "--from", str(tmp_path / "t.csv"), "--out", str(tmp_path / "new")]) == 0
    keys = {key for shard in tmp_path.glob("*/*.tar") for pair in read_pairs(shard, []) for key in json.loads(pair.members["json"])}
    assert {"captions_all", "earlier_captions", "raw_captions_all", "caption_sources"} <= keys
    page = (ROOT / "docs/reference/formats.md").read_text(encoding="utf-8").partition("`KEY.json`, as")[2].partition("\n## ")[0]
    others = {
        "caption_failures",
        "caption_source",
        "questions",
        "thing",
        "folder",
        "folder_key",
        "gutenberg_id",
        "caption_origin",
        "crop",
        "status",
        "reason",
    }
    assert not {key for key in keys | set(MORE) | others if f"`{key}`" not in page}


@pytest.mark.slow
def test_the_readmes_three_commands_for_data_run(tmp_path):
    (tmp_path / "my_pictures").mkdir()
    for number in range(8):
        pixels, record = toy.draw(1, number, 256)[:2]
        Image.fromarray(np.array(pixels)).save(tmp_path / "my_pictures" / f"{number}.png")
        (tmp_path / "my_pictures" / f"{number}.txt").write_text(record["captions"]["plain"])
    for line in bash_after("README.md", "Dataset and cleaning"):
        run(line, tmp_path)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "README.md", "manifest.parquet", "prepare.json", "report.html", "train-00000.tar", "val-00000.tar",
    ]  # fmt: skip
    assert (tmp_path / "captioned" / "train-00000.tar").is_file() and (tmp_path / "sheet.png").is_file()


# --- troubleshooting --------------------------------------------------------------------------------------------------


def test_the_ten_errors_are_said_as_the_page_says_them():
    """Each quoted message but Python's own stands in the source."""
    quoted = re.findall(r"(?m)^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    said = "".join(path.read_text(encoding="utf-8") for folder in ("tokun", "data_tools") for path in sorted((ROOT / folder).rglob("*.py")))
    assert len(quoted) == 10 and quoted[0] == "module 'tokun' has no attribute 'load'"
    assert not [message for message in quoted[1:] if message.strip() not in said]
