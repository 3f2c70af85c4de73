"""Short names of the rewards that ship."""

from flashgrpo.files import PACKAGE


def full_name(name: str) -> str:
    """`motion:amount` is `flashgrpo.rewards.motion:amount`; other names stay."""
    module, _, function = name.partition(":")
    ships = function.isidentifier() and module.isidentifier() and (PACKAGE / "rewards" / f"{module}.py").is_file()
    return f"flashgrpo.rewards.{name}" if ships else name
