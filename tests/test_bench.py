"""The benchmark runs and prints its tables. No time is judged here."""

import re
import subprocess
import sys
from pathlib import Path

import bench
import pytest

import rl2_hyper
import varibad_hyper

BENCH = Path(__file__).parent / "bench.py"


def rows(*flags):
    """Cells of the tables' rows."""
    done = subprocess.run([sys.executable, str(BENCH), "--quick", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return [row for row in table if "---" not in row[0]]


def numbers(row):
    return [float(cell.replace(",", "")) for cell in row if re.fullmatch(r"[\d.,]+", cell)]


def test_every_run_is_one_that_the_scripts_accept():
    """Flags that are gone, or that do not fit together, would be noticed only hours into the benchmark."""
    for flags in (bench.TRAINING | bench.GROWTH | bench.SWEEP).values():
        script, flags = (rl2_hyper, flags[1:]) if flags[0] == "rl2_hyper" else (varibad_hyper, flags)
        args = script.parse_args(flags)
        script.check_args(args)
        assert args.total_timesteps // (args.num_envs * args.num_steps) > bench.WARM_UP


@pytest.mark.slow
def test_physics_and_layer_tables():
    """Every cell but the name is a number, or `-` where a task needs no contact forces."""
    table = rows("physics", "layer")
    assert [row[0] for row in table] == [
        *("task, 16 environments", "Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid"),
        *("benchmark", "Pick-Place", "ML10"),
        *("actor", "small, 16 samples", "XL, 16 samples", "XL, 25 features, 16 samples"),
    ]
    for row in table:
        if row[0] not in ("task, 16 environments", "benchmark", "actor"):
            assert len(numbers(row)) + row.count("-") == len(row) - 1, row
    assert [row.count("-") for row in table[1:5]] == [1, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["RL2 on Grid-World, hyper", "Walker, standard"])
def test_split_of_a_run(run):
    """Every phase takes time, but for RL2's VAE, which it has not."""
    header, row = rows("train", "--only", run)
    cells = dict(zip(header, row, strict=True))
    assert cells["run"] == run
    shares = {name.removesuffix(" %"): int(cell) for name, cell in cells.items() if name.endswith("%")}
    assert (shares.pop("VAE") > 0) == (run == "Walker, standard")
    assert min(shares["environment"], shares["policy"], shares["encoder"], shares["PPO"]) > 0
    assert float(cells["frames/s"].replace(",", "")) > 0 and float(cells["peak MB"].replace(",", "")) > 200
