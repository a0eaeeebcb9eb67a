"""Model the head as a surface around the vertical axis: the radius r(y, angle), with hair, ears and neck."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from applications.demo.drawn.person import Condition, Person

ROWS, COLUMNS = 160, 160  # of the mesh
TOP = -24.0  # y of the first row; rows are one pixel apart
ANGLES = np.linspace(-2.8, 2.8, COLUMNS, dtype=np.float32)[None, :]  # 0 is the front of the head
STEP = 5.6 / (COLUMNS - 1)  # radians between columns
HEIGHTS = (TOP + np.arange(ROWS, dtype=np.float32))[:, None]
HAIR_REACH = 14.0  # pixels at which the field hair_field is clipped


def smoothstep(x: np.ndarray | float) -> np.ndarray:
    """Return 0 below 0, 1 above 1, and a smooth rise between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def through(points: Sequence[tuple[float, float]], at: np.ndarray, smooth: float) -> np.ndarray:
    """Return a curve (n,) through (x, value) points at the evenly spaced `at` (n,), smoothed over `smooth` samples."""
    curve = np.interp(at, *np.array(points).T).astype(np.float32)
    return cv2.GaussianBlur(curve[None], (0, 0), smooth, borderType=cv2.BORDER_REPLICATE)[0]


@dataclass(frozen=True)
class Head:
    """One person's head in one condition; arrays are float32 in pixels, (ROWS, visible columns)."""

    person: Person
    condition: Condition

    @cached_property
    def first(self) -> int:
        """Return the first visible column of the mesh."""
        return max(int((-self.condition.yaw - 1.68 - ANGLES[0, 0]) / STEP), 0)

    @cached_property
    def angles(self) -> np.ndarray:
        """Return the visible angles, a little more than half a turn: (1, columns)."""
        return ANGLES[:, self.first : self.first + int(3.36 / STEP)]

    @cached_property
    def ageing(self) -> float:
        """Return the progress of ageing: 0 at 25 years, 1 at 65."""
        return float(np.clip((self.condition.age - 25) / 40, -0.2, 1.4))

    @cached_property
    def widths(self) -> np.ndarray:
        """Return the half width of the head without the neck in each row."""
        p, full = self.person, 1.2 * max(self.ageing, 0)
        points = [
            (-24, p.forehead_width - 19),
            (-12, p.forehead_width - 8),
            (4, p.forehead_width - 3),
            (35, p.forehead_width + 1),
            (62, p.face_width),
            (p.jaw_angle, 0.35 * p.face_width + 0.65 * p.jaw_width + full),
            (104, p.jaw_width - 2 + full),
            (136, p.jaw_width - 6),
        ]
        return through(points, HEIGHTS[:, 0], 6)

    @cached_property
    def depths(self) -> np.ndarray:
        """Return the distance in each row from the axis to the front of the face, without features."""
        d = self.person.depth
        points = [(-24, d - 22), (-6, d - 8), (14, d - 1.5), (40, d), (92, d - 1), (116, d - 4), (136, d - 8)]
        return through(points, HEIGHTS[:, 0], 5)

    @cached_property
    def mouth_corner(self) -> tuple[float, float]:
        """Return x and y of the right corner of the mouth."""
        p, smile = self.person, self.condition.smile
        return p.mouth_width * (1 + 0.12 * smile), p.mouth_y - 2.6 * smile - 0.5 * p.mouth_rest

    @cached_property
    def skull(self) -> np.ndarray:
        """Return the head without features, hair and neck: a superellipse in each row."""
        power = self.person.squareness
        depth = np.where(np.abs(self.angles) < np.pi / 2, self.depths[:, None], 56.0)
        across = (np.abs(np.sin(self.angles)) / self.widths[:, None]) ** power
        return ((across + (np.abs(np.cos(self.angles)) / depth) ** power) ** (-1 / power)).astype(np.float32)

    @cached_property
    def side(self) -> np.ndarray:
        """Return |x| of each point of the skull seen from the front; behind the ears, the half width."""
        return np.where(np.abs(self.angles) < np.pi / 2, self.skull * np.abs(np.sin(self.angles)), self.widths[:, None])

    def angle(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the angle at which the front of the skull has the coordinates x, y."""
        row = (y - TOP + 0.5).astype(int)
        power = self.person.squareness
        z = self.depths[row] * np.maximum(1 - np.abs(x / self.widths[row]) ** power, 0) ** (1 / power)
        return np.arctan2(x, z)

    def bump(self, x: float, y: float, wide: float, high: float) -> np.ndarray:
        """Return Gaussians of height 1 on both sides of the face, at (x, y) and (-x, y)."""
        return np.exp(-(((self.side - x) / wide) ** 2)) * np.exp(-(((HEIGHTS - y) / high) ** 2))

    @cached_property
    def features(self) -> np.ndarray:
        """Return the relief of the features, which is added to the skull."""
        p, c = self.person, self.condition
        old, smile = max(self.ageing, 0), max(c.smile, 0)
        jaw_drop = 3 * c.mouth_open
        relief = self.nose()
        # Brows, eye sockets and eyeballs.
        relief += self.bump(13, p.eye_y - 9, 12, 5) * p.brow_ridge
        relief -= self.bump(p.eye_x - 1, p.eye_y - 1, 8, 6) * p.eye_socket
        relief += self.bump(p.eye_x, p.eye_y, 5.5, 3.6) * 1.6
        # Cheekbones, cheeks and jowls.
        relief += self.bump(24, 66 - 2 * smile, 9, 8) * (p.cheekbone + 1.3 * smile)
        relief += self.bump(22, 82, 9, 10) * (p.cheek - 1.3 * old)
        relief += self.bump(24, 100, 8, 8) * 1.5 * old
        # Mouth, lips and chin.
        relief += self.bump(0, p.mouth_y - 2, 15, 9) * 2.2
        relief += self.bump(0, p.mouth_y - p.upper_lip, p.mouth_width * 0.7, 2.4) * 1.2
        relief += self.bump(0, p.mouth_y + p.lower_lip + jaw_drop, p.mouth_width * 0.6, 2.8) * 1.5
        relief -= self.bump(0, p.mouth_y + 10 + jaw_drop, 9, 3.5) * 1.6
        relief += self.bump(0, p.chin - 6, 9, 7) * p.chin_forward
        return relief.astype(np.float32)

    def nose(self) -> np.ndarray:
        """Return the relief of the nose: a ridge that grows towards the tip, and the wings."""
        p = self.person
        length = p.nose_y - p.eye_y + 3
        down = (HEIGHTS - p.eye_y + 3) / length  # 0 at the root, 1 at the tip
        ridge = np.where(
            down < 1, smoothstep(down) * 0.55 + np.clip(down, 0, 1) * 0.45, 1 - smoothstep((down - 1) * 2.8)
        )
        ridge = ridge * p.nose_height + p.nose_hump * np.exp(-(((down - 0.5) / 0.22) ** 2)) * 1.2
        width = p.nose_bridge + (p.nose_round + 0.6 - p.nose_bridge) * smoothstep(down * 1.1)
        ridge = ridge * np.exp(-(np.abs(self.side / width) ** 2.2))
        return ridge + self.bump(p.nose_width - 2.2, p.nose_y + 0.8, 2.7, 3.0) * 4.0

    @cached_property
    def jaw_line(self) -> np.ndarray:
        """Return the y at which the face ends and the neck begins, for the |x| of each point."""
        p = self.person
        chin = p.chin + 2.5 * self.condition.mouth_open
        inside = np.maximum(1 - np.clip(self.side / p.jaw_width, 0, 1) ** p.chin_square, 0) ** (1 / p.chin_square)
        return p.jaw_angle + 4 + (chin - p.jaw_angle - 4) * inside

    @cached_property
    def face(self) -> np.ndarray:
        """Return the radius of face, ears and neck, without hair."""
        p = self.person
        throat = np.where(np.abs(self.angles) < np.pi / 2, 20, 34)
        neck = 1 / np.sqrt((np.sin(self.angles) / 27) ** 2 + (np.cos(self.angles) / throat) ** 2)
        under = smoothstep((HEIGHTS - self.jaw_line + 1.5) / 7)
        ear = ((np.abs(self.angles) - 1.6 - 0.012 * (HEIGHTS - 58)) / 0.2) ** 2 + ((HEIGHTS - 58) / p.ear_size) ** 2
        ears = p.ear_out * smoothstep((1.15 - ear) * 1.6) * (0.75 + 0.25 * smoothstep(ear * 2 - 0.5))
        radius = (self.skull + self.features) * (1 - under) + neck * under + ears
        return (radius + 2.2 * self.beard_field * (p.beard > 0.35)).astype(np.float32)

    @cached_property
    def beard_field(self) -> np.ndarray:
        """Return how densely beard and moustache grow, from 0 to 1."""
        p = self.person
        line = through(
            [(0, p.mouth_y + 8), (7, p.mouth_y + 7), (17, p.mouth_y - 6), (28, 84), (36, 70), (42, 56)],
            np.linspace(0, 48, 97),
            3,
        )
        upper = np.interp(self.side, np.linspace(0, 48, 97), line + p.beard_line * np.linspace(0, 1, 97))
        beard = smoothstep((HEIGHTS - upper) / 6) * (1 - smoothstep((HEIGHTS - self.jaw_line - 3) / 6))
        beard = beard * (np.abs(self.angles) < 1.45)
        lip = self.bump(0, p.mouth_y - p.upper_lip - 3.4, p.mouth_width * 0.85, 2.6)
        return np.maximum(beard * (p.beard > 0), lip * (p.moustache > 0)).astype(np.float32)

    @cached_property
    def hair_field(self) -> np.ndarray:
        """Return the distance from the hairline in pixels, positive inside the hair."""
        p, c = self.person, self.condition
        fall = 34 * max(self.ageing - 0.15, 0) * max(p.balding + 0.3, 0) * 0.55
        front = p.hairline - fall + 0.5 * c.hair_shift
        temple = front - p.temple - 0.6 * fall
        points = [(0, front + p.widow), (0.22, front), (0.55, temple), (0.8, temple + 5), (0.98, 30)]
        if p.hair_length > 0.55:
            points += [(1.1, 60), (1.2, 140 if p.hair_length > 1 else 104), (2.8, 160)]
        else:
            points += [(1.14, p.sideburn - 4), (1.3, p.sideburn), (1.4, 48), (1.75, 46), (1.95, 84), (2.8, 96)]
        side = np.abs(self.angles[0])
        line = np.interp(side, *np.array(points).T)
        line = line + p.parting * self.angles[0] * np.exp(-((self.angles[0] / 0.6) ** 2)) * 2
        if p.fringe > 3:
            line = np.maximum(
                line, p.eye_y - 22 + 0.7 * p.fringe - 8 * (side - 0.2) ** 2 - 60 * np.maximum(side - 0.9, 0)
            )
        line = cv2.GaussianBlur(line.astype(np.float32)[None], (0, 0), 2.0, borderType=cv2.BORDER_REPLICATE)
        # Convert the height over the line to a distance; otherwise steep sides are as jagged as the mesh.
        slope = np.gradient(line[0]) / (46 * STEP)
        return np.clip((line - HEIGHTS) / np.sqrt(1 + slope**2), -HAIR_REACH, HAIR_REACH).astype(np.float32)

    @cached_property
    def radius(self) -> np.ndarray:
        """Return the radius of the complete head."""
        p = self.person
        thick = (p.volume + 1.5) * smoothstep(self.hair_field / 9)
        if p.hair_length > 0.55:
            thick = thick + 0.06 * np.maximum(HEIGHTS - 40, 0)
        # The step from skin to hair must have the color of hair, which begins at 0: put it one column inside.
        hair = np.where(self.hair_field > 2.5, self.skull + thick, 0)
        return np.maximum(self.face, hair).astype(np.float32)
