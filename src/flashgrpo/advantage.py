"""Names that others import; they live in `learning/advantage.py`."""

from flashgrpo.learning.advantage import combine_advantages, group_advantages
from flashgrpo.learning.settings import Credit

__all__ = ["Credit", "combine_advantages", "group_advantages"]
