"""What a patch's files say of themselves: every lie in a header is found, every flipped byte too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_helpers import facts, solved_patch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.algebra.factors import Delta, Patch
from patchkit.canonical import canonical_json, hash_bytes, strict_json
from patchkit.errors import BadInput, PatchkitError
from patchkit.facts import Fact, dump_facts
from patchkit.patch import (
    DELTA,
    FACTS,
    KEYS,
    Header,
    WeightEntry,
    break_even,
    delta_shapes,
    patch_name,
    read_patch_header,
    valid_patch_name,
)
from patchkit.tensors import header_of, to_bytes

BASE = "sha256:" + "ab" * 32


def small_patch() -> Patch:
    patch, _ = solved_patch({"h.0.w": (4, 6), "h.1.w": (3, 3)}, 2, BASE)  # the second past its break-even
    return patch


PATCH = small_patch()
FILES = PATCH.files()


def with_header(
    change: Callable[[dict[str, Any]], object], files: dict[str, bytes] = FILES
) -> dict[str, bytes]:
    """The files with a header that was changed by someone who knows the format."""
    file = header_of(files[DELTA], "x")
    value = strict_json(file.metadata["patchkit"])
    change(value)
    tensors = {
        name: (info.dtype, info.shape, files[DELTA][info.start : info.end])
        for name, info in file.tensors.items()
    }
    return {**files, DELTA: to_bytes(tensors, {"patchkit": canonical_json(value).decode()})}


def test_the_header_says_what_the_patch_is() -> None:
    header = read_patch_header(FILES[DELTA], "x")
    assert header == Header(
        1,
        BASE,
        hash_bytes(FILES[FACTS]),
        hash_bytes(FILES[KEYS]),
        (),
        "memit",
        {"lambda": 5.0},
        {
            "h.0.w": WeightEntry((4, 6), False, "factors", 2),
            "h.1.w": WeightEntry((3, 3), False, "dense", 3),
        },
    )
    assert Header.from_json(header.to_json(), "x") == header
    assert set(delta_shapes(header)) == {"h.0.w.A", "h.0.w.B", "h.1.w.dense"}
    assert PATCH.id == hash_bytes(FILES[DELTA])


def test_reading_headers_and_verifying_builds_need_no_torch() -> None:
    code = "import sys, patchkit.patch, patchkit.builds.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda h: h.update(format=2), "in patch format 2, .*; update patchkit"),
    "a format of 1.0": (lambda h: h.update(format=1.0), "does not say its format"),
    "a format of true": (lambda h: h.update(format=True), "does not say its format"),
    "no format": (lambda h: h.pop("format"), "does not say its format"),
    "a field too few": (lambda h: h.pop("recipe"), "recipe"),
    "a field too many": (lambda h: h.update(author="me"), "author"),
    "a base that is no fingerprint": (lambda h: h.update(base="main"), "base fingerprint"),
    "a base in capitals": (lambda h: h.update(base=BASE.upper()), "base fingerprint"),
    "a base with a line end": (lambda h: h.update(base=BASE + "\n"), "base fingerprint"),
    "another facts hash": (lambda h: h.update(facts="0" * 64), "is not the one"),
    "a facts hash that is none": (lambda h: h.update(facts=None), "facts.jsonl"),
    "another keys hash": (lambda h: h.update(keys="0" * 64), "is not the one"),
    "keys that are denied": (lambda h: h.update(keys=None), "is not the one"),
    "a keys hash that is none": (lambda h: h.update(keys=3), "keys.safetensors"),
    "a stack out of order": (lambda h: h.update(solved_on=["b" * 64, "a" * 64]), "sorted"),
    "a stack with a patch twice": (lambda h: h.update(solved_on=["a" * 64] * 2), "twice"),
    "a stack of names": (lambda h: h.update(solved_on=["lebron"]), "solved_on"),
    "a stack that is no list": (lambda h: h.update(solved_on={}), "solved_on"),
    "a method that is none": (lambda h: h.update(method="rm -rf"), "method"),
    "a method that is no text": (lambda h: h.update(method=1), "method"),
    "a recipe that is none": (lambda h: h.update(recipe=[]), "recipe"),
    "no weights": (lambda h: h.update(weights={}), "no weights"),
    "weights that are no table": (lambda h: h.update(weights=[]), "no weights"),
    "a weight that is not there": (lambda h: h["weights"].update(x=h["weights"]["h.0.w"]), "tensors"),
    "a weight that is kept quiet": (lambda h: h["weights"].pop("h.0.w"), "tensors"),
    "a weight that is no table": (lambda h: h["weights"].update({"h.0.w": 1}), "exactly"),
    "a shape with a side too few": (lambda h: h["weights"]["h.0.w"].update(shape=[4]), "two positive"),
    "a shape with a side of zero": (lambda h: h["weights"]["h.0.w"].update(shape=[0, 6]), "two positive"),
    "a shape with a side of true": (lambda h: h["weights"]["h.0.w"].update(shape=[True, 6]), "two positive"),
    "another shape": (lambda h: h["weights"]["h.0.w"].update(shape=[40, 6]), "not float32 of the shape"),
    "a flag that is none": (lambda h: h["weights"]["h.0.w"].update(transposed=0), "no form"),
    "an unknown form": (lambda h: h["weights"]["h.0.w"].update(form="sparse"), "no form"),
    "a form that is no text": (lambda h: h["weights"]["h.0.w"].update(form=["dense"]), "no form"),
    "a rank of zero": (lambda h: h["weights"]["h.0.w"].update(rank=0), "rank"),
    "a rank past the break-even": (lambda h: h["weights"]["h.0.w"].update(rank=3), "rank"),
    "a rank that dense cannot have": (lambda h: h["weights"]["h.1.w"].update(rank=2), "rank"),
    "a rank that is a float": (lambda h: h["weights"]["h.0.w"].update(rank=2.0), "rank"),
    "another rank": (lambda h: h["weights"]["h.0.w"].update(rank=1), "not float32 of the shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_found(lie: str) -> None:
    change, reason = LIES[lie]
    with pytest.raises(BadInput, match=reason) as caught:
        Patch.from_files(with_header(change), "patches/x")
    assert str(caught.value).startswith("patches/x")
    assert str(caught.value).isprintable()


def test_a_header_is_believed_in_one_spelling_only() -> None:
    file = header_of(FILES[DELTA], "x")
    tensors = {n: (i.dtype, i.shape, FILES[DELTA][i.start : i.end]) for n, i in file.tensors.items()}
    text = file.metadata["patchkit"]
    for other in (text.replace(":", ": ", 1), text + " ", "{", "[]", text.replace("5.0", "NaN")):
        with pytest.raises(BadInput, match="header"):
            read_patch_header(to_bytes(tensors, {"patchkit": other}), "x")
    for metadata in ({}, {"format": "pt"}):
        with pytest.raises(BadInput, match="not a patchkit patch"):
            read_patch_header(to_bytes(tensors, metadata), "x")


def test_every_flipped_byte_is_found() -> None:
    """In the facts or keys by reading the patch, in the delta by its id (and mostly by reading, too)."""
    for name, data in FILES.items():
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            try:
                found = Patch.from_files({**FILES, name: bytes(flipped)}, "x")
            except PatchkitError:
                continue
            assert name == DELTA
            assert found.id != PATCH.id


def test_files_of_two_patches_are_not_mixed() -> None:
    other, _ = solved_patch({"h.0.w": (4, 6), "h.1.w": (3, 3)}, 2, BASE, seed=1)
    for name in FILES:
        with pytest.raises(BadInput, match="is not the one"):
            Patch.from_files({**FILES, name: other.files()[name]}, "x")


def test_only_the_known_files_make_a_patch() -> None:
    for files in ({}, {FACTS: b""}, {DELTA: FILES[DELTA]}, {**FILES, "README.md": b""}):
        with pytest.raises(BadInput, match="a patch is"):
            Patch.from_files(files, "x")


flips = st.lists(
    st.tuples(st.sampled_from([FACTS, DELTA, KEYS]), st.integers(0), st.integers(0, 255)), max_size=3
)


@settings(max_examples=200)
@given(flips, st.sampled_from([FACTS, DELTA, KEYS]), st.integers(0, 40))
def test_fuzz_files(changes: list[tuple[str, int, int]], cut: str, by: int) -> None:
    files = {name: bytearray(data) for name, data in FILES.items()}
    for name, place, value in changes:
        files[name][place % len(files[name])] = value
    files[cut] = files[cut][: len(files[cut]) - by]
    check_files({name: bytes(data) for name, data in files.items()})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 8)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(strict_json(header_of(FILES[DELTA], "x").metadata["patchkit"]))), json_values)
def test_fuzz_headers(field: str, value: Any) -> None:
    check_files(with_header(lambda header: header.update({field: value})))


@settings(max_examples=200)
@given(st.sampled_from(["shape", "transposed", "form", "rank"]), json_values | st.lists(st.integers(1, 8)))
def test_fuzz_weights(field: str, value: Any) -> None:
    check_files(with_header(lambda header: header["weights"]["h.0.w"].update({field: value})))


def check_files(files: dict[str, bytes]) -> None:
    """Refused in one line, or read as a patch that spells the same files again."""
    refused = ""
    try:
        found = Patch.from_files(files, "x")
    except PatchkitError as error:
        refused = str(error)
    assert all(line.isprintable() for line in refused.split("\n"))
    if not refused:
        assert found.files()[FACTS] == files[FACTS]
        assert Patch.from_files(found.files(), "x").id == found.id


def test_values_that_are_not_finite_are_refused() -> None:
    for name, part in ((DELTA, "h.0.w.A"), (DELTA, "h.1.w.dense"), (KEYS, "targets"), (KEYS, "h.0.w.keys")):
        for bad in (float("nan"), float("inf")):
            info = header_of(FILES[name], "x").tensors[part]
            data = bytearray(FILES[name])
            data[info.start : info.start + 4] = torch.tensor([bad]).numpy().tobytes()
            files = {**FILES, name: bytes(data)}
            files = with_header(lambda h, files=files: h.update(keys=hash_bytes(files[KEYS])), files)
            with pytest.raises(BadInput, match=r"^x: .*NaN or infinity"):
                Patch.from_files(files, "x")


def test_keys_for_another_number_of_facts_are_refused() -> None:
    more = dump_facts(facts(3))
    files = with_header(lambda h: h.update(facts=hash_bytes(more)), {**FILES, FACTS: more})
    with pytest.raises(BadInput, match="float32 of the shape"):
        Patch.from_files(files, "x")


def test_break_even_is_where_the_two_forms_are_as_large() -> None:
    for d_out in range(1, 12):
        for d_in in range(1, 12):
            r = break_even(d_out, d_in)
            assert r * (d_out + d_in) <= d_out * d_in < (r + 1) * (d_out + d_in)


@pytest.mark.parametrize(
    ("subject", "slug"),
    [
        ("LeBron James", "lebron-james"),
        ("  Zoë  O'Brien-Łu ", "zoe-o-brien-u"),
        ("東京", "fact"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 99, "x" * 40),
        ("a" * 39 + " b", "a" * 39),
        ("---", "fact"),
    ],
)
def test_names_are_slugs_and_the_facts_hash(subject: str, slug: str) -> None:
    fact = Fact(subject=subject, prompt="{} is", target="it")
    name = patch_name([fact])
    assert name == f"{slug}-{hash_bytes(dump_facts([fact]))[:8]}"
    assert valid_patch_name(name)


@given(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_every_subject_has_a_valid_name(subject: str) -> None:
    assert valid_patch_name(patch_name([Fact(subject=subject, prompt="{} is", target="it")]))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "-12345678",
        "a-1234567",
        "A-12345678",
        "a/b-12345678",
        "..-12345678",
        "a-12345678\n",
        "é-12345678",
    ],
)
def test_other_names_are_not_valid(name: str) -> None:
    assert not valid_patch_name(name)


def test_a_recipe_that_json_cannot_hold_is_refused_when_written() -> None:
    for recipe in ({"rate": float("nan")}, {"text": "\ud800"}, {"layers": {3}}):
        patch = Patch(facts(1), {"w": Delta(torch.ones(4, 1), torch.ones(1, 4))}, BASE, "memit", recipe)
        with pytest.raises(BadInput, match="recipe"):
            patch.files()


def test_what_could_not_be_read_is_not_written() -> None:
    deltas = {"w": Delta(torch.ones(4, 1), torch.ones(1, 4))}
    for base, method in (("main", "memit"), (BASE, "My Editor")):
        with pytest.raises(BadInput):
            Patch(facts(1), deltas, base, method, {}).files()
