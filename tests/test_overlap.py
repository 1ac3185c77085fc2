"""What patches do to one another's facts, against the dense products in float64; `stack` with it, sorted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_helpers import Cli, cli
from git_helpers import BASE, WEIGHT, add, fact, git_environment, make_store
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.algebra.interference import interference
from patchkit.algebra.overlap import incomparable, pairwise
from patchkit.catalogue import Catalogue
from patchkit.repository import Repository

__all__ = ["cli", "git_environment"]

OTHER = "model.layers.1.mlp.down_proj.weight"
SIZES = {WEIGHT: (12, 20), OTHER: (12, 20)}


def made(first: int, count: int, seed: int, weights: tuple[str, ...] = (WEIGHT, OTHER)) -> Patch:
    """A patch of `count` facts; with more than seven, its updates are past the break-even and kept dense."""
    random = torch.Generator().manual_seed(seed)
    facts = tuple(fact(first + number) for number in range(count))

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    deltas = {name: Delta(matrix(SIZES[name][0], count), matrix(count, SIZES[name][1])) for name in weights}
    solution = Solution(matrix(count, 12), {name: matrix(count, SIZES[name][1]) for name in weights})
    return Patch(facts, deltas, BASE, "memit", {"lambda": 300.0}, (), solution)


def whole(delta: Delta) -> Tensor:
    return delta.dense.double() if delta.B is None else delta.B.double() @ delta.A.double()


def wanted(patch: Patch, other: Patch, place: int) -> tuple[dict[str, float], float]:
    """By weight and overall, from dense matrices."""
    above, below = {}, {}
    for name, delta in patch.deltas.items():
        r = delta.B[:, place] if delta.B is not None else patch.solution.residuals[name][place]
        k = patch.solution.keys[name][place].double()
        moved = whole(other.deltas[name]) @ k if name in other.deltas else torch.zeros(1).double()
        above[name], below[name] = float(moved.norm()), float(r.double().norm())
    overall = sum(v * v for v in above.values()) ** 0.5 / sum(v * v for v in below.values()) ** 0.5
    return {name: above[name] / below[name] for name in above}, overall


@given(
    seed=st.integers(0, 1000), counts=st.lists(st.integers(1, 9), min_size=2, max_size=4), one=st.booleans()
)
def test_it_is_what_the_other_update_does_to_the_keys(seed: int, counts: list[int], one: bool) -> None:
    patches = {}
    for number, count in enumerate(counts):
        weights = (WEIGHT,) if one and number % 2 else (WEIGHT, OTHER)
        patch = made(100 * number, count, seed + number, weights)
        patches[patch.name] = patch
    found = pairwise(patches)
    for name, patch in patches.items():
        assert set(found[name]) == patches.keys() - {name}
        for other in found[name]:
            single = interference(patch, [patches[other]])
            for place, item in enumerate(single):
                by_weight, overall = wanted(patch, patches[other], place)
                assert item.fact == patch.facts[place]
                assert item.by_weight == pytest.approx(by_weight, rel=1e-9)
                assert item.overall == pytest.approx(overall, rel=1e-9)
            assert found[name][other] == pytest.approx(max(item.overall for item in single), rel=1e-9)


def test_a_patch_without_keys_disturbs_and_cannot_be_measured_itself() -> None:
    keyed, bare = made(0, 2, 1), made(10, 1, 2)
    bare = Patch(bare.facts, bare.deltas, BASE, "ft", {})
    found = pairwise({"keyed": keyed, "bare": bare})
    assert found["bare"] is None
    assert found["keyed"] == {"bare": pytest.approx(max(i.overall for i in interference(keyed, [bare])))}


def test_stack_shows_norms_shares_and_interference_and_sorts_by_them(
    cli: Cli, tmp_path: Path, git_environment: None
) -> None:
    store = make_store(tmp_path / "knowledge")
    patches = [made(0, 1, 1), made(10, 3, 2), made(20, 2, 3)]
    for patch in patches:
        add(store, patch)
    names = [patch.name for patch in patches]
    stack = ("-C", store.root, "stack")
    assert [row["name"] for row in cli.ok(*stack, "--json").json] == names
    assert [row["norm"] for row in cli.ok(*stack, "--json").json] == [None] * 3
    assert "interference" not in cli.ok(*stack, "--json").json[0]
    assert "–" in cli.ok(*stack).out
    repository = Repository.open(store.root)
    repository.reindex()
    norms = [sum(float(whole(d).square().sum()) for d in patch.deltas.values()) ** 0.5 for patch in patches]
    rows = cli.ok(*stack, "--json").json
    assert [row["norm"] for row in rows] == pytest.approx(norms, rel=1e-6)
    assert [row["share"] for row in rows] == [None] * 3
    Catalogue(store.own).record_norms(patches[0].id, {}, BASE, {WEIGHT: 30.0, OTHER: 40.0})
    rows = cli.ok(*stack, "--json").json
    assert [row["share"] for row in rows] == pytest.approx([norm / 50 for norm in norms], rel=1e-6)
    assert f"{norms[0]:.3g}" in cli.ok(*stack).out
    found = pairwise({patch.name: patch for patch in patches})
    rows = cli.ok(*stack, "--interference", "--json").json
    assert {row["name"]: row["interference"] for row in rows} == {
        name: pytest.approx(row) for name, row in found.items()
    }
    largest = {name: max(row.values()) for name, row in found.items()}
    for column, values in (("norm", dict(zip(names, norms, strict=True))), ("interference", largest)):
        rows = cli.ok(*stack, "--sort", column, "--json").json
        assert [row["name"] for row in rows] == sorted(names, key=lambda name: -values[name])
    assert [row["facts"] for row in cli.ok(*stack, "--sort", "facts", "--json").json] == [3, 2, 1]
    assert [row["name"] for row in cli.ok(*stack, "--sort", "patch", "--json").json] == sorted(names)
    worst = max(largest, key=lambda name: largest[name])
    assert f"{worst} is disturbed most, by " in cli.ok(*stack, "--interference").out
    assert cli(*stack, "--sort", "colour").code == 2


def test_patches_of_another_shape_are_named() -> None:
    one, other = made(0, 2, 1), made(10, 1, 2)
    assert incomparable([one, other]) is None
    weight, delta = next(iter(other.deltas.items()))
    wide = Delta(delta.B, torch.cat([delta.A, delta.A], 1))
    assert f"{weight} has another shape" in str(
        incomparable([one, replace(other, deltas={weight: wide}, solution=None)])
    )


def test_interference_of_patches_of_another_shape_is_refused(
    cli: Cli, tmp_path: Path, git_environment: None
) -> None:
    store = make_store(tmp_path / "knowledge")
    one, other = made(0, 2, 1), made(10, 1, 2)
    delta = other.deltas[WEIGHT]
    wide = Delta(delta.B, torch.cat([delta.A, delta.A], 1))
    add(store, one)
    add(store, replace(other, deltas={WEIGHT: wide}, solution=None))
    done = cli("-C", store.root, "stack", "--interference")
    assert (done.code, done.out) == (65, "")
    assert f"{WEIGHT} has another shape than in the other patches; patchkit build --dry-run" in done.err
    assert done.err.count("\n") == 1
