"""The MeCoVQA builder: labelled images -> grounding, region and complex conversations in MeCoVQA's format.

from medplib.data.builder import BuildSettings, SAMed2DFolder, build_mecovqa
build_mecovqa(SAMed2DFolder("examples/mini"), "mecovqa", BuildSettings(seed=1))
"""

from medplib.data.builder.absence import AbsencePolicy
from medplib.data.builder.assemble import BuildReport, BuildSettings, build_mecovqa
from medplib.data.builder.openai import OpenAIWriter
from medplib.data.builder.records import RecordSamples
from medplib.data.builder.source import SAMed2DFolder
from medplib.data.builder.split import split_of
from medplib.data.builder.writers import AnswerWriter, TemplateWriter, check_answer

__all__ = [
    "AbsencePolicy",
    "AnswerWriter",
    "BuildReport",
    "BuildSettings",
    "OpenAIWriter",
    "RecordSamples",
    "SAMed2DFolder",
    "TemplateWriter",
    "build_mecovqa",
    "check_answer",
    "split_of",
]
