"""A position in a list of tokens, and the readers that need no grammar."""

from __future__ import annotations

from megatron_nft.verify.algebra.tree import NotUnderstood


class TokenCursor:
    """Reads a list of tokens from left to right. `at` is the index of the next token."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str:
        """Return the next token without taking it; the empty string at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        """Take the next token."""
        token = self.peek()
        if not token:
            raise NotUnderstood("unexpected end")
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        """Take the next token, which has to be `token`."""
        if self.peek() != token:
            raise NotUnderstood(f"expected {token!r}, found {self.peek()!r}")
        self.at += 1

    def subscript(self) -> str:
        """Return the text of a subscript without braces and spaces."""
        if self.peek() != "{":
            return self.take().lstrip('"\\')
        self.at += 1
        depth = 1
        parts: list[str] = []
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return "".join(parts)
            if token not in ("{", "}"):
                parts.append(token.lstrip('"\\'))

    def raised_primes(self) -> str:
        r"""Read `^{\prime}` as primes of the name; take nothing and return "" if it is another power."""
        at = self.at + 1
        braces = self.tokens[at] == "{"
        at += braces
        start = at
        while at < len(self.tokens) and self.tokens[at] == "'":
            at += 1
        if at == start or (braces and self.tokens[at : at + 1] != ["}"]):
            return ""
        self.at = at + braces
        return "'" * (at - start)
