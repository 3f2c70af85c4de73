"""A reward of one's own: how bright a video is. See docs/rewards.md.

flashgrpo train tiny out=runs/bright 'rewards={bright: {call: "examples/brightness.py:levels"}}'
"""


def levels(videos, prompts, **columns):
    """Mean brightness in levels of 255; (B, F, 3, H, W) in [0, 1] -> (B,)."""
    return 255 * videos.mean(dim=(1, 2, 3, 4))
