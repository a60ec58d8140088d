"""Taps of a running model: families, layout, trace, replay and inspection.

`families` is the table of module paths, `layout` resolves them in a model, `sites` names the recorded places and
`recording` hooks them, `softmax` and `adapters` build mixing matrices. `trace` records taps in one forward pass,
`replay` runs single blocks or mixers on given inputs, `inspect` lists the available taps.
"""
