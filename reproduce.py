"""The paper's tables and figures, from one command: declares their runs, does them side by side, draws the result.

    python reproduce.py figure1 --quick
    python reproduce.py table1 --envs Grid-World --total-timesteps 2e6 --learning-rates 3e-4 7e-4 2e-3

A run is a command line of `varibad_hyper.py` or `rl2_hyper.py`, which are started as they are. Every run has a folder
of its own; a finished one is known by its `result.json` and not repeated, another goes on from its checkpoint. Runs
are tasks of Ray where it is installed (`pip install -r requirements-optional.txt`; `--address` joins a cluster), else
processes of this machine. Finished runs are rows of `results/ENV.csv`; tables and figures are made from those rows.
With `--learning-rates`, runs with seeds of their own first choose the rate of every environment and method.
"""

import csv
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import tyro
from scipy.stats import ttest_ind
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# ---------------------------------------------------------------------------------------------------------------------
# The paper: methods, environments, values

V, R = "varibad_hyper.py", "rl2_hyper.py"
METHODS = {  # name on the command line: name in the paper, script, flags
    "standard": ("Standard", V, "--arch standard"),
    "kaiming": ("Kaiming", V, "--init kaiming"),
    "normc": ("Normc", V, "--init normc"),
    "orthogonal": ("Orthogonal", V, "--init orthogonal"),
    "hfi": ("HFI", V, "--init hfi"),
    "weight": ("Weight-HyperInit", V, "--init weight"),
    "bias": ("Bias-HyperInit", V, "--init bias"),
    "film-normc": ("FiLM, Normc", V, "--arch film --init normc"),
    "film": ("FiLM, Bias-HyperInit", V, "--arch film --init bias"),
    "rl2-standard": ("RL2, Standard", R, "--arch standard"),
    "rl2-hfi": ("RL2, HFI", R, "--init hfi"),
    "rl2": ("RL2, Bias-HyperInit", R, "--init bias"),
}
SIZES = {  # Figure 3: state features, hidden layers of the base network (supplementary material)
    "XS": "--state-features 64 --base-layers 64 32",
    "S": "--state-features 128 --base-layers 64 64",
    "M": "--state-features 128 --base-layers 128 64",
    "L": "--state-features 256 --base-layers 128 128",
    "XL": "--state-features 256 --base-layers 256 128",
    "XXL": "--state-features 1024 --base-layers 512 512",
}
PRESETS = {  # the scripts': frames of a run, of an iteration of VariBAD and of RL2; iterations between evaluations
    "Grid-World": (4_000_000, 960, 960, 50),
    "Cheetah-Dir": (100_000_000, 6400, 3200, 50),
    "Walker": (100_000_000, 3200, 3200, 50),
    "Ant-Dir": (100_000_000, 3200, 3200, 50),
    "Humanoid": (100_000_000, 12_800, 3200, 50),
    "Pick-Place": (50_000_000, 4800, 4800, 400),
    "ML10": (100_000_000, 4800, 4800, 2000),
}
PAPER = {  # target: method: a mean and a standard error for every environment, in the order of the paper's columns
    "table1": {
        "standard": "35.5 ± 0.4, 2104 ± 87, 1828 ± 38, 1167 ± 16, 1842 ± 233",
        "kaiming": "32.1 ± 1.2, 378 ± 169, 331 ± 37, 253 ± 86, 266 ± 23",
        "normc": "32.2 ± 0.5, 356 ± 134, 357 ± 60, 264 ± 106, 249 ± 18",
        "orthogonal": "34.9 ± 0.5, 1379 ± 310, 1687 ± 98, 1127 ± 93, 1126 ± 76",
        "hfi": "36.8 ± 0.2, 2218 ± 80, 1618 ± 130, 1370 ± 9, 1323 ± 57",
        "weight": "36.1 ± 0.5, 2066 ± 119, 1748 ± 57, 1346 ± 7, 1048 ± 21",
        "bias": "36.7 ± 0.2, 2300 ± 32, 1994 ± 67, 1328 ± 23, 1678 ± 162",
    },
    "table2": {  # success in %
        "standard": "4.4 ± 2.4, 10.2 ± 3.0",
        "hfi": "25.5 ± 14.5, 28.4 ± 6.0",
        "bias": "42.9 ± 16.3, 23.9 ± 6.2",
        "film-normc": "5.5 ± 4.8, -",
        "film": "34.2 ± 15.9, -",
        "rl2-standard": "-, 7.2 ± 5.0",
        "rl2-hfi": "-, 7.1 ± 2.4",
        "rl2": "-, 14.2 ± 7.2",
    },
}
BAYES_OPTIMAL = 38.3667  # the best return of a meta-episode of Grid-World (24 goals) without being told the goal
# What `--list` reckons with: frames per second of one run alone, without evaluations, as `python tests/bench.py sweep`
# printed them on 2026-11-28 on a machine with two cores (AMD EPYC). A run is one thread, and on Meta-World a worker
# process per environment besides, so that two side by side are slower there.
SPEED = {
    "Grid-World": {"hyper": 4280, "standard": 5570, "film": 5170, "rl2-hyper": 6200, "rl2-standard": 6890},
    "Cheetah-Dir": {"hyper": 3840, "standard": 7060},
    "Walker": {"hyper": 2810, "standard": 5020, "rl2-hyper": 2450},
    "Ant-Dir": {"hyper": 2220, "standard": 3720},
    "Humanoid": {"hyper": 1140, "standard": 2130},
    "Pick-Place": {"hyper": 469, "standard": 671, "film": 812},
    "ML10": {"hyper": 309, "standard": 958, "rl2-hyper": 288, "rl2-standard": 727},
}
SIZE_SPEED = {  # of Figure 3, in the order of SIZES
    "Cheetah-Dir": {"hyper": (5780, 4840, 3610, 2450, 1320, 235), "standard": (7250, 6090, 5550, 5070, 5200, 1580)},
    "Walker": {"hyper": (3510, 3100, 2240, 1810, 1160, 234), "standard": (4580, 3660, 4820, 4250, 3130, 1510)},
    "Grid-World": {"hyper": (2780, 2100, 1770, 1030), "standard": (4730, 4590, 3600, 3940)},
}
TABLE1 = ("Grid-World", "Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid")
TABLE2 = ("Pick-Place", "ML10")
FIGURE1 = ("standard", "kaiming", "hfi", "bias")
TARGETS = {  # its environments and methods, and those that --envs and --methods may choose from instead
    "figure1": (("Grid-World", "Cheetah-Dir"), FIGURE1, TABLE1, tuple(METHODS)),
    "table1": (TABLE1, tuple(PAPER["table1"]), TABLE1, tuple(METHODS)),
    "table2": (TABLE2, tuple(PAPER["table2"]), TABLE2, tuple(PAPER["table2"])),
    "figure3": (("Cheetah-Dir", "Walker"), ("standard", "bias"), TABLE1, ("standard", "bias")),
    "robustness": (("Grid-World",), FIGURE1, tuple(PRESETS), tuple(METHODS)),
}
BETTER = {  # what the paper, or its sequel on RL2, claims: a method, and those that it is better than
    "bias": ("kaiming", "normc", "orthogonal", "hfi", "standard"),
    "rl2": ("rl2-standard", "bias"),
}
QUICK = (("Grid-World",), FIGURE1, ("Grid-World",), tuple(METHODS))  # figure1 and table1 with --quick
SEEDS = {"Pick-Place": 10, "ML10": 3}  # 1 to this; elsewhere 5
QUICK_FRAMES, QUICK_SEEDS = 500_000, 2
EVALUATIONS = 50  # of a run, or more, so that the last tenth of training has five; the presets have more on long runs
TUNING_SEEDS = (11, 12)  # what chooses a learning rate; never among the seeds that are reported
UNREPORTED = (*TUNING_SEEDS, 13)  # seeds that no table shows, 13 being for trying things out


def short(rate: float) -> str:
    """0.0007 as 7e-4."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


@dataclass(frozen=True)
class Run:
    """One training run: `size` is one of SIZES; what is None is the preset's."""

    env: str
    method: str
    seed: int
    frames: int
    size: str | None = None
    learning_rate: float | None = None

    @property
    def cell(self) -> tuple[str, str, str | None]:
        """What one learning rate is chosen for."""
        return self.env, self.method, self.size

    @property
    def name(self) -> str:
        """The name of its folder."""
        size = [self.size] if self.size else []
        rate = [f"lr-{short(self.learning_rate)}"] if self.learning_rate else []
        return "__".join(map(str, [self.env, self.method, *size, self.seed, self.frames, *rate]))

    @property
    def command(self) -> list[str]:
        """The script and its flags, without --runs-dir."""
        _, script, flags = METHODS[self.method]
        _, varibad, rl2, eval_interval = PRESETS[self.env]
        # From 1e6 to 3e6 frames the same, since --resume allows more --total-timesteps but no other interval.
        counted = 1_000_000 if 1_000_000 <= self.frames <= 3_000_000 else self.frames
        every = max(1, counted // (rl2 if script == R else varibad) // EVALUATIONS)  # iterations
        flags = f"--env {self.env} {flags} {SIZES.get(self.size, '')} --seed {self.seed}"
        flags += f" --total-timesteps {self.frames}"
        # On Meta-World an evaluation is long, and Table 2 has only the last one.
        flags += f" --eval-interval {every}" if every < eval_interval and self.env not in TABLE2 else ""
        flags += f" --learning-rate {short(self.learning_rate)}" if self.learning_rate else ""
        return [script, *flags.split()]


Rows = dict[Run, dict[str, str]]  # what is known of finished runs
Returns = dict[tuple, dict[float, list[float]]]  # of a cell and learning rate, by tuning seed
Cells = dict[tuple[str, str], list[float]]  # what a table shows of an environment and method, by seed


def paper_value(target: str, env: str, method: str) -> str:
    """What the paper's table says, "-" where it has no such cell."""
    cells = PAPER[target].get(method, "").split(", ")
    return dict(zip(TARGETS[target][0], cells, strict=False)).get(env, "-") or "-"


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and the list of runs


@dataclass
class Args:
    target: tyro.conf.Positional[Literal["figure1", "table1", "table2", "figure3", "robustness", "readme"]]
    """which runs to do and draw; robustness: only the runs that choose a learning rate, return against rate;
    readme: none, it makes the tables of README.md and docs/, and the pictures, from the rows in results/"""
    list: bool = False  # print the commands and what they cost, and run nothing
    quick: bool = False  # a small cut of figure1 or table1: Grid-World, four methods, at the rates that results/ chose
    envs: tuple[str, ...] = ()  # environments instead of the target's own
    methods: tuple[str, ...] = ()
    """methods instead of the target's own; figure1 and table1 also have the paper's others, FiLM and RL2"""
    sizes: tuple[Literal["XS", "S", "M", "L", "XL", "XXL"], ...] = ()  # figure3: base networks instead of all six
    seeds: tuple[int, ...] = ()  # instead of the paper's 1 to 5 (Pick-Place 10, ML10 3), or of --quick's 1 and 2
    total_timesteps: float | None = None  # frames of every run instead of the preset's; 2e6 is understood
    learning_rates: tuple[float, ...] = ()
    """learning rates of which seeds 11 and 12 choose one for every environment and method (none: the preset's)"""
    tuning_timesteps: float | None = None  # frames of the runs that choose the learning rate, if not the same
    executor: Literal["auto", "ray", "local"] = "auto"  # Ray, or processes of this machine; auto: Ray if installed
    address: str | None = None
    """an existing Ray cluster to join, for example auto or 10.0.0.1:6379; its nodes must share this folder"""
    workers: int = 0  # runs side by side on this machine, each on one thread (0: one per core)
    retries: int = 2  # how often a run that fails, or whose node dies, is taken up again from its checkpoint
    runs_dir: str = "runs/reproduce"  # the folder of the runs' folders; on a cluster a path that all nodes share
    results_dir: str = "results"  # where rows, tables and figures go


def fail(sentence: str) -> NoReturn:
    """Ends the program with one sentence on stderr and exit status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


TOLD: set[str] = set()  # not functools.cache, which Ray cannot take to another process


def note(sentence: str) -> None:
    """Tells something that changes no result, once."""
    if sentence not in TOLD:
        print(f"note: {sentence}", file=sys.stderr)
    TOLD.add(sentence)


def check_args(args: Args) -> None:
    """Refuses what the target does not have."""
    name = f"{args.target}{' --quick' if args.quick else ''}"
    _, _, envs, methods = QUICK if args.quick else TARGETS[args.target]
    if args.quick and args.target not in ("figure1", "table1"):
        fail("--quick is a cut of figure1 and table1: cut others by --envs, --methods, --seeds and --total-timesteps.")
    for flag, values, known in (("--envs", args.envs, envs), ("--methods", args.methods, methods)):
        if unknown := [value for value in values if value not in known]:
            fail(f"{name} has no {flag} {unknown[0]}: choose from {', '.join(known)}.")
    for flag, count in (("--total-timesteps", args.total_timesteps), ("--tuning-timesteps", args.tuning_timesteps)):
        if count is not None and not (count.is_integer() and count > 0):
            fail(f"{flag} {count} is not a whole number of frames: write it like 2000000 or 2e6.")
    if not all(0 < rate < math.inf for rate in args.learning_rates):
        fail("--learning-rates must be more than 0.")
    if args.learning_rates and set(args.seeds) & set(TUNING_SEEDS):
        fail("seeds 11 and 12 choose the learning rate and are not reported: leave them out of --seeds.")
    if args.tuning_timesteps and not args.learning_rates:
        fail("--tuning-timesteps is about the runs of --learning-rates: give these too, or leave it out.")
    if args.learning_rates and args.quick:
        fail("--quick takes the learning rates that results/ chose: leave --learning-rates out, or --quick.")
    if args.target == "robustness" and (not args.learning_rates or args.seeds):
        fail("robustness needs --learning-rates, and its seeds are 11 and 12: leave --seeds out.")
    if min(args.workers, args.retries, *args.seeds, 0) < 0:
        fail("--seeds, --workers and --retries must be 0 or more.")
    if args.sizes and args.target != "figure3":
        fail(f"{args.target} has no --sizes: leave it out, or choose figure3.")


def make_runs(args: Args) -> list[Run]:
    """The reported runs of the target at the presets' learning rates, seed by seed so that all cells fill evenly."""
    check_args(args)
    own_envs, own_methods, _, _ = QUICK if args.quick else TARGETS[args.target]
    envs, runs = args.envs or own_envs, []
    for seed in args.seeds or range(1, 11):
        for env in envs:
            if not args.seeds and seed > (QUICK_SEEDS if args.quick else SEEDS.get(env, 5)):
                continue
            frames = int(args.total_timesteps or (QUICK_FRAMES if args.quick else PRESETS[env][0]))
            for method in args.methods or own_methods:
                if args.target != "table2" or paper_value("table2", env, method) != "-":  # else no cell of the paper
                    sizes = (args.sizes or tuple(SIZES)) if args.target == "figure3" else (None,)
                    runs += [Run(env, method, seed, frames, size) for size in sizes]
    if not runs:
        fail(f"{args.target} has no such cell: {', '.join(args.methods)} on {', '.join(envs)}.")
    return list(dict.fromkeys(runs))


def make_tuning_runs(args: Args, runs: Sequence[Run]) -> list[Run]:
    """The runs that choose a learning rate for every cell of `runs`; none without --learning-rates."""
    tuning = []
    for seed in TUNING_SEEDS:
        for run in runs:
            of_seed = replace(run, seed=seed, frames=int(args.tuning_timesteps or run.frames))
            tuning += [replace(of_seed, learning_rate=rate) for rate in args.learning_rates]
    return list(dict.fromkeys(tuning))


def returns_by_rate(rows: Rows, tuning: Sequence[Run]) -> Returns:
    """The return of every tuning run, by cell and learning rate; no cell of which a run is missing."""
    returns: Returns = {}
    missing = {run.cell for run in tuning if run not in rows}
    for run in sorted(tuning, key=lambda run: (by_table(replace(run, seed=0)), run.learning_rate, run.seed)):
        if run.cell not in missing:
            returns.setdefault(run.cell, {}).setdefault(run.learning_rate, []).append(float(rows[run]["return"]))
    return returns


def choose_rates(returns: Returns) -> dict[tuple, float]:
    """For every cell the rate with the largest return, mean over the tuning seeds; of equal ones the smallest."""
    return {cell: min(by_rate, key=lambda r, of=by_rate: (-np.mean(of[r]), r)) for cell, by_rate in returns.items()}


def with_rates(runs: Sequence[Run], rates: dict[tuple, float]) -> list[Run]:
    """The runs at the rates chosen for their cells, else at the preset's."""
    return [replace(run, learning_rate=rates.get(run.cell)) for run in runs]


def speed(run: Run) -> float | None:
    """Frames per second of one run alone as measured, None where that is not known."""
    _, script, flags = METHODS[run.method]
    arch = flags.split()[1] if flags.startswith("--arch") else "hyper"
    if run.size:
        return dict(zip(SIZES, SIZE_SPEED.get(run.env, {}).get(arch, ()), strict=False)).get(run.size)
    return SPEED[run.env].get(f"rl2-{arch}" if script == R else arch)


def duration(hours: float) -> str:
    """Minutes below an hour."""
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:,.1f} h"


def print_list(runs: Sequence[Run], args: Args) -> None:
    """Every command with its cost; then the sum."""
    costs = [run.frames / rate / 3600 if (rate := speed(run)) else None for run in runs]  # hours
    for run, cost in zip(runs, costs, strict=True):
        end = "  done" if find_result(Path(args.runs_dir) / run.name) else ""
        if args.learning_rates and not run.learning_rate:
            end = " --learning-rate (chosen by the tuning runs)"
        text = "?" if cost is None else duration(cost)
        print(f"{run.frames:12,} frames {text:>9}  python {shlex.join(run.command)}{end}")
    hours, cores, unknown = sum(filter(None, costs)), args.workers or CORES, costs.count(None)
    longest = max([hours / cores, *filter(None, costs)])  # no run is shared by two cores
    print(
        f"{len(runs)} runs, {sum(run.frames for run in runs):,} frames: {duration(hours)} one after the other, "
        f"{duration(longest)} {cores} side by side, evaluations apart"
        + (f", without {unknown} runs of unmeasured speed" if unknown else "")
    )


# ---------------------------------------------------------------------------------------------------------------------
# One run, on whatever machine


class RunFailed(Exception):
    """A run ended without a result, with this exit status (2: its arguments were refused) and these last lines."""

    def __str__(self) -> str:
        return "exit status {}\n{}".format(*self.args)


def find_result(folder: Path) -> dict[str, Any] | None:
    """The result.json of a run's folder, if it is finished."""
    paths = sorted(folder.glob("*/result.json"))
    return json.loads(paths[-1].read_bytes()) | {"folder": paths[-1].parent.name} if paths else None


def lock_file(file: Any, how: int) -> None:
    """Locks an open file. Raises BlockingIOError if somebody else has it."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:  # NFS or Lustre without locks
        note(f"{file.name} cannot be locked ({error.strerror}): start no second sweep in these folders.")


def describe_machine() -> dict[str, str]:
    """What a row tells of where its run was done."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = (re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [cpu])[0]
    try:
        git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
        ours = git(["git", "ls-files", "--error-unmatch", "reproduce.py"]).returncode == 0  # not a folder around us
        commit = git(["git", "describe", "--always"]).stdout.strip() if ours else ""
        changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
        commit += "-dirty" if commit and changed else ""
    except OSError:  # a machine without git
        commit = ""
    machine = f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    return {"machine": machine, "python": platform.python_version(), "commit": commit}


def note_machine(folder: Path) -> None:
    """Adds this machine to machine.json; of a run that was done in pieces every one is kept."""
    path, here = folder / "machine.json", describe_machine()
    before = json.loads(path.read_bytes()) if path.exists() else here
    both = {k: before[k] if v in before[k].split("; ") else f"{before[k]}; {v}" for k, v in here.items()}
    path.with_suffix(".new").write_text(json.dumps(both))
    path.with_suffix(".new").replace(path)


def command_line(run: Run, folder: Path) -> list[str]:
    """What is to be started for a run: the script, or the script from its last checkpoint."""
    checkpoints = sorted(folder.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        return [run.command[0], "--resume", str(checkpoints[-1].parent)]
    return [*run.command, "--runs-dir", str(folder)]


# Started before a script: on Linux the system sends it SIGTERM when the thread that started it ends, for any reason.
DIE_TOGETHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""


def execute(run: Run, folder: Path, stop_file: Path) -> dict[str, str] | None:
    """Does one run in its folder, from its last checkpoint if there is one, and returns its row. Raises RunFailed.

    If this process dies, on Linux so does the script, at a checkpoint; it inherits the lock, so that whoever takes up
    the run waits for that. (It also locks its own folder, inside this one, against anyone who resumes it by hand.)
    Where `stop_file` appears, the run is stopped at a checkpoint, and None is returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        while not stop_file.exists():
            with suppress(BlockingIOError):
                lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.5)
        if find_result(folder) is not None:
            return make_row(run, folder)
        if stop_file.exists():
            return None
        note_machine(folder)
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", DIE_TOGETHER, sys.executable, "-u", *command_line(run, folder)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches the script through this process alone, once
                pass_fds=(lock.fileno(),),
            )
            while process.poll() is None:
                if stop_file.exists():
                    process.terminate()  # the script stops after its iteration, at a checkpoint
                    process.wait()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
        if find_result(folder) is not None:
            return make_row(run, folder)
        if stop_file.exists():
            return None
        raise RunFailed(process.returncode, last_lines(folder / "log.txt"))


def last_lines(path: Path, count: int = 5) -> str:
    """The end of a log, without the progress bar's earlier states, indented."""
    lines = [line.rpartition("\r")[2].strip() for line in path.read_bytes().decode(errors="replace").split("\n")]
    return "\n".join(f"    {line}" for line in [line for line in lines if line][-count:])


def frames_so_far(folder: Path) -> int:
    """Frames that an unfinished run has done, by the last evaluation in its log."""
    with suppress(FileNotFoundError), open(folder / "log.txt", "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 100_000))
        if told := re.findall(rb"([\d,]+) frames: ", log.read()):
            return int(told[-1].replace(b",", b""))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Rows of results/ENV.csv

COLUMNS = (
    *("env", "method", "size", "seed", "frames", "return", "last_return", "return_stderr", "episode_returns"),
    *("test_return", "test_success", "parameters", "base_parameters", "curve"),
    *("wall_time", "SPS", "started", "machine", "python", "versions", "commit", "command", "args"),
)


def final_return(curve: Sequence[Sequence[float]]) -> float:
    """Mean return of the evaluations of the last tenth of training, at least of the last one."""
    return float(np.mean([value for frames, value in curve if frames > 0.9 * curve[-1][0] or frames == curve[-1][0]]))


def make_row(run: Run, folder: Path) -> dict[str, str]:
    """The row of a finished run: what it reached, where, and everything needed to repeat it.

    return: of the meta-episode, mean over the evaluations of the last tenth of training; last_return: of the last
    evaluation alone, mean over its tasks, and return_stderr its standard error over them. Also of the last evaluation
    alone, by episode: episode_returns and test_success (%), which the curve does not have. curve: (frames, return) of
    every evaluation; wall_time: s; args: all of the script's.
    """
    result = find_result(folder)
    frames = result["args"].get("total_timesteps", run.frames)
    if frames != run.frames:  # somebody has resumed it with more
        fail(f"the run in {folder} has {frames:,.0f} frames: move it away, or choose another --runs-dir.")
    where = json.loads((folder / "machine.json").read_bytes())
    total = result["evaluation"]["meta_episodic_return"]
    test = result.get("test_evaluation") or {}
    started = datetime.fromtimestamp(int(re.search(r"__(\d+)$", result["folder"])[1]), timezone.utc)
    own = {"runs_dir", "exp_name", "resume", "evaluate"}  # say where it lies, not what it is
    interval = f"--eval-interval {result['args']['eval_interval']}"  # its own, whatever this version would choose
    values = {
        **{"env": run.env, "method": run.method, "size": run.size or "", "seed": run.seed, "frames": result["frames"]},
        "return": final_return(result["eval_history"]),
        "last_return": total["mean"],
        "return_stderr": total["stderr"],
        "episode_returns": [v["mean"] for k, v in result["evaluation"].items() if k.startswith("episodic_return_ep")],
        "test_return": test["meta_episodic_return"]["mean"] if test else "",
        "test_success": [v["mean"] for k, v in test.items() if k.startswith("success_ep")] if test else "",
        "parameters": result["parameters"]["total"],
        "base_parameters": result["parameters"]["base_network"],
        "curve": result["eval_history"],
        "wall_time": round(result["wall_time"], 1),
        "SPS": round(result["SPS"]),
        "started": started.isoformat(),
        **where,
        "versions": result["versions"],
        "command": re.sub(r"--eval-interval \d+", interval, shlex.join(run.command)),
        "args": {name: value for name, value in result["args"].items() if name not in own},
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def run_of(row: dict[str, str]) -> Run:
    """The run that a row is of. Raises ValueError or KeyError if a value of the row cannot be read."""
    for name in ("frames", "return", "last_return", "parameters", "base_parameters", "wall_time"):
        float(row[name])
    for name in ("episode_returns", "curve", "versions", "args"):
        json.loads(row[name])
    flags = row["command"].split()
    values = dict(zip(flags, flags[1:], strict=False))
    rate = values.get("--learning-rate")
    counts = int(values["--seed"]), int(values["--total-timesteps"])
    return Run(row["env"], row["method"], *counts, row["size"] or None, rate and float(rate))


def trained_by(command: str) -> str:
    """The command without the interval of the evaluations, which do not touch the training."""
    return re.sub(r" --eval-interval \d+", "", command)


def read_rows(results_dir: Path, without: Iterable[Run] = ()) -> Rows:
    """The last row of every run in results_dir/*.csv, `without` some.

    Skips what a full disk left of a row, and commands that are no longer a method's; how often a run was evaluated does
    not matter. Refuses other columns.
    """
    csv.field_size_limit(10**8)
    rows: Rows = {}
    for path in sorted(results_dir.glob("*.csv")):
        header, *lines = path.read_bytes().split(b"\n")  # no value has a newline
        if header and header.decode(errors="replace") != ",".join(COLUMNS):
            fail(f"{path} has other columns than this version writes: move it away, or choose another --results-dir.")
        for number, line in enumerate(lines, 2):
            try:
                row = dict(zip(COLUMNS, *csv.reader([line.decode()]), strict=True)) if line else None
                run = row and run_of(row)
            except (ValueError, KeyError, TypeError, csv.Error):
                note(f"line {number} of {path} is damaged and is skipped.")
                continue
            if row and trained_by(row["command"]) == trained_by(shlex.join(run.command)) and run not in without:
                rows[run] = row
    return rows


def append_row(row: dict[str, str], results_dir: Path) -> None:
    """Adds a row to its environment's file, unless it is there; sweeps side by side wait for each other."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerow(row)
    path = results_dir / f"{row['env']}.csv"
    with open(path, "a+", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lock_file(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()
        if not before:
            file.write(",".join(COLUMNS) + "\n")
        elif not before.endswith("\n"):  # a full disk cut the last row off
            file.write("\n")
        if text.getvalue() not in before:
            file.write(text.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


Executor = tuple[str, Callable[[Run, Path, Path], Future]]  # its name, submit(run, folder, stop_file) of `execute`


def ray_executor(workers: int, address: str | None) -> Executor:
    """Tasks of Ray, one core each: of a cluster, or of this machine, where Ray is started with `workers` cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    own = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        if address and ":" in address.rpartition("//")[2]:  # Ray itself tries a dead one for many minutes
            host, _, port = address.rpartition("//")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **own)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        where = f"no Ray cluster answers at --address {address}" if address else "Ray does not start on this machine"
        fail(f"{where} ({error}): start one with `ray start --head`, or use --executor local.")
    task = ray.remote(num_cpus=1, max_retries=0)(execute)  # `sweep` itself submits again what was lost
    name = f"Ray, {address or f'{workers} cores'}"
    return name, lambda *of: task.remote(*of).future()


def make_executor(args: Args) -> Executor:
    """Ray or processes, as the command line says; makes the folders too."""
    if args.address and args.executor == "local":
        fail("--address is a Ray cluster's: leave it out, or --executor local.")
    with_ray = args.executor == "ray" or bool(args.address) or (args.executor == "auto" and find_spec("ray"))
    if with_ray and find_spec("ray") is None:
        fail("Ray is not installed: pip install -r requirements-optional.txt, or leave --executor and --address out.")
    try:
        for folder in (args.runs_dir, args.results_dir):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder) as file:
                file.write(bytes(2**16))  # there is room for a row
    except OSError as error:
        where = error.filename or folder
        fail(f"cannot write to {where} ({error.strerror}): choose another --runs-dir or --results-dir.")
    workers = args.workers or CORES
    if with_ray:
        return ray_executor(workers, args.address)
    pool = ThreadPoolExecutor(workers)  # each thread watches a process
    return f"{workers} processes", partial(pool.submit, execute)


@contextmanager
def watching_signals() -> Iterator[list[int]]:
    """Collects Ctrl-C, SIGTERM, SIGHUP in a list; a second one ends this program at once (on Linux its scripts too)."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    before = {number: old for number in numbers if (old := signal.getsignal(number)) != signal.SIG_IGN}
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        for any_of_them in before:
            signal.signal(any_of_them, signal.SIG_DFL)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sweep(runs: Sequence[Run], executor: Executor, args: Args, signals: Sequence[int]) -> dict[Run, str]:
    """Does the runs that are not finished, appends the rows of all, and returns what failed and why.

    What fails or loses its machine is submitted again, --retries times, and goes on from its checkpoint wherever it
    lands. As soon as there is one of `signals`, everything stops at a checkpoint.
    """
    runs_dir, results_dir, (name, submit) = Path(args.runs_dir).resolve(), Path(args.results_dir), executor
    folders = {run: runs_dir / run.name for run in runs}
    stop_file = runs_dir / f"stop-{os.getpid()}-{int(time.time())}"  # seen wherever the runs' folders are
    read_rows(results_dir)  # refuses a file that no row can be added to
    done = [run for run in runs if find_result(folders[run]) is not None]
    for run in done:
        append_row(make_row(run, folders[run]), results_dir)
    failed: dict[Run, str] = {}
    attempts: Counter[Run] = Counter()

    def frames_done() -> int:
        left = [run for run in runs if run not in done and run not in failed]
        return sum(run.frames for run in done) + sum(frames_so_far(folders[run]) for run in left)

    total = sum(run.frames for run in runs)
    bar = tqdm(total=total, initial=frames_done(), unit="frames", unit_scale=True, smoothing=0)
    bar.write(f"{len(runs)} runs, {len(done)} of them done; {name}; folders in {args.runs_dir}")
    pending = {submit(run, folders[run], stop_file): run for run in runs if run not in done}
    try:
        while pending and not signals:
            for future in wait(pending, timeout=2, return_when=FIRST_COMPLETED).done:
                run = pending.pop(future)
                error = future.exception()
                error = getattr(error, "cause", error)  # Ray wraps what a task raises
                if error is None:
                    row = future.result()
                    try:
                        append_row(row, results_dir)
                    except OSError as why:  # a full disk
                        failed[run] = f"its row could not be written ({why}). The run is finished: once there is room, "
                        failed[run] += "the same command adds the row."
                        continue
                    done.append(run)
                    bar.write(f"done: {run.name}: return {float(row['return']):.2f}, {row['wall_time']} s")
                elif attempts[run] < args.retries and not (isinstance(error, RunFailed) and error.args[0] == 2):
                    attempts[run] += 1
                    first_line = str(error).partition("\n")[0]
                    bar.write(f"again: {run.name}: {type(error).__name__}: {first_line}")
                    pending[submit(run, folders[run], stop_file)] = run
                else:
                    failed[run] = f"{type(error).__name__}: {error}"
                    bar.write(f"failed: {run.name}")
            bar.n = frames_done()
            bar.set_postfix_str(f"{len(done)} runs done, {len(pending)} to go, {len(failed)} failed")
    finally:
        if pending:  # Ctrl-C, or an error here
            stop_file.touch()
            with suppress(OSError):  # whoever read the output may have gone
                bar.write("stopping: every run writes a checkpoint")
            wait(pending)
            stop_file.unlink()
        bar.close()
    if pending:
        what = f"stopped, {len(done)} of {len(runs)} runs are done"
        print(f"{what}; the same command goes on from there.", file=sys.stderr)
        raise SystemExit(128 + signals[0])
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and tables

MIN_SEEDS = 3  # fewer are not tested


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt(n); nan for one value)."""
    stderr = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), stderr


def mean_text(values: Sequence[float], digits: int = 1) -> str:
    mean, stderr = mean_and_stderr(values)
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of n p-values: the smallest times n, the next times n - 1, and so on.

    None is less than a corrected one before it, or more than 1.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = largest
    return corrected


class Comparison(NamedTuple):
    """A method of a group against the best one: difference of means with half the width of its 95% interval; p-values.

    `corrected` is p after Holm's correction; `margin` is not corrected.
    """

    group: Any
    method: str
    best: str
    difference: float
    margin: float
    p: float
    corrected: float


def compare(groups: dict[Any, dict[str, Sequence[float]]]) -> list[Comparison]:
    """Compares the methods of each group with the one of the highest mean: Welch's t-test, two-tailed.

    Only those with MIN_SEEDS values and more take part. The correction is over the comparisons of all groups.
    """
    found = []
    for group, cells in groups.items():
        tested = {method: values for method, values in cells.items() if len(values) >= MIN_SEEDS}
        best = max(tested, key=lambda method, tested=tested: np.mean(tested[method]), default=None)
        for method in [method for method in tested if method != best]:
            a, b = tested[method], tested[best]
            difference, margin, p = float(np.mean(a) - np.mean(b)), 0.0, float(a[0] == b[0])
            if np.ptp(a) or np.ptp(b):  # else there is no variance to test with
                test = ttest_ind(a, b, equal_var=False)
                margin, p = float(test.confidence_interval().high) - difference, float(test.pvalue)
            found.append((group, method, best, difference, margin, p))
    return [Comparison(*of, p) for of, p in zip(found, holm([of[-1] for of in found]), strict=True)]


def bold_cells(comparisons: Sequence[Comparison]) -> set[tuple[Any, str]]:
    """(group, method) of every best method, and of those that are not worse after the correction (p = 0.05)."""
    same = {(c.group, c.method) for c in comparisons if c.corrected >= 0.05}
    return same | {(c.group, c.best) for c in comparisons}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table, "" of no lines; the first `left` columns are aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)) if lines else ""


def table_cells(rows: Rows, runs: Sequence[Run], target: str) -> tuple[Cells, list[Comparison]]:
    """By environment and method, the return of every run, or in Table 2 the success in % on test tasks, last episode.

    The return is the mean over the last tenth of training, the success that of the last evaluation alone. In an
    environment the methods of one script are compared.
    """
    cells: Cells = {}
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in [run for run in runs if run in rows]:
        value = json.loads(rows[run]["test_success"])[-1] if target == "table2" else float(rows[run]["return"])
        cell = cells.setdefault((run.env, run.method), [])
        cell.append(value)
        groups.setdefault((run.env, METHODS[run.method][1]), {})[run.method] = cell
    return cells, compare(groups)


def make_table(rows: Rows, runs: Sequence[Run], target: str) -> str:
    """Markdown: a row per method, and per environment our mean +- standard error over seeds and the paper's.

    A cell of a chosen learning rate says which, and how many seeds it has; so does one of other than the paper's
    number. One of too few for a test also says that.
    """
    methods = [method for method in METHODS if any(run.method == method for run in runs)]
    cells, comparisons = table_cells(rows, runs, target)
    bold = {(env, method) for (env, _), method in bold_cells(comparisons)}
    header, lines = ["method"], [[METHODS[method][0]] for method in methods]
    for env in dict.fromkeys(run.env for run in runs):
        frames = sorted({run.frames for run in runs if run.env == env})
        header += [f"{env}, {' and '.join(f'{count:,}' for count in frames)} frames", "paper"]
        for line, method in zip(lines, methods, strict=True):
            of_cell = [run for run in runs if (run.env, run.method) == (env, method)]
            rates = sorted({run.learning_rate for run in of_cell} - {None})
            values, text = cells.get((env, method), []), "-"
            if values:
                text = mean_text(values, 1 if env in ("Grid-World", *TABLE2) else 0)
                text = f"**{text}**" if (env, method) in bold else text
            if values and (rates or len(values) != SEEDS.get(env, 5)):
                of_all = f" of {len(of_cell)}" if len(values) < len(of_cell) else ""
                few = ["too few to test"] if len(values) < MIN_SEEDS else []
                notes = [f"{len(values)}{of_all} seed{'s' if len(of_cell) > 1 else ''}", *few, *map(short, rates)]
                text += f" ({', '.join(notes)})"
            line += [text, paper_value(target, env, method)]
    return markdown(header, lines)


def make_comparison_table(rows: Rows, runs: dict[str, Sequence[Run]]) -> str:
    """Markdown: every comparison of the tables, with its p-value before and after the correction."""
    lines = []
    for target, of_target in runs.items():
        for c in table_cells(rows, of_target, target)[1]:
            names = [target.replace("table", "Table "), c.group[0], METHODS[c.method][0], METHODS[c.best][0]]
            lines.append([*names, f"{c.difference:.2f} ± {c.margin:.2f}", f"{c.p:.2g}", f"{c.corrected:.2g}"])
    header = ["table", "environment", "method", "best method", "difference of means", "p", "corrected p"]
    return markdown(header, lines, left=4)


def frames_to_36(rows: Rows, runs: Sequence[Run]) -> Cells:
    """How soon a run on Grid-World learns: frames at its first evaluation of 36 or more, else at its last one."""
    cells: Cells = {}
    for run in [run for run in runs if run.env == "Grid-World" and run in rows]:
        curve = json.loads(rows[run]["curve"])
        first = next((frames for frames, value in curve if value >= 36), curve[-1][0])
        cells.setdefault((run.env, run.method), []).append(first)
    return cells


def make_claims_table(cells: Cells) -> str:
    """Markdown: Welch's t-test of every pair in BETTER, Holm's correction over all environments."""
    pairs = [(env, method, other) for env in TABLE1 for method in BETTER for other in BETTER[method]]
    groups = {(env, *pair): {method: cells.get((env, method), []) for method in pair} for env, *pair in pairs}
    lines = []
    for c in compare(groups):
        env, method, other = c.group
        difference = c.difference if c.method == method else -c.difference
        names = [env, METHODS[method][0], METHODS[other][0]]
        digits = 2 if abs(difference) < 1e4 else 0
        interval = f"{difference:,.{digits}f} ± {c.margin:,.{digits}f}"
        lines.append([*names, interval, f"{c.p:.2g}", f"{c.corrected:.2g}"])
    header = ["environment", "method", "against", "difference of means", "p", "corrected p"]
    return markdown(header, lines, left=3)


def make_rate_table(rows: Rows, tuning: Sequence[Run]) -> str:
    """Markdown: the return by learning rate, mean (both seeds), the chosen rate's bold, † at an end."""
    returns, frames = returns_by_rate(rows, tuning), {run.cell: run.frames for run in tuning}
    chosen, rates = choose_rates(returns), sorted({rate for by_rate in returns.values() for rate in by_rate})
    lines = []
    for cell, by_rate in returns.items():
        line = [cell[0], ", ".join(filter(None, (METHODS[cell[1]][0], cell[2]))), f"{frames[cell]:,}"]
        for rate in rates:
            values = by_rate.get(rate, [])
            text = f"{np.mean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})" if values else "-"
            end = " †" if len(by_rate) > 1 and rate in (min(by_rate), max(by_rate)) else ""
            line.append(f"**{text}**{end}" if rate == chosen[cell] else text)
        lines.append(line)
    return markdown(["environment", "method", "frames", *map(short, rates)], lines, left=2)


# ---------------------------------------------------------------------------------------------------------------------
# Figures

# The same for an initialisation in every picture (FiLM has its own); RL2's lines are dashed.
COLORS = dict(zip(METHODS, ("C7", "C3", "C1", "C6", "C2", "C4", "C0", "C8", "C5", "C7", "C2", "C0"), strict=True))
DASHES = {method: "--" if script == R else "-" for method, (_, script, _) in METHODS.items()}


def rows_of(rows: Rows, runs: Iterable[Run], **fields: Any) -> list[dict[str, str]]:
    """The rows of those runs whose fields have these values."""
    chosen = [run for run in runs if all(getattr(run, name) == value for name, value in fields.items())]
    return [rows[run] for run in chosen if run in rows]


def mean_curve(rows: Sequence[dict[str, str]]) -> np.ndarray:
    """(frames, mean, standard error over seeds) of every evaluation that all rows have, [points, 3]."""
    curves = [dict(json.loads(row["curve"])) for row in rows]
    frames = sorted(set.intersection(*map(set, curves)))
    return np.array([(step, *mean_and_stderr([curve[step] for curve in curves])) for step in frames])


def save(figure: Any, path: Path) -> None:
    """Writes path.png and path.svg."""
    figure.savefig(path.with_suffix(".png"), dpi=100, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def draw_curves(axis: Any, rows: Rows, env: str) -> None:
    """Figure 1: return against frames, mean and standard error over seeds."""
    for method in [method for method in METHODS if rows_of(rows, rows, method=method)]:
        of_method = rows_of(rows, rows, method=method)
        frames, mean, stderr = mean_curve(of_method).T
        look = {"color": COLORS[method], "marker": "o" * (len(frames) < 9), "label": METHODS[method][0]}
        axis.plot(frames, mean, DASHES[method], **look)
        if len(of_method) > 1:
            axis.fill_between(frames, mean - stderr, mean + stderr, color=COLORS[method], alpha=0.2, lw=0)
    if env == "Grid-World":
        axis.axhline(BAYES_OPTIMAL, color="black", ls=":", lw=1)
        axis.text(0, BAYES_OPTIMAL, f" Bayes-optimal {BAYES_OPTIMAL:.2f}", va="bottom", fontsize=8)
    seeds = sorted(set(Counter(run.method for run in rows).values()))
    axis.set_title(f"{env}, {' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}")
    axis.set(xlabel="frames", xlim=(0, None))
    axis.xaxis.set_major_formatter(lambda frames, _: f"{frames / 1e6:g}M" if frames else "0")


def draw_sizes(axis: Any, rows: Rows, env: str, column: str) -> None:
    """Figure 3: return against the parameters in `column`, mean and standard error over seeds."""
    for method in [method for method in METHODS if rows_of(rows, rows, method=method)]:
        by_size = {size: of for size in SIZES if (of := rows_of(rows, rows, method=method, size=size))}
        x = [int(of[0][column]) for of in by_size.values()]
        returns = [[float(row["return"]) for row in of] for of in by_size.values()]
        mean, stderr = np.nan_to_num([mean_and_stderr(values) for values in returns]).T
        axis.errorbar(x, mean, stderr, fmt="o-", capsize=3, color=COLORS[method], label=METHODS[method][0])
        for size, values, *at in zip(by_size, returns, x, mean, strict=True):
            label = f"{size}{'' if len(values) > 1 else ' (1 seed)'}"
            axis.annotate(label, at, (4, 4), textcoords="offset points", fontsize=8)
    axis.margins(x=0.2)  # for the labels
    axis.set_xscale("log")
    axis.set_xlabel(f"parameters of the {'base network' if column == 'base_parameters' else 'whole model'}")


def draw_rates(axis: Any, rows: Rows, env: str) -> None:
    """Robustness: return against learning rate, the tuning seeds' mean (line) and each of them (points)."""
    for (_, method, _), by_rate in returns_by_rate(rows, list(rows)).items():
        points = np.array(list(by_rate.values()))  # [rates, seeds]
        axis.plot(list(by_rate), points.mean(1), DASHES[method], color=COLORS[method], label=METHODS[method][0])
        axis.plot(list(by_rate), points, "x" if DASHES[method] == "--" else "o", ms=4, color=COLORS[method])
    rates = sorted({run.learning_rate for run in rows})
    axis.set(xscale="log", xlabel="learning rate")
    axis.set_xticks(rates, [short(rate) for rate in rates])
    axis.minorticks_off()


FIGURES = {  # what draws a panel of an environment; what else the panels differ in; what the legend explains
    "figure1": (draw_curves, [()], "mean; band: standard error over seeds"),
    "figure3": (draw_sizes, [("base_parameters",), ("parameters",)], "mean and standard error over seeds"),
    "robustness": (draw_rates, [()], "line: mean; points: seeds"),
}


def draw_figure(target: str, rows: Rows, path: Path) -> None:
    """The target's panels, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none"})  # the same rows give the same file
    import matplotlib.pyplot as plt

    draw_panel, more, legend = FIGURES[target]
    panels = [(env, of) for env in PRESETS if rows_of(rows, rows, env=env) for of in more]
    size = (max(5.5 * min(len(panels), 2), 3.7 * len(panels)), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    lines: dict[str, Any] = {}  # by method
    for axis, (env, of) in zip(axes[0], panels, strict=True):
        axis.set_title(env)
        draw_panel(axis, {run: row for run, row in rows.items() if run.env == env}, env, *of)
        bottom, top = axis.dataLim.intervaly
        if top > 0:  # a method that collapses leaves the picture, so that the others can be told apart
            bottom = max(bottom, -top / 2)
        margin = 0.05 * (top - bottom) or 1
        axis.set_ylim(bottom - margin, top + margin)
        lines |= {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0, 0].set_ylabel("return of a meta-episode")
    columns = 3 if len(panels) == 1 else 6
    text = {"title": legend, "title_fontsize": 8, "fontsize": 8}
    figure.legend(lines.values(), lines, ncols=columns, loc="outside lower center", **text)
    save(figure, path)


def draw(target: str, rows: Rows, runs: Sequence[Run], path: Path) -> list[Path]:
    """Makes the target's files, `path` with other suffixes, from the rows of its runs; returns them."""
    if target in FIGURES:
        draw_figure(target, {run: rows[run] for run in runs if run in rows}, path)
        return [path.with_suffix(".png"), path.with_suffix(".svg")]
    text = "\n\n".join(filter(None, (make_table(rows, runs, target), make_comparison_table(rows, {target: runs}))))
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return [path.with_suffix(".md")]


# ---------------------------------------------------------------------------------------------------------------------
# README.md and docs/, from the rows in results/


def kept_tuning(rows: Rows) -> list[Run]:
    """The tuning runs there are rows of: every rate that both seeds have, in each cell those of one budget.

    It is the one with most rates, of equals the largest.
    """
    seeds = Counter(replace(run, seed=0) for run in rows if run.seed in TUNING_SEEDS and run.learning_rate)
    whole = [run for run, count in seeds.items() if count == len(TUNING_SEEDS)]
    rates = Counter((run.cell, run.frames) for run in whole)
    budgets = {cell: max((n, frames) for (of, frames), n in rates.items() if of == cell)[1] for cell, _ in rates}
    of_budget = sorted((run for run in whole if run.frames == budgets[run.cell]), key=by_table)
    return [replace(run, seed=seed) for run in of_budget for seed in TUNING_SEEDS]


def by_table(run: Run) -> tuple[int, ...]:
    """Sorts runs as the tables have them."""
    of = (list(PRESETS), run.env), (list(METHODS), run.method), ([None, *SIZES], run.size)
    return *(names.index(name) for names, name in of), run.seed


def kept_runs(rows: Rows, target: str) -> list[Run]:
    """The runs of a target that there are rows of, in each environment those of one budget.

    It is the one with most cells (methods, or sizes of them) that have seeds enough to test, then with most cells, then
    the largest. Learning rates are the chosen ones, the presets' where none was. Figure 1 has the paper's methods and
    RL2, tables also those beside them; robustness has the tuning runs.
    """
    tuning = kept_tuning(rows)
    if target == "robustness":
        return [run for run in tuning if not run.size]
    _, methods, envs, beside = TARGETS[target]
    methods = (*methods, "rl2-standard", "rl2") if target == "figure1" else beside
    rates = choose_rates(returns_by_rate(rows, tuning))
    reported = [run for run in rows if run.seed not in UNREPORTED and run.learning_rate == rates.get(run.cell)]
    reported = [run for run in reported if bool(run.size) == (target == "figure3")]
    runs = [run for run in reported if run.env in envs and run.method in methods]
    seeds = Counter((run.env, run.frames, run.method, run.size) for run in runs)

    def worth(env: str, frames: int) -> tuple[int, int, int]:
        cells = [count for (*of, _, _), count in seeds.items() if of == [env, frames]]
        return sum(count >= MIN_SEEDS for count in cells), len(cells), frames

    budgets = {env: max(worth(env, run.frames) for run in runs if run.env == env)[2] for env, *_ in seeds}
    return sorted((run for run in runs if run.frames == budgets[run.env]), key=by_table)


def make_curve_table(rows: Rows, runs: Sequence[Run], env: str) -> str:
    """Markdown: mean +- standard error in `env` after each quarter of training, bold among the methods of a script."""
    curves: dict[str, list[dict[int, float]]] = {}
    for run in sorted((run for run in runs if run.env == env and run in rows), key=by_table):
        curves.setdefault(run.method, []).append(dict(json.loads(rows[run]["curve"])))
    frames = sorted(set.intersection(*(set(curve) for of_method in curves.values() for curve in of_method)) - {0})
    quarters = [min(frames, key=lambda step: abs(step - frames[-1] * k / 4)) for k in (1, 2, 3, 4)]
    values = {step: {m: [curve[step] for curve in of_m] for m, of_m in curves.items()} for step in quarters}
    groups = {
        (step, script): {m: of_m for m, of_m in values[step].items() if METHODS[m][1] == script}
        for step in quarters
        for script in (V, R)
    }
    bold = {(step, method) for (step, _), method in bold_cells(compare(groups))}
    lines = [[METHODS[method][0]] for method in curves]
    for line, method in zip(lines, curves, strict=True):
        texts = {step: mean_text(values[step][method]) for step in quarters}
        line += [f"**{texts[step]}**" if (step, method) in bold else texts[step] for step in quarters]
    return markdown([f"{env}, after", *(f"{step:,} frames" for step in quarters)], lines)


def make_seeds_table(rows: Rows, runs: Sequence[Run]) -> str:
    """Markdown: what every run reached and how long it took."""
    lines, groups = [], {}
    for run in [run for run in runs if run in rows]:
        command = re.sub(r" --seed \d+ --total-timesteps \d+", "", rows[run]["command"])
        groups.setdefault((command, run.frames), []).append(rows[run])
    for (command, frames), of_group in groups.items():
        returns = ", ".join(f"{float(row['return']):.2f}" for row in of_group)
        hours = sum(float(row["wall_time"]) for row in of_group) / 3600
        seeds, commits = (", ".join(dict.fromkeys(row[name] for row in of_group)) for name in ("seed", "commit"))
        lines.append([f"`python {command}`", f"{frames:,} frames", seeds, returns, f"{hours:.1f}", commits])
    return markdown(["command", "budget", "seeds", "return, by seed", "hours", "commit"], lines)


def readme_blocks(rows: Rows) -> dict[str, str]:
    """The generated parts of README.md and docs/, by name; empty where there are no rows to make one from."""
    kept = {target: kept_runs(rows, target) for target in ("table1", "table2", "figure1", "figure3")}
    blocks = {target: make_table(rows, kept[target], target) for target in PAPER}
    envs = dict.fromkeys(run.env for run in kept["table1"])
    blocks["curves"] = "\n\n".join(make_curve_table(rows, kept["table1"], env) for env in envs)
    blocks["seeds"] = make_seeds_table(rows, list(dict.fromkeys(sum(kept.values(), []))))
    blocks["comparisons"] = make_comparison_table(rows, {target: kept[target] for target in PAPER})
    blocks["claims"] = make_claims_table(table_cells(rows, kept["table1"], "table1")[0])
    blocks["frames to 36"] = make_claims_table(frames_to_36(rows, kept["table1"]))
    blocks["learning rates"] = make_rate_table(rows, kept_tuning(rows))
    return blocks


def fill_blocks(text: str, blocks: dict[str, str]) -> str:
    """Replaces what stands between `<!-- name -->` and `<!-- end of name -->`."""
    for name, block in blocks.items():
        lines = block and f"{block}\n"
        between = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text = re.sub(between, lambda found, lines=lines: f"{found[1]}{lines}{found[2]}", text, flags=re.S)
    return text


def make_readme(results_dir: Path) -> None:
    """Rewrites the generated parts of README.md and docs/*.md, and the pictures, from the rows in results_dir."""
    if not results_dir.is_dir():
        fail(f"there is no folder {results_dir}: do some runs, or choose another --results-dir.")
    rows = read_rows(results_dir)
    blocks = readme_blocks(rows)
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        page.write_text(fill_blocks(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    for target in FIGURES:
        if runs := kept_runs(rows, target):
            print("drawn:", *draw(target, rows, runs, ROOT / "pictures" / target))


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Does what the command line says; exit status 1 if a run failed."""
    results_dir = Path(args.results_dir)
    if args.target == "readme":
        if args != Args("readme", results_dir=args.results_dir):
            fail("readme does no runs: it takes --results-dir and nothing else.")
        make_readme(results_dir)
        return
    runs = make_runs(args)
    tuning = make_tuning_runs(args, runs)
    rows = read_rows(results_dir)
    rates = choose_rates(returns_by_rate(rows, kept_tuning(rows) if args.quick else tuning))
    if args.list:
        print_list([*tuning, *(with_rates(runs, rates) if args.target != "robustness" else [])], args)
        return
    if args.quick:  # its rows are kept beside the others
        args = replace(args, results_dir=str(results_dir / "quick"))
    executor, failed, unknown = make_executor(args), {}, []
    with watching_signals() as signals:
        if tuning:
            failed = sweep(tuning, executor, args, signals)
            rows = read_rows(Path(args.results_dir), without=failed)
            print(make_rate_table(rows, tuning))
            print("†: the smallest or the largest rate is the best; a better one may lie beyond it")
            rates = choose_rates(returns_by_rate(rows, tuning))
            unknown = list(dict.fromkeys(run.cell for run in runs if run.cell not in rates))
            runs = [run for run in runs if run.cell in rates]
        if args.target == "robustness":
            runs = [run for run in tuning if run.cell in rates]
        else:
            runs = with_rates(runs, rates)
            failed |= sweep(runs, executor, args, signals)
    rows = read_rows(Path(args.results_dir), without=failed)
    if finished := rows_of(rows, runs):
        files = draw(args.target, rows, runs, results_dir / f"{args.target}{'-quick' if args.quick else ''}")
        if args.target == "figure1":
            print(make_table(rows, runs, "table1"))
        print("drawn:", *files, f"({len(finished)} of {len(runs)} runs)")
    for run, why in failed.items():
        folder = Path(args.runs_dir) / run.name
        print(f"\nfailed: {run.name}: {why}", file=sys.stderr)
        if find_result(folder) is None:
            print(f"  again: python {shlex.join(command_line(run, folder))}", file=sys.stderr)
            print(f"  without the folder {folder} it begins anew", file=sys.stderr)
    for cell in unknown:
        name = " ".join(filter(None, cell))
        print(f"\nleft out: {name}, since a run that chooses its learning rate failed.", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without "±"
    try:
        main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
    except BrokenPipeError:  # the reader of the output has gone, as in `--list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
        raise SystemExit(1) from None
