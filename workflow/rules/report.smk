# Figures of measurements and tensors, for `make report`.
# Needs: measurements, verified files and their reports.
# Makes: results/<model>/plots/*.svg, which `make report` puts into one page, with the table of
# files, the graph of the rules and the run times. The card shows two of them.


report: "../report/workflow.rst"


rule plots:
    input:
        rules.all.input,
        build.report.figures(),


rule plot:
    input:
        code=code("plot.py"),
        measurements=build.measure.measurements,
        compared=build.search.compared,
        others=build.measure.others,
    output:
        report(
            "results/{model}/plots/{figure}.svg",
            caption="../report/measurements.rst",
            category="{model}",
            labels={"figure": "{figure}"},
        ),
    log:
        "logs/{model}/plot-{figure}.log",
    wildcard_constraints:
        figure="speed|acceptance|distance|drafting",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("plot.py"),
    message:
        "{wildcards.model}: draw the figure of {wildcards.figure}"
    shell:
        "python {input.code[0]:q} {wildcards.figure} {input.measurements:q}"
        " --compared {input.compared:q} --others {input.others:q} --out {output:q}"
        " > {log:q} 2>&1"


rule plot_tensors:
    input:
        code=code("plot.py"),
        file=ancient(build.measure.drawn),
        report=build.measure.report,
    output:
        report(
            "results/{model}/plots/tensors-{base}-{variant}.svg",
            caption="../report/tensors.rst",
            category="{model}",
            labels={"figure": "tensors of {variant}"},
        ),
    log:
        "logs/{model}/plot-tensors-{base}-{variant}.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("plot.py"),
    message:
        "{wildcards.model}: draw the tensors of {wildcards.variant}"
    shell:
        "python {input.code[0]:q} tensors {input.report:q} --file {input.file:q} --out {output:q}"
        " > {log:q} 2>&1"
