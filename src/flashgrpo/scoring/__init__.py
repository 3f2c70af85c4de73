"""Outputs to rewards, beside the drawing; held-out evaluation."""
