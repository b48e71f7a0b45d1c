"""Pixels to a picture file that says how it was made: PNG, JPEG, WebP or AVIF.

The same input gives the same bytes, as long as Pillow and its codecs stay the same.
"""

import io
import struct
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

# 1024x1024, two cores, zlib-ng: a photo-like picture takes 170 ms and 1.82 MB at level 1, 425 ms
# and 1.56 MB at level 6; a smooth one 31 ms and 58 ms. A render takes 700 ms: time is dearer than disk.
PNG_COMPRESS_LEVEL = 1
AVIF_SPEED = 8  # 0 to 10; 156 ms instead of 665 ms at the default 6, and 2% more bytes

JPEG_EXIF_BYTES = 65_533  # the length of an APP1 segment is 16 bit and counts itself
_CUT = "... (cut: a JPEG holds 64 KiB of comment; the sidecar has all of it)"

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\0"  # EXIF 2.32, table 9
_LONG, _UNDEFINED = 4, 7  # types of a value, TIFF 6.0 section 2
_DIRECTORY_BYTES = 2 + 12 + 4  # of an IFD with one entry

# https://iptc.org/std/photometadata/specification/ (Digital Source Type)
XMP = b"""<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def encode(
    pixels: bytes | memoryview,
    width: int,
    height: int,
    format: str,  # noqa: A002 - the contract's word
    quality: int,
    infotext: str | None,
) -> bytes:
    """Encode `pixels` (uint8 [height, width, 3], RGB) as a picture file.

    format: `png`, `jpeg`, `webp`, `avif`. quality: 1 to 100, ignored for png.
    infotext: None for a file without any metadata. A JPEG holds 64 KiB of it, as UTF-16: a longer
    one is cut before its last line.
    """
    if len(pixels) != width * height * 3:
        raise ValueError(f"{len(pixels)} bytes are not {width}x{height} RGB pixels")
    rows = ("RGB", 0, 1)  # without padding, the top one first
    image = Image.frombuffer("RGB", (width, height), pixels, "raw", *rows)  # type: ignore[arg-type]  # any buffer does
    options: dict[str, Any] = {"quality": quality}
    if format == "png":
        options = {"compress_level": PNG_COMPRESS_LEVEL}
    elif format == "avif":
        options["speed"] = AVIF_SPEED
    if infotext is not None:
        options |= _png_metadata(infotext) if format == "png" else _metadata(infotext, format)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read_parameters(path: Path) -> str | None:
    """The infotext embedded in a picture file, read as A1111 does; None if there is none."""
    with Image.open(path) as image:
        if isinstance(text := image.info.get("parameters"), str):
            return str(text)
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return None
    return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")


def placeholder(width: int, height: int, text: str) -> bytes:
    """Pixels that nobody takes for a rendered picture: stripes, and `PLACEHOLDER: text` across them.

    Returns: uint8 [height, width, 3], RGB.
    """
    image = Image.new("RGB", (width, height), (255, 204, 0))
    draw = ImageDraw.Draw(image)
    stripe = max(16, min(width, height) // 8)  # px
    for left in range(-height, width, 2 * stripe):
        right = left + stripe
        corners = [(left, height), (right, height), (right + height, 0), (left + height, 0)]
        draw.polygon(corners, fill=(40, 40, 40))
    size = max(10, min(width, height) // 24)  # px
    font = ImageFont.load_default(size)
    columns = max(8, int(width * 0.9 / (size * 0.55)))  # a letter is about half as wide as high
    lines = textwrap.wrap(f"PLACEHOLDER: {text}", columns)[: max(1, height // (2 * size))]
    shown, center = "\n".join(lines), (width / 2, height / 2)
    box = draw.multiline_textbbox(center, shown, font, anchor="mm", align="center")
    draw.rectangle((box[0] - size, box[1] - size, box[2] + size, box[3] + size), fill="white")
    draw.multiline_text(center, shown, "black", font, anchor="mm", align="center")
    return image.tobytes()


def _png_metadata(infotext: str) -> dict[str, Any]:
    """Return the options of `Image.save` for a PNG with this infotext."""
    info = PngInfo()
    info.add_text("parameters", infotext)  # tEXt, or iTXt where Latin-1 does not do
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return {"pnginfo": info}


def _metadata(infotext: str, format: str) -> dict[str, Any]:  # noqa: A002 - as in encode
    """Return the options of `Image.save` for another format with this infotext."""
    exif = _exif(infotext)
    if format == "jpeg" and len(exif) > JPEG_EXIF_BYTES:
        exif = _exif(_cut(infotext, JPEG_EXIF_BYTES - len(_exif(""))))
    return {"exif": exif, "xmp": XMP}


def _cut(infotext: str, limit: int) -> str:
    """Cut the infotext to at most `limit` bytes of UTF-16; its last line stays."""
    head, _, last = infotext.rpartition("\n")
    tail = f"{_CUT}\n{last}"
    room = limit - len(_utf16(tail))
    if room < 0:  # a last line that is too long by itself
        head, tail = infotext, _CUT
        room = limit - len(_utf16(tail))
    return _utf16(head)[:room].decode("utf-16-be", "ignore") + tail


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-be", "replace")


def _exif(comment: str) -> bytes:
    """An EXIF block with nothing but a UserComment, in big-endian as piexif and A1111 write it.

    TIFF 6.0 section 2: header, IFD 0 with one pointer, the EXIF IFD with one value.
    """
    value = _UNICODE + _utf16(comment)
    start = 8  # of IFD 0, in bytes from the start of the TIFF header
    header = b"Exif\0\0MM\0*" + struct.pack(">L", start)
    pointer = _directory(_EXIF_IFD, _LONG, 1, start + _DIRECTORY_BYTES)
    user_comment = _directory(_USER_COMMENT, _UNDEFINED, len(value), start + 2 * _DIRECTORY_BYTES)
    return header + pointer + user_comment + value


def _directory(tag: int, kind: int, count: int, value: int) -> bytes:
    """An IFD of one entry: how many entries, the entry, no next IFD."""
    entry = struct.pack(">HHLL", tag, kind, count, value)
    return struct.pack(">H", 1) + entry + struct.pack(">L", 0)
