"""Answers of MATH: reading the box, and tables of pairs that a careful grader calls equal, or unequal."""
import random
import re

import pytest

from eval_math import extract_answer, is_equiv

EQUAL = [
    # fractions in every spelling
    (r"\frac12", r"\frac{1}{2}"), (r"\frac1{72}", r"\frac{1}{72}"), (r"\frac{1}2", r"\frac{1}{2}"),
    (r"\frac 12", r"\frac12"), (r"\dfrac{3}{4}", r"\frac{3}{4}"), (r"\tfrac{3}{4}", r"\frac34"),
    (r"\cfrac{3}{4}", r"\frac34"), ("3/4", r"\frac{3}{4}"), ("3 / 4", r"\dfrac34"),
    (r"\frac { 3 } { 4 }", r"\frac{3}{4}"), (r"\frac{\pi}{2}", r"\frac\pi2"), (r"\pi/2", r"\frac{\pi}{2}"),
    (r"\frac \pi 2", r"\pi/2"), ("x/2", r"\frac{x}{2}"), ("(x+1)/2", r"\frac{x+1}{2}"), ("1/(x+1)", r"\frac{1}{x+1}"),
    (r"3\sqrt{2}/4", r"\frac{3\sqrt2}{4}"), (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
    (r"\frac{\frac12}{3}", r"\frac{\dfrac{1}{2}}{3}"), ("x^2/4", r"\frac{x^2}{4}"), (r"2^{1/2}", r"2^{\frac12}"),
    ("3+1/2", r"3+\frac{1}{2}"), ("(1/2, 3/4)", r"\left(\frac12,\frac34\right)"),
    (r"\frac{1}{\sqrt{2}}", r"1/\sqrt{2}"), (r"\frac{n(n+1)}2", r"\dfrac{n(n+1)}{2}"), (r"\frac{2x}{y}", "2x/y"),
    # the sign of a fraction
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), ("-1/2", r"-\frac12"), ("-1/2", r"\frac{-1}{2}"),
    (r"\frac{1}{-2}", r"-\frac{1}{2}"), (r"\frac{-1}{-2}", r"\frac12"), ("(-1)/2", "-1/2"),
    (r"3+\frac{-1}{2}", r"3-\frac{1}{2}"), (r"3-\frac{-1}{2}", r"3+\frac12"),
    (r"\left(\frac{-1}{2},3\right)", r"(-\frac12,3)"), ("−1/2", "-1/2"), (r"- \frac{1}{2}", r"-\frac12"),
    (r"\frac{-x}{2}", r"-\frac{x}{2}"),
    # decimals
    ("0.5", ".5"), ("0.5", r"\frac{1}{2}"), (".5", "1/2"), ("0.50", "0.5"), ("5.0", "5"), ("5.", "5"),
    ("0.25", r"\frac14"), ("1.5", "3/2"), ("-.5", r"-\frac12"), ("-0.125", "-1/8"), ("12.30", "12.3"),
    (r"(0.5, .25)", "(.5,0.25)"), (r"{.5}", "0.5"), (r"0.5\pi", r"\frac12\pi"),
    (r"1.5\times 10^3", r"1.50 \times 10^{3}"), (r"x=.5", "0.5"),
    # roots
    (r"\sqrt3", r"\sqrt{3}"), (r"\sqrt 3", r"\sqrt{3}"), (r"2\sqrt2", r"2\sqrt{2}"), ("sqrt(3)", r"\sqrt{3}"),
    ("sqrt3", r"\sqrt{3}"), (r"\sqrt{\frac12}", r"\sqrt{\dfrac{1}{2}}"), (r"\sqrt[3]{2}", r"\sqrt[3]{2}"),
    (r"\sqrt x", r"\sqrt{x}"), ("√3", r"\sqrt3"), (r"5+\sqrt5i", r"5+\sqrt{5}i"), (r"\sqrt\pi", r"\sqrt{\pi}"),
    # spaces and sizes
    ("x + 1", "x+1"), (r"x\, +\; 1", "x+1"), (r"3 \sqrt { 2 }", r"3\sqrt{2}"), (r"2\!x", "2x"),
    (r"\left(1,2\right)", "(1,2)"), (r"\left[0,\infty\right)", r"[0,\infty)"), (r"\bigl(1,2\bigr)", "(1, 2)"),
    (r"\left\{1,2\right\}", r"\{1,2\}"), (r"\left| x \right|", "|x|"), ("x~+~1", "x+1"), (r"1\quad", "1"),
    ("\n7\n", "7"), (r"\displaystyle\frac12", r"\frac12"), (r"\pi r^2", r"\pi  r^{2}"),
    # dollars and other delimiters, the final full stop, outer braces
    ("$5$", "5"), (r"\$5", "5"), (r"\$12.50", "12.50"), (r"\(5\)", "5"), (r"\[5\]", "5"), ("5.", "5"), ("{5}", "5"),
    ("{{5}}", "5"), ("$x+1$.", "x+1"),
    # thousands
    ("1,234", "1234"), (r"1,\!234", "1234"), (r"10,\!000,\!000", "10000000"), ("1{,}234", "1234"),
    (r"10{,}000", "10,000"), ("1,234,567", "1234567"), ("1,234.5", "1234.5"), (r"10,\! 000", "10000"),
    (r"10\,000", "10000"), ("10 000", "10000"), (r"\$1,000", "1000"), ("-1,000", "-1000"),
    ("1,000, 2,000", "1000,2000"),
    (r"\frac{1,000}{3}", r"\frac{1000}{3}"), ("x=1,000", "1000"), (r"1,\!000\text{ cm}", "1000"),
    ("100,200", "100, 200"), ("(1,234)", "(1, 234)"),
    # units, degrees, percent
    (r"5\text{ cm}", "5"), (r"5 \text{ cm}^2", "5"), (r"5\text{cm}^{3}", "5"), (r"5\,\mathrm{cm}", "5"),
    (r"5 \mbox{ inches}", "5"), (r"5\ \text{m/s}", "5"), (r"10\text{ mph}.", "10"), ("5 cm", "5"), ("5 feet", "5"),
    ("5 in", "5"),
    ("12 square units", "12"), ("3 hours", "3"), ("5cm^2", "5"), ("5 cm²", "5"), (r"\frac12\text{ mile}", "1/2"),
    (r"\sqrt{2}\text{ units}", r"\sqrt2"), (r"4\pi\text{ square feet}", r"4\pi"), (r"2\pi \text{ cm}", r"2\pi"),
    (r"3x\text{ dollars}", "3x"), (r"5\text{ ft}\cdot\text{lb}", "5"), (r"\text{3 hours}", "3"),
    (r"(2+\sqrt3)\text{ m}", r"(2+\sqrt{3})"), ("90^\\circ", "90"), (r"90^{\circ}", "90"), (r"90^{ \circ }", "90"),
    (r"90\degree", "90"), ("90°", "90"), ("90 degrees", "90"), (r"45^\circ\text{ C}", "45"), (r"50\%", "50"),
    ("50%", "50"), (r"50 \%", "50"), ("50 percent", "50"), (r"\frac{\pi}{3}\text{ radians}", r"\pi/3"),
    (r"\pi radians", r"\pi"),
    # words
    (r"\text{even}", "even"), (r"\text{Even}", "even"), (r"\text{Monday}", "monday"), (r"\text{(A)}", "(A)"),
    ("(B)", "B"), (r"\textbf{(C)}", "C"), (r"\mathrm{No}", "no"), (r"\text{ Yes }", "yes"),
    (r"\text{June 20}", "June 20"), (r"6\text{ PM}", "6 PM"),
    # names in front of the value
    ("x=5", "5"), ("x = 5", "x=5"), (r"x=\frac12", "0.5"), ("k=-3", "-3"), (r"\theta = 30^\circ", "30"),
    ("f(x)=x^2", "x^2"), ("AB = 7", "7"), ("y=2x+1", "2x+1"), ("a_1 = 3", "3"), ("a_{1}=3", "a_1=3"),
    ("(x,y)=(1,2)", "(1,2)"), (r"x\in[-2,7]", "[-2,7]"), (r"x \in (1,2)", "(1,2)"), ("area = 12", "12"),
    ("x=1, x=2", "1,2"), ("x=1,2", "x=1, x=2"), ("P(A)=0.5", r"\frac12"),
    # lists and tuples, exponents, symbols
    ("1, 2, 3", "1,2,3"), (r"2\text{ and }3", "2,3"), ("2 or 3", "2, 3"), (r"1,2,\text{ and }3", "1, 2, 3"),
    (r"x=2\text{ or }x=3", "2,3"), (r"\{ 1 , 2 \}", r"\{1,2\}"), ("x^{2}", "x^2"), ("x_{1}", "x_1"),
    ("x^{10}", "x^{10}"), ("52_{8}", "52_8"), (r"x\le 3", r"x \leq 3"), (r"x\geqslant 3", r"x\ge3"),
    (r"x\neq 0", r"x \ne 0"), ("x≤3", r"x\le3"), ("∞", r"\infty"), (r"(-\infty,+\infty)", r"(-\infty,\infty)"),
    ("+5", "5"), (r"2\cdot 3", r"2\times3"), (r"2\cdot3", "2*3"), (r"\varnothing", r"\emptyset"),
    (r"(-\infty, -2)\cup(3,\infty)", r"\left(-\infty,-2\right) \cup \left(3,\infty\right)"), ("3π", r"3\pi"),
    (r"3\mathbf{i}", "3i"), (r"12_{\text{seven}}", r"12_{\text{ seven}}"),
    (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"), ("2pi/3", r"\frac{2\pi}{3}"),
    (r"1 \pm \sqrt{19}", r"1\pm\sqrt{19}"), (".35625", r"\frac{57}{160}"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} \frac{-1}{3} \\ \frac23 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
    (r"\begin{pmatrix} \frac12 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}"),
    # doubled backslashes
    (r"\\frac{1}{4}", r"\frac14"), (r"(5, \\infty)", r"(5,\infty)"), (r"3\\sqrt{13}", r"3\sqrt{13}"),
    (r"12\\pi", r"12\pi"), (r"\\left(1,2\\right]", "(1,2]"), (r"\\{1,2\\}", r"\{1,2\}"), (r"5\\%", "5"),
    (r"10\\text{ cm}", "10"), (r"\\$5", "5"), (r"\\\\frac{1}{4}", r"\frac14"), (r"45^\\circ", "45"),
    (r"\\dfrac{\\pi}{2}", r"\frac{\pi}{2}"), (r"2 \\pm \\sqrt{3}", r"2\pm\sqrt3"),
    (r"\\begin{pmatrix} 1 \\\\ \\frac12 \\end{pmatrix}", r"\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}"),
    # order where MATH means a set
    ("-2,1", "1,-2"), ("1,2", "2,1"), ("10, 4, -2", "4, 10, -2"), (r"2\text{ and }3", "3, 2"), ("x=2, x=3", "3,2"),
    (r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"), (r"1\pm\sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"x = 1 \pm \sqrt{19}", r"x=1-\sqrt{19}\text{ or }x=1+\sqrt{19}"), (r"\pm 3", "3,-3"),
    (r"\pm3", r"-3\text{ and }3"), (r"\frac{1\pm\sqrt5}{2}", r"\frac{1-\sqrt5}{2}, \frac{1+\sqrt5}{2}"),
    (r"\pm1,\pm2", "1,-1,2,-2"),
    (r"(\pm 1, 2)", "(1,2), (-1,2)"), (r"2\mp\sqrt3", r"2\mp\sqrt{3}"), (r"(1\pm i, 1\mp i)", "(1+i,1-i),(1-i,1+i)"),
    (r"\{1,2\}", r"\{2,1\}"), (r"\left\{\frac12, 3\right\}", r"\{3, 0.5\}"), (r"\{(1,2),(3,4)\}", r"\{(3,4),(1,2)\}"),
    ("(1,2),(3,4)", "(3,4), (1,2)"), (r"(-\infty,1)\cup(2,3]", r"(2,3] \cup (-\infty,1)"),
    (r"x \in (-\infty,1)\cup(2,3]", r"(2,3]\cup(-\infty,1)"), ("a=1, b=2", "b=2,a=1"), ("(a,b)=(1,2)", "(1,2)"),
    ("a=1, b=2", "1,2"), (r"\text{C, F, H}", "H, C, F"), ("1+x", "x+1"), (r"\sqrt2+1", r"1+\sqrt{2}"),
    (r"-b+\frac{a}{2}", r"\frac a2-b"), ("x^2-3x+2", "2-3x+x^2"), ("2y=x-1", "2y=-1+x"),
    # matrices, whichever brackets they have
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\left[\begin{array}{c|c} 1 & 2 \end{array}\right]", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\left(\begin{matrix}1\\2\end{matrix}\right)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\left[ \begin{matrix} 1 \\ 2 \end{matrix} \right]", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\bigl(\begin{smallmatrix}1\\2\end{smallmatrix}\bigr)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\\\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1 \\ 2 \\ \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\[1mm]2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\ [ 0.5em ] -2\end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
    (r"\begin{Bmatrix}0.5\\2\end{Bmatrix}", r"\begin{pmatrix}\frac12\\2\end{pmatrix}"),
    (r"\mathbf{A} = \begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"2\left(\begin{matrix}1\\2\end{matrix}\right)", r"2\begin{pmatrix}1\\2\end{pmatrix}"),
    # ordinals, bases, quotes
    (r"12^{\mathrm{th}} \text{ grade}", "12"), (r"12^{\text{th}} \text{ grade}", r"12^{\mathrm{th}} \text{ grade}"),
    ("12th", "12"), (r"3^\text{rd}", "3"), (r"1^{st}", "1"), (r"22\text{nd}", "22"), (r"\text{12th grade}", "12"),
    ("2516", "2516_8"), ("2516_{8}", "2516_8"), ("2516_8", r"2516_{\text{8}}"), ("-12_3", "-12"),
    ("n=2516_8", "2516_8"),
    ('"A"', "A"), ("``A''", "A"), ("“even”", r"\text{even}"), (r"\text{``no''}", "no"),
    (r"6\text{ p.m.}", r"\text{6 PM}"), (r"\text{4:30 p.m.}", "4:30 pm."), ("9 A.M.", r"9\text{ a.m.}"),
    # units outside \\text, other commands for words and styles
    ("60 m/s", "60"), (r"60\text{ m/s}", "60 m/s"), ("4$ inches per second", "4"), ("30 km/h", "30"), ("5 ft/sec", "5"),
    ("12 miles per hour", "12"), (r"2.5\ \text{kg}", "5/2"), ("7 cubic feet", "7"), (r"9\pi \text{ in}^2", r"9\pi"),
    (r"5\textnormal{ cm}", "5"), (r"5\textup{ cm}", "5"), (r"5\hbox{ cm}", "5"), (r"\textup{even}", "even"),
    (r"\hbox{Yes}", "yes"), (r"\boldsymbol{5}", "5"), (r"\boldsymbol{\frac12}", r"\frac12"), (r"\mathbf 5", "5"),
    (r"\bm{x+1}", "x+1"), (r"2\mathbf{i}-\mathbf{j}", "2i-j"), (r"\emph{odd}", "odd"),
    # products, relations, scripts, names of one thing
    (r"2\cdot\sqrt3", r"2\sqrt{3}"), (r"12\cdot\pi", r"12\pi"), ("2*pi", r"2\pi"), (r"3\times\sqrt{2}", r"3\sqrt2"),
    ("2*x", "2x"), (r"2\cdot(x+1)", "2(x+1)"), ("x**2", "x^2"), (r"x\lt 3", "x<3"), (r"x\gt 3", "x>3"), 
    ("x>=3", r"x\ge 3"), ("x<=3", r"x\le3"), (r"\log_{2}3", r"\log_2 3"), (r"x_{n}y", "x_ny"),
    (r"\tbinom{5}{2}", r"\binom52"),
    ("x^\\frac12", r"x^{1/2}"), (r"\sqrt\frac12", r"\sqrt{\frac{1}{2}}"),
    ("2infty", r"2\infty"), ("1/x^2", r"\frac{1}{x^2}"),
    # integer and decimal of one value
    ("5", "5.0"), ("18.90", "18.9"), (r"\$1,234.00", "1234"), ("2.0x+1.0", "2x+1"), ("(1.0,2.50)", "(1,2.5)"),
    (r"\frac{5.0}{2}", r"\frac52"), ("27.0", "27"), ("-3.00", "-3"), ("1 1/2", r"1\frac12"), ("5{,}000.0", "5000"),
]

UNEQUAL = [
    # numbers and signs
    ("1", "2"), ("12", "21"), ("5", "-5"), ("1", "10"), ("0", "-1"), ("1 2", "12"), (r"1\,2", "12"), ("1.5", "15"),
    ("0.5", "5"), ("0.3", "0.33"), ("100", "1000"),
    # fractions: no arithmetic, no borrowed digits
    (r"\frac12", "12"), (r"\frac{1}{2}", r"\frac{2}{1}"), (r"\frac{1}{2}", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"\frac12"), (r"\frac{1}{23}", r"\frac{12}{3}"), (r"\frac123", r"\frac{1}{23}"),
    ("1 1/2", "11/2"), ("1 1/2", "1/2"), (r"3\frac12", r"\frac{3}{2}"), (r"2\frac{-1}{3}", r"2-\frac13"),
    (r"\frac{-x+1}{2}", r"-\frac{x+1}{2}"), (r"\frac{1-x}{2}", r"\frac{x-1}{2}"), ("1/2x", r"\frac{1}{2x}"),
    ("1/2/3", r"\frac{1}{2}"), ("0.333", "1/3"), (r"\frac{2}{4}", r"\frac12"), (r"\frac{6}{2}", "3"),
    (r"\frac{x}{2}", r"\frac{2}{x}"), ("x^2/4", "x^{2/4}"), ("3+1/2", "4/2"), (r"\frac{\pi}{2}", r"\frac{\pi}{3}"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"), ("(x+1)/2", "x+1/2"), ("-1/2", "1/2"),
    # repeating decimals are not the finite ones
    (r"0.\overline{3}", "0.3"), (r"0.1\overline{6}", r"0.10\overline{6}"), ("0.333...", "0.333"),
    (r"0.3\ldots", "0.3"), (r"0.\overline{12}", r"0.1\overline{2}"),
    # brackets, order, lists
    ("(1,2)", "[1,2]"), ("(1,2)", "(1,2]"), ("[1,2)", "(1,2]"), ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("1,2", "12"),
    ("1,2,3", "123"), ("1,2,3", "1,2"), ("1,23", "123"), ("1,2345", "12345"), ("(1,234)", "(1234)"),
    ("(1,2)", "12"), ("(1,2)", "(1,2,3)"), (r"\{1,2\}", "(1,2)"), (r"\{1,2\}", r"\{1,3\}"), ("1,234", "1.234"),
    ("1,234", "234"), ("12,34", "1234"), ("(0,1)", r"(0,1)\cup(2,3)"), (r"(-\infty,3)", r"(\infty,3)"),
    (r"[0,\infty)", r"(0,\infty)"), (r"(-\infty,2)", r"(-\infty,2]"), (r"2\text{ and }3", "23"), ("|x|", "x"),
    ("(A)", "(B)"), ("A", "a"),
    # powers, roots, symbols
    ("x^2", "x2"), ("x^2", "x_2"), ("x^{10}", "x^10"), ("2^3", "23"), ("x^{12}", "x^12"), (r"\sqrt{3}", "3"),
    (r"\sqrt{23}", r"\sqrt23"), (r"\sqrt[3]{2}", r"\sqrt{2}"), (r"\sqrt[3]{2}", r"3\sqrt2"), (r"2\sqrt3", r"3\sqrt2"),
    (r"\pi", "3.14"), (r"\pi", r"2\pi"), (r"\pi", "p"), (r"x\le 3", "x<3"), (r"x\le 3", r"x\ge 3"),
    (r"x\neq 3", "x=3"), ("x>3", "3>x"), (r"\infty", r"-\infty"), (r"\pm 3", "3"), (r"\pm3", "-3"),
    (r"2\times3", "23"), ("52_8", "52_9"), ("528", "52_8"),
    (r"12_{\text{seven}}", r"12_{\text{six}}"), ("x+1", "x-1"), ("x+1", "1+2x"), ("2x", "x"), ("n!", "n"),
    ("3i", "3"), (r"3\mathrm{i}", "3"), (r"3\mathrm{i}", "3e"), ("2e", "2"),
    # words and units that carry the answer
    (r"\text{even}", r"\text{odd}"), (r"\text{Yes}", r"\text{No}"), (r"\text{Monday}", r"\text{Sunday}"),
    (r"\text{(A)}", r"\text{(B)}"), (r"6\text{ PM}", r"6\text{ AM}"), (r"6\text{ p.m.}", r"6\text{ a.m.}"),
    (r"4\text{ million}", "4"), (r"4\text{ million}", r"4\text{ billion}"),
    (r"5\text{ hours }30\text{ minutes}", "530"), (r"5\text{ hours }30\text{ minutes}", r"5\text{ hours}"),
    (r"\text{cm}", r"\text{m}"), (r"5\text{ cm}", "6"), (r"5\text{ cm}^2", "52"), (r"50\%", "0.5"), (r"50\%", "5"),
    (r"90^\circ", "900"), (r"90^\circ", "9"), ("5x", "5"), ("5 m", "5n"), ("June 20", "20"), ("abc", "abd"),
    (r"\angle\text{ABC}", r"\angle\text{DEF}"),
    # names
    ("x=5", "y=5"), ("x=5", "x=6"), ("x=5", "x"), ("2x=5", "5"), ("x^2=4", "4"), ("x=1,y=2", "x=2,y=1"),
    ("f(x)=x", "g(x)=x"), ("x+y=3", "3"), ("y=2x+1", "y=2x-1"), (r"\sin x=1", r"\cos x=1"), ("x=y=5", "6"),
    # matrices
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # doubled backslashes
    (r"\\frac{1}{4}", r"\frac{1}{5}"), (r"\\frac{1}{4}", "14"), (r"3\\sqrt{13}", r"3\sqrt{12}"), (r"12\\pi", "12"),
    (r"1\\2", "12"), (r"1 \\ 2", "12"), (r"(5,\\infty)", r"(-5,\infty)"),
    (r"\\begin{pmatrix}1\\\\2\\end{pmatrix}", "12"),
    # order, and what only looks like it
    ("1,1,2", "1,2,2"), ("1,1", "1"), ("1,2", "1,2,2"), ("(1,2),(3,4)", "(2,1),(3,4)"), ("[1,2]", "[2,1]"),
    (r"\{1,2\}", "1,2"), (r"\{1,2\}", "[1,2]"), (r"\{(1,2)\}", r"\{(2,1)\}"), (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\{1,2\}", r"\{12\}"), ("a=1,b=2", "b=1,a=2"), ("a=1,b=2", "2,1"), ("a=1,b=2", "a=1"), ("a=1,b=2", "c=1,d=2"),
    ("x=1,y=1", "x=1,y=2"), ("(a,b)=(1,2)", "(2,1)"), ("(a,b)=(1,2)", "(b,a)=(1,2)"), ("x=1,2", "y=1,2"),
    (r"1\pm\sqrt{19}", r"1+\sqrt{19}"), (r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1+\sqrt{19}"), (r"1\pm\sqrt2", r"1\pm\sqrt3"),
    (r"1\pm\sqrt2", r"-1\pm\sqrt2"), (r"\pm 3", "3,3"), (r"\pm1\pm\sqrt2", r"1+\sqrt2,-1-\sqrt2"), (r"\pm 3", "3,-4"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2}"), (r"(1\pm i,1\mp i)", "(1+i,1+i),(1-i,1-i)"),
    (r"(0,1)\cup(1,2)", "(0,2)"), (r"(0,1)\cup(1,2)", r"(0,1)\cap(1,2)"), (r"(0,1)\cup(1,2)", "(0,1),(1,2)"),
    (r"(0,1)\cup(2,3)", r"(0,2)\cup(1,3)"), (r"[0,1)\cup(2,3]", r"(0,1]\cup[2,3)"), (r"\text{C, F}", r"\text{C, E}"),
    ("x-y", "y-x"), ("1-2x", "2x-1"), ("a-b-c", "a-b+c"), ("x-1<y", "1-x<y"), ("a+b=c", "a+c=b"), ("x<y", "y<x"),
    ("a<b-c", "-c+a<b"), ("x^{1+y}", "x^1+y"), (r"\sqrt{x+1}", r"\sqrt{x}+1"), ("-(x+1)", "-x+1"), ("(x+1)^2", "x+1^2"),
    ("-2^2", "(-2)^2"), ("2(x+1)", "2x+1"), ("a(b+c)", "ab+c"), (r"\frac{a}{b}c", r"\frac{a}{bc}"), ("1/x^2", "1/x2"),
    (r"\frac{x+1}{2}", r"x+\frac12"), ("x/y", "y/x"), ("0^+", "0^-"), ("0^+", "0"), (r"e^{x}+1", "e^{x+1}"),
    # matrices keep their order, and are no determinants
    (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "1;2"),
    (r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
    (r"\begin{pmatrix}1\\[1mm]2\end{pmatrix}", r"\begin{pmatrix}1\\1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\[1,2]\end{pmatrix}", r"\begin{pmatrix}1\\\end{pmatrix}"),
    (r"\begin{cases}x=1\\y=2\end{cases}", r"\begin{pmatrix}x=1\\y=2\end{pmatrix}"),
    # ordinals, bases, quotes
    ("12th", "21st"), ("12th", "1"), (r"12^{\text{th}}", r"12^{t}"), ("2516_8", "2561"), ("2516_8", "2516_7"),
    ("2516_8", "25168"), ("x_8", "x"), ("12_{10}", "1210"), (r"f''(x)", "f(x)"), ("f'(x)", "f(x)"), ('"A"', '"B"'),
    # words that say more than a unit
    (r"5\text{ or more}", "5"), (r"5\text{ or }6", "5"), (r"n\text{ is even}", r"n\text{ is odd}"),
    (r"2\text{ if }x>0", "2"),
    (r"3\text{ dozen}", "3"), (r"2\text{ thousand}", "2"), (r"x\text{-axis}", r"y\text{-axis}"), (r"2\mathbf{a}", "2"),
    ("60 m", "60"), ("60 m/n", "60"), ("4 per 5", "4"), (r"\text{a point}", r"\text{a line}"),
    (r"\text{no}", r"\text{none}"), (r"\text{no}", r"\text{not}"), (r"\text{Tuesday}", r"\text{Thursday}"),
    ("1:03 PM", "1:30 PM"), ("1:03 a.m.", "1:03 PM"), ("12:30", "12.30"),
    (r"5\text{ cm}", r"5\pi\text{ cm}"), (r"5\text{ m}+3", "8"), (r"\text{ACF}", r"\text{AFC}"),
    # products, relations, scripts
    (r"2\cdot\sqrt3", r"2+\sqrt3"), (r"2\cdot\sqrt3", r"\sqrt6"), (r"2\cdot 3", "6"), ("2(3)", "23"), ("2*pi", "2"),
    (r"\log_{2}3", r"\log_{23}"), (r"\log_2 3", r"\log_3 2"), (r"\log_2 3", r"\log 23"), ("x_1y", "x_{1y}"),
    (r"x\lt 3", r"x\le 3"), (r"x\gt 3", r"x\lt 3"), ("x>=3", "x>3"), ("x>=3", "x=3"), (r"\binom52", r"\frac52"),
    (r"\binom52", r"\binom25"), (r"\overline{AB}", r"\overline{A}B"), (r"\overline{12}", "12"), ("x**2", "x*2"),
    (r"\sqrt{2}3", r"\sqrt{23}"), ("10^{-3}", "10^3"), ("10^{-3}", "-10^3"), (r"1.2\times10^3", r"1.2\times10^4"),
    (r"\sin x", r"\sin^{-1} x"), (r"\lfloor x\rfloor", "x"), (r"\mathbb{R}", "R"), (r"\mathbb{R}", r"\mathbb{Q}"),
    (r"\angle A", "A"), ("1:2", "2:1"), ("1:2", "1/2"), (r"\sqrt[3]{x}", r"\sqrt[4]{x}"), (r"\emptyset", "0"),
    # integers and decimals
    ("5.0", "50"), ("5.01", "5.1"), ("0.05", "0.5"), ("1,000", "1"), ("1,000.5", "1000"), ("1,00", "100"),
    ("1.000", "1000"), ("10 000", "1 0000"), ("3.14", "3.15"), ("2.50", "2.05"), ("1 1/2", "1/2"),
    (r"1\frac12", r"11\frac12"),
    # nothing is never right
    (None, "5"), ("5", None), (None, None), ("", ""), ("", "5"), ("$$", r"\text{}"), ("None", None),
]

EXTRACT = [
    (r"so \boxed{5}", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"first \boxed{1}, then \boxed{2}.", "2"),
    (r"\fbox{7}", "7"), (r"\boxed{1} \fbox{2}", "2"), (r"\fbox{1} \boxed{2}", "2"), (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{x^{2^{3}}}", "x^{2^{3}}"), (r"$\boxed 5$", "5"), (r"$\boxed 5.$", "5"), (r"\boxed 5", "5"),
    (r"it is \boxed 12 apples", "12"), (r"\boxed 3.5$", "3.5"), (r"\boxed { 4 }", "4"), (r"\boxed{ 4 } <eos>", "4"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\text{a } b}", r"\text{a } b"), ("\\boxed{\n6\n}", "6"), (r"\boxed{(1,2]}", "(1,2]"),
    (r"\boxed{5", None), (r"\boxed{1} and \boxed{\frac{1}{2}", None), (r"\boxed{}", None), (r"\boxed", None),
    (r"\boxedtext{5}", None), ("no box: 5", None), ("", None), (None, None), (r"\boxed{\}", None),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{a}{b}", "a"),
]


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal(a, b):
    assert is_equiv(a, b) and is_equiv(b, a)


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_unequal(a, b):
    assert not is_equiv(a, b) and not is_equiv(b, a)


@pytest.mark.parametrize("text, answer", EXTRACT)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_the_table_of_near_misses_is_long():
    assert len(set(UNEQUAL)) >= 150


def test_every_answer_equals_itself():
    for answer in {answer for pair in EQUAL + UNEQUAL for answer in pair if answer not in (None, "", "$$", r"\text{}")}:
        assert is_equiv(answer, answer), answer


DOUBLED = [(a.replace("\\", "\\\\"), a) for pair in EQUAL for a in pair if r"\begin" not in a and r"\\" not in a]


def test_any_answer_may_have_doubled_backslashes():
    for doubled, answer in DOUBLED:
        assert is_equiv(doubled, answer), answer


PIECES = [r"\frac", r"\sqrt", r"\sqrt[", r"\text{", r"\text{ cm}", r"\text{ and }", r"\boxed{", r"\left(", r"\right]",
          r"\begin{pmatrix}", r"\end{pmatrix}", r"\begin{array}{cc}", r"\\", r"\pm", r"\mp", r"\cup", r"\in", r"\{",
          r"\}", r"\pi", r"\cdot", r"\,", "\\", " or ", "####", "the final answer is", "°", "π", "√", "²", "٣", "½",
          "\ud800", "\x00", "\n", "th", r"^{\mathrm{th}}", "1,234", "1 234", "m/s", "infty", "x=", "(x,y)=", "1e999",
          "nan",
          *"{}()[]1234567890.,-+/^_ x=<>&;:|!'\"*$%aB"]
REPEATED = [*PIECES, "(1+", "1 1/2", "+-", r"{\frac", r"\sqrt\frac", "^^", "_{", " per m", r"\{1,", "(1,", "1,234,",
            "12th", ")(", "x^{", "1.1", "a b", "square ", r"\frac{1}{"]


def grade(text):
    """Everything that is done with a reply, and with an answer."""
    extract_answer(text, phrase=True), extract_answer(r"\boxed{" + text)
    return is_equiv(text, "5")


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_a_model_writes_raises(seed):
    """20,000 strings: pieces at random, and answers of the tables with pieces in them. None is equal to 5 but those
    that are 5 with decoration around it."""
    rng, answers = random.Random(seed), [answer for pair in EQUAL + UNEQUAL for answer in pair if answer]
    for n in range(1000):
        if n % 2:
            text = "".join(rng.choices(PIECES, k=rng.randint(1, 30)))
        else:
            characters = list(rng.choice(answers))
            for _ in range(rng.randint(1, 6)):
                at = rng.randrange(len(characters) + 1)
                characters[at:at + rng.randint(0, 2)] = [rng.choice(PIECES)]
            text = "".join(characters)
        if grade(text):
            rest = re.sub(r"\^\s*\{?\d", "", text.partition("_")[0])  # a base, a unit's power
            assert "5" in rest and not re.search(r"[1-46-9]", rest), text


def test_no_answer_is_too_long_or_too_deep():
    """Today's worst ended the run (digits beyond Python's limit) or took 6 s (nested braces)."""
    for piece in REPEATED:
        long = (piece * 500)[:499]
        for text in (piece * 5000, piece * 100, "5" + long, long + "5"):
            assert not grade(text) or set(text) <= set("5 .$%°\n\\,:;!\"'{}+-"), text[:80]
    assert not is_equiv("0." + "3" * 4400, "1") and not is_equiv("1" * 5000, "2") and is_equiv("7" * 5000, "7" * 5000)
    assert not is_equiv("{" * 2000 + "5" + "}" * 2000, "6") and not is_equiv(r"\sqrt{" * 1000, "5")
    assert not is_equiv("(" * 50 + "5" + ")" * 50, "5") and not is_equiv(")" * 250 + "(" * 250, "5")
