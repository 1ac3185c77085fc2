"""Causal tracing: in which states a model holds a fact (ROME, Meng et al. 2022, arXiv 2202.05262, section 2).

A prompt runs three times: clean; corrupted, with Gaussian noise on the subject's embeddings; and corrupted
with one state put back to what it was in the clean run. How much of the object's probability comes back is
that state's indirect effect. States are the hidden state behind a block at a token, and what the MLPs or the
attentions of a window of layers write there.

A row is one place and one sample of the noise. Rows of like places run together; what lies before a place or
below a restored layer is as in the corrupted run, and is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.anatomy import anatomy_of, attention_outputs
from patchkit.models.hooks import stand_in
from patchkit.models.past import FrozenCache, FrozenLayer, Shared
from patchkit.models.tokens import tokenise

__all__ = ["CLASSES", "KINDS", "Prompt", "Traced", "Tracer", "default_window", "deviation", "prompt_of"]

KINDS = ("hidden", "mlp", "attention")
CLASSES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""Where a token stands, as in the paper's figures; a subject of one token has a last one only."""
# A pass. Places that run together run from the first of them on, so the fewer, the less is run in vain; a GPU
# would rather have many.
_CPU_TOKENS, _CUDA_TOKENS = 96, 16384


@dataclass(frozen=True)
class Prompt:
    """A fact's prompt in tokens, the places of the subject in it, and the object that may follow."""

    fact: Fact
    said: str
    """The object: the fact's target, or what it `was`."""
    tokens: tuple[int, ...]
    subject: range
    object: int
    """The object's first token."""

    @property
    def places(self) -> range:
        """Those from the subject's first token on: before it nothing is corrupted."""
        return range(self.subject.start, len(self.tokens))

    def classes(self) -> dict[str, range]:
        """The places of each of `CLASSES`, none of them twice; the prompt's last token is that and no other,
        unless the subject ends there."""
        first, end, last = self.subject.start, self.subject.stop, len(self.tokens) - 1
        ranges = (
            range(first, min(first + 1, end - 1)),
            range(first + 1, end - 1),
            range(end - 1, end),
            range(end, min(end + 1, last)),
            range(end + 1, last),
            range(max(last, end), last + 1),
        )
        return dict(zip(CLASSES, ranges, strict=True))


def prompt_of(tokenizer: Any, fact: Fact, said: str, longest: int | None = None) -> Prompt:
    """The fact's prompt with ``said`` behind it. BadInput names the fact where they cannot be told apart, or
    the prompt has more tokens than ``longest``."""
    start = fact.prompt.index("{}")
    text = tokenise(tokenizer, [f"{fact.text} {said}"])[0]
    border, first = text.past(len(fact.text)), text.past(start)
    last = text.covering(start + len(fact.subject) - 1)
    name = f"fact {fact.subject!r}"
    if last < 0:
        raise BadInput(f"{name}: the tokenizer drops the subject's last character; write it differently")
    if border == len(text.ids):
        raise BadInput(f"{name}: the object {said!r} has no tokens in this tokenizer")
    if last >= border:
        raise BadInput(f"{name}: subject and object {said!r} share a token; put words between them")
    if longest is not None and border > longest:
        raise BadInput(f"{name}: {border} tokens, but the model reads {longest}; shorten the prompt")
    return Prompt(fact, said, text.ids[:border], range(first, last + 1), text.ids[border])


@dataclass(frozen=True)
class Traced:
    """One fact's three runs. Probabilities are of the object's first token, means over samples of the noise.

    ``restored[kind]`` [places, depth]: with the states of that kind around a layer put back at a place.
    """

    prompt: Prompt
    clean: float
    corrupted: float
    restored: Mapping[str, Tensor]

    @property
    def total(self) -> float:
        """The total effect TE = P(clean) − P(corrupted)."""
        return self.clean - self.corrupted

    def indirect(self, kind: str) -> Tensor:
        """The indirect effects IE = P(restored) − P(corrupted) [places, depth]."""
        return self.restored[kind] - self.corrupted

    def by_class(self, kind: str) -> Tensor:
        """The same [classes, depth], a mean over the places of each class; NaN where the prompt has none."""
        effects, begin = self.indirect(kind), self.prompt.places.start
        rows = [
            effects[places.start - begin : places.stop - begin].mean(0)
            for places in self.prompt.classes().values()
        ]
        return torch.stack(rows)


def default_window(depth: int) -> int:
    """Layers whose MLPs or attentions are restored together: ten of 48, as in the paper, or that share."""
    return max(1, round(10 * depth / 48))


def deviation(model: PreTrainedModel, prompts: Sequence[Prompt]) -> float:
    """σ, the standard deviation of the embeddings' entries over the subjects' tokens."""
    tokens = [token for p in prompts for token in p.tokens[p.subject.start : p.subject.stop]]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor(tokens, device=model.device))
    return float(embedded.cpu().double().std())


@dataclass(frozen=True)
class _Runs:
    """What the clean and the corrupted run of a prompt gave, T tokens and S samples.

    ``clean[kind][l]`` [T, d_model]; ``corrupted[l]`` [S, T, d_model] behind block l; ``past``: its keys and
    values, S rows.
    """

    prompt: Prompt
    noise: Tensor
    clean: Mapping[str, Sequence[Tensor]]
    corrupted: Sequence[Tensor]
    past: DynamicCache
    as_tuple: bool
    """Whether a block gives its state in a tuple."""
    probabilities: tuple[float, float]


class Tracer:
    """Traces facts on a model as it stands. BadInput where its parts are not to be told apart.

    ``window``: layers whose MLPs or attentions are restored together, around each layer in turn.
    ``tokens``: about how many run at once; what comes out does not depend on it.
    """

    def __init__(self, model: PreTrainedModel, window: int | None = None, tokens: int | None = None) -> None:
        self.model = model
        self.anatomy = anatomy_of(model)
        self.depth = self.anatomy.depth
        self.window = default_window(self.depth) if window is None else window
        if not 1 <= self.window <= self.depth:
            raise BadInput(f"a window of {self.window} layers: this model has {self.depth}; choose 1 or more")
        self.modules: dict[str, Sequence[nn.Module]] = {
            "hidden": self.anatomy.blocks,
            "mlp": self.anatomy.downs,
            "attention": attention_outputs(model, self.anatomy),
        }
        self._tokens = tokens or (_CUDA_TOKENS if model.device.type == "cuda" else _CPU_TOKENS)

    def around(self, kind: str, layer: int) -> range:
        """The layers that are restored together for ``layer``: itself, or the window that it stands in."""
        if kind == "hidden":
            return range(layer, layer + 1)
        first = layer - self.window // 2
        return range(max(0, first), min(self.depth, first + self.window))

    def trace(
        self,
        prompt: Prompt,
        *,
        scale: float,
        samples: int = 10,
        seed: int = 0,
        done: Callable[[], object] = lambda: None,
    ) -> Traced:
        """All three runs of one prompt, with noise of the standard deviation ``scale``.

        The noise is that of ``seed`` alone, whatever else is traced. ``done`` is called after each layer of
        each kind. The model computes in float32 or wider.
        """
        with torch.no_grad():
            runs = self._runs(prompt, self._noise(prompt, scale, samples, seed))
            restored = {}
            for kind in KINDS:
                columns = []
                for layer in range(self.depth):
                    columns.append(self._restored(runs, kind, self.around(kind, layer), prompt.places))
                    done()
                restored[kind] = torch.stack(columns, 1)
        return Traced(prompt, *runs.probabilities, restored)

    def recall(self, prompt: Prompt, *, scale: float, samples: int = 10, seed: int = 0) -> Tensor:
        """The indirect effects [depth] of the MLPs at the subject's last token, as `trace` has them."""
        last = range(prompt.subject.stop - 1, prompt.subject.stop)
        with torch.no_grad():
            runs = self._runs(prompt, self._noise(prompt, scale, samples, seed))
            restored = [
                self._restored(runs, "mlp", self.around("mlp", layer), last) for layer in range(self.depth)
            ]
        return torch.cat(restored) - runs.probabilities[1]

    def _noise(self, prompt: Prompt, scale: float, samples: int, seed: int) -> Tensor:
        """[S, subject tokens, width of an embedding]."""
        token = torch.tensor(prompt.tokens[:1], device=self.model.device)
        embedded = self.model.get_input_embeddings()(token)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(samples, len(prompt.subject), embedded.shape[-1], generator=generator)
        return scale * drawn.to(embedded.device, embedded.dtype)

    def _runs(self, prompt: Prompt, noise: Tensor) -> _Runs:
        """The clean and the corrupted run."""
        count = len(noise)
        everything = [module for kind in KINDS for module in self.modules[kind]]
        with _noting(everything) as noted:
            clean = self._probabilities(prompt, 1, 0, None)
        as_tuple = isinstance(noted[0], tuple)
        states = [_state(output, 1, len(prompt.tokens))[0] for output in noted]
        past = DynamicCache()
        with _noting(self.anatomy.blocks) as noted, self._corrupting(prompt, noise, 0):
            corrupted = self._probabilities(prompt, count, 0, past)
        behind = [_state(output, count, len(prompt.tokens)) for output in noted]
        by_kind = {kind: states[n * self.depth : (n + 1) * self.depth] for n, kind in enumerate(KINDS)}
        found = float(clean[0]), float(corrupted.cpu().double().mean())
        return _Runs(prompt, noise, by_kind, behind, past, as_tuple, found)

    def _restored(self, runs: _Runs, kind: str, layers: range, places: range) -> Tensor:
        """P(object) [places] with the states of ``layers`` put back at each place; a mean over samples."""
        count = len(runs.noise)
        means = []
        for group in _groups(places, len(runs.prompt.tokens), count, self._tokens):
            rows = [(place, sample) for place in group for sample in range(count)]
            at_once = max(1, self._tokens // (len(runs.prompt.tokens) - group.start))
            parts = [
                self._patched(runs, kind, layers, group.start, rows[n : n + at_once])
                for n in range(0, len(rows), at_once)
            ]
            means.append(torch.cat(parts).cpu().double().view(len(group), count).mean(1))
        return torch.cat(means)

    def _patched(
        self, runs: _Runs, kind: str, layers: range, begin: int, rows: Sequence[tuple[int, int]]
    ) -> Tensor:
        """P(object) of rows, each a place from ``begin`` on and a sample; earlier tokens do not run."""
        device = self.model.device
        place = torch.tensor([place - begin for place, _ in rows], device=device)
        sample = torch.tensor([sample for _, sample in rows], device=device)
        row = torch.arange(len(rows), device=device)
        clean = [states[begin:] for states in runs.clean[kind]]
        below = layers.start + (kind == "hidden")  # blocks that are not run
        given = runs.corrupted[below - 1][:, begin:].index_select(0, sample) if below else None
        writers: dict[nn.Module, Tensor] = {}
        if kind == "hidden":
            assert given is not None
            given[row, place] = clean[layers.start][place]
        else:
            writers = {self.modules[kind][layer]: clean[layer][place] for layer in layers}
        output = (given,) if runs.as_tuple else given
        past = _past(runs.past, sample, begin) if begin else None
        with (
            self._corrupting(runs.prompt, runs.noise.index_select(0, sample), begin),
            stand_in(self.anatomy.blocks[:below], lambda _: lambda *args, **kwargs: output),
            _writing(writers, row, place),
        ):
            return self._probabilities(runs.prompt, len(rows), begin, past)

    def _probabilities(self, prompt: Prompt, rows: int, begin: int, past: Any) -> Tensor:
        """P(object) [rows] after the prompt, whose tokens before ``begin`` are ``past``."""
        tokens = torch.tensor(prompt.tokens, device=self.model.device)
        seen = torch.ones(rows, len(tokens), dtype=torch.long, device=tokens.device)
        positions = torch.arange(begin, len(tokens), device=tokens.device).expand(rows, -1)
        out = self.model(
            input_ids=tokens[begin:].expand(rows, -1),
            attention_mask=seen,
            position_ids=positions,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1]
        probabilities: Tensor = (logits[:, prompt.object] - logits.logsumexp(-1)).exp()
        return probabilities

    @contextmanager
    def _corrupting(self, prompt: Prompt, noise: Tensor, begin: int) -> Iterator[None]:
        """Noise [rows, subject tokens, …] on the subject, in passes of the tokens from ``begin`` on."""
        first, stop = (max(0, place - begin) for place in (prompt.subject.start, prompt.subject.stop))

        def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, first:stop] += noise[:, noise.shape[1] - (stop - first) :]
            return output

        handle = self.model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _groups(places: range, length: int, samples: int, tokens: int) -> Iterator[range]:
    """Places in order, as many together as give about ``tokens`` tokens when all run from their first."""
    start = places.start
    while start < places.stop:
        count = max(1, tokens // (samples * (length - start)))
        yield range(start, min(start + count, places.stop))
        start += count


def _past(cache: DynamicCache, rows: Tensor, length: int) -> FrozenCache:
    """The first ``length`` tokens' keys and values of some of the rows, which no pass changes."""
    layers = []
    for each in cache.layers:
        assert isinstance(each, DynamicLayer)
        assert each.keys is not None
        assert each.values is not None
        layers.append(FrozenLayer(Shared(each.keys[..., :length, :], each.values[..., :length, :], rows)))
    return FrozenCache(layers)


@contextmanager
def _noting(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What each module gives in the one pass inside, copied: a module above may write into it."""
    noted: list[Any] = [None] * len(modules)

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            noted[index] = (first.clone(),) if isinstance(output, tuple) else first.clone()

        return hook

    handles = [module.register_forward_hook(note(index)) for index, module in enumerate(modules)]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _state(output: Any, rows: int, tokens: int) -> Tensor:
    """A module's output as [rows, tokens, width]; some are handed through flat."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first.view(rows, tokens, -1)


@contextmanager
def _writing(writers: Mapping[nn.Module, Tensor], row: Tensor, place: Tensor) -> Iterator[None]:
    """Each module gives ``writers[module]`` [rows, width] instead of its own output, a row at its place."""

    def write(states: Tensor) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            written = output.clone().view(len(row), -1, output.shape[-1])
            written[row, place] = states
            return written.view(output.shape)

        return hook

    handles = [module.register_forward_hook(write(states)) for module, states in writers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
