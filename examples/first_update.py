"""How far PPO's first update moves the policy, and the return that such a run reaches: python examples/first_update.py

Makes the table and the picture of docs/results.md from results/first-update/Grid-World.csv. With --read it first makes
that file from VariBAD's runs on Grid-World that chose the learning rates, in runs/reproduce.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import reproduce

CSV = ROOT / "results" / "first-update" / "Grid-World.csv"
NAMES = ["method", "seed", "learning_rate", "entropy", "approx_kl", "return"]


def read_runs(folder: Path) -> list[dict[str, str]]:
    """Of every run: entropy and approximate KL, means over the minibatches of its first update, and its return."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = []
    for path in folder.glob("Grid-World__*__1[12]__1000000__*/*__varibad_hyper__*/result.json"):
        events = EventAccumulator(str(path.parent), size_guidance={"scalars": 0}).Reload()
        first = [f"{events.Scalars(f'losses/{name}')[0].value:.6f}" for name in ("entropy", "approx_kl")]
        _, method, seed, *_ = path.parent.parent.name.split("__")
        result = json.loads(path.read_text())
        final = f"{reproduce.final_return(result['eval_history']):.2f}"
        values = [method, seed, reproduce.short(result["args"]["learning_rate"]), *first, final]
        rows.append(dict(zip(NAMES, values, strict=True)))
    order = list(reproduce.METHODS)
    return sorted(rows, key=lambda row: (order.index(row["method"]), float(row["learning_rate"]), row["seed"]))


def mean_by_rate(rows: list[dict[str, str]], name: str) -> dict[str, dict[str, float]]:
    """method: learning rate: mean over the seeds."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values.setdefault(row["method"], {}).setdefault(row["learning_rate"], []).append(float(row[name]))
    return {method: {rate: float(np.mean(x)) for rate, x in by_rate.items()} for method, by_rate in values.items()}


def make_table(rows: list[dict[str, str]]) -> str:
    """Markdown: entropy at 7e-4 and KL at every rate; the rate of the highest return bold."""
    entropy, kl, returns = (mean_by_rate(rows, name) for name in ("entropy", "approx_kl", "return"))
    lines = []
    for method, by_rate in kl.items():
        best = max(returns[method], key=returns[method].get)
        cells = [f"**{value:.4f}**" if rate == best else f"{value:.4f}" for rate, value in by_rate.items()]
        lines.append([reproduce.METHODS[method][0], f"{entropy[method]['7e-4']:.3f}", *cells])
    first, *rates = by_rate
    return reproduce.markdown(["method", "entropy", f"KL at {first}", *rates], lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """A line per method, from the smallest to the largest learning rate."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    kl, returns = mean_by_rate(rows, "approx_kl"), mean_by_rate(rows, "return")
    for method in kl:
        x, y = list(kl[method].values()), list(returns[method].values())
        axis.plot(x, y, "o-", ms=4, color=reproduce.COLORS[method], label=reproduce.METHODS[method][0])
    axis.set(xscale="log", xlabel="approximate KL of the first update", ylabel="return, last tenth of 1,000,000 frames")
    axis.legend(fontsize=8, title="mean of two seeds", title_fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    if "--read" in sys.argv[1:]:
        rows = read_runs(ROOT / "runs" / "reproduce")
        if len(rows) != 72:
            sys.exit(f"runs/reproduce has {len(rows)} of the 72 runs: do the others by the command in docs/results.md.")
        with open(CSV, "w", newline="") as file:
            writer = csv.DictWriter(file, NAMES, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with open(CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    print(make_table(rows))
    draw(rows, ROOT / "pictures" / "first-update.png")
    print("drawn: pictures/first-update.png")
