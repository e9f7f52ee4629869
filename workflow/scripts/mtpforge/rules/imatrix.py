"""Importance matrices as inputs and options of the jobs that quantize with them."""

import shlex

from mtpforge.rules import layout
from mtpforge.rules.fetch import tracked_inputs
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import Imatrix, ImatrixText


class ImatrixRules(Stage):
    """The importance matrix of a job, which a stage finds from its wildcards."""

    def imatrix_files(self, wildcards: Wildcards) -> list[str]:
        """The importance matrix, if it is made here."""
        imatrix = self._imatrix(wildcards)
        made = isinstance(imatrix, ImatrixText)
        return [layout.local_path(imatrix, wildcards.model)] if imatrix and made else []

    def imatrix_inputs(self, wildcards: Wildcards) -> list[str]:
        """The digest of the importance matrix, or the record of a given one."""
        imatrix = self._imatrix(wildcards)
        return tracked_inputs(imatrix, wildcards.model) if imatrix else []

    def imatrix_option(self, wildcards: Wildcards) -> str:
        """The option that names the importance matrix."""
        imatrix = self._imatrix(wildcards)
        path = [layout.local_path(imatrix, wildcards.model)] if imatrix else []
        return shlex.join(word for each in path for word in ("--imatrix", each))

    def imatrix_recorded_option(self, wildcards: Wildcards) -> str:
        """The option that names its digest."""
        imatrix = self._imatrix(wildcards)
        if imatrix is None:
            return ""
        if isinstance(imatrix, ImatrixText):
            recorded = layout.imatrix_digest(wildcards.model, imatrix)
        else:
            recorded = layout.recorded(imatrix)
        return shlex.join(["--imatrix-recorded", recorded])

    def _imatrix(self, wildcards: Wildcards) -> Imatrix | None:
        raise NotImplementedError
