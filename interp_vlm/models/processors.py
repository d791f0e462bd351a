"""Processors as their folder describes them, loaded without the video half that would need torchvision."""

from __future__ import annotations

import functools
import inspect
import json
import os
import types
from pathlib import Path
from typing import Any

from interp_vlm.errors import ModelError

__all__ = ["check_processor", "load_processor", "still"]

_ALIKE = ({"Qwen2VLProcessor", "Qwen2_5_VLProcessor"},)
"""Processors that do the same to pictures and text."""
_NAMING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The processor of a model folder or hub id.

    Processors with a video half (Qwen-VL, InternVL, LLaVA-OneVision, SmolVLM) are loaded without it, whether or not
    torchvision is there: they take pictures and text as before, and refuse videos.

    Args:
        path: a folder as `save_pretrained` writes it, or a hub id.
        kwargs: handed on to `from_pretrained` (revision, trust_remote_code, ...).

    Raises:
        ModelError: if there is no processor with an image processor and a tokenizer.
    """
    import transformers
    from transformers.utils.import_utils import is_torchvision_available

    name = _class_name(path, kwargs)
    found = getattr(transformers, name, None) if name else None
    takes_video = found is not None and "video_processor" in inspect.signature(found.__init__).parameters
    # without torchvision every image processor falls back to PIL: say so, rather than have each load warn
    backend = {} if is_torchvision_available() else {"backend": "pil"}
    try:
        loader = still(found) if takes_video else transformers.AutoProcessor
        processor = loader.from_pretrained(path, **kwargs, **backend)
    except Exception as error:  # what spoilt files make of the loaders has no common base
        raise ModelError(
            f"no processor can be loaded from {os.fspath(path)} ({_first_line(error)})",
            expected="the files that processor.save_pretrained writes, beside config.json",
            remedy="save the model's processor into the folder",
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"{os.fspath(path)} holds a {type(processor).__name__} alone",
            expected="a processor with an image processor and a tokenizer",
            remedy="save the model's processor into the folder",
        )
    return processor


def check_processor(config: Any, processor: Any) -> None:
    """Refuse a processor that was made for another model: the pictures that it prepares would mean nothing to this one.

    Args:
        config: of the model.
        processor: about to be used with it.

    Raises:
        ModelError: another class of processor than Hugging Face pairs with the model.

    Example:
        >>> from tests.tiny import build
        >>> check_processor(build("llava")[0].config, build("qwen2_vl")[1])
        Traceback (most recent call last):
        ...
        interp_vlm.errors.ModelError: the processor is a Qwen2VLProcessor; expected the LlavaProcessor of a llava...
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    paired: Any = PROCESSOR_MAPPING.get(type(config), None)
    if paired is not None:
        names = {each.__name__ for each in type(processor).__mro__}
        alike = next((group for group in _ALIKE if paired.__name__ in group), {paired.__name__})
        if not names & alike:
            raise ModelError(
                f"the processor is a {type(processor).__name__}",
                expected=f"the {paired.__name__} of a {config.model_type} model",
                remedy="load the processor from the model's own folder",
            )


@functools.cache
def still(processor_class: type) -> type:
    """The processor class without its video half; its instances save themselves under the parent's name.

    Example:
        >>> from transformers import Qwen2VLProcessor
        >>> still(Qwen2VLProcessor).__name__, still(Qwen2VLProcessor).get_attributes()
        ('Qwen2VLProcessor', ['image_processor', 'tokenizer'])
    """
    parent: Any = processor_class
    kept = [name for name in parent.get_attributes() if name != "video_processor"]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("videos") is not None:
            raise ModelError(
                f"{parent.__name__} was loaded without video support",
                expected="pictures and text",
                remedy="for videos install torchvision and use transformers.AutoProcessor",
            )
        return parent.__call__(self, *args, **kwargs)

    body = {
        "__init__": _without_video(parent.__init__),
        # SmolVLM's chat template asks for these even without a video
        "video_processor": types.SimpleNamespace(num_frames=None, fps=None),
        "get_attributes": classmethod(lambda cls: list(kept)),
        "__call__": functools.wraps(parent.__call__)(call),
        "__module__": parent.__module__,
        "__doc__": parent.__doc__,
        "__qualname__": parent.__qualname__,
    }
    return type(parent.__name__, (parent,), body)


def _without_video(init: Any) -> Any:
    """The same `__init__` with a video processor that may be left out, wherever it stands in the signature.

    SmolVLM's also demands num2words, which spells numbers in video prompts alone: its copy believes to have it.
    """
    scope = init.__globals__
    if scope.get("num2words", ()) is None:
        scope = {**scope, "num2words": "not needed for pictures"}
    given = init.__defaults__ or ()
    defaults = (None,) * (init.__code__.co_argcount - 1 - len(given)) + given
    copy = types.FunctionType(init.__code__, scope, init.__name__, defaults, init.__closure__)
    copy.__doc__ = init.__doc__
    return copy


def _class_name(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> str | None:
    """The processor class that the folder names, else the one that its model type implies."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils.hub import cached_file

    where = {key: kwargs[key] for key in ("cache_dir", "token", "revision", "local_files_only") if key in kwargs}
    for file in _NAMING_FILES:
        try:
            found = cached_file(path, file, **where, _raise_exceptions_for_missing_entries=False)
            content = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
            named = content.get("processor_class") if isinstance(content, dict) else None
        except (OSError, ValueError, RecursionError):
            continue  # the loader proper says what is wrong
        if named:
            return named
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code", False), **where)
    except (OSError, ValueError):
        return None
    implied: Any = PROCESSOR_MAPPING.get(type(config), None)
    return None if implied is None else implied.__name__


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
