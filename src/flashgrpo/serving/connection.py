"""Connections of a reward server: heads that come too slowly, and clients that leave."""

import asyncio
from typing import Any

import h11
from fastapi import Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closes a connection on which the head of a request does not arrive in time, the first one or a later one."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Start the clock when a head is waited for, once for all its bytes, and stop it when it is whole."""
        if self.conn.their_state is h11.IDLE:
            self._deadline = self._deadline or self.loop.call_later(self.timeout_keep_alive, self.transport.close)
        elif self._deadline:
            self._deadline.cancel()
            self._deadline = None


async def unless_gone(request: Request, answer: "asyncio.Future[bytes]") -> bytes:
    """Return what is answered, as long as the client waits for it.

    Raises:
        ClientDisconnect: it does not.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not answer.done():
        answer.cancel()
        raise ClientDisconnect
    return answer.result()
