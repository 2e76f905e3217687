"""A drawing as a part of a page: colours and font are the page's, its ids are its own, and it is told to who listens.

matplotlib writes a document; what a page takes of it is the drawing without metadata, with a title and a description.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from testbed.reports.palette import LIGHT

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_ROLES = {colour: role for role, colour in LIGHT.items()}
_COLOUR = re.compile("|".join(_ROLES))
_FONT = re.compile(r"(font: [\d.]+px) [^;]*")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


def embedded(document: bytes, prefix: str, title: str, description: str) -> str:
    """The `<svg>` element for a page: `prefix` makes its ids unique there, CSS variables stand for the colours."""
    root = ET.fromstring(document)  # noqa: S314 -- matplotlib wrote it a moment ago
    for name in ("metadata", "defs/style"):
        _remove(root, name)
    used = _references(root)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _adapt(element, prefix, used)
    names = {"title": title, "desc": description}
    for place, (tag, text) in enumerate(names.items()):
        told = ET.Element(tag, {"id": f"{prefix}-{tag}"})
        told.text = text
        root.insert(place, told)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {
        "viewBox": view,
        "role": "img",
        "aria-labelledby": f"{prefix}-title",
        "aria-describedby": f"{prefix}-desc",
    }
    return ET.tostring(root, encoding="unicode")


def _remove(root: ET.Element, name: str) -> None:
    *above, last = name.split("/")
    parents = root.findall("/".join(f"{{{_SVG}}}{tag}" for tag in above)) if above else [root]
    for parent in parents:
        for element in parent.findall(f"{{{_SVG}}}{last}"):
            parent.remove(element)


def _references(root: ET.Element) -> set[str]:
    """The ids that something in the drawing refers to."""
    links = {element.get(_LINK, "")[1:] for element in root.iter()}
    return links | {
        name for element in root.iter() for value in element.attrib.values() for name in _REFERENCE.findall(value)
    }


def _adapt(element: ET.Element, prefix: str, used: set[str]) -> None:
    attributes = dict(element.attrib)
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            if value in used:
                element.set("id", f"{prefix}-{value}")
        elif name == _LINK:
            element.set("href", f"#{prefix}-{value[1:]}")
        else:
            element.set(name, _on_page(" ".join(value.split()), prefix))
    if element.tag != "text":
        element.text = element.tail = None
    else:
        element.tail = None


def _on_page(value: str, prefix: str) -> str:
    value = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
    value = _COLOUR.sub(lambda found: f"var(--{_ROLES[found[0]]})", value)
    return _FONT.sub(r"\1 var(--sans)", value)
