"""A monitor on disk: numbers in a safetensors file, everything else in JSON that names it; nothing is executed.

The JSON holds a digest of itself and of the tensors, so that a file which was edited, cut or exchanged is noticed. The
tensors' name holds their digest and the JSON is renamed into place last: a stop in the middle leaves the old monitor.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from interp_vlm.errors import DataError
from interp_vlm.probes.monitor import ReliabilityMonitor
from interp_vlm.probes.thresholds import Threshold
from interp_vlm.readouts.identity import ModelIdentity
from interp_vlm.readouts.shards import replace_whole
from interp_vlm.sites import SITES
from interp_vlm.stats import Estimate

__all__ = ["load", "save"]

FORMAT = 1
NAME = "monitor.json"
TENSORS = {"weights": np.float64, "scores": np.float64, "labels": np.bool_, "groups": np.int64}


def save(monitor: ReliabilityMonitor, folder: Path) -> Path:
    """See `ReliabilityMonitor.save`."""
    from safetensors.numpy import save as packed

    data = packed({name: np.ascontiguousarray(getattr(monitor, name), dtype) for name, dtype in TENSORS.items()})
    digest = hashlib.sha256(data).hexdigest()
    facts: dict[str, Any] = {
        "format": FORMAT,
        "tensors": f"monitor-{digest[:16]}.safetensors",
        "tensors_sha256": digest,
        "position": monitor.position,
        "model": asdict(monitor.model),
        "auroc": _finite(asdict(monitor.auroc)),
        "threshold": None if monitor.threshold is None else asdict(monitor.threshold),
        "kinds": list(monitor.kinds),
        "choices": None if monitor.choices is None else list(monitor.choices),
        **{name: getattr(monitor, name) for name in _PLAIN},
    }
    facts["sha256"] = _digest(facts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder} ({error.strerror})", remedy="choose another") from error
    replace_whole(folder / facts["tensors"], lambda path: path.write_bytes(data))
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    replace_whole(folder / NAME, lambda path: path.write_text(text, encoding="utf-8"))
    for old in folder.glob("monitor-*.safetensors"):
        if old.name != facts["tensors"]:
            old.unlink(missing_ok=True)
    return folder


def load(folder: Path) -> ReliabilityMonitor:
    """See `ReliabilityMonitor.load`."""
    path = folder / NAME
    facts = _json(path)
    if facts.get("format") != FORMAT:
        raise DataError(f"{path} has the format {facts.get('format')!r}", expected=str(FORMAT), remedy="fit it again")
    if facts.get("sha256") != _digest({name: value for name, value in facts.items() if name != "sha256"}):
        raise _spoilt(path, "was changed after it was written")
    for name, (wanted, check) in _FACTS.items():
        if name not in facts or not check(facts[name]):
            raise _spoilt(path, f"has {name} {facts.get(name)!r}, not {wanted}")
    if unknown := sorted(set(facts) - set(_FACTS) - {"format", "sha256"}):
        raise _spoilt(path, f"has the unknown field {unknown[0]!r}")
    arrays = _tensors(folder / facts["tensors"], facts["tensors_sha256"])
    auroc = facts["auroc"] | {name: math.nan for name in ("value", "low", "high") if facts["auroc"][name] is None}
    return ReliabilityMonitor(
        model=ModelIdentity.from_json(facts["model"]),
        auroc=Estimate(**auroc),
        threshold=None if facts["threshold"] is None else Threshold(**facts["threshold"]),
        kinds=tuple(facts["kinds"]),
        choices=None if facts["choices"] is None else tuple(facts["choices"]),
        **{name: facts[name] for name in _PLAIN},
        **arrays,
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(
            f"{path.parent} holds no monitor (no {NAME})", expected="a folder that a monitor was saved to",
            remedy="check the path",
        )  # fmt: skip
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _spoilt(path, f"is no JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise _spoilt(path, "is no JSON object")
    return found


def _tensors(path: Path, digest: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as unpacked

    try:
        data = path.read_bytes()
    except OSError as error:
        raise _spoilt(path, f"cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise _spoilt(path, "was changed or cut after it was written")
    try:
        arrays = unpacked(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise _spoilt(path, f"is no safetensors file ({error})") from error
    if set(arrays) != set(TENSORS):
        raise _spoilt(path, f"holds {', '.join(sorted(arrays))}, not {', '.join(TENSORS)}")
    lengths = {len(arrays[name]) for name in ("scores", "labels", "groups") if arrays[name].ndim == 1}
    for name, dtype in TENSORS.items():
        found = arrays[name]
        if found.dtype != dtype or found.ndim != 1 or not len(found) or not bool(np.isfinite(found).all()):
            raise _spoilt(path, f"has {name} of {found.dtype} {found.shape}, not finite numbers in a row")
    if len(lengths) != 1 or arrays["scores"].min() < 0.0 or arrays["scores"].max() > 1.0:
        raise _spoilt(path, "has scores, labels and groups that do not fit together")
    return arrays


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()}


def _spoilt(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}", expected="the file as it was saved", remedy="save or copy the monitor again")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _record(**checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return (
            isinstance(value, dict) and set(value) == set(checks) and all(checks[name](value[name]) for name in checks)
        )

    return check


def _named(kind: type, checks: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """A dataclass' fields, each with the check of its annotation."""
    return _record(**{field.name: checks[str(field.type)] for field in fields(kind)})


_TYPES: dict[str, Callable[[Any], bool]] = {
    "float": _number, "float | None": _maybe(_number), "int": _whole, "int | None": _maybe(_whole), "str": _text,
}  # fmt: skip
_OWN_FILE = re.compile(r"monitor-[0-9a-f]{16}\.safetensors")
_PLAIN = ("site", "layer", "intercept", "slope", "offset", "C", "seed")
_FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "tensors": ("a name of its own file", lambda v: _text(v) and bool(_OWN_FILE.fullmatch(v))),
    "tensors_sha256": ("a digest", lambda v: _text(v) and len(v) == 64),
    "position": ("'before_answer'", lambda v: v == "before_answer"),
    "site": ("a site of the decoder", lambda v: _text(v) and v in SITES and SITES[v].part == "decoder"),
    "layer": ("a whole number", _whole),
    "intercept": ("a number", _number),
    "slope": ("a number from 0", lambda v: _number(v) and v >= 0.0),
    "offset": ("a number", _number),
    "C": ("a positive number", lambda v: _number(v) and v > 0.0),
    "seed": ("a whole number", _whole),
    "kinds": ("a list of texts", _texts),
    "choices": ("a list of texts, or null", _maybe(_texts)),
    "model": ("a model's identity", _named(ModelIdentity, _TYPES)),
    "auroc": ("an estimate", _named(Estimate, {**_TYPES, "float": _maybe(_number)})),
    "threshold": ("a threshold, or null", _maybe(_named(Threshold, _TYPES))),
}  # fmt: skip
