"""What main hands from its rollouts to losses and optimizers, computed again from the environments' steps alone."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import rl2_hyper
import varibad_hyper

both_scripts = pytest.mark.parametrize("script", [varibad_hyper, rl2_hyper], ids=lambda script: script.__name__)


@both_scripts
def test_rollouts_reach_the_losses_as_defined(script, tmp_path, monkeypatch):
    """Walker, two episodes of 10 steps a task, in rollouts of 50; environment 3 falls at its episodes' 7th step.

    Only normalisers and VariBAD's VAE learn, so that beliefs can be computed again from the first step on.
    """
    T, gamma, gae_lambda, reward_clip, clip_coef = 50, 0.9, 0.6, 0.7, 0.123
    steps, agents, updates, minibatches, clipped, explained = [], [], [], [], [], []
    step, forward, gae = script.MetaEpisodes.step, script.Agent.forward, script.compute_gae
    policy_loss, value_loss, end_iteration = script.policy_loss, script.value_loss, script.Run.end_iteration

    def recording_step(self, actions):
        seen = self.policy_obs
        steps.append((seen, torch.tensor(actions), step(self, actions)))
        return steps[-1][2]

    def checking_gae(rewards, rollout, next_value, *factors):
        agent, past = agents[-1], steps[:-T]
        assert factors == (gamma, gae_lambda)
        assert_close(agent.obs_norm.mean, torch.tensor(np.concatenate([seen for seen, *_ in past]).mean(0)))
        if script is varibad_hyper:
            assert agent.latent_norm.count == agent.obs_norm.count
        scale = (np.concatenate([out.discounted_returns for *_, out in past]).var() + 1e-8) ** 0.5
        scaled = np.stack([out.rewards for *_, out in steps[-T:]]) / scale
        clipped.append((np.abs(scaled) > reward_clip).mean())
        assert_close(rewards, torch.tensor(scaled.clip(-reward_clip, reward_clip), dtype=torch.float32))

        belief, finals = agent.initial_belief(envs), []
        with torch.no_grad():
            for _, actions, out in steps:
                next_obs, reward = torch.tensor(out.next_obs), torch.tensor(out.rewards, dtype=torch.float32)
                belief = agent.update_belief(belief, actions, next_obs, reward)
                next_obs[:, -1] = 0  # the policy never sees the flag
                finals.append(forward(agent, next_obs, agent.embedding(belief))[1] * torch.tensor(out.time_limit))
                belief = belief * ~torch.tensor(out.dones)[:, None]
            last = forward(agent, torch.tensor(steps[-1][2].policy_obs), agent.embedding(belief))[1]
        assert_close(rollout.final_values, torch.stack(finals[-T:]))
        assert_close(next_value, last)
        assert 0 < rollout.final_values.count_nonzero() < rollout.dones.sum()  # time limits, and falls
        updates.append((gae(rewards, rollout, next_value, *factors), rollout.values))
        minibatches.append([])
        return updates[-1][0].clone()

    def checking_policy_loss(logratio, advantages, clip):
        assert logratio.abs().max() < 1e-4 and clip == clip_coef
        minibatches[-1].append([advantages])
        return policy_loss(logratio, advantages, clip)

    def checking_value_loss(newvalues, values, returns, clip):
        assert_close(newvalues, values, rtol=1e-4, atol=1e-4)
        assert clip == clip_coef
        minibatches[-1][-1] += [values, returns]
        return value_loss(newvalues, values, returns, clip)

    def recording_end(self, scalars, finite):
        explained.append(scalars.get("losses/explained_variance"))
        end_iteration(self, scalars, finite)

    monkeypatch.setattr(script.MujocoVectorEnv, "horizon", 10)
    monkeypatch.setattr(script.Walker, "unhealthy", lambda self: (np.arange(4) == 3) & (self.elapsed == 7))
    monkeypatch.setattr(script.MetaEpisodes, "step", recording_step)
    monkeypatch.setattr(script.Agent, "forward", lambda self, *x: agents.append(self) or forward(self, *x))
    monkeypatch.setattr(script, "compute_gae", checking_gae)
    monkeypatch.setattr(script, "policy_loss", checking_policy_loss)
    monkeypatch.setattr(script, "value_loss", checking_value_loss)
    monkeypatch.setattr(script.Run, "end_iteration", recording_end)
    for name in ("evaluate_if_due", "save_result"):  # an evaluation would add steps of its own
        monkeypatch.setattr(script.Run, name, lambda *_: None)
    flags = f"--env Walker --init weight --num-envs 4 --num-steps {T} --num-minibatches 2 --learning-rate 1e-30"
    flags += f" --gamma {gamma} --gae-lambda {gae_lambda} --reward-clip {reward_clip} --clip-coef {clip_coef}"
    flags += f" --update-epochs 2 --learning-starts 0 --total-timesteps 800 --no-cuda --runs-dir {tmp_path}"
    args = script.parse_args(flags.split())
    envs = script.make_envs(args, 4)
    script.main(args)

    assert len(updates) == 3 and 0 < min(clipped) and max(clipped) < 1
    for (advantages, values), parts in zip(updates, minibatches, strict=True):
        assert len(parts) == 4
        for epoch in parts[:2], parts[2:]:  # every sample once
            mb_advantages, mb_values, mb_returns = (torch.cat(x) for x in zip(*epoch, strict=True))
            assert_close(mb_values.sort().values, values.flatten().sort().values)
            raw = mb_returns - mb_values
            assert_close(raw.sort().values, advantages.flatten().sort().values, rtol=1e-4, atol=1e-4)
            assert_close(mb_advantages, (raw - advantages.mean()) / advantages.std(), rtol=1e-4, atol=1e-4)
    shares = [1 - (advantages.var() / (advantages + values).var()).item() for advantages, values in updates]
    assert explained == [None, *(pytest.approx(share, rel=1e-4) for share in shares)]


@both_scripts
def test_weights_of_the_losses_and_the_longest_gradient(script, tmp_path, monkeypatch):
    """Losses of known gradients: the entropy's is 1 for every log_std, a mean value's is 1 for the critic's bias."""
    monkeypatch.setattr(script, "policy_loss", lambda logratio, *_: 0 * logratio.sum())
    monkeypatch.setattr(script, "value_loss", lambda newvalues, *_: newvalues.mean())
    agents, norms, forward, clip = [], [], script.Agent.forward, script.nn.utils.clip_grad_norm_

    def checking_clip(parameters, limit):
        policy = agents[-1].policy
        assert_close(policy.log_std.grad, torch.full_like(policy.log_std, -0.2))
        assert_close(policy.critic[-1].bias.grad, torch.tensor([0.7]))
        clip(parameters, limit)
        trained = policy if script is varibad_hyper else agents[-1]
        norms.append(torch.stack([p.grad.norm() for p in trained.parameters()]).norm().item())

    monkeypatch.setattr(script.Agent, "forward", lambda self, *x: agents.append(self) or forward(self, *x))
    monkeypatch.setattr(script.nn.utils, "clip_grad_norm_", checking_clip)
    flags = "--env Cheetah-Dir --arch standard --num-envs 4 --num-steps 37 --num-minibatches 2 --update-epochs 1"
    flags += " --ent-coef 0.2 --vf-coef 0.7 --max-grad-norm 0.05 --learning-starts 0 --total-timesteps 296"
    flags += f" --eval-interval 0 --eval-tasks 2 --no-cuda --runs-dir {tmp_path}"
    script.main(script.parse_args(flags.split()))
    assert norms == pytest.approx([0.05] * 2, rel=1e-3)


@both_scripts
def test_flags_reach_the_optimizers_and_the_vae(script, tmp_path, monkeypatch):
    """Two of four iterations learn: the third, at exactly --learning-starts frames, and the last."""
    calls, flags = [], "--num-envs 4 --num-steps 60 --num-minibatches 2 --learning-rate 2e-3 --adam-eps 1e-6"
    rates = {"optimizer": 2e-3}
    if script is varibad_hyper:
        loss = script.elbo_loss

        def recording_loss(vae, batch, *rest):
            calls.append((len(batch.lengths), *rest))
            return loss(vae, batch, *rest)

        monkeypatch.setattr(script, "elbo_loss", recording_loss)
        flags += " --vae-learning-rate 3e-3 --vae-batch 7 --vae-updates 3 --vae-subsample 9 --kl-weight 0.4"
        rates["vae_optimizer"] = 3e-3
    flags += f" --learning-starts 720 --total-timesteps 960 --eval-interval 0 --no-cuda --runs-dir {tmp_path}"
    folder = script.main(script.parse_args(flags.split()))
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name, rate in rates.items():
        (group,) = saved[name]["param_groups"]
        assert (group["lr"], group["eps"]) == (rate, 1e-6)
    assert saved["optimizer"]["state"][0]["step"] == 2 * 2 * 2  # iterations, epochs, minibatches
    assert calls == [(7, 9, 0.4)] * 3 * 2 * (script is varibad_hyper)
