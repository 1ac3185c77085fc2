"""Materialised entries against fractions: one rounding of the exact sum, however it is reached."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from exact_helpers import DIGITS, Overflows, exact_sum, rounded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.algebra import rounding
from patchkit.algebra.factors import Delta
from patchkit.algebra.rounding import materialise, round_sum
from patchkit.errors import BadInput

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
AWKWARD = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    1 + 2.0**-23,
    1 - 2.0**-24,
    2.0**-7,
    2.0**-8,
    2.0**-9,
    2.0**-11,
    2.0**-12,
    2.0**-24,
    2.0**-25,
    2.0**-60,
    -(2.0**-60),
    2.0**-74,
    2.0**-75,
    2.0**-126,
    2.0**-133,
    2.0**-134,
    2.0**-149,
    -(2.0**-149),
    2.0**60,
    -(2.0**60),
    65504.0,
    65520.0,
    3.3895313892515355e38,
    3.4028234663852886e38,
]
numbers = st.sampled_from(AWKWARD) | st.floats(width=32, allow_nan=False, allow_infinity=False)


def check_every_entry(base: Tensor, B: Tensor, A: Tensor) -> None:
    """Equal to the oracle, bit for bit, or refused where the oracle overflows."""
    try:
        expected = torch.tensor(
            [[expected_entry(base, B, A, i, j) for j in range(A.shape[1])] for i in range(B.shape[0])],
            dtype=torch.float64,
        ).to(base.dtype)
    except Overflows:
        with pytest.raises(BadInput, match="w: would"):
            materialise(base, [Delta(B, A)], "w")
        return
    found = materialise(base, [Delta(B, A)], "w")
    assert found.dtype == base.dtype
    assert torch.equal(found.view(BITS[base.dtype]), expected.view(BITS[base.dtype]))


def expected_entry(base: Tensor, B: Tensor, A: Tensor, i: int, j: int) -> float:
    weight, update = exact_sum(base, B, A, i, j)
    if update == 0:
        return base[i, j].item()  # nothing is added: -0.0 stays
    exact = weight + update
    value = rounded(exact, base.dtype)
    return -0.0 if value == 0 and exact < 0 else value


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    dtype = draw(st.sampled_from(DTYPES))
    m, n, r = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def matrix(rows: int, columns: int) -> Tensor:
        size = rows * columns
        return torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size))).reshape(rows, columns)

    base = matrix(m, n).to(dtype)
    return torch.where(base.isfinite(), base, torch.ones((), dtype=dtype)), matrix(m, r), matrix(r, n)


@settings(max_examples=400)
@given(problems())
@example((torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)))
@example((-torch.zeros(1, 1), torch.tensor([[1.0, -1.0]]), torch.ones(2, 1)))
@example((torch.ones(1, 1), torch.tensor([[-1.0]]), torch.ones(1, 1)))
def test_every_entry_is_the_exact_sum_rounded_once(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    check_every_entry(*problem)


@settings(max_examples=150)
@given(
    st.sampled_from(DTYPES),
    st.integers(-(2**15), 2**15 - 1),
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.sampled_from([2.0**-149, 2.0**-100, 2.0**-60]),
    st.sampled_from([1.0, 2.0**-10, 2.0**12]),
)
def test_a_hair_beside_a_tie_decides_it(
    dtype: torch.dtype, pattern: int, side: float, hair: float, cancelled: float
) -> None:
    """Base + half a unit in the last place ± 2^-298..: ties that float64 cannot tell."""
    base = torch.tensor([[pattern]], dtype=torch.int16)
    if dtype == torch.float32:
        base = (base.int() << 16) | 0x1235
    base = base.view(dtype)
    if not torch.isfinite(base).all():
        return
    digits, lowest = DIGITS[dtype]
    unit = Fraction(2) ** max(int(torch.frexp(base.float()).exponent) - digits, lowest)
    # unit / 2 = 2^-75 · (2^75 unit / 2), both factors float32 even where unit / 2 is not
    half = float(unit / 2 * 2**75)
    if half >= 2.0**127:
        return
    B = torch.tensor([[2.0**-75, side * hair, cancelled, -cancelled]])
    A = torch.tensor([[half], [hair], [3.0], [3.0]])
    check_every_entry(base, B, A)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_rounding_in_two_steps_would_be_wrong(dtype: torch.dtype, unit: float) -> None:
    """The test above has teeth: what torch does on its own differs from the nearest number."""
    base = torch.tensor([[1.0]], dtype=dtype)
    B, A = torch.tensor([[unit / 2, 2.0**-20]]), torch.tensor([[1.0], [2.0**-20]])
    in_two_steps = (base.double() + B.double() @ A.double()).to(dtype)
    assert in_two_steps.item() == 1.0  # through float32: the tie, then to even
    assert materialise(base, [Delta(B, A)]).item() == 1 + unit


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_entries_over_many_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_TILE_ROWS", 16)
    monkeypatch.setattr(rounding, "_TILE_COLUMNS", 20)
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(37, 45, generator=generator) * 0.02).to(dtype)
    base[3], base[:, 5] = 0.0, -0.0
    B, A = torch.randn(37, 6, generator=generator), torch.randn(6, 45, generator=generator) * 1e-3
    B[4], A[:, 6] = 0.0, 0.0
    B[3, 3:], A[3:] = -B[3, :3], A[:3]  # row 3: everything cancels, exactly
    check_every_entry(base, B, A)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_by_sample_and_where_the_float64_product_could_not_decide(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    undecided: list[float] = []
    settle = rounding._nearest_sum

    def spy(terms: list[float], form: rounding.Format) -> float:
        undecided.append(settle(terms, form))
        expected = rounded(sum(map(Fraction, terms), Fraction(0)), dtype)
        assert undecided[-1] == expected
        return undecided[-1]

    monkeypatch.setattr(rounding, "_nearest_sum", spy)
    generator = torch.Generator().manual_seed(2)
    base = (torch.randn(520, 2100, generator=generator) * 0.02).to(dtype)
    B, A = torch.randn(520, 64, generator=generator) * 0.1, torch.randn(64, 2100, generator=generator) * 0.1
    found = materialise(base, [Delta(B, A)])
    for i, j in torch.randint(0, 520, (300, 2), generator=generator).tolist():
        assert found[i, j].item() == rounded(sum(exact_sum(base, B, A, i, j)), dtype)
    assert len(undecided) < 1000  # of a million: the exact sums stay a rare exception


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_decides_what_it_can(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact sums are slow. Where a float32 is near a tie, float64 tells on which side of it the sum is."""
    generator = torch.Generator().manual_seed(3)
    base = (torch.randn(256, 1024, generator=generator) * 0.02).to(dtype)  # one tile
    B, A = torch.randn(256, 8, generator=generator) / 50, torch.randn(8, 1024, generator=generator) / 50
    asked: list[tuple[int, int]] = []
    terms, exact = rounding._Tile._terms, rounding._nearest_sum

    def only_tiny(numbers: list[float], form: rounding.Format) -> float:
        assert abs(sum(numbers)) < form.tiny, "float64 could tell"
        return exact(numbers, form)

    def noted(self: rounding._Tile, i: Tensor, j: Tensor) -> Tensor:
        asked.extend(zip(i.tolist(), j.tolist(), strict=True))
        return terms(self, i, j)

    monkeypatch.setattr(rounding._Tile, "_terms", noted)
    monkeypatch.setattr(rounding, "_nearest_sum", only_tiny)
    found = materialise(base, [Delta(B, A)], "w")
    assert len(asked) > 10
    for i, j in asked:
        assert found[i, j].item() == expected_entry(base, B, A, i, j)


@settings(max_examples=10)
@given(st.sampled_from(DTYPES), st.integers(0, 2**32), st.permutations(range(4)))
def test_bytes_do_not_depend_on_threads_order_or_blocking(
    dtype: torch.dtype, seed: int, order: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(300, 130, generator=generator) * 0.05).to(dtype)
    deltas = [
        Delta(torch.randn(300, r, generator=generator), torch.randn(r, 130, generator=generator) / 100)
        for r in (1, 7, 20)
    ]
    deltas.append(Delta(dense=torch.randn(300, 130, generator=generator) / 100))
    expected = materialise(base, deltas)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(materialise(base, [deltas[i] for i in order]), expected)
    finally:
        torch.set_num_threads(before)
    tall = torch.cat(
        [materialise(base[rows], _rows(deltas, rows)) for rows in (slice(0, 111), slice(111, 300))]
    )
    assert torch.equal(tall, expected)


def _rows(deltas: list[Delta], rows: slice) -> list[Delta]:
    return [
        Delta(dense=d.dense[rows]) if d.dense is not None else Delta(d.B[rows], d.A)  # type: ignore[index]
        for d in deltas
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_updates_cancel_exactly(dtype: torch.dtype) -> None:
    base = torch.tensor([[0.1, -0.0, 3.0]]).to(dtype)
    large = torch.tensor([[2.0**100, 2.0**-149, -(2.0**80)]])
    there, back = Delta(dense=large), Delta(dense=-large)
    found = materialise(base, [there, back])
    assert torch.equal(found.view(BITS[dtype]), base.view(BITS[dtype]))


def test_conv1d_weights_are_turned_once() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(6, 6, generator=generator)  # square: only the flag can tell
    B, A = torch.randn(6, 2, generator=generator), torch.randn(2, 6, generator=generator)
    plain = materialise(base.T.contiguous(), [Delta(B, A)])
    assert torch.equal(materialise(base, [Delta(B, A, transposed=True)]), plain.T)
    dense = torch.randn(6, 6, generator=generator)
    plain = materialise(base.T.contiguous(), [Delta(dense=dense)])
    assert torch.equal(materialise(base, [Delta(dense=dense, transposed=True)]), plain.T)


def test_no_patch_changes_nothing() -> None:
    for dtype in DTYPES:
        base = torch.tensor([[1.0, -0.0, 2.0**-24]]).to(dtype)
        assert torch.equal(materialise(base, []).view(BITS[dtype]), base.view(BITS[dtype]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_with_nan_or_infinity_is_refused_by_name(dtype: torch.dtype, bad: float) -> None:
    base = torch.ones(3, 300, dtype=dtype)
    base[1, 270] = bad
    with pytest.raises(BadInput, match=r"^layer\.w: holds NaN or infinity already"):
        materialise(base, [Delta(torch.ones(3, 1), torch.ones(1, 300))], "layer.w")


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_is_refused_and_the_largest_number_is_not(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    base = torch.full((1, 1), largest, dtype=dtype)
    unit = 2.0 ** (int(torch.frexp(torch.tensor(largest)).exponent) - DIGITS[dtype][0])
    step = Delta(torch.tensor([[unit / 2]]), torch.tensor([[1.0]]))
    hair = Delta(torch.tensor([[-(2.0**-149)]]), torch.tensor([[1.0]]))
    with pytest.raises(BadInput, match="w: would"):
        materialise(base, [step], "w")
    assert materialise(base, [step, hair]).item() == largest  # a hair below the tie


def test_a_wrong_shape_or_dtype_is_refused_by_name() -> None:
    delta = Delta(torch.ones(2, 1), torch.ones(1, 3))
    with pytest.raises(BadInput, match=r"^w: its shape is \[3, 2\]"):
        materialise(torch.zeros(3, 2), [delta], "w")
    with pytest.raises(BadInput, match=r"^w: is stored as torch\.float64"):
        materialise(torch.zeros(2, 3, dtype=torch.float64), [delta], "w")
    with pytest.raises(BadInput, match=r"int8; only .* can be edited; save the model in one of them"):
        round_sum(torch.zeros(2, 3, dtype=torch.int8), [])


MEMORY = """
import resource, sys, torch
from patchkit.algebra.factors import Delta
from patchkit.algebra.rounding import materialise
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
base = torch.zeros(6000, 6000, dtype=torch.bfloat16).normal_()
delta = Delta(torch.randn(6000, 64), torch.randn(64, 6000))
materialise(base[:300, :300].clone(), [Delta(torch.randn(300, 64), torch.randn(64, 300))])
before = peak()
materialise(base, [delta])
print(peak() - before)
"""


def test_memory_is_the_result_and_a_few_tiles() -> None:
    """A float64 copy of this weight alone would be 275 MiB; the result is 69."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 69 + 64
