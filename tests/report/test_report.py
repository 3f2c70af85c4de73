"""The report of a run: what it says, what it survives, and that a browser shows it from disk."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest

from flashgrpo.errors import UserError
from flashgrpo.report import findings, write_report
from flashgrpo.report.charts import binned, extremes, metric_curve
from flashgrpo.report.record import headline_evaluation
from flashgrpo.report.samples import MOST_PAIRS

COMPONENTS = ("agreement.color", "agreement.shape", "agreement.direction", "agreement.speed")
CONFIG = "out: runs/demo\nseed: 0\nupdates: 60\nalgorithm: flash_grpo\noptim:\n  lr: 0.0001\n"
ENVIRONMENT = {"flashgrpo": "0.1.0", "python": "3.11.7", "started": "2026-07-31T03:41:22+00:00", "cpus": 2}


# ---- a synthetic run -------------------------------------------------------------------------------------------------


def metrics_row(update: int, updates: int = 60) -> dict[str, Any]:
    progress, wave = update / updates, math.sin(2.1 * update) * math.cos(0.7 * update)
    reward = 0.52 + 0.2 * (1 - math.exp(-2.5 * progress)) + 0.02 * wave
    seconds = {"rollout": 2.9 + 0.1 * wave, "decode": 0.8, "reward": 0.1, "update": 1.7}
    seconds |= {"evaluate": 6.0 if update % 10 == 0 else 0.0, "checkpoint": 0.2 if update % 20 == 0 else 0.0}
    return {
        "update": update,
        "reward": reward,
        "reward_std": 0.16 - 0.03 * progress,
        "rewards": {name: reward + 0.06 * (i - 1.5) for i, name in enumerate(COMPONENTS)},
        "drift": 0.0,
        "ratio_max_dev": 0.0,
        "clip_fraction": max(0.0, 0.02 * wave),
        "approx_kl": 1e-5 * (1 + wave) * update,
        "kl": 0.0,
        "grad_norm": 2e-4 * (1.3 + wave),
        "grad_norm_by_step": {str(k): 1e-4 * (1.5 + wave) * (1 + 0.1 * k) for k in range(update % 2, 5, 2)},
        "samples": 64,
        "samples_per_second": 12.5,
        "peak_gib": 0.75,
        "zero_spread_groups": 1 if update == 7 else 0,
        "seconds": seconds | {"total": sum(seconds.values()) + 0.3},
    }


def sample(i: int, gain: float, videos: int) -> dict[str, Any]:
    prompts = [
        f"a {color} {shape} moving {way}"
        for color in ("red", "blue", "green", "yellow")
        for shape in ("circle", "square", "cross")
        for way in ("left slowly", "right quickly", "up slowly")
    ]
    base, change = 0.55 + 0.2 * math.sin(1.7 * i), gain * (1 + 1.4 * math.sin(3.1 * (i // 2)))
    return {
        "prompt": prompts[(i // 2) % len(prompts)],
        "reward": base + change,
        "base_reward": base,
        "rewards": {name: base + change * (1 + 0.4 * (j - 1.5)) for j, name in enumerate(COMPONENTS)},
        "base_rewards": dict.fromkeys(COMPONENTS, base),
        "watched": {"persistence": 0.91},
        "base_watched": {"persistence": 0.92},
        "video": f"videos/{i:03d}.mp4" if i < videos else None,
        "base_video": f"videos/base/{i:03d}.mp4" if i < videos else None,
    }


def evaluation(update: int, gain: float = 0.18, videos: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "update": update,
        "reward": 0.56 + gain,
        "base_reward": 0.56,
        "difference": gain,
        "interval": [gain - 0.03, gain + 0.03],
        "rewards": {name: 0.56 + gain + 0.05 * (i - 1.5) for i, name in enumerate(COMPONENTS)},
        "base_rewards": {name: 0.56 + 0.05 * (i - 1.5) for i, name in enumerate(COMPONENTS)},
        "watched": {"persistence": 0.92 - 0.0002 * update},
        "base_watched": {"persistence": 0.92},
        "best": False,
        "seconds": 6.0,
        "samples": [sample(i, gain, videos) for i in range(72)],
        **changes,
    }


def write_video(path: Path, step: int, size: int = 48, frames: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = np.full((frames, size, size, 3), 28, dtype=np.uint8)
    for frame in range(frames):
        left = (6 + step * frame) % (size - 12)
        clip[frame, 16:28, left : left + 12] = (213, 94, 0) if step > 1 else (86, 180, 233)
    imageio.imwrite(path, clip, fps=8, codec="libx264", macro_block_size=1)


def make_run(path: Path, metrics: list[Any], evaluations: list[Any], videos: int = 0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    for name, rows in (("metrics", metrics), ("evaluations", evaluations)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for i in range(videos):
        write_video(path / f"videos/{i:03d}.mp4", 3)
        write_video(path / f"videos/base/{i:03d}.mp4", 1)
    return path


def whole_run(path: Path, videos: int = 4) -> Path:
    gains = {0: 0.0, 10: 0.05, 20: 0.1, 30: 0.15, 40: 0.18, 50: 0.17, 60: 0.16}
    rows = [evaluation(update, gain, videos, best=update <= 40) for update, gain in gains.items()]
    return make_run(path, [metrics_row(update) for update in range(1, 61)], rows, videos)


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def words(page: str) -> str:
    """The text of the page as read: without style, script and tags, spaces collapsed."""
    text = re.sub(r"<style.*?</style>|<script>.*?</script>|<[^>]*>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", text)


def spoken(evaluations: list[dict[str, Any]]) -> str:
    """The result of a run in words, without drawing its page."""
    shown = headline_evaluation(evaluations)
    assert shown
    result = findings.result(shown, evaluations, findings.Numbers(findings.decimals(shown)))
    return re.sub(r"\s+", " ", f"{result.headline} ({result.basis}). {result.choice}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(whole_run(tmp_path_factory.mktemp("runs") / "demo"))


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_whole_page(whole: Path) -> None:
    page = whole.read_text(encoding="utf-8")
    text = words(page)
    assert "Held-out reward rose by 0.18 [0.15, 0.21] (95 % interval, 72 paired samples, 36 prompts)." in text
    assert "after update 40, the best of 6 evaluations and selected by this number, which flatters it" in text
    assert "the last, after update 60, stands at +0.16 [0.13, 0.19]" in text
    for figure in ("0.56 → 0.74", "+0.18", "3,840", "31 July 2026, 03:41 UTC", "36 prompts", "flash_grpo", "−0.01"):
        assert figure in text
    for name in (*COMPONENTS, "persistence", "rollout", "checkpoint", "other"):
        assert name in text
    assert "In 1 prompt group all rewards were equal" in text
    assert page.count("<video ") == 8 + 14  # pairs, and films of two prompts
    assert page.count('src="data:video/mp4;base64,') == 8 + 14
    assert page.count('role="img"') == page.count("<svg ") >= 14
    assert not [name.name for name in whole.parent.iterdir() if name.name.startswith(".")], "the aside file is gone"


def test_no_request_leaves_the_page(whole: Path) -> None:
    page = whole.read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|srcset|poster|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert {address.split(":")[0].split(",")[0][:4] for address in addresses if address[0] != "#"} == {"data"}
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_ids_are_unique_and_referenced_ones_exist(whole: Path) -> None:
    page = whole.read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_colours_of_charts_follow_the_scheme(whole: Path) -> None:
    charts = "".join(re.findall(r"<svg .*?</svg>", whole.read_text(encoding="utf-8"), flags=re.S))
    assert "var(--training)" in charts
    assert not re.search(r"#[0-9a-f]{6}\b(?!\d)", re.sub(r'"[^"]*#[mp][0-9a-f]+[^"]*"', "", charts))


def test_the_same_run_gives_the_same_page(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole.parent, tmp_path / "demo", ignore=shutil.ignore_patterns("report.html"))
    assert write_report(copy).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"difference": -0.08, "interval": [-0.11, -0.05]}, "Held-out reward fell by 0.08 [0.05, 0.11] (95 %"),
        ({"difference": 0.01, "interval": [-0.02, 0.04]}, "No clear change of held-out reward: +0.01 [−0.02, 0.04]"),
        ({"difference": 0.004, "interval": [0.0031, 0.0049]}, "rose by 0.004 [0.003, 0.005]"),
        ({"difference": 0.1, "interval": None}, "Held-out reward changed by +0.10, with no interval"),
        ({"difference": None, "interval": [math.nan, math.nan]}, "Held-out reward changed by –, with no interval"),
        ({"samples": [], "best": True}, "rose by 0.18 [0.15, 0.21] (95 % interval)."),
        ({"best": True}, "Measured after update 10, the only evaluation of the tuned model so far."),
    ],
)
def test_the_result_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in spoken([evaluation(10, **changes)])


def test_the_result_is_the_confirmed_number_where_there_is_one(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", videos=0)
    record = evaluation(40, 0.14) | {"selected_from": 6, "average_moved": 0.43}
    (run / "confirmation.json").write_text(json.dumps(record), encoding="utf-8")
    text = words(page_of(run))
    assert "Held-out reward rose by 0.14 [0.11, 0.17] (95 % interval, 72 paired samples, 36 prompts)." in text
    assert "the best of 6 evaluations, on other noise than selected it; the evaluation that it was selected on" in text
    assert "selected on says +0.18." in text
    assert "Averaged weights 43 %" in text
    (run / "confirmation.json").write_text(json.dumps(record | {"update": 30}), encoding="utf-8")
    assert "rose by 0.18" in words(page_of(run)), "of another update than the best: it is not this run's result"


def test_base_never_beaten() -> None:
    text = spoken([evaluation(0, 0.0, best=True), evaluation(10, -0.05), evaluation(20, -0.09)])
    assert "fell by 0.09 [0.06, 0.12]" in text
    assert "after update 20, the last of 2 evaluations; none of them beat the base." in text


def test_worst_prompts_are_shown_as_readily_as_best(whole: Path) -> None:
    lowest, highest = (
        re.search(rf"{title}</caption>.*?</table>", whole.read_text(encoding="utf-8"), flags=re.S)
        for title in ("Lowest", "Highest")
    )
    changes = [re.findall(r'class="(?:up|down)">([+−\d.]+)', table[0]) for table in (lowest, highest) if table]
    values = [[float(change.replace("−", "-")) for change in column] for column in changes]
    assert [len(column) for column in values] == [5, 5]
    assert values[0] == sorted(values[0])
    assert values[1] == sorted(values[1], reverse=True)
    assert values[0][0] < 0 < values[1][0]


def test_no_spike_of_a_long_run_is_lost() -> None:
    """A point of 1,000 updates is the mean of 5; the band about it goes to the highest of them."""
    values = np.ones(1000)
    values[777] = 50.0
    values[3] = math.nan
    low, high = extremes(values)
    assert (len(low), low.max(), high.argmax(), high.max()) == (200, 1, 777 // 5, 50)
    assert binned(values)[0].max() == (50 + 4) / 5
    drawn = metric_curve([{"update": i, "grad_norm": value} for i, value in enumerate(values)], "grad_norm")
    assert "largest 50." in drawn


def test_repeated_updates_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    text = words(page_of(make_run(tmp_path, [metrics_row(u) for u in (1, 2, 3, 2, 3, 4)], [])))
    assert "Updates 4" in text
    assert "256 samples generated and scored" in text
    assert "Samples a second 12.5 memory 0.75 GiB at the highest" in text


# ---- what it survives ------------------------------------------------------------------------------------------------


def test_text_is_escaped(tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script>$x_{$ 視頻'
    row = evaluation(10, videos=1, best=True, watched={attack: 0.9}, base_watched={attack: 0.9})
    for entry in row["samples"]:
        entry |= {"prompt": attack, "rewards": {attack: 0.5}, "base_rewards": {attack: 0.4}}
    metrics = metrics_row(1) | {"rewards": {attack: 0.5}, "grad_norm_by_step": {attack: 1.0, "0": 1.0}}
    metrics["seconds"] = {attack: 1.0, "total": 1.0}
    run = make_run(tmp_path / "a<b>&c", [metrics], [row], videos=1)
    (run / "config.yaml").write_text(f"out: '{attack}'\n", encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({attack: [attack], "started": attack}), encoding="utf-8")
    page = page_of(run)
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a&lt;b&gt;&amp;c" in page


def test_nothing_finite(tmp_path: Path) -> None:
    empty = {"update": 1, "reward": math.nan, "reward_std": None, "rewards": None, "grad_norm": math.inf, "seconds": 3}
    row = evaluation(10, reward=None, base_reward=math.nan, rewards={"a": None}, watched=None, samples=[None, {}])
    page = page_of(make_run(tmp_path, [empty, {"update": 2}, metrics_row(3) | {"kl": "?"}], [row, {"update": 20}]))
    assert not re.search(r"\b(nan|inf|None)\b", words(page))


def test_no_evaluations_and_one_line_of_metrics(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, [metrics_row(1)], []))
    assert "No result yet." in page
    assert "has not been evaluated yet" in page
    assert "There are no samples" in page
    assert "<video" not in page
    assert "<svg" in page


def test_nothing_but_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    text = words(page_of(tmp_path))
    assert "No update has finished yet" in text
    assert "environment.json is missing" in text


def test_only_the_base_was_evaluated(tmp_path: Path) -> None:
    text = words(page_of(make_run(tmp_path, [metrics_row(1)], [evaluation(0, 0.0, best=True)])))
    assert "No result yet." in text
    assert "has not been evaluated yet" in text


def test_last_line_cut_short(tmp_path: Path) -> None:
    run = make_run(tmp_path, [metrics_row(u) for u in (1, 2, 3)], [evaluation(2, best=True)])
    for name in ("metrics", "evaluations"):
        with (run / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"update": 4, "reward": 0.5')
    text = words(page_of(run))
    assert "1 line of metrics.jsonl could not be read" in text
    assert "1 line of evaluations.jsonl could not be read" in text
    assert "Updates 3" in text


def test_videos_missing_or_outside_the_run_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [metrics_row(1)], [evaluation(10, videos=3, best=True)], videos=2)
    write_video(tmp_path / "outside.mp4", 1)
    (run / "videos" / "001.mp4").unlink()
    (run / "videos" / "001.mp4").symlink_to(tmp_path / "outside.mp4")
    page = page_of(run)
    assert page.count("<video ") == 2
    assert "1 of 3 pairs are shown." in page


def test_the_largest_changes_are_shown_worst_first(tmp_path: Path) -> None:
    line = evaluation(10, videos=6, best=True)
    line["extremes"] = [4, 2, 99, "x"]
    run = make_run(tmp_path / "run", [metrics_row(1)], [line], videos=6)
    line["samples"][4]["base_video"] = "videos/004-base.mp4"  # drawn for its change alone
    shutil.copy(run / "videos/base/004.mp4", run / "videos/004-base.mp4")
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    page = page_of(run)
    plain, changed = page.split('id="extremes"')
    assert plain.count("<video ") == 2 * 5
    assert changed.count("<video ") == 2 * 2
    assert changed.index(line["samples"][4]["prompt"]) < changed.index(line["samples"][2]["prompt"])
    assert "Changed most" in words(page)


def test_images_and_texts_are_shown_as_what_they_are(tmp_path: Path) -> None:
    line = evaluation(10, videos=3, best=True)
    for ending, entry in zip(("mp4", "png", "txt"), line["samples"], strict=False):
        entry |= {"video": f"videos/a.{ending}", "base_video": f"videos/b.{ending}"}
    run = make_run(tmp_path, [metrics_row(1)], [line])
    for name in "ab":
        write_video(run / f"videos/{name}.mp4", 1)
        imageio.imwrite(run / f"videos/{name}.png", np.zeros((4, 4, 3), np.uint8))
        (run / f"videos/{name}.txt").write_text(f"<b>{name}</b>\n")
    page = page_of(run)
    assert [page.count(tag) for tag in ("<video ", '<img src="data:image/png', '<pre class="text"')] == [2, 2, 2]
    assert "&lt;b&gt;a&lt;/b&gt;" in page
    assert 'id="play"' in page
    for entry in line["samples"][:1]:
        del entry["video"]
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    page = page_of(run)
    assert [page.count(tag) for tag in ("<video ", "<img ", 'id="play"')] == [0, 2, 0]


def test_number_of_videos_is_bounded(tmp_path: Path) -> None:
    run = make_run(tmp_path, [metrics_row(1)], [evaluation(10, videos=20, best=True)])
    write_video(run / "videos/000.mp4", 3)
    for i in range(20):
        for folder in ("videos", "videos/base"):
            (run / folder).mkdir(exist_ok=True)
            if i or folder != "videos":
                shutil.copy(run / "videos/000.mp4", run / folder / f"{i:03d}.mp4")
    page = page_of(run)
    assert page.count("<video ") == 2 * MOST_PAIRS
    assert f"{MOST_PAIRS} of 20 pairs are shown." in page


def test_long_run_stays_small(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, [metrics_row(u, 1500) for u in range(1, 1501)], [evaluation(1500, best=True)]))
    assert len(page) < 600_000


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no-such-run is no run directory: there is no such folder\.$"):
        write_report(tmp_path / "no-such-run")
    with pytest.raises(UserError, match=r"is no run directory: it has no config\.yaml\.$"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, [metrics_row(1)], [])
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_report(run)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "report.html"
    }  # fmt: skip


# ---- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PROBE = """<script>
  const state = document.documentElement.dataset, errors = [];
  window.addEventListener("error", event => errors.push(event.message));
  document.addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
  function look() {
    const all = [...document.querySelectorAll("video")], b = document.querySelector("#play");
    state.ready = all.filter(v => v.readyState >= 2 && v.videoWidth === 48 && v.clientWidth > 48).length;
    state.playing = all.filter(v => !v.paused).length;
    b.focus(); b.click();
    state.toggled = all.filter(v => !v.paused).length;
    state.label = b.textContent;
    state.drift = Math.max(...all.map(v => Math.abs(v.currentTime - all[0].currentTime)));
    state.overflow = document.documentElement.scrollWidth - innerWidth;
    state.charts = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 80).length;
    state.errors = errors.join(" ");
  }
  setTimeout(look, 1500);
</script>"""


def probe(report: Path, tmp_path: Path, *flags: str) -> dict[str, str]:
    """Open the page from disk and return what a script added to its end found there."""
    page = tmp_path / "probed.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert CHROMIUM
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=4000", *flags, "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    opening = re.search(r"<html[^>]*>", dom)
    assert opening
    return dict(re.findall(r'data-(\w+)="([^"]*)"', opening[0]))


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_chromium_plays_it_from_disk(whole: Path, tmp_path: Path, width: int) -> None:
    found = probe(whole, tmp_path, f"--window-size={width},900")
    assert found["errors"] == ""
    assert (found["ready"], found["playing"]) == ("22", "22")
    assert (found["toggled"], found["label"]) == ("0", "Play")
    assert float(found["drift"]) <= 0.05
    assert int(found["overflow"]) <= 0
    assert int(found["charts"]) >= 13


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_chromium_keeps_still_where_motion_is_unwanted(whole: Path, tmp_path: Path) -> None:
    found = probe(whole, tmp_path, "--force-prefers-reduced-motion")
    assert (found["ready"], found["playing"]) == ("22", "0")
    assert (found["toggled"], found["label"]) == ("22", "Pause")
