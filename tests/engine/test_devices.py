"""Models whose weights wait in memory or on the disk: the same numbers by every plan and readout."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload

import interp_vlm as iv
from interp_vlm import select
from interp_vlm.engine.devices import input_device

FAMILIES = ("llava", "paligemma", "qwen2_vl")
SCENES = iv.data.digit_scenes(n=2)
LAYER = 1


def encoded(vlm):
    return vlm.encode([scene.image for scene in SCENES], [scene.question for scene in SCENES])


@pytest.fixture(scope="module", params=[f"{family}-{where}" for family in FAMILIES for where in ("memory", "disk")])
def pair(request, tmp_path_factory):
    """A model as it is, and the same with its weights elsewhere."""
    family, where = request.param.split("-")
    here, away = (iv.load(f"testbed:{family}") for _ in range(2))
    device = torch.device("cpu")
    if where == "memory":
        cpu_offload(away.model, execution_device=device)
    else:
        disk_offload(away.model, str(tmp_path_factory.mktemp("weights")), execution_device=device)
    assert all(weight.is_meta for weight in away.model.parameters())
    return here, iv.VLM(away.model, away.processor, away.name)


def many(vlm):
    width = vlm.anatomy.d_model
    return [
        iv.AttentionKnockout("last", "image", layers=[LAYER], heads=[0, 1]),
        iv.AttentionKnockout("question", "image", layers=[LAYER]),
        iv.Ablation("mlp_post", layers=[LAYER], units=[1, 2], positions="last", to="mean"),
        iv.Ablation("z", layers=[LAYER], heads=[1], positions="question", to="zero"),
        iv.Steering("resid_post", layers=[LAYER], positions="last", direction=torch.ones(width), scale=2.0),
        iv.Ablation("resid_post", layers=[LAYER], positions="all", to="mean"),
        iv.Ablation("projector_out", positions=select.random(0.5, seed=0), to="mean"),
        iv.Ablation("vision_post", layers=[0], to="zero"),
    ]


def test_inputs_go_where_the_first_layer_runs(pair):
    here, away = pair
    assert (here.device, away.device) == (torch.device("cpu"), torch.device("cpu"))
    assert away.model.device.type == "meta"  # what asking the model itself would give
    assert input_device(torch.nn.Linear(1, 1, device="meta")).type == "meta"
    assert all(value.device.type == "cpu" for value in encoded(away).inputs.values())


def test_every_plan_gives_the_same_numbers(pair):
    here, away = pair
    batch, other = encoded(here), encoded(away)
    names = set()
    for each in many(here):
        wanted = here.run(batch, each, engine="full")
        assert torch.equal(away.run(other, each, engine="full").logits, wanted.logits)
        found, same = away.run(other, each), here.run(batch, each)
        assert torch.equal(found.logits, same.logits)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        assert found.plan == same.plan
        assert found.receipts == same.receipts
        names.add(found.plan.name)
    wanted = {"resume", "full"} if here.anatomy.family == "paligemma" else {"last_row", "suffix", "resume", "full"}
    assert names == wanted
    assert torch.equal(iv.sweep(away, other, many(away)).values, iv.sweep(here, batch, many(here)).values)


class Counted(dict[str, torch.Tensor]):
    """Weights in memory, and how often each was brought in."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(weights)
        self.times = Counter[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.times[name] += 1
        return super().__getitem__(name)


def test_a_plan_brings_in_the_layers_that_it_computes():
    vlm = iv.load("testbed:llava")
    held = Counted({name: weight.detach() for name, weight in vlm.model.state_dict().items()})
    cpu_offload(vlm.model, execution_device=torch.device("cpu"), state_dict=held)
    vlm = iv.VLM(vlm.model, vlm.processor)
    batch, anatomy = encoded(vlm), vlm.anatomy
    decoder = {name for name in held if name.startswith((f"{anatomy.layers}.", anatomy.final_norm, anatomy.head))}

    def brought(compute: Callable[[], Any]) -> dict[str, int]:
        held.times.clear()
        compute()
        return dict(held.times)

    whole = brought(lambda: vlm.model(**batch.inputs))  # accelerate asks more than once for a weight

    def above(first: int) -> dict[str, int]:
        below = tuple(f"{anatomy.layers}.{layer}." for layer in range(first))
        return {name: times for name, times in whole.items() if name in decoder and not name.startswith(below)}

    layers, heads = [[1], [2], [3]], [[0], [1], [2]]
    many = iv.vary(iv.AttentionKnockout("last", "image"), layers=layers, heads=heads)
    iv.sweep(vlm, batch, many)  # the run without interventions, and the proof of the layers
    edits = {
        "last_row": (many[-1], above(3)),
        "suffix": (iv.AttentionKnockout("question", "image", layers=[2]), above(2)),
        "resume": (iv.Ablation("resid_post", layers=[1], positions="all", to="zero"), above(1)),
        "full": (iv.Ablation("projector_out", positions=select.random(0.5, seed=0), to="zero"), above(0)),
    }
    for name, (edit, wanted) in edits.items():
        assert vlm.plan(batch, edit).name == name
        vlm.run(batch, edit)  # what it starts from
        assert brought(lambda edit=edit: vlm.run(batch, edit)) == wanted, name
    iv.sweep(vlm, batch, many)
    assert brought(lambda: iv.sweep(vlm, batch, many)) == above(1)
    assert brought(lambda: vlm.run(batch, iv.Ablation("vision_post", layers=[0], to="zero"))) == whole


def arrays(result: Any) -> list[torch.Tensor]:
    return [value for value in vars(result).values() if isinstance(value, torch.Tensor)]


READOUTS = {
    "pattern": lambda vlm, batch: vlm.capture(batch, ["resid_post", "pattern"]).activations["pattern"],
    "tower": lambda vlm, batch: vlm.capture(batch, ["vision_post"]).activations["vision_post"],
    "lens": lambda vlm, batch: iv.logit_lens(vlm, batch),
    "margin": lambda vlm, batch: iv.truth_margin(vlm, batch, correct="0", wrong="1"),
    "heads": lambda vlm, batch: iv.head_contributions(vlm, batch, correct="0", wrong="1"),
    "consistency": lambda vlm, batch: iv.self_consistency(vlm, batch, k=3),
    "generation": lambda vlm, batch: vlm.generate(batch, max_new_tokens=3).ids,
    "attribution": lambda vlm, batch: iv.attribution(
        vlm, batch, vlm.encode([scene.image for scene in SCENES[::-1]], [scene.question for scene in SCENES]), "z"
    ),
}


@pytest.mark.parametrize("readout", READOUTS)
def test_every_readout_gives_the_same_numbers(pair, readout):
    wanted, found = (READOUTS[readout](vlm, encoded(vlm)) for vlm in pair)
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
        return
    assert dataclasses.is_dataclass(wanted)
    assert arrays(wanted)
    for mine, theirs in zip(arrays(found), arrays(wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
