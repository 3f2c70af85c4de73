"""Where the claims of Flash-GRPO hold, measured."""
