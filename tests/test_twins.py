"""What stands in both scripts is the same in both, comments included: a fix in one must reach the other."""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = "varibad_hyper.py", "rl2_hyper.py"

# Definitions of the same name, and members of classes, that are meant to differ, and why.
EXCEPTIONS = {
    "RunArgs.embedding",  # one-hot tasks here only
    "RunArgs.checkpoint_interval",  # without a replay buffer a checkpoint is small
    "PPOArgs.learning_rate",  # of the policy, or of encoder and policy
    "PPOArgs.num_minibatches",  # of frames, or of environments
    "PPOArgs.ent_coef",  # a default that VariBAD's seeds need
    "PPOArgs.max_grad_norm",  # as the learning rate
    "PolicyArgs.embedding_features",  # one-hot tasks here only
    "PolicyArgs.base_layers",  # a default of VariBAD's authors
    "Args",  # a VAE's arguments, or an encoder's
    "MUJOCO_PRESET",  # presets
    "META_WORLD_PRESET",
    "PRESETS",
    "Encoder.__doc__",  # a posterior, or an embedding trained by PPO
    "Encoder.__init__",
    "Encoder.hiddens",
    "Encoder.encode",
    "Encoder.last_hiddens",
    "Encoder.forward",
    "Encoder.inputs",
    "Encoder.unroll",
    "Agent.__doc__",  # with the VAE and a one-hot mode, or with the encoder alone
    "Agent.__init__",
    "Agent.initial_belief",
    "Agent.update_belief",
    "Agent.embedding",
    "Agent.forward",
    "Rollout.embeddings",  # stored there, and followed by the gradient here
    "Rollout.__doc__",  # flat in the update there, sequences here
    "check_args",  # these: see LINES
    "main",
}

# Functions of which most is the same: what occurs in every line that only VariBAD's has, and in those of RL2's.
LINES = {
    "main": (
        r"buffer|vae|latent_norm|agent\.policy|b_returns|b_advantages|mb_inds|\bb = |belief = agent\.initial_belief"
        r"|obs, embedding = |agent\(obs, embedding\)$|Rollout\(obs|else:$|adam = |learning = |if learning and",
        r"memory|belief|sequence|mb_|embeddings|\bmb\.|\breturns|agent\.parameters|learning_starts:$|obs = policy_obs$"
        r"|agent\(obs, agent\.embedding\(belief\)\)$|Rollout\(obs|else:$|advantages = \("
        r"|mean_scalars\('losses', ppo_log\)$",
    ),
    "check_args": (
        r"vae_subsample|decode|one-hot|num_minibatches",
        r"'embedding_features', 'action_embedding'}$|base.layers|num_minibatches",
    ),
    "Agent.forward": (r"self\.vae is not None|latent_norm", r"self\.policy\(self\.obs_norm\(obs\), embedding\)$"),
}


def name_of(node):
    """Of a definition or an assignment; None for other statements."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return getattr(target, "id", None)


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def definitions(script):
    """Functions, constants and the members of classes: their text, from the first line to the next one's."""
    lines = (ROOT / script).read_text().splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if (name := name_of(node)) is None:
            continue
        parts = {name: first_line(node)}
        if isinstance(node, ast.ClassDef):
            parts |= {f"{name}.__doc__": node.body[0].lineno} if ast.get_docstring(node) else {}
            parts |= {f"{name}.{member}": first_line(part) for part in node.body if (member := name_of(part))}
        assert list(parts.values()) == sorted(set(parts.values()))  # no two on a line
        ends = [*list(parts.values())[1:], node.end_lineno + 1]
        for (part, start), end in zip(parts.items(), ends, strict=True):
            found[part] = "\n".join(lines[start - 1 : end - 1]).rstrip()
    return found


def test_shared_definitions_are_equal():
    varibad, rl2 = map(definitions, SCRIPTS)
    shared = {name for name in varibad.keys() | rl2.keys() if all(name.partition(".")[0] in x for x in (varibad, rl2))}
    differing = {name for name in shared if varibad.get(name) != rl2.get(name)}
    assert differing == EXCEPTIONS
    assert len({name for name in shared - EXCEPTIONS if "." not in name}) >= 50


def lines_of(script, name):
    """A function's or method's code line by line, a statement each, without comments and docstrings."""
    node = ast.parse((ROOT / script).read_text())
    for part in name.split("."):
        (node,) = [child for child in node.body if name_of(child) == part]
    return ast.unparse(node.body[1:] if ast.get_docstring(node) else node.body).splitlines()


@pytest.mark.parametrize("name", LINES)
def test_lines_that_differ_are_about_what_differs(name):
    """In a function that is an exception, too, a fix must reach the other script."""
    varibad, rl2 = (lines_of(script, name) for script in SCRIPTS)
    diff = [line for line in difflib.ndiff(varibad, rl2) if line[0] in "-+"]
    assert diff
    for line in diff:
        assert re.search(LINES[name][line[0] == "+"], line), f"only in {SCRIPTS[line[0] == '+']}: {line[2:].strip()}"
    assert len(diff) < len(varibad) or len(varibad) < 10
