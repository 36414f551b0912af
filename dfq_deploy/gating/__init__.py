"""The gate: one verdict on a bundle that a pipeline can stop at, with the statistics behind it.

`constants` and `integrity` hold what needs no images, `checks` turns what images show into verdicts, `baseline`
remembers an engine, `speed` times it against float, `writers` tells machines and people. `running` goes through all of
them; it is `dfq_deploy.gate`. Nothing here prints.
"""

__all__: list[str] = []
