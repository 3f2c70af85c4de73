"""Uniform discrete diffusion: from random tokens to clean ones, a jump at a time (UDM-GRPO, arXiv 2604.18518)."""
