"""rl2_hyper.py's recurrent update, and its memory over rollouts, against loops of single steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rl2_hyper import Agent, Args, Encoder, main, parse_args

torch.set_num_threads(1)
T, B, D, A = 12, 4, 3, 2


def small_encoder():
    torch.manual_seed(0)
    args = Args(gru_hidden=6, latent_dim=5, action_embedding=2, state_embedding=3, reward_embedding=2)
    return Encoder(D, A, args).double()


def step_by_step(encoder, actions, next_obs, rewards, cleared, hidden):
    """The states before each step, by torch's GRU equations, one environment and one step at a time."""
    columns = []
    for b in range(hidden.shape[0]):
        h, states = hidden[b], []
        for t in range(len(rewards)):
            states.append(h)
            x = encoder.inputs(actions[t, b], next_obs[t, b], rewards[t, b])
            gates_x = encoder.gru.weight_ih_l0 @ x + encoder.gru.bias_ih_l0
            gates_h = encoder.gru.weight_hh_l0 @ h + encoder.gru.bias_hh_l0
            (reset_x, update_x, new_x), (reset_h, update_h, new_h) = gates_x.chunk(3), gates_h.chunk(3)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            h = (1 - update) * new + update * h
            if cleared[t, b]:
                h = torch.zeros_like(h)
        columns.append(torch.stack(states))
    return torch.stack(columns, dim=1)  # [T, B, H]


CLEARS = {  # steps after which the memory of environment b is cleared
    "none": {},
    "all at once": {0: [5], 1: [5], 2: [5], 3: [5]},
    "each at its own time": {0: [2, 7], 1: [3], 3: [2, 3, 9]},
    "at the first and the last step": {0: [0], 1: [T - 1], 2: [0, T - 1]},
    "at every step": {b: list(range(T)) for b in range(B)},
}


@pytest.mark.parametrize("clears", CLEARS.values(), ids=CLEARS.keys())
def test_unroll_is_a_loop_of_steps(clears):
    """Values and gradients, with respect to the encoder and to the first state."""
    encoder = small_encoder()
    inputs = [torch.randn(T, B, size, dtype=torch.float64) for size in (A, D, 1)]
    hidden = torch.randn(B, 6, dtype=torch.float64, requires_grad=True)
    cleared = torch.zeros(T, B)
    for b, steps in clears.items():
        cleared[steps, b] = 1
    weights = torch.randn(T, B, 6, dtype=torch.float64)
    leaves = [hidden, *encoder.gru.parameters(), *encoder.embeddings.parameters()]
    fast, slow = encoder.unroll(*inputs, cleared, hidden), step_by_step(encoder, *inputs, cleared, hidden)
    assert_close(fast, slow)
    for out in (fast, slow):  # backward through both, the second with the opposite sign: the gradients cancel
        ((out * weights).sum() * (1 if out is fast else -1)).backward()
        if out is fast:
            assert hidden.grad.abs().max() > 0
    for leaf in leaves:
        assert leaf.grad is None or leaf.grad.abs().max() < 1e-10


def test_one_gru_call_per_stretch(monkeypatch):
    encoder, calls = small_encoder(), []
    forward = encoder.gru.forward
    monkeypatch.setattr(encoder.gru, "forward", lambda x, h: calls.append(len(x)) or forward(x, h))
    inputs = [torch.randn(T, B, size, dtype=torch.float64) for size in (A, D, 1)]
    cleared = torch.zeros(T, B)
    cleared[[2, 2, 7, T - 1], [0, 3, 1, 2]] = 1
    encoder.unroll(*inputs, cleared, torch.zeros(B, 6, dtype=torch.float64))
    assert calls == [3, 5, 4]  # after the last step nothing follows in this rollout


def test_embedding_is_relu_of_a_linear_map_and_acting_equals_encoding():
    """The agent's own steps, with beliefs cleared at a task's end, are what unroll computes again."""
    torch.manual_seed(0)
    envs = SimpleNamespace(obs_dim=D, action_dim=A, discrete=False, num_envs=B)
    agent = Agent(envs, Args(gru_hidden=6, latent_dim=5, action_embedding=2))
    actions, next_obs, rewards = torch.randn(T, B, A), torch.randn(T, B, D), torch.randn(T, B)
    cleared = (torch.rand(T, B) < 0.3).float()
    belief = agent.initial_belief(envs)
    assert belief.shape == (B, 6) and not belief.any()
    beliefs = []
    for t in range(T):
        beliefs.append(belief)
        belief = agent.update_belief(belief, actions[t], next_obs[t], rewards[t])
        belief = torch.where(cleared[t, :, None] > 0, agent.initial_belief(envs), belief)
    again = agent.encoder.unroll(actions, next_obs, rewards[..., None], cleared, agent.initial_belief(envs))
    assert_close(again, torch.stack(beliefs))
    output = agent.encoder.output
    assert_close(agent.embedding(again), torch.clamp(again @ output.weight.T + output.bias, min=0))


def test_update_begins_where_the_rollout_began(tmp_path, monkeypatch):
    """The first state of every re-encoding is the belief that the last rollout ended with, whole environments at a
    time, and the memory is cleared where tasks end (Grid-World: after 60 steps), not where episodes do (15)."""
    unrolls, carried = [], []
    unroll, update = Encoder.unroll, Agent.update_belief

    def recording_unroll(self, actions, next_obs, rewards, cleared, hidden):
        unrolls.append((hidden.clone(), cleared.clone(), len(actions)))
        return unroll(self, actions, next_obs, rewards, cleared, hidden)

    def recording_update(self, belief, *inputs):
        if len(belief) == 4:  # not the evaluation's
            carried.append(belief.clone())  # before every step
        return update(self, belief, *inputs)

    monkeypatch.setattr(Encoder, "unroll", recording_unroll)
    monkeypatch.setattr(Agent, "update_belief", recording_update)
    flags = "--num-envs 4 --num-minibatches 2 --update-epochs 1 --num-steps 37 --total-timesteps 740 --no-cuda"
    main(parse_args([*flags.split(), "--learning-starts", "0", "--eval-interval", "0", "--runs-dir", str(tmp_path)]))
    assert len(unrolls) == 8 and len(carried) == 5 * 37  # 4 updates of 2 minibatches
    for i in range(4):
        first_beliefs = carried[37 * (i + 1)]  # before the first step of rollout i + 2
        rows = torch.cat([unrolls[2 * i][0], unrolls[2 * i + 1][0]])
        distances = torch.cdist(rows, first_beliefs)
        assert sorted(distances.argmin(1).tolist()) == [0, 1, 2, 3]  # a permutation of the environments
        assert distances.min(1).values.max() == 0
        for _, cleared, steps in unrolls[2 * i : 2 * i + 2]:
            first_frame = 37 * (i + 1)
            ends = [t for t in range(steps) if (first_frame + t + 1) % 60 == 0]
            assert cleared.shape == (37, 2)
            np.testing.assert_array_equal(np.unique(cleared.nonzero()[:, 0].numpy()), ends)
