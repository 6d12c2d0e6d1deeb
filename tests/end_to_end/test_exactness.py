"""What real ranks under the trainer were shown: every sample once an epoch; a bad one is replaced, nothing moves."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from pretrain.data import synthetic
from pretrain.data.format import ShardWriter
from pretrain.dist import hash64
from tests import tiny
from tests.end_to_end.jobs import losses, pretrain, pretrain_and_tell
from tests.ranks import RankError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.config_file(tmp_path_factory.mktemp("exactness"))


def shards(folder: Path, counts: list[int], bad: int = -1) -> str:
    """Write shards of so many samples in all, sample `bad` without a usable picture, and return their pattern."""
    folder.mkdir()
    members = [synthetic.sample(index, size=32, seed=2) for index in range(48)]
    number = 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"part-{shard}.tar") as writer:
            for _ in range(count):
                spoiled = {"png": b"<html>404"} if number == bad else {}
                writer.add(f"{number:06d}", {**members[number % 48], **spoiled})
                number += 1
    return f"{folder}/part-{{0..{len(counts) - 1}}}.tar"


def test_three_shards_on_two_ranks_with_two_workers(ranks, config, tmp_path):
    counts = [13, 22, 17]
    words = (
        f"data.shards={shards(tmp_path / 'three', counts)}",
        "data.workers=2",
        "train.epochs=3",
        "train.steps=null",
        "evals={}",
    )
    told = ranks.run(2, pretrain_and_tell, config, "run.name=three", *words)
    assert [len(steps) for steps in told] == [10, 10]  # 156 of 160 rows
    drawn = Counter(draw for steps in told for batch in steps for _, draw in batch)
    assert set(drawn.values()) == {1}
    for epoch in range(3):
        for number in range(52):
            shard = (number >= 13) + (number >= 35)
            assert hash64(3, epoch, f"part-{shard}.tar", f"{number:06d}") in drawn


def test_one_bad_sample_in_a_thousand(ranks, config, tmp_path):
    told = []
    for name, bad in (("clean", -1), ("spoiled", 613)):
        where = shards(tmp_path / name, [400, 350, 250], bad)
        words = (
            f"data.shards={where}",
            "data.workers=2",
            "train.epochs=1",
            "train.steps=null",
            "train.batch_size=100",
            "evals={}",
        )
        slices = ranks.run(2, pretrain_and_tell, config, f"run.name={name}", *words)
        told.append([row for parts in zip(*slices) for part in parts for row in part])
    clean, spoiled = told
    assert sorted(int(key) for key, _ in clean) == list(range(1000))
    moved = [(old[0], new[0]) for old, new in zip(clean, spoiled, strict=True) if old != new]
    assert [old for old, _ in moved] == ["000613"] and moved[0][1] in {key for key, _ in clean}
    [line] = map(json.loads, (config.parent / "runs" / "spoiled" / "quarantine.jsonl").read_text().splitlines())
    assert (line["epoch"], line["key"]) == ("0", "000613") and "decoded" in line["reason"]
    assert not (config.parent / "runs" / "clean" / "quarantine.jsonl").exists()


def test_a_batch_that_is_left_out_makes_room_for_the_next(ranks, config):
    told = []
    for words in (("run.name=all", "train.steps=5"), ("run.name=less", "faults.leave_out=[1,3]", "train.steps=3")):
        told.append(ranks.run(1, pretrain_and_tell, config, "data.workers=1", "evals={}", *words)[0])
    assert told[1] == [told[0][0], told[0][2], told[0][4]]
    with pytest.raises(RankError, match=r"faults.leave_out: batches of data.order=stream have no numbers"):
        ranks.run(1, pretrain_and_tell, config, "run.name=stream", "data.order=stream", "faults.leave_out=[1]")
    # what a stream's run has skipped by itself does not stop it later
    run = config.parent / "runs" / "stream-goes-on"
    run.mkdir()
    (run / "faults.jsonl").write_text(json.dumps({"step": 1, "left_out": [1], "back_to": None}) + "\n")
    ranks.run(1, pretrain, config, "run.name=stream-goes-on", "data.order=stream", "train.steps=2", "evals={}")
    assert losses(run).keys() == {1, 2}


def test_a_blend_goes_on_where_it_stopped(ranks, config, tmp_path):
    one, two = shards(tmp_path / "one", [9, 14]), shards(tmp_path / "two", [11])

    def words(name: str, steps: int, weight: int = 2) -> tuple[str, ...]:
        blend = f"data.blend=[{{shards: '{one}', weight: {weight}}}, {{shards: '{two}', weight: 1}}]"
        return f"run.name={name}", "data.shards=[]", blend, f"train.steps={steps}", "evals={}"

    def told(world: int, *said: str) -> list[list[tuple[str, int]]]:
        slices = ranks.run(world, pretrain_and_tell, config, *said)
        return [list(itertools.chain(*parts)) for parts in zip(*slices)]

    whole = told(1, *words("blend-whole", 8))
    assert told(2, *words("blend", 4)) == whole[:4]
    assert told(1, *words("blend", 8), "data.workers=1") == whole[4:]
    with pytest.raises(RankError, match=r"order.blend.counts was \[6667, 3333\] in .* and is \[7500, 2500\] now"):
        ranks.run(1, pretrain_and_tell, config, *words("blend", 9, weight=3))
