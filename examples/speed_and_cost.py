"""What the returns on Cheetah-Dir consist of, running and control cost: python examples/speed_and_cost.py

Prints the table of docs/results.md from results/speed-and-cost/Cheetah-Dir.csv. With --read it first makes that file
from the reported runs in runs/reproduce, each of which plays its last evaluation again.
"""

import csv
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import reproduce

CSV = ROOT / "results" / "speed-and-cost" / "Cheetah-Dir.csv"
NAMES = ["method", "seed", "return", "forwards", "backwards", "actions"]


def play(script: ModuleType, folder: Path) -> dict[str, float]:
    """The mean return of a run's last evaluation, and what it consists of.

    forwards, backwards: the reward for running, mean over the tasks of that direction; actions: the control cost, of
    the greedy policy's actions. Sampled actions, in training, cost more.
    """
    args = script.load_saved(str(folder))[1]
    agent, envs = script.load_agent(str(folder))
    taken, step = [], envs.envs.step
    envs.envs.step = lambda actions: taken.append(actions) or step(actions)
    played = script.evaluate(agent, envs, script.seeds_of(args)["eval_envs"])
    returns = np.array([meta_episode.returns.sum() for meta_episode in played])  # [tasks]
    costs = 0.05 * np.square(taken).sum(axis=(0, 2))  # of [200, tasks, 6]
    forwards = envs.envs.tasks[:, 0] > 0
    paid = {"forwards": (returns + costs)[forwards].mean(), "backwards": (returns + costs)[~forwards].mean()}
    return {"return": returns.mean(), **paid, "actions": -costs.mean()}


def make_table(rows: list[dict[str, str]]) -> str:
    """Markdown: means over seeds and their standard errors."""
    lines = []
    for method in [name for name in reproduce.METHODS if any(row["method"] == name for row in rows)]:
        of_method = [row for row in rows if row["method"] == method]
        texts = [reproduce.mean_text([float(row[name]) for row in of_method], 0) for name in NAMES[2:]]
        lines.append([reproduce.METHODS[method][0], *texts])
    return reproduce.markdown(["method", "return", "running forwards", "running backwards", "control cost"], lines)


if __name__ == "__main__":
    if "--read" in sys.argv[1:]:
        rows = []
        for run in reproduce.kept_runs(reproduce.read_rows(ROOT / "results"), "table1"):
            if run.env == "Cheetah-Dir":
                results = sorted((ROOT / "runs" / "reproduce" / run.name).glob("*/result.json"))
                if not results:
                    sys.exit(f"runs/reproduce has no finished run {run.name}: do it by the command in docs/results.md.")
                script = importlib.import_module(reproduce.METHODS[run.method][1].removesuffix(".py"))
                earned = {name: f"{value:.2f}" for name, value in play(script, results[-1].parent).items()}
                rows.append({"method": run.method, "seed": run.seed, **earned})
                print(json.dumps(rows[-1]))
        CSV.parent.mkdir(exist_ok=True)
        with open(CSV, "w", newline="") as file:
            writer = csv.DictWriter(file, NAMES, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with open(CSV, newline="") as file:
        print(make_table(list(csv.DictReader(file))))
