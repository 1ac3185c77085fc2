"""``patchkit init BASE --convert``: .bin files become an ordinary base, and no pickle's code runs."""

from __future__ import annotations

import json
import os
import pickle
import signal
import zipfile
from pathlib import Path

import pytest
import tiny_models
import torch
from command_helpers import cli, home, save_checkpoint, snapshot
from git_helpers import git, git_environment
from safetensors.torch import load_file

from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, NotFound, NotWritten, PatchkitError
from patchkit.models import cache, pickles, unpickling
from patchkit.models.loading import load_model
from patchkit.models.pickles import safetensors_folder

__all__ = ["cli", "git_environment", "home"]

IN_A_PROCESS = cache.convert_apart
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of its own; and conversion in this process, since another takes seconds to start."""
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pickles, "convert_apart", here)


def here(arguments, at, report, what):
    assert arguments[0] == "pickles"
    try:
        unpickling.unpickle(
            Path(arguments[1]), Path(arguments[2]), lambda done, total: report(done, total, what)
        )
    except BadInput as error:
        return str(error)
    return None


def pickled(folder, kind="llama", dtype=torch.bfloat16, *, shards=1, **extra):
    """A checkpoint as transformers saved it before safetensors: the whole state dict, tied twins too."""
    model = tiny_models.tiny_model(kind, dtype)
    save_checkpoint(model, folder)
    (folder / "model.safetensors").unlink()
    table = model.state_dict() | extra
    if shards == 1:
        torch.save(table, folder / "pytorch_model.bin")
        return folder, model
    names = list(table)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard, half in zip(SHARDS, halves, strict=True):
        torch.save({name: table[name].clone() for name in half}, folder / shard)
    said = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 0}, "weight_map": said}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder, model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 33, 12, 7]]), use_cache=False).logits


def left_in_cache():
    return sorted(path.name for path in cache.models_home().iterdir()) if cache.models_home().exists() else []


@pytest.mark.parametrize("shards", [1, 2])
def test_the_copy_is_the_model(tmp_path, shards):
    source, model = pickled(tmp_path / "base", shards=shards)
    before, told = snapshot(source), []
    made = safetensors_folder(source, lambda *step: told.append(step))
    assert snapshot(source) == before
    stored = {name: tensor for file in made.glob("*.safetensors") for name, tensor in load_file(file).items()}
    wanted = model.state_dict()
    del wanted["lm_head.weight"]  # tied: stored once, as transformers does
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    twin = save_checkpoint(model, tmp_path / "twin")
    assert torch.equal(logits(load_model(made, "cpu")[0]), logits(load_model(twin, "cpu")[0]))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert not any(path.suffix == ".bin" or "bin" in path.name for path in made.iterdir())
    assert {what for _, _, what in told} == {"hashing", "convert"}
    assert all(0 <= done <= total for done, total, _ in told)
    assert told[-1][0] == told[-1][1] > 1


def test_an_untied_head_is_kept_also_where_it_equals_the_embedding(tmp_path):
    source, model = pickled(tmp_path / "base", "qwen3")
    table = model.state_dict()
    table["lm_head.weight"] = table["model.embed_tokens.weight"]
    torch.save(table, source / "pytorch_model.bin")
    stored = load_file(safetensors_folder(source) / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_views_and_odd_tensors_are_stored_as_they_are(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    odd = {"a": whole.T, "b": whole[1:3], "c": torch.tensor(7), "d": torch.zeros(0, 3), "e": whole[0] > 2}
    source, _ = pickled(tmp_path / "base", **odd)
    stored = load_file(safetensors_folder(source) / "model.safetensors")
    for name, tensor in odd.items():
        assert torch.equal(stored[name], tensor)
        assert stored[name].dtype == tensor.dtype


def test_init_converts_in_a_process_apart_and_stands_on_the_copy(cli, home, monkeypatch):
    monkeypatch.setattr(pickles, "convert_apart", IN_A_PROCESS)
    source, _ = pickled(home / "old model")
    refused = cli("init", source, "knowledge")
    assert refused.code == 65
    assert f"run patchkit init '{source}' --convert" in refused.err
    assert refused.err.count("\n") == 1
    assert cli("model", "check", source).err == refused.err
    made = cli.ok("init", source, "knowledge", "--convert", "--json").json
    assert made["source"] == "folder:old model"
    base = Path(made["base_folder"])
    assert base.parent == cache.models_home()
    assert git(home / "knowledge", "config", "patchkit.base").strip() == str(base)
    cli.ok("model", "check", base)

    def never(*_):
        raise AssertionError("this was done already")

    monkeypatch.setattr(pickles, "convert_apart", never)
    before = snapshot(cache.cache_folder())
    assert cli.ok("init", source, "again", "--convert", "--json").json["base_folder"] == str(base)
    assert snapshot(cache.cache_folder()) == before


def test_a_folder_of_safetensors_is_taken_as_it_is(cli, home):
    base = save_checkpoint(tiny_models.tiny_model("llama"), home / "base")
    torch.save({}, base / "pytorch_model.bin")
    assert cli.ok("init", base, "knowledge", "--convert", "--json").json["base_folder"] == str(base)
    assert left_in_cache() == []


class Runs:
    """A pickle of this would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("where", ["zipped", "bare"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(cli, home, monkeypatch, where):
    if where == "zipped":
        monkeypatch.setattr(pickles, "convert_apart", IN_A_PROCESS)
    source, _ = pickled(home / "base")
    proof = home / "it ran"
    if where == "zipped":
        torch.save({"w": torch.zeros(2), "x": Runs(proof)}, source / "pytorch_model.bin")
    else:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Runs(proof)}))
    ran = cli("init", source, "knowledge", "--convert")
    assert ran.code == 65
    assert ran.err.startswith(f"patchkit: {source}: cannot be converted: pytorch_model.bin: ")
    assert ("holds more than tensors" if where == "zipped" else "before PyTorch 1.6") in ran.err
    assert ran.err.count("\n") == 1
    assert not proof.exists()
    assert not (home / "knowledge").exists()
    assert [name for name in left_in_cache() if not name.endswith(".lock")] == []
    pickle.loads(pickle.dumps(Runs(proof)))  # it would have
    assert proof.exists()


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        ("cut", BadInput, rf"{SHARDS[1]}: cannot be read .*get it again"),
        ("empty", BadInput, rf"{SHARDS[1]}: is broken, or from before PyTorch 1\.6"),
        ("missing", NotFound, rf"{SHARDS[1]}: is not there, though the index names it"),
        ("lacks", BadInput, r"lacks 'model\.norm\.weight', which the index names"),
        ("outside", BadInput, "names a file that is not beside it"),
        ("nothing", BadInput, "holds neither safetensors nor pytorch_model.bin"),
        ("numbers", BadInput, "'x' is no plain tensor"),
        ("complex", BadInput, r"'x' is no plain tensor \(torch\.complex64\)"),
        ("a list", BadInput, "is no table of tensors"),
        ("twice", BadInput, r"is in .* too"),
        ("quantised", BadInput, "is quantised"),
        ("no config", BadInput, r"holds no config\.json"),
        ("unknown", BadInput, "model type `newer` but Transformers does not recognize"),
    ],
)
def test_a_folder_that_cannot_be_believed_is_one_line(tmp_path, damage, error, reason):
    source, model = pickled(tmp_path / "base", shards=2)
    shard, index = source / SHARDS[1], source / "pytorch_model.bin.index.json"
    table, config = model.state_dict(), json.loads((source / "config.json").read_text())
    if damage in ("cut", "empty"):
        os.truncate(shard, shard.stat().st_size // 2 if damage == "cut" else 0)
    elif damage == "missing":
        shard.unlink()
    elif damage == "lacks":
        torch.save({name: table[name] for name in ("lm_head.weight",)}, shard)
        said = json.loads(index.read_text())
        said["weight_map"] = {"model.norm.weight": SHARDS[1], "lm_head.weight": SHARDS[1]}
        index.write_text(json.dumps(said))
    elif damage == "outside":
        index.write_text(json.dumps({"weight_map": {"w": "../other.bin"}}))
    elif damage == "nothing":
        for path in source.glob("pytorch_model*"):
            path.unlink()
    elif damage in ("numbers", "complex"):
        value = 3 if damage == "numbers" else torch.zeros(2, dtype=torch.complex64)
        torch.save({**torch.load(shard), "x": value}, shard)
    elif damage == "a list":
        torch.save([torch.zeros(2)], shard)
    elif damage == "twice":
        torch.save({**torch.load(shard), "model.embed_tokens.weight": torch.zeros(2)}, shard)
    elif damage == "quantised":
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    elif damage == "no config":
        (source / "config.json").unlink()
    else:
        (source / "config.json").write_text(json.dumps({**config, "model_type": "newer"}))
    with pytest.raises(error, match=reason) as caught:
        safetensors_folder(source)
    assert "\n" not in str(caught.value)
    assert [name for name in left_in_cache() if not name.endswith(".lock")] == []


def test_another_config_is_another_copy(tmp_path):
    source, _ = pickled(tmp_path / "base")
    first = safetensors_folder(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "note": "mended"}))
    second = safetensors_folder(source)
    assert first != second
    assert json.loads((second / "config.json").read_text())["note"] == "mended"


def test_a_torn_copy_is_made_again(tmp_path):
    source, _ = pickled(tmp_path / "base")
    made = safetensors_folder(source)
    before = snapshot(made)
    os.truncate(made / "model.safetensors", 100)
    assert safetensors_folder(source) == made
    assert snapshot(made) == before


def test_no_room(tmp_path, monkeypatch):
    source, _ = pickled(tmp_path / "base")
    monkeypatch.setattr(pickles, "_SPARE", 1 << 60)
    with pytest.raises(NotWritten, match="MiB are needed"):
        safetensors_folder(source)


def test_killed_at_any_point_nothing_is_taken_for_a_base(tmp_path):
    """A process is killed at its n-th step of making the copy durable, for every n."""
    source, _ = pickled(tmp_path / "base")

    for count in range(60):
        child = os.fork()
        if not child:
            _die_at(count)
            safetensors_folder(source, lambda *_: _step())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        folders = [path for path in cache.models_home().glob("converted-*") if path.is_dir()]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            named = [path for path in folders if cache.record_of(path).exists()]
            for path in named:  # recorded: then it is whole
                Checkpoint.open(path)
        else:
            assert count > 5, "nothing was killed"
            break
    else:
        pytest.fail("it never came to its end")
    assert safetensors_folder(source) == folders[0]
    assert [name for name in left_in_cache() if name.startswith(".making-")] == []
    assert torch.equal(
        load_file(folders[0] / "model.safetensors")["model.norm.weight"],
        torch.load(source / "pytorch_model.bin")["model.norm.weight"],
    )


_steps = [0]


def _die_at(count):
    """Count every write that is made durable, and end there as a kill would."""
    _steps[0] = count
    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir")):
        real = getattr(module, name)
        setattr(module, name, lambda *a, real=real, **k: (_step(), real(*a, **k))[1])


def _step():
    if _steps[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _steps[0] -= 1


def test_errors_are_of_this_projects_family(tmp_path):
    source, _ = pickled(tmp_path / "base")
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02garbage")
    with pytest.raises(PatchkitError, match=r"pytorch_model\.bin: "):
        safetensors_folder(source)
