"""Promises of notebooks/tokun.ipynb: it says nothing of the machine it was written on, and every cell of it runs."""

import json
import re
from pathlib import Path

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
        for name in ("look", "sample", "prompt", "caption")
    }
    assert all(any("image/png" in data for data in found) for found in shown.values())
    told = {
        name: "".join(output.text for output in cells[name].outputs if output.get("name") == "stdout")
        for name in ("prepare", "sample", "caption")
    }
    assert (
        "train pairs" in told["prepare"]
        and told["sample"].strip()
        and len(re.findall(r"^[01]\.\d\d  ", told["caption"], re.MULTILINE)) == 3
    )
    assert "pmi=" in told["caption"] and (tmp_path / "run" / "checkpoint" / "generator" / "model.safetensors").is_file()
