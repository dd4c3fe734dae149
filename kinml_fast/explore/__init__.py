"""Data that a model asks for: an ensemble drives sampling, and what its members disagree about is labelled.

`rounds` goes through the rounds of an exploration; `config` says what they are. `sampling` makes geometries,
`selection` takes some of them, `labels` has them computed by `worker` processes with the calculators of `calculators`,
`data` writes them where training reads them, `folder` knows what is where, and `report` draws how it went.
"""
