"""Patches solved apart and then together are one batch: checked against a solve with C, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.algebra.joint import solve_jointly
from patchkit.algebra.parts import joined
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.patch import JOINT

BASE = "sha256:" + "a" * 64
RECIPE = {"lambda": 30.0, "statistics_digest": "d" * 64, "layers": [0, 1]}
SHAPES = {"low": (14, 24), "high": (14, 20)}


class World:
    """Second moments C of each weight, and the one way to solve: literally, with C."""

    def __init__(self, seed: int, lambda_: float = RECIPE["lambda"]) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.lambda_ = lambda_
        self.C, self.common = {}, {}
        for name, (_, d_in) in SHAPES.items():
            text = self.normal(3 * d_in, d_in)
            self.C[name] = text.T @ text / len(text)
            # As keys of a model have, so that any two interfere: all the more where λ is large.
            common = torch.nn.functional.normalize(self.normal(1, d_in))
            self.common[name] = (d_in * min(lambda_ / 30, 4.0)) ** 0.5 * common

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def solve(self, name: str, K: Tensor) -> Tensor:
        """X = (λC + K Kᵀ)⁻¹ K for keys in rows; rows."""
        return torch.linalg.solve(self.lambda_ * self.C[name] + K.T @ K, K.T).T

    def patch(self, count: int, mark: str, on: tuple[Patch, ...] = (), recipe: dict | None = None) -> Patch:
        deltas, keys = {}, {}
        for name, (d_out, d_in) in SHAPES.items():
            keys[name] = (self.normal(count, d_in) + self.common[name]).float()
            X = self.solve(name, keys[name].double())
            deltas[name] = Delta(self.normal(d_out, count), X)
        facts = tuple(Fact(f"{mark} {i}", "{} plays", "chess") for i in range(count))
        solution = Solution(self.normal(count, 14), keys)
        ids = tuple(p.id for p in on)
        return Patch(facts, deltas, BASE, "memit", recipe or RECIPE, ids, solution)


def residual(patch: Patch, name: str) -> Tensor:
    delta = patch.deltas[name]
    return (patch.solution.residuals[name] if delta.B is None else delta.B.T).double()


def change(patch: Patch, name: str) -> Tensor:
    delta = patch.deltas[name]
    return delta.dense.double() if delta.B is None else delta.B.double() @ delta.A.double()


def batch(world: World, parts: list[tuple[Tensor, Tensor]], name: str) -> Tensor:
    """ΔW of one batch: R Kᵀ (λC + K Kᵀ)⁻¹ with all keys and residuals."""
    K, R = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return R.T @ world.solve(name, K)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    lambda_=st.sampled_from([3.0, 30.0, 3000.0]),
    seed=st.integers(0, 2**20),
)
def test_the_sum_is_the_batch_s_and_each_part_is_its_own(
    counts: list[int], lambda_: float, seed: int
) -> None:
    world = World(seed, lambda_)
    patches = {f"p{i}": world.patch(n, f"P{i}") for i, n in enumerate(counts)}
    joint = solve_jointly(patches)
    assert list(joint) == list(patches)
    for name in SHAPES:
        parts = [(p.solution.keys[name].double(), residual(p, name)) for p in patches.values()]
        wanted = batch(world, parts, name)
        found = sum(change(p, name) for p in joint.values())
        assert (found - wanted).norm() <= 2e-5 * wanted.norm()
        plain = sum(change(p, name) for p in patches.values())
        assert (plain - wanted).norm() > 1e-4 * wanted.norm(), "the plain union is something else"
    for mark, patch in joint.items():
        assert patch.facts == patches[mark].facts
        for name in SHAPES:
            assert torch.equal(patch.solution.keys[name], patches[mark].solution.keys[name])


def test_a_patch_solved_on_another_wants_what_that_one_did_too() -> None:
    world = World(1)
    first = world.patch(3, "First")
    second, other = world.patch(2, "Second", (first,)), world.patch(4, "Other")
    joint = solve_jointly({"first": first, "second": second, "other": other})
    for name in SHAPES:
        K = {p: p.solution.keys[name].double() for p in (first, second, other)}
        above = residual(second, name) + K[second] @ change(first, name).T
        parts = [(K[first], residual(first, name)), (K[second], above), (K[other], residual(other, name))]
        wanted = batch(world, parts, name)
        found = sum(change(p, name) for p in joint.values())
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert joint["second"].solved_on == ()


def test_what_was_solved_together_can_be_joined_by_a_third() -> None:
    world = World(2)
    one, two, three = (world.patch(n, f"P{n}") for n in (2, 3, 4))
    twice = solve_jointly({**solve_jointly({"one": one, "two": two}), "three": three})
    once = solve_jointly({"one": one, "two": two, "three": three})
    for mark in once:
        for name in SHAPES:
            a, b = change(twice[mark], name), change(once[mark], name)
            assert (a - b).norm() <= 1e-4 * b.norm()


def test_half_of_what_was_solved_together_is_refused() -> None:
    world = World(3)
    joint = solve_jointly({"one": world.patch(2, "One"), "two": world.patch(3, "Two")})
    with pytest.raises(BadInput, match="one: was solved together with patches that are not as they were"):
        solve_jointly({"one": joint["one"], "new": world.patch(2, "New")})
    with pytest.raises(BadInput, match="was solved together"):
        solve_jointly({**joint, "two": joint["two"].without([0])})
    unmarked = replace(joint["one"], recipe=RECIPE)
    with pytest.raises(BadInput, match="do not come from one λC"):
        solve_jointly({"one": unmarked, "new": world.patch(2, "New")})


def test_a_fact_taken_out_of_a_part_leaves_the_rest_of_that_part_as_if_it_had_never_been_there() -> None:
    world = World(4)
    one, two = world.patch(3, "One"), world.patch(2, "Two")
    less = solve_jointly({"one": one, "two": two})["one"].without([1])
    again = solve_jointly({"one": one.without([1]), "two": two})["one"]
    for name in SHAPES:
        assert (change(less, name) - change(again, name)).norm() <= 1e-4 * change(again, name).norm()


def test_a_header_from_before_a_field_was_there_means_nought() -> None:
    world = World(5)
    patches = {
        "one": world.patch(1, "One"),
        "two": world.patch(1, "Two", recipe={**RECIPE, "shrinkage": 0.0}),
    }
    assert list(solve_jointly(patches)) == ["one", "two"]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({**RECIPE, "lambda": 31.0}, "another λ"),
        ({**RECIPE, "statistics_digest": "e" * 64}, "other statistics C"),
        ({**RECIPE, "layers": [1, 2]}, "other layers"),
        ({**RECIPE, "shrinkage": 0.1}, "another shrinkage"),
    ],
)
def test_another_recipe_is_refused_by_name(recipe: dict, says: str) -> None:
    world = World(5)
    patches = {"one": world.patch(1, "One"), "two": world.patch(1, "Two", recipe=recipe)}
    with pytest.raises(BadInput, match=f"two: was solved with {says} than one"):
        solve_jointly(patches)


def test_a_solve_that_weighed_its_own_contexts_is_refused_by_name() -> None:
    world = World(5)
    recipe = {**RECIPE, "context_weight": 1.0}
    patches = {"one": world.patch(1, "One", recipe=recipe), "two": world.patch(1, "Two", recipe=recipe)}
    with pytest.raises(BadInput, match=r"one: .*\(context_weight\).*merge without --joint"):
        solve_jointly(patches)


def test_another_base_other_weights_and_missing_keys_are_refused_by_name() -> None:
    world = World(6)
    one, two = world.patch(1, "One"), world.patch(1, "Two")
    low = {"low": two.deltas["low"]}
    half = replace(
        two, deltas=low, solution=Solution(two.solution.targets, {"low": two.solution.keys["low"]})
    )
    cases = {
        "another base": replace(two, base="sha256:" + "b" * 64),
        "another method": replace(two, method="emmet"),
        "other weights": half,
        "its keys were not shipped": replace(two, solution=None, left_out="a" * 64),
        "memit keeps no keys": replace(two, solution=None),
    }
    for says, other in cases.items():
        with pytest.raises(BadInput, match=f"two: .*{says}"):
            solve_jointly({"one": one, "two": other})


def test_factors_that_come_from_no_common_c_are_refused_whatever_they_say() -> None:
    world, elsewhere = World(7), World(8)
    with pytest.raises(BadInput, match="do not come from one λC"):
        solve_jointly({"one": world.patch(3, "One"), "two": elsewhere.patch(3, "Two")})


def test_a_part_knows_with_what_it_was_solved_and_reads_back() -> None:
    world = World(9)
    joint = solve_jointly({"one": world.patch(2, "One"), "two": world.patch(12, "Two")})
    for mark, patch in joint.items():
        read = Patch.from_files(patch.files(), mark)
        assert read.id == patch.id
        assert len(read.recipe[JOINT]) == 2


def test_a_squash_is_refused_by_name() -> None:
    """Its recipe has no λ: two squashes would seem to agree."""
    world = World(12)
    one, two, three = (world.patch(2, mark) for mark in "abc")
    with pytest.raises(BadInput, match="both: is a squash"):
        solve_jointly({"both": joined([one, two]), "third": three})
