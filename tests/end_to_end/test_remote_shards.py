"""A whole run whose shards come by URL trains and scores as the run from the disk, through a server that misbehaves."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.end_to_end.jobs import losses, pretrain
from tests.faults import serving


def scores(run: Path) -> dict[str, float]:
    lines = (run / "evals.jsonl").read_text().splitlines()
    return {line["name"]: line["value"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_two_ranks_train_and_score_alike(ranks, tmp_path: Path) -> None:
    config = tiny.config_file(tmp_path)
    ranks.run(2, pretrain, config, "run.name=disk", "data.workers=1")
    with serving(tmp_path) as server:
        for fault in ("503", "drop", "garble"):
            server.spoil(fault, path="00000.tar")
        shards, cache = f"{server.url}/shapes-{{00000..00001}}.tar", tmp_path / "cache"
        words = [f"data.shards={shards}", f"data.cache_dir={cache}"]
        for name in ("zero_shot", "retrieval"):
            words += [f"evals.{name}.data={shards}", f"evals.{name}.cache_dir={cache}"]
        ranks.run(2, pretrain, config, "run.name=web", "data.workers=1", *words)
        assert len(server.gets("00001.tar")) == 1, "two ranks, their workers and their evals download a shard once"
    disk, web = tmp_path / "runs" / "disk", tmp_path / "runs" / "web"
    assert losses(web) == losses(disk) and len(losses(web)) == 4
    assert scores(web) == scores(disk)
