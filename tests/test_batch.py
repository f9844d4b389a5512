"""Many questions from a file: in batches, taken up again, one bad job does no harm; with a stand-in model."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import medplib
from medplib.apps.batch import read_jobs, run_batch
from medplib.apps.cli import app
from medplib.errors import InputError, MedPLIBError
from medplib.processing import Sample
from medplib.prompts.types import Box, Mask, Point
from medplib.results import NOTICE, Answer, Finding


class FakeModel:
    """Answers with the question itself and a mask of the left half; "fail" in a question fails its batch."""

    def __init__(self):
        self.batches: list[list[Sample]] = []
        self.options = {}

    def answer(self, samples, **options):
        self.batches.append(list(samples))
        self.options = options
        if any("fail" in sample.turns[-1][0] for sample in samples):
            raise RuntimeError("out of\nmemory")
        answers = []
        for sample in samples:
            mask = np.zeros(sample.images[0].shape[:2], bool)
            mask[:, : mask.shape[1] // 2] = True
            question = sample.turns[-1][0]
            answers.append(Answer(question.upper(), [Finding("half", mask, 0.5)], sample.images, question))
        return answers


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def jobs(tmp_path):
    """`jobs({...}, "text", ...)` writes a file of jobs beside an image and a mask; returns its path."""
    Image.fromarray(np.full((50, 80), 90, np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros((50, 80), np.uint8)
    mask[10:20, 30:50] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")

    def write(*lines):
        path = tmp_path / "jobs.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


def job(question="What?", **more):
    return {"image": "a.png", "question": question, **more}


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_jobs_are_answered_in_batches_in_their_order(model, jobs, tmp_path):
    out = tmp_path / "out"
    path = jobs(*(job(f"Q{i}?") for i in range(5)))
    assert run_batch(lambda: model, path, out, batch_size=2, seed=3) == (5, 0, 0)
    assert [len(batch) for batch in model.batches] == [2, 2, 1]
    assert model.options == {"seed": 3}
    assert [record["id"] for record in results(out)] == ["1", "2", "3", "4", "5"]
    assert [record["text"] for record in results(out)] == [f"Q{i}?" for i in range(5)]
    assert results(out)[0]["findings"][0]["area"] == 50 * 40
    for i in range(1, 6):
        files = {file.name for file in (out / str(i)).iterdir()}
        assert files == {"overlay.png", "mask_0_half.png", "answer.json"}


def test_a_job_says_images_prompts_and_history(model, jobs):
    prompts = [{"box": [1, 2, 30, 40]}, {"point": [5, 6]}, {"point": [7, 8], "label": 0}, {"mask": "m.png"}]
    history = [["Modality?", "CT."]]
    path = jobs(
        "", {"id": "x-1", "images": ["a.png"] * 2, "question": "Q", "prompts": prompts, "history": history}
    )
    shown = []
    assert run_batch(lambda: model, path, None, show=shown.append) == (1, 0, 0)
    assert json.loads(shown[0])["id"] == "x-1"
    (sample,) = model.batches[0]
    assert len(sample.images) == 2
    assert sample.turns == [("Modality?", "CT."), ("Q", None)]
    assert sample.prompts[:3] == [Box(1, 2, 30, 40), Point(5, 6), Point(7, 8, 0)]
    assert isinstance(sample.prompts[3], Mask)
    assert sample.prompts[3].to_mask((50, 80)).sum() == 200


def test_a_failed_batch_is_taken_apart_and_only_the_bad_job_fails(model, jobs, tmp_path):
    path = jobs(job("one"), job("fail"), job("three"))
    assert run_batch(lambda: model, path, tmp_path / "out", batch_size=3) == (2, 1, 0)
    assert [len(batch) for batch in model.batches] == [3, 1, 1, 1]
    one, bad, three = results(tmp_path / "out")
    assert bad == {"id": "2", "error": "out of memory"}
    assert (one["text"], three["text"]) == ("ONE", "THREE")
    assert not (tmp_path / "out" / "2").exists()


BAD = {
    "{not json": "line 1 is not JSON",
    "[1]": "must be a JSON object",
    '{"image": "a.png"}': "needs a 'question'",
    '{"image": "a.png", "question": " "}': "needs a 'question'",
    '{"question": "Q"}': "either 'image' or 'images'",
    '{"image": "a.png", "images": ["a.png"], "question": "Q"}': "either 'image' or 'images'",
    '{"images": [], "question": "Q"}': "'images' a list of paths",
    '{"image": 3, "question": "Q"}': "'image' must be a path",
    '{"image": "a.png", "question": "Q", "prompt": []}': "unknown 'prompt'; a job has axis, history, id,",
    '{"image": "a.png", "question": "Q", "slice": 1}': "'slice', 'window') are for volumes and DICOM",
    '{"image": "a.png", "question": "Q", "slice": -1}': "'slice' must be a whole number from 0, got -1",
    '{"image": "a.png", "question": "Q", "slice": true}': "'slice' must be a whole number from 0, got true",
    '{"image": "a.png", "question": "Q", "slice": "3"}': "'slice' must be a whole number from 0, got \"3\"",
    '{"image": "a.png", "question": "Q", "axis": "axial"}': "'axis' is for volumes, not for",
    '{"image": "a.png", "question": "Q", "axis": ["up"]}': "'axis' must be one of sagittal, coronal, axial",
    '{"image": "a.png", "question": "Q", "window": [0, 9]}': "'slice', 'window') are for volumes and DICOM",
    '{"image": "a.png", "question": "Q", "window": [9, 9]}': "'window' must be [lowest, highest] value shown",
    '{"image": "a.png", "question": "Q", "window": [0, NaN]}': "'window' must be [lowest, highest] value",
    '{"image": "a.png", "question": "Q", "window": [0, 1' + "0" * 400 + "]}": "'window' must be [lowest,",
    '{"image": "a.png", "question": "Q", "window": 3}': "[lowest, highest] value shown, got 3",
    '{"image": "a.png", "question": "Q", "series": 1}': "'series') is for the folder of a DICOM series",
    '{"image": "a.png", "question": "Q", "series": 1.5}': "'series' must be a number from 1 or the digits",
    '{"image": "v.nii", "question": "Q", "slice": 0}': "Check that it is there",
    '{"image": "gone.png", "question": "Q"}': "gone.png",
    '{"image": "a.png", "question": "Q", "history": [["x"]]}': "[question, answer]",
    '{"image": "a.png", "question": "Q", "prompts": {}}': "'prompts' must be a list",
    '{"image": "a.png", "question": "Q", "prompts": [{"box": [1, 2, 3]}]}': "a prompt is",
    '{"image": "a.png", "question": "Q", "prompts": [{"box": [1, 2, 300, 4]}]}': "outside",
    '{"image": "a.png", "question": "Q", "prompts": [{"box": ["a", 2, 30, 4]}]}': "Box",
    '{"image": "a.png", "question": "Q", "prompts": [{"point": [1, 2], "labels": 0}]}': "a prompt is",
    '{"image": "a.png", "question": "Q", "prompts": [{"mask": "gone.png"}]}': "gone.png",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_job_is_reported_and_the_others_are_answered(model, jobs, line):
    shown = []
    assert run_batch(lambda: model, jobs(line, job("Q")), None, show=shown.append) == (1, 1, 0)
    bad, good = map(json.loads, shown)
    assert bad.keys() == {"id", "error"}
    assert bad["id"] == "1"
    assert BAD[line] in bad["error"]
    assert good["text"] == "Q"


def test_jobs_name_slices_of_volumes_and_frames_of_dicom_files(model, jobs, tmp_path, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    from test_dicom import made
    from test_series import VALUES, write

    from medplib.io import dicom, volume

    values = np.random.default_rng(0).integers(0, 200, (20, 30, 12)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 3, 1])), tmp_path / "v.nii.gz")
    write(tmp_path / "series", names="a{}".format)
    (tmp_path / "series" / "b").write_bytes(made(VALUES[0], SeriesInstanceUID="1.2.4", Modality="MR"))
    (tmp_path / "two.dcm").write_bytes(made(VALUES[:2]))
    read = []
    load_volume = volume.load_volume
    monkeypatch.setattr(volume, "load_volume", lambda *a, **k: read.append(a) or load_volume(*a, **k))
    asked = [
        {"image": "v.nii.gz", "slice": 4, "window": [0, 200]},
        {"image": "v.nii.gz", "slice": 5},
        {"image": "v.nii.gz", "slice": 7, "axis": "coronal", "window": [50, 100]},
        {"image": "series", "slice": 2, "series": 1, "window": [-500, 500]},
        {"image": "series", "slice": 3, "series": "2.3"},
        {"image": "two.dcm", "slice": 1, "window": [-100, 100]},
        {"images": ["two.dcm", "two.dcm"], "slice": 0},
        {"image": "v.nii.gz"},
        {"image": "v.nii.gz", "slice": 12},
        {"image": "series", "slice": 2},
        {"image": "two.dcm", "slice": 2},
    ]
    shown = []
    path = jobs(*({"question": "Q", **one} for one in asked))
    assert run_batch(lambda: model, path, None, batch_size=99, show=shown.append) == (7, 4, 0)
    nifti, series = load_volume(tmp_path / "v.nii.gz"), load_volume(tmp_path / "series", series=1)
    expected = [
        load_volume(tmp_path / "v.nii.gz", (0, 200)).picture("axial", 4),
        nifti.picture("axial", 5),
        load_volume(tmp_path / "v.nii.gz", (50, 100)).picture("coronal", 7),
        load_volume(tmp_path / "series", (-500, 500), 1).picture("axial", 2),
        series.picture("axial", 3),
        dicom.read_dicom(tmp_path / "two.dcm", 1, (0, 200)),
        dicom.read_dicom(tmp_path / "two.dcm", 0),
    ]
    for sample, picture in zip(model.batches[0], expected, strict=True):
        np.testing.assert_array_equal(sample.images[0], picture)
    assert len(model.batches[0][6].images) == 2
    errors = [json.loads(line)["error"] for line in shown[7:]]
    for error, message in zip(
        errors,
        (
            "name a slice with --slice N",
            "numbered from 0 to 11 (axial); got 12",
            "holds 2 series",
            "no frame 2",
        ),
        strict=True,
    ):
        assert message in error
    assert len(read) == 5  # of the eight volumes named; neighbours share one


def test_done_jobs_are_skipped_and_a_torn_line_is_done_again(model, jobs, tmp_path):
    out = tmp_path / "out"
    path = jobs(job("one"), job("fail"), job("three", id=3), job("four"))
    run_batch(lambda: model, path, out)
    assert [record["id"] for record in results(out)] == ["1", "2", 3, "4"]
    content = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(content[:-40])  # killed while it wrote
    model.batches.clear()
    assert run_batch(lambda: model, path, out) == (1, 1, 3)
    assert [[s.turns[-1][0] for s in batch] for batch in model.batches] == [["four"]]
    assert (out / "results.jsonl").read_bytes() == content
    assert run_batch(lambda: pytest.fail("loaded for nothing"), path, out) == (0, 1, 4)
    assert (out / "results.jsonl").read_bytes() == content


def test_a_run_that_is_stopped_goes_on_where_it_was(model, jobs, tmp_path):
    path, out = jobs(*(job(f"Q{i}") for i in range(4))), tmp_path / "out"
    calls = []

    class Stopped(FakeModel):
        def answer(self, samples, **options):
            calls.append(len(samples))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().answer(samples, **options)

    with pytest.raises(KeyboardInterrupt):
        run_batch(Stopped, path, out, batch_size=1)
    assert [record["id"] for record in results(out)] == ["1"]
    assert run_batch(lambda: model, path, out, batch_size=1) == (3, 0, 1)
    assert [record["id"] for record in results(out)] == ["1", "2", "3", "4"]


def test_results_of_other_jobs_are_not_mixed_in(model, jobs, tmp_path):
    out = tmp_path / "out"
    run_batch(lambda: model, jobs(job("one")), out)
    with pytest.raises(InputError, match="answers another question under the id '1'"):
        run_batch(lambda: model, jobs(job("two")), out)
    (out / "results.jsonl").write_text("hello\n")
    with pytest.raises(InputError, match=r"Line 1 of .*results.jsonl' is no result"):
        run_batch(lambda: model, jobs(job("one")), out)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "x" * 101, "results.jsonl", [1]])
def test_ids_name_folders_inside_the_results(jobs, name):
    with pytest.raises(InputError, match="an id names a folder"):
        read_jobs(jobs(job(id=name)))


def test_an_id_is_given_once(jobs):
    assert [found.id for found in read_jobs(jobs(job(id=None), job(id=7)))] == ["1", "7"]
    with pytest.raises(InputError, match="two jobs with the id '2'"):
        read_jobs(jobs(job(id=2), job()))


def test_a_foreign_file_fails_one_job_and_a_folder_that_cannot_be_written_all(
    model, jobs, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    (out / "1").mkdir(parents=True)
    (out / "1" / "overlay.png").write_text("mine")
    assert run_batch(lambda: model, jobs(job("one"), job("two")), out) == (1, 1, 0)
    assert "that medplib did not write" in results(out)[0]["error"]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MedPLIBError, match="No space left"):
        run_batch(lambda: model, jobs(job("one"), job("two"), job("three")), out)
    assert len(results(out)) == 2


def test_the_command_reports_progress_and_its_exit_status(model, jobs, tmp_path, monkeypatch):
    monkeypatch.setitem(vars(medplib), "MedPLIB", type("M", (), {"from_pretrained": lambda name: model}))

    def run(*words):
        done = CliRunner().invoke(app, ["ask", "--batch", *map(str, words)])
        return done.exit_code, done.stdout, done.stderr

    out = tmp_path / "out"
    status, shown, noise = run(jobs(job("one"), job("two")), "--out", out, "--max-new-tokens", 9)
    assert (status, shown.splitlines()[-1]) == (0, NOTICE)
    assert f"2 answered, 0 failed, 0 were there before. Written to {out}" in shown
    assert "2/2" in noise
    assert model.options == {"seed": 0, "max_new_tokens": 9}
    status, shown, noise = run(jobs(job("one"), job("fail")), "--batch-size", 1)
    assert status == 1
    assert [json.loads(line).get("error") for line in shown.splitlines()] == [None, "out of memory"]
    assert run(jobs(job(id="a/b")))[0] == 2


def test_a_real_model_answers_a_batch_as_it_answers_one_by_one(tmp_path):
    from pathlib import Path

    images = Path(__file__).parents[1] / "examples" / "images"
    asked = [("chest_ct", "Segment the right lung."), ("brain_mr", "Segment the left hemisphere.")]
    asked += [("nuclei", "What is the modality of this image?"), ("chest_ct", "What is in <region>?")]
    lines = [{"image": str(images / f"{image}.png"), "question": question} for image, question in asked]
    lines[3]["prompts"] = [{"box": [35, 66, 136, 200]}]
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = medplib.MedPLIB.from_pretrained()
    assert run_batch(lambda: model, path, tmp_path / "out", batch_size=4) == (4, 0, 0)
    for line, record in zip(lines, results(tmp_path / "out"), strict=True):
        alone = model.ask(
            line["image"], line["question"], [Box(*p["box"]) for p in line.get("prompts", [])]
        ).to_dict()
        assert record["text"] == alone["text"]
        areas = [[f["area"] for f in answer["findings"]] for answer in (record, alone)]
        np.testing.assert_allclose(*areas, rtol=0.01)
