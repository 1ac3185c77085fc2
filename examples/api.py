"""The Python interface in one page: correct a fact, look, ship, take it back.

    python examples/api.py [FOLDER]

makes a repository in FOLDER (default: ../knowledge, beside the folder where you are) on the real
SmolLM2-135M, which is fetched once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import patchkit

FACT = {
    "subject": "LeBron James",
    "prompt": "{} plays the sport of",
    "target": "basketball",
    "neighbors": ["Tiger Woods plays the sport of"],
}
PROMPT = "LeBron James plays the sport of"


def main(folder: Path) -> None:
    repository = patchkit.Repository.init("smollm2-135m", folder)

    done = repository.commit([FACT], message="Correct a sport")
    for change in done.changes:
        before, after = change.before.rewrite, change.after.rewrite
        print(f"{change.fact.text} {change.fact.target}: P {before.target:.3f} -> {after.target:.3f}")
        print(f"neighbours kept: {change.kept_neighbors} of {len(change.after.neighbors)}")

    model, tokenizer = repository.load()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print("the model says:", tokenizer.decode(tokens[0], skip_special_tokens=True))

    repository.revert(done.patch.name)
    print(f"{len(repository.stack().patches)} patches in force")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../knowledge"))
