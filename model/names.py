"""Names of the networks and losses, without torch: command lines list them."""

CHANNEL_ORDERS = ("RGB", "BGR")
INPUT_SCALES = ("-1..1", "0..1", "0..255")  # ranges of pixel values that networks take

BACKBONE_NAMES = (
    *("IR_50", "IR_101", "IR_152", "IR_SE_50", "IR_SE_101", "IR_SE_152"),
    *("MobileFaceNet_scale1", "MobileFaceNet", "MobileFaceNet_050", "MobileFaceNet_025"),
    *("iresnet18", "iresnet34", "iresnet50", "iresnet100"),
    *("vit_t", "vit_s", "vit_b", "vit_s_patch8", "vit_b_patch8"),
)
HEAD_NAMES = ("ArcFace", "CosFace")
LOSS_NAMES = ("focal", "cross_entropy")
SR_SCALES = (2, 4, 8)  # powers of two that divide 112, and leave a face to be seen
