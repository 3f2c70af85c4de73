"""Flash-GRPO: align video diffusion models with rewards by training one denoising step per rollout.

from flashgrpo import RunConfig, train, evaluate, presets

train(RunConfig.load("recipes/tiny.yaml", ["updates=20"]))
"""

from flashgrpo import presets
from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.evaluate import evaluate
from flashgrpo.notebook import Run
from flashgrpo.train import train

__version__ = "0.1.0"
__all__ = ["Run", "RunConfig", "UserError", "evaluate", "presets", "train"]
