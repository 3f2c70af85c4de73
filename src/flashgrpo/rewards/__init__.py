"""Rewards, one file each: a reward is any callable ``reward(videos, prompts, **columns) -> Tensor (B,)``."""
