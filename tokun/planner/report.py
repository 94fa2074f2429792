"""Format a plan for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokun.planner.duration import GPU_DAYS_PER_FAILURE
from tokun.planner.gpus import GIB
from tokun.planner.memory import STAGES

if TYPE_CHECKING:
    from tokun.planner.plan import Plan

TERMS = ("weights", "master", "gradients", "optimizer", "ema", "buffers")


def report_lines(plan: Plan) -> list[str]:
    s, i, t, d, f = plan.sizes, plan.image, plan.times, plan.storage, plan.failures
    lines = [
        f"{plan.gpus} x {plan.gpu.name}: {_si(plan.gpu.flops)}FLOP/s dense bf16, {plan.gpu.memory / GIB:.1f} GiB; "
        f"MFU {plan.mfu:.0%} assumed",
        "",
        f"image tokenizer    {_si(i.parameters)} parameters; {_si(i.step_flops)}FLOP a picture in training, "
        f"{_si(i.encode_flops)}FLOP to encode one view",
        f"                   training {_hours(t['image_tokenizer_hours'])} with {_gib(plan.image_memory)} a GPU"
        + (f"; encoding all views {_hours(t['encode_hours'])} (GPU alone, float32)" if plan.samples else ""),
        f"generator          {_si(s.parameters)} parameters: {_si(s.embedding)} embedding, {_si(s.parameters - s.embedding)} other",
        f"sequence           {s.width} ids at most (padded), {s.tokens_per_sample:.0f} with a mean caption, {s.codes} of them codes",
        f"FLOPs              {_si(s.flops_per_token)}FLOP a training token (6 x matrices + 6 L Q T, causal), "
        f"{_si(s.flops_per_token * s.width)}FLOP a sample, {_si(t['flops'])}FLOP in all",
        f"tokens             {_si(t['tokens_per_step'])} a step, {_si(t['tokens'])} in all, {t['tokens_per_parameter']:.1f} a parameter"
        + (
            f"; {_si(t['tokens_per_epoch'])} an epoch of {plan.samples:,} samples, {t['epochs']:.2f} epochs"
            if plan.samples
            else "; give --samples for epochs"
        ),
        *(
            [
                f"                   WARNING: that many passes would memorise {plan.samples:,} pictures; "
                f"about {t['sensible_epochs']:.0f} are sensible "
                f"(train.passes={t['sensible_epochs']:.0f}, or train.steps={t['sensible_steps']:.0f})"
            ]
            if plan.samples and t["epochs"] > t["sensible_epochs"] + 1
            else []
        ),
        f"micro batch        {plan.micro} a GPU x {plan.accumulation} accumulated"
        + (", gradient checkpointing" if plan.checkpointing else ""),
        "",
        "memory of a GPU    " + "".join(f"{name + ('*' if name == plan.stage else ''):>12}" for name in STAGES),
    ]
    for term in TERMS:
        lines.append(f"  {term:<17}" + "".join(f"{_gib(plan.memory[name]['state'][term]):>12}" for name in STAGES))
    for term, words in (("activations", "activations"), ("bf16_weights", "bf16 weights"), ("logits", "logits"), ("loss", "loss, backward")):
        lines.append(f"  {words:<17}" + f"{_gib(plan.step[term]):>12}" * len(STAGES))
    rows = {
        "peak": lambda m: _gib(m["peak"]), "at": lambda m: max(m["moments"], key=m["moments"].get),
        "fits": lambda m: "yes" if m["fits"] else "NO", "largest micro": lambda m: str(m["largest_micro_batch"]),
        "sent a step": lambda m: f"{m['communication'] / 1e9:.2f} GB", "in seconds": lambda m: f"{m['communication_seconds']:.3f}",
    }  # fmt: skip
    lines += [f"  {words:<17}" + "".join(f"{value(plan.memory[name]):>12}" for name in STAGES) for words, value in rows.items()]
    lines += [
        "  (* this config; muon is refused above zero0; "
        "zero3 excludes the whole copy on the first GPU for samples and the final checkpoint. "
        "Terms do not all coincide: the peak is the largest moment)",
        "",
        f"step               {t['compute_seconds']:.3f} s of computing + {t['communication_seconds']:.3f} s of communication, "
        f"not overlapped = {t['step_seconds']:.3f} s",
        f"generator          {_hours(t['hours'])} on {plan.gpus} GPU(s), {t['hours'] * plan.gpus:,.1f} GPU-hours",
        f"storage            trainer state {d['trainer_state'] / 1e9:.2f} GB, checkpoint {d['checkpoint'] / 1e9:.2f} GB; "
        f"{d['codes_per_sample']:.0f} bytes of codes a picture"
        + (f", code shards {d['code_shards'] / 1e9:,.1f} GB in {d['shards']:,.0f} files" if plan.samples else ""),
        f"failures           {f['per_day']:.3f} a day ({GPU_DAYS_PER_FAILURE:,.0f} GPU-days each assumed); "
        f"a trainer state, {f['write_seconds']:.1f} s to write, every {f['interval_seconds']:,.0f} s and "
        f"{f['restart_seconds']:g} s to start lose {f['lost_share']:.2%}; best every {f['best_interval_seconds']:,.0f} s "
        f"(save_every {f['best_save_every']:,.0f}): {f['best_lost_share']:.2%}",
    ]
    return lines


def _si(value: float) -> str:
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def _gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def _hours(hours: float) -> str:
    return f"{hours * 60:.1f} minutes" if hours < 2 else f"{hours:,.1f} hours"
