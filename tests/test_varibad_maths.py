"""Tests of varibad_hyper.py's maths, networks, buffer and summaries, against slow plain loops or known answers.

Letters as in varibad_hyper.py: T steps, N environments, B batch, D observation, A action, L task embedding m, K
hypernetwork features; E and J the steps and the transitions that the ELBO takes. Where nothing else is said the numbers
are float64, so that a fast and a slow sum agree to 1e-10.
"""

import math
from collections import Counter
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import varibad_hyper
from hyperinit import FilmLinear, HyperLinear
from varibad_hyper import (
    VAE,
    Agent,
    Args,
    Batch,
    CellDecoder,
    Decoder,
    Encoder,
    MetaEpisode,
    MetaEpisodeBuffer,
    MetaEpisodes,
    Rollout,
    RunningMeanStd,
    compute_gae,
    consecutive_kl,
    elbo_loss,
    parameter_counts,
    policy_loss,
    subsample,
    summarize,
    value_loss,
)

torch.set_num_threads(1)  # the tensors here are too small for more

exactly = partial(assert_close, rtol=0, atol=0)
closely = partial(assert_close, rtol=1e-10, atol=1e-10)  # float64 up to the order of summation

D, A = 3, 5  # of every environment here; Grid-World's observation is (x, y, flag)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small_args(**changes):
    """Args of networks small enough for loops, with no two widths alike that could be mistaken for each other."""
    sizes = {"latent_dim": 2, "gru_hidden": 4, "state_embedding": 3, "reward_embedding": 2, "decoder_layers": (6, 5)}
    sizes |= {"state_features": 4, "embedding_features": 3, "base_layers": (7, 6)}
    return Args(**sizes | changes)


def random_(module):
    """The module with parameters from N(0, 0.5^2), in float64."""
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# PPO


def estimated(values, dones, final_values):
    """What compute_gae reads of a rollout."""
    nothing = dict.fromkeys(Rollout._fields)
    return Rollout(**nothing | {"values": values, "dones": dones, "final_values": final_values})


def test_gae_by_hand():
    """Two environments that end after step 1: at a time limit, the last observation's value being 4, and truly."""
    rewards = torch.tensor([[1.0, 1], [2, 2], [3, 3]])
    values = torch.tensor([[0.5, 0.5], [1, 1], [1.5, 1.5]])
    dones = torch.tensor([[0.0, 0], [1, 1], [0, 0]])
    final_values = torch.tensor([[0.0, 0], [4, 0], [0, 0]])
    # deltas: 1 + 0.5 - 0.5 = 1; 2 + 2 - 1 = 3 or 2 + 0 - 1 = 1; 3 + 1 - 1.5 = 2.5; the trace is 0.25
    expected = torch.tensor([[1.75, 1.25], [3, 1], [2.5, 2.5]])
    exactly(compute_gae(rewards, estimated(values, dones, final_values), torch.tensor([2.0, 2]), 0.5, 0.5), expected)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.8), (0.97, 0.0), (1.0, 1.0)])
def test_gae_is_the_sum_of_its_definition(gamma, gae_lambda):
    """Sum of (gamma lambda)^k delta up to the meta-episode's end; with gamma = lambda = 1, return minus value."""
    T, N = 12, 6
    rewards, values, next_value = randn(T, N), randn(T, N), randn(N)
    dones = (torch.rand(T, N) < 0.25).double()
    dones[:, 0], dones[-1, 1] = 0, 1  # one environment without an end, one that ends with the rollout
    final_values = randn(T, N) * dones * (torch.rand(T, N) < 0.5)  # at a time limit not 0, at a true end 0
    assert ((final_values != 0) & (dones == 1)).any() and ((final_values == 0) & (dones == 1)).any()
    advantages = compute_gae(rewards, estimated(values, dones, final_values), next_value, gamma, gae_lambda)

    for n in range(N):
        for t in range(T):
            advantage, total, weight = 0.0, 0.0, 1.0
            for k in range(t, T):
                following = values[k + 1, n] if k + 1 < T else next_value[n]
                following = final_values[k, n] if dones[k, n] else following
                advantage += weight * (rewards[k, n] + gamma * following - values[k, n])
                weight *= gamma * gae_lambda
                total += rewards[k, n]
                if dones[k, n]:
                    break
            closely(advantages[t, n], advantage)
            if gamma == gae_lambda == 1:
                closely(advantages[t, n], total + following - values[t, n])


def test_policy_loss():
    """Clipped only where the ratio left the interval in the advantage's favour; there the gradient is 0."""
    logratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.05, -0.05, 0.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -2, 2, -2, 3, -3, 1], dtype=torch.float64)
    loss = policy_loss(logratio, advantages, 0.1)
    loss.backward()

    total, gradient = 0.0, []
    for log_r, advantage in zip(logratio.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(log_r)
        clipped = (advantage > 0 and ratio > 1.1) or (advantage < 0 and ratio < 0.9)
        total -= advantage * (min(max(ratio, 0.9), 1.1) if clipped else ratio)
        gradient.append(0 if clipped else -advantage * ratio / 7)
    assert gradient.count(0) == 2
    closely(loss.item(), total / 7)
    closely(logratio.grad, torch.tensor(gradient, dtype=torch.float64))


def test_value_loss():
    """Half Huber's loss; where the clipped value is the worse one it counts instead, without a gradient."""
    newvalues = [0.05, 0.5, 0.5, -0.5, -0.5, 3.0, -3.0, 0.02]
    returns = [0.5, 0.7, 0.2, 1.0, -4.0, -1.0, 2.0, 0.0]  # |error| below and above 1, values in and out of the interval
    new = torch.tensor(newvalues, dtype=torch.float64, requires_grad=True)
    old = 0.01 * torch.arange(8, dtype=torch.float64)
    loss = value_loss(new, old, torch.tensor(returns, dtype=torch.float64), 0.1)
    loss.backward()

    def huber(error):
        return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5

    total, gradient = 0.0, []
    for value, before, target in zip(newvalues, old.tolist(), returns, strict=True):
        clipped = min(max(value, before - 0.1), before + 0.1)
        total += 0.5 * max(huber(value - target), huber(clipped - target))
        held = huber(clipped - target) > huber(value - target) + 1e-12
        gradient.append(0 if held else 0.5 * min(max(value - target, -1), 1) / 8)
    assert gradient.count(0) == 2
    closely(loss.item(), total / 8)
    closely(new.grad, torch.tensor(gradient, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# ELBO


def test_consecutive_kl():
    mean, logvar = randn(6, 3, 4), randn(6, 3, 4)  # [T+1, B, L]
    kl = consecutive_kl(mean, logvar)
    assert kl.shape == (6, 3)
    for t in range(6):
        before = Normal(mean[t - 1], (logvar[t - 1] / 2).exp()) if t else Normal(0.0, 1.0)
        closely(kl[t], kl_divergence(Normal(mean[t], (logvar[t] / 2).exp()), before).sum(-1))
        for b in range(3):
            total = 0.0
            for i in range(4):
                mu, sigma = mean[t, b, i].item(), math.exp(logvar[t, b, i] / 2)
                mu_0, sigma_0 = (mean[t - 1, b, i].item(), math.exp(logvar[t - 1, b, i] / 2)) if t else (0, 1)
                total += math.log(sigma_0 / sigma) + (sigma**2 + (mu - mu_0) ** 2) / (2 * sigma_0**2) - 0.5
            closely(kl[t, b].item(), total)


def test_policy_change_by_hand():
    """r - 1 - log r, which is never negative; ratios of 1, 1.22, 0.82 and 1.04, of which two leave 1 +- 0.1."""
    logratio = torch.tensor([0.0, 0.2, -0.2, 0.04], dtype=torch.float64)
    change = varibad_hyper.policy_change(logratio, 0.1)
    expected = sum(math.exp(x) - 1 - x for x in logratio.tolist()) / 4
    assert change["approx_kl"].item() == pytest.approx(expected)
    assert change["clipfrac"].item() == 0.5


def test_subsample_draws_without_replacement_and_masks_what_is_missing():
    lengths = torch.tensor([0, 1, 2, 3, 4, 7, 8])
    for _ in range(50):
        positions, mask = subsample(lengths, 8, 3)
        assert positions.shape == mask.shape == (3, 7)
        for b, length in enumerate(lengths.tolist()):
            column = positions[:, b].tolist()
            assert len(set(column)) == 3 and 0 <= min(column) and max(column) < 8
            assert mask[:, b].tolist() == [float(position < length) for position in column]
            assert mask[:, b].sum() == min(3, length)  # all valid where there are enough


@pytest.mark.parametrize("limit", [0, 8, 9])
def test_subsample_without_a_limit_is_everything(limit):
    positions, mask = subsample(torch.tensor([8, 5, 0]), 8, limit)
    for b, length in enumerate([8, 5, 0]):
        assert positions[:, b].tolist() == list(range(8))
        assert mask[:, b].tolist() == [1.0] * length + [0.0] * (8 - length)


def test_subsample_is_uniform_and_independent_between_columns():
    """Each of the 20 triples of 6 positions comes up equally often, and neighbouring columns agree by chance only."""
    columns = 20_000
    positions, _ = subsample(torch.full((columns,), 6), 8, 3)
    triples = [tuple(sorted(column)) for column in positions.T.tolist()]
    counts = Counter(triples)
    assert len(counts) == math.comb(6, 3)
    sigma = math.sqrt(columns * 0.05 * 0.95)
    assert max(abs(count - columns / 20) for count in counts.values()) < 5 * sigma
    assert abs(sum(a == b for a, b in pairwise(triples)) - columns / 20) < 5 * sigma


ELBO_CASES = {
    "grid": {"env": "Grid-World"},
    "reward": {"env": "Ant-Dir", "action_embedding": 2},
    "state": {"env": "Ant-Dir", "action_embedding": 2, "decode_reward": False, "decode_state": True},
    "both": {"env": "Ant-Dir", "decode_state": True},
}
elbo_cases = pytest.mark.parametrize("case", ELBO_CASES.values(), ids=ELBO_CASES)


def random_batch(env, lengths=(5, 3, 1, 4)):
    """Meta-episodes of these lengths; beyond their ends there are random numbers as well, on Grid-World legal cells."""
    T, B = max(lengths), len(lengths)
    obs, next_obs, actions, rewards = randn(T, B, D), randn(T, B, D), randn(T, B, A), randn(T, B, 1)
    if env == "Grid-World":
        obs, next_obs = (torch.cat([torch.randint(5, (T, B, 2)), torch.randint(2, (T, B, 1))], -1) for _ in range(2))
        actions = F.one_hot(torch.randint(A, (T, B)), A)
        rewards = torch.where(torch.rand(T, B, 1) < 0.4, 1.0, -0.1)
    return Batch(obs.double(), actions.double(), rewards.double(), next_obs.double(), torch.tensor(lengths))


def slow_prediction(decoder, *inputs):
    """A decoder as an ordinary MLP on the concatenation of its inputs: ReLU after every layer but the last."""
    *hidden, last = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in hidden] == [6, 5]
    x = torch.cat(inputs)
    for layer in hidden:
        x = layer(x).clamp(min=0)
    return last(x)


def losses_of(*inputs):
    """elbo_loss's loss among its parts."""
    loss, parts = elbo_loss(*inputs)
    return parts | {"elbo_loss": loss}


def slow_elbo(vae, batch, noise, kl_weight, steps, transitions):
    """elbo_loss term by term: each meta-episode encoded alone, one (m, transition) decoded at a time.

    `steps` and `transitions` list, for each meta-episode, the t and the transitions that count.
    """
    sums = {"kl": 0.0}
    sums |= {"reward_loss": 0.0} if vae.reward_decoder else {}
    sums |= {"state_loss": 0.0} if vae.state_decoder else {}
    for b, length in enumerate(batch.lengths.tolist()):
        obs, actions, rewards, next_obs = (x[:length, b] for x in batch[:4])  # [length, .]
        latents = vae.encoder(actions[:, None], next_obs[:, None], rewards[:, None])[:, 0]  # [length+1, 2L]
        posteriors = [Normal(latent[:2], (latent[2:] / 2).exp()) for latent in latents]
        for t in steps[b]:
            prior = posteriors[t - 1] if t else Normal(0.0, 1.0)
            sums["kl"] += kl_divergence(posteriors[t], prior).sum()
            m = posteriors[t].mean + posteriors[t].stddev * noise[t, b]  # [L]
            for j in transitions[b]:
                if isinstance(vae.reward_decoder, CellDecoder):
                    x, y, _ = next_obs[j].tolist()
                    logit = slow_prediction(vae.reward_decoder, m)[int(5 * x + y)]
                    sums["reward_loss"] -= F.logsigmoid(logit if rewards[j] == 1 else -logit)
                elif vae.reward_decoder is not None:
                    prediction = slow_prediction(vae.reward_decoder, m, next_obs[j], obs[j], actions[j])
                    sums["reward_loss"] += (prediction[0] - rewards[j, 0]) ** 2
                if vae.state_decoder is not None:
                    prediction = slow_prediction(vae.state_decoder, m, obs[j], actions[j])
                    sums["state_loss"] += sum((prediction[i] - next_obs[j, i]) ** 2 for i in range(D)) / D
    parts = {name: total / len(batch.lengths) for name, total in sums.items()}
    reconstruction = sum(value for name, value in parts.items() if name != "kl")
    return parts | {"elbo_loss": reconstruction + kl_weight * parts["kl"]}


@pytest.fixture
def noise(monkeypatch):
    """Makes torch.randn_like in elbo_loss return the tensor given to it."""

    def use(noise):
        def randn_like(x):
            assert x.shape == noise.shape
            return noise

        monkeypatch.setattr(varibad_hyper.torch, "randn_like", randn_like)
        return noise

    return use


@elbo_cases
@pytest.mark.parametrize("limit", [0, 2, 5])
def test_elbo_is_the_triple_sum(case, limit, noise, monkeypatch):
    """Value, parts and gradients equal those of the triple loop over meta-episode, t and transition."""
    vae, batch = random_(VAE(D, A, small_args(**case))), random_batch(case["env"])
    eps = noise(randn(6, 4, 2))
    drawn = {}

    def spy(lengths, size, limit):
        positions, mask = subsample(lengths, size, limit)
        assert size not in drawn
        drawn[size] = [positions[mask[:, b] > 0, b].tolist() for b in range(len(lengths))]
        return positions, mask

    monkeypatch.setattr(varibad_hyper, "subsample", spy)
    fast = losses_of(vae, batch, limit, 0.3)
    steps, transitions = drawn[6], drawn[5]  # from 0 .. T and from the T transitions
    for b, length in enumerate(batch.lengths.tolist()):
        assert len(steps[b]) == min(limit or 6, length + 1) and len(transitions[b]) == min(limit or 5, length)
    slow = slow_elbo(vae, batch, eps, 0.3, steps, transitions)
    assert set(fast) == set(slow) and len(fast) == 2 + case.get("decode_reward", True) + case.get("decode_state", False)
    closely(fast, slow)
    parameters = list(vae.parameters())
    closely(torch.autograd.grad(fast["elbo_loss"], parameters), torch.autograd.grad(slow["elbo_loss"], parameters))


@elbo_cases
@pytest.mark.parametrize("limit", [0, 3])
def test_elbo_ignores_what_lies_beyond_the_end(case, limit):
    vae, batch, other = random_(VAE(D, A, small_args(**case))), random_batch(case["env"]), random_batch(case["env"])
    inside = torch.arange(5)[:, None, None] < batch.lengths[:, None]  # [T, B, 1]
    scale = 1 if case["env"] == "Grid-World" else 100
    padded = Batch(*(torch.where(inside, x, scale * y) for x, y in zip(batch[:4], other[:4], strict=True)), batch[4])
    results = []
    for meta_episodes in (batch, padded):
        torch.manual_seed(1)
        losses = losses_of(vae, meta_episodes, limit, 0.3)
        results.append((losses, torch.autograd.grad(losses["elbo_loss"], list(vae.parameters()))))
    assert not torch.equal(batch.next_obs, padded.next_obs)
    closely(*results)


def test_elbo_samples_m_afresh():
    """The noise is drawn: two calls differ in the reconstruction, and not in the KL."""
    vae, batch = random_(VAE(D, A, small_args())), random_batch("Grid-World")
    first, second = (losses_of(vae, batch, 0, 0.3) for _ in range(2))
    assert first["reward_loss"] != second["reward_loss"]
    exactly(first["kl"], second["kl"])


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("target", ["reward", "state"])
def test_decoder_is_an_mlp_on_every_pair(target):
    """The split first layer equals the plain one on concatenated inputs, for every m with every transition."""
    decoder = random_(Decoder(target, D, A, small_args()))
    m, obs, actions, rewards, next_obs = randn(3, 2, 2), randn(4, 2, D), randn(4, 2, A), randn(4, 2, 1), randn(4, 2, D)
    parts = (next_obs, obs, actions) if target == "reward" else (obs, actions)
    predictions = decoder(m, torch.cat(parts, dim=-1))
    mask = torch.tensor([[1.0, 0], [1, 0], [0, 0], [1, 1]])  # [J, B]
    errors = decoder.errors(m, Batch(obs, actions, rewards, next_obs, None), mask)
    truth = rewards if target == "reward" else next_obs
    assert predictions.shape == (3, 4, 2, truth.shape[-1]) and errors.shape == (3, 2)
    expected_errors = torch.zeros(3, 2, dtype=torch.float64)
    for e, j, b in np.ndindex(3, 4, 2):
        expected = slow_prediction(decoder, m[e, b], *(part[j, b] for part in parts))
        closely(predictions[e, j, b], expected)
        if mask[j, b]:
            expected_errors[e, b] += (sum((expected - truth[j, b]) ** 2) / len(expected)).item()
    closely(errors.detach(), expected_errors)


@pytest.mark.parametrize("size", [5, 6])
def test_cell_decoder_picks_the_cell_that_was_entered(size):
    """With logits 0, 1, 2, ...: softplus(-+ (size x + y)), minus where the reward was 1 and nowhere else."""
    decoder = CellDecoder(small_args(grid_size=size))
    assert decoder(torch.zeros(2, 3, 2)).shape == (2, 3, size**2)
    nn.init.zeros_(decoder.double().net[-1].weight)
    decoder.net[-1].bias.data = torch.arange(float(size**2)).double()
    next_obs = torch.tensor([[[0.0, 0, 0]], [[0, 3, 1]], [[3, 0, 0]], [[4, 4, 0]], [[3, 0, 1]]])
    rewards = torch.tensor([1, -0.1, 1, -0.1, 0.99])[:, None, None]
    obs, actions = torch.randint(5, (5, 1, 3)).float(), torch.zeros(5, 1, A)
    logits = (-0, 3, -3 * size, 4 * size + 4, 3 * size)
    expected = torch.tensor([math.log1p(math.exp(z)) for z in logits], dtype=torch.float64)
    steps = Batch(obs, actions, rewards, next_obs, None)
    for mask in (*torch.eye(5), torch.ones(5), torch.zeros(5), torch.tensor([0.0, 1, 1, 0, 1])):
        errors = decoder.errors(torch.zeros(2, 1, 2).double(), steps, mask[:, None])
        closely(errors, (expected * mask).sum().expand(2, 1))


def errors_of_every_pair(decoder, m, steps, mask):
    """CellDecoder.errors as the definition has it: a binary cross-entropy for every m with every transition, alone."""
    logits = decoder(m)
    errors = [[torch.zeros((), dtype=m.dtype) for _ in range(m.shape[1])] for _ in m]
    for e, j, b in np.ndindex(len(m), *mask.shape):
        if mask[j, b]:
            x, y, _ = steps.next_obs[j, b].tolist()
            target = (steps.rewards[j, b, 0] == 1).to(m.dtype)
            error = F.binary_cross_entropy_with_logits(logits[e, b, int(decoder.size * x + y)], target)
            errors[e][b] = errors[e][b] + error
    return torch.stack([torch.stack(row) for row in errors])


@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize("limit", [0, 9, 50])
def test_elbo_by_visit_counts_is_that_of_every_pair(limit, size, monkeypatch):
    """On Grid-World, where cells are entered again and again: meta-episodes of several lengths, subsampled or not."""
    vae, lengths = random_(VAE(D, A, small_args(grid_size=size))), (60, 1, 33, 48)
    batch = random_batch("Grid-World", lengths)
    results = []
    for errors in (CellDecoder.errors, errors_of_every_pair):
        monkeypatch.setattr(CellDecoder, "errors", errors)
        torch.manual_seed(1)
        losses = losses_of(vae, batch, limit, 0.3)
        results.append((losses, torch.autograd.grad(losses["elbo_loss"], list(vae.parameters()))))
    assert results[0][0]["reward_loss"] > 10
    closely(*results)


@pytest.mark.parametrize("action_embedding", [0, 2])
def test_encoder_is_a_gru_on_relu_embeddings(action_embedding):
    encoder = random_(Encoder(D, A, small_args(action_embedding=action_embedding)))
    actions, next_obs, rewards = randn(6, 3, A), randn(6, 3, D), randn(6, 3, 1)
    cell = nn.GRUCell(encoder.gru.input_size, 4).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in encoder.gru.state_dict().items()})
    hiddens = [torch.zeros(3, 4, dtype=torch.float64)]
    for t in range(6):
        steps = (actions[t], next_obs[t], rewards[t])
        embedded = [layer(x).clamp(min=0) for layer, x in zip(encoder.embeddings, steps, strict=True) if layer]
        hiddens.append(cell(torch.cat(embedded, dim=1), hiddens[-1]))
    assert len(embedded) == (3 if action_embedding else 2)
    closely(encoder.encode(actions, next_obs, rewards), torch.stack(hiddens))
    closely(encoder.hiddens(actions[2:], next_obs[2:], rewards[2:], hiddens[2]), torch.stack(hiddens[3:]))

    latents = encoder(actions, next_obs, rewards)
    closely(latents, torch.stack([F.linear(h, encoder.posterior.weight, encoder.posterior.bias) for h in hiddens]))
    closely(latents[0], encoder.posterior.bias.expand(3, 4))  # the prior
    closely(encoder(actions[:0], next_obs[:0], rewards[:0]), latents[:1])

    other = encoder(randn(6, 3, A), next_obs, rewards)
    assert torch.equal(other, latents) if not action_embedding else not torch.equal(other, latents)


def test_last_hiddens_are_those_at_the_meta_episodes_ends():
    """Of a batch with padding, the state after each meta-episode's own last step; zeros where none was played yet."""
    encoder, batch = random_(Encoder(D, A, small_args(action_embedding=2))), random_batch("Ant-Dir", (5, 0, 1, 4))
    hiddens = encoder.last_hiddens(batch)
    assert hiddens.shape == (4, 4)
    for b, length in enumerate(batch.lengths.tolist()):
        alone = (x[:length, b : b + 1] for x in (batch.actions, batch.next_obs, batch.rewards))
        closely(hiddens[b], encoder.encode(*alone)[-1, 0])
    exactly(hiddens[1], torch.zeros(4, dtype=torch.float64))
    nothing = Batch(*(x[:0] for x in batch[:4]), torch.zeros(4, dtype=int))
    exactly(encoder.last_hiddens(nothing), torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("discrete", [True, False])
def test_update_belief_steps_the_encoder(discrete):
    """update_belief step by step gives what one call gives on the whole sequence; discrete actions enter one-hot."""
    agent = make_agent(discrete=discrete, action_embedding=2)
    T, N = 7, 3
    actions = torch.randint(A, (T, N)) if discrete else torch.randn(T, N, A)
    next_obs, rewards = torch.randn(T, N, D), torch.randn(T, N)
    vectors = (actions[..., None] == torch.arange(A)).float() if discrete else actions
    beliefs = agent.vae.encoder.encode(vectors, next_obs, rewards[..., None])  # [T+1, N, H]
    belief = agent.initial_belief(SimpleNamespace(num_envs=N))
    exactly(beliefs[0], belief)
    for t in range(T):
        belief = agent.update_belief(belief, actions[t], next_obs[t], rewards[t])
        assert_close(belief, beliefs[t + 1])


def test_running_mean_std_is_that_of_all_data():
    norm, data = RunningMeanStd(4), torch.randn(500, 4) * torch.tensor([0.1, 1, 10, 3]) + torch.tensor([0.0, 5, -20, 1])
    data[300:] += 7  # the mean moves
    for start, end in pairwise([0, 1, 20, 300, 310, 500]):
        norm.update(data[start:end])
        assert_close(norm.mean, torch.from_numpy(data[:end].numpy().mean(0)), rtol=1e-4, atol=1e-4)
        assert_close(norm.var, torch.from_numpy(data[:end].numpy().var(0)), rtol=1e-4, atol=1e-4)
    assert norm.count == 500
    x = 60 * torch.randn(2, 3, 4)
    expected = ((x.numpy() - norm.mean.numpy()) / np.sqrt(norm.var.numpy() + 1e-8)).clip(-10, 10)
    assert (expected == 10).any() and (expected == -10).any() and (abs(expected) < 10).any()
    assert_close(norm(x), torch.from_numpy(expected))
    norm.count.fill_(2**30)
    norm.update(data[:1])
    assert norm.count.item() == 2**30 + 1  # a long run's count stays exact


def test_running_mean_std_begins_as_the_identity():
    x = torch.tensor([[-12.0, -1, 0, 1, 12]])
    assert_close(RunningMeanStd(5)(x), torch.tensor([[-10.0, -1, 0, 1, 10]]))


# ---------------------------------------------------------------------------------------------------------------------
# Policies


def make_agent(arch="hyper", discrete=True, **changes):
    envs = SimpleNamespace(obs_dim=D, action_dim=A, discrete=discrete)
    return Agent(envs, small_args(arch=arch, **changes))


def outputs(agent, obs, latent):
    """What the distribution is made of, the log-probabilities of all actions or the means, [B, A]; and values [B]."""
    dist, value = agent(obs, latent)
    return dist.logits if agent.discrete else dist.mean, value


def normalise(norm, x):
    return torch.max(torch.min((x - norm.mean) / (norm.var + 1e-8).sqrt(), torch.tensor(10)), torch.tensor(-10))


def slow_base_network(layers, inputs, x):
    """The tanh layers of one sample; those of a hypernetwork are materialised first for its features x [K]."""
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            weight, bias = layer.weight, layer.bias
        else:
            generate = lambda stack: sum(x[k] * stack[k] for k in range(len(x))) + stack[-1]  # noqa: E731
            if isinstance(layer, FilmLinear):
                weight, bias = generate(layer.scale) * layer.weight, generate(layer.shift)[:, 0]
            else:
                weight, bias = generate(layer.weight), generate(layer.bias)[:, 0]
        inputs = weight @ inputs + bias
        if i < len(layers) - 1:
            inputs = inputs.tanh()
    return inputs


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize(
    ("arch", "hyper_layers"), [("standard", ()), ("hyper", ()), ("hyper", (8,)), ("hyper", (8, 5)), ("film", (8,))]
)
def test_agent_is_a_base_network_per_sample(arch, hyper_layers, discrete):
    """Outputs on normalised, clipped inputs equal those of each sample's own tanh network."""
    agent = random_(make_agent(arch, discrete, hyper_layers=hyper_layers))
    agent.obs_norm.update(3 * randn(50, D) + 1)
    agent.latent_norm.update(2 * randn(50, 4) - 1)
    obs, latent = 3 * randn(6, D), 3 * randn(6, 4)
    obs[0, 0], obs[1, 2], latent[2, 3], latent[3, 0] = 100, -100, 100, -100  # so far out that they are clipped
    given, value = outputs(agent, obs, latent)
    assert given.shape == (6, A) and value.shape == (6,)

    policy = agent.policy
    layer_type = {"standard": nn.Linear, "hyper": HyperLinear, "film": FilmLinear}[arch]
    assert all(isinstance(layer, layer_type) for layer in [*policy.actor, *policy.critic])
    obs, latent = normalise(agent.obs_norm, obs), normalise(agent.latent_norm, latent)
    assert all((x.abs() == 10).sum() == 2 and (x.abs() < 10).any() for x in (obs, latent))
    actor, again = policy(obs, latent)
    exactly(again, value)
    closely(given, actor.log_softmax(-1) if discrete else actor)
    for b in range(6):
        inputs = (policy.obs_features[0].weight @ obs[b] + policy.obs_features[0].bias).tanh()
        x = (policy.embedding_features[0].weight @ latent[b] + policy.embedding_features[0].bias).tanh()
        if arch == "standard":
            inputs = torch.cat([inputs, x])
        else:
            assert len(policy.hyper_hidden) == len(hyper_layers)
            for layer in policy.hyper_hidden:
                x = (layer.weight @ x + layer.bias).clamp(min=0)
        closely(actor[b], slow_base_network(policy.actor, inputs, x))
        closely(value[b], slow_base_network(policy.critic, inputs, x)[0])


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("hyper_layers", [(), (8,)])
@pytest.mark.parametrize("arch", ["hyper", "film"])
def test_bias_hyperinit_begins_without_the_embedding(arch, hyper_layers, discrete):
    """Before training, actions and values are the same for every embedding, and not for every observation."""
    agent = make_agent(arch, discrete, hyper_layers=hyper_layers).double()
    obs, latent = randn(1, D).expand(8, D), 5 * randn(8, 4)
    actor, value = outputs(agent, obs, latent)
    closely(actor, actor[:1].expand(8, A))
    closely(value, value[:1].expand(8))
    actor, value = outputs(agent, randn(8, D), latent[:1].expand(8, 4))
    assert len(set(value.tolist())) == 8 and len(set(actor[:, 0].tolist())) == 8
    value.sum().backward()  # the embedding's influence is learned: the heads that are 0 have gradients
    stack = agent.policy.critic[0].weight if arch == "hyper" else agent.policy.critic[0].scale
    assert (stack.grad[:-1] != 0).any()


def initial_parameters(layer):
    """Weight [out, in] and bias [out] that a layer has at first: its own, or those of its stacks' last slices."""
    if isinstance(layer, HyperLinear):
        return layer.weight[-1].detach(), layer.bias[-1, :, 0].detach()
    if isinstance(layer, FilmLinear):
        return (layer.scale[-1] * layer.weight).detach(), layer.shift[-1, :, 0].detach()
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize("arch", ["standard", "hyper", "film"])
@pytest.mark.parametrize("base_init", ["normc", "orthogonal", "kaiming"])
def test_hidden_layers_begin_with_the_base_init(arch, base_init):
    """Gain 5/3, that of tanh; biases 0; actor and critic are drawn apart."""
    policy = make_agent(arch, base_init=base_init, state_features=30, base_layers=(40, 20)).policy
    for network in (policy.actor, policy.critic):
        for layer in network[:-1]:
            weight, bias = initial_parameters(layer)
            exactly(bias, torch.zeros_like(bias))
            if base_init == "normc":
                assert_close(weight.norm(dim=1), torch.full_like(bias, 5 / 3))
                assert abs(weight.mean()) < 0.05 and len(weight.unique()) == weight.numel()
            elif base_init == "orthogonal":
                wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
                assert_close(wide @ wide.T, (5 / 3) ** 2 * torch.eye(len(wide)))
            else:
                assert weight.std().item() == pytest.approx(5 / 3 / weight.shape[1] ** 0.5, rel=0.1)
                assert weight.abs().max() > 2.5 * weight.std()  # Gaussian, not uniform
    assert not torch.equal(initial_parameters(policy.actor[0])[0], initial_parameters(policy.critic[0])[0])


@pytest.mark.parametrize("arch", ["standard", "hyper", "film"])
def test_actor_heads_begin_with_their_own_init(arch):
    """Discrete: orthogonal with gain 0.01. Continuous: normc, rows of length 1. Whatever --base-init is; biases 0."""
    for base_init in ("kaiming", "normc"):
        for discrete in (True, False):
            weight, bias = initial_parameters(make_agent(arch, discrete, base_init=base_init).policy.actor[-1])
            exactly(bias, torch.zeros_like(bias))
            if discrete:
                assert_close(weight @ weight.T, 1e-4 * torch.eye(A), rtol=1e-4, atol=1e-9)
            else:
                assert_close(weight.norm(dim=1), torch.ones(A))


@pytest.mark.parametrize("arch", ["standard", "hyper", "film"])
@pytest.mark.parametrize("discrete", [True, False])
def test_critic_head_begins_as_pytorch_has_it(arch, discrete):
    """Weight and bias from U(+-1 / sqrt(fan-in)): over 50 draws they fill the interval, and lie in it."""
    heads = [make_agent(arch, discrete, base_layers=(30, 6)).policy.critic[-1] for _ in range(50)]
    weights, biases = zip(*map(initial_parameters, heads), strict=True)
    if arch == "film":  # a film layer has a shift in the bias's place, which is 0
        exactly(torch.cat(biases), torch.zeros(50))
    bound = 6**-0.5
    for drawn in [torch.cat(weights).flatten()] + [torch.cat(biases)] * (arch != "film"):
        assert drawn.min() < -0.7 * bound and 0.7 * bound < drawn.max()
        assert drawn.abs().max() <= bound
        assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.25)


def test_hfi_knows_the_gain_of_every_layer():
    """Generated parameters: U with variance gain^2 / (2 d_j d_k), d_j = 1 for biases.

    The gain is 5/3 for tanh layers and f's own for output layers: 0.01 for discrete actions, else 1.
    """
    for discrete in (True, False):
        sizes = {"embedding_features": 9, "state_features": 30, "base_layers": (40, 20)}
        policy = make_agent(discrete=discrete, init="hfi", **sizes).policy
        for network, output_gain in ((policy.actor, 0.01 if discrete else 1), (policy.critic, 1)):
            for layer, fan_in, gain in zip(network, (30, 40, 20), (5 / 3, 5 / 3, output_gain), strict=True):
                for stack, d_j, least in ((layer.weight, fan_in, 0.95), (layer.bias, 1, 0.6)):
                    drawn, bound = stack.detach()[:-1].abs(), (3 * gain**2 / (2 * d_j * 9)) ** 0.5
                    assert least * bound < drawn.max() <= bound


@pytest.mark.parametrize("discrete", [True, False])
def test_hfo_knows_the_gain_of_the_output(discrete):
    """Generated weights: U with variance gain^2 / (d_i d_k). The output narrows, so that its biases are 0."""
    policy = make_agent(discrete=discrete, init="hfo", embedding_features=9, base_layers=(40, 20)).policy
    for network, d_i, gain in ((policy.actor, A, 0.01 if discrete else 1), (policy.critic, 1, 1)):
        drawn, bound = network[-1].weight.detach()[:-1].abs(), (3 * gain**2 / (d_i * 9)) ** 0.5
        assert 0.95 * bound < drawn.max() <= bound
        assert not network[-1].bias.any()


def test_discrete_actions():
    """Log-probabilities and entropy by hand; the draws follow them; the greedy action is the likeliest."""
    agent = random_(make_agent())
    obs, latent = randn(8, D), randn(8, 4)
    dist, value = agent(obs, latent)
    action = dist.sample()
    logprob, entropy = dist.log_prob(action), dist.entropy()
    assert action.shape == logprob.shape == entropy.shape == value.shape == (8,) and action.dtype == torch.long
    logits, values = agent.policy(agent.obs_norm(obs), agent.latent_norm(latent))
    exactly(value, values)
    for b in range(8):
        total = sum(math.exp(z) for z in logits[b].tolist())
        probs = [math.exp(z) / total for z in logits[b].tolist()]
        closely(logprob[b].item(), math.log(probs[action[b]]))
        closely(entropy[b].item(), -sum(p * math.log(p) for p in probs))
        assert dist.mode[b] == probs.index(max(probs))
        closely(dist.log_prob(torch.full((8,), 3))[b].item(), math.log(probs[3]))
    again, values = agent(obs, latent)
    exactly((again.log_prob(action), again.entropy(), values), (logprob, entropy, value))
    draws = agent(obs[:1].expand(20_000, D), latent[:1].expand(20_000, 4))[0].sample()
    assert_close(draws.bincount(minlength=A) / 20_000, logits[0].softmax(-1).float(), rtol=0, atol=0.02)


def test_continuous_actions():
    """A diagonal Gaussian: the density, the entropy and the draws by hand; the greedy action is the mean."""
    agent = random_(make_agent(discrete=False))
    obs, latent = randn(8, D), randn(8, 4)
    dist, value = agent(obs, latent)
    action = dist.sample()
    logprob, entropy = dist.log_prob(action), dist.entropy()
    assert action.shape == (8, A) and logprob.shape == entropy.shape == value.shape == (8,)
    assert not action.requires_grad
    means, values = agent.policy(agent.obs_norm(obs), agent.latent_norm(latent))
    log_std = agent.policy.log_std
    exactly(value, values)
    exactly(dist.mode, means)
    for b in range(8):
        density, spread = 0.0, 0.0
        for i in range(A):
            z = (action[b, i] - means[b, i]) / log_std[i].exp()
            density += -0.5 * z**2 - log_std[i] - 0.5 * math.log(2 * math.pi)
            spread += 0.5 * math.log(2 * math.pi * math.e) + log_std[i]
        closely(logprob[b], density)
        closely(entropy[b], spread)
    again, values = agent(obs, latent)
    exactly((again.log_prob(action), again.entropy(), values), (logprob, entropy, value))
    draws = agent(obs[:1].expand(20_000, D), latent[:1].expand(20_000, 4))[0].sample()
    z = (draws - means[0]) / log_std.exp()
    assert z.mean(0).abs().max() < 0.05 and (z.std(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize("arch", ["standard", "hyper", "film"])
def test_log_std_is_free_and_begins_at_0(arch):
    agent = make_agent(arch, discrete=False)
    exactly(agent.policy.log_std.detach(), torch.zeros(A))
    assert any(parameter is agent.policy.log_std for parameter in agent.policy.parameters())
    assert make_agent(arch).policy.log_std is None
    random_(agent)
    entropy = agent(randn(8, D), randn(8, 4))[0].entropy()
    exactly(entropy, entropy[:1].expand(8))  # of no observation or embedding


@pytest.mark.parametrize("discrete", [True, False])
def test_an_agent_is_finite_if_all_of_it_is(discrete):
    """Its parameters, its normalisers, and what it does with the observations and beliefs at hand."""
    agent = make_agent(discrete=discrete)
    obs, belief = torch.randn(8, D), torch.randn(8, agent.vae.encoder.gru.hidden_size)
    assert agent.is_finite(obs, belief)
    names = ["policy.actor.0.weight", "vae.encoder.gru.bias_hh_l0", "vae.reward_decoder.net.0.bias", "reward_norm.var"]
    for name in names + ["policy.log_std"] * (not discrete):
        for value in (torch.nan, torch.inf):
            agent = make_agent(discrete=discrete)
            agent.state_dict()[name].view(-1)[-1] = value
            assert not agent.is_finite(obs, belief), name
    agent = make_agent(discrete=discrete)
    obs[5, 1] = torch.nan
    assert not agent.is_finite(obs, belief)
    if not discrete:  # every parameter is finite, and the standard deviation is not
        agent.policy.log_std.data[2] = 100.0
        assert not agent.is_finite(torch.randn(8, D), belief)


def test_a_saved_agent_has_its_normalisers():
    agent, copy = make_agent(), make_agent()
    for norm in (agent.obs_norm, agent.latent_norm, agent.reward_norm):
        norm.update(3 * torch.randn(9, len(norm.mean)) + 1)
    state = agent.state_dict()
    assert {f"{n}_norm.{x}" for n in ("obs", "latent", "reward") for x in ("mean", "var", "count")} <= set(state)
    copy.load_state_dict(state)
    obs, latent = torch.randn(8, D), torch.randn(8, 4)
    exactly(outputs(copy, obs, latent), outputs(agent, obs, latent))
    exactly(copy.reward_norm.var, agent.reward_norm.var)


def test_parameter_counts_by_hand():
    """Continuous actions: observation 3, action 5, embedding posterior 2 x 2, base layers 7 and 6."""
    actor, critic = (4 * 7 + 7) + (7 * 6 + 6) + (6 * 5 + 5), (4 * 7 + 7) + (7 * 6 + 6) + (6 * 1 + 1)
    encoder = (3 * 3 + 3) + (1 * 2 + 2) + 3 * (5 * 4 + 4 * 4 + 4 + 4) + (4 * 4 + 4)
    decoder = (2 * 6 + 6) + (6 * 5 + 5) + (5 * 25 + 25)
    rest = encoder + decoder + (3 * 4 + 4) + (4 * 3 + 3) + 5  # VAE, the policy's two feature layers, log_std

    counts = parameter_counts(make_agent("hyper", discrete=False, hyper_layers=(8,)))
    hyper = (3 * 8 + 8) + (8 + 1) * (actor + critic)
    assert counts == {"total": rest + hyper, "hypernetwork": hyper, "base_network": actor + critic}

    counts = parameter_counts(make_agent("film", discrete=False))
    weights, units = (4 * 7 + 7 * 6 + 6 * 5) + (4 * 7 + 7 * 6 + 6 * 1), (7 + 6 + 5) + (7 + 6 + 1)
    hyper = (3 + 1) * 2 * units
    assert counts == {"total": rest + weights + hyper, "hypernetwork": hyper, "base_network": weights + 2 * units}

    counts = parameter_counts(make_agent("standard", discrete=False))
    base = actor + critic + 2 * 3 * 7  # the embedding's 3 features enter the first layers
    assert counts == {"total": rest + base, "hypernetwork": 0, "base_network": base}


# ---------------------------------------------------------------------------------------------------------------------
# Buffer


def contents(batch):
    """A batch's meta-episodes without their padding, as (obs, actions, rewards, next_obs) of plain numbers."""
    lengths = batch.lengths.tolist()
    return [tuple(tuple(x[:length, b].flatten().tolist()) for x in batch[:4]) for b, length in enumerate(lengths)]


def rollout_of(obs, rewards, next_obs, dones):
    """What the buffer reads of a rollout."""
    nothing = dict.fromkeys(Rollout._fields)
    return Rollout(**nothing | {"obs": obs, "rewards": rewards, "next_obs": next_obs, "dones": dones})


def random_rollout(num_steps, widths, lengths, most):
    """A rollout and its action vectors; `lengths` [N], of the running meta-episodes, go on, to `most` at the most."""
    N = len(lengths)
    obs, actions, rewards, next_obs = (torch.randn(num_steps, N, width) for width in widths)
    dones = (torch.rand(num_steps, N) < 0.2).float()
    for t, n in np.ndindex(num_steps, N):
        if lengths[n] == most - 1:
            dones[t, n] = 1
        lengths[n] = 0 if dones[t, n] else lengths[n] + 1
    return rollout_of(obs, rewards[:, :, 0], next_obs, dones), actions


@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_buffer_keeps_the_last_finished_meta_episodes(num_steps):
    """Four environments, meta-episodes of 1 to 6 steps, room for 5: what was put in comes out, number by number.

    Whole rollouts against appending one transition at a time to plain lists. Rollouts cut meta-episodes in two, have
    several, or have more than there is room for.
    """
    N, widths = 4, (2, 3, 1, 2)
    envs = SimpleNamespace(num_envs=N, obs_dim=2, action_dim=3, max_steps=6)
    buffer = MetaEpisodeBuffer(5, envs, torch.device("cpu"), seed=0)
    running, finished, several, lengths = [[] for _ in range(N)], [], False, [0] * N

    def plain(steps):
        return tuple(tuple(x for step in steps for x in step[part]) for part in range(4))

    assert contents(buffer.running()) == [plain([])] * N
    for _ in range(120 // num_steps + 1):
        rollout, actions = random_rollout(num_steps, widths, lengths, 6)
        buffer.add(rollout, actions)
        for t in range(num_steps):
            for n in range(N):
                parts = rollout.obs[t, n], actions[t, n], rollout.rewards[t, n, None], rollout.next_obs[t, n]
                running[n].append([part.tolist() for part in parts])
            several |= rollout.dones[t].sum() > 1
            for n in range(N):
                if rollout.dones[t, n]:
                    finished.append(plain(running[n]))
                    running[n] = []
        assert contents(buffer.running()) == [plain(steps) for steps in running]
        assert buffer.size == min(len(finished), 5)
        if finished:
            batch = buffer.sample(100)
            assert set(contents(batch)) == set(finished[-5:])
            longest = int(batch.lengths.max())
            assert [x.shape for x in batch[:4]] == [(longest, 100, width) for width in widths]
            assert all(x.dtype == torch.float32 for x in batch[:4])
    assert several and len(finished) > 20 and len({len(steps[2]) for steps in finished}) == 6


@pytest.mark.parametrize("num_rollouts", [1, 8])
def test_a_loaded_buffer_continues(num_rollouts, tmp_path):
    """Partly filled, or overwritten more than once: a file keeps what is in it, and what is drawn from it next."""
    widths, lengths = (2, 3, 1, 2), [0] * 4
    envs = SimpleNamespace(num_envs=4, obs_dim=2, action_dim=3, max_steps=6)
    buffer, loaded = (MetaEpisodeBuffer(20, envs, torch.device("cpu"), seed) for seed in (0, 1))
    for _ in range(num_rollouts):
        buffer.add(*random_rollout(10, widths, lengths, 6))
    assert 0 < buffer.size < 20 if num_rollouts == 1 else buffer.size == 20
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    loaded.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for _ in range(3):
        assert contents(loaded.running()) == contents(buffer.running())
        assert loaded.size == buffer.size
        exactly(tuple(loaded.sample(50)), tuple(buffer.sample(50)))
        more = random_rollout(10, widths, lengths, 6)
        buffer.add(*more)
        loaded.add(*more)


def test_buffer_draws_by_its_seed():
    envs = SimpleNamespace(num_envs=10, obs_dim=1, action_dim=1, max_steps=1)

    def draw(seed):
        buffer = MetaEpisodeBuffer(10, envs, torch.device("cpu"), seed)
        numbers = torch.arange(10.0).view(1, 10, 1)
        buffer.add(rollout_of(numbers, numbers[:, :, 0], numbers, torch.ones(1, 10)), numbers)
        return buffer.sample(1000).obs.flatten().tolist()

    assert draw(1) == draw(1) != draw(2)
    counts = Counter(draw(1))
    assert all(50 < counts[k] < 150 for k in range(10))  # uniformly, with replacement


# ---------------------------------------------------------------------------------------------------------------------
# Meta-episodes and their summary


class Chance(gym.vector.VectorEnv):
    """Rewards and ends of episodes are random; `history` keeps (rewards, whether an episode ended) of every step."""

    horizon, num_envs = 8, 5
    single_observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    single_action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.rng, self.tasks, self.history = np.random.default_rng(0), np.zeros((5, 1)), []

    def reset(self, *, seed=None, options=None):
        return np.zeros((5, 1), np.float32), {}

    def step(self, actions):
        terminated, truncated = self.rng.random((2, 5)) < 0.15
        rewards = self.rng.normal(1, 3, size=5)
        self.history.append((rewards.tolist(), (terminated | truncated).tolist()))
        return np.zeros((5, 1), np.float32), rewards, terminated, truncated, {}


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("episodes_per_task", [1, 3])
def test_discounted_returns(episodes_per_task, gamma):
    """R_t = gamma R_t-1 + r_t; it begins anew with a meta-episode, and not with the episodes inside it."""
    meta = MetaEpisodes(Chance(), episodes_per_task, gamma)
    meta.reset(0)
    discounted, episode, meta_episodes = [0.0] * 5, [0] * 5, 0
    for step in range(200):
        if step == 120:  # everything begins anew
            meta.reset(0)
            discounted, episode = [0.0] * 5, [0] * 5
        given = meta.step(np.zeros(5, int))
        rewards, ended = meta.envs.history[-1]
        for i in range(5):
            discounted[i] = gamma * discounted[i] + rewards[i]
        assert given.discounted_returns.dtype == np.float32
        assert given.discounted_returns.tolist() == pytest.approx(discounted, rel=1e-5, abs=1e-4)
        for i in range(5):
            episode[i] += ended[i]
            if episode[i] == episodes_per_task:
                episode[i], discounted[i], meta_episodes = 0, 0.0, meta_episodes + 1
    assert meta_episodes > 60


def meta_episode(returns, successes, lengths, env=0):
    successes = None if successes is None else np.array(successes)
    return MetaEpisode(env, np.array(returns), successes, np.array(lengths))


def test_summary_by_hand():
    """Three meta-episodes of two episodes. Standard errors are those of a sample: the variance has the divisor 2."""
    played = [
        meta_episode([1.0, 2.0], [0.0, 1.0], [4.0, 2.0]),  # return 3, 3 steps an episode
        meta_episode([3.0, 5.0], [1.0, 1.0], [6.0, 6.0]),  # 8, 6
        meta_episode([5.0, 2.0], [0.0, 1.0], [3.0, 3.0]),  # 7, 3
    ]
    expected = {
        "meta_episodic_return": (6, math.sqrt((9 + 4 + 1) / 2 / 3)),
        "episodic_return_ep1": (3, math.sqrt((4 + 0 + 4) / 2 / 3)),
        "episodic_return_ep2": (3, math.sqrt((1 + 4 + 1) / 2 / 3)),
        "success_ep1": (100 / 3, 100 * math.sqrt((1 / 9 + 4 / 9 + 1 / 9) / 2 / 3)),  # in percent
        "success_ep2": (100, 0),
        "episodic_length": (4, math.sqrt((1 + 4 + 1) / 2 / 3)),
    }
    summary = summarize(played)
    assert set(summary) == set(expected)
    for name, (mean, stderr) in expected.items():
        assert summary[name] == {"mean": pytest.approx(mean), "stderr": pytest.approx(stderr), "count": 3}, name
        assert [type(summary[name][key]) for key in ("mean", "stderr", "count")] == [float, float, int]  # for JSON


def test_summary_without_success_and_of_a_single_meta_episode():
    summary = summarize([meta_episode([1.5, -4.0, 2.0], None, [10.0, 1.0, 4.0])])
    means = {"meta_episodic_return": -0.5, "episodic_length": 5.0}
    means |= {"episodic_return_ep1": 1.5, "episodic_return_ep2": -4.0, "episodic_return_ep3": 2.0}
    assert summary == {name: {"mean": mean, "stderr": 0.0, "count": 1} for name, mean in means.items()}
