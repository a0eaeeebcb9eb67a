"""Render an aligned image of a person in a condition: turn the head, light it, project it, align it."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from applications.demo.drawn.canvas import ACROSS, DOWN, noise
from applications.demo.drawn.paint import hair_color, paint
from applications.demo.drawn.person import Condition, Person
from applications.demo.drawn.shape import HEIGHTS, STEP, TOP, Head, smoothstep
from util.face import ARCFACE_TEMPLATE, FACE_SIZE

SIZE = FACE_SIZE
SCALE = 2  # supersampling
VIEW = 120 * SCALE  # the view is a little larger than the image, for the roll at the end
_PIVOT = 70.0  # y of the point around which the head nods
_FAR = 1e4  # pixels between the rows when all are interpolated at once


@dataclass(frozen=True)
class RenderBuffers:
    """The point of the head that each pixel shows, (VIEW, VIEW) float32 each."""

    column: np.ndarray  # of the mesh
    row: np.ndarray  # of the mesh
    depth: np.ndarray  # pixels towards the viewer
    cover: np.ndarray  # 0 background to 1 head


def render_face(person: Person, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
    """Return one aligned face, (112, 112, 3) RGB uint8, and its five landmarks, (5, 2) x and y in pixels."""
    head = Head(person, condition)
    points = project(landmarks(head), condition)  # (5, 2)
    scale, roll, shift = alignment(points, condition)
    view = project_surface(head, condition, scale=scale, shift=shift)

    # Colors and light are computed over the mesh, and then looked up for each pixel of the view.
    texture = cv2.remap(
        paint(head),
        view.column * ACROSS + (ACROSS - 1) / 2,
        view.row * DOWN + (DOWN - 1) / 2,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    mesh = cv2.merge([*shade(head), head.hair_field, head.beard_field])
    seen = cv2.remap(mesh, view.column, view.row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    factor, shine, hair, beard = cv2.split(seen)
    skin = texture.astype(np.float32)
    shine *= _add_hair(skin, head, view, hair=hair, beard=beard)
    lit = skin * cv2.merge([factor] * 3) + cv2.merge([shine] * 3)

    image = background(condition, scale, shift)
    image += (lit - image) * cv2.merge([view.cover] * 3)
    if condition.glasses:
        draw_glasses(image, head, view, scale=scale, shift=shift)
    matrix = _to_image(roll)
    seen_points = _to_view(points, scale, shift) @ matrix[:, :2].T + matrix[:, 2]
    return expose(image, matrix, condition), seen_points / SCALE


def landmarks(head: Head) -> np.ndarray:
    """Return the eyes, the tip of the nose and the corners of the mouth in the coordinates of the head, (5, 3)."""
    p = head.person
    half, corner = head.mouth_corner
    flat = np.array([(-p.eye_x, p.eye_y), (p.eye_x, p.eye_y), (0, p.nose_y), (-half, corner), (half, corner)])
    angle = head.angle(flat[:, 0], flat[:, 1])
    column = (angle - head.angles[0, 0]) / STEP
    radius = head.face[np.rint(flat[:, 1] - TOP).astype(int), np.rint(column).astype(int)]
    return np.stack([radius * np.sin(angle), flat[:, 1], radius * np.cos(angle)], axis=1)


def project(points: np.ndarray, condition: Condition) -> np.ndarray:
    """Turn (n, 3) points of the head by yaw, then by pitch, and drop the depth: (n, 2)."""
    x, y, z = points.T
    turned = z * np.cos(condition.yaw) - x * np.sin(condition.yaw)
    across = x * np.cos(condition.yaw) + z * np.sin(condition.yaw)
    down = (y - _PIVOT) * np.cos(condition.pitch) - turned * np.sin(condition.pitch) + _PIVOT
    return np.stack([across, down], axis=1)


def alignment(points: np.ndarray, condition: Condition) -> tuple[float, float, np.ndarray]:
    """Return the similarity (scale, roll, shift) that maps five points to the template, with the condition's error.

    Least squares as in Umeyama (1991). With points as complex numbers it is one division.
    """
    source = points @ (1, 1j)
    target = np.array(ARCFACE_TEMPLATE) @ (1, 1j)
    center = source.mean()
    goal = target.mean()
    factor = np.vdot(source - center, target - goal) / np.vdot(source - center, source - center)
    dx, dy, roll, zoom = condition.jitter
    factor *= np.exp(complex(zoom, roll))
    # The scale is about the middle of the view and the roll about the middle of the image; the shift is the rest.
    middle = complex(SIZE / 2, SIZE / 2)
    offset = (goal + complex(dx, dy) - middle) / np.exp(1j * np.angle(factor)) + middle - abs(factor) * center
    return float(abs(factor)), float(np.angle(factor)), np.array([offset.real, offset.imag])


def project_surface(head: Head, condition: Condition, scale: float, shift: np.ndarray) -> RenderBuffers:
    """Find the point of the surface behind each pixel of the turned head (orthographic projection).

    `scale` is 1 for the natural size of the head; `shift` (x, y) in pixels is added after scaling. Nodding moves points
    along the columns of the mesh, and turning moves them along the rows. From the point nearest to the viewer to each
    side, a point is hidden where its x is below the greatest x so far. With the running maximum each row is a monotone
    function, which is inverted by interpolation.
    """
    radius = head.radius
    angle = head.angles + np.float32(condition.yaw)
    # The coordinates of the head at each row and column of the view.
    pixels = (np.arange(VIEW) - (VIEW - SIZE * SCALE) / 2 + 0.5) / SCALE - 0.5
    xs = (pixels - shift[0]) / scale
    ys = (pixels - shift[1]) / scale

    # Rows: for each column of the mesh, the mesh row that is seen at each height of the view.
    down = (HEIGHTS - _PIVOT) * math.cos(condition.pitch) - radius * np.cos(angle) * math.sin(condition.pitch) + _PIVOT
    row = _invert(np.maximum.accumulate(down, axis=0).T, ys).T.astype(np.float32)  # (VIEW, columns)
    here = np.broadcast_to(np.arange(radius.shape[1], dtype=np.float32), row.shape)
    seen = cv2.remap(radius, here, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    # Columns: for each row of the view, the mesh column that is seen at each x.
    across = seen * np.sin(angle)
    middle = int(np.argmin(np.abs(angle)))
    across[:, middle:] = np.maximum.accumulate(across[:, middle:], axis=1)
    across[:, : middle + 1] = np.minimum.accumulate(across[:, middle::-1], axis=1)[:, ::-1]
    column = _invert(across, xs).astype(np.float32)

    lines = np.broadcast_to(np.arange(VIEW, dtype=np.float32)[:, None], column.shape)
    depth = cv2.remap(seen * np.cos(angle), column, lines, cv2.INTER_LINEAR)
    # Distance to the outline in pixels, which makes the edge of the head smooth.
    inside = np.minimum(xs[None] - across[:, :1], across[:, -1:] - xs[None]) * (scale * SCALE) + 0.5
    cover = np.clip(inside, 0, 1).astype(np.float32)
    return RenderBuffers(column, cv2.remap(row, column, lines, cv2.INTER_LINEAR), depth, cover=cover)


def _invert(curves: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return where n rising curves (n, m) reach the values `at` (k,): positions (n, k) from 0 to m - 1, fractional."""
    count, length = curves.shape
    # Lifted by different amounts, all curves together are one rising curve, so that one call of interp is enough.
    lift = np.arange(count)[:, None] * _FAR
    wanted = np.clip(at[None], curves[:, :1], curves[:, -1:]) + lift
    position = np.interp(wanted.ravel(), (curves + lift).ravel(), np.arange(count * length))
    return position.reshape(count, -1) - np.arange(count)[:, None] * length


def shade(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Return the light over the mesh: a factor for the color and the shine to add, (rows, columns) float32 each."""
    c = head.condition
    radius = head.radius
    smooth = cv2.GaussianBlur(radius, (0, 0), 1.7)
    sin, cos = np.sin(head.angles), np.cos(head.angles)
    by_angle = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=1) * np.float32(0.5 / STEP)
    by_row = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=1) * np.float32(0.5)
    # The normal of (r sin a, y, r cos a) is the cross product of its derivatives.
    nx = smooth * sin - by_angle * cos
    ny = -smooth * by_row
    nz = smooth * cos + by_angle * sin
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    turn = c.light[0] - c.yaw
    level = math.cos(c.light[1])
    direction = (math.sin(turn) * level, -math.sin(c.light[1]), math.cos(turn) * level)
    facing = (nx * direction[0] + ny * direction[1] + nz * direction[2]) / length
    # Light of the sky from above; hollows are darker than their surroundings.
    sky = 0.5 - 0.5 * ny / length
    hollow = np.clip(1 + 0.045 * (radius - cv2.GaussianBlur(radius, (0, 0), 5)), 0.7, 1.06)
    wrapped = np.maximum(facing * 0.8 + 0.2, 0)
    factor = (c.ambient * (0.72 + 0.35 * sky) + (1.1 - c.ambient) * wrapped) * hollow
    shine = np.maximum(facing, 0) ** 14 * (16 * (1 - 0.3 * c.ambient))
    return factor.astype(np.float32), shine.astype(np.float32)


def _add_hair(image: np.ndarray, head: Head, view: RenderBuffers, hair: np.ndarray, beard: np.ndarray) -> np.ndarray:
    """Blend beard and hair into the image without light, and return the fraction of the shine that is left.

    They are finer than the texture of the skin. `hair` and `beard` are the fields of the head at each pixel.
    """
    p = head.person
    bare = np.ones_like(hair)
    strength = max(p.beard, 0) + (0.3 if p.moustache > 0.25 else 0)
    if p.feminine < 0 and strength > 0.3:
        grain = 0.6 * _pattern("grain", view.column, view.row) + 0.5 * _pattern("strands", view.column, view.row)
        weight = np.clip(beard * (0.95 + 0.3 * grain) * min(strength * 1.5, 1), 0, 0.93)
        _blend(image, hair_color(head, grey_shift=-3) * 0.85, weight, 1 + 0.12 * grain)
        bare -= weight
    curl = min(max(p.curl, 0), 1)
    column = view.column + np.float32(head.first + 16 * p.parting + 9 * p.widow)  # different strands for each person
    strands = (1 - 0.8 * curl) * _pattern("strands", column, view.row)
    if curl > 0:
        strands += curl * _pattern("curls", column, view.row)
    # Cover from the distance to the hairline, with strands at the edge; bald heads show skin through the hair.
    thin = 1 - 0.25 * max(p.balding, 0) * max(head.ageing, 0)
    weight = np.clip((hair + strands * (0.6 + 0.5 * curl)) * 0.6 + 0.5, 0, 1) * thin
    # A band of gloss follows the hairline; the hair is darker at the roots.
    gloss = 0.22 * np.exp(-(((hair - 7.5) / 3.5) ** 2)) * (1 - 0.6 * curl)
    tone = (0.72 + 0.28 * smoothstep((hair + 3) / 9) + gloss) * (1 + 0.13 * strands)
    _blend(image, hair_color(head), weight, tone)
    return bare * (1 - 0.8 * weight)


def _pattern(kind: str, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the noise at each pixel. The noise is mirrored at its edges."""
    return cv2.remap(noise(kind), column * ACROSS, row * DOWN, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _blend(image: np.ndarray, color: np.ndarray, weight: np.ndarray, tone: np.ndarray) -> None:
    """Set image to image + weight * (tone * color - image), channel by channel."""
    for channel in range(3):
        below = image[:, :, channel]
        below += weight * (tone * np.float32(color[channel]) - below)


def background(condition: Condition, scale: float, shift: np.ndarray) -> np.ndarray:
    """Return a blurred scene with the shoulders, (VIEW, VIEW, 3) float32."""
    rng = np.random.default_rng(condition.scene)
    grey = rng.uniform(60, 210) + rng.uniform(-45, 45, (4, 4, 1))
    small = grey * (1 + rng.uniform(-0.15, 0.15, 3)) + rng.uniform(-8, 8, (4, 4, 3))
    smooth = cv2.resize(small.astype(np.float32), (VIEW // 6, VIEW // 6), interpolation=cv2.INTER_CUBIC)
    scene = cv2.resize(smooth, (VIEW, VIEW), interpolation=cv2.INTER_LINEAR)
    cloth = rng.uniform(20, 220, 3)
    center = _to_view(np.array([(60 * np.sin(condition.yaw) * 0.2, 172.0)]), scale, shift)[0]
    size = (2 * int(82 * scale * SCALE), 2 * int(52 * scale * SCALE))
    box = ((int(center[0]), int(center[1])), size, 0)
    cv2.ellipse(scene, box, cloth.tolist(), thickness=-1, lineType=cv2.LINE_AA)
    return scene


def draw_glasses(image: np.ndarray, head: Head, view: RenderBuffers, scale: float, shift: np.ndarray) -> None:
    """Draw the frame of the glasses into `image`, except where the face hides it."""
    p, c = head.person, head.condition
    # Each rim is a superellipse, bent around the face.
    turn = np.linspace(0, 2 * np.pi, 41)
    bend = 2 / max(p.lens_round, 2)
    cos, sin = np.cos(turn), np.sin(turn)
    x = np.sign(cos) * np.abs(cos) ** bend * p.lens_width
    y = np.sign(sin) * np.abs(sin) ** bend * p.lens_height + p.eye_y + 1
    front = head.person.depth + 1.5
    wide = p.eye_x + 0.8
    lines = []
    for side in (-1, 1):  # the rim and the arm of each side
        flat = side * (x + wide)
        lines.append(np.stack([flat, y, front - 0.006 * flat**2], axis=1))
        ends = np.linspace(0, 1, 12)
        hinge = wide + p.lens_width
        arm_x = hinge + (p.face_width + 2.5 - hinge) * np.minimum(ends * 3, 1)
        depth = front - 0.006 * hinge**2
        lines.append(np.stack([side * arm_x, p.eye_y - 2 + 2 * ends, depth * (1 - ends)], axis=1))
    # The bridge.
    gap = np.linspace(-(wide - p.lens_width), wide - p.lens_width, 9)
    lines.append(np.stack([gap, p.eye_y - 1.5 - 1.5 * np.cos(gap / 4), np.full(9, front)], axis=1))
    dark = np.array((34, 30, 34)) + np.array((120, 70, 40)) * np.clip(p.frame, 0, 1)
    style = {"thickness": max(1, round(p.frame_width * scale * SCALE)), "lineType": cv2.LINE_AA, "shift": 4}
    for line in lines:
        flat = _to_view(project(line, c), scale, shift)
        depth = line[:, 2] * np.cos(c.yaw) - line[:, 0] * np.sin(c.yaw)
        at = np.clip(np.rint(flat), 0, VIEW - 1).astype(int)
        # A point shows if it is in front of the head or next to it.
        shown = (depth > view.depth[at[:, 1], at[:, 0]] - 2.0) | (view.cover[at[:, 1], at[:, 0]] < 0.5)
        fixed = np.rint(flat * 16).astype(np.int32)  # OpenCV's 4 bits of sub-pixel precision
        for k in np.flatnonzero(shown[:-1] & shown[1:]):
            cv2.line(image, fixed[k].tolist(), fixed[k + 1].tolist(), dark.tolist(), **style)


def expose(image: np.ndarray, matrix: np.ndarray, condition: Condition) -> np.ndarray:
    """Turn the view, shrink it to the image, and add the color, blur and noise of a camera."""
    large = cv2.warpAffine(image, matrix, (SIZE * SCALE, SIZE * SCALE), borderMode=cv2.BORDER_REPLICATE)
    picture = cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    picture = cv2.multiply(picture, np.array(condition.tint) * condition.exposure)
    if condition.blur > 0.2:
        picture = cv2.GaussianBlur(picture, (0, 0), condition.blur)
    rng = np.random.default_rng(condition.scene + 1)
    grain = noise("grain")
    top = rng.integers(grain.shape[0] - SIZE)
    left = rng.integers(grain.shape[1] - SIZE)
    noisy = picture + cv2.merge([condition.noise * grain[top : top + SIZE, left : left + SIZE]] * 3)
    return noisy.clip(0, 255).astype(np.uint8)


def _to_view(points: np.ndarray, scale: float, shift: np.ndarray) -> np.ndarray:
    return (points * scale + shift + 0.5) * SCALE - 0.5 + (VIEW - SIZE * SCALE) / 2


def _to_image(roll: float) -> np.ndarray:
    """Return the 2x3 matrix from the view to the image, both supersampled: a rotation about the middle."""
    middle = (VIEW - 1) / 2
    cos, sin = np.cos(roll), np.sin(roll)
    margin = (VIEW - SIZE * SCALE) / 2
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([turn, (middle - margin - turn @ (middle, middle))[:, None]], axis=1)
