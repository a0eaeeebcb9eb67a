import numpy as np
import pytest
from PIL import Image

from applications.align import pyramid


def pieces_of(sizes: list[tuple[int, int]]) -> list[pyramid.Piece]:
    return [piece for number, size in enumerate(sizes) for piece in pyramid.cut(number, 0, 1.0, size, overlap=10)]


def test_scales_from_smallest_face_to_image_size():
    scales = pyramid.scales(250, 300, min_face=20, window=12)
    assert scales[0] == 0.6
    np.testing.assert_allclose(np.divide(scales[1:], scales[:-1]), 0.707)
    assert 250 * scales[-1] > 12 >= 250 * scales[-1] * 0.707
    assert pyramid.scales(20, 300, min_face=20, window=12) == []


def test_resize_matches_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (97, 130, 3), dtype=np.uint8)
    level = pyramid.resize(pixels[None], 41, 55)[0]
    expected = np.asarray(Image.fromarray(pixels).resize((55, 41), Image.Resampling.BILINEAR))
    assert np.abs(level.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(5, 5), (512, 512), (513, 100), (1014, 1015), (3000, 20)])
def test_cut_pieces_cover_the_level_and_overlap(size):
    seen = np.zeros(size, int)
    for piece in pieces_of([size]):
        assert piece.height <= pyramid.SIDE and piece.width <= pyramid.SIDE
        assert piece.top % 2 == piece.left % 2 == 0
        seen[piece.top : piece.top + piece.height, piece.left : piece.left + piece.width] += 1
    assert seen.min() == 1
    if max(size) <= pyramid.SIDE:
        assert seen.max() == 1


def test_pack_places_pieces_without_overlap():
    rng = np.random.default_rng(2)
    pieces = pieces_of([tuple(rng.integers(3, 700, 2)) for _ in range(60)])
    placed = pyramid.pack(pieces)
    assert sorted(map(id, pieces)) == sorted(id(piece) for piece, _ in placed)
    canvases = np.zeros((1 + max(place.canvas for _, place in placed), pyramid.SIDE, pyramid.SIDE), int)
    for piece, place in placed:
        assert place.top % 2 == place.left % 2 == 0
        assert place.top + piece.height <= pyramid.SIDE and place.left + piece.width <= pyramid.SIDE
        canvases[place.canvas, place.top : place.top + piece.height, place.left : place.left + piece.width] += 1
    assert canvases.max() == 1
    assert canvases.mean() > 0.7


def test_paint_draws_pieces_at_their_places():
    images = [np.full((size, size + 9, 3), size, np.uint8) for size in (30, 100, 200)]
    pieces = [
        piece
        for number, image in enumerate(images)
        for level, scale in enumerate((0.6, 0.3))
        for piece in pyramid.cut(number, level, scale, pyramid.level_size(image, scale), overlap=10)
    ]
    placed = pyramid.pack(pieces)
    canvases = pyramid.paint(images, placed)
    left = sum(int((canvas > 0).sum()) for canvas in canvases)
    for piece, place in placed:
        window = canvases[place.canvas][place.top :, place.left :][: piece.height, : piece.width]
        assert (window == images[piece.image][0, 0, 0]).all()
        left -= window.size
    assert left == 0


def test_pack_without_pieces_makes_no_canvas():
    assert pyramid.pack([]) == [] and pyramid.paint([], []) == []
