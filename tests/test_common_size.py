"""benchmarks/common_size.py: checkpoints of several sizes at one size."""

import pytest
from PIL import Image

from benchmarks import common_size
from data_tools import toy
from tests.test_losses import random_squeezenet


def test_a_checkpoint_is_measured_at_its_own_size_and_at_another(checkpoint_folder, tmp_path, capsys):
    toy.write_shards(tmp_path / "toy", 24, 3, 32, "val")
    weights = random_squeezenet(tmp_path / "net.safetensors")
    given = [str(checkpoint_folder), "--features", str(weights), "--shards", str(tmp_path / "toy" / "val-*.tar"), "--n", "24"]
    common_size.main([*given, "--side", "0"])
    own = capsys.readouterr().out
    common_size.main([*given, "--side", "16"])
    small = capsys.readouterr().out
    assert "own size, 24 samples of seed 1000" in own and "16 px, 24 samples" in small
    lines = {line.strip().partition("  ")[0]: line for line in own.splitlines()[1:]}
    for name in ("Fréchet distance", "KID", "precision", "recall", "diversity", "style: samples taken for engravings"):
        assert name in lines, "distances of so few pictures may be unknown, and are told so"
    for name in ("lines: spectrum error of reconstructions, dB", "lines: SSIM of gradients of reconstructions"):
        assert "nan" not in lines[name].partition("[")[0] and lines[name] not in small
    with pytest.raises(ValueError, match=r"--side is 64; pictures of .* can only be reduced"):
        common_size.main([*given, "--side", "64"])
    with pytest.raises(ValueError, match="hold 4 usable pictures"):
        common_size.main([*given[:-1], "4", "--side", "0"])


def test_a_picture_keeps_its_shape():
    assert common_size.reduced(Image.new("L", (128, 192)), 0.5).size == (64, 96)
    whole = Image.new("L", (128, 64))
    assert common_size.reduced(whole, 1.0) is whole
