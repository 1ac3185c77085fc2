"""Oracles: each editor's equations written literally in float64, as `reference_memit` is for MEMIT.

Whole models, torch's own optimisers, inverses where the papers write inverses. Nothing of patchkit is used,
except that facts, recipes and anatomies are read as plain data.
"""

from __future__ import annotations

from dataclasses import dataclass

import reference_memit as reference
import torch
from torch.nn.functional import kl_div, log_softmax


def emmet(R, K, C, recipe):
    """ΔW = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹ (arXiv 2403.14236)."""
    inverse = torch.linalg.inv(C)
    return R @ torch.linalg.inv(K.T @ inverse @ K) @ K.T @ inverse


def alphaedit(K_p, threshold, ridge):
    """Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λI)⁻¹, P of C's small eigenvalues (arXiv 2410.02355); K_p by call."""
    earlier = iter(K_p)

    def solve(R, K, C, recipe):
        values, vectors = torch.linalg.eigh(C)
        U = vectors[:, values < threshold]
        P, before = U @ U.T, next(earlier)
        whole = before @ before.T @ P + K @ K.T @ P + ridge * torch.eye(len(C), dtype=C.dtype)
        return R @ K.T @ P @ torch.linalg.inv(whole)

    return solve


def encore(K_p):
    """Δ = R Kᵀ (λ_p C + λ_n I + K_p K_pᵀ + K Kᵀ)⁻¹ (arXiv 2502.01636 and its public code); K_p by call."""
    earlier = iter(K_p)

    def solve(R, K, C, recipe):
        before, identity = next(earlier), torch.eye(len(C), dtype=C.dtype)
        served = recipe.lambda_ * C + recipe.lambda_norm * identity + before @ before.T
        return R @ K.T @ torch.linalg.inv(served + K @ K.T)

    return solve


def anchored(model, tokenizer, anatomy, fact, z, recipe, passed=lambda output: output):
    """z - v* + s v* / ‖v*‖, v* = v₀ + z - h (arXiv 2602.02543); ``passed``: what the stream takes of v₀."""
    value = value_of(model, tokenizer, anatomy, fact, z, recipe, passed)
    return z - value + recipe.norm_anchor * value / value.norm()


def value_of(model, tokenizer, anatomy, fact, z, recipe, passed=lambda output: output):
    """v* = v₀ + δ at the last edited layer, at the subject in the bare prompt."""
    down, block = anatomy.downs[recipe.layers[-1]], anatomy.blocks[recipe.layers[-1]]
    output, state = (
        reference.read(model, tokenizer, m, fact, ["{}"], inputs=False)[0] for m in (down, block)
    )
    return passed(output) + z - state


def ultraedit(model, tokenizer, anatomy, facts, recipe):
    """By weight name: H [d_in, N], V [d_out, N] and V Hᵀ (H Hᵀ + λI)⁻¹ (arXiv 2505.14679, eq. for v and Δ),
    with ĥ and ∇̂ divided by root mean squares over facts and weights; and the losses."""
    downs = [anatomy.downs[layer] for layer in recipe.layers]
    keys, gradients, losses = [], [], []
    for fact in facts:
        text = fact.prompt.replace("{}", fact.subject)
        ids, _, target = reference.tokens_of(tokenizer, f"{text} {fact.target}", 0, len(text))
        seen = []
        handles = [
            down.register_forward_hook(lambda _, inputs, out, seen=seen: seen.append((inputs[0], out)))
            for down in downs
        ]
        for down in downs:
            down.weight.requires_grad_(True)
        log_p = log_softmax(reference.logits_of(model, ids), -1)
        labels = torch.tensor(ids[target:])[:, None]
        loss = -log_p[target - 1 : len(ids) - 1].gather(1, labels).mean()
        found = torch.autograd.grad(loss, [output for _, output in seen])
        for handle, down in zip(handles, downs, strict=True):
            handle.remove()
            down.weight.requires_grad_(False)
        at = target - 1
        keys.append(torch.stack([inputs.detach().flatten(0, -2)[at] for inputs, _ in seen]))
        gradients.append(torch.stack([gradient.flatten(0, -2)[at] for gradient in found]))
        losses.append(loss.item())
    h, g = torch.stack(keys).double(), torch.stack(gradients).double()  # [N, L, d]
    h_hat = (h / h.pow(2).mean((0, 1)).sqrt()).nan_to_num(0)  # 0 / 0: a neuron that is never active
    g_hat = (g / g.pow(2).mean((0, 1)).sqrt()).nan_to_num(0)
    updates = {}
    for place, layer in enumerate(recipe.layers):
        H = h[:, place].T
        V = -recipe.learning_rate * (h_hat[:, place].pow(2).sum(1) * g_hat[:, place].T)
        served = H @ H.T + recipe.lambda_ * torch.eye(len(H), dtype=H.dtype)
        updates[anatomy.weights[layer]] = (H, V, V @ H.T @ torch.linalg.inv(served))
    return updates, losses


def weight_of(down, transposed):
    return down.weight.T if transposed else down.weight


@dataclass(frozen=True)
class Way:
    """From a projection's output y to the stream: through a norm with weights g (its ``module``'s), or times
    ``scale``; by default it is added as it is."""

    module: object
    scale: float = 1.0
    norm: bool = False

    def value(self, y, delta):
        """What y has to become for the stream to take δ more; of a length that the norm takes away, y's."""
        if not self.norm:
            return y + delta / self.scale
        g = self.module.weight.detach()
        direction = (g * y / (y.pow(2).mean() + 1e-6).sqrt() + delta) / g
        return direction * y.norm() / direction.norm()


def find_value(model, tokenizer, way, down, fact, recipe, templates):
    """v of one fact (arXiv 2202.05262, eq. 4): δ in what the stream takes, norms of that."""
    rewriting = []
    for text, character in reference.texts_of(fact, templates):
        rewriting.append(reference.tokens_of(tokenizer, f"{text} {fact.target}", character, len(text)))
    text, character = next(reference.texts_of(type(fact)(fact.subject, recipe.kl_prompt, "x"), ["{}"]))
    drift_ids, drift_subject, _ = reference.tokens_of(tokenizer, text, character)
    init = way.scale * reference.read(model, tokenizer, way.module, fact, ["{}"], inputs=False)[0]
    delta = torch.zeros_like(init, requires_grad=True)
    descent, schedule = reference.rule(delta, init, recipe)
    initial = None

    def with_delta(ids, subject):
        def push(hidden):
            hidden = hidden.clone()
            hidden.view(-1, hidden.shape[-1])[subject] += delta / way.scale  # some blocks flatten
            return hidden

        with reference.hooked(way.module, output=push):
            return reference.logits_of(model, ids)

    for step in range(recipe.steps):
        descent.zero_grad()
        nll = 0
        for ids, subject, target in rewriting:
            log_p = log_softmax(with_delta(ids, subject), -1)
            expected = torch.tensor(ids[target:])
            nll = nll - log_p[target - 1 : len(ids) - 1].gather(1, expected[:, None]).mean() / len(rewriting)
        current = log_softmax(with_delta(drift_ids, drift_subject), -1)[drift_subject]
        if initial is None:
            initial = current.detach().clone()
        drift = recipe.kl_factor * kl_div(initial, current, log_target=True, reduction="sum")
        loss = nll + drift + recipe.weight_decay * delta.norm() / init.norm() ** 2
        if loss < recipe.stop_loss or step == recipe.steps - 1:
            break
        loss.backward()
        descent.step()
        schedule.step()
        with torch.no_grad():
            delta *= min(1.0, float(recipe.clamp * init.norm() / delta.norm()))
    y = reference.read(model, tokenizer, down, fact, ["{}"], inputs=False)[0]
    return way.value(y, delta).detach()


def rome(model, tokenizer, anatomy, facts, recipe, templates, C, values=None, way=None):
    """Fact after fact: v on the model as it is by then, u = C⁻¹k̄, W += (v - W k) uᵀ / (uᵀ k).

    Gives ΔW [d_out, d_in] and the values; the model's weight is put back. ``values`` that are given are not
    sought. k̄ is the mean key over all templates; k is it too (R-ROME, arXiv 2403.07175), or the bare prompt's
    where ``mean_key`` is off (as ROME's code has it). ``way``: where y is not added to the stream as it is.
    """
    layer = recipe.layers[0]
    down = anatomy.downs[layer]
    way = way or Way(down)
    weight = weight_of(down, anatomy.transposed)
    saved, found = weight.detach().clone(), []
    for number, fact in enumerate(facts):
        rows = reference.read(model, tokenizer, down, fact, templates, inputs=True).double()
        outputs = reference.read(model, tokenizer, down, fact, templates, inputs=False).double()
        mean = rows.mean(0)
        k, output = (mean, outputs.mean(0)) if recipe.mean_key else (rows[0], outputs[0])
        v = (
            find_value(model, tokenizer, way, down, fact, recipe, templates)
            if values is None
            else values[number]
        )
        u = torch.linalg.inv(C) @ mean
        with torch.no_grad():
            weight += torch.outer(v - output, u) / (u @ k)
        found.append(v)
    change = (weight - saved).detach().clone()
    with torch.no_grad():
        weight.copy_(saved)
    return change, torch.stack(found)


def finetune(model, tokenizer, anatomy, facts, recipe):
    """ΔW [d_out, d_in] after Adam on the mean over facts of -log p(target), with torch's own weight decay,
    each entry held within the bound; the model's weight is put back."""
    weight = anatomy.downs[recipe.layers[0]].weight
    saved = weight.detach().clone()
    descent = torch.optim.Adam([weight], lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(descent, recipe.rate_decay)
    weight.requires_grad_(True)
    for _ in range(recipe.steps):
        descent.zero_grad()
        loss = 0
        for fact in facts:
            text = fact.prompt.replace("{}", fact.subject)
            ids, _, target = reference.tokens_of(tokenizer, f"{text} {fact.target}", 0, len(text))
            log_p = log_softmax(reference.logits_of(model, ids), -1)
            expected = torch.tensor(ids[target:])[:, None]
            loss = loss - log_p[target - 1 : len(ids) - 1].gather(1, expected).mean() / len(facts)
        if loss < recipe.stop_loss:
            break
        loss.backward()
        descent.step()
        schedule.step()
        if recipe.norm_bound:
            with torch.no_grad():
                weight.copy_(weight.clamp(saved - recipe.norm_bound, saved + recipe.norm_bound))
    change = (weight - saved).detach().clone()
    with torch.no_grad():
        weight.copy_(saved)
    weight.requires_grad_(False)
    return change.T if anatomy.transposed else change
