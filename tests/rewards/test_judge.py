"""A judge: what it is shown and asked, how its answers are read, and that no score is ever made up."""

import base64
import io
import json
import logging
import threading
import time

import pytest
import torch
from PIL import Image

from flashgrpo.errors import UserError
from flashgrpo.rewards.judge import AGAIN, Judge
from tests.reward_servers import Fake, answer

TEMPLATE = 'Does it show "{prompt}" in {color}? Answer {"like": "this"}: Score: N'


def chat(text: str) -> bytes:
    return answer(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))


@pytest.fixture
def api():
    """Starts servers whose `replies(asked, number)` are chat completions; `.asked` collects the requests."""
    started = []

    def start(replies) -> Fake:
        asked, lock = [], threading.Lock()

        def act(connection, body, number) -> None:
            with lock:
                asked.append(json.loads(body))
            reply = replies(asked[-1], number)
            connection.sendall(reply if isinstance(reply, bytes) else chat(reply))

        server = Fake(act)
        server.asked = asked
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


def judge(url: str, **changes) -> Judge:
    given = {"template": TEMPLATE, "score_range": [1, 5], "pattern": r"Score: *([\d.]+)", "patience": 5.0}
    return Judge(f"{url}/v1", "a-model", **{**given, **changes})


def call(reward: Judge, count: int = 1) -> list[float]:
    shown = torch.linspace(0, 1, count).view(-1, 1, 1, 1, 1).expand(-1, 6, 3, 40, 60)
    return reward(shown, [f"video {number}" for number in range(count)], color=["red"] * count)


def text_of(asked) -> str:
    return asked["messages"][0]["content"][-1]["text"]


def picture_of(asked, number: int) -> Image.Image:
    url = asked["messages"][0]["content"][number]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def test_what_a_judge_is_asked(api):
    server = api(lambda asked, number: "It does.\nScore: 4.5")
    assert call(judge(server.url, frames=3, size=20)) == [4.5]
    asked = server.asked[0]
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("a-model", 0, 512)
    assert text_of(asked) == 'Does it show "video 0" in red? Answer {"like": "this"}: Score: N'
    assert [part["type"] for part in asked["messages"][0]["content"]] == ["image_url"] * 3 + ["text"]
    assert picture_of(asked, 0).size == (30, 20)
    assert picture_of(asked, 0).format == "JPEG"
    assert server.heads[0].startswith("POST /v1/chat/completions ")
    call(judge(server.url, image="png", frames=1))
    assert picture_of(server.asked[1], 0).format == "PNG"


def test_scores_come_in_the_order_of_the_videos_and_few_at_a_time(api):
    at_once, most, lock = [0], [0], threading.Lock()

    def replies(asked, number):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02 * (number % 3))
        with lock:
            at_once[0] -= 1
        return f"Score: {1 + int(text_of(asked).split()[4][:-1]) / 10}"

    server = api(replies)
    reward = judge(server.url, template="one two three video {prompt} .", concurrency=3)
    assert reward(torch.zeros(12, 2, 3, 16, 16), [f"{n}." for n in range(12)]) == [1 + n / 10 for n in range(12)]
    assert 1 < most[0] <= 3
    assert reward.score_range == (1.0, 5.0)
    assert reward.takes.size == 448


def test_an_answer_that_cannot_be_read_is_asked_for_again(api):
    server = api(lambda asked, number: "I would say three." if number == 1 else "Score: 3")
    reward = judge(server.url)
    assert call(reward) == [3.0]
    assert reward.failures == 1
    roles = [message["role"] for message in server.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.asked[1]["messages"][1]["content"] == "I would say three."
    assert server.asked[1]["messages"][2]["content"] == AGAIN


def test_an_absurd_number_is_no_score():
    reader = judge("http://127.0.0.1:1", pattern=None, key="score")
    assert reader.read('{"score": 1' + "0" * 400 + "}") is None
    assert reader.read('{"score": 3}') == 3.0


@pytest.mark.parametrize("said", ["", "no score", "Score: 9", "Score: 3 or Score: 4", "Score: 1.2.3", "Score: nan"])
def test_no_score_is_made_up(api, said):
    server = api(lambda asked, number: said)
    with pytest.raises(UserError, match=r"a-model gave no score in 2 attempts: .* from 1 to 5, and it said"):
        call(judge(server.url, attempts=2))
    assert server.requests == 2


def test_answers_in_json():
    reward = judge("http://127.0.0.1:1", pattern=None, key="score")
    assert reward.read('{"score": 3}') == 3
    assert reward.read('```json\n{"why": "so", "score": "4.5"}\n```') == 4.5
    for text in ('{"score": true}', '{"score": 0}', '{"other": 3}', "[3]", "3", '{"score": NaN}', '{"score": 3} or so'):
        assert reward.read(text) is None
    assert judge("http://127.0.0.1:1").read("Score: 3. Again, Score: 3") == 3


def test_servers_that_fail(api, monkeypatch, caplog):
    monkeypatch.setenv("FLASHGRPO_JUDGE_TOKEN", "sk-secret")
    busy = answer(429, "", "Retry-After: 0")
    server = api(lambda asked, number: busy if number == 1 else "Score: 2")
    with caplog.at_level(logging.DEBUG):
        assert call(judge(server.url)) == [2.0]
    assert "cannot answer now (HTTP 429); trying again" in caplog.text
    assert "sk-secret" not in caplog.text
    assert any("authorization: bearer sk-secret" in head.lower() for head in server.heads)
    refusing = api(lambda asked, number: answer(401, '{"error": {"message": "bad key sk-secret"}}'))
    with pytest.raises(UserError, match=r"HTTP 401: bad key \[token\].*set FLASHGRPO_JUDGE_TOKEN"):
        call(judge(refusing.url))
    assert refusing.requests == 1
    for wrong in ("{}", "[]", "<html>", '{"choices": []}'):
        with pytest.raises(UserError, match="no chat completion"):
            call(judge(api(lambda asked, number, wrong=wrong: answer(200, wrong)).url))
    hanging = api(lambda asked, number: (time.sleep(1), "Score: 2")[1])
    with pytest.raises(UserError, match="had not answered after"):
        call(judge(hanging.url, timeout=0.2, patience=0.0))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"key": "score"}, "give one of the two"),
        ({"pattern": None}, "give one of the two"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "Score"}, "must have one group"),
        ({"image": "jpg"}, "did you mean 'jpeg'"),
        ({"score_range": [5, 1]}, "a lowest and a highest"),
        ({"score_range": [1]}, "a lowest and a highest"),
        ({"attempts": 0}, "1 or more"),
    ],
)
def test_wrong_arguments(changes, what):
    with pytest.raises(UserError, match=what):
        judge("http://127.0.0.1:1", **changes)


def test_a_template_is_filled_once():
    reward = judge("http://127.0.0.1:1", template="{prompt}")
    assert reward._text({"prompt": "{color}", "color": "red"}) == "{color}"
    with pytest.raises(UserError, match=r"template has \{colour\}; did you mean 'color'"):
        judge("http://127.0.0.1:1", template="{colour}")._text({"prompt": "", "color": "red"})
