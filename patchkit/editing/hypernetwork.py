"""MEND's hypernetwork: from what a weight's gradient is made of to its update (arXiv 2110.11309, section 3).

A weight's gradient is Σ over tokens of δ uᵀ, with u the weight's input and δ the gradient of its output. Each
pair is normed, goes through a small network that is the identity before training, and comes back as a pair
(v, d); the update is ΔW = - α Σ d vᵀ, which is never multiplied out. Weights of one shape share a network,
but for a scale and a shift of their own in each of its two layers, and for α.

As in the paper's public code, the second layer has no nonlinearity, and u and δ are normed by means and
deviations that weights of one shape share. Differences: those are taken once, over all training facts; α is
held as its logarithm, and starts where it suits the model (published: 1e-4); V starts with entries of
variance 1/width, so that a rate of learning serves any width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.canonical import canonical_json, hash_bytes, strict_json
from patchkit.editing.kept import kept_name
from patchkit.editing.solve import exact_device
from patchkit.errors import BadInput, NotFound
from patchkit.files import mark_used, reading
from patchkit.tensors import TensorInfo, header_of, to_bytes

__all__ = ["ANEW", "Hypernetwork", "Shape", "Sums", "network_name", "norms_of", "read_network"]

Shape = tuple[int, int]

_FORMAT, _ABOUT = 1, "mend"
_RATE = 1e-4  # α at first, as published
_APART = 1e-7  # added to deviations, as published: a number that never varies is no division by zero
ANEW = "train it: patchkit mend train RECORDS"


@dataclass(frozen=True)
class Hypernetwork:
    """The network of each shape of weight, and what each weight has of its own.

    ``shapes``: the edited weights by parameter name, (d_out, d_in), in order. ``tensors``: what is trained,
    by name: of a shape, with width d = d_in + d_out and rank r, U1, U2 [d, r], V1, V2 [r, d], b1, b2 [d]; of
    a weight scale1, shift1, scale2, shift2 [d] and log_rate [1]. ``norms``: of a shape, mean and deviation
    [d]. ``about``: how it was trained, JSON values.
    """

    shapes: Mapping[str, Shape]
    tensors: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    about: Mapping[str, Any]

    @classmethod
    def untrained(
        cls, shapes: Mapping[str, Shape], rank: int, norms: Mapping[str, Tensor], seed: int
    ) -> Hypernetwork:
        """The identity: U is zero, V is drawn; float32 on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for shape in dict.fromkeys(shapes.values()):
            width = sum(shape)
            most = min(rank, width)
            for layer in ("1", "2"):
                drawn = torch.randn(most, width, generator=generator) / width**0.5
                tensors |= {
                    _of(shape, f"U{layer}"): torch.zeros(width, most),
                    _of(shape, f"V{layer}"): drawn,
                    _of(shape, f"b{layer}"): torch.zeros(width),
                }
        for name, shape in shapes.items():
            ones, zeros = torch.ones(sum(shape)), torch.zeros(sum(shape))
            for layer in ("1", "2"):
                tensors |= {f"{name}.scale{layer}": ones.clone(), f"{name}.shift{layer}": zeros.clone()}
            tensors[f"{name}.log_rate"] = torch.tensor([_RATE]).log()
        return cls(dict(shapes), tensors, dict(norms), {})

    def at(self, rate: float) -> Hypernetwork:
        """The same with α = ``rate`` for every weight."""
        log = torch.tensor([rate]).log()
        rates = {name: log.to(t) for name, t in self.tensors.items() if name.endswith(".log_rate")}
        return replace(self, tensors={**self.tensors, **rates})

    def to(self, device: torch.device, dtype: torch.dtype) -> Hypernetwork:
        """The same, to compute there with."""
        parts = ({n: t.to(device, dtype) for n, t in part.items()} for part in (self.tensors, self.norms))
        tensors, norms = parts
        return replace(self, tensors=tensors, norms=norms)

    def terms(self, weight: str, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of Bᵀ [T, d_out] and A [T, d_in] of ΔW = B A: - α d and v of T tokens' u and δ."""
        shape = self.shapes[weight]
        z = (torch.cat([u, delta], -1) - self.norms[_of(shape, "mean")]) / (
            self.norms[_of(shape, "deviation")] + _APART
        )
        # Not relu: at 0, where everything is before training, a clamp has a gradient.
        h = z + self._layer(weight, shape, "1", z).clamp(min=0)
        g = h + self._layer(weight, shape, "2", h)
        turned, pushed = g.split([shape[1], shape[0]], -1)
        return -self.tensors[f"{weight}.log_rate"].exp() * pushed, turned

    def _layer(self, weight: str, shape: Shape, layer: str, x: Tensor) -> Tensor:
        """s ⊙ (U V x + b) + o (eq. 3)."""
        U, V, b = (self.tensors[_of(shape, f"{name}{layer}")] for name in "UVb")
        return (
            self.tensors[f"{weight}.scale{layer}"] * (x @ V.T @ U.T + b)
            + self.tensors[f"{weight}.shift{layer}"]
        )

    def to_bytes(self) -> bytes:
        """A safetensors file, the same for the same network; its SHA-256 is the network's digest."""
        weights = [[name, *shape] for name, shape in self.shapes.items()]
        about = canonical_json({"format": _FORMAT, "weights": weights, "training": dict(self.about)})
        parts = {**self.tensors, **self.norms}
        plain = {name: part.detach().cpu().float().contiguous() for name, part in parts.items()}
        return to_bytes(
            {name: ("F32", tuple(part.shape), part.numpy().tobytes()) for name, part in plain.items()},
            {_ABOUT: about.decode()},
        )


@dataclass(frozen=True)
class Sums:
    """Σ x and Σ x² [d] over ``count`` tokens, in float64; 0 where there are none yet."""

    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    count: int = 0

    def plus(self, x: Tensor) -> Sums:
        """With tokens x [T, d] added."""
        exact = x.to(exact_device(x.device)).double()
        return Sums(self.total + exact.sum(0), self.squares + exact.square().sum(0), self.count + len(x))


def norms_of(sums: Mapping[Shape, Sums]) -> dict[str, Tensor]:
    """Means and deviations of each shape's u and δ, side by side, by name."""
    norms: dict[str, Tensor] = {}
    for shape, of in sums.items():
        mean = torch.as_tensor(of.total) / of.count
        variance = (torch.as_tensor(of.squares) - of.count * mean.square()) / max(of.count - 1, 1)
        norms[_of(shape, "mean")] = mean.float()
        norms[_of(shape, "deviation")] = variance.clamp(min=0).sqrt().float()
    return norms


def network_name(base: str, layers: Sequence[int]) -> str:
    """The file, in the folder of statistics, of the network for these layers of a base."""
    return kept_name("mend", {"layers": list(layers)}, base) + ".safetensors"


def read_network(folder: Path, base: str, layers: Sequence[int], digest: str) -> tuple[Hypernetwork, str]:
    """The trained network for these layers of a base, and its digest, which is ``digest`` where that is set.

    NotFound or BadInput, in one line that names the command that trains it.
    """
    path = folder / network_name(base, layers)
    if not path.is_file():
        which = ", ".join(map(str, layers))
        raise NotFound(f"no hypernetwork of mend is trained for layers {which} of this base; {ANEW}")
    with reading(path) as file:
        data = file.read()
    mark_used(path)
    found = hash_bytes(data)
    if digest and digest != found:
        raise BadInput(
            f"network_digest: the recipe names the hypernetwork {digest[:12]}, but the one here is "
            f"{found[:12]}; leave it out, or {ANEW}"
        )
    try:
        return _parse(data, path.name), found
    except (BadInput, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: is damaged, or of another version ({error}); {ANEW}") from None


def _parse(data: bytes, name: str) -> Hypernetwork:
    file = header_of(data, name)
    about = strict_json(file.metadata[_ABOUT])
    if about["format"] != _FORMAT:
        raise ValueError("another format")
    shapes: dict[str, Shape] = {weight: (d_out, d_in) for weight, d_out, d_in in about["weights"]}
    tensors = {key: _tensor(info, data) for key, info in file.tensors.items()}
    if not shapes:
        raise ValueError("it is of no weights")
    norms: dict[str, Tensor] = {}
    for shape in set(shapes.values()):
        for name in (_of(shape, "mean"), _of(shape, "deviation")):
            norms[name] = tensors.pop(name)
            if norms[name].shape != (sum(shape),):
                raise ValueError(f"{name} is not one number for each of {sum(shape)}")
    rank = len(tensors[_of(next(iter(shapes.values())), "V1")])
    wanted = Hypernetwork.untrained(shapes, rank, norms, 0).tensors
    if {key: t.shape for key, t in tensors.items()} != {key: t.shape for key, t in wanted.items()}:
        raise ValueError("its tensors are not those of a hypernetwork")
    return Hypernetwork(shapes, tensors, norms, about["training"])


def _tensor(info: TensorInfo, data: bytes) -> Tensor:
    if info.dtype != "F32":
        raise ValueError(f"{info.name} is not float32")
    found = torch.frombuffer(bytearray(data[info.start : info.end]), dtype=torch.float32).reshape(info.shape)
    if not found.isfinite().all():
        raise ValueError(f"{info.name} holds NaN or infinity")
    return found


def _of(shape: Shape, part: str) -> str:
    return f"{shape[0]}x{shape[1]}.{part}"
