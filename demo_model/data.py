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
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    pack,
    place,
    sample_scene,
    turned,
)

TWO_SHARE = 0.45  # of the scenes have two things
NONSENSE_SHARE = 0.04  # of the prompts describe nothing
CHINESE_SHARE = 0.4  # of the descriptions
PICTURE_SIDE = 160  # px, for the VAE, which is convolutional: one size is enough
CHUNK = 512  # pictures made at a time
PROMPTS = 4  # of each picture of a course


@dataclass(frozen=True)
class Course:
    """Pictures of one size and prompts of one padded length: one shape of the transformer's work."""

    height: int  # px
    width: int  # px
    length: int  # tokens, a multiple of SEQUENCE_MULTIPLE
    pictures: int

    @property
    def tokens(self) -> int:
        """The tokens of one sequence: image, its padding, and text."""
        image = self.height * self.width // 256
        return image + -image % SEQUENCE_MULTIPLE + self.length


FIRST_COURSE = Course(128, 128, 32, 131_072)  # where words and shapes are learned
LATER_COURSES = tuple(
    Course(height, width, length, 8192 if length < 128 else 2048)
    for height, width, length in (
        (192, 192, 32),
        (192, 192, 64),
        (256, 256, 32),
        (160, 224, 32),
        (224, 160, 32),
        (144, 240, 32),
        (240, 144, 64),
        (128, 192, 32),
        (192, 128, 32),
        (160, 160, 64),
        (128, 256, 32),
        (256, 128, 32),
        (128, 128, 64),
        (128, 128, 128),
        (192, 192, 256),
        (160, 160, 512),
    )
)


@dataclass(frozen=True)
class Pictures:
    """Scenes of one image size: packed [B, 17] for `render`."""

    packed: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class Captioned:
    """Prompts of pictures: right-padded ids [P, L], lengths [P] in L - 31 to L.

    picture_of [P] says which picture a prompt is for."""

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


def sample_text(scene: Scene, rng: random.Random) -> str:
    """Word a scene: some of its attributes, or rarely nothing."""
    if rng.random() < NONSENSE_SHARE:
        return sample_nonsense(rng)
    return describe(forget(scene, rng), rng, chinese=rng.random() < CHINESE_SHARE)


def attributes(asked: Scene) -> list[int]:
    """The attributes that a prompt says, a class index each, 0 if it is left unsaid; see CLASS_COUNTS.

    Two things are put in their order in the picture, from the top or the left."""
    if asked.relation in ("below", "right of"):
        asked = turned(asked)
    row = [len(asked.things)]
    for thing in (*asked.things, Thing(), Thing())[:2]:
        row += [
            class_of(thing.colour, list(COLOURS)),
            class_of(thing.shape, list(SHAPES)),
            class_of(thing.size, list(SIZES)),
        ]
    row.append(class_of(asked.background, list(COLOURS)))
    row.append(class_of(asked.position, list(POSITIONS)))
    return [*row, class_of(asked.relation, ["above", "left of"])]


def class_of(value: str | None, names: list[str]) -> int:
    return 0 if value is None else 1 + names.index(value)


CLASS_COUNTS = (3, *(9, 7, 4) * 2, 9, 10, 3)


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


class Prompts:
    """Prompts of scenes as token ids, inside the chat template."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.counted: dict[str, int] = {}  # tokens of filler sentences
        self.before, self.after = templated(tokenizer, "{}").split("{}")

    def sample(self, scenes: list[Scene], length: int, rng: random.Random) -> list[list[int]]:
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


class SaidBatches(Dataset[Said]):
    """Prompts and what they say, to teach the text encoder words before pictures."""

    def __init__(self, prompts: Prompts, seed: int, count: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self.count = count  # prompts in a batch

    def __getitem__(self, index: int) -> Said:
        rng = random.Random(f"said {self.seed} {index}")
        return self.sample(rng, [sample_training_scene(rng) for _ in range(self.count)])

    def sample(self, rng: random.Random, scenes: list[Scene]) -> Said:
        most_filler = rng.choice((0, 0, 1, 1, 4, 16))  # sentences
        texts, targets = [], []
        for scene in scenes:
            asked = forget(scene, rng)
            text = describe(asked, rng, chinese=rng.random() < CHINESE_SHARE)
            if rng.random() < NONSENSE_SHARE:
                asked, text = Scene(()), sample_nonsense(rng)
            fillers = [sample_filler(rng) for _ in range(rng.randint(0, most_filler))]
            texts.append(fill(text, fillers, rng))
            targets.append(attributes(asked))
        tokens = self.prompts.tokenize(texts)
        longest = max(map(len, tokens))
        lengths = torch.tensor([*map(len, tokens)])
        return Said(self.prompts.pad(tokens, longest), lengths, torch.tensor(targets))


class CaptionedChunks(Dataset[Captioned]):
    """Pictures of a course with their prompts, CHUNK pictures at a time."""

    def __init__(self, prompts: Prompts, seed: int, course: Course) -> None:
        self.prompts = prompts
        self.seed = seed
        self.course = course

    def __len__(self) -> int:
        return -(-self.course.pictures // CHUNK)

    def __getitem__(self, index: int) -> Captioned:
        course = self.course
        rng = random.Random(f"captioned {self.seed} {course} {index}")
        count = min(CHUNK, course.pictures - index * CHUNK)
        scenes = [sample_training_scene(rng) for _ in range(count)]
        prompts: list[list[int]] = []
        picture_of: list[int] = []
        while len(prompts) < count * PROMPTS:
            for i, ids in enumerate(self.prompts.sample(scenes, course.length, rng)):
                if course.length - SEQUENCE_MULTIPLE < len(ids) <= course.length:
                    prompts.append(ids)
                    picture_of.append(i)
        del prompts[count * PROMPTS :], picture_of[count * PROMPTS :]
        rows = [pack(scene, place(scene, course.height, course.width, rng)) for scene in scenes]
        return Captioned(
            Pictures(torch.tensor(rows), course.height, course.width),
            torch.tensor(picture_of),
            self.prompts.pad(prompts, course.length),
            torch.tensor([len(ids) for ids in prompts]),
        )
