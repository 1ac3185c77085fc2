"""mend against a literal float64 writing of its paper; its training; what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference_mend as literal
import tiny_models
import torch

from patchkit.algebra.factors import Patch
from patchkit.canonical import hash_bytes
from patchkit.editing import training
from patchkit.editing.course import EDIT_SHARE, Course, Settings
from patchkit.editing.editor import Trained, find_editor
from patchkit.editing.gradients import Feet, read_pairs
from patchkit.editing.hypernetwork import Hypernetwork, network_name, read_network
from patchkit.editing.lessons import lessons_of, opened, pages_of
from patchkit.editing.mend import Mend, edited_modules, shapes_of
from patchkit.editing.recipe import Recipe
from patchkit.editing.training import train
from patchkit.errors import BadInput, NotFound
from patchkit.models.anatomy import anatomy_of
from patchkit.models.loading import frozen

LAYERS = (1, 2, 3)
RECIPE = Recipe(layers=LAYERS, method="mend")
PARAPHRASES = (
    "You see, LeBron James plays",
    "People say that Microsoft is of",
    "Where is Paris? In",
    "He spoke",
    "I say",
)
NEIGHBOURS = (
    "Rome lies in",
    "Japan was founded by",
    "Dutch plays the sport of",
    "The mother tongue is",
    "Who is it?",
)
FACTS = tuple(
    replace(fact, paraphrases=(said,), neighbors=(near,))
    for fact, said, near in zip(tiny_models.FACTS, PARAPHRASES, NEIGHBOURS, strict=True)
)
SETTINGS = Settings(edits=2, rank=8, learning_rate=1e-3)


def network_for(modules, seed=3):
    """Far from the identity, and unlike for each weight."""
    shapes = shapes_of(modules)
    generator = torch.Generator().manual_seed(seed)
    norms = {}
    for d_out, d_in in set(shapes.values()):
        width = d_out + d_in
        norms[f"{d_out}x{d_in}.mean"] = 0.1 * torch.randn(width, generator=generator)
        norms[f"{d_out}x{d_in}.deviation"] = 0.5 + torch.rand(width, generator=generator)
    network = Hypernetwork.untrained(shapes, 8, norms, seed)
    tensors = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in network.tensors.items()
    }
    return replace(network, tensors=tensors)


def parts(kind="llama", dtype=torch.float64):
    model, tokenizer = tiny_models.tiny_model(kind, dtype), tiny_models.tiny_tokenizer()
    return model, tokenizer, edited_modules(model, anatomy_of(model), LAYERS)


def product(delta):
    return delta.dense.double() if delta.dense is not None else delta.B.double() @ delta.A.double()


def assert_close(found, wanted, tolerance):
    apart = float((found - wanted).norm() / wanted.norm())
    assert apart <= tolerance, apart


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "phi3", "opt", "falcon", "granite", "gpt_neox"])
def test_the_update_is_the_papers(kind):
    """Of all feed-forward matrices, however they are stored and whatever stands behind them."""
    model, tokenizer, modules = parts(kind)
    network = network_for(modules)
    edited = Mend(network, 64 * "a").edit(model, tokenizer, FACTS, RECIPE)
    wanted = literal.update(model, tokenizer, modules, network, FACTS)
    assert list(edited.deltas) == list(modules)
    assert len(modules) >= 2 * len(LAYERS)
    for name, delta in edited.deltas.items():
        assert delta.transposed == (kind == "gpt2")
        assert_close(product(delta), wanted[name], 1e-6)
    assert edited.recipe.network_digest == 64 * "a"
    assert edited.solution is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bases_in_any_precision_are_edited_as_their_exact_float64_selves(kind, dtype):
    model, tokenizer, modules = parts(kind, dtype)
    network = network_for(modules)
    edited = Mend(network, "").edit(model, tokenizer, FACTS, RECIPE)
    exact = model.double()
    wanted = literal.update(exact, tokenizer, modules, network, FACTS)
    for name, delta in edited.deltas.items():
        assert_close(product(delta), wanted[name], 1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_the_pairs_make_up_the_dense_gradient(kind):
    model, tokenizer, modules = parts(kind)
    lessons = lessons_of(tokenizer, FACTS, [()] * 5)
    wanted = [literal.gradient_of(model, tokenizer, modules, fact) for fact in FACTS]
    with frozen(model):
        part = opened(Feet(model, anatomy_of(model), 0), [lesson.edit for lesson in lessons])
        pairs, loss = read_pairs(lambda: part.nll(part.logits()), part.tail.mask, modules)
    for name, (u, delta) in pairs.items():
        dense = sum(gradients[name][2] for gradients in wanted)
        assert_close(delta.T @ u, dense.T if kind == "gpt2" else dense, 1e-9)
    texts = [(fact.prompt.replace("{}", fact.subject), fact.target) for fact in FACTS]
    said = sum(literal.nll_of(model, tokenizer, *text) for text in texts)
    assert_close(loss, said.detach(), 1e-9)
    above = [name for name in modules if ".3." in name]
    assert all(len(pairs[name][0]) == sum(len(lesson.edit.labels) for lesson in lessons) for name in above)


def test_before_training_a_pair_comes_back_as_it_was_normed():
    _, _, modules = parts()
    name, shape = next(iter(shapes_of(modules).items()))
    norms = network_for(modules).norms
    network = Hypernetwork.untrained(shapes_of(modules), 4, norms, 0)
    u, delta = torch.randn(3, shape[1]), torch.randn(3, shape[0])
    columns, rows = network.terms(name, u, delta)
    normed = (torch.cat([u, delta], 1) - norms[f"{shape[0]}x{shape[1]}.mean"]) / (
        norms[f"{shape[0]}x{shape[1]}.deviation"] + 1e-7
    )
    torch.testing.assert_close(rows, normed[:, : shape[1]])
    torch.testing.assert_close(columns, -1e-4 * normed[:, shape[1] :])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_norms_are_the_means_and_deviations_over_all_tokens(kind):
    model, tokenizer, modules = parts(kind)
    course = Course.of(model, lessons_of(tokenizer, FACTS, [()] * 5), [], LAYERS, SETTINGS)
    with frozen(model):
        norms = course.untrained().norms
    edits = {lesson.edit.tokens for lesson in course.lessons}
    learned = [fact for fact in FACTS if edit_of(tokenizer, fact) in edits]
    assert len(learned) == 4
    rows = {}
    for fact in learned:
        for name, (u, delta, _) in literal.gradient_of(model, tokenizer, modules, fact).items():
            there = (u != 0).any(1) & (delta != 0).any(1)
            rows.setdefault(shapes_of(modules)[name], []).append(torch.cat([u, delta], 1)[there])
    for (d_out, d_in), found in rows.items():
        every = torch.cat(found)
        torch.testing.assert_close(norms[f"{d_out}x{d_in}.mean"].float(), every.mean(0).float())
        torch.testing.assert_close(
            norms[f"{d_out}x{d_in}.deviation"].float(), every.std(0).float(), rtol=1e-4, atol=1e-6
        )


def edit_of(tokenizer, fact):
    return lessons_of(tokenizer, [fact], [()])[0].edit.tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_of_a_step_is_the_papers(kind):
    """With W + ΔW written out, whole models, one text at a time; of the facts and texts that are drawn."""
    model, tokenizer, modules = parts(kind)
    course = Course.of(model, lessons_of(tokenizer, FACTS, [()] * 5), [], LAYERS, SETTINGS)
    network = network_for(modules)
    draw = course._drawn(7)
    by_edit = {edit_of(tokenizer, fact): fact for fact in FACTS}
    facts = [by_edit[page.tokens] for page in draw.edits]
    texts = {
        lesson_page.tokens: (prompt, fact.target)
        for fact in FACTS
        for lesson_page, prompt in zip(
            lessons_of(tokenizer, [fact], [()])[0].said,
            (fact.prompt.replace("{}", fact.subject), *fact.paraphrases),
            strict=True,
        )
    }
    near = {tuple(tokenizer(text)["input_ids"]): text for text in NEIGHBOURS}
    said, stays = [texts[page.tokens] for page in draw.said], [near[page.tokens] for page in draw.stays]
    wanted = literal.loss(model, tokenizer, modules, network, facts, said, stays, kind == "gpt2")
    with frozen(model):
        found = course.loss(network.to(model.device, model.dtype), 7)
    assert_close(found.detach(), wanted, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_keeps_every_bit(dtype):
    model, tokenizer, modules = parts("gpt2", dtype)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    Mend(network_for(modules), "").edit(model, tokenizer, FACTS[:2], RECIPE)
    course = Course.of(model, lessons_of(tokenizer, FACTS, [()] * 5), [], LAYERS, SETTINGS)
    train(model, course, steps=1)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_add_up(batch_size):
    model, tokenizer, modules = parts()
    network = network_for(modules)
    one, many = (
        Mend(network, "").edit(model, tokenizer, FACTS, RECIPE, batch_size=size) for size in (5, batch_size)
    )
    for name in modules:
        assert_close(product(many.deltas[name]), product(one.deltas[name]), 1e-6)
    torch.testing.assert_close(torch.tensor(many.losses), torch.tensor(one.losses))


def test_few_tokens_give_factors_and_many_a_product():
    """No larger in the patch than the smaller of the two, and never the factors of all facts at once."""
    model, tokenizer, modules = parts()
    one = Mend(network_for(modules), "").edit(model, tokenizer, FACTS[:1], RECIPE)
    more = Mend(network_for(modules), "").edit(model, tokenizer, FACTS[:2], RECIPE)
    first, last = next(iter(modules)), list(modules)[-1]
    tokens = len(edit_of(tokenizer, FACTS[0]))
    assert one.deltas[first].rank == tokens < 21
    assert one.deltas[first].dense is None
    assert more.deltas[first].dense is not None
    assert more.deltas[last].dense is None


def test_a_patch_reads_back():
    model, tokenizer, modules = parts(dtype=torch.float32)
    digest = 64 * "b"
    patches = []
    for _ in range(2):
        edited = Mend(network_for(modules), digest).edit(model, tokenizer, FACTS, RECIPE)
        table = edited.recipe.to_dict()
        patches.append(Patch(FACTS, edited.deltas, "sha256:" + 64 * "0", "mend", table, (), edited.solution))
    assert patches[0].id == patches[1].id
    back = Patch.from_files(patches[0].files(), "x")
    assert back.files() == patches[0].files()
    assert back.recipe == {"method": "mend", "layers": [1, 2, 3], "guess": False, "network_digest": digest}
    with pytest.raises(BadInput, match="mend keeps no keys, so no single fact can be taken out"):
        back.without([0])


# Training


def course_of(settings=SETTINGS, text=(), facts=FACTS):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    lessons = lessons_of(tokenizer, facts, [()] * len(facts), 128)
    return model, Course.of(model, lessons, list(text), LAYERS, settings)


def test_training_lowers_its_loss(monkeypatch):
    """On what is trained on and on what is held out; the parameters that are kept are the best ones."""
    monkeypatch.setattr(Course, "validate_every", 10)
    model, course = course_of(replace(SETTINGS, learning_rate=3e-3))
    steps = range(100, 110)

    def mean(network):
        with frozen(model):
            return sum(float(course.loss(network, step).detach()) for step in steps) / len(steps)

    with frozen(model):
        before = mean(course.untrained())
    network, report = train(model, course, steps=20)
    assert mean(network) < 0.9 * before
    assert report.after.loss < report.before.loss
    assert report.after.nll < report.before.nll
    assert report.before.kept == 1.0
    with frozen(model):
        assert course.validate(network) == report.after
    assert report.steps == 20
    assert report.best % 10 == 0
    assert network.about["step"] == report.best


def test_a_training_that_gets_no_better_ends(monkeypatch):
    monkeypatch.setattr(Course, "validate_every", 1)
    monkeypatch.setattr(training, "_PATIENCE", 2)
    model, course = course_of(replace(SETTINGS, learning_rate=0.1))
    network, report = train(model, course, steps=50)
    assert report.why == "no better for 2 steps"
    assert (report.steps, report.best) == (2, 0)
    with frozen(model):
        untrained = course.untrained()
    assert all(torch.equal(t, network.tensors[name]) for name, t in untrained.tensors.items())


def test_a_validation_is_at_most_a_quarter_of_the_batches():
    """49 facts held out, edited one at a time, would otherwise cost as much as the 50 steps between them."""
    _, course = course_of(replace(SETTINGS, edits=1))
    for held, edits, every in ((1, 1, 50), (49, 1, 196), (49, 10, 50), (100, 7, 60)):
        own = replace(course, held=[course.held[0]] * held, settings=replace(SETTINGS, edits=edits))
        assert own.validate_every == every
        assert len(list(own._held_draws())) <= every / 4


def test_a_training_begins_at_the_best_of_some_rates():
    model, course = course_of()
    with frozen(model):
        start = course.untrained()
        rates = {float(t.exp()) for name, t in start.tensors.items() if name.endswith(".log_rate")}
        others = [course.validate(start.at(rate)).loss for rate in (1e-7, 1e-5, 1e-3)]
        assert course.validate(start).loss <= min(others)
    assert len(rates) == 1


def test_the_first_rate_is_chosen_by_more_facts_than_one_step_edits(monkeypatch):
    """One fact alone says little of the rate that suits all: of those held out ten are asked, or all."""
    model, course = course_of(replace(SETTINGS, edits=1))
    course = replace(course, held=[*course.lessons, *course.lessons, *course.lessons])
    score, asked = Course._score, []

    def counted(self, network, draws):
        chosen = list(draws)
        asked.append(sum(len(draw.edits) for draw in chosen))
        return score(self, network, chosen)

    monkeypatch.setattr(Course, "_score", counted)
    with frozen(model):
        course.untrained()
        assert set(asked) == {10}
        asked.clear()
        replace(course, held=course.held[:3]).untrained()
        assert set(asked) == {3}


def test_what_is_read_of_a_text_does_not_depend_on_the_others():
    """Nor on the order: a resumed training asks in another one. Half of the texts belong to no group."""
    model, tokenizer, _ = parts(dtype=torch.float32)
    lessons = lessons_of(tokenizer, FACTS, [()] * 5)
    texts = [page.tokens for lesson in lessons for page in (*lesson.said, *lesson.stays)]
    seen = []
    with frozen(model):
        for order in (texts, texts[::-1]):
            feet = Feet(model, anatomy_of(model), 0, texts[::2])
            tails = {text: feet.tail([text]) for text in order}
            seen.append({text: tail.hidden for text, tail in tails.items()})
            together = feet.tail(order)
            for text, row in zip(order, together.hidden, strict=True):
                assert torch.equal(row[: len(text)], tails[text].hidden[0])
    assert all(torch.equal(seen[0][text], seen[1][text]) for text in texts)


def test_minutes_end_a_training_too():
    model, course = course_of()
    _, report = train(model, course, steps=50, minutes=1e-6)
    assert (report.why, report.steps) == ("1e-06 minutes", 0)


def test_the_same_training_gives_the_same_bytes():
    digests = {hash_bytes(train(*course_of(), steps=3)[0].to_bytes()) for _ in range(2)}
    other = train(*course_of(replace(SETTINGS, seed=1)), steps=3)[0]
    assert len(digests) == 1
    assert hash_bytes(other.to_bytes()) not in digests


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, monkeypatch, at):
    monkeypatch.setattr(Course, "validate_every", 2)
    whole, wanted = train(*course_of(), steps=6)
    steps = []

    def kill(phase, done, total):
        if phase == "training" and done == at + 1:
            raise KeyboardInterrupt

    def count(phase, done, total):
        steps.append(done if phase == "training" else 0)

    options = {"steps": 6, "unfinished": tmp_path, "base": "x", "keep_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(*course_of(), progress=kill, **options)
    assert len(list(tmp_path.iterdir())) == 1
    train(*course_of(replace(SETTINGS, seed=1)), **options)  # another training, which takes no notice
    network, report = train(*course_of(), progress=count, **options)
    assert min(step for step in steps if step) == at + 1
    assert network.to_bytes() == whole.to_bytes()
    assert replace(report, seconds=0.0) == replace(wanted, seconds=0.0)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_training_kept_past_the_steps_asked_for_is_not_taken(tmp_path):
    wanted, _ = train(*course_of(), steps=2)

    def kill(phase, done, total):
        if phase == "training" and done == 4:
            raise KeyboardInterrupt

    options = {"unfinished": tmp_path, "base": "x", "keep_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(*course_of(), steps=6, progress=kill, **options)
    network, report = train(*course_of(), steps=2, **options)
    assert (report.steps, network.to_bytes()) == (2, wanted.to_bytes())


def test_a_text_stays_where_there_are_no_neighbours():
    _, tokenizer, _ = parts()
    bare = tuple(replace(fact, neighbors=()) for fact in FACTS)
    text = "The city of Paris lies in France, or in Japan. " * 20
    pages = pages_of(tokenizer, text)
    assert [token for page in pages for token in page.tokens] == tokenizer(text)["input_ids"]
    assert len(pages) > 2
    model, course = course_of(replace(SETTINGS, learning_rate=3e-4), text=pages, facts=bare)
    assert set(course.held_text) | set(course.text) == set(pages)
    _, report = train(model, course, steps=30)
    assert report.after.loss < report.before.loss
    with pytest.raises(BadInput, match="give a text: --text FILE"):
        course_of(facts=bare)


def test_right_answers_of_neighbours_are_read_where_they_are_known():
    tokenizer = tiny_models.tiny_tokenizer()
    (known,) = lessons_of(tokenizer, FACTS[:1], [("France",)])
    (open_,) = lessons_of(tokenizer, FACTS[:1], [()])
    whole = tuple(tokenizer("Rome lies in France")["input_ids"])
    assert known.stays[0].tokens + known.stays[0].labels[-1:] == whole
    assert open_.stays[0].tokens == tuple(tokenizer("Rome lies in")["input_ids"])
    assert known.stays[0].read[0] == open_.stays[0].read[0] == len(open_.stays[0].tokens) - 1


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(BadInput, match="5 facts are too few: 1 held out, and 9 edited together"):
        course_of(replace(SETTINGS, edits=9))
    model, tokenizer, _ = parts()
    with pytest.raises(
        BadInput, match="layer 0: mend edits blocks that stand on others; choose layers from 1"
    ):
        Course.of(model, lessons_of(tokenizer, FACTS, [()] * 5), [], (0, 1), SETTINGS)
    long = replace(FACTS[0], paraphrases=("a b " * 99,))
    with pytest.raises(BadInput, match="fact 'LeBron James': the model cannot read 'a b a b"):
        lessons_of(tokenizer, [long], [()], 128)
    model, course = course_of(replace(SETTINGS, learning_rate=1e30))
    with pytest.raises(BadInput, match=r"step \d: the loss is not a number; lower --learning-rate"):
        train(model, course, steps=9)


# What was trained, kept


def kept(folder, base="base"):
    _, _, modules = parts()
    network = replace(network_for(modules), about={"step": 3})
    data = network.to_bytes()
    (folder / network_name(base, LAYERS)).write_bytes(data)
    return network, hash_bytes(data)


def test_a_network_reads_back(tmp_path):
    network, digest = kept(tmp_path)
    back, found = read_network(tmp_path, "base", LAYERS, "")
    assert found == digest == read_network(tmp_path, "base", LAYERS, digest)[1]
    assert back.to_bytes() == network.to_bytes()
    assert list(back.shapes.items()) == list(network.shapes.items())
    assert back.about == {"step": 3}


def test_a_network_that_is_not_there_or_another_one_is_refused(tmp_path):
    editor = find_editor("mend")
    assert isinstance(editor, Trained)
    _, digest = kept(tmp_path)
    for base, layers in (("other", LAYERS), ("base", (2, 3))):
        with pytest.raises(
            NotFound, match=r"no hypernetwork of mend is trained .*patchkit mend train RECORDS"
        ):
            editor.load(tmp_path, base, Recipe(layers=layers, method="mend"))
    other = RECIPE.override(network_digest=64 * "0")
    with pytest.raises(
        BadInput, match=f"000000000000, but the one here is {digest[:12]}.*patchkit mend train"
    ):
        editor.load(tmp_path, "base", other)
    model, tokenizer, _ = parts()
    with pytest.raises(
        BadInput, match="mend edits with a trained hypernetwork; train it: patchkit mend train"
    ):
        editor.edit(model, tokenizer, FACTS, RECIPE)
    editor.load(tmp_path, "base", RECIPE)
    with pytest.raises(BadInput, match="is of other weights than"):
        editor.edit(model, tokenizer, FACTS, RECIPE.override(layers=(2, 3)))
    with pytest.raises(BadInput, match="no facts"):
        editor.edit(model, tokenizer, [], RECIPE)


@pytest.mark.parametrize("at", [3, 40, 400, -1])
def test_a_damaged_network_is_one_line(tmp_path, at):
    kept(tmp_path)
    path = tmp_path / network_name("base", LAYERS)
    data = bytearray(path.read_bytes())
    del data[at:]
    path.write_bytes(data)
    with pytest.raises(
        BadInput, match=r"is damaged, or of another version .*patchkit mend train RECORDS"
    ) as error:
        read_network(tmp_path, "base", LAYERS, "")
    assert "\n" not in str(error.value)


def test_a_network_whose_norms_do_not_fit_is_one_line(tmp_path):
    _, _, modules = parts()
    network = network_for(modules)
    path = tmp_path / network_name("base", LAYERS)
    mean = next(name for name in network.norms if name.endswith(".mean"))
    for length in (1, 7):
        path.write_bytes(replace(network, norms={**network.norms, mean: torch.zeros(length)}).to_bytes())
        with pytest.raises(BadInput, match=r"is damaged, or of another version .*is not one number for each"):
            read_network(tmp_path, "base", LAYERS, "")
    path.write_bytes(replace(network, shapes={}).to_bytes())
    with pytest.raises(BadInput, match="is of no weights"):
        read_network(tmp_path, "base", LAYERS, "")


def test_the_share_of_edits_is_the_published_one():
    assert EDIT_SHARE == 0.1
