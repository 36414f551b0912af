"""A sweep: many exports, each with a folder and a process of its own, and one table over all of them.

`file` reads what is asked for, `running` hands it to the workers (it is `dfq_deploy.sweep`), `results` holds what came
of it. Nothing here prints.
"""

__all__: list[str] = []
