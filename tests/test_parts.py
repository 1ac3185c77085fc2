"""Patches joined and scaled: the same exact sum, the same bytes, and facts that can still leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_helpers import exact_sum, facts, rounded, solved_patch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.algebra.parts import joined, parts_of, scale_of, scaled
from patchkit.algebra.rounding import materialise
from patchkit.builds.build import stacked
from patchkit.errors import BadInput
from patchkit.patch import DELTA, FACTS, KEYS

BASE = "sha256:" + "ab" * 32
SHAPES = {"a.w": (40, 60), "b.w": (30, 50)}
SMALL = {"a.w": (6, 9)}  # four facts or more are past the break-even


def solved(count: int, seed: int, shapes: dict[str, tuple[int, int]] | None = None) -> Patch:
    return solved_patch(shapes or SHAPES, count, BASE, seed=seed)[0]


def weights(patches: list[Patch], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Every weight of a random base with the patches on it, as a build holds it."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, deltas in stacked(patches).items():
        base = torch.randn(deltas[0].shape, generator=generator).to(dtype)
        found[name] = materialise(base, deltas, name)
    return found


def product(delta: Delta) -> Tensor:
    if delta.dense is not None:
        return delta.dense.double()
    assert delta.B is not None
    assert delta.A is not None
    return delta.B.double() @ delta.A.double()


def reread(patch: Patch) -> Patch:
    return Patch.from_files(patch.files(), patch.name)


counts = st.lists(st.integers(1, 4), min_size=2, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=30)
@given(counts, st.integers(0, 1000), dtypes)
def test_a_squash_gives_the_bytes_of_its_parts(sizes: list[int], seed: int, dtype: torch.dtype) -> None:
    parts = [solved(count, seed + place) for place, count in enumerate(sizes)]
    other = solved(2, seed + 77)
    whole = reread(joined(parts))
    assert whole.facts == tuple(fact for part in parts for fact in part.facts)
    together, apart = weights([other, whole], dtype), weights([other, *parts], dtype)
    assert together.keys() == apart.keys()
    for name, weight in together.items():
        assert torch.equal(weight.view(torch.uint8), apart[name].view(torch.uint8))


@settings(max_examples=20)
@given(counts, st.integers(0, 1000))
def test_parts_come_out_as_they_went_in(sizes: list[int], seed: int) -> None:
    parts = [solved(count, seed + place) for place, count in enumerate(sizes)]
    nested = joined([joined(parts[:2]), *parts[2:]])
    assert nested.id == joined(parts).id
    assert [part.id for part in parts_of(reread(nested))] == [part.id for part in parts]


@settings(max_examples=20)
@given(counts, st.integers(0, 1000), st.data())
def test_facts_leave_a_squash_as_they_leave_their_part(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    """Also where that is not the formula over all keys: parts were not solved for each other's keys."""
    parts = [solved(count, seed + place) for place, count in enumerate(sizes)]
    total = sum(sizes)
    dropped = data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=total - 1))
    left = reread(joined(parts)).without(dropped)
    wanted: dict[str, Tensor] = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    kept, start = [], 0
    for part in parts:
        own = [place - start for place in dropped if start <= place < start + len(part.facts)]
        start += len(part.facts)
        if len(own) < len(part.facts):
            remaining = part.without(own)
            kept += remaining.facts
            for name, delta in remaining.deltas.items():
                wanted[name] += product(delta)
    assert left.facts == tuple(kept)
    for name, delta in left.deltas.items():
        assert torch.allclose(product(delta), wanted[name], rtol=0, atol=1e-6 * float(wanted[name].norm()))


def test_the_formula_over_all_keys_would_be_another_edit() -> None:
    """The reason for parts: taken out as if all had been solved together, what stays is moved."""
    parts = [solved(3, 1), solved(3, 2)]
    whole = joined(parts)
    as_one = replace(whole, method="memit", recipe={"lambda": 5.0})
    wrong, right = as_one.without({0}), whole.without({0})
    apart = product(wrong.deltas["a.w"]) - product(right.deltas["a.w"])
    assert apart.norm() > 1e-3 * product(right.deltas["a.w"]).norm()


def test_the_last_part_alone_is_that_patch() -> None:
    parts = [solved(2, 1), solved(3, 2)]
    assert joined(parts).without({0, 1}).id == parts[1].id


def test_past_the_break_even_each_entry_is_rounded_once() -> None:
    """Factors and a dense part: each entry is the exact sum of what they are, in float32."""
    low, dense = solved(2, 1, SMALL), solved(5, 2, SMALL)
    assert low.deltas["a.w"].B is not None
    assert dense.deltas["a.w"].dense is not None
    whole = reread(joined([low, dense])).deltas["a.w"].dense
    assert whole is not None
    B, A = low.deltas["a.w"].B, low.deltas["a.w"].A
    for i in range(6):
        for j in range(9):
            held, update = exact_sum(dense.deltas["a.w"].dense, B, A, i, j)
            assert whole[i, j].item() == rounded(held + update, torch.float32)


def test_a_dense_squash_lets_facts_go_too() -> None:
    parts = [solved(3, 1, SMALL), solved(5, 2, SMALL)]
    left = reread(joined(parts)).without({0, 4})
    wanted = product(parts[0].without({0}).deltas["a.w"]) + product(parts[1].without({1}).deltas["a.w"])
    assert torch.allclose(product(left.deltas["a.w"]), wanted, rtol=0, atol=1e-6 * float(wanted.norm()))


def test_parts_of_other_weights_and_recipes_are_joined() -> None:
    one = solved(2, 1, {"a.w": (40, 60)})
    two = replace(solved(3, 2, {"b.w": (30, 50)}), recipe={"lambda": 9.0})
    whole = reread(joined([one, two]))
    assert [part.id for part in parts_of(whole)] == [one.id, two.id]
    assert torch.equal(weights([whole], torch.float32)["b.w"], weights([one, two], torch.float32)["b.w"])
    assert whole.without({0}).facts == (one.facts[1], *two.facts)


def test_a_squash_is_solved_on_what_its_parts_were_without_themselves() -> None:
    one = replace(solved(1, 1), solved_on=("1" * 64,))
    two = replace(solved(1, 2), solved_on=(one.id, "2" * 64))
    assert joined([one, two]).solved_on == ("1" * 64, "2" * 64)


def test_without_keys_a_squash_is_made_and_no_fact_leaves_it() -> None:
    bare = replace(solved(2, 2), solution=None, left_out="0" * 64)
    whole = reread(joined([solved(2, 1), bare]))
    assert whole.solution is None
    assert set(whole.files()) == {FACTS, DELTA}
    with pytest.raises(BadInput, match="squash keeps no keys"):
        whole.without({0})
    with pytest.raises(BadInput, match="its parts cannot be told apart"):
        parts_of(whole)


def test_what_does_not_belong_together_is_not_joined() -> None:
    with pytest.raises(BadInput, match="another base"):
        joined([solved(1, 1), replace(solved(1, 2), base="sha256:" + "0" * 64)])
    with pytest.raises(BadInput, match="do not agree on its shape"):
        joined([solved(1, 1), solved(1, 2, {"a.w": (60, 40)})])


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"parts": []},
        {"parts": [{"facts": 1}]},
        {"parts": [{"facts": 0, "id": "1" * 64, "method": "memit", "recipe": {}, "solved_on": []}]},
        {"parts": [{"facts": 1, "id": "x", "method": "memit", "recipe": {}, "solved_on": []}]},
        {"parts": [{"facts": 1, "id": "1" * 64, "method": "memit", "recipe": 3, "solved_on": []}]},
        {"parts": [{"facts": 1, "id": "1" * 64, "method": "memit", "recipe": {}, "solved_on": ["x"]}]},
    ],
)
def test_a_squash_that_does_not_say_of_what_is_refused(recipe: dict[str, object]) -> None:
    broken = replace(solved(1, 1), method="squash", recipe=recipe)
    with pytest.raises(BadInput, match=r"squash|part|solved_on"):
        broken.files()


def test_parts_that_do_not_count_the_facts_are_refused() -> None:
    whole = joined([solved(1, 1), solved(1, 2)])
    entries = [dict(entry, facts=5) for entry in whole.recipe["parts"]]
    with pytest.raises(BadInput, match="do not count its facts"):
        replace(whole, recipe={"parts": entries}).without({0})


# scale


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.5, -2.0, 0.1, 3.0]), st.sampled_from([SHAPES, SMALL]))
def test_a_scaled_patch_is_the_update_times_that(
    seed: int, factor: float, shapes: dict[str, tuple[int, int]]
) -> None:
    patch = solved(5, seed, shapes)
    other = reread(scaled(patch, factor))
    assert other.id != patch.id
    assert scale_of(other.recipe, other.name) == factor
    assert other.facts == patch.facts
    for name, delta in other.deltas.items():
        wanted = factor * product(patch.deltas[name])
        assert torch.allclose(product(delta), wanted, rtol=0, atol=3e-7 * float(wanted.norm()))
    left, alone = other.without({1, 3}), scaled(patch.without({1, 3}), factor)
    for name, delta in left.deltas.items():
        assert torch.allclose(product(delta), product(alone.deltas[name]), rtol=1e-5, atol=1e-6)


def test_a_scaled_dense_update_is_the_rounded_product_of_its_terms() -> None:
    """As the format has it: a fact taken out of another part multiplies this one's terms again."""
    patch = solved(5, 0, SMALL)
    assert any(delta.dense is not None for delta in patch.deltas.values())
    other = scaled(patch, 0.3)
    assert other.solution is not None
    for name, delta in other.deltas.items():
        if delta.dense is not None:
            terms = other.solution.residuals[name].double().T @ other.solution.solved[name].double()
            assert torch.equal(delta.dense, terms.float())


def test_a_scaled_squash_says_so_of_each_part() -> None:
    whole = reread(scaled(joined([solved(2, 1), scaled(solved(1, 2), 3.0)]), 0.5))
    assert [scale_of(part.recipe, part.name) for part in parts_of(whole)] == [0.5, 1.5]
    assert torch.allclose(
        product(whole.deltas["a.w"]),
        0.5 * product(solved(2, 1).deltas["a.w"]) + 1.5 * product(solved(1, 2).deltas["a.w"]),
    )


@pytest.mark.parametrize("value", ["x", "2", [2.0], None, True, 0, 10**400])
def test_a_scale_that_is_no_number_is_refused_by_the_patch_s_name(value: object) -> None:
    patch = solved(1, 1)
    odd = replace(patch, recipe={**patch.recipe, "scale": value})
    for one in (odd, joined([odd, solved(1, 2)])):
        with pytest.raises(BadInput, match=f"{one.name}: the scale in its recipe is not a number"):
            scaled(one, 2.0)


def test_half_and_twice_are_the_bytes_again() -> None:
    patch = solved(3, 1)
    again = scaled(scaled(patch, 0.5), 2.0)
    assert again.files()[KEYS] == patch.files()[KEYS]
    assert torch.equal(again.deltas["a.w"].B, patch.deltas["a.w"].B)
    assert scale_of(again.recipe, again.name) == 1.0


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf"), -float("inf"), 1e-60, 1e60])
def test_scales_that_leave_no_patch_are_refused(factor: float) -> None:
    with pytest.raises(BadInput, match="a scale of"):
        scaled(solved(1, 1), factor)


def test_a_dense_patch_without_its_keys_is_not_scaled_under_them() -> None:
    bare = replace(solved(5, 1, SMALL), solution=None, left_out="0" * 64)
    with pytest.raises(BadInput, match=r"keys\.safetensors beside it"):
        scaled(bare, 2.0)
    never = replace(bare, left_out=None)
    assert scaled(never, 2.0).left_out is None


def test_facts_of_a_squash_are_the_names_source() -> None:
    one, two = solved(1, 1), solved(1, 2)
    assert joined([one, two]).name not in (one.name, two.name)
    assert joined([one, two]).name == Patch((*one.facts, *two.facts), one.deltas, BASE, "x", {}).name
    assert facts(1, 100) == one.facts
    assert isinstance(joined([one, two]).solution, Solution)
