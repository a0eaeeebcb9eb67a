"""The size and the landmarks of an aligned face, for training, evaluation and alignment alike."""

FACE_SIZE = 112  # pixels a side of an aligned face, and of what the networks see
CROP_FROM = 128  # pixels a side that a face is resized to before the window of FACE_SIZE is cut
CROPS = ("128", "whole")  # resize to CROP_FROM and cut FACE_SIZE out, or show all of the aligned face

# What networks of other projects take.
CHANNEL_ORDERS = ("RGB", "BGR")
INPUT_SCALES = ("-1..1", "0..1", "0..255")
INPUT_FACTORS = {"0..1": 0.5, "0..255": 127.5}  # (x + 1) * factor moves [-1, 1] there

# Eyes, nose and corners of the mouth (x, y) in an aligned face: SphereFace's points for 112x96, which ArcFace moved
# 8 pixels to the right. All published training and verification sets of 112x112 are aligned to these points.
# Command lines need this module before they have answered, so it imports no numpy.
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
