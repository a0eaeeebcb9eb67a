"""From a person and a condition to an aligned image: turn the head, light it, look at it, align it."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from applications.demo.drawn.canvas import ACROSS, DOWN, noise
from applications.demo.drawn.hair import comb
from applications.demo.drawn.paint import paint
from applications.demo.drawn.person import Condition, Person
from applications.demo.drawn.shape import HEIGHTS, STEP, TOP, Head
from util.face import ARCFACE_TEMPLATE, FACE_SIZE

SIZE = FACE_SIZE
SCALE = 2  # supersampling
VIEW = 120 * SCALE  # the view is a little larger than the image, for the roll at the end
_PIVOT = 70.0  # y of the point around which the head nods
_FAR = 1e4  # pixels between the rows when all are interpolated at once


@dataclass(frozen=True)
class View:
    """What is seen through each pixel, (VIEW, VIEW) float32 each."""

    column: np.ndarray  # of the mesh
    row: np.ndarray
    depth: np.ndarray  # pixels towards the viewer
    cover: np.ndarray  # 0 background to 1 head


def draw_face(person: Person, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
    """Draws one aligned face: (112, 112, 3) RGB uint8 and its five landmarks (5, 2), x and y in pixels."""
    head = Head(person, condition)
    points = project(landmarks(head), condition)  # (5, 2)
    scale, roll, shift = alignment(points, condition)
    view = look(head, condition, scale, shift)
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
    shine *= comb(skin, head, view.column, view.row, hair, beard)
    lit = skin * cv2.merge([factor] * 3) + cv2.merge([shine] * 3)
    image = background(condition, scale, shift)
    image += (lit - image) * cv2.merge([view.cover] * 3)
    if condition.glasses:
        glasses(image, head, view, scale, shift)
    matrix = _to_image(scale, roll, shift)
    return expose(image, matrix, condition), _apply(matrix, _to_view(points, scale, shift)) / SCALE


def landmarks(head: Head) -> np.ndarray:
    """Eyes, tip of the nose and corners of the mouth in the head's coordinates, (5, 3)."""
    p = head.person
    half, corner = head.mouth_corner
    flat = np.array([(-p.eye_x, p.eye_y), (p.eye_x, p.eye_y), (0, p.nose_y), (-half, corner), (half, corner)])
    angle = head.angle(flat[:, 0], flat[:, 1])
    column = (angle - head.angles[0, 0]) / STEP
    radius = head.face[np.rint(flat[:, 1] - TOP).astype(int), np.rint(column).astype(int)]
    return np.stack([radius * np.sin(angle), flat[:, 1], radius * np.cos(angle)], axis=1)


def project(points: np.ndarray, condition: Condition) -> np.ndarray:
    """Turns (n, 3) points of the head by yaw, then pitch, and drops the depth: (n, 2)."""
    x, y, z = points.T
    turned = z * np.cos(condition.yaw) - x * np.sin(condition.yaw)
    across = x * np.cos(condition.yaw) + z * np.sin(condition.yaw)
    down = (y - _PIVOT) * np.cos(condition.pitch) - turned * np.sin(condition.pitch) + _PIVOT
    return np.stack([across, down], axis=1)


def alignment(points: np.ndarray, condition: Condition) -> tuple[float, float, np.ndarray]:
    """The similarity (scale, roll, shift) that brings five points nearest to the template, with its error.

    Least squares as in Umeyama (1991); in the plane it is one complex division.
    """
    source, target = points @ (1, 1j), ARCFACE_TEMPLATE @ (1, 1j)
    center, goal = source.mean(), target.mean()
    factor = np.vdot(source - center, target - goal) / np.vdot(source - center, source - center)
    dx, dy, roll, zoom = condition.jitter
    factor *= np.exp(complex(zoom, roll))
    # Scaled about the middle of the view; the roll turns about the middle of the image, and the shift is what is left.
    middle = complex(SIZE / 2, SIZE / 2)
    offset = (goal + complex(dx, dy) - middle) / np.exp(1j * np.angle(factor)) + middle - abs(factor) * center
    return float(abs(factor)), float(np.angle(factor)), np.array([offset.real, offset.imag])


def look(head: Head, condition: Condition, scale: float, shift: np.ndarray) -> View:
    """Finds the point of the surface behind each pixel of the turned head (orthographic projection).

    Nodding moves points along the columns of the mesh, turning along the rows. Walking from the point nearest to the
    viewer to the sides, a point is hidden where x falls behind the greatest x so far: each row is a monotone function
    and is inverted by interpolation.
    """
    radius, angle = head.radius, head.angles + np.float32(condition.yaw)
    pixels = (np.arange(VIEW) - (VIEW - SIZE * SCALE) / 2 + 0.5) / SCALE - 0.5
    xs, ys = (pixels - shift[0]) / scale, (pixels - shift[1]) / scale

    nod = math.cos(condition.pitch), math.sin(condition.pitch)
    down = (HEIGHTS - _PIVOT) * nod[0] - radius * np.cos(angle) * nod[1] + _PIVOT
    row = _invert(np.maximum.accumulate(down, axis=0).T, ys).T.astype(np.float32)  # (VIEW, columns)
    here = np.broadcast_to(np.arange(radius.shape[1], dtype=np.float32), row.shape)
    seen = cv2.remap(radius, here, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    across = seen * np.sin(angle)
    middle = int(np.argmin(np.abs(angle)))
    across[:, middle:] = np.maximum.accumulate(across[:, middle:], axis=1)
    across[:, : middle + 1] = np.minimum.accumulate(across[:, middle::-1], axis=1)[:, ::-1]
    column = _invert(across, xs).astype(np.float32)

    lines = np.broadcast_to(np.arange(VIEW, dtype=np.float32)[:, None], column.shape)
    depth = cv2.remap(seen * np.cos(angle), column, lines, cv2.INTER_LINEAR)
    inside = np.minimum(xs[None] - across[:, :1], across[:, -1:] - xs[None]) * (scale * SCALE) + 0.5
    row = cv2.remap(row, column, lines, cv2.INTER_LINEAR)
    return View(column, row, depth, np.clip(inside, 0, 1).astype(np.float32))


def _invert(curves: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each of n rising curves (n, m), the fractional positions in 0 … m - 1 of the values `at` (k,): (n, k)."""
    count, length = curves.shape
    lift = np.arange(count)[:, None] * _FAR
    wanted = np.clip(at[None], curves[:, :1], curves[:, -1:]) + lift
    position = np.interp(wanted.ravel(), (curves + lift).ravel(), np.arange(count * length))
    return position.reshape(count, -1) - np.arange(count)[:, None] * length


def shade(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Light over the mesh, (rows, columns) float32 each: a factor for the colour, and the shine to add to it."""
    c = head.condition
    radius = head.radius
    smooth = cv2.GaussianBlur(radius, (0, 0), 1.7)
    sin, cos = np.sin(head.angles), np.cos(head.angles)
    by_angle = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=1) * np.float32(0.5 / STEP)
    by_row = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=1) * np.float32(0.5)
    # The normal of (r sin a, y, r cos a) is the cross product of its derivatives.
    nx, ny, nz = smooth * sin - by_angle * cos, -smooth * by_row, smooth * cos + by_angle * sin
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    turn = c.light[0] - c.yaw
    level = math.cos(c.light[1])
    direction = (math.sin(turn) * level, -math.sin(c.light[1]), math.cos(turn) * level)
    facing = (nx * direction[0] + ny * direction[1] + nz * direction[2]) / length
    sky = 0.5 - 0.5 * ny / length
    hollow = np.clip(1 + 0.045 * (radius - cv2.GaussianBlur(radius, (0, 0), 5)), 0.7, 1.06)
    wrapped = np.maximum(facing * 0.8 + 0.2, 0)
    factor = (c.ambient * (0.72 + 0.35 * sky) + (1.1 - c.ambient) * wrapped) * hollow
    shine = np.maximum(facing, 0) ** 14 * (16 * (1 - 0.3 * c.ambient))
    return factor.astype(np.float32), shine.astype(np.float32)


def background(condition: Condition, scale: float, shift: np.ndarray) -> np.ndarray:
    """A soft, out-of-focus scene and the shoulders, (VIEW, VIEW, 3) float32."""
    rng = np.random.default_rng(condition.scene)
    grey = rng.uniform(60, 210) + rng.uniform(-45, 45, (4, 4, 1))
    small = grey * (1 + rng.uniform(-0.15, 0.15, 3)) + rng.uniform(-8, 8, (4, 4, 3))
    smooth = cv2.resize(small.astype(np.float32), (VIEW // 6, VIEW // 6), interpolation=cv2.INTER_CUBIC)
    scene = cv2.resize(smooth, (VIEW, VIEW), interpolation=cv2.INTER_LINEAR)
    cloth = rng.uniform(20, 220, 3)
    center = _to_view(np.array([(60 * np.sin(condition.yaw) * 0.2, 172.0)]), scale, shift)[0]
    axes = (int(82 * scale * SCALE), int(52 * scale * SCALE))
    cv2.ellipse(scene, (int(center[0]), int(center[1])), axes, 0, 0, 360, cloth.tolist(), -1, cv2.LINE_AA)
    return scene


def glasses(image: np.ndarray, head: Head, view: View, scale: float, shift: np.ndarray) -> None:
    """Draws the frame where it is not hidden by the face."""
    p, c = head.person, head.condition
    turn = np.linspace(0, 2 * np.pi, 41)
    bend = 2 / max(p.lens_round, 2)
    cos, sin = np.cos(turn), np.sin(turn)
    x = np.sign(cos) * np.abs(cos) ** bend * p.lens_width
    y = np.sign(sin) * np.abs(sin) ** bend * p.lens_height + p.eye_y + 1
    front = head.person.depth + 1.5
    wide = p.eye_x + 0.8
    lines = []
    for side in (-1, 1):
        flat = side * (x + wide)
        lines.append(np.stack([flat, y, front - 0.006 * flat**2], axis=1))
        ends = np.linspace(0, 1, 12)
        hinge = wide + p.lens_width
        arm_x = hinge + (p.face_width + 2.5 - hinge) * np.minimum(ends * 3, 1)
        depth = front - 0.006 * hinge**2
        lines.append(np.stack([side * arm_x, p.eye_y - 2 + 2 * ends, depth * (1 - ends)], axis=1))
    gap = np.linspace(-(wide - p.lens_width), wide - p.lens_width, 9)
    lines.append(np.stack([gap, p.eye_y - 1.5 - 1.5 * np.cos(gap / 4), np.full(9, front)], axis=1))
    dark = np.array((34, 30, 34)) + np.array((120, 70, 40)) * np.clip(p.frame, 0, 1)
    for line in lines:
        _wire(image, line, dark, max(1, round(p.frame_width * scale * SCALE)), c, view, scale, shift)


def _wire(
    image: np.ndarray,
    line: np.ndarray,
    color: np.ndarray,
    width: int,
    condition: Condition,
    view: View,
    scale: float,
    shift: np.ndarray,
) -> None:
    flat = _to_view(project(line, condition), scale, shift)
    depth = line[:, 2] * np.cos(condition.yaw) - line[:, 0] * np.sin(condition.yaw)
    at = np.clip(np.rint(flat), 0, VIEW - 1).astype(int)
    shown = (depth > view.depth[at[:, 1], at[:, 0]] - 2.0) | (view.cover[at[:, 1], at[:, 0]] < 0.5)
    fixed = np.rint(flat * 16).astype(np.int32)
    for k in np.flatnonzero(shown[:-1] & shown[1:]):
        cv2.line(image, fixed[k].tolist(), fixed[k + 1].tolist(), color.tolist(), width, cv2.LINE_AA, 4)


def expose(image: np.ndarray, matrix: np.ndarray, condition: Condition) -> np.ndarray:
    """Turns and shrinks the view to the image, and adds what a camera adds."""
    large = cv2.warpAffine(image, matrix, (SIZE * SCALE, SIZE * SCALE), borderMode=cv2.BORDER_REPLICATE)
    picture = cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    picture = cv2.multiply(picture, (*(channel * condition.exposure for channel in condition.tint), 1.0))
    if condition.blur > 0.2:
        picture = cv2.GaussianBlur(picture, (0, 0), condition.blur)
    rng = np.random.default_rng(condition.scene + 1)
    grain = noise("grain")
    top, left = rng.integers(grain.shape[0] - SIZE), rng.integers(grain.shape[1] - SIZE)
    picture += cv2.merge([condition.noise * grain[top : top + SIZE, left : left + SIZE]] * 3)
    return picture.clip(0, 255).astype(np.uint8)


def _to_view(points: np.ndarray, scale: float, shift: np.ndarray) -> np.ndarray:
    return (points * scale + shift + 0.5) * SCALE - 0.5 + (VIEW - SIZE * SCALE) / 2


def _to_image(scale: float, roll: float, shift: np.ndarray) -> np.ndarray:
    """The 2x3 matrix from the view to the image, both supersampled: the roll about the middle."""
    middle = (VIEW - 1) / 2
    cos, sin = np.cos(roll), np.sin(roll)
    margin = (VIEW - SIZE * SCALE) / 2
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([turn, (middle - margin - turn @ (middle, middle))[:, None]], axis=1)


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]
