"""Whether a file is the image that its name says."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from matplotlib.image import imread


def is_drawn(path: Path) -> bool:
    """A PNG or SVG that opens and shows something: more than one colour, or curves and writing."""
    if path.suffix == ".png":
        pixels = imread(path)
        return bool(pixels.min() < pixels.max())
    root = ElementTree.parse(path).getroot()
    return root.tag == "{http://www.w3.org/2000/svg}svg" and len(root.findall(".//{*}path")) > 10
