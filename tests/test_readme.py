"""README.md and docs/: what they say of the code is true of the code, and their commands and changes can be run.

All of it is marked `docs`: someone who changes the code for an experiment of their own leaves it out (-m "not docs").
"""

import ast
import contextlib
import copy
import csv
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from scipy.stats import ttest_ind
from torch.testing import assert_close

import reproduce
import rl2_hyper
import show
import varibad_hyper

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README": README} | DOCS
SCRIPTS = ("varibad_hyper.py", "rl2_hyper.py")


def section(page, title):
    """The text below a heading of a page, up to the next of its level or a higher one."""
    (hashes,) = re.findall(rf"^(#+) {re.escape(title)}$", page, re.M)
    rest = page.split(f"\n{hashes} {title}\n")[1]
    return re.split(rf"^#{{1,{len(hashes)}}} ", rest, maxsplit=1, flags=re.M)[0]


def rows(text):
    """The cells of every row of its tables, without the headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    headers = [i - 1 for i, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [row for i, row in enumerate(cells) if i not in headers and i - 1 not in headers]


@cache
def parse(file):
    return ast.parse(file.read_text())


def definitions(file):
    """Functions, classes and constants of a file, by name: their syntax trees."""
    found = {}
    for node in parse(ROOT / file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found |= {part.id: node for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def source(file, name):
    """The text of a definition, in one line."""
    node = definitions(file)[name]
    return " ".join(" ".join((ROOT / file).read_text().splitlines()[node.lineno - 1 : node.end_lineno]).split())


def code_words(text):
    return re.findall(r"`([^`]+)`", text)


# ---------------------------------------------------------------------------------------------------------------------
# The idea, the way through the files, the equations


class Bare(ast.NodeTransformer):
    """A function's calculation alone: no docstring, type hints, `no_grad` or returned argument."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.returns, node.args.defaults = None, []
        body = node.body[ast.get_docstring(node) is not None :]
        body = [part for line in body for part in (line.body if isinstance(line, ast.With) else [line])]
        node.body = [line for line in body if not isinstance(line, ast.Return)]
        return node

    def visit_arg(self, node):
        return ast.arg(node.arg)


def test_idea_is_the_codes():
    (code,) = re.findall(r"```python\n(.*?)```", section(README, "The idea"), re.S)
    shown = ast.parse(code).body
    assert [function.name for function in shown] == ["bias_hyperinit_"]
    for function in shown:
        assert ast.dump(Bare().visit(function)) == ast.dump(
            Bare().visit(copy.deepcopy(definitions("hyperinit.py")[function.name]))
        )


def test_way_through_the_files_names_what_is_there():
    text = section(DOCS["reading"], "In this order")
    ways = [row for row in rows(text) if code_words(row[0]) and len(row) == 3 and row[0].endswith(".py`")]
    assert [row[0] for row in ways][:4] == [f"`{file}`" for file in ("hyperinit.py", "gridworld.py", *SCRIPTS)]
    for file, *cells in ways:
        names = code_words(" ".join(cells))
        assert names and set(names) <= definitions(file.strip("`")).keys()


def test_parts_of_main_are_marked_in_the_order_that_is_told():
    text = " ".join(section(DOCS["reading"], "In this order").split())
    told = re.search(r"`# ---`, in this order: ([^.]*)\.", text)[1].split(", ")
    for script, parts in zip(SCRIPTS, (told, [part for part in told if part != "VAE update"]), strict=True):
        marks = re.findall(r"^ +# --- (.*)$", (ROOT / script).read_text(), re.M)
        assert len(marks) == len(parts)
        for mark, part in zip(marks, parts, strict=True):
            assert mark.removeprefix("Recurrent ").lower().startswith(part.lower())


def test_equations_stand_where_the_table_says():
    """In the source of every definition stands the number or name in the row's first column."""
    table = rows(section(DOCS["reading"], "The papers' equations in the code"))
    assert len(table) >= 20
    for number, _, code in table:
        files, names = [], []
        for word in code_words(code):
            if word.endswith(".py"):
                files.append(word)
            else:
                names.append(word)
        assert files and names
        for file in files:
            for name in names:
                assert name in definitions(file), f"{file} has no {name}"
                assert number in source(file, name), f"{name} in {file} does not say {number}"
    numbers = {row[0] for row in table}
    assert numbers >= {"Eq. (1)", "Eq. (2)", "Eq. (3)", "section 4.1", "section 4.3"}


# ---------------------------------------------------------------------------------------------------------------------
# The difference between the scripts


def test_difference_of_the_scripts_is_told_whole():
    """Every definition that only one of them has or that differs is named, and nothing else is."""
    varibad, rl2 = map(definitions, SCRIPTS)
    differing = {name for name in varibad.keys() & rl2.keys() if ast.dump(varibad[name]) != ast.dump(rl2[name])}
    table = rows(section(DOCS["reading"], "How VariBAD and RL2 differ"))
    assert {name for row in table for name in code_words(row[0])} == differing | (varibad.keys() ^ rl2.keys())
    for part, in_varibad, in_rl2, _ in table:
        assert in_varibad != in_rl2 and (part == "imports" or code_words(part))
        for name in code_words(part):
            assert name in varibad or in_varibad == "none"
            assert name in rl2 or in_rl2 == "none"


def test_imports_that_differ_are_told():
    names = []
    for script in SCRIPTS:
        nodes = [node for node in parse(ROOT / script).body if isinstance(node, ast.ImportFrom)]
        names.append({alias.name for node in nodes for alias in node.names})
    told = [row for row in rows(section(DOCS["reading"], "How VariBAD and RL2 differ")) if row[0] == "imports"]
    assert names[1] <= names[0]
    assert len(told) == (names[0] != names[1])  # a row only where there is something to tell
    assert {word for row in told for word in code_words(row[1])} == names[0] - names[1]


# ---------------------------------------------------------------------------------------------------------------------
# The pages, their links, their commands


def test_front_page_can_be_read_whole():
    lines = README.splitlines()
    assert len(lines) <= 300
    assert "```bash" in lines[:40]  # the first screen has a command
    code = False
    for line in lines:
        code ^= line.startswith("```")
        assert code or len(line) <= (210 if line.startswith("|") else 120), line


def anchors(page):
    """What a link can point to: headings as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = folder / path if path else folder / f"{name}.md"
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


def test_every_page_is_one_link_away():
    linked = set(re.findall(r"\]\(docs/(\w+)\.md", section(README, "Look things up")))
    assert linked >= DOCS.keys()


def commands(*programs):
    """The arguments of every command in the pages' shell blocks that starts one of these programs."""
    pages = "\n".join(page for name, page in PAGES.items() if name != "recipes")  # whose commands need its changes
    lines = "\n".join(re.findall(r"^```bash\n(.*?)```", pages, re.M | re.S)).replace("\\\n", "").splitlines()
    lines += re.findall(r"^\| `(python [^`]*)` \|", pages, re.M)
    words = [line.partition("  #")[0].split() for line in lines]
    found = [(line[1], line[2:]) for line in words if line[:1] == ["python"] and line[1] in programs]
    assert found
    return found


def test_first_run_prints_what_is_told():
    """The first commands' table gives the numbers of a kept result."""
    (kept,) = (ROOT / "results").glob("Grid-World__*.json")
    kept = json.loads(kept.read_text())
    script, *flags = re.search(r"^\| `python (varibad_hyper\.py [^`]*)` \|", README, re.M)[1].split()
    names = ("env", "arch", "init", "seed", "total_timesteps", "vae_updates", "vae_batch", "vae_learning_rate")
    wanted = varibad_hyper.parse_args(flags)
    assert {name: kept["args"][name] for name in names} == {name: getattr(wanted, name) for name in names}
    evaluation = kept["evaluation"]["meta_episodic_return"]
    assert f"| meta-episode return {evaluation['mean']:.2f} +- {evaluation['stderr']:.2f} (24 tasks) |" in README
    assert f"The return was {kept['eval_history'][0][1]:.2f} before training" in README
    assert f"the Bayes-optimal one is {varibad_hyper.GRID_WORLD_BEST['all']:.2f}" in README


def test_commands_that_train_are_understood():
    modules = {"varibad_hyper.py": varibad_hyper, "rl2_hyper.py": rl2_hyper}
    for script, flags in commands(*SCRIPTS):
        if not {"--resume", "--evaluate"} & set(flags):
            modules[script].check_args(modules[script].parse_args(flags))


def test_commands_that_draw_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, flags in commands("show.py"):
        show.parse_args(flags)


def test_commands_that_reproduce_are_understood():
    for _, flags in commands("reproduce.py"):
        args = tyro.cli(reproduce.Args, args=flags)
        assert args.target == "readme" or reproduce.make_runs(args)


def test_commands_repeat_the_results():
    """The README's last three are the runs of Table 1, at the rates that the kept tuning runs chose."""
    kept = reproduce.read_rows(ROOT / "results")
    shown, tuned, runs, tuning = reproduce.kept_runs(kept, "table1"), reproduce.kept_tuning(kept), [], []
    for args in [tyro.cli(reproduce.Args, args=flags) for _, flags in commands("reproduce.py")]:
        if args.learning_rates and args.target != "robustness":
            runs += reproduce.make_runs(args)
            tuning += reproduce.make_tuning_runs(args, reproduce.make_runs(args))
    rates = reproduce.choose_rates(reproduce.returns_by_rate(kept, tuning))
    assert set(tuning) == set(tuned) and set(reproduce.with_rates(runs, rates)) == set(shown)


def test_verdicts_quote_the_tables():
    """Their p-values, and the README's, are corrected ones of the tests there, their returns means of Table 1."""
    page = section(DOCS["results"], "The paper's claims")
    texts = dict(re.findall(r"^\*\*([\w-]+)\.\*\* (.*?)\n\n", page, re.M | re.S))
    tested = [[row[0], row[-1]] for row in rows(page) if len(row) == 6]
    tested += [[row[1], row[-1]] for row in rows(section(DOCS["results"], "Every comparison"))]
    told = [(env, p) for env, text in texts.items() for p in re.findall(r"p = ([\d.]*\d)", text)]
    env, front = None, section(README, "Results").split("The claims:")[1]
    for name, p in re.findall(rf"({'|'.join(texts)})|p = ([\d.]*\d)", front):
        env = name or env  # a p-value is of the environment that was named last
        told += [(env, p)] if p else []
    assert {env for env, _ in told} == texts.keys()
    for env, p in told:
        half = 0.501 * 10.0 ** -len(p.partition(".")[2])  # of its last digit
        assert any(abs(float(p) - float(other)) <= half for of, other in tested if of == env), (env, p)
    table = README.split("<!-- table1 -->")[1].split("<!-- end of table1 -->")[0]
    assert list(texts) == re.findall(r"\| ([\w-]+), [\d,]+ frames", table)
    for column, text in enumerate(texts.values()):
        means = {re.match(r"\**(-?[\d.]*)", row[2 * column + 1])[1] for row in rows(table)}
        returns = re.findall(r"(?<![\w.])-?\d+(?:\.\d)?\b", re.sub(r"p = [\d.]*\d", "", text))
        assert len(returns) >= 3 and set(returns) <= means


def test_late_starts_are_told_as_they_are():
    """Of Kaiming and normc on Walker: the first evaluation of 100 or more, and the runs that chose their rates."""
    kept, firsts, tried = reproduce.read_rows(ROOT / "results"), {True: [], False: []}, []
    for run in [run for run in reproduce.kept_runs(kept, "table1") if run.env == "Walker"]:
        reached = [frames for frames, value in json.loads(kept[run]["curve"]) if value >= 100]
        firsts[run.method in ("kaiming", "normc")].append(reached[0])
    for run in [run for run in reproduce.kept_tuning(kept) if run.env == "Walker"]:
        tried += [float(kept[run]["return"])] if run.method in ("kaiming", "normc") else []
    page = " ".join(section(DOCS["results"], "Learning curves").split())
    spans = [f"{min(of):,} to {max(of):,}" for of in firsts.values()]
    assert f"100 or more comes after {spans[0]} frames with Kaiming and normc, and after {spans[1]} with" in page
    assert min(firsts[True]) > 900_000 and max(firsts[False]) <= 400_000
    assert "after about a million frames, the others after 400,000 at most." in " ".join(README.split())
    assert len(tried) == 12 and f"had not begun to learn ({min(tried):.0f} to {max(tried):.0f})" in page


def test_shares_of_the_papers_returns():
    """Of the methods of VariBAD that learn on Cheetah-Dir; on Walker of all."""
    kept = reproduce.read_rows(ROOT / "results")
    cells, shares = reproduce.table_cells(kept, reproduce.kept_runs(kept, "table1"), "table1")[0], {}
    for env, method in [cell for cell in cells if cell[1] in reproduce.PAPER["table1"] and cell[0] != "Grid-World"]:
        paper = float(reproduce.paper_value("table1", env, method).split()[0])
        failing = method in ("kaiming", "normc")
        shares.setdefault((env, failing), []).append(100 * float(np.mean(cells[env, method])) / paper)
    spans = {cell: f"{min(of):.0f} to {max(of):.0f}%" for cell, of in shares.items()}
    assert len(shares["Cheetah-Dir", False]) == 5
    page = " ".join(DOCS["results"].split())
    assert f"have reached {spans['Cheetah-Dir', False]} of the paper's returns" in page
    assert f"reached {spans['Walker', True]} of its returns, the others {spans['Walker', False]}." in page


def test_collapsed_seed_is_half_of_the_difference():
    """RL2's with Bias-HyperInit on Cheetah-Dir: without its worst seed it would be half as far behind VariBAD's."""
    kept = reproduce.read_rows(ROOT / "results")
    cells = reproduce.table_cells(kept, reproduce.kept_runs(kept, "table1"), "table1")[0]
    bias, rl2 = cells["Cheetah-Dir", "bias"], sorted(cells["Cheetah-Dir", "rl2"])
    share = (np.mean(rl2[1:]) - np.mean(rl2)) / (np.mean(bias) - np.mean(rl2))
    assert 0.45 < share < 0.55 and "half of that due to one collapsed seed" in " ".join(README.split())


def test_standing_still_earns_what_is_told():
    """On Walker: of a robot that has no speed and does nothing, over a meta-episode."""
    args = varibad_hyper.make_args("Walker")
    envs = varibad_hyper.make_envs(args, num_envs=1)
    (reward,) = envs.envs.reward(np.zeros((1, 1)), np.zeros((1, envs.action_dim)))
    assert f"standing still earns {reward * envs.max_steps:.0f}" in " ".join(README.split())
    assert f"earns {reward * envs.max_steps:.0f} on Walker" in section(DOCS["results"], "Learning curves")


def test_borderline_p_with_the_same_evaluations():
    """Weight-HyperInit's on Cheetah-Dir, with those evaluations alone that all of its runs have."""
    kept = reproduce.read_rows(ROOT / "results")
    runs = reproduce.kept_runs(kept, "table1")
    shared = set.intersection(*(set(dict(json.loads(kept[run]["curve"]))) for run in runs if run.env == "Cheetah-Dir"))

    def corrected(rows):
        of_all = reproduce.table_cells(rows, runs, "table1")[1]
        (c,) = [c for c in of_all if (c.group[0], c.method) == ("Cheetah-Dir", "weight")]
        return f"{c.corrected:.3f}"

    same = {}
    for run in runs:
        curve = [point for point in json.loads(kept[run]["curve"]) if run.env != "Cheetah-Dir" or point[0] in shared]
        same[run] = kept[run] | {"return": reproduce.final_return(curve)}
    page = " ".join(section(DOCS["results"], "How the runs were made").split())
    assert f"on Cheetah-Dir is {corrected(same)} instead of {corrected(kept)}" in page


def tuning_rows():
    """The rows of Grid-World that chose the learning rates, by method."""
    kept = reproduce.read_rows(ROOT / "results")
    runs = [run for run in reproduce.kept_runs(kept, "robustness") if run.env == "Grid-World"]
    return {method: reproduce.rows_of(kept, runs, method=method) for method in {run.method for run in runs}}


def test_frames_to_36_are_those_of_the_rows():
    """Medians over the seeds of the first evaluation of 36 or more."""
    kept = reproduce.read_rows(ROOT / "results")
    firsts = reproduce.frames_to_36(kept, reproduce.kept_runs(kept, "table1"))
    medians = {reproduce.METHODS[method][0]: f"{np.median(of):,.0f}" for (_, method), of in firsts.items()}
    page = re.search(r"The medians are (.*?)\.\n", section(DOCS["results"], "The paper's claims"), re.S)[1]
    assert {name: frames for frames, name in re.findall(r"([\d,]+) \((.*?)\)", " ".join(page.split()))} == medians


def test_ranges_of_rates_are_those_of_the_rows():
    """Means of the tuning seeds on Grid-World: the lowest, and those without 4e-3."""
    means = {}
    for method, of_method in tuning_rows().items():
        by_rate = {}
        for row in of_method:
            by_rate.setdefault(json.loads(row["args"])["learning_rate"], []).append(float(row["return"]))
        means[method] = [float(np.mean(by_rate[rate])) for rate in (3e-4, 7e-4, 2e-3, 4e-3)]
    front = " ".join(section(README, "Results").split())
    *bias, bias_last = means["bias"]
    assert f"Bias-HyperInit has at least {min(bias):.1f} from 3e-4 to 2e-3, but {bias_last:.1f} at 4e-3" in front
    assert means["standard"] == sorted(means["standard"])
    assert "rises from {0:.1f} to {3:.1f}.".format(*means["standard"]) in front
    page = " ".join(section(DOCS["results"], "Learning rates").split())
    names = {"bias": "Bias-HyperInit", "weight": "Weight-HyperInit", "hfi": "HFI", "kaiming": "Kaiming"}
    names |= {"normc": "normc", "orthogonal": "orthogonal", "standard": "the standard architecture"}
    for method, name in names.items():
        assert f"{min(means[method]):.1f} for {name}" in page
        assert method == "standard" or min(means[method]) == means[method][-1]
    normc, film = min(means["film-normc"]), min(means["film"])
    assert f"its lowest means are {normc:.1f} with normc and {film:.1f} with Bias-HyperInit, the lowest" in page
    assert all(means[method] == sorted(means[method]) for method in ("film-normc", "film"))
    assert f"has at least {min(bias):.1f}, the standard architecture at most {max(means['standard'][:3]):.1f}" in page


def test_larger_rate_on_cheetah_dir_is_told_as_it_was():
    """Every number of that paragraph: the tuning runs at 4e-3, and the standard architecture's full runs."""
    late, kept = (reproduce.read_rows(ROOT / "results" / folder) for folder in ("rate-4e-3", ""))
    page = " ".join(section(DOCS["results"], "Learning rates").split())
    tuning = [run for run in late if run.seed in reproduce.TUNING_SEEDS]
    assert reproduce.make_rate_table(late, tuning).replace("**", "") in DOCS["results"]
    assert {(run.env, run.method) for run in tuning} == {("Cheetah-Dir", name) for name in reproduce.PAPER["table1"]}
    full = [float(late[run]["return"]) for run in sorted(late, key=reproduce.by_table) if run.seed < 11]
    shown = [run for run in reproduce.kept_runs(kept, "table1") if (run.env, run.method) == ("Cheetah-Dir", "standard")]
    before = [float(kept[run]["return"]) for run in shown]
    assert f"{', '.join(f'{value:.2f}' for value in full)}, which is {reproduce.mean_text(full)}" in page
    p = ttest_ind(full, before, equal_var=False).pvalue
    assert f"against {reproduce.mean_text(before)} at 2e-3 (p = {p:.2f}, not corrected)" in page
    every = reproduce.returns_by_rate(kept | late, [run for run in kept | late if run.seed in (11, 12)])
    rates = reproduce.choose_rates({cell: of for cell, of in every.items() if cell[0] == "Cheetah-Dir"})
    assert {method for (_, method, _), rate in rates.items() if rate == 4e-3} == {"standard", "kaiming", "normc"}


def test_first_updates_are_those_of_the_runs():
    """The page has the table that the example makes of the kept numbers, whose returns are those of the rows."""
    example = runpy.run_path(str(ROOT / "examples" / "first_update.py"))
    with open(example["CSV"], newline="") as file:
        kept = list(csv.DictReader(file))
    assert example["make_table"](kept) in DOCS["results"]
    tuning = {method: of for method, of in tuning_rows().items() if not method.startswith("rl2")}
    names = ("method", "seed", "learning_rate", "return")
    rows = [dict(row, learning_rate=json.loads(row["args"])["learning_rate"]) for of in tuning.values() for row in of]
    told = {(r["method"], r["seed"], float(r["learning_rate"]), float(r["return"])) for r in kept}
    assert told == {(*(row[name] for name in names[:3]), round(float(row["return"]), 2)) for row in rows}


def test_speed_and_cost_are_those_of_the_runs():
    """The page has the table that the example makes of the kept numbers: the last returns of the rows, in parts."""
    example = runpy.run_path(str(ROOT / "examples" / "speed_and_cost.py"))
    with open(example["CSV"], newline="") as file:
        kept = list(csv.DictReader(file))
    assert example["make_table"](kept) in DOCS["results"]
    rows = reproduce.read_rows(ROOT / "results")
    runs = [run for run in reproduce.kept_runs(rows, "table1") if run.env == "Cheetah-Dir"]
    told = {(row["method"], int(row["seed"])): float(row["return"]) for row in kept}
    assert told == {(run.method, run.seed): round(float(rows[run]["last_return"]), 2) for run in runs}
    for row in kept:  # half of the tasks are forwards
        running = (float(row["forwards"]) + float(row["backwards"])) / 2
        assert abs(running + float(row["actions"]) - float(row["return"])) < 0.016
    failing = [
        [float(row[way]) for way in ("forwards", "backwards")] for row in kept if row["method"] in ("kaiming", "normc")
    ]
    (runs_back,) = [paid for paid in failing if max(paid) > 100]
    others = sum([paid for paid in failing if paid != runs_back], [])
    page = " ".join(section(DOCS["results"], "What the returns consist of").split())
    assert f"between {np.floor(min(others)):.0f} and {max(others):.0f} by running" in page
    assert f"({runs_back[1]:.0f} and {runs_back[0]:.0f})" in page
    forwards = {name: [float(row["forwards"]) for row in kept if row["method"] == name] for name in reproduce.METHODS}
    slow = {name: [value for value in of if value < 500] for name, of in forwards.items()}
    assert not slow["standard"] and not slow["bias"]
    slow = slow["orthogonal"] + slow["hfi"] + slow["weight"]
    assert f"some seeds with {min(slow):.0f} to {max(slow):.0f} there" in page


@pytest.mark.parametrize("name", ["first_update", "speed_and_cost"])
def test_examples_say_which_runs_are_missing(name, tmp_path):
    """And leave the kept numbers as they are."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("examples", "results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    command = [sys.executable, f"examples/{name}.py", "--read"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("runs/reproduce has "), done.stderr
    assert "by the command in docs/results.md" in done.stderr
    for path in (ROOT / "results").rglob("*.csv"):
        assert path.read_bytes() == (tmp_path / path.relative_to(ROOT)).read_bytes()


def test_running_is_paid_by_the_distance():
    """d (x_end - x_start) / dt, as the robot's position says."""
    args = varibad_hyper.make_args("Cheetah-Dir", init="kaiming", eval_tasks=4)
    torch.manual_seed(1)
    envs = varibad_hyper.make_eval_envs(args)
    agent = varibad_hyper.Agent(envs, args)
    script = SimpleNamespace(evaluate=varibad_hyper.evaluate, seeds_of=varibad_hyper.seeds_of)
    script.load_saved, script.load_agent = lambda folder: ({}, args), lambda folder: (agent, envs)
    robots, step = envs.envs, envs.envs.step
    places = []

    def watched(actions):
        places.append(robots.location())
        result = step(actions)
        places.append(robots.location())
        return result

    robots.step = watched
    earned = runpy.run_path(str(ROOT / "examples" / "speed_and_cost.py"))["play"](script, Path())
    assert len(places) == 2 * 200 and robots.tasks[:, 0].tolist() == [-1, 1, -1, 1]
    back, forth = -(places[-1] - places[0])[::2], (places[-1] - places[0])[1::2]  # metres in the right direction
    assert earned["forwards"] == pytest.approx(np.mean(forth) / robots.dt, abs=1e-3)
    assert earned["backwards"] == pytest.approx(np.mean(back) / robots.dt, abs=1e-3)
    running = (earned["forwards"] + earned["backwards"]) / 2
    assert running + earned["actions"] == pytest.approx(earned["return"], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# In one's own code

LAYER, GRID, AGENT = re.findall(r"^```python\n(.*?)```", section(README, "Use it in your own code"), re.M | re.S)


def python(code, folder):
    """What a script of one's own prints, in a folder of its own."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_layer_learns_as_told(tmp_path):
    text = " ".join(section(README, "Use it in your own code").split())
    first, last = re.search(r"losses of ([\d.]+) at step 0 and less than ([\d.]+) at step 1000", text).groups()
    (other,) = re.findall(r"`(init_hyper_linear_\(.*?\))`", text)
    then = f"""
from hyperinit import init_hyper_linear_
{other}
assert not net.hidden.weight[-1].any() and not net.hidden.bias.any()
for k in range(2):
    assert torch.allclose(net.hidden.weight[k].norm(), torch.ones(()))
"""
    out = python(LAYER + then, tmp_path)
    losses = {int(step): float(loss) for step, loss in re.findall(r"step (\d+): ([\d.]+)", out)}
    assert losses[0] == pytest.approx(float(first), rel=0.2) and 0 < losses[1000] < float(last)


def test_grid_world_goes_on_as_told(tmp_path):
    then = """
import numpy as np
assert np.array_equal(envs.elapsed, np.full(16, 100 % 15)) and obs.shape == (16, 2)
envs = gym.make_vec("GridWorld-v0", num_envs=16, vectorization_mode="sync")
assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
"""
    assert 'vectorization_mode="sync"' in section(README, "Use it in your own code")
    grid = [line.split() for line in python(GRID + then, tmp_path).splitlines()[:5]]
    assert grid[4] == [".", "A", ".", ".", ".", "-0.1"]  # a step to the right, without reward
    assert sum(line.count("G") for line in grid) == 1


@pytest.mark.slow
def test_saved_agent_is_played_and_looked_at_as_told(tmp_path):
    """The returns are those of the evaluation, in which this goal is one of 24."""
    flags = "--total-timesteps 5e3 --eval-interval 0 --learning-starts 0 --no-cuda"
    run = [sys.executable, ROOT / "varibad_hyper.py", *flags.split()]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    out = python(AGENT, tmp_path)
    (folder,) = tmp_path.glob("runs/*")
    agent, envs = varibad_hyper.load_agent(str(folder))
    goal = envs.all_tasks.tolist().index([4, 2])
    played = varibad_hyper.evaluate(agent, envs, 0)[goal]
    assert out.strip() == str(played.returns)

    kept = json.loads((folder / "result.json").read_text())["evaluation"]["meta_episodic_return"]["mean"]
    (flags,) = [flags for script, flags in commands("varibad_hyper.py") if "--evaluate" in flags][:1]
    command = [sys.executable, ROOT / "varibad_hyper.py", *flags[:-1], folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert f"meta-episode return {kept:.2f} " in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# From the authors' flags to ours


def flag(field):
    return f"--{field.replace('_', '-')}"


def test_flag_table_is_about_flags_that_exist():
    """Every flag in its right column exists, and every flag stands in it or in the list of those that they lack."""
    text = DOCS["flags"]
    table = rows(text)
    ours = {word for row in table for word in code_words(row[1])} - {"rl2_hyper.py"}
    theirs = [word for row in table for word in code_words(row[0])]
    alone = set(code_words(text.partition("Our flags without a counterpart there:")[2]))
    flags = {flag(field) for field in varibad_hyper.Args.__dataclass_fields__}
    assert ours <= flags and alone <= flags
    assert ours | alone == flags and not ours & alone
    assert len(theirs) == len(set(theirs)) >= 50
    assert all(re.fullmatch(r"[a-z_]+", name) for name in theirs)


# ---------------------------------------------------------------------------------------------------------------------
# The changes


RECIPES = re.findall(r"^## (.*?)\n.*?```diff\n(.*?)```\n\n```bash\n(.*?)```", DOCS["recipes"], re.M | re.S)
DIFFS = {title: diff for title, diff, _ in RECIPES}
COMMANDS = {title: commands.strip().splitlines() for title, _, commands in RECIPES}
TINY = (
    "--num-envs 4 --num-steps 37 --total-timesteps 592 --learning-starts 0 --eval-interval 0 --eval-tasks 2 --no-cuda"
)


def apply(title, folder, command="git apply change.diff"):
    """Does to a copy of the files what the page says."""
    (folder / "change.diff").write_text(DIFFS[title])
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, shell=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def copied(tmp_path):
    """A folder with a copy of the files."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture
def changed(request, copied):
    """A folder with the files as the recipe changes them."""
    apply(request.param, copied)
    return copied


def changed_by(title):
    return pytest.mark.parametrize("changed", [title], indirect=True)


def load(folder, monkeypatch):
    """The folder's hyperinit, varibad_hyper and show, beside those that are imported already."""
    modules = []
    for name in ("hyperinit", "varibad_hyper", "show"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        modules.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, name, modules[-1])
        spec.loader.exec_module(modules[-1])
    return modules


def test_there_are_four_changes():
    assert list(DIFFS) == ["An initialiser", "An environment", "An architecture", "An encoder"]
    assert "".join(PAGES.values()).count("```diff") == len(DIFFS)


@pytest.mark.parametrize("order", [1, -1])
def test_changes_apply_on_top_of_each_other_and_to_both_scripts(order, copied):
    """And the copies of what both scripts share stay equal, as tests/test_twins.py wants them."""
    (both,) = re.findall(r"^sed .*$", DOCS["recipes"], re.M)
    (copied / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_twins.py", copied / "tests")
    for title in list(DIFFS)[::order]:
        apply(title, copied)
        if title != "An encoder":
            apply(title, copied, both)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_twins.py"]
    result = subprocess.run(command, cwd=copied, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    source = (copied / "varibad_hyper.py").read_text()
    assert all(name in source for name in ('"noisy-bias"', '"Cheetah-Vel"', '"hyper-input"', '"sum"'))
    rl2 = (copied / "rl2_hyper.py").read_text()
    assert all(name in rl2 for name in ('"noisy-bias"', '"Cheetah-Vel"', '"hyper-input"'))


@pytest.mark.parametrize("changed", DIFFS, indirect=True)
def test_changes_apply_and_are_clean(changed, request):
    touched = {file.name for file in changed.glob("*.py") if file.read_text() != (ROOT / file.name).read_text()}
    title = request.node.callspec.params["changed"]
    assert touched == ({"hyperinit.py", "varibad_hyper.py"} if title == "An initialiser" else {"varibad_hyper.py"})
    shutil.copy(ROOT / "pyproject.toml", changed)
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *touched], cwd=changed, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed, choice",
    [
        ("An initialiser", {"init": "noisy-bias"}),
        ("An environment", {"env": "Cheetah-Vel"}),
        ("An architecture", {"arch": "hyper-input"}),
        ("An encoder", {"encoder": "sum"}),
    ],
    indirect=["changed"],
)
def test_changes_run_as_their_commands_say(changed, choice, request):
    commands = COMMANDS[request.node.callspec.params["changed"]]
    script, *flags = commands[-1].removeprefix("python ").split()
    run = [sys.executable, script, *flags, *TINY.split()]
    result = subprocess.run(run, cwd=changed, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    (kept,) = changed.glob("runs/*/result.json")
    kept = json.loads(kept.read_text())
    assert kept["frames"] == 592 and choice.items() <= kept["args"].items()
    (value,) = choice.values()
    assert value in flags


def told(module, *flags):
    """What is printed about flags that are refused by the time that the agent is made, and the exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        with pytest.raises(SystemExit) as stop:
            args = module.parse_args(list(flags))
            module.check_args(args)
            module.Agent(module.make_envs(args, 2), args)
    return " ".join(re.sub(r"[│\s]+", " ", out.getvalue() + err.getvalue()).split()), stop.value.code


def make_agent(script, *flags):
    args = script.parse_args(list(flags))
    torch.manual_seed(0)
    envs = script.make_envs(args, 2)
    return script.Agent(envs, args), args, envs


@changed_by("An initialiser")
def test_noisy_bias_is_f_and_a_tenth_of_f(changed, monkeypatch):
    _, script, show = load(changed, monkeypatch)
    assert "noisy-bias" in told(script, "--help")[0]
    script.check_args(script.make_args(init="noisy-bias", base_init="orthogonal"))  # which it draws from
    assert show.parse_args(COMMANDS["An initialiser"][0].removeprefix("python show.py ").split()).file == show.INIT
    assert told(script, "--arch", "film", "--init", "noisy-bias")[1] == 2
    assert told(script, "--arch", "standard", "--init", "noisy-bias")[1] == 2
    assert "noisy-bias" in show.HYPER_SCHEMES
    assert show.measure("noisy-bias", tasks=5, observations=5)["scale"].isfinite().all()

    agent, args, _ = make_agent(script, "--init", "noisy-bias")
    stack = agent.policy.actor[1].weight.detach()  # [K+1, out, in]
    lengths = stack.norm(dim=2)  # f is normc with the gain of tanh: rows of this length
    assert stack.shape == (args.embedding_features + 1, *2 * args.base_layers[:1])
    assert_close(lengths[-1], torch.full_like(lengths[-1], 5 / 3))
    assert_close(lengths[:-1], torch.full_like(lengths[:-1], 5 / 30))
    assert not torch.allclose(stack[0] / stack[0].norm(), stack[1] / stack[1].norm(), atol=0.1)
    assert not agent.policy.actor[1].bias.any()


@changed_by("An environment")
def test_cheetah_vel_pays_for_its_speed(changed, monkeypatch):
    _, script, _ = load(changed, monkeypatch)
    assert "Cheetah-Vel" in told(script, "--help")[0]
    assert told(script, "--env", "Cheetah-Vel", "--embedding", "one-hot")[1] == 2
    assert script.parse_args(["--env", "Cheetah-Vel"]).num_steps == 400
    envs = script.CheetahVel(200)
    envs.reset(seed=0)
    tasks = envs.tasks[:, 0].copy()
    assert 0 <= tasks.min() < 0.1 and 2.9 < tasks.max() <= 3 and abs(tasks.mean() - 1.5) < 0.2
    action = np.full((200, 6), 0.5)
    speeds = np.linspace(-1, 4, 200)
    wanted = [-abs(speed - task) - 0.05 * 6 * 0.25 for speed, task in zip(speeds, tasks, strict=True)]
    np.testing.assert_allclose(envs.reward(speeds[:, None], action), wanted)
    before = envs.location()[:, 0]
    reward = envs.step(action)[1]
    speeds = (envs.location()[:, 0] - before) / envs.dt
    np.testing.assert_allclose(reward, envs.reward(speeds[:, None], action))
    args = script.parse_args(["--env", "Cheetah-Vel", "--eval-tasks", "3"])
    assert script.make_eval_envs(args).all_tasks is None


@changed_by("An architecture")
def test_hyper_input_sees_the_embedding_twice(changed, monkeypatch):
    _, script, _ = load(changed, monkeypatch)
    assert "hyper-input" in told(script, "--help")[0]
    assert told(script, "--arch", "hyper-input", "--no-hyper-bias")[1] == 2  # as with hyper: nothing of bias is left
    script.check_args(script.parse_args("--arch hyper-input --no-hyper-bias --init weight".split()))
    agent, args, envs = make_agent(script, "--arch", "hyper-input")
    plain, _, _ = make_agent(script, "--arch", "hyper")
    added = script.parameter_counts(agent)["total"] - script.parameter_counts(plain)["total"]
    k = args.embedding_features
    assert added == 2 * (k + 1) * args.base_layers[0] * k  # the first layer of actor and critic, K inputs more

    # Under Bias-HyperInit no weight depends on the embedding yet, so that what it changes comes through the input
    obs, embeddings = torch.randn(5, envs.obs_dim), torch.randn(5, 2 * args.latent_dim)
    for policy, differs in ((agent.policy, True), (plain.policy, False)):
        outputs = policy(obs, embeddings)[1] - policy(obs, embeddings.roll(1, 0))[1]
        assert (outputs.abs().max() > 1e-3) == differs
    features = torch.cat([agent.policy.obs_features(obs), agent.policy.embedding_features(embeddings)], dim=1)
    for layer in agent.policy.critic:
        slow = F.linear(features, layer.weight[-1], layer.bias[-1, :, 0])
        features = torch.tanh(slow)
    assert_close(agent.policy(obs, embeddings)[1], slow[:, 0])


@changed_by("An encoder")
def test_sum_forgets_the_order(changed, monkeypatch):
    _, script, _ = load(changed, monkeypatch)
    text = told(script, "--help")[0]
    assert "--encoder {gru,sum}" in text and "(default: gru)" in text
    assert told(script, "--encoder", "lstm")[1] == 2
    order = torch.randperm(12)
    for name in ("gru", "sum"):
        agent, args, envs = make_agent(script, "--encoder", name)
        encoder = agent.vae.encoder
        actions, obs, rewards = (
            torch.randn(12, 3, envs.action_dim),
            torch.randn(12, 3, envs.obs_dim),
            torch.randn(12, 3, 1),
        )
        states = encoder.encode(actions, obs, rewards)  # [T+1, B, H]
        shuffled = encoder.encode(actions[order], obs[order], rewards[order])
        assert torch.allclose(states[-1], shuffled[-1], atol=1e-5) == (name == "sum")
        assert states.shape == (13, 3, args.gru_hidden) and not states[0].any()
        parts = encoder.hiddens(actions[5:], obs[5:], rewards[5:], states[5])  # goes on where it stood
        assert_close(parts, states[6:])
    embedded = [F.relu(layer(x)) for layer, x in zip(encoder.embeddings[1:], (obs, rewards), strict=True)]
    steps = F.relu(encoder.gru.linear(torch.cat(embedded, dim=-1)))
    assert_close(states[1:], torch.stack([sum(steps[: t + 1]) for t in range(12)]))


@pytest.mark.slow
def test_tour(tmp_path):
    """Its cells run from top to bottom, with fewer frames; only Bias-HyperInit starts all tasks from one policy."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    tour = (ROOT / "examples" / "tour.py").read_text()
    assert tour.count("total_timesteps=200_000") == 1
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "tour.py").write_text(tour.replace("200_000", "6_000"))
    command = [sys.executable, "tour.py"]
    done = subprocess.run(command, cwd=tmp_path / "examples", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^return of every episode: \[.+\]$", done.stdout, re.M)
    spreads = dict(re.findall(r"^(\w+) +mean actions: .* tasks +([\d.]+)$", done.stdout, re.M))
    assert [init for init, spread in spreads.items() if float(spread) == 0] == ["bias"] and len(spreads) == 5
    assert (tmp_path / re.search("^drawn: (.*)$", done.stdout, re.M)[1]).stat().st_size > 5000
