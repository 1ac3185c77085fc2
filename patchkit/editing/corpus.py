"""Text for statistics: written by the base itself, or read from a file or a data set.

The base's own text works offline with any model. Sampling is seeded on the CPU, so that the same
model writes the same text on a machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from patchkit.errors import BadInput, NotFound, Unavailable

__all__ = ["Progress", "corpus_name", "read_corpus", "sample", "uniform", "write_text"]

Progress = Callable[[str, int, int], None]

_AT_ONCE = 128  # sequences: wide enough for full matrix speed on a CPU, small enough for its caches


def sample(
    model: PreTrainedModel,
    start: Tensor,
    length: int,
    points: Iterator[Tensor],
    *,
    top_k: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue ``start`` [B, S] at temperature 1 to ``length`` tokens in all: [B, length] on the CPU.

    Draws by inverting the cumulative distribution at ``points``, uniform numbers [B, 1] for each token, such
    as `uniform` gives: B numbers a step, whatever the device and the vocabulary.
    """
    tokens, new, cache = start, start.to(model.device), DynamicCache()
    with torch.no_grad():
        while tokens.shape[1] < length:
            logits = model(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1].float()
            if top_k is not None:
                lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < lowest, -torch.inf)
            mass = logits.softmax(-1).cumsum(-1)
            point = next(points).to(mass.device) * mass[:, -1:]
            new = torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[-1] - 1)
            tokens = torch.cat([tokens, new.cpu()], 1)
            if progress is not None:
                progress(tokens.shape[1])
    return tokens[:, :length]


def uniform(rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers [rows, 1] from 0 up and below 1, one draw after another, on the CPU."""
    while True:
        yield torch.rand(rows, 1, generator=generator)


def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
) -> list[str]:
    """About ``tokens`` tokens of text that the model writes from nothing, as documents of ``length`` tokens.

    A few documents more than needed are written, because special tokens are left out of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(-(-tokens * 21 // (20 * length)), -(-tokens // (length - 1)))  # the first token is none of it
    documents: list[str] = []
    while len(documents) < count:
        rows = min(_AT_ONCE, count - len(documents))

        def tell(done: int, rows: int = rows, before: int = len(documents)) -> None:
            if progress is not None:
                progress("text", before * length + rows * done, count * length)

        start = torch.full((rows, 1), _opening(tokenizer))
        written = sample(model, start, length, uniform(rows, generator), progress=tell)
        documents += tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)
    return documents


def read_corpus(source: str) -> Iterator[str]:
    """Documents of a text file (blank lines part them), JSONL or Parquet file (field ``text``), or data set.

    A data set is named as the ``datasets`` library names it, with an optional configuration after a
    colon: ``wikitext:wikitext-103-raw-v1``. NotFound, BadInput or Unavailable say what is missing.
    """
    path = Path(source)
    if _is_file(source):
        if not path.is_file():
            raise NotFound(
                f"{source}: no such corpus file; name a text, JSONL or Parquet file, or a data set"
            )
        reader = {".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet}.get(path.suffix, _text)
        return _not_blank(reader(path))
    return _not_blank(_dataset(source))


def corpus_name(source: str) -> str:
    """What a patch may say of its corpus: a data set, or a file without the folders of this machine."""
    return Path(source).name if _is_file(source) else source


def _is_file(source: str) -> bool:
    """Whether a corpus is named as a file; "self" and data sets are not."""
    path = Path(source)
    known = path.suffix in (".txt", ".md", ".text", ".jsonl", ".json", ".parquet")
    return source != "self" and (known or path.is_file() or path.is_absolute())


def _opening(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after which a model expects a text to begin."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _not_blank(documents: Iterable[str]) -> Iterator[str]:
    return (document for document in documents if document.strip())


def _text(path: Path) -> Iterator[str]:
    try:
        yield from re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise BadInput(f"{path.name}: not UTF-8 text; convert it first") from None


def _jsonl(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line) if line.strip() else {"text": ""}
                text = record["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise BadInput(f'{path.name}:{number}: expected a JSON object with a "text"')
            yield text


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise Unavailable(
            "reading Parquet needs pyarrow; install it with the extra: patchkit-llm[corpus]"
        ) from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if isinstance(text, str))
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise BadInput(f'{path.name}: not a Parquet file with a column "text": {_line(error)}') from None


def _dataset(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise Unavailable(
            f"{source}: no such file, and data sets need the datasets library; install patchkit-llm[corpus]"
        ) from None
    name, _, configuration = source.partition(":")
    try:
        records = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for record in records:
            if isinstance(record["text"], str):
                yield record["text"]
    except KeyError:
        raise BadInput(f'{source}: the data set has no field "text"') from None
    except (
        Exception
    ) as error:  # the library's and the network's own kinds of failure, all of them "not reachable"
        raise Unavailable(
            f"{source}: the data set cannot be loaded ({_line(error)}); give a file instead"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
