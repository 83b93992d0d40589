"""The table of formulas: each stored once, found by its number."""

import io

from test_report_pack import read_elements

from megatron_nft.report.formulas import BLOCK_SIZE, FormulaTable


def stored(stream):
    """All formulas in order, from an independent reading of the elements."""
    blocks = read_elements(stream, "formulas")
    assert all(len(block) == BLOCK_SIZE for block in blocks[:-1])
    return [formula for block in blocks for formula in block]


def test_each_formula_is_stored_once_and_each_use_is_a_number():
    stream = io.BytesIO()
    table = FormulaTable(stream)
    assert table.encode("plain, and $5") == "plain, and $5"
    assert table.encode("a $x$ b $y$ and $x$") == ["a ", 0, " b ", 1, " and ", 0]
    assert table.encode(r"\boxed{y} is \(x\)") == [[1], " is ", 0]
    assert table.encode(r"\[x\]") == [2]  # on its own line it is another formula
    assert table.encode(r"$\undefined$") == [3]
    table.flush()
    table.flush()  # nothing is left
    assert stored(stream) == [
        ["x", ["math", ["mi", "x"]]],
        ["y", ["math", ["mi", "y"]]],
        ["x", ["math", {"display": "block"}, ["mi", "x"]]],
        [r"\undefined", None],
    ]


def test_numbers_find_their_formula_in_every_block():
    stream = io.BytesIO()
    table = FormulaTable(stream)
    count = 2 * BLOCK_SIZE + 7
    numbers = [table.encode(f"${i}$")[0] for i in range(count)]
    assert [table.encode(f"${i}$")[0] for i in range(count)] == numbers
    table.flush()
    assert table.num_blocks == 3
    formulas = stored(stream)
    assert [formulas[number][0] for number in numbers] == [str(i) for i in range(count)]


def test_half_a_character_does_not_cost_the_page():
    stream = io.BytesIO()
    table = FormulaTable(stream)
    assert table.encode("$\ud83d$") == [0]
    table.flush()
    assert stored(stream) == [["?", None]]
