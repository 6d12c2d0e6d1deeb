"""The race itself: laps take turns, a contestant that falls is named."""

import sys

import pytest

from tests.benchmarks.race import Result, race

RUNNER = """
import sys
from tests.benchmarks.race import contest
def lap():
    sum(range(int(sys.argv[1])))
    return 100
contest(lap)
"""


def test_less_work_is_faster():
    found = race({n: [sys.executable, "-c", RUNNER, n] for n in ("2000000", "100000")}, laps=3)
    assert len(found["100000"].rates) == 3
    assert found["100000"].median > 2 * found["2000000"].median


def test_a_contestant_that_falls():
    with pytest.raises(RuntimeError, match="clumsy ended with code 3"):
        race({"clumsy": [sys.executable, "-c", "raise SystemExit(3)"]}, laps=1)


def test_a_result_is_told_by_its_median_and_range():
    assert str(Result([1000.0, 3000.0, 2000.0])) == "2,000 [1,000, 3,000]"
