"""Picture files: their pixels, and what they say about themselves."""

import io
import random

import pytest
from PIL import Image

from promptdrop.nouns import FORMATS
from promptdrop.picture import encode, placeholder, read_parameters
from promptdrop.request.infotext import format_infotext

WIDTH, HEIGHT = 64, 48
PIXELS = random.Random(7).randbytes(WIDTH * HEIGHT * 3)
TRAINED = b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_picture_has_the_format_and_size_asked_for(format_):
    """It has both for any buffer of uint8 [height, width, 3]."""
    data = encode(memoryview(PIXELS), WIDTH, HEIGHT, format_, 92, None)

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert (image.format, image.size, image.mode) == (format_.upper(), (WIDTH, HEIGHT), "RGB")


def test_png_keeps_every_pixel():
    """Pixels are read back as they were, rows from the top, RGB."""
    data = encode(PIXELS, WIDTH, HEIGHT, "png", 92, "a cat")

    with Image.open(io.BytesIO(data)) as image:
        assert image.tobytes() == PIXELS


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("prompt", ["a cat", "é", "猫 😀\nsecond line", "", "x" * 20_000])
def test_the_infotext_comes_back(tmp_path, format_, prompt):
    """It is read back from PNG's `parameters` or from EXIF's UserComment."""
    file = tmp_path / "picture"
    file.write_bytes(encode(PIXELS, WIDTH, HEIGHT, format_, 92, prompt))

    assert read_parameters(file) == prompt


@pytest.mark.parametrize("format_", FORMATS)
def test_a_picture_says_that_a_model_made_it(format_):
    """Its XMP has IPTC's digital source type."""
    data = encode(PIXELS, WIDTH, HEIGHT, format_, 92, "a cat")

    assert TRAINED in data


@pytest.mark.parametrize("format_", FORMATS)
def test_without_an_infotext_there_is_no_metadata(tmp_path, format_):
    """A picture without an infotext (output.embed_metadata: false) has no metadata at all."""
    file = tmp_path / "picture"
    file.write_bytes(encode(PIXELS, WIDTH, HEIGHT, format_, 92, None))

    assert read_parameters(file) is None
    assert TRAINED not in file.read_bytes()


@pytest.mark.parametrize("format_", FORMATS)
def test_the_same_input_gives_the_same_bytes(format_):
    """Neither clock nor random names go into a picture."""
    first, second = (encode(PIXELS, WIDTH, HEIGHT, format_, 92, "a cat") for _ in range(2))

    assert first == second


def test_a_jpeg_cuts_a_comment_of_more_than_64_kib(tmp_path):
    """The prompt's end goes, the settings stay, and the comment says so."""
    infotext = format_infotext("😀" * 20_000, "b" * 20_000, {"Steps": 9, "Sampler": "Euler"})
    file = tmp_path / "picture.jpg"
    file.write_bytes(encode(PIXELS, WIDTH, HEIGHT, "jpeg", 92, infotext))
    comment = read_parameters(file)

    assert comment is not None
    assert comment.startswith("😀" * 16_000)
    assert comment.endswith(
        "😀... (cut: a JPEG holds 64 KiB of comment; the sidecar has all of it)\n"
        "Steps: 9, Sampler: Euler"
    )


@pytest.mark.parametrize("length", range(32_700, 32_770))
def test_the_cut_is_exact_to_the_byte(length):
    """No length of one endless line fails the image."""
    data = encode(PIXELS[: 16 * 16 * 3], 16, 16, "jpeg", 92, "a" * length)

    assert data.startswith(b"\xff\xd8")


def test_jpeg_comments_are_what_exif_says_they_are():
    """UserComment begins with UNICODE and is UTF-16 in the byte order of the block."""
    data = encode(PIXELS, WIDTH, HEIGHT, "jpeg", 92, "猫")

    with Image.open(io.BytesIO(data)) as image:
        exif = image.getexif()
        assert exif.endian == ">"
        assert exif.get_ifd(0x8769)[0x9286] == b"UNICODE\0" + "猫".encode("utf-16-be")


def test_quality_matters_but_for_png():
    """A higher quality gives larger files in every format but PNG."""
    sizes = {f: [len(encode(PIXELS, WIDTH, HEIGHT, f, q, None)) for q in (10, 95)] for f in FORMATS}

    assert {f: low < high for f, (low, high) in sizes.items()} == {
        "png": False,
        "jpeg": True,
        "webp": True,
        "avif": True,
    }


def test_pixels_of_another_size_are_a_fault_of_ours():
    """They raise an error, and give no torn image."""
    with pytest.raises(ValueError, match="9 bytes are not 64x48 RGB pixels"):
        encode(b"123456789", WIDTH, HEIGHT, "png", 92, None)


@pytest.mark.parametrize("size", [(64, 64), (1024, 768), (64, 4096), (4096, 64)])
def test_a_placeholder_is_striped_and_has_words(size):
    """It has the size asked for, and dark words on white."""
    pixels = placeholder(*size, "image 3 timed out after 60 s")
    image = Image.frombytes("RGB", size, pixels)
    colours = {colour for _, colour in image.getcolors(1 << 24) or ()}

    assert {(255, 204, 0), (40, 40, 40), (255, 255, 255)} <= colours
    assert max(min(colours)) < 40  # letters, smoothed where they are small


def test_a_placeholder_shows_its_own_text():
    """Two reasons give two pictures, the same reason the same picture."""
    first, again, other = (placeholder(256, 256, text) for text in ("timed out", "timed out", "x"))

    assert first == again
    assert first != other
