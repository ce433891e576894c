"""Tasks that ship with the package: prompts, a reference language model and a reward under one name."""
