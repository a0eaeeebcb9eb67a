"""Where an aligned face has its landmarks."""

import numpy as np

# Eyes, nose and corners of the mouth (x, y) in an aligned face of 112x112 pixels: SphereFace's points for 112x96, which
# ArcFace moved 8 pixels to the right. All published training and verification sets of 112x112 are aligned to them.
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
FACE_SIZE = 112
