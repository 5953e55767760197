"""What makes the scripts faster changes nothing else: compiled policies, threads, a GPU."""

import json
import shutil

import pytest
import torch
from test_scripts import run, scalars

import rl2_hyper
import varibad_hyper

both_scripts = pytest.mark.parametrize("script", [varibad_hyper, rl2_hyper], ids=lambda script: script.__name__)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("script, env", [(varibad_hyper, "Grid-World"), (rl2_hyper, "Cheetah-Dir")])
def test_compiled_policy_is_the_policy(script, env):
    """Outputs and gradients to rounding, for a rollout's and an update's rows; compiling moves no generator on."""
    args = script.parse_args(["--env", env])
    envs = script.make_envs(args, 4)
    agent = script.Agent(envs, args)
    obs, belief = torch.randn(4, envs.obs_dim), torch.randn(4, args.gru_hidden)
    rng_state = torch.get_rng_state()
    eager = agent.get_action_and_value
    script.compile_policy(agent, obs, belief, 10, 1)
    assert torch.equal(torch.get_rng_state(), rng_state) and agent.get_action_and_value is not eager
    assert all(parameter.grad is None for parameter in agent.parameters())

    results = []
    for function in (eager, agent.get_action_and_value):
        torch.manual_seed(0)
        with torch.no_grad():
            drawn = function(obs, agent.embedding(belief))
        many_obs, many_beliefs = torch.randn(10, envs.obs_dim), torch.randn(10, args.gru_hidden)
        outputs = function(many_obs, agent.embedding(many_beliefs), drawn[0][torch.arange(10) % 4])
        agent.zero_grad()
        sum((output * (k + 1)).sum() for k, output in enumerate(outputs[1:])).backward()
        gradients = [parameter.grad for parameter in agent.parameters() if parameter.grad is not None]
        results.append([*drawn, *outputs, *gradients])
    assert len(results[0]) == len(results[1]) > 15
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_compiler
def test_compiled_run_is_the_run(tmp_path):
    """Five iterations have the same returns and, to rounding, the same losses; result.json tells the warm-up.

    On Grid-World, where rounding is not amplified: on MuJoCo a difference of 1e-7 has grown to 1e-2 after 25 steps.
    """
    folders = [run(varibad_hyper, tmp_path / "eager"), run(varibad_hyper, tmp_path / "compiled", "--compile")]
    eager, compiled = map(scalars, folders)
    assert eager.keys() == compiled.keys()
    for tag in eager:
        if tag.startswith(("losses/policy", "losses/value", "eval/", "charts/meta")):
            assert list(compiled[tag].values()) == pytest.approx(list(eager[tag].values()), rel=1e-2, abs=1e-3), tag
    times = [json.loads((folder / "result.json").read_text())["compile_time"] for folder in folders]
    assert times[0] == 0 < times[1]


@both_scripts
def test_compiling_without_a_compiler_is_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(["--compile"]))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --compile needs a C++ compiler")


@needs_compiler
@both_scripts
def test_compiler_that_fails_is_told(script, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no such header\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(SystemExit) as stop:
        run(script, tmp_path, "--compile")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("error: --compile does not work on this machine (RuntimeError): leave it out.\n")


@both_scripts
def test_threads_work_in_updates_and_evaluations_alone(script, tmp_path, monkeypatch):
    threads = {"rollout": set(), "update": set(), "evaluation": set()}
    update, step = script.value_loss, script.MetaEpisodes.step

    def counting_update(*args):
        threads["update"].add(torch.get_num_threads())
        return update(*args)

    def counting_step(self, actions):
        threads["rollout" if self.num_envs == 4 else "evaluation"].add(torch.get_num_threads())
        return step(self, actions)

    monkeypatch.setattr(script, "value_loss", counting_update)
    monkeypatch.setattr(script.MetaEpisodes, "step", counting_step)
    before = torch.get_num_threads()
    run(script, tmp_path, "--env", "Cheetah-Dir", "--torch-threads", "2")
    torch.set_num_threads(before)
    assert threads == {"rollout": {1}, "update": {2}, "evaluation": {2}}


@both_scripts
@pytest.mark.parametrize("env", ["Grid-World", "Cheetah-Dir"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runs_on_a_gpu(script, env, tmp_path):
    """To the end, with losses of sensible size."""
    folders = [run(script, tmp_path / flag, "--env", env, flag) for flag in ("--cuda", "--no-cuda")]
    gpu, cpu = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert [frames for frames, _ in gpu["eval_history"]] == [frames for frames, _ in cpu["eval_history"]]
    losses = scalars(folders[0])["losses/policy_loss"].values()
    assert all(abs(loss) < 1e3 for loss in losses)
