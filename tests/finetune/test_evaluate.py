"""Fine-tuned runs are scored from their folder: the same score, other classes, another mixture, nothing left behind."""

from pathlib import Path

import pytest
import torch

from finetune import evaluate, main
from pretrain import config
from pretrain.config import ConfigError
from pretrain.exports import diptych
from pretrain.metrics.interval import Score
from pretrain.models import vision
from pretrain.report import scores
from tests import tiny
from tests.finetune.test_main import recipe_file


def train(file: str, *words: str) -> int:
    """Run the stage on this rank."""
    return main.run(config.load(main.Recipe, file, words), torch.device("cpu"))


def score(run: str, *words: str) -> Score:
    """Score a run on this rank."""
    section, changes = evaluate.read(Path(run), list(words))
    [found] = evaluate.evaluate(Path(run), section, changes, device=torch.device("cpu")).values()
    return found


def trained(folder: Path, ranks, method: str) -> Path:
    enough = tiny.class_folders(folder / "enough", train=9)  # to hold out a validation split
    file = str(recipe_file(folder, method=method))
    assert ranks.run(1, train, file, f"task.data={enough}", timeout=600) == [0]
    return folder / "runs" / "run"


METHODS = [
    "{name: coop, length: 4}",
    "{name: linear_probe, c: 1.0}",
    "{name: tip_adapter, views: 2, betas: 3, alphas: 3}",
    "{name: full, wise: 0.5, head: linear}",
]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_scores_as_it_did_at_its_end(method, tmp_path, ranks):
    run = trained(tmp_path, ranks, method)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert ranks.run(2, score, str(run), timeout=600)[0] == scores.newest(run)["few_shot/accuracy"][1]
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before, "nothing is added to the run"


def answers_of_ranks(file: str, *words: str) -> list[float]:
    """Train on this rank; return its running statistics as they answered."""
    seen: list[float] = []
    whole = main.Job.scores

    def watched(job: main.Job, module: torch.nn.Module) -> dict[str, Score]:
        seen.extend(float(x.float().sum()) for n, x in job.method.state().items() if "running" in n)
        return whole(job, module)

    main.Job.scores = watched
    try:
        assert train(file, *words) == 0
    finally:
        main.Job.scores = whole
    return seen


def test_ranks_answer_with_the_statistics_that_are_saved(tmp_path, ranks):
    section = tiny.vit_section()
    section.vision = vision.Config(name="test_resnet", image_size=32)  # with batch norms
    section.text.context_length = 40
    (tmp_path / "bn").mkdir()
    diptych.Format().write(tiny.pretrained_model(section), tmp_path / "bn")
    file = str(recipe_file(tmp_path, method="{name: full}"))
    one, two = ranks.run(2, answers_of_ranks, file, f"base={tmp_path / 'bn'}", "optim.lr=0.001", timeout=600)
    assert one and one == two
    run = tmp_path / "runs" / "run"
    assert ranks.run(1, score, str(run))[0] == scores.newest(run)["few_shot/accuracy"][1]


def test_other_classes_and_other_mixtures(tmp_path, ranks):
    run = trained(tmp_path, ranks, "{name: full, wise: 0.5}")
    assert ranks.run(1, score, str(run), "method.wise=0.0")[0] == scores.newest(run)["few_shot/zero_shot"][1]
    others = tiny.class_folders(tmp_path / "others", train=4, test=3)
    for split in ("train", "test"):
        for path in sorted((others / split).iterdir()):
            path.rename(path.with_name(f"new_{path.name}"))
    assert ranks.run(1, score, str(run), f"task.data={others}", "task.shots=2")[0].count == 9


def test_what_is_no_ended_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml; give the folder of a fine-tuned run"):
        evaluate.read(tmp_path, [])


def test_bad_usage_is_a_sentence_and_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(tmp_path)])
    assert left.value.code == 2 and "come to its end" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.main(["--help"])
    assert left.value.code == 0 and "method.wise=0.3" in capsys.readouterr().out
