"""Ask the embedded tiny model about images: in words, about regions, for masks. Writes `answer/`."""

from pathlib import Path

from medplib import Box, MedPLIB, Point

IMAGES = Path(__file__).parent / "images"

model = MedPLIB.from_pretrained("medplib-tiny")  # or a folder, or a Hub id

# A question in words.
answer = model.ask(IMAGES / "brain_mr.png", "What is the modality of this image?")
print(f"{answer.question}  ->  {answer.text}")

# A question about regions. Points and boxes are (x, y) in pixels of the image.
for prompt in (Box(35, 66, 136, 200), Point(185, 140)):
    answer = model.ask(IMAGES / "chest_ct.png", "What is in <region>?", prompts=[prompt])
    print(f"{prompt}  ->  {answer.text}")

# Outlining by name. What the model calls absent gets no mask.
answer = model.segment(IMAGES / "chest_ct.png", ["right lung", "left lung"])
print(f"{answer.question}  ->  {answer.text}")
for finding in answer.findings:
    print(f"  {finding.label}: score {finding.score:.2f}, {finding.area} pixels, box {finding.box}")
print(f"  masks: {answer.masks.dtype} {answer.masks.shape}")

# The overlay, one PNG per mask, and answer.json.
for path in answer.save("answer"):
    print(f"  wrote {path}")
print("Research use only. Not a medical device.")
