"""A run's files: directory, checkpoints, trackers, and what a person sees."""
