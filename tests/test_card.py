"""The table, the warning and the model card say what the figures say."""

from dataclasses import replace
from typing import Any

from secateur.card import arrival, model_card, public_name, summary, warnings
from secateur.config import Config
from secateur.plan import Rounding

FIGURES = {
    "perplexity": 20.0, "windows": 4, "length": 8, "tokens": 28, "parameters": 1000, "block_parameters": 800,
    "flops_per_token": 2000, "kv_bytes_per_token": 64, "disk_bytes": 4000,
}  # fmt: skip
ROUNDING = Rounding(0.8, 0.85, 0.8, 3, 0, 0.0, 3.0, 3.5)


def results(**changes: Any) -> dict[str, Any]:
    pruned = FIGURES | {"perplexity": 30.0, "parameters": 840, "block_parameters": 640}
    return {
        "text": "text.txt",
        "join": "raw",
        "dense": FIGURES,
        "pruned": pruned,
        "rounding": vars(ROUNDING),
        "fixing": None,
    } | changes


def test_the_table_gives_ratios_and_leaves_what_did_not_change_blank() -> None:
    rows = {row[0]: row[1:] for row in summary(results())}
    assert rows["perplexity"] == ("20.00", "30.00", "1.50 ×")
    assert rows["parameters in units"] == ("800", "640", "−20.0%")
    assert rows["KV cache a token"][2] == ""


def test_a_costly_last_step_is_reported_and_warned_of() -> None:
    assert "3.0000 to 3.5000" in arrival(results()) and "85.00% were open" in arrival(results())
    assert len(warnings(results())) == 1
    cheap = vars(replace(ROUNDING, held_out_planned=3.001))
    assert warnings(results(rounding=cheap)) == []


def test_where_learning_fixed_the_kept_set_that_step_is_the_one_reported() -> None:
    fixing = {"step": 50, "kept_before": 0.81, "kept_after": 0.8, "held_out_before": 2.0, "held_out_after": 2.3}
    assert "after step 50" in arrival(results(fixing=fixing)) and "2.0000 to 2.3000" in arrival(results(fixing=fixing))
    assert "0.300" in warnings(results(fixing=fixing))[0]


def test_the_card_says_what_was_done_and_shows_no_path(tmp_path: Any) -> None:
    (tmp_path / "model").mkdir()
    config = Config(str(tmp_path / "model"), 0.2, data=str(tmp_path / "texts.jsonl")).resolved()
    verified = {"comparisons": [{"tokens": 1024, "dtype": "float32", "max_difference": 1e-6}]}
    card = model_card(config, "ragged", ROUNDING, results(), verified)
    assert str(tmp_path) not in card
    assert "`texts.jsonl`" in card or "texts.jsonl" in card
    assert "| perplexity | 20.00 | 30.00 | 1.50 × |" in card and "trust_remote_code=True" in card
    assert "base_model" not in card.split("---")[1]
    hub = model_card(replace(config, model="owner/name"), "uniform", ROUNDING, None, None)
    assert "base_model: owner/name" in hub and "trust_remote_code" not in hub


def test_the_card_of_a_baseline_names_it_and_claims_no_learning_where_there_was_none() -> None:
    cards = {}
    for method in ("deterministic", "hard-concrete", "flap", "magnitude"):
        config = Config(
            "owner/name", 0.2, data="owner/texts", steps=10, batch_size=2, seq_len=8, method=method
        ).resolved()  # type: ignore[arg-type]
        cards[method] = model_card(config, "ragged", ROUNDING, results(method=method), None)
        assert f"`{method}`" in cards[method]
        assert ("gates learned" in cards[method]) == (method in ("deterministic", "hard-concrete"))
        assert ("as learned" in cards[method]) == (method in ("deterministic", "hard-concrete"))
    assert "baseline" not in cards["deterministic"] and "biases stand for" in cards["flap"]
    assert "20 × 8 = 160" in cards["flap"] and "texts" in cards["flap"] and "texts" not in cards["magnitude"]


def test_hub_ids_keep_their_owner() -> None:
    assert public_name("owner/name") == "owner/name"
    assert public_name("/data/models/llama") == "llama"


def task(acc: float, change: float, error: float | None = 0.02) -> dict[str, Any]:
    figures = {"dense": acc, "pruned": acc + change, "difference": change}
    return {name: {"acc": value, "acc_stderr": error} for name, value in figures.items()} | {
        "items": 50, "of": 200, "cut": 0, "joined": 0, "versions": {"lm_eval": "0.4"},
    }  # fmt: skip


def test_tasks_have_rows_with_errors_and_a_mean_over_tasks() -> None:
    rows = {row[0]: row[1:] for row in summary(results(tasks={"a": task(0.5, -0.1), "b": task(0.7, 0.02)}))}
    assert rows["a, acc"] == ("0.500 ± 0.020", "0.400 ± 0.020", "−0.100 ± 0.020")
    assert rows["b, acc"][2] == "+0.020 ± 0.020"
    assert rows["mean of 2 tasks, acc"] == ("0.600 ± 0.014", "0.560 ± 0.014", "−0.040 ± 0.014")
    alone = {row[0]: row[1:] for row in summary(results(tasks={"a": task(0.5, -0.1, None)}))}
    assert alone["a, acc"] == ("0.500", "0.400", "−0.100") and not any("mean of" in label for label in alone)


def test_items_that_were_cut_joined_or_seen_before_are_warned_of() -> None:
    cheap = vars(replace(ROUNDING, held_out_planned=3.001))
    clean = {"run_words": 13, "text": {"words": 90, "covered": 0, "runs": 0}, "tasks": {"a": {"items": 50, "hit": 0}}}
    assert warnings(results(rounding=cheap, tasks={"a": task(0.5, 0)}, overlap=clean)) == []
    seen = {"run_words": 13, "text": {"words": 80, "covered": 20, "runs": 8}, "tasks": {"a": {"items": 50, "hit": 3}}}
    bad = {"a": task(0.5, 0) | {"cut": 4, "joined": 5}}
    said = warnings(results(rounding=cheap, tasks=bad, overlap=seen))
    assert "8 runs of 13 words, which cover 25.00%" in said[0] and "3 of 50 items of a" in said[1]
    assert "4 items of a" in said[2] and "5 items of a" in said[3] and len(said) == 4
