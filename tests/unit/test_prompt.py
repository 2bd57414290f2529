"""Weights of words and changes of a prompt on the way."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny import random_model, tiny

from glide_ray.config.sampling import SampleOptions
from glide_ray.data.tokenizer import Tokenizer
from glide_ray.sampling.checks import RequestError
from glide_ray.sampling.job import base_request
from glide_ray.sampling.prompt import is_cut, literal, plain_text, read_prompt
from glide_ray.sampling.stepper import Stepper

CONTEXT = 32


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red apple",
        "a dog (brown)",
        "[a list]",
        "smile :) [x:y]",
        "a (b:c) [d:e:f]",
        "naïve 🍎",
    ],
)
def test_ordinary_brackets_are_read_as_they_stand(prompt):
    (caption,) = read_prompt(prompt, CONTEXT)
    tokens, mask = Tokenizer(CONTEXT).batch([prompt])
    assert torch.equal(caption.tokens, tokens) and torch.equal(caption.mask, mask)
    assert caption.emphasis == () and plain_text(prompt) == prompt


def test_a_weight_covers_the_tokens_of_its_words():
    (caption,) = read_prompt("a (dark red:1.5) apple, (Noto:0.5)", CONTEXT)
    tokens, mask = Tokenizer(CONTEXT).batch(["a dark red apple, Noto"])
    assert torch.equal(caption.tokens, tokens) and torch.equal(caption.mask, mask)
    names = ("a red apple, noto", 1.5), ("a dark red apple,", 0.5)
    words = Tokenizer(CONTEXT)._bpe
    for (without, weight), (_, expected) in zip(caption.emphasis, names, strict=True):
        assert weight == expected
        left = words.decode(tokens[0][without[0]].tolist())
        assert left == {1.5: "a apple, noto", 0.5: "a dark red apple,"}[weight]


def test_a_backslash_makes_a_bracket_ordinary():
    (caption,) = read_prompt(r"a \(red:1.5\) apple", CONTEXT)
    assert torch.equal(caption.tokens, Tokenizer(CONTEXT).batch(["a (red:1.5) apple"])[0])
    assert caption.emphasis == () and plain_text(r"\[a:b:0.5\]") == "[a:b:0.5]"


def test_changes_divide_a_prompt_into_captions():
    captions = read_prompt("a [dog:cat:0.4] in a [:(red:2):0.7] hat", CONTEXT)
    assert [caption.begin for caption in captions] == [0.0, 0.4, 0.7]
    expected = ["a dog in a  hat", "a cat in a  hat", "a cat in a red hat"]
    for caption, text in zip(captions, expected, strict=True):
        assert torch.equal(caption.tokens, Tokenizer(CONTEXT).batch([text])[0])
    assert [len(caption.emphasis) for caption in captions] == [0, 0, 1]
    assert plain_text("a [(dog:2):cat:0.4]") == "a dog"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("(a:5)", "may be at most 4"),
        ("[a:b:0]", "above 0 and below 1"),
        ("[a:b:1.5]", "above 0 and below 1"),
        ("(a:2) " * 17, "may have 16 weights"),
        ("[(a:2):" * 4571, "may have 16 weights"),
        ("".join(f"[a:b:0.{n}]" for n in range(100, 3000)), "may change 16 times"),
    ],
)
def test_weights_and_shares_out_of_range_are_refused(prompt, sentence):
    with pytest.raises(RequestError, match=sentence) as refusal:
        read_prompt(prompt, CONTEXT)
    assert refusal.value.param == "prompt"


@pytest.mark.parametrize("part", ["[", "(a:", "[(", "[a", "[:", "[a:b", "((a:", "(a)", "[:(a"])
def test_unfinished_brackets_take_no_longer_than_any_text(part):
    """Read in linear time; a pattern that backtracks would not end here."""
    assert len(read_prompt(part * (32_000 // len(part)), CONTEXT)) == 1


def test_many_weights_take_no_longer_than_any_text():
    """Text features of each word with a weight, for each caption, would take minutes."""
    with pytest.raises(RequestError, match="weights at a time"):
        read_prompt("[a:b:0.5]" + "(é:2)" * 6000, CONTEXT)


@pytest.mark.parametrize("text", ["a clock (12:30)", "[a:b:0.5] (c:2)", r"a \(b\\)", "a (b) dog"])
def test_literal_text_is_read_as_it_stands(text):
    (caption,) = read_prompt(literal(text), CONTEXT)
    assert torch.equal(caption.tokens, Tokenizer(CONTEXT).batch([text])[0])
    assert caption.emphasis == () and plain_text(literal(text)) == text


def test_only_what_the_model_reads_counts_towards_its_context():
    assert not is_cut("(a:2)" + " (a:2)" * 15, 16) and is_cut("a " * 17, 16)
    assert is_cut("[a:" + "b " * 17 + ":0.5]", 16)


def test_words_beyond_the_context_have_no_weight():
    (caption,) = read_prompt("a " * 40 + "(red:2)", CONTEXT)
    assert caption.emphasis == ()


# -- in sampling -----------------------------------------------------------------------------------


def stepper(**options):
    config = tiny().model
    return Stepper(random_model(config.unet), config, **options)


def request(prompt, steps="6", seed=7):
    options = SampleOptions(steps=steps, guidance_scale=2.0)
    return base_request(tiny().model, prompt, seed, options)


def test_weights_interpolate_between_the_caption_with_and_without_the_words():
    made = stepper().run(
        [request(f"a (red:{weight}) apple") for weight in ("0", "0.5", "1", "2")]
        + [request("a red apple")]
    )
    assert torch.equal(made[2], made[4])  # 1 is without effect
    without = request("a red apple")
    (caption,) = read_prompt("a (red:0) apple", tiny().model.unet.text.context)
    masked = replace(without.conditioning, mask=caption.emphasis[0][0])
    (expected,) = stepper().run([replace(without, conditioning=masked)])
    # With random weights, rounding grows over the steps
    assert (made[0] - expected).abs().mean() < 1e-3 < (made[0] - made[4]).abs().mean()
    assert len({image.sum().item() for image in made}) == 4


def test_a_prompt_that_changes_is_the_first_caption_before_and_the_second_after():
    """Each half of the trajectory is that of its caption alone."""
    previews = {}
    for prompt in ("a dog", "a cat", "a [dog:cat:0.5]"):
        seen = previews.setdefault(prompt, [])
        asked = replace(request(prompt, "10"), previews=9, on_preview=seen.append)
        stepper().run([asked])
    changing = previews["a [dog:cat:0.5]"]
    same = [torch.equal(a, b) for a, b in zip(changing, previews["a dog"], strict=True)]
    # Timesteps 999, 888, ..., 0: those from 500 on are the dog's
    assert same == [True] * 5 + [False] * 4
    (late,) = stepper().run([request("a [dog:cat:0.9999]", "10")])
    assert not torch.equal(late, stepper().run([request("a dog", "10")])[0])  # timestep 0 changes


@pytest.mark.parametrize("batched", [False, True])
def test_prompts_that_change_share_a_batch_with_others(batched):
    prompts = ["a [dog:cat:0.5]", "a dog", "a (red:2) [apple:pear:0.3]"]
    requests = [request(prompt, "8", seed) for seed, prompt in enumerate(prompts)]
    together = stepper(batched=batched).run(requests)
    for image, asked in zip(together, requests, strict=True):
        (alone,) = stepper(batched=batched).run([asked])
        assert torch.allclose(image, alone, atol=1e-3) if batched else torch.equal(image, alone)
