"""Checkpoints: any stage and world to any other, bit-equal where nothing changes, complete or invisible."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.engine import checkpoint, zero
from pretrain.engine.checkpoint import CheckpointError, Checkpoints
from pretrain.engine.run_folder import RunFolder, StaleRunError
from tests.pretrain.engine.test_zero import engine, train

AT_ONCE = checkpoint.Config(**{"async": False})
PRINT = {"order": {"seed": 0}, "architecture": {"width": 7}}


def state(step: int) -> dict:
    return {"step": step, "data": {"position": step}, "fingerprint": PRINT}


def claimed(path: str) -> RunFolder:
    folder = RunFolder(path)
    folder.claim()
    return folder


def save_and_go_on(root: str, stage: int, *, precision: str = "fp32") -> list[float]:
    """Two steps, a save, three more and another save: the uninterrupted run."""
    made, folder = engine(stage, precision), claimed(root)
    saver = Checkpoints(folder, checkpoint.Config())
    try:
        saver.save(made, state(0))
        train(made, 0, 2)
        saver.save(made, state(2))
        losses = train(made, 2, 5)
        saver.save(made, state(5))
        saver.wait()
        return losses
    finally:
        made.close()


def resume(root: str, stage: int, first: int, out: str, *, precision: str = "fp32") -> list[float]:
    """Another process, built from another seed, continues and saves into `out`."""
    made, folder = engine(stage, precision, seed=1), claimed(out)
    source = f"{root}/checkpoints/step-{first:08d}"
    try:
        found = Checkpoints(folder, checkpoint.Config(resume=source)).restore(made, fingerprint=PRINT)
        assert found is not None and found["data"] == {"position": first}
        losses = train(made, first, 5)
        Checkpoints(folder, AT_ONCE).save(made, state(5))
        return losses
    finally:
        made.close()


def same_bits(a: Path, b: Path) -> bool:
    left, right = (checkpoint.read_weights(p / "checkpoints/step-00000005") for p in (a, b))
    assert left.keys() == right.keys() and {"frozen.weight", "scale", "seen"} <= left.keys()
    return all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_equal(ranks, tmp_path, stage, first):
    losses = ranks.run(2, save_and_go_on, str(tmp_path / "a"), stage)
    resumed = ranks.run(2, resume, str(tmp_path / "a"), stage, first, str(tmp_path / "b"))
    assert [r[-3:] for r in resumed] == losses
    assert same_bits(tmp_path / "a", tmp_path / "b")


CHANGES = [((1, 2), (3, 2)), ((3, 2), (1, 1)), ((2, 2), (0, 1)), ((0, 1), (3, 2)), ((3, 1), (2, 2))]
PLACES = [(stage, world) for stage in range(4) for world in (1, 2, 4)]


def same_end(a: Path, b: Path) -> None:
    left, right = (checkpoint.read_weights(p / "checkpoints/step-00000005") for p in (a, b))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_resume_on_another_stage_and_world(ranks, tmp_path, before, after):
    losses = ranks.run(before[1], save_and_go_on, str(tmp_path / "a"), before[0])[0]
    resumed = ranks.run(after[1], resume, str(tmp_path / "a"), after[0], 2, str(tmp_path / "b"))[0]
    assert resumed == pytest.approx(losses, rel=1e-5)
    same_end(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def everywhere(ranks, tmp_path_factory) -> dict[Path, list[float]]:
    """Runs at every stage on every number of ranks, that saved after two steps and went on: folder -> losses."""
    root = tmp_path_factory.mktemp("everywhere")
    folders = {(stage, world): root / f"stage{stage}-world{world}" for stage, world in PLACES}
    return {
        folder: ranks.run(world, save_and_go_on, str(folder), stage)[0] for (stage, world), folder in folders.items()
    }


def resume_each(roots: list[str], stage: int, out: str) -> list[list[float]]:
    """Continue runs after two steps, one after the other, in an engine that still holds the end of the one before."""
    made = engine(stage, seed=1)
    losses = []
    try:
        for root in roots:
            folder = claimed(f"{out}/{Path(root).name}")
            source = f"{root}/checkpoints/step-00000002"
            assert Checkpoints(folder, checkpoint.Config(resume=source)).restore(made, fingerprint=PRINT)
            losses.append(train(made, 2, 5))
            Checkpoints(folder, AT_ONCE).save(made, state(5))
        return losses
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), PLACES)
def test_resume_from_every_stage_and_world_to_every_other(ranks, tmp_path, everywhere, stage, world):
    resumed = ranks.run(world, resume_each, [str(root) for root in everywhere], stage, str(tmp_path))[0]
    for (root, losses), again in zip(everywhere.items(), resumed, strict=True):
        assert again == pytest.approx(losses, rel=1e-5), root.name
        same_end(root, tmp_path / root.name)


def test_parts_are_spread_over_ranks(ranks, tmp_path):
    for stage in (0, 1, 3):
        ranks.run(2, save_and_go_on, str(tmp_path / str(stage)), stage)
        sizes = [p.stat().st_size for p in (tmp_path / str(stage)).glob("checkpoints/step-00000005/part-*")]
        assert len(sizes) == 2 and min(sizes) > 0.35 * max(sizes), (stage, sizes)


def saves(root: str, steps: list[int], keep: int, **more: int) -> None:
    made, folder = engine(1), claimed(root)
    try:
        for step in steps:
            Checkpoints(folder, checkpoint.Config(keep_last=keep, **{"async": False}, **more)).save(made, state(step))
    finally:
        made.close()


def restore_newest(root: str, fingerprint: dict) -> int:
    made, folder = engine(1, seed=1), claimed(root)
    try:
        found = Checkpoints(folder, checkpoint.Config()).restore(made, fingerprint=fingerprint)
        return found["step"] if found else -1
    finally:
        made.close()


def test_keeps_the_last_and_names_the_newest(ranks, tmp_path):
    ranks.run(1, saves, str(tmp_path), [1, 2, 3, 4], 2)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert (folder / "latest").read_text() == "step-00000004\n"
    facts = json.loads((folder / "step-00000004/COMPLETE").read_text())["files"]
    assert set(facts) == {"state.json", "part-00000-of-00001.safetensors"}


def test_keeps_every_so_many_steps_as_well(ranks, tmp_path):
    ranks.run(1, saves, str(tmp_path), [2, 3, 4, 5, 6, 7], 2, keep_every=3)
    kept = [int(p.name[5:]) for p in checkpoint.complete(tmp_path / "checkpoints")]
    assert kept == [7, 6, 3]


@pytest.mark.parametrize("damage", ["flipped byte", "cut off", "missing part", "no COMPLETE", "hidden leftover"])
def test_a_damaged_newest_falls_back(ranks, tmp_path, damage):
    ranks.run(2, saves, str(tmp_path), [1, 2], 3)
    newest = tmp_path / "checkpoints/step-00000002"
    part = newest / "part-00001-of-00002.safetensors"
    if damage == "flipped byte":
        data = bytearray(part.read_bytes())
        data[-5] ^= 1
        part.write_bytes(data)
    elif damage == "cut off":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "missing part":
        part.unlink()
    elif damage == "no COMPLETE":
        (newest / "COMPLETE").unlink()
    else:
        newest.rename(newest.with_name(".step-00000002.0123.part"))
    assert ranks.run(2, restore_newest, str(tmp_path), PRINT) == [1, 1]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_nothing_undamaged_is_an_error_and_nothing_at_all_is_a_start(ranks, tmp_path):
    assert ranks.run(1, restore_newest, str(tmp_path), PRINT) == [-1]
    ranks.run(1, saves, str(tmp_path), [1], 3)
    (tmp_path / "checkpoints/step-00000001/state.json").write_text("{}")
    with pytest.raises(AssertionError, match=r"CheckpointError.*checkpoint.resume=none"):
        ranks.run(1, restore_newest, str(tmp_path), PRINT)


def test_another_order_or_architecture_is_refused(ranks, tmp_path):
    ranks.run(1, saves, str(tmp_path), [1], 3)
    other = {"order": {"seed": 7}, "architecture": {"width": 7}}
    with pytest.raises(AssertionError, match=r"ConfigError: resume: order.seed was 0 in .* is 7 now; set it back"):
        ranks.run(1, restore_newest, str(tmp_path), other)


def test_compare_names_new_and_lost_keys():
    with pytest.raises(ConfigError, match=r"model.b was '\(not set\)' in x and is 2 now"):
        checkpoint.compare({"model": {"a": 1}}, {"model": {"a": 1, "b": 2}}, Path("x"))
    checkpoint.compare({"a": [1, 2]}, {"a": (1, 2)}, Path("x"))


def stale(root: str) -> str:
    made, old = engine(1), claimed(root)
    try:
        claimed(root)  # a newer start
        with pytest.raises(StaleRunError, match="newer start"):
            Checkpoints(old, AT_ONCE).save(made, state(3))
        return "refused"
    finally:
        made.close()


def test_a_stale_process_refuses_to_write(ranks, tmp_path):
    assert ranks.run(2, stale, str(tmp_path)) == ["refused"] * 2
    assert checkpoint.complete(tmp_path / "checkpoints") == []


def fill_disk(root: str) -> str:
    """Save until the small disk is full; training must be able to go on on all ranks."""
    made, folder = engine(1), claimed(root)
    saver = Checkpoints(folder, checkpoint.Config(keep_last=500))
    try:
        for step in range(1, 500):
            try:
                saver.save(made, state(step))
                train(made, 0, 1)
            except CheckpointError as error:
                train(made, 0, 1)  # nobody is stuck in a collective
                return str(error)
        return "the disk never filled up"
    finally:
        made.close()


def test_a_full_disk_leaves_the_older_checkpoints_and_no_debris(ranks, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip() if done else 'no mount'}")
    try:
        first, second = ranks.run(2, fill_disk, str(small))
        assert first == second and "No space left" in first and "older checkpoints are intact" in first
        kept = checkpoint.complete(small / "checkpoints")
        assert kept and not list((small / "checkpoints").glob(".*"))
        for path in kept:
            checkpoint.read_weights(path)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def zero_dim() -> None:
    module = torch.nn.Linear(2, 2)
    module.scale = torch.nn.Parameter(torch.tensor(1.0))
    zero.Engine(
        module,
        zero.Config(),
        optim_config=zero.optim.Config(),
        precision="fp32",
        rows=1,
        device=torch.device("cpu"),
    )


def test_a_parameter_without_dimension_is_named(ranks):
    with pytest.raises(AssertionError, match="parameter scale has no dimension"):
        ranks.run(1, zero_dim)
