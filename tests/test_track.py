"""--track, in Weights & Biases' offline mode."""

import json
import signal
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rl2_hyper
import varibad_hyper

ROOT = Path(varibad_hyper.__file__).parent
needs_wandb = pytest.mark.skipif(
    find_spec("wandb") is None, reason="Weights & Biases is not installed (requirements-optional.txt)"
)


def read_records(data):
    """The records of a .wandb file: after 7 bytes LevelDB's log format, blocks of 32 KiB with split records."""
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # no room for a header
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(folder):
    """{(tag, global_step): value} and the id, from the offline files that `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2

    points, ids = {}, set()
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for data in read_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            points |= {(tag, row["global_step"]): value for tag, value in row.items() if "/" in tag}
    return points, ids


@needs_wandb
@pytest.mark.slow
@pytest.mark.parametrize("script", ["varibad_hyper", "rl2_hyper"])
def test_tracked_run_sends_what_tensorboard_has_and_learns_the_same(script, tmp_path, monkeypatch):
    """Stopped by a signal and resumed, too."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = [sys.executable, str(ROOT / f"{script}.py"), "--total-timesteps", "48000", "--runs-dir"]
    process = subprocess.Popen([*command, str(tmp_path / "tracked"), "--track"], stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("tracked/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "tracked").iterdir()
    resumed = [sys.executable, str(ROOT / f"{script}.py"), "--resume", str(folder)]
    subprocess.run(resumed, check=True, stdout=subprocess.DEVNULL, timeout=120)

    points, ids = history(folder)
    assert ids == {folder.name}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    logged = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert len(logged) > 300 and ("eval/meta_episodic_return", 0) in logged
    assert {key: points.get(key) for key in logged} == pytest.approx(logged)

    subprocess.run([*command, str(tmp_path / "plain")], check=True, stdout=subprocess.DEVNULL, timeout=120)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/result.json")]
    assert results[0]["evaluation"] == results[1]["evaluation"]
    assert {result["args"]["track"] for result in results} == {True, False}


@pytest.mark.parametrize("script", [varibad_hyper, rl2_hyper])
def test_without_weights_and_biases_it_is_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        script.main(script.parse_args(["--track"]))
    assert exit_.value.code == 2
    assert "--track needs Weights & Biases: pip install -r requirements-optional.txt" in capsys.readouterr().err


@needs_wandb
def test_not_logged_in_is_one_sentence(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    flags = ["--track", "--total-timesteps", "9600", "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, ROOT / "rl2_hyper.py", *flags], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "set WANDB_MODE=offline, or leave --track out." in done.stderr
