"""Bad interventions: a typed error of one line, and a model that answers afterwards as it did before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.corpus.conftest import refused
from tests.corpus.interventions import INTERVENTIONS, WRONG_TYPES, Bench


@pytest.fixture(scope="module")
def bench(vlm):
    return Bench(vlm)


@pytest.fixture(scope="module")
def before(bench):
    return bench.vlm.run(bench.batch).logits


@pytest.mark.parametrize("bad", INTERVENTIONS, ids=repr)
def test_a_bad_intervention_is_one_line(bad, bench, before):
    refused(bad, lambda: bad.act(bench))
    assert torch.equal(bench.vlm.run(bench.batch).logits, before)


UNCHECKED = """
import json
import interp_vlm as iv
from tests.corpus.interventions import WRONG_TYPES, Bench
from tests.tiny import build
bench, found = Bench(iv.VLM(*build("llava"))), {}
for bad in WRONG_TYPES:
    try:
        found[bad.id] = ["", repr(bad.act(bench))]
    except Exception as error:
        found[bad.id] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


def test_wrong_types_are_one_line_without_a_type_checker_too():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", UNCHECKED], cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == len(WRONG_TYPES)
    for bad in WRONG_TYPES:
        kind, message = found[bad.id]
        assert kind == bad.raises.__name__, (bad.id, kind, message)
        assert re.search(bad.says, message), (bad.id, message)
        assert message.isprintable()
