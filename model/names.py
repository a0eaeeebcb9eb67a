"""Names of the networks and losses, and parameters of the heads, without torch: command lines list them."""

CHANNEL_ORDERS = ("RGB", "BGR")
INPUT_SCALES = ("-1..1", "0..1", "0..255")  # ranges of pixel values that networks take

BACKBONE_NAMES = (
    *("IR_50", "IR_101", "IR_152", "IR_SE_50", "IR_SE_101", "IR_SE_152"),
    *("MobileFaceNet_scale1", "MobileFaceNet", "MobileFaceNet_050", "MobileFaceNet_025"),
    *("iresnet18", "iresnet34", "iresnet50", "iresnet100"),
    *("vit_t", "vit_s", "vit_b", "vit_s_patch8", "vit_b_patch8"),
)
# Parameters of each margin head, with the defaults of its paper or of the authors' code.
HEAD_PARAMETERS: dict[str, dict[str, float | bool]] = {
    "ArcFace": {"s": 64.0, "m": 0.5, "easy_margin": False},
    "CosFace": {"s": 64.0, "m": 0.35},
    "AdaFace": {"s": 64.0, "m": 0.4, "h": 0.333, "t_alpha": 0.01},
    "MagFace": {"s": 64.0, "l_a": 10.0, "u_a": 110.0, "l_m": 0.45, "u_m": 0.8, "lambda_g": 35.0, "easy_margin": False},
    "CurricularFace": {"s": 64.0, "m": 0.5, "momentum": 0.99},
    "ElasticArcFace": {"s": 64.0, "m": 0.5, "std": 0.05, "plus": False},
    "ElasticArcFacePlus": {"s": 64.0, "m": 0.5, "std": 0.0175},
    "ElasticCosFace": {"s": 64.0, "m": 0.35, "std": 0.05, "plus": False},
    "ElasticCosFacePlus": {"s": 64.0, "m": 0.35, "std": 0.02},
    "SphereFace": {"s": 30.0, "m": 1.5},
    "CombinedMargin": {"s": 64.0, "m1": 1.0, "m2": 0.5, "m3": 0.0},
    "SubCenterArcFace": {"s": 64.0, "m": 0.5, "k": 3},
}
HEAD_PAPERS = {
    "ArcFace": "Deng et al., CVPR 2019, arXiv:1801.07698",
    "CosFace": "Wang et al., CVPR 2018, arXiv:1801.09414",
    "AdaFace": "Kim et al., CVPR 2022, arXiv:2204.00964",
    "MagFace": "Meng et al., CVPR 2021, arXiv:2103.06627",
    "CurricularFace": "Huang et al., CVPR 2020, arXiv:2004.00288",
    "ElasticArcFace": "Boutros et al., CVPRW 2022, arXiv:2109.09416",
    "ElasticArcFacePlus": "Boutros et al., CVPRW 2022, arXiv:2109.09416",
    "ElasticCosFace": "Boutros et al., CVPRW 2022, arXiv:2109.09416",
    "ElasticCosFacePlus": "Boutros et al., CVPRW 2022, arXiv:2109.09416",
    "SphereFace": "Liu et al., CVPR 2017, arXiv:1704.08063; defaults of TPAMI 2022, arXiv:2109.05565",
    "CombinedMargin": "Deng et al., CVPR 2019, arXiv:1801.07698, equation 4; defaults of arcface_torch",
    "SubCenterArcFace": "Deng et al., ECCV 2020",
}
HEAD_NAMES = tuple(HEAD_PARAMETERS)
LOSS_NAMES = ("focal", "cross_entropy")
SR_SCALES = (2, 4, 8)  # powers of two that divide 112, and leave a face to be seen
