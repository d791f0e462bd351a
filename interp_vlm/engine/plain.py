"""Code that also runs where this package is not installed: it travels to the machine that runs a trace as its source.

So nothing here may name anything but Python, torch, nnsight and its neighbours in this file, and whatever it is given
is made of tuples, lists, text, numbers and tensors. `no_type_check` keeps annotations, and those who check them, out.

A *place* is `(path, how, shape)`: a module of the model, how a site is read off it, and the shape of a site's last axis
where it is folded there. An *act* is `("block", queries, keys, heads, n_heads)`, which removes edges of attention, or
`("put" or "add", index, rows, cells)`, which changes rows of a value (all cells of a row, or some).
"""

from contextlib import suppress
from typing import no_type_check

import torch
from nnsight.intervention.interleaver import Mediator, OutOfOrderError

__all__ = ["Placed", "There", "alongside", "edited", "play", "read", "write"]


@no_type_check
def read(root, place):
    """The live value of a site."""
    path, how, shape = place
    module = root.get(path)
    if how == "output":
        return module.output[0] if isinstance(module.output, tuple) else module.output
    if how == "embeddings":
        return module.inputs[1]["inputs_embeds"]
    if how == "mask":
        return allowed(module.inputs[1])
    return module.input if shape is None else module.input.unflatten(-1, shape)


@no_type_check
def write(root, place, value):
    """Make the model go on with a value at a site."""
    path, how, shape = place
    module = root.get(path)
    if how == "output":
        module.output = (value, *module.output[1:]) if isinstance(module.output, tuple) else value
    elif how == "in place":  # the layer keeps its own reference to this tensor as the residual
        module.input.copy_(value)
    elif how in ("embeddings", "mask"):
        args, kwargs = module.inputs
        name = "inputs_embeds" if how == "embeddings" else "attention_mask"
        found = kwargs[name]
        if how == "mask" and found is not None and found.dtype != torch.bool:
            value = torch.where(value, found, torch.finfo(found.dtype).min)
        module.inputs = (args, {**kwargs, name: value})
    else:
        module.input = value if shape is None else value.flatten(-2)


@no_type_check
def allowed(kwargs):
    """The mask that attention received, True where attention is allowed, (batch, heads, query, key)."""
    found, hidden = kwargs["attention_mask"], kwargs["hidden_states"]
    if found is None:
        batch, rows = hidden.shape[:2]
        causal = torch.ones(rows, rows, dtype=torch.bool, device=hidden.device).tril()
        return causal[None, None].expand(batch, 1, -1, -1)
    return found if found.dtype == torch.bool else found > torch.finfo(found.dtype).min / 2


@no_type_check
def edited(value, act):
    """A value with one act made in it, how many cells changed, and where a query is left with no key."""
    if act[0] == "block":
        _, queries, keys, heads, n_heads = act
        queries, keys = queries.to(value.device), keys.to(value.device)
        edges = queries[:, None, :, None] & keys[:, None, None, :]
        if heads is not None:
            edges = edges & heads.to(value.device)[:, None, None]
        new = value & ~edges
        empty = (~new.any(-1) & queries[:, None]).nonzero()[:1].tolist()
        return new, int((value != new).sum()) * (n_heads if new.shape[1] == 1 else 1), empty
    kind, index, rows, cells = act
    new = value.clone(memory_format=torch.contiguous_format)
    flat = new.flatten(0, 1) if len(index) == 1 and new.dim() == 3 else new
    index = tuple(each.to(value.device) for each in index)
    old = flat[index]
    rows = rows.to(device=value.device, dtype=value.dtype)
    rows = old + rows if kind == "add" else rows.expand_as(old)
    rows = rows if cells is None else torch.where(cells.to(value.device), rows, old)
    flat[index] = rows
    return new, int((rows != old).sum()), []


@no_type_check
def attention(root, path, names):
    """What an attention module received, and what its projections made of it."""
    kwargs = root.get(path).inputs[1]
    keep = None if kwargs["attention_mask"] is None else allowed(kwargs)
    cos, sin = kwargs["position_embeddings"]
    return keep, cos, sin, *(root.get(f"{path}.{name}").output for name in names)


@no_type_check
def play(root, steps, last):
    """Go through the steps, in the order in which the model computes them.

    Args:
        root: the wrapped model, running.
        steps: `("edit", place, acts, keep)` or `("attention", path, names)`.
        last: the answer position of each example.

    Returns:
        The answers' logits, what each step leaves, and for each act how many cells changed and where it left nothing.
    """
    left, changes = [], []
    for step in steps:
        if step[0] == "attention":
            left.append(attention(root, step[1], step[2]))
            continue
        _, place, acts, keep = step
        value = read(root, place)
        for act in acts:
            value, count, empty = edited(value, act)
            changes.append((count, empty))
        if acts:
            write(root, place, value)
        left.append(value.clone() if keep else None)
    logits = root.output.logits
    return logits[torch.arange(len(last), device=logits.device), last.to(logits.device)].clone(), left, changes


@no_type_check
def alongside(root, act):
    """Run `act` beside the block of the trace that is running.

    It waits for the model by itself, so that the block can go on with what lies between; where both wait for the same
    value, it comes first. What `act` asks for must lie ahead of the model; it ends quietly if the block stops the run.
    """

    def until_stopped():
        with suppress(OutOfOrderError):
            act()

    block, workers = Mediator.current("alongside"), root.interleaver.mediators
    worker = Mediator(compile("act()", "<alongside>", "exec"), {"act": until_stopped}, {})
    workers.insert(workers.index(block), worker)
    worker.start(root.interleaver)


@no_type_check
class There:
    """What a model is in a block that runs elsewhere: its sites, and the wrapped model as `nnsight`."""

    def __init__(self, root, places):
        self.nnsight, self.places = root, places

    def site(self, name, layer=0):
        """The live value of a site."""
        if name not in self.places:
            raise ValueError(f"there is no site {name!r} to read in a trace; expected one of {', '.join(self.places)}")
        layers = self.places[name]
        if not -len(layers) <= layer < len(layers):
            raise ValueError(f"layer {layer} does not exist; expected {-len(layers)} to {len(layers) - 1}")
        return read(self.nnsight, layers[layer])


@no_type_check
class Placed:
    """What an intervention is in a block that runs elsewhere: its acts, as `(place, act)` by layer."""

    def __init__(self, steps, name, must):
        self.steps, self.name, self.must = steps, name, must  # must: it has to change something

    def apply(self, there):
        """Act in the first layer here, in the others when the model reaches them, beside the rest of the block."""
        changed = 0

        def act(place, what):
            nonlocal changed
            value, count, empty = edited(read(there.nnsight, place), what)
            changed += count
            if empty:
                raise ValueError(f"{self.name} leaves position {empty[0][2]} of example {empty[0][0]} with no key")
            write(there.nnsight, place, value)
            if what is self.steps[-1][1] and self.must and not changed:
                raise ValueError(f"{self.name} blocks no edge: the model attends none of them anyway")

        first, *later = self.steps
        act(*first)
        if later:
            alongside(there.nnsight, lambda: [act(*step) for step in later])
