"""The only module that knows the insides of DeepSpeed's ZeRO optimizers: what their public interface lacks, under names of ours.

Whole trainer states, skipped steps and weights written from outside need it. `missing` tells which of these names a DeepSpeed does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokun.models.shares import share_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter
# names by stage; those of stages 1 and 2 are one class's
COMMON = ("optimizer", "step")
CUT_OPTIMIZER = (
    *COMMON, "scaled_global_norm", "single_partition_of_fp32_groups", "update_lp_params", "_hp_optimizer_states_linked",
    "_lazy_init_hp_params_optimizer_state",
)  # fmt: skip
CUT_WEIGHTS = (
    *COMMON, "_get_norm_groups", "fp32_partitioned_groups_flat", "fp16_groups", "_reassign_or_swap_out_partitioned_parameters",
    "checkpoint_event_prologue", "checkpoint_event_epilogue",
)  # fmt: skip
NEEDED = {1: CUT_OPTIMIZER, 2: CUT_OPTIMIZER, 3: CUT_WEIGHTS}


def missing(zero: Any, stage: int) -> list[str]:
    """The names that tokun needs and a ZeRO optimizer of DeepSpeed, or its class, does not have."""
    set_by_class = zero.__init__.__code__.co_names if isinstance(zero, type) else ()
    return [name for name in NEEDED[stage] if not hasattr(zero, name) and name not in set_by_class]


class ZeroOptimizer:
    """DeepSpeed's optimizer of ZeRO stage 1, 2 or 3. Raises RuntimeError with the way out where DeepSpeed has renamed what is needed of it."""

    def __init__(self, zero: Any, stage: int) -> None:
        if names := missing(zero, stage):
            import deepspeed

            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} has no {', '.join(names)} in its optimizer of ZeRO stage {stage}, which trainer states need: "
                "install deepspeed 0.19.8, or train under DDP (train.deepspeed=)"
            )
        self.zero, self.stage = zero, stage

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Torch's own, over this process's shares."""
        return self.zero.optimizer

    @property
    def _norm_method(self) -> str:
        return "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"

    def norm(self) -> float:
        """The norm of all gradients; inf where it is not finite, which ZeRO says by -1."""
        found = getattr(self.zero, self._norm_method)()
        norms = [float(norm) for norm in (found if isinstance(found, list) else [found])]
        return math.inf if any(norm < 0 for norm in norms) else math.hypot(*norms)

    @contextmanager
    def norm_not_finite(self, device: torch.device) -> Iterator[None]:
        """Within the block ZeRO takes the norm for one that is not finite: its step forgets the gradients and leaves the weights."""
        invalid = torch.tensor(-1.0, device=device)
        setattr(self.zero, self._norm_method, lambda: [invalid] if self.stage == 3 else invalid)
        try:
            yield
        finally:
            delattr(self.zero, self._norm_method)

    def flat_weights(self) -> list[Tensor]:
        """This process's shares of the float32 weights, as the optimizer has them."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def step_count(self) -> Tensor:
        """Steps that AdamW has taken, a number on the CPU."""
        return self.optimizer.state[self.flat_weights()[0]]["step"].cpu()

    def make_moments(self, step: Tensor) -> None:
        """AdamW's moments, zero, after so many steps; it makes them only in its first one."""
        for flat in self.flat_weights():
            own = self.optimizer.state[flat]
            own["step"] = step.clone().to(flat.device)
            own.update({name: torch.zeros_like(flat) for name in MOMENTS})
        self.link_moments()

    def link_moments(self) -> None:
        """Record which part of the moments is which parameter's. DeepSpeed does so after the first group's first step, when the next has none yet."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def read(self, parameter: Tensor) -> list[Tensor]:
        """The whole float32 weight of a parameter and its moments. Every process calls it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return [safe_get_full_fp32_param(parameter), *(safe_get_full_optimizer_state(parameter, name) for name in MOMENTS)]

    def write(self, parameter: Tensor, whole: Tensor, moment: str | None = None) -> None:
        """This process's share of `whole` into the float32 weight of the parameter, or into one of its moments."""
        from deepspeed import utils

        value, kind = (share_of(whole, parameter), "local") if self.stage == 3 else (whole, "full")
        if moment is None:
            getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, value, moment)

    def publish_weights(self) -> None:
        """Copy the float32 shares to the parameters that the model computes with."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        self.drop_gathered()

    def drop_gathered(self) -> None:
        """Let go of whole parameters: small ones stay gathered, and others too until the step, and are out of date when shares are written."""
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()
            self.zero.checkpoint_event_epilogue()
