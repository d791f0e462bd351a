"""Patched and ablated logits are those of pyvene, of plain PyTorch hooks and, for LLaVA, of TransformerLens."""

import importlib.metadata

import pytest
import torch

import interp_vlm as iv
from tests.peers.edits import EDITS, Case

pytestmark = pytest.mark.peers

CASES = {family: Case(family) for family in ("llava", "paligemma", "qwen2_vl")}
TOLERANCE = 1e-5  # float32; logits of the tiny models are about 10


def agree(mine, theirs, clean):
    """Equal, and not because nothing happened."""
    torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert float((mine - clean).abs().max()) > 1e-3


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", CASES)
class TestEdits:
    def test_plain_hooks(self, family, name):
        case = CASES[family]
        agree(case.ours(EDITS[name]), case.by_hooks(EDITS[name]), case.vlm.run(case.batch).logits)

    def test_pyvene(self, family, name):
        case = CASES[family]
        agree(case.ours(EDITS[name]), case.by_pyvene(EDITS[name]), case.vlm.run(case.batch).logits)


@pytest.mark.parametrize("name", EDITS)
def test_transformer_lens(name):
    case = CASES["llava"]
    theirs = case.by_transformer_lens([case.lens_hook(edit) for edit in EDITS[name]])
    agree(case.ours(EDITS[name]), theirs, case.vlm.run(case.batch).logits)


@pytest.mark.parametrize("heads", [None, (1, 2)])
def test_knockout_by_transformer_lens(heads):
    case = CASES["llava"]
    knockout = iv.AttentionKnockout("question", "image", layers=[0, 1], heads=heads)
    rows, keys = case.rows("question")[0][:, None], case.rows("image")[0][None]

    def block(scores, hook):
        for head in range(4) if heads is None else heads:
            scores[:, head, rows, keys] = torch.finfo(scores.dtype).min
        return scores

    theirs = case.by_transformer_lens([(f"blocks.{layer}.attn.hook_attn_scores", block) for layer in (0, 1)])
    agree(case.vlm.run(case.batch, knockout).logits, theirs, case.vlm.run(case.batch).logits)


def test_a_witness_notices_another_edit():
    """One unit more, one position fewer: the comparison is no formality."""
    case = CASES["llava"]
    (edit,) = EDITS["patch-z-1-text"]
    other = (type(edit)(**{**vars(edit), "heads": (2, 3)}),)
    with pytest.raises(AssertionError):
        agree(case.ours((edit,)), case.by_pyvene(other), case.vlm.run(case.batch).logits)


def test_no_witness_has_changed_the_environment():
    """TransformerLens installs what it misses, and with torchvision another torch than the one that is running."""
    assert importlib.metadata.version("torch") == torch.__version__
