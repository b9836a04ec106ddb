"""How numbers and tables are shown to people."""

from train.telemetry.formatting import table


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
