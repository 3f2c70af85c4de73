"""Prompts as a pure function of (seed, update); rewards as plain callables; the paired interval."""

import warnings
from pathlib import Path

import pytest
import torch

from flashgrpo import errors
from flashgrpo.errors import UserError
from flashgrpo.prompts import columns_of, prompt_groups, read_prompts
from flashgrpo.rewards.jpeg import compressibility
from flashgrpo.scoring.loading import load_reward
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.seeds import generator, keyed_bits, normal
from flashgrpo.types import Prompt, RewardTable

PROMPTS = [Prompt(f"prompt {n}", {"n": n}) for n in range(5)]
VIDEOS = torch.linspace(0, 1, 3)[:, None, None, None, None].expand(3, 2, 3, 8, 8)


def test_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \n", "utf-8")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.txt"), "prompts.train")] == ["one", "two"]
    (tmp_path / "a.csv").write_text('prompt,note\n"one, two",x\n\n"three\nlines",\n', "utf-8")
    prompts = read_prompts(str(tmp_path / "a.csv"), "prompts.train")
    assert [(prompt.text, dict(prompt.columns)) for prompt in prompts] == [
        ("one, two", {"note": "x"}),
        ("three\nlines", {"note": ""}),
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "eins", "n": 1}\n{"n": 2, "prompt": "zwei é"}\n', "utf-8")
    prompts = read_prompts(str(tmp_path / "a.jsonl"), "prompts.train")
    assert prompts == [Prompt("eins", {"n": 1}), Prompt("zwei é", {"n": 2})]
    assert columns_of(prompts) == {"n": [1, 2]}


def test_lines_may_differ_in_their_columns(tmp_path):
    """As GenEval's metadata do. A line's own values stay as they are, of whatever type."""
    (tmp_path / "a.jsonl").write_text(
        '{"tag": "one", "include": [{"count": 1}], "prompt": "a"}\n\n{"tag": 2, "exclude": [], "prompt": "b"}\n',
        "utf-8",
    )
    prompts = read_prompts(str(tmp_path / "a.jsonl"), "prompts.train")
    assert columns_of(prompts) == {"tag": ["one", 2], "include": [[{"count": 1}], None], "exclude": [None, []]}


def test_text_files_as_people_have_them(tmp_path):
    (tmp_path / "a.TXT").write_bytes(
        b"\xef\xbb\xbf# a comment\r\none \xf0\x9f\x8c\x8a\r\n\r\ntwo #2\rthree" + b"e" * 300_000
    )
    texts = [prompt.text for prompt in read_prompts(str(tmp_path / "a.TXT"), "prompts.train")]
    assert texts[:2] == ["one \U0001f30a", "two #2"]
    assert len(texts[2]) == 300_005
    (tmp_path / "a.csv").write_text(",prompt,note\n0,one,\n1,two,x\n", "utf-8")  # with the row numbers of pandas
    prompts = read_prompts(str(tmp_path / "a.csv"), "prompts.train")
    assert columns_of(prompts) == {"note": ["", "x"]}


def test_the_image_column(tmp_path):
    """A path starts at the file's folder; it is only looked at by a model that starts from images."""
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "image": "b/c.png"}\n{"prompt": "b", "image": null}\n'
        '{"prompt": "c", "image": {"bytes": null, "path": "d.png"}}\n',
        "utf-8",
    )
    images = columns_of(read_prompts(str(tmp_path / "a.jsonl"), "prompts.train"))["image"]
    assert images == [str(tmp_path / "b/c.png"), None, {"bytes": None, "path": str(tmp_path / "d.png")}]


def test_hints_name_what_can_be_installed(monkeypatch):
    monkeypatch.chdir(errors.CHECKOUT)
    assert errors.install_hint("data") == "pip install -e '.[data]'"
    monkeypatch.chdir("/")
    assert errors.install_hint("data") == f"pip install -e '{errors.CHECKOUT}[data]'"
    monkeypatch.setattr(errors, "CHECKOUT", Path("/none"))
    assert errors.install_hint("data") == "pip install 'datasets>=3' 'pyarrow>=17'"


def test_a_data_set_by_its_name(tmp_path):
    """The hub cannot be reached in a test; a folder is loaded by the same call."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"prompt": "eins", "n": 1}\n{"prompt": "zwei", "n": 2}\n', "utf-8")
    (tmp_path / "set/test.jsonl").write_text('{"prompt": "drei", "n": 3}\n', "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompts = read_prompts(f"datasets:{tmp_path}/set", "prompts.train")
        assert prompts == [Prompt("eins", {"n": 1}), Prompt("zwei", {"n": 2})]
        assert read_prompts(f"datasets:{tmp_path}/set:test", "prompts.train") == [Prompt("drei", {"n": 3})]
        with pytest.raises(UserError, match=r"prompts.train: datasets:.* cannot be loaded"):
            read_prompts(f"datasets:{tmp_path}/set:none", "prompts.train")
        with pytest.raises(UserError, match=r"prompts.train: datasets:nobody/nothing cannot be loaded"):
            read_prompts("datasets:nobody/nothing", "prompts.train")


def test_every_prompt_comes_once_before_any_comes_twice():
    walk = [g.prompt.text for update in range(5) for g in prompt_groups(PROMPTS, 0, update, 3, 2)]
    assert len(walk) == 15
    for start in (0, 5, 10):
        assert sorted(walk[start : start + 5]) == [prompt.text for prompt in PROMPTS]
    assert walk[:5] != walk[5:10]


def test_groups_depend_on_seed_and_update_alone():
    groups = prompt_groups(PROMPTS, 7, 3, 4, 2)
    assert groups == prompt_groups(PROMPTS, 7, 3, 4, 2)
    assert [group.group for group in groups] == [0, 1, 2, 3]
    assert groups != prompt_groups(PROMPTS, 8, 3, 4, 2)


def test_random_numbers_are_named():
    assert torch.equal(normal((4,), 0, "noise", 1, 2), normal((4,), 0, "noise", 1, 2))
    for other in ((1, "noise", 1, 2), (0, "step", 1, 2), (0, "noise", 12)):
        assert not torch.equal(normal((4,), 0, "noise", 1, 2), normal((4,), *other))
    assert keyed_bits("noise", 0) == 10167123882504193168  # the same on every machine and in every release
    draws = torch.randn(20_000, generator=generator(0, "noise"))
    assert abs(float(draws.mean())) < 0.03
    assert abs(float(draws.std()) - 1) < 0.03


def brightness(videos, prompts, n, scale=1.0):
    assert isinstance(prompts, list)
    return [float(video.mean()) * scale + value for video, value in zip(videos, n, strict=True)]


def parts(videos, prompts, **columns):
    return {"low": torch.zeros(len(prompts)), "high": [1.0] * len(prompts)}


def test_weights_components_and_watched():
    here = "tests.scoring.test_prompts_rewards"
    rewards = Rewards(
        {
            "bright": RewardConfig(call=f"{here}:brightness", weight=2.0, args={"scale": 10.0}),
            "parts": RewardConfig(call=f"{here}:parts", weight=3.0),
            "watch": RewardConfig(call=f"{here}:brightness", watched=True),
        }
    )
    table = rewards.score(VIDEOS, PROMPTS[:3], watched=True)
    assert table.names == ("bright", "parts.low", "parts.high", "watch")
    assert table.weights.tolist() == [2.0, 1.5, 1.5, 0.0]
    assert table.values[:, 0].tolist() == pytest.approx([0, 6, 12])  # 10 x brightness + column n
    assert table.total.tolist() == pytest.approx([1.5, 13.5, 25.5])
    assert table.means(trained=False) == pytest.approx({"watch": 1.5})
    assert rewards.score(VIDEOS, PROMPTS[:3], watched=False).names == ("bright", "parts.low", "parts.high")


def slow_first(videos, prompts, **columns):
    import time

    time.sleep(0.05)
    return [0.0] * len(prompts)


def test_the_order_of_components_is_that_of_the_settings():
    here = "tests.scoring.test_prompts_rewards"
    configs = {
        "slow": RewardConfig(call=f"{here}:slow_first"),
        "fast": RewardConfig(call=f"{here}:brightness"),
    }
    assert Rewards(configs).score(VIDEOS, PROMPTS[:3], watched=False).names == ("slow", "fast")


def test_a_reward_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(videos, prompts, **columns):\n    return [1.0] * len(prompts)\n")
    assert load_reward(f"{file}:f", "rewards.mine.call")(VIDEOS, ["a", "b", "c"]) == [1.0] * 3


def test_what_a_reward_raises_is_told_with_its_place_and_the_prompt(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def bug(videos, prompts, **columns):\n    return prompts[99]\n"
        "def refuse(videos, prompts, **columns):\n    raise ValueError('no sound')\n"
    )
    with pytest.raises(
        UserError, match=r"reward r raised IndexError list index .* at .*mine.py:2, given the prompt"
    ) as told:
        Rewards({"r": RewardConfig(call=f"{file}:bug")}).score(VIDEOS, PROMPTS[:3], watched=False)
    assert str(told.value).count("  File ") == 1  # the user's own frame, and none of the library's
    with pytest.raises(UserError, match=r"r raised ValueError no sound at .*mine.py:4, given the prompt 'prompt 0'"):
        Rewards({"r": RewardConfig(call=f"{file}:refuse")}).score(VIDEOS, PROMPTS[:3], watched=False)


ENDS = ("import sys; sys.exit()", "raise SystemExit(0)", "raise BaseException('odd')", "raise GeneratorExit")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("place", ["import", "constructor", "call"])
def test_a_reward_cannot_end_a_run_with_success(tmp_path, end, place):
    file = tmp_path / "ends.py"
    lines = {name: end if name == place else "pass" for name in ("import", "constructor", "call")}
    file.write_text(
        f"{lines['import']}\nclass R:\n    def __init__(self):\n        {lines['constructor']}\n"
        f"    def __call__(self, videos, prompts, **columns):\n        {lines['call']}\n"
    )
    with pytest.raises(UserError, match=r"rewards?.r.* raised \w+.* at .*ends.py:\d"):
        Rewards({"r": RewardConfig(call=f"{file}:R")}).score(VIDEOS, PROMPTS[:3], watched=False)


def test_an_interrupt_that_a_reward_raises_is_no_ctrl_c(tmp_path):
    (tmp_path / "ends.py").write_text("def r(videos, prompts, **columns): raise KeyboardInterrupt\n")
    with pytest.raises(UserError, match="reward r raised KeyboardInterrupt"):
        Rewards({"r": RewardConfig(call=f"{tmp_path}/ends.py:r")}).score(VIDEOS, PROMPTS[:3], watched=False)


@pytest.mark.parametrize("write", ["videos.mul_(2)", "videos.numpy()[:] = 0", "videos.data.zero_()"])
def test_a_reward_that_writes_where_others_read_is_noticed(tmp_path, write):
    (tmp_path / "w.py").write_text(
        f"def w(videos, prompts, **columns):\n    {write}\n    return [0.0] * len(prompts)\n"
        "def r(videos, prompts, **columns): return [0.0] * len(prompts)\n"
    )
    rewards = Rewards({name: RewardConfig(call=f"{tmp_path}/w.py:{name}") for name in ("w", "r")})
    with pytest.raises(UserError, match="changed the videos in place"):
        rewards.score(VIDEOS.clone(), PROMPTS[:3], watched=False)


def test_the_components_of_a_reward_are_those_of_its_first_table(tmp_path):
    (tmp_path / "c.py").write_text(
        "calls = 0\ndef c(videos, prompts, **columns):\n    global calls\n    calls += 1\n"
        "    return {name: [0.0] * len(prompts) for name in ['ab', 'ba', 'a'][calls - 1]}\n"
    )
    rewards = Rewards({"c": RewardConfig(call=f"{tmp_path}/c.py:c")})
    for _ in range(2):
        assert set(rewards.score(VIDEOS, PROMPTS[:3], watched=False).names) == {"c.a", "c.b"}
    with pytest.raises(UserError, match=r"reward c returned the components a, and at first the components a, b"):
        rewards.score(VIDEOS, PROMPTS[:3], watched=False)


def judged(videos, prompts, **columns):
    """A number, and what tells of it."""
    values = videos.mean(dim=(1, 2, 3, 4)).tolist()
    return {"": values, "double": [2 * value for value in values], "share": [7.0] * len(prompts)}


judged.watches = ("share",)


def test_components_that_a_reward_watches_have_no_weight():
    """The two others share the weight of 3, and "share" is no part of the reward, nor of its metrics."""
    rewards = Rewards({"c": RewardConfig(call=f"{__name__}:judged", weight=3.0)})
    table = rewards.score(VIDEOS, PROMPTS[:3], watched=False)
    assert table.names == ("c", "c.double", "c.share")
    assert table.weights.tolist() == [1.5, 1.5, 0.0]
    torch.testing.assert_close(table.total, 4.5 * table.values[:, 0])
    assert table.means(trained=False) == {"c.share": 7.0}
    assert set(table.means(trained=True)) == {"c", "c.double"}


def test_reward_table_total_by_hand():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    table = RewardTable(("a", "b"), values, torch.tensor([1.0, -0.5], dtype=torch.float64))
    assert table.total.tolist() == [0.0, 1.0]
    assert table.trained == (0, 1)


def test_parquet_where_its_library_is_there(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": ["one", "two"], "n": [1, None]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    prompts = read_prompts(str(tmp_path / "a.parquet"), "prompts.train")
    assert [(prompt.text, dict(prompt.columns)) for prompt in prompts] == [("one", {"n": 1}), ("two", {"n": None})]


def test_compressibility_prefers_what_compresses():
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    videos = torch.stack([noise, torch.full_like(noise, 0.5), noise / 2 + 0.25])
    scores = compressibility(videos, ["", "", ""], frames=1)
    assert scores[1] > scores[2] > scores[0]
    assert -2 < float(scores[0]) < 0
    pair = Rewards({"c": RewardConfig(call="flashgrpo.rewards.jpeg:compressibility")}).planted_pairs()["c"]
    worse, better = compressibility(torch.stack([pair.worse, pair.better]), ["", ""])
    assert better > worse
