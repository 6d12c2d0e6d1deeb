"""What the progress line and metrics.jsonl say."""

import json

import torch

from pretrain.engine.journal import truncate
from pretrain.engine.monitor import Config, Monitor, Speed, clock


def test_speaks_first_regularly_and_last(tmp_path, capsys):
    made = Monitor(Config(log_every=5, tensorboard=True), tmp_path, steps=12, start=0, batch_size=32, device=CPU)
    for step in range(1, 13):
        made.record(step, seconds=0.5, data_wait=0.125, scalars={"loss": 1 / step, "lr": 0.1})
    made.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5, 10, 12]
    assert lines[1]["samples"] == 160 and lines[1]["samples_per_s"] == 64 and lines[1]["data_wait"] == 0.125
    said = capsys.readouterr().err.splitlines()
    memory = f"{lines[1]['memory']:.2f} GiB"
    assert said[1] == f"step 5/12  loss 0.2000  lr 0.1  64.0 samples/s  data wait 25 %  {memory}  ETA 0:04"
    assert said[-1] in (tmp_path / "log.txt").read_text()
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate(tmp_path / "none.jsonl", 2)


def test_clock():
    assert [clock(s) for s in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]


def test_share_of_the_peak_and_time_to_the_next_checkpoint(tmp_path, capsys):
    speed = Speed(flops=2e9, peak=1e12)
    options = {"start": 0, "batch_size": 32, "device": CPU, "speed": speed, "save_every": 4}
    made = Monitor(Config(log_every=1, tensorboard=False), tmp_path, steps=9, **options)
    for step in (1, 2, 9):
        made.record(step, seconds=2.0, data_wait=0.0, scalars={"loss": 1.0, "lr": 0.1})
    made.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["mfu"] == 2e9 * 16 / 1e12 and lines[1]["tflops_per_device"] == 0.032
    assert [(line["to_checkpoint"], line["eta"]) for line in lines] == [(6, 16), (4, 14), (0, 0)]
    assert lines[0]["rss"] > 0.05
    assert "16.0 samples/s  MFU 3.2 %  data wait 0 %" in (said := capsys.readouterr().err)
    assert "save in 0:06  ETA 0:16" in said


CPU = torch.device("cpu")
