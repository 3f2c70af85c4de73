"""Short names of the rewards that ship."""

from pathlib import Path


def full_name(name: str) -> str:
    """`motion:amount` is `flashgrpo.rewards.motion:amount`; other names stay."""
    module, _, function = name.partition(":")
    ships = function.isidentifier() and module.isidentifier() and (Path(__file__).parent / f"{module}.py").is_file()
    return f"flashgrpo.rewards.{name}" if ships else name
