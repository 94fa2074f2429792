"""Promises of the package's layout: the names that users know stay, and nothing inside relies on those of before."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tokun
from data_tools import FORMER as FORMER_TOOLS
from tokun._former_names import FORMER

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for pattern in ("tokun/**/*.py", "data_tools/**/*.py", "benchmarks/*.py", "tests/*.py", "space/*.py", "*.py")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("former, name", [*FORMER.items(), *FORMER_TOOLS.items()])
def test_a_module_is_found_by_its_former_name_and_is_the_same(former, name):
    __import__(former)
    __import__(name)
    assert sys.modules[former] is sys.modules[name]


def test_the_names_of_the_readme_are_reached_from_the_package():
    from tokun.grids import captioned_grid

    from tokun import many, svg
    from tokun.app import build, serve
    from tokun.inference import model

    assert tokun.svg.to_svg is svg.to_svg and tokun.many.generate is many.generate and tokun.grids.captioned_grid is captioned_grid
    assert callable(tokun.load) and callable(tokun.Tokun.from_pretrained) and callable(build) and callable(serve)
    assert model.load is tokun.load, "it stood there"


COMMANDS = ("adapters", "align.drawings", "app", "evaluate", "evaluate.viewer", "planner", "serving", "sharpen")
HELP = """
import contextlib, io, json, runpy, sys
told, commands = {}, sys.argv[1:]
for command in commands:
    sys.argv, out, code = ["-m", "--help"], io.StringIO(), "no end"
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(f"tokun.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    told[command] = code, out.getvalue()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[int, str]]:
    """Status and help of each command, as `python -m` runs it, in one fresh interpreter: importing torch takes longer than what they do."""
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_command_is_run_by_a_fresh_interpreter():
    done = subprocess.run([sys.executable, "-m", "tokun.evaluate", "--help"], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0 and "tokun.evaluate" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_run_by_its_name(helped, command):
    code, said = helped[command]
    assert code in (0, None) and f"tokun.{command}" in said


def test_no_module_imports_another_by_its_former_name():
    """import-linter does not see such an import."""
    found = []
    for path in SOURCES:
        if path.name == "test_rooms.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names if name in FORMER | FORMER_TOOLS and name not in PUBLIC
            ]
    assert not found


PUBLIC = ("tokun.grids", "tokun.many", "tokun.svg")  # attributes of the package, for users


def test_what_is_read_from_beside_the_code_lies_there():
    from tokun.app import page
    from tokun.evaluate import viewer
    from tokun.inference import folders, native

    kept = (
        folders.BUNDLED / "vocabulary.json",
        native.SOURCE,
        page.STYLE,
        Path(viewer.__file__).with_name("viewer.html"),
        Path(tokun.__file__).with_name("py.typed"),
    )
    assert all(path.is_file() for path in kept)


def test_data_tools_that_prepare_and_inspect_do_not_import_torch():
    code = "import sys, data_tools.prepare, data_tools.inspect; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=200).returncode == 0


def test_the_files_that_the_test_order_names_exist():
    from tests import conftest

    named = {f"test_{name}" for name in conftest.LONG} | conftest.SLOW_FILES
    assert not [name for name in named if not (ROOT / "tests" / f"{name}.py").is_file()]
