"""The layers whose parameters a hypernetwork generates, and how to initialise its head.

A hypernetwork turns a task embedding into the parameters of a base network, phi = W x + b, where x is its last hidden
layer and (W, b) is its head. "Hypernetworks in Meta-Reinforcement Learning" (Beck et al., CoRL 2022), here "the paper",
shows that ordinary initialisations of the head fail and proposes Weight-HyperInit and Bias-HyperInit, which work.
HFI and HFO are from "Principled Weight Initialization for Hypernetworks" (Chang et al., ICLR 2020).

The head is kept as a *stack of base layers*. For a base layer with weight (out, in) it is a tensor [K + 1, out, in]:
slices 0 .. K-1 are the columns W_:,k, the last slice is b. The generated bias is a stack [K + 1, out, 1]: a layer of
fan-in 1 whose input is always 1. Each initialiser fills one such stack in place and returns it, as in `torch.nn.init`.
`python show.py init` shows what each of them does to the policies of many tasks.

Letters: B batch, K = d_k features of the hypernetwork's last layer, P = out * in parameters of a base layer,
d_j fan-in of the base layer (in), d_i fan-out (out), f the base network's own initialisation, a function that fills one
(out, in) tensor in place. Variances are over draws of the head, for an embedding x of unit variance. `gain` is the gain
of the base layer's activation, as in `nn.init.calculate_gain` (ReLU: sqrt(2)).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BaseInit = Callable[[Tensor], object]  # f: fills one (out, in) tensor in place


class HyperLinear(nn.Module):
    """A linear layer whose weight and bias are generated from an embedding, one layer per row of the batch.

        layer = HyperLinear(64, 6, embedding_features=10)
        outputs = layer(inputs, F.pad(x, (0, 1), value=1.0))  # inputs [B, 64], x [B, 10], outputs [B, 6]

    y = (sum_k x_k phi^k + phi_shared) applied to the input. The sum is linear in phi, so all K + 1 base layers are
    applied to the batch in one matrix product and their *results* are combined: the same as generating the weights, but
    the (B, out, in) weights are never written. A new layer acts like a new nn.Linear on every embedding.
    """

    def __init__(self, in_features: int, out_features: int, embedding_features: int):
        super().__init__()
        self.in_features, self.out_features, self.embedding_features = in_features, out_features, embedding_features
        self.weight = nn.Parameter(torch.zeros(embedding_features + 1, out_features, in_features))  # [K+1, out, in]
        self.bias = nn.Parameter(torch.zeros(embedding_features + 1, out_features, 1))  # [K+1, out, 1]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bias-HyperInit, Eq. (3), where f is nn.Linear's own initialisation, U(-a, a) with a = 1 / sqrt(in)."""
        f = partial(nn.init.uniform_, a=-(self.in_features**-0.5), b=self.in_features**-0.5)
        init_hyper_linear_(self, "bias", f, f)

    def forward(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        """Inputs [B, in], embedding (x, 1) [B, K+1] (else ValueError); returns [B, out]. Eq. (2) and (3)."""
        check_shapes(inputs, embedding, self.embedding_features)
        per_slice = F.linear(inputs, self.weight.flatten(0, 1))  # [B, (K+1) * out]
        per_slice = per_slice.unflatten(1, self.weight.shape[:2])  # [B, K+1, out]
        bias = embedding @ self.bias[:, :, 0]  # [B, out]
        return torch.baddbmm(bias[:, None], embedding[:, None], per_slice)[:, 0]  # [B, out]

    def extra_repr(self) -> str:
        sizes = ("in_features", "out_features", "embedding_features")
        return ", ".join(f"{name}={getattr(self, name)}" for name in sizes)


class FilmLinear(nn.Module):
    """FiLM: y = scale(x) * (weight input) + shift(x), with a weight of its own. Perez et al., 2018; section 4.3."""

    def __init__(self, in_features: int, out_features: int, embedding_features: int):
        super().__init__()
        self.in_features, self.out_features, self.embedding_features = in_features, out_features, embedding_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))  # [out, in]
        self.scale = nn.Parameter(torch.zeros(embedding_features + 1, out_features, 1))  # [K+1, out, 1]
        self.shift = nn.Parameter(torch.zeros(embedding_features + 1, out_features, 1))  # [K+1, out, 1]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's own weight, scale 1 and, unlike nn.Linear's bias, shift 0 for every embedding."""
        init_film_linear_(self, "bias", partial(nn.init.kaiming_uniform_, a=5**0.5))  # U(-a, a), a = 1 / sqrt(in)

    def forward(self, inputs: Tensor, embedding: Tensor) -> Tensor:
        """Inputs [B, in], embedding (x, 1) [B, K+1] (else ValueError); returns [B, out]."""
        check_shapes(inputs, embedding, self.embedding_features)
        scale, shift = embedding @ self.scale[:, :, 0], embedding @ self.shift[:, :, 0]  # [B, out] each
        return scale * F.linear(inputs, self.weight) + shift

    extra_repr = HyperLinear.extra_repr


def check_shapes(inputs: Tensor, embedding: Tensor, features: int) -> None:
    """Raises ValueError where the embedding is not [B, features + 1] for inputs [B, in]."""
    if embedding.shape[-1] != features + 1:
        widths = f"the embedding has {embedding.shape[-1]} columns, but this layer takes {features + 1}"
        raise ValueError(f"{widths}: append a 1 to the {features} features, F.pad(x, (0, 1), value=1.0).")
    if not len(inputs.shape) == len(embedding.shape) == 2 or len(inputs) != len(embedding):
        shapes = f"inputs {tuple(inputs.shape)} and embedding {tuple(embedding.shape)}"
        raise ValueError(f"{shapes} must be [B, in] and [B, {features + 1}]: flatten, or expand to one row per sample.")


def normc_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """An f from OpenAI Baselines: (out, in), in place, Gaussian rows of length `gain`: variance gain^2 / in."""
    with torch.no_grad():
        tensor.normal_()
        return tensor.mul_(gain / tensor.norm(dim=1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# Default initialisations: they know nothing of the base network.


def default_hyper_(stack: Tensor, init: BaseInit) -> Tensor:
    """W ~ init as an ordinary matrix [P, K], b = 0; stack [K+1, out, in]. See section 3.3 of the paper.

    This keeps the scale of the head's *output*, but that output is weights, whose scale should depend on their fan-in.
    Kaiming (He et al., 2015), normc (Baselines): a generated parameter has variance g^2, so that a base layer
    multiplies the variance of its input by g^2 d_j and saturates.
    Orthogonal (Saxe et al., 2014): it has g^2 d_k / P (g^2 where P < d_k). Orthogonal embeddings get base networks that
    are orthogonal to each other, but small.
    The gain g is 5/3, as in the authors' code, which passes the gain of the base network's tanh to the head.
    """
    init(stack.detach()[:-1].view(len(stack) - 1, -1).T)  # a view: init writes into the stack
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
    """Hyperfan-in: W ~ U, Var = gain^2 / (2 d_j d_k), b = 0; stack [K+1, out, in]. Chang et al., 2020, section 4.1.

    It keeps the scale of the base network's *activations*; weights and biases contribute half each (the 2). A generated
    weight has variance gain^2 / (2 d_j), a generated bias gain^2 / 2: Chang et al.'s formula for biases,
    gain^2 / (2 d_k), is this one at fan-in 1. Assumes |x|^2 = d_k: all layers share x, so with another length the scale
    drifts layer by layer.
    """
    return _uniform_head_(stack, gain**2 / (2 * stack.shape[2] * (stack.shape[0] - 1)))


def hfo_(stack: Tensor, gain: float = 1.0) -> Tensor:
    """Hyperfan-out, weights: W ~ U, Var = gain^2 / (d_i d_k), b = 0; [K+1, out, in]. Chang et al., 2020, section 4.2.

    It keeps the scale of the base network's *gradients*, which do not pass through biases: hence no 2. A generated
    weight has variance gain^2 / d_i.
    """
    return _uniform_head_(stack, gain**2 / (stack.shape[1] * (stack.shape[0] - 1)))


def hfo_bias_(stack: Tensor, fan_in: int, gain: float = 1.0) -> Tensor:
    """Hyperfan-out, biases: W ~ U, Var = gain^2 max(0, 1 - d_j / d_i) / d_k, b = 0; [K+1, out, 1]. Chang et al., 2020.

    Where a layer widens (d_i > d_j), the biases make up the forward variance that its smaller weights leave missing;
    where it narrows they are 0. A generated bias has variance gain^2 max(0, 1 - d_j / d_i).
    """
    return _uniform_head_(stack, gain**2 * max(0.0, 1 - fan_in / stack.shape[1]) / (stack.shape[0] - 1))


def weight_hyperinit_(stack: Tensor, f: BaseInit) -> Tensor:
    """Weight-HyperInit, Eq. (2): W_:,k := phi^k ~ f for every k, b := 0; stack [K+1, out, in].

    Each embedding direction gets its own draw of the base network: for x = one-hot(k) the base network *is* the k-th
    draw. Otherwise a generated parameter has variance |x|^2 Var_f, d_k times f's at unit-variance x.
    """
    with torch.no_grad():
        for layer in stack[:-1]:
            f(layer)
        stack[-1].zero_()
    return stack


def bias_hyperinit_(stack: Tensor, f: BaseInit) -> Tensor:
    """Bias-HyperInit, Eq. (3): W := 0, b := phi_shared ~ f; stack [K+1, out, in].

    Every task starts from the same good base network, whatever the embedding; differences between tasks are learned.
    A generated parameter has exactly f's distribution, with no assumption on x.
    """
    with torch.no_grad():
        stack[:-1].zero_()
        f(stack[-1])
    return stack


# ---------------------------------------------------------------------------------------------------------------------
# One call per layer.

TANH_GAIN = nn.init.calculate_gain("tanh")  # 5/3
DEFAULTS = {
    "kaiming": partial(nn.init.kaiming_uniform_, nonlinearity="tanh"),
    "normc": partial(normc_, gain=TANH_GAIN),
    "orthogonal": partial(nn.init.orthogonal_, gain=TANH_GAIN),
}
HYPER_SCHEMES = ("bias", "weight", "hfi", "hfo", *DEFAULTS)
FILM_SCHEMES = ("bias", *DEFAULTS)


def init_hyper_linear_(
    layer: HyperLinear, scheme: str, f_weight: BaseInit, f_bias: BaseInit, gain: float = 1.0
) -> None:
    """Initialises both stacks of a HyperLinear by one of HYPER_SCHEMES; raises ValueError for another scheme.

    "bias" and "weight" draw from f, "hfi" and "hfo" use the gain, the others neither.
    """
    if scheme in DEFAULTS:
        default_hyper_(layer.weight, DEFAULTS[scheme])
        default_hyper_(layer.bias, DEFAULTS[scheme])
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

    With "bias" every task starts from the plain layer f: scale 1, shift 0. HFI, HFO and Weight-HyperInit are about
    generated weight matrices, which FiLM does not have. Raises ValueError for these and other schemes.
    """
    if scheme in DEFAULTS:
        default_hyper_(layer.scale, DEFAULTS[scheme])
        default_hyper_(layer.shift, DEFAULTS[scheme])
    elif scheme == "bias":
        bias_hyperinit_(layer.scale, nn.init.ones_)
        bias_hyperinit_(layer.shift, nn.init.zeros_)
    else:
        raise ValueError(f"FiLM has no initialisation {scheme!r}: choose from {', '.join(FILM_SCHEMES)}.")
    f_weight(layer.weight.detach())
