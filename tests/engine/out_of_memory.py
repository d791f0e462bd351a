"""What a process does that may have little more memory than it holds: a real limit of the kernel, and real failures.

Started by `test_out_of_memory.py`; prints what happened, a line of JSON for each case.
"""

import dataclasses
import json
import resource
import sys
import tempfile
from pathlib import Path

import torch

import interp_vlm as iv

MIB = 2**20
PAGE = resource.getpagesize()
TIMES = 8


def allow(spare):
    """From now on the process may map so many MiB more than it has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + spare * MIB, resource.RLIM_INFINITY))


def everywhere():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def encoded(vlm, examples):
    return vlm.encode([example.image for example in examples], [example.question for example in examples])


class Watched:
    """A capture that is large for many examples, and the sizes at which it was tried."""

    def __init__(self, vlm):
        self.vlm, self.tried = vlm, []

    def __call__(self, _numbers, batch):
        self.tried.append(len(batch))
        cache = self.vlm.capture(batch, ["mlp_post", "pattern", "resid_post"])
        return cache["resid_post"][:, -1, -1].tolist()

    def sizes(self):
        tried, self.tried = self.tried, []
        return tried


def gap(found, wanted):
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    return float((found - wanted).abs().max() / wanted.abs().max())


def tried_by(vlm):
    """The sizes of the batches that are run without interventions from here on."""
    sizes, one = [], vlm._engine.clean.of
    vlm._engine.clean.of = lambda batch, *needs: sizes.append(len(batch)) or one(batch, *needs)
    return sizes


def mapped(vlm, examples):
    """`iv.batches` under the limit, twice."""
    watched = Watched(vlm)
    alone = [row for example in examples for row in watched((), vlm.encode(example.image, example.question))]
    watched.sizes()
    many = iv.batches(vlm, examples * TIMES, size=128)
    allow(130)
    found, first = list(many.each(watched)), watched.sizes()
    again, second = list(many.each(watched)), watched.sizes()
    passed = [len(numbers) for numbers, _ in many]
    everywhere()
    return {
        "first": first,
        "second": second,
        "passed": passed,
        "gap": gap(found, alone * TIMES),
        "same": found == again,
    }


def swept(vlm, examples):
    """A sweep over one batch that is too large, and one whose batch must stay whole."""
    few, many = encoded(vlm, examples), encoded(vlm, examples * TIMES)
    knockouts = iv.vary(iv.AttentionKnockout("last", "image"), layers=[[0], [2]])
    wanted = iv.sweep(vlm, few, knockouts)
    sizes = tried_by(vlm)
    allow(40)
    found = iv.sweep(vlm, many, knockouts)
    refused = ""
    try:
        iv.sweep(vlm, many, [iv.Ablation("mlp_post", layers=[1], to="mean")])
    except iv.DataError as error:
        refused = str(error)
    sizes = list(sizes)
    everywhere()
    right = [example.answer for example in examples] * TIMES
    wrong = ["no" if answer == "yes" else "yes" for answer in right]
    listed = iv.sweep(vlm, many, knockouts, iv.logit_difference(right, wrong))
    far = max(gap(found.values, wanted.values.repeat(1, TIMES)), gap(found.baseline, wanted.baseline.repeat(TIMES)))
    parts = [[len(issued) for issued in sweep.receipts] for sweep in (found, listed)]
    return {"sizes": sizes, "gap": far, "parts": parts, "refused": refused}


def sampled(vlm, examples):
    few, many = encoded(vlm, examples), encoded(vlm, examples * TIMES)
    wanted = iv.self_consistency(vlm, few, k=5)
    sizes = tried_by(vlm)
    allow(30)
    found = iv.self_consistency(vlm, many, k=5)
    everywhere()
    return {"sizes": sizes, "same": found.samples == wanted.samples * TIMES}


def stored(vlm, examples):
    """A store whose batches do not fit, against one of small batches."""
    examples = [dataclasses.replace(each, id=f"{each.id}-{time}") for time in range(TIMES) for each in examples]
    with tempfile.TemporaryDirectory() as folder:
        wanted = iv.store.write(f"{folder}/small", vlm, examples, "resid_post", batch_size=16)
        sizes = tried_by(vlm)
        allow(30)
        found = iv.store.write(f"{folder}/large", vlm, examples, "resid_post", batch_size=128)
        everywhere()
        far = gap(found.layer("resid_post", 3), wanted.layer("resid_post", 3))
        return {"sizes": sizes, "gap": far, "same": found.index["id"].tolist() == wanted.index["id"].tolist()}


def one(_, examples):
    """An example that does not fit by itself."""
    vlm = iv.load("testbed:qwen2_vl")
    vlm.processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 400 * 400}
    large = dataclasses.replace(examples[0], image=examples[0].image.resize((400, 400)))
    watched, refused = Watched(vlm), ""
    allow(200)
    try:
        list(iv.batches(vlm, [large, *examples[1:4]]).each(watched))
    except iv.DataError as error:
        refused = str(error)
    everywhere()
    return {"sizes": watched.sizes(), "refused": refused}


def main():
    torch.set_num_threads(1)
    examples = [each for each in iv.data.digit_scenes(n=40) if each.kind == "existence"][:16]
    for case in (mapped, swept, sampled, stored, one):
        vlm = iv.load("testbed:llava")  # anew: what did not fit is remembered for each loaded model
        sys.stdout.write(json.dumps({"case": case.__name__, **case(vlm, examples)}) + "\n")


if __name__ == "__main__":
    main()
