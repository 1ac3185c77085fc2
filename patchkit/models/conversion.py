"""A GGUF file made an ordinary checkpoint folder, in a process of its own.

`python -m patchkit.models.conversion FILE.gguf FOLDER DTYPE` fills FOLDER with config.json,
model.safetensors and the tokenizer's files. Each line that it prints is "steps done, steps in
all". It runs apart so that what transformers says, sets and holds in memory ends with it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

__all__ = ["STEPS", "convert_gguf", "main"]

STEPS = 4


def convert_gguf(gguf: Path, folder: Path, dtype: str) -> None:
    """Dequantise ``gguf`` to float32, round once to ``dtype``, and save without quantisation.

    The loaded model still says that it is quantised and refuses to be saved, so its tensors go
    into a clean one that is built from the same configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _tell(1)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    _tell(2)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    clean.load_state_dict(loaded.state_dict())  # copies with one rounding, to the nearest even
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(folder)
    _tell(3)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _tell(STEPS)


def main(arguments: list[str]) -> int:
    """Convert, and say a failure in one line on standard error."""
    gguf, folder, dtype = arguments
    try:
        convert_gguf(Path(gguf), Path(folder), dtype)
    except Exception as error:  # whatever transformers raises is for the parent to report
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _tell(step: int) -> None:
    print(step, STEPS, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
