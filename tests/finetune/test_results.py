"""Means over seeds, and what becomes of a claim, against numbers made by hand and scipy's intervals."""

import json
import math
import subprocess
import sys

import pytest

from finetune import claims, results, sweep
from finetune.claims import Cell, mean
from tests.finetune.test_main import ROOT

stats = pytest.importorskip("scipy.stats")


def cell(method: str, shots: int, seed: int, accuracy: float, *, label: str = "", zero: float = 0.5, **more) -> Cell:
    section = {"name": method, **more.pop("section", {})}
    return Cell(label or method, section, shots, seed, {"accuracy": accuracy, "zero_shot": zero, **more})


@pytest.mark.parametrize("values", [[0.5, 0.6], [0.1, 0.4, 0.7], [float(n % 7) for n in range(40)]])
def test_intervals_are_students(values):
    found = mean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=found.value, scale=stats.sem(values))
    tolerance = 2e-4 if len(values) < 32 else 0.05 * (high - low)
    assert found.value == pytest.approx(sum(values) / len(values))
    assert (found.low, found.high) == (pytest.approx(low, abs=tolerance), pytest.approx(high, abs=tolerance))
    assert math.isnan(mean([0.3]).low)


def judged(cells: list[Cell]) -> dict[str, claims.Verdict]:
    return {verdict.claim.split(" ")[0] + verdict.claim.split(" ")[1]: verdict for verdict in claims.judge(cells)}


def test_a_claim_holds_where_every_number_of_shots_agrees():
    cells = [cell("coop", k, s, 0.55 + 0.01 * s) for k in (1, 4, 8) for s in (1, 2, 3)]
    found = judged(cells)["CoOpabove"]
    assert found.held and found.difference.value == pytest.approx(0.07) and found.difference.count == 3
    low, high = stats.t.interval(0.95, 2, loc=0.07, scale=stats.sem([0.06, 0.07, 0.08]))
    assert (found.difference.low, found.difference.high) == (
        pytest.approx(low, abs=1e-5),
        pytest.approx(high, abs=1e-5),
    )
    cells = [c._replace(scores={**c.scores, "accuracy": 0.4}) if c.shots == 8 else c for c in cells]
    lost = judged(cells)["CoOpabove"]
    assert lost.held is False and lost.why == "not above zero_shot at 8 shots"


def test_pairs_are_of_equal_shots_and_seed():
    cells = [cell("coop", 1, s, 0.5 + 0.1 * s) for s in (1, 2)] + [cell("linear_probe", 1, 2, 0.65)]
    found = judged(cells)["CoOpnowhere"]
    assert found.held and found.difference.value == pytest.approx(0.05) and found.difference.count == 1
    equal = [cell("coop", 1, 1, 0.6), cell("linear_probe", 1, 1, 0.6)]
    assert judged(equal)["CoOpnowhere"].held, "nowhere below: as good is good enough"
    assert judged([cell("linear_probe", 1, 1, 0.6)])["CoOpnowhere"].held is None
    late = judged([cell("coop", 1, 1, 0.6)])["CoOpabove"]
    assert late.held is None and late.why == "needs coop and zero_shot at its shots, with accuracy"


def test_both_tips_and_both_ends_of_wise():
    tips = [cell("tip_adapter", 1, 1, 0.55, label="tip"),
            cell("tip_adapter", 1, 1, 0.6, label="f", section={"train_keys": True})]  # fmt: skip
    found = judged(tips)
    assert found["Tip-Adapter-Fabove"].held and found["Tip-Adapterabove"].held
    shifted = {"shift/accuracy": 0.6, "shift/zero_shot": 0.5}
    ends = [cell("full", 4, 1, 0.9, label="full", **{**shifted, "shift/accuracy": 0.58}),
            cell("full", 4, 1, 0.8, label="wise", section={"wise": 0.5}, **shifted)]  # fmt: skip
    both = judged(ends)["WiSE-FTat"]
    assert both.held and both.difference.value == pytest.approx(0.02)
    worse = [ends[0]._replace(scores={**ends[0].scores, "shift/accuracy": 0.7}), ends[1]]
    assert judged(worse)["WiSE-FTat"].why == "not above full at 4 shots"
    new = [cell("coop", 16, 1, 0.9, **{"new/accuracy": 0.4}), cell("cocoop", 16, 1, 0.8, **{"new/accuracy": 0.5})]
    assert judged(new)["CoCoOpabove"].held
    whole = [cell("coop", 16, 1, 0.7), cell("cocoop", 16, 1, 0.6)]
    halves = [c._replace(label=f"{c.label}_base") for c in new]
    assert judged(whole + halves)["CoCoOpabove"].held, "those speak that have the score"


def test_the_table_is_written_without_torch(tmp_path):
    code = "import sys; from finetune import results; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(ValueError, match="no finished run"):
        results.write(tmp_path)
    assert results.main([str(tmp_path / "none")]) == 1


def test_a_run_that_is_not_scored_yet_is_left_out(tmp_path):
    """Its delta lies there while it is scored: another job of an array may write the table just then."""
    for seed in (1, 2):
        folder = tmp_path / f"coop_base-shots4-seed{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text("method: {name: coop}\ntask: {name: few_shot, classes: base}\n")
        (folder / results.DELTA).touch()
    lines = [{"step": 6, "name": f"few_shot/{n}", "value": 0.5, "low": 0, "high": 1, "count": 9}
             for n in ("accuracy", "zero_shot", "new/accuracy")]  # fmt: skip
    (folder / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [c.seed for c in results.read(tmp_path)] == [2]
    (folder / "evals.jsonl").unlink()
    assert sweep.written(tmp_path).startswith("no table: ")


def test_what_people_read():
    cells = [cell("coop", k, s, 0.5 + 0.05 * k + 0.01 * s, **{"new/accuracy": 0.3, "harmonic": 0.4})
             for k in (1, 2) for s in (1, 2, 3)]  # fmt: skip
    head, lines = results.rows(cells, "accuracy")
    assert head == ["method", "1 shot", "2 shots"]
    assert lines == [["zero-shot", "50.0", "50.0"], ["coop", "57.0 ± 2.5", "62.0 ± 2.5"]]
    said = results.markdown(cells, claims.judge(cells))
    assert "## Accuracy on new classes" in said and "## Harmonic mean" in said and "| not tried |" in said
    assert results.flat(cells).splitlines()[3].startswith("accuracy,coop,1,3,0.570000,0.545")
    assert "<svg" in results.html(cells, claims.judge(cells), "<b>") and "<b>" not in results.html(cells, [], "<b>")
