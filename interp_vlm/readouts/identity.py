"""Which model something was measured on, so that it is never mixed with what another model gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from interp_vlm.engine.devices import weights
from interp_vlm.errors import DataError, ModelError
from interp_vlm.models.encode import render
from interp_vlm.models.registry import family_for

if TYPE_CHECKING:
    from interp_vlm.vlm import VLM

__all__ = ["ModelIdentity", "identity_of"]


@dataclass(frozen=True)
class ModelIdentity:
    """A model as far as its activations depend on it.

    Attributes:
        name: what it was loaded by.
        revision: commit on the hub, "" for a local folder.
        anatomy: fingerprint of its anatomy.
        prompt: its prompt around "{question}".
        weights: fingerprint of its weights.
    """

    name: str
    revision: str
    anatomy: str
    prompt: str
    weights: str

    def refuse(self, other: ModelIdentity, what: str) -> None:
        """Raise a ModelError that says in what `other` differs from the model that `what` was made with."""
        mine, its = asdict(self), asdict(other)
        changed = [f"{name} {mine[name]!r} is {its[name]!r} here" for name in mine if mine[name] != its[name]]
        if changed:
            raise ModelError(
                f"{what} was written by another model: {'; '.join(changed)}",
                expected=f"{self.name}{f' at revision {self.revision}' if self.revision else ''}",
                remedy="load that model, or make this anew with the one at hand",
            )

    @classmethod
    def from_json(cls, found: Any) -> ModelIdentity:
        """The identity that `dataclasses.asdict` made, checked.

        Raises:
            DataError: when it is something else.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(found, Mapping) or set(found) != set(names):
            raise DataError(f"a model identity {found!r}", expected=f"the fields {', '.join(names)}")
        return cls(**{name: str(found[name]) for name in names})


def identity_of(vlm: VLM) -> ModelIdentity:
    """The identity of a loaded model.

    Of the weights, 64 numbers of each are read: enough to tell another checkpoint of the same architecture.
    """
    digest = hashlib.sha256()
    for name, weight in weights(vlm.model):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    anatomy = hashlib.sha256(json.dumps(asdict(vlm.anatomy), sort_keys=True).encode())
    return ModelIdentity(
        name=vlm.name,
        revision=getattr(vlm.model.config, "_commit_hash", None) or "",
        anatomy=anatomy.hexdigest()[:16],
        prompt=render(family_for(type(vlm.model).__name__), vlm.processor, "{question}"),
        weights=digest.hexdigest()[:16],
    )
