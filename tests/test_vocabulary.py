"""Private vocabulary that the tree no longer uses: one standard term for each meaning (CONTRIBUTING.md, Glossary)."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("jaxseq", "tests", "benchmarks", "examples", "docs", "README.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml")
TERMS = (
    # private words: the standard term
    r"\btwins?\b",  # reference implementation
    r"\bfirst weights\b",  # initial parameters, initializer
    r"\bputs? out\b",  # output
    r"\bforesee\w*",  # predict
    r"\bstretch(es)?\b",  # shard of time
    r"\bback side by side\b",  # run in parallel over windows
    r"\breads? (a|the) sequence\b",  # process
    r"\brelay\b",  # carry across shards
    r"\bhand(ed|s)? over\b",  # make automatic
    # archaic phrasing
    r"\bwho (gives|tries|asks|puts|wants)\b",
    r"\bthat is no (array|sequence|function|tuple)\b",
    r"\bwhat is left over\b",
    r"\bis (said|told) (by|of|in|to)\b",
    r"\bby hand\"",  # a label: jaxseq, by rule
    r"\bwindows that (reach back|overlap)\"",  # a label: overlapping windows, overlapping patches
    r"\*window\b",  # *kernel_size; a window is that of truncation
    # names that were renamed
    r"\b(drop|hold)=",
    r"\bjaxseq\.(flow|maps|relay|Time)\b",
    r"\b(handed_over|in_two|in_one|first_of_twin|saves_h_alone)\b",
    r"\b(def|class) _?(together|freed|apart|undivided|dividing|held|released|seen|over|chosen|turned|near|far|Kept)\b",
)


def test_no_private_vocabulary():
    files = [path for place in PLACES for path in ([ROOT / place] if "." in place else (ROOT / place).rglob("*"))]
    texts = [path for path in files if path.suffix in (".py", ".md", ".yml") and path != Path(__file__)]
    assert len(texts) > 200
    pattern = re.compile("|".join(TERMS), flags=re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()!r}"
        for path in texts
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert not found, "\n".join(found)
