"""--embedding one-hot: the true task instead of the inferred one, which is the paper's upper bound."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import varibad_hyper
from varibad_hyper import (
    Agent,
    MetaEpisodes,
    load_agent,
    main,
    make_args,
    make_envs,
    parse_args,
    policy_loss,
    value_loss,
)

torch.set_num_threads(1)
NUM_TASKS, D, A = 4, 3, 5


class SeparatePolicies(nn.Module):
    """An actor and a critic for every task, sharing nothing; row b of the batch belongs to task argmax embedding[b]."""

    def __init__(self, stacks_of_actor, stacks_of_critic):
        super().__init__()
        self.actors = nn.ModuleList(self.network(stacks_of_actor, i) for i in range(NUM_TASKS))
        self.critics = nn.ModuleList(self.network(stacks_of_critic, i) for i in range(NUM_TASKS))

    @staticmethod
    def network(stacks, task):
        layers = []
        for stack in stacks:
            layer = nn.Linear(*stack.weight.shape[:0:-1]).double()
            layer.weight.data.copy_(stack.weight[task])
            layer.bias.data.copy_(stack.bias[task, :, 0])
            layers += [layer, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def forward(self, obs, embedding):
        task = embedding.argmax(dim=1)
        outputs, values = torch.zeros(len(obs), A).double(), torch.zeros(len(obs)).double()
        for i in range(NUM_TASKS):
            outputs[task == i] = self.actors[i](obs[task == i])
            values[task == i] = self.critics[i](obs[task == i])[:, 0]
        return outputs, values


def make_agent(discrete, **changes):
    torch.manual_seed(0)
    args = make_args(embedding="one-hot", state_features=0, base_layers=(6, 7), **changes)
    envs = SimpleNamespace(obs_dim=D, action_dim=A, discrete=discrete, all_tasks=np.zeros((NUM_TASKS, 2)))
    return Agent(envs, args).double()


def train(agent, updates=6, batch=24):
    """A few PPO updates, with the script's losses, on batches in which not every task occurs."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(agent.policy.parameters(), lr=1e-2)
    for i in range(updates):
        tasks = torch.randint(NUM_TASKS - i % 2, (batch,))
        obs, embedding = torch.randn(batch, D).double(), torch.eye(NUM_TASKS).double()[tasks]
        action = torch.randint(A, (batch,)) if agent.discrete else torch.randn(batch, A).double()
        old, advantages, returns = torch.randn(3, batch).double()
        dist, value = agent(obs, embedding)
        logprob = dist.log_prob(action)
        logratio = logprob - logprob.detach() + 0.01 * old
        loss = policy_loss(logratio, advantages, 0.05) + 0.5 * value_loss(value, value.detach(), returns, 0.05)
        optimizer.zero_grad()
        (loss - 0.01 * dist.entropy().mean()).backward()
        nn.utils.clip_grad_norm_(agent.policy.parameters(), 0.5)
        optimizer.step()


@pytest.mark.parametrize("discrete", [True, False])
def test_a_linear_hypernetwork_without_bias_is_a_policy_per_task(discrete):
    """Section 4.1 of the paper: from the same draws, the same parameters after training, slice by slice."""
    hyper, separate = (make_agent(discrete, init="weight", hyper_bias=False) for _ in range(2))
    policies = SeparatePolicies(separate.policy.actor, separate.policy.critic)
    policies.log_std = None if discrete else nn.Parameter(torch.zeros(A).double())
    separate.policy = policies
    before = [stack.weight.clone() for stack in (*hyper.policy.actor, *hyper.policy.critic)]
    train(hyper)
    train(separate)
    for nets, stacks in ((policies.actors, hyper.policy.actor), (policies.critics, hyper.policy.critic)):
        for task, net in enumerate(nets):
            for layer, stack in zip(net[::2], stacks, strict=True):
                assert_close(stack.weight[task], layer.weight)
                assert_close(stack.bias[task, :, 0], layer.bias)
    if not discrete:
        assert policies.log_std.all() and policies.log_std.abs().max() > 0.01  # it has learned
        assert_close(hyper.policy.log_std, policies.log_std)
    for old, stack in zip(before, (*hyper.policy.actor, *hyper.policy.critic), strict=True):
        assert ((stack.weight - old)[:-1].flatten(1).abs().max(dim=1).values > 1e-3).all()  # every task has learned
        assert not stack.weight[-1].any() and not stack.bias[-1].any()  # and there is no bias


def test_with_a_bias_it_is_not():
    """What tells the forms apart: parameters that all tasks share."""
    agent = make_agent(True, init="weight")
    train(agent)
    assert agent.policy.actor[0].weight[-1].any()


@pytest.mark.parametrize("env", ["Grid-World", "Cheetah-Dir"])
def test_beliefs_are_the_present_tasks(env):
    args = parse_args(["--env", env, "--embedding", "one-hot"])
    envs = make_envs(args, 5)
    agent = Agent(envs, args)
    envs.reset(seed=3)
    for _ in range(3):
        belief = agent.initial_belief(envs)
        assert belief.shape == (5, len(envs.all_tasks))
        for row, task in zip(agent.embedding(belief), envs.envs.tasks, strict=True):
            assert row.sum() == 1 and (envs.all_tasks[row.argmax()] == task).all()
        envs.envs.reset()  # draws new tasks
    np.testing.assert_array_equal(agent.update_belief(belief, None, None, None), belief)


def test_the_policy_is_given_the_present_task(tmp_path, monkeypatch):
    """Also where a task ends within a rollout: of 37 steps here, and of 60 a task."""
    tasks, rollouts, step, gae = [], [], MetaEpisodes.step, varibad_hyper.compute_gae
    monkeypatch.setattr(MetaEpisodes, "step", lambda self, a: tasks.append(self.envs.tasks.copy()) or step(self, a))
    monkeypatch.setattr(
        varibad_hyper, "compute_gae", lambda *inputs: rollouts.append(inputs[1].embeddings) or gae(*inputs)
    )
    for name in ("evaluate_if_due", "save_result"):
        monkeypatch.setattr(varibad_hyper.Run, name, lambda *_: None)
    flags = "--embedding one-hot --num-envs 4 --num-steps 37 --num-minibatches 2 --learning-starts 0 --no-cuda"
    main(parse_args([*flags.split(), "--total-timesteps", "740", "--runs-dir", str(tmp_path)]))
    given = varibad_hyper.gridworld.goal_cells()[torch.cat(rollouts).argmax(-1)]  # the first iteration has no update
    np.testing.assert_array_equal(given, tasks[37:])
    assert len({task.tobytes() for task in tasks}) == 4


@pytest.mark.parametrize("flags", ["--init bias", "--init weight --no-hyper-bias", "--arch standard", "--arch film"])
def test_knowing_the_task_makes_it_better(tmp_path, monkeypatch, flags):
    """On the probe's 3x3 grid the upper bound is near the best possible return within a tenth of its frames."""
    command = f"{flags} --embedding one-hot --grid-size 3 --grid-horizon 8 --num-steps 32 --total-timesteps 3e4"
    command += f" --learning-starts 1000 --eval-interval 0 --save-model --no-cuda --runs-dir {tmp_path}"
    tasks = []
    step = MetaEpisodes.step
    monkeypatch.setattr(MetaEpisodes, "step", lambda self, a: tasks.append(self.envs.tasks.copy()) or step(self, a))
    folder = main(parse_args(command.split()))
    assert len({task.tobytes() for task in tasks}) > 50  # the tasks did change
    evaluation = json.loads((folder / "result.json").read_text())["evaluation"]
    best = 6.625  # of an episode, walking straight to the goal, mean over the 8 goals
    floor = 0.5 if flags == "--arch film" else 0.7  # FiLM learns more slowly
    assert evaluation["episodic_return_ep1"]["mean"] > floor * best  # no search is needed
    assert evaluation["episodic_return_ep1"]["mean"] == pytest.approx(evaluation["episodic_return_ep4"]["mean"])
    for path in folder, folder / "model.pt":
        agent, envs = load_agent(str(path))
        assert agent.vae is None and envs.num_envs == 8


def test_cheetah_runs_and_is_evaluated_on_both_directions(tmp_path):
    command = "--env Cheetah-Dir --embedding one-hot --num-envs 4 --num-steps 40 --total-timesteps 480 --eval-tasks 4"
    folder = main(parse_args([*command.split(), "--learning-starts", "0", "--runs-dir", str(tmp_path)]))
    result = json.loads((folder / "result.json").read_text())
    assert result["evaluation"]["meta_episodic_return"]["count"] == 4
    assert result["args"]["embedding"] == "one-hot"
    agent, envs = load_agent(str(folder))
    np.testing.assert_array_equal(np.unique(envs.all_tasks), [-1, 1])
    assert agent.initial_belief(envs).shape == (4, 2)
