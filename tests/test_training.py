"""The whole story at the smallest size: train, skip, refuse. Real stages, real shards."""

import dataclasses
import io
import json
import re
import runpy
import shutil
import tarfile

import pytest
import torch
from safetensors.torch import load_file

import tokun
from tests.small_runs import ROOT, SMALL, needs, run_stages, take_over, weights, write_config
from tokun.config import TrainConfig, from_dict, load_config
from tokun.models import losses
from tokun.tokenizers.image import ImageTokenizer
from tokun.training import engine, loop, step_log
from tokun.training.codes import require_codes_of
from tokun.training.generator import Parts, steps_of
from tokun.training.loop import Schedule, seed_device
from tokun.training.run import open_run
from tokun.training.token_loss import labelled

pytestmark = needs("accelerate", reason="training needs the extra 'train'")


def test_pictures_in_checkpoint_out_and_pairs_from_it(finished):
    model = tokun.load(finished[1])
    image, caption = model(42)
    assert image.size == (32, 32) and caption
    assert set(model.tasks) == {"joint", "text_to_image", "question", "rewrite"}  # the toy pictures hold what each needs
    with pytest.raises(ValueError, match=r"no question like 'Who painted this\?'"):
        model.ask(image, "Who painted this?")
    assert model.question_wordings and model.ask(image, model.question_wordings[0].replace("…", "disc"))
    card = (finished[1] / "checkpoint" / "README.md").read_text()
    assert "Figures" in card and "dB" in card
    assert list((finished[1] / "samples").glob("step-*.png"))


def test_finished_stages_are_skipped_and_leave_every_file_as_it_was(finished):
    config, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "config.yaml"}
    run_stages(config)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "config.yaml"}


@pytest.mark.parametrize(
    ("override", "named"),
    [("image_tokenizer.codebook_size=64", "codebook_size"), ("text_tokenizer.vocab_size=380", "vocab_size"), ("train.lr=0.5", "lr")],
)
def test_a_result_of_other_settings_is_refused_by_the_setting_that_differs(finished, override, named):
    with pytest.raises(ValueError, match=named):
        run_stages(finished[0], override)


def test_a_runs_own_record_is_a_config_to_go_on_with(finished, tmp_path):
    """`train.py --config runs/mine/config.yaml start=runs/mine out=runs/more`: no YAML of the checkpoint's shape has to be looked for."""
    out = tmp_path / "more"
    run_stages(finished[1] / "config.yaml", f"start={finished[1]}", "train.steps=2", f"out={out}")
    before, after = (tokun.load(folder).generator.state_dict() for folder in (finished[1], out))
    assert {name: p.shape for name, p in before.items()} == {name: p.shape for name, p in after.items()}


def test_a_run_goes_on_from_a_checkpoint_with_its_tokenizers_and_weights(finished, tmp_path, small_shards):
    before = finished[1] / "checkpoint"
    config = write_config(tmp_path, small_shards, train__lr=0.0, train__steps=2, image_tokenizer_train__steps=99, sampling__n=0)
    taken = shutil.copytree(before, tmp_path / "taken")
    out = run_stages(config, f"start={taken}")
    after = out / "checkpoint"
    assert (after / "text_tokenizer.model").read_bytes() == (before / "text_tokenizer.model").read_bytes()
    for name in ("image_tokenizer", "generator"):
        one, two = (load_file(folder / name / "model.safetensors") for folder in (before, after))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    record = json.loads((out / "image_tokenizer" / "stage.json").read_text())
    assert record["steps"] == 0 and record["figures"]["psnr"] > 0
    shutil.rmtree(taken)
    run_stages(config, f"start={taken}")  # finished: every record matches, and nothing is asked of the checkpoint again
    with pytest.raises(ValueError, match="start"):
        run_stages(config)


def test_a_run_goes_on_from_a_shallower_checkpoint_as_the_same_model(finished, tmp_path, small_shards, capsys):
    config = write_config(tmp_path, small_shards, train__lr=0.0, train__steps=2, sampling__n=0)
    out = run_stages(config, f"start={finished[1] / 'checkpoint'}", "generator.num_layers=3")
    assert "layers added: 1" in capsys.readouterr().out
    before, after = tokun.load(finished[1]), tokun.load(out)
    assert after.generator.config.num_hidden_layers == 3
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(after.generator(input_ids=ids).logits, before.generator(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("overrides", "error", "named"),
    [
        (["generator.num_layers=1"], ValueError, "generator.num_layers is 1, the checkpoint's 2"),
        (["image_tokenizer.codebook_size=64"], ValueError, "image_tokenizer.codebook_size is 64, the checkpoint's 32"),
        (["generator.pretrained=some/model"], ValueError, "exclude each other"),
        (["start=nowhere/checkpoint"], (FileNotFoundError, ValueError), "nowhere/checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_the_first_stage(finished, tmp_path, small_shards, overrides, error, named):
    config = write_config(tmp_path, small_shards)
    with pytest.raises(error, match=re.escape(named)):
        run_stages(config, f"start={finished[1] / 'checkpoint'}", *overrides)
    assert not (tmp_path / "run" / "text_tokenizer").exists()


def test_accumulated_micro_batches_and_a_chunked_loss_give_the_whole_batchs_weights(finished, tmp_path, small_shards):
    out = tmp_path / "run"
    take_over(finished[1], out)
    quiet = {f"train__{every}_every": 100 for every in ("eval", "save", "sample")}
    config = write_config(tmp_path, small_shards, generator__dropout=0.0, sampling__n=0, **quiet)
    whole = load_file(run_stages(config) / "checkpoint" / "generator" / "model.safetensors")
    for other in ("train.micro_batch_size=2", "train.loss_chunk=50"):
        shutil.rmtree(out / "checkpoint")
        split = load_file(run_stages(config, other) / "checkpoint" / "generator" / "model.safetensors")
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], atol=2e-4, rtol=1e-3)


def test_codes_of_another_tokenizer_are_refused_with_both_fingerprints(finished, tmp_path):
    codes = tmp_path / "codes"
    shutil.copytree(finished[1] / "codes", codes)
    config = from_dict({"image_tokenizer": SMALL["image_tokenizer"]})
    other = ImageTokenizer(config.image_tokenizer)
    own = ImageTokenizer.load(finished[1] / "image_tokenizer")
    assert require_codes_of(codes, own)["counts"]["train"] == 48
    with pytest.raises(ValueError, match=other.fingerprint()) as caught:
        require_codes_of(codes, other)
    assert own.fingerprint() in str(caught.value)
    (codes / "codes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"codes\.json"):
        require_codes_of(codes, own)


def test_a_collapsed_tokenizer_stops_the_run_with_an_explanation(tmp_path, small_shards):
    config = write_config(tmp_path, small_shards, image_tokenizer_train__min_psnr=60.0, image_tokenizer_train__steps=2)
    for _ in range(2):  # when it has just been trained, and when it is found finished
        with pytest.raises(ValueError, match=r"PSNR is .* dB"):
            run_stages(config)
    assert not (tmp_path / "run" / "codes").exists()


def test_a_non_finite_loss_stops_the_run_and_names_its_batch(finished, tmp_path, small_shards):
    config = write_config(tmp_path, small_shards, image_tokenizer_train__lr=1e30, image_tokenizer_train__max_grad_norm=1e30)
    with pytest.raises(FloatingPointError, match="non_finite_image_tokenizer"):
        run_stages(config)
    (listed,) = (tmp_path / "run").glob("non_finite_*.json")
    assert len(json.loads(listed.read_text())) == 8


def test_a_corrupt_member_is_skipped_and_counted(finished, tmp_path, small_shards):
    mine = tmp_path / "shards"
    shutil.copytree(small_shards, mine)
    shard = mine / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    png = data.index(b"\x89PNG")
    data[png : png + 64] = bytes(64)
    shard.write_bytes(bytes(data))
    out = run_stages(write_config(tmp_path, mine, train__steps=3))
    record = json.loads((out / "codes" / "codes.json").read_text())
    assert record["counts"]["train"] == 47
    assert json.loads((out / "image_tokenizer" / "stage.json").read_text())["skipped"]["broken picture"] > 0


def test_a_shard_without_one_usable_sample_is_counted_and_not_fatal(finished, tmp_path, small_shards):
    mine = tmp_path / "shards"
    shutil.copytree(small_shards, mine)
    with tarfile.open(mine / "train-00002.tar", "w") as tar:
        info = tarfile.TarInfo("lonely.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    out = run_stages(write_config(tmp_path, mine, image_tokenizer_train__steps=3, train__steps=3))
    record = json.loads((out / "codes" / "codes.json").read_text())
    assert record["counts"]["train"] == 48
    assert record["skipped"] == {"train-00002": {"incomplete sample": 1}}


def test_a_run_stopped_by_its_minutes_says_so_when_more_are_given(finished, tmp_path, small_shards, capsys):
    config = write_config(tmp_path, small_shards)
    take_over(finished[1], tmp_path / "run")
    out = run_stages(config, "train.max_minutes=0.0001")
    assert json.loads((out / "checkpoint" / "training.json").read_text())["stopped_by"] == "max_minutes 0.0001"
    run_stages(config, "train.max_minutes=0.0001")
    assert "was stopped by" not in capsys.readouterr().out
    run_stages(config)
    assert "was stopped by max_minutes 0.0001" in capsys.readouterr().out


EARLY = [
    ("train.batch_size=8", 3, False, "train.batch_size"),
    ("train.micro_batch_size=3", 1, False, "micro_batch_size"),
    ("train.task_mix={painting: 1}", 1, False, "painting"),
    ("train.tag_dropout=2.0", 1, False, "tag_dropout"),
    ("generator.dropout=1.0", 1, False, "generator.dropout"),
    ("train.deepspeed=nowhere.json", 1, True, "nowhere.json"),
    ("train.deepspeed=configs/deepspeed/zero1.json", 1, True, "zero0"),
    ("image_tokenizer_train.perceptual_weights=nowhere.pt", 1, False, "nowhere.pt"),
]


@pytest.mark.parametrize(("override", "world", "deepspeed", "named"), EARLY)
def test_what_a_late_stage_would_refuse_is_refused_before_the_first(tmp_path, small_shards, monkeypatch, override, world, deepspeed, named):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.chdir(ROOT)
    more = (
        {"image_tokenizer_train__perceptual": "squeezenet", "image_tokenizer_train__perceptual_weight": 0.1}
        if "weights" in override
        else {}
    )
    config = load_config(
        write_config(tmp_path, small_shards, train__optimizer="muon", image_tokenizer_train__batch_size=24, **more), [override]
    )
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        open_run(config, deepspeed=deepspeed)
    assert not (tmp_path / "run").exists()


MISTAKES = [
    ("train.batchsize=1", "train.batch_size"),
    ("data.train=nowhere/train-*.tar", "nowhere/train-*.tar"),
    ("train.batch_size=0", "batch_size"),
    ("train.task_mix={painting: 1}", "painting"),
    ("image_tokenizer.downsample=16", "downsample"),
]


@pytest.mark.parametrize(("override", "named"), MISTAKES)
def test_a_users_mistake_is_named(tmp_path, small_shards, finished, override, named):
    out = tmp_path / "run"
    take_over(finished[1], out)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        run_stages(write_config(tmp_path, small_shards), override)


def test_a_users_mistake_is_one_line_at_the_console(finished, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(finished[0]), "train.batchsize=1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")  # as `python train.py` does
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "train.batch_size" in said


def test_a_spike_is_skipped_and_counted(finished, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr("tokun.training.health.Spikes.is_spike", lambda self, norm: setattr(self, "count", self.count + 1) or True)
    out = run_stages(write_config(tmp_path, small_shards))
    record = json.loads((out / "checkpoint" / "training.json").read_text())
    assert record["train"]["train/skipped_spikes"] == 8
    assert any(not torch.equal(one, other) for one, other in zip(weights(out).values(), weights(finished[1]).values(), strict=True))


def test_health_is_tracked(finished):
    record = json.loads((finished[1] / "checkpoint" / "training.json").read_text())
    figures = record["train"]
    assert 0 < figures["train/mfu"] < 1.5 and 0 <= figures["train/padding"] < 0.5 and figures["train/peak_memory_gb"] > 0.05
    assert figures["train/skipped_spikes"] == 0 and 0 <= figures["train/data_wait"] <= 1


def test_rows_that_fill_up_a_batch_are_not_in_its_loss():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (3, 41), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.3] = losses.IGNORE
    logits, is_image = torch.randn(3, 41, 50, generator=g), torch.arange(50) >= 20
    positions, kept = labelled(labels)
    assert len(positions) == len(kept) == 128 > (labels != losses.IGNORE).sum() > 64
    parts = losses.next_token_losses(logits.flatten(0, 1)[positions], kept, is_image)
    torch.testing.assert_close(parts, losses.next_token_losses(logits, labels, is_image))


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1.0 + 5e-7, 50.0])
def test_gradients_are_clipped_to_the_bit_as_torch_clips_them(limit):
    model = torch.nn.Linear(8, 4)
    own = engine.Engine.make(TrainConfig(max_grad_norm=limit, precision="no"), model, deepspeed=False, micro=1, accumulation=1)
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in model.parameters()]
    size = torch.nn.utils.get_total_norm(gradients)
    norms, clipped = [], []
    for clip in (lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), limit), own.norm):
        for p, gradient in zip(model.parameters(), gradients):
            p.grad = gradient / size  # a norm of one, about
        norms.append(float(clip()))
        clipped.append([p.grad.clone() for p in model.parameters()])
    assert norms[0] == norms[1] and all(torch.equal(a, b) for a, b in zip(*clipped))


def test_a_device_is_seeded_as_torch_seeds_it():
    torch.manual_seed(2**61 + 3)
    expected = torch.rand(8)
    seed_device(2**61 + 3, torch.device("cpu"))
    assert torch.equal(torch.rand(8), expected)


def test_settings_that_came_later_do_not_part_a_run_from_what_it_was_before_them(finished):
    config, out = finished
    settings = json.loads((out / "checkpoint" / "training.json").read_text())["settings"]
    assert "codebook_start" not in settings["generator"] and not {"ema_every", "seed"} & set(settings["train"])
    with pytest.raises(ValueError, match="codebook_start"):
        run_stages(config, "generator.codebook_start=true")


@pytest.mark.parametrize(
    ("settings", "pictures", "steps"),
    [
        ({"steps": 2000}, 67, 2000),
        ({"steps": 2000, "passes": 20.0, "batch_size": 16, "warmup_steps": 20}, 67, 84),
        ({"steps": 50, "passes": 20.0, "batch_size": 16, "warmup_steps": 20}, 67, 50),
        ({"steps": 2000, "passes": 20.0, "batch_size": 16, "warmup_steps": 20}, 3, 40),  # a run that ends in its warm-up learns nothing
        ({"steps": 2000, "passes": 0.5, "batch_size": 16, "warmup_steps": 0}, 3200, 100),
    ],
)
def test_passes_over_the_pictures_end_a_training_before_its_steps(settings, pictures, steps):
    assert steps_of(TrainConfig(**settings), pictures) == steps


def test_a_run_ends_with_its_passes_and_one_that_time_ended_says_of_how_many_steps(finished, small_shards, tmp_path, capfd):
    take_over(finished[1], tmp_path / "run")
    out = run_stages(write_config(tmp_path, small_shards, train__passes=0.75, train__steps=100, sampling__n=0))
    record = json.loads((out / "checkpoint" / "training.json").read_text())
    assert record["steps"] == record["planned"] == 5, "48 pictures in batches of eight, three quarters of them"
    assert "5 steps of 8 are 1 passes over 48 pictures (train.passes)" in capfd.readouterr().out
    schedule = Schedule(steps=84, lr=1.0, warmup_steps=2, log_every=1, save_every=1, max_minutes=10)
    assert schedule.ended(50) == "finished after 50 of 84 steps (max_minutes 10)" and schedule.ended(84) == "finished after 84 steps"


def test_without_held_out_pictures_keep_best_is_said_to_have_nothing_to_go_by(finished, small_shards, tmp_path, capfd):
    take_over(finished[1], tmp_path / "run", ("text_tokenizer", "image_tokenizer"))
    config = write_config(tmp_path, small_shards, train__keep_best=1, train__steps=2, sampling__n=0, data__val="")
    assert not list((run_stages(config) / "best").glob("step-*"))
    assert "train.keep_best needs held-out pictures: set data.val" in capfd.readouterr().out


def test_a_choice_by_few_held_out_pictures_is_said_to_tell_little_before_and_after(finished, small_shards, tmp_path, capfd):
    take_over(finished[1], tmp_path / "run")
    run_stages(write_config(tmp_path, small_shards, train__keep_best=1, sampling__n=0))
    lines = capfd.readouterr().out.splitlines()
    few = "16 held-out pictures are few: differences of their loss under 0.04 nats are noise (64 or more tell steps apart)"
    assert lines.count(f"generator: {few}") == 2


def test_codes_of_before_words_were_counted_have_those_of_the_start(finished, monkeypatch):
    parts = Parts.of(open_run(load_config(finished[0])))
    assert parts.unrepeated_words("") == tuple(parts.codes["unrepeated_words"])
    older = dataclasses.replace(parts, codes={k: v for k, v in parts.codes.items() if k != "unrepeated_words"})
    assert older.unrepeated_words("") == () and len(older.unrepeated_words("bundled")) > 1000


# --- a loss of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 16])
def test_a_term_that_is_added_is_trained_logged_and_measured_on_held_out_pictures(finished, small_shards, tmp_path, monkeypatch, chunk):
    """As docs/guides/training.md says: a sum in `next_token_losses`, its line in `TERMS`. Here the weight is that of z."""
    before = losses.next_token_losses

    def with_penalty(logits, labels, is_image):
        probabilities = logits.float().softmax(-1)
        negative_entropy = (probabilities * probabilities.clamp_min(1e-9).log()).sum(-1)
        keep = labels != losses.IGNORE
        return before(logits, labels, is_image) | {"sure_sum": torch.where(keep, negative_entropy, 0.0).sum()}

    monkeypatch.setattr(losses, "next_token_losses", with_penalty)
    monkeypatch.setitem(losses.TERMS, "sure_sum", losses.Term("all", "z_loss"))
    logged, sure = [], {}

    def log_step(stage, bar):
        step_log.log_step(stage, bar)
        logged.append(stage.logged)

    monkeypatch.setattr(loop, "log_step", log_step)
    for weight in (0.0, 1.0):
        (tmp_path / str(weight)).mkdir()
        take_over(finished[1], tmp_path / str(weight) / "run")
        more = {"train__z_loss": weight, "train__loss_chunk": chunk, "train__steps": 30, "train__sample_every": 100, "train__lr": 1e-2}
        out = run_stages(write_config(tmp_path / str(weight), small_shards, **more))
        sure[weight] = json.loads((out / "checkpoint" / "training.json").read_text())["val"]["sure_loss"]
    assert logged and all("train/sure_loss" in figures for figures in logged)
    assert sure[1.0] < 0 and abs(sure[1.0]) > abs(sure[0.0]) + 0.05, "trained against being sure, it is less so"
