"""Training batches, made from nothing but their number, so that training can go on where it broke.

Batches come from DataLoader workers as CPU tensors; the pictures are drawn on the device.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Qwen2Tokenizer

from .captions import describe, fill, forget, sample_filler, sample_nonsense
from .model import SEQUENCE_MULTIPLE, templated
from .world import (
    COLOURS,
    INVERSE,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    pack,
    place,
    sample_scene,
)

TWO_SHARE = 0.45  # of the scenes have two things
NONSENSE_SHARE = 0.04  # of the prompts describe nothing
CHINESE_SHARE = 0.4  # of the descriptions
PICTURE_SIDE = 160  # px, for the VAE, which is convolutional: one size is enough
PICTURES = 128  # in a captioned batch: cuDNN plans each new shape of a batch anew, which is slow
SMALL_SIZES = ((128, 128), (160, 160), (192, 192), (192, 192), (128, 192), (192, 128))  # px, H by W
LARGE_SIZES = (
    (176, 176),
    (224, 224),
    (256, 256),
    (144, 240),
    (240, 144),
    (160, 224),
    (224, 160),
    (128, 256),
    (256, 128),
)


@dataclass(frozen=True)
class Pictures:
    """Scenes of one image size: packed [B, 17] for `render`."""

    packed: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class Captioned:
    """Prompts of pictures: right-padded ids [B, L], lengths [B] in L - 31 to L.

    picture_of [B] says which picture a prompt is for: most are described more than once."""

    pictures: Pictures
    picture_of: Tensor
    ids: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Said:
    """Prompts and what they say: padded ids [B, L], lengths [B], and targets [B, ATTRIBUTES]."""

    ids: Tensor
    lengths: Tensor
    targets: Tensor


def sample_training_scene(rng: random.Random) -> Scene:
    """A complete scene that is not held out."""
    return sample_scene(rng, rng.random() < TWO_SHARE, lambda scene: not is_held_out(scene))


def sample_size(rng: random.Random) -> tuple[int, int]:
    """Height and width in pixels."""
    return rng.choice(SMALL_SIZES if rng.random() < 0.6 else LARGE_SIZES)


def sample_text_length(rng: random.Random) -> int:
    """Padded tokens of a batch: mostly plain captions, sometimes up to 512 tokens with filler."""
    draw = rng.random()
    if draw < 0.62:
        return SEQUENCE_MULTIPLE
    if draw < 0.87:
        return 2 * SEQUENCE_MULTIPLE
    return SEQUENCE_MULTIPLE * rng.randint(3, 16)


def sample_text(scene: Scene, rng: random.Random) -> str:
    """What a prompt says of a scene: some of its attributes, or rarely nothing."""
    if rng.random() < NONSENSE_SHARE:
        return sample_nonsense(rng)
    return describe(forget(scene, rng), rng, chinese=rng.random() < CHINESE_SHARE)


def attributes(asked: Scene) -> list[int]:
    """What a prompt says, one class index per attribute, 0 for left unsaid; see CLASS_COUNTS.

    Two things are put in their order in the picture, from the top or the left."""
    things, relation = asked.things, asked.relation
    if relation in ("below", "right of"):
        things, relation = things[::-1], INVERSE[relation]
    row = [len(things)]
    for thing in (*things, Thing(), Thing())[:2]:
        row += [
            class_of(thing.colour, list(COLOURS)),
            class_of(thing.shape, list(SHAPES)),
            class_of(thing.size, list(SIZES)),
        ]
    row.append(class_of(asked.background, list(COLOURS)))
    row.append(class_of(asked.position, list(POSITIONS)))
    return [*row, class_of(relation, ["above", "left of"])]


def class_of(value: str | None, names: list[str]) -> int:
    return 0 if value is None else 1 + names.index(value)


CLASS_COUNTS = (3, *(9, 7, 4) * 2, 9, 10, 3)


class SaidBatches(Dataset[Said]):
    """Prompts and what they say, to teach the text encoder words before pictures."""

    def __init__(self, prompts: "CaptionedBatches", count: int) -> None:
        self.prompts = prompts
        self.count = count  # prompts in a batch

    def __getitem__(self, index: int) -> Said:
        rng = random.Random(f"said {self.prompts.seed} {index}")
        length = SEQUENCE_MULTIPLE * rng.choice((1, 2, 2))
        texts, targets = [], []
        for _ in range(self.count):
            asked = forget(sample_training_scene(rng), rng)
            text = describe(asked, rng, chinese=rng.random() < CHINESE_SHARE)
            if rng.random() < NONSENSE_SHARE:
                asked, text = Scene(()), sample_nonsense(rng)
            if length > SEQUENCE_MULTIPLE and rng.random() < 0.5:
                text = fill(text, [sample_filler(rng)], rng)
            texts.append(text)
            targets.append(attributes(asked))
        tokens = self.prompts.tokenize(texts)
        longest = max(map(len, tokens))
        lengths = torch.tensor([*map(len, tokens)])
        return Said(self.prompts.pad(tokens, longest), lengths, torch.tensor(targets))


class PictureBatches(Dataset[Pictures]):
    """Pictures without words, for the VAE."""

    def __init__(self, seed: int, pixels: int) -> None:
        self.seed = seed
        self.pixels = pixels  # in a batch

    def __getitem__(self, index: int) -> Pictures:
        rng = random.Random(f"pictures {self.seed} {index}")
        scenes = [sample_training_scene(rng) for _ in range(max(1, self.pixels // PICTURE_SIDE**2))]
        packed = [pack(s, place(s, PICTURE_SIDE, PICTURE_SIDE, rng)) for s in scenes]
        return Pictures(torch.tensor(packed), PICTURE_SIDE, PICTURE_SIDE)


class CaptionedBatches(Dataset[Captioned]):
    """Pictures and prompts, for the text encoder and the transformer."""

    def __init__(self, tokenizer: Qwen2Tokenizer, seed: int, tokens: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.tokens = tokens  # image and text tokens in a batch, about
        self.counted: dict[str, int] = {}  # tokens of filler sentences
        self.before, self.after = templated(tokenizer, "{}").split("{}")

    def __getitem__(self, index: int) -> Captioned:
        rng = random.Random(f"captioned {self.seed} {index}")
        height, width = sample_size(rng)
        length = sample_text_length(rng)
        per_prompt = height * width // 256 + length  # tokens
        count = max(1, round(self.tokens / per_prompt / PICTURES)) * PICTURES
        scenes = [sample_training_scene(rng) for _ in range(PICTURES)]
        prompts: list[list[int]] = []
        picture_of: list[int] = []
        while len(prompts) < count:
            for i, ids in enumerate(self.sample_prompts(scenes, length, rng)):
                if length - SEQUENCE_MULTIPLE < len(ids) <= length:
                    prompts.append(ids)
                    picture_of.append(i)
        rows = [pack(scene, place(scene, height, width, rng)) for scene in scenes]
        return Captioned(
            Pictures(torch.tensor(rows), height, width),
            torch.tensor(picture_of[:count]),
            self.pad(prompts[:count], length),
            torch.tensor([len(ids) for ids in prompts[:count]]),
        )

    def sample_prompts(
        self, scenes: list[Scene], length: int, rng: random.Random
    ) -> list[list[int]]:
        """Token ids of a prompt for each scene, with filler towards `length` if it is short."""
        texts = [sample_text(scene, rng) for scene in scenes]
        plain = self.tokenize(texts)
        filled = [
            self.lengthen(text, length - len(ids), rng)
            for text, ids in zip(texts, plain, strict=True)
        ]
        return plain if filled == texts else self.tokenize(filled)

    def lengthen(self, text: str, missing: int, rng: random.Random) -> str:
        """Add filler to a text that is `missing` tokens short; less than 32 needs none."""
        if missing < SEQUENCE_MULTIPLE:
            return text
        room = missing - rng.randrange(SEQUENCE_MULTIPLE)
        fillers: list[str] = []
        while room > 0:
            fillers.append(sample_filler(rng))
            room -= self.count_tokens(fillers[-1])
        return fill(text, fillers, rng)

    def count_tokens(self, sentence: str) -> int:
        if sentence not in self.counted:
            self.counted[sentence] = len(self.tokenizer(sentence).input_ids)
        return self.counted[sentence]

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            [self.before + prompt + self.after for prompt in prompts]
        ).input_ids
        return ids

    def pad(self, prompts: list[list[int]], length: int) -> Tensor:
        pad = self.tokenizer.pad_token_id
        return torch.tensor([ids + [pad] * (length - len(ids)) for ids in prompts])  # [B, L]
