"""What calls may share a batch: those that one set of adapters computes, with equally many places for the prompt."""

from collections.abc import Mapping
from dataclasses import dataclass

from flashgrpo.errors import UserError
from flashgrpo.settings import DEFAULT_ADAPTERS

NARROWEST = 16  # places for a prompt


def places_for(tokens: int, widest: int) -> int:
    """Return how many places a prompt gets: a power of two of them, so that few widths occur.

    Example: 20 tokens get 32 places, and 40 where prompts have at most 40.
    """
    places = NARROWEST
    while places < tokens:
        places *= 2
    return min(places, widest)


@dataclass(frozen=True)
class Slots:
    """Numbers the slots of calls: n-th set of adapters * (widest + 1) + places; with one set, the places.

    Args:
        names: of all sets of adapters.
        of_module: module -> the name of its adapters; others have `DEFAULT_ADAPTERS`.
        widest: tokens of a prompt at most.
    """

    names: tuple[str, ...]
    of_module: Mapping[str, str]
    widest: int

    @property
    def first(self) -> int:
        """The slot of the shortest prompts, with the first adapters."""
        return places_for(1, self.widest)

    def of(self, module: str, tokens: int) -> int:
        """Return the slot of a call of a module whose prompt has so many tokens.

        Raises:
            UserError: the module has no adapters.
        """
        name = self.of_module.get(module, DEFAULT_ADAPTERS)
        if name not in self.names:
            raise UserError(
                f"rollout.adapters: the program calls module {module!r:.80}, which has none; name it there, or take "
                f"rollout.other_modules=share for one set of all modules that are not named"
            )
        return self.names.index(name) * (self.widest + 1) + places_for(tokens, self.widest)

    def split(self, slot: int) -> tuple[str, int]:
        """Return the name of a slot's adapters, and the places of its prompts."""
        number, places = divmod(slot, self.widest + 1)
        return self.names[number], places
