"""The wheel holds everything that the commands read, and works without the repository."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tokun.config import load_config
from tokun.utils import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("*.py", "*.cpp", "*.css", "*.js", "*.html", "*.json", "*.yaml", "*.safetensors", "*.model", "*.typed", "*.png")
needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="building needs setuptools here: no network is used"
)


def build(folder: Path) -> Path:
    """The wheel, built of a copy of the tree by what is installed."""
    copy = folder / "tree"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if name.startswith(("tokun/", "data_tools/", "configs/")) or "/" not in name:
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("tokun-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@needs_setuptools
def test_the_wheel_holds_all_that_the_repository_has_to_run(wheel):
    with zipfile.ZipFile(wheel) as opened:
        inside = set(opened.namelist())
        entry_points = next(name for name in inside if name.endswith("entry_points.txt"))
        assert "tokun = tokun.cli.command:script" in opened.read(entry_points).decode()
    tracked = subprocess.run(
        ["git", "ls-files", "tokun", "data_tools", "configs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = {
        f"tokun/{name}" if name.startswith("configs/") else name for name in tracked if any(Path(name).match(kind) for kind in SHIPPED)
    }
    assert len(wanted) > 150 and not sorted(wanted - inside)
    packages = {name.split("/")[0] for name in inside}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"tokun", "data_tools"}, "no tests, no scripts at the top"


@pytest.mark.slow
@pytest.mark.skipif("TOKUN_TRY_WHEEL" not in os.environ, reason="half a minute; TOKUN_TRY_WHEEL=1 asks for it, as .ci/run does")
@needs_setuptools
def test_the_wheel_alone_draws_prepares_and_trains(wheel, tmp_path):
    """In a virtual environment that has the other packages of this one, and from a folder that has no repository."""
    place, away = tmp_path / "venv", tmp_path / "away"
    away.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    packages = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    (site / "others.pth").write_text("\n".join(dict.fromkeys(packages)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"WANDB_MODE": "offline"}

    def tokun(*arguments: str) -> str:
        command = [str(place / "bin" / "python"), "-m", "tokun", *arguments]
        done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = [str(place / "bin" / "python"), "-c", "import tokun; print(tokun.__file__)"]
    assert str(site) in subprocess.run(where, cwd=away, env=environment, capture_output=True, text=True, check=True).stdout
    assert "6.6M parameters" in tokun("info")
    tokun("sample", "--seed", "42", "--n", "16", "--no-compile")
    assert (away / "outputs" / "grid.png").is_file() and len(list((away / "outputs").glob("000042-*.png"))) == 16
    plate = (away / "outputs" / "000042-00.png").read_bytes()
    (away / "pictures").mkdir()
    for name in ("a", "b"):
        (away / "pictures" / f"{name}.png").write_bytes(plate if name == "a" else (away / "outputs" / "000042-01.png").read_bytes())
        (away / "pictures" / f"{name}.txt").write_text("A ship in a storm, seen from the shore.")
    tokun("prepare", "pictures", "--style", "engraving", "--out", "shards", "--min-side", "32", "--workers", "1")
    assert list((away / "shards").glob("*.tar"))
    small = ("data.toy=64", "image_tokenizer_train.steps=2", "train.steps=2", "image_tokenizer_train.min_usage=0",
             "image_tokenizer_train.min_perplexity=0", "image_tokenizer_train.min_psnr=0", "image_tokenizer_train.perceptual=none",
             "tracking.kind=none", "train.compile=false", "train.sample_every=100")  # fmt: skip
    tokun("train", "--config", "tiny", *small)
    assert "tokun info" not in tokun("info", "runs/tiny") and (away / "runs" / "tiny" / "checkpoint" / "vocabulary.json").is_file()


# --- configs by their names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["engraving", "engraving.yaml", "configs/engraving.yaml", "configs/engraving"])
def test_a_config_that_comes_with_tokun_is_found_by_its_name_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(ROOT / "configs" / "engraving.yaml")
    assert load_config("ladder/350m", ["seed=3"]).seed == 3


def test_a_file_on_the_disk_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("out: mine\n")
    assert load_config("configs/tiny.yaml").out == "mine" and load_config("tiny").out != "mine"


@pytest.mark.parametrize("name", ["enraving", "configs/../setup.yaml", "/configs/engraving.yaml"])
def test_a_config_that_is_nowhere_is_told_with_what_there_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist.*engraving-cpu.*ladder/350m"):
        load_config(name)


def test_deepspeed_settings_are_found_by_their_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/deepspeed/zero1.json", "deepspeed/zero1"):
        assert shipped_configs.find(name, ".json").read_text() == (ROOT / "configs/deepspeed/zero1.json").read_text()
    assert "deepspeed/zero3-offload" in shipped_configs.names(".json")
    assert shipped_configs.find("own.json", ".json") == Path("own.json")
