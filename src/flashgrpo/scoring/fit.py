"""Whether rewards and what a process has to show fit together."""

from flashgrpo.errors import UserError, suggest
from flashgrpo.process import Process
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.types import WHOLE


def check_process(rewards: Rewards, process: Process) -> None:
    """Check that every reward looks at, hears and is credited to what the process has; tells them its sample rate.

    Raises:
        UserError: one does not.
    """
    for name, config in rewards.configs.items():
        key, view = f"rewards.{name}", config.looks_at
        for channel in config.channels:
            if channel not in process.channels:
                known = suggest(channel, process.channels)
                raise UserError(f"{key}.channel: this model has no channel {channel!r}; {known}")
        if view not in process.views:
            raise UserError(f"{key}.looks_at: this model shows no {view}; {suggest(view, process.views)}")
        if rewards.hears(name) and process.sample_rate is None:
            raise UserError(f"{key}: it hears, and this model makes no sound; leave it out, or train a model that does")
        if rewards.hears(name) and view != WHOLE:
            raise UserError(f"{key}.looks_at: a sound is handed over whole; leave looks_at out")
    rewards.sample_rate = process.sample_rate
