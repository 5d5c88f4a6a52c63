"""Writes what a study found into the file that asymq.recommended reads."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from asymq.experiments.common.files import BadInput, write
from asymq.experiments.common.words import count
from asymq.experiments.study.about import read_about
from asymq.experiments.study.results import read_results
from asymq.experiments.study.setting import FROZEN
from asymq.experiments.study.table import title
from asymq.experiments.study.tree import Outcome, Walk, answer
from asymq.quantizers.spec import split_parameterization
from asymq.training import recommendations

# The questions that try several rates, and the question of each field.
_OF_RATES = ("rate", "loss", "form", "steps")
_QUESTIONS = {
    "loss": "loss",
    "link": "form",
    "ranges": "rate",
    "steps": "steps",
    "calibration": "calibration",
}


def recommend(
    out: Path, recipes: Collection[str] | None = None, file: Path = recommendations.FILE
) -> None:
    """Of every recipe (or those of `recipes`) the setting that the answers led to, whole where they
    have its rate. BadInput: there is no answer; two variants of a recipe, whose record is one."""
    about, found = read_about(out), read_results(out)
    walks = about.walks(found) if about else {}
    source = f"{about.model}, {out.resolve().name}/table.md" if about else ""
    entries = json.loads(file.read_text(encoding="utf-8"))
    told: list[str] = []
    written: dict[str, str] = {}
    for recipe, at in walks.items():
        if recipes is not None and recipe not in recipes:
            continue
        for name, outcome in at.outcomes.items():
            if not outcome.tied:
                told.append(f"{title(recipe)}: {name}: every candidate diverged, no answer")
        fields = _fields(at, source)
        name = recipe.partition("-")[0]
        if fields and name in written:
            raise BadInput(
                f"--out {out}: has {title(written[name])} and {title(recipe)}, and {name} has one "
                "record: say which with --recipes"
            )
        for field, value, evidence in fields:
            written[name], own = recipe, entries[name]
            (own["rates"] if field in own["rates"] else own)[field] = value
            own["evidence"][field] = evidence
            told.append(f"{title(recipe)}: {field} {value} ({evidence})")
    if not written:
        raise BadInput(
            "; ".join([f"--out {out}: has no answer of a study; `study.py run` finds them", *told])
        )
    write(file, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    print("\n".join([*told, f"wrote {file}"]))


def _fields(at: Walk, source: str) -> list[tuple[str, object, str]]:
    """Name, value and evidence. A rate is good for the loss, link, steps and calibration that it
    was found with, so that these come with it, asked or not."""
    outcomes = {name: outcome for name, outcome in at.outcomes.items() if outcome.tied}
    if "form" in outcomes:
        # Recipes learn factors: of the forms, which are all in the evidence, their links count.
        form = outcomes.pop("form")
        able = {label: e for label, e in form.entries.items() if form.stage.goes_on(label)}
        links = answer(form.stage, able)
        if links.tied:
            outcomes["form"] = replace(links, entries=form.entries)
    setting, measured = at.last, [e for o in outcomes.values() for e in o.entries.values()]
    if "steps" in outcomes:
        setting = outcomes["steps"].winner.setting
    if not any(entry.setting == setting and entry.finite for entry in measured):
        return []
    values: dict[str, object] = {
        "loss": setting.loss,
        "link": split_parameterization(setting.form)[1],
        "ranges": float(setting.rate),
        "steps": setting.steps,
        "calibration": setting.calibration,
    }
    by: dict[str, Outcome | None] = {f: outcomes.get(q) for f, q in _QUESTIONS.items()}
    of_rates = [outcomes[name] for name in _OF_RATES if name in outcomes]
    if of_rates:
        # A later question may have found that its winner wants another rate.
        asked = of_rates[0].winner.setting.rate == setting.rate
        by["ranges"] = of_rates[0 if asked else -1]
    made = [
        (field, values[field], _evidence(source, outcome))
        for field, outcome in by.items()
        if outcome
    ]
    if of_rates:
        rest = [field for field, outcome in by.items() if not outcome]
        made += [(field, values[field], f"{source}: no answer; of {setting}") for field in rest]
    if "joint" in outcomes:
        weights = outcomes["joint"].chosen
        value = None if weights == FROZEN else float(weights)
        made.append(("weights", value, _evidence(source, outcomes["joint"])))
    return made


def _evidence(source: str, outcome: Outcome) -> str:
    """Such as "smollm2, study/table.md: KL kl 0.101, ce 0.204: decided; 3 seeds; w8a8: form ...",
    with the setting of the chosen one."""
    values = ", ".join(
        f"{label} {entry.kl:.4g}" if entry.finite else f"{label} diverged"
        for label, entry in outcome.entries.items()
    )
    seeds = max(len(entry.by_seed) for entry in outcome.entries.values())
    word = "decided" if outcome.decided else f"not decided between {', '.join(outcome.tied)}"
    return f"{source}: KL {values}: {word}; {count(seeds, 'seed')}; {outcome.winner.setting}"
