"""The report of a run: every panel, of a finished, a running and an empty run; strangers' words are no markup."""

import json
import re
from pathlib import Path

import pytest
import torch

from pretrain import registry
from pretrain.evals.base import Features
from pretrain.evals.retrieval import Config, Eval, Examples
from pretrain.metrics.interval import Score
from pretrain.report import __main__ as command
from pretrain.report import page, scores, write
from pretrain.report.run import Run
from tests import tiny

EVIL = "<script>alert(1)</script>&\"'"


def a_run(folder: Path, *, evil: str = "") -> Path:
    """Write what a run of four steps leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"run: {{name: '{evil}'}}\n")
    (folder / "environment.json").write_text(json.dumps({"host": evil, "packages": {"torch": "2"}, "command": [evil]}))
    lines = [{"step": n, "samples": 8 * n, "loss": 3 / n, "lr": 0.1, "samples_per_s": 9.0, f"part{evil}": 1.0,
              "data_wait": 0.1, "step_time": 0.2, "memory": 1.0, "mfu": 0.3,
              "time": 1.8e9} for n in (1, 2, 3, 4)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    for step in (2, 4):
        scores.append(folder, step, {f"zero_shot/{evil}": Score(0.5, 0.4, 0.6, 10)})
    (folder / "quarantine.jsonl").write_text(json.dumps({"shard": "a.tar", "key": evil, "reason": evil}) + "\n")
    found = [{"image": f'x" onerror="{evil}', "right": True}]
    texts = [{"caption": evil, "right": False}]
    tree = {"step": 4, "text_to_image": [{"caption": evil, "found": found}],
            "image_to_text": [{"caption": evil, "image": "data:image/webp;base64,AAAA", "found": texts}]}  # fmt: skip
    (folder / "retrieval.json").write_text(json.dumps(tree))
    (folder / "plan.json").write_text(json.dumps({"resident": 2**30, "warnings": [evil], "memory": {}, "outlook": {}}))
    return folder


def test_shows_everything_and_is_self_contained(tmp_path: Path) -> None:
    text = write.write(a_run(tmp_path / "run")).read_text()
    for title in ("Scores", "Training", "Throughput", "Retrieval", "Quarantine", "Plan", "Environment", "Config"):
        assert f"<h2>{title}</h2>" in text
    assert "<polyline" in text and "data:image/webp;base64,AAAA" in text and "50.0 %" in text
    assert not re.search(r"(https?:)?//|src=\"(?!data:|\")|<link|@import|url\(", text)


def test_words_of_strangers_stay_words(tmp_path: Path) -> None:
    text = write.html(a_run(tmp_path / "run", evil=EVIL))
    assert "<script" not in text and "onerror" not in text
    assert text.count(page.text(EVIL)) >= 8


def test_a_run_that_has_just_begun_or_is_torn_has_a_report(tmp_path: Path) -> None:
    assert "no step is done yet" in write.html(tmp_path)
    for name in ("evals.jsonl", "retrieval.json", "plan.json", "environment.json", "metrics.jsonl"):
        (tmp_path / name).write_text('{"step": 1, "loss": Na')
    assert "no eval has run yet" in write.html(tmp_path)


@pytest.mark.parametrize("name", registry.names(write.PANELS))
def test_every_panel_bears_an_empty_folder(name: str, tmp_path: Path) -> None:
    assert isinstance(registry.find(write.PANELS, name).panel(Run(tmp_path)), str)


def test_values_that_are_not_finite_leave_the_curve() -> None:
    assert "nothing yet" in page.curves({"a": [(1, float("nan"))]})
    assert page.curves({"a": [(1, 1.0), (2, float("inf")), (3, 2.0)]}).count("nan") == 0
    assert page.curves({"a": [(n, n) for n in range(10_000)]}).count(",") < 500


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main([str(a_run(tmp_path / "run"))]) == 0 and (tmp_path / "run/report.html").exists()
    assert command.main([str(tmp_path)]) == 2
    assert "name a run folder" in capsys.readouterr().err


def test_the_retrieval_eval_leaves_pictures_and_captions(tmp_path: Path) -> None:
    folder = tiny.corpus(tmp_path / "corpus")
    model = tiny.pretrained_model(tiny.vit_section())
    features = Features(
        run=lambda batch, want: getattr(model.model(batch), want), transform=model.transform, composer=model.composer
    )
    section = Config(data=f"{folder}/shapes-00000.tar", batch_size=20, examples=3)
    with torch.no_grad():
        made = Eval(section)
        made.run(features)
    assert len(made.examples["text_to_image"]) == len(made.examples["image_to_text"]) == 3
    first = made.examples["image_to_text"][0]
    assert first["caption"].startswith("a") and len(first["found"]) == 5
    assert first["image"].startswith("data:image/webp;base64,")
    (tmp_path / "retrieval.json").write_text(json.dumps({"step": 1, **made.examples}))
    shown = registry.find(write.PANELS, "retrieval").panel(Run(tmp_path))
    assert shown.count("<img") == 3 * 5 + 3 and page.text(first["caption"]) in shown


def test_fewer_pairs_than_examples_are_each_shown_once() -> None:
    found = Examples()
    found.pictures = [torch.full((3, 4, 4), 80 * n, dtype=torch.uint8) for n in range(3)]
    found.captions = ["one", "two", "three"]
    tree = found.tree(torch.eye(3), torch.eye(3), torch.arange(3), count=6)
    assert [example["caption"] for example in tree["text_to_image"]] == ["one", "two", "three"]
    assert all(example["found"][0]["right"] for example in tree["text_to_image"])
