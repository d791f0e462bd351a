"""Models by name: hub ids, local folders, and schemes such as `testbed:llava`."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_vlm.errors import ModelError
from interp_vlm.models.placement import check_placement, computes_on_cpu
from interp_vlm.models.processors import check_processor, load_processor
from interp_vlm.models.registry import family_for

if TYPE_CHECKING:
    import torch

__all__ = ["SCHEMES", "check_devices", "load", "resolve"]

SCHEMES = {"testbed": "interp_vlm.testbed"}
"""Modules with a function `path(name)`, by the prefix that calls for them; imported when asked for."""
SMALL = 100_000_000
"""Bytes of weights up to which loading shows no progress bar."""
FEWEST = 0.2
"""Bytes that a weight takes in a file at least, however it was quantised."""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    attn_implementation: str | dict[str, str] = "sdpa",
    trust_remote_code: bool = False,
    remote: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its processor, ready to be looked at: in evaluation mode, without gradients on its weights.

    Args:
        name_or_path: a hub id, a local folder, or `SCHEME:NAME` (see `SCHEMES`).
        revision: branch, tag or commit on the hub.
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own on an accelerator.
        device_map: where the weights lie: a device, "auto" (over all cards, then memory, then the disk), or a place for
            each part, accelerate's way; None is the CPU.
        max_memory: how much each device may take of a map such as "auto": `{0: "20GiB", "cpu": "60GiB"}`.
        offload_folder: where weights for the disk go that are not read from the checkpoint's safetensors files.
        attn_implementation: "sdpa" or "eager"; decoders that PyTorch's SDPA cannot compute (Gemma 2's soft-capped
            scores) are run eagerly under "sdpa".
        trust_remote_code: run modelling code that comes with the checkpoint.
        remote: build the model on the meta device, without its weights.

    Raises:
        ModelError: if there is no such folder or hub id, its architecture is not known, it has no processor, not all
            weights, or there is no such place as it is to lie in.

    Example:
        >>> model, processor = load("testbed:llava")
        >>> type(model).__name__
        'LlavaForConditionalGeneration'
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = resolve(name_or_path)
    check_placement(device_map, max_memory, offload_folder)
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        where["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(path, **where)
    except Exception as error:  # what spoilt files make of the loaders has no common base
        raise _unreachable(path, error) from error
    family_for(config)
    _check_size(config, path, trust_remote_code)
    processor = load_processor(path, **where)
    check_processor(config, processor)
    if remote:
        return _outline(config, path, _attention(config, attn_implementation), dtype, trust_remote_code), processor
    try:
        # the stubs know one of its two return types
        with _bar_for_large(path):
            found: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                output_loading_info=True,
                dtype=_dtype(dtype, device_map),
                device_map=device_map,
                max_memory=None if max_memory is None else dict(max_memory),
                offload_folder=None if offload_folder is None else os.fspath(offload_folder),
                attn_implementation=_attention(config, attn_implementation),
                **where,
            )
    except Exception as error:
        raise _unreachable(path, error) from error
    model, report = found
    _check_weights(model, report, path)
    return model.eval().requires_grad_(False), processor


def _outline(config: Any, path: str, attention: Any, dtype: Any, trust_remote_code: bool) -> Any:
    """The model on the meta device: its modules and their sizes, in the checkpoint's own dtype."""
    import torch
    from transformers import AutoModelForImageTextToText

    kinds = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, **({"dtype": dtype} if dtype else {}), **kinds)
    except Exception as error:
        raise _unreachable(path, error) from error
    return model.eval().requires_grad_(False)


def _check_size(config: Any, path: str, trust_remote_code: bool) -> None:
    """Refuse a configuration of far more weights than the folder's files can hold, before memory is filled with them.

    A spoilt text_config, for one, turns silently into that of a model of seven thousand million weights.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    files = [file for ending in ("*.safetensors", "*.bin") for file in Path(path).glob(ending)]
    if not files:
        return
    try:
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:
        return  # the loader proper says what is wrong
    wanted = sum(weight.numel() for weight in empty.parameters())
    held = sum(file.stat().st_size for file in files)
    if wanted > held / FEWEST:
        raise ModelError(
            f"the model in folder {path} cannot be loaded: {held} bytes for the {wanted} weights of config.json",
            expected=f"at least {FEWEST} bytes a weight",
            remedy="check config.json, or download the model again",
        )


def _check_weights(model: Any, report: Mapping[str, Any], path: str) -> None:
    """Refuse weights that are missing, left over, not numbers, or nowhere."""
    again = "download or save the model again"
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the checkpoint of {path} lacks {len(missing)} of the model's weights ({missing[0]}, ...)",
            expected="all of them: transformers fills the rest with random numbers",
            remedy=again,
        )
    count = model.config.get_text_config().num_hidden_layers
    for name in sorted(report["unexpected_keys"]):
        found = None if "vision" in name or "visual" in name else re.search(r"\.layers\.(\d+)\.", name)
        if found and int(found[1]) >= count:
            raise ModelError(
                f"the checkpoint of {path} holds weights of a decoder layer {found[1]} ({name})",
                expected=f"{count} layers, as config.json says",
                remedy="check num_hidden_layers in config.json",
            )
    check_devices(model)
    for name, weight in model.named_parameters():
        if not weight.is_meta and _odd(weight):
            raise ModelError(f"weight {name} of {path} holds NaN or infinity", expected="numbers", remedy=again)


def check_devices(model: torch.nn.Module) -> None:
    """Refuse a model without numbers, and one that lies on several devices with nothing that carries data between them.

    Raises:
        ModelError: a weight on the meta device, or weights on several devices, unless a device map put them there; a
            weight on another device than where the map runs its module.
    """
    placed = getattr(model, "hf_device_map", {})
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if hooked or any(str(place) != "meta" for place in placed.values()):
        # With accelerate: weights that wait in memory or on the disk look as if they were on the meta device.
        _check_placed(model, placed)
        return
    first: tuple[str, torch.device] | None = None
    for name, weight in model.named_parameters():
        first = first or (name, weight.device)
        if weight.is_meta:
            raise ModelError(
                f"weight {name} is on the meta device, where there are no numbers",
                expected="weights in memory",
                remedy="load the model with from_pretrained, or move it with to_empty and fill it",
            )
        if weight.device != first[1]:
            raise ModelError(
                f"weight {name} is on {weight.device}, and {first[0]} on {first[1]}",
                expected="one device, or a device map",
                remedy="move the model: model.to(device), or load it with device_map='auto'",
            )


def _check_placed(model: torch.nn.Module, placed: Mapping[str, Any]) -> None:
    """Refuse parts on the meta device, and tied weights that are sent to several devices, of which one has them."""
    import torch

    for part, place in placed.items():
        if str(place) == "meta":
            raise ModelError(
                f"the device map puts {part!r} on the meta device, where there are no numbers",
                expected="'cpu' or 'disk'",
            )
    for path, module in model.named_modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is None:
            continue
        run = torch.device(place)
        for name, weight in module.named_parameters(path, recurse=False):
            held = weight.device
            if not weight.is_meta and (held.type, held.index or 0) != (run.type, run.index or 0):
                raise ModelError(
                    f"weight {name} is on {held}, and the device map runs {path} on {run}",
                    expected="tied weights (word embeddings and output head) on one device",
                    remedy="put both parts on the same device",
                )


def _odd(weight: torch.Tensor) -> bool:
    """Whether a weight holds NaN or infinity: their sum does, too, but a sum may also overflow."""
    if not weight.is_floating_point() or bool(weight.float().sum().isfinite()):
        return False
    return not bool(weight.isfinite().all())


@contextmanager
def _bar_for_large(path: str) -> Iterator[None]:
    """No progress bar for a local checkpoint that loads in a blink."""
    from transformers.utils import logging

    weights = Path(path).glob("*.safetensors") if Path(path).is_dir() else ()
    small = bool(sizes := [file.stat().st_size for file in weights]) and sum(sizes) < SMALL
    shown = logging.is_progress_bar_enabled()
    if small and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if small and shown:
            logging.enable_progress_bar()


def resolve(name_or_path: str | os.PathLike[str]) -> str:
    """The folder or hub id behind a name.

    Example:
        >>> resolve("llava-hf/llava-1.5-7b-hf")
        'llava-hf/llava-1.5-7b-hf'
    """
    name = os.fspath(name_or_path)
    try:
        folder = Path(name).expanduser()
        folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a NUL
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ModelError(f"{name!r} is no path ({why})", expected="a model folder or a hub id") from error
    scheme, colon, rest = name.partition(":")
    if colon and not folder.exists():
        if scheme not in SCHEMES:
            raise ModelError(
                f"{name!r} has the unknown scheme {scheme!r}",
                expected=", ".join(f"{known}:NAME" for known in SCHEMES) + ", a folder or a hub id",
            )
        return os.fspath(importlib.import_module(SCHEMES[scheme]).path(rest))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"folder {name} has no config.json", expected="a model folder as save_pretrained writes it",
                remedy="give the folder that holds config.json and the weights",
            )  # fmt: skip
        return os.fspath(folder)
    if not _may_be_hub_id(name):
        raise ModelError(
            f"there is no model folder {name}", expected="an existing folder, or a hub id such as 'org/model'",
            remedy="check the path",
        )  # fmt: skip
    return name


def _may_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    return 1 <= len(parts) <= 2 and all(part and part[0] not in ".~" for part in parts) and not Path(name).exists()


def _dtype(dtype: Any, device_map: Any) -> Any:
    import torch

    if dtype is not None:
        return dtype
    return torch.float32 if computes_on_cpu(device_map) else "auto"


def _attention(config: Any, asked: str | dict[str, str]) -> str | dict[str, str]:
    """SDPA has no soft-capping of scores: there the text decoder is run eagerly."""
    if asked == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return {"": "sdpa", "text_config": "eager"}
    return asked


def _unreachable(path: str, error: Exception) -> ModelError:
    import torch

    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        remedy = "pass device_map='auto', with max_memory= to leave room for runs, or dtype='bfloat16'"
        return ModelError(f"the model {path} does not fit ({reason})", expected="enough memory", remedy=remedy)
    if "device_map" in reason:
        return ModelError(f"the model {path} cannot be placed ({reason})", remedy="check device_map, or pass 'auto'")
    if Path(path).is_dir():
        return ModelError(f"the model in folder {path} cannot be loaded ({reason})", remedy="check the folder's files")
    return ModelError(
        f"no model {path!r} can be loaded ({reason})",
        expected="a local folder, or a hub id that can be reached or is in the cache",
        remedy="check the name and the connection, or log in for a gated model",
    )
