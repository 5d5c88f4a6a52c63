"""Writes what a study found into the file that asymq.recommended reads."""

from __future__ import annotations

import json
from pathlib import Path

from asymq.experiments.common.files import BadInput, write
from asymq.experiments.common.words import count
from asymq.experiments.study.about import read_about
from asymq.experiments.study.results import read_results
from asymq.experiments.study.setting import FROZEN
from asymq.experiments.study.tree import Outcome, Walk, answer
from asymq.quantizers.spec import split_parameterization
from asymq.training import recommendations


def recommend(out: Path, file: Path = recommendations.FILE) -> None:
    """Of every recipe the fields whose questions were answered; the others stay. BadInput: none
    was."""
    about, found = read_about(out), read_results(out)
    walks = about.walks(found) if about else {}
    entries = json.loads(file.read_text(encoding="utf-8"))
    changed = []
    for recipe, at in walks.items():
        own = entries[recipe.partition("-")[0]]
        for name, value, evidence in _fields(at, f"{about.model}, {out}/table.md" if about else ""):
            own["evidence"][name] = evidence
            changed.append(f"{recipe}: {name} {value} ({evidence})")
            if name in own["rates"]:
                own["rates"][name] = value
            else:
                own[name] = value
    if not changed:
        raise BadInput(f"--out {out}: has no answer of a study; `study.py run` finds them")
    write(file, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    print("\n".join([*changed, f"wrote {file}"]))


def _fields(at: Walk, source: str) -> list[tuple[str, object, str]]:
    """Name, value and evidence of what was answered."""
    made: list[tuple[str, object, str]] = []
    outcomes = at.outcomes
    for name in ("loss", "calibration"):
        if name in outcomes:
            made.append((name, outcomes[name].chosen, _evidence(source, outcomes[name])))
    if "form" in outcomes:
        # Recipes learn factors: of the forms, which are all in the evidence, their links count.
        form = outcomes["form"]
        able = {label: e for label, e in form.entries.items() if form.stage.goes_on(label)}
        _, link = split_parameterization(answer(form.stage, able).chosen)
        made.append(("link", link, _evidence(source, form)))
    rate = next((outcomes[n] for n in ("steps", "form", "loss", "rate") if n in outcomes), None)
    if rate is not None:
        setting = rate.entries[rate.chosen].setting if rate.stage.name == "steps" else at.last
        asked = outcomes.get("rate", rate)
        # A later question may have found that its winner wants another rate.
        decided = asked if asked.entries[asked.chosen].setting.rate == setting.rate else rate
        evidence = f"{_evidence(source, decided)}, at {setting.rate}"
        made.append(("ranges", float(setting.rate), evidence))
    if "steps" in outcomes:
        made.append(("steps", int(outcomes["steps"].chosen), _evidence(source, outcomes["steps"])))
    if "joint" in outcomes:
        weights = outcomes["joint"].chosen
        value = None if weights == FROZEN else float(weights)
        made.append(("weights", value, _evidence(source, outcomes["joint"])))
    return made


def _evidence(source: str, outcome: Outcome) -> str:
    """Such as "smollm2, .../table.md: KL kl 0.101, ce 0.204; decided; 3 seeds"."""
    values = ", ".join(
        f"{label} {entry.kl:.4g}" if entry.finite else f"{label} diverged"
        for label, entry in outcome.entries.items()
    )
    seeds = max(len(entry.by_seed) for entry in outcome.entries.values())
    word = "decided" if outcome.decided else f"not decided between {', '.join(outcome.tied)}"
    return f"{source}: KL {values}: {word}; {count(seeds, 'seed')}"
