"""`flashgrpo reward env NAME`: a virtual environment with a reward's own requirements, and its server in it.

A reward that needs other versions of a package than the trainer runs beside it and is asked over HTTP. What it needs
stands in `requirements/FILE.txt` for the rewards that ship, and in a user's file as inline script metadata (PEP 723):

    # /// script
    # dependencies = ["transformers==4.45.2"]
    # ///
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from flashgrpo.errors import UserError, first_line
from flashgrpo.files import cache_folder, lock, remove, write_text
from flashgrpo.scoring.names import full_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOG = logging.getLogger("flashgrpo")
PACKAGE = Path(__file__).parent.parent
SHIPPED = PACKAGE / "rewards/requirements"
# What importing the package, its command line and the server takes; diffusers, transformers and peft are not in it.
NEEDS = ["torch", "numpy", "scipy", "safetensors", "jaxtyping", "pydantic", "pyyaml", "rich", "typer"]
NEEDS += ["imageio", "imageio-ffmpeg", "fastapi", "uvicorn", "httpx", "tenacity"]


@dataclass(frozen=True)
class Environment:
    """A virtual environment that is there, or can be made.

    Args:
        reward: what is served in it.
        folder: where it is; its name has a digest of all that it is made of.
        requirements: lines as pip reads them.
        constraints: likewise, of versions of what is installed beside.
    """

    reward: str
    folder: Path
    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()

    @staticmethod
    def of(reward: str, requirements: Path | None = None, constraint: Path | None = None) -> "Environment":
        """Find the environment of a reward.

        Args:
            requirements: a file with what it needs, in place of what it says itself.
            constraint: a file with versions of everything that it does not name itself.

        Raises:
            UserError: its requirements cannot be found or read.
        """
        call = full_name(reward)
        own = _read(requirements, "--requirements").splitlines() if requirements else requirements_of(call)
        lines = (*own, *server_requirements(own))
        given = _read(constraint, "--constraint").splitlines() if constraint else []
        constraints = tuple(line for line in given if not _names([line]) & _names(own))
        made_of = json.dumps([lines, constraints, sys.version, platform.machine(), sys.prefix, str(PACKAGE)])
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        stem = re.sub(r"\W+", "-", Path(call.rpartition(":")[0].removesuffix(".py").rpartition(".")[2]).name)
        return Environment(reward, cache_folder() / "environments" / f"{stem}-{digest}", lines, constraints)

    @property
    def python(self) -> Path:
        """The path of its interpreter."""
        return self.folder / "bin/python"

    @property
    def is_whole(self) -> bool:
        """Whether its making came to an end."""
        return (self.folder / "whole.txt").is_file()

    def hold(self, rebuild: bool = False) -> int:
        """Make the environment where it is not there yet.

        Returns:
            The descriptor of a lock: while it is open, in this process or one that inherits it, nobody rebuilds.

        Raises:
            UserError: it cannot be made, or is to be rebuilt while a server runs in it.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{self.folder}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._make_under(descriptor, rebuild)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _make_under(self, descriptor: int, rebuild: bool) -> None:
        if rebuild:
            if not lock(descriptor):
                raise UserError(f"--rebuild: {self.folder} is in use; stop the server in it first")
            self._make()
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for another start that makes it
        while not self.is_whole:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not self.is_whole:
                self._make()
            fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _make(self) -> None:
        """Make it, under the exclusive lock; whatever a start that was killed has left is thrown away first."""
        if self.folder.exists():
            remove(self.folder)
        log = Path(f"{self.folder}.log")
        log.write_text("")
        LOG.warning("making %s for %s; this can take minutes (%s)", self.folder, self.reward, log)
        self._run([sys.executable, "-m", "venv", str(self.folder)], log)
        listed, versions = self.folder / "requirements.txt", self.folder / "constraints.txt"
        listed.write_text("".join(f"{line}\n" for line in self.requirements))
        versions.write_text("".join(f"{line}\n" for line in self.constraints))
        pip = [str(self.python), "-I", "-m", "pip"]
        self._run([*pip, "install", "--no-input", "--no-compile", "-r", str(listed), "-c", str(versions)], log)
        # A link, for the package installed again would bring all its requirements, which this is to be free of.
        place = self.folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        (place / PACKAGE.name).symlink_to(PACKAGE, target_is_directory=True)
        self._run([str(self.python), "-I", "-c", "import flashgrpo.cli, flashgrpo.serving.server"], log)
        self._run([*pip, "freeze"], log)
        write_text(self.folder / "whole.txt", "".join(f"{line}\n" for line in self.requirements))

    def _run(self, command: Sequence[str], log: Path) -> None:
        """Run a step; what it says goes to the log."""
        # Settings of the trainer's Python and of where its pip installs to are not this environment's.
        leaks = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT")
        clean = {name: value for name, value in os.environ.items() if name not in leaks}
        with log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            code = subprocess.run(command, env=clean, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
        if code:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
            raise UserError(f"the environment of {self.reward} cannot be made: {reason[:300]} (all of it: {log})")


def start(environment: Environment, args: Sequence[str], options: Mapping[str, Any], rebuild: bool = False) -> None:
    """Become the reward's server, in its environment.

    Args:
        args: the reward's arguments, `key=value` each.
        options: of `flashgrpo reward serve`.
    """
    os.set_inheritable(environment.hold(rebuild), True)
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    serve = ["-I", "-m", "flashgrpo", "reward", "serve", *given, "--", environment.reward, *args]
    python = str(environment.python)
    os.execv(python, [python, *serve])


def requirements_of(call: str) -> list[str]:
    """Read what a reward's file says that it needs.

    Raises:
        UserError: it cannot say, or what it says cannot be read.
    """
    module = call.rpartition(":")[0]
    if module.endswith(".py"):
        return script_requirements(_read(Path(module), "the reward"), module)
    shipped = module.removeprefix("flashgrpo.rewards.")
    if module == shipped:
        raise UserError(f"{call}: give what it needs in --requirements FILE; only files and shipped rewards tell")
    file = SHIPPED / f"{shipped}.txt"
    return [line for line in file.read_text().splitlines() if line and line[0] != "#"] if file.is_file() else []


def script_requirements(text: str, name: str) -> list[str]:
    """Read the dependencies of a script's inline metadata (PEP 723); none where it has no such block.

    Raises:
        UserError: the block cannot be read, or wants another Python.
    """
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.rstrip() == "# /// script"]
    if not starts:
        return []
    if len(starts) > 1:
        raise UserError(f"{name} has more than one block `# /// script`")
    block = []
    for line in lines[starts[0] + 1 :]:
        if line.rstrip() == "# ///":
            break
        if line != "#" and not line.startswith("# "):
            raise UserError(f"{name}: the block `# /// script` must end with a line `# ///`")
        block.append(line[2:])
    try:
        told = tomllib.loads("\n".join(block))
        wanted = SpecifierSet(told.get("requires-python", ""))
        dependencies = told.get("dependencies", [])
        if not isinstance(dependencies, list):
            raise UserError(f"{name}: dependencies must be a list")
        for line in dependencies:
            Requirement(line)
    except (tomllib.TOMLDecodeError, InvalidSpecifier, InvalidRequirement, TypeError, AttributeError) as error:
        raise UserError(f"{name}: the block `# /// script` cannot be read: {first_line(error)}") from error
    if Version(platform.python_version()) not in wanted:
        raise UserError(f"{name} needs Python {wanted}, and this is {platform.python_version()}")
    return dependencies


def server_requirements(own: Sequence[str]) -> list[str]:
    """List what the server needs beside a reward's own requirements, which come first where both name a package."""
    bounds: dict[str, str] = {}
    for line in importlib.metadata.requires("flash-grpo") or []:
        requirement = Requirement(line)
        bounds[canonicalize_name(requirement.name)] = f"{requirement.name}{requirement.specifier}"
    # The trainer's torch, for its build is known to work on this machine; a local label (+cpu) is no package index's.
    bounds["torch"] = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    return [bounds.get(name, name) for name in NEEDS if name not in _names(own)]


def _names(lines: Sequence[str]) -> set[str]:
    """Return the packages that requirements name; options of pip's name none."""
    matches = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip()) for line in lines)
    return {str(canonicalize_name(match[0])) for match in matches if match}


def _read(file: Path, key: str) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
