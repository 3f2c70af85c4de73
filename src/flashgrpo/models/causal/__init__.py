"""What makes a Wan pipeline draw streaming video: its network, its decoder, and checkpoints of one file."""
