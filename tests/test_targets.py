"""Targets z: the sequential oracle's to 1e-5, whatever the batch, the order and the chunking."""

from __future__ import annotations

import random
from dataclasses import replace
from threading import get_ident

import pytest
import reference_memit as reference
import tiny_models
import torch
from safetensors.torch import save
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from patchkit.editing import batching, targets
from patchkit.editing.batching import Budget, in_batches
from patchkit.editing.curvature import walk
from patchkit.editing.descent import descent_of
from patchkit.editing.recipe import Recipe
from patchkit.editing.targets import find_targets
from patchkit.editing.templates import drift_passages, rewriting_passages
from patchkit.errors import BadInput, Unavailable
from patchkit.facts import Fact
from patchkit.models.anatomy import anatomy_of
from patchkit.models.packing import pack

TEMPLATES = ("{}", "The dancers. {}", "Therefore I say it. {}", "You see. {}")
# Chosen so that facts stop at different steps, some of them clamped, one of them at the last step.
RECIPE = Recipe(
    layers=(1, 2), lambda_=5.0, learning_rate=0.3, steps=14, stop_loss=9.3, clamp=0.4, templates=TEMPLATES
)


def find(model, tokenizer, facts, recipe=RECIPE, **options):
    longest = 128
    rewriting = rewriting_passages(tokenizer, facts, recipe.templates, longest)
    drift = drift_passages(tokenizer, facts, recipe.kl_prompt)
    model.requires_grad_(False)
    return find_targets(model, anatomy_of(model), rewriting, drift, recipe, **options)


def distance(found, wanted):
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def oracle(model, tokenizer, facts, recipe=RECIPE):
    blocks = anatomy_of(model).blocks
    found = [reference.find_target(model, tokenizer, blocks, f, recipe, recipe.templates) for f in facts]
    return (
        torch.stack([z for z, _, _ in found]),
        [steps for _, steps, _ in found],
        [loss for *_, loss in found],
    )


@pytest.mark.parametrize("words", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_z_is_the_sequential_oracles(kind, words):
    model, tokenizer = tiny_models.tiny_model(kind, torch.float64), tiny_models.tiny_tokenizer(words)
    found = find(model, tokenizer, tiny_models.FACTS)
    z, steps, losses = oracle(model, tokenizer, tiny_models.FACTS)
    assert found.steps == steps
    assert distance(found.z, z) < 1e-9
    assert found.losses == pytest.approx(losses, rel=1e-9)


def test_the_comparison_covers_early_stops_clamping_and_the_last_step():
    model, tokenizer = tiny_models.tiny_model("llama", torch.float64), tiny_models.tiny_tokenizer()
    z, steps, losses = oracle(model, tokenizer, tiny_models.FACTS)
    assert len(set(steps)) > 2
    assert max(steps) == RECIPE.steps
    assert min(losses) < RECIPE.stop_loss < max(losses)
    unclamped, _, _ = oracle(model, tokenizer, tiny_models.FACTS, RECIPE.override(clamp=100.0))
    assert distance(z, unclamped) > 1e-3


MOMENTUM = RECIPE.override(
    optimiser="momentum", learning_rate=0.15, rate_decay=0.9, momentum=0.4, clamp=0.6, stop_loss=9.2
)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "recipe",
    [
        MOMENTUM,
        MOMENTUM.override(templates_per_step=2),
        RECIPE.override(templates_per_step=3, rate_decay=0.8),
    ],
    ids=["momentum", "two templates a step", "adam, three templates a step, falling rate"],
)
def test_other_rules_are_the_oracles_too(kind, recipe):
    model, tokenizer = tiny_models.tiny_model(kind, torch.float64), tiny_models.tiny_tokenizer()
    z, steps, losses = oracle(model, tokenizer, tiny_models.FACTS, recipe)
    found = find(model, tokenizer, tiny_models.FACTS, recipe)
    assert len(set(steps)) > 1
    assert found.steps == steps
    assert distance(found.z, z) < 1e-9
    assert found.losses == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("per_step", [4, 5])
def test_a_step_that_reads_every_template_is_the_published_one(per_step):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    published = find(model, tokenizer, tiny_models.FACTS)
    found = find(model, tokenizer, tiny_models.FACTS, RECIPE.override(templates_per_step=per_step))
    assert torch.equal(found.z, published.z)


@pytest.mark.parametrize(
    ("templates", "per_step", "turns"),
    [
        (6, 0, [[0, 1, 2, 3, 4, 5]]),
        (6, 2, [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]),
        (6, 3, [[0, 1, 4], [0, 2, 5], [0, 3]]),
        (4, 3, [[0, 1, 3], [0, 2]]),
        (3, 3, [[0, 1, 2]]),
        (3, 1, [[0], [1], [2]]),
        (1, 2, [[0]]),
    ],
)
def test_each_turn_has_the_bare_prompt_and_its_share_of_the_contexts(templates, per_step, turns):
    assert targets._turns(templates, per_step) == turns


def test_a_rate_that_is_a_share_of_the_norm_needs_no_scale():
    """Where activations are 100 x as large, the momentum rule's first step is 100 x as long."""
    init = torch.randn(3, 8, dtype=torch.float64)
    gradient = torch.randn(3, 8, dtype=torch.float64)
    steps = [
        descent_of(scale * init, (scale * init).norm(dim=1), MOMENTUM).move(gradient / scale, 1)
        for scale in (1.0, 100.0)
    ]
    torch.testing.assert_close(steps[1], 100 * steps[0])


OTHERS = [
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "gptj",
    "opt",
    "phi",
    "cohere",
    "olmo2",
    "stablelm",
]


@pytest.mark.parametrize("kind", OTHERS)
def test_z_is_the_oracles_on_other_decoders_too(kind):
    """In float32, as a user's model is run; a few steps, since Adam amplifies rounding."""
    model, tokenizer = tiny_models.tiny_model(kind), tiny_models.tiny_tokenizer()
    recipe = RECIPE.override(steps=5, templates=TEMPLATES[:2])
    z, steps, _ = oracle(model, tokenizer, tiny_models.FACTS[:3], recipe)
    found = find(model, tokenizer, tiny_models.FACTS[:3], recipe)
    assert found.steps == steps
    assert distance(found.z, z) < 1e-3


ENDING = (Fact("Paris", "The city of {}", "lies in Japan"), Fact("Ann", "Who is {}", "pope"))


@pytest.mark.parametrize("layers", [(0,), (3,)])
def test_the_first_and_the_last_block_can_be_edited(layers):
    """Of the last block only the logits at the subject itself depend: the prompts end with it."""
    model, tokenizer = tiny_models.tiny_model("llama", torch.float64), tiny_models.tiny_tokenizer()
    recipe = RECIPE.override(layers=layers)
    z, steps, _ = oracle(model, tokenizer, ENDING, recipe)
    found = find(model, tokenizer, ENDING, recipe)
    assert found.steps == steps
    assert distance(found.z, z) < 1e-9


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_batch_of_many_is_many_batches_of_one(batch_size):
    model, tokenizer = tiny_models.tiny_model("gpt2", torch.float64), tiny_models.tiny_tokenizer()
    together = find(model, tokenizer, tiny_models.FACTS, batch_size=len(tiny_models.FACTS))
    apart = find(model, tokenizer, tiny_models.FACTS, batch_size=batch_size)
    assert apart.steps == together.steps
    assert distance(apart.z, together.z) < 1e-9


def test_the_order_of_facts_does_not_matter():
    model, tokenizer = tiny_models.tiny_model("llama", torch.float64), tiny_models.tiny_tokenizer()
    order = [3, 0, 4, 2, 1]
    straight = find(model, tokenizer, tiny_models.FACTS)
    shuffled = find(model, tokenizer, [tiny_models.FACTS[i] for i in order])
    assert [straight.steps[i] for i in order] == shuffled.steps
    assert distance(shuffled.z, straight.z[order]) < 1e-9


def test_twice_the_same_bits():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    first, second = (find(model, tokenizer, tiny_models.FACTS) for _ in range(2))
    assert torch.equal(first.z, second.z)
    assert first.losses == second.losses


def test_progress_counts_the_facts_that_have_stopped():
    told = []
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    find(model, tokenizer, tiny_models.FACTS, batch_size=2, progress=lambda *step: told.append(step))
    assert {phase for phase, _, _ in told} == {"targets"}
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts)
    assert told[-1] == ("targets", 5, 5)


class Killed(BaseException):
    pass


def killed_after(facts):
    def progress(_phase, done, _total):
        if done >= facts:
            raise Killed

    return progress


def test_a_killed_search_goes_on_behind_its_finished_batches_to_the_same_bits(tmp_path, monkeypatch):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    whole = find(model, tokenizer, tiny_models.FACTS, batch_size=2)
    options = {"batch_size": 2, "unfinished": tmp_path}
    with pytest.raises(Killed):
        find(model, tokenizer, tiny_models.FACTS, progress=killed_after(4), **options)
    optimised = []
    really = targets._optimise
    monkeypatch.setattr(targets, "_optimise", lambda *a: optimised.append(len(a[2])) or really(*a))
    again = find(model, tokenizer, tiny_models.FACTS, **options)
    assert sum(optimised) == 1
    assert torch.equal(again.z, whole.z)
    assert (again.steps, again.losses) == (whole.steps, whole.losses)


def test_each_batch_is_written_once_whatever_their_number(tmp_path, monkeypatch):
    """Files do not grow with the batches before them, and a search in other batches goes on behind them."""
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    whole, really, done = find(model, tokenizer, tiny_models.FACTS), targets._optimise, []

    def optimise(*args):
        if len(done) == 3:
            raise Killed
        done.append(really(*args))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(targets, "_optimise", optimise)
        with pytest.raises(Killed):
            find(model, tokenizer, tiny_models.FACTS, batch_size=1, unfinished=tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(first) == 3
    assert len({len(data) for data in first.values()}) == 1
    again = find(model, tokenizer, tiny_models.FACTS, batch_size=2, unfinished=tmp_path)
    assert all(path.read_bytes() == data for path, data in first.items())
    assert len(list(tmp_path.iterdir())) == len(tiny_models.FACTS)
    assert distance(again.z, whole.z) < 1e-4


def test_kept_targets_serve_the_same_search_only(tmp_path):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    other = RECIPE.override(clamp=0.2)
    find(model, tokenizer, tiny_models.FACTS, unfinished=tmp_path)
    wanted = find(model, tokenizer, tiny_models.FACTS, other)
    assert torch.equal(find(model, tokenizer, tiny_models.FACTS, other, unfinished=tmp_path).z, wanted.z)
    fewer = find(model, tokenizer, tiny_models.FACTS[:3], other, unfinished=tmp_path)
    assert distance(fewer.z, wanted.z[:3]) < 1e-4


@pytest.mark.parametrize(("layers", "served"), [((2,), True), ((0, 2), True), ((0, 1), False)])
def test_kept_targets_serve_all_layers_that_end_alike(tmp_path, layers, served):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    other = RECIPE.override(layers=layers)
    find(model, tokenizer, tiny_models.FACTS, unfinished=tmp_path)
    files = set(tmp_path.iterdir())
    found = find(model, tokenizer, tiny_models.FACTS, other, unfinished=tmp_path)
    assert torch.equal(found.z, find(model, tokenizer, tiny_models.FACTS, other).z)
    assert (set(tmp_path.iterdir()) == files) is served


def test_kept_targets_are_told_by_the_curvature_and_not_by_the_last_bits_of_its_root(tmp_path):
    """Those differ with the number of threads."""
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    recipe = RECIPE.override(curvature=0.5)
    one, other = (walk(torch.diag(torch.linspace(1, most, tiny_models.WIDTH)), 0.5) for most in (2, 9))
    found = find(model, tokenizer, tiny_models.FACTS, recipe, walk=one, unfinished=tmp_path)
    files = set(tmp_path.iterdir())
    rounded = replace(one, T=one.T * (1 + 1e-4))
    assert not torch.equal(find(model, tokenizer, tiny_models.FACTS, recipe, walk=rounded).z, found.z)
    again = find(model, tokenizer, tiny_models.FACTS, recipe, walk=rounded, unfinished=tmp_path)
    assert torch.equal(again.z, found.z)
    assert set(tmp_path.iterdir()) == files
    anew = find(model, tokenizer, tiny_models.FACTS, recipe, walk=other, unfinished=tmp_path)
    assert torch.equal(anew.z, find(model, tokenizer, tiny_models.FACTS, recipe, walk=other).z)
    assert set(tmp_path.iterdir()) > files


def kept_batch(facts):
    """A whole file of targets that nobody found, all of them 7."""
    count, width = len(facts), tiny_models.WIDTH
    numbers = {"z": torch.full((count, width), 7.0), "losses": torch.zeros(count, dtype=torch.float64)}
    return save({"facts": torch.tensor(facts), "steps": torch.ones(count, dtype=torch.long), **numbers})


WRONG = {"empty": b"", "no header": b"{}", "noise": b"\xff" * 100}
WRONG |= {"a fact twice": kept_batch([0, 0]), "a fact too many": kept_batch([0, len(tiny_models.FACTS)])}


@pytest.mark.parametrize("damage", WRONG.values(), ids=WRONG)
def test_a_damaged_file_of_kept_targets_is_made_again(tmp_path, damage):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    wanted = find(model, tokenizer, tiny_models.FACTS, unfinished=tmp_path)
    (kept,) = tmp_path.iterdir()
    sound = kept.read_bytes()
    kept.write_bytes(damage)
    assert torch.equal(find(model, tokenizer, tiny_models.FACTS, unfinished=tmp_path).z, wanted.z)
    assert kept.read_bytes() == sound


def test_a_loss_that_is_not_a_number_names_the_fact():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BadInput, match="fact 1: the loss is not a number; lower learning_rate or clamp"):
        find(model, tokenizer, tiny_models.FACTS)


class Watch(TorchFunctionMode):
    """Counts the calls by which a program waits for a device: those that read a value."""

    READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.READS
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """The same below Python: what autograd, indexing with masks and copies to the host do."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        self.count += name in self.WAITS or masks or to_host
        return function(*args, **kwargs)


def waits(model, tokenizer, count, steps, monkeypatch):
    """How often the host waits in the loop's steps, for a batch of ``count`` facts."""
    facts = [Fact(f"{'Ann ' * (i % 3)}Ann", "{} lies in", "Japan") for i in range(count)]
    recipe = RECIPE.override(steps=steps, stop_loss=0.0)
    seen = []
    prepare = targets._prepare

    def prepared(*args):
        parts = prepare(*args)
        seen.append((watch.count, dispatched.count))
        return parts

    monkeypatch.setattr(targets, "_prepare", prepared)
    with Watch() as watch, Dispatched() as dispatched:
        find(model, tokenizer, facts, recipe, batch_size=count)
    return watch.count - seen[0][0], dispatched.count - seen[0][1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_one_synchronisation_a_step_whatever_the_number_of_facts(kind, monkeypatch):
    model, tokenizer = tiny_models.tiny_model(kind), tiny_models.tiny_tokenizer()
    few, below = waits(model, tokenizer, 3, 9, monkeypatch)
    many, below_many = waits(model, tokenizer, 24, 9, monkeypatch)
    more_steps, below_more = waits(model, tokenizer, 24, 13, monkeypatch)
    assert few == many
    assert more_steps - many == 4
    assert below == below_many == below_more


# The 1,000 records of CounterFact-R by their tokens from the subject's last one on (SmolLM2's tokenizer).
REAL = {2: 169, 3: 147, 4: 238, 5: 213, 6: 147, 7: 57, 8: 29}


def padding(lengths, groups):
    padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
    return 1 - sum(lengths) / padded


@pytest.mark.parametrize("count", [1, 2, 5, 8, 16, 32, 100, 1000])
def test_padding_stays_under_15_percent_on_real_records(count):
    lengths = [6 * tokens for tokens, records in REAL.items() for _ in range(records)]
    for seed in range(30):
        sample = random.Random(seed).sample(lengths, count)
        groups = pack(sample, 512)
        assert padding(sample, groups) < 0.15
        assert sorted(i for group in groups for i in group) == list(range(count))
        for group in groups:
            assert len(group) == 1 or max(sample[i] for i in group) * len(group) <= 512


def test_groups_of_like_length_are_merged_where_that_pads_little():
    assert pack([4, 4, 5, 5, 5], 512) == [[0, 1, 2, 3, 4]]
    assert pack([4, 40, 4, 41], 512) == [[0, 2], [1, 3]]
    assert pack([10] * 5, 20) == [[0, 1], [2, 3], [4]]
    assert pack([600], 512) == [[0]]


def test_batches_grow_and_back_off_when_memory_runs_out():
    sizes = []

    def work(batch, budget):
        sizes.append(len(batch))
        if len(batch) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    in_batches(range(400), Budget(64, 512, grows=True), work)
    assert sizes == [64, 128, 64, 64, 64, 64, 64, 16]
    with pytest.raises(Unavailable, match="out of memory with one fact at a time"):
        in_batches(
            range(3), Budget(4, 2, grows=True), lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError())
        )
    with pytest.raises(RuntimeError, match="something else"):
        in_batches(
            range(3), Budget(4, 2, False), lambda *_: (_ for _ in ()).throw(RuntimeError("something else"))
        )


def test_budgets():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert Budget.of("auto", cpu) == Budget(32, 256, grows=False)
    assert Budget.of("auto", cuda).grows
    assert Budget.of(7, cuda) == Budget(7, batching._CUDA_TOKENS, grows=False)
    for wrong in (0, -1, "many", 2.5, True):
        with pytest.raises(BadInput, match="expected auto or a number of facts from 1 up"):
            Budget.of(wrong, cpu)


def test_z_is_the_oracles_where_chunks_run_side_by_side(monkeypatch):
    monkeypatch.setattr(batching, "_CPU_TOKENS", 24)  # several chunks of these few facts
    model, tokenizer = tiny_models.tiny_model("llama", torch.float64), tiny_models.tiny_tokenizer()
    before, torches = torch.get_num_threads(), set()
    evaluated = targets.Rewriting.of

    def of(part, delta):
        torches.add((get_ident(), torch.get_num_threads()))
        return evaluated(part, delta)

    monkeypatch.setattr(targets.Rewriting, "of", of)
    torch.set_num_threads(3)
    try:
        found = find(model, tokenizer, tiny_models.FACTS)
    finally:
        torch.set_num_threads(before)
    z, steps, _ = oracle(model, tokenizer, tiny_models.FACTS)
    assert found.steps == steps
    assert distance(found.z, z) < 1e-9
    assert len(torches) > 1
    assert get_ident() not in {thread for thread, _ in torches}


def test_the_fact_is_named_by_its_place_among_all():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BadInput, match="fact 7: the loss is not a number"):
        find(model, tokenizer, tiny_models.FACTS[:2], places=[6, 8])
