"""The report of a run: one HTML file that needs nothing beside it."""

from pyarith.reporting.report.page import Report, write_report

__all__ = ["Report", "write_report"]
