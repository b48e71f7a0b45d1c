"""Turn prompts into embeddings: put them into the template, cut, encode, and keep the results."""

from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from promptdrop.config import Prompt
from promptdrop.errors import EngineError

EMBEDDINGS_BYTES = 64 * 1024 * 1024  # about a hundred prompts of Z-Image-Turbo's
BOUNDARY_TOKENS = 4  # how many tokens the template and a cut text may save where they touch
SHORTEST_GRAPH = 64  # tokens


def templated(tokenizer: Any, text: str) -> str:
    """Put a prompt into the chat template, as the library does (pipeline_z_image.py:218-226)."""
    messages = [{"role": "user", "content": text}]
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    )


def count_tokens(tokenizer: Any, text: str) -> int:
    """Count the tokens of a text, the template included."""
    return len(tokenizer(templated(tokenizer, text)).input_ids)


def fit(tokenizer: Any, text: str, prompt: Prompt) -> tuple[str, int]:
    """Cut the user's text so that it fits together with the template. Returns it and its token count.

    A text that fits is returned as it is. Cuts are made between characters of the text and never in the
    template, the end of which the library's own truncation would drop.

    Raises EngineError: it does not fit and `prompt.overflow` is refuse.
    """
    tokens = count_tokens(tokenizer, text)
    if tokens <= prompt.max_tokens:
        return text, tokens
    expected = f"expected at most {prompt.max_tokens} (prompt.max_tokens)"
    if prompt.overflow == "refuse":
        raise EngineError(f"prompt: {tokens} tokens with the template; {expected}")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans: list[tuple[int, int]] = encoding.offset_mapping  # characters of each token
    template_tokens = tokens - len(spans)
    most = min(len(spans), prompt.max_tokens - template_tokens + BOUNDARY_TOKENS)
    for kept in range(most, 0, -1):
        keep_head = prompt.overflow == "keep_head"
        part = text[: spans[kept - 1][1]] if keep_head else text[spans[-kept][0] :]
        if (tokens := count_tokens(tokenizer, part)) <= prompt.max_tokens:
            return part, tokens
    raise EngineError(f"prompt: the template alone has {template_tokens} tokens; {expected}")


class Embedding(NamedTuple):
    """A prompt as the transformer takes it."""

    text: str  # that the encoder was given
    tokens: int  # of that text, the template included
    truncated: bool
    embeds: Tensor  # [tokens, width], as ZImagePipeline.encode_prompt returns it


class Embeddings:
    """Encodes prompts, and keeps the embeddings for prompts that are repeated.

    At most EMBEDDINGS_BYTES are kept; the least recently used go first.
    """

    def __init__(self, pipe: Any, padded: bool) -> None:
        """padded: pad prompts as the library does; the result is then the library's, bit for bit."""
        self._pipe, self._padded = pipe, padded
        self.graphs: EncoderGraphs | None = None
        self._kept: OrderedDict[tuple[str, Prompt], Embedding] = OrderedDict()
        self._bytes = 0

    def warm_up(self, max_tokens: int) -> None:
        """Capture the CUDA graphs for up to so many tokens, if graphs are used."""
        if self.graphs:
            self.graphs.warm_up(max_tokens)

    def of(self, text: str, prompt: Prompt) -> Embedding:
        """Return the embedding of a user's text. Raises EngineError: it is too long and must not be cut."""
        key = text, prompt
        if key not in self._kept:
            fitting, tokens = fit(self._pipe.tokenizer, text, prompt)
            embeds = self._encoded(fitting, prompt.max_tokens)
            self._kept[key] = Embedding(fitting, tokens, fitting != text, embeds)
            self._bytes += size_of(text, embeds)
        self._kept.move_to_end(key)
        while self._bytes > EMBEDDINGS_BYTES and len(self._kept) > 1:
            (oldest, _), embedding = self._kept.popitem(last=False)
            self._bytes -= size_of(oldest, embedding.embeds)
        return self._kept[key]

    def _encoded(self, text: str, max_tokens: int) -> Tensor:
        if self._padded:
            embeds, _ = self._pipe.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=max_tokens
            )
            padded: Tensor = embeds[0]
            return padded
        tokenizer, encoder = self._pipe.tokenizer, self._pipe.text_encoder
        ids = tokenizer(templated(tokenizer, text), return_tensors="pt").input_ids  # [1, T]
        return self.graphs.encoded(ids) if self.graphs else encoded(encoder, ids)


def size_of(text: str, embeds: Tensor) -> int:
    """Count the bytes of a kept embedding, and of its text at 4 a character."""
    return embeds.nbytes + 4 * len(text)


def encoded(encoder: Any, ids: Tensor) -> Tensor:
    """Encode one prompt without padding, ids [1, T]. Returns [T, width].

    The library pads to max_sequence_length, masks the padding and cuts it off
    (pipeline_z_image.py:228-244). No token sees a later one, so without it the result is the same
    up to rounding. Nothing here waits for the device, unless the encoder is streamed through it.
    """
    ids = ids.to(encoder.device, non_blocking=True)
    hidden: Tensor = encoder(ids, output_hidden_states=True).hidden_states[-2]
    return hidden[0]


class EncoderGraphs:
    """The text encoder as CUDA graphs, one for each of 64, 128, 256 ... tokens.

    Launching its 2,000 small kernels takes the CPU 36 ms; replaying them takes an H100 6.5 ms at 64
    tokens, 7.2 at 128, 8.6 at 256 and 11.7 at 512. A shorter prompt is padded at its end, where no token
    sees it: the result is that of `encoded`, up to rounding.
    """

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        # 145 norms take one kernel each instead of seven, which rounds less often: 6.5 ms, not 8.8.
        for module in encoder.modules():
            if type(module).__name__ == "Qwen3RMSNorm":
                weight, eps = module.weight, module.variance_epsilon
                module.forward = partial(
                    F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps
                )

    def warm_up(self, max_tokens: int) -> None:
        """Capture all graphs that prompts of up to so many tokens need."""
        for length in [SHORTEST_GRAPH << n for n in range(16)]:
            self._graph(length)
            if length >= max_tokens:
                return

    def encoded(self, ids: Tensor) -> Tensor:
        """Encode ids [1, T], which are on the CPU. Returns [T, width], without waiting for the device."""
        tokens = ids.shape[1]
        length = max(SHORTEST_GRAPH, 1 << (tokens - 1).bit_length())
        graph, inputs, hidden = self._graph(length)
        inputs[:, :tokens].copy_(ids, non_blocking=True)
        graph.replay()
        return hidden[:tokens].clone()

    @torch.no_grad()
    def _graph(self, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Return the graph for `length` tokens, its inputs [1, length] and its outputs [length, width]."""
        if length not in self._graphs:
            inputs = torch.zeros(1, length, dtype=torch.long, device=self._encoder.device)
            here = torch.cuda.current_stream()
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
            beside.wait_stream(here)
            with torch.cuda.stream(beside):  # a first use sets things up, which cannot be captured
                encoded(self._encoder, inputs)
            here.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            others = [*self._graphs.values()]
            with torch.cuda.graph(graph, pool=others[0][0].pool() if others else None):
                hidden = encoded(self._encoder, inputs)
            self._graphs[length] = graph, inputs, hidden
        return self._graphs[length]
