"""Tests of gridworld.py: Gymnasium's contract, the twins against each other, the rules against plain Python."""

import json
import random

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gridworld import GridWorldEnv, GridWorldVectorEnv, goal_cells

STAY, UP, RIGHT, DOWN, LEFT = range(5)
HORIZON = 15


def walk(position, action, size=5):
    """The rules of motion, once more and slowly."""
    x, y = position
    if action == UP and y < size - 1:
        return x, y + 1
    if action == RIGHT and x < size - 1:
        return x + 1, y
    if action == DOWN and y > 0:
        return x, y - 1
    if action == LEFT and x > 0:
        return x - 1, y
    return x, y


# ---------------------------------------------------------------------------------------------------------------------
# Gymnasium's contract


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("render_mode", [None, "ansi", "rgb_array"])
def test_gymnasium_checker_has_no_complaint(render_mode):
    check_env(gym.make("GridWorld-v0", render_mode=render_mode).unwrapped)


@pytest.mark.filterwarnings("error")
def test_make_vec_gives_the_vector_env():
    envs = gym.make_vec("GridWorld-v0", num_envs=3, size=6, horizon=4, goals="far")
    assert isinstance(envs, GridWorldVectorEnv)
    assert (envs.num_envs, envs.size, envs.horizon, len(envs.all_tasks)) == (3, 6, 4, 32)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    obs, _ = envs.reset(seed=0)
    assert obs in envs.observation_space
    obs, rewards, terminated, truncated, _ = envs.step(envs.action_space.sample())
    assert obs in envs.observation_space
    assert rewards.shape == terminated.shape == truncated.shape == (3,)
    assert terminated.dtype == truncated.dtype == bool


@pytest.mark.parametrize("actions", [[-1, 0, 0], [0, 5, 0], [0, 0], [[0], [0], [0]], [0.5, 0, 0]])
def test_actions_that_do_not_exist_are_refused(actions):
    env, envs = GridWorldEnv(), GridWorldVectorEnv(3)
    env.reset(seed=0)
    envs.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction):
        envs.step(np.array(actions))
    for action in (-1, 5, 0.5, np.array([1])):
        with pytest.raises(gym.error.InvalidAction):
            env.step(action)
    assert env.step(np.int64(1))[0].tolist() == [0, 1]  # as a policy gives it
    np.testing.assert_array_equal(envs.step(np.array([0, 1, 2], np.int32))[0], [(0, 0), (0, 1), (1, 0)])


def test_steps_before_a_reset_are_refused():
    for env, action in ((GridWorldEnv(), 0), (GridWorldVectorEnv(2), np.zeros(2, int))):
        with pytest.raises(gym.error.ResetNeeded):
            env.step(action)
    envs = GridWorldVectorEnv(2)
    envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.zeros(2, int))


@pytest.mark.parametrize("task", [(0, 0), (5, 1), (-1, 2), (1.5, 2), (1,), (1, 2, 3), "12"])
def test_tasks_that_are_no_goal_are_refused(task):
    with pytest.raises(ValueError, match="no goal of this grid"):
        GridWorldEnv().reset(options={"task": task})
    with pytest.raises(ValueError, match="no goal of this grid"):
        GridWorldVectorEnv(2).reset(options={"tasks": [task, task]})
    with pytest.raises(ValueError, match="no goal of this grid"):
        GridWorldEnv(goals="far").reset(options={"task": (1, 1)})
    GridWorldVectorEnv(2).reset(options={"reset_mask": np.array([True, False]), "tasks": [(1, 1), (0, 0)]})  # ignored


@pytest.mark.parametrize("seeds", [(3, 4, 5), np.array([3, 4, 5]), np.int64(3), 3])
def test_seeds_may_be_any_sequence(seeds):
    envs, same = GridWorldVectorEnv(3), GridWorldVectorEnv(3)
    envs.reset(seed=[3, 4, 5])
    same.reset(seed=seeds)
    np.testing.assert_array_equal(envs.tasks, same.tasks)


def test_wrappers_and_pictures_need_gymnasiums_own_vector_env():
    with pytest.raises(ValueError, match='vectorization_mode="sync"'):
        gym.make_vec("GridWorld-v0", num_envs=2, render_mode="rgb_array")
    envs = gym.make_vec("GridWorld-v0", num_envs=2, vectorization_mode="sync", render_mode="rgb_array")
    envs = gym.wrappers.vector.NormalizeObservation(envs)
    envs.reset(seed=0)
    assert [picture.shape for picture in envs.render()] == 2 * [(160, 160, 3)]
    for _ in range(2 * HORIZON):
        obs, *_ = envs.step(envs.action_space.sample())
    assert np.isfinite(obs).all()


# ---------------------------------------------------------------------------------------------------------------------
# The twins


def twins(num_envs, **kwargs):
    """The vector environment, and Gymnasium's loop over single ones."""
    loop = SyncVectorEnv([lambda: GridWorldEnv(**kwargs)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    return GridWorldVectorEnv(num_envs, **kwargs), loop


@pytest.mark.parametrize("seed", [7, [3, None, 9]])
def test_seeds_and_masks_reach_the_same_environments(seed):
    mask = np.array([True, False, True])
    both = (
        gym.make_vec("GridWorld-v0", num_envs=3),
        SyncVectorEnv([GridWorldEnv] * 3, autoreset_mode=AutoresetMode.DISABLED),
    )
    goals = []
    for envs in both:
        envs.reset(seed=[1, 2, 3])
        envs.reset(seed=seed, options={"reset_mask": mask.copy()})
        for _ in range(5):  # later goals tell whether a generator was replaced
            envs.reset()
            singles = getattr(envs, "envs", None)
            goals.append(np.stack([env.unwrapped.task for env in singles]) if singles else envs.tasks.copy())
    np.testing.assert_array_equal(goals[:5], goals[5:])


def assert_same_step(step, loop_step):
    for mine, theirs in zip(step[:4], loop_step[:4], strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)  # strict: the dtype as well


@pytest.mark.parametrize("size, horizon, goals", [(5, HORIZON, "all"), (3, 10, "far")])
def test_twins_agree_on_goals_drawn_by_seed(size, horizon, goals):
    envs, loop = twins(6, size=size, horizon=horizon, goals=goals)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(envs.reset(seed=3)[0], loop.reset(seed=3)[0], strict=True)
    rewarded = 0
    for _ in range(16 * horizon):
        actions = rng.integers(5, size=6)
        step, loop_step = envs.step(actions), loop.step(actions)
        assert_same_step(step, loop_step)
        rewarded += (step[1] > 0).sum()
        # Some episodes are cut short, so that the environments are reset at different times.
        mask = step[2] | (rng.random(6) < 0.03)
        if mask.any():
            obs, _ = envs.reset(options={"reset_mask": mask})
            np.testing.assert_array_equal(obs, loop.reset(options={"reset_mask": mask})[0], strict=True)
            np.testing.assert_array_equal(envs.tasks, [env.task for env in loop.envs])
    assert rewarded > 0  # otherwise the rewards were equal because nobody found a goal


def test_twins_agree_on_given_goals():
    envs, loop = twins(4)
    loop.reset()  # SyncVectorEnv cannot start with a partial reset
    rng = np.random.default_rng(1)
    for _ in range(3):
        tasks = rng.choice(goal_cells(), 4)
        envs.reset(options={"tasks": tasks})
        for i, task in enumerate(tasks):  # SyncVectorEnv hands one task to all environments of the mask
            loop.reset(options={"reset_mask": np.arange(4) == i, "task": task})
        given, tasks[:] = tasks.copy(), -1  # the environments must have made copies
        np.testing.assert_array_equal(envs.tasks, given)
        np.testing.assert_array_equal([env.task for env in loop.envs], given)
        for _ in range(HORIZON):
            actions = rng.integers(5, size=4)
            step = envs.step(actions)
            assert_same_step(step, loop.step(actions))
        assert step[2].all()


# ---------------------------------------------------------------------------------------------------------------------
# The rules


@pytest.mark.parametrize("size, horizon", [(5, HORIZON), (3, 40)])
def test_trajectories_follow_the_rules(size, horizon):
    goal, rng = (1, 2), np.random.default_rng(2)
    env, envs = GridWorldEnv(size, horizon), GridWorldVectorEnv(20, size, horizon)
    all_actions = rng.integers(5, size=(horizon, 20))
    obs = [envs.reset(options={"tasks": np.tile(goal, (20, 1))})[0]]  # kept whole: no step may write into an older one
    steps = []
    for actions in all_actions:
        steps.append(envs.step(actions))
        obs.append(steps[-1][0])

    off_grid = found = 0
    for i in range(20):
        position = (0, 0)
        assert tuple(env.reset(options={"task": goal})[0]) == tuple(obs[0][i]) == position
        for t, action in enumerate(all_actions[:, i]):
            before, position = position, walk(position, action, size)
            off_grid += action != STAY and before == position
            found += position == goal
            expected = (1.0 if position == goal else -0.1, t + 1 == horizon, False)
            single_obs, *single = env.step(action)
            assert tuple(single_obs) == tuple(obs[t + 1][i]) == position
            assert tuple(single[:3]) == tuple(x[i] for x in steps[t][1:4]) == expected
    assert off_grid > 0 and found > 0  # the walks did meet the edges and the goal


@pytest.mark.parametrize("goal, hand_computed", [((1, 0), 15.0), ((2, 2), 11.7), ((3, 2), 10.6), ((4, 4), 7.3)])
def test_oracle_earns_the_hand_computed_return(goal, hand_computed):
    """At distance d: -0.1 for d - 1 steps, then 1 for the other 16 - d."""
    actions = ([RIGHT] * goal[0] + [UP] * goal[1] + [STAY] * HORIZON)[:HORIZON]
    env, envs = GridWorldEnv(), GridWorldVectorEnv(2)
    env.reset(options={"task": goal})
    envs.reset(options={"tasks": [goal, (0, 4)]})
    assert sum(env.step(action)[1] for action in actions) == pytest.approx(hand_computed)
    assert sum(envs.step([action, STAY])[1][0] for action in actions) == pytest.approx(hand_computed)


def test_observation_does_not_tell_the_goal():
    env = GridWorldEnv()
    assert env.observation_space == gym.spaces.Box(0, 4, (2,), np.float32)  # a position and nothing else
    rng = np.random.default_rng(3)
    for actions in rng.integers(5, size=(5, HORIZON)):
        shown = []
        for goal in [(1, 0), (3, 4)]:
            shown.append([env.reset(options={"task": goal})])
            for action in actions:
                obs, _, terminated, truncated, info = env.step(action)
                shown[-1].append((obs, terminated, truncated, info))
        assert repr(shown[0]) == repr(shown[1])
        assert all(step[-1] == {} for step in shown[0])


# ---------------------------------------------------------------------------------------------------------------------
# Goals


@pytest.mark.parametrize(
    "size, goals, excluded",
    [
        (5, "all", {(0, 0)}),
        (5, "far", {(0, 0), (1, 0), (0, 1), (1, 1)}),
        (2, "all", {(0, 0)}),
        (3, "far", {(0, 0), (1, 0), (0, 1), (1, 1)}),
        (7, "far", {(0, 0), (1, 0), (0, 1), (1, 1)}),
    ],
)
def test_goal_cells(size, goals, excluded):
    cells = [tuple(cell) for cell in goal_cells(size, goals).tolist()]
    assert len(cells) == len(set(cells)) == size**2 - len(excluded)
    assert set(cells) == {(x, y) for x in range(size) for y in range(size)} - excluded


@pytest.mark.parametrize("goals, number", [("all", 24), ("far", 21)])
def test_goals_are_drawn_uniformly(goals, number):
    envs = GridWorldVectorEnv(100 * number, goals=goals)
    envs.reset(seed=0)
    cells, counts = np.unique(envs.tasks, axis=0, return_counts=True)
    assert set(map(tuple, cells)) == set(map(tuple, goal_cells(5, goals))) and len(cells) == number
    assert counts.min() > 60 and counts.max() < 140  # 100 +- 4 standard deviations


@pytest.mark.parametrize("make", [goal_cells, GridWorldEnv, lambda **kwargs: GridWorldVectorEnv(2, **kwargs)])
@pytest.mark.parametrize(
    "kwargs, mend",
    [
        ({"goals": "near"}, "'all' or 'far'"),
        ({"size": 1}, "larger size"),
        ({"size": 2, "goals": "far"}, "larger size"),
    ],
)
def test_bad_goal_sets_are_refused(make, kwargs, mend):
    with pytest.raises(ValueError, match=mend):
        make(**kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Resets and randomness


def test_partial_reset_leaves_the_others_alone():
    envs, mask = GridWorldVectorEnv(4), np.array([True, False, True, False])
    envs.reset(seed=0, options={"tasks": [(4, 1), (4, 2), (4, 3), (4, 4)]})
    for actions in ([UP, RIGHT, UP, RIGHT], [RIGHT, RIGHT, UP, STAY]):
        envs.step(np.array(actions))

    obs, _ = envs.reset(options={"reset_mask": mask, "tasks": [(1, 1), (2, 2), (3, 3), (0, 2)]})
    np.testing.assert_array_equal(obs, [(0, 0), (2, 0), (0, 0), (1, 0)])
    np.testing.assert_array_equal(envs.elapsed, [0, 2, 0, 2])
    np.testing.assert_array_equal(envs.tasks, [(1, 1), (4, 2), (3, 3), (4, 4)])

    drawn = set()
    for _ in range(20):  # the same without goals: the masked rows draw theirs, the others keep theirs
        obs, _ = envs.reset(options={"reset_mask": mask})
        np.testing.assert_array_equal(obs, [(0, 0), (2, 0), (0, 0), (1, 0)])
        np.testing.assert_array_equal(envs.tasks[~mask], [(4, 2), (4, 4)])
        drawn |= set(map(tuple, envs.tasks[mask]))
    assert len(drawn) > 5
    # The clocks run on separately: the unmasked environments have two steps less to go.
    for t in range(1, HORIZON + 1):
        terminated = envs.step(np.zeros(4, int))[2]
        np.testing.assert_array_equal(terminated, [t >= HORIZON, t >= HORIZON - 2] * 2)


def draw_goals(seed, global_seed):
    """24 goals from each twin, with the global generators seeded before anything is built."""
    np.random.seed(global_seed)
    random.seed(global_seed)
    before = repr(np.random.get_state()), random.getstate()
    env, envs = GridWorldEnv(), GridWorldVectorEnv(3)
    goals = []
    for i in range(8):
        first = seed if i == 0 else None
        env.reset(seed=first)
        envs.reset(seed=first)
        env.step(UP)
        envs.step(np.array([UP] * 3))
        goals.append([*env.task, *envs.tasks.flatten()])
    assert (repr(np.random.get_state()), random.getstate()) == before, "a global generator was used"
    return np.array(goals)


def test_goals_come_from_the_environments_own_generators():
    assert (draw_goals(5, global_seed=0) == draw_goals(5, global_seed=1)).all()
    seeded, unseeded, again = draw_goals(6, 0), draw_goals(None, 0), draw_goals(None, 0)
    for columns in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)):  # each environment by itself
        assert (seeded[:, columns] != draw_goals(5, 0)[:, columns]).any()
        assert (unseeded[:, columns] != again[:, columns]).any()


def test_a_saved_state_continues():
    """Another environment that loads it, after a way through JSON, takes the same steps and draws the same goals."""
    envs, other = GridWorldVectorEnv(5), GridWorldVectorEnv(5)
    envs.reset(seed=1)
    other.reset(seed=2)
    rng = np.random.default_rng(0)
    for _ in range(4):
        envs.step(rng.integers(5, size=5))
    envs.reset(options={"reset_mask": np.array([True, False, False, True, False])})
    envs.step(rng.integers(5, size=5))
    state = json.loads(json.dumps(envs.state_dict()))  # plain values

    futures = []
    for vector in (envs, other):  # the first one goes on, which must not touch the state
        vector.load_state_dict(state)
        rng = np.random.default_rng(1)
        future = []
        for _ in range(100):
            step = vector.step(rng.integers(5, size=5))
            future += [*step[:4], vector.tasks.copy(), vector.elapsed.copy()]
            if step[2].any():
                future.append(vector.reset(options={"reset_mask": step[2]})[0])
        futures.append(future)
    assert len(futures[0]) == len(futures[1]) > 600
    for one, two in zip(*futures, strict=True):
        np.testing.assert_array_equal(one, two, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def drawn_by(render_mode, goal, actions):
    env = GridWorldEnv(3, render_mode=render_mode)
    env.reset(options={"task": goal})
    for action in actions:
        env.step(action)
    return env.render()


def test_ansi():
    assert drawn_by("ansi", (2, 0), [UP]) == ". . .\nA . .\n. . G"
    assert drawn_by("ansi", (1, 2), [RIGHT, RIGHT]) == ". G .\n. . .\n. . A"
    assert drawn_by("ansi", (0, 1), [UP]) == ". . .\n* . .\n. . ."


def cells_with(image, colour):
    """The cells (x, y) in which the colour occurs; row 0 of the image is the top, where y is largest."""
    rows, columns = np.nonzero((image == colour).all(axis=2))
    return {(int(column) // 32, 2 - int(row) // 32) for row, column in zip(rows, columns, strict=True)}


@pytest.mark.parametrize("actions, agent", [([UP], (0, 1)), ([RIGHT, RIGHT], (2, 0)), ([UP, UP, RIGHT], (1, 2))])
@pytest.mark.parametrize("goal", [(2, 0), (1, 2)])  # two of the six pairs have the agent on the goal
def test_rgb_array(actions, agent, goal):
    image = drawn_by("rgb_array", goal, actions)
    assert image.dtype == np.uint8 and image.shape == (96, 96, 3)
    assert cells_with(image, (40, 80, 200)) == {agent}
    assert cells_with(image, (120, 200, 120)) == {goal}
    blank = {(x, y) for x in range(3) for y in range(3)} - {agent, goal}
    assert blank <= cells_with(image, (255, 255, 255)) <= blank | {agent}  # white surrounds an agent off the goal
