"""Stores of activations, against direct captures; killed, resumed, mixed up and too large for memory."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open

import interp_vlm as iv
from interp_vlm.data.scorers import SCORERS
from interp_vlm.readouts.identity import identity_of
from interp_vlm.readouts.lens import output_confidence
from tests.tiny import build

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def vlm():
    return iv.load("testbed:llava")


@pytest.fixture(scope="module")
def examples():
    return iv.data.digit_scenes(n=11)


def encoded(vlm, examples):
    return vlm.encode([example.image for example in examples], [example.question for example in examples])


def contents(folder):
    kinds = {".safetensors", ".parquet", ".json"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in kinds}


class TestValues:
    @pytest.mark.parametrize("positions", ["last", "question", iv.select.image & iv.select.box(0, 0, 20, 20)])
    def test_are_those_of_a_capture(self, vlm, examples, tmp_path, positions):
        sites = ["resid_post", "z", "mlp_post"]
        store = iv.store.write(
            tmp_path, vlm, examples, sites, positions, [0, -1], dtype="float32", batch_size=3, shard_examples=4
        )
        assert len(store) == 11
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 3
        for site in sites:
            for layer in (0, 3):
                values = store.layer(site, layer)
                for row, example in enumerate(examples):
                    cache = vlm.capture(encoded(vlm, [example]), site, positions, layer)
                    assert int(store.mask[row].sum()) == cache.mask.shape[1]
                    found = values[row][store.mask[row]]
                    torch.testing.assert_close(found, cache[site][0, 0], rtol=1e-4, atol=1e-4)
                    assert store.positions()[row][store.mask[row]].tolist() == cache.positions[0].tolist()
                    assert not values[row][~store.mask[row]].any()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_are_rounded_once(self, vlm, examples, tmp_path, dtype):
        store = iv.store.write(tmp_path, vlm, examples, "resid_mid", dtype=dtype, batch_size=11)
        captured = vlm.capture(encoded(vlm, examples), "resid_mid", "last")["resid_mid"]
        for layer in range(4):
            assert torch.equal(store.layer("resid_mid", layer), captured[:, layer].to(getattr(torch, dtype)))

    def test_some_examples_in_any_order(self, vlm, examples, tmp_path):
        store = iv.store.write(tmp_path, vlm, examples, "resid_post", "question", shard_examples=3)
        whole, places = store.layer("resid_post", 1), store.positions()
        for chosen in ([7], [10, 0, 3, 4, 5, 0], slice(2, 8), store.index["correct"].to_numpy(dtype=bool), range(3, 6)):
            picked = list(chosen) if isinstance(chosen, range) else chosen
            assert torch.equal(store.layer("resid_post", 1, picked), whole[picked])
            assert torch.equal(store.positions(picked), places[picked])

    def test_the_index_says_what_the_model_said(self, vlm, examples, tmp_path):
        store = iv.store.write(tmp_path, vlm, examples, "resid_post", layers=2, batch_size=4)
        run = vlm.run(encoded(vlm, examples))
        index = store.index
        assert index["id"].tolist() == [example.id for example in examples]
        assert index["group"].tolist() == [example.group for example in examples]
        assert index["kind"].tolist() == [example.kind for example in examples]
        assert index["answer"].tolist() == [str(answer) for answer in run.answers]
        right = [str(a) == e.answer for a, e in zip(run.answers, examples, strict=True)]
        assert index["correct"].tolist() == right
        assert index["confidence"].tolist() == pytest.approx(output_confidence(run.logits).tolist(), abs=1e-5)

    def test_a_rule_without_a_score_leaves_correctness_open(self, vlm, examples, tmp_path):
        scorer = SCORERS["lmms_eval"]
        store = iv.store.write(tmp_path, vlm, examples, "resid_post", layers=0, scorer=scorer, shard_examples=2)
        yes_no = [example.answer in ("yes", "no") for example in examples]
        assert any(yes_no)
        assert not all(yes_no)
        assert store.index["correct"].notna().tolist() == yes_no

    def test_a_layer_is_read_alone(self, vlm, examples, tmp_path):
        """With the bytes of all other layers destroyed, one layer still reads right."""
        store = iv.store.write(tmp_path, vlm, examples, "resid_post", "question")
        before = store.layer("resid_post", 2)
        (file,) = (tmp_path / "shards").glob("*.safetensors")
        raw = bytearray(file.read_bytes())
        header = int.from_bytes(raw[:8], "little")
        for key, entry in json.loads(raw[8 : 8 + header]).items():
            if key not in ("resid_post/2", "positions", "__metadata__"):
                start, end = (8 + header + place for place in entry["data_offsets"])
                raw[start:end] = b"\xff" * (end - start)
        file.write_bytes(raw)
        assert torch.equal(store.layer("resid_post", 2), before)
        assert store.layer("resid_post", 1).isnan().any()

    def test_overflow_of_half_precision_is_refused(self, tmp_path, examples):
        model, processor = build("llava", seed=3)
        vlm = iv.VLM(model, processor, name="loud")
        model.get_submodule(vlm.anatomy.layers)[1].mlp.down_proj.weight.data *= 1e6
        with pytest.raises(iv.DataError, match=r"resid_post/1 reaches .* float16 holds.*dtype='bfloat16'"):
            iv.store.write(tmp_path / "half", vlm, examples[:2], "resid_post")
        store = iv.store.write(tmp_path / "whole", vlm, examples[:2], "resid_post", dtype="float32")
        assert store.layer("resid_post", 1).abs().max() > 65504


class TestResuming:
    SCRIPT = """
import sys, time
import interp_vlm as iv
import torch
torch.set_num_threads(1)
vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes(n=30)
iv.store.write(sys.argv[1], vlm, examples, ["resid_post", "attn_out"], batch_size=2, shard_examples=3,
               progress=lambda n: time.sleep(0.15))
"""

    def test_after_a_kill_gives_the_same_bytes(self, vlm, tmp_path):
        script, folder = tmp_path / "write.py", tmp_path / "killed"
        script.write_text(self.SCRIPT)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 240
        while len(list(folder.glob("shards/*.parquet"))) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(list(folder.glob("shards/*.parquet")))
        assert 4 <= done < 10
        # what a kill in the middle of a write leaves behind
        (folder / "shards" / "00008.safetensors.1.tmp").write_bytes(b"half")
        (folder / "shards" / "00009.safetensors").write_bytes(b"values without an index")
        with pytest.raises(iv.DataError, match=r"unfinished \(\d of 10 shards so far\).*goes on where it was stopped"):
            iv.store.open(folder)

        examples = iv.data.digit_scenes(n=30)
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("shards/*.parquet")}
        arguments = (vlm, examples, ["resid_post", "attn_out"])
        resumed = iv.store.write(folder, *arguments, batch_size=2, shard_examples=3)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        whole = tmp_path / "whole"
        iv.store.write(whole, *arguments, batch_size=2, shard_examples=3)
        assert contents(folder) == contents(whole)
        assert len(contents(folder)) == 22
        assert not list(folder.rglob("*.tmp"))
        assert len(resumed) == 30

    def test_a_finished_store_is_left_as_it_is(self, vlm, examples, tmp_path):
        iv.store.write(tmp_path, vlm, examples, "resid_post")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != ".lock"}
        iv.store.write(tmp_path, vlm, examples, "resid_post")
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_the_number_per_shard_follows_from_the_size(self, vlm, examples, tmp_path, monkeypatch):
        monkeypatch.setattr("interp_vlm.readouts.store.SHARD_BYTES", 4 * 4 * 128 * 2)
        iv.store.write(tmp_path, vlm, examples, "resid_post")
        assert json.loads((tmp_path / "store.json").read_text())["shard_examples"] == 4
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 3


class TestRefusals:
    def test_another_models_store(self, vlm, examples, tmp_path):
        iv.store.write(tmp_path / "a", vlm, examples, "resid_post", layers=1)
        other = iv.load("testbed:paligemma")
        for act in (
            lambda: iv.store.open(tmp_path / "a", other),
            lambda: iv.store.write(tmp_path / "a", other, examples, "resid_post", layers=1),
        ):
            with pytest.raises(iv.ModelError, match=r"written by another model: name 'testbed:llava' is 'testbed:pali"):
                act()
        assert iv.store.open(tmp_path / "a", vlm).model == identity_of(vlm)

    @pytest.mark.parametrize("field", ["name", "revision", "anatomy", "prompt", "weights"])
    def test_each_part_of_the_identity_counts(self, vlm, examples, tmp_path, field):
        iv.store.write(tmp_path, vlm, examples[:2], "resid_post", layers=1)
        settings = json.loads((tmp_path / "store.json").read_text())
        settings["model"][field] += "x"
        (tmp_path / "store.json").write_text(json.dumps(settings))
        with pytest.raises(iv.ModelError, match=f"another model: {field} '"):
            iv.store.open(tmp_path, vlm)

    def test_identity_sees_weights_anatomy_and_prompt(self):
        model, processor = build("llava", seed=4)
        vlm = iv.VLM(model, processor, name="one")
        before = identity_of(vlm)
        assert identity_of(iv.VLM(*build("llava", seed=4), name="one")) == before
        assert identity_of(iv.VLM(*build("llava", seed=5), name="one")).weights != before.weights
        assert "{question}" in before.prompt
        template = processor.chat_template
        try:
            processor.chat_template = template.replace("ASSISTANT:", "BOT:")
            changed = identity_of(vlm)
        finally:
            processor.chat_template = template
        assert [f.name for f in dataclasses.fields(before) if getattr(before, f.name) != getattr(changed, f.name)] == [
            "prompt"
        ]

    def test_another_selection_or_other_examples(self, vlm, examples, tmp_path):
        iv.store.write(tmp_path, vlm, examples, "resid_post", layers=1)
        same = (tmp_path, vlm)
        with pytest.raises(iv.DataError, match=r"begun differently: sites was .*\[1\].* and is .*\[2\]"):
            iv.store.write(*same, examples, "resid_post", layers=2)
        with pytest.raises(iv.DataError, match="begun differently: positions was last and is image"):
            iv.store.write(*same, examples, "resid_post", "image", layers=1)
        with pytest.raises(iv.DataError, match="begun differently: dtype"):
            iv.store.write(*same, examples, "resid_post", layers=1, dtype="float32")
        with pytest.raises(iv.DataError, match="begun differently: examples was 11 and is 10"):
            iv.store.write(*same, examples[:10], "resid_post", layers=1)
        with pytest.raises(iv.DataError, match="begun differently: fingerprint"):
            iv.store.write(*same, iv.data.digit_scenes(n=11, seed=5), "resid_post", layers=1)
        with pytest.raises(iv.DataError, match="begun differently: scorer was vqa"):
            iv.store.write(*same, examples, "resid_post", layers=1, scorer=SCORERS["exact"])

    def test_bad_input(self, vlm, examples, tmp_path):
        with pytest.raises(iv.InterventionError, match=r"'pattern' cannot be stored; expected one of projector_out"):
            iv.store.write(tmp_path, vlm, examples, "pattern")
        with pytest.raises(iv.InterventionError, match="layer"):
            iv.store.write(tmp_path, vlm, examples, "resid_post", layers=7)
        with pytest.raises(iv.DataError, match="dtype 'int8'"):
            iv.store.write(tmp_path, vlm, examples, "resid_post", dtype="int8")
        with pytest.raises(iv.DataError, match="stands for several examples"):
            iv.store.write(tmp_path, vlm, [examples[0], examples[0]], "resid_post")
        with pytest.raises(iv.DataError, match="0 examples"):
            iv.store.write(tmp_path, vlm, [], "resid_post")
        with pytest.raises(iv.DataError, match="holds no store"):
            iv.store.open(tmp_path / "nowhere")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("precious")
        with pytest.raises(iv.DataError, match=r"holds thesis\.txt and no store"):
            iv.store.write(tmp_path / "full", vlm, examples, "resid_post")

    def test_reading_what_is_not_there(self, vlm, examples, tmp_path):
        store = iv.store.write(tmp_path, vlm, examples, "resid_post", layers=[0, 2])
        with pytest.raises(iv.InterventionError, match="no layer 1 of 'resid_post'; expected one of 0, 2"):
            store.layer("resid_post", 1)
        with pytest.raises(iv.InterventionError, match="holds no 'z'"):
            store.layer("z", 0)
        with pytest.raises(iv.DataError, match="store of 11"):
            store.layer("resid_post", 0, [11])
        with pytest.raises(iv.DataError, match="no example of 11"):
            store.layer("resid_post", 0, [])
        (file,) = (tmp_path / "shards").glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(iv.DataError, match=r"cannot be read.*delete the shard's \.parquet"):
            store.layer("resid_post", 0)
        shutil.copy(__file__, tmp_path / "store.json")
        with pytest.raises(iv.DataError, match="is no JSON"):
            iv.store.open(tmp_path)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from interp_vlm.readouts.shards import Block, read_rows, write_shard
torch.set_num_threads(1)
folder, shards, layers, width = Path(sys.argv[1]), int(sys.argv[2]), 16, 2048

def block(start):
    values = torch.full((16, layers, 1, width), float(start % 100))
    rows = [{"id": str(start + i)} for i in range(16)]
    return Block({"resid_post": values}, {"resid_post": range(layers)}, torch.zeros(16, 1, dtype=torch.long),
                 torch.ones(16, 1, dtype=torch.bool), rows)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder.mkdir()
write_shard(folder, 0, (block(16 * i) for i in range(4)), torch.float16)  # imports and buffers
first = peak()
for number in range(1, shards):
    write_shard(folder, number, (block(64 * number + 16 * i) for i in range(4)), torch.float16)
written = peak()
for number in range(shards):
    assert read_rows(folder, number, ("resid_post", 5), [(0, 64)]).shape == (64, 1, width)[::2]
print(first, written, peak())
"""


def test_memory_is_bounded_by_the_shard(tmp_path):
    """3,000 x 32 x 4,096 scaled down by 8: 40 shards of 4 MiB through the same writer take the memory of one."""
    script = tmp_path / "memory.py"
    script.write_text(MEMORY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "shards"), "40"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, written, read = map(float, done.stdout.split())
    total = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors")) / 2**20
    assert total > 155
    assert written - first < 24
    assert read - first < 48
    with safe_open(tmp_path / "shards" / "00039.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"positions", *(f"resid_post/{layer}" for layer in range(16))}
        assert file.get_tensor("resid_post/15")[0, 0] == (64 * 39) % 100
    assert len(pd.read_parquet(tmp_path / "shards" / "00039.parquet")) == 64
