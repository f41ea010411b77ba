"""The commands of `esr-kernels`, one module each: `add_parser(subparsers)` and `run(args) -> exit status`."""
