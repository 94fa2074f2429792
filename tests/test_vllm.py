"""Promises of docs/guides/serving.md with vLLM itself: a real `vllm serve` of the bundled generator with our processor, over HTTP.

vLLM has its own torch, so it lives in a virtual environment of its own, which TOKUN_VLLM names; or it is installed here.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tokun
from tests.small_runs import ROOT
from tokun.inference.folders import BUNDLED
from tokun.serving import backend
from tokun.tokenizers import sequences
from tokun.tokenizers.vocabulary import Tags
from tokun.utils.errors import UserError

PYTHON = Path(os.environ["TOKUN_VLLM"]) / "bin" / "python" if "TOKUN_VLLM" in os.environ else Path(sys.executable)
HERE = "TOKUN_VLLM" in os.environ or importlib.util.find_spec("vllm") is not None
START = 900  # seconds
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(START + 600),
    pytest.mark.skipif(not HERE, reason="vLLM is not installed; TOKUN_VLLM may name a virtual environment with it"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a server of the bundled generator, in float32."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    settings = {
        "PYTHONPATH": str(ROOT), "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(BUNDLED / "generator"), "--dtype", "float32", "--host", "127.0.0.1",
        "--port", str(port),
        "--logits-processors", "tokun.serving.processor:SpanProcessor", "--no-async-scheduling", "--enforce-eager", "--max-num-seqs", "32",
    ]  # fmt: skip
    with open(log, "w") as told, subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=told, stderr=told) as process:
        try:
            end = time.monotonic() + START
            while True:
                try:
                    yield backend.Server(f"http://127.0.0.1:{port}").url
                    break
                except UserError:
                    assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                    time.sleep(1)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def models(url):
    model = tokun.load(device="cpu")
    return model, backend.served(model, url)


def agreeing(ours, theirs) -> float:
    """The share of pairs of which every code and every piece is the same."""
    same = [one.codes == other.codes and one.caption_ids == other.caption_ids for one, other in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


@pytest.mark.parametrize(
    "wish",
    [{"aspect": "8x16"}, {"aspect": "24x16", "register": "era"}, {"prompt": "A ship in a storm", "aspect": "wide"},
     {"text_guidance_scale": 1, "aspect": "8x16"}],
    ids=["wide", "tall, era", "prompt", "words by the server"],
)  # fmt: skip
def test_a_vllm_server_draws_the_tokens_of_sample(models, wish):
    ours, theirs = models[0].sample(42, n=4, guidance_scale=1, **wish), models[1].sample(42, n=4, **wish)
    assert agreeing(ours, theirs) >= 0.75, "an id of a thousand may be chosen otherwise, where kernels round otherwise"
    assert [pair.tags for pair in ours] == [pair.tags for pair in theirs]


def test_without_a_latent_the_server_itself_draws_a_whole_pair(models):
    model, served = models
    v = model.vocabulary
    prompt = sequences.image_prompt(v, Tags(grid=(8, 16)))
    ids = served.server.complete(prompt, 400, {})
    codes, words = sequences.unpack_pair(v, [*prompt, *ids])
    assert len(codes) == 128 and words


def test_the_server_goes_on_after_strange_requests(models):
    _, served = models
    with pytest.raises(UserError, match="answers 400"):
        served.server.complete([2049], 8, {"tokun_seed": -1})
    assert served.server.complete([5, 6], 8, {}) == [models[0].vocabulary.id("<eos>")]
    other = {"tokun_uniforms": backend.pack(torch.full((7,), 0.5))}
    assert served.server.complete([2049], 8, other) == [models[0].vocabulary.id("<eos>")]
