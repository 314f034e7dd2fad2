"""A CNN lesson as a reproducible workflow: the code that stages/ and the commands import."""
