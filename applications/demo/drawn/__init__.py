"""Drawn faces: people who do not exist, drawn with numpy and OpenCV for the demo data set."""
