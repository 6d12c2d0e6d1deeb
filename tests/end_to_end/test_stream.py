"""A whole run on three foreign shards, two ranks of two workers: equal steps, what breaks is listed, it goes on."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.data import format, synthetic
from tests import tiny
from tests.end_to_end.jobs import losses, pretrain
from tests.foreign_server import serve


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole config, and three foreign shards beside it."""
    file = tiny.config_file(tmp_path_factory.mktemp("stream"))
    synthetic.write(file.parent / "foreign", shards=3, samples=16, size=32, seed=1)
    return file


def test_two_ranks_train_on_three_foreign_shards(ranks, config: Path) -> None:
    with serve(config.parent / "foreign") as server:
        broken = "shapes-00002.tar"
        server.no_length.add(broken)  # the end of the connection is the end of the body
        server.cut[broken] = format.read_index(server.folder / broken)[9].members["png"][0] + 5
        words = (
            f"data.shards={server.url}/shapes-{{00000..00002}}.tar",
            "data.order=stream", "data.workers=2", "data.buffer=16", "data.max_bad_fraction=0.5",
            "train.steps=8", "checkpoint.every_steps=4", "checkpoint.keep_last=9", "evals={}",
        )  # fmt: skip
        assert ranks.run(2, pretrain, config, *words, "run.name=foreign") == [0, 0]
        run = config.parent / "runs" / "foreign"
        before = losses(run)
        lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
        assert {(line["shard"], line["key"]) for line in lines} == {(f"{server.url}/{broken}", "00000041")}
        assert all("cut off at byte" in line["reason"] for line in lines)

        shutil.rmtree(run / "checkpoints" / "step-00000008")  # as if killed between step 4 and step 8
        (run / "checkpoints" / "latest").write_text("step-00000004\n")
        state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
        assert state["data"]["batch"] == 4 and 2 <= state["data"]["shard"] <= 6  # 64 samples, 16 a shard
        assert ranks.run(2, pretrain, config, *words, "run.name=foreign") == [0, 0]
        after = losses(run)
        assert after.keys() == before.keys() == set(range(1, 9))
        assert [before[step] == after[step] for step in range(1, 9)] == 4 * [True] + 4 * [False], "other samples follow"
