"""Any subset of layers, heads, units, positions and edges, against hooks; one model of each kind of mask."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import interp_vlm as iv
from interp_vlm.errors import InterventionError
from tests.engine import reference
from tests.engine.settings import Setting

MASKS = {
    "causal, None or boolean": Setting("llava", "sdpa", 64, "left"),
    "causal, additive": Setting("qwen2_vl", "eager", 32, "right"),
    "bidirectional prefix": Setting("paligemma", "sdpa", 64, "left"),
    "image blocks and sliding windows": Setting("gemma3", "sdpa", 64, "right"),
}
every_mask = pytest.mark.parametrize("name", MASKS)
layers = st.lists(st.integers(-3, 2), min_size=1, max_size=3, unique_by=lambda layer: layer % 3)
heads = st.none() | st.lists(st.integers(-4, 3), min_size=1, max_size=4, unique_by=lambda head: head % 4)


def some_positions(data, setting, label):
    """Positions from the end, which every example has."""
    shortest = min(tokens.length for tokens in setting.batch.tokens)
    counted = st.lists(st.integers(-shortest, -1), min_size=1, max_size=shortest, unique=True)
    return data.draw(counted, label=label)


def absolute(setting, positions):
    return [[int(tokens.all[position]) for position in positions] for tokens in setting.batch.tokens]


def close(found, wanted, setting):
    torch.testing.assert_close(found, wanted, rtol=0, atol=setting.tolerance * float(wanted.abs().max()))


@every_mask
@settings(max_examples=20)
@given(data=st.data())
def test_any_edges(name, data):
    setting = MASKS[name]
    queries, keys = (some_positions(data, setting, label) for label in ("queries", "keys"))
    on, chosen = data.draw(layers, label="layers"), data.draw(heads, label="heads")
    knockout = iv.AttentionKnockout(queries, keys, on, chosen, allow_empty=True)
    length = setting.batch.inputs["input_ids"].shape[1]
    named = torch.zeros(3, 4, length, length, dtype=torch.bool)
    for row, (rows, columns) in enumerate(zip(absolute(setting, queries), absolute(setting, keys), strict=True)):
        for query in rows:
            for key in columns:
                named[row, [head % 4 for head in chosen] if chosen else slice(None), query, key] = True
    emptied, removed = [], []

    def edit(mask):
        keep = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if mask is None else mask
        keep = keep if keep.dtype == torch.bool else keep == 0
        left = keep & ~named
        emptied.append(bool((~left.any(-1) & named.any(-1)).any()))
        removed.append(int((keep & named).sum()))
        if mask is None or mask.dtype == torch.bool:
            return left
        return mask.masked_fill(named, torch.finfo(mask.dtype).min)

    edits = {("attn_mask", layer % 3): edit for layer in on}
    wanted = reference.answers(setting.raw, setting.batch.inputs, edits)
    if any(emptied):
        with pytest.raises(InterventionError, match="with no key to attend"):
            setting.vlm.run(setting.batch, knockout)
        return
    run = setting.vlm.run(setting.batch, knockout)
    close(run.logits, wanted, setting)
    assert run.receipts[0].changed == sum(removed)
    assert run.receipts[0].mass_left == 0.0


@every_mask
@settings(max_examples=20)
@given(data=st.data())
def test_any_cells(name, data):
    setting = MASKS[name]
    site = data.draw(st.sampled_from(["resid_pre", "z", "attn_out", "mlp_post", "mlp_out", "resid_post"]), label="site")
    positions, on = some_positions(data, setting, "positions"), data.draw(layers, label="layers")
    width = {"z": setting.vlm.anatomy.d_head, "mlp_post": setting.vlm.anatomy.d_mlp}.get(site, 64)
    units = data.draw(st.none() | st.lists(st.integers(0, width - 1), min_size=1, unique=True), label="units")
    chosen = data.draw(heads, label="heads") if site == "z" else None
    value = data.draw(st.sampled_from([-1.0, 0.0, 0.5]), label="value")
    cells = torch.zeros((4, width) if site == "z" else (1, width), dtype=torch.bool)
    for head in range(len(cells)):
        if chosen is None or head in [one % 4 for one in chosen]:
            cells[head, units if units is not None else slice(None)] = True
    cells = cells if site == "z" else cells[0]

    def edit(old):
        new = old.clone()
        for row, rows in enumerate(absolute(setting, positions)):
            for position in rows:
                new[row, position][cells] = value
        return new

    wanted = reference.answers(setting.raw, setting.batch.inputs, {(site, layer % 3): edit for layer in on})
    assume(not wanted.isnan().any())
    ablation = iv.Ablation(site, on, positions, chosen, units, to=value, allow_empty=True)
    close(setting.vlm.run(setting.batch, ablation).logits, wanted, setting)
