"""VariBAD with a hypernetwork policy, in one file (layers: `hyperinit.py`; Grid-World: `gridworld.py`).

Meta-RL: train one agent over many tasks so that it adapts to a new one within an episode or two. VariBAD (Zintgraf et
al., 2020) infers the task: a GRU reads (action, observation, reward) and gives a Gaussian posterior over a
latent variable m, trained as a variational auto-encoder that must predict the whole meta-episode from m.
"Hypernetworks in Meta-Reinforcement Learning" (Beck et al., CoRL 2022; "the paper") lets a hypernetwork turn that
posterior into the weights of the policy, initialised by Bias-HyperInit (`hyperinit.py`).

    python varibad_hyper.py --init bias --env Walker

Read it from the top: arguments, policy, VAE, agent, losses, then `main`, one loop of rollout, PPO on the stored
embeddings, VAE update. That is the algorithm. Below `main` is what serves it: evaluation, meta-episodes, replay
buffer, tasks, presets, and `Run`, which logs and saves.

Tensors are time-major and their shapes are noted with these letters: T steps, N environments, B batch, D observation,
A action, L latent variable m, H GRU state, K hypernetwork features, E posteriors of a meta-episode that are decoded, J
transitions that each of them must predict (all, or --vae-subsample). An agent's "belief" about its task
is the GRU state [N, H], carried from step to step; what the policy sees of it, the "embedding", is the posterior's mean
and log-variance, 2L, never m itself.
`META-RL:` marks where PPO differs from single-task PPO, `NOTE:` where this code differs from the paper or from its
authors' code (more in docs/deviations.md).
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

if __name__ == "__main__":
    os.environ["MUJOCO_GL"] = "disable"  # training draws nothing: MuJoCo need not load OpenGL

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import gridworld
from hyperinit import FILM_SCHEMES, TANH_GAIN, FilmLinear, HyperLinear, init_film_linear_, init_hyper_linear_, normc_

# ---------------------------------------------------------------------------------------------------------------------
# Arguments, in the groups that --help shows. The defaults are Grid-World's; PRESETS has what differs elsewhere.


@dataclass
class RunArgs:
    env: Literal["Grid-World", "Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid", "Pick-Place", "ML10"] = "Grid-World"
    """family of tasks; each has its own preset for all values below"""
    arch: Literal["hyper", "standard", "film"] = "hyper"
    """how the task embedding enters the policy: generates its weights, is an input, or scales and shifts its layers"""
    init: Literal["bias", "weight", "hfi", "hfo", "kaiming", "normc", "orthogonal"] = "bias"
    """initialisation of the hypernetwork's heads (hyperinit.py); the standard architecture has none"""
    base_init: Literal["normc", "orthogonal", "kaiming"] = "normc"
    """f, the base network's own initialisation, which Bias- and Weight-HyperInit draw from"""
    embedding: Literal["posterior", "one-hot"] = "posterior"
    """what the policy knows about the task: VariBAD's posterior, or the true task, one-hot (multi-task upper bound)"""
    seed: int = 1  # seeds all randomness; on the same CPU it gives the same run, bit for bit
    total_timesteps: float = 4_000_000  # frames (steps of all environments) to train for; may be written 2e6
    exp_name: str = ""  # added to the run folder's name, to tell runs apart that differ in other flags
    runs_dir: str = "runs"  # folder that holds the run folders
    resume: str | None = None
    """a run folder to continue; the number of frames may grow, and flags that do not affect the results may change"""
    evaluate: str | None = None  # a run folder, checkpoint.pt or model.pt to evaluate instead of training
    save_model: bool = False  # save agent, normalisers and arguments to model.pt at the end
    checkpoint_interval: int = 1000  # iterations between checkpoints (0: none, the run cannot be resumed)
    eval_interval: int = 50  # iterations between evaluations, the first before training (0: only at the end)
    eval_tasks: int = 32  # tasks per evaluation (Meta-World: training and test tasks each); Grid-World takes every goal
    cuda: bool = True  # use a GPU if there is one
    torch_deterministic: bool = True  # restrict cuDNN to deterministic algorithms
    threads: int = 1  # CPU threads of PyTorch and of MuJoCo's physics
    track: bool = False  # send the logged scalars to Weights & Biases (pip install -r requirements-optional.txt)
    wandb_project_name: str = "hyperinit"  # W&B project
    wandb_entity: str | None = None  # W&B team or user (default: yours)


@dataclass
class TaskArgs:
    episodes_per_task: int = 4
    """episodes per meta-episode; with more than one, a flag in the observation tells when an episode has ended"""
    grid_size: int = 5  # Grid-World: cells per side
    grid_horizon: int = 15  # Grid-World: steps per episode
    grid_goals: Literal["all", "far"] = "all"
    """Grid-World: goals in every cell but the start (24), or only in those that do not touch it (21, authors' code)"""
    end_on_success: bool = False  # Meta-World: end the episode at success (and forgo the reward of staying there)


@dataclass
class PPOArgs:
    num_envs: int = 16  # parallel environments
    num_steps: int = 60  # steps of each environment per iteration
    learning_starts: int = 5000  # frames before the first update; PPO also skips the first iteration
    learning_rate: float = 7e-4  # of the policy's Adam
    adam_eps: float = 1e-8  # epsilon of every Adam
    gamma: float = 0.95  # discount per step
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 2  # passes over the rollout
    clip_coef: float = 0.05  # clipping of the ratio, and of the change in value
    ent_coef: float = 0.03  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longest gradient of the policy; a longer one is scaled down
    reward_clip: float = 10.0  # normalised rewards are clipped to +- this


@dataclass
class PolicyArgs:
    state_features: int = 16  # units of a tanh layer for the observation (0: none)
    embedding_features: int = 25  # units of a tanh layer for the task embedding (0: none; one-hot tasks have none)
    base_layers: tuple[int, ...] = (32, 32)  # hidden tanh layers of the base network, in actor and critic each
    hyper_layers: tuple[int, ...] = ()  # hidden ReLU layers of the hypernetwork (none: it is linear)
    hyper_bias: bool = True  # the hypernetwork's heads have a bias


@dataclass
class VAEArgs:
    latent_dim: int = 5  # size of the latent variable m that the task is inferred as
    gru_hidden: int = 64  # size of the encoder's GRU
    action_embedding: int = 0  # units of the encoder's ReLU layer for actions (0: it does not see them)
    state_embedding: int = 32  # units of the encoder's ReLU layer for observations
    reward_embedding: int = 8  # units of the encoder's ReLU layer for rewards
    decode_reward: bool = True  # decode rewards
    decode_state: bool = False  # decode next observations
    decoder_layers: tuple[int, ...] = (32, 32)  # hidden ReLU layers of each decoder
    vae_learning_rate: float = 2e-3  # of the VAE's Adam
    vae_buffer: int = 100_000  # meta-episodes kept for the VAE
    vae_batch: int = 50  # meta-episodes per VAE update
    vae_updates: int = 5  # VAE updates per iteration
    vae_subsample: int = 0  # random posteriors to decode, and random transitions that each predicts (0: all)
    kl_weight: float = 0.25  # weight of the KL against the reconstruction


@dataclass
class Args(VAEArgs, PolicyArgs, PPOArgs, TaskArgs, RunArgs):
    """All arguments, in one flat object (the last base's come first); `make_args(env, ...)` gives a preset."""


# ---------------------------------------------------------------------------------------------------------------------
# Policy

BASE_INITS = {
    "normc": partial(normc_, gain=TANH_GAIN),
    "orthogonal": partial(nn.init.orthogonal_, gain=TANH_GAIN),
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="tanh"),  # NOTE: uniform in the authors' code
}


def init_base_network_(layers: nn.ModuleList, head: Literal["discrete", "continuous", "critic"], args: Args) -> None:
    """Initialises a base network: plain layers by f, generated ones by --init.

    f (section 4.2) is --base-init for hidden layers, with bias 0. The output layer's f is orthogonal with gain 0.01 for
    discrete actions, normc with gain 1 for continuous ones, and PyTorch's default for the critic. Of --init, bias and
    weight draw from f; hfi and hfo use only the gain (tanh's 5/3, 1 for an output, 0.01 for logits); the defaults use
    neither. FiLM's own weights are drawn from f.
    """
    for layer in layers:
        f_weight, f_bias, gain = BASE_INITS[args.base_init], nn.init.zeros_, TANH_GAIN
        if layer is layers[-1]:
            gain = 1.0
            if head == "discrete":
                gain = 0.01
                f_weight = partial(nn.init.orthogonal_, gain=0.01)
            elif head == "continuous":
                f_weight = normc_
            else:
                bound = args.base_layers[-1] ** -0.5  # PyTorch's default: U(+-1 / sqrt(fan-in)), also for the bias
                f_weight = f_bias = partial(nn.init.uniform_, a=-bound, b=bound)
        if isinstance(layer, HyperLinear):
            init_hyper_linear_(layer, args.init, f_weight, f_bias, gain)
        elif isinstance(layer, FilmLinear):
            init_film_linear_(layer, args.init, f_weight)
        else:
            f_weight(layer.weight)
            f_bias(layer.bias)


def feature_layer(size: int, units: int) -> tuple[nn.Module, int]:
    """A linear + tanh layer and its width; with 0 units the identity and the input's width."""
    return (nn.Sequential(nn.Linear(size, units), nn.Tanh()), units) if units else (nn.Identity(), size)


class Policy(nn.Module):
    """Actor and critic, two base networks, in one of three architectures (--arch).

    hyper (section 4.1): the embedding passes a feature layer and the hypernetwork's hidden layers, if any. From the
    result x its heads generate the weights of both base networks; they are kept inside the layers (`hyperinit.py`).
    film (section 4.3): x scales and shifts the layers. standard (section 3.2): x is an input beside the observation's.
    NOTE: HFI and HFO assume |x|^2 = K; behind tanh x is smaller, and so are the weights that they generate.
    """

    def __init__(self, obs_dim: int, embedding_dim: int, actor_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.arch, self.hyper_bias = args.arch, float(args.hyper_bias)
        self.obs_features, obs_width = feature_layer(obs_dim, args.state_features)
        self.embedding_features, width = feature_layer(embedding_dim, args.embedding_features)
        hyper_sizes = [width, *args.hyper_layers]
        self.hyper_hidden = nn.ModuleList(map(nn.Linear, hyper_sizes, hyper_sizes[1:]))
        if args.arch == "standard":
            make_layer, sizes = nn.Linear, [obs_width + width, *args.base_layers]
        else:
            layer = HyperLinear if args.arch == "hyper" else FilmLinear
            make_layer, sizes = partial(layer, embedding_features=hyper_sizes[-1]), [obs_width, *args.base_layers]
        self.actor = nn.ModuleList(map(make_layer, sizes, [*sizes[1:], actor_dim]))
        self.critic = nn.ModuleList(map(make_layer, sizes, [*sizes[1:], 1]))
        init_base_network_(self.actor, "discrete" if discrete else "continuous", args)
        init_base_network_(self.critic, "critic", args)
        self.log_std = None if discrete else nn.Parameter(torch.zeros(actor_dim))  # one for all tasks, not generated

    def forward(self, obs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Actor's outputs [B, A] and values [B] of normalised observations [B, D] and embeddings [B, embedding_dim]."""
        x = self.embedding_features(embedding)  # [B, embedding_features]
        features = self.obs_features(obs)  # [B, state_features]
        if self.arch == "standard":
            features, context = torch.cat([features, x], dim=-1), ()  # nn.Linear takes no second argument
        else:
            for layer in self.hyper_hidden:
                x = F.relu(layer(x))
            context = (F.pad(x, (0, 1), value=self.hyper_bias),)  # (x, 1) [B, K+1]: the 1 is for the heads' biases
        actor = critic = features
        for layer in self.actor[:-1]:
            actor = torch.tanh(layer(actor, *context))
        for layer in self.critic[:-1]:
            critic = torch.tanh(layer(critic, *context))
        return self.actor[-1](actor, *context), self.critic[-1](critic, *context)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# VAE


class Batch(NamedTuple):
    """Meta-episodes of different lengths, padded at the end to the longest."""

    obs: Tensor  # before the action, [T, B, D]
    actions: Tensor  # [T, B, A]
    rewards: Tensor  # raw, [T, B, 1]
    next_obs: Tensor  # what the action led to, with the flag, [T, B, D]
    lengths: Tensor  # number of transitions, [B]


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them, none after the last."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q(m | tau_:t): a GRU over (action, next observation, reward), then linear to mean and log-variance.

    Zintgraf et al., 2020; section 3.2 of the paper. Its inputs are raw.
    The GRU starts from zeros. The posterior of that state is learned too: it is not N(0, I).
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = (action_dim, args.action_embedding), (obs_dim, args.state_embedding), (1, args.reward_embedding)
        self.embeddings = nn.ModuleList(nn.Linear(size, units) if units else None for size, units in sizes)
        self.gru = nn.GRU(sum(units for _, units in sizes), args.gru_hidden)
        self.posterior = nn.Linear(args.gru_hidden, 2 * args.latent_dim)  # mean, log-variance

    def hiddens(self, actions: Tensor, next_obs: Tensor, rewards: Tensor, hidden: Tensor) -> Tensor:
        """GRU states after every step, [T, B, H], of a sequence [T, B, .] that begins in the state hidden [B, H]."""
        inputs = zip(self.embeddings, (actions, next_obs, rewards), strict=True)
        embedded = [F.relu(layer(x)) for layer, x in inputs if layer is not None]
        return self.gru(torch.cat(embedded, dim=-1), hidden[None])[0]

    def encode(self, actions: Tensor, next_obs: Tensor, rewards: Tensor) -> Tensor:
        """GRU states before the first and after every step of meta-episodes [T, B, .]: [T+1, B, H]."""
        start = actions.new_zeros(actions.shape[1], self.gru.hidden_size)
        if len(actions) == 0:  # at the beginning there is no transition yet, and nn.GRU refuses an empty sequence
            return start[None]
        return torch.cat([start[None], self.hiddens(actions, next_obs, rewards, start)])

    def last_hiddens(self, batch: Batch) -> Tensor:
        """GRU states after the last step of every meta-episode, [B, H]."""
        hiddens = self.encode(batch.actions, batch.next_obs, batch.rewards)  # [T+1, B, H]
        return hiddens[batch.lengths, torch.arange(len(batch.lengths), device=batch.lengths.device)]

    def forward(self, actions: Tensor, next_obs: Tensor, rewards: Tensor) -> Tensor:
        """Posteriors before the first and after every step of meta-episodes [T, B, .]: [T+1, B, 2L]."""
        return self.posterior(self.encode(actions, next_obs, rewards))


class Decoder(nn.Module):
    """An MLP on (m, transition) that predicts the reward or the next observation. Zintgraf et al., 2020."""

    def __init__(self, target: Literal["reward", "state"], obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.target = target
        inputs = obs_dim + action_dim + (obs_dim if target == "reward" else 0)
        self.first = nn.Linear(args.latent_dim + inputs, args.decoder_layers[0])
        self.rest = mlp([*args.decoder_layers, 1 if target == "reward" else obs_dim])

    def forward(self, m: Tensor, transitions: Tensor) -> Tensor:
        """Predictions [E, J, B, .] for every pair of m [E, B, L] and transitions [J, B, .].

        The first layer is applied to m and to the transitions separately and the results are added: the same sum as on
        their concatenation, without writing E x J copies of the inputs.
        """
        weight_m, weight_x = self.first.weight.split([m.shape[-1], transitions.shape[-1]], dim=1)
        from_m, from_x = F.linear(m, weight_m), F.linear(transitions, weight_x, self.first.bias)
        return self.rest(F.relu(from_m[:, None] + from_x[None]))

    def errors(self, m: Tensor, steps: Batch, mask: Tensor) -> Tensor:
        """Squared errors [E, B] (mean over components), summed over the transitions [J, B, .] in the mask [J, B]."""
        if self.target == "reward":
            inputs, truth = [steps.next_obs, steps.obs, steps.actions], steps.rewards
        else:
            inputs, truth = [steps.obs, steps.actions], steps.next_obs
        prediction = self(m, torch.cat(inputs, dim=-1))  # [E, J, B, .]
        return ((prediction - truth).square().mean(-1) * mask).sum(1)


class CellDecoder(nn.Module):
    """Grid-World's reward decoder ("multi-head Bernoulli", Zintgraf et al., 2020): from m, a logit per cell."""

    def __init__(self, args: Args):
        super().__init__()
        self.size = args.grid_size
        self.net = mlp([args.latent_dim, *args.decoder_layers, self.size**2])

    def forward(self, m: Tensor) -> Tensor:
        """Logits [..., size^2], of each cell that it is the goal, of m [..., L]; cell (x, y) is number size * x + y."""
        return self.net(m)

    def errors(self, m: Tensor, steps: Batch, mask: Tensor) -> Tensor:
        """Binary cross-entropies [E, B] at the cells entered, summed over the transitions [J, B, .] in the mask [J, B].

        They depend on a transition only through its cell and whether that was rewarded, so it is enough to count both:
        the cross-entropy of a logit l is softplus(l), less l where there was a reward.
        """
        x, y = steps.next_obs[:, :, 0], steps.next_obs[:, :, 1]  # [J, B]
        cells = (self.size * x + y).long()
        entered = F.one_hot(cells, self.size**2) * mask[:, :, None]  # [J, B, size^2]
        visits, hits = entered.sum(0), (entered * (steps.rewards == gridworld.GOAL_REWARD)).sum(0)  # [B, size^2]
        logits = self(m)  # [E, B, size^2]
        return (visits * F.softplus(logits) - hits * logits).sum(-1)


class VAE(nn.Module):
    """The encoder and what trains it: decoders of the reward and of the next observation (or None)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.encoder = Encoder(obs_dim, action_dim, args)
        self.reward_decoder = self.state_decoder = None
        if args.decode_reward:
            grid = args.env == "Grid-World"
            self.reward_decoder = CellDecoder(args) if grid else Decoder("reward", obs_dim, action_dim, args)
        if args.decode_state:
            self.state_decoder = Decoder("state", obs_dim, action_dim, args)


# ---------------------------------------------------------------------------------------------------------------------
# Agent


class RunningMeanStd(nn.Module):
    """Mean and variance of all data so far (parallel formula of Chan et al.); normalises by them, clipped to +-10."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Adds the rows of x [B, D]."""
        mean, var, count = x.mean(0), x.var(0, unbiased=False), len(x)
        total = self.count + count
        share = (count / total).float()  # of the new rows
        delta = mean - self.mean
        self.var.copy_(self.var * (1 - share) + var * share + delta.square() * share * (1 - share))
        self.mean.add_(delta * share)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)


class Agent(nn.Module):
    """VAE, policy, and the normalisers of its inputs: all that a saved model needs.

    What the agent knows about the task is its belief [N, H]: the encoder's GRU state, from which the embedding follows.
    With --embedding one-hot both are the true task, one-hot [N, number of tasks] (section 4.1), and there is no VAE.
    """

    def __init__(self, envs: MetaEpisodes, args: Args):
        super().__init__()
        self.discrete, self.action_dim = envs.discrete, envs.action_dim
        self.vae = VAE(envs.obs_dim, envs.action_dim, args) if args.embedding == "posterior" else None
        embedding_dim = 2 * args.latent_dim if self.vae else len(envs.all_tasks)
        if self.vae is None:
            args = replace(args, embedding_features=0)  # a one-hot vector selects a task's parameters by itself
        self.policy = Policy(envs.obs_dim, embedding_dim, envs.action_dim, envs.discrete, args)
        self.obs_norm = RunningMeanStd(envs.obs_dim)
        self.latent_norm = RunningMeanStd(embedding_dim)  # not used on one-hot embeddings
        self.reward_norm = RunningMeanStd(1)  # of the discounted return; only its variance is used

    def initial_belief(self, envs: MetaEpisodes) -> Tensor:
        """The belief at the beginning of every environment's present task, [N, H]."""
        if self.vae is None:
            one_hot = (envs.envs.tasks[:, None] == envs.all_tasks).all(axis=2)  # [N, number of tasks]
            return to_tensor(one_hot, self.obs_norm.mean.device)
        return self.obs_norm.mean.new_zeros(envs.num_envs, self.vae.encoder.gru.hidden_size)

    def update_belief(self, belief: Tensor, action: Tensor, next_obs: Tensor, reward: Tensor) -> Tensor:
        """The belief [N, H] after one more step: action ([N] or [N, A]), next_obs [N, D] and reward [N]."""
        if self.vae is None:
            return belief
        actions = self.action_vector(action)[None]  # [1, N, A]
        return self.vae.encoder.hiddens(actions, next_obs[None], reward[None, :, None], belief)[0]

    def embedding(self, belief: Tensor) -> Tensor:
        """What the policy sees of the belief: mean and log-variance of q(m | tau_:t) [N, 2L], or the one-hot task."""
        return belief if self.vae is None else self.vae.encoder.posterior(belief)

    def action_vector(self, action: Tensor) -> Tensor:
        """Actions as the encoder sees them: one-hot or raw, float [..., A]."""
        return F.one_hot(action, self.action_dim).float() if self.discrete else action

    def forward(self, obs: Tensor, embedding: Tensor) -> tuple[Distribution, Tensor]:
        """Distribution of actions ([B] or [B, A]) and values [B], of raw observations [B, D] and embeddings [B, .]."""
        if self.vae is not None:
            embedding = self.latent_norm(embedding)
        output, value = self.policy(self.obs_norm(obs), embedding)
        if self.discrete:
            return Categorical(logits=output, validate_args=False), value
        dist = Normal(output, self.policy.log_std.exp(), validate_args=False)
        return Independent(dist, 1, validate_args=False), value

    @torch.inference_mode()
    def is_finite(self, obs: Tensor, belief: Tensor) -> bool:
        """Whether the agent can go on: its tensors and what it does with obs [N, D], belief [N, H] are finite."""
        dist, value = self(obs, self.embedding(belief))
        tensors = (value, dist.log_prob(dist.mode), *self.state_dict().values())
        return all(tensor.isfinite().all() for tensor in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


class Rollout(NamedTuple):
    """What the update needs from a step of all environments [N, .]; stacked over time [T, N, .], or flat [T * N, .]."""

    obs: Tensor  # before the action, [N, D]
    embeddings: Tensor  # [N, 2L]
    actions: Tensor  # [N] or [N, A]
    logprobs: Tensor  # [N]
    values: Tensor  # [N]
    next_obs: Tensor  # what the action led to, [N, D]
    rewards: Tensor  # raw, [N]
    dones: Tensor  # 1 where the meta-episode ended, [N]
    final_values: Tensor  # used where done: 0, or if truncated the last observation's value, [N]
    discounted_returns: Tensor  # of the meta-episode so far, [N]


def compute_gae(rewards: Tensor, rollout: Rollout, next_value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al., 2016) from normalised rewards, [T, N].

    META-RL: `dones` is 1 where a *meta-episode* ended: the objective is the return of the whole meta-episode, Eq. (1),
    so advantages flow across the episodes inside it. Where it is 1, `final_values` takes the place of the next step's
    value: 0, or if the meta-episode was truncated (time ran out on MuJoCo or Meta-World; on Grid-World that is an end)
    the value of its last observation. next_value [N] follows the rollout's last step.
    NOTE: the authors' code cuts the trace, and zeroes the advantage, at the time limit of every episode.
    """
    values, dones = rollout.values, rollout.dones
    next_values = torch.cat([values[1:], next_value[None]])  # [T, N]
    deltas = rewards + gamma * torch.where(dones.bool(), rollout.final_values, next_values) - values  # [T, N]
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
    """Half the mean of each sample's larger Huber loss: of the new value, or of it clipped to the old +- clip_coef.

    Huber's loss instead of the square is VariBAD's choice.
    """
    clipped = values + (newvalues - values).clamp(-clip_coef, clip_coef)
    losses = F.smooth_l1_loss(newvalues, returns, reduction="none")
    return 0.5 * torch.max(losses, F.smooth_l1_loss(clipped, returns, reduction="none")).mean()


def consecutive_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(m | tau_:t) || q(m | tau_:t-1)) of diagonal Gaussians for every t, [T+1, B] from [T+1, B, L].

    The posterior of a step is the next one's prior; the prior of t = 0 is N(0, I). Zintgraf et al., 2020.
    """
    prior_mean = torch.cat([torch.zeros_like(mean[:1]), mean[:-1]])  # [T+1, B, L]
    prior_logvar = torch.cat([torch.zeros_like(logvar[:1]), logvar[:-1]])
    distance = (logvar.exp() + (mean - prior_mean).square()) / prior_logvar.exp()
    return 0.5 * (prior_logvar - logvar + distance - 1).sum(-1)


def subsample(lengths: Tensor, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Draws `limit` of the first lengths[b] positions of each column b without replacement (0: all of them).

    Returns positions [S, B] and a mask [S, B], 0 where column b had no more to give; S = min(limit or size, size).
    """
    if limit == 0 or limit >= size:
        positions = torch.arange(size, device=lengths.device)[:, None].expand(-1, len(lengths))  # [size, B]
    else:
        keys = torch.rand(size, len(lengths), device=lengths.device)
        keys[torch.arange(size, device=lengths.device)[:, None] >= lengths] = -1  # beyond the end: drawn last
        positions = keys.topk(limit, dim=0).indices  # [limit, B]
    return positions, (positions < lengths).float()


def elbo_loss(vae: VAE, batch: Batch, subsample_limit: int, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative ELBO of whole meta-episodes, averaged over them, and its parts. Zintgraf et al., 2020.

    For every t = 0 .. T the posterior after t steps, sampled once, must predict *every* transition, past and future.
    Terms are summed over t and over transitions (over the subsample if there is one, not rescaled).
    NOTE: the KL is averaged over the batch's meta-episodes like the rest; the authors' code sums it.
    """
    latents = vae.encoder(batch.actions, batch.next_obs, batch.rewards)  # [T+1, B, 2L], before and after every step
    mean, logvar = latents.chunk(2, dim=-1)
    m = mean + (0.5 * logvar).exp() * torch.randn_like(mean)  # m ~ q(m | tau_:t), [T+1, B, L]
    kl = consecutive_kl(mean, logvar)  # [T+1, B]

    elbo_steps, elbo_mask = subsample(batch.lengths + 1, len(m), subsample_limit)  # [E, B], which t
    decoded, decode_mask = subsample(batch.lengths, len(m) - 1, subsample_limit)  # [J, B], which transitions
    m = m.take_along_dim(elbo_steps[:, :, None], dim=0)  # [E, B, L]
    kl = (kl.gather(0, elbo_steps) * elbo_mask).sum(0).mean()
    steps = Batch(*(x.take_along_dim(decoded[:, :, None], dim=0) for x in batch[:4]), batch.lengths)  # [J, B, .]

    reconstruction, parts = 0.0, {"kl": kl}
    for name, decoder in {"reward_loss": vae.reward_decoder, "state_loss": vae.state_decoder}.items():
        if decoder is not None:
            errors = decoder.errors(m, steps, decode_mask)  # [E, B]
            parts[name] = (errors * elbo_mask).sum(0).mean()
            reconstruction = reconstruction + parts[name]
    return reconstruction + kl_weight * kl, parts


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


def main(args: Args) -> Path | None:
    """Trains an agent and returns the run's folder, or evaluates a saved one (--evaluate)."""
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    if args.evaluate is not None:
        agent, envs = load_agent(args.evaluate, args)
        print(format_evaluations(evaluate_groups(agent.to(device), envs, args)))
        return None

    # --- Set-up
    torch.backends.cudnn.deterministic = args.torch_deterministic
    seeds = seeds_of(args)
    torch.manual_seed(seeds["torch"])
    batch_size = args.num_envs * args.num_steps
    envs, eval_envs = make_envs(args, args.num_envs), make_eval_envs(args)
    agent = Agent(envs, args).to(device)
    buffer = MetaEpisodeBuffer(args.vae_buffer, envs, device, seeds["buffer"])
    envs.reset(seeds["train_envs"])
    adam = partial(torch.optim.Adam, eps=args.adam_eps, fused=True)
    optimizer = adam(agent.policy.parameters(), lr=args.learning_rate)
    stateful = {"agent": agent, "optimizer": optimizer, "envs": envs, "buffer": buffer}
    if agent.vae is not None:
        vae_optimizer = adam(agent.vae.parameters(), lr=args.vae_learning_rate)
        stateful["vae_optimizer"] = vae_optimizer

    with Run(args, stateful) as run:  # folder, log, progress, signals; with --resume it restores all that is stateful
        for iteration in range(run.iteration + 1, run.num_iterations + 1):
            run.evaluate_if_due(agent, eval_envs)  # before training, then every --eval-interval iterations

            # --- Rollout. META-RL: the encoder's memory continues through episodes and is cleared only when the task
            # changes. The encoder has changed since the last rollout, so the running meta-episodes are encoded again.
            steps: list[Rollout] = []
            policy_obs = to_tensor(envs.policy_obs, device)  # [N, D]
            with torch.inference_mode():
                if agent.vae is not None:
                    belief = agent.vae.encoder.last_hiddens(buffer.running())  # [N, H], zeros at a beginning
                else:
                    belief = agent.initial_belief(envs)  # [N, number of tasks]
                for _ in range(args.num_steps):
                    obs, embedding = policy_obs, agent.embedding(belief)  # [N, D], [N, 2L]
                    dist, value = agent(obs, embedding)
                    action = dist.sample()
                    logprob = dist.log_prob(action)
                    # next_obs is what the action led to. policy_obs is the same, or the first one of the next episode.
                    step = envs.step(action.cpu().numpy())  # a Step of arrays [N, .]
                    next_obs, reward, done, time_limit, policy_obs, discounted = (to_tensor(x, device) for x in step)
                    belief = agent.update_belief(belief, action, next_obs, reward)

                    # META-RL: `done` is the end of the meta-episode. If it was truncated, `compute_gae` needs the value
                    # of its last observation, with the flag "episode just ended" cleared: the policy never sees a 1,
                    # since it acts on the next episode's first observation instead.
                    final_value = torch.zeros_like(value)
                    if time_limit.any():
                        final_value = time_limit * agent(envs.clear_flag(next_obs), agent.embedding(belief))[1]
                    belief = torch.where(done[:, None] > 0, agent.initial_belief(envs), belief)
                    steps.append(
                        Rollout(obs, embedding, action, logprob, value, next_obs, reward, done, final_value, discounted)
                    )
                next_value = agent(policy_obs, agent.embedding(belief))[1]  # [N]
            # Stacked outside of inference mode, whose tensors autograd refuses
            rollout = Rollout(*map(torch.stack, zip(*steps, strict=True)))  # [T, N, .]
            buffer.add(rollout, agent.action_vector(rollout.actions))
            learning = iteration * batch_size >= args.learning_starts

            # --- PPO on the stored embeddings: no gradient reaches the encoder. Rollouts before --learning-starts only
            # feed the normalisers and the buffer. PPO also skips the first, made before the normalisers had any data.
            ppo_log: list[dict[str, Tensor]] = []  # of every minibatch
            if learning and iteration > 1:
                reward_scale = (agent.reward_norm.var + 1e-8).sqrt()
                rewards = (rollout.rewards / reward_scale).clamp(-args.reward_clip, args.reward_clip)
                advantages = compute_gae(rewards, rollout, next_value, args.gamma, args.gae_lambda)  # [T, N]
                b_returns = (advantages + rollout.values).flatten()  # [T * N]
                b_advantages = advantages.flatten()
                b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
                b = Rollout(*(x.flatten(0, 1) for x in rollout))  # [T * N, .]
                for _ in range(args.update_epochs):
                    for mb_inds in torch.randperm(batch_size, device=device).chunk(args.num_minibatches):
                        dist, newvalue = agent(b.obs[mb_inds], b.embeddings[mb_inds])
                        logratio = dist.log_prob(b.actions[mb_inds]) - b.logprobs[mb_inds]
                        pg_loss = policy_loss(logratio, b_advantages[mb_inds], args.clip_coef)
                        v_loss = value_loss(newvalue, b.values[mb_inds], b_returns[mb_inds], args.clip_coef)
                        entropy_loss = dist.entropy().mean()
                        loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss

                        optimizer.zero_grad()
                        loss.backward()
                        nn.utils.clip_grad_norm_(agent.policy.parameters(), args.max_grad_norm)
                        optimizer.step()
                        losses = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy_loss}
                        ppo_log.append(losses | policy_change(logratio, args.clip_coef))

            # --- VAE update, on whole meta-episodes
            vae_log: list[dict[str, Tensor]] = []  # of every update
            if learning and agent.vae is not None and buffer.size > 0:  # there are finished meta-episodes
                for _ in range(args.vae_updates):
                    batch = buffer.sample(args.vae_batch)
                    vae_loss, parts = elbo_loss(agent.vae, batch, args.vae_subsample, args.kl_weight)
                    vae_optimizer.zero_grad()
                    vae_loss.backward()
                    vae_optimizer.step()
                    vae_log.append(parts | {"elbo": -vae_loss})

            # --- Normalisers: between the update and the next rollout, never between a rollout and its update, so that
            # the ratios of the first minibatch are 1.
            agent.obs_norm.update(rollout.obs.flatten(0, 1))
            agent.latent_norm.update(rollout.embeddings.flatten(0, 1))
            agent.reward_norm.update(rollout.discounted_returns.flatten()[:, None])

            # --- Log; stop if anything is not finite; write a checkpoint if one is due
            scalars = mean_scalars("losses", ppo_log) | mean_scalars("vae", vae_log)
            if ppo_log and b_returns.var() > 0:
                unexplained = (b_returns - b.values).var() / b_returns.var()
                scalars["losses/explained_variance"] = 1 - unexplained.item()
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            run.end_iteration(scalars, agent.is_finite(policy_obs, belief))
        run.evaluate_if_due(agent, eval_envs)
        run.save_result()
    return run.folder


# ---------------------------------------------------------------------------------------------------------------------
# Logging and evaluation

Summary = dict[str, dict[str, float]]  # by name: mean, stderr, count


@torch.no_grad()
def policy_change(logratio: Tensor, clip_coef: float) -> dict[str, Tensor]:
    """How far a minibatch [B] of the policy has moved from the rollout's, and how often that was clipped."""
    change = logratio.exp() - 1
    return {"approx_kl": (change - logratio).mean(), "clipfrac": (change.abs() > clip_coef).float().mean()}


def mean_scalars(prefix: str, log: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over an iteration's minibatches or updates, named "prefix/name"."""
    names = log[0] if log else ()
    return {f"{prefix}/{name}": torch.stack([entry[name].detach() for entry in log]).mean().item() for name in names}


@torch.inference_mode()
def evaluate(agent: Agent, envs: MetaEpisodes, seed: int, tasks: np.ndarray | None = None) -> list[MetaEpisode]:
    """Plays one meta-episode per task under the greedy policy; returns them in the order of the tasks.

    `seed` fixes the initial states. The tasks are the given ones, or else all of a finite family (repeated to fill the
    environments), or else one drawn for each environment. More tasks than environments are played in rounds. Training
    is not touched.
    On Grid-World, every goal once, policy and environment are deterministic, so that the mean is the exact expectation.
    """
    device = agent.obs_norm.mean.device
    if tasks is None and envs.all_tasks is not None:
        tasks = np.resize(envs.all_tasks, (envs.num_envs, envs.all_tasks.shape[1]))
    num_tasks = envs.num_envs if tasks is None else len(tasks)
    played: list[MetaEpisode] = []
    for start in range(0, num_tasks, envs.num_envs):
        round_tasks = None if tasks is None else np.resize(tasks[start:], (envs.num_envs, tasks.shape[1]))
        obs = to_tensor(envs.reset(seed, round_tasks), device)  # [N, D]
        belief = agent.initial_belief(envs)  # [N, H]
        first: dict[int, MetaEpisode] = {}  # of every environment; one that is done early continues, unrecorded
        while len(first) < envs.num_envs:
            action = agent(obs, agent.embedding(belief))[0].mode
            next_obs, reward, _, _, obs, _ = (to_tensor(x, device) for x in envs.step(action.cpu().numpy()))
            belief = agent.update_belief(belief, action, next_obs, reward)
            for meta_episode in envs.take_finished():
                first.setdefault(meta_episode.env, meta_episode)
        played += [first[i] for i in range(min(envs.num_envs, num_tasks - start))]
    return played


def summarize(played: list[MetaEpisode]) -> Summary:
    """Mean, standard error and count of the meta-episodes' returns, of each episode's, and of the episodes' lengths.

    Where episodes succeed or fail also each episode's success in percent; that of the last episode on the test tasks is
    the meta-test success percentage of the paper's Table 2. The standard error of a single task is 0.
    """
    returns = np.array([meta_episode.returns for meta_episode in played])  # [num_tasks, episodes_per_task]
    columns = {"meta_episodic_return": returns.sum(axis=1)}
    columns |= {f"episodic_return_ep{k + 1}": column for k, column in enumerate(returns.T)}
    if played[0].successes is not None:
        successes = 100.0 * np.array([meta_episode.successes for meta_episode in played])
        columns |= {f"success_ep{k + 1}": column for k, column in enumerate(successes.T)}
    columns["episodic_length"] = np.array([meta_episode.lengths for meta_episode in played]).mean(axis=1)
    return {
        name: {"mean": float(x.mean()), "stderr": float(x.std(ddof=int(len(x) > 1)) / len(x) ** 0.5), "count": len(x)}
        for name, x in columns.items()
    }


def evaluate_groups(agent: Agent, envs: MetaEpisodes, args: Args) -> dict[str, Summary]:
    """Summaries of evaluations: "eval", of tasks that may be trained on, and on Meta-World "test", of held-out ones.

    Where a group has several classes, also of every class, for example "test/door-close-v3".
    """
    seed = seeds_of(args)["eval_envs"]
    if args.env not in META_WORLD:
        return {"eval": summarize(evaluate(agent, envs, seed))}
    summaries = {}
    for group, tasks in {"eval": envs.envs.train_tasks, "test": envs.envs.test_tasks}.items():
        played = evaluate(agent, envs, seed, tasks[: args.eval_tasks])
        summaries[group] = summarize(played)
        by_class: dict[str, list[MetaEpisode]] = {}
        for task, meta_episode in zip(tasks[:, 0], played, strict=False):
            by_class.setdefault(envs.envs.class_names[task], []).append(meta_episode)
        if len(by_class) > 1:
            summaries |= {f"{group}/{name}": summarize(by_class[name]) for name in sorted(by_class)}
    return summaries


def format_evaluations(evaluations: dict[str, Summary]) -> str:
    """Returns, and success where there is such a thing, of "eval" and "test" in a line."""
    texts = []
    for summary in [evaluations[group] for group in ("eval", "test") if group in evaluations]:
        total = summary["meta_episodic_return"]
        texts.append(f"meta-episode return {total['mean']:.2f} +- {total['stderr']:.2f} ({total['count']} tasks)")
        for title, name in (("by episode", "episodic_return_ep"), ("success in %", "success_ep")):
            means = [f"{value['mean']:.2f}" for key, value in summary.items() if key.startswith(name)]
            if len(means) > 1 or (means and name == "success_ep"):
                texts[-1] += f", {title} {' '.join(means)}"
    return "; test tasks: ".join(texts)


def parameter_counts(agent: Agent) -> dict[str, int]:
    """Parameter counts: in total, of the hypernetwork, and of one base network (actor and critic)."""
    base = [*agent.policy.actor.parameters(), *agent.policy.critic.parameters()]
    stacks = [p for p in base if p.dim() == 3]  # [K+1, out, in], of which a base network gets one slice's worth
    hyper = [*agent.policy.hyper_hidden.parameters(), *stacks]
    return {
        "total": sum(p.numel() for p in agent.parameters()),
        "hypernetwork": sum(p.numel() for p in hyper),
        "base_network": sum(p[0].numel() if p.dim() == 3 else p.numel() for p in base),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Meta-episodes, and the replay buffer that the VAE learns from


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32, device=device)


class MetaEpisode(NamedTuple):
    """A finished meta-episode."""

    env: int  # the environment that it was played in
    returns: np.ndarray  # by episode, [episodes_per_task]
    successes: np.ndarray | None  # 1 if any step of the episode fulfilled the task, else 0, [episodes_per_task]
    lengths: np.ndarray  # steps by episode, [episodes_per_task]


class Step(NamedTuple):
    """A step of all environments."""

    next_obs: np.ndarray  # what the action led to, for the encoder; flag 1 where it ended an episode, [N, D]
    rewards: np.ndarray  # [N]
    dones: np.ndarray  # where the meta-episode ended, bool [N]
    time_limit: np.ndarray  # where it was truncated: time ran out, and that is no end of the task, bool [N]
    policy_obs: np.ndarray  # what the policy acts on next, after a reset where an episode ended, [N, D]
    discounted_returns: np.ndarray  # of the meta-episode so far, [N]


class MetaEpisodes:
    """Meta-episodes over a VectorEnv (section 3.1): `episodes_per_task` episodes on one task, then a new task.

    META-RL: with several episodes, a flag joins the observation: 1 on the observation that ended an episode. The
    encoder sees that one; the policy acts on the next episode's first, whose flag is 0, as it always is for the policy.
    """

    SAVED = ("episode", "policy_obs", "returns", "successes", "lengths", "discounted_returns")  # arrays [N, ...]

    def __init__(self, envs: gym.vector.VectorEnv, episodes_per_task: int, gamma: float):
        self.envs, self.num_envs, self.episodes_per_task, self.gamma = envs, envs.num_envs, episodes_per_task, gamma
        self.has_flag = episodes_per_task > 1
        self.has_success = hasattr(envs, "success")  # whether episodes succeed or fail
        self.max_steps = episodes_per_task * envs.horizon  # of a meta-episode
        self.obs_dim = envs.single_observation_space.shape[0] + self.has_flag
        self.discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)
        self.action_dim = int(envs.single_action_space.n) if self.discrete else envs.single_action_space.shape[0]
        self.all_tasks = getattr(envs, "all_tasks", None)  # [num_tasks, task_dim], if there are finitely many
        self.blow_ups = 0  # episodes that ended because observation or reward were not finite

    def add_flag(self, obs: np.ndarray, episode_done: np.ndarray) -> np.ndarray:
        return np.column_stack([obs, episode_done.astype(np.float32)]) if self.has_flag else obs  # [N, D]

    def clear_flag(self, obs: Tensor) -> Tensor:
        """The observations [N, D] with the flag at 0."""
        return torch.cat([obs[:, :-1], torch.zeros_like(obs[:, -1:])], dim=1) if self.has_flag else obs

    def reset(self, seed: int | None = None, tasks: np.ndarray | None = None) -> np.ndarray:
        """Starts a meta-episode everywhere, on drawn tasks or given ones, which stay; returns observations [N, D]."""
        self.tasks_stay = tasks is not None
        self.episode = np.zeros(self.num_envs, int)  # index of the running episode, [N]
        self.returns, self.successes, self.lengths = np.zeros((3, self.num_envs, self.episodes_per_task))
        self.discounted_returns = np.zeros(self.num_envs, np.float32)
        self.finished: list[MetaEpisode] = []
        obs, _ = self.envs.reset(seed=seed, options={"tasks": tasks} if self.tasks_stay else {})
        self.policy_obs = self.add_flag(obs, np.zeros(self.num_envs))
        return self.policy_obs

    def step(self, actions: np.ndarray) -> Step:
        """Steps all environments; where an episode ends the next one begins, on a new task after the last."""
        obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        success = self.envs.success if self.has_success else False
        finite = np.isfinite(obs).all(axis=1) & np.isfinite(rewards)  # [N]
        if not finite.all():  # the episode ends at the previous observation, with reward 0 for the step
            obs = np.where(finite[:, None], obs, self.policy_obs[:, : obs.shape[1]])
            rewards, success, terminated = np.where(finite, rewards, 0.0), success & finite, terminated | ~finite
            self.blow_ups += int((~finite).sum())
        running = np.arange(self.num_envs), self.episode
        self.returns[running] += rewards
        self.successes[running] = np.maximum(self.successes[running], success)
        self.lengths[running] += 1
        discounted_returns = np.float32(self.gamma) * self.discounted_returns + rewards.astype(np.float32)

        episode_done = terminated | truncated
        task_done = episode_done & (self.episode == self.episodes_per_task - 1)
        self.episode = np.where(task_done, 0, self.episode + episode_done)
        self.discounted_returns = np.where(task_done, np.float32(0), discounted_returns)
        for i in np.flatnonzero(task_done).tolist():
            successes = self.successes[i].copy() if self.has_success else None
            self.finished.append(MetaEpisode(i, self.returns[i].copy(), successes, self.lengths[i].copy()))
            self.returns[i] = self.successes[i] = self.lengths[i] = 0

        # Each reset returns the observations of all environments, also of those that it leaves alone, so those of the
        # last one are complete.
        next_obs, new_task = self.add_flag(obs, episode_done), task_done & (not self.tasks_stay)
        if (same_task := episode_done & ~new_task).any():
            obs, _ = self.envs.reset(options={"reset_mask": same_task, "tasks": self.envs.tasks})
        if new_task.any():
            obs, _ = self.envs.reset(options={"reset_mask": new_task})
        self.policy_obs = self.add_flag(obs, np.zeros(self.num_envs)) if episode_done.any() else next_obs
        return Step(next_obs, rewards, task_done, task_done & ~terminated, self.policy_obs, discounted_returns)

    def take_finished(self) -> list[MetaEpisode]:
        """The meta-episodes that ended since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def state_dict(self) -> dict[str, Any]:
        saved = {name: torch.from_numpy(getattr(self, name)) for name in self.SAVED}
        return saved | {"blow_ups": self.blow_ups, "envs": self.envs.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.SAVED:
            getattr(self, name)[:] = state[name].numpy()
        self.blow_ups = state["blow_ups"]
        self.envs.load_state_dict(state["envs"])


def make_envs(args: Args, num_envs: int) -> MetaEpisodes:
    """A batch of `num_envs` environments of `args.env`."""
    if args.env == "Grid-World":
        grid = {"size": args.grid_size, "horizon": args.grid_horizon, "goals": args.grid_goals}
        envs = gym.make_vec("GridWorld-v0", num_envs=num_envs, **grid)
    elif args.env in META_WORLD:
        benchmark = make_benchmark(args.env, seeds_of(args)["benchmark"])
        envs = MetaWorldVectorEnv(benchmark, num_envs, args.end_on_success)
    else:
        envs = MUJOCO_ENVS[args.env](num_envs, args.threads)
    return MetaEpisodes(envs, args.episodes_per_task, args.gamma)


def make_eval_envs(args: Args) -> MetaEpisodes:
    """One environment per evaluation task: --eval-tasks, or Grid-World's goals; on Meta-World --num-envs in turn."""
    if args.env == "Grid-World":
        return make_envs(args, len(gridworld.goal_cells(args.grid_size, args.grid_goals)))
    return make_envs(args, min(args.num_envs, args.eval_tasks) if args.env in META_WORLD else args.eval_tasks)


class MetaEpisodeBuffer:
    """The last `capacity` whole meta-episodes, for the VAE, and the running one of every environment."""

    def __init__(self, capacity: int, envs: MetaEpisodes, device: torch.device, seed: int):
        self.capacity, self.device, self.rng = capacity, device, np.random.default_rng(seed)
        self.widths = [envs.obs_dim, envs.action_dim, 1, envs.obs_dim]
        # Row i < capacity is a finished meta-episode, row capacity + i the running one of environment i. The system
        # hands out the memory of zeros only as rows are filled.
        self.transitions = np.zeros((capacity + envs.num_envs, envs.max_steps, sum(self.widths)), np.float32)
        self.lengths = np.zeros(capacity + envs.num_envs, int)
        self.running_rows = capacity + np.arange(envs.num_envs)
        self.size = self.position = 0  # finished meta-episodes, and the row that the next one overwrites

    def add(self, rollout: Rollout, action_vectors: Tensor) -> None:
        """Adds a rollout [T, N, .] with actions as the encoder sees them, [T, N, A]."""
        parts = rollout.obs, action_vectors, rollout.rewards[:, :, None], rollout.next_obs
        transitions = torch.cat(parts, dim=-1).cpu().numpy()  # [T, N, 2D + A + 1]
        dones = rollout.dones.bool().cpu().numpy()
        for step, done in zip(transitions, dones, strict=True):
            self.transitions[self.running_rows, self.lengths[self.running_rows]] = step
            self.lengths[self.running_rows] += 1
            for row in self.running_rows[done]:  # it moves to the finished ones
                length = self.lengths[row]
                self.transitions[self.position, :length] = self.transitions[row, :length]
                self.lengths[self.position], self.lengths[row] = length, 0
                self.position = (self.position + 1) % self.capacity
                self.size = min(self.size + 1, self.capacity)

    def batch(self, rows: np.ndarray) -> Batch:
        lengths = self.lengths[rows]  # [B]
        transitions = torch.from_numpy(self.transitions[rows, : lengths.max()]).to(self.device)  # [B, T, 2D + A + 1]
        parts = transitions.swapaxes(0, 1).split(self.widths, dim=-1)
        return Batch(*parts, torch.from_numpy(lengths).to(self.device))

    def running(self) -> Batch:
        """The running meta-episode of every environment, B = N."""
        return self.batch(self.running_rows)

    def sample(self, batch_size: int) -> Batch:
        """Finished meta-episodes, drawn with replacement."""
        return self.batch(self.rng.integers(self.size, size=batch_size))

    def state_dict(self) -> dict[str, Any]:
        """All meta-episodes, without the memory that is not filled yet, and the generator."""
        return {
            "finished": torch.from_numpy(self.transitions[: self.size]),
            "running": torch.from_numpy(self.transitions[self.capacity :]),
            "lengths": torch.from_numpy(self.lengths),
            "position": self.position,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size, self.position = len(state["finished"]), state["position"]
        self.transitions[: self.size] = state["finished"].numpy()
        self.transitions[self.capacity :] = state["running"].numpy()
        self.lengths[:] = state["lengths"].numpy()
        self.rng.bit_generator.state = state["rng"]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: gymnasium.vector.VectorEnv with autoreset disabled. `reset(seed=, options={"reset_mask": [N]})` draws new tasks
# for the masked environments, or takes them from options["tasks"] [N, ...]; `envs.tasks` holds the present ones.

# MuJoCo's warnings of physics that has blown up: a bad position, velocity or acceleration
UNSTABLE = [getattr(mujoco.mjtWarning, f"mjWARN_BAD{name}").value for name in ("QPOS", "QVEL", "QACC")]
mujoco.set_mju_user_warning(lambda message: None)  # they are counted, not written to a file


class MujocoVectorEnv(gym.vector.VectorEnv):
    """N MuJoCo models in this process, one MjData each, with observations and rewards computed for the whole batch.

    One plain loop over MjData comes close to the physics' own speed; a process per environment is slower. A subclass
    gives the model, `sample_task(rng)` [task_dim], and functions of the batch: `observe()` [N, D] and
    `reward(velocity, actions)` [N], of m/s and raw actions. Rewards are written out from the tasks' definitions, since
    Gymnasium's own classes use other weights. Actions [N, A] in [-1, 1] reach the actuators clipped; costs are taken on
    the raw ones.
    """

    metadata = {"render_modes": [], "autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    xml_file: str
    task_dim = 1
    timestep: float | None = None  # of the physics, in seconds; None: as the file says
    frame_skip = 5
    horizon = 200  # steps per episode
    qpos_noise = 0.1  # of the initial state, as in Gymnasium's class of the same robot
    qvel_noise: float | None = 0.1  # standard deviation; None: uniform, as qpos_noise
    action_scale = 1.0  # actuator command per unit of action
    contact_forces = False  # whether cfrc_ext is needed: it is 0 until mj_rnePostConstraint

    def __init__(self, num_envs: int, threads: int = 1):
        path = Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / self.xml_file
        self.default_model = mujoco.MjModel.from_xml_path(str(path))
        if self.timestep is not None:
            self.default_model.opt.timestep = self.timestep
        self.num_envs = num_envs
        self.shares = [range(k, num_envs, threads) for k in range(threads)]  # of the environments, one per thread
        self.pool = ThreadPoolExecutor(threads)  # mj_step lets other threads run
        self.models = [copy.copy(self.default_model) for _ in range(num_envs)]  # independent copies
        self.data = [mujoco.MjData(model) for model in self.models]
        self.views: dict[str, list[np.ndarray]] = {}
        self.warnings = [data.warning.number for data in self.data]  # views into MuJoCo's memory
        self.dt = self.default_model.opt.timestep * self.frame_skip  # seconds per step
        self.elapsed = np.zeros(num_envs, int)
        self.tasks = np.zeros((num_envs, self.task_dim))
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]  # each draws its own tasks and initial states
        self.single_action_space = gym.spaces.Box(-1, 1, (self.default_model.nu,), np.float32)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, self.observe().shape[1:], np.float32)
        spaces = self.single_observation_space, self.single_action_space
        self.observation_space, self.action_space = (gym.vector.utils.batch_space(space, num_envs) for space in spaces)

    def apply_task(self, i: int) -> None:
        """Writes task i into model i, for tasks that live in the physics."""

    def location(self) -> np.ndarray:
        """Where the robots are, in metres: x [N, 1], or (x, y) [N, 2]."""
        return self.state("qpos")[:, :1]

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

    def simulate(self, commands: np.ndarray, share: range) -> None:
        """Steps the physics of some environments under commands [N, A]."""
        for i in share:
            self.data[i].ctrl[:] = commands[i]
            mujoco.mj_step(self.models[i], self.data[i], self.frame_skip)
            if self.contact_forces:
                mujoco.mj_rnePostConstraint(self.models[i], self.data[i])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        before = self.location()
        low, high = self.default_model.actuator_ctrlrange.T  # [A] each
        commands = np.clip(self.action_scale * actions, low, high)  # [N, A]
        list((self.pool.map if len(self.shares) > 1 else map)(partial(self.simulate, commands), self.shares))
        self.elapsed += 1
        rewards = self.reward((self.location() - before) / self.dt, actions)
        obs = self.observe().astype(np.float32)
        blown_up = np.concatenate(self.warnings).reshape(self.num_envs, -1)[:, UNSTABLE].any(axis=1)  # [N]
        for i in np.flatnonzero(blown_up):  # MuJoCo has already reset the robot
            obs[i] = np.nan
            self.warnings[i][:] = 0
        return obs, rewards, self.unhealthy(), self.elapsed >= self.horizon, {}

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on: tasks, counters, generators, physics."""
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
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
    timestep = 0.004  # the original Walker's; Gymnasium's file says 0.002
    frame_skip = 4
    qpos_noise = 0.005
    qvel_noise = None

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

    def observe(self):  # [N, 8 + 9]
        return np.concatenate([self.state("qpos")[:, 1:], np.clip(self.state("qvel"), -10, 10)], axis=1)

    def reward(self, velocity, actions):
        return velocity[:, 0] + 1 - 1e-3 * np.square(actions).sum(axis=1)

    def unhealthy(self):
        z, angle = self.state("qpos")[:, 1:3].T
        return ~((0.8 < z) & (z < 2) & (np.abs(angle) < 1))


class DirectionTask(MujocoVectorEnv):
    """Run in a direction of the plane. Task: the angle, U(0, 2 pi)."""

    contact_forces = True

    def sample_task(self, rng):
        return rng.uniform(0, 2 * np.pi)

    def speed(self, velocity: np.ndarray) -> np.ndarray:
        """The part of velocity [N, 2] in the task's direction, [N]."""
        return velocity[:, 0] * np.cos(self.tasks[:, 0]) + velocity[:, 1] * np.sin(self.tasks[:, 0])


class AntDir(DirectionTask):
    """Ends when the torso leaves 0.2 <= z <= 1. Reward: v . d - 0.5 |a|^2 - 0.5e-3 |clip(contact forces, -1, 1)|^2 + 1.
    NOTE: the authors' code has two tasks, +-57 degrees; the paper says that the tasks vary parametrically.
    """

    xml_file = "ant.xml"

    def location(self):
        return self.state("xpos")[:, 1, :2]  # the torso

    def observe(self):  # [N, 13 + 14]
        return np.concatenate([self.state("qpos")[:, 2:], self.state("qvel")], axis=1)

    def reward(self, velocity, actions):
        contact = np.square(np.clip(self.state("cfrc_ext"), -1, 1)).sum(axis=(1, 2))
        return self.speed(velocity) - 0.5 * np.square(actions).sum(axis=1) - 0.5e-3 * contact + 1

    def unhealthy(self):
        z = self.state("qpos")[:, 2]
        return ~((0.2 <= z) & (z <= 1))


class Humanoid(DirectionTask):
    """Ends when the torso leaves 1 <= z <= 2. Reward, with v of the centre of mass:

    1.25 v . d - 0.1 |ctrl|^2 - min(0.5e-6 |contact forces|^2, 10) + 5.
    """

    xml_file = "humanoid.xml"
    qpos_noise = 0.01
    qvel_noise = None
    action_scale = 0.4

    def location(self):
        mass = self.default_model.body_mass
        return np.einsum("b,nbx->nx", mass / mass.sum(), self.state("xipos"))[:, :2]

    def observe(self):  # [N, 22 + 23 + 130 + 78 + 17 + 78], Gymnasium's Humanoid-v5
        parts = [self.state("qpos")[:, 2:], self.state("qvel"), self.state("cinert")[:, 1:], self.state("cvel")[:, 1:]]
        parts += [self.state("qfrc_actuator")[:, 6:], self.state("cfrc_ext")[:, 1:]]
        return np.concatenate([part.reshape(self.num_envs, -1) for part in parts], axis=1)

    def reward(self, velocity, actions):
        contact = np.square(self.state("cfrc_ext")).sum(axis=(1, 2))
        control = np.square(self.action_scale * actions).sum(axis=1)
        return 1.25 * self.speed(velocity) - 0.1 * control - np.minimum(0.5e-6 * contact, 10) + 5

    def unhealthy(self):
        z = self.state("qpos")[:, 2]
        return ~((1 <= z) & (z <= 2))


MUJOCO_ENVS = {"Cheetah-Dir": CheetahDir, "Walker": Walker, "Ant-Dir": AntDir, "Humanoid": Humanoid}
META_WORLD = ("Pick-Place", "ML10")


@cache
def make_benchmark(env: str, seed: int) -> Any:
    """The metaworld.Benchmark with its training and test tasks; made once (ML10 takes seconds), imported if needed."""
    import metaworld

    if env == "Pick-Place":
        return metaworld.ML1("pick-place-v3", seed=seed)  # 50 training, 50 test goals
    return metaworld.ML10(seed=seed)  # 10 training, 5 test classes of 50 goals each


class MetaWorldEnv(gym.Env):
    """One of Meta-World's environments, in a process of its own; environment `index` of a MetaWorldVectorEnv.

    Observations [39] with the goal zeroed, actions [4], clipped to [-1, 1] as the gripper's motors do; info["success"]
    is of this step alone. Nothing is random once a task is set: a reset forgets all before it.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, benchmark: Any, tasks: list[Any], index: int, run_process: int):
        if os.getpid() != run_process:  # signals are for the run, which must save its state before its workers end
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        self.classes = {**benchmark.train_classes, **benchmark.test_classes}
        self.tasks, self.index = tasks, index
        self.robots: dict[str, Any] = {}  # by class; some 20 MB each, built when needed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode on task number options["tasks"][index], and plays options["replay"][index], if given."""
        task = self.tasks[options["tasks"][self.index]]
        if task.env_name not in self.robots:
            robot = self.robots[task.env_name] = self.classes[task.env_name]()
            robot.touching_object = lambda geom: False  # half of pick-place's step, for info["grasp_success"] only
        self.robot = self.robots[task.env_name]  # the one whose task is running
        self.robot.set_task(task)
        obs = self.robot.reset()[0]
        for action in options["replay"][self.index] if "replay" in options else ():
            obs = self.step(action)[0]
        return obs.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, _, _, info = self.robot.step(np.clip(action, -1, 1))
        if self.robot.data.warning.number[UNSTABLE].any():  # MuJoCo has already reset the robot
            obs = np.full_like(obs, np.nan)
        return obs.astype(np.float32), reward, False, False, {"success": bool(info["success"])}


def end_workers(envs: gym.vector.AsyncVectorEnv) -> None:
    """Kills the worker processes, which hold nothing that could be lost."""
    for process in envs.processes:
        process.kill()
        process.join()
    envs.closed = True  # nothing is left to be closed


class MetaWorldVectorEnv(gym.vector.VectorEnv):
    """N of Meta-World's environments, one process each (85% of a step is Python); 500 steps per episode.

    A task is its number: the training tasks come first, then the test tasks, the classes taking turns in both. New
    tasks are drawn from the training tasks alone: a class, none twice before each was drawn once, then one of its
    goals. `success` [N] says where the last step fulfilled the task, which may be undone again.
    NOTE: Meta-World's own `gym.make_vec` trains on the test tasks.
    """

    metadata = {"render_modes": [], "autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    horizon = 500  # steps per episode

    def __init__(self, benchmark: Any, num_envs: int, end_on_success: bool):
        tasks: list[Any] = []
        train, test = (benchmark.train_classes, benchmark.train_tasks), (benchmark.test_classes, benchmark.test_tasks)
        for classes, class_tasks in (train, test):
            goals = len(class_tasks) // len(classes)  # of each class, in succession
            tasks += [class_tasks[k * goals + goal] for goal in range(goals) for k in range(len(classes))]
        self.class_names = [task.env_name for task in tasks]  # of every task
        self.num_classes = len(benchmark.train_classes)
        self.num_train = len(benchmark.train_tasks)
        self.train_tasks = np.arange(self.num_train)[:, None]  # [num_train, 1]
        self.test_tasks = np.arange(self.num_train, len(tasks))[:, None]

        self.num_envs, self.end_on_success = num_envs, end_on_success
        self.workers = gym.vector.AsyncVectorEnv(
            [partial(MetaWorldEnv, benchmark, tasks, index, os.getpid()) for index in range(num_envs)],
            autoreset_mode=gym.vector.AutoresetMode.DISABLED,
        )
        self.end_workers = weakref.finalize(self, end_workers, self.workers)
        self.single_observation_space = MetaWorldEnv.observation_space
        self.observation_space = self.workers.observation_space
        self.single_action_space, self.action_space = MetaWorldEnv.action_space, self.workers.action_space
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]  # each draws its own tasks
        self.classes_left: list[list[int]] = [[] for _ in range(num_envs)]  # not drawn since each was
        self.tasks = np.zeros((num_envs, 1), int)
        self.elapsed = np.zeros(num_envs, int)
        self.actions = np.zeros((num_envs, self.horizon, 4), np.float32)  # of the running episodes, to replay them
        self.success = np.zeros(num_envs, bool)

    def sample_task(self, i: int) -> int:
        """Draws a training task for environment i."""
        if not self.classes_left[i]:
            self.classes_left[i] = self.rngs[i].permutation(self.num_classes).tolist()
        goal = self.rngs[i].integers(self.num_train // self.num_classes)
        return goal * self.num_classes + self.classes_left[i].pop()

    def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Calls `reset` or `step` of the workers. Raises ChildProcessError if one has died or failed."""
        try:
            return getattr(self.workers, method)(*args, **kwargs)
        except Exception as error:  # EOFError and ConnectionError: one was killed, perhaps for want of memory
            self.end_workers()
            raise ChildProcessError(f"an environment worker failed ({type(error).__name__}: {error})") from error

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)  # [N]
        for i in np.flatnonzero(mask):
            if seed is not None:
                self.rngs[i], self.classes_left[i] = np.random.default_rng(seed + i), []
            self.tasks[i] = options["tasks"][i] if "tasks" in options else self.sample_task(i)
        self.elapsed[mask] = 0
        return self.call("reset", options={"reset_mask": mask, "tasks": self.tasks[:, 0]})

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.actions[np.arange(self.num_envs), self.elapsed] = actions
        self.elapsed += 1
        obs, rewards, _, _, info = self.call("step", actions)
        self.success = info["success"]
        return obs, rewards, self.success & self.end_on_success, self.elapsed >= self.horizon, {}

    def close_extras(self, **kwargs: Any) -> None:
        self.end_workers()

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on. A running episode follows from its task and the actions so far."""
        return {
            "tasks": torch.from_numpy(self.tasks.copy()),
            "elapsed": self.elapsed.tolist(),
            "rngs": [rng.bit_generator.state for rng in self.rngs],
            "classes_left": [list(classes) for classes in self.classes_left],
            "actions": torch.from_numpy(self.actions[:, : self.elapsed.max()].copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken: the running episodes are played again, which takes seconds."""
        self.tasks, self.elapsed = state["tasks"].numpy().copy(), np.array(state["elapsed"])
        self.classes_left = [list(classes) for classes in state["classes_left"]]
        for rng, generator_state in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = generator_state
        self.actions[:, : self.elapsed.max()] = state["actions"].numpy()
        replay = [actions[:elapsed] for actions, elapsed in zip(self.actions, self.elapsed, strict=True)]
        self.call("reset", options={"tasks": self.tasks[:, 0], "replay": replay})


# ---------------------------------------------------------------------------------------------------------------------
# Presets, parsing, checks

# The authors' released configuration (VariBAD's for Humanoid), where it is not Grid-World's above. NOTE: they sum the
# KL over the batch and we average it, so that kl_weight is theirs times their batch size. Grid-World has VariBAD's,
# 0.01 times 25; the authors' would be 25. NOTE: the VAE is trained more than theirs on Grid-World (3 updates of 25 at
# 1e-3) and Cheetah-Dir (1 of 10 at 1e-3), because its training was the bottleneck there. NOTE: with an entropy weight
# of 0.01 (VariBAD's) some seeds stop searching on Grid-World, with 0.1 (the authors') all learn slowly.
# fmt: off
MUJOCO_PRESET = {
    "total_timesteps": 100_000_000, "checkpoint_interval": 100, "episodes_per_task": 1, "num_steps": 200,
    "gamma": 0.97, "gae_lambda": 0.9, "clip_coef": 0.1, "ent_coef": 0.01,
    "state_features": 64, "embedding_features": 10, "base_layers": (128, 128),
    "gru_hidden": 128, "action_embedding": 16, "reward_embedding": 16, "decoder_layers": (64, 32),
    "vae_buffer": 10_000, "vae_batch": 10, "vae_updates": 1, "vae_learning_rate": 1e-3, "vae_subsample": 50,
    "kl_weight": 1.0,
}
META_WORLD_PRESET = MUJOCO_PRESET | {
    "total_timesteps": 50_000_000, "checkpoint_interval": 400, "eval_interval": 400, "eval_tasks": 50,
    "episodes_per_task": 2, "num_envs": 8, "num_steps": 600,
    "learning_rate": 3e-4, "num_minibatches": 8, "ent_coef": 0.001, "reward_clip": 1e5,
    "state_features": 256, "base_layers": (256, 128), "gru_hidden": 256, "decoder_layers": (128, 64, 32),
    "vae_updates": 3, "kl_weight": 10.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "Grid-World": {},
    "Cheetah-Dir": MUJOCO_PRESET | {"num_steps": 400, "vae_updates": 5, "vae_learning_rate": 2e-3},
    "Walker": MUJOCO_PRESET | {
        "checkpoint_interval": 200, "episodes_per_task": 2, "clip_coef": 0.05, "num_minibatches": 2,
        "latent_dim": 10, "action_embedding": 32, "reward_embedding": 32,
        "decode_reward": False, "decode_state": True, "decoder_layers": (256, 128), "kl_weight": 10.0,
    },
    "Ant-Dir": MUJOCO_PRESET | {"num_minibatches": 1},
    "Humanoid": MUJOCO_PRESET | {
        "checkpoint_interval": 200, "num_steps": 800, "gamma": 0.99, "ent_coef": 0.001,
        "num_minibatches": 2, "update_epochs": 4, "latent_dim": 10, "vae_updates": 10, "vae_subsample": 100,
    },
    "Pick-Place": META_WORLD_PRESET,
    "ML10": META_WORLD_PRESET | {
        "total_timesteps": 100_000_000, "eval_interval": 2000, "eval_tasks": 250,
        "embedding_features": 25, "decode_state": True,
    },
}
# fmt: on


def make_args(env: str = "Grid-World", **changes: Any) -> Args:
    """The preset of `env` with some changes, for notebooks: make_args("Cheetah-Dir", seed=2)."""
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return Args(env=env, **PRESETS[env] | changes)


def fail(sentence: str) -> NoReturn:
    """Ends the program with one sentence on stderr and exit status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """Args from the command line (default sys.argv): the flags given, over the preset of --env, over the defaults.

    With --resume or --evaluate the saved run's arguments take the preset's place; a flag that contradicts them ends the
    program with a sentence, unless it may change.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what the other flags' defaults depend on
    for name in ("env", "resume", "evaluate"):
        early.add_argument(flag(name), nargs="?")
    early = early.parse_known_args(argv)[0]
    path = early.evaluate if early.resume is None else early.resume
    if path is not None:
        default = load_saved(path, mmap=True)[1]
    else:
        default = make_args(early.env if early.env in PRESETS else "Grid-World")
    # --help shows a group per nested dataclass: nest the arguments by group, parse, flatten again.
    groups = [group(**{f.name: getattr(default, f.name) for f in fields(group)}) for group in Args.__bases__[::-1]]
    by_group = make_dataclass("Args", [(type(group).__name__.removesuffix("Args"), type(group)) for group in groups])
    options = {"description": __doc__.partition("\n")[0], "config": (tyro.conf.OmitArgPrefixes,)}
    parsed = tyro.cli(by_group, default=by_group(*groups), args=argv, **options)
    args = Args(**{name: value for group in asdict(parsed).values() for name, value in group.items()})
    if path is not None:
        if args.resume:
            may_change = {"resume", "threads", "cuda", "track", "wandb_project_name", "wandb_entity", "save_model"}
            may_change |= {"total_timesteps"} if args.total_timesteps > default.total_timesteps else set()
        else:
            may_change = {"evaluate", "threads", "cuda", "eval_tasks", "seed"}
        for name, value in asdict(args).items():
            if value != getattr(default, name) and name not in may_change:
                fail(f"{flag(name)} {value} contradicts the run in {path} ({getattr(default, name)}): leave it out.")
    return args


def check_args(args: Args) -> None:
    """Rejects values that cannot work or would mislead, with one sentence and exit status 2."""
    may_be_zero = {"seed", "checkpoint_interval", "eval_interval", "learning_starts", "gae_lambda", "ent_coef"}
    may_be_zero |= {"vf_coef", "state_features", "embedding_features", "action_embedding", "vae_subsample", "kl_weight"}
    at_most = {"gamma": 1, "gae_lambda": 1, "threads": 1024, "grid_size": 100}
    for name, value in asdict(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                most = at_most.get(name, 1e12 if isinstance(number, int) else 3e38)  # float32 ends there
                least = "0 or more" if name in may_be_zero else "more than 0"
                if not 0 <= number <= most or (number == 0 and name not in may_be_zero):
                    fail(f"{flag(name)} is {number}: it must be {least}, and at most {most:g}.")
    batch_size = args.num_envs * args.num_steps
    frames = f"--num-envs {args.num_envs} x --num-steps {args.num_steps} = {batch_size} frames"
    if not args.base_layers or not args.decoder_layers:
        fail("--base-layers and --decoder-layers need at least one layer each, for example --base-layers 32 32.")
    if args.track and find_spec("wandb") is None:
        fail("--track needs Weights & Biases: pip install -r requirements-optional.txt, or leave --track out.")
    if args.grid_size < (3 if args.grid_goals == "far" else 2):
        fail(f"--grid-size {args.grid_size} leaves no cell for a goal with --grid-goals {args.grid_goals}: raise it.")
    if args.eval_tasks < 2:
        fail("--eval-tasks 1 gives no standard error: it must be at least 2.")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one iteration, {frames}: raise it or lower those.")
    if batch_size % args.num_minibatches:
        fail(f"{frames} do not divide into --num-minibatches {args.num_minibatches}: change one of the three.")
    if args.arch == "standard" and (args.init != "bias" or args.hyper_layers):
        fail("--arch standard has no hypernetwork: leave --init and --hyper-layers out, --base-init initialises it.")
    if args.arch == "film" and args.init not in FILM_SCHEMES:
        fail(f"--arch film generates no weight matrices: choose --init from {', '.join(FILM_SCHEMES)}.")
    if args.arch == "hyper" and args.init not in ("bias", "weight") and args.base_init != "normc":
        fail(f"--base-init changes nothing with --init {args.init}: leave it out, or choose --init bias or weight.")
    if not args.hyper_bias and (args.arch != "hyper" or args.init == "bias"):
        fail("--no-hyper-bias leaves nothing of --init bias, and needs --arch hyper: choose another --init.")
    if args.embedding == "one-hot" and args.env not in ("Grid-World", "Cheetah-Dir"):
        fail(f"--embedding one-hot is made for the few tasks of Grid-World and Cheetah-Dir, not for {args.env}.")
    if not (args.decode_reward or args.decode_state):
        fail("the VAE has nothing to predict: leave --decode-reward or --decode-state on.")


def seeds_of(args: Args) -> dict[str, int]:
    """Independent seeds for all randomness, so that neighbouring values of --seed share nothing."""
    names = ("torch", "train_envs", "eval_envs", "buffer", "benchmark")
    return dict(zip(names, map(int, np.random.SeedSequence(args.seed).generate_state(len(names))), strict=True))


def method(args: Args) -> str:
    """Architecture and initialisation, which name a run; the standard one has the base network's own."""
    return f"{args.arch}-{args.base_init if args.arch == 'standard' else args.init}"


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder: log, checkpoints, model, result

GRID_WORLD_BEST = {"all": 38.3667, "far": 37.2143}  # the Bayes-optimal policy's return, 4 episodes of 15 steps on 5x5


def load_saved(path: str, mmap: bool = False) -> tuple[dict[str, Any], Args]:
    """What a run has saved and its arguments, from its folder, a checkpoint.pt or a model.pt.

    Ends the program with a sentence if the file cannot be read, is damaged, or is of another script or version. No file
    can run code (weights_only). With `mmap` only what is used is read, and damage inside the tensors is not noticed.
    """
    file, script = Path(path), Path(__file__).stem
    try:
        if file.is_dir():
            checkpoint, model = file / "checkpoint.pt", file / "model.pt"
            file = model if model.exists() and not checkpoint.exists() else checkpoint
        with zipfile.ZipFile(file) as archive:  # notices what is cut off
            if not mmap and archive.testzip() is not None:  # compares checksums
                raise zipfile.BadZipFile
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        if saved["script"] != script:
            fail(f"{file} belongs to {saved['script']}.py: use that script.")
        return saved, Args(**saved["args"])
    except OSError as error:
        fail(f"cannot read {file} ({error.strerror}): give a run's folder, a checkpoint.pt or a model.pt.")
    except Exception as error:  # whatever a foreign or damaged file may raise
        fail(f"{file} is damaged, or not of this version of {script}.py ({type(error).__name__}).")


def load_agent(path: str, args: Args | None = None) -> tuple[Agent, MetaEpisodes]:
    """A saved agent and environments to evaluate it in: those of `args`, or of its own arguments."""
    saved, saved_args = load_saved(path)
    # On Meta-World the seed makes the tasks: they stay those that were trained on.
    envs = make_eval_envs(replace(args or saved_args, seed=saved_args.seed))
    agent = Agent(envs, args or saved_args)
    agent.load_state_dict(saved["agent"])
    return agent, envs


def script_commit() -> str | None:
    """The commit of this script, with "-dirty" if code has changed; None outside of a repository that tracks it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
        return f"{commit}-dirty" if changed else commit
    return None


class Run:
    """A run's folder and what goes on beside the algorithm: log, progress, signals, checkpoints, result.

    A checkpoint is the `state_dict` of every stateful part, and of the run itself; --resume puts them back. In a `with`
    block, after which signal handlers are as before, and files closed.
    """

    SAVED = "iteration global_step eval_history meta_return scalars seconds".split()

    def __init__(self, args: Args, stateful: dict[str, Any]):
        self.args, self.stateful, self.script = args, stateful, Path(__file__).stem
        self.batch_size = args.num_envs * args.num_steps
        self.num_iterations = int(args.total_timesteps // self.batch_size)
        self.iteration = self.global_step = 0  # complete iterations, and their frames
        self.eval_history: list[tuple[int, float]] = []  # (frames, mean return of the meta-episode)
        self.meta_return = math.nan  # of the last iteration in which a meta-episode ended
        self.scalars: dict[str, float] = {}  # of the last iteration
        self.seconds = 0.0  # of training, until the last checkpoint
        packages = ("torch", "mujoco", "gymnasium", *(["metaworld"] if args.env in META_WORLD else []))
        versions = {name: version(name) for name in packages}
        self.origin = {"script": self.script, "commit": script_commit(), "versions": versions}
        self.origin["args"] = asdict(replace(args, resume=None))
        self.folder = self.open_folder()
        if args.resume is not None:
            try:
                self.restore()
            except BaseException:
                self.lock.close()  # so that a notebook may try again
                raise
        self.started = time.monotonic() - self.seconds
        if args.track:
            start_tracking(args, self.folder)
        # Points after the checkpoint are written again, also those of an evaluation right after it.
        self.writer = SummaryWriter(str(self.folder), purge_step=self.global_step if args.resume else None)
        self.log(self.scalars)  # those of the checkpoint's iteration, which purge_step leaves out too
        if self.global_step == 0:
            rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        if args.checkpoint_interval:
            self.save_checkpoint()  # from here on the run can be resumed, with these arguments

    def open_folder(self) -> Path:
        """Makes the folder, or takes that of --resume, and locks it until this process ends."""
        args = self.args
        name = [args.env, self.script, args.exp_name, method(args), str(args.seed), str(int(time.time()))]
        folder = Path(args.resume or Path(args.runs_dir) / "__".join(filter(None, name)))
        try:
            if args.resume is None:
                folder.mkdir(parents=True)
            self.lock = open(folder / "lock", "a")
        except OSError as error:
            fail(f"cannot write to the folder {folder} ({error.strerror}): choose another --runs-dir, or try again.")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            fail(f"another process is training in {folder}: wait until it ends, or stop it.")
        except OSError:  # a file system without locks: nothing keeps a second process out
            pass
        return folder

    def __enter__(self) -> Run:
        self.signals: list[signal.Signals] = []  # received
        self.evaluating = False
        self.handlers: dict[int, Any] = {}  # that were there before
        if threading.current_thread() is threading.main_thread():  # only there signals can be handled
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
                    self.handlers[number] = signal.signal(number, self.receive)
        args, agent, envs = self.args, self.stateful["agent"], self.stateful["envs"]
        frames, counts = self.num_iterations * self.batch_size, parameter_counts(agent)
        loop = f"{self.num_iterations} iterations of {args.num_envs} x {args.num_steps} = {self.batch_size} frames"
        print(f"{args.env}, {method(args)}, seed {args.seed}: {loop} on {agent.obs_norm.mean.device}")
        sizes = "{total:,} parameters, hypernetwork {hypernetwork:,}; base network {base_network:,}".format(**counts)
        print(f"observation {envs.obs_dim}, action {envs.action_dim}, {envs.max_steps} steps a task; {sizes}")
        print(f"run folder: {self.folder}")
        if self.num_iterations == 1 or frames < args.learning_starts:
            print("note: the policy does not learn in so few frames, see --learning-starts.")
        self.bar = tqdm(total=frames, initial=self.global_step, unit="frames", unit_scale=True, mininterval=1)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        with suppress(OSError):  # on a full disk
            self.writer.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()

    def receive(self, number: int, frame: Any) -> None:
        """Notes a signal, to stop after the iteration, or in an evaluation at once; Ctrl-C then ends the process."""
        self.signals.append(signal.Signals(number))
        if signal.SIGINT in self.handlers:  # not SIGTERM, of which the end of a sweep may send several
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.evaluating:
            self.stop_if_signalled()

    def state_dict(self) -> dict[str, Any]:
        self.seconds = time.monotonic() - self.started
        cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        rngs = {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng}
        return {name: getattr(self, name) for name in self.SAVED} | rngs

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.SAVED:
            setattr(self, name, state[name])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])

    def restore(self) -> None:
        """Puts every part back to the last checkpoint."""
        saved, _ = load_saved(str(self.folder / "checkpoint.pt"))
        for name, part in {**self.stateful, "run": self}.items():
            part.load_state_dict(saved[name])
        if self.iteration >= self.num_iterations and (self.folder / "result.json").exists():
            fail(f"the run in {self.folder} is finished: give a larger --total-timesteps to continue it.")

    def write(self, name: str, data: dict[str, Any]) -> None:
        """A file of the run's folder, which takes the place of an earlier one only once it is whole and on the disk."""
        beside = self.folder / f"{name}.new"
        try:
            self.writer.flush()  # what precedes a checkpoint is not logged again
            with open(beside, "wb") as file:
                if name.endswith(".json"):
                    file.write(json.dumps(data, indent=2).encode())
                else:
                    torch.save(data, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.folder / name)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            beside.unlink(missing_ok=True)
            self.stop(f"{name} could not be written ({error.__context__ or error})")

    def save_checkpoint(self) -> None:
        (self.folder / "result.json").unlink(missing_ok=True)  # only a finished run has one
        parts = {name: part.state_dict() for name, part in {**self.stateful, "run": self}.items()}
        self.write("checkpoint.pt", self.origin | parts)

    def stop(self, what: str) -> NoReturn:
        """Ends the run with a sentence and exit status 1; what was logged and saved stays."""
        path = self.folder / "checkpoint.pt"
        last = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint"
        print(f"\nerror: {what}: the run was stopped after iteration {self.iteration}, {last}.", file=sys.stderr)
        raise SystemExit(1)

    def stop_if_signalled(self) -> None:
        """After a signal: writes a checkpoint and ends the run."""
        if self.signals:
            self.evaluating = False  # a further signal does not come in between
            how = "there is no checkpoint to continue from (--checkpoint-interval 0)."
            if self.args.checkpoint_interval:
                self.save_checkpoint()
                how = f"continue with\npython {self.script}.py --resume {shlex.quote(str(self.folder))}"
            self.bar.close()
            print(f"\nstopped by {self.signals[0].name} after iteration {self.iteration}: {how}", file=sys.stderr)
            raise SystemExit(128 + self.signals[0])

    def evaluate_if_due(self, agent: Agent, envs: MetaEpisodes) -> None:
        """Evaluates the agent and logs that, if it is due: every --eval-interval iterations, and at the end."""
        interval, last = self.args.eval_interval, self.iteration == self.num_iterations
        if not (last or (interval and self.iteration % interval == 0)):
            return
        self.bar.set_postfix_str("evaluating")
        self.evaluating = True  # from here on a signal stops the run at once, see receive
        self.stop_if_signalled()  # before, it did not
        self.evaluations = evaluate_groups(agent, envs, self.args)
        self.evaluating = False
        for group, summary in self.evaluations.items():
            self.log({f"{group}/{name}": value["mean"] for name, value in summary.items()})
        self.eval_history.append((self.global_step, self.evaluations["eval"]["meta_episodic_return"]["mean"]))
        self.bar.write(f"{self.global_step:,} frames: {format_evaluations(self.evaluations)}")

    def log(self, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.global_step)

    def end_iteration(self, scalars: dict[str, float], finite: bool) -> None:
        """Logs; stops at what is not finite; writes a checkpoint where one is due, or a signal has come."""
        for name, value in scalars.items():
            if not math.isfinite(value):
                self.stop(f"{name} is not finite")
        if not finite:
            self.stop("the agent is not finite")
        self.iteration += 1
        self.global_step += self.batch_size
        envs = self.stateful["envs"]
        if finished := envs.take_finished():
            summary = {name: value["mean"] for name, value in summarize(finished).items()}
            self.meta_return = summary["meta_episodic_return"]
            summary["episodic_return"] = self.meta_return / self.args.episodes_per_task
            scalars |= {f"charts/{name}": value for name, value in summary.items()}
        seconds = time.monotonic() - self.started
        scalars |= {"charts/blow_ups": envs.blow_ups, "charts/SPS": int(self.global_step / seconds)}
        self.scalars = scalars
        self.log(scalars)
        self.stop_if_signalled()
        interval, last = self.args.checkpoint_interval, self.iteration == self.num_iterations
        if interval and (last or self.iteration % interval == 0):
            self.save_checkpoint()
        self.bar.set_postfix_str(f"training return {self.meta_return:.2f}", refresh=False)
        self.bar.update(self.batch_size)

    def save_result(self) -> None:
        """Writes model.pt (--save-model) and result.json, which says that the run is finished; says what to do next."""
        args, agent, envs = self.args, self.stateful["agent"], self.stateful["envs"]
        seconds = time.monotonic() - self.started
        if args.save_model:
            self.write("model.pt", self.origin | {"agent": agent.state_dict()})
        result = {
            "frames": self.global_step,
            "wall_time": seconds,
            "SPS": self.global_step / seconds,
            "parameters": parameter_counts(agent),
            "blow_ups": envs.blow_ups,
            "evaluation": self.evaluations["eval"],
            "test_evaluation": self.evaluations.get("test"),  # on Meta-World
            "class_evaluations": {group: summary for group, summary in self.evaluations.items() if "/" in group},
            "eval_history": self.eval_history,
        }
        self.write("result.json", self.origin | result)
        self.bar.close()
        best, grid = "", (args.grid_size, args.grid_horizon, args.episodes_per_task)
        if args.env == "Grid-World" and grid == (5, 15, 4):
            best = f", Bayes-optimal {GRID_WORLD_BEST[args.grid_goals]:.2f}"
        folder = shlex.quote(str(self.folder))
        print(f"finished: {format_evaluations(self.evaluations)}{best}\nlook: tensorboard --logdir {folder}")
        if args.save_model or args.checkpoint_interval:
            show = "--video agent.gif" if vars(args).get("embedding") == "one-hot" else "--picture belief.png"
            print(f"      python show.py {folder} {show}")
            print(f"      python {self.script}.py --evaluate {folder}")


def start_tracking(args: Args, folder: Path) -> None:
    """Weights & Biases receives what TensorBoard's writer is given from here on; a resumed run continues in its own."""
    import wandb

    names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name, "id": folder.name}
    try:
        wandb.init(**names, resume="allow", config=asdict(args), dir=str(folder), sync_tensorboard=True)
    except wandb.errors.Error as error:  # not logged in, no connection
        fail(f"--track: {error} Or set WANDB_MODE=offline, or leave --track out.")


if __name__ == "__main__":
    threading.excepthook = lambda failure: None  # TensorBoard's thread hands a full disk on to main
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of the output has gone, as in `--help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
        raise SystemExit(1) from None
    except (OSError, MemoryError) as error:  # a full disk, a folder that went away, a worker that died
        how = "once that is fixed, a run that has a checkpoint continues with --resume"
        print(f"\nerror: {error}: stopped; {how}.", file=sys.stderr)
        raise SystemExit(1) from None
