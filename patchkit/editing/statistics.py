"""What each edited weight already serves: C = E[k kᵀ], the keys' uncentred second moment.

(ROME eq. 6 and MEMIT eq. 15; Meng et al. 2022.) One pass over the text collects every layer at
once and stops above the deepest. Padding and special tokens are left out. Sums are float64, kept
on disk in pieces, so a killed run goes on where it was; a finished C is a float32 file a layer,
named by base, text and layer, and a run that reads it gives the numbers of the run that made it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.canonical import canonical_json
from patchkit.editing.corpus import Progress
from patchkit.editing.curvature import TOKENS_PER_WIDTH, Walk, second_moment, walk
from patchkit.editing.kept import key_of, read_kept, write_kept
from patchkit.editing.pieces import Piece, padded_pieces, pieces_of
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.solve import exact_device
from patchkit.editing.written import text_for
from patchkit.errors import BadInput
from patchkit.files import mark_used, write_durably, writing
from patchkit.models.anatomy import Anatomy, anatomy_of
from patchkit.models.hooks import reading_inputs, stop_after
from patchkit.models.loading import float32_compute

__all__ = ["Statistics", "collect", "statistics_for"]

_AT_ONCE = 8  # sequences a forward pass
_KEPT_APART = 20  # times as long as keeping the sums took passes before they are kept again
_KEEP_EVERY = 20.0  # seconds between two saved sums
_HELD = 1 << 31  # bytes of factors and spaces, which are float64 and twice as large as C


@dataclass
class Statistics:
    """C of some layers, float32 [d_ff, d_ff], and its factors. ``tokens`` were counted for each.

    ``curvature``: G of a layer, float32 [d_model, d_model], where it was asked for (`editing.curvature`).
    ``asked``: the tokens that were asked for, which a text may lack.
    """

    layers: dict[int, Tensor]
    tokens: int
    curvature: dict[int, Tensor] = field(default_factory=dict)
    asked: int = 0
    _factors: dict[tuple[int, float, float, float], Tensor] = field(default_factory=dict, repr=False)
    _spaces: dict[tuple[int, float], Tensor] = field(default_factory=dict, repr=False)

    def cholesky(self, layer: int, lambda_: float, norm: float = 0.0, *, shrinkage: float = 0.0) -> Tensor:
        """The lower float64 factor of λ((1 - s) C + s μ I) + ``norm`` I, s the ``shrinkage`` and μ the mean
        eigenvalue of C; made once for each layer and weights, and held as far as there is room.

        Text of a few times d_ff tokens shows small eigenvalues of C as too small; linear shrinkage is the
        usual remedy (Ledoit and Wolf 2004, doi 10.1016/S0047-259X(03)00096-4).
        BadInput where the sum is not positive definite: where C lacks full rank, with neither of the two.
        """
        name = layer, lambda_, norm, shrinkage
        if name not in self._factors:
            C = self.layers[layer].to(exact_device(self.layers[layer].device)).double()
            served = lambda_ * (1 - shrinkage) * C
            served.diagonal().add_(lambda_ * shrinkage * C.diagonal().mean() + norm)
            factor, failed = torch.linalg.cholesky_ex(served)
            if failed.item() or not factor.isfinite().all():
                short = ", and statistics_text to a text that has so many" if self.tokens < self.asked else ""
                raise BadInput(
                    f"layer {layer}: the statistics of {self.tokens} tokens leave directions unseen "
                    f"(C is not positive definite); set statistics_tokens to {2 * len(C)} or more{short}"
                )
            return self._held(self._factors, name, factor)
        return self._factors[name]

    def null_space(self, layer: int, threshold: float) -> Tensor:
        """Eigenvectors [d_ff, m] of C with eigenvalues below ``threshold``, float64, made once for each; so
        P = U Uᵀ (AlphaEdit, arXiv 2410.02355). BadInput where there are none, all are, or C lacks full rank.
        """
        if (layer, threshold) not in self._spaces:
            self.cholesky(layer, 1.0)  # refuses a C in which unseen directions would pass for free ones
            C = self.layers[layer]
            values, vectors = torch.linalg.eigh(C.to(exact_device(C.device)).double())
            free = int((values < threshold).sum())
            if not 0 < free < len(C):
                which = "every" if free else "no"
                raise BadInput(
                    f"layer {layer}: nullspace_threshold {threshold:g} leaves {which} direction free; the "
                    f"eigenvalues of C go from {float(values[0]):.2g} to "
                    f"{float(values[-1]):.2g}: set a number between"
                )
            return self._held(self._spaces, (layer, threshold), vectors[:, :free].contiguous())
        return self._spaces[layer, threshold]

    def walk(self, layer: int, power: float) -> Walk | None:
        """What the search of targets at ``layer`` walks in; None for ``power`` 0.

        BadInput where these statistics were collected for a recipe without it.
        """
        if not power:
            return None
        if layer not in self.curvature:
            raise BadInput(f"layer {layer}: no curvature was collected; collect this recipe's statistics")
        return walk(self.curvature[layer], power)

    def _held(self, among: dict[Any, Tensor], name: Any, found: Tensor) -> Tensor:
        """``found``, held where there is room; layers are asked for in turn, so that letting the oldest go
        for it would serve none of them."""
        every = (*self._factors.values(), *self._spaces.values(), found)
        if sum(each.numel() * each.element_size() for each in every) <= _HELD:
            among[name] = found
        return found

    def digest(self, layers: Sequence[int]) -> str:
        """SHA-256 over the float32 bytes of C of ``layers``, in order."""
        digest = hashlib.sha256()
        for layer in layers:
            digest.update(self.layers[layer].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def statistics_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    base: str = "",
    progress: Progress | None = None,
) -> Statistics:
    """The statistics that ``recipe`` asks for, from ``folder`` where they lie there already.

    ``base`` names the model in what is kept (`Checkpoint.as_read`); without a folder nothing is.
    """
    longest = positions(model.config)
    if longest and recipe.statistics_length > longest:
        raise BadInput(
            f"statistics_length = {recipe.statistics_length}: the base has {longest} positions; "
            f"choose at most so many: --set statistics_length={longest}, or in patchkit.toml"
        )
    text = text_for(model, tokenizer, recipe, folder=folder, base=base, progress=progress)
    return collect(
        model,
        tokenizer,
        recipe.layers,
        text,
        tokens=recipe.statistics_tokens,
        length=recipe.statistics_length,
        curvature=recipe.layers[-1:] if recipe.curvature else (),
        seed=recipe.statistics_seed,
        folder=folder,
        base=base,
        progress=progress,
    )


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    text: Iterable[str],
    *,
    tokens: int,
    length: int = 128,
    curvature: Sequence[int] = (),
    seed: int = 0,
    folder: Path | None = None,
    base: str = "",
    progress: Progress | None = None,
    keep_every: float = _KEEP_EVERY,
) -> Statistics:
    """C of ``layers`` over the first ``tokens`` tokens of ``text``, in one pass for all layers; and G of the
    layers in ``curvature``, with answers drawn from ``seed``.

    Layers already in ``folder`` are read, the others are collected together; a run that was killed
    goes on from the last sums kept there (at most ``keep_every`` seconds old).
    """
    anatomy = anatomy_of(model)
    anatomy.check_layers(layers)
    pieces = list(pieces_of(tokenizer, text, tokens, length))
    counted = sum(sum(mask) for _, mask in pieces)
    if not counted:
        raise BadInput("the corpus has no text to collect statistics from; name another with statistics_text")
    home = (
        folder / key_of({"base": base, "pieces": [list(ids) for ids, _ in pieces]})
        if folder is not None
        else None
    )
    if home is not None:
        _note(home, {"base": base.partition("+")[0], "tokens": tokens, "length": length})
    found = {layer: C for layer in layers if (C := _load(home, layer, anatomy.d_ff)) is not None}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        sums = _Sums.resume(home, missing, anatomy.d_ff, exact_device(model.device))
        with float32_compute(model):
            _add_up(model, anatomy, pieces, sums, keep_every, progress)
        for layer in missing:
            found[layer] = (sums.of[layer] / counted).float().cpu()
            _save(home, layer, found[layer])
        sums.forget()
    bends = {layer: _curvature(model, anatomy, layer, pieces, seed, home, progress) for layer in curvature}
    device = model.device
    return Statistics(
        {layer: found[layer].to(device) for layer in layers},
        counted,
        {layer: G.to(device) for layer, G in bends.items()},
        tokens,
    )


def _curvature(
    model: PreTrainedModel,
    anatomy: Anatomy,
    layer: int,
    pieces: Sequence[Piece],
    seed: int,
    home: Path | None,
    progress: Progress | None,
) -> Tensor:
    """G of one layer, from ``home`` where it lies there already."""
    path = home and home / f"curvature-{layer}-{TOKENS_PER_WIDTH}-{seed}.safetensors"
    kept = read_kept(path, {"G": [anatomy.d_model, anatomy.d_model]})
    if kept is not None and kept["G"].isfinite().all():
        return kept["G"]
    with float32_compute(model):
        G = second_moment(model, anatomy, layer, pieces, seed, progress)
    if path is not None:
        write_kept(path, {"G": G})
    return G


@dataclass
class _Sums:
    """Σ k kᵀ of each layer, float64 [d_ff, d_ff], over the first ``done`` pieces."""

    of: dict[int, Tensor]
    done: int
    path: Path | None

    @classmethod
    def resume(cls, home: Path | None, layers: Sequence[int], d_ff: int, device: torch.device) -> _Sums:
        path = home / f"sums-{'-'.join(map(str, layers))}.safetensors" if home is not None else None
        names = {layer: f"layer.{layer}" for layer in layers}
        kept = read_kept(path, {"done": [1], **{name: [d_ff, d_ff] for name in names.values()}})
        if kept is None:
            zeros = {layer: torch.zeros(d_ff, d_ff, dtype=torch.float64, device=device) for layer in layers}
            return cls(zeros, 0, path)
        return cls({layer: kept[name].to(device) for layer, name in names.items()}, int(kept["done"]), path)

    def keep(self) -> None:
        if self.path is not None:
            sums = {f"layer.{layer}": total.cpu() for layer, total in self.of.items()}
            write_kept(self.path, {**sums, "done": torch.tensor([self.done])})

    def forget(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _add_up(
    model: PreTrainedModel,
    anatomy: Anatomy,
    pieces: Sequence[Piece],
    sums: _Sums,
    keep_every: float,
    progress: Progress | None,
) -> None:
    kept, wait = time.monotonic(), keep_every
    rest = iter(pieces[sums.done :])
    while batch := list(islice(rest, _AT_ONCE)):
        for layer, keys in _keys(model, anatomy, tuple(sums.of), batch).items():
            product = keys.T @ keys  # [d_ff, d_ff] of at most a thousand tokens: exact enough in float32
            total = sums.of[layer]
            total += (product.to(total.device, total.dtype) + product.T.to(total.device, total.dtype)) / 2
        sums.done += len(batch)
        if progress is not None:
            progress("statistics", sums.done, len(pieces))
        if (now := time.monotonic()) - kept >= wait:
            sums.keep()
            kept = time.monotonic()
            # A large model's sums are gigabytes: what is kept may not cost more than what a kill would.
            wait = max(keep_every, _KEPT_APART * (kept - now)) if keep_every else 0.0


def _keys(
    model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int], batch: Sequence[Piece]
) -> dict[int, Tensor]:
    """The inputs [tokens, d_ff] of the edited weights for the counted tokens of some sequences."""
    ids, real, counted = padded_pieces(batch, model.device)
    with torch.no_grad(), ExitStack() as stack:
        inputs = {layer: stack.enter_context(reading_inputs(anatomy.downs[layer])) for layer in layers}
        with stop_after(anatomy.blocks[max(layers)]):
            model(input_ids=ids, attention_mask=real, use_cache=False)
    return {layer: inputs[layer][-1].view(*counted.shape, -1)[counted] for layer in layers}


def _load(home: Path | None, layer: int, d_ff: int) -> Tensor | None:
    found = read_kept(home and home / f"layer-{layer}.safetensors", {"C": [d_ff, d_ff]})
    return found["C"] if found is not None and found["C"].isfinite().all() else None


def _note(home: Path, about: Mapping[str, Any]) -> None:
    """What the statistics in a folder are of, and that they were used now: `patchkit gc` asks for both."""
    path = home / "about.json"
    if path.exists():
        mark_used(path)
        return
    with writing(path):
        home.mkdir(parents=True, exist_ok=True)
    write_durably(path, canonical_json(about))


def _save(home: Path | None, layer: int, C: Tensor) -> None:
    if home is not None:
        write_kept(home / f"layer-{layer}.safetensors", {"C": C})
