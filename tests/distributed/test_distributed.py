"""The same run on one process or many: gloo on the CPU, through the code that NCCL runs."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashgrpo import RunConfig
from flashgrpo.distributed.world import process_group
from flashgrpo.models.load import load_model
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import read_lines
from flashgrpo.types import Prompt

LORA, FULL = [], ["model.train={kind: full}"]
PROMPTS = [Prompt("a red circle moving left slowly", {})]
DEAD_AFTER = "parallel.dead_after=4"
BY_STEP = "optim.grad_norm_by_step=true"  # ranks that hold a network between them leave it out when not asked
GEOMETRY = ["rollout.prompts=3", "rollout.group_size=3", "rollout.num_steps=6", "rollout.micro_batch=4"]


@pytest.fixture(scope="module")
def update(nursery, tmp_path_factory):
    """Does one update on so many processes, once for each choice of settings."""
    from tests.conftest import small_run

    done = {}

    def do(size: int, *overrides: str):
        if (size, overrides) not in done:
            folder = tmp_path_factory.mktemp("update")
            recipe = folder / "recipe.yaml"
            recipe.write_text(small_run(folder / "run", *GEOMETRY).to_yaml(), "utf-8")
            result = nursery.run("one_update", recipe, folder, *overrides, size=size)
            drawn = [load_file(folder / f"drawn{rank}.safetensors") for rank in range(size)]
            done[size, overrides] = result, drawn, load_file(folder / "update.safetensors")
        return done[size, overrides]

    return do


def joined_rows(drawn: list[dict], name: str) -> torch.Tensor:
    return torch.cat([rank[name] for rank in drawn])


@pytest.mark.parametrize(
    ("size", "parallel", "train"),
    [
        (2, [], LORA),
        (2, [], FULL),
        (3, [], LORA),
        (2, ["parallel.shard=2", BY_STEP], FULL),
        (3, ["parallel.shard=3", BY_STEP], LORA),
        (3, ["parallel.shares=[0,1,3]"], LORA),
        (3, ["parallel.shares=[0,1,3]", "parallel.shard=3", BY_STEP], FULL),
        (4, ["parallel.shard=2", BY_STEP], LORA),
        (4, ["parallel.shard=2", BY_STEP], FULL),
    ],
)
def test_any_number_of_processes_draws_and_learns_the_same(update, train, size, parallel):
    """Nine samples: neither groups nor samples divide by the number of processes."""
    alone, [drawn], expected = update(1, *train)
    several, ranks, found = update(size, *train, *parallel)
    assert [name for names in several["names"] for name in names] == alone["names"][0]
    assert torch.equal(joined_rows(ranks, "k"), drawn["k"])
    for name in ("latents", "x", "x_next", "log_prob"):
        torch.testing.assert_close(joined_rows(ranks, name), drawn[name], rtol=1e-3, atol=2e-4)
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3 * scale + 1e-12)
    for rank in ranks:  # rewards of all samples, on every rank
        torch.testing.assert_close(rank["rewards"], drawn["rewards"], rtol=0, atol=2e-3)
    assert several["metrics"]["drift"] == 0
    for name in ("grad_norm", "loss", "approx_kl"):
        assert several["metrics"][name] == pytest.approx(alone["metrics"][name], rel=2e-3, abs=1e-6)
    assert several["metrics"]["grad_norm_by_step"] == pytest.approx(alone["metrics"]["grad_norm_by_step"], rel=5e-3)
    assert several["metrics"]["transitions_by_step"] == alone["metrics"]["transitions_by_step"]


def test_noise_is_the_same_bit_for_bit(update):
    """x_0 is noise alone, and a sample that is stochastic at step 0 records it."""
    window = ["algorithm.steps={kind: one, window: [0, 0.1]}"]
    _, [drawn], _ = update(1, *window)
    for size in (2, 3):
        _, ranks, _ = update(size, *window)
        assert torch.equal(joined_rows(ranks, "x"), drawn["x"])


def test_where_micro_batches_have_the_same_shape_videos_are_the_same_bit_for_bit(update):
    """Six samples of one step each, cut into micro-batches of one, whatever the number of processes."""
    shape = ["rollout.micro_batch=1", "optim.micro_batch=1"]
    _, [drawn], _ = update(1, *shape)
    for size, parallel in ((2, []), (3, []), (2, ["parallel.shard=2"])):
        _, ranks, _ = update(size, *shape, *parallel)
        for name in ("latents", "x", "x_next", "log_prob"):
            assert torch.equal(joined_rows(ranks, name), drawn[name])
        assert all(torch.equal(rank["rewards"], drawn["rewards"]) for rank in ranks)


@pytest.mark.parametrize(
    "parallel", [["reward_ranks=[2]", "shares=[1,1,0]"], ["reward_ranks=[0,2]"], ["reward_ranks=[1]", "shard=3"]]
)
def test_rewards_may_be_computed_on_ranks_of_their_own(update, parallel):
    _, [drawn], _ = update(1)
    _, ranks, _ = update(3, *(f"parallel.{setting}" for setting in parallel))
    for rank in ranks:
        torch.testing.assert_close(rank["rewards"], drawn["rewards"], rtol=0, atol=2e-3)


def test_a_sharded_process_holds_its_part_only(update):
    sizes = ((1, []), (2, ["parallel.shard=2", BY_STEP]))
    whole, half = (update(size, *FULL, *parallel)[0]["held"] for size, parallel in sizes)
    assert half == pytest.approx(whole / 2, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [["optim.minibatches=2", "algorithm.kl_coef=0.1"], ["optim.passes=2", "optim.grad_norm_by_step=false"]],
)
def test_several_optimizer_steps_learn_the_same(update, settings):
    _, _, expected = update(1, *FULL, *settings, "optim.lr=1e-5")
    for size, parallel in ((2, []), (2, ["parallel.shard=2"])):
        _, _, found = update(size, *FULL, *settings, "optim.lr=1e-5", *parallel)
        for name, value in expected.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=5e-3, atol=5e-3 * scale + 1e-12)


@pytest.mark.parametrize(
    ("size", "parallel", "train"),
    [(2, [], FULL), (4, [], LORA), (4, ["parallel.shard=2"], LORA), (4, ["parallel.shard=2"], FULL)],
)
def test_ranks_that_share_a_sample_by_its_tokens(update, size, parallel, train):
    """Ulysses attention: 13 frames make 36 tokens, which 2 ranks can halve."""
    frames = ["model.num_frames=13"]
    alone, [drawn], expected = update(1, *train, *frames)
    several, ranks, found = update(size, *train, *frames, "parallel.context=2", *parallel)
    assert [name for names in several["names"] for name in names] == alone["names"][0]
    torch.testing.assert_close(joined_rows(ranks[::2], "latents"), drawn["latents"], rtol=1e-3, atol=2e-4)
    for rank in range(0, size, 2):
        torch.testing.assert_close(ranks[rank]["latents"], ranks[rank + 1]["latents"], rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3 * scale + 1e-12)
    assert several["metrics"]["drift"] == 0


def test_one_process_that_evaluates_a_sharded_run_holds_it_whole(monkeypatch):
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    with process_group(RunConfig.load("tiny", ["parallel.shard=2"]).parallel, strict=False) as world:
        assert (world.size, world.shard, world.uses_fsdp) == (1, 1, False)


def test_mixed_precision_computes_in_bf16_and_learns_in_fp32(update):
    _, _, expected = update(1, *FULL)
    for size, parallel in ((1, []), (2, ["parallel.shard=2"])):
        result, ranks, found = update(size, *FULL, "model.compute_dtype=bfloat16", *parallel)
        assert result["metrics"]["drift"] == 0
        assert joined_rows(ranks, "latents").dtype == torch.float32
        gradients = [name for name in expected if name.startswith("gradient/")]
        a, b = (torch.cat([tensors[name].flatten() for name in gradients]) for tensors in (expected, found))
        assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.95
        assert not torch.equal(a, b)


def test_mixed_precision_keeps_what_diffusers_keeps_in_float32(monkeypatch):
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    config = RunConfig.load("tiny", ["model.compute_dtype=bfloat16"])
    used = {}
    with process_group(config.parallel, config.model.compute_dtype) as world:
        model = load_model(config.model, world, 0, PROMPTS)
        for name in ("condition_embedder.time_embedder.linear_1", "blocks.0.norm2", "blocks.0.attn1.to_k"):
            module = model.network.get_submodule(name)
            hook = lambda module, inputs, name=name: used.update({name: module.weight.dtype})  # noqa: E731
            module.register_forward_pre_hook(hook)
        grid, k = model.grid(4), torch.zeros(1, dtype=torch.int64)
        point = GridPoint(grid.timesteps[k], grid.sigmas[k], torch.ones(1))
        model.velocity(torch.zeros(1, *model.latent_shape), point, model.encode(PROMPTS))
    assert used == {
        "condition_embedder.time_embedder.linear_1": torch.float32,
        "blocks.0.norm2": torch.float32,
        "blocks.0.attn1.to_k": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["parallel.shard=3"], "2 processes cannot be cut into shard 3 x context 1"),
        (["parallel.shares=[1]"], "1 shares for 2 data ranks"),
        (["parallel.reward_ranks=[2]"], "[2] with 2 processes, numbered from 0"),
        (["parallel.context=2"], "the 27 tokens of such a video cannot be split over 2 processes"),
        (["parallel.context=2", "model.num_frames=13", "parallel.context_kind=ring"], "ring attention never ran"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(nursery, recipe, overrides, sentence):
    ranks = nursery.start("train", recipe, *overrides, size=2)
    assert ranks.wait() == [2, 2]
    assert sentence in ranks.said()
    assert len(set(ranks.said().splitlines())) == 1


@pytest.fixture
def recipe(make_run, tmp_path):
    """A very small run of six updates, as a file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(make_run("updates=6").to_yaml(), "utf-8")
    return file


def trained(run: Path, update: int) -> dict[str, torch.Tensor]:
    tensors = checkpoint.load(run / "checkpoints", update)
    return {f"{kind}/{name}": tensor for kind, named in tensors.items() for name, tensor in named.items()}


def assert_close(found: dict, expected: dict) -> None:
    """Weights after six steps of AdamW, whose first steps turn rounding of tiny gradients into whole learning rates."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs()
        assert float(difference.mean()) <= 0.02 * float(value.double().abs().mean()) + 1e-9, name


def test_a_run_on_two_processes_writes_one_run_directory(nursery, recipe, tmp_path):
    alone = Path(nursery.run("train", recipe, f"out={tmp_path}/alone", "evaluation.videos=1"))
    two = Path(nursery.run("train", recipe, f"out={tmp_path}/two", "evaluation.videos=1", size=2))
    assert {path.name for path in two.iterdir()} == {path.name for path in alone.iterdir()}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for line, expected in zip(read_lines(two / name), read_lines(alone / name), strict=True):
            assert line["update"] == expected["update"]
            assert line["reward"] == pytest.approx(expected["reward"], abs=5e-3)
            assert line.get("drift", 0) == 0
    for path in (path.relative_to(alone) for path in (alone / "videos/000000").iterdir()):
        assert (two / path).exists()
    assert_close(trained(two, 6), trained(alone, 6))
    record, expected = (nursery.run("evaluate", two, size=size) for size in (2, 1))
    assert record["update"] == expected["update"]
    assert record["reward"] == pytest.approx(expected["reward"], abs=2e-3)


def test_a_run_that_splits_tokens_writes_each_video_once(nursery, recipe, tmp_path):
    settings = ["model.num_frames=13", "parallel.context=2", "updates=1", "evaluation.videos=2"]
    run = Path(nursery.run("train", recipe, f"out={tmp_path}/run", *settings, size=2))
    assert len(list((run / "videos/000000").iterdir())) == 2


@pytest.mark.parametrize("train", [LORA, ["model.train={kind: full}", "optim.lr=1e-5"]], ids=["lora", "full"])
def test_a_sharded_checkpoint_resumes_on_any_number_of_processes(nursery, recipe, tmp_path, train):
    """Saved by two processes that hold the network between them; read by two, by one and by three."""
    train = [*train, "evaluation.every=100", "updates=3"]
    shard = [*train, "parallel.shard=2"]
    run = Path(nursery.run("train", recipe, f"out={tmp_path}/two", *shard, "updates=1", size=2))
    files = [path.name for path in (run / "checkpoints/000001").iterdir() if path.suffix == ".distcp"]
    assert len(files) == 2
    expected = Path(nursery.run("train", recipe, f"out={tmp_path}/whole", *shard, size=2))
    assert nursery.run("evaluate", run)["base_reward"] > 0  # also by one process
    sizes = (2, 1, 3) if train[0].startswith("evaluation") else (1,)
    for size, parallel in ((size, f"parallel.shard={size}") for size in sizes):
        out = tmp_path / f"on{size}"
        shutil.copytree(run, out)
        resumed = Path(nursery.run("train", recipe, f"out={out}", *train, parallel, size=size))
        assert [line["update"] for line in read_lines(resumed / "metrics.jsonl")] == [1, 2, 3]
        found = trained(resumed, 3)
        if size == 2:
            assert all(torch.equal(found[name], value) for name, value in trained(expected, 3).items())
        assert_close(found, trained(expected, 3))


@pytest.mark.parametrize("parallel", [[], ["parallel.shard=2"]], ids=["replicate", "shard"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_run_with_one_message(nursery, recipe, tmp_path, victim, parallel):
    """Within `dead_after` and a few seconds, on all ranks; the last checkpoint is whole and the run goes on from it."""
    out = f"out={tmp_path}/run"
    ranks = nursery.start("slow_train", recipe, 0.3, out, "updates=100", DEAD_AFTER, *parallel, size=2)
    wait_for_updates(tmp_path / "run", 2, ranks)
    ranks.kill(victim)
    codes = ranks.wait()
    assert codes[victim] == -9
    assert codes[1 - victim] in (1, 2)
    message = [line for line in ranks.said().splitlines() if line.startswith("flashgrpo:")]
    assert len(message) == 1, ranks.said()
    silent = re.search(rf"rank {victim} has not been heard from for [45] s", message[0])  # `dead_after`, or BROKEN
    assert silent or (victim == 0 and "keeps the rendezvous" in message[0]), message
    assert "Traceback" not in ranks.said()
    newest = checkpoint.newest_whole(tmp_path / "run/checkpoints", print)
    assert newest >= 1
    if victim:
        resumed = Path(nursery.run("train", recipe, out, f"updates={newest + 1}", *parallel, size=2))
        whole = [f"out={tmp_path}/whole", f"updates={newest + 1}"]
        expected = Path(nursery.run("train", recipe, *whole, *parallel, size=2))
        found, wanted = trained(resumed, newest + 1), trained(expected, newest + 1)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_rank_that_hangs_is_found_too(nursery, recipe, tmp_path):
    """SIGSTOP: its connections stay open, so only the missing heartbeat tells."""
    ranks = nursery.start("slow_train", recipe, 0.3, f"out={tmp_path}/run", "updates=100", DEAD_AFTER, size=2)
    wait_for_updates(tmp_path / "run", 1, ranks)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    ranks.until(lambda: ranks.code(0) is not None)
    ranks.kill(1)
    assert ranks.wait()[0] == 1
    assert "rank 1 has not been heard from for 4 s" in ranks.said(0)


@pytest.mark.parametrize("met", [False, True], ids=["before it comes", "once it has come"])
def test_a_rank_that_stops_at_the_start_does_not_hang_the_others(nursery, recipe, tmp_path, met):
    limits = ["parallel.start_timeout=6", DEAD_AFTER]
    ranks = nursery.start("stop_at_start", recipe, met, f"out={tmp_path}/run", *limits, size=2)
    ranks.until(lambda: ranks.code(0) is not None)
    ranks.kill(1)
    assert ranks.wait()[0] == (1 if met else 2)
    assert ("rank 1 has not been heard from for 4 s" if met else "within 6 s") in ranks.said(0)
    assert "Traceback" not in ranks.said(0)


def test_a_run_directory_that_ranks_do_not_share_is_found_before_anything_is_computed(nursery, recipe, tmp_path):
    (tmp_path / "of0").mkdir()
    (tmp_path / "of1").mkdir()
    ranks = nursery.start("train_into_folders_of_their_own", recipe, str(tmp_path), size=2)
    assert ranks.wait() == [2, 2]
    assert ranks.said().count("out: what rank 0 writes into") == 1
    assert "is not there for rank 1; give a folder that all machines share" in ranks.said()
    assert not list((tmp_path / "of0").iterdir()) + list((tmp_path / "of1").iterdir())


SLOW_REWARD = """
import os, time
calls = 0
def slow(videos, prompts, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls in (2, 5):
        time.sleep(SECONDS)
    return videos.mean(dim=(1, 2, 3, 4))
"""


@pytest.mark.parametrize(
    "parallel",
    [["shard=2"], ["reward_ranks=[1]"], []],
    ids=["shard", "reward ranks", "replicate"],
)
def test_a_reward_may_take_longer_than_ranks_wait_for_each_other(nursery, recipe, tmp_path, parallel):
    (tmp_path / "mine.py").write_text(SLOW_REWARD.replace("SECONDS", "6"))
    call = f"rewards={{slow: {{call: '{tmp_path}/mine.py:slow'}}, agreement: null, persistence: null}}"
    few = ["updates=2", "rollout.micro_batch=1", "rollout.decode_micro_batch=1", "tracking.preflight=skip"]
    limits = ["parallel.timeout=4", *(f"parallel.{setting}" for setting in parallel)]
    ranks = nursery.start("train", recipe, f"out={tmp_path}/run", call, *few, *limits, size=2)
    assert ranks.wait() == [0, 0], ranks.said()
    assert checkpoint.updates(tmp_path / "run/checkpoints")[-1] == 2
    assert "s for 1 of 2 ranks, which live" in ranks.said(0)


def test_a_bug_on_one_rank_ends_all_and_shows_its_traceback_once(nursery, recipe, tmp_path):
    ranks = nursery.start("fail_on_rank_1", recipe, f"out={tmp_path}/run", size=2)
    codes = ranks.wait()
    assert codes[1] == 1
    assert codes[0] in (1, 2)
    assert ranks.said().count("KeyError: 'planted'") == 1
    assert "Traceback" not in ranks.said(0)


def test_a_bad_reward_on_one_rank_is_one_sentence_and_keeps_what_was_done(nursery, recipe, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\ncalls = 0\ndef bad(videos, prompts, **columns):\n    global calls\n    calls += 1\n"
        "    return [float('nan') if calls > 3 and os.environ['RANK'] == '1' else 0.5 + calls % 2] * len(videos)\n"
    )
    call = f"rewards={{bad: {{call: '{tmp_path}/mine.py:bad'}}}}"
    ranks = nursery.start(
        "train", recipe, f"out={tmp_path}/run", call, "checkpoint.every=100", "tracking.preflight=skip", size=2
    )
    assert ranks.wait() == [2, 2]
    [sentence] = [line for line in ranks.said().splitlines() if line.startswith("flashgrpo:")]
    assert "reward bad is nan for" in sentence
    assert "optim.max_bad_groups" in sentence
    done = len(read_lines(tmp_path / "run/metrics.jsonl"))
    assert checkpoint.updates(tmp_path / "run/checkpoints")[-1] == done


def test_replicas_that_differ_are_refused(nursery, recipe, tmp_path):
    ranks = nursery.start("replicas_that_differ", recipe, f"out={tmp_path}/run", size=2)
    assert ranks.wait() == [2, 2]
    assert "rank 1 trains another model than rank 0" in ranks.said()


def test_an_interrupt_of_one_rank_ends_all_with_a_checkpoint(nursery, recipe, tmp_path):
    settings = ["updates=1000", "checkpoint.every=1000", "evaluation.every=1000"]
    ranks = nursery.start("train", recipe, f"out={tmp_path}/run", *settings, size=2)
    wait_for_updates(tmp_path / "run", 2, ranks)
    os.kill(ranks.pids[1], signal.SIGINT)
    assert ranks.wait() == [130, 130]
    done = len(read_lines(tmp_path / "run/metrics.jsonl"))
    assert checkpoint.updates(tmp_path / "run/checkpoints") == [done]


def wait_for_updates(run: Path, count: int, ranks) -> None:
    metrics = run / "metrics.jsonl"
    ranks.until(lambda: ranks.code(0) is not None or len(read_lines(metrics)) >= count)
    assert ranks.code(0) is None, ranks.said()
