"""The weights that draw where the trained ones do not: an average of them, or those of some updates ago."""

from collections.abc import Mapping

from torch import Tensor, nn

from flashgrpo.distributed.world import local
from flashgrpo.learning.settings import AnyBehaviour, Current


class Behaviour:
    """Follows the trained weights as its settings say; `weights` is empty where those draw.

    Attributes:
        weights: name -> values, sharded as the parameters are.
    """

    def __init__(self, settings: AnyBehaviour, parameters: Mapping[str, nn.Parameter]) -> None:
        self._settings, self._parameters = settings, dict(parameters)
        self.weights: dict[str, Tensor] = {}
        if not isinstance(settings, Current):
            self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @property
    def draws(self) -> bool:
        """Whether other weights than the trained ones draw."""
        return self._settings.draws

    def follow(self, updates: int) -> None:
        """Take in the trained weights, after a number of updates."""
        if isinstance(self._settings, Current):
            return
        kept = self._settings.kept(updates)
        for name, weight in self.weights.items():
            local(weight).lerp_(local(self._parameters[name].detach()), 1 - kept)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the very tensors in use, for a checkpoint; reading into them restores a state."""
        return {"behaviour": self.weights} if self.weights else {}
