"""The scripts run as a whole: every architecture and environment, their files, their messages, and that they learn."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import reproduce
import rl2_hyper
import varibad_hyper
from hyperinit import FILM_SCHEMES, HYPER_SCHEMES

both_scripts = pytest.mark.parametrize("script", [varibad_hyper, rl2_hyper], ids=lambda script: script.__name__)
ROOT = Path(__file__).parent.parent
MUJOCO = ["Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid"]
# Five iterations in seconds. 37 steps are not a whole number of episodes: meta-episodes go on over iterations.
SHORT = ["--num-envs", "4", "--num-steps", "37", "--total-timesteps", "740", "--learning-starts", "0", "--save-model"]
SHORT += ["--eval-interval", "2", "--num-minibatches", "2", "--eval-tasks", "3", "--no-cuda"]


def run(script, runs_dir, *flags):
    return script.main(script.parse_args([*SHORT, "--runs-dir", str(runs_dir), *flags]))


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def check_run(script, folder, flags):
    """Iterations ran, every parameter moved, losses are finite, tags and result.json are there and agree."""
    args = script.parse_args([*SHORT, *flags])
    result = json.loads((folder / "result.json").read_text())
    assert result["frames"] == 740 and result["env"] == args.env and result["args"]["seed"] == args.seed
    assert result["versions"].keys() == {"torch", "mujoco", "gymnasium"}
    assert result["wall_time"] > 0 and result["SPS"] == pytest.approx(740 / result["wall_time"])

    tags = scalars(folder)
    expected = {"policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"}
    expected = {f"losses/{name}" for name in expected} | {"charts/SPS", "charts/learning_rate"}
    expected |= {f"eval/{name}" for name in result["evaluation"]}
    assert expected <= tags.keys()
    iterations = [148 * i for i in range(1, 6)]
    assert list(tags["charts/SPS"]) == iterations
    assert list(tags["losses/policy_loss"]) == iterations[1:]  # the first iteration does not update
    assert list(tags["eval/meta_episodic_return"]) == [296, 592, 740]
    assert all(math.isfinite(value) for tag in tags if tag.startswith("losses/") for value in tags[tag].values())
    last = result["evaluation"]["meta_episodic_return"]
    assert tags["eval/meta_episodic_return"][740] == pytest.approx(last["mean"], rel=1e-6)
    assert last["count"] == (24 if args.env == "Grid-World" else 3)
    episodes = [result["evaluation"][f"episodic_return_ep{k + 1}"]["mean"] for k in range(args.episodes_per_task)]
    assert sum(episodes) == pytest.approx(last["mean"])
    assert result["eval_history"][-1] == [740, last["mean"]]

    torch.manual_seed(script.seeds_of(args)["torch"])
    before = script.Agent(script.make_envs(args, 1), args)
    after = torch.load(folder / "model.pt", weights_only=True)["agent"]
    for name, parameter in before.named_parameters():
        if tags.get("vae/elbo") or not name.startswith("vae."):  # no VAE update before a meta-episode has ended
            assert not torch.equal(parameter, after[name]), f"{name} did not move"
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    return tags, result


@both_scripts
@pytest.mark.parametrize(
    "arch, flag, init",
    [("hyper", "--init", init) for init in HYPER_SCHEMES]
    + [("film", "--init", init) for init in FILM_SCHEMES]
    + [("standard", "--base-init", init) for init in ("normc", "orthogonal", "kaiming")],
)
def test_every_architecture_and_initialisation(script, tmp_path, arch, flag, init):
    flags = ["--arch", arch, flag, init]
    folder = run(script, tmp_path, *flags)
    assert re.fullmatch(rf"Grid-World__{script.__name__}__{arch}-{init}__1__\d+", folder.name)
    tags, result = check_run(script, folder, flags)
    assert (result["script"], result["arch"], result["init"]) == (script.__name__, arch, init)
    assert "charts/meta_episodic_return" in tags
    assert ({"vae/elbo", "vae/reward_loss", "vae/kl"} <= tags.keys()) == (script is varibad_hyper)
    assert (result["parameters"]["hypernetwork"] > 0) == (arch != "standard")


@both_scripts
@pytest.mark.parametrize("env", MUJOCO)
def test_every_environment(script, tmp_path, env):
    flags = ["--env", env, "--num-steps", "37"]
    folder = run(script, tmp_path, *flags)
    tags, _ = check_run(script, folder, flags)
    if env in ("Ant-Dir", "Humanoid"):  # random policies fall within 185 steps, so meta-episodes end
        assert "charts/episodic_return" in tags
        assert (script is rl2_hyper) or {"vae/elbo", "vae/reward_loss"} <= tags.keys()


def test_walker_decodes_states_of_meta_episodes_of_different_lengths(tmp_path):
    flags = ["--env", "Walker", "--num-steps", "150", "--total-timesteps", "3000"]
    tags = scalars(run(varibad_hyper, tmp_path, *flags))
    assert {"vae/state_loss", "charts/episodic_return_ep1", "charts/episodic_return_ep2"} <= tags.keys()
    assert "vae/reward_loss" not in tags


@both_scripts
def test_logged_returns_are_the_environments(script, tmp_path, monkeypatch):
    """The meta-episodic return of the log, against the rewards that the environments gave, in plain Python."""
    rewards = []
    step = script.MetaEpisodes.step

    def recording_step(self, actions):
        out = step(self, actions)
        if self.num_envs == 4:  # not the evaluation's
            rewards.append(out[1])
        return out

    monkeypatch.setattr(script.MetaEpisodes, "step", recording_step)
    tags = scalars(run(script, tmp_path, "--num-steps", "60", "--total-timesteps", "960"))
    for iteration in range(4):  # 60 steps: one meta-episode of four episodes of 15
        chunk = np.array(rewards[60 * iteration : 60 * iteration + 60])  # [60, 4]
        frames = 240 * (iteration + 1)
        assert tags["charts/meta_episodic_return"][frames] == pytest.approx(chunk.sum(0).mean(), rel=1e-5)
        for k in range(4):
            mean = chunk[15 * k : 15 * k + 15].sum(0).mean()
            assert tags[f"charts/episodic_return_ep{k + 1}"][frames] == pytest.approx(mean, rel=1e-5, abs=1e-6)


@both_scripts
@pytest.mark.parametrize("env", ["Grid-World", "Walker"])
def test_same_seed_same_run_bit_for_bit_whatever_is_evaluated(script, tmp_path, env):
    flags = ["--env", env, "--num-steps", "80", "--total-timesteps", "1600"]
    models = []
    for name, extra in (("a", []), ("b", ["--eval-interval", "1"]), ("c", ["--seed", "2"])):
        folder = run(script, tmp_path / name, *flags, *extra)
        models.append(torch.load(folder / "model.pt", weights_only=True)["agent"])
    first, same, other = models
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@both_scripts
@pytest.mark.parametrize("env, init", [("Grid-World", "bias"), ("Walker", "bias"), ("Cheetah-Dir", "kaiming")])
def test_first_ratio_of_every_update_is_one(script, tmp_path, monkeypatch, env, init):
    """The policy that is updated sees the inputs, normalised as they were, of the policy that acted.

    For RL2 also: the beliefs that the update computes again, over parts of meta-episodes, are those of the rollout.
    """
    logratios = []
    loss = script.policy_loss

    def recording_loss(logratio, *rest):
        logratios.append(logratio.detach().abs().max().item())
        return loss(logratio, *rest)

    monkeypatch.setattr(script, "policy_loss", recording_loss)
    run(script, tmp_path, "--env", env, "--init", init, "--num-minibatches", "1", "--update-epochs", "2")
    assert len(logratios) == 8  # 4 updates of 2 epochs
    assert max(logratios[0::2]) < 1e-4  # rounding, the batch has another size
    assert min(logratios[1::2]) > 1e-3  # and it would be noticed


@pytest.mark.parametrize("env, num_steps", [("Grid-World", 37), ("Ant-Dir", 150)])
def test_running_meta_episodes_are_encoded_again(tmp_path, monkeypatch, env, num_steps):
    """While the encoder does not change, encoding them again at the start of a rollout changes no belief."""
    beliefs = []  # before and after every step
    update = varibad_hyper.Agent.update_belief

    def recording_update(self, belief, *inputs):
        after = update(self, belief, *inputs)
        if len(belief) == 4:  # not the evaluation's
            beliefs.append((belief.clone(), after.clone()))
        return after

    monkeypatch.setattr(varibad_hyper.Agent, "update_belief", recording_update)
    flags = f"--num-steps {num_steps} --total-timesteps {4 * num_steps * 5} --learning-starts 100000 --eval-interval 0"
    run(varibad_hyper, tmp_path, "--env", env, *flags.split())
    carried_on = 0
    for i in range(1, 5):
        (_, last), (first, _) = beliefs[i * num_steps - 1], beliefs[i * num_steps]
        for before, after in zip(last, first, strict=True):
            if after.any():  # not a new task, whose belief is the prior's, 0
                torch.testing.assert_close(after, before)
                carried_on += 1
    assert carried_on >= 8


@both_scripts
@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_loss_that_is_not_finite_stops_the_run(script, tmp_path, monkeypatch, capsys, name):
    calls = 0
    loss = getattr(script, name)

    def failing_loss(*inputs):
        nonlocal calls
        calls += 1
        return loss(*inputs) * (math.nan if calls > 4 else 1)  # 2 epochs x 2 minibatches: from the second update on

    monkeypatch.setattr(script, name, failing_loss)
    with pytest.raises(SystemExit) as stop:
        run(script, tmp_path)
    assert stop.value.code == 1
    assert f"losses/{name} is nan in iteration 3" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert list(scalars(folder)["charts/SPS"]) == [148, 296]  # what was logged before stays
    assert not (folder / "result.json").exists()


@both_scripts
@pytest.mark.parametrize("iterations", [2, 5])  # with 2 the fault is in the last one, and no rollout follows
def test_an_agent_that_is_not_finite_stops_the_run(script, iterations, tmp_path, capsys):
    """A step that finite losses asked for, but that left nothing to go on with."""
    flags = f"--learning-rate 1e37 --num-minibatches 1 --update-epochs 1 --total-timesteps {148 * iterations}"
    with pytest.raises(SystemExit) as stop:
        run(script, tmp_path, *flags.split())
    assert stop.value.code == 1
    assert "error: the agent is no longer finite after the update in iteration 2" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert list(scalars(folder)["charts/SPS"]) == [148] and not (folder / "result.json").exists()


@both_scripts
def test_runs_that_begin_in_the_same_second_have_their_own_folders(script, tmp_path, monkeypatch):
    start = time.time()
    folders = []
    for _ in range(3):
        clock = iter(range(10**6))
        monkeypatch.setattr(script.time, "time", lambda clock=clock: start + 1e-3 * next(clock))
        folders.append(run(script, tmp_path))
    assert len(set(folders)) == 3 and all((folder / "result.json").exists() for folder in folders)


@both_scripts
def test_finite_tasks_are_evaluated_equally_often(script):
    for env, count in ("Grid-World", 24), ("Cheetah-Dir", 6):
        args = script.parse_args(["--env", env, "--eval-tasks", "6"])
        envs = script.make_eval_envs(args)
        tasks = []
        reset = envs.envs.reset
        envs.envs.reset = lambda *, seed=None, options=None, reset=reset, tasks=tasks: (
            tasks.append((options or {}).get("tasks")) or reset(seed=seed, options=options)
        )
        script.evaluate(script.Agent(envs, args), envs, seed=0)
        first = [tuple(task) for task in tasks[0]]
        assert len(first) == count and {first.count(task) for task in first} == {count // len(envs.all_tasks)}


@both_scripts
@pytest.mark.parametrize("flags, noted", [(["--total-timesteps", "148"], True), ([], False)])
def test_runs_too_short_to_learn_are_noted(script, tmp_path, capsys, flags, noted):
    run(script, tmp_path, *flags)
    assert ("note: nothing is learned" in capsys.readouterr().out) == noted


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def cli(script, *flags):
    command = [sys.executable, script.__file__, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


BAD_INPUT = {
    "sizes that do not divide": (["--num-minibatches", "7"], "--num-minibatches 7"),
    "under one iteration": (["--total-timesteps", "100"], "--total-timesteps 100"),
    "film without weights": (["--arch", "film", "--init", "hfi"], "bias, kaiming, normc, orthogonal"),
    "standard without head": (["--arch", "standard", "--init", "weight"], "--base-init"),
    "standard without hypernetwork": (["--arch", "standard", "--hyper-layers", "8"], "--hyper-layers"),
    "negative": (["--learning-rate", "-1"], "--learning-rate is -1.0"),
    "zero environments": (["--num-envs", "0"], "--num-envs is 0"),
    "not a number": (["--gamma", "nan"], "--gamma is nan"),
    "gamma over one": (["--gamma", "1.5"], "at most 1"),
    "no threads": (["--torch-threads", "0"], "--torch-threads is 0"),
    "no threads to evaluate": (["--torch-threads", "0", "--evaluate", "missing.pt"], "--torch-threads is 0"),
    "too many threads": (["--torch-threads", "3000000000"], "at most 1024"),
    "beyond float32": (["--norm-clip", "1e39"], "--norm-clip is 1e+39"),
    "too large a network": (["--latent-dim", "99999999999999999999"], "of these sizes"),
    "one evaluation task": (["--eval-tasks", "1"], "--eval-tasks 1"),
    "one frame": (["--num-envs", "1", "--num-steps", "1", "--num-minibatches", "1"], "single frame"),
    "empty layers": (["--base-layers"], "--base-layers"),
    "too many workers": (["--env-workers", "2000"], "at most 1024"),
    "zero-width layer": (["--base-layers", "32", "0"], "--base-layers is 0"),
    "no bias and nothing else": (["--no-hyper-bias"], "--init weight"),
    "no bias without hypernetwork": (["--no-hyper-bias", "--arch", "film", "--init", "normc"], "--arch hyper"),
    "no goals": (["--grid-size", "2", "--grid-goals", "far"], "--grid-size 2"),
    "missing model": (["--evaluate", "missing.pt"], "cannot read missing.pt"),
    "folder as model": (["--evaluate", str(ROOT)], "cannot read"),
    "not a model": (["--evaluate", str(ROOT / "README.md")], "is not a model"),
    "unwritable folder": (["--runs-dir", str(ROOT / "README.md")], "--runs-dir"),
}


@both_scripts
@pytest.mark.parametrize("flags, words", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gets_one_sentence(script, capsys, flags, words):
    refused(script, capsys, flags, words)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no-decode-reward"], "--decode-reward"),
        (["--decoder-layers"], "--decoder-layers"),
        (["--embedding", "one-hot", "--env", "Walker"], "not for Walker"),
        (["--vae-buffer", "1e12"], "--vae-buffer 1000000000000"),
        (["--vae-buffer", "1e18"], "--vae-buffer 1000000000000000000"),
    ],
)
def test_bad_input_of_varibad_gets_one_sentence(capsys, flags, words):
    refused(varibad_hyper, capsys, flags, words)


def refused(script, capsys, flags, words):
    """Exit status 2, and one sentence on stderr, nothing else."""
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("flags", [["--env", "Mars"], ["--init", "zeros"], ["--total-timesteps", "2.5"], ["--bogus"]])
def test_bad_flags_are_refused_without_traceback(flags):
    result = cli(rl2_hyper, *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr


def test_help_shows_the_preset_of_the_environment():
    for flags, kl_weight in (["--help", "--env", "Walker"], "10.0"), (["--help"], "0.25"):
        text = re.sub(r"[\s│]+", " ", cli(varibad_hyper, *flags).stdout)  # the box's lines, joined
        assert re.search(rf"--kl-weight FLOAT [^()]*\(default: {re.escape(kl_weight)}\)", text)


@both_scripts
def test_bare_command_is_grid_world_with_bias_hyperinit(script):
    assert script.parse_args([]) == script.Args(env="Grid-World", arch="hyper", init="bias")


@both_scripts
def test_env_without_a_name_is_refused(script):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--env"])
    assert stop.value.code == 2


def test_flags_override_presets_and_frames_may_be_written_as_floats():
    args = varibad_hyper.parse_args(["--env=Walker", "--total-timesteps", "2e6", "--gamma", "0.5"])
    assert (args.total_timesteps, args.gamma, args.num_steps, args.latent_dim) == (2_000_000, 0.5, 200, 10)
    assert isinstance(args.total_timesteps, int)


SHARED_PRESETS = {  # a row per value: Grid-World, Cheetah-Dir, Walker, Ant-Dir, Humanoid
    "gamma": (0.95, 0.97, 0.97, 0.97, 0.99),
    "gae_lambda": (0.95, 0.9, 0.9, 0.9, 0.9),
    "ent_coef": (0.01, 0.01, 0.01, 0.01, 0.001),
    "embedding_features": (25, 10, 10, 10, 10),
    "gru_hidden": (64, 128, 128, 128, 128),
    "action_embedding": (0, 16, 32, 16, 16),
    "state_embedding": (32, 32, 32, 32, 32),
    "reward_embedding": (8, 16, 32, 16, 16),
    "episodes_per_task": (4, 1, 2, 1, 1),
    "num_envs": (16, 16, 16, 16, 16),
    "learning_rate": (7e-4, 7e-4, 7e-4, 7e-4, 7e-4),
}
PRESETS = {
    varibad_hyper: {
        "num_steps": (60, 400, 200, 200, 800),
        "clip_coef": (0.05, 0.1, 0.05, 0.1, 0.1),
        "update_epochs": (2, 2, 2, 2, 4),
        "num_minibatches": (4, 4, 2, 1, 2),
        "base_layers": ((32, 32),) + 4 * ((128, 128),),
        "latent_dim": (5, 5, 10, 5, 10),
        "decode_reward": (True, True, False, True, True),
        "decode_state": (False, False, True, False, False),
        "decoder_layers": ((32, 32), (64, 32), (256, 128), (64, 32), (64, 32)),
        "vae_learning_rate": (1e-3, 1e-3, 1e-3, 1e-3, 1e-3),
        "vae_buffer": (100_000,) + 4 * (10_000,),
        "vae_batch": (25, 10, 10, 10, 10),
        "vae_updates": (3, 1, 1, 1, 10),
        "vae_subsample": (0, 50, 50, 50, 100),
        "kl_weight": (0.25, 1, 10, 1, 1),
    },
    rl2_hyper: {
        "num_steps": (60, 200, 200, 200, 200),
        "clip_coef": (0.05, 0.1, 0.05, 0.05, 0.05),
        "update_epochs": (2, 2, 2, 2, 2),
        "num_minibatches": (4, 4, 4, 4, 4),
        "base_layers": ((32,),) + 4 * ((128,),),
        "latent_dim": (32,) + 4 * (128,),
    },
}


@both_scripts
def test_presets_are_the_references(script):
    rows = SHARED_PRESETS | PRESETS[script]
    for column, env in enumerate(["Grid-World", *MUJOCO]):
        args = script.parse_args(["--env", env])
        assert {name: getattr(args, name) for name in rows} == {name: row[column] for name, row in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a 3x3 grid, solved in about a minute


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    flags = ["--grid-size", "3", "--grid-horizon", "8", "--num-steps", "32", "--total-timesteps", "2.5e5"]
    flags += ["--learning-starts", "1000", "--save-model", "--no-cuda", "--runs-dir", tmp_path_factory.mktemp("runs")]
    return varibad_hyper.main(varibad_hyper.parse_args(list(map(str, flags))))


def known_goal_return(goal, horizon=8):
    """Of an episode that walks straight to the goal and stays: -0.1 for each step but those that end on the goal."""
    distance = sum(goal)
    return -0.1 * (distance - 1) + (horizon - distance + 1)


def load(folder):
    return varibad_hyper.load_model(str(folder / "model.pt"), "Grid-World")


@pytest.mark.slow
def test_probe_learns_and_remembers(probe):
    evaluation = json.loads((probe / "result.json").read_text())["evaluation"]
    oracle = np.mean([known_goal_return((x, y)) for x in range(3) for y in range(3) if x or y])
    assert oracle == pytest.approx(6.625)
    first, fourth = evaluation["episodic_return_ep1"]["mean"], evaluation["episodic_return_ep4"]["mean"]
    assert fourth > 0.8 * oracle  # it walks to the goal that it found
    assert fourth <= oracle + 1e-9  # which no policy can beat
    assert fourth - first > 1.5  # and the first episode is spent on finding it
    assert evaluation["meta_episodic_return"]["mean"] >= 20


@pytest.mark.slow
def test_probe_needs_its_task_embedding(probe, monkeypatch):
    """With the embeddings of other tasks, or an encoder that learns nothing from data, the return falls."""
    agent, args, envs = load(probe)
    seed = varibad_hyper.seeds_of(args)["eval_envs"]
    intact = varibad_hyper.evaluate(agent, envs, seed)[0].sum(axis=1).mean()
    embedding = type(agent).embedding
    monkeypatch.setattr(type(agent), "embedding", lambda self, belief: embedding(self, belief.roll(1, dims=0)))
    shuffled = varibad_hyper.evaluate(agent, envs, seed)[0].sum(axis=1).mean()
    monkeypatch.setattr(type(agent), "embedding", lambda self, belief: embedding(self, 0 * belief))
    frozen = varibad_hyper.evaluate(agent, envs, seed)[0].sum(axis=1).mean()
    assert max(shuffled, frozen) < 0.6 * intact


@pytest.mark.slow
def test_saved_model_gives_the_returns_of_the_end_of_training(probe):
    evaluation = json.loads((probe / "result.json").read_text())["evaluation"]
    agent, args, envs = load(probe)
    seed = varibad_hyper.seeds_of(args)["eval_envs"]
    returns, _ = varibad_hyper.evaluate(agent, envs, seed)
    assert returns.sum(axis=1).mean() == evaluation["meta_episodic_return"]["mean"]
    result = cli(varibad_hyper, "--evaluate", probe / "model.pt")
    assert result.returncode == 0
    assert result.stdout.startswith(f"meta-episode return {evaluation['meta_episodic_return']['mean']:.2f} ")


@pytest.mark.slow
def test_model_of_another_environment_is_refused(probe, capsys):
    refused(varibad_hyper, capsys, ["--env", "Walker", "--evaluate", str(probe / "model.pt")], "add --env Grid-World")


@pytest.mark.slow
def test_model_of_another_script_is_refused(probe, capsys):
    refused(rl2_hyper, capsys, ["--evaluate", str(probe / "model.pt")], "is not a model of rl2_hyper.py")


@pytest.mark.slow
def test_damaged_model_is_refused(probe, tmp_path, capsys):
    damaged = tmp_path / "model.pt"
    damaged.write_bytes((probe / "model.pt").read_bytes()[:10_000])
    refused(varibad_hyper, capsys, ["--evaluate", str(damaged)], "is not a model of varibad_hyper.py")


@pytest.mark.parametrize("env", MUJOCO)
def test_saved_rl2_gives_the_returns_of_the_end_of_training(tmp_path, env):
    folder = run(rl2_hyper, tmp_path, "--env", env)
    agent, args, envs = rl2_hyper.load_model(str(folder / "model.pt"), env)
    returns, _ = rl2_hyper.evaluate(agent, envs, rl2_hyper.seeds_of(args)["eval_envs"])
    evaluation = json.loads((folder / "result.json").read_text())["evaluation"]
    assert returns.sum(axis=1).mean() == evaluation["meta_episodic_return"]["mean"]


# ---------------------------------------------------------------------------------------------------------------------
# README


@pytest.mark.slow
def test_readme_lists_the_tags(probe, tmp_path):
    """Every tag that is logged, and no other."""
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^\| `((?:charts|losses|vae|eval|test)/[^`]+)`", readme, re.MULTILINE))
    walker = run(varibad_hyper, tmp_path, "--env", "Walker", "--num-steps", "150", "--total-timesteps", "3000")
    ml10 = run(
        rl2_hyper, tmp_path, "--env", "ML10", "--num-envs", "2", "--num-steps", "600", "--total-timesteps", "2400"
    )
    logged = {re.sub(r"ep\d$", "ep{k}", tag) for folder in (probe, walker, ml10) for tag in scalars(folder)}
    logged = {re.sub(r"/[a-z-]+-v3/.*", "/{class}/{name}", tag) for tag in logged}
    assert logged == listed


def test_readme_names_only_flags_that_exist():
    readme = (ROOT / "README.md").read_text()
    flags = set(re.findall(r"(--[a-z][a-z-]+)", readme)) - {"--logdir", "--dist", "--help"}
    added = re.findall(r"^\+    (\w+): ", readme, re.M)  # by the diffs of "Change it"
    of_show = ["picture", "video", "task", "width", "every"]
    names = [*varibad_hyper.Args.__dataclass_fields__, *reproduce.Args.__dataclass_fields__, *of_show, *added]
    fields = {f"--{name.replace('_', '-')}" for name in names}
    assert {re.sub("^--no-", "--", flag) for flag in flags} <= fields


def test_readme_gives_the_results_that_are_kept():
    """Returns by seed and their mean, against results/*.json, for every row and for every file."""
    rows = re.findall(
        r"^\| `python (\S+?)\.py([^`]*)` \| ([\d, ]+) \| ([-\d., ]+) \| ([-\d.]+) \|",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    assert rows
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json"))]
    told = 0
    for script, flags, seeds, returns, mean in rows:
        wanted = {"varibad_hyper": varibad_hyper, "rl2_hyper": rl2_hyper}[script].parse_args(flags.split())
        of_row = {}
        for result in results:
            names = ("env", "arch", "init", "embedding", "hyper_bias", "vae_updates")
            kept = choices(result["args"], names)
            if result["script"] == script and kept == choices(vars(wanted), names):
                of_row[result["seed"]] = result["evaluation"]["meta_episodic_return"]["mean"]
        assert [str(seed) for seed in sorted(of_row)] == seeds.split(", ")
        assert [f"{of_row[seed]:.2f}" for seed in sorted(of_row)] == returns.split(", ")
        assert f"{np.mean(list(of_row.values())):.2f}" == mean
        told += len(of_row)
    assert told == len(results)


def choices(values, names):
    return {name: values.get(name, {"embedding": "posterior", "hyper_bias": True}.get(name)) for name in names}
