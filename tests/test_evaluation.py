"""medplib.evaluation: answers and masks scored, figures with intervals, runs that go on, models compared."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medplib import Answer, Finding, InputError
from medplib.apps.cli import app
from medplib.data import File, Held, ImageFile, Record, read
from medplib.evaluation import Report, compare, evaluate, load_report
from medplib.evaluation.metrics import dice
from medplib.evaluation.report import estimate
from medplib.evaluation.scoring import decode_findings, pair, questions_of, score
from medplib.evaluation.text import agrees, chosen, normalize, overlap, yes_or_no
from medplib.prompts.types import Box

ROOT = Path(__file__).parents[1]
IMAGE = np.zeros((20, 30, 3), np.uint8)


def blob(x0, x1, y0=0, y1=20):
    mask = np.zeros((20, 30), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def record(*turns, masks=(), **about):
    return Record(turns, (Held(IMAGE),), masks=tuple(Held(m) for m in masks), **about)


class Speaker:
    """Answers by a function of the sample; keeps what it was asked."""

    def __init__(self, say):
        self.say, self.asked, self.options = say, [], None

    def answer(self, samples, **options):
        self.asked += samples
        self.options = options
        return [self.say(sample) for sample in samples]


def drawn(text="", *masks, labels=None):
    labels = labels or ["" for _ in masks]
    return Answer(text, [Finding(n, m, 0.9) for n, m in zip(labels, masks, strict=True)], [IMAGE])


# -- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Left  Lung.", "left lung"),
        ("Crohn's disease; a T2-weighted scan", "crohns disease t2 weighted scan"),
        ("About 1.5 cm, three nodules", "about 1.5 cm 3 nodules"),
        ("Here is the <ref>liver</ref> <SEG>.", "here is liver"),
        ("", ""),
    ],
)
def test_words_are_compared_without_case_punctuation_and_articles(text, plain):
    assert normalize(text) == plain


def test_shared_words_count_as_often_as_in_both():
    assert overlap("lung lung lung", "the left lung") == (1 / 3, 1 / 2, pytest.approx(0.4))
    assert overlap("liver", "spleen") == (0.0, 0.0, 0.0)
    assert overlap("", "liver") == (0.0, 0.0, 0.0)
    assert overlap("the", "a") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", "yes"), ("No, there is none; yes would be wrong", "no"), ("I think yes", "yes"),
        ("Not sure: yes or no", None), ("The liver", None), ("There is no lesion", "no"),
    ],
)  # fmt: skip
def test_yes_and_no_are_heard(answer, said):
    assert yes_or_no(answer) == said


def test_closed_answers_agree_by_yes_and_no_or_by_their_words():
    assert agrees("Yes, it is.", "yes")
    assert not agrees("No.", "yes")
    assert agrees("There is no lesion.", "No, it shows no lesion.")
    assert not agrees("There is a lesion.", "No, it shows no lesion.")
    assert agrees("the left side", "Left side")
    assert not agrees("left or right", "left")


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1), ("(b)", 1), ("B: anything", 1), ("Left lung", 1), ("It is the left lung.", 1),
        ("the lung", 0), ("liver and spleen", None), ("E", None), ("none of these", None), ("spleen", 3),
    ],
)  # fmt: skip
def test_a_choice_is_found_by_letter_or_words(answer, choice):
    assert chosen(answer, ["lung", "left lung", "liver", "spleen"]) == choice


def test_a_choice_that_looks_like_a_letter_is_meant_by_its_words():
    assert [chosen(x, ["B", "A", "AB", "O"]) for x in ("A", "B", "AB", "O")] == [1, 0, 2, 3]


# -- masks and rows ------------------------------------------------------------------------------------------


def test_masks_are_paired_by_name_before_overlap():
    left, right = blob(0, 10), blob(20, 30)
    findings = drawn("", left, right, labels=["right lung", "The left lung"]).findings
    assert pair(["left lung", "right lung"], [left, right], findings) == {0: 1, 1: 0}
    assert pair(["", ""], [left, right], findings) == {0: 0, 1: 1}
    assert pair(["nucleus"] * 3, [left, right, blob(12, 14)], findings[:1]) == {0: 0}
    assert pair(["left lung"], [left], []) == {}


def test_a_conversation_gives_a_question_for_each_turn():
    said = record(
        ("Segment both lungs.", "The <ref>left lung</ref> <SEG> and the <ref>right lung</ref> <SEG>."),
        ("And the liver?", "There is no liver in this image."),
        ("Now the heart.", "Here <SEG>."),
        masks=[blob(0, 9), blob(9, 20), blob(20, 30)],
        labels=("l", "r", "heart"),
    )  # fmt: skip
    both, liver, heart = questions_of(said)
    assert [q.task for q in (both, liver, heart)] == ["grounding", "absent", "grounding"]
    assert (both.names, heart.names) == (("left lung", "right lung"), ("heart",))
    assert (heart.load_masks((20, 30))[0] == blob(20, 30)).all()
    sample = heart.sample([IMAGE])
    assert sample.turns == [*said.turns[:2], ("Now the heart.", None)]
    assert liver.load_masks((20, 30)) == []


def test_only_the_regions_asked_about_so_far_are_given():
    said = Record(
        (("What is in <region>?", "The liver."), ("And in <region>?", "The spleen.")),
        (Held(IMAGE),),
        regions=(Box(0, 0, 5, 5), Box(6, 6, 9, 9)),
    )
    first, second = questions_of(said)
    assert list(first.sample([IMAGE]).prompts) == [Box(0, 0, 5, 5)]
    assert list(second.sample([IMAGE]).prompts) == [Box(0, 0, 5, 5), Box(6, 6, 9, 9)]
    assert first.task == "region"


def test_rows_hold_each_mask_of_the_reference():
    said = record(("Segment.", "<ref>a</ref> <SEG> <ref>b</ref> <SEG>"), masks=[blob(0, 10), blob(20, 30)])
    (question,) = questions_of(said)
    row = score(question, drawn("here", blob(0, 5), blob(12, 14), blob(0, 1), labels=["a", "x", "y"]))
    assert row["masks"] == [
        {"name": "a", "dice": 2 / 3, "iou": 0.5, "drawn": True, "pixels": [100, 100, 200]},
        {"name": "b", "dice": 0.0, "iou": 0.0, "drawn": True, "pixels": [0, 40, 200]},
    ]
    assert row["drawn"] == 3
    assert (decode_findings(json.loads(json.dumps(row)))[0] == blob(0, 5)).all()


def test_the_official_protocol_scores_the_first_mask_by_the_published_arithmetic():
    said = record(("Segment.", "<ref>a</ref> <SEG> <ref>b</ref> <SEG>"), masks=[blob(0, 10), blob(20, 30)])
    (question,) = questions_of(said)
    row = score(question, drawn("here", blob(20, 30), blob(0, 10), labels=["b", "a"]), "official")
    assert [m["dice"] for m in row["masks"]] == [0.0]
    row = score(question, drawn("here", blob(0, 5)), "official")
    assert row["masks"][0]["dice"] == pytest.approx(2 / 3)


def test_an_empty_reference_agrees_with_no_mask():
    (question,) = questions_of(record(("Segment it.", "<SEG>"), masks=[blob(0, 0)]))
    assert score(question, drawn("nothing"))["masks"][0]["dice"] == 1.0
    assert score(question, drawn("this", blob(0, 3)))["masks"][0]["dice"] == 0.0


# -- figures -------------------------------------------------------------------------------------------------


def test_the_interval_is_over_cases_and_not_over_slices():
    rng = np.random.default_rng(0)
    case = np.repeat(np.arange(6), 200)
    values = rng.normal(case / 6, 0.01)
    by_case, by_slice = estimate(values, case.tolist()), estimate(values, list(range(len(values))))
    assert by_case.mean == pytest.approx(by_slice.mean) == pytest.approx(values.mean())
    assert by_case.cases == 6
    assert by_slice.cases == 1200
    assert by_case.high - by_case.low > 5 * (by_slice.high - by_slice.low)
    assert by_case.low < by_case.mean < by_case.high
    assert estimate([1.0, 0.0], ["p", "p"])[1:3] == (None, None)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        found = estimate(rng.normal(0.5, 0.2, 60), list(range(60)))
        hits += found.low <= 0.5 <= found.high
    assert 88 <= hits <= 100


RECORDS = [
    record(("Segment the a.", "<ref>a</ref> <SEG>"), masks=[blob(0, 10)], case="p1", modality="CT"),
    record(("Segment the a.", "<ref>a</ref> <SEG>"), masks=[blob(0, 20)], case="p2", modality="MR"),
    record(("Segment the b.", "There is no b."), case="p2", modality="MR", extra={"kind": "grounding"}),
    record(("Is it big?", "Yes"), case="p1", modality="CT"),
    record(("Which?\nA: liver\nB: lung", "lung"), choices=("liver", "lung"), modality="CT"),
    record(("What is it?", "a large lung nodule"), answer_type="open"),
]


def half(sample):
    """Draws the left ten columns for everything to segment, and says the same to all else."""
    if sample.turns[-1][0].startswith("Segment"):
        return drawn("Here.", blob(0, 10), labels=["a"])
    return drawn("Yes: the lung nodule.")


def figures(report, by=None):
    return {(x.task, x.type, x.figure, x.group): x.value.mean for x in report.lines(by)}


def test_a_report_holds_the_figures_of_each_task():
    report = evaluate(Speaker(half), RECORDS, batch_size=2)
    assert figures(report) == {
        ("grounding", "", "dice", "all"): pytest.approx((1 + 2 / 3) / 2),
        ("grounding", "", "iou", "all"): pytest.approx(0.75),
        ("grounding", "", "drawn", "all"): 1.0,
        ("grounding", "", "extra", "all"): 0.0,
        ("absent", "", "silent", "all"): 0.0,
        ("vqa", "closed", "right", "all"): 1.0,
        ("vqa", "closed", "silent", "all"): 1.0,
        ("vqa", "choice", "right", "all"): 1.0,
        ("vqa", "choice", "silent", "all"): 1.0,
        ("vqa", "open", "exact", "all"): 0.0,
        ("vqa", "open", "recall", "all"): pytest.approx(2 / 3),
        ("vqa", "open", "f1", "all"): pytest.approx(2 / 3),
        ("vqa", "open", "silent", "all"): 1.0,
    }
    by_modality = figures(report, "modality")
    assert by_modality["grounding", "", "dice", "CT"] == 1.0
    assert by_modality["grounding", "", "dice", "MR"] == pytest.approx(2 / 3)
    assert by_modality["vqa", "open", "f1", "unknown"] == pytest.approx(2 / 3)
    assert figures(report, "structure")["grounding", "", "dice", "a"] == pytest.approx((1 + 2 / 3) / 2)
    page = report.markdown()
    assert "Research use only" in page
    assert "| CT | 1.000" in page
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["questions"] == 6
    dice_all = next(f for f in plain["figures"] if f["by"] == "all" and f["figure"] == "dice")
    assert dice_all["n"] == dice_all["cases"] == 2
    with pytest.raises(InputError, match="by must be one of source, dataset"):
        report.lines("patient")


def test_slices_of_a_case_give_the_dice_of_its_volume():
    slices = [
        record(("Segment the a.", "<ref>a</ref> <SEG>"), masks=[blob(0, width)], case="p1")
        for width in (10, 20, 30)
    ]
    report = evaluate(Speaker(half), slices)
    assert figures(report)["grounding", "", "volume", "all"] == pytest.approx(2 * 30 / (30 + 60))
    assert figures(report, "structure")["grounding", "", "volume", "a"] == pytest.approx(2 / 3)
    alone = evaluate(Speaker(half), [slices[0], replace(slices[1], case="p2"), replace(slices[2], case=None)])
    assert not any(line.figure == "volume" for line in alone.lines())


def test_the_official_report_shows_the_published_metrics_and_the_papers_figures():
    on_mecovqa = [replace(r, source="mecovqa", split="test") for r in RECORDS]
    report = evaluate(speaker := Speaker(half), on_mecovqa, protocol="official")
    assert speaker.options == {"compat": "official"}
    page = report.markdown()
    assert "| CT | 100.00 | 1 | 59.83 |" in page
    assert "| all | 83.33 | 2 | 68.11 |" in page
    assert "| dermoscopy |  |  | 79.90 |" in page
    assert "| yes/no accuracy | 0.00 |" in page
    assert report.to_dict()["official_text"] == report.official_text()
    assert report.official_text()["recall"] == pytest.approx(200 / 3)


# -- runs ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    def tired(sample):
        if "Which" in sample.turns[-1][0]:
            raise KeyboardInterrupt
        return half(sample)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Speaker(tired), RECORDS, tmp_path / "out", batch_size=1)
    assert not (tmp_path / "out/report.md").exists()
    with (tmp_path / "out/results.jsonl").open("a") as file:
        file.write('{"id": "4.0", "ta')  # killed while writing
    again = Speaker(half)
    report = evaluate(again, RECORDS, tmp_path / "out", batch_size=1)
    assert len(again.asked) == 2
    assert figures(report) == figures(evaluate(Speaker(half), RECORDS))
    assert figures(load_report(tmp_path / "out")) == figures(report)
    assert (tmp_path / "out/report.md").read_text() == report.markdown()
    assert len(again.asked) == 2


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    out = tmp_path / "out"
    evaluate(Speaker(half), RECORDS, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for records, options, what in (
        (RECORDS[:3], {}, "data"),
        (RECORDS, {"protocol": "official"}, "(protocol|options)"),
        (RECORDS, {"max_new_tokens": 9}, "options"),
        (RECORDS, {"limit": 2}, "data"),
    ):
        with pytest.raises(InputError, match=f"an evaluation whose {what} is .* give another --out"):
            evaluate(Speaker(half), records, out, **options)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/settings.json").write_text("mine")
    with pytest.raises(InputError, match="holds no evaluation"):
        evaluate(Speaker(half), RECORDS, tmp_path / "foreign")


def test_what_cannot_be_asked_is_counted_and_in_no_figure(tmp_path):
    def picky(sample):
        if "Which" in sample.turns[-1][0]:
            raise InputError("too long")
        return half(sample)

    missing = Record((("Is it?", "Yes"),), (ImageFile(File(str(tmp_path / "none.png"))),))
    report = evaluate(Speaker(picky), [*RECORDS, missing], tmp_path / "out")
    assert [row["id"] for row in report.errors] == ["4.0", "6.0"]
    assert "too long" in report.errors[0]["error"]
    assert "none.png" in report.errors[1]["error"]
    assert len(report.rows) == 5
    assert "**2 questions could not be asked" in report.markdown()
    assert "\n2 questions could not be asked. The first, 4.0: too long" in str(report)
    assert figures(report)["vqa", "closed", "right", "all"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "theirs"}, "protocol must be one of medplib, official, got 'theirs'"),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, got 1.5"),
        ({"records": []}, "no records"),
        ({"model": "medplib-tiny"}, r"'medplib-tiny' cannot answer; give a model, MedPLIB.from_pretrained"),
    ],
)
def test_settings_are_checked_before_anything_is_asked(change, message, tmp_path):
    speaker = Speaker(half)
    records = change.pop("records", RECORDS)
    with pytest.raises(InputError, match=message):
        evaluate(change.pop("model", speaker), records, tmp_path / "out", **change)
    assert not speaker.asked
    assert not (tmp_path / "out").exists()


def test_a_model_in_training_mode_is_refused_before_it_is_asked(tiny_model, tmp_path):
    tiny_model.train()
    try:
        with pytest.raises(InputError, match=r"in training mode; call model\.eval\(\)"):
            evaluate(tiny_model, RECORDS, tmp_path / "out")
    finally:
        tiny_model.eval()
    assert not (tmp_path / "out").exists()


def test_a_limit_takes_records_evenly():
    speaker = Speaker(half)
    evaluate(speaker, RECORDS, limit=3)
    assert [s.turns[-1][0] for s in speaker.asked] == [RECORDS[i].turns[0][0] for i in (0, 2, 5)]


def test_questions_of_a_record_share_its_pictures():
    said = record(("One?", "Yes"), ("Two?", "No"))
    evaluate(speaker := Speaker(half), [said])
    assert speaker.asked[0].images[0] is speaker.asked[1].images[0]


# -- two models ----------------------------------------------------------------------------------------------


def test_two_evaluations_are_compared_in_pairs():
    def better(sample):
        answer = half(sample)
        if answer.findings and "b" not in sample.turns[-1][0]:
            return drawn("Here.", blob(0, 15), labels=["a"])
        return drawn("No.")

    first, second = (evaluate(Speaker(say), RECORDS) for say in (half, better))
    found = {(d.task, d.type, d.figure): d for d in compare(first, second)}
    change = found["grounding", "", "dice"]
    ours = [dice(blob(0, 15), blob(0, x)) - dice(blob(0, 10), blob(0, x)) for x in (10, 20)]
    assert change.difference.mean == pytest.approx(np.mean(ours))
    assert change.second - change.first == pytest.approx(change.difference.mean)
    assert change.difference.low == pytest.approx(min(ours))
    assert found["absent", "", "silent"].difference.mean == 1.0
    assert found["vqa", "closed", "right"].difference.mean == -1.0


def test_evaluations_of_other_questions_are_not_compared():
    with pytest.raises(InputError, match="different records"):
        compare(evaluate(Speaker(half), RECORDS), evaluate(Speaker(half), RECORDS[:2]))
    with pytest.raises(InputError, match="different protocol"):
        compare(evaluate(Speaker(half), RECORDS), evaluate(Speaker(half), RECORDS, protocol="official"))
    whole = evaluate(Speaker(half), RECORDS)
    with pytest.raises(InputError, match="no question in common"):
        compare(Report(whole.rows[:2], whole.settings), Report(whole.rows[2:], whole.settings))


# -- the real thing ------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_page_runs(here, capsys):
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert re.search(
        r"grounding +dice +0\.\d+ +0\.\d+ +[+-]0\.\d+ +[+-]0\.\d+ to [+-]0\.\d+ +40", done.output
    )
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, "evaluation.md", "exec"), names)
    assert "# Evaluation" in capsys.readouterr().out
    report = names["report"]
    assert {f: v for f, v in figures(report).items() if f[2] == "dice"}["grounding", "", "dice", "all"] > 0.85
    assert len(report.rows) == 40
    stored = json.loads((here / "evaluation/tiny/report.json").read_text())
    assert stored["settings"]["model"]["name"] == "medplib-tiny"
    assert len(stored["settings"]["model"]["weights_sha256"]) == 64
    assert stored["figures"][0]["mean"] == report.lines()[0].value.mean


def test_the_command_answers_in_json_and_counts_what_failed(here):
    broken = here / "broken"
    for part in ("images", "masks/lesion"):
        (broken / part).mkdir(parents=True)
    picture = (ROOT / "examples/images/chest_ct.png").read_bytes()
    (broken / "images/a.png").write_bytes(picture)
    (broken / "masks/lesion/a.png").write_bytes(picture)
    (broken / "images/b.png").write_bytes(picture[:900])
    (broken / "masks/lesion/b.png").write_bytes(picture)
    done = CliRunner().invoke(app, ["evaluate", "broken", "--format", "folder", "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["questions"], told["errors"]) == (2, 1)
    wrong = ["--protocol", "mine", "--model", "nowhere"]  # said before a model is looked for
    done = CliRunner().invoke(app, ["evaluate", "broken", "--format", "folder", *wrong])
    assert done.exit_code == 2
    assert "protocol must be one of" in done.output
    done = CliRunner().invoke(app, ["compare", "broken", "broken"])
    assert done.exit_code == 2
    assert "holds no evaluation" in done.output


def test_the_official_protocol_of_a_model_draws_as_published(tiny_model):
    records = read("sa_med2d", ROOT / "examples/mini")[:3]
    report = evaluate(tiny_model, records, protocol="official", max_new_tokens=4)
    assert [row["drawn"] for row in report.rows] == [1, 1, 1]  # a mask in any case
    assert evaluate(tiny_model, records, max_new_tokens=4).settings["protocol"] == "medplib"


def test_the_pages_facts_are_those_of_the_code():
    from medplib.evaluation.published import GROUNDING_DICE

    for split, name in (("test", "test"), ("zeroshot", "zero-shot")):
        line = ", ".join(f"{modality} {value:.2f}" for modality, value in GROUNDING_DICE[split].items())
        assert f"| {name} | {line} |" in TEXT
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
