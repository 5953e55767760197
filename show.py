"""Shows a trained agent: what it believes about its hidden task, as a picture, and what it does, as a video.

    python show.py runs/THE_RUNS_FOLDER --picture belief.png      # or .svg, .pdf
    python show.py model.pt --video agent.gif                     # or .mp4
    python show.py init --picture hyperinit.png                   # the initialisers, before any training

It takes what `varibad_hyper.py` and `rl2_hyper.py` leave behind, a run's folder, its checkpoint.pt or a model.pt, and
plays one meta-episode of the evaluation. Only the script that trained the agent is imported; nothing is trained. `init`
prints and draws what the initialisers of `hyperinit.py` do to the policies of many tasks.

Letters: N environments, T steps of the meta-episode, D observation, A action, L task embedding m, H GRU state, S
MuJoCo's state, G cells per side of Grid-World; K features of an embedding, P parameters of a base network.
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

import gridworld
from hyperinit import HYPER_SCHEMES, HyperLinear, init_hyper_linear_, normc_

PICTURES, VIDEOS = (".png", ".svg", ".pdf"), (".mp4", ".gif")
PANELS = 6  # of an episode of Grid-World
INIT = Path("init")  # instead of an agent's file: show the initialisers


def fail(sentence: str) -> NoReturn:
    """Ends the program with one sentence on stderr and exit status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# The agent and what it does


class Trained(NamedTuple):
    """A trained agent and the environments of its evaluation."""

    script: ModuleType  # varibad_hyper, rl2_hyper, or a copy
    args: Any  # its Args
    agent: Any  # its Agent
    envs: Any  # its MetaEpisodes

    @property
    def meta_world(self) -> bool:
        return self.args.env in self.script.META_WORLD

    @property
    def num_tasks(self) -> int:
        """Tasks that can be shown: the evaluation's, or all of Meta-World's, the training tasks first."""
        return len(self.envs.envs.class_names) if self.meta_world else self.envs.num_envs


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of the script that wrote a run's folder, checkpoint.pt or model.pt, and the arguments in it.

    It may be a copy of one of the two under a name of its own, beside this file.
    """
    checkpoint, model = path / "checkpoint.pt", path / "model.pt"
    file = path if not path.is_dir() else model if model.exists() and not checkpoint.exists() else checkpoint
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        name, args = saved["script"], saved["args"]
        script = Path(__file__).parent / f"{name}.py"
        if name.isidentifier() and isinstance(args["env"], str) and "\ndef load_agent(" in script.read_text():
            return name, args
    except Exception as error:  # whatever a foreign or damaged file may raise
        if isinstance(error, OSError) and not (file.is_file() and os.access(file, os.R_OK)):
            fail(f"cannot read {file} ({error.strerror}): give a run's folder, its checkpoint.pt or a model.pt.")
    fail(f"{file} holds no agent of a script beside show.py: give a run's folder, its checkpoint.pt or a model.pt.")


def load(path: Path, script_name: str) -> Trained:
    """The agent that `read` found; only now its script is imported, and MuJoCo with it."""
    script = importlib.import_module(script_name)
    return Trained(script, script.load_saved(str(path), mmap=True)[1], *script.load_agent(str(path)))


class Robot(NamedTuple):
    """What MuJoCo simulates in one environment."""

    model: Any  # MjModel
    data: Any  # MjData
    dt: float  # seconds per step
    goal: np.ndarray | None  # Meta-World's, [3]


def robot_of(envs: Any, row: int, twin: Any) -> Robot | None:
    """The robot in environment `row` of MetaEpisodes, on Meta-World in its twin; Grid-World has none."""
    if twin:
        return Robot(twin.robot.model, twin.robot.data, twin.robot.dt, twin.robot._target_pos)
    envs = envs.envs
    return Robot(envs.models[row], envs.data[row], envs.dt, None) if hasattr(envs, "models") else None


def physics_state(robot: Robot | None) -> np.ndarray:
    """All that MuJoCo's future depends on, [S]; empty on Grid-World."""
    if robot is None:
        return np.zeros(0)
    import mujoco

    state = np.zeros(mujoco.mj_stateSize(robot.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(robot.model, robot.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return state


@dataclass
class MetaEpisode:
    """What happened in one meta-episode, by step."""

    task: np.ndarray  # [task_dim]: Grid-World's goal (x, y), a direction, a body, the number of one of Meta-World's
    robot: Robot | None  # in which it was played
    obs: np.ndarray  # before the action, [T, D]
    episode: np.ndarray  # index of the episode that the step is part of, [T]
    physics: np.ndarray  # MuJoCo's state before the action, [T, S]
    actions: np.ndarray  # greedy, [T] or [T, A]
    next_obs: np.ndarray  # what the action led to, [T, D]
    rewards: np.ndarray  # [T]
    success: np.ndarray  # whether the step fulfilled Meta-World's task, bool [T]
    embeddings: np.ndarray  # before the first and after every step: mean and log-variance [T+1, 2L], RL2's [T+1, L]

    def start(self, k: int) -> int:
        """The first step of episode k."""
        return int(np.flatnonzero(self.episode == k)[0])

    def returns(self) -> list[float]:
        """Of every episode; summed in the order of the steps, as the evaluation does."""
        return [float(np.cumsum(self.rewards[self.episode == k])[-1]) for k in range(self.episode[-1] + 1)]


@torch.no_grad()
def play(trained: Trained, task: int) -> MetaEpisode:
    """A meta-episode of the greedy policy on the evaluation's task number `task`.

    All N environments are stepped together, as in the script's `evaluate`, and one is kept: its returns are bit for bit
    those of the evaluation.
    """
    script, args, agent, envs = trained
    row, tasks = task, envs.all_tasks  # [num_tasks, task_dim], or None: they are drawn from the seed
    if trained.meta_world:
        row = task % envs.num_envs
        tasks = np.arange(task - row, task - row + envs.num_envs)[:, None] % trained.num_tasks
    elif tasks is not None:
        tasks = np.resize(tasks, (envs.num_envs, tasks.shape[1]))
    obs = envs.reset(script.seeds_of(args)["eval_envs"], tasks)  # [N, D]
    belief = agent.initial_belief(envs)  # [N, H]
    embedding = agent.embedding(belief)  # [N, 2L]
    this_task, twin = envs.envs.tasks[row].copy(), None
    if trained.meta_world:  # its robots are in other processes: the twin, in this one, does the same
        twin = envs.envs.workers.env_fns[row]()
        twin.reset(options={"tasks": envs.envs.tasks[:, 0]})
    robot = robot_of(envs, row, twin)
    embeddings, steps, done = [embedding[row].numpy()], [], False
    with tqdm(total=envs.max_steps, desc="playing", unit="steps", leave=False, delay=1) as bar:
        while not done:
            before = obs[row], int(envs.episode[row]), physics_state(robot)
            action = agent(torch.as_tensor(obs, dtype=torch.float32), embedding)[0].mode  # [N] or [N, A]
            next_obs, reward, dones, _, obs, _ = envs.step(action.numpy())
            success = bool(envs.has_success and envs.envs.success[row])
            steps.append((*before, action[row].numpy(), next_obs[row], reward[row], success))
            if twin:
                twin.step(action[row].numpy())
                if envs.episode[row] != before[1]:
                    twin.reset(options={"tasks": envs.envs.tasks[:, 0]})
            next_obs, reward = (torch.as_tensor(x, dtype=torch.float32) for x in (next_obs, reward))
            belief = agent.update_belief(belief, action, next_obs, reward)
            embedding = agent.embedding(belief)
            embeddings.append(embedding[row].numpy())
            done = dones[row]
            bar.update()
    return MetaEpisode(this_task, robot, *map(np.array, zip(*steps, strict=True)), np.array(embeddings))


@torch.no_grad()
def cell_probabilities(trained: Trained, embeddings: np.ndarray) -> np.ndarray | None:
    """The reward decoder's probability that entering cell (x, y) is rewarded, at the posterior's mean, [T+1, G, G].

    None where there is no such decoder: RL2, other tasks, --no-decode-reward, one-hot.
    NOTE: it learns from the cells that agents enter, for a good agent mostly the goal. So it gives unseen cells more
    than 1/24, and a map does not sum to 1.
    """
    vae = getattr(trained.agent, "vae", None)
    if trained.args.env != "Grid-World" or vae is None or vae.reward_decoder is None:
        return None
    logits = vae.reward_decoder(torch.from_numpy(embeddings[:, : trained.args.latent_dim]))  # [T+1, G * G]
    return logits.sigmoid().unflatten(1, (trained.args.grid_size,) * 2).numpy()


def known_goal_return(goal: np.ndarray, horizon: int) -> float:
    """The best return of an episode of Grid-World for an agent that knows the goal: straight there, then stay."""
    on_goal = max(0, horizon - int(goal.sum()) + 1)  # the step that enters the goal is one of them
    return on_goal * gridworld.GOAL_REWARD + (horizon - on_goal) * gridworld.STEP_REWARD


def direction(env: str, task: np.ndarray) -> np.ndarray | None:
    """The unit vector [3] that the robot should run along, or None where the task is not a direction."""
    if env == "Cheetah-Dir":
        return np.array([task[0], 0.0, 0.0])
    return np.array([np.cos(task[0]), np.sin(task[0]), 0.0]) if env in ("Ant-Dir", "Humanoid") else None


def describe(trained: Trained, task: np.ndarray) -> str:
    """The hidden task in words."""
    env, envs = trained.args.env, trained.envs.envs
    if env == "Grid-World":
        return f"goal at ({task[0]}, {task[1]})"
    if env == "Cheetah-Dir":
        return f"run {'forwards' if task[0] > 0 else 'backwards'}"
    if trained.meta_world:
        return f"{envs.class_names[task[0]]}, {'training' if task[0] < envs.num_train else 'test'} task {task[0]}"
    if direction(env, task) is not None:
        return f"run towards {np.degrees(task[0]):.0f} degrees"
    return "walk with an unknown body" if env == "Walker" else f"task {np.round(task, 2).tolist()}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_grid(axis: Axes, trained: Trained, meta: MetaEpisode, k: int, step: int, belief: np.ndarray | None) -> Any:
    """Grid-World after `step` steps of episode k: probabilities [T+1, G, G], the episode's path so far, the goal."""
    size, start = trained.args.grid_size, meta.start(k)
    cells = np.zeros((size, size)) if belief is None else belief[start + step].T  # rows are y
    image = axis.imshow(cells, cmap="Blues", vmin=0, vmax=1, origin="lower")
    axis.set(xticks=[], yticks=[])
    if size <= 20:
        axis.set_xticks(np.arange(size - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(size - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="0.8", lw=0.6)
        axis.tick_params(which="minor", length=0)
    path = np.vstack([meta.obs[start, :2], meta.next_obs[start : start + step, :2]])  # [step + 1, 2]
    axis.plot(*meta.task, "s", ms=70 / size, mfc="none", mec="crimson", mew=2)
    axis.plot(*path.T, color="darkorange", lw=2)
    axis.plot(*path[-1], "o", ms=45 / size, mfc="darkorange", mec="white")
    return image


def draw_search(figure: FigureBase, trained: Trained, meta: MetaEpisode, belief: np.ndarray | None) -> None:
    """A row of panels per episode with the belief; without one a panel per episode, in a row."""
    horizon, returns = trained.args.grid_horizon, meta.returns()
    best = known_goal_return(meta.task, horizon)
    names = [f"episode {k + 1}\nreturn {value:.1f} of {best:.1f}" for k, value in enumerate(returns)]
    if belief is None:
        for k, axis in enumerate(figure.subplots(1, len(returns), squeeze=False)[0]):
            draw_grid(axis, trained, meta, k, horizon, None)
            axis.set_title(names[k], fontsize=11)
        return
    steps = np.unique(np.linspace(0, horizon, PANELS).round().astype(int))
    axes = figure.subplots(len(returns), len(steps), squeeze=False)
    for k, row in enumerate(axes):
        for axis, step in zip(row, steps, strict=True):
            image = draw_grid(axis, trained, meta, k, step, belief)
            if k == 0:
                axis.set_title(f"after {step} steps" if step else "at the start", fontsize=11)
        row[0].set_ylabel(names[k], fontsize=11)
    label = "decoder's probability that entering the cell is rewarded"
    figure.colorbar(image, ax=axes, label=label, shrink=0.8, pad=0.02)


def draw_embedding(figure: FigureBase, trained: Trained, meta: MetaEpisode, other: MetaEpisode | None) -> None:
    """The rewards, and below them the task embedding: RL2's units as a map, or a line with a band per dimension.

    The second has another task's over it: where the two part, the posterior tells the tasks apart.
    """
    posterior, dims = hasattr(trained.agent, "vae"), trained.args.latent_dim
    heights = [2, *[1] * dims] if posterior else [2, 4]
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    metas = [meta, other] if other is not None else [meta]
    axes[0].set(ylabel="reward", xlim=(0, max(len(this.rewards) for this in metas)))
    axes[-1].set(xlabel="step")
    for color, this in zip(("tab:blue", "tab:orange"), metas, strict=False):
        steps = np.arange(len(this.embeddings))  # that precede the belief
        axes[0].step(steps[1:], this.rewards, color=color, lw=1, label=describe(trained, this.task))
        if posterior:
            mean, deviation = this.embeddings[:, :dims], np.exp(0.5 * this.embeddings[:, dims:])  # [T+1, L] each
            for i, (axis, m, d) in enumerate(zip(axes[1:], mean.T, deviation.T, strict=True)):
                axis.fill_between(steps, m - d, m + d, color=color, alpha=0.25, lw=0)
                axis.plot(steps, m, color=color)
                axis.set_ylabel(f"$m_{{{i + 1}}}$", rotation=0, labelpad=12, va="center")
                axis.sharey(axes[1])  # or the noise of a dimension that is not used looks like a signal
        for k in range(1, this.episode[-1] + 1):
            for axis in axes:
                axis.axvline(this.start(k), color=color if posterior else "crimson", ls="--", lw=1)
    if len(metas) > 1:
        axes[0].legend(ncols=2)
    if not posterior:
        extent = (-0.5, len(steps) - 0.5, dims + 0.5, 0.5)  # a column per step
        image = axes[1].imshow(meta.embeddings.T, aspect="auto", extent=extent, cmap="Blues", interpolation="none")
        axes[1].set_ylabel("unit of the embedding")
        axes[1].locator_params(axis="y", integer=True)
        figure.colorbar(image, ax=list(axes), label="activation", pad=0.01)


def draw(trained: Trained, meta: MetaEpisode, other: MetaEpisode | None = None) -> Figure:
    """The picture: what the agent believes over the meta-episode, and what it earns; on a robot also of `other`."""
    args, belief = trained.args, cell_probabilities(trained, meta.embeddings)
    search, embedding = 3.2, 3 + 0.7 * args.latent_dim if hasattr(trained.agent, "vae") else 5  # inches
    title = f"{'VariBAD' if hasattr(trained.agent, 'vae') else 'RL2'} on {args.env}, {describe(trained, meta.task)}"
    if args.env == "Grid-World":
        best = known_goal_return(meta.task, args.grid_horizon)
        title += f" (red), path orange; an agent that knows the goal from the start earns {best:.1f} per episode"
    else:
        title += ", return " + " + ".join(f"{value:.1f}" for value in meta.returns())
    if hasattr(trained.agent, "vae") and belief is None:
        title += "\nlines: posterior of the task embedding m, mean and standard deviation"
    if belief is not None:
        figure = Figure((13, 0.6 + 1.95 * args.episodes_per_task), layout="constrained")
        draw_search(figure, trained, meta, belief)
    elif args.env == "Grid-World":
        figure = Figure((13, search + embedding), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[search, embedding])
        draw_search(top, trained, meta, None)
        draw_embedding(bottom, trained, meta, other)
    else:
        figure = Figure((13, embedding), layout="constrained")
        draw_embedding(figure, trained, meta, other)
    figure.suptitle(title, fontsize=13)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Videos


def caption(meta: MetaEpisode, t: int, end: int) -> str:
    """Where step t is, and the return of its episode so far: `end` is t before the step, t + 1 after it."""
    start = meta.start(meta.episode[t])
    text = f"episode {meta.episode[t] + 1}, step {t - start + 1}, return {meta.rewards[start:end].sum():.1f}"
    return text + (", success" if meta.success[start:end].any() else "")


def grid_frames(trained: Trained, meta: MetaEpisode, steps: Iterable[int], width: int) -> Iterator[np.ndarray]:
    """Grid-World after each of the steps: RGB images, uint8 [height, width, 3]."""
    belief = cell_probabilities(trained, meta.embeddings)
    figure = Figure((3, 3.2), dpi=width / 3)
    canvas = FigureCanvasAgg(figure)
    for t in steps:
        figure.clear()
        axis = figure.add_axes((0.04, 0.0375, 0.92, 0.8625))
        draw_grid(axis, trained, meta, meta.episode[t], t + 1 - meta.start(meta.episode[t]), belief)
        axis.set_title(caption(meta, t, t + 1), fontsize=11)
        canvas.draw()
        yield np.array(canvas.buffer_rgba())[:, :, :3]


def add_goal(scene: Any, env: str, meta: MetaEpisode) -> None:
    """Puts the hidden task into an MjvScene: an arrow on the floor before the robot, or a ball at Meta-World's goal."""
    import mujoco

    geom, color, robot = scene.geoms[scene.ngeom], np.array([1.0, 0.45, 0.0, 1.0], np.float32), meta.robot
    if robot.goal is not None:
        ball = mujoco.mjtGeom.mjGEOM_SPHERE
        mujoco.mjv_initGeom(geom, ball, np.full(3, 0.025), robot.goal, np.eye(3).ravel(), color)
    elif (towards := direction(env, meta.task)) is not None:
        arrow = mujoco.mjtGeom.mjGEOM_ARROW
        start = robot.data.xpos[1] * [1, 1, 0] + [0, 0, 0.1] + 0.8 * towards  # before the torso
        mujoco.mjv_initGeom(geom, arrow, np.zeros(3), np.zeros(3), np.zeros(9), color)
        mujoco.mjv_connector(geom, arrow, 0.08, start, start + 2 * towards)
    else:
        return
    geom.emission = 0.5  # bright in the shade, too
    scene.ngeom += 1


def robot_frames(trained: Trained, meta: MetaEpisode, steps: Iterable[int], width: int) -> Iterator[np.ndarray]:
    """The robot before each of the steps: RGB images, uint8 [height, width, 3]."""
    import mujoco

    (model, data, _, goal), height = meta.robot, width * 3 // 8 * 2
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    camera = mujoco.MjvCamera()
    camera.lookat[:] = 0.0, 0.65, 0.15  # Meta-World's table
    camera.distance, camera.azimuth, camera.elevation = (3.6, 90, -20) if goal is None else (1.6, 140, -25)
    font = ImageFont.load_default(width / 28)
    with mujoco.Renderer(model, height, width) as renderer:
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0  # in the floor; it distracts and makes GIFs large
        for t in steps:
            mujoco.mj_setState(model, data, meta.physics[t], mujoco.mjtState.mjSTATE_INTEGRATION)
            mujoco.mj_forward(model, data)
            if goal is None:  # MuJoCo's own tracking camera lags behind
                camera.lookat[:] = *data.xpos[1, :2], 0.8  # the torso
            renderer.update_scene(data, camera)
            add_goal(renderer.scene, trained.args.env, meta)
            image = Image.fromarray(renderer.render())
            pen = ImageDraw.Draw(image)
            pen.rectangle((0, 0, width, width / 10), "black")
            pen.text((width / 60, width / 200), f"{describe(trained, meta.task)}\n{caption(meta, t, t)}", "white", font)
            yield np.array(image)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes the images as they come, to a .gif that repeats or a .mp4."""
    if path.suffix.lower() == ".gif":  # by Pillow, which keeps of a frame what is new in it
        octree = Image.Quantize.FASTOCTREE  # keeps the few pixels of an arrow apart from a brown robot's
        first, *others = (Image.fromarray(frame).quantize(64, octree, dither=Image.Dither.NONE) for frame in frames)
        # Browsers play what is shorter than 20 ms at a tenth of the speed; a GIF can hold no more than 655,350 ms.
        milliseconds = min(max(20, 1000 / fps), 655_350)
        first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
        return
    import imageio.v2 as imageio

    with imageio.get_writer(path, fps=fps, macro_block_size=2) as writer:
        for frame in frames:
            writer.append_data(frame)
    if not path.stat().st_size:  # nobody asks how ffmpeg ended
        raise OSError("nothing was written")
    imageio.get_reader(path).close()  # raises OSError where it was not finished


RENDER = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"


def find_renderer() -> str:
    """A value of MUJOCO_GL that draws here: the user's own or the first that works. Set it before `import mujoco`."""
    given = os.environ.get("MUJOCO_GL")
    os.environ.pop("PYOPENGL_PLATFORM", None)  # MuJoCo sets it to what MUJOCO_GL says, and stops at anything else
    names = [given] if given else ["egl", "osmesa", "glfw"] if sys.platform == "linux" else [""]
    for name in names:
        environment = os.environ | {"MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", RENDER], env=environment, capture_output=True).returncode == 0:
            return name
    what = f"MUJOCO_GL={given} draws nothing" if given else f"MuJoCo draws nothing (tried: {', '.join(names)})"
    fail(f"{what} on this machine: install the Debian package libosmesa6 and set MUJOCO_GL=osmesa.")


# ---------------------------------------------------------------------------------------------------------------------
# The initialisers, before any training

SIZES = [64, 128, 128, 6]  # a base network of MuJoCo: the observation's features, two tanh layers, the actions' means
FEATURES = 10  # K
TASKS, DRAWS = 50, 5
COLORS = {"bias": "C0", "weight": "C4", "hfi": "C2", "hfo": "gold", "kaiming": "C3", "normc": "C1", "orthogonal": "C6"}


def generated_network(scheme: str) -> list[HyperLinear]:
    """The layers of a base network whose f is normc, as the scripts make them for continuous actions."""
    layers = [HyperLinear(fan_in, fan_out, FEATURES) for fan_in, fan_out in zip(SIZES[:-1], SIZES[1:], strict=True)]
    for layer in layers:
        gain = 1.0 if layer is layers[-1] else nn.init.calculate_gain("tanh")
        init_hyper_linear_(layer, scheme, lambda weight, gain=gain: normc_(weight, gain), nn.init.zeros_, gain)
    return layers


def random_embeddings(tasks: int) -> Tensor:
    """What the head reads, [tasks, K+1]: random numbers after a linear + tanh layer (|x|^2 is about K / 4), and a 1."""
    return F.pad(torch.tanh(nn.Linear(10, FEATURES)(torch.randn(tasks, 10))), (0, 1), value=1.0)


@torch.no_grad()
def measure(scheme: str, tasks: int = TASKS, observations: int = 200) -> dict[str, Tensor]:
    """What one draw of the head does, over random embeddings and observations of unit variance.

    scale: root mean square of each layer's outputs before tanh [3]; saturated: percentage of the hidden units beyond
    +-0.99; spread: standard deviation between tasks of the action for one observation, root mean square; likeness:
    mean cosine between the generated parameters of two tasks; actions: of all tasks for one observation [tasks].
    """
    layers, x = generated_network(scheme), random_embeddings(tasks)
    parameters = torch.cat([x @ stack.flatten(1) for layer in layers for stack in (layer.weight, layer.bias)], dim=1)
    directions = F.normalize(parameters, dim=1)  # [tasks, P]
    h, x = torch.randn(observations, SIZES[0]).repeat(tasks, 1), x.repeat_interleave(observations, dim=0)
    outputs = [layers[0](h, x)]  # of each layer, [tasks * observations, out]
    for layer in layers[1:]:
        outputs.append(layer(torch.tanh(outputs[-1]), x))
    actions = outputs[-1].view(tasks, observations, -1)
    return {
        "scale": torch.stack([h.square().mean().sqrt() for h in outputs]),
        "saturated": torch.stack([100 * (h.tanh().abs() > 0.99).float().mean() for h in outputs[:-1]]).mean(),
        "spread": actions.std(dim=0).square().mean().sqrt(),
        "likeness": ((directions @ directions.T).sum() - tasks) / (tasks * (tasks - 1)),  # all but each with itself
        "actions": actions[:, 0, 0],
    }


def compare_initialisers() -> Figure:
    """Prints the table of the initialisers and returns the picture."""
    torch.manual_seed(0)
    draws = {scheme: [measure(scheme) for _ in range(DRAWS)] for scheme in HYPER_SCHEMES}
    sizes = "-".join(map(str, SIZES))
    print(f"base network {sizes}, {FEATURES} embedding features, {TASKS} tasks, mean of {DRAWS} draws; 'bias': f alone")
    print("init         scale of layer 1, 2, 3   saturated %   spread of actions   likeness of two tasks")
    figure = Figure((13, 4), layout="constrained")
    (left, middle, right), ends = figure.subplots(1, 3), []
    for k, scheme in enumerate(HYPER_SCHEMES):
        mean = {name: torch.stack([draw[name] for draw in draws[scheme]]).mean(0) for name in draws[scheme][0]}
        scales = "".join(f"{value:8.2f}" for value in mean["scale"])
        print(f"{scheme:12} {scales} {mean['saturated']:13.0f} {mean['spread']:19.2f} {mean['likeness']:23.2f}")
        color = COLORS.get(scheme, "C8")  # the same for a method in every picture of this project
        left.plot([1, 2, 3], mean["scale"], "o-", color=color, lw=3 if scheme == "bias" else 1.5)
        ends.append((mean["scale"][-1].item(), scheme, color))
        middle.scatter([k] * TASKS, draws[scheme][0]["actions"], s=14, alpha=0.5, color=color)
        right.bar(k, mean["likeness"], color=color)
    height = float("inf")
    for scale, scheme, color in sorted(ends, reverse=True):
        height = min(scale, height / 1.25)  # no name over another
        left.text(3.08, height, scheme, va="center", color=color)
    left.set(yscale="log", xlim=(0.9, 3.7), xticks=[1, 2, 3], xlabel="layer (grey: where tanh works)")
    left.set(title="Scale of activations before tanh", ylabel="root mean square")
    left.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
    left.axhspan(0.3, 3, color="0.9", zorder=0)
    middle.axhspan(-1, 1, color="0.9", zorder=0)
    middle.set(title=f"One observation's action in {TASKS} tasks", xlabel="grey: what an actuator takes")
    right.set(title="Likeness (cosine) of two tasks' policies")
    for axis in (middle, right):
        axis.set_xticks(range(len(HYPER_SCHEMES)), HYPER_SCHEMES, rotation=30)
    return figure


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; refuses values that cannot work with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    files = "a run's folder, its checkpoint.pt or its model.pt; or the word init: the initialisers before training"
    parser.add_argument("file", type=Path, nargs="+", help=f"{files}; of several the newest")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--picture", type=Path, metavar="OUT", help="draw what the agent believes: a .png, .svg or .pdf")
    what.add_argument("--video", type=Path, metavar="OUT", help="show what the agent does: a .mp4 or .gif")
    parser.add_argument("--task", type=int, metavar="N", help="the evaluation's task N (0; Grid-World: the last)")
    parser.add_argument("--width", type=int, default=480, help="pixels of a video's frames (480)")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="show only every K-th step in a video (1)")
    args = parser.parse_args(argv)
    several = args.file
    args.file = max(several, key=lambda path: path.stat().st_mtime if path.exists() else 0)
    if len(several) > 1:
        print(f"of {len(several)} files the newest: {args.file}")
    if args.file == INIT:
        args.picture = args.picture or Path("hyperinit.png")
    if not args.picture and not args.video:
        parser.error("one of the arguments --picture --video is required")
    if args.file == INIT and (args.video or args.task is not None):
        fail("init draws a picture of many random tasks: leave --video and --task out.")
    flag, out, suffixes = ("--picture", args.picture, PICTURES) if args.picture else ("--video", args.video, VIDEOS)
    if out.suffix.lower() not in suffixes:
        fail(f"{flag} {out}: give a file whose name ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}.")
    if out.is_dir() or not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        fail(f"{flag} {out} cannot be written: give a file in a folder that is there and that you may write to.")
    if not 64 <= args.width <= 1920:
        fail(f"--width {args.width}: it must be from 64 to 1920 pixels.")
    if args.every < 1:
        fail(f"--every {args.every}: it must be at least 1.")
    return args


def play_task(args: argparse.Namespace) -> tuple[Trained, MetaEpisode, MetaEpisode | None, str]:
    """The agent, its meta-episode on the task that was asked for, another for VariBAD's picture of a robot, words."""
    script_name, saved_args = read(args.file)
    grid = saved_args["env"] == "Grid-World"
    if args.picture and saved_args.get("embedding") == "one-hot":
        fail(f"the agent in {args.file} is told its task (--embedding one-hot) and believes nothing: give --video.")
    os.environ["MUJOCO_GL"] = find_renderer() if args.video and not grid else "disabled"
    trained = load(args.file, script_name)
    torch.set_num_threads(trained.args.threads)  # as in the evaluation
    last = trained.num_tasks - 1
    task = args.task if args.task is not None else last if grid else 0  # Grid-World's last goal is the farthest
    if not 0 <= task <= last:
        fail(f"--task {task}: the tasks of this agent's evaluation have the numbers 0 to {last}.")
    two = args.picture and not grid and hasattr(trained.agent, "vae")  # a map of RL2's units has one task
    other = play(trained, (task + 1) % (last + 1)) if two else None
    meta = play(trained, task)
    returns = " ".join(f"{value:.2f}" for value in meta.returns())
    return trained, meta, other, f" (task {task}, {describe(trained, meta.task)}, return by episode {returns})"


def main(args: argparse.Namespace) -> None:
    """Draws the picture or the video."""
    out, words = args.picture or args.video, ""
    if args.file != INIT:
        trained, meta, other, words = play_task(args)
    try:
        if args.file == INIT:
            compare_initialisers().savefig(out, dpi=100)
        elif args.picture:
            draw(trained, meta, other).savefig(out, dpi=100)
        else:
            steps = tqdm(range(0, len(meta.rewards), args.every), desc="drawing", unit="frames")
            frames = (robot_frames if meta.robot else grid_frames)(trained, meta, steps, args.width // 2 * 2)
            write_video(out, frames, 1 / (args.every * (meta.robot.dt if meta.robot else 1 / 3)))
    except OSError as error:
        what = str(error).partition("\n")[0]  # ffmpeg says more
        fail(f"{out} could not be written ({what}): fix that or give another file.")
    print(f"drawn: {out}{words}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C.", file=sys.stderr)
        raise SystemExit(130) from None
