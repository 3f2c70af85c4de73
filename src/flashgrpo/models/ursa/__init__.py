"""URSA: uniform discrete diffusion over a Qwen3, of images and videos in codes."""
