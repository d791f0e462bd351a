"""Interventions as plain values: they compare, hash, vary and show themselves."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import interp_vlm as iv
from interp_vlm.errors import InterventionError, SelectionError
from interp_vlm.interventions.base import indices
from interp_vlm.tokens import select

VOCABULARY = {
    **{name: getattr(iv, name) for name in ("AttentionKnockout", "Ablation", "ActivationPatch", "Steering")},
    **{name: getattr(select, name) for name in select.__all__},
}


def cache(value: float = 1.0, position: int = 3) -> iv.Cache:
    values = {"resid_post": torch.full((1, 2, 1, 4), value)}
    places = torch.tensor([[position]])
    return iv.Cache(values, {"resid_post": (0, 1)}, places, torch.ones(1, 1, dtype=torch.bool), ())


class TestIndices:
    @given(st.integers(1, 12), st.data())
    def test_every_way_to_say_the_same(self, count, data):
        chosen = data.draw(st.lists(st.integers(-count, count - 1), min_size=1, unique_by=lambda i: i % count))
        wanted = tuple(index % count for index in chosen)
        for spec in (chosen, tuple(chosen), np.array(chosen), torch.tensor(chosen), iter(chosen)):
            assert indices(spec, count, "layer") == wanted

    def test_all_an_int_and_a_range(self):
        assert indices("all", 3, "layer") == (0, 1, 2)
        assert indices(-1, 3, "layer") == indices(np.int64(2), 3, "layer") == (2,)
        assert indices(range(2, -1, -1), 3, "layer") == (2, 1, 0)

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            (3, "layer 3 does not exist; expected 0 to 2"),
            ([-4], "layer -4 does not exist; expected 0 to 2"),
            ([], "no layer is named"),
            (range(2, 2), "no layer is named"),
            ([0, -3], "names one twice"),
            ("1", "layers='1'; expected an int, a range, a list of ints or 'all'"),
            (1.0, "layers=1.0; expected an int"),
            ([1.5], "expected an int"),
            (None, "layers=None; expected an int"),
            ([True, False, True], "expected an int"),
            (torch.tensor([True, False, True]), "expected an int"),
        ],
    )
    def test_nonsense_is_refused(self, spec, said):
        with pytest.raises(InterventionError) as caught:
            indices(spec, 3, "layer")
        assert said in str(caught.value)


SAME = [
    (iv.AttentionKnockout(layers=[1, 2]), iv.AttentionKnockout(layers=(1, 2))),
    (iv.AttentionKnockout(layers=range(3)), iv.AttentionKnockout(layers=[0, 1, 2])),
    (iv.AttentionKnockout(layers=iter([1, 2])), iv.AttentionKnockout(layers=np.array([1, 2]))),
    (iv.AttentionKnockout(queries=[1, 2]), iv.AttentionKnockout(queries=(1, 2))),
    (iv.Ablation("z", to=0.5), iv.Ablation("z", to=torch.tensor(0.5))),
    (iv.Ablation("z", to=torch.ones(4)), iv.Ablation("z", to=torch.ones(4))),
    (
        iv.Steering("resid_post", direction=torch.ones(4, dtype=torch.bfloat16)),
        iv.Steering("resid_post", direction=torch.ones(4, dtype=torch.bfloat16), scale=1),
    ),
    (iv.ActivationPatch("resid_post", source=cache()), iv.ActivationPatch("resid_post", source=cache())),
    (
        iv.Ablation("resid_post", positions=select.top(0.3) & ~select.sinks()),
        iv.Ablation("resid_post", positions=select.top(0.3) & ~select.sinks()),
    ),
    (iv.Ablation("mlp_post", units=np.array([3, 1])), iv.Ablation("mlp_post", units=torch.tensor([3, 1]))),
]
DIFFERENT = [
    (iv.AttentionKnockout(layers=[1, 2]), iv.AttentionKnockout(layers=[2, 1])),
    (iv.AttentionKnockout(), iv.AttentionKnockout(heads=0)),
    (iv.AttentionKnockout(), iv.AttentionKnockout(allow_empty=True)),
    (iv.AttentionKnockout(), iv.AttentionKnockout(during="both")),
    (iv.AttentionKnockout(), iv.Ablation("z")),
    (iv.Ablation("z"), iv.Ablation("z", to="zero")),
    (iv.Ablation("z", to=torch.ones(4)), iv.Ablation("z", to=torch.zeros(4))),
    (iv.Ablation("z", to=torch.ones(4)), iv.Ablation("z", to=torch.ones(2, 2))),
    (iv.Ablation("z", to=torch.ones(4)), iv.Ablation("z", to=torch.ones(4).double())),
    (iv.Ablation("z", seed=0), iv.Ablation("z", seed=1)),
    (
        iv.Steering("resid_post", direction=torch.ones(4)),
        iv.Steering("resid_post", direction=torch.ones(4), scale=2.0),
    ),
    (iv.ActivationPatch("resid_post", source=cache()), iv.ActivationPatch("resid_post", source=cache(2.0))),
    (iv.ActivationPatch("resid_post", source=cache()), iv.ActivationPatch("resid_post", source=cache(position=4))),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=repr)
def test_equal_values_are_equal_and_hash_alike(one, other):
    assert one == other
    assert hash(one) == hash(other)
    assert {one: "found"}[other] == "found"


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=repr)
def test_different_values_differ(one, other):
    assert one != other
    assert len({one, other}) == 2


def test_values_are_frozen_and_do_not_follow_the_callers_list():
    layers = [1, 2]
    knockout = iv.AttentionKnockout(layers=layers)
    layers.append(3)
    assert knockout.layers == [1, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        knockout.layers = [0]


@pytest.mark.parametrize(
    "text",
    [
        "AttentionKnockout(queries='last', keys='image', layers=range(8, 17))",
        "AttentionKnockout(queries=question | last, keys=image & box(0, 0, 20, 20), layers='all', heads=[0, -1])",
        "AttentionKnockout(queries=[3, 4], keys='bos', layers=2, during='both', allow_empty=True)",
        "Ablation(site='mlp_post', layers=[21], units=[1512, 1360], to='zero')",
        "Ablation(site='z', layers=[12], heads=[3], to='resample', seed=4)",
        "Ablation(site='projector_out', layers='all', positions=top(0.3, by='attention'), to='mean')",
        "Ablation(site='vision_post', layers=1, positions=image - random(5, seed=2), to='mean')",
    ],
)
def test_repr_says_it_all(text):
    value = eval(text, dict(VOCABULARY))
    assert repr(value) == text
    assert eval(repr(value), dict(VOCABULARY)) == value


def test_repr_of_values_with_tensors_shows_their_shape():
    steering = iv.Steering("z", layers=1, direction=torch.ones(4, 16), scale=4.0)
    assert repr(steering) == "Steering(site='z', layers=1, direction=tensor[4, 16], scale=4.0)"
    patch = iv.ActivationPatch("resid_post", layers=1, source=cache())
    assert repr(patch) == "ActivationPatch(site='resid_post', layers=1, source=Cache(resid_post (1, 2, 1, 4)))"
    assert repr(iv.Ablation("z", to=torch.ones(4, 16))) == "Ablation(site='z', layers='all', to=tensor[4, 16])"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: iv.Ablation("residual"), "there is no site 'residual'; expected one of vision_post, projector_out"),
        (
            lambda: iv.Ablation("pattern"),
            "Ablation cannot write to 'pattern'; expected a site of activations; use Atten",
        ),
        (lambda: iv.Ablation("attn_mask"), "Ablation cannot write to 'attn_mask'"),
        (lambda: iv.Ablation("resid_post", heads=[1]), "heads=[1] at site 'resid_post', which has no head axis"),
        (lambda: iv.Ablation("z", to="median"), "to='median'; expected 'zero', 'mean', 'resample' or a tensor"),
        (lambda: iv.Ablation("z", during="both"), "reads values of prompts, which generated tokens do not have"),
        (lambda: iv.Ablation("z", to="resample", during="generated"), "expected during='prompt'"),
        (lambda: iv.ActivationPatch("resid_post", source=cache(), during="both"), "reads values of prompts"),
        (lambda: iv.ActivationPatch("z", source=cache()), "site 'z' was not captured; expected one of resid_post"),
    ],
)
def test_malformed_values_are_refused_at_once(make, said):
    with pytest.raises(InterventionError) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_types_are_refused_without_a_type_checker_too():
    tried = """
import interp_vlm as iv
for make in (
    lambda: iv.Steering("z", direction=[1.0]),
    lambda: iv.ActivationPatch("z", source={}),
    lambda: iv.Ablation("z", to=None),
    lambda: iv.Ablation("z", during="later"),
    lambda: iv.Ablation(["z"]),
    lambda: iv.AttentionKnockout(queries=1.5),
):
    try:
        make()
    except iv.InterpVLMError as error:
        print(type(error).__name__, error)
"""
    found = subprocess.run(
        [sys.executable, "-c", tried], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = [
        "InterventionError direction is a list; expected a tensor; use torch.as_tensor",
        "InterventionError source is a dict; expected a Cache; capture the other run: vlm.capture(batch, sites=[...])",
        "InterventionError to=None; expected 'zero', 'mean', 'resample' or a tensor",
        "InterventionError during='later'; expected 'prompt', 'generated' or 'both'",
        "InterventionError there is no site ['z']; expected one of vision_post",
        "SelectionError ",
    ]
    assert len(found) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(found, wanted, strict=True)), found


@pytest.mark.parametrize("role", ["picture", ""])
def test_unknown_roles_are_refused_at_once(role):
    with pytest.raises(SelectionError):
        iv.AttentionKnockout(queries=role)
    with pytest.raises(SelectionError):
        iv.Ablation("resid_post", positions=role)


class TestVary:
    def test_is_the_product_with_the_last_field_fastest(self):
        base = iv.AttentionKnockout(queries="question", heads=[1], allow_empty=True)
        many = iv.vary(base, layers=[0, range(1, 3)], keys=["image", "bos"])
        assert [(value.layers, value.keys) for value in many] == [
            (0, "image"), (0, "bos"), (range(1, 3), "image"), (range(1, 3), "bos"),
        ]  # fmt: skip
        assert all(value == dataclasses.replace(base, layers=value.layers, keys=value.keys) for value in many)

    def test_works_for_every_kind(self):
        ones = torch.ones(4)
        for base in (
            iv.Ablation("z", to=ones, seed=3),
            iv.Steering("resid_post", direction=ones),
            iv.ActivationPatch("resid_post", source=cache(), source_positions="last"),
        ):
            first, second = iv.vary(base, layers=[0, 1])
            assert (first.layers, second.layers) == (0, 1)
            assert iv.vary(second, layers=[base.layers]) == [base]

    def test_without_fields_is_the_value_itself(self):
        assert iv.vary(iv.AttentionKnockout()) == [iv.AttentionKnockout()]

    def test_refuses_unknown_fields(self):
        with pytest.raises(InterventionError, match="AttentionKnockout has no field 'layer'; expected one of"):
            iv.vary(iv.AttentionKnockout(), layer=[0])


class TestWindows:
    @given(st.integers(1, 40), st.integers(1, 15))
    def test_are_centred_on_every_layer_and_cut_at_the_ends(self, count, size):
        found = iv.windows(count, size)
        assert len(found) == count
        for layer, window in enumerate(found):
            before = (size - 1) // 2
            assert list(window) == [i for i in range(layer - before, layer - before + size) if 0 <= i < count]
            assert layer in window

    def test_of_nothing_are_refused(self):
        with pytest.raises(InterventionError, match="a window of 0 layers"):
            iv.windows(4, 0)
