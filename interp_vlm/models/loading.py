"""Models by name: hub ids, local folders, and schemes such as `testbed:llava`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_vlm.errors import ModelError
from interp_vlm.models.processors import load_processor
from interp_vlm.models.registry import family_for

if TYPE_CHECKING:
    import torch

__all__ = ["SCHEMES", "load", "resolve"]

SCHEMES = {"testbed": "interp_vlm.testbed"}
"""Modules with a function `path(name)`, by the prefix that calls for them; imported when asked for."""


SMALL = 100_000_000
"""Bytes of weights up to which loading shows no progress bar."""


def load(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | dict[str, str] = "sdpa",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its processor, ready to be looked at: in evaluation mode, without gradients on its weights.

    Args:
        name_or_path: a hub id, a local folder, or `SCHEME:NAME` (see `SCHEMES`).
        revision: branch, tag or commit on the hub.
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own on an accelerator.
        device_map: as for `from_pretrained`; None is the CPU.
        attn_implementation: "sdpa" or "eager"; decoders that PyTorch's SDPA cannot compute (Gemma 2's soft-capped
            scores) are run eagerly under "sdpa".
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        ModelError: if there is no such folder or hub id, its architecture is not known, it has no processor, or not
            all weights.

    Example:
        >>> model, processor = load("testbed:llava")
        >>> type(model).__name__
        'LlavaForConditionalGeneration'
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = resolve(name_or_path)
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        where["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(path, **where)
    except (OSError, ValueError, KeyError) as error:
        raise _unreachable(path, error) from error
    family_for(config)
    processor = load_processor(path, **where)
    try:
        # the stubs know one of its two return types
        with _bar_for_large(path):
            found: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                output_loading_info=True,
                dtype=_dtype(dtype, device_map),
                device_map=device_map,
                attn_implementation=_attention(config, attn_implementation),
                **where,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _unreachable(path, error) from error
    model, report = found
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the checkpoint of {path} lacks {len(missing)} of the model's weights ({missing[0]}, ...)",
            expected="all of them: transformers fills the rest with random numbers",
            remedy="download or save the model again",
        )
    return model.eval().requires_grad_(False), processor


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
    scheme, colon, rest = name.partition(":")
    if colon and not Path(name).exists():
        if scheme not in SCHEMES:
            raise ModelError(
                f"{name!r} has the unknown scheme {scheme!r}",
                expected=", ".join(f"{known}:NAME" for known in SCHEMES) + ", a folder or a hub id",
            )
        return os.fspath(importlib.import_module(SCHEMES[scheme]).path(rest))
    folder = Path(name).expanduser()
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
    on_cpu = device_map is None or str(device_map) == "cpu" or not torch.accelerator.is_available()
    return torch.float32 if on_cpu else "auto"


def _attention(config: Any, asked: str | dict[str, str]) -> str | dict[str, str]:
    """SDPA has no soft-capping of scores: there the text decoder is run eagerly."""
    if asked == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return {"": "sdpa", "text_config": "eager"}
    return asked


def _unreachable(path: str, error: Exception) -> ModelError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if Path(path).is_dir():
        return ModelError(f"the model in folder {path} cannot be loaded ({reason})", remedy="check the folder's files")
    return ModelError(
        f"no model {path!r} can be loaded ({reason})",
        expected="a local folder, or a hub id that can be reached or is in the cache",
        remedy="check the name and the connection, or log in for a gated model",
    )
