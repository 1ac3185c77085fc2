"""What MEND's hypernetwork goes down and is judged by (Mitchell et al. 2022, arXiv 2110.11309, algorithm 1).

A step draws some facts, edits them together as a commit does, and asks two things of the edited model p̃: the
targets behind the facts' own prompts, and text that should stay as the base p has it,

    c · mean of -log p̃(target | x')  +  mean of KL(p(· | x_loc) ‖ p̃(· | x_loc)),  c = 0.1 as published.

Some lessons are held out for the same question. What is drawn depends on seed and step alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.editing.gradients import Feet, Pairs, read_pairs, updated
from patchkit.editing.hypernetwork import Hypernetwork, Shape, Sums, norms_of
from patchkit.editing.kept import computed_on, key_of
from patchkit.editing.lessons import Lesson, Page, opened
from patchkit.editing.mend import edited_modules, shapes_of
from patchkit.editing.task import tell
from patchkit.errors import BadInput
from patchkit.models.anatomy import anatomy_of

__all__ = ["EDIT_SHARE", "Course", "Score", "Settings"]

Progress = Callable[[str, int, int], None]

EDIT_SHARE = 0.1  # c
_HELD_OUT, _MOST_HELD_OUT = 0.1, 100  # of the lessons, and at most
_NEIGHBOURS_ASKED = 2  # of a fact that is held out
_AT_ONCE = 32  # facts whose gradients are read together
_CHOOSING = 10  # facts by which α's start is chosen, at least, as far as so many are held out
_VALIDATE_EVERY = 50  # steps at least
_STEPS_A_DRAW = 4  # steps that go before each batch of a validation, so that those are most of a training
_RATES = (1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 1e-3)  # what α may start at


@dataclass(frozen=True)
class Settings:
    """What a training depends on, beside lessons, base and steps. ``edits``: facts edited together in a step;
    ``rank`` of U and V; ``learning_rate`` of Adam."""

    edits: int = 10
    rank: int = 128
    learning_rate: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """On lessons that were held out. ``nll``: mean of -log p̃ of targets behind the facts' prompts and first
    paraphrases; ``kl`` of what should stay, in nats; ``success``: share of those prompts after which every
    token of the target is the argmax; ``kept``: share of places with the same most probable next token."""

    nll: float
    kl: float
    success: float
    kept: float

    @property
    def loss(self) -> float:
        return EDIT_SHARE * self.nll + self.kl


@dataclass(frozen=True)
class _Draw:
    """Facts to edit, pages that should say their targets, pages that should stay."""

    edits: Sequence[Page]
    said: Sequence[Page]
    stays: Sequence[Page]


@dataclass
class Course:
    """What is trained on and what is held out, on one model; ``modules`` are the edited ones by name."""

    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, Shape]
    feet: Feet
    lessons: Sequence[Lesson]
    held: Sequence[Lesson]
    text: Sequence[Page]
    held_text: Sequence[Page]
    layers: Sequence[int]
    settings: Settings

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        lessons: Sequence[Lesson],
        text: Sequence[Page],
        layers: Sequence[int],
        settings: Settings,
    ) -> Course:
        """BadInput where there are too few lessons, or nothing says what should stay."""
        anatomy = anatomy_of(model)
        modules = edited_modules(model, anatomy, layers)
        if not text and not all(lesson.stays for lesson in lessons):
            raise BadInput(
                "facts without neighbours do not say what should stay as it is; give a text: --text FILE"
            )
        order = random.Random(f"{settings.seed}").sample(lessons, len(lessons))
        count = min(max(1, round(_HELD_OUT * len(order))), _MOST_HELD_OUT)
        if len(order) - count < settings.edits:
            raise BadInput(
                f"{len(order)} facts are too few: {count} held out, and {settings.edits} edited together in "
                "a step; give more, or lower --edits"
            )
        pages = [page for lesson in lessons for page in (*lesson.said, *lesson.stays)] + list(text)
        feet = Feet(model, anatomy, layers[0] - 1, [page.tokens for page in pages])
        held_text = text[::10]
        rest = [page for place, page in enumerate(text) if place % 10] or text
        return cls(
            modules,
            shapes_of(modules),
            feet,
            order[count:],
            order[:count],
            rest,
            held_text,
            layers,
            settings,
        )

    @property
    def validate_every(self) -> int:
        """Steps from one validation to the next."""
        return max(_VALIDATE_EVERY, _STEPS_A_DRAW * -(-len(self.held) // self.settings.edits))

    def name(self, base: str) -> str:
        """The file of a checkpoint that goes on with this, on the base of that fingerprint."""
        lessons = [asdict(lesson) for lesson in (*self.held, *self.lessons)]
        text = [asdict(page) for page in (*self.held_text, *self.text)]
        settings = {**asdict(self.settings), "learning_rate": repr(self.settings.learning_rate)}
        about = {"base": base, "layers": self.layers, "lessons": lessons, "text": text, "settings": settings}
        weight = next(iter(self.modules.values())).weight
        assert isinstance(weight, Tensor)
        return f"mend-{key_of({**about, **computed_on(weight.device)})}.safetensors"

    def identity(self, sums: Mapping[Shape, Sums]) -> Hypernetwork:
        """With the norms of those sums (0 for a shape that is not there), where the model computes."""
        none = {shape: Sums().plus(torch.zeros(1, sum(shape))) for shape in self.shapes.values()}
        norms = norms_of({**none, **sums})
        found = Hypernetwork.untrained(self.shapes, self.settings.rank, norms, self.settings.seed)
        weight = next(iter(self.modules.values())).weight
        assert isinstance(weight, Tensor)
        return found.to(weight.device, weight.dtype)

    def untrained(self, progress: Progress | None = None) -> Hypernetwork:
        """The identity, with the means and deviations of u and δ over the tokens of all lessons' edits, and
        the α with which that does best on the first facts that are held out."""
        sums: dict[Shape, Sums] = {}
        for start in range(0, len(self.lessons), _AT_ONCE):
            tell(progress, "gradients", start, len(self.lessons))
            batch = self.lessons[start : start + _AT_ONCE]
            for name, pair in self._pairs([lesson.edit for lesson in batch]).items():
                shape = self.shapes[name]
                sums[shape] = sums.get(shape, Sums()).plus(torch.cat(pair, -1))
        tell(progress, "gradients", len(self.lessons), len(self.lessons))
        network = self.identity(sums)
        few = list(islice(self._held_draws(), -(-_CHOOSING // self.settings.edits)))
        return min((network.at(rate) for rate in _RATES), key=lambda found: self._score(found, few).loss)

    def loss(self, network: Hypernetwork, step: int) -> Tensor:
        """Of the facts that are drawn at ``step``, from 0."""
        draw = self._drawn(step)
        nll, kl, *_ = self._asked(network, draw)
        return EDIT_SHARE * nll / len(draw.said) + kl / len(draw.stays)

    def validate(self, network: Hypernetwork) -> Score:
        """On what is held out, as many facts edited together as in training."""
        return self._score(network, self._held_draws())

    def _score(self, network: Hypernetwork, draws: Iterable[_Draw]) -> Score:
        sums, said, stays = [0.0] * 4, 0, 0
        with torch.no_grad():
            for draw in draws:
                nll, kl, right, same = self._asked(network, draw)
                found = (float(nll), float(kl), right, same)
                sums = [total + value for total, value in zip(sums, found, strict=True)]
                said, stays = said + len(draw.said), stays + len(draw.stays)
        return Score(sums[0] / said, sums[1] / stays, sums[2] / said, sums[3] / stays)

    def _drawn(self, step: int) -> _Draw:
        chance = random.Random(f"{self.settings.seed} {step}")
        chosen = chance.sample(self.lessons, self.settings.edits)
        stays = [chance.choice(lesson.stays) for lesson in chosen if lesson.stays]
        text = [chance.choice(self.text)] if self.text else []
        said = [chance.choice(lesson.said) for lesson in chosen]
        return _Draw([lesson.edit for lesson in chosen], said, [*stays, *text])

    def _held_draws(self) -> Iterator[_Draw]:
        edits = self.settings.edits
        for number, start in enumerate(range(0, len(self.held), edits)):
            chosen = self.held[start : start + edits]
            stays = [page for lesson in chosen for page in lesson.stays[:_NEIGHBOURS_ASKED]]
            text = [self.held_text[number % len(self.held_text)]] if self.held_text else []
            said = [page for lesson in chosen for page in lesson.said[:2]]
            yield _Draw([lesson.edit for lesson in chosen], said, [*stays, *text])

    def _asked(self, network: Hypernetwork, draw: _Draw) -> tuple[Tensor, Tensor, float, float]:
        """Sums over pages: -log p̃ of targets, KL of what should stay, targets said, places kept."""
        pairs = self._pairs(draw.edits)
        terms = {name: network.terms(name, *pair) for name, pair in pairs.items()}
        said, stays = opened(self.feet, draw.said), opened(self.feet, draw.stays)
        with torch.no_grad():
            before = stays.logits().log_softmax(-1)
        with updated(self.modules, terms):
            answers, now = said.logits(), stays.logits().log_softmax(-1)
        return said.nll(answers), stays.kl(before, now), said.right(answers), stays.same(before, now)

    def _pairs(self, edits: Sequence[Page]) -> Pairs:
        part = opened(self.feet, edits)
        return read_pairs(lambda: part.nll(part.logits()), part.tail.mask, self.modules)[0]
