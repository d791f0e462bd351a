"""What packing by length saves: questions about photographs of many sizes, and a model that takes each size as it is.

    python experiments/benchmarks/batches.py                  # 96 questions, about two minutes

A random Qwen2-VL (width 512, 8 layers, one thread) answers questions of four lengths about photographs: three quarters
in six common shapes, the others in any. "as they come" takes the data in their order and pads each batch to its largest
prompt, as the processor does; "equal lengths alone" is `iv.batches` without its sixteenth of slack. `padded` is the
share of all positions that are padding; seconds are those of the CPU, of preparing the batches and of running them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image

import interp_vlm as iv
from interp_vlm.engine import batches as packing

SHAPES = {(640, 480): 30, (480, 640): 10, (640, 427): 20, (427, 640): 5, (500, 375): 8, (612, 612): 3, None: 24}
"""Common shapes of photographs with how many of a hundred have them; None: any."""
SCALE = 1 / 4  # with patches of 4 pixels for 14: about the prompts of Qwen2-VL for photographs of these shapes
QUESTIONS = (
    "is there a red 7 ?",
    "how many digits are there ?",
    "where is the red 7 ? left or right ? answer with one word",
    "what digit is red ? look at the whole picture from left to right and answer with one word",
)


def model() -> iv.VLM:
    """A random Qwen2-VL in which, as in the published ones, the language model costs more than the vision tower."""
    known = iv.load("testbed:qwen2_vl")
    known.processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 200 * 200}
    config = known.model.config
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}  # as wide as the testbed's
    config.text_config.update({"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, **heads})
    config.text_config.layer_types = None
    config.vision_config.update({"hidden_size": 512})
    torch.manual_seed(0)
    made: Any = hf.AutoModelForImageTextToText.from_config(hf.Qwen2VLConfig(**config.to_dict()))
    return iv.VLM(made.eval(), known.processor)


def photographs(count: int) -> list[Any]:
    """Examples in random order."""
    rng, found = random.Random(0), []
    for number in range(count):
        shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
        side = rng.randint(320, 640)
        wide, high = shape or rng.choice(((640, side), (side, 640)))
        size = (round(high * SCALE), round(wide * SCALE), 3)
        pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        found.append(SimpleNamespace(id=str(number), image=Image.fromarray(pixels), question=rng.choice(QUESTIONS)))
    return found


def as_they_come(vlm: iv.VLM, examples: list[Any], size: int) -> Iterator[iv.Batch]:
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        yield vlm.encode([example.image for example in some], [example.question for example in some])


def packed(vlm: iv.VLM, examples: list[Any], size: int, slack: float = packing.SLACK) -> Iterator[iv.Batch]:
    kept, packing.SLACK = packing.SLACK, slack
    try:
        yield from (batch for _, batch in iv.batches(vlm, examples, size))
    finally:
        packing.SLACK = kept


WAYS = {
    "as they come": as_they_come,
    "iv.batches": packed,
    "equal lengths alone": lambda *what: packed(*what, slack=0.0),
}


def measured(vlm: iv.VLM, examples: list[Any], size: int, way: str) -> dict[str, Any]:
    """Seconds of the CPU to prepare and to run the batches, and what they hold."""
    start = time.process_time()
    batches = list(WAYS[way](vlm, examples, size))
    ready = time.process_time()
    for batch in batches:
        vlm.run(batch)
    done = time.process_time()
    masks = [batch.inputs["attention_mask"] for batch in batches]
    positions = sum(mask.numel() for mask in masks)
    padded = 1 - sum(int(mask.sum()) for mask in masks) / positions
    return {
        "size": size, "way": way, "batches": len(batches), "positions": positions, "padded": padded,
        "prepare": ready - start, "run": done - ready,
    }  # fmt: skip


def ready(questions: int) -> tuple[iv.VLM, list[Any]]:
    """The model, which has run once, and the examples."""
    torch.set_num_threads(1)
    vlm, examples = model(), photographs(questions)
    vlm.run(vlm.encode(examples[0].image, examples[0].question))
    return vlm, examples


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """What `make bench` shows: the gain in time, preparing included, and what is padded."""
    questions, rounds = (6, 1) if quick else (96, 3)
    vlm, examples = ready(questions)
    found = [{way: measured(vlm, examples, 16, way) for way in ("as they come", "iv.batches")} for _ in range(rounds)]
    seconds = [{way: one["prepare"] + one["run"] for way, one in turn.items()} for turn in found]
    ratios = [turn["as they come"] / turn["iv.batches"] for turn in seconds]
    padded = ", ".join(f"{one['padded']:.1%} padded {way}" for way, one in found[0].items())
    return [
        {
            "what": "questions about photographs of many sizes, batches of up to 16",
            "against": "each padded to its largest prompt",
            "value": float(np.median(ratios)),
            "low": min(ratios),
            "high": max(ratios),
            "unit": "times faster",
            "note": f"{questions} questions; {rounds} rounds; {padded}",
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=96)
    vlm, examples = ready(parser.parse_args().questions)
    print(f"{'batches of':>10}  {'':20} {'batches':>8} {'positions':>10} {'padded':>7} {'prepare':>8} {'run':>7}")
    for size in (8, 16):
        for way in WAYS:
            one = measured(vlm, examples, size, way)
            print(
                f"{size:>10}  {way:20} {one['batches']:>8} {one['positions']:>10} {one['padded']:>7.1%} "
                f"{one['prepare']:>6.2f} s {one['run']:>5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
