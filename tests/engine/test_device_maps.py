"""Models whose layers, embeddings and head lie on several devices: the same numbers by every plan and readout.

The devices are labels (`tests/engine/labelled.py`), and real cards where there are two: each pair that exists is a
parameter. On labels the numbers must be those of the plain model bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import interp_vlm as iv
from interp_vlm.errors import ModelError
from interp_vlm.models.anatomy import describe
from interp_vlm.models.loading import load
from tests.engine.labelled import labelled_devices
from tests.engine.readings import READINGS, encoded, many, tensors

PAIRS = [("lazy:0", "lazy:1"), *([("cuda:0", "cuda:1")] if torch.cuda.device_count() >= 2 else [])]
CASES = [("llava", "woven"), ("paligemma", "halves"), ("qwen2_vl", "memory"), ("llava", "disk")]


def around(pair: tuple[str, str]) -> AbstractContextManager[None]:
    return labelled_devices() if pair[0].startswith("lazy") else nullcontext()


def placed(model: Any, layout: str, pair: tuple[str, str]) -> dict[str, Any]:
    """A device map: tower and embeddings first, final norm and head second (but tied weights together); layers in
    halves or in turn, or ("memory", "disk") one or the other with every second layer offloaded."""
    anatomy, (first, second) = describe(model), pair
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    places: dict[str, Any] = {f"model.{name}": first for name, _ in model.model.named_children()}
    del places[anatomy.decoder]
    for name, _ in model.get_submodule(anatomy.decoder).named_children():
        places[f"{anatomy.decoder}.{name}"] = second if name in ("norm", "rotary_emb") else first
    del places[anatomy.layers]
    for layer in range(anatomy.n_layers):
        later = layer % 2 == 0 if layout in ("woven", "disk") else layer >= anatomy.n_layers // 2
        place = {"memory": "cpu", "disk": "disk"}.get(layout) if layer % 2 else None
        places[f"{anatomy.layers}.{layer}"] = place or (second if later else first)
    return places | {anatomy.head: first if tied else second}


@dataclasses.dataclass(frozen=True)
class Split:
    """A model on one device, the same on two, and the two."""

    here: iv.VLM
    away: iv.VLM
    pair: tuple[str, str]

    def compare(self, compute: Callable[[iv.VLM, iv.Batch], Any]) -> tuple[Any, Any]:
        """What both compute: equal (to the bit on labels), the second's tensors on the first of its devices."""
        with sdpa_kernel(SDPBackend.MATH):  # else it is chosen by the kind of device
            wanted = computed(self.here, compute)
            with around(self.pair):
                found = compute(self.away, encoded(self.away))
        far = 0.0 if self.pair[0].startswith("lazy") else 1e-4
        for mine, theirs in zip(tensors(found), tensors(wanted), strict=True):
            if isinstance(theirs, Tensor):
                assert mine.device in (torch.device("cpu"), torch.device(self.pair[0]))
                torch.testing.assert_close(mine.cpu(), theirs.cpu(), rtol=far, atol=far, equal_nan=True)
            else:
                assert mine == theirs
        return found, wanted


@functools.cache
def computed(vlm: iv.VLM, compute: Callable[[iv.VLM, iv.Batch], Any]) -> Any:
    return compute(vlm, encoded(vlm))


@functools.cache
def plain(family: str, device: str) -> iv.VLM:
    vlm = iv.load(f"testbed:{family}")
    return vlm if device.startswith("lazy") else iv.VLM(vlm.model.to(device), vlm.processor, vlm.name)


@pytest.fixture(
    scope="module",
    params=[(*case, pair) for pair in PAIRS for case in CASES],
    ids=lambda param: f"{param[0]}-{param[1]}-{param[2][0]}",
)
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Split:
    family, layout, pair = request.param
    here, (model, processor) = plain(family, pair[0]), load(f"testbed:{family}")
    if layout == "disk":  # nnsight's hooks, put on first, see inputs behind accelerate's, not before them
        iv.VLM(model, processor)
    with around(pair):
        folder = str(tmp_path_factory.mktemp("weights")) if layout == "disk" else None
        places, skipped = placed(model, layout, pair), model._skip_keys_device_placement
        dispatch_model(model, places, main_device=pair[0], offload_dir=folder, skip_keys=skipped)
        return Split(here, iv.VLM(model, processor, here.name), pair)


def test_labelled_devices_are_apart_as_cards_are() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with labelled_devices():
        here, there = x.to("lazy:0"), x.to("lazy:1")
        assert (here.device, (here + 1).device, there[0].device) == (torch.device("lazy:0"),) * 2 + (there.device,)
        assert torch.equal((here @ here.T).cpu(), x @ x.T)
        assert torch.equal((here + torch.tensor(1.0)).cpu(), x + 1)  # a single number on the CPU
        assert torch.equal(here[torch.tensor([1])].cpu(), x[[1]])  # an index on the CPU
        here[0] = there[1].to(here.device)
        assert torch.equal(here.cpu(), x[[1, 1]])
        for mixed in (lambda: here + there, lambda: here + x, lambda: torch.cat([here, x]), lambda: x[here.long()]):
            with pytest.raises(RuntimeError, match="at least two devices"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            here.numpy()


def runs(vlm: iv.VLM, batch: iv.Batch) -> list[iv.Run]:
    """Every intervention by the smallest plan, and some of them by the whole model."""
    asked = [*((each, "auto") for each in many(vlm)), *((each, "full") for each in many(vlm)[::4])]
    return [vlm.run(batch, each, engine=engine) for each, engine in asked]


def swept(vlm: iv.VLM, batch: iv.Batch) -> iv.Sweep:
    """The same in shared passes, and with little room for what is kept."""
    return iv.sweep(vlm, batch, many(vlm), memory="1MiB")


def test_every_plan_gives_the_same_numbers(split: Split) -> None:
    found, wanted = split.compare(runs)
    assert [run.plan for run in found] == [run.plan for run in wanted]
    assert [run.receipts for run in found] == [run.receipts for run in wanted]
    assert {run.logits.device for run in found} == {torch.device(split.pair[0])} == {split.away.device}
    plans = {"resume", "full"} if split.here.anatomy.family == "paligemma" else {"last_row", "suffix", "resume", "full"}
    assert {run.plan.name for run in found} == plans


def test_a_sweep_gives_the_same_numbers(split: Split) -> None:
    found, wanted = split.compare(swept)
    assert found.receipts == wanted.receipts


def test_the_bridge_to_transformer_lens_wants_one_device(split: Split) -> None:
    with pytest.raises(ModelError, match=f"lie on {split.pair[0]} and {split.pair[1]}; expected one device"):
        iv.to_bridge(split.away)


@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_gives_the_same_numbers(split: Split, reading: str) -> None:
    split.compare(READINGS[reading])
