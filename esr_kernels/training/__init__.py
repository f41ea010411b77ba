"""Training: what `esr-kernels train` is made of.

`config` reads and checks a configuration, `data` makes pairs of patches from pictures, `losses`, `schedules` and `ema`
are what their names say, `distributed` joins several processes, `trainer` runs the stages, `export` writes the result.
"""
