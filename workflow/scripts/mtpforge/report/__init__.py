"""The summary table and the figures of the report."""
