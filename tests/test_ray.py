"""Promise of `--engine ray`: prepare and encode write the same bytes as on one machine, on a real cluster of two nodes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools import encode, prepare
from tests.small_runs import needs
from tokun.tokenizers.image import ImageTokenizer

pytestmark = needs("ray", reason="Ray is not installed: pip install -e '.[ray]'")

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys
from ray.cluster_utils import Cluster
from data_tools import encode, prepare

config, source, out, options = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes(60)  # raises unless both are alive
code = prepare.main([source, "--out", out, "--engine", "ray", "--ray-address", cluster.address, *options])
encode.main(["--config", config, "--engine", "ray", "--ray-address", cluster.address])
cluster.shutdown()
sys.exit(code)
"""


def config_for(folder: Path, tokenizer: ImageTokenizer) -> Path:
    """Of a run whose image tokenizer is trained and whose pictures are those that the cluster prepares."""
    tokenizer.save(folder / "image_tokenizer")
    shards = folder.parent / "ray"
    tree = {"data": {"train": f"{shards}/train-*.tar", "val": f"{shards}/val-*.tar"}, "codes": {"views": 2}, "out": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


@pytest.mark.timeout(320)
def test_a_ray_cluster_of_two_nodes_writes_the_same_bytes_as_this_machine(tmp_path, tiny_image_tokenizer):
    source = tmp_path / "in"
    source.mkdir()
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
    config = config_for(tmp_path / "run", tiny_image_tokenizer)
    command = [sys.executable, "-c", SCRIPT, str(config), str(source), f"file://{tmp_path}/ray", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert prepare.main([str(source), "--out", f"{tmp_path}/local", "--workers", "1", *options]) == 0
    here = files(tmp_path / "local")
    here.pop("report.html")  # written beside shards on a disk only
    assert files(tmp_path / "ray") == here and len(here) > 5
    encoded = files(tmp_path / "run" / "codes")
    shutil.rmtree(tmp_path / "run" / "codes")
    encode.main(["--config", str(config)])
    assert files(tmp_path / "run" / "codes") == encoded and len(encoded) > 5
