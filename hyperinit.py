"""How to initialise a hypernetwork: the layers that it generates, and the initialisers of its head.

A hypernetwork turns a task embedding into the parameters of a base network, phi = W x + b, where x is its last hidden
layer and (W, b) is its head. "Hypernetworks in Meta-Reinforcement Learning" (Beck et al., CoRL 2022), here "the paper",
shows that ordinary initialisations of the head fail and proposes Weight-HyperInit and Bias-HyperInit, which work.
HFI and HFO are from "Principled Weight Initialization for Hypernetworks" (Chang et al., ICLR 2020).

The head is kept as a *stack of base layers*. For a base layer with weight (out, in) it is a tensor [K + 1, out, in]:
slices 0 .. K-1 are the columns W_:,k, the last slice is b. The generated bias is a stack [K + 1, out, 1]: a layer of
fan-in 1 whose input is always 1. The initialisers below work in place on one such stack, as in `torch.nn.init`.
`python hyperinit.py` shows what each of them does to the policies of many tasks.

Letters: B batch, K = d_k features of the hypernetwork's last layer, P = out * in parameters of a base layer,
d_j fan-in of the base layer (in), d_i fan-out (out), f the base network's own initialisation, a function that fills one
(out, in) tensor in place. Variances are over draws of the head, for an embedding x of unit variance.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BaseInit = Callable[[Tensor], object]  # f: fills one (out, in) tensor in place


class HyperLinear(nn.Module):
    """A linear layer whose weight and bias are generated from an embedding, one layer per row of the batch.

    y = (sum_k x_k phi^k + phi_shared) applied to the input. The sum is linear in phi, so all K + 1 base layers are
    applied to the batch in one matrix product and their *results* are combined: the same arithmetic as generating the
    weights, but the (B, out, in) weights are never written.
    """

    def __init__(self, in_features: int, out_features: int, embedding_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(embedding_features + 1, out_features, in_features))  # [K+1, out, in]
        self.bias = nn.Parameter(torch.zeros(embedding_features + 1, out_features, 1))  # [K+1, out, 1]

    def forward(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        """Inputs [B, in], embedding with a 1 appended (x, 1) [B, K+1]; returns [B, out]. Eq. (2) and (3)'s W x + b."""
        per_slice = F.linear(inputs, self.weight.flatten(0, 1))  # [B, (K+1) * out]
        per_slice = per_slice.unflatten(1, self.weight.shape[:2])  # [B, K+1, out]
        bias = embedding @ self.bias[:, :, 0]  # [B, out]
        return torch.baddbmm(bias[:, None], embedding[:, None], per_slice)[:, 0]  # [B, out]


class FilmLinear(nn.Module):
    """A linear layer with a weight of its own whose outputs are scaled and shifted by the embedding (FiLM).

    y = scale(x) * (weight input) + shift(x); Perez et al., 2018, and section 4.3 of the paper.
    """

    def __init__(self, in_features: int, out_features: int, embedding_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))  # [out, in]
        self.scale = nn.Parameter(torch.zeros(embedding_features + 1, out_features, 1))  # [K+1, out, 1]
        self.shift = nn.Parameter(torch.zeros(embedding_features + 1, out_features, 1))  # [K+1, out, 1]

    def forward(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        """Inputs [B, in], embedding with a 1 appended [B, K+1]; returns [B, out]."""
        scale, shift = embedding @ self.scale[:, :, 0], embedding @ self.shift[:, :, 0]  # [B, out] each
        return scale * F.linear(inputs, self.weight) + shift


def normc_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """A base initialisation that torch.nn.init lacks: Gaussian rows scaled to length `gain` (OpenAI Baselines).

    (out, in), in place; variance gain^2 / in.
    """
    with torch.no_grad():
        tensor.normal_()
        return tensor.mul_(gain / tensor.norm(dim=1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# Default initialisations: they see the head as an ordinary (P, d_k) matrix and know nothing of the base network.


def head_matrix(stack: Tensor) -> Tensor:
    """The head's W as the ordinary matrix [P, K] that a default initialisation sees: a view of stack [K+1, out, in]."""
    return stack.detach()[:-1].view(len(stack) - 1, -1).T


def kaiming_hyper_(stack: Tensor) -> Tensor:
    """Kaiming on the head: W ~ N(0, 2 / d_k), b = 0. He et al., 2015; section 3.3 of the paper.

    It keeps the scale of the head's *output*, and that output is weights: every generated parameter has variance 2,
    whatever the fan-in of its layer, so a base layer multiplies the variance of its input by 2 d_j and saturates.
    Stack [K+1, out, in], in place.
    """
    nn.init.kaiming_normal_(head_matrix(stack))
    nn.init.zeros_(stack[-1])
    return stack


def normc_hyper_(stack: Tensor) -> Tensor:
    """Normc on the head: each row of W is Gaussian, scaled to length 1; b = 0. Baselines; section 3.3 of the paper.

    Each generated parameter is a random direction of the embedding with variance 1, again whatever its layer's fan-in.
    Stack [K+1, out, in], in place.
    """
    normc_(head_matrix(stack))
    nn.init.zeros_(stack[-1])
    return stack


def orthogonal_hyper_(stack: Tensor) -> Tensor:
    """Orthogonal on the head: orthonormal columns of W (rows where P < d_k); b = 0. Saxe et al., 2014; section 3.3.

    The base networks of two orthogonal embeddings are orthogonal, but small: P parameters share a vector of length |x|,
    so a generated parameter has variance d_k / P (1 where P < d_k). Stack [K+1, out, in], in place.
    """
    nn.init.orthogonal_(head_matrix(stack))
    nn.init.zeros_(stack[-1])
    return stack


# ---------------------------------------------------------------------------------------------------------------------
# Initialisations made for hypernetworks.


def _uniform_head_(stack: Tensor, variance: float) -> Tensor:
    bound = (3 * variance) ** 0.5  # U(-a, a) has variance a^2 / 3
    nn.init.uniform_(stack[:-1], -bound, bound)
    nn.init.zeros_(stack[-1])
    return stack


def hfi_(stack: Tensor, gain: float = 1.0) -> Tensor:
    """Hyperfan-in: W ~ U, Var = gain^2 / (2 d_j d_k), b = 0. Chang et al., 2020, section 4.1.

    The variance is chosen backwards from the base network, so that *its* activations keep their scale: weights and
    biases each contribute half (the 2). A generated weight has variance gain^2 / (2 d_j), a generated bias gain^2 / 2:
    Chang et al.'s formula for biases, gain^2 / (2 d_k), is this one at fan-in 1. `gain` belongs to the base layer's
    activation (ReLU: sqrt(2)). Assumes |x|^2 = d_k: all layers share x, so with another length the scale drifts layer
    by layer. Stack [K+1, out, in], in place.
    """
    return _uniform_head_(stack, gain**2 / (2 * stack[-1].shape[1] * (stack.shape[0] - 1)))


def hfo_(stack: Tensor, gain: float = 1.0) -> Tensor:
    """Hyperfan-out, generated weights: W ~ U, Var = gain^2 / (d_i d_k), b = 0. Chang et al., 2020, section 4.2.

    As hyperfan-in, but it keeps the scale of the base network's *gradients*: they do not pass through biases, so there
    is no 2. A generated weight has variance gain^2 / d_i. Stack [K+1, out, in], in place.
    """
    return _uniform_head_(stack, gain**2 / (stack.shape[1] * (stack.shape[0] - 1)))


def hfo_bias_(stack: Tensor, fan_in: int, gain: float = 1.0) -> Tensor:
    """Hyperfan-out, generated biases: W ~ U, Var = gain^2 max(0, 1 - d_j / d_i) / d_k, b = 0. Chang et al., 2020.

    The biases make up the forward variance that the smaller weights leave missing where a layer widens (d_i > d_j);
    where it narrows they are 0. A generated bias has variance gain^2 max(0, 1 - d_j / d_i). Stack [K+1, out, 1], in
    place.
    """
    return _uniform_head_(stack, gain**2 * max(0.0, 1 - fan_in / stack.shape[1]) / (stack.shape[0] - 1))


def weight_hyperinit_(stack: Tensor, f: BaseInit) -> Tensor:
    """Weight-HyperInit, Eq. (2): W_:,k := phi^k ~ f for every k, b := 0.

    Each embedding direction gets its own draw of the base network: for x = one-hot(k) the base network *is* the k-th
    draw. Otherwise a generated parameter has variance |x|^2 Var_f, d_k times f's at unit-variance x.
    Stack [K+1, out, in], in place; f fills one (out, in) tensor.
    """
    with torch.no_grad():
        for layer in stack[:-1]:
            f(layer)
        stack[-1].zero_()
    return stack


def bias_hyperinit_(stack: Tensor, f: BaseInit) -> Tensor:
    """Bias-HyperInit, Eq. (3): W := 0, b := phi_shared ~ f.

    Every task starts from the same good base network, whatever the embedding; differences between tasks are learned.
    A generated parameter has exactly f's distribution, with no assumption on x. Stack [K+1, out, in], in place;
    f fills one (out, in) tensor.
    """
    with torch.no_grad():
        stack[:-1].zero_()
        f(stack[-1])
    return stack


# ---------------------------------------------------------------------------------------------------------------------
# One call per layer.

DEFAULTS = {"kaiming": kaiming_hyper_, "normc": normc_hyper_, "orthogonal": orthogonal_hyper_}
HYPER_SCHEMES = ("bias", "weight", "hfi", "hfo", *DEFAULTS)
FILM_SCHEMES = ("bias", *DEFAULTS)


def init_hyper_linear_(layer: HyperLinear, scheme: str, f_weight: BaseInit, f_bias: BaseInit, gain: float) -> None:
    """Initialises the two stacks of a HyperLinear by one of HYPER_SCHEMES; `gain` is the gain of its activation.

    Raises ValueError, with the alternatives, for another scheme.
    """
    if scheme in DEFAULTS:
        DEFAULTS[scheme](layer.weight)
        DEFAULTS[scheme](layer.bias)
    elif scheme == "hfi":
        hfi_(layer.weight, gain)
        hfi_(layer.bias, gain)
    elif scheme == "hfo":
        hfo_(layer.weight, gain)
        hfo_bias_(layer.bias, layer.weight.shape[2], gain)
    elif scheme == "weight":
        weight_hyperinit_(layer.weight, f_weight)
        weight_hyperinit_(layer.bias, f_bias)
    elif scheme == "bias":
        bias_hyperinit_(layer.weight, f_weight)
        bias_hyperinit_(layer.bias, f_bias)
    else:
        raise ValueError(f"a hypernetwork has no initialisation {scheme!r}: choose from {', '.join(HYPER_SCHEMES)}.")


def init_film_linear_(layer: FilmLinear, scheme: str, f_weight: BaseInit) -> None:
    """Initialises a FilmLinear: its own weight by f, its two stacks by one of FILM_SCHEMES.

    With "bias" every task starts from the plain layer f: scale 1, shift 0. HFI, HFO and Weight-HyperInit speak of
    generated weight matrices, which FiLM does not have: for such a scheme it raises ValueError, with the alternatives.
    """
    if scheme in DEFAULTS:
        DEFAULTS[scheme](layer.scale)
        DEFAULTS[scheme](layer.shift)
    elif scheme == "bias":
        bias_hyperinit_(layer.scale, nn.init.ones_)
        bias_hyperinit_(layer.shift, nn.init.zeros_)
    else:
        raise ValueError(f"FiLM has no initialisation {scheme!r}: choose from {', '.join(FILM_SCHEMES)}.")
    f_weight(layer.weight.detach())


# ---------------------------------------------------------------------------------------------------------------------
# `python hyperinit.py`: what every initialiser does to the policies of many tasks, before any training.

SIZES = [64, 128, 128, 6]  # a base network of MuJoCo: the observation's features, two tanh layers, the actions' means
K = 10  # embedding features


def generated_network(scheme: str) -> list[HyperLinear]:
    """The layers of a base network whose f is normc, as the scripts make them for continuous actions."""
    layers = [HyperLinear(fan_in, fan_out, K) for fan_in, fan_out in zip(SIZES[:-1], SIZES[1:], strict=True)]
    for layer in layers:
        gain = 1.0 if layer is layers[-1] else nn.init.calculate_gain("tanh")
        init_hyper_linear_(layer, scheme, lambda weight, gain=gain: normc_(weight, gain), nn.init.zeros_, gain)
    return layers


def random_embeddings(tasks: int) -> Tensor:
    """What the hypernetwork reads of normalised embeddings of 10 numbers, with a 1 appended, [tasks, K+1].

    As in the scripts they have passed a linear + tanh layer, so that |x|^2 is about K / 4.
    """
    return F.pad(torch.tanh(nn.Linear(10, K)(torch.randn(tasks, 10))), (0, 1), value=1.0)


@torch.no_grad()
def measure(scheme: str, tasks: int = 50, observations: int = 200) -> dict[str, list[float] | Tensor]:
    """Figures of one draw of the head, over random embeddings and observations of unit variance.

    scale: root mean square of every layer's outputs before tanh; saturated: share of the hidden units beyond +-0.99, in
    percent; spread: standard deviation between tasks of the action for one observation, root mean square; likeness:
    mean cosine between the generated parameters of two tasks; actions: of all tasks for one observation [tasks].
    """
    layers, x = generated_network(scheme), random_embeddings(tasks)
    parameters = torch.cat([x @ stack.flatten(1) for layer in layers for stack in (layer.weight, layer.bias)], dim=1)
    directions = F.normalize(parameters, dim=1)  # [tasks, P]
    likeness = (directions @ directions.T).sum() - tasks  # without every task's with itself
    h = torch.randn(observations, SIZES[0]).repeat(tasks, 1)  # [tasks * observations, in]
    x = x.repeat_interleave(observations, dim=0)
    scale, saturated = [], []
    for layer in layers:
        h = layer(h, x)
        scale.append(h.square().mean().sqrt().item())
        if layer is not layers[-1]:
            h = torch.tanh(h)
            saturated.append((h.abs() > 0.99).float().mean().item())
    actions = h.view(tasks, observations, -1)
    return {
        "scale": scale,
        "saturated": [100 * sum(saturated) / len(saturated)],
        "spread": [actions.std(dim=0).square().mean().sqrt().item()],
        "likeness": [(likeness / (tasks * (tasks - 1))).item()],
        "actions": actions[:, 0, 0],
    }


def main(picture: str) -> None:
    """Prints the table and draws it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    draws = {scheme: [measure(scheme) for _ in range(5)] for scheme in HYPER_SCHEMES}

    def mean(scheme: str, name: str) -> list[float]:
        return torch.tensor([draw[name] for draw in draws[scheme]]).mean(0).tolist()

    sizes = "-".join(map(str, SIZES))
    print(f"base network {sizes}, {K} embedding features, 50 tasks, mean of 5 draws; f alone is `bias`")
    print("init         scale of layer 1, 2, 3   saturated %   spread of actions   likeness of two tasks")
    for scheme in HYPER_SCHEMES:
        scales = "".join(f"{value:8.2f}" for value in mean(scheme, "scale"))
        saturated, spread, likeness = (mean(scheme, name)[0] for name in ("saturated", "spread", "likeness"))
        print(f"{scheme:12} {scales} {saturated:13.0f} {spread:19.2f} {likeness:23.2f}")

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for k, scheme in enumerate(HYPER_SCHEMES):
        bold = {"lw": 3, "color": "black", "zorder": 3} if scheme == "bias" else {"color": f"C{k}"}
        left.plot([1, 2, 3], mean(scheme, "scale"), "o-", **bold)
        left.text(3.08, mean(scheme, "scale")[-1], scheme, va="center", color=bold["color"])
        middle.scatter([k] * 50, draws[scheme][0]["actions"], s=14, alpha=0.5, color=bold["color"])
        right.bar(k, mean(scheme, "likeness")[0], color=bold["color"])
    left.set(yscale="log", xlim=(0.9, 3.7), xticks=[1, 2, 3], xlabel="layer (grey: where tanh works)")
    left.set(title="Scale of activations before tanh")
    left.axhspan(0.3, 3, color="0.9", zorder=0)
    middle.axhspan(-1, 1, color="0.9", zorder=0)
    middle.set(title="One observation's action in 50 tasks", xlabel="grey: what an actuator takes")
    right.set(title="Likeness (cosine) of two tasks' policies")
    for axis in (middle, right):
        axis.set_xticks(range(len(HYPER_SCHEMES)), HYPER_SCHEMES, rotation=30)
    figure.savefig(picture, dpi=100)
    print(f"drawn: {picture}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="The initialisers before any training, as a table and a picture.")
    parser.add_argument("--picture", default="hyperinit.png", help="the file to draw (.png, .svg, .pdf)")
    arguments = parser.parse_args()
    try:
        main(arguments.picture)
    except (OSError, ValueError) as error:  # a folder that is not there, a format that is not known
        parser.error(f"--picture {arguments.picture} cannot be drawn: {error}")
