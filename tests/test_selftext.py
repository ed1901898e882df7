"""Text that the model itself writes: its openings, its ends, its seed, and what an interruption leaves."""

from itertools import chain, islice

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur import selftext
from secateur.selftext import self_written
from texts import BOS, EOS, SPECIAL, VOCABULARY, WORDS, blocks_of, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write(model, tokenizer, folder, documents_count=24, **changes):
    options = {"seed": 0, "parts": folder, "batch_size": 8, "length": 40} | changes
    return list(islice(self_written(model, tokenizer, **options), documents_count))


def test_the_model_writes_documents_up_to_eos_from_diverse_openings(tmp_path, model, tokenizer):
    state, told = torch.get_rng_state(), []
    written = write(model, tokenizer, tmp_path, on_progress=told.append)
    assert torch.equal(state, torch.get_rng_state())
    assert all(EOS not in ids and 1 <= len(ids) <= 40 and max(ids) < VOCABULARY + 5 for ids in written)
    assert {len(ids) for ids in written} > {40}, "some end early, some at the full length"
    assert len({ids[0] for ids in written}) > 16 and not {ids[0] for ids in written} & set(SPECIAL.values())
    assert all(len(SPECIAL) <= ids[0] < VOCABULARY for ids in written)
    assert sum(told) == 3 * 8 * 39


def test_openings_are_bos_where_texts_have_it_and_an_ordinary_word(tmp_path, model):
    tokenizer = make_tokenizer("<s> $A </s>")
    tokenizer.add_tokens([f"w{i}" for i in range(4, WORDS)])
    written = write(model, tokenizer, tmp_path)
    assert {tuple(ids[:2]) for ids in written} == {(BOS, len(SPECIAL) + i) for i in range(4)}


def test_documents_end_before_the_first_eos_after_their_opening(tmp_path, model, tokenizer, monkeypatch):
    rows = torch.tensor([[5, EOS, 7, EOS], [5, 6, EOS, EOS], [5, 6, 7, 8]])
    monkeypatch.setattr(selftext, "_sample", lambda *args: rows)
    assert write(model, tokenizer, tmp_path, 3) == [[5], [5, 6], [5, 6, 7, 8]]


def test_writing_follows_the_model_and_never_its_unlikely_tokens(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(selftext, "RELIABLE", 1.0)  # leaves the most likely token only
    for ids in write(model, tokenizer, tmp_path, 8):
        likeliest = model(torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
        assert ids[1:] == likeliest[:-1]
        assert len(ids) == 40 or likeliest[-1] == EOS


def test_writing_depends_on_the_seed_and_goes_on_where_it_was_interrupted(tmp_path, model, tokenizer, monkeypatch):
    whole = write(model, tokenizer, tmp_path / "whole")
    assert write(model, tokenizer, tmp_path / "seed", seed=1) != whole
    parts = tmp_path / "parts"
    write(model, tokenizer, parts, 10)  # two of three batches
    assert sorted(p.name for p in parts.iterdir()) == ["00000.safetensors", "00001.safetensors"]
    (parts / "00000.safetensors").write_bytes(b"broken")
    sampled, sample = [], selftext._sample
    monkeypatch.setattr(selftext, "_sample", lambda *args: sampled.append(1) or sample(*args))
    assert write(model, tokenizer, parts) == whole
    assert len(sampled) == 2, "the broken batch and the missing one"


def test_batches_of_another_model_are_not_taken_over(tmp_path, model, tokenizer):
    whole = write(model, tokenizer, tmp_path)
    torch.manual_seed(1)
    other = LlamaForCausalLM(model.config).eval()
    assert write(other, tokenizer, tmp_path) == write(other, tokenizer, tmp_path / "other") != whole


def test_blocks_of_self_written_text_are_disjoint_and_sampled_once(tmp_path, model, tokenizer):
    def load(written):
        return blocks_of("self", tokenizer, tmp_path, vocab_size=VOCABULARY + 5, seq_len=32, written=written, epochs=2)

    blocks = load(self_written(model, tokenizer, seed=0, parts=tmp_path / "parts", batch_size=4, length=40))
    assert blocks.calibration_NT.shape == (8, 32) and blocks.held_out_NT.shape == (3, 32)
    assert blocks.about["tokens"] == 4 * 32, "half is written, for two epochs"
    assert torch.equal(blocks.calibration_NT[:4].sort(0).values, blocks.calibration_NT[4:].sort(0).values)
    sequences = [[*ids, EOS] for ids in write(model, tokenizer, tmp_path / "parts", 50, batch_size=4)]
    held_out = blocks.about["held_out_documents"]
    assert blocks.held_out_NT.flatten().tolist() == list(chain(*sequences[:held_out]))[:96]
    calibration = torch.tensor(list(chain(*sequences[held_out:]))[:128]).view(4, 32)
    assert sorted(calibration.tolist()) == sorted(blocks.calibration_NT[:4].tolist())
    assert torch.equal(load(iter(())).calibration_NT, blocks.calibration_NT)
