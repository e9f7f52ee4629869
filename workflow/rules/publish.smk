# Completes a model's folder as a repository for the Hub, and uploads it.
# Needs: the verified files with their reports and measurements, and the checkpoint's card and
# digests.
# Makes, in results/<model>/: README.md, the model card, and DETAILS.md, its second page;
# provenance/, a statement per report that lists the inputs of its files; <name>-imatrix.gguf, the
# importance matrix that was computed here; and SHA256SUMS, the list of all published files with the
# card's pictures, to check downloads.
# `publish` is not part of `all`. It has no output, so it always asks the Hub or the object storage
# which files it has, and uploads the others.


localrules:
    upload,
    delete,
    publish,
    publish_imatrix,


rule materials:
    input:
        code=code("materials.py"),
        checkpoint=build.fetch.checkpoint_inputs,
    output:
        "results/{model}/work/materials.json",
    log:
        "logs/{model}/materials.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.materials),
    params:
        code=digest("materials.py"),
        files=build.publish.source_files,
        source=build.publish.source,
        recorded=build.publish.recorded_option,
    message:
        "{wildcards.model}: list the checkpoint's files with their sha256"
    shell:
        "python {input.code[0]:q} {params.source:q} {params.files:q} {params.recorded}"
        " --out {output:q} > {log:q} 2>&1"


rule provenance:
    input:
        code=code("provenance.py"),
        report="results/{model}/reports/{stem}.json",
        source=build.publish.source_list,
        materials=build.publish.material_inputs,
        toolchain="resources/toolchain/stamp.json",
        locks=build.publish.locks,
    output:
        "results/{model}/provenance/{stem}.json",
    log:
        "logs/{model}/provenance-{stem}.log",
    wildcard_constraints:
        stem="[^/]+",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("provenance.py"),
        parameters=build.publish.parameters,
        programs=build.publish.programs,
        made_by=build.publish.program_digests,
        source=build.publish.source_option,
        materials=build.publish.material_options,
    message:
        "{wildcards.model}: state the provenance of {wildcards.stem}"
    shell:
        "python {input.code[0]:q} {input.report:q} --parameters {params.parameters:q}"
        " {params.source} {params.materials} --toolchain {input.toolchain:q}"
        " --locks {input.locks:q} --code {params.programs:q} --out {output:q} > {log:q} 2>&1"


# With `publish: {when: verified}`, which `publish` asks for.
rule upload:
    input:
        code=code("publish_file.py"),
        file=ancient(build.publish.file),
        examined=build.publish.examined,
    output:
        "results/{model}/work/uploaded/{stem}.json",
    log:
        "logs/{model}/upload-{stem}.log",
    wildcard_constraints:
        stem="[^/]+",
    priority: 3 * build.publish.priority
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.publish, beside=True),
        processors=build.needs.uploading_processors,
        download=1,  # so that none runs beside a measurement
        upload=1,
    params:
        code=digest("publish_file.py"),
        place=build.publish.place_option,
    message:
        "{wildcards.model}: upload {wildcards.stem}"
    shell:
        "python {input.code[0]:q} {input.examined[0]:q} {params.place} --out {output:q}"
        " > {log:q} 2>&1"


# With `delete_after`. A job of its own: a killed one only has to delete again. It does not follow
# changes of its program, because without its output everything would be made again.
rule delete:
    input:
        code=ancient(code("delete_uploaded.py")),
        receipt="results/{model}/work/uploaded/{stem}.json",
    output:
        touch("results/{model}/work/uploaded/{stem}.deleted"),
    log:
        "logs/{model}/delete-{stem}.log",
    wildcard_constraints:
        stem="[^/]+",
    priority: 4 * build.publish.priority
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        paths=build.publish.unneeded,
    message:
        "{wildcards.model}: delete {wildcards.stem}, which is uploaded"
    shell:
        "python {input.code[0]:q} {input.receipt:q} {params.paths} > {log:q} 2>&1"


# The computed matrix is an intermediate: this one stays.
rule publish_imatrix:
    input:
        code=code("publish_imatrix.py"),
        file=ancient(build.publish.computed),
        digest=build.publish.computed_digest,
    output:
        file="results/{model}/{stem}-imatrix.gguf",
        digest="results/{model}/work/published/{stem}-imatrix.json",
    log:
        "logs/{model}/publish-{stem}-imatrix.log",
    wildcard_constraints:
        stem="[^/]+",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("publish_imatrix.py"),
    message:
        "{wildcards.model}: put the importance matrix {wildcards.stem}-imatrix beside the files"
    shell:
        "python {input.code[0]:q} {input.file:q} --recorded {input.digest:q}"
        " --digest {output.digest:q} --out {output.file:q} > {log:q} 2>&1"


rule card:
    input:
        code=code("card.py"),
        template="workflow/templates/card.md",
        details="workflow/templates/details.md",
        files=ancient(build.publish.needed),  # the reports have their sha256
        reports=build.publish.reports,
        measurements=build.measure.measurements,
        compared=build.search.compared,
        others=build.measure.others,
        coverages=build.publish.coverages,
        checkpoint=build.publish.checkpoint_card_inputs,
        toolchain="resources/toolchain/stamp.json",
    output:
        card="results/{model}/README.md",
        details="results/{model}/DETAILS.md",
    log:
        "logs/{model}/card.log",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads  # to hash the files
    resources:
        **asked(build.needs.small),
    params:
        code=digest("card.py"),
        files=build.publish.present,
        about=build.publish.about,
        checkpoint=build.publish.checkpoint_card,
    message:
        "{wildcards.model}: write the model card"
    shell:
        "python {input.code[0]:q} --files {params.files:q} --reports {input.reports:q}"
        " --measurements {input.measurements:q} --compared {input.compared:q}"
        " --others {input.others:q} --coverages {input.coverages:q} --about {params.about:q}"
        " --checkpoint-card {params.checkpoint:q} --toolchain {input.toolchain:q}"
        " --template {input.template:q} --details-template {input.details:q}"
        " --out {output.card:q} > {log:q} 2>&1"


rule sums:
    input:
        code=code("sums.py"),
        files=ancient(build.publish.needed),
        reports=build.publish.reports,
        statements=build.publish.statements,
        measurements=build.measure.measurements,
        pages=["results/{model}/README.md", "results/{model}/DETAILS.md"],
        pictures=build.publish.pictures,
        matrices=ancient(build.publish.matrices),
        matrix_digests=build.publish.matrix_digests,
    output:
        "results/{model}/SHA256SUMS",
    log:
        "logs/{model}/sums.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("sums.py"),
    message:
        "{wildcards.model}: write SHA256SUMS"
    shell:
        "python {input.code[0]:q} results/{wildcards.model} --reports {input.reports:q}"
        " --others {input.pages:q} {input.statements:q} {input.measurements:q}"
        " --pictures {input.pictures:q} --matrices {input.matrix_digests:q} > {log:q} 2>&1"


# snakemake --cores 1 publish [--config dry_run=true]
rule publish:
    input:
        code=code("publish.py"),
        folders=build.publish.uploads,
    log:
        "logs/publish.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.publish),
    params:
        code=digest("publish.py"),
        targets=build.publish.upload_options,
    message:
        build.publish.task
    shell:
        "python {input.code[0]:q} {params.targets} 2>&1 | tee {log:q}"
