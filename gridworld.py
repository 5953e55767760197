"""The 5x5 Grid-World of VariBAD (Zintgraf et al., 2020): find a hidden goal cell, then keep returning to it.

A task is one goal cell. The agent starts in (0, 0) and sees only its own position, so it must search the grid and
remember where the reward was. An episode lasts `horizon` steps; a meta-episode is several episodes on one goal.

    env = gymnasium.make("GridWorld-v0")                     # GridWorldEnv: one environment, with rendering
    envs = gymnasium.make_vec("GridWorld-v0", num_envs=16)   # GridWorldVectorEnv: a batch of them in numpy

Both give the same trajectories for the same seeds, goals and actions. Shapes: N environments; positions are (x, y).
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector.utils import batch_space

# The action's number is its row.    stay     up      right    down     left
MOVES = np.array([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])
GOAL_REWARD, STEP_REWARD = 1.0, -0.1


def goal_cells(size: int = 5, goals: str = "all") -> np.ndarray:
    """Every cell that can be the goal, as an int array [num_goals, 2] of (x, y).

    `"all"`: every cell but the start, as the paper says (24 on the 5x5 grid). `"far"`: the start's neighbours are
    excluded as well, as in the released code of VariBAD (21). Raises ValueError for another name or an empty set.
    """
    if goals not in ("all", "far"):
        raise ValueError(f"goals is {goals!r}: choose 'all' or 'far'.")
    nearest = 1 if goals == "all" else 2  # distance from the start, in king's moves
    cells = [(x, y) for x in range(size) for y in range(size) if max(x, y) >= nearest]
    if not cells:
        raise ValueError(f"a grid of size {size} has no goal cells for goals={goals!r}: choose a larger size.")
    return np.array(cells)


def check_tasks(tasks: Any, all_tasks: np.ndarray) -> np.ndarray:
    """Goals [..., 2] as an int array. Raises ValueError for one that is not among all_tasks [num_goals, 2]."""
    tasks = np.asarray(tasks)
    if tasks.shape[-1:] != (2,) or not (tasks[..., None, :] == all_tasks).all(axis=-1).any(axis=-1).all():
        raise ValueError(f"{tasks.tolist()} is no goal of this grid: see its `all_tasks`.")
    return tasks.astype(int)


def check_actions(actions: Any, space: gym.Space, elapsed: int | np.ndarray) -> None:
    """Refuses actions that do not exist, and steps before the first reset, when `elapsed` is -1."""
    if np.any(elapsed < 0):
        raise gym.error.ResetNeeded("no episode has begun: call reset first.")
    if not space.contains(actions):
        raise gym.error.InvalidAction(f"the action {actions!r} is not in {space}.")


class GridWorldEnv(gym.Env):
    """One Grid-World.

    Observation: position (x, y), float32 [2], each 0 .. size - 1. Action: 0 stay, 1 up, 2 right, 3 down, 4 left; a move
    off the grid stays. Reward: +1 for every step that ends on the goal, -0.1 for every other. The horizon is part of
    the task (nothing happens after it), so the last step reports `terminated`, not `truncated`.

    `reset()` draws a goal from the environment's own generator; `reset(options={"task": (x, y)})` sets it.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(self, size: int = 5, horizon: int = 15, goals: str = "all", render_mode: str | None = None):
        self.all_tasks = goal_cells(size, goals)  # [num_goals, 2]
        self.size, self.horizon, self.render_mode = size, horizon, render_mode
        self.observation_space = gym.spaces.Box(0, size - 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(len(MOVES))
        self.elapsed = -1  # no episode has begun

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode in (0, 0); returns the observation [2] and an empty info."""
        super().reset(seed=seed)
        if options and "task" in options:
            self.task = check_tasks(options["task"], self.all_tasks)
        else:
            self.task = self.all_tasks[self.np_random.integers(len(self.all_tasks))].copy()
        self.position = np.zeros(2, int)
        self.elapsed = 0
        return self.position.astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Moves; returns observation [2], reward, terminated (after `horizon` steps), truncated (never), info."""
        check_actions(action, self.action_space, self.elapsed)
        self.position = np.clip(self.position + MOVES[action], 0, self.size - 1)
        self.elapsed += 1
        reward = GOAL_REWARD if (self.position == self.task).all() else STEP_REWARD
        return self.position.astype(np.float32), reward, self.elapsed >= self.horizon, False, {}

    def render(self) -> str | np.ndarray | None:
        """`"ansi"`: the grid as text (A agent, G goal, * both). `"rgb_array"`: uint8 [32 size, 32 size, 3]."""
        (x, y), (goal_x, goal_y) = self.position, self.task
        if self.render_mode == "ansi":
            grid = np.full((self.size, self.size), ".")
            grid[goal_y, goal_x] = "G"
            grid[y, x] = "*" if grid[y, x] == "G" else "A"
            return "\n".join(" ".join(row) for row in grid[::-1])  # y points up
        if self.render_mode == "rgb_array":
            cells = np.full((self.size, self.size, 32, 32, 3), 255, np.uint8)  # [y, x, pixel row, pixel column, RGB]
            cells[:, :, 0] = cells[:, :, :, 0] = 200  # grid lines
            cells[goal_y, goal_x, 1:, 1:] = (120, 200, 120)
            cells[y, x, 8:24, 8:24] = (40, 80, 200)
            return cells[::-1].swapaxes(1, 2).reshape(32 * self.size, 32 * self.size, 3)
        return None


class GridWorldVectorEnv(gym.vector.VectorEnv):
    """N Grid-Worlds as one batch of numpy arrays; the twin of GridWorldEnv, stepped without a Python loop.

    Autoreset is disabled, as in Gymnasium's `AutoresetMode.DISABLED`: whoever steps resets. Gymnasium's vector wrappers
    need autoreset: `make_vec("GridWorld-v0", vectorization_mode="sync")` has it, and pictures. Options of `reset`:
    `reset_mask`, bool [N], the environments to reset (all by default); `tasks`, int [N, 2], the goals to set (rows
    outside the mask are ignored); without `tasks` each environment draws a new goal from its own generator. As in
    `SyncVectorEnv`, `reset(seed=s)` seeds environment i with s + i, a sequence gives every environment its own seed.
    `self.tasks` holds the present goals, [N, 2], until the next reset.
    """

    metadata = {"render_modes": [], "autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(
        self, num_envs: int = 1, size: int = 5, horizon: int = 15, goals: str = "all", render_mode: None = None
    ):
        if render_mode is not None:
            raise ValueError('the batch draws nothing: make_vec(..., vectorization_mode="sync") does.')
        self.all_tasks = goal_cells(size, goals)  # [num_goals, 2]
        self.num_envs, self.size, self.horizon = num_envs, size, horizon
        self.single_observation_space = gym.spaces.Box(0, size - 1, (2,), np.float32)
        self.single_action_space = gym.spaces.Discrete(len(MOVES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self.tasks = np.zeros((num_envs, 2), int)
        self.positions = np.zeros((num_envs, 2), int)
        self.elapsed = np.full(num_envs, -1)  # no episode has begun

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """Starts an episode in the masked environments; returns all observations [N, 2] and an empty info."""
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)  # [N]
        one = seed is None or np.ndim(seed) == 0
        seeds = [None if seed is None else seed + i for i in range(self.num_envs)] if one else seed
        for i in np.flatnonzero(mask):
            if seeds[i] is not None:
                self.rngs[i] = seeding.np_random(int(seeds[i]))[0]
            if "tasks" not in options:
                self.tasks[i] = self.all_tasks[self.rngs[i].integers(len(self.all_tasks))]
        if "tasks" in options:
            self.tasks[mask] = check_tasks(np.asarray(options["tasks"])[mask], self.all_tasks)
        self.positions[mask] = 0
        self.elapsed[mask] = 0
        return self.positions.astype(np.float32), {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future depends on, as plain values: goals, positions, counters, generators."""
        arrays = {"tasks": self.tasks.tolist(), "positions": self.positions.tolist(), "elapsed": self.elapsed.tolist()}
        return arrays | {"rngs": [rng.bit_generator.state for rng in self.rngs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.tasks, self.positions = np.array(state["tasks"]), np.array(state["positions"])
        self.elapsed = np.array(state["elapsed"])
        for rng, rng_state in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = rng_state

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Actions [N]; returns observations [N, 2], rewards [N], terminated [N], truncated [N] (never), info."""
        check_actions(actions, self.action_space, self.elapsed)
        self.positions = np.clip(self.positions + MOVES[actions], 0, self.size - 1)  # [N, 2]
        self.elapsed += 1
        rewards = np.where((self.positions == self.tasks).all(axis=1), GOAL_REWARD, STEP_REWARD)  # [N]
        terminated, truncated = self.elapsed >= self.horizon, np.zeros(self.num_envs, bool)
        return self.positions.astype(np.float32), rewards, terminated, truncated, {}


gym.register(
    id="GridWorld-v0",
    entry_point="gridworld:GridWorldEnv",
    vector_entry_point="gridworld:GridWorldVectorEnv",
)
