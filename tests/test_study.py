"""The study of quality, on a tiny model: cells that run, resume and are skipped, and the report from their files."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest

import cells
import judge
import report
import study as runner
from cells import Cell, cells_of
from results import Margin, read_results
from runs import random_tokens, write_checkpoint
from secateur.config import Config
from secateur.files import read_json, write_json
from study import Study, main, run_cells

WORDS = [f"w{i}" for i in range(61)]


def text(rows, length, seed):
    return [" ".join(WORDS[int(i) - 3] for i in row) for row in random_tokens(rows, length, seed=seed)]


def write_data(folder):
    """Files of the same names and formats as the study's, small."""
    for seed, file in enumerate((*(f"text/{name}" for name in judge.CALIBRATION), *judge.TEXTS.values())):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        documents = text(100, 60, seed)
        rows = (json.dumps({"text": document}) for document in documents)
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            stream.write("\n".join(rows if ".jsonl" in file else documents))
    for task in judge.TASKS:
        path = folder / "tasks" / f"{task}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        items = ({"query": query, "choices": [" w1", " w2 w3"], "gold": 1, "id": query} for query in text(12, 5, 9))
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            stream.write("\n".join(map(json.dumps, items)))
    return folder


@pytest.fixture(scope="module")
def small():
    """Sizes that a tiny model goes through in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "HELD_OUT_TOKENS", 512)
        patch.setattr(judge, "WINDOWS", 3)
        patch.setattr(judge, "LENGTH", 32)
        patch.setattr(judge, "TASK_ITEMS", 8)
        yield


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """A study of two cells that have been run."""
    folder = tmp_path_factory.mktemp("study")
    write_checkpoint(folder / "tiny", max_position_embeddings=256)
    study = Study(str(folder / "tiny"), write_data(folder / "data"), folder / "results", folder / "work")
    assert run_cells(study, [LEARNED, ONE_SHOT]) == []
    return study


LEARNED = Cell("tiny", "deterministic", 0.3, steps=4, curve=True)
ONE_SHOT = Cell("tiny", "magnitude", 0.3, steps=4)


def result(study, cell):
    return read_json(study.result_file(cell), "")


def forgotten(study, folder, *lost):
    """A copy of the study without the results of the cells `lost`."""
    copied = (shutil.copytree(path, folder / path.name) for path in (study.results, study.work))
    study = replace(study, **dict(zip(("results", "work"), copied, strict=True)))
    for cell in lost:
        study.result_file(cell).unlink()
    return study


def test_a_result_says_how_good_the_model_is_and_where_that_was_found_out(done):
    found = result(done, LEARNED)
    assert found["cell"]["id"] == LEARNED.id == "tiny/deterministic-s0.3-t2048-seed0"
    assert found["perplexity"].keys() == judge.TEXTS.keys()
    for name, figure in found["perplexity"].items():
        assert figure["times_dense"] == figure["perplexity"] / done.dense["perplexity"][name]["perplexity"] != 1
    assert found["held_out"]["pruned"] != found["held_out"]["dense"] == result(done, ONE_SHOT)["held_out"]["dense"]
    assert 0.69 < found["rounding"]["kept"] < 0.71 and found["sizes"]["parameters"] > 0
    assert {"learn", "export", "judge"} <= found["seconds"].keys()
    assert {"cpu", "cores", "ram_gb", "precision"} <= found["machine"].keys()
    assert {"torch", "commit"} <= found["versions"].keys()
    assert str(done.data.parent) not in done.result_file(LEARNED).read_text()


def test_tasks_are_compared_with_the_dense_model_item_by_item(done):
    for name, answers in result(done, LEARNED)["tasks"].items():
        before = done.dense["tasks"][name]
        assert answers["items"] == len(answers["right"]) == 8 and answers["asked"] == before["asked"]
        assert answers["difference"] == pytest.approx(answers["accuracy"] - before["accuracy"])
        unchanged = answers["right"] == before["right"]
        assert (answers["difference_se"] == 0) == unchanged
        assert answers["accuracy"] == answers["right"].count("1") / 8


def test_learned_values_are_compared_with_ones_and_followed_along_the_run(done):
    found = result(done, LEARNED)
    assert found["ones"]["held_out"] != found["held_out"]["pruned"]
    assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4]
    last = found["curve"][-1]
    assert last["held_out_deployed"] == pytest.approx(found["held_out"]["pruned"], abs=0.02)  # bfloat16
    assert result(done, ONE_SHOT)["ones"] is None and result(done, ONE_SHOT)["curve"] is None


def test_a_cell_with_a_result_does_not_run_again(done, monkeypatch):
    monkeypatch.setattr(runner, "run_cell", lambda *_: pytest.fail("ran again"))
    assert run_cells(done, [LEARNED, ONE_SHOT]) == []


def test_an_interrupted_cell_goes_on_where_it_stopped(done, monkeypatch, tmp_path):
    study = forgotten(done, tmp_path, LEARNED)
    for stage in ("plan.json", "verify.json", "eval.json"):
        (study.work / LEARNED.id / stage).unlink()
    monkeypatch.setattr("secateur.stages.learn_stage", lambda *_: pytest.fail("learned again"))
    assert run_cells(study, [LEARNED]) == []
    for figure in ("perplexity", "held_out", "curve"):
        assert result(study, LEARNED)[figure] == result(done, LEARNED)[figure]
    assert not (study.work / LEARNED.id / "model").exists()


def test_a_run_begun_with_other_settings_starts_over(done, tmp_path):
    study = forgotten(done, tmp_path, ONE_SHOT)
    config = study.work / ONE_SHOT.id / "config.yaml"
    config.write_text(config.read_text().replace("sparsity: 0.3", "sparsity: 0.4"))
    assert not study.run_of(ONE_SHOT).gates.exists() and study.run_of(LEARNED).gates.exists()


def test_a_cell_that_fails_does_not_stop_the_others(done, tmp_path, capsys):
    study = forgotten(done, tmp_path, ONE_SHOT)
    broken = replace(ONE_SHOT, steps=5000)
    assert run_cells(study, [broken, ONE_SHOT]) == [broken]
    assert study.missing([broken, ONE_SHOT]) == [broken]
    assert f"failed: {broken.id}: " in (said := capsys.readouterr().out) and "too short" in said


def test_no_cell_begins_that_would_end_after_the_time_limit(done, monkeypatch, tmp_path, capsys):
    study, long = forgotten(done, tmp_path), replace(ONE_SHOT, steps=400)
    for cell, seconds in ((ONE_SHOT, {"learn": 2.0, "judge": 5.0}), (LEARNED, {"learn": 8.0, "judge": 5.0})):
        write_json(study.result_file(cell), result(done, cell) | {"seconds": seconds})
    assert runner.expected_seconds(study, long) == 205 and runner.expected_seconds(study, LEARNED) == 13
    monkeypatch.setattr(runner, "run_cell", lambda *_: pytest.fail("began"))
    assert run_cells(study, [LEARNED, long], time_limit=200.0) == []
    assert f"stopping before {long.id}" in capsys.readouterr().out


def test_weights_are_changed_after_gates_that_are_learned_once(done, tmp_path):
    variant = replace(LEARNED, variant="lora")
    assert variant.learns_as == LEARNED and replace(LEARNED, variant="no-kd").learns_as != LEARNED
    run = runner.new_run(Config(done.model, 0.3, out=tmp_path / "variant"))
    runner._borrow_gates(done, variant, run)
    assert run.gates.read_bytes() == (done.work / LEARNED.id / "gates.safetensors").read_bytes()


def test_cells_that_measure_once_are_those_that_would_measure_again():
    planned = cells_of("smollm2")
    once = [cell for cell in planned if cell.measured_once]
    assert {cell.sparsity for cell in once} == {0.35, 0.5}
    for cell in once:
        assert Config("m", **cell.settings).resolved().remeasured_rows(cell.sparsity) == 0
        plain = "+".join(name for name in cell.parts if name != "once")
        assert Config("m", **replace(cell, variant=plain).settings).resolved().remeasured_rows(cell.sparsity) > 0
    lora = next(cell for cell in once if cell.variant == "once+lora")
    assert lora.learns_as == replace(lora, variant="once") and lora.recovery_tokens == lora.tokens
    assert not any(
        Config("m", **cell.settings).resolved().remeasured_rows(cell.sparsity) for cell in cells_of("smollm2-moe")
    )


def test_recovery_goes_once_or_twice_over_the_tokens_from_the_same_gates():
    twice = Cell("smollm2", "sensitivity", 0.5, 200, variant="lora+twice")
    once = replace(twice, variant="lora")
    assert {once, twice} <= set(cells_of("smollm2")) and once.learns_as == twice.learns_as == replace(once, variant="")
    assert (once.settings["recover_steps"], twice.settings["recover_steps"]) == (200, 400)
    assert twice.recovery_tokens == 2 * once.recovery_tokens == 2 * once.tokens
    assert "recover_steps" not in twice.learns_as.settings


@pytest.mark.parametrize("model", ["smollm2", "smollm2-moe", "smollm2-moe-2", "another"])
def test_cells_are_valid_settings_under_names_of_their_own(model):
    planned = cells_of(model)
    assert len({cell.id for cell in planned}) == len(planned)
    for cell in planned:
        assert Config("m", **cell.settings).resolved().learning is not None
        assert cell.learns_as == cell or replace(cell.learns_as, curve=True) in {
            replace(c, curve=True) for c in planned
        }


def test_the_list_of_cells_needs_no_model(capsys, tmp_path):
    assert main(["smollm2", "--data", str(tmp_path), "--results", str(tmp_path), "--list", "--only", "*-seed2"]) == 0
    assert "smollm2/deterministic-s0.2-t25600-seed2" in capsys.readouterr().out.replace("\n", "")


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def studied(done, tmp_path):
    """Results of three seeds of the default and of two other methods, made up from real ones."""
    folder = tmp_path / "results"
    write_json(folder / "smollm2/dense.json", read_json(done.results / "tiny/dense.json", ""))
    for cell, times in (
        (Cell("smollm2", "deterministic", 0.2), 1.50), (Cell("smollm2", "deterministic", 0.2, seed=1), 1.52),
        (Cell("smollm2", "deterministic", 0.2, seed=2), 1.54), (Cell("smollm2", "sensitivity", 0.2), 1.53),
        (Cell("smollm2", "magnitude", 0.2), 3.00),
        *((Cell("smollm2", "grasprune", 0.2, seed=seed), 1.55 + 0.02 * seed) for seed in range(3)),
        *((Cell("smollm2", "hard-concrete", 0.2, seed=seed), 1.55 - 0.1 * seed) for seed in range(3)),
    ):  # fmt: skip
        values = result(done, ONE_SHOT if cell.method in ("sensitivity", "magnitude") else LEARNED)
        for text_name in judge.TEXTS:
            values["perplexity"][text_name]["times_dense"] = times
        values["held_out"] = {"dense": 2.0 + cell.seed, "pruned": 2.25 + 2 * cell.seed}
        write_json(folder / f"{cell.id}.json", values)
    return folder


def written_report(folder, tmp_path, **options):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    report.write_report(folder, readme, **options)
    return readme.read_text()


def test_the_report_has_a_row_a_method_and_a_dash_for_what_was_not_run(studied, tmp_path):
    said = written_report(studied, tmp_path, with_plots=False)
    assert said.startswith("before") and said.rstrip().endswith("after") and "old" not in said
    rows = said.splitlines()
    assert any(row.startswith("| deterministic | 25 k | 1.52 ± 0.02 | 1.52 ± 0.02 | 0.250 |") for row in rows)
    assert "| deterministic | 0.250 | – | – |" in rows, "each seed holds other documents out"
    assert any(row.startswith("| magnitude | 25 k | 3.00 |") for row in rows)
    assert any(row.startswith("| flap | 25 k | – | – |") for row in rows)
    assert "**Not run yet**" in said and "flap, wanda-sp" in said and "sensitivity (seed 2)" in said


def test_a_margin_counts_only_beyond_the_spread_over_seeds(studied, tmp_path):
    rows = written_report(studied, tmp_path, with_plots=False).splitlines()
    assert "| magnitude | **+100.0 %** | **+100.0 %** |" in rows
    assert "| sensitivity | +2.0 % | +2.0 % |" in rows
    assert "| grasprune | **+3.3 ± 0.0 %** | **+3.3 ± 0.0 %** |" in rows, "every seed says the same"
    assert "| hard-concrete | −4.8 ± 8.2 % | −4.8 ± 8.2 % |" in rows, "seeds do not agree"
    assert Margin((-0.10, -0.11)).counts(0.5) and not Margin((-0.10, -0.14)).counts(0.01), "two of them"


def test_rows_measured_once_are_held_against_the_default_measured_once(studied, tmp_path):
    for method, variant, times in (
        ("deterministic", "", 4.0), ("grasprune", "", 4.4), ("deterministic", "once", 5.0), ("grasprune", "once", 6.0)
    ):  # fmt: skip
        cell = Cell("smollm2", method, 0.5, variant=variant)
        values = read_json(studied / f"{Cell('smollm2', 'magnitude', 0.2).id}.json", "")
        for text_name in judge.TEXTS:
            values["perplexity"][text_name]["times_dense"] = times
        write_json(studied / f"{cell.id}.json", values)
    rows = written_report(studied, tmp_path, with_plots=False).splitlines()
    assert "| deterministic+once | +25.0 % | +25.0 % |" in rows and "| grasprune | +10.0 % | +10.0 % |" in rows
    assert [row for row in rows if row.startswith("| grasprune+once | +")] == ["| grasprune+once | +20.0 % | +20.0 % |"]


def test_all_rows_are_held_against_the_default_measured_once_where_it_is_the_only_one(studied, tmp_path):
    values = read_json(studied / f"{Cell('smollm2', 'magnitude', 0.2).id}.json", "")
    write_json(studied / "smollm2-moe" / "dense.json", read_json(studied / "smollm2" / "dense.json", ""))
    for method, variant, times in (("deterministic", "once", 2.0), ("reap", "", 3.0), ("sensitivity", "once", 2.5)):
        for text_name in judge.TEXTS:
            values["perplexity"][text_name]["times_dense"] = times
        write_json(studied / f"{Cell('smollm2-moe', method, 0.4, variant=variant).id}.json", values)
    rows = written_report(studied, tmp_path, with_plots=False).partition("### smollm2-moe")[2].splitlines()
    assert "| reap | +50.0 % | +50.0 % |" in rows and "| sensitivity+once | +25.0 % | +25.0 % |" in rows


def test_plots_are_drawn_of_what_there_is(studied, tmp_path):
    said = written_report(studied, tmp_path)
    for name in ("quality", "along-the-run"):
        plot = tmp_path / f"plots/smollm2-{name}.png"
        assert f"(plots/{plot.name})" in said and 5_000 < plot.stat().st_size < 200_000


def test_a_report_without_results_says_so(tmp_path):
    said = written_report(tmp_path / "none", tmp_path)
    assert "Nothing has been measured yet" in said and "Not run yet" in said


def test_results_of_all_seeds_make_one_entry(studied):
    entry = read_results(studied, "smollm2").entry("deterministic", 0.2, 25_600)
    assert sorted(entry.by_seed) == [0, 1, 2] == sorted(entry.planned)
