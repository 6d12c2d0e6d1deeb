"""Every eval, found by name: says what it needs of a model and whose protocol it is, is refused in time."""

import re

import pytest

from pretrain import config, registry
from pretrain.evals import base
from pretrain.models.coca import CoCa
from pretrain.models.fused_vlm import FusedVLM
from pretrain.models.ofa import OFA
from pretrain.models.vlm import VLM
from pretrain.models.vlt5 import VLT5

NAMES = registry.names("pretrain.evals")
PROVIDED = {name for model in (VLM, FusedVLM, CoCa, OFA, VLT5) for name in model.provides}


@pytest.mark.parametrize("name", NAMES)
def test_eval(name: str) -> None:
    plug = registry.find("pretrain.evals", name)
    more = {"classes": "none.json"} if name == "zero_shot" else {}
    section = config.build(plug.Config, {"data": "a.tar", **more}, where=name)
    assert isinstance(section, base.Config) and issubclass(plug.Eval, base.Eval)
    assert plug.Eval.needs and set(plug.Eval.needs) <= PROVIDED
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", plug.__doc__) or name == "perplexity", "name the paper of the protocol"
    with pytest.raises(config.ConfigError, match=f"evals.{name} needs"):
        base.refuse_unserved({name: section}, ())
