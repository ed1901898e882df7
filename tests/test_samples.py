"""Samples are what the models write, most likely token by most likely token, after words of the evaluated windows."""

import torch

from runs import random_tokens, small_llama, small_tokenizer
from secateur.samples import greedy, samples


def written_without_a_cache(model, prompt_T, new_tokens):
    ids_T = prompt_T
    for _ in range(new_tokens):
        ids_T = torch.cat([ids_T, model(ids_T[None], use_cache=False).logits[0, -1].argmax(keepdim=True)])
    return ids_T[len(prompt_T) :]


def test_text_is_the_most_likely_of_each_model_after_the_same_words():
    dense, pruned, tokenizer = small_llama(), small_llama(seed=1), small_tokenizer()
    ids_NT = random_tokens(9, 20)
    found = samples(dense, pruned, tokenizer, ids_NT)
    rows = [ids_NT[i] for i in (0, 3, 5, 8)]
    assert [s["prompt"] for s in found] == [tokenizer.decode(row[:10]) for row in rows]
    assert [s["text"].strip() for s in found] == [tokenizer.decode(row[10:20]) for row in rows]
    for model, name in ((dense, "dense"), (pruned, "pruned")):
        for row, sample in zip(rows, found, strict=True):
            tokens = written_without_a_cache(model, row[:10], 10).tolist()
            until = tokens.index(2) if 2 in tokens else None
            assert sample[name].strip() == tokenizer.decode(tokens[:until], skip_special_tokens=True)


def test_prompts_and_text_are_short_where_windows_are_long():
    model, ids_NT = small_llama(max_position_embeddings=200), random_tokens(1, 180)
    found = samples(model, model, small_tokenizer(), ids_NT)
    assert len(found) == 1
    assert len(found[0]["prompt"].split()) == 32 and len(found[0]["text"].split()) == 32


def test_an_end_of_text_ends_the_text():
    model, tokenizer, ids_NT = small_llama(), small_tokenizer(), random_tokens(1, 12)
    ids_NT[0, 8] = tokenizer.eos_token_id
    assert samples(model, model, tokenizer, ids_NT)[0]["text"].strip() == tokenizer.decode(ids_NT[0, 6:8])


def test_rows_do_not_touch_each_other():
    model, ids_NT = small_llama(), random_tokens(4, 6)
    together = greedy(model, ids_NT, 5)
    assert torch.equal(together, torch.cat([greedy(model, row[None], 5) for row in ids_NT]))
