"""How numbers and tables are shown to people."""

import html
import re

from tensorboard.plugin_util import markdown_to_safe_html

from train.telemetry.formatting import markdown_table, rate, table


def test_slow_training_is_not_shown_as_none():
    assert [rate(speed) for speed in (0.2401, 1.5, 9.994, 9.996, 1234.4)] == ["0.24", "1.5", "9.99", "10", "1,234"]


def test_columns_are_as_wide_as_their_longest_cell():
    rows = [["", "images/s", "ms"], ["ours", "1,000", "2.5"], ["the others'", "900"]]
    assert table(rows).splitlines() == [
        "             images/s   ms",
        "ours            1,000  2.5",
        "the others'       900",
    ]


def test_alignment_and_least_widths_repeat_for_further_columns():
    rows = [["a", "b", "c", "d"], ["1", "22", "333", "4444"]]
    assert table(rows, align="><", widths=(3, 2), gap="|").splitlines() == ["  a|b |c  |d", "  1|22|333|4444"]


def test_tensorboard_shows_the_cells_of_a_markdown_table_as_they_are():
    names = [
        "a|b <i>",
        r"a\|b",
        "a\\",
        "`a` *b* _c_ [d](e) {f} &lt; > g & h",
        "<script>",
        "_a_b_",
        "**",
        "|",
        "# 1. - +!",
    ]
    page = markdown_to_safe_html(markdown_table(["class", "AP"], [[name, "1 %"] for name in names]))
    cells = [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    assert cells == [cell for name in names for cell in (name, "1 %")]
