"""The algebra against literal float64 writings of it, and files that are the same on every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact_helpers import exact_sum, facts, rounded, solved_patch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.errors import BadInput, NotFound, WouldOverwrite
from patchkit.patch import DELTA, FACTS, KEYS, break_even

BASE = "sha256:" + "cd" * 32
SHAPES = {"low.w": (40, 60), "dense.w": (6, 9)}  # five facts: 5 <= 24, and 5 > 3


def solved_again(
    patch: Patch, statistics: dict[str, Tensor], kept: list[int], residuals: Tensor, name: str
) -> Tensor:
    """R_S ((λC + K_S K_Sᵀ)⁻¹ K_S)ᵀ, literally, in float64."""
    assert patch.solution is not None
    K = patch.solution.keys[name].double().T[:, kept]
    X = torch.linalg.inv(statistics[name] + K @ K.T) @ K
    return residuals.double()[:, kept] @ X.T


def product(delta: Delta) -> Tensor:
    if delta.dense is not None:
        return delta.dense.double()
    assert delta.B is not None
    assert delta.A is not None
    return delta.B.double() @ delta.A.double()


def residuals_of(patch: Patch, name: str) -> Tensor:
    """Columns, [d_out, N]."""
    assert patch.solution is not None
    B = patch.deltas[name].B
    return patch.solution.residuals[name].T if B is None else B


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sets(st.integers(0, 4), min_size=1, max_size=4))
def test_taking_facts_out_is_solving_without_them(seed: int, dropped: set[int]) -> None:
    patch, statistics = solved_patch(SHAPES, 5, BASE, seed=seed)
    kept = [i for i in range(5) if i not in dropped]
    found = patch.without(dropped)
    assert found.facts == tuple(patch.facts[i] for i in kept)
    for name in SHAPES:
        expected = solved_again(patch, statistics, kept, residuals_of(patch, name), name)
        error = (product(found.deltas[name]) - expected).norm() / expected.norm()
        assert error < 1e-6
    assert found.solution is not None
    assert patch.solution is not None
    assert torch.equal(found.solution.targets, patch.solution.targets[kept])
    assert torch.equal(found.solution.keys["low.w"], patch.solution.keys["low.w"][kept])
    assert (found.base, found.method, found.recipe) == (patch.base, patch.method, patch.recipe)


def test_facts_taken_out_one_by_one_or_at_once_are_the_same_edit() -> None:
    patch, _ = solved_patch(SHAPES, 5, BASE)
    once, steps = patch.without([1, 3]), patch.without([3]).without([1])
    for name in SHAPES:
        difference = product(once.deltas[name]) - product(steps.deltas[name])
        assert difference.norm() < 1e-5 * product(once.deltas[name]).norm()
    assert once.facts == steps.facts


def test_the_form_follows_the_size() -> None:
    """Nine terms are past the break-even of 6 x 9, three are not: taking facts out gives factors again."""
    patch, _ = solved_patch(SHAPES, 5, BASE)
    assert patch.deltas["low.w"].dense is None
    assert patch.deltas["dense.w"].B is None
    assert patch.deltas["dense.w"].rank == 6
    fewer = patch.without([0, 4])
    assert fewer.deltas["dense.w"].rank == 3 == break_even(6, 9)
    assert fewer.deltas["dense.w"].dense is None
    assert fewer.solution is not None
    assert not fewer.solution.solved
    assert Patch.from_files(fewer.files(), "x").files() == fewer.files()


def test_a_dense_update_is_the_exact_product_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(6, 5, generator=generator), torch.randn(5, 9, generator=generator)
    patch = Patch(facts(5), {"w": Delta(B, A, transposed=True)}, BASE, "ft", {})
    delta = patch.deltas["w"]
    assert delta.transposed
    assert delta.dense is not None
    zeros = torch.zeros(6, 9)
    for i in range(6):
        for j in range(9):
            assert delta.dense[i, j].item() == rounded(sum(exact_sum(zeros, B, A, i, j)), torch.float32)


@pytest.mark.parametrize("count", [0, 5, -1])
def test_a_fact_that_is_not_there_cannot_be_taken_out(count: int) -> None:
    patch, _ = solved_patch(SHAPES, 5, BASE)
    if count == 0:
        assert patch.without([]) is patch
        return
    with pytest.raises(BadInput, match=f"^{patch.name}: no fact would stay, or there is no such fact"):
        patch.without([count])


def test_the_last_fact_stays() -> None:
    patch, _ = solved_patch(SHAPES, 5, BASE)
    with pytest.raises(BadInput, match="revert the patch"):
        patch.without(range(5))


def test_without_keys_no_single_fact_can_be_taken_out() -> None:
    deltas = {"w": Delta(torch.ones(4, 1), torch.ones(1, 4))}
    with pytest.raises(BadInput, match="ft keeps no keys"):
        Patch(facts(2), deltas, BASE, "ft", {}).without([0])
    files = solved_patch(SHAPES, 5, BASE)[0].files()
    shipped = Patch.from_files({name: files[name] for name in (FACTS, DELTA)}, "x")
    with pytest.raises(BadInput, match="keys were not shipped"):
        shipped.without([0])


def test_keys_that_leave_no_way_back_are_refused() -> None:
    """λ → 0: the fact's term answers its own key wholly, I - G is singular."""
    key = torch.zeros(1, 8)
    key[0, 0] = 1.0
    solution = Solution(torch.zeros(2, 3), {"w": key.repeat(2, 1)})
    patch = Patch(facts(2), {"w": Delta(torch.ones(8, 2), key.repeat(2, 1))}, BASE, "memit", {}, (), solution)
    with pytest.raises(BadInput, match="cannot be told apart"):
        patch.without([0])


def test_leaving_the_keys_out_does_not_change_the_id() -> None:
    patch, _ = solved_patch(SHAPES, 5, BASE)
    files = patch.files()
    shipped = Patch.from_files({name: files[name] for name in (FACTS, DELTA)}, "x")
    assert shipped.id == patch.id
    assert shipped.files() == {name: files[name] for name in (FACTS, DELTA)}


def test_the_stack_it_was_solved_on_is_a_set() -> None:
    patch, _ = solved_patch(SHAPES, 2, BASE)
    ids = ["b" * 64, "a" * 64, "b" * 64]
    first, second = (
        Patch(patch.facts, patch.deltas, BASE, "memit", {}, tuple(order), patch.solution)
        for order in (ids, sorted(ids))
    )
    assert first.files() == second.files()
    assert first.solved_on == ("a" * 64, "b" * 64)


def test_the_library_reads_the_files(tmp_path: Path) -> None:
    patch, _ = solved_patch(SHAPES, 5, BASE)
    patch.save(tmp_path / "p")
    delta, keys = load_file(tmp_path / "p" / DELTA), load_file(tmp_path / "p" / KEYS)
    assert torch.equal(delta["low.w.A"], patch.deltas["low.w"].A)
    assert torch.equal(delta["low.w.B"], patch.deltas["low.w"].B)
    assert torch.equal(delta["dense.w.dense"], patch.deltas["dense.w"].dense)
    assert patch.solution is not None
    assert torch.equal(keys["targets"], patch.solution.targets)
    assert set(keys) == {
        "targets", "low.w.keys", "dense.w.keys", "dense.w.solved", "dense.w.residuals",
    }  # fmt: skip


def test_saved_and_loaded(tmp_path: Path) -> None:
    patch, _ = solved_patch(SHAPES, 5, BASE)
    patch.save(tmp_path / "p")
    (tmp_path / "p" / ".DS_Store").write_bytes(b"not ours")
    found = Patch.load(tmp_path / "p")
    assert found.files() == patch.files()
    assert found.id == patch.id
    with pytest.raises(WouldOverwrite, match="holds files"):
        patch.save(tmp_path / "p")
    with pytest.raises(NotFound, match="no such patch folder"):
        Patch.load(tmp_path / "q")
    (tmp_path / "p" / DELTA).unlink()
    with pytest.raises(BadInput, match="a patch is"):
        Patch.load(tmp_path / "p")
    (tmp_path / "p" / DELTA).symlink_to("/dev/zero")
    with pytest.raises(NotFound, match="cannot be read"):
        Patch.load(tmp_path / "p")


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.booleans(), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5), st.integers() | st.text(max_size=3), max_size=3
    ),
)
def test_any_patch_comes_back_from_its_files(
    weights: list[tuple[int, int, int, bool, bool]], recipe: dict[str, object]
) -> None:
    deltas, drawn = {}, torch.Generator().manual_seed(len(weights))
    for n, (d_out, d_in, r, transposed, dense) in enumerate(weights):
        B, A = torch.randn(d_out, r, generator=drawn), torch.randn(r, d_in, generator=drawn)
        low = Delta(B, A, transposed=transposed)
        deltas[f"w{n}"] = Delta(dense=B @ A, transposed=transposed) if dense else low
    patch = Patch(facts(1), deltas, BASE, "ft", recipe)
    found = Patch.from_files(patch.files(), "x")
    assert found.files() == patch.files()
    assert found.recipe == recipe
    for name, delta in patch.deltas.items():
        assert found.deltas[name].transposed == delta.transposed
        assert found.deltas[name].shape == delta.shape
        assert torch.equal(product(found.deltas[name]), product(delta))


SAME = """
import torch
from exact_helpers import solved_patch
patch, _ = solved_patch({"b.w": (40, 60), "a.w": (6, 9)}, 5, "sha256:" + "cd" * 32)
fewer = patch.without([2])
import hashlib
print(patch.id, fewer.id, *(hashlib.sha256(d).hexdigest() for d in {**patch.files()}.values()))
"""


def test_fresh_processes_with_other_hash_seeds_write_the_same_bytes() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", SAME],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert len(said.pop().split()) == 5


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_the_norm_is_that_of_the_product(d_out: int, d_in: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = Delta(torch.randn(d_out, r, generator=generator), torch.randn(r, d_in, generator=generator))
    expected = product(delta).norm().item()
    assert delta.norm() == pytest.approx(expected, rel=1e-12)
    assert Delta(dense=product(delta).float()).norm() == pytest.approx(expected, rel=1e-6)


def test_the_norm_survives_cancellation() -> None:
    """Two large terms that nearly cancel: squared norms would have lost every digit."""
    B = torch.tensor([[1e6, -1e6], [0.0, 1e-3]])
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert Delta(B, A).norm() == pytest.approx(product(Delta(B, A)).norm().item(), rel=1e-6)


def test_sizes_and_norms() -> None:
    patch, _ = solved_patch(SHAPES, 5, BASE)
    assert patch.deltas["low.w"].nbytes == 4 * 5 * (40 + 60)
    assert patch.deltas["dense.w"].nbytes == 4 * 6 * 9
    assert patch.nbytes == 4 * 5 * 100 + 4 * 54
    assert patch.norms() == {name: delta.norm() for name, delta in patch.deltas.items()}


def test_updates_are_plain_float32_on_the_cpu() -> None:
    B = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    delta = Delta(B, torch.randn(6, 4, dtype=torch.float64).T)
    assert delta.B is not None
    assert delta.A is not None
    assert delta.A.is_contiguous()
    assert (delta.B.dtype, delta.B.requires_grad) == (torch.float32, False)


def test_updates_that_make_no_sense_are_refused() -> None:
    ones = torch.ones(2, 2)
    for parts in (
        {},
        {"B": ones},
        {"A": ones},
        {"B": ones, "A": ones, "dense": ones},
        {"B": ones, "dense": ones},
    ):
        with pytest.raises(BadInput, match="B and A, or dense"):
            Delta(**parts)
    with pytest.raises(BadInput, match="do not fit"):
        Delta(torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(BadInput, match="not a matrix"):
        Delta(dense=torch.ones(3))
    for bad in (float("nan"), float("inf"), 1e39):  # the last is infinite in float32
        with pytest.raises(BadInput, match="NaN or infinity"):
            Delta(dense=torch.full((2, 2), bad, dtype=torch.float64))


def test_patches_whose_parts_disagree_are_refused() -> None:
    delta = Delta(torch.ones(8, 2), torch.ones(2, 8))
    targets, keys = torch.ones(2, 3), {"w": torch.ones(2, 8)}
    for parts, reason in (
        ((facts(0), {"w": delta}, None), "at least one fact"),
        ((facts(2), {}, None), "one changed weight"),
        ((facts(3), {"w": delta}, Solution(targets, keys)), "2 targets for 3 facts"),
        ((facts(2), {"w": delta}, Solution(targets, {})), "do not belong"),
        ((facts(2), {"w": delta}, Solution(targets, {"v": keys["w"]})), "do not belong"),
        ((facts(2), {"w": delta}, Solution(targets, keys, keys, keys)), "do not belong"),
        ((facts(2), {"w": delta}, Solution(targets, {"w": torch.ones(2, 7)})), "not 2 rows of 8"),
        ((facts(1), {"w": delta}, Solution(torch.ones(1, 3), {"w": torch.ones(1, 8)})), "one term for each"),
    ):
        with pytest.raises(BadInput, match=reason):
            Patch(parts[0], parts[1], BASE, "memit", {}, (), parts[2])
