"""The algebra behind the `maths` grader: read an answer as a tree and compare two trees by structure and value.

normalize.py   one spelling for the many ways of writing the same thing
answer.py      the readings of a normalised answer; uses presentation, tokens, parse, units, wording
equality.py    whether two readings are the same answer; uses quantity, regions, values
tree.py        the trees themselves
"""
