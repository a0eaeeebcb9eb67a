"""Sample people (Person: the same in all images) and conditions (Condition: different in each image).

Lengths are in pixels of the aligned 112x112 image: x to the right of the middle of the face, y down, z towards the
viewer. A face with the mean of all traits has its eyes at y = 51.6 and its mouth at y = 92.3.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np

PROFILE_YAW = (0.62, 0.95)  # radians, for the profile images of a set like CFP-FP
AGE_GAP = (26.0, 36.0)  # years between the two images of a pair in a set like AgeDB
GLASSES_OFF = 0.2  # probability that a wearer of glasses is rendered without them

SKIN_TONES = np.array(
    [(252, 222, 200), (243, 204, 174), (228, 180, 144), (200, 146, 108), (158, 106, 74), (122, 80, 58)], np.float32
)
HAIR_COLORS = np.array(
    [(30, 26, 27), (54, 37, 30), (92, 62, 42), (134, 70, 42), (186, 144, 88), (222, 192, 136)], np.float32
)
IRIS_COLORS = np.array(
    [(62, 38, 26), (104, 66, 38), (122, 100, 56), (92, 122, 84), (112, 134, 152), (74, 118, 168)], np.float32
)
GREY_HAIR = np.array((202, 200, 198), np.float32)


def trait(mean: float, deviation: float) -> float:
    """Return a field of Person with a normal distribution, cut at two standard deviations."""
    return field(metadata={"mean": mean, "deviation": deviation})


def palette(colors: np.ndarray, position: float) -> np.ndarray:
    """Return the color at `position` in [0, 1] along `colors`, (n, 3) RGB: (3,) float32."""
    at = min(max(position, 0), 1) * (len(colors) - 1)
    low = min(int(at), len(colors) - 2)
    return colors[low] + (colors[low + 1] - colors[low]) * (at - low)


@dataclass(frozen=True)
class Person:
    """The traits of one drawn person. Widths are half widths."""

    # head
    forehead_width: float = trait(35.5, 1.6)
    face_width: float = trait(38.8, 1.9)
    jaw_width: float = trait(30.5, 2.3)
    jaw_angle: float = trait(86.0, 3.5)
    chin: float = trait(116.5, 3.0)
    chin_square: float = trait(2.1, 0.25)
    chin_forward: float = trait(3.0, 1.3)
    depth: float = trait(50.0, 2.0)
    squareness: float = trait(2.3, 0.14)
    cheekbone: float = trait(2.0, 1.0)
    cheek: float = trait(0.6, 1.3)
    brow_ridge: float = trait(1.6, 0.8)
    # eyes and brows
    eye_x: float = trait(17.6, 1.1)
    eye_y: float = trait(51.6, 1.0)
    eye_width: float = trait(8.0, 0.7)
    eye_height: float = trait(4.2, 0.55)
    eye_tilt: float = trait(0.04, 0.08)
    eye_socket: float = trait(3.0, 0.9)
    eye_crease: float = trait(2.6, 0.7)
    eye_round: float = trait(0.0, 0.15)
    iris_size: float = trait(3.7, 0.2)
    iris: float = trait(0.3, 0.35)
    brow_height: float = trait(10.4, 1.2)
    brow_length: float = trait(10.8, 1.0)
    brow_thickness: float = trait(1.9, 0.5)
    brow_arch: float = trait(1.5, 0.7)
    brow_tilt: float = trait(0.06, 0.08)
    brow_strength: float = trait(0.8, 0.14)
    # nose and mouth
    nose_y: float = trait(71.7, 1.8)
    nose_width: float = trait(8.2, 1.2)
    nose_bridge: float = trait(4.2, 0.7)
    nose_height: float = trait(12.0, 1.8)
    nose_hump: float = trait(0.3, 0.9)
    nose_round: float = trait(4.6, 0.6)
    nostril: float = trait(1.7, 0.35)
    mouth_y: float = trait(92.3, 1.5)
    mouth_width: float = trait(14.4, 1.3)
    upper_lip: float = trait(2.6, 0.65)
    lower_lip: float = trait(3.5, 0.75)
    cupid: float = trait(0.9, 0.4)
    mouth_rest: float = trait(0.8, 0.7)
    lip_red: float = trait(0.5, 0.22)
    # skin
    skin: float = trait(0.42, 0.3)
    skin_warm: float = trait(0.0, 5.0)
    blush: float = trait(0.5, 0.25)
    freckles: float = trait(-0.4, 0.6)
    mole_strength: float = trait(0.0, 0.7)
    mole_x: float = trait(0.0, 16.0)
    mole_y: float = trait(80.0, 11.0)
    wrinkling: float = trait(1.0, 0.25)
    # hair
    hair: float = trait(0.3, 0.3)
    hairline: float = trait(15.0, 3.8)
    temple: float = trait(3.0, 2.5)
    widow: float = trait(1.0, 2.0)
    parting: float = trait(0.0, 4.5)
    volume: float = trait(6.0, 2.4)
    curl: float = trait(0.3, 0.35)
    fringe: float = trait(-4.0, 12.0)
    sideburn: float = trait(60.0, 6.0)
    greying: float = trait(52.0, 8.0)
    balding: float = trait(0.0, 1.0)
    beard: float = trait(-0.2, 0.6)
    moustache: float = trait(0.0, 0.6)
    beard_line: float = trait(0.0, 3.0)
    # ears and glasses
    ear_size: float = trait(11.0, 1.2)
    ear_out: float = trait(4.5, 1.3)
    glasses: float = trait(-0.5, 1.0)
    lens_width: float = trait(12.5, 1.1)
    lens_height: float = trait(9.0, 1.3)
    lens_round: float = trait(3.0, 0.9)
    frame: float = trait(0.5, 0.4)
    frame_width: float = trait(1.1, 0.35)
    # general
    feminine: float = trait(0.0, 1.0)
    hair_length: float = trait(0.0, 1.0)
    age: float = trait(34.0, 9.0)

    @staticmethod
    def sample(rng: np.random.Generator) -> "Person":
        """Sample a person. Traits are independent, except those related in life, such as jaw and beard."""
        values = {}
        for entry in fields(Person):
            score = float(np.clip(rng.standard_normal(), -2, 2))
            values[entry.name] = entry.metadata["mean"] + entry.metadata["deviation"] * score
        person = Person(**values)
        side = 1.0 if person.feminine > 0 else -1.0
        skin = float(rng.uniform(0, 1))
        return replace(
            person,
            feminine=side,
            skin=skin,
            hair=person.hair * (1.25 - 1.1 * skin),
            iris=person.iris * (1.4 - 1.4 * skin),
            hair_length=side + 0.55 * person.hair_length,
            jaw_width=person.jaw_width - 1.3 * side,
            brow_thickness=person.brow_thickness - 0.35 * side,
            brow_ridge=person.brow_ridge - 0.7 * side,
            lip_red=person.lip_red + 0.18 * side,
            upper_lip=person.upper_lip + 0.2 * side,
            beard=person.beard if side < 0 else -1.0,
            moustache=person.moustache if side < 0 else -1.0,
            balding=person.balding if side < 0 else -2.0,
            volume=person.volume + 1.2 * side,
        )


@dataclass(frozen=True)
class Condition:
    """What changes between two images of one person."""

    age: float  # years
    yaw: float  # radians, positive to the right of the image
    pitch: float  # radians, positive up
    smile: float  # -0.5 (down) to 1
    mouth_open: float  # 0 to 1
    eyelid: float  # 0.5 (narrow) to 1.2 (wide)
    brow_raise: float  # pixels
    gaze: tuple[float, float]  # pixels
    light: tuple[float, float]  # azimuth and elevation, radians
    ambient: float  # fraction of light without direction
    tint: tuple[float, float, float]  # color of the light
    exposure: float
    blur: float  # standard deviation in pixels
    noise: float  # standard deviation in grey levels
    jitter: tuple[float, float, float, float]  # alignment error: x, y in pixels, roll in radians, log scale
    glasses: bool
    stubble: float  # 0 to 1
    hair_shift: float  # pixels: combed differently
    scene: int  # seed of background, clothes and noise

    @staticmethod
    def sample(rng: np.random.Generator, person: Person, kind: str = "mixed") -> "Condition":
        """Sample conditions; `kind` is "mixed", "frontal", "profile", "young" or "old"."""

        def normal(scale: float) -> float:
            return float(np.clip(rng.standard_normal(), -2, 2) * scale)

        warm = normal(0.06)
        yaw = normal(0.24)
        if kind == "mixed" and rng.random() < 0.12:
            yaw = float(rng.choice((-1, 1)) * rng.uniform(0.45, 0.8))
        elif kind == "frontal":
            yaw *= 0.35
        elif kind == "profile":
            yaw = float(rng.choice((-1, 1)) * rng.uniform(*PROFILE_YAW))
        gap = rng.uniform(*AGE_GAP)
        # All ages are sampled for every kind, so that the random numbers below do not depend on the kind.
        age = {"young": 20 + abs(normal(3)), "old": 20 + abs(normal(3)) + gap}.get(kind, person.age + normal(6))
        smile = float(np.clip(0.5 + normal(0.32), -0.2, 1))
        return Condition(
            age=age,
            yaw=yaw,
            pitch=normal(0.1) * (0.6 if kind == "frontal" else 1),
            smile=smile,
            mouth_open=float(np.clip(normal(0.35) + 0.35 * smile, 0, 1)),
            eyelid=1 - 0.12 * max(smile, 0) + normal(0.08),
            brow_raise=normal(0.8),
            gaze=(normal(0.8), normal(0.3)),
            light=(normal(0.65), 0.55 + normal(0.25)),
            ambient=float(np.clip(0.64 + normal(0.09), 0.3, 0.8)),
            tint=(1 + warm, 1 + 0.2 * warm, 1 - warm),
            exposure=float(np.exp(normal(0.12))),
            blur=float(rng.uniform(0, 0.9) ** 2),
            noise=float(rng.uniform(0.3, 2.5)),
            jitter=(normal(0.9), normal(0.9), normal(0.02), normal(0.02)),
            glasses=person.glasses > 0 and rng.random() >= GLASSES_OFF,
            stubble=float(rng.uniform(0, 1)),
            hair_shift=normal(1.5),
            scene=int(rng.integers(2**31)),
        )
