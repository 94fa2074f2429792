"""The only module that uses internals of DeepSpeed, chiefly of its ZeRO optimizers, for what their public interface lacks.

Whole trainer states, skipped steps and externally written weights need it. `missing` lists the internals that a DeepSpeed version lacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokun.models.partitioned_parameters import share_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of each parameter
# names by stage; stages 1 and 2 share a class
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
    """The names that tokun needs and that a ZeRO optimizer of DeepSpeed, or its class, lacks."""
    set_by_class = zero.__init__.__code__.co_names if isinstance(zero, type) else ()
    return [name for name in NEEDED[stage] if not hasattr(zero, name) and name not in set_by_class]


def skip_inference_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce, which only inference under tensor parallelism uses.

    On CPUs it would be compiled when processes meet, over a minute of CPU time in each new environment, and leave 66 MiB per process in
    /dev/shm.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ZeroOptimizer:
    """DeepSpeed's optimizer of ZeRO stage 1, 2 or 3. Raises RuntimeError with the way out if DeepSpeed has renamed an internal."""

    def __init__(self, zero: Any, stage: int) -> None:
        if names := missing(zero, stage):
            import deepspeed

            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} has no {', '.join(names)} in its optimizer of ZeRO stage {stage}, "
                "which trainer states need: "
                "install deepspeed 0.19.8, or train under DDP (train.deepspeed=)"
            )
        self.zero, self.stage = zero, stage

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer over this process's shares."""
        return self.zero.optimizer

    @property
    def _norm_method(self) -> str:
        return "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"

    def norm(self) -> float:
        """The norm of all gradients; inf if it is not finite, for which ZeRO returns -1."""
        found = getattr(self.zero, self._norm_method)()
        norms = [float(norm) for norm in (found if isinstance(found, list) else [found])]
        return math.inf if any(norm < 0 for norm in norms) else math.hypot(*norms)

    @contextmanager
    def non_finite_norm(self, device: torch.device) -> Iterator[None]:
        """Within the block ZeRO sees a non-finite norm: its step drops the gradients and leaves the weights unchanged."""
        invalid = torch.tensor(-1.0, device=device)
        setattr(self.zero, self._norm_method, lambda: [invalid] if self.stage == 3 else invalid)
        try:
            yield
        finally:
            delattr(self.zero, self._norm_method)

    def flat_weights(self) -> list[Tensor]:
        """This process's shares of the float32 weights, flat, as the optimizer holds them."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def step_count(self) -> Tensor:
        """The number of steps that AdamW has taken, on the CPU."""
        return self.optimizer.state[self.flat_weights()[0]]["step"].cpu()

    def make_moments(self, step: Tensor) -> None:
        """Create AdamW's moments, zero, at step `step`; AdamW itself creates them only in its first step."""
        for flat in self.flat_weights():
            own = self.optimizer.state[flat]
            own["step"] = step.clone().to(flat.device)
            own.update({name: torch.zeros_like(flat) for name in MOMENTS})
        self.link_moments()

    def link_moments(self) -> None:
        """Map parts of the moments to parameters.

        DeepSpeed does so after the first group's first step, when the next group has none yet.
        """
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def read(self, parameter: Tensor) -> list[Tensor]:
        """The whole float32 weight of a parameter and its moments. A collective call."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole: list[Any] = [safe_get_full_fp32_param(parameter), *(safe_get_full_optimizer_state(parameter, name) for name in MOMENTS)]
        return whole

    def write(self, parameter: Tensor, whole: Tensor, moment: str | None = None) -> None:
        """Write this process's share of `whole` into the float32 weight of the parameter, or into one of its moments."""
        from deepspeed import utils

        value, kind = (share_of(whole, parameter), "local") if self.stage == 3 else (whole, "full")
        if moment is None:
            getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, value, moment)

    def publish_weights(self) -> None:
        """Copy the float32 shares to the model's parameters."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        self.drop_gathered()

    def drop_gathered(self) -> None:
        """Release gathered parameters: small ones stay gathered, others until the step, and they are stale after shares are written."""
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()
            self.zero.checkpoint_event_epilogue()
