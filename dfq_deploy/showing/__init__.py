"""What a person sees on the terminal: tables and lines, a file for each kind of result. Nothing is computed here.

What computes is imported for its types alone: `--help` waits for no torch.
"""

__all__: list[str] = []
