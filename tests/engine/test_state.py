"""Whatever happens in a run, the model afterwards is the model before: hooks, weights, configuration, logits."""

import gc
import hashlib
import threading
import warnings
import weakref

import pytest
import torch

import interp_vlm as iv
from interp_vlm.errors import InterventionError
from interp_vlm.tokens import select
from tests.engine import reference
from tests.engine.settings import Setting, pictures
from tests.tiny import FAMILIES, build

SETTING = Setting("llava", bits=32)


def state(model: torch.nn.Module) -> dict:
    """Everything about a model that a run could leave changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "gradients": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "config": model.config.to_json_string(),
        "attention": [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")],
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def stop(*_):
    raise KeyboardInterrupt("pressed")


class Interrupted(iv.Ablation):
    """An intervention during which somebody presses Ctrl-C."""

    def replacement(self, rows, layer, place):
        raise KeyboardInterrupt("pressed")


def _trace_that_raises(vlm, batch):
    with vlm.trace(batch):
        iv.AttentionKnockout().apply(vlm)
        raise ZeroDivisionError("in the block")


def _trace_that_stops(vlm, batch):
    with vlm.trace(batch) as tracer:
        iv.AttentionKnockout().apply(vlm)
        tracer.stop()


def _trace_out_of_order(vlm, batch):
    with vlm.trace(batch):
        late = vlm.site("resid_post", 2)
        early = vlm.site("resid_post", 0)
        assert late is not early


ZERO = iv.Ablation("resid_post", layers=1, to="zero")
HAPPENINGS = {
    "a run": (lambda vlm, batch: vlm.run(batch, [iv.AttentionKnockout(), ZERO]), None),
    "a run at every site": (
        lambda vlm, batch: vlm.run(
            batch, [iv.Ablation(site, layers=0, to="zero") for site in iv.SITES if site not in ("attn_mask", "pattern")]
        ),
        None,
    ),
    "a capture": (lambda vlm, batch: vlm.capture(batch, [name for name in iv.SITES if name != "vision_post"]), None),
    "a generation": (
        lambda vlm, batch: vlm.generate(batch, iv.Ablation("z", layers=0, to="zero", during="both"), max_new_tokens=3),
        None,
    ),
    "a sweep": (lambda vlm, batch: vlm.sweep(batch, iv.vary(ZERO, layers=[0, 1])), None),
    "a bad unit": (lambda vlm, batch: vlm.run(batch, iv.Ablation("mlp_post", units=[96])), InterventionError),
    "a bad shape": (lambda vlm, batch: vlm.run(batch, iv.Ablation("z", to=torch.ones(3))), InterventionError),
    "an emptied row": (lambda vlm, batch: vlm.run(batch, iv.AttentionKnockout(keys="all")), InterventionError),
    "no effect": (lambda vlm, batch: vlm.run(batch, iv.AttentionKnockout("image", "last")), InterventionError),
    "an interrupt in the forward pass": (lambda vlm, batch: vlm.run(batch, Interrupted("z")), KeyboardInterrupt),
    "an interrupt in a metric": (lambda vlm, batch: vlm.sweep(batch, [ZERO], metric=stop), KeyboardInterrupt),
    "an interrupt in a generation": (
        lambda vlm, batch: vlm.generate(batch, Interrupted("z", to="zero", during="generated"), max_new_tokens=3),
        KeyboardInterrupt,
    ),
    "an interrupt between tokens": (
        lambda vlm, batch: vlm.generate(batch, ZERO, max_new_tokens=3, stopping_criteria=[stop]),
        KeyboardInterrupt,
    ),
    "a trace that raises": (_trace_that_raises, ZeroDivisionError),
    "a trace that stops": (_trace_that_stops, None),
    "a trace out of order": (_trace_out_of_order, Exception),
}


@pytest.mark.parametrize("name", HAPPENINGS)
def test_the_model_is_as_before(name):
    vlm, batch = SETTING.vlm, SETTING.batch
    happen, expected = HAPPENINGS[name]
    logits = vlm.model(**batch.inputs).logits
    before = state(vlm.model)
    if expected is None:
        happen(vlm, batch)
    else:
        with pytest.raises(expected):
            happen(vlm, batch)
    assert state(vlm.model) == before
    assert torch.equal(vlm.model(**batch.inputs).logits, logits)
    assert torch.equal(vlm.run(batch).logits, reference.answers(SETTING.raw, batch.inputs))
    assert vlm._live.running == []
    assert not vlm.nnsight.interleaver.mediators


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_keeps_a_trace_of_its_runs(family):
    setting = Setting(family, bits=32)
    vlm, batch = setting.vlm, setting.batch
    logits = vlm.model(**batch.inputs).logits  # Hugging Face's own recorders are installed by the first call
    before = state(vlm.model)
    vlm.run(batch, [iv.AttentionKnockout(keys="question", queries="last", allow_empty=True), ZERO])
    vlm.capture(batch, ["pattern", "vision_post"], layers=0)
    vlm.generate(batch, ZERO, max_new_tokens=2)
    assert state(vlm.model) == before
    assert torch.equal(vlm.model(**batch.inputs).logits, logits)


def test_threads_do_not_meet():
    vlm, batch = SETTING.vlm, SETTING.batch
    many = [
        iv.AttentionKnockout(layers=0),
        iv.AttentionKnockout(queries="text", keys="image", layers=1),
        iv.Ablation("z", layers=1, heads=[1], to="zero"),
        iv.Ablation("resid_post", layers=0, positions="image"),
    ]
    alone = [vlm.run(batch, one).logits for one in many]
    whole = vlm.run(batch, many[0], engine="full").logits
    captured = vlm.capture(batch, "resid_post")["resid_post"]
    found: dict[int, list[bool]] = {number: [] for number in range(len(many) + 2)}

    def run(number: int) -> None:
        for _ in range(4):
            found[number].append(torch.equal(vlm.run(batch, many[number]).logits, alone[number]))

    def trace() -> None:
        for _ in range(4):
            with vlm.trace(batch):
                many[0].apply(vlm)
                logits = vlm.nnsight.output.logits.save()
            found[len(many)].append(torch.equal(logits[torch.arange(3), batch.last], whole))

    def capture() -> None:
        for _ in range(4):
            found[len(many) + 1].append(torch.equal(vlm.capture(batch, "resid_post")["resid_post"], captured))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(many))]
    threads += [threading.Thread(target=trace), threading.Thread(target=capture)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert found == {number: [True] * 4 for number in found}


@pytest.mark.parametrize("inner", ["run", "trace", "capture", "generate"])
def test_a_run_inside_a_trace_is_refused_and_harms_nothing(inner):
    vlm, batch = SETTING.vlm, SETTING.batch

    def nested():
        if inner == "trace":
            with vlm.trace(batch):
                hidden = vlm.site("resid_post", 0).save()
            return hidden
        return getattr(vlm, inner)(*([batch, "z"] if inner == "capture" else [batch]))

    vlm._engine.clean.forget(batch)  # a run that is known already needs no second one

    def outer():
        with vlm.trace(batch):
            first = vlm.site("resid_post", 0).save()
            second = nested()
            assert first is second

    with pytest.raises(InterventionError, match="inside a trace, which is still running; expected one run after anoth"):
        outer()
    assert torch.equal(vlm.run(batch).logits, reference.answers(SETTING.raw, batch.inputs))


def test_clean_runs_follow_the_weights():
    model, processor = build.__wrapped__("llava")
    vlm = iv.VLM(model, processor)
    batch = vlm.encode(pictures(0)[0], "is there a cat?")
    before = vlm.run(batch).logits
    reference.decoder_layers(model)[0].mlp.down_proj.weight.mul_(0.5)
    run = vlm.run(batch, iv.Steering("z", direction=torch.zeros(4, 16)), engine="full")
    assert not torch.equal(run.logits, before)
    assert torch.equal(run.clean_logits, run.logits)
    assert torch.equal(vlm.run(batch).logits, run.logits)
    vlm.model.double()
    doubled = vlm.encode(pictures(0)[0], "is there a cat?")
    assert vlm.run(doubled).logits.dtype == torch.float64


def test_two_wrappers_of_one_model_do_not_disturb_each_other():
    model, processor = build.__wrapped__("llava")
    first, second = iv.VLM(model, processor), iv.VLM(model, processor)
    batch = first.encode(pictures(0)[0], "is there a cat?")
    knockout = iv.AttentionKnockout()
    runs = [vlm.run(batch, knockout).logits for vlm in (first, second, first, second)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert torch.equal(first.run(batch).logits, second.run(batch).logits)


def test_batches_and_models_are_not_kept_alive():
    model, processor = build.__wrapped__("llava")
    vlm = iv.VLM(model, processor)
    batch = vlm.encode(pictures(0)[0], "is there a cat?")
    vlm.run(batch, iv.Ablation("resid_post", layers=0, positions=select.top(3)))
    dead = weakref.ref(batch), weakref.ref(model), weakref.ref(vlm)
    del batch, model, vlm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    assert [reference() for reference in dead] == [None, None, None]
