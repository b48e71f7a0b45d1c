"""The world, the judge and the training code of the demonstration model."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from demo_model import model
from demo_model.captions import describe, forget
from demo_model.data import CHUNK, CaptionedChunks, Course, Prompts, sample_training_scene
from demo_model.evaluate import held_out_cases
from demo_model.judge import compare, is_right, look
from demo_model.plan import Plan
from demo_model.train import train
from demo_model.world import (
    COLOURS,
    INVERSE,
    POSITIONS,
    SHAPES,
    Scene,
    pack,
    place,
    render,
    sample_scene,
    turned,
)
from promptdrop import weights


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are quickest on one thread, many times so on a busy machine."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def drawn(scene: Scene, height: int, width: int, rng: random.Random) -> NDArray[np.uint8]:
    """The pixels [height, width, 3] of a scene as it is drawn for training."""
    image = render(torch.tensor([pack(scene, place(scene, height, width, rng))]), height, width)[0]
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_the_judge_reads_drawn_scenes() -> None:
    """Every attribute of at least 99% of 300 drawn scenes is read back, at any size."""
    rng = random.Random(1)
    right = 0
    for i in range(300):
        height, width = rng.randrange(128, 257, 16), rng.randrange(128, 257, 16)
        scene = sample_scene(rng, two=i % 2 == 1)
        right += all(compare(look(drawn(scene, height, width, rng)), scene).values())

    assert right >= 297


def test_the_judge_tells_a_wrong_picture() -> None:
    """A picture of another scene is not right."""
    rng = random.Random(2)
    for i in range(40):
        asked, other = (sample_scene(rng, two=i % 2 == 1) for _ in range(2))

        assert not is_right(look(drawn(other, 160, 192, rng)), asked)


@pytest.mark.parametrize("two", [False, True])
def test_the_judge_tells_a_picture_wrong_in_one_way(two: bool) -> None:
    """A picture with one attribute other than asked is wrong in this kind of attribute only."""
    rng = random.Random(5)
    for kind in ("colour", "shape", "background", "place"):
        for _ in range(25):
            asked = sample_scene(rng, two)
            other = otherwise(asked, kind, rng)
            report = compare(look(drawn(other, 160, 192, rng)), asked)

            assert [k for k, right in report.items() if not right] == [kind], (asked, other)


def otherwise(scene: Scene, kind: str, rng: random.Random) -> Scene:
    """A scene that differs in one kind of attribute: the first thing's, the background or the place."""
    taken = {thing.colour for thing in scene.things} | {scene.background}
    colour = rng.choice([c for c in COLOURS if c not in taken])
    first, *rest = scene.things
    shape = rng.choice([s for s in SHAPES if s not in {thing.shape for thing in scene.things}])
    if kind == "place" and scene.relation:
        return replace(scene, relation=INVERSE[scene.relation])
    if kind == "place":
        return replace(scene, position=rng.choice([p for p in POSITIONS if p != scene.position]))
    changed = {
        "colour": replace(scene, things=(replace(first, colour=colour), *rest)),
        "shape": replace(scene, things=(replace(first, shape=shape), *rest)),
        "background": replace(scene, background=colour),
    }
    return changed[kind]


def test_noise_is_not_clean() -> None:
    """Random pixels are no picture of this world."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)

    assert not look(noise).clean


def test_training_never_sees_a_held_out_picture() -> None:
    """Held-out scenes are not among 20,000 scenes of training, in any sizes or order."""
    rng = random.Random(3)
    trained = {picture_of(sample_training_scene(rng)) for _ in range(20_000)}
    held_out = [case.asked for case in held_out_cases(500) if said_all(case.asked)]

    assert len(held_out) >= 440
    assert not [scene for scene in held_out if picture_of(scene) in trained]


def test_an_unseen_combination_is_new_only_as_a_whole() -> None:
    """Training draws every two attributes of a held-out triple together, but never all three."""
    rng = random.Random(3)
    unseen = [c.asked for c in held_out_cases(500) if c.kind == "one object, unseen combination"]
    trained = {triple(sample_training_scene(rng)) for _ in range(20_000)}
    halves = {half for found in trained for half in combinations(found, 2)}

    assert not trained & {triple(scene) for scene in unseen}
    assert all(half in halves for scene in unseen for half in combinations(triple(scene), 2))


def said_all(scene: Scene) -> bool:
    return scene.background is not None and (scene.position or scene.relation) is not None


def picture_of(scene: Scene) -> Scene:
    """The scene without sizes and with its things in a fixed order, to compare pictures by."""
    bare = replace(scene, things=tuple(replace(thing, size=None) for thing in scene.things))
    return min(bare, turned(bare), key=repr)


def triple(scene: Scene) -> tuple[str | None, ...]:
    """Colour, shape and position of the first thing."""
    return (scene.things[0].colour, scene.things[0].shape, scene.position)


def test_a_training_batch_is_made_from_its_number() -> None:
    """Batch 5 is the same however training came to it, and its prompts pad to one length."""
    tokenizer = model.build_tokenizer()
    course = Course(128, 160, 64, pictures=6 * CHUNK)
    first, again = (CaptionedChunks(Prompts(tokenizer), 0, course)[5] for _ in range(2))

    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.pictures.packed, again.pictures.packed)
    assert bool((first.lengths > first.ids.shape[1] - model.SEQUENCE_MULTIPLE).all())


def test_captions_are_short_and_never_empty() -> None:
    """A caption of either language is at most 64 tokens with its chat template."""
    tokenizer = model.build_tokenizer()
    rng = random.Random(4)
    for i in range(200):
        asked = forget(sample_scene(rng, two=i % 2 == 1), rng)
        text = describe(asked, rng, chinese=i % 4 > 1)

        assert text
        assert len(tokenizer(model.templated(tokenizer, text)).input_ids) <= 64


def test_training_runs_the_pipelines_own_function() -> None:
    """predict_velocity computes ZImageTransformer2DModel.forward; encode_text encodes as the pipeline does."""
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer()
    encoder, transformer = model.build_text_encoder(tokenizer).eval(), model.build_transformer()
    pipe = model.assemble(tokenizer, encoder, transformer, model.build_vae())
    prompts = ["a red circle above a blue square", "右边有一个小的绿色三角形"]
    reader = Prompts(tokenizer)
    ids = reader.tokenize(prompts)
    lengths = torch.tensor([len(row) for row in ids])  # [2]
    latents, t = torch.randn(2, 16, 18, 20), torch.rand(2)  # [2, 16, h, w], [2]
    with torch.no_grad():
        embeds = pipe.encode_prompt([*prompts], do_classifier_free_guidance=False)[0]
        frames = list(latents.unsqueeze(2).unbind())  # each [16, 1, h, w]
        expected = torch.stack(transformer(frames, t, embeds, return_dict=False)[0]).squeeze(2)
        text = model.encode_text(encoder, reader.pad(ids, model.SEQUENCE_MULTIPLE))  # [2, 32, dim]
        model.quicken(transformer)
        rotary = model.build_rotary(transformer, rows=9, columns=10, length=text.shape[1])
        actual = model.predict_velocity(transformer, latents, t, text, lengths, rotary)

    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The finished stages of an earlier run are kept, and the last goes on from its saved step."""
    plan = Plan(
        work=tmp_path / "work", out=tmp_path / "out" / "checkpoint", device="cpu", workers=0,
        vae_steps=1, vae_pixels=160 * 160, words_steps=1, words_prompts=2, flow_steps=1,
        flow_tokens=96, courses=(Course(128, 128, 32, pictures=1),) * 2, eval_prompts=0, compile=False,
    )  # fmt: skip
    plan.out.parent.mkdir()
    train(plan)
    first = {file.name: file.read_bytes() for file in plan.work.glob("*/*.safetensors")}
    words = (plan.work / "words.pt").read_bytes()
    train(replace(plan, flow_steps=3))
    log = json.loads((plan.work / "log.json").read_text())

    assert first == {file.name: file.read_bytes() for file in plan.work.glob("*/*.safetensors")}
    assert words == (plan.work / "words.pt").read_bytes()
    assert [row["step"] for row in log["flow"]] == [1, 3]
    assert [len(log[stage]) for stage in ("vae", "words")] == [1, 1]
    assert not weights.missing_files(plan.out)
