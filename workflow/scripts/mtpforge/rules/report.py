"""Stage `report`: figures of measured and verified files."""

from mtpforge.rules import layout
from mtpforge.rules.config import Model
from mtpforge.rules.stage import Stage


class ReportRules(Stage):
    """Inputs of rules/report.smk."""

    def figures(self) -> list[str]:
        """All figures: measurements of each model, tensors of each variant."""
        return [
            layout.plot(model, figure)
            for model in self.config.chosen
            for figure in [*layout.measured_figures(model), *_tensors(model)]
        ]


def _tensors(model: Model) -> list[str]:
    return [f"tensors-{layout.stem(model, variant)}" for variant in model.variants]
