"""show.py: what it draws is what the agent did and believed, against the scripts' evaluation and slow plain code.

The initialisers' table and picture are at the end.
"""

import itertools
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import matplotlib.image
import mujoco
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import gridworld
import reproduce
import rl2_hyper
import show
import varibad_hyper
from hyperinit import HYPER_SCHEMES

ROOT = Path(__file__).parent.parent
SCRIPTS = {"varibad": varibad_hyper, "rl2": rl2_hyper}
both_scripts = pytest.mark.parametrize("script", SCRIPTS)
RUN = ["--num-envs", "4", "--num-minibatches", "2", "--learning-starts", "0", "--eval-interval", "0", "--no-cuda"]
RUN += ["--eval-tasks", "3", "--save-model", "--base-layers", "16", "16"]
FLAGS = {
    "Grid-World": ["--num-steps", "60", "--total-timesteps", "960", "--learning-rate", "3e-3"],
    "Walker": ["--env", "Walker", "--num-steps", "60", "--total-timesteps", "720", "--latent-dim", "4"],
    "Cheetah-Dir": ["--env", "Cheetah-Dir", "--num-steps", "20", "--total-timesteps", "160"],
    "Pick-Place": ["--env", "Pick-Place", "--num-steps", "20", "--total-timesteps", "160", "--vae-buffer", "3"],
    "one-hot": ["--embedding", "one-hot", "--num-steps", "20", "--total-timesteps", "160"],
    "no-decoder": ["--no-decode-reward", "--decode-state", "--num-steps", "20", "--total-timesteps", "160"],
}


@pytest.fixture(autouse=True)
def mujoco_gl(monkeypatch):
    """show.py sets this variable for its own process; here it is as it was after every test."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))
    if not os.environ["MUJOCO_GL"]:
        monkeypatch.delenv("MUJOCO_GL")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(script, run)` gives the folder of a short run and what show.py loads from it; each is made once."""
    made = {}

    def get(script, run):
        if (script, run) not in made:
            flags = [word for word in FLAGS[run] if script == "varibad" or word not in ("--vae-buffer", "3")]
            flags = [*RUN, *flags, "--runs-dir", str(tmp_path_factory.mktemp("runs"))]
            folder = SCRIPTS[script].main(SCRIPTS[script].parse_args(flags))
            made[script, run] = folder, show.load(folder, show.read(folder)[0])
        return made[script, run]

    return get


@pytest.fixture(scope="module")
def renderer():
    """A value of MUJOCO_GL that draws; tests that need one are skipped where there is none."""
    try:
        return show.find_renderer()
    except SystemExit:
        pytest.skip("MuJoCo cannot render on this machine: install libosmesa6")


def call(*words):
    show.main(show.parse_args([str(word) for word in words]))


def refusal(capsys, *words):
    """The one sentence with which show.py refuses a command line."""
    capsys.readouterr()  # what a fixture printed, when its first test is this one
    with pytest.raises(SystemExit) as exit:
        call(*words)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    return message


# --- What the agent did


@both_scripts
@pytest.mark.parametrize("run, tasks", [("Grid-World", range(24)), ("Walker", [0, 2])])
def test_returns_are_the_evaluations_bit_for_bit(trained, script, run, tasks):
    _, agent = trained(script, run)
    evaluated = SCRIPTS[script].evaluate(agent.agent, agent.envs, SCRIPTS[script].seeds_of(agent.args)["eval_envs"])
    metas = [show.play(agent, task) for task in tasks]
    assert [meta.returns() for meta in metas] == [evaluated[task].returns.tolist() for task in tasks]
    assert len({tuple(meta.returns()) for meta in metas}) > 1
    for task, meta in zip(tasks, metas, strict=True):
        length = len(meta.rewards)
        assert {len(x) for x in (meta.obs, meta.actions, meta.next_obs, meta.episode, meta.success)} == {length}
        assert len(meta.embeddings) == length + 1
        assert run == "Walker" or meta.task.tolist() == gridworld.goal_cells()[task].tolist()


@both_scripts
def test_grid_world_is_played_by_its_rules(trained, script):
    _, agent = trained(script, "Grid-World")
    for task in (0, 7, 23):
        meta = show.play(agent, task)
        x = y = 0
        for t in range(60):
            assert meta.obs[t].tolist() == [x, y, 0]
            step_x, step_y = gridworld.MOVES[meta.actions[t]]
            x, y = min(max(x + step_x, 0), 4), min(max(y + step_y, 0), 4)
            ends = t % 15 == 14
            assert meta.next_obs[t].tolist() == [x, y, ends] and meta.episode[t] == t // 15
            assert meta.rewards[t] == (1 if [x, y] == meta.task.tolist() else -0.1)
            if ends:
                x = y = 0


@both_scripts
@pytest.mark.parametrize("run", ["Grid-World", "Walker"])
def test_actions_are_greedy_and_beliefs_are_those_of_the_whole_meta_episode(trained, script, run):
    """The encoder reads the whole meta-episode at once, and the policy acts on what it makes of it."""
    _, agent = trained(script, run)
    meta = show.play(agent, 1)
    actions = torch.as_tensor(meta.actions)
    actions = torch.nn.functional.one_hot(actions, 5).float() if run == "Grid-World" else actions
    inputs = [
        actions[:, None],
        torch.as_tensor(meta.next_obs)[:, None],
        torch.as_tensor(meta.rewards, dtype=torch.float32)[:, None, None],
    ]
    with torch.no_grad():
        if script == "varibad":
            embeddings = agent.agent.vae.encoder(*inputs)[:, 0]  # [T+1, 2L]
        else:
            encoder = agent.agent.encoder
            hidden = torch.zeros(1, 1, encoder.gru.hidden_size)
            states = torch.cat([hidden[0], encoder.gru(encoder.inputs(*inputs), hidden)[0][:, 0]])
            embeddings = agent.agent.embedding(states)  # [T+1, L]
        mode = agent.agent(torch.as_tensor(meta.obs), embeddings[:-1])[0].mode.numpy()
    np.testing.assert_allclose(meta.embeddings, embeddings, rtol=1e-3, atol=1e-4)
    assert np.ptp(meta.embeddings, axis=0).max() > 0.01
    if run == "Grid-World":
        assert (mode == meta.actions).mean() > 0.95  # but for ties to rounding
    else:
        np.testing.assert_allclose(mode, meta.actions, rtol=1e-2, atol=1e-3)


def test_physics_is_the_one_that_was_observed(trained):
    """MuJoCo's state before every step, put back, gives the observation before that step."""
    _, agent = trained("varibad", "Walker")
    meta = show.play(agent, 2)
    assert meta.physics.shape[0] == len(meta.rewards) and meta.robot.dt == pytest.approx(0.016)
    for t in (0, 1, int(meta.start(1)) - 1, int(meta.start(1)), len(meta.rewards) - 1):
        mujoco.mj_setState(meta.robot.model, meta.robot.data, meta.physics[t], mujoco.mjtState.mjSTATE_INTEGRATION)
        np.testing.assert_allclose(agent.envs.envs.observe()[2], meta.obs[t, :-1], atol=1e-5)


@pytest.mark.slow
def test_meta_world(trained, monkeypatch):
    """Training and test tasks by their numbers, with the evaluation's returns, successes and goals."""
    monkeypatch.setattr(varibad_hyper.MetaWorldVectorEnv, "horizon", 12)
    _, agent = trained("varibad", "Pick-Place")
    assert agent.num_tasks == 100
    for task in (2, 51, 99):
        tasks = np.arange(task // 3 * 3, task // 3 * 3 + 3)[:, None] % 100
        evaluated = varibad_hyper.evaluate(agent.agent, agent.envs, 0, tasks)
        meta = show.play(agent, task)
        assert meta.returns() == evaluated[task % 3].returns.tolist() and meta.task.tolist() == [task]
        assert meta.success.any() == evaluated[task % 3].successes.any()
        env = agent.envs.envs.workers.env_fns[0]()
        env.reset(options={"tasks": [task]})
        np.testing.assert_array_equal(meta.robot.goal, env.robot._target_pos)
        for t in range(24):  # the robot does what the evaluation's did
            if t in (0, 12):
                env.reset(options={"tasks": [task]})
            np.testing.assert_array_equal(meta.physics[t], show.physics_state(show.robot_of(agent.envs, 0, env)))
            np.testing.assert_array_equal(meta.next_obs[t, :-1], env.step(meta.actions[t])[0])
        group = "training" if task < 50 else "test"
        assert show.describe(agent, meta.task) == f"pick-place-v3, {group} task {task}"
        scene = scene_of(meta)
        count = scene.ngeom
        show.add_goal(scene, "Pick-Place", meta)
        assert scene.ngeom == count + 1 and scene.geoms[count].type == mujoco.mjtGeom.mjGEOM_SPHERE
        np.testing.assert_allclose(scene.geoms[count].pos, meta.robot.goal, rtol=1e-6)
        assert len(show.draw(agent, meta).axes) == 1 + agent.args.latent_dim


# --- What the agent believes, and what it could earn


def test_probabilities_against_the_decoder_written_out(trained):
    _, agent = trained("varibad", "Grid-World")
    meta = show.play(agent, 23)
    probabilities = show.cell_probabilities(agent, meta.embeddings)
    assert probabilities.shape == (61, 5, 5) and np.ptp(probabilities) > 0.05
    layers = [layer for layer in agent.agent.vae.reward_decoder.net if isinstance(layer, torch.nn.Linear)]
    for t in (0, 1, 14, 15, 37, 60):
        h = [float(value) for value in meta.embeddings[t, :5]]  # the mean
        for i, layer in enumerate(layers):
            rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            h = [sum(w * value for w, value in zip(row, h, strict=True)) + bias for row, bias in rows]
            h = h if i == len(layers) - 1 else [max(0, value) for value in h]
        for x, y in itertools.product(range(5), range(5)):
            assert probabilities[t, x, y] == pytest.approx(1 / (1 + math.exp(-h[5 * x + y])), rel=1e-3)


@pytest.mark.parametrize("size, horizon", [(3, 5), (3, 2), (2, 4)])
def test_known_goal_return_against_all_action_sequences(size, horizon):
    for goal in gridworld.goal_cells(size):
        best = -math.inf
        for actions in itertools.product(gridworld.MOVES.tolist(), repeat=horizon):
            x = y = total = 0
            for step_x, step_y in actions:
                x, y = min(max(x + step_x, 0), size - 1), min(max(y + step_y, 0), size - 1)
                total += 1 if (x == goal[0] and y == goal[1]) else -0.1
            best = max(best, total)
        assert show.known_goal_return(goal, horizon) == pytest.approx(best)


def test_known_goal_returns_are_what_one_hot_policies_can_earn():
    """README: 46.07 per meta-episode of four episodes."""
    mean = np.mean([show.known_goal_return(goal, 15) for goal in gridworld.goal_cells()])
    assert round(4 * mean, 2) == 46.07


def scene_of(meta):
    """What MuJoCo would draw, without drawing it."""
    mujoco.mj_forward(meta.robot.model, meta.robot.data)
    scene = mujoco.MjvScene(meta.robot.model, 1000)
    visible = mujoco.MjvOption(), mujoco.MjvPerturb(), mujoco.MjvCamera(), mujoco.mjtCatBit.mjCAT_ALL.value
    mujoco.mjv_updateScene(meta.robot.model, meta.robot.data, *visible, scene)
    return scene


@pytest.mark.parametrize("env, tasks", [("Cheetah-Dir", [-1, 1]), ("Ant-Dir", [0, 1, 4]), ("Humanoid", [0.5, 3, 6])])
def test_arrow_points_where_the_reward_is(env, tasks):
    """Of all directions of running, the arrow's earns most; and it lies before the robot."""
    envs = varibad_hyper.MUJOCO_ENVS[env](1)
    for task in tasks:
        envs.reset(seed=1, options={"tasks": np.array([[float(task)]])})
        envs.data[0].qpos[:2] += 3
        meta = SimpleNamespace(task=envs.tasks[0], robot=show.robot_of(SimpleNamespace(envs=envs), 0, None))
        scene = scene_of(meta)
        count = scene.ngeom
        show.add_goal(scene, env, meta)
        arrow = scene.geoms[count]
        assert scene.ngeom == count + 1 and arrow.type == mujoco.mjtGeom.mjGEOM_ARROW
        towards = arrow.mat[:, 2]  # an arrow lies along its own z axis
        assert np.linalg.norm(show.direction(env, meta.task)) == pytest.approx(1)
        np.testing.assert_allclose(towards, show.direction(env, meta.task), atol=1e-6)
        offset = arrow.pos - meta.robot.data.xpos[1]
        assert offset[:2] @ towards[:2] == pytest.approx(0.8) and abs(arrow.pos[2]) < 0.2

        actions, dims = np.zeros((1, envs.single_action_space.shape[0])), envs.location().shape[1]
        angles = np.linspace(0, 2 * np.pi, 49)
        others = [envs.reward(np.array([[np.cos(a), np.sin(a)]])[:, :dims], actions)[0] for a in angles]
        assert envs.reward(towards[None, :dims].astype(float), actions)[0] >= max(others) - 1e-6


def test_walker_has_no_arrow(trained):
    _, agent = trained("varibad", "Walker")
    meta = show.play(agent, 0)
    scene = scene_of(meta)
    count = scene.ngeom
    show.add_goal(scene, "Walker", meta)
    assert scene.ngeom == count and show.direction("Walker", meta.task) is None


def test_tasks_in_words(trained):
    _, grid = trained("varibad", "Grid-World")
    assert show.describe(grid, np.array([3, 1])) == "goal at (3, 1)"
    words = {
        ("Cheetah-Dir", -1): "run backwards",
        ("Cheetah-Dir", 1): "run forwards",
        ("Ant-Dir", np.pi / 2): "run towards 90 degrees",
        ("Humanoid", np.pi): "run towards 180 degrees",
        ("Walker", 1): "walk with an unknown body",
    }
    for (env, task), text in words.items():
        other = grid._replace(args=SimpleNamespace(env=env))
        assert show.describe(other, np.array([float(task)])) == text


# --- Pictures


def lines(axis, color):
    return [line.get_xydata() for line in axis.get_lines() if line.get_color() == color]


def test_belief_picture(trained, tmp_path):
    """4 episodes x 6 steps: each panel shows the belief after its steps and the path until then."""
    folder, agent = trained("varibad", "Grid-World")
    meta = show.play(agent, 16)
    probabilities = show.cell_probabilities(agent, meta.embeddings)
    figure = show.draw(agent, meta)
    *panels, bar = figure.axes
    assert len(panels) == 24 and "probability" in bar.get_ylabel()
    for i, panel in enumerate(panels):
        k, step = i // 6, 3 * (i % 6)
        image = panel.images[0]
        np.testing.assert_array_equal(image.get_array(), probabilities[15 * k + step].T)
        assert image.origin == "lower" and image.get_clim() == (0, 1)
        path = [[0, 0], *meta.next_obs[15 * k : 15 * k + step, :2].tolist()]
        goal, walked, position = (line.get_xydata().tolist() for line in panel.get_lines())
        assert (goal, walked, position) == ([[3, 2]], path, path[-1:])
    for k in range(4):
        assert panels[6 * k].get_ylabel() == f"episode {k + 1}\nreturn {meta.returns()[k]:.1f} of 10.6"
    assert [panel.get_title() for panel in panels[1:6]] == [f"after {3 * i} steps" for i in range(1, 6)]
    assert "goal at (3, 2)" in figure.get_suptitle() and "earns 10.6" in figure.get_suptitle()

    call(folder, "--picture", tmp_path / "out.png", "--task", 16)
    assert matplotlib.image.imread(tmp_path / "out.png").shape == (840, 1300, 4)
    assert (tmp_path / "out.png").stat().st_size < 300_000


def test_path_of_a_far_walk_turns_where_the_agent_did(trained):
    """x goes to the right and y goes up, in path, goal and belief alike."""
    _, agent = trained("varibad", "Grid-World")
    meta = show.play(agent, 0)
    meta.task, meta.next_obs = np.array([2, 1]), meta.next_obs.copy()
    meta.next_obs[:15, :2] = [2, 1]
    belief = np.zeros((61, 5, 5))
    belief[:, 2, 1] = 1
    panel = show.draw(agent, meta).axes[0]
    show.draw_grid(panel, agent, meta, 0, 3, belief)
    rows, columns = np.nonzero(panel.images[-1].get_array())
    assert (rows.tolist(), columns.tolist()) == ([1], [2]) and panel.images[-1].origin == "lower"
    assert panel.get_lines()[-1].get_xydata().tolist() == [[2, 1]]


def test_picture_of_rl2_on_grid_world(trained):
    _, agent = trained("rl2", "Grid-World")
    meta = show.play(agent, 5)
    axes = show.draw(agent, meta).axes
    assert len(axes) == 4 + 2 + 1  # paths, rewards, embedding, its colours
    for k, panel in enumerate(axes[:4]):
        path = [[0, 0], *meta.next_obs[15 * k : 15 * k + 15, :2].tolist()]
        assert lines(panel, "darkorange")[0].tolist() == path
        best = show.known_goal_return(meta.task, 15)
        assert panel.get_title() == f"episode {k + 1}\nreturn {meta.returns()[k]:.1f} of {best:.1f}"
        assert not panel.images[0].get_array().any()
    assert lines(axes[4], "tab:blue")[0].tolist() == [[t + 1, meta.rewards[t]] for t in range(60)]
    np.testing.assert_array_equal(axes[5].images[0].get_array(), meta.embeddings.T)
    assert axes[5].images[0].get_extent()[:2] == [-0.5, 60.5]
    assert [line[0, 0] for line in lines(axes[5], "crimson")] == [15, 30, 45]


def test_picture_of_an_agent_without_the_cells_decoder(trained):
    _, agent = trained("varibad", "no-decoder")
    meta = show.play(agent, 5)
    assert show.cell_probabilities(agent, meta.embeddings) is None
    assert len(show.draw(agent, meta).axes) == 4 + 1 + agent.args.latent_dim


@both_scripts
def test_picture_of_walker(trained, script, tmp_path):
    """VariBAD: mean and deviation of every dimension of m; RL2: every unit. Rewards, and where episodes end."""
    folder, agent = trained(script, "Walker")
    meta = show.play(agent, 0)
    figure = show.draw(agent, meta)
    T = len(meta.rewards)
    rewards, *others = figure.axes
    assert lines(rewards, "tab:blue")[0].tolist() == [[t + 1, meta.rewards[t]] for t in range(T)]
    (ends,) = np.flatnonzero(np.diff(meta.episode)) + 1
    for axis in [rewards, *others[: 4 if script == "varibad" else 1]]:
        assert lines(axis, "tab:blue" if script == "varibad" else "crimson")[-1][:, 0].tolist() == [ends, ends]
    first, second = meta.returns()
    assert f"return {first:.1f} + {second:.1f}" in figure.get_suptitle()
    assert f"{dict(varibad='VariBAD', rl2='RL2')[script]} on Walker" in figure.get_suptitle()
    if script == "rl2":
        np.testing.assert_array_equal(others[0].images[0].get_array(), meta.embeddings.T)
        height = 500
    else:
        assert len(others) == 4
        fallen = replace(meta, rewards=meta.rewards[:9], episode=meta.episode[:9], embeddings=meta.embeddings[:10])
        assert show.draw(agent, fallen, meta).axes[0].get_xlim() == (0, T)  # the longer one is whole
        for i, axis in enumerate(others):
            mean, deviation = meta.embeddings[:, i], np.exp(meta.embeddings[:, 4 + i] / 2)
            line = lines(axis, "tab:blue")[0]
            np.testing.assert_array_equal(line[:, 0], np.arange(T + 1))
            np.testing.assert_allclose(line[:, 1], mean)
            band = axis.collections[0].get_paths()[0].vertices
            np.testing.assert_allclose(band[1 : T + 2, 1], mean - deviation, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(band[T + 3 : 2 * T + 4, 1][::-1], mean + deviation, rtol=1e-5, atol=1e-6)
        height = 580
    call(folder / "model.pt", "--picture", tmp_path / "out.png")
    assert matplotlib.image.imread(tmp_path / "out.png").shape == (height, 1300, 4)


def test_other_formats(trained, tmp_path):
    folder, _ = trained("varibad", "Grid-World")
    for suffix, start in ((".svg", b"<?xml"), (".PDF", b"%PDF")):
        call(folder, "--picture", tmp_path / f"out{suffix}")
        assert (tmp_path / f"out{suffix}").read_bytes().startswith(start)


# --- Videos


@pytest.mark.parametrize("script, run", [("varibad", "Grid-World"), ("rl2", "Grid-World"), ("varibad", "one-hot")])
def test_frames_of_grid_world(trained, script, run):
    """The agent is drawn where it is after every step; the caption tells step and return."""
    _, agent = trained(script, run)
    meta = show.play(agent, 7)
    frames = list(show.grid_frames(agent, meta, range(60), 300))
    assert {frame.shape for frame in frames} == {(320, 300, 3)} and frames[0].dtype == np.uint8
    for t, frame in enumerate(frames):
        x, y = meta.next_obs[t, :2]
        row, column = 320 * (1 - 0.0375 - 0.8625 * (y + 0.5) / 5), 300 * (0.04 + 0.92 * (x + 0.5) / 5)
        assert frame[int(row), int(column)].tolist() == [255, 140, 0], t  # dark orange
        running = meta.rewards[t // 15 * 15 : t + 1].sum()
        assert show.caption(meta, t, t + 1) == f"episode {t // 15 + 1}, step {t % 15 + 1}, return {running:.1f}"


def test_frames_of_grid_world_are_after_the_step(trained, monkeypatch):
    _, agent = trained("varibad", "Grid-World")
    meta, drawn, told, steps = show.play(agent, 7), [], [], range(0, 60, 8)
    monkeypatch.setattr(show, "draw_grid", lambda axis, trained, meta, k, step, belief: drawn.append((k, step, belief)))
    monkeypatch.setattr(show, "caption", lambda meta, t, end: told.append((t, end)))
    list(show.grid_frames(agent, meta, steps, 64))
    assert [(k, step) for k, step, _ in drawn] == [(t // 15, t % 15 + 1) for t in steps]
    np.testing.assert_array_equal(drawn[0][2], show.cell_probabilities(agent, meta.embeddings))
    assert told == [(t, t + 1) for t in steps]


@pytest.mark.parametrize("name, every, frames", [("out.gif", 1, 60), ("out.GIF", 7, 9), ("out.mp4", 1, 60)])
def test_video_of_grid_world(trained, tmp_path, name, every, frames):
    folder, _ = trained("rl2", "Grid-World")
    call(folder, "--video", tmp_path / name, "--width", 121, "--every", every)
    video = imageio.get_reader(tmp_path / name)
    images = [np.asarray(image)[:, :, :3].astype(int) for image in video]
    assert len(images) == frames and images[0].shape == (128, 120, 3)
    assert np.abs(images[0] - images[-1]).max() > 50
    if name.endswith("mp4"):
        assert video.get_meta_data()["fps"] == pytest.approx(3)
    else:
        with Image.open(tmp_path / name) as gif:
            assert gif.info["duration"] == pytest.approx(1000 / 3 * every, abs=10) and gif.info["loop"] == 0


def test_caption_of_a_step_not_taken_and_of_success():
    meta = SimpleNamespace(
        episode=np.array([0, 0, 1, 1]),
        rewards=np.array([1.0, 2.0, 4.0, 8.0]),
        success=np.array([True, False, False, True]),
        start=lambda k: 2 * k,
    )
    assert show.caption(meta, 0, 0) == "episode 1, step 1, return 0.0"
    assert show.caption(meta, 1, 1) == "episode 1, step 2, return 1.0, success"
    assert show.caption(meta, 3, 3) == "episode 2, step 2, return 4.0"
    assert show.caption(meta, 3, 4) == "episode 2, step 2, return 12.0, success"


@pytest.mark.slow
def test_video_of_a_robot(trained, tmp_path, renderer):
    """As many frames as steps; the orange arrow lies before the cheetah, to the left or to the right."""
    folder, _ = trained("varibad", "Cheetah-Dir")
    for task, every, frames in ((0, 1, 200), (1, 50, 4)):
        out = tmp_path / f"{task}.gif"
        command = [sys.executable, ROOT / "show.py", folder, "--video", out, "--width", "160", "--every", str(every)]
        environment = os.environ | {"MUJOCO_GL": renderer}
        done = subprocess.run([*command, "--task", str(task)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert ("backwards", "forwards")[task] in done.stdout and "drawing: 100%" in done.stderr
        images = [np.asarray(image)[:, :, :3].astype(int) for image in imageio.get_reader(out)]
        assert len(images) == frames and images[0].shape == (120, 160, 3)
        assert np.abs(images[0] - images[-1])[20:].max() > 50  # below the caption
        assert images[0][2, 159].max() < 30  # the caption's ground
        for image in images:
            red, green, blue = np.moveaxis(image, 2, 0)
            _, columns = np.nonzero((red > 180) & (green < 150) & (blue < 60))
            assert len(columns) > 20 and (columns.mean() > 80) == (task == 1)
        with Image.open(out) as gif:
            assert gif.info["duration"] == 50 * every  # 20 steps are a second


def test_picture_of_two_tasks(trained, tmp_path, monkeypatch):
    """Cheetah-Dir's two directions over each other, all dimensions of m on one scale."""
    folder, agent = trained("varibad", "Cheetah-Dir")
    metas, drawn = [show.play(agent, task) for task in (0, 1)], []
    draw = show.draw
    monkeypatch.setattr(show, "draw", lambda *args: drawn.append(draw(*args)) or drawn[0])
    call(folder, "--picture", tmp_path / "out.png")
    rewards, *dims = drawn[0].axes
    for color, meta in zip(("tab:blue", "tab:orange"), metas, strict=True):
        assert lines(rewards, color)[0][:, 1].tolist() == meta.rewards.tolist()
        for i, axis in enumerate(dims):
            assert lines(axis, color)[0][:, 1].tolist() == meta.embeddings[:, i].tolist()
    names = [text.get_text() for text in rewards.get_legend().get_texts()]
    assert names == ["run backwards", "run forwards"]
    assert len({axis.get_ylim() for axis in dims}) == 1


# --- Files and refusals


def test_copy_of_a_script_under_another_name(trained, tmp_path):
    """CleanRL's habit: copy, change, run; show.py finds the copy beside itself."""
    folder, _ = trained("rl2", "Grid-World")
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "my_rl2.py").write_bytes((ROOT / "rl2_hyper.py").read_bytes())
    saved = torch.load(folder / "model.pt", weights_only=True)
    torch.save(saved | {"script": "my_rl2"}, tmp_path / "model.pt")
    (tmp_path / "rl2_hyper.py").unlink()
    command = [sys.executable, "show.py", "model.pt", "--picture", "out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "drawn: out.png" in done.stdout, done.stderr


def test_of_several_files_the_newest_is_taken(trained, tmp_path, capsys):
    old, new = (trained("varibad", run)[0] / "model.pt" for run in ("Cheetah-Dir", "Grid-World"))
    os.utime(old, (1, 1))
    for files in ((old, new), (new, old)):
        call(*files, "--picture", tmp_path / "out.png")
        assert capsys.readouterr().out.startswith(f"of 2 files the newest: {new}\ndrawn: ")


def test_gif_with_one_frame_in_minutes(trained, tmp_path):
    call(trained("varibad", "Grid-World")[0], "--video", tmp_path / "out.gif", "--every", "10000")
    assert (tmp_path / "out.gif").stat().st_size > 0


def test_opengl_platform_that_contradicts_is_no_obstacle(renderer, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", renderer)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl" if renderer == "osmesa" else "osmesa")
    assert show.find_renderer() == renderer


def test_task_of_an_unknown_environment_is_told_in_numbers(trained):
    _, agent = trained("varibad", "Walker")
    other = agent._replace(args=SimpleNamespace(env="Hopper-Mass"))
    assert show.describe(other, np.array([0.5, 1.25])) == "task [0.5, 1.25]"


@both_scripts
@pytest.mark.parametrize("run", ["Grid-World", "Walker"])
def test_folder_checkpoint_and_model_hold_the_same_agent(trained, script, run):
    folder, agent = trained(script, run)
    for path in (folder, folder / "checkpoint.pt", folder / "model.pt"):
        name, args = show.read(path)
        assert name == f"{script}_hyper" and args["env"] == run
        other = show.load(path, name)
        assert other.script is SCRIPTS[script] and other.args == agent.args
        assert all(
            torch.equal(x, y) for x, y in zip(*(t.agent.state_dict().values() for t in (agent, other)), strict=True)
        )


def test_default_tasks(trained, tmp_path, capsys):
    call(trained("varibad", "Grid-World")[0], "--picture", tmp_path / "out.png")
    assert "task 23, goal at (4, 4), return by episode" in capsys.readouterr().out
    call(trained("varibad", "Walker")[0], "--picture", tmp_path / "out.png")
    assert "task 0, walk with" in capsys.readouterr().out


class RunsCode:
    def __reduce__(self):
        return print, ("this code was run",)


def test_files_that_hold_no_agent(trained, tmp_path, capsys):
    folder, _ = trained("varibad", "Grid-World")
    out = tmp_path / "out.png"
    assert "No such file" in refusal(capsys, tmp_path / "missing.pt", "--picture", out)
    assert "checkpoint.pt (No such file" in refusal(capsys, tmp_path, "--picture", out)
    model = torch.load(folder / "model.pt", weights_only=True)
    foreign = {
        "text.pt": b"not a model",
        "empty.pt": b"",
        "number.pt": 3,
        "other.pt": {"weights": torch.zeros(3)},
        "code.pt": {"args": model["args"], "agent": RunsCode()},
        "script.pt": model | {"script": "os"},
        "environment.pt": {"args": {"env": 3}, "agent": {}},
    }
    for name, content in foreign.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        assert "holds no agent of" in refusal(capsys, tmp_path / name, "--picture", out), name
    torch.save(model | {"args": model["args"] | {"unknown": 1}}, tmp_path / "other.pt")
    sentence = "is damaged, or not of this version of varibad_hyper.py"
    assert sentence in refusal(capsys, tmp_path / "other.pt", "--picture", out)
    assert not out.exists()


def test_values_that_cannot_work(trained, tmp_path, capsys):
    folder, _ = trained("varibad", "Grid-World")
    (tmp_path / "folder.png").mkdir()
    assert "ends in .png, .svg or .pdf" in refusal(capsys, folder, "--picture", tmp_path / "out.jpg")
    assert "ends in .mp4 or .gif" in refusal(capsys, folder, "--video", tmp_path / "out.png")
    assert "cannot be written" in refusal(capsys, folder, "--picture", tmp_path / "missing" / "out.png")
    assert "cannot be written" in refusal(capsys, folder, "--picture", folder / "model.pt" / "out.png")
    assert "cannot be written" in refusal(capsys, folder, "--picture", tmp_path / "folder.png")
    assert "from 64 to 1920" in refusal(capsys, folder, "--video", tmp_path / "out.gif", "--width", 63)
    assert "at least 1" in refusal(capsys, folder, "--video", tmp_path / "out.gif", "--every", 0)
    for task in (-1, 24):
        assert "0 to 23" in refusal(capsys, folder, "--picture", tmp_path / "out.png", "--task", task)
    assert "0 to 2" in refusal(capsys, trained("rl2", "Walker")[0], "--picture", tmp_path / "out.png", "--task", 3)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("flag, name", [("--picture", "out.png"), ("--video", "out.gif"), ("--video", "out.mp4")])
def test_full_disk(trained, tmp_path, capsys, flag, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit:
        call(trained("rl2", "Grid-World")[0], flag, tmp_path / name, "--every", 20, "--width", 64)
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    what = "nothing was written" if name == "out.mp4" else "[Errno 28] No space left on device"
    assert exit.value.code == 2 and f"could not be written ({what})" in message


def test_video_that_ffmpeg_did_not_finish(trained, tmp_path, capsys, monkeypatch):
    def write_half(path, **options):
        path.write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0")
        return nullcontext(SimpleNamespace(append_data=lambda frame: None))

    monkeypatch.setattr(imageio, "get_writer", write_half)
    with pytest.raises(SystemExit) as exit:
        call(trained("rl2", "Grid-World")[0], "--video", tmp_path / "out.mp4", "--every", 20, "--width", 64)
    assert exit.value.code == 2 and "out.mp4 could not be written (" in capsys.readouterr().err


@pytest.mark.parametrize("name, frames, size", [("gridworld.gif", 60, (300, 320)), ("cheetah.gif", 50, (180, 134))])
def test_kept_videos(name, frames, size):
    """As the commands that the README gives for them make them."""
    kept = ROOT / "pictures" / name
    assert kept.stat().st_size < 300_000
    with Image.open(kept) as gif:
        assert (gif.n_frames, gif.size) == (frames, size)


def test_kept_picture():
    kept = ROOT / "pictures" / "belief.png"
    assert kept.stat().st_size < 300_000 and matplotlib.image.imread(kept).shape == (840, 1300, 4)


def test_one_hot_agents_believe_nothing(trained, tmp_path, capsys):
    folder, _ = trained("varibad", "one-hot")
    assert "believes nothing: give --video" in refusal(capsys, folder, "--picture", tmp_path / "out.png")
    call(folder, "--video", tmp_path / "out.gif", "--every", 20, "--width", 64)
    assert (tmp_path / "out.gif").exists()


@pytest.mark.parametrize(
    "given, working, tried, found",
    [
        (None, ["egl", "osmesa"], ["egl"], "egl"),
        (None, ["osmesa"], ["egl", "osmesa"], "osmesa"),
        (None, [], ["egl", "osmesa", "glfw"], None),
        ("osmesa", ["egl", "osmesa"], ["osmesa"], "osmesa"),
        ("egl", ["osmesa"], ["egl"], None),
    ],
)
def test_search_for_a_renderer(monkeypatch, capsys, given, working, tried, found):
    calls = []

    def run(command, env, capture_output):
        calls.append(env["MUJOCO_GL"])
        assert command == [sys.executable, "-c", show.RENDER] and env["PATH"]
        return SimpleNamespace(returncode=int(env["MUJOCO_GL"] not in working))

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "run", run)
    if given:
        monkeypatch.setenv("MUJOCO_GL", given)
    if found:
        assert show.find_renderer() == found
    else:
        with pytest.raises(SystemExit) as exit:
            show.find_renderer()
        message = capsys.readouterr().err
        assert exit.value.code == 2 and message.count("\n") == 1
        assert "libosmesa6" in message and "MUJOCO_GL=osmesa" in message and (given or "tried: egl") in message
    assert calls == tried


@pytest.mark.slow
def test_without_a_renderer(trained, tmp_path):
    """One sentence for the robot's video; pictures and Grid-World need none."""
    command = [sys.executable, ROOT / "show.py", trained("varibad", "Walker")[0]]
    environment = os.environ | {"MUJOCO_GL": "none"}
    done = subprocess.run([*command, "--video", tmp_path / "out.gif"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "MUJOCO_GL=none draws nothing" in done.stderr
    for other in (
        [*command, "--picture", tmp_path / "out.png"],
        [*command[:2], trained("rl2", "Grid-World")[0], "--video", tmp_path / "out.mp4", "--every", "9"],
    ):
        done = subprocess.run(other, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("drawn: ")


# --- The initialisers, before any training


@pytest.mark.parametrize("scheme", ["weight", "kaiming", "hfo"])
def test_figures_against_generated_weights(scheme, monkeypatch):
    """Every task's weights are written out and applied to every observation alone."""
    torch.manual_seed(1)
    layers, x = show.generated_network(scheme), show.random_embeddings(4)
    monkeypatch.setattr(show, "generated_network", lambda scheme: layers)
    monkeypatch.setattr(show, "random_embeddings", lambda tasks: x)
    torch.manual_seed(2)
    figures = show.measure(scheme, tasks=4, observations=3)
    torch.manual_seed(2)
    observations = torch.randn(3, show.SIZES[0])

    squares, saturated, actions, parameters = [[], [], []], [], np.zeros((4, 3, 6)), []
    with torch.no_grad():
        for task in range(4):
            weights = [sum(x[task, k] * layer.weight[k] for k in range(show.FEATURES + 1)) for layer in layers]
            biases = [sum(x[task, k] * layer.bias[k, :, 0] for k in range(show.FEATURES + 1)) for layer in layers]
            parameters.append(torch.cat([tensor.flatten() for tensor in weights + biases]))
            for i, h in enumerate(observations):
                for k in range(3):
                    h = weights[k] @ h + biases[k]
                    squares[k] += h.square().tolist()
                    if k < 2:
                        h = torch.tanh(h)
                        saturated += (h.abs() > 0.99).tolist()
                actions[task, i] = h
    cosines = [
        torch.cosine_similarity(parameters[i], parameters[j], dim=0).item()
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    assert figures["scale"].tolist() == pytest.approx([math.sqrt(np.mean(values)) for values in squares], rel=1e-4)
    assert figures["saturated"].item() == pytest.approx(100 * np.mean(saturated), abs=0.1)
    assert figures["likeness"].item() == pytest.approx(np.mean(cosines), abs=1e-5)
    assert figures["spread"].item() == pytest.approx(math.sqrt(np.mean(actions.var(axis=0, ddof=1))), rel=1e-4)
    np.testing.assert_allclose(figures["actions"], actions[:, 0, 0], rtol=1e-4, atol=1e-5)


def test_bias_hyperinit_gives_every_task_f_itself():
    figures = show.measure("bias")
    assert figures["spread"].item() == pytest.approx(0, abs=1e-6) and figures["likeness"].item() == pytest.approx(1)
    assert figures["scale"][0].item() == pytest.approx(5 / 3, rel=0.05)  # rows of length 5/3, inputs of variance 1


def test_scale_under_kaiming():
    """Weights and bias of the first layer have variance (5/3)^2 |x|^2 / K, and inputs have variance 1."""
    torch.manual_seed(0)
    squares = [show.measure("kaiming", 20, 50)["scale"][0].item() ** 2 for _ in range(30)]
    length = np.mean([show.random_embeddings(500)[:, :-1].square().sum(1).mean().item() for _ in range(100)])
    assert np.mean(squares) == pytest.approx((64 + 1) * 25 / 9 * length / 10, rel=0.15)


@pytest.mark.docs
@pytest.mark.slow
def test_table_and_picture(tmp_path):
    """Kaiming and normc saturate, Weight-HyperInit, HFI and HFO hold; the README's picture is this one."""
    command = [sys.executable, ROOT / "show.py", "init"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\ndrawn: hyperinit.png\n"), done.stderr
    table = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in done.stdout.splitlines()[2:-1]}
    assert list(table) == list(HYPER_SCHEMES) and all(len(row) == 6 for row in table.values())
    scales, saturated = {name: row[:3] for name, row in table.items()}, {name: row[3] for name, row in table.items()}
    for name in ("bias", "weight", "hfi", "hfo"):
        assert 0.3 < min(scales[name]) and max(scales[name]) < 3 and saturated[name] < 30
    assert min(saturated["kaiming"], saturated["normc"]) > 60
    assert all(small < 0.25 * scale for small, scale in zip(scales["orthogonal"][:2], scales["bias"][:2], strict=True))
    told = re.search(
        r"(\d+)%\s+of\s+the\s+generated\s+layers'\s+units\s+are\s+saturated", (ROOT / "README.md").read_text()
    )
    assert told[1] == f"{saturated['kaiming']:.0f}" == f"{saturated['normc']:.0f}"

    picture = matplotlib.image.imread(tmp_path / "hyperinit.png")
    assert picture.shape == (400, 1300, 4)
    kept = ROOT / "pictures" / "hyperinit.png"
    assert kept.stat().st_size < 300_000
    np.testing.assert_allclose(matplotlib.image.imread(kept).mean((0, 1)), picture.mean((0, 1)), atol=0.01)


@pytest.mark.parametrize("name", ["out.svg", "out.PDF", "full.png"])
def test_other_formats_and_a_full_disk_for_the_initialisers(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(show, "compare_initialisers", lambda: Figure((1, 1)))
    out = tmp_path / name
    if name != "full.png":
        call("init", "--picture", out)
        assert out.read_bytes().startswith(b"<?xml" if name == "out.svg" else b"%PDF")
        assert capsys.readouterr().out == f"drawn: {out}\n"
    elif Path("/dev/full").exists():
        out.symlink_to("/dev/full")
        assert "full.png could not be written ([Errno 28] No space left" in refusal(capsys, "init", "--picture", out)


def test_values_that_cannot_work_for_the_initialisers(tmp_path, capsys):
    assert "cannot be written" in refusal(capsys, "init", "--picture", tmp_path / "missing" / "out.png")
    assert "ends in .png, .svg or .pdf" in refusal(capsys, "init", "--picture", tmp_path / "out.txt")
    for flags in (["--video", tmp_path / "out.gif"], ["--task", 3]):
        assert "leave --video and --task out" in refusal(capsys, "init", *flags)
    with pytest.raises(SystemExit) as exit:
        call("model.pt")
    assert exit.value.code == 2 and "one of the arguments --picture --video is required" in capsys.readouterr().err


def test_a_method_has_one_colour_in_all_pictures():
    assert set(show.COLORS) == set(HYPER_SCHEMES)
    shared = set(show.COLORS) & set(reproduce.COLORS)
    assert len(shared) == 6 and all(show.COLORS[name] == reproduce.COLORS[name] for name in shared)
