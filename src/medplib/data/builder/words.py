"""How names of structures are put into sentences: articles, plurals, lists; and which mean a finding."""

from __future__ import annotations

import re
from collections.abc import Sequence

from medplib.data.questions import article

# A name with one of these words is a finding, not normal anatomy: the table behind abnormality questions.
ABNORMAL = re.compile(
    r"\b(tumou?rs?|lesions?|polyps?|cysts?|cancers?|carcinomas?|metasta\w+|nodules?|mass(es)?|o?edemas?"
    r"|ha?emorrhages?|ha?ematomas?|bleeding|infarct\w*|strokes?|ischa?emi\w*|fractures?|pneumothorax"
    r"|effusions?|infections?|covid\S*|pneumonia\w*|consolidations?|opacit\w+|melanomas?|nev(us|i)"
    r"|keratos\w+|exudates?|(micro)?aneurysms?|stenos\w+|calcifications?|plaques?|gliomas?|necro\w+|thromb\w+"
    r"|embol\w+|ulcers?|abscess\w*|hyperintensit\w+|scars?|lymphomas?|adenomas?|ha?emangiomas?|malignan\w+"
    r"|no.?reflow|enhancing)\b",
    re.IGNORECASE,
)
_PLURALS = {"nuclei", "vertebrae", "ganglia", "bronchi", "alveoli", "glomeruli", "foramina", "nevi", "teeth"}
_NOT_PLURALS = {"pancreas", "lens", "pons", "ascites", "biceps", "triceps", "caries", "atlas"}
_MASSES = {
    *("matter", "tissue", "edema", "oedema", "fluid", "bone", "blood", "fat", "cartilage", "muscle"),
    *("ascites", "necrosis", "pneumonia", "caries", "bleeding", "background"),
}
SIDES = ("left", "right")


def is_abnormal(name: str) -> bool:
    """Whether the name means a finding (see ABNORMAL)."""
    return bool(ABNORMAL.search(name))


def _head(name: str) -> str:
    """The word that decides number: "head of femur" -> "head", "left lung" -> "lung"."""
    return name.lower().split(" of ")[0].split()[-1]


def is_plural(name: str) -> bool:
    """Whether the name takes "are"."""
    word = _head(name)
    return word in _PLURALS or (
        word.endswith("s") and not word.endswith(("ss", "us", "is")) and word not in _NOT_PLURALS
    )


def indefinite(name: str) -> str:
    """ "a lung tumor", "an ulcer", "edema", "cell nuclei"."""
    return name if is_plural(name) or _head(name) in _MASSES else f"{article(name)} {name}"


def plural(name: str) -> str | None:
    """ "lung tumor" -> "lung tumors"; None where the plural is not an "s" or "ies" at the end."""
    if not re.search(r"[a-z]$", name) or re.search(r"(s|um|x|ch|sh|a)$", name) or indefinite(name) == name:
        return None
    return name[:-1] + "ies" if re.search(r"[^aeiou]y$", name) else name + "s"


def both(name: str) -> str | None:
    """ "left lung" -> "both lungs"; None for a name without a side or a plural."""
    side, _, rest = name.partition(" ")
    many = plural(rest) if side in SIDES and rest else None
    return f"both {many}" if many else None


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def percent(share: float) -> str:
    """A share as words: "less than 0.1%", "3.2%", "41%"."""
    value = 100 * share
    return "less than 0.1%" if value < 0.1 else f"{value:.1f}%" if value < 9.95 else f"{value:.0f}%"


def about(size: str) -> str:
    """ "about 3.2% of the image"; "less than ..." stays as it is."""
    return size if size.startswith("less") else f"about {size}"


def area(square_mm: float) -> str:
    """ "412 mm²", from 10 cm² on in cm²."""
    return f"{square_mm:.3g} mm²" if square_mm < 1000 else f"{square_mm / 100:.1f} cm²"


def fill(template: str, name: str = "", **more: str) -> str:
    """A template with what a name needs: {s} {the} {The} {a} {A} {is} {Is} {its} {it} {It} {lies} {covers}
    {exists} (the start of "... in this image?"), and more by keyword."""
    if name:
        plural = is_plural(name)
        the = name if name.startswith(("the ", "both ")) else f"the {name}"
        be = "are" if plural or name.startswith("both ") else "is"
        many = be == "are"
        there = f"{be.capitalize()} there {indefinite(name)}"
        more = {
            "s": name,
            "the": the,
            "The": the[0].upper() + the[1:],
            "a": indefinite(name),
            "A": indefinite(name)[0].upper() + indefinite(name)[1:],
            "is": be,
            "Is": be.capitalize(),
            "This_is": "These are" if many else "This is",
            "its": "their" if many else "its",
            "it": "them" if many else "it",
            "It": "They" if many else "It",
            "lies": "lie" if many else "lies",
            "covers": "cover" if many else "covers",
            "exists": there if is_abnormal(name) else f"{be.capitalize()} {the} visible",
            **more,
        }
    return template.format_map(more)
