"""Tell users of the old name `applications.lr_curve` where the program is now."""

import sys

sys.exit("error: applications.lr_curve has moved. Run `python -m applications.resolution_curve` with the same flags.")
