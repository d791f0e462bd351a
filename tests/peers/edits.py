"""The same edits written four times: for this library, for plain PyTorch hooks, for pyvene and for TransformerLens.

None of the three witnesses knows the package. An edit names a module of the Hugging Face model, its input or output,
positions by row, and dimensions there.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import interp_vlm as iv
from tests.engine.settings import EQUAL, SIZES, pictures
from tests.tiny import build

__all__ = ["EDITS", "Case", "Edit"]

HEAD = 16  # width of a head of the tiny models
LAYERS = "model.language_model.layers"


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        site: name in this library.
        module: of the Hugging Face model, and whether its "input" or "output" is edited.
        layer: number of the layer.
        positions: a role.
        kind: "patch" from the other pictures, "zero", "mean" over the edited rows of the batch, or "add" a direction.
        heads: for "z".
        units: for "mlp_post".
    """

    site: str
    module: str
    layer: int
    positions: str
    kind: str
    heads: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None

    @property
    def path(self) -> str:
        return f"{LAYERS}[{self.layer}].{self.module}".replace("..", ".")

    @property
    def dims(self) -> list[int] | None:
        """Which dimensions of the edited tensor."""
        if self.heads is not None:
            return [dim for head in self.heads for dim in range(head * HEAD, (head + 1) * HEAD)]
        return None if self.units is None else list(self.units)

    def __str__(self) -> str:
        return f"{self.kind}-{self.site}-{self.layer}-{self.positions}"


EDITS: Mapping[str, tuple[Edit, ...]] = {
    str(edits[0]) + ("-and-more" if len(edits) > 1 else ""): edits
    for edits in (
        (Edit("resid_pre", "input", 1, "image", "patch"),),
        (Edit("resid_post", "output", 0, "question", "patch"),),
        (Edit("attn_out", "self_attn.output", 1, "text", "patch"),),
        (Edit("mlp_out", "mlp.output", 1, "last", "patch"),),
        (Edit("z", "self_attn.o_proj.input", 1, "text", "patch", heads=(2,)),),
        (Edit("mlp_post", "mlp.down_proj.input", 1, "question", "patch", units=(3, 50, 90)),),
        (Edit("resid_pre", "input", 1, "image", "zero"),),
        (Edit("z", "self_attn.o_proj.input", 1, "text", "zero", heads=(1, 3)),),
        (Edit("mlp_post", "mlp.down_proj.input", 2, "last", "zero", units=(3, 50, 90)),),
        (Edit("mlp_out", "mlp.output", 0, "question", "zero"),),
        (Edit("resid_pre", "input", 1, "image", "mean"),),
        (Edit("attn_out", "self_attn.output", 1, "last", "mean"),),
        (Edit("resid_post", "output", 1, "last", "add"),),
        (
            Edit("resid_pre", "input", 1, "image", "patch"),
            Edit("z", "self_attn.o_proj.input", 2, "last", "zero", heads=(0,)),
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """A tiny model of one family with three examples of equal length, and the same questions about other pictures."""

    family: str

    @functools.cached_property
    def vlm(self) -> iv.VLM:
        return iv.VLM(*build(self.family), self.family)

    @functools.cached_property
    def batch(self) -> iv.Batch:
        return self.vlm.encode(pictures(0, SIZES[:1] * 3), EQUAL)

    @functools.cached_property
    def other(self) -> iv.Batch:
        return self.vlm.encode(pictures(1, SIZES[:1] * 3), EQUAL)

    def another_model(self, attn: str = "sdpa") -> Any:
        """The same weights in a model that this library never touches."""
        return build.__wrapped__(self.family, attn=attn)[0]

    def rows(self, role: str) -> Tensor:
        """(batch, found) positions of a role."""
        return torch.stack([tokens.role(role) for tokens in self.batch.tokens])

    # this library

    def ours(self, edits: tuple[Edit, ...]) -> Tensor:
        return self.vlm.run(self.batch, [self._intervention(edit) for edit in edits]).logits

    def _intervention(self, edit: Edit) -> Any:
        where = {"layers": [edit.layer], "positions": edit.positions, "heads": edit.heads, "units": edit.units}
        if edit.kind == "patch":
            return iv.ActivationPatch(edit.site, **where, source=self.vlm.capture(self.other, edit.site))
        if edit.kind == "add":
            return iv.Steering(edit.site, **where, direction=self.direction, scale=1.0)
        return iv.Ablation(edit.site, **where, to=edit.kind)

    @functools.cached_property
    def direction(self) -> Tensor:
        return torch.randn(self.vlm.anatomy.d_model, generator=torch.Generator().manual_seed(0))

    # plain PyTorch hooks

    def by_hooks(self, edits: tuple[Edit, ...]) -> Tensor:
        model = self._hooked_model
        values = {edit: self._new_rows(edit) for edit in edits}
        handles = [on_module(model, edit, functools.partial(self._write, edit, values[edit])) for edit in edits]
        try:
            return model(**self.batch.inputs).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()

    @functools.cached_property
    def _hooked_model(self) -> Any:
        return self.another_model()

    def _new_rows(self, edit: Edit) -> Tensor:
        """(batch, found, d): what the edited rows become, apart from what is added."""
        rows = self._read(edit, self.other if edit.kind == "patch" else self.batch)
        if edit.kind == "mean":
            return rows.flatten(0, 1).mean(0).expand_as(rows)
        return rows if edit.kind == "patch" else torch.zeros_like(rows)

    def _read(self, edit: Edit, batch: iv.Batch) -> Tensor:
        seen: list[Tensor] = []
        handle = on_module(self._hooked_model, edit, lambda value: seen.append(value.clone()))
        self._hooked_model(**batch.inputs)
        handle.remove()
        return seen[0][torch.arange(3)[:, None], self.rows(edit.positions)]

    def _write(self, edit: Edit, new: Tensor, value: Tensor) -> Tensor:
        edited, example, rows = value.clone(), torch.arange(3)[:, None], self.rows(edit.positions)
        if edit.kind == "add":
            edited[example, rows] += self.direction
            return edited
        dims = slice(None) if edit.dims is None else edit.dims
        kept = edited[example, rows].clone()
        kept[..., dims] = new[..., dims]
        edited[example, rows] = kept
        return edited

    # pyvene

    def by_pyvene(self, edits: tuple[Edit, ...]) -> Tensor:
        import pyvene
        from pyvene.models import intervenable_modelcard as modelcard

        model = self.another_model()
        # pyvene asks its table for the width of a component; of families that it does not list, there is none to tell
        modelcard.type_to_dimension_mapping.setdefault(type(model), {})
        kinds = {
            "patch": pyvene.VanillaIntervention, "zero": pyvene.ZeroIntervention,
            "mean": pyvene.VanillaIntervention, "add": pyvene.AdditionIntervention,
        }  # fmt: skip
        constant = {"mean": lambda edit: self._new_rows(edit)[0, 0], "add": lambda _: self.direction}
        representations = [
            {"component": edit.path, "intervention_type": kinds[edit.kind]}
            | ({"source_representation": constant[edit.kind](edit)} if edit.kind in constant else {})
            for edit in edits
        ]
        tool = pyvene.IntervenableModel(representations, model=model)
        where = [self.rows(edit.positions).tolist() for edit in edits]
        sources = [dict(self.other.inputs) if edit.kind == "patch" else None for edit in edits]
        subspaces = [None if edit.dims is None else [edit.dims] * 3 for edit in edits]
        _, run = tool(
            dict(self.batch.inputs), sources, {"sources->base": (where, where)}, subspaces=subspaces, use_cache=False
        )
        return run.logits[:, -1]

    # TransformerLens, on its own LLaVA adapter

    @functools.cached_property
    def _bridge(self) -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        model = self.another_model(attn="eager")
        model.config.architectures = [type(model).__name__]  # by this it finds its adapter
        # Given a name on the hub it would look for the processor there and, not finding it, install torchvision, and
        # with that another torch. A folder that holds the processor keeps it from both.
        with tempfile.TemporaryDirectory() as folder:
            self.vlm.processor.save_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            return TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)

    def by_transformer_lens(self, hooks: list[tuple[str, Callable[..., Tensor]]]) -> Tensor:
        ids, more = self.batch.inputs["input_ids"], {"pixel_values": self.batch.inputs["pixel_values"]}
        return self._bridge.run_with_hooks(ids, fwd_hooks=hooks, **more)[:, -1]

    def lens_hook(self, edit: Edit) -> tuple[str, Callable[..., Tensor]]:
        new = self._new_rows(edit)

        def write(value: Tensor, hook: Any) -> Tensor:
            return self._write(edit, new, value.flatten(2)).view(value.shape)

        names = {
            "attn_out": "hook_attn_out",
            "mlp_out": "hook_mlp_out",
            "z": "attn.hook_z",
            "mlp_post": "mlp.hook_post",
        }
        return f"blocks.{edit.layer}.{names.get(edit.site, f'hook_{edit.site}')}", write


def on_module(model: Any, edit: Edit, act: Callable[[Tensor], Tensor | None]) -> Any:
    """A hook where the edit acts; what it returns goes on, or the value itself for None."""
    *names, side = edit.path.replace("[", ".").replace("]", "").split(".")
    module = model.get_submodule(".".join(names))
    if side == "input":

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = args[0] if args else kwargs["hidden_states"]
            new = act(value)
            new = value if new is None else new
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: Any, __: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = act(value)
        new = value if new is None else new
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(after)
