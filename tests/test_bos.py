"""Sequences begin with BOS where the model wants it, found by its loss; blocks, windows and own text follow."""

from types import SimpleNamespace

import pytest
import torch

from secateur.bos import leading_bos
from secateur.evaluate import windows
from secateur.files import InputError
from texts import BOS, blocks_of, make_tokenizer, own_words, write_jsonl

VOCABULARY = 128


class Reader(torch.nn.Module):
    """Knows each next token well after BOS, and else by `loss_without` nats."""

    def __init__(self, loss_without):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.loss_without = loss_without

    @property
    def base_model(self):
        """None apart from a head."""
        return self

    def forward(self, ids_BT, use_cache):
        loss = 1.0 if ids_BT[0, 0] == BOS else self.loss_without
        right = torch.nn.functional.one_hot(ids_BT.roll(-1, dims=1), VOCABULARY).float()
        odds = torch.tensor(loss).neg().exp() / (1 - torch.tensor(loss).neg().exp()) * (VOCABULARY - 1)
        return SimpleNamespace(logits=right * odds.log())


class Words:
    bos_token_id = BOS

    def __init__(self, different=60):
        self.different = different

    def __call__(self, text):
        return {"input_ids": [BOS, *(3 + i % self.different for i in range(80))]}


@pytest.mark.parametrize(("without", "bos"), [(1.5, BOS), (1.1, None), (0.9, None)])
def test_bos_leads_only_where_it_clearly_lowers_the_loss(without, bos):
    assert leading_bos(Reader(without), Words()) == bos


def test_the_user_may_say_so_or_say_no():
    assert leading_bos(Reader(0.9), Words(), "always") == BOS
    assert leading_bos(Reader(3.0), Words(), "never") is None


def test_a_tokenizer_without_bos_or_without_english_decides_nothing():
    nameless = Words()
    nameless.bos_token_id = None
    assert leading_bos(Reader(3.0), nameless) is None
    with pytest.raises(InputError, match="--bos always: this tokenizer has no BOS token"):
        leading_bos(Reader(3.0), nameless, "always")
    assert leading_bos(Reader(3.0), Words(different=5)) is None


def test_every_block_begins_with_it_and_holds_text_else(tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", own_words(40))
    plain = blocks_of(source, make_tokenizer("<s> $A"), tmp_path / "plain")
    led = blocks_of(source, make_tokenizer("<s> $A"), tmp_path / "led", bos=BOS)
    for blocks_NT in (led.calibration_NT, led.held_out_NT):
        assert (blocks_NT[:, 0] == BOS).all() and (blocks_NT[:, 1:] != BOS).all()
    assert led.calibration_NT.shape == plain.calibration_NT.shape
    assert not torch.equal(plain.calibration_NT, led.calibration_NT)


def test_windows_of_bos_and_text_predict_as_many_tokens():
    windows_NT = windows(torch.tensor([BOS, *range(10, 30)]), 5, 6, "text", BOS)
    assert windows_NT.tolist() == [[BOS, *range(10 + 5 * i, 15 + 5 * i)] for i in range(4)]
