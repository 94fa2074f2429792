#!/usr/bin/env bash
# The commands of the tokun that is installed in a virtual environment, tried in an empty folder: card, pairs, pictures to shards, a few steps of every
# training stage, pairs of the new model. Needs packages of the extras train and data (accelerate, pyarrow, webdataset, jinja2), and no network.
#
#     tests/installed.sh VENV
#     tests/installed.sh VENV --without-torch      what needs no torch: help, card, completion, pictures to shards
set -euo pipefail
bin=$(cd "$1/bin" && pwd)
light=${2:-}
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
cd "$away"
unset PYTHONPATH  # a checkout must not be tried in the place of what is installed
export WANDB_MODE=offline HF_HUB_OFFLINE=1
"$bin/python" -c 'import tokun; assert "site-packages" in tokun.__file__, tokun.__file__'
"$bin/python" -m compileall -q "$("$bin/python" -c 'import os, tokun; print(os.path.dirname(tokun.__file__))')"

"$bin/tokun" --version
"$bin/tokun" info
"$bin/tokun" sample --help > help.txt
grep -q "moth" help.txt
"$bin/tokun" completion bash | bash -n

mkdir pictures
if [ -z "$light" ]; then
  "$bin/tokun" sample --seed 42 --n 16
  test "$(wc -l < outputs/samples.jsonl)" = 16
  cp outputs/000042-0[0-7].png pictures/
else
  "$bin/python" - <<'PY'
import numpy as np
from PIL import Image
for number in range(8):
    blocks = np.random.default_rng(number).integers(0, 256, (16, 16)).astype(np.uint8)
    Image.fromarray(blocks).resize((128, 128), Image.Resampling.BICUBIC).save(f"pictures/{number}.png")
PY
fi
for picture in pictures/*.png; do echo "The print $(basename "$picture" .png), as it came." > "${picture%.png}.txt"; done
"$bin/tokun" prepare pictures --style engraving --min-side 32 --no-clean --workers 1 --out shards
ls shards/train-*.tar shards/report.html
"$bin/tokun" inspect shards --verify

if [ -z "$light" ]; then
  optimizer=$("$bin/python" -c 'import torch; print("muon" if hasattr(torch.optim, "Muon") else "adamw")')  # torch 2.8 has no Muon
  "$bin/tokun" train --config tiny train.optimizer="$optimizer" data.toy=64 image_tokenizer_train.steps=2 train.steps=2 train.sample_every=100 train.compile=false tracking.kind=none \
    image_tokenizer_train.min_usage=0 image_tokenizer_train.min_perplexity=0 image_tokenizer_train.min_psnr=0
  "$bin/tokun" sample --checkpoint runs/tiny --n 2
  test "$(wc -l < outputs/samples.jsonl)" = 2 && test -s outputs/earlier/1/grid.png
fi
echo "the commands of the installed tokun run${light:+ $light}: $("$bin/tokun" --version)"
