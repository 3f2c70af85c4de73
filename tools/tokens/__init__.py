"""What makes the bundled models of tokens, and the worlds that they know; not installed."""
