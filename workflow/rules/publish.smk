# What makes a folder of results a repository of the Hub, and its upload.
# Needs: the verified files with their reports, measurements where there are some, and the checkpoint's own card and digests.
# Makes, in results/<model>/: README.md, the model card; provenance/, for each report what its files were made of; SHA256SUMS, the
# list of all that is published, which is how a download is checked.
# `publish` is no part of `all`. It has no output, so it always asks the Hub what is there, and uploads what is not.


localrules:
    publish,


rule materials:
    input:
        code=code("materials.py"),
        checkpoint=build.checkpoint_inputs,
    output:
        "results/{model}/work/materials.json",
    log:
        "logs/{model}/materials.log",
    conda:
        "../../envs/run.yaml"
    params:
        source=build.source_of,
    message:
        "{wildcards.model}: list the checkpoint's files with their sha256"
    shell:
        "python {input.code[0]:q} {params.source:q} {input.checkpoint:q} --out {output:q} 2>&1 | tee {log:q}"


rule provenance:
    input:
        code=code("provenance.py"),
        programs=build.programs,
        report="results/{model}/reports/{stem}.json",
        source="results/{model}/work/materials.json",
        materials=build.materials_if_any,
        toolchain="resources/toolchain/stamp.json",
        locks=build.locks,
    output:
        "results/{model}/provenance/{stem}.json",
    log:
        "logs/{model}/provenance-{stem}.log",
    wildcard_constraints:
        stem="[^/]+",
    conda:
        "../../envs/run.yaml"
    params:
        parameters=build.parameters,
        materials=build.material_options,
    message:
        "{wildcards.model}: state what {wildcards.stem} is made of"
    shell:
        "python {input.code[0]:q} {input.report:q} --parameters {params.parameters:q} --source {input.source:q}"
        " {params.materials} --toolchain {input.toolchain:q} --locks {input.locks:q}"
        " --code {input.programs:q} --out {output:q} 2>&1 | tee {log:q}"


rule card:
    input:
        code=code("card.py"),
        template="workflow/templates/card.md",
        files=ancient(build.files_of),  # their reports, which have their sha256, are compared by content
        reports=build.reports_of,
        measurements=build.measurements_of,
        checkpoint=build.card_of_checkpoint_if_any,
        toolchain="resources/toolchain/stamp.json",
    output:
        "results/{model}/README.md",
    log:
        "logs/{model}/card.log",
    conda:
        "../../envs/run.yaml"
    params:
        about=build.about,
        checkpoint=build.card_of_checkpoint,
    message:
        "{wildcards.model}: write the model card"
    shell:
        "python {input.code[0]:q} --files {input.files:q} --reports {input.reports:q}"
        " --measurements {input.measurements:q} --about {params.about:q} --checkpoint-card {params.checkpoint:q}"
        " --toolchain {input.toolchain:q} --template {input.template:q} --out {output:q} 2>&1 | tee {log:q}"


rule sums:
    input:
        code=code("sums.py"),
        files=ancient(build.files_of),
        reports=build.reports_of,
        statements=build.statements_of,
        measurements=build.measurements_of,
        card="results/{model}/README.md",
    output:
        "results/{model}/SHA256SUMS",
    log:
        "logs/{model}/sums.log",
    conda:
        "../../envs/run.yaml"
    message:
        "{wildcards.model}: list what is published"
    shell:
        "python {input.code[0]:q} results/{wildcards.model} --reports {input.reports:q}"
        " --others {input.card:q} {input.statements:q} {input.measurements:q} 2>&1 | tee {log:q}"


# snakemake --cores 1 publish [--config dry_run=true]
rule publish:
    input:
        code=code("publish.py"),
        folders=build.uploads,
    log:
        "logs/publish.log",
    conda:
        "../../envs/run.yaml"
    params:
        targets=build.upload_options,
    message:
        "publish"
    shell:
        "python {input.code[0]:q} {params.targets} 2>&1 | tee {log:q}"
