"""Rewards behind HTTP: the server and its client."""
