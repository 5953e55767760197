"""Tests of varibad_hyper.py's environments: tasks against slow plain formulas and Gymnasium, meta-episodes by hand."""

import copy
import math
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from varibad_hyper import MUJOCO_ENVS, Args, MetaEpisodes, make_args, make_envs, parse_args

MUJOCO = ["Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid"]
SIZES = {"Cheetah-Dir": (20, 6), "Walker": (17, 6), "Ant-Dir": (27, 8), "Humanoid": (348, 17)}  # observation, action
FRAME_SKIP = {"Cheetah-Dir": 5, "Walker": 4, "Ant-Dir": 5, "Humanoid": 5}
DT = {"Cheetah-Dir": 0.05, "Walker": 0.016, "Ant-Dir": 0.05, "Humanoid": 0.015}
ACTION_SCALE = {"Cheetah-Dir": 1, "Walker": 1, "Ant-Dir": 1, "Humanoid": 0.4}
WALKER_FIELDS = {"body_mass": 8, "body_inertia": 24, "geom_friction": 24, "dof_damping": 9}
HORIZON = 200
GAMMA = 0.9

every_task = pytest.mark.parametrize("name", MUJOCO)


def random_actions(rng, envs, scale=2.0):
    """Float32, as the policy's, and beyond [-1, 1]."""
    return rng.uniform(-scale, scale, envs.action_space.shape).astype(np.float32)


def arrays(struct):
    """Copies of every array of a MuJoCo struct, by name."""
    names = [name for name in dir(struct) if not name.startswith("_")]
    return {name: np.copy(x) for name in names if isinstance(x := getattr(struct, name), np.ndarray)}


def changed(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


def everything(envs, i):
    """All that decides how environment i goes on: MuJoCo's state with warm start and controls, the model, our own."""
    model, data = envs.models[i], envs.data[i]
    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return arrays(model) | {"state": state, "task": envs.tasks[i].copy(), "elapsed": envs.elapsed[i]}


# ---------------------------------------------------------------------------------------------------------------------
# One environment at a time: the tasks' definitions, once more and slowly


def plain_position(name, model, data):
    """The (x, y) whose velocity is rewarded."""
    if name == "Humanoid":  # the centre of mass
        return [sum(model.body_mass * data.xipos[:, axis]) / sum(model.body_mass) for axis in (0, 1)]
    return data.body("torso").xpos[:2].tolist() if name == "Ant-Dir" else [data.qpos[0], 0.0]


def plain_obs(name, data):
    qpos, qvel = data.qpos.tolist(), data.qvel.tolist()
    if name == "Cheetah-Dir":
        obs = qpos[1:] + qvel + data.body("torso").xpos.tolist()
    elif name == "Walker":
        obs = qpos[1:] + [min(max(v, -10.0), 10.0) for v in qvel]
    elif name == "Ant-Dir":
        obs = qpos[2:] + qvel
    else:
        obs = qpos[2:] + qvel + data.cinert[1:].flatten().tolist() + data.cvel[1:].flatten().tolist()
        obs += data.qfrc_actuator[6:].tolist() + data.cfrc_ext[1:].flatten().tolist()
    return np.array(obs, np.float32)


def plain_reward(name, data, velocity, action, task):
    """Reward, and the sum over the contact forces that is in it."""
    (vx, vy), squares = velocity, sum(float(a) ** 2 for a in action)
    if name == "Cheetah-Dir":
        return task[0] * vx - 0.05 * squares, 0.0
    if name == "Walker":
        return vx + 1 - 1e-3 * squares, 0.0
    speed, forces = vx * math.cos(task[0]) + vy * math.sin(task[0]), data.cfrc_ext.flatten().tolist()
    if name == "Ant-Dir":
        contact = sum(min(max(force, -1.0), 1.0) ** 2 for force in forces)
        return speed - 0.5 * squares - 0.5e-3 * contact + 1, contact
    contact = sum(force**2 for force in forces)
    return 1.25 * speed - 0.1 * 0.4**2 * squares - min(0.5e-6 * contact, 10) + 5, contact


def plain_fallen(name, data):
    if name == "Walker":
        return not (0.8 < data.qpos[1] < 2 and abs(data.qpos[2]) < 1)
    if name == "Ant-Dir":
        return not 0.2 <= data.qpos[2] <= 1
    return name == "Humanoid" and (data.qpos[2] < 1 or data.qpos[2] > 2)


def plain_step(name, model, data, action, task):
    """Steps `data`, substep by substep; returns observation, reward, fallen, the contact forces' sum."""
    before = plain_position(name, model, data)
    for j, (low, high) in enumerate(model.actuator_ctrlrange):
        data.ctrl[j] = min(max(ACTION_SCALE[name] * action[j], low), high)
    for _ in range(FRAME_SKIP[name]):
        mujoco.mj_step(model, data)
    mujoco.mj_rnePostConstraint(model, data)
    after = plain_position(name, model, data)
    velocity = [(b - a) / DT[name] for a, b in zip(before, after, strict=True)]
    reward, contact = plain_reward(name, data, velocity, action, task)
    return plain_obs(name, data), reward, plain_fallen(name, data), contact


# ---------------------------------------------------------------------------------------------------------------------
# Gymnasium's API and sizes


@every_task
def test_vector_env_api(name):
    envs = MUJOCO_ENVS[name](3)
    obs_dim, action_dim = SIZES[name]
    assert isinstance(envs, VectorEnv) and envs.num_envs == 3
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert envs.single_observation_space == gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    assert envs.single_action_space == gym.spaces.Box(-1, 1, (action_dim,), np.float32)
    assert envs.observation_space == batch_space(envs.single_observation_space, 3)
    assert envs.action_space == batch_space(envs.single_action_space, 3)

    obs, info = envs.reset(seed=0)
    assert obs in envs.observation_space and obs.dtype == np.float32 and info == {}
    obs, rewards, terminated, truncated, info = envs.step(envs.action_space.sample())
    assert obs in envs.observation_space and obs.dtype == np.float32 and info == {}
    assert rewards.shape == terminated.shape == truncated.shape == (3,)
    assert rewards.dtype.kind == "f" and terminated.dtype == truncated.dtype == bool
    envs.close()


@every_task
def test_seconds_per_step(name):
    envs = MUJOCO_ENVS[name](2)
    envs.reset(seed=0)
    envs.step(np.zeros(envs.action_space.shape, np.float32))
    assert envs.dt == pytest.approx(DT[name], abs=1e-12)
    assert [data.time for data in envs.data] == pytest.approx([DT[name]] * 2, abs=1e-12)  # by MuJoCo's own clock


@pytest.mark.parametrize(
    "name, obs_dim, action_dim, episodes, max_steps",
    [
        ("Grid-World", 3, 5, 4, 60),
        ("Cheetah-Dir", 20, 6, 1, 200),
        ("Walker", 18, 6, 2, 400),
        ("Ant-Dir", 27, 8, 1, 200),
        ("Humanoid", 348, 17, 1, 200),
    ],
)
def test_sizes_of_the_presets(name, obs_dim, action_dim, episodes, max_steps):
    meta = make_envs(parse_args(["--env", name]), 2)
    assert (meta.num_envs, meta.obs_dim, meta.action_dim) == (2, obs_dim, action_dim)
    assert (meta.episodes_per_task, meta.max_steps) == (episodes, max_steps)
    assert meta.has_flag == (episodes > 1) and meta.discrete == (name == "Grid-World")
    obs = meta.reset(0)
    step = meta.step(meta.envs.action_space.sample())
    for x in (obs, step.next_obs, step.policy_obs):
        assert x.shape == (2, obs_dim) and x.dtype == np.float32


def test_grid_worlds_arguments():
    assert len(make_envs(Args(), 1).envs.all_tasks) == 24
    meta = make_envs(Args(grid_goals="far", grid_size=6, grid_horizon=9, episodes_per_task=3), 1)
    assert len(meta.envs.all_tasks) == 6 * 6 - 4 and meta.max_steps == 27


# ---------------------------------------------------------------------------------------------------------------------
# Physics, observations, rewards


@every_task
def test_steps_follow_the_definitions(name):
    rng = np.random.default_rng(0)
    envs = MUJOCO_ENVS[name](4)
    obs, _ = envs.reset(seed=1)
    for i, (model, data) in enumerate(zip(envs.models, envs.data, strict=True)):
        fresh = mujoco.MjData(model)
        fresh.qpos[:], fresh.qvel[:] = data.qpos, data.qvel
        mujoco.mj_forward(model, fresh)
        np.testing.assert_array_equal(obs[i], plain_obs(name, fresh))

    contacts, fallen_envs, clipped = [], set(), False
    for step in range(40):
        if step == 20:  # a robot thrown at the floor, for contact costs beyond their limit
            envs.data[0].qvel[1 if name in ("Cheetah-Dir", "Walker") else 2] = -30
        actions = random_actions(rng, envs)
        copies = [copy.copy(data) for data in envs.data]
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        for i, (model, data) in enumerate(zip(envs.models, copies, strict=True)):
            plain, reward, fallen, contact = plain_step(name, model, data, actions[i], envs.tasks[i])
            np.testing.assert_array_equal(envs.data[i].qpos, data.qpos)
            np.testing.assert_array_equal(envs.data[i].qvel, data.qvel)
            np.testing.assert_array_equal(envs.data[i].ctrl, data.ctrl)
            np.testing.assert_array_equal(obs[i], plain)
            assert rewards[i] == pytest.approx(reward, rel=1e-5, abs=1e-5)
            assert terminated[i] == fallen
            contacts.append(contact)
            fallen_envs |= {i} if fallen else set()
            clipped |= bool((np.abs(data.qvel) > 10).any())
        assert not truncated.any()

    # Every term has been at work.
    if name == "Walker":
        assert clipped
    if name == "Ant-Dir":
        assert max(contacts) > 10 and any(contact % 1 > 0.01 for contact in contacts)  # clipped and unclipped forces
    if name == "Humanoid":
        assert 0.5e-6 * max(contacts) > 20 and sum(0.1 < 0.5e-6 * contact < 10 for contact in contacts) > 5
    assert name == "Cheetah-Dir" or fallen_envs


@pytest.mark.parametrize(
    "name, task, gym_id, weights",
    [
        ("Cheetah-Dir", 1, "HalfCheetah-v5", {"ctrl_cost_weight": 0.05}),
        ("Cheetah-Dir", -1, "HalfCheetah-v5", {"ctrl_cost_weight": 0.05, "forward_reward_weight": -1}),
        ("Walker", 1, "Walker2d-v5", {"xml_file": "walker2d.xml"}),
        ("Ant-Dir", 0, "Ant-v5", {"include_cfrc_ext_in_observation": False}),
        ("Humanoid", 0, "Humanoid-v5", {}),
    ],
)
def test_gymnasiums_own_robots_agree(name, task, gym_id, weights):
    """With the task's weights, Gymnasium's reward is the task's (forwards, and until the robot falls)."""
    rng = np.random.default_rng(2)
    envs = MUJOCO_ENVS[name](2)
    oracle = gym.make(gym_id, **weights).unwrapped
    if name == "Walker":
        oracle.model.opt.timestep = 0.004
    assert oracle.dt == pytest.approx(envs.dt) and oracle.frame_skip == FRAME_SKIP[name]

    envs.reset(seed=3, options={"tasks": np.full(envs.tasks.shape, task)})
    mujoco.mj_resetData(oracle.model, oracle.data)
    oracle.set_state(envs.data[1].qpos, envs.data[1].qvel)
    steps = 0
    for _ in range(30):
        actions = random_actions(rng, envs, scale=1.0)  # Gymnasium takes the cost on the clipped ones
        obs, rewards, terminated, *_ = envs.step(actions)
        theirs, reward, fallen, *_ = oracle.step(actions[1] * np.float32(ACTION_SCALE[name]))
        np.testing.assert_array_equal(envs.data[1].qpos, oracle.data.qpos)
        np.testing.assert_array_equal(envs.data[1].qvel, oracle.data.qvel)
        np.testing.assert_array_equal(obs[1, : theirs.size], theirs.astype(np.float32))
        assert terminated[1] == fallen
        if fallen:
            break
        assert rewards[1] == pytest.approx(reward, rel=1e-5, abs=1e-5)
        steps += 1
    assert steps > 8


# ---------------------------------------------------------------------------------------------------------------------
# Ends of episodes

EPS = 1e-6  # on either side of a bound
HEALTHY = [("Walker", 1, 0.8, 2), ("Walker", 2, -1, 1), ("Ant-Dir", 2, 0.2, 1), ("Humanoid", 2, 1, 2)]  # index of qpos


@pytest.mark.parametrize("name, index, low, high", HEALTHY)
def test_falls_end_the_episode(name, index, low, high):
    envs = MUJOCO_ENVS[name](5)
    envs.reset(seed=0, options={"tasks": np.ones(envs.tasks.shape)})
    for model in envs.models:
        model.opt.timestep = 1e-10  # time all but stands still, so that the step ends where it began
    values = [low - EPS, low + EPS, high - EPS, high + EPS, (low + high) / 2]
    for data, value in zip(envs.data, values, strict=True):
        data.qpos[:], data.qvel[:] = data.model.qpos0, 0
        data.qpos[index] = value
    _, _, terminated, truncated, _ = envs.step(np.zeros(envs.action_space.shape, np.float32))
    assert terminated.tolist() == [True, False, False, True, False]
    assert not truncated.any()


@pytest.mark.parametrize("name, values, fallen", [
    ("Walker", [0.8, 2.0], True), ("Ant-Dir", [0.2, 1.0], False), ("Humanoid", [1.0, 2.0], False),
])  # fmt: skip
def test_falls_exactly_on_the_bound(name, values, fallen):
    envs = MUJOCO_ENVS[name](2)
    envs.reset(seed=0)
    for data, value in zip(envs.data, values, strict=True):
        data.qpos[1 if name == "Walker" else 2] = value
    assert envs.unhealthy().tolist() == [fallen, fallen]


def test_cheetah_never_falls():
    envs = MUJOCO_ENVS["Cheetah-Dir"](3)
    envs.reset(seed=0)
    for data, (z, angle) in zip(envs.data, [(-0.5, 0), (3, 0), (0, math.pi)], strict=True):
        data.qpos[1:3] = z, angle
    for _ in range(20):
        assert not envs.step(np.ones((3, 6), np.float32))[2].any()


@every_task
def test_time_limit_at_200_steps(name):
    """Also for an environment that was reset alone, later."""
    envs = MUJOCO_ENVS[name](2)
    envs.reset(seed=0)
    actions = np.zeros(envs.action_space.shape, np.float32)
    truncated = []
    for step in range(HORIZON + 50):
        if step == 50:
            envs.reset(options={"reset_mask": np.array([False, True])})
        truncated.append(envs.step(actions)[3])
    first, second = np.transpose(truncated).tolist()
    assert first[:HORIZON] == [False] * (HORIZON - 1) + [True]
    assert second == [False] * (HORIZON + 49) + [True]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks, resets, seeds


def test_walkers_task_scales_its_own_model_only():
    envs = MUJOCO_ENVS["Walker"](3)
    path = Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / "walker2d.xml"
    defaults = arrays(mujoco.MjModel.from_xml_path(str(path)))
    for mask in ([True, True, True], [True, True, True], [False, True, False]):  # factors must not compound
        envs.reset(options={"reset_mask": np.array(mask)})
        for model, task in zip(envs.models, envs.tasks, strict=True):
            ours = arrays(model)
            assert changed(defaults, ours) == set(WALKER_FIELDS)
            start = 0
            for field, size in WALKER_FIELDS.items():
                expected = defaults[field].flatten() * task[start : start + size]
                np.testing.assert_array_equal(ours[field].flatten(), expected)
                start += size
            assert start == task.size == 65
        assert not changed(defaults, arrays(envs.default_model))
    assert np.unique(envs.tasks).size == envs.tasks.size  # all 65 factors of all environments are their own


def test_walkers_factors_are_uniform_in_the_exponent():
    envs = MUJOCO_ENVS["Walker"](100)
    envs.reset(seed=0)
    exponents = np.log(envs.tasks)
    exponents[:, :-9] /= np.log(1.5)
    exponents[:, -9:] /= np.log(1.3)
    for group in (exponents[:, :8], exponents[:, 8:-9], exponents[:, -9:]):
        assert -3 <= group.min() < -2.95 and 2.95 < group.max() <= 3
        assert group.std() == pytest.approx(math.sqrt(3), abs=0.1)  # of U(-3, 3)
    correlations = np.corrcoef(exponents, rowvar=False)[np.triu_indices(65, 1)]
    assert np.abs(correlations).max() < 0.5  # all entries independent


def test_cheetahs_directions():
    envs = MUJOCO_ENVS["Cheetah-Dir"](200)
    envs.reset(seed=0)
    assert envs.tasks.shape == (200, 1)
    assert np.unique(envs.tasks).tolist() == [-1, 1] and 70 < (envs.tasks == 1).sum() < 130


@pytest.mark.parametrize("name", ["Ant-Dir", "Humanoid"])
def test_angles_cover_the_circle(name):
    envs = MUJOCO_ENVS[name](1)
    envs.reset(seed=0)
    angles = []
    for _ in range(400):
        envs.reset()
        angles.append(envs.tasks[0, 0])
    assert 0 <= min(angles) and max(angles) < 2 * math.pi
    assert np.histogram(angles, 8, (0, 2 * math.pi))[0].min() > 25  # 50 expected


@pytest.mark.parametrize("name, qpos_noise, qvel_noise, gaussian", [
    ("Cheetah-Dir", 0.1, 0.1, True), ("Walker", 0.005, 0.005, False),
    ("Ant-Dir", 0.1, 0.1, True), ("Humanoid", 0.01, 0.01, False),
])  # fmt: skip
def test_initial_states(name, qpos_noise, qvel_noise, gaussian):
    """The noise of Gymnasium's own classes around the model's initial state."""
    envs = MUJOCO_ENVS[name](40)
    envs.reset(seed=0)
    qpos = np.array([data.qpos - data.model.qpos0 for data in envs.data])
    qvel = np.array([data.qvel for data in envs.data])
    uniform = [(qpos, qpos_noise)] if gaussian else [(qpos, qpos_noise), (qvel, qvel_noise)]
    for x, noise in uniform:
        assert 0.98 * noise < np.abs(x).max() <= noise + 1e-12
        assert x.std() == pytest.approx(noise / math.sqrt(3), rel=0.1)
    if gaussian:
        assert qvel.std() == pytest.approx(qvel_noise, rel=0.1) and np.abs(qvel).max() > 2.5 * qvel_noise


def trajectory(name, seed):
    """Tasks, observations and rewards of a few steps with a partial reset in between."""
    envs = MUJOCO_ENVS[name](3)
    rng = np.random.default_rng(0)
    record = [envs.reset(seed=seed)[0], envs.tasks.copy()]
    for step in range(6):
        record += envs.step(random_actions(rng, envs))[:2]
        if step == 3:
            record += [envs.reset(options={"reset_mask": np.array([True, False, True])})[0], envs.tasks.copy()]
    return record


@every_task
def test_seeds(name):
    np.random.seed(0)
    first = trajectory(name, 5)
    np.random.seed(1)
    state = np.random.get_state()
    second = trajectory(name, 5)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(state, np.random.get_state(), strict=True):
        np.testing.assert_array_equal(x, y)  # the global generator was not used
    other = trajectory(name, 6)
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[-2], other[-2])
    assert len(np.unique(first[0], axis=0)) == 3  # nor are the environments each other's copies


@every_task
def test_reset_mask_touches_only_the_masked(name):
    rng = np.random.default_rng(0)
    envs = MUJOCO_ENVS[name](4)
    envs.reset(seed=0)
    for _ in range(3):
        stepped, *_ = envs.step(random_actions(rng, envs))
    before, tasks = [everything(envs, i) for i in range(4)], envs.tasks.copy()
    obs, _ = envs.reset(options={"reset_mask": np.array([False, True, False, True])})

    assert envs.elapsed.tolist() == [3, 0, 3, 0]
    assert [x.time for x in envs.data] == pytest.approx([3 * DT[name], 0, 3 * DT[name], 0])
    for i in (0, 2):
        assert not changed(before[i], everything(envs, i))
        np.testing.assert_array_equal(obs[i], stepped[i])
    for i in (1, 3):
        data = envs.data[i]
        assert {"state", "elapsed"} <= changed(before[i], everything(envs, i)) and not data.ctrl.any()
        assert np.abs(data.qpos - data.model.qpos0).max() < 0.2
        np.testing.assert_array_equal(obs[i], plain_obs(name, data))
    if name != "Cheetah-Dir":  # whose two directions may be drawn again
        assert not np.isin(envs.tasks[[1, 3]], tasks).any()


@every_task
def test_given_tasks(name):
    envs = MUJOCO_ENVS[name](3)
    envs.reset(seed=0)
    before = envs.tasks.copy()
    given = np.linspace(0.5, 1.5, before.size).reshape(before.shape)
    envs.reset(options={"reset_mask": np.array([True, False, True]), "tasks": given})
    np.testing.assert_array_equal(envs.tasks, [given[0], before[1], given[2]])
    if name == "Walker":  # the physics are the task's
        factors = [model.body_mass[1] / envs.default_model.body_mass[1] for model in envs.models]
        np.testing.assert_allclose(factors, envs.tasks[:, 1], rtol=1e-12)

    envs.reset(options={"tasks": given})
    expected, given[:] = given.copy(), -9  # a copy must have been made
    np.testing.assert_array_equal(envs.tasks, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Meta-episodes on a probe whose episodes are known


class Probe(VectorEnv):
    """Environment i's episodes end as in `script[i]`: "f" a fall, "t" the time limit, "b" both at once, "-" neither.

    The observation is (task, episode, step): the task's number, the episode's number since the beginning, the steps in
    it. Tasks are numbered 1, 2, ... as they are drawn.
    """

    horizon = 3

    def __init__(self, script):
        self.script, self.num_envs = script, len(script)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.single_action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.tasks = np.zeros((self.num_envs, 1))
        self.episode, self.steps, self.now = np.zeros(self.num_envs), np.zeros(self.num_envs), 0

    def observe(self):
        return np.column_stack([self.tasks, self.episode, self.steps]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        assert mask.any()  # as SyncVectorEnv demands
        self.tasks[mask] = options["tasks"][mask] if "tasks" in options else self.tasks[mask] + 1
        self.episode[mask] += 1
        self.steps[mask] = 0
        return self.observe(), {}

    def step(self, actions):
        self.steps += 1
        ends = np.array([line[self.now] for line in self.script])
        self.now += 1
        rewards = actions[:, 0] + 10 * self.now
        return self.observe(), rewards, np.isin(ends, ["f", "b"]), np.isin(ends, ["t", "b"]), {}


SCRIPT = ["--t--tf-f-", "f-f--t--b-", "-f--t--tf-", "----------"]
META_EPISODES = {  # (episode_done, task_done, time_limit) of each step, by hand
    1: [
        ("0010011010", "0010011010", "0010010000"),
        ("1010010010", "1010010010", "0000010000"),
        ("0100100110", "0100100110", "0000100100"),
        ("0000000000", "0000000000", "0000000000"),
    ],
    2: [
        ("0010011010", "0000010010", "0000010000"),
        ("1010010010", "0010000010", "0000000000"),
        ("0100100110", "0000100010", "0000100000"),
        ("0000000000", "0000000000", "0000000000"),
    ],
    3: [
        ("0010011010", "0000001000", "0000000000"),
        ("1010010010", "0000010000", "0000010000"),
        ("0100100110", "0000000100", "0000000100"),
        ("0000000000", "0000000000", "0000000000"),
    ],
}


@pytest.mark.parametrize("episodes_per_task", META_EPISODES)
def test_bookkeeping_of_meta_episodes(episodes_per_task):
    meta = MetaEpisodes(Probe(SCRIPT), episodes_per_task, GAMMA)
    flag = [0] if episodes_per_task > 1 else []
    assert meta.max_steps == 3 * episodes_per_task and meta.obs_dim == 3 + len(flag)
    assert meta.reset().tolist() == [[1, 1, 0, *flag]] * 4

    task, life, episode, steps = ([x] * 4 for x in (1, 1, 0, 0))  # life: episodes since the beginning
    for now in range(10):
        actions = np.random.default_rng(now).normal(size=(4, 2)).astype(np.float32)
        next_obs, rewards, *ends, policy_obs, _ = meta.step(actions)
        assert rewards.tolist() == (actions[:, 0] + 10 * (now + 1)).tolist()
        assert all(x.dtype == bool for x in ends)
        for i in range(4):
            episode_done, task_done, time_limit = (line[now] == "1" for line in META_EPISODES[episodes_per_task][i])
            assert [bool(x[i]) for x in ends] == [task_done, time_limit], (i, now)
            steps[i] += 1
            assert next_obs[i].tolist() == [task[i], life[i], steps[i], *[int(episode_done) for _ in flag]]
            if episode_done:
                task[i], life[i], steps[i] = task[i] + task_done, life[i] + 1, 0
                episode[i] = 0 if task_done else episode[i] + 1
            assert policy_obs[i].tolist() == [task[i], life[i], steps[i], *flag]
            assert meta.episode[i] == episode[i]

    tasks = np.array([[7], [8], [9], [5]])
    assert meta.reset(tasks=tasks)[:, 0].tolist() == [7, 8, 9, 5]  # a new start in the middle of everything
    assert meta.episode.tolist() == [0, 0, 0, 0]
    assert meta.take_finished() == [] and not meta.returns.any() and not meta.lengths.any()


class SuccessProbe(Probe):
    """The first environment succeeds at step 4, the third in every step, the others never."""

    success = np.zeros(4, bool)

    def step(self, actions):
        step = super().step(actions)
        self.success = np.array([self.now == 4, False, True, False])
        return step


@pytest.mark.parametrize("probe", [Probe, SuccessProbe])
@pytest.mark.parametrize("episodes_per_task", META_EPISODES)
def test_finished_meta_episodes(episodes_per_task, probe):
    """Returns, successes and lengths by episode, kept in plain Python; each is handed out once."""
    meta = MetaEpisodes(probe(SCRIPT), episodes_per_task, GAMMA)
    meta.reset()
    assert meta.take_finished() == []
    running, expected, handed_out = [[[]] for _ in range(4)], [], []  # (reward, success) by episode and step
    for now in range(10):
        actions = np.random.default_rng(now).normal(size=(4, 2)).astype(np.float32)
        rewards = meta.step(actions).rewards.tolist()
        successes = meta.envs.success.tolist() if probe is SuccessProbe else [False] * 4
        for i in range(4):
            episode_done, task_done, _ = (line[now] == "1" for line in META_EPISODES[episodes_per_task][i])
            running[i][-1].append((rewards[i], successes[i]))
            if task_done:
                returns = [sum(reward for reward, _ in episode) for episode in running[i]]
                succeeded = [float(any(success for _, success in episode)) for episode in running[i]]
                lengths = [len(episode) for episode in running[i]]
                expected.append((i, returns, succeeded if probe is SuccessProbe else None, lengths))
                running[i] = []
            if episode_done:
                running[i].append([])
        if now in (1, 5, 6, 9):  # it is asked for them now and then
            handed_out += meta.take_finished()
            assert meta.take_finished() == []
    for episode, (env, returns, successes, lengths) in zip(handed_out, expected, strict=True):
        assert (episode.env, episode.returns.tolist(), episode.lengths.tolist()) == (env, returns, lengths)
        assert (None if episode.successes is None else episode.successes.tolist()) == successes
    assert len(expected) == {1: 12, 2: 6, 3: 3}[episodes_per_task]
    if probe is SuccessProbe:  # one success within an episode counts, and for that episode alone
        first = [success for env, _, successes, _ in expected if env == 0 for success in successes]
        assert first == {1: [0, 1, 0, 0], 2: [0, 1, 0, 0], 3: [0, 1, 0]}[episodes_per_task]


@pytest.mark.parametrize("name", ["Grid-World", *MUJOCO])
def test_meta_episodes_pass_the_seed_on(name):
    def start(seed):
        meta = make_envs(parse_args(["--env", name]), 8)
        return np.column_stack([meta.reset(seed), meta.envs.tasks])

    np.testing.assert_array_equal(start(1), start(1))
    assert not np.array_equal(start(1), start(2))


def test_clear_flag():
    obs = torch.tensor([[1.0, 2.0, 1.0], [3.0, 4.0, 0.0]])
    meta = MetaEpisodes(Probe(SCRIPT[:2]), 2, GAMMA)
    assert meta.clear_flag(obs).tolist() == [[1, 2, 0], [3, 4, 0]]
    assert obs[0, -1] == 1  # the argument is left alone
    assert MetaEpisodes(Probe(SCRIPT[:2]), 1, GAMMA).clear_flag(obs).tolist() == obs.tolist()  # there is no flag


# ---------------------------------------------------------------------------------------------------------------------
# Meta-episodes on the tasks


def test_meta_episodes_of_grid_world():
    meta = make_envs(Args(), 6)
    rng = np.random.default_rng(0)
    meta.reset(seed=0)
    goals = []
    for _ in range(4):  # meta-episodes
        goals.append(meta.envs.tasks.copy())
        for step in range(1, 61):
            np.testing.assert_array_equal(meta.envs.tasks, goals[-1])
            positions = meta.envs.positions.copy()
            actions = rng.integers(5, size=6)
            moves = np.array([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])[actions]
            next_obs, rewards, task_done, time_limit, policy_obs, _ = meta.step(actions)
            ended = step % 15 == 0
            cells = np.clip(positions + moves, 0, 4)
            np.testing.assert_array_equal(next_obs, np.column_stack([cells, np.full(6, ended)]))
            np.testing.assert_array_equal(policy_obs, np.zeros((6, 3)) if ended else next_obs)
            np.testing.assert_array_equal(rewards, np.where((cells == goals[-1]).all(axis=1), 1, -0.1))
            assert meta.episode.tolist() == [step % 60 // 15] * 6 and task_done.tolist() == [step == 60] * 6
            assert not time_limit.any()  # the horizon is part of the task
    assert all((a != b).any(axis=1).sum() >= 4 for a, b in zip(goals, goals[1:], strict=False))


def test_meta_episodes_of_walker():
    """Robots are held upright, but for the falls: at steps 2 and 5; at 3, then out of time; out of time twice."""
    meta = make_envs(parse_args(["--env", "Walker"]), 3)
    meta.reset(seed=0)
    envs = meta.envs
    falls = [{2, 5}, {3}, {405}]
    episode_ends = [{2, 5, 205, 405}, {3, 203, 403}, {200, 400, 405}]
    task_ends = [{5, 405}, {203}, {400}]
    time_limits = [{405}, {203}, {400}]
    zeros = np.zeros((3, 6), np.float32)
    for step in range(1, 411):
        for i, data in enumerate(envs.data):
            data.qpos[:], data.qvel[:] = data.model.qpos0, 0
            data.qpos[1] = 0.5 if step in falls[i] else 1.25
        copies, tasks = [copy.copy(data) for data in envs.data], envs.tasks.copy()
        next_obs, rewards, *ends, policy_obs, _ = meta.step(zeros)
        for i, data in enumerate(copies):
            ended = step in episode_ends[i]
            assert [bool(x[i]) for x in ends] == [step in task_ends[i], step in time_limits[i]], (i, step)
            mass = envs.models[i].body_mass[1] / envs.default_model.body_mass[1]
            assert mass == pytest.approx(envs.tasks[i, 1], rel=1e-12)  # the model is the task's
            assert np.array_equal(envs.tasks[i], tasks[i]) == (step not in task_ends[i])
            assert next_obs[i, -1] == ended and policy_obs[i, -1] == 0
            np.testing.assert_array_equal(policy_obs[i, :-1], plain_obs("Walker", envs.data[i]))
            if ended:
                assert envs.data[i].time == envs.elapsed[i] == 0
                assert np.abs(envs.data[i].qpos - data.model.qpos0).max() <= 0.005 + 1e-12
            else:
                np.testing.assert_array_equal(policy_obs[i], next_obs[i])
            if step in task_ends[i]:
                continue  # its model is another one now
            plain, reward, *_ = plain_step("Walker", envs.models[i], data, zeros[i], tasks[i])
            np.testing.assert_array_equal(next_obs[i, :-1], plain)
            assert rewards[i] == pytest.approx(reward, abs=1e-5)


@every_task
def test_single_episodes(name):
    """No flag; out of time and fallen at once is a fall; the neighbours of a reset environment do not notice."""
    meta = make_envs(parse_args(["--env", name, "--episodes-per-task", "1"]), 4)
    envs = meta.envs
    obs = meta.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        obs = meta.step(random_actions(rng, envs, scale=0.3)).policy_obs
    assert obs.shape == (4, SIZES[name][0])
    can_fall = name != "Cheetah-Dir"
    for i in (1, 2):
        envs.data[i].qpos[1 if name == "Walker" else 2] = 5.0
    envs.elapsed[2:] = [HORIZON - 1] * 2
    copies, tasks = [copy.copy(data) for data in envs.data], envs.tasks.copy()
    models = [copy.copy(model) for model in envs.models]
    actions = random_actions(rng, envs)
    next_obs, rewards, task_done, time_limit, policy_obs, _ = meta.step(actions)

    assert task_done.tolist() == [False, can_fall, True, True]
    assert time_limit.tolist() == [False, False, not can_fall, True]
    for i in range(4):
        plain, reward, *_ = plain_step(name, models[i], copies[i], actions[i], tasks[i])
        np.testing.assert_array_equal(next_obs[i], plain)
        assert rewards[i] == pytest.approx(reward, rel=1e-5, abs=1e-5)
        np.testing.assert_array_equal(policy_obs[i], plain_obs(name, envs.data[i]))
        assert np.array_equal(policy_obs[i], next_obs[i]) == (not task_done[i])
        if can_fall:
            assert np.array_equal(envs.tasks[i], tasks[i]) == (not task_done[i])
    meta.reset(tasks=tasks)
    np.testing.assert_array_equal(envs.tasks, tasks)
    assert not envs.elapsed.any()


@pytest.mark.parametrize("name", MUJOCO_ENVS)
def test_environments_do_not_share_their_randomness(name):
    """When environment 0 falls is nothing to environment 1: its next episodes are its own, as an evaluation needs."""
    starts = []
    for resets_of_the_first in (1, 3):
        envs = MUJOCO_ENVS[name](2)
        envs.reset(seed=5)
        for _ in range(resets_of_the_first):
            envs.reset(options={"reset_mask": np.array([True, False])})
        obs, _ = envs.reset(options={"reset_mask": np.array([False, True])})
        starts.append((obs.copy(), envs.tasks.copy()))
    (first, first_tasks), (second, second_tasks) = starts
    assert (first[1] == second[1]).all() and (first_tasks[1] == second_tasks[1]).all()
    assert not (first[0] == second[0]).all()  # the first one did go on


@every_task
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(name, threads):
    """Five environments do not divide among them."""
    results = []
    for envs in (MUJOCO_ENVS[name](5), MUJOCO_ENVS[name](5, threads=threads)):
        rng = np.random.default_rng(1)
        steps = [envs.reset(seed=7)[0], *(x for _ in range(20) for x in envs.step(random_actions(rng, envs))[:4])]
        results.append(steps)
    for one, several in zip(*results, strict=True):
        np.testing.assert_array_equal(one, several)


@pytest.mark.parametrize("name", ["Grid-World", *MUJOCO])
def test_a_saved_state_continues(name, tmp_path):
    """Other environments that load the state from a file give the same steps and the same meta-episodes."""
    args = make_args(name, episodes_per_task=2)
    meta, others = make_envs(args, 3), make_envs(args, 3)
    meta.reset(1)
    others.reset(2)
    rng = np.random.default_rng(0)

    def actions():
        return rng.integers(5, size=3) if meta.discrete else random_actions(rng, meta.envs)

    for _ in range(25):
        meta.step(actions())
    meta.take_finished()
    torch.save(meta.state_dict(), tmp_path / "state.pt")
    others.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal(others.policy_obs, meta.policy_obs)
    for _ in range(2 * meta.max_steps):
        action = actions()
        for one, other in zip(meta.step(action), others.step(action), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    finished, others_finished = meta.take_finished(), others.take_finished()
    assert len(finished) == len(others_finished) >= 6
    for one, other in zip(finished, others_finished, strict=True):
        assert one.env == other.env and one.successes is other.successes is None
        np.testing.assert_array_equal(one.returns, other.returns)
        np.testing.assert_array_equal(one.lengths, other.lengths)
