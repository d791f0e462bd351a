"""Sweeps by the light-cone engine against the same interventions one by one with other tools.

    python experiments/benchmarks/engine.py           # T = 605, 10 layers, width 512; some ten minutes
    python experiments/benchmarks/engine.py --quick   # small sizes, which say little about large ones

A LLaVA of the real class with random weights (which no time depends on) and the processor of `testbed:llava`, on one
thread. All ways run in turns in one process and are measured in processor time; wall time is noted where it tells
another story. Every ratio counts our run without interventions, which the other tools do not need. The other tools run
`MEASURED` interventions a round, other ones in every round, and their time is multiplied. Before the clock starts, each
of them must give our logits.

Ways to write the same: a plain nnsight trace, plain PyTorch hooks, and TransformerLens' `run_with_hooks`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TransformerLens asks the hub about a model that it is handed

import numpy as np
import torch
from nnsight import NNsight
from PIL import Image
from torch import Tensor

import interp_vlm as iv

MEASURED = 4
QUESTION = "is there a red 7 left of the blue 3 ? " * 3


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder and of the race."""

    side: int = 336
    layers: int = 10
    width: int = 512
    heads: int = 8
    mlp: int = 1376
    rounds: int = 7
    words: int = 25
    position_groups: int = 16
    testbed: int = 1000


QUICK = Shape(side=56, layers=3, width=64, heads=8, mlp=128, rounds=2, words=10, position_groups=4, testbed=20)


@dataclass(frozen=True)
class Edit:
    """One intervention, as every tool can make it: edges of a layer blocked, or rows of a layer replaced."""

    layer: int
    rows: tuple[int, ...]
    keys: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def knockout(self) -> iv.AttentionKnockout:
        return iv.AttentionKnockout(list(self.rows), list(self.keys), layers=[self.layer], heads=list(self.heads))

    def patch(self, source: Any) -> iv.ActivationPatch:
        return iv.ActivationPatch("resid_pre", layers=[self.layer], positions=list(self.rows), source=source)


class Bench:
    """The model, its prompt, and its copies in the hands of the other tools."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.vlm = shape, scaled_llava(shape)
        rng = np.random.default_rng(0)
        size = (shape.side, shape.side, 3)
        pictures = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for _ in range(2)]
        question = " ".join(QUESTION.split()[: shape.words])
        self.batch, self.other = (self.vlm.encode([picture], [question]) for picture in pictures)
        self.bare: Any = copy.deepcopy(self.vlm.model)  # nnsight has never seen it
        self.root: Any = NNsight(copy.deepcopy(self.vlm.model))

    @property
    def length(self) -> int:
        return self.batch.inputs["input_ids"].shape[1]

    def fresh(self) -> Any:
        """The batch as one that the engine has not seen, so that its clean run counts."""
        return copy.copy(self.batch)

    def mask(self, edit: Edit) -> Tensor:
        """The causal mask without the edit's edges."""
        keep = torch.ones(self.length, self.length, dtype=torch.bool).tril().repeat(1, self.shape.heads, 1, 1)
        rows, keys = torch.tensor(edit.rows)[:, None], torch.tensor(edit.keys)[None]
        for head in edit.heads:
            keep[0, head, rows, keys] = False
        return keep

    def by_nnsight(self, edit: Edit) -> Tensor:
        mask = self.mask(edit)
        with torch.no_grad(), self.root.trace(**self.batch.inputs):
            attention = self.root.model.language_model.layers[edit.layer].self_attn
            args, named = attention.inputs
            attention.inputs = (args, {**named, "attention_mask": mask})
            logits = self.root.output.logits.save()
        return logits[:, -1]

    def by_hooks(self, edit: Edit) -> Tensor:
        mask = self.mask(edit)

        def block(_: Any, args: Any, named: Any) -> Any:
            return args, {**named, "attention_mask": mask}

        attention = self.bare.model.language_model.layers[edit.layer].self_attn
        handle = attention.register_forward_pre_hook(block, with_kwargs=True)
        try:
            with torch.no_grad():
                return self.bare(**self.batch.inputs).logits[:, -1]
        finally:
            handle.remove()

    def patched_by_nnsight(self, edit: Edit, donor: Tensor) -> Tensor:
        rows = list(edit.rows)
        with torch.no_grad(), self.root.trace(**self.batch.inputs):
            layer = self.root.model.language_model.layers[edit.layer]
            hidden = layer.input.clone()
            hidden[:, rows] = donor[:, rows]
            layer.input = hidden
            logits = self.root.output.logits.save()
        return logits[:, -1]

    def lens(self) -> Callable[[Edit], Tensor]:
        """The same knockout with TransformerLens, on a bridge around a copy of the model."""
        from transformer_lens.model_bridge import TransformerBridge

        model: Any = copy.deepcopy(self.vlm.model)
        model.config.architectures = [type(model).__name__]  # by this it finds its adapter
        # Where TransformerLens cannot fetch a model's processor it installs torchvision, and with it another torch: it
        # is given a folder that holds the processor.
        with tempfile.TemporaryDirectory() as folder:
            self.vlm.processor.save_pretrained(folder)
            bridge: Any = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=self.vlm.tokenizer)
        ids, pixels = self.batch.inputs["input_ids"], self.batch.inputs["pixel_values"]

        def run(edit: Edit) -> Tensor:
            rows, keys = torch.tensor(edit.rows)[:, None], torch.tensor(edit.keys)[None]

            def block(scores: Tensor, hook: Any) -> Tensor:
                for head in edit.heads:
                    scores[0, head, rows, keys] = torch.finfo(scores.dtype).min
                return scores

            hooks = [(f"blocks.{edit.layer}.attn.hook_attn_scores", block)]
            with torch.no_grad():
                return bridge.run_with_hooks(ids, pixel_values=pixels, fwd_hooks=hooks)[:, -1]

        return run

    def per_row(self) -> int:
        """Multiply-adds of a token row in the matrices of a layer."""
        s = self.shape
        return 4 * s.width**2 + 3 * s.width * s.mlp

    def cells(self, layer: int, start: int) -> int:
        """Cells, layer by position, that an edit of this layer from this position on can change."""
        return (self.shape.layers - layer) * (self.length - start)

    def work(self, layer: int, start: int) -> int:
        """Multiply-adds of that cone: its rows' matrices, and each row with the keys up to itself."""
        pairs = (self.length * (self.length + 1) - start * (start + 1)) // 2
        return self.cells(layer, start) * self.per_row() + (self.shape.layers - layer) * pairs * 2 * self.shape.width


def scaled_llava(shape: Shape) -> iv.VLM:
    """LLaVA-1.5 with random weights, its picture tokens, and a decoder of the given size."""
    import transformers as hf

    words = iv.load("testbed:llava").processor
    tokenizer, side = words.tokenizer, shape.side
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=side,
            patch_size=14, projection_dim=64,
        ),
        text_config=hf.LlamaConfig(
            hidden_size=shape.width, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(side // 14) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    return iv.VLM(hf.LlavaForConditionalGeneration(config).eval().requires_grad_(False), processor, "LLaVA's shape")


def race(ways: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Processor and wall seconds of each way in each round, (round, 2), all ways in turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    order = np.random.default_rng(0)
    for number in range(-1, rounds):
        for name in order.permutation(list(ways)):
            start = time.process_time(), time.perf_counter()
            ways[name](max(number, 0))
            if number >= 0:
                seconds[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {name: np.array(values) for name, values in seconds.items()}


def row(what: str, against: str, ratios: np.ndarray, needed: str, unit: str = "times faster", note: str = "") -> Any:
    """A row of the table from (round, 2) ratios in processor and in wall time."""
    value, wall = np.median(ratios, axis=0)
    notes = [f"needed {needed}", f"{len(ratios)} rounds", f"wall {wall:.3g}", *([note] if note else [])]
    low, high = float(ratios[:, 0].min()), float(ratios[:, 0].max())
    return {
        "what": what, "against": against, "value": float(value), "low": low, "high": high, "unit": unit,
        "note": "; ".join(notes),
    }  # fmt: skip


def some(edits: Sequence[Edit], number: int) -> list[Edit]:
    """`MEASURED` of the edits, spread over all of them, and others in another round."""
    step = len(edits) // MEASURED
    return [edits[at * step + (number * 7) % step] for at in range(MEASURED)]


def agree(ours: Tensor, theirs: Tensor) -> None:
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    if gap > 1e-4:
        raise SystemExit(f"the tools do not compute the same: logits are {gap:.1e} apart")


def matmul(bench: Bench) -> Callable[[int], None]:
    """2e10 multiply-adds (less where the model is small) in the shape of the decoder's widest product."""
    s, times = bench.shape, 40
    left, right = torch.randn(bench.length, s.width), torch.randn(s.width, s.mlp)

    def run(_: int) -> None:
        for _ in range(times):
            torch.mm(left, right)

    run.work = times * bench.length * s.width * s.mlp  # type: ignore[attr-defined]
    return run


def raced(
    bench: Bench,
    what: str,
    edits: Sequence[Edit],
    ours: Callable[[Edit], Any],
    others: dict[str, tuple[Callable[[Edit], Tensor], str]],
    work: int,
    floor: str,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A sweep against the other tools and against the floor."""
    many = [ours(edit) for edit in edits]
    checked = some(edits, 0)
    for edit in checked:
        own = bench.vlm.run(bench.batch, ours(edit)).logits
        for how, _ in others.values():
            agree(own, how(edit))
    multiply = matmul(bench)

    def each(how: Callable[[Edit], Tensor]) -> Callable[[int], Any]:
        return lambda number: [how(edit) for edit in some(edits, number)]

    ways = {"ours": lambda _: iv.sweep(bench.vlm, bench.fresh(), many), "matmul": multiply}
    took = race(ways | {name: each(how) for name, (how, _) in others.items()}, bench.shape.rounds)
    measured = f"extrapolated from {MEASURED * bench.shape.rounds} of {len(edits)} measured"
    found = [
        row(what, name, took[name] * len(edits) / MEASURED / took["ours"], needed, note=measured)
        for name, (_, needed) in others.items()
    ]
    share = took["matmul"] * (work / multiply.work) / took["ours"]  # type: ignore[attr-defined]
    rate = multiply.work / np.median(took["matmul"][:, 0]) / 1e9  # type: ignore[attr-defined]
    seconds = np.median(took["ours"], axis=0)
    note = f"{work / 1e9:.3g}e9 multiply-adds at {rate:.3g}e9 a second; {seconds[0]:.3g} s, wall {seconds[1]:.3g} s"
    found.append(row(what, "the floor of its cones", share, floor, unit="of it reached", note=note))
    return found, took


def last_token(bench: Bench) -> list[dict[str, Any]]:
    """240 knockouts (layers x heads x key sets) of what the last token attends."""
    tokens, last, s = bench.batch.tokens[0], bench.length - 1, bench.shape
    image = [int(at) for at in tokens.image]
    text = [at for at in range(last) if at not in set(image)]
    sets = (image, text, [*image[::2], *text])
    edits = [
        Edit(layer, (last,), tuple(keys), (head,))
        for layer in range(s.layers)
        for head in range(s.heads)
        for keys in sets
    ]
    others = {
        "an nnsight trace each": (bench.by_nnsight, "150"),
        "a PyTorch hook each": (bench.by_hooks, "100"),
        "TransformerLens run_with_hooks each": (bench.lens(), "100"),
    }
    work = bench.work(0, 0) + sum(bench.work(edit.layer, last) for edit in edits)
    return raced(bench, f"{len(edits)} last-token knockouts", edits, Edit.knockout, others, work, "0.5")[0]


def over_depth(bench: Bench) -> list[dict[str, Any]]:
    """Knockouts of what the question attends in the picture: in every layer each head, all of them, and halves."""
    tokens, s = bench.batch.tokens[0], bench.shape
    image, question = tuple(map(int, tokens.image)), tuple(map(int, tokens.question))
    heads = tuple(range(s.heads))
    half = s.heads // 2
    groups = [*((head,) for head in heads), heads, heads[:half], heads[half:], heads[::2]]
    # In the last layer nothing reads the question's rows any more.
    edits = [Edit(layer, question, image, group) for layer in range(s.layers - 1) for group in groups]
    work = bench.work(0, 0) + sum(bench.work(edit.layer, min(question)) for edit in edits)
    others = {"an nnsight trace each": (bench.by_nnsight, "12")}
    what = f"{len(edits)} image -> question knockouts"
    return raced(bench, what, edits, Edit.knockout, others, work, "none set")[0]


def patching(bench: Bench) -> list[dict[str, Any]]:
    """Residual patching from another picture: every layer x groups of neighbouring positions."""
    s = bench.shape
    groups = [tuple(map(int, part)) for part in np.array_split(np.arange(bench.length), s.position_groups)]
    edits = [Edit(layer, group) for layer in range(s.layers) for group in groups]
    source = bench.vlm.capture(bench.other, sites=["resid_pre"])
    donors = [source.layer("resid_pre", layer) for layer in range(s.layers)]

    def by_nnsight(edit: Edit) -> Tensor:
        return bench.patched_by_nnsight(edit, donors[edit.layer])

    def ours(edit: Edit) -> iv.ActivationPatch:
        return edit.patch(source)

    whole = bench.cells(0, 0)
    ratio = whole * len(edits) / (whole + sum(bench.cells(edit.layer, min(edit.rows)) for edit in edits))
    work = bench.work(0, 0) + sum(bench.work(edit.layer, min(edit.rows)) for edit in edits)
    what = f"residual patching, {s.layers} layers x {s.position_groups} position groups"
    others = {"an nnsight trace each": (by_nnsight, f"{ratio / 2:.2f} (the areas predict {ratio:.2f})")}
    return raced(bench, what, edits, ours, others, work, "none set")[0]


def capturing(bench: Bench) -> list[dict[str, Any]]:
    """All of resid_post against the plain forward, in time and in peak memory."""
    inputs = bench.batch.inputs

    def plain(_: int) -> None:
        with torch.no_grad():
            bench.bare(**inputs)

    def capture(_: int) -> Any:
        return bench.vlm.capture(bench.fresh(), sites=["resid_post"])

    took = race({"plain": plain, "capture": capture}, 3 * bench.shape.rounds)
    timed = row(
        "capture of all resid_post", "Hugging Face forward", took["capture"] / took["plain"], "at most 1.03",
        unit="times the time",
    )  # fmt: skip
    cache = capture(0)
    asked = sum(part.nbytes for part in (cache["resid_post"], cache.positions, cache.mask))
    peaks = [peak(lambda: plain(0)), peak(lambda: capture(0))]
    share = np.full((1, 2), peaks[1] / (peaks[0] + asked))
    sizes = [f"{size / 2**20:.1f} MiB" for size in (*peaks, asked)]
    memory = row(
        "capture of all resid_post, peak memory", "Hugging Face forward and what was asked for", share, "at most 1",
        unit="times the memory",
    )  # fmt: skip
    memory["note"] = f"needed at most 1; forward {sizes[0]}, capture {sizes[1]}, asked for {sizes[2]}"
    return [timed, memory]


@contextmanager
def _allocations(found: list[tuple[int, int]]) -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield
    inner: Any = profiler.profiler
    found.extend(
        (event.start_ns(), event.nbytes()) for event in inner.kineto_results.events() if event.name() == "[memory]"
    )


def peak(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call holds at once, beyond what was there before."""
    found: list[tuple[int, int]] = []
    with _allocations(found):
        kept = call()  # what it returns counts
    del kept
    return int(np.cumsum([size for _, size in sorted(found, key=lambda one: one[0])]).max())


def small_examples(shape: Shape) -> list[dict[str, Any]]:
    """Many examples of `testbed:llava` through 100 last-token knockouts, against the whole decoder each time."""
    vlm, size = iv.load("testbed:llava"), min(50, shape.testbed)
    examples = iv.data.digit_scenes(n=shape.testbed)
    parts = [examples[at : at + size] for at in range(0, len(examples), size)]
    batches = [vlm.encode([e.image for e in part], [e.question for e in part]) for part in parts]
    keys = ["image", "question", *(iv.select.random(share, seed=1) for share in (0.25, 0.5, 0.75))]
    knockouts = [
        iv.AttentionKnockout("last", key, layers=[layer], heads=heads)
        for layer in range(4) for heads in ([0], [1], [2], [3], None) for key in keys
    ]  # fmt: skip
    part = knockouts[:: 4 if len(batches) > 1 else 10]
    agree(
        iv.sweep(vlm, copy.copy(batches[0]), part).values,
        iv.sweep(vlm, copy.copy(batches[0]), part, engine="full").values,
    )

    def ours(_: int) -> Any:
        return iv.sweep(vlm, [copy.copy(batch) for batch in batches], knockouts)

    def whole(number: int) -> Any:
        return iv.sweep(vlm, copy.copy(batches[number % len(batches)]), part, engine="full")

    took = race({"ours": ours, "full": whole}, shape.rounds)
    # The clean run of the part is counted as often as its interventions: against us by less than one part in 25.
    times = len(batches) * len(knockouts) / (len(part) + 1)
    note = f"{len(part)} knockouts of one batch of {size} measured a round; {np.median(took['ours'][:, 0]):.3g} s"
    what = f"{shape.testbed:,} examples of testbed:llava, {len(knockouts)} last-token knockouts"
    return [row(what, 'engine="full"', took["full"] * times / took["ours"], "10", note=note)]


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """What `make bench` shows."""
    torch.set_num_threads(1)
    shape = QUICK if quick else Shape()
    bench = Bench(shape)
    found = [*last_token(bench), *over_depth(bench), *patching(bench), *capturing(bench)]
    return [*found, *small_examples(shape)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    for found in rows(parser.parse_args().quick):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
