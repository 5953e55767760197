"""The benchmark runs and prints its tables. No time is judged here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench.py"


def rows(*flags):
    """Cells of the tables' rows."""
    done = subprocess.run([sys.executable, str(BENCH), "--quick", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return [row for row in table if "---" not in row[0]]


def numbers(row):
    return [float(cell.replace(",", "")) for cell in row if re.fullmatch(r"[\d.,]+", cell)]


@pytest.mark.slow
def test_physics_and_layer_tables():
    table = rows("physics", "layer")
    assert [row[0] for row in table] == [
        *("task", "Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid"),
        *("actor", "small, 16 samples", "XL, 16 samples"),
    ]
    assert all(numbers(row) for row in table[1:5] + table[6:])


@pytest.mark.slow
@pytest.mark.parametrize("run", ["RL2 on Grid-World, hyper", "Walker, standard"])
def test_split_of_a_run(run):
    """Phases are all there and make up the whole; RL2 has no VAE."""
    header, row = rows("train", "--only", run)
    cells = dict(zip(header, row, strict=True))
    assert cells["run"] == run
    shares = {name.removesuffix(" %"): int(cell) for name, cell in cells.items() if name.endswith("%")}
    assert 95 <= sum(shares.values()) <= 105
    assert (shares.pop("VAE") > 0) == (run == "Walker, standard")
    assert min(shares["environment"], shares["policy"], shares["encoder"], shares["PPO"]) > 0
    assert float(cells["frames/s"].replace(",", "")) > 0 and float(cells["peak MB"].replace(",", "")) > 200
