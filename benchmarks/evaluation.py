"""The evaluation against its literal form: one prompt at a time, the head at every position."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.report import Bar, Effort, Measured
from patchkit.evaluation.cases import Case
from patchkit.evaluation.generation import NEW_TOKENS
from patchkit.evaluation.metrics import Asked, Seen, look
from patchkit.evaluation.voice import Loaded

__all__ = ["measure"]

FACTS = 12


def measure(effort: Effort) -> Measured:
    """Both in turn on the same facts; medians of three turns."""
    lab = laboratory(effort)
    cases = [Case(fact) for fact in lab.facts("odd", 2 if effort is Effort.QUICK else FACTS)]
    questions = sum(map(_questions, cases))
    ours, literal, ratios = [], [], []
    for _ in range(1 if effort is Effort.QUICK else 3):
        seconds, seen = _timed(lambda: look(Loaded(lab.model, lab.tokenizer), cases))
        alone, (nll, said) = _timed(lambda: _one_by_one(lab, cases))
        ours.append(seconds)
        literal.append(alone)
        ratios.append(alone / seconds)
    difference = max(
        abs(one - asked.nll)
        for each, found in zip(seen, nll, strict=True)
        for one, asked in zip(found, _scores(each), strict=True)
    )
    texts = [
        asked.said == text
        for each, found in zip(seen, said, strict=True)
        for asked, text in _free(each, found)
    ]
    rows = [
        {"measured": "one by one, prompts a second", "value": questions / statistics.median(literal)},
        {"measured": "patchkit, prompts a second", "value": questions / statistics.median(ours)},
        {"measured": "times faster", "value": statistics.median(ratios)},
        {"measured": "largest difference of an object's nll", "value": difference},
        {"measured": "free generations that are the same, %", "value": 100 * sum(texts) / len(texts)},
    ]
    bars = [
        Bar("times faster, median of three", statistics.median(ratios), 5.0),
        Bar("largest difference of an object's nll", difference, 1e-3, most=True),
    ]
    note = f"{len(cases)} facts, {questions} prompts: both objects behind each, and free generation."
    return Measured(rows, bars, [note])


def _timed(work: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    done = work()
    return time.perf_counter() - begun, done


def _prompts(case: Case) -> tuple[str, ...]:
    return (case.fact.text, *case.fact.paraphrases, *case.fact.neighbors)


def _questions(case: Case) -> int:
    """Prompts with an object behind them, and prompts to go on from."""
    return 2 * len(_prompts(case)) + 1 + len(case.fact.paraphrases)


def _one_by_one(lab: Laboratory, cases: Sequence[Case]) -> tuple[list[list[float]], list[list[str]]]:
    """Of each case the mean nll of both objects behind each prompt, and what the model says."""
    nll, said = [], []
    for case in cases:
        objects = (case.fact.target, case.fact.was or case.fact.target)
        nll.append([_nll(lab, prompt, each) for prompt in _prompts(case) for each in objects])
        said.append([_say(lab, prompt) for prompt in (case.fact.text, *case.fact.paraphrases)])
    return nll, said


def _nll(lab: Laboratory, prompt: str, object_: str) -> float:
    before = len(lab.tokenizer(prompt)["input_ids"])
    tokens = lab.tokenizer(f"{prompt} {object_}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = lab.model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    chosen = log_p[before - 1 : -1].gather(-1, tokens[0, before:, None])
    return -float(chosen.mean())


def _say(lab: Laboratory, prompt: str) -> str:
    model: Any = lab.model
    found = lab.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**found, do_sample=False, max_new_tokens=NEW_TOKENS)
    return str(lab.tokenizer.decode(out[0, found["input_ids"].shape[1] :], skip_special_tokens=True))


def _scores(seen: Seen) -> list[Any]:
    asked: list[Asked] = [seen.rewrite, *seen.paraphrases, *seen.neighbors]
    return [score for each in asked for score in (each.target, each.was or each.target)]


def _free(seen: Seen, texts: Sequence[str]) -> list[tuple[Asked, str]]:
    return list(zip([seen.rewrite, *seen.paraphrases], texts, strict=True))
