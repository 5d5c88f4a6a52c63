"""The study of training settings, on few steps of tiny models, and the rules that answer it."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import torch
from pictures import assert_picture

import asymq
from asymq.experiments.common import quickstart, text
from asymq.experiments.common.files import BadInput
from asymq.experiments.common.processes import Processes
from asymq.experiments.common.recipes import Recipe
from asymq.experiments.study import cell, peers, recommend, results, table, tree
from asymq.experiments.study.about import About, Tree, read_about, write_about
from asymq.experiments.study.setting import Cell, Setting
from asymq.experiments.study.subject import Protocol, open_study
from asymq.training import recommendations

ROOT = Path(__file__).parents[2]
main = runpy.run_path(str(ROOT / "scripts" / "study.py"))["main"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `llama` and `text`."""
    folder = tmp_path_factory.mktemp("study")
    train = quickstart.write_text(folder / "text", characters=600)[0][:20_000]
    (folder / "text" / text.TRAIN).write_text(train)
    tokenizer = quickstart.train_tokenizer(train, vocabulary=300)
    tiny_models.DECODERS["llama"](vocab_size=len(tokenizer)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


def arguments(world, command, out, *more):
    """More of them replace these."""
    short = ("--context", 16, "--batch", 2, "--windows", 4, "--calibration-batches", 1)
    small = ("--steps", 2, 4, "--base-steps", 3, "--rates", "1e-3", "1e-2", "--seeds", 2)
    given = ("--model", world / "llama", "--data", world / "text", "--recipes", "w4a16:group=16")
    devices = ("--devices", "cpu", "--weight-rates", "1e-4")
    return [str(p) for p in (command, "--out", out, *given, *short, *small, *devices, *more)]


def refused(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1, message
    return message


def snapshot(out):
    """What trains does not tell times of."""
    found = results.read_results(out)
    return {c: (r["kl"], r["perplexity"], r["loss"]) for c, r in found.items()}


# ---- the commands ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(world, tmp_path_factory):
    """All questions of a recipe with ranges of tokens, and its first of the paper's setting."""
    out = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        # Fewer forms: they take most of the time.
        some = ("beta_gamma", "beta_gamma_exp", "min_max", "lsq sgd")
        patch.setattr(tree, "_SHIFTS", {name: (0,) for name in some})
        main(arguments(world, "run", out, "--recipes", "w4a8:group=16", "--seeds", 1))
        main(arguments(world, "run", out, "--recipes", "table2", "--stages", "rate"))
        yield out


def test_files_of_a_folder(filled):
    others = {p.name for p in filled.iterdir() if p.suffix != ".json"}
    assert others == {"plan.md", "table.md", "runs.csv", "rates.png"}
    assert_picture(filled / "rates.png")
    found = results.read_results(filled)
    assert len(list(filled.glob("*.json"))) == len(found) + 1  # study.json
    with (filled / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found)
    assert {line["loss"] for line in lines} == {"ce", "kl", "ce+kl"}
    assert {line["recipe"] for line in lines} == {"w4a8-group16", "table2"}


def test_a_result_says_all_about_its_cell(filled):
    found = results.read_results(filled)
    result = found[Cell("llama", Setting("table2", rate="1e-2", steps=3), 0)]
    assert len(result["loss"]) == 3 and result["seconds_per_step"] > 0
    assert result["settings"]["context"] == 16 and result["settings"]["model_sha256"]
    assert result["versions"]["torch"] == torch.__version__
    for key in ("kl", "perplexity"):
        assert set(result[key]) == {"calibrated", "learned"}
        assert result[key]["calibrated"] != result[key]["learned"]
    assert result["kl"]["calibrated"] > 0


def test_every_question_is_answered_in_turn(filled):
    about, found = read_about(filled), results.read_results(filled)
    walks = about.walks(found)
    assert list(walks["w4a8-group16"].outcomes) == list(tree.STAGES)
    assert list(walks["table2"].outcomes) == ["rate"]
    assert not any(walk.missing(found) for walk in walks.values())
    page = (filled / "table.md").read_text()
    assert page.startswith("# Settings of llama by recipe\n\n| recipe | rate | loss | form |")
    assert all(page.count(stage.question) for stage in tree.STAGES.values())
    assert "| **" in page and tree.RULES in page


def test_weights_learn_in_joint_cells_alone(world):
    study = opened(world)
    for weights, learn in (("0", False), ("1e-4", True)):
        setting = Setting("w8a8", weights=weights)
        model = cell.prepared(study.float_model(torch.device("cpu")), setting.config(), setting)
        assert any(p.requires_grad for p in asymq.weight_parameters(model)) == learn
        assert len(cell.groups_of(model, setting)) == 1 + learn


def test_the_plan_states_cells_before_they_run(world, tmp_path, capsys):
    out = tmp_path / "out"
    main(arguments(world, "plan", out))
    said = capsys.readouterr().out
    assert "## w4a16:group=16" in said and "Which loss?" in said
    assert "### rate: Which learning rate of the ranges? 0 of 2 cells" in said
    for rate in ("1e-3", "1e-2"):
        assert f"- form beta_gamma, optimizer adam, loss kl, rate {rate}, steps 3" in said
    assert "Its cells follow from the answers above." in said
    assert not out.exists()


def test_an_interrupted_study_continues(world, tmp_path, capsys, monkeypatch):
    stages = ("--stages", "rate", "calibration", "--seeds", 1)
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(arguments(world, "run", whole, *stages))

    calls, run_cell = [], cell.run_cell
    stated = []

    def interrupted(one, *rest):
        stated.append(str(one.setting).partition(": ")[2] in (out / "plan.md").read_text())
        calls.append(one)
        if len(calls) == 3:
            raise KeyboardInterrupt
        run_cell(one, *rest)

    monkeypatch.setattr("asymq.experiments.study.run.run_cell", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(world, "run", out, *stages))
    assert stopped.value.code == 130 and "continues" in capsys.readouterr().err
    assert len(results.read_results(out)) == 2 and not (out / "table.md").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*seed*.json")}
    main(arguments(world, "run", out, *stages))
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert all(stated) and len(set(calls)) == len(calls) - 1
    assert snapshot(out) == snapshot(whole)
    assert not (out / "locks").exists()
    main(arguments(world, "report", out))
    assert len(calls) == len(results.read_results(out)) + 1


def test_recommended_settings_are_written(filled, tmp_path, capsys):
    file = tmp_path / "recommendations.json"
    shutil.copy(recommendations.FILE, file)
    recommend.recommend(filled, file=file)
    said = capsys.readouterr().out
    before, after = (json.loads(p.read_text()) for p in (recommendations.FILE, file))
    outcomes = read_about(filled).walks(results.read_results(filled))["w4a8-group16"].outcomes
    found = after["w4a8"]
    assert found["loss"] == outcomes["loss"].chosen
    assert found["steps"] == int(outcomes["steps"].chosen)
    assert found["calibration"] == outcomes["calibration"].chosen
    assert set(found["evidence"]) == set(recommendations.FIELDS)
    assert all(f"llama, {filled.name}/table.md: KL " in v for v in found["evidence"].values())
    assert all("w4a8:group=16: form " in v for v in found["evidence"].values())
    assert str(filled) not in file.read_text() and "w4a8:group=16: loss " in said
    # A rate comes with what it was found with; what says nothing of it stays.
    found = after["table2"]
    assert (found["loss"], found["steps"], found["calibration"]) == ("kl", 3, "min_max")
    changed = {k for k, v in found["evidence"].items() if "llama" in v}
    assert changed == set(recommendations.FIELDS) - {"weights"}
    assert all("no answer; of table2: form " in found["evidence"][k] for k in ("loss", "steps"))
    assert found["rates"]["weights"] == before["table2"]["rates"]["weights"]
    assert after["npu"] == before["npu"]
    recommend.recommend(filled, ["table2"], file)
    assert "w4a8" not in capsys.readouterr().out


def folder_of(out, results_of, recipes, stages=("rate", "loss")):
    """A study of two rates, in which a setting's KL is results_of(setting)."""
    trees = {recipe: Tree(stages, tree.Grid(rates=("1e-3", "1e-2"), seeds=1)) for recipe in recipes}
    about = About("m", {}, trees)
    write_about(out, about)
    found = {}
    for _ in range(2 * len(stages)):
        for walk in about.walks(found).values():
            for one in walk.missing(found):
                found[one] = whole_result(results_of(one.setting))
                results.result_path(out, one).write_text(json.dumps(found[one]))


def test_an_answer_that_diverged_is_not_recommended(tmp_path, capsys):
    file = tmp_path / "recommendations.json"
    shutil.copy(recommendations.FILE, file)
    folder_of(tmp_path / "lost", lambda setting: None, ["w8a8"])
    with pytest.raises(BadInput, match=r"no answer.*w8a8: rate: every candidate diverged"):
        recommend.recommend(tmp_path / "lost", file=file)
    assert file.read_text() == recommendations.FILE.read_text()
    # A later question may find what does not diverge.
    only = {("ce", "3e-4"): 0.5}
    folder_of(
        tmp_path / "some", lambda s: only.get((s.loss, s.rate)), ["w8a8"], ("rate", "loss", "joint")
    )
    recommend.recommend(tmp_path / "some", file=file)
    assert "w8a8: rate: every candidate diverged, no answer" in capsys.readouterr().out
    found = json.loads(file.read_text())["w8a8"]
    assert (found["loss"], found["rates"]["ranges"], found["steps"]) == ("ce", 3e-4, 200)
    assert "ce 0.5" in found["evidence"]["ranges"] and "ce 0.5" in found["evidence"]["loss"]
    assert "no answer" in found["evidence"]["steps"]


def test_an_answer_beside_the_rate_says_with_what(tmp_path):
    file = tmp_path / "recommendations.json"
    shutil.copy(recommendations.FILE, file)
    kl = {"mse": 0.5}
    folder_of(tmp_path / "out", lambda s: kl.get(s.calibration, 1.0), ["w8a8"], ("calibration",))
    recommend.recommend(tmp_path / "out", file=file)
    before, after = (json.loads(p.read_text())["w8a8"] for p in (recommendations.FILE, file))
    assert after.pop("calibration") == "mse"
    assert "loss kl, rate 1e-3, steps 200" in after["evidence"].pop("calibration")
    del before["calibration"], before["evidence"]["calibration"]
    assert after == before


def test_two_variants_of_a_recipe_are_not_one_record(tmp_path, capsys):
    file = tmp_path / "recommendations.json"
    shutil.copy(recommendations.FILE, file)
    out = tmp_path / "out"
    folder_of(out, lambda s: float(s.rate), ["w4a16-group64", "w4a16-group128", "w8a8"])
    message = refused(["recommend", "--out", str(out)], capsys)
    assert "has w4a16:group=64 and w4a16:group=128, and w4a16 has one record" in message
    recommend.recommend(out, ["w4a16-group128"], file)
    assert "w4a16:group=128: form" in json.loads(file.read_text())["w4a16"]["evidence"]["ranges"]


BAD = {
    "recipe": (("--recipes", "w3"), "no recipe 'w3': choose from table2, w4a16"),
    "stage": (("--stages", "luck"), "luck"),
    "rate": (("--rates", "fast"), "must be a positive number, got 'fast'"),
    "steps": (("--base-steps", 0), "at least 1"),
    "device": (("--devices", "cuda:99"), "no such device"),
    "context": (("--context", 999), "--context must be 2 to 64"),
    "model": (("--model", "./nothing"), "no such folder"),
    "text": (("--data", "./nothing"), "wiki.train.raw"),
    "windows": (("--windows", 10_000), "--windows 10000: the training text has"),
    "groups": (("--recipes", "w4a16:group=24"), "groups of 24"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, capsys, name):
    given, expected = BAD[name]
    out = tmp_path / "out"
    assert expected in refused(arguments(world, "run", out, *given), capsys)
    assert not out.exists()


def test_folders_that_do_not_fit(world, filled, tmp_path, capsys):
    message = refused(arguments(world, "run", filled, "--batch", 3), capsys)
    assert "was made with batch 2, not 3" in message
    for command in ("report", "recommend"):
        assert "study.py run" in refused([command, "--out", str(tmp_path)], capsys)
    shutil.copytree(world / "llama", tmp_path / "other")
    other = arguments(world, "run", filled, "--model", tmp_path / "other")
    assert "has results of llama; choose another for other" in refused(other, capsys)
    (tmp_path / "file").touch()
    message = refused(arguments(world, "run", tmp_path / "file"), capsys)
    assert "is a file, not a folder" in message
    damaged = tmp_path / f"{Cell('llama', Setting('w8a8'), 0).name}.json"
    for written in ("{", *map(json.dumps, damages(whole_result(1.0)))):
        damaged.write_text(written)
        assert f"{damaged}: is not a result" in refused(arguments(world, "run", tmp_path), capsys)


# ---- cells -------------------------------------------------------------------------------------


def opened(world):
    protocol = Protocol(batch=2, context=16, windows=4, calibration_batches=1)
    return open_study(str(world / "llama"), str(world / "text"), None, None, protocol, ["w8a8"])


def test_nothing_learns_from_what_is_held_out(world):
    study = opened(world)
    learned = {tuple(row) for row in study.subject.train.tolist()}
    assert study.held_out.shape == (4, 16)
    assert not learned & {tuple(row) for row in study.held_out.tolist()}


def test_divergence_is_the_mean_over_tokens(world):
    study = opened(world)
    teacher = study.float_model(torch.device("cpu"))
    model = cell.prepared(teacher, asymq.QuantConfig.w4a16(group=16), Setting("w4a16-group16"))
    asymq.disable_quantizers(model)
    assert cell.divergence(model, teacher, study.held_out, 3) == pytest.approx(0, abs=1e-6)
    asymq.calibrate(model, [study.held_out])
    with torch.no_grad():
        p, q = (of(study.held_out).logits.double().softmax(-1) for of in (teacher, model))
    expected = (p * (p.log() - q.log())).sum(-1).mean().item()
    assert cell.divergence(model, teacher, study.held_out, 3) == pytest.approx(expected, rel=1e-3)


def test_names_of_cells():
    one = Cell("a__b", Setting("w4a8-group32", "min_max", "sgd", "ce+kl", "3e-4", 50), 7)
    assert Cell.named(one.name) == one
    with pytest.raises(ValueError):
        Cell.named("a__b__seed0")


def test_forms_of_a_recipe():
    w4a8 = Setting("w4a8-group32-cache8", "min_max").config()
    assert w4a8.weight.parameterization == w4a8.head.parameterization == "min_max"
    assert w4a8.input.parameterization == w4a8.cache.parameterization == "beta_gamma"
    assert Setting("w8a8", "beta_gamma_exp").config().input.link == "exp"
    lsq = Setting("table2", "lsq").config()
    for spec in (lsq.weight, lsq.activation, lsq.norm_weight):
        assert (spec.parameterization, spec.gradient_scale) == ("scale_offset", "lsq")
    assert Setting("table2").config() == asymq.QuantConfig.table2("beta_gamma")
    assert Setting(Recipe.parse("npu").slug).config() == asymq.QuantConfig.npu()


# ---- the rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, halves, expected",
    [("1e-3", 1, "3e-3"), ("3e-3", 1, "1e-2"), ("1e-3", -1, "3e-4"), ("2e-3", 0, "2e-3")],
)
def test_half_decades(rate, halves, expected):
    assert tree.shifted(rate, halves) == expected


def a_result(kl):
    value = {"calibrated": 1.0, "learned": kl}
    return {"kl": value, "perplexity": value}


def whole_result(kl):
    more = {"float_perplexity": 1.0, "seconds_per_step": 1.0, "collapsed": 0, "settings": {}}
    return a_result(kl) | more | {"versions": {"torch": "2"}, "machine": "one", "commit": None}


def damages(result):
    """The result without one of all that it has."""
    for key in result:
        yield {k: v for k, v in result.items() if k != key}
    for key in ("kl", "perplexity"):
        yield result | {key: {"calibrated": 1.0}}


def walked(divergence, stages, grid=None):
    """The walk in which a setting's KL is divergence(setting, seed), and how many cells it took."""
    grid, found = grid or tree.Grid(seeds=3), {}
    while True:
        walk = tree.walk("m", "w8a8", stages, grid, found)
        missing = walk.missing(found)
        if not missing:
            return walk, found
        found |= {one: a_result(divergence(one.setting, one.seed)) for one in missing}


def test_a_clear_winner_takes_one_seed_and_goes_on():
    kl = {"1e-4": 5.0, "3e-4": 4.0, "1e-3": 3.0, "3e-3": 1.0, "1e-2": 2.0, "3e-2": None}
    walk, found = walked(lambda setting, seed: kl[setting.rate], ["rate"])
    outcome = walk.outcomes["rate"]
    assert outcome.decided and outcome.chosen == "3e-3" and len(found) == 6
    assert walk.last.rate == "3e-3" and walk.last.steps == 200


def test_close_candidates_get_seeds_and_the_default_where_they_tie():
    noise = (0.0, 0.01, -0.01)

    def kl(setting, seed):
        near = {"1e-3": 1.01 + noise[seed], "3e-3": 1.0 - noise[seed]}
        return near.get(setting.rate, 2.0)

    walk, found = walked(kl, ["rate"])
    outcome = walk.outcomes["rate"]
    assert len(found) == 6 + 2 * 2
    assert outcome.tied == ("1e-3", "3e-3") and not outcome.decided
    assert outcome.best == "3e-3" and outcome.chosen == "1e-3"
    assert "not decided between 1e-3, 3e-3 (1e-3)" in table._chosen(outcome)


def test_no_divergence_is_the_least():
    walk, _ = walked(lambda s, seed: {"1e-3": 1.0, "3e-3": 0.0}.get(s.rate, 2.0), ["rate"])
    assert walk.outcomes["rate"].decided and walk.outcomes["rate"].chosen == "3e-3"
    assert walk.outcomes["rate"].winner.kl == 0


def test_seeds_decide_a_small_difference():
    def kl(setting, seed):
        return {"1e-3": 1.02, "3e-3": 1.0}.get(setting.rate, 2.0) + seed

    outcome = walked(kl, ["rate"])[0].outcomes["rate"]
    assert outcome.decided and outcome.chosen == "3e-3"
    mean, half = outcome.interval("1e-3")
    assert mean == pytest.approx(0.02) and half == pytest.approx(0, abs=1e-9)


def test_of_steps_the_fewest_that_tie():
    grid = tree.Grid(seeds=1)
    walk, _ = walked(lambda s, seed: {50: 1.03, 200: 1.0, 1000: 0.99}[s.steps], ["steps"], grid)
    assert walk.outcomes["steps"].chosen == "50" and walk.last.steps == 200


def test_recipes_keep_beta_gamma_though_another_form_is_better():
    kl = {"min_max": 1.0, "beta_gamma_exp": 2.0}
    walk, _ = walked(lambda s, seed: kl.get(s.form, 3.0), ["form", "calibration"])
    assert walk.outcomes["form"].chosen == "min_max"
    assert walk.last.form == "beta_gamma_exp"
    assert {e.setting.form for e in walk.outcomes["calibration"].entries.values()} == {
        "beta_gamma_exp"
    }


def test_a_candidate_stands_with_its_best_rate():
    def kl(setting, seed):
        return 1.0 if (setting.loss, setting.rate) == ("kl", "3e-4") else 2.0

    walk, _ = walked(kl, ["loss"])
    assert walk.outcomes["loss"].entries["kl"].setting.rate == "3e-4"
    assert (walk.last.loss, walk.last.rate) == ("kl", "3e-4")


def test_where_all_diverge_the_default_goes_on():
    walk, found = walked(lambda setting, seed: None, ["rate", "loss"])
    assert walk.outcomes["rate"].tied == () and walk.last.rate == "1e-3"
    assert len(found) == 6 + 9 - 3  # three are of the first question
    assert table._chosen(walk.outcomes["rate"]) == "all diverged (1e-3)"


# ---- peers -------------------------------------------------------------------------------------

ONE_RATE = ("--rates", "1e-3", "--base-steps", 2)


def test_peers_that_are_not_installed_are_rows(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers.Peer, "version", None)
    monkeypatch.delenv(peers.AIMET, raising=False)
    main(arguments(world, "peers", tmp_path, *ONE_RATE))
    page = (tmp_path / "peers.md").read_text()
    assert "| torchao |  |  | not installed (pip install torchao) |" in page
    assert f"or {peers.AIMET} names no Python that has it" in page
    assert page.count("| asymq ") == 3 and "| nncf | " in page
    assert f"torch {torch.__version__}" in page
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "peers").iterdir()}
    main(arguments(world, "peers", tmp_path, *ONE_RATE))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "peers").iterdir()}
    capsys.readouterr()
    other = arguments(world, "peers", tmp_path, *ONE_RATE, "--batch", 3)
    assert "was made with batch 2, not 3" in refused(other, capsys)
    other = arguments(world, "peers", tmp_path, "--recipes", "w8a8")
    assert "--recipes: peers are compared with w4a16, w4a8" in refused(other, capsys)


@pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
@pytest.mark.parametrize("recipe", ["w4a16-group16", "w4a8-group16"])
def test_torchao(world, tmp_path, recipe):
    study = opened(world)
    for learns in peers.PEERS["torchao"].learns:
        row = peers.Row("torchao", recipe, learns, "ce", "1e-3", "1e-4", 2)
        peers.run_row(row, study, tmp_path, torch.device("cpu"))
        result = json.loads((tmp_path / "peers" / f"{row.name}.json").read_text())
        assert result["kl"]["calibrated"] > 0
        assert result["kl"]["learned"] != result["kl"]["calibrated"]
        assert result["versions"]["torchao"]


def test_a_python_without_the_library_is_a_row(world, tmp_path, monkeypatch):
    if find_spec("aimet_torch"):
        pytest.skip("it has the library")
    monkeypatch.setenv(peers.AIMET, sys.executable)
    monkeypatch.setattr(peers, "PEERS", {"aimet": peers.PEERS["aimet"]})
    main(arguments(world, "peers", tmp_path, *ONE_RATE))
    assert f"| aimet |  |  | {sys.executable} failed" in (tmp_path / "peers.md").read_text()


def test_a_peer_that_fails_is_a_row(world, tmp_path, monkeypatch):
    """Of what it fails at, and not tried with every rate."""
    tried = []

    def prepare(model, names, row, see):
        tried.append(row)
        if row.learns == "both":
            raise AttributeError("no such\nquantizer")
        return []

    peer = peers.Peer("tqdm", ("weights", "both"), prepare)
    monkeypatch.setattr(peers, "PEERS", {"other": peer})
    more = ("--rates", "1e-3", "1e-2", "--base-steps", 2)
    main(arguments(world, "peers", tmp_path, *more))
    page = (tmp_path / "peers.md").read_text()
    assert [row.learns for row in tried] == ["weights", "both"]
    assert f"| other | w4a16:group=16 | both | tqdm {peer.version} failed: no such |" in page
    assert f"| other {peer.version} | w4a16:group=16 | weights | ce |  | 1e-4 | 2 | " in page


def test_peers_rows_have_their_own_steps(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "PEERS", {})
    for steps in (1, 2):
        more = ("--rates", "1e-3", "--base-steps", steps)
        main(arguments(world, "peers", tmp_path, *more))
    page = (tmp_path / "peers.md").read_text()
    assert page.count(" | 1e-3 |  | 1 | ") == page.count(" | 1e-3 |  | 2 | ") == 2
    assert "2 windows of 16 tokens a step" in page
    capsys.readouterr()
    first = min((tmp_path / "peers").iterdir())
    result = json.loads(first.read_text())
    damaged = [*damages(result), result | {"versions": {}}, result | {"row": {}}]
    for one in damaged:
        if one.keys() != result.keys() - {"loss"}:  # no report reads it
            first.write_text(json.dumps(one))
            message = refused(arguments(world, "peers", tmp_path, *more), capsys)
            assert f"{first}: is not a result" in message


# ---- what a run needs --------------------------------------------------------------------------


@pytest.mark.parametrize("script", [("study.py", "run"), ("transition_rate.py", "--task=digits")])
def test_without_matplotlib_nothing_is_trained(script, tmp_path):
    name, command = script
    code = (
        "import runpy, sys\n"
        "sys.modules['matplotlib'] = None\n"
        f"runpy.run_path({str(ROOT / 'scripts' / name)!r})['main']"
        f"(['{command}', '--out', {str(tmp_path / 'out')!r}])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: needs matplotlib" in result.stderr and result.stderr.count("\n") == 1


def test_a_table_outlives_its_plot(filled, tmp_path, monkeypatch):
    out = shutil.copytree(filled, tmp_path / "out")
    (out / "table.md").unlink()

    def fails(*_):
        raise OSError

    monkeypatch.setattr(table, "plot", fails)
    with pytest.raises(OSError):
        table.report(out)
    assert (out / "table.md").exists()


def test_a_run_that_diverges_at_once_has_no_time(world, filled, tmp_path):
    study, setting = opened(world), Setting("w8a8", steps=9)
    parameter = torch.nn.Parameter(torch.ones(()))
    infinite = lambda ids: parameter * float("inf")  # noqa: E731
    losses, seconds = cell.train(
        [{"params": [parameter], "lr": 0.1}], infinite, setting, study, 0, torch.device("cpu")
    )
    assert losses == [float("inf")] and seconds is None
    out = shutil.copytree(filled, tmp_path / "out")
    path = min(out.glob("*__seed0.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds_per_step": None}))
    table.report(out)
    assert "|  |\n" in (out / "table.md").read_text()
    with (out / "runs.csv").open() as file:
        assert "" in {line["seconds_per_step"] for line in csv.DictReader(file)}


def test_the_float_perplexity_is_found_once(world, tmp_path, monkeypatch):
    study, calls = opened(world), []
    perplexity = text.perplexity
    count = lambda *args: calls.append(args[0]) or perplexity(*args)  # noqa: E731
    monkeypatch.setattr(text, "perplexity", count)
    for rate in ("1e-3", "1e-2"):
        one = Cell("llama", Setting("w8a8", rate=rate, steps=1), 0)
        cell.run_cell(one, study, tmp_path, Processes("cpu"))
    teacher = study.float_model(torch.device("cpu"))
    assert sum(model is teacher for model in calls) == 1
