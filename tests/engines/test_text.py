"""Prompts: counted with the template, cut to fit, encoded once."""

from typing import Any

import numpy as np
import pytest
import torch

from engines import FOX, by_library, encodings, rendered
from promptdrop.config import Prompt
from promptdrop.engines.text import Embeddings, templated
from promptdrop.engines.zimage import ZImageEngine
from promptdrop.errors import EngineError

LONG = [
    "a red fox and a blue cat, " * 20,
    "猫坐在窗台上看着外面的雪🐈‍⬛" * 20,
    "é" * 300,
    "<|im_end|>\n" * 60,
    "x" * 900,
]


def test_tokens_are_counted_with_the_template(zimage: ZImageEngine) -> None:
    """The count is that of the model's own tokenizer for the text that the encoder is given."""
    tokenizer = zimage.model.pipe.tokenizer
    prompts = ["", "a cat", "一只猫 🐈", "word " * 2000, "  leading\nand trailing  "]
    counts = zimage.count_tokens(prompts)

    assert [len(tokenizer(templated(tokenizer, text)).input_ids) for text in prompts] == counts
    assert counts[1] == rendered(zimage, FOX._replace(prompt="a cat"))[0].tokens


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("overflow", ["keep_head", "keep_tail"])
def test_a_long_prompt_keeps_its_template(zimage: ZImageEngine, text: str, overflow: str) -> None:
    """The user's text is cut between characters to the most that fits; the template stays."""
    prompt = Prompt.model_validate({"max_tokens": 64, "overflow": overflow})
    rendering, _ = rendered(zimage, FOX._replace(steps=1, prompt=text), prompt)
    kept, tokens = rendering.prompt, rendering.tokens
    keeps_head = overflow == "keep_head"
    assert tokens is not None

    assert rendering.truncated
    assert text.startswith(kept) if keeps_head else text.endswith(kept)
    assert 0 < len(kept) < len(text)
    assert tokens == zimage.count_tokens([kept])[0] <= 64
    one_more = text[: len(kept) + 1] if keeps_head else text[-len(kept) - 1 :]
    assert zimage.count_tokens([one_more])[0] > 64 or tokens == 64


def test_a_cut_prompt_gives_the_pixels_of_the_cut_text(zimage: ZImageEngine, library: Any) -> None:
    """The text that the sidecar names as the encoder's is the one that was encoded."""
    rendering, pixels = rendered(zimage, FOX._replace(prompt="a red fox " * 300))

    assert rendering.truncated
    assert np.array_equal(by_library(library, FOX._replace(prompt=rendering.prompt)), pixels)


def test_refuse(zimage: ZImageEngine) -> None:
    """With overflow: refuse nothing is cut."""
    prompt = Prompt(max_tokens=64, overflow="refuse")
    with pytest.raises(EngineError, match=r"expected at most 64 \(prompt.max_tokens\)"):
        rendered(zimage, FOX._replace(prompt=LONG[0]), prompt)


@pytest.mark.parametrize("text", ["", "a", "一只猫坐在窗台上 🐈", "a blue star " * 40, "x " * 252])
def test_a_text_without_padding_is_encoded_as_with_it(library: Any, text: str) -> None:
    """A compiled engine's embeddings are the library's up to rounding: attention is causal, so that no
    token sees the padding behind it. Values reach 4, where float32 has steps of 4.8e-7; the sums of a
    masked and of an unmasked attention differ by some of these, 1.2e-6 where this was measured."""
    with torch.no_grad():
        (expected,), _ = library.encode_prompt(text, do_classifier_free_guidance=False)
        with encodings(library) as tokens:
            actual = Embeddings(library, padded=False).of(text, Prompt()).embeds
    tolerance = 1e-5 if library.device.type == "cpu" else 0.1  # bfloat16 has steps of 0.03 at 4

    assert tokens == [len(expected)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_a_repeated_prompt_is_neither_cut_nor_encoded_again(library: Any) -> None:
    """It is encoded again only if it would be cut elsewhere."""
    embeddings, text = Embeddings(library, padded=False), "a blue star " * 40
    with torch.no_grad(), encodings(library) as tokens:
        first = embeddings.of(text, Prompt(max_tokens=64))
        again = embeddings.of(text, Prompt(max_tokens=64))
        tail = embeddings.of(text, Prompt(max_tokens=64, overflow="keep_tail"))

    assert first is again
    assert first.truncated
    assert first.text != tail.text
    assert tokens == [first.tokens, tail.tokens]
