"""patchkit.toml: what is read strictly is written back with a person's comments in place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchkit.errors import Misconfigured, NotFound, PatchkitError
from patchkit.settings import MAX_BYTES, Settings, dump_settings, load_settings, parse_settings

FINGERPRINT = "sha256:" + "0" * 64
PLAIN = Settings("smollm2-135m", None, FINGERPRINT, {"method": "memit", "layers": [4, 5], "lambda": 300.0})
BASE = f'[base]\nsource = "m"\nfingerprint = "{FINGERPRINT}"\n'


def test_written_settings_read_back_equal() -> None:
    many = {"facts": 500, "layers": [1, 2], "lambda": 17.0}
    for settings in (PLAIN, Settings("org/model", "abc123", FINGERPRINT, {}), replace(PLAIN, many=many)):
        assert parse_settings(dump_settings(settings)) == settings


def test_a_tuple_of_a_recipe_is_a_list() -> None:
    settings = Settings("m", None, FINGERPRINT, {"layers": (4, 5)})
    assert parse_settings(dump_settings(settings)).recipe == {"layers": [4, 5]}


def test_comments_and_order_stay() -> None:
    text = (
        f'# ours\n[recipe] # how\nlambda = 300 # tuned on Monday\nmethod = "memit"\n\n'
        f'[base]\nfingerprint = "{FINGERPRINT}"\nsource = "m" # the small one\n'
    )
    before = parse_settings(text.encode())
    assert dump_settings(before, text.encode()) == text.encode()
    changed = Settings("m", "v2", FINGERPRINT, {"lambda": 100, "method": "memit"})
    written = dump_settings(changed, text.encode()).decode()
    assert parse_settings(written.encode()) == changed
    for comment in ("# ours", "# how", "# the small one"):
        assert comment in written
    assert written.index("[recipe]") < written.index("[base]")


def test_what_many_facts_have_is_changed_in_place() -> None:
    many = "[recipe.many] # from here on\nfacts = 50 # measured\nlambda = 7 # ours\n"
    text = BASE + "[recipe]\nlambda = 3\n" + many
    before = parse_settings(text.encode())
    assert (before.recipe, before.many) == ({"lambda": 3}, {"facts": 50, "lambda": 7})
    assert dump_settings(before, text.encode()) == text.encode()
    for changed in (
        replace(before, recipe={"lambda": 3, "steps": 4}),
        replace(before, many={"facts": 50, "lambda": 8.0, "steps": 2}),
    ):
        written = dump_settings(changed, text.encode())
        assert parse_settings(written) == changed
        for comment in ("# from here on", "# measured"):
            assert comment in written.decode()
    gone = replace(before, many={})
    assert parse_settings(dump_settings(gone, text.encode())) == gone
    assert parse_settings(dump_settings(before, dump_settings(gone))) == before
    inline = (BASE.replace("[base]", "recipe = {lambda = 3}\n[base]")).encode()
    assert parse_settings(dump_settings(before, inline)) == before


def test_a_number_keeps_its_type() -> None:
    text = (BASE + "[recipe]\nlambda = 300\n").encode()
    written = dump_settings(Settings("m", None, FINGERPRINT, {"lambda": 300.0}), text)
    assert type(parse_settings(written).recipe["lambda"]) is float


def test_a_key_that_goes_is_taken_out() -> None:
    text = (BASE + 'revision = "v1"\n[recipe]\nsteps = 3\nlambda = 1\n').encode()
    written = parse_settings(dump_settings(Settings("m", None, FINGERPRINT, {"lambda": 1}), text))
    assert written.base_revision is None
    assert written.recipe == {"lambda": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "[base] is missing"),
        ("base = 3", "[base] is not a table"),
        ('[base]\nsource = "m"', "base.fingerprint is missing"),
        (f'[base]\nsource = ""\nfingerprint = "{FINGERPRINT}"', "base.source is not a line of text"),
        (f'[base]\nsource = "a\\u001b"\nfingerprint = "{FINGERPRINT}"', "base.source is not a line of text"),
        ('[base]\nsource = "m"\nfingerprint = "md5:00"', "base.fingerprint is not 'sha256:'"),
        (BASE + 'revison = "x"', "unknown key base.revison; did you mean revision?"),
        (BASE + "[base2]", "unknown key base2; did you mean base?"),
        (BASE + "[zz]", "known are base, recipe"),
        (BASE + "[recipe]\nlambda = nan", "recipe.lambda: is not a finite number"),
        (BASE + "[recipe]\nday = 2020-01-01", "recipe.day: is a date"),
        (BASE + "[recipe]\nlayers = [[1]]", "recipe.layers: holds a list in a list"),
        (BASE + "[recipe.more]\na = 1", "recipe.more: is a dict"),
        (BASE + "[recipe]\nmany = 3", "[recipe.many] is not a table"),
        (BASE + "[recipe.many]\nlambda = inf", "recipe.many.lambda: is not a finite number"),
        (BASE + f"[recipe]\nsteps = {1 << 70}", "recipe.steps: is too large"),
        (BASE + "oh no", "patchkit.toml:4: is not TOML"),
        ("a = " + "[" * 5000, "is not TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, says: str) -> None:
    with pytest.raises(Misconfigured) as error:
        parse_settings(text.encode())
    assert says in str(error.value)
    assert str(error.value).startswith("patchkit.toml")
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_a_settings_file(tmp_path) -> None:
    with pytest.raises(Misconfigured, match=r"^patchkit.toml:2: is not UTF-8"):
        parse_settings(b"# a\n\xff")
    with pytest.raises(Misconfigured, match="not a settings file"):
        parse_settings(b"#" * (MAX_BYTES + 1))
    with pytest.raises(NotFound, match="patchkit init"):
        load_settings(tmp_path / "patchkit.toml")
    with pytest.raises(NotFound, match="cannot be read"):
        load_settings(tmp_path)


@pytest.mark.parametrize("value", [None, math.inf, {"a": 1}, 1 << 64, [[1]]])
def test_a_recipe_that_toml_cannot_hold_is_not_written(value: object) -> None:
    with pytest.raises(Misconfigured, match=r"recipe.steps"):
        dump_settings(Settings("m", None, FINGERPRINT, {"steps": value}))


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))))
def test_no_bytes_give_a_traceback(data: bytes) -> None:
    for whole in (data, BASE.encode() + data):
        try:
            settings = parse_settings(whole)
        except PatchkitError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is checked
        else:
            assert settings.base_source


_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10),
        st.one_of(_VALUES, st.lists(_VALUES, max_size=4)),
        max_size=5,
    )
)
def test_every_recipe_reads_back(recipe: dict) -> None:
    settings = Settings("m", None, FINGERPRINT, recipe)
    once = dump_settings(settings)
    assert parse_settings(once) == settings
    assert dump_settings(settings, once) == once


def test_reasons_stand_behind_a_persons_comments_and_in_an_inline_table() -> None:
    head = f'[base]\nsource = "x"\nfingerprint = "sha256:{64 * "0"}"\n'
    first = head + "[recipe]\nlambda = 1.0 # do not lower\nclamp = 2.0\n"
    settings = parse_settings(first.encode())
    changed = replace(settings, recipe={"lambda": 2.0, "clamp": 2.0})
    once = dump_settings(changed, first.encode(), {"lambda": "S 80", "clamp": "as it\nwas"})
    assert b"lambda = 2.0 # do not lower; tuned: S 80\n" in once
    assert b"clamp = 2.0 # tuned: as it was\n" in once
    twice = dump_settings(changed, once, {"lambda": "S 90"})
    assert b"lambda = 2.0 # do not lower; tuned: S 90\n" in twice
    inline = f"recipe = {{lambda = 1.0, clamp = 2.0}}\n{head}"
    moved = dump_settings(changed, inline.encode(), {"lambda": "S 80"})
    assert parse_settings(moved) == changed
    assert b"# tuned: S 80" in moved
