"""Pages that this machine alone may open."""

HOST = "127.0.0.1"


def names_of(port: int) -> set[str]:
    """Return what a browser's Host header says of a page here; a page elsewhere that renames itself says another."""
    return {f"{name}:{port}" for name in (HOST, "localhost")}
