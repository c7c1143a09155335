"""
Answers of MATH: read the box, then compare as MATH's graders do (spelling is forgiven, arithmetic is not).
"""
import re
from fractions import Fraction

from common import UserError

UNICODE = str.maketrans({"−": "-", "π": r"\pi ", "∞": r"\infty ", "°": "", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
                         "∪": r"\cup ", "×": r"\times ", "·": r"\times ", "√": r"\sqrt ", "²": "^2", "³": "^3"})
END = r"(?![a-zA-Z])"  # of a command's name
WORDS = r"\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{"
SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in [
    (r",\\!\s*(?=\d{3})|\{,\}(?=\d{3})", ""),  # 10,\!000 and 10{,}000
    (r"\\\\", ";"), (r"\\begin\s*\{(\w+)\}", r"[\1;"), (r"\\end\s*\{\w+\}", "]"),  # matrices; now \( is LaTeX's $
    (rf"\\(?:left|right|[bB]igg?[lr]?){END}\.?|\\displaystyle{END}|\\!", ""),
    (rf"\\[,;: ]|\\q?quad{END}|~|\s+", " "),
    (rf"\\?[$%]|\\[()\[\]]|\^?\s*\\degree{END}|\^\s*(?:\\circ{END}|\{{\s*\\circ\s*\}})", ""),
    (rf"\\[dtc]frac{END}", r"\\frac"), (rf"\\([lgn])eq?(?:slant)?{END}", r"\\\1e "),
    (rf"\\varnothing{END}", r"\\emptyset "), (rf"\\cdot{END}|\*", r"\\times "),
    (rf"(?<![\\a-zA-Z])(sqrt|pi{END})", r"\\\1"), (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\(?:math|text)(?:bf|it)\s*\{([^{}]*)\}", r"\1"), (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (rf"(?:,\s*)?(?:{WORDS}\s*(?:and|or)\s*\}}|\s(?:and|or)\s)", ", "),
]]
# Units go, but only at the end and after a value; 3\mathrm{i}, 6\text{ PM} and 4\text{ million} have none.
TEXT_UNIT = re.compile(r"(?:(?<=[\d})\]])|(?<=\\pi)|(?<=(?<![\\a-z])[a-z]))(?:(?:\s|/|\\times)*" + WORDS +
                       r"(?!\s*(?:[ie]|[ap]\.?\s?m\.?|\w+illion|thousand|hundred|dozen)\s*\})[^{}]*\}"
                       r"(?:\^\{?\d\}?)?)+\s*$", re.I)
BARE_UNIT = re.compile(r"(?:(?<=[\d})])\s*|(?<=[a-z])\s+)(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:degrees?|radians?|"
                       r"(?:dollar|cent|yard|mile|second|minute|hour|day|week|month|year|pound|unit|point|way|"
                       r"(?:kilo|centi|milli)?(?:met(?:er|re)|gram|lit(?:er|re)))s?|inch(?:es)?|foot|feet|ft|mph|"
                       r"in|[ckm]m|kg|percent|people)(?:\s*\^\s*\{?\d\}?)?\s*$", re.I)
NAME = re.compile(r"(\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([a-zA-Z\d]\))?|\([a-z](?:,[a-z])+\))"  # x, a_1, f(x), (x,y)
                  r"(?:=|\\in(?=[\[(\\]))(?!.*=)")
# A product without signs, such as 3\sqrt{2}x^2. 1/2x and 1/2/3 can be read in two ways, so SLASH leaves them alone.
TERM = rf"(?:\d|[a-zA-Z]|\\[a-zA-Z]+{END}~?|\^|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})+"
GROUP = rf"\((-?{TERM}(?:[-+]{TERM})*)\)"
SLASH = re.compile(rf"(?<![\w\\}})!'^|.~/])(?:{GROUP}|({TERM}))/(?:{GROUP}|(\d+|[a-zA-Z]|\\[a-zA-Z]+(?:\{{\w+\}})?))"
                   r"(?![\w\\{(^/.!'~])")


def argument(text, start):
    r"""The LaTeX argument at `start`: {group}, \command or one character. Returns (content or None, end)."""
    match = re.compile(r"[\s~]*(\{|\\[a-zA-Z]+|[^\s{}])").match(text, start)
    if not match or match[1] != "{":
        return (match[1], match.end()) if match else (None, start)
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, match.end() - 1):  # \\. first: \{ is a set, not a group
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[match.end():brace.start()], brace.end()
    return None, start


def extract_answer(text):
    r"""Content of the last \boxed{} or \fbox{} in `text`, or None: no box, an empty one, or one that never closes."""
    boxes = list(re.finditer(rf"\\(?:boxed|fbox){END}\s*", text or ""))
    if not boxes:
        return None
    end = boxes[-1].end()
    if text[end:end + 1] == "{":
        answer = argument(text, end)[0]
    else:
        answer = re.compile(r"[^\s$]*").match(text, end)[0].rstrip(".,;")  # \boxed 5
    return (answer or "").strip() or None


def canonical(text):
    r"""Give \frac and \sqrt all their braces (\frac12, \frac1{72}, \sqrt3) and put a fraction's sign in front of it."""
    for match in reversed(list(re.finditer(r"\\(frac|sqrt(?!\s*\[))", text))):  # from the right: inner ones come first
        top, end = argument(text, match.end())
        bottom, end = argument(text, end) if match[1] == "frac" else ("", end)
        if top is None or bottom is None:
            continue
        new, before = rf"\sqrt{{{top}}}", text[:match.start()]
        if match[1] == "frac":
            if before[-1:] in ("", *"([{,;&=<>+-"):  # 2\frac{-1}{3} is a product, not 2-\frac13
                signs = [part for part in (top, bottom) if re.fullmatch(r"-[^-+]+", part)]
                before += "-" * len(signs)
                top, bottom = (part[1:] if part in signs else part for part in (top, bottom))
            new = rf"\frac{{{top}}}{{{bottom}}}"
        text = before + new + text[end:]
    return text


def decimal(match):
    r"""A decimal as the reduced fraction it is: .5 -> \frac{1}{2}, 5.00 -> 5."""
    value = Fraction(match[0])
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def normalize(answer, thousands=True):
    """An answer as its top-level elements [(name or "", value)]: "x=1, 2.0" -> [("x", "1"), ("", "2")]."""
    s = answer.translate(UNICODE)
    for pattern, spelling in SPELLINGS:
        s = pattern.sub(spelling, s)
    s = re.sub(r"(?<!\.)\.\s*$", "", s.strip())
    s = re.sub(WORDS + r"([^{}]*)\}", r"\1", TEXT_UNIT.sub("", s))  # words that are no unit are the answer
    s = BARE_UNIT.sub("", s)
    if thousands and not re.search(r"[(\[]|\\\{", s):  # (1,234) is a pair
        s = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", ""), s)
    s = re.sub(r"(?<![\d.])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)", lambda m: m[0].replace(" ", ""), s)
    s = re.sub(r"(?<=\d) (\d+)\s*/\s*(\d+)", r"\\frac{\1}{\2}", s)  # 1 1/2 is not 11/2
    s = re.sub(r"(?<=\d) (?=\d)", "~", s)  # nor is 1 2 twelve
    s = re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])", r"\1~", s).replace(" ", "")  # nor \pi r a command \pir
    s = re.sub(r"(?<![\d.])\d*\.\d+(?![\d.]|\\(?:overline|bar|dot|ldots|cdots))", decimal, s)
    s = SLASH.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", s)
    s = canonical(s).replace("+-", "-").replace("--", "+")
    s = re.sub(r"(?<![^(\[{,=])\+", "", s)  # a leading plus
    s = re.sub(r"([\^_])\{(\w)\}", r"\1\2", s)
    s = re.sub(r"^\(([A-Z])\)$", r"\1", s)  # the choice (A)
    while s[:1] == "{" and argument(s, 0)[1] == len(s):
        s = s[1:-1]
    elements, depth = [""], 0
    for token in re.findall(r"\\.|.", s):
        depth += (token in "([{" or token == r"\{") - (token in ")]}" or token == r"\}")
        elements[-1] += token
        if token == "," and depth == 0:
            elements[-1:] = [elements[-1][:-1], ""]
    named = [(m[1], e[m.end():]) if (m := NAME.match(e)) else ("", e) for e in elements if e]
    return [(name, value.lower() if re.fullmatch(r"No|[A-Z]?[a-z]{2,}", value) else value) for name, value in named]


def is_equiv(a, b):
    """Whether two answers (str or None) are the same by MATH's conventions. A missing answer equals nothing."""
    for thousands in (True, False):  # 100,200 is one number, or the list 100, 200
        x, y = normalize(a or "", thousands), normalize(b or "", thousands)
        if x and len(x) == len(y) and all(
                v == w and (m == n or not (m and n)) for (m, v), (n, w) in zip(x, y)):  # x=5 is 5, and not y=5
            return True
    return False


def load_grader(name):
    """--grader -> correct(answer or None, reference) -> bool."""
    if name == "builtin":
        return is_equiv
    try:
        import math_verify
    except ImportError:
        raise UserError("--grader math_verify needs the library: pip install math-verify[antlr4_13_2]") from None
    return lambda answer, reference: answer is not None and bool(math_verify.verify(
        *(math_verify.parse(rf"\boxed{{{text}}}") for text in (reference, answer))))
