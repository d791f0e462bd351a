"""Recompute every figure of a model card from the saved folder, with plain PyTorch hooks.

Nothing of the library's engine is used, so the card is an independent check of it. Each question is asked through
the saved processor and the
model's own call, one at a time, in float32. Intervals are 95 % percentile intervals of a bootstrap over pictures.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_vlm.data.digits import digit_scenes
from interp_vlm.data.example import Example
from interp_vlm.testbed.build import load, question_inputs

__all__ = ["CHECKED", "Bench", "interval", "measure", "write_card"]

CHECKED = 300
"""So many questions are counted one by one in the card, for a quick check of the weights."""

_DRAWS = 3
_RESAMPLES = 2000
_SHARE = 0.30


def interval(values: Sequence[float] | np.ndarray, groups: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Mean with its 95 % interval, from resampling whole pictures.

    Args:
        values: one per question.
        groups: picture of each question.
        seed: of the resampling.

    Returns:
        `value`, `low`, `high`, `n` (questions) and `images`.

    Example:
        >>> interval([1, 0, 1, 1], ["a", "a", "b", "b"])["value"]
        0.75
    """
    values = np.asarray(values, float)
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(names), size=(_RESAMPLES, len(names)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return {
        "value": round(float(values.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "n": len(values),
        "images": len(names),
    }


class Bench:
    """An embedded model with the hooks that the card needs.

    Args:
        folder: the saved model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.model, self.processor = load(folder)
        self.eager, _ = load(folder, attn_implementation="eager")
        self._single: dict[str, int] = {}

    def inputs(self, example: Example) -> dict[str, Tensor]:
        """The example as the model's own call takes it."""
        return question_inputs(self.processor, example.image, example.question)

    def image_positions(self, inputs: Mapping[str, Tensor]) -> Bool[Tensor, " pos"]:
        """Which positions hold image tokens."""
        return inputs["input_ids"][0] == self.model.config.image_token_id

    @torch.inference_mode()
    def answer(self, inputs: Mapping[str, Tensor]) -> str:
        """The model's answer: its most likely next word."""
        return self.processor.tokenizer.decode([int(self.model(**inputs).logits[0, -1].argmax())]).strip()

    @torch.inference_mode()
    def attention(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, " patch"]:
        """Attention of the last token to each image token, mean over layers and heads."""
        maps = self.eager(**inputs, output_attentions=True).attentions
        return torch.stack([layer[0, :, -1] for layer in maps]).mean((0, 1))[self.image_positions(inputs)]

    @torch.inference_mode()
    def mean_features(self, examples: Sequence[Example]) -> Float[Tensor, "patch d"]:
        """Mean projected image tokens, place by place, over the pictures of the examples."""
        seen: list[Tensor] = []
        with _hook(
            _projector(self.model), lambda module, args, output: seen.append(output.reshape(-1, output.shape[-1]))
        ):
            for example in {example.group: example for example in examples}.values():
                self.model(**self.inputs(example))
        return torch.stack(seen).mean(0)

    @contextmanager
    def masked(self, patches: Tensor, mean: Float[Tensor, "patch d"]) -> Iterator[None]:
        """Put the mean in the place of some image tokens."""

        def replace(module: Any, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output.view(-1, output.shape[-1])[patches] = mean[patches]
            return output

        with _hook(_projector(self.model), replace):
            yield

    @torch.inference_mode()
    def answer_without_sight(self, inputs: Mapping[str, Tensor]) -> str:
        """The answer with all attention from text to image blocked before the softmax, in every layer."""
        image = self.image_positions(inputs)

        def block(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs["attention_mask"].clone()
            mask[..., (~image).nonzero(), image.nonzero().T] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        layers = self.eager.model.language_model.layers
        handles = [layer.self_attn.register_forward_pre_hook(block, with_kwargs=True) for layer in layers]
        try:
            logits = self.eager(**inputs).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return self.processor.tokenizer.decode([int(logits.argmax())]).strip()


def _projector(model: Any) -> Any:
    return model.model.visual.merger if hasattr(model.model, "visual") else model.model.multi_modal_projector


@contextmanager
def _hook(module: Any, function: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *call: None if (made := function(*call)) is None else made)
    try:
        yield
    finally:
        handle.remove()


def _most_common(examples: Sequence[Example], key: Callable[[Example], str]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        counts[key(example)][example.answer] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}


def _conditions(
    bench: Bench, examples: Sequence[Example], mean: Tensor, tick: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Whether each question is answered rightly, under each intervention."""
    right: dict[str, list[float]] = defaultdict(list)
    patches = len(mean)
    few = round(_SHARE * patches)
    groups = list(dict.fromkeys(example.group for example in examples))
    pictures = {example.group: example.image for example in examples}
    stranger = dict(zip(groups, groups[1:] + groups[:1], strict=True))
    for k, example in enumerate(examples):
        inputs = bench.inputs(example)
        order = bench.attention(inputs).argsort(descending=True)
        rng = np.random.default_rng([k])
        choices = {
            "image_mean_ablated": [torch.arange(patches)],
            "top_masked": [order[:few]],
            "bottom_masked": [order[-few:]],
        }
        choices["random_masked"] = [torch.from_numpy(rng.permutation(patches)[:few]) for _ in range(_DRAWS)]
        for name, sets in choices.items():
            hits = []
            for chosen in sets:
                with bench.masked(chosen, mean):
                    hits.append(bench.answer(inputs) == example.answer)
            right[name].append(float(np.mean(hits)))
        other = question_inputs(bench.processor, pictures[stranger[example.group]], example.question)
        right["clean"].append(bench.answer(inputs) == example.answer)
        right["images_shuffled"].append(bench.answer(other) == example.answer)
        right["text_to_image_blocked"].append(bench.answer_without_sight(inputs) == example.answer)
        tick()
    return {name: np.asarray(hits, float) for name, hits in right.items()}


def _by(examples: Sequence[Example], right: np.ndarray) -> dict[str, Any]:
    """Accuracy overall, by kind and by sort of existence question."""

    def of(keep: Callable[[Example], bool]) -> dict[str, Any]:
        chosen = [k for k, example in enumerate(examples) if keep(example)]
        return interval(right[chosen], [examples[k].group for k in chosen])

    figures = {"all": of(lambda e: True)}
    for kind in sorted({example.kind for example in examples}):
        figures[kind] = of(lambda e, kind=kind: e.kind == kind)
    for negative in sorted({str(e.meta["negative"]) for e in examples if e.meta["negative"]}):
        figures[f"existence_no_{negative}"] = of(lambda e, negative=negative: e.meta["negative"] == negative)
    figures["existence_yes"] = of(lambda e: e.kind == "existence" and e.answer == "yes")
    return figures


def measure(
    folder: str | Path, n: int = 3000, seed: int = 0, *, left_of: bool = True, progress: bool = False
) -> dict[str, Any]:
    """Every figure of the card.

    Args:
        folder: a saved model of the testbed.
        n: questions at each difficulty.
        seed: of the test scenes.
        left_of: also ask the relation between two digits.
        progress: show a progress bar.

    Returns:
        `right_of_first` (of the first `CHECKED` questions), and figures by name, each with `value`, `low`, `high`, `n`
        and `images`: accuracies, and falls of accuracy in the mask experiment.
    """
    from rich.progress import Progress

    bench = Bench(folder)
    mean = bench.mean_features(digit_scenes("validation", n=min(1200, n), seed=seed))
    standard, hard = (
        digit_scenes("test", n=n, seed=seed, difficulty=difficulty) for difficulty in ("standard", "hard")
    )
    relation = digit_scenes("test", n=min(n, 600), seed=seed, kinds=["left_of"]) if left_of else []
    known = digit_scenes("train", n=12000, seed=seed)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("measuring", total=2 * n + len(relation))

        def plain(examples: Sequence[Example]) -> np.ndarray:
            hits = []
            for example in examples:
                hits.append(bench.answer(bench.inputs(example)) == example.answer)
                bar.advance(task)
            return np.asarray(hits, float)

        right = _conditions(bench, standard, mean, lambda: bar.advance(task))
        hard_right = plain(hard)
        relation_right = plain(relation)
    groups = [example.group for example in standard]
    by_kind, by_text = _most_common(known, lambda e: e.kind), _most_common(known, lambda e: e.question)
    blind_kind = [by_kind[e.kind] == e.answer for e in standard]
    blind_text = [by_text.get(e.question, by_kind[e.kind]) == e.answer for e in standard]
    return {
        "right_of_first": int(right["clean"][:CHECKED].sum()),
        "standard": _by(standard, right["clean"])
        | ({"left_of": interval(relation_right, [e.group for e in relation])} if relation else {}),
        "hard": _by(hard, hard_right),
        "text_only": {
            "best_answer_of_kind": interval(blind_kind, groups),
            "best_answer_of_question": interval(blind_text, groups),
            "images_shuffled": interval(right["images_shuffled"], groups),
        },
        "interventions": {name: _by(standard, right[name]) for name in ("image_mean_ablated", "text_to_image_blocked")},
        "patches_masked": {
            name: {
                "accuracy": interval(right[f"{name}_masked"], groups),
                "fall": interval(right["clean"] - right[f"{name}_masked"], groups),
            }
            for name in ("top", "random", "bottom")
        }
        | {"top_minus_random_fall": interval(right["random_masked"] - right["top_masked"], groups)},
    }


def _band(figures: Mapping[str, Any]) -> dict[str, bool]:
    """The needs of the project, each met or not by the measured value."""
    standard, blind = figures["standard"], figures["text_only"]["best_answer_of_question"]
    near = {name: f["all"]["value"] - blind["value"] < 0.05 for name, f in figures["interventions"].items()}
    return {
        "accuracy of at least 0.80": standard["all"]["value"] >= 0.80,
        "existence of at least 0.85": standard["existence"]["value"] >= 0.85,
        "existence with adversarial negatives above 0.75": standard["existence_no_adversarial"]["value"] > 0.75,
        "at least 10 % errors within existence at hard difficulty": figures["hard"]["existence"]["value"] <= 0.90,
        "image mean-ablated: at most 0.05 above the text-only level": near["image_mean_ablated"],
        "text to image blocked: at most 0.05 above the text-only level": near["text_to_image_blocked"],
        "random patches masked: smaller fall than the attended ones": figures["patches_masked"][
            "top_minus_random_fall"
        ]["low"]
        > 0,
    }


def write_card(folder: str | Path, n: int = 3000, seed: int = 0, *, progress: bool = False) -> dict[str, Any]:
    """Measure a saved model and write the figures into its `card.json`, beside the facts of its training."""
    path = Path(folder) / "card.json"
    card = json.loads(path.read_text())
    figures = measure(folder, n, seed, left_of="left_of" in card["mix"], progress=progress)
    card["measured"] = {
        "how": (
            f"test glyphs, scenes of seed {seed}, one question per call through the saved processor, float32; 95 % "
            f"percentile intervals of a bootstrap over pictures ({_RESAMPLES} resamples); patches: {_SHARE:.0%} of the "
            f"image tokens by the last token's attention, mean over layers and heads, replaced by their mean over "
            f"validation pictures, {_DRAWS} random draws"
        ),
        "seed": seed,
        "n": n,
        "right_of_first": figures.pop("right_of_first"),
    }
    card["figures"], card["needed"] = figures, _band(figures)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(card, indent=1) + "\n")
    temporary.replace(path)
    return card
