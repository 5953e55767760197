"""Meta-World: its tasks, steps and successes against the library itself, the reports, worker processes, resume."""

import copy
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from metaworld import SawyerXYZEnv
from metaworld.policies import ENV_POLICY_MAP
from metaworld.types import Task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import rl2_hyper
import varibad_hyper
from varibad_hyper import MetaEpisode, MetaEpisodes, MetaWorldVectorEnv

torch.set_num_threads(1)  # workers are forked
tqdm.monitor_interval = 0  # no thread that a fork would lose
pytestmark = pytest.mark.filterwarnings("ignore:Constant")  # of Meta-World's policies
SCRIPTS = [varibad_hyper, rl2_hyper]
BENCHMARKS = ["Pick-Place", "ML10"]
both_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
both_benchmarks = pytest.mark.parametrize("env", BENCHMARKS)
SHORT = "--num-envs 2 --num-steps 20 --num-minibatches 2 --learning-starts 0 --eval-interval 0 --eval-tasks 2"
SHORT = [*SHORT.split(), *"--save-model --no-cuda --base-layers 16 8".split()]
SHORT_VAE = "--vae-updates 1 --vae-batch 3 --vae-buffer 3".split()


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """Benchmarks and compiled models are shared by all tests; they take seconds."""
    compiled = functools.cache(mujoco.MjModel.from_xml_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl2_hyper, "make_benchmark", varibad_hyper.make_benchmark)
        patch.setattr(mujoco.MjModel, "from_xml_path", staticmethod(lambda path: copy.copy(compiled(path))))
        yield


class InThisProcess(gym.vector.SyncVectorEnv):
    """What AsyncVectorEnv is to the scripts, without processes; its `envs` can be looked into."""

    processes = ()


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(gym.vector, "AsyncVectorEnv", InThisProcess)


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    if multiprocessing.active_children():
        gc.collect()
    assert multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def hang_up_counts():
    """Also where the tests themselves run under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """TensorBoard reads event files by name: time in seconds, host. Here many runs begin in the same second."""
    starts = itertools.count()
    monkeypatch.setattr(socket, "gethostname", lambda: f"start{next(starts):05d}")


def shorten(patch, horizon):
    """Episodes of `horizon` steps, in both scripts."""
    for script in SCRIPTS:
        patch.setattr(script.MetaWorldVectorEnv, "horizon", horizon)


def fake_success(patch, rule=lambda env, obs: np.floor(1e5 * obs[0]) % 12 == 0):
    """Success where `rule` says so: here and there, lost again at once; in workers too."""
    for script in SCRIPTS:

        def step(self, action, step=script.MetaWorldEnv.step):
            obs, reward, *ends, _ = step(self, action)
            return obs, reward, *ends, {"success": bool(rule(self, obs))}

        patch.setattr(script.MetaWorldEnv, "step", step)


def parse(script, *flags):
    return script.parse_args([*SHORT, *(SHORT_VAE if script is varibad_hyper else []), *map(str, flags)])


def train(script, runs_dir, *flags, iterations=3):
    args = parse(script, "--runs-dir", runs_dir, *flags)
    args.total_timesteps = args.num_envs * args.num_steps * iterations
    return script.main(args)


def points(folder):
    """Every scalar as a list of (step, value), so that a doubled point shows; of SPS, which takes time, the steps."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    series = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    series["charts/SPS"] = [step for step, _ in series["charts/SPS"]]
    return series


def iteration_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["iteration"]


def result_of(folder):
    """result.json, which must be JSON in the strict sense: no NaN, no Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)


def check_same(folder, expected):
    """Two runs ended alike, bit for bit, and logged alike."""
    model, expected_model = (torch.load(run / "model.pt", weights_only=True)["agent"] for run in (folder, expected))
    assert model.keys() == expected_model.keys()
    assert [name for name in model if not torch.equal(model[name], expected_model[name])] == []
    result, expected_result = result_of(folder), result_of(expected)
    for name in ("evaluation", "test_evaluation", "class_evaluations", "eval_history", "frames", "blow_ups"):
        assert result[name] == expected_result[name]
    series, expected_series = points(folder), points(expected)
    assert series.keys() == expected_series.keys()
    for tag in series:
        np.testing.assert_equal(series[tag], expected_series[tag], err_msg=tag)


def benchmark_of(env, seed=1):
    return varibad_hyper.make_benchmark(env, varibad_hyper.seeds_of(varibad_hyper.Args(seed=seed))["benchmark"])


def make_vector_env(env, num_envs, end_on_success=False):
    return MetaWorldVectorEnv(benchmark_of(env), num_envs, end_on_success)


def make_episodes(env, num_envs, end_on_success=False):
    return MetaEpisodes(make_vector_env(env, num_envs, end_on_success), 2, 0.9)


def play(returns, successes=None):
    """Meta-episodes with these returns and successes [num_tasks, episodes_per_task], 2, 4, 6, ... steps long."""
    successes = itertools.repeat(None) if successes is None else successes
    lengths = 2 * np.arange(1, returns.size + 1).reshape(returns.shape)
    return [MetaEpisode(0, *columns) for columns in zip(returns, successes, lengths, strict=False)]


def goal_of(task):
    """What tells a task from the others: its class and its random vector."""
    return task.env_name, pickle.loads(task.data)["rand_vec"].tobytes()


def goals_of(tasks):
    return {goal_of(task) for task in tasks}


def all_tasks(envs):
    """The tasks by number, as every worker is given them."""
    (tasks,) = {id(tasks): tasks for _, tasks, *_ in (make.args for make in envs.workers.env_fns)}.values()
    return tasks


def robots_of(envs):
    """The simulators that run at present, of environments in this process."""
    return [env.robot for env in envs.workers.envs]


def reference(benchmark, task):
    """Meta-World's own environment, new, with the task set."""
    robot = {**benchmark.train_classes, **benchmark.test_classes}[task.env_name]()
    robot.set_task(task)
    return robot


def random_actions(rng, num_envs):
    """Float32, as the policy's, and beyond [-1, 1]."""
    return rng.uniform(-2, 2, (num_envs, 4)).astype(np.float32)


def roll(envs, steps, seed=0):
    """All that `steps` random steps return, with the tasks and successes."""
    rng = np.random.default_rng(seed)
    return [
        (*envs.step(random_actions(rng, envs.num_envs)), envs.envs.success.copy(), envs.envs.tasks.copy())
        for _ in range(steps)
    ]


def assert_equal_rolls(first, second):
    for step, other in zip(first, second, strict=True):
        for part, other_part in zip(step, other, strict=True):
            np.testing.assert_array_equal(part, other_part)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@both_benchmarks
def test_training_and_test_tasks_are_disjoint(env, in_this_process):
    """As numbers, as goals, and on ML10 as classes; their number and order are the paper's benchmark's."""
    benchmark, envs = benchmark_of(env), make_vector_env(env, 1)
    tasks = all_tasks(envs)
    train_tasks, test_tasks = ([tasks[k] for k in numbers[:, 0]] for numbers in (envs.train_tasks, envs.test_tasks))
    assert (len(train_tasks), len(test_tasks)) == {"Pick-Place": (50, 50), "ML10": (500, 250)}[env]
    assert goals_of(train_tasks) == goals_of(benchmark.train_tasks) and len(goals_of(train_tasks)) == len(train_tasks)
    assert goals_of(test_tasks) == goals_of(benchmark.test_tasks) and len(goals_of(test_tasks)) == len(test_tasks)
    assert not goals_of(train_tasks) & goals_of(test_tasks)
    assert not set(envs.train_tasks[:, 0]) & set(envs.test_tasks[:, 0])
    assert [task.env_name for task in tasks] == envs.class_names
    if env == "ML10":
        assert set(benchmark.train_classes) | set(benchmark.test_classes) == set(envs.class_names)
        for own_tasks, classes in ((train_tasks, benchmark.train_classes), (test_tasks, benchmark.test_classes)):
            names = [task.env_name for task in own_tasks]
            assert set(names) == set(classes)
            for start in range(0, len(names), len(classes)):  # they take turns
                assert set(names[start : start + len(classes)]) == set(classes)
        assert not set(benchmark.train_classes) & set(benchmark.test_classes)


def test_goals_of_a_benchmark_follow_from_the_seed():
    build = varibad_hyper.make_benchmark.__wrapped__
    seed = varibad_hyper.seeds_of(varibad_hyper.Args(seed=1))["benchmark"]
    first, same, other = benchmark_of("Pick-Place"), build("Pick-Place", seed), benchmark_of("Pick-Place", seed=2)
    for name in ("train_tasks", "test_tasks"):
        assert [goal_of(task) for task in getattr(first, name)] == [goal_of(task) for task in getattr(same, name)]
        assert not goals_of(getattr(first, name)) & goals_of(getattr(other, name))


@pytest.mark.parametrize(
    "script, env",
    [(varibad_hyper, "Pick-Place"), (rl2_hyper, "Pick-Place"), (rl2_hyper, "ML10")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_training_touches_no_test_task(script, env, tmp_path, monkeypatch, in_this_process):
    """Every task that is set in a run, and every step: in the training, and in each evaluation."""
    horizon, phase, set_tasks = 10, ["training"], {}
    shorten(monkeypatch, horizon)
    steps, episodes = Counter(), Counter()
    set_task, step, evaluate = SawyerXYZEnv.set_task, SawyerXYZEnv.step, script.evaluate

    def watched_set_task(self, task):
        self.watched, self.begun = task, False
        set_tasks.setdefault(phase[0], []).append(goal_of(task))
        set_task(self, task)

    def watched_step(self, action):
        steps[phase[0], goal_of(self.watched)] += 1
        episodes[phase[0], goal_of(self.watched)] += not self.begun
        self.begun = True
        return step(self, action)

    def watched_evaluate(*inputs):
        phase[0] = f"evaluation {sum(name != 'training' for name in set_tasks) + 1}"
        try:
            return evaluate(*inputs)
        finally:
            phase[0] = "training"

    monkeypatch.setattr(SawyerXYZEnv, "set_task", watched_set_task)
    monkeypatch.setattr(SawyerXYZEnv, "step", watched_step)
    monkeypatch.setattr(script, "evaluate", watched_evaluate)
    train(script, tmp_path, "--env", env, "--eval-interval", 1, "--eval-tasks", 4)

    benchmark = benchmark_of(env)
    train_goals, test_goals = goals_of(benchmark.train_tasks), goals_of(benchmark.test_tasks)
    assert set_tasks.keys() == {"training", *(f"evaluation {k}" for k in range(1, 9))}
    assert set(set_tasks["training"]) <= train_goals
    assert len(set(set_tasks["training"])) >= 6  # three meta-episodes of each environment, and the beginning of one
    assert sum(count for (name, _), count in steps.items() if name == "training") == 3 * 20 * 2
    for k in range(1, 9):  # in turn of training and of test tasks: four of them, two episodes each, every step
        name = f"evaluation {k}"
        stepped = {goal: count for (when, goal), count in steps.items() if when == name}
        assert set(stepped) <= (train_goals if k % 2 else test_goals)
        assert list(stepped.values()) == 4 * [2 * horizon]
        assert [episodes[name, goal] for goal in stepped] == 4 * [2]
        if env == "ML10":
            assert len({class_name for class_name, _ in stepped}) == 4
        assert set(set_tasks[name]) == set(stepped)


def test_task_stays_within_a_meta_episode_and_every_class_has_its_turn(monkeypatch, in_this_process):
    """What the simulators run, not what the numbers say."""
    shorten(monkeypatch, 3)
    envs = make_episodes("ML10", 2)
    tasks, classes = all_tasks(envs.envs), benchmark_of("ML10").train_classes
    first, rng, history = envs.reset(seed=7), np.random.default_rng(0), []
    for _ in range(21):
        running = [(robot, robot._last_rand_vec.copy()) for robot in robots_of(envs.envs)]
        numbers = envs.envs.tasks[:, 0].copy()
        for i, (robot, vector) in enumerate(running):
            assert type(robot) is classes[tasks[numbers[i]].env_name]
            np.testing.assert_array_equal(vector, pickle.loads(tasks[numbers[i]].data)["rand_vec"])
        history.append(numbers)
        for step in range(6):
            assert all(new is old for new, (old, _) in zip(robots_of(envs.envs), running, strict=True))
            assert all(np.array_equal(robot._last_rand_vec, vector) for robot, vector in running)
            np.testing.assert_array_equal(envs.envs.tasks[:, 0], numbers)
            np.testing.assert_array_equal(envs.episode, 2 * [step // 3])
            next_obs, _, task_done, _, policy_obs, _ = envs.step(random_actions(rng, 2))
            assert (next_obs[:, 39] == (step % 3 == 2)).all() and (task_done == (step == 5)).all()
            if step == 2:  # the same task begins in the same way
                np.testing.assert_array_equal(policy_obs, first)
        assert (envs.envs.tasks[:, 0] != numbers).all() and not np.array_equal(policy_obs, first)
        first = policy_obs
    history = np.array(history)  # [21, 2]
    names = np.array(envs.envs.class_names)[history]
    for i, start in itertools.product(range(2), (0, 10)):
        assert set(names[start : start + 10, i]) == set(classes)
    assert (names[:10] != names[10:20]).any() and (names[:, 0] != names[:, 1]).any()
    assert len(np.unique(history)) > 35 and (history < 500).all()


@both_benchmarks
def test_tasks_are_drawn_from_all_training_tasks_and_no_other(env, in_this_process):
    envs = make_vector_env(env, 3)

    def draws(seed, count=40):
        """Also the first one of them, which a reset draws."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(envs, "call", lambda *args, **kwargs: (np.zeros((3, 39)), {}))
            envs.reset(seed=seed)
        first = envs.tasks[:, 0].tolist()
        return [[first[i], *(int(envs.sample_task(i)) for _ in range(count))] for i in range(3)]

    first = draws(5)
    assert draws(5) == first and draws(6) != first
    assert first[0] != first[1] != first[2] != first[0]
    many = draws(5, 10_000)[0]
    assert set(many) == set(envs.train_tasks[:, 0])
    counts = Counter(many)
    assert max(counts.values()) < 3 * 10_000 / len(counts)  # none is preferred


# ---------------------------------------------------------------------------------------------------------------------
# Observations, rewards, success


def test_steps_are_meta_worlds_own_in_all_classes():
    """Also where another task and other actions went before, and for actions beyond the gripper's; goals are hidden.

    The reference knows whether the gripper touches the object; its actions are its own policy's, with noise.
    """
    benchmark, envs = benchmark_of("ML10"), make_vector_env("ML10", 15)
    tasks, rng = all_tasks(envs), np.random.default_rng(0)
    assert len({envs.class_names[k] for k in (*range(10), *range(500, 505))}) == 15
    numbers = np.array([*range(20, 30), *range(510, 515)])
    envs.reset(options={"tasks": numbers[:, None] - 10 + 5 * (numbers >= 500)[:, None]})
    for _ in range(12):
        envs.step(random_actions(rng, 15))
    obs, _ = envs.reset(options={"tasks": numbers[:, None]})
    robots = [reference(benchmark, tasks[k]) for k in numbers]
    expected = [robot.reset()[0] for robot in robots]
    policies = [ENV_POLICY_MAP[tasks[k].env_name]() for k in numbers]
    total, touched, puck = np.zeros(15), 0, [tasks[k].env_name for k in numbers].index("pick-place-v3")
    for step in range(80):
        np.testing.assert_array_equal(obs, np.array(expected, np.float32))
        assert obs.shape == (15, 39) and not obs[:, 36:].any()
        actions = random_actions(rng, 15)
        if step >= 10:
            for i, (robot, policy) in enumerate(zip(robots, policies, strict=True)):
                actions[i] = policy.get_action(np.r_[expected[i][:36], robot._target_pos]) + 0.1 * actions[i]
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        assert not terminated.any() and not truncated.any()
        outcomes = [robot.step(np.clip(action, -1, 1)) for robot, action in zip(robots, actions, strict=True)]
        expected = [outcome[0] for outcome in outcomes]
        np.testing.assert_array_equal(rewards, [outcome[1] for outcome in outcomes])
        np.testing.assert_array_equal(envs.success, [bool(outcome[4]["success"]) for outcome in outcomes])
        total += rewards
        touched += outcomes[puck][4]["grasp_success"]
    assert len(np.unique(total)) == 15 and total.all()
    assert touched  # where the scripts' environments say that nothing is


def test_tasks_that_differ_only_in_the_goal_look_alike():
    """The same object, two goals: the same observations, other rewards; the goal's place is zero at every step."""
    benchmark = benchmark_of("Pick-Place")
    data = pickle.loads(benchmark.train_tasks[0].data)
    vector = data["rand_vec"]
    other = np.r_[vector[:3], pickle.loads(benchmark.train_tasks[1].data)["rand_vec"][3:]]
    assert not np.array_equal(vector, other)
    tasks = [Task("pick-place-v3", pickle.dumps(data | {"rand_vec": rand_vec})) for rand_vec in (vector, other)]
    two = SimpleNamespace(
        train_classes=benchmark.train_classes,
        test_classes=benchmark.test_classes,
        train_tasks=tasks,
        test_tasks=benchmark.test_tasks,
    )
    envs, rng = MetaEpisodes(MetaWorldVectorEnv(two, 2, False), 2, 0.9), np.random.default_rng(0)
    obs, rewards = envs.reset(tasks=np.array([[0], [1]])), []
    assert obs.any() and not obs[:, 36:].any()
    for step in range(1, 521):  # until after the first episode's end
        actions = np.tile(random_actions(rng, 1), (2, 1))
        next_obs, reward, task_done, _, policy_obs, _ = envs.step(actions)
        for part in (next_obs, policy_obs):
            np.testing.assert_array_equal(part[0], part[1])
            assert not part[:, 36:39].any() and np.isfinite(part).all()
        assert (next_obs[:, 39] == (step == 500)).all() and not policy_obs[:, 39].any()
        assert not task_done.any()
        rewards.append(reward)
    assert (np.array(rewards)[:, 0] != np.array(rewards)[:, 1]).mean() > 0.9


class LettingGo:
    """Stands still in the first episode; in the second follows Meta-World's policy, then opens the gripper."""

    def __init__(self, envs):
        self.envs, self.policy, self.actions = envs, ENV_POLICY_MAP["pick-place-v3"](), []

    def __call__(self, obs, embedding):
        actions = np.zeros((self.envs.num_envs, 4), np.float32)
        for i, robot in enumerate(robots_of(self.envs.envs)):
            if self.envs.episode[i] == 1 and robot.curr_path_length < 75:
                actions[i] = self.policy.get_action(np.r_[obs[i, :36].numpy(), robot._target_pos])
            elif self.envs.episode[i] == 1:
                actions[i] = 0, 0, 1, -1
        self.actions.append(actions)
        return SimpleNamespace(mode=torch.from_numpy(actions)), None


def high_goals(count):
    """Numbers of the training tasks of pick-place with the highest goals, where nothing that is let go stays."""
    tasks = all_tasks(make_vector_env("Pick-Place", 1))[:50]
    return np.argsort([-pickle.loads(task.data)["rand_vec"][5] for task in tasks])[:count, None]


def evaluate_letting_go(script, tasks, *flags):
    """Meta-episodes and the actions [steps, 2, 4] of an evaluation of that player."""
    args = parse(script, "--env", "Pick-Place", *flags)
    envs = script.make_envs(args, 2)
    agent = script.Agent(envs, args)
    agent.forward = LettingGo(envs)
    played = script.evaluate(agent, envs, 0, tasks)
    return played, np.array(agent.forward.actions)


@both_scripts
def test_success_counts_once_reached_even_if_lost_again(script, monkeypatch, in_this_process):
    """Against the maximum of Meta-World's own info["success"] over each episode."""
    shorten(monkeypatch, 120)
    tasks = high_goals(2)
    played, actions = evaluate_letting_go(script, tasks)
    assert len(actions) == 240  # by default no episode ends early
    numbered = all_tasks(make_vector_env("Pick-Place", 1))
    for i, k in enumerate(tasks[:, 0]):
        robot = reference(benchmark_of("Pick-Place"), numbered[k])
        for episode in range(2):
            robot.reset()
            outcomes = [robot.step(np.clip(action[i], -1, 1)) for action in actions[120 * episode :][:120]]
            instants = [outcome[4]["success"] for outcome in outcomes]
            assert max(instants) == episode and instants[-1] == 0  # reached in the second one, and lost again
            assert played[i].successes[episode] == max(instants) and played[i].lengths[episode] == 120
            total = sum(float(outcome[1]) for outcome in outcomes)
            assert played[i].returns[episode] == pytest.approx(total, rel=1e-12)
    summary = script.summarize(played)
    assert [summary[f"success_ep{k}"]["mean"] for k in (1, 2)] == [0, 100]


def test_episode_ends_on_success_only_if_told(monkeypatch, in_this_process):
    """At the step of the first success of Meta-World's own; the value of what would follow is zero."""
    shorten(monkeypatch, 120)
    task = high_goals(1)
    _, actions = evaluate_letting_go(varibad_hyper, task)
    actions = actions[120:240, :1]  # of the second episode
    robot = reference(benchmark_of("Pick-Place"), all_tasks(make_vector_env("Pick-Place", 1))[task[0, 0]])
    robot.reset()
    instants = [robot.step(np.clip(action[0], -1, 1))[4]["success"] for action in actions]
    first = instants.index(1)
    for flags, ends in (([], [119]), (["--end-on-success"], [first, first + 1 + first])):
        envs = varibad_hyper.make_envs(parse(varibad_hyper, "--env", "Pick-Place", *flags), 1)
        envs.reset(tasks=task)
        for episode, end in enumerate(ends):
            start = ends[episode - 1] + 1 if episode else 0
            for step in range(start, end + 1):
                next_obs, _, task_done, time_limit, *_ = envs.step(actions[step - start])
                assert envs.envs.success[0] == bool(instants[step - start])
                assert next_obs[0, 39] == (step == end)
                assert task_done[0] == (step == end and episode == 1) and not time_limit[0]
            assert envs.envs.elapsed[0] == 0
    played, actions = evaluate_letting_go(varibad_hyper, np.tile(task, (2, 1)), "--end-on-success")
    assert len(actions) == 120 + first + 1
    for episode in played:
        assert episode.successes.tolist() == [0, 1] and episode.lengths.tolist() == [120, first + 1]


@both_scripts
def test_logged_success_is_of_any_step_of_an_episode(script, tmp_path, monkeypatch):
    """charts/success_ep{k} against the steps' successes; meta-episodes of 2 x 13 steps go on over iterations of 20."""
    shorten(monkeypatch, 13)
    fake_success(monkeypatch, lambda env, obs: np.floor(1e5 * obs[0]) % 20 == 0)
    steps, step = [], script.MetaEpisodes.step

    def recording_step(self, actions):
        episode = self.episode.copy()
        out = step(self, actions)
        if not self.tasks_stay:  # as those of evaluations do
            steps.append((episode, self.envs.success.copy(), out.next_obs[:, 39] == 1, out.dones))
        return out

    monkeypatch.setattr(script.MetaEpisodes, "step", recording_step)
    series = points(train(script, tmp_path, "--env", "Pick-Place", iterations=10))
    reached, expected, lost = np.zeros((2, 2), bool), {}, 0
    for number, (episode, success, episode_done, task_done) in enumerate(steps):
        reached[range(2), episode] |= success
        lost += (reached[range(2), episode] & ~success & episode_done).sum()
        for i, k in itertools.product(np.flatnonzero(task_done), range(2)):
            own = expected.setdefault(f"charts/success_ep{k + 1}", {})
            own.setdefault(40 * (number // 20 + 1), []).append(100 * reached[i, k])
            reached[i, k] = False
    assert expected.keys() == {"charts/success_ep1", "charts/success_ep2"} and lost > 5
    assert {0.0, 100.0} <= {float(x) for tag in expected.values() for x in itertools.chain(*tag.values())}
    for tag, values in expected.items():
        assert series[tag] == [(frames, np.mean(reached)) for frames, reached in values.items()]
        assert len(series[tag]) == 7  # of 10 iterations
    assert {length for _, length in series["charts/episodic_length"]} == {13}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and its reports


def wild_policy(agent, envs):
    """Greedy actions that hang strongly upon observation and embedding, so that no two histories end alike."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(envs.obs_dim, 4, generator=generator)
    more = torch.randn(agent.embedding(agent.initial_belief(envs)).shape[1], 4, generator=generator)
    agent.forward = lambda obs, embedding: (
        SimpleNamespace(mode=torch.sin(5 * obs @ weights + 20 * embedding @ more)),
        None,
    )


@both_scripts
def test_rounds_of_tasks_are_every_task_alone(script, monkeypatch):
    """Five tasks in two environments, which end at different times; the last round is not full."""
    shorten(monkeypatch, 15)
    fake_success(monkeypatch)
    args = parse(script, "--env", "Pick-Place", "--end-on-success")
    envs = script.make_envs(args, 2)
    agent = script.Agent(envs, args)
    wild_policy(agent, envs)
    tasks = np.array([[3], [60], [7], [99], [0]])
    played = script.evaluate(agent, envs, 0, tasks)
    returns, successes, lengths = (np.array([getattr(x, name) for x in played]) for name in MetaEpisode._fields[1:])
    assert returns.shape == successes.shape == lengths.shape == (5, 2)
    assert len(np.unique(returns)) == 10 and 0 < successes.mean() < 1 and len(np.unique(lengths)) > 2
    for k in range(5):
        (alone,) = script.evaluate(agent, envs, 0, tasks[[k]])  # the other environment goes unrecorded
        np.testing.assert_allclose(alone.returns, returns[k], rtol=1e-6)
        np.testing.assert_array_equal(alone.successes, successes[k])
        np.testing.assert_array_equal(alone.lengths, lengths[k])


def test_evaluation_environments_are_no_more_than_tasks(in_this_process):
    for num_envs, eval_tasks, expected in ((2, 5, 2), (4, 3, 3)):
        args = parse(varibad_hyper, "--env", "Pick-Place")
        args.num_envs, args.eval_tasks = num_envs, eval_tasks
        assert varibad_hyper.make_eval_envs(args).num_envs == expected


@both_benchmarks
@pytest.mark.parametrize("eval_tasks", [7, 13])
def test_groups_and_classes_are_summaries_of_their_own_tasks(env, eval_tasks, monkeypatch, in_this_process):
    """With returns and successes that are made up from the number of the task."""

    def evaluate(agent, envs, seed, tasks):
        return play(np.column_stack([tasks, tasks**2]), np.column_stack([tasks % 2, tasks % 3 > 0]))

    monkeypatch.setattr(varibad_hyper, "evaluate", evaluate)
    args = parse(varibad_hyper, "--env", env)
    args.eval_tasks = eval_tasks
    envs = varibad_hyper.make_eval_envs(args)
    evaluations = varibad_hyper.evaluate_groups(None, envs, args)
    benchmark, numbered = benchmark_of(env), all_tasks(envs.envs)
    for group, classes, start in (
        ("eval", benchmark.train_classes, 0),
        ("test", benchmark.test_classes, len(benchmark.train_tasks)),
    ):
        tasks = {name: [] for name in classes}
        for k in range(start, start + eval_tasks):
            tasks[numbered[k].env_name].append(k)
        expected = {group: range(start, start + eval_tasks)}
        if env == "ML10":
            expected |= {f"{group}/{name}": own for name, own in tasks.items() if own}
            assert len(expected) == 1 + min(eval_tasks, len(classes))
        assert {name for name in evaluations if name.split("/")[0] == group} == expected.keys()
        for name, own in expected.items():
            own, summary = np.array(own), evaluations[name]
            columns = {"meta_episodic_return": own + own**2, "episodic_return_ep1": own, "episodic_return_ep2": own**2}
            columns |= {"success_ep1": 100 * (own % 2), "success_ep2": 100 * (own % 3 > 0)}
            columns["episodic_length"] = 4 * (own - start) + 3  # the mean of the two
            assert summary.keys() == columns.keys()
            for column, values in columns.items():
                deviation = np.std(values, ddof=1) if len(own) > 1 else 0
                assert summary[column]["mean"] == pytest.approx(np.mean(values))
                assert summary[column]["stderr"] == pytest.approx(deviation / len(own) ** 0.5)
                assert summary[column]["count"] == len(own)


def test_sentence_of_an_evaluation():
    """Training tasks, then test tasks, in whatever order they are given; classes are left out."""
    returns, successes = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])
    text = "meta-episode return 6.00 +- 3.00 (2 tasks), by episode 2.00 4.00"
    assert varibad_hyper.format_evaluations({"eval": varibad_hyper.summarize(play(returns))}) == text
    evaluations = {
        "test": varibad_hyper.summarize(play(10 * returns, 1 - successes)),
        "test/a": varibad_hyper.summarize(play(returns, successes)),
        "eval/b": varibad_hyper.summarize(play(returns, successes)),
        "eval": varibad_hyper.summarize(play(returns, successes)),
    }
    assert varibad_hyper.format_evaluations(evaluations) == (
        f"{text}, success in % 0.00 50.00; test tasks: "
        "meta-episode return 60.00 +- 30.00 (2 tasks), by episode 20.00 40.00, success in % 100.00 50.00"
    )
    one_episode = {"eval": varibad_hyper.summarize(play(returns[:, :1], successes[:, :1]))}
    expected = "meta-episode return 2.00 +- 1.00 (2 tasks), success in % 0.00"
    assert varibad_hyper.format_evaluations(one_episode) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def sentence(summary):
    total = summary["meta_episodic_return"]
    means = [f"{value['mean']:.2f}" for name, value in summary.items() if name[-3:-1] == "ep"]
    text = f"meta-episode return {total['mean']:.2f} +- {total['stderr']:.2f} ({total['count']} tasks)"
    return f"{text}, by episode {' '.join(means[:2])}, success in % {' '.join(means[2:])}"


def check_learned(script, folder, args):
    """Losses are finite and every parameter moved."""
    series = points(folder)
    losses = {tag: values for tag, values in series.items() if tag.startswith(("losses/", "vae/"))}
    assert "losses/policy_loss" in losses and ("vae/elbo" in losses) == (script is varibad_hyper)
    assert all(math.isfinite(value) for values in losses.values() for _, value in values)
    torch.manual_seed(script.seeds_of(args)["torch"])
    before = script.Agent(script.make_envs(args, 1), args)
    after = torch.load(folder / "model.pt", weights_only=True)["agent"]
    assert [name for name, parameter in before.named_parameters() if torch.equal(parameter, after[name])] == []
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    return series


@both_scripts
@both_benchmarks
def test_run_and_its_reports(script, env, tmp_path, monkeypatch, capsys):
    """Three iterations with two workers learn something; result.json, TensorBoard and the saved model agree."""
    shorten(monkeypatch, 10)
    fake_success(monkeypatch)
    eval_tasks = {"Pick-Place": 5, "ML10": 6}[env]
    flags = ["--env", env, "--eval-interval", 2, "--eval-tasks", eval_tasks]
    folder = train(script, tmp_path, *flags)
    series, result = check_learned(script, folder, parse(script, *flags)), result_of(folder)

    evaluations = {"eval": result["evaluation"], "test": result["test_evaluation"], **result["class_evaluations"]}
    classes = {"eval": benchmark_of(env).train_classes, "test": benchmark_of(env).test_classes}
    assert len(result["class_evaluations"]) == (6 + 5 if env == "ML10" else 0)
    columns = ["meta_episodic_return", "episodic_return_ep1", "episodic_return_ep2", "success_ep1", "success_ep2"]
    columns.append("episodic_length")
    logged = {tag for tag in series if tag.startswith(("eval", "test"))}
    assert logged == {f"{group}/{column}" for group in evaluations for column in columns}
    for group, summary in evaluations.items():
        assert list(summary) == columns
        total, first, second = (summary[column]["mean"] for column in columns[:3])
        assert total == pytest.approx(first + second)
        for column, value in summary.items():
            assert all(math.isfinite(number) for number in value.values())
            *frames, last = series[f"{group}/{column}"]
            assert [step for step, _ in frames] == [0, 80] and last == (120, np.float32(value["mean"]))
        assert summary["episodic_length"]["mean"] == 10
    for group, column in itertools.product(classes, columns):
        whole = evaluations[group][column]
        assert whole["count"] == eval_tasks
        if env == "ML10":  # the classes' means, weighted
            parts = [evaluations[name][column] for name in evaluations if name.startswith(f"{group}/")]
            assert {f"{group}/{name}" for name in classes[group]} >= {
                name for name in evaluations if name.startswith(f"{group}/")
            }
            assert sum(part["count"] for part in parts) == eval_tasks
            mean = sum(part["mean"] * part["count"] for part in parts) / eval_tasks
            assert mean == pytest.approx(whole["mean"])
    assert 0 < sum(evaluations[group][column]["mean"] for group in classes for column in columns[3:5]) < 400
    assert result["eval_history"][-1] == [120, result["evaluation"]["meta_episodic_return"]["mean"]]
    assert [frames for frames, _ in result["eval_history"]] == [0, 80, 120]
    assert {f"charts/{column}" for column in (*columns, "episodic_return")} <= series.keys()

    line = f"{sentence(evaluations['eval'])}; test tasks: {sentence(evaluations['test'])}\n"
    printed = capsys.readouterr()
    assert f"120 frames: {line}" in printed.out + printed.err
    if env == "Pick-Place":
        script.main(script.parse_args(["--evaluate", str(folder / "model.pt")]))
        assert capsys.readouterr().out == line


@pytest.mark.slow
def test_run_of_whole_episodes(tmp_path):
    """Episodes of 500 steps, the VAE trained on a finished meta-episode, and every evaluated task twice 500 steps."""
    flags = ["--env", "Pick-Place", "--num-steps", 510]
    folder = train(varibad_hyper, tmp_path, *flags, iterations=2)
    series = check_learned(varibad_hyper, folder, parse(varibad_hyper, *flags))
    assert [frames for frames, _ in series["vae/elbo"]] == [2040]
    for name in ("episodic_return_ep1", "episodic_return_ep2", "success_ep1", "success_ep2"):
        assert [step for step, _ in series[f"charts/{name}"]] == [2040]
    assert series["charts/episodic_length"] == [(2040, 500)]
    result = result_of(folder)
    assert result["blow_ups"] == 0
    assert result["evaluation"]["meta_episodic_return"]["count"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def test_workers_change_nothing(monkeypatch):
    """Four environments, a process each, whose episodes end at different times: the same as without, bit for bit."""
    shorten(monkeypatch, 9)
    fake_success(monkeypatch)
    rolls = []
    for kind in (InThisProcess, gym.vector.AsyncVectorEnv):
        monkeypatch.setattr(gym.vector, "AsyncVectorEnv", kind)
        envs = make_episodes("ML10", 4, end_on_success=True)
        assert len(multiprocessing.active_children()) == len(envs.envs.workers.processes) == 4 * len(rolls)
        first = envs.reset(seed=3)
        rolls.append([(first,), *roll(envs, 26)])
        envs.envs.close()
        assert multiprocessing.active_children() == []
    ends = np.array([step[0][:, 39] for step in rolls[0][1:]])  # [26, 4]
    assert len({tuple(column) for column in ends.T}) == 4 and (ends.sum(axis=0) > 2).all()
    assert_equal_rolls(*rolls)


@both_scripts
def test_run_with_workers_is_the_run_without(script, tmp_path, monkeypatch):
    shorten(monkeypatch, 10)
    fake_success(monkeypatch)
    flags = ["--env", "Pick-Place", "--end-on-success", "--eval-interval", 2, "--eval-tasks", 2]
    with monkeypatch.context() as patch:
        patch.setattr(gym.vector, "AsyncVectorEnv", InThisProcess)
        expected = train(script, tmp_path / "without", *flags)
    check_same(train(script, tmp_path / "with", *flags), expected)


def processes_of(session):
    """The processes of a session that have not ended, by id."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if int(own_session) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return sorted(found)


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


FEW_GOALS = "import metaworld; metaworld._N_GOALS = 2"  # which are drawn in no time


class Run:
    """A script's run in a process group of its own, with two workers that train and two that evaluate."""

    def __init__(self, script, runs_dir, prelude="", flags=None):
        self.runs_dir, self.stderr = runs_dir, runs_dir.with_suffix(".stderr")
        if flags is None:
            flags = [*SHORT, "--env", "Pick-Place", "--eval-tasks", "2", "--total-timesteps", "80000"]
            flags += ["--checkpoint-interval", "1", *(SHORT_VAE if script is varibad_hyper else [])]
            flags += ["--runs-dir", str(runs_dir)]
        code = f"import runpy, sys\nsys.argv = {[script.__file__, *flags]!r}\n{prelude}\n"
        code += f"runpy.run_path({script.__file__!r}, run_name='__main__')"
        with open(self.stderr, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )

    def wait_for_training(self):
        """Ids of the workers."""

        def trains():
            assert self.process.poll() is None, self.stderr.read_text()
            return list(self.runs_dir.glob("*/checkpoint.pt"))

        wait_until(trains, 60, "the run does not begin")
        time.sleep(0.4)
        pids = processes_of(self.process.pid)
        assert len(pids) == 5 and pids[0] == self.process.pid
        return pids[1:]  # the first two train

    def end(self, seconds=30):
        """Exit status and stderr, once the run and all its workers have ended."""
        status = self.process.wait(seconds)
        wait_until(lambda: not processes_of(self.process.pid), 10, "workers survive")
        return status, self.stderr.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if processes_of(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def two_runs(tmp_path):
    """One of each script, at the same time."""
    with Run(varibad_hyper, tmp_path / "varibad") as varibad, Run(rl2_hyper, tmp_path / "rl2") as rl2:
        yield {varibad_hyper: varibad, rl2_hyper: rl2}


@pytest.mark.slow
def test_killed_worker_ends_the_run_with_a_sentence(two_runs):
    for run in two_runs.values():
        worker = run.wait_for_training()[1]
        os.kill(worker, signal.SIGKILL)
        status, error = run.end()
        assert status == 1 and "Traceback" not in error and error.count("error: ") == 1, error
        (line,) = re.findall("^error: .*$", error, re.MULTILINE)
        assert re.search(r"an environment worker failed \((EOF|BrokenPipe|ConnectionReset)Error: .*\): stopped; ", line)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_signals_to_all_processes_stop_the_run_in_order(two_runs, number):
    """Workers leave what the terminal or a scheduler sends to every process to the run; it can be resumed."""
    for script, run in two_runs.items():
        run.wait_for_training()
        os.killpg(run.process.pid, number)  # the group of all processes
        status, error = run.end()
        assert status == 128 + number and "Traceback" not in error and "error: " not in error, error
        (folder,) = run.runs_dir.iterdir()
        (iteration,) = re.findall(rf"stopped by {number.name} after iteration (\d+): continue with\n", error)
        assert error.endswith(f"python {script.__name__}.py --resume {folder}\n")
        assert iteration_of(folder) == int(iteration) >= 1
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, script, 3, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit):
                script.main(script.parse_args(["--resume", str(folder)]))
        assert iteration_of(folder) == int(iteration) + 1


@pytest.mark.slow
def test_workers_do_not_outlive_the_run(tmp_path):
    """Killed, stopped at once by a second signal, or ended by an error that nobody thought of."""
    with Run(varibad_hyper, tmp_path / "killed", FEW_GOALS) as run:
        run.wait_for_training()
        run.process.kill()
        assert run.end()[0] == -signal.SIGKILL
    with Run(varibad_hyper, tmp_path / "twice", FEW_GOALS + "; " + slow_first_update("time.sleep(60)")) as run:
        run.wait_for_training()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(run.process.pid, number)
            time.sleep(0.5)
        assert run.end()[0] == -signal.SIGINT
    with Run(varibad_hyper, tmp_path / "error", FEW_GOALS + "; " + slow_first_update("1 / 0")) as run:
        status, error = run.end()
    assert status == 1 and "ZeroDivisionError" in error


def slow_first_update(what):
    return f"import time, torch.nn as nn; nn.utils.clip_grad_norm_ = lambda *args: {what}"


@pytest.mark.slow
def test_evaluation_that_is_stopped_ends_its_workers(tmp_path):
    """Ctrl-C goes to all processes, of which the workers ignore it."""
    args = parse(varibad_hyper, "--env", "Pick-Place", "--eval-tasks", 50)
    model = {"script": "varibad_hyper", "args": dataclasses.asdict(args)}
    torch.save(
        model | {"agent": varibad_hyper.Agent(varibad_hyper.make_envs(args, 1), args).state_dict()},
        tmp_path / "model.pt",
    )
    with Run(varibad_hyper, tmp_path / "none", flags=["--evaluate", str(tmp_path / "model.pt")]) as run:
        wait_until(lambda: len(processes_of(run.process.pid)) == 3, 60, "the evaluation does not begin")
        time.sleep(1)
        os.killpg(run.process.pid, signal.SIGINT)
        status, error = run.end()
    assert status == 130 and "Traceback" not in error, error


@pytest.mark.slow
def test_worker_that_fails_ends_the_run_with_a_sentence(tmp_path):
    prelude = """
import itertools
step, calls = metaworld.SawyerXYZEnv.step, itertools.count()
def failing_step(self, action):
    if next(calls) == 50:
        raise ValueError("no such luck")
    return step(self, action)
metaworld.SawyerXYZEnv.step = failing_step
"""
    with Run(varibad_hyper, tmp_path / "runs", FEW_GOALS + prelude) as run:
        status, error = run.end(60)
    assert status == 1, error
    (line,) = re.findall("^error: .*$", error, re.MULTILINE)
    assert "an environment worker failed (ValueError: no such luck): stopped; " in line


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def at_step(patch, script, at, action):
    """Calls action() in the training's at-th step of its two environments."""
    calls, step = itertools.count(), script.MetaEpisodes.step

    def counting_step(self, actions):
        if not self.tasks_stay and next(calls) == at:  # the tasks of evaluations do
            action()
        return step(self, actions)

    patch.setattr(script.MetaEpisodes, "step", counting_step)


def test_state_goes_on_in_the_middle_of_episodes(monkeypatch):
    """Episodes that began at different times, in environments that did something else before, in other processes."""
    shorten(monkeypatch, 17)
    fake_success(monkeypatch)
    envs = make_episodes("ML10", 4, end_on_success=True)
    envs.reset(seed=3)
    roll(envs, 37)
    elapsed = envs.envs.elapsed.tolist()
    assert len(set(elapsed)) >= 3 and 0 < max(elapsed) and any(envs.envs.classes_left)
    file = io.BytesIO()
    torch.save(envs.state_dict(), file)
    expected = roll(envs, 40, seed=1)
    task_done = np.array([step[2] for step in expected])  # [40, 4]
    assert len({tuple(column) for column in task_done.T}) == 4  # new tasks at other times
    for kind in (InThisProcess, gym.vector.AsyncVectorEnv):
        monkeypatch.setattr(gym.vector, "AsyncVectorEnv", kind)
        others = make_episodes("ML10", 4, end_on_success=True)
        others.reset(seed=4)
        roll(others, 5)
        file.seek(0)
        others.load_state_dict(torch.load(file, weights_only=True))
        again = io.BytesIO()
        torch.save(others.state_dict(), again)
        assert again.getvalue() == file.getvalue()
        assert_equal_rolls(expected, roll(others, 40, seed=1))
        others.envs.close()


@both_scripts
def test_resumed_run_is_the_uninterrupted_one(script, tmp_path, monkeypatch):
    """Stopped by SIGTERM in the middle of an episode that began in an earlier iteration, with a success in it."""
    shorten(monkeypatch, 28)
    fake_success(monkeypatch, lambda env, obs: env.robot.curr_path_length == 5)
    flags = ["--env", "Pick-Place", "--eval-interval", 3]
    expected = train(script, tmp_path / "whole", *flags, iterations=6)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, script, 4 * 20 + 3, lambda: signal.raise_signal(signal.SIGTERM))
        folder = stopped(script, tmp_path / "stopped", *flags, iterations=6)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["run"]["iteration"] == 5 and not (folder / "result.json").exists()
    assert checkpoint["envs"]["envs"]["elapsed"] == [100 - 84] * 2  # of the fourth episode
    assert checkpoint["envs"]["episode"].tolist() == [1, 1] and checkpoint["envs"]["successes"].tolist() == [[1, 1]] * 2
    script.main(script.parse_args(["--resume", str(folder)]))
    check_same(folder, expected)


def stopped(script, runs_dir, *flags, number=signal.SIGTERM, iterations):
    """The folder of a run that a signal stops."""
    with pytest.raises(SystemExit) as stop:
        train(script, runs_dir, *flags, iterations=iterations)
    assert stop.value.code == 128 + number
    del stop  # which holds the environments
    (folder,) = runs_dir.iterdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, number, evaluation, done",
    [
        (varibad_hyper, signal.SIGTERM, 0, 0),
        (rl2_hyper, signal.SIGHUP, 0, 2),
        (rl2_hyper, signal.SIGTERM, 1, 1),
        (varibad_hyper, signal.SIGHUP, 1, 2),
        (varibad_hyper, signal.SIGTERM, 2, 0),
        (rl2_hyper, signal.SIGTERM, 2, 2),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", str(value))),
)
def test_signal_in_an_evaluation_stops_it(script, number, evaluation, done, tmp_path, monkeypatch, capsys):
    """At once, after `done` of four rounds; the resumed run does the whole evaluation, the last one too."""
    shorten(monkeypatch, 10)
    fake_success(monkeypatch)
    flags, steps = ["--env", "Pick-Place", "--eval-interval", 2, "--eval-tasks", 4], []
    expected = train(script, tmp_path / "whole", *flags, iterations=3)
    at, step = (4 * evaluation + done) * 20 + 5, script.MetaEpisodes.step

    def counting_step(self, actions):
        if self.tasks_stay:
            steps.append(len(steps))
            if len(steps) == at:
                signal.raise_signal(number)
        return step(self, actions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.MetaEpisodes, "step", counting_step)
        folder = stopped(script, tmp_path / "stopped", *flags, number=number, iterations=3)
    assert len(steps) == at
    iteration = [0, 2, 3][evaluation]
    assert f"stopped by {number.name} after iteration {iteration}: continue with" in capsys.readouterr().err
    assert iteration_of(folder) == iteration and not (folder / "result.json").exists()
    script.main(script.parse_args(["--resume", str(folder)]))
    check_same(folder, expected)
    assert [frames for frames, _ in result_of(folder)["eval_history"]] == [0, 80, 120]


# ---------------------------------------------------------------------------------------------------------------------
# Physics that blows up


@pytest.mark.parametrize(
    "field, value", [*(("warning", number) for number in varibad_hyper.UNSTABLE), ("qvel", math.nan), ("qpos", 1e30)]
)
def test_blow_up_ends_that_episode_without_success(field, value, tmp_path, monkeypatch, in_this_process):
    """It ends where it stood and touches no other; the next one of the same task begins as ever."""
    monkeypatch.chdir(tmp_path)
    fake_success(monkeypatch, lambda env, obs: env.robot.curr_path_length == 6)

    def episodes(at):
        envs = make_episodes("Pick-Place", 2)
        first, rng, steps = envs.reset(seed=3), np.random.default_rng(0), []
        for step in range(12):
            if step == at:
                data = robots_of(envs.envs)[1].data
                if field == "warning":
                    data.warning.number[value] += 1
                else:
                    getattr(data, field)[-1] = value
            counters = "successes", "returns", "lengths"
            steps.append((*envs.step(random_actions(rng, 2)), *(getattr(envs, name).copy() for name in counters)))
        return envs, first, steps

    envs, first, steps = episodes(5)
    healthy_envs, _, healthy = episodes(None)
    assert (envs.blow_ups, healthy_envs.blow_ups) == (1, 0)
    next_obs, reward, task_done, time_limit, policy_obs, _, successes, returns, lengths = steps[5]
    np.testing.assert_array_equal(next_obs[1, :39], steps[4][4][1, :39])
    assert reward[1] == 0 and next_obs[:, 39].tolist() == [0, 1] and not task_done.any() and not time_limit.any()
    assert successes.tolist() == [[1, 0], [0, 0]]  # the step would have been a success of both
    assert returns[1].tolist() == steps[4][7][1].tolist() and lengths.tolist() == [[6, 0], [6, 0]]
    np.testing.assert_array_equal(policy_obs[1], first[1])  # the same task once more
    assert envs.episode.tolist() == [0, 1] and envs.envs.elapsed.tolist() == [12, 6]
    assert envs.lengths.tolist() == [[12, 0], [6, 6]] and envs.successes.tolist() == [[1, 0], [0, 1]]
    for k in (*range(5), *range(6, 12)):
        assert not steps[k][0][:, 39].any()
    assert all(np.isfinite(part).all() for step in steps for part in step)
    assert_equal_rolls(
        [[part[:1] for part in step] for step in steps], [[part[:1] for part in step] for step in healthy]
    )
    assert not list(tmp_path.iterdir())  # no MUJOCO_LOG.TXT
