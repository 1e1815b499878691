"""The report as one HTML page that needs nothing else; every text goes through ElementTree, which escapes it."""

import pathlib
from collections.abc import Sequence
from xml.etree import ElementTree

from convattn_jax.report.pictures import Gallery, Picture
from convattn_jax.report.tables import Cell, Table

Element = ElementTree.Element
HERE = pathlib.Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def element(tag: str, *children: Element | str, **attributes: str) -> Element:
    """<tag attributes>children</tag>; `class_` and `aria_sort` stand for class and aria-sort."""
    made = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def page(title: str, lead: Sequence[str], sections: Sequence[tuple[str, list[Element]]]) -> str:
    """The whole document: a heading, sentences, a list of the sections, the sections."""
    links = [element("li", element("a", name, href=f"#{_anchor(name)}")) for name, _ in sections]
    body = [element("h1", title), *(element("p", text) for text in lead), element("nav", element("ul", *links))]
    for name, content in sections:
        body.append(element("section", element("h2", name), *content, id=_anchor(name)))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", (HERE / "style.css").read_text()),
    )
    script = element("script", (HERE / "sort.js").read_text())
    document = element("html", head, element("body", *body, script), lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(document, encoding="unicode", method="html") + "\n"


def _anchor(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())


def table(made: Table, wrap: bool = False) -> list[Element]:
    """What it is about, then the table; each column's name is a button that sorts."""
    texts = [any(isinstance(row[i].value, str) for row in made.rows) for i in range(len(made.columns))]
    head = [
        element("th", element("button", name, type="button"), scope="col", **({"class_": "text"} if text else {}))
        for name, text in zip(made.columns, texts, strict=True)
    ]
    rows = [element("tr", *(_cell(cell, index) for index, cell in enumerate(row))) for row in made.rows]
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    box = element(
        "div", whole, class_="table wrap" if wrap else "table", tabindex="0", role="region", aria_label=made.title
    )
    return [element("p", made.about, class_="about"), box]


def folded(summary: str, content: Sequence[Element]) -> list[Element]:
    """Shown after a click on the summary."""
    return [element("details", element("summary", summary), *content)]


def _cell(cell: Cell, index: int) -> Element:
    sort = {} if cell.value is None else {"data_value": str(cell.value)}
    if index == 0:
        return element("th", cell.text, scope="row", **sort)
    kinds = (["text"] if isinstance(cell.value, str) else []) + (["best"] if cell.best else [])
    return element("td", cell.text, **sort, **({"class_": " ".join(kinds)} if kinds else {}))


def gallery(made: Gallery) -> list[Element]:
    """Pictures beside each other where there is room, and who has none."""
    figures = [element("figure", element("h3", one.title), _image(one)) for one in made.pictures]
    found = [element("p", made.about, class_="about")] if made.about else []
    found += [element("div", *figures, class_="gallery")] if figures else []
    return found + (
        [element("ul", *(element("li", text) for text in made.lacking), class_="lacking")] if made.lacking else []
    )


def _image(one: Picture) -> Element:
    size = {"width": str(one.drawing.width), "height": str(one.drawing.height)}
    return element("img", src=one.drawing.uri, alt=one.words, title=one.words, **size)
