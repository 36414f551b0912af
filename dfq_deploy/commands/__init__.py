"""The commands: each is a function, its flags are its parameters and the fields of a recipe.

Nothing is computed here: a command calls the public function of its name, has the result printed, and returns the exit
code. Comes before `cli`, which gathers them; one file for each of the things that a person does.
"""

__all__ = ["EXIT"]

EXIT = {"pass": 0, "fail": 1, "undecided": 2, "good": 0, "bad": 1, "doubtful": 2}
"""Exit codes by verdict; 3 is a wrong call or an error."""
