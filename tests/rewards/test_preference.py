"""The preference head that judges what nobody has: its fit by hand, what it leaves alone, and a run that has it."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashgrpo.errors import UserError
from flashgrpo.rewards.human import Predicted, Replay
from flashgrpo.rewards.preference import ENOUGH, Head, Predictor, fit, learn, read_sample
from flashgrpo.serving.human.votes import FILE, Vote, Votes, name_of
from flashgrpo.train import train
from flashgrpo.video import write_mp4
from tests.conftest import small_run
from tests.rewards.test_clip_rewards import make_clip

TASTE = 0  # the number of a feature
PREDICTED = '"flashgrpo.rewards.human:Predicted"'


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return make_clip(tmp_path_factory.mktemp("clip"))


def picture(folder: Path, color: tuple[int, int, int]) -> str:
    """Write a picture of one colour as a sample of this folder; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(folder / "new.png")
    name = name_of((folder / "new.png").read_bytes(), ".png")
    (folder / "new.png").rename(folder / name)
    return name


def vote(votes: Votes, names: list[str], best: list[str] | None, voter: str = "me") -> None:
    votes.add(Vote(voter=voter, at=0.0, seconds=1.0, prompt="p", asked=names, best=best))


def judged(folder: Path, clip: str, groups: int = ENOUGH) -> Votes:
    """Votes for the one of three pictures of colours drawn with seed 0 whose features are the furthest in `TASTE`."""
    draw, votes, predictor = random.Random(0), Votes(folder), Predictor(folder, clip)
    for _ in range(groups):
        names = [picture(folder / "samples", tuple(draw.randrange(256) for _ in range(3))) for _ in range(3)]
        vote(votes, names, [max(names, key=lambda name: liking(predictor, folder / "samples" / name))])
    return votes


def liking(predictor: Predictor, file: Path) -> float:
    return float(predictor._of(file)[TASTE])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip: str) -> Path:
    path = tmp_path_factory.mktemp("votes")
    judged(path, clip)
    return path


@pytest.fixture
def strangers(tmp_path: Path, clip: str) -> list[str]:
    """Two pictures that nobody has judged, of which the voters would like the first."""
    files = [tmp_path / "new" / picture(tmp_path / "new", color) for color in ((250, 1, 1), (1, 250, 250))]
    return [str(file) for file in sorted(files, key=lambda file: -liking(Predictor(tmp_path, clip), file))]


def test_one_pair_by_hand():
    """The maximum of log sigmoid(w) - w^2 / 2 is where sigmoid(-w) = w: 0.401058."""
    head = fit(torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 1, dtype=torch.bool))
    assert head.tolist() == [[pytest.approx(0.4010581, abs=1e-7), 0.0]]


def test_the_fit_is_a_maximum_and_finds_a_direction_that_separates():
    source = torch.Generator().manual_seed(0)
    differences = torch.randn(60, 5, generator=source).double()
    differences *= differences[:, :1].sign()  # the first feature decides
    kept = torch.ones(2, 60, dtype=torch.bool)
    kept[1, :20] = False
    whole, part = fit(differences, kept)
    for head, pairs in ((whole, differences), (part, differences[20:])):
        slope = torch.sigmoid(-pairs @ head) @ pairs - head
        assert float(slope.abs().max()) < 1e-9
        assert head.abs().argmax() == 0
    assert float(((differences[:20] @ part) > 0).double().mean()) > 0.9  # which it has not seen
    few = fit(differences[20:], kept[:1, 20:])[0]
    torch.testing.assert_close(part, few, rtol=0, atol=1e-8)


def test_numbers_are_those_that_votes_are_expected_to_give():
    """Scores 2, 0, 0: tanh(1) over both others; the others lose that against one of two."""
    numbers = Head(torch.tensor([2.0]).double(), 1.0, 16).numbers(torch.tensor([[1.0], [0.0], [0.0]]).double())
    assert numbers == pytest.approx([0.7615942, -0.3807971, -0.3807971])


def test_a_group_is_left_out_with_those_that_share_a_sample():
    """Two of three pairs have sample a, so that only the third is left for each, and teaches it nothing."""
    features = {name: torch.tensor(row).double() for name, row in zip("abcd", torch.eye(4).tolist(), strict=True)}
    with pytest.raises(
        UserError, match=r"puts 0% of the pairs that it has not seen in the voters' order, no more than"
    ):
        learn([(("a", "b"),), (("a", "c"),), (("d", "e"),)], features | {"e": torch.ones(4).double()})
    apart = [((f"{i}+", f"{i}-"),) for i in range(4)]
    same = {name: torch.tensor([float(name[1:] + "1")]).double() for pairs in apart for name in pairs[0]}
    assert learn(apart, same).agreement == 1
    with pytest.raises(UserError, match="CLIP has the same features for all judged samples"):
        learn(apart, {name: torch.zeros(1).double() for name in same})


def test_the_same_votes_in_any_order_are_the_same_head_to_the_bit(folder: Path, clip: str, tmp_path: Path):
    lines = (folder / FILE).read_text().splitlines(True)
    random.Random(1).shuffle(lines)
    (tmp_path / FILE).write_text("".join(lines))
    here, there = (Votes(one).pairs() for one in (folder, tmp_path))
    one, other = (Predictor(folder, clip).learn(pairs) for pairs in (here, there))
    assert torch.equal(one.direction, other.direction)
    assert one.agreement == other.agreement > 0.8
    assert (folder / FILE).read_text() != (tmp_path / FILE).read_text()


def test_what_people_judged_stays_and_what_nobody_did_is_predicted(tmp_path: Path, clip: str, strangers: list[str]):
    votes = judged(tmp_path / "votes", clip)
    known = [json.loads(line)["vote"] for line in (tmp_path / "votes" / FILE).read_text().splitlines()]
    unsaid = [picture(tmp_path / "votes" / "samples", (200, level, 0)) for level in (1, 99)]
    vote(votes, unsaid, None)
    before = (tmp_path / "votes" / FILE).read_bytes()
    human = Predicted(str(tmp_path / "votes"), clip, wait=0)

    def ask(names) -> dict:
        return human([str(tmp_path / "votes" / "samples" / name) for name in names], ["p"] * len(names))

    asked, [best] = known[0]["asked"], known[0]["best"]
    said = ask(asked)
    assert said[""] == [1.0 if name == best else -0.5 for name in asked]
    assert said["judged"] == [1.0] * 3
    assert ask(unsaid)[""] == [None, None]
    assert ask(unsaid)["judged"] == [1.0, 1.0]
    predicted = human(strangers, ["p"] * 2)
    assert predicted["judged"] == [0.0, 0.0]
    assert predicted["agreement"] == said["agreement"][:2]
    assert 0 < predicted[""][0] == -predicted[""][1] <= 1
    assert human(strangers[::-1], ["p"] * 2)[""] == predicted[""][::-1]
    assert human([strangers[0]] * 2, ["p"] * 2)[""] == [0.0, 0.0]
    assert (tmp_path / "votes" / FILE).read_bytes() == before
    assert human(strangers[1:], ["q"])[""] == [0.0]  # the first that comes alone
    assert human(strangers[:1], ["q"])[""] == [pytest.approx(predicted[""][0])]
    human.close()
    replay = Replay(str(tmp_path / "votes"), predict_with=clip)
    assert replay(strangers, ["p"] * 2) == predicted
    assert replay(strangers[:1], ["nobody began"])[""] == [None]


def test_before_there_are_enough_votes_nothing_is_predicted(tmp_path: Path, clip: str, strangers, caplog):
    judged(tmp_path / "votes", clip, ENOUGH - 1)
    human = Predicted(str(tmp_path / "votes"), clip, wait=0)
    with caplog.at_level(logging.WARNING, "flashgrpo"):
        for _ in range(2):
            said = human(strangers, ["p"] * 2)
            assert said == {"": [None, None], "judged": [0.0, 0.0], "agreement": [0.0, 0.0]}
    assert len(caplog.records) == 1
    assert "and there are 15; until then groups that nobody judged have no number" in caplog.text
    (human.votes.folder / FILE).unlink()
    judged(human.votes.folder, clip)
    human.votes = Votes(human.votes.folder)
    assert human(strangers, ["p"] * 2)[""][0] > 0
    human.close()


def test_what_cannot_be_learnt_from(folder: Path, tmp_path: Path, clip: str):
    with pytest.raises(UserError, match="--predict-with is for groups that nobody judges within --wait SECONDS"):
        Predicted(str(tmp_path / "votes"), clip)
    with pytest.raises(UserError, match=r"the CLIP model .* could not be loaded"):
        Predicted(str(tmp_path / "votes"), str(tmp_path / "gone"), wait=0)
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())  # whose samples lie elsewhere
    with pytest.raises(
        UserError, match=r"a preference head needs 16 groups that people put in an order .* there are 0"
    ):
        Replay(str(tmp_path), predict_with=clip)
    assert Replay(str(tmp_path)).watches == ()
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read as a video; without it the votes"):
        read_sample(tmp_path / "a.mp4")


def test_votes_without_their_samples_replay(tmp_path: Path, folder: Path):
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    [first, *_] = [json.loads(line)["vote"] for line in (folder / FILE).read_text().splitlines()]
    files = [str(folder / "samples" / name) for name in first["asked"]]
    expected = [1.0 if name in first["best"] else -0.5 for name in first["asked"]]
    assert Replay(str(tmp_path))(files, ["p"] * 3) == expected


def test_frames_of_a_video(tmp_path: Path):
    levels = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 3, 192, 192)
    write_mp4(tmp_path / "a.mp4", levels, 8.0)
    frames = read_sample(tmp_path / "a.mp4")
    assert frames.shape[:2] == (5, 3)
    torch.testing.assert_close(frames.mean(dim=(1, 2, 3)), levels[:, 0, 0, 0], rtol=0, atol=0.02)


def test_a_run_says_how_much_people_judged(tmp_path: Path, clip: str):
    judged(tmp_path / "votes", clip)
    rewards = f"rewards={{agreement: null, persistence: null, background: null, human: {{call: {PREDICTED}, args: "
    rewards += f"{{folder: {tmp_path / 'votes'}, wait: 0, predict_with: {clip}}}}}}}"
    run = Path(train(small_run(tmp_path / "run", rewards, "updates=2", "tracking.preflight=skip")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["watched"]["human.judged"] == 0
        assert line["watched"]["human.agreement"] > 0.8
        assert set(line["rewards"]) == {"human"}
        assert line["reward"] == pytest.approx(0, abs=1e-6)
        assert line["reward_std"] > 0
        assert "dropped_groups" not in line
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["watched"] == {"human.judged": 0.0, "human.agreement": lines[0]["watched"]["human.agreement"]}
    assert "dropped_prompts" not in last
