"""What makes the scripts faster changes nothing else: threads, a GPU."""

import json

import pytest
import torch
from test_scripts import run, scalars

import rl2_hyper
import varibad_hyper

both_scripts = pytest.mark.parametrize("script", [varibad_hyper, rl2_hyper], ids=lambda script: script.__name__)


@both_scripts
def test_threads_are_those_asked_for(script, tmp_path):
    before = torch.get_num_threads()
    folder = run(script, tmp_path, *"--num-steps 60 --total-timesteps 480 --eval-interval 0 --threads 2".split())
    for flags, number in ([], 2), (["--threads", "3"], 3):  # an evaluation: the run's, or those asked for
        assert torch.get_num_threads() == 2
        script.main(script.parse_args(["--evaluate", str(folder), *flags]))
        assert torch.get_num_threads() == number
    torch.set_num_threads(before)


@both_scripts
def test_threads_share_the_physics(script):
    args = script.make_args("Walker", threads=2)
    for envs in script.make_envs(args, 5), script.make_eval_envs(args):
        first, second = envs.envs.shares
        assert sorted([*first, *second]) == list(range(envs.num_envs)) and abs(len(first) - len(second)) <= 1


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
