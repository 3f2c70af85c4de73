"""`flashgrpo reward env NAME`: a virtual environment with a reward's own requirements, and its server in it.

A reward that needs other versions of a package than the trainer runs beside it and is asked over HTTP. What it needs
stands in `requirements/FILE.txt` for the rewards that ship, and in a user's file as inline script metadata (PEP 723):

    # /// script
    # dependencies = ["transformers==4.45.2"]
    # ///

uv makes the environment, and is told what pip is told by its settings and PIP_*. torch is the trainer's own build, by a
link: that one is known to work on this machine, and an index may have another, of gigabytes, under the same version.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import IO

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from flashgrpo.errors import UserError, first_line, install_hint, printable
from flashgrpo.files import PACKAGE, cache_folder, explain_os_errors, lock, remove, write_text
from flashgrpo.scoring.names import full_name
from flashgrpo.serving.commands import Options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOG = logging.getLogger("flashgrpo")
SHIPPED = PACKAGE / "rewards/requirements"
# What importing the package, its command line and the server takes; diffusers, transformers and peft are not in it.
NEEDS = ["torch", "numpy", "scipy", "safetensors", "jaxtyping", "pydantic", "pyyaml", "rich", "typer"]
NEEDS += ["imageio", "imageio-ffmpeg", "fastapi", "uvicorn", "httpx"]
# pip's setting -> uv's variable; not an option, for it may hold a password, and a log is kept.
SETTINGS = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
SETTINGS |= {"constraint": "UV_CONSTRAINT", "trusted-host": "UV_INSECURE_HOST", "proxy": "ALL_PROXY"}
SETTINGS |= {"cert": "SSL_CERT_FILE", "client-cert": "SSL_CLIENT_CERT"}


@dataclass(frozen=True)
class Environment:
    """A virtual environment that is there, or can be made.

    Args:
        reward: what is served in it.
        folder: where it is; its name has a digest of all that it is made of.
        requirements: lines as pip reads them.
    """

    reward: str
    folder: Path
    requirements: tuple[str, ...]

    @staticmethod
    def of(reward: str, requirements: Path | None = None) -> "Environment":
        """Find the environment of a reward.

        Args:
            requirements: a file with what it needs, in place of what it says itself.

        Raises:
            UserError: its requirements cannot be found or read.
        """
        call = full_name(reward)
        own = _read(requirements, "--requirements").splitlines() if requirements else requirements_of(call)
        lines = (*own, *server_requirements(own))
        made_of = json.dumps([lines, sys.version, platform.machine(), sys.prefix, str(PACKAGE)])
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        stem = re.sub(r"\W+", "-", Path(call.rpartition(":")[0].removesuffix(".py").rpartition(".")[2]).name)
        return Environment(reward, cache_folder() / "environments" / f"{stem}-{digest}", lines)

    @property
    def python(self) -> Path:
        """The path of its interpreter."""
        return self.folder / "bin/python"

    @property
    def is_whole(self) -> bool:
        """Whether its making came to an end."""
        return (self.folder / "whole.txt").is_file()

    def hold(self, rebuild: bool = False) -> IO[str]:
        """Make the environment where it is not there yet.

        Returns:
            A locked file: while it is open, in this process or one that inherits it, nobody rebuilds.

        Raises:
            UserError: it cannot be made, or is to be rebuilt while a server runs in it.
        """
        with explain_os_errors(self.folder), contextlib.ExitStack() as failing:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            file = failing.enter_context(open(f"{self.folder}.lock", "a", encoding="utf-8"))
            if rebuild:
                if not lock(file):
                    raise UserError(f"--rebuild: {self.folder} is in use; stop the server in it first")
                self._make()
            while lock(file, LOG.warning, shared=True, wait=True) and not self.is_whole:
                lock(file, wait=True)
                if not self.is_whole:  # else another start has made it in between
                    self._make()
            failing.pop_all()
            return file

    def _make(self) -> None:
        """Make it, under the exclusive lock; whatever a start that was killed has left is thrown away first."""
        if self.folder.exists():
            remove(self.folder)
        log = Path(f"{self.folder}.log")
        log.unlink(missing_ok=True)
        LOG.warning("making %s for %s; this can take minutes (%s)", self.folder, self.reward, log)
        try:
            uv = import_module("uv").find_uv_bin()
        except (ImportError, FileNotFoundError) as missing:
            raise UserError(f"`flashgrpo reward env` needs uv: {install_hint('server')}") from missing
        settings, options = pip_settings()
        self._run([uv, "venv", "--no-project", "--python", sys.executable, str(self.folder)], log, settings)
        place = self.folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        (place / "links.pth").write_text(f"{self.folder / 'links'}\n", encoding="utf-8")
        (self.folder / "links").mkdir()
        # A link, for the package installed again would bring all its requirements, which this is to be free of.
        (self.folder / "links" / PACKAGE.name).symlink_to(PACKAGE, target_is_directory=True)
        if _torch_line() in self.requirements:
            link_torch(place, self.folder / "links")
        wanted = self.folder / "requirements.txt"
        wanted.write_text("".join(f"{line}\n" for line in self.requirements), encoding="utf-8")
        install = [uv, "pip", "install", "--python", str(self.python), "--requirements", str(wanted), *options]
        self._run(install, log, settings)
        self._run([str(self.python), "-I", "-c", "import flashgrpo.cli, flashgrpo.serving.server"], log, {})
        write_text(self.folder / "whole.txt", "")

    def _run(self, command: Sequence[str], log: Path, settings: Mapping[str, str]) -> None:
        """Run a step; what it says goes to the log."""
        cache = {"UV_CACHE_DIR": str(cache_folder() / "uv")}  # of this file system: files are linked, not copied
        variables = {**cache, **os.environ, **settings}
        clean = {name: value for name, value in variables.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        with log.open("a", encoding="utf-8") as file:
            print("$", *command, file=file, flush=True)
            code = subprocess.run(command, env=clean, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
        if code:
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            reason = printable(text.rpartition("\nerror: ")[2] if "\nerror: " in text else text.splitlines()[-1])
            raise UserError(f"the environment of {self.reward} cannot be made: {reason} (all of it: {log})")


def pip_settings() -> tuple[dict[str, str], list[str]]:
    """Return what pip is told by its files and by PIP_*, as environment variables and options of uv.

    Raises:
        UserError: pip cannot read its settings.
    """
    told: dict[str, str] = {}
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "config", "list"]
        asked = subprocess.run(command, input="", capture_output=True, encoding="utf-8", errors="replace")
        if asked.returncode:
            raise UserError(f"pip cannot read its settings: {printable(asked.stderr or asked.stdout)}")
        for section in ("global", "install", ":env:"):  # the later ones count more
            lines = re.findall(rf"^{section}\.([\w-]+)=(.+)$", asked.stdout, re.MULTILINE)
            told |= {key: str(ast.literal_eval(value)) for key, value in lines}
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # pip's rule for several indexes
    for key, name in SETTINGS.items():
        if key in told:
            values = [told[key]] if key.endswith("cert") else told[key].split()
            variables[name] = ("," if key == "find-links" else " ").join(values)
    alone = told.get("no-index", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return variables, ["--no-index"] * alone


def link_torch(place: Path, links: Path) -> None:
    """Link the trainer's torch with what it pins to one version, and what these pin: one build (CUDA, triton).

    uv takes them for installed in `place`, the site-packages, where it finds no file of theirs to delete or write over.
    """
    names, seen = ["torch"], set()
    while names:
        name = canonicalize_name(names.pop())
        if name in seen or not any(metadata.distributions(name=name)):
            continue
        seen.add(name)
        found = metadata.distribution(name)
        folder = place / f"{name.replace('-', '_')}-{found.version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(found.read_text("METADATA") or "", encoding="utf-8")
        (folder / "RECORD").write_bytes(b"")
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if ".dist-info" not in top and not (links / top).is_symlink():  # nvidia is a folder of many
                (links / top).symlink_to(str(found.locate_file(top)))
        needs = [Requirement(line) for line in found.requires or ()]
        names += [need.name for need in needs if any(bound.operator == "==" for bound in need.specifier)]


def start(environment: Environment, args: Sequence[str], options: Options, rebuild: bool = False) -> None:
    """Become the reward's server, in its environment, with the reward's arguments, `key=value` each."""
    held = environment.hold(rebuild)
    os.set_inheritable(held.fileno(), True)
    given = [f"--host={options.host}", f"--port={options.port}", f"--batch={options.batch}", f"--queue={options.queue}"]
    given += [f"--max-mib={options.max_mib}"]
    given += [] if options.token_env is None else [f"--token-env={options.token_env}"]
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
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line and line[0] != "#"]


def script_requirements(text: str, name: str) -> list[str]:
    """Read the dependencies of a script's inline metadata (PEP 723); none where it has no such block.

    Raises:
        UserError: the block cannot be read, or wants another Python.
    """
    _, *blocks = re.split(r"^# /// script[ \t]*\n", text, flags=re.MULTILINE)
    if not blocks:
        return []
    if len(blocks) > 1:
        raise UserError(f"{name} has more than one block `# /// script`")
    block = re.match(r"((?:#(?: .*)?\n)*?)# ///[ \t]*$", blocks[0], re.MULTILINE)
    if not block:
        raise UserError(f"{name}: the block `# /// script` must end with a line `# ///`")
    try:
        told = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.MULTILINE))
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
    for line in metadata.requires("flash-grpo") or []:
        requirement = Requirement(line)
        bounds[canonicalize_name(requirement.name)] = f"{requirement.name}{requirement.specifier}"
    bounds["torch"] = _torch_line()
    return [bounds.get(name, name) for name in NEEDS if name not in _names(own)]


def _torch_line() -> str:
    """Return the requirement of exactly the trainer's torch."""
    return f"torch=={metadata.version('torch')}"


def _names(lines: Sequence[str]) -> set[str]:
    """Return the packages that requirements name; options of pip's name none."""
    matches = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip()) for line in lines)
    return {str(canonicalize_name(match[0])) for match in matches if match}


def _read(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
