"""Charts: results as pictures for a report or a slide, one file for each. Nothing is computed here.

The only room that loads matplotlib, so that what draws nothing does without it.
"""

__all__: list[str] = []
