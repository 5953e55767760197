"""varibad_hyper.py run as a whole: every architecture and environment, its files, its messages, and that it learns."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import varibad_hyper
from hyperinit import FILM_SCHEMES, HYPER_SCHEMES
from varibad_hyper import Agent, Args, evaluate, main, make_envs, make_eval_envs, parse_args, seeds_of

ROOT = Path(__file__).parent.parent
MUJOCO = ["Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid"]
# Five iterations in seconds. 37 steps are not a whole number of episodes: meta-episodes go on over iterations.
SHORT = ["--num-envs", "4", "--num-steps", "37", "--total-timesteps", "740", "--learning-starts", "0", "--save-model"]
SHORT += ["--eval-interval", "2", "--num-minibatches", "2", "--eval-tasks", "3", "--no-cuda"]


def run(runs_dir, *flags):
    return main(parse_args([*SHORT, "--runs-dir", str(runs_dir), *flags]))


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def check_run(folder, flags):
    """Iterations ran, every parameter moved, losses are finite, tags and result.json are there and agree."""
    args = parse_args([*SHORT, *flags])
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

    torch.manual_seed(seeds_of(args)["torch"])
    envs = make_envs(args, 1)
    before = Agent(envs.obs_dim, envs.action_dim, envs.discrete, args)
    after = torch.load(folder / "model.pt", weights_only=True)["agent"]
    trained = [name for name, _ in before.named_parameters()]
    vae_updated = bool(tags.get("vae/elbo"))
    for name in trained:
        if name.startswith("policy") or vae_updated:
            assert not torch.equal(before.state_dict()[name], after[name]), f"{name} did not move"
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    return tags, result


@pytest.mark.parametrize(
    "arch, flag, init",
    [("hyper", "--init", init) for init in HYPER_SCHEMES]
    + [("film", "--init", init) for init in FILM_SCHEMES]
    + [("standard", "--base-init", init) for init in ("normc", "orthogonal", "kaiming")],
)
def test_every_architecture_and_initialisation(tmp_path, arch, flag, init):
    flags = ["--arch", arch, flag, init]
    folder = run(tmp_path, *flags)
    assert re.fullmatch(rf"Grid-World__varibad_hyper__{arch}-{init}__1__\d+", folder.name)
    tags, result = check_run(folder, flags)
    assert result["arch"] == arch and result["init"] == init
    assert {"vae/elbo", "vae/reward_loss", "vae/kl", "charts/meta_episodic_return"} <= tags.keys()
    assert (result["parameters"]["hypernetwork"] > 0) == (arch != "standard")
    # Grid-World's four episodes end together, so their means add up to the meta-episode's
    for step, value in tags["charts/meta_episodic_return"].items():
        if step in tags["charts/episodic_return_ep1"]:
            assert math.isfinite(value)


@pytest.mark.parametrize("env", MUJOCO)
def test_every_environment(tmp_path, env):
    flags = ["--env", env, "--num-steps", "37", "--vae-updates", "2"]
    folder = run(tmp_path, *flags)
    tags, _ = check_run(folder, flags)
    if env in ("Ant-Dir", "Humanoid"):  # random policies fall within 185 steps, so meta-episodes end
        assert {"vae/elbo", "vae/reward_loss", "charts/episodic_return"} <= tags.keys()


def test_walker_decodes_states_of_meta_episodes_of_different_lengths(tmp_path):
    flags = ["--env", "Walker", "--num-steps", "150", "--total-timesteps", "3000"]
    tags = scalars(run(tmp_path, *flags))
    assert {"vae/state_loss", "charts/episodic_return_ep1", "charts/episodic_return_ep2"} <= tags.keys()
    assert "vae/reward_loss" not in tags


def test_logged_returns_are_the_environments(tmp_path, monkeypatch):
    """The meta-episodic return of the log, against the rewards that the environments gave, in plain Python."""
    rewards = []
    step = varibad_hyper.MetaEpisodes.step

    def recording_step(self, actions):
        out = step(self, actions)
        if self.num_envs == 4:  # not the evaluation's
            rewards.append(out[1])
        return out

    monkeypatch.setattr(varibad_hyper.MetaEpisodes, "step", recording_step)
    tags = scalars(run(tmp_path, "--num-steps", "60", "--total-timesteps", "960"))
    for iteration in range(4):  # 60 steps: one meta-episode of four episodes of 15
        chunk = np.array(rewards[60 * iteration : 60 * iteration + 60])  # [60, 4]
        frames = 240 * (iteration + 1)
        assert tags["charts/meta_episodic_return"][frames] == pytest.approx(chunk.sum(0).mean(), rel=1e-5)
        for k in range(4):
            mean = chunk[15 * k : 15 * k + 15].sum(0).mean()
            assert tags[f"charts/episodic_return_ep{k + 1}"][frames] == pytest.approx(mean, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("env", ["Grid-World", "Walker"])
def test_same_seed_same_run_bit_for_bit_whatever_is_evaluated(tmp_path, env):
    flags = ["--env", env, "--num-steps", "80", "--total-timesteps", "1600"]
    models = []
    for name, extra in (("a", []), ("b", ["--eval-interval", "1"]), ("c", ["--seed", "2"])):
        folder = run(tmp_path / name, *flags, *extra)
        models.append(torch.load(folder / "model.pt", weights_only=True)["agent"])
    first, same, other = models
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("env, init", [("Grid-World", "bias"), ("Walker", "bias"), ("Cheetah-Dir", "kaiming")])
def test_first_ratio_of_every_update_is_one(tmp_path, monkeypatch, env, init):
    """The policy that is updated sees the inputs, normalised as they were, of the policy that acted."""
    logratios = []
    loss = varibad_hyper.policy_loss

    def recording_loss(logratio, *rest):
        logratios.append(logratio.detach().abs().max().item())
        return loss(logratio, *rest)

    monkeypatch.setattr(varibad_hyper, "policy_loss", recording_loss)
    run(tmp_path, "--env", env, "--init", init, "--num-minibatches", "1", "--update-epochs", "2")
    assert len(logratios) == 8  # 4 updates of 2 epochs
    assert max(logratios[0::2]) < 1e-4  # rounding, the batch has another size
    assert min(logratios[1::2]) > 1e-3  # and it would be noticed


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, name):
    calls = 0
    loss = getattr(varibad_hyper, name)

    def failing_loss(*inputs):
        nonlocal calls
        calls += 1
        return loss(*inputs) * (math.nan if calls > 4 else 1)  # 2 epochs x 2 minibatches: from the second update on

    monkeypatch.setattr(varibad_hyper, name, failing_loss)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 1
    assert f"losses/{name} is nan in iteration 3" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert list(scalars(folder)["charts/SPS"]) == [148, 296]  # what was logged before stays
    assert not (folder / "result.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def cli(*flags):
    command = [sys.executable, str(ROOT / "varibad_hyper.py"), *map(str, flags)]
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
    "empty layers": (["--base-layers"], "--base-layers"),
    "zero-width layer": (["--base-layers", "32", "0"], "--base-layers is 0"),
    "nothing to decode": (["--no-decode-reward"], "--decode-reward"),
    "no goals": (["--grid-size", "2", "--grid-goals", "far"], "--grid-size 2"),
    "missing model": (["--evaluate", "missing.pt"], "cannot read missing.pt"),
    "folder as model": (["--evaluate", str(ROOT)], "cannot read"),
    "not a model": (["--evaluate", str(ROOT / "README.md")], "is not a model"),
    "unwritable folder": (["--runs-dir", str(ROOT / "README.md")], "--runs-dir"),
}


@pytest.mark.parametrize("flags, words", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gets_one_sentence(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        main(parse_args(flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("flags", [["--env", "Mars"], ["--init", "zeros"], ["--total-timesteps", "2.5"], ["--bogus"]])
def test_bad_flags_are_refused_without_traceback(flags):
    result = cli(*flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr


def test_help_shows_the_preset_of_the_environment():
    for flags, kl_weight in (["--help", "--env", "Walker"], "10.0"), (["--help"], "0.25"):
        text = re.sub(r"[\s│]+", " ", cli(*flags).stdout)  # the box's lines, joined
        assert re.search(rf"--kl-weight FLOAT [^()]*\(default: {re.escape(kl_weight)}\)", text)


def test_bare_command_is_grid_world_with_bias_hyperinit():
    assert parse_args([]) == Args(env="Grid-World", arch="hyper", init="bias")


def test_env_without_a_name_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--env"])
    assert stop.value.code == 2


def test_flags_override_presets_and_frames_may_be_written_as_floats():
    args = parse_args(["--env=Walker", "--total-timesteps", "2e6", "--gamma", "0.5"])
    assert (args.total_timesteps, args.gamma, args.num_steps, args.latent_dim) == (2_000_000, 0.5, 200, 10)
    assert isinstance(args.total_timesteps, int)


def test_presets_are_the_references():
    """Reference section 3, a row per value: Grid-World, Cheetah-Dir, Walker, Ant-Dir, Humanoid."""
    rows = {
        "num_steps": (60, 400, 200, 200, 800),
        "gamma": (0.95, 0.97, 0.97, 0.97, 0.99),
        "gae_lambda": (0.95, 0.9, 0.9, 0.9, 0.9),
        "clip_coef": (0.05, 0.1, 0.05, 0.1, 0.1),
        "update_epochs": (2, 2, 2, 2, 4),
        "num_minibatches": (4, 4, 2, 1, 2),
        "ent_coef": (0.01, 0.01, 0.01, 0.01, 0.001),
        "base_layers": ((32, 32),) + 4 * ((128, 128),),
        "embedding_features": (25, 10, 10, 10, 10),
        "latent_dim": (5, 5, 10, 5, 10),
        "gru_hidden": (64, 128, 128, 128, 128),
        "action_embedding": (0, 16, 32, 16, 16),
        "state_embedding": (32, 32, 32, 32, 32),
        "reward_embedding": (8, 16, 32, 16, 16),
        "decode_reward": (True, True, False, True, True),
        "decode_state": (False, False, True, False, False),
        "decoder_layers": ((32, 32), (64, 32), (256, 128), (64, 32), (64, 32)),
        "vae_buffer": (100_000,) + 4 * (10_000,),
        "vae_batch": (25, 10, 10, 10, 10),
        "vae_updates": (3, 1, 1, 1, 10),
        "vae_subsample": (0, 50, 50, 50, 100),
        "kl_weight": (0.25, 1, 10, 1, 1),
        "episodes_per_task": (4, 1, 2, 1, 1),
    }
    for column, env in enumerate(["Grid-World", *MUJOCO]):
        args = parse_args(["--env", env])
        assert {name: getattr(args, name) for name in rows} == {name: row[column] for name, row in rows.items()}
        assert (args.num_envs, args.learning_rate, args.vae_learning_rate) == (16, 7e-4, 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Learning: a 3x3 grid, solved in about a minute


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    flags = ["--grid-size", "3", "--grid-horizon", "8", "--num-steps", "32", "--total-timesteps", "2.5e5"]
    flags += ["--learning-starts", "1000", "--save-model", "--no-cuda", "--runs-dir", tmp_path_factory.mktemp("runs")]
    return main(parse_args(list(map(str, flags))))


def known_goal_return(goal, horizon=8):
    """Of an episode that walks straight to the goal and stays: -0.1 for each step but those that end on the goal."""
    distance = sum(goal)
    return -0.1 * (distance - 1) + (horizon - distance + 1)


def load(folder):
    return varibad_hyper.load_model(str(folder / "model.pt"), "Grid-World")


def test_probe_learns_and_remembers(probe):
    evaluation = json.loads((probe / "result.json").read_text())["evaluation"]
    oracle = np.mean([known_goal_return((x, y)) for x in range(3) for y in range(3) if x or y])
    assert oracle == pytest.approx(6.625)
    first, fourth = evaluation["episodic_return_ep1"]["mean"], evaluation["episodic_return_ep4"]["mean"]
    assert fourth > 0.8 * oracle  # it walks to the goal that it found
    assert fourth <= oracle + 1e-9  # which no policy can beat
    assert fourth - first > 1.5  # and the first episode is spent on finding it
    assert evaluation["meta_episodic_return"]["mean"] >= 20


def test_probe_needs_its_task_embedding(probe, monkeypatch):
    """With the embeddings of other tasks, or an encoder that learns nothing from data, the return falls."""
    agent, args = load(probe)
    envs, seed = make_eval_envs(args), seeds_of(args)["eval_envs"]
    intact = evaluate(agent, envs, seed).sum(axis=1).mean()
    infer = Agent.infer
    monkeypatch.setattr(Agent, "infer", lambda self, *inputs: infer(self, *inputs).roll(1, dims=0))
    shuffled = evaluate(agent, envs, seed).sum(axis=1).mean()
    monkeypatch.setattr(Agent, "infer", lambda self, action, obs, reward, hidden: hidden)
    frozen = evaluate(agent, envs, seed).sum(axis=1).mean()
    assert max(shuffled, frozen) < 0.6 * intact


def test_saved_model_gives_the_returns_of_the_end_of_training(probe):
    evaluation = json.loads((probe / "result.json").read_text())["evaluation"]
    agent, args = load(probe)
    returns = evaluate(agent, make_eval_envs(args), seeds_of(args)["eval_envs"])
    assert returns.sum(axis=1).mean() == evaluation["meta_episodic_return"]["mean"]
    result = cli("--evaluate", probe / "model.pt")
    assert result.returncode == 0
    assert result.stdout.startswith(f"meta-episode return {evaluation['meta_episodic_return']['mean']:.2f} ")


def test_model_of_another_environment_is_refused(probe, capsys):
    with pytest.raises(SystemExit) as stop:
        main(parse_args(["--env", "Walker", "--evaluate", str(probe / "model.pt")]))
    assert stop.value.code == 2
    assert "add --env Grid-World" in capsys.readouterr().err


def test_damaged_model_is_refused(probe, tmp_path, capsys):
    damaged = tmp_path / "model.pt"
    damaged.write_bytes((probe / "model.pt").read_bytes()[:10_000])
    with pytest.raises(SystemExit) as stop:
        main(Args(evaluate=str(damaged)))
    assert stop.value.code == 2
    assert "is not a model" in capsys.readouterr().err
