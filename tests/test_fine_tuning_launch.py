"""Adapters and preferences under several processes and engines: the losses of one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.zero import Case, largest_difference, launch, train_case
from data_tools import toy
from tests.launchers import forked
from tests.small_runs import ROOT, needs, preference_tree, write_config
from tokun.config import load_config
from tokun.inference import preferences
from tokun.training.run import open_run
from tokun.training.stages import STAGES

pytestmark = [
    needs("accelerate", reason="training needs the extra 'train'"),
    needs("deepspeed", reason="the launcher needs the extra 'train'"),
    pytest.mark.timeout(600),  # a launch is a minute where others use the processors too
]
STEPS = 5
ENGINES = {"ddp": "", "zero0": "zero0", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
PAIRED = [
    *((kind, engine) for kind in ("lora", "dpo", "dpo-full") for engine in ("ddp", "zero1", "zero2", "zero3")),
    ("words", "ddp"),
    ("words", "zero3"),
]
BF16 = ("zero0", "zero1", "zero3")  # DPO of all weights in bf16


@pytest.fixture(scope="module")
def configs(tiny_model, checkpoint_folder, small_shards, tmp_path_factory) -> dict[str, Path]:
    """A config file by the kind of training, and beside that of lora the stages before."""
    folder = tmp_path_factory.mktemp("configs")
    lora = yaml.safe_load(write_config(folder, small_shards, generator__dropout=0.0, codes__views=1, sampling__n=0).read_text())
    (folder / "pairs.jsonl").write_text(preferences.lines(tiny_model.best_and_worst(3, 6, 2)))
    dpo = preference_tree(checkpoint_folder, folder / "pairs.jsonl", steps=STEPS)
    lora |= {"start": str(checkpoint_folder), "adapter": dpo["adapter"], "train": {**lora["train"], **dpo["train"]}}
    rows = [
        {"description": text, "caption": f"{text.split()[0]} {text.split()[-1]}"}
        for text in (toy.draw(5, i, 32)[1]["captions"]["plain"] for i in range(12))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {name: part for name, part in dpo.items() if name != "dpo"} | {
        "words": {"train": str(folder / "rows.jsonl"), "register": "studio"}
    }
    trees = {"lora": lora, "dpo": dpo, "dpo-full": {**dpo, "adapter": {}}, "words": words}
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"out": str(folder / name)}))
    run = open_run(load_config(folder / "lora.yaml"))
    for stage in STAGES[:3]:
        stage(run)
    run.close()
    return {name: folder / f"{name}.yaml" for name in trees}


@pytest.fixture(scope="module")
def losses(configs, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What `train_case` returns, and `weights`, by kind and engine: in this process alone ("alone"), and in two."""
    if torch.cuda.is_available():
        pytest.skip("this test is about machines without GPUs")
    folder = tmp_path_factory.mktemp("tuning")

    def case(kind: str, engine: str, *overrides: str) -> Case:
        out = folder / " ".join([kind, engine, *overrides])
        if kind == "lora":
            for part in ("text_tokenizer", "image_tokenizer", "codes"):
                shutil.copytree(configs["lora"].parent / "lora" / part, out / part)
        settings = str(ROOT / f"configs/deepspeed/{ENGINES[engine]}.json") if ENGINES.get(engine) else ""
        return Case(out.name, str(configs[kind]), str(out), settings, overrides=overrides)

    alone = [case(kind, "alone") for kind in configs] + [case("dpo-full", "alone", "train.precision=bf16")]
    found = {c.name: train_case(c) for c in alone}
    two = [case(kind, engine) for kind, engine in PAIRED] + [case("dpo-full", engine, "train.precision=bf16") for engine in BF16]
    found |= launch(two, folder / "two", processes=2, start=forked)
    for name, result in found.items():
        whole = folder / name / "checkpoint" / "generator" / "model.safetensors"
        result["weights"] = load_file(whole if whole.is_file() else folder / name / "adapter" / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize(("kind", "engine"), PAIRED)
def test_two_processes_learn_what_one_learns(losses, kind, engine):
    alone, two = losses[f"{kind} alone"], losses[f"{kind} {engine}"]
    assert set(two["losses"]) == set(alone["losses"]) == {str(step) for step in range(1, STEPS + 1)}
    assert largest_difference(two["losses"], alone["losses"]) < (1e-5 if engine == "ddp" else 1e-3)
    assert two["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=2e-3, rtol=1e-2)
    assert kind == "lora" or alone["losses"][str(STEPS)] < alone["losses"]["1"]


@pytest.mark.parametrize("engine", BF16)
def test_what_preferences_are_compared_with_is_computed_as_training_computes(losses, engine):
    """In bf16, too: at the first step margins are about 0, so that the loss is a coin's, but for rounding without DeepSpeed."""
    two, alone = (losses[f"dpo-full {how} train.precision=bf16"]["losses"]["1"] for how in (engine, "alone"))
    assert two == pytest.approx(math.log(2), abs=0.015) and two == pytest.approx(alone, abs=1e-4)
