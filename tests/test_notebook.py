"""Promises of notebooks/tokun.ipynb: it says nothing of the machine it was written on, and every cell of it runs."""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.small_runs import SMALL

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra 'dev')")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra 'dev')")

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "tokun.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def overrides() -> list[str]:
    """The settings of a small run, as one types them."""
    flat = [f"{section}.{name}={json.dumps(value)}" for section, values in SMALL.items() for name, value in values.items()]
    small = [setting for setting in flat if not setting.startswith("tracking")]
    return [*small, "threads=1", "train.optimizer=adamw", "train.compile=false", "image_tokenizer_train.steps=3", "train.steps=3"]


def test_it_holds_no_outputs_and_no_paths_of_a_machine(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
    assert not re.findall(r"(?<![\w.:/])(?:/[A-Za-z][\w.-]*){2,}|[A-Z]:\\\\", NOTEBOOK.read_text(encoding="utf-8").replace("\\n", "\n"))
    assert notebook.metadata.kernelspec.name == "python3"


class Colab(BaseHTTPRequestHandler):
    """What Colab's own server tells of a notebook that was opened from GitHub."""

    def do_GET(self):
        place = "https%3A%2F%2Fgithub.com%2Fsomebody%2Fart%2Fblob%2Fv0.2.0%2Fnotebooks%2Ftokun.ipynb"
        data = json.dumps([{"path": f"fileId={place}", "name": "tokun.ipynb"}]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def install(notebook, tmp_path, monkeypatch):
    """The functions of the cell that installs, in an empty folder, outside Colab."""
    (tmp_path / "here" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "notebooks")
    for name in ("COLAB_JUPYTER_IP", "KMP_TARGET_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = next(cell.source for cell in notebook.cells if cell.id == "install")
    names = {"REPOSITORY": ""}
    exec(source[: source.index("if wanted :=")], names)
    return names


def test_it_installs_the_clone_that_it_lies_in(install, tmp_path):
    clone = tmp_path / "here"
    (clone / "pyproject.toml").touch()
    (clone / "data_tools").mkdir()
    assert install["to_install"]() == [] and Path.cwd() == clone, "its packages are there"
    install["NEEDED"] = ("no_such_package",)
    assert install["to_install"]() == ["-e", ".[data]"] and sys.path[0] == str(clone)


def test_it_installs_a_wheel_beside_it(install):
    Path("tokun-0.2.0-py3-none-any.whl").touch()
    assert install["to_install"]() == [f"{Path.cwd()}/tokun-0.2.0-py3-none-any.whl[data]"]


def test_it_installs_what_colab_opened_it_from(install, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Colab) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
        monkeypatch.setenv("KMP_TARGET_PORT", str(server.server_address[1]))
        assert install["to_install"]() == ["tokun[data] @ git+https://github.com/somebody/art@v0.2.0"]
        server.shutdown()


def test_alone_it_takes_the_projects_address_or_says_what_is_missing(install):
    with pytest.raises(ValueError, match=r"lies alone: put a wheel .* or the project's address into REPOSITORY"):
        install["to_install"]()
    install["REPOSITORY"] = "https://github.com/somebody/tokun"
    assert install["to_install"]() == ["tokun[data] @ git+https://github.com/somebody/tokun"]


@pytest.mark.timeout(600)  # 16 s of CPU, in a process of its own
def test_every_cell_runs_from_pictures_to_captions(notebook, tmp_path):
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra 'dev')")
    pytest.importorskip("accelerate", reason="training needs the extra 'train'")
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    given = {"DRAWN": 24, "SIDE": 32, "RUN": str(tmp_path / "run"), "SETTINGS": overrides()}
    injected = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    cells = {cell.id: cell for cell in notebook.cells}
    shown = {
        name: [output.data for output in cells[name].outputs if output.output_type == "display_data"]
        for name in ("look", "sample", "prompt", "caption", "keep")
    }
    assert all(any("image/png" in data for data in found) for found in shown.values())
    told = {
        name: "".join(output.text for output in cells[name].outputs if output.get("name") == "stdout")
        for name in ("prepare", "shards", "sample", "caption", "keep")
    }
    assert (
        "train pairs" in told["prepare"]
        and told["sample"].strip()
        and len(re.findall(r"^[01]\.\d\d  ", told["caption"], re.MULTILINE)) == 3
    )
    assert "validation" not in told["shards"] and "num_rows: 2" in told["shards"] and "Qwen3ForCausalLM" in told["keep"]
    assert "pmi=" in told["caption"] and (tmp_path / "run" / "checkpoint" / "generator" / "model.safetensors").is_file()
