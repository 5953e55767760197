"""A tour of this repository in cells, for Jupyter or VS Code; or whole, in a minute: python examples/tour.py

It trains an agent on Grid-World, draws what it believes about the hidden goal, and compares initialisations.
"""

# %% Modules and pictures are found from the repository's root
import os
import sys
from pathlib import Path

start = Path(globals().get("__file__", "tour.py")).resolve()  # a notebook has no file, but a folder
root = next(folder for folder in start.parents if (folder / "hyperinit.py").exists())
os.chdir(root)
sys.path.insert(0, str(root))

import matplotlib.pyplot as plt
import numpy as np
import torch

from varibad_hyper import Policy, load_agent, main, make_args, make_envs, to_tensor

# %% Train: VariBAD with Bias-HyperInit, 200,000 frames, about a minute. The Bayes-optimal return is 38.37.
folder = main(make_args("Grid-World", total_timesteps=200_000, exp_name="tour"))

# %% Play one meta-episode, four episodes of 15 steps, with the goal in cell (2, 0); keep what the agent believed
agent, _ = load_agent(folder)
envs = make_envs(make_args("Grid-World"), num_envs=1)
positions, beliefs = [], []  # of every step: (x, y), and the decoder's probability for every cell to be the goal
with torch.no_grad():
    obs = envs.reset(tasks=np.array([[2, 0]]))
    belief = agent.initial_belief(envs)  # the encoder's GRU state, [1, H]
    for _ in range(envs.max_steps):
        embedding = agent.embedding(belief)  # mean and log-variance of the posterior over the task, [1, 2L]
        mean, _ = embedding.chunk(2, dim=-1)
        positions.append(obs[0, :2])
        beliefs.append(agent.vae.reward_decoder(mean).sigmoid().reshape(5, 5))
        dist, value = agent(to_tensor(obs, "cpu"), embedding)
        step = envs.step(dist.mode.numpy())
        next_obs, reward = to_tensor(step.next_obs, "cpu"), to_tensor(step.rewards, "cpu")
        belief = agent.update_belief(belief, dist.mode, next_obs, reward)
        obs = step.policy_obs
print("return of every episode:", envs.take_finished()[0].returns)

# %% Draw the belief. Dark: a reward is expected here; white: none. Step 15 begins the second episode.
figure, axes = plt.subplots(1, 6, figsize=(12, 2.3))
for axis, t in zip(axes, (0, 7, 14, 16, 18, 59), strict=True):
    axis.imshow(beliefs[t].T, origin="lower", cmap="Greys", vmin=0, vmax=1)
    axis.plot(*positions[t], "o", color="C1")  # the agent
    axis.plot(2, 0, "*", color="C3")  # the goal, which it does not see
    axis.set_title(f"step {t}")
figure.savefig(folder / "belief.png")
print("drawn:", folder / "belief.png")

# %% Before any training: how large are the actions of the policies that a hypernetwork generates, and how different?
for init in ("bias", "weight", "hfi", "kaiming", "orthogonal"):
    torch.manual_seed(0)
    args = make_args("Cheetah-Dir", init=init)
    policy = Policy(obs_dim=20, embedding_dim=2 * args.latent_dim, actor_dim=6, discrete=False, args=args)
    with torch.no_grad():  # one observation, 500 tasks
        actions, _ = policy(torch.randn(1, 20).expand(500, 20), torch.randn(500, 2 * args.latent_dim))
    size, spread = actions.square().mean().sqrt(), actions.std(dim=0).mean()
    print(f"{init:11} mean actions: size {size:5.2f}, spread between tasks {spread:5.2f}")

# %% All of this at once, as a picture: `python show.py init`. The layer itself, in twenty lines: "Use it in your own
# code" in README.md. How to change an algorithm: docs/recipes.md.
