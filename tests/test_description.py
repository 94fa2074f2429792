"""What a model says of itself: in lines, as JSON, by its properties and by the signatures of its methods."""

import dataclasses
import inspect
import json
import shutil
import typing

import pytest
import torch

from tokun.config import SamplingOptions
from tokun.inference import adapters, candidates, conditional_generation, hub, model, preferences
from tokun.inference.description import describe, figures, front_matter, of_model, title
from tokun.inference.sampling_arguments import SamplingArguments
from tokun.utils.errors import UserError

Tokun = model.Tokun


def test_a_model_is_printed_in_five_lines(tiny_model):
    told = str(tiny_model)
    assert len(told.splitlines()) == 5 and told.startswith("Tokun: ")
    assert "parameters" in told and "float32 on cpu" in told and all(word in told for word in (*tiny_model.styles, *tiny_model.registers))


def test_what_a_model_knows_is_a_property(tiny_model):
    v = tiny_model.vocabulary
    assert (tiny_model.styles, tiny_model.subjects, tiny_model.things, tiny_model.registers, tiny_model.grids) == (
        v.styles, v.subjects, v.things, v.registers, v.grids
    )  # fmt: skip
    assert isinstance(tiny_model.tasks, tuple)


PUBLIC = [name for name in dir(Tokun) if callable(getattr(Tokun, name)) and (not name.startswith("_") or name == "__call__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_no_method_hides_its_options(name):
    kinds = {parameter.kind for parameter in inspect.signature(getattr(Tokun, name)).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds


@pytest.mark.parametrize("name", ["__call__", "sample", "sample_from", "plan", "interpolate", "best_of", "best_and_worst"])
def test_what_samples_takes_all_options_of_sampling(name):
    parameters = inspect.signature(getattr(Tokun, name)).parameters
    for field in dataclasses.fields(SamplingOptions):
        assert parameters[field.name].default == field.default and parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY


def test_type_checkers_know_the_same_options():
    told, real = typing.get_type_hints(SamplingArguments), typing.get_type_hints(SamplingOptions)
    assert told == real


@pytest.mark.parametrize(
    "name, module",
    [*((name, conditional_generation)
       for name in ("caption", "ask", "rewrite", "complete", "invert", "vary", "score", "interpolate")),
     ("best_of", candidates), ("best_and_worst", preferences), ("save_pretrained", hub), ("push_to_hub", hub)],
)  # fmt: skip
def test_a_method_is_the_function_that_its_module_documents(name, module):
    assert getattr(Tokun, name) is getattr(module, name) and getattr(Tokun, name).__doc__


def test_from_pretrained_has_the_defaults_of_load():
    """The parameters stand twice, so that editors see them; their defaults are the same."""
    own, called = (
        [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
        for function in (Tokun.from_pretrained, model.load)
    )
    assert own == called


def test_an_adapter_is_told_with_its_base_and_its_new_tags(tiny_model, checkpoint_folder, tmp_path):
    folder = tmp_path / "mine" / "adapter"
    folder.mkdir(parents=True)
    words = tiny_model.vocabulary.extended(styles=["lithograph"])
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}
    adapters.write(adapters.Adapter("mine", str(checkpoint_folder), "", config, {"a": torch.zeros(2, 3)}, words), folder)
    found = describe(folder)
    assert (
        found.kind == "adapter"
        and found.name == "mine"
        and found.rank == 2
        and found.parameters == 6
        and found.base == str(checkpoint_folder)
    )
    lines = found.lines()
    assert describe(tmp_path / "mine") == found and "<style:lithograph>" in lines[1] and "lithograph" in found.styles
    assert lines[1].startswith("adapter ") and str(checkpoint_folder) in lines[1] and found.grids == describe(checkpoint_folder).grids
    assert found.channels == describe(checkpoint_folder).channels


def test_an_adapter_is_told_with_the_tasks_of_its_base_which_it_keeps(tiny_model, checkpoint_folder, tmp_path):
    base, folder = shutil.copytree(checkpoint_folder, tmp_path / "base"), tmp_path / "mine" / "adapter"
    settings = json.loads((base / "sampling.json").read_text())
    (base / "sampling.json").write_text(json.dumps({**settings, "tasks": ["joint", "question"]}))
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}
    made = adapters.Adapter("mine", str(base), "", config, {"a": torch.zeros(2, 3)}, tiny_model.vocabulary, tasks=("joint", "rewrite"))
    adapters.write(made, folder)
    assert describe(folder).tasks == ("joint", "question", "rewrite")


def test_a_model_in_memory_and_its_folder_are_told_alike(tiny_model, checkpoint_folder):
    folder, memory = describe(checkpoint_folder).record(), of_model(tiny_model).record()
    same = set(folder) - {"name", "where", "dtype", "figures", "license"}
    assert {name: folder[name] for name in same} == {name: memory[name] for name in same}


@pytest.mark.parametrize(
    "name, text", [("vocabulary.json", "{}"), ("sampling.json", "[1]"), ("generator/config.json", "{"), ("vocabulary.json", None)]
)
def test_a_damaged_folder_is_told_in_one_line(name, text, checkpoint_folder, tmp_path):
    shutil.copytree(checkpoint_folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    if text is not None:
        (tmp_path / "copy" / name).write_text(text)
    with pytest.raises((UserError, FileNotFoundError), match="again"):
        describe(tmp_path / "copy")


def test_the_figures_of_a_card_are_its_tables_rows():
    card = (
        "---\nlicense: cc0-1.0\ntags: [a]\n---\n\n# A model\n\n| name | x |\n| - | - |\n| no | 1 |\n\n| figure | value | note |\n"
        "| --- | --- | --- |\n| PSNR | 16.9 dB | |\n| FID | 7 | x |\n\ntext\n"
    )
    assert figures(card) == {"PSNR": "16.9 dB", "FID": "7"} and title(card) == "A model" and front_matter(card, "license") == "cc0-1.0"
    assert figures("") == {} and title("") == "" and front_matter("", "license") == ""
