"""Random command lines: parsed and accepted, or refused with exit status 2; never a traceback."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rl2_hyper
import varibad_hyper

NUMBERS = "0 1 2 3 7 60 -1 -0 0.5 1.0 1.5 1e6 2.5e3 1e400 nan inf -inf 0x10 1_0 0.0001".split()
NUMBERS += ["9" * 25, "9" * 400, "9" * 5000]
WORDS = ["", " ", "-", "--", "--env", "None", "True", "bias", "normc", "orthogonal", "weight", "hfi", "hyper", "film"]
WORDS += [
    "standard",
    "one-hot",
    "posterior",
    "all",
    "far",
    "Grid-World",
    "Walker",
    "Ant-Dir",
    "Mars",
    "ü\n\t",
    "\0",
    "./x",
]


def command_lines(script):
    """Up to five flags, some with a name that does not exist, each with none to three values, good and bad."""
    names = [f"--{field.name.replace('_', '-')}" for field in fields(script.Args)]
    names += [
        "--no-cuda",
        "--no-hyper-bias",
        "--no-decode-reward",
        "--bogus",
        "--env=Walker",
        "--seed=",
        "-h",
        "--help",
    ]
    value = st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.integers(-3, 300).map(str) | st.text(max_size=5)
    flag = st.tuples(st.sampled_from(names), st.lists(value, min_size=0, max_size=3) | value.map(lambda v: [v]))
    return st.lists(flag.map(lambda pair: [pair[0], *pair[1]]), max_size=5).map(lambda parts: sum(parts, []))


def plausible(script):
    """Flags with values of the right type, so that many command lines reach check_args."""
    strategies, types = [], get_type_hints(script.Args)
    for field in fields(script.Args):
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            strategies.append(st.sampled_from([[name], [name.replace("--", "--no-", 1)]]))
        elif isinstance(field.default, int):
            strategies.append(
                st.sampled_from([0, 1, 2, 3, 4, 60, 1000, -1, int("9" * 400)]).map(lambda v, n=name: [n, str(v)])
            )
        elif isinstance(field.default, float):
            strategies.append(st.sampled_from(["0", "0.5", "1", "2", "nan", "inf"]).map(lambda v, n=name: [n, v]))
        elif isinstance(field.default, tuple):
            strategies.append(st.lists(st.sampled_from(["0", "8", "-1"]), max_size=3).map(lambda v, n=name: [n, *v]))
        elif isinstance(field.default, str) and (choices := get_args(types[field.name])):
            strategies.append(st.sampled_from(choices).map(lambda v, n=name: [n, v]))
    assert len(strategies) >= len(fields(script.Args)) - 6  # all but names and paths
    return st.lists(st.one_of(strategies), max_size=6).map(lambda parts: sum(parts, []))


@pytest.mark.slow
@pytest.mark.parametrize("script", [varibad_hyper, rl2_hyper], ids=lambda script: script.__name__)
@pytest.mark.parametrize("lines", [command_lines, plausible], ids=lambda lines: lines.__name__)
def test_random_command_lines_are_accepted_or_refused(script, lines, capsys):
    outcomes = set()

    @settings(
        max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(lines(script))
    def check(argv):
        status = "accepted"
        try:
            script.check_args(script.parse_args(argv))
        except SystemExit as stop:
            status = stop.code
        out, error = capsys.readouterr()
        outcomes.add(status)
        assert status in ("accepted", 0, 2), f"{argv} exits with {status}"
        if status == 2:
            assert "Traceback" not in out + error and (out + error).strip(), argv

    check()
    assert outcomes >= {"accepted", 2}  # both kinds were tried
