"""Serving with vLLM, for loads that one process cannot handle: the span grammar and the seed's latent as a logits processor.

    pip install vllm
    tokun serve --checkpoint runs/engraving --seed 42 --n 10000 --out outputs/

grammar.py    the ids that may come next, and the one a seed picks; plain torch, tested against tokun's own sampler
processor.py  the same behind vLLM's interface
__main__.py   prompts in, pairs out

docs/guides/serving.md lists what is tested and what is not.
"""
