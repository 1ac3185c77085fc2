"""The oracle of mend, written literally from the paper (arXiv 2110.11309): one fact and one token at a time.

Whole models, dense gradients by autograd, dense updates, in whatever dtype the model is in (float64 to
compare with). Nothing of patchkit is used, except that facts and networks are read as plain data.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import reference_memit as reference
import torch
from torch.nn.functional import kl_div, log_softmax


def nll_of(model, tokenizer, prompt, target):
    """Mean over the target's tokens of -log p, teacher forced."""
    ids, _, start = reference.tokens_of(tokenizer, f"{prompt} {target}", 0, len(prompt))
    log_p = log_softmax(reference.logits_of(model, ids), -1)
    return -log_p[start - 1 : len(ids) - 1].gather(1, torch.tensor(ids[start:])[:, None]).mean()


def gradient_of(model, tokenizer, modules, fact):
    """By weight: u [T, d_in], δ [T, d_out] of every token, and the weight's gradient as autograd has it."""
    inputs, outputs = {}, {}
    with ExitStack() as stack:
        for name, module in modules.items():
            module.weight.requires_grad_(True)
            module.weight.grad = None

            def see_input(value, name=name):
                inputs[name] = value.detach()

            def see_output(value, name=name):
                value.retain_grad()
                outputs[name] = value
                return value

            stack.enter_context(reference.hooked(module, inputs=see_input))
            stack.enter_context(reference.hooked(module, output=see_output))
        nll_of(model, tokenizer, fact.prompt.replace("{}", fact.subject), fact.target).backward()
    found = {}
    for name, module in modules.items():
        u, delta = inputs[name].flatten(0, -2), outputs[name].grad.flatten(0, -2)
        found[name] = (u, delta, module.weight.grad.clone())
        module.weight.requires_grad_(False)
    return found


def transformed(network, name, u, delta):
    """g of one token's (u, δ), eq. 3, and its parts ũ [d_in], δ̃ [d_out]."""
    d_out, d_in = network.shapes[name]
    own = {
        key.rpartition(".")[2]: t.double() for key, t in network.tensors.items() if key.startswith(f"{name}.")
    }
    shared = {
        key.rpartition(".")[2]: t.double()
        for key, t in (network.tensors | network.norms).items()
        if key.startswith(f"{d_out}x{d_in}.")
    }
    z = (torch.cat([u, delta]) - shared["mean"]) / (shared["deviation"] + 1e-7)
    inner = own["scale1"] * (shared["U1"] @ (shared["V1"] @ z) + shared["b1"]) + own["shift1"]
    h = z + torch.where(inner > 0, inner, 0.0)
    g = h + own["scale2"] * (shared["U2"] @ (shared["V2"] @ h) + shared["b2"]) + own["shift2"]
    return g[:d_in], g[d_in:], own["log_rate"].exp()


def update(model, tokenizer, modules, network, facts):
    """ΔW [d_out, d_in] of each weight: - α Σ over facts and tokens of δ̃ ũᵀ, but where u or δ is zero."""
    changes = {name: torch.zeros(network.shapes[name], dtype=torch.float64) for name in modules}
    for fact in facts:
        for name, (inputs, deltas, _) in gradient_of(model, tokenizer, modules, fact).items():
            for u, delta in zip(inputs.double(), deltas.double(), strict=True):
                if u.any() and delta.any():
                    pseudo_u, pseudo_delta, rate = transformed(network, name, u, delta)
                    changes[name] -= rate * torch.outer(pseudo_delta, pseudo_u)
    return changes


@contextmanager
def edited(modules, changes, transposed):
    """The model with W + ΔW in place of W."""
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    with torch.no_grad():
        for name, module in modules.items():
            module.weight += changes[name].T if transposed else changes[name]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, module in modules.items():
                module.weight.copy_(before[name])


def loss(model, tokenizer, modules, network, facts, said, stays, transposed=False):
    """0.1 x mean of -log q(target | x') + mean of KL(p(· | x_loc) ‖ q(· | x_loc)), p edited to q."""
    changes = update(model, tokenizer, modules, network, facts)
    with torch.no_grad():
        ends = [
            log_softmax(reference.logits_of(model, tokenizer(text)["input_ids"])[-1], -1) for text in stays
        ]
        with edited(modules, changes, transposed):
            nll = sum(nll_of(model, tokenizer, prompt, target) for prompt, target in said) / len(said)
            now = [
                log_softmax(reference.logits_of(model, tokenizer(text)["input_ids"])[-1], -1)
                for text in stays
            ]
    kl = sum(kl_div(q, p, log_target=True, reduction="sum") for p, q in zip(ends, now, strict=True))
    return 0.1 * nll + kl / len(stays)
