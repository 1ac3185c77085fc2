"""Weights in another form made an ordinary checkpoint, in a process of its own.

`python -m patchkit.models.conversion gguf FILE FOLDER DTYPE` fills FOLDER with config.json,
model.safetensors and the tokenizer's files; `… pickles FROM FOLDER` with the tensors of FROM's
PyTorch files (`patchkit.models.unpickling`). Each line that it prints is "done, in all". It runs
apart so that what transformers and torch say, set and hold in memory ends with it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

from patchkit.errors import PatchkitError

__all__ = ["STEPS", "convert_gguf", "convert_pickles", "main"]

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


def convert_pickles(source: Path, folder: Path) -> None:
    """The tensors of ``source``'s PyTorch files as safetensors files in ``folder``."""
    from patchkit.models.unpickling import unpickle

    unpickle(source, folder, _tell)


def main(arguments: list[str]) -> int:
    """Convert, and say a failure in one line on standard error."""
    kind, source, folder, *dtype = arguments
    try:
        if kind == "gguf":
            convert_gguf(Path(source), Path(folder), *dtype)
        else:
            convert_pickles(Path(source), Path(folder))
    except PatchkitError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:  # whatever transformers raises is for the parent to report
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _tell(done: int, total: int = STEPS) -> None:
    print(done, total, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
