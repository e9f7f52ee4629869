# mtpforge: GGUF quantizations with a working multi-token-prediction head.
# `all` builds the models in config.yaml and config.d. Each file of workflow/rules/ is one stage; its
# inputs and parameters come from the module of the same name in workflow/scripts/mtpforge/rules/.
import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, f"{workflow.basedir}/workflow/scripts")
from mtpforge import isolation

isolation.forget_variables()
# `python` in a rule is the one that runs Snakemake, even if its environment is not activated.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]),
    PYTHONUNBUFFERED="1",  # logs are read while they are written
)

gc.set_threshold(100_000)  # the graph is many objects, none of them garbage: an eighth of its time

from snakemake.exceptions import WorkflowError

from mtpforge.errors import ForgeError
from mtpforge.rules import console, entry_files, lean, profiles, snakemake_lock
from mtpforge.rules.build import Build
from mtpforge.rules.code import code, digest, pins
from mtpforge.rules.config import check_files
from mtpforge.rules.resources import free_downloads

terminal = console.attach(workflow)
snakemake_lock.guard(workflow)
free_downloads(workflow)

try:
    if workflow.is_main_process:
        profiles.check_options(sys.argv[1:])
    check_files(workflow.configfiles)
except ForgeError as error:
    raise WorkflowError(str(error)) from None


configfile: "config.yaml"


try:
    lean.take_from_profile(config, workflow)
    entry_files.add_entries(config, workflow.config_settings.overwrite_config)
    build = Build(config, checkpoints)
    if workflow.is_main_process:
        build.fetch.refresh_local()
except ForgeError as error:
    raise WorkflowError(str(entry_files.located(error))) from None


if terminal:
    terminal.build = build
    if "build" in workflow.config_settings.config:
        terminal.only = [model.key for model in build.config.chosen]

asked = build.needs.asked
models = [model.key for model in build.config.chosen]
planning = build.planning(
    # config.yaml, which Snakemake lists last, and files of `--configfile`
    [*workflow.configfiles[-1:], *workflow.overwrite_configfiles],
    machines=lean.by_profile(workflow, "plan_types", "machines"),
)


wildcard_constraints:
    model="|".join(map(re.escape, build.names()["model"])),
    base="|".join(map(re.escape, build.names()["base"])),
    variant="|".join(map(re.escape, build.names()["variant"])),
    name="|".join(map(re.escape, build.names()["name"])),


onstart:
    snakemake_lock.end_on_signals()  # Snakemake's scheduler has just set its own
    if terminal:
        terminal.forecast(models, planning)
    rules_to_run = {job.rule.name for job in workflow.dag.needrun_jobs()}
    if "publish" in rules_to_run:
        try:
            build.publish.check_access(builds=rules_to_run != {"publish"})
        except ForgeError as error:
            raise WorkflowError(str(error)) from None


onsuccess:
    snakemake_lock.clear_pieces(workflow, build.folders())
    if terminal:
        terminal.success()


onerror:
    if workflow.is_main_process:
        build.publish.withdraw(
            file for job in workflow.dag.needrun_jobs() for file in job.output
        )
    if terminal:
        terminal.failure()


# A cluster's queue would take longer than they do.
localrules:
    all,
    add,
    toolchain,
    plots,
    recipe,
    measuring,
    provenance,
    card,
    summary,
    sums,


rule all:
    default_target: True
    input:
        build.files(),
        build.reports(),
        build.measurements(),
        "results/summary.md",
        build.publish.folders(),


include: "workflow/rules/plan.smk"
include: "workflow/rules/toolchain.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/convert.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/inject.smk"
include: "workflow/rules/verify.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/publish.smk"
