"""Names of the networks and losses, without torch: command lines list them."""

BACKBONE_NAMES = (
    *("IR_50", "IR_101", "IR_152", "IR_SE_50", "IR_SE_101", "IR_SE_152"),
    *("MobileFaceNet", "MobileFaceNet_050", "MobileFaceNet_025"),
    *("iresnet18", "iresnet34", "iresnet50", "iresnet100"),
)
HEAD_NAMES = ("ArcFace", "CosFace")
LOSS_NAMES = ("focal", "cross_entropy")
SR_SCALES = (2, 4, 8)  # powers of two that divide 112, and leave a face to be seen
