"""Reading a running model: families, layout, trace, replay and inspection.

`families` says where the parts of a model type are, `layout` resolves them in a model, `sites` names what is read and
`recording` hooks it, `softmax` and `readers` make mixing matrices of it. `trace` reads taps in one forward pass,
`replay` runs single blocks or mixers on given inputs, `inspect` lists what can be read.
"""
