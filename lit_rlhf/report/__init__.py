"""Reports that a person looks at: figures, tables and samples in one self-contained report.html, and as data in report.json."""

from lit_rlhf.report.figures import Bars, Plot, Series, histogram, lines, smoothed
from lit_rlhf.report.page import Answer, Markup, Report, Sample, Samples, Section, Table, Text

__all__ = [
    "Answer", "Bars", "Markup", "Plot", "Report", "Sample", "Samples", "Section", "Series", "Table", "Text",
    "histogram", "lines", "smoothed",
]  # fmt: skip
