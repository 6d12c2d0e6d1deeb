"""Templates by name and by hand."""

import pytest

from pretrain.config import ConfigError
from pretrain.data import prompts


def test_sets():
    assert prompts.fill(["a {} cat", "dog"], "plain") == [["a {} cat"], ["dog"]]
    assert len(prompts.templates("imagenet7")) == 7
    assert prompts.fill(["dog"], ["my {}"]) == [["my dog"]]
    assert all(t.count("{}") == 1 for chosen in prompts.SETS for t in prompts.templates(chosen))


def test_mistakes():
    with pytest.raises(ConfigError, match="Did you mean 'icon'"):
        prompts.templates("icno")
    for wrong in ([], ["no hole"], ["{} {}"]):
        with pytest.raises(ConfigError, match="one hole"):
            prompts.templates(wrong)
