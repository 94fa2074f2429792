"""Post-training: rewards for pairs (`rewards`), learning from them (`grpo`), and whether the gain is real (`real`).

rewards.py        one interface for all rewards, their names and their weighted sum; of_pictures.py, of_words.py, of_drawings.py: the rewards
rollouts.py       groups of pairs from seeds, drawn with the ordinary sampler
objective.py      advantages, clipped ratios, KL divergence
grpo.py           the loop: python train.py --config configs/grpo.yaml
real.py           rewards compared with judges that were not optimised; the report
drawings.py       SVG under a byte limit, scored as in a competition: python -m tokun.align.drawings
"""
