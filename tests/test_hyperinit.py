"""Tests of hyperinit.py: the layers against slow loops, every initialiser against its definition.

Letters as in hyperinit.py: B batch, K = d_k embedding features, d_j fan-in, d_i fan-out, P = d_i d_j, f a base init.
Layers are filled with NaN before they are initialised, so that an entry that an initialiser forgets shows up.
"""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hyperinit import (
    FILM_SCHEMES,
    HYPER_SCHEMES,
    FilmLinear,
    HyperLinear,
    init_film_linear_,
    init_hyper_linear_,
    normc_,
)

torch.set_num_threads(1)  # the tensors here are too small for more

exactly = partial(assert_close, rtol=0, atol=0)  # bitwise, but for the sign of a zero
closely = partial(assert_close, rtol=1e-11, atol=1e-11)  # float64 up to the order of summation


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def blank(layer):
    """The layer with NaN for parameters."""
    for parameter in layer.parameters():
        nn.init.constant_(parameter, math.nan)
    return layer


def random_(layer):
    """The layer with parameters from N(0, 1), in float64."""
    layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def with_one(x):
    """(x, 1), the embedding [B, K] as the layers want it: [B, K+1]."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def generate(stack, embedding):
    """phi = W x + b for every embedding [B, K+1], in full: [B, out, in]."""
    return torch.einsum("bk,koi->boi", embedding, stack.detach())


def drawn(f, *shape):
    """A draw of f."""
    tensor = torch.empty(shape)
    f(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# The layers


def hyper_loop(layer, inputs, embedding):
    """HyperLinear sample by sample: write the sample's weight and bias, then apply them."""
    outputs = []
    for x, e in zip(inputs, embedding, strict=True):
        weight = sum(e_k * phi_k for e_k, phi_k in zip(e, layer.weight, strict=True))
        bias = sum(e_k * phi_k for e_k, phi_k in zip(e, layer.bias, strict=True))
        outputs.append(F.linear(x, weight, bias[:, 0]))
    return torch.stack(outputs)


def film_loop(layer, inputs, embedding):
    """FilmLinear number by number."""
    outputs = []
    for x, e in zip(inputs, embedding, strict=True):
        for unit, row in enumerate(layer.weight):
            scale = sum(e[k] * layer.scale[k, unit, 0] for k in range(len(e)))
            shift = sum(e[k] * layer.shift[k, unit, 0] for k in range(len(e)))
            outputs.append(scale * sum(row[i] * x[i] for i in range(len(x))) + shift)
    return torch.stack(outputs).reshape(len(inputs), -1)


@pytest.mark.parametrize("layer_class, loop", [(HyperLinear, hyper_loop), (FilmLinear, film_loop)])
@pytest.mark.parametrize("batch, d_j, d_i, d_k", [(7, 4, 3, 5), (4, 3, 3, 3), (1, 2, 1, 1)])
def test_layer_equals_slow_loop(layer_class, loop, batch, d_j, d_i, d_k):
    layer = random_(layer_class(d_j, d_i, d_k))
    inputs = torch.randn(batch, d_j, dtype=torch.float64, requires_grad=True)
    # The last entry is random too: the layer must not assume the 1, section 4.1 puts a 0 there.
    embedding = torch.randn(batch, d_k + 1, dtype=torch.float64, requires_grad=True)
    fast, slow = layer(inputs, embedding), loop(layer, inputs, embedding)
    closely(fast, slow)

    leaves = [*layer.parameters(), inputs, embedding]
    loss_weights = torch.randn(batch, d_i, dtype=torch.float64)
    closely(
        torch.autograd.grad((loss_weights * fast).sum(), leaves),
        torch.autograd.grad((loss_weights * slow).sum(), leaves),
    )


def test_one_hot_without_bias_is_separate_networks():
    """Section 4.1: a linear, bias-free hypernetwork on a one-hot task ID trains exactly like one network per task."""
    num_tasks = 3
    hyper = [random_(HyperLinear(4, 6, num_tasks)), random_(HyperLinear(6, 2, num_tasks))]
    separate = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double() for _ in range(num_tasks)]
    pairs = [(hyper[j], separate[i][2 * j], i) for i in range(num_tasks) for j in range(2)]
    for stacked, linear, i in pairs:
        linear.weight.data.copy_(stacked.weight[i])
        linear.bias.data.copy_(stacked.bias[i, :, 0])

    inputs, targets = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    task_ids = torch.arange(12) % num_tasks  # every batch mixes the tasks
    # No bias: the appended entry is 0 and the random last slice must not matter.
    embedding = F.one_hot(task_ids, num_tasks + 1).double()
    optimisers = [
        torch.optim.SGD([p for layer in layers for p in layer.parameters()], 0.1) for layers in (hyper, separate)
    ]
    for _ in range(3):
        hyper_outputs = hyper[1](hyper[0](inputs, embedding).tanh(), embedding)
        separate_outputs = torch.stack([separate[i](x) for i, x in zip(task_ids, inputs, strict=True)])
        closely(hyper_outputs, separate_outputs)
        for optimiser, outputs in zip(optimisers, (hyper_outputs, separate_outputs), strict=True):
            optimiser.zero_grad()
            F.mse_loss(outputs, targets).backward()
        for stacked, linear, i in pairs:
            closely(stacked.weight.grad[i], linear.weight.grad)
            closely(stacked.bias.grad[i, :, 0], linear.bias.grad)
        for optimiser in optimisers:
            optimiser.step()


@pytest.mark.parametrize("layer_class", [HyperLinear, FilmLinear])
def test_layer_prints_its_sizes_like_nn_linear(layer_class):
    sizes = {"in_features": 4, "out_features": 3, "embedding_features": 5}
    layer = layer_class(**sizes)
    assert repr(layer) == f"{layer_class.__name__}(in_features=4, out_features=3, embedding_features=5)"
    assert {name: getattr(layer, name) for name in sizes} == sizes
    assert repr(nn.Linear(4, 3)).startswith("Linear(in_features=4, out_features=3, ")


@pytest.mark.parametrize("layer_class", [HyperLinear, FilmLinear])
def test_embedding_without_the_appended_one_is_refused_with_the_fix(layer_class):
    layer, inputs, x = blank(layer_class(4, 3, 10)), torch.randn(6, 4), torch.randn(6, 10)
    for columns in (10, 12, 1):
        with pytest.raises(ValueError) as error:
            layer(inputs, torch.randn(6, columns))
        assert str(error.value) == (
            f"the embedding has {columns} columns, but this layer takes 11: "
            "append a 1 to the 10 features, F.pad(x, (0, 1), value=1.0)."
        )
    code = re.search(r"F\.pad\(.*\)", str(error.value))[0]
    exactly(eval(code, {"F": F, "x": x}), with_one(x))
    assert layer(inputs, with_one(x)).shape == (6, 3)


@pytest.mark.parametrize("layer_class", [HyperLinear, FilmLinear])
@pytest.mark.parametrize("inputs, embedding", [((5, 7, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (3,)), ((3,), (3,))])
def test_other_shapes_are_refused(layer_class, inputs, embedding):
    with pytest.raises(ValueError, match=r"must be \[B, in\] and \[B, 3\]"):
        layer_class(3, 4, 2)(torch.zeros(inputs), torch.zeros(embedding))


# ---------------------------------------------------------------------------------------------------------------------
# New layers


@pytest.mark.parametrize("layer_class", [HyperLinear, FilmLinear])
def test_new_layer_is_nn_linear_for_any_embedding(layer_class):
    """Also after `reset_parameters`: it takes the draws that nn.Linear would take."""
    torch.manual_seed(1)
    linear = nn.Linear(5, 7, bias=layer_class is HyperLinear)
    torch.manual_seed(1)
    layers = [layer_class(5, 7, 4)]
    layers.append(blank(layer_class(5, 7, 4)))
    torch.manual_seed(1)
    layers[1].reset_parameters()
    inputs = torch.randn(7, 5)
    embeddings = with_one(torch.cat([torch.randn(3, 4), 1e6 * torch.randn(3, 4), torch.zeros(1, 4)]))
    for layer in layers:
        assert_close(layer(inputs, embeddings), linear(inputs))


@pytest.mark.parametrize("layer_class", [HyperLinear, FilmLinear])
def test_new_layer_learns_what_the_embedding_says(layer_class):
    """Every task scales and shifts the same linear map, which both layers can do exactly."""
    layer = layer_class(4, 3, 5)
    stacks = [layer.weight, layer.bias] if layer_class is HyperLinear else [layer.scale, layer.shift]
    inputs, tasks = torch.randn(300, 4), torch.arange(300) % 5
    scales, shifts = torch.randn(2, 5, 3)
    targets = scales[tasks] * (inputs @ torch.randn(4, 3)) + shifts[tasks]
    embedding = with_one(F.one_hot(tasks, 5).float())
    optimiser, losses = torch.optim.Adam(layer.parameters(), lr=0.05), []
    for step in range(500):
        losses.append(F.mse_loss(layer(inputs, embedding), targets))
        optimiser.zero_grad()
        losses[-1].backward()
        if step == 0:  # the head's weight starts at 0, but not its gradient
            assert all(not stack[:-1].any() and stack.grad[:-1].flatten(1).any(dim=1).all() for stack in stacks)
        optimiser.step()
    assert losses[-1] < 1e-3 * losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# Schemes that are defined by a distribution of the head

GAIN = 5 / 3

# Variance of a generated (weight, bias) for an embedding of unit variance. An entry of W has 1 / d_k of it.
GENERATED_VARIANCE = {
    "kaiming": lambda d_k, d_j, d_i: (GAIN**2, GAIN**2),
    "normc": lambda d_k, d_j, d_i: (GAIN**2, GAIN**2),
    "orthogonal": lambda d_k, d_j, d_i: (GAIN**2 * d_k / max(d_k, d_i * d_j), GAIN**2 * d_k / max(d_k, d_i)),
    "hfi": lambda d_k, d_j, d_i: (GAIN**2 / (2 * d_j), GAIN**2 / 2),
    "hfo": lambda d_k, d_j, d_i: (GAIN**2 / d_i, GAIN**2 * max(0, 1 - d_j / d_i)),
}
SHAPES = [(6, 10, 15), (6, 15, 10), (6, 3, 4)]  # (d_k, d_j, d_i): widening, narrowing, fewer biases than d_k


def initialised(scheme, d_k, d_j, d_i):
    layer = blank(HyperLinear(d_j, d_i, d_k))
    init_hyper_linear_(layer, scheme, None, None, GAIN)  # None: none of these schemes may ask for f
    return layer


@pytest.mark.parametrize("d_k, d_j, d_i", SHAPES)
@pytest.mark.parametrize("scheme", GENERATED_VARIANCE)
def test_moments_of_head_and_generated_parameters(scheme, d_k, d_j, d_i):
    layers = [initialised(scheme, d_k, d_j, d_i) for _ in range(500)]
    expected = GENERATED_VARIANCE[scheme](d_k, d_j, d_i)
    for name, variance in zip(("weight", "bias"), expected, strict=True):
        stacks = torch.stack([getattr(layer, name).detach() for layer in layers])  # [500, K+1, out, in]
        # Signs have unit variance, and a squared length of exactly d_k: less noise than a Gaussian's.
        embeddings = with_one(torch.randn(8, d_k).sign())
        generated = torch.einsum("bk,nkoi->nboi", embeddings, stacks)  # [500, 8, out, in]

        assert not stacks[:, -1].any(), "the head's bias is not zero"
        for sample, target in ((stacks[:, :-1], variance / d_k), (generated, variance)):
            assert sample.square().mean().item() == pytest.approx(target, rel=0.07)
            assert sample.mean().abs() <= 0.05 * target**0.5
        # Not only on the whole: no column k and no base parameter has a scale of its own.
        by_column = stacks[:, :-1].square().mean(dim=(0, 2, 3))
        by_parameter = stacks[:, :-1].square().mean(dim=(0, 1))
        assert_close(by_column, torch.full_like(by_column, variance / d_k), rtol=0.2, atol=0)
        assert_close(by_parameter, torch.full_like(by_parameter, variance / d_k), rtol=0.2, atol=0)


@pytest.mark.parametrize("d_k, d_j, d_i", SHAPES)
def test_normc_head_has_rows_of_length_gain(d_k, d_j, d_i):
    layer = initialised("normc", d_k, d_j, d_i)
    assert_close(layer.weight[:-1].norm(dim=0), torch.full((d_i, d_j), GAIN))
    assert_close(layer.bias[:-1].norm(dim=0), torch.full((d_i, 1), GAIN))


@pytest.mark.parametrize("d_k, d_j, d_i", [*SHAPES, (20, 3, 4)])
def test_orthogonal_head(d_k, d_j, d_i):
    layer = initialised("orthogonal", d_k, d_j, d_i)
    for stack in (layer.weight, layer.bias):
        columns = stack[:-1].flatten(1)  # [K, P]: W transposed
        gram = columns @ columns.T if columns.shape[1] >= d_k else columns.T @ columns  # rows where P < d_k
        assert_close(gram, GAIN**2 * torch.eye(len(gram)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme, kurtosis", [("hfi", 9 / 5), ("hfo", 9 / 5), ("kaiming", 9 / 5), ("normc", 60 / 22)])
def test_head_is_uniform_or_gaussian(scheme, kurtosis):
    """A Gaussian of a fixed length, in d_k dimensions, has kurtosis 3 d_k / (d_k + 2)."""
    d_k, d_j, d_i = 20, 100, 150
    layer = initialised(scheme, d_k, d_j, d_i)
    for stack, variance in zip((layer.weight, layer.bias), GENERATED_VARIANCE[scheme](d_k, d_j, d_i), strict=True):
        head, bound = stack[:-1].detach(), (3 * variance / d_k) ** 0.5
        assert (head.pow(4).mean() / head.square().mean() ** 2).item() == pytest.approx(kurtosis, rel=0.1)
        if kurtosis == 9 / 5:
            assert 0.99 * bound < head.abs().max() <= bound * (1 + 1e-6)


def relu_network(scheme, widths, d_k=8, batch=64, draws=3):
    """Mean squares of the input and of every ReLU's output, and of the gradients with respect to them: [layer] each.

    Averaged over embeddings and draws of the hypernetwork; the input and the last gradient have second moment 1.
    Embeddings are signs, so |x|^2 = d_k exactly: all layers share x, and where s = |x|^2 / d_k is not 1 HFI's scale
    drifts to s / (2 - s) with depth, whose average over random x is not 1.
    """
    activation_scales, gradient_scales = [], []
    for _ in range(draws):
        layers = [blank(HyperLinear(d_j, d_i, d_k)) for d_j, d_i in zip(widths, widths[1:], strict=False)]
        embedding = with_one(torch.randn(batch, d_k).sign())
        hidden = [torch.randn(batch, widths[0], requires_grad=True)]
        for layer in layers:
            init_hyper_linear_(layer, scheme, None, None, gain=2**0.5)
            hidden.append(layer(hidden[-1], embedding).relu())
        gradients = torch.autograd.grad(hidden[-1], hidden, torch.randn_like(hidden[-1]))
        activation_scales.append(torch.stack([h.square().mean() for h in hidden]))
        gradient_scales.append(torch.stack([g.square().mean() for g in gradients]))
    return torch.stack(activation_scales).mean(0).detach(), torch.stack(gradient_scales).mean(0)


def test_hfi_keeps_the_scale_of_activations():
    activations, _ = relu_network("hfi", [256] * 11)
    assert_close(activations, torch.ones(11), rtol=0, atol=0.1)

    # The same harness sees kaiming multiply it at every layer by gain^2 d_j, half of which is lost in the ReLU.
    activations, _ = relu_network("kaiming", [256] * 11)
    assert_close(activations[1:] / activations[:-1], torch.full((10,), GAIN**2 / 2 * 256), rtol=0.2, atol=0)


def test_hfo_keeps_the_scale_of_gradients():
    _, gradients = relu_network("hfo", [256, 384, 256, 256, 512, 256])
    assert_close(gradients, torch.ones(6), rtol=0, atol=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# Schemes that are defined by f


def ramp_(tensor):
    """An f that no distribution describes: 1, 2, 3, ... row by row."""
    tensor.copy_(torch.arange(1.0, tensor.numel() + 1).view_as(tensor))


F_PAIRS = [(nn.init.xavier_uniform_, nn.init.normal_), (nn.init.orthogonal_, nn.init.ones_), (ramp_, nn.init.eye_)]


@pytest.mark.parametrize("f_weight, f_bias", F_PAIRS)
def test_bias_hyperinit_gives_every_embedding_the_same_draw(f_weight, f_bias):
    layer = blank(HyperLinear(5, 7, 4))
    torch.manual_seed(1)
    init_hyper_linear_(layer, "bias", f_weight, f_bias, GAIN)
    torch.manual_seed(1)
    weight, bias = drawn(f_weight, 7, 5), drawn(f_bias, 7, 1)

    embeddings = with_one(torch.cat([torch.randn(3, 4), 1e6 * torch.randn(3, 4), torch.zeros(1, 4)]))
    exactly(generate(layer.weight, embeddings), weight.expand(7, -1, -1))
    exactly(generate(layer.bias, embeddings), bias.expand(7, -1, -1))

    inputs = torch.randn(6, 5)
    outputs = [layer(inputs, embedding.expand(6, -1)) for embedding in embeddings]
    for other in outputs[1:]:
        exactly(other, outputs[0])
    assert_close(outputs[0], F.linear(inputs, weight, bias[:, 0]))


@pytest.mark.parametrize("f_weight, f_bias", F_PAIRS)
def test_weight_hyperinit_gives_one_hot_k_the_kth_draw(f_weight, f_bias):
    layer = blank(HyperLinear(5, 7, 4))
    torch.manual_seed(1)
    init_hyper_linear_(layer, "weight", f_weight, f_bias, GAIN)
    torch.manual_seed(1)
    weights = torch.stack([drawn(f_weight, 7, 5) for _ in range(4)])
    biases = torch.stack([drawn(f_bias, 7, 1) for _ in range(4)])

    embeddings = with_one(torch.eye(4))
    exactly(generate(layer.weight, embeddings), weights)
    exactly(generate(layer.bias, embeddings), biases)


@pytest.mark.parametrize("kwargs, length", [({}, 1.0), ({"gain": 0.5}, 0.5), ({"gain": GAIN}, GAIN)])
def test_normc_rows_have_length_gain(kwargs, length):
    tensor = normc_(torch.full((500, 8), math.nan), **kwargs)
    assert_close(tensor.norm(dim=1), torch.full((500,), length))
    # Directions are uniform on the sphere: no axis is preferred.
    assert_close(tensor.T @ tensor / 500, length**2 / 8 * torch.eye(8), rtol=0, atol=0.2 * length**2 / 8)


# ---------------------------------------------------------------------------------------------------------------------
# FiLM


def test_film_bias_hyperinit_is_the_plain_layer():
    layer = blank(FilmLinear(5, 7, 4))
    torch.manual_seed(1)
    init_film_linear_(layer, "bias", nn.init.xavier_uniform_)
    torch.manual_seed(1)
    weight = drawn(nn.init.xavier_uniform_, 7, 5)
    exactly(layer.weight.detach(), weight)

    inputs = torch.randn(7, 5)
    embeddings = with_one(torch.cat([torch.randn(3, 4), 1e6 * torch.randn(3, 4), torch.zeros(1, 4)]))
    exactly(layer(inputs, embeddings), F.linear(inputs, weight))


@pytest.mark.parametrize("scheme, variance", [("kaiming", 1 / 6), ("normc", 1 / 6), ("orthogonal", 1 / 2000)])
def test_film_default_schemes(scheme, variance):
    layer = blank(FilmLinear(2, 2000, 6))
    init_film_linear_(layer, scheme, ramp_)
    exactly(layer.weight.detach(), drawn(ramp_, 2000, 2))
    for stack in (layer.scale, layer.shift):
        assert not stack[-1].any()
        assert stack[:-1].square().mean().item() == pytest.approx(GAIN**2 * variance, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "layer_class, initialise, bad_schemes, alternatives",
    [
        (
            HyperLinear,
            lambda layer, scheme: init_hyper_linear_(layer, scheme, nn.init.ones_, nn.init.ones_, GAIN),
            ["xavier", ""],
            list(HYPER_SCHEMES),
        ),
        (
            FilmLinear,
            lambda layer, scheme: init_film_linear_(layer, scheme, nn.init.ones_),
            ["xavier", "", "weight", "hfi", "hfo"],
            list(FILM_SCHEMES),
        ),
    ],
)
def test_other_schemes_are_refused_with_the_alternatives(layer_class, initialise, bad_schemes, alternatives):
    for scheme in bad_schemes:
        with pytest.raises(ValueError) as error:
            initialise(layer_class(3, 4, 2), scheme)
        sentence, _, named = str(error.value).partition(": choose from ")
        assert repr(scheme) in sentence and "." not in sentence  # one sentence
        assert named.endswith(".") and named[:-1].split(", ") == alternatives
    for scheme in alternatives:  # what the sentence offers works, and writes every parameter
        layer = blank(layer_class(3, 4, 2))
        initialise(layer, scheme)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())
