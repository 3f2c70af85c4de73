"""Programs of a language model: ordinary Python that calls it, as often as it likes (mmGRPO, F-GRPO)."""
