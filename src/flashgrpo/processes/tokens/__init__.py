"""Processes that draw tokens: what they ask of a network, and what they have in common."""
