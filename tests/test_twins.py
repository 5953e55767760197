"""What stands in both scripts is the same in both: a fix in one must reach the other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Definitions of the same name that are meant to differ, and why.
EXCEPTIONS = {
    "Args",  # a VAE here, none there
    "MUJOCO",  # presets
    "META_WORLD_PRESET",
    "PRESETS",
    "check_args",  # what divides into minibatches, and the VAE's flags
    "Encoder",  # a posterior, or an embedding trained by PPO
    "Agent",  # with the VAE and a one-hot mode, or with the encoder alone
    "capture",  # the replay buffer
    "restore",
    "compile_policy",  # embeddings are stored there, and followed by the gradient here
    "main",  # the algorithms
}


def definitions(script):
    """Functions, classes and constants of a script."""
    tree = ast.parse((ROOT / script).read_text())
    found = {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[target.id] = ast.dump(node)
    return found


def test_shared_definitions_are_equal():
    varibad, rl2 = definitions("varibad_hyper.py"), definitions("rl2_hyper.py")
    shared = varibad.keys() & rl2.keys()
    differing = {name for name in shared if varibad[name] != rl2[name]}
    assert differing == EXCEPTIONS
    assert len(shared - EXCEPTIONS) >= 25


def test_shared_methods_of_the_agents_are_equal():
    """The two Agents differ in what they infer, not in how they act."""
    agents = []
    for script in ("varibad_hyper.py", "rl2_hyper.py"):
        tree = ast.parse((ROOT / script).read_text())
        (agent,) = [node for node in tree.body if getattr(node, "name", None) == "Agent"]
        agents.append({node.name: ast.dump(node) for node in agent.body if isinstance(node, ast.FunctionDef)})
    for name in ("action_vector", "get_value", "get_greedy_action", "get_action_and_value"):
        assert agents[0][name] == agents[1][name]
