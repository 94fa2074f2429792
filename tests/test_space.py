"""Promises of space/ and .ci/address: Dockerfile, card and requirements say what pyproject.toml says; the address stands in one place."""

import ast
import importlib.util
import re
import shutil
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "space"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WITH_ADDRESS = ("pyproject.toml", "README.md", "notebooks/tokun.ipynb", "space/requirements.txt")


def dockerfile(word: str) -> list[str]:
    return re.findall(rf"^{word} (.*)$", (SPACE / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)


def extras() -> set[str]:
    table = PYPROJECT.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = ", table, re.MULTILINE))


def test_the_requirements_ask_for_extras_that_there_are_and_for_nothing_else():
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert lines[1:] == [""], "one requirement: all others are tokun's own"
    name, asked, address = re.fullmatch(r"(\w+)\[([\w,]+)\] @ (git\+https://\S+)", lines[0]).groups()
    assert name == re.search(r'^name = "(\w+)"', PYPROJECT, re.MULTILINE)[1]
    assert {"app", "svg"} <= set(asked.split(",")) <= extras() and address.count("/") >= 4


def test_the_dockerfile_copies_what_is_there_and_starts_the_file_and_the_port_of_the_card():
    card = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    copied = {name for line in dockerfile("COPY") for name in line.split()[:-1]}
    assert copied == {path.name for path in SPACE.iterdir() if path.is_file()} - {"Dockerfile"}
    assert ast.literal_eval(dockerfile("CMD")[0]) == ["python", card["app_file"]]
    assert dockerfile("FROM") == [f"python:{card['python_version']}-slim"]
    least = re.search(r'requires-python = ">=(\d+)\.(\d+)"', PYPROJECT)
    assert tuple(map(int, card["python_version"].split("."))) >= tuple(map(int, least.groups()))
    assert [line for line in dockerfile("RUN") if line.startswith("pip install")] == ["pip install --no-cache-dir -r requirements.txt"]
    assert f"port={dockerfile('EXPOSE')[0]}" in (SPACE / card["app_file"]).read_text(encoding="utf-8")
    gradio = re.search(r'"gradio>=(\d+)', PYPROJECT)
    assert card["sdk"] == "gradio" and int(card["sdk_version"].split(".")[0]) >= int(gradio[1])


def test_the_space_shows_the_model_that_the_variable_names(monkeypatch):
    import tokun
    import tokun.app

    for given, loaded in ((None, None), ("", None), ("me/ships", "me/ships")):
        asked = []
        monkeypatch.setattr(tokun, "load", asked.append)
        monkeypatch.setattr(tokun.app, "build", lambda model: model)
        monkeypatch.delenv("TOKUN_CHECKPOINT", raising=False)
        if given is not None:
            monkeypatch.setenv("TOKUN_CHECKPOINT", given)
        found = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
        found.loader.exec_module(importlib.util.module_from_spec(found))
        assert asked == [loaded]


@pytest.fixture
def copied(tmp_path):
    for name in WITH_ADDRESS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    loader = SourceFileLoader("address", str(ROOT / ".ci" / "address"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("address", loader))
    loader.exec_module(module)
    return tmp_path, module.main


def test_the_address_is_given_once_and_stands_wherever_it_is_needed(copied, capsys):
    root, write = copied
    assert write(root, "https://github.com/somebody/tokun.git") == 0
    texts = {name: (root / name).read_text(encoding="utf-8") for name in WITH_ADDRESS}
    assert '[project.urls]\nRepository = "https://github.com/somebody/tokun"\n' in texts["pyproject.toml"]
    badge = "(https://colab.research.google.com/github/somebody/tokun/blob/main/notebooks/tokun.ipynb)"
    assert texts["README.md"].count(badge) == texts["notebooks/tokun.ipynb"].count(badge) == 1
    assert 'REPOSITORY = \\"https://github.com/somebody/tokun\\"' in texts["notebooks/tokun.ipynb"]
    assert texts["space/requirements.txt"] == "tokun[app,svg] @ git+https://github.com/somebody/tokun\n"
    assert write(root) == 0 and {name: (root / name).read_text(encoding="utf-8") for name in WITH_ADDRESS} == texts
    assert write(root, "https://git.example.org/arts/tokun/") == 0
    assert "](tokun.ipynb)" in (root / "notebooks/tokun.ipynb").read_text(), "Colab opens notebooks of GitHub only"
    assert write(root, "tokun") == 2 and "is not the address of a repository" in capsys.readouterr().err


def test_what_stands_here_is_what_the_address_in_pyproject_gives(copied):
    root, write = copied
    before = {name: (root / name).read_text(encoding="utf-8") for name in WITH_ADDRESS}
    if "[project.urls]" in before["pyproject.toml"]:
        assert write(root) == 0
        assert {name: (root / name).read_text(encoding="utf-8") for name in WITH_ADDRESS} == before
    else:
        assert "OWNER" in before["space/requirements.txt"] and 'REPOSITORY = \\"\\"' in before["notebooks/tokun.ipynb"]
        assert "colab-badge.svg)](notebooks/tokun.ipynb)" in before["README.md"]
