# ruff: noqa: RUF001 (Unicode signs that look like others are what this table is about)
"""The meaning of the signs, commands and names of LaTeX, Unicode and plain text."""


def words(text: str) -> tuple[str, ...]:
    """Split a literal into its words."""
    return tuple(text.split())


# Unicode character -> what it is written as in LaTeX or plain text.
CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": "*", "·": "*", "∙": "*", "•": "*",
    "÷": "/", "⁄": "/", "∕": "/", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "∞": r"\infty ",
    "°": r"^\circ ", "º": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "′": "'", "’": "'", "‘": "'", "″": "''", "“": '"', "”": '"', "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ", "€": r"\text{euros}", "£": r"\text{pounds}",
    "∠": r"\angle ", "△": r"\triangle ", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ı": "i", "ℏ": r"\hbar ",
    "→": r"\to ", "⟶": r"\to ", "⇒": r"\Rightarrow ", "⟹": r"\Rightarrow ", "℃": r"^\circ C", "℉": r"^\circ F",
    "。": ".", "、": ", ", "！": " ", "▲": r"\triangle ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
}  # fmt: skip
GREEK = words(
    """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon
    phi chi psi omega
    """
)
GREEK_LOWER = "αβγδεζηθικλμνξοπρστυφχψω"
CHARACTERS |= {letter: f"\\{name} " for letter, name in zip(GREEK_LOWER, GREEK, strict=True)}
CHARACTERS |= {letter.upper(): f"\\{name.capitalize()} " for letter, name in zip(GREEK_LOWER, GREEK, strict=True)}
CHARACTERS |= {"ς": r"\sigma ", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "µ": r"\mu "}
# LaTeX command (without its backslash) -> the one spelling that the parser knows.
COMMANDS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom",
    "leq": r"\le", "leqslant": r"\le", "leqq": r"\le", "geq": r"\ge", "geqslant": r"\ge", "geqq": r"\ge",
    "neq": r"\ne", "lt": "<", "gt": ">", "cdot": "*", "ast": "*", "bullet": "*", "div": "/", "colon": ":",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")",
    "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "varnothing": r"\emptyset", "degree": r"^\circ",
    "prime": "'", "varepsilon": r"\epsilon", "vartheta": r"\theta", "varphi": r"\phi", "dots": r"\ldots",
    "cdots": r"\ldots", "percent": r"\%", "exponentialE": "e", "imath": "i", "jmath": "j", "infin": r"\infty",
    "land": ",", "lor": ",", "wedge": ",", "vee": ",", "euro": r"\text{euros}", "pounds": r"\text{pounds}", "iff": ",",
    "arcsec": r"\arcsec", "implies": r"\Rightarrow", "simeq": r"\approx", "R": r"\mathbb{R}", "isin": r"\in",
}  # fmt: skip
# LaTeX commands that only affect the layout.
DROPPED = words(
    """
    left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle
    scriptstyle limits nolimits mathstrut strut hfill boldmath large Large LARGE huge Huge normalsize small
    nonumber notag quad qquad hspace vspace enspace thinspace negthinspace underline checkmark phantom
    """
)
# LaTeX commands whose argument is text or upright letters; all become `\text`.
TEXTS = words(
    """
    text textbf textit textrm textnormal textsf texttt textup mbox hbox mathrm mathit mathbf mathsf mathtt
    emph operatorname boldsymbol bm pmb symbf rm bf it
    """
)
FUNCTIONS = frozenset(
    words("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc ln log lg exp")
)
# Names in plain text -> the LaTeX command, or the sign, that they stand for.
NAMES = {name: f"\\{name}" for name in FUNCTIONS} | {
    "asin": "\\arcsin", "acos": "\\arccos", "atan": "\\arctan", "sqrt": "\\sqrt", "cbrt": "\\cbrt", "pi": "\\pi",
    "Pi": "\\pi", "infinity": "\\infty", "inf": "\\infty", "oo": "\\infty", "abs": "\\abs", "floor": "\\floor",
    "ceil": "\\ceil", "ceiling": "\\ceil",
    "binom": "\\binom", "frac": "\\frac", "theta": "\\theta", "alpha": "\\alpha", "beta": "\\beta",
    "gamma": "\\gamma", "lambda": "\\lambda", "omega": "\\omega", "phi": "\\phi", "and": ",", "or": ",",
    "percent": "\\%", "pct": "\\%", "degrees": "\\degrees", "degree": "\\degrees", "union": "\\cup",
}  # fmt: skip
# Commands that put a mark or another typeface on a letter: `\vec{v}` is a symbol of its own.
ACCENTS = frozenset(
    "\\" + name
    for name in words("dot ddot hat bar vec tilde overline widehat overrightarrow mathcal mathbb mathscr mathfrak")
)
# Commands that are never symbols.
TAKEN = frozenset(
    words("""
    frac binom sqrt cbrt left right infty in cup cap pm mp approx text begin end int sum prod lim iint oint
    partial nabla Rightarrow rightarrow to mapsto equiv pmod bmod mod ldots emptyset setminus subset forall
    exists neg circ langle rangle lfloor rfloor lceil rceil beginmatrix endmatrix dollar degrees perp
    parallel sim propto ne le ge hline overset underset stackrel boxed fbox
    """)
)
