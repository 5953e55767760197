"""reproduce.py: the run lists against the paper, the statistics by hand, whole sweeps, and the kept results."""

import csv
import errno
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import bench
import numpy as np
import pytest
import tyro
from scipy.stats import t as student_t
from scipy.stats import ttest_ind

import reproduce
import rl2_hyper
import varibad_hyper
from reproduce import Args, Run

ROOT = Path(reproduce.__file__).parent
SCRIPTS = {"varibad_hyper.py": varibad_hyper, "rl2_hyper.py": rl2_hyper}


def parse(run):
    """The script's arguments for a run, checked by the script."""
    script, *flags = run.command
    args = SCRIPTS[script].parse_args(flags)
    SCRIPTS[script].check_args(args)
    return args


# --- The lists of runs


def test_table1_is_the_papers():
    runs = reproduce.make_runs(Args("table1"))
    cells = Counter((run.env, run.method) for run in runs)
    methods = ["standard", "kaiming", "normc", "orthogonal", "hfi", "weight", "bias"]
    envs = ["Grid-World", "Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid"]
    assert cells == {(env, method): 5 for env in envs for method in methods}
    assert len(set(runs)) == len(runs) == 175
    assert {run.seed for run in runs} == {1, 2, 3, 4, 5}
    for run in runs:
        args = parse(run)
        assert (args.env, args.seed, args.total_timesteps) == (run.env, run.seed, run.frames)
        assert args.arch == ("standard" if run.method == "standard" else "hyper")
        if run.method != "standard":
            assert args.init == run.method
        # nothing but the environment's preset, the method and the seed
        preset = SCRIPTS["varibad_hyper.py"].parse_args(["--env", run.env])
        assert vars(args) == vars(preset) | {"arch": args.arch, "init": args.init, "seed": run.seed}


def test_table2_is_the_papers():
    runs = reproduce.make_runs(Args("table2"))
    cells = Counter((run.env, run.method) for run in runs)
    pick_place = {("Pick-Place", method): 10 for method in ("standard", "film-normc", "film", "hfi", "bias")}
    ml10 = {("ML10", method): 3 for method in ("standard", "hfi", "bias", "rl2-standard", "rl2-hfi", "rl2")}
    assert cells == pick_place | ml10
    wanted = {
        "film-normc": ("film", "normc"),
        "film": ("film", "bias"),
        "hfi": ("hyper", "hfi"),
        "bias": ("hyper", "bias"),
    }
    for run in runs:
        args = parse(run)
        method = run.method.replace("rl2-", "").replace("rl2", "bias")
        assert run.command[0] == ("rl2_hyper.py" if "rl2" in run.method else "varibad_hyper.py")
        if method == "standard":
            assert args.arch == "standard"
        else:
            assert (args.arch, args.init) == wanted[method]


def test_figure3_has_every_size_twice():
    runs = reproduce.make_runs(Args("figure3"))
    cells = Counter((run.env, run.method, run.size) for run in runs)
    sizes = {
        "XS": (64, (64, 32)),
        "S": (128, (64, 64)),
        "M": (128, (128, 64)),
        "L": (256, (128, 128)),
        "XL": (256, (256, 128)),
        "XXL": (1024, (512, 512)),
    }
    assert cells == {(env, m, s): 5 for env in ("Cheetah-Dir", "Walker") for m in ("standard", "bias") for s in sizes}
    for run in runs:
        args = parse(run)
        assert (args.state_features, args.base_layers) == sizes[run.size]


def test_figure1_compares_what_its_caption_names():
    runs = reproduce.make_runs(Args("figure1"))
    assert {run.method for run in runs} == {"standard", "kaiming", "hfi", "bias"}


def test_budgets_are_the_presets():
    for env, (frames, *iterations, eval_interval) in reproduce.PRESETS.items():
        for iteration, script in zip(iterations, SCRIPTS.values(), strict=True):
            args = script.parse_args(["--env", env])
            assert (args.total_timesteps, args.eval_interval) == (frames, eval_interval)
            assert args.num_envs * args.num_steps == iteration


def test_every_method_is_accepted_by_its_script():
    for method in reproduce.METHODS:
        for env in reproduce.PRESETS:
            parse(Run(env, method, 1, 1_000_000))


def test_cuts():
    runs = reproduce.make_runs(
        Args("table1", envs=("Walker",), methods=("bias", "film"), seeds=(7, 3), total_timesteps=2e6)
    )
    assert [(run.env, run.method, run.seed, run.frames) for run in runs] == [
        ("Walker", "bias", 7, 2_000_000),
        ("Walker", "film", 7, 2_000_000),
        ("Walker", "bias", 3, 2_000_000),
        ("Walker", "film", 3, 2_000_000),
    ]
    both = reproduce.make_runs(Args("figure3", envs=("Grid-World", "Walker"), seeds=(0, 1)))
    assert len({run.name for run in both}) == 48  # a folder for each


def test_quick_cut():
    """Grid-World with two seeds, enough evaluations for a curve, and cut further by flags."""
    runs = reproduce.make_runs(Args("figure1", quick=True))
    assert runs == reproduce.make_runs(Args("table1", quick=True))
    methods = ("standard", "kaiming", "hfi", "bias")
    assert set(runs) == {Run("Grid-World", m, seed, 500_000) for m in methods for seed in (1, 2)}
    assert len({run.name for run in runs}) == len(runs) == 8
    for run in runs:
        args = parse(run)
        assert args.total_timesteps // (args.num_envs * args.num_steps) // args.eval_interval >= 5
    cut = Args("table1", quick=True, envs=("Grid-World",), methods=("film",), seeds=(4,), total_timesteps=1e5)
    assert reproduce.make_runs(cut) == [Run("Grid-World", "film", 4, 100_000)]
    # another learning rate is another run, not to be taken for the same
    assert len({Run("Cheetah-Dir", "bias", 1, 100, None, rate).name for rate in (None, 7e-4, 7.1e-4)}) == 3


def test_enough_evaluations_for_what_is_reported():
    """Five in the last tenth of training, or one per iteration; never fewer than the preset has."""
    for frames in (96_000, 600_000, 1_000_000, 3_000_000, 10_000_000, 100_000_000):
        for env, (_, *_, preset) in reproduce.PRESETS.items():
            for method in ("standard", "rl2"):
                args = parse(Run(env, method, 1, frames))
                iterations = frames // (args.num_envs * args.num_steps)
                evaluated = {*range(0, iterations, args.eval_interval), iterations}
                last_tenth = [iteration for iteration in evaluated if iteration > 0.9 * iterations]
                assert len(last_tenth) >= 5 or args.eval_interval in (1, preset) or iterations < 100, args
                assert args.eval_interval == preset or (len(evaluated) < 240 and env not in reproduce.TABLE2)


def test_longer_runs_evaluate_at_the_frames_of_shorter_ones():
    """So that `--resume FOLDER --total-timesteps 2e6` turns a run of 1e6 frames into one of 2e6."""
    for env, interval in {"Grid-World": 20, "Cheetah-Dir": 3, "Walker": 6}.items():
        runs = [Run(env, "bias", 1, frames) for frames in (1_000_000, 2_000_000, 3_000_000)]
        assert {parse(run).eval_interval for run in runs} == {interval}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("table1 --envs ML10", "table1 has no --envs ML10: choose from Grid-World"),
        ("table1 --methods adam", "table1 has no --methods adam"),
        ("table2 --quick", "--quick is a cut of figure1 and table1"),
        ("table1 --quick --envs Walker", "table1 --quick has no --envs Walker: choose from Grid-World."),
        ("table2 --envs ML10 --methods film", "table2 has no such cell"),
        ("figure1 --total-timesteps 1.5", "--total-timesteps 1.5 is not a whole number"),
        ("figure1 --total-timesteps nan", "is not a whole number"),
        ("figure1 --total-timesteps 0", "is not a whole number"),
        ("figure1 --learning-rates 7e-4 --tuning-timesteps 0.5", "--tuning-timesteps 0.5 is not a whole number"),
        ("figure1 --tuning-timesteps 1e5", "--tuning-timesteps is about the runs of --learning-rates"),
        ("figure1 --learning-rates 0", "--learning-rates must be more than 0."),
        ("figure1 --learning-rates inf", "--learning-rates must be more than 0."),
        ("figure1 --learning-rates 7e-4 --seeds 10 11", "seeds 11 and 12 choose the learning rate"),
        ("figure1 --learning-rates 7e-4 --quick", "--quick takes the learning rates that results/ chose"),
        ("robustness", "robustness needs --learning-rates"),
        ("robustness --learning-rates 7e-4 --seeds 1", "its seeds are 11 and 12"),
        ("figure1 --seeds -1", "must be 0 or more"),
        ("figure1 --workers -1", "must be 0 or more"),
        ("figure1 --quick --runs-dir README.md/runs", "cannot"),
        ("figure1 --quick --results-dir README.md", "cannot"),
        ("readme --results-dir nowhere", "there is no folder nowhere"),
        ("readme --list", "readme does no runs"),
        ("readme --results-dir nowhere --envs Walker", "readme does no runs"),
        ("figure4", "figure4"),
        ("figure3 --sizes XXXL", "XXXL"),
        ("figure1 --sizes XS", "figure1 has no --sizes: leave it out"),
    ],
)
def test_bad_input_gets_one_sentence(flags, words, capsys):
    flags = flags.replace("README.md", str(ROOT / "README.md"))
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(tyro.cli(Args, args=flags.split()))
    assert exit_.value.code == 2
    assert words in " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def test_list_runs_nothing_and_adds_up(capsys, tmp_path):
    args = Args(
        "table1", list=True, envs=("Grid-World",), total_timesteps=2e6, runs_dir=str(tmp_path / "runs"), workers=2
    )
    reproduce.main(args)
    out = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    commands = re.findall(r"python (\S+\.py .*)", out)
    assert commands == [shlex.join(run.command) for run in reproduce.make_runs(args)]
    speeds = reproduce.SPEED["Grid-World"]
    hours = 2e6 / 3600 * (5 / speeds["standard"] + 30 / speeds["hyper"])
    assert f"35 runs, 70,000,000 frames: {hours:.1f} h one after the other, {hours / 2:.1f} h 2 side by side" in out
    assert f" {2e6 / 60 / speeds['hyper']:.0f} min  python varibad_hyper.py --env Grid-World --init bias" in out
    reproduce.main(replace(args, workers=100))  # no less than the longest run
    assert f" {2e6 / 60 / speeds['hyper']:.0f} min 100 side by side" in capsys.readouterr().out


def test_list_may_be_cut_short():
    """`python reproduce.py table1 --list | head -1`, of a list that no pipe holds."""
    command = [sys.executable, "-u", str(ROOT / "reproduce.py"), "table1", "--list", "--seeds", *map(str, range(200))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "python varibad_hyper.py" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_the_cost_of_every_default_run_is_known(capsys):
    """By architecture, script and size."""
    for target in ("figure1", "table1", "table2", "figure3"):
        assert all(reproduce.speed(run) for run in reproduce.make_runs(Args(target)))
    ml10, cheetah = reproduce.SPEED["ML10"], reproduce.SIZE_SPEED["Cheetah-Dir"]
    for method, wanted in {
        ("standard", None): ml10["standard"],
        ("hfi", None): ml10["hyper"],
        ("rl2-standard", None): ml10["rl2-standard"],
        ("rl2-hfi", None): ml10["rl2-hyper"],
        ("bias", "XXL"): cheetah["hyper"][5],
        ("standard", "XS"): cheetah["standard"][0],
    }.items():
        assert reproduce.speed(Run("Cheetah-Dir" if method[1] else "ML10", method[0], 1, 100, method[1])) == wanted
    assert reproduce.speed(Run("Pick-Place", "film-normc", 1, 100)) == reproduce.SPEED["Pick-Place"]["film"]
    assert len(set(ml10.values())) == 4
    # what was not measured is told, not guessed
    assert reproduce.speed(Run("Grid-World", "bias", 1, 100, "XXL")) is None
    assert reproduce.speed(Run("Ant-Dir", "bias", 1, 100, "XS")) is None
    reproduce.main(Args("figure3", list=True, envs=("Ant-Dir",), seeds=(1,)))
    assert "without 12 runs of unmeasured speed" in capsys.readouterr().out


def test_the_benchmark_measures_all_speeds():
    names = set()
    for env, speeds in reproduce.SPEED.items():
        names |= {f"RL2 on {env}, {name[4:]}" if name.startswith("rl2-") else f"{env}, {name}" for name in speeds}
    for env, archs in reproduce.SIZE_SPEED.items():
        sizes = {arch: list(reproduce.SIZES)[: len(speeds)] for arch, speeds in archs.items()}
        names |= {f"{env}, {arch} {size}" for arch in sizes for size in sizes[arch]}
    assert names == bench.SWEEP.keys()


# --- Statistics and tables


def test_mean_and_stderr_by_hand():
    mean, stderr = reproduce.mean_and_stderr([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert stderr == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)  # sqrt(14 / 3) / sqrt(4)
    assert math.isnan(reproduce.mean_and_stderr([1.0])[1])


def student_t_tail(t, degrees, steps=400_000):
    """P(|T| > t) of Student's distribution, by summing its density."""
    x = np.linspace(-t, t, steps + 1)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    return 1 - float(((density[1:] + density[:-1]) / 2).sum() * (2 * t / steps))


def welch_p(a, b):
    """Two-tailed p of Welch's t-test, written out."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    t = abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    return student_t_tail(t, (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)))


def bold(*columns):
    """What is bold in the columns of a table, a set each."""
    cells = reproduce.bold_cells(reproduce.compare(dict(enumerate(columns))))
    return [{method for column, method in cells if column == i} for i in range(len(columns))]


@pytest.mark.parametrize("seed", range(20))
def test_bold_is_what_a_t_test_by_hand_says(seed):
    rng = np.random.default_rng(seed)
    cells = {name: rng.normal(rng.uniform(0, 3), rng.uniform(0.2, 2), rng.integers(3, 8)).tolist() for name in "abcde"}
    best = max(cells, key=lambda name: np.mean(cells[name]))
    p_values = {name: welch_p(values, cells[best]) for name, values in cells.items() if name != best}
    found = reproduce.compare({"column": cells})
    assert [(c.group, c.method, c.best) for c in found] == [("column", name, best) for name in p_values]
    for c in found:
        assert c.p == pytest.approx(p_values[c.method], abs=1e-6)
        assert c.difference == pytest.approx(np.mean(cells[c.method]) - np.mean(cells[best]))
    # Holm, as a sequence of tests: from the smallest p on, against 0.05 / 4, 0.05 / 3 ..., until one is not smaller
    worse = set()
    for left, name in zip((4, 3, 2, 1), sorted(p_values, key=p_values.get), strict=True):
        if p_values[name] >= 0.05 / left:
            break
        worse.add(name)
    assert bold(cells) == [cells.keys() - worse]


def test_holm_by_hand():
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 = 0.06 is not less than the one before; 0.04 * 1 would be less: 0.06
    assert reproduce.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # 0.001 * 5, 0.01 * 4, 0.02 * 3, 0.4 * 2, 0.9 * 1
    assert reproduce.holm([0.9, 0.001, 0.4, 0.01, 0.02]) == pytest.approx([0.9, 0.005, 0.8, 0.04, 0.06])
    assert reproduce.holm([0.5, 0.7, 0.04]) == pytest.approx([1.0, 1.0, 0.12])
    assert reproduce.holm([0.03]) == [0.03] and reproduce.holm([]) == []


def test_bold_with_known_tables():
    # t = 1 / sqrt(2 * 1 / 3) = 1.2247 with 4 degrees of freedom: p = 0.288; a difference of 10 has p = 0.0003
    assert bold({"a": [1, 2, 3], "b": [2, 3, 4], "c": [11, 12, 13]}) == [{"c"}]
    assert bold({"a": [1, 2, 3], "b": [2, 3, 4]}) == [{"a", "b"}]
    # the critical value at 4 degrees of freedom is 2.776: a difference of 2.776 * sqrt(2 / 3) = 2.267
    near, far = {"a": [1, 2, 3], "b": [3.26, 4.26, 5.26]}, {"a": [1, 2, 3], "b": [3.28, 4.28, 5.28]}
    assert bold(near) == [{"a", "b"}] and bold(far) == [{"b"}]
    # of two comparisons, in one column or in two, the smaller p counts twice
    assert bold(far, near) == [{"a", "b"}, {"a", "b"}]
    assert bold(far | {"c": [3.28, 4.28, 5.27]}) == [{"a", "b", "c"}]
    # too few seeds do not take part, however good; one cell alone is not tested, and does not count
    assert bold({"a": [1, 2, 3], "b": [2, 3, 4], "c": [99, 99]}) == [{"a", "b"}]
    assert bold(far, {"a": [1, 2, 3], "b": [2, 3]}, {}) == [{"b"}, set(), set()]
    # without variance
    assert bold({"a": [5, 5, 5], "b": [5, 5, 5], "c": [4, 4, 4]}) == [{"a", "b"}]


def test_claims_compare_their_methods_directly():
    """Not each with the best; in the claim's direction; corrected over all environments."""
    returns = {
        ("Grid-World", "bias"): [3.0, 4.0, 6.0],
        ("Grid-World", "hfi"): [2.0, 2.5, 4.0],
        ("Grid-World", "rl2"): [9.0, 9.5, 9.9],
        ("Cheetah-Dir", "bias"): [1.0, 2.0, 3.0],
        ("Cheetah-Dir", "kaiming"): [7.0, 8.0, 9.5],
        ("Cheetah-Dir", "standard"): [1.0, 2.0],  # too few to test
        ("Cheetah-Dir", "rl2"): [1.5, 2.0, 4.0],
    }
    table = reproduce.make_claims_table(returns)
    names = {name: method for method, (name, *_) in reproduce.METHODS.items()}
    told = {
        (env, names[a], names[b]): of
        for env, a, b, *of in (row.strip("| ").split(" | ") for row in table.split("\n")[2:])
    }
    pairs = [("Grid-World", "bias", "hfi"), ("Grid-World", "rl2", "bias"), ("Cheetah-Dir", "bias", "kaiming")]
    assert set(told) == {*pairs, ("Cheetah-Dir", "rl2", "bias")}
    p = {of: ttest_ind(returns[of[0], of[1]], returns[of[0], of[2]], equal_var=False).pvalue for of in told}
    corrected = dict(zip(p, reproduce.holm(list(p.values())), strict=True))
    for of in told:
        difference = np.mean(returns[of[0], of[1]]) - np.mean(returns[of[0], of[2]])
        margin = welch_margin(returns[of[0], of[1]], returns[of[0], of[2]])
        assert told[of] == [f"{difference:.2f} ± {margin:.2f}", f"{p[of]:.2g}", f"{corrected[of]:.2g}"]


def welch_margin(a, b):
    """Half of the 95% interval of a difference of means, by Welch and Satterthwaite's formula."""
    of_a, of_b = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return student_t.ppf(0.975, freedom) * (of_a + of_b) ** 0.5


def test_frames_to_36():
    runs = [Run("Grid-World", "bias", seed, 30) for seed in (1, 2, 3)] + [Run("Walker", "bias", 1, 30)]
    curves = [[0, 1.0], [10, 36.0], [20, 30.0], [30, 37.0]], [[0, 1.0], [15, 35.9]], [[0, 40.0]], [[0, 40.0]]
    rows = {run: fake_row(run, 0, curve=json.dumps(curve)) for run, curve in zip(runs, curves, strict=True)}
    missing = Run("Grid-World", "hfi", 1, 30)
    assert reproduce.frames_to_36(rows, [*runs, missing]) == {("Grid-World", "bias"): [10, 15, 0]}


def fake_row(run, value, **more):
    return {
        **dict.fromkeys(reproduce.COLUMNS, "0"),
        **{"command": shlex.join(run.command), "return": str(value), "env": run.env, "method": run.method},
        **{"size": run.size or "", "seed": str(run.seed)},
        **more,
    }


def test_table_by_hand():
    values = {"standard": [30, 31, 32, 33, 34], "kaiming": [10, 11, 12], "bias": [33, 34, 35, 36, 37], "hfi": [50, 60]}
    values |= {"rl2-standard": [80, 81, 82, 83, 84], "rl2": [90, 91, 92, 93, 94]}
    runs = [Run("Grid-World", method, seed + 1, 2_000_000) for method in values for seed in range(5)]
    rows = {}
    for run in runs:
        if run.seed <= len(values[run.method]):
            rows |= {run: fake_row(run, values[run.method][run.seed - 1])}
    other = Run("Grid-World", "bias", 1, 3_000_000)  # of another budget
    rows[other] = fake_row(other, 1000)
    lines = reproduce.make_table(rows, runs, "table1").splitlines()
    assert lines[0] == "| method | Grid-World, 2,000,000 frames | paper |"
    assert lines[2:] == [
        "| Standard | 32.0 ± 0.7 | 35.5 ± 0.4 |",  # t = 3 / 1 with 8 degrees of freedom: p = 0.017
        "| Kaiming | 11.0 ± 0.6 (3 of 5 seeds) | 32.1 ± 1.2 |",
        "| HFI | 55.0 ± 5.0 (2 of 5 seeds, too few to test) | 36.8 ± 0.2 |",
        "| Bias-HyperInit | **35.0 ± 0.7** | 36.7 ± 0.2 |",
        "| RL2, Standard | 82.0 ± 0.7 | - |",  # worse than the best of its own script
        "| RL2, Bias-HyperInit | **92.0 ± 0.7** | - |",
    ]


def test_table2_shows_success_of_the_last_episode():
    runs = [Run("ML10", method, seed, 100) for method in ("standard", "bias", "rl2") for seed in (1, 2, 3)]
    rows = {run: fake_row(run, 7, test_success=json.dumps([99.0, run.seed * (10.0 + run.seed)])) for run in runs}
    lines = reproduce.make_table(rows, runs, "table2").splitlines()
    assert lines[2] == "| Standard | **24.7 ± 8.1** | 10.2 ± 3.0 |"
    assert lines[4] == "| RL2, Bias-HyperInit | 24.7 ± 8.1 | 14.2 ± 7.2 |"  # alone in its script: nothing to test


def test_paper_values():
    """Table 1 by columns and Table 2 by cells, typed again."""
    columns = {
        "Grid-World": "35.5 32.1 32.2 34.9 36.8 36.1 36.7 / 0.4 1.2 0.5 0.5 0.2 0.5 0.2",
        "Cheetah-Dir": "2104 378 356 1379 2218 2066 2300 / 87 169 134 310 80 119 32",
        "Walker": "1828 331 357 1687 1618 1748 1994 / 38 37 60 98 130 57 67",
        "Ant-Dir": "1167 253 264 1127 1370 1346 1328 / 16 86 106 93 9 7 23",
        "Humanoid": "1842 266 249 1126 1323 1048 1678 / 233 23 18 76 57 21 162",
    }
    methods = ["standard", "kaiming", "normc", "orthogonal", "hfi", "weight", "bias"]
    for env, text in columns.items():
        means, errors = (half.split() for half in text.split(" / "))
        for method, mean, error in zip(methods, means, errors, strict=True):
            assert reproduce.paper_value("table1", env, method) == f"{mean} ± {error}"
    assert reproduce.paper_value("table2", "Pick-Place", "bias") == "42.9 ± 16.3"
    assert reproduce.paper_value("table2", "ML10", "rl2") == "14.2 ± 7.2"
    assert reproduce.paper_value("table2", "ML10", "film") == "-"
    assert reproduce.paper_value("table1", "Grid-World", "film") == "-"


def test_mean_curve_by_hand():
    run = Run("Grid-World", "bias", 1, 30)
    curves = [[[10, 1.0], [20, 2.0]], [[10, 3.0], [20, 2.0], [30, 9.0]]]
    rows = [fake_row(run, 0, curve=json.dumps(curve)) for curve in curves]
    np.testing.assert_allclose(reproduce.mean_curve(rows), [[10, 2.0, 1.0], [20, 2.0, 0.0]])


def test_mean_curve_of_rows_with_and_without_the_point_before_training():
    """Rows of older versions begin with the first evaluation after an update."""
    run = Run("Grid-World", "bias", 1, 20)
    new = [fake_row(run, 0, curve=json.dumps([[0, start], [10, 1.0], [20, 2.0]])) for start in (-3.0, -1.0)]
    np.testing.assert_allclose(reproduce.mean_curve(new), [[0, -2.0, 1.0], [10, 1.0, 0.0], [20, 2.0, 0.0]])
    old = fake_row(run, 0, curve=json.dumps([[10, 3.0], [20, 2.0]]))
    np.testing.assert_allclose(reproduce.mean_curve([new[0], old]), [[10, 2.0, 1.0], [20, 2.0, 0.0]])


@pytest.mark.parametrize("before_training", [(), ("standard", "bias"), ("standard", "bias", "rl2")])
def test_curve_table_by_hand(before_training):
    """Quarters of what all curves have, bold by column and script; RL2 alone is not tested, however good."""
    runs = [Run("Grid-World", method, seed, 80) for method in ("standard", "bias", "rl2") for seed in (1, 2, 3)]
    rows = {}
    for run in runs:
        slope = run.seed + {"standard": 0, "bias": 9, "rl2": 19}[run.method]
        curve = [[step, slope * step / 10 if step > 20 else run.seed] for step in range(10, 90, 10)]
        curve = [[0, -3.0], *curve] if run.method in before_training else curve
        rows[run] = fake_row(run, 0, curve=json.dumps(curve))
    lines = reproduce.make_curve_table(rows, runs, "Grid-World").splitlines()
    assert lines == [
        "| Grid-World, after | 20 frames | 40 frames | 60 frames | 80 frames |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| Standard | **2.0 ± 0.6** | 8.0 ± 2.3 | 12.0 ± 3.5 | 16.0 ± 4.6 |",
        "| Bias-HyperInit | **2.0 ± 0.6** | **44.0 ± 2.3** | **66.0 ± 3.5** | **88.0 ± 4.6** |",
        "| RL2, Bias-HyperInit | 2.0 ± 0.6 | 84.0 ± 2.3 | 126.0 ± 3.5 | 168.0 ± 4.6 |",
    ]


def test_curve_table_has_no_column_before_training():
    """Not even where it is the evaluation next to a quarter."""
    rows, runs = {}, [Run("Grid-World", "bias", seed, 100) for seed in (1, 2, 3)]
    for run in runs:
        rows[run] = fake_row(run, 0, curve=json.dumps([[0, -3.0], [60, run.seed], [100, 9.0]]))
    header, _, line = reproduce.make_curve_table(rows, runs, "Grid-World").splitlines()
    assert header == "| Grid-World, after | 60 frames | 60 frames | 60 frames | 100 frames |"
    assert line == "| Bias-HyperInit |" + " 2.0 ± 0.6 |" * 3 + " 9.0 ± 0.0 |"


@pytest.mark.parametrize("target", ["figure1", "figure3"])
def test_figures_show_the_rows(target, tmp_path, monkeypatch):
    """The drawn lines, read back from the axes."""
    sizes = ("XS", "M") if target == "figure3" else (None,)
    runs = [
        Run(env, method, seed, 100, size)
        for env in ("Grid-World", "Walker")
        for method in ("standard", "bias")
        for seed in (1, 2)
        for size in sizes
    ]
    rows = {
        run: fake_row(
            run,
            run.seed + (10 if run.method == "bias" else 0),
            curve=json.dumps([[50, run.seed], [100, 2 * run.seed]]),
            base_parameters=str(100 if run.size == "XS" else 400),
            parameters=str(1000 if run.size == "XS" else 4000),
        )
        for run in runs
    }
    figures = []
    monkeypatch.setattr(reproduce, "save", lambda figure, path: figures.append(figure))
    reproduce.draw(target, rows, runs, tmp_path / "picture")
    (figure,) = figures
    axes = figure.axes
    if target == "figure1":
        assert [axis.get_title() for axis in axes] == ["Grid-World, 2 seeds", "Walker, 2 seeds"]
        for axis in axes:
            curve = axis.get_lines()[0]
            np.testing.assert_allclose(curve.get_xydata(), [[50, 1.5], [100, 3.0]])
            bottom_top = axis.collections[0].get_paths()[0].vertices[:, 1]
            assert (bottom_top.min(), bottom_top.max()) == (1.0, 4.0)  # 1.5 - 0.5, 3 + 1
        optimal = axes[0].get_lines()[-1].get_ydata()
        assert optimal[0] == pytest.approx(920.8 / 24, abs=1e-3)
    else:
        assert [axis.get_title() for axis in axes] == ["Grid-World", "Grid-World", "Walker", "Walker"]
        for axis, x in zip(axes, [(100, 400), (1000, 4000)] * 2, strict=True):
            standard, hyper = (container.lines[0].get_xydata() for container in axis.containers)
            np.testing.assert_allclose(standard, [[x[0], 1.5], [x[1], 1.5]])
            np.testing.assert_allclose(hyper, [[x[0], 11.5], [x[1], 11.5]])
            assert [text.get_text() for text in axis.texts] == ["XS", "M"] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Standard", "Bias-HyperInit"]


def test_rates_are_told_in_the_order_of_the_methods():
    """Whichever of them has the smallest rate."""
    cells = [("standard", 2e-3), ("bias", 7e-4), ("rl2", 3e-4)]
    runs = [Run("Grid-World", method, seed, 100, learning_rate=rate) for method, rate in cells for seed in (11, 12)]
    returns = reproduce.returns_by_rate({run: fake_row(run, 1) for run in runs}, runs[::-1])
    assert [method for _, method, _ in returns] == ["standard", "bias", "rl2"]


def test_rl2_is_drawn_beside_varibad(monkeypatch, tmp_path):
    """In the colour of its initialisation, dashed."""
    runs = [Run("Grid-World", method, seed, 100) for method in ("bias", "rl2") for seed in (1, 2)]
    rows = {run: fake_row(run, 1, curve=json.dumps([[0, -6], [100, 1]])) for run in runs}
    assert reproduce.kept_runs(rows, "figure1") == runs
    figures = []
    monkeypatch.setattr(reproduce, "save", lambda figure, path: figures.append(figure))
    reproduce.draw("figure1", rows, runs, tmp_path / "picture")
    varibad, rl2, _ = figures[0].axes[0].get_lines()
    assert varibad.get_color() == rl2.get_color()
    assert (varibad.get_linestyle(), rl2.get_linestyle()) == ("-", "--")


def test_a_collapse_does_not_crush_the_other_curves(monkeypatch, tmp_path):
    """It leaves the picture, whose axis ends at half of the best below zero, and a margin of 5%."""
    ends = {"standard": 500, "kaiming": -7000}
    runs = [reproduce.Run("Cheetah-Dir", method, seed, 100) for method in ends for seed in (1, 2)]
    rows = {run: fake_row(run, ends[run.method], curve=json.dumps([[0, -1], [100, ends[run.method]]])) for run in runs}
    figures = []
    monkeypatch.setattr(reproduce, "save", lambda figure, path: figures.append(figure))
    reproduce.draw("figure1", rows, runs, tmp_path / "picture")
    (axis,) = figures[0].axes
    np.testing.assert_allclose(axis.get_ylim(), (-250 - 37.5, 500 + 37.5))
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["Standard", "Kaiming"]


def test_robustness_shows_the_rows(tmp_path, monkeypatch):
    """Mean over the seeds as a line, both as dots."""
    runs = [
        Run("Grid-World", method, seed, 100, learning_rate=rate)
        for method in ("standard", "bias")
        for rate in (7e-4, 3e-4)
        for seed in (11, 12)
    ]
    values = {run: 1e4 * run.learning_rate + (run.seed - 11) + 10 * (run.method == "bias") for run in runs}
    rows = {run: fake_row(run, value) for run, value in values.items()}
    figures = []
    monkeypatch.setattr(reproduce, "save", lambda figure, path: figures.append(figure))
    reproduce.draw("robustness", rows, runs, tmp_path / "picture")
    (axis,) = figures[0].axes
    assert axis.get_title() == "Grid-World" and axis.get_xscale() == "log"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["Standard", "Bias-HyperInit"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["3e-4", "7e-4"]
    x, lines = [3e-4, 7e-4], axis.get_lines()
    assert len(lines) == 6
    for method, (mean, *seeds) in {0: lines[:3], 10: lines[3:]}.items():
        np.testing.assert_allclose(mean.get_xydata(), np.stack([x, [method + 3.5, method + 7.5]], 1))
        for seed, dots in enumerate(seeds):
            np.testing.assert_allclose(dots.get_xydata(), np.stack([x, [method + seed + 3, method + seed + 7]], 1))
            assert (dots.get_linestyle(), dots.get_marker()) == ("None", "o")
        assert mean.get_color() == seeds[0].get_color() == reproduce.COLORS["bias" if method else "standard"]


# --- Learning rates


def tuning_args(**more):
    args = {"methods": ("standard", "bias"), "learning_rates": (3e-4, 7e-4, 2e-3), "seeds": (1, 2)}
    return Args("figure1", envs=("Grid-World",), **args | more)


def test_tuning_runs():
    """Every rate with both seeds, none of them reported."""
    runs = reproduce.make_runs(tuning_args())
    assert {run.learning_rate for run in runs} == {None} and reproduce.make_tuning_runs(Args("figure1"), runs) == []
    tuning = reproduce.make_tuning_runs(tuning_args(), runs)
    rates = (3e-4, 7e-4, 2e-3)
    wanted = {("Grid-World", m, seed, rate) for m in ("standard", "bias") for seed in (11, 12) for rate in rates}
    assert len(tuning) == 12
    assert {(run.env, run.method, run.seed, run.learning_rate) for run in tuning} == wanted
    assert {run.frames for run in tuning} == {4_000_000}  # as many as the reported runs have
    assert tuning[2].command[-2:] == ["--learning-rate", "2e-3"] and tuning[2].name.endswith("__4000000__lr-2e-3")
    assert all(parse(run).learning_rate == run.learning_rate for run in tuning)
    shorter = reproduce.make_tuning_runs(tuning_args(tuning_timesteps=6e5), runs)
    assert shorter == [replace(run, frames=600_000) for run in tuning]
    sizes = reproduce.make_tuning_runs(tuning_args(), [Run("Walker", "bias", 1, 1, size) for size in ("XS", "S")])
    assert len(sizes) == 12  # a rate for each size


def test_choice_by_hand():
    runs = [Run("Walker", "bias", seed, 30, learning_rate=rate) for seed in (11, 12) for rate in (3e-4, 7e-4, 2e-3)]
    values = dict(zip(runs, (3.0, 4.0, 2.0, 2.0, 1.0, 3.0), strict=True))
    rows = {run: fake_row(run, value) for run, value in values.items()}
    # reported seeds at the largest rate, however good, change nothing
    rows |= {run: fake_row(run, 99) for run in [replace(runs[2], seed=seed) for seed in (1, 2)]}
    returns = reproduce.returns_by_rate(rows, runs)
    cell = ("Walker", "bias", None)
    assert returns == {cell: {3e-4: [3.0, 2.0], 7e-4: [4.0, 1.0], 2e-3: [2.0, 3.0]}}
    assert reproduce.choose_rates(returns) == {cell: 3e-4}  # 2.5 all three: the smallest
    assert reproduce.choose_rates({cell: {3e-4: [3.0, 2.0], 7e-4: [4.0, 1.1], 2e-3: [4.0, 1.0]}}) == {cell: 7e-4}
    assert reproduce.kept_tuning(rows) == sorted(runs, key=lambda run: (runs.index(run) % 3, run.seed))
    del rows[runs[0]]
    assert reproduce.returns_by_rate(rows, runs) == {}


def test_the_best_rate_at_an_edge_is_marked():
    def best_cells(best, rates):
        runs = [Run("Walker", "bias", seed, 30, learning_rate=rate) for seed in (11, 12) for rate in rates]
        rows = {run: fake_row(run, float(run.learning_rate == best)) for run in runs}
        return re.findall(r"\| (\*\*.*?) (?=\|)", reproduce.make_rate_table(rows, runs))

    rates = (3e-4, 7e-4, 2e-3)
    assert best_cells(7e-4, rates) == best_cells(7e-4, (7e-4,)) == ["**1.00 (1.00, 1.00)**"]
    assert best_cells(3e-4, rates) == best_cells(2e-3, rates) == ["**1.00 (1.00, 1.00)** †"]


def test_the_last_tenth_is_reported():
    assert reproduce.final_return([[0, 9.0], [90, 9.0], [91, 1.0], [95, 2.0], [100, 6.0]]) == 3.0  # 90 is not in it
    assert reproduce.final_return([[0, 9.0], [50, 9.0], [100, 6.0]]) == 6.0
    assert reproduce.final_return([[0, 4.0]]) == 4.0


TUNED_SCRIPT = """
import json, os, pathlib, signal, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
home, rate, seed = pathlib.Path(__file__).parent, flags.get("--learning-rate"), flags["--seed"]
method = "A" if "A" in flags else "B"
print(rate, seed, method, file=open(home / "starts", "a"))
if (home / "broken").exists() and (home / "broken").read_text() in f"{method} {rate} {seed}":
    raise SystemExit(2)
if (home / "interrupted").exists() and (home / "interrupted").read_text() == f"{method} {rate} {seed}":
    (home / "interrupted").unlink()
    os.kill(os.getppid(), signal.SIGINT)
    raise SystemExit(1)
folder, frames = pathlib.Path(flags["--runs-dir"]) / "x__1", int(flags["--total-timesteps"])
folder.mkdir()
value = {"A 3e-4": 3, "A 7e-4": 5, "A 2e-3": 4, "B 3e-4": 2, "B 7e-4": 1, "B 2e-3": 1}.get(f"{method} {rate}", 0)
value = value if seed in ("11", "12") else -value  # what is reported would choose otherwise
curve = [[0, 99.0], [frames // 2, float(value)], [frames, float(value)]]
result = {"evaluation": {"meta_episodic_return": {"mean": float(value), "stderr": 0.5}}, "eval_history": curve}
result |= {"parameters": {"total": 2, "base_network": 1}, "SPS": 1, "versions": {}, "args": {"eval_interval": 1}}
result |= {"frames": frames, "wall_time": 3}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Arguments of a sweep of two methods whose script knows how well each rate does, and what was started since."""
    script = tmp_path / "tuned.py"
    script.write_text(TUNED_SCRIPT)
    for method, flags in (("standard", "A"), ("bias", "B")):
        monkeypatch.setitem(reproduce.METHODS, method, (method.title(), str(script), flags))

    def started():
        path = tmp_path / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    folders = {"runs_dir": str(tmp_path / "runs"), "results_dir": str(tmp_path / "results")}
    return tuning_args(executor="local", total_timesteps=1000.0, tuning_timesteps=500.0, **folders), started


TRIED = [f"{rate} {seed} {method}" for rate in ("3e-4", "7e-4", "2e-3") for seed in (11, 12) for method in "AB"]
CHOSEN = ["7e-4 1 A", "7e-4 2 A", "3e-4 1 B", "3e-4 2 B"]


def test_learning_rates_are_chosen_then_used(tuned, capsys):
    """All the choosing runs come first; nothing is repeated; the list knows the choice once it is made."""
    args, started = tuned
    reproduce.main(replace(args, list=True))
    out = capsys.readouterr().out
    assert len(re.findall("--learning-rate (?!.chosen)", out)) == 12
    assert out.count("--learning-rate (chosen by the tuning runs)") == 4 and "16 runs, 10,000 frames: " in out
    assert not started()
    reproduce.main(args)
    starts = started()
    assert sorted(starts[:12]) == sorted(TRIED) and sorted(starts[12:]) == sorted(CHOSEN)
    out = capsys.readouterr().out
    assert "** † | " in out and "a better one may lie beyond it" in out
    assert "note: Grid-World standard" not in out
    rows = reproduce.read_rows(Path(args.results_dir))
    assert len(rows) == 16 and {run.learning_rate for run in rows} == {3e-4, 7e-4, 2e-3}
    times = {path: path.stat().st_mtime_ns for path in Path(args.runs_dir).glob("*/*/result.json")}
    reproduce.main(args)
    assert not started() and reproduce.read_rows(Path(args.results_dir)) == rows
    assert {path: path.stat().st_mtime_ns for path in times} == times
    capsys.readouterr()
    reproduce.main(replace(args, list=True))
    out = capsys.readouterr().out
    assert "chosen by" not in out and len(re.findall("--learning-rate .*done", out)) == 16


def test_a_failed_tuning_run_leaves_its_method_out(tuned, tmp_path, capsys):
    args, started = tuned
    (tmp_path / "broken").write_text("A 2e-3 12")
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(args)
    assert exit_.value.code == 1
    starts = started()
    assert sorted(starts[:12]) == sorted(TRIED) and sorted(starts[12:]) == CHOSEN[2:]
    err = capsys.readouterr().err
    assert "failed: Grid-World__standard__12__500__lr-2e-3: " in err
    assert "left out: Grid-World standard, since a run that chooses its learning rate failed." in err
    assert "left out: Grid-World bias" not in err
    (tmp_path / "broken").unlink()
    reproduce.main(args)
    first, *others = started()
    assert first == "2e-3 12 A" and sorted(others) == CHOSEN[:2]


@pytest.mark.parametrize("where", ["A 3e-4 11", "B 2e-3 12", "A 7e-4 2"])
def test_interrupted_in_either_phase_it_goes_on(where, tuned, tmp_path, capsys):
    """What was chosen from is whole before anything is reported, and nothing that has finished is done again."""
    args, started = tuned
    (tmp_path / "interrupted").write_text(where)
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(args)
    assert exit_.value.code == 128 + signal.SIGINT
    assert "the same command goes on from there." in capsys.readouterr().err
    before = started()
    assert where.endswith(" 2") or not set(before) & set(CHOSEN)
    done = set()
    for path in Path(args.runs_dir).glob("*/*/result.json"):
        _, method, seed, *_, rate = path.parts[-3].split("__")
        done.add(f"{rate.removeprefix('lr-')} {seed} {'A' if method == 'standard' else 'B'}")
    reproduce.main(args)
    again = started()
    assert len(again) + len(done) == 16 and {*again, *done} == {*TRIED, *CHOSEN}
    assert len(reproduce.read_rows(Path(args.results_dir))) == 16


def test_robustness_then_the_reported_runs(tuned, capsys):
    """The choosing runs alone, and a picture; another target then goes on from there."""
    args, started = tuned
    robustness = replace(args, target="robustness", seeds=(), total_timesteps=None)
    reproduce.main(replace(robustness, list=True))
    assert "12 runs, 6,000 frames: " in capsys.readouterr().out
    reproduce.main(robustness)
    assert sorted(started()) == sorted(TRIED)
    assert "(12 of 12 runs)" in capsys.readouterr().out
    assert {path.name for path in Path(args.results_dir).glob("robustness.*")} == {"robustness.png", "robustness.svg"}
    reproduce.main(args)
    assert sorted(started()) == sorted(CHOSEN)


def test_quick_takes_the_chosen_rates_and_keeps_its_rows_apart(tuned, capsys):
    args, started = tuned
    reproduce.main(replace(args, target="robustness", seeds=(), total_timesteps=None, methods=("standard",)))
    started()
    reproduce.main(replace(args, quick=True, learning_rates=(), tuning_timesteps=None))
    assert sorted(started()) == ["7e-4 1 A", "7e-4 2 A", "None 1 B", "None 2 B"]  # B was not tuned
    results = Path(args.results_dir)
    assert {run.seed for run in reproduce.read_rows(results)} == {11, 12}
    assert len(reproduce.read_rows(results / "quick")) == 4
    assert (results / "figure1-quick.png").exists()
    assert "| Bias | 0.0 ± 0.0 (2 seeds, too few to test) | 36.7 ± 0.2 |" in capsys.readouterr().out


# --- Sweeps


FRAMES = 9600  # ten iterations


def tiny(tmp_path, executor, *more):
    flags = (
        f"--total-timesteps {FRAMES} --executor {executor} --runs-dir {tmp_path}/runs --results-dir {tmp_path}/results"
    )
    return [sys.executable, str(ROOT / "reproduce.py"), *more, *flags.split()]


def read_csv(tmp_path):
    rows = reproduce.read_rows(tmp_path / "results")
    lines = [line for path in (tmp_path / "results").glob("*.csv") for line in path.read_text().splitlines()]
    return list(rows.values()), len(lines) - len(list((tmp_path / "results").glob("*.csv")))


def direct_result(tmp_path, run):
    """The result.json of the script alone, in this process."""
    script, *flags = run.command
    folder = SCRIPTS[script].main(SCRIPTS[script].parse_args([*flags, "--runs-dir", str(tmp_path / "direct")]))
    return json.loads((folder / "result.json").read_text())


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (requirements-optional.txt)")
EXECUTORS = ["local", pytest.param("ray", marks=needs_ray)]


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
def test_sweep_with_a_run_that_fails_and_one_that_is_interrupted(executor, tmp_path):
    """The broken one is reported, the interrupted one goes on from its checkpoint, a second sweep repeats nothing."""
    flags = ["table1", "--envs", "Grid-World", "--methods", "standard", "bias", "--seeds", "1", "2", "--workers", "2"]
    broken, killed = Run("Grid-World", "standard", 2, FRAMES), Run("Grid-World", "bias", 1, FRAMES)
    # standard's seed 2 finds a damaged checkpoint; bias's seed 1 is killed once, when it has written its first
    damaged = tmp_path / "runs" / broken.name / "x__1" / "checkpoint.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("nothing")
    process = subprocess.Popen(
        tiny(tmp_path, executor, *flags, "--retries", "1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "runs" / killed.name
    deadline = time.time() + 200
    while not list(folder.glob("*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.02)
    (stopped,) = [path.parent for path in folder.glob("*/checkpoint.pt")]
    found = subprocess.run(["pgrep", "-f", "--", f"--runs-dir {folder}"], capture_output=True, text=True, check=True)
    for number in found.stdout.split():
        os.kill(int(number), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert f"again: {killed.name}" in out and f"failed: {broken.name}" in out
    assert f"again: {broken.name}" not in out  # refused: another try is of no use
    assert f"failed: {broken.name}: " in err and f"again: python varibad_hyper.py --resume {damaged.parent}" in err
    assert "is damaged, or not of this version of varibad_hyper.py" in err
    rows, lines = read_csv(tmp_path)
    assert lines == len(rows) == 3
    assert {(row["method"], row["seed"]) for row in rows} == {("standard", "1"), ("bias", "1"), ("bias", "2")}
    assert [path.parent for path in folder.glob("*/result.json")] == [stopped]

    # the table shows what is there, and the resumed run's numbers are those of the run alone
    table = (tmp_path / "results" / "table1.md").read_text()
    assert "| Standard |" in table and "(1 of 2 seeds, too few to test)" in table
    (row,) = [row for row in rows if row["command"] == shlex.join(killed.command)]
    wanted = direct_result(tmp_path, killed)
    assert float(row["return"]) == wanted["evaluation"]["meta_episodic_return"]["mean"]
    assert json.loads(row["curve"]) == [list(point) for point in wanted["eval_history"]]
    assert [frames for frames, _ in json.loads(row["curve"])] == list(range(0, FRAMES + 1, 960))  # every iteration
    own = ("runs_dir", "exp_name", "resume", "evaluate")
    assert json.loads(row["args"]) == {name: value for name, value in wanted["args"].items() if name not in own}
    assert reproduce.frames_so_far(folder) == FRAMES
    assert int(row["parameters"]) == wanted["parameters"]["total"]
    assert row["python"] == sys.version.split()[0] and json.loads(row["versions"])["torch"] and row["machine"]

    # without it the same command does the rest and repeats nothing
    damaged.unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/result.json")}
    done = subprocess.run(tiny(tmp_path, executor, *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4 runs, 3 of them done" in done.stdout
    rows, lines = read_csv(tmp_path)
    assert lines == len(rows) == 4
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "number"), [("local", signal.SIGHUP), pytest.param("ray", signal.SIGTERM, marks=needs_ray)]
)
def test_interrupted_sweep_stops_at_checkpoints_and_goes_on(executor, number, tmp_path):
    flags = ["figure1", "--envs", "Grid-World", "--methods", "bias", "--seeds", "1", "2", "3", "--workers", "2"]
    command = tiny(tmp_path, executor, *flags)
    command[command.index(str(FRAMES))] = "48000"
    heeded = partial(signal.signal, number, signal.SIG_DFL)  # not ignored, as under nohup
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)
    deadline = time.time() + 200
    while len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "stopped, 0 of 3 runs are done; the same command goes on from there." in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/stop-*"))
    logs = [path.read_text() for path in tmp_path.glob("runs/*/log.txt")]
    assert len(logs) == 2
    assert all("stopped by SIGTERM after iteration" in log for log in logs)
    command[command.index("3", command.index("--seeds"))] = "2"  # the two that had begun
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) == 2  # gone on with, not begun again
    assert (tmp_path / "results" / "figure1.png").exists()


@pytest.mark.slow
@needs_ray
def test_a_cluster_that_loses_a_node_finishes_every_run_once(tmp_path):
    """Two nodes of one core; the second goes away in the middle of its first run."""
    from ray.cluster_utils import Cluster

    handler = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        flags = ["figure1", "--envs", "Grid-World", "--methods", "bias", "kaiming", "--seeds", "1", "2"]
        process = subprocess.Popen(
            tiny(tmp_path, "ray", *flags, "--address", cluster.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.time() + 200
        while len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) < 2 and time.time() < deadline:
            time.sleep(0.05)
        assert len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) == 2  # a run on each node
        cluster.remove_node(node, allow_graceful=False)
        out, err = process.communicate(timeout=400)
    finally:
        cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)  # Ray leaves its own
    assert process.returncode == 0, err
    assert "again: " in out, out  # what the node had was lost
    rows, lines = read_csv(tmp_path)
    assert lines == len(rows) == 4
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 4
    assert len(list(tmp_path.glob("runs/*/*/events*"))) <= 5  # at most one was taken up again
    for row in rows:
        assert int(row["frames"]) == FRAMES


FAKE_SCRIPT = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--runs-dir") + 1]) / "x__1"
folder.mkdir()
time.sleep(3)
mean = {"mean": 1.0, "stderr": 0.5}
result = {"evaluation": {"meta_episodic_return": mean}, "eval_history": [[9600, 1.0]], "frames": 9600, "wall_time": 3}
result |= {"parameters": {"total": 2, "base_network": 1}, "SPS": 3200, "versions": {}, "args": {"eval_interval": 1}}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_two_that_want_the_same_run_do_not_both_do_it(killed, tmp_path, monkeypatch):
    """The second waits for the first; if that is killed, its script ends with it, and the second begins anew."""
    script = tmp_path / "slow.py"
    script.write_text(FAKE_SCRIPT)
    code = (
        "import sys, reproduce; from pathlib import Path; reproduce.METHODS['bias'] = ('', sys.argv[1], '');"
        "reproduce.execute(reproduce.Run('Walker', 'bias', 1, 9600), Path(sys.argv[2]), Path('no'))"
    )
    first = subprocess.Popen([sys.executable, "-c", code, script, tmp_path / "run"], cwd=ROOT)
    while not (tmp_path / "run" / "x__1").exists():
        time.sleep(0.05)
    if killed:
        first.kill()
        first.wait()
        (tmp_path / "run" / "x__1").rmdir()
        monkeypatch.setitem(reproduce.METHODS, "bias", ("", str(script), ""))
    row = reproduce.execute(Run("Walker", "bias", 1, 9600), tmp_path / "run", tmp_path / "no")
    if not killed:  # the second found the first one's result: its own script would have failed
        assert first.wait() == 0
    assert (row["return"], row["return_stderr"], row["env"]) == ("1.0", "0.5", "Walker")
    assert row["commit"] and row["machine"]


@pytest.mark.slow
def test_a_run_that_someone_resumes_by_hand_is_not_written_to(tmp_path, capsys):
    """The script's own lock, in its own folder, refuses it; and that is free again once the sweep has ended."""
    run = Run("Grid-World", "bias", 1, FRAMES)
    args = local_args(tmp_path, seeds=(1,), total_timesteps=float(FRAMES))
    reproduce.main(args)
    (result,) = (tmp_path / "runs" / run.name).glob("*/result.json")
    assert {path.parent for path in tmp_path.glob("runs/**/lock")} == {result.parent, result.parent.parent}
    whole = json.loads(result.read_text())
    result.unlink()  # as if it had been stopped at its last checkpoint
    capsys.readouterr()
    with open(result.parent / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(SystemExit) as exit_:
            reproduce.main(args)
    out, err = capsys.readouterr()
    assert exit_.value.code == 1 and "again: Grid" not in out  # it does not help to try at once
    assert f"another process is training in {result.parent}: wait until it ends, or stop it." in err
    reproduce.main(args)
    again = json.loads(result.read_text())
    assert [again[name] for name in ("evaluation", "eval_history")] == [
        whole[name] for name in ("evaluation", "eval_history")
    ]


def local_args(tmp_path, **more):
    folders = {"runs_dir": str(tmp_path / "runs"), "results_dir": str(tmp_path / "results")}
    return Args("figure1", envs=("Grid-World",), methods=("bias",), executor="local", **folders, **more)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("print('one\\rtwo')", "RunFailed: exit status 0\n    two"),
        ("print('three'); raise SystemExit(1)", "exit status 1\n    three"),
    ],
)
def test_a_run_without_a_result_failed(body, why, tmp_path, monkeypatch, capsys):
    """It is tried again as often as --retries says."""
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'tries')!r}, 'a').write('x'); {body}")
    monkeypatch.setitem(reproduce.METHODS, "bias", ("Bias-HyperInit", str(script), ""))
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(local_args(tmp_path, seeds=(1,), retries=2))
    assert exit_.value.code == 1
    assert why in capsys.readouterr().err
    assert (tmp_path / "tries").read_text() == "xxx"


def test_an_error_of_its_own_stops_the_sweep(tmp_path, monkeypatch):
    """A full disk, for example: what runs is stopped, what waits is not begun."""
    script = tmp_path / "slow.py"
    script.write_text(FAKE_SCRIPT.replace("sleep(3)", "sleep(1)"))
    monkeypatch.setitem(reproduce.METHODS, "bias", ("Bias-HyperInit", str(script), ""))
    monkeypatch.setattr(reproduce, "append_row", lambda row, results_dir: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce.main(local_args(tmp_path, seeds=(1, 2, 3, 4), workers=1))
    assert len(list(tmp_path.glob("runs/*/log.txt"))) <= 2
    assert not list(tmp_path.glob("runs/stop-*"))


def test_a_sweep_whose_reader_has_gone_stops(tmp_path, monkeypatch):
    """As after Ctrl-C in `reproduce.py ... 2>&1 | tee log`, which takes tee as well."""
    script = tmp_path / "slow.py"
    script.write_text(FAKE_SCRIPT.replace("sleep(3)", "sleep(1)"))
    monkeypatch.setitem(reproduce.METHODS, "bias", ("Bias-HyperInit", str(script), ""))

    class Gone(reproduce.tqdm):
        def set_postfix_str(self, *of):
            raise BrokenPipeError

        def write(self, text):
            if text.startswith("stopping"):
                raise BrokenPipeError

    monkeypatch.setattr(reproduce, "tqdm", Gone)
    with pytest.raises(BrokenPipeError):
        reproduce.main(local_args(tmp_path, seeds=(1, 2, 3, 4), workers=1))
    time.sleep(3)  # for those that would still be started
    assert len(list(tmp_path.glob("runs/*/log.txt"))) <= 2
    assert not list(tmp_path.glob("runs/stop-*"))


def test_a_dead_cluster_is_told_at_once(tmp_path, capsys):
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed (requirements-optional.txt)")
    args = local_args(tmp_path)
    args.executor, args.address = "ray", "127.0.0.1:1"
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(args)
    assert exit_.value.code == 2
    assert "no Ray cluster answers at --address 127.0.0.1:1" in capsys.readouterr().err


def test_machines_of_a_run_in_pieces_are_all_kept(tmp_path, monkeypatch):
    for machine in ("one", "two", "one"):
        monkeypatch.setattr(reproduce, "describe_machine", lambda machine=machine: {"machine": machine, "python": "3"})
        reproduce.note_machine(tmp_path)
    assert json.loads((tmp_path / "machine.json").read_text()) == {"machine": "one; two", "python": "3"}


def test_a_machine_without_git(monkeypatch):
    def run(*arguments, **more):
        raise FileNotFoundError("git")

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    assert reproduce.describe_machine()["commit"] == ""


def test_a_repository_around_a_copy_is_not_named(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(reproduce, "ROOT", tmp_path / "copy")
    assert reproduce.describe_machine()["commit"] == ""


def test_no_locks_are_told_once(tmp_path, monkeypatch, capsys):
    """As NFS and Lustre without them do."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(reproduce.fcntl, "flock", flock)
    for k in (1, 2):
        reproduce.append_row(fake_row(Run("Walker", "bias", k, 100), k), tmp_path)
    assert len(reproduce.read_rows(tmp_path)) == 2
    assert capsys.readouterr().err.count("cannot be locked (Function not implemented)") == 1


def test_rows_that_cannot_be_read_are_passed_over(tmp_path, capsys):
    """Each is told once, with file and line; the whole ones count."""
    path, runs = tmp_path / "Walker.csv", [Run("Walker", "bias", k, 100) for k in range(1, 8)]
    for run in runs:
        reproduce.append_row(fake_row(run, run.seed, args='{"a": 1}', curve="[[0, 1]]"), tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1][:-4]  # inside the last column
    lines[2] = lines[2].replace(b",2,", b",two,", 1).replace(b",2,", b",two,")
    lines[3] = lines[3].replace(b"bias", b"bi\xff\xfes")
    lines[4] += lines[5]  # a lost end of line
    del lines[5]
    path.write_bytes(b"\n".join(lines))
    reproduce.append_row(fake_row(Run("Walker", "bias", 9, 100), 9), tmp_path)  # a file that is not UTF-8 still grows
    assert sorted(run.seed for run in reproduce.read_rows(tmp_path)) == [6, 7, 9]
    error = capsys.readouterr().err
    assert [f"line {k} of {path}" in error for k in range(1, 8)] == [False, True, True, True, True, False, False]
    reproduce.read_rows(tmp_path)
    assert capsys.readouterr().err == ""


def test_results_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Nowhere to write is told before a run; a disk that fills up later costs no run."""
    args = local_args(tmp_path, seeds=(1,))
    (tmp_path / "results").symlink_to("/proc")  # where nobody makes files, not even root
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(args)
    assert exit_.value.code == 2 and "choose another --runs-dir or --results-dir" in capsys.readouterr().err
    (tmp_path / "results").unlink()

    script = tmp_path / "quick.py"
    script.write_text(FAKE_SCRIPT.replace("sleep(3)", "sleep(0)"))
    monkeypatch.setitem(reproduce.METHODS, "bias", ("Bias-HyperInit", str(script), ""))

    def full(row, results_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(reproduce, "append_row", full)
        reproduce.main(args)
    assert exit_.value.code == 1
    err = capsys.readouterr().err
    assert "its row could not be written ([Errno 28] No space left on device)" in err
    assert "again: " not in err and "begins anew" not in err  # it is finished
    (result,) = tmp_path.glob("runs/*/x__1/result.json")
    before = result.stat().st_mtime_ns
    monkeypatch.setattr(reproduce, "draw", lambda *of: [])
    reproduce.main(args)
    assert result.stat().st_mtime_ns == before and "1 of them done" in capsys.readouterr().out
    assert (tmp_path / "results" / "Grid-World.csv").read_text().count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGKILL,)])
def test_no_script_outlives_its_sweep(numbers, tmp_path):
    """Ctrl-C twice, or a kill: the scripts end at a checkpoint, and the next sweep goes on."""
    command = tiny(tmp_path, "local", "figure1", "--envs", "Grid-World", "--methods", "bias", "--seeds", "1")
    command[command.index(str(FRAMES))] = "24000"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not list(tmp_path.glob("runs/*/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    process.wait(timeout=60)
    (log,) = tmp_path.glob("runs/*/log.txt")
    deadline = time.time() + 60  # a run that nobody stops ends without saying so
    while "stopped by SIGTERM after iteration" not in log.read_text():
        assert time.time() < deadline
        time.sleep(0.1)
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoint.pt")
    with open(checkpoint.parent / "lock") as lock:
        while True:  # until it has ended
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.time() < deadline
                time.sleep(0.1)
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) == 1


def test_a_terminal_without_plus_minus(tmp_path):
    rows = [fake_row(Run("Grid-World", "bias", k, 4_000_000), k, curve="[[0, 1]]") for k in (1, 2)]
    code = (
        "import sys, runpy, reproduce; from pathlib import Path;"
        "sys.argv = ['reproduce.py', 'table1', '--envs', 'Grid-World', '--methods', 'bias', '--seeds', '1', '2',"
        "'--executor', 'local', '--results-dir', sys.argv[1], '--runs-dir', sys.argv[1]];"
        "runpy.run_path(reproduce.__file__, run_name='__main__')"
    )
    for row in rows:
        reproduce.append_row(row, tmp_path)
        run = reproduce.run_of(row)
        (tmp_path / run.name / "x__1").mkdir(parents=True)
        mean = {"mean": float(row["return"]), "stderr": 0.5}
        result = {"evaluation": {"meta_episodic_return": mean}, "eval_history": [[1, mean["mean"]]], "frames": 4e6}
        result |= {
            "parameters": {"total": 2, "base_network": 1},
            "SPS": 3200,
            "versions": {},
            "args": {"eval_interval": 1},
        }
        (tmp_path / run.name / "x__1" / "result.json").write_text(json.dumps(result | {"wall_time": 3}))
        reproduce.note_machine(tmp_path / run.name)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1.5 ? 0.5" in done.stdout, done.stderr
    assert "1.5 ± 0.5" in (tmp_path / "table1.md").read_text(encoding="utf-8")


def test_refused_arguments_are_not_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(reproduce.METHODS, "bias", ("Bias-HyperInit", "varibad_hyper.py", "--init bias --gamma 2"))
    args = Args(
        "figure1", envs=("Grid-World",), methods=("bias",), seeds=(1,), executor="local", total_timesteps=9600.0
    )
    args.runs_dir, args.results_dir = str(tmp_path / "runs"), str(tmp_path / "results")
    with pytest.raises(SystemExit) as exit_:
        reproduce.main(args)
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert "again: Grid" not in out
    assert "exit status 2" in err and "--gamma is 2.0: it must be more than 0, and at most 1." in err
    assert not list((tmp_path / "results").glob("*.png"))


def test_progress_of_a_run_is_read_from_its_log(tmp_path):
    assert reproduce.frames_so_far(tmp_path) == 0
    log = "x iterations of 16 x 60 = 960 frames on cpu\n0 frames: meta-episode return -3.25\r"
    (tmp_path / "log.txt").write_text(log)
    assert reproduce.frames_so_far(tmp_path) == 0
    log += "48,000 frames: meta\r96,000 frames: m"
    (tmp_path / "log.txt").write_text(log)
    assert reproduce.frames_so_far(tmp_path) == 96_000
    (tmp_path / "log.txt").write_text(f"{log}\nfinished: meta-episode return 3.00\nlook: tensorboard --logdir 7 frames")
    assert reproduce.frames_so_far(tmp_path) == 96_000
    (tmp_path / "log.txt").write_text("\n a\r b\n\nc\nd\re \nf\n")
    assert reproduce.last_lines(tmp_path / "log.txt", 3) == "    c\n    e\n    f"


def test_the_last_row_of_a_command_counts(tmp_path):
    run = Run("Walker", "bias", 1, 100)
    for value in (1.0, 2.0, 2.0):
        reproduce.append_row(fake_row(run, value), tmp_path)
    rows = reproduce.read_rows(tmp_path)
    assert [row["return"] for row in rows.values()] == ["2.0"]
    assert (tmp_path / "Walker.csv").read_text().count("\n") == 3  # a header, two rows; the same one is not added twice
    (tmp_path / "Ant-Dir.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        reproduce.read_rows(tmp_path)


@pytest.mark.parametrize("left", [0, 30, 300, 10**6])
def test_rows_after_a_full_disk(left, tmp_path):
    """Whatever it left of the file, a row that is added is whole, and no other is made of the remains."""
    path, rows = (
        tmp_path / "Walker.csv",
        [fake_row(Run("Walker", "bias", k, 100), k, curve='[[1, "a"]]') for k in (1, 2, 3)],
    )
    for row in rows[:2]:
        reproduce.append_row(row, tmp_path)
    whole = path.read_text()
    header = whole.index("\n") + 1
    path.write_text(whole[:0] if left == 0 else whole[: header + left])
    reproduce.append_row(rows[2], tmp_path)
    read = reproduce.read_rows(tmp_path)
    assert read[Run("Walker", "bias", 3, 100)] == rows[2]
    assert all(row in rows for row in read.values())


def test_rows_of_other_commands_are_not_read(tmp_path):
    """How often a run was evaluated does not matter."""
    command = shlex.join(Run("Walker", "bias", 1, 1_000_000).command)
    interval = re.search(" --eval-interval [0-9]+", command)[0]
    for seed, changed in enumerate(["", " --eval-interval 7", f"{interval} --gamma 0.9"], 1):
        row = fake_row(Run("Walker", "bias", seed, 1_000_000), seed)
        reproduce.append_row(row | {"command": row["command"].replace(interval, changed)}, tmp_path)
    assert {run.seed for run in reproduce.read_rows(tmp_path)} == {1, 2}


def test_a_row_has_the_interval_of_its_own_run(tmp_path):
    """Also where this version would choose another; the table of commands has both."""
    run, other = (Run("Grid-World", "bias", seed, 1_000_000) for seed in (1, 2))
    folder = tmp_path / "x__1"
    folder.mkdir()
    result = {"evaluation": {"meta_episodic_return": {"mean": 1.0, "stderr": 0.5}}, "eval_history": [[9, 1.0]]}
    result |= {"parameters": {"total": 2, "base_network": 1}, "SPS": 1, "versions": {}, "args": {"eval_interval": 7}}
    (folder / "result.json").write_text(json.dumps(result | {"frames": 9, "wall_time": 3}))
    reproduce.note_machine(tmp_path)
    row = reproduce.make_row(run, tmp_path)
    assert "--eval-interval 7" in row["command"] != shlex.join(run.command)
    table = reproduce.make_seeds_table({run: row, other: fake_row(other, 2)}, [run, other])
    assert re.findall(r"interval (\d+)` \| 1,000,000 frames \| (\d)", table) == [("7", "1"), ("20", "2")]


def test_a_run_that_was_continued_is_no_row_of_the_shorter_one(tmp_path, capsys):
    (tmp_path / "x__1").mkdir()
    (tmp_path / "x__1" / "result.json").write_text('{"args": {"total_timesteps": 2e6}}')
    with pytest.raises(SystemExit) as exit_:
        reproduce.make_row(Run("Grid-World", "bias", 1, 1_000_000), tmp_path)
    assert exit_.value.code == 2
    assert f"the run in {tmp_path} has 2,000,000 frames: move it away" in capsys.readouterr().err


# --- What is kept


GONE = {"compile": False, "norm_clip": 10.0, "torch_threads": 1}  # flags of older versions: what is now always so


def test_kept_rows_are_what_their_commands_give_today():
    rows = reproduce.read_rows(ROOT / "results")
    for row in rows.values():
        script, *flags = shlex.split(row["command"])
        args = SCRIPTS[script].parse_args(flags)
        assert args.threads == 1
        today = json.loads(json.dumps(vars(args))) | GONE
        for name, value in json.loads(row["args"]).items():
            if name not in ("save_model", "env_workers"):  # change no result
                assert today[name] == value, (row["command"], name)
        total = row["frames"], row["curve"]
        assert json.loads(total[1])[-1][0] == int(total[0]) <= args.total_timesteps
        assert json.loads(row["curve"])[-1][1] == float(row["last_return"])
        assert reproduce.final_return(json.loads(row["curve"])) == float(row["return"])


def test_of_two_budgets_the_one_with_more_cells_is_kept_and_of_equals_the_larger():
    runs = [Run("Walker", method, 1, 200) for method in ("standard", "bias", "film")]
    runs += [Run("Walker", method, 1, 300) for method in ("standard", "bias")]
    runs += [Run("Walker", "bias", 1, 100, "XS"), Run("ML10", "bias", 1, 100)]
    rows = {run: fake_row(run, 1) for run in reversed(runs)}
    assert reproduce.kept_runs(rows, "table1") == runs[:3]
    assert reproduce.kept_runs(rows, "figure1") == runs[3:5]  # FiLM is not of the figure
    assert reproduce.kept_runs(rows, "figure3") == runs[5:6]
    assert reproduce.kept_runs(rows, "table2") == runs[6:]

    few, many = ([Run("Walker", "bias", seed, frames) for seed in range(n)] for n, frames in ((2, 300), (3, 200)))
    rows = {run: fake_row(run, 1) for run in few + many}
    assert reproduce.kept_runs(rows, "figure1") == many  # two seeds are too few to test
    more = Run("Walker", "bias", 3, 300)
    five = [Run("Walker", "bias", seed, 200) for seed in (3, 4)]
    rows |= {run: fake_row(run, 1) for run in [more, *five]}
    assert reproduce.kept_runs(rows, "figure1") == [*few, more]  # three are not


def test_kept_runs_are_at_the_chosen_learning_rate():
    """Of the cells that have one; the seeds that chose, or tried things out, are in no table."""
    tuning = [Run("Walker", "bias", seed, 50, learning_rate=rate) for seed in (11, 12) for rate in (3e-4, 7e-4)]
    at = {
        (method, rate): [Run("Walker", method, seed, 200, learning_rate=rate) for seed in (1, 2, 3)]
        for method in ("standard", "bias")
        for rate in (None, 3e-4, 7e-4)
    }
    unreported = [Run("Walker", "bias", 13, 200, learning_rate=rate) for rate in (None, 3e-4, 7e-4)]
    unreported += [Run("Walker", "standard", seed, 200) for seed in (11, 12, 13)]

    def kept(best, *more):
        runs = [*sum(at.values(), []), *unreported, *more]
        return reproduce.kept_runs({run: fake_row(run, float(run.learning_rate == best)) for run in runs}, "table1")

    assert kept(3e-4, *tuning) == at["standard", None] + at["bias", 3e-4]
    assert kept(7e-4, *tuning) == at["standard", None] + at["bias", 7e-4]
    # seed 12 has not done the other rate, so that it cannot be chosen; without seed 12 nothing is
    assert kept(7e-4, *tuning[:3]) == at["standard", None] + at["bias", 3e-4]
    assert kept(7e-4, *tuning[:2]) == at["standard", None] + at["bias", None]
    # of two budgets, the one with more rates chooses, of equals the larger
    larger = [Run("Walker", "bias", seed, 60, learning_rate=3e-4) for seed in (11, 12)]
    assert kept(7e-4, *tuning, *larger) == at["standard", None] + at["bias", 7e-4]
    assert kept(7e-4, tuning[1], tuning[3], *larger) == at["standard", None] + at["bias", 3e-4]


@pytest.mark.docs
def test_readme_and_docs_are_made_from_the_kept_rows():
    """Every generated part stands somewhere, and as it is generated."""
    blocks = reproduce.readme_blocks(reproduce.read_rows(ROOT / "results"))
    found = set()
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = page.read_text()
        names = re.findall(r"<!-- (?!end)(.*) -->", text)
        assert re.findall(r"<!-- end of (.*) -->", text) == names
        found |= set(names)
        assert reproduce.fill_blocks(text, blocks) == text, page
    assert found == blocks.keys()


def test_readme_of_no_rows_then_of_some(tmp_path, monkeypatch, capsys):
    """Its generated parts are empty, and filled as soon as there are rows; what stands around them is left alone."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    names = sorted(reproduce.readme_blocks({}))
    tables = ["table1", "table2"]
    assert names == ["claims", "comparisons", "curves", "frames to 36", "learning rates", "seeds", *tables]
    pages = {tmp_path / "README.md": tables, tmp_path / "docs" / "one.md": names, tmp_path / "docs" / "two.md": []}
    empty = {
        page: "before\n" + "\n".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in of_page) + "after\n"
        for page, of_page in pages.items()
    }
    for page, text in empty.items():
        page.write_text(text.replace("-->\n<!-- end", "-->\n| old |\n<!-- end"))
    args = Args("readme", results_dir=str(tmp_path / "results"))
    reproduce.main(args)
    assert all(page.read_text() == text for page, text in empty.items())
    assert not list((tmp_path / "pictures").iterdir()) and not capsys.readouterr().out

    runs = [Run("Grid-World", "bias", seed, 20, learning_rate=2e-3) for seed in (1, 2, 3)]
    runs += [Run("Grid-World", "standard", seed, 20) for seed in (1, 2, 3)]  # without tuning: the preset's rate
    runs += [Run("Grid-World", "bias", seed, 10, learning_rate=rate) for seed in (11, 12) for rate in (7e-4, 2e-3)]
    for run in runs:
        value = run.seed + (2.0 if run.method == "bias" else -9.0) + 100 * (run.learning_rate or 0)
        row = fake_row(run, value, curve=json.dumps([[10, 1.0], [20, value]]), wall_time="36")
        reproduce.append_row(row, tmp_path / "results")
    reproduce.main(args)
    text = (tmp_path / "docs" / "one.md").read_text()
    blocks = dict(re.findall(r"<!-- (?!end)(.*?) -->\n(.*?)<!-- end of \1 -->", text, re.S))
    assert "| Bias-HyperInit | **4.2 ± 0.6** (3 seeds, 2e-3) | 36.7 ± 0.2 |" in blocks["table1"]
    assert "| Standard | -7.0 ± 0.6 (3 seeds) | 35.5 ± 0.4 |" in blocks["table1"]
    assert "| **4.2 ± 0.6** |" in blocks["curves"]
    assert "| 1, 2, 3 | 3.20, 4.20, 5.20 | 0.0 |" in blocks["seeds"] and blocks["table2"] == ""
    assert "| Table 1 | Grid-World | Standard | Bias-HyperInit | -11.20 ± " in blocks["comparisons"]
    assert "| Grid-World | Bias-HyperInit | Standard | 11.20 ± " in blocks["claims"]
    rates = "| Grid-World | Bias-HyperInit | 10 | 13.57 (13.07, 14.07) | **13.70 (13.20, 14.20)** † |"
    assert rates in blocks["learning rates"]
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- ") and readme.endswith("-->\nafter\n") and blocks["table1"] in readme
    assert (tmp_path / "docs" / "two.md").read_text() == empty[tmp_path / "docs" / "two.md"]
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in ("figure1", "robustness") for kind in ("png", "svg")}


def test_rows_of_earlier_defaults_are_kept_apart():
    """They can be read still, and no table takes them for today's."""
    paths = sorted((ROOT / "results" / "before-fair-defaults").glob("*.csv"))
    earlier = [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]
    assert len(earlier) == 209 and {row["env"] for row in earlier} == {"Grid-World", "Cheetah-Dir", "Walker"}
    today = reproduce.read_rows(ROOT / "results")
    assert not {row["started"] for row in today.values()} & {row["started"] for row in earlier}


@pytest.mark.docs
@pytest.mark.parametrize("target", reproduce.FIGURES)
def test_pictures_are_made_from_the_kept_rows(target, tmp_path):
    """And there is none without rows, in the folder or in the README."""
    rows = reproduce.read_rows(ROOT / "results")
    runs, kept = reproduce.kept_runs(rows, target), ROOT / "pictures" / f"{target}.svg"
    if not runs:
        assert not list(kept.parent.glob(f"{target}.*")) and f"{target}.png" not in (ROOT / "README.md").read_text()
        return
    reproduce.draw(target, rows, runs, tmp_path / target)
    assert (tmp_path / f"{target}.svg").read_bytes() == kept.read_bytes()
    assert (ROOT / "pictures" / f"{target}.png").stat().st_size < 300_000
