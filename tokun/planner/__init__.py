"""What a config will need before it is started: parameters, FLOPs, memory per GPU, communication, hours, failures.

    python train.py --config configs/ladder/1.3b.yaml --plan --gpu H100 --gpus 64 --samples 100000000
    python -m tokun.planner --config configs/ladder/1.3b.yaml --gpu H100 --gpus 64      the same
    python -m tokun.planner --config configs/ladder/8m.yaml --measure 4                 and the memory of a real step of 4 samples here

Needs no GPU and no data, and allocates no model: parameters are counted on torch's meta device, the image tokenizer is traced on fake
tensors, and the memory of the generator's training step follows formulas of what each layer keeps for its backward pass
(`layer_bytes_per_token`). Tests hold the formulas against real steps. What is assumed (MFU, bandwidth, failures) is printed as such.
All sizes are bytes, all times seconds, all rates per second, unless a name says otherwise.
"""

from tokun.planner.command import add_arguments, main, main_plan
from tokun.planner.plan import Plan, make_plan

__all__ = ["Plan", "add_arguments", "main", "main_plan", "make_plan"]
