"""Masked tokens: a sample starts as masks, and each step of a rollout puts tokens in place of some of them (AGRPO)."""
