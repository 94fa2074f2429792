"""The command `tokun`: it finds the commands, starts quickly, says what it knows, and is the same code as the scripts."""

import argparse
import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sample as sample_script
import train as train_script
from tokun.cli import command, completion, sample, sample_options, train
from tokun.cli.commands import COMMANDS
from tokun.utils import console

ROOT = Path(__file__).resolve().parents[1]
PROMISED = ("sample", "train", "prepare", "caption", "inspect", "evaluate", "app", "serve", "info")


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    made = {}
    for name, found in COMMANDS.items():
        with console.typed_as(f"tokun {name}"):
            made[name] = import_module(found.parser or found.module).make_parser()
    return made


def typed(*arguments: str) -> int:
    """The exit status of `tokun ARGUMENTS`."""
    return console.status("tokun", lambda: command.main(list(arguments)))


def helped(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


# --- the command itself -----------------------------------------------------------------------------------------------


def test_help_lists_every_command_with_one_line(capsys):
    told = re.sub(r"\s+", " ", helped(capsys, "--help"))
    assert set(PROMISED) <= set(COMMANDS)
    for name, found in COMMANDS.items():
        assert f" {name} {found.about} " in told
    assert helped(capsys) == helped(capsys, "--help"), "tokun alone shows its help"


def test_help_and_a_card_are_told_without_torch():
    """Importing torch takes seconds."""
    code = (
        "import sys, contextlib, io\nfrom tokun.cli import command\n"
        "for words in (['--help'], ['prepare', '--help'], ['inspect', '--help'], ['sample', '--help'], ['info']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told: command.main(words)\n"
        "    assert told.getvalue() and 'torch' not in sys.modules, words"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_one_line_with_the_nearest(capsys):
    assert typed("smaple") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "did you mean tokun sample?" in told and "evaluate" in told


def test_a_mistake_within_a_command_is_told_by_its_name(capsys, tmp_path):
    assert typed("info", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"tokun info: {tmp_path} holds no checkpoint")
    with pytest.raises(SystemExit) as ended:
        typed("sample", "--n", "0")
    assert ended.value.code == 2 and "tokun sample: error: argument --n" in capsys.readouterr().err


def test_a_bug_within_a_command_shows_its_traceback(monkeypatch):
    def broken(checkpoint):
        raise KeyError("a bug")

    from tokun.cli import info

    monkeypatch.setattr(info, "describe", broken)
    with pytest.raises(KeyError):
        typed("info")


def test_the_version_has_one_owner(capsys):
    import tokun

    assert helped(capsys, "--version") == f"tokun {tokun.__version__}\n"
    assert f"\nversion: {tokun.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    latest = re.search(r"^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest and latest[1] == tokun.__version__
    assert "\nversion =" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2].partition("[project.")[0]


def test_the_data_tools_are_named_in_one_place_of_the_package():
    """The package imports none of them (import-linter); by name they are reached from the table of commands only."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tokun").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and "data_tools" in ast.unparse(node))
        or (isinstance(node, (ast.Import, ast.ImportFrom)) and "data_tools" in ast.unparse(node))
    }
    assert found == {"tokun/cli/commands.py"}


# --- its commands -----------------------------------------------------------------------------------------------------


def test_the_scripts_are_the_commands():
    assert train_script.main is train.main and sample_script.main is sample.main
    assert train_script.parse is train.parse and sample_script.parse is sample.parse


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_parser_by_its_own_name_and_a_main(name, parsers):
    assert parsers[name].prog == f"tokun {name}"
    assert callable(import_module(COMMANDS[name].module).main)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default_and_no_none(name, parsers):
    told = re.sub(r"\s+", " ", parsers[name].format_help())
    assert "None" not in told and "SUPPRESS" not in told
    for action in parsers[name]._actions:
        if action.help == argparse.SUPPRESS or not action.option_strings or action.nargs == 0:
            continue
        assert action.help, f"{action.option_strings[0]} says nothing"
        if action.default not in (None, "", False, True, argparse.SUPPRESS):
            shown = {str(action.default), f"{action.default:g}" if isinstance(action.default, float) else ""} - {""}
            assert any(text in told for text in shown), f"{action.option_strings[0]}: {action.default}"


def test_without_the_command_a_parser_has_the_name_that_was_typed():
    from data_tools import prepare

    assert prepare.make_parser().prog == "python -m data_tools.prepare"


def test_help_of_sample_tells_the_tags_that_a_checkpoint_knows(capsys, checkpoint_folder, tmp_path):
    vocabulary = json.loads((checkpoint_folder / "vocabulary.json").read_text())
    told = helped(capsys, "sample", "--checkpoint", str(checkpoint_folder), "--help")
    assert all(tag in told for tag in (*vocabulary["styles"], *vocabulary["subjects"], *vocabulary["registers"]))
    assert f"tags of {tmp_path}: " in helped(capsys, "sample", "--help", "--checkpoint", str(tmp_path))
    assert "tokun info name/model" in helped(capsys, "sample", "-h", "--checkpoint", "name/model"), "nothing is downloaded for help"
    assert "wood-engraving" in sample_options.known_to([])


def test_the_command_writes_what_the_script_writes(checkpoint_folder, tmp_path):
    common = ["--checkpoint", str(checkpoint_folder), "--seed", "7", "--n", "2", "--no-compile"]
    assert typed("sample", *common, "--out", str(tmp_path / "a")) == 0
    sample_script.main([*common, "--out", str(tmp_path / "b")])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir()) and "grid.png" in files
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_a_data_tool_is_reached_by_its_command(tmp_path, capsys):
    assert typed("toy", "--out", str(tmp_path), "--n", "3", "--side", "32") == 0
    capsys.readouterr()
    assert typed("inspect", str(tmp_path)) == 0
    assert "3" in capsys.readouterr().out
    assert typed("inspect", str(tmp_path / "none")) == 2


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_completion_script_names_the_commands_and_their_options(shell, capsys):
    assert typed("completion", shell) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS) and "interpolate" in told and "bfloat16" in told


def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    typed("completion", "bash")
    script = tmp_path / "tokun.bash"
    script.write_text(capsys.readouterr().out)
    asked = ["tokun sam", "tokun sample --interp", "tokun sample --dtype bf"]
    lines = "\n".join(
        f"COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}; COMPREPLY=(); _shtab_tokun; echo ${{COMPREPLY[@]}}" for words in asked
    )
    done = subprocess.run(["bash", "-c", f"source {script}\n{lines}"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:3] == ["sample", "--interpolate", "bfloat16"], done.stderr


def test_completion_leaves_out_the_options_of_a_command_whose_extra_is_missing(monkeypatch):
    real = completion.import_module

    def without_data(name):
        if name.startswith("data_tools"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(completion, "import_module", without_data)
    parser = completion.whole_parser()
    assert parser.parse_args(["prepare"]).command == "prepare"


# --- what a checkpoint is ---------------------------------------------------------------------------------------------


def test_info_tells_a_checkpoint_in_about_ten_lines(checkpoint_folder, capsys):
    assert typed("info", str(checkpoint_folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 8 <= len(lines) <= 12
    labels = [line.split()[0] for line in lines[1:]]
    assert labels[:9] == ["generator", "pictures", "styles", "subjects", "things", "registers", "tasks", "sampling", "figures"]


def test_info_without_an_argument_is_of_the_bundled_model_with_the_figures_of_its_card(capsys):
    assert typed("info") == 0
    told = capsys.readouterr().out
    assert (
        "(bundled)" in told
        and "6.6M parameters" in told
        and "wood-engraving" in told
        and "held-out PSNR" in told
        and "guidance_scale 4" in told
    )
    assert typed("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        len(found["things"]) > 100 and len(found["figures"]) > 50 and found["parameters"] == 6_630_144 and found["license"] == "apache-2.0"
    )


@pytest.mark.parametrize(
    ("typed_words", "told"),
    [
        ("prepare in --out out --caption-column what is seen", "--caption-column 'what is seen'"),
        ("prepare in --caption-column what is seen --out out", "--caption-column 'what is seen'"),
        ("prepare in --caption-column=what is seen --out out", "--caption-column 'what is seen'"),
        ("prepare in --caption-col what is seen --out out", "--caption-column 'what is seen'"),
        ("prepare --caption-column what is seen in --out out", "--caption-column '…'"),
        ("prepare in --out my shards --license CC BY 4.0", "--out 'my shards'"),
        ("caption in --from a.csv --caption-column what is seen --out out", "--caption-column 'what is seen'"),
        ("sample --prompt A ship in a storm", "--prompt 'A ship in a storm'"),
        ("adapters merge bundled a --out my folder", "--out 'my folder'"),
    ],
)
def test_a_value_with_spaces_without_quotes_is_one_line_that_says_to_quote_it(typed_words, told, capsys):
    """`--caption-column what is seen` printed thirty lines of usage and "unrecognized arguments: is seen"."""
    with pytest.raises(SystemExit) as ended:
        typed(*typed_words.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.endswith(f"has spaces, put quotes around it: {told}\n")
    assert said.startswith(f"tokun {typed_words.split()[0]}") and "unrecognized arguments: " in said


@pytest.mark.parametrize(
    "typed_words", ["prepare in --out out --overwrite is seen", "sample --n 2 3", "prepare in --out out --nonsense a b"]
)
def test_other_words_too_many_are_not_said_to_lack_quotes(typed_words, capsys):
    with pytest.raises(SystemExit):
        typed(*typed_words.split())
    said = capsys.readouterr().err
    assert "unrecognized arguments: " in said and "quotes" not in said and said.startswith("usage: ")
