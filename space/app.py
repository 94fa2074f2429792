"""The Space: tokun's demo with the model given by the variable TOKUN_CHECKPOINT (a Hub id), or the bundled one."""

import os

import tokun
from tokun.app import build, serve

demo = build(tokun.load(os.environ.get("TOKUN_CHECKPOINT") or None))

if __name__ == "__main__":
    serve(demo, host="0.0.0.0", port=7860)
