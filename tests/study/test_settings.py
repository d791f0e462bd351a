"""Settings: what they refuse, how they are saved, how models are called."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp_vlm.errors import StudyError
from interp_vlm.study.settings import Settings, short_names


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"models": ()}, "no model"),
        ({"models": ("a", "b", "a")}, "'a' is named twice"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": -3}, "limit is -3"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"window": 0}, "window is 0"),
        ({"fraction": 1.0}, "fraction is 1.0"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"samples": 1}, "samples is 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"claims": ()}, "claims are ''"),
        ({"claims": ("none", "A1")}, "claims are 'none,A1'"),
    ],
)
def test_senseless_settings_are_refused(wrong, named):
    with pytest.raises(StudyError, match=named):
        Settings(**wrong)


@given(
    limit=st.none() | st.integers(1, 10**6),
    seed=st.integers(0, 2**32),
    data=st.text(max_size=20),
    models=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=4, unique=True),
    claims=st.sampled_from([("all",), ("none",), ("A1", "A9"), ("my claims/one.toml",)]),
)
def test_saved_settings_read_back_equal(limit, seed, data, models, claims):
    settings = Settings(models=tuple(models), data=data, limit=limit, seed=seed, claims=claims)
    assert Settings.from_json(settings.as_json()) == settings
    assert Settings.from_json(settings.as_json()).differences(settings) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"models": ["a"], "unknown": 1}', '{"models": 3}'])
def test_a_file_that_holds_no_settings_is_an_error(text):
    with pytest.raises(StudyError, match=r"settings\.json cannot be read"):
        Settings.from_json(text)


def test_differences_are_named():
    old, new = Settings(seed=1), Settings(seed=2, models=("x",))
    assert old.differences(new) == [
        "models was testbed:llava, testbed:paligemma, testbed:qwen2_vl and is x",
        "seed was 1 and is 2",
    ]


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True))
def test_short_names_are_distinct_file_names(models):
    names = list(short_names(models).values())
    assert list(short_names(models)) == models
    assert len({name.lower() for name in names}) == len(models)
    for name in names:
        assert name
        assert not set(name) & set('/\\:*?"<>| ')
        assert name.strip(".") == name


def test_windows_are_a_fixed_share_of_the_depth():
    settings = Settings()
    assert [settings.window_of(n) for n in (2, 4, 18, 28, 32)] == [1, 1, 5, 8, 9]
    assert Settings(window=7).window_of(4) == 4
