"""Every method's own config under the real launcher: a rank is killed, the same command goes on, nothing differs."""

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from finetune.methods.base import Method
from pretrain import registry
from pretrain.report import scores
from tests import tiny
from tests.end_to_end.jobs import losses
from tests.end_to_end.killer import FINETUNE
from tests.end_to_end.launched import ROOT, kill_a_rank, launch, weights
from tests.finetune.test_main import fine_tune

STEPS, EVERY = 96, 12


def method(name: str) -> type[Method]:
    found: type[Method] = registry.find("finetune.methods", name).Method
    return found


#: those that name pictures by two towers
NAMES = [name for name in registry.names("finetune.methods") if "classify" in method(name).serves]


def config(name: str) -> Path:
    return ROOT / "finetune" / "configs" / f"{name}.yaml"


def solved(name: str) -> bool:
    """Return whether the shipped config has no steps to train."""
    section = yaml.safe_load(config(name).read_text())["method"]
    return method(name).solved(registry.find("finetune.methods", name).Config(**section))


class Flow:
    """A method's run that is killed and goes on; what it is told, and where it lies."""

    def __init__(self, name: str, folder: Path, given: list[str]) -> None:
        number = NAMES.index(name)
        self.name, self.folder, self.run = name, folder, folder / f"broken-{name}"
        self.words = [*given, f"run.dir={folder}", f"zero.stage={number % 4}"]
        if not solved(name):
            self.words += [f"train.steps={STEPS}", "train.epochs=null", "train.batch_size=4"]
            self.words += [f"checkpoint.every_steps={EVERY}"]
        if method(name).pictures_by != "pixels":
            self.words += ["data.augment=null"]  # features that are cached are trained on, too
        self.cache = folder / "cache"  # of its own: the pictures must be encoded
        self.how = {"script": FINETUNE, "lane": 1 + number, "DIPTYCH_CACHE": str(self.cache)}

    def go(self) -> str:
        """Kill a rank and run the same command again; return what that says."""
        rng = random.Random(f"kill {self.name}")
        step, parts, victim = rng.randint(EVERY + 1, 2 * EVERY), rng.randint(1, 3), rng.randint(0, 1)
        command = (config(self.name), f"run.name={self.run.name}", *self.words)
        broken = launch(*command, **self.how)
        # without steps it is killed while pictures are encoded
        due = (parts, self.cache, ".safetensors") if solved(self.name) else (step, self.run / "metrics.jsonl", "")
        kill_a_rank(broken, self.run.name, victim, when=due)
        assert not (self.run / "delta.safetensors").exists(), "the kill came after the end"
        again = launch(*command, **self.how)
        output = str(again.communicate(timeout=600)[0])
        assert again.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def flows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Flow, Future[str]]]]:
    """Start the flows of the tests that were chosen, two at a time: one launcher's start leaves a core idle."""
    folder = tmp_path_factory.mktemp("given")
    given = [
        f"base={tiny.export(folder / 'export')}", f"task.data={tiny.class_folders(folder / 'mine', train=9)}",
        "task.templates=plain", "task.shots=4", "task.batch_size=4", "monitor.log_every=1",
    ]  # fmt: skip
    chosen = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    made = {name: Flow(name, tmp_path_factory.mktemp(name), given) for name in chosen}
    with ThreadPoolExecutor(2) as pool:
        yield {name: (flow, pool.submit(flow.go)) for name, flow in made.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.check("few-shot", 7)
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_rank_changes_nothing(name: str, flows, ranks) -> None:
    """ZeRO stages take turns over the methods; what is compared with was never killed and ran on the pool of ranks."""
    flow, went_on = flows[name]
    done = ranks.run(2, fine_tune, str(config(name)), "run.name=whole", *flow.words, timeout=600)
    assert [code for code, _ in done] == [0, 0]
    output, whole = went_on.result(), flow.folder / "whole"
    ours, theirs = (load_file(run / "delta.safetensors") for run in (flow.run, whole))
    assert ours.keys() == theirs.keys() and ours
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert scores.newest(flow.run) == scores.newest(whole)
    if not solved(name):
        assert "resumed from" in output
        ours, theirs = weights(flow.run), weights(whole)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
        assert losses(flow.run) == losses(whole)
