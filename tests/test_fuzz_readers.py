"""Whatever bytes a stranger sends, a reader believes them or says one line: every reader, by one harness.

A short run is in every test run. The long one, a million inputs that are not the same each time:
`PATCHKIT_FUZZ=1000000 python -m pytest tests/test_fuzz_readers.py -m slow -s`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from exact_helpers import solved_patch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from proof_helpers import tiny_base
from safetensors.torch import save
from shipping_helpers import loaded
from test_signing import key_pair

from patchkit.algebra.factors import Patch
from patchkit.builds.record import SIGNATURE, BuildRecord
from patchkit.canonical import canonical_json, hash_bytes, strict_json
from patchkit.checkpoint import Checkpoint
from patchkit.errors import PatchkitError
from patchkit.facts import parse_facts
from patchkit.git.lfs import Pointer
from patchkit.patch import DELTA, FACTS, KEYS
from patchkit.settings import Settings, dump_settings, parse_settings
from patchkit.shipping.modules import Modules
from patchkit.shipping.origin import ORIGIN, Origin
from patchkit.shipping.peft_reader import read_adapter
from patchkit.shipping.signing import sign_folder, verify_folder
from patchkit.tensors import header_of, to_bytes

SHORT = 500
LONG = int(os.environ.get("PATCHKIT_FUZZ", "1000000"))

Reader = Callable[[bytes], object]

BASE = "sha256:" + "ab" * 32
PATCH = solved_patch({"h.0.w": (4, 6), "h.1.w": (3, 3)}, 2, BASE)[0].files()
TENSORS = save({"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.float16)}, {"format": "pt"})
RECORDS = (
    b'{"subject": "Ann", "prompt": "{} lies in", "target": "Rome", "neighbors": ["Bob lies in"], "id": "1"}\n'
    b'{"subject": "Bob", "prompt": "{} plays", "target": "chess", "paraphrases": ["it is {} who plays"]}\n'
)
COUNTERFACT = json.dumps([
    {
        "case_id": 0,
        "pararel_idx": 1,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English"},
            "target_true": {"str": "French"},
            "subject": "Ann",
        },
        "paraphrase_prompts": ["Ann, a native"],
        "neighborhood_prompts": ["Bob is a native speaker of"],
    }
]).encode()  # fmt: skip
RECORD = BuildRecord("finished", BASE, ("ab" * 32,), {}, {}, {"a": "cd" * 32}, {"a": "ef" * 32}).to_bytes()


@dataclass(frozen=True)
class Target:
    """A reader, and sound files for it to start from."""

    read: Reader
    sound: tuple[bytes, ...]


def patch_with(name: str) -> Reader:
    """A patch in which one file is another."""
    return lambda data: Patch.from_files({**PATCH, name: data}, "x")


def patch_that_fits(name: str) -> Reader:
    """The same, with the hash of that file in the header put right by someone who knows the format."""

    def read(data: bytes) -> object:
        found = header_of(PATCH[DELTA], "x")
        header = strict_json(found.metadata["patchkit"])
        header[{FACTS: "facts", KEYS: "keys"}[name]] = hash_bytes(data)
        tensors = {
            part: (info.dtype, info.shape, PATCH[DELTA][info.start : info.end])
            for part, info in found.tensors.items()
        }
        delta = to_bytes(tensors, {"patchkit": canonical_json(header).decode()})
        return Patch.from_files({**PATCH, name: data, DELTA: delta}, "x")

    return read


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    root = tmp_path_factory.mktemp("fuzz")
    base = tiny_base(root / "base", "llama", torch.float32)
    lora = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(loaded(base), lora).save_pretrained(root / "lora")
    modules = Modules.of(Checkpoint.open(base))

    def in_folder(folder: Path, name: str, read: Callable[[Path], object]) -> Target:
        sound = (folder / name).read_bytes()

        def read_bytes(data: bytes) -> object:
            (folder / name).write_bytes(data)
            try:
                return read(folder)
            finally:
                (folder / name).write_bytes(sound)

        return Target(read_bytes, (sound,))

    signed = root / "signed"
    signed.mkdir()
    origin = Origin(BASE, "owner/base", "main", "c" * 40, {"ann-12345678": "d" * 64})
    (signed / ORIGIN).write_bytes(origin.to_bytes())
    sign_folder(signed, key_pair(root, "ann"))
    toml = dump_settings(Settings("owner/base", "main", BASE, {"layers": [4, 8], "lambda": 300.0}))
    return {
        "facts": Target(lambda data: parse_facts(data, "x"), (RECORDS, COUNTERFACT)),
        "safetensors": Target(lambda data: header_of(data, "x"), (TENSORS, PATCH[DELTA])),
        "delta": Target(patch_with(DELTA), (PATCH[DELTA],)),
        "facts of a patch": Target(patch_that_fits(FACTS), (PATCH[FACTS],)),
        "keys of a patch": Target(patch_that_fits(KEYS), (PATCH[KEYS],)),
        "settings": Target(parse_settings, (toml,)),
        "build record": Target(lambda data: BuildRecord.from_bytes(data, "x"), (RECORD,)),
        "pointer": Target(Pointer.read, (bytes(Pointer.to(b"data")),)),
        "adapter's configuration": in_folder(
            root / "lora", "adapter_config.json", lambda folder: read_adapter(folder, modules)
        ),
        "adapter's tensors": in_folder(
            root / "lora", "adapter_model.safetensors", lambda folder: read_adapter(folder, modules)
        ),
        "origin": in_folder(signed, ORIGIN, lambda folder: Origin.of(folder) and Origin.of(folder).to_dict()),
        "signature": in_folder(
            signed, SIGNATURE, lambda folder: verify_folder(folder, [root / "ann.pub.pem"])
        ),
    }


NAMES = (
    "facts", "safetensors", "delta", "facts of a patch", "keys of a patch", "settings", "build record",
    "pointer", "adapter's configuration", "adapter's tensors", "origin", "signature",
)  # fmt: skip

PIECES = (
    b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\\", b"\\ud800", b'"', b"{", b"}", b"[", b"]", b",", b":",
    b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"9" * 30, b"18446744073709551615",
    b"-9223372036854775808", b"{}", b'"__metadata__":', b'"shape":', b"../", b"sha256:", b"[" * 200,
    b"\x7f\xc0", b"\x80\x7f", b"ab" * 32,
)  # fmt: skip
EACH = 50  # inputs from one seed: Hypothesis takes longer to choose an input than a reader to read it


def altered(data: bytes, random: Random) -> bytes:
    """Up to four times some bytes are taken out and a piece is put there; some inputs are cut short."""
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(data))
        piece = random.choice(PIECES) if random.random() < 0.7 else random.randbytes(random.randint(1, 4))
        data = data[:at] + piece + data[at + random.choice((0, 1, len(piece), random.randint(0, 40))) :]
    return data if random.random() < 0.8 else data[: random.randint(0, len(data))]


def fuzz(target: Target, count: int, *, repeated: bool) -> int:
    """Sends ``count`` inputs; how many were believed. Hypothesis shows the seed of one that breaks."""
    believed = 0

    @settings(
        max_examples=-(-count // EACH),
        derandomize=repeated,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, (1 << 64) - 1))
    def sends(seed: int) -> None:
        nonlocal believed
        random = Random(seed)
        for _ in range(EACH):
            data = altered(random.choice(target.sound), random)
            try:
                found = target.read(data)
            except PatchkitError as error:
                lines = str(error).split("\n")
                assert all(line and line.isprintable() for line in lines), (lines, data)
            except Exception as error:
                raise AssertionError(f"{error!r} for {data!r}") from error
            else:
                believed += found is not None

    sends()
    return believed


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_believes_or_says_one_line(name: str, targets: dict[str, Target]) -> None:
    assert targets.keys() == set(NAMES)
    for sound in targets[name].sound:
        targets[name].read(sound)
    believed = fuzz(targets[name], SHORT, repeated=True)
    assert believed < SHORT, "nothing was ever refused"


@pytest.mark.slow
@pytest.mark.timeout(36000)
@pytest.mark.parametrize("name", NAMES)
def test_a_million_inputs(name: str, targets: dict[str, Target]) -> None:
    count = -(-LONG // len(NAMES))
    print(f"{name}: {fuzz(targets[name], count, repeated=False)} of {count} believed")
