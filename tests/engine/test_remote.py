"""Runs and traces that are sent: nnsight's dry run, and a server in a process that cannot import this package."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nnsight.schema.config import CONFIG

import interp_vlm as iv
from interp_vlm import select
from tests.engine.cases import KINDS, intervention, together
from tests.engine.settings import Setting
from tests.tiny import FAMILIES

TESTBED = ("llava", "paligemma", "qwen2_vl")
SCENES = iv.data.digit_scenes(n=8)[::7]  # two pictures


@pytest.fixture(scope="module", params=TESTBED)
def vlm(request):
    return iv.load(f"testbed:{request.param}")


@pytest.fixture(scope="module")
def llava():
    return iv.load("testbed:llava")


@pytest.fixture(scope="module")
def server():
    """The address of a server that knows nothing of this package."""
    program = Path(__file__).with_name("ndif_server.py")
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, cwd="/", env=env
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


@pytest.fixture(autouse=True)
def no_status_line(monkeypatch):
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)


def encoded(vlm, step=1):
    return vlm.encode([scene.image for scene in SCENES[::step]], [scene.question for scene in SCENES])


def many(vlm):
    """Every kind of intervention, at every kind of site."""
    source = vlm.capture(encoded(vlm, -1), ["resid_pre"])
    direction = torch.linspace(-1, 1, vlm.anatomy.d_model)
    return {
        "knockout": iv.AttentionKnockout("last", "image"),
        "heads": iv.AttentionKnockout("question", "image", layers=[1], heads=[0, -1]),
        "zero": iv.Ablation("z", layers=[1], heads=[1], positions="question", to="zero"),
        "mean": iv.Ablation("mlp_post", layers=[1, 2], units=[1, 2], positions="image", to="mean"),
        "resample": iv.Ablation("resid_mid", layers=[1], positions="last", to="resample"),
        "projector": iv.Ablation("projector_out", positions=select.random(0.5, seed=0), to="mean"),
        "tower": iv.Ablation("vision_post", layers=[0], to="zero"),
        "patch": iv.ActivationPatch("resid_pre", layers=[1], positions="image", source=source),
        "steering": iv.Steering("resid_post", layers=[1, 2], positions="last", direction=direction, scale=2.0),
        "evidence": iv.Ablation("attn_out", layers=[1], positions=select.top(0.3), to="zero"),
    }


def assert_same(found, wanted):
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.clean_logits, wanted.clean_logits)
    assert (found.receipts, found.plan, found.answers) == (wanted.receipts, wanted.plan, wanted.answers)
    assert not torch.equal(found.logits, found.clean_logits)


def test_the_dry_run_gives_what_the_full_plan_gives(vlm):
    batch, single = encoded(vlm), many(vlm)
    for each in [*single.values(), [single["knockout"], single["steering"]]]:
        assert_same(vlm.run(batch, each, remote="local"), vlm.run(batch, each, engine="full"))
    assert vlm.run(batch, choices=("0", "1"), remote="local").answers == vlm.run(batch, choices=("0", "1")).answers


@pytest.mark.parametrize(
    ("family", "attn"), [(name, "sdpa") for name in FAMILIES] + [(name, "eager") for name in ("llava", "paligemma")]
)
def test_every_family_and_site_can_be_sent(family, attn):
    setting = Setting(family, attn, bits=32)
    kind = KINDS[FAMILIES.index(family) % len(KINDS)]
    cells = [intervention(kind, place, setting) for place in together(kind)]
    edits = [*cells, iv.AttentionKnockout("last", "image")]
    run = setting.vlm.run(setting.batch, edits, remote="local")
    assert_same(run, setting.vlm.run(setting.batch, edits, engine="full"))
    assert all(receipt.changed for receipt in run.receipts)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_text_alone_keeps_its_positions(padding):
    model = Setting("llava", bits=32).vlm
    batch = model.encode([[], []], ["is there a cat?", "what colour is the big square on the left?"], padding=padding)
    knockout = iv.AttentionKnockout("last", "question", layers=[0])
    assert_same(model.run(batch, knockout, remote="local"), model.run(batch, knockout, engine="full"))


def test_a_machine_without_the_package_gives_the_same(vlm, server):
    batch = encoded(vlm)
    outline = iv.load(vlm.name, remote=True)
    assert all(weight.is_meta for weight in outline.model.parameters())
    assert all(value.device.type == "cpu" for value in encoded(outline).inputs.values())
    for name, each in many(vlm).items():
        wanted = vlm.run(batch, each, engine="full")
        assert_same(outline.run(batch, each, remote=server), wanted)
        if name in ("knockout", "mean", "steering"):
            assert_same(vlm.run(batch, each, remote=server), wanted)


def test_activations_come_back(vlm, server):
    batch, sites = encoded(vlm), ["pattern", "attn_mask", "z", "vision_post"]
    knockout = iv.AttentionKnockout("last", "image", layers=[1])
    wanted = vlm.capture(batch, sites, positions="last", layers=[0, 1], interventions=knockout)
    outline = iv.load(vlm.name, remote=True)
    found = outline.capture(batch, sites, positions="last", layers=[0, 1], interventions=knockout, remote=server)
    assert all(torch.equal(found[name], wanted[name]) for name in sites)


def traced(vlm, batch, edits, remote):
    with vlm.trace(batch, remote=remote):
        early = vlm.site("resid_pre", 0).save()
        for edit in edits:
            edit.apply(vlm)
        width = vlm.nnsight.model.language_model.layers[2].mlp.down_proj.input.shape[-1].save()
        late = vlm.site("resid_post", -1).save()
        logits = vlm.nnsight.output.logits.save()
    return early, width, late, logits


def test_a_block_reads_sites_and_applies_interventions_elsewhere(vlm, server):
    batch, outline = encoded(vlm), iv.load(vlm.name, remote=True)
    edits = [many(vlm)[name] for name in ("knockout", "steering")]
    wanted = traced(vlm, batch, edits, False)
    assert torch.equal(wanted[3][torch.arange(2), batch.last], vlm.run(batch, edits, engine="full").logits)
    for model, where in ((vlm, "local"), (vlm, server), (outline, server)):
        found = traced(model, batch, edits, where)
        assert found[1] == wanted[1]
        assert all(torch.equal(mine, its) for mine, its in zip(found[::2], wanted[::2], strict=True))
        assert torch.equal(found[3], wanted[3])


def test_a_block_may_stop_before_what_is_still_to_be_applied(llava, server):
    batch = encoded(llava)
    steering = many(llava)["steering"]
    with llava.trace(batch, remote=server) as tracer:
        steering.apply(llava)
        early = llava.site("resid_post", 1).save()
        tracer.stop()
    wanted = llava.capture(batch, "resid_post", layers=1, interventions=steering)["resid_post"][:, 0]
    assert torch.equal(early, wanted)


def test_nothing_is_left_behind(llava):
    batch = encoded(llava)
    paths, modules = list(sys.path), dict(sys.modules)
    side, pad = llava.tokenizer.padding_side, llava.tokenizer.pad_token
    llava.run(batch, many(llava)["knockout"], remote="local")
    assert sys.path == paths
    assert all(sys.modules[name] is module for name, module in modules.items())
    assert (llava.tokenizer.padding_side, llava.tokenizer.pad_token) == (side, pad)
    assert not llava._live.running


def test_the_server_does_not_have_the_package(llava, server):
    """Without this, the tests above would not say much."""
    with pytest.raises(iv.ModelError, match=r"did not run this: ModuleNotFoundError: No module named 'interp_vlm'"):
        imported(llava, server)


def imported(vlm, remote):
    with vlm.trace(encoded(vlm), remote=remote):
        import interp_vlm

        logits = interp_vlm.sites_of(vlm.nnsight)["z", 1].save()
    return logits


class Halved(iv.Ablation):
    """An intervention of the user's own, close to one that can be sent."""

    def replacement(self, rows, layer, place):
        return rows / 2


def own():
    return Halved("resid_post", layers=[1], positions="last", to="zero")


REFUSED = {
    "an intervention of the user's own": (
        lambda vlm, to: vlm.run(encoded(vlm), own(), remote=to),
        iv.InterventionError,
        "Halved cannot be sent: its code is on this machine alone; expected AttentionKnockout, .* run it here",
    ),
    "the same in a block": (
        lambda vlm, to: traced(vlm, encoded(vlm), [own()], to),
        iv.InterventionError,
        "Halved cannot be sent",
    ),
    "live values": (
        lambda vlm, to: traced(vlm, encoded(vlm), [many(vlm)["mean"]], to),
        iv.InterventionError,
        r"is computed from live values .* pass to=iv.reference_mean\(...\), or use vlm.run\(batch, ..., remote=True\)",
    ),
    "another plan": (
        lambda vlm, to: vlm.run(encoded(vlm), many(vlm)["zero"], engine="suffix", remote=to),
        iv.InterventionError,
        "engine='suffix' with remote='.*'; expected engine='full', the one plan of remote runs",
    ),
    "no effect": (
        lambda vlm, to: vlm.run(encoded(vlm), iv.AttentionKnockout("image", "last"), remote=to),
        iv.InterventionError,
        "blocks no edge: the model attends none of them anyway",
    ),
    "no key left": (
        lambda vlm, to: vlm.run(encoded(vlm), iv.AttentionKnockout("last", "all"), remote=to),
        iv.InterventionError,
        "leaves position .* of example 0 with no key to attend",
    ),
    "text in the tower": (
        lambda vlm, to: vlm.run(encoded(vlm), iv.Ablation("vision_post", 0, "question", to="zero"), remote=to),
        iv.SelectionError,
        "site 'vision_post' has image tokens only",
    ),
    "two models": (
        lambda vlm, to: two_models(vlm, iv.load("testbed:paligemma", remote=True), to),
        iv.InterventionError,
        "names the model 'testbed:paligemma' too; expected one model in a block",
    ),
}


def two_models(vlm, other, remote):
    with vlm.trace(encoded(vlm), remote=remote):
        hidden = vlm.site("resid_post", 0).save()
        other.site("resid_post", 1)
    return hidden


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("rehearsed", [True, False], ids=["dry run", "server"])
def test_what_cannot_be_sent_says_so(name, rehearsed, llava, server):
    act, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        act(llava, "local" if rehearsed else server)
    batch = encoded(llava)
    assert torch.equal(llava.run(batch, remote="local").logits, llava.run(batch).logits)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([iv.AttentionKnockout("image", "last", layers=[0, 1])], r"ValueError: AttentionKnockout\(.* blocks no edge"),
        (
            [iv.AttentionKnockout("last", "all", layers=[1])],
            r"ValueError: .* leaves position \d+ of example 0 with no key",
        ),
    ],
    ids=["no effect", "no key left"],
)
def test_what_the_server_finds_wrong_in_a_block_comes_back(edits, message, llava, server):
    with pytest.raises(iv.ModelError, match=f"NDIF at {server} did not run this: {message}"):
        traced(llava, encoded(llava), edits, server)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("pattern", 0, "there is no site 'pattern' to read in a trace"),
        ("z", 4, "layer 4 does not exist; expected -4 to 3"),
    ],
)
def test_what_is_no_site_elsewhere_comes_back(name, layer, message, llava, server):
    with pytest.raises(iv.ModelError, match=message):
        site_of(llava, name, layer, server)


def site_of(vlm, name, layer, remote):
    with vlm.trace(encoded(vlm), remote=remote):
        value = vlm.site(name, layer).save()
    return value


def test_a_server_that_is_not_there_is_a_clear_error(llava):
    with socket.socket() as taken:  # a port on which nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for act in (lambda: llava.run(encoded(llava), remote=address), lambda: site_of(llava, "z", 0, address)):
            with pytest.raises(
                iv.ModelError, match=rf"NDIF at {address} cannot be reached \(.*refused\).* remote=False"
            ):
                act()
    with pytest.raises(iv.ModelError, match=r"https://nobody.invalid cannot be reached"):
        llava.run(encoded(llava), remote="https://nobody.invalid")


def test_a_model_that_is_not_deployed_is_a_clear_error(llava, server, tmp_path):
    """The server refuses what its operator calls so."""
    folder = shutil.copytree(llava.model.name_or_path, tmp_path / "refused")
    with pytest.raises(iv.ModelError, match=r"did not run this: .*no such model is deployed.*nnsight.status\(\)"):
        iv.load(str(folder), remote=True).run(encoded(llava), remote=server)


def test_ndif_wants_a_key_and_a_model_of_the_hub(llava, server, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(iv.ModelError, match=r"is a model of this machine, and NDIF cannot have it.*remote='local'"):
        llava.run(encoded(llava), remote=True)
    setting = Setting("llava", bits=32)
    with pytest.raises(iv.ModelError, match="a model without a name is a model of this machine"):
        setting.vlm.run(setting.batch, remote=server)
    known = named(llava, "org/model")
    with pytest.raises(iv.ModelError, match=r"no NDIF API key; expected a key in .* NDIF_API_KEY, .*login.ndif.us"):
        known.run(encoded(llava), remote=True)
    with pytest.raises(iv.ModelError, match=r"the Hub cannot be asked for 'org/model' \(.*HF_HUB_OFFLINE"):
        known.run(encoded(llava), remote=server)


def named(vlm, name):
    """The same outline under a name of the hub."""
    outline = iv.load(vlm.name, remote=True)
    outline.model.name_or_path = name
    return outline


def test_true_means_the_server_of_the_settings(llava, server, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", server)
    batch = encoded(llava)
    assert torch.equal(llava.run(batch, remote=True).logits, llava.run(batch).logits)


@pytest.mark.parametrize("where", ["nowhere", "api.ndif.us"])
def test_other_words_are_refused(where, llava):
    with pytest.raises(iv.InterventionError, match=f"remote={where!r}; expected True, 'local' or 'https://HOST'"):
        llava.run(encoded(llava), remote=where)


def test_a_model_without_weights_runs_nowhere_else(llava):
    outline = iv.load(llava.name, remote=True)
    batch = encoded(llava)
    for act in (
        outline.run,
        outline.generate,
        lambda batch: outline.capture(batch, "z"),
        lambda b: site_of(outline, "z", 0, False),
    ):
        with pytest.raises(
            iv.ModelError, match=r"weights of 'testbed:llava' are not on this machine; expected remote=True"
        ):
            act(batch)
    with pytest.raises(iv.ModelError, match=r"the weights of .* are not in memory"):
        outline.run(batch, remote="local")


def test_weights_are_rebuilt_with_norms_that_have_to_be_here(server, tmp_path):
    setting = Setting("qwen3_vl", bits=32)
    setting.vlm.model.save_pretrained(tmp_path)
    setting.vlm.processor.save_pretrained(tmp_path)
    outline = iv.load(str(tmp_path), remote=True)
    with pytest.raises(iv.InterventionError, match="are rebuilt with norms that are not on this machine"):
        outline.run(setting.batch, iv.AttentionKnockout("last", "image", layers=[1]), remote=server)


def test_the_documents_block_runs(tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    section = page.partition("## Remote models on NDIF")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    script = tmp_path / "block.py"  # nnsight reads the source of a trace from a file
    script.write_text(block)
    assert runpy.run_path(str(script))["hidden"].shape[-1] == 128
    assert "0.0e+00 attention left on them" in capsys.readouterr().out
