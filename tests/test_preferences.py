"""Preferences: what files hold, what DPO makes likelier, and where they come from."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokun
from tests.small_runs import needs
from tokun.config import from_dict
from tokun.inference import preferences
from tokun.tokenizers import sequences
from tokun.training.health import Preempted
from tokun.training.preferences import scored, train_preferences
from tokun.training.run import open_run
from tokun.utils.errors import UserError

pytestmark = needs("accelerate", reason="training needs the extra 'train'")

TRAIN = {
    "steps": 12, "batch_size": 4, "precision": "no", "lr": 0.01, "weight_decay": 0.0, "warmup_steps": 1, "ema_decay": 0.5,
    "log_every": 1, "save_every": 4, "eval_every": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def contests(tiny_model):
    """(best, worst) of two candidates for each of eight places."""
    return tiny_model.best_and_worst(3, 8, 2)


@pytest.fixture(scope="module")
def pairs(contests, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text(preferences.lines(contests))
    return path


def settings(out: Path, base: Path, pairs: Path, *, rank: int = 2, train: dict | None = None, **dpo):
    tree = {
        "out": str(out), "start": str(base), "threads": 1, "tracking": {"kind": "none"}, "generator": {"dropout": 0.0},
        "dpo": {"pairs": str(pairs), "val": str(pairs), "beta": 0.5, **dpo}, "adapter": {"rank": rank, "alpha": 4.0},
        "train": {**TRAIN, **(train or {})},
    }  # fmt: skip
    return from_dict(tree)


def trained(config) -> tuple[Path, dict]:
    run = open_run(config)
    logged = {}
    log = run.tracker.log
    run.tracker.log = lambda figures, *, step: (logged.setdefault(step, {}).update(figures), log(figures, step=step))
    out = train_preferences(run)
    run.close()
    return out, logged


def gap(model, contests) -> float:
    """How much likelier the chosen samples' words and codes are than the rejected ones', in nats a pair."""
    sides = []
    for side in zip(*contests):
        tags, codes, captions = ([getattr(p, name) for p in side] for name in ("tags", "codes", "caption_ids"))
        sides.append(-sum(model.image_nll(tags, codes)) - sum(model.caption_nll(tags, captions, codes)))
    return (sides[0] - sides[1]) / len(contests)


def test_best_and_worst_answer_one_wish_and_differ(contests):
    assert len(contests) == 8
    for best, worst in contests:
        assert best.tags == worst.tags and best.pmi > worst.pmi and best.codes != worst.codes and best.index // 2 == worst.index // 2


def test_best_and_worst_hold_a_batch_at_a_time_and_are_the_same_for_every_batch_size(tiny_model, contests):
    seen = []

    def score(pairs):
        seen.append([pair.index for pair in pairs])
        return [pair.pmi for pair in pairs]

    again = tiny_model.best_and_worst(3, 8, 2, score=score, batch_size=5)
    assert seen == [list(range(i, i + 4)) for i in range(0, 16, 4)], "two whole places of two"
    assert [(a.record(), b.record()) for a, b in again] == [(a.record(), b.record()) for a, b in contests]
    seen.clear()
    tiny_model.best_and_worst(3, 2, 3, score=score, batch_size=2)
    assert seen == [[0, 1, 2], [3, 4, 5]], "never less than a place"
    with pytest.raises(ValueError, match="n is 0"):
        tiny_model.best_and_worst(3, 0, 2)


@pytest.mark.parametrize("rank", [2, 0])
def test_chosen_samples_become_likelier_than_rejected_ones(tiny_model, checkpoint_folder, contests, pairs, tmp_path, rank):
    out, logged = trained(settings(tmp_path / "run", checkpoint_folder, pairs, rank=rank))
    first, last = logged[1], logged[12]
    assert first["train/loss"] == pytest.approx(0.6931, abs=1e-3) and first["train/margin"] == pytest.approx(0, abs=1e-3), (
        "at the start nothing has moved"
    )
    assert last["train/loss"] < 0.3 and last["train/accuracy"] == 1.0 and logged[12]["val/margin"] > 1
    assert out.name == ("adapter" if rank else "checkpoint")
    model = tokun.load(checkpoint_folder, adapter=out) if rank else tokun.load(out)
    assert gap(model, contests) > gap(tiny_model, contests) + 2
    assert model.vocabulary == tiny_model.vocabulary and "preferences (DPO over codes and words" in model.card


@pytest.mark.parametrize("over", ["image", "text"])
def test_only_what_is_asked_for_is_scored(tiny_model, contests, over):
    v = tiny_model.vocabulary
    (pair,) = preferences.side(contests[0][0].record(), v, tiny_model.encode_text)[:1]
    labels = torch.tensor([pair.input_ids[1:]])
    kept = scored(labels, [pair], v, over)
    found = [i for i in kept[0].tolist() if i >= 0]
    best = contests[0][0]
    assert found == ([v.code_offset + c for c in best.codes] if over == "image" else [*best.caption_ids, v.id("<eoc>")])
    assert sum(i >= 0 for i in scored(labels, [pair], v, "both")[0].tolist()) == len(best.codes) + len(best.caption_ids) + 1


def test_stopped_and_typed_again_it_ends_in_the_same_weights(checkpoint_folder, pairs, tmp_path):
    whole, _ = trained(settings(tmp_path / "whole", checkpoint_folder, pairs, train={"steps": 6}))
    config = settings(tmp_path / "stopped", checkpoint_folder, pairs, train={"steps": 6})
    run = open_run(config)
    run.tracker.log = lambda figures, *, step: setattr(run.stop, "asked", step == 3)
    with pytest.raises(Preempted):
        train_preferences(run)
    run.close()
    again, _ = trained(config)
    one, other = (load_file(out / "adapter_model.safetensors") for out in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_base_that_was_replaced_is_noticed_and_a_state_of_before_goes_on(tiny_model, checkpoint_folder, pairs, tmp_path):
    """The path is the same, the weights are not: margins would be over another start. Older states do not say with which they began."""
    base = Path(shutil.copytree(checkpoint_folder, tmp_path / "base"))
    config = settings(tmp_path / "run", base, pairs, train={"steps": 4})
    run = open_run(config)
    run.tracker.log = lambda figures, *, step: setattr(run.stop, "asked", step == 3)
    with pytest.raises(Preempted):
        train_preferences(run)
    run.close()
    weights = base / "generator" / "model.safetensors"
    old = weights.read_bytes()
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    run = open_run(config)
    with pytest.raises(ValueError, match=r"started from other weights than start .*base holds now .*put the old checkpoint back"):
        train_preferences(run)
    run.close()
    weights.write_bytes(old)
    (state,) = (tmp_path / "run" / "state" / "preferences").glob("step-*3")
    record = json.loads((state / "state.json").read_text())
    assert record["settings"].pop("start_fingerprint")
    (state / "state.json").write_text(json.dumps(record))
    shutil.copytree(state, tmp_path / "kept" / state.name)
    out, logged = trained(config)
    assert sorted(step for step, figures in logged.items() if "train/loss" in figures) == [4]
    shutil.copytree(tmp_path / "kept", state.parent)  # killed between the result and the removal of the trainer states
    assert trained(config) == (out, {}) and not state.exists()


def test_files_and_tars_are_read_and_what_is_no_preference_is_named(tiny_model, pairs, tmp_path):
    v, encode = tiny_model.vocabulary, tiny_model.encode_text
    from_lines = preferences.read(str(pairs), v, encode)
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for number, line in enumerate(pairs.read_text().splitlines()):
            (tmp_path / f"{number:03d}.json").write_text(line)
            tar.add(tmp_path / f"{number:03d}.json", f"{number:03d}.json")
    assert preferences.read(str(tmp_path / "pairs.tar"), v, encode) == from_lines and all(p.same for p in from_lines)
    good = json.loads(pairs.read_text().splitlines()[0])
    for change, match in (
        ({"rejected": None}, "line 1 is not a preference"),
        ({"rejected": {**good["rejected"], "codes": [1, 2]}}, "2 codes do not fill a grid"),
        ({"rejected": {**good["rejected"], "codes": [64] * len(good["rejected"]["codes"])}}, "outside 0..63"),
        ({"chosen": {**good["chosen"], "tags": {"style": "cubism"}}}, "<style:cubism> is not in this vocabulary"),
        ({"rejected": good["chosen"]}, "must differ"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=match):
            preferences.read(str(tmp_path / "bad.jsonl"), v, encode)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        preferences.read(str(tmp_path / "bad.jsonl"), v, encode)


def test_prompted_pictures_are_compared_for_one_prompt_and_their_words_are_not_scored(tiny_model, tmp_path):
    ships = tiny_model.sample(1, 2, prompt="a ship", style="etching", subject="shapes")
    (house,) = tiny_model.sample(1, 1, prompt="a house", style="etching", subject="shapes")
    assert ships[0].prompted and ships[0].record()["prompted"]
    assert preferences.clicked(ships[:1], [ships[1], house]) == [(ships[0], ships[1])]
    (tmp_path / "ships.jsonl").write_text(preferences.lines([(ships[0], ships[1])]))
    (pair,) = preferences.read(str(tmp_path / "ships.jsonl"), tiny_model.vocabulary, tiny_model.encode_text)
    assert sequences.unpack(tiny_model.vocabulary, pair.chosen.input_ids).task == "text_to_image"
    with pytest.raises(ValueError, match=r"set dpo\.over=image"):
        scored(torch.tensor([pair.chosen.input_ids[1:]]), [pair.chosen], tiny_model.vocabulary, "text")


def test_sample_py_writes_pairs_that_a_run_takes(checkpoint_folder, tmp_path):
    from tokun.cli import sample

    written = str(tmp_path / "p.jsonl")
    common = ["--checkpoint", str(checkpoint_folder), "--out", str(tmp_path)]
    sample.main([*common, "--best-of", "3", "--n", "4", "--reward", "pmi", "--pairs", written])
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["chosen"]["pmi"] > line["rejected"]["pmi"] for line in lines)
    with pytest.raises(UserError, match="say how many with --best-of"):
        sample.main(["--checkpoint", str(checkpoint_folder), "--pairs", str(tmp_path / "p.jsonl")])


@pytest.fixture
def earlier(checkpoint_folder, tmp_path) -> tuple[list[str], Path, dict[str, bytes]]:
    """Options of sample.py, its --out, and what an earlier call left there."""
    from tokun.cli import sample

    out = tmp_path / "out"
    options = ["--checkpoint", str(checkpoint_folder), "--out", str(out), "--n", "2"]
    sample.main(options)
    return options, out, {path.name: path.read_bytes() for path in out.iterdir()}


def test_where_all_candidates_score_the_same_nothing_is_written_or_removed(earlier, tmp_path, monkeypatch):
    from tokun.cli import sample

    options, out, files = earlier
    (tmp_path / "even.py").write_text("def score(pairs):\n    return [1.0 for _ in pairs]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"all candidates of each of the 2 samples score the same.*another --reward"):
        sample.main([*options, "--best-of", "2", "--reward", "even:score", "--pairs", str(tmp_path / "p.jsonl")])
    assert not (tmp_path / "p.jsonl").exists() and {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_pairs_that_cannot_be_written_are_told_before_anything_is_drawn(earlier, tmp_path, monkeypatch):
    from tokun.cli import sample

    options, out, files = earlier
    monkeypatch.setattr(sample.tokun, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    for path, match in ((out, "is a folder; name a file in it"), (tmp_path / "file" / "p.jsonl", r"--pairs=.*file cannot be written")):
        with pytest.raises(UserError, match=match):
            sample.main([*options, "--best-of", "2", "--pairs", str(path)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
