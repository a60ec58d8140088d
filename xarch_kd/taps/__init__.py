"""Reading a running model: families, layout, trace, replay and inspection.

`families` says where the parts of a model type are, `layout` resolves them in a model, `trace` reads taps in one
forward pass, `replay` runs single blocks or mixers on given inputs, `inspect` lists what can be read.
"""
