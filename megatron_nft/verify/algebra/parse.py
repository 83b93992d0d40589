r"""Parse the tokens of an expression into a tree (tree.py) by recursive descent.

Anything that the parser does not understand raises `NotUnderstood`; it never guesses.
"""

from __future__ import annotations

from fractions import Fraction

from megatron_nft.verify.algebra.binders import BINDERS, binder
from megatron_nft.verify.algebra.cursor import TokenCursor
from megatron_nft.verify.algebra.functions import SEVERAL, function, several
from megatron_nft.verify.algebra.indices import canonical_index
from megatron_nft.verify.algebra.tree import NotUnderstood, TooMuch, Tree, negate, read_number, times
from megatron_nft.verify.algebra.vocabulary import ACCENTS, FUNCTIONS, TAKEN, words
from megatron_nft.verify.algebra.wording import NUMBER_WORDS

MAX_DEPTH = 100
_OPEN = {"(": ")", "[": "]", "{": "}"}
_ROUND = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil")}
_PREFIXES = frozenset((r"\angle", r"\triangle"))
_STARTS = frozenset(words(r"\frac \binom \sqrt \cbrt \lfloor \lceil \sum \prod \int \lim"))
_FUNCTION_LETTERS = frozenset("fghFGHPQuI")  # single letters that are functions: f(2) is not 2 f


class Parser(TokenCursor):
    """One pass over a list of tokens, with one method per level of precedence."""

    def __init__(self, tokens: list[str]) -> None:
        super().__init__(tokens)
        self.depth = 0

    def parse(self) -> Tree:
        """Read the whole list as one expression. Raises NotUnderstood if it is not one."""
        tree = self.sum()
        if self.at < len(self.tokens):
            raise NotUnderstood(f"unexpected {self.tokens[self.at]!r}")
        return tree

    def sum(self) -> Tree:
        r"""Read terms joined by `+`, `-`, `\pm` and `\mp`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooMuch("nested too deeply")
        first = self.peek()
        if first in (r"\pm", r"\mp"):
            self.at += 1
            total: Tree = (first[1:], ("n", Fraction(0)), self.product())
        else:
            total = self.product()
        while (sign := self.peek()) in ("+", "-", r"\pm", r"\mp"):
            self.at += 1
            term = self.product()
            if sign in (r"\pm", r"\mp"):
                total = (sign[1:], total, term)
            else:
                term = negate(term) if sign == "-" else term
                total = (*total, term) if total[0] == "+" else ("+", total, term)
        self.depth -= 1
        return total

    def product(self) -> Tree:
        """Read factors and divisors, with or without a sign between them."""
        value = self.signed()
        while True:
            token = self.peek()
            if token == "*":
                self.at += 1
                value = times(value, self.signed())
            elif token == "/":
                self.at += 1
                value = ("/", value, self.signed())
            elif token == ":":  # AB : CD
                self.at += 1
                right = self.signed()
                while self.starts_factor(self.peek()):
                    right = times(right, self.power())
                value = ("/", value, right)
            elif self.starts_factor(token):
                value = times(value, self.power())
            else:
                return value

    def starts_factor(self, token: str) -> bool:
        """Whether `token` continues a product that is written without a multiplication sign."""
        if not token:
            return False
        if token[0].isdigit() or token[0] == ".":  # `1 2` and `x2` are not products, `\sqrt{3}2` and `3!2!` are
            return self.tokens[self.at - 1] in (")", "}", "!")
        if token[0] == '"':
            return True
        if token[0] == "\\":
            return (token[1:].isalpha() and token[1:] not in TAKEN) or token in _STARTS
        return token[0].isalpha() or token in _OPEN

    def signed(self) -> Tree:
        """Read a factor with its leading signs."""
        if self.peek() == "-":
            self.at += 1
            return negate(self.signed())
        if self.peek() == "+":
            self.at += 1
            return self.signed()
        return self.power()

    def power(self) -> Tree:
        """Read an atom with everything written behind it: powers, `!`, degree and percent signs."""
        base = self.atom()
        while True:
            token = self.peek()
            if token == "^":
                self.at += 1
                base = self.raised(base)
            elif token == "!":
                self.at += 1
                base = ("!", base)
            elif token == r"\degrees":
                self.at += 1
                base = ("deg", base)
            elif token in ("%", r"\%"):
                self.at += 1
                base = ("pct", base)
            else:
                return base

    def raised(self, base: Tree) -> Tree:
        r"""Read what follows `^`: an exponent, or the `\circ` of a degree sign."""
        if self.tokens[self.at : self.at + 3] == ["{", r"\circ", "}"]:
            self.at += 3
            return ("deg", base)
        if self.peek() == r"\circ":
            self.at += 1
            return ("deg", base)
        return ("^", base, self.exponent())

    def exponent(self) -> Tree:
        """Read an exponent, which need not stand in brackets."""
        if self.peek() in ("-", "+"):  # 10^-4
            return negate(self.power()) if self.take() == "-" else self.power()
        power = self.bracketed() if self.peek() in _OPEN else self.atom()
        if self.peek() == "^":  # 2^3^2 is 2^9
            self.at += 1
            return self.raised(power)
        return power

    def bracketed(self) -> Tree:
        """Read an expression in brackets of any kind."""
        close = _OPEN.get(opening := self.take())
        if close is None:
            raise NotUnderstood(f"expected a bracket, found {opening!r}")
        tree = self.sum()
        self.expect(close)
        return tree

    def argument(self) -> Tree:
        r"""Read an argument as TeX does: a group or a single token, of a number only the first digit (`\frac12`)."""
        token = self.peek()
        if token in ("{", "("):
            return self.bracketed()
        if token[:1].isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return ("n", Fraction(int(token[0])))
        return self.atom()

    def atom(self) -> Tree:
        """Read a number, a symbol, a command or a bracketed expression."""
        token = self.peek()
        if token[:1].isdigit() or token[:1] == ".":
            return self.number()
        if token in _OPEN:
            return self.bracketed()
        if token == "|":
            self.at += 1
            tree = self.sum()
            self.expect("|")
            return ("f", "abs", tree)
        if token[:1].isalpha():
            self.at += 1
            return self.symbol(token)
        if token[:1] == '"':
            self.at += 1
            return self.word(token[1:])
        if token[:1] == "\\":
            return self.command()
        raise NotUnderstood(f"unexpected {token!r}" if token else "unexpected end")

    def number(self) -> Tree:
        r"""Read a number: plain, mixed (`1\frac{4}{5}`) or in another base (`52_8`)."""
        token = self.take()
        value = read_number(token)
        if self.peek() == "_" and token.isalnum():
            self.at += 1
            base = self.subscript()
            base = str(NUMBER_WORDS.get(base, base))
            if not base.isdigit():
                raise NotUnderstood(f"{token} with the subscript {base}")
            return ("base", token.lstrip("0"), base)
        if token.isdigit() and (
            self.peek() == r"\frac" or (self.peek().isdigit() and self.tokens[self.at + 1 : self.at + 2] == ["/"])
        ):
            return self.mixed(value)
        return ("n", value)

    def mixed(self, whole: Fraction) -> Tree:
        r"""Read `1\frac{4}{5}` or `1 4/5` as 9/5 if the fraction is proper; otherwise take nothing after `whole`."""
        start, kept = self.at, list(self.tokens)
        if self.peek() == r"\frac":
            self.at += 1
            top, bottom = self.argument(), self.argument()
        else:
            top = ("n", read_number(self.take()))
            self.expect("/")
            bottom = self.atom()
        if top[0] == bottom[0] == "n" and 0 < top[1] < bottom[1] and top[1].denominator == bottom[1].denominator == 1:
            return ("n", whole + top[1] / bottom[1])
        self.at, self.tokens = start, kept
        return ("n", whole)

    def symbol(self, name: str) -> Tree:
        """Read a symbol with its primes and subscript, or an uninterpreted function if brackets follow."""
        while self.peek() == "'":
            name += self.take()
        if self.peek() == "_":
            self.at += 1
            name += "_" + canonical_index(self.subscript())
        while self.peek() == "'":
            name += self.take()
        if self.peek() == "^" and self.tokens[self.at + 1 : self.at + 2] in (["'"], ["{"]):
            name += self.raised_primes()
        if self.peek() == "(" and (arguments := self.opaque_arguments(name)):
            counts = name == "C" and len(arguments) == 2 and all(argument[0] == "n" for argument in arguments)
            return ("binom", *arguments) if counts else ("app", name, *arguments)
        return ("s", name)

    def opaque_arguments(self, name: str) -> tuple[Tree, ...]:
        """Return the arguments if `name(...)` is an application, or () if it is a product such as n(n - 1)."""
        start, kept, depth = self.at, list(self.tokens), self.depth
        self.at += 1
        try:
            arguments = [self.sum()]
            while self.peek() == ",":
                self.at += 1
                arguments.append(self.sum())
            self.expect(")")
            plain = arguments[0][0] in ("n", "s") or name[0] in _FUNCTION_LETTERS or name.endswith("'")
            if plain or len(arguments) > 1:
                return tuple(arguments)
        except TooMuch:
            raise
        except NotUnderstood:
            pass
        self.at, self.tokens, self.depth = start, kept, depth
        return ()

    def word(self, text: str) -> Tree:
        """Read a short word as a symbol."""
        if not text or len(text) > 40 or not text.replace(" ", "").isalnum():
            raise NotUnderstood(f"the words {text!r:.60} in an expression")
        return self.symbol(text)

    def command(self) -> Tree:
        """Read a LaTeX command with its arguments."""
        token = self.take()
        name = token[1:]
        if name == "frac":
            top = self.argument()
            return ("/", top, self.argument())
        if name == "sqrt":
            if self.peek() == "[":
                degree = self.bracketed()
                return ("root", degree, self.argument())
            return ("root", ("n", Fraction(2)), self.argument())
        if name == "cbrt":
            return ("root", ("n", Fraction(3)), self.argument())
        if name == "binom":
            top = self.argument()
            return ("binom", top, self.argument())
        if name == "infty":
            return ("inf",)
        if name == "dollar":
            return self.atom()
        if name in SEVERAL:
            return several(self, name)
        if name in BINDERS:
            return binder(self, name)
        if token in _ROUND:
            tree = self.sum()
            self.expect(_ROUND[token][0])
            return ("f", _ROUND[token][1], tree)
        if name in FUNCTIONS:
            return function(self, name)
        if name in ("abs", "floor", "ceil"):
            return ("f", name, self.bracketed())
        if token in ACCENTS:
            inner = self.subscript() if self.peek() == "{" else self.take()
            is_unit_vector = name in ("vec", "hat") and inner in ("i", "j", "k")  # as plain letters
            return self.symbol(inner if is_unit_vector else f"{name}:{inner}")
        if token in _PREFIXES and (self.peek()[:1].isalpha() or self.peek()[:1] == "\\"):
            return self.atom()
        if not name.isalpha() or name in TAKEN:
            raise NotUnderstood(f"unexpected {token!r}")
        return self.symbol(token)
