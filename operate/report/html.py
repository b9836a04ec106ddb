"""What the page is written with: escaped text, tables, and how shares are said."""

from collections.abc import Iterable, Sequence
from html import escape


class Raw(str):
    """HTML that is made here, of what has been escaped."""


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """head: in front of a column's name "#" says that it holds numbers, "~" that its lines may be broken.

    Cells are escaped, but for `Raw` ones.
    """
    head = list(head)
    kinds = [{"#": ' class="n"', "~": ' class="long"'}.get(name[:1], "") for name in head]
    names = "".join(f"<th{kind}>{text(name.lstrip('#~'))}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def text(value: str) -> str:
    return value if isinstance(value, Raw) else escape(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
