"""Readers of question sets, each on a small copy of its real format."""

import csv
import io
import json
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medplib.data import READERS, default_mini_root, read
from medplib.data.recordset import concat
from medplib.errors import InputError, UnknownNameError


def png(value=90, size=(20, 30)):
    """The bytes of a grey picture."""
    out = io.BytesIO()
    Image.fromarray(np.full(size, value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def put(path, content=None):
    """Write a picture, or rows as JSON, with the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.write_bytes(png())
    else:
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


# ------------------------------------------------------------------------------------------ LLaVA-Med


def test_llava_med_reads_both_spellings_and_domains(tmp_path):
    domain = {"chest_xray": True, "mri": False, "histology": False, "gross": False, "ct_scan": False}
    put(
        tmp_path / "instruct" / "llava_med_instruct_10k.json",
        [
            {
                "id": "1",
                "image": "a.jpg",
                "domain": domain,
                "conversatons": talk("<image>\nWhat?", "A lung."),
            },
            {"id": "2", "image": "a.jpg", "conversations": talk("Q1", "A1", "Q2\n<image>", "A2")},
            {"id": "3", "conversations": talk("Text alone?", "Yes.")},
            {"id": "4", "image": "gone.jpg", "conversations": talk("Q", "A")},
            {"id": "5", "image": "a.jpg", "conversations": talk("Q")},
            {"id": "6", "image": "a.jpg", "conversations": talk("Where is <region>?", "A")},
            "no row",
        ],
    )
    put(tmp_path / "images" / "a.jpg")
    records = read("llava-med", tmp_path)
    assert [record.turns for record in records] == [
        (("What?", "A lung."),),
        (("Q1", "A1"), ("Q2", "A2")),
        (("Text alone?", "Yes."),),
    ]
    assert [record.modality for record in records] == ["X-ray", None, None]
    assert [record.extra["id"] for record in records] == ["1", "2", "3"]
    assert records[0].load_images()[0].shape == (20, 30, 3)
    assert records[2].images == ()
    assert records.report.counts["dropped"] == {
        "image missing": 1,
        "a question without an answer": 1,
        "<region> in a text without pixels": 1,
        "no conversation": 1,
    }
    assert records.report.examples["dropped", "image missing"] == ["gone.jpg"]


# ------------------------------------------------------------------------------------------ SLAKE


@pytest.fixture
def slake(tmp_path):
    row = {
        "img_id": 1, "img_name": "xmlab1/source.jpg", "question": "What modality is used?", "answer": "MRI",
        "q_lang": "en", "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
        "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": 7,
    }  # fmt: skip
    chinese = {**row, "question": "图像里有肝脏吗?", "answer": "是", "q_lang": "zh", "answer_type": "CLOSED"}
    put(tmp_path / "train.json", [row, chinese])
    put(tmp_path / "validation.json", [{**row, "img_name": "xmlab2/source.jpg", "modality": "CT"}])
    put(tmp_path / "test.json", [{**row, "img_name": "xmlab3/source.jpg", "modality": "X-Ray"}])
    for number in (1, 2, 3):
        put(tmp_path / "imgs" / f"xmlab{number}" / "source.jpg")
    labels = np.zeros((20, 30), np.uint8)
    labels[:5], labels[10:, :4], labels[19, 29] = 1, 2, 9
    Image.fromarray(labels).save(tmp_path / "imgs" / "xmlab1" / "mask.png")
    (tmp_path / "mask.txt").write_text("1:Liver\nLeft Kidney:2\n\n3 Spleen\n")
    return tmp_path


def test_slake_by_split_and_language(slake):
    wanted = {"train": 2, "val": 1, "validation": 1, "test": 1, None: 4}
    assert {name: len(read("slake", slake, split=name)) for name in wanted} == wanted
    (english,) = read("slake", slake, split="train", lang="en")
    assert english.turns == (("What modality is used?", "MRI"),)
    assert (english.modality, english.answer_type, english.case, english.split) == (
        "MR",
        "open",
        "xmlab1",
        "train",
    )
    assert english.extra["qid"] == 7
    (chinese,) = read("slake", slake / "train.json", lang="zh")
    assert (chinese.turns[0][0], chinese.answer_type) == ("图像里有肝脏吗?", "closed")
    assert [r.modality for r in read("slake", slake, lang="en")] == ["X-ray", "MR", "CT"]
    assert not read("slake", slake, lang="en").report
    with pytest.raises(InputError, match="lang must be one of en, zh"):
        read("slake", slake, lang="de")


def test_slake_masks_become_grounding_records(slake):
    records = read("slake", slake, split="train", lang="en", masks=True)
    assert [r.labels for r in records] == [(), ("Liver",), ("Left Kidney",)]
    assert records[1].turns == (("Segment the Liver.", "Here is the <ref>Liver</ref> <SEG>."),)
    assert [m.sum() for r in records for m in r.load_masks((20, 30))] == [150, 40]
    assert records.report.counts["unknown"] == {"mask value without a name": 1}


# ------------------------------------------------------------------------------------------ VQA-RAD, PathVQA


def write_parquet(path, rows, group=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


@pytest.mark.parametrize(("name", "modality"), [("vqa_rad", None), ("path_vqa", "histopathology")])
def test_parquet_sets_hold_their_pictures(tmp_path, name, modality):
    rows = [
        {"image": {"bytes": png(i), "path": f"{i}.png"}, "question": f"Is it {i}?", "answer": answer}
        for i, answer in enumerate(["yes", "No", "left lung", None, "5"])
    ]
    write_parquet(tmp_path / "data" / "train-00000-of-00001-abc.parquet", rows)
    write_parquet(tmp_path / "data" / "test-00000-of-00001-def.parquet", rows[:1])
    records = read(name, tmp_path, split="train")
    assert [(r.row, r.answer_type) for r in records] == [
        (0, "closed"),
        (1, "closed"),
        (2, "open"),
        (4, "open"),
    ]
    assert [r.load_images()[0][0, 0, 0] for r in records] == [0, 1, 2, 4]
    assert {r.modality for r in records} == {modality}
    assert records.report.counts["dropped"] == {"empty answer": 1}
    assert len(read(name, tmp_path)) == 5
    write_parquet(
        tmp_path / "gone" / "data" / "train.parquet", [rows[0], {**rows[1], "image": None}, rows[2]]
    )
    partly = read(name, tmp_path / "gone")
    assert [r.row for r in partly] == [0, 2]
    assert partly.report.counts["dropped"] == {"image missing": 1}
    again = pickle.loads(pickle.dumps(records))  # noqa: S301
    assert again[3].turns == records[3].turns
    assert records.nbytes < 200
    with pytest.raises(InputError, match="no split 'val'"):
        read(name, tmp_path, split="val")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="not a readable Parquet"):
        read(name, tmp_path / "bad.parquet")


def test_vqa_rad_original_json(tmp_path):
    row = {
        "qid": "1", "phrase_type": "freeform", "image_name": "synpic1.jpg", "image_organ": "CHEST",
        "question": "Is it normal?", "answer": "Yes", "answer_type": "CLOSED ", "question_type": "PRES",
    }  # fmt: skip
    rows = [row, {**row, "phrase_type": "test_para", "answer": 3, "answer_type": "OPEN"}]
    put(tmp_path / "VQA_RAD Dataset Public.json", rows)
    put(tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg")
    first, second = read("vqa_rad", tmp_path)
    assert (first.answer_type, first.split, first.case) == ("closed", "train", "synpic1.jpg")
    assert (second.turns[0][1], second.answer_type, second.split) == ("3", "open", "test")
    assert [r.split for r in read("vqa_rad", tmp_path, split="test")] == ["test"]
    with pytest.raises(InputError, match=r"no split 'val'\. Known: test, train"):
        read("vqa_rad", tmp_path, split="val")
    assert first.load_images()[0].shape == (20, 30, 3)


# ------------------------------------------------------------------------------------------ choices


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


PMC_VQA_COLUMNS = [
    *("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"),
]


def test_pmc_vqa_both_versions(tmp_path):
    head = PMC_VQA_COLUMNS
    rows = [
        [
            "a.jpg",
            "Which, exactly?",
            " B:Heart, left",
            " A:Lung",
            " B:Heart, left ",
            " C:Liver",
            " D:Brain",
            "B",
        ],
        ["a.jpg", "Which?", "Skin", " A:Lung", "B:Heart", "C:Liver", "D:Brain", ""],
    ]
    write_csv(tmp_path / "train.csv", [head, *rows])
    write_csv(tmp_path / "test.csv", [head, *rows[:1] * 3])
    write_csv(tmp_path / "test_clean.csv", [head, *rows[:1] * 2])
    head2 = ["index", "Figure_path", "Caption", "Question", "ChoiceA", "ChoiceB", "ChoiceC", "ChoiceD"]
    write_csv(
        tmp_path / "train_2.csv",
        [
            [*head2, "Anwser", "split"],
            [0, "a.jpg", "A, caption", "What?", "CT", "MRI", "PET", "US", "C", "train"],
        ],
    )
    put(tmp_path / "images" / "a.jpg")
    (record,) = read("pmc_vqa", tmp_path, split="train", version=1)
    question = "Which, exactly?\nA. Lung\nB. Heart, left\nC. Liver\nD. Brain"
    assert record.turns == ((question, "Heart, left"),)
    assert record.choices == ("Lung", "Heart, left", "Liver", "Brain")
    assert (record.answer_type, record.extra["answer_label"]) == ("choice", "B")
    dropped = read("pmc_vqa", tmp_path / "train.csv").report.examples
    assert dropped == {("dropped", "the answer is none of the choices"): ["a.jpg: 'Skin'"]}
    (record,) = read("pmc_vqa", tmp_path, version=2)
    assert (record.turns[0][1], record.choices[2]) == ("PET", "PET")
    with zipfile.ZipFile(tmp_path / "figures.zip", "w") as out:
        out.writestr("figures/a.jpg", png(7))
    (record,) = read("pmc_vqa", tmp_path, version=2, images=tmp_path / "figures.zip")
    assert record.load_images()[0].max() == 7
    assert len(read("pmc_vqa", tmp_path, split="test", version=1)) == 3
    assert len(read("pmc_vqa", tmp_path, split="test", version=1, clean=True)) == 2
    with pytest.raises(InputError, match="versions 1 and 2; choose"):
        read("pmc_vqa", tmp_path)


def test_omnimedvqa(tmp_path):
    row = {
        "dataset": "Chest CT", "question_id": "c_1", "question_type": "Modality Recognition",
        "question": "Which modality?", "gt_answer": "CT scan.", "image_path": "Images/Chest/a.png",
        "option_A": "MRI.", "option_B": "CT scan.", "option_C": "X-ray.", "option_D": "PET.",
        "modality_type": "CT(Computed Tomography)",
    }  # fmt: skip
    odd = {**row, "modality_type": "OCT (Optical Coherence Tomography", "option_C": None, "option_D": None}
    put(tmp_path / "QA_information" / "Open-access" / "Chest CT.json", [row, odd])
    put(tmp_path / "QA_information" / "Restricted-access" / "More.json", [row])
    put(tmp_path / "Images" / "Chest" / "a.png")
    first, second = read("omnimedvqa", tmp_path, access="open")
    assert (first.modality, first.split, first.turns[0][1]) == ("CT", "test", "CT scan.")
    assert (second.modality, second.choices) == (None, ("MRI.", "CT scan."))
    assert second.extra["modality"].startswith("OCT")
    assert len(read("omnimedvqa", tmp_path)) == 3
    assert sum(read("omnimedvqa", tmp_path).report.counts["unknown"].values()) == 1
    with pytest.raises(InputError, match="no split 'train'"):
        read("omnimedvqa", tmp_path, split="train")


def test_a_choice_keeps_a_letter_that_is_part_of_its_name(tmp_path):
    put(tmp_path / "images" / "a.jpg")
    head = PMC_VQA_COLUMNS
    germs = ["E. coli", "B. cereus", "C. difficile", "S. aureus"]
    lettered = [f"{letter}: {germ}" for letter, germ in zip("ABCD", germs, strict=True)]
    rows = [["a.jpg", "Which?", "C. difficile", *germs, ""], ["a.jpg", "Which?", germs[2], *lettered, "C"]]
    write_csv(tmp_path / "train.csv", [head, *rows])
    for record in read("pmc_vqa", tmp_path):
        assert (record.choices, record.turns[0][1]) == (tuple(germs), "C. difficile")
    options = {f"option_{letter}": group for letter, group in zip("ABCD", ["O", "A", "B", "AB"], strict=True)}
    row = {"question": "Which blood group?", "gt_answer": "B", "image_path": "images/a.jpg", **options}
    put(tmp_path / "QA_information" / "Open-access" / "x.json", [row])
    (record,) = read("omnimedvqa", tmp_path)
    assert (record.turns[0][1], record.extra["answer_label"]) == ("B", "C")


def test_imageclef_2019_and_2021(tmp_path):
    train = tmp_path / "ImageClef-2019-VQA-Med-Training"
    test = tmp_path / "VQAMed2019Test"
    put(train / "Train_images" / "synpic1.jpg")
    lines = "synpic1|what modality is shown?|xr - plain film\nsynpic1|is it normal?|yes\n\nsynpic1|broken\n"
    (train / "All_QA_Pairs_train.txt").write_text(lines)
    (train / "QAPairsByCategory").mkdir()
    (train / "QAPairsByCategory" / "C1_Modality_train.txt").write_text(lines)
    put(test / "VQAMed2019_Test_Images" / "synpic2.jpg")
    (test / "Test_Questions_w_Ref_Answers.txt").write_text("synpic2|plane|what plane?|axial#transverse\n")
    other = tmp_path / "2021"
    put(other / "VQA-500-Images" / "synpic3.jpg")
    (other / "VQA-Med-2021-Val.txt").write_text('synpic3|what is "abnormal"?|mass\n')
    first, second = read("imageclef", train)
    assert (first.turns, first.split) == ((("what modality is shown?", "xr - plain film"),), "train")
    assert (second.answer_type, second.case) == ("closed", "synpic1")
    (tested,) = read("imageclef", tmp_path, split="test", year=2019)
    assert (tested.turns, tested.extra) == (
        (("what plane?", "axial"),),
        {"category": "plane", "other_answers": ["transverse"]},
    )
    (latest,) = read("imageclef", tmp_path, year=2021)
    assert (latest.turns, latest.split) == ((('what is "abnormal"?', "mass"),), "val")
    assert len(read("imageclef", tmp_path)) == 4
    assert read("imageclef", train).report.counts["dropped"] == {"not imageID|question|answer": 1}
    assert all(record.load_images()[0].shape == (20, 30, 3) for record in read("imageclef", tmp_path))


@pytest.fixture
def imageclef_2021(tmp_path):
    root = tmp_path / "ImageCLEF-2021"
    train = root / "VQA-Med-2020-Task1-VQAnswering-TrainVal-Sets" / "VQAMed2020-VQAnswering-TrainingSet"
    val = root / "VQA-Med-2021-Tasks-1-2-NewValidationSets"
    test = root / "Task1-VQA-2021-TestSet-w-GroundTruth"
    for number, folder in enumerate((train / "images", val / "images", test / "VQA-500-Images")):
        for name in "ab":
            put(folder / f"synpic{number}{name}.jpg")
    lines = {
        train / "VQAnswering_2020_Train_QA_pairs.txt": "synpic0a|what is abnormal?|cyst\n",
        val / "VQA-Med-2021-VQAnswering-Task1-New-ValidationSet.txt": "synpic1a|is this normal?|no\n",
        val / "VQA-Med-2021-VQGeneration-Task2-New-ValidationSet.txt": "synpic1a|what is it?|where is it?\n",
        test / "Task1-VQA-2021-TestSet-Questions.txt": "synpic2b|what is abnormal?\nsynpic2a|is it new?\n",
        test / "Task1-VQA-2021-TestSet-ReferenceAnswers.txt": "synpic2a|yes\nsynpic2b|necrosis|bone loss\n"
        "synpic2c|nothing\n",
    }
    for file, text in lines.items():
        file.write_text(text)
    return root


def test_imageclef_2021_joins_questions_and_reference_answers(imageclef_2021):
    records = read("imageclef", imageclef_2021, split="test", year=2021)
    assert [(r.turns[0], r.extra, r.case) for r in records] == [
        (("what is abnormal?", "necrosis"), {"other_answers": ["bone loss"]}, "synpic2b"),
        (("is it new?", "yes"), {}, "synpic2a"),
    ]
    assert all(record.load_images()[0].shape == (20, 30, 3) for record in records)
    assert records.report.counts["dropped"] == {
        "not imageID|question|answer": 1,  # an answer without its question
        "questions to be generated (VQG)": 1,
    }
    (file,) = imageclef_2021.glob("*/*Questions.txt")
    assert [r.turns for r in read("imageclef", file)] == [r.turns for r in records]


def test_imageclef_2021_knows_its_splits(imageclef_2021):
    assert [r.split for r in read("imageclef", imageclef_2021)] == ["test", "test", "train", "val"]
    for split, case in (("train", "synpic0a"), ("val", "synpic1a"), ("validation", "synpic1a")):
        assert [r.case for r in read("imageclef", imageclef_2021, split=split)] == [case]


def test_imageclef_does_not_take_answers_for_questions(imageclef_2021):
    (questions,) = imageclef_2021.glob("*/*Questions.txt")
    (answers,) = imageclef_2021.glob("*/*Answers.txt")
    kept = questions.read_text()
    questions.unlink()
    with pytest.raises(InputError, match=r"No line of .*ReferenceAnswers.txt' holds a question"):
        read("imageclef", imageclef_2021, split="test")
    with pytest.raises(InputError, match="need their questions beside them"):
        read("imageclef", answers)
    rest = read("imageclef", imageclef_2021)
    assert [r.split for r in rest] == ["train", "val"]
    assert rest.report.counts["dropped"]["answers without questions"] == 1
    assert rest.report.examples["dropped", "answers without questions"] == [answers.name]
    answers.unlink()
    questions.write_text(kept)
    assert "questions without answers" in read("imageclef", imageclef_2021).report.counts["dropped"]


# ------------------------------------------------------------------------------------------ read itself


def test_names_options_and_paths_are_checked(slake, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'slake'"):
        read("slak", slake)
    with pytest.raises(InputError, match=r"no option 'language'\. Known: lang, masks, images"):
        read("slake", slake, language="en")
    with pytest.raises(InputError, match="There is no"):
        read("slake", tmp_path / "gone")
    with pytest.raises(InputError, match="has no split 'dev2'"):
        read("slake", slake, split="dev2")
    (slake / "imgs").rename(slake / "elsewhere")
    with pytest.raises(InputError, match=r"No record of slake.*image missing.*Give images=FOLDER"):
        read("slake", slake)
    assert len(read("slake", slake, images=slake / "elsewhere")) == 4
    with pytest.raises(InputError, match="The reader 'slake': masks must be true or false, got 1"):
        read("slake", slake, masks=1)
    with pytest.raises(InputError, match=r"'/no\.json' cannot be read"):
        read("sa_med2d", default_mini_root(), classes="/no.json")
    assert {"mecovqa", "sa_med2d", "folder", "coco", "nnunet", "huggingface"} <= set(READERS.names())


def test_a_record_set_is_a_sequence_with_a_fingerprint(slake):
    records = read("slake", slake)
    assert records[-1].turns == records[3].turns
    assert [r.case for r in records[1:3]] == [records[1].case, records[2].case]
    assert [r.row for r in records[::-1]] == [r.row for r in reversed(list(records))]
    chosen = records.subset([3, 0, 3])
    assert [r.case for r in chosen] == [records[i].case for i in (3, 0, 3)]
    assert [r.case for r in chosen[1:]] == [records[0].case, records[3].case]
    both = concat([chosen, records]) + records[:1]
    assert [r.case for r in both] == [r.case for r in (*chosen, *records, records[0])]
    assert [r.case for r in pickle.loads(pickle.dumps(both))] == [r.case for r in both]  # noqa: S301
    assert len(records.filter(lambda record: record.modality == "MR")) == 2
    for index in (4, -5):
        with pytest.raises(IndexError):
            records[index]
    with pytest.raises(InputError, match="must be 0 to 3, got 0 to 4"):
        records.subset([0, 4])
    prints = [s.fingerprint() for s in (records, read("slake", slake), chosen, records[:3], both)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
    rows = json.loads((slake / "test.json").read_text())
    put(slake / "test.json", [{**rows[0], "answer": "CT"}])
    assert read("slake", slake).fingerprint() != prints[0]
