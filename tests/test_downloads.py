"""What a training downloads is asked for before its first stage: told within seconds, with the command that fetches it."""

import pytest

from tests.small_runs import write_config
from tokun.config import load_config
from tokun.models.losses import SQUEEZENET_URL, VGG_URL, kept_weights
from tokun.training import downloads
from tokun.training.run import open_run
from tokun.utils import network_access

LPIPS = ["image_tokenizer_train.perceptual=lpips", "image_tokenizer_train.perceptual_weight=1"]
SQUEEZENET = ["image_tokenizer_train.perceptual=squeezenet", "image_tokenizer_train.perceptual_weight=1"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(network_access, "out_of_reach", lambda address: "Network is unreachable")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (LPIPS,
         r"perceptual is lpips, which needs .*torch/hub/checkpoints/vgg16-397923af\.pth.*unreachable: Network.*lpips\.LPIPS\(net='vgg'\)"),
        (SQUEEZENET,
         r"perceptual is squeezenet, which needs .*squeezenet1_1-b8a52dc0\.pth.*load_squeezenet\(''\).*perceptual_weights=FILE"),
        (["train.align_weight=1"],
         r"train\.align_weight is 1, which needs .*squeezenet1_1.*train\.align_features=FILE, or train\.align_weight=0"),
    ],
)  # fmt: skip
def test_weights_that_are_neither_here_nor_in_reach_are_told_before_the_first_stage(tmp_path, small_shards, overrides, told):
    """LPIPS found out at the second stage, after minutes of waiting for the network; the alignment at the fourth."""
    config = load_config(write_config(tmp_path, small_shards), overrides)
    with pytest.raises(FileNotFoundError, match=told):
        open_run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*LPIPS, "image_tokenizer_train.perceptual_weight=0"],
        [*LPIPS, "start=bundled"],  # nothing is trained with it
        [*SQUEEZENET, "image_tokenizer_train.perceptual_weights=FILE"],
        ["train.align_weight=1", "train.align_features=FILE"],
        [*LPIPS, "dpo.pairs=pairs.jsonl"],
    ],
)
def test_what_needs_no_download_asks_for_none(tmp_path, small_shards, overrides):
    downloads.require_weights(load_config(write_config(tmp_path, small_shards), overrides))


def test_what_is_here_or_was_used_already_is_not_asked_for(tmp_path, small_shards):
    config = load_config(write_config(tmp_path, small_shards), [*LPIPS, "train.align_weight=1"])
    for address in (VGG_URL, SQUEEZENET_URL):
        with pytest.raises(network_access.NotFetched):
            downloads.require_weights(config)
        kept_weights(address).parent.mkdir(parents=True, exist_ok=True)
        kept_weights(address).touch()
    downloads.require_weights(config)
    for address in (VGG_URL, SQUEEZENET_URL):
        kept_weights(address).unlink()
    for part in ("image_tokenizer", "state/generator"):
        (tmp_path / "run" / part).mkdir(parents=True)
    downloads.require_weights(config)
