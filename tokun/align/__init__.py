"""After training: what a pair is worth (`rewards`), learning from it (`grpo`), and whether the gain is real (`real`).

rewards.py        one interface for all rewards, their names, their mix; of_pictures.py, of_words.py, of_drawings.py: the rewards
rollouts.py       groups of pairs from seeds, by the sampler that users have
objective.py      advantages, clipped ratios, divergence
grpo.py           the loop: python train.py --config configs/grpo.yaml
real.py           rewards beside judges that were not optimised; the report
drawings.py       SVG under a limit, scored as a competition did: python -m tokun.align.drawings
"""
