"""The main job, start to end, in front of you: what `make demo` runs.

Every step is a patchkit command that is printed before it runs, so that any of them can be typed
by hand afterwards. Nothing outside the demo's own folder and the cache of models is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FACTS = HERE / "corrections.jsonl"
PATCHKIT = [sys.executable, "-m", "patchkit"]


def main() -> int:
    started = time.monotonic()
    place = demo_folder()
    knowledge, model = place / "knowledge", place / "model"
    base = Path(capture("model", "get", "smollm2-135m", "--quiet") or capture("model", "get", "smollm2-135m"))

    say("A repository that stands on the real SmolLM2-135M")
    git = ["git", "init", "--quiet", "--initial-branch=main", str(knowledge)]
    subprocess.run(git, check=True)  # its own, whatever lies around it
    run("init", "smollm2-135m", str(knowledge))

    say("What the model says now: these are wrong")
    prompts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    asked = [fact["prompt"].replace("{}", fact["subject"]) for fact in prompts[:4]]
    at = ["-C", str(knowledge)]
    run(*at, "ask", "--top", "1", *asked)

    say("Correct it: the facts become a patch, measured on the model that it made")
    run(*at, "commit", str(FACTS), "-m", "Correct what the model has wrong")

    say("Before and after, side by side")
    run(*at, "ask", "--top", "3", *asked)

    say("Review it")
    for command in ("log", "show", "diff", "status"):
        run(*at, command)

    say("Ship it: an ordinary checkpoint folder")
    run(*at, "build", "--out", str(model))
    compare(base, model)

    say("Take it back, with proof")
    run(*at, "revert")
    run(*at, "build", "--out", str(model))
    same = compare(base, model)
    run(*at, "fsck")
    print(f"\n{time.monotonic() - started:.0f} s. The repository of this demo: {knowledge}")
    return 0 if same else 1


def demo_folder() -> Path:
    """A folder of the demo's own, emptied; never inside another Git repository."""
    cache = Path(capture("path", "cache"))
    place = Path(os.environ.get("PATCHKIT_DEMO", cache / "demo"))
    if place.exists() and not (place / ".patchkit-demo").exists():
        sys.exit(f"{place} is there and not this demo's; name another folder in PATCHKIT_DEMO")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for who in ("AUTHOR", "COMMITTER"):  # on a machine where Git knows nobody yet
        os.environ.setdefault(f"GIT_{who}_NAME", "patchkit demo")
        os.environ.setdefault(f"GIT_{who}_EMAIL", "demo@example.org")
    (place / ".patchkit-demo").touch()
    return place


def compare(base: Path, model: Path) -> bool:
    """Print the SHA-256 of each of the base's files beside the build's; True when all are equal."""
    print("\n  file                          base          build")
    same = True
    for path in sorted(base.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        before, after = (sha256(folder / path.name) for folder in (base, model))
        same = same and before == after
        print(f"  {path.name:<28}  {before[:12]}  {after[:12]}  {'equal' if before == after else 'edited'}")
    print("  every byte is the base's" if same else "  the edited tensors' bytes differ from the base's")
    return same


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def run(*arguments: str) -> None:
    shown = " ".join(f'"{a}"' if " " in a else a for a in arguments)
    print(f"\n$ patchkit {shown}", flush=True)
    outcome = subprocess.run([*PATCHKIT, *arguments], check=False)
    if outcome.returncode:
        sys.exit(f"that ended with exit code {outcome.returncode}")


def capture(*arguments: str) -> str:
    outcome = subprocess.run([*PATCHKIT, *arguments], check=False, stdout=subprocess.PIPE, text=True)
    if outcome.returncode:
        sys.exit(outcome.returncode)
    return outcome.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
