"""The page on which people judge, for this machine alone; `page.html` is what a browser gets.

GET  /                  the page
GET  /next?voter=NAME   the next question of this person, and figures
GET  /samples/NAME      a video or an image
POST /votes             a `Ballot`
"""

from pathlib import Path

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from flashgrpo.jsontext import to_json
from flashgrpo.serving.human.judging import Human
from flashgrpo.serving.human.votes import Voter
from flashgrpo.serving.local import names_of
from flashgrpo.serving.wire import read_json

LARGEST = 64 * 2**10  # bytes of a ballot
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "media-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
)
HEADERS = {"Cache-Control": "no-store", "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}


class Ballot(BaseModel):
    """An answer to a question; `best` as in `Vote`, `seconds` that it took."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    question: str = Field(max_length=64)
    voter: Voter
    best: list[str] | None
    seconds: float = Field(ge=0, le=1e9)


def own_page(request: Request) -> None:
    """Refuse a page elsewhere: one that renamed itself to this address, or one that sends a form here.

    Raises:
        HTTPException: 403.
    """
    names = names_of(request.scope["server"][1])
    origin = request.headers.get("origin")
    if request.headers.get("host", "") not in names or (origin and origin.removeprefix("http://") not in names):
        raise HTTPException(403, "this page is for the machine that it runs on; open it at 127.0.0.1 or localhost")


def add_page(app: FastAPI, human: Human) -> None:
    """Add the page's addresses to a reward server."""
    page = (Path(__file__).parent / "page.html").read_text("utf-8")
    here = [Depends(own_page)]

    @app.get("/", dependencies=here)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    @app.get("/next", dependencies=here)
    def following(voter: str) -> Response:
        return Response(to_json(human.shown_to(voter)), media_type="application/json", headers=HEADERS)

    @app.get("/samples/{name}", dependencies=here)
    def sample(name: str) -> Response:
        file = human.file(name)
        if file is None:
            raise HTTPException(404, "there is no such sample")
        return FileResponse(file, headers={"X-Content-Type-Options": "nosniff"})

    @app.post("/votes", dependencies=here)
    async def vote(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":
            raise HTTPException(415, "the content type of a vote is application/json")
        length = request.headers.get("content-length", "")
        if not (length.isdecimal() and len(length) < 9 and int(length) <= LARGEST):
            raise HTTPException(413, f"a vote has at most {LARGEST} bytes, and says how many")
        try:
            ballot = read_json(Ballot, await request.body(), "the vote")
            known = await run_in_threadpool(human.vote, ballot.question, ballot.voter, ballot.best, ballot.seconds)
        except ValueError as error:
            raise HTTPException(422, str(error).splitlines()[0]) from error
        if not known:
            raise HTTPException(409, "this group has been answered already")
        return Response(to_json(human.shown_to(ballot.voter)), media_type="application/json", headers=HEADERS)
