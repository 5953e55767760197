"""`python hyperinit.py`: its figures against slow plain code, its table and its picture."""

import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import hyperinit

ROOT = Path(__file__).parent.parent


def draw(*flags):
    return subprocess.run([sys.executable, str(ROOT / "hyperinit.py"), *flags], capture_output=True, text=True)


@pytest.mark.parametrize("scheme", ["weight", "kaiming", "hfo"])
def test_figures_against_generated_weights(scheme, monkeypatch):
    """Every task's weights are written out and applied to every observation alone."""
    torch.manual_seed(1)
    layers, x = hyperinit.generated_network(scheme), hyperinit.random_embeddings(4)
    monkeypatch.setattr(hyperinit, "generated_network", lambda scheme: layers)
    monkeypatch.setattr(hyperinit, "random_embeddings", lambda tasks: x)
    torch.manual_seed(2)
    figures = hyperinit.measure(scheme, tasks=4, observations=3)
    torch.manual_seed(2)
    observations = torch.randn(3, hyperinit.SIZES[0])

    squares, saturated, actions, parameters = [[], [], []], [], np.zeros((4, 3, 6)), []
    with torch.no_grad():
        for task in range(4):
            weights = [sum(x[task, k] * layer.weight[k] for k in range(hyperinit.K + 1)) for layer in layers]
            biases = [sum(x[task, k] * layer.bias[k, :, 0] for k in range(hyperinit.K + 1)) for layer in layers]
            parameters.append(torch.cat([tensor.flatten() for tensor in weights + biases]))
            for i, h in enumerate(observations):
                for k in range(3):
                    h = weights[k] @ h + biases[k]
                    squares[k] += h.square().tolist()
                    if k < 2:
                        h = torch.tanh(h)
                        saturated += (h.abs() > 0.99).tolist()
                actions[task, i] = h
    cosines = [
        torch.cosine_similarity(parameters[i], parameters[j], dim=0).item()
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    assert figures["scale"] == pytest.approx([math.sqrt(np.mean(values)) for values in squares], rel=1e-4)
    assert figures["saturated"] == pytest.approx([100 * np.mean(saturated)], abs=0.1)
    assert figures["likeness"] == pytest.approx([np.mean(cosines)], abs=1e-5)
    assert figures["spread"] == pytest.approx([math.sqrt(np.mean(actions.var(axis=0, ddof=1)))], rel=1e-4)
    np.testing.assert_allclose(figures["actions"], actions[:, 0, 0], rtol=1e-4, atol=1e-5)


def test_bias_hyperinit_gives_every_task_f_itself():
    figures = hyperinit.measure("bias")
    assert figures["spread"] == pytest.approx([0], abs=1e-6) and figures["likeness"] == pytest.approx([1])
    assert figures["scale"][0] == pytest.approx(5 / 3, rel=0.05)  # rows of length 5/3, inputs of variance 1


def test_scale_under_kaiming():
    """Weights and bias of the first layer have variance 2 |x|^2 / K, and inputs have variance 1."""
    torch.manual_seed(0)
    squares = [np.square(hyperinit.measure("kaiming", 20, 50)["scale"][0]) for _ in range(30)]
    length = np.mean([hyperinit.random_embeddings(500)[:, :-1].square().sum(1).mean().item() for _ in range(100)])
    assert np.mean(squares) == pytest.approx((64 + 1) * 2 * length / 10, rel=0.15)


@pytest.mark.slow
def test_table_and_picture(tmp_path):
    """Kaiming and normc saturate, Weight-HyperInit, HFI and HFO hold; the README's picture is this one."""
    done = draw("--picture", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in done.stdout.splitlines()[2:-1]}
    assert list(table) == list(hyperinit.HYPER_SCHEMES) and all(len(row) == 6 for row in table.values())
    scales, saturated = {name: row[:3] for name, row in table.items()}, {name: row[3] for name, row in table.items()}
    for name in ("bias", "weight", "hfi", "hfo"):
        assert 0.3 < min(scales[name]) and max(scales[name]) < 3 and saturated[name] < 30
    assert min(saturated["kaiming"], saturated["normc"]) > 45 and max(scales["orthogonal"][:2]) < 0.3
    told = re.search(r"\((\d+)% and (\d+)% of the units are\s+saturated\)", (ROOT / "README.md").read_text())
    assert told.groups() == (f"{saturated['kaiming']:.0f}", f"{saturated['normc']:.0f}")

    picture = matplotlib.image.imread(tmp_path / "out.png")
    assert picture.shape == (400, 1300, 4)
    kept = ROOT / "pictures" / "hyperinit.png"
    assert kept.stat().st_size < 300_000
    np.testing.assert_allclose(matplotlib.image.imread(kept).mean((0, 1)), picture.mean((0, 1)), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["missing/out.png", "out.txt"])
def test_picture_that_cannot_be_drawn(tmp_path, picture):
    done = draw("--picture", str(tmp_path / picture))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"--picture {tmp_path / picture} cannot be drawn" in done.stderr
