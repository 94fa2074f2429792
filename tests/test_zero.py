"""Promises of tokun/training/zero.py, the contract with DeepSpeed's insides. What they do is tested in test_launch.py."""

import importlib
from types import SimpleNamespace

import pytest

from tests.small_runs import needs
from tokun.training import zero

pytestmark = needs("deepspeed", reason="ZeRO needs the extra 'train'")

CLASSES = {
    1: "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
    2: "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
    3: "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
}


@pytest.mark.parametrize("stage", CLASSES)
def test_this_deepspeed_has_every_name_that_is_needed_of_its_optimizers(stage):
    module, _, name = CLASSES[stage].rpartition(".")
    gone = zero.missing(getattr(importlib.import_module(module), name), stage)
    assert not gone, f"DeepSpeed has renamed {', '.join(gone)} of {name}: find what does its work now, and change tokun/training/zero.py"


def test_this_deepspeed_has_the_functions_that_read_and_write_whole_tensors():
    from deepspeed import utils
    from deepspeed.runtime.engine import DeepSpeedEngine

    kinds = [f"{kind}_{what}" for kind in ("set_full", "set_local", "get_full") for what in ("fp32_param", "optimizer_state")]
    gone = [f"safe_{kind}" for kind in kinds if not hasattr(utils, f"safe_{kind}")]
    assert not gone, f"deepspeed.utils has renamed {', '.join(gone)}: change tokun/training/zero.py"
    assert "micro_steps" in DeepSpeedEngine.__init__.__code__.co_names and hasattr(DeepSpeedEngine, "is_gradient_accumulation_boundary")


def test_this_deepspeed_compiles_nothing_where_processes_meet():
    meeting = importlib.import_module("deepspeed.comm.torch")

    assert "build_shm_op" in meeting.TorchBackend.__init__.__code__.co_names, "DeepSpeed has renamed it: does it still compile a kernel?"
    zero.skip_inference_kernel()
    assert meeting.build_shm_op() is None


@pytest.mark.parametrize(("stage", "renamed"), [(1, "_hp_optimizer_states_linked"), (3, "_get_norm_groups")])
def test_a_deepspeed_that_has_renamed_one_is_refused_by_that_name_with_the_way_out(stage, renamed):
    optimizer = SimpleNamespace(**{name: None for name in zero.NEEDED[stage] if name != renamed})
    with pytest.raises(RuntimeError, match=rf"has no {renamed} in its optimizer of ZeRO stage {stage}.*train\.deepspeed="):
        zero.ZeroOptimizer(optimizer, stage)
    setattr(optimizer, renamed, None)
    assert zero.ZeroOptimizer(optimizer, stage).zero is optimizer
