"""Every instruction, found by its file name: names its paper, draws from the sample alone, says what it lays."""

import importlib
import re

import pytest

from pretrain import registry
from pretrain.batch import Example
from pretrain.config import ConfigError, Section
from pretrain.data import symbols
from pretrain.data.decode import BadSample
from pretrain.data.instructions import base

NAMES = registry.names(base.PACKAGE)


def tasks(name: str) -> list[str]:
    return list(importlib.import_module(f"{base.PACKAGE}.{name}").Task.__args__)


def other(number: int) -> Example:
    return Example(f"k{number % 9}", [], prefix="text", suffix=f"caption {number % 9}", shard="a.tar")


def example(draw: int = 0) -> Example:
    """Return what a reader of anything would give: texts, answers, names, in which symbols are only spelled."""
    said = "a <bin_3> of <extra_id_0> and <mask> with more words than any caption has in this test of instructions"
    meta = {"answer_scores": {"yes <code_1>": 1.0}, "names": ["<vis_extra_id_2>"], "captions": [said]}
    return Example("k", [], prefix="<bin_1> is what?", suffix=said, meta=meta, draw=draw, shard="a.tar")


@pytest.mark.parametrize("name", NAMES)
def test_its_file(name):
    module = importlib.import_module(f"{base.PACKAGE}.{name}")
    assert issubclass(module.Config, Section) and issubclass(module.Instruction, base.Instruction)
    assert re.search(r"arXiv:\d{4}\.\d{5}", module.__doc__), "name the paper"
    assert all(task in module.__doc__ for task in tasks(name)), "list the tasks"
    with pytest.raises(ConfigError, match=rf"data\.instruction\.{name}: unknown key 'no_such_key'"):
        base.make({name: {"tasks": tasks(name)[:1], "no_such_key": 1}}, others=other)


@pytest.mark.parametrize("name, task", [(name, task) for name in NAMES for task in tasks(name)])
def test_lays_the_same_for_the_same_draw_and_no_symbol_of_the_data(name, task):
    try:
        made = [base.make({name: {"tasks": [task]}}, others=other) for _ in range(2)]
    except ConfigError as error:
        assert "name a" in str(error), "a file that it needs"
        return
    for draw in range(20):
        given = example(draw)
        try:
            found = [one.lay(given, 64) for one in made]
        except BadSample as reason:
            assert str(reason)
            return
        assert found[0] == found[1] and given == example(draw), "the example that came is left as it was"
        laid = [piece for text in (found[0].prefix, found[0].suffix) for piece, mine in symbols.pieces(text) if mine]
        kinds = {re.sub(r"\d+", "", one) for one in laid}
        assert kinds <= {re.sub(r"\d+", "", one) for one in made[0].symbols()}, "it says which symbols it lays"
        told = symbols.plain(found[0].prefix + found[0].suffix)
        for written in ("<bin_3>", "<bin_1>"):
            assert written not in laid or told.count(written) > laid.count(written)
