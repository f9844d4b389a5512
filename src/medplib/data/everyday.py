"""Questions as people ask them who were not told any wording, and their answers about a labelled image.

The plain kinds of `medplib.data.questions` in many more words (WORDINGS), and kinds beside them: is it a CT,
what part of the body, describe it, both lungs, everything, what is marked, a structure that was never
learned, and what no model of this kind can tell. A question after a size or a place is answered by drawing,
because the mask says it exactly. UNHEARD are wordings that nothing is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medplib.data.builder.words import indefinite, listed, plural
from medplib.data.questions import (
    PLAIN,
    UNLABELLED,
    Question,
    QuestionMaker,
    absent_answer,
    article,
    pick,
    present_answer,
    region_prompt,
)

WORDINGS: Mapping[str, Sequence[str]] = {
    "modality": (
        *PLAIN["modality"],
        "What is this?",
        "What is this image?",
        "What am I looking at?",
        "What kind of scan is this?",
        "What sort of picture is this?",
        "Name the modality.",
        "Modality?",
        "What imaging technique was used?",
        "How was this picture made?",
        "Which technique produced this image?",
        "Can you tell me the imaging modality?",
        "What type of medical imaging is this?",
    ),
    "grounding": (
        *PLAIN["grounding"],
        "{s}",
        "{s}",
        "{the}{s}",
        "{s} please",
        "I need a mask of {the}{s}.",
        "I want to see {the}{s}.",
        "Give me {the}{s}.",
        "Give me the segmentation of {the}{s}.",
        "Draw {the}{s}.",
        "Trace {the}{s}.",
        "Trace the outline of {the}{s}.",
        "Contour {the}{s}.",
        "Detect {the}{s}.",
        "Annotate {the}{s}.",
        "Label {the}{s}.",
        "Extract {the}{s} from this {m} image.",
        "Segmentation of {the}{s}",
        "Generate a mask for {the}{s}.",
        "Can you outline {the}{s}?",
        "Can you find {the}{s}?",
        "Can you show me {the}{s}?",
        "Could you please segment {the}{s} for me?",
        "Please mark {the}{s}.",
        "Identify and segment {the}{s}.",
        "Which pixels belong to {the}{s}?",
        "Point out {the}{s}.",
        "Point to {the}{s} in the picture.",
        "In which part of the image is {the}{s}?",
        "What is the position of {the}{s}?",
        "Where in this {m} image is {the}{s}?",
        "How large is {the}{s}?",
        "How big is {the}{s}?",
        "What is the area of {the}{s}?",
        "What is the size of {the}{s}?",
        "Measure {the}{s}.",
        "Separate {the}{s} from the rest of the image.",
    ),
    "several": (
        *PLAIN["several"],
        "{list}",
        "Mark {list}.",
        "Draw {list}.",
        "Find {list}.",
        "I need masks of {list}.",
        "Can you outline {list}?",
        "Please show {list} in the picture.",
        "Which is larger, {either}?",
        "Which one is bigger: {either}?",
        "Compare {list}.",
    ),
    "presence": (
        *PLAIN["presence"],
        "Is there {a}?",
        "Is there {a} here?",
        "Do you see {a}?",
        "Do you see {the}{s} here?",
        "Can {the}{s} be seen?",
        "Does the picture contain {a}?",
        "Any {s}?",
        "Any sign of {a}?",
        "Is {the}{s} in the picture?",
        "Does this patient have {a}?",
    ),
    "list": (
        *PLAIN["list"],
        "What do you see?",
        "What can you see?",
        "What can you see in this image?",
        "Which structures are there?",
        "Which structures do you recognize?",
        "What is visible here?",
        "What is in this image?",
        "Name everything you can see.",
        "Which organs are shown?",
        "Which anatomical structures does this image show?",
    ),
    "region": (
        *PLAIN["region"],
        "What is this? <region>",
        "What is here: <region>?",
        "What's in <region>?",
        "What is inside <region>?",
        "What am I pointing at with <region>?",
        "Which structure lies in <region>?",
        "What organ is this <region>?",
        "What did I mark with <region>?",
        "What is at <region>?",
        "Label <region>.",
        "Tell me what <region> is.",
    ),
    "modality_check": (
        "Is this {a}?",
        "Is this {a} image?",
        "Is this {a} scan?",
        "Is it {a} image?",
        "Would you say that this is {a} image?",
        "Was this image taken by {m}?",
        "Is the modality {m}?",
        "Am I looking at {a} image?",
    ),
    "shown": (
        "Which part of the body is this?",
        "Which part of the body does this image show?",
        "What part of the body is shown?",
        "What body part is this?",
        "Which body region is shown?",
        "Which region of the body was imaged?",
        "Which organ is shown?",
        "Which organ is this?",
        "What anatomy is shown?",
        "What organ does this image show?",
    ),
    "description": (
        "Describe this image.",
        "Describe the image.",
        "Describe what you see.",
        "Please describe this picture.",
        "Can you describe this image?",
        "Give me a description of this image.",
        "Tell me about this image.",
        "Tell me what you see.",
        "Explain this image.",
        "Summarize this image.",
        "Write a caption for this image.",
        "What does this image show?",
        "What does the picture show?",
        "Write a report.",
    ),
    "all of a kind": (
        "Segment the {many}.",
        "Segment both {many}.",
        "Please segment the {many} in this image.",
        "Can you outline the {many}?",
        "Outline both {many}.",
        "Where are the {many}?",
        "Show me the {many}.",
        "Mark the {many}.",
        "Draw all {many}.",
        "Find the {many}.",
        "How large are the {many}?",
        "{many}",
        "the {many} please",
        "Segment each {one}.",
        "Segment the {one}.",
        "Where is the {one}?",
    ),
    "any of a kind": (
        "Is there {a}?",
        "Is there {a} in this image?",
        "Is there {a} in the image?",
        "Are there {many} in this image?",
        "Can you see {a}?",
        "Can you see the {many}?",
        "Do you see {many}?",
        "Are the {many} visible?",
        "Any {many}?",
        "Does this image show {a}?",
        "Does the image show {many}?",
    ),
    "how many of a kind": (
        "How many {many} can you see?",
        "How many {many} are there?",
        "How many {many} are in this image?",
        "How many {many} does the image show?",
        "Count the {many}.",
        "What is the number of {many}?",
    ),
    "everything": (
        "Segment everything.",
        "Segment all.",
        "Segment the image.",
        "Segment this image.",
        "Segment all structures.",
        "Segment all structures in this image.",
        "Segment everything you can see.",
        "Outline every structure.",
        "Outline everything.",
        "Draw all structures that you know.",
        "Show me everything.",
        "Mark all structures.",
        "Label all structures.",
        "Draw everything.",
    ),
    "marked": (
        "Segment <region>.",
        "Segment what is in <region>.",
        "Segment the structure in <region>.",
        "Segment the structure at <region>.",
        "Segment this <region>.",
        "Please segment what I marked with <region>.",
        "Can you outline what is in <region>?",
        "Outline the structure in <region>.",
        "Draw the structure that <region> points at.",
        "What is in <region>? Segment it.",
        "What is this <region>? Please outline it.",
        "Give me a mask of the structure in <region>.",
    ),
}
UNHEARD: Mapping[str, Sequence[str]] = {
    "modality": ("By what method was this picture taken?", "Tell me the modality of the picture."),
    "grounding": (
        "Could you draw the outline of {the}{s}?",
        "Please give me a mask image of {the}{s}.",
    ),
    "several": ("Please draw {list} for me.", "Trace {list} in the picture."),
    "presence": ("Do you notice {a} in the picture?", "Can you find {a} in here?"),
    "list": ("Tell me which structures are shown.", "What are the structures in the picture?"),
    "region": ("Which structure did I point at with <region>?", "Please name what is in <region>."),
    "modality_check": ("Is the picture {a} image?", "Could this be {a} image?"),
    "shown": ("Which part of the patient do you see?", "What part of a person is in the picture?"),
    "description": ("Please describe what is in the image.", "Give a short description."),
    "all of a kind": ("Please mark both {many}.", "Could you show the {many}?"),
    "any of a kind": ("Do you find {a} here?", "Is {a} visible?"),
    "how many of a kind": ("How many {many} do you see here?", "Please count the {many}."),
    "everything": ("Please segment all that you know.", "Mark everything in the picture."),
    "marked": ("Please outline <region> for me.", "Draw what is in <region>."),
}

CALLED: Mapping[str, Sequence[str]] = {
    "DAB stained tissue": ("stained tissue", "DAB staining", "brown staining"),
    "bone": ("bones", "skeleton"),
    "brain tumor": ("brain tumour", "tumor in the brain"),
    "cell nuclei": ("nuclei", "nuclei of the cells"),
    "gray matter": ("grey matter",),
    "instrument": ("surgical instrument", "tool"),
    "largest nucleus": ("biggest nucleus", "largest cell nucleus"),
    "left hemisphere": ("left cerebral hemisphere", "left half of the brain"),
    "lung tumor": ("lung tumour", "tumor in the lung"),
    "optic disc": ("optic disk", "optic nerve head"),
    "retinal vessels": ("blood vessels of the retina", "vessels of the retina"),
    "right hemisphere": ("right cerebral hemisphere", "right half of the brain"),
    "skin lesion": ("lesion of the skin", "mole"),
}
"""Other names that people have for a structure; the answer has ours."""

BODY_PARTS: Mapping[str, str] = {
    "ChestCT": "the chest",
    "SimulatedPET": "the chest",
    "MNI152": "the head",
    "BrainT1c": "the head",
    "RetinaCC0": "the eye",
    "FundusPhantom": "the eye",
    "DermoscopyPhantom": "the skin",
    "EndoscopyPhantom": "the bowel",
    "FluoNuclei": "cells",
    "HistoHE": "tissue",
    "ColonIHC": "tissue",
}

UNKNOWN = (
    "heart", "liver", "kidney", "stomach", "bladder", "trachea", "spine", "rib", "ribs", "clavicle",
    "femur", "pelvis", "prostate", "uterus", "ovary", "thyroid", "duodenum", "diaphragm", "esophagus",
    "vertebra", "sacrum", "hip", "knee", "ankle", "shoulder", "elbow", "wrist", "hand", "foot", "finger",
    "tooth", "teeth", "mandible", "tongue", "nose", "ear", "muscle", "fat", "skin", "hair", "nail",
    "tendon", "cartilage", "meniscus", "ligament", "nerve", "artery", "vein", "vessel", "edema", "bleeding",
    "hemorrhage", "infarct", "aneurysm", "fracture", "nodule", "effusion", "pneumonia", "pneumothorax",
    "consolidation", "emphysema", "fibrosis", "calcification", "plaque", "stone", "ulcer", "abscess",
    "thrombus", "stenosis", "hernia", "drusen", "exudates", "microaneurysms", "macula", "iris", "lens",
    "melanoma", "nevus", "wrinkle", "ventricle", "ventricles", "thalamus", "cerebellum", "brainstem",
    "caudate", "putamen", "amygdala", "skull", "scalp", "meninges", "mitochondria", "cytoplasm", "membrane",
    "glands", "stroma", "lymphocytes", "fetus", "placenta", "embryo", "stent", "catheter", "pacemaker",
    "implant", "screw", "clip", "needle", "table", "pillow", "text", "ruler", "cat", "dog", "car", "tree",
    "house", "banana", "person", "face", "eyes", "left kidney", "right kidney", "left atrium",
    "right ventricle", "left ventricle", "pulmonary artery", "vena cava", "pleural effusion", "lymph node",
    "lymph nodes", "adrenal gland", "small bowel", "optic nerve", "spinal cord", "corpus callosum",
    "left breast", "right breast", "left femur", "right eye", "left eye", "liver tumor", "kidney stone",
    "midline shift", "multiple sclerosis lesion", "ground glass opacity", "blood vessels",
    "left upper lobe", "right lower lobe", "bile duct", "parotid gland",
)  # fmt: skip
"""Structures that the mini set does not teach."""
UNHEARD_UNKNOWN = (
    "aorta", "spleen", "pancreas", "gallbladder", "hippocampus", "colon", "sternum", "hard exudates",
    "left adrenal gland", "right femur", "rib fracture", "lung nodule", "cornea", "patella", "umbrella",
)  # fmt: skip
SYLLABLES = (
    "ba", "co", "di", "fu", "la", "mi", "no", "pe", "ra", "si", "to", "ul", "ve", "xi", "an", "or", "en",
    "ster", "gra", "phy", "lum", "cor", "tis", "min", "dal", "pul", "ven",
)  # fmt: skip

BEYOND = (
    "Hello.", "Hi!", "Hey, how are you?", "Good morning.", "Thank you.", "Thanks!", "Who are you?",
    "What are you?", "What can you do?", "What is your name?", "Help", "Help me.", "Who made you?",
    "How old is the patient?", "Is this a man or a woman?", "What is the patient's name?",
    "Which patient is this?", "When was this image taken?", "Which hospital is this from?",
    "Is this image normal?", "Is the image normal?", "Is everything normal?", "Does this look healthy?",
    "Is the patient healthy?", "Is the patient sick?", "Is anything abnormal?", "Is there anything abnormal?",
    "Is there a disease?", "Which disease does the patient have?", "What disease is this?",
    "What is wrong here?", "What is the diagnosis?", "Diagnose this image.", "Please give me a diagnosis.",
    "Is it cancer?", "Does the patient have cancer?", "Is it malignant?", "Is this benign or malignant?",
    "Should I be worried?", "Is it dangerous?", "What should I do?", "What treatment do you recommend?",
    "Which therapy is best?", "Does the patient need surgery?", "What is the prognosis?",
    "How long will the patient live?", "What caused this?", "Why is it dark there?", "What color is it?",
    "What is the weather today?", "Tell me a joke.", "What time is it?", "What is two plus two?",
    "What is the capital of France?", "Write a poem.", "Write some code.", "Translate this.",
    "Which plane is this?", "Is this an axial slice?", "Which contrast agent was used?",
    "What is the slice thickness?", "What is the resolution?", "Which scanner was used?", "Is it blurry?",
    "How many cells are there?", "How many nuclei are there?", "Count the cells.", "Count the nuclei.",
    "How many bones are there?", "How many structures can you see?", "How many vessels are there?",
)  # fmt: skip
UNHEARD_BEYOND = (
    "Nice to meet you.", "How tall is the patient?", "Is this person ill?", "What is the likely diagnosis?",
    "Which drug should be given?", "Will the patient recover?", "Can you sing?", "Who won the match?",
    "Which manufacturer built the scanner?", "How many tumor cells are there?",
)  # fmt: skip
CANNOT = "I cannot tell. Ask me for the modality, or for a structure to draw."
NUMBERS = ("no", "one", "two")


def unknown_answer(name: str) -> str:
    """The answer about a structure that was never learned: neither there nor absent."""
    return f"I have not learned to find the {name}."


class EverydayMaker(QuestionMaker):
    """Draws the plain kinds in everyday words, and the kinds beside them (KINDS).

    vocabulary  {structure: the data sets that label it}, as of `QuestionMaker`
    heard       True: the wordings that a model is trained on; False: those that it is measured on
    """

    def __init__(self, vocabulary: Mapping[str, set[str]], heard: bool = True) -> None:
        super().__init__(vocabulary)
        self.heard = heard
        self.wordings = WORDINGS if heard else UNHEARD
        rights = {name.removeprefix("right ") for name in vocabulary if name.startswith("right ")}
        self.pairs = sorted(rights & {n.removeprefix("left ") for n in vocabulary if n.startswith("left ")})
        self.tumors = sorted(n for n in vocabulary if n.endswith(" tumor"))

    def fill(
        self, rng: np.random.Generator, template: str, name: str, modality: str = "", the: str = "the "
    ) -> str:
        """A template with what is asked about, now and then by another of its names."""
        if name in CALLED and rng.random() < 0.15:
            name = pick(rng, CALLED[name])
        return template.format(s=name, m=modality, the=the, a=indefinite(name))

    def draw(self, kind: str, item, rng: np.random.Generator) -> Question | None:
        """A question of a kind of KINDS about `item` (names, masks, modality, dataset); None where it has no
        answer."""
        return KINDS[kind](self, item, rng)

    def modality_check(self, item, rng: np.random.Generator) -> Question:
        others = ("CT", "MR", "PET", "X-ray", "ultrasound", "fundus", "microscopy", "dermoscopy")
        m = item.modality if rng.random() < 0.5 else pick(rng, others)
        right = m == item.modality
        spoken = {"MR": ("MR", "MRI"), "X-ray": ("X-ray", "x-ray")}.get(m, (m,))
        said = pick(rng, spoken)
        question = self.words(rng, "modality_check").format(m=said, a=f"{article(said)} {said}")
        answer = f"{'Yes' if right else 'No'}, this is {article(item.modality)} {item.modality} image."
        return Question("modality_check", question, answer)

    def shown(self, item, rng: np.random.Generator) -> Question | None:
        if item.dataset not in BODY_PARTS:
            return None
        return Question("shown", self.words(rng, "shown"), _of(item))

    def description(self, item, rng: np.random.Generator) -> Question:
        shows = f" It shows {listed(sorted(item.names))}." if item.names else ""
        return Question("description", self.words(rng, "description"), _of(item) + shows)

    def group(self, item, rng: np.random.Generator) -> Question | None:
        """All of a kind: lungs, hemispheres; whether there is one at all, tumors too; how many."""
        form = pick(rng, ("all of a kind", "all of a kind", "any of a kind", "how many of a kind"))
        labelled = any(item.dataset in self.vocabulary[n] for n in self.tumors)
        kinds = [*self.pairs, *(["tumor"] if labelled and not form.startswith("how many") else [])]
        if not kinds:
            return None
        at_hand = [k for k in kinds if any(n in item.names for n in self._members(k))]
        one = pick(rng, at_hand if at_hand and rng.random() < 0.7 else kinds)
        members = self._members(one)
        there = [n for n in members if n in item.names]
        if not there and any(n in UNLABELLED.get(item.dataset, ()) for n in members):
            return None
        many = plural(one) or one
        question = self.words(rng, form).format(one=one, many=many, a=indefinite(one))
        masks: tuple[np.ndarray, ...] = ()
        if form == "how many of a kind":
            number = f"are two {many}" if len(there) == 2 else f"is {NUMBERS[len(there)]} {one}"
            answer = f"There {number} in this image."
        elif form == "any of a kind":
            answer = f"Yes, there is {listed(there)}." if there else f"No, there is no {one} in this image."
        else:
            answer = present_answer(there) if there else absent_answer(one)
            masks = tuple(item.masks[item.names.index(n)] for n in there)
        return Question(form, question, answer, masks, names=tuple(there))

    def everything(self, item, rng: np.random.Generator) -> Question | None:
        names = sorted(item.names)
        if not names:
            return None
        masks = tuple(item.masks[item.names.index(n)] for n in names)
        words = self.words(rng, "everything")
        return Question("everything", words, present_answer(names), masks, names=tuple(names))

    def marked(self, item, rng: np.random.Generator) -> Question | None:
        """The structure that a prompt means, drawn."""
        if not item.names:
            return None
        prompt, index = region_prompt(rng, item.masks, int(rng.integers(len(item.names))), mask_share=0.3)
        name = item.names[index]
        answer = present_answer([name])
        words = self.words(rng, "marked")
        return Question("marked", words, answer, (item.masks[index],), (prompt,), names=(name,))

    def unknown(self, item, rng: np.random.Generator) -> Question:
        """A structure that was never learned, half of the words made up; perhaps with a known one."""
        if self.heard:
            made_up = "".join(pick(rng, SYLLABLES) for _ in range(rng.integers(2, 5)))
            name = made_up if rng.random() < 0.5 else pick(rng, UNKNOWN)
        else:
            name = pick(rng, UNHEARD_UNKNOWN)
        if item.names and rng.random() < 0.2:
            i = int(rng.integers(len(item.names)))
            both = self.several_words(rng, [item.names[i], name])
            answer = f"{present_answer([item.names[i]])} {unknown_answer(name)}"
            return Question("unknown", both, answer, (item.masks[i],), names=(item.names[i], name))
        if rng.random() < 0.3:
            question = self.fill(rng, self.words(rng, "presence"), name)
        else:
            question = self.grounding_words(rng, name, item.modality)
        return Question("unknown", question, unknown_answer(name), names=(name,))

    def beyond(self, item, rng: np.random.Generator) -> Question:
        return Question("beyond", pick(rng, BEYOND if self.heard else UNHEARD_BEYOND), CANNOT)

    def _members(self, kind: str) -> list[str]:
        return self.tumors if kind == "tumor" else [f"left {kind}", f"right {kind}"]


KINDS = {
    "modality_check": EverydayMaker.modality_check,
    "shown": EverydayMaker.shown,
    "description": EverydayMaker.description,
    "group": EverydayMaker.group,
    "everything": EverydayMaker.everything,
    "marked": EverydayMaker.marked,
    "unknown": EverydayMaker.unknown,
    "beyond": EverydayMaker.beyond,
}


def _of(item) -> str:
    """ "This is a CT image of the chest." """
    of = f" of {BODY_PARTS[item.dataset]}" if item.dataset in BODY_PARTS else ""
    return f"This is {article(item.modality)} {item.modality} image{of}."
