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
    stage = SimpleNamespace(
        last={"loss": torch.tensor(0.5), "l1": torch.tensor(0.25), "lr": 0.001, "codes": torch.tensor([[0, 1], [1, 3]])},
        model=SimpleNamespace(codebook_size=6),
        train=SimpleNamespace(batch_size=4),
        samples=SimpleNamespace(index=SimpleNamespace(skipped=Counter({"broken": 2}))),
        window=window,
    )
    figures, words = step_log.of_image_tokenizer(stage)
    assert figures["image_tokenizer/loss"] == 0.5 and figures["image_tokenizer/l1"] == 0.25 and figures["image_tokenizer/lr"] == 0.001
    assert figures["image_tokenizer/batch_usage"] == 0.5 and figures["image_tokenizer/skipped"] == 2
    assert figures["image_tokenizer/images_per_second"] == pytest.approx(8, rel=0.05)
    assert "image_tokenizer/codes" not in figures and words.startswith("loss 0.500 l1 0.250 ")
