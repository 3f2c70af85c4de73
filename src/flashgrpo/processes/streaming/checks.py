"""What the doctor has to know of the streaming process: whether the branches of a group differ."""

from flashgrpo.process import Finding, Record
from flashgrpo.types import Latents


def branches_differ(record: Record, latents: Latents) -> Finding:
    """Tell how far the videos of a group are apart, relative to their size; they start from the same noise."""
    spreads = []
    for key in record.key.unique():
        own = latents[record.sample[record.key == key]]
        if len(own) > 1:
            spreads.append(float(own.std(dim=0, correction=0).mean() / own.std().clamp_min(1e-12)))
    if not spreads:
        return Finding("branches", "sound", "no group has two branches here")
    spread = sum(spreads) / len(spreads)
    numbers = {"spread": spread, "groups": len(spreads)}
    if not spread > 1e-4:
        sentence = "all branches of a group are the same video, so there is nothing to compare; explore more"
        return Finding("branches", "unsound", sentence, numbers)
    sentence = f"the branches of a group differ by {spread:.1%} of the latents' spread"
    return Finding("branches", "sound", sentence, numbers)
