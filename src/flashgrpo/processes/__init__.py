"""The generative processes: how samples are drawn, and how what was drawn is scored again for the update."""
