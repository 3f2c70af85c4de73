"""Rectified-flow models: one network call a denoising step, some steps stochastic (Flash-GRPO and relatives)."""
