"""The race of trainers: its pairs, what it reads from both logs, its clocks, and the page that it writes."""

import json
import time

import pytest
import torch
from torch import nn

from pretrain.data import index
from tests.benchmarks import pairs, train
from tests.benchmarks.stages import Stages
from tests.benchmarks.trainers import Lap, Task, read_open_clip, read_ours

LOG = (
    "Train Epoch: 0 [ 32/96 (33%)] Data (t): {0:.3f} Batch (t): 2.000, {1:#g}/s, 8.00000/s/gpu "
    "LR: 0.000100 Logit Scale: 14.286 Contrastive_loss: {2:.4f} (3.4000) Loss: {2:.4f} (3.4000)\n"
)  # fmt: skip


def test_pairs_have_captions_of_the_promised_length_and_copies(tmp_path):
    pattern = pairs.write_photographs(tmp_path / "pairs", 16, width=32, height=24, copies=2)
    assert len(index.expand(pattern)) == 2 * pairs.SHARDS
    assert sum(index.resolve(pattern).sizes) == 2 * 16
    words = [len(caption.split()) for caption in pairs.captions(pattern)]
    assert len(words) == 16
    assert pairs.LEAST <= min(words) < max(words) <= pairs.MOST


def test_both_logs_are_read(tmp_path):
    (tmp_path / "out.log").write_text(
        "Start epoch 0\n" + "".join(LOG.format(0.1 * i, 10.0 + i, 4 - i) for i in range(4))
    )
    theirs = read_open_clip(tmp_path)
    assert theirs.rates == [12.0, 13.0]
    assert theirs.waits == [0.2, 0.3]
    assert theirs.losses == [4.0, 3.0, 2.0, 1.0]
    steps = [
        {"samples_per_s": 20.0 + i, "data_wait": 0.5, "loss": 4.0, "memory": 1.5, "step_time": 2.0, "time": 2.5 * i}
        for i in range(4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    ours = read_ours(tmp_path)
    assert ours.rate == 22.5
    assert (ours.memory, ours.stall) == (1.5, 0.5)


def test_commands_agree_on_what_is_trained(tmp_path):
    task = Task(config="c.yaml", overrides=(), shards="s.tar", start=tmp_path, batch=32, steps=4, lr=1e-3)
    ours, theirs = task.ours(tmp_path / "run"), task.open_clip("python", tmp_path / "run", context=20)
    assert "train.batch_size=32" in ours
    assert theirs[theirs.index("--batch-size") + 1] == "16"
    assert theirs[theirs.index("--train-num-samples") + 1] == "128"
    assert theirs[theirs.index("--force-context-length") + 1] == "20"


def test_the_stages_of_a_step_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)  # the clocks replace it: put it back
    monkeypatch.setenv("RANK", "0")
    stages = Stages(tmp_path / "stages.json")
    stages.backward()
    image, text = nn.Linear(4, 4), nn.Linear(4, 4)
    image.forward = stages.tower("image", image.forward, lambda out: out)
    text.forward = stages.tower("text", text.forward, lambda out: out)
    began = time.perf_counter()
    for batch in stages.data(iter(torch.randn(5, 8, 4))):
        (image(batch) @ text(batch).T).logsumexp(1).mean().backward()
        time.sleep(0.01)  # the optimizer
    found = json.loads((tmp_path / "stages.json").read_text())
    assert set(found) == {"data", "image", "text", "loss", "optimizer", "rest"}
    assert found["optimizer"] >= 0.01
    assert sum(sum(step.values()) for step in stages.steps) <= time.perf_counter() - began
    assert len(stages.steps) == 5


def test_a_table_compares_with_the_first(tmp_path):
    laps = {
        "open_clip": [Lap([10.0, 10.0], [0.1], [])] * 2,
        "diptych": [Lap([15.0], [0.1], []), Lap([25.0], [0.1], [])],
    }
    rows = train.table(laps, None)
    assert rows == [
        "| open_clip | 10.0 | 10.0, 10.0 | 1.00 | 0.100 |",
        "| diptych | 20.0 | 15.0, 25.0 | 2.00 | 0.100 |",
    ]


@pytest.mark.parametrize("order", [["vit_b32", "icons"], ["icons", "vit_b32"]])
def test_a_case_that_is_measured_again_leaves_the_others_as_they_are(tmp_path, order):
    page = tmp_path / "train.md"
    for name in order:
        train.write_case(page, name, list(train.CPU), [f"## {train.TITLES[name]}", "", "first"])
    train.write_case(page, "icons", list(train.CPU), [f"## {train.TITLES['icons']}", "", "second"])
    _, vit, icons = page.read_text().split("\n## ")
    assert (vit.split(), icons.split()) == (["ViT-B/32", "first"], ["the", "demo's", "towers", "second"])
