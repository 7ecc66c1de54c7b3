"""Training with Lightning: the module, its callbacks, the files of a run, and the command line."""
