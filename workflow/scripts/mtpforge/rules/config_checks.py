"""Checks of `config.yaml` that involve several keys, or files on this machine."""

import os
from collections import Counter

from mtpforge import progress
from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types
from mtpforge.quantize.recipe import default_head
from mtpforge.rules import entry_files, layout, local_paths
from mtpforge.rules.config import Config, Model, S3Folder
from mtpforge.rules.variant import (
    HubGguf,
    ImatrixText,
    LocalFolder,
    LocalGguf,
    OwnBase,
    Variant,
)
from mtpforge.suggest import close

UNSEEN = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""llama.cpp b11434 does not load a repository's file as the model if its name has one of these
(`common/download.cpp`)."""


def check(config: Config) -> None:
    """Raise ConfigError, with the key's path, for impossible settings; warn of unwise ones."""
    for name, model in config.models.items():
        path = f"models/{name}"
        for key, variant in model.variants.items():
            _check_base(f"{path}/variants/{key}", variant)
        _check_sources(path, model)
        _check_sidecar(path, model)
        _check_compare(path, model)
        for key, variant in model.variants.items():
            stem = layout.stem(model, key)
            _check_name(f"{path}/variants/{key}", stem)
            _check_variant(f"{path}/variants/{key}", variant)
            _check_text(f"{path}/variants/{key}", variant, model)
            _check_packed(f"{path}/variants/{key}", variant, model)
            if not stem.isprintable():
                what = "base" if model.adopts(variant) else "folder"
                where = f"{path}/variants/{key}/base" if model.adopts(variant) else f"{path}/source"
                _refuse(f"{where}/path", f"file names start with the {what}'s name: rename it")
    _check_chosen(config)
    _check_compared_once(config)
    for key, local in local_paths.find(config.toolchain, "toolchain"):
        if problem := local.problem():
            _refuse(key, problem)
    for model in config.chosen:
        _check_files(f"models/{model.key}", model)
    _check_repositories(config)
    _check_outputs(config)
    for line in [*low_bit_heads(config), *texts_seen_before(config)]:
        progress.say(f"warning: {entry_files.named(line)}")


def low_bit_heads(config: Config) -> list[str]:
    """A warning for each chosen variant whose head has a type below 4 bits."""
    lines = []
    for model in config.chosen:
        for variant in model.variants.values():
            low = [kind for kind in _head_types(variant) if quant_types.bits(kind) < 4]
            if low:
                path = f"models/{model.key}/variants/{variant.name}/head"
                few = f"a head at {low[0]} ({quant_types.bits(low[0]):.2f} bits) drafts badly"
                lines.append(f"config.yaml: {path}: {few}: use Q4_K or better")
    return lines


def texts_seen_before(config: Config) -> list[str]:
    """A warning for each chosen variant that is measured on the text of its importance matrix."""
    lines = []
    for model in config.chosen:
        measured = model.measure.text if model.measure else None
        for variant in model.variants.values():
            matrix = variant.imatrix
            if measured and isinstance(matrix, ImatrixText) and _same(matrix.text, measured):
                path = f"models/{model.key}/variants/{variant.name}/imatrix/text"
                why = f"{measured} is also the text that is measured, so figures look too good"
                lines.append(f"config.yaml: {path}: {why}: give another one")
    return lines


def _same(path: str, other: str) -> bool:
    return os.path.normpath(path) == os.path.normpath(other)


def _refuse(path: str, message: str) -> None:
    raise ConfigError(f"config.yaml: {path}: {message}")


def _check_sources(path: str, model: Model) -> None:
    """Check that all that is needed has a source, and that donors of heads can be used."""
    if model.source is None and model.uses_source:
        why = "only variants with a `base` from elsewhere and a `head_from` do without"
        _refuse(f"{path}/source", f"missing: {why}")
    if model.norms and not model.native:
        _refuse(f"{path}/norms", "llama.cpp's converter always reads w - 1: remove it")
    if model.chat_template and all(each.foreign for each in model.variants.values()):
        _refuse(f"{path}/chat_template", "each base keeps its own template: remove it")
    for key, variant in model.variants.items():
        if variant.head_from and variant.base is None:
            way = "set the model's, or give the variant a `base`, such as {type: Q4_K_M}"
            _refuse(f"{path}/variants/{key}/head_from", f"without a base, {way}")
        if model.donor(variant) and not (model.native or model.adopts(variant)):
            why = "llama.cpp's cannot join the head of `head_from` to a trunk that it converts"
            way = "give {} a `base` from elsewhere, or `head: none` if the head is a drafter"
            _refuse(f"{path}/converter", f"{why}: {way.format(key)}")
    heads = [model.donor(variant) for variant in model.variants.values()]
    unused = model.head_from and not model.sidecar and model.head_from not in heads
    if unused and not model.native:
        way = "set `sidecar: Q8_0`, or the `head` of a variant, or remove it"
        _refuse(f"{path}/head_from", f"no file has this head: {way}")


def _check_name(path: str, stem: str) -> None:
    for part in UNSEEN:
        if part in stem:
            why = f"llama.cpp would not find {stem}.gguf in a repository"
            _refuse(path, f"{why}, because its name contains {part!r}: rename it")


def _check_variant(path: str, variant: Variant) -> None:
    _check_search(path, variant)
    if not variant.foreign and variant.type is None:
        try:
            quant_types.check_published_type(variant.file_type)
        except ConfigError as error:
            _refuse(path, f"{error}; a variant of another name needs a `type`")
    head = variant.head_types
    kind = variant.file_type
    own = default_head(kind)
    if variant.unquantized and head and (head.type != own or head.tensors):
        _refuse(f"{path}/head", f"{kind} is not quantized, so its head must be {own} or none")
    if variant.unquantized and variant.tensors:
        _refuse(f"{path}/tensors", f"{kind} is not quantized, so a recipe has no effect: remove it")
    _check_imatrix(path, variant)


def _check_search(path: str, variant: Variant) -> None:
    """Check the keys of a search, which need `size` or `bits`."""
    if not variant.searched:
        for key in ("sensitivity", "candidates", "text"):
            if getattr(variant, key) is not None:
                _refuse(f"{path}/{key}", "only for a `size` or `bits` to search for: give one")
        return
    key = "size" if variant.size else "bits"
    if variant.size and variant.bits:
        _refuse(f"{path}/bits", "the same as `size`: give one of them")
    if variant.base:
        _refuse(f"{path}/{key}", "a base is already quantized: remove one of them")
    if variant.tensors:
        _refuse(f"{path}/tensors", f"`{key}` finds the types: remove one of them")
    if variant.unquantized:
        _refuse(f"{path}/{key}", f"{variant.file_type} is not quantized: give another `type`")
    if variant.size in (*quant_types.UNQUANTIZED, *quant_types.PACKED):
        _refuse(f"{path}/size", f"{variant.size} is not quantized: nothing is to be found")
    if variant.text and variant.method == "prior":
        _refuse(f"{path}/text", "`sensitivity: prior` runs nothing: remove one of them")


def _check_text(path: str, variant: Variant, model: Model) -> None:
    """A mixture that was found on the measured text would look better than it is."""
    measured = model.measure.text if model.measure else None
    found = variant.searched_text
    if found and measured and _same(found, measured):
        _refuse(
            f"{path}/text",
            f"{found} is the text that the file is measured on: give another one for the search",
        )


def _check_sidecar(path: str, model: Model) -> None:
    if model.sidecar in quant_types.PACKED and model.native:
        why = f"only llama.cpp's converter writes {model.sidecar}"
        _refuse(f"{path}/sidecar", f"{why}: set `converter: llama.cpp` on the model")


def _check_compare(path: str, model: Model) -> None:
    """Check that there are BF16 logits to compare other files with."""
    if model.compare and not (model.measure and model.measure.text):
        way = "set `measure: {text: FILE}`, a text to compare the predictions on"
        _refuse(f"{path}/compare", f"nothing to measure it with: {way}")
    if model.compare and not any(map(model.has_unquantized, model.variants.values())):
        why = "every variant has a base from elsewhere, so there is no BF16 file to compare with"
        _refuse(f"{path}/compare", f"{why}: add a variant without a base, or remove it")


def _check_compared_once(config: Config) -> None:
    """A fetched file is deleted once it is measured, so that nothing else may use it."""
    used: dict[str, str] = {}
    for model in config.models.values():
        for variant in model.variants.values():
            if variant.foreign and variant.base and not isinstance(variant.base, OwnBase):
                path = f"models/{model.key}/variants/{variant.name}/base"
                used.setdefault(_place(model, variant.base), path)
    for model in config.models.values():
        for number, other in enumerate(model.compare):
            path = f"models/{model.key}/compare/{number}"
            first = used.setdefault(_place(model, other), path)
            if first == path:
                continue
            if first.startswith(f"models/{model.key}/"):
                _refuse(path, f"the same file as {first}, with the same figures: remove it")
            _refuse(
                path,
                f"is {first} too, and deleted once it is measured: download it, and name its "
                "`path` in one of the two",
            )


def _place(model: Model, file: LocalGguf | HubGguf) -> str:
    """Where a file that was not made here is; models share what is fetched."""
    name = layout.given_name(file)
    return name if isinstance(file, HubGguf) else f"{model.key}/{name}"


def _check_packed(path: str, variant: Variant, model: Model) -> None:
    kind = variant.file_type
    if kind in quant_types.PACKED and not variant.foreign:
        if variant.base:
            _refuse(f"{path}/base", f"llama-quantize cannot make {kind}")
        if model.converter != "llama.cpp":
            why = f"only llama.cpp's converter writes {kind}, from a checkpoint that is packed so"
            other = ", or make MXFP4_MOE (experts alone)" if kind == "MXFP4" else ""
            _refuse(path, f"{why}: set `converter: llama.cpp` on the model{other}")


def _check_base(path: str, variant: Variant) -> None:
    if variant.base is None and variant.replace_head:
        _refuse(f"{path}/replace_head", "there is no base with a head to replace: remove it")
    if variant.base and variant.tensors:
        _refuse(f"{path}/tensors", "a base is already quantized, a recipe cannot change it")
    if variant.base and variant.head_types is None:
        _refuse(
            f"{path}/head",
            "`none` leaves the head out, but a base needs a head to inject: give its type",
        )


def _check_imatrix(path: str, variant: Variant) -> None:
    if variant.imatrix:
        if variant.base or variant.unquantized:
            _refuse(f"{path}/imatrix", "nothing is quantized with it here: remove it")
        return
    kinds = [*([] if variant.foreign else [variant.file_type]), *_head_types(variant)]
    if variant.searched:
        kinds += [*variant.searched_types, variant.size or ""]
    for kind in [*kinds, *variant.recipe.values()]:
        if kind in quant_types.NEED_IMATRIX:
            way = "use another type" if variant.base else "give one, or use another type"
            _refuse(f"{path}/imatrix", f"missing, and {kind} cannot be quantized without: {way}")


def _head_types(variant: Variant) -> list[str]:
    head = variant.head_types
    return [*(head.tensors or {}).values(), head.type] if head else []


def _check_chosen(config: Config) -> None:
    for name in config.models if config.build == "all" else config.build:
        if name not in config.models:
            known = ", ".join(config.models) or "none"
            meant = close(name, config.models)
            _refuse("build", f"there is no model {name!r}: models has {known}{meant}")


def _check_files(path: str, model: Model) -> None:
    """Check the files of models under `build`; others need not be on this machine."""
    if isinstance(model.source, LocalFolder) and model.source.path.endswith(".gguf"):
        _refuse(
            f"{path}/source/path",
            "a GGUF is not a checkpoint: name the checkpoint here, and give a variant"
            f" `base: {{path: {model.source.path}}}` to inject its head",
        )
    unused = "" if model.uses_source else f"{path}/source/"
    for key, local in local_paths.find(model, path):
        problem = None if unused and key.startswith(unused) else local.problem()
        if problem:
            _refuse(key, problem)


def _check_repositories(config: Config) -> None:
    """A repository or bucket's folder has one card and one list of files, so it has one model."""
    seen: dict[str, str] = {}
    for model in config.chosen:
        if model.publish is None:
            continue
        if isinstance(model.publish, S3Folder):
            key, place, kind = "url", model.publish.url, "folder"
        else:
            key, place, kind = "repo", model.publish.repo, "repository"
        other = seen.setdefault(place.lower(), model.key)
        if other != model.key:
            path = f"models/{model.key}/publish/{key}"
            _refuse(path, f"{place} is the {kind} of {other}: give each model its own")


def _check_outputs(config: Config) -> None:
    outputs = [output for model in config.chosen for output in layout.outputs(model)]
    counts = Counter(path for output in outputs for path in (output.file, output.report))
    for path, count in counts.items():
        if count > 1:
            raise ConfigError(f"config.yaml: two variants or sidecars would be {path}: rename one")
