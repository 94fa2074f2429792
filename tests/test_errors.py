"""A user's mistake is one line and status 2, a bug shows its traceback, in every command."""

import ast
import errno
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import caption, inspect, prepare, questions, report
from tokun.app import page
from tokun.cli import sample, train
from tokun.config import load_config
from tokun.utils import console, errors

ROOT = Path(__file__).parents[1]
# a command, its arguments, and what it calls first
COMMANDS = {
    "train.py": (train, "train", "parse", []),
    "sample.py": (sample, "sample", "parse", []),
    "data_tools/prepare.py": (prepare, "data_tools.prepare", "prepare", ["{tmp}", "--style", "x", "--out", "{tmp}/out"]),
    "data_tools/caption.py": (caption, "data_tools.caption", "settings_from", ["{tmp}"]),
    "data_tools/inspect.py": (inspect, "data_tools.inspect", "find_shards", ["{tmp}"]),
    "data_tools/questions.py": (questions, "data_tools.questions", "ask", ["{tmp}", "--out", "{tmp}/out"]),
    "data_tools/report/__init__.py": (report, "data_tools.report", "write_report", ["{tmp}"]),
    "tokun/app/page.py": (page, "tokun.app", "parse", []),
}
BUGS = [
    ValueError("a bug"),
    TypeError("a bug"),
    AttributeError("a bug"),
    KeyError("a bug"),
    ImportError("a bug"),
    errors.BadSample("a bug"),
    OSError(errno.EBADF, "Bad file descriptor"),
]
TOLD = [
    errors.UserError("--n is 0"),
    FileNotFoundError("no such folder"),
    PermissionError("not yours"),
    OSError(28, "No space left on device"),
    FileNotFoundError(2, "No such file or directory", "a.tar"),
    ConnectionResetError(104, "Connection reset by peer"),
    OSError(errno.EINVAL, "Invalid argument", "a:b.tar"),
    OSError(errno.ESTALE, "Stale file handle"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
]


def raising(error):
    def work(*args, **options):
        raise error

    return work


@pytest.fixture(autouse=True)
def no_tracebacks_asked_for(monkeypatch):
    monkeypatch.delenv("TOKUN_TRACEBACK", raising=False)


@pytest.mark.parametrize("error", BUGS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bug_in_a_command_passes_through_with_its_traceback(command, error, monkeypatch, tmp_path):
    module, name, first, arguments = COMMANDS[command]
    monkeypatch.setattr(module, first, raising(error))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(type(error)) as raised:
        console.run(name, lambda: module.main(arguments))
    assert raised.value is error


@pytest.mark.parametrize("error", TOLD, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_a_command_is_one_line_and_status_2(command, error, monkeypatch, tmp_path, capsys):
    module, name, first, arguments = COMMANDS[command]
    monkeypatch.setattr(module, first, raising(error))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert console.status(name, lambda: module.main(arguments)) == 2
    assert (said := capsys.readouterr().err).count("\n") == 1 and said.endswith(f": {error}\n")


TYPED = (
    "train.py", "sample.py", "tokun/__main__.py", "tokun/cli/train.py", "tokun/cli/sample.py", "tokun/cli/info.py",
    "tokun/cli/completion.py", "data_tools/encode.py", "data_tools/toy.py", "tokun/app/__main__.py", "tokun/evaluate/__main__.py",
    "tokun/planner/__main__.py",
    "tokun/serving/__main__.py", "tokun/sharpen.py",
)  # fmt: skip


@pytest.mark.parametrize("path", TYPED)
def test_a_command_typed_at_the_shell_ends_so(path, monkeypatch):
    """Each hands its `main` to the console."""
    seen = []
    monkeypatch.setattr(console, "run", lambda name, main: seen.append(main.__name__))
    runpy.run_path(str(ROOT / path), run_name="__main__")
    assert seen == ["main"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_the_benchmarks_end_so_too(path):
    text = path.read_text(encoding="utf-8")
    assert (
        '__name__ == "__main__"' not in text
        or f'console.run("{"" if path.stem == "variants" else "benchmarks/"}{path.name}", main)' in text
    )


def test_with_tokun_traceback_a_mistake_shows_its_traceback_too(monkeypatch):
    monkeypatch.setenv("TOKUN_TRACEBACK", "1")
    with pytest.raises(errors.UserError, match="--n is 0"):
        console.status("sample.py", raising(TOLD[0]))


def test_a_missing_package_and_a_diverged_training_are_told(capsys):
    for error in (errors.MissingPackage("lpips is not installed"), errors.Diverged("the loss is nan")):
        assert console.status("train.py", raising(error)) == 2
        assert capsys.readouterr().err == f"train.py: {error}\n"
    assert issubclass(errors.MissingPackage, ImportError) and issubclass(errors.Diverged, FloatingPointError)


def test_old_callers_catch_both_as_value_errors():
    for kind in (errors.UserError, errors.BadSample):
        with pytest.raises(ValueError):
            raise kind("x")


def test_what_cannot_be_parsed_names_its_file_and_a_bug_beside_it_does_not():
    with (
        pytest.raises(errors.UserError, match=r"answers\.tsv cannot be read: .*utf-8.*\. Save it as UTF-8"),
        errors.reading("answers.tsv", "Save it as UTF-8"),
    ):
        b"\xff".decode()
    with pytest.raises(TypeError), errors.reading("answers.tsv"):
        len(3)


@pytest.mark.parametrize("package", ["tokun", "data_tools"])
def test_no_module_raises_a_bare_value_error(package):
    """A user's mistake is a UserError, a broken sample a BadSample, ours an assertion: a bare ValueError tells none of them from a bug."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and getattr(node.exc.func, "id", "") == "ValueError"
    ]
    assert not found


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_ends_a_command_quietly_and_no_other_broken_pipe_does(lines):
    """`… | head` ended in "Broken pipe"; few lines are written at the end only."""
    code = f"from tokun.utils import console; console.run('it', lambda: print('line\\n' * {lines}, end=''))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
    assert console.status("it", raising(BrokenPipeError(32, "Broken pipe"))) == 2


def test_drawn_pictures_beside_shards_of_ones_own_are_told_with_both_ways_out():
    """`--config configs/tiny.yaml data.train=…` said "choose one of them", and not how."""
    with pytest.raises(
        errors.UserError, match=r"data\.toy is 12288 and data\.train is mine/\*\.tar.*add data\.toy=0.*leave out data\.train"
    ):
        train.draw_toy_pictures(load_config("configs/tiny.yaml", ["data.train=mine/*.tar"]))


@pytest.mark.parametrize("folder", ["tokun", "data_tools", "benchmarks", "tests", "docs"])
def test_no_text_stands_alone_as_if_its_other_half_had_been_cut_off(folder):
    """A text split over two lines without brackets: its second half is a statement that does nothing."""
    lost = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Expr):
                text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
                alone = text and not (ast.get_source_segment(source, node) or "").lstrip("rb").startswith('"""')
                lost += [f"{path.name}:{node.lineno}"] * (isinstance(node.value, ast.JoinedStr) or alone)
    assert not lost
