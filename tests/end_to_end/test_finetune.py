"""Every method's own config under the real launcher: a rank is killed, the same command goes on, nothing differs."""

import random
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from finetune.methods.base import Method
from pretrain import registry
from pretrain.report import scores
from tests import tiny
from tests.end_to_end.jobs import losses, steps_done
from tests.end_to_end.launched import FINETUNE, ROOT, kill_a_rank, launch, weights
from tests.finetune.test_main import fine_tune

STEPS, EVERY = 48, 6


def method(name: str) -> type[Method]:
    found: type[Method] = registry.find("finetune.methods", name).Method
    return found


#: those that name pictures by two towers
NAMES = [name for name in registry.names("finetune.methods") if "classify" in method(name).serves]


def config(name: str) -> Path:
    return ROOT / "finetune" / "configs" / f"{name}_iconcaps.yaml"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs are told: a tiny base, pictures, and to save often."""
    folder = tmp_path_factory.mktemp("given")
    return [
        f"base={tiny.export(folder / 'export')}", f"task.data={tiny.class_folders(folder / 'mine', train=9)}",
        "task.templates=plain", "task.shots=4", "task.batch_size=4", "monitor.log_every=1",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [(name, number % 4) for number, name in enumerate(NAMES)])
def test_a_killed_rank_changes_nothing(name: str, stage: int, given: list[str], tmp_path: Path, ranks) -> None:
    """Methods that are solved have no steps: they are killed while pictures are encoded."""
    plug, rng = method(name), random.Random(f"kill {name}")
    section = yaml.safe_load(config(name).read_text())["method"]
    solved = plug.solved(registry.find("finetune.methods", name).Config(**section))
    words = [*given, f"run.dir={tmp_path}", f"zero.stage={stage}"]
    if not solved:
        words += [f"train.steps={STEPS}", "train.epochs=null", "train.batch_size=4", f"checkpoint.every_steps={EVERY}"]
    if plug.pictures_by != "pixels":
        words += ["data.augment=null"]  # features that are cached are trained on, too
    cache, run = tmp_path / "cache", tmp_path / "broken"
    command = {"script": FINETUNE, "DIPTYCH_CACHE": str(cache)}  # of its own: the pictures must be encoded
    step, victim = rng.randint(EVERY + 1, STEPS // 2), rng.randint(0, 1)
    parts = rng.randint(1, 3)
    broken = launch(config(name), "run.name=broken", *words, **command)
    encoded = lambda: len(list(cache.rglob("*.safetensors"))) >= parts  # noqa: E731
    kill_a_rank(broken, "broken", victim, when=encoded if solved else lambda: steps_done(run) >= step)
    assert not (run / "delta.safetensors").exists(), "the kill came after the end"
    again = launch(config(name), "run.name=broken", *words, **command)
    assert {code for code, _ in ranks.run(2, fine_tune, str(config(name)), "run.name=whole", *words)} == {0}
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    ours, theirs = (load_file(tmp_path / kind / "delta.safetensors") for kind in ("broken", "whole"))
    assert ours.keys() == theirs.keys() and ours
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert scores.newest(run) == scores.newest(tmp_path / "whole")
    if not solved:
        assert "resumed from" in output
        ours, theirs = weights(run), weights(tmp_path / "whole")
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
        assert losses(run) == losses(tmp_path / "whole")
