"""Meta-World: its tasks, steps and successes against the library itself, the reports, worker processes, resume."""

import copy
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
from varibad_hyper import MetaEpisodes, MetaWorldVectorEnv

torch.set_num_threads(1)  # workers are forked
tqdm.monitor_interval = 0  # no thread that a fork would lose
pytestmark = pytest.mark.filterwarnings("ignore:Constant")  # of Meta-World's policies
SCRIPTS = [varibad_hyper, rl2_hyper]
BENCHMARKS = ["Pick-Place", "ML10"]
both_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
both_benchmarks = pytest.mark.parametrize("env", BENCHMARKS)
SHORT = "--num-envs 2 --num-steps 20 --num-minibatches 2 --learning-starts 0 --eval-interval 0 --eval-tasks 2"
SHORT = [*SHORT.split(), *"--save-model --no-cuda --torch-threads 1 --base-layers 16 8".split()]
SHORT_VAE = "--vae-updates 1 --vae-batch 3 --vae-buffer 3".split()


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """Benchmarks and compiled models are shared by all tests; they take seconds."""
    compiled = functools.cache(mujoco.MjModel.from_xml_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl2_hyper, "make_benchmark", varibad_hyper.make_benchmark)
        patch.setattr(mujoco.MjModel, "from_xml_path", staticmethod(lambda path: copy.copy(compiled(path))))
        yield


@pytest.fixture(autouse=True)
def no_worker_is_left():
    yield
    if multiprocessing.active_children():
        gc.collect()
    assert multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """TensorBoard reads event files by name: time in seconds, host. Here many runs begin in the same second."""
    starts = itertools.count()
    monkeypatch.setattr(socket, "gethostname", lambda: f"start{next(starts):05d}")


def shorten(patch, horizon):
    """Episodes of `horizon` steps, in both scripts."""
    for script in SCRIPTS:
        patch.setattr(script.MetaWorldVectorEnv, "horizon", horizon)


def fake_success(patch, rule=lambda group, obs: np.floor(1e5 * obs[:, 0]) % 12 == 0):
    """Success where `rule` says so: here and there, lost again at once; in workers too."""
    for script in SCRIPTS:

        def step(self, actions, step=script.MetaWorldGroup.step):
            obs, rewards, *ends, _ = step(self, actions)
            return obs, rewards, *ends, {"success": rule(self, obs)}

        patch.setattr(script.MetaWorldGroup, "step", step)


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


def make_episodes(env, num_envs, workers=1, end_on_success=False):
    return MetaEpisodes(MetaWorldVectorEnv(benchmark_of(env), num_envs, workers, end_on_success), 2)


def goal_of(task):
    """What tells a task from the others: its class and its random vector."""
    return task.env_name, pickle.loads(task.data)["rand_vec"].tobytes()


def goals_of(tasks):
    return {goal_of(task) for task in tasks}


def all_tasks(envs):
    """The tasks by number, of environments that are in this process."""
    return envs.groups.tasks


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
        (*envs.step(random_actions(rng, envs.num_envs)), envs.success.copy(), envs.envs.tasks.copy())
        for _ in range(steps)
    ]


def assert_equal_rolls(first, second):
    for step, other in zip(first, second, strict=True):
        for part, other_part in zip(step, other, strict=True):
            np.testing.assert_array_equal(part, other_part)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@both_benchmarks
def test_training_and_test_tasks_are_disjoint(env):
    """As numbers, as goals, and on ML10 as classes; their number and order are the paper's benchmark's."""
    benchmark, envs = benchmark_of(env), MetaWorldVectorEnv(benchmark_of(env), 1, 1, False)
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
def test_training_touches_no_test_task(script, env, tmp_path, monkeypatch):
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
    train(script, tmp_path, "--env", env, "--env-workers", 1, "--eval-interval", 1, "--eval-tasks", 4)

    benchmark = benchmark_of(env)
    train_goals, test_goals = goals_of(benchmark.train_tasks), goals_of(benchmark.test_tasks)
    assert set_tasks.keys() == {"training", *(f"evaluation {k}" for k in range(1, 7))}
    assert set(set_tasks["training"]) <= train_goals
    assert len(set(set_tasks["training"])) >= 6  # three meta-episodes of each environment, and the beginning of one
    assert sum(count for (name, _), count in steps.items() if name == "training") == 3 * 20 * 2
    for k in range(1, 7):  # in turn of training and of test tasks: four of them, two episodes each, every step
        name = f"evaluation {k}"
        stepped = {goal: count for (when, goal), count in steps.items() if when == name}
        assert set(stepped) <= (train_goals if k % 2 else test_goals)
        assert list(stepped.values()) == 4 * [2 * horizon]
        assert [episodes[name, goal] for goal in stepped] == 4 * [2]
        if env == "ML10":
            assert len({class_name for class_name, _ in stepped}) == 4
        assert set(set_tasks[name]) == set(stepped)


def test_task_stays_within_a_meta_episode_and_every_class_has_its_turn(monkeypatch):
    """What the simulators run, not what the numbers say."""
    shorten(monkeypatch, 3)
    envs = make_episodes("ML10", 2)
    tasks, classes = all_tasks(envs.envs), benchmark_of("ML10").train_classes
    first, rng, history = envs.reset(seed=7), np.random.default_rng(0), []
    for _ in range(21):
        running = [(robot, robot._last_rand_vec.copy()) for robot in envs.envs.groups.running]
        numbers = envs.envs.tasks[:, 0].copy()
        for i, (robot, vector) in enumerate(running):
            assert type(robot) is classes[tasks[numbers[i]].env_name]
            np.testing.assert_array_equal(vector, pickle.loads(tasks[numbers[i]].data)["rand_vec"])
        history.append(numbers)
        for step in range(6):
            assert all(new is old for new, (old, _) in zip(envs.envs.groups.running, running, strict=True))
            assert all(np.array_equal(robot._last_rand_vec, vector) for robot, vector in running)
            np.testing.assert_array_equal(envs.envs.tasks[:, 0], numbers)
            np.testing.assert_array_equal(envs.episode, 2 * [step // 3])
            _, _, episode_done, task_done, _, next_obs = envs.step(random_actions(rng, 2))
            assert (episode_done == (step % 3 == 2)).all() and (task_done == (step == 5)).all()
            if step == 2:  # the same task begins in the same way
                np.testing.assert_array_equal(next_obs, first)
        assert (envs.envs.tasks[:, 0] != numbers).all() and not np.array_equal(next_obs, first)
        first = next_obs
    history = np.array(history)  # [21, 2]
    names = np.array(envs.envs.class_names)[history]
    for i, start in itertools.product(range(2), (0, 10)):
        assert set(names[start : start + 10, i]) == set(classes)
    assert (names[:10] != names[10:20]).any() and (names[:, 0] != names[:, 1]).any()
    assert len(np.unique(history)) > 35 and (history < 500).all()


@both_benchmarks
def test_tasks_are_drawn_from_all_training_tasks_and_no_other(env):
    envs = MetaWorldVectorEnv(benchmark_of(env), 3, 1, False)

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
    benchmark, envs = benchmark_of("ML10"), MetaWorldVectorEnv(benchmark_of("ML10"), 15, 1, False)
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
    assert [type(robot) for robot in robots] == [type(robot) for robot in envs.groups.running]
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
    envs, rng = MetaEpisodes(MetaWorldVectorEnv(two, 2, 1, False), 2), np.random.default_rng(0)
    obs, rewards = envs.reset(tasks=np.array([[0], [1]])), []
    assert obs.any() and not obs[:, 36:].any()
    for step in range(1, 521):  # until after the first episode's end
        actions = np.tile(random_actions(rng, 1), (2, 1))
        final_obs, reward, episode_done, _, _, next_obs = envs.step(actions)
        for part in (final_obs, next_obs):
            np.testing.assert_array_equal(part[0], part[1])
            assert not part[:, 36:39].any() and np.isfinite(part).all()
        assert (final_obs[:, 39] == (step == 500)).all() and not next_obs[:, 39].any()
        assert (episode_done == (step == 500)).all()
        rewards.append(reward)
    assert (np.array(rewards)[:, 0] != np.array(rewards)[:, 1]).mean() > 0.9


class LettingGo:
    """Stands still in the first episode; in the second follows Meta-World's policy, then opens the gripper."""

    def __init__(self, envs):
        self.envs, self.policy, self.actions = envs, ENV_POLICY_MAP["pick-place-v3"](), []

    def __call__(self, obs, embedding):
        actions = np.zeros((self.envs.num_envs, 4), np.float32)
        for i, robot in enumerate(self.envs.envs.groups.running):
            if self.envs.episode[i] == 1 and robot.curr_path_length < 75:
                actions[i] = self.policy.get_action(np.r_[obs[i, :36].numpy(), robot._target_pos])
            elif self.envs.episode[i] == 1:
                actions[i] = 0, 0, 1, -1
        self.actions.append(actions)
        return torch.from_numpy(actions)


def high_goals(env, count):
    """Numbers of the training tasks of pick-place with the highest goals, where nothing that is let go stays."""
    tasks = MetaWorldVectorEnv(benchmark_of(env), 1, 1, False).groups.tasks[:50]
    return np.argsort([-pickle.loads(task.data)["rand_vec"][5] for task in tasks])[:count, None]


def evaluate_letting_go(script, tasks, *flags):
    """Returns, successes, and the actions [steps, 2, 4] of an evaluation of that player."""
    args = parse(script, "--env", "Pick-Place", "--env-workers", 1, *flags)
    envs = script.make_envs(args, 2)
    agent = script.Agent(envs, args)
    agent.get_greedy_action = LettingGo(envs)
    returns, successes = script.evaluate(agent, envs, 0, tasks)
    return returns, successes, np.array(agent.get_greedy_action.actions)


@both_scripts
def test_success_counts_once_reached_even_if_lost_again(script, monkeypatch):
    """Against the maximum of Meta-World's own info["success"] over each episode."""
    shorten(monkeypatch, 120)
    tasks = high_goals("Pick-Place", 2)
    returns, successes, actions = evaluate_letting_go(script, tasks)
    assert len(actions) == 240  # by default no episode ends early
    numbered = MetaWorldVectorEnv(benchmark_of("Pick-Place"), 1, 1, False).groups.tasks
    for i, k in enumerate(tasks[:, 0]):
        robot = reference(benchmark_of("Pick-Place"), numbered[k])
        for episode in range(2):
            robot.reset()
            outcomes = [robot.step(np.clip(action[i], -1, 1)) for action in actions[120 * episode :][:120]]
            instants = [outcome[4]["success"] for outcome in outcomes]
            assert max(instants) == episode and instants[-1] == 0  # reached in the second one, and lost again
            assert successes[i, episode] == max(instants)
            assert returns[i, episode] == pytest.approx(sum(float(outcome[1]) for outcome in outcomes), rel=1e-12)
    summary = script.summarize(returns, successes)
    assert [summary[f"success_ep{k}"]["mean"] for k in (1, 2)] == [0, 100]


def test_episode_ends_on_success_only_if_told(monkeypatch):
    """At the step of the first success of Meta-World's own; the value of what would follow is zero."""
    shorten(monkeypatch, 120)
    task = high_goals("Pick-Place", 1)
    _, _, actions = evaluate_letting_go(varibad_hyper, task)
    actions = actions[120:240, :1]  # of the second episode
    robot = reference(
        benchmark_of("Pick-Place"), MetaWorldVectorEnv(benchmark_of("Pick-Place"), 1, 1, 0).groups.tasks[task[0, 0]]
    )
    robot.reset()
    instants = [robot.step(np.clip(action[0], -1, 1))[4]["success"] for action in actions]
    first = instants.index(1)
    for flags, ends in (([], [119]), (["--end-on-success"], [first, first + 1 + first])):
        args = parse(varibad_hyper, "--env", "Pick-Place", "--env-workers", 1, *flags)
        envs = varibad_hyper.make_envs(args, 1)
        envs.reset(tasks=task)
        for episode, end in enumerate(ends):
            start = ends[episode - 1] + 1 if episode else 0
            for step in range(start, end + 1):
                final_obs, _, episode_done, task_done, time_limit, _ = envs.step(actions[step - start])
                assert envs.success[0] == bool(instants[step - start])
                assert episode_done[0] == final_obs[0, 39] == (step == end)
                assert task_done[0] == (step == end and episode == 1) and not time_limit[0]
            assert envs.envs.elapsed[0] == 0
    _, successes, actions = evaluate_letting_go(varibad_hyper, np.tile(task, (2, 1)), "--end-on-success")
    assert len(actions) == 120 + first + 1 and successes.tolist() == [[0, 1], [0, 1]]


@both_scripts
def test_logged_success_is_of_any_step_of_an_episode(script, tmp_path, monkeypatch):
    """charts/success_ep{k} against the steps' successes; episodes of 13 steps go on over iterations of 20."""
    shorten(monkeypatch, 13)
    fake_success(monkeypatch, lambda group, obs: np.floor(1e5 * obs[:, 0]) % 20 == 0)
    steps, training, step = [], [], script.MetaEpisodes.step

    def recording_step(self, actions):
        training[:] = training or [self]  # which is the first to step
        episode = self.episode.copy()
        out = step(self, actions)
        if self is training[0]:
            steps.append((episode, self.success.copy(), out[2]))
        return out

    monkeypatch.setattr(script.MetaEpisodes, "step", recording_step)
    series = points(train(script, tmp_path, "--env", "Pick-Place", "--env-workers", 1, iterations=8))
    reached, expected, lost = np.zeros(2, bool), {}, 0
    for number, (episode, success, episode_done) in enumerate(steps):
        reached |= success
        for i in np.flatnonzero(episode_done):
            frames = 40 * (number // 20 + 1)
            expected.setdefault(f"charts/success_ep{episode[i] + 1}", {}).setdefault(frames, []).append(
                100 * reached[i]
            )
            lost += reached[i] and not success[i]
            reached[i] = False
    assert expected.keys() == {"charts/success_ep1", "charts/success_ep2"} and lost > 5
    assert {0.0, 100.0} <= {float(x) for tag in expected.values() for x in itertools.chain(*tag.values())}
    for tag, values in expected.items():
        assert series[tag] == [(frames, np.mean(reached)) for frames, reached in values.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and its reports


def wild_policy(agent, envs):
    """Greedy actions that hang strongly upon observation and embedding, so that no two histories end alike."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(envs.obs_dim, 4, generator=generator)
    more = torch.randn(agent.embedding(agent.initial_belief(envs)).shape[1], 4, generator=generator)
    agent.get_greedy_action = lambda obs, embedding: torch.sin(5 * obs @ weights + 20 * embedding @ more)


@both_scripts
def test_rounds_of_tasks_are_every_task_alone(script, monkeypatch):
    """Five tasks in two environments, which end at different times; the last round is not full."""
    shorten(monkeypatch, 15)
    fake_success(monkeypatch)
    args = parse(script, "--env", "Pick-Place", "--env-workers", 1, "--end-on-success")
    envs = script.make_envs(args, 2)
    agent = script.Agent(envs, args)
    wild_policy(agent, envs)
    tasks = np.array([[3], [60], [7], [99], [0]])
    returns, successes = script.evaluate(agent, envs, 0, tasks)
    assert returns.shape == successes.shape == (5, 2)
    assert len(np.unique(returns)) == 10 and 0 < successes.mean() < 1
    for k in range(5):
        alone_returns, alone_successes = script.evaluate(
            agent, envs, 0, tasks[[k]]
        )  # the other environment goes unrecorded
        np.testing.assert_allclose(alone_returns[0], returns[k], rtol=1e-6)
        np.testing.assert_array_equal(alone_successes[0], successes[k])


def test_evaluation_environments_are_no_more_than_tasks():
    for num_envs, eval_tasks, expected in ((2, 5, 2), (4, 3, 3)):
        args = parse(varibad_hyper, "--env", "Pick-Place", "--env-workers", 1)
        args.num_envs, args.eval_tasks = num_envs, eval_tasks
        assert varibad_hyper.make_eval_envs(args).num_envs == expected


@both_benchmarks
@pytest.mark.parametrize("eval_tasks", [7, 13])
def test_groups_and_classes_are_summaries_of_their_own_tasks(env, eval_tasks, monkeypatch):
    """With returns and successes that are made up from the number of the task."""
    monkeypatch.setattr(
        varibad_hyper,
        "evaluate",
        lambda agent, envs, seed, tasks: (
            np.column_stack([tasks, tasks**2]),
            np.column_stack([tasks % 2, tasks % 3 > 0]),
        ),
    )
    args = parse(varibad_hyper, "--env", env, "--env-workers", 1)
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
            assert summary.keys() == columns.keys()
            for column, values in columns.items():
                deviation = np.std(values, ddof=1) if len(own) > 1 else 0
                assert summary[column]["mean"] == pytest.approx(np.mean(values))
                assert summary[column]["stderr"] == pytest.approx(deviation / len(own) ** 0.5)
                assert summary[column]["count"] == len(own)


def test_summary_of_a_single_task():
    summary = varibad_hyper.summarize(np.array([[1.5, 2.0]]), np.array([[0.0, 1.0]]))
    expected = {"meta_episodic_return": 3.5, "episodic_return_ep1": 1.5, "episodic_return_ep2": 2.0}
    expected |= {"success_ep1": 0.0, "success_ep2": 100.0}
    assert summary == {name: {"mean": mean, "stderr": 0.0, "count": 1} for name, mean in expected.items()}


def test_sentence_of_an_evaluation():
    """Training tasks, then test tasks, in whatever order they are given; classes are left out."""
    returns, successes = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])
    text = "meta-episode return 6.00 +- 3.00 (2 tasks), by episode 2.00 4.00"
    assert varibad_hyper.format_evaluations({"eval": varibad_hyper.summarize(returns)}) == text
    evaluations = {
        "test": varibad_hyper.summarize(10 * returns, 1 - successes),
        "test/a": varibad_hyper.summarize(returns, successes),
        "eval/b": varibad_hyper.summarize(returns, successes),
        "eval": varibad_hyper.summarize(returns, successes),
    }
    assert varibad_hyper.format_evaluations(evaluations) == (
        f"{text}, success in % 0.00 50.00; test tasks: "
        "meta-episode return 60.00 +- 30.00 (2 tasks), by episode 20.00 40.00, success in % 100.00 50.00"
    )
    one_episode = {"eval": varibad_hyper.summarize(returns[:, :1], successes[:, :1])}
    expected = "meta-episode return 2.00 +- 1.00 (2 tasks), success in % 0.00"
    assert varibad_hyper.format_evaluations(one_episode) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def sentence(summary):
    total, *rest = summary.values()
    means = [f"{value['mean']:.2f}" for value in rest]
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
    flags = ["--env", env, "--env-workers", 2, "--eval-interval", 2, "--eval-tasks", eval_tasks]
    folder = train(script, tmp_path, *flags)
    series, result = check_learned(script, folder, parse(script, *flags)), result_of(folder)

    evaluations = {"eval": result["evaluation"], "test": result["test_evaluation"], **result["class_evaluations"]}
    classes = {"eval": benchmark_of(env).train_classes, "test": benchmark_of(env).test_classes}
    assert len(result["class_evaluations"]) == (6 + 5 if env == "ML10" else 0)
    columns = ["meta_episodic_return", "episodic_return_ep1", "episodic_return_ep2", "success_ep1", "success_ep2"]
    logged = {tag for tag in series if tag.startswith(("eval", "test"))}
    assert logged == {f"{group}/{column}" for group in evaluations for column in columns}
    for group, summary in evaluations.items():
        assert list(summary) == columns
        total, first, second = (summary[column]["mean"] for column in columns[:3])
        assert total == pytest.approx(first + second)
        for column, value in summary.items():
            assert all(math.isfinite(number) for number in value.values())
            (first_frames, _), last = series[f"{group}/{column}"]
            assert first_frames == 80 and last == (120, np.float32(value["mean"]))
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
    assert 0 < sum(evaluations[group][column]["mean"] for group in classes for column in columns[3:]) < 400
    assert result["eval_history"][-1] == [120, result["evaluation"]["meta_episodic_return"]["mean"]]
    assert [frames for frames, _ in result["eval_history"]] == [80, 120]
    assert {"charts/success_ep1", "charts/success_ep2"} <= series.keys()

    line = f"{sentence(evaluations['eval'])}; test tasks: {sentence(evaluations['test'])}\n"
    printed = capsys.readouterr()
    assert f"120 frames: {line}" in printed.out + printed.err
    if env == "Pick-Place":
        script.main(script.parse_args(["--env", env, "--evaluate", str(folder / "model.pt")]))
        assert capsys.readouterr().out == line


@pytest.mark.slow
def test_run_of_whole_episodes(tmp_path):
    """Episodes of 500 steps, the VAE trained on a finished meta-episode, and every evaluated task twice 500 steps."""
    flags = ["--env", "Pick-Place", "--env-workers", 2, "--num-steps", 510]
    folder = train(varibad_hyper, tmp_path, *flags, iterations=2)
    series = check_learned(varibad_hyper, folder, parse(varibad_hyper, *flags))
    assert [frames for frames, _ in series["vae/elbo"]] == [2040]
    for k, frames in ((1, 1020), (2, 2040)):
        for name in ("episodic_return", "success"):
            assert [step for step, _ in series[f"charts/{name}_ep{k}"]] == [frames]
    result = result_of(folder)
    assert result["blow_ups"] == result["eval_blow_ups"] == 0
    assert result["evaluation"]["meta_episodic_return"]["count"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def test_workers_change_nothing(monkeypatch):
    """Four environments in one to four processes, whose episodes end at different times: the same, bit for bit."""
    shorten(monkeypatch, 9)
    fake_success(monkeypatch)
    rolls = []
    for max_workers, workers in ((1, 0), (3, 2), (9, 4)):
        envs = make_episodes("ML10", 4, max_workers, end_on_success=True)
        assert len(multiprocessing.active_children()) == workers
        assert not workers or len(envs.envs.groups.processes) == workers
        first = envs.reset(seed=3)
        rolls.append([(first,), *roll(envs, 26)])
        envs.envs.close()
        assert multiprocessing.active_children() == []
    ends = np.array([step[2] for step in rolls[0][1:]])  # [26, 4]
    assert len({tuple(column) for column in ends.T}) == 4 and (ends.sum(axis=0) > 2).all()
    for other in rolls[1:]:
        assert_equal_rolls(rolls[0], other)


def test_number_of_workers_divides_that_of_environments(monkeypatch):
    started = []

    def start(groups, **kwargs):
        started.append([group.args[2] for group in groups])
        return SimpleNamespace(processes=[])

    monkeypatch.setattr(varibad_hyper.gym.vector, "AsyncVectorEnv", start)
    monkeypatch.setattr(varibad_hyper.os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    for num_envs, max_workers, workers in (
        (8, 0, 4),
        (8, 3, 2),
        (8, 100, 8),
        (6, 4, 3),
        (7, 6, 1),
        (7, 7, 7),
        (10, 0, 5),
    ):
        started.clear()
        MetaWorldVectorEnv(benchmark_of("Pick-Place"), num_envs, max_workers, False)
        if workers == 1:
            assert started == []
            continue
        (rows,) = started
        assert len(rows) == workers and len({row.stop - row.start for row in rows}) == 1
        assert [k for row in rows for k in range(row.start, row.stop)] == list(range(num_envs))


@both_scripts
def test_run_with_workers_is_the_run_without(script, tmp_path, monkeypatch):
    shorten(monkeypatch, 10)
    fake_success(monkeypatch)
    flags = ["--env", "Pick-Place", "--end-on-success", "--eval-interval", 2, "--eval-tasks", 2]
    expected = train(script, tmp_path / "one", *flags, "--env-workers", 1)
    check_same(train(script, tmp_path / "two", *flags, "--env-workers", 2), expected)


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

    def __init__(self, script, runs_dir, prelude=""):
        self.runs_dir, self.stderr = runs_dir, runs_dir.with_suffix(".stderr")
        flags = [*SHORT, "--env", "Pick-Place", "--env-workers", "2", "--eval-tasks", "2", "--total-timesteps", "80000"]
        flags += ["--checkpoint-interval", "1", *(SHORT_VAE if script is varibad_hyper else [])]
        flags += ["--runs-dir", str(runs_dir)]
        code = f"import runpy, sys\nsys.argv = {[script.__file__, *flags]!r}\n{prelude}\n"
        code += f"runpy.run_path({script.__file__!r}, run_name='__main__')"
        with open(self.stderr, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )

    def wait_for_training(self):
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
        assert re.search(rf"Worker\S+ \(process {worker}\) ended with status -9: the run was stopped; ", line)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_signals_to_all_processes_stop_the_run_in_order(two_runs, number):
    """Workers leave what the terminal or a scheduler sends to every process to the run; it can be resumed."""
    for script, run in two_runs.items():
        run.wait_for_training()
        os.killpg(run.process.pid, number)  # the group of all processes
        status, error = run.end()
        assert status == 128 + number and "Traceback" not in error and "error: " not in error, error
        (folder,) = run.runs_dir.iterdir()
        (iteration,) = re.findall(rf"stopped by {number.name} after iteration (\d+): go on with --resume", error)
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == int(iteration) >= 1
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, script, 3, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit):
                script.main(script.parse_args(["--resume", str(folder)]))
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == int(iteration) + 1


@pytest.mark.slow
def test_workers_do_not_outlive_the_run(tmp_path):
    with Run(varibad_hyper, tmp_path / "runs", FEW_GOALS) as run:
        run.wait_for_training()
        run.process.kill()
        assert run.end()[0] == -signal.SIGKILL


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
    assert "an environment worker failed (ValueError: no such luck): the run was stopped; " in line


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def at_step(patch, script, at, action):
    """Calls action() in the training's at-th step of its two environments."""
    calls, training, step = itertools.count(), [], script.MetaEpisodes.step

    def counting_step(self, actions):
        training[:] = training or [self]  # which is the first to step
        if self is training[0] and next(calls) == at:
            action()
        return step(self, actions)

    patch.setattr(script.MetaEpisodes, "step", counting_step)


def test_state_goes_on_in_the_middle_of_episodes(monkeypatch):
    """Episodes that began at different times, in environments that did something else before, in several processes."""
    shorten(monkeypatch, 17)
    fake_success(monkeypatch)
    envs = make_episodes("ML10", 4, 1, end_on_success=True)
    envs.reset(seed=3)
    roll(envs, 37)
    elapsed = envs.envs.elapsed.tolist()
    assert len(set(elapsed)) >= 3 and 0 < max(elapsed) and any(envs.envs.classes_left)
    file = io.BytesIO()
    torch.save(envs.get_state(), file)
    expected = roll(envs, 40, seed=1)
    assert (
        len({tuple(column) for column in np.array([step[3] for step in expected]).T}) == 4
    )  # new tasks at other times
    for workers in (1, 2, 4):
        others = make_episodes("ML10", 4, workers, end_on_success=True)
        others.reset(seed=4)
        roll(others, 5)
        file.seek(0)
        others.set_state(torch.load(file, weights_only=True))
        again = io.BytesIO()
        torch.save(others.get_state(), again)
        assert again.getvalue() == file.getvalue()
        assert_equal_rolls(expected, roll(others, 40, seed=1))
        others.envs.close()


@both_scripts
def test_resumed_run_is_the_uninterrupted_one(script, tmp_path, monkeypatch):
    """Stopped by SIGTERM in the middle of an episode that began in an earlier iteration, with a success in it."""
    shorten(monkeypatch, 28)
    fake_success(monkeypatch, lambda group, obs: np.array([robot.curr_path_length == 5 for robot in group.running]))
    flags = ["--env", "Pick-Place", "--env-workers", 2, "--eval-interval", 3]
    expected = train(script, tmp_path / "whole", *flags, iterations=6)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, script, 4 * 20 + 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train(script, tmp_path / "stopped", *flags, iterations=6)
        assert stop.value.code == 128 + signal.SIGTERM
        del stop
    (folder,) = (tmp_path / "stopped").iterdir()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 5 and not (folder / "result.json").exists()
    assert checkpoint["envs"]["envs"]["elapsed"] == [100 - 84] * 2  # of the fourth episode
    assert checkpoint["episode_successes"].all()
    script.main(script.parse_args(["--resume", str(folder)]))
    check_same(folder, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Physics that blows up


@pytest.mark.parametrize(
    "field, value", [*(("warning", number) for number in varibad_hyper.UNSTABLE), ("qvel", math.nan), ("qpos", 1e30)]
)
def test_blow_up_ends_that_episode_without_success(field, value, tmp_path, monkeypatch):
    """It ends where it stood and touches no other; the next one of the same task begins as ever."""
    monkeypatch.chdir(tmp_path)
    fake_success(monkeypatch, lambda group, obs: np.ones(len(obs), bool))

    def episodes(at):
        envs = make_episodes("Pick-Place", 2)
        first, rng, steps = envs.reset(seed=3), np.random.default_rng(0), []
        for step in range(12):
            if step == at:
                data = envs.envs.groups.running[1].data
                if field == "warning":
                    data.warning.number[value] += 1
                else:
                    getattr(data, field)[-1] = value
            steps.append((*envs.step(random_actions(rng, 2)), envs.success.copy(), envs.envs.tasks.copy()))
        return envs, first, steps

    envs, first, steps = episodes(5)
    healthy_envs, _, healthy = episodes(None)
    assert (envs.blow_ups, healthy_envs.blow_ups) == (1, 0)
    final_obs, reward, episode_done, task_done, time_limit, next_obs, success, _ = steps[5]
    np.testing.assert_array_equal(final_obs[1, :39], steps[4][5][1, :39])
    assert reward[1] == 0 and episode_done[1] and final_obs[1, 39] == 1 and not task_done[1] and not time_limit[1]
    assert success.tolist() == [True, False]
    np.testing.assert_array_equal(next_obs[1], first[1])  # the same task once more
    assert envs.episode.tolist() == [0, 1] and envs.envs.elapsed.tolist() == [12, 6]
    for k in (*range(5), *range(6, 12)):
        assert steps[k][6].all() and not steps[k][2].any()
    assert all(np.isfinite(part).all() for step in steps for part in step)
    assert_equal_rolls(
        [[part[:1] for part in step] for step in steps], [[part[:1] for part in step] for step in healthy]
    )
    assert not list(tmp_path.iterdir())  # no MUJOCO_LOG.TXT
