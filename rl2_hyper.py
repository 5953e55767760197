"""RL2 with a hypernetwork policy, in one file.

Meta-RL: train one agent over many tasks so that it adapts to a new one within an episode or two. RL2 (Duan et al.,
2016) has no model of the task: a GRU reads (action, observation, reward) over a whole meta-episode, and PPO's gradient
through it makes its output a useful task embedding. "Hypernetworks in Meta-Reinforcement Learning" (Beck et al., CoRL
2022; "the paper", section 3.2) lets a hypernetwork turn that embedding into the weights of the policy, initialised by
Bias-HyperInit (`hyperinit.py`).

    python rl2_hyper.py --init bias --env Walker

The file reads top to bottom in the order it runs: arguments, environments, maths, networks, evaluation, then `main`,
one loop of: rollout, GAE, recurrent PPO, log. What it shares with `varibad_hyper.py` is the same there, word for word.

Tensors are time-major and their shapes are noted with these letters: T steps, N environments, B batch, D observation,
A action, L task embedding, H GRU state, K hypernetwork features. `# META-RL:` marks where PPO differs from the
single-task PPO, `# NOTE:` where this differs from the paper or its authors' code.
"""

import argparse
import copy
import itertools
import json
import math
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NoReturn, get_args

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import gridworld
from hyperinit import FILM_SCHEMES, FilmLinear, HyperLinear, init_film_linear_, init_hyper_linear_, normc_

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_whole_number(words: list[str]) -> int:
    """An int from `2000000` or `2e6`. Raises ValueError, which tyro reports, for anything else."""
    try:
        value = float(words[0])
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{words[0]!r} is not a whole number; write it like 2000000 or 2e6.")


WholeNumber = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=parse_whole_number,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass
class Args:
    # The defaults are Grid-World's; PRESETS below holds what differs elsewhere.
    env: Literal["Grid-World", "Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid", "Pick-Place", "ML10"] = "Grid-World"
    """the family of tasks; every one has its own preset for the values below"""
    arch: Literal["hyper", "standard", "film"] = "hyper"
    """how the task embedding enters the policy: generates its weights, is an input, or scales and shifts its layers"""
    init: Literal["bias", "weight", "hfi", "hfo", "kaiming", "normc", "orthogonal"] = "bias"
    """the hypernetwork head's initialisation (hyperinit.py); the standard architecture has no such head"""
    base_init: Literal["normc", "orthogonal", "kaiming"] = "normc"
    """f, the base network's own initialisation, which Bias- and Weight-HyperInit reproduce; also the standard one's"""
    hyper_bias: bool = True
    """whether the hypernetwork's head has a bias; without it every weight follows from the embedding alone"""
    seed: int = 1
    """of everything random; the same seed gives the same run on the CPU, bit for bit"""
    total_timesteps: WholeNumber = 4_000_000
    """frames (environment steps, over all environments) to train for; 2e6 is understood"""

    # Run
    runs_dir: str = "runs"
    """the folder in which the run's own folder is made"""
    save_model: bool = False
    """whether to save the agent, its normalisers and these arguments to model.pt in the run's folder"""
    evaluate: str | None = None
    """a model.pt to evaluate instead of training; values of the task and the agent come from the file"""
    resume: str | None = None
    """a run's folder: go on from its last checkpoint; --total-timesteps may be raised, --env-workers changed"""
    checkpoint_interval: int = 100
    """iterations between checkpoints (0: none, the run cannot be resumed)"""
    eval_interval: int = 50
    """iterations between evaluations (0: only at the end)"""
    eval_tasks: int = 32
    """tasks per evaluation (Meta-World: of training and of test tasks each); Grid-World evaluates every goal once"""
    cuda: bool = True
    """whether to use a GPU where there is one"""
    torch_deterministic: bool = True
    """whether cuDNN is held to deterministic algorithms"""
    torch_threads: int = 1
    """CPU threads of torch in updates and evaluations: 1 is fastest for small networks, and rollouts always take 1"""
    track: bool = False
    """whether to send the logged scalars to Weights & Biases (pip install -r requirements-optional.txt)"""
    wandb_project_name: str = "hyperinit"
    """the project there"""
    wandb_entity: str | None = None
    """the team or user there (yours by default)"""
    compile: bool = False
    """whether to compile the policy (torch.compile, needs a C++ compiler) and to fuse Adam; the warm-up is reported"""

    # Tasks
    episodes_per_task: int = 4
    """episodes of a meta-episode; with more than one, a 0/1 flag 'the episode just ended' joins the observation"""
    grid_size: int = 5
    """Grid-World's cells per side"""
    grid_horizon: int = 15
    """Grid-World's steps per episode"""
    grid_goals: Literal["all", "far"] = "all"
    """Grid-World's goals: every cell but the start (24), or only those that do not touch it (21, the authors' code)"""
    end_on_success: bool = False
    """whether an episode of Meta-World ends when its task is fulfilled (which forgoes the rewards of staying so)"""
    env_workers: int = 0
    """Meta-World: worker processes, of training and evaluation each (0: one per core); MuJoCo: threads (0: 1)"""

    # PPO
    num_envs: int = 16
    """parallel environments"""
    num_steps: int = 60
    """steps of each environment per iteration"""
    learning_starts: int = 5000
    """frames collected before the first update; the first iteration never updates, for the normalisers' sake"""
    learning_rate: float = 7e-4
    """of the Adam of encoder and policy"""
    adam_eps: float = 1e-8
    """epsilon of every Adam"""
    gamma: float = 0.95
    """discount factor per step"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch, each the whole sequences of num_envs / num_minibatches environments"""
    update_epochs: int = 2
    """passes over the rollout"""
    clip_coef: float = 0.05
    """PPO's clipping of the ratio and of the value's change"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients of encoder and policy together are scaled down to this norm"""
    norm_clip: float = 10.0
    """normalised observations are clipped to +- this"""
    reward_clip: float = 10.0
    """normalised rewards are clipped to +- this"""

    # Policy
    state_features: int = 16
    """units of the tanh layer that the observation passes (0: none, it enters the base network as it is)"""
    embedding_features: int = 25
    """units of the tanh layer that the task embedding passes (0: none)"""
    base_layers: tuple[int, ...] = (32,)
    """hidden tanh layers of the base network, in actor and critic each"""
    hyper_layers: tuple[int, ...] = ()
    """hidden ReLU layers of the hypernetwork between the embedding features and its heads (none: it is linear)"""

    # Encoder
    latent_dim: int = 32
    """size of the task embedding, a linear + ReLU layer on the GRU's state"""
    gru_hidden: int = 64
    """size of the encoder's GRU"""
    action_embedding: int = 0
    """units of the encoder's ReLU layer for actions (0: the encoder does not see actions)"""
    state_embedding: int = 32
    """units of the encoder's ReLU layer for observations"""
    reward_embedding: int = 8
    """units of the encoder's ReLU layer for rewards"""


# VariBAD's own RL2 configuration, where it is not Grid-World's above; discounts and encoder inputs are VariBAD's.
MUJOCO = {
    "total_timesteps": 100_000_000,
    "episodes_per_task": 1,
    "num_steps": 200,
    "gamma": 0.97,
    "gae_lambda": 0.9,
    "state_features": 64,
    "embedding_features": 10,
    "base_layers": (128,),
    "latent_dim": 128,
    "gru_hidden": 128,
    "action_embedding": 16,
    "reward_embedding": 16,
}
# VariBAD's values for Meta-World (VariBAD's authors did not run RL2 there), with RL2's task embedding.
META_WORLD_PRESET = MUJOCO | {
    "total_timesteps": 50_000_000,
    "eval_interval": 400,
    "eval_tasks": 50,
    "episodes_per_task": 2,
    "num_envs": 8,
    "num_steps": 600,
    "learning_rate": 3e-4,
    "num_minibatches": 8,
    "clip_coef": 0.1,
    "ent_coef": 0.001,
    "reward_clip": 1e5,
    "state_features": 256,
    "base_layers": (256, 128),
    "gru_hidden": 256,
}
PRESETS: dict[str, dict[str, Any]] = {
    "Grid-World": {},
    "Cheetah-Dir": MUJOCO | {"clip_coef": 0.1},
    "Walker": MUJOCO | {"episodes_per_task": 2, "action_embedding": 32, "reward_embedding": 32},
    "Ant-Dir": MUJOCO,
    "Humanoid": MUJOCO | {"gamma": 0.99, "ent_coef": 0.001},
    "Pick-Place": META_WORLD_PRESET,
    "ML10": META_WORLD_PRESET
    | {"total_timesteps": 100_000_000, "eval_interval": 2000, "eval_tasks": 250, "embedding_features": 25},
}


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32, device=device)


def fail(sentence: str) -> NoReturn:
    """Ends the program with one sentence on stderr and exit status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """Args from the command line (default sys.argv): the flags given, over the preset of --env, over the defaults."""
    env_flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    env_flag.add_argument("--env", nargs="?", default="Grid-World")
    env = env_flag.parse_known_args(argv)[0].env
    preset = Args(env=env, **PRESETS[env]) if env in PRESETS else Args()  # an unknown one is refused by tyro
    args = tyro.cli(Args, default=preset, args=argv, description=__doc__.partition("\n")[0])
    if args.resume is None:
        return args
    saved = Args(**load_checkpoint(args.resume)["args"], resume=args.resume)
    args = tyro.cli(Args, default=saved, args=argv, description=__doc__.partition("\n")[0])
    for name, value in asdict(args).items():
        may_differ = name == "env_workers" or (name == "total_timesteps" and value > saved.total_timesteps)
        if value != getattr(saved, name) and not may_differ:
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} {value} contradicts the run in {args.resume} ({getattr(saved, name)}): leave it out.")
    return args


def check_args(args: Args) -> None:
    """Refuses values that cannot work, with one sentence and exit status 2."""
    may_be_zero = {"seed", "checkpoint_interval", "eval_interval", "learning_starts", "gae_lambda", "ent_coef"}
    may_be_zero |= {"env_workers"}
    may_be_zero |= {"vf_coef", "state_features", "embedding_features", "action_embedding"}
    for name, value in asdict(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            flag = f"--{name.replace('_', '-')}"
            if not 0 <= number < 3e38 or (number == 0 and name not in may_be_zero):  # float32 ends there
                least = "0 or more" if name in may_be_zero else "more than 0"
                fail(f"{flag} is {number}: it must be {least}, and below 3e38.")
            if name in ("gamma", "gae_lambda") and number > 1:
                fail(f"{flag} is {number}: it must be at most 1.")
    if not args.base_layers:
        fail("--base-layers needs at least one layer, for example --base-layers 32.")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        fail("--compile needs a C++ compiler: install g++ or clang++, or leave --compile out.")
    if args.track and find_spec("wandb") is None:
        fail("--track needs Weights & Biases: pip install -r requirements-optional.txt, or leave --track out.")
    for flag, count in {"--torch-threads": args.torch_threads, "--env-workers": args.env_workers}.items():
        if count > 1024:
            fail(f"{flag} {count}: it must be at most 1024.")
    if args.grid_size > 100:
        fail(f"--grid-size {args.grid_size}: every cell is a task, so it must be at most 100.")
    try:
        gridworld.goal_cells(args.grid_size, args.grid_goals)
    except ValueError as error:
        fail(f"--grid-size {args.grid_size} does not fit --grid-goals {args.grid_goals}: {error}")
    if args.eval_tasks < 2:
        fail("--eval-tasks 1 gives no standard error: it must be at least 2.")
    batch_size = args.num_envs * args.num_steps
    if batch_size < 2:
        fail("--num-envs 1 x --num-steps 1 is a single frame, whose advantage cannot be normalised: raise one of them.")
    if args.total_timesteps < batch_size:
        fail(
            f"--total-timesteps {args.total_timesteps} is less than one iteration, --num-envs {args.num_envs} x "
            f"--num-steps {args.num_steps} = {batch_size} frames: raise it, or lower one of those."
        )
    if args.num_envs % args.num_minibatches:
        fail(
            f"--num-envs {args.num_envs} do not divide into --num-minibatches {args.num_minibatches}, "
            "which are of whole sequences: change one of the two."
        )
    if args.arch == "film" and args.init not in FILM_SCHEMES:
        fail(f"--arch film generates no weights for --init {args.init}: choose --init from {', '.join(FILM_SCHEMES)}.")
    if args.arch == "standard" and args.init != "bias":
        fail(
            f"--arch standard has no hypernetwork for --init {args.init} to initialise: leave --init out "
            "and choose --base-init, or use --arch hyper."
        )
    if args.arch == "standard" and args.hyper_layers:
        fail("--arch standard has no hypernetwork: leave --hyper-layers out, or use --arch hyper.")
    if not args.hyper_bias and (args.arch != "hyper" or args.init == "bias"):
        fail(
            "--no-hyper-bias leaves nothing of --init bias, and only --arch hyper has that bias: "
            "add --arch hyper and --init weight."
        )


def seeds_of(args: Args) -> dict[str, int]:
    """Independent seeds for everything random, so that neighbouring values of --seed share nothing."""
    names = ("torch", "train_envs", "eval_envs", "buffer", "benchmark")
    return dict(zip(names, map(int, np.random.SeedSequence(args.seed).generate_state(len(names))), strict=True))


def init_label(args: Args) -> str:
    """The initialisation that names the run: the head's, or the base network's own where there is no head."""
    return args.base_init if args.arch == "standard" else args.init


# ---------------------------------------------------------------------------------------------------------------------
# Environments: gymnasium.vector.VectorEnv with autoreset disabled. `reset(seed=, options={"reset_mask": [N]})` draws
# new tasks for the masked environments, or takes them from options["tasks"] [N, ...]; `envs.tasks` holds the present.


# MuJoCo's warnings of physics that has blown up: a bad position, velocity or acceleration
UNSTABLE = [getattr(mujoco.mjtWarning, f"mjWARN_BAD{name}").value for name in ("QPOS", "QVEL", "QACC")]


class MujocoVectorEnv(gym.vector.VectorEnv):
    """N MuJoCo models in this process, one MjData each, with observations and rewards computed for the whole batch.

    One plain loop over MjData comes close to the physics' own speed; a process per environment is slower. Two threads
    are up to 1.8 times as fast as one, but slower on Cheetah-Dir, whose steps are short. A subclass gives the model,
    the tasks, and four functions of the batch: `location`, `observe`, `reward`, `unhealthy`. Rewards are written out
    from the tasks' definitions, since Gymnasium's own classes use other weights. Actions [N, A] in [-1, 1] reach the
    actuators clipped; costs are taken on the raw ones.
    """

    metadata = {"render_modes": [], "autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    xml_file: str
    task_dim = 1
    frame_skip = 5
    horizon = 200  # steps per episode
    qpos_noise = 0.1  # of the initial state, as in Gymnasium's class of the same robot
    qvel_noise: float | None = 0.1  # standard deviation; None: uniform, as qpos_noise
    action_scale = 1.0  # actuator command per unit of action
    contact_forces = False  # whether cfrc_ext is needed: it is 0 until mj_rnePostConstraint

    def __init__(self, num_envs: int, threads: int = 1):
        path = Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / self.xml_file
        self.default_model = mujoco.MjModel.from_xml_path(str(path))
        self.configure(self.default_model)
        self.num_envs = num_envs
        self.shares = [range(k, num_envs, threads) for k in range(threads)]  # of the environments, one per thread
        self.pool = ThreadPoolExecutor(threads)  # mj_step lets other threads run
        self.models = [copy.copy(self.default_model) for _ in range(num_envs)]  # independent copies
        self.data = [mujoco.MjData(model) for model in self.models]
        self.views: dict[str, list[np.ndarray]] = {}
        self.controls = [data.ctrl for data in self.data]  # views into MuJoCo's memory, valid as long as the MjData
        self.warnings = [data.warning.number for data in self.data]
        self.dt = self.default_model.opt.timestep * self.frame_skip  # seconds per step
        self.elapsed = np.zeros(num_envs, int)
        self.tasks = np.zeros((num_envs, self.task_dim))
        mujoco.set_mju_user_warning(lambda message: None)  # unstable physics is counted below, not written to a file
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]  # each draws its own tasks and initial states
        self.single_action_space = gym.spaces.Box(-1, 1, (self.default_model.nu,), np.float32)
        obs_dim = self.observe().shape[1]
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def configure(self, model: mujoco.MjModel) -> None:
        """Changes the model's options before it is copied."""

    def sample_task(self, rng: np.random.Generator) -> float | np.ndarray:
        """Draws a task, [task_dim]."""
        raise NotImplementedError

    def apply_task(self, i: int) -> None:
        """Writes task i into model i, for tasks that live in the physics."""

    def location(self) -> np.ndarray:
        """What the velocity in the reward is measured on, [N, 1] (x) or [N, 2] (x, y), metres."""
        raise NotImplementedError

    def observe(self) -> np.ndarray:
        """Observations [N, D]."""
        raise NotImplementedError

    def reward(self, velocity: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Rewards [N] of velocity [N, 1 or 2] (m/s) and raw actions [N, A]."""
        raise NotImplementedError

    def unhealthy(self) -> np.ndarray:
        """Which robots have fallen, bool [N]."""
        return np.zeros(self.num_envs, bool)

    def state(self, name: str) -> np.ndarray:
        """A field of MjData as a batch, [N, ...]."""
        if name not in self.views:
            self.views[name] = [getattr(data, name) for data in self.data]
        views = self.views[name]
        return np.concatenate(views).reshape(self.num_envs, *views[0].shape)  # faster than np.stack

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)  # [N]
        for i in np.flatnonzero(mask):
            if seed is not None:
                self.rngs[i] = np.random.default_rng(seed + i)
            model, data, rng = self.models[i], self.data[i], self.rngs[i]
            self.tasks[i] = options["tasks"][i] if "tasks" in options else self.sample_task(rng)
            self.apply_task(i)
            mujoco.mj_resetData(model, data)
            data.qpos += rng.uniform(-self.qpos_noise, self.qpos_noise, model.nq)
            if self.qvel_noise is None:
                data.qvel += rng.uniform(-self.qpos_noise, self.qpos_noise, model.nv)
            else:
                data.qvel += self.qvel_noise * rng.standard_normal(model.nv)
            mujoco.mj_forward(model, data)
        self.elapsed[mask] = 0
        return self.observe().astype(np.float32), {}

    def simulate(self, share: range, commands: np.ndarray) -> None:
        """Steps the physics of some environments under commands [N, A]."""
        for i in share:
            self.controls[i][:] = commands[i]
            mujoco.mj_step(self.models[i], self.data[i], self.frame_skip)
            if self.contact_forces:
                mujoco.mj_rnePostConstraint(self.models[i], self.data[i])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        before = self.location()
        low, high = self.default_model.actuator_ctrlrange.T  # [A] each
        commands = np.clip(self.action_scale * actions, low, high)  # [N, A]
        if len(self.shares) == 1:
            self.simulate(self.shares[0], commands)
        else:
            list(self.pool.map(self.simulate, self.shares, itertools.repeat(commands)))
        self.elapsed += 1
        rewards = self.reward((self.location() - before) / self.dt, actions)
        obs = self.observe().astype(np.float32)
        blown_up = np.concatenate(self.warnings).reshape(self.num_envs, -1)[:, UNSTABLE].any(axis=1)  # [N]
        for i in np.flatnonzero(blown_up):  # MuJoCo has put the robot back to the start by itself
            obs[i] = np.nan
            self.warnings[i][:] = 0
        return obs, rewards, self.unhealthy(), self.elapsed >= self.horizon, {}

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on: tasks, counters, generators, physics."""
        parts = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.zeros((self.num_envs, mujoco.mj_stateSize(self.default_model, parts)))
        for model, data, state in zip(self.models, self.data, physics, strict=True):
            mujoco.mj_getState(model, data, state, parts)
        return {
            "tasks": torch.from_numpy(self.tasks.copy()),
            "elapsed": self.elapsed.tolist(),
            "rngs": [rng.bit_generator.state for rng in self.rngs],
            "physics": torch.from_numpy(physics),
            # Results of the last step that observations and velocities are read from
            "views": {name: torch.from_numpy(self.state(name)) for name in self.views},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` stood."""
        self.tasks, self.elapsed = state["tasks"].numpy().copy(), np.array(state["elapsed"])
        for i, (model, data) in enumerate(zip(self.models, self.data, strict=True)):
            self.rngs[i].bit_generator.state = state["rngs"][i]
            self.apply_task(i)
            mujoco.mj_setState(model, data, state["physics"][i].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
            for name, values in state["views"].items():
                getattr(data, name)[:] = values[i].numpy()


class CheetahDir(MujocoVectorEnv):
    """Run forwards or backwards. Task: the direction, -1 or +1. Never ends early. Reward: d dx/dt - 0.05 |a|^2."""

    xml_file = "half_cheetah.xml"
    all_tasks = np.array([[-1.0], [1.0]])

    def sample_task(self, rng):
        return rng.choice(self.all_tasks)

    def location(self):
        return self.state("qpos")[:, :1]

    def observe(self):  # [N, 8 + 9 + 3]
        torso = self.state("xpos")[:, 1]
        return np.concatenate([self.state("qpos")[:, 1:], self.state("qvel"), torso], axis=1)

    def reward(self, velocity, actions):
        return self.tasks[:, 0] * velocity[:, 0] - 0.05 * np.square(actions).sum(axis=1)


class Walker(MujocoVectorEnv):
    """Walk with an unknown body. Task: 65 factors on mass, inertia, friction (1.5^u) and damping (1.3^u), u ~ U(-3, 3).

    Ends when the torso leaves 0.8 < z < 2 or tilts by 1 rad. Reward: dx/dt + 1 - 1e-3 |a|^2.
    NOTE: as in the original tasks, MuJoCo's constants derived from the masses are not recomputed (no mj_setConst).
    """

    xml_file = "walker2d.xml"
    task_dim = 65
    frame_skip = 4
    qpos_noise = 0.005
    qvel_noise = None

    def configure(self, model):
        model.opt.timestep = 0.004  # the original Walker's; Gymnasium's file says 0.002

    def sample_task(self, rng):
        base = np.full(self.task_dim, 1.5)
        base[-self.default_model.nv :] = 1.3  # dof_damping
        return base ** rng.uniform(-3, 3, self.task_dim)

    def apply_task(self, i):
        start = 0
        for name in ("body_mass", "body_inertia", "geom_friction", "dof_damping"):  # 8 + 24 + 24 + 9
            default = getattr(self.default_model, name)
            factors = self.tasks[i, start : start + default.size].reshape(default.shape)
            getattr(self.models[i], name)[:] = default * factors
            start += default.size

    def location(self):
        return self.state("qpos")[:, :1]

    def observe(self):  # [N, 8 + 9]
        return np.concatenate([self.state("qpos")[:, 1:], np.clip(self.state("qvel"), -10, 10)], axis=1)

    def reward(self, velocity, actions):
        return velocity[:, 0] + 1 - 1e-3 * np.square(actions).sum(axis=1)

    def unhealthy(self):
        z, angle = self.state("qpos")[:, 1:3].T
        return ~((0.8 < z) & (z < 2) & (np.abs(angle) < 1))


class AntDir(MujocoVectorEnv):
    """Run in a direction of the plane. Task: the angle, U(0, 2 pi).

    Ends when the torso leaves 0.2 <= z <= 1. Reward: v . d - 0.5 |a|^2 - 0.5e-3 |clip(contact forces, -1, 1)|^2 + 1.
    NOTE: the authors' code has two tasks, +-57 degrees; the paper says that the tasks vary parametrically.
    """

    xml_file = "ant.xml"
    contact_forces = True

    def sample_task(self, rng):
        return rng.uniform(0, 2 * np.pi)

    def location(self):
        return self.state("xpos")[:, 1, :2]  # the torso

    def observe(self):  # [N, 13 + 14]
        return np.concatenate([self.state("qpos")[:, 2:], self.state("qvel")], axis=1)

    def reward(self, velocity, actions):
        speed = velocity[:, 0] * np.cos(self.tasks[:, 0]) + velocity[:, 1] * np.sin(self.tasks[:, 0])
        contact = np.square(np.clip(self.state("cfrc_ext"), -1, 1)).sum(axis=(1, 2))
        return speed - 0.5 * np.square(actions).sum(axis=1) - 0.5e-3 * contact + 1

    def unhealthy(self):
        qpos, qvel = self.state("qpos"), self.state("qvel")
        finite = np.isfinite(qpos).all(axis=1) & np.isfinite(qvel).all(axis=1)
        return ~(finite & (0.2 <= qpos[:, 2]) & (qpos[:, 2] <= 1))


class Humanoid(MujocoVectorEnv):
    """Walk in a direction of the plane. Task: the angle, U(0, 2 pi).

    Ends when the torso leaves 1 < z < 2. Reward, with v of the centre of mass:
    1.25 v . d - 0.1 |ctrl|^2 - min(0.5e-6 |contact forces|^2, 10) + 5.
    """

    xml_file = "humanoid.xml"
    contact_forces = True
    qpos_noise = 0.01
    qvel_noise = None
    action_scale = 0.4

    def sample_task(self, rng):
        return rng.uniform(0, 2 * np.pi)

    def location(self):
        mass = self.default_model.body_mass
        return np.einsum("b,nbx->nx", mass / mass.sum(), self.state("xipos"))[:, :2]

    def observe(self):  # [N, 22 + 23 + 130 + 78 + 17 + 78], Gymnasium's Humanoid-v5
        parts = [self.state("qpos")[:, 2:], self.state("qvel"), self.state("cinert")[:, 1:], self.state("cvel")[:, 1:]]
        parts += [self.state("qfrc_actuator")[:, 6:], self.state("cfrc_ext")[:, 1:]]
        return np.concatenate([part.reshape(self.num_envs, -1) for part in parts], axis=1)

    def reward(self, velocity, actions):
        speed = velocity[:, 0] * np.cos(self.tasks[:, 0]) + velocity[:, 1] * np.sin(self.tasks[:, 0])
        contact = np.square(self.state("cfrc_ext")).sum(axis=(1, 2))
        control = np.square(self.action_scale * actions).sum(axis=1)
        return 1.25 * speed - 0.1 * control - np.minimum(0.5e-6 * contact, 10) + 5

    def unhealthy(self):
        z = self.state("qpos")[:, 2]
        return ~((1 <= z) & (z <= 2))


MUJOCO_ENVS = {"Cheetah-Dir": CheetahDir, "Walker": Walker, "Ant-Dir": AntDir, "Humanoid": Humanoid}


# Meta-World's benchmarks: how each is made from a seed
META_WORLD = {
    "Pick-Place": lambda metaworld, seed: metaworld.ML1("pick-place-v3", seed=seed),  # 50 training, 50 test goals
    "ML10": lambda metaworld, seed: metaworld.ML10(seed=seed),  # 10 training, 5 test classes of 50 goals each
}


@cache
def make_benchmark(env: str, seed: int) -> Any:
    """The metaworld.Benchmark with its training and test tasks; made once (ML10 takes seconds), imported if needed."""
    import metaworld

    return META_WORLD[env](metaworld, seed)


class MetaWorldGroup(gym.Env):
    """Some of Meta-World's environments, stepped in turn as one: what one process holds.

    Observations [n, 39] with the goal zeroed, actions [n, 4], clipped to [-1, 1] as the gripper's motors do, rewards
    [n]; info["success"] [n] is of this step alone. Nothing is random once a task is set: a reset forgets all before it.
    """

    def __init__(self, benchmark: Any, tasks: list[Any], rows: slice, run_process: int):
        if os.getpid() != run_process:  # a worker: a signal that stops the run must not stop it before
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mujoco.set_mju_user_warning(lambda message: None)  # unstable physics is counted below, not written to a file
        self.classes = {**benchmark.train_classes, **benchmark.test_classes}
        self.tasks, self.rows, size = tasks, rows, rows.stop - rows.start
        self.robots: list[dict[str, Any]] = [{} for _ in range(size)]  # by class; some 20 MB each, built when needed
        self.running: list[Any] = [None] * size  # the one of them whose task is running
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size, 39), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (size, 4), np.float32)
        self.obs = np.zeros((size, 39), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode wherever options["tasks"] [N] gives the number of a task, and not where it gives -1."""
        for i, number in enumerate(options["tasks"][self.rows]):
            if number < 0:
                continue
            task = self.tasks[number]
            if task.env_name not in self.robots[i]:
                robot = self.classes[task.env_name]()
                robot.touching_object = lambda geom: False  # half of pick-place's step, for info["grasp_success"] only
                self.robots[i][task.env_name] = robot
            self.running[i] = self.robots[i][task.env_name]
            self.running[i].set_task(task)
            self.obs[i] = self.running[i].reset()[0]
        return self.obs.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool, bool, dict]:
        rewards, success = np.zeros(len(actions)), np.zeros(len(actions), bool)
        for i, (robot, action) in enumerate(zip(self.running, np.clip(actions, -1, 1), strict=True)):
            self.obs[i], rewards[i], _, _, info = robot.step(action)
            success[i] = info["success"]
            if robot.data.warning.number[UNSTABLE].any():  # MuJoCo has put the robot back to the start by itself
                self.obs[i] = np.nan
        return self.obs.copy(), rewards, False, False, {"success": success}


def end_workers(envs: gym.vector.AsyncVectorEnv) -> None:
    """Kills the worker processes, which hold nothing that could be lost."""
    for process in envs.processes:
        process.kill()
        process.join()
    envs.closed = True  # nothing is left to be closed


class MetaWorldVectorEnv(gym.vector.VectorEnv):
    """N of Meta-World's environments, in equal groups, one per worker process; 500 steps per episode.

    A task is its number: the training tasks come first, then the test tasks, the classes taking turns in both. New
    tasks are drawn from the training tasks alone: a class, none twice before each was drawn once, then one of its
    goals. `success` [N] says where the last step fulfilled the task, which may be undone again.
    NOTE: Meta-World's steps are mostly Python, so that processes help; its own `gym.make_vec` trains on the test tasks.
    """

    metadata = {"render_modes": [], "autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    horizon = 500  # steps per episode

    def __init__(self, benchmark: Any, num_envs: int, max_workers: int, end_on_success: bool):
        tasks: list[Any] = []
        for classes, class_tasks in (
            (benchmark.train_classes, benchmark.train_tasks),
            (benchmark.test_classes, benchmark.test_tasks),
        ):
            goals = len(class_tasks) // len(classes)  # of each class, in succession
            tasks += [class_tasks[k * goals + goal] for goal in range(goals) for k in range(len(classes))]
        self.class_names = [task.env_name for task in tasks]  # of every task
        self.num_classes = len(benchmark.train_classes)
        self.num_train = len(benchmark.train_tasks)
        self.train_tasks = np.arange(self.num_train)[:, None]  # [num_train, 1]
        self.test_tasks = np.arange(self.num_train, len(tasks))[:, None]

        self.num_envs, self.end_on_success = num_envs, end_on_success
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on macOS
        max_workers = max_workers or cores or 1
        workers = max(count for count in range(1, max_workers + 1) if num_envs % count == 0)
        size = num_envs // workers
        groups = [
            partial(MetaWorldGroup, benchmark, tasks, slice(start, start + size), os.getpid())
            for start in range(0, num_envs, size)
        ]
        if workers == 1:
            self.groups = groups[0]()  # actions [N, 4]
        else:  # actions [workers, N / workers, 4]
            self.groups = gym.vector.AsyncVectorEnv(groups, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
            self.end_workers = weakref.finalize(self, end_workers, self.groups)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.single_action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self.rngs = [np.random.default_rng() for _ in range(num_envs)]  # each draws its own tasks
        self.classes_left: list[list[int]] = [[] for _ in range(num_envs)]  # not drawn since each was
        self.tasks = np.zeros((num_envs, 1), int)
        self.elapsed = np.zeros(num_envs, int)
        self.actions = np.zeros((num_envs, self.horizon, 4), np.float32)  # of the running episodes, for get_state
        self.success = np.zeros(num_envs, bool)

    def sample_task(self, i: int) -> int:
        """Draws a training task for environment i."""
        if not self.classes_left[i]:
            self.classes_left[i] = self.rngs[i].permutation(self.num_classes).tolist()
        goal = self.rngs[i].integers(self.num_train // self.num_classes)
        return goal * self.num_classes + self.classes_left[i].pop()

    def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Calls `reset` or `step` of all groups. Raises ChildProcessError where a worker has died or failed."""
        try:
            return getattr(self.groups, method)(*args, **kwargs)
        except Exception as error:
            if isinstance(self.groups, MetaWorldGroup):
                raise
            processes = self.groups.processes
            dead = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=5)
            what = f"an environment worker failed ({type(error).__name__}: {error})"
            if isinstance(error, EOFError | ConnectionError):  # its pipe was closed from the other side
                for process in [process for process in processes if process.sentinel in dead]:
                    process.join()
                    what = f"{process.name} (process {process.pid}) ended with status {process.exitcode}"
            self.end_workers()
            raise ChildProcessError(what) from error

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)  # [N]
        for i in np.flatnonzero(mask):
            if seed is not None:
                self.rngs[i], self.classes_left[i] = np.random.default_rng(seed + i), []
            self.tasks[i] = options["tasks"][i] if "tasks" in options else self.sample_task(i)
        self.elapsed[mask] = 0
        obs, info = self.call("reset", options={"tasks": np.where(mask, self.tasks[:, 0], -1)})
        return obs.reshape(self.num_envs, -1), info

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.actions[np.arange(self.num_envs), self.elapsed] = actions
        self.elapsed += 1
        obs, rewards, _, _, info = self.call("step", actions.reshape(self.groups.action_space.shape))
        self.success = info["success"].reshape(self.num_envs)
        terminated = self.success & self.end_on_success
        return obs.reshape(self.num_envs, -1), rewards.reshape(-1), terminated, self.elapsed >= self.horizon, {}

    def close_extras(self, **kwargs: Any) -> None:
        if isinstance(self.groups, gym.vector.AsyncVectorEnv):
            self.end_workers()

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on. An episode follows from its task and the actions so far."""
        return {
            "tasks": torch.from_numpy(self.tasks.copy()),
            "elapsed": self.elapsed.tolist(),
            "rngs": [rng.bit_generator.state for rng in self.rngs],
            "classes_left": [list(classes) for classes in self.classes_left],
            "actions": torch.from_numpy(self.actions[:, : self.elapsed.max()].copy()),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` stood: the running episodes are played again, which takes seconds."""
        self.tasks, self.elapsed = state["tasks"].numpy().copy(), np.array(state["elapsed"])
        self.classes_left = [list(classes) for classes in state["classes_left"]]
        for rng, generator_state in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = generator_state
        longest = self.elapsed.max()
        self.actions[:, :longest] = state["actions"].numpy()
        self.call("reset", options={"tasks": self.tasks[:, 0]})  # only that all can step; each begins again below
        for left in range(longest, -1, -1):  # steps until now
            if (begins := self.elapsed == left).any():
                self.call("reset", options={"tasks": np.where(begins, self.tasks[:, 0], -1)})
            if left:  # an environment that has not begun its episode takes any action
                actions = self.actions[np.arange(self.num_envs), np.maximum(self.elapsed - left, 0)]
                self.call("step", actions.reshape(self.groups.action_space.shape))


class MetaEpisodes:
    """Meta-episodes over a VectorEnv (section 3.1): `episodes_per_task` episodes on one task, then a new task.

    META-RL: with several episodes, a flag joins the observation: 1 on the observation that ended an episode. The
    encoder sees that one; the policy acts on the next episode's first, whose flag is 0.
    """

    def __init__(self, envs: gym.vector.VectorEnv, episodes_per_task: int):
        self.envs, self.num_envs, self.episodes_per_task = envs, envs.num_envs, episodes_per_task
        self.has_flag = episodes_per_task > 1
        self.max_steps = episodes_per_task * envs.horizon  # of a meta-episode
        self.episode = np.zeros(envs.num_envs, int)  # index of the running episode, [N]
        self.blow_ups = 0  # episodes that ended because observation or reward were not finite
        self.tasks_stay = False  # whether the tasks were given, and no new ones are drawn
        self.has_success = hasattr(envs, "success")  # whether episodes succeed or fail
        self.success = np.zeros(envs.num_envs, bool)  # where the last step fulfilled the task, [N]
        self.obs_dim = envs.single_observation_space.shape[0] + self.has_flag
        self.discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)
        self.action_dim = int(envs.single_action_space.n) if self.discrete else envs.single_action_space.shape[0]
        self.all_tasks = getattr(envs, "all_tasks", None)  # [num_tasks, task_dim], where they are finitely many

    def task_ids(self) -> np.ndarray:
        """The number of each environment's present task among all_tasks, [N]."""
        return (self.envs.tasks[:, None] == self.all_tasks).all(axis=2).argmax(axis=1)

    def add_flag(self, obs: np.ndarray, episode_done: np.ndarray) -> np.ndarray:
        return np.column_stack([obs, episode_done.astype(np.float32)]) if self.has_flag else obs  # [N, D]

    def clear_flag(self, obs: Tensor) -> Tensor:
        """The observations [N, D] with the flag at 0."""
        return torch.cat([obs[:, :-1], torch.zeros_like(obs[:, -1:])], dim=1) if self.has_flag else obs

    def reset(self, seed: int | None = None, tasks: np.ndarray | None = None) -> np.ndarray:
        """Starts a meta-episode everywhere, on drawn tasks or given ones, which stay; returns observations [N, D]."""
        self.tasks_stay = tasks is not None
        obs, _ = self.envs.reset(seed=seed, options={} if tasks is None else {"tasks": tasks})
        self.episode[:] = 0
        self.obs = obs  # the last one, without the flag
        return self.add_flag(obs, np.zeros(self.num_envs))

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on."""
        progress = {"episode": self.episode.tolist(), "blow_ups": self.blow_ups, "obs": torch.from_numpy(self.obs)}
        return progress | {"envs": self.envs.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` stood."""
        self.episode, self.blow_ups, self.obs = np.array(state["episode"]), state["blow_ups"], state["obs"].numpy()
        self.envs.set_state(state["envs"])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Steps all environments; where an episode ends the next one begins, on a new task after the last.

        Returns final_obs [N, D], what the action led to (flag 1 where it ended an episode), for the encoder;
        rewards [N]; episode_done, task_done, bool [N]; time_limit, bool [N], where the task ended only because time ran
        out; next_obs [N, D], what the policy acts on next (after a reset where an episode ended).
        """
        obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        finite = np.isfinite(obs).all(axis=1) & np.isfinite(rewards)  # [N]
        if not finite.all():  # the episode ends where it stood, with nothing for the step
            obs, rewards = np.where(finite[:, None], obs, self.obs), np.where(finite, rewards, 0.0)
            terminated = terminated | ~finite
            self.blow_ups += int((~finite).sum())
        if self.has_success:
            self.success = self.envs.success & finite
        episode_done = terminated | truncated
        self.episode += episode_done
        task_done = self.episode == self.episodes_per_task
        final_obs = next_obs = self.add_flag(obs, episode_done)
        if episode_done.any():
            new_task = task_done & (not self.tasks_stay)
            if (same_task := episode_done & ~new_task).any():
                obs, _ = self.envs.reset(options={"reset_mask": same_task, "tasks": self.envs.tasks})
            if new_task.any():
                obs, _ = self.envs.reset(options={"reset_mask": new_task})
            next_obs = self.add_flag(obs, np.zeros(self.num_envs))
            self.episode[task_done] = 0
        self.obs = obs
        return final_obs, rewards, episode_done, task_done, task_done & ~terminated, next_obs


def make_envs(args: Args, num_envs: int) -> MetaEpisodes:
    """A batch of `num_envs` environments of `args.env`."""
    if args.env == "Grid-World":
        grid = {"size": args.grid_size, "horizon": args.grid_horizon, "goals": args.grid_goals}
        envs = gym.make_vec("GridWorld-v0", num_envs=num_envs, **grid)
    elif args.env in META_WORLD:
        benchmark = make_benchmark(args.env, seeds_of(args)["benchmark"])
        envs = MetaWorldVectorEnv(benchmark, num_envs, args.env_workers, args.end_on_success)
    else:
        envs = MUJOCO_ENVS[args.env](num_envs, threads=args.env_workers or 1)
    return MetaEpisodes(envs, args.episodes_per_task)


# ---------------------------------------------------------------------------------------------------------------------
# Maths


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    dones: Tensor,
    final_values: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalized advantage estimates (Schulman et al., 2016), [T, N].

    META-RL: `dones` [T, N] is 1 where a *meta-episode* ended: the objective is the return of the whole meta-episode,
    Eq. (1), so advantages flow across the episodes inside it. There `final_values` [T, N] stands for the value of what
    followed: that of the last observation at a time limit, 0 at a true end. next_value [N] follows the last step.
    """
    next_values = torch.cat([values[1:], next_value[None]])  # [T, N]
    deltas = rewards + gamma * torch.where(dones.bool(), final_values, next_values) - values  # [T, N]
    advantages = torch.zeros_like(rewards)
    lastgaelam = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        advantages[t] = lastgaelam = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * lastgaelam
    return advantages


def policy_loss(logratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO's clipped surrogate objective (Schulman et al., 2017), from [B] tensors; a scalar."""
    ratio = logratio.exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()


def value_loss(newvalues: Tensor, values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """Half the larger of Huber's loss and that of the value held within clip_coef of the old one; [B] to a scalar."""
    clipped = values + (newvalues - values).clamp(-clip_coef, clip_coef)
    losses = F.smooth_l1_loss(newvalues, returns, reduction="none")
    return 0.5 * torch.max(losses, F.smooth_l1_loss(clipped, returns, reduction="none")).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class RunningMeanStd(nn.Module):
    """Mean and variance of all data so far; normalises [..., D] by them (parallel formula of Chan et al.)."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Takes in the rows of x [B, D]."""
        mean, var, count = x.mean(0), x.var(0, unbiased=False), len(x)
        total = self.count + count
        share = (count / total).float()  # of the new rows
        delta = mean - self.mean
        self.var.copy_(self.var * (1 - share) + var * share + delta.square() * share * (1 - share))
        self.mean.add_(delta * share)
        self.count.copy_(total)

    def forward(self, x: Tensor, clip: float) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-clip, clip)


class Encoder(nn.Module):
    """The task embedding: a GRU over (action, next observation, reward), then linear + ReLU.

    Duan et al., 2016; section 3.2 of the paper.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = (action_dim, args.action_embedding), (obs_dim, args.state_embedding), (1, args.reward_embedding)
        self.embeddings = nn.ModuleList(nn.Linear(size, units) if units else None for size, units in sizes)
        self.gru = nn.GRU(sum(units for _, units in sizes), args.gru_hidden)
        self.output = nn.Linear(args.gru_hidden, args.latent_dim)

    def inputs(self, actions: Tensor, next_obs: Tensor, rewards: Tensor) -> Tensor:
        """What the GRU reads, [T, B, .]."""
        parts = zip(self.embeddings, (actions, next_obs, rewards), strict=True)
        return torch.cat([F.relu(layer(x)) for layer, x in parts if layer is not None], dim=-1)

    def unroll(self, actions: Tensor, next_obs: Tensor, rewards: Tensor, cleared: Tensor, hidden: Tensor) -> Tensor:
        """GRU states *before* each step, [T, B, H], of sequences [T, B, .] that begin in the state hidden [B, H].

        META-RL: `cleared` [T, B] is 1 where a task ended with the step: the memory is cleared there, and kept at the
        end of an episode. One GRU call for every stretch in which no environment's memory is cleared.
        """
        x = self.inputs(actions, next_obs, rewards)  # [T, B, .]
        ends = (cleared[:-1].any(dim=1).nonzero()[:, 0] + 1).tolist()  # steps before which a memory is cleared
        states = []
        for start, end in zip([0, *ends], [*ends, len(x)], strict=True):
            after = self.gru(x[start:end], hidden[None])[0]  # states after each step of the stretch
            states += [hidden[None], after[:-1]]
            hidden = torch.where(cleared[end - 1, :, None] > 0, 0, after[-1])
        return torch.cat(states)


TANH_GAIN = nn.init.calculate_gain("tanh")  # 5/3
BASE_INITS = {
    "normc": partial(normc_, gain=TANH_GAIN),
    "orthogonal": partial(nn.init.orthogonal_, gain=TANH_GAIN),
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="tanh"),
}


def init_base_network_(layers: nn.ModuleList, head: Literal["discrete", "continuous", "critic"], args: Args) -> None:
    """Initialises a base network: its layers' own weights by f, or the hypernetwork heads that generate them by --init.

    f (section 4.2) is --base-init for hidden layers, with bias 0. The output layer's f is orthogonal with gain 0.01 for
    discrete actions, normc with gain 1 for continuous ones, and PyTorch's default for the critic.
    """
    for i, layer in enumerate(layers):
        f_weight, f_bias, gain = BASE_INITS[args.base_init], nn.init.zeros_, TANH_GAIN
        if i == len(layers) - 1:
            gain = 1.0
            if head == "discrete":
                f_weight = partial(nn.init.orthogonal_, gain=0.01)
            elif head == "continuous":
                f_weight = normc_
            else:
                bound = args.base_layers[-1] ** -0.5  # PyTorch's default: U(+-1 / sqrt(fan-in)) for weight and bias
                f_weight = f_bias = partial(nn.init.uniform_, a=-bound, b=bound)
        if isinstance(layer, HyperLinear):
            init_hyper_linear_(layer, args.init, f_weight, f_bias, gain)
        elif isinstance(layer, FilmLinear):
            init_film_linear_(layer, args.init, f_weight)
        else:
            f_weight(layer.weight)
            f_bias(layer.bias)


def feature_layer(size: int, units: int) -> tuple[nn.Module, int]:
    """A linear + tanh layer in front of the networks, and its width; with 0 units nothing, at the input's own size."""
    return (nn.Sequential(nn.Linear(size, units), nn.Tanh()), units) if units else (nn.Identity(), size)


class StandardPolicy(nn.Module):
    """The standard architecture (section 3.2): the embedding's features are an input beside the observation's."""

    def __init__(self, obs_dim: int, embedding_dim: int, actor_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.obs_features, obs_width = feature_layer(obs_dim, args.state_features)
        self.embedding_features, width = feature_layer(embedding_dim, args.embedding_features)
        sizes = [obs_width + width, *args.base_layers]
        self.actor = nn.ModuleList(map(nn.Linear, sizes, [*sizes[1:], actor_dim]))
        self.critic = nn.ModuleList(map(nn.Linear, sizes, [*sizes[1:], 1]))
        init_base_network_(self.actor, "discrete" if discrete else "continuous", args)
        init_base_network_(self.critic, "critic", args)

    def forward(self, obs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Actor's outputs [B, A] and values [B] of normalised observations [B, D] and embeddings [B, embedding_dim]."""
        features = self.obs_features(obs), self.embedding_features(embedding)
        actor = critic = torch.cat(features, dim=-1)  # [B, state_features + K]
        for layer in self.actor[:-1]:
            actor = torch.tanh(layer(actor))
        for layer in self.critic[:-1]:
            critic = torch.tanh(layer(critic))
        return self.actor[-1](actor), self.critic[-1](critic)[:, 0]


class HyperPolicy(nn.Module):
    """The paper's architecture (section 4.1): the embedding's features x give the weights of actor and critic.

    The observation's features pass the base networks; x passes the hypernetwork's hidden layers, if any, and its heads,
    which are the layers' stacks (hyperinit.py). With FilmLinear layers it is the FiLM baseline (section 4.3).
    NOTE: HFI, HFO and Weight-HyperInit assume |x|^2 = K; behind tanh, and PyTorch's hidden layers, x is smaller.
    """

    def __init__(self, obs_dim: int, embedding_dim: int, actor_dim: int, discrete: bool, args: Args):
        super().__init__()
        layer = HyperLinear if args.arch == "hyper" else FilmLinear
        self.hyper_bias = float(args.hyper_bias)
        self.obs_features, obs_width = feature_layer(obs_dim, args.state_features)
        self.embedding_features, width = feature_layer(embedding_dim, args.embedding_features)
        hyper_sizes = [width, *args.hyper_layers]
        self.hyper_hidden = nn.ModuleList(map(nn.Linear, hyper_sizes, hyper_sizes[1:]))
        sizes = [obs_width, *args.base_layers]
        widths = [hyper_sizes[-1]] * len(sizes)  # K, of every layer
        self.actor = nn.ModuleList(map(layer, sizes, [*sizes[1:], actor_dim], widths))
        self.critic = nn.ModuleList(map(layer, sizes, [*sizes[1:], 1], widths))
        init_base_network_(self.actor, "discrete" if discrete else "continuous", args)
        init_base_network_(self.critic, "critic", args)

    def forward(self, obs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Actor's outputs [B, A] and values [B] of normalised observations [B, D] and embeddings [B, embedding_dim]."""
        x = self.embedding_features(embedding)  # [B, K]
        for layer in self.hyper_hidden:
            x = F.relu(layer(x))
        x = F.pad(x, (0, 1), value=self.hyper_bias)  # (x, 1) [B, K+1]: a stack's last slice is the head's bias
        actor = critic = self.obs_features(obs)  # [B, state_features]
        for layer in self.actor[:-1]:
            actor = torch.tanh(layer(actor, x))
        for layer in self.critic[:-1]:
            critic = torch.tanh(layer(critic, x))
        return self.actor[-1](actor, x), self.critic[-1](critic, x)[:, 0]


class Agent(nn.Module):
    """The encoder, the policy and the normalisers: all that a saved model needs.

    What the agent knows of the task is its belief [N, H]: the encoder's GRU state, from which the embedding that enters
    the policy follows.
    """

    def __init__(self, envs: MetaEpisodes, args: Args):
        super().__init__()
        self.discrete, self.action_dim, self.norm_clip = envs.discrete, envs.action_dim, args.norm_clip
        self.encoder = Encoder(envs.obs_dim, envs.action_dim, args)
        policy = StandardPolicy if args.arch == "standard" else HyperPolicy
        self.policy = policy(envs.obs_dim, args.latent_dim, envs.action_dim, envs.discrete, args)
        if not envs.discrete:
            self.policy.log_std = nn.Parameter(torch.zeros(envs.action_dim))  # free, not generated
        self.obs_norm = RunningMeanStd(envs.obs_dim)
        self.reward_norm = RunningMeanStd(1)  # of the discounted return; only its variance is used

    def initial_belief(self, envs: MetaEpisodes) -> Tensor:
        """The belief at the beginning of every environment's present task, [N, H]: the memory is empty."""
        return self.obs_norm.mean.new_zeros(envs.num_envs, self.encoder.gru.hidden_size)

    def embedding(self, belief: Tensor) -> Tensor:
        """What the policy sees of the belief, [..., L]. NOTE: not normalised, as HFI and HFO assume."""
        return F.relu(self.encoder.output(belief))

    def action_vector(self, action: Tensor) -> Tensor:
        """Actions as the encoder sees them: one-hot or raw, float [..., A]."""
        return F.one_hot(action, self.action_dim).float() if self.discrete else action

    def update_belief(self, belief: Tensor, action: Tensor, next_obs: Tensor, reward: Tensor) -> Tensor:
        """The belief [N, H] after one more step: action ([N] or [N, A]), next_obs [N, D] and reward [N]."""
        x = self.encoder.inputs(self.action_vector(action)[None], next_obs[None], reward[None, :, None])  # [1, N, .]
        return self.encoder.gru(x, belief[None])[0][0]

    def outputs(self, obs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Actor's outputs [B, A] and values [B] of raw observations [B, D] and embeddings [B, .]."""
        return self.policy(self.obs_norm(obs, self.norm_clip), embedding)

    def get_value(self, obs: Tensor, embedding: Tensor) -> Tensor:
        return self.outputs(obs, embedding)[1]

    def get_greedy_action(self, obs: Tensor, embedding: Tensor) -> Tensor:
        """The likeliest action: [B] for discrete actions, [B, A] for continuous ones."""
        output = self.outputs(obs, embedding)[0]
        return output.argmax(-1) if self.discrete else output

    def get_action_and_value(
        self, obs: Tensor, embedding: Tensor, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """An action (drawn, or the given one), its log-probability, the entropy and the value; [B] or [B, A]."""
        output, value = self.outputs(obs, embedding)
        if self.discrete:
            dist = Categorical(logits=output, validate_args=False)
            action = dist.sample() if action is None else action
            return action, dist.log_prob(action), dist.entropy(), value
        dist = Normal(output, self.policy.log_std.exp(), validate_args=False)
        action = dist.sample() if action is None else action
        return action, dist.log_prob(action).sum(-1), dist.entropy().sum(-1), value


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def make_eval_envs(args: Args) -> MetaEpisodes:
    """One environment per evaluation task: --eval-tasks, or Grid-World's goals; on Meta-World --num-envs in turn."""
    if args.env == "Grid-World":
        return make_envs(args, len(gridworld.goal_cells(args.grid_size, args.grid_goals)))
    return make_envs(args, min(args.num_envs, args.eval_tasks) if args.env in META_WORLD else args.eval_tasks)


@torch.no_grad()
def evaluate(
    agent: Agent, envs: MetaEpisodes, seed: int, tasks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns of each episode of one meta-episode per task under the greedy policy, [num_tasks, episodes_per_task].

    And, where episodes succeed or fail, which did in any step, 0 or 1, of the same shape. The initial states are those
    of `seed`, and so are the tasks, one per environment, unless they are given or finitely many: then they take turns.
    On Grid-World, every goal once, policy and environment are deterministic, so that the mean is the exact expectation.
    Nothing of the training is touched.
    """
    device = agent.obs_norm.mean.device
    if tasks is None and envs.all_tasks is not None:
        tasks = np.resize(envs.all_tasks, (envs.num_envs, envs.all_tasks.shape[1]))
    num_tasks = envs.num_envs if tasks is None else len(tasks)
    returns, successes = np.zeros((2, num_tasks, envs.episodes_per_task))
    for start in range(0, num_tasks, envs.num_envs):
        rows = np.arange(start, min(start + envs.num_envs, num_tasks))  # the tasks of this round
        round_tasks = None if tasks is None else np.resize(tasks[rows], (envs.num_envs, tasks.shape[1]))
        obs = to_tensor(envs.reset(seed, round_tasks), device)  # [N, D]
        belief = agent.initial_belief(envs)  # [N, H]
        finished = np.arange(envs.num_envs) >= len(rows)
        while not finished.all():
            action = agent.get_greedy_action(obs, agent.embedding(belief))
            recorded = np.flatnonzero(~finished)  # an environment that is done early goes on, unrecorded
            episode = envs.episode[recorded]
            final_obs, reward, _, task_done, _, next_obs = envs.step(action.cpu().numpy())
            returns[start + recorded, episode] += reward[recorded]
            successes[start + recorded, episode] += envs.success[recorded]
            finished |= task_done
            belief = agent.update_belief(belief, action, to_tensor(final_obs, device), to_tensor(reward, device))
            belief = torch.where(torch.from_numpy(task_done).to(device)[:, None], agent.initial_belief(envs), belief)
            obs = to_tensor(next_obs, device)
    return returns, (successes > 0).astype(float) if envs.has_success else None


def summarize(returns: np.ndarray, successes: np.ndarray | None = None) -> dict[str, dict[str, float]]:
    """Mean, standard error and count of the meta-episode's return and of each episode's, from [num_tasks, episodes].

    With successes (0 or 1) also of each episode's success in percent; that of the last episode on the test tasks is the
    meta-test success percentage of the paper's Table 2. The standard error of a single task is 0.
    """
    columns = {"meta_episodic_return": returns.sum(axis=1)}
    columns |= {f"episodic_return_ep{k + 1}": returns[:, k] for k in range(returns.shape[1])}
    if successes is not None:
        columns |= {f"success_ep{k + 1}": 100 * successes[:, k] for k in range(returns.shape[1])}
    return {
        name: {"mean": float(x.mean()), "stderr": float(x.std(ddof=int(len(x) > 1)) / len(x) ** 0.5), "count": len(x)}
        for name, x in columns.items()
    }


def evaluate_groups(agent: Agent, envs: MetaEpisodes, args: Args) -> dict[str, dict[str, dict[str, float]]]:
    """Summaries of evaluations: "eval", of tasks that may be trained on, and on Meta-World "test", of held-out ones.

    Where these are of several classes, also of every class, for example "test/door-close-v3".
    """
    seed = seeds_of(args)["eval_envs"]
    if args.env not in META_WORLD:
        return {"eval": summarize(*evaluate(agent, envs, seed))}
    summaries = {}
    for group, tasks in {"eval": envs.envs.train_tasks, "test": envs.envs.test_tasks}.items():
        tasks = tasks[: args.eval_tasks]
        returns, successes = evaluate(agent, envs, seed, tasks)
        summaries[group] = summarize(returns, successes)
        classes = np.array([envs.envs.class_names[task] for task in tasks[:, 0]])
        if len(names := np.unique(classes)) > 1:
            for name in names:
                summaries[f"{group}/{name}"] = summarize(returns[classes == name], successes[classes == name])
    return summaries


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parameter_counts(agent: Agent) -> dict[str, int]:
    """Numbers of trained parameters: of everything, of the hypernetwork, and of one base network (actor and critic)."""
    counts = {"total": count_parameters(agent), "hypernetwork": 0, "base_network": 0}
    if isinstance(agent.policy, HyperPolicy):
        counts["hypernetwork"] = count_parameters(agent.policy.hyper_hidden)
    for parameter in [*agent.policy.actor.parameters(), *agent.policy.critic.parameters()]:
        is_stack = parameter.dim() == 3  # [K+1, out, in], of which a base network gets one slice's worth
        counts["hypernetwork"] += parameter.numel() if is_stack else 0
        counts["base_network"] += parameter[0].numel() if is_stack else parameter.numel()
    return counts


def load_model(path: str, env: str, env_workers: int = 0) -> tuple[Agent, Args, MetaEpisodes]:
    """Agent, Args and evaluation environments of a file of --save-model; refuses another with exit status 2."""
    not_a_model = f"{path} is not a model of {Path(__file__).name}: give the model.pt that --save-model wrote."
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        args = Args(**model["args"] | {"env_workers": env_workers})
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        fail(f"cannot read {path}: {error.strerror}.")
    except Exception:  # whatever a foreign or damaged file may raise
        fail(not_a_model)
    if args.env != env:
        fail(f"{path} holds an agent of {args.env}, not of {env}: add --env {args.env}.")
    try:
        envs = make_eval_envs(args)
        agent = Agent(envs, args)
        agent.load_state_dict(model["agent"])
    except ChildProcessError:  # an environment worker's end
        raise
    except Exception:
        fail(not_a_model)
    return agent, args, envs


def format_evaluations(evaluations: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns, and success where there is such a thing, of "eval" and "test" in a line."""
    texts = []
    for group in [group for group in ("eval", "test") if group in evaluations]:
        total = evaluations[group]["meta_episodic_return"]
        text = f"meta-episode return {total['mean']:.2f} +- {total['stderr']:.2f} ({total['count']} tasks)"
        for title, name in (("by episode", "episodic_return_ep"), ("success in %", "success_ep")):
            episodes = [value["mean"] for key, value in evaluations[group].items() if key.startswith(name)]
            if len(episodes) > 1 or (episodes and name == "success_ep"):
                text += f", {title} " + " ".join(f"{mean:.2f}" for mean in episodes)
        texts.append(text)
    return "; test tasks: ".join(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def make_folder(folder: Path) -> Path:
    """Makes a folder that was not there before: `folder`, or the same with a number. Raises OSError where it cannot."""
    for attempt in itertools.count(1):
        candidate = folder if attempt == 1 else folder.with_name(f"{folder.name}-{attempt}")
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not candidate.is_dir():
                raise


def capture(args: Args, agent: Agent, optimizers: list[torch.optim.Optimizer], envs: MetaEpisodes) -> dict[str, Any]:
    """Everything that the rest of a run depends on, but for main's own counters, as tensors and plain values."""
    return {
        "script": Path(__file__).stem,
        "args": {name: value for name, value in asdict(args).items() if name != "resume"},
        "agent": agent.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "envs": envs.get_state(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(
    checkpoint: dict[str, Any], agent: Agent, optimizers: list[torch.optim.Optimizer], envs: MetaEpisodes
) -> None:
    """Puts back what `capture` took."""
    agent.load_state_dict(checkpoint["agent"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    envs.set_state(checkpoint["envs"])
    torch.set_rng_state(checkpoint["rng"])
    if checkpoint["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"][: torch.cuda.device_count()])


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place, whole and on the disk, when the block ends without an error."""
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_checkpoint(folder: str) -> dict[str, Any]:
    """The last checkpoint of a run; refuses another file with one sentence. No file can run code (weights_only)."""
    path = Path(folder) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict):
            raise TypeError("not a dictionary")
        if checkpoint["script"] != Path(__file__).stem:
            fail(f"{path} belongs to {checkpoint['script']}.py: resume it with that script.")
        args = asdict(Args(**checkpoint["args"]))
        for name, default in asdict(Args()).items():
            if default is not None and type(args[name]) is not type(default):
                raise TypeError(name)
            if isinstance(default, tuple) and not all(type(units) is int for units in args[name]):
                raise TypeError(name)
            choices = get_args(Args.__annotations__[name])
            if isinstance(default, str) and choices and args[name] not in choices:
                raise ValueError(name)
        return checkpoint
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        fail(f"cannot read {path}: {error.strerror}.")
    except Exception:  # whatever a foreign or damaged file may raise
        fail(f"{path} is not a checkpoint of {Path(__file__).name}: give the folder of one of its runs.")


def watch_signals() -> list[signal.Signals]:
    """A list that SIGTERM and Ctrl-C are put into, to stop after the iteration; a second one stops at once."""
    received: list[signal.Signals] = []

    def receive(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)
    return received


# ---------------------------------------------------------------------------------------------------------------------
# Training


def start_tracking(args: Args, folder: Path) -> None:
    """Weights & Biases receives what TensorBoard's writer is given from here on; a resumed run goes on in its own."""
    import wandb

    names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name, "id": folder.name}
    try:
        wandb.init(**names, resume="allow", config=asdict(args), dir=str(folder), sync_tensorboard=True)
    except wandb.errors.Error as error:  # not logged in, no connection
        fail(f"--track: {error} Or set WANDB_MODE=offline, or leave --track out.")


def compile_policy(agent: Agent, obs: Tensor, belief: Tensor, minibatch_size: int, update_threads: int) -> None:
    """Replaces get_action_and_value by its compiled form, and calls it as rollouts and updates will, to compile it now.

    obs [N, D] and belief [N, H] are any; no generator is moved on.
    """
    draw_as_eager = {"fallback_random": True}  # the same actions from the same seed
    agent.get_action_and_value = torch.compile(agent.get_action_and_value, dynamic=False, options=draw_as_eager)
    with torch.random.fork_rng(), torch.no_grad():
        action = agent.get_action_and_value(obs, agent.embedding(belief))[0]
    torch.set_num_threads(update_threads)  # the compiled code is for as many threads as there are now
    rows = torch.arange(minibatch_size, device=obs.device) % len(obs)
    embedding = agent.embedding(belief[rows])  # the gradient reaches the encoder
    outputs = agent.get_action_and_value(obs[rows], embedding, action[rows])
    sum(output.sum() for output in outputs[1:]).backward()
    agent.zero_grad()
    torch.set_num_threads(1)


def stop(what: str, iteration: int, writer: SummaryWriter) -> NoReturn:
    """Ends the run with one sentence and exit status 1; what was logged and saved stays."""
    with suppress(OSError):  # on a full disk
        writer.close()
    checkpoint = Path(writer.log_dir) / "checkpoint.pt"
    last = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
    print(f"\nerror: {what} in iteration {iteration}: the run was stopped, {last}.", file=sys.stderr)
    raise SystemExit(1)


def record(values: dict[str, Tensor], losses: dict[str, list[float]], iteration: int, writer: SummaryWriter) -> None:
    """Appends scalars to losses, before they are stepped on; one that is not finite stops the run."""
    for name, value in values.items():
        losses.setdefault(name, []).append(value.item())
        if not math.isfinite(losses[name][-1]):
            stop(f"{name} is {value.item()}", iteration, writer)


def main(args: Args) -> Path | None:
    """Trains an agent, or evaluates a saved one; returns the run's folder."""
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.evaluate is not None:
        torch.set_num_threads(args.torch_threads)
        agent, args, eval_envs = load_model(args.evaluate, args.env, args.env_workers)
        print(format_evaluations(evaluate_groups(agent.to(device), eval_envs, args)))
        return None

    # --- Set-up
    started = time.time()
    torch.set_num_threads(1)  # but in updates and evaluations: more are slower on a rollout's few rows
    signals = watch_signals()
    checkpoint = load_checkpoint(args.resume) if args.resume is not None else None
    packages = ("torch", "mujoco", "gymnasium", *(["metaworld"] if args.env in META_WORLD else []))
    versions = {name: version(name) for name in packages}
    seeds = seeds_of(args)
    torch.manual_seed(seeds["torch"])
    torch.backends.cudnn.deterministic = args.torch_deterministic

    try:
        envs = make_envs(args, args.num_envs)
        eval_envs = make_eval_envs(args)
        agent = Agent(envs, args).to(device)
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:  # what torch says of too large a size
        fail(f"environments and networks of these sizes cannot be made ({type(error).__name__}): lower them.")
    fused = True if args.compile or device.type == "cuda" else None  # one operation for all parameters
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=fused)

    run_name = f"{args.env}__{Path(__file__).stem}__{args.arch}-{init_label(args)}__{args.seed}__{int(started)}"
    try:
        folder = Path(args.resume) if checkpoint is not None else make_folder(Path(args.runs_dir) / run_name)
    except OSError as error:
        fail(f"cannot make a folder for the run in {args.runs_dir} ({error.strerror}): choose another --runs-dir.")
    print(f"run folder: {folder}")

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    counts = parameter_counts(agent)
    print(
        f"{args.env}: observation {envs.obs_dim}, action {envs.action_dim}, meta-episode {envs.max_steps} steps; "
        f"{num_iterations} iterations of {args.num_envs} x {args.num_steps} = {batch_size} frames on {device}; "
        f"parameters: {counts['total']:,} in all, hypernetwork {counts['hypernetwork']:,}, "
        f"base network {counts['base_network']:,}"
    )
    if args.arch == "hyper" and args.init in ("hfi", "hfo"):
        print(f"note: RL2's task embedding is not normalised, as --init {args.init} assumes.")
    if num_iterations == 1 or num_iterations * batch_size < args.learning_starts:
        print("note: nothing is learned in so few frames, see --learning-starts.")

    # Storage of one rollout
    obs = torch.zeros(args.num_steps, args.num_envs, envs.obs_dim, device=device)  # [T, N, D]
    final_obs = torch.zeros_like(obs)  # what each action led to
    action_shape = () if envs.discrete else (envs.action_dim,)
    action_dtype = torch.long if envs.discrete else torch.float32
    actions = torch.zeros(args.num_steps, args.num_envs, *action_shape, dtype=action_dtype, device=device)
    logprobs, rewards, dones, values, final_values, discounted_returns = (
        torch.zeros(args.num_steps, args.num_envs, device=device) for _ in range(6)
    )

    global_step = 0
    next_obs = to_tensor(envs.reset(seeds["train_envs"]), device)  # [N, D]
    belief = agent.initial_belief(envs)  # [N, H]
    discounted_return = torch.zeros(args.num_envs, device=device)
    episode_returns = np.zeros((args.num_envs, args.episodes_per_task))  # of the running meta-episodes, by episode
    episode_successes = np.zeros((args.num_envs, args.episodes_per_task))  # how many steps fulfilled the task, likewise
    eval_history: list[tuple[int, float]] = []
    meta_return = math.nan  # of the last iteration in which a meta-episode ended
    iteration = 0  # the last one that is complete
    evaluations: dict[str, Any] = {}  # the last ones
    if checkpoint is not None:
        try:
            restore(checkpoint, agent, [optimizer], envs)
            iteration, global_step = int(checkpoint["iteration"]), int(checkpoint["global_step"])
            started -= checkpoint["seconds"]
            next_obs.copy_(checkpoint["next_obs"])
            belief.copy_(checkpoint["belief"])
            discounted_return.copy_(checkpoint["discounted_return"])
            episode_returns[:] = checkpoint["episode_returns"].numpy()
            episode_successes[:] = checkpoint["episode_successes"].numpy()
            eval_history = [(int(step), float(value)) for step, value in checkpoint["eval_history"]]
            meta_return, evaluations = float(checkpoint["meta_return"]), dict(checkpoint["evaluations"])
            eval_envs.blow_ups = int(checkpoint["eval_blow_ups"])
        except Exception as error:  # whatever a damaged file may raise
            what = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
            fail(f"{folder / 'checkpoint.pt'} does not fit this script ({what}).")
    if checkpoint is not None and iteration >= num_iterations and (folder / "result.json").exists():
        fail(f"the run in {folder} is finished: give a larger --total-timesteps to go on with it.")
    (folder / "result.json").unlink(missing_ok=True)  # only a run that is finished has one
    if args.track:
        start_tracking(args, folder)
    purge_step = global_step + 1 if checkpoint is not None else None  # points after the checkpoint are written again
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    if checkpoint is None:
        rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    compile_time = 0.0
    if args.compile:
        compile_started = time.time()
        try:
            compile_policy(agent, next_obs, belief, batch_size // args.num_minibatches, args.torch_threads)
        except Exception as error:  # whatever a compiler that is not whole leads to
            fail(f"--compile does not work on this machine ({type(error).__name__}): leave it out.")
        compile_time = time.time() - compile_started
        print(f"the policy was compiled in {compile_time:.0f} s")
    bar = tqdm(total=num_iterations * batch_size, initial=global_step, unit="frames", unit_scale=True, mininterval=1)

    def checkpoint_now() -> None:
        progress = {
            "iteration": iteration,
            "global_step": global_step,
            "seconds": time.time() - started,
            "next_obs": next_obs,
            "belief": belief,
            "discounted_return": discounted_return,
            "episode_returns": torch.from_numpy(episode_returns),
            "episode_successes": torch.from_numpy(episode_successes),
            "eval_history": eval_history,
            "meta_return": meta_return,
            "evaluations": evaluations,
            "eval_blow_ups": eval_envs.blow_ups,
        }
        try:
            writer.flush()  # what precedes a checkpoint is not logged again
            with replacing(folder / "checkpoint.pt") as file:
                torch.save(capture(args, agent, [optimizer], envs) | progress, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            stop(f"the checkpoint could not be written ({error.__context__ or error})", iteration, writer)

    if checkpoint is None and args.checkpoint_interval:
        checkpoint_now()  # from here on the run can be resumed

    while iteration < num_iterations:
        iteration += 1
        episodic_returns: list[list[float]] = [[] for _ in range(args.episodes_per_task)]
        episodic_successes: list[list[float]] = [[] for _ in range(args.episodes_per_task)]
        meta_episodic_returns: list[float] = []

        # --- Rollout. META-RL: the encoder's memory goes on through episodes and is cleared only when the task changes.
        initial_belief = belief  # of this rollout, from which the update encodes it again
        with torch.no_grad():
            for step in range(args.num_steps):
                global_step += args.num_envs
                action, logprob, _, value = agent.get_action_and_value(next_obs, agent.embedding(belief))
                obs[step], actions[step] = next_obs, action
                logprobs[step], values[step] = logprob, value

                episode = envs.episode.copy()  # [N]
                led_to, reward, episode_done, task_done, time_limit, reset_obs = envs.step(action.cpu().numpy())
                episode_returns[np.arange(args.num_envs), episode] += reward
                episode_successes[np.arange(args.num_envs), episode] += envs.success
                final_obs[step], reward = to_tensor(led_to, device), to_tensor(reward, device)
                belief = agent.update_belief(belief, action, final_obs[step], reward)
                discounted_return = args.gamma * discounted_return + reward
                rewards[step], discounted_returns[step] = reward, discounted_return

                # META-RL: `done` is the end of the meta-episode. At a time limit the value of the last observation
                # stands for what would have followed; its flag is cleared, since the policy only ever acts on
                # observations that did not end an episode.
                dones[step] = to_tensor(task_done, device)
                final_values[step] = 0
                if time_limit.any():
                    final_value = agent.get_value(envs.clear_flag(final_obs[step]), agent.embedding(belief))
                    final_values[step] = final_value * to_tensor(time_limit, device)
                if task_done.any():
                    new_task = torch.from_numpy(task_done).to(device)
                    belief = torch.where(new_task[:, None], agent.initial_belief(envs), belief)
                    discounted_return[new_task] = 0
                for i in np.flatnonzero(episode_done):
                    episodic_returns[episode[i]].append(episode_returns[i, episode[i]])
                    episodic_successes[episode[i]].append(100.0 * (episode_successes[i, episode[i]] > 0))
                meta_episodic_returns += episode_returns[task_done].sum(axis=1).tolist()
                episode_returns[task_done] = episode_successes[task_done] = 0
                next_obs = to_tensor(reset_obs, device)
            next_value = agent.get_value(next_obs, agent.embedding(belief))  # [N]

        torch.set_num_threads(args.torch_threads)
        losses: dict[str, list[float]] = {}  # of every minibatch

        # --- Recurrent PPO: a minibatch is the whole sequences of some environments, encoded again from the rollout's
        # first belief, so that the gradient reaches the encoder.
        if iteration > 1 and global_step >= args.learning_starts:
            reward_scale = (agent.reward_norm.var + 1e-8).sqrt()
            scaled_rewards = (rewards / reward_scale).clamp(-args.reward_clip, args.reward_clip)
            advantages = compute_gae(
                scaled_rewards, values, next_value, dones, final_values, args.gamma, args.gae_lambda
            )  # [T, N]
            returns = advantages + values

            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            action_vectors = agent.action_vector(actions)  # [T, N, A]
            for _ in range(args.update_epochs):
                for mb_envs in torch.randperm(args.num_envs, device=device).chunk(args.num_minibatches):
                    beliefs = agent.encoder.unroll(
                        action_vectors[:, mb_envs],
                        final_obs[:, mb_envs],
                        rewards[:, mb_envs, None],
                        dones[:, mb_envs],
                        initial_belief[mb_envs],
                    )  # [T, B, H]
                    embeddings = agent.embedding(beliefs).flatten(0, 1)  # [T * B, L]
                    _, newlogprob, entropy, newvalue = agent.get_action_and_value(
                        obs[:, mb_envs].flatten(0, 1), embeddings, actions[:, mb_envs].flatten(0, 1)
                    )
                    logratio = newlogprob - logprobs[:, mb_envs].flatten()
                    pg_loss = policy_loss(logratio, advantages[:, mb_envs].flatten(), args.clip_coef)
                    old_values, mb_returns = values[:, mb_envs].flatten(), returns[:, mb_envs].flatten()
                    v_loss = value_loss(newvalue, old_values, mb_returns, args.clip_coef)
                    entropy_loss = entropy.mean()
                    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
                    with torch.no_grad():
                        minibatch = {
                            "losses/policy_loss": pg_loss,
                            "losses/value_loss": v_loss,
                            "losses/entropy": entropy_loss,
                            "losses/approx_kl": (logratio.exp() - 1 - logratio).mean(),
                            "losses/clipfrac": ((logratio.exp() - 1).abs() > args.clip_coef).float().mean(),
                        }
                    record(minibatch, losses, iteration, writer)

                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
            losses["losses/explained_variance"] = [(1 - (returns - values).var() / returns.var()).item()]

        # --- Normalisers. META-RL: between the update and the next rollout, never between a rollout and its update, so
        # that the first ratio of every update is 1.
        agent.obs_norm.update(obs.flatten(0, 1))
        agent.reward_norm.update(discounted_returns.flatten()[:, None])
        with torch.no_grad():
            outputs = agent.outputs(next_obs, agent.embedding(belief))
        if not all(tensor.isfinite().all() for tensor in (*outputs, *agent.state_dict().values())):
            stop("the agent is no longer finite after the update", iteration, writer)

        # --- Log
        for name, numbers in losses.items():
            writer.add_scalar(name, np.mean(numbers), global_step)
        for k, episode_k in enumerate(episodic_returns):
            if episode_k:
                writer.add_scalar(f"charts/episodic_return_ep{k + 1}", np.mean(episode_k), global_step)
                if envs.has_success:
                    writer.add_scalar(f"charts/success_ep{k + 1}", np.mean(episodic_successes[k]), global_step)
        if all_returns := [episode_return for episode_k in episodic_returns for episode_return in episode_k]:
            writer.add_scalar("charts/episodic_return", np.mean(all_returns), global_step)
        if meta_episodic_returns:
            meta_return = float(np.mean(meta_episodic_returns))
            writer.add_scalar("charts/meta_episodic_return", meta_return, global_step)
        writer.add_scalar("charts/blow_ups", envs.blow_ups, global_step)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/SPS", int(global_step / (time.time() - started)), global_step)
        bar.set_postfix_str(f"return {meta_return:.2f}", refresh=False)
        bar.update(batch_size)

        # --- Evaluate
        last = iteration == num_iterations
        if last or (args.eval_interval and iteration % args.eval_interval == 0):
            bar.set_postfix_str("evaluating")
            evaluations = evaluate_groups(agent, eval_envs, args)
            for group, summary in evaluations.items():
                for name, value in summary.items():
                    writer.add_scalar(f"{group}/{name}", value["mean"], global_step)
            eval_history.append((global_step, evaluations["eval"]["meta_episodic_return"]["mean"]))
            bar.write(f"{global_step:,} frames: {format_evaluations(evaluations)}")

        torch.set_num_threads(1)

        # --- Checkpoint
        if args.checkpoint_interval and (last or signals or iteration % args.checkpoint_interval == 0):
            checkpoint_now()
        if signals and not last:
            bar.close()
            writer.close()
            saved = f"go on with --resume {folder}" if args.checkpoint_interval else "there are no checkpoints"
            print(f"\nstopped by {signals[0].name} after iteration {iteration}: {saved}.", file=sys.stderr)
            raise SystemExit(128 + signals[0])

    # --- Save
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    bar.close()
    wall_time = time.time() - started
    result = {
        "env": args.env,
        "script": Path(__file__).stem,
        "arch": args.arch,
        "init": init_label(args),
        "seed": args.seed,
        "frames": global_step,
        "wall_time": wall_time,  # seconds
        "SPS": global_step / wall_time,
        "compile_time": compile_time,  # seconds, part of wall_time
        "parameters": counts,
        "blow_ups": envs.blow_ups,
        "eval_blow_ups": eval_envs.blow_ups,
        "evaluation": evaluations["eval"],
        "test_evaluation": evaluations.get("test"),  # on Meta-World
        "class_evaluations": {group: summary for group, summary in evaluations.items() if "/" in group},
        "eval_history": eval_history,  # (frames, mean return of the meta-episode)
        "args": asdict(args),
        "versions": versions,
    }
    try:
        writer.close()
        if args.save_model:
            with replacing(folder / "model.pt") as file:
                torch.save({"args": asdict(args), "agent": agent.state_dict()}, file)
            print(f"evaluate it: python {Path(__file__).name} --env {args.env} --evaluate {folder / 'model.pt'}")
        with replacing(folder / "result.json") as file:  # the last one: it says that the run is finished
            file.write(json.dumps(result, indent=2).encode())
    except (OSError, RuntimeError) as error:  # as above
        stop(f"model.pt or result.json could not be written ({error.__context__ or error})", iteration, writer)
    return folder


if __name__ == "__main__":
    threading.excepthook = lambda failure: None  # TensorBoard's thread hands a full disk on to main
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C before the run began.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # a full disk, a folder that went away
        print(f"\nerror: {error}: the run was stopped; mend that and go on with --resume.", file=sys.stderr)
        raise SystemExit(1) from None
