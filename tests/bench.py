"""Where the time goes: `python tests/bench.py` prints the tables of docs/speed.md, `... bench.py physics` one of them.

Parts: `train` (frames/s end to end and their split), `growth` (the same with more environments, embedding features and
larger base networks), `physics` (environment steps against raw mj_step and Gymnasium's SyncVectorEnv), `layer` (the
hypernetwork layer against per-sample weights and torch.mm), `vae` (its update against expanding everything). Only when
named: `sweep` (what reproduce.py runs, a run each, from which its --list knows the cost).

What is compared runs in turn, A B A B, and the medians are printed. Nothing else should run on the machine.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import io
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F

import hyperinit
import reproduce
import varibad_hyper

XL = ["--state-features", "256", "--base-layers", "256", "128"]
# Frames are some iterations past --learning-starts, a few seconds each.
TRAINING = {
    "Grid-World, hyper": ["--total-timesteps", "30000"],
    "Grid-World, standard": ["--total-timesteps", "30000", "--arch", "standard"],
    "Grid-World, film": ["--total-timesteps", "30000", "--arch", "film", "--init", "bias"],
    "Grid-World, hyper XL": ["--total-timesteps", "10000", *XL],
    "Cheetah-Dir, hyper": ["--env", "Cheetah-Dir", "--total-timesteps", "44800"],
    "Cheetah-Dir, standard": ["--env", "Cheetah-Dir", "--total-timesteps", "44800", "--arch", "standard"],
    "Walker, hyper": ["--env", "Walker", "--total-timesteps", "25600"],
    "Walker, standard": ["--env", "Walker", "--total-timesteps", "25600", "--arch", "standard"],
    "Ant-Dir, hyper": ["--env", "Ant-Dir", "--total-timesteps", "16000"],
    "Ant-Dir, standard": ["--env", "Ant-Dir", "--total-timesteps", "16000", "--arch", "standard"],
    "Humanoid, hyper": ["--env", "Humanoid", "--total-timesteps", "51200"],
    "Humanoid, standard": ["--env", "Humanoid", "--total-timesteps", "51200", "--arch", "standard"],
    "Pick-Place, hyper": ["--env", "Pick-Place", "--total-timesteps", "24000"],
    "Pick-Place, standard": ["--env", "Pick-Place", "--total-timesteps", "24000", "--arch", "standard"],
    "ML10, hyper": ["--env", "ML10", "--total-timesteps", "24000"],
    "RL2 on Grid-World, hyper": ["rl2_hyper", "--total-timesteps", "30000"],
    "RL2 on Walker, hyper": ["rl2_hyper", "--env", "Walker", "--total-timesteps", "25600"],
}
TRAINING |= {
    f"{name}, 2 threads": [*TRAINING[name], "--threads", "2"]
    for name in ("Grid-World, hyper XL", "Walker, hyper", "Ant-Dir, hyper", "Humanoid, hyper", "Pick-Place, hyper")
}
GROWTH = {
    f"Grid-World, hyper, {num_envs} environments": ["--num-envs", str(num_envs), "--total-timesteps", str(frames)]
    for num_envs, frames in ((16, 30000), (64, 60000), (256, 120000))
}
GROWTH |= {
    f"Walker, hyper, {num_envs} environments": ["--env", "Walker", "--num-envs", str(num_envs)]
    + ["--total-timesteps", str(num_envs * 200 * 4)]
    for num_envs in (16, 64, 256)
}
GROWTH |= {
    f"Grid-World, hyper, {features} embedding features": ["--embedding-features", str(features)]
    + ["--total-timesteps", "30000"]
    for features in (10, 25, 100)
}
GROWTH |= {
    f"Grid-World, hyper, base network {units}-{units}": ["--state-features", str(units), "--base-layers"]
    + [str(units), str(units), "--total-timesteps", "12000"]
    for units in (32, 128, 256)
}
# What reproduce.py runs by default, and a few more: the keys of its SPEED and SIZE_SPEED
SWEEP = {name: TRAINING[name] for name in TRAINING if not re.search("XL|threads", name)}
SWEEP |= {
    "Pick-Place, film": ["--env", "Pick-Place", "--total-timesteps", "24000", "--arch", "film", "--init", "bias"],
    "ML10, standard": ["--env", "ML10", "--total-timesteps", "24000", "--arch", "standard"],
    "RL2 on Grid-World, standard": ["rl2_hyper", "--total-timesteps", "30000", "--arch", "standard"],
    "RL2 on ML10, hyper": ["rl2_hyper", "--env", "ML10", "--total-timesteps", "24000"],
    "RL2 on ML10, standard": ["rl2_hyper", "--env", "ML10", "--total-timesteps", "24000", "--arch", "standard"],
}
SWEEP |= {
    f"{env}, {arch} {size}": ["--env", env, "--arch", arch, "--total-timesteps", frames, *flags.split()]
    for env, frames in (("Cheetah-Dir", "32000"), ("Walker", "19200"), ("Grid-World", "12000"))
    for size, flags in reproduce.SIZES.items()
    for arch in ("hyper", "standard")
    if not (env == "Grid-World" and "XL" in size)
}
WARM_UP = 2  # iterations that are not counted: without PPO in the first, without VAE until a meta-episode has ended
PHASES = ["environment", "policy", "encoder", "rollout's rest", "PPO", "VAE", "rest"]


def median_times(functions, repetitions):
    """Median seconds of every function; they run in turn, after one call of each that is not counted."""
    times = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(pid="self"):
    """The most memory in MB that a process of Linux had so far (getrusage's would include that of its parent)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def print_table(header, rows):
    print(f"\n| {' | '.join(header)} |\n|{' --- |' + ' ---: |' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training, end to end


def split_run(flags):
    """Trains in this process and returns seconds by phase, frames, and peak memory in MB (of all processes together).

    A clock that always stands on one phase is moved on by calls that main makes: the scripts know nothing of it.
    """
    name, flags = (flags[0], flags[1:]) if flags[0] == "rl2_hyper" else ("varibad_hyper", flags)
    script = importlib.import_module(name)
    seconds, now, steps = Counter(), ["set-up", time.perf_counter()], [0]
    args_of_run = script.parse_args([*flags, "--learning-starts", "0"])

    def go_to(phase):
        seconds[now[0]] += time.perf_counter() - now[1]
        now[:] = phase, time.perf_counter()

    def begins(owner, function, phase):
        original = getattr(owner, function)

        def wrapper(*args, **kwargs):
            go_to(phase)
            return original(*args, **kwargs)

        setattr(owner, function, wrapper)

    def within_rollout(owner, function, phase, enters=False):
        original = getattr(owner, function)

        def wrapper(*args, **kwargs):
            if enters:
                steps[0] += 1
                if steps[0] == WARM_UP * args_of_run.num_steps + 1:
                    seconds.clear()
            if now[0] != "rollout's rest" and not (enters and now[0] in ("set-up", "rest")):
                return original(*args, **kwargs)
            go_to(phase)
            try:
                return original(*args, **kwargs)
            finally:
                go_to("rollout's rest")

        setattr(owner, function, wrapper)

    if name == "varibad_hyper":
        begins(script.MetaEpisodeBuffer, "running", "rollout's rest")
        begins(script.MetaEpisodeBuffer, "sample", "VAE")
    within_rollout(script.MetaEpisodes, "step", "environment", enters=True)
    within_rollout(script.Agent, "forward", "policy")
    for distribution in (script.Categorical, script.Independent):
        within_rollout(distribution, "sample", "policy")
        within_rollout(distribution, "log_prob", "policy")
    within_rollout(script.Agent, "update_belief", "encoder")
    within_rollout(script.Agent, "embedding", "encoder")
    begins(script, "compute_gae", "PPO")
    begins(script.RunningMeanStd, "update", "rest")

    memory = []  # of this process and every worker
    evaluate_groups = script.evaluate_groups

    def evaluate_and_measure(*args):
        go_to("evaluation")
        evaluations = evaluate_groups(*args)
        memory[:] = [peak_memory(), *(peak_memory(worker.pid) for worker in multiprocessing.active_children())]
        return evaluations

    script.evaluate_groups = evaluate_and_measure
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quiet = ["--eval-interval", "0", "--eval-tasks", "2", "--checkpoint-interval", "0", "--runs-dir", folder]
        script.main(script.parse_args([*flags, "--learning-starts", "0", *quiet]))
    go_to("end")
    batch_size = args_of_run.num_envs * args_of_run.num_steps
    frames = (args_of_run.total_timesteps // batch_size - WARM_UP) * batch_size
    return {"seconds": {phase: seconds[phase] for phase in PHASES}, "frames": frames, "memory": sum(memory)}


def train_table(runs, repetitions):
    """Every run in a process of its own, in turn; medians over the repetitions."""
    results = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, flags in runs.items():
            command = [sys.executable, __file__, "--split", json.dumps(flags)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, runs_of_name in results.items():
        speeds = [run["frames"] / sum(run["seconds"].values()) for run in runs_of_name]
        shares = [
            statistics.median(run["seconds"][phase] / sum(run["seconds"].values()) for run in runs_of_name)
            for phase in PHASES
        ]
        memory = statistics.median(run["memory"] for run in runs_of_name)
        shares = [f"{100 * share:.0f}" for share in shares]
        rows.append([name, f"{statistics.median(speeds):,.0f}", *shares, f"{memory:,.0f}"])
    print_table(["run", "frames/s", *(f"{phase} %" for phase in PHASES), "peak MB"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Environments


def physics_table(num_envs, steps, repetitions):
    """Steps of our vector environments, of their bare physics, and of Gymnasium's SyncVectorEnv, from the same states.

    All get the same actions and none is reset, so that every one simulates the same movements.
    """
    rows = []
    gym_names = {"Cheetah-Dir": "HalfCheetah", "Walker": "Walker2d", "Ant-Dir": "Ant", "Humanoid": "Humanoid"}
    for name, gym_name in gym_names.items():
        envs = varibad_hyper.MUJOCO_ENVS[name](num_envs)
        rng = np.random.default_rng(0)
        actions = rng.uniform(-1, 1, (steps, num_envs, envs.single_action_space.shape[0]))
        envs.reset(seed=0)
        start = envs.state_dict()
        low, high = envs.default_model.actuator_ctrlrange.T
        commands = np.clip(envs.action_scale * actions, low, high)

        def ours(envs=envs, start=start, actions=actions):
            envs.load_state_dict(start)
            for action in actions:
                envs.step(action)

        def physics(envs=envs, start=start, commands=commands, contacts=False):
            envs.load_state_dict(start)
            for command in commands:
                for i in range(num_envs):
                    envs.data[i].ctrl[:] = command[i]
                    mujoco.mj_step(envs.models[i], envs.data[i], envs.frame_skip)
                    if contacts:
                        mujoco.mj_rnePostConstraint(envs.models[i], envs.data[i])

        options = {} if name == "Cheetah-Dir" else {"terminate_when_unhealthy": False}
        maker = functools.partial(gym.make, f"{gym_name}-v5", disable_env_checker=True, **options)
        makers = [lambda maker=maker: maker().unwrapped] * num_envs
        sync = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
        sync_actions = (actions * sync.single_action_space.high).astype(np.float32)

        def synchronous(sync=sync, sync_actions=sync_actions, envs=envs, start=start):
            sync.reset(seed=0)
            for env, model, state in zip(sync.envs, envs.models, start["physics"].numpy(), strict=True):
                env.model, env.data = model, mujoco.MjData(model)  # the task's own
                mujoco.mj_setState(model, env.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
            for action in sync_actions:
                sync.step(action)

        threaded = varibad_hyper.MUJOCO_ENVS[name](num_envs, threads=os.cpu_count())
        threaded.reset(seed=0)
        functions = {"ours": ours, "physics": physics, "sync": synchronous}
        functions["threads"] = functools.partial(ours, envs=threaded)
        if envs.contact_forces:
            functions["contacts"] = lambda physics=physics: physics(contacts=True)
        times = median_times(functions, repetitions)
        speed = {key: num_envs * steps / value for key, value in times.items()}
        contacts = f"{speed['ours'] / speed['contacts']:.2f}" if "contacts" in speed else "-"
        ratios = [f"{speed['ours'] / speed['physics']:.2f}", contacts, f"{speed['ours'] / speed['sync']:.2f}"]
        ratios.append(f"{speed['threads'] / speed['ours']:.2f}")
        rows.append([name, *(f"{speed[key]:,.0f}" for key in ("ours", "physics", "sync")), *ratios])
    header = [
        f"task, {num_envs} environments",
        "ours, steps/s",
        "mj_step",
        "SyncVectorEnv",
        "ours / mj_step",
        "ours / (mj_step + contact forces)",
    ]
    print_table([*header, "ours / SyncVectorEnv", f"{os.cpu_count()} threads / 1"], rows)


def meta_world_table(steps, repetitions):
    """Steps of eight environments: ours in processes and in this one, and Meta-World's own classes in a plain loop."""
    rows = []
    for name in ("Pick-Place", "ML10"):
        benchmark = varibad_hyper.make_benchmark(name, 1)
        rng = np.random.default_rng(0)
        actions = rng.uniform(-1, 1, (steps, 8, 4)).astype(np.float32)
        envs = varibad_hyper.MetaWorldVectorEnv(benchmark, 8, False)
        tasks, classes = benchmark.train_tasks, len(benchmark.train_classes)
        # The first eight training tasks: ours take the classes in turn, the benchmark has each class in succession.
        numbers = [k % classes * (len(tasks) // classes) + k // classes for k in range(8)]
        alone = [varibad_hyper.MetaWorldEnv(benchmark, tasks, i, os.getpid()) for i in range(8)]
        robots = []
        for number in numbers:
            robots.append(benchmark.train_classes[tasks[number].env_name]())
            robots[-1].set_task(tasks[number])

        def in_processes(envs=envs, actions=actions):
            envs.reset(options={"tasks": envs.train_tasks[:8]})
            for action in actions:
                envs.step(action)

        def in_a_loop(alone=alone, actions=actions, numbers=numbers):
            for i, env in enumerate(alone):
                env.reset(options={"tasks": numbers})
                for action in actions[:, i]:
                    env.step(action)

        def own(robots=robots, actions=actions):
            for i, robot in enumerate(robots):
                robot.reset()
                for action in actions[:, i]:
                    robot.step(action)

        functions = {"processes": in_processes, "alone": in_a_loop, "own": own}
        speed = {key: 8 * steps / value for key, value in median_times(functions, repetitions).items()}
        rows.append([name, *(f"{speed[key]:,.0f}" for key in functions), f"{speed['processes'] / speed['own']:.2f}"])
        envs.close()
    header = ["benchmark", f"8 processes on {os.cpu_count()} cores, steps/s", "one process"]
    print_table([*header, "Meta-World's own, one process", "processes / own"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The hypernetwork layer


def stacked(layers, inputs, x):
    for layer in layers:
        inputs = layer(inputs, x)
    return inputs


def materialised(layers, inputs, x):
    """Every sample's own weights, written out, and a batched product."""
    for layer in layers:
        weights = torch.einsum("bk,koi->boi", x, layer.weight)  # [B, out, in]
        inputs = torch.bmm(weights, inputs[:, :, None])[:, :, 0] + x @ layer.bias[:, :, 0]
    return inputs


def expanded(layers, inputs, x):
    """Every sample's own weights, times the input expanded to their shape, summed."""
    for layer in layers:
        weights = (x @ layer.weight.flatten(1)).unflatten(1, layer.weight.shape[1:])  # [B, out, in]
        inputs = (weights * inputs[:, None].expand_as(weights)).sum(2) + x @ layer.bias[:, :, 0]
    return inputs


FORMS = {"stacked": stacked, "materialised": materialised, "expanded": expanded}
SIZES = {
    "small": (25, [16, 32, 32, 5]),
    "XL": (10, [256, 256, 128, 6]),
    "XL, 25 features": (25, [256, 256, 128, 6]),
}


def base_network(size):
    """An actor's layers with random heads, and K."""
    features, sizes = SIZES[size]
    layers = [
        hyperinit.HyperLinear(fan_in, fan_out, features) for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    for layer in layers:
        hyperinit.init_hyper_linear_(layer, "weight", hyperinit.normc_, torch.nn.init.zeros_, 1.0)
    return layers, features, sizes


def forward_and_backward(form, layers, inputs, x):
    def run():
        form(layers, inputs, x).square().sum().backward()

    return run


def layer_memory(form, size, batch):
    """Prints the peak memory in MB that a forward and backward pass adds to this process."""
    layers, features, sizes = base_network(size)
    inputs, x = torch.randn(batch, sizes[0]), torch.randn(batch, features + 1, requires_grad=True)
    forward_and_backward(stacked, layers, inputs[:2], x[:2])()  # loads what any pass needs
    before = peak_memory()
    forward_and_backward(FORMS[form], layers, inputs, x)()
    print(peak_memory() - before)


def layer_table(batches, repetitions):
    rows = []
    for size in SIZES:
        layers, features, sizes = base_network(size)
        for batch in batches:
            inputs, x = torch.randn(batch, sizes[0]), torch.randn(batch, features + 1, requires_grad=True)
            functions = {name: forward_and_backward(form, layers, inputs, x) for name, form in FORMS.items()}
            # The same volume in plain products, three per layer: forward, gradient of the input, of the weight
            matrices = [
                (torch.randn(batch, fan_in), torch.randn(fan_in, fan_out * (features + 1)))
                for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True)
            ]
            gradients = [left @ right for left, right in matrices]

            def products(matrices=matrices, gradients=gradients):
                for (left, right), gradient in zip(matrices, gradients, strict=True):
                    torch.mm(left, right)
                    torch.mm(gradient, right.T)
                    torch.mm(left.T, gradient)

            times = median_times(functions | {"mm": products}, repetitions)
            with torch.no_grad():
                forward = median_times({"stacked": lambda: stacked(layers, inputs, x)}, 50)["stacked"]  # noqa: B023
            memory = {}
            for name in FORMS:
                command = [sys.executable, __file__, "--memory", name, size, str(batch)]
                memory[name] = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            flops = sum(
                6 * batch * fan_in * fan_out * (features + 1)
                for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True)
            )
            rows.append(
                [f"{size}, {batch} samples", f"{1e3 * forward:.2f}", f"{1e3 * times['stacked']:.1f}"]
                + [f"{flops / times['stacked'] / 1e9:.0f}", f"{times['mm'] / times['stacked']:.2f}"]
                + [f"{times[name] / times['stacked']:.1f}" for name in ("materialised", "expanded")]
                + [f"{memory[name]:,.0f}" for name in FORMS]
            )
    header = ["actor", "forward, ms", "forward + backward, ms", "GFLOP/s", "of torch.mm's speed"]
    header += ["speed-up over materialised", "speed-up over expanded", "MB", "MB materialised", "MB expanded"]
    print_table(header, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The VAE update


def expanded_errors(self, m, steps, mask):
    """Decoder.errors and CellDecoder.errors with every pair of m and transition written out as a row of its own."""
    shape = (len(m), len(steps.obs), m.shape[1])  # [E, J, B]
    m = m[:, None].expand(*shape, -1).flatten(0, 2).contiguous()
    obs, actions, rewards, next_obs = (
        tensor[None].expand(*shape, -1).flatten(0, 2).contiguous() for tensor in steps[:4]
    )
    if isinstance(self, varibad_hyper.CellDecoder):
        cells = (self.size * next_obs[:, 0] + next_obs[:, 1]).long()
        picked = self(m).gather(1, cells[:, None])
        targets = (rewards == varibad_hyper.gridworld.GOAL_REWARD).float()
        errors = F.binary_cross_entropy_with_logits(picked, targets, reduction="none").view(shape)
        return (errors * mask).sum(1)
    transitions = [next_obs, obs, actions] if self.target == "reward" else [obs, actions]
    hidden = F.relu(self.first(torch.cat([m, *transitions], dim=-1)))
    truth = rewards if self.target == "reward" else next_obs
    return ((self.rest(hidden) - truth).square().mean(-1).view(shape) * mask).sum(1)


def vae_table(repetitions):
    rows = []
    for env in ("Grid-World", "Cheetah-Dir", "Walker", "Pick-Place"):
        args = varibad_hyper.make_args(env)
        envs = varibad_hyper.make_envs(args, 1)
        vae = varibad_hyper.Agent(envs, args).vae
        optimizer = torch.optim.Adam(vae.parameters())
        envs.envs.close()
        steps, size = envs.max_steps, args.vae_batch
        cells = torch.randint(0, 5, (2, steps, size, envs.obs_dim)).float()  # valid on Grid-World too
        batch = varibad_hyper.Batch(
            cells[0],
            torch.zeros(steps, size, envs.action_dim),
            torch.zeros(steps, size, 1),
            cells[1],
            torch.full((size,), steps),
        )

        def update(vae=vae, batch=batch, args=args, optimizer=optimizer):
            optimizer.zero_grad()
            varibad_hyper.elbo_loss(vae, batch, args.vae_subsample, args.kl_weight)[0].backward()
            optimizer.step()

        def update_expanded(update=update):
            originals = [varibad_hyper.Decoder.errors, varibad_hyper.CellDecoder.errors]
            varibad_hyper.Decoder.errors = varibad_hyper.CellDecoder.errors = expanded_errors
            update()
            varibad_hyper.Decoder.errors, varibad_hyper.CellDecoder.errors = originals

        def encode(vae=vae, batch=batch):
            vae.encoder(batch.actions, batch.next_obs, batch.rewards).sum().backward()

        times = median_times({"ours": update, "expanded": update_expanded, "encoder": encode}, repetitions)
        ratio = times["expanded"] / times["ours"]
        shares = [f"{100 * times['encoder'] / times['ours']:.0f}", f"{ratio:.1f}"]
        rows.append([f"{env}, {size} x {steps}", f"{1e3 * times['ours']:.1f}", *shares])
    print_table(["update", "ms", "of it the encoder, %", "speed-up over expanded"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["train", "growth", "sweep", "physics", "layer", "vae"]
    parser.add_argument("part", nargs="*", choices=[*parts, []], default=[], help="all but sweep by default")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, to see that it runs")
    parser.add_argument("--only", default="", help="only the runs of train, growth and sweep whose name contains this")
    parser.add_argument("--split", help=argparse.SUPPRESS)  # what the benchmark starts itself with
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.split:
        print(json.dumps(split_run(json.loads(args.split))))
        return
    torch.set_num_threads(1)
    if args.memory:
        layer_memory(args.memory[0], args.memory[1], int(args.memory[2]))
        return
    chosen = args.part or [part for part in parts if part != "sweep"]
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, mujoco {mujoco.__version__}; one thread where nothing else is said"
    )
    for part, runs in (("train", TRAINING), ("growth", GROWTH), ("sweep", SWEEP)):
        if part in chosen:
            runs = {name: flags for name, flags in runs.items() if args.only in name}
            train_table(runs, 1 if args.quick or part == "sweep" else 3)
    if "physics" in chosen:
        physics_table(16, 5 if args.quick else 50, 1 if args.quick else 5)
        meta_world_table(20 if args.quick else 200, 1 if args.quick else 5)
    if "growth" in chosen and not args.quick:
        physics_table(64, 15, 5)
        physics_table(256, 5, 5)
    if "layer" in chosen:
        layer_table([16] if args.quick else [16, 3200], 1 if args.quick else 5)
    if "vae" in chosen:
        vae_table(1 if args.quick else 9)


if __name__ == "__main__":
    main()
