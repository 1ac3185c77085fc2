"""The oracle: MEMIT written literally from the paper (arXiv 2210.07229), one fact at a time.

Whole model, a fact's texts as one padded batch, head at every position, torch's own optimisers, forward hooks
that add delta, dense updates by a direct solve. Slow and plain on purpose, in whatever dtype the model is in
(float64 to compare with). Nothing of patchkit is used, except that facts, recipes and anatomies are read as
plain data.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.nn.functional import kl_div, log_softmax


@contextmanager
def hooked(module, *, output=None, inputs=None):
    """Call ``output(tensor) -> tensor`` on a module's output, or ``inputs(tensor)`` on its first argument."""

    def after(_, __, result):
        if isinstance(result, tuple):
            return (output(result[0]), *result[1:])
        return output(result)

    if output is not None:
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(lambda _, args: inputs(args[0]))
    try:
        yield
    finally:
        handle.remove()


def logits_of(model, tokens):
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def logits_together(model, rows):
    """Of texts of several lengths, padded behind: [B, longest, vocabulary]."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def texts_of(fact, templates):
    """Each template filled with the fact's prompt: (text, index of the subject's last character)."""
    for template in templates:
        text = template.replace("{}", fact.prompt.replace("{}", fact.subject))
        start = template.index("{}") + fact.prompt.index("{}")
        yield text, start + len(fact.subject) - 1


def tokens_of(tokenizer, text, character, prompt_length=None):
    """Token ids, index of the token that covers ``character``, index of the first token past the prompt."""
    found = tokenizer(text, return_offsets_mapping=True)
    ids, spans = found["input_ids"], found["offset_mapping"]
    subject = max(i for i, (start, end) in enumerate(spans) if start <= character < end)
    target = None
    if prompt_length is not None:
        target = min(i for i, (start, end) in enumerate(spans) if end > prompt_length)
    return ids, subject, target


def rule(delta, init, recipe):
    """torch's own optimiser and its schedule."""
    if recipe.optimiser == "adam":
        descent = torch.optim.Adam([delta], lr=recipe.learning_rate)
    else:
        rate = recipe.learning_rate * float(init.norm())
        descent = torch.optim.SGD([delta], lr=rate, momentum=recipe.momentum)
    return descent, torch.optim.lr_scheduler.ExponentialLR(descent, recipe.rate_decay)


def find_target(model, tokenizer, blocks, fact, recipe, templates, T=None):
    """z of one fact at the last edited layer, the steps taken and the last loss (sec. 4.3 and eq. 16).

    With T the leaf is θ, δ = T θ."""
    block = blocks[recipe.layers[-1]]
    rewriting = []
    for text, character in texts_of(fact, templates):
        rewriting.append(tokens_of(tokenizer, f"{text} {fact.target}", character, len(text)))
    text, character = next(texts_of(type(fact)(fact.subject, recipe.kl_prompt, "x"), ["{}"]))
    drift_ids, drift_subject, _ = tokens_of(tokenizer, text, character)

    seen = []

    def see(hidden):
        seen.append(hidden.detach()[0])
        return hidden

    with torch.no_grad(), hooked(block, output=see):
        logits_of(model, rewriting[0][0])
    init = seen[0][rewriting[0][1]].clone()
    leaf = torch.zeros_like(init, requires_grad=True)
    descent, schedule = rule(leaf, init, recipe)
    together, beside = (rewriting[:1], rewriting[1:]), recipe.templates_per_step - 1
    bare, others = ([], rewriting) if recipe.templates_per_step == 1 else together
    turns = -(-len(others) // max(beside, 1)) if beside >= 0 else 1
    initial, times_said = None, 0

    def moved():
        return leaf if T is None else T @ leaf

    def with_delta(rows, subjects):
        def add(hidden):
            hidden = hidden.clone()
            hidden[range(len(rows)), subjects] += moved()
            return hidden

        with hooked(block, output=add):
            return log_softmax(logits_together(model, rows), -1)

    for step in range(recipe.steps):
        descent.zero_grad()
        nll, turn, said = 0, bare + others[step % turns :: turns], True
        rows, subjects, _ = zip(*turn, (drift_ids, drift_subject, None), strict=True)
        spoken = with_delta(rows, subjects)
        for (ids, _, target), log_p in zip(turn, spoken, strict=False):
            expected = torch.tensor(ids[target:])
            likely = log_p[target - 1 : len(ids) - 1]
            said = said and bool((likely.argmax(-1) == expected).all())
            nll = nll - likely.gather(1, expected[:, None]).mean() / len(turn)
        current = spoken[-1, drift_subject]
        if initial is None:
            initial = current.detach().clone()
        drift = recipe.kl_factor * kl_div(initial, current, log_target=True, reduction="sum")
        decay = recipe.weight_decay * moved().norm() / init.norm() ** 2
        loss = nll + drift + decay
        times_said += said
        if recipe.stop_argmax and times_said == recipe.stop_argmax:  # MPES of ENCORE, arXiv 2502.01636
            break
        if loss < recipe.stop_loss or step == recipe.steps - 1:
            break
        loss.backward()
        if recipe.optimiser == "momentum":
            leaf.grad /= leaf.grad.norm()
        descent.step()
        schedule.step()
        longest = recipe.clamp * init.norm()
        if leaf.norm() > longest:
            with torch.no_grad():
                leaf.mul_(longest / leaf.norm())
    return (init + moved()).detach(), step + 1, float(loss.detach())


def read(model, tokenizer, module, fact, templates, *, inputs):
    """A module's input or output at the subject's last token, for each template: [T, width]."""
    rows = []
    for text, character in texts_of(fact, templates):
        ids, subject, _ = tokens_of(tokenizer, f"{text} {fact.target}", character, len(text))
        seen = []

        def see(value, seen=seen):
            seen.append(value.detach())
            return value

        with torch.no_grad(), hooked(module, **({"inputs": see} if inputs else {"output": see})):
            logits_of(model, ids)
        rows.append(seen[0].flatten(0, -2)[subject])  # some blocks flatten
    return torch.stack(rows)


def key_of(model, tokenizer, module, fact, templates):
    """The mean of the bare prompt's key and the mean key over the contexts (eq. 19, as published)."""
    rows = read(model, tokenizer, module, fact, templates, inputs=True)
    groups = [rows[:1].mean(0)] + ([rows[1:].mean(0)] if len(rows) > 1 else [])
    return torch.stack(groups).mean(0)


def memit(R, K, C, recipe):
    """Equation 14; C drawn to its mean eigenvalue, where the recipe says so."""
    mean, share = torch.trace(C) / len(C), recipe.shrinkage
    served = (1 - share) * C + share * mean * torch.eye(len(C), dtype=C.dtype)
    adjusted = torch.linalg.solve(recipe.lambda_ * served + K @ K.T, K)
    return R @ adjusted.T


def memit_of_all_contexts(model, tokenizer, anatomy, facts, templates):
    """Equation 14 with a column for each fact and template, weighed by its share in the fact's key: a solve
    for `spread`, which asks for the layers from low to high."""
    layers = []

    def solve(R, K, C, recipe):
        down = anatomy.downs[recipe.layers[len(layers)]]
        layers.append(down)
        rows = [read(model, tokenizer, down, fact, templates, inputs=True).double() for fact in facts]
        shares = [0.5] + [0.5 / (len(templates) - 1)] * (len(templates) - 1)
        columns = [share**0.5 * key for keys in rows for share, key in zip(shares, keys, strict=True)]
        wanted = [share**0.5 * residual for residual in R.T for share in shares]
        return memit(torch.stack(wanted, 1), torch.stack(columns, 1), C, recipe)

    return solve


def spread(model, tokenizer, anatomy, facts, z, recipe, templates, moments, aim=None, solve=memit):
    """Algorithm 1 with given z [N, d_model] and C by layer: dense Delta [d_out, d_in] by weight name.

    ``aim(block, output, residual)`` gives what to add to an edited projection's output [N, d_model] in a
    model that does not add it to the stream as it is. The model's weights are put back.
    """
    deltas, saved = {}, {}
    last = recipe.layers[-1]
    for done, layer in enumerate(recipe.layers):
        down, name = anatomy.downs[layer], anatomy.weights[layer]
        K = torch.stack([key_of(model, tokenizer, down, fact, templates) for fact in facts], 1).double()
        states = [
            read(model, tokenizer, anatomy.blocks[last], fact, ["{}"], inputs=False)[0] for fact in facts
        ]
        R = (z - torch.stack(states)) / (len(recipe.layers) - done)
        if aim is not None:
            outputs = [read(model, tokenizer, down, fact, ["{}"], inputs=False)[0] for fact in facts]
            R = aim(anatomy.blocks[layer], torch.stack(outputs), R)
        R = R.T.double()
        deltas[name] = solve(R, K, moments[layer].double(), recipe)
        saved[name] = down.weight.detach().clone()
        change = deltas[name].T if anatomy.transposed else deltas[name]
        with torch.no_grad():
            down.weight += change.to(down.weight.dtype)
    with torch.no_grad():
        for layer in recipe.layers:
            anatomy.downs[layer].weight.copy_(saved[anatomy.weights[layer]])
    return deltas


def second_moment(model, tokenizer, module, documents):
    """C = E[k kᵀ] by a literal sum over tokens, without special tokens."""
    total, count = None, 0
    for document in documents:
        found = tokenizer(document, return_special_tokens_mask=True)
        seen = []
        with torch.no_grad(), hooked(module, inputs=seen.append):
            logits_of(model, found["input_ids"])
        for k, special in zip(seen[0].flatten(0, -2).double(), found["special_tokens_mask"], strict=True):
            if not special:
                total = torch.outer(k, k) + (0 if total is None else total)
                count += 1
    return total / count
