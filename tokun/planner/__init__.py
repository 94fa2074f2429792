"""What a config will need, before it runs: parameters, FLOPs, memory per GPU, communication, hours, failures.

    tokun train --config configs/ladder/1.3b.yaml --plan --gpu H100 --gpus 64 --samples 100000000
    tokun plan --config configs/ladder/1.3b.yaml --gpu H100 --gpus 64      the same plan
    tokun plan --config configs/ladder/8m.yaml --measure 4                 also measure a real step of 4 samples here

Needs no GPU and no data, and allocates no model: parameters are counted on torch's meta device, the image tokenizer is traced with fake
tensors, and formulas give the memory of the generator's training step from what each layer keeps for its backward pass
(`layer_bytes_per_token`). Tests check the formulas against real steps. Assumptions (MFU, bandwidth, failures) are printed as such.
Sizes are in bytes, times in seconds, rates per second, unless a name says otherwise.
"""

from tokun.planner.command import add_arguments, main, main_plan
from tokun.planner.plan import Plan, make_plan

__all__ = ["Plan", "add_arguments", "main", "main_plan", "make_plan"]
