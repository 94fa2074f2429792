"""Post-training: rewards for pairs (`rewards`), learning from them (`grpo`), and whether the gain is real (`reward_hacking`).

rewards.py        one interface for all rewards, their names and their weighted sum
image_rewards.py, caption_rewards.py, drawing_rewards.py: the rewards
rollouts.py       groups of pairs from seeds, drawn with the ordinary sampler
objective.py      advantages, clipped ratios, KL divergence
grpo.py           the loop: tokun train --config configs/grpo.yaml
reward_hacking.py rewards compared with judges that were not optimised; the report
drawings.py       SVG under a byte limit, scored as in a competition: tokun drawings
"""
