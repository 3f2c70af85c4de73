"""One HTTP request with a deadline for all of it, and patience with a server that fails for a while.

What may be over soon is a `Transient`: no connection, one that broke, a time limit, 408, 429, 502, 503, 504. `persist`
repeats it until its patience ends. Any other answer than 200 is final, as it would be the same again.
"""

import asyncio
import ipaddress
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import httpx

from flashgrpo.errors import UserError, printable

T = TypeVar("T")

LOG = logging.getLogger("flashgrpo")
TRANSIENT = (408, 429, 502, 503, 504)
ADVICE = {
    401: "set {token_env} to the server's token",
    403: "set {token_env} to a token that may do this",
    404: "is this its address?",
    413: "send fewer videos at once (batch)",
}
CHUNK = 256 * 2**10  # bytes of a body that are handed over at once: httpx copies what a send leaves over
ANSWER_LIMIT = 16 * 2**20  # bytes


class Transient(Exception):
    """A failure that may be over soon, as a sentence.

    Args:
        after: seconds after which the server wants to be asked again, where it says so.
        advice: what to do about it, where that is known.
    """

    def __init__(self, sentence: str, after: float | None = None, advice: str = "") -> None:
        super().__init__(sentence)
        self.after, self.advice = after, advice


class Endpoint:
    """A server's address and how it is spoken to.

    Args:
        url: http:// or https://; paths of requests are appended to it.
        token_env: the environment variable with the bearer token.
        default: the variable that has it, if set, where `token_env` is None.
        timeout: seconds that one request may take, from its connection to the last byte of its answer.

    Raises:
        UserError: no such URL, one with a name and password in it, or a token that is not there.
    """

    def __init__(self, url: str, token_env: str | None, default: str, timeout: float) -> None:
        try:
            parsed = httpx.URL(url.rstrip("/"))
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{url!r} is no URL of a server: {printable(str(error))}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise UserError(f"{url!r} is no URL of a server; write http://host:port")
        if parsed.userinfo:
            raise UserError(f"the URL of {parsed.host} holds a password; put a token into ${default} instead")
        if token_env is not None and not token_env.startswith("FLASHGRPO_"):
            raise UserError(
                f"token_env: {token_env!r} must begin with FLASHGRPO_: recipes send no other variables away"
            )
        self.url, self.timeout, self.token_env = str(parsed), timeout, token_env or default
        self._token = token_of(token_env, default)
        self._proxies = not is_loopback(parsed.host)

    def client(self) -> httpx.AsyncClient:
        """Open connections for requests of one event loop; to be closed.

        Raises:
            UserError: proxies or certificates of the environment that cannot be used.
        """
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            return httpx.AsyncClient(
                headers={**headers, "Accept-Encoding": "identity"},
                # The environment's proxies are for the world outside: they would take 127.0.0.1 for their own.
                trust_env=self._proxies,
                timeout=None,  # the whole request has one
                verify=_certificates(),
                limits=httpx.Limits(max_connections=None),
            )
        except (httpx.InvalidURL, ValueError, OSError, ImportError) as error:
            what = "a proxy or certificates of this environment (HTTPS_PROXY, SSL_CERT_FILE) cannot be used"
            raise UserError(f"{self.url}: {what}: {printable(str(error))}") from error

    async def ask(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: Sequence[memoryview | bytes] = (),
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Send one request, whose body is these parts one after the other, and return the body of its answer.

        Raises:
            Transient: a failure that may be over soon.
            UserError: one that will not.
        """
        try:
            return await asyncio.wait_for(self._ask(client, method, path, body, headers or {}), self.timeout)
        except asyncio.TimeoutError as error:
            advice = "raise `timeout` if an answer may take longer"
            raise Transient(f"{self.url} had not answered after {self.timeout:g} s", advice=advice) from error
        except httpx.TransportError as error:
            what = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke the connection"
            raise Transient(f"{self.url} {what} ({printable(str(error)) or type(error).__name__})") from error

    async def _ask(
        self, client: httpx.AsyncClient, method: str, path: str, body: Sequence[Any], headers: Mapping[str, str]
    ) -> bytes:
        length = {"Content-Length": str(sum(map(len, body)))} if body else {}
        content = _chunks(body) if body else None
        answer = bytearray()
        async with client.stream(method, self.url + path, content=content, headers={**length, **headers}) as response:
            async for chunk in response.aiter_raw(CHUNK):
                answer += chunk
                if len(answer) > ANSWER_LIMIT:
                    raise UserError(f"{self.url} answers with more than {ANSWER_LIMIT} bytes; is this its address?")
        status = response.status_code
        if status == 200:
            return bytes(answer)
        said = f"HTTP {status}: {self._said(answer)}".rstrip(": ")
        if status in TRANSIENT:
            after = re.fullmatch(r"\s*(\d{1,9})\s*", response.headers.get("Retry-After", ""), re.ASCII)
            raise Transient(f"{self.url} cannot answer now ({said})", float(after[1]) if after else None)
        advice = ADVICE.get(status, "").format(token_env=self.token_env)
        raise UserError(f"{self.url} refuses the request ({said})" + (f"; {advice}" if advice else ""))

    def _said(self, answer: bytearray) -> str:
        """Return what a server says of a failure, in few words and without the token, which it might repeat."""
        try:
            said = json.loads(answer)
        except (ValueError, RecursionError):
            said = answer[:2000].decode(errors="replace")
        for key in ("error", "detail", "message"):
            said = said.get(key, said) if isinstance(said, Mapping) else said
        words = printable(str(said), 2000)
        return (words.replace(self._token, "[token]") if self._token else words)[:300]


def token_of(named: str | None, default: str) -> str:
    """Return the token in the environment variable `named`, or in `default` where that is set; "" where it is not.

    Raises:
        UserError: `named` is not set, or what is set is no token.
    """
    name = default if named is None else named
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise UserError(f"token_env: {name!r} is no name of an environment variable")
    if named is None and name not in os.environ:
        return ""
    token = os.environ.get(name, "").strip()
    if not token:
        what = "empty" if name in os.environ else "not set"
        raise UserError(f"the environment variable {name} is {what}: it must hold a token")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"the token in {name} must be of visible ASCII characters without blanks")
    return token


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine by its name alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def warn(failure: object, left: float) -> None:
    """Say that something failed and is tried again."""
    LOG.warning("%s; trying again for up to %.0f s", failure, left)


async def persist(
    attempt: Callable[[], Awaitable[T]],
    patience: float,
    advice: str,
    tell: Callable[[object, float], None] = warn,
) -> T:
    """Repeat what fails in a `Transient` until it succeeds.

    Args:
        attempt: makes one attempt.
        patience: seconds after the beginning of the first attempt during which others begin.
        advice: what to do about a failure that stays.
        tell: called at the first failure, with it and the seconds that are left.

    Raises:
        UserError: patience has ended; the sentence has the last failure. What else `attempt` raises passes.
    """
    started, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return await attempt()
        except Transient as failure:
            spent = time.monotonic() - started
            if spent >= patience:
                last = f"{failure}, at the last of {tries} attempts in {spent:.0f} s"
                raise UserError(f"{last}; {failure.advice or advice}") from failure
            if tries == 1:
                tell(failure, patience - spent)
            drawn = random.uniform(0, 0.25 * 2 ** min(tries, 6))  # so that many clients come back apart
            pause = drawn if failure.after is None else failure.after + min(drawn, 1.0)
            await asyncio.sleep(min(pause, patience - spent))


async def all_of(tasks: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all, or the first failure, after the others were stopped."""
    running = [asyncio.ensure_future(task) for task in tasks]
    try:
        return list(await asyncio.gather(*running))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where the calling thread has an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, main).result()


async def _chunks(body: Sequence[memoryview | bytes]) -> AsyncIterator[bytes]:
    for part in body:
        for start in range(0, len(part), CHUNK):
            yield bytes(part[start : start + CHUNK])


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()
