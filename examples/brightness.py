"""Rewards of one's own, in levels of 255: how bright a video is, and how near it is to a wanted brightness.

flashgrpo train tiny out=runs/bright 'rewards={bright: {call: "examples/brightness.py:levels"}}'

`levels` has no upper end that a video could reach and stay a video, so it is gamed: docs/log.md shows how a watched
reward ends that run.
"""


def brightness(videos, prompts, **columns):
    """Mean brightness; (B, F, 3, H, W) in [0, 1] -> (B,)."""
    return videos.mean(dim=(1, 2, 3, 4))


def levels(videos, prompts, **columns):
    """Mean brightness; (B, F, 3, H, W) in [0, 1] -> (B,)."""
    return 255 * brightness(videos, prompts)


def near(videos, prompts, target=110.0, **columns):
    """Minus the distance of the mean brightness from `target`; (B, F, 3, H, W) in [0, 1] -> (B,)."""
    return -(levels(videos, prompts) - target).abs()
