"""From the name of a reward to what scores videos.

A name stands for a function, `reward(videos, prompts, **columns)`, or for a class whose constructor loads what its
instances need to be called in the same way: a recipe's `args` go to the function's call, or to the constructor.
"""

import importlib.util
import inspect
import math
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from flashgrpo.errors import UserError, first_line, suggest
from flashgrpo.scoring.inputs import Input, Pixels
from flashgrpo.types import Reward

CLIENT = "flashgrpo.serving.client:Remote"
"""The reward that stands for one on a server; by its name, as every reward is."""


def load_function(call: str, key: str) -> Any:
    """Import `package.module:function` or `path/to/file.py:function`.

    Raises:
        UserError: no such module, file or function; the sentence starts with `key`.
    """
    return _imported(call, key, "package.module:function or path/to/file.py:function")


def load_reward(call: str, key: str) -> Any:
    """Import `package.module:function`, `path/to/file.py:function`, or make `http://host:port` a client of that server.

    Returns:
        A function, or a class (or partial of one) whose instances are the reward.

    Raises:
        UserError: no such module, file or function; the sentence starts with `key`.
    """
    if call.startswith(("http://", "https://")):
        return partial(load_reward(CLIENT, key), call.replace(",", " ").split())
    found = _imported(call, key, "package.module:function, path/to/file.py:function or http://host:port")
    try:
        inspect.signature(found)
    except (ValueError, TypeError) as error:  # of what is written in C, such as max or dict
        raise UserError(
            f"{key}: {call} does not say which arguments it takes; write a function reward(videos, prompts, **columns)"
        ) from error
    return found


def _imported(call: str, key: str, forms: str) -> Any:
    module_name, colon, function = call.rpartition(":")
    if not colon or not module_name or not function:
        raise UserError(f"{key}: {call!r} must have the form {forms}")
    with told(f"{key}: {module_name}"):
        try:
            module = _load_file(Path(module_name), key) if module_name.endswith(".py") else import_module(module_name)
        except ImportError as error:
            raise UserError(f"{key}: {module_name} cannot be imported: {first_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{key}: {module_name} has no function {function!r}; {suggest(function, public)}")
    return found


def check_arguments(found: Any, args: Mapping[str, Any], key: str) -> None:
    """Whether `args` are named parameters: `**columns` would swallow a misspelt one.

    Raises:
        UserError: one is none, or a class needs more than is given; the sentence starts with `key`.
    """
    parameters = inspect.signature(found).parameters.values()
    named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    for argument in args:
        if argument not in named:
            raise UserError(f"{key}: the function has no parameter {argument!r}; {suggest(argument, named)}")
    if makes_reward(found):
        try:
            inspect.signature(found).bind(**args)
        except TypeError as error:
            raise UserError(f"{key}: {first_line(error)}") from error


def check_columns(found: Any, args: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Whether the reward takes a prompt file's columns.

    Raises:
        TypeError: it does not, or needs one that is not there.
    """
    if makes_reward(found):
        instances: Any = found.func if isinstance(found, partial) else found
        if not any("__call__" in vars(one) for one in instances.__mro__):
            raise TypeError(f"instances of {instances.__name__} cannot be called")
        inspect.signature(instances.__call__).bind(None, [], [], **columns)
    else:
        inspect.signature(partial(found, **args)).bind([], [], **columns)


def makes_reward(found: Any) -> bool:
    """Return whether it is called to make the reward, rather than to score."""
    return inspect.isclass(found.func if isinstance(found, partial) else found)


def bind(found: Any, args: Mapping[str, Any], key: str) -> Reward:
    """Return the reward itself: an instance, which has loaded what it needs, or a function with its arguments fixed.

    Raises:
        UserError: arguments that it does not take, or something that it needs is not there.
    """
    check_arguments(found, args, key)
    if not makes_reward(found):
        return cast(Reward, partial(found, **args))
    with told(key.removesuffix(".args")):
        return cast(Reward, found(**args))


@contextmanager
def told(what: str, about: str = "") -> Iterator[None]:
    """Turn whatever a reward's code raises in here into one sentence, followed by the code's own frames.

    That includes what would end the process, as `sys.exit()` does, perhaps with the code of success. A Ctrl-C is the
    user's where it reaches the main thread, and passes.

    Args:
        what: begins the sentence: the reward.
        about: what it was given.

    Raises:
        UserError: names the exception and its place; one that the code raised itself passes.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        frames = _own_frames(error)
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        said = f"{type(error).__name__} {first_line(error)}".strip()
        lines = "".join(f"\n{line}" for line in "".join(traceback.format_list(frames)).splitlines())
        raise UserError(f"{what} raised {said}{place}{about}{lines}") from error


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of a reward's code, of libraries only where there are no others."""
    callers = (str(Path(__file__).parent), import_module.__code__.co_filename, "<frozen")
    every = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(callers)]
    return [frame for frame in every if "site-packages" not in frame.filename] or every


def declared(reward: Any, name: str, default: Any = None) -> Any:
    """What a reward says about itself: `takes`, `hears`, `score_range` and others (see `types.Reward`)."""
    while isinstance(reward, partial):
        reward = reward.func
    return getattr(reward, name, default)


def takes_of(reward: Any) -> Input:
    """Return what the reward looks at; all frames where it does not say."""
    return cast(Input, declared(reward, "takes", Pixels()))


def checked_values(values: Any, count: int, what: str = "the reward") -> dict[str, list[float]]:
    """What a reward returned as component -> `count` numbers, NaN for None; without a name where it is no mapping.

    Args:
        what: the reward's name in the sentences.

    Raises:
        ValueError: it is something else.
    """
    parts = values if isinstance(values, Mapping) else {"": values}
    if not parts:
        raise ValueError(f"{what} returned an empty mapping for {count} videos")
    return {
        name: _column(numbers, count, f"{what}, component {name!r}," if name else what)
        for name, numbers in parts.items()
    }


def _column(numbers: Any, count: int, what: str) -> list[float]:
    column = numbers.tolist() if hasattr(numbers, "tolist") else numbers  # of a tensor, or an array
    if isinstance(column, int | float) and not isinstance(column, bool):
        raise ValueError(f"{what} must be {count} numbers, one for each video, not one for all of them")
    if not isinstance(column, Sequence) or isinstance(column, str):
        raise ValueError(f"{what} must be {count} numbers, not {type(numbers).__name__}")
    if len(getattr(numbers, "shape", ())) > 1:
        raise ValueError(f"{what} must be {count} numbers, one for each video, not of shape {tuple(numbers.shape)}")
    if len(column) != count:
        raise ValueError(f"{what} has {len(column)} numbers for {count} videos")
    column = [math.nan if value is None else value for value in column]
    for value in column:
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise ValueError(f"{what} must be {count} numbers, not {type(value).__name__}")
    return [as_float(value) for value in column]


def as_float(value: Any) -> float:
    """As a float; infinite where it is an integer beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"flashgrpo_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
