"""`flashgrpo reward`: commands of rewards that run beside the trainer."""

from pathlib import Path
from typing import Annotated

import typer

from flashgrpo.terminal import PATH

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
    host: Host = "127.0.0.1",
    port: Port = 8765,
    batch: Batch = 16,
    queue: Queue = 16,
    max_mib: MaxMib = 1024.0,
    token_env: TokenEnv = None,
) -> None:
    """Serve a reward over HTTP, for recipes with `call: "http://HOST:PORT"`."""
    from flashgrpo.serving.server import serve
    from flashgrpo.serving.service import Options

    serve(name, args or [], Options(host, port, batch, queue, max_mib, token_env))


@reward_app.command("env")
def reward_environment(
    name: RewardName,
    args: RewardArguments = None,
    requirements: Annotated[Path | None, typer.Option(**PATH, help="Of the reward, in place of its own.")] = None,
    constraint: Annotated[
        Path | None, typer.Option(**PATH, help="A file of versions for everything, as pip's.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the environment anew.")] = False,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    batch: Batch = 16,
    queue: Queue = 16,
    max_mib: MaxMib = 1024.0,
    token_env: TokenEnv = None,
) -> None:
    """Serve a reward in a virtual environment of its own, with the versions that it needs; made at the first call."""
    from flashgrpo.serving.environment import Environment, start

    options = {"host": host, "port": port, "batch": batch, "queue": queue, "max-mib": max_mib}
    options |= {} if token_env is None else {"token-env": token_env}
    start(Environment.of(name, requirements, constraint), args or [], options, rebuild)
