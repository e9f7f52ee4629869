"""The reporter of `make report`, under the name by which Snakemake finds it."""

from mtpforge.report.page import Reporter, ReportSettings

__all__ = ["ReportSettings", "Reporter"]
