"""Paint the colors of a head: a texture over (angle, y) of polygons and noise."""

import cv2
import numpy as np

from applications.demo.drawn.canvas import ACROSS, DOWN, Canvas, arch, both, curve, ellipse
from applications.demo.drawn.person import GREY_HAIR, HAIR_COLORS, IRIS_COLORS, SKIN_TONES, palette
from applications.demo.drawn.shape import HEIGHTS, Head, smoothstep


def paint(head: Head) -> np.ndarray:
    """Return the texture of a head, (rows * DOWN, columns * ACROSS, 3) RGB uint8, without light and shade."""
    skin = _skin(head).clip(0, 255).astype(np.uint8)
    canvas = Canvas(head, cv2.resize(skin, None, fx=ACROSS, fy=DOWN, interpolation=cv2.INTER_LINEAR))
    _marks(canvas)
    _wrinkles(canvas)
    _nose(canvas)
    _mouth(canvas)
    _eyes(canvas)
    _brows(canvas)
    return canvas.image


def hair_color(head: Head, grey_shift: float = 0) -> np.ndarray:
    """Return the color of the hair at the age of the image, (3,) RGB; `grey_shift` delays the grey, in years."""
    color = palette(HAIR_COLORS, head.person.hair)
    grey = smoothstep((head.condition.age - head.person.greying - grey_shift + 6) / 26)
    return (color + (GREY_HAIR - color) * 0.9 * grey).astype(np.float32)


def _skin(head: Head) -> np.ndarray:
    """Return the skin over the mesh, (rows, columns, 3) float32: tone, blush and shadow of the beard."""
    p, c = head.person, head.condition
    tone = palette(SKIN_TONES, p.skin) + np.array((p.skin_warm, 0, -p.skin_warm), np.float32)
    tone = tone * (1 - 0.04 * max(head.ageing, 0))
    # Blush on the cheeks, the tip of the nose and the ears.
    red = head.bump(22, 72, 11, 9) * (0.5 + 0.6 * p.blush) + 0.7 * head.bump(0, p.nose_y, 8, 7)
    red += 0.6 * (np.abs(np.abs(head.angles) - 1.6) < 0.25) * np.exp(-(((HEIGHTS - 58) / 12) ** 2))
    dark = 0.5 * head.bump(p.eye_x, p.eye_y, 9, 6)
    shave = head.beard_field * (0.1 + 0.12 * c.stubble * (1 - p.skin)) * (p.feminine < 0)
    planes = []
    for base, reddening, darkening, beard in zip(tone, (4, 22, 20), (0.1, 0.16, 0.14), hair_color(head), strict=True):
        plane = (base - red * (reddening * (1 - 0.4 * p.skin))) * (1 - dark * darkening)
        planes.append(plane + (beard * np.float32(0.8) - plane) * shave)
    return cv2.merge(planes)


def _marks(canvas: Canvas) -> None:
    """Paint freckles and a mole, at the same places in all images of a person."""
    p = canvas.head.person
    if p.freckles > 0.05 and p.skin < 0.55:
        rng = np.random.default_rng(int(p.mole_y * 1e6))
        spots = [ellipse(x, y, 0.55, 0.55, count=6) for x, y in rng.normal((0, 66), (17, 5), (int(60 * p.freckles), 2))]
        canvas.area(spots, canvas.skin * (0.76, 0.62, 0.52), alpha=0.5)
    if p.mole_strength > 0.2:
        canvas.area(ellipse(p.mole_x, p.mole_y, 0.9, 0.9, count=10), canvas.skin * 0.4, alpha=min(p.mole_strength, 1))


def _wrinkles(canvas: Canvas) -> None:
    """Paint lines of age; a smile deepens the lines next to mouth and eyes."""
    p, c = canvas.head.person, canvas.head.condition
    old = float(np.clip(canvas.head.ageing, 0, 1.3)) * p.wrinkling
    shade = canvas.skin * (0.62, 0.5, 0.45)
    smile = max(c.smile, 0)
    fold = [(p.nose_width + 1, p.nose_y - 2), (p.mouth_width + 2, 83), (p.mouth_width + 3.5 + 1.5 * smile, 91)]
    canvas.line(both(curve(fold)), 1.0, shade, alpha=min(0.02 + 0.45 * old + 0.16 * smile, 0.8), blur=0.8)
    bag = [(p.eye_x - 7, p.eye_y + 5), (p.eye_x, p.eye_y + 8.5), (p.eye_x + 7, p.eye_y + 5)]
    canvas.line(both(curve(bag)), 0.8, shade, alpha=0.03 + 0.5 * old, blur=0.7)
    feet = []
    for lift in (-3, 0.5, 4):
        foot = [(p.eye_x + 10, p.eye_y + 0.4 * lift), (p.eye_x + 15, p.eye_y + 1.3 * lift + 1)]
        feet += both(np.array(foot))
    canvas.line(feet, 0.6, shade, alpha=old * (0.35 + 0.3 * smile), blur=0.4)
    jowl = np.array([(p.mouth_width + 1, p.mouth_y + 3), (p.mouth_width + 2.5, p.mouth_y + 11)])
    canvas.line(both(jowl), 1.0, shade, alpha=0.8 * (old - 0.4), blur=0.8)
    furrows = []
    for index in range(3):
        y = p.eye_y - 19 - 6 * index
        furrows.append(curve([(-20 + index, y + 1), (-8, y - 0.8), (0, y + 0.4), (8, y - 0.8), (20 - index, y + 1)]))
    canvas.line(furrows, 0.7, shade, alpha=0.5 * old, blur=0.5)


def _nose(canvas: Canvas) -> None:
    p = canvas.head.person
    shade = canvas.skin * (0.55, 0.42, 0.38)
    wing = [(p.nose_width - 0.4, p.nose_y - 3.5), (p.nose_width + 0.6, p.nose_y), (p.nose_width - 1.4, p.nose_y + 3)]
    canvas.line(both(curve(wing)), 0.8, shade, alpha=0.4, blur=0.5)
    hole = ellipse(p.nose_width * 0.45, p.nose_y + 3.7, p.nostril, p.nostril * 0.6)
    canvas.area(both(hole), canvas.skin * 0.3, alpha=0.65, blur=0.35)
    under = curve([(-p.nose_width * 0.5, p.nose_y + 5), (0, p.nose_y + 5.6), (p.nose_width * 0.5, p.nose_y + 5)])
    canvas.line(under, 1.2, shade, alpha=0.25, blur=0.8)
    canvas.area(ellipse(0, p.nose_y - 1.5, 1.8, 1.6), (255, 250, 245), alpha=0.14, blur=0.9)


def _mouth(canvas: Canvas) -> None:
    p, c = canvas.head.person, canvas.head.condition
    half, corner = canvas.head.mouth_corner
    gap = 0.3 + 3.8 * c.mouth_open
    thin = 1 - 0.22 * max(canvas.head.ageing, 0)
    upper, lower = p.upper_lip * thin * (1 - 0.15 * c.smile), p.lower_lip * thin
    middle = p.mouth_y + 0.8 * c.smile
    red = np.array((190, 84, 86), np.float32) * (1.06 - 0.35 * p.skin)
    lip = canvas.skin * 0.88 + (red - canvas.skin * 0.88) * np.clip(0.2 + 0.5 * p.lip_red, 0, 0.8)
    peak = middle - gap * 0.4 - upper
    bow = [(-half, corner), (-half * 0.55, peak + 0.9), (-2.4, peak - p.cupid * 0.4), (0, peak + p.cupid)]
    top = curve(bow + [(-x, y) for x, y in bow[2::-1]], 19)
    top_inner = arch(half, corner, middle - gap * 0.4)
    low_inner = arch(half, corner, middle + gap * 0.7)
    low = arch(half, corner, middle + gap * 0.7 + lower)
    inner = np.concatenate([top_inner, low_inner[::-1]])
    canvas.area(low + (0, 1.6), canvas.skin * (0.6, 0.5, 0.46), alpha=0.35, blur=1.2)
    canvas.area(np.concatenate([top, low[::-1]]), lip, alpha=0.9, blur=0.3)
    canvas.area(np.concatenate([top, top_inner[::-1]]), lip * 0.84, alpha=0.7, blur=0.25)
    canvas.area(
        ellipse(0, middle + gap * 0.7 + lower * 0.5, half * 0.35, lower * 0.22), lip * 0.4 + 150, alpha=0.25, blur=0.6
    )
    if c.mouth_open > 0.12:
        canvas.area(inner, (84, 34, 36), alpha=1, blur=0.15)
        teeth = np.concatenate([top_inner, (top_inner + (0, gap * 0.66))[::-1]]) * (0.88, 1)
        canvas.area(teeth, (246, 241, 234), alpha=0.95, blur=0.15, clip=inner)
    canvas.line(top_inner, 0.5, lip * (0.5, 0.36, 0.38), alpha=0.7, blur=0.2)
    canvas.area(both(ellipse(half, corner, 1.0, 0.9)), canvas.skin * 0.5, alpha=0.4, blur=0.5)


def _eyes(canvas: Canvas) -> None:
    p, c = canvas.head.person, canvas.head.condition
    high = p.eye_height * c.eyelid * (1 - 0.12 * max(canvas.head.ageing, 0))
    wide, bow = p.eye_width, p.eye_round
    tilt = np.array(((1, -np.sin(p.eye_tilt)), (0, 1)))

    def at(points: np.ndarray) -> list[np.ndarray]:
        return both(points @ tilt + (p.eye_x, p.eye_y))

    tips = ((-wide, 0.8), (wide, 0))
    flank = (-wide * 0.5, -high * (0.74 - bow)), (wide * 0.55, -high * (0.74 + bow))
    upper = curve([tips[0], flank[0], (0.3, -high), flank[1], tips[1]])
    lower = curve([tips[0], (-wide * 0.45, high * 0.58), (0.3, high * 0.78), (wide * 0.55, high * 0.62), tips[1]])
    opening = at(np.concatenate([upper, lower[::-1]]))
    lid, lash = canvas.skin * (0.5, 0.4, 0.36), canvas.skin * 0.14 + 12
    canvas.area(at(upper - (0, 1.6)), canvas.skin * (0.8, 0.7, 0.66), alpha=0.45, blur=1.2)
    canvas.line(at(upper * (1.02, 1) - (0, p.eye_crease)), 0.6, lid, alpha=0.5, blur=0.35)
    canvas.area(opening, (243, 240, 237))
    y = p.eye_y - 0.3 - 0.1 * high + c.gaze[1]
    iris = palette(IRIS_COLORS, p.iris)

    def disc(size: float, dx: float = 0, dy: float = 0) -> list[np.ndarray]:
        return [ellipse(side * p.eye_x + c.gaze[0] + dx, y + dy, size, size, count=16) for side in (-1, 1)]

    canvas.area(disc(p.iris_size), iris * 0.45, clip=opening)
    canvas.area(disc(p.iris_size * 0.82, dy=0.25), iris * 1.2, alpha=1, blur=0.15, clip=opening)
    canvas.area(disc(p.iris_size * 0.46), (14, 12, 14), clip=opening)
    canvas.line(at(upper + (0, 0.9)), 1.4, (70, 56, 56), alpha=0.4, blur=0.5)
    canvas.area(disc(0.85, 1.1, -1.2), (255, 255, 255), alpha=0.95)
    canvas.area(at(ellipse(-wide + 0.6, 0.7, 0.9, 0.7, count=8)), (206, 140, 130), alpha=0.7, blur=0.2)
    canvas.line(at(upper), 1.0 + 0.5 * (p.feminine > 0), lash, alpha=0.9, blur=0.15)
    if p.feminine > 0:
        canvas.line(at(np.array([(wide * 0.8, -1.2), (wide + 1.6, -1.6)])), 0.9, lash, alpha=0.8, blur=0.2)
    canvas.line(at(lower), 0.5, lid, alpha=0.5, blur=0.25)


def _brows(canvas: Canvas) -> None:
    p, c = canvas.head.person, canvas.head.condition
    y = p.eye_y - p.brow_height - c.brow_raise
    inner, outer = p.eye_x - p.brow_length * 0.92, p.eye_x + p.brow_length * 1.05
    rise = p.brow_tilt * p.brow_length  # of the inner end
    thick = p.brow_thickness * (1 - 0.15 * max(canvas.head.ageing, 0))
    mid = p.eye_x + 0.15 * p.brow_length
    start, peak, end = y - rise, y - p.brow_arch, y + rise + 1.6
    top = curve([(inner, start), (mid, peak - thick * 0.9), (outer, end)], 9)
    low = curve([(inner + 0.6, start + thick * 1.2), (mid, peak + thick * 0.5), (outer, end + 0.3)], 9)
    color = hair_color(canvas.head, grey_shift=8) * 0.72
    canvas.area(both(np.concatenate([top, low[::-1]])), color, alpha=p.brow_strength * 0.85, blur=0.4)
    hairs = []
    for k in range(8):
        hairs += both(np.array([low[k], 0.3 * top[k] + 0.7 * top[k + 1] - (0, 0.2)]))
    canvas.line(hairs, 0.5, color * 0.8, alpha=p.brow_strength * 0.4)
