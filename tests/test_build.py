"""Builds: exact in any order, by any thread, from any shards; never loadable and wrong; damage is found."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_helpers import facts, solved_patch, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch
from patchkit.algebra.rounding import materialise
from patchkit.builds import build as module
from patchkit.builds import rewriting
from patchkit.builds.build import BUILD_RECORD, BuildRecord, build, stacked, verify_build
from patchkit.builds.record import FINISHED, UNFINISHED
from patchkit.canonical import canonical_json, hash_bytes, hash_file, strict_json
from patchkit.checkpoint import INDEX, SINGLE, Checkpoint
from patchkit.errors import BadInput, Busy, NotWritten, PatchkitError, WouldOverwrite

SHAPES = {"model.layers.0.w": (6, 9), "model.layers.1.w": (6, 9)}
WIDE = {"model.layers.2.w": (256, 160)}  # beyond 32,768 entries torch divides the work over its threads


def base_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    tensors["model.embed.weight"] = torch.randn(7, 3, generator=generator)
    tensors["model.layers.0.attn.w"] = torch.randn(3, 3, generator=generator).to(dtype)
    tensors["transformer.h.w"] = torch.randn(5, 4, generator=generator).to(dtype)  # Conv1D: [d_in, d_out]
    return tensors


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path / "base", base_tensors(), shards=2))


def patch_on(checkpoint: Checkpoint, seed: int = 0, count: int = 2) -> Patch:
    return solved_patch(SHAPES, count, checkpoint.fingerprint(), seed=seed)[0]


def by_id(*patches: Patch) -> dict[str, Patch]:
    return {patch.id: patch for patch in patches}


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the record."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != BUILD_RECORD)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_build_is_the_base_but_for_the_edited_tensors(base: Checkpoint, tmp_path: Path) -> None:
    patch = patch_on(base)
    record = build(base, by_id(patch), tmp_path / "out")
    found, before = tensors_of(tmp_path / "out"), tensors_of(base.folder)
    for name in before:
        expected = materialise(before[name], [patch.deltas[name]]) if name in SHAPES else before[name]
        assert torch.equal(found[name], expected)
        assert hash_bytes(found[name].view(torch.uint8).numpy().tobytes()) == record.expected(name)
    assert not torch.equal(found["model.layers.0.w"], before["model.layers.0.w"])
    for name, header in base.files.items():
        ranges = [info for tensor, info in header.tensors.items() if tensor in SHAPES]
        old, new = (
            bytearray((base.folder / name).read_bytes()),
            bytearray((tmp_path / "out" / name).read_bytes()),
        )
        for info in ranges:
            old[info.start : info.end] = new[info.start : info.end] = bytes(info.size)
        assert old == new  # bytes outside the edited tensors, headers too
    assert verify_build(tmp_path / "out", base) == []


def test_the_record_says_what_was_built(base: Checkpoint, tmp_path: Path) -> None:
    patch = patch_on(base)
    record = build(base, by_id(patch), tmp_path / "out")
    assert record == BuildRecord.read(tmp_path / "out")
    assert record.finished
    assert record.state == FINISHED
    assert record.base == base.fingerprint()
    assert record.patches == (patch.id,)
    assert set(record.touched) == set(SHAPES)
    assert record.tensors == base.hashes()
    assert set(record.files) == {"config.json", "tokenizer.json", INDEX}
    assert record.files["config.json"].sha256 == hash_file(base.folder / "config.json")
    assert BuildRecord.read(tmp_path) is None


dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@settings(max_examples=20)
@given(
    dtypes, st.integers(1, 3), st.integers(0, 999), st.lists(st.sampled_from("ABCD"), min_size=1, max_size=5)
)
def test_reverting_in_any_order_by_any_thread(
    dtype: torch.dtype, shards: int, seed: int, steps: list[str]
) -> None:
    """apply A, apply B, revert A is B alone, to the bit; revert everything is the base."""
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as context:
        context.setattr(
            os, "fsync", lambda _: None
        )  # durable is tested elsewhere; here it would only be slow
        root = Path(folder)
        drawn = torch.Generator().manual_seed(seed)
        wide = {name: torch.randn(shape, generator=drawn).to(dtype) for name, shape in WIDE.items()}
        tensors = {**base_tensors(dtype, seed), **wide}
        base = Checkpoint.open(write_checkpoint(root / "base", tensors, shards))
        patches = some_patches(base, seed, {**SHAPES, **WIDE})
        in_force: set[str] = set()
        try:
            for number, step in enumerate([*steps, "A", "B"]):
                in_force ^= {step}  # applied, or reverted when it is in force
                torch.set_num_threads((1, 2, 4)[number % 3])
                stack = by_id(*(patches[name] for name in sorted(in_force, reverse=number % 2 == 1)))
                build(base, stack, root / "out")
                torch.set_num_threads((2, 4, 1)[number % 3])
                shutil.rmtree(root / "fresh", ignore_errors=True)
                build(base, stack, root / "fresh")
                assert contents(root / "out") == contents(root / "fresh")
            assert verify_build(root / "out", base) == []
            build(base, {}, root / "out")
            assert contents(root / "out") == contents(base.folder)
        finally:
            torch.set_num_threads(before)


def some_patches(
    base: Checkpoint, seed: int, shapes: dict[str, tuple[int, int]] = SHAPES
) -> dict[str, Patch]:
    """Low rank, past the break-even, dense, and Conv1D."""
    generator = torch.Generator().manual_seed(seed)
    fingerprint = base.fingerprint()
    dense = {"model.layers.1.w": Delta(dense=torch.randn(6, 9, generator=generator))}
    B, A = torch.randn(4, 2, generator=generator), torch.randn(2, 5, generator=generator)
    turned = {"transformer.h.w": Delta(B, A, transposed=True)}
    return {
        "A": solved_patch(shapes, 2, fingerprint, seed=seed)[0],
        "B": solved_patch(shapes, 5, fingerprint, seed=seed + 1)[0],
        "C": Patch(facts(1), dense, fingerprint, "ft", {}),
        "D": Patch(facts(2), turned, fingerprint, "ft", {}),
    }


def test_sharding_does_not_matter_to_the_tensors(tmp_path: Path) -> None:
    built = []
    for shards in (1, 3):
        base = Checkpoint.open(write_checkpoint(tmp_path / f"base{shards}", base_tensors(), shards))
        build(base, by_id(patch_on(base)), tmp_path / f"out{shards}")
        built.append(tensors_of(tmp_path / f"out{shards}"))
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])


def test_bringing_in_line_rewrites_only_what_differs(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = patch_on(base)
    one = Patch(facts(1), {"model.layers.1.w": both.deltas["model.layers.1.w"]}, base.fingerprint(), "ft", {})
    build(base, by_id(both), tmp_path / "out")
    written: list[int] = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda h, data, at: (written.append(len(data)), pwrite(h, data, at))[1])
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")}
    build(base, by_id(both), tmp_path / "out")
    assert written == []
    build(base, by_id(one), tmp_path / "out")
    assert written == [6 * 9 * 2]  # layer 0 goes back to the base, layer 1 stays as it is
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")} == inodes
    assert verify_build(tmp_path / "out", base) == []


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("piece", [1, 18, 40, 10_000])
def test_bytes_depend_on_neither_pieces_nor_threads(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, threads: int
) -> None:
    deltas = dict(patch_on(base).deltas)
    deltas["model.layers.0.w"] = Delta(dense=torch.linspace(-1, 1, 54).reshape(6, 9))
    deltas["model.layers.1.w"] = Delta(torch.ones(9, 2), torch.eye(2, 6), transposed=True)
    patch = Patch(facts(2), deltas, base.fingerprint(), "ft", {})
    before = tensors_of(base.folder)
    monkeypatch.setattr(rewriting, "_PIECE", piece)
    earlier = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        build(base, by_id(patch), tmp_path / "out")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(earlier)
    found = tensors_of(tmp_path / "out")
    for name, delta in deltas.items():
        assert torch.equal(found[name], materialise(before[name], [delta]))
    assert verify_build(tmp_path / "out", base) == []


def test_a_build_shares_no_storage_with_the_base(base: Checkpoint, tmp_path: Path) -> None:
    before = contents(base.folder)
    build(base, {}, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_nlink == 1
        assert not path.is_symlink()
        path.write_bytes(b"changed by its owner")
    assert contents(base.folder) == before


def test_folders_below_are_copied_and_git_and_weights_in_another_form_are_not(
    base: Checkpoint, tmp_path: Path
) -> None:
    extra = {
        "sub/deep/notes.txt": True,
        "tokenizer.model": True,
        ".git/config": False,
        ".cache/huggingface/x": False,
        "pytorch_model.bin": False,
        "pytorch_model.bin.index.json": False,
        "consolidated.safetensors": False,
        "sub/model.gguf": False,
        "rust_model.ot": False,
        "64.tflite": False,
        "onnx/model.onnx_data": False,
    }
    for name in extra:
        (base.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (base.folder / name).write_text(name)
    record = build(base, {}, tmp_path / "out")
    for name, copied in extra.items():
        assert (tmp_path / "out" / name).exists() == copied
    assert record.left_out == (
        "64.tflite",
        "consolidated.safetensors",
        "onnx/model.onnx_data",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "rust_model.ot",
        "sub/model.gguf",
    )
    assert verify_build(tmp_path / "out", base) == []


def test_folders_that_are_links_are_copied_and_circles_refused(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("notes")
    (base.folder / "sub").symlink_to(tmp_path / "elsewhere")
    build(base, {}, tmp_path / "out")
    assert not (tmp_path / "out" / "sub").is_symlink()
    assert (tmp_path / "out" / "sub" / "notes.txt").read_text() == "notes"
    assert verify_build(tmp_path / "out", base) == []
    (tmp_path / "elsewhere" / "up").symlink_to(base.folder)
    with pytest.raises(BadInput, match="sub/up: leads back into the folders above it"):
        build(base, {}, tmp_path / "out")


def test_an_index_that_is_not_used_is_left_out(base: Checkpoint, tmp_path: Path) -> None:
    shutil.copy(next(base.folder.glob("*.safetensors")), base.folder / SINGLE)
    single = Checkpoint.open(base.folder)
    record = build(single, {}, tmp_path / "out")
    assert INDEX in record.left_out
    assert set(record.weights) == {SINGLE}


def test_files_that_the_base_no_longer_has_go(base: Checkpoint, tmp_path: Path) -> None:
    (base.folder / "old.txt").write_text("x")
    build(base, {}, tmp_path / "out")
    (base.folder / "old.txt").unlink()
    (base.folder / "tokenizer.json").write_text("mended")
    build(base, {}, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(base.folder)
    assert verify_build(tmp_path / "out", base) == []


def test_a_base_in_other_shards_leaves_no_stale_weights(base: Checkpoint, tmp_path: Path) -> None:
    build(base, {}, tmp_path / "out")
    single = Checkpoint.open(write_checkpoint(tmp_path / "single", base_tensors()))
    build(single, by_id(patch_on(single)), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == {SINGLE}
    assert verify_build(tmp_path / "out", single) == []


def test_a_folder_that_is_not_ours_is_left_alone(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(WouldOverwrite, match="no build of patchkit's"):
        build(base, {}, out)
    assert contents(out).keys() == {"thesis.tex"}
    with pytest.raises(WouldOverwrite, match="is a file"):
        build(base, {}, out / "thesis.tex")
    (out / "thesis.tex").unlink()
    build(base, {}, out)  # empty: ours to use
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", base_tensors(seed=9)))
    with pytest.raises(WouldOverwrite, match="another base"):
        build(other, {}, out)
    assert verify_build(out, base) == []


def test_the_base_is_never_written(base: Checkpoint, tmp_path: Path) -> None:
    before = contents(base.folder)
    (tmp_path / "link").symlink_to(base.folder)
    for out in (
        base.folder,
        base.folder / "out",
        base.folder.parent,
        tmp_path / "link",
        tmp_path / "link" / "x",
    ):
        with pytest.raises(BadInput, match="is the base"):
            build(base, {}, out)
    assert contents(base.folder) == before
    assert not (base.folder / "out").exists()


@pytest.mark.parametrize("trap", ["symbolic link", "hard link", "folder link"])
def test_links_planted_in_a_build_are_not_written_through(
    base: Checkpoint, tmp_path: Path, trap: str
) -> None:
    (base.folder / "sub").mkdir()
    (base.folder / "sub" / "file").write_text("x")
    patches = by_id(patch_on(base))
    build(base, {}, tmp_path / "out")
    before = contents(base.folder)
    if trap == "folder link":
        shutil.rmtree(tmp_path / "out" / "sub")
        (tmp_path / "out" / "sub").symlink_to(base.folder / "sub")
        assert any("sub" in problem for problem in verify_build(tmp_path / "out"))
        with pytest.raises(WouldOverwrite, match="symbolic link"):
            build(base, patches, tmp_path / "out")
        assert not (tmp_path / "out" / "config.json").exists()
    else:
        for name in base.files:
            (tmp_path / "out" / name).unlink()
            if trap == "hard link":
                (tmp_path / "out" / name).hardlink_to(base.folder / name)
            else:
                (tmp_path / "out" / name).symlink_to(base.folder / name)
        build(base, patches, tmp_path / "out")
        assert verify_build(tmp_path / "out", base) == []
    assert contents(base.folder) == before


def test_patches_of_another_model_are_refused_before_anything_is_written(
    base: Checkpoint, tmp_path: Path
) -> None:
    fingerprint = base.fingerprint()
    foreign = "sha256:" + "0" * 64
    ones = Delta(torch.ones(6, 1), torch.ones(1, 9))
    for patch, reason in (
        (Patch(facts(1), {"model.layers.0.w": ones}, foreign, "ft", {}), "another base"),
        (Patch(facts(1), {"model.layers.7.w": ones}, fingerprint, "ft", {}), "has no 'model.layers.7.w'"),
        (Patch(facts(1), {"model.embed.weight": ones}, fingerprint, "ft", {}), "another model"),
        (
            Patch(facts(1), {"transformer.h.w": Delta(ones.B, torch.ones(1, 5))}, fingerprint, "ft", {}),
            "BF16",
        ),
    ):
        with pytest.raises(BadInput) as caught:
            build(base, by_id(patch), tmp_path / "out")
        assert reason in str(caught.value)
        assert patch.name in str(caught.value)
        assert not list(tmp_path.glob("out/*"))
    with pytest.raises(BadInput, match="its id is"):
        build(base, {"0" * 64: patch_on(base)}, tmp_path / "out")


def test_a_base_that_changed_since_it_was_fingerprinted(base: Checkpoint, tmp_path: Path) -> None:
    patch = patch_on(base)
    build(base, {}, tmp_path / "out")
    file, info = base.tensors["model.layers.0.w"]
    with open(base.folder / file, "r+b") as opened:
        opened.seek(info.start)
        opened.write(b"\x01\x02")
    believed = Checkpoint.open(base.folder, fingerprint=base.fingerprint())
    with pytest.raises(BadInput, match=r"'model\.layers\.0\.w' is not what"):
        build(believed, by_id(patch), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_overflowing_patch_leaves_nothing_to_load(base: Checkpoint, tmp_path: Path) -> None:
    huge = Delta(torch.full((6, 1), 3e38), torch.full((1, 9), 3.0))
    patch = Patch(facts(1), {"model.layers.0.w": huge}, base.fingerprint(), "ft", {})
    build(base, {}, tmp_path / "out")
    with pytest.raises(BadInput, match=r"^model\.layers\.0\.w: would"):
        build(base, by_id(patch), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    build(base, {}, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(base.folder)


def test_one_writer_at_a_time(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another patchkit"):
            build(base, {}, tmp_path / "out")
    finally:
        os.close(handle)
    build(base, {}, tmp_path / "out")


def test_progress_is_told_in_bytes(base: Checkpoint, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    build(base, by_id(patch_on(base)), tmp_path / "out", progress=lambda *report: told.append(report))
    for what in ("copying", "writing"):
        done = [(done, total) for done, total, said in told if said == what]
        assert done[-1][0] == done[-1][1] > 0
        assert done == sorted(done)


def test_the_stack_by_tensor(base: Checkpoint) -> None:
    first, second = patch_on(base, 0), patch_on(base, 1)
    name = "model.layers.0.w"
    assert stacked([first, second])[name] == [first.deltas[name], second.deltas[name]]


# Damage


def test_every_flipped_byte_of_a_build_is_found(tmp_path: Path) -> None:
    base = Checkpoint.open(write_checkpoint(tmp_path / "base", {"w": torch.ones(6, 9), "e": torch.ones(3)}))
    delta = Delta(torch.ones(6, 1), torch.ones(1, 9))
    out = tmp_path / "out"
    build(base, by_id(Patch(facts(1), {"w": delta}, base.fingerprint(), "ft", {})), out)
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        times = path.stat()
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert verify_build(out), f"{path.name}, byte {place}"
        path.write_bytes(data)
    assert verify_build(out, base) == []


def test_files_missing_cut_added_or_linked_are_found(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(base, {}, out)
    for name in sorted(path.name for path in out.iterdir()):
        data = (out / name).read_bytes()
        for damage in (b"", data[:-1], data + b"\0"):
            (out / name).write_bytes(damage)
            assert any(name in problem for problem in verify_build(out))
        (out / name).unlink()
        assert any(name in problem for problem in verify_build(out))
        (out / name).symlink_to(base.folder / name)
        assert any(name in problem for problem in verify_build(out))
        (out / name).unlink()
        (out / name).write_bytes(data)
    (out / "adapter_config.json").write_text("{}")  # transformers would load it
    assert verify_build(out) == [f"{out}/adapter_config.json: is not part of the build; move it away"]
    (out / "adapter_config.json").unlink()
    assert verify_build(out) == []


def test_a_build_of_another_base_is_found(base: Checkpoint, tmp_path: Path) -> None:
    build(base, {}, tmp_path / "out")
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", base_tensors(seed=9)))
    assert [problem for problem in verify_build(tmp_path / "out", other) if "another base" in problem]
    assert verify_build(tmp_path / "nowhere") == [
        f"{tmp_path}/nowhere: holds no {BUILD_RECORD}, so it is not a build"
    ]


def test_a_record_that_lies_consistently_is_found(base: Checkpoint, tmp_path: Path) -> None:
    """Tensor and record changed together: the record's hashes must still make the base's fingerprint."""
    out = tmp_path / "out"
    record = build(base, {}, out)
    file, info = base.tensors["model.embed.weight"]
    data = bytearray((out / file).read_bytes())
    data[info.start] ^= 1
    (out / file).write_bytes(data)
    lie = {**record.tensors, "model.embed.weight": hash_bytes(data[info.start : info.end])}
    forged = BuildRecord(FINISHED, record.base, (), record.files, record.weights, lie, {})
    (out / BUILD_RECORD).write_bytes(forged.to_bytes())
    assert any("not those of its base" in problem for problem in verify_build(out))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../b", "", "a//b", "x\n"])
def test_a_record_that_names_files_outside_is_refused(base: Checkpoint, tmp_path: Path, name: str) -> None:
    record = build(base, {}, tmp_path / "out")
    forged = BuildRecord(
        FINISHED, record.base, (), {**record.files, name: record.files["config.json"]}, record.weights,
        record.tensors, {},
    )  # fmt: skip
    (tmp_path / "out" / BUILD_RECORD).write_bytes(forged.to_bytes())
    with pytest.raises(BadInput, match="cannot be believed"):
        build(base, {}, tmp_path / "out")
    assert any("cannot be believed" in problem for problem in verify_build(tmp_path / "out"))


@settings(max_examples=200)
@given(st.binary(max_size=30) | st.sampled_from([b"{}", b"[]", b"null", b'{"sha256": 1}', b'{"format":1}']))
def test_fuzz_records(data: bytes) -> None:
    with pytest.raises(PatchkitError) as caught:
        BuildRecord.from_bytes(data, "x")
    assert str(caught.value).isprintable()


# Killed, or out of room


KILLED = """
import builtins, os, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
os.fsync = lambda _: None  # a kill loses nothing that was written; only a power cut would
from patchkit.builds.build import build, verify_build
from patchkit.checkpoint import Checkpoint
from patchkit.algebra.factors import Patch
from safetensors.torch import load_file

root, start, goal = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
base = Checkpoint.open(root / "base")
patches = {name: Patch.load(root / name) for name in ("A", "B")}
stack = lambda names: {patches[name].id: patches[name] for name in names if name in patches}
tensors = lambda folder: {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

build(base, stack(goal), root / "goal")
after = tensors(root / "goal")
if start != "nothing":
    build(base, stack(start), root / "start")
before = tensors(root / "start")
out = root / "out"

def die_at(count):
    calls = 0
    def wrap(function, halves=False):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == count:
                if halves:  # half of the bytes reach the file, then the process is gone
                    handle, data, *rest = args
                    function(handle, bytes(data)[: len(data) // 2], *rest)
                os._exit(9)
            return function(*args, **options)
        return call
    os.pwrite = wrap(os.pwrite, halves=True)
    for name in ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "copy_file_range"):
        setattr(os, name, wrap(getattr(os, name)))
    builtins.open = wrap(builtins.open)

for count in range(1, 1000):
    shutil.rmtree(out, ignore_errors=True)
    if start != "nothing":
        shutil.copytree(root / "start", out)
    child = os.fork()
    if child == 0:
        die_at(count)
        build(base, stack(goal), out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), code
    if (out / "config.json").exists():
        found = tensors(out)
        assert same(found, after) or same(found, before), count
        assert not verify_build(out) or not same(found, after), count
    elif out.exists():
        assert verify_build(out), count
    build(base, stack(goal), out)
    assert same(tensors(out), after), count
    assert verify_build(out, base) == [], (count, verify_build(out, base))
    if code == 0:
        break
print(count)
"""


@pytest.mark.parametrize(("start", "goal"), [("nothing", "A"), ("A", "AB"), ("AB", "empty")])
def test_killed_at_any_call_it_is_old_or_new_or_cannot_be_loaded(
    tmp_path: Path, start: str, goal: str
) -> None:
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    base = Checkpoint.open(write_checkpoint(tmp_path / "base", tensors, shards=2))
    patch_on(base, 0).save(tmp_path / "A")
    patch_on(base, 1).save(tmp_path / "B")
    (tmp_path / "start").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), start, goal],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40  # it was killed at more than forty places


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "copy_file_range", "replace", "unlink"])
def test_a_disk_that_fails_is_one_line_and_nothing_to_load(
    base: Checkpoint, tmp_path: Path, call: str, code: int
) -> None:
    out = tmp_path / "out"
    patches = by_id(patch_on(base))
    build(base, {}, out)
    (out / "model-00002-of-00002.safetensors").unlink()  # so that something must be copied, too

    def fails(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as context:
        context.setattr(os, call, fails)
        context.setattr(fcntl, "ioctl", fails)
        with pytest.raises(NotWritten) as caught:
            build(base, patches, out)
    assert os.strerror(code) in str(caught.value)
    assert str(caught.value).isprintable()
    assert (out / "config.json").exists() == (call == "unlink")  # nothing was begun
    assert verify_build(out) != []
    build(base, patches, out)
    assert verify_build(out, base) == []


@pytest.mark.parametrize("count", [0, 1])
def test_a_weights_file_that_was_lost_is_made_again(base: Checkpoint, tmp_path: Path, count: int) -> None:
    """Its tensors are then the base's, whatever the old record says of them."""
    out, patches = tmp_path / "out", by_id(patch_on(base))
    build(base, patches, out)
    (out / sorted(base.files)[count]).unlink()
    build(base, patches, out)
    assert verify_build(out, base) == []


def test_a_file_that_a_power_cut_left_as_zeros_is_copied_again(base: Checkpoint, tmp_path: Path) -> None:
    """Its size and header reached the disk, its data did not."""
    out, patches = tmp_path / "out", by_id(patch_on(base))

    def cut(source: Path, target: Path, report: object) -> None:
        if target.suffix == ".safetensors":
            start = base.files[target.name].data_start
            target.write_bytes(source.read_bytes()[:start].ljust(source.stat().st_size, b"\0"))
            raise KeyboardInterrupt
        shutil.copy(source, target)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(module, "clone_file", cut)
        with pytest.raises(KeyboardInterrupt):
            build(base, patches, out)
    build(base, patches, out)
    assert verify_build(out, base) == []


def test_going_on_after_a_kill_copies_nothing_twice(base: Checkpoint, tmp_path: Path) -> None:
    out, patches = tmp_path / "out", by_id(patch_on(base))

    def stops(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as context:
        context.setattr(os, "pwrite", stops)
        with pytest.raises(KeyboardInterrupt):
            build(base, patches, out)
    inodes = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    build(base, patches, out)
    assert {path.name: path.stat().st_ino for path in out.glob("*.safetensors")} == inodes
    assert verify_build(out, base) == []


def test_an_interrupted_build_says_so(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as context:
        context.setattr(os, "pwrite", fails)
        with pytest.raises(NotWritten):
            build(base, by_id(patch_on(base)), tmp_path / "out")
    record = BuildRecord.read(tmp_path / "out")
    assert record is not None
    assert record.state == UNFINISHED
    assert not record.finished
    assert set(record.pending) == set(SHAPES)
    assert f"{tmp_path}/out: the build was interrupted; build again" in verify_build(tmp_path / "out")


def test_a_record_whose_lists_hold_no_names_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    value = {**strict_json(build(base, {}, tmp_path / "b").to_bytes())}
    del value["sha256"]
    for field in ("patches", "pending", "left_out"):
        wrong = {**value, field: [{}]}
        data = canonical_json({**wrong, "sha256": hash_bytes(canonical_json(wrong))}) + b"\n"
        with pytest.raises(BadInput, match="cannot be believed"):
            BuildRecord.from_bytes(data, "record")
