"""A CNN lesson as a reproducible workflow: what the stages in stages/ and the commands import."""
