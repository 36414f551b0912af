"""The report: what is known of a bundle as one HTML file that needs no network and no JavaScript.

`facts` reads what lies in the folder, `measuring` measures what does not, `drawing` makes pictures part of the page,
`page` writes it, and `comparing` puts two of them side by side. A section whose facts cannot be had is left out and
named.
"""

__all__: list[str] = []
