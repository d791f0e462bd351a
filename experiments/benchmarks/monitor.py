"""What a reliability monitor costs over the plain forward pass of the Hugging Face model.

    python experiments/benchmarks/monitor.py                          # scaled-down LLaVA, then the embedded models
    python experiments/benchmarks/monitor.py --model llava-hf/llava-1.5-7b-hf --device cuda

All get the same encoded question and run in turns, so that a slow moment of the machine hits all; on the CPU the
process' own time counts, which other programs lengthen less. `plain` is a copy of the model that nnsight never saw,
`wrapped` the plain forward of the model as `iv.VLM` holds it. `monitor` is
`monitor.run(vlm, batch)`: the pass, the hidden state, the answer with its confidence, the score. The scaled-down model
has LLaVA-1.5's picture (24 x 24 patches, about 600 tokens), vocabulary (32,064) and proportions at an eighth of the
width and a quarter of the depth; its weights are random, which no time depends on. The embedded models take a few
milliseconds a pass, so that fixed costs weigh more than they do in any model that is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import interp_vlm as iv
from interp_vlm.models.loading import load, resolve
from interp_vlm.probes.scoring import width
from interp_vlm.readouts.identity import identity_of
from interp_vlm.stats import Estimate


def scaled_llava(side: int = 336) -> tuple[Any, Any]:
    """LLaVA-1.5 with random weights, an eighth of its width and a quarter of its depth; and a processor."""
    from transformers import (
        AutoProcessor,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = AutoProcessor.from_pretrained(resolve("testbed:llava"))
    pictures = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        pictures, words.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=words.chat_template,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, image_size=side,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=32_064
        ),
        image_token_index=words.tokenizer.convert_tokens_to_ids(words.image_token),
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False), processor


def monitor_of(vlm: iv.VLM) -> iv.ReliabilityMonitor:
    """A monitor of the model's middle layer with random weights: what it says has no say in what it costs."""
    rng, d = np.random.default_rng(0), width(vlm, "resid_post")
    auroc = Estimate(0.5, float("nan"), float("nan"), 2, 2, 0.95, "none")
    return iv.ReliabilityMonitor(
        model=identity_of(vlm), site="resid_post", layer=vlm.anatomy.n_layers // 2, weights=rng.normal(size=d),
        intercept=0.0, slope=1.0, offset=0.0, C=1.0, auroc=auroc, scores=np.array([0.4, 0.6]),
        labels=np.array([False, True]), groups=np.array([0, 1]),
    )  # fmt: skip


def measure(model: Any, processor: Any, name: str, repeats: int, warm: int = 3) -> dict[str, Any]:
    """Milliseconds of each, in turns, and the overhead with its interval (bootstrap over turns)."""
    bare, vlm = copy.deepcopy(model), iv.VLM(model, processor, name)
    example = iv.data.digit_scenes(n=1)[0]
    picture = example.image.resize((448, 448))
    batch, monitor = vlm.encode(picture, example.question), monitor_of(vlm)
    monitor.bind(vlm)

    def plain(which: Any) -> None:
        with torch.no_grad():
            _ = which(**batch.inputs).logits

    on_gpu = vlm.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(bare),
        "wrapped": lambda: plain(model),
        "monitor": lambda: monitor.run(vlm, batch),
    }
    seconds: dict[str, list[float]] = {call: [] for call in calls}
    order = np.random.default_rng(0)
    for turn in range(warm + repeats):
        for call in order.permutation(list(calls)):
            start = clock()
            calls[call]()
            if on_gpu:
                torch.cuda.synchronize()
            if turn >= warm:
                seconds[call].append(clock() - start)
    a, wrapped, b = (np.array(seconds[call]) for call in ("plain", "wrapped", "monitor"))
    drawn = np.random.default_rng(0).integers(0, repeats, (2000, repeats))
    ratios = np.median(b[drawn], axis=1) / np.median(a[drawn], axis=1) - 1.0
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "model": vlm.name,
        "device": str(vlm.device),
        "parameters_millions": round(sum(weight.numel() for weight in vlm.model.parameters()) / 1e6, 1),
        "tokens": int(batch.inputs["input_ids"].shape[1]),
        "turns": repeats,
        "clock": "wall" if on_gpu else "processor",
        "plain_ms": round(1e3 * float(np.median(a)), 3),
        "wrapped_ms": round(1e3 * float(np.median(wrapped)), 3),
        "monitor_ms": round(1e3 * float(np.median(b)), 3),
        "overhead_percent": round(100 * float(np.median(b) / np.median(a) - 1.0), 2),
        "low": round(100 * float(low), 2),
        "high": round(100 * float(high), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="by default the scaled LLaVA and the embedded models")
    parser.add_argument("--device", help="where they go, by default the CPU")
    parser.add_argument(
        "--repeats", type=int, default=30, help="turns of large models; embedded ones take ten times as many"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller picture and 5 turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 5 if options.quick else options.repeats
    print(json.dumps({"machine": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}))
    if not options.model:
        print(json.dumps(measure(*scaled_llava(112 if options.quick else 336), "scaled LLaVA", repeats)))
    for name in options.model or ("testbed:llava", "testbed:paligemma", "testbed:qwen2_vl"):
        found = load(name, device_map=options.device)
        print(json.dumps(measure(*found, name, repeats * 10 if name.startswith("testbed:") else repeats)))


if __name__ == "__main__":
    main()
