"""Every item of the methods' check lists has a test, and the table of them is up to date."""

from tests import checks


def test_every_item_has_a_test():
    wanted = {(name, item) for name, items in checks.LISTS.items() for item in range(1, len(items) + 1)}
    found = set(checks.covered())
    assert not wanted - found, "items without a test; mark one with @pytest.mark.check(list, item)"
    assert not found - wanted, "markers of items that no list has; see tests/checks.py"


def test_the_table_is_up_to_date():
    assert checks.TABLE.read_text(encoding="utf-8") == checks.table(), "run `python -m tests.checks`"
