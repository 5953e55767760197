"""No run is lost: exact resume, kills at any moment, full disks, damaged and hostile files, physics that blows up."""

import errno
import fcntl
import gc
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

import gridworld
import rl2_hyper
import varibad_hyper

torch.set_num_threads(1)  # the tests fork
tqdm.monitor_interval = 0  # no thread that a fork would lose
both_scripts = pytest.mark.parametrize("script", [varibad_hyper, rl2_hyper], ids=lambda script: script.__name__)
MUJOCO = ["Cheetah-Dir", "Walker", "Ant-Dir", "Humanoid"]
SHORT = "--num-envs 4 --num-steps 37 --learning-starts 0 --save-model --eval-interval 2 --num-minibatches 2"
SHORT = [*SHORT.split(), "--eval-tasks", "3", "--no-cuda"]
ITERATIONS = 6


@pytest.fixture(autouse=True)
def hang_up_counts():
    """Also where the tests themselves run under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """TensorBoard reads event files by name: time in seconds, host. Here many runs begin in the same second."""
    starts = itertools.count()
    monkeypatch.setattr(socket, "gethostname", lambda: f"start{next(starts):05d}")


def flags_of(script, runs_dir, flags, iterations=ITERATIONS):
    argv = [*SHORT, "--runs-dir", str(runs_dir), *flags]
    steps = script.parse_args(argv).num_steps
    return [*argv, "--total-timesteps", str(4 * steps * iterations)]


def train(script, runs_dir, *flags, iterations=ITERATIONS):
    return script.main(script.parse_args(flags_of(script, runs_dir, flags, iterations)))


def resume(script, folder, *flags):
    assert script.main(script.parse_args(["--resume", str(folder), *flags])) == folder


def at_step(script, patch, at, action):
    """Calls action() in the training's at-th step of its environments (the evaluation has another number of them)."""
    calls, step = itertools.count(), script.MetaEpisodes.step

    def counting_step(self, actions):
        if self.num_envs == 4 and next(calls) == at:
            action()
        return step(self, actions)

    patch.setattr(script.MetaEpisodes, "step", counting_step)


def stop_at(script, at, runs_dir, *flags, number=signal.SIGTERM):
    """A run that gets a signal in the given step; its folder."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(script, patch, at, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as stop:
            train(script, runs_dir, *flags)
    assert stop.value.code == 128 + number
    (folder,) = runs_dir.iterdir()
    assert not (folder / "result.json").exists()
    return folder


def iteration_of(folder):
    """How far the checkpoint of a run's folder is; it must be whole."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["iteration"]


def points(folder):
    """Every scalar as a list of (step, value), so that a doubled point shows; of SPS, which takes time, the steps."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    series = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    series["charts/SPS"] = [step for step, _ in series["charts/SPS"]]
    return series


def check_same(folder, expected):
    """Two runs ended alike, bit for bit, and logged alike."""
    model, expected_model = (torch.load(run / "model.pt", weights_only=True)["agent"] for run in (folder, expected))
    assert model.keys() == expected_model.keys()
    assert [name for name in model if not torch.equal(model[name], expected_model[name])] == []
    result, expected_result = (json.loads((run / "result.json").read_text()) for run in (folder, expected))
    for name in ("evaluation", "eval_history", "frames", "blow_ups", "parameters"):
        assert result[name] == expected_result[name]
    series, expected_series = points(folder), points(expected)
    assert series.keys() == expected_series.keys()
    for tag in series:
        np.testing.assert_equal(series[tag], expected_series[tag], err_msg=tag)  # nan equals nan
    assert not list(folder.glob("*.new"))


def forked(function, stderr=os.devnull, kill_after=None, timeout=60, wait=True):
    """The exit status of function() in a child of this process, which has imported everything; -9: killed.

    Without `wait` a function that waits for it.
    """
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(stderr, "w", buffering=1)
            function()
            status = 0
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    socket.gethostname()  # the child has used this one

    def wait_for_it():
        deadline = time.monotonic() + (timeout if kill_after is None else kill_after)
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert kill_after is not None, f"the run hangs: {Path(stderr).read_text()}"
        return status

    return wait_for_it() if wait else wait_for_it


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------------
# Resume is exact

# Enough steps that meta-episodes end in most iterations; a VAE buffer of 5 wraps.
CASES = [
    (varibad_hyper, "--vae-buffer 5"),
    (varibad_hyper, "--embedding one-hot"),
    (varibad_hyper, "--env Cheetah-Dir --num-steps 90"),
    (varibad_hyper, "--env Cheetah-Dir --num-steps 90 --embedding one-hot"),
    (varibad_hyper, "--env Walker --num-steps 90 --vae-buffer 5"),
    (varibad_hyper, "--env Ant-Dir --num-steps 120"),
    (varibad_hyper, "--env Humanoid"),
    (rl2_hyper, ""),
    (rl2_hyper, "--env Cheetah-Dir --num-steps 90"),
    (rl2_hyper, "--env Walker --num-steps 90"),
    (rl2_hyper, "--env Ant-Dir --num-steps 120"),
    (rl2_hyper, "--env Humanoid"),
]


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", CASES, ids=lambda value: getattr(value, "__name__", value or "Grid-World"))
def test_resumed_run_is_the_uninterrupted_one(script, flags, tmp_path):
    flags = flags.split()
    expected = train(script, tmp_path / "whole", *flags)
    steps = script.parse_args(flags_of(script, tmp_path, flags)).num_steps
    at = random.Random(f"{script.__name__} {flags}").randrange(2 * steps, 5 * steps)  # in iteration 3, 4 or 5 of 6
    folder = stop_at(script, at, tmp_path / "stopped", *flags)
    assert iteration_of(folder) == at // steps + 1  # the iteration was completed
    if script is varibad_hyper:
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert len(checkpoint["buffer"]["finished"]) > 0  # so that the VAE's optimiser has a past
    resume(script, folder)
    check_same(folder, expected)


@pytest.mark.slow
@both_scripts
@pytest.mark.parametrize("first", [3, 4])
def test_more_frames_continue_a_finished_run(script, first, tmp_path):
    """As one that was longer from the start; the long run has an evaluation after 4 iterations, but none after 3."""
    expected = train(script, tmp_path / "whole")
    folder = train(script, tmp_path / "parts", iterations=first)
    resume(script, folder, "--total-timesteps", str(4 * 37 * ITERATIONS))
    check_same(folder, expected)


@both_scripts
def test_contradicting_flags_are_refused(script, tmp_path, capsys):
    folder = stop_at(script, 40, tmp_path)
    for flags in (
        "--seed 2",
        "--env Walker",
        "--num-envs 8",
        "--arch film",
        "--base-layers 7 7",
        "--gamma 0.5",
        "--checkpoint-interval 3",
        f"--runs-dir {tmp_path / 'other'}",
        "--evaluate model.pt",
        "--total-timesteps 148",
        "--exp-name other",
        "--eval-tasks 4",
    ):
        refused(script, capsys, ["--resume", str(folder), *flags.split()], flags.split()[0])
    resume(script, folder, "--seed", "1", "--num-envs", "4", "--cuda")  # the same, and another machine


def changed_arguments(folder, expected):
    """Names of the arguments that differ between the results of two runs."""
    args, others = (json.loads((run / "result.json").read_text())["args"] for run in (folder, expected))
    return {name for name in args if args[name] != others[name]} - {"runs_dir", "resume"}


@pytest.mark.slow
@both_scripts
def test_number_of_threads_may_change(script, tmp_path, monkeypatch):
    """PyTorch and physics get them. Sums of torch's threads may differ in their last bits, so torch has only one."""
    expected, asked = train(script, tmp_path / "whole", "--env", "Cheetah-Dir"), []
    folder = stop_at(script, 3 * 37, tmp_path / "stopped", "--env", "Cheetah-Dir")
    monkeypatch.setattr(script.torch, "set_num_threads", asked.append)
    make_pool = script.ThreadPoolExecutor
    monkeypatch.setattr(script, "ThreadPoolExecutor", lambda workers: asked.append(-workers) or make_pool(workers))
    resume(script, folder, "--threads", "2")
    check_same(folder, expected)
    assert changed_arguments(folder, expected) == {"threads"} and {-2, 2} == set(asked)


@both_scripts
def test_model_may_be_saved_after_all(script, tmp_path):
    expected = train(script, tmp_path / "whole")
    folder = stop_at(script, 3 * 37, tmp_path / "stopped", "--no-save-model")
    resume(script, folder, "--save-model")
    check_same(folder, expected)
    assert not changed_arguments(folder, expected)


@pytest.mark.slow
@both_scripts
def test_tracking_may_begin_later(script, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    expected = train(script, tmp_path / "whole")
    folder = stop_at(script, 3 * 37, tmp_path / "stopped")
    status, error = run_script(script, "", "--resume", str(folder), "--track", "--wandb-project-name", "other")
    assert status == 0, error
    check_same(folder, expected)
    assert changed_arguments(folder, expected) == {"track", "wandb_project_name"}
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1


@both_scripts
def test_finished_and_missing_runs_are_refused(script, tmp_path, capsys):
    """And a finished run keeps all that it has."""
    folder = train(script, tmp_path, "--eval-interval", "0", iterations=2)
    before = contents(folder)
    assert {"checkpoint.pt", "model.pt", "result.json"} < before.keys()
    one_more = ["--total-timesteps", str(2 * 148 + 1)]  # not enough for another iteration
    for flags, words in (
        ([], "is finished: give a larger --total-timesteps"),
        (one_more, "is finished: give a larger --total-timesteps"),
        (["--seed", "2"], "--seed 2 contradicts"),
        (["--total-timesteps", "148"], "--total-timesteps 148"),
    ):
        refused(script, capsys, ["--resume", str(folder), *flags], words)
        assert contents(folder) == before
    more = ["--total-timesteps", str(3 * 148)]
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(script, capsys, ["--resume", str(folder), *more], f"another process is training in {folder}")
    assert contents(folder) == before
    flip_bit(folder / "checkpoint.pt", 0.5)
    damaged = contents(folder)
    refused(script, capsys, ["--resume", str(folder), *more], "checkpoint.pt is damaged")
    assert contents(folder) == damaged and damaged["result.json"] == before["result.json"]

    (folder / "checkpoint.pt").write_bytes(before["checkpoint.pt"])
    (folder / "a copy.pt").write_bytes(b"")  # a file of somebody's own
    assert script.load_saved(str(folder))[1].seed == 1
    (folder / "checkpoint.pt").unlink()
    refused(script, capsys, ["--resume", str(folder), *more], f"cannot read {folder / 'checkpoint.pt'}")  # but model.pt
    refused(script, capsys, ["--resume", str(tmp_path / "missing")], f"cannot read {tmp_path / 'missing'}")
    refused(script, capsys, ["--resume", str(tmp_path)], "cannot read")  # not a run's folder


def contents(folder):
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_bit(path, where):
    """Flips one bit of a tensor in a file of torch, in the given part (0 to 1) of all its tensors' bytes."""
    with zipfile.ZipFile(path) as file:
        tensors = [record for record in file.infolist() if "/data/" in record.filename and record.file_size]
    left = int(where * sum(record.file_size for record in tensors))
    record = next(record for record in tensors if (left := left - record.file_size) < 0)
    data = bytearray(path.read_bytes())
    header = record.header_offset  # 30 bytes, then the name and the extra field, whose lengths it ends with
    start = header + 30 + sum(struct.unpack_from("<HH", data, header + 26))
    data[start + record.file_size + left] ^= 1 << 4
    path.write_bytes(data)


@both_scripts
def test_second_process_on_a_folder_is_refused(script, tmp_path):
    """While a run goes on, new or resumed: the other one ends with a sentence, and the run is as if nothing was."""
    expected = train(script, tmp_path / "whole")
    stderr, statuses = tmp_path / "stderr", []

    def intrude():
        (folder,) = (tmp_path / "runs").iterdir()
        before = {name: data for name, data in contents(folder).items() if not name.startswith("events")}
        for flags in [], ["--total-timesteps", "2000"]:
            statuses.append(forked(lambda flags=flags: resume(script, folder, *flags), stderr))
            sentence = f"error: another process is training in {folder}: wait until it ends, or stop it.\n"
            assert stderr.read_text() == sentence
        assert before.items() <= contents(folder).items()  # and TensorBoard's file, whose thread writes when it likes
        assert len(list(folder.iterdir())) == len(before) + 1 + iteration_of(folder) // 3  # one of each start

    with pytest.MonkeyPatch.context() as patch:
        at_step(script, patch, 37 + 5, intrude)
        at_step(script, patch, 3 * 37, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(script, tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    with pytest.MonkeyPatch.context() as patch:
        at_step(script, patch, 5, intrude)
        resume(script, folder)
    assert statuses == 4 * [2]
    check_same(folder, expected)


@both_scripts
def test_resumed_run_lets_go_of_its_old_checkpoint(script, tmp_path):
    """It is neither open nor mapped into memory, so that its space is free once the next one takes its place.

    The next one is written beside it, to a file that has the process in its name.
    """
    folder = stop_at(script, 3 * 37, tmp_path)
    seen, replace = [], os.replace

    def look():
        mapped = Path("/proc/self/maps").read_text()
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        seen.append(str(folder / "lock") in links)  # which shows that an open file would be seen
        assert "checkpoint.pt" not in mapped and not [link for link in links if "checkpoint.pt" in link]

    def watched_replace(source, target):
        seen.append(Path(source))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        at_step(script, patch, 3, look)
        patch.setattr(script.os, "replace", watched_replace)
        resume(script, folder)
    assert seen.pop(1) is True
    names = ("checkpoint.pt", "checkpoint.pt", "model.pt", "result.json")  # the first has a raised budget, if any
    assert seen == [folder / f"{name}.new" for name in names]


def refused(script, capsys, flags, words):
    """Exit status 2, and one sentence on stderr, nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def kill_in_write(patch, script, nth, where, fraction=0.5):
    """Kills this process at the nth file that is put into place: within its writing, or just before or after it."""
    written, replaced = itertools.count(1), itertools.count(1)
    save, os_replace = torch.save, os.replace

    def deadly_save(value, file):
        if where == "half" and next(written) == nth:
            whole = io.BytesIO()
            save(value, whole)
            file.write(whole.getvalue()[: int(fraction * whole.tell())])
            file.flush()
            kill_me()
        save(value, file)

    def deadly_replace(source, target):
        call = next(replaced)
        if where == "before" and call == nth:
            kill_me()
        os_replace(source, target)
        if where == "after" and call == nth:
            kill_me()

    patch.setattr(script.torch, "save", deadly_save)
    patch.setattr(script.os, "replace", deadly_replace)


@pytest.mark.slow
@both_scripts
def test_thirty_kills_change_nothing(script, tmp_path):
    """A chain of runs, each killed and each resumed where the last one stood: never started again."""
    rng = random.Random(0)
    flags = ["--num-steps", "6", "--eval-interval", "40", "--update-epochs", "1"]
    if script is varibad_hyper:
        flags += ["--vae-buffer", "5", "--vae-batch", "3", "--vae-updates", "1"]
    iterations, kills, inside = 160, 0, 0
    expected = train(script, tmp_path / "whole", *flags, iterations=iterations)
    flags += ["--checkpoint-interval", "1"]
    runs_dir, stderr = tmp_path / "killed", tmp_path / "stderr"
    reached = []
    while kills < 32:
        where = rng.choice(["half", "before", "after", "any time"]) if kills else "half"
        nth, fraction, delay = rng.randint(2, 5), rng.random(), rng.uniform(0.02, 0.3)

        def attempt(where=where, nth=nth, fraction=fraction, kills=kills):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket, "gethostname", lambda: f"start{kills:05d}")
                if where != "any time":
                    kill_in_write(patch, script, nth, where, fraction)
                if kills == 0:
                    train(script, runs_dir, *flags, iterations=iterations)
                else:
                    (folder,) = runs_dir.iterdir()
                    resume(script, folder)

        status = forked(attempt, stderr, kill_after=delay if where == "any time" else None)
        assert status == -signal.SIGKILL, stderr.read_text()
        kills += 1
        inside += where == "half"
        (folder,) = runs_dir.iterdir()
        reached.append(iteration_of(folder))
    assert inside >= 5 and reached == sorted(reached) and 30 < reached[-1] < iterations
    patch = pytest.MonkeyPatch()
    patch.setattr(socket, "gethostname", lambda: f"start{kills:05d}")
    resume(script, folder)
    patch.undo()
    check_same(folder, expected)


@pytest.mark.slow
@both_scripts
def test_killed_around_every_file(script, tmp_path):
    """Before and after each file of a run, the last ones too: it can be resumed, or is finished and complete."""
    flags = ["--checkpoint-interval", "1", "--num-steps", "20", "--eval-interval", "0"]
    expected = train(script, tmp_path / "whole", *flags, iterations=2)
    stderr, write = tmp_path / "stderr", RecordWriter.write
    for nth, where in itertools.product(range(1, 6), ("before", "after")):
        runs_dir = tmp_path / f"{nth}-{where}"

        def attempt(nth=nth, where=where, runs_dir=runs_dir):
            with pytest.MonkeyPatch.context() as patch:
                kill_in_write(patch, script, nth, where)
                # A slow disk, so that points which a checkpoint does not wait for are lost with the process.
                patch.setattr(RecordWriter, "write", lambda *args: (time.sleep(0.01), write(*args)))
                train(script, runs_dir, *flags, iterations=2)

        assert forked(attempt, stderr) == -signal.SIGKILL, stderr.read_text()
        (folder,) = runs_dir.iterdir()
        if (nth, where) == (1, "before"):
            assert not (folder / "checkpoint.pt").exists()  # nothing has happened yet
            continue
        status = forked(lambda folder=folder: resume(script, folder), stderr)
        if status == 2:
            assert "is finished" in stderr.read_text()
        else:
            assert status == 0, stderr.read_text()
        check_same(folder, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped by a signal


@pytest.mark.slow
@both_scripts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_signal_leaves_a_checkpoint_and_a_sentence(script, number, tmp_path):
    flags = flags_of(script, tmp_path / "stopped", ["--eval-interval", "0"], iterations=400)
    process = subprocess.Popen(
        [sys.executable, script.__file__, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("stopped/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    (folder,) = (tmp_path / "stopped").iterdir()
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} after iteration " in error and "Traceback" not in error
    assert error.endswith(f": continue with\npython {script.__name__}.py --resume {folder}\n")
    assert error.count("stopped by") == 1
    assert 0 < (iteration := iteration_of(folder)) < 400
    # The rest would take long: the next 3 iterations stand for it.
    shorter = ["--total-timesteps", str(148 * (iteration + 3))]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["total_timesteps"] = int(shorter[1])
    torch.save(checkpoint, folder / "checkpoint.pt")
    resume(script, folder)
    expected = train(script, tmp_path / "whole", "--eval-interval", "0", iterations=iteration + 3)
    check_same(folder, expected)


def at_evaluation_step(script, patch, at, action):
    """Calls action() in the evaluations' at-th step (the training has 4 environments)."""
    calls, step = itertools.count(), script.MetaEpisodes.step

    def counting_step(self, actions):
        if self.num_envs != 4 and next(calls) == at:
            action()
        return step(self, actions)

    patch.setattr(script.MetaEpisodes, "step", counting_step)


@pytest.mark.slow
@both_scripts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("evaluation", [0, 1, 2, 3])
def test_signal_in_an_evaluation(script, number, evaluation, tmp_path):
    """The run stops at once, with a checkpoint; the evaluation is done again."""
    expected = train(script, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        at_evaluation_step(script, patch, 60 * evaluation + 20, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as stop:
            train(script, tmp_path / "stopped")
    (folder,) = (tmp_path / "stopped").iterdir()
    assert stop.value.code == 128 + number and not (folder / "result.json").exists()
    assert iteration_of(folder) == 2 * evaluation
    resume(script, folder)
    check_same(folder, expected)
    frames = [step for step, _ in json.loads((folder / "result.json").read_text())["eval_history"]]
    assert frames == [0, 2 * 148, 4 * 148, 6 * 148]


@both_scripts
@pytest.mark.parametrize("evaluation", [0, 1])
def test_signal_just_before_an_evaluation(script, evaluation, tmp_path):
    """The evaluation is not begun."""
    set_text, texts = script.tqdm.set_postfix_str, []

    def set_text_and_raise(self, text="", refresh=True):
        texts.append(text)
        if text == "evaluating" and texts.count(text) == evaluation + 1:
            signal.raise_signal(signal.SIGTERM)
        return set_text(self, text, refresh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.tqdm, "set_postfix_str", set_text_and_raise)
        with pytest.raises(SystemExit) as stop:
            train(script, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert stop.value.code == 128 + signal.SIGTERM and iteration_of(folder) == 2 * evaluation
    run = torch.load(folder / "checkpoint.pt", weights_only=True)["run"]
    assert len(run["eval_history"]) == evaluation


@both_scripts
def test_killed_after_an_evaluation(script, tmp_path):
    """The evaluation is done again, and logged once."""
    flags, stderr = ["--checkpoint-interval", "2"], tmp_path / "stderr"
    expected = train(script, tmp_path / "whole", *flags)

    def attempt():
        with pytest.MonkeyPatch.context() as patch:
            at_step(script, patch, 2 * 37 + 10, flush_and_kill)
            train(script, tmp_path / "killed", *flags)

    def flush_and_kill():
        time.sleep(0.2)
        for log in gc.get_objects():
            if isinstance(log, torch.utils.tensorboard.SummaryWriter):
                log.flush()
        kill_me()

    assert forked(attempt, stderr) == -signal.SIGKILL, stderr.read_text()
    (folder,) = (tmp_path / "killed").iterdir()
    assert iteration_of(folder) == 2 and points(folder)["eval/meta_episodic_return"][-1][0] == 2 * 148
    resume(script, folder)
    check_same(folder, expected)


@both_scripts
def test_second_sigterm_changes_nothing(script, tmp_path):
    """The end of a sweep sends several: the run still ends with a checkpoint."""

    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    def attempt():
        with pytest.MonkeyPatch.context() as patch:
            at_step(script, patch, 40, twice)
            train(script, tmp_path / "runs")

    stderr = tmp_path / "stderr"
    assert forked(attempt, stderr) == 128 + signal.SIGTERM, stderr.read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    assert iteration_of(folder) == 2
    assert "stopped by SIGTERM after iteration 2" in stderr.read_text()


@both_scripts
def test_second_signal_stops_at_once(script, tmp_path):
    """Without a checkpoint; the earlier one is there."""
    stderr = tmp_path / "stderr"

    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    def attempt():
        with pytest.MonkeyPatch.context() as patch:
            at_step(script, patch, 40, twice)
            train(script, tmp_path / "runs")

    assert forked(attempt, stderr) == -signal.SIGINT, stderr.read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    assert iteration_of(folder) == 0
    resume(script, folder)


@both_scripts
def test_folder_to_resume_is_not_made(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(script.make_args(resume=str(tmp_path / "missing")))
    assert stop.value.code == 2 and "cannot write to the folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@both_scripts
def test_raised_budget_survives_a_kill(script, tmp_path):
    """Also one before the first checkpoint that would be due."""
    folder = train(script, tmp_path, iterations=3)

    def attempt():
        with pytest.MonkeyPatch.context() as patch:
            at_step(script, patch, 5, kill_me)
            resume(script, folder, "--total-timesteps", str(4 * 37 * ITERATIONS))

    assert forked(attempt, tmp_path / "stderr") == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    assert iteration_of(folder) == 3
    resume(script, folder)
    assert iteration_of(folder) == ITERATIONS


@both_scripts
def test_lost_output_leaves_a_checkpoint(script, tmp_path):
    """As in `python varibad_hyper.py | head -5`."""
    flags = [*flags_of(script, tmp_path, ["--eval-interval", "2"]), "--checkpoint-interval", "1"]
    process = subprocess.Popen(
        [sys.executable, script.__file__, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not process.stdout.readline().startswith("0 frames"):
        pass
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1, error
    assert "Traceback" not in error and "BrokenPipe" not in error
    (folder,) = tmp_path.iterdir()
    assert iteration_of(folder) > 0
    resume(script, folder)


@both_scripts
def test_signal_without_output_leaves_a_checkpoint(script, tmp_path):
    """As after Ctrl-C in `python varibad_hyper.py 2>&1 | tee log`, which ends tee too."""
    flags = [*flags_of(script, tmp_path, ["--eval-interval", "0"]), "--checkpoint-interval", "1000"]
    flags += ["--total-timesteps", "1e6"]
    process = subprocess.Popen(
        [sys.executable, script.__file__, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seen = b""
    while b"training return" not in seen:  # the bar is drawn once a second
        seen += os.read(process.stdout.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait() == 1
    (folder,) = tmp_path.iterdir()
    assert iteration_of(folder) > 0


@both_scripts
def test_hang_up_that_is_ignored_stops_nothing(script, tmp_path):
    """As under nohup."""

    def attempt():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with pytest.MonkeyPatch.context() as patch:
            at_step(script, patch, 40, lambda: signal.raise_signal(signal.SIGHUP))
            train(script, tmp_path / "runs")

    assert forked(attempt, tmp_path / "stderr") == 0, (tmp_path / "stderr").read_text()
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 1


@both_scripts
def test_handlers_are_as_before(script, tmp_path):
    """After a run that ends, is stopped or fails."""

    def handle(number, frame):
        raise AssertionError("no signal was sent")

    def fail():
        raise ZeroDivisionError

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, handle) for number in numbers]
    try:
        train(script, tmp_path / "whole", iterations=1)
        assert [signal.getsignal(number) for number in numbers] == 3 * [handle]
        stop_at(script, 40, tmp_path / "stopped")
        assert [signal.getsignal(number) for number in numbers] == 3 * [handle]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            at_step(script, patch, 40, fail)
            train(script, tmp_path / "failed")
        assert [signal.getsignal(number) for number in numbers] == 3 * [handle]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The disk is full


def check_full_disk(folder, status, error):
    assert status == 1, error
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert "--resume" in error or f"the last good checkpoint is {folder / 'checkpoint.pt'}" in error
    assert not list(folder.glob("*.new"))


def run_script(script, prelude, *flags):
    """The script as its own process, after some lines that spoil its world; exit status and stderr."""
    lines = [prelude, "import runpy, sys", f"sys.path.insert(0, {str(Path(script.__file__).parent)!r})"]
    lines += [f"runpy.run_path({script.__file__!r}, run_name='__main__')"]
    command = [sys.executable, "-c", "\n".join(lines), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stderr


@pytest.mark.slow
@both_scripts
def test_checkpoint_that_does_not_fit(script, tmp_path):
    """A limit on the size of files, which is like a full disk to the checkpoint."""
    flags = ["--checkpoint-interval", "2"]
    expected = train(script, tmp_path / "whole", *flags)
    runs_dir, stderr = tmp_path / "full", tmp_path / "stderr"

    def attempt():
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            at_step(script, patch, 3 * 37, limit)  # in iteration 4: the checkpoint of iteration 2 is written
            train(script, runs_dir, *flags)

    status = forked(attempt, stderr)
    (folder,) = runs_dir.iterdir()
    check_full_disk(folder, status, stderr.read_text())
    assert "checkpoint.pt could not be written" in stderr.read_text()
    assert iteration_of(folder) == 2
    resume(script, folder)
    check_same(folder, expected)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
@both_scripts
def test_disk_that_runs_full(script, tmp_path, small_disk):
    """Every write fails, TensorBoard's also; with room again the run goes on to the same end."""
    flags = ["--checkpoint-interval", "2"]
    expected = train(script, tmp_path / "whole", *flags)
    filler = small_disk / "filler"
    prelude = f"""
import itertools, os
replace, calls = os.replace, itertools.count(1)
def replace_and_fill(source, target):
    replace(source, target)
    if next(calls) == 2:  # the checkpoint of iteration 2
        with open({str(filler)!r}, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:  # there is no room left
                pass
os.replace = replace_and_fill
"""
    status, error = run_script(script, prelude, *flags_of(script, small_disk / "runs", flags))
    (folder,) = (small_disk / "runs").iterdir()
    check_full_disk(folder, status, error)
    assert "No space left" in error
    filler.unlink()
    resume(script, folder)
    check_same(folder, expected)


@pytest.mark.slow
@both_scripts
@pytest.mark.parametrize("name", ["model.pt", "result.json"])
def test_disk_that_is_full_at_the_end(script, name, tmp_path):
    """The last files of a run do not fit: one sentence, and the run can be resumed once they do."""
    expected = train(script, tmp_path / "whole")
    prelude = f"""
import os
fsync = os.fsync
def full(number):
    if "/{name}." in os.readlink(f"/proc/self/fd/{{number}}"):
        raise OSError({errno.ENOSPC}, "No space left on device")
    fsync(number)
os.fsync = full
"""
    status, error = run_script(script, prelude, *flags_of(script, tmp_path / "full", []))
    (folder,) = (tmp_path / "full").iterdir()
    check_full_disk(folder, status, error)
    assert f"{name} could not be written" in error and not (folder / name).exists()
    resume(script, folder)
    check_same(folder, expected)


@pytest.mark.slow
@both_scripts
def test_model_that_does_not_fit(script, tmp_path):
    """torch reports a full disk in its own way."""
    folder = train(script, tmp_path, iterations=1)
    limit = (folder / "model.pt").stat().st_size // 2
    prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    flags = flags_of(script, tmp_path / "full", ["--checkpoint-interval", "0"], iterations=1)
    status, error = run_script(script, prelude, *flags)
    assert status == 1 and error.count("error: ") == 1 and "Traceback" not in error, error


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile files


class Trap:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def damaged_files(whole, trap):
    """Contents by name: what a file may be after an accident, or from a stranger."""
    noise = random.Random(0).randbytes(len(whole))
    contents = {"empty": b"", "noise": noise, "text": b"no file of torch", "trap": pickle.dumps(Trap(trap))}
    for length in (1, 30, 1000, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        contents[f"cut at {length}"] = whole[:length]
    contents["zeros at the end"] = whole[: len(whole) // 2].ljust(len(whole), b"\0")
    for name, value in {
        "trap in a torch file": {"script": Trap(trap), "args": Trap(trap), "agent": Trap(trap)},
        "list": [1, 2],
        "tensor": torch.zeros(3),
        "empty dict": {},
        "unknown argument": {"script": "varibad_hyper", "args": {"bogus": 1}, "agent": {}},
        "arguments of another type": {"script": "varibad_hyper", "args": [1], "agent": {}},
    }.items():
        file = io.BytesIO()
        torch.save(value, file)
        contents[name] = file.getvalue()
    return contents


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory):
    return {
        script: stop_at(script, 3 * 37, tmp_path_factory.mktemp(script.__name__))
        for script in (varibad_hyper, rl2_hyper)
    }


@both_scripts
def test_damaged_checkpoints_are_refused(script, stopped_runs, tmp_path, capsys):
    trap = tmp_path / "code ran"
    for name, content in damaged_files((stopped_runs[script] / "checkpoint.pt").read_bytes(), trap).items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(content)
        refused(script, capsys, ["--resume", str(folder)], "checkpoint.pt")
        assert not trap.exists(), name
        assert contents(folder).items() - {("lock", b"")} == {("checkpoint.pt", content)}


@both_scripts
@pytest.mark.parametrize("where", [0.001, 0.05, 0.3, 0.5, 0.8, 0.999])
def test_flipped_bit_is_refused(script, where, stopped_runs, tmp_path, capsys):
    """In a tensor: the file can be read and has the right shapes, only a value is another one."""
    whole = (stopped_runs[script] / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    flip_bit(tmp_path / "checkpoint.pt", where)
    damaged = (tmp_path / "checkpoint.pt").read_bytes()
    assert sum(byte != other for byte, other in zip(damaged, whole, strict=True)) == 1
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True).keys()  # torch does not mind
    for flags in ["--resume", str(tmp_path)], ["--evaluate", str(tmp_path / "checkpoint.pt"), "--eval-tasks", "2"]:
        refused(script, capsys, flags, f"{tmp_path / 'checkpoint.pt'} is damaged")
    assert contents(tmp_path).items() - {("lock", b"")} == {("checkpoint.pt", damaged)}


@both_scripts
def test_damaged_models_are_refused(script, tmp_path, capsys):
    folder = train(script, tmp_path, iterations=1)
    trap, path = tmp_path / "code ran", tmp_path / "damaged.pt"
    for name, content in damaged_files((folder / "model.pt").read_bytes(), trap).items():
        path.write_bytes(content)
        refused(script, capsys, ["--evaluate", str(path)], "damaged.pt")
        assert not trap.exists(), name


@both_scripts
def test_checkpoint_of_the_other_script_is_refused(script, stopped_runs, capsys):
    other = rl2_hyper if script is varibad_hyper else varibad_hyper
    refused(script, capsys, ["--resume", str(stopped_runs[other])], f"belongs to {other.__name__}.py")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def poison_step(patch, vector_env, at, what, value=math.nan):
    """Makes the at-th step of 4 environments give a number that is not finite for environment 1."""
    calls, step = itertools.count(), vector_env.step

    def poisoned_step(self, actions):
        poisoned = self.num_envs == 4 and next(calls) == at
        if poisoned and what in ("qvel", "qpos"):
            getattr(self.data[1], what)[-1] = value
        obs, rewards, *rest = step(self, actions)
        if poisoned and what == "observation":
            obs[1, 0] = value
        if poisoned and what == "reward":
            rewards[1] = value
        return obs, rewards, *rest

    patch.setattr(vector_env, "step", poisoned_step)


POISONS = [("Grid-World", "observation", math.nan), ("Grid-World", "reward", math.inf)]
POISONS += [("Walker", "reward", math.nan), ("Ant-Dir", "observation", -math.inf)]
POISONS += [(env, "qvel", value) for env in MUJOCO for value in (math.nan, 1e30)]
POISONS += [("Humanoid", "qpos", 1e30), ("Cheetah-Dir", "qpos", math.inf)]


def vector_env_of(script, env):
    return gridworld.GridWorldVectorEnv if env == "Grid-World" else script.MUJOCO_ENVS[env]


@both_scripts
@pytest.mark.parametrize("env, what, value", POISONS)
def test_blow_up_ends_that_episode_and_touches_no_other(script, env, what, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def roll(at):
        with pytest.MonkeyPatch.context() as patch:
            poison_step(patch, vector_env_of(script, env), at, what, value)
            envs = script.make_envs(script.parse_args(["--env", env]), 4)
            first, rng = envs.reset(seed=3), np.random.default_rng(0)
            shape = (4,) if envs.discrete else (4, envs.action_dim)
            draw = (lambda: rng.integers(5, size=shape)) if envs.discrete else (lambda: rng.uniform(-1, 1, shape))
            return envs, first, [envs.step(draw()) for _ in range(12)]

    envs, first, steps = roll(5)
    healthy_envs, _, healthy = roll(None)
    assert envs.blow_ups == 1 and healthy_envs.blow_ups == 0
    before, poisoned = steps[4].policy_obs, steps[5]  # what the policy acted on, and what came of it
    size = before.shape[1] - envs.has_flag
    np.testing.assert_array_equal(poisoned.next_obs[1, :size], before[1, :size])  # it ended where it stood
    assert poisoned.rewards[1] == 0 and not poisoned.time_limit[1]
    assert poisoned.next_obs[1, -1] == 1 if envs.has_flag else poisoned.dones[1]
    assert envs.envs.elapsed[1] == 12 - 6  # a new episode
    assert all(np.isfinite(part).all() for step in steps for part in step)
    assert not np.array_equal(poisoned.policy_obs[1], before[1]) or env == "Grid-World"
    for poisoned_step, healthy_step in zip(steps, healthy, strict=True):
        for part, healthy_part in zip(poisoned_step, healthy_step, strict=True):
            np.testing.assert_array_equal(np.delete(part, 1, axis=0), np.delete(healthy_part, 1, axis=0))
    assert not list(tmp_path.glob("MUJOCO_LOG.TXT"))


@both_scripts
@pytest.mark.parametrize(
    "env, what, value", [("Grid-World", "observation", math.nan), ("Grid-World", "reward", math.nan)] + POISONS[-3:]
)
def test_run_counts_blow_ups_and_stays_finite(script, env, what, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    poison_step(monkeypatch, vector_env_of(script, env), 50, what, value)
    folder = train(script, tmp_path / "runs", "--env", env, "--num-steps", "37", iterations=4)
    assert json.loads((folder / "result.json").read_text())["blow_ups"] == 1
    assert [value for _, value in points(folder)["charts/blow_ups"]] == [0, 1, 1, 1]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    tensors = checkpoint["agent"] | {name: checkpoint["envs"][name] for name in script.MetaEpisodes.SAVED}
    if script is varibad_hyper:
        tensors |= {name: checkpoint["buffer"][name] for name in ("finished", "running")}
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    assert not list(tmp_path.glob("MUJOCO_LOG.TXT"))


@both_scripts
def test_loss_that_is_not_finite_leaves_the_last_good_checkpoint(script, tmp_path, monkeypatch, capsys):
    expected = train(script, tmp_path / "whole", "--checkpoint-interval", "2")
    loss, calls = script.policy_loss, itertools.count(1)
    bad = range(4 * 4 + 1, 10**6)  # 2 epochs x 2 minibatches from iteration 2 on: iteration 6 is the first bad one
    with monkeypatch.context() as patch:
        patch.setattr(script, "policy_loss", lambda *inputs: loss(*inputs) * (math.nan if next(calls) in bad else 1))
        with pytest.raises(SystemExit) as stop:
            train(script, tmp_path / "nan", "--checkpoint-interval", "2")
    (folder,) = (tmp_path / "nan").iterdir()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "losses/policy_loss is not finite: the run was stopped after iteration 5" in error
    assert f"the last good checkpoint is {folder / 'checkpoint.pt'}" in error
    assert iteration_of(folder) == 4
    resume(script, folder)
    check_same(folder, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@both_scripts
def test_runs_that_begin_together_do_not_share_a_folder(script, tmp_path, monkeypatch):
    """Processes that start the same run in the same second: one has the folder, the others end with a sentence."""
    start = float(int(time.time()))
    monkeypatch.setattr(script.time, "time", lambda: start)
    folder = tmp_path / "runs" / f"Grid-World__{script.__name__}__hyper-bias__1__{int(start)}"
    read, write = os.pipe()
    children = []
    for number in range(8):

        def begin(number=number):
            os.close(write)
            os.read(read, 1)  # wait for the start
            train(script, tmp_path / "runs", iterations=1)

        children.append(forked(begin, tmp_path / f"stderr{number}", wait=False))
    os.close(write)  # now, all of them
    os.close(read)
    assert sorted(wait() for wait in children) == [0, *(7 * [2])]
    assert list((tmp_path / "runs").iterdir()) == [folder]
    errors = [error for number in range(8) if "error" in (error := (tmp_path / f"stderr{number}").read_text())]
    assert errors == 7 * [
        f"error: cannot write to the folder {folder} (File exists): choose another --runs-dir, or try again.\n"
    ]
    before = contents(folder)
    assert {"checkpoint.pt", "model.pt", "result.json"} < before.keys()
    assert forked(lambda: train(script, tmp_path / "runs", iterations=1), tmp_path / "stderr") == 2
    assert contents(folder) == before
    assert forked(lambda: train(script, tmp_path / "runs", "--exp-name", "other", iterations=1)) == 0
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2
