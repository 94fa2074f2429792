#!/usr/bin/env bash
# The commands of the tokun that is installed in a virtual environment, tried in an empty folder: card, pairs, completion, pictures to shards, a few steps of
# every training stage, pairs of the new model. Needs packages of the extras train and data (accelerate, pyarrow, webdataset, jinja2), and no network.
#
#     tests/installed.sh VENV
set -euo pipefail
bin=$(cd "$1/bin" && pwd)
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
cd "$away"
unset PYTHONPATH  # a checkout must not be tried in the place of what is installed
export WANDB_MODE=offline HF_HUB_OFFLINE=1
"$bin/python" -c 'import tokun; assert "site-packages" in tokun.__file__, tokun.__file__'

"$bin/tokun" --version
"$bin/tokun" info
"$bin/tokun" completion bash | bash -n
"$bin/tokun" sample --seed 42 --n 16
test "$(wc -l < outputs/samples.jsonl)" = 16

mkdir pictures
for number in 00 01 02 03 04 05 06 07; do
  cp "outputs/000042-$number.png" pictures/
  echo "A print, the $number of its seed, as it came." > "pictures/000042-$number.txt"
done
"$bin/tokun" prepare pictures --style engraving --min-side 32 --no-clean --workers 1 --out shards
ls shards/train-*.tar shards/report.html
"$bin/tokun" inspect shards --verify

"$bin/tokun" train --config tiny data.toy=64 image_tokenizer_train.steps=2 train.steps=2 train.sample_every=100 train.compile=false tracking.kind=none \
  image_tokenizer_train.min_usage=0 image_tokenizer_train.min_perplexity=0 image_tokenizer_train.min_psnr=0
"$bin/tokun" sample --checkpoint runs/tiny --n 2
test "$(wc -l < outputs/samples.jsonl)" = 2 && test -s outputs/earlier/1/grid.png
echo "all commands of the installed tokun run: $("$bin/tokun" --version)"
