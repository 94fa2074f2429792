"""Promises of tokun/utils/launcher.py: a last line that stands below the launcher's own, and a launcher's end that is noticed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_runs import ROOT
from tokun.utils import launcher

pytest.importorskip("psutil", reason="comes with the extra 'train'")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a Unix shell waits for the launcher")
START = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
print("the launcher's own traceback", file=sys.stderr)
"""


@pytest.fixture
def start(tmp_path):
    """Starts Python code below a launcher: a script of that name, which says something when it ends."""
    (tmp_path / "deepspeed").write_text(START)

    def start(code: str) -> subprocess.Popen:
        command = [sys.executable, str(tmp_path / "deepspeed"), f"from tokun.utils import launcher\n{code}"]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)

    return start


def test_the_last_line_is_ours_although_the_launcher_ends_later(start):
    started = start("launcher.say_last('everything is saved')")
    assert started.communicate(timeout=100)[1].splitlines() == ["the launcher's own traceback", "everything is saved"]


def test_a_launcher_that_is_killed_is_noticed_by_what_it_started(start, tmp_path):
    noticed = tmp_path / "noticed"
    code = f"""
import time
found = launcher.launchers()
assert len(found) == 1 and not launcher.gone(found)
open({str(noticed)!r}, "w").write("there")
while not launcher.gone(found): time.sleep(0.01)
open({str(noticed)!r}, "w").write("gone")
"""
    started = start(code)
    wait_for(noticed, "there")
    started.kill()
    wait_for(noticed, "gone")
    started.communicate()


def test_the_environment_is_that_in_which_the_command_was_typed(start, monkeypatch):
    """What the launcher changes for itself or for what it starts is not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    code = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
print(launcher.environment()["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_VISIBLE_DEVICES"], file=sys.stderr)
"""
    assert start(code).communicate(timeout=100)[1].splitlines()[0] == "3 0"
    assert launcher.environment()["CUDA_VISIBLE_DEVICES"] == "3", "without a launcher, this process's own"


def wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 100
    while not (path.is_file() and path.read_text() == text):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_without_a_launcher_the_line_is_printed_at_once(capsys):
    assert launcher.launchers() == []
    launcher.say_last("everything is saved")
    assert capsys.readouterr().err == "everything is saved\n"
