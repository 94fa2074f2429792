"""The command `tokun`: one name for everything that is run. `python -m tokun` is the same.

command   finds the subcommand and calls it          commands   the table of subcommands: a name, a module, a line
train     `tokun train`, and train.py                sample     `tokun sample`, and sample.py; its options: sample_options
info      `tokun info`: a checkpoint's card          completion   scripts for bash, zsh, fish and tcsh

Each subcommand is a module with `make_parser()` and `main(argv)`. It is imported when it is typed, so `tokun --help` is quick.
"""
