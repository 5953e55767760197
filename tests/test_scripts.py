"""The scripts run as a whole: every architecture and environment, their files, their messages, and that they learn."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gridworld
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
    assert result["frames"] == 740 and result["args"]["env"] == args.env and result["args"]["seed"] == args.seed
    assert result["versions"].keys() == {"torch", "mujoco", "gymnasium"}
    assert result["commit"] == script.script_commit() and result["script"] == script.__name__
    assert result["wall_time"] > 0 and result["SPS"] == pytest.approx(740 / result["wall_time"])

    tags = scalars(folder)
    expected = {"policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"}
    expected = {f"losses/{name}" for name in expected} | {"charts/SPS", "charts/learning_rate"}
    expected |= {f"eval/{name}" for name in result["evaluation"]}
    assert expected <= tags.keys()
    iterations = [148 * i for i in range(1, 6)]
    assert list(tags["charts/SPS"]) == iterations
    assert list(tags["losses/policy_loss"]) == iterations[1:]  # the first iteration does not update
    assert ("charts/episodic_length" in tags) == ("charts/meta_episodic_return" in tags)  # where meta-episodes ended
    assert list(tags["eval/meta_episodic_return"]) == [0, 296, 592, 740]  # the first before training
    assert all(math.isfinite(value) for tag in tags if tag.startswith("losses/") for value in tags[tag].values())
    last = result["evaluation"]["meta_episodic_return"]
    assert tags["eval/meta_episodic_return"][740] == pytest.approx(last["mean"], rel=1e-6)
    assert last["count"] == (24 if args.env == "Grid-World" else 3)
    episodes = [result["evaluation"][f"episodic_return_ep{k + 1}"]["mean"] for k in range(args.episodes_per_task)]
    assert sum(episodes) == pytest.approx(last["mean"])
    assert result["eval_history"][-1] == [740, last["mean"]]
    history = dict(result["eval_history"])
    assert list(history) == [0, 296, 592, 740] and history == pytest.approx(tags["eval/meta_episodic_return"], rel=1e-6)

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
    assert (result["script"], result["args"]["arch"]) == (script.__name__, arch)
    assert "charts/meta_episodic_return" in tags
    assert ({"vae/elbo", "vae/reward_loss", "vae/kl"} <= tags.keys()) == (script is varibad_hyper)
    assert (result["parameters"]["hypernetwork"] > 0) == (arch != "standard")


@both_scripts
@pytest.mark.parametrize("env", MUJOCO)
def test_every_environment(script, tmp_path, env, monkeypatch):
    monkeypatch.setattr(script.MujocoVectorEnv, "horizon", 40)  # so that meta-episodes end everywhere
    flags = ["--env", env, "--num-steps", "37"]
    folder = run(script, tmp_path, *flags)
    tags, _ = check_run(script, folder, flags)
    assert "charts/episodic_return" in tags
    assert script is rl2_hyper or {"vae/elbo", "vae/kl"} <= tags.keys()


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
            rewards.append(out.rewards)
        return out

    monkeypatch.setattr(script.MetaEpisodes, "step", recording_step)
    tags = scalars(run(script, tmp_path, "--num-steps", "60", "--total-timesteps", "960"))
    assert set(tags["charts/episodic_length"].values()) == {15}
    for iteration in range(4):  # 60 steps: one meta-episode of four episodes of 15
        chunk = np.array(rewards[60 * iteration : 60 * iteration + 60])  # [60, 4]
        frames = 240 * (iteration + 1)
        assert tags["charts/meta_episodic_return"][frames] == pytest.approx(chunk.sum(0).mean(), rel=1e-5)
        assert tags["charts/episodic_return"][frames] == pytest.approx(chunk.sum(0).mean() / 4, rel=1e-5)
        for k in range(4):
            mean = chunk[15 * k : 15 * k + 15].sum(0).mean()
            assert tags[f"charts/episodic_return_ep{k + 1}"][frames] == pytest.approx(mean, rel=1e-5, abs=1e-6)


@both_scripts
def test_logged_lengths_are_the_environments(script, tmp_path, monkeypatch):
    """Walker falls: its episodes end at different times. Counted in plain Python, by the flag and the task's end."""
    step, running, expected = script.MetaEpisodes.step, [[] for _ in range(4)], {}

    def counting_step(self, actions):
        out = step(self, actions)
        if self.num_envs == 4:  # not the evaluation's
            calls.append(None)
            for i in range(4):
                running[i].append(out.next_obs[i, -1])  # 1 where the episode ended
                if out.dones[i]:
                    assert sum(running[i]) == 2 and running[i][-1] == 1
                    lengths = expected.setdefault(600 * math.ceil(len(calls) / 150), [])
                    lengths.append(len(running[i]) / 2)  # the mean of the two
                    running[i].clear()
        return out

    calls = []
    monkeypatch.setattr(script.MetaEpisodes, "step", counting_step)
    flags = ["--env", "Walker", "--num-steps", "150", "--total-timesteps", "2400", "--eval-interval", "0"]
    logged = scalars(run(script, tmp_path, *flags))["charts/episodic_length"]
    assert len(calls) == 600 and len({length for lengths in expected.values() for length in lengths}) > 4
    assert logged == pytest.approx({frames: np.mean(lengths) for frames, lengths in expected.items()})


@both_scripts
@pytest.mark.parametrize("env", ["Grid-World", "Walker"])
def test_same_seed_same_run_bit_for_bit_whatever_is_evaluated(script, tmp_path, env):
    flags = ["--env", env, "--num-steps", "80", "--total-timesteps", "1600", "--eval-tasks", "2"]
    models, histories = [], []
    for extra in [], ["--eval-interval", "1"], ["--eval-interval", "0"], ["--seed", "2"]:
        folder = run(script, tmp_path / str(len(models)), *flags, *extra)
        models.append(torch.load(folder / "model.pt", weights_only=True)["agent"])
        histories.append(dict(json.loads((folder / "result.json").read_text())["eval_history"]))
    first, *same, other = models
    assert all(torch.equal(first[name], model[name]) for name in first for model in same)
    assert [list(history) for history in histories[:3]] == [[0, 640, 1280, 1600], list(range(0, 1601, 320)), [1600]]
    assert all(histories[1][frames] == value for history in histories[:3] for frames, value in history.items())
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
def test_encoding_again_is_carrying_on(tmp_path, monkeypatch, env, num_steps):
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
    error = capsys.readouterr().err
    first = "policy_loss"  # of the losses that are not finite: one spoils all others in the next minibatch
    assert f"error: losses/{first} is not finite: the run was stopped after iteration 2, the last good" in error
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
    assert (
        "error: the agent is not finite: the run was stopped after iteration 1, the last good"
        in capsys.readouterr().err
    )
    (folder,) = tmp_path.iterdir()
    assert list(scalars(folder)["charts/SPS"]) == [148] and not (folder / "result.json").exists()


@both_scripts
def test_exp_name_is_in_the_name_of_the_folder(script, tmp_path):
    folder = run(script, tmp_path, "--exp-name", "wide", "--arch", "standard", "--base-init", "kaiming", "--seed", "3")
    assert re.fullmatch(rf"Grid-World__{script.__name__}__wide__standard-kaiming__3__\d+", folder.name)
    assert json.loads((folder / "result.json").read_text())["args"]["exp_name"] == "wide"


@both_scripts
def test_a_thread_gets_the_same_run(script, tmp_path):
    """In a notebook's thread, say, where no signals can be handled."""
    folders = [run(script, tmp_path / "main")]
    thread = threading.Thread(target=lambda: folders.append(run(script, tmp_path / "thread")))
    thread.start()
    thread.join()
    models = [torch.load(folder / "model.pt", weights_only=True)["agent"] for folder in folders]
    assert len(models) == 2 and all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert all((folder / "result.json").exists() for folder in folders)


@both_scripts
def test_a_run_that_fails_at_its_first_checkpoint_leaves_the_handlers(script, tmp_path, monkeypatch):
    """After later failures, and after the end, too: test_resume.py, and conftest.py after every test."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", full_disk)
    with pytest.raises(SystemExit) as stop:
        run(script, tmp_path)
    assert stop.value.code == 1
    assert [signal.getsignal(number) for number in numbers] == before


@both_scripts
@pytest.mark.parametrize("env, sizes", [("Grid-World", (3, 5, 60)), ("Walker", (18, 6, 400))])
def test_first_lines_say_what_is_trained(script, env, sizes, tmp_path, capsys):
    """Three lines, then one for every evaluation."""
    folder = run(script, tmp_path, "--env", env, "--num-steps", "37", "--init", "hfi", "--seed", "3")
    first, second, third, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{env}, hyper-hfi, seed 3: 5 iterations of 4 x 37 = 148 frames on cpu"
    result = json.loads((folder / "result.json").read_text())
    total, hyper, base = (result["parameters"][name] for name in ("total", "hypernetwork", "base_network"))
    assert second == (
        "observation {}, action {}, {} steps a task; ".format(*sizes)
        + f"{total:,} parameters, hypernetwork {hyper:,}; base network {base:,}"
    )
    assert third == f"run folder: {folder}"
    assert [line.partition(" frames: meta-episode return ")[0] for line in lines[:4]] == ["0", "296", "592", "740"]
    for line, (_, mean) in zip(lines, result["eval_history"], strict=False):
        assert f"return {mean:.2f} +- " in line
    assert lines[4].startswith("finished: ")


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
        assert len(script.evaluate(script.Agent(envs, args), envs, seed=0)) == count
        first = [tuple(task) for task in tasks[0]]
        assert len(first) == count and {first.count(task) for task in first} == {count // len(envs.all_tasks)}


@both_scripts
@pytest.mark.parametrize("flags, noted", [(["--total-timesteps", "148"], True), ([], False)])
def test_runs_too_short_to_learn_are_noted(script, tmp_path, capsys, flags, noted):
    run(script, tmp_path, *flags)
    assert ("note: the policy does not learn" in capsys.readouterr().out) == noted


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def command(words, **options):
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)


def cli(script, *flags):
    return command([sys.executable, script.__file__, *map(str, flags)])


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
    "no threads": (["--threads", "0"], "--threads is 0"),
    "too many threads": (["--threads", "3000000000"], "at most 1024"),
    "beyond float32": (["--reward-clip", "1e39"], "--reward-clip is 1e+39"),
    "too large a number": (["--latent-dim", "99999999999999999999"], "at most 1e+12"),
    "no use of f": (["--init", "hfi", "--base-init", "orthogonal"], "--base-init changes nothing with --init hfi"),
    "one evaluation task": (["--eval-tasks", "1"], "--eval-tasks 1"),
    "empty layers": (["--base-layers"], "--base-layers"),
    "zero-width layer": (["--base-layers", "32", "0"], "--base-layers is 0"),
    "no bias and nothing else": (["--no-hyper-bias"], "choose another --init"),
    "no bias without hypernetwork": (["--no-hyper-bias", "--arch", "film", "--init", "normc"], "--arch hyper"),
    "no goals": (["--grid-size", "1"], "--grid-size 1 leaves no cell"),
    "no far goals": (["--grid-size", "2", "--grid-goals", "far"], "--grid-size 2 leaves no cell"),
    "missing model": (["--evaluate", "missing.pt"], "cannot read missing.pt"),
    "folder as model": (["--evaluate", str(ROOT)], "cannot read"),
    "not a model": (["--evaluate", str(ROOT / "README.md")], "README.md is damaged, or not of this version"),
    "no run": (["--resume", str(ROOT)], "cannot read"),
    "too long a name of a model": (["--evaluate", "9" * 300], "9" * 300),
    "too long a name of a run": (["--exp-name", "9" * 300], "(File name too long)"),
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


@both_scripts
@pytest.mark.parametrize("init", HYPER_SCHEMES)
def test_base_init_is_refused_only_where_it_changes_nothing(script, init, capsys):
    several = [script.parse_args(["--init", init, "--base-init", name]) for name in ("normc", "orthogonal")]
    initial = []
    for args in several:
        torch.manual_seed(0)
        initial.append(script.Agent(script.make_envs(args, 2), args).policy.state_dict())
    if all(torch.equal(values, initial[1][name]) for name, values in initial[0].items()):
        with pytest.raises(SystemExit):
            script.check_args(several[1])
    else:
        script.check_args(several[1])


@pytest.mark.parametrize("flags", [["--env", "Mars"], ["--init", "zeros"], ["--num-envs", "2.5"], ["--bogus"]])
def test_bad_flags_are_refused_without_traceback(flags):
    result = cli(rl2_hyper, *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr


@both_scripts
@pytest.mark.parametrize("flags", ["--compile", "--torch-threads 2", "--norm-clip 10", "--env-workers 2"])
def test_flags_of_earlier_versions_are_refused(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(flags.split()))
    assert stop.value.code == 2
    assert f"Unrecognized options: {flags.replace(' ', ', ')}" in capsys.readouterr().err


def help_of(script, *flags):
    """The text of --help by group of flags, without the boxes' lines."""
    shown = command([sys.executable, script.__file__, *flags, "--help"], env=os.environ | {"PYTHONUTF8": "1"})
    assert shown.returncode == 0
    _, *parts = re.split(r"╭─ ([\w ]*)options ─+╮", shown.stdout)
    texts = [" ".join(re.sub(r"[│╰╯─]", " ", text).split()) for text in parts[1::2]]
    return dict(zip(map(str.strip, parts[::2]), texts, strict=True))


def test_help_shows_the_preset_of_the_environment():
    for flags, kl_weight in (["--env", "Walker"], "10.0"), ([], "0.25"):
        text = help_of(varibad_hyper, *flags)["VAE"]
        assert re.search(rf"--kl-weight FLOAT [^()]*\(default: {re.escape(kl_weight)}\)", text)


@both_scripts
def test_help_shows_every_flag_in_its_group_with_a_text(script):
    groups = help_of(script)
    assert list(groups) == ["", "Run", "Task", "PPO", "Policy", "VAE" if script is varibad_hyper else "Encoder"]
    for group in script.Args.__bases__:
        entries = re.split(r"(?:^| )--(?=[a-z])(?!no-)", groups[group.__name__.removesuffix("Args")])[1:]
        names = [entry.split()[0].strip(",").replace("-", "_") for entry in entries]
        assert names == [field.name for field in fields(group)]
        values = r"(?:--no-[a-z-]+|(?:\{None\}\|)?(?:INT|FLOAT|STR)|\{\S*\}|\[INT \[INT \.\.\.\]\])"
        for entry in entries:
            told = re.fullmatch(rf"[a-z-]+,? {values} ?(.*?) ?\(default: [^()]*\)", entry)
            assert told, entry
            assert len(told[1]) > 10, f"--{entry}: no help"


@both_scripts
def test_make_args_is_the_command_line(script):
    """The preset with some changes, as in a notebook."""
    for env in script.PRESETS:
        assert script.make_args(env) == script.parse_args(["--env", env])
    assert script.make_args() == script.Args() == script.parse_args([])
    made = script.make_args("Cheetah-Dir", seed=2, num_steps=50, base_layers=(8, 8))
    flags = "--env Cheetah-Dir --seed 2 --num-steps 50 --base-layers 8 8"
    assert made == script.parse_args(flags.split()) != script.make_args("Cheetah-Dir")
    with pytest.raises(TypeError, match="sed"):
        script.make_args("Cheetah-Dir", sed=2)


@both_scripts
def test_what_make_args_takes_can_be_loaded(script, tmp_path):
    """A whole number for a float, a list for layers."""
    sizes = {"num_envs": 4, "num_steps": 37, "total_timesteps": 148, "num_minibatches": 2, "eval_interval": 0}
    args = script.make_args(gamma=1, base_layers=[8, 9], save_model=True, runs_dir=str(tmp_path), **sizes)
    folder = script.main(args)
    for name in "checkpoint.pt", "model.pt":
        assert script.load_saved(str(folder / name))[1] == args
    assert script.parse_args(["--evaluate", str(folder)]).base_layers == (8, 9)


@both_scripts
def test_reader_that_has_gone_is_no_error(script):
    """As in `--help | head -1`."""
    process = subprocess.Popen(
        [sys.executable, script.__file__, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # long before the script has anything to write
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


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


SHARED_PRESETS = {  # a row per value: Grid-World, Cheetah-Dir, Walker, Ant-Dir, Humanoid
    "gamma": (0.95, 0.97, 0.97, 0.97, 0.99),
    "gae_lambda": (0.95, 0.9, 0.9, 0.9, 0.9),
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
        "ent_coef": (0.03, 0.01, 0.01, 0.01, 0.001),
        "clip_coef": (0.05, 0.1, 0.05, 0.1, 0.1),
        "update_epochs": (2, 2, 2, 2, 4),
        "num_minibatches": (4, 4, 2, 1, 2),
        "base_layers": ((32, 32),) + 4 * ((128, 128),),
        "latent_dim": (5, 5, 10, 5, 10),
        "decode_reward": (True, True, False, True, True),
        "decode_state": (False, False, True, False, False),
        "decoder_layers": ((32, 32), (64, 32), (256, 128), (64, 32), (64, 32)),
        "vae_learning_rate": (2e-3, 2e-3, 1e-3, 1e-3, 1e-3),
        "vae_buffer": (100_000,) + 4 * (10_000,),
        "vae_batch": (50, 10, 10, 10, 10),
        "vae_updates": (5, 5, 1, 1, 10),
        "vae_subsample": (0, 50, 50, 50, 100),
        "kl_weight": (0.25, 1, 10, 1, 1),
    },
    rl2_hyper: {
        "num_steps": (60, 200, 200, 200, 200),
        "ent_coef": (0.01, 0.01, 0.01, 0.01, 0.001),
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
# What a run leaves behind, and what its last lines say to do with it


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory):
    """A run of each script on Cheetah-Dir, whose evaluation depends on the seed, with checkpoint and model."""
    return {
        script: run(script, tmp_path_factory.mktemp("runs"), "--env", "Cheetah-Dir", "--num-steps", "37")
        for script in (varibad_hyper, rl2_hyper)
    }


def evaluated(script, capsys, *flags):
    """What --evaluate prints."""
    capsys.readouterr()
    assert script.main(script.parse_args(list(map(str, flags)))) is None
    return capsys.readouterr().out


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@both_scripts
def test_folder_checkpoint_and_model_evaluate_alike(script, saved_runs, tmp_path, monkeypatch, capsys):
    """To the returns of the end of training; without --env, and without a trace."""
    folder = saved_runs[script]
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    expected = script.format_evaluations({"eval": result["evaluation"]}) + "\n"
    assert "(3 tasks)" in expected
    only_model = tmp_path / "copy"
    only_model.mkdir()
    (only_model / "model.pt").write_bytes((folder / "model.pt").read_bytes())
    for path in folder, folder / "checkpoint.pt", folder / "model.pt", only_model:
        assert evaluated(script, capsys, "--evaluate", path) == expected
    assert evaluated(script, capsys, "--evaluate", folder, "--env", "Cheetah-Dir", "--no-cuda") == expected
    assert contents(folder) == before and list(tmp_path.iterdir()) == [only_model]
    (only_model / "model.pt").write_bytes(b"of an earlier end, before the run was continued")
    (only_model / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes())
    assert evaluated(script, capsys, "--evaluate", only_model) == expected


@both_scripts
def test_refused_resume_lets_go_of_the_folder(script, saved_runs, capsys):
    """While the error is kept, as a notebook does; a second refusal would otherwise name another process."""
    kept = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            script.main(script.parse_args(["--resume", str(saved_runs[script])]))
        kept.append(stop.value)
        assert stop.value.code == 2 and "is finished: give a larger --total-timesteps" in capsys.readouterr().err


@both_scripts
def test_evaluation_keeps_the_tasks_of_meta_world(script, tmp_path, monkeypatch):
    """Those that were trained on, whatever the --seed."""
    agent = SimpleNamespace(load_state_dict=lambda state: None, state_dict=dict)
    monkeypatch.setattr(script, "Agent", lambda envs, args: agent)
    monkeypatch.setattr(script, "MetaWorldVectorEnv", lambda benchmark, num_envs, end_on_success: benchmark)
    monkeypatch.setattr(script, "MetaEpisodes", lambda envs, episodes_per_task, gamma: envs)
    args = script.make_args("Pick-Place", seed=1)
    torch.save({"script": script.__name__, "args": asdict(args), "agent": {}}, tmp_path / "model.pt")
    goals = [task.data for task in script.make_eval_envs(args).train_tasks]
    _, benchmark = script.load_agent(str(tmp_path / "model.pt"), replace(args, seed=2))
    assert [task.data for task in benchmark.train_tasks] == goals


@both_scripts
def test_evaluation_may_use_another_machine(script, saved_runs, monkeypatch, capsys):
    """With more threads, for torch and for the physics, or a GPU where training had none."""
    asked, make_pool = [], script.ThreadPoolExecutor
    monkeypatch.setattr(script.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(script, "ThreadPoolExecutor", lambda workers: asked.append(-workers) or make_pool(workers))
    out = evaluated(script, capsys, "--evaluate", saved_runs[script], "--threads", 2, "--cuda")
    assert out.startswith("meta-episode return ") and sorted(asked) == [-2, 2]


@both_scripts
def test_seeds_share_nothing(script):
    """Environment i draws by its seed + i: neither the purposes of a run nor neighbouring runs may overlap."""
    seeds = [list(script.seeds_of(script.Args(seed=seed)).values()) for seed in range(1, 21)]
    assert np.diff(np.sort(np.ravel(seeds))).min() > 1000


@both_scripts
def test_presets_of_meta_world(script):
    same = {"num_envs": 8, "num_steps": 600, "episodes_per_task": 2, "learning_rate": 3e-4, "num_minibatches": 8}
    same |= {"update_epochs": 2, "gamma": 0.97, "gae_lambda": 0.9, "clip_coef": 0.1, "ent_coef": 0.001}
    same |= {"reward_clip": 1e5, "state_features": 256, "base_layers": (256, 128), "gru_hidden": 256}
    if script is varibad_hyper:
        same |= {"latent_dim": 5, "decoder_layers": (128, 64, 32), "vae_updates": 3, "vae_batch": 10, "kl_weight": 10}
    else:
        same |= {"latent_dim": 128}
    for env, own in ("Pick-Place", (400, 50, 10)), ("ML10", (2000, 250, 25)):
        args = script.parse_args(["--env", env])
        assert {name: getattr(args, name) for name in same} == same
        assert (args.eval_interval, args.eval_tasks, args.embedding_features) == own
        assert script is rl2_hyper or args.decode_state == (env == "ML10")


@both_scripts
def test_every_file_says_what_made_it(script, saved_runs):
    folder = saved_runs[script]
    result = json.loads((folder / "result.json").read_text())
    saved = [torch.load(folder / name, weights_only=True) for name in ("checkpoint.pt", "model.pt")]
    for file in result, *saved:
        assert file["script"] == script.__name__ and file["commit"] == script.script_commit()
        assert file["versions"] == {name: version(name) for name in ("torch", "mujoco", "gymnasium")}
        assert script.Args(**file["args"]).env == "Cheetah-Dir" and file["args"]["resume"] is None


@both_scripts
def test_commit_is_the_repositorys(script, tmp_path, monkeypatch):
    """None where the script is not in one, or there is no git; "-dirty" if code has changed, not rows."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
        done = command(["git", "-C", str(tmp_path), *identity, *words])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    path = tmp_path / "script.py"
    path.write_text("1")
    rows = tmp_path / "rows.csv"
    rows.write_text("1")
    monkeypatch.setattr(script, "__file__", str(path))
    assert script.script_commit() is None
    git("init")
    assert script.script_commit() is None
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag, which would hide the commit")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40 and script.script_commit() == commit
    rows.write_text("2")
    assert script.script_commit() == commit
    path.write_text("2")
    assert script.script_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.script_commit() is None


@both_scripts
def test_evaluation_obeys_seed_and_number_of_tasks(script, saved_runs, capsys):
    folder = saved_runs[script]
    outputs = set()
    for changes in {}, {"seed": 2}, {"eval_tasks": 7}, {"seed": 2, "eval_tasks": 7}:
        flags = [text for name, value in changes.items() for text in (f"--{name.replace('_', '-')}", value)]
        out = evaluated(script, capsys, "--evaluate", folder, *flags)
        agent, _ = script.load_agent(str(folder / "model.pt"))
        _, args = script.load_saved(str(folder))
        args = replace(args, **changes)
        played = script.evaluate(agent, script.make_envs(args, args.eval_tasks), script.seeds_of(args)["eval_envs"])
        returns = np.array([episode.returns.sum() for episode in played])
        stderr = returns.std(ddof=1) / len(returns) ** 0.5
        assert len(returns) == args.eval_tasks
        assert out == f"meta-episode return {returns.mean():.2f} +- {stderr:.2f} ({args.eval_tasks} tasks)\n"
        outputs.add(out)
    assert len(outputs) == 4


@both_scripts
@pytest.mark.parametrize("flags", ["--env Walker", "--num-envs 5", "--gamma 0.5", "--latent-dim 3", "--init hfi"])
def test_evaluation_refuses_flags_that_contradict_the_run(script, saved_runs, capsys, flags):
    name, value = flags.split()
    words = f"error: {name} {value} contradicts the run in {saved_runs[script]} ("
    refused(script, capsys, ["--evaluate", str(saved_runs[script]), name, value], words)


@both_scripts
def test_evaluation_checks_its_flags(script, saved_runs, capsys):
    for flags, words in ("--threads 0", "--threads is 0"), ("--eval-tasks 1", "--eval-tasks 1 gives no standard error"):
        refused(script, capsys, ["--evaluate", str(saved_runs[script]), *flags.split()], words)


@both_scripts
def test_one_run_at_a_time_is_named(script, saved_runs, capsys):
    """--resume with --evaluate would evaluate the one agent as if it were the other run's."""
    folder = str(saved_runs[script])
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(["--resume", folder, "--evaluate", folder]))
    assert stop.value.code == 2
    assert "--evaluate" in capsys.readouterr().err


@both_scripts
def test_empty_paths_are_refused(script, tmp_path, monkeypatch, capsys):
    """As of a shell's variable that is not set: nothing is trained, and no folder is made."""
    monkeypatch.chdir(tmp_path)
    for flags in ["--resume", ""], ["--evaluate", ""]:
        refused(script, capsys, flags, "cannot read")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [
        (varibad_hyper, "--env Grid-World"),
        (rl2_hyper, "--env Walker"),
        (varibad_hyper, "--embedding one-hot"),  # of which show.py draws no belief
        (varibad_hyper, "--checkpoint-interval 0"),  # a model alone
    ],
)
def test_last_lines_of_a_run_can_be_copied(script, flags, tmp_path, capsys):
    """Each is a command that works, from the repository, also if the folder's name has a space."""
    folder = run(script, tmp_path, *flags.split(), "--num-steps", "37", "--exp-name", "my own")
    *_, finished, tensorboard, show, evaluate = capsys.readouterr().out.splitlines()
    result = json.loads((folder / "result.json").read_text())
    expected = script.format_evaluations({"eval": result["evaluation"]})
    best = f", Bayes-optimal {script.GRID_WORLD_BEST['all']:.2f}" if result["args"]["env"] == "Grid-World" else ""
    assert finished == f"finished: {expected}{best}"
    assert tensorboard.startswith("look: ") and show.startswith("      ") and evaluate.startswith("      ")
    tensorboard, show, evaluate = (shlex.split(line.removeprefix("look:")) for line in (tensorboard, show, evaluate))
    assert tensorboard == ["tensorboard", "--logdir", str(folder)]
    assert evaluate == ["python", f"{script.__name__}.py", "--evaluate", str(folder)]
    assert show[:3] == ["python", "show.py", str(folder)]
    if "one-hot" not in flags:
        assert show[3:] == ["--picture", "belief.png"]

    done = command([sys.executable, "-m", "tensorboard.main", *tensorboard[1:], "--inspect"])
    assert done.returncode == 0 and "eval/meta_episodic_return" in done.stdout
    done = command([sys.executable, *evaluate[1:]], cwd=ROOT)
    assert done.returncode == 0 and done.stdout == expected + "\n", done.stderr
    show[-1] = str(tmp_path / show[-1])
    done = command([sys.executable, *show[1:]], cwd=ROOT)
    assert done.returncode == 0 and Path(show[-1]).exists(), done.stderr


@both_scripts
def test_last_lines_name_no_file_that_is_not_there(script, tmp_path, capsys):
    run(script, tmp_path, "--no-save-model", "--checkpoint-interval", "0")
    *_, finished, tensorboard = capsys.readouterr().out.splitlines()
    assert finished.startswith("finished: ") and tensorboard.startswith("look: tensorboard --logdir ")


@pytest.mark.parametrize("goals", ["all", "far"])
def test_best_possible_return_of_grid_world_is_named(goals, tmp_path, capsys):
    run(rl2_hyper, tmp_path, "--grid-goals", goals, "--total-timesteps", "148")
    (finished,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("finished: ")]
    best = rl2_hyper.GRID_WORLD_BEST[goals]
    assert finished.endswith(f", Bayes-optimal {best:.2f}")
    assert best == varibad_hyper.GRID_WORLD_BEST[goals] and (goals == "far" or best == reproduce.BAYES_OPTIMAL)
    cells = [(int(x), int(y)) for x, y in gridworld.goal_cells(5, goals)]
    # Steps on the goal, summed over the goals, of a meta-episode of 60 steps: 1 is earned on it, -0.1 elsewhere.
    on_goal = (best + 0.1 * 60) / 1.1 * len(cells)
    assert on_goal == pytest.approx(round(on_goal), abs=2e-3)
    assert most_steps_on_goal(cells, at_least=round(on_goal)) == round(on_goal)


def most_steps_on_goal(goals, at_least, size=5, horizon=15, episodes=4):
    """Summed over the goals, of the best policy that is not told the goal; 0 if that is less than `at_least`.

    Until the goal is found, nothing is learned but where it is not: a policy is a walk of `horizon` steps an episode,
    each from the start; once it is found, the policy goes straight to it. Walks are made longer step by step. Of those
    that are in one cell and have entered the same goals, the best is kept, if it can still reach `at_least`.
    """

    def earned(goal, episode, step):
        """Steps on the goal, in this episode and those that follow, if it is first entered in this step."""
        return horizon + 1 - step + (episodes - 1 - episode) * (horizon + 1 - sum(goal))

    def at_most(entered, episode, step):
        """What is still earned if a new goal could be entered in every step from here on, the nearest first."""
        left = sorted(set(goals) - entered, key=sum)
        first = episode * horizon + step  # steps so far
        times = [divmod(first + k, horizon) for k in range(min(len(left), episodes * horizon - first))]
        return sum(earned(goal, e, s + 1) for goal, (e, s) in zip(left, times, strict=False))

    walks = {((0, 0), frozenset()): 0}  # (cell, goals entered): what is earned
    for episode in range(episodes):
        starts: dict = {}
        for (_, entered), total in walks.items():
            starts[(0, 0), entered] = max(total, starts.get(((0, 0), entered), 0))
        walks = starts
        for step in range(1, horizon + 1):
            longer: dict = {}
            for ((x, y), entered), total in walks.items():
                for dx, dy in gridworld.MOVES.tolist():
                    cell = x + dx, y + dy
                    if 0 <= min(cell) and max(cell) < size:
                        new = cell in goals and cell not in entered
                        key = cell, entered | {cell} if new else entered
                        longer[key] = max(total + new * earned(cell, episode, step), longer.get(key, 0))
            bounds = {entered: at_most(entered, episode, step) for _, entered in longer}
            walks = {key: total for key, total in longer.items() if total + bounds[key[1]] >= at_least}
    return max(walks.values(), default=0)


def test_most_steps_on_goal_by_hand():
    """On a 2x2 grid, in episodes of two steps: the first episode enters two goals, the second the third one."""
    goals = [(0, 1), (1, 0), (1, 1)]
    assert most_steps_on_goal(goals, 0, size=2, horizon=2, episodes=1) == 2 + 1
    assert most_steps_on_goal(goals, 0, size=2, horizon=2, episodes=2) == (2 + 2) + (1 + 1) + 2
    assert most_steps_on_goal(goals, 9, size=2, horizon=2, episodes=2) == 0


@pytest.mark.parametrize("flags", ["--grid-size 4", "--grid-horizon 14", "--episodes-per-task 3", "--env Cheetah-Dir"])
def test_best_possible_return_is_named_of_no_other_task(flags, tmp_path, capsys):
    run(rl2_hyper, tmp_path, *flags.split(), "--num-steps", "37", "--total-timesteps", "148")
    out = capsys.readouterr().out
    assert "\nfinished: " in out and "Bayes-optimal" not in out


@pytest.mark.slow
@both_scripts
@pytest.mark.parametrize("env", ["Grid-World", "Walker"])
def test_trains_whatever_renderer_the_shell_names(script, env, tmp_path):
    """Also two that contradict each other, which OpenGL refuses: training draws nothing, and does not import it."""
    names = {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}
    flags = [*SHORT, "--env", env, "--num-steps", "37", "--runs-dir", str(tmp_path)]
    done = command([sys.executable, "-X", "importtime", script.__file__, *flags], env=os.environ | names)
    assert done.returncode == 0, done.stderr
    imported = set(re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "mujoco" in imported and "OpenGL" not in imported
    assert len(list(tmp_path.glob("*/result.json"))) == 1


@both_scripts
def test_import_leaves_the_environment_alone(script):
    """A notebook may draw what it trains."""
    code = f"import os; before = dict(os.environ); import {script.__name__}; assert dict(os.environ) == before"
    done = command([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0, done.stderr


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
    """Agent, environments and seed of the run's evaluations."""
    agent, envs = varibad_hyper.load_agent(str(folder / "model.pt"))
    _, args = varibad_hyper.load_saved(str(folder / "model.pt"))
    return agent, envs, varibad_hyper.seeds_of(args)["eval_envs"]


def mean_return(*inputs):
    """Of the meta-episodes of an evaluation."""
    return np.array([episode.returns for episode in varibad_hyper.evaluate(*inputs)]).sum(axis=1).mean()


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
    agent, envs, seed = load(probe)
    intact = mean_return(agent, envs, seed)
    embedding = type(agent).embedding
    monkeypatch.setattr(type(agent), "embedding", lambda self, belief: embedding(self, belief.roll(1, dims=0)))
    shuffled = mean_return(agent, envs, seed)
    monkeypatch.setattr(type(agent), "embedding", lambda self, belief: embedding(self, 0 * belief))
    frozen = mean_return(agent, envs, seed)
    assert max(shuffled, frozen) < 0.6 * intact


@pytest.mark.slow
def test_saved_model_gives_the_returns_of_the_end_of_training(probe):
    evaluation = json.loads((probe / "result.json").read_text())["evaluation"]
    assert mean_return(*load(probe)) == evaluation["meta_episodic_return"]["mean"]
    result = cli(varibad_hyper, "--evaluate", probe / "model.pt")
    assert result.returncode == 0
    assert result.stdout.startswith(f"meta-episode return {evaluation['meta_episodic_return']['mean']:.2f} ")


@pytest.mark.slow
def test_model_of_another_environment_is_refused(probe, capsys):
    words = f"--env Walker contradicts the run in {probe / 'model.pt'} (Grid-World): leave it out."
    refused(varibad_hyper, capsys, ["--env", "Walker", "--evaluate", str(probe / "model.pt")], words)


@pytest.mark.slow
def test_model_of_another_script_is_refused(probe, capsys):
    words = "model.pt belongs to varibad_hyper.py: use that script."
    refused(rl2_hyper, capsys, ["--evaluate", str(probe / "model.pt")], words)


@pytest.mark.slow
def test_damaged_model_is_refused(probe, tmp_path, capsys):
    damaged = tmp_path / "model.pt"
    damaged.write_bytes((probe / "model.pt").read_bytes()[:10_000])
    refused(varibad_hyper, capsys, ["--evaluate", str(damaged)], f"{damaged} is damaged, or not of this version")


@pytest.mark.parametrize("env", MUJOCO)
def test_saved_rl2_gives_the_returns_of_the_end_of_training(tmp_path, env):
    folder = run(rl2_hyper, tmp_path, "--env", env)
    agent, envs = rl2_hyper.load_agent(str(folder / "model.pt"))
    _, args = rl2_hyper.load_saved(str(folder / "model.pt"))
    played = rl2_hyper.evaluate(agent, envs, rl2_hyper.seeds_of(args)["eval_envs"])
    evaluation = json.loads((folder / "result.json").read_text())["evaluation"]
    assert rl2_hyper.summarize(played) == evaluation


# ---------------------------------------------------------------------------------------------------------------------
# README


def documentation():
    """README.md, and what one looks up later."""
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])


@pytest.mark.docs
@pytest.mark.slow
def test_readme_lists_the_tags(probe, tmp_path):
    """Every tag that is logged, and no other."""
    listed = set(re.findall(r"^\| `((?:charts|losses|vae|eval|test)/[^`]+)`", documentation(), re.MULTILINE))
    walker = run(varibad_hyper, tmp_path, "--env", "Walker", "--num-steps", "150", "--total-timesteps", "3000")
    ml10 = run(
        rl2_hyper, tmp_path, "--env", "ML10", "--num-envs", "2", "--num-steps", "600", "--total-timesteps", "2400"
    )
    logged = {re.sub(r"ep\d$", "ep{k}", tag) for folder in (probe, walker, ml10) for tag in scalars(folder)}
    logged = {re.sub(r"/[a-z-]+-v3/.*", "/{class}/{name}", tag) for tag in logged}
    assert logged == listed


@pytest.mark.docs
def test_readme_names_only_flags_that_exist():
    readme = re.sub(r"^ *ray .*$", "", documentation(), flags=re.M)  # Ray has flags of its own
    flags = set(re.findall(r"(--[a-z][a-z-]+)", readme)) - {"--logdir", "--dist", "--help"}
    added = re.findall(r"^\+    (\w+): ", readme, re.M)  # by the diffs of "Change it"
    others = ["picture", "video", "task", "width", "every", "read"]  # and of examples/first_update.py
    names = [*varibad_hyper.Args.__dataclass_fields__, *reproduce.Args.__dataclass_fields__, *others, *added]
    fields = {f"--{name.replace('_', '-')}" for name in names}
    assert {re.sub("^--no-", "--", flag) for flag in flags} <= fields


@pytest.mark.docs
def test_readme_gives_the_results_that_are_kept():
    """Returns by seed and their mean, against results/*.json, for every row and for every file."""
    rows = re.findall(
        r"^\| `python (\S+?)\.py([^`]*)` \| ([\d, ]+) \| ([-\d., ]+) \| ([-\d.]+) \|",
        documentation(),
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
                of_row[result["args"]["seed"]] = result["evaluation"]["meta_episodic_return"]["mean"]
        assert [str(seed) for seed in sorted(of_row)] == seeds.split(", ")
        assert [f"{of_row[seed]:.2f}" for seed in sorted(of_row)] == returns.split(", ")
        assert f"{np.mean(list(of_row.values())):.2f}" == mean
        told += len(of_row)
    assert told == len(results)


def choices(values, names):
    return {name: values.get(name, {"embedding": "posterior", "hyper_bias": True}.get(name)) for name in names}
