"""The main job on ranks: every ZeRO stage, precision and number of ranks trains alike and goes on where it stopped."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from pretrain import evaluate
from pretrain.data import synthetic
from pretrain.data.format import ShardWriter
from pretrain.main import main
from tests import tiny
from tests.end_to_end.jobs import losses, losses_of, pretrain
from tests.end_to_end.launched import launch
from tests.ranks import RankError, a_port

#: of a run whose losses are compared step by step; it saves once
TWENTY = ("train.steps=20", "evals={}", "checkpoint.every_steps=null")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole config over real shards."""
    return tiny.config_file(tmp_path_factory.mktemp("pretrain"))


def close(ours: dict[int, float], theirs: dict[int, float], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():
        assert abs(ours[step] - loss) <= bound * abs(loss), f"step {step}: {ours[step]} and {loss}"


@pytest.fixture(scope="module")
def reference(ranks, config: Path) -> dict[int, float]:
    """Losses of 20 steps on one rank."""
    return losses_of(ranks, 1, config, "reference", *TWENTY)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_on_two_ranks_train_as_one_rank_does(ranks, config: Path, reference, stage: int) -> None:
    words = (f"zero.stage={stage}", *TWENTY)
    close(losses_of(ranks, 2, config, f"stage{stage}", *words), reference, 1e-4)


def test_micro_batches_train_as_whole_ones(ranks, config: Path, reference) -> None:
    words = ("train.micro_batch_size=2", "zero.stage=2", *TWENTY)
    close(losses_of(ranks, 2, config, "micro", *words), reference, 1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_runs(ranks, config: Path, reference, stage: int) -> None:
    words = ("train.precision=bf16", f"zero.stage={stage}", *TWENTY)
    close(losses_of(ranks, 2, config, f"bf16-{stage}", *words), reference, 0.1)


@pytest.mark.parametrize("objective", ["contrastive", "sigmoid"])
def test_evals_score_the_same_on_one_and_two_ranks(ranks, config: Path, objective: str) -> None:
    scores = []
    for world in (1, 2):
        name = f"evals-{objective}-{world}"
        words = (f"run.name={name}", f"objectives={{{objective}: {{}}}}", "model.logit_bias=-5", "zero.stage=3")
        ranks.run(world, pretrain, config, *words)
        lines = [json.loads(line) for line in (config.parent / "runs" / name / "evals.jsonl").read_text().splitlines()]
        scores.append({line["name"]: (line["value"], line["count"]) for line in lines})
    assert scores[0] == scores[1]
    assert scores[0]["zero_shot/even/top1"][1] == 48
    assert scores[0]["retrieval/image_to_text/R@1"][1] == 96


SAVING = ("train.steps=20", "evals={}", "checkpoint.every_steps=8", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def saved(ranks, config: Path) -> Path:
    """A run at stage 2 on two ranks with its checkpoints."""
    ranks.run(2, pretrain, config, "run.name=saved", *SAVING, "zero.stage=2")
    return config.parent / "runs" / "saved"


@pytest.mark.parametrize(("world", "stage", "workers"), [(2, 1, 0), (1, 0, 3), (4, 3, 1)])
def test_goes_on_with_other_ranks_stage_and_workers(
    ranks, config: Path, reference, saved: Path, world: int, stage: int, workers: int
) -> None:
    name = f"go-on-{world}-{stage}-{workers}"
    run = shutil.copytree(saved, config.parent / "runs" / name)
    for step in (16, 20):  # as if killed between step 8 and step 16
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / "latest").write_text("step-00000008\n")
    ranks.run(world, pretrain, config, f"run.name={name}", *SAVING, f"zero.stage={stage}", f"data.workers={workers}")
    again = losses(run)
    close({9: again[9]}, {9: reference[9]}, 1e-5)
    close(again, reference, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_real_deepspeed_launcher(config: Path, reference, stage: int) -> None:
    name = f"deepspeed{stage}"
    started = launch(config, f"run.name={name}", f"zero.stage={stage}", *TWENTY)
    output = started.communicate(timeout=300)[0]
    assert started.returncode == 0, output
    close(losses(config.parent / "runs" / name), reference, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_torchrun_and_plain_python(config: Path, reference, world: int) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", a_port())
    launcher = torchrun if world == 2 else (sys.executable,)
    name = f"launcher{world}"
    started = launch(config, f"run.name={name}", *TWENTY, launcher=launcher)
    output = started.communicate(timeout=300)[0]
    assert started.returncode == 0, output
    close(losses(config.parent / "runs" / name), reference, 1e-4)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["optim.learning_rate=1"], 2, "unknown key 'optim.learning_rate'"),
        (["objectives={contrastiv: {}}"], 2, "Did you mean 'contrastive'"),
        (["data.shards=nowhere/{0..1}.tar"], 2, "nowhere/0.tar"),
        (["model.vision.name=convnext_ato"], 2, "Did you mean 'convnext_atto'"),
        (["train.epochs=1"], 2, "exactly one of steps, samples, epochs"),
        (["optim.warmup=100"], 2, "warmup"),
        (["model.tokenizer=nowhere"], 2, "nowhere"),
        (["data.shards=pipe:cat x.tar"], 2, "pipe"),
    ],
)
def test_mistakes_are_one_sentence_and_an_exit_code(
    config: Path, words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(config), "run.name=mistake", *words])
    said = capsys.readouterr().err
    assert exit_.value.code == code
    assert sentence in said
    assert "Traceback" not in said


def test_another_architecture_or_order_is_refused(ranks, config: Path, capsys: pytest.CaptureFixture) -> None:
    ranks.run(1, pretrain, config, "run.name=refused", "evals={}")
    for word, key in (("model.embed_dim=8", "embed_dim"), ("data.lanes=4", "lanes"), ("run.seed=4", "seed")):
        with pytest.raises(SystemExit) as exit_:
            main(["--config", str(config), "run.name=refused", "evals={}", word])
        assert exit_.value.code == 2
        assert key in capsys.readouterr().err


def test_the_config_prints_and_loads_again(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--config", str(config), "--print-config", "train.batch_size=32"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]["objectives"]["properties"]) >= {"contrastive", "sigmoid"}
    assert main(["--config", str(config), "--plan"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_evaluate_gives_the_number_of_the_run(ranks, config: Path, tmp_path: Path) -> None:
    ranks.run(2, pretrain, config, "run.name=evaluated")
    run = config.parent / "runs" / "evaluated"
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    for world in (1, 2):
        found = ranks.run(world, evaluate.evaluate, str(run), evaluate.read_evals(str(run), None, []))[0]
        assert {line["name"]: line["value"] for line in lines} == {name: s.value for name, s in found.items()}


def spoiled(folder: Path, bad: int) -> str:
    """Write a shard whose first `bad` of 40 pictures are cut off, and return it."""
    path = folder / f"spoiled-{bad}.tar"
    with ShardWriter(path) as writer:
        for index in range(40):
            members = dict(synthetic.sample(index, size=32, seed=9))
            if index < bad:
                members["png"] = members["png"][:60]
            writer.add(f"{index:08d}", members)
    return str(path)


def test_bad_samples_are_replaced_counted_and_listed(ranks, config: Path) -> None:
    shard = spoiled(config.parent, 2)
    words = (f"data.shards={shard}", "data.max_bad_fraction=0.1", "train.steps=10", "evals={}")  # four epochs
    for world in (1, 2):
        ranks.run(world, pretrain, config, f"run.name=spoiled{world}", *words)
    runs = [config.parent / "runs" / f"spoiled{world}" for world in (1, 2)]
    lines = [sorted((run / "quarantine.jsonl").read_text().splitlines()) for run in runs]
    assert lines[0] == lines[1]
    found = [json.loads(line) for line in lines[0]]
    assert {(row["key"], Path(row["shard"]).name) for row in found} == {
        ("00000000", "spoiled-2.tar"), ("00000001", "spoiled-2.tar")
    }  # fmt: skip
    assert len(found) == 8 and all(row["reason"] for row in found)
    close(losses(runs[0]), losses(runs[1]), 1e-4)


def test_too_many_bad_samples_stop_all_ranks(ranks, config: Path) -> None:
    words = (f"data.shards={spoiled(config.parent, 20)}", "train.steps=20", "evals={}", "run.name=rotten")
    with pytest.raises(RankError, match=r"rank 0 of 2 failed[\s\S]*rank 1 of 2 failed") as error:
        ranks.run(2, pretrain, config, *words)
    assert str(error.value).count("samples are unusable, over data.max_bad_fraction=0.01") == 2
    with pytest.raises(RankError, match="no usable sample"):
        ranks.run(1, pretrain, config, f"data.shards={spoiled(config.parent, 40)}", "run.name=rotten2", "evals={}")


def cpu_seconds(pid: int) -> float:
    """Return what a process has computed so far: a test's neighbours do not lengthen it."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def test_first_line_comes_soon_and_the_plan_and_report_are_left(config: Path, tmp_path: Path) -> None:
    """Ten seconds of CPU from a process that is up to its first step; pictures in the report, a plan beside it."""
    words = (f"run.dir={tmp_path}", "run.name=seen", "train.steps=4", "evals.retrieval.every_steps=2")
    process = launch(config, *words, "profile.start=2", launcher=(sys.executable,))
    assert process.stdout is not None
    heard: dict[str, float] = {}
    for line in process.stdout:
        for word in ("1 rank is up", "tensors at most", "step 1/4", "image tower"):
            if word in line:
                heard.setdefault(word, cpu_seconds(process.pid))
    assert process.wait() == 0 and len(heard) == 4
    assert heard["step 1/4"] - heard["1 rank is up"] < 10, heard
    run = tmp_path / "seen"
    assert json.loads((run / "plan.json").read_text())["step"]["trained"] == 240_505
    assert "mfu" in (run / "metrics.jsonl").read_text()
    report = (run / "report.html").read_text()
    assert report.count("data:image/webp;base64,") == 6 * 5 + 6 and "retrieval/image_to_text" in report
    steps = [line["step"] for line in map(json.loads, (run / "evals.jsonl").read_text().splitlines())]
    assert {2, 4} <= set(steps)
