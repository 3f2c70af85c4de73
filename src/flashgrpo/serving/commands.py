"""`flashgrpo reward`: commands of rewards that run beside the trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from flashgrpo.errors import UserError
from flashgrpo.serving.local import HOST as LOCAL
from flashgrpo.terminal import PATH, path


@dataclass(frozen=True)
class Options:
    """How a reward is served.

    Args:
        host: the address to listen on; anything but this machine's own lets others in.
        port: 0 lets the system choose one, which is printed.
        batch: videos that the reward is called with at most.
        queue: requests that wait or are computed; while there are so many, others are told to come back.
        max_mib: size of a request, as it is sent and as uint8. Times `queue` it bounds the memory of all that are held
            as they came, and four times it that of the videos that the reward is called with.
        token_env: variable with the token that clients have to know; by default FLASHGRPO_REWARD_TOKEN, if set.
        arrival_seconds: within which the head of a request has to arrive, and then its body, at `server.SLOWEST`.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    batch: int = 16
    queue: int = 16
    max_mib: float = 1024.0
    token_env: str | None = None
    arrival_seconds: int = 15

    def __post_init__(self) -> None:
        if self.batch < 1 or self.queue < 1 or not 0 < self.max_mib < 2**30 or not 0 <= self.port < 2**16:
            raise UserError("a server needs --batch and --queue of 1 or more, --max-mib above 0, and a valid --port")

    @property
    def limit(self) -> int:
        """Bytes that a request may have."""
        return int(self.max_mib * 2**20)


reward_app = typer.Typer(help="Rewards that run beside the trainer.", no_args_is_help=True)
RewardName = Annotated[
    str, typer.Argument(help="motion:amount, package.module:function, or path/to/file.py:function; classes too.")
]
RewardArguments = Annotated[list[str] | None, typer.Argument(help="The reward's arguments as key=value.")]
Host = Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free; it is printed.")]
Batch = Annotated[int, typer.Option(min=1, help="Videos that the reward is called with at most.")]
Queue = Annotated[int, typer.Option(min=1, help="Requests held at a time; others are told to come back.")]
MaxMib = Annotated[float, typer.Option(min=0.001, help="MiB that a request may have.")]
TokenEnv = Annotated[str | None, typer.Option(help="Variable with its clients' token; else FLASHGRPO_REWARD_TOKEN.")]


@reward_app.command("serve")
def serve_reward(
    name: RewardName,
    args: RewardArguments = None,
    host: Host = Options.host,
    port: Port = Options.port,
    batch: Batch = Options.batch,
    queue: Queue = Options.queue,
    max_mib: MaxMib = Options.max_mib,
    token_env: TokenEnv = None,
) -> None:
    """Serve a reward over HTTP, for recipes with `call: "http://HOST:PORT"`."""
    from flashgrpo.serving.server import serve

    serve(name, args or [], Options(host, port, batch, queue, max_mib, token_env))


@reward_app.command("env")
def reward_environment(
    name: RewardName,
    args: RewardArguments = None,
    requirements: Annotated[Path | None, typer.Option(**PATH, help="Of the reward, in place of its own.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the environment anew.")] = False,
    host: Host = Options.host,
    port: Port = Options.port,
    batch: Batch = Options.batch,
    queue: Queue = Options.queue,
    max_mib: MaxMib = Options.max_mib,
    token_env: TokenEnv = None,
) -> None:
    """Serve a reward in a virtual environment of its own, with the versions that it needs; made at the first call."""
    from flashgrpo.serving.environment import Environment, start

    options = Options(host, port, batch, queue, max_mib, token_env)
    start(Environment.of(name, requirements), args or [], options, rebuild)


@reward_app.command("human")
def ask_people(
    folder: Annotated[
        Path, typer.Argument(parser=path, metavar="FOLDER", help="Of the votes; a new one, or to go on.")
    ],
    port: Port = Options.port,
    voters: Annotated[int, typer.Option(min=1, help="People who judge each group before it counts.")] = 1,
    wait: Annotated[
        float | None, typer.Option(min=0, help="Seconds until a group that nobody judges has no reward; else it waits.")
    ] = None,
    predict_with: Annotated[
        str | None, typer.Option(help="A CLIP checkpoint: a head on it, learnt from the votes, judges those groups.")
    ] = None,
) -> None:
    """Let people judge samples on a page of this machine; for recipes with `call: "http://127.0.0.1:PORT"`."""
    from flashgrpo.serving.server import load_and_serve

    call, settings = "flashgrpo.serving.human.judging:Human", {"folder": str(folder), "voters": voters, "wait": wait}
    if predict_with is not None:
        call, settings = "flashgrpo.rewards.human:Predicted", {**settings, "predict_with": predict_with}
    load_and_serve(call, "reward human", settings, Options(LOCAL, port))
