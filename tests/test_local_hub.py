"""Promises of tokun/inference/hub.py and pairs_pipeline.py against a Hub that answers over HTTP: what is pushed is loaded by its id, by
tokun and by transformers, and again from the cache when the Hub is gone. In processes of their own, since the Hub's address is read on
import."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.local_hub import TOKEN, local_hub

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = """
import sys, torch, tokun
from pathlib import Path
from tokun.inference import adapters

model = tokun.load(sys.argv[1], device="cpu")
weights = {}
for name, module in model.generator.named_modules():
    if name.endswith("q_proj"):
        rows, columns = module.weight.shape
        torch.manual_seed(0)
        weights[f"{adapters.FRONT}{name}{adapters.DOWN}"] = torch.randn(2, columns)
        weights[f"{adapters.FRONT}{name}{adapters.UP}"] = torch.randn(rows, 2)
settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
base = adapters.fingerprint(model.generator, model.vocabulary)
made = adapters.Adapter("mine", "me/ships", base, settings, weights, model.vocabulary, card="# mine")
folder = Path(sys.argv[2])
folder.mkdir()
adapters.write(made, folder)
print(tokun.push_adapter(folder, "mine-lora", token=sys.argv[3]))
"""
PUSH = """
print(model.push_to_hub("ships", private=True, token=sys.argv[3]))
"""
LOAD = """
import contextlib, hashlib, json, sys
import transformers
import tokun, tokun.inference.pairs_pipeline
from tokun.utils import network_access

def told(image, caption):
    return hashlib.sha256(image.tobytes()).hexdigest(), caption

model = tokun.load("me/ships", device="cpu", adapter="me/mine-lora")
found = {"adapter": model.adapter, "with": told(*model(7)), "without": told(*model.use_adapter(None)(7)), "card": model.card}
gone = len(sys.argv) == 1
# tokun finds out by itself that the Hub is gone; transformers would try again and again
with network_access.offline() if gone else contextlib.nullcontext():
    generator = transformers.AutoModelForCausalLM.from_pretrained("me/ships", subfolder="generator")
    tokenizer = transformers.AutoTokenizer.from_pretrained("me/ships", subfolder="generator")
    found["kind"], found["ids"] = type(generator).__name__, len(tokenizer)
    pairs = transformers.pipeline("tokun-pairs", model="me/ships", model_kwargs={"subfolder": "generator"}, device="cpu")
    drawn = pairs(7)
    found["pipeline"] = told(drawn["image"], drawn["caption"])
print(json.dumps(found))
"""


def run(code: str, *args: str, cache: Path, hub: str) -> list[str]:
    """The lines that Python prints, with this Hub and this cache."""
    there = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")}
    there |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(cache), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code, *args], env=there, cwd=cache.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_pushed_is_loaded_by_its_id_and_from_the_cache_when_the_hub_is_gone(tiny_model, checkpoint_folder, tmp_path):
    cache = tmp_path / "cache"
    with local_hub() as hub:
        told = run(ADAPTER + PUSH + LOAD, str(checkpoint_folder), str(tmp_path / "mine"), TOKEN, cache=cache, hub=hub.address)
        pushed, first = [line for line in told if line.startswith("http")], json.loads(told[-1])
        assert pushed == [f"{hub.address}/me/mine-lora", f"{hub.address}/me/ships"]
        assert hub.private == {"me/mine-lora": False, "me/ships": True}
        asked = "\n".join(hub.asked)
        assert "PUT /lfs/" in asked and re.search(r"(GET|HEAD) /me/ships/resolve/\w+/generator/model\.safetensors", asked)
    files = {name: set(held) for name, held in hub.files.items()}
    again = json.loads(run(LOAD, cache=cache, hub=hub.address)[-1])  # nobody listens there any more
    assert again == first
    there = {path.relative_to(checkpoint_folder).as_posix() for path in checkpoint_folder.rglob("*") if path.is_file()}
    assert files["me/ships"] == there
    assert files["me/mine-lora"] == {"adapter_config.json", "adapter_model.safetensors", "adapter.json", "vocabulary.json", "README.md"}
    image, caption = tiny_model(7)
    assert first["without"] == first["pipeline"] == [hashlib.sha256(image.tobytes()).hexdigest(), caption]
    assert first["adapter"] == "mine-lora" and first["with"] != first["without"]
    assert (first["kind"], first["ids"], first["card"]) == (type(tiny_model.generator).__name__, tiny_model.vocabulary.size, "# tiny\n")
