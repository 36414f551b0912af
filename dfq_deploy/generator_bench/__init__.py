"""The benchmark of generators: which one's images calibrate best, under one quantizer.

`recipe` says what is asked for, `images` draws the real ones, `running` goes through all of it (it is
`dfq_deploy.bench_generators`), `results` holds rows, spreads and gaps. Nothing here prints.
"""

__all__: list[str] = []
