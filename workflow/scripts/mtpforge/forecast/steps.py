"""The steps of a model's build: the disk, memory and time that each takes."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mtpforge import prompts
from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.convert.donor_head import OWN
from mtpforge.convert.freeing import STEPS
from mtpforge.errors import GgufError, ToolchainError
from mtpforge.forecast import by_shards, costs, planned_ggufs, sweep, upstream_ggufs
from mtpforge.forecast.costs import Cost, Machine, Tokens
from mtpforge.forecast.reruns import Reruns
from mtpforge.gguf import quant_types, reader
from mtpforge.gguf.reader import Gguf
from mtpforge.gguf.split import parse_size
from mtpforge.inject.inject import planned_head
from mtpforge.io.text import text_files
from mtpforge.llama_cpp import memory
from mtpforge.llama_cpp.converter_architectures import why_not_drafting
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.prompts import N_PREDICT
from mtpforge.quantize.job import RUN_BYTES
from mtpforge.quantize.piece_count import pieces_of
from mtpforge.quantize.recipe import Recipe, head_recipe
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.rules import layout, local_paths
from mtpforge.rules.config import Model
from mtpforge.rules.fetch import local_size
from mtpforge.rules.local_paths import FolderPath
from mtpforge.rules.search import stock_of
from mtpforge.rules.variant import ImatrixText, OwnBase, Variant
from mtpforge.rules.verify import smallest_quant
from mtpforge.search import groups
from mtpforge.search.settings import CHUNKS, PROBE, STEP

_OF_ONE_VARIANT = ("quantized", "injected")
"""Folders of files that only a published one is made of."""


@dataclass(frozen=True)
class Step:
    """A job: bytes that its result keeps on the disk, and that it takes while it runs.

    `disk` is what the files of the run take after it; 0 if it will not run.

    `seconds` are those of the last run, if there was one, and otherwise `reckoned`. `why` says why
    it will run; None: it will not.
    """

    stage: str
    name: str
    path: str
    kept: int = 0
    disk: int = 0
    scratch: int = 0
    memory: int = 0
    seconds: float = 0
    reckoned: float = 0
    pieces: int = 1
    servers: int = 0
    why: str | None = "missing"

    @property
    def done(self) -> bool:
        """Whether it will not run."""
        return self.why is None


@dataclass(frozen=True)
class PlannedFile:
    """A published file: its bytes, those of its head, and in how many pieces it is quantized.

    `about`: whether the bytes are not exact, because llama.cpp's converter decides them.
    """

    name: str
    bytes: int
    head: int
    pieces: int = 1
    about: bool = False


class ModelForecast:
    """The steps and files of a model. Raises ForgeError.

    `outline` is its checkpoint, and `drafter` that of its drafter, if it has one of its own;
    `given_size` returns the bytes of a GGUF or importance matrix from elsewhere, and counts them as
    fetched.
    """

    is_by_shards = False

    def __init__(
        self,
        model: Model,
        outline: Outline,
        llama: LlamaCpp,
        machine: Machine,
        given_size: Callable[[layout.GivenFile], int],
        drafter: Outline | None = None,
    ) -> None:
        self.model = model
        self.steps: list[Step] = []
        self.files: list[PlannedFile] = []
        self._outline = outline
        self._drafter = drafter or outline
        self._llama = llama
        self._machine = machine
        self._prompts = len(prompts.read_prompts(Path(model.prompts)))
        self._measured_prompts = len(prompts.read_measured(Path(model.measured_prompts)))
        self._given_size = given_size
        self._parts: dict[str, Gguf] = {}
        self._quants: list[Gguf] = []
        self._record_local_files()
        for variant in model.variants.values():
            self._add_variant(variant)
        if model.sidecar:
            self._add_sidecar(model.sidecar)
        if model.mmproj:
            self._add_vision()
        for other, path in zip(model.compare, layout.others(model), strict=True):
            self._measure_other(given_size(other), path)

    def settle(self, reruns: Reruns) -> None:
        """Take over what Snakemake says of each step; its graph may end where it must run first."""
        self.steps = [replace(step, why=reruns.get(step.path, step.why)) for step in self.steps]

    def follow(self, disk: int, part: str = "", fetched: int = 0) -> int:
        """Set what lies on the disk after each step, and return what does in the end.

        `disk` is what does before. Converting `part` frees shards, of which it fetches some bytes.
        """
        path = layout.unquantized(self.model, part).file if part else ""
        freed, _ = self.freed(part) if part else (0, 0)
        passing = 0
        for number, step in enumerate(self.steps):
            if step.done:
                continue
            is_made = Path(step.path).parent.name in _OF_ONE_VARIANT
            if self.is_by_shards:  # quants are made while converting
                quants = sum(each.kept for each in self._left if each.stage == "quantize")
                disk += quants if step.path == path else -step.kept if is_made else 0
            elif self.model.passing and (is_made or step.stage == "verify"):
                disk -= passing if is_made else 0  # the one before is uploaded and deleted
                passing = step.kept + (0 if is_made else passing)
            disk += step.kept + (fetched - freed if step.path == path else 0)
            self.steps[number] = replace(step, disk=disk)
        return disk

    @property
    def there(self) -> int:
        """Bytes of results that are on the disk and stay."""
        done = [step for step in self.steps if step.done]
        return sum(step.kept for step in done if Path(step.path).exists())

    @property
    def kept(self) -> int:
        """Bytes that the steps which are not done will keep on the disk at the same time."""
        return sum(step.kept for step in self._left) - self.passing

    @property
    def passing(self) -> int:
        """Bytes of files that are uploaded and deleted before the next one is made.

        Shard by shard, all are made at the same time.
        """
        if self.is_by_shards or not self.model.passing:
            return 0
        made = [step for step in self._left if Path(step.path).parent.name in _OF_ONE_VARIANT]
        copies = [step for step in self._left if step.stage == "verify"]
        sizes = [[step.kept for step in steps] for steps in (made, copies)]
        return sum(sum(each) - max(each, default=0) for each in sizes)

    @property
    def peak(self) -> int:
        """The most bytes on the disk, if the step that needs most besides its result is the last.

        Snakemake decides the order of steps.
        """
        return self.kept + self.scratch

    def freed(self, part: str) -> tuple[int, int]:
        """Bytes of the shards that converting a part frees, and those that it writes before.

        Both are 0 if it is converted already.
        """
        path = layout.unquantized(self.model, part).file
        if all(step.path != path for step in self._left):
            return 0, 0
        head = family_of(self._outline.architecture).head_prefix
        tensors = self._outline.tensors.items()
        freed = costs.FREED * sum(each.size for name, each in tensors if head not in name)
        made = self._part(part)
        largest = max(info.size for info in made.tensors.values())
        return int(freed), largest + planned_ggufs.size(made) // STEPS

    def by_shards(self, part: str) -> tuple[int, int]:
        """The most bytes on the disk while a part is converted shard by shard, and of its shards.

        Both are 0 if the model is not built so, or the part is converted already.
        """
        path = layout.unquantized(self.model, part).file
        if not self.is_by_shards or all(step.path != path for step in self._left):
            return 0, 0
        own = OWN.get(part, part) if self.model.head_from else part
        most = by_shards.peak(self._outline, own, self._part(part), self._quants)
        return most, self._checkpoint_size

    @property
    def _checkpoint_size(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return sum(each.size for each in self._outline.tensors.values())

    @property
    def scratch(self) -> int:
        """Bytes of the step that needs most besides its result."""
        return max((step.scratch for step in self._left), default=0)

    @property
    def seconds(self) -> float:
        """The time of the steps that are not done, one after the other."""
        return sum(step.seconds for step in self._left)

    @property
    def servers(self) -> int:
        """How often llama-server will be started."""
        return sum(step.servers for step in self._left)

    @property
    def memory(self) -> int:
        """Bytes of memory of the step that needs most."""
        return max((step.memory for step in self._left), default=0)

    @property
    def _left(self) -> list[Step]:
        return [step for step in self.steps if not step.done]

    # ── files ──

    def _add_variant(self, variant: Variant) -> None:
        pieces = 1
        if variant.base:
            size = self._inject(variant)
        elif variant.converted:
            size = self._convert(variant.part)
        else:
            size, pieces = self._quantize_variant(variant)
        head = self._head_bytes(variant)
        name = layout.stem(self.model, variant.name)
        self.files.append(PlannedFile(name, size, head, pieces, about=self.about))
        self._verify(variant, size)
        if self.model.measure:
            self._measure(variant, size)

    def _add_sidecar(self, file_type: str) -> None:
        size = self._convert("draft")
        packed = file_type in quant_types.PACKED
        if not packed:
            request = QuantizeRequest(file_type, head=head_recipe(file_type))
            made = self._quantized(self._part("draft"), request)
            self._quantize("draft", file_type, self._part("draft"), made, pieces=1)
            size = planned_ggufs.size(made)
            if self.model.max_acceptance_drop < 1:
                self._acceptance()
        part = "trunk" if self.model.drafter else self.model.part if packed else "all"
        self._add_beside(layout.sidecar(self.model, file_type), size, part, head=size)

    def _add_vision(self) -> None:
        output = layout.vision(self.model)
        self._add_beside(output, self._convert("mmproj"), self.model.part, head=0)

    def _add_beside(self, output: layout.Output, size: int, part: str, head: int) -> None:
        """A file that is verified with a part of the checkpoint, or with a quant if that fits."""
        about = self.about or not head
        self.files.append(PlannedFile(output.stem, size, head, about=about))
        target = self._convert(part)
        if (quant := smallest_quant(self.model)) and not self._fits(target + size):
            stem = layout.stem(self.model, quant.name)
            target = next(file.bytes for file in self.files if file.name == stem)
        servers, cost = self._proof(target, drafts=head > 0, tokens=head > 0)
        self._add(Step("verify", output.stem, output.report, servers=servers), cost)

    @property
    def about(self) -> bool:
        """Whether sizes are not exact: llama.cpp's converter decides them, and has not run yet."""
        there = all(each.path.is_file() for each in self._parts.values())
        return not (self.model.native or there)

    def _part(self, part: str) -> Gguf:
        """A part of the checkpoint as a BF16 GGUF, whether it is converted or not."""
        if part not in self._parts:
            self._parts[part] = self._planned(part)
        return self._parts[part]

    def _planned(self, part: str) -> Gguf:
        if self.model.native and part != "mmproj":
            pre = self.model.tokenizer_pre
            return planned_ggufs.converted(self._outline, part, pre)
        with suppress(GgufError, OSError):
            return reader.read(Path(layout.converted(self.model.key, part).file))
        return upstream_ggufs.converted(self._drafter if part == "draft" else self._outline, part)

    def _head(self) -> Gguf:
        """What has the head: llama.cpp's converter cannot write it alone."""
        return self._part("head" if self.model.native else "all")

    def _head_bytes(self, variant: Variant) -> int:
        if variant.head_types is None:
            return 0
        infos = planned_head(self._head(), _head_recipe(variant))
        return sum(info.size for info in infos)

    # ── steps ──

    def _record_local_files(self) -> None:
        """Hash the checkpoints and GGUFs of a user, unless nothing is made from them."""
        for at, path in local_paths.find(self.model, ""):
            is_used = self.model.uses_source or not at.startswith("/source/")
            if is_used and (isinstance(path, FolderPath) or path.endswith(".gguf")):
                step = Step("local_files", layout.place(path), layout.local_record(path))
                self._add(step, costs.record(local_size(path), self._machine))

    def _convert(self, part: str) -> int:
        made = self._part(part)
        self._add_conversion(part, layout.unquantized(self.model, part).file, made)
        return planned_ggufs.size(made)

    def _convert_head(self, variant: Variant) -> None:
        """The head that is injected, which can be another checkpoint's."""
        if donor := self.model.donor(variant):
            name = f"donor-{layout.donor_name(donor)}"
            self._add_conversion(name, layout.donated(self.model.key, donor).file, self._head())
        else:
            self._convert("head" if self.model.native else "all")

    def _add_conversion(self, name: str, path: str, made: Gguf) -> None:
        size = planned_ggufs.size(made)
        source = self._checkpoint_size if name in ("all", "trunk") else size
        computed = planned_ggufs.computed_share(self._outline)
        cost = costs.convert(size, self._machine, source, computed)
        if self.is_by_shards:
            cost = replace(cost, kept=by_shards.left_of(made))
        if not self.model.native or name == "mmproj":
            largest = max(info.size for info in made.tensors.values())
            cost = costs.convert_upstream(size, self._machine, largest=largest, source=source)
        self._add(Step("convert", name, path), cost)

    def _quantize_variant(self, variant: Variant) -> tuple[int, int]:
        """The bytes of the result, and the number of pieces."""
        source = self._part(variant.part)
        self._convert(variant.part)
        if isinstance(variant.imatrix, ImatrixText):
            self._imatrix(variant.imatrix, source)
        elif variant.imatrix:
            self._given_size(variant.imatrix)
        if variant.searched:
            self._search(variant, source)
        request = QuantizeRequest(
            variant.file_type, head=_head_recipe(variant), recipe=tuple(variant.recipe.items())
        )
        covered = variant.imatrix is not None
        made = self._quantized(source, request, covered)
        self._quants.append(made)
        pieces = variant.pieces or self.model.pieces or self._default_pieces(source, made)
        size = _wanted(variant, made) or planned_ggufs.size(made)
        self._quantize("quantized", variant.name, source, made, pieces=pieces, size=size)
        if variant.searched:
            self._compare(variant, source, made)
        return size, pieces

    def _quantized(self, source: Gguf, request: QuantizeRequest, covered: bool = False) -> Gguf:
        if self.about:  # llama-quantize needs all metadata
            return planned_ggufs.estimated(source, request)
        return planned_ggufs.quantized(source, request, self._llama, covered)

    def _quantize(
        self, kind: str, name: str, source: Gguf, made: Gguf, pieces: int, size: int = 0
    ) -> None:
        """The file has `size` bytes if its types are not those of `made`."""
        size = size or planned_ggufs.size(made)
        largest = max(info.size for info in source.tensors.values())
        copied = min(max(RUN_BYTES, largest), planned_ggufs.largest_piece(source, made, pieces))
        path = layout.quantized(self.model.key, kind, name).file
        joined = pieces > 1 and not self.is_by_shards  # there, its piece becomes the file
        cost = costs.quantize(
            0 if self.is_by_shards else planned_ggufs.size(source),
            size,
            self._machine,
            cpu_seconds=planned_ggufs.quantize_seconds(source, made),
            largest=largest,
            scratch=max(size, copied) if joined else 0,  # the pieces, beside the file
        )
        if joined:
            cost += costs.join(size, self._machine)
        self._add(Step("quantize", name, path, pieces=pieces), cost)

    def _default_pieces(self, source: Gguf, made: Gguf) -> int:
        seconds = planned_ggufs.quantize_seconds(source, made) / self._machine.threads
        return pieces_of(seconds, self._machine.nodes)

    def _inject(self, variant: Variant) -> int:
        self._convert_head(variant)
        if isinstance(variant.base, OwnBase):
            size = self._inject_into_own(variant, variant.base.type)
        else:
            assert variant.base is not None
            size = self._given_size(variant.base) + self._head_bytes(variant)
        path = layout.injected(self.model.key, variant.name).file
        cost = costs.inject(size, self._machine, self._quantized_head(variant))
        self._add(Step("inject", variant.name, path), cost)
        return size

    def _quantized_head(self, variant: Variant) -> Cost:
        """Quantizing the head that is injected; nothing if it keeps its types."""
        head = self._head().head
        infos = planned_head(head, _head_recipe(variant))
        if infos == list(head.tensors.values()):
            return Cost()
        source, made = (
            planned_ggufs.laid_out(head.path, head.metadata, each)
            for each in (list(head.tensors.values()), infos)
        )
        return costs.quantize(
            planned_ggufs.size(source),
            planned_ggufs.size(made),
            self._machine,
            cpu_seconds=planned_ggufs.quantize_seconds(source, made),
            largest=max(info.size for info in source.tensors.values()),
            scratch=0,
        )

    def _inject_into_own(self, variant: Variant, file_type: str) -> int:
        """The bytes of a base that is quantized here, with the head."""
        self._convert("trunk")
        trunk = self._part("trunk")
        base = self._quantized(trunk, QuantizeRequest(file_type))
        self._quantize("trunk", file_type, trunk, base, pieces=1)
        return planned_ggufs.size(planned_ggufs.injected(base, self._head(), _head_recipe(variant)))

    def _imatrix(self, matrix: ImatrixText, source: Gguf) -> None:
        path = layout.imatrix(self.model.key, matrix)
        text = sum(each.stat().st_size for each in text_files(Path(matrix.text)))
        size = planned_ggufs.size(source)
        if matrix.chat:  # llama-server applies the chat template, without a token
            chats = layout.conversations(self.model.key, matrix)
            step = Step("conversations", Path(chats).stem, chats, servers=1)
            self._add(step, self._run(size, Tokens()) + Cost(kept=text))
        step = Step("imatrix", Path(path).stem, path)
        self._add(step, self._run(size, Tokens(text=costs.text_tokens(text))))

    def _search(self, variant: Variant, source: Gguf) -> None:
        """Errors of each candidate, and sensitivities unless they are taken from a table."""
        model, matrix = self.model.key, layout.matrix_name(variant.imatrix)
        size = planned_ggufs.size(source)
        text = variant.searched_text
        for kind in [*variant.searched_types, *([PROBE] if text else [])]:
            cpu = size / 2e9 / STEP * quant_types.SECONDS[kind]
            path = layout.errors(model, matrix, kind)
            cost = costs.errors(size, self._machine, cpu_seconds=cpu)
            self._add(Step("errors", f"{matrix}-{kind}", path), cost)
        if text:
            self._search_logits(text)
            path = layout.sensitivities(model, matrix, text, variant.method)
            by: groups.By = "tensor" if variant.method == "tensor" else "class"
            runs = len(groups.tried(source, by))
            step = Step("sensitivities", f"{matrix}-{Path(path).stem}", path)
            self._add(step, costs.sensitivities(size, self._machine, runs))

    def _compare(self, variant: Variant, source: Gguf, stock: Gguf) -> None:
        """llama.cpp's own mixture, which is made and measured unless it is a variant too."""
        settings, size = self.model.measure, planned_ggufs.size(stock)
        cost = Cost()
        is_made = stock_of(self.model, variant) is None and self._fits(size)
        if settings and settings.text and is_made:
            made = costs.quantize(
                planned_ggufs.size(source),
                size,
                self._machine,
                cpu_seconds=planned_ggufs.quantize_seconds(source, stock),
                largest=max(info.size for info in source.tensors.values()),
                scratch=size,
            )
            text = costs.measured_tokens(Path(settings.text), settings.chunks)
            cost = replace(made, kept=0) + self._run(size, Tokens(text=text))
        path = layout.compared(self.model.key, variant.name)
        self._add(Step("compare", variant.name, path), cost)

    def _verify(self, variant: Variant, size: int) -> None:
        output = layout.output(self.model, variant.name)
        own = variant.head_types and not (variant.foreign or variant.head_from)
        if own and not variant.unquantized and self.model.max_acceptance_drop < 1:
            self._acceptance()
        quantized = variant.foreign or variant.file_type not in quant_types.UNQUANTIZED
        servers, run = 0, Cost()
        if quantized or self._fits(size):
            servers, run = self._proof(size, drafts=self._drafting_blocks(variant) > 0)
            if self._in_several_files(variant, size):
                servers += 1
                run += self._run(size, Tokens(drafted=N_PREDICT))
        weights = planned_ggufs.size(self._part(variant.part))
        read = size if quantized and not variant.foreign else size + self._checkpoint_size
        cost = costs.compare(weights, self._machine, read) + run
        linked = variant.converted and self.model.conversion_split(variant.part)
        if output.split and not linked:
            cost += costs.copy(size, self._machine)
        self._add(Step("verify", output.stem, output.report, servers=servers), cost)

    def _in_several_files(self, variant: Variant, size: int) -> bool:
        limit = variant.split or self.model.split
        return bool(limit) and size > parse_size(limit or "")

    def _proof(self, size: int, *, drafts: bool, tokens: bool = True) -> tuple[int, Cost]:
        """How often verification starts llama-server, and its cost: twice with a head that drafts.

        Without `tokens`, it generates next to nothing.
        """
        made = costs.verified_tokens(self._prompts) if tokens else 0
        if not drafts:
            return 1, self._run(size, Tokens(made))
        equal = costs.equal_tokens(self._prompts)
        return 2, self._run(size, Tokens(equal, made), servers=2)

    def _drafting_blocks(self, variant: Variant) -> int:
        """The blocks of the head that llama-server drafts with; 0 if it cannot."""
        if variant.head_types is None:
            return 0
        head = self._head()
        return 0 if why_not_drafting(head) else len(head.head_blocks)

    def _acceptance(self) -> None:
        parts = ("draft", "trunk") if self.model.drafter else ("all",)
        size = sum(map(self._convert, parts))
        if self._fits(size) and not self.is_by_shards:
            step = Step("acceptance", "BF16", layout.acceptance(self.model.key), servers=1)
            self._add(step, self._run(size, Tokens(drafted=costs.verified_tokens(self._prompts))))

    def _measure(self, variant: Variant, size: int) -> None:
        settings = self.model.measure
        assert settings is not None
        output = layout.output(self.model, variant.name)
        text = costs.measured_tokens(Path(settings.text), settings.chunks) if settings.text else 0
        if text and self.model.has_unquantized(variant):
            self._logits(text)
        step = Step("measure", output.stem, output.measurement)
        if not self._fits(size):
            self._add(step, Cost())
            return
        blocks = self._drafting_blocks(variant)
        planned = sweep.sweep(settings, self._measured_prompts, blocks)
        rounds, cost = sweep.cost(planned, settings.minutes, size, self._machine, self._share)
        text += costs.task_tokens(settings.task_files)
        if text:
            cost += self._run(size, Tokens(text=text))
        self._add(replace(step, servers=rounds.servers), cost)

    def _measure_other(self, size: int, path: str) -> None:
        """Somebody else's file, which is fetched for it."""
        settings = self.model.measure
        assert settings is not None and settings.text is not None
        text = costs.measured_tokens(Path(settings.text), settings.chunks)
        self._logits(text)
        cost = self._run(size, Tokens(text=text)) if self._fits(size) else Cost()
        self._add(Step("measure_other", Path(path).stem, path), cost)

    def _logits(self, tokens: int) -> None:
        path = layout.reference_logits(self.model.key)
        self._reference(Step("logits", "BF16", path), tokens)

    def _search_logits(self, text: str) -> None:
        path = layout.search_logits(self.model.key, text)
        self._reference(Step("search_logits", Path(path).stem, path), costs.CHUNK * CHUNKS)

    def _reference(self, step: Step, tokens: int) -> None:
        """Logits of the BF16 file."""
        whole = self._part(self.model.part)
        size = self._convert(self.model.part)
        if not self._fits(size):
            self._add(step, Cost())
            return
        vocabulary = whole.tensors["token_embd.weight"].shape[0]
        kept = costs.logits_size(tokens, vocabulary)
        self._add(step, self._run(size, Tokens(text=tokens)) + Cost(kept=kept))

    def _fits(self, size: int) -> bool:
        """Whether a file is run: BF16 files and measurements may be left out."""
        with suppress(ToolchainError):  # before the programs are built, GPUs are not known
            return size <= memory.room(size, self._machine.memory, self._llama)
        return False

    def _run(self, size: int, tokens: Tokens, servers: int = 1) -> Cost:
        """Running a file of this size in llama.cpp."""
        return costs.run(size, self._machine, tokens, servers, self._share)

    @cached_property
    def _share(self) -> float:
        """The share of a file that is read for a token."""
        return planned_ggufs.share_per_token(self._part("trunk"))

    def _add(self, step: Step, cost: Cost) -> None:
        if all(step.path != other.path for other in self.steps):
            reckoned = cost.seconds + self._machine.start
            seconds = self._earlier(step, reckoned) or reckoned
            why = None if Path(step.path).exists() else step.why
            found = {**vars(cost), "seconds": seconds, "reckoned": reckoned, "why": why}
            self.steps.append(replace(step, **found))

    def _earlier(self, step: Step, reckoned: float) -> float | None:
        """The seconds that the same job, with its pieces, took the last time.

        If it was at work for less, it waited: for the disk no longer than reckoned, and else for
        processors that were busy with other programs.
        """
        kind = f"{Path(step.path).parent.name}-{step.name}"
        names = {"acceptance": "acceptance", "logits": "reference-logits", "quantize": kind}
        jobs = [names.get(step.stage, f"{step.stage}-{step.name}")]
        if step.pieces > 1:
            numbers = range(1, step.pieces + 1)
            jobs += [f"piece-{kind}-{number}-of-{step.pieces}" for number in numbers]
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            took, worked = map(sum, zip(*map(self._recorded, jobs), strict=True))
            return min(took, worked + reckoned)
        return None

    def _recorded(self, job: str) -> tuple[float, float]:
        """Seconds of a job, and of its CPUs, as Snakemake recorded them.

        Raises OSError, or another error, if it did not.
        """
        text = Path(f"benchmarks/{self.model.key}/{job}.jsonl").read_text(encoding="utf-8")
        record = json.loads(text.splitlines()[-1])
        took = float(record["s"])
        worked = record.get("cpu_time")  # a short job has none
        return took, float(took if worked is None else worked)


class ShardByShardForecast(ModelForecast):
    """That of a model which is built shard by shard (see `lean.by_shards`)."""

    is_by_shards = True


def _head_recipe(variant: Variant) -> Recipe:
    types = variant.head_types
    return head_recipe(types.type, tuple((types.tensors or {}).items())) if types else ()


def _wanted(variant: Variant, made: Gguf) -> int:
    """The bytes of a file whose types are found for an amount; 0 if it is not."""
    if variant.bits:
        return int(variant.bits * sum(info.elements for info in made.tensors.values()) / 8)
    is_amount = variant.size is not None and variant.size not in quant_types.FILE_TYPES
    return parse_size(variant.size or "") if is_amount else 0
