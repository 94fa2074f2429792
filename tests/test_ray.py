"""Promise of `--engine ray`, on a real cluster of two nodes: the same bytes as on one machine, also where a node is killed meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools import caption, encode, prepare
from tests.small_runs import needs
from tests.test_captioners import Server
from tokun.cli import sample
from tokun.tokenizers.image import ImageTokenizer

pytestmark = needs("ray", reason="Ray is not installed: pip install -e '.[ray]'")

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from data_tools import caption, encode, prepare
from tests import test_ray
from tokun.cli import sample

root, config, source, model, *options = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
places = ["--engine", "ray", "--ray-address", cluster.address]

second = []

def on_two_nodes(run, killed_when=None, name=""):
    if not second:
        second.append(cluster.add_node(num_cpus=1))
        cluster.wait_for_nodes(60)  # raises unless both are alive
    ended = threading.Event()
    def watch():
        while not ended.wait(0.005):
            if killed_when():
                cluster.remove_node(second.pop(), allow_graceful=False)
                return print(name, "killed", flush=True)
    watcher = threading.Thread(target=watch) if killed_when else None
    watcher and watcher.start()
    code = run()
    ended.set()
    watcher and watcher.join()
    assert not code, (name, code)

def whole():
    prepare.main([source, "--out", f"file://{root}/ray", *places, *options])
    encode.main(["--config", config, *places])
on_two_nodes(whole)
server = test_ray.captioner(delay=0.05)
shards = sorted(Path(f"{root}/ray").glob("*.tar"))
on_two_nodes(
    lambda: caption.main([f"{root}/ray", "--out", f"{root}/captioned", *test_ray.captioned_by(server), *places]),
    lambda: len(server.requests) >= 20 and not all((Path(f"{root}/captioned") / path.name).is_file() for path in shards), "caption",
)
server.close()
on_two_nodes(
    lambda: sample.main(["--checkpoint", model, "--out", f"{root}/many", *test_ray.MANY, *places]),
    lambda: any(Path(f"{root}/many").glob(".samples-*/*.tar")), "sample",
)
cluster.shutdown()
"""
MANY = ["--seed", "5", "--n", "70", "--shard-size", "20", "--batch-size", "2", "--device", "cpu"]


def captioner(delay: float = 0.0) -> Server:
    """A server whose words depend on what it is sent."""
    return Server(lambda body: f"a print, number {hashlib.sha256(json.dumps(body['messages']).encode()).hexdigest()[:6]}", delay)


def captioned_by(server: Server) -> list[str]:
    return ["--endpoint", server.url, "--endpoint-model", "tiny", "--concurrency", "2"]


def config_for(folder: Path, tokenizer: ImageTokenizer) -> Path:
    """Of a run whose image tokenizer is trained and whose pictures are those that the cluster prepares."""
    tokenizer.save(folder / "image_tokenizer")
    shards = folder.parent / "ray"
    tree = {"data": {"train": f"{shards}/train-*.tar", "val": f"{shards}/val-*.tar"}, "codes": {"views": 2}, "out": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def files(out: Path, pattern: str = "*") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob(pattern))}


@pytest.fixture(scope="module")
def cluster_run(tmp_path_factory, tiny_image_tokenizer, checkpoint_folder) -> tuple[Path, list[str], str]:
    """(folder, options of prepare, output) of a script that does everything on one cluster."""
    root = tmp_path_factory.mktemp("cluster")
    (source := root / "in").mkdir()
    rng = np.random.default_rng(0)
    for index in range(80):
        tiles = Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8)).resize((96, 80), Image.Resampling.NEAREST)
        tiles.save(source / f"a picture {'abcdefgh'[index % 8]} of {'xyz'[index % 3]} and {index}.png")
    options = ["--style", "engraving", "--no-clean", "--captions-from-names", "--shard-size", "16"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }  # else 15: beside other work they wait
    config = config_for(root / "run", tiny_image_tokenizer)
    command = [sys.executable, "-c", SCRIPT, *map(str, (root, config, source, checkpoint_folder)), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr[-2000:]
    return root, options, done.stdout


@pytest.mark.timeout(500)
def test_a_ray_cluster_of_two_nodes_writes_the_same_bytes_as_this_machine(cluster_run):
    root, options, _ = cluster_run
    assert prepare.main([str(root / "in"), "--out", f"{root}/local", "--workers", "1", *options]) == 0
    here = files(root / "local")
    here.pop("report.html")  # this and the next are written beside shards on a disk only
    here.pop("README.md")
    assert files(root / "ray") == here and len(here) > 5
    encoded = files(root / "run" / "codes")
    shutil.rmtree(root / "run" / "codes")
    encode.main(["--config", str(root / "run" / "run.yaml")])
    assert files(root / "run" / "codes") == encoded and len(encoded) > 5


@pytest.mark.timeout(500)
def test_captions_are_the_same_when_a_node_is_killed_meanwhile(cluster_run):
    root, _, told = cluster_run
    assert "caption killed" in told
    server = captioner()
    try:
        assert caption.main([str(root / "ray"), "--out", str(root / "captioned-here"), *captioned_by(server)]) == 0
    finally:
        server.close()
    here, there = (files(root / name, "*.tar") for name in ("captioned-here", "captioned"))
    assert there == here and len(here) > 5
    records = [json.loads((root / name / "caption.json").read_text()) for name in ("captioned-here", "captioned")]
    assert records[0]["captions"] == records[1]["captions"] == 80 and records[0]["outcomes"] == records[1]["outcomes"]


@pytest.mark.timeout(500)
def test_samples_are_the_same_when_a_node_is_killed_meanwhile(cluster_run, checkpoint_folder):
    root, _, told = cluster_run
    assert "sample killed" in told
    sample.main(["--checkpoint", str(checkpoint_folder), "--out", str(root / "many-here"), *MANY])
    assert files(root / "many") == files(root / "many-here") and len(files(root / "many")) == 6
