"""Pairs by a vLLM server and 32 clients beside `Tokun.sample` with a batch of 32, in turns: seconds, processor time, the same ids or not.

    vllm serve tokun/bundled/engraving/generator --dtype float32 …          (docs/guides/serving.md)
    taskset -c 1 python benchmarks/serving.py http://localhost:8000 --server-pid PID

Give both the same cores. Pictures without guidance, words by the server, ids alone: no likelihoods, no PNGs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

import tokun
from tokun.serving import backend
from tokun.tokenizers import sequences
from tokun.utils import console

CLIENTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument(
        "--server-pid", type=int, required=True, help="of `vllm serve`, whose processor time is counted with its children's"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--grid", default="8x16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, server, first = tokun.load(device="cpu"), backend.Server(args.url), psutil.Process(args.server_pid)
    plan, v = model.plan(aspect=args.grid, guidance_scale=1, text_guidance_scale=1), model.vocabulary
    model.sample(1, n=CLIENTS, **vars(plan.options))  # builds the program, fills caches

    def processor_time() -> tuple[float, float]:
        every = [first, *first.children(recursive=True)]
        return sum(os.times()[:2]), sum(sum(process.cpu_times()[:2]) for process in every)

    by_clock, by_processor = [], []
    for turn in range(args.turns):
        u = model.uniforms(100 + turn, range(CLIENTS))
        tags = model.tags_of(u, plan)
        prompts = [sequences.image_prompt(v, each) for each in tags]

        def ask(row: int, u=u, prompts=prompts) -> list[int]:
            prompt = prompts[row]
            most = sequences.longest_from(v, len(prompt), v.n_codes(prompt)) - len(prompt)
            return server.complete(prompt, most, {"tokun_uniforms": backend.pack(u[row])})

        marks = [(time.perf_counter(), *processor_time())]
        ours = model.sequences_from(u, tags, plan.how)
        marks.append((time.perf_counter(), *processor_time()))
        with ThreadPoolExecutor(CLIENTS) as pool:
            theirs = list(pool.map(ask, range(CLIENTS)))
        marks.append((time.perf_counter(), *processor_time()))
        same = sum(own[0][: len(p) + len(other)] == [*p, *other] for own, p, other in zip(ours, prompts, theirs))
        by_clock.append((marks[2][0] - marks[1][0]) / (marks[1][0] - marks[0][0]))
        by_processor.append((sum(marks[2][1:]) - sum(marks[1][1:])) / (marks[1][1] - marks[0][1]))
        print(
            f"turn {turn}: {marks[1][0] - marks[0][0]:.2f} s, vLLM {by_clock[-1]:.2f} times that; processor time {by_processor[-1]:.2f}; "
            f"same {same} of {CLIENTS}"
        )
    print(f"medians: {statistics.median(by_clock):.2f} by the clock, {statistics.median(by_processor):.2f} by processor time")


if __name__ == "__main__":
    console.run("benchmarks/serving.py", main)
