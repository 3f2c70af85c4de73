"""The grid of the published Wan runs, whose golden numbers the tests of the mathematics check."""

import torch

from flashgrpo.processes.flow.schedule import SigmaGrid


def published_grid(num_steps: int = 20, shift: float = 3.0) -> SigmaGrid:
    """UniPC's flow sigmas as older releases of diffusers made them.

    `u = 1 - linspace(1, 1/1000, N + 1)`, flipped and without its last entry, shifted, then a final 0. A run reads its
    grid from its scheduler, which starts the same walk at 1 today.
    """
    u = (1 - torch.linspace(1, 1 / 1000, num_steps + 1, dtype=torch.float64)).flip(0)[:-1]
    sigmas = torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1, dtype=torch.float64)])
    return SigmaGrid(sigmas, (1000 * sigmas[:-1]).long())
