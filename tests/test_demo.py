"""The main job: its data, its metrics, its files, and what it says when something is missing."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import torch.nn.functional as F

from torch_pathloss import __main__ as command
from torch_pathloss.demo import _data, _draw, _model, _train


def run(*arguments, **options):
    command = [sys.executable, "-m", "torch_pathloss", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def assert_complete(out: pathlib.Path, epochs: int):
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["epochs"]) == epochs
    for name in ("curves.png", "predictions.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(out.glob("events.out.tfevents.*"))) == 1
    return metrics


def test_the_split_holds_out_digits_and_the_seed_decides():
    trained, held_out = _data.load(seed=0)
    assert len(trained.labels) + len(held_out.labels) == 1797
    both = torch.cat([trained.images, held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(_data.load(seed=1)[0].images) + len(_data.load(seed=1)[1].images)
    assert torch.equal(_data.load(seed=0)[1].images, held_out.images)
    assert not torch.equal(_data.load(seed=1)[1].images, held_out.images)


def test_placing_is_decided_by_the_seed():
    digits = _data.load(seed=0)[1]
    first, again, other = (_data.place(digits, 1, seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.target["detection"]["bbox"], again.target["detection"]["bbox"])
    assert not torch.equal(first.images, other.images)


def test_boxes_are_tight_around_the_ink():
    ink = torch.zeros(3, 10, 20)
    ink[0, 2:5, 4:10] = 1.0
    ink[1, 9, 19] = 1.0
    expected = [[0.2, 0.2, 0.5, 0.5], [0.95, 0.9, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(_data.boxes_of(ink), torch.tensor(expected))


def test_empty_canvases_have_no_class_and_no_confidence():
    target = _data.place(_data.load(seed=0)[1], copies=2, seed=0).target
    empty = target["detection"]["confidence"] == 0
    assert 0.05 < empty.float().mean() < 0.15
    assert (target["classification"][empty] == _data.IGNORED).all()
    assert (target["detection"]["bbox"][empty] == 0).all()
    assert (target["classification"][~empty] >= 0).all()


def test_iou_is_that_of_boxes_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    others = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0]])
    # intersection 1, union 4 + 4 - 1; the same box; no overlap
    torch.testing.assert_close(_model.iou(boxes, others), torch.tensor([1 / 7, 1.0, 0.0]))


def test_boxes_of_empty_canvases_do_not_count():
    criterion, model = _model.make_criterion(), _model.Detector().eval()
    images, target = _data.place(_data.load(seed=0)[1], copies=1, seed=0, empty=0.5).batch(torch.arange(32))
    output = model(images)
    empty = target["detection"]["confidence"] == 0
    assert empty.any()
    boxes, true = output["detection"]["bbox"], target["detection"]["bbox"]
    by_hand = {
        "detection": 1 - _model.iou(boxes[~empty], true[~empty]).mean(),
        "detection.bbox": F.smooth_l1_loss(boxes[~empty], true[~empty], beta=0.1),
    }
    true[empty] = torch.nan
    values = criterion.terms(output, target)
    for name, expected in by_hand.items():
        torch.testing.assert_close(values[name], expected)
    (gradient,) = torch.autograd.grad(values["detection"] + values["detection.bbox"], boxes)
    assert (gradient[empty] == 0).all()
    assert (gradient[~empty] != 0).any(1).all()


def test_means_leave_out_absent_terms():
    means = _train.Means()
    means.add({"a": 1.0, "b": float("nan")})
    means.add({"a": 3.0, "b": 5.0})
    assert means.take() == {"a": 2.0, "b": 5.0}
    assert means.take() == {}


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("rich", "lightning") else object())
    assert command.main(["--engine", "lightning"]) == 1
    assert capsys.readouterr().err == ("rich, lightning not found. Run: pip install 'torch-pathloss[demo,lightning]'\n")


def test_bad_arguments_say_what_is_wrong(tmp_path, capsys):
    assert command.main(["--device", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("The device 'nowhere' cannot be used: ")
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err == f"Cannot write to --out {tmp_path}/file/x: Not a directory\n"
    with pytest.raises(SystemExit):
        command.main(["--epochs", "0"])
    assert "must be at least 1, not 0" in capsys.readouterr().err


def test_a_run_does_not_pass_off_the_pictures_of_an_earlier_one(tmp_path):
    (tmp_path / "curves.png").touch()
    _train.History(_train.Settings(out=tmp_path)).write({}, True, {})
    assert (tmp_path / "curves.png").exists()  # not known to be ours
    _train.History(_train.Settings(out=tmp_path))
    assert not (tmp_path / "curves.png").exists()


def test_an_interrupt_outside_of_the_training_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(needed):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "missing_extras", interrupted)
    assert command.main([]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_curves_show_every_term_and_metric_over_whole_epochs_and_a_single_point():
    epochs = [
        _train.Epoch(number, {"total": 1.0, "terms/a": 2.0, "weights/a": 1.0}, {"mean_iou": 0.5})
        for number in (1, 2, 3)
    ]
    for shown in (epochs, epochs[:1]):
        total, term, metrics = _draw.curves(shown).axes[:3]
        assert [axis.get_title() for axis in (total, term, metrics)] == ["total", "a", "validation"]
        assert metrics.get_legend().get_texts()[0].get_text() == "mean IoU"
        assert all(tick == int(tick) for tick in term.get_xticks())
        (line,) = term.lines
        assert list(line.get_ydata()) == [2.0] * len(shown)
        assert (line.get_marker() == "o") == (len(shown) == 1)


def test_a_short_run_writes_every_file_and_the_same_seed_gives_the_same(tmp_path):
    found = []
    for name in "ab":
        done = run("--epochs", 1, "--digits", 128, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "├── classification  (64, 10)" in done.stdout
        assert "epoch  1/1  total " in done.stdout
        found.append(assert_complete(tmp_path / name, epochs=1))
    assert found[0]["epochs"] == found[1]["epochs"]
    assert found[0]["interrupted"] is False


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["raw", "lightning"])
def test_ctrl_c_keeps_what_was_reached(tmp_path, engine):
    arguments = ["--epochs", "200", "--digits", "128", "--engine", engine, "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "torch_pathloss", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch  2/200"):
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "What was reached:" in rest
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["interrupted"] is True
    assert len(metrics["epochs"]) >= 2
    assert_complete(tmp_path, epochs=len(metrics["epochs"]))


@pytest.mark.slow
def test_lightning_trains_as_the_raw_loop_does(tmp_path):
    found = {}
    for engine in ("raw", "lightning"):
        done = run("--epochs", 2, "--digits", 256, "--engine", engine, "--out", tmp_path / engine, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found[engine] = assert_complete(tmp_path / engine, epochs=2)["epochs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lightning", "raw"]  # no stray logs
    for raw, lightning in zip(found["raw"], found["lightning"], strict=True):
        assert lightning["terms"] == pytest.approx(raw["terms"], rel=1e-3)


@pytest.mark.slow
def test_compiled_it_trains_too(tmp_path):
    done = run("--epochs", 1, "--digits", 64, "--compile", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path, epochs=1)


@pytest.mark.slow
def test_a_full_run_finds_and_reads_held_out_digits(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = assert_complete(tmp_path, epochs=16)
    assert metrics["accuracy"] >= 0.95
    assert metrics["mean_iou"] >= 0.6


def fetched(address: str):
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_profiles_open_in_tensorboard(tmp_path):
    done = run("profile", "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    variants = ["by hand", "eager", "compiled", "criterion.backward"]
    assert [name for name in variants if name in done.stdout] == variants
    counts = json.loads((tmp_path / "profile.json").read_text())
    assert counts["compiled"]["operations"] < counts["by hand"]["operations"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs, end = [], time.monotonic() + 90
    plugin = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler"
    try:
        while len(runs) < 4 and time.monotonic() < end:
            time.sleep(1)
            try:
                runs = fetched(f"{plugin}/runs")["runs"]
            except OSError:  # not up yet
                continue
        assert sorted(runs) == ["by_hand", "compiled", "criterion_backward", "eager"]
        assert fetched(f"{plugin}/views?run=eager") == ["Overview", "Operator", "Trace"]
        (worker,) = fetched(f"{plugin}/workers?run=eager&view=Operator")
        (span,) = fetched(f"{plugin}/spans?run=eager&worker={worker}")
        table = fetched(f"{plugin}/operation/table?run=eager&worker={worker}&span={span}&group_by=Operation")
        assert any(row["name"] == "aten::smooth_l1_loss" for row in table["data"])
    finally:
        server.terminate()
        server.wait(timeout=30)
