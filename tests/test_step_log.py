"""Promises of tokun/training/step_log.py: what is logged of a step, when a window ends, and under which names."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from tokun.training import step_log


def test_figures_are_logged_at_the_stages_step_and_a_new_window_begins():
    logged, shown = [], []
    window = step_log.Window()
    window.steps, window.waited = 10, 0.5
    stage = SimpleNamespace(
        step=40,
        window=window,
        run=SimpleNamespace(tracker=SimpleNamespace(log=lambda figures, step: logged.append((figures, step)))),
        figures=lambda: ({"train/loss": 2.5, "train/steps": window.steps}, "loss 2.500"),
    )
    step_log.log_step(stage, SimpleNamespace(set_postfix_str=shown.append))
    assert logged == [({"train/loss": 2.5, "train/steps": 10}, 40)] and shown == ["loss 2.500"]
    assert stage.window is not window and stage.window.steps == 0 and stage.window.waited == 0.0


def test_the_image_tokenizer_logs_its_terms_its_codes_and_its_speed():
    window = step_log.Window()
    window.start, window.steps = window.start - 10, 20
    last = {"loss": torch.tensor(0.5), "l1": torch.tensor(0.25), "lr": 0.001, "codes": torch.tensor([[0, 1], [1, 3]])}
    figures, words = step_log.of_image_tokenizer(window, last, batch_size=4, codebook_size=6, skipped=Counter({"broken": 2}))
    assert figures["image_tokenizer/loss"] == 0.5 and figures["image_tokenizer/l1"] == 0.25 and figures["image_tokenizer/lr"] == 0.001
    assert figures["image_tokenizer/batch_usage"] == 0.5 and figures["image_tokenizer/skipped"] == 2
    assert figures["image_tokenizer/images_per_second"] == pytest.approx(8, rel=0.05)
    assert "image_tokenizer/codes" not in figures and words.startswith("loss 0.500 l1 0.250 ")


def test_the_generator_logs_its_losses_its_speed_and_its_update():
    window = step_log.Window()
    window.start, window.waited = window.start - 10, 1.0
    window.counts.update(tokens=800, width=1000)
    figures, words = step_log.of_generator(
        window, {"image_sum": 6.0, "text_sum": 2.0, "z_sum": 0.5, "mine_sum": 3.0}, weights=(1.0, 0.5), flops=1e6, rate=1e9
    )
    assert (figures["train/loss"], figures["train/image_loss"], figures["train/text_loss"], figures["train/z"]) == (7.0, 6.0, 2.0, 0.5)
    assert figures["train/mine_loss"] == 3.0
    assert figures["train/tokens_per_second"] == pytest.approx(80, rel=0.05) and figures["train/data_wait"] == pytest.approx(0.1, rel=0.05)
    assert figures["train/padding"] == pytest.approx(0.2) and figures["train/mfu"] == pytest.approx(0.08, rel=0.05)
    assert words.startswith("image 6.000 text 2.000 ")
    update = step_log.of_update(lr=0.1, norm=2.0, spikes=3, epoch=1.5, device=torch.device("cpu"))
    memory = update.pop("train/peak_memory_gb")
    assert update == {"train/lr": 0.1, "train/grad_norm": 2.0, "train/skipped_spikes": 3, "train/epoch": 1.5} and memory > 0
    assert step_log.of_samples(Counter({"broken": 2, "torn": 1}), 4) == {"train/skipped": 3, "train/cut_captions": 4}
