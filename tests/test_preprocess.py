"""Photographs to pixels: against a transcription of the authors' transform, and every kind of file that a folder may hold."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from dualmatch.runtime import preprocess
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import Preprocess, open_rgb

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [
    (500, 375),
    (375, 500),
    (333, 500),
    (500, 333),
    (256, 256),
    (224, 224),
    (100, 80),
    (1000, 97),
    (97, 1000),
    (257, 256),
]


def photograph(width=60, height=40, mode="RGB", seed=0):
    """Smooth blotches, so that a shift by a pixel shows and JPEG keeps them."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def authors_transform(image):
    """The DSRAN authors' evaluation transform, written out from its description: Resize(256), CenterCrop(224), to [0, 1], normalise."""
    width, height = image.size
    if width < height:
        new_width, new_height = 256, int(256 * height / width)
    else:
        new_width, new_height = int(256 * width / height), 256
    pixels = np.asarray(image.resize((new_width, new_height), Image.BILINEAR))
    top = round((new_height - 224) / 2.0)
    left = round((new_width - 224) / 2.0)
    pixels = pixels[top : top + 224, left : left + 224]
    channels = [(pixels[..., c] / 255.0 - MEAN[c]) / STD[c] for c in range(3)]
    return np.stack(channels)


@pytest.mark.parametrize("size", SIZES)
def test_crop_is_the_authors_evaluation_transform(size):
    image = photograph(*size)
    ours = Preprocess(image_size=224, resize="crop", mean=MEAN, std=STD)(image)
    assert ours.shape == (3, 224, 224)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, authors_transform(image), atol=2e-6)


def test_the_comparison_with_the_authors_would_notice_a_shift_by_one_pixel():
    image = photograph(333, 500)
    ours = Preprocess(image_size=224, resize="crop", mean=MEAN, std=STD)(image)
    assert np.abs(ours[:, :, 1:] - authors_transform(image)[:, :, :-1]).max() > 1e-3


@pytest.mark.parametrize("image_size", [32, 96, 224, 320])
def test_squash_scales_the_whole_photograph(image_size):
    image = photograph(300, 120)
    chosen = Preprocess(image_size=image_size, resize="squash", mean=MEAN, std=STD)
    wanted = np.asarray(image.resize((image_size, image_size), Image.BILINEAR)).astype(np.float64)
    wanted = ((wanted / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(chosen(image), wanted, atol=2e-6)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_interpolation_is_the_one_that_was_asked_for(resize):
    image = photograph(500, 375)
    got = {
        name: Preprocess(image_size=64, resize=resize, mean=MEAN, std=STD, interpolation=name)(image)
        for name in ("bilinear", "bicubic")
    }
    if resize == "squash":
        wanted = np.asarray(image.resize((64, 64), Image.BICUBIC)).astype(np.float64)
    else:
        wanted = np.asarray(image.resize((97, 73), Image.BICUBIC).crop((16, 4, 80, 68))).astype(np.float64)
    wanted = ((wanted / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(got["bicubic"], wanted, atol=2e-6)
    assert np.abs(got["bicubic"] - got["bilinear"]).max() > 1e-3


@pytest.mark.parametrize("image_size", [32, 96, 320])
@pytest.mark.parametrize("size", SIZES)
def test_crop_has_its_size_for_every_shape_of_photograph(image_size, size):
    chosen = Preprocess(image_size=image_size, resize="crop", mean=MEAN, std=STD)
    assert chosen.fit(photograph(*size)).size == (image_size, image_size)


def test_path_bytes_and_image_give_the_same_pixels(tmp_path):
    chosen = Preprocess(image_size=32, resize="squash", mean=MEAN, std=STD)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photograph()))
    wanted = chosen(path)
    for given in (str(path), path.read_bytes(), photograph()):
        np.testing.assert_array_equal(chosen(given), wanted)


def test_training_and_serving_use_the_same_code():
    pytest.importorskip("torch")
    from dualmatch.models import trunks
    from dualmatch.models.config import TrunkConfig
    from dualmatch.training import batches, checkpoint, encode

    assert type(trunks.preprocess_of(TrunkConfig(name="tiny", frozen=False, image_size=32), "squash")) is Preprocess
    for module in (batches, checkpoint, encode):
        assert module.Preprocess is Preprocess
    assert batches.open_rgb is open_rgb


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = photograph(64, 48)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "PNG", exif=exif)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # fmt: skip
    wanted = image.transpose(undo[orientation]) if orientation in undo else image
    np.testing.assert_array_equal(np.asarray(open_rgb(data)), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composed_on_white(mode):
    image = photograph(8, 8, "L").convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((8, 8)))
    got = np.asarray(open_rgb(encoded(image))).astype(float)
    grey, alpha = (np.asarray(band).astype(float) for band in (image.getchannel(0), image.getchannel("A")))
    wanted = grey * alpha / 255 + 255 * (1 - alpha / 255)
    np.testing.assert_allclose(got, np.repeat(wanted[..., None], 3, axis=2), atol=1)


def test_a_palette_keeps_its_colours_and_its_transparent_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 0, 255])
    image.putdata([0, 1])
    assert np.asarray(open_rgb(encoded(image))).tolist() == [[[200, 10, 20], [0, 0, 255]]]
    assert np.asarray(open_rgb(encoded(image, transparency=1))).tolist() == [[[200, 10, 20], [255, 255, 255]]]


def test_grey_becomes_three_equal_channels():
    image = photograph(mode="L")
    got = np.asarray(open_rgb(encoded(image, "JPEG", quality=95)))
    assert (got == got[..., :1]).all()
    assert np.abs(got[..., 0].astype(int) - np.asarray(image)).max() < 12


def test_sixteen_bits_keep_their_brightness():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = np.asarray(open_rgb(encoded(Image.fromarray(ramp)))).astype(int)
    assert np.abs(got - (ramp // 256)[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
    with pytest.raises(DualmatchError, match="32-bit pixels"):
        open_rgb(encoded(photograph(mode="L").convert(mode), "TIFF"))


def test_sixteen_bits_of_either_byte_order():
    ramp = np.linspace(0, 65535, 256).astype(">u2").reshape(16, 16)
    image = Image.frombytes("I;16B", (16, 16), ramp.tobytes())
    got = np.asarray(open_rgb(encoded(image, "TIFF"))).astype(int)
    assert np.abs(got - (ramp // 256)[..., None]).max() <= 1


def test_cmyk_is_converted():
    image = photograph(mode="RGB")
    got = np.asarray(open_rgb(encoded(image.convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert np.abs(got - np.asarray(image)).mean() < 6


def test_one_bit_images_are_black_and_white():
    image = photograph(mode="1")
    assert set(np.unique(np.asarray(open_rgb(encoded(image))))) == {0, 255}


def test_an_animation_gives_its_first_frame():
    frames = [photograph(seed=seed) for seed in (0, 1)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = np.asarray(frames[0].quantize().convert("RGB")).astype(int)
    assert np.abs(np.asarray(open_rgb(data)).astype(int) - first).mean() < 10


def damaged_files():
    good = encoded(photograph(200, 150), "JPEG", quality=90)
    png = encoded(photograph(200, 150))
    return {
        "truncated jpeg": good[: len(good) // 2],
        "header only": good[:40],
        "truncated png": png[: len(png) // 2],
        "png with a flipped byte": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "text": b"not an image",
        "empty": b"",
        "html": b"<!doctype html><title>404</title>",
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_damage_is_one_sentence(kind, tmp_path):
    data = damaged_files()[kind]
    with pytest.raises(DualmatchError, match=r"^the image .+\.$"):
        open_rgb(data)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(DualmatchError, match=r"photo\.jpg") as found:
        open_rgb(path)
    assert "\n" not in str(found.value)


def test_a_missing_file_and_a_folder_are_said_to_be_that(tmp_path):
    with pytest.raises(DualmatchError, match=r"there is no file .*none\.jpg"):
        open_rgb(tmp_path / "none.jpg")
    with pytest.raises(DualmatchError, match="cannot be decoded"):
        open_rgb(tmp_path)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded(photograph(60, 40))
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 60 * 40)
    assert open_rgb(data).size == (60, 40)
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 60 * 40 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the bomb was decoded"))
    with pytest.raises(DualmatchError, match="60 x 40 pixels, above the limit of 2399"):
        open_rgb(data)


def test_pillows_own_limit_is_one_sentence_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DualmatchError, match="is refused: "):
        open_rgb(encoded(photograph(60, 40)))


def test_an_open_image_is_not_changed():
    image = photograph(mode="RGBA")
    before = image.tobytes()
    open_rgb(image)
    Preprocess(image_size=32, resize="crop", mean=MEAN, std=STD)(ImageOps.mirror(image))
    assert image.tobytes() == before
    assert image.mode == "RGBA"


def test_a_limit_above_pillows_own_is_kept_while_it_is_open(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above it and refuses above its double
    data = encoded(photograph(60, 40))
    with preprocess.pixel_limit(2400):
        assert open_rgb(data).size == (60, 40)
        assert Image.MAX_IMAGE_PIXELS is None
    assert (preprocess.MAX_PIXELS, Image.MAX_IMAGE_PIXELS) == (200_000_000, 1000)
    with preprocess.pixel_limit(2399), pytest.raises(DualmatchError, match="60 x 40 pixels, above the limit of 2399"):
        open_rgb(data)
    with pytest.raises(DualmatchError, match="at least 1"), preprocess.pixel_limit(0):
        pass


def test_postscript_never_reaches_ghostscript():
    buffer = BytesIO()
    photograph(60, 40).save(buffer, "EPS")
    with pytest.raises(DualmatchError, match="not an image that Pillow can read"):
        open_rgb(buffer.getvalue())


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_the_file_of_an_opened_photograph_is_closed(mode, tmp_path):
    image = Image.fromarray(np.zeros((4, 4), np.uint16)) if mode == "I;16" else photograph(8, 8).convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    rgb = open_rgb(path)
    path.unlink()
    assert rgb.mode == "RGB"
    assert np.asarray(rgb).shape[2] == 3
    assert getattr(rgb, "fp", None) is None


def test_whatever_a_reader_of_pillow_raises_is_one_sentence(monkeypatch):
    def broken(*_arguments, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr(preprocess.Image, "open", broken)
    with pytest.raises(DualmatchError, match="cannot be decoded: ZeroDivisionError"):
        open_rgb(b"x")
