"""The sections of the report, in order. A new one is a file here that defines a ``Section``, and its line below."""

from pyarith.reporting.report.sections.attention import ATTENTION
from pyarith.reporting.report.sections.attribution import ATTRIBUTION
from pyarith.reporting.report.sections.compare import COMPARE
from pyarith.reporting.report.sections.cosines import COSINES
from pyarith.reporting.report.sections.effects import HEADS, MLPS
from pyarith.reporting.report.sections.knockout import KNOCKOUT
from pyarith.reporting.report.sections.lens import LENS
from pyarith.reporting.report.sections.overlap import OVERLAP
from pyarith.reporting.report.sections.overview import JUDGING, OVERVIEW
from pyarith.reporting.report.sections.profile import PROFILE
from pyarith.reporting.report.sections.provenance import PROVENANCE
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.sections.transfer import TRANSFER
from pyarith.reporting.report.sections.tune import TUNE

SECTIONS: tuple[Section, ...] = (
    OVERVIEW,
    HEADS,
    MLPS,
    JUDGING,
    KNOCKOUT,
    ATTENTION,
    COSINES,
    LENS,
    ATTRIBUTION,
    OVERLAP,
    TRANSFER,
    TUNE,
    COMPARE,
    PROFILE,
    PROVENANCE,
)

__all__ = ["SECTIONS", "Section"]
